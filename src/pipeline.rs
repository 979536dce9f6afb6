//! A whole build read top to bottom: parse, graph, resolve, lower, execute, assemble, export.

mod ask;
mod cache;
mod contexts;
pub mod doctor;
mod epoch;
mod images;
mod limit;
mod outputs;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use anyhow::Context as _;
use futures_util::future::try_join_all;

use images::Images;
use limit::LimitedStore;

use crate::build::{self, BaseImage, BuiltImage, CacheContents, Cancelled, Origin, Timings};
use crate::context::{ContextSource, DockerfileLocation};
use crate::dockerfile;
use crate::dockerfile::Dockerfile;
use crate::failure::{Failure, Kind};
use crate::image::{
    self, Annotations, Digest, History, Image, ImageOrIndex, Platform, PlatformAnnotations,
    Reference,
};
use crate::layout::Layout;
use crate::plan::{self, ContextId, ImageNeed, ImageSource, Joined, Operation, StageGraph};
use crate::progress::{BuildEvent, Progress};
use crate::registry::{self, BlobContent, Client};
use crate::remote::Fetcher;
pub use crate::rootfs::Choice as RootfsChoice;
use crate::sandbox::{self, Cancel, World};
use crate::session::{Secrets, SshAgents};
use crate::store::Store;

pub use crate::build::{CacheSource, DeviceSettings};
pub use crate::layer::{Compression, LayerCompression, LevelError};
pub use ask::{Answer, Question, ask};
pub use cache::{CachePlace, CacheTarget};

/// Everything a build needs to know, validated.
#[derive(Clone, Debug)]
pub struct BuildRequest {
    /// The build context.
    pub context: ContextSource,
    /// The Dockerfile; absent: `Dockerfile` in the context.
    pub dockerfile: Option<DockerfileLocation>,
    /// Names for the image.
    pub tags: Vec<Reference>,
    /// Whether the image is pushed to every tag.
    pub push: bool,
    /// Files and directories that are written.
    pub outputs: Vec<Output>,
    /// Annotations of the image as it is pushed, beside [`Self::annotations`].
    pub push_annotations: Annotations,
    /// How the layers of the image are compressed where it is pushed.
    pub push_compression: LayerCompression,
    /// What the Dockerfile is planned with: arguments, target, platform, labels, …
    pub plan: plan::Settings,
    /// What is built for beside the platform of `plan`, in this order. With any, the result is
    /// an index, as `plan` says.
    pub further_platforms: Vec<Platform>,
    /// `--jobs`: how many RUN steps run at once; 0: as many as the graph allows, within reason.
    pub jobs: usize,
    /// `SOURCE_DATE_EPOCH`, in seconds since 1970 UTC.
    pub epoch: Option<i64>,
    /// How registries are reached.
    pub registry: registry::Options,
    /// Which servers ADD and contexts may be fetched from.
    pub sources: registry::Reach,
    /// `--annotation`.
    pub annotations: Annotations,
    /// `--secret`.
    pub secrets: Arc<Secrets>,
    /// `--ssh`.
    pub agents: Arc<SshAgents>,
    /// `RUN --device`: where devices are described, and `--allow device`.
    pub devices: DeviceSettings,
    /// `--explain`.
    pub explain: bool,
    /// `--cache-from`.
    pub cache_from: Vec<CacheSource>,
    /// `--cache-to`.
    pub cache_to: Vec<CacheTarget>,
    /// Which sandbox runs the steps.
    pub sandbox: sandbox::Choice,
    /// Whether that may be a runc with known holes.
    pub allow_old_runc: bool,
    /// How much each RUN step may use.
    pub limits: sandbox::Limits,
    /// How root filesystems are made.
    pub rootfs: RootfsChoice,
    /// `--require-isolation`: nothing is run where steps are isolated less.
    pub require_isolation: bool,
    /// The store's directory.
    pub root: PathBuf,
    /// `--store-limit`: how much disk the store may take, in bytes.
    pub store_limit: Option<u64>,
    /// `--iidfile`: where the image's digest is written.
    pub iid_file: Option<PathBuf>,
    /// `--metadata-file`: where a JSON object about the result is written.
    pub metadata_file: Option<PathBuf>,
}

