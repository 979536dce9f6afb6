//! [`LayerError`].

use std::error::Error;
use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::image::{DiffId, MediaType};
use crate::store::StoreError;

/// What can go wrong with a layer archive, written or read.
#[derive(Debug, Error)]
pub enum LayerError {
    /// The list of changes ended in an error.
    #[error("listing the changes of the layer")]
    Changes(#[source] Box<dyn Error + Send + Sync>),
    /// A change cannot be expressed in a layer.
    #[error("{path:?} cannot be put into a layer: {reason}")]
    Name {
        /// The change's path.
        path: PathBuf,
        /// Why.
        reason: &'static str,
    },
    /// Changes are not in path order, or one path comes twice.
    #[error("the changes of the layer are out of order: {path:?} came after {after:?}")]
    Order {
        /// The path that came too late.
        path: PathBuf,
        /// The path before it.
        after: PathBuf,
    },
    /// A file has not the size that was announced: it changes while it is read.
    #[error("{path:?} changed while it was put into the layer: {}, want {want_bytes} bytes", got(*.got_bytes, *.want_bytes))]
    SizeChanged {
        /// The change's path.
        path: PathBuf,
        /// Bytes that were read; more than wanted means at least so many.
        got_bytes: u64,
        /// Bytes that were announced.
        want_bytes: u64,
    },
    /// A file that belongs into the layer cannot be read.
    #[error("reading {path:?} for the layer")]
    ReadFile {
        /// The change's path.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The archive cannot be written, or compressed.
    #[error("writing the layer")]
    Write(#[source] io::Error),
    /// The store failed.
    #[error("storing the layer")]
    Store(#[from] StoreError),
    /// The blob is no layer, or one of a kind that is not supported.
    #[error(
        "unsupported layer media type {:?}: expected a tar, tar+gzip or tar+zstd layer of OCI or Docker",
        .0.as_str()
    )]
    MediaType(MediaType),
    /// The layer's bytes cannot be read or decompressed.
    #[error("reading the layer")]
    Read(#[source] io::Error),
    /// The bytes are no well-formed tar.
    #[error("malformed layer: {problem} (byte {offset} of the tar{})", entry(.path))]
    Malformed {
        /// Where in the uncompressed bytes.
        offset: u64,
        /// The entry, where it is known; else empty.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// The layer is larger than it may be.
    #[error("the layer has {what}; the limit is {limit}{}", entry(.path))]
    Limit {
        /// Of what it has too much, such as `too many entries`.
        what: &'static str,
        /// The limit.
        limit: u64,
        /// The entry, where there is one; else empty.
        path: PathBuf,
    },
    /// The uncompressed bytes are not what the image's config says.
    #[error(
        "the layer's uncompressed bytes are not those of the image config: got {got}, want {want}"
    )]
    DiffId {
        /// Of the bytes.
        got: DiffId,
        /// In the config.
        want: DiffId,
    },
    /// An entry would be outside of the root, or has a name that means something else.
    #[error("refusing entry {path:?} of the archive: {reason}")]
    Refused {
        /// The entry's name as it is in the archive.
        path: PathBuf,
        /// Why.
        reason: &'static str,
    },
    /// An entry has an extended attribute that would steer the overlay file system.
    #[error(
        "refusing entry {path:?} of the layer: extended attribute {name:?} is the overlay file system's own"
    )]
    ForbiddenXattr {
        /// The entry.
        path: PathBuf,
        /// The attribute's name.
        name: OsString,
    },
    /// A hard link leads to a file that this layer does not have.
    #[error(
        "hard link {path:?} of the layer leads to {target:?}, which this layer does not have before it; sockless applies layers on their own and cannot use such an image"
    )]
    HardlinkOutsideLayer {
        /// The link.
        path: PathBuf,
        /// Where it leads.
        target: PathBuf,
    },
    /// The kernel does not let this process make whiteouts.
    #[error(
        "making the whiteout of {path:?}: character devices 0/0 are not permitted here; Linux 5.8 or later permits them in a user namespace, unless a seccomp filter forbids mknod"
    )]
    WhiteoutNotPermitted {
        /// The removed path.
        path: PathBuf,
        /// `EPERM` or similar.
        #[source]
        source: io::Error,
    },
    /// A file cannot be given to its owner.
    #[error("giving {path:?} of the layer to {uid}:{gid}{}", owner_hint(.source))]
    Owner {
        /// The entry.
        path: PathBuf,
        /// User.
        uid: u32,
        /// Group.
        gid: u32,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// An extended attribute cannot be set.
    #[error("setting extended attribute {name:?} of {path:?} of the layer")]
    Xattr {
        /// The entry.
        path: PathBuf,
        /// The attribute.
        name: OsString,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Another operation on the tree failed.
    #[error("{action} {path:?} of the layer")]
    Tree {
        /// Such as `creating`.
        action: &'static str,
        /// The entry.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl LayerError {
    /// Wraps an error of an operation on the tree.
    pub(super) fn tree<E: Into<io::Error>>(
        action: &'static str,
        path: &Path,
    ) -> impl FnOnce(E) -> Self {
        move |source| Self::Tree {
            action,
            path: path.to_owned(),
            source: source.into(),
        }
    }
}

fn got(got: u64, want: u64) -> String {
    if got > want {
        format!("got at least {got}")
    } else {
        format!("got {got}")
    }
}

fn entry(path: &Path) -> String {
    if path.as_os_str().is_empty() {
        String::new()
    } else {
        format!(", entry {path:?}")
    }
}

fn owner_hint(source: &io::Error) -> &'static str {
    if source.raw_os_error() == Some(rustix::io::Errno::INVAL.raw_os_error()) {
        ": this user namespace has no such ID; more subordinate IDs in /etc/subuid and /etc/subgid are needed"
    } else {
        ""
    }
}
