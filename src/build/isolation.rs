//! How far RUN steps are kept from this machine: what a build says of it, and refuses.

use std::sync::Arc;

use thiserror::Error;

use super::Engine;
use crate::plan::{Joined, Network, Operation, Run};
use crate::sandbox::World;

/// Steps would be isolated less than was required.
#[derive(Clone, Debug, Error)]
#[error("isolation is required (--require-isolation): {}", .weaknesses.join("; "))]
pub struct NotIsolated {
    /// What is not given, one sentence each.
    pub weaknesses: Vec<String>,
    /// What to do about it.
    pub hint: String,
}

/// Has a machine that isolates less say so before any step of `plan` is begun, and refuses it
/// where isolation is `required`. Without RUN there is nothing to isolate.
///
/// # Errors
/// [`NotIsolated`]; where isolation is required also that there is no sandbox at all.
pub(super) async fn check(
    plan: &Joined,
    engine: &Arc<Engine>,
    required: bool,
) -> anyhow::Result<()> {
    let is_weak = matches!(*engine.world, World::Chroot { .. });
    if runs(plan).next().is_none() || !(required || is_weak) {
        return Ok(());
    }
    let is_private = runs(plan).any(|run| run.network == Network::Default);
    let asked = Arc::clone(engine);
    let check = move || {
        let sandbox = asked.sandbox()?;
        let mut weaknesses: Vec<String> = sandbox.isolates().err().into_iter().collect();
        if is_private {
            weaknesses.extend(sandbox.private_network().err());
        }
        if !required || weaknesses.is_empty() {
            return Ok(());
        }
        Err(NotIsolated {
            weaknesses,
            hint: hint(&asked.world),
        }
        .into())
    };
    engine.blocking(check).await
}

fn hint(world: &World) -> String {
    let anyway = "allow it: without --require-isolation, or in the service with \
                  allow_weak_isolation = true";
    let better = match world {
        World::Chroot { reason } | World::None { reason, .. } => reason.hint(),
        _ => Some("install passt or slirp4netns, and choose --sandbox=auto".to_owned()),
    };
    match better {
        Some(better) => format!("{better}; or {anyway}"),
        None => anyway.to_owned(),
    }
}

fn runs(plan: &Joined) -> impl Iterator<Item = &Run> {
    plan.steps.iter().filter_map(|step| match &step.operation {
        Operation::Run(run) => Some(run),
        _ => None,
    })
}
