//! The layer archive, both directions: changes → tar → compressed blob, and back.
//!
//! [`seal`] turns a list of changes into a blob in the store, in one pass over every
//! byte. [`apply()`] turns the compressed stream of *one* layer into a tree in overlay
//! form; lower layers are not looked at. [`list()`] says what that tree would have, without
//! writing one. Rules common to both directions:
//!
//! - Entries are in path order, a directory before what is in it, and no path twice.
//! - A removed path `a/b` is the empty file `a/.wh.b`; a directory that hides what lower
//!   layers have in it is followed by `.wh..wh..opq` inside it ([`whiteout`]).
//! - Kept of a file: type, the lowest twelve mode bits, numeric owner and group, mtime,
//!   extended attributes, link target. Not kept: access and change times, user and group
//!   names, sockets.
//!
//! Deliberately not here: finding out what changed (`rootfs`), stacking trees (`rootfs`),
//! moving blobs (`registry`). What an archive says is hostile: names are resolved below
//! the tree only, sizes are limited by [`Limits`], and whatever is malformed is an error.
//!
//! <https://github.com/opencontainers/image-spec/blob/main/layer.md>

mod ahead;
mod apply;
pub mod archive;
mod codec;
mod compress;
mod convert;
mod decompress;
mod error;
mod guard;
mod gzip;
mod header;
mod list;
mod metadata;
mod pax;
mod pool;
mod read;
mod sparse;
mod tree;
pub mod whiteout;
mod write;
mod zstd;

#[cfg(test)]
mod corpus;
#[cfg(test)]
mod hostile;
#[cfg(test)]
mod laws;
#[cfg(test)]
mod properties;
#[cfg(test)]
mod testing;

use std::io::{self, Write};
use std::path::Path;

use ahead::pipe;
use apply::apply_uncompressed;
pub use apply::{AppliedLayer, SkippedDevice, SkippedXattr, apply, apply_and_list};
use compress::Compressor;
pub use compress::{Compression, LayerCompression, LevelError};
pub use convert::{convert, converted};
pub use decompress::{Decompressed, decompress};
pub use error::LayerError;
pub use list::{is_too_long, list};
pub use pool::{BUDGET_BYTES, Pool};
pub use read::{EntryKind, TarEntry, TarReader};
pub use sparse::Segment;
pub use write::write;

use crate::image::{Descriptor, DiffId};
use crate::io::HashingWriter;
use crate::rootfs::Change;
use crate::store::{GrowingBlob, Store};

/// How a layer is sealed. Everything here changes the bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SealOptions {
    /// In seconds since 1970 UTC: no mtime is later.
    pub epoch: Option<i64>,
    /// How the tar is compressed.
    pub compression: Compression,
}

/// A layer that is in the store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SealedLayer {
    /// The digest of the uncompressed tar.
    pub diff_id: DiffId,
    /// Media type, digest and size of the blob.
    pub descriptor: Descriptor,
    /// The size of the uncompressed tar.
    pub uncompressed_bytes: u64,
}

/// What a hostile layer may cost. Exceeding a limit is an error, never a cut.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of the whole uncompressed tar, and of all files with their holes.
    pub uncompressed_bytes: u64,
    /// Uncompressed bytes for each compressed byte, and bytes of holes for each byte of the tar;
    /// see `ratio_free_bytes`.
    pub ratio: u64,
    /// So many uncompressed bytes and holes are always allowed, whatever the ratio: a gigabyte of
    /// zeros in a small image is unusual and not an attack.
    pub ratio_free_bytes: u64,
    /// Headers in the tar, and directories that entries imply.
    pub entries: u64,
    /// Bytes of one extended header or long name.
    pub extended_header_bytes: u64,
    /// Bytes of a path or link target.
    pub path_bytes: usize,
    /// Bytes of one extended attribute's value.
    pub xattr_bytes: usize,
    /// Pieces of one sparse file.
    pub sparse_segments: usize,
    /// Bytes of memory for what is remembered until the end: directories, skipped devices.
    pub remembered_bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            // The largest real layers (machine-learning images) have some 20 GB.
            uncompressed_bytes: 64 << 30,
            // Text compresses to a tenth, generated tables to a fiftieth.
            ratio: 200,
            ratio_free_bytes: 2 << 30,
            // The largest real layers have some hundred thousand.
            entries: 2_000_000,
            // As Go's archive/tar has it, which every other builder reads with.
            extended_header_bytes: 1 << 20,
            // PATH_MAX: the kernel resolves nothing longer.
            path_bytes: 4096,
            // XATTR_SIZE_MAX: the kernel stores nothing larger.
            xattr_bytes: 64 << 10,
            sparse_segments: 1 << 17,
            remembered_bytes: 256 << 20,
        }
    }
}

/// Who watches a layer while it is sealed.
pub struct Watch<'w> {
    /// Asked now and then; true ends the sealing with an error.
    pub is_stopped: &'w (dyn Fn() -> bool + Sync),
    /// Gets the blob before its first byte is written.
    pub follow: Box<dyn FnOnce(GrowingBlob) + 'w>,
}

