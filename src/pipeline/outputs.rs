//! What `--output` names is written when everything is built.

use std::path::Path;
use std::sync::Arc;

use anyhow::Context as _;

use super::{BuildRequest, ImageFormat, ImageOutput, Output, fetch_missing};
use crate::build::{Files, Origin};
use crate::export::{self, ArchiveKind, LocalReport};
use crate::image::{self, Annotations, Image, Reference};
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
pub(super) fn annotated(image: &Image, more: &Annotations) -> Image {
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

/// The image whose digests the build reports: as it is pushed, or as the last file has it.
pub(super) fn reported(request: &BuildRequest, image: &Image) -> Image {
    let last = request
        .outputs
        .iter()
        .rev()
        .find_map(|output| match output {
            Output::Image(output) => Some(&output.annotations),
            Output::Tar { .. } | Output::Local { .. } => None,
        });
    match last {
        Some(annotations) if !request.push => annotated(image, annotations),
        _ => annotated(image, &request.push_annotations),
    }
}

impl Exporter<'_> {
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
        let image = annotated(self.image, &output.annotations);
        fetch_missing(self.client, self.store, &image, self.origins).await?;
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