/// A file or directory that the result is written to. A file `-` is standard output.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    /// The image.
    Image(ImageOutput),
    /// `type=tar`: the image's files, in a tar.
    Tar {
        /// The file.
        dest: PathBuf,
        /// Whether they are in a directory named after their platform; absent: where there
        /// may be several platforms.
        platform_split: Option<bool>,
    },
    /// `type=local`: the image's files.
    Local {
        /// The directory.
        dest: PathBuf,
        /// As of a tar.
        platform_split: Option<bool>,
    },
}

/// How and where an image is written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageOutput {
    /// In which form.
    pub format: ImageFormat,
    /// The file or directory.
    pub dest: PathBuf,
    /// Names for the image there, beside [`BuildRequest::tags`].
    pub names: Vec<Reference>,
    /// Annotations of the image there, beside [`BuildRequest::annotations`].
    pub annotations: Annotations,
    /// How its layers are compressed there.
    pub compression: LayerCompression,
}

/// The form in which an image is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImageFormat {
    /// `type=oci`: a tar of an OCI image layout.
    OciArchive,
    /// `type=docker`: the same with what `docker load` reads.
    DockerArchive,
    /// `type=oci,tar=false`: an OCI image layout in a directory.
    OciLayout,
}

impl Output {
    /// The file or directory.
    pub fn dest(&self) -> &Path {
        match self {
            Self::Image(ImageOutput { dest, .. })
            | Self::Tar { dest, .. }
            | Self::Local { dest, .. } => dest,
        }
    }
}

impl BuildRequest {
    /// What each platform is planned with, in the order in which they were asked for.
    fn plans(&self) -> Vec<plan::Settings> {
        let further = self
            .further_platforms
            .iter()
            .map(|platform| plan::Settings {
                platform: platform.clone(),
                ..self.plan.clone()
            });
        [self.plan.clone()].into_iter().chain(further).collect()
    }
}

/// What a build made.
#[derive(Clone, Debug)]
pub struct BuildResult {
    /// The digest of the manifest, or of the index.
    pub digest: Digest,
    /// Docker's image ID: the config's digest, of an index its own.
    pub image_id: Digest,
}

/// Builds an image. The last event is `Finished`, whatever becomes of it.
///
/// `world` is what [`sandbox::enter`] gave; `cancel` stops the build.
///
/// # Errors
/// Any; the chain names what failed, where, and what was expected.
pub async fn build(
    request: BuildRequest,
    world: World,
    progress: Arc<dyn Progress>,
    cancel: Cancel,
) -> anyhow::Result<BuildResult> {
    let started = Instant::now();
    let timings = Arc::new(Timings::default());
    let mut limited = None;
    let result = run(&request, world, &progress, &cancel, &timings, &mut limited).await;
    if let Some(limited) = limited {
        limited.end(&*progress, &timings).await;
    }
    timings.add("total", started.elapsed());
    progress.event(BuildEvent::Finished {
        success: result.is_ok(),
        message: result
            .as_ref()
            .err()
            .map(|error| format!("{error:#}"))
            .unwrap_or_default(),
        timings_ms: timings.to_millis(),
    });
    result
}

