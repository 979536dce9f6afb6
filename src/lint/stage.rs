//! Rules that need values: what the instructions of a stage do with variables.

use std::collections::{BTreeMap, BTreeSet};

use super::from::{Base, Graph, at, mount_fields};
use super::options::Options;
use super::rule::{
    COPY_IGNORED_FILE, EXPOSE_INVALID_FORMAT, EXPOSE_PROTO_CASING, INVALID_BASE_IMAGE_PLATFORM,
    JSON_ARGS_RECOMMENDED, LEGACY_KEY_VALUE_FORMAT, MULTIPLE_INSTRUCTIONS_DISALLOWED, Rule,
    SECRETS_USED_IN_ARG_OR_ENV, UNDEFINED_VAR, WORKDIR_RELATIVE_PATH,
};
use super::{
    CheckError, Facts, Lines, Linter, MAX_VALUE_BYTES, Placed, did_you_mean, quoted, written_name,
};
use crate::dockerfile::expand::{Environment, Expansion, Options as ExpandOptions, expand};
use crate::dockerfile::{
    ArgDeclaration, CommandLine, Copy, Instruction, InstructionKind, KeyValue, Word, parse_bool,
};
use crate::image::{DEFAULT_PATH, ImageConfig, Platform};

/// Arguments that are for the builder and become no variables.
const BUILDER_ARGS: [&str; 2] = ["BUILDKIT_SBOM_SCAN_CONTEXT", "BUILDKIT_SBOM_SCAN_STAGE"];

/// Words that a secret's name has.
const SECRET_WORDS: [&str; 10] = [
    "apikey",
    "auth",
    "credential",
    "credentials",
    "key",
    "password",
    "pword",
    "passwd",
    "secret",
    "token",
];

/// Words that say that it is none after all.
const HARMLESS_WORDS: [&str; 3] = ["public", "file", "version"];

/// Counts the bytes of values.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Budget {
    spent: usize,
}

impl Budget {
    /// # Errors
    /// [`CheckError::Limit`] above [`MAX_VALUE_BYTES`].
    pub(super) fn spend(&mut self, bytes: usize) -> Result<(), CheckError> {
        self.spent = self.spent.saturating_add(bytes);
        if self.spent > MAX_VALUE_BYTES {
            let message = format!("the variables' values take more than {MAX_VALUE_BYTES} bytes");
            return Err(CheckError::Limit(message));
        }
        Ok(())
    }
}

/// An argument.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ArgInfo {
    /// What it is worth; empty where it has no value.
    pub value: String,
    /// What the comment above says of it.
    pub description: String,
    /// Where it is declared.
    pub lines: Lines,
    /// The arguments that its value is made of.
    pub needs: BTreeSet<String>,
}

/// A secret or an agent that a step wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountInfo {
    /// Whether the step cannot do without.
    pub required: bool,
    /// The first step that wants it.
    pub lines: Lines,
}

/// What the instructions of one stage declare.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Declared {
    /// Arguments that are not the global ones of that name.
    pub args: BTreeMap<String, ArgInfo>,
    /// The names of all arguments that are declared.
    pub used_args: BTreeSet<String>,
    /// Secrets by name.
    pub secrets: BTreeMap<String, MountInfo>,
    /// Agents by name.
    pub ssh: BTreeMap<String, MountInfo>,
}

/// A stage after some of its instructions.
#[derive(Clone, Debug)]
struct State {
    env: Environment,
    /// When each variable was set last: the order in which similar names are suggested.
    set_at: BTreeMap<String, u64>,
    clock: u64,
    /// `ENV` alone, in order: stages built on this one begin with it.
    image_env: Vec<(String, String)>,
    /// Whether all variables are known: whether the base image's config is there.
    is_known: bool,
    has_shell: bool,
    /// Whether the Dockerfile set a working directory.
    has_workdir: bool,
    args: BTreeSet<String>,
    platform: Platform,
}

