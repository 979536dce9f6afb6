//! Which stages and images the target needs. Pure: only the text and the settings.

use std::collections::{BTreeMap, BTreeSet};

use super::{ContextId, ImageId, SOURCE_DATE_EPOCH, Settings, support};
use crate::context::named::NamedContext;
use crate::dockerfile::expand::{Environment, expand_word};
use crate::dockerfile::{
    self, Dockerfile, DockerfileError, Instruction, InstructionKind, Problem, Span, Stage, Word,
};
use crate::image::{ImageConfig, Platform, Reference};

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
    /// The named contexts that stand in for something.
    pub contexts: BTreeSet<ContextId>,
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
    /// What it does, the triggers of its base first. Nothing where a named context stands
    /// in for it.
    pub instructions: Vec<StageInstruction>,
}

/// An instruction of a stage.
#[derive(Clone, Debug)]
pub struct StageInstruction {
    /// The instruction.
    pub instruction: Instruction,
    /// The text of the `ONBUILD` that it comes from, where it stands in no line of the stage.
    pub trigger: Option<String>,
    /// What it reads: of `COPY` its `--from`; of `RUN` the `from` of each mount.
    pub reads: Vec<Option<Base>>,
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
    /// A named context.
    Context(ContextId),
}

/// An image that is needed, once for each platform.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageNeed {
    /// Where it is.
    pub source: ImageSource,
    /// The platform wanted.
    pub platform: Platform,
    /// `file:line:column` of the first place that names it.
    pub place: String,
}

impl ImageNeed {
    /// Whether it is the same image, wherever that was named.
    pub fn is_same(&self, other: &Self) -> bool {
        self.source == other.source && self.platform == other.platform
    }
}

/// Where an image is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ImageSource {
    /// At a registry.
    Registry(Reference),
    /// In the OCI layout that is this named context.
    Layout(ContextId),
}

/// Says what building `settings.target` of `dockerfile` needs.
///
/// `known` gives the configs of images that are resolved already. An image's triggers
/// may name more images: ask again until none is missing.
///
/// # Errors
/// [`DockerfileError`] with everything that is wrong with the needed stages as far as
/// the text alone shows it: unknown stages, cycles, references that are none, and
/// what the settings do not allow.
pub fn graph(
    dockerfile: &Dockerfile,
    settings: &Settings,
    known: &dyn Fn(&ImageNeed) -> Option<ImageConfig>,
) -> Result<StageGraph, DockerfileError> {
    let mut builder = Builder::new(dockerfile, settings)?;
    let target = builder.target()?;
    let mut pending = vec![target];
    let mut nodes: BTreeMap<usize, StageNode> = BTreeMap::new();
    while let Some(index) = pending.pop() {
        if nodes.contains_key(&index) {
            continue;
        }
        let node = builder.stage(index, known);
        let reads = node
            .instructions
            .iter()
            .flat_map(|i| i.reads.iter().flatten());
        pending.extend(reads.chain([&node.base]).filter_map(|base| match base {
            Base::Stage(index) => Some(*index),
            Base::Scratch | Base::Image(_) | Base::Context(_) => None,
        }));
        nodes.insert(index, node);
    }
    builder
        .problems
        .extend(unknown_frontend(dockerfile, settings));
    builder.finish(StageGraph {
        stages: nodes.into_values().collect(),
        images: Vec::new(),
        target,
        global_args: Environment::new(),
        contexts: BTreeSet::new(),
    })
}

/// Frontends of the language that is read here: the names of their images, without what stands
/// before and behind them, and what BuildKit calls the one that it has built in.
const FRONTENDS: [&str; 3] = ["dockerfile", "dockerfile-upstream", "dockerfile.v0"];