async fn run(
    request: &BuildRequest,
    world: World,
    progress: &Arc<dyn Progress>,
    cancel: &Cancel,
    timings: &Arc<Timings>,
    limited: &mut Option<LimitedStore>,
) -> anyhow::Result<BuildResult> {
    check_result_files(request)?;
    outputs::check(request)?;
    let mut store = Store::open(&request.root)?;
    if let Some(kind) = world.recorded() {
        store = store.recording(kind);
    }
    let store = Arc::new(store);
    *limited = request
        .store_limit
        .map(|limit| LimitedStore::begin(&store, limit));
    let client = Client::new(request.registry.clone())?;
    let importing = build::import(
        &client,
        &store,
        request.cache_from.clone(),
        progress,
        timings,
    );
    let stop = cancel.clone();
    let is_cancelled = move || stop.is_cancelled();
    let fetcher = Arc::new(fetcher(request, &store, progress, is_cancelled)?);
    let opened = contexts::open(request, Some((&store, &fetcher)), store.tmp()).await?;
    for device in &opened.skipped_devices {
        progress.event(BuildEvent::Warning {
            message: format!("{device:?} of the build context's archive cannot be made here"),
        });
    }
    if opened.dockerfile.has_containerignore {
        progress.event(BuildEvent::Warning {
            message: "the build context has a .containerignore, which is not read, and no .dockerignore: nothing is left out".to_owned(),
        });
    }
    let dockerfile = dockerfile::parse(&opened.dockerfile.name, &opened.dockerfile.text)?;
    contexts::check_named(request)?;
    for message in without_effect(request, &dockerfile) {
        progress.event(BuildEvent::Warning { message });
    }
    for (id, variable) in request.secrets.unset_variables() {
        progress.event(BuildEvent::Warning {
            message: format!(
                "--secret id={id}: the environment variable {variable} is not set, so the secret is empty"
            ),
        });
    }
    let mut settings = request.plans();
    let remote = (&*store, &*fetcher);
    let main = opened.source_date;
    let epoch = epoch::resolve(
        request,
        &mut settings,
        &dockerfile,
        main,
        remote,
        &**progress,
    )
    .await?;

    let resolving = Instant::now();
    let mut images = Images::default();
    let graphs = resolved_graphs(request, &dockerfile, &settings, &mut images, || {
        Ok(client.clone())
    });
    let graphs = unless_cancelled(cancel, graphs).await?;
    let mut plans = Vec::new();
    for (graph, settings) in graphs.into_iter().zip(&settings) {
        let configs = images.configs(&graph)?;
        let plan = plan::lower(&dockerfile, &graph, settings, &configs)?;
        plans.push((graph, plan));
    }
    let rules = opened.context.rules();
    ask::check_build(request, &dockerfile, rules, &plans, &images, &**progress)?;
    let plan = plan::join(plans);
    outputs::check_platforms(request, &plan)?;
    let images = base_images(request, &plan.images, &images).await?;
    timings.add("resolve", resolving.elapsed());
    for warning in &plan.warnings {
        progress.event(BuildEvent::Warning {
            message: warning.clone(),
        });
    }
    let foreign = foreign(&plan, &store, progress).await?;

    let mut contexts = contexts::open_named(request, &plan.steps, &store, &fetcher).await?;
    contexts.insert(ContextId::MAIN, Arc::new(opened.context));

    let push = if request.push {
        request.tags.clone()
    } else {
        Vec::new()
    };
    let settings = build::Settings {
        keep_blobs: writes_image(request),
        reads_files: writes_files(request),
        store: Arc::clone(&store),
        client: client.clone(),
        explain: request.explain,
        progress: Arc::clone(progress),
        cancel: cancel.clone(),
        contexts,
        fetcher,
        images,
        sandbox: request.sandbox,
        allow_old_runc: request.allow_old_runc,
        limits: request.limits.clone(),
        rootfs: request.rootfs,
        require_isolation: request.require_isolation,
        world: Arc::new(world),
        jobs: request.jobs,
        foreign,
        epoch,
        compression: first_compression(request),
        force_compression: request.push_compression.force,
        secrets: Arc::clone(&request.secrets),
        agents: Arc::clone(&request.agents),
        devices: request.devices.clone(),
        push: push.clone(),
        importing,
    };
    let built = build::build(&plan, settings, Arc::clone(timings)).await?;
    let (mut layer_bytes, contents) = (built.uploaded_bytes, built.cache);
    let mut made = Vec::new();
    for (target, built) in plan.targets.into_iter().zip(built.images) {
        made.push(outputs::Made {
            platform: target.platform.clone(),
            image: assemble(request, target, &built, &contents, epoch)?,
            origins: built.origins,
            are_new: built.are_new,
            files: built.files,
        });
    }

    let publishing = Instant::now();
    let exporter = outputs::Exporter {
        request,
        client: &client,
        store: &store,
        made: &made,
        epoch,
        progress: &**progress,
        cancel,
    };
    exporter.write_all().await?;
    let image = exporter.reported().await?;
    for tag in &push {
        // Several tags of one repository share what was sent; the first one's event has it.
        let sent = layer_bytes.remove(tag.repository()).unwrap_or(0);
        unless_cancelled(cancel, publish(&client, tag, &image, progress, sent))
            .await
            .with_context(|| format!("pushing {tag}"))?;
    }
    timings.add("publish", publishing.elapsed());
    write_result_files(request, &image)?;
    let exporter = cache::Exporter {
        client: &client,
        store: &store,
        pushed: push.iter().map(|tag| tag.repository().clone()).collect(),
        progress,
        timings,
        cancel,
    };
    exporter.export_all(&request.cache_to, &contents).await?;
    Ok(BuildResult {
        digest: image.raw().digest.clone(),
        image_id: image.id().clone(),
    })
}

