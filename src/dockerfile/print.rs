//! A parsed Dockerfile → text that parses to the same.
//!
//! What is printed are the instructions' own texts ([`Instruction::original`]), with the
//! here-documents below them. Comments and the way lines were continued are lost; directives
//! come first, in one order.

use std::fmt;

use super::heredoc;
use super::lines;
use super::statement;
use super::{Copy, Dockerfile, Heredoc, Instruction, InstructionKind, MAX_LINE_BYTES};

/// Continues a line that is longer, well below [`MAX_LINE_BYTES`].
const MAX_PRINTED_BYTES: usize = MAX_LINE_BYTES / 2;

/// White space that ends no continuation and counts for nothing at the end of a line.
const END: char = '\x0b';

impl fmt::Display for Dockerfile {
    /// Parsing what is printed gives the same instructions, only elsewhere. One thing has
    /// no text: white space at the end of an `ONBUILD` line that ends with an escape
    /// character or a carriage return.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let directives = &self.directives;
        let named = [("syntax", &directives.syntax), ("check", &directives.check)];
        for (name, value) in named {
            if let Some(value) = value {
                // A blank stands for an empty value.
                let blank = if value.raw.is_empty() { " " } else { "" };
                writeln!(f, "# {name}={}{blank}", value.raw)?;
            }
        }
        let escape = directives.escape;
        if escape != '\\' {
            writeln!(f, "# escape={escape}")?;
        }
        for argument in &self.global_args {
            instruction(f, argument, escape)?;
        }
        for stage in &self.stages {
            line(f, &stage.original, escape)?;
            for each in &stage.instructions {
                instruction(f, each, escape)?;
            }
        }
        Ok(())
    }
}

fn instruction(f: &mut fmt::Formatter<'_>, instruction: &Instruction, escape: char) -> fmt::Result {
    let original = &instruction.original;
    match &instruction.kind {
        InstructionKind::Onbuild { expression, .. } => {
            // It keeps the blanks at the end of its line, and what all here-documents said.
            let (first, contents) = match expression.split_once('\n') {
                Some((first, contents)) => (first, Some(contents)),
                None => (expression.as_str(), None),
            };
            let blanks = &first[first.trim_end().len()..];
            line(f, &format!("{original}{blanks}"), escape)?;
            contents.map_or(Ok(()), |contents| writeln!(f, "{contents}"))
        }
        InstructionKind::Run(run) => {
            line(f, original, escape)?;
            run.heredocs.iter().try_for_each(|each| document(f, each))
        }
        InstructionKind::Copy(copy) | InstructionKind::Add(copy) => {
            line(f, original, escape)?;
            contents(f, original, copy, escape)
        }
        _ => line(f, original, escape),
    }
}

fn document(f: &mut fmt::Formatter<'_>, heredoc: &Heredoc) -> fmt::Result {
    writeln!(f, "{}{}", heredoc.content, heredoc.name)
}

/// The here-documents that a `COPY` line announces. Of several with one name only the last
/// one's content is known, and matters.
fn contents(f: &mut fmt::Formatter<'_>, line: &str, copy: &Copy, escape: char) -> fmt::Result {
    if !statement::may_have_heredocs_text(line, escape) {
        return Ok(());
    }
    let names = heredoc::names(line);
    for (index, name) in names.iter().enumerate() {
        let last = !names[index + 1..].contains(name);
        let known = copy.heredocs.iter().find(|heredoc| heredoc.name == *name);
        match known.filter(|_| last) {
            Some(heredoc) => document(f, heredoc)?,
            None => writeln!(f, "{name}")?,
        }
    }
    Ok(())
}

/// A logical line, continued where it is too long.
fn line(f: &mut fmt::Formatter<'_>, text: &str, escape: char) -> fmt::Result {
    let mut rest = text;
    while rest.len() > MAX_PRINTED_BYTES
        && let Some(at) = break_before(rest, escape)
    {
        writeln!(f, "{}{escape}", &rest[..at])?;
        rest = &rest[at..];
    }
    let end = if lines::continuation(rest, escape).is_some() {
        END.to_string()
    } else {
        String::new()
    };
    writeln!(f, "{rest}{end}")
}

