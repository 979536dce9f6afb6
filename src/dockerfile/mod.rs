//! Dockerfile text → typed instructions. No I/O; variables stay unexpanded.
//!
//! Follows BuildKit's parser, which is the language's definition where its reference
//! <https://docs.docker.com/reference/dockerfile/> is silent. On purpose it differs in this:
//! - Everything that is wrong is reported at once, each with its place.
//! - The text must be UTF-8, also in flags, which BuildKit takes for Latin-1.
//! - `ONBUILD` triggers are checked when they are written, not only when they are executed.
//!
//! ```text
//! bytes ─ lines ─▶ logical lines ─ heredoc ─▶ + contents ─ split ─▶ name, flags, arguments
//!       ─ statement ─▶ Instruction            (directive: what `# escape=` says before that)
//! ```
//!
//! What needs variables, other stages or the build context is checked by the planner:
//! mounts beyond their syntax, ports, signals, modes, owners, references, `COPY --from`.

mod csv;
mod directive;
mod duration;
mod error;
pub mod expand;
mod heredoc;
mod instruction;
mod json;
mod lines;
mod pattern;
mod split;
mod statement;
mod suggest;

pub use csv::comma_fields;
pub use error::{DockerfileError, Problem, line_column, place};
pub use instruction::{
    ArgDeclaration, CommandLine, Copy, Directives, Dockerfile, Healthcheck, Heredoc, Instruction,
    InstructionKind, KeyValue, Run, Span, Stage, Word,
};

use lines::Reader;
use statement::Statement;

/// Larger Dockerfiles are refused. Real ones have kilobytes; parsed, a hostile one takes
/// up to a hundred times its size.
pub const MAX_DOCKERFILE_BYTES: usize = 1 << 20;

/// Longer physical lines are refused, as BuildKit does. The line end does not count.
pub const MAX_LINE_BYTES: usize = 65_535;

/// Further problems are counted, not listed.
pub const MAX_PROBLEMS: usize = 100;

/// Parses a Dockerfile. `name` is for messages.
///
/// A byte order mark is dropped: spans count from after it.
///
/// # Errors
/// [`DockerfileError`] with every independent problem found.
pub fn parse(name: &str, text: &[u8]) -> Result<Dockerfile, DockerfileError> {
    let text = decode(name, text)?;
    let mut problems = long_lines(text);
    let directives = directive::parse(text, &mut problems);
    let mut global_args = Vec::new();
    let mut stages: Vec<Stage> = Vec::new();
    let mut seen_from = false;
    let mut told_from = false;
    each_statement(
        text,
        directives.escape,
        &mut problems,
        |line, statement, problems| {
            let known = statement::known_name(line, directives.escape);
            seen_from |= known == Some("FROM");
            match (known, statement) {
                (Some(name), _) if !seen_from && name != "ARG" && !told_from => {
                    told_from = true;
                    problems.push(
                        Problem::new(
                            line.span,
                            format!("{name} before the first FROM: there is no stage yet"),
                        )
                        .with_hint("only ARG may precede FROM"),
                    );
                }
                (_, Some(Statement::From(stage))) => stages.push(stage),
                (_, Some(Statement::Other(instruction))) => match stages.last_mut() {
                    Some(stage) => stage.instructions.push(instruction),
                    None => global_args.push(instruction),
                },
                (_, None) => {}
            }
        },
    );
    if !seen_from && problems.is_empty() {
        let (what, span) = match global_args.last() {
            _ if text.is_empty() => ("is empty", Span::default()),
            None => ("has no instructions", Span::default()),
            Some(argument) => ("has no stages", argument.span),
        };
        let message = format!("the Dockerfile {what}: it must have a FROM");
        problems.push(Problem::new(span, message));
    }
    finish(name, text, problems)?;
    Ok(Dockerfile {
        name: name.to_owned(),
        text: text.to_owned(),
        directives,
        global_args,
        stages,
    })
}

