//! Stages + base configs → [`Plan`]. Pure.
//!
//! Texts of history entries are BuildKit's, because tools compare them.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use super::graph::{Base, StageNode, error, platform_args, trigger_problem};
use super::mounts;
use super::state::State;
use super::text::{
    absolute, copy_destination, healthcheck_text, is_only_heredoc, is_signal, joined, parse_mode,
    parse_ports, quoted, without_tabs,
};
use super::{
    ContextId, Copy, CopyDefinition, CopyFrom, CopySource, Device, ImageId, ImageSource,
    MakeDirectory, Mount, MountFrom, MountKind, Network, NoCache, Operation, Plan, Run, Security,
    Settings, StageGraph, Step, StepId, Unused,
};
use crate::dockerfile::expand::{expand_text, expand_word, expand_words};
use crate::dockerfile::{
    self, ArgDeclaration, CommandLine, Dockerfile, DockerfileError, Healthcheck, Instruction,
    InstructionKind, KeyValue, Problem, Span, Word,
};
use crate::image::{Empty, Healthcheck as ImageHealthcheck, ImageConfig, Platform};
use crate::remote::git;
use crate::remote::http::Checksum;
use crate::secret::without_userinfo;

/// Proxy settings that `RUN` gets from `--build-arg` without an `ARG`.
///
/// <https://docs.docker.com/reference/dockerfile/#predefined-args>
const PROXY_ARGS: [&str; 10] = [
    "HTTP_PROXY",
    "http_proxy",
    "HTTPS_PROXY",
    "https_proxy",
    "FTP_PROXY",
    "ftp_proxy",
    "NO_PROXY",
    "no_proxy",
    "ALL_PROXY",
    "all_proxy",
];

/// How many bytes the variables and labels of a stage may have. No system call starts a
/// process with more variables than a few MiB.
const STATE_LIMIT_BYTES: usize = 16 << 20;

/// How many bytes of variables and history all steps together may have: each has a copy.
const PLAN_LIMIT_BYTES: usize = 256 << 20;

/// The host name that steps see, as in BuildKit.
const HOSTNAME: &str = "buildkitsandbox";

/// Where the scripts of here-documents are while they run, as in BuildKit.
const SCRIPTS: &str = "/dev/pipes";

/// Build arguments that say how to build, whether an `ARG` takes them or not.
///
/// <https://docs.docker.com/reference/dockerfile/#buildkit-built-in-build-args>
const SPECIAL_ARGS: [&str; 9] = [
    "BUILDKIT_BUILD_NAME",
    "BUILDKIT_CACHE_MOUNT_NS",
    "BUILDKIT_CONTEXT_KEEP_GIT_DIR",
    "BUILDKIT_DOCKERFILE_CHECK",
    "BUILDKIT_INLINE_CACHE",
    "BUILDKIT_MULTI_PLATFORM",
    "BUILDKIT_SANDBOX_HOSTNAME",
    "BUILDKIT_SYNTAX",
    "SOURCE_DATE_EPOCH",
];

/// Turns the needed stages of `dockerfile` into steps and the image's config.
///
/// `images` has the configs of [`StageGraph::images`], in that order.
///
/// # Errors
/// [`DockerfileError`] with everything that is wrong once variables have values. A
/// trigger (`ONBUILD`) of a base image that is wrong points at its `FROM`.
pub fn lower(
    dockerfile: &Dockerfile,
    graph: &StageGraph,
    settings: &Settings,
    images: &[ImageConfig],
) -> Result<Plan, DockerfileError> {
    let mut lowering = Lowering {
        dockerfile,
        graph,
        settings,
        images,
        steps: Vec::new(),
        image_steps: BTreeMap::new(),
        context_steps: BTreeMap::new(),
        states: BTreeMap::new(),
        problems: Vec::new(),
        warnings: Vec::new(),
        bytes: 0,
    };
    for node in &graph.stages {
        let state = lowering.stage(node);
        lowering.states.insert(node.index, state);
    }
    if !lowering.problems.is_empty() {
        return Err(error(dockerfile, lowering.problems));
    }
    lowering.warnings.extend(lowering.windows_paths());
    let unused = Unused {
        args: lowering.unused_args(),
        contexts: lowering.unused_contexts(),
    };
    let state = lowering
        .states
        .remove(&graph.target)
        .expect("the target is one of the needed stages");
    let mut config = state.image;
    if settings.platform_is_given {
        config.platform = marked(&config.platform, &settings.platform);
    }
    // Parsing gives a base's other names, such as arm64/v8, their usual form.
    if let Ok(normal) = Platform::parse(&config.platform.to_string()) {
        config.platform = normal;
    }
    config.config.labels.extend(settings.labels.clone());
    let platform = if settings.platform_is_given {
        described(&settings.platform, &config.platform)
    } else {
        config.platform.clone()
    };
    Ok(Plan {
        platform,
        steps: lowering.steps,
        result: state.step,
        config,
        history: state.history,
        warnings: lowering.warnings,
        unused,
    })
}

