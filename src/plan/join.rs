//! The plans of several platforms → one graph, in which equal steps are one.

use std::collections::{BTreeSet, HashMap};
use std::hash::{BuildHasher as _, RandomState};

use super::{ImageId, ImageNeed, Operation, Plan, StageGraph, Step, StepId, Unused};
use crate::image::{History, ImageConfig, Platform};

/// What one run does: the steps of all plans, each once.
#[derive(Clone, Debug)]
pub struct Joined {
    /// The steps; each comes after those that it needs.
    pub steps: Vec<Step>,
    /// The images that they name by [`ImageId`], each once for each platform.
    pub images: Vec<ImageNeed>,
    /// What becomes an image: one for each plan, in their order.
    pub targets: Vec<Target>,
    /// What is surely not meant but stops nothing, each once.
    pub warnings: Vec<String>,
}

/// What becomes an image.
#[derive(Clone, Debug)]
pub struct Target {
    /// What it is for: [`Plan::platform`].
    pub platform: Platform,
    /// The step whose filesystem is the image's: [`Plan::result`].
    pub result: Option<StepId>,
    /// [`Plan::config`].
    pub config: ImageConfig,
    /// [`Plan::history`].
    pub history: Vec<History>,
}

/// Joins plans of one Dockerfile, each with the graph that it was lowered from.
///
/// Steps are equal that do the same on top of the same and read the same; of those that run a
/// process, that run it on the same platform. The first one's name and place stay. So a stage
/// that is for the platform of this machine is built once for all.
pub fn join(plans: Vec<(StageGraph, Plan)>) -> Joined {
    let mut joined = Joined {
        steps: Vec::new(),
        images: Vec::new(),
        targets: Vec::new(),
        warnings: Vec::new(),
    };
    let mut known = Known::default();
    let mut unused: Option<Unused> = None;
    for (graph, plan) in plans {
        let images = graph.images.into_iter();
        let images: Vec<ImageId> = images.map(|need| joined.image(need)).collect();
        let mut ids: Vec<StepId> = Vec::new();
        for step in plan.steps {
            let step = renamed(step, &ids, &images);
            ids.push(known.add(&mut joined.steps, step));
        }
        joined.targets.push(Target {
            platform: plan.platform,
            result: plan.result.map(|id| ids[id.0]),
            config: plan.config,
            history: plan.history,
        });
        for warning in plan.warnings {
            if !joined.warnings.contains(&warning) {
                joined.warnings.push(warning);
            }
        }
        unused = Some(match unused {
            None => plan.unused,
            Some(others) => Unused {
                args: &others.args & &plan.unused.args,
                contexts: &others.contexts & &plan.unused.contexts,
            },
        });
    }
    let Unused { args, contexts } = unused.unwrap_or_default();
    for (what, names) in [
        ("build arguments that no ARG takes", args),
        ("named contexts that nothing uses", contexts),
    ] {
        if !names.is_empty() {
            joined.warnings.push(format!("{what}: {}", list(&names)));
        }
    }
    joined
}

fn list(names: &BTreeSet<String>) -> String {
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    names.join(", ")
}

impl Joined {
    fn image(&mut self, need: ImageNeed) -> ImageId {
        let known = self.images.iter().position(|known| known.is_same(&need));
        ImageId(known.unwrap_or_else(|| {
            self.images.push(need);
            self.images.len() - 1
        }))
    }
}

/// A step with the names that steps and images have after joining.
fn renamed(mut step: Step, ids: &[StepId], images: &[ImageId]) -> Step {
    let new = |id: StepId| ids[id.0];
    step.parent = step.parent.map(new);
    match &mut step.operation {
        Operation::Image(image) => *image = images[image.0],
        Operation::Run(run) => run.sources.iter_mut().for_each(|id| *id = new(*id)),
        Operation::Copy(copy) => copy.source_step = copy.source_step.map(new),
        Operation::MakeDirectory(_) => {}
    }
    step
}

/// The steps so far, by the hash of what makes them equal.
#[derive(Default)]
struct Known {
    hasher: RandomState,
    steps: HashMap<u64, Vec<StepId>>,
}

impl Known {
    /// The step that is equal to `step`, which is added where there is none.
    fn add(&mut self, steps: &mut Vec<Step>, step: Step) -> StepId {
        let hash = self.hasher.hash_one(essence(&step));
        let same_hash = self.steps.entry(hash).or_default();
        let mut equal = same_hash.iter();
        if let Some(id) = equal.find(|id| essence(&steps[id.0]) == essence(&step)) {
            return *id;
        }
        let id = StepId(steps.len());
        same_hash.push(id);
        steps.push(step);
        id
    }
}

/// What makes steps equal.
fn essence(step: &Step) -> (Option<StepId>, bool, &Operation, Option<&Platform>) {
    let runs = matches!(step.operation, Operation::Run(_));
    let platform = runs.then_some(&step.platform);
    (step.parent, step.use_cache, &step.operation, platform)
}
