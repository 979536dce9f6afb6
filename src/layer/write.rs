//! [`write()`]: changes → tar.
//!
//! The archive is what containerd and BuildKit write with Go's `archive/tar`: a ustar
//! header where one can say it, else a PAX header before it with only the records that
//! are needed. Times are whole seconds, cut and not rounded, as containerd's differ does;
//! whiteouts have mode, owner and time 0, as since containerd 2.0. Owners have no names.

use std::ffi::OsStr;
use std::io::{self, Read, Write};
use std::ops::Range;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use super::header::{
    BLOCK, GID, Header, LINK, MAJOR, MINOR, MODE, MTIME, NAME, PREFIX, SIZE, UID, fits,
};
use super::{LayerError, pax, whiteout};
use crate::rootfs::{Change, ChangeKind, Data, Entry, FileContent, FileSource, Metadata, order};

/// Size of the buffer that files are read with.
const COPY_BUFFER_BYTES: usize = 256 << 10;

/// Writes `changes` as an uncompressed layer.
///
/// `changes` must be in path order, parents before children, no path twice; this is
/// checked. `epoch`, in seconds since 1970 UTC, clamps every mtime. The same changes give
/// the same bytes. Sparse files are written with their zeros.
///
/// # Errors
/// See [`seal`](super::seal).
///
/// <https://github.com/opencontainers/image-spec/blob/main/layer.md>
pub fn write<E>(
    changes: impl IntoIterator<Item = Result<Change, E>>,
    epoch: Option<i64>,
    out: impl Write,
) -> Result<(), LayerError>
where
    E: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let mut writer = Writer {
        out,
        epoch,
        buffer: vec![0; COPY_BUFFER_BYTES],
    };
    let mut last: Option<PathBuf> = None;
    for change in changes {
        let change = change.map_err(|error| LayerError::Changes(error.into()))?;
        check_path(&change.path)?;
        if let Some(after) = last.take()
            && order(&after, &change.path).is_ge()
        {
            return Err(LayerError::Order {
                path: change.path,
                after,
            });
        }
        match change.kind {
            ChangeKind::Removed => writer.removed(&change.path)?,
            ChangeKind::Entry(entry) => writer.entry(&change.path, entry)?,
        }
        last = Some(change.path);
    }
    writer.bytes(&[0; 2 * BLOCK])?;
    writer.out.flush().map_err(LayerError::Write)
}

/// Refuses what would be no path of a layer, or another one than meant.
fn check_path(path: &Path) -> Result<(), LayerError> {
    let fail = |reason| {
        Err(LayerError::Name {
            path: path.to_owned(),
            reason,
        })
    };
    if path.as_os_str().is_empty() {
        return fail("it is the root itself");
    }
    for component in path.components() {
        match component {
            Component::Normal(name) if whiteout::meaning(name) != whiteout::Meaning::File => {
                return fail("names that begin with \".wh.\" mean removed files in a layer");
            }
            Component::Normal(name) if name.as_bytes().contains(&0) => {
                return fail("its name contains a NUL");
            }
            Component::Normal(_) => {}
            _ => return fail("its path is not relative to the root"),
        }
    }
    Ok(())
}

struct Writer<W> {
    out: W,
    epoch: Option<i64>,
    buffer: Vec<u8>,
}

/// What a header says beside metadata.
struct Item<'i> {
    kind: u8,
    link: &'i [u8],
    size: u64,
    device: (u32, u32),
}

impl<'i> Item<'i> {
    fn of(kind: u8) -> Self {
        Self {
            kind,
            link: b"",
            size: 0,
            device: (0, 0),
        }
    }

    fn link(kind: u8, link: &'i OsStr) -> Self {
        Self {
            link: link.as_bytes(),
            ..Self::of(kind)
        }
    }

    fn device(kind: u8, major: u32, minor: u32) -> Self {
        Self {
            device: (major, minor),
            ..Self::of(kind)
        }
    }
}

impl<W: Write> Writer<W> {
    fn removed(&mut self, path: &Path) -> Result<(), LayerError> {
        let name = whiteout::whiteout_of(path.file_name().unwrap_or_default());
        let name = path.with_file_name(name);
        self.header(&name, &Metadata::default(), &Item::of(b'0'))
    }