/// What an index says that the image is for: what was asked for, and the version of Windows
/// that its base has, as in BuildKit.
fn described(asked: &Platform, image: &Platform) -> Platform {
    let mut platform = asked.clone();
    if platform.os == "windows" && image.os == platform.os {
        let version = platform.os_version.take();
        platform.os_version = version.or_else(|| image.os_version.clone());
    }
    platform
}

/// What the image is marked with: what was asked for, whatever its base says of itself. Where
/// that leaves a part open and the rest is the same, it is the base's.
fn marked(base: &Platform, asked: &Platform) -> Platform {
    let mut marked = asked.clone();
    if (&base.os, &base.architecture) == (&asked.os, &asked.architecture) {
        marked.variant = marked.variant.or_else(|| base.variant.clone());
        marked.os_version = marked.os_version.or_else(|| base.os_version.clone());
    }
    marked
}

struct Lowering<'a> {
    dockerfile: &'a Dockerfile,
    graph: &'a StageGraph,
    settings: &'a Settings,
    images: &'a [ImageConfig],
    steps: Vec<Step>,
    image_steps: BTreeMap<ImageId, StepId>,
    context_steps: BTreeMap<ContextId, StepId>,
    states: BTreeMap<usize, State>,
    problems: Vec<Problem>,
    warnings: Vec<String>,
    /// How many bytes of texts the stages and steps so far have, roughly.
    bytes: usize,
}

/// The stage that is being lowered.
struct Current<'a> {
    node: &'a StageNode,
    state: State,
    /// The steps of this stage.
    steps: Vec<NamedStep>,
    /// Where a problem points for instructions that are not in the file: triggers.
    trigger_of: Option<Span>,
    /// Whether steps may be looked up in the cache.
    use_cache: bool,
}

/// A step whose name is settled when its stage has all its steps.
struct NamedStep {
    step: StepId,
    /// `->arm64`, where it makes something for another platform than it runs on.
    cross: String,
    /// Its instruction.
    text: String,
}

type Lowered = Result<(), Problem>;

impl<'a> Lowering<'a> {
    fn stage(&mut self, node: &'a StageNode) -> State {
        let stage = &self.dockerfile.stages[node.index];
        let mut steps = Vec::new();
        let mut state = match node.base {
            Base::Scratch => State::scratch(node.platform.clone()),
            Base::Stage(index) => match self.states.get(&index) {
                Some(state) => state.child(),
                // Only after problems in that stage; they end the lowering anyway.
                None => State::scratch(node.platform.clone()),
            },
            Base::Image(image) => {
                let step = self.image_step(image, stage.base.span);
                State::from_image(self.images[image.0].clone(), Some(step))
            }
            Base::Context(context) => {
                let mut state = State::scratch(node.platform.clone());
                state.step = Some(self.context_step(context, stage.base.span));
                state.record(format!("FROM {}", self.context_name(context)), false);
                state
            }
        };
        if let Some(step) = state.step {
            let text = stage.original.clone();
            let cross = String::new();
            steps.push(NamedStep { step, cross, text });
        }
        // Triggers run once: in the stages right on top of the image.
        state.image.config.on_build = None;
        self.bytes += state.bytes() + state.history_bytes(0);
        let mut current = Current {
            node,
            state,
            steps,
            trigger_of: None,
            use_cache: self.uses_cache(stage.name.as_ref()),
        };
        for planned in &node.instructions {
            current.trigger_of = planned.trigger.as_ref().map(|_| stage.base.span);
            if self.bytes > PLAN_LIMIT_BYTES {
                break;
            }
            let entries = current.state.history.len();
            let lowered = self.instruction(&mut current, &planned.instruction, &planned.reads);
            let lowered =
                lowered.and_then(|()| self.account(&current, &planned.instruction, entries));
            if let Err(problem) = lowered {
                self.problems.push(match &planned.trigger {
                    Some(trigger) => trigger_problem(stage.base.span, trigger, problem),
                    None => problem,
                });
            }
        }
        self.name_steps(&current, stage.name.as_ref());
        current.state
    }

    /// Counts what an instruction made of texts, those that it repeats included.
    ///
    /// # Errors
    /// It is too much; nothing more is lowered then.
    fn account(
        &mut self,
        current: &Current<'_>,
        instruction: &Instruction,
        entries: usize,
    ) -> Lowered {
        let bytes = current.state.bytes();
        self.bytes += current.state.history_bytes(entries);
        self.bytes += match instruction.kind {
            // Each step has the whole environment.
            InstructionKind::Run(_) => bytes,
            _ => 0,
        };
        let message = if bytes > STATE_LIMIT_BYTES {
            format!(
                "the stage's variables and labels are longer than {} MiB here",
                STATE_LIMIT_BYTES >> 20
            )
        } else if self.bytes > PLAN_LIMIT_BYTES {
            format!(
                "the variables of all steps and the history are longer than {} MiB up to here",
                PLAN_LIMIT_BYTES >> 20
            )
        } else {
            return Ok(());
        };
        self.bytes = usize::MAX / 2;
        Err(Problem::new(instruction.span, message))
    }

