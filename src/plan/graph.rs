//! Which stages and images the target needs. Pure: only the text and the settings.

use std::collections::BTreeMap;

use super::{ImageId, Settings, support};
use crate::dockerfile::expand::{Environment, expand_word};
use crate::dockerfile::{Dockerfile, DockerfileError, InstructionKind, Problem, Span, Stage, Word};
use crate::image::{Platform, Reference};

/// The stages that the target needs, and the images that those need.
#[derive(Clone, Debug)]
pub struct StageGraph {
    /// The needed stages in the order of the file, which is an order of building.
    pub stages: Vec<StageNode>,
    /// The images whose manifests and configs lowering needs.
    pub images: Vec<ImageNeed>,
    /// The stage whose filesystem and config are the result: an index into the Dockerfile's stages.
    pub target: usize,
    /// Global build arguments with their values.
    pub global_args: Environment,
}

/// A needed stage.
#[derive(Clone, Debug)]
pub struct StageNode {
    /// Its index in [`Dockerfile::stages`].
    pub index: usize,
    /// What it starts from.
    pub base: Base,
    /// Its platform.
    pub platform: Platform,
    /// For each `COPY --from` of it, by the index of the instruction: what it reads.
    pub copies: BTreeMap<usize, Base>,
}

/// Something that has a filesystem.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Base {
    /// An empty one.
    Scratch,
    /// The stage with this index in the Dockerfile.
    Stage(usize),
    /// An image.
    Image(ImageId),
}

/// An image that is needed, once for each platform.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageNeed {
    /// Its name.
    pub reference: Reference,
    /// The platform wanted.
    pub platform: Platform,
    /// `file:line:column` of the first place that names it.
    pub place: String,
}

/// Says what building `settings.target` of `dockerfile` needs.
///
/// # Errors
/// [`DockerfileError`] with everything that is wrong with the needed stages as far as
/// the text alone shows it: unknown stages, cycles, references that are none, and
/// constructs that this version does not support.
pub fn graph(dockerfile: &Dockerfile, settings: &Settings) -> Result<StageGraph, DockerfileError> {
    let mut builder = Builder::new(dockerfile, settings)?;
    let target = builder.target()?;
    let mut pending = vec![target];
    let mut nodes: BTreeMap<usize, StageNode> = BTreeMap::new();
    while let Some(index) = pending.pop() {
        if nodes.contains_key(&index) {
            continue;
        }
        let node = builder.stage(index);
        pending.extend(
            node.copies
                .values()
                .chain([&node.base])
                .filter_map(|base| match base {
                    Base::Stage(index) => Some(*index),
                    Base::Scratch | Base::Image(_) => None,
                }),
        );
        nodes.insert(index, node);
    }
    builder.finish(StageGraph {
        stages: nodes.into_values().collect(),
        images: Vec::new(),
        target,
        global_args: Environment::new(),
    })
}

/// The variables that describe the platforms, as BuildKit names them.
///
/// <https://docs.docker.com/reference/dockerfile/#automatic-platform-args-in-the-global-scope>
pub(super) fn platform_args(dockerfile: &Dockerfile, settings: &Settings) -> Environment {
    // The target as it was asked for, whatever the case of the stage's name.
    let last = || dockerfile.stages.last()?.name.as_ref();
    let target_stage = match &settings.target {
        Some(target) => target,
        None => last().map_or("default", |name| &name.raw),
    };
    let mut args = Environment::new();
    for (prefix, platform) in [
        ("TARGET", &settings.platform),
        ("BUILD", &settings.build_platform),
    ] {
        args.insert(format!("{prefix}PLATFORM"), platform.to_string());
        args.insert(format!("{prefix}OS"), platform.os.clone());
        args.insert(
            format!("{prefix}OSVERSION"),
            platform.os_version.clone().unwrap_or_default(),
        );
        args.insert(format!("{prefix}ARCH"), platform.architecture.clone());
        args.insert(
            format!("{prefix}VARIANT"),
            platform.variant.clone().unwrap_or_default(),
        );
    }
    args.insert("TARGETSTAGE".to_owned(), target_stage.to_owned());
    args
}

