//! [`changes`]: what a tree does to the stack below it.
//!
//! The cost is that of walking the tree; of the stack only paths are looked at that the
//! tree has too. The set of changes is BuildKit's (`util/overlay`): a directory whose
//! owner, mode and attributes are as before is a change only as parent of one; a file
//! that was copied up and is as before is none; what an opaque directory hides is
//! spelled out, because not every reader of layers knows opaque directories, and what
//! is hidden and made again as it was need not be in the layer.
//!
//! Two things differ on purpose. Contents of files that look unchanged are always
//! compared, not only where the times have no nanoseconds: a program that restores the
//! time after writing would otherwise lose its change. A socket, which no layer can
//! hold, still removes what it replaced.

use std::collections::{HashMap, VecDeque};
use std::ffi::{OsStr, OsString};
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{FileType, major, minor};

use super::change::{Change, ChangeKind, Data, Entry, FileContent, FileSource, Metadata};
use super::stack::{Node, Stack};
use super::tree::{self, Attributes, Tree};
use super::{RootfsError, xattr};

/// Lists what `upper` changes relative to `lower`, in the order of [`super::order`].
///
/// Parents of a change are listed before it, with their metadata, changed or not.
/// Contents are opened when their turn comes; until then `upper` must stay as it is, but
/// may be renamed.
///
/// # Errors
/// Each item may be one; nothing follows it. [`RootfsError::Io`] and [`RootfsError::Redirect`].
pub fn changes(upper: &Tree, lower: &Stack) -> Changes {
    Changes {
        upper: upper.clone(),
        lower: lower.clone(),
        state: State::New,
        levels: Vec::new(),
        links: HashMap::new(),
        ready: VecDeque::new(),
    }
}

/// The iterator of [`changes`].
#[derive(Debug)]
pub struct Changes {
    upper: Tree,
    lower: Stack,
    state: State,
    /// The directories from the root down to the one that is being read.
    levels: Vec<Level>,
    /// Where files with several names were met first, by device and inode.
    links: HashMap<(u64, u64), PathBuf>,
    ready: VecDeque<Change>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    New,
    Walking,
    Over,
}

#[derive(Debug)]
struct Level {
    path: PathBuf,
    /// Names still to be looked at, sorted.
    names: std::vec::IntoIter<OsString>,
    /// The directory in the stack below, if it is one there.
    lower: Option<Node>,
    /// Whether the mounted filesystem shows nothing of `lower` in it.
    opaque: bool,
    /// The directory's own change, as long as it would not be one without one inside.
    unchanged: Option<Change>,
}

impl Iterator for Changes {
    type Item = Result<Change, RootfsError>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some(change) = self.ready.pop_front() {
                return Some(Ok(change));
            }
            let step = match self.state {
                State::Over => return None,
                State::New => self.start(),
                State::Walking => self.step(),
            };
            if let Err(error) = step {
                self.state = State::Over;
                return Some(Err(error));
            }
        }
    }
}

impl Changes {
    fn start(&mut self) -> Result<(), RootfsError> {
        let failed = || RootfsError::io("reading the layer", self.upper.path());
        let lower = self.lower.root().map_err(failed())?;
        let opaque = xattr::is_opaque(self.upper.root().as_ref().as_fd()).map_err(failed())?;
        self.state = State::Walking;
        self.enter(PathBuf::new(), Some(lower), opaque, None)
    }

