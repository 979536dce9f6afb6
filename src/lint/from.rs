//! Rules on `FROM`, and which stage needs which.

use std::collections::{BTreeMap, BTreeSet};

use super::rule::{
    FROM_PLATFORM_FLAG_CONST_DISALLOWED, INVALID_DEFAULT_ARG_IN_FROM, REDUNDANT_TARGET_PLATFORM,
    UNDEFINED_ARG_IN_FROM,
};
use super::stage::ArgInfo;
use super::{CheckError, Facts, Lines, Linter, Placed, Source, did_you_mean, quoted};
use crate::dockerfile::expand::{Environment, Expansion, Options as ExpandOptions, expand};
use crate::dockerfile::{
    self, Dockerfile, Instruction, InstructionKind, Word, comma_fields, parse_trigger,
};
use crate::image::{Platform, Reference};

/// What a stage starts from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Base {
    /// Nothing.
    Scratch,
    /// The stage with this index.
    Stage(usize),
    /// An image.
    Image(Reference),
    /// A named context.
    Context,
}

/// A stage, as far as `FROM` and its sources tell.
#[derive(Clone, Debug)]
pub struct Node {
    /// What it starts from.
    pub base: Base,
    /// The name of that as in messages, its variables expanded.
    pub base_name: String,
    /// Its platform.
    pub platform: Platform,
    /// Whether a named context stands in for the whole stage.
    pub is_replaced: bool,
    /// Instructions that what it starts from left for it (`ONBUILD`).
    pub triggers: Vec<Instruction>,
    /// The arguments that its `FROM` uses.
    pub used_args: BTreeSet<String>,
    /// The stages that its instructions read, in their order.
    pub sources: Vec<usize>,
    has_triggers: bool,
}

/// What is known of the stages.
pub(super) struct Graph<'a> {
    pub(super) dockerfile: &'a Dockerfile,
    pub(super) source: &'a Source,
    facts: &'a Facts<'a>,
    /// What global variables are worth.
    pub(super) args: Environment,
    /// Those that `ARG` before the first `FROM` declared.
    pub(super) declared: BTreeMap<String, ArgInfo>,
    pub(super) nodes: Vec<Node>,
}

impl<'a> Graph<'a> {
    /// Evaluates the global arguments.
    pub(super) fn new(
        linter: &mut Linter,
        dockerfile: &'a Dockerfile,
        source: &'a Source,
        facts: &'a Facts<'a>,
    ) -> Result<Self, CheckError> {
        let args = platform_args(dockerfile, facts);
        let defaults = global_args(dockerfile, source, &args, &BTreeMap::new());
        if let Ok((defaults, _)) = defaults {
            check_defaults(linter, dockerfile, source, &defaults);
        }
        let (args, declared) = global_args(dockerfile, source, &args, facts.build_args)?;
        Ok(Self {
            dockerfile,
            source,
            facts,
            args,
            declared,
            nodes: Vec::new(),
        })
    }

    /// Checks every `FROM` and learns what the stages start from.
    pub(super) fn stages(&mut self, linter: &mut Linter) -> Result<(), CheckError> {
        let mut names: BTreeMap<&str, usize> = BTreeMap::new();
        let dockerfile = self.dockerfile;
        for (index, stage) in dockerfile.stages.iter().enumerate() {
            let placed = &self.source.stages[index].0;
            let name = stage.name.as_ref().map_or("", |name| name.raw.as_str());
            let expanded = self.checked_word(linter, &stage.base, placed)?;
            if expanded.text.is_empty() {
                let message = format!("base name ({}) should not be blank", stage.base.raw);
                return Err(at(placed.lines, message));
            }
            let mut used_args = expanded.used;
            let platform = match &stage.platform {
                Some(word) => {
                    let expanded = self.checked_word(linter, word, placed)?;
                    let platform = self.platform(linter, word, &expanded, name, placed)?;
                    used_args.extend(expanded.used);
                    platform
                }
                None => self.facts.platform.clone(),
            };
            let base_name = expanded.text;
            let is_replaced = self.is_context(name);
            let base = if is_replaced {
                Base::Context
            } else if let Some(stage) = names.get(base_name.as_str()) {
                Base::Stage(*stage)
            } else if base_name == "scratch" {
                Base::Scratch
            } else if self.is_context(&base_name) {
                Base::Context
            } else {
                let reference = Reference::parse(&base_name);
                Base::Image(reference.map_err(|error| at(placed.lines, error.to_string()))?)
            };
            let platform = match &base {
                // Both are what they are, whatever the flag says.
                Base::Stage(stage) => self.nodes[*stage].platform.clone(),
                Base::Scratch => self.facts.platform.clone(),
                Base::Image(_) | Base::Context => platform,
            };
            self.nodes.push(Node {
                base,
                base_name,
                platform,
                is_replaced,
                triggers: Vec::new(),
                used_args: if is_replaced {
                    BTreeSet::new()
                } else {
                    used_args
                },
                sources: Vec::new(),
                has_triggers: false,
            });
            if !name.is_empty() {
                names.insert(name, index);
            }
        }
        for (index, stage) in dockerfile.stages.iter().enumerate() {
            let placed = self.source.stages[index].1.iter();
            for (instruction, placed) in stage.instructions.iter().zip(placed) {
                let sources = self.sources(instruction, placed.lines)?;
                self.nodes[index].sources.extend(sources);
            }
        }
        Ok(())
    }

