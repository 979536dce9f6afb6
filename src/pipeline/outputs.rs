//! What `--output` names is written when everything is built.

use std::path::Path;
use std::sync::Arc;

use anyhow::Context as _;

use super::{
    BuildRequest, ImageFormat, ImageOutput, Joined, LayerCompression, Output, fetch_missing,
    first_compression,
};
use crate::build::{Files, Origin};
use crate::export::{self, ArchiveKind, LocalReport, Root};
use crate::failure::{Failure, Kind};
use crate::image::{self, Annotations, Image, ImageLayer, ImageOrIndex, Platform, Reference};
use crate::layer::{self, Pool};
use crate::progress::{BuildEvent, Progress};
use crate::registry::Client;
use crate::sandbox::Cancel;
use crate::store::Store;

/// What all outputs are made of.
pub(super) struct Exporter<'b> {
    pub(super) request: &'b BuildRequest,
    pub(super) client: &'b Client,
    pub(super) store: &'b Arc<Store>,
    /// One for each platform.
    pub(super) made: &'b [Made],
    pub(super) epoch: Option<i64>,
    pub(super) progress: &'b dyn Progress,
    pub(super) cancel: &'b Cancel,
}

/// The image that was built for one platform.
pub(super) struct Made {
    pub(super) platform: Platform,
    /// Without annotations, which each output has its own.
    pub(super) image: Image,
    pub(super) origins: Vec<Option<Origin>>,
    /// For each layer, whether this build made it.
    pub(super) are_new: Vec<bool>,
    pub(super) files: Files,
}

/// Refuses what cannot be written, before anything is built.
pub(super) fn check(request: &BuildRequest) -> anyhow::Result<()> {
    let refuse = |what: &str| {
        let failure = Failure::new(Kind::Configuration, what);
        Err(failure.with_hint("use type=oci, or build one platform at a time"))
    };
    for output in &request.outputs {
        match output {
            Output::Image(ImageOutput {
                format: ImageFormat::OciLayout,
                dest,
                ..
            })
            | Output::Local { dest, .. } => export::check_directory(dest)?,
            Output::Image(ImageOutput { format, dest, .. }) => {
                if *format == ImageFormat::DockerArchive && request.plan.multi_platform {
                    refuse(
                        "type=docker: an archive for docker load holds one image and no index of several platforms",
                    )?;
                }
                export::check_file(dest)?;
                super::check_parent("--output", dest)?;
            }
            Output::Tar {
                dest,
                platform_split,
            } => {
                if *platform_split == Some(false) && !request.further_platforms.is_empty() {
                    refuse(
                        "type=tar,platform-split=false: the files of several platforms cannot be in one directory of a tar",
                    )?;
                }
                export::check_file(dest)?;
                super::check_parent("--output", dest)?;
            }
        }
    }
    Ok(())
}

/// Refuses annotations for platforms that nothing is built for.
pub(super) fn check_platforms(request: &BuildRequest, plan: &Joined) -> anyhow::Result<()> {
    let of_outputs = request.outputs.iter().filter_map(|output| match output {
        Output::Image(output) => Some(&output.annotations),
        Output::Tar { .. } | Output::Local { .. } => None,
    });
    let all = [&request.annotations, &request.push_annotations];
    let mut named = (all.into_iter().chain(of_outputs)).flat_map(|all| all.platforms.keys());
    let is_built = |platform: &Platform| {
        let mut targets = plan.targets.iter();
        targets.any(|target| image::is_annotated(&target.platform, platform))
    };
    if let Some(other) = named.find(|platform| !is_built(platform)) {
        let targets = plan.targets.iter();
        let targets: Vec<_> = targets.map(|target| target.platform.to_string()).collect();
        anyhow::bail!(Failure::new(
            Kind::Configuration,
            format!(
                "an annotation is for the platform {other}, but what is built is for {}",
                targets.join(", ")
            )
        ));
    }
    Ok(())
}

/// What an output with these annotations and the layers of each image has: an image, or an
/// index of all.
fn annotated(
    request: &BuildRequest,
    made: &[Made],
    layers: Vec<Vec<ImageLayer>>,
    more: &Annotations,
) -> ImageOrIndex {
    let annotations = request.annotations.with(more);
    let images = made.iter().zip(layers).map(|(one, layers)| {
        let config = one.image.config.clone();
        let image = image::assemble(config, layers, annotations.of(&one.platform));
        (one.platform.clone(), image)
    });
    let mut images: Vec<_> = images.collect();
    match images.pop() {
        Some((_, only)) if images.is_empty() && !request.plan.multi_platform => {
            ImageOrIndex::Image(Box::new(only))
        }
        last => {
            images.extend(last);
            ImageOrIndex::Index(image::assemble_index(images, &annotations))
        }
    }
}