    fn step(&mut self) -> Result<(), RootfsError> {
        let Some(level) = self.levels.last_mut() else {
            self.state = State::Over;
            return Ok(());
        };
        let Some(name) = level.names.next() else {
            self.levels.pop();
            return Ok(());
        };
        let (path, opaque) = (level.path.join(&name), level.opaque);
        let failed = || RootfsError::io("comparing", &path);
        let lower = match &level.lower {
            Some(dir) => self.lower.child(dir, &name).map_err(failed())?,
            None => None,
        };
        let found = self.upper.look_at(&path).map_err(failed())?;
        let hides = |found: &Attributes| found.is_whiteout() || found.file_type == FileType::Socket;
        let Some((fd, found)) = found.filter(|(_, found)| !hides(found)) else {
            if lower.is_some() {
                self.emit(Change {
                    path,
                    kind: ChangeKind::Removed,
                });
            }
            return Ok(());
        };
        if found.is_dir() {
            self.directory(path, &fd, &found, lower, opaque)
        } else {
            self.file(path, &fd, &found, lower)
        }
    }

    fn directory(
        &mut self,
        path: PathBuf,
        fd: &OwnedFd,
        found: &Attributes,
        lower: Option<Node>,
        parent_opaque: bool,
    ) -> Result<(), RootfsError> {
        let failed = || RootfsError::io("comparing", &path);
        let metadata = metadata(&path, fd, found)?;
        let opaque = parent_opaque || xattr::is_opaque(fd.as_fd()).map_err(failed())?;
        let lower = lower.filter(|node| node.attributes().is_dir());
        let unchanged = match &lower {
            Some(node) => {
                let mut below = self.metadata_below(node).map_err(failed())?;
                // Writing into a directory changes its time; that alone changes no image.
                below.mtime = metadata.mtime;
                below == metadata
            }
            None => false,
        };
        let change = Change {
            path: path.clone(),
            kind: ChangeKind::Entry(Entry {
                metadata,
                data: Data::Directory { opaque: false },
            }),
        };
        if unchanged {
            self.enter(path, lower, opaque, Some(change))
        } else {
            self.emit(change);
            self.enter(path, lower, opaque, None)
        }
    }

    fn file(
        &mut self,
        path: PathBuf,
        fd: &OwnedFd,
        found: &Attributes,
        lower: Option<Node>,
    ) -> Result<(), RootfsError> {
        let metadata = metadata(&path, fd, found)?;
        if let Some(node) = &lower
            && self
                .same(&path, fd, found, &metadata, node)
                .map_err(RootfsError::io("comparing", &path))?
        {
            return Ok(());
        }
        let first = (found.nlink > 1)
            .then(|| self.links.get(&found.id).cloned())
            .flatten();
        let data = match first {
            Some(first) => Data::Hardlink(first),
            None => {
                if found.nlink > 1 {
                    self.links.insert(found.id, path.clone());
                }
                self.data(&path, fd, found)?
            }
        };
        self.emit(Change {
            path,
            kind: ChangeKind::Entry(Entry { metadata, data }),
        });
        Ok(())
    }

    fn data(&self, path: &Path, fd: &OwnedFd, found: &Attributes) -> Result<Data, RootfsError> {
        let (major, minor) = (major(found.rdev), minor(found.rdev));
        Ok(match found.file_type {
            FileType::RegularFile => {
                let root = Arc::clone(self.upper.root());
                let (path, found) = (path.to_owned(), *found);
                Data::File(FileContent {
                    size_bytes: found.size,
                    source: FileSource::Open(Box::new(move || {
                        tree::open_file(&root, &path, &found)
                    })),
                })
            }
            FileType::Symlink => {
                Data::Symlink(read_link(fd).map_err(RootfsError::io("reading the link", path))?)
            }
            FileType::CharacterDevice => Data::CharDevice { major, minor },
            FileType::BlockDevice => Data::BlockDevice { major, minor },
            FileType::Fifo => Data::Fifo,
            FileType::Directory | FileType::Socket | FileType::Unknown => {
                return Err(RootfsError::BadChange {
                    path: path.to_owned(),
                    reason: "it has an unknown file type",
                });
            }
        })
    }

