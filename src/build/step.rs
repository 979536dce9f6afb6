//! One step: look it up in the cache, or do it; what it gives is a filesystem.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use anyhow::Context as _;
use futures_util::future::{try_join, try_join_all};

use super::additions::{Additions, NewDirectory, own_time};
use super::below::Below;
use super::cache::{Definition, Hit, Inputs, LostLayer, Record};
use super::content::ContentManifest;
use super::explain::{Looked, MadeBy};
use super::layer::{Filesystem, Layer};
use super::remote::{self, Fetched};
use super::twins::{Made, Turn};
use super::user::{Accounts, Owner};
use super::{Engine, PushDenied, StepFuture, StepPlace, copy, mounts, run, seal, unshare};
use crate::image::{Digest, ImageLayer};
use crate::plan::{self, CopyFrom, CopySource, Operation, Step};
use crate::progress::{BuildEvent, Progress, millis};
use crate::rootfs::{Change, Listing, Stack};

/// Performs one step once the steps that it needs have ended.
pub(super) async fn perform(
    engine: Arc<Engine>,
    number: usize,
    step: Step,
    parent: Option<StepFuture>,
    sources: Vec<StepFuture>,
) -> anyhow::Result<Filesystem> {
    let wait = |future: Option<StepFuture>| async move {
        match future {
            Some(future) => future.await.map_err(|error| unshare(&error)),
            None => Ok(Filesystem::default()),
        }
    };
    // What is linked on top of its parent is made without it.
    let is_linked = matches!(&step.operation, Operation::Copy(copy) if copy.definition.link);
    let (parent, later) = if is_linked {
        (None, parent)
    } else {
        (parent, None)
    };
    let sources = try_join_all(sources.into_iter().map(|source| wait(Some(source))));
    let (parent, sources) = try_join(wait(parent), sources).await?;
    engine.check_cancelled()?;
    let started = Instant::now();
    let beginning = Beginning::new(&engine, number, &step);
    let result = dispatch(&engine, &beginning, &parent, &sources).await;
    let duration_ms = millis(started.elapsed());
    match result {
        Ok((filesystem, cached)) => {
            engine.progress.event(BuildEvent::StepDone {
                step: number,
                cached,
                duration_ms,
            });
            if let Some(made) = filesystem.layers.last() {
                // Layers of images have said it already.
                let _ = made.made_by.set(MadeBy::Step(step.name.clone()));
            }
            let filesystem = wait(later).await?.with_all(filesystem);
            engine.push.start(&engine, number, &filesystem);
            Ok(filesystem)
        }
        // Not the step's fault, so neither its failure nor its place.
        Err(error) if error.is::<PushDenied>() || LostLayer::of(&error).is_some() => Err(error),
        Err(error) => {
            let message = format!("{error:#}");
            beginning.tell();
            engine.progress.event(BuildEvent::StepFailed {
                step: number,
                duration_ms,
                message,
            });
            Err(error.context(StepPlace(step.place.clone())))
        }
    }
}

/// Tells once that a step has begun: when it is known whether the cache has it, or that it
/// failed before.
struct Beginning<'s> {
    progress: &'s dyn Progress,
    number: usize,
    step: &'s Step,
    told: AtomicBool,
}

impl<'s> Beginning<'s> {
    fn new(engine: &'s Engine, number: usize, step: &'s Step) -> Self {
        Self {
            progress: &*engine.progress,
            number,
            step,
            told: AtomicBool::new(false),
        }
    }

    fn tell(&self) {
        if !self.told.swap(true, Ordering::Relaxed) {
            self.progress.event(BuildEvent::StepStarted {
                step: self.number,
                name: self.step.name.clone(),
            });
        }
    }
}

