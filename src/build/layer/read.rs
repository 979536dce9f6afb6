//! The bytes of a layer, read once: from the store, a registry or a layout, into a tree or a
//! listing, and into the store too where they are needed again.

use std::io::{self, Read, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use anyhow::Context as _;
use tokio_util::io::SyncIoBridge;

use super::super::Engine;
use super::{Layer, Origin};
use crate::image::{DiffId, Digest, ImageLayer};
use crate::layer::{self, LayerError, Limits};
use crate::progress::{BuildEvent, millis};
use crate::rootfs::Listing;

/// The stored bytes of a layer.
pub(super) type Compressed<'r> = Box<dyn Read + Send + 'r>;

/// What is made of a layer's bytes.
pub(super) struct Work<T> {
    /// Makes it, and reads the bytes to their end. Blocking.
    make: fn(&Engine, Compressed<'_>, &ImageLayer) -> anyhow::Result<T>,
    /// Whether the contents are in it, so that nobody needs the bytes for them again.
    has_contents: bool,
    /// For messages.
    doing: &'static str,
}

impl<T> Clone for Work<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Work<T> {}

/// Makes a tree.
pub(super) const UNPACK: Work<Unpacked> = Work {
    make: Engine::unpack,
    has_contents: true,
    doing: "unpacking",
};

/// Makes a listing.
pub(super) const LIST: Work<Listing> = Work {
    make: Engine::list,
    has_contents: false,
    doing: "listing",
};

impl Layer {
    /// Gets the layer's bytes and hands them to `work`.
    pub(super) async fn read<T: Send + 'static>(
        &self,
        engine: &Arc<Engine>,
        names: &ImageLayer,
        work: Work<T>,
    ) -> anyhow::Result<T> {
        let _permit = engine
            .unpacking
            .acquire()
            .await
            .expect("the semaphore is never closed");
        engine.check_cancelled()?;
        let started = Instant::now();
        let result = if engine.store.has_blob_of(&names.descriptor) {
            self.read_blob(engine, names, work).await
        } else {
            self.read_origin(engine, names, work).await
        };
        engine.timings.add("pull", started.elapsed());
        if result.is_ok() {
            let is_kept = engine.store.has_blob_of(&names.descriptor);
            let is_done = is_kept || !engine.layers.may_be_unpacked.contains(&names.diff_id);
            self.was_read.store(is_done, Ordering::Relaxed);
        }
        result.with_context(|| format!("{} layer {}", work.doing, names.descriptor.digest))
    }

    async fn read_blob<T: Send + 'static>(
        &self,
        engine: &Arc<Engine>,
        names: &ImageLayer,
        work: Work<T>,
    ) -> anyhow::Result<T> {
        let blob = engine.store.open_blob(&names.descriptor.digest)?;
        let (shared, of) = (Arc::clone(engine), names.clone());
        let reading = move || {
            let error = match (work.make)(&shared, Box::new(blob), &of) {
                Err(error) => error,
                done => return done.map(Ok),
            };
            // What is damaged may show long before the digest does.
            match shared.check_blob(&of.descriptor.digest) {
                Ok(()) => Err(error),
                Err(damaged) => Ok(Err(damaged)),
            }
        };
        match engine.blocking(reading).await? {
            Ok(done) => Ok(done),
            Err(_) if self.origin.is_some() => {
                engine.warn(format!(
                    "the blob {} in the store was damaged; it is pulled again",
                    names.descriptor.digest
                ));
                self.read_origin(engine, names, work).await
            }
            Err(damaged) => Err(damaged.into()),
        }
    }

    /// From where the image is, and into the store too where the bytes are needed again.
    async fn read_origin<T: Send + 'static>(
        &self,
        engine: &Arc<Engine>,
        names: &ImageLayer,
        work: Work<T>,
    ) -> anyhow::Result<T> {
        let Some(origin) = &self.origin else {
            return Err(self.missing(&names.descriptor.digest));
        };
        let place = match origin {
            Origin::Registry(repository) => repository.to_string(),
            Origin::Layout(layout) => layout.path().display().to_string(),
        };
        let task = format!("pull {} {place}", names.descriptor.digest.short());
        engine.progress.event(BuildEvent::TaskStarted {
            id: task.clone(),
            name: format!("pulling {place} {}", names.descriptor.digest.short()),
            total_bytes: Some(names.descriptor.size),
        });
        let started = Instant::now();
        let digest = &names.descriptor.digest;
        let source: Compressed<'static> = match origin {
            Origin::Registry(repository) => {
                let stream = engine.client.open_blob(repository, &names.descriptor).await;
                let stream = stream.map_err(|error| self.lost(digest, error.into()))?;
                Box::new(SyncIoBridge::new(stream))
            }
            Origin::Layout(layout) => {
                let (layout, descriptor) = (layout.clone(), names.descriptor.clone());
                let opening = engine.blocking(move || Ok(layout.open_blob(&descriptor)?));
                Box::new(opening.await?)
            }
        };
        // With its blob here, the step's record is one of this machine.
        let keep = self.may_be_lost() || engine.keeps(origin, &names.diff_id, work.has_contents);
        let (shared, of, label) = (Arc::clone(engine), names.clone(), task.clone());
        let done = engine.blocking(move || {
            let (engine, task, names) = (shared, label, of);
            let mut has_failed = false;
            let reader = ProgressReader::new(source, &engine, task);
            if !keep {
                return (work.make)(&engine, Box::new(reader), &names).map(Ok);
            }
            let mut blob = engine.store.write_blob()?;
            let tee = TeeReader {
                inner: reader,
                copy: &mut blob,
                has_failed: &mut has_failed,
            };
            let done = match (work.make)(&engine, Box::new(tee), &names) {
                Err(error) if !has_failed && is_of_bytes(&engine, &error) => {
                    return Ok(Err(error));
                }
                done => done?,
            };
            blob.commit(Some(&names.descriptor.digest))?;
            Ok(Ok(done))
        });
        let done = done.await?.map_err(|error| self.lost(digest, error))?;
        engine.progress.event(BuildEvent::TaskDone {
            id: task,
            outcome: String::new(),
            duration_ms: millis(started.elapsed()),
        });
        Ok(done)
    }
}

