//! [`Additions`]: new files on top of a filesystem, decided without writing any.
//!
//! COPY, ADD and WORKDIR never touch a root filesystem. What they add is worked out
//! here against a read-only view of the layers below, with the links of those layers
//! followed, and becomes a list of changes.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::ops::Bound;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use rustix::fs::FileType;
use rustix::io::Errno;

use super::below::Below;
use crate::rootfs::{
    Change, ChangeKind, Data, Entry, FileContent, FileSource, Metadata, Node, Time, order,
};

/// How many links a path may lead through: the kernel's number.
const LINK_LIMIT: u32 = 40;

/// Names a file by device and inode within one source, for hard links.
pub(super) type Identity = (usize, u64, u64);

/// Owner, mode and time of directories that are made on the way.
#[derive(Clone, Copy, Debug)]
pub(super) struct NewDirectory {
    /// Owner and group.
    pub(super) owner: (u32, u32),
    /// Permissions.
    pub(super) mode: u32,
    /// Modification time. Not the current one: the same inputs give the same layer.
    pub(super) mtime: Time,
}

/// Files that are added on top of a stack of layers.
pub(super) struct Additions<'s> {
    below: &'s Below,
    new_directory: NewDirectory,
    entries: BTreeMap<Key, Addition>,
    /// Where something that was no directory came in the place of one: what the layers have
    /// there is gone for good, also below a directory that comes in its place in turn.
    hidden: BTreeSet<PathBuf>,
    /// The metadata of files that have several names, where it is not what the first had.
    shared: BTreeMap<Identity, Metadata>,
}

/// A file to add.
#[derive(Clone)]
pub(super) struct Addition {
    /// Its metadata.
    pub(super) metadata: Metadata,
    /// What it is.
    pub(super) content: Content,
    /// Which files are the same one.
    pub(super) identity: Option<Identity>,
}

/// Type and content of a file to add.
#[derive(Clone)]
pub(super) enum Content {
    /// A regular file.
    File {
        /// The number of bytes that will be read.
        size_bytes: u64,
        /// Opens it when its turn comes.
        open: Arc<dyn Fn() -> io::Result<File> + Send + Sync>,
    },
    /// A regular file that is looked at while it is read.
    Read {
        /// The number of bytes that will be read.
        size_bytes: u64,
        /// Opens it when its turn comes.
        open: Arc<dyn Fn() -> io::Result<Box<dyn io::Read + Send>> + Send + Sync>,
    },
    /// A regular file in memory.
    Bytes(Arc<[u8]>),
    /// A directory.
    Directory,
    /// A symbolic link and its target.
    Symlink(OsString),
    /// A character device: major and minor number.
    CharDevice(u32, u32),
    /// A block device: major and minor number.
    BlockDevice(u32, u32),
    /// A named pipe.
    Fifo,
}

impl Content {
    fn file_type(&self) -> FileType {
        match self {
            Self::File { .. } | Self::Read { .. } | Self::Bytes(_) => FileType::RegularFile,
            Self::Directory => FileType::Directory,
            Self::Symlink(_) => FileType::Symlink,
            Self::CharDevice(..) => FileType::CharacterDevice,
            Self::BlockDevice(..) => FileType::BlockDevice,
            Self::Fifo => FileType::Fifo,
        }
    }

    fn is_directory(&self) -> bool {
        matches!(self, Self::Directory)
    }

    /// The same for a list of changes; `opaque` is for directories.
    fn into_data(self, opaque: bool) -> Data {
        match self {
            Self::File { size_bytes, open } => Data::File(FileContent {
                size_bytes,
                source: FileSource::Open(Box::new(move || open())),
            }),
            Self::Read { size_bytes, open } => Data::File(FileContent {
                size_bytes,
                source: FileSource::Read(Box::new(move || open())),
            }),
            Self::Bytes(bytes) => Data::File(FileContent {
                size_bytes: bytes.len() as u64,
                source: FileSource::Bytes(bytes),
            }),
            Self::Directory => Data::Directory { opaque },
            Self::Symlink(target) => Data::Symlink(target),
            Self::CharDevice(major, minor) => Data::CharDevice { major, minor },
            Self::BlockDevice(major, minor) => Data::BlockDevice { major, minor },
            Self::Fifo => Data::Fifo,
        }
    }
}