/// The problem with a `syntax` directive that names the frontend of another language. That is a
/// program in an image, which nobody runs here; its files may look like Dockerfiles all the same.
/// The build argument `BUILDKIT_SYNTAX` wins over the directive.
fn unknown_frontend(dockerfile: &Dockerfile, settings: &Settings) -> Option<Problem> {
    let given = settings.build_args.get("BUILDKIT_SYNTAX");
    let directive = dockerfile.directives.syntax.as_ref();
    let (wanted, span, origin) = match (given, directive) {
        (Some(value), _) => (value, dockerfile.stages[0].span, "BUILDKIT_SYNTAX"),
        (None, Some(word)) => (&word.raw, word.span, "the syntax directive"),
        (None, None) => return None,
    };
    let image = wanted.split_whitespace().next()?;
    let name = image.split('@').next().unwrap_or(image);
    let name = name.rsplit('/').next().unwrap_or(name);
    let name = name.split(':').next().unwrap_or(name);
    (!FRONTENDS.contains(&name)).then(|| {
        let message = format!("{origin} asks for the frontend {image:?}, which is not run here");
        Problem::new(span, message).with_hint(
            "to have the file read as a plain Dockerfile: --build-arg BUILDKIT_SYNTAX=dockerfile.v0",
        )
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

/// What the variables before the first `FROM` are worth, the platform's included.
///
/// # Errors
/// [`DockerfileError`] for what cannot be expanded.
pub(super) fn global_args(
    dockerfile: &Dockerfile,
    settings: &Settings,
) -> Result<Environment, DockerfileError> {
    Builder::new(dockerfile, settings).map(|builder| builder.args)
}

struct Builder<'a> {
    dockerfile: &'a Dockerfile,
    settings: &'a Settings,
    /// What variables in `FROM` are worth.
    args: Environment,
    /// Those of `args` that `ARG` declared.
    declared: Environment,
    images: Vec<ImageNeed>,
    /// The platforms of stages, as far as they are known.
    platforms: BTreeMap<usize, Platform>,
    /// The named contexts that were found.
    contexts: BTreeSet<ContextId>,
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
            platforms: BTreeMap::new(),
            contexts: BTreeSet::new(),
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
                let resolved = settings.source_date.as_ref();
                let resolved = resolved.filter(|_| name == SOURCE_DATE_EPOCH);
                let default = match &declaration.default {
                    Some(_) if given.is_none() && resolved.is_some() => {
                        resolved.filter(|text| !text.is_empty()).cloned()
                    }
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
                let span = word.span_of(&self.dockerfile.text, error.range.clone());
                self.problems.push(Problem::new(span, error.to_string()))
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
        graph.contexts = std::mem::take(&mut self.contexts);
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
                let near = dockerfile::nearest(target, &names);
                let near = near.map(|near| format!("did you mean {near:?}? "));
                problem.with_hint(format!(
                    "{}the stages are: {}",
                    near.unwrap_or_default(),
                    names.join(", ")
                ))
            };
            error(self.dockerfile, vec![problem])
        })
    }

    fn stage(
        &mut self,
        index: usize,
        known: &dyn Fn(&ImageNeed) -> Option<ImageConfig>,
    ) -> StageNode {
        let stage = &self.dockerfile.stages[index];
        let platform = self.platform(index);
        if let Some(name) = &stage.name
            && let Some(context) = self.context_named(&name.raw, name.span, &platform)
        {
            return StageNode {
                index,
                base: self.context(context, name.span, &platform),
                platform,
                instructions: Vec::new(),
            };
        }
        let base = self.base(index, stage, &platform);
        let mut instructions = Vec::new();
        for expression in self.triggers(base, known) {
            match dockerfile::parse_trigger(&expression) {
                Ok(instruction) => {
                    let reads = self.reads(index, &instruction, Some(stage.base.span));
                    instructions.push(StageInstruction {
                        instruction,
                        trigger: Some(expression),
                        reads,
                    });
                }
                Err(error) => {
                    let messages: Vec<String> =
                        error.problems.into_iter().map(|p| p.message).collect();
                    let message = messages.join("; ");
                    let problem = Problem::new(stage.base.span, message);
                    self.problems
                        .push(trigger_problem(stage.base.span, &expression, problem));
                }
            }
        }
        for instruction in &stage.instructions {
            instructions.push(StageInstruction {
                reads: self.reads(index, instruction, None),
                instruction: instruction.clone(),
                trigger: None,
            });
        }
        StageNode {
            index,
            base,
            platform,
            instructions,
        }
    }

    /// The `ONBUILD` expressions that a stage on top of `base` executes.
    fn triggers(
        &self,
        base: Base,
        known: &dyn Fn(&ImageNeed) -> Option<ImageConfig>,
    ) -> Vec<String> {
        match base {
            Base::Scratch | Base::Context(_) => Vec::new(),
            Base::Image(image) => known(&self.images[image.0])
                .and_then(|config| config.config.on_build)
                .unwrap_or_default(),
            Base::Stage(base) => {
                let instructions = self.dockerfile.stages[base].instructions.iter();
                let expressions = instructions.filter_map(|i| match &i.kind {
                    InstructionKind::Onbuild { expression, .. } => Some(expression.clone()),
                    _ => None,
                });
                expressions.collect()
            }
        }
    }

    /// What an instruction reads. `from` is where problems point for one that stands in no
    /// line of the file. Images are those for what is built, whatever the stage's platform is,
    /// as in BuildKit.
    fn reads(
        &mut self,
        stage: usize,
        instruction: &Instruction,
        from: Option<Span>,
    ) -> Vec<Option<Base>> {
        let platform = &self.settings.platform;
        let problems = support::refused(instruction, &self.settings.allowed);
        self.problems
            .extend(problems.into_iter().map(|problem| match from {
                Some(span) => trigger_problem(span, &instruction.original, problem),
                None => problem,
            }));
        match &instruction.kind {
            InstructionKind::Copy(copy) => vec![copy.from.as_ref().and_then(|word| {
                let span = from.unwrap_or(word.span);
                self.copy_from(stage, word.raw.trim_matches(['"', '\'']), span, platform)
            })],
            InstructionKind::Run(run) => {
                let mounts = run.mounts.iter();
                mounts
                    .map(|word| {
                        let name = mount_from(&word.raw)?;
                        self.read_from(stage, &name, from.unwrap_or(word.span), platform)
                    })
                    .collect()
            }
            _ => Vec::new(),
        }
    }

    /// The platform of a stage: that of the stage that it starts from, whatever it says
    /// itself, as in BuildKit; else its own.
    fn platform(&mut self, index: usize) -> Platform {
        let stages = &self.dockerfile.stages;
        let own = self.own_platform(&stages[index]);
        // What is wrong with other stages is told where those are looked at.
        let problems = self.problems.len();
        let mut above = vec![index];
        let platform = loop {
            let stage = above.last().copied().unwrap_or(index);
            if let Some(known) = self.platforms.get(&stage) {
                break known.clone();
            }
            let name = self.expand(&stages[stage].base);
            match name.and_then(|name| self.stage_named(&name, stage)) {
                Some(base) => above.push(base),
                None if stage == index => break own,
                None => break self.own_platform(&stages[stage]),
            }
        };
        self.problems.truncate(problems);
        for stage in above {
            self.platforms.insert(stage, platform.clone());
        }
        platform
    }

    fn own_platform(&mut self, stage: &Stage) -> Platform {
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
        self.outside(&name, stage.base.span, platform)
    }

    /// The last stage before `before` that has the name, which is lower case.
    fn stage_named(&self, name: &str, before: usize) -> Option<usize> {
        let named = |s: &Stage| s.name.as_ref().is_some_and(|n| n.raw == name);
        self.dockerfile.stages[..before].iter().rposition(named)
    }

    /// What `--from` of a `COPY` names: as [`Builder::read_from`], or a stage by its number.
    fn copy_from(
        &mut self,
        stage: usize,
        name: &str,
        span: Span,
        platform: &Platform,
    ) -> Option<Base> {
        if name.contains('$') {
            self.problems.push(
                Problem::new(span, "variables are not expanded in --from")
                    .with_hint("name a stage (\"FROM $IMAGE AS source\") and copy from that"),
            );
            return None;
        }
        let Ok(number) = name.parse::<usize>() else {
            return self.read_from(stage, name, span, platform);
        };
        if number < stage {
            return Some(Base::Stage(number));
        }
        self.problems.push(Problem::new(
            span,
            format!("invalid stage index {number}: this is stage {stage}, counted from 0"),
        ));
        None
    }

    /// A stage, a named context or an image.
    fn read_from(
        &mut self,
        stage: usize,
        name: &str,
        span: Span,
        platform: &Platform,
    ) -> Option<Base> {
        // The last of several stages with one name is meant, even where it comes too late.
        match self.stage_named(&name.to_ascii_lowercase(), self.dockerfile.stages.len()) {
            Some(found) if found < stage => return Some(Base::Stage(found)),
            Some(found) => {
                let what = if found == stage {
                    "this stage itself"
                } else {
                    "a later stage"
                };
                self.problems.push(
                    Problem::new(
                        span,
                        format!("cannot copy from stage {name:?}: it is {what}"),
                    )
                    .with_hint("a stage can read only from stages before it"),
                );
                return None;
            }
            None => {}
        }
        if name == "scratch" {
            return Some(Base::Scratch);
        }
        Some(self.outside(name, span, platform))
    }

    /// A named context, else an image.
    fn outside(&mut self, name: &str, span: Span, platform: &Platform) -> Base {
        if let Some(context) = self.context_named(name, span, platform) {
            return self.context(context, span, platform);
        }
        match Reference::parse(name) {
            Ok(reference) => self.image(ImageSource::Registry(reference), span, platform),
            Err(error) => {
                self.problems.push(Problem::new(span, error.to_string()));
                Base::Scratch
            }
        }
    }

    /// The named context that stands in for a stage or an image of this name.
    fn context_named(&mut self, name: &str, span: Span, platform: &Platform) -> Option<ContextId> {
        if self.settings.contexts.is_empty() {
            return None;
        }
        match self.settings.contexts.lookup(name, platform) {
            Ok(found) => {
                let (found, _) = found?;
                let index = self
                    .settings
                    .contexts
                    .iter()
                    .position(|(name, _)| name == found);
                index.map(|index| ContextId(index + 1))
            }
            Err(error) => {
                self.problems.push(Problem::new(span, error.to_string()));
                None
            }
        }
    }

    fn context(&mut self, context: ContextId, span: Span, platform: &Platform) -> Base {
        self.contexts.insert(context);
        match context.named(&self.settings.contexts) {
            None | Some((_, NamedContext::Scratch)) => Base::Scratch,
            Some((_, NamedContext::Image(reference))) => {
                self.image(ImageSource::Registry(reference.clone()), span, platform)
            }
            Some((_, NamedContext::OciLayout(_))) => {
                self.image(ImageSource::Layout(context), span, platform)
            }
            Some((_, NamedContext::Directory(_) | NamedContext::Url(_) | NamedContext::Git(_))) => {
                Base::Context(context)
            }
        }
    }

    fn image(&mut self, source: ImageSource, span: Span, platform: &Platform) -> Base {
        let known = self
            .images
            .iter()
            .position(|i| i.source == source && i.platform == *platform);
        Base::Image(ImageId(known.unwrap_or_else(|| {
            self.images.push(ImageNeed {
                source,
                platform: platform.clone(),
                place: dockerfile::place(&self.dockerfile.name, &self.dockerfile.text, span),
            });
            self.images.len() - 1
        })))
    }
}

/// The `from` of a mount, which has no variables. Whatever else is wrong with the mount is
/// said when it is lowered.
fn mount_from(mount: &str) -> Option<String> {
    let fields = dockerfile::comma_fields(mount).ok()?;
    fields.iter().rev().find_map(|field| {
        let (key, value) = field.split_once('=')?;
        (key.eq_ignore_ascii_case("from") && !value.is_empty()).then(|| value.to_owned())
    })
}

/// A problem of a trigger, which points at the `FROM` that brought it: the trigger's own
/// places are not of this file.
pub(super) fn trigger_problem(from: Span, expression: &str, problem: Problem) -> Problem {
    let message = &problem.message;
    Problem {
        message: format!("ONBUILD {expression:?} of the base image: {message}"),
        span: from,
        ..problem
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
