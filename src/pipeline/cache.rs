//! `--cache-to`: what this build knows goes to where other machines find it.
//!
//! After everything else: the image is out and its tags say so. Blobs first, then the config,
//! then the manifest under its name, so that whoever reads meanwhile finds a whole cache, the
//! old one or the new one. Of two builds that export to one name the later one's stays.

use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use futures_util::future::join_all;
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use thiserror::Error;
use tokio_util::io::SyncIoBridge;

use crate::build::{
    BlobSource, CacheBlob, CacheContents, CacheDocument, Origin, PackedMounts, Timings,
};
use crate::export::{self, LayoutBlob};
use crate::image::{Descriptor, Digest, Reference, Repository};
use crate::progress::{BuildEvent, Progress, millis};
use crate::registry::{BlobContent, Client, PushedBlob, RegistryError};
use crate::sandbox::Cancel;
use crate::store::Store;

/// How many blobs are sent at once to one place.
const PARALLEL_BLOBS: usize = 4;

/// How often an export looks whether the build was stopped.
const POLL: Duration = Duration::from_millis(100);

/// `--cache-to`: where the cache goes, and what of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CacheTarget {
    /// Where.
    pub place: CachePlace,
    /// `mode=max`: the layers of all steps of the build, and not only those that the image has.
    pub max: bool,
    /// `mounts=true`: the contents of cache mounts too.
    pub mounts: bool,
    /// Whether a failure is a warning.
    pub ignore_error: bool,
}

/// Where a cache goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CachePlace {
    /// `type=registry`.
    Registry(Reference),
    /// `type=local`: an OCI image layout.
    Local {
        /// Its directory.
        dir: PathBuf,
        /// The cache's name in it.
        tag: String,
    },
    /// `type=inline`: the image's config.
    Inline,
}

impl fmt::Display for CachePlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Registry(reference) => reference.fmt(f),
            Self::Local { dir, tag } => write!(f, "{}:{tag}", dir.display()),
            Self::Inline => f.write_str("the image"),
        }
    }
}

/// What all exports are made with.
pub(super) struct Exporter<'b> {
    pub(super) client: &'b Client,
    pub(super) store: &'b Arc<Store>,
    /// The repositories that have the image's layers.
    pub(super) pushed: Vec<Repository>,
    pub(super) progress: &'b Arc<dyn Progress>,
    pub(super) timings: &'b Timings,
    pub(super) cancel: &'b Cancel,
}

