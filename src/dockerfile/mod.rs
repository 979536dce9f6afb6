//! Dockerfile text → typed instructions. No I/O; variables stay unexpanded.
//!
//! Follows BuildKit's parser, which is the language's definition where its reference
//! <https://docs.docker.com/reference/dockerfile/> is silent. On purpose it differs in this:
//! - Everything that is wrong is reported at once, each with its place.
//! - The text must be UTF-8, also in flags, which BuildKit takes for Latin-1.
//! - `ONBUILD` triggers are checked when they are written, not only when they are executed.
//! - Where a text is split into words (`EXPOSE`, the search for here-documents), what stands
//!   before a substitution with an operand stays: `EXPOSE 80${UNSET:-80}` is port 8080, while
//!   BuildKit forgets the first half.
//! - Expansions and their patterns have limits, see [`expand`].
//!
//! ```text
//! bytes ─ lines ─▶ logical lines ─ heredoc ─▶ + contents ─ split ─▶ name, flags, arguments
//!       ─ statement ─▶ Instruction            (directive: what `# escape=` says before that)
//! ```
//!
//! What needs variables, other stages or the build context is checked by the planner:
//! mounts beyond their syntax, ports, signals, modes, owners, references, `COPY --from`.

mod check;
mod csv;
mod directive;
mod duration;
mod error;
pub mod expand;
mod healthcheck;
mod heredoc;
mod ignored;
mod instruction;
mod json;
mod lines;
mod mount;
mod pattern;
mod print;
mod run;
mod split;
mod statement;
mod suggest;

pub use check::{Check, CheckError, CheckFault, parse_check};
pub use csv::{CommaError, comma_fields};
pub use error::{DockerfileError, Problem, line_column, place};
pub use instruction::{
    ArgDeclaration, CommandLine, Copy, Directives, Dockerfile, Healthcheck, Heredoc, Instruction,
    InstructionKind, KeyValue, Run, Span, Stage, Word,
};

pub use mount::{
    Mount, MountError, MountFault, MountKind, Sharing, check_mount, parse_bool, parse_mount,
    parse_size,
};
pub(crate) use suggest::nearest;

use lines::Reader;
use statement::Statement;

/// Larger Dockerfiles are refused. Real ones have kilobytes; parsed, a hostile one takes
/// up to two hundred times its size.
pub const MAX_DOCKERFILE_BYTES: usize = 1 << 20;

/// Longer physical lines are refused, as BuildKit does. The line end does not count.
pub const MAX_LINE_BYTES: usize = 65_535;

/// Reading stops at the first statement after so many problems.
pub const MAX_PROBLEMS: usize = 100;

/// More here-documents in one instruction are refused: `COPY <<A <<A` has one content twice.
pub const MAX_HEREDOCS: usize = 64;

/// Parses a Dockerfile. `name` is for messages.
///
/// A byte order mark is dropped: spans count from after it.
///
/// # Errors
/// [`DockerfileError`] with every independent problem found.
pub fn parse(name: &str, text: &[u8]) -> Result<Dockerfile, DockerfileError> {
    let text = decode(name, text)?;
    if let Some(front_end) = directive::other_front_end(text) {
        let message = format!(
            "this is no Dockerfile: it asks for the front end {}",
            error::quoted(&front_end.raw)
        );
        let problem = Problem::new(front_end.span, message)
            .with_hint("front ends are never fetched or executed; only Dockerfiles are built");
        return Err(failure(name, text, vec![problem]));
    }
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
    let none = Problem::new(
        Span::default(),
        "an ONBUILD trigger must be a single instruction, this one has none",
    );
    finish(name, text, problems)?;
    instructions
        .pop()
        .ok_or_else(|| failure(name, text, vec![none]))
}

