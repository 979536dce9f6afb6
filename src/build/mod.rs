//! Performs a [`Plan`]: runs its graph, independent steps in parallel.
//!
//! Each step is a task that waits for the steps it needs. What a task gives is a
//! `Filesystem`: a list of layers that may still be remote, or still being sealed.

mod additions;
mod cache;
mod context_tree;
mod copy;
mod layer;
mod push;
mod run;
mod seal;
mod unpack;
mod user;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use futures_util::FutureExt as _;
use futures_util::future::{BoxFuture, Shared};
use thiserror::Error;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use crate::context::BuildContext;
use crate::image::{Digest, ImageLayer, Platform, Reference, Repository};
use crate::plan::{self, CopyFrom, Operation, Plan, Step, StepId};
use crate::progress::{BuildEvent, Progress, millis};
use crate::registry::{Client, RegistryError, Resolved};
use crate::sandbox::{self, Cancel, Sandbox, SandboxError, UsernsError, World};
use crate::store::Store;

use additions::{Additions, NewDirectory, own_time};
use cache::{Definition, Inputs, Record};
use layer::{Filesystem, Layer, SharedError};
use user::Accounts;

/// How many layers are fetched and unpacked at once. Unpacking is bound by CPU and disk;
/// more would only take memory.
const PARALLEL_UNPACKS: usize = 4;

/// A step's process ended with another status than 0.
#[derive(Debug, Error)]
#[error("process {command:?} did not complete successfully: exit code: {status}")]
pub struct StepFailed {
    /// The program and its arguments.
    pub command: String,
    /// The exit status; 128 + the signal where one ended it.
    pub status: i32,
    /// The end of what it printed.
    pub tail: String,
}

/// What a build is made with.
#[allow(missing_debug_implementations, reason = "holds trait objects")]
pub struct Settings {
    /// Where layers are kept.
    pub store: Arc<Store>,
    /// Where base images come from.
    pub client: Client,
    /// Where events go.
    pub progress: Arc<dyn Progress>,
    /// Ends the build when set.
    pub cancel: Cancel,
    /// What COPY and ADD see.
    pub context: Arc<BuildContext>,
    /// The base images, by [`plan::ImageId`].
    pub images: Vec<Resolved>,
    /// Which sandbox runs the steps.
    pub sandbox: sandbox::Choice,
    /// The powers that this process has.
    pub world: World,
    /// What the image is for.
    pub platform: Platform,
    /// Clamps times; seconds since 1970 UTC.
    pub epoch: Option<i64>,
    /// Whether steps are looked up in the cache.
    pub use_cache: bool,
    /// Whether the blobs of base images are kept when they are unpacked, because an
    /// output needs the bytes.
    pub keep_blobs: bool,
    /// The tags to push to, while steps still run.
    pub push: Vec<Reference>,
}

/// The layers that a build made.
#[derive(Debug)]
pub struct Built {
    /// The image's layers, base first.
    pub layers: Vec<ImageLayer>,
    /// For each layer above the base's, in order, when it was made; RFC 3339.
    pub created: Vec<String>,
    /// For each layer, where its blob can be fetched, if the store may not have it.
    pub origins: Vec<Option<Repository>>,
    /// Bytes of layers that were sent, by where to.
    pub uploaded_bytes: BTreeMap<Repository, u64>,
}