impl State {
    fn new(config: Option<&ImageConfig>, is_known: bool, platform: Platform) -> Self {
        let config = config.map(|config| &config.config);
        let env = config
            .map(|config| config.env.as_slice())
            .unwrap_or_default();
        let pairs = env
            .iter()
            .map(|pair| pair.split_once('=').unwrap_or((pair, "")));
        Self {
            env: Environment::new(),
            set_at: BTreeMap::new(),
            clock: 0,
            image_env: pairs.map(|(n, v)| (n.to_owned(), v.to_owned())).collect(),
            is_known,
            has_shell: config.is_some_and(|c| c.shell.as_ref().is_some_and(|s| !s.is_empty())),
            has_workdir: false,
            args: BTreeSet::new(),
            platform,
        }
    }

    /// What a stage begins with, before its first instruction.
    fn begin(&mut self) {
        let has_path = self.image_env.iter().any(|(name, _)| name == "PATH");
        if !has_path && self.platform.os != "windows" {
            self.image_env
                .push(("PATH".to_owned(), DEFAULT_PATH.to_owned()));
        }
        for (name, value) in self.image_env.clone() {
            self.set(&name, value);
        }
    }

    fn set(&mut self, name: &str, value: String) {
        self.clock += 1;
        self.set_at.insert(name.to_owned(), self.clock);
        self.env.insert(name.to_owned(), value);
    }

    fn set_env(&mut self, name: &str, value: String) {
        match self.image_env.iter_mut().find(|(known, _)| known == name) {
            Some((_, known)) => known.clone_from(&value),
            None => self.image_env.push((name.to_owned(), value.clone())),
        }
        self.set(name, value);
    }

    /// Variables similar to `name`.
    fn similar(&self, name: &str) -> String {
        let length = name.chars().count();
        let near = |known: &&String| known.chars().count().abs_diff(length) <= 2;
        let mut known: Vec<&String> = self.env.keys().filter(near).collect();
        known.sort_by_key(|name| self.set_at.get(*name));
        did_you_mean(name, known.into_iter().map(String::as_str), "$")
    }

    /// About how many bytes it takes.
    fn size(&self) -> usize {
        let env = self
            .env
            .iter()
            .map(|(name, value)| 3 * name.len() + 2 * value.len());
        env.sum::<usize>() + self.args.iter().map(String::len).sum::<usize>()
    }
}

/// Instructions of which the last one of a stage counts.
#[derive(Default)]
struct Once<'p> {
    cmd: Option<&'p Placed>,
    entrypoint: Option<&'p Placed>,
    healthcheck: Option<&'p Placed>,
}

/// Goes through stages.
pub(super) struct Stages<'a> {
    linter: &'a mut Linter,
    graph: &'a Graph<'a>,
    facts: &'a Facts<'a>,
    states: BTreeMap<usize, State>,
    declared: Vec<Declared>,
    budget: Budget,
}

/// One instruction in its stage.
#[derive(Clone, Copy)]
struct Here<'p> {
    stage: usize,
    placed: &'p Placed,
    options: &'p Options,
    escape: char,
}

impl<'a> Stages<'a> {
    pub(super) fn new(linter: &'a mut Linter, graph: &'a Graph<'a>, facts: &'a Facts<'a>) -> Self {
        Self {
            linter,
            graph,
            facts,
            states: BTreeMap::new(),
            declared: vec![Declared::default(); graph.nodes.len()],
            budget: Budget::default(),
        }
    }

    pub(super) fn finish(self) -> Vec<Declared> {
        self.declared
    }

    /// Goes through the wanted stages in the order of the file.
    pub(super) fn run(&mut self, wanted: &[bool]) -> Result<(), CheckError> {
        let wanted = || (0..self.graph.nodes.len()).filter(|index| wanted[*index]);
        // Images are resolved before any instruction is looked at.
        for index in wanted() {
            self.check_platform(index);
        }
        let wanted: Vec<usize> = wanted().collect();
        for index in wanted {
            self.stage(index)?;
        }
        Ok(())
    }

