//! [`Layer`]: one layer in the forms in which it exists, each made only when needed.
//!
//! ```text
//! remote   a descriptor at a registry or in a layout that has it
//! blob     compressed bytes in the store, named by digest
//! listing  what is in it, without the contents; in the store, named by diff ID
//! tree     unpacked directory in the store, ready to be an overlay lower directory
//! ```
//!
//! A step that mounts a filesystem, or reads files of it, needs trees. One that only adds to
//! it asks what is there, for which listings do: they are made while the bytes of a layer
//! pass, without writing any of them, and are there for all later builds. Where a plan has
//! a step that will need the trees anyway, they are used for both.

mod fetch;
mod read;

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use anyhow::{Context as _, anyhow};
use futures_util::FutureExt as _;
use futures_util::future::{BoxFuture, Shared as SharedFuture, try_join_all};
use tokio::sync::{OnceCell, OwnedMutexGuard};

use super::below::Below;
use super::cache::{CacheSource, LostLayer};
use super::explain::{self, MadeBy};
use super::{BaseImage, Engine, Settings, seal};
use crate::image::{Descriptor, DiffId, Digest, ImageLayer, Repository, chain_id};
use crate::layer::{LayerError, is_too_long};
use crate::layout::Layout;
use crate::plan::{Joined, Operation};
use crate::rootfs::{self, LayerForm, LayerView, Listing, Stack, Tree};
use crate::store::GrowingBlob;

pub(crate) use fetch::fetch_blob;

use read::{LIST, UNPACK, Unpacked};

/// An error that several waiting steps see.
pub(super) type SharedError = Arc<anyhow::Error>;

/// The names of a layer, known once it is sealed.
type Sealing = SharedFuture<BoxFuture<'static, Result<ImageLayer, SharedError>>>;

/// The blob of a layer that is being sealed; absent where sealing ends before it begins.
type Growing = SharedFuture<BoxFuture<'static, Option<GrowingBlob>>>;

/// Where the layers of a base image are.
#[derive(Clone, Debug)]
pub enum Origin {
    /// At a registry.
    Registry(Repository),
    /// In a directory of this machine.
    Layout(Layout),
}

/// One layer of a filesystem.
pub(super) struct Layer {
    sealing: Sealing,
    /// The blob while it is written, for layers that this build makes.
    growing: Option<Growing>,
    /// The blob that it is sent as, where that is another than its own.
    pub(super) converted: OnceCell<Descriptor>,
    tree: OnceCell<Arc<Tree>>,
    listing: OnceCell<Arc<Listing>>,
    /// Where the blob can be fetched.
    origin: Option<Origin>,
    /// The cache that it is from, where the store had no blob of it when its step was looked
    /// up.
    cache: Option<CacheSource>,
    /// Whether the bytes have been read, and are in the store where they are needed again.
    was_read: AtomicBool,
    push_started: AtomicBool,
    /// When the step that made it ran; RFC 3339. Absent for layers of a base image.
    pub(super) created: Option<String>,
    /// What made it, for people.
    pub(super) made_by: OnceLock<MadeBy>,
}

/// The layers of a filesystem, base first.
#[derive(Clone, Default)]
pub(super) struct Filesystem {
    pub(super) layers: Vec<Arc<Layer>>,
}

/// What is known of the layers of a build together.
#[derive(Debug)]
pub(super) struct Shared {
    /// Indices of the steps whose filesystems are mounted or read from.
    read: BTreeSet<usize>,
    /// Layers of base images that may be unpacked for such a step.
    may_be_unpacked: BTreeSet<DiffId>,
    /// What is being made: two references may share a layer, and it is fetched once.
    flights: Mutex<HashMap<String, Arc<tokio::sync::Mutex<()>>>>,
}

impl Shared {
    /// Looks through what `plan` will do.
    pub(super) fn new(plan: &Joined, settings: &Settings) -> Self {
        let read = read_steps(plan, settings.reads_files);
        let images = read.iter().filter_map(|index| {
            let Operation::Image(image) = &plan.steps.get(*index)?.operation else {
                return None;
            };
            settings.images.get(image.0)
        });
        let diff_ids = |image: &BaseImage| image.resolved.config.rootfs.diff_ids.clone();
        Self {
            may_be_unpacked: images.flat_map(diff_ids).collect(),
            read,
            flights: Mutex::default(),
        }
    }

    /// Whether some step mounts what step `number` makes, or reads from it.
    pub(super) fn is_read(&self, number: usize) -> bool {
        let index = number.checked_sub(1);
        index.is_some_and(|index| self.read.contains(&index))
    }

    /// Waits until nobody else makes `what`, and keeps others from it.
    async fn flight(&self, what: String) -> OwnedMutexGuard<()> {
        let flight = {
            let mut flights = self
                .flights
                .lock()
                .expect("nothing panics while it holds this lock");
            Arc::clone(flights.entry(what).or_default())
        };
        flight.lock_owned().await
    }
}