async fn dispatch(
    engine: &Arc<Engine>,
    beginning: &Beginning<'_>,
    parent: &Filesystem,
    sources: &[Filesystem],
) -> anyhow::Result<(Filesystem, bool)> {
    let step = beginning.step;
    match &step.operation {
        Operation::Image(image) => {
            beginning.tell();
            let super::BaseImage { resolved, origin } = &engine.images[image.0];
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
                let layer = Layer::remote(names, origin.clone());
                let made_by = MadeBy::Image {
                    reference: resolved.reference.to_string(),
                    digest: resolved.raw.digest.to_string(),
                };
                // It is new: nobody has said it yet.
                let _ = layer.made_by.set(made_by);
                layer
            });
            Ok((
                Filesystem {
                    layers: layers.map(Arc::new).collect(),
                },
                false,
            ))
        }
        Operation::Run(run) => run_cached(engine, beginning, run, parent, sources).await,
        Operation::MakeDirectory(directory) => {
            let search = Search::begin(engine, beginning, parent, None).await?;
            let cached = Cached::look_up(engine, beginning, search, parent, None).await?;
            beginning.tell();
            cached
                .or_make(engine, parent, || {
                    make_directory(engine, beginning, directory, parent)
                })
                .await
        }
        Operation::Copy(copy) => {
            let nothing = Filesystem::default();
            let source = sources.first().unwrap_or(&nothing);
            copy_step(engine, beginning, copy, parent, source).await
        }
    }
}

/// What a step is, independent of what it is applied to; absent for an image.
pub(super) fn definition(step: &Step, epoch: Option<i64>) -> Option<Definition> {
    // The epoch clamps the times in the layer.
    Some(match &step.operation {
        Operation::Image(_) => return None,
        Operation::Run(run) => Definition::new("run", &(run, step.platform.to_string(), epoch)),
        Operation::MakeDirectory(directory) => Definition::new("mkdir", &(directory, epoch)),
        Operation::Copy(copy) => {
            // Checksums are checked whenever something is fetched and change nothing in what is
            // copied.
            let mut what = copy.definition.clone();
            for source in &mut what.sources {
                if let CopySource::Url { checksum, .. } | CopySource::Git { checksum, .. } = source
                {
                    *checksum = None;
                }
            }
            Definition::new("copy", &(&what, epoch))
        }
    })
}

/// Looks for the record of a step.
struct Search {
    number: usize,
    use_cache: bool,
    definition: Definition,
    /// Kept until the step is recorded. Absent where no other step of the build may be equal.
    turn: Option<Turn>,
}

impl Search {
    /// Begins to look for a step on `parent` that reads the layers `source`, where these say
    /// all that it reads. Where an equal step is under way, waits until it is recorded.
    async fn begin(
        engine: &Engine,
        beginning: &Beginning<'_>,
        parent: &Filesystem,
        source: Option<&Digest>,
    ) -> anyhow::Result<Self> {
        let step = beginning.step;
        let definition = definition(step, engine.epoch).context("an image is not looked up")?;
        let mut turn = None;
        if engine.twins.has(&definition) {
            let inputs = Inputs {
                parent: parent.chain().await.map_err(|error| unshare(&error))?,
                source: source.cloned(),
                content: None,
            };
            turn = Some(engine.twins.turn(&definition, &inputs).await);
            engine.check_cancelled()?;
        }
        Ok(Self {
            number: beginning.number,
            use_cache: step.use_cache,
            definition,
            turn,
        })
    }

    /// What an equal step of this build made.
    fn made(&self) -> Option<&Made> {
        self.turn.as_ref()?.as_ref()
    }

    /// Whether any record could be the one of the step on `parent`, so that it pays to wait for
    /// what it is looked up by: the names of layers that are being sealed, what it reads.
    async fn may_find(&self, engine: &Engine, parent: &Filesystem) -> bool {
        let may_have = || engine.may_have(&self.definition, parent.known());
        self.made().is_some() || (self.use_cache && may_have().await)
    }

    /// The record of the step on these inputs.
    async fn find(&self, engine: &Engine, inputs: &Inputs) -> Option<Hit> {
        let is_of = |made: &&Made| {
            let keys = inputs.keys();
            let mut keys = keys.iter();
            keys.any(|key| made.record.is_of(&self.definition, key))
        };
        match self.made().filter(is_of) {
            Some(made) => Some(Hit::made(made)),
            None if self.use_cache => engine.look_up(&self.definition, inputs).await,
            None => None,
        }
    }

    /// The cached layer of a step that reads filesystems of these layers, where nothing else
    /// needs to be read to know that it is the one.
    async fn find_by_layers(
        &self,
        engine: &Engine,
        parent: &Filesystem,
        layers: Option<&Digest>,
    ) -> anyhow::Result<Option<Arc<Layer>>> {
        let Some(layers) = layers else {
            return Ok(None);
        };
        if !self.may_find(engine, parent).await {
            return Ok(None);
        }
        let inputs = Inputs {
            parent: parent.chain().await.map_err(|error| unshare(&error))?,
            source: Some(layers.clone()),
            content: None,
        };
        let hit = self.find(engine, &inputs).await;
        Ok(hit.map(|hit| engine.layer_of((self.number, &self.definition), inputs, hit)))
    }
}