    /// Checks that the base image is for the right platform.
    fn check_platform(&mut self, index: usize) {
        let node = &self.graph.nodes[index];
        let (Base::Image(_), Some(config)) = (&node.base, self.facts.images.get(&index)) else {
            return;
        };
        // Without layers it is as good as scratch.
        let is_empty = config.rootfs.diff_ids.is_empty()
            && config.history.iter().all(|entry| entry.empty_layer);
        let (actual, expected) = (&config.platform, &node.platform);
        if is_empty || (&actual.os, &actual.architecture) == (&expected.os, &expected.architecture)
        {
            return;
        }
        let placed = &self.graph.source.stages[index].0;
        self.linter
            .add_always(&INVALID_BASE_IMAGE_PLATFORM, placed, || {
                let shown = |platform: &Platform| quoted(&normal(platform).to_string());
                format!(
                    "Base image {} was pulled with platform {}, expected {} for current build",
                    node.base_name,
                    shown(actual),
                    shown(expected)
                )
            });
    }

    fn stage(&mut self, index: usize) -> Result<(), CheckError> {
        let graph = self.graph;
        let node = &graph.nodes[index];
        let config = self.facts.images.get(&index);
        let fresh = |is_known| State::new(config, is_known, node.platform.clone());
        let mut state = match node.base {
            Base::Scratch => State::new(None, true, node.platform.clone()),
            Base::Stage(base) => match self.states.get(&base) {
                Some(state) => state.clone(),
                // A named context stands in for it.
                None => fresh(config.is_some()),
            },
            Base::Image(_) | Base::Context => fresh(config.is_some()),
        };
        state.begin();
        self.budget.spend(state.size())?;
        let (from_placed, placed) = &graph.source.stages[index];
        // Triggers point at the FROM that brought them; its comments are not theirs.
        let trigger_placed = Placed {
            comments: Vec::new(),
            ..from_placed.clone()
        };
        let triggers = node
            .triggers
            .iter()
            .map(|trigger| (trigger, &trigger_placed));
        let own = graph.dockerfile.stages[index]
            .instructions
            .iter()
            .zip(placed);
        let mut once = Once::default();
        for (instruction, placed) in triggers.chain(own) {
            let options = self.linter.options_at(placed);
            let here = Here {
                stage: index,
                placed,
                options: &options,
                escape: graph.dockerfile.directives.escape,
            };
            self.instruction(here, placed, &mut state, &mut once, instruction)?;
        }
        self.states.insert(index, state);
        Ok(())
    }

    fn add(&mut self, here: Here<'_>, rule: &'static Rule, detail: impl FnOnce() -> String) {
        self.linter.add(here.options, rule, here.placed, detail);
    }

    /// Expands `text` and checks its variables.
    fn expand_with(
        &mut self,
        here: Here<'_>,
        state: &State,
        text: &str,
        escape: char,
        options: ExpandOptions,
    ) -> Result<Expansion, CheckError> {
        let expanded = expand(text, escape, &state.env, options)
            .map_err(|error| at(here.placed.lines, error.to_string()))?;
        self.budget.spend(expanded.text.len())?;
        for name in &expanded.unset {
            if state.is_known
                && !state.args.contains(name)
                && !BUILDER_ARGS.contains(&name.as_str())
            {
                self.add(here, &UNDEFINED_VAR, || {
                    let hint = state.similar(name);
                    format!("Usage of undefined variable '${name}'{hint}")
                });
            }
        }
        Ok(expanded)
    }

    fn expand(&mut self, here: Here<'_>, state: &State, text: &str) -> Result<String, CheckError> {
        let expanded =
            self.expand_with(here, state, text, here.escape, ExpandOptions::default())?;
        Ok(expanded.text)
    }