/// Whether the bytes of a layer are what is wrong: they do not come, or are not what they
/// should be. Where they are also copied somewhere, that may be what failed instead.
fn is_of_bytes(engine: &Engine, error: &anyhow::Error) -> bool {
    let is_of_bytes = |cause: &(dyn std::error::Error + 'static)| {
        let error = cause.downcast_ref();
        error.is_some_and(|error| {
            matches!(
                error,
                LayerError::Read(_) | LayerError::Malformed { .. } | LayerError::DiffId { .. }
            )
        })
    };
    engine.check_cancelled().is_ok() && error.chain().any(is_of_bytes)
}

impl Engine {
    /// Whether the blob of a layer is kept when it is read: an output has it, it is sent to
    /// another registry, or it was read for its listing and may have to be unpacked.
    fn keeps(&self, origin: &Origin, diff_id: &DiffId, has_contents: bool) -> bool {
        match origin {
            _ if self.keep_blobs => true,
            Origin::Registry(repository) => {
                let is_read_again = !has_contents && self.layers.may_be_unpacked.contains(diff_id);
                is_read_again || self.push.sends_from(repository)
            }
            // It is here already.
            Origin::Layout(_) => false,
        }
    }

    /// Whether the store's blob is sound, asked after something failed with it. Blocking.
    pub(in super::super) fn check_blob(&self, digest: &Digest) -> Result<(), BlobDamaged> {
        match self.store.verify_blob(digest) {
            Ok(false) => Err(BlobDamaged {
                digest: digest.clone(),
            }),
            // It is sound, or what is wrong is in the first failure too.
            Ok(true) | Err(_) => Ok(()),
        }
    }