/// The state of a step's look-up in the cache.
struct Cached {
    search: Search,
    name: String,
    reads: Option<Reads>,
    hit: Option<Hit>,
    /// What `--explain` says.
    explanation: Vec<String>,
}

/// What a step reads beside the layers below it.
struct Reads {
    /// The layers of the filesystem that is read, where they say all.
    layers: Option<Digest>,
    /// What is read of it, as far as it was found out before. Absent where no record can
    /// match: then nothing is read ahead.
    ahead: Option<ContentManifest>,
    /// What was read of it in the end; `None` where it changed so that nobody can say.
    /// Blocking.
    #[allow(clippy::type_complexity, reason = "it is called in one place")]
    finally: Box<dyn FnOnce() -> anyhow::Result<Option<ContentManifest>> + Send + Sync>,
}

impl Cached {
    /// Looks a step up by its definition and what is below it.
    ///
    /// Where no record has the definition on layers that these may be, there is nothing to wait
    /// for: the step may run while the layers below are still being sealed.
    async fn look_up(
        engine: &Arc<Engine>,
        beginning: &Beginning<'_>,
        search: Search,
        parent: &Filesystem,
        reads: Option<Reads>,
    ) -> anyhow::Result<Self> {
        let step = beginning.step;
        let mut cached = Self {
            search,
            name: step.name.clone(),
            reads,
            hit: None,
            explanation: Vec::new(),
        };
        let is_known = cached
            .reads
            .as_ref()
            .is_none_or(|reads| reads.ahead.is_some());
        if is_known && cached.search.may_find(engine, parent).await {
            let inputs = cached.inputs(parent).await?;
            cached.hit = cached.search.find(engine, &inputs).await;
        }
        if engine.explaining.is_some() {
            cached.explanation = cached.explain(engine, step, parent).await?;
        }
        Ok(cached)
    }

    /// By what the step was found, or why not.
    async fn explain(
        &mut self,
        engine: &Arc<Engine>,
        step: &Step,
        parent: &Filesystem,
    ) -> anyhow::Result<Vec<String>> {
        if self.hit.is_some() {
            let reads = if self.reads.is_some() {
                "the same definition and content on the same layers"
            } else {
                "the same definition on the same layers"
            };
            return Ok(vec![reads.to_owned()]);
        }
        if !step.use_cache {
            return Ok(vec![
                "--no-cache or --no-cache-filter has it done anew".to_owned(),
            ]);
        }
        let now = Looked {
            name: self.name.clone(),
            definition: self.search.definition.value().clone(),
            below: Some(parent.in_words().await.map_err(|error| unshare(&error))?),
        };
        let arguments = match &step.operation {
            Operation::Run(run) => run.arguments.clone(),
            _ => BTreeSet::new(),
        };
        let content = self.reads.as_mut().and_then(|reads| reads.ahead.take());
        let shared = Arc::clone(engine);
        let explaining = move || {
            let explaining = shared.explaining.as_ref();
            let reasons = explaining.map(|explaining| {
                explaining.miss(&shared.store, &now, &arguments, content.as_ref())
            });
            Ok((reasons.unwrap_or_default(), content))
        };
        let (reasons, content) = engine.blocking(explaining).await?;
        if let Some(reads) = &mut self.reads {
            reads.ahead = content;
        }
        Ok(reasons)
    }

    /// The cached layer on top of `parent`, or what `make` makes, which is then recorded.
    async fn or_make<F>(
        mut self,
        engine: &Arc<Engine>,
        parent: &Filesystem,
        make: impl FnOnce() -> F,
    ) -> anyhow::Result<(Filesystem, bool)>
    where
        F: Future<Output = anyhow::Result<Layer>>,
    {
        let explanation = std::mem::take(&mut self.explanation);
        engine.explain(
            self.search.number,
            &self.name,
            self.hit.is_some(),
            explanation,
        );
        if let Some(hit) = self.hit.take() {
            // Files that were touched and are the same need not be read again.
            let saving = Arc::clone(engine);
            let save = move || saving.stat_caches.save(&saving.store);
            engine
                .records
                .lock()
                .expect("nothing panics while it holds this lock")
                .spawn_blocking(save);
            let inputs = self.inputs(parent).await?;
            let step = (self.search.number, &self.search.definition);
            let layer = engine.layer_of(step, inputs, hit);
            return Ok((parent.with(layer), true));
        }
        engine.push.check(engine).await?;
        let layer = Arc::new(make().await?);
        self.record_later(engine, parent, &layer);
        Ok((parent.with(layer), false))
    }