/// Reads `text` statement by statement. A statement is absent if it has problems.
fn each_statement(
    text: &str,
    escape: char,
    problems: &mut Vec<Problem>,
    mut take: impl FnMut(&lines::Line, Option<Statement>, &mut Vec<Problem>),
) {
    let mut reader = Reader::new(text, escape);
    while problems.len() <= MAX_PROBLEMS
        && let Some(line) = reader.logical()
    {
        let heredocs = if statement::may_have_heredocs(&line, escape) {
            heredoc::read(&line, &mut reader, problems)
        } else {
            Vec::new()
        };
        let span = Span {
            start: line.span.start,
            end: line.span.end.max(reader.end_of_last()),
        };
        let statement = statement::parse(text, &line, heredocs, span, escape, problems);
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
        problems.truncate(MAX_PROBLEMS);
        if let Some(last) = problems.last_mut() {
            last.hint = Some("there are more problems, which are not listed".to_owned());
        }
    }
    DockerfileError {
        name: name.to_owned(),
        text: text.to_owned(),
        problems,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn messages(text: &str) -> Vec<String> {
        match parse("Dockerfile", text.as_bytes()) {
            Ok(_) => Vec::new(),
            Err(error) => error.problems.into_iter().map(|p| p.message).collect(),
        }
    }

    #[test]
    fn instructions_go_to_their_stages() {
        let file = parse("x", b"ARG A\nARG B=1\nFROM a\nRUN x\nARG C\nFROM b AS c\n").unwrap();
        assert_eq!((file.name.as_str(), file.global_args.len()), ("x", 2));
        let stages: Vec<_> = (file.stages.iter())
            .map(|stage| (stage.base.raw.as_str(), stage.instructions.len()))
            .collect();
        assert_eq!(stages, [("a", 2), ("b", 0)]);
    }

    #[test]
    fn a_byte_order_mark_does_not_count() {
        let file = parse("x", b"\xef\xbb\xbfFROM a\n").unwrap();
        assert_eq!(file.text, "FROM a\n");
        assert_eq!(file.stages[0].base.span, Span { start: 5, end: 6 });
    }

    #[test]
    fn limits_hold() {
        let line = |length: usize| format!("FROM a\nRUN {}\n", "x".repeat(length - 4));
        assert_eq!(messages(&line(65_535)), [""; 0]);
        assert_eq!(
            messages(&line(65_536)),
            ["the line has 65536 bytes, more than the 65535 allowed"]
        );
        let comments = "#\n".repeat(MAX_DOCKERFILE_BYTES / 2 - 4) + "FROM a\n#";
        assert_eq!(messages(&comments), [""; 0]);
        assert_eq!(
            messages(&(comments + "#")),
            ["the file has 1048577 bytes, more than the 1048576 allowed"]
        );
        let heredocs = |count: usize| {
            let sources = "<<A ".repeat(count);
            format!("FROM a\nCOPY {sources}/x\n{}", "A\n".repeat(count))
        };
        assert_eq!(messages(&heredocs(64)), [""; 0]);
        assert_eq!(
            messages(&heredocs(65))[0],
            "more than 64 here-documents in one instruction"
        );
        let many = parse("x", &b"X\n".repeat(10_000)).unwrap_err().problems;
        assert_eq!(many.len(), MAX_PROBLEMS);
        assert_eq!(
            many.last().and_then(|p| p.hint.as_deref()),
            Some("there are more problems, which are not listed")
        );
    }

    #[test]
    fn only_the_first_line_before_from_is_told() {
        assert_eq!(
            messages("RUN a\nENV b=1\nCMDX\n"),
            [
                "RUN before the first FROM: there is no stage yet",
                "unknown instruction \"CMDX\""
            ]
        );
        // A FROM that is wrong is a FROM.
        assert_eq!(messages("FROM a AS 1\nRUN x\n").len(), 1);
    }

    #[test]
    fn triggers_are_read() {
        let trigger = parse_trigger("COPY <<-E /x\n\ta\n\tE").unwrap();
        assert_eq!(trigger.original, "COPY <<-E /x");
        assert_eq!(trigger.span, Span { start: 0, end: 18 });
        let InstructionKind::Copy(copy) = trigger.kind else {
            panic!("{trigger:?}");
        };
        assert_eq!(copy.heredocs[0].content, "\ta\n");
    }

    #[test]
    fn wrong_triggers_are_errors() {
        let check = |text: &str, message: &str| {
            let problems = parse_trigger(text).unwrap_err().problems;
            let found: Vec<_> = problems.into_iter().map(|p| p.message).collect();
            assert_eq!(found, [message], "{text}");
        };
        check(
            "",
            "an ONBUILD trigger must be a single instruction, this one has none",
        );
        check(
            "RUN a\nRUN b\nRUN c",
            "an ONBUILD trigger must be a single instruction",
        );
        check("FROM a", "FROM is not allowed as an ONBUILD trigger");
        check("RUNN a", "unknown instruction \"RUNN\"");
    }
}