/// A path in the order of a list of changes.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Key(PathBuf);

impl Ord for Key {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        order(&self.0, &other.0)
    }
}

impl PartialOrd for Key {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl<'s> Additions<'s> {
    /// Nothing yet, on top of `below`.
    pub(super) fn new(below: &'s Below, new_directory: NewDirectory) -> Self {
        Self {
            below,
            new_directory,
            entries: BTreeMap::new(),
            hidden: BTreeSet::new(),
            shared: BTreeMap::new(),
        }
    }

    /// What directories that are made from now on are like.
    pub(super) fn set_new_directory(&mut self, new_directory: NewDirectory) {
        self.new_directory = new_directory;
    }

    /// What the layers have at `path`, a path without links.
    fn lookup(&self, path: &Path) -> io::Result<Option<Node>> {
        if path.ancestors().any(|above| self.hidden.contains(above)) {
            return Ok(None);
        }
        self.below.lookup(path, false)
    }

    /// The type of what is at `path`, a path without links; absent: nothing.
    pub(super) fn file_type(&self, path: &Path) -> io::Result<Option<FileType>> {
        if path.as_os_str().is_empty() {
            return Ok(Some(FileType::Directory));
        }
        if let Some(addition) = self.entries.get(&Key(path.to_owned())) {
            return Ok(Some(addition.content.file_type()));
        }
        Ok(self.lookup(path)?.map(|node| node.file_type()))
    }

    /// The metadata of the directory at `path`, a path without links; absent where there is none.
    pub(super) fn directory_metadata(&self, path: &Path) -> io::Result<Option<Metadata>> {
        if let Some(addition) = self.entries.get(&Key(path.to_owned())) {
            let is_directory = addition.content.is_directory();
            return Ok(is_directory.then(|| addition.metadata.clone()));
        }
        match self.lookup(path)? {
            Some(node) if node.file_type().is_dir() => self.metadata_of(&node).map(Some),
            _ => Ok(None),
        }
    }

    fn metadata_of(&self, node: &Node) -> io::Result<Metadata> {
        Ok(Metadata {
            xattrs: self.below.xattrs(node)?,
            ..node.metadata()
        })
    }

    /// Follows all links of `path`, the last component's too, also where they lead to
    /// nothing. The result is relative, without links.
    pub(super) fn resolve(&self, path: &Path) -> io::Result<PathBuf> {
        self.resolve_in(Path::new(""), path)
    }

    /// [`Additions::resolve`] as it is for a process whose root directory is `root`, a path
    /// without links: no link and no `..` in `path` leads out of it. What is returned begins
    /// with `root`.
    pub(super) fn resolve_in(&self, root: &Path, path: &Path) -> io::Result<PathBuf> {
        let mut left: Vec<OsString> = parts(path);
        left.reverse();
        let mut resolved = root.to_owned();
        let mut links = 0;
        while let Some(part) = left.pop() {
            if part == ".." {
                if resolved != root {
                    resolved.pop();
                }
                continue;
            }
            let next = resolved.join(&part);
            let Some(target) = self.link_target(&next)? else {
                resolved = next;
                continue;
            };
            links += 1;
            if links > LINK_LIMIT {
                return Err(Errno::LOOP.into());
            }
            if Path::new(&target).is_absolute() {
                resolved = root.to_owned();
            }
            let mut target = parts(Path::new(&target));
            target.reverse();
            left.extend(target);
        }
        Ok(resolved)
    }

    fn link_target(&self, path: &Path) -> io::Result<Option<OsString>> {
        match self.entries.get(&Key(path.to_owned())) {
            Some(Addition {
                content: Content::Symlink(target),
                ..
            }) => return Ok(Some(target.clone())),
            Some(_) => return Ok(None),
            None => {}
        }
        match self.lookup(path)? {
            Some(node) if node.file_type().is_symlink() => Ok(Some(self.below.read_link(&node)?)),
            _ => Ok(None),
        }
    }