    /// Whether a named context has this name.
    fn is_context(&self, name: &str) -> bool {
        !["", "scratch", "context"].contains(&name) && self.facts.contexts.contains(name)
    }

    /// Expands a word of `FROM` and checks its variables.
    fn checked_word(
        &self,
        linter: &mut Linter,
        word: &Word,
        placed: &Placed,
    ) -> Result<Expansion, CheckError> {
        let expanded = self.expand(&word.raw, &self.args, placed.lines)?;
        let options = linter.options_at(placed);
        for name in &expanded.unset {
            if self.declared.contains_key(name) {
                continue;
            }
            linter.add(&options, &UNDEFINED_ARG_IN_FROM, placed, || {
                let known = self.args.keys().chain(self.declared.keys());
                let hint = did_you_mean(name, known.map(String::as_str), "");
                format!("FROM argument '{name}' is not declared{hint}")
            });
        }
        Ok(expanded)
    }

    fn expand(
        &self,
        text: &str,
        environment: &Environment,
        lines: Lines,
    ) -> Result<Expansion, CheckError> {
        let escape = self.dockerfile.directives.escape;
        expand(text, escape, environment, ExpandOptions::default())
            .map_err(|error| at(lines, error.to_string()))
    }

    /// Reads and checks `--platform`.
    fn platform(
        &self,
        linter: &mut Linter,
        word: &Word,
        expanded: &Expansion,
        stage: &str,
        placed: &Placed,
    ) -> Result<Platform, CheckError> {
        let options = linter.options_at(placed);
        let text = &expanded.text;
        let is_target = expanded.unset.is_empty()
            && expanded.used.len() == 1
            && expanded.used.contains("TARGETPLATFORM")
            && self.args.get("TARGETPLATFORM") == Some(text);
        if is_target {
            linter.add(&options, &REDUNDANT_TARGET_PLATFORM, placed, || {
                format!(
                    "Setting platform to predefined {} in FROM is redundant as this is the default behavior",
                    word.raw
                )
            });
        }
        let platform = self.parse_platform(text);
        if expanded.used.is_empty()
            && expanded.unset.is_empty()
            && let Some(platform) = &platform
            && !stage.contains(&platform.os)
            && !stage.contains(&platform.architecture)
        {
            linter.add(
                &options,
                &FROM_PLATFORM_FLAG_CONST_DISALLOWED,
                placed,
                || {
                    let text = quoted(text);
                    format!("FROM --platform flag should not use constant value {text}")
                },
            );
        }
        platform.ok_or_else(|| {
            let hint = expanded
                .unset
                .iter()
                .next()
                .map_or_else(String::new, |name| {
                    did_you_mean(name, self.args.keys().map(String::as_str), "")
                });
            let message = if text.is_empty() {
                format!("empty platform value from expression {}{hint}", word.raw)
            } else {
                format!(
                    "failed to parse platform {}: {} is not OS/ARCHITECTURE[/VARIANT]{hint}",
                    word.raw,
                    quoted(text)
                )
            };
            at(placed.lines, message)
        })
    }

    /// A platform, of which one part may be missing.
    fn parse_platform(&self, text: &str) -> Option<Platform> {
        let host = self.facts.build_platform;
        let known_os = ["linux", "windows", "darwin", "freebsd"];
        let full = if text.contains('/') {
            text.to_owned()
        } else if known_os.contains(&text.to_ascii_lowercase().as_str()) {
            format!("{text}/{}", host.architecture)
        } else {
            format!("{}/{text}", host.os)
        };
        Platform::parse(&full).ok()
    }

