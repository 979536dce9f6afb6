//! Unpacked layers ⇄ a mounted root filesystem. Knows nothing about archives.
//!
//! A [`Tree`] is one unpacked layer in overlay form: whiteouts are character
//! devices 0/0, opaque directories carry `user.overlay.opaque=y`. A [`Stack`] is a
//! list of trees looked at as one filesystem, without mounting anything. A
//! [`Rootfs`] is a mounted, writable one; what was changed in it is a new tree, and
//! [`changes`] says what that tree does to the stack below it. [`materialize`] is the
//! way back, from a list of changes to a tree.
//!
//! Overlay filesystems are mounted with `userxattr`, by root too, so that a tree is the
//! same whoever made it. Fall-backs for hosts without overlay mounts are not here.
//!
//! A tree's root directory is no entry of its layer. Its mode in an image is always
//! 0755, whatever the directory on disk has, as containerd's overlay snapshotter does
//! it. Where it is opaque, it hides all trees below, as the image specification says
//! and the kernel does not.
//!
//! <https://github.com/opencontainers/image-spec/blob/main/layer.md#representing-changes>
//! <https://docs.kernel.org/filesystems/overlayfs.html>

mod change;
mod diff;
mod materialize;
mod overlay;
mod stack;
mod stubs;
#[cfg(test)]
mod testing;
mod tree;
mod xattr;

use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

pub use change::{
    Change, ChangeKind, Data, Entry, FileContent, FileSource, Metadata, OpenFile, Time, order,
};
pub use diff::{Changes, changes};
pub use materialize::materialize;
pub use overlay::{Changed, Rootfs};
pub use stack::{Node, Stack};
pub use stubs::MountPoint;
pub use tree::Tree;
pub use xattr::belongs_in_layer;

/// What can go wrong with a root filesystem.
#[derive(Debug, Error)]
pub enum RootfsError {
    /// A file operation failed.
    #[error("{action} {path:?}")]
    Io {
        /// Such as `reading`.
        action: &'static str,
        /// What it was done to; inside the image where it has no leading slash.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The kernel refused the mount.
    #[error("mounting an overlay of {layers} layers at {path:?}{}", said(.messages))]
    Mount {
        /// Where.
        path: PathBuf,
        /// The number of layers below the writable one.
        layers: usize,
        /// What the kernel had to say beyond the error number; may be empty.
        messages: String,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// More layers than the kernel takes.
    #[error("the image has {layers} layers, this kernel can mount {limit}; {hint}")]
    TooManyLayers {
        /// How many there are.
        layers: usize,
        /// How many are possible.
        limit: usize,
        /// What to do about it.
        hint: &'static str,
    },
    /// A mount point is there, but not what was asked for.
    #[error("mount point {path:?} is {found}, want {want}")]
    MountPoint {
        /// Inside the image.
        path: PathBuf,
        /// What it is.
        found: &'static str,
        /// What it has to be.
        want: &'static str,
    },
    /// A directory or file in the upper directory refers to content elsewhere, which a layer cannot express.
    #[error("{path:?} carries the overlay attribute {attribute:?}, which sockless never asks the kernel for")]
    Redirect {
        /// Inside the image.
        path: PathBuf,
        /// The attribute's name.
        attribute: &'static str,
    },
    /// A change that cannot become part of a tree.
    #[error("cannot put {path:?} into a layer: {reason}")]
    BadChange {
        /// Its path.
        path: PathBuf,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A file's content was not as long as announced.
    #[error("{path:?} has changed while it was read: got {got} bytes, want {want}")]
    Size {
        /// Inside the image.
        path: PathBuf,
        /// What was read, at most one more than `want`.
        got: u64,
        /// What was announced.
        want: u64,
    },
    /// An attribute that is none of a layer's.
    #[error("{path:?} has the extended attribute {name:?}, which does not belong into layers")]
    Attribute {
        /// Inside the image.
        path: PathBuf,
        /// The attribute.
        name: std::ffi::OsString,
    },
}

impl RootfsError {
    /// Wraps an error with what was attempted.
    pub(crate) fn io<E: Into<io::Error>>(
        action: &'static str,
        path: &Path,
    ) -> impl FnOnce(E) -> Self + use<E> {
        let path = path.to_owned();
        move |source| Self::Io {
            action,
            path,
            source: source.into(),
        }
    }
}

fn said(messages: &str) -> String {
    if messages.is_empty() {
        String::new()
    } else {
        format!(" (the kernel says: {messages})")
    }
}
