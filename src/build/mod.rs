//! Performs a plan, or those of several platforms [`Joined`]: runs the graph, independent steps in parallel.
//!
//! Each step is a task that waits for the steps it needs. What a task gives is a
//! `Filesystem`: a list of layers that may still be remote, or still being sealed.

mod additions;
mod below;
mod cache;
mod cache_mount;
mod content;
mod context_tree;
mod copy;
mod devices;
mod explain;
mod isolation;
mod layer;
mod listing;
mod mask;
mod mounts;
mod push;
mod remote;
mod run;
mod seal;
mod slot;
mod stand_ins;
mod stat_cache;
mod step;
mod subtree;
mod twins;
mod unpack;
mod user;

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use anyhow::Context as _;
use futures_util::FutureExt as _;
use futures_util::future::{BoxFuture, Shared, join, try_join_all};
use thiserror::Error;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use crate::context::BuildContext;
use crate::image::{ImageLayer, Platform, Reference, Repository};
use crate::layer::Compression;
use crate::plan::{ContextId, Joined, MountKind, Operation, StepId};
use crate::progress::{BuildEvent, Progress, millis};
use crate::registry::{Client, RegistryError, Resolved};
use crate::remote::Fetcher;
use crate::rootfs::{self, Rootfs, Stack};
use crate::sandbox::{self, Cancel, LimitReached, Limits, Sandbox, SandboxError, World};
use crate::session::{Secrets, SshAgents};
use crate::store::Store;

use cache::LostLayer;
use devices::Devices;
use layer::{Filesystem, SharedError};
use push::Sent;
use slot::Slots;
use twins::Twins;

pub(crate) use cache::{BlobSource, CacheBlob, CacheDocument, INLINE_KEY, PackedMounts, import};
pub use cache::{CacheContents, CacheSource, Imported, Importing};
pub use devices::{DeviceError, DeviceSettings};
pub use isolation::NotIsolated;
pub use layer::Origin;
pub(crate) use layer::fetch_blob;

/// How many layers are fetched and unpacked at once. Unpacking is bound by CPU and disk;
/// more would only take memory.
const PARALLEL_UNPACKS: usize = 4;

/// A step's process ended with another status than 0.
#[derive(Debug, Error)]
#[error("process {command:?} did not complete successfully: {}", why(*.status, .limit.as_ref()))]
pub struct StepFailed {
    /// The program and its arguments.
    pub command: String,
    /// The exit status; 128 + the signal where one ended it.
    pub status: i32,
    /// The end of what it printed.
    pub tail: String,
    /// What it was to run on, where this machine cannot run programs for that and the status
    /// says that a program could not be run.
    pub foreign: Option<Platform>,
    /// The limit that ended it, or had it fail.
    pub limit: Option<LimitReached>,
}

/// Why a step failed.
fn why(status: i32, limit: Option<&LimitReached>) -> String {
    limit.map_or_else(|| format!("exit code: {status}"), ToString::to_string)
}

impl StepFailed {
    /// What to do about it.
    pub(crate) fn hint(&self) -> Option<String> {
        let platform = self.foreign.as_ref()?;
        Some(format!(
            "this machine cannot run programs for {platform}: {}",
            foreign_hint(&platform.architecture)
        ))
    }
}

/// What to do where programs for an architecture cannot be run.
pub fn foreign_hint(architecture: &str) -> String {
    format!(
        "register an emulator for {architecture} with binfmt_misc (such as Debian's qemu-user-static), \
         or compile on this machine's platform: FROM --platform=$BUILDPLATFORM"
    )
}

/// Where in the Dockerfile a failed step is: the context of its error.
#[derive(Clone, Debug, Error)]
#[error("{0}")]
pub(crate) struct StepPlace(pub(crate) String);

impl StepPlace {
    /// Whether an error came to a step.
    pub(crate) fn is_of(error: &anyhow::Error) -> bool {
        let shared: Option<&Shared_> = error.downcast_ref();
        error.is::<Self>() || shared.is_some_and(|shared| Self::is_of(&shared.0))
    }
}