    /// Whether a file that is no directory is the one that it covers.
    fn same(
        &self,
        path: &Path,
        fd: &OwnedFd,
        found: &Attributes,
        metadata: &Metadata,
        node: &Node,
    ) -> io::Result<bool> {
        let below = node.attributes();
        if below.file_type != found.file_type
            || below.metadata().mtime != metadata.mtime
            || below.rdev != found.rdev
            || self.metadata_below(node)? != *metadata
        {
            return Ok(false);
        }
        match found.file_type {
            FileType::RegularFile if below.size != found.size => Ok(false),
            FileType::RegularFile => {
                let upper = tree::open_file(self.upper.root(), path, found)?;
                same_content(upper, self.lower.open(node)?)
            }
            FileType::Symlink => Ok(read_link(fd)? == self.lower.read_link(node)?),
            _ => Ok(true),
        }
    }

    fn metadata_below(&self, node: &Node) -> io::Result<Metadata> {
        Ok(Metadata {
            xattrs: self.lower.xattrs(node)?,
            ..node.metadata()
        })
    }

    fn enter(
        &mut self,
        path: PathBuf,
        lower: Option<Node>,
        opaque: bool,
        unchanged: Option<Change>,
    ) -> Result<(), RootfsError> {
        let failed = || RootfsError::io("listing", &path);
        let entries = tree::list(self.upper.root(), &path).map_err(failed())?;
        let mut names: Vec<OsString> = entries.into_iter().map(|(name, _)| name).collect();
        if let (true, Some(dir)) = (opaque, &lower) {
            let hidden = self.lower.read_dir(dir).map_err(failed())?;
            names.extend(hidden.into_iter().map(|(name, _)| name));
        }
        names.sort_unstable();
        names.dedup();
        self.levels.push(Level {
            path,
            names: names.into_iter(),
            lower,
            opaque,
            unchanged,
        });
        Ok(())
    }

    /// Queues `change`, after those directories above it that were no change until now.
    fn emit(&mut self, change: Change) {
        let above = self
            .levels
            .iter()
            .rposition(|level| level.unchanged.is_none());
        let from = above.map_or(0, |index| index + 1);
        let parents = self.levels[from..].iter_mut();
        self.ready
            .extend(parents.filter_map(|level| level.unchanged.take()));
        self.ready.push_back(change);
    }
}

/// Everything about a file of the upper directory but its content.
fn metadata(path: &Path, fd: &OwnedFd, found: &Attributes) -> Result<Metadata, RootfsError> {
    let failed = || RootfsError::io("reading the attributes of", path);
    let mut xattrs = std::collections::BTreeMap::new();
    for name in xattr::names(fd.as_fd()).map_err(failed())? {
        if let Some(&attribute) = xattr::REDIRECTS.iter().find(|r| name == OsStr::new(**r)) {
            return Err(RootfsError::Redirect {
                path: path.to_owned(),
                attribute,
            });
        }
        if xattr::belongs_in_layer(&name)
            && let Some(value) = xattr::get(fd.as_fd(), &name).map_err(failed())?
        {
            xattrs.insert(name, value);
        }
    }
    Ok(Metadata {
        xattrs,
        ..found.metadata()
    })
}

fn read_link(fd: &OwnedFd) -> io::Result<OsString> {
    // An empty path means the link that the descriptor itself is.
    let target = rustix::fs::readlinkat(fd, "", Vec::new())?;
    Ok(OsString::from_vec(target.into_bytes()))
}