    fn entry(&mut self, path: &Path, entry: Entry) -> Result<(), LayerError> {
        let metadata = &entry.metadata;
        match entry.data {
            Data::File(content) => {
                let size = content.size_bytes;
                let item = Item {
                    size,
                    ..Item::of(b'0')
                };
                self.header(path, metadata, &item)?;
                self.content(path, content)?;
                let padding = size.next_multiple_of(BLOCK as u64) - size;
                self.bytes(&[0; BLOCK][..usize::try_from(padding).unwrap_or(0)])
            }
            Data::Directory { opaque } => {
                self.header(path, metadata, &Item::of(b'5'))?;
                if opaque {
                    let name = path.join(whiteout::OPAQUE);
                    self.header(&name, &Metadata::default(), &Item::of(b'0'))?;
                }
                Ok(())
            }
            Data::Symlink(target) => {
                let mut metadata = metadata.clone();
                // Linux has no other mode for links; an archive must not depend on who asks.
                metadata.mode = 0o777;
                check_target(path, &target)?;
                self.header(path, &metadata, &Item::link(b'2', &target))
            }
            Data::Hardlink(target) => {
                check_path(&target)?;
                if order(&target, path).is_ge() {
                    return Err(LayerError::Name {
                        path: path.to_owned(),
                        reason: "it is a hard link to a file that comes after it",
                    });
                }
                self.header(path, metadata, &Item::link(b'1', target.as_os_str()))
            }
            Data::CharDevice { major: 0, minor: 0 } => Err(LayerError::Name {
                path: path.to_owned(),
                reason: "a character device 0/0 is a whiteout of the overlay file system",
            }),
            Data::CharDevice { major, minor } => {
                self.header(path, metadata, &Item::device(b'3', major, minor))
            }
            Data::BlockDevice { major, minor } => {
                self.header(path, metadata, &Item::device(b'4', major, minor))
            }
            Data::Fifo => self.header(path, metadata, &Item::of(b'6')),
        }
    }

    fn header(
        &mut self,
        path: &Path,
        metadata: &Metadata,
        item: &Item<'_>,
    ) -> Result<(), LayerError> {
        if metadata
            .xattrs
            .keys()
            .any(|name| name.as_bytes().contains(&b'='))
        {
            return Err(LayerError::Name {
                path: path.to_owned(),
                reason: "an archive cannot hold an extended attribute with \"=\" in its name",
            });
        }
        let mut name = path.as_os_str().as_bytes().to_vec();
        if item.kind == b'5' {
            name.push(b'/');
        }
        let mtime = match self.epoch {
            Some(epoch) => metadata.mtime.seconds.min(epoch),
            None => metadata.mtime.seconds,
        };
        let records = records(&name, metadata, mtime, item);
        let mut header = Header::ustar(item.kind);
        if records.is_empty() {
            match split(&name) {
                Some((prefix, rest)) => {
                    header.set_text(PREFIX, prefix);
                    header.set_text(NAME, rest);
                }
                None => header.set_text(NAME, &name),
            }
            header.set_text(LINK, item.link);
        } else {
            self.extended_header(&name, &records)?;
            header.set_text(NAME, &for_old_readers(&name, NAME));
            header.set_text(LINK, &for_old_readers(item.link, LINK));
        }
        let (major, minor) = item.device;
        let numbers = [
            (MODE, u64::from(metadata.mode & 0o7777)),
            (UID, u64::from(metadata.uid)),
            (GID, u64::from(metadata.gid)),
            (SIZE, item.size),
            (MTIME, u64::try_from(mtime).unwrap_or(0)),
            (MAJOR, u64::from(major)),
            (MINOR, u64::from(minor)),
        ];
        if !fits(MAJOR, u64::from(major)) || !fits(MINOR, u64::from(minor)) {
            return Err(LayerError::Name {
                path: path.to_owned(),
                reason: "its device number is too large",
            });
        }
        for (field, value) in numbers {
            header.set_number(field, value);
        }
        header.seal();
        self.bytes(&header.0)
    }

