//! [`Layer`]: one layer in the forms in which it exists, each made only when needed.
//!
//! ```text
//! remote   a descriptor at a registry that has it
//! blob     compressed bytes in the store, named by digest
//! tree     unpacked directory in the store, ready to be an overlay lower directory
//! ```

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context as _;
use futures_util::FutureExt as _;
use futures_util::future::{BoxFuture, Shared};
use tokio::sync::OnceCell;
use tokio_util::io::SyncIoBridge;

use super::Engine;
use crate::image::{DiffId, Digest, ImageLayer, Repository, chain_id};
use crate::layer::{self, SealedLayer};
use crate::progress::{BuildEvent, millis};
use crate::rootfs::{self, Stack, Tree};

/// An error that several waiting steps see.
pub(super) type SharedError = Arc<anyhow::Error>;

/// The names of a layer, known once it is sealed.
type Sealing = Shared<BoxFuture<'static, Result<ImageLayer, SharedError>>>;

/// One layer of a filesystem.
pub(super) struct Layer {
    sealing: Sealing,
    tree: OnceCell<Arc<Tree>>,
    /// Where the blob can be fetched.
    origin: Option<Repository>,
    push_started: AtomicBool,
    /// When the step that made it ran; RFC 3339. Absent for layers of a base image.
    pub(super) created: Option<String>,
}

/// The layers of a filesystem, base first.
#[derive(Clone, Default)]
pub(super) struct Filesystem {
    pub(super) layers: Vec<Arc<Layer>>,
}

impl Layer {
    /// A layer of an image at a registry.
    pub(super) fn remote(names: ImageLayer, origin: Repository) -> Self {
        Self {
            origin: Some(origin),
            created: None,
            ..Self::sealed(names, None)
        }
    }

    /// A layer whose blob is in the store.
    pub(super) fn sealed(names: ImageLayer, created: Option<String>) -> Self {
        let sealing = futures_util::future::ready(Ok(names)).boxed().shared();
        Self {
            sealing,
            tree: OnceCell::new(),
            origin: None,
            push_started: AtomicBool::new(false),
            created,
        }
    }

    /// A layer that is just being sealed; `tree` where it is unpacked already.
    pub(super) fn sealing(
        task: tokio::task::JoinHandle<anyhow::Result<SealedLayer>>,
        tree: Option<Arc<Tree>>,
        created: String,
    ) -> Self {
        let sealing = async move {
            let sealed = task
                .await
                .context("sealing a layer")
                .and_then(|result| result);
            let sealed = sealed.map_err(Arc::new)?;
            Ok(ImageLayer {
                diff_id: sealed.diff_id,
                descriptor: sealed.descriptor,
            })
        };
        let tree = OnceCell::new_with(tree);
        Self {
            sealing: sealing.boxed().shared(),
            tree,
            origin: None,
            push_started: AtomicBool::new(false),
            created: Some(created),
        }
    }

    /// The layer's names; waits until it is sealed.
    pub(super) async fn names(&self) -> Result<ImageLayer, SharedError> {
        self.sealing.clone().await
    }

    /// Where the blob can be fetched, for layers of base images.
    pub(super) fn origin(&self) -> Option<&Repository> {
        self.origin.as_ref()
    }

    /// Whether there is a tree.
    pub(super) fn is_unpacked(&self) -> bool {
        self.tree.initialized()
    }

    /// Says that pushing begins; false where it had begun before.
    pub(super) fn start_push(&self) -> bool {
        !self.push_started.swap(true, Ordering::Relaxed)
    }

