//! What the tests of this module share: archives made by hand, and trees looked at.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::fs::File;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use super::header::{GID, Header, LINK, MAJOR, MINOR, MODE, MTIME, NAME, SIZE, UID};
use super::{AppliedLayer, LayerError, Limits, apply, pax, whiteout};
use crate::image::{DiffId, Digest, MediaType};
use crate::rootfs::{Change, ChangeKind, Data, Entry, FileContent, FileSource, Metadata, Time};

/// An archive made block by block, with any nonsense in it.
#[derive(Clone, Default)]
pub(super) struct Archive(pub(super) Vec<u8>);

impl Archive {
    /// Adds a header with fields changed by `change`, and `content` padded to blocks.
    pub(super) fn raw(
        mut self,
        kind: u8,
        name: &str,
        content: &[u8],
        change: impl FnOnce(&mut Header),
    ) -> Self {
        let mut header = Header::ustar(kind);
        header.set_text(NAME, name.as_bytes());
        header.set_number(MODE, if kind == b'5' { 0o755 } else { 0o644 });
        header.set_number(UID, 0);
        header.set_number(GID, 0);
        header.set_number(SIZE, content.len() as u64);
        header.set_number(MTIME, 1_000_000_000);
        header.set_number(MAJOR, 0);
        header.set_number(MINOR, 0);
        change(&mut header);
        header.seal();
        self.0.extend_from_slice(&header.0);
        self.0.extend_from_slice(content);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
        self
    }

    pub(super) fn file(self, name: &str, content: &[u8]) -> Self {
        self.raw(b'0', name, content, |_| {})
    }

    pub(super) fn directory(self, name: &str) -> Self {
        self.raw(b'5', name, b"", |_| {})
    }

    pub(super) fn link(self, kind: u8, name: &str, target: &str) -> Self {
        self.raw(kind, name, b"", |header| {
            header.set_text(LINK, target.as_bytes())
        })
    }

    pub(super) fn symlink(self, name: &str, target: &str) -> Self {
        self.link(b'2', name, target)
    }

    pub(super) fn hardlink(self, name: &str, target: &str) -> Self {
        self.link(b'1', name, target)
    }

    pub(super) fn device(self, kind: u8, name: &str, major: u64, minor: u64) -> Self {
        self.raw(kind, name, b"", |header| {
            header.set_number(MAJOR, major);
            header.set_number(MINOR, minor);
        })
    }

    /// An extended header for the next entry.
    pub(super) fn pax(self, records: &[(&str, &[u8])]) -> Self {
        self.pax_of_kind(b'x', records)
    }

    pub(super) fn pax_of_kind(self, kind: u8, records: &[(&str, &[u8])]) -> Self {
        let mut data = Vec::new();
        for (key, value) in records {
            pax::push(&mut data, key.as_bytes(), value);
        }
        self.raw(kind, "PaxHeaders.0/x", &data, |_| {})
    }

    /// The bytes, with the two blocks of zeros that end an archive.
    pub(super) fn end(mut self) -> Vec<u8> {
        self.0.resize(self.0.len() + 1024, 0);
        self.0
    }
}

/// Applies uncompressed bytes with their right diff ID.
pub(super) fn apply_bytes(
    bytes: &[u8],
    tree: &Path,
    limits: &Limits,
) -> Result<AppliedLayer, LayerError> {
    let want = DiffId::from_uncompressed(Digest::of(bytes));
    apply(bytes, &MediaType::LAYER_TAR, &want, tree, limits)
}

/// Whether the calling test can go on here, as root, also of a user namespace, which owners
/// and whiteouts need. An ordinary user's test is run by a process in such a namespace.
pub(super) fn is_root() -> bool {
    if rustix::process::geteuid().is_root() {
        return true;
    }
    let thread = std::thread::current();
    let name = thread.name().unwrap_or_default();
    let ran = Command::new("unshare")
        .args(["--mount", "--propagation", "private"])
        .args(["--user", "--map-root-user", "--map-auto"])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture"])
        .output();
    let ran = ran.ok().filter(|output| {
        // Also where the name is not that of a test, which then did not run.
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(
            output.status.success() || !text.contains("test result"),
            "{text}{}",
            String::from_utf8_lossy(&output.stderr)
        );
        output.status.success() && text.contains("1 passed")
    });
    probe(
        ran.is_some(),
        "this test needs root, at least in a user namespace, and none could be made",
    );
    false
}

/// Whether this is the real root: all owners and devices can be made.
///
/// Where everything has to run, an ordinary user's run may leave it out only if root's
/// run follows, which `SOCKLESS_TEST_ROOT_FOLLOWS=1` says.
pub(super) fn is_real_root() -> bool {
    let map = std::fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    let all_ids = map.split_whitespace().eq(["0", "0", "4294967295"]);
    let found = all_ids && rustix::process::geteuid().is_root();
    let reason = "this test needs root outside of user namespaces";
    if !found && std::env::var_os("SOCKLESS_TEST_ROOT_FOLLOWS").is_some_and(|v| v == "1") {
        skip(reason);
        return false;
    }
    probe(found, reason)
}

fn probe(found: bool, reason: &str) -> bool {
    if !found {
        let required = std::env::var_os("SOCKLESS_TEST_REQUIRE_ALL").is_some_and(|v| v == "1");
        assert!(!required, "{reason}");
        skip(reason);
    }
    found
}

