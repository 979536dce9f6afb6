//! [`DockerfileError`]: what is wrong, and where.

use std::fmt;

use thiserror::Error;

use super::Span;

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
            writeln!(
                f,
                "{}: {}",
                place(&self.name, &self.text, problem.span),
                problem.message
            )?;
            let excerpt = self.text.lines().nth(line - 1).unwrap_or_default();
            let width = excerpt.chars().count();
            let span_chars = self
                .text
                .get(problem.span.start..problem.span.end.min(self.text.len()))
                .map_or(1, |s| s.lines().next().unwrap_or_default().chars().count());
            let carets = span_chars.clamp(1, (width + 1).saturating_sub(column - 1).max(1));
            // Tabs are kept in the indentation, so that the carets stand below the place.
            let indent: String = excerpt
                .chars()
                .take(column - 1)
                .map(|c| if c == '\t' { '\t' } else { ' ' })
                .collect();
            writeln!(f, "{line:>4} | {excerpt}")?;
            write!(f, "     | {indent}{}", "^".repeat(carets))?;
            if let Some(hint) = &problem.hint {
                write!(f, "\nhint: {hint}")?;
            }
        }
        Ok(())
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
}