/// Gives `work` up when the build is stopped. It may only wait for servers: what it has
/// begun is left as it is.
async fn unless_cancelled<T>(
    cancel: &Cancel,
    work: impl Future<Output = anyhow::Result<T>>,
) -> anyhow::Result<T> {
    tokio::select! {
        biased;
        () = cancel.cancelled() => Err(Cancelled.into()),
        done = work => done,
    }
}

/// The architectures of RUN steps whose programs this machine cannot run, which is told.
///
/// That is no error yet: what is labelled with another architecture may have programs for
/// this one, and what the cache has is not run.
async fn foreign(
    plan: &Joined,
    store: &Arc<Store>,
    progress: &Arc<dyn Progress>,
) -> anyhow::Result<BTreeSet<String>> {
    let host = Platform::host();
    let is_foreign =
        |platform: &Platform| platform.os == host.os && platform.architecture != host.architecture;
    // The first step of each.
    let mut places: BTreeMap<String, (String, Platform)> = BTreeMap::new();
    for step in &plan.steps {
        if matches!(step.operation, Operation::Run(_)) && is_foreign(&step.platform) {
            places
                .entry(step.platform.architecture.clone())
                .or_insert_with(|| (step.place.clone(), step.platform.clone()));
        }
    }
    if places.is_empty() {
        return Ok(BTreeSet::new());
    }
    let store = Arc::clone(store);
    let asking = tokio::task::spawn_blocking(move || {
        let dir = store.tmp_dir("probe-")?;
        places.retain(|architecture, _| sandbox::cannot_run(architecture, &dir));
        anyhow::Ok(places)
    });
    let places = asking.await.context("a task ended abnormally")??;
    for (architecture, (place, platform)) in &places {
        progress.event(BuildEvent::Warning {
            message: format!(
                "{place}: this machine cannot run programs for {platform}: {}",
                build::foreign_hint(architecture)
            ),
        });
    }
    Ok(places.into_keys().collect())
}

/// What was written or asked for and means nothing.
fn without_effect(request: &BuildRequest, dockerfile: &Dockerfile) -> Vec<String> {
    let place = |span| dockerfile::place(&dockerfile.name, &dockerfile.text, span);
    let flags = dockerfile.ignored_flags().into_iter();
    let mut found: Vec<String> = flags
        .map(|ignored| format!("{}: {}", place(ignored.span), ignored.message))
        .collect();
    if let plan::NoCache::Stages(names) = &request.plan.no_cache {
        let stages = || dockerfile.stages.iter().filter_map(|s| s.name.as_ref());
        let is_stage = |name: &str| stages().any(|stage| stage.raw.eq_ignore_ascii_case(name));
        let unknown = names.iter().filter(|name| !is_stage(name));
        found.extend(unknown.map(|name| format!("--no-cache-filter: no stage is called {name:?}")));
    }
    found
}

/// What fetches other servers' files for this build.
fn fetcher(
    request: &BuildRequest,
    store: &Arc<Store>,
    progress: &Arc<dyn Progress>,
    is_cancelled: impl Fn() -> bool + Send + Sync + 'static,
) -> anyhow::Result<Fetcher> {
    let registry = registry::Options {
        reach: request.sources,
        ..request.registry.clone()
    };
    Ok(Fetcher::new(
        registry,
        Arc::clone(store),
        Arc::clone(&request.secrets),
        Arc::clone(&request.agents),
        Arc::clone(progress),
        is_cancelled,
    )?)
}