    /// Makes `path` (without links) and its parents where they are missing.
    ///
    /// # Errors
    /// `ENOTDIR` where something else is in the way.
    pub(super) fn make_directory(&mut self, path: &Path) -> io::Result<()> {
        self.add_parents(path)?;
        match self.file_type(path)? {
            Some(FileType::Directory) => Ok(()),
            Some(_) => Err(Errno::NOTDIR.into()),
            None => {
                self.insert_new_directory(path);
                Ok(())
            }
        }
    }

    /// Adds a file at `path` (without links in its parents), replacing one that is no directory.
    ///
    /// # Errors
    /// `EISDIR` where a directory is and the new file is none; `ENOTDIR` the other way
    /// round and where a parent is no directory.
    pub(super) fn add(&mut self, path: &Path, addition: Addition) -> io::Result<()> {
        self.add_parents(path)?;
        let is_directory = addition.content.is_directory();
        match self.file_type(path)? {
            Some(FileType::Directory) if !is_directory => return Err(Errno::ISDIR.into()),
            Some(found) if is_directory && found != FileType::Directory => {
                return Err(Errno::NOTDIR.into());
            }
            _ => {}
        }
        self.entries.insert(Key(path.to_owned()), addition);
        Ok(())
    }

    /// Adds a file at `path` in the place of whatever is there, as unpacking does.
    ///
    /// # Errors
    /// `ENOTDIR` where a parent is no directory.
    pub(super) fn replace(&mut self, path: &Path, addition: Addition) -> io::Result<()> {
        self.add_parents(path)?;
        if !addition.content.is_directory() {
            if self
                .lookup(path)?
                .is_some_and(|node| node.file_type().is_dir())
            {
                self.hidden.insert(path.to_owned());
            }
            let after = (Bound::Excluded(Key(path.to_owned())), Bound::Unbounded);
            let below = self.entries.range(after).map(|(key, _)| key);
            let below = below.take_while(|key| key.0.starts_with(path));
            for key in below.cloned().collect::<Vec<_>>() {
                self.entries.remove(&key);
            }
        }
        self.entries.insert(Key(path.to_owned()), addition);
        Ok(())
    }

    /// Another name for the file at `target`, both paths without links, as unpacking a hard
    /// link makes it. All names have the metadata of the last one. `fresh` names a file that
    /// has not been seen as one yet.
    ///
    /// A file of the layers below is made part of this one: only then are the names those of
    /// one file wherever the layer is unpacked.
    ///
    /// # Errors
    /// `ENOENT` where nothing is at `target`; `EPERM` where a directory is; `ENOTDIR` where a
    /// parent of `path` is none.
    pub(super) fn link(
        &mut self,
        path: &Path,
        target: &Path,
        metadata: Metadata,
        fresh: Identity,
    ) -> io::Result<()> {
        // Unpacking takes away what is at the new name first.
        if target.starts_with(path) {
            return Err(Errno::NOENT.into());
        }
        if !self.entries.contains_key(&Key(target.to_owned())) {
            let node = self.lookup(target)?.ok_or(Errno::NOENT)?;
            let existing = self.existing(node)?;
            self.replace(target, existing)?;
        }
        let named = self.entries.get_mut(&Key(target.to_owned()));
        let named = named.ok_or(Errno::NOENT)?;
        if named.content.is_directory() {
            return Err(Errno::PERM.into());
        }
        let identity = *named.identity.get_or_insert(fresh);
        let before = std::mem::take(&mut named.metadata);
        named.metadata = match named.content {
            // The mode of a link means nothing, and its time stays.
            Content::Symlink(_) => Metadata {
                uid: metadata.uid,
                gid: metadata.gid,
                ..before
            },
            _ => Metadata {
                xattrs: before.xattrs.into_iter().chain(metadata.xattrs).collect(),
                ..metadata
            },
        };
        let link = named.clone();
        self.shared.insert(identity, link.metadata.clone());
        self.replace(path, link)
    }