    /// What the step is applied to, as far as it is known before it is done.
    async fn inputs(&self, parent: &Filesystem) -> anyhow::Result<Inputs> {
        let reads = self.reads.as_ref();
        let content = reads.and_then(|reads| reads.ahead.as_ref());
        Ok(Inputs {
            parent: parent.chain().await.map_err(|error| unshare(&error))?,
            source: reads.and_then(|reads| reads.layers.clone()),
            content: content.map(ContentManifest::digest),
        })
    }

    /// Records the layer when it is sealed.
    fn record_later(self, engine: &Arc<Engine>, parent: &Filesystem, layer: &Arc<Layer>) {
        let (shared, parent, layer) = (Arc::clone(engine), parent.clone(), Arc::clone(layer));
        let recording = async move {
            let engine = shared;
            // A failure to seal is the build's error; it needs no record.
            let Ok(names) = layer.names().await else {
                return;
            };
            let (mut layers, mut content) = (None, None);
            if let Some(reads) = self.reads {
                let saving = Arc::clone(&engine);
                let kept = engine.blocking(move || {
                    let manifest = (reads.finally)();
                    saving.stat_caches.save(&saving.store);
                    Ok(manifest?.map(|manifest| saving.keep_content(&manifest)))
                });
                match kept.await {
                    Ok(Some(digest)) => content = Some(digest),
                    Ok(None) => {
                        engine.warn(format!(
                            "files changed while they were read; the step {:?} is not cached",
                            self.name
                        ));
                        return;
                    }
                    Err(error) => {
                        engine.warn(format!("the step {:?} is not cached: {error:#}", self.name));
                        return;
                    }
                }
                layers = reads.layers;
            }
            let (Ok(below), Ok(parent)) = (parent.in_words().await, parent.chain().await) else {
                return;
            };
            let inputs = Inputs {
                parent,
                source: layers,
                content,
            };
            let Search {
                number,
                definition,
                turn,
                ..
            } = self.search;
            let record = Record::new(
                &definition,
                inputs,
                self.name.clone(),
                layer.created.clone().unwrap_or_default(),
                names.diff_id,
                names.descriptor,
            )
            .on(below);
            engine.record(number, &definition, record.clone());
            if let Some(mut turn) = turn {
                *turn = Some(Made { record, layer });
            }
        };
        engine
            .records
            .lock()
            .expect("nothing panics while it holds this lock")
            .spawn(recording);
    }
}

async fn run_cached(
    engine: &Arc<Engine>,
    beginning: &Beginning<'_>,
    run: &plan::Run,
    parent: &Filesystem,
    sources: &[Filesystem],
) -> anyhow::Result<(Filesystem, bool)> {
    let (number, step) = (beginning.number, beginning.step);
    let mut chains = Vec::new();
    for source in sources {
        chains.push(source.chain().await.map_err(|error| unshare(&error))?);
    }
    // Layers say all there is to say, unless files of a context are mounted too.
    let reads_context = mounts::reads_context(run);
    let layers = (!sources.is_empty() && !reads_context).then(|| joined(&chains));
    let search = Search::begin(engine, beginning, parent, layers.as_ref()).await?;
    let mut mounted = Vec::new();
    let mut reads = None;
    if !sources.is_empty() || reads_context {
        let found = search.find_by_layers(engine, parent, layers.as_ref());
        if let Some(layer) = found.await? {
            beginning.tell();
            explain_layers(engine, beginning);
            return Ok((parent.with(layer), true));
        }
        for (source, chain) in sources.iter().zip(chains) {
            let stack = source
                .stack(engine)
                .await
                .map_err(|error| unshare(&error))?;
            mounted.push(mounts::Source { stack, chain });
        }
        let (shared, what, read) = (Arc::clone(engine), run.clone(), mounted.clone());
        let shown = engine.blocking(move || mounts::shown(&shared, &what, &read));
        let shown = Arc::new(shown.await?);
        let mut ahead = None;
        if search.may_find(engine, parent).await {
            let shown = Arc::clone(&shown);
            ahead = engine.blocking(move || shown.manifest()).await?;
        }
        reads = Some(Reads {
            layers,
            ahead,
            finally: Box::new(move || shown.manifest()),
        });
    }
    let cached = Cached::look_up(engine, beginning, search, parent, reads).await?;
    beginning.tell();
    cached
        .or_make(engine, parent, || {
            run_step(engine, number, step, run, parent, mounted)
        })
        .await
}