    /// The layer as a tree, unpacked now if it is not yet. It lies on top of `below`, always
    /// of the same layers.
    pub(super) fn tree<'a>(
        &'a self,
        engine: &'a Arc<Engine>,
        below: &'a [Arc<Layer>],
    ) -> BoxFuture<'a, Result<Arc<Tree>, SharedError>> {
        let tree = self.tree.get_or_try_init(|| self.unpack(engine, below));
        tree.map(|tree| tree.cloned().map_err(Arc::new)).boxed()
    }

    async fn unpack(
        &self,
        engine: &Arc<Engine>,
        below: &[Arc<Layer>],
    ) -> anyhow::Result<Arc<Tree>> {
        let names = self.names().await.map_err(|error| super::unshare(&error))?;
        let chain = chain_of(below, &names.diff_id).await?;
        let known = [
            engine.store.tree_path(&names.diff_id),
            engine.store.chained_tree_path(&chain),
        ];
        if let Some(path) = known.iter().find(|path| path.is_dir()) {
            return open_tree(path);
        }
        let unpacked = self.fetch(engine, &names).await?;
        let store = Arc::clone(&engine.store);
        if unpacked.implied.is_empty() {
            return open_tree(&store.adopt_tree(&unpacked.tree, &names.diff_id)?);
        }
        let stack = stack(engine, below)
            .await
            .map_err(|error| super::unshare(&error))?;
        let finish = move || {
            let Unpacked { tree, implied } = unpacked;
            rootfs::inherit_metadata(&tree, &implied, &stack)?;
            open_tree(&store.adopt_chained_tree(&tree, &chain)?)
        };
        let finished = engine.blocking(finish).await;
        finished.with_context(|| format!("unpacking layer {}", names.descriptor.digest))
    }

    /// Gets the layer's bytes and unpacks them, below the store's `tmp/`.
    async fn fetch(&self, engine: &Arc<Engine>, names: &ImageLayer) -> anyhow::Result<Unpacked> {
        engine.check_world()?;
        let _permit = engine
            .unpacking
            .acquire()
            .await
            .expect("the semaphore is never closed");
        engine.check_cancelled()?;
        let digest = names.descriptor.digest.clone();
        let started = std::time::Instant::now();
        let result = if engine.store.has_blob_of(&names.descriptor) {
            self.unpack_blob(engine, names).await
        } else {
            self.unpack_remote(engine, names).await
        };
        engine.timings.add("pull", started.elapsed());
        result.with_context(|| format!("unpacking layer {digest}"))
    }

    async fn unpack_blob(
        &self,
        engine: &Arc<Engine>,
        names: &ImageLayer,
    ) -> anyhow::Result<Unpacked> {
        let blob = engine.store.open_blob(&names.descriptor.digest)?;
        let (shared, of) = (Arc::clone(engine), names.clone());
        let unpack = move || {
            let error = match shared.apply(blob, &of) {
                Err(error) => error,
                unpacked => return unpacked.map(Ok),
            };
            // What is damaged may show long before the digest does.
            match shared.check_blob(&of.descriptor.digest) {
                Ok(()) => Err(error),
                Err(damaged) => Ok(Err(damaged)),
            }
        };
        match engine.blocking(unpack).await? {
            Ok(unpacked) => Ok(unpacked),
            Err(_) if self.origin.is_some() => {
                engine.warn(format!(
                    "the blob {} in the store was damaged; it is pulled again",
                    names.descriptor.digest
                ));
                self.unpack_remote(engine, names).await
            }
            Err(damaged) => Err(damaged.into()),
        }
    }

    /// From the network into the tree in one pass, and into the store too where the
    /// bytes are needed again.
    async fn unpack_remote(
        &self,
        engine: &Arc<Engine>,
        names: &ImageLayer,
    ) -> anyhow::Result<Unpacked> {
        let Some(origin) = &self.origin else {
            anyhow::bail!(
                "the blob {} is no longer in the store",
                names.descriptor.digest
            );
        };
        let task = format!("pull {} {origin}", names.descriptor.digest.short());
        engine.progress.event(BuildEvent::TaskStarted {
            id: task.clone(),
            name: format!("pulling {origin} {}", names.descriptor.digest.short()),
            total_bytes: Some(names.descriptor.size),
        });
        let started = std::time::Instant::now();
        let stream = engine.client.open_blob(origin, &names.descriptor).await?;
        let reader = SyncIoBridge::new(stream);
        let (shared, names, label) = (Arc::clone(engine), names.clone(), task.clone());
        let tree = engine.blocking(move || {
            let (engine, task) = (shared, label);
            let reader = ProgressReader::new(reader, &engine, task);
            if engine.keep_blobs {
                let mut blob = engine.store.write_blob()?;
                let tree = engine.apply(
                    TeeReader {
                        inner: reader,
                        copy: &mut blob,
                    },
                    &names,
                )?;
                blob.commit(Some(&names.descriptor.digest))?;
                Ok(tree)
            } else {
                engine.apply(reader, &names)
            }
        });
        let tree = tree.await?;
        engine.progress.event(BuildEvent::TaskDone {
            id: task,
            outcome: String::new(),
            duration_ms: millis(started.elapsed()),
        });
        Ok(tree)
    }
}