    fn extended_header(&mut self, name: &[u8], records: &[u8]) -> Result<(), LayerError> {
        let mut header = Header::ustar(b'x');
        let at = name.iter().rposition(|b| *b == b'/').map_or(0, |at| at + 1);
        let (directory, file) = name.split_at(at);
        let mut own_name = [directory, b"PaxHeaders.0/", file].concat();
        own_name.retain(u8::is_ascii);
        own_name.truncate(NAME.len());
        while own_name.ends_with(b"/") {
            own_name.pop();
        }
        header.set_text(NAME, &own_name);
        for field in [MODE, UID, GID, MTIME] {
            header.set_number(field, 0);
        }
        header.set_number(SIZE, records.len() as u64);
        header.seal();
        self.bytes(&header.0)?;
        self.bytes(records)?;
        let padding = records.len().next_multiple_of(BLOCK) - records.len();
        self.bytes(&[0; BLOCK][..padding])
    }

    fn content(&mut self, path: &Path, content: FileContent) -> Result<(), LayerError> {
        let want_bytes = content.size_bytes;
        let changed = |got_bytes| LayerError::SizeChanged {
            path: path.to_owned(),
            got_bytes,
            want_bytes,
        };
        let read_error = |source| LayerError::ReadFile {
            path: path.to_owned(),
            source,
        };
        match content.source {
            FileSource::Bytes(bytes) => {
                if bytes.len() as u64 != want_bytes {
                    return Err(changed(bytes.len() as u64));
                }
                self.bytes(&bytes)
            }
            source @ (FileSource::Open(_) | FileSource::Read(_)) => {
                let mut file = source.reader().map_err(read_error)?;
                let mut got = 0;
                loop {
                    let read = read_some(&mut file, &mut self.buffer).map_err(read_error)?;
                    got += read as u64;
                    // More than announced is found before it is written: content beyond
                    // the size would be read as headers.
                    if got > want_bytes || (read == 0 && got < want_bytes) {
                        return Err(changed(got));
                    }
                    if read == 0 {
                        return Ok(());
                    }
                    self.out
                        .write_all(&self.buffer[..read])
                        .map_err(LayerError::Write)?;
                }
            }
        }
    }

    fn bytes(&mut self, bytes: &[u8]) -> Result<(), LayerError> {
        self.out.write_all(bytes).map_err(LayerError::Write)
    }
}

fn read_some(file: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        match file.read(buffer) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            other => return other,
        }
    }
}

fn check_target(path: &Path, target: &OsStr) -> Result<(), LayerError> {
    if target.is_empty() || target.as_bytes().contains(&0) {
        return Err(LayerError::Name {
            path: path.to_owned(),
            reason: "its link target is empty or contains a NUL",
        });
    }
    Ok(())
}

/// The records of the extended header, sorted by key; none where a ustar header says it all.
///
/// As in Go's `archive/tar`, a path that ustar could split is repeated here only where
/// another record makes the header necessary.
fn records(name: &[u8], metadata: &Metadata, mtime: i64, item: &Item<'_>) -> Vec<u8> {
    let mut records: Vec<(Vec<u8>, Vec<u8>)> = Vec::new();
    let mut record = |key: &[u8], value: Vec<u8>| records.push((key.to_vec(), value));
    for (name, value) in &metadata.xattrs {
        record(
            &[pax::XATTR_PREFIX, name.as_bytes()].concat(),
            value.clone(),
        );
    }
    let decimal = |value: &dyn ToString| value.to_string().into_bytes();
    for (key, field, value) in [
        (&b"uid"[..], UID, u64::from(metadata.uid)),
        (b"gid", GID, u64::from(metadata.gid)),
        (b"size", SIZE, item.size),
    ] {
        if !fits(field, value) {
            record(key, decimal(&value));
        }
    }
    if !u64::try_from(mtime).is_ok_and(|mtime| fits(MTIME, mtime)) {
        record(b"mtime", decimal(&mtime));
    }
    if !item.link.is_ascii() || item.link.len() > LINK.len() {
        record(b"linkpath", item.link.to_vec());
    }
    let long = name.len() > NAME.len();
    if !name.is_ascii() || (long && (split(name).is_none() || !records.is_empty())) {
        records.push((b"path".to_vec(), name.to_vec()));
    }
    records.sort();
    let mut out = Vec::new();
    for (key, value) in records {
        pax::push(&mut out, &key, &value);
    }
    out
}