#[expect(clippy::print_stderr, reason = "a skipped test says so")]
pub(super) fn skip(reason: &str) {
    eprintln!("skipped: {reason}");
}

/// What is in a tree, as changes in path order.
pub(super) fn walk(tree: &Path) -> Vec<Change> {
    let mut changes = Vec::new();
    let mut inodes = BTreeMap::new();
    walk_directory(tree, Path::new(""), &mut inodes, &mut changes);
    changes
}

fn walk_directory(
    tree: &Path,
    below: &Path,
    inodes: &mut BTreeMap<u64, PathBuf>,
    changes: &mut Vec<Change>,
) {
    let mut names: Vec<_> = std::fs::read_dir(tree.join(below))
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    names.sort();
    for name in names {
        let path = below.join(name);
        let file = tree.join(&path);
        let stat = file.symlink_metadata().unwrap();
        let kind = stat.file_type();
        if kind.is_char_device() && stat.rdev() == 0 {
            let kind = ChangeKind::Removed;
            changes.push(Change { path, kind });
            continue;
        }
        let mut xattrs = xattrs(&file);
        let opaque = xattrs.remove(std::ffi::OsStr::new(whiteout::OPAQUE_XATTR.0));
        let major = rustix::fs::major(stat.rdev());
        let minor = rustix::fs::minor(stat.rdev());
        let data = if kind.is_dir() {
            Data::Directory {
                opaque: opaque.is_some_and(|value| value == whiteout::OPAQUE_XATTR.1),
            }
        } else if stat.nlink() > 1 && inodes.contains_key(&stat.ino()) {
            Data::Hardlink(inodes[&stat.ino()].clone())
        } else {
            inodes.insert(stat.ino(), path.clone());
            if kind.is_file() {
                Data::File(FileContent {
                    size_bytes: stat.size(),
                    source: FileSource::Open(Box::new({
                        let file = file.clone();
                        move || File::open(file)
                    })),
                })
            } else if kind.is_symlink() {
                Data::Symlink(std::fs::read_link(&file).unwrap().into())
            } else if kind.is_char_device() {
                Data::CharDevice { major, minor }
            } else if kind.is_block_device() {
                Data::BlockDevice { major, minor }
            } else {
                assert!(kind.is_fifo(), "{file:?}");
                Data::Fifo
            }
        };
        let is_directory = kind.is_dir();
        let metadata = Metadata {
            mode: stat.mode() & 0o7777,
            uid: stat.uid(),
            gid: stat.gid(),
            mtime: Time {
                seconds: stat.mtime(),
                nanoseconds: u32::try_from(stat.mtime_nsec()).unwrap(),
            },
            xattrs,
        };
        let kind = ChangeKind::Entry(Entry { metadata, data });
        changes.push(Change {
            path: path.clone(),
            kind,
        });
        if is_directory {
            walk_directory(tree, &path, inodes, changes);
        }
    }
}

fn xattrs(file: &Path) -> BTreeMap<std::ffi::OsString, Vec<u8>> {
    let mut names = vec![0; 64 << 10];
    let length = rustix::fs::llistxattr(file, &mut names[..]).unwrap();
    let names = names[..length]
        .split(|b| *b == 0)
        .filter(|name| !name.is_empty());
    names
        .map(|name| {
            let name = std::ffi::OsStr::from_bytes(name);
            let mut value = vec![0; 64 << 10];
            let length = rustix::fs::lgetxattr(file, name, &mut value[..]).unwrap();
            value.truncate(length);
            (name.to_owned(), value)
        })
        .collect()
}

/// Changes as text, a line each, contents as digests.
pub(super) fn describe(changes: Vec<Change>) -> Vec<String> {
    let describe = |change: Change| {
        let path = change
            .path
            .as_os_str()
            .as_bytes()
            .escape_ascii()
            .to_string();
        let ChangeKind::Entry(Entry { metadata, data }) = change.kind else {
            return format!("{path} removed");
        };
        let data = match data {
            Data::File(content) => {
                let (mut bytes, mut reader) = (Vec::new(), content.source.reader().unwrap());
                std::io::Read::read_to_end(&mut reader, &mut bytes).unwrap();
                assert_eq!(bytes.len() as u64, content.size_bytes);
                format!("file {} {}", bytes.len(), Digest::of(&bytes).short())
            }
            other => format!("{other:?}"),
        };
        let Metadata {
            mode,
            uid,
            gid,
            mtime,
            xattrs,
        } = metadata;
        let (seconds, nanoseconds) = (mtime.seconds, mtime.nanoseconds);
        format!("{path} {data} {mode:o} {uid}:{gid} {seconds}.{nanoseconds:09} {xattrs:?}")
    };
    changes.into_iter().map(describe).collect()
}

/// A list of changes that nothing goes wrong with.
pub(super) fn all_well(changes: Vec<Change>) -> impl Iterator<Item = Result<Change, Infallible>> {
    changes.into_iter().map(Ok)
}

/// The uncompressed layer of `changes`.
pub(super) fn tar_of(changes: Vec<Change>) -> Vec<u8> {
    let mut bytes = Vec::new();
    super::write(all_well(changes), None, &mut bytes).unwrap();
    bytes
}