struct Builder<'a> {
    dockerfile: &'a Dockerfile,
    settings: &'a Settings,
    /// What variables in `FROM` are worth.
    args: Environment,
    /// Those of `args` that `ARG` declared.
    declared: Environment,
    images: Vec<ImageNeed>,
    problems: Vec<Problem>,
}

impl<'a> Builder<'a> {
    fn new(dockerfile: &'a Dockerfile, settings: &'a Settings) -> Result<Self, DockerfileError> {
        let mut builder = Self {
            dockerfile,
            settings,
            args: platform_args(dockerfile, settings),
            declared: Environment::new(),
            images: Vec::new(),
            problems: Vec::new(),
        };
        // The platform arguments can be given on the command line too.
        for (name, value) in &settings.build_args {
            if let Some(known) = builder.args.get_mut(name) {
                known.clone_from(value);
            }
        }
        for instruction in &dockerfile.global_args {
            let InstructionKind::Arg(declarations) = &instruction.kind else {
                continue;
            };
            for declaration in declarations {
                let Some(name) = builder.expand(&declaration.name) else {
                    continue;
                };
                let given = settings.build_args.get(&name).cloned();
                let default = match &declaration.default {
                    Some(default) if given.is_none() => builder.expand(default),
                    _ => None,
                };
                if let Some(value) = given.or(default) {
                    builder.args.insert(name.clone(), value.clone());
                    builder.declared.insert(name, value);
                }
            }
        }
        if builder.problems.is_empty() {
            Ok(builder)
        } else {
            Err(builder.error())
        }
    }

    fn expand(&mut self, word: &Word) -> Option<String> {
        expand_word(word, self.dockerfile.directives.escape, &self.args)
            .map_err(|error| {
                self.problems
                    .push(Problem::new(word.span, error.to_string()))
            })
            .ok()
    }

    fn error(self) -> DockerfileError {
        error(self.dockerfile, self.problems)
    }

    fn finish(mut self, mut graph: StageGraph) -> Result<StageGraph, DockerfileError> {
        if !self.problems.is_empty() {
            return Err(self.error());
        }
        graph.images = std::mem::take(&mut self.images);
        graph.global_args = std::mem::take(&mut self.declared);
        Ok(graph)
    }

    /// The stage that `--target` names, in any case; the last one without it.
    fn target(&self) -> Result<usize, DockerfileError> {
        let stages = &self.dockerfile.stages;
        let Some(target) = &self.settings.target else {
            return Ok(stages.len() - 1);
        };
        let by_name = stages.iter().rposition(|s| {
            s.name
                .as_ref()
                .is_some_and(|n| n.raw.eq_ignore_ascii_case(target))
        });
        by_name.ok_or_else(|| {
            let names: Vec<&str> = stages
                .iter()
                .filter_map(|s| s.name.as_ref())
                .map(|n| n.raw.as_str())
                .collect();
            let problem = Problem::new(
                stages[0].span,
                format!("target stage {target:?} could not be found"),
            );
            let problem = if names.is_empty() {
                problem.with_hint("no stage of this Dockerfile has a name (\"FROM image AS name\")")
            } else {
                problem.with_hint(format!("the stages are: {}", names.join(", ")))
            };
            error(self.dockerfile, vec![problem])
        })
    }

    fn stage(&mut self, index: usize) -> StageNode {
        let stage = &self.dockerfile.stages[index];
        self.problems.extend(support::unsupported(stage));
        let platform = self.platform(stage);
        let base = self.base(index, stage, &platform);
        let mut copies = BTreeMap::new();
        for (at, instruction) in stage.instructions.iter().enumerate() {
            if let InstructionKind::Copy(copy) = &instruction.kind
                && let Some(from) = &copy.from
                && let Some(base) = self.copy_from(index, from, &platform)
            {
                copies.insert(at, base);
            }
        }
        StageNode {
            index,
            base,
            platform,
            copies,
        }
    }