/// What a reader that does not know extended headers sees of a name.
fn for_old_readers(name: &[u8], field: Range<usize>) -> Vec<u8> {
    let mut name: Vec<u8> = name.iter().copied().filter(u8::is_ascii).collect();
    if name.len() > field.len() {
        name.truncate(field.len());
        // Some take any name that ends in a slash for a directory.
        while name.ends_with(b"/") {
            name.pop();
        }
    }
    name
}

/// Splits a long ASCII path at a slash into what fits the prefix and name fields.
fn split(path: &[u8]) -> Option<(&[u8], &[u8])> {
    if path.len() <= NAME.len() || !path.is_ascii() {
        return None;
    }
    // The slash may stand right behind the prefix, but not at the end of the path.
    let end = (PREFIX.len() + 1).min(path.len() - 1);
    let slash = path[..end].iter().rposition(|b| *b == b'/')?;
    let (prefix, name) = (&path[..slash], &path[slash + 1..]);
    (!prefix.is_empty() && !name.is_empty() && name.len() <= NAME.len()).then_some((prefix, name))
}

#[cfg(test)]
mod tests {
    use std::io::Seek;
    use std::sync::Arc;

    use super::super::testing::{all_well, tar_of};
    use super::super::{EntryKind, Limits, TarReader};
    use super::*;
    use crate::rootfs::Time;

    fn change(path: &str, metadata: Metadata, data: Data) -> Change {
        Change {
            path: path.into(),
            kind: ChangeKind::Entry(Entry { metadata, data }),
        }
    }

    fn plain(path: &str, data: Data) -> Change {
        change(path, Metadata::default(), data)
    }

    fn bytes(content: &[u8], size_bytes: u64) -> Data {
        let source = FileSource::Bytes(Arc::from(content));
        Data::File(FileContent { size_bytes, source })
    }

    fn opened(content: &[u8], size_bytes: u64) -> Data {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(content).unwrap();
        file.rewind().unwrap();
        let source = FileSource::Open(Box::new(move || Ok(file)));
        Data::File(FileContent { size_bytes, source })
    }

    fn removed(path: &str) -> Change {
        Change {
            path: path.into(),
            kind: ChangeKind::Removed,
        }
    }

    #[test]
    fn a_plain_entry_is_one_ustar_header() {
        let metadata = Metadata {
            mode: 0o4755,
            uid: 1000,
            gid: 100,
            mtime: Time {
                seconds: 1_500_000_000,
                nanoseconds: 999_999_999,
            },
            ..Metadata::default()
        };
        let tar = tar_of(vec![change("bin/su", metadata, bytes(b"abc", 3))]);
        let mut want = vec![0; 512];
        for (at, text) in [
            (0, "bin/su"),
            (100, "0004755\0"),
            (108, "0001750\0"),
            (116, "0000144\0"),
            (124, "00000000003\0"),
            (136, "13132027400\0"),
            (148, "010404\0 "),
            (156, "0"),
            (257, "ustar\x0000"),
            (329, "0000000\0"),
            (337, "0000000\0"),
        ] {
            want[at..at + text.len()].copy_from_slice(text.as_bytes());
        }
        assert_eq!(
            tar[..512].escape_ascii().to_string(),
            want.escape_ascii().to_string()
        );
        assert_eq!(tar[512..515], *b"abc");
        assert!(tar[515..].iter().all(|b| *b == 0));
        assert_eq!(tar.len(), 4 * 512);
    }