/// Says that a step was found without reading anything.
fn explain_layers(engine: &Engine, beginning: &Beginning<'_>) {
    let reason = "the same definition, reading the same layers on the same layers".to_owned();
    engine.explain(beginning.number, &beginning.step.name, true, vec![reason]);
}

/// One digest for several filesystems.
fn joined(chains: &[Option<Digest>]) -> Digest {
    let texts: Vec<&str> = chains
        .iter()
        .map(|chain| chain.as_ref().map_or("", Digest::as_str))
        .collect();
    Digest::of(texts.join("\n").as_bytes())
}

async fn run_step(
    engine: &Arc<Engine>,
    number: usize,
    step: &Step,
    run: &plan::Run,
    parent: &Filesystem,
    sources: Vec<mounts::Source>,
) -> anyhow::Result<Layer> {
    // Trying the sandbox takes as long as pulling much of an image. Without one it is all in
    // vain, and ends at once.
    let shared = Arc::clone(engine);
    let sandbox = engine.blocking(move || shared.sandbox().map(|_| ()));
    let below = async { parent.stack(engine).await.map_err(|error| unshare(&error)) };
    let ((), below) = tokio::try_join!(sandbox, below)?;
    engine.push.start(engine, number, parent);
    let slot = engine.slots.take(&engine.cancel).await?;
    let (shared, what, lower) = (Arc::clone(engine), run.clone(), below.clone());
    let platform = step.platform.clone();
    let tree = engine
        .blocking(move || run::run(&shared, &what, (number, &platform), &lower, &sources, slot))
        .await?;
    let sealing = seal::seal_tree(engine, &tree, below, parent);
    Ok(Layer::sealing(sealing, Some(tree), engine.now()))
}