    /// A file of the layers below, anything but a directory, to be added once more.
    fn existing(&self, node: Node) -> io::Result<Addition> {
        let metadata = self.metadata_of(&node)?;
        let device = node.rdev();
        let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
        let content = match node.file_type() {
            FileType::RegularFile => Content::File {
                size_bytes: node.size(),
                open: {
                    let below = self.below.clone();
                    Arc::new(move || below.open(&node))
                },
            },
            FileType::Symlink => Content::Symlink(self.below.read_link(&node)?),
            FileType::CharacterDevice => Content::CharDevice(major, minor),
            FileType::BlockDevice => Content::BlockDevice(major, minor),
            FileType::Fifo => Content::Fifo,
            FileType::Directory | FileType::Socket | FileType::Unknown => {
                return Err(Errno::PERM.into());
            }
        };
        Ok(Addition {
            metadata,
            content,
            identity: None,
        })
    }

    /// Parents are part of a layer: unpacked alone, it would otherwise hide their metadata.
    ///
    /// What is an entry has its parents among the entries: only those below the nearest are looked
    /// at, or the cost of a path would grow with the square of its depth.
    fn add_parents(&mut self, path: &Path) -> io::Result<()> {
        let mut missing = Vec::new();
        let parents = path.ancestors().skip(1);
        for parent in parents.filter(|parent| !parent.as_os_str().is_empty()) {
            match self.entries.get(&Key(parent.to_owned())) {
                Some(addition) if addition.content.is_directory() => break,
                Some(_) => return Err(Errno::NOTDIR.into()),
                None => missing.push(parent),
            }
        }
        for parent in missing.into_iter().rev() {
            match self.lookup(parent)? {
                Some(node) if node.file_type().is_dir() => {
                    let metadata = self.metadata_of(&node)?;
                    let addition = Addition {
                        metadata,
                        content: Content::Directory,
                        identity: None,
                    };
                    self.entries.insert(Key(parent.to_owned()), addition);
                }
                Some(_) => return Err(Errno::NOTDIR.into()),
                None => self.insert_new_directory(parent),
            }
        }
        Ok(())
    }

    fn insert_new_directory(&mut self, path: &Path) {
        let NewDirectory {
            owner: (uid, gid),
            mode,
            mtime,
        } = self.new_directory;
        let metadata = Metadata {
            mode,
            uid,
            gid,
            mtime,
            xattrs: BTreeMap::new(),
        };
        let addition = Addition {
            metadata,
            content: Content::Directory,
            identity: None,
        };
        self.entries.insert(Key(path.to_owned()), addition);
    }

    /// Everything added, in order. Files of one identity become hard links of the first.
    pub(super) fn into_changes(self) -> Vec<Change> {
        let mut first: BTreeMap<Identity, PathBuf> = BTreeMap::new();
        let mut changes = Vec::with_capacity(self.entries.len());
        for (Key(path), addition) in self.entries {
            let mut metadata = addition.metadata;
            let mut data = addition.content.into_data(self.hidden.contains(&path));
            if let Some(identity) = addition.identity {
                if let Some(shared) = self.shared.get(&identity) {
                    metadata.clone_from(shared);
                }
                match first.get(&identity) {
                    Some(first) => data = Data::Hardlink(first.clone()),
                    None => {
                        first.insert(identity, path.clone());
                    }
                }
            }
            let entry = Entry { metadata, data };
            changes.push(Change {
                path,
                kind: ChangeKind::Entry(entry),
            });
        }
        changes
    }
}

/// The time of what has none of its own: directories made on the way, files whose content
/// stands in the Dockerfile. Not the current one, so that the same inputs give the same
/// layer; not 1970 either, which some tools take for "no time".
const OWN_TIME_SECONDS: i64 = 1_577_836_800; // 2020-01-01T00:00:00Z

/// The modification time of what has none of its own.
pub(super) fn own_time(epoch: Option<i64>) -> Time {
    Time {
        seconds: epoch.unwrap_or(OWN_TIME_SECONDS),
        nanoseconds: 0,
    }
}

/// The content of a file from memory.
pub(super) fn inline(content: &str) -> Content {
    Content::Bytes(content.as_bytes().into())
}

/// The components of a path without root and `.`; `..` stays.
fn parts(path: &Path) -> Vec<OsString> {
    path.components()
        .filter_map(|component| match component {
            Component::Normal(part) => Some(part.to_owned()),
            Component::ParentDir => Some("..".into()),
            Component::RootDir | Component::CurDir | Component::Prefix(_) => None,
        })
        .collect()
}