    /// Types and names of all headers, also of extended ones.
    fn headers(tar: &[u8]) -> Vec<String> {
        let mut out = Vec::new();
        let mut at = 0;
        while tar[at] != 0 {
            let header = Header(tar[at..at + 512].try_into().unwrap());
            assert!(header.checksum_is_right());
            let size = usize::try_from(header.number(SIZE).unwrap()).unwrap();
            let name = header.name().escape_ascii().to_string();
            out.push(format!("{} {name}", header.kind() as char));
            let content = &tar[at + 512..][..size];
            if header.kind() == b'x' {
                out.push(content.escape_ascii().to_string());
            }
            at += 512 + size.next_multiple_of(512);
        }
        out
    }

    #[test]
    fn extended_headers_hold_what_ustar_cannot() {
        let (a, b, c) = ("a".repeat(100), "b".repeat(54), "c".repeat(101));
        let with = |uid, seconds, xattr: &[u8]| Metadata {
            uid,
            mtime: Time {
                seconds,
                nanoseconds: 1,
            },
            xattrs: (!xattr.is_empty())
                .then(|| ("user.x".into(), xattr.to_vec()))
                .into_iter()
                .collect(),
            ..Metadata::default()
        };
        let none = || Metadata::default();
        let split_name = format!("{a}/{b}/{a}");
        for (change, want) in [
            (change(&a, none(), Data::Fifo), vec![format!("6 {a}")]),
            (
                change(&split_name, none(), Data::Fifo),
                vec![format!("6 {split_name}")],
            ),
            (
                change(&split_name, with(0, 0, b"\n"), Data::Fifo),
                vec![
                    format!("x {a}"),
                    format!("25 SCHILY.xattr.user.x=\\n\\n266 path={split_name}\\n"),
                    format!("6 {a}"),
                ],
            ),
            (
                change(&c, none(), Data::Fifo),
                vec![
                    "x PaxHeaders.0/".to_owned() + &c[..87],
                    format!("111 path={c}\\n"),
                    format!("6 {}", &c[..100]),
                ],
            ),
            (
                change(
                    "ü",
                    with(0o10_000_000, -1, b""),
                    Data::Directory { opaque: false },
                ),
                vec![
                    "x /PaxHeaders.0".to_owned(),
                    "12 mtime=-1\\n12 path=\\xc3\\xbc/\\n15 uid=2097152\\n".to_owned(),
                    "5 /".to_owned(),
                ],
            ),
            (
                change("s", none(), Data::Symlink(c.clone().into())),
                vec![
                    "x PaxHeaders.0/s".to_owned(),
                    format!("115 linkpath={c}\\n"),
                    "2 s".to_owned(),
                ],
            ),
            (
                change("s", none(), Data::Symlink(a.clone().into())),
                vec!["2 s".to_owned()],
            ),
            (
                change("t", with(0, 0o77_777_777_777 + 1, b""), Data::Fifo),
                vec![
                    "x PaxHeaders.0/t".to_owned(),
                    "20 mtime=8589934592\\n".to_owned(),
                    "6 t".to_owned(),
                ],
            ),
        ] {
            let path = change.path.clone();
            assert_eq!(headers(&tar_of(vec![change])), want, "{path:?}");
        }
    }

    #[test]
    fn removed_and_opaque_become_whiteouts() {
        let late = Metadata {
            mode: 0o755,
            mtime: Time {
                seconds: 50,
                nanoseconds: 0,
            },
            ..Metadata::default()
        };
        let changes = vec![
            change("d", late.clone(), Data::Directory { opaque: true }),
            removed("d/.hidden"),
            change("d/f", late, bytes(b"", 0)),
            removed("x"),
        ];
        let mut tar = Vec::new();
        write(all_well(changes), Some(40), &mut tar).unwrap();
        assert_eq!(
            headers(&tar),
            [
                "5 d/",
                "0 d/.wh..wh..opq",
                "0 d/.wh..hidden",
                "0 d/f",
                "0 .wh.x"
            ]
        );
        let mut reader = TarReader::new(&tar[..], Limits::default());
        let mut entries = Vec::new();
        while let Some(entry) = reader.next().unwrap() {
            let is_directory = entry.kind == EntryKind::Directory;
            entries.push((
                is_directory,
                entry.metadata.mode,
                entry.metadata.mtime.seconds,
            ));
        }
        let whiteout = (false, 0, 0);
        assert_eq!(
            entries,
            [
                (true, 0o755, 40),
                whiteout,
                whiteout,
                (false, 0o755, 40),
                whiteout
            ]
        );
    }

