//! Checks: what in a Dockerfile is surely not meant, though it can be built. No I/O.
//!
//! The rules, their texts and where they point are BuildKit's, so that who reads
//! <https://docs.docker.com/reference/build-checks/> finds the same here.
//!
//! ```text
//! Dockerfile ─ text ─▶ rules that need nothing else: casing, names, comments
//!            ─ from ─▶ rules on FROM; which stage starts from what
//!            ─ stage ─▶ rules that need values: variables, paths, ports
//! ```
//!
//! [`bases`] says which images' configs the last part needs; without them it says nothing
//! of variables. [`walk`] gives what the checks find and, for [`crate::call`], what the
//! stages declare.

mod from;
mod options;
mod rule;
mod source;
mod stage;
#[cfg(test)]
mod tests;
mod text;

use std::collections::{BTreeMap, BTreeSet};

use crate::dockerfile::{self, Dockerfile, DockerfileError, Problem, Span, line_column};
use crate::image::{ImageConfig, Platform, Reference};

pub use from::{Base, Node};
pub use options::CHECK_ARG;
pub use rule::{RULES, Rule};
pub use source::{Lines, Placed, Source};
pub use stage::{ArgInfo, Declared, MountInfo};

use options::Options;

/// Checks stop after so many violations.
pub const MAX_VIOLATIONS: usize = 1000;

/// The most bytes that all variables' values together may take while a file is checked.
pub const MAX_VALUE_BYTES: usize = 64 << 20;

/// What the checks know beside the Dockerfile.
#[derive(Clone, Copy)]
pub struct Facts<'a> {
    /// `--build-arg`.
    pub build_args: &'a BTreeMap<String, String>,
    /// `--target`; absent: the last stage.
    pub target: Option<&'a str>,
    /// Whether stages that the target does not need are checked as well.
    pub all_stages: bool,
    /// What the image is for.
    pub platform: &'a Platform,
    /// What this machine is.
    pub build_platform: &'a Platform,
    /// Names of additional contexts, which stand in for stages and images.
    pub contexts: &'a BTreeSet<String>,
    /// Configs of base images, by the index of the stage that starts from them.
    pub images: &'a BTreeMap<usize, ImageConfig>,
    /// Whether a path of the context is left out; absent where no path is for certain:
    /// without rules, or with exceptions from them.
    pub ignored: Option<&'a dyn Fn(&str) -> bool>,
}

impl std::fmt::Debug for Facts<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Facts")
            .field("target", &self.target)
            .field("all_stages", &self.all_stages)
            .finish_non_exhaustive()
    }
}

/// Something that a rule does not want.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// The rule.
    pub rule: &'static Rule,
    /// What is wrong here.
    pub detail: String,
    /// Where.
    pub lines: Lines,
    /// The column in the first line, from 1.
    pub column: usize,
}

/// Why a Dockerfile cannot be checked to its end: what would end a build, too.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CheckError {
    /// The options for checks.
    #[error("{0}")]
    Options(String),
    /// Something that is wrong with the Dockerfile.
    #[error("{message}")]
    Dockerfile {
        /// What.
        message: String,
        /// Where.
        lines: Lines,
    },
    /// There is too much to check.
    #[error("checking stopped: {0}")]
    Limit(String),
}

impl CheckError {
    /// Where it points.
    pub fn lines(&self) -> Option<Lines> {
        match self {
            Self::Dockerfile { lines, .. } => Some(*lines),
            Self::Options(_) | Self::Limit(_) => None,
        }
    }

    /// As an error of the file `name` with `text`, where it points at lines of it.
    pub fn in_dockerfile(&self, name: &str, text: &str) -> Option<DockerfileError> {
        let line = self.lines()?.first.checked_sub(1)?;
        let before: usize = text.split_inclusive('\n').take(line).map(str::len).sum();
        let whole = text.split_inclusive('\n').nth(line).unwrap_or_default();
        let span = Span {
            start: before + (whole.len() - whole.trim_start().len()),
            end: before + whole.trim_end().len(),
        };
        Some(DockerfileError {
            name: name.to_owned(),
            text: text.to_owned(),
            problems: vec![Problem::new(span, self.to_string())],
        })
    }

    /// The first problem of `error`.
    pub fn of_dockerfile(error: &DockerfileError) -> Self {
        let problem = error.problems.first();
        Self::Dockerfile {
            message: problem.map_or_else(String::new, |problem| problem.message.clone()),
            lines: problem.map_or_else(Lines::default, |p| lines_of(&error.text, p.span)),
        }
    }
}

/// The lines of `span` in `text`.
fn lines_of(text: &str, span: Span) -> Lines {
    let (first, _) = line_column(text, span.start);
    let (last, _) = line_column(text, span.end.saturating_sub(1).max(span.start));
    Lines { first, last }
}

