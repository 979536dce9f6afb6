//! [`Additions`]: new files on top of a filesystem, decided without writing any.
//!
//! COPY, ADD and WORKDIR never touch a root filesystem. What they add is worked out
//! here against a read-only view of the layers below, with the links of those layers
//! followed, and becomes a list of changes.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io;
use std::path::{Component, Path, PathBuf};

use rustix::fs::FileType;
use rustix::io::Errno;

use crate::rootfs::{
    Change, ChangeKind, Data, Entry, FileContent, FileSource, Metadata, Stack, Time, order,
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
    below: &'s Stack,
    new_directory: NewDirectory,
    entries: BTreeMap<Key, Addition>,
}

/// A file to add.
pub(super) struct Addition {
    /// Its metadata.
    pub(super) metadata: Metadata,
    /// What it is.
    pub(super) data: Data,
    /// Which files are the same one.
    pub(super) identity: Option<Identity>,
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
    pub(super) fn new(below: &'s Stack, new_directory: NewDirectory) -> Self {
        Self {
            below,
            new_directory,
            entries: BTreeMap::new(),
        }
    }

    /// The type of what is at `path`, a path without links; absent: nothing.
    pub(super) fn file_type(&self, path: &Path) -> io::Result<Option<FileType>> {
        if path.as_os_str().is_empty() {
            return Ok(Some(FileType::Directory));
        }
        if let Some(addition) = self.entries.get(&Key(path.to_owned())) {
            return Ok(Some(addition.data.file_type()));
        }
        Ok(self.below.lookup(path, false)?.map(|node| node.file_type()))
    }

    /// Follows all links of `path`, the last component's too, also where they lead to
    /// nothing. The result is relative, without links.
    pub(super) fn resolve(&self, path: &Path) -> io::Result<PathBuf> {
        let mut left: Vec<OsString> = parts(path);
        left.reverse();
        let mut resolved = PathBuf::new();
        let mut links = 0;
        while let Some(part) = left.pop() {
            if part == ".." {
                resolved.pop();
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
                resolved = PathBuf::new();
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
                data: Data::Symlink(target),
                ..
            }) => return Ok(Some(target.clone())),
            Some(_) => return Ok(None),
            None => {}
        }
        match self.below.lookup(path, false)? {
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
        let is_directory = matches!(addition.data, Data::Directory { .. });
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
        if !matches!(addition.data, Data::Directory { .. }) {
            let below = |key: &Key| key.0 != path && key.0.starts_with(path);
            self.entries.retain(|key, _| !below(key));
        }
        self.entries.insert(Key(path.to_owned()), addition);
        Ok(())
    }

    /// Parents are part of a layer: unpacked alone, it would otherwise hide their metadata.
    fn add_parents(&mut self, path: &Path) -> io::Result<()> {
        let mut parents: Vec<&Path> = path.ancestors().skip(1).collect();
        parents.reverse();
        for parent in parents.into_iter().filter(|p| !p.as_os_str().is_empty()) {
            if let Some(addition) = self.entries.get(&Key(parent.to_owned())) {
                if !matches!(addition.data, Data::Directory { .. }) {
                    return Err(Errno::NOTDIR.into());
                }
                continue;
            }
            match self.below.lookup(parent, false)? {
                Some(node) if node.file_type().is_dir() => {
                    let metadata = Metadata {
                        xattrs: self.below.xattrs(&node)?,
                        ..node.metadata()
                    };
                    let data = Data::Directory { opaque: false };
                    self.entries.insert(
                        Key(parent.to_owned()),
                        Addition {
                            metadata,
                            data,
                            identity: None,
                        },
                    );
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
        let data = Data::Directory { opaque: false };
        self.entries.insert(
            Key(path.to_owned()),
            Addition {
                metadata,
                data,
                identity: None,
            },
        );
    }

    /// Everything added, in order. Files of one identity become hard links of the first.
    pub(super) fn into_changes(self) -> Vec<Change> {
        let mut first: BTreeMap<Identity, PathBuf> = BTreeMap::new();
        let mut changes = Vec::with_capacity(self.entries.len());
        for (Key(path), mut addition) in self.entries {
            if let Some(identity) = addition.identity {
                match first.get(&identity) {
                    Some(first) => addition.data = Data::Hardlink(first.clone()),
                    None => {
                        first.insert(identity, path.clone());
                    }
                }
            }
            let entry = Entry {
                metadata: addition.metadata,
                data: addition.data,
            };
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
pub(super) fn inline(content: &str) -> Data {
    Data::File(FileContent {
        size_bytes: content.len() as u64,
        source: FileSource::Bytes(content.as_bytes().into()),
    })
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
