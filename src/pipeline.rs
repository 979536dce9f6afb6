//! A whole build read top to bottom: parse, graph, resolve, lower, execute, assemble, export.

mod ask;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use anyhow::Context as _;
use futures_util::future::try_join_all;

use crate::build::{self, Built, Timings};
use crate::context::{self, BuildContext, IgnoreRules};
use crate::dockerfile::Dockerfile;
use crate::image::{self, Annotations, Digest, History, Image, Reference};
use crate::plan::{self, ContextId, ImageNeed, ImageSource, Plan, StageGraph};
use crate::progress::{BuildEvent, Progress};
use crate::registry::{self, BlobContent, Client, Resolved};
use crate::sandbox::{self, Cancel, World};
use crate::session::{Secrets, SshAgents};
use crate::store::Store;
use crate::{dockerfile, export};

pub use ask::{Answer, Question, ask};

/// Everything a build needs to know, validated.
#[derive(Clone, Debug)]
pub struct BuildRequest {
    /// The build context's directory.
    pub context: PathBuf,
    /// The Dockerfile; absent: `Dockerfile` in the context.
    pub dockerfile: Option<PathBuf>,
    /// Names for the image.
    pub tags: Vec<Reference>,
    /// Whether the image is pushed to every tag.
    pub push: bool,
    /// Files that are written.
    pub outputs: Vec<Output>,
    /// What the Dockerfile is planned with: arguments, target, platform, labels, …
    pub plan: plan::Settings,
    /// `SOURCE_DATE_EPOCH`, in seconds since 1970 UTC.
    pub epoch: Option<i64>,
    /// How registries are reached.
    pub registry: registry::Options,
    /// `--annotation`.
    pub annotations: Annotations,
    /// `--secret`.
    pub secrets: Arc<Secrets>,
    /// `--ssh`.
    pub agents: Arc<SshAgents>,
    /// Which sandbox runs the steps.
    pub sandbox: sandbox::Choice,
    /// The store's directory.
    pub root: PathBuf,
    /// `--iidfile`: where the image's digest is written.
    pub iid_file: Option<PathBuf>,
    /// `--metadata-file`: where a JSON object about the result is written.
    pub metadata_file: Option<PathBuf>,
}

/// A file that the image is written to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    /// `type=oci,dest=FILE`: a tar of an OCI image layout.
    OciArchive {
        /// The file.
        dest: PathBuf,
    },
}

/// What a build made.
#[derive(Clone, Debug)]
pub struct BuildResult {
    /// The manifest's digest.
    pub digest: Digest,
    /// The config's digest, Docker's image ID.
    pub image_id: Digest,
}

/// The build argument that dates an image.
///
/// <https://reproducible-builds.org/specs/source-date-epoch/>
const EPOCH_ARG: &str = "SOURCE_DATE_EPOCH";

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
    let source = context::read_dockerfile(
        &request.context,
        request.dockerfile.as_deref(),
        std::io::stdin(),
    )?;
    let dockerfile = dockerfile::parse(&source.name, &source.text)?;
    let settings = request.plan.clone();
    let graph = plan::graph(&dockerfile, &settings, &|_| None)?;
    let epoch = epoch(request)?;
    let rules = IgnoreRules::parse(&source.ignore)?;
    let context = Arc::new(BuildContext::directory(&request.context, rules)?);
    let store = Arc::new(Store::open(&request.root)?);
    let client = Client::new(request.registry.clone())?;

    let resolving = Instant::now();
    let (graph, images) = resolve_all(&client, &dockerfile, &settings, graph).await?;
    timings.add("resolve", resolving.elapsed());

    let configs: Vec<_> = images.iter().map(|image| image.config.clone()).collect();
    let plan = plan::lower(&dockerfile, &graph, &settings, &configs)?;
    let rules = context.rules();
    ask::check_build(request, &dockerfile, rules, (&graph, &configs), &**progress)?;
    for warning in &plan.warnings {
        progress.event(BuildEvent::Warning {
            message: warning.clone(),
        });
    }

    let push = if request.push {
        request.tags.clone()
    } else {
        Vec::new()
    };
    let settings = build::Settings {
        keep_blobs: !request.outputs.is_empty() || needs_base_blobs(&push, &images),
        store: Arc::clone(&store),
        client: client.clone(),
        progress: Arc::clone(progress),
        cancel: cancel.clone(),
        contexts: [(ContextId::MAIN, context)].into(),
        images,
        sandbox: request.sandbox,
        world,
        platform: request.plan.platform.clone(),
        epoch,
        secrets: Arc::clone(&request.secrets),
        agents: Arc::clone(&request.agents),
        push: push.clone(),
    };
    let built = build::build(&plan, settings, Arc::clone(timings)).await?;
    let (origins, mut layer_bytes) = (built.origins.clone(), built.uploaded_bytes.clone());
    let image = assemble(plan, built, epoch, request.annotations.clone())?;

    let publishing = Instant::now();
    for output in &request.outputs {
        let Output::OciArchive { dest } = output;
        fetch_missing(&client, &store, &image, &origins).await?;
        let (image, tags, store, dest) = (
            image.clone(),
            request.tags.clone(),
            Arc::clone(&store),
            dest.clone(),
        );
        let digest = image.raw_manifest.digest.clone();
        let reference = dest.display().to_string();
        tokio::task::spawn_blocking(move || export::oci_archive(&image, &tags, &store, &dest))
            .await
            .context("a task ended abnormally")??;
        progress.event(BuildEvent::Published {
            reference,
            digest,
            uploaded_bytes: 0,
        });
    }
    for tag in &push {
        // Several tags of one repository share what was sent; the first one's event has it.
        let sent = layer_bytes.remove(tag.repository()).unwrap_or(0);
        publish(&client, tag, &image, progress, sent)
            .await
            .with_context(|| format!("pushing {tag}"))?;
    }
    timings.add("publish", publishing.elapsed());
    write_result_files(request, &image)?;
    Ok(BuildResult {
        digest: image.raw_manifest.digest.clone(),
        image_id: image.manifest.config.digest.clone(),
    })
}