fn same_content(mut a: impl Read, mut b: impl Read) -> io::Result<bool> {
    const CHUNK_BYTES: u64 = 128 * 1024;
    let (mut left, mut right) = (Vec::new(), Vec::new());
    loop {
        left.clear();
        right.clear();
        a.by_ref().take(CHUNK_BYTES).read_to_end(&mut left)?;
        b.by_ref().take(CHUNK_BYTES).read_to_end(&mut right)?;
        if left != right {
            return Ok(false);
        }
        if left.is_empty() {
            return Ok(true);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::super::testing::{THEN, has_many_ids, in_worlds, line, tree_of};
    use super::*;
    use crate::rootfs::Backend;

    const BASE: &[&str] = &[
        "755 etc/",
        "644 etc/motd = hello",
        "755 opt/",
        "755 opt/app/",
        "777 opt/app/a-link -> data/a",
        "755 opt/app/data/",
        "644 opt/app/data/a = A",
        "644 opt/app/data/b = B",
        "755 opt/app/data/sub/",
        "644 opt/app/data/sub/c = C",
        "755 opt/empty/",
        "644 opt/twice = T",
        "644 opt/twice2 == opt/twice",
    ];

    fn then() -> std::time::SystemTime {
        let since = std::time::Duration::from_secs(THEN.seconds.unsigned_abs());
        std::time::SystemTime::UNIX_EPOCH + since
    }

    fn set_time(path: &Path) {
        fs::File::open(path).unwrap().set_modified(then()).unwrap();
    }

    /// Does `act` in the base, mounted and copied, and compares what came of it.
    fn check(act: impl Fn(&Path), want: &[&str]) {
        let (_base, base) = tree_of(BASE);
        let lower = Stack::new(vec![base]);
        for backend in [Backend::Overlay, Backend::Copy] {
            let scratch = tempfile::tempdir().unwrap();
            let rootfs = backend.open(&lower, scratch.path()).unwrap();
            act(rootfs.path());
            let upper = Tree::open(&rootfs.finish().unwrap().upper).unwrap();
            let got: Vec<String> = changes(&upper, &lower).map(|c| line(c.unwrap())).collect();
            assert_eq!(got, want, "{backend:?}");
        }
    }

    #[test]
    fn sandbox_changes_are_those_of_a_layer() {
        in_worlds(
            module_path!(),
            "sandbox_changes_are_those_of_a_layer",
            || {
                // Nothing, and nothing that lasts.
                check(|_| (), &[]);
                check(
                    |root| {
                        fs::create_dir_all(root.join("opt/x/y")).unwrap();
                        fs::write(root.join("opt/x/y/z"), "").unwrap();
                        fs::remove_dir_all(root.join("opt/x")).unwrap();
                    },
                    &[],
                );
                // Additions bring their parents.
                check(
                    |root| fs::write(root.join("opt/app/data/sub/d"), "D").unwrap(),
                    &[
                        "755 opt/",
                        "755 opt/app/",
                        "755 opt/app/data/",
                        "755 opt/app/data/sub/",
                        "644 opt/app/data/sub/d = D",
                    ],
                );
                // Removals, too.
                check(
                    |root| {
                        fs::remove_file(root.join("etc/motd")).unwrap();
                        fs::remove_dir_all(root.join("opt/app")).unwrap();
                    },
                    &["755 etc/", "-etc/motd", "755 opt/", "-opt/app"],
                );
                // Modes and times of files; the time of a directory alone is nothing.
                check(
                    |root| {
                        let mode = |path: &str, mode| {
                            let permissions = fs::Permissions::from_mode(mode);
                            fs::set_permissions(root.join(path), permissions).unwrap();
                        };
                        mode("etc/motd", 0o4600);
                        mode("opt/empty", 0o1777);
                    },
                    &[
                        "755 etc/",
                        "4600 etc/motd = hello",
                        "755 opt/",
                        "1777 opt/empty/",
                    ],
                );
                check(
                    |root| {
                        let touch = |path: &str| {
                            let file = fs::File::open(root.join(path)).unwrap();
                            file.set_modified(then() + std::time::Duration::from_nanos(1))
                                .unwrap();
                        };
                        touch("etc/motd");
                        touch("opt/empty");
                    },
                    &["755 etc/", "644 etc/motd = hello"],
                );
                // Copied up and as before: opened for writing, moved there and back, made again.
                check(
                    |root| {
                        fs::OpenOptions::new()
                            .write(true)
                            .open(root.join("etc/motd"))
                            .unwrap();
                        fs::rename(root.join("opt/app/data/a"), root.join("opt/t")).unwrap();
                        fs::rename(root.join("opt/t"), root.join("opt/app/data/a")).unwrap();
                        fs::remove_file(root.join("opt/app/data/b")).unwrap();
                        fs::write(root.join("opt/app/data/b"), "B").unwrap();
                        set_time(&root.join("opt/app/data/b"));
                    },
                    &[],
                );
                // Other content of the same size and time.
                check(
                    |root| {
                        fs::write(root.join("etc/motd"), "HELLO").unwrap();
                        set_time(&root.join("etc/motd"));
                    },
                    &["755 etc/", "644 etc/motd = HELLO"],
                );
                // A directory made again: what was in it is gone by name, what is the same stays.
                check(
                    |root| {
                        let data = root.join("opt/app/data");
                        fs::remove_dir_all(&data).unwrap();
                        fs::create_dir(&data).unwrap();
                        fs::write(data.join("a"), "A").unwrap();
                        set_time(&data.join("a"));
                        fs::write(data.join("new"), "N").unwrap();
                    },
                    &[
                        "755 opt/",
                        "755 opt/app/",
                        "755 opt/app/data/",
                        "-opt/app/data/b",
                        "644 opt/app/data/new = N",
                        "-opt/app/data/sub",
                    ],
                );
                check(
                    |root| {
                        fs::remove_dir(root.join("opt/empty")).unwrap();
                        fs::create_dir(root.join("opt/empty")).unwrap();
                    },
                    &[],
                );
                // Directories below one that was made again are as new.
                check(
                    |root| {
                        fs::remove_dir_all(root.join("opt")).unwrap();
                        fs::create_dir_all(root.join("opt/app/data/sub")).unwrap();
                    },
                    &[
                        "755 opt/",
                        "755 opt/app/",
                        "-opt/app/a-link",
                        "755 opt/app/data/",
                        "-opt/app/data/a",
                        "-opt/app/data/b",
                        "755 opt/app/data/sub/",
                        "-opt/app/data/sub/c",
                        "-opt/empty",
                        "-opt/twice",
                        "-opt/twice2",
                    ],
                );
                // One type for another.
                check(
                    |root| {
                        fs::remove_dir_all(root.join("opt/app")).unwrap();
                        fs::write(root.join("opt/app"), "F").unwrap();
                        fs::remove_file(root.join("etc/motd")).unwrap();
                        fs::create_dir(root.join("etc/motd")).unwrap();
                        fs::write(root.join("etc/motd/x"), "X").unwrap();
                        fs::remove_dir(root.join("opt/empty")).unwrap();
                        symlink("app", root.join("opt/empty")).unwrap();
                    },
                    &[
                        "755 etc/",
                        "755 etc/motd/",
                        "644 etc/motd/x = X",
                        "755 opt/",
                        "644 opt/app = F",
                        "777 opt/empty -> app",
                    ],
                );
                // Names of one file: among new ones links; an old one's copy is a file.
                check(
                    |root| {
                        fs::create_dir(root.join("l")).unwrap();
                        fs::write(root.join("l/b"), "B").unwrap();
                        fs::hard_link(root.join("l/b"), root.join("l/a")).unwrap();
                        fs::hard_link(root.join("l/b"), root.join("c")).unwrap();
                        symlink("b", root.join("l/s")).unwrap();
                        fs::hard_link(root.join("l/s"), root.join("l/t")).unwrap();
                        fs::write(root.join("opt/twice"), "U").unwrap();
                    },
                    &[
                        "644 c = B",
                        "755 l/",
                        "644 l/a == c",
                        "644 l/b == c",
                        "777 l/s -> b",
                        "777 l/t == l/s",
                        "755 opt/",
                        "644 opt/twice = U",
                    ],
                );
                // Pipes stay, sockets do not, but what they replaced is gone.
                check(
                    |root| {
                        let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
                        let pipe = root.join("pipe");
                        rustix::fs::mknodat(rustix::fs::CWD, &pipe, FileType::Fifo, mode, 0)
                            .unwrap();
                        let listen = |path: &str| {
                            drop(std::os::unix::net::UnixListener::bind(root.join(path)).unwrap());
                        };
                        listen("socket");
                        fs::remove_file(root.join("etc/motd")).unwrap();
                        listen("etc/motd");
                    },
                    &["755 etc/", "-etc/motd", "600 pipe |"],
                );
                // Attributes and owners.
                check(
                    |root| {
                        let set = |path: &str| {
                            let flags = rustix::fs::XattrFlags::empty();
                            rustix::fs::setxattr(root.join(path), "user.k", b"v", flags).unwrap();
                        };
                        set("etc/motd");
                        set("opt/empty");
                    },
                    &[
                        "755 etc/",
                        "644 etc/motd = hello [user.k=v]",
                        "755 opt/",
                        "755 opt/empty/ [user.k=v]",
                    ],
                );
                if has_many_ids() {
                    check(
                        |root| {
                            let own = |path: &str| {
                                std::os::unix::fs::lchown(root.join(path), Some(7), Some(8))
                                    .unwrap();
                            };
                            own("etc");
                            own("opt/app/a-link");
                        },
                        &[
                            "755 etc/ (7:8)",
                            "755 opt/",
                            "755 opt/app/",
                            "777 opt/app/a-link -> data/a (7:8)",
                        ],
                    );
                }
                // Odd names are in the order of their bytes, and deep ones no problem.
                check(
                    |root| {
                        for name in ["a b", "a", "a-b", "new\nline", "\u{2603}"] {
                            fs::write(root.join(name), "").unwrap();
                        }
                        fs::remove_file(root.join("a")).unwrap();
                        fs::create_dir(root.join("a")).unwrap();
                        fs::write(root.join("a/z"), "").unwrap();
                    },
                    &[
                        "755 a/",
                        "644 a/z = ",
                        "644 a b = ",
                        "644 a-b = ",
                        "644 new\nline = ",
                        "644 \u{2603} = ",
                    ],
                );
            },
        );
    }

    #[test]
    fn redirects_are_refused() {
        let (_base, base) = tree_of(&["700 d/"]);
        let (dir, upper) = tree_of(&["700 d/"]);
        let flags = rustix::fs::XattrFlags::empty();
        match rustix::fs::setxattr(dir.path().join("d"), "user.overlay.redirect", b"/x", flags) {
            Err(rustix::io::Errno::NOTSUP) => {
                return super::super::testing::skip(
                    "no user attributes in the temporary directory",
                );
            }
            other => other.unwrap(),
        }
        let mut list = changes(&upper, &Stack::new(vec![base]));
        assert_eq!(
            list.next().unwrap().unwrap_err().to_string(),
            r#""d" carries the overlay attribute "user.overlay.redirect", which sockless never asks the kernel for"#
        );
        assert!(list.next().is_none());
    }

    #[test]
    fn security_s07_a_file_that_was_exchanged_is_not_read() {
        let (dir, upper) = tree_of(&["644 a = 1"]);
        let Some(Ok(Change {
            kind: ChangeKind::Entry(entry),
            ..
        })) = changes(&upper, &Stack::default()).next()
        else {
            panic!("one file");
        };
        // Keeps the first one's inode in use.
        fs::rename(dir.path().join("a"), dir.path().join("b")).unwrap();
        symlink("/etc/passwd", dir.path().join("a")).unwrap();
        let Data::File(FileContent {
            source: FileSource::Open(open),
            ..
        }) = entry.data
        else {
            panic!("a file that is opened");
        };
        let error = open().unwrap_err();
        assert_eq!(
            error.raw_os_error(),
            Some(rustix::io::Errno::LOOP.raw_os_error())
        );
    }
}
