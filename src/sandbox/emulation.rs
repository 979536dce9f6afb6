//! Whether this machine runs programs for another architecture, by itself or by an emulator.

use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::process::{Command, Stdio};

/// How programs for an architecture are marked.
struct Architecture {
    /// Go's name.
    name: &'static str,
    /// `e_machine`.
    machine: u16,
    is_64_bit: bool,
    is_little_endian: bool,
    /// `e_flags`.
    flags: u32,
    /// Ends the process. Where it is missing, the program is one that only an emulator starts,
    /// and however it ends, it was started.
    code: &'static [u8],
}

const fn architecture(
    name: &'static str,
    machine: u16,
    (is_64_bit, is_little_endian): (bool, bool),
) -> Architecture {
    Architecture {
        name,
        machine,
        is_64_bit,
        is_little_endian,
        flags: 0,
        code: &[],
    }
}

/// <https://refspecs.linuxfoundation.org/elf/gabi4+/ch4.eheader.html>
const ARCHITECTURES: [Architecture; 12] = [
    Architecture {
        // mov eax, 1; xor ebx, ebx; int 0x80
        code: &[0xb8, 1, 0, 0, 0, 0x31, 0xdb, 0xcd, 0x80],
        ..architecture("386", 3, (false, true))
    },
    Architecture {
        // mov r7, #1; mov r0, #0; svc 0
        code: &[1, 0x70, 0xa0, 0xe3, 0, 0, 0xa0, 0xe3, 0, 0, 0, 0xef],
        // Version 5 of the ABI, which kernels without the old one insist on.
        flags: 0x0500_0000,
        ..architecture("arm", 40, (false, true))
    },
    Architecture {
        // mov x8, #93; mov x0, #0; svc #0
        code: &[0xa8, 0x0b, 0x80, 0xd2, 0, 0, 0x80, 0xd2, 1, 0, 0, 0xd4],
        ..architecture("arm64", 183, (true, true))
    },
    Architecture {
        // mov eax, 60; xor edi, edi; syscall
        code: &[0xb8, 60, 0, 0, 0, 0x31, 0xff, 0x0f, 0x05],
        ..architecture("amd64", 62, (true, true))
    },
    architecture("riscv64", 243, (true, true)),
    Architecture {
        // The second version of the ABI.
        flags: 2,
        ..architecture("ppc64le", 21, (true, true))
    },
    architecture("ppc64", 21, (true, false)),
    architecture("s390x", 22, (true, false)),
    architecture("mips64le", 8, (true, true)),
    architecture("mips64", 8, (true, false)),
    architecture("mipsle", 8, (false, true)),
    architecture("loong64", 258, (true, true)),
];

/// Whether the kernel has no way to run programs for `architecture` (Go's name): neither itself
/// nor by an emulator that is registered with `binfmt_misc`. It is asked by starting one, which
/// is made in `dir` and ends at once. Blocking.
///
/// Where that does not tell, because nothing can be started from `dir` or nobody knows the
/// architecture, the answer is no.
pub fn cannot_run(architecture: &str, dir: &Path) -> bool {
    let known = ARCHITECTURES.iter().find(|a| a.name == architecture);
    let Some(known) = known else { return false };
    let started = start(&known.program(), &dir.join(known.name));
    started.is_err_and(|error| error.raw_os_error() == Some(libc::ENOEXEC))
}

fn start(program: &[u8], path: &Path) -> io::Result<()> {
    let mut options = std::fs::File::options();
    let mut file = options
        .write(true)
        .create_new(true)
        .mode(0o700)
        .open(path)?;
    io::Write::write_all(&mut file, program)?;
    drop(file);
    let started = Command::new(path)
        .env_clear()
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn();
    let ended = started.and_then(|mut child| child.wait().map(drop));
    std::fs::remove_file(path)?;
    ended
}

/// Where the program is in memory; a multiple of every page size.
const ADDRESS: u64 = 0x40_0000;