/// What a build is made with.
#[derive(Clone)]
#[allow(missing_debug_implementations, reason = "holds trait objects")]
pub struct Settings {
    /// Where layers are kept.
    pub store: Arc<Store>,
    /// Where base images come from.
    pub client: Client,
    /// `--explain`: for each step, what the cache has of it is told.
    pub explain: bool,
    /// Where events go.
    pub progress: Arc<dyn Progress>,
    /// Ends the build when set.
    pub cancel: Cancel,
    /// What COPY, ADD and mounts see, by [`ContextId`]; absent are those that no step reads.
    pub contexts: BTreeMap<ContextId, Arc<BuildContext>>,
    /// Fetches what ADD names by URL.
    pub fetcher: Arc<Fetcher>,
    /// The base images, by [`crate::plan::ImageId`].
    pub images: Vec<BaseImage>,
    /// Which sandbox runs the steps.
    pub sandbox: sandbox::Choice,
    /// Whether that may be a runc with known holes.
    pub allow_old_runc: bool,
    /// How much each RUN step may use.
    pub limits: Limits,
    /// How root filesystems are made.
    pub rootfs: rootfs::Choice,
    /// Whether nothing is run unless steps are isolated.
    pub require_isolation: bool,
    /// The powers that this process has.
    pub world: Arc<World>,
    /// How many RUN steps run at once, `--jobs`; 0: as many as the graph allows, within
    /// reason.
    pub jobs: usize,
    /// The architectures, in Go's names, whose programs this machine cannot run.
    pub foreign: BTreeSet<String>,
    /// Clamps times; seconds since 1970 UTC.
    pub epoch: Option<i64>,
    /// How new layers are compressed.
    pub compression: Compression,
    /// Whether layers that exist already are sent with that compression too.
    pub force_compression: bool,
    /// Whether the blobs of base images are kept when they are read, because an output
    /// has them.
    pub keep_blobs: bool,
    /// Whether [`Files::stack`] will be asked for.
    pub reads_files: bool,
    /// Secrets that steps may have.
    pub secrets: Arc<Secrets>,
    /// SSH agents that steps may use.
    pub agents: Arc<SshAgents>,
    /// Devices that steps may have.
    pub devices: DeviceSettings,
    /// The tags to push to, while steps still run.
    pub push: Vec<Reference>,
    /// The caches of other machines.
    pub importing: Importing,
}

/// A base image.
#[derive(Clone, Debug)]
pub struct BaseImage {
    /// Its manifest and config.
    pub resolved: Resolved,
    /// Where its layers are.
    pub origin: Origin,
}

/// What a build made.
#[derive(Debug)]
pub struct Built {
    /// What becomes an image, one for each of [`Joined::targets`].
    pub images: Vec<BuiltImage>,
    /// What there is to export to caches.
    pub cache: CacheContents,
    /// Bytes of layers that were sent, by where to.
    pub uploaded_bytes: BTreeMap<Repository, u64>,
}

/// The layers of one image.
#[derive(Debug)]
pub struct BuiltImage {
    /// The image's layers, base first.
    pub layers: Vec<ImageLayer>,
    /// For each layer above the base's, in order, when it was made; RFC 3339.
    pub created: Vec<String>,
    /// For each layer, where its blob can be fetched, if the store may not have it.
    pub origins: Vec<Option<Origin>>,
    /// For each layer, whether this build made it.
    pub are_new: Vec<bool>,
    /// The files that the layers are together.
    pub files: Files,
}

/// The files of the image that was built, for who wants them and not the layers.
#[derive(Clone)]
pub struct Files {
    engine: Arc<Engine>,
    filesystem: Filesystem,
}

impl std::fmt::Debug for Files {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Files({} layers)", self.filesystem.layers.len())
    }
}

impl Files {
    /// All layers unpacked, as one filesystem. What no step needed is fetched and unpacked now.
    ///
    /// # Errors
    /// [`NoRootfs`] where layers cannot be unpacked here; any that fetching gives.
    pub async fn stack(&self) -> anyhow::Result<Stack> {
        let stack = self.filesystem.stack(&self.engine).await;
        stack.map_err(|error| unshare(&error))
    }
}