impl std::fmt::Debug for Watch<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Watch").finish_non_exhaustive()
    }
}

/// Writes `changes` as one compressed layer into the store, on the threads of `pool`.
///
/// One pass: tar, diff ID, compression, digest, blob. `changes` must be in path order,
/// parents before children. The blob appears whole or not at all, and its bytes do not
/// depend on the machine, the number of threads or what else is sealed. Blocking.
///
/// # Errors
/// [`LayerError::Changes`] where the list itself failed; [`LayerError::SizeChanged`],
/// [`LayerError::ReadFile`] where a file vanished, grew or shrank;
/// [`LayerError::Name`] and [`LayerError::Order`] for changes that no layer can express;
/// [`LayerError::Write`], also where `watch` stopped it; [`LayerError::Store`].
///
/// <https://github.com/opencontainers/image-spec/blob/main/layer.md>
pub fn seal<E>(
    changes: impl IntoIterator<Item = Result<Change, E>>,
    options: &SealOptions,
    pool: &Pool,
    watch: Watch<'_>,
    store: &Store,
) -> Result<SealedLayer, LayerError>
where
    E: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    seal_beside(changes, options, pool, watch, store, |_| Ok(io::sink()))
}

/// [`seal`], and the layer as a tree in the empty directory `tree`, from the same bytes and at the
/// same time: what [`apply()`] makes of it. Where that fails the layer is sealed all the same, and
/// the caller removes what there is of the tree.
///
/// # Errors
/// As [`seal`]; inside, as [`apply()`].
pub fn seal_and_apply<E>(
    changes: impl IntoIterator<Item = Result<Change, E>>,
    options: &SealOptions,
    pool: &Pool,
    watch: Watch<'_>,
    store: &Store,
    tree: &Path,
) -> Result<(SealedLayer, Result<AppliedLayer, LayerError>), LayerError>
where
    E: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    std::thread::scope(|scope| {
        let mut applying = None;
        let sealed = seal_beside(changes, options, pool, watch, store, |limits| {
            let (copy, read) = pipe();
            let thread = std::thread::Builder::new().name("tree".to_owned());
            let apply = move || apply_uncompressed(read, tree, &limits);
            applying = Some(thread.spawn_scoped(scope, apply)?);
            Ok(copy)
        })?;
        let died = || LayerError::Read(io::Error::other("the thread that makes the tree has died"));
        let applied = applying.map(|thread| thread.join().unwrap_or_else(|_| Err(died())));
        Ok((sealed, applied.unwrap_or_else(|| Err(died()))))
    })
}

/// Seals, and gives the uncompressed bytes to what `start` returns, too.
fn seal_beside<E, C: Write>(
    changes: impl IntoIterator<Item = Result<Change, E>>,
    options: &SealOptions,
    pool: &Pool,
    watch: Watch<'_>,
    store: &Store,
    start: impl FnOnce(Limits) -> io::Result<C>,
) -> Result<SealedLayer, LayerError>
where
    E: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let mut blob = store.write_blob()?;
    (watch.follow)(blob.follow()?);
    let copy = start(Limits::default()).map_err(LayerError::Write)?;
    std::thread::scope(|scope| {
        let compressor =
            Compressor::new(scope, options.compression, pool, blob).map_err(LayerError::Write)?;
        let mut tar = HashingWriter::new(Stoppable {
            inner: Tee {
                out: compressor,
                copy,
            },
            is_stopped: watch.is_stopped,
        });
        write(changes, options.epoch, &mut tar)?;
        let (stoppable, diff_id, uncompressed_bytes) = tar.finish();
        let Tee { out, mut copy } = stoppable.inner;
        // Its end is that of the archive, for who reads it.
        copy.flush().map_err(LayerError::Write)?;
        drop(copy);
        let blob = out.finish().map_err(LayerError::Write)?;
        let (digest, size) = blob.commit(None)?;
        Ok(SealedLayer {
            diff_id: DiffId::from_uncompressed(diff_id),
            descriptor: Descriptor::new(options.compression.media_type(), digest, size),
            uncompressed_bytes,
        })
    })
}

/// Ends writing when it is told to.
struct Stoppable<'w, W> {
    inner: W,
    is_stopped: &'w (dyn Fn() -> bool + Sync),
}

impl<W: Write> Write for Stoppable<'_, W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if (self.is_stopped)() {
            return Err(io::Error::other("stopped"));
        }
        self.inner.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

/// Writes everything twice.
struct Tee<W, C> {
    out: W,
    copy: C,
}

impl<W: Write, C: Write> Write for Tee<W, C> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.out.write(bytes)?;
        self.copy.write_all(&bytes[..written])?;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()?;
        self.copy.flush()
    }
}

/// Whether `error` carries a [`LayerError`] that went through [`io::Error`].
fn layer_error_inside(error: io::Error) -> LayerError {
    match error.downcast::<LayerError>() {
        Ok(inner) => inner,
        Err(error) => LayerError::Read(error),
    }
}