/// What all steps share.
pub(crate) struct Engine {
    store: Arc<Store>,
    client: Client,
    progress: Arc<dyn Progress>,
    cancel: Cancel,
    context: Arc<BuildContext>,
    images: Vec<Resolved>,
    sandbox_choice: sandbox::Choice,
    world: World,
    sandbox: OnceLock<Result<Box<dyn Sandbox>, Arc<SandboxError>>>,
    platform: Platform,
    epoch: Option<i64>,
    use_cache: bool,
    keep_blobs: bool,
    unpacking: Semaphore,
    timings: Arc<Timings>,
    push: push::Pusher,
    /// Each waits for a layer and records it in the cache.
    records: Mutex<JoinSet<()>>,
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

/// Performs `plan`.
///
/// # Errors
/// The first step that failed, with its place; the others are stopped and waited for.
pub async fn build(
    plan: &Plan,
    settings: Settings,
    timings: Arc<Timings>,
) -> anyhow::Result<Built> {
    let engine = Arc::new(Engine::new(settings, timings, wanted(plan)));
    engine.progress.event(BuildEvent::Planned {
        steps: plan.steps.len(),
    });
    let mut futures: Vec<StepFuture> = Vec::new();
    let mut tasks = JoinSet::new();
    for (index, step) in plan.steps.iter().enumerate() {
        let parent = step.parent.map(|id| futures[id.0].clone());
        let source = match &step.operation {
            Operation::Copy(copy) => copy.source_step.map(|id| futures[id.0].clone()),
            _ => None,
        };
        let task = perform(Arc::clone(&engine), index + 1, step.clone(), parent, source);
        let future = task.map(|result| result.map_err(Arc::new)).boxed().shared();
        futures.push(future.clone());
        tasks.spawn(future);
    }
    let mut failure = None;
    while let Some(joined) = tasks.join_next().await {
        let error = match joined {
            Ok(Ok(_)) => continue,
            Ok(Err(error)) => error,
            Err(error) => {
                Arc::new(anyhow::Error::new(error).context("a step's task ended abnormally"))
            }
        };
        // Later ones only repeat it, or say that they were stopped.
        if failure.is_none() {
            let is_wanted = !engine.cancel.is_cancelled();
            engine.cancel.cancel();
            failure = Some((error, is_wanted));
        }
    }
    if let Some((error, is_wanted)) = failure {
        engine.push.abandon().await;
        // What went well need not be done again when the rest is mended; only a user who
        // stops the build does not wait for that.
        engine.finish_records(is_wanted).await;
        return Err(unshare(&error));
    }
    let filesystem = match plan.result {
        Some(StepId(result)) => futures[result].clone().await.map_err(|e| unshare(&e))?,
        None => Filesystem::default(),
    };
    let layers = filesystem.names().await.map_err(|e| unshare(&e));
    let uploaded = match &layers {
        Ok(_) => engine.push.finish(&engine, &filesystem).await,
        Err(_) => Ok(BTreeMap::new()),
    };
    engine.push.abandon().await;
    engine.finish_records(!engine.cancel.is_cancelled()).await;
    let (layers, uploaded_bytes) = (layers?, uploaded?);
    Ok(Built {
        created: filesystem
            .layers
            .iter()
            .filter_map(|l| l.created.clone())
            .collect(),
        origins: filesystem
            .layers
            .iter()
            .map(|l| l.origin().cloned())
            .collect(),
        layers,
        uploaded_bytes,
    })
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

/// The numbers of the steps whose layers the result has.
fn wanted(plan: &Plan) -> BTreeSet<usize> {
    let parent = |id: &StepId| plan.steps[id.0].parent;
    std::iter::successors(plan.result, parent)
        .map(|id| id.0 + 1)
        .collect()
}

impl Engine {
    fn new(settings: Settings, timings: Arc<Timings>, wanted: BTreeSet<usize>) -> Self {
        Self {
            push: push::Pusher::new(&settings.push, wanted),
            store: settings.store,
            client: settings.client,
            progress: settings.progress,
            cancel: settings.cancel,
            context: settings.context,
            images: settings.images,
            sandbox_choice: settings.sandbox,
            world: settings.world,
            sandbox: OnceLock::new(),
            platform: settings.platform,
            epoch: settings.epoch,
            use_cache: settings.use_cache,
            keep_blobs: settings.keep_blobs,
            unpacking: Semaphore::new(PARALLEL_UNPACKS),
            timings,
            records: Mutex::default(),
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

    /// The sandbox, chosen when the first step needs it. Blocking.
    fn sandbox(&self) -> anyhow::Result<&dyn Sandbox> {
        self.check_world()?;
        let chosen = self.sandbox.get_or_init(|| {
            let sandbox = sandbox::choose(self.sandbox_choice).map_err(Arc::new)?;
            let message = format!("RUN steps run in {}", sandbox.name());
            self.progress.event(BuildEvent::Environment { message });
            for note in sandbox.notes() {
                self.progress
                    .event(BuildEvent::Environment { message: note });
            }
            Ok(sandbox)
        });
        match chosen {
            Ok(sandbox) => Ok(sandbox.as_ref()),
            Err(error) => Err(SandboxUnavailable(Arc::clone(error)).into()),
        }
    }

    /// Whether layers can be unpacked with their owners, and mounted.
    fn check_world(&self) -> Result<(), NoRootfs> {
        match &self.world {
            World::Root | World::MappedUser { .. } => Ok(()),
            World::SingleId { reason } | World::None { reason } => Err(NoRootfs {
                reason: format!("{reason}"),
                hint: UsernsError::hint(reason),
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
#[error("{0}")]
pub struct SandboxUnavailable(pub Arc<SandboxError>);

/// This user cannot have a root filesystem with several owners here.
#[derive(Debug, Error)]
#[error(
    "a step needs the layers below it unpacked with their owners, which needs a user namespace with subordinate IDs: {reason}"
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

/// Performs one step once the steps that it needs have ended.
async fn perform(
    engine: Arc<Engine>,
    number: usize,
    step: Step,
    parent: Option<StepFuture>,
    source: Option<StepFuture>,
) -> anyhow::Result<Filesystem> {
    let wait = |future: Option<StepFuture>| async move {
        match future {
            Some(future) => future.await.map_err(|error| unshare(&error)),
            None => Ok(Filesystem::default()),
        }
    };
    let (parent, source) = futures_util::future::try_join(wait(parent), wait(source)).await?;
    engine.check_cancelled()?;
    let started = Instant::now();
    let result = dispatch(&engine, number, &step, &parent, &source).await;
    let duration_ms = millis(started.elapsed());
    match result {
        Ok((filesystem, cached)) => {
            engine.progress.event(BuildEvent::StepDone {
                step: number,
                cached,
                duration_ms,
            });
            engine.push.start(&engine, number, &filesystem);
            Ok(filesystem)
        }
        // Not the step's fault, so neither its failure nor its place.
        Err(error) if error.is::<PushDenied>() => Err(error),
        Err(error) => {
            let message = format!("{error:#}");
            engine.progress.event(BuildEvent::StepFailed {
                step: number,
                duration_ms,
                message,
            });
            Err(error.context(step.place.clone()))
        }
    }
}

async fn dispatch(
    engine: &Arc<Engine>,
    number: usize,
    step: &Step,
    parent: &Filesystem,
    source: &Filesystem,
) -> anyhow::Result<(Filesystem, bool)> {
    let started = || {
        engine.progress.event(BuildEvent::StepStarted {
            step: number,
            name: step.name.clone(),
        });
    };
    match &step.operation {
        Operation::Image(image) => {
            started();
            let resolved = &engine.images[image.0];
            let origin = resolved.reference.repository();
            let layers = resolved
                .manifest
                .layers
                .iter()
                .zip(&resolved.config.rootfs.diff_ids);
            let layers = layers.map(|(descriptor, diff_id)| {
                let names = ImageLayer {
                    diff_id: diff_id.clone(),
                    descriptor: descriptor.clone(),
                };
                Arc::new(Layer::remote(names, origin.clone()))
            });
            Ok((
                Filesystem {
                    layers: layers.collect(),
                },
                false,
            ))
        }
        Operation::Run(run) => {
            // The epoch clamps the times in the layer.
            let what = (run, engine.platform.to_string(), engine.epoch);
            let cached =
                Cached::look_up(engine, step, Definition::new("run", &what), parent, None).await?;
            started();
            cached
                .or_make(engine, parent, || run_step(engine, number, run, parent))
                .await
        }
        Operation::MakeDirectory(directory) => {
            let definition = Definition::new("mkdir", &(directory, engine.epoch));
            let cached = Cached::look_up(engine, step, definition, parent, None).await?;
            started();
            cached
                .or_make(engine, parent, || make_directory(engine, directory, parent))
                .await
        }
        Operation::Copy(copy) => copy_step(engine, number, step, copy, parent, source).await,
    }
}

/// The state of a step's look-up in the cache.
struct Cached {
    definition: Definition,
    name: String,
    /// The layers of the filesystem that is read, and the digest of what is read of it.
    content: Option<(Option<Digest>, Digest)>,
    /// What `content` was made of, where it can change meanwhile.
    snapshot: Option<copy::Snapshot>,
    record: Option<Record>,
}

impl Cached {
    /// Looks a step up by its definition and what is below it.
    ///
    /// Where no record has the definition, there is nothing to wait for: the step may run
    /// while the layers below are still being sealed.
    async fn look_up(
        engine: &Arc<Engine>,
        step: &Step,
        definition: Definition,
        parent: &Filesystem,
        content: Option<(Option<Digest>, Digest)>,
    ) -> anyhow::Result<Self> {
        let mut cached = Self {
            definition,
            name: step.name.clone(),
            content,
            snapshot: None,
            record: None,
        };
        if engine.use_cache && cache::has_definition(&engine.store, &cached.definition) {
            let inputs = cached.inputs(parent).await?;
            cached.record = inputs
                .iter()
                .find_map(|inputs| cache::look_up(&engine.store, &cached.definition, inputs));
        }
        Ok(cached)
    }

    /// The cached layer on top of `parent`, or what `make` makes, which is then recorded.
    async fn or_make<F>(
        self,
        engine: &Arc<Engine>,
        parent: &Filesystem,
        make: impl FnOnce() -> F,
    ) -> anyhow::Result<(Filesystem, bool)>
    where
        F: Future<Output = anyhow::Result<Layer>>,
    {
        if let Some(record) = self.record {
            let names = ImageLayer {
                diff_id: record.diff_id,
                descriptor: record.descriptor,
            };
            let layer = Layer::sealed(names, Some(record.created));
            return Ok((parent.with(Arc::new(layer)), true));
        }
        engine.push.check(engine).await?;
        let layer = Arc::new(make().await?);
        self.record_later(engine, parent, &layer);
        Ok((parent.with(layer), false))
    }

    /// What the step is applied to, in the ways in which it may be found again.
    async fn inputs(&self, parent: &Filesystem) -> anyhow::Result<Vec<Inputs>> {
        let parent = parent.chain().await.map_err(|error| unshare(&error))?;
        let Some((source, content)) = &self.content else {
            return Ok(vec![Inputs {
                parent,
                source: None,
                content: None,
            }]);
        };
        let by_content = Inputs {
            parent: parent.clone(),
            source: None,
            content: Some(content.clone()),
        };
        let by_source = source.clone().map(|source| Inputs {
            parent,
            source: Some(source),
            content: None,
        });
        Ok(by_source.into_iter().chain([by_content]).collect())
    }

    /// Records the layer when it is sealed.
    fn record_later(self, engine: &Arc<Engine>, parent: &Filesystem, layer: &Arc<Layer>) {
        let (shared, parent, layer) = (Arc::clone(engine), parent.clone(), Arc::clone(layer));
        let recording = async move {
            let engine = shared;
            // A failure to seal is the build's error; it needs no record.
            let (Ok(names), Ok(inputs)) = (layer.names().await, self.inputs(&parent).await) else {
                return;
            };
            // The bytes in the layer are not those of the digest that it would be found by.
            if let Some(path) = self.snapshot.as_ref().and_then(copy::Snapshot::changed) {
                engine.warn(format!(
                    "{path:?} changed while it was copied; the step {:?} is not cached",
                    self.name
                ));
                return;
            }
            for inputs in inputs {
                let record = Record::new(
                    &self.definition,
                    inputs,
                    self.name.clone(),
                    layer.created.clone().unwrap_or_default(),
                    names.diff_id.clone(),
                    names.descriptor.clone(),
                );
                if let Err(error) = cache::record(&engine.store, &self.definition, &record) {
                    engine.warn(format!(
                        "the step {:?} is not cached: {:#}",
                        self.name,
                        anyhow::Error::new(error)
                    ));
                }
            }
        };
        engine
            .records
            .lock()
            .expect("nothing panics while it holds this lock")
            .spawn(recording);
    }
}

async fn run_step(
    engine: &Arc<Engine>,
    number: usize,
    run: &plan::Run,
    parent: &Filesystem,
) -> anyhow::Result<Layer> {
    // Before anything is pulled for it: without a sandbox it is all in vain.
    let shared = Arc::clone(engine);
    engine
        .blocking(move || shared.sandbox().map(|_| ()))
        .await?;
    let below = parent
        .stack(engine)
        .await
        .map_err(|error| unshare(&error))?;
    engine.push.start(engine, number, parent);
    let (shared, what, lower) = (Arc::clone(engine), run.clone(), below.clone());
    let tree = engine
        .blocking(move || run::run(&shared, &what, number, &lower))
        .await?;
    let sealing = seal::seal_tree(engine, &tree, below);
    Ok(Layer::sealing(sealing, Some(tree), engine.now()))
}

async fn make_directory(
    engine: &Arc<Engine>,
    directory: &plan::MakeDirectory,
    parent: &Filesystem,
) -> anyhow::Result<Layer> {
    let below = parent
        .stack(engine)
        .await
        .map_err(|error| unshare(&error))?;
    let (directory, epoch) = (directory.clone(), engine.epoch);
    let changes = engine.blocking(move || {
        let accounts = Accounts::read(&below).context("reading the image's accounts")?;
        let account = accounts
            .user(&directory.user)
            .map_err(|reason| anyhow::anyhow!("USER {}: {reason}", directory.user))?;
        let new_directory = NewDirectory {
            owner: (account.user.uid, account.user.gid),
            mode: 0o755,
            mtime: own_time(epoch),
        };
        let mut additions = Additions::new(&below, new_directory);
        let path = additions.resolve(Path::new(&directory.path))?;
        let exists = additions
            .file_type(&path)?
            .is_some_and(|found| found.is_dir());
        if !exists {
            additions
                .make_directory(&path)
                .with_context(|| format!("making the directory {}", directory.path))?;
        }
        Ok(additions.into_changes())
    });
    let sealing = seal::seal_changes(engine, changes.await?);
    Ok(Layer::sealing(sealing, None, engine.now()))
}

async fn copy_step(
    engine: &Arc<Engine>,
    number: usize,
    step: &Step,
    copy: &plan::Copy,
    parent: &Filesystem,
    source: &Filesystem,
) -> anyhow::Result<(Filesystem, bool)> {
    let definition = Definition::new("copy", &(&copy.definition, engine.epoch));
    let started = || {
        engine.progress.event(BuildEvent::StepStarted {
            step: number,
            name: step.name.clone(),
        });
    };
    let source_chain = match copy.from {
        CopyFrom::Context => None,
        CopyFrom::Step => source.chain().await.map_err(|error| unshare(&error))?,
    };
    // Where the source's layers are those of last time, nothing needs to be read.
    if let Some(source_chain) = &source_chain
        && engine.use_cache
        && cache::has_definition(&engine.store, &definition)
    {
        let parent_chain = parent.chain().await.map_err(|error| unshare(&error))?;
        let inputs = Inputs {
            parent: parent_chain,
            source: Some(source_chain.clone()),
            content: None,
        };
        if let Some(record) = cache::look_up(&engine.store, &definition, &inputs) {
            started();
            let names = ImageLayer {
                diff_id: record.diff_id,
                descriptor: record.descriptor,
            };
            let layer = Layer::sealed(names, Some(record.created));
            return Ok((parent.with(Arc::new(layer)), true));
        }
    }
    started();
    let (tree, place): (Arc<dyn copy::SourceTree>, _) = match copy.from {
        CopyFrom::Context => (
            Arc::new(context_tree::ContextTree(Arc::clone(&engine.context))),
            "the build context",
        ),
        CopyFrom::Step => {
            let stack = source
                .stack(engine)
                .await
                .map_err(|error| unshare(&error))?;
            (Arc::new(stack), "the stage or image copied from")
        }
    };
    let (what, copy_from) = (copy.definition.clone(), copy.from);
    let (selection, snapshot, content) = engine
        .blocking(move || {
            let selection = copy::select(&what, tree, place)?;
            let snapshot = (copy_from == CopyFrom::Context).then(|| selection.snapshot());
            let content = selection.content_digest(what.keep_owner)?;
            Ok((selection, snapshot, content))
        })
        .await?;
    let content = Some((source_chain, content));
    let mut cached = Cached::look_up(engine, step, definition, parent, content).await?;
    cached.snapshot = snapshot;
    cached
        .or_make(engine, parent, || {
            place_copy(engine, step, copy, selection, parent)
        })
        .await
}

async fn place_copy(
    engine: &Arc<Engine>,
    step: &Step,
    copy: &plan::Copy,
    selection: copy::Selection,
    parent: &Filesystem,
) -> anyhow::Result<Layer> {
    let below = parent
        .stack(engine)
        .await
        .map_err(|error| unshare(&error))?;
    let (what, place, shared) = (
        copy.definition.clone(),
        step.place.clone(),
        Arc::clone(engine),
    );
    let changes = engine.blocking(move || {
        let owner = match &what.chown {
            Some(chown) => Some(owner(&shared, &below, chown, &place)?),
            None => None,
        };
        let spool = shared.store.tmp_dir("add-")?;
        Ok(copy::place(
            selection,
            &what,
            &below,
            owner,
            shared.epoch,
            &spool,
        )?)
    });
    let sealing = seal::seal_changes(engine, changes.await?);
    Ok(Layer::sealing(sealing, None, engine.now()))
}

/// `--chown` in numbers.
///
/// A name that the image does not know is 0:0 in BuildKit; images are built that way
/// today, so it stays so, but not silently.
fn owner(
    engine: &Engine,
    below: &crate::rootfs::Stack,
    chown: &str,
    place: &str,
) -> anyhow::Result<(u32, u32)> {
    let accounts = Accounts::read(below).context("reading the image's accounts")?;
    match accounts.owner(chown) {
        Ok(owner) => Ok(owner),
        Err(reason) if accounts.is_empty() => anyhow::bail!("--chown={chown}: {reason}"),
        Err(reason) => {
            engine.warn(format!(
                "{place}: --chown={chown}: {reason}; the files belong to 0:0"
            ));
            Ok((0, 0))
        }
    }
}