/// The indices of the steps whose filesystem some step mounts or copies from, perhaps with
/// more layers on top; `reads_result`: the result's too.
fn read_steps(plan: &Joined, reads_result: bool) -> BTreeSet<usize> {
    let mut read = BTreeSet::new();
    if reads_result {
        let results = plan.targets.iter().filter_map(|target| target.result);
        read.extend(results.map(|id| id.0));
    }
    // Each step comes after those that it needs.
    for (index, step) in plan.steps.iter().enumerate().rev() {
        read.extend(step.sources().iter().map(|id| id.0));
        if matches!(step.operation, Operation::Run(_)) || read.contains(&index) {
            read.extend(step.parent.map(|id| id.0));
        }
    }
    read
}

impl Layer {
    /// A layer of a base image.
    pub(super) fn remote(names: ImageLayer, origin: Origin) -> Self {
        Self {
            origin: Some(origin),
            ..Self::sealed(names, None)
        }
    }

    /// The layer of a step that ran on another machine, whose blob is where `cache` has its;
    /// without an origin, one that `cache` knows and does not have.
    pub(super) fn cached_elsewhere(
        names: ImageLayer,
        created: String,
        origin: Option<Repository>,
        cache: CacheSource,
    ) -> Self {
        Self {
            origin: origin.map(Origin::Registry),
            cache: Some(cache),
            ..Self::sealed(names, Some(created))
        }
    }

    /// A layer whose blob is in the store.
    pub(super) fn sealed(names: ImageLayer, created: Option<String>) -> Self {
        let sealing = futures_util::future::ready(Ok(names)).boxed().shared();
        Self {
            sealing,
            growing: None,
            converted: OnceCell::new(),
            tree: OnceCell::new(),
            listing: OnceCell::new(),
            origin: None,
            cache: None,
            was_read: AtomicBool::new(false),
            push_started: AtomicBool::new(false),
            created,
            made_by: OnceLock::new(),
        }
    }

    /// A layer that is just being sealed; `tree` where it is unpacked already.
    pub(super) fn sealing(
        seal::Sealing { task, growing }: seal::Sealing,
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
        let growing = growing.map(Result::ok).boxed().shared();
        Self {
            sealing: sealing.boxed().shared(),
            growing: Some(growing),
            converted: OnceCell::new(),
            tree: OnceCell::new_with(tree),
            listing: OnceCell::new(),
            origin: None,
            cache: None,
            was_read: AtomicBool::new(false),
            push_started: AtomicBool::new(false),
            created: Some(created),
            made_by: OnceLock::new(),
        }
    }

    /// The same, of which it is known already what it has.
    pub(super) fn listed(self, listing: Option<Listing>) -> Self {
        Self {
            listing: OnceCell::new_with(listing.map(Arc::new)),
            ..self
        }
    }

    /// The layer's names; waits until it is sealed.
    pub(super) async fn names(&self) -> Result<ImageLayer, SharedError> {
        self.sealing.clone().await
    }

    /// Whether this build makes it: it is neither a base's nor from the cache.
    pub(super) fn is_new(&self) -> bool {
        self.growing.is_some()
    }

    /// The blob while it is written, for layers that this build makes.
    pub(super) async fn growing(&self) -> Option<GrowingBlob> {
        self.growing.clone()?.await
    }

    /// Where the blob can be fetched, for layers of base images.
    pub(super) fn found_at(&self) -> Option<&Origin> {
        self.origin.as_ref()
    }

    /// The registry that has the blob, for layers of base images.
    pub(super) fn origin(&self) -> Option<&Repository> {
        match &self.origin {
            Some(Origin::Registry(repository)) => Some(repository),
            _ => None,
        }
    }

    /// The layout that has the blob, for layers of base images.
    pub(super) fn layout(&self) -> Option<&Layout> {
        match &self.origin {
            Some(Origin::Layout(layout)) => Some(layout),
            _ => None,
        }
    }

    /// Whether it is of an imported cache, so that it may turn out that it cannot be had.
    pub(super) fn may_be_lost(&self) -> bool {
        self.cache.is_some()
    }

    /// The error that its blob cannot be had: of an imported cache a [`LostLayer`], else as
    /// it is.
    pub(super) fn lost(&self, digest: &Digest, error: anyhow::Error) -> anyhow::Error {
        match (&self.cache, &self.origin) {
            (Some(cache), Some(Origin::Registry(repository))) => {
                anyhow::Error::new(LostLayer::Gone {
                    cache: cache.clone(),
                    repository: repository.clone(),
                    digest: digest.clone(),
                    source: error,
                })
            }
            _ => error,
        }
    }

    /// The error that its blob is neither in the store nor anywhere else.
    pub(super) fn missing(&self, digest: &Digest) -> anyhow::Error {
        match (&self.cache, &self.origin) {
            (Some(cache), None) => anyhow::Error::new(LostLayer::NotExported {
                cache: cache.clone(),
                digest: digest.clone(),
            }),
            _ => anyhow!("the blob {digest} is no longer in the store"),
        }
    }