/// The stages and images that the target needs, for each of `settings`, all images resolved
/// into `images`: their triggers may need more.
async fn resolved_graphs(
    request: &BuildRequest,
    dockerfile: &Dockerfile,
    settings: &[plan::Settings],
    images: &mut Images,
    client: impl Fn() -> anyhow::Result<Client>,
) -> anyhow::Result<Vec<StageGraph>> {
    loop {
        let graphs = settings
            .iter()
            .map(|settings| plan::graph(dockerfile, settings, &|need| images.config(need)));
        let graphs = graphs.collect::<Result<Vec<_>, _>>()?;
        let needs = graphs.iter().flat_map(|graph| &graph.images);
        let needs: Vec<ImageNeed> = needs.cloned().collect();
        if needs.iter().all(|need| images.get(need).is_some()) {
            return Ok(graphs);
        }
        let resolved = images.resolve(request, &client, &needs).await;
        resolved.map_err(|(_, error)| error)?;
    }
}

/// The images that are needed with where their layers are.
async fn base_images(
    request: &BuildRequest,
    needs: &[ImageNeed],
    images: &Images,
) -> anyhow::Result<Vec<BaseImage>> {
    let mut bases = Vec::new();
    for need in needs {
        let resolved = images
            .get(need)
            .context("an image was not resolved")?
            .clone();
        let origin = match &need.source {
            ImageSource::Registry(_) => Origin::Registry(resolved.reference.repository().clone()),
            ImageSource::Layout(context) => {
                let (_, layout) = images::layout(request, *context)?;
                let opening = tokio::task::spawn_blocking(move || Layout::open(&layout.path));
                Origin::Layout(opening.await.context("a task ended abnormally")??)
            }
        };
        bases.push(BaseImage { resolved, origin });
    }
    Ok(bases)
}

/// How new layers are compressed first: as they are pushed, while steps still run, or as the
/// first file wants them. What other outputs want is made of that.
fn first_compression(request: &BuildRequest) -> Compression {
    let mut outputs = request.outputs.iter();
    let first = outputs.find_map(|output| match output {
        Output::Image(output) => Some(output.compression.compression),
        Output::Tar { .. } | Output::Local { .. } => None,
    });
    let pushed = request.push_compression.compression;
    first.filter(|_| !request.push).unwrap_or(pushed)
}

/// Whether an output has the layers themselves.
fn writes_image(request: &BuildRequest) -> bool {
    let mut outputs = request.outputs.iter();
    outputs.any(|output| matches!(output, Output::Image(_)))
}

/// Whether an output has the image's files.
fn writes_files(request: &BuildRequest) -> bool {
    let mut outputs = request.outputs.iter();
    outputs.any(|output| matches!(output, Output::Tar { .. } | Output::Local { .. }))
}

/// Joins layers, config and history.
fn assemble(
    request: &BuildRequest,
    target: plan::Target,
    built: &BuiltImage,
    cache: &CacheContents,
    epoch: Option<i64>,
) -> anyhow::Result<Image> {
    let plan::Target {
        mut config,
        history,
        ..
    } = target;
    let base_created = config
        .history
        .iter()
        .rev()
        .find_map(|entry| entry.created.clone())
        .or(config.created.take());
    let epoch_text = epoch.map(|_| build::rfc3339(epoch));
    let mut created = built.created.iter().cloned();
    let mut last = epoch_text.clone().or(base_created);
    for entry in history {
        if !entry.empty_layer {
            let when = created
                .next()
                .context("there are more history entries than layers")?;
            last = epoch_text.clone().or(Some(when));
        }
        config.history.push(History {
            created: last.clone(),
            ..entry
        });
    }
    anyhow::ensure!(
        created.next().is_none(),
        "there are more layers than history entries"
    );
    // Without a step that made a layer there is no time of this build that would not
    // change from one build to the next; the base's says when the files were made.
    config.created = last.or_else(|| Some(build::rfc3339(Some(0))));
    // That of the base says nothing of what is above.
    config.other.remove(build::INLINE_KEY);
    let mut targets = request.cache_to.iter();
    if targets.any(|target| target.place == CachePlace::Inline) {
        let records = cache.inline(&built.layers);
        config.other.insert(build::INLINE_KEY.to_owned(), records);
    }
    let layers = built.layers.clone();
    Ok(image::assemble(
        config,
        layers,
        PlatformAnnotations::default(),
    ))
}