/// Resolves the images that `graph` needs. Their triggers may need more.
async fn resolve_all(
    client: &Client,
    dockerfile: &Dockerfile,
    settings: &plan::Settings,
    mut graph: StageGraph,
) -> anyhow::Result<(StageGraph, Vec<Resolved>)> {
    let mut known: Vec<(ImageNeed, Resolved)> = Vec::new();
    loop {
        let is_known = |need: &ImageNeed| known.iter().any(|(known, _)| known.is_same(need));
        let missing: Vec<ImageNeed> = graph
            .images
            .iter()
            .filter(|n| !is_known(n))
            .cloned()
            .collect();
        if missing.is_empty() {
            break;
        }
        let resolved = try_join_all(missing.iter().map(|need| resolve(client, need))).await?;
        known.extend(missing.into_iter().zip(resolved));
        let config = |need: &ImageNeed| {
            let known = known.iter().find(|(known, _)| known.is_same(need));
            known.map(|(_, resolved)| resolved.config.clone())
        };
        graph = plan::graph(dockerfile, settings, &config)?;
    }
    let find = |need: &ImageNeed| {
        let known = known.iter().find(|(known, _)| known.is_same(need));
        known.map(|(_, resolved)| resolved.clone())
    };
    let images = graph.images.iter().filter_map(find).collect();
    Ok((graph, images))
}

async fn resolve(client: &Client, need: &ImageNeed) -> anyhow::Result<Resolved> {
    let ImageSource::Registry(reference) = &need.source else {
        anyhow::bail!("{}: OCI layouts are not supported yet", need.place);
    };
    client
        .resolve(reference, &need.platform)
        .await
        .with_context(|| {
            format!(
                "{}: resolving {reference} for {}",
                need.place, need.platform
            )
        })
}

/// `SOURCE_DATE_EPOCH`: the build argument, else the environment's.
fn epoch(request: &BuildRequest) -> anyhow::Result<Option<i64>> {
    match request
        .plan
        .build_args
        .get(EPOCH_ARG)
        .filter(|text| !text.is_empty())
    {
        None => Ok(request.epoch),
        Some(text) => {
            let seconds = text.parse::<i64>().ok().filter(|seconds| *seconds >= 0);
            let seconds = seconds.with_context(|| {
                format!("--build-arg {EPOCH_ARG}={text:?}: expected seconds since 1970 as a whole number")
            })?;
            Ok(Some(seconds))
        }
    }
}

/// Whether a base image lies at another registry than where the image goes: then its
/// blobs are sent, and downloading them for a step should keep them.
fn needs_base_blobs(push: &[Reference], images: &[Resolved]) -> bool {
    push.iter().any(|tag| {
        images
            .iter()
            .any(|image| image.reference.repository().registry() != tag.repository().registry())
    })
}

/// Joins layers, config and history.
fn assemble(
    plan: Plan,
    built: Built,
    epoch: Option<i64>,
    annotations: Annotations,
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
    Ok(image::assemble(config, built.layers, annotations))
}

/// Downloads blobs that an output needs and no step needed.
async fn fetch_missing(
    client: &Client,
    store: &Arc<Store>,
    image: &Image,
    origins: &[Option<image::Repository>],
) -> anyhow::Result<()> {
    for (layer, origin) in image.layers.iter().zip(origins) {
        let digest = &layer.descriptor.digest;
        if store.has_blob_of(&layer.descriptor) {
            continue;
        }
        let origin = origin
            .as_ref()
            .with_context(|| format!("the blob {digest} is no longer in the store"))?;
        let stream = client.open_blob(origin, &layer.descriptor).await?;
        let mut reader = tokio_util::io::SyncIoBridge::new(stream);
        let (store, digest) = (Arc::clone(store), digest.clone());
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