    fn uses_cache(&self, stage: Option<&Word>) -> bool {
        match &self.settings.no_cache {
            NoCache::Nothing => true,
            NoCache::Everything => false,
            NoCache::Stages(names) => {
                !stage.is_some_and(|stage| names.iter().any(|n| n.eq_ignore_ascii_case(&stage.raw)))
            }
        }
    }

    /// The step whose filesystem is that of `base`; absent for an empty one.
    fn base_step(&mut self, base: Base, span: Span) -> Option<StepId> {
        match base {
            Base::Scratch => None,
            Base::Stage(index) => self.states.get(&index).and_then(|state| state.step),
            Base::Image(image) => {
                let is_new = !self.image_steps.contains_key(&image);
                let step = self.image_step(image, span);
                if is_new {
                    let name = self.image_name(image);
                    self.steps[step.0].name = if self.settings.multi_platform {
                        let platform = &self.graph.images[image.0].platform;
                        format!("[{platform}] FROM {name}")
                    } else {
                        format!("FROM {name}")
                    };
                }
                Some(step)
            }
            Base::Context(context) => Some(self.context_step(context, span)),
        }
    }

    fn image_name(&self, image: ImageId) -> String {
        match &self.graph.images[image.0].source {
            ImageSource::Registry(reference) => reference.to_string(),
            ImageSource::Layout(context) => self.context_name(*context).to_owned(),
        }
    }

    fn context_name(&self, context: ContextId) -> &str {
        let named = context.named(&self.settings.contexts);
        named.map_or("context", |(name, _)| name)
    }

    /// All files of a named context as one layer, for stages that start from it.
    fn context_step(&mut self, context: ContextId, span: Span) -> StepId {
        if let Some(step) = self.context_steps.get(&context) {
            return *step;
        }
        let operation = Operation::Copy(Copy {
            from: CopyFrom::Context(context),
            definition: CopyDefinition {
                sources: vec![CopySource::Path(".".to_owned())],
                destination: "/".to_owned(),
                chown: None,
                chmod: None,
                unpack: false,
                unpack_remote: false,
                link: false,
                parents: false,
                excludes: Vec::new(),
            },
            source_step: None,
        });
        let platform = self.settings.platform.clone();
        let step = self.push(None, span, platform, true, operation);
        self.steps[step.0].name = format!("[context {}] load files", self.context_name(context));
        self.context_steps.insert(context, step);
        step
    }

    /// `[build 2/5] RUN make`; without a name where there is one stage only, and with the
    /// platform in front where there may be several: `[linux/arm64 build 2/5] RUN make`.
    fn name_steps(&mut self, current: &Current<'_>, name: Option<&Word>) {
        let label = match name {
            Some(name) => format!("{} ", name.raw),
            None if self.graph.stages.len() > 1 => format!("stage-{} ", current.node.index),
            None => String::new(),
        };
        let total = current.steps.len();
        for (number, named) in current.steps.iter().enumerate() {
            let NamedStep { step, cross, text } = named;
            let platform = if self.settings.multi_platform {
                format!("{}{cross} ", current.node.platform)
            } else {
                String::new()
            };
            let step = &mut self.steps[step.0];
            if step.name.is_empty() {
                step.name = format!("[{platform}{label}{}/{total}] {text}", number + 1);
            }
        }
    }

    /// What names of steps say of the platform that they compile for, as in BuildKit: the
    /// stage knows of it by the arguments that it declares.
    fn cross(&self, current: &Current<'_>) -> String {
        let declared = |wanted: &str| {
            let mut variables = current.state.env.iter();
            variables.any(|(name, _)| name == wanted)
        };
        let (on, target) = (&current.node.platform, &self.settings.platform);
        let knows_os = declared("TARGETPLATFORM") || declared("TARGETOS");
        if knows_os && target.os != on.os {
            return format!("->{target}");
        }
        let knows = knows_os || declared("TARGETARCH");
        if !knows || target.os != on.os || target.architecture == on.architecture {
            return String::new();
        }
        match &target.variant {
            Some(variant) => format!("->{}/{variant}", target.architecture),
            None => format!("->{}", target.architecture),
        }
    }

    /// Which values of `--build-arg` no `ARG` takes, of triggers neither, and nothing else uses.
    fn unused_args(&self) -> BTreeSet<String> {
        let stages = self.dockerfile.stages.iter().flat_map(|s| &s.instructions);
        let instructions = self.dockerfile.global_args.iter().chain(stages);
        let written: Vec<&str> = instructions
            .filter_map(|instruction| match &instruction.kind {
                InstructionKind::Arg(declarations) => Some(declarations),
                _ => None,
            })
            .flatten()
            .map(|declaration| declaration.name.raw.as_str())
            .collect();
        let platform_args = platform_args(self.dockerfile, self.settings);
        let is_used = |name: &&String| {
            written.contains(&name.as_str())
                || self
                    .states
                    .values()
                    .any(|state| state.args.iter().any(|(known, _)| known == *name))
                || platform_args.contains_key(*name)
                || PROXY_ARGS
                    .iter()
                    .any(|proxy| proxy.eq_ignore_ascii_case(name))
                || SPECIAL_ARGS.contains(&name.as_str())
        };
        let given = self.settings.build_args.keys();
        given.filter(|name| !is_used(name)).cloned().collect()
    }

