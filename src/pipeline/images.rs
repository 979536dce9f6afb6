//! [`Images`]: the images that a build or a question needs, each resolved once.

use anyhow::Context as _;
use futures_util::future::try_join_all;

use super::BuildRequest;
use crate::context::NamedContext;
use crate::image::{ImageConfig, Reference};
use crate::layout::Layout;
use crate::plan::{ContextId, ImageNeed, ImageSource, StageGraph};
use crate::registry::{Client, Resolved};

/// Images that are resolved already.
#[derive(Default)]
pub(super) struct Images(Vec<(ImageNeed, Resolved)>);

impl Images {
    /// The image that `need` names, where it is here.
    pub(super) fn get(&self, need: &ImageNeed) -> Option<&Resolved> {
        let mut known = self.0.iter();
        known
            .find(|(known, _)| known.is_same(need))
            .map(|(_, resolved)| resolved)
    }

    /// Its config.
    pub(super) fn config(&self, need: &ImageNeed) -> Option<ImageConfig> {
        self.get(need).map(|resolved| resolved.config.clone())
    }

    /// The configs of all images of `graph`, in their order.
    ///
    /// # Errors
    /// One was not resolved.
    pub(super) fn configs(&self, graph: &StageGraph) -> anyhow::Result<Vec<ImageConfig>> {
        let needs = graph.images.iter();
        let configs = needs.map(|need| self.config(need).context("an image was not resolved"));
        configs.collect()
    }

    /// Resolves those of `needs` that are not here. An error comes with the index of its need.
    ///
    /// `client` is called where a registry is asked.
    pub(super) async fn resolve(
        &mut self,
        request: &BuildRequest,
        client: impl FnOnce() -> anyhow::Result<Client>,
        needs: &[ImageNeed],
    ) -> Result<(), (usize, anyhow::Error)> {
        let mut missing: Vec<(usize, &ImageNeed)> = Vec::new();
        for (index, need) in needs.iter().enumerate() {
            let same = |(_, other): &(usize, &ImageNeed)| other.is_same(need);
            if self.get(need).is_none() && !missing.iter().any(same) {
                missing.push((index, need));
            }
        }
        let is_remote =
            |(_, need): &&(usize, &ImageNeed)| matches!(need.source, ImageSource::Registry(_));
        let client = match missing.iter().find(is_remote) {
            Some((first, _)) => Some(client().map_err(|error| (*first, error))?),
            None => None,
        };
        let resolving = missing.iter().map(async |(index, need)| {
            let resolved = resolve(request, client.as_ref(), need).await;
            resolved.map_err(|error| (*index, error))
        });
        let resolved = try_join_all(resolving).await?;
        let new = missing.iter().zip(resolved);
        self.0
            .extend(new.map(|((_, need), image)| ((*need).clone(), image)));
        Ok(())
    }
}

async fn resolve(
    request: &BuildRequest,
    client: Option<&Client>,
    need: &ImageNeed,
) -> anyhow::Result<Resolved> {
    let ImageNeed {
        platform, place, ..
    } = need;
    match &need.source {
        ImageSource::Registry(reference) => {
            let client = client.context("there is no registry client")?;
            let resolved = client.resolve(reference, platform).await;
            resolved.with_context(|| format!("{place}: resolving {reference} for {platform}"))
        }
        ImageSource::Layout(context) => {
            let (name, layout) = layout(request, *context)?;
            let (tag, digest) = (layout.tag.clone(), layout.digest.clone());
            let (platform, path) = (platform.clone(), layout.path.clone());
            let resolving = tokio::task::spawn_blocking(move || {
                Layout::open(&path)?.resolve(&tag, digest.as_ref(), &platform, &name)
            });
            let resolved = resolving.await.context("a task ended abnormally")?;
            resolved.with_context(|| format!("{place}: reading {layout}"))
        }
    }
}

/// The OCI layout that a named context is, with the name that its image goes by.
pub(super) fn layout(
    request: &BuildRequest,
    context: ContextId,
) -> anyhow::Result<(Reference, crate::context::LayoutReference)> {
    match context.named(&request.plan.contexts) {
        Some((name, NamedContext::OciLayout(layout))) => {
            // Names of contexts are names of images, perhaps with a platform.
            let name = name.split("::").next().unwrap_or(name);
            Ok((Reference::parse(name)?, layout.clone()))
        }
        _ => anyhow::bail!("the context {} is no OCI layout", context.0),
    }
}