/// What all steps share.
pub(crate) struct Engine {
    store: Arc<Store>,
    client: Client,
    progress: Arc<dyn Progress>,
    cancel: Cancel,
    /// Whether `cancel` was set because a step failed.
    has_failed: AtomicBool,
    compression: Compression,
    contexts: BTreeMap<ContextId, Arc<BuildContext>>,
    fetcher: Arc<Fetcher>,
    images: Vec<BaseImage>,
    sandbox_choice: sandbox::Choice,
    allow_old_runc: bool,
    limits: Limits,
    rootfs_choice: rootfs::Choice,
    world: Arc<World>,
    sandbox: OnceLock<Result<Box<dyn Sandbox>, Arc<SandboxError>>>,
    backend: OnceLock<rootfs::Backend>,
    slots: Slots,
    foreign: BTreeSet<String>,
    epoch: Option<i64>,
    keep_blobs: bool,
    reads_files: bool,
    secrets: Arc<Secrets>,
    agents: Arc<SshAgents>,
    devices: Devices,
    unpacking: Semaphore,
    layers: layer::Shared,
    timings: Arc<Timings>,
    push: push::Pusher,
    cache: cache::Cache,
    twins: Twins,
    /// With `--explain`.
    explaining: Option<explain::Explaining>,
    /// Each waits for a layer and records it in the cache.
    records: Mutex<JoinSet<()>>,
    stat_caches: context_tree::StatCaches,
    mounted: mounts::MountedFiles,
}

/// The summed times of kinds of work.
#[derive(Debug, Default)]
pub struct Timings(Mutex<BTreeMap<String, Duration>>);

impl Timings {
    /// Adds `duration` to the `kind` of work.
    pub fn add(&self, kind: &str, duration: Duration) {
        let mut timings = self
            .0
            .lock()
            .expect("nothing panics while it holds this lock");
        *timings.entry(kind.to_owned()).or_default() += duration;
    }

    /// The sums in milliseconds.
    pub fn to_millis(&self) -> BTreeMap<String, u64> {
        let timings = self
            .0
            .lock()
            .expect("nothing panics while it holds this lock");
        timings
            .iter()
            .map(|(kind, time)| (kind.clone(), millis(*time)))
            .collect()
    }
}

type StepFuture = Shared<BoxFuture<'static, Result<Filesystem, SharedError>>>;

/// Performs `plan`. Where a layer of an imported cache cannot be had when it is needed, the build
/// begins again without it; that is told, unless the cache never said that it has it.
///
/// # Errors
/// The first step that failed, with its place; the others are stopped and waited for.
pub async fn build(
    plan: &Joined,
    settings: Settings,
    timings: Arc<Timings>,
) -> anyhow::Result<Built> {
    let devices = Devices::new(settings.devices.clone(), plan);
    check_devices(plan, &devices)?;
    let forgotten = forgotten_caches(plan);
    forget_caches(&settings, &forgotten).await?;
    let mut plan = Cow::Borrowed(plan);
    let mut uploaded_bytes = BTreeMap::new();
    loop {
        let devices = Devices::new(settings.devices.clone(), &plan);
        let engine = Engine::begin(&plan, &settings, &timings, devices, forgotten.clone());
        let engine = engine.await?;
        isolation::check(&plan, &engine, settings.require_isolation).await?;
        let Sent { bytes, failure } = match attempt(&plan, &engine).await {
            Ok((images, sent)) => {
                add(&mut uploaded_bytes, sent);
                return Ok(Built {
                    images,
                    cache: engine.cache.contents(),
                    uploaded_bytes,
                });
            }
            Err(sent) => sent,
        };
        add(&mut uploaded_bytes, bytes);
        let failure = failure.context("a build ended without a result")?;
        let Some(lost) = LostLayer::of(&failure) else {
            return Err(failure);
        };
        let without = settings.importing.clone().await.leave_out(lost);
        match lost.warning(without) {
            Some(message) => engine.warn(message),
            None => tracing::debug!("{lost}, so the build begins again and makes it"),
        }
        // Also what --no-cache has done anew is not done twice.
        for number in engine.cache.done() {
            plan.to_mut().steps[number - 1].use_cache = true;
        }
    }
}

/// Adds what was sent to what had been before.
fn add(all: &mut BTreeMap<Repository, u64>, more: BTreeMap<Repository, u64>) {
    for (repository, bytes) in more {
        *all.entry(repository).or_default() += bytes;
    }
}

