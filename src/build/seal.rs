//! A finished step's changes → blob, beside later steps.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use anyhow::Context as _;
use tokio::sync::oneshot;

use super::layer::{Filesystem, chain_of};
use super::{Cancelled, Engine};
use crate::layer::{self, AppliedLayer, Pool, SealOptions, SealedLayer, Watch};
use crate::rootfs::{self, Change, Stack, Tree};
use crate::store::GrowingBlob;

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
) -> Sealing {
    let changed = Arc::clone(tree);
    let Sealing { task, growing } = spawn(engine, move |engine, pool, watch| {
        Ok(layer::seal(
            rootfs::changes(&changed, &below),
            &engine.seal_options(),
            pool,
            watch,
            &engine.store,
        )?)
    });
    let (engine, tree, parent) = (Arc::clone(engine), Arc::clone(tree), parent.clone());
    let task = tokio::spawn(async move {
        let sealed = task.await.context("sealing a layer")??;
        let chain = chain_of(&parent.layers, &sealed.diff_id).await?;
        engine.store.adopt_chained_tree(tree.path(), &chain)?;
        Ok(sealed)
    });
    Sealing { task, growing }
}

/// Starts sealing a list of changes; where the layer will be mounted, its tree is made from the
/// same bytes.
pub(super) fn seal_changes(
    engine: &Arc<Engine>,
    changes: Vec<Change>,
    is_mounted: bool,
) -> Sealing {
    spawn(engine, move |engine, pool, watch| {
        let changes = changes.into_iter().map(Ok::<_, std::convert::Infallible>);
        let (options, store) = (engine.seal_options(), &engine.store);
        if !is_mounted || engine.check_world().is_err() {
            return Ok(layer::seal(changes, &options, pool, watch, store)?);
        }
        let tree = store.tmp_dir("tree-")?;
        let sealed = layer::seal_and_apply(changes, &options, pool, watch, store, &tree);
        match sealed {
            Ok((sealed, Ok(applied))) if is_whole(&applied) => {
                store.adopt_tree(&tree, &sealed.diff_id)?;
                Ok(sealed)
            }
            // Whoever mounts it unpacks the blob, and says what is wrong.
            sealed => {
                if let Ok((_, applied)) = &sealed {
                    tracing::debug!(?applied, "the tree is not made while the layer is sealed");
                }
                if let Err(error) = crate::store::remove_tree(&tree) {
                    tracing::debug!(tree = %tree.display(), %error, "cannot remove an incomplete tree");
                }
                Ok(sealed?.0)
            }
        }
    })
}

/// Whether the tree has all that is in the layer, and depends on no layer below it.
fn is_whole(applied: &AppliedLayer) -> bool {
    applied.skipped_devices.is_empty()
        && applied.skipped_xattrs.is_empty()
        && applied.implied_directories.is_empty()
}

/// A layer that is being sealed.
pub(super) struct Sealing {
    /// Gives the layer when it is done.
    pub(super) task: tokio::task::JoinHandle<anyhow::Result<SealedLayer>>,
    /// The layer's blob, as soon as its first byte can come.
    pub(super) growing: oneshot::Receiver<GrowingBlob>,
}

fn spawn(
    engine: &Arc<Engine>,
    work: impl FnOnce(&Engine, &Pool, Watch<'_>) -> anyhow::Result<SealedLayer> + Send + 'static,
) -> Sealing {
    let engine = Arc::clone(engine);
    let (follower, growing) = oneshot::channel();
    let task = tokio::task::spawn_blocking(move || {
        let started = Instant::now();
        let is_stopped = || engine.is_unwanted();
        let watch = Watch {
            is_stopped: &is_stopped,
            // Nobody follows where nothing is pushed.
            follow: Box::new(|blob| drop(follower.send(blob))),
        };
        let pool = Pool::shared().context("starting the threads that compress")?;
        let sealed = work(&engine, &pool, watch).map_err(|error| {
            if engine.is_unwanted() {
                Cancelled.into()
            } else {
                error.context("writing the layer")
            }
        });
        engine.timings.add("seal", started.elapsed());
        sealed
    });
    Sealing { task, growing }
}

impl Engine {
    fn seal_options(&self) -> SealOptions {
        SealOptions {
            epoch: self.epoch,
            compression: self.compression,
        }
    }

    /// Whether nobody wants what is still being sealed: the user has stopped the build. When a
    /// step failed, the layers of others are wanted, for the next build.
    fn is_unwanted(&self) -> bool {
        self.cancel.is_cancelled() && !self.has_failed.load(Ordering::Relaxed)
    }
}
