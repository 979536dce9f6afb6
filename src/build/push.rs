//! Layers go up while later steps still run.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use anyhow::Context as _;
use tokio::sync::{Mutex, OnceCell, mpsc};
use tokio::task::JoinSet;

use super::cache::LostLayer;
use super::layer::{Filesystem, Layer, SharedError};
use super::{Engine, PushDenied, unshare};
use crate::image::{Descriptor, Digest, ImageLayer, Reference, Repository};
use crate::layer::{self, LayerCompression, Pool};
use crate::progress::{BuildEvent, millis};
use crate::registry::{BlobContent, PushedBlob, RegistryError};
use crate::store::GrowingBlob;

/// How many blobs are sent at once; registries limit connections, and one stream
/// fills most networks.
const PARALLEL_PUSHES: usize = 4;

/// From this size on, in bytes, a layer goes up while it is still being sealed. A smaller one
/// is soon complete, and then the registry may turn out to have it.
const EARLY_BYTES: u64 = 8 << 20;

/// What came of uploads.
#[derive(Debug, Default)]
pub(super) struct Sent {
    /// The bytes sent to each repository.
    pub(super) bytes: BTreeMap<Repository, u64>,
    /// Why something was not sent.
    pub(super) failure: Option<anyhow::Error>,
}

impl From<anyhow::Error> for Sent {
    fn from(error: anyhow::Error) -> Self {
        Self {
            failure: Some(error),
            ..Self::default()
        }
    }
}

/// Sends the layers of the result to where the image is wanted.
pub(super) struct Pusher {
    repositories: BTreeSet<Repository>,
    /// The numbers of the steps whose layers the result has.
    wanted: BTreeSet<usize>,
    allowed: OnceCell<()>,
    /// What was begun: steps of several platforms may make the same layer.
    begun: std::sync::Mutex<BTreeSet<(Digest, Repository)>>,
    sending: tokio::sync::Semaphore,
    force_compression: bool,
    /// The number of uploads that began before their layer was complete.
    early: AtomicU64,
    /// Why uploads failed, as soon as they do.
    failed: mpsc::UnboundedSender<SharedError>,
    failures: Mutex<mpsc::UnboundedReceiver<SharedError>>,
    /// Uploads; each gives the bytes it sent and where to.
    tasks: std::sync::Mutex<JoinSet<anyhow::Result<(Repository, u64)>>>,
}

impl Pusher {
    /// Sends to the repositories of `tags` what the steps `wanted` make.
    pub(super) fn new(
        tags: &[Reference],
        wanted: BTreeSet<usize>,
        force_compression: bool,
    ) -> Self {
        let (failed, failures) = mpsc::unbounded_channel();
        Self {
            force_compression,
            early: AtomicU64::new(0),
            failed,
            failures: Mutex::new(failures),
            repositories: tags.iter().map(|tag| tag.repository().clone()).collect(),
            wanted,
            allowed: OnceCell::new(),
            begun: std::sync::Mutex::default(),
            sending: tokio::sync::Semaphore::new(PARALLEL_PUSHES),
            tasks: std::sync::Mutex::default(),
        }
    }

    /// Whether blobs of `origin` are sent, because the image goes to another registry.
    pub(super) fn sends_from(&self, origin: &Repository) -> bool {
        let mut registries = self.repositories.iter().map(Repository::registry);
        registries.any(|registry| registry != origin.registry())
    }

    /// Asks, once, whether pushing will be allowed. Called before the first step that is
    /// not cached, so that minutes of work are not lost to a wrong password, and not
    /// called where nothing will be pushed.
    pub(super) async fn check(&self, engine: &Engine) -> anyhow::Result<()> {
        let check = || async {
            for repository in &self.repositories {
                let allowed = engine.client.check_push(repository).await;
                allowed.map_err(|source| PushDenied {
                    repository: repository.clone(),
                    source,
                })?;
            }
            anyhow::Ok(())
        };
        self.allowed.get_or_try_init(check).await.map(|_| ())
    }

    /// Starts sending the layers of `filesystem`, the one that step `number` starts from
    /// or has made. Layers of base images wait: a later step may download them.
    pub(super) fn start(&self, engine: &Arc<Engine>, number: usize, filesystem: &Filesystem) {
        if !self.wanted.contains(&number) {
            return;
        }
        for layer in &filesystem.layers {
            if layer.origin().is_none() || layer.is_unpacked() {
                self.send(engine, layer);
            }
        }
    }

    fn send(&self, engine: &Arc<Engine>, layer: &Arc<Layer>) {
        if !layer.start_push() {
            return;
        }
        for repository in &self.repositories {
            let (engine, layer, repository) =
                (Arc::clone(engine), Arc::clone(layer), repository.clone());
            let failed = self.failed.clone();
            let upload = async move {
                match push(&engine, &layer, &repository).await {
                    Ok(sent) => Ok((repository, sent)),
                    Err(error) => {
                        let error = Arc::new(error);
                        // Where nobody listens any more, the error comes when all is waited for.
                        let _ = failed.send(Arc::clone(&error));
                        Err(unshare(&error))
                    }
                }
            };
            self.tasks
                .lock()
                .expect("nothing panics while it holds this lock")
                .spawn(upload);
        }
    }