impl Exporter<'_> {
    /// Exports `contents` to all `targets` but the image itself.
    ///
    /// # Errors
    /// The first failure of a target with `ignore-error=false`; others are warnings.
    pub(super) async fn export_all(
        &self,
        targets: &[CacheTarget],
        contents: &CacheContents,
    ) -> anyhow::Result<()> {
        let targets: Vec<_> = targets
            .iter()
            .filter(|target| target.place != CachePlace::Inline)
            .collect();
        if targets.is_empty() {
            return Ok(());
        }
        let started = Instant::now();
        let packed = if targets.iter().any(|target| target.mounts) {
            self.pack_mounts(contents).await
        } else {
            Ok(PackedMounts::default())
        };
        let packed = packed.unwrap_or_else(|error| {
            self.warn(format!("cache mounts are not exported: {error:#}"));
            PackedMounts::default()
        });
        let nothing = PackedMounts::default();
        let exports = targets.iter().map(|target| {
            let mounts = if target.mounts { &packed } else { &nothing };
            self.export(target, contents, mounts)
        });
        let results = tokio::select! {
            results = join_all(exports) => results,
            () = stopped(self.cancel) => {
                self.warn("the cache is not exported: stopped".to_owned());
                return Ok(());
            }
        };
        let mut failure = None;
        for (target, result) in targets.iter().zip(results) {
            let Err(error) = result else { continue };
            let error = error.context(format!("exporting the cache to {}", target.place));
            if target.ignore_error {
                self.warn(format!("{error:#}"));
            } else {
                failure.get_or_insert(error);
            }
        }
        self.timings.add("cache export", started.elapsed());
        failure.map_or(Ok(()), Err)
    }

    fn warn(&self, message: String) {
        self.progress.event(BuildEvent::Warning { message });
    }

    async fn pack_mounts(&self, contents: &CacheContents) -> anyhow::Result<PackedMounts> {
        let imported = contents.imported().await;
        let (contents, store) = (contents.clone(), Arc::clone(self.store));
        let cancel = self.cancel.clone();
        let packing = move || contents.pack_mounts(&imported, &store, &|| cancel.is_cancelled());
        let task = tokio::task::spawn_blocking(packing);
        task.await.context("a task ended abnormally")?
    }

    async fn export(
        &self,
        target: &CacheTarget,
        contents: &CacheContents,
        mounts: &PackedMounts,
    ) -> anyhow::Result<()> {
        let started = Instant::now();
        let id = format!("cache {}", target.place);
        self.progress.event(BuildEvent::TaskStarted {
            id: id.clone(),
            name: format!("exporting the cache to {}", target.place),
            total_bytes: None,
        });
        let result = self.send(target, contents, mounts).await;
        let outcome = match &result {
            Ok(Sent { blobs, bytes }) => format!("{blobs} blobs, {bytes} bytes of them sent"),
            Err(_) => "failed".to_owned(),
        };
        self.progress.event(BuildEvent::TaskDone {
            id,
            outcome,
            duration_ms: millis(started.elapsed()),
        });
        result.map(drop)
    }

    async fn send(
        &self,
        target: &CacheTarget,
        contents: &CacheContents,
        mounts: &PackedMounts,
    ) -> anyhow::Result<Sent> {
        let nothing = PackedMounts::default();
        let mut mounts = mounts;
        let mut lost = BTreeSet::new();
        loop {
            let mut document = contents.document(self.store, target.max, mounts, &lost);
            if document.is_none() && target.mounts {
                self.warn(format!(
                    "cache mounts are not exported to {}: with their chunks the manifest would be larger than registries take",
                    target.place
                ));
                document = contents.document(self.store, target.max, &nothing, &lost);
            }
            let document = document.context("there are too many layers for one manifest")?;
            for note in &document.notes {
                self.warn(format!("cache for {}: {note}", target.place));
            }
            let sent = match &target.place {
                CachePlace::Registry(reference) => self.push(reference, &document).await,
                CachePlace::Local { dir, tag } => self.write(dir, tag, document).await,
                CachePlace::Inline => Ok(Sent::default()),
            };
            let error = match sent {
                Ok(sent) => return Ok(sent),
                Err(error) => error,
            };
            // Each time with less, so this ends.
            let Some(LostBlob { digest, .. }) = error.downcast_ref() else {
                return Err(error);
            };
            let what = if mounts.has(digest) {
                mounts = &nothing;
                "cache mounts are"
            } else if lost.insert(digest.clone()) {
                "its step is"
            } else {
                return Err(error);
            };
            let place = &target.place;
            self.warn(format!("cache for {place}: {what} left out: {error:#}"));
        }
    }

    async fn push(&self, to: &Reference, document: &CacheDocument) -> anyhow::Result<Sent> {
        let repository = to.repository();
        let pushing = document
            .blobs
            .iter()
            .map(|blob| self.push_blob(repository, blob));
        let pushed: Vec<u64> = stream::iter(pushing)
            .buffer_unordered(PARALLEL_BLOBS)
            .try_collect()
            .await?;
        let mut sent = Sent {
            blobs: document.blobs.len(),
            bytes: pushed.into_iter().sum(),
        };
        let config = &document.config_descriptor;
        let content = BlobContent::Bytes(document.config.clone());
        let pushed = self
            .client
            .push_blob(repository, config, None, content, |_| {});
        sent.bytes += sent_of(pushed.await?, config);
        self.client.push_manifest(to, &document.manifest).await?;
        Ok(sent)
    }

    /// Returns the bytes sent.
    async fn push_blob(&self, to: &Repository, blob: &CacheBlob) -> anyhow::Result<u64> {
        let descriptor = &blob.descriptor;
        let content = match &blob.source {
            BlobSource::Store => BlobContent::File(self.store.blob_path(&descriptor.digest)),
            BlobSource::File(path) => BlobContent::File(path.clone()),
            BlobSource::Origin(Origin::Registry(from)) => BlobContent::Remote(from.clone()),
            BlobSource::Origin(Origin::Layout(layout)) => {
                BlobContent::File(layout.blob_path(&descriptor.digest))
            }
        };
        let has_layer = |from: &&Repository| from.registry() == to.registry();
        let mut mount_from = None;
        if blob.is_of_result {
            mount_from = self.pushed.iter().find(has_layer);
        }
        let pushing = self
            .client
            .push_blob(to, descriptor, mount_from, content, |_| {});
        match pushing.await {
            Ok(pushed) => Ok(sent_of(pushed, descriptor)),
            Err(error @ RegistryError::Content { .. })
                if matches!(blob.source, BlobSource::Origin(_)) =>
            {
                Err(LostBlob::error(descriptor, error))
            }
            Err(error) => {
                Err(anyhow::Error::new(error).context(format!("pushing {}", descriptor.digest)))
            }
        }
    }

    async fn write(&self, dir: &Path, tag: &str, document: CacheDocument) -> anyhow::Result<Sent> {
        let spool = self.store.tmp_dir("cache-")?;
        let mut sources = HashMap::new();
        for blob in &document.blobs {
            let digest = &blob.descriptor.digest;
            let source = match &blob.source {
                BlobSource::Store => LayoutBlob::Store,
                BlobSource::File(path) => LayoutBlob::File(path.clone()),
                BlobSource::Origin(Origin::Layout(layout)) => {
                    LayoutBlob::File(layout.blob_path(digest))
                }
                // What the layout has is not fetched.
                BlobSource::Origin(_) if export::has_blob(dir, &blob.descriptor) => {
                    LayoutBlob::Store
                }
                BlobSource::Origin(Origin::Registry(from)) => {
                    let path = spool.join(digest.hex());
                    self.fetch(from, &blob.descriptor, &path).await?;
                    LayoutBlob::File(path)
                }
            };
            sources.insert(digest.clone(), source);
        }
        let (dir, tag, store) = (dir.to_owned(), tag.to_owned(), Arc::clone(self.store));
        let cancel = self.cancel.clone();
        let task = tokio::task::spawn_blocking(move || {
            let mut blobs: Vec<(Descriptor, LayoutBlob)> = Vec::new();
            for blob in document.blobs {
                let source = sources.remove(&blob.descriptor.digest);
                blobs.push((blob.descriptor, source.unwrap_or(LayoutBlob::Store)));
            }
            let config = LayoutBlob::Bytes(document.config);
            blobs.push((document.config_descriptor, config));
            let is_cancelled = || cancel.is_cancelled();
            export::layout_document(
                &document.manifest,
                &tag,
                &blobs,
                &store,
                &dir,
                &is_cancelled,
            )
        });
        let (blobs, bytes) = task.await.context("a task ended abnormally")??;
        Ok(Sent { blobs, bytes })
    }

    /// Downloads a blob into the file `path`.
    async fn fetch(
        &self,
        from: &Repository,
        descriptor: &Descriptor,
        path: &Path,
    ) -> anyhow::Result<()> {
        let stream = self.client.open_blob(from, descriptor).await;
        let stream = stream.map_err(|error| LostBlob::error(descriptor, error))?;
        let (mut reader, path) = (SyncIoBridge::new(stream), path.to_owned());
        let task = tokio::task::spawn_blocking(move || -> anyhow::Result<()> {
            let mut file = std::fs::File::create(&path)
                .with_context(|| format!("creating {}", path.display()))?;
            std::io::copy(&mut reader, &mut file)?;
            Ok(())
        });
        let fetched = task.await.context("a task ended abnormally")?;
        fetched.map_err(|error| {
            let is_of_registry = error
                .downcast_ref::<io::Error>()
                .and_then(io::Error::get_ref)
                .is_some_and(|inner| inner.is::<RegistryError>());
            if is_of_registry {
                LostBlob::error(descriptor, error)
            } else {
                error.context(format!("pulling {from}"))
            }
        })
    }
}

/// A blob of an imported cache cannot be had any more.
#[derive(Debug, Error)]
#[error("{digest} cannot be had")]
struct LostBlob {
    digest: Digest,
    source: anyhow::Error,
}

impl LostBlob {
    fn error(descriptor: &Descriptor, source: impl Into<anyhow::Error>) -> anyhow::Error {
        anyhow::Error::new(Self {
            digest: descriptor.digest.clone(),
            source: source.into(),
        })
    }
}

/// Ends when the build is stopped.
async fn stopped(cancel: &Cancel) {
    while !cancel.is_cancelled() {
        tokio::time::sleep(POLL).await;
    }
}

/// What an export took.
#[derive(Default)]
struct Sent {
    blobs: usize,
    bytes: u64,
}

fn sent_of(pushed: PushedBlob, descriptor: &Descriptor) -> u64 {
    match pushed {
        PushedBlob::Uploaded => descriptor.size,
        PushedBlob::AlreadyThere | PushedBlob::Mounted => 0,
    }
}