    /// Which named contexts stand in for nothing.
    fn unused_contexts(&self) -> BTreeSet<String> {
        let named = self.settings.contexts.iter().enumerate();
        let unused =
            named.filter(|(index, _)| !self.graph.contexts.contains(&ContextId(index + 1)));
        // One that is for another platform is not meant here.
        let names = unused.map(|(_, (name, _))| name);
        let names = names.filter(|name| !name.contains("::"));
        names.map(str::to_owned).collect()
    }

    /// Says that images for Windows are made by the rules of Linux.
    fn windows_paths(&self) -> Option<String> {
        let is_windows = |node: &StageNode| node.platform.os == "windows";
        self.graph.stages.iter().any(is_windows).then(|| {
            "paths of images for Windows are read as those of Linux: drive letters and backslashes are parts of names".to_owned()
        })
    }

    fn image_step(&mut self, image: ImageId, span: Span) -> StepId {
        if let Some(step) = self.image_steps.get(&image) {
            return *step;
        }
        let platform = self.graph.images[image.0].platform.clone();
        let step = self.push(None, span, platform, true, Operation::Image(image));
        self.image_steps.insert(image, step);
        step
    }

    fn push(
        &mut self,
        parent: Option<StepId>,
        span: Span,
        platform: Platform,
        use_cache: bool,
        operation: Operation,
    ) -> StepId {
        let place = dockerfile::place(&self.dockerfile.name, &self.dockerfile.text, span);
        self.steps.push(Step {
            parent,
            name: String::new(),
            place,
            platform,
            use_cache,
            operation,
        });
        StepId(self.steps.len() - 1)
    }

    /// Adds a step on top of the stage's filesystem.
    fn step(&mut self, current: &mut Current<'_>, instruction: &Instruction, operation: Operation) {
        let span = current.trigger_of.unwrap_or(instruction.span);
        let (parent, platform) = (current.state.step, current.node.platform.clone());
        let cross = self.cross(current);
        let step = self.push(parent, span, platform, current.use_cache, operation);
        current.state.step = Some(step);
        let text = without_userinfo(&instruction.original).into_owned();
        current.steps.push(NamedStep { step, cross, text });
    }

    fn warn(&mut self, span: Span, message: &str) {
        let place = dockerfile::place(&self.dockerfile.name, &self.dockerfile.text, span);
        self.warnings.push(format!("{place}: {message}"));
    }