    fn expand_all<'w>(
        &mut self,
        here: Here<'_>,
        state: &State,
        words: impl IntoIterator<Item = &'w Word>,
    ) -> Result<Vec<String>, CheckError> {
        let words = words.into_iter();
        words
            .map(|word| self.expand(here, state, &word.raw))
            .collect()
    }

    fn instruction<'p>(
        &mut self,
        here: Here<'_>,
        placed: &'p Placed,
        state: &mut State,
        once: &mut Once<'p>,
        instruction: &Instruction,
    ) -> Result<(), CheckError> {
        let name = written_name(&instruction.original);
        match &instruction.kind {
            InstructionKind::Add(copy) => self.copy(here, state, copy, true)?,
            InstructionKind::Copy(copy) => {
                self.check_order(here, instruction, "copy")?;
                self.copy(here, state, copy, false)?;
            }
            InstructionKind::Arg(declarations) => {
                for declaration in declarations {
                    self.arg(here, state, declaration)?;
                }
            }
            InstructionKind::Cmd(command) => {
                self.check_once(here, once.cmd.replace(placed), name);
                self.check_json(here, state, command, name);
            }
            InstructionKind::Entrypoint(command) => {
                self.check_once(here, once.entrypoint.replace(placed), name);
                self.check_json(here, state, command, name);
            }
            InstructionKind::Healthcheck(_) => {
                self.check_once(here, once.healthcheck.replace(placed), name)
            }
            InstructionKind::Env(pairs) => {
                for (key, value, legacy) in self.pairs(here, state, pairs)? {
                    self.check_legacy(here, legacy, name);
                    self.check_secret(here, "ENV", &key);
                    state.set_env(&key, value);
                }
            }
            InstructionKind::Label(pairs) => {
                for (_, _, legacy) in self.pairs(here, state, pairs)? {
                    self.check_legacy(here, legacy, name);
                }
            }
            InstructionKind::Expose(words) => self.expose(here, state, words)?,
            InstructionKind::Run(run) => {
                self.check_order(here, instruction, "mount")?;
                for mount in &run.mounts {
                    self.mount(here, state, mount)?;
                }
            }
            InstructionKind::Shell(shell) => state.has_shell = !shell.is_empty(),
            InstructionKind::Stopsignal(word) | InstructionKind::User(word) => {
                self.expand(here, state, &word.raw)?;
            }
            InstructionKind::Volume(words) => {
                self.expand_all(here, state, words)?;
            }
            InstructionKind::Workdir(word) => {
                let path = self.expand(here, state, &word.raw)?;
                if !std::mem::replace(&mut state.has_workdir, true)
                    && !is_absolute(&path, &state.platform)
                {
                    self.add(here, &WORKDIR_RELATIVE_PATH, || {
                        let path = quoted(&path);
                        format!(
                            "Relative workdir {path} can have unexpected results if the base image changes"
                        )
                    });
                }
            }
            InstructionKind::Maintainer(_) | InstructionKind::Onbuild { .. } => {}
        }
        Ok(())
    }

    /// Only stages before this one can be read.
    fn check_order(
        &self,
        here: Here<'_>,
        instruction: &Instruction,
        what: &str,
    ) -> Result<(), CheckError> {
        let lines = here.placed.lines;
        for source in self.graph.sources(instruction, lines)? {
            if source >= here.stage && !self.graph.nodes[source].is_replaced {
                let name = |index: usize| match &self.graph.dockerfile.stages[index].name {
                    Some(name) => quoted(&name.raw),
                    None => format!("\"stage-{index}\""),
                };
                return Err(at(
                    lines,
                    format!(
                        "cannot {what} from stage {}, it needs to be defined before current stage {}",
                        name(source),
                        name(here.stage)
                    ),
                ));
            }
        }
        Ok(())
    }

    fn check_once(&mut self, here: Here<'_>, earlier: Option<&Placed>, name: &str) {
        // The earlier one is what does not count.
        if let Some(earlier) = earlier {
            let rule = &MULTIPLE_INSTRUCTIONS_DISALLOWED;
            self.linter.add(here.options, rule, earlier, || {
                format!(
                    "Multiple {name} instructions should not be used in the same stage because only the last one will be used"
                )
            });
        }
    }

    fn check_json(&mut self, here: Here<'_>, state: &State, command: &CommandLine, name: &str) {
        if matches!(command, CommandLine::Shell(_)) && !state.has_shell {
            self.add(here, &JSON_ARGS_RECOMMENDED, || {
                format!(
                    "JSON arguments recommended for {name} to prevent unintended behavior related to OS signals"
                )
            });
        }
    }

    fn check_legacy(&mut self, here: Here<'_>, legacy: bool, name: &str) {
        if legacy {
            self.add(here, &LEGACY_KEY_VALUE_FORMAT, || {
                format!(
                    "\"{name} key=value\" should be used instead of legacy \"{name} key value\" format"
                )
            });
        }
    }

    fn check_secret(&mut self, here: Here<'_>, instruction: &str, key: &str) {
        let has = |words: &[&str]| {
            let mut parts = key.split('_');
            parts.any(|part| words.iter().any(|word| word.eq_ignore_ascii_case(part)))
        };
        if has(&SECRET_WORDS) && !has(&HARMLESS_WORDS) {
            self.add(here, &SECRETS_USED_IN_ARG_OR_ENV, || {
                let key = quoted(key);
                format!(
                    "Do not use ARG or ENV instructions for sensitive data ({instruction} {key})"
                )
            });
        }
    }

    /// Expands all pairs before any of them has an effect.
    fn pairs(
        &mut self,
        here: Here<'_>,
        state: &State,
        pairs: &[KeyValue],
    ) -> Result<Vec<(String, String, bool)>, CheckError> {
        let mut expanded = Vec::new();
        for pair in pairs {
            let key = self.expand(here, state, &pair.key.raw)?;
            let value = self.expand(here, state, &pair.value.raw)?;
            expanded.push((key, value, pair.legacy));
        }
        Ok(expanded)
    }

    fn arg(
        &mut self,
        here: Here<'_>,
        state: &mut State,
        declaration: &ArgDeclaration,
    ) -> Result<(), CheckError> {
        let name = &declaration.name.raw;
        self.check_secret(here, "ARG", name);
        let given = self.facts.build_args.get(name);
        let global = self.graph.args.get(name);
        let mut is_inherited = false;
        let value = match (given, &declaration.default, global) {
            (Some(given), _, _) => Some(given.clone()),
            (None, Some(default), _) => Some(self.expand(here, state, &default.raw)?),
            (None, None, Some(global)) => {
                is_inherited = true;
                Some(global.clone())
            }
            (None, None, None) => None,
        };
        self.budget.spend(value.as_ref().map_or(0, String::len))?;
        let declared = &mut self.declared[here.stage];
        declared.used_args.insert(name.clone());
        if !is_inherited {
            let info = ArgInfo {
                value: value.clone().unwrap_or_default(),
                description: here.placed.description(name).to_owned(),
                lines: here.placed.lines,
                needs: BTreeSet::new(),
            };
            declared.args.insert(name.clone(), info);
        }
        if let Some(value) = value
            && !BUILDER_ARGS.contains(&name.as_str())
        {
            state.set(name, value);
        }
        state.args.insert(name.clone());
        Ok(())
    }

    fn copy(
        &mut self,
        here: Here<'_>,
        state: &State,
        copy: &Copy,
        is_add: bool,
    ) -> Result<(), CheckError> {
        let flags = [&copy.chown, &copy.chmod, &copy.checksum];
        self.expand_all(here, state, flags.into_iter().flatten())?;
        let sources = self.expand_all(here, state, &copy.sources)?;
        self.expand(here, state, &copy.destination.raw)?;
        for heredoc in copy.heredocs.iter().filter(|heredoc| heredoc.expand) {
            let options = ExpandOptions {
                literal_quotes: true,
                ..ExpandOptions::default()
            };
            self.expand_with(here, state, &heredoc.content, '\\', options)?;
        }
        let (Some(ignored), None) = (self.facts.ignored, &copy.from) else {
            return Ok(());
        };
        for source in sources.iter().filter(|source| !is_remote(source)) {
            let path = clean(source);
            // The rules are for relative paths.
            let is_relative = !path.starts_with('/');
            if (is_relative && ignored(&path)) || (path == "/" && ignored(".")) {
                self.add(here, &COPY_IGNORED_FILE, || {
                    let command = if is_add { "Add" } else { "Copy" };
                    let path = quoted(&path);
                    format!("Attempting to {command} file {path} that is excluded by .dockerignore")
                });
            }
        }
        Ok(())
    }

    fn expose(&mut self, here: Here<'_>, state: &State, words: &[Word]) -> Result<(), CheckError> {
        let mut ports = Vec::new();
        for word in words {
            // Nobody is told of variables that are not set here, as BuildKit does not.
            let expanded = expand(&word.raw, here.escape, &state.env, ExpandOptions::default());
            let expanded = expanded.map_err(|error| at(here.placed.lines, error.to_string()))?;
            self.budget.spend(expanded.text.len())?;
            ports.extend(expanded.words);
        }
        for port in &ports {
            let (host, container) = match port.rsplit_once(':') {
                Some((host, container)) => (host, container),
                None => ("", port.as_str()),
            };
            let (number, protocol) = container.split_once('/').unwrap_or((container, ""));
            let lower = protocol.to_lowercase();
            if number.is_empty() || !["", "tcp", "udp", "sctp"].contains(&lower.as_str()) {
                return Err(at(
                    here.placed.lines,
                    format!("invalid port: {}", quoted(port)),
                ));
            }
            if protocol != lower {
                self.add(here, &EXPOSE_PROTO_CASING, || {
                    format!("Defined protocol '{port}' in EXPOSE instruction should be lowercase")
                });
            }
            if !host.trim_matches(':').is_empty() {
                self.add(here, &EXPOSE_INVALID_FORMAT, || {
                    format!(
                        "EXPOSE instruction should not define an IP address or host-port mapping, found '{port}'"
                    )
                });
            }
        }
        Ok(())
    }

    /// Expands a `--mount` and keeps what it wants of the caller.
    fn mount(&mut self, here: Here<'_>, state: &State, word: &Word) -> Result<(), CheckError> {
        let mut fields: BTreeMap<String, String> = BTreeMap::new();
        for (name, value) in mount_fields(&word.raw) {
            let value = match value {
                Some(value) => self.expand(here, state, &value)?,
                None => "true".to_owned(),
            };
            let name = match name.as_str() {
                "src" => "source".to_owned(),
                "dst" | "destination" => "target".to_owned(),
                _ => name,
            };
            fields.insert(name, value);
        }
        let field = |name: &str| fields.get(name).map_or("", String::as_str);
        let info = MountInfo {
            required: parse_bool(field("required")) == Some(true),
            lines: here.placed.lines,
        };
        let declared = &mut self.declared[here.stage];
        let last = |path: &str| {
            path.trim_end_matches('/')
                .rsplit('/')
                .next()
                .map(str::to_owned)
        };
        match field("type").to_lowercase().as_str() {
            "secret" => {
                let id = [field("source"), field("id")]
                    .into_iter()
                    .find(|id| !id.is_empty());
                let id = id.map(str::to_owned).or_else(|| last(field("target")));
                declared
                    .secrets
                    .entry(id.unwrap_or_default())
                    .or_insert(info);
            }
            "ssh" => {
                let id = Some(field("id")).filter(|id| !id.is_empty());
                declared
                    .ssh
                    .entry(id.unwrap_or("default").to_owned())
                    .or_insert(info);
            }
            _ => {}
        }
        Ok(())
    }
}

