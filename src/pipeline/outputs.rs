//! What `--output` names is written when everything is built.

use std::path::Path;
use std::sync::Arc;

use anyhow::Context as _;

use super::{
    BuildRequest, ImageFormat, ImageOutput, LayerCompression, Output, fetch_missing,
    first_compression,
};
use crate::build::{Files, Origin};
use crate::export::{self, ArchiveKind, LocalReport};
use crate::image::{self, Annotations, Image, Reference};
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
    pub(super) image: &'b Image,
    pub(super) origins: &'b [Option<Origin>],
    /// For each layer, whether this build made it.
    pub(super) are_new: &'b [bool],
    pub(super) files: &'b Files,
    pub(super) epoch: Option<i64>,
    pub(super) progress: &'b dyn Progress,
    pub(super) cancel: &'b Cancel,
}

/// Refuses what cannot be written, before anything is built.
pub(super) fn check(request: &BuildRequest) -> anyhow::Result<()> {
    for output in &request.outputs {
        match output {
            Output::Image(ImageOutput {
                format: ImageFormat::OciLayout,
                dest,
                ..
            })
            | Output::Local { dest } => export::check_directory(dest)?,
            Output::Image(ImageOutput { dest, .. }) | Output::Tar { dest } => {
                export::check_file(dest)?;
            }
        }
    }
    Ok(())
}

/// `image` with further annotations, which change its manifest.
fn annotated(image: &Image, more: &Annotations) -> Image {
    if *more == Annotations::default() {
        return image.clone();
    }
    let mut all = Annotations {
        manifest: image.manifest.annotations.clone(),
        descriptor: image.descriptor_annotations.clone(),
    };
    all.manifest.extend(more.manifest.clone());
    all.descriptor.extend(more.descriptor.clone());
    image::assemble(image.config.clone(), image.layers.clone(), all)
}

impl Exporter<'_> {
    /// The image whose digests the build reports: as it is pushed, or as the last file has it.
    pub(super) async fn reported(&self) -> anyhow::Result<Image> {
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
            return Ok(annotated(self.image, annotations));
        }
        let image = self.compressed(compression).await?;
        Ok(annotated(&image, annotations))
    }

    /// The image with its layers compressed as `wanted`, which converts those that are not.
    async fn compressed(&self, wanted: LayerCompression) -> anyhow::Result<Image> {
        let made = first_compression(self.request);
        let mut layers = self.image.layers.clone();
        let mut is_other = false;
        for ((layer, origin), is_new) in layers.iter_mut().zip(self.origins).zip(self.are_new) {
            let made = is_new.then_some(made);
            if !wanted.converts(made, &layer.descriptor.media_type) {
                continue;
            }
            is_other = true;
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
        if !is_other {
            return Ok(self.image.clone());
        }
        let annotations = Annotations {
            manifest: self.image.manifest.annotations.clone(),
            descriptor: self.image.descriptor_annotations.clone(),
        };
        Ok(image::assemble(
            self.image.config.clone(),
            layers,
            annotations,
        ))
    }

    /// Writes all outputs, one after the other.
    pub(super) async fn write_all(&self) -> anyhow::Result<()> {
        for output in &self.request.outputs {
            let (dest, image) = match output {
                Output::Image(output) => (&output.dest, self.write_image(output).await?),
                Output::Tar { dest } => {
                    let epoch = self.epoch;
                    let stack = self.files.stack().await?;
                    self.blocking(dest, move |dest, is_cancelled| {
                        export::root_tar(&stack, epoch, dest, is_cancelled)
                    })
                    .await?;
                    (dest, self.image.clone())
                }
                Output::Local { dest } => {
                    let epoch = self.epoch;
                    let stack = self.files.stack().await?;
                    let report = self.blocking(dest, move |dest, is_cancelled| {
                        export::local(&stack, epoch, dest, is_cancelled)
                    });
                    self.warn(dest, &report.await?);
                    (dest, self.image.clone())
                }
            };
            self.progress.event(BuildEvent::Published {
                reference: dest.display().to_string(),
                digest: image.raw_manifest.digest.clone(),
                uploaded_bytes: 0,
            });
        }
        Ok(())
    }

    async fn write_image(&self, output: &ImageOutput) -> anyhow::Result<Image> {
        let image = self.compressed(output.compression).await?;
        let image = annotated(&image, &output.annotations);
        let layers = image.layers.iter().zip(self.origins);
        fetch_missing(self.client, self.store, layers).await?;
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
