//! A whole build read top to bottom: parse, graph, resolve, lower, execute, assemble, export.

mod ask;
mod cache;
mod contexts;
mod epoch;
mod images;
mod outputs;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use anyhow::Context as _;

use images::Images;

use crate::build::{self, BaseImage, Built, Origin, Timings};
use crate::context::{ContextSource, DockerfileLocation};
use crate::dockerfile;
use crate::dockerfile::Dockerfile;
use crate::failure::{Failure, Kind};
use crate::image::{self, Annotations, Digest, History, Image, Reference};
use crate::layout::Layout;
use crate::plan::{self, ContextId, ImageSource, Plan, StageGraph};
use crate::progress::{BuildEvent, Progress};
use crate::registry::{self, BlobContent, Client};
use crate::remote::Fetcher;
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
    /// `--cache-from`.
    pub cache_from: Vec<CacheSource>,
    /// `--cache-to`.
    pub cache_to: Vec<CacheTarget>,
    /// Which sandbox runs the steps.
    pub sandbox: sandbox::Choice,
    /// The store's directory.
    pub root: PathBuf,
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
    },
    /// `type=local`: the image's files.
    Local {
        /// The directory.
        dest: PathBuf,
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
            Self::Image(ImageOutput { dest, .. }) | Self::Tar { dest } | Self::Local { dest } => {
                dest
            }
        }
    }
}

/// What a build made.
#[derive(Clone, Debug)]
pub struct BuildResult {
    /// The manifest's digest.
    pub digest: Digest,
    /// The config's digest, Docker's image ID.
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
    let result = run(&request, world, &progress, &cancel, &timings).await;
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
) -> anyhow::Result<BuildResult> {
    check_result_files(request)?;
    outputs::check(request)?;
    let store = Arc::new(Store::open(&request.root)?);
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
    let mut settings = request.plan.clone();
    let remote = (&*store, &*fetcher);
    let main = opened.source_date;
    let epoch = epoch::resolve(request, &mut settings, &dockerfile, main, remote).await?;

    let resolving = Instant::now();
    let mut images = Images::default();
    let graph = resolved_graph(request, &dockerfile, &settings, &mut images, || {
        Ok(client.clone())
    })
    .await?;
    let images = base_images(request, &graph, &images).await?;
    timings.add("resolve", resolving.elapsed());

    let configs: Vec<_> = images
        .iter()
        .map(|image| image.resolved.config.clone())
        .collect();
    let plan = plan::lower(&dockerfile, &graph, &settings, &configs)?;
    let rules = opened.context.rules();
    ask::check_build(request, &dockerfile, rules, (&graph, &configs), &**progress)?;
    for warning in &plan.warnings {
        progress.event(BuildEvent::Warning {
            message: warning.clone(),
        });
    }

    let mut contexts = contexts::open_named(request, &plan, &store, &fetcher).await?;
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
        progress: Arc::clone(progress),
        cancel: cancel.clone(),
        contexts,
        fetcher,
        images,
        sandbox: request.sandbox,
        world,
        platform: request.plan.platform.clone(),
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
    let (origins, mut layer_bytes) = (built.origins.clone(), built.uploaded_bytes.clone());
    let are_new = built.are_new.clone();
    let (files, contents) = (built.files.clone(), built.cache.clone());
    let image = assemble(request, plan, built, epoch)?;

    let publishing = Instant::now();
    let exporter = outputs::Exporter {
        request,
        client: &client,
        store: &store,
        image: &image,
        origins: &origins,
        are_new: &are_new,
        files: &files,
        epoch,
        progress: &**progress,
        cancel,
    };
    exporter.write_all().await?;
    let image = exporter.reported().await?;
    for tag in &push {
        // Several tags of one repository share what was sent; the first one's event has it.
        let sent = layer_bytes.remove(tag.repository()).unwrap_or(0);
        publish(&client, tag, &image, progress, sent)
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
        digest: image.raw_manifest.digest.clone(),
        image_id: image.manifest.config.digest.clone(),
    })
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

/// The stages and images that the target needs, all images resolved into `images`: their
/// triggers may need more.
async fn resolved_graph(
    request: &BuildRequest,
    dockerfile: &Dockerfile,
    settings: &plan::Settings,
    images: &mut Images,
    client: impl Fn() -> anyhow::Result<Client>,
) -> anyhow::Result<StageGraph> {
    loop {
        let graph = plan::graph(dockerfile, settings, &|need| images.config(need))?;
        if graph.images.iter().all(|need| images.get(need).is_some()) {
            return Ok(graph);
        }
        let resolved = images.resolve(request, &client, &graph.images).await;
        resolved.map_err(|(_, error)| error)?;
    }
}