async fn make_directory(
    engine: &Arc<Engine>,
    beginning: &Beginning<'_>,
    directory: &plan::MakeDirectory,
    parent: &Filesystem,
) -> anyhow::Result<Layer> {
    let below = parent.below(engine, beginning.number).await?;
    let place = beginning.step.place.clone();
    let (directory, shared) = (directory.clone(), Arc::clone(engine));
    let changes = engine.blocking(move || {
        // BuildKit reads USER as it reads --chown here: a number without a group is both.
        let owner = owner(&shared, &below, ("USER ", &directory.user), &place)?;
        let new_directory = NewDirectory {
            owner,
            mode: 0o755,
            mtime: own_time(shared.epoch),
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
    Ok(seal_listed(engine, beginning, changes.await?))
}

async fn copy_step(
    engine: &Arc<Engine>,
    beginning: &Beginning<'_>,
    copy: &plan::Copy,
    parent: &Filesystem,
    source: &Filesystem,
) -> anyhow::Result<(Filesystem, bool)> {
    let step = beginning.step;
    let source_chain = match copy.from {
        CopyFrom::Context(_) => None,
        CopyFrom::Step => source.chain().await.map_err(|error| unshare(&error))?,
    };
    let search = Search::begin(engine, beginning, parent, source_chain.as_ref()).await?;
    // Where the source's layers are those of last time, nothing needs to be read.
    let found = search.find_by_layers(engine, parent, source_chain.as_ref());
    if let Some(layer) = found.await? {
        beginning.tell();
        explain_layers(engine, beginning);
        return Ok((parent.with(layer), true));
    }
    beginning.tell();
    let fetched = fetch_sources(engine, copy).await?;
    let has_paths = |sources: &[CopySource]| {
        let is_path = |source: &_| matches!(source, CopySource::Path(_));
        sources.iter().any(is_path)
    };
    let (tree, place): (Arc<dyn copy::SourceTree>, _) = match copy.from {
        // Without a path, a context may not even be there.
        _ if !has_paths(&copy.definition.sources) => (Arc::new(Stack::new(Vec::new())), "nothing"),
        CopyFrom::Context(context) => {
            let shared = Arc::clone(engine);
            let tree = engine.blocking(move || shared.context_tree(context));
            (tree.await?, "the build context")
        }
        CopyFrom::Step => {
            let stack = source
                .stack(engine)
                .await
                .map_err(|error| unshare(&error))?;
            (Arc::new(stack), "the stage or image copied from")
        }
    };
    let what = copy.definition.clone();
    let reads_ahead = search.may_find(engine, parent).await;
    let (selection, ahead) = engine
        .blocking(move || {
            let selection = copy::select(&what, tree, place, fetched)?;
            // Where no record can match, contents are read once, on their way into the layer.
            let listing = reads_ahead.then_some(&selection.listing);
            let ahead = listing.map(|listing| listing.manifest()).transpose()?;
            Ok((selection, ahead))
        })
        .await?;
    for note in &selection.notes {
        engine.warn(format!("{}: {note}", step.place));
    }
    let listing = Arc::clone(&selection.listing);
    let reads = Reads {
        layers: source_chain,
        ahead,
        finally: Box::new(move || Ok(listing.copied()?)),
    };
    let cached = Cached::look_up(engine, beginning, search, parent, Some(reads)).await?;
    cached
        .or_make(engine, parent, || {
            place_copy(engine, beginning, copy, selection, parent)
        })
        .await
}

/// Fetches the sources that are elsewhere; by their place among all.
async fn fetch_sources(
    engine: &Arc<Engine>,
    copy: &plan::Copy,
) -> anyhow::Result<BTreeMap<usize, Fetched>> {
    let sources = copy.definition.sources.iter().enumerate();
    let remote = sources
        .filter(|(_, source)| matches!(source, CopySource::Url { .. } | CopySource::Git { .. }));
    let fetching = remote.map(|(index, source)| async move {
        let fetched = remote::fetch_remote(engine, source).await?;
        anyhow::Ok((index, fetched))
    });
    Ok(try_join_all(fetching).await?.into_iter().collect())
}

/// Starts sealing `changes`, and knows what the layer has before it is sealed.
fn seal_listed(engine: &Arc<Engine>, beginning: &Beginning<'_>, changes: Vec<Change>) -> Layer {
    let listing = Listing::of_changes(&changes, engine.epoch);
    let is_mounted = engine.layers.is_read(beginning.number);
    let sealing = seal::seal_changes(engine, changes, is_mounted);
    Layer::sealing(sealing, None, engine.now()).listed(listing)
}

async fn place_copy(
    engine: &Arc<Engine>,
    beginning: &Beginning<'_>,
    copy: &plan::Copy,
    selection: copy::Selection,
    parent: &Filesystem,
) -> anyhow::Result<Layer> {
    let below = parent.below(engine, beginning.number).await?;
    let (what, place, shared) = (
        copy.definition.clone(),
        beginning.step.place.clone(),
        Arc::clone(engine),
    );
    let changes = engine.blocking(move || {
        let owner = match &what.chown {
            Some(chown) => Some(owner(&shared, &below, ("--chown=", chown), &place)?),
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
    Ok(seal_listed(engine, beginning, changes.await?))
}

/// `--chown` in numbers.
///
/// A name that the image does not know is 0 in BuildKit; images are built that way today, so
/// it stays so, but not silently.
///
/// `option` is what gives the owner, as messages have it, and its value.
fn owner(
    engine: &Engine,
    below: &Below,
    option: (&str, &str),
    place: &str,
) -> anyhow::Result<(u32, u32)> {
    let (option, value) = option;
    let owner = Owner::parse(value);
    if let Some(ids) = owner.ids() {
        return Ok(ids);
    }
    anyhow::ensure!(
        !below.is_empty(),
        "{option}{value}: there is no /etc/passwd or /etc/group to look names up in, as the layer is made on top of nothing (FROM scratch, or --link): use numbers"
    );
    let accounts = Accounts::read(below).context("reading the image's accounts")?;
    let (ids, unknown) = accounts.owner(&owner);
    if !unknown.is_empty() {
        engine.warn(format!(
            "{place}: {option}{value}: {}; what is made belongs to {}:{}",
            unknown.join(", "),
            ids.0,
            ids.1
        ));
    }
    Ok(ids)
}