/// The largest page size.
const PAGE_BYTES: u64 = 0x1_0000;

impl Architecture {
    /// A whole program: an ELF header, one segment with all of the file, the code.
    fn program(&self) -> Vec<u8> {
        let (header_bytes, segment_bytes) = if self.is_64_bit { (64, 56) } else { (52, 32) };
        let size = u64::from(header_bytes + segment_bytes) + self.code.len() as u64;
        let mut bytes = vec![0x7f, b'E', b'L', b'F'];
        bytes.push(if self.is_64_bit { 2 } else { 1 });
        bytes.push(if self.is_little_endian { 1 } else { 2 });
        bytes.extend([1, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        // An executable, of version 1.
        self.half(&mut bytes, 2);
        self.half(&mut bytes, self.machine);
        self.word(&mut bytes, 1);
        self.address(
            &mut bytes,
            ADDRESS + u64::from(header_bytes + segment_bytes),
        );
        self.address(&mut bytes, u64::from(header_bytes));
        self.address(&mut bytes, 0);
        self.word(&mut bytes, self.flags);
        for value in [header_bytes, segment_bytes, 1, 0, 0, 0] {
            self.half(&mut bytes, value);
        }
        // To be loaded, to be read and executed.
        self.word(&mut bytes, 1);
        if self.is_64_bit {
            self.word(&mut bytes, 5);
        }
        for value in [0, ADDRESS, ADDRESS, size, size] {
            self.address(&mut bytes, value);
        }
        if !self.is_64_bit {
            self.word(&mut bytes, 5);
        }
        self.address(&mut bytes, PAGE_BYTES);
        bytes.extend(self.code);
        bytes
    }

    fn half(&self, bytes: &mut Vec<u8>, value: u16) {
        bytes.extend(if self.is_little_endian {
            value.to_le_bytes()
        } else {
            value.to_be_bytes()
        });
    }

    fn word(&self, bytes: &mut Vec<u8>, value: u32) {
        bytes.extend(if self.is_little_endian {
            value.to_le_bytes()
        } else {
            value.to_be_bytes()
        });
    }

    /// A number that is as long as an address: all that are used here fit into the shorter ones.
    fn address(&self, bytes: &mut Vec<u8>, value: u64) {
        if !self.is_64_bit {
            return self.word(bytes, u32::try_from(value).unwrap_or(u32::MAX));
        }
        bytes.extend(if self.is_little_endian {
            value.to_le_bytes()
        } else {
            value.to_be_bytes()
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_says_what_it_runs() {
        let dir = tempfile::tempdir().unwrap();
        let own = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            _ => return,
        };
        // The program is whole: it ends as it says.
        let known = ARCHITECTURES.iter().find(|a| a.name == own).unwrap();
        let path = dir.path().join("own");
        std::fs::write(&path, known.program()).unwrap();
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o700);
        std::fs::set_permissions(&path, mode).unwrap();
        assert!(Command::new(&path).status().unwrap().success());
        std::fs::remove_file(&path).unwrap();

        assert!(!cannot_run(own, dir.path()));
        assert!(!cannot_run("nonsense", dir.path()));
        // Nobody can be sure of an emulator for the others, but of what was asked.
        for other in ["s390x", "ppc64", "mipsle"] {
            let known = ARCHITECTURES.iter().find(|a| a.name == other).unwrap();
            std::fs::write(&path, known.program()).unwrap();
            std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o700))
                .unwrap();
            let error = Command::new(&path).status().err();
            let refused = error.is_some_and(|e| e.raw_os_error() == Some(libc::ENOEXEC));
            std::fs::remove_file(&path).unwrap();
            assert_eq!(cannot_run(other, dir.path()), refused, "{other}");
        }
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        // What cannot be started at all tells nothing.
        assert!(!cannot_run("s390x", &dir.path().join("missing")));
    }
}