impl Exporter<'_> {
    /// The image or index whose digests the build reports: as it is pushed, or as the last
    /// file has it.
    pub(super) async fn reported(&self) -> anyhow::Result<ImageOrIndex> {
        let request = self.request;
        let mut outputs = request.outputs.iter().rev();
        let last = outputs.find_map(|output| match output {
            Output::Image(output) => Some((&output.annotations, output.compression)),
            Output::Tar { .. } | Output::Local { .. } => None,
        });
        let pushed = (&request.push_annotations, request.push_compression);
        let (annotations, compression) = last.filter(|_| !request.push).unwrap_or(pushed);
        let is_written = request.push || last.is_some();
        if !is_written {
            return Ok(self.as_made(annotations));
        }
        let layers = self.compressed(compression).await?;
        Ok(annotated(request, self.made, layers, annotations))
    }

    /// What an output with these annotations has, with the layers as they were made.
    fn as_made(&self, annotations: &Annotations) -> ImageOrIndex {
        let layers = self.made.iter().map(|one| one.image.layers.clone());
        annotated(self.request, self.made, layers.collect(), annotations)
    }

    /// The layers of each image compressed as `wanted`, which converts those that are not.
    async fn compressed(&self, wanted: LayerCompression) -> anyhow::Result<Vec<Vec<ImageLayer>>> {
        let mut all = Vec::new();
        for one in self.made {
            all.push(self.converted(one, wanted).await?);
        }
        Ok(all)
    }

    async fn converted(
        &self,
        one: &Made,
        wanted: LayerCompression,
    ) -> anyhow::Result<Vec<ImageLayer>> {
        let made = first_compression(self.request);
        let mut layers = one.image.layers.clone();
        for ((layer, origin), is_new) in layers.iter_mut().zip(&one.origins).zip(&one.are_new) {
            let made = is_new.then_some(made);
            if !wanted.converts(made, &layer.descriptor.media_type) {
                continue;
            }
            let (store, diff_id) = (Arc::clone(self.store), layer.diff_id.clone());
            let compression = wanted.compression;
            if let Some(known) = layer::converted(&diff_id, compression, &store) {
                layer.descriptor = known;
                continue;
            }
            fetch_missing(self.client, self.store, [(&*layer, origin)]).await?;
            let (blob, cancel) = (layer.descriptor.clone(), self.cancel.clone());
            let what = format!("compressing layer {} anew", blob.digest);
            let converting = tokio::task::spawn_blocking(move || {
                let pool = Pool::shared().context("starting the threads that compress")?;
                let is_stopped = || cancel.is_cancelled();
                let converted =
                    layer::convert(&blob, &diff_id, compression, &pool, &is_stopped, &store);
                anyhow::Ok(converted?)
            });
            let converted = converting
                .await
                .context("a task ended abnormally")
                .flatten();
            layer.descriptor = converted.context(what)?;
        }
        Ok(layers)
    }

    /// Writes all outputs, one after the other.
    pub(super) async fn write_all(&self) -> anyhow::Result<()> {
        for output in &self.request.outputs {
            let none = Annotations::default();
            let epoch = self.epoch;
            let (dest, image) = match output {
                Output::Image(output) => (&output.dest, self.write_image(output).await?),
                Output::Tar {
                    dest,
                    platform_split,
                } => {
                    let roots = self.roots(*platform_split).await?;
                    self.blocking(dest, move |dest, is_cancelled| {
                        export::root_tar(&roots, epoch, dest, is_cancelled)
                    })
                    .await?;
                    (dest, self.as_made(&none))
                }
                Output::Local {
                    dest,
                    platform_split,
                } => {
                    let roots = self.roots(*platform_split).await?;
                    let report = self.blocking(dest, move |dest, is_cancelled| {
                        export::local(&roots, epoch, dest, is_cancelled)
                    });
                    self.warn(dest, &report.await?);
                    (dest, self.as_made(&none))
                }
            };
            self.progress.event(BuildEvent::Published {
                reference: dest.display().to_string(),
                digest: image.raw().digest.clone(),
                uploaded_bytes: 0,
            });
        }
        Ok(())
    }

    /// The files of all platforms.
    async fn roots(&self, platform_split: Option<bool>) -> anyhow::Result<Vec<Root>> {
        let in_directory = platform_split.unwrap_or(self.request.plan.multi_platform);
        let mut roots = Vec::new();
        for one in self.made {
            roots.push(Root {
                platform: one.platform.clone(),
                in_directory,
                stack: one.files.stack().await?,
            });
        }
        Ok(roots)
    }

    async fn write_image(&self, output: &ImageOutput) -> anyhow::Result<ImageOrIndex> {
        let layers = self.compressed(output.compression).await?;
        let image = annotated(self.request, self.made, layers, &output.annotations);
        for (image, one) in image.images().iter().zip(self.made) {
            let layers = image.layers.iter().zip(&one.origins);
            fetch_missing(self.client, self.store, layers).await?;
        }
        let mut names = self.request.tags.clone();
        let further = output.names.iter().filter(|name| !names.contains(name));
        let further: Vec<Reference> = further.cloned().collect();
        names.extend(further);
        let (written, store, format) = (image.clone(), Arc::clone(self.store), output.format);
        self.blocking(&output.dest, move |dest, is_cancelled| {
            let kind = match format {
                ImageFormat::OciArchive => ArchiveKind::Oci,
                ImageFormat::DockerArchive => ArchiveKind::Docker,
                ImageFormat::OciLayout => {
                    return export::image_layout(&written, &names, &store, dest, is_cancelled);
                }
            };
            export::image_archive(kind, &written, &names, &store, dest, is_cancelled)
        })
        .await?;
        Ok(image)
    }

    /// Runs blocking work that ends when the build is stopped.
    async fn blocking<T: Send + 'static, E>(
        &self,
        dest: &Path,
        work: impl FnOnce(&Path, export::IsCancelled<'_>) -> Result<T, E> + Send + 'static,
    ) -> anyhow::Result<T>
    where
        E: std::error::Error + Send + Sync + 'static,
    {
        let (dest, cancel) = (dest.to_owned(), self.cancel.clone());
        let task = tokio::task::spawn_blocking(move || work(&dest, &|| cancel.is_cancelled()));
        Ok(task.await.context("a task ended abnormally")??)
    }

    fn warn(&self, dest: &Path, report: &LocalReport) {
        for (path, name) in &report.skipped_xattrs {
            self.progress.event(BuildEvent::Warning {
                message: format!(
                    "{path:?} has the extended attribute {name:?}, which the file system of {} cannot hold",
                    dest.display()
                ),
            });
        }
    }
}
