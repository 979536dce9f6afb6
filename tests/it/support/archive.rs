//! Archives that no program writes: every name and link is as it is given.

use std::io::Write as _;

/// A tar in the making. Each entry has an extended header, so that names may be of any length.
#[derive(Clone, Debug, Default)]
pub struct Archive(Vec<u8>);

impl Archive {
    /// A file.
    pub fn file(self, path: &str, content: &str) -> Self {
        self.entry(b'0', path, "", content.as_bytes(), &[])
    }

    /// A directory.
    pub fn directory(self, path: &str) -> Self {
        self.entry(b'5', path, "", b"", &[])
    }

    /// A symbolic link.
    pub fn symlink(self, path: &str, target: &str) -> Self {
        self.entry(b'2', path, target, b"", &[])
    }

    /// A hard link.
    pub fn hardlink(self, path: &str, target: &str) -> Self {
        self.entry(b'1', path, target, b"", &[])
    }

    /// An entry of any type, and further records of its extended header.
    pub fn entry(
        mut self,
        kind: u8,
        path: &str,
        link: &str,
        content: &[u8],
        records: &[(&str, &str)],
    ) -> Self {
        let mut extended = Vec::new();
        let mut all = vec![("path", path)];
        if !link.is_empty() {
            all.push(("linkpath", link));
        }
        all.extend(records);
        for (key, value) in all {
            // The length counts its own digits.
            let rest = format!(" {key}={value}\n");
            let mut length = rest.len() + 1;
            while length != rest.len() + length.to_string().len() {
                length += 1;
            }
            write!(extended, "{length}{rest}").expect("memory");
        }
        self.block(b'x', "PaxHeader", &extended);
        self.block(kind, "name", content);
        self
    }

    fn block(&mut self, kind: u8, name: &str, content: &[u8]) {
        self.0
            .extend_from_slice(&header(kind, name, content.len() as u64));
        self.0.extend_from_slice(content);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
    }

    /// The bytes with the end that an archive has.
    pub fn end(mut self) -> Vec<u8> {
        self.0.resize(self.0.len() + 1024, 0);
        self.0
    }

    /// The bytes so far.
    pub fn bytes(self) -> Vec<u8> {
        self.0
    }
}

/// A header block of root's, of 2001.
pub fn header(kind: u8, name: &str, size: u64) -> [u8; 512] {
    let mut block = [0; 512];
    let mut put = |at: usize, text: &str| {
        block[at..at + text.len()].copy_from_slice(text.as_bytes());
    };
    put(0, name);
    put(100, if kind == b'5' { "0000755" } else { "0000644" });
    put(108, "0000000");
    put(116, "0000000");
    put(136, "07346545000");
    put(257, "ustar");
    put(263, "00");
    // Eleven digits end at 8 GiB; GNU's binary form goes on.
    if size < 1 << 33 {
        put(124, &format!("{size:011o}"));
    } else {
        block[124] = 0x80;
        block[128..136].copy_from_slice(&size.to_be_bytes());
    }
    block[156] = kind;
    seal(&mut block);
    block
}

fn seal(block: &mut [u8]) {
    block[148..156].fill(b' ');
    let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
    block[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
}