    /// Unpacks one layer below the store's `tmp/`, and stores its listing.
    fn unpack(&self, compressed: Compressed<'_>, names: &ImageLayer) -> anyhow::Result<Unpacked> {
        let tree = self.store.tmp_dir("tree-")?;
        let limits = Limits::default();
        let applied = layer::apply_and_list(
            compressed,
            &names.descriptor.media_type,
            &names.diff_id,
            &tree,
            &limits,
        );
        let (applied, listing) = match applied {
            Ok(applied) => applied,
            Err(error) => {
                // What is left behind goes with this process's directory in the store.
                if let Err(error) = crate::store::remove_tree(&tree) {
                    tracing::debug!(tree = %tree.display(), %error, "cannot remove an incomplete tree");
                }
                return Err(error.into());
            }
        };
        for device in &applied.skipped_devices {
            self.warn(format!(
                "layer {} has the device {}, which cannot be made without root: RUN steps do not see it, the image keeps it",
                names.diff_id,
                device.path.display()
            ));
        }
        for xattr in &applied.skipped_xattrs {
            self.warn(format!(
                "{:?} in layer {} has the extended attribute {:?}, which the store's file system cannot hold: RUN steps do not see it, the image keeps it",
                xattr.path, names.diff_id, xattr.name
            ));
        }
        if let Some(listing) = listing {
            self.store_listing(&names.diff_id, &listing);
        }
        Ok(Unpacked {
            tree,
            implied: applied.implied_directories,
        })
    }

    /// Lists one layer, and stores the listing.
    fn list(&self, compressed: Compressed<'_>, names: &ImageLayer) -> anyhow::Result<Listing> {
        let media_type = &names.descriptor.media_type;
        let limits = Limits::default();
        let listing = layer::list(compressed, media_type, &names.diff_id, &limits)?;
        self.store_listing(&names.diff_id, &listing);
        Ok(listing)
    }

    /// The store's listing of a layer; one that is damaged is none.
    pub(super) fn stored_listing(&self, diff_id: &DiffId) -> Option<Listing> {
        let path = self.store.listing_path(diff_id);
        let bytes = std::fs::read(&path).ok()?;
        let listing = Listing::from_bytes(&bytes);
        match listing {
            Some(_) => self.store.touch(&path),
            None => {
                tracing::warn!(path = %path.display(), "an unreadable listing is made anew");
            }
        }
        listing
    }

    fn store_listing(&self, diff_id: &DiffId, listing: &Listing) {
        let path = self.store.listing_path(diff_id);
        if let Err(error) = self.store.write_file(&path, &listing.to_bytes()) {
            self.warn(format!(
                "the listing of layer {diff_id} is not kept: {:#}",
                anyhow::Error::new(error)
            ));
        }
    }
}

/// A layer that is unpacked and has no name yet.
pub(super) struct Unpacked {
    pub(super) tree: PathBuf,
    /// Directories that only the layers below say something about.
    pub(super) implied: Vec<PathBuf>,
}

/// A blob of the store was not what its name says. It has been removed.
#[derive(Debug, thiserror::Error)]
#[error(
    "the blob {digest} in the store was damaged and has been removed; run the build again, which fetches or makes it anew"
)]
pub(in super::super) struct BlobDamaged {
    digest: Digest,
}

/// Copies what is read.
struct TeeReader<'f, R, W> {
    inner: R,
    copy: W,
    /// Whether the copy could not be written, which is no fault of what is read.
    has_failed: &'f mut bool,
}

impl<R: Read, W: Write> Read for TeeReader<'_, R, W> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buf)?;
        let copied = self.copy.write_all(&buf[..read]);
        *self.has_failed |= copied.is_err();
        copied?;
        Ok(read)
    }
}

/// How many bytes pass between two progress events.
const PROGRESS_STEP_BYTES: u64 = 1 << 20;

/// Says how far reading is, and ends it when the build is stopped.
struct ProgressReader<'e, R> {
    inner: R,
    engine: &'e Engine,
    task: String,
    done: u64,
    said: u64,
}

impl<'e, R> ProgressReader<'e, R> {
    fn new(inner: R, engine: &'e Engine, task: String) -> Self {
        Self {
            inner,
            engine,
            task,
            done: 0,
            said: 0,
        }
    }
}

impl<R: Read> Read for ProgressReader<'_, R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.engine.check_cancelled().map_err(io::Error::other)?;
        let read = self.inner.read(buf)?;
        self.done += read as u64;
        if self.done - self.said >= PROGRESS_STEP_BYTES {
            self.said = self.done;
            let event = BuildEvent::TaskProgress {
                id: self.task.clone(),
                done_bytes: self.done,
            };
            self.engine.progress.event(event);
        }
        Ok(read)
    }
}
