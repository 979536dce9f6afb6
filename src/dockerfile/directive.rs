//! Parser directives: `# name=value` lines at the very top.

use super::error::quoted;
use super::lines::trim_line_end;
use super::{Directives, Problem, Span, Word};

/// The escape character where no directive says otherwise.
pub(super) const DEFAULT_ESCAPE: char = '\\';

/// One directive line.
#[derive(Debug)]
struct Found {
    name: String,
    value: Word,
    line: Span,
}

/// The directives of `text`.
///
/// Scanning ends at the first line that is no known directive. A first line with `#!` is
/// skipped; as in BuildKit, `escape` then has no effect and repetitions go unnoticed.
pub(super) fn parse(text: &str, problems: &mut Vec<Problem>) -> Directives {
    let mut directives = Directives {
        syntax: None,
        escape: DEFAULT_ESCAPE,
        check: None,
    };
    let shebang = text.starts_with("#!");
    let mut seen: Vec<String> = Vec::new();
    let mut start = 0;
    for (index, line) in text.split_inclusive('\n').enumerate() {
        let at = start;
        start += line.len();
        if shebang && index == 0 {
            continue;
        }
        let Some(found) = directive(line, at) else {
            break;
        };
        if seen.contains(&found.name) {
            if !shebang {
                problems.push(Problem::new(
                    found.line,
                    format!("only one {} parser directive can be used", found.name),
                ));
            }
            continue;
        }
        match found.name.as_str() {
            "escape" if shebang => {}
            "escape" => match found.value.raw.as_str() {
                "\\" => directives.escape = '\\',
                "`" => directives.escape = '`',
                other => problems.push(Problem::new(
                    found.value.span,
                    format!(
                        "invalid escape character {}: it must be ` or \\",
                        quoted(other)
                    ),
                )),
            },
            "syntax" => {
                // What follows the first blank is for the command line of a front end.
                let mut value = found.value;
                let end = value.raw.find(' ').unwrap_or(value.raw.len());
                value.raw.truncate(end);
                value.span.end = value.span.start + end;
                directives.syntax = Some(value);
            }
            _ => directives.check = Some(found.value),
        }
        seen.push(found.name);
    }
    directives
}

/// `line` as a directive, if it is a known one. `at` is where the line starts.
fn directive(line: &str, at: usize) -> Option<Found> {
    let line = trim_line_end(line);
    let body = line.trim_start();
    let rest = body.strip_prefix('#')?.trim_start();
    let (name, raw) = rest.split_once('=')?;
    let name = name.trim_end_matches(is_space).to_ascii_lowercase();
    if !matches!(name.as_str(), "syntax" | "escape" | "check") {
        return None;
    }
    if raw.is_empty() {
        return None;
    }
    let value = match raw.trim_matches(is_space) {
        // Blanks alone count as a value of one blank.
        "" => &raw[raw.len() - 1..],
        value => value,
    };
    let value_start = at + (value.as_ptr() as usize - line.as_ptr() as usize);
    Some(Found {
        name,
        value: Word {
            raw: value.to_owned(),
            span: Span {
                start: value_start,
                end: value_start + value.len(),
            },
        },
        line: Span {
            start: at + (line.len() - body.len()),
            end: at + line.len(),
        },
    })
}

fn is_space(c: char) -> bool {
    matches!(c, '\t' | '\x0c' | '\r' | ' ')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> (Directives, Vec<String>) {
        let mut problems = Vec::new();
        let directives = parse(text, &mut problems);
        let messages = problems
            .into_iter()
            .map(|p| {
                let at = &text[p.span.start..p.span.end];
                format!("{at}: {}", p.message)
            })
            .collect();
        (directives, messages)
    }

    #[test]
    fn escapes_are_found() {
        let check = |text: &str, escape: char| {
            assert_eq!(parsed(text).0.escape, escape, "{text:?}");
            assert_eq!(parsed(text).1, [""; 0], "{text:?}");
        };
        check("# escape=`\n", '`');
        check("#\t EsCaPe  =   `  \r\n", '`');
        check("#escape=\\\n", '\\');
        check("  # escape=`\n", '`');
        check("# comment\n# escape=`\n", '\\');
        check("# flavour=x\n# escape=`\n", '\\');
        check("\n# escape=`\n", '\\');
        check("# escape=\n", '\\');
        check("#!/bin/x\n# escape=`\n# escape=`\n", '\\');
        check("# syntax=a\n# check=b\n# escape=`", '`');
    }

    #[test]
    fn syntax_and_check_keep_their_places() {
        let text = "#!/bin/x\n# syntax = docker/dockerfile:1 --more\n# check=skip=all \n";
        let (directives, messages) = parsed(text);
        let syntax = directives.syntax.unwrap();
        assert_eq!(syntax.raw, "docker/dockerfile:1");
        assert_eq!(
            &text[syntax.span.start..syntax.span.end],
            "docker/dockerfile:1"
        );
        let check = directives.check.unwrap();
        assert_eq!(check.raw, "skip=all");
        assert_eq!(&text[check.span.start..check.span.end], "skip=all");
        assert_eq!(messages, [""; 0]);
    }

    #[test]
    fn wrong_directives_are_problems() {
        let check = |text: &str, message: &str| assert_eq!(parsed(text).1, [message], "{text:?}");
        check(
            "# escape=x\n",
            "x: invalid escape character \"x\": it must be ` or \\",
        );
        check(
            "# escape= \n",
            " : invalid escape character \" \": it must be ` or \\",
        );
        check(
            "# escape=\\\n # Escape=`\n",
            "# Escape=`: only one escape parser directive can be used",
        );
        check(
            "# syntax=a\n# syntax=b\n",
            "# syntax=b: only one syntax parser directive can be used",
        );
    }
}