    fn instruction(
        &mut self,
        current: &mut Current<'_>,
        instruction: &Instruction,
        reads: &[Option<Base>],
    ) -> Lowered {
        match &instruction.kind {
            InstructionKind::Add(copy) => self.copy(current, instruction, copy, None, true),
            InstructionKind::Copy(copy) => {
                let from = reads.first().copied().flatten();
                self.copy(current, instruction, copy, from, false)
            }
            InstructionKind::Arg(declarations) => self.arg(current, declarations),
            InstructionKind::Run(run) => self.run(current, instruction, run, reads),
            InstructionKind::Workdir(path) => self.workdir(current, instruction, path),
            InstructionKind::Env(pairs) => {
                let pairs = self.pairs(current, pairs)?;
                for (name, value) in &pairs {
                    current.state.set_env(name, value);
                }
                current.state.record(format!("ENV{}", joined(&pairs)), true);
                Ok(())
            }
            InstructionKind::Label(pairs) => {
                let pairs = self.pairs(current, pairs)?;
                current
                    .state
                    .record(format!("LABEL{}", joined(&pairs)), true);
                current.state.image.config.labels.extend(pairs);
                Ok(())
            }
            InstructionKind::Cmd(command) => {
                let args = command_args(&current.state, command);
                current.state.record(format!("CMD {}", quoted(&args)), true);
                current.state.image.config.cmd = Some(args);
                current.state.image.config.args_escaped = true;
                current.state.has_cmd = true;
                Ok(())
            }
            InstructionKind::Entrypoint(command) => {
                let args = command_args(&current.state, command);
                current
                    .state
                    .record(format!("ENTRYPOINT {}", quoted(&args)), true);
                current.state.image.config.entrypoint = Some(args);
                // A base's CMD was written for the base's entrypoint.
                if !current.state.has_cmd {
                    current.state.image.config.cmd = None;
                }
                Ok(())
            }
            InstructionKind::Expose(words) => self.expose(current, words),
            InstructionKind::Healthcheck(check) => {
                let check = healthcheck(check);
                current
                    .state
                    .record(format!("HEALTHCHECK {}", healthcheck_text(&check)), true);
                current.state.image.config.healthcheck = Some(check);
                Ok(())
            }
            InstructionKind::Maintainer(name) => {
                current.state.record(format!("MAINTAINER {name}"), true);
                current.state.image.author = Some(name.clone());
                Ok(())
            }
            InstructionKind::Onbuild { expression, .. } => {
                // BuildKit keeps no history entry for it.
                let triggers = &mut current.state.image.config.on_build;
                triggers.get_or_insert_default().push(expression.clone());
                Ok(())
            }
            InstructionKind::Shell(shell) => {
                current
                    .state
                    .record(format!("SHELL [{}]", shell.join(" ")), true);
                current.state.image.config.shell = Some(shell.clone());
                Ok(())
            }
            InstructionKind::Stopsignal(word) => {
                let signal = self.expand(current, word)?;
                if !is_signal(&signal) {
                    return Err(Problem::new(word.span, format!("invalid signal: {signal}"))
                        .with_hint("a signal is a number from 1 to 64 or a name such as SIGTERM"));
                }
                current.state.record(format!("STOPSIGNAL {signal}"), true);
                current.state.image.config.stop_signal = Some(signal);
                Ok(())
            }
            InstructionKind::User(word) => {
                let user = self.expand(current, word)?;
                current.state.record(format!("USER {user}"), true);
                current.state.image.config.user = user;
                Ok(())
            }
            InstructionKind::Volume(words) => {
                let mut paths = Vec::new();
                for word in words {
                    let path = self.expand(current, word)?;
                    if path.is_empty() {
                        return Err(Problem::new(
                            word.span,
                            "VOLUME specified can not be an empty string",
                        ));
                    }
                    paths.push(path);
                }
                current
                    .state
                    .record(format!("VOLUME [{}]", paths.join(" ")), true);
                current
                    .state
                    .image
                    .config
                    .volumes
                    .extend(paths.into_iter().map(|p| (p, Empty {})));
                Ok(())
            }
        }
    }

    fn expand(&self, current: &Current<'_>, word: &Word) -> Result<String, Problem> {
        expand_word(
            word,
            self.dockerfile.directives.escape,
            &current.state.environment(),
        )
        .map_err(|error| {
            // Words of triggers are not in the file.
            let span = match current.trigger_of {
                Some(_) => word.span,
                None => word.span_of(&self.dockerfile.text, error.range.clone()),
            };
            Problem::new(span, error.to_string())
        })
    }

    /// Expands pairs against the values before the instruction: in `ENV a=1 b=$a`, `$a` is the old one.
    fn pairs(
        &self,
        current: &Current<'_>,
        pairs: &[KeyValue],
    ) -> Result<Vec<(String, String)>, Problem> {
        let mut bytes = 0;
        pairs
            .iter()
            .map(|pair| {
                let expanded = (
                    self.expand(current, &pair.key)?,
                    self.expand(current, &pair.value)?,
                );
                bytes += expanded.0.len() + expanded.1.len();
                match bytes > STATE_LIMIT_BYTES {
                    false => Ok(expanded),
                    true => Err(Problem::new(
                        pair.value.span,
                        format!(
                            "the instruction's values are longer than {} MiB up to here",
                            STATE_LIMIT_BYTES >> 20
                        ),
                    )),
                }
            })
            .collect()
    }

    fn arg(&self, current: &mut Current<'_>, declarations: &[ArgDeclaration]) -> Lowered {
        let platform_args = platform_args(self.dockerfile, self.settings);
        let mut text = "ARG".to_owned();
        for declaration in declarations {
            let name = self.expand(current, &declaration.name)?;
            let given = self.settings.build_args.get(&name);
            let value = match (given, &declaration.default) {
                (Some(given), _) => Some(given.clone()),
                (None, Some(default)) => Some(self.expand(current, default)?),
                (None, None) => self
                    .graph
                    .global_args
                    .get(&name)
                    .or_else(|| platform_args.get(&name))
                    .cloned(),
            };
            let _ = match &value {
                Some(value) => write!(text, " {name}={value}"),
                None => write!(text, " {name}"),
            };
            current.state.declare_arg(&name, value.as_deref());
        }
        current.state.record(text, true);
        Ok(())
    }