/// Performs the steps of `plan` and sends their layers; with the images, gives the bytes sent to
/// each repository. Of a failure too it is told what was sent.
async fn attempt(
    plan: &Joined,
    engine: &Arc<Engine>,
) -> Result<(Vec<BuiltImage>, BTreeMap<Repository, u64>), Sent> {
    engine.progress.event(BuildEvent::Planned {
        steps: plan.steps.len(),
    });
    let mut futures: Vec<StepFuture> = Vec::new();
    let mut tasks = JoinSet::new();
    for (index, step) in plan.steps.iter().enumerate() {
        let parent = step.parent.map(|id| futures[id.0].clone());
        let sources = step.sources().iter().map(|id| futures[id.0].clone());
        let sources = sources.collect();
        let task = step::perform(Arc::clone(engine), index + 1, step.clone(), parent, sources);
        let future = task.map(|result| result.map_err(Arc::new)).boxed().shared();
        futures.push(future.clone());
        tasks.spawn(future);
    }
    let mut lost = None;
    let mut failure = None;
    loop {
        let joined = tokio::select! {
            joined = tasks.join_next() => joined,
            // A later one would only repeat the first.
            error = engine.push.failure(), if failure.is_none() => Some(Ok(Err(error))),
        };
        let error = match joined {
            None => break,
            Some(Ok(Ok(_))) => continue,
            Some(Ok(Err(error))) => error,
            Some(Err(error)) => {
                Arc::new(anyhow::Error::new(error).context("a step's task ended abnormally"))
            }
        };
        if LostLayer::of(&error).is_some() {
            // What does not need the layer goes on, so that it need not be done again.
            lost.get_or_insert(error);
            continue;
        }
        // Later ones only repeat it, or say that they were stopped.
        if failure.is_none() {
            let is_wanted = !engine.cancel.is_cancelled();
            engine.has_failed.store(is_wanted, Ordering::Relaxed);
            engine.cancel.cancel();
            failure = Some((error, is_wanted));
        }
    }
    if let Some((error, is_wanted)) = failure {
        engine.push.abandon(engine).await;
        // What went well need not be done again when the rest is mended; only a user who
        // stops the build does not wait for that.
        engine.finish_records(is_wanted).await;
        return Err(unshare(&error).into());
    }
    if let Some(error) = lost {
        let sent = engine.push.settle().await;
        engine.push.abandon(engine).await;
        engine.finish_records(!engine.cancel.is_cancelled()).await;
        engine.check_cancelled().map_err(anyhow::Error::from)?;
        let failure = sent.failure.filter(|e| LostLayer::of(e).is_none());
        return Err(Sent {
            failure: Some(failure.unwrap_or_else(|| unshare(&error))),
            ..sent
        });
    }
    let mut filesystems = Vec::new();
    for target in &plan.targets {
        filesystems.push(match target.result {
            Some(StepId(result)) => futures[result].clone().await.map_err(|e| unshare(&e))?,
            None => Filesystem::default(),
        });
    }
    let layers = try_join_all(filesystems.iter().map(Filesystem::names)).await;
    let layers = layers.map_err(|e| unshare(&e));
    let (sent, secured) = match &layers {
        Ok(_) => {
            let all = all(&filesystems);
            let sending = engine.push.finish(engine, &all);
            join(sending, engine.secure(&filesystems)).await
        }
        Err(_) => (Sent::default(), Ok(())),
    };
    engine.push.abandon(engine).await;
    engine.finish_records(!engine.cancel.is_cancelled()).await;
    let layers = layers?;
    let is_lost = |error: &anyhow::Error| LostLayer::of(error).is_some();
    let mut failures = [sent.failure, secured.err()];
    // What nothing but mending helps against is said first.
    failures.sort_by_key(|failure| failure.as_ref().is_none_or(is_lost));
    if let Some(failure) = failures.into_iter().flatten().next() {
        return Err(Sent {
            failure: Some(failure),
            bytes: sent.bytes,
        });
    }
    let images = layers.into_iter().zip(filesystems);
    let images = images.map(|(layers, filesystem)| BuiltImage {
        created: filesystem
            .layers
            .iter()
            .filter_map(|l| l.created.clone())
            .collect(),
        origins: filesystem
            .layers
            .iter()
            .map(|l| l.found_at().cloned())
            .collect(),
        are_new: filesystem.layers.iter().map(|l| l.is_new()).collect(),
        layers,
        files: Files {
            engine: Arc::clone(engine),
            filesystem,
        },
    });
    Ok((images.collect(), sent.bytes))
}

/// All layers of all images: what has to be sent.
fn all(filesystems: &[Filesystem]) -> Filesystem {
    let layers = filesystems
        .iter()
        .flat_map(|one| one.layers.iter().cloned());
    Filesystem {
        layers: layers.collect(),
    }
}