/// Downloads blobs that an output needs and no step needed.
async fn fetch_missing<'l>(
    client: &Client,
    store: &Arc<Store>,
    layers: impl IntoIterator<Item = (&'l image::ImageLayer, &'l Option<Origin>)>,
) -> anyhow::Result<()> {
    for (layer, origin) in layers {
        build::fetch_blob(client, store, origin.as_ref(), &layer.descriptor).await?;
    }
    Ok(())
}

/// Sends configs and manifests, and then what the tag is for; the layers are there.
async fn publish(
    client: &Client,
    tag: &Reference,
    image: &ImageOrIndex,
    progress: &Arc<dyn Progress>,
    layer_bytes: u64,
) -> anyhow::Result<()> {
    let sending = image.images().iter().map(async |one| {
        let sent = push_config(client, tag, one).await?;
        if let ImageOrIndex::Index(_) = image {
            let manifest = &one.raw_manifest;
            let name = tag.with_digest(manifest.digest.clone());
            client.push_manifest(&name, manifest).await?;
        }
        anyhow::Ok(sent)
    });
    let config_bytes: u64 = try_join_all(sending).await?.into_iter().sum();
    client.push_manifest(tag, image.raw()).await?;
    progress.event(BuildEvent::Published {
        reference: tag.to_string(),
        digest: image.raw().digest.clone(),
        uploaded_bytes: layer_bytes + config_bytes,
    });
    Ok(())
}

/// Sends an image's config and returns the bytes sent.
async fn push_config(client: &Client, tag: &Reference, image: &Image) -> anyhow::Result<u64> {
    let config = &image.manifest.config;
    let content = BlobContent::Bytes(image.config_bytes.clone());
    let pushed = client
        .push_blob(tag.repository(), config, None, content, |_| {})
        .await?;
    Ok(match pushed {
        registry::PushedBlob::Uploaded => config.size,
        registry::PushedBlob::AlreadyThere | registry::PushedBlob::Mounted => 0,
    })
}

/// Whether [`write_result_files`] has directories to write into, before anything is built.
fn check_result_files(request: &BuildRequest) -> anyhow::Result<()> {
    let files = [
        ("--iidfile", &request.iid_file),
        ("--metadata-file", &request.metadata_file),
    ];
    for (flag, path) in files {
        if let Some(path) = path {
            check_parent(flag, path)?;
        }
    }
    Ok(())
}

/// Refuses a file that `flag` names where there is no directory for it.
fn check_parent(flag: &str, path: &Path) -> anyhow::Result<()> {
    let parent = path
        .parent()
        .filter(|parent| !parent.as_os_str().is_empty());
    if parent.is_some_and(|parent| !parent.is_dir()) {
        let message = format!("{flag} {}: its directory is not there", path.display());
        anyhow::bail!(Failure::new(Kind::Configuration, message));
    }
    Ok(())
}

/// `--iidfile` and `--metadata-file`, with BuildKit's keys.
fn write_result_files(request: &BuildRequest, image: &ImageOrIndex) -> anyhow::Result<()> {
    if let Some(path) = &request.iid_file {
        let id = image.id().as_str();
        std::fs::write(path, id).with_context(|| format!("writing {}", path.display()))?;
    }
    if let Some(path) = &request.metadata_file {
        let names: Vec<String> = request.tags.iter().map(Reference::to_string).collect();
        let mut metadata = serde_json::json!({
            "containerimage.digest": image.raw().digest,
            "containerimage.descriptor": image.descriptor(),
            "image.name": names.join(","),
        });
        // An index has several.
        if let ImageOrIndex::Image(image) = image {
            metadata["containerimage.config.digest"] =
                serde_json::json!(image.manifest.config.digest);
        }
        let text = serde_json::to_string_pretty(&metadata).expect("the keys are texts");
        std::fs::write(path, text).with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(())
}
