//! COPY and ADD: files of a source → changes on top of a filesystem.
//!
//! In two parts, because the first alone decides the cache key: [`select()`] says which
//! files are read, [`place()`] where they go. Contents are read once, on their way into the
//! layer, unless a record might match; see [`super::listing`].
//!
//! Follows BuildKit's file operations where the reference is silent: links named as
//! sources are followed, inside copied directories they stay links; an existing
//! destination directory keeps its metadata, directories below it take the source's.
//!
//! <https://github.com/tonistiigi/fsutil/blob/master/copy/copy.go>

mod place;
mod select;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::FileType;
use rustix::io::Errno;
use thiserror::Error;

use super::stat_cache::FileState;
use super::unpack::UnpackError;
use crate::image::Digest;
use crate::rootfs::{Metadata, Node, Stack, Time};

pub(super) use place::place;
pub(super) use select::{Selection, select};

/// A filesystem that COPY reads: a build context, or the layers of a stage or an image.
pub(super) trait SourceTree: Send + Sync {
    /// What is at `path`. Links in parents are followed inside the tree; the last
    /// component's only where `follow_last`.
    fn lookup(&self, path: &Path, follow_last: bool) -> io::Result<Option<SourceNode>>;
    /// What is in the directory `path` (without links), sorted by name.
    fn read_dir(&self, path: &Path) -> io::Result<Vec<(OsString, SourceNode)>>;
    /// Opens the regular file `path` (without links), which a look-up or a listing gave.
    fn open(&self, path: &Path) -> io::Result<File>;
    /// The target of the link `path` (without links in its parents).
    fn read_link(&self, path: &Path) -> io::Result<OsString>;
    /// The extended attributes of `path` that belong in a layer.
    fn xattrs(&self, path: &Path) -> io::Result<BTreeMap<OsString, Vec<u8>>>;
    /// The digest of a regular file where it is known without reading it.
    fn digest(&self, _node: &SourceNode) -> Option<Digest> {
        None
    }
    /// Hears what the digest of the file in this state is, which was read from `since` on.
    fn learn(&self, _state: &FileState, _digest: &Digest, _since: Time) {}
}

/// A file of a [`SourceTree`].
#[derive(Clone, Debug)]
pub(super) struct SourceNode {
    /// Its path in the tree, without links.
    pub(super) path: PathBuf,
    /// Its type.
    pub(super) file_type: FileType,
    /// Mode, owner and time.
    pub(super) metadata: Metadata,
    /// Its size.
    pub(super) size_bytes: u64,
    /// Device and inode.
    pub(super) identity: (u64, u64),
    /// When content or metadata last changed; the same for all files that cannot.
    pub(super) changed: Time,
    /// The number of its names.
    pub(super) links: u64,
    /// Major and minor number of a device.
    pub(super) device: (u32, u32),
    /// The target of a link, once it was read.
    pub(super) target: Option<OsString>,
}

impl SourceNode {
    /// What tells whether the file is still the one that it was.
    pub(super) fn state(&self) -> FileState {
        FileState {
            device: self.identity.0,
            inode: self.identity.1,
            size_bytes: self.size_bytes,
            mtime: self.metadata.mtime,
            ctime: self.changed,
        }
    }
}

/// What is wrong with a COPY.
#[derive(Debug, Error)]
pub(super) enum CopyError {
    /// A source that has no wildcard is not there.
    #[error("{path:?} not found in {place}")]
    Missing {
        /// As written.
        path: String,
        /// Such as `the build context`.
        place: &'static str,
    },
    /// A pattern, in a path or of `--exclude`, is none.
    #[error("invalid pattern {pattern:?}: {reason}")]
    Pattern {
        /// As written.
        pattern: String,
        /// What is wrong with it.
        reason: String,
    },
    /// An archive cannot be unpacked.
    #[error("unpacking the archive {path:?}")]
    Unpack {
        /// The archive.
        path: PathBuf,
        /// Why.
        #[source]
        source: UnpackError,
    },
    /// The source cannot be read.
    #[error("reading {path:?} of {place}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Such as `the build context`.
        place: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The destination has something of another type.
    #[error("cannot copy {what} to {path:?}: {reason}")]
    Place {
        /// Such as `a directory`.
        what: &'static str,
        /// Where.
        path: PathBuf,
        /// What is there.
        reason: String,
    },
    /// `--parents` with a source that has no parents to keep.
    #[error(
        "--parents needs a path below the root of the source, and {0:?} names the root itself (every file in it is \"*\")"
    )]
    NoPath(String),
    /// `--chmod` is none. Planning has seen to that.
    #[error("invalid --chmod {0:?}")]
    Mode(String),
    /// A URL or a repository that should have been fetched before.
    #[error("{0} was not fetched")]
    NotFetched(String),
    /// Nothing that an image can hold.
    #[error("{0:?} is neither file, directory, link, pipe, socket nor device")]
    Type(PathBuf),
}

impl From<&Node> for SourceNode {
    fn from(node: &Node) -> Self {
        let device = node.rdev();
        Self {
            path: node.path().to_owned(),
            file_type: node.file_type(),
            metadata: node.metadata(),
            size_bytes: node.size(),
            identity: node.device_and_inode(),
            changed: Time::default(),
            links: node.nlink(),
            device: (rustix::fs::major(device), rustix::fs::minor(device)),
            target: None,
        }
    }
}

/// The file at a path that an earlier look-up gave.
fn node_at(stack: &Stack, path: &Path) -> io::Result<Node> {
    stack
        .lookup(path, false)?
        .ok_or_else(|| Errno::NOENT.into())
}

impl SourceTree for Stack {
    fn lookup(&self, path: &Path, follow_last: bool) -> io::Result<Option<SourceNode>> {
        Ok(Self::lookup(self, path, follow_last)?.map(|node| SourceNode::from(&node)))
    }

    fn read_dir(&self, path: &Path) -> io::Result<Vec<(OsString, SourceNode)>> {
        let entries = Self::read_dir(self, &node_at(self, path)?)?;
        Ok(entries
            .into_iter()
            .map(|(name, node)| (name, SourceNode::from(&node)))
            .collect())
    }

    fn open(&self, path: &Path) -> io::Result<File> {
        Self::open(self, &node_at(self, path)?)
    }

    fn read_link(&self, path: &Path) -> io::Result<OsString> {
        Self::read_link(self, &node_at(self, path)?)
    }

    fn xattrs(&self, path: &Path) -> io::Result<BTreeMap<OsString, Vec<u8>>> {
        Self::xattrs(self, &node_at(self, path)?)
    }
}

#[cfg(test)]
mod tests;