    fn platform(&mut self, stage: &Stage) -> Platform {
        let Some(word) = &stage.platform else {
            return self.settings.platform.clone();
        };
        let Some(text) = self.expand(word) else {
            return self.settings.platform.clone();
        };
        Platform::parse(&text).unwrap_or_else(|error| {
            self.problems
                .push(Problem::new(word.span, error.to_string()));
            self.settings.platform.clone()
        })
    }

    fn base(&mut self, index: usize, stage: &Stage, platform: &Platform) -> Base {
        let Some(name) = self.expand(&stage.base) else {
            return Base::Scratch;
        };
        if name.is_empty() {
            self.problems.push(
                Problem::new(
                    stage.base.span,
                    format!("base name ({}) should not be blank", stage.base.raw),
                )
                .with_hint("variables in FROM come from ARG instructions before the first FROM"),
            );
            return Base::Scratch;
        }
        if let Some(base) = self.stage_named(&name, index) {
            return Base::Stage(base);
        }
        if name == "scratch" {
            return Base::Scratch;
        }
        self.image(&name, stage.base.span, platform)
    }

    /// The last stage before `before` that has the name, which is lower case.
    fn stage_named(&self, name: &str, before: usize) -> Option<usize> {
        let named = |s: &Stage| s.name.as_ref().is_some_and(|n| n.raw == name);
        self.dockerfile.stages[..before].iter().rposition(named)
    }

    fn copy_from(&mut self, index: usize, from: &Word, platform: &Platform) -> Option<Base> {
        let name = from.raw.trim_matches(['"', '\'']);
        if name.contains('$') {
            self.problems.push(
                Problem::new(from.span, "variables are not expanded in --from")
                    .with_hint("name a stage (\"FROM $IMAGE AS source\") and copy from that"),
            );
            return None;
        }
        // The last of several stages with one name is meant, even where it comes too late.
        match self.stage_named(&name.to_ascii_lowercase(), self.dockerfile.stages.len()) {
            Some(stage) if stage < index => return Some(Base::Stage(stage)),
            Some(stage) => {
                let what = if stage == index {
                    "this stage itself"
                } else {
                    "a later stage"
                };
                self.problems.push(
                    Problem::new(
                        from.span,
                        format!("cannot copy from stage {name:?}: it is {what}"),
                    )
                    .with_hint("a stage can copy only from stages before it"),
                );
                return None;
            }
            None => {}
        }
        if let Ok(number) = name.parse::<usize>() {
            if number < index {
                return Some(Base::Stage(number));
            }
            self.problems.push(Problem::new(
                from.span,
                format!("invalid stage index {number}: this is stage {index}, counted from 0"),
            ));
            return None;
        }
        if name == "scratch" {
            return Some(Base::Scratch);
        }
        Some(self.image(name, from.span, platform))
    }

    fn image(&mut self, name: &str, span: Span, platform: &Platform) -> Base {
        let reference = match Reference::parse(name) {
            Ok(reference) => reference,
            Err(error) => {
                self.problems.push(Problem::new(span, error.to_string()));
                return Base::Scratch;
            }
        };
        let known = self
            .images
            .iter()
            .position(|i| i.reference == reference && i.platform == *platform);
        Base::Image(ImageId(known.unwrap_or_else(|| {
            self.images.push(ImageNeed {
                reference,
                platform: platform.clone(),
                place: crate::dockerfile::place(&self.dockerfile.name, &self.dockerfile.text, span),
            });
            self.images.len() - 1
        })))
    }
}

/// Joins problems of `dockerfile` into its error, in the order of their places.
pub(super) fn error(dockerfile: &Dockerfile, mut problems: Vec<Problem>) -> DockerfileError {
    problems.sort_by_key(|p| p.span);
    DockerfileError {
        name: dockerfile.name.clone(),
        text: dockerfile.text.clone(),
        problems,
    }
}