    fn run(
        &mut self,
        current: &mut Current<'_>,
        instruction: &Instruction,
        run: &dockerfile::Run,
        reads: &[Option<Base>],
    ) -> Lowered {
        let mut mounts = Vec::new();
        let args = self.run_args(current, run, &mut mounts)?;
        let mut sources = Vec::new();
        for (at, word) in run.mounts.iter().enumerate() {
            let from = match reads.get(at).copied().flatten() {
                None => None,
                Some(Base::Context(context)) => Some(MountFrom::Context(context)),
                Some(base) => Some(
                    match self.base_step(base, current.trigger_of.unwrap_or(word.span)) {
                        None => MountFrom::Scratch,
                        Some(step) => {
                            sources.push(step);
                            MountFrom::Step(sources.len() - 1)
                        }
                    },
                ),
            };
            let sockets = mounts
                .iter()
                .filter(|m| matches!(m.kind, MountKind::Ssh { .. }));
            let sockets = sockets.count();
            let mount = self.mount(current, word, from, sockets)?;
            for option in mounts::unused_options(&word.raw, &mount.kind) {
                let span = current.trigger_of.unwrap_or(word.span);
                self.warn(
                    span,
                    &format!("--mount: a mount of this type does not use {option:?}"),
                );
            }
            mounts.push(mount);
        }
        let network = match run.network.as_ref().map(|n| n.raw.as_str()) {
            Some("none") => Network::None,
            Some("host") => Network::Host,
            // The parser knows no others.
            _ => self.settings.run.network,
        };
        let security = match run.security.as_ref().map(|s| s.raw.as_str()) {
            Some("insecure") => Security::Insecure,
            _ => Security::Sandbox,
        };
        let state = &current.state;
        let env = state
            .env
            .iter()
            .map(|(name, value)| format!("{name}={value}"))
            .collect();
        let is_set = |name: &str| {
            state
                .env
                .iter()
                .any(|(known, _)| known.eq_ignore_ascii_case(name))
        };
        let hostname = self.settings.build_args.get("BUILDKIT_SANDBOX_HOSTNAME");
        let hostname = hostname.filter(|name| !name.is_empty()).cloned();
        let operation = Operation::Run(Run {
            args: args.clone(),
            env,
            arguments: state.args.iter().map(|(name, _)| name.clone()).collect(),
            proxy_env: proxy_env(self.settings, is_set),
            cwd: absolute("/", state.working_dir()),
            user: state.image.config.user.clone(),
            network,
            security,
            devices: run.devices.iter().map(|word| device(&word.raw)).collect(),
            mounts,
            sources,
            hostname: hostname.unwrap_or_else(|| HOSTNAME.to_owned()),
            extra_hosts: self.settings.run.extra_hosts.clone(),
            shm_size: self.settings.run.shm_size,
            ulimits: self.settings.run.ulimits.clone(),
        });
        let history = format!("RUN {}{} # buildkit", state.history_args(), args.join(" "));
        self.step(current, instruction, operation);
        current.state.record(history, false);
        Ok(())
    }

    fn mount(
        &self,
        current: &Current<'_>,
        word: &Word,
        from: Option<MountFrom>,
        sockets: usize,
    ) -> Result<Mount, Problem> {
        let environment = current.state.environment();
        let context = mounts::Context {
            escape: self.dockerfile.directives.escape,
            environment: &environment,
            directory: current.state.working_dir(),
            cache_namespace: self
                .settings
                .build_args
                .get("BUILDKIT_CACHE_MOUNT_NS")
                .map_or("", String::as_str),
            sockets,
        };
        mounts::mount(word, from, &context)
    }

    fn run_args(
        &self,
        current: &Current<'_>,
        run: &dockerfile::Run,
        mounts: &mut Vec<Mount>,
    ) -> Result<Vec<String>, Problem> {
        let line = match (&run.command, run.heredocs.as_slice()) {
            (CommandLine::Exec(args), []) => return Ok(args.clone()),
            (CommandLine::Exec(_), [heredoc, ..]) => {
                return Err(Problem::new(
                    heredoc.span,
                    "a here-document needs the shell form of RUN",
                ));
            }
            (CommandLine::Shell(line), []) => line.clone(),
            (CommandLine::Shell(line), [heredoc]) if is_only_heredoc(line) => {
                let content = if heredoc.chomp {
                    without_tabs(&heredoc.content)
                } else {
                    heredoc.content.clone()
                };
                // A script with an interpreter of its own is a file that is run.
                if content.starts_with("#!") {
                    mounts.push(Mount {
                        target: Some(SCRIPTS.to_owned()),
                        kind: MountKind::Script {
                            name: heredoc.name.clone(),
                            content,
                        },
                    });
                    format!("{SCRIPTS}/{}", heredoc.name)
                } else {
                    content
                }
            }
            (CommandLine::Shell(line), heredocs) => {
                let mut full = line.clone();
                for heredoc in heredocs {
                    let _ = write!(full, "\n{}{}", heredoc.content, heredoc.name);
                }
                full
            }
        };
        let mut args = current.state.shell();
        args.push(line);
        Ok(args)
    }