/// `platform` as it is compared: without the variant that its architecture means anyway.
fn normal(platform: &Platform) -> Platform {
    Platform::parse(&platform.to_string()).unwrap_or_else(|_| platform.clone())
}

fn is_absolute(path: &str, platform: &Platform) -> bool {
    let windows = || {
        let path = match path.as_bytes() {
            [drive, b':', ..] if drive.is_ascii_alphabetic() => &path[2..],
            _ => path,
        };
        path.starts_with(['/', '\\'])
    };
    path.starts_with('/') || (platform.os == "windows" && windows())
}

/// Whether a source of `ADD` is not in the context.
fn is_remote(source: &str) -> bool {
    ["http://", "https://", "git://", "ssh://", "git@"]
        .iter()
        .any(|prefix| source.starts_with(prefix))
}

/// What Go's `filepath.Clean` does.
fn clean(path: &str) -> String {
    let is_rooted = path.starts_with('/');
    let mut names: Vec<&str> = Vec::new();
    for name in path.split('/') {
        match name {
            "" | "." => {}
            ".." if names.last().is_some_and(|last| *last != "..") => {
                names.pop();
            }
            ".." if is_rooted => {}
            name => names.push(name),
        }
    }
    let joined = names.join("/");
    match (is_rooted, joined.as_str()) {
        (true, _) => format!("/{joined}"),
        (false, "") => ".".to_owned(),
        _ => joined,
    }
}
