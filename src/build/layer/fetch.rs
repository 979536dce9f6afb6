//! Blobs that are elsewhere → the store.

use std::sync::Arc;

use anyhow::Context as _;
use tokio_util::io::SyncIoBridge;

use super::super::Engine;
use super::{Layer, Origin};
use crate::image::{Descriptor, ImageLayer};
use crate::registry::{Client, RegistryError};
use crate::store::Store;

/// Brings a blob into the store, unless it is there.
///
/// # Errors
/// Where it is in neither; [`RegistryError`] and
/// [`LayoutError`](crate::layout::LayoutError) of its origin, and those of the store.
pub(crate) async fn fetch_blob(
    client: &Client,
    store: &Arc<Store>,
    origin: Option<&Origin>,
    descriptor: &Descriptor,
) -> anyhow::Result<()> {
    if store.has_blob_of(descriptor) {
        return Ok(());
    }
    let digest = &descriptor.digest;
    let origin = origin.with_context(|| format!("the blob {digest} is no longer in the store"))?;
    let (store, descriptor) = (Arc::clone(store), descriptor.clone());
    let repository = match origin {
        Origin::Registry(repository) => repository,
        Origin::Layout(layout) => {
            let layout = layout.clone();
            let import = tokio::task::spawn_blocking(move || layout.import(&descriptor, &store));
            return Ok(import.await.context("a task ended abnormally")??);
        }
    };
    let stream = client.open_blob(repository, &descriptor).await?;
    let mut reader = SyncIoBridge::new(stream);
    let fetch = tokio::task::spawn_blocking(move || -> anyhow::Result<()> {
        let mut blob = store.write_blob()?;
        if let Err(error) = std::io::copy(&mut reader, &mut blob) {
            // Whose error it is is asked of its type.
            return Err(match error.downcast::<RegistryError>() {
                Ok(error) => error.into(),
                Err(error) => error.into(),
            });
        }
        blob.commit(Some(&descriptor.digest))?;
        Ok(())
    });
    let fetched = fetch.await.context("a task ended abnormally")?;
    fetched.with_context(|| format!("pulling {repository}"))
}

impl Layer {
    /// Brings the blob into the store, unless it is there.
    pub(in super::super) async fn fetch(
        &self,
        engine: &Engine,
        names: &ImageLayer,
    ) -> anyhow::Result<()> {
        let descriptor = &names.descriptor;
        if self.origin.is_none() && !engine.store.has_blob_of(descriptor) {
            return Err(self.missing(&descriptor.digest));
        }
        let fetched = fetch_blob(
            &engine.client,
            &engine.store,
            self.origin.as_ref(),
            descriptor,
        );
        match fetched.await {
            Err(error) if error.chain().any(|cause| cause.is::<RegistryError>()) => {
                Err(self.lost(&descriptor.digest, error))
            }
            fetched => fetched,
        }
    }
}