    /// The stage that is wanted.
    pub(super) fn target(&self) -> Result<usize, CheckError> {
        let Some(target) = self.facts.target else {
            return Ok(self.nodes.len().saturating_sub(1));
        };
        self.stage_named(target).ok_or_else(|| {
            let names = self
                .dockerfile
                .stages
                .iter()
                .filter_map(|s| s.name.as_ref());
            let hint = did_you_mean(target, names.map(|name| name.raw.as_str()), "");
            CheckError::Options(format!(
                "target stage {} could not be found{hint}",
                quoted(target)
            ))
        })
    }

    /// The last stage of this name, in any case.
    fn stage_named(&self, name: &str) -> Option<usize> {
        let name = name.to_lowercase();
        let is_named =
            |stage: &dockerfile::Stage| stage.name.as_ref().is_some_and(|n| n.raw == name);
        self.dockerfile.stages.iter().rposition(is_named)
    }

    /// The stages that `instruction` reads.
    pub(super) fn sources(
        &self,
        instruction: &Instruction,
        lines: Lines,
    ) -> Result<Vec<usize>, CheckError> {
        match &instruction.kind {
            InstructionKind::Copy(copy) => {
                let Some(from) = &copy.from else {
                    return Ok(Vec::new());
                };
                if from.raw.contains('$') {
                    let message = "variable expansion is not supported for --from, define a new \
                                   stage with FROM using ARG from global scope as a workaround";
                    return Err(at(lines, message.to_owned()));
                }
                if let Ok(number) = from.raw.parse::<i64>() {
                    let index = usize::try_from(number)
                        .ok()
                        .filter(|i| *i < self.nodes.len());
                    let index =
                        index.ok_or_else(|| at(lines, format!("invalid stage index {number}")))?;
                    return Ok(vec![index]);
                }
                Ok(self.stage_named(&from.raw).into_iter().collect())
            }
            InstructionKind::Run(run) => {
                let fields = run.mounts.iter().flat_map(|mount| mount_fields(&mount.raw));
                let from = fields.filter(|(name, _)| name == "from");
                Ok(from
                    .filter_map(|(_, value)| self.stage_named(&value.unwrap_or_default()))
                    .collect())
            }
            _ => Ok(Vec::new()),
        }
    }

    /// Which stages are looked at. Those that the target needs get their triggers, which
    /// may need further ones.
    pub(super) fn resolve(&mut self, target: usize) -> Result<Vec<bool>, CheckError> {
        loop {
            let reachable = self.reachable(target);
            let mut is_done = true;
            for (index, is_reachable) in reachable.iter().enumerate() {
                if *is_reachable && !std::mem::replace(&mut self.nodes[index].has_triggers, true) {
                    is_done &= self.add_triggers(index)?.is_empty();
                }
            }
            if !is_done {
                continue;
            }
            return Ok(if self.facts.all_stages {
                vec![true; self.nodes.len()]
            } else {
                let replaced = self.nodes.iter().map(|node| node.is_replaced);
                let wanted = reachable.iter().zip(replaced);
                wanted
                    .map(|(wanted, replaced)| *wanted && !replaced)
                    .collect()
            });
        }
    }

    fn reachable(&self, target: usize) -> Vec<bool> {
        let mut reachable = vec![false; self.nodes.len()];
        let mut pending = vec![target];
        while let Some(index) = pending.pop() {
            let Some(known) = reachable.get_mut(index) else {
                continue;
            };
            if std::mem::replace(known, true) {
                continue;
            }
            let node = &self.nodes[index];
            pending.extend(&node.sources);
            if let Base::Stage(base) = node.base {
                pending.push(base);
            }
        }
        reachable
    }

    /// Gives a stage its triggers; returns the stages that they read.
    fn add_triggers(&mut self, index: usize) -> Result<Vec<usize>, CheckError> {
        let lines = self.source.stages[index].0.lines;
        let mut expressions: Vec<String> = Vec::new();
        match self.nodes[index].base {
            Base::Stage(base) => {
                let instructions = &self.dockerfile.stages[base].instructions;
                expressions.extend(instructions.iter().filter_map(|i| match &i.kind {
                    InstructionKind::Onbuild { expression, .. } => Some(expression.clone()),
                    _ => None,
                }));
            }
            Base::Image(_) | Base::Context => {
                let config = self.facts.images.get(&index);
                expressions.extend(
                    config
                        .and_then(|c| c.config.on_build.clone())
                        .unwrap_or_default(),
                );
            }
            Base::Scratch => {}
        }
        let mut sources = Vec::new();
        for expression in &expressions {
            let trigger = parse_trigger(expression).map_err(|error| {
                let messages: Vec<&str> =
                    error.problems.iter().map(|p| p.message.as_str()).collect();
                let shown = quoted(expression);
                at(
                    lines,
                    format!("ONBUILD {shown} of the base: {}", messages.join("; ")),
                )
            })?;
            sources.extend(self.sources(&trigger, lines)?);
            self.nodes[index].triggers.push(trigger);
        }
        self.nodes[index].sources.extend(&sources);
        Ok(sources)
    }
}