/// Parses one `ONBUILD` trigger, as an image config keeps it: the instruction and, on
/// further lines, its here-documents.
///
/// # Errors
/// [`DockerfileError`] whose spans refer to `expression`.
pub fn parse_trigger(expression: &str) -> Result<Instruction, DockerfileError> {
    let name = "ONBUILD trigger";
    let text = decode(name, expression.as_bytes())?;
    let mut problems = long_lines(text);
    let escape = directive::parse(text, &mut problems).escape;
    let mut instructions = Vec::new();
    let mut count = 0;
    each_statement(text, escape, &mut problems, |line, statement, problems| {
        count += 1;
        if count == 2 {
            problems.push(Problem::new(
                line.span,
                "an ONBUILD trigger must be a single instruction",
            ));
        }
        match statement {
            Some(Statement::Other(instruction)) => instructions.push(instruction),
            Some(Statement::From(_)) => problems.push(Problem::new(
                line.span,
                "FROM is not allowed as an ONBUILD trigger",
            )),
            None => {}
        }
    });
    if count == 0 {
        problems.push(Problem::new(
            Span::default(),
            "an ONBUILD trigger must be a single instruction, this one has none",
        ));
    }
    finish(name, text, problems)?;
    instructions.pop().ok_or_else(|| {
        let problem = Problem::new(Span::default(), "this ONBUILD trigger has no instruction");
        failure(name, text, vec![problem])
    })
}

/// Reads `text` statement by statement. A statement is absent if it has problems.
fn each_statement(
    text: &str,
    escape: char,
    problems: &mut Vec<Problem>,
    mut take: impl FnMut(&lines::Line, Option<Statement>, &mut Vec<Problem>),
) {
    let mut reader = Reader::new(text, escape);
    while let Some(line) = reader.logical() {
        let heredocs = if statement::may_have_heredocs(&line, escape) {
            heredoc::read(&line, &mut reader, problems)
        } else {
            Vec::new()
        };
        let span = Span {
            start: line.span.start,
            end: line.span.end.max(reader.end_of_last()),
        };
        let statement = statement::parse(&line, heredocs, span, escape, problems);
        take(&line, statement, problems);
    }
}

/// The text without its byte order mark.
fn decode<'t>(name: &str, bytes: &'t [u8]) -> Result<&'t str, DockerfileError> {
    if bytes.len() > MAX_DOCKERFILE_BYTES {
        let message = format!(
            "the file has {} bytes, more than the {MAX_DOCKERFILE_BYTES} allowed",
            bytes.len()
        );
        return Err(failure(
            name,
            "",
            vec![Problem::new(Span::default(), message)],
        ));
    }
    match str::from_utf8(bytes) {
        Ok(text) => Ok(text.strip_prefix('\u{feff}').unwrap_or(text)),
        Err(error) => {
            let at = error.valid_up_to();
            let span = Span {
                start: at,
                end: at + char::REPLACEMENT_CHARACTER.len_utf8(),
            };
            let byte = bytes.get(at).copied().unwrap_or_default();
            let mut problem = Problem::new(
                span,
                format!("byte {at} of the file, 0x{byte:02x}, is not UTF-8 text"),
            );
            if bytes.starts_with(&[0xff, 0xfe]) || bytes.starts_with(&[0xfe, 0xff]) {
                problem = problem.with_hint("the file looks like UTF-16: save it as UTF-8");
            }
            Err(failure(
                name,
                &String::from_utf8_lossy(bytes),
                vec![problem],
            ))
        }
    }
}

/// Problems for lines above [`MAX_LINE_BYTES`].
fn long_lines(text: &str) -> Vec<Problem> {
    let mut problems = Vec::new();
    let mut start = 0;
    for line in text.split('\n') {
        if line.len() > MAX_LINE_BYTES {
            let span = Span {
                start,
                end: start + line.len(),
            };
            problems.push(Problem::new(
                span,
                format!(
                    "the line has {} bytes, more than the {MAX_LINE_BYTES} allowed",
                    line.len()
                ),
            ));
        }
        start += line.len() + 1;
    }
    problems
}

/// An error if there are problems.
fn finish(name: &str, text: &str, problems: Vec<Problem>) -> Result<(), DockerfileError> {
    if problems.is_empty() {
        return Ok(());
    }
    Err(failure(name, text, problems))
}

fn failure(name: &str, text: &str, mut problems: Vec<Problem>) -> DockerfileError {
    problems.sort_by_key(|problem| problem.span.start);
    if problems.len() > MAX_PROBLEMS {
        let more = problems.len() - MAX_PROBLEMS;
        problems.truncate(MAX_PROBLEMS);
        if let Some(last) = problems.last_mut() {
            last.hint = Some(format!("{more} more problems follow"));
        }
    }
    DockerfileError {
        name: name.to_owned(),
        text: text.to_owned(),
        problems,
    }
}