/// The images of `graph` with where their layers are.
async fn base_images(
    request: &BuildRequest,
    graph: &StageGraph,
    images: &Images,
) -> anyhow::Result<Vec<BaseImage>> {
    let mut bases = Vec::new();
    for need in &graph.images {
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
    plan: Plan,
    built: Built,
    epoch: Option<i64>,
) -> anyhow::Result<Image> {
    let Plan {
        mut config,
        history,
        ..
    } = plan;
    let base_created = config
        .history
        .iter()
        .rev()
        .find_map(|entry| entry.created.clone())
        .or(config.created.take());
    let epoch_text = epoch.map(|_| build::rfc3339(epoch));
    let mut created = built.created.into_iter();
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
        let records = built.cache.inline(&built.layers);
        config.other.insert(build::INLINE_KEY.to_owned(), records);
    }
    let annotations = request.annotations.clone();
    Ok(image::assemble(config, built.layers, annotations))
}

/// Downloads blobs that an output needs and no step needed.
async fn fetch_missing<'l>(
    client: &Client,
    store: &Arc<Store>,
    layers: impl IntoIterator<Item = (&'l image::ImageLayer, &'l Option<Origin>)>,
) -> anyhow::Result<()> {
    for (layer, origin) in layers {
        let digest = &layer.descriptor.digest;
        if store.has_blob_of(&layer.descriptor) {
            continue;
        }
        let origin = origin
            .as_ref()
            .with_context(|| format!("the blob {digest} is no longer in the store"))?;
        let (store, digest) = (Arc::clone(store), digest.clone());
        let origin = match origin {
            Origin::Registry(repository) => repository,
            Origin::Layout(layout) => {
                let (layout, descriptor) = (layout.clone(), layer.descriptor.clone());
                let import =
                    tokio::task::spawn_blocking(move || layout.import(&descriptor, &store));
                import.await.context("a task ended abnormally")??;
                continue;
            }
        };
        let stream = client.open_blob(origin, &layer.descriptor).await?;
        let mut reader = tokio_util::io::SyncIoBridge::new(stream);
        let fetch = tokio::task::spawn_blocking(move || -> anyhow::Result<()> {
            let mut blob = store.write_blob()?;
            std::io::copy(&mut reader, &mut blob)?;
            blob.commit(Some(&digest))?;
            Ok(())
        });
        fetch
            .await
            .context("a task ended abnormally")?
            .with_context(|| format!("pulling {origin}"))?;
    }
    Ok(())
}

/// Sends config and manifest; the layers are there.
async fn publish(
    client: &Client,
    tag: &Reference,
    image: &Image,
    progress: &Arc<dyn Progress>,
    layer_bytes: u64,
) -> anyhow::Result<()> {
    let config = &image.manifest.config;
    let content = BlobContent::Bytes(image.config_bytes.clone());
    let pushed = client
        .push_blob(tag.repository(), config, None, content, |_| {})
        .await?;
    client.push_manifest(tag, &image.raw_manifest).await?;
    let config_bytes = if pushed == registry::PushedBlob::Uploaded {
        config.size
    } else {
        0
    };
    progress.event(BuildEvent::Published {
        reference: tag.to_string(),
        digest: image.raw_manifest.digest.clone(),
        uploaded_bytes: layer_bytes + config_bytes,
    });
    Ok(())
}

/// Whether [`write_result_files`] has directories to write into, before anything is built.
fn check_result_files(request: &BuildRequest) -> anyhow::Result<()> {
    let files = [
        ("--iidfile", &request.iid_file),
        ("--metadata-file", &request.metadata_file),
    ];
    for (flag, path) in files {
        let Some(path) = path else { continue };
        let parent = path
            .parent()
            .filter(|parent| !parent.as_os_str().is_empty());
        if parent.is_some_and(|parent| !parent.is_dir()) {
            let message = format!("{flag} {}: its directory is not there", path.display());
            anyhow::bail!(Failure::new(Kind::Configuration, message));
        }
    }
    Ok(())
}

/// `--iidfile` and `--metadata-file`, with BuildKit's keys.
fn write_result_files(request: &BuildRequest, image: &Image) -> anyhow::Result<()> {
    if let Some(path) = &request.iid_file {
        let id = image.manifest.config.digest.as_str();
        std::fs::write(path, id).with_context(|| format!("writing {}", path.display()))?;
    }
    if let Some(path) = &request.metadata_file {
        let names: Vec<String> = request.tags.iter().map(Reference::to_string).collect();
        let metadata = serde_json::json!({
            "containerimage.digest": image.raw_manifest.digest,
            "containerimage.config.digest": image.manifest.config.digest,
            "containerimage.descriptor": image.descriptor(),
            "image.name": names.join(","),
        });
        let text = serde_json::to_string_pretty(&metadata).expect("the keys are texts");
        std::fs::write(path, text).with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(())
}