    /// Whether it has been read, so that pushing need not wait for somebody who downloads it.
    pub(super) fn is_unpacked(&self) -> bool {
        self.tree.initialized() || self.was_read.load(Ordering::Relaxed)
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
        let layers = &engine.layers;
        // The layers below have other chains, so nobody waits for each other.
        let _chain = layers.flight(format!("chain {chain}")).await;
        if let Some(path) = engine.store.find_tree(&names.diff_id, &chain)? {
            return open_tree(&path);
        }
        let store = Arc::clone(&engine.store);
        let unpacked = {
            let _layer = layers.flight(format!("layer {}", names.diff_id)).await;
            if let Some(path) = store.find_tree(&names.diff_id, &chain)? {
                return open_tree(&path);
            }
            let unpacked = self.read(engine, &names, UNPACK).await?;
            if unpacked.implied.is_empty() {
                return open_tree(&store.adopt_tree(&unpacked.tree, &names.diff_id)?);
            }
            unpacked
        };
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

    /// The layer in a form that says what is in it: a tree where there is one, else a listing.
    async fn form(
        &self,
        engine: &Arc<Engine>,
        below: &[Arc<Layer>],
    ) -> Result<LayerForm, SharedError> {
        if let Some(tree) = self.tree.get() {
            return Ok(LayerForm::Tree(Arc::clone(tree)));
        }
        if let Some(listing) = self.listing.get() {
            return Ok(LayerForm::Listing(Arc::clone(listing)));
        }
        let names = self.names().await?;
        let chain = chain_of(below, &names.diff_id).await.map_err(Arc::new)?;
        let known = engine.store.find_tree(&names.diff_id, &chain);
        if known.map_err(|error| Arc::new(error.into()))?.is_some() {
            return Ok(LayerForm::Tree(self.tree(engine, below).await?));
        }
        let listing = self.listing.get_or_try_init(|| self.list(engine, &names));
        match listing.await {
            Ok(listing) => Ok(LayerForm::Listing(Arc::clone(listing))),
            Err(error) if error.chain().any(is_too_long_error) => {
                Ok(LayerForm::Tree(self.tree(engine, below).await?))
            }
            Err(error) => Err(Arc::new(error)),
        }
    }

    async fn list(&self, engine: &Arc<Engine>, names: &ImageLayer) -> anyhow::Result<Arc<Listing>> {
        let layers = &engine.layers;
        let _layer = layers.flight(format!("layer {}", names.diff_id)).await;
        let (shared, diff_id) = (Arc::clone(engine), names.diff_id.clone());
        let stored = engine.blocking(move || Ok(shared.stored_listing(&diff_id)));
        if let Some(listing) = stored.await? {
            return Ok(Arc::new(listing));
        }
        let listing = self.read(engine, names, LIST).await?;
        Ok(Arc::new(listing))
    }
}

fn is_too_long_error(error: &(dyn std::error::Error + 'static)) -> bool {
    error.downcast_ref::<LayerError>().is_some_and(is_too_long)
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
    Ok(Stack::new(try_join_all(trees).await?))
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

    /// The layers in words, base first.
    pub(super) async fn in_words(&self) -> Result<Vec<explain::Below>, SharedError> {
        let names = self.names().await?.into_iter();
        let in_words = names.zip(&self.layers).map(|(names, layer)| {
            let made_by = layer.made_by.get().cloned();
            explain::Below {
                diff_id: names.diff_id,
                made_by: made_by.unwrap_or_else(|| MadeBy::Step("a step".to_owned())),
            }
        });
        Ok(in_words.collect())
    }

    /// The names of all layers, base first.
    pub(super) async fn names(&self) -> Result<Vec<ImageLayer>, SharedError> {
        try_join_all(self.layers.iter().map(|layer| layer.names())).await
    }

    /// The diff IDs of all layers, base first, as far as they are known now.
    pub(super) fn known(&self) -> Vec<Option<DiffId>> {
        let known = self.layers.iter().map(|layer| {
            let names = layer.sealing.clone().now_or_never()?;
            Some(names.ok()?.diff_id)
        });
        known.collect()
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

    /// The layers for step `number`, which adds to them: as trees where these are needed
    /// later anyway, else as they are, or as listings.
    pub(super) async fn below(&self, engine: &Arc<Engine>, number: usize) -> anyhow::Result<Below> {
        let is_read = engine.layers.is_read(number);
        if is_read && engine.check_world().is_ok() {
            let stack = self.stack(engine).await;
            return Ok(Below::from(&stack.map_err(|error| super::unshare(&error))?));
        }
        let forms = self.layers.iter().enumerate();
        let forms = forms.map(|(at, layer)| layer.form(engine, &self.layers[..at]));
        let forms = try_join_all(forms).await;
        let view = LayerView::new(forms.map_err(|error| super::unshare(&error))?);
        let (engine, this) = (Arc::clone(engine), self.clone());
        let runtime = tokio::runtime::Handle::current();
        Ok(Below::new(view, move || {
            let stack = runtime.block_on(this.stack(&engine));
            stack.map_err(|error| io::Error::other(super::unshare(&error)))
        }))
    }
}
