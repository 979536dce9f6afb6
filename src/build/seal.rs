//! A finished step's changes → blob, beside later steps.

use std::sync::Arc;
use std::time::Instant;

use anyhow::Context as _;

use super::Engine;
use crate::layer::{self, SealOptions, SealedLayer};
use crate::rootfs::{self, Change, Stack, Tree};

/// Starts sealing what a RUN step changed. The tree gets its name in the store when its
/// diff ID is known; it can be used before.
pub(super) fn seal_tree(
    engine: &Arc<Engine>,
    tree: &Arc<Tree>,
    below: Stack,
) -> tokio::task::JoinHandle<anyhow::Result<SealedLayer>> {
    let tree = Arc::clone(tree);
    spawn(engine, move |engine| {
        let sealed = layer::seal(
            rootfs::changes(&tree, &below),
            &engine.seal_options(),
            &engine.store,
        )?;
        engine.store.adopt_tree(tree.path(), &sealed.diff_id)?;
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
