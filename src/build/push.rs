//! Layers go up while later steps still run.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Instant;

use anyhow::Context as _;
use tokio::sync::OnceCell;
use tokio::task::JoinSet;

use super::layer::{Filesystem, Layer};
use super::{Engine, PushDenied, unshare};
use crate::image::{Reference, Repository};
use crate::progress::{BuildEvent, millis};
use crate::registry::{BlobContent, PushedBlob};

/// How many blobs are sent at once; registries limit connections, and one stream
/// fills most networks.
const PARALLEL_PUSHES: usize = 4;

/// Sends the layers of the result to where the image is wanted.
pub(super) struct Pusher {
    repositories: BTreeSet<Repository>,
    /// The numbers of the steps whose layers the result has.
    wanted: BTreeSet<usize>,
    allowed: OnceCell<()>,
    sending: tokio::sync::Semaphore,
    /// Uploads; each gives the bytes it sent and where to.
    tasks: std::sync::Mutex<JoinSet<anyhow::Result<(Repository, u64)>>>,
}

impl Pusher {
    /// Sends to the repositories of `tags` what the steps `wanted` make.
    pub(super) fn new(tags: &[Reference], wanted: BTreeSet<usize>) -> Self {
        Self {
            repositories: tags.iter().map(|tag| tag.repository().clone()).collect(),
            wanted,
            allowed: OnceCell::new(),
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
            let upload = async move {
                let sent = push(&engine, &layer, &repository).await?;
                Ok((repository, sent))
            };
            self.tasks
                .lock()
                .expect("nothing panics while it holds this lock")
                .spawn(upload);
        }
    }

    /// Sends what is left of `filesystem`, waits for all, and returns the bytes sent to
    /// each repository.
    pub(super) async fn finish(
        &self,
        engine: &Arc<Engine>,
        filesystem: &Filesystem,
    ) -> anyhow::Result<BTreeMap<Repository, u64>> {
        let started = Instant::now();
        for layer in &filesystem.layers {
            self.send(engine, layer);
        }
        let mut sent = BTreeMap::new();
        let mut tasks = self.take_tasks();
        while let Some(joined) = tasks.join_next().await {
            match joined.context("a task ended abnormally").flatten() {
                Ok((repository, bytes)) => *sent.entry(repository).or_default() += bytes,
                Err(error) => {
                    tasks.shutdown().await;
                    return Err(error);
                }
            }
        }
        engine.timings.add("push", started.elapsed());
        Ok(sent)
    }

    /// Stops whatever is still being sent, because the build has failed.
    pub(super) async fn abandon(&self) {
        self.take_tasks().shutdown().await;
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
    let names = layer.names().await.map_err(|error| unshare(&error))?;
    let mut descriptor = names.descriptor;
    if let Some(media_type) = descriptor.media_type.oci_layer() {
        descriptor.media_type = media_type;
    }
    let _permit = engine
        .push
        .sending
        .acquire()
        .await
        .expect("the semaphore is never closed");
    let is_file = engine.store.has_blob_of(&descriptor);
    let content = if is_file {
        BlobContent::File(engine.store.blob_path(&descriptor.digest))
    } else if let Some(origin) = layer.origin() {
        BlobContent::Remote(origin.clone())
    } else if let Some(layout) = layer.layout() {
        let (layout, descriptor) = (layout.clone(), descriptor.clone());
        let file = engine.blocking(move || Ok(layout.blob_file(&descriptor)?));
        BlobContent::File(file.await?)
    } else {
        anyhow::bail!("the blob {} is no longer in the store", descriptor.digest);
    };
    let id = format!("push {} {repository}", descriptor.digest.short());
    engine.progress.event(BuildEvent::TaskStarted {
        id: id.clone(),
        name: format!("pushing {repository} {}", descriptor.digest.short()),
        total_bytes: Some(descriptor.size),
    });
    let started = Instant::now();
    let progress = {
        let (engine, id) = (Arc::clone(engine), id.clone());
        move |done_bytes| {
            engine.progress.event(BuildEvent::TaskProgress {
                id: id.clone(),
                done_bytes,
            })
        }
    };
    let pushed = engine
        .client
        .push_blob(repository, &descriptor, layer.origin(), content, progress)
        .await;
    if pushed.is_err() && is_file {
        // The registry refuses bytes that are not what the digest says, but cannot know
        // whose fault that is.
        let (shared, digest) = (Arc::clone(engine), descriptor.digest.clone());
        engine
            .blocking(move || shared.check_blob(&digest).map_err(Into::into))
            .await?;
    }
    let pushed =
        pushed.with_context(|| format!("pushing layer {} to {repository}", descriptor.digest))?;
    let (outcome, sent) = match pushed {
        PushedBlob::AlreadyThere => ("already there", 0),
        PushedBlob::Mounted => ("mounted", 0),
        PushedBlob::Uploaded => ("", descriptor.size),
    };
    engine.progress.event(BuildEvent::TaskDone {
        id,
        outcome: outcome.to_owned(),
        duration_ms: millis(started.elapsed()),
    });
    Ok(sent)
}