/// An error that several steps saw, as one that can be returned.
pub(crate) fn unshare(error: &SharedError) -> anyhow::Error {
    anyhow::Error::new(Shared_(Arc::clone(error)))
}

/// Carries a shared error and its causes. The error's own type is not among those: ask
/// [`Shared_::cause`] for it.
#[derive(Debug)]
pub(crate) struct Shared_(SharedError);

impl Shared_ {
    /// The error that is carried.
    pub(crate) fn cause(&self) -> &(dyn std::error::Error + 'static) {
        let error: &(dyn std::error::Error + 'static) = self.0.as_ref().as_ref();
        // It may have been shared more than once.
        match error.downcast_ref::<Self>() {
            Some(inner) => inner.cause(),
            None => error,
        }
    }
}

impl Shared_ {
    /// A cause, also where it came to several steps at once.
    pub(crate) fn unwrapped<'e>(
        cause: &'e (dyn std::error::Error + 'static),
    ) -> &'e (dyn std::error::Error + 'static) {
        cause.downcast_ref().map_or(cause, Self::cause)
    }
}

impl std::fmt::Display for Shared_ {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

impl std::error::Error for Shared_ {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0.source()
    }
}

/// The IDs of the cache mounts of steps that `--no-cache` does anew.
fn forgotten_caches(plan: &Joined) -> BTreeSet<String> {
    let steps = plan.steps.iter().filter(|step| !step.use_cache);
    let runs = steps.filter_map(|step| match &step.operation {
        Operation::Run(run) => Some(run),
        _ => None,
    });
    let mounts = runs.flat_map(|run| &run.mounts);
    let ids = mounts.filter_map(|mount| match &mount.kind {
        MountKind::Cache { id, .. } => Some(id.clone()),
        _ => None,
    });
    ids.collect()
}

/// Empties the cache mounts of these IDs.
async fn forget_caches(settings: &Settings, ids: &BTreeSet<String>) -> anyhow::Result<()> {
    let (store, ids) = (Arc::clone(&settings.store), ids.clone());
    let emptying = tokio::task::spawn_blocking(move || {
        let ids = ids.iter().map(String::as_str).collect();
        cache_mount::empty(&store, &ids)
    });
    for id in emptying.await.context("a task ended abnormally")?? {
        let id = id.trim_start_matches('/');
        settings.progress.event(BuildEvent::Warning {
            message: format!(
                "the cache mount {id:?} is in use by another build, so it is not emptied"
            ),
        });
    }
    Ok(())
}

/// Refuses what was not allowed before anything is pulled.
fn check_devices(plan: &Joined, devices: &Devices) -> anyhow::Result<()> {
    for step in &plan.steps {
        if let Operation::Run(run) = &step.operation {
            let edits = devices.edits(&run.devices);
            edits.with_context(|| step.place.clone())?;
        }
    }
    Ok(())
}

/// The numbers of the steps whose layers the results have.
fn wanted(plan: &Joined) -> BTreeSet<usize> {
    let parent = |id: &StepId| plan.steps[id.0].parent;
    let targets = plan.targets.iter();
    targets
        .flat_map(|target| std::iter::successors(target.result, parent))
        .map(|id| id.0 + 1)
        .collect()
}

impl Engine {
    /// What the steps of `plan` share; cache mounts of the IDs `forgotten` begin anew.
    async fn begin(
        plan: &Joined,
        settings: &Settings,
        timings: &Arc<Timings>,
        devices: Devices,
        forgotten: BTreeSet<String>,
    ) -> anyhow::Result<Arc<Self>> {
        let cache = cache::Cache::new(settings.importing.clone(), plan, wanted(plan), forgotten);
        let layers = layer::Shared::new(plan, settings);
        let (explains, timings) = (settings.explain, Arc::clone(timings));
        let settings = settings.clone();
        let epoch = settings.epoch;
        let definitions = plan.steps.iter();
        let definitions = definitions.filter_map(|one| step::definition(one, epoch));
        let mut engine = Self::new(settings, timings, wanted(plan), devices, layers, cache);
        engine.twins = Twins::new(definitions);
        if explains {
            let store = Arc::clone(&engine.store);
            let imported = engine.cache.imported().await;
            let reading = engine.blocking(move || Ok(explain::Explaining::read(&store, imported)));
            engine.explaining = Some(reading.await?);
        }
        Ok(Arc::new(engine))
    }

