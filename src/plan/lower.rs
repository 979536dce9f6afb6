//! Stages + base configs → [`Plan`]. Pure.
//!
//! Texts of history entries are BuildKit's, because tools compare them.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use super::graph::{Base, StageNode, error, platform_args};
use super::state::State;
use super::text::{
    absolute, copy_destination, healthcheck_text, is_only_heredoc, is_signal, joined, parse_mode,
    parse_ports, quoted, without_tabs,
};
use super::{
    Copy, CopyDefinition, CopyFrom, ImageId, MakeDirectory, Network, Operation, Plan, Run,
    Settings, StageGraph, Step, StepId, support,
};
use crate::dockerfile::expand::{expand_text, expand_word, expand_words};
use crate::dockerfile::{
    self, ArgDeclaration, CommandLine, Dockerfile, DockerfileError, Healthcheck, Instruction,
    InstructionKind, KeyValue, Problem, Span, Word,
};
use crate::image::{Empty, Healthcheck as ImageHealthcheck, ImageConfig};

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
        states: BTreeMap::new(),
        problems: Vec::new(),
        warnings: Vec::new(),
    };
    for node in &graph.stages {
        let state = lowering.stage(node);
        lowering.states.insert(node.index, state);
    }
    if !lowering.problems.is_empty() {
        return Err(error(dockerfile, lowering.problems));
    }
    lowering.warnings.extend(lowering.unused_args());
    let state = lowering
        .states
        .remove(&graph.target)
        .expect("the target is one of the needed stages");
    let mut config = state.image;
    // The image is for what was asked for, whatever its base says of itself.
    config.platform = settings.platform.clone();
    Ok(Plan {
        steps: lowering.steps,
        result: state.step,
        config,
        history: state.history,
        warnings: lowering.warnings,
    })
}

struct Lowering<'a> {
    dockerfile: &'a Dockerfile,
    graph: &'a StageGraph,
    settings: &'a Settings,
    images: &'a [ImageConfig],
    steps: Vec<Step>,
    image_steps: BTreeMap<ImageId, StepId>,
    states: BTreeMap<usize, State>,
    problems: Vec<Problem>,
    warnings: Vec<String>,
}