    #[test]
    fn what_no_layer_can_express_is_refused() {
        let fifo = |path| plain(path, Data::Fifo);
        let link = |path, target: &str| plain(path, Data::Hardlink(target.into()));
        let xattr = Metadata {
            xattrs: [("user.a=b".into(), Vec::new())].into(),
            ..Metadata::default()
        };
        for (changes, message) in [
            (
                vec![fifo("")],
                "\"\" cannot be put into a layer: it is the root itself",
            ),
            (
                vec![fifo("/a")],
                "\"/a\" cannot be put into a layer: its path is not relative to the root",
            ),
            (
                vec![fifo("a/../b")],
                "\"a/../b\" cannot be put into a layer: its path is not relative to the root",
            ),
            (
                vec![removed("..")],
                "\"..\" cannot be put into a layer: its path is not relative to the root",
            ),
            (
                vec![fifo(".wh.x/y")],
                "\".wh.x/y\" cannot be put into a layer: names that begin with \".wh.\" mean removed files in a layer",
            ),
            (
                vec![removed(".wh..wh..opq")],
                "\".wh..wh..opq\" cannot be put into a layer: names that begin with \".wh.\" mean removed files in a layer",
            ),
            (
                vec![fifo("b"), fifo("a")],
                "the changes of the layer are out of order: \"a\" came after \"b\"",
            ),
            (
                vec![fifo("a"), removed("a")],
                "the changes of the layer are out of order: \"a\" came after \"a\"",
            ),
            (
                vec![fifo("a.b"), fifo("a/b")],
                "the changes of the layer are out of order: \"a/b\" came after \"a.b\"",
            ),
            (
                vec![link("a", "b")],
                "\"a\" cannot be put into a layer: it is a hard link to a file that comes after it",
            ),
            (
                vec![link("b", "../a")],
                "\"../a\" cannot be put into a layer: its path is not relative to the root",
            ),
            (
                vec![plain("s", Data::Symlink("".into()))],
                "\"s\" cannot be put into a layer: its link target is empty or contains a NUL",
            ),
            (
                vec![plain("d", Data::CharDevice { major: 0, minor: 0 })],
                "\"d\" cannot be put into a layer: a character device 0/0 is a whiteout of the overlay file system",
            ),
            (
                vec![plain(
                    "d",
                    Data::BlockDevice {
                        major: 0o10_000_000,
                        minor: 0,
                    },
                )],
                "\"d\" cannot be put into a layer: its device number is too large",
            ),
            (
                vec![change("f", xattr, Data::Fifo)],
                "\"f\" cannot be put into a layer: an archive cannot hold an extended attribute with \"=\" in its name",
            ),
            (
                vec![plain("f", bytes(b"abc", 2))],
                "\"f\" changed while it was put into the layer: got at least 3, want 2 bytes",
            ),
            (
                vec![plain("f", opened(b"abc", 2))],
                "\"f\" changed while it was put into the layer: got at least 3, want 2 bytes",
            ),
            (
                vec![plain("f", opened(b"abc", 4))],
                "\"f\" changed while it was put into the layer: got 3, want 4 bytes",
            ),
        ] {
            let error = write(all_well(changes), None, io::sink()).unwrap_err();
            assert_eq!(error.to_string(), message);
        }
        let vanished = FileSource::Open(Box::new(|| Err(io::ErrorKind::NotFound.into())));
        let content = FileContent {
            size_bytes: 1,
            source: vanished,
        };
        let error = write(
            all_well(vec![plain("f", Data::File(content))]),
            None,
            io::sink(),
        );
        assert_eq!(
            error.unwrap_err().to_string(),
            "reading \"f\" for the layer"
        );
        let error = write([Err("the walk failed")], None, io::sink()).unwrap_err();
        let source = std::error::Error::source(&error).unwrap().to_string();
        assert_eq!(
            (error.to_string().as_str(), source.as_str()),
            ("listing the changes of the layer", "the walk failed")
        );
    }
}