    fn new(
        settings: Settings,
        timings: Arc<Timings>,
        wanted: BTreeSet<usize>,
        devices: Devices,
        layers: layer::Shared,
        cache: cache::Cache,
    ) -> Self {
        Self {
            devices,
            layers,
            cache,
            explaining: None,
            twins: Twins::default(),
            push: push::Pusher::new(&settings.push, wanted, settings.force_compression),
            store: settings.store,
            client: settings.client,
            progress: settings.progress,
            cancel: settings.cancel,
            has_failed: AtomicBool::new(false),
            compression: settings.compression,
            contexts: settings.contexts,
            fetcher: settings.fetcher,
            images: settings.images,
            sandbox_choice: settings.sandbox,
            allow_old_runc: settings.allow_old_runc,
            limits: settings.limits,
            rootfs_choice: settings.rootfs,
            world: settings.world,
            sandbox: OnceLock::new(),
            backend: OnceLock::new(),
            slots: Slots::new(settings.jobs),
            foreign: settings.foreign,
            epoch: settings.epoch,
            keep_blobs: settings.keep_blobs,
            reads_files: settings.reads_files,
            secrets: settings.secrets,
            agents: settings.agents,
            unpacking: Semaphore::new(PARALLEL_UNPACKS),
            timings,
            records: Mutex::default(),
            stat_caches: context_tree::StatCaches::default(),
            mounted: mounts::MountedFiles::default(),
        }
    }

    /// Ends what keeps the cache's records; where they are wanted, when all are written.
    async fn finish_records(&self, wanted: bool) {
        let mut records = std::mem::take(
            &mut *self
                .records
                .lock()
                .expect("nothing panics while it holds this lock"),
        );
        if wanted {
            while let Some(joined) = records.join_next().await {
                if let Err(error) = joined {
                    self.warn(format!("a step is not cached: {error}"));
                }
            }
        } else {
            records.shutdown().await;
        }
    }

    /// Has in the store what outputs will need of imported caches, as long as the steps can
    /// be done instead.
    async fn secure(self: &Arc<Self>, filesystems: &[Filesystem]) -> anyhow::Result<()> {
        for filesystem in filesystems {
            let imported = filesystem.layers.iter().filter(|l| l.may_be_lost());
            if self.reads_files && imported.clone().next().is_some() {
                let stack = filesystem.stack(self).await;
                stack.map_err(|error| unshare(&error))?;
            }
            for layer in imported.filter(|_| self.keep_blobs) {
                let names = layer.names().await.map_err(|error| unshare(&error))?;
                let fetched = layer.fetch(self, &names).await;
                fetched.with_context(|| format!("pulling layer {}", names.descriptor.digest))?;
            }
        }
        Ok(())
    }

    /// A build context.
    fn context(&self, id: ContextId) -> anyhow::Result<Arc<BuildContext>> {
        let context = self.contexts.get(&id).cloned();
        context.with_context(|| format!("the build context {} was not opened", id.0))
    }

    /// The sandbox, chosen when the first step needs it. Blocking.
    fn sandbox(&self) -> anyhow::Result<&dyn Sandbox> {
        self.check_world()?;
        let chosen = self.sandbox.get_or_init(|| {
            // Whoever opens the store next removes what is in it, should this process be killed.
            let scratch = self.store.tmp();
            let (choice, old) = (self.sandbox_choice, self.allow_old_runc);
            let sandbox = sandbox::choose(choice, old, &self.world, scratch);
            let sandbox = sandbox.map_err(Arc::new)?;
            let mut message = format!("RUN steps run in {}", sandbox.name());
            if let World::Chroot { reason } = &*self.world {
                message += &format!(", as no namespaces can be made ({reason})");
            }
            self.progress.event(BuildEvent::Environment { message });
            if let World::SingleId { reason } = &*self.world {
                let message = format!(
                    "users and owners are made up for RUN steps, which are traced: there is one \
                     ID only ({reason})"
                );
                self.progress.event(BuildEvent::Environment { message });
            }
            let limits = sandbox::limit_notes(&self.limits).map_err(Arc::new)?;
            for message in sandbox.notes().into_iter().chain(limits) {
                self.progress.event(BuildEvent::Environment { message });
            }
            Ok(sandbox)
        });
        match chosen {
            Ok(sandbox) => Ok(sandbox.as_ref()),
            Err(error) => Err(SandboxUnavailable(Arc::clone(error)).into()),
        }
    }