/// What the checks found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// In the order in which they were found.
    pub violations: Vec<Violation>,
    /// Whether the options say that a violation ends a build (`error=true`).
    pub error_on_violation: bool,
    /// Why there may be more.
    pub error: Option<CheckError>,
}

/// Violations where the options say that there must be none.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("lint violation found for rules: {}", .0.join(", "))]
pub struct LintError(pub Vec<&'static str>);

impl Report {
    /// What ends a build: violations, where the options say so.
    pub fn lint_error(&self) -> Option<LintError> {
        let rules: BTreeSet<&str> = self.violations.iter().map(|v| v.rule.name).collect();
        (self.error_on_violation && !rules.is_empty())
            .then(|| LintError(rules.into_iter().collect()))
    }

    /// `Dockerfile:3:1: Rule: what is wrong` for each violation of the file `name`, each once.
    pub fn warnings(&self, name: &str) -> Vec<String> {
        let mut seen = BTreeSet::new();
        self.violations
            .iter()
            .map(|v| {
                let (line, column) = (v.lines.first, v.column);
                format!("{name}:{line}:{column}: {}: {}", v.rule.name, v.detail)
            })
            .filter(|warning| seen.insert(warning.clone()))
            .collect()
    }
}

/// An image whose config [`Facts::images`] should have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BaseNeed {
    /// The stage that starts from it, as an index into [`Dockerfile::stages`].
    pub stage: usize,
    /// Its name.
    pub reference: Reference,
    /// The platform wanted.
    pub platform: Platform,
    /// Where it is named.
    pub lines: Lines,
}

/// Everything that checking gives.
#[derive(Debug)]
pub struct Walked {
    /// What the checks found.
    pub report: Report,
    /// The stages, as far as `FROM` says, in the order of the file.
    pub nodes: Vec<Node>,
    /// What each stage declares; nothing where it was not looked at.
    pub declared: Vec<Declared>,
    /// The arguments before the first `FROM`.
    pub global_args: BTreeMap<String, ArgInfo>,
    /// The wanted stage.
    pub target: usize,
}

/// Checks `dockerfile`.
pub fn check(dockerfile: &Dockerfile, facts: &Facts<'_>) -> Report {
    walk(dockerfile, facts).report
}

/// Checks `dockerfile` and keeps what was learnt on the way.
pub fn walk(dockerfile: &Dockerfile, facts: &Facts<'_>) -> Walked {
    let mut walked = Walked {
        report: Report::default(),
        nodes: Vec::new(),
        declared: Vec::new(),
        global_args: BTreeMap::new(),
        target: 0,
    };
    let mut linter = match options(dockerfile, facts) {
        Ok(options) => Linter::new(options),
        Err(error) => {
            walked.report.error = Some(error);
            return walked;
        }
    };
    let source = Source::of(dockerfile);
    let result = walk_into(&mut walked, &mut linter, dockerfile, &source, facts);
    walked.report = linter.report(result.err());
    walked
}

/// Checks what needs no base image, where one cannot be had.
pub fn check_without_bases(dockerfile: &Dockerfile, facts: &Facts<'_>) -> Report {
    let mut linter = match options(dockerfile, facts) {
        Ok(options) => Linter::new(options),
        Err(error) => {
            return Report {
                error: Some(error),
                ..Report::default()
            };
        }
    };
    let source = Source::of(dockerfile);
    text::check(&mut linter, dockerfile, &source);
    text::check_whole(&mut linter, dockerfile, &source);
    let result = from::Graph::new(&mut linter, dockerfile, &source, facts)
        .and_then(|mut graph| graph.stages(&mut linter));
    linter.report(result.err())
}

fn walk_into(
    walked: &mut Walked,
    linter: &mut Linter,
    dockerfile: &Dockerfile,
    source: &Source,
    facts: &Facts<'_>,
) -> Result<(), CheckError> {
    text::check(linter, dockerfile, source);
    text::check_whole(linter, dockerfile, source);
    let mut graph = from::Graph::new(linter, dockerfile, source, facts)?;
    graph.stages(linter)?;
    walked.target = graph.target()?;
    walked.global_args.clone_from(&graph.declared);
    let wanted = graph.resolve(walked.target)?;
    let mut stages = stage::Stages::new(linter, &graph, facts);
    let result = stages.run(&wanted);
    walked.declared = stages.finish();
    walked.nodes = graph.nodes;
    result
}

/// The images whose configs the checks need: those that a stage starts from which is checked.
///
/// # Errors
/// [`CheckError`] for what makes it impossible to know; [`check`] reports the same.
pub fn bases(dockerfile: &Dockerfile, facts: &Facts<'_>) -> Result<Vec<BaseNeed>, CheckError> {
    let mut linter = Linter::new(options(dockerfile, facts)?);
    let source = Source::of(dockerfile);
    let mut graph = from::Graph::new(&mut linter, dockerfile, &source, facts)?;
    graph.stages(&mut linter)?;
    let target = graph.target()?;
    let wanted = graph.resolve(target)?;
    let needs = graph.nodes.iter().enumerate().zip(&wanted);
    Ok(needs
        .filter(|(_, wanted)| **wanted)
        .filter_map(|((stage, node), _)| match &node.base {
            Base::Image(reference) => Some(BaseNeed {
                stage,
                reference: reference.clone(),
                platform: node.platform.clone(),
                lines: source.stages[stage].0.lines,
            }),
            _ => None,
        })
        .collect())
}

