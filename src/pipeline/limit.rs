//! `--store-limit`: what was not used for longest goes when the build is over.

use std::sync::Arc;
use std::time::Instant;

use anyhow::Context as _;
use tokio::task::JoinHandle;

use crate::build::Timings;
use crate::progress::{BuildEvent, Progress};
use crate::store::{Pruned, Store};

/// A store that is to stay below a limit.
pub(super) struct LimitedStore {
    store: Arc<Store>,
    limit_bytes: u64,
    /// An earlier build may have left it above the limit, because it used so much.
    at_begin: JoinHandle<anyhow::Result<Pruned>>,
}

impl LimitedStore {
    /// Brings the store below the limit while the build begins.
    pub(super) fn begin(store: &Arc<Store>, limit_bytes: u64) -> Self {
        Self {
            store: Arc::clone(store),
            limit_bytes,
            at_begin: spawn(store, limit_bytes),
        }
    }

    /// Brings the store below the limit when the build has ended, well or not, whose layers
    /// count like all others now. What fails is told and fails no build.
    pub(super) async fn end(self, progress: &dyn Progress, timings: &Timings) {
        let started = Instant::now();
        let work = async {
            self.at_begin.await.context("a task ended abnormally")??;
            self.store.release()?;
            let pruned = spawn(&self.store, self.limit_bytes).await;
            let pruned = pruned.context("a task ended abnormally")??;
            if pruned.left_bytes > self.limit_bytes {
                tracing::info!(
                    left_bytes = pruned.left_bytes,
                    limit_bytes = self.limit_bytes,
                    "the store stays above its limit: running builds use what is there"
                );
            }
            anyhow::Ok(())
        };
        if let Err(error) = work.await {
            progress.event(BuildEvent::Warning {
                message: format!("the store may be above its limit: {error:#}"),
            });
        }
        timings.add("evict", started.elapsed());
    }
}

fn spawn(store: &Arc<Store>, limit_bytes: u64) -> JoinHandle<anyhow::Result<Pruned>> {
    let store = Arc::clone(store);
    tokio::task::spawn_blocking(move || {
        let pruned = store.limit(limit_bytes)?;
        if !pruned.removed.is_empty() {
            tracing::info!(
                objects = pruned.removed.len(),
                bytes = pruned.bytes,
                "removed from the store what was not used for longest"
            );
        }
        Ok(pruned)
    })
}
