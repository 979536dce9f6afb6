//! A finished step's changes → blob, beside later steps.

use std::sync::Arc;
use std::time::Instant;

use anyhow::Context as _;

use super::Engine;
use super::layer::{Filesystem, chain_of};
use crate::layer::{self, SealOptions, SealedLayer};
use crate::rootfs::{self, Change, Stack, Tree};

/// Starts sealing what a RUN step changed. The tree gets its name in the store when the
/// diff IDs of its layer and of those of `parent` are known; it can be used before.
///
/// The tree is never named by its own layer alone: it may hold what is as it was below (a
/// file that was opened for writing, the directory of a mount point), which the layer does
/// not have, and which hides other files where that layer lies on others.
pub(super) fn seal_tree(
    engine: &Arc<Engine>,
    tree: &Arc<Tree>,
    below: Stack,
    parent: &Filesystem,
) -> tokio::task::JoinHandle<anyhow::Result<SealedLayer>> {
    let changed = Arc::clone(tree);
    let sealing = spawn(engine, move |engine| {
        Ok(layer::seal(
            rootfs::changes(&changed, &below),
            &engine.seal_options(),
            &engine.store,
        )?)
    });
    let (engine, tree, parent) = (Arc::clone(engine), Arc::clone(tree), parent.clone());
    tokio::spawn(async move {
        let sealed = sealing.await.context("sealing a layer")??;
        let chain = chain_of(&parent.layers, &sealed.diff_id).await?;
        engine.store.adopt_chained_tree(tree.path(), &chain)?;
        Ok(sealed)
    })
}

/// Starts sealing a list of changes.
pub(super) fn seal_changes(
    engine: &Arc<Engine>,
    changes: Vec<Change>,
) -> tokio::task::JoinHandle<anyhow::Result<SealedLayer>> {
    spawn(engine, move |engine| {
        let changes = changes.into_iter().map(Ok::<_, std::convert::Infallible>);
        Ok(layer::seal(changes, &engine.seal_options(), &engine.store)?)
    })
}

fn spawn(
    engine: &Arc<Engine>,
    work: impl FnOnce(&Engine) -> anyhow::Result<SealedLayer> + Send + 'static,
) -> tokio::task::JoinHandle<anyhow::Result<SealedLayer>> {
    let engine = Arc::clone(engine);
    tokio::task::spawn_blocking(move || {
        let started = Instant::now();
        let sealed = work(&engine).context("writing the layer");
        engine.timings.add("seal", started.elapsed());
        sealed
    })
}

impl Engine {
    fn seal_options(&self) -> SealOptions {
        SealOptions {
            epoch: self.epoch,
            ..SealOptions::default()
        }
    }
}