    /// A root filesystem of `stack` in the empty directory `scratch` of the store. The way is
    /// chosen when the first is needed. Blocking.
    fn rootfs(&self, stack: &Stack, scratch: &Path) -> anyhow::Result<Rootfs> {
        let chosen = match self.backend.get() {
            Some(chosen) => *chosen,
            None if !self.sandbox()?.mounts() => {
                let name = self.sandbox()?.name();
                if self.rootfs_choice == rootfs::Choice::Overlay {
                    let asked = SandboxError::Asked {
                        doing: "mounting an overlay (--rootfs=overlay)".to_owned(),
                        reason: format!("with the sandbox {name} nothing is mounted"),
                    };
                    return Err(SandboxUnavailable(Arc::new(asked)).into());
                }
                let message = "RUN steps work on copies of their layers".to_owned();
                *self.backend.get_or_init(|| {
                    self.progress.event(BuildEvent::Environment { message });
                    rootfs::Backend::CopyWithoutDevices
                })
            }
            None => {
                let trial = self.store.tmp_dir("overlay-")?;
                *self.backend.get_or_init(|| {
                    let (chosen, refusal) = rootfs::choose(self.rootfs_choice, &trial);
                    if chosen == rootfs::Backend::Copy {
                        let mut message = "RUN steps work on copies of their layers".to_owned();
                        if let Some(refusal) = refusal {
                            let refusal = anyhow::Error::new(refusal);
                            message += &format!(", as no overlay can be mounted ({refusal:#})");
                        }
                        self.progress.event(BuildEvent::Environment { message });
                    }
                    chosen
                })
            }
        };
        let rootfs = chosen.open(stack, scratch)?;
        for path in rootfs.left_out() {
            self.warn(format!(
                "the device {path:?} is not made here: this step does not see it, the image keeps it"
            ));
        }
        Ok(rootfs)
    }

    /// Whether there can be a root filesystem to run something in.
    fn check_world(&self) -> Result<(), NoRootfs> {
        match &*self.world {
            World::Root
            | World::MappedUser { .. }
            | World::SingleId { .. }
            | World::Chroot { .. } => Ok(()),
            World::None { reason, lack } => Err(NoRootfs {
                reason: format!("{reason}; nor can root do it without one: {lack}"),
                hint: lack.hint().or_else(|| reason.hint()),
            }),
        }
    }

    fn check_cancelled(&self) -> Result<(), Cancelled> {
        if self.cancel.is_cancelled() {
            Err(Cancelled)
        } else {
            Ok(())
        }
    }

    fn warn(&self, message: String) {
        self.progress.event(BuildEvent::Warning { message });
    }

    /// Runs blocking work on the pool for it.
    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> anyhow::Result<T> + Send + 'static,
    ) -> anyhow::Result<T> {
        tokio::task::spawn_blocking(work)
            .await
            .context("a task ended abnormally")?
    }

    /// The current time, or the epoch, for history. RFC 3339.
    fn now(&self) -> String {
        rfc3339(self.epoch)
    }
}

/// The build was stopped: by the user, or because another step failed.
#[derive(Debug, Error)]
#[error("stopped")]
pub struct Cancelled;

/// Pushing will not be allowed, so nothing is built.
#[derive(Debug, Error)]
#[error("checking that {repository} can be pushed to")]
pub struct PushDenied {
    /// Where.
    pub repository: Repository,
    /// What the registry says.
    #[source]
    pub source: RegistryError,
}

/// No sandbox works here.
#[derive(Clone, Debug, Error)]
#[error(transparent)]
pub struct SandboxUnavailable(pub Arc<SandboxError>);

/// Nothing can be run here: not in namespaces, and not without.
#[derive(Debug, Error)]
#[error(
    "a RUN step needs a root filesystem of its own, which takes a user namespace or root's chroot(2): {reason}"
)]
pub struct NoRootfs {
    /// Why there is none.
    pub reason: String,
    /// What to do about it.
    pub hint: Option<String>,
}

/// `epoch`, or the current time, as RFC 3339 in UTC.
pub(crate) fn rfc3339(epoch: Option<i64>) -> String {
    let time = epoch.and_then(|seconds| time::OffsetDateTime::from_unix_timestamp(seconds).ok());
    time.unwrap_or_else(time::OffsetDateTime::now_utc)
        .format(&time::format_description::well_known::Rfc3339)
        .expect("years from 1970 on have a text")
}