    /// Sends what is left of `filesystem`, and waits for all.
    pub(super) async fn finish(&self, engine: &Arc<Engine>, filesystem: &Filesystem) -> Sent {
        let started = Instant::now();
        for layer in &filesystem.layers {
            self.send(engine, layer);
        }
        let sent = self.settle().await;
        engine.timings.add("push", started.elapsed());
        sent
    }

    /// Waits for what is being sent. A lost layer does not stop the others, any other failure
    /// does.
    pub(super) async fn settle(&self) -> Sent {
        let mut sent = Sent::default();
        let mut tasks = self.take_tasks();
        while let Some(joined) = tasks.join_next().await {
            match joined.context("a task ended abnormally").flatten() {
                Ok((repository, bytes)) => *sent.bytes.entry(repository).or_default() += bytes,
                Err(error) if LostLayer::of(&error).is_some() => {
                    sent.failure.get_or_insert(error);
                }
                Err(error) => {
                    tasks.shutdown().await;
                    sent.failure = Some(error);
                    break;
                }
            }
        }
        sent
    }

    /// Waits until an upload fails, and says why.
    pub(super) async fn failure(&self) -> SharedError {
        match self.failures.lock().await.recv().await {
            Some(error) => error,
            // Never: the sender is kept.
            None => std::future::pending().await,
        }
    }

    /// Stops whatever is still being sent, because the build has failed, and tells the
    /// registries.
    pub(super) async fn abandon(&self, engine: &Engine) {
        self.take_tasks().shutdown().await;
        engine.client.cancel_dropped_uploads().await;
    }

    /// Whether nobody sends this blob there yet.
    fn begins(&self, digest: &Digest, repository: &Repository) -> bool {
        self.begun
            .lock()
            .expect("nothing panics while it holds this lock")
            .insert((digest.clone(), repository.clone()))
    }

    fn take_tasks(&self) -> JoinSet<anyhow::Result<(Repository, u64)>> {
        std::mem::take(
            &mut *self
                .tasks
                .lock()
                .expect("nothing panics while it holds this lock"),
        )
    }
}

/// Sends one layer and returns the bytes sent.
async fn push(engine: &Arc<Engine>, layer: &Layer, repository: &Repository) -> anyhow::Result<u64> {
    if let Some(growing) = layer.growing().await
        && let Ok(growth) = growing.reaches(EARLY_BYTES).await
        && growth.digest.is_none()
        && let Some(sent) = push_early(engine, layer, &growing, repository).await?
    {
        return Ok(sent);
    }
    let names = layer.names().await.map_err(|error| unshare(&error))?;
    let descriptor = engine.push.descriptor(engine, layer, &names).await?;
    if !engine.push.begins(&descriptor.digest, repository) {
        return Ok(0);
    }
    let is_converted = descriptor.digest != names.descriptor.digest;
    // Elsewhere there is only what it was made of.
    let origin = layer.origin().filter(|_| !is_converted);
    let _permit = engine.push.permit().await;
    let is_file = engine.store.has_blob_of(&descriptor);
    let content = if is_file {
        BlobContent::File(engine.store.blob_path(&descriptor.digest))
    } else if let Some(origin) = origin {
        BlobContent::Remote(origin.clone())
    } else if let Some(layout) = layer.layout() {
        let (layout, descriptor) = (layout.clone(), descriptor.clone());
        let file = engine.blocking(move || Ok(layout.blob_file(&descriptor)?));
        BlobContent::File(file.await?)
    } else {
        return Err(layer.missing(&descriptor.digest));
    };
    let task = Task::start(engine, repository, &descriptor);
    let pushed = engine
        .client
        .push_blob(repository, &descriptor, origin, content, task.progress())
        .await;
    if pushed.is_err() && is_file {
        // The registry refuses bytes that are not what the digest says, but cannot know
        // whose fault that is.
        let (shared, digest) = (Arc::clone(engine), descriptor.digest.clone());
        engine
            .blocking(move || shared.check_blob(&digest).map_err(Into::into))
            .await?;
    }
    let pushed = match pushed {
        // Not what it is sent to has failed.
        Err(error @ RegistryError::Content { .. }) if !is_file => {
            Err(layer.lost(&descriptor.digest, error.into()))
        }
        pushed => pushed.map_err(Into::into),
    };
    let pushed =
        pushed.with_context(|| format!("pushing layer {} to {repository}", descriptor.digest))?;
    Ok(task.done(pushed, descriptor.size))
}