/// The last place in reach where `text` can be continued: not behind an escape character,
/// which would be doubled, and not before what looks like a comment or an empty line.
fn break_before(text: &str, escape: char) -> Option<usize> {
    (1..=MAX_PRINTED_BYTES).rev().find(|&at| {
        text.is_char_boundary(at)
            && !text[..at].ends_with(escape)
            && text[at..].starts_with(|c: char| !c.is_whitespace() && c != '#' && c != escape)
    })
}

#[cfg(test)]
mod tests {
    use super::super::{MAX_DOCKERFILE_BYTES, parse};

    fn printed(text: &str) -> String {
        parse("Dockerfile", text.as_bytes())
            .unwrap_or_else(|error| panic!("{error}"))
            .to_string()
    }

    #[track_caller]
    fn check(text: &str, expected: &str) {
        assert_eq!(printed(text), expected);
        assert_eq!(printed(expected), expected);
    }

    #[test]
    fn lines_are_joined_and_comments_go() {
        check(
            "# comment\n\n arg  A=1\n# x\nFROM a \\\n# y\n\n  as b # c\nrun  x\\\n  y\r\n"
                .replace(" # c", "")
                .as_str(),
            "arg  A=1\nFROM a   as b\nrun  x  y\n",
        );
    }

    #[test]
    fn directives_come_first() {
        check(
            "#Escape = `\n#check=skip=all;error=true more\n# syntax= a/b:c d\nFROM a\nRUN b `\n c",
            "# syntax=a/b:c\n# check=skip=all;error=true\n# escape=`\nFROM a\nRUN b  c\n",
        );
        check("#escape=\\\nFROM a", "FROM a\n");
        check(
            "# syntax= \n# check=skip=a\nFROM a",
            "# syntax= \n# check=skip=a\nFROM a\n",
        );
    }

    #[test]
    fn heredocs_stand_below() {
        let text = "FROM a\nRUN <<A 3<<-'B c'\n x\nA\n\ty\nB c\n\
                    COPY --chmod=1 <<A b <<-C /x\n1\r\nA\n\tC\nONBUILD ADD <<A <<A /x \t\n1\nA\n2\nA\n";
        check(text, &text.replace("\n\tC\n", "\nC\n"));
        // Only the last content of a name is kept, since it is everybody's.
        check(
            "FROM a\nCOPY <<-A <<A /x\n1\nA\n\tA\nA\n",
            "FROM a\nCOPY <<-A <<A /x\nA\n\tA\nA\n",
        );
        check(
            "FROM a\nCOPY [\"<<A\", \"/x\"]\n",
            "FROM a\nCOPY [\"<<A\", \"/x\"]\n",
        );
    }

    #[test]
    fn lines_end_where_they_end() {
        check("FROM a\nRUN b\\ \\\n", "FROM a\nRUN b\\\x0b\n");
        check("FROM a\nRUN b\\\\\n", "FROM a\nRUN b\\\\\n");
        check(
            "# escape=`\nFROM a\nRUN b\\\n",
            "# escape=`\nFROM a\nRUN b\\\n",
        );
    }

    #[test]
    fn long_lines_are_continued() {
        let part = "\\\\ # \u{e9}".repeat(5_000);
        let text = format!("FROM a\nRUN {}\n", [part.as_str(); 10].join("\\\n"));
        assert!(text.len() < MAX_DOCKERFILE_BYTES);
        let first = parse("Dockerfile", text.as_bytes()).unwrap();
        let second = parse("Dockerfile", first.to_string().as_bytes()).unwrap();
        assert_eq!(
            first.stages[0].instructions[0].kind,
            second.stages[0].instructions[0].kind
        );
        assert_eq!(first.to_string().lines().count(), 1 + 11);
    }
}