/// The stage that is being lowered.
struct Current<'a> {
    node: &'a StageNode,
    state: State,
    /// The steps of this stage and the texts of their names.
    steps: Vec<(StepId, String)>,
    /// Where a problem points for instructions that are not in the file: triggers.
    trigger_of: Option<Span>,
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
        };
        if let Some(step) = state.step {
            steps.push((step, stage.original.clone()));
        }
        let triggers = state.image.config.on_build.take().unwrap_or_default();
        let mut current = Current {
            node,
            state,
            steps,
            trigger_of: Some(stage.base.span),
        };
        for trigger in &triggers {
            self.trigger(&mut current, trigger, stage.base.span);
        }
        current.trigger_of = None;
        for (at, instruction) in stage.instructions.iter().enumerate() {
            if let Err(problem) = self.instruction(&mut current, instruction, Some(at)) {
                self.problems.push(problem);
            }
        }
        self.name_steps(&current, stage.name.as_ref());
        current.state
    }

    /// `[build 2/5] RUN make`; without a name where there is one stage only.
    fn name_steps(&mut self, current: &Current<'_>, name: Option<&Word>) {
        let label = match name {
            Some(name) => format!("{} ", name.raw),
            None if self.graph.stages.len() > 1 => format!("stage-{} ", current.node.index),
            None => String::new(),
        };
        let total = current.steps.len();
        for (number, (step, text)) in current.steps.iter().enumerate() {
            let step = &mut self.steps[step.0];
            if step.name.is_empty() {
                step.name = format!("[{label}{}/{total}] {text}", number + 1);
            }
        }
    }

    /// Says which values of `--build-arg` no `ARG` takes, of triggers neither, and nothing else uses.
    fn unused_args(&self) -> Option<String> {
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
                || self.states.values().any(|state| state.args.contains(name))
                || platform_args.contains_key(*name)
                || PROXY_ARGS
                    .iter()
                    .any(|proxy| proxy.eq_ignore_ascii_case(name))
                || *name == "SOURCE_DATE_EPOCH"
        };
        let given = self.settings.build_args.keys();
        let unused: Vec<&str> = given
            .filter(|name| !is_used(name))
            .map(String::as_str)
            .collect();
        let list = unused.join(", ");
        (!unused.is_empty()).then(|| format!("build arguments that no ARG takes: {list}"))
    }

    fn image_step(&mut self, image: ImageId, span: Span) -> StepId {
        if let Some(step) = self.image_steps.get(&image) {
            return *step;
        }
        let step = self.push(None, span, Operation::Image(image));
        self.image_steps.insert(image, step);
        step
    }

    fn push(&mut self, parent: Option<StepId>, span: Span, operation: Operation) -> StepId {
        let place = dockerfile::place(&self.dockerfile.name, &self.dockerfile.text, span);
        self.steps.push(Step {
            parent,
            name: String::new(),
            place,
            operation,
        });
        StepId(self.steps.len() - 1)
    }

    /// Adds a step on top of the stage's filesystem.
    fn step(&mut self, current: &mut Current<'_>, instruction: &Instruction, operation: Operation) {
        let span = current.trigger_of.unwrap_or(instruction.span);
        let step = self.push(current.state.step, span, operation);
        current.state.step = Some(step);
        current.steps.push((step, instruction.original.clone()));
    }

    fn warn(&mut self, span: Span, message: &str) {
        let place = dockerfile::place(&self.dockerfile.name, &self.dockerfile.text, span);
        self.warnings.push(format!("{place}: {message}"));
    }

    /// Executes a trigger that the base image brought.
    fn trigger(&mut self, current: &mut Current<'_>, expression: &str, from: Span) {
        let at_from = |message: String| {
            Problem::new(
                from,
                format!("ONBUILD {expression:?} of the base image: {message}"),
            )
        };
        let instruction = match dockerfile::parse_trigger(expression) {
            Ok(instruction) => instruction,
            Err(error) => {
                let messages: Vec<String> = error.problems.into_iter().map(|p| p.message).collect();
                self.problems.push(at_from(messages.join("; ")));
                return;
            }
        };
        let mut problems = support::unsupported_instruction(&instruction);
        if matches!(&instruction.kind, InstructionKind::Copy(copy) if copy.from.is_some()) {
            problems.push(Problem::new(
                from,
                "COPY --from is not supported yet in a trigger",
            ));
        }
        if problems.is_empty()
            && let Err(problem) = self.instruction(current, &instruction, None)
        {
            problems.push(problem);
        }
        self.problems
            .extend(problems.into_iter().map(|p| at_from(p.message)));
    }

    fn instruction(
        &mut self,
        current: &mut Current<'_>,
        instruction: &Instruction,
        at: Option<usize>,
    ) -> Lowered {
        match &instruction.kind {
            InstructionKind::Add(copy) => self.copy(current, instruction, copy, None, true),
            InstructionKind::Copy(copy) => {
                let from = at.and_then(|at| current.node.copies.get(&at).copied());
                self.copy(current, instruction, copy, from, false)
            }
            InstructionKind::Arg(declarations) => self.arg(current, declarations),
            InstructionKind::Run(run) => self.run(current, instruction, run),
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
        .map_err(|error| Problem::new(word.span, error.to_string()))
    }

    /// Expands pairs against the values before the instruction: in `ENV a=1 b=$a`, `$a` is the old one.
    fn pairs(
        &self,
        current: &Current<'_>,
        pairs: &[KeyValue],
    ) -> Result<Vec<(String, String)>, Problem> {
        pairs
            .iter()
            .map(|pair| {
                Ok((
                    self.expand(current, &pair.key)?,
                    self.expand(current, &pair.value)?,
                ))
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
    ) -> Lowered {
        let args = self.run_args(current, instruction, run)?;
        let network = match run.network.as_ref().map(|n| n.raw.as_str()) {
            None | Some("default") => Network::Default,
            Some("none") => Network::None,
            Some(other) => {
                let span = run.network.as_ref().map_or(instruction.span, |n| n.span);
                return Err(
                    Problem::new(span, format!("invalid network mode {other:?}"))
                        .with_hint("the modes are default, none and host"),
                );
            }
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
        let operation = Operation::Run(Run {
            args: args.clone(),
            env,
            proxy_env: proxy_env(self.settings, is_set),
            cwd: state.working_dir().to_owned(),
            user: state.image.config.user.clone(),
            network,
        });
        let history = format!("RUN {}{} # buildkit", state.history_args(), args.join(" "));
        self.step(current, instruction, operation);
        current.state.record(history, false);
        Ok(())
    }

    fn run_args(
        &self,
        current: &Current<'_>,
        instruction: &Instruction,
        run: &dockerfile::Run,
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
                if content.starts_with("#!") {
                    return Err(Problem::new(
                        heredoc.span,
                        "a here-document with an interpreter line (#!) is not supported yet",
                    )
                    .with_hint(format!(
                        "write \"RUN <interpreter> <<{}\" instead",
                        heredoc.name
                    )));
                }
                content
            }
            (CommandLine::Shell(line), heredocs) => {
                let mut full = line.clone();
                for heredoc in heredocs {
                    let _ = write!(full, "\n{}{}", heredoc.content, heredoc.name);
                }
                full
            }
        };
        if line.trim().is_empty() {
            return Err(Problem::new(instruction.span, "RUN has no command"));
        }
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
        let path = self.expand(current, word)?;
        let path = absolute(current.state.working_dir(), &path);
        current.state.image.config.working_dir.clone_from(&path);
        let makes_layer = path != "/";
        if makes_layer {
            let user = current.state.image.config.user.clone();
            let operation = Operation::MakeDirectory(MakeDirectory {
                path: path.clone(),
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
                if text.contains(':') {
                    self.warn(
                        word.span,
                        &format!("EXPOSE {text}: only the container's port counts"),
                    );
                }
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
        let mut sources = Vec::new();
        for word in &copy.sources {
            sources.push(self.expand(current, word)?);
        }
        let mut inline = Vec::new();
        for heredoc in &copy.heredocs {
            inline.push((heredoc.name.clone(), self.heredoc(current, heredoc)?));
        }
        let destination = self.expand(current, &copy.destination)?;
        let chown = copy
            .chown
            .as_ref()
            .map(|word| self.expand(current, word))
            .transpose()?;
        let chmod_text = copy
            .chmod
            .as_ref()
            .map(|word| self.expand(current, word))
            .transpose()?;
        let chmod = match (&chmod_text, &copy.chmod) {
            (Some(text), Some(word)) => Some(parse_mode(text, word.span)?),
            _ => None,
        };
        let (source, source_step) = match from {
            None => (CopyFrom::Context, None),
            Some(Base::Scratch) => (CopyFrom::Step, None),
            Some(Base::Stage(index)) => {
                (CopyFrom::Step, self.states.get(&index).and_then(|s| s.step))
            }
            Some(Base::Image(image)) => {
                let span = copy.from.as_ref().map_or(instruction.span, |f| f.span);
                let is_new = !self.image_steps.contains_key(&image);
                let step = self.image_step(image, span);
                if is_new {
                    let reference = &self.graph.images[image.0].reference;
                    self.steps[step.0].name = format!("FROM {reference}");
                }
                (CopyFrom::Step, Some(step))
            }
        };
        let mut history = (if is_add { "ADD" } else { "COPY" }).to_owned();
        for (flag, text) in [("chown", &chown), ("chmod", &chmod_text)] {
            if let Some(text) = text {
                let _ = write!(history, " --{flag}={text}");
            }
        }
        for source in sources
            .iter()
            .cloned()
            .chain(inline.iter().map(|(name, _)| format!("<<{name}")))
        {
            let _ = write!(history, " {source}");
        }
        let _ = write!(history, " {destination} # buildkit");
        if sources.len() + inline.len() > 1
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
            from: source,
            definition: CopyDefinition {
                sources,
                inline,
                destination: copy_destination(current.state.working_dir(), &destination),
                chown,
                chmod,
                unpack: is_add,
                keep_owner: source == CopyFrom::Step,
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
