//! An image goes out: as an OCI image layout in a tar or in a directory, as an archive for
//! `docker load`, or as the files that its layers are together, in a tar or in a directory.
//!
//! Pushing to a registry is [`crate::registry`]'s. Nothing is compressed or fetched
//! here: every blob has to be in the store, every layer unpacked.

mod document;
mod file;
mod files;
mod layout;
mod local;
mod oci;
mod tar;
#[cfg(test)]
mod testing;

use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::image::Digest;
use crate::layer::LayerError;
use crate::layout::LayoutError;
use crate::rootfs::RootfsError;
use crate::store::StoreError;

pub use self::tar::root_tar;
pub use document::{LayoutBlob, has_blob, layout_document};
pub use file::{IsCancelled, check_file};
pub use files::Root;
pub use layout::image_layout;
pub use local::{LocalReport, check_directory, local};
pub use oci::{ArchiveKind, image_archive};

/// What can go wrong while an image is written.
#[derive(Debug, Error)]
pub enum ExportError {
    /// The file cannot be written.
    #[error("{action} {}", path.display())]
    Io {
        /// Such as `writing`.
        action: &'static str,
        /// The file; `-` for standard output.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// An archive is nothing to look at.
    #[error("standard output is a terminal: redirect it, or give a file with \"dest=FILE\"")]
    Terminal,
    /// A blob cannot be opened.
    #[error("opening the blob {digest}")]
    OpenBlob {
        /// Its name.
        digest: Digest,
        /// Why not.
        #[source]
        source: StoreError,
    },
    /// A blob in the store has another size than its descriptor says.
    #[error("the blob {digest} in the store has {got} bytes, want {want}")]
    BlobSize {
        /// Its name.
        digest: Digest,
        /// The number of bytes in the store.
        got: u64,
        /// The descriptor's number.
        want: u64,
    },
    /// A blob could not be copied: it is damaged, or the archive cannot be written.
    #[error("copying the blob {digest}")]
    CopyBlob {
        /// Its name.
        digest: Digest,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// `docker load` reads one image.
    #[error("an archive for docker load holds one image and no index of several")]
    IndexForDocker,
    /// Files of several platforms have one name, and go to one directory.
    #[error(
        "{path:?} is in the images for {first} and for {second}, whose files are to be written to one directory"
    )]
    SamePath {
        /// The file, inside the images.
        path: PathBuf,
        /// What the one image is for, such as `linux/arm64`.
        first: String,
        /// What the other one is for.
        second: String,
    },
    /// The archive cannot be written.
    #[error("writing the archive")]
    Archive(#[source] io::Error),
    /// The root filesystem cannot be written as a tar.
    #[error("writing the root filesystem")]
    RootTar(#[source] LayerError),
    /// The root filesystem cannot be read.
    #[error(transparent)]
    Rootfs(RootfsError),
    /// A file of the root filesystem cannot be written to a directory.
    #[error("writing {path:?} to {}", dest.display())]
    Local {
        /// The file, inside the image.
        path: PathBuf,
        /// The directory.
        dest: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// What is written to this file or directory failed on the way.
    #[error("writing {}", path.display())]
    Dest {
        /// The destination.
        path: PathBuf,
        /// What failed.
        #[source]
        source: Box<ExportError>,
    },
    /// The directory has a layout that cannot be extended.
    #[error(transparent)]
    Layout(#[from] LayoutError),
}

impl ExportError {
    /// Says where it was to be written, where that may be what failed and is not said yet.
    fn at(self, dest: &Path) -> Self {
        let is_damaged = |error: &io::Error| error.kind() == io::ErrorKind::InvalidData;
        match &self {
            Self::CopyBlob { source, .. } | Self::Archive(source) if is_damaged(source) => self,
            Self::CopyBlob { .. } | Self::Archive(_) | Self::RootTar(_) => Self::Dest {
                path: dest.to_owned(),
                source: Box::new(self),
            },
            _ => self,
        }
    }

    fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io {
            action,
            path,
            source,
        }
    }
}