    fn workdir(
        &mut self,
        current: &mut Current<'_>,
        instruction: &Instruction,
        word: &Word,
    ) -> Lowered {
        let text = self.expand(current, word)?;
        let previous = current.state.working_dir();
        // BuildKit cleans what it joins, and keeps an absolute path as it is written.
        let path = match text.as_str() {
            "" if previous.starts_with('/') => previous.to_owned(),
            text if text.starts_with('/') => text.to_owned(),
            text => absolute(previous, text),
        };
        current.state.image.config.working_dir.clone_from(&path);
        let makes_layer = path != "/";
        if makes_layer {
            let user = current.state.image.config.user.clone();
            let operation = Operation::MakeDirectory(MakeDirectory {
                path: absolute("/", &path),
                user,
            });
            self.step(current, instruction, operation);
        }
        current
            .state
            .record(format!("WORKDIR {path}"), !makes_layer);
        Ok(())
    }

    fn expose(&mut self, current: &mut Current<'_>, words: &[Word]) -> Lowered {
        let mut ports: Vec<String> = Vec::new();
        let environment = current.state.environment();
        for word in words {
            let texts = expand_words(word, self.dockerfile.directives.escape, &environment)
                .map_err(|error| Problem::new(word.span, error.to_string()))?;
            for text in texts {
                let parsed =
                    parse_ports(&text).map_err(|message| Problem::new(word.span, message))?;
                ports.extend(parsed);
            }
        }
        current
            .state
            .record(format!("EXPOSE [{}]", ports.join(" ")), true);
        let exposed = &mut current.state.image.config.exposed_ports;
        exposed.extend(ports.into_iter().map(|port| (port, Empty {})));
        Ok(())
    }

    fn copy(
        &mut self,
        current: &mut Current<'_>,
        instruction: &Instruction,
        copy: &dockerfile::Copy,
        from: Option<Base>,
        is_add: bool,
    ) -> Lowered {
        let keep_git_dir = copy.keep_git_dir;
        let mut sources = Vec::new();
        let mut texts = Vec::new();
        for word in &copy.sources {
            let text = self.expand(current, word)?;
            sources.push(copy_source(&text, word, is_add, keep_git_dir)?);
            texts.push(text);
        }
        if let Some(word) = &copy.checksum {
            let checksum = self.expand(current, word)?;
            set_checksum(&mut sources, &checksum, word, copy)?;
        }
        for heredoc in &copy.heredocs {
            texts.push(format!("<<{}", heredoc.name));
            sources.push(CopySource::Inline {
                name: heredoc.name.clone(),
                content: self.heredoc(current, heredoc)?,
            });
        }
        let destination = self.expand(current, &copy.destination)?;
        let optional = |word: &Option<Word>| {
            word.as_ref()
                .map(|word| self.expand(current, word))
                .transpose()
        };
        let (chown, chmod_text) = (optional(&copy.chown)?, optional(&copy.chmod)?);
        let chmod = match (&chmod_text, &copy.chmod) {
            (Some(text), Some(word)) if !text.is_empty() => Some(parse_mode(text, word.span)?),
            _ => None,
        };
        let excludes = copy.excludes.iter();
        let excludes = excludes
            .map(|word| self.expand(current, word))
            .collect::<Result<Vec<_>, _>>()?;
        let from_span = copy.from.as_ref().map_or(instruction.span, |f| f.span);
        let from_span = current.trigger_of.unwrap_or(from_span);
        let (from, source_step) = match from {
            None => (CopyFrom::Context(ContextId::MAIN), None),
            Some(Base::Context(context)) => (CopyFrom::Context(context), None),
            Some(base) => (CopyFrom::Step, self.base_step(base, from_span)),
        };
        let mut history = (if is_add { "ADD" } else { "COPY" }).to_owned();
        if copy.parents {
            history.push_str(" --parents");
        }
        for (flag, text) in [("chown", &chown), ("chmod", &chmod_text)] {
            if let Some(text) = text.as_ref().filter(|text| !text.is_empty()) {
                let _ = write!(history, " --{flag}={text}");
            }
        }
        for text in &texts {
            let _ = write!(history, " {}", without_userinfo(text));
        }
        let _ = write!(history, " {destination} # buildkit");
        if sources.len() > 1
            && !copy.parents
            && !destination.ends_with('/')
            && !destination.ends_with("/.")
            && destination != "."
        {
            self.warn(
                current.trigger_of.unwrap_or(copy.destination.span),
                "several sources and a destination without a trailing slash: unless it is a directory, the last file wins",
            );
        }
        let operation = Operation::Copy(Copy {
            from,
            definition: CopyDefinition {
                sources,
                destination: copy_destination(current.state.working_dir(), &destination),
                chown: chown.filter(|chown| !chown.is_empty()),
                // As BuildKit: a changed mode is a reason not to make an independent layer.
                link: copy.link && chmod.is_none(),
                chmod,
                unpack: copy.unpack.unwrap_or(is_add),
                unpack_remote: copy.unpack.unwrap_or(false),
                parents: copy.parents,
                excludes,
            },
            source_step,
        });
        self.step(current, instruction, operation);
        current.state.record(history, false);
        Ok(())
    }