/// Checks what stands before the first problem of a text that is no Dockerfile.
pub fn check_broken(error: &DockerfileError, facts: &Facts<'_>) -> Report {
    let mut report = Report {
        error: Some(CheckError::of_dockerfile(error)),
        ..Report::default()
    };
    let Some(problem) = error.problems.first() else {
        return report;
    };
    // Cutting off one line after the other finds the instruction that the problem is in.
    let mut end = problem.span.start.min(error.text.len());
    for _ in 0..MAX_CUTS {
        while !error.text.is_char_boundary(end) {
            end -= 1;
        }
        end = error.text[..end].rfind('\n').map_or(0, |at| at);
        let Ok(before) = dockerfile::parse(&error.name, &error.text.as_bytes()[..end]) else {
            if end == 0 {
                break;
            }
            continue;
        };
        if let Ok(options) = options(&before, facts) {
            let mut linter = Linter::new(options);
            text::check(&mut linter, &before, &Source::of(&before));
            return linter.report(report.error);
        }
        break;
    }
    report.violations.clear();
    report
}

/// How many lines before a problem its instruction may begin.
const MAX_CUTS: usize = 100;

/// The options for a whole build: those of the build argument, else the directive's.
fn options(dockerfile: &Dockerfile, facts: &Facts<'_>) -> Result<Options, CheckError> {
    if let Some(value) = facts.build_args.get(CHECK_ARG) {
        return Options::parse(value)
            .map_err(|error| CheckError::Options(format!("failed to parse {CHECK_ARG}: {error}")));
    }
    let Some(directive) = &dockerfile.directives.check else {
        return Ok(Options::default());
    };
    Options::of_directive(&directive.raw)
        .map_err(|error| CheckError::Options(format!("failed to parse check options: {error}")))
}

/// Takes violations.
#[derive(Debug)]
struct Linter {
    options: Options,
    violations: Vec<Violation>,
    is_full: bool,
}

impl Linter {
    fn new(options: Options) -> Self {
        Self {
            options,
            violations: Vec::new(),
            is_full: false,
        }
    }

    /// The options for the instruction at `placed`.
    fn options_at(&self, placed: &Placed) -> Options {
        self.options.with_comments(&placed.comments)
    }

    /// Takes a violation at `placed` if the rule applies there.
    fn add(
        &mut self,
        options: &Options,
        rule: &'static Rule,
        placed: &Placed,
        detail: impl FnOnce() -> String,
    ) {
        if !options.applies(rule) {
            return;
        }
        if self.violations.len() == MAX_VIOLATIONS {
            self.is_full = true;
            return;
        }
        self.violations.push(Violation {
            rule,
            detail: detail(),
            lines: placed.lines,
            column: placed.column,
        });
    }

    /// As [`Self::add`], whatever comments stand above.
    fn add_always(
        &mut self,
        rule: &'static Rule,
        placed: &Placed,
        detail: impl FnOnce() -> String,
    ) {
        let options = self.options.clone();
        self.add(&options, rule, placed, detail);
    }

    fn report(self, error: Option<CheckError>) -> Report {
        let full = || {
            CheckError::Limit(format!(
                "there are more than {MAX_VIOLATIONS} violations; the rest is not listed"
            ))
        };
        Report {
            error_on_violation: self.options.error,
            error: error.or_else(|| self.is_full.then(full)),
            violations: self.violations,
        }
    }
}

/// What separates words inside an instruction.
fn is_blank(c: char) -> bool {
    matches!(c, '\t' | '\x0b' | '\x0c' | '\r' | ' ')
}

/// An instruction's name as written; `original` is its text.
fn written_name(original: &str) -> &str {
    original.split(is_blank).next().unwrap_or_default()
}

/// `text` as Go's `%q` writes it, for printable text.
fn quoted(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 2);
    out.push('"');
    for c in text.chars() {
        match c {
            '"' | '\\' => out.extend(['\\', c]),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if c.is_control() => out.extend(c.escape_unicode()),
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

/// ` (did you mean $NAME?)`, or nothing; `options` in the order of preference.
fn did_you_mean<'o>(name: &str, options: impl Iterator<Item = &'o str>, prefix: &str) -> String {
    let length = name.chars().count();
    let near: Vec<&str> = options
        .filter(|option| option.chars().count().abs_diff(length) <= 2)
        .collect();
    dockerfile::nearest(name, &near).map_or_else(String::new, |near| {
        format!(" (did you mean {prefix}{near}?)")
    })
}