/// Sends a layer that is still being sealed and returns the bytes sent; none where the
/// registry wants to know the length first.
async fn push_early(
    engine: &Arc<Engine>,
    layer: &Layer,
    growing: &GrowingBlob,
    repository: &Repository,
) -> anyhow::Result<Option<u64>> {
    let _permit = engine.push.permit().await;
    let task = Task::start_early(engine, repository);
    let client = &engine.client;
    let pushed = client.push_growing(repository, growing, task.progress());
    let pushed = match pushed.await {
        Err(error @ RegistryError::Content { .. }) => {
            // Where sealing failed, that is what is wrong.
            layer.names().await.map_err(|error| unshare(&error))?;
            Err(error)
        }
        pushed => pushed,
    };
    let pushed = pushed.with_context(|| format!("pushing a new layer to {repository}"))?;
    let Some(pushed) = pushed else {
        task.end("when it is complete");
        return Ok(None);
    };
    let names = layer.names().await.map_err(|error| unshare(&error))?;
    Ok(Some(task.done(pushed, names.descriptor.size)))
}

impl Pusher {
    async fn permit(&self) -> tokio::sync::SemaphorePermit<'_> {
        let permit = self.sending.acquire().await;
        permit.expect("the semaphore is never closed")
    }

    /// The layer as the registry gets it: under OCI's types, and converted where that is wanted.
    async fn descriptor(
        &self,
        engine: &Arc<Engine>,
        layer: &Layer,
        names: &ImageLayer,
    ) -> anyhow::Result<Descriptor> {
        let wanted = LayerCompression {
            compression: engine.compression,
            force: self.force_compression,
        };
        let made = layer.is_new().then_some(engine.compression);
        let mut descriptor = names.descriptor.clone();
        if wanted.converts(made, &descriptor.media_type) {
            // Once, wherever it goes.
            let convert = || engine.convert(layer, names, wanted);
            return layer.converted.get_or_try_init(convert).await.cloned();
        }
        if let Some(media_type) = descriptor.media_type.oci_layer() {
            descriptor.media_type = media_type;
        }
        Ok(descriptor)
    }
}

impl Engine {
    /// The layer compressed as `wanted`; its blob is fetched where it has to be.
    async fn convert(
        self: &Arc<Self>,
        layer: &Layer,
        names: &ImageLayer,
        wanted: LayerCompression,
    ) -> anyhow::Result<Descriptor> {
        if let Some(known) = layer::converted(&names.diff_id, wanted.compression, &self.store) {
            return Ok(known);
        }
        // As many as are unpacked, which costs as much.
        let _permit = self.unpacking.acquire().await;
        let digest = &names.descriptor.digest;
        layer.fetch(self, names).await?;
        let (shared, names) = (Arc::clone(self), names.clone());
        let what = format!("compressing layer {digest} anew");
        let converting = self.blocking(move || {
            let pool = Pool::shared().context("starting the threads that compress")?;
            let is_stopped = || shared.cancel.is_cancelled();
            Ok(layer::convert(
                &names.descriptor,
                &names.diff_id,
                wanted.compression,
                &pool,
                &is_stopped,
                &shared.store,
            )?)
        });
        converting.await.context(what)
    }
}

/// An upload as progress shows it.
struct Task {
    engine: Arc<Engine>,
    id: String,
    started: Instant,
}

impl Task {
    fn start(engine: &Arc<Engine>, repository: &Repository, descriptor: &Descriptor) -> Self {
        let short = descriptor.digest.short();
        let id = format!("push {short} {repository}");
        let name = format!("pushing {repository} {short}");
        Self::of(engine, id, name, Some(descriptor.size))
    }

    /// A layer has no name yet, so it gets a number.
    fn start_early(engine: &Arc<Engine>, repository: &Repository) -> Self {
        let number = engine.push.early.fetch_add(1, Ordering::Relaxed) + 1;
        let id = format!("push new {number} {repository}");
        let name = format!("pushing {repository} new layer {number}");
        Self::of(engine, id, name, None)
    }

    fn of(engine: &Arc<Engine>, id: String, name: String, total_bytes: Option<u64>) -> Self {
        engine.progress.event(BuildEvent::TaskStarted {
            id: id.clone(),
            name,
            total_bytes,
        });
        Self {
            engine: Arc::clone(engine),
            id,
            started: Instant::now(),
        }
    }

    fn progress(&self) -> impl Fn(u64) + Send + Sync + use<> {
        let (engine, id) = (Arc::clone(&self.engine), self.id.clone());
        move |done_bytes| {
            engine.progress.event(BuildEvent::TaskProgress {
                id: id.clone(),
                done_bytes,
            })
        }
    }

    /// Says how it went, and returns how many of `size` bytes were sent.
    fn done(self, pushed: PushedBlob, size: u64) -> u64 {
        let (outcome, sent) = match pushed {
            PushedBlob::AlreadyThere => ("already there", 0),
            PushedBlob::Mounted => ("mounted", 0),
            PushedBlob::Uploaded => ("", size),
        };
        self.end(outcome);
        sent
    }

    fn end(self, outcome: &str) {
        self.engine.progress.event(BuildEvent::TaskDone {
            id: self.id,
            outcome: outcome.to_owned(),
            duration_ms: millis(self.started.elapsed()),
        });
    }
}