    fn heredoc(
        &self,
        current: &Current<'_>,
        heredoc: &dockerfile::Heredoc,
    ) -> Result<String, Problem> {
        let content = if heredoc.chomp {
            without_tabs(&heredoc.content)
        } else {
            heredoc.content.clone()
        };
        if !heredoc.expand {
            return Ok(content);
        }
        expand_text(&content, &current.state.environment())
            .map_err(|error| Problem::new(heredoc.span, error.to_string()))
    }
}

/// What one source of `COPY` or `ADD` is.
pub(super) fn copy_source(
    text: &str,
    word: &Word,
    is_add: bool,
    keep_git_dir: Option<bool>,
) -> Result<CopySource, Problem> {
    let refuse = |what: &str| {
        Err(Problem::new(
            word.span,
            format!("source can't be {what} for COPY: {text:?}"),
        )
        .with_hint("ADD fetches; COPY takes files of the context, of a stage or of an image"))
    };
    let git = git::parse(text).map_err(|error| Problem::new(word.span, error.to_string()))?;
    // `github.com/a/b` could as well be a path.
    if let Some(git) = git.filter(|git| !git.indistinguishable_from_local) {
        if !is_add {
            return refuse("a git ref");
        }
        git.with_flags(keep_git_dir, None)
            .map_err(|error| Problem::new(word.span, error.to_string()))?;
        return Ok(CopySource::Git {
            reference: text.to_owned(),
            checksum: None,
            keep_git_dir,
        });
    }
    if text.starts_with("http://") || text.starts_with("https://") {
        if !is_add {
            return refuse("a URL");
        }
        return Ok(CopySource::Url {
            url: text.to_owned(),
            checksum: None,
        });
    }
    Ok(CopySource::Path(text.to_owned()))
}

/// `ADD --checksum`, which is for one source that is fetched.
pub(super) fn set_checksum(
    sources: &mut [CopySource],
    text: &str,
    word: &Word,
    copy: &dockerfile::Copy,
) -> Lowered {
    let [source] = sources else {
        return Err(Problem::new(
            word.span,
            "checksum can't be specified for multiple sources",
        ));
    };
    if !copy.heredocs.is_empty() {
        return Err(Problem::new(
            word.span,
            "checksum can't be specified for multiple sources",
        ));
    }
    match source {
        CopySource::Git { checksum, .. } => *checksum = Some(text.to_owned()),
        CopySource::Url { checksum, .. } => {
            Checksum::parse(text).map_err(|error| Problem::new(word.span, error.to_string()))?;
            *checksum = Some(text.to_owned());
        }
        CopySource::Path(_) | CopySource::Inline { .. } => {
            return Err(Problem::new(
                word.span,
                "checksum requires HTTP(S) or Git sources",
            ));
        }
    }
    Ok(())
}

/// `--device`, whose form the parser has checked.
fn device(raw: &str) -> Device {
    let mut device = Device {
        name: String::new(),
        required: false,
    };
    for field in dockerfile::comma_fields(raw).unwrap_or_default() {
        match field.split_once('=') {
            _ if field.eq_ignore_ascii_case("required") => device.required = true,
            Some((key, value)) if key.eq_ignore_ascii_case("required") => {
                device.required = dockerfile::parse_bool(value) == Some(true);
            }
            Some((key, value)) if key.eq_ignore_ascii_case("name") => {
                device.name = value.to_owned();
            }
            _ => device.name = field,
        }
    }
    device
}

fn command_args(state: &State, command: &CommandLine) -> Vec<String> {
    match command {
        CommandLine::Exec(args) => args.clone(),
        CommandLine::Shell(line) => {
            let mut args = state.shell();
            args.push(line.clone());
            args
        }
    }
}

/// Both spellings of each proxy setting that was given, unless the Dockerfile sets it itself.
fn proxy_env(settings: &Settings, is_set: impl Fn(&str) -> bool) -> Vec<String> {
    PROXY_ARGS
        .iter()
        .filter(|name| !is_set(name))
        .filter_map(|name| {
            let value = settings.build_args.get(*name).or_else(|| {
                let (_, value) = settings
                    .build_args
                    .iter()
                    .find(|(given, _)| given.eq_ignore_ascii_case(name))?;
                Some(value)
            })?;
            Some(format!("{name}={value}"))
        })
        .collect()
}

fn healthcheck(check: &Healthcheck) -> ImageHealthcheck {
    match check {
        Healthcheck::None => ImageHealthcheck {
            test: vec!["NONE".to_owned()],
            ..Default::default()
        },
        Healthcheck::Cmd {
            command,
            interval,
            timeout,
            start_period,
            start_interval,
            retries,
        } => {
            let test = match command {
                CommandLine::Exec(args) => std::iter::once("CMD".to_owned())
                    .chain(args.iter().cloned())
                    .collect(),
                CommandLine::Shell(line) => vec!["CMD-SHELL".to_owned(), line.clone()],
            };
            ImageHealthcheck {
                test,
                interval: *interval,
                timeout: *timeout,
                start_period: *start_period,
                start_interval: *start_interval,
                retries: *retries,
            }
        }
    }
}
