//! [`DockerfileError`]: what is wrong, and where.

use std::fmt;

use thiserror::Error;

use super::Span;
use crate::secret::starred_userinfo;

/// One thing that is wrong with a Dockerfile.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// What is wrong and what was expected; lower case, no final period.
    pub message: String,
    /// Advice, such as `did you mean "FROM"?`.
    pub hint: Option<String>,
    /// Where.
    pub span: Span,
}

impl Problem {
    /// A problem without advice.
    pub fn new(span: Span, message: impl Into<String>) -> Self {
        Self {
            message: message.into(),
            hint: None,
            span,
        }
    }

    /// Adds advice.
    #[must_use]
    pub fn with_hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

/// All independent problems of one Dockerfile, with file, line, column and excerpt.
#[derive(Clone, Debug, Error)]
pub struct DockerfileError {
    /// The Dockerfile's name.
    pub name: String,
    /// Its text.
    pub text: String,
    /// The problems in the order of their places; at least one.
    pub problems: Vec<Problem>,
}

/// Line and column of byte `offset`, both from 1; columns count characters.
pub fn line_column(text: &str, offset: usize) -> (usize, usize) {
    let mut offset = offset.min(text.len());
    while !text.is_char_boundary(offset) {
        offset -= 1;
    }
    let before = &text[..offset];
    let line = before.matches('\n').count() + 1;
    let start = before.rfind('\n').map_or(0, |at| at + 1);
    (line, before[start..].chars().count() + 1)
}

/// `name:line:column`, as compilers print it.
pub fn place(name: &str, text: &str, span: Span) -> String {
    let (line, column) = line_column(text, span.start);
    format!("{name}:{line}:{column}")
}

/// `text` in quotes for a message, shortened if it is long.
pub(super) fn quoted(text: &str) -> String {
    const MAX_CHARS: usize = 200;
    if text.chars().nth(MAX_CHARS).is_none() {
        return format!("{text:?}");
    }
    let shortened: String = text.chars().take(MAX_CHARS).chain(['…']).collect();
    format!("{shortened:?}")
}

/// Longer excerpts are cut on both sides of the place.
const MAX_EXCERPT_CHARS: usize = 160;

impl fmt::Display for DockerfileError {
    /// A block a problem:
    ///
    /// ```text
    /// Dockerfile:3:1: unknown instruction "RUNN"
    ///   3 | RUNN true
    ///     | ^^^^
    /// hint: did you mean "RUN"?
    /// ```
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, problem) in self.problems.iter().enumerate() {
            if index > 0 {
                writeln!(f)?;
            }
            let (line, column) = line_column(&self.text, problem.span.start);
            writeln!(f, "{}:{line}:{column}: {}", self.name, problem.message)?;
            let (excerpt, marks) = excerpt(&self.text, problem.span, line, column);
            writeln!(f, "{line:>4} | {excerpt}")?;
            write!(f, "     | {marks}")?;
            if let Some(hint) = &problem.hint {
                write!(f, "\nhint: {hint}")?;
            }
        }
        Ok(())
    }
}

/// The line that `span` starts in, and carets to stand below the part it covers.
fn excerpt(text: &str, span: Span, line: usize, column: usize) -> (String, String) {
    let whole = starred_userinfo(text.lines().nth(line - 1).unwrap_or_default());
    let before = column - 1;
    let skipped = before.saturating_sub(MAX_EXCERPT_CHARS / 2);
    let mut chars = whole.chars().skip(skipped);
    let mut shown: String = chars
        .by_ref()
        .take(MAX_EXCERPT_CHARS)
        .map(visible)
        .collect();
    let width = shown.chars().count();
    // Tabs are kept in the indentation, so that the carets stand below the place.
    let mut marks: String = (shown.chars().take(before - skipped))
        .map(|c| if c == '\t' { '\t' } else { ' ' })
        .collect();
    let covered = text
        .get(span.start..span.end.min(text.len()))
        .and_then(|covered| covered.lines().next())
        .map_or(1, |covered| covered.chars().count());
    let room = (width + 1).saturating_sub(before - skipped).max(1);
    marks.push_str(&"^".repeat(covered.clamp(1, room)));
    if chars.next().is_some() {
        shown.push('…');
    }
    if skipped > 0 {
        shown.insert(0, '…');
        marks.insert(0, ' ');
    }
    (shown, marks)
}

/// Control characters would act on the terminal.
fn visible(c: char) -> char {
    if c.is_control() && c != '\t' {
        char::REPLACEMENT_CHARACTER
    } else {
        c
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_problem_points_at_its_place() {
        let error = DockerfileError {
            name: "Dockerfile".into(),
            text: "FROM a\n\tRUNN true\n".into(),
            problems: vec![
                Problem::new(Span { start: 8, end: 12 }, "unknown instruction \"RUNN\"")
                    .with_hint("did you mean \"RUN\"?"),
            ],
        };
        assert_eq!(
            error.to_string(),
            "Dockerfile:2:2: unknown instruction \"RUNN\"\n   2 | \tRUNN true\n     | \t^^^^\n\
             hint: did you mean \"RUN\"?"
        );
    }

    fn display(text: &str, start: usize, end: usize) -> String {
        let error = DockerfileError {
            name: "f".into(),
            text: text.into(),
            problems: vec![Problem::new(Span { start, end }, "m")],
        };
        error.to_string()
    }

    #[test]
    fn places_at_the_edges_are_shown() {
        assert_eq!(display("", 0, 0), "f:1:1: m\n   1 | \n     | ^");
        assert_eq!(display("a\n", 2, 2), "f:2:1: m\n   2 | \n     | ^");
        assert_eq!(display("ab\ncd", 1, 5), "f:1:2: m\n   1 | ab\n     |  ^");
        assert_eq!(display("ab", 2, 9), "f:1:3: m\n   1 | ab\n     |   ^");
        assert_eq!(display("é b", 3, 4), "f:1:3: m\n   1 | é b\n     |   ^");
    }

    #[test]
    fn excerpts_are_harmless_and_short() {
        let shown = display("a\u{1b}[31mb", 0, 1);
        assert_eq!(shown, "f:1:1: m\n   1 | a\u{fffd}[31mb\n     | ^");
        let long = "x".repeat(1000) + "HERE" + &"y".repeat(1000);
        let expected = format!(
            "f:1:1001: m\n   1 | …{}HERE{}…\n     |  {}^^^^",
            "x".repeat(80),
            "y".repeat(76),
            " ".repeat(80)
        );
        assert_eq!(display(&long, 1000, 1004), expected);
    }
}