impl Engine {
    /// Whether the store's blob is sound, asked after something failed with it. Blocking.
    pub(super) fn check_blob(&self, digest: &Digest) -> Result<(), BlobDamaged> {
        match self.store.verify_blob(digest) {
            Ok(false) => Err(BlobDamaged {
                digest: digest.clone(),
            }),
            // It is sound, or what is wrong is in the first failure too.
            Ok(true) | Err(_) => Ok(()),
        }
    }

    /// Unpacks one layer below the store's `tmp/`.
    fn apply(
        &self,
        compressed: impl std::io::Read + Send,
        names: &ImageLayer,
    ) -> anyhow::Result<Unpacked> {
        let tree = self.store.tmp_dir("tree-")?;
        let limits = layer::Limits::default();
        let applied = layer::apply(
            compressed,
            &names.descriptor.media_type,
            &names.diff_id,
            &tree,
            &limits,
        );
        let applied = match applied {
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
        Ok(Unpacked {
            tree,
            implied: applied.implied_directories,
        })
    }
}

/// A layer that is unpacked and has no name yet.
struct Unpacked {
    tree: PathBuf,
    /// Directories that only the layers below say something about.
    implied: Vec<PathBuf>,
}

/// A blob of the store was not what its name says. It has been removed.
#[derive(Debug, thiserror::Error)]
#[error(
    "the blob {digest} in the store was damaged and has been removed; run the build again, which fetches or makes it anew"
)]
pub(super) struct BlobDamaged {
    digest: Digest,
}

fn open_tree(path: &Path) -> anyhow::Result<Arc<Tree>> {
    Tree::open(path).with_context(|| format!("opening {}", path.display()))
}

/// What `below` and one more layer are together.
pub(super) async fn chain_of(below: &[Arc<Layer>], top: &DiffId) -> anyhow::Result<Digest> {
    let mut diff_ids = Vec::with_capacity(below.len() + 1);
    for layer in below {
        let names = layer.names().await;
        diff_ids.push(names.map_err(|error| super::unshare(&error))?.diff_id);
    }
    diff_ids.push(top.clone());
    chain_id(&diff_ids).context("a chain of at least one layer has an ID")
}

/// `layers` as trees; those that are missing are unpacked in parallel.
async fn stack(engine: &Arc<Engine>, layers: &[Arc<Layer>]) -> Result<Stack, SharedError> {
    let trees = layers.iter().enumerate();
    let trees = trees.map(|(at, layer)| layer.tree(engine, &layers[..at]));
    Ok(Stack::new(futures_util::future::try_join_all(trees).await?))
}

impl Filesystem {
    /// This and `layer` on top.
    pub(super) fn with(&self, layer: Arc<Layer>) -> Self {
        let mut layers = self.layers.clone();
        layers.push(layer);
        Self { layers }
    }

    /// This and the layers of `above` on top.
    pub(super) fn with_all(&self, above: Self) -> Self {
        let mut layers = self.layers.clone();
        layers.extend(above.layers);
        Self { layers }
    }

    /// The names of all layers, base first.
    pub(super) async fn names(&self) -> Result<Vec<ImageLayer>, SharedError> {
        futures_util::future::try_join_all(self.layers.iter().map(|layer| layer.names())).await
    }

    /// What the layers are together; absent for none.
    pub(super) async fn chain(&self) -> Result<Option<Digest>, SharedError> {
        let diff_ids: Vec<DiffId> = self.names().await?.into_iter().map(|l| l.diff_id).collect();
        Ok(chain_id(&diff_ids))
    }

    /// All layers as trees; those that are missing are unpacked in parallel.
    pub(super) async fn stack(&self, engine: &Arc<Engine>) -> Result<Stack, SharedError> {
        stack(engine, &self.layers).await
    }
}

/// Copies what is read.
struct TeeReader<R, W> {
    inner: R,
    copy: W,
}

impl<R: std::io::Read, W: std::io::Write> std::io::Read for TeeReader<R, W> {
    fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
        let read = self.inner.read(buf)?;
        self.copy.write_all(&buf[..read])?;
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

impl<R: std::io::Read> std::io::Read for ProgressReader<'_, R> {
    fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
        self.engine
            .check_cancelled()
            .map_err(std::io::Error::other)?;
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
