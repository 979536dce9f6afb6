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
use crate::confined::ConfinedDir;

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
        upper: Arc::clone(upper.root()),
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
    upper: Arc<ConfinedDir>,
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
        let opaque = xattr::is_opaque((*self.upper).as_fd()).map_err(failed())?;
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
        let found = tree::look_at(&self.upper, &path).map_err(failed())?;
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
                let (root, path, found) = (Arc::clone(&self.upper), path.to_owned(), *found);
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
                let upper = tree::open_file(&self.upper, path, found)?;
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
        let entries = tree::list(&self.upper, &path).map_err(failed())?;
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
