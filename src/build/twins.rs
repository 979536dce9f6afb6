//! Steps that are equal and not one: they do the same on the same layers, which came to be in
//! different ways, such as the bases of two platforms.
//!
//! [`plan::join`](crate::plan::join()) makes one of the steps that are equal by name. What is
//! equal only by what it is applied to shows while the build goes on. Done side by side, each
//! would have a layer and a date of its own, of which one stays in the cache, and the next build
//! would make other images. So one of them is done, and the others wait for its record.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex};

use tokio::sync::OwnedMutexGuard;

use super::cache::{Definition, Inputs, Record};
use super::layer::Layer;
use crate::image::Digest;

/// The steps of a build that may turn out to be equal.
#[derive(Default)]
pub(super) struct Twins {
    /// The definitions that several steps have.
    definitions: BTreeSet<Digest>,
    /// By definition and inputs.
    turns: Mutex<HashMap<(Digest, Digest), Arc<Taken>>>,
}

/// Held by the step whose turn it is; what one made before is in it.
type Taken = tokio::sync::Mutex<Option<Made>>;

/// What a step made.
pub(super) struct Made {
    pub(super) record: Record,
    pub(super) layer: Arc<Layer>,
}

/// Keeps equal steps from being done, until one of them was done and recorded.
pub(super) type Turn = OwnedMutexGuard<Option<Made>>;

impl Twins {
    /// Of a plan whose steps have these definitions.
    pub(super) fn new(definitions: impl IntoIterator<Item = Definition>) -> Self {
        let mut once = BTreeSet::new();
        let several = definitions.into_iter().filter_map(|definition| {
            let digest = definition.digest().clone();
            let is_first = once.insert(digest.clone());
            (!is_first).then_some(digest)
        });
        Self {
            definitions: several.collect(),
            turns: Mutex::default(),
        }
    }

    /// Whether several steps have this definition.
    pub(super) fn has(&self, definition: &Definition) -> bool {
        self.definitions.contains(definition.digest())
    }

    /// Waits until no other step with this definition on these inputs, as far as they are known
    /// before it is done, is under way.
    pub(super) async fn turn(&self, definition: &Definition, inputs: &Inputs) -> Turn {
        let turn = {
            let key = (definition.digest().clone(), inputs.digest());
            let turns = self.turns.lock();
            let mut turns = turns.expect("nothing panics while it holds this lock");
            Arc::clone(turns.entry(key).or_default())
        };
        turn.lock_owned().await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn equal_steps_take_turns_and_others_do_not_wait() {
        let [run, copy] = ["run", "copy"].map(|kind| Definition::new(kind, &1));
        let twins = Twins::new([run.clone(), copy.clone(), run.clone(), run.clone()]);
        assert!(twins.has(&run) && !twins.has(&copy));
        let inputs = |parent: &[u8]| Inputs {
            parent: Some(Digest::of(parent)),
            source: None,
            content: None,
        };
        let first = twins.turn(&run, &inputs(b"a")).await;
        let _other = twins.turn(&run, &inputs(b"b")).await;
        let a = inputs(b"a");
        let mut second = std::pin::pin!(twins.turn(&run, &a));
        assert!(futures_util::poll!(second.as_mut()).is_pending());
        drop(first);
        assert!(second.await.is_none(), "the first one made nothing");
    }
}