/// An error of an instruction.
pub(super) fn at(lines: Lines, message: String) -> CheckError {
    CheckError::Dockerfile { message, lines }
}

/// The fields of a `--mount` with their names in lower case; none if they cannot be read,
/// which the parser of mounts says.
pub(super) fn mount_fields(mount: &str) -> Vec<(String, Option<String>)> {
    let fields = comma_fields(mount).unwrap_or_default().into_iter();
    fields
        .map(|field| match field.split_once('=') {
            Some((name, value)) => (name.to_ascii_lowercase(), Some(value.to_owned())),
            None => (field.to_ascii_lowercase(), None),
        })
        .collect()
}

/// The variables that describe platforms and target.
///
/// <https://docs.docker.com/reference/dockerfile/#automatic-platform-args-in-the-global-scope>
fn platform_args(dockerfile: &Dockerfile, facts: &Facts<'_>) -> Environment {
    let last = dockerfile
        .stages
        .last()
        .and_then(|stage| stage.name.as_ref());
    let stage = facts.target.or_else(|| last.map(|name| name.raw.as_str()));
    let mut args = Environment::new();
    for (prefix, platform) in [("BUILD", facts.build_platform), ("TARGET", facts.platform)] {
        for (suffix, value) in [
            ("PLATFORM", platform.to_string()),
            ("OS", platform.os.clone()),
            ("OSVERSION", platform.os_version.clone().unwrap_or_default()),
            ("ARCH", platform.architecture.clone()),
            ("VARIANT", platform.variant.clone().unwrap_or_default()),
        ] {
            args.insert(format!("{prefix}{suffix}"), value);
        }
    }
    args.insert(
        "TARGETSTAGE".to_owned(),
        stage.unwrap_or("default").to_owned(),
    );
    for (name, value) in &mut args {
        if let Some(given) = facts.build_args.get(name) {
            value.clone_from(given);
        }
    }
    args
}

type GlobalArgs = (Environment, BTreeMap<String, ArgInfo>);

/// Evaluates the arguments before the first `FROM` with `given` for their values.
fn global_args(
    dockerfile: &Dockerfile,
    source: &Source,
    predefined: &Environment,
    given: &BTreeMap<String, String>,
) -> Result<GlobalArgs, CheckError> {
    let mut args = predefined.clone();
    let mut declared: BTreeMap<String, ArgInfo> = BTreeMap::new();
    let mut budget = super::stage::Budget::default();
    for (instruction, placed) in dockerfile.global_args.iter().zip(&source.global_args) {
        let InstructionKind::Arg(declarations) = &instruction.kind else {
            continue;
        };
        for declaration in declarations {
            let name = &declaration.name.raw;
            let mut info = ArgInfo {
                value: String::new(),
                description: placed.description(name).to_owned(),
                lines: placed.lines,
                needs: BTreeSet::new(),
            };
            let value = match (given.get(name), &declaration.default) {
                (Some(given), _) => Some(given.clone()),
                (None, Some(default)) => {
                    let escape = dockerfile.directives.escape;
                    let expanded = expand(&default.raw, escape, &args, ExpandOptions::default())
                        .map_err(|error| at(placed.lines, error.to_string()))?;
                    info.needs = expanded.used;
                    if info.needs.remove(name)
                        && let Some(earlier) = declared.get(name)
                    {
                        info.needs.extend(earlier.needs.iter().cloned());
                    }
                    Some(expanded.text)
                }
                (None, None) => None,
            };
            if let Some(value) = value {
                budget.spend(value.len())?;
                args.insert(name.clone(), value.clone());
                info.value = value;
            }
            declared.insert(name.clone(), info);
        }
    }
    Ok((args, declared))
}

/// Checks that every base has a name where no argument is given.
fn check_defaults(
    linter: &mut Linter,
    dockerfile: &Dockerfile,
    source: &Source,
    defaults: &Environment,
) {
    let escape = dockerfile.directives.escape;
    for (stage, (placed, _)) in dockerfile.stages.iter().zip(&source.stages) {
        let raw = &stage.base.raw;
        let Ok(expanded) = expand(raw, escape, defaults, ExpandOptions::default()) else {
            return;
        };
        if Reference::parse(&expanded.text).is_err() {
            linter.add_always(&INVALID_DEFAULT_ARG_IN_FROM, placed, || {
                format!("Default value for ARG {raw} results in empty or invalid base image name")
            });
        }
    }
}
