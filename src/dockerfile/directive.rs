//! Parser directives: `# name=value` lines at the very top.

use super::error::quoted;
use super::lines::trim_line_end;
use super::{Check, Directives, Problem, Span, Word, check};

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
/// Scanning ends at the first line that is no known directive. As in BuildKit, which looks
/// for `escape` and for the others in two ways:
/// - A first line with `#!` is skipped, `escape` then has no effect, and scanning ends at a
///   repetition.
/// - White space before `#` is for `escape` only: `syntax` and `check` must not stand there,
///   nor below such a line.
pub(super) fn parse(text: &str, problems: &mut Vec<Problem>) -> Directives {
    let mut directives = Directives {
        syntax: None,
        escape: DEFAULT_ESCAPE,
        check: None,
        check_options: Check::default(),
    };
    let shebang = text.starts_with("#!");
    let mut indented = false;
    let mut seen: Vec<String> = Vec::new();
    let mut start = 0;
    for (index, line) in text.split_inclusive('\n').enumerate() {
        let at = start;
        start += line.len();
        if shebang && index == 0 {
            continue;
        }
        let Some(found) = directive(line, "#", at) else {
            break;
        };
        indented |= found.line.start > at;
        if seen.contains(&found.name) {
            if shebang {
                break;
            }
            problems.push(Problem::new(
                found.line,
                format!("only one {} parser directive can be used", found.name),
            ));
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
            _ if indented => {}
            name => {
                // BuildKit keeps what follows the first blank for the command line of a
                // front end.
                let mut value = found.value;
                let end = value.raw.find(' ').unwrap_or(value.raw.len());
                value.raw.truncate(end);
                value.span.end = value.span.start + end;
                if name == "syntax" {
                    directives.syntax = Some(value);
                } else {
                    match check::parse_check(&value.raw) {
                        Ok(options) => directives.check_options = options,
                        Err(error) => problems.push(Problem {
                            message: error.to_string(),
                            hint: error.hint,
                            span: value.span_of(text, error.range),
                        }),
                    }
                    directives.check = Some(value);
                }
            }
        }
        seen.push(found.name);
    }
    directives
}

/// What a file that is no Dockerfile says about its front end: `// syntax=` at the top, or a
/// JSON object with `syntax`. BuildKit takes both for other front ends' sake.
pub(super) fn other_front_end(text: &str) -> Option<Word> {
    let skipped = match text.split_once('\n') {
        Some((first, _)) if first.starts_with("#!") => first.len() + 1,
        _ => 0,
    };
    let mut start = skipped;
    for line in text[skipped..].split_inclusive('\n') {
        if !line.starts_with("//") {
            break;
        }
        let Some(found) = directive(line, "//", start) else {
            break;
        };
        if found.name == "syntax" {
            return Some(found.value);
        }
        start += line.len();
    }
    let body = &text[skipped..];
    if !body.trim_start().starts_with('{') {
        return None;
    }
    let object: serde_json::Map<String, serde_json::Value> = serde_json::from_str(body).ok()?;
    let raw = object.get("syntax")?.as_str()?.to_owned();
    let end = skipped + body.trim_end().len();
    Some(Word {
        raw,
        span: Span {
            start: end - body.trim().len(),
            end,
        },
    })
}

/// `line` as a directive, if it is a known one. `at` is where the line starts, `comment`
/// what comments begin with.
fn directive(line: &str, comment: &str, at: usize) -> Option<Found> {
    let line = trim_line_end(line);
    let body = line.trim_start();
    let rest = body.strip_prefix(comment)?.trim_start();
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
        check("# syntax=a\n# check=skip=b\n# escape=`", '`');
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
    fn white_space_before_directives_is_for_escape_only() {
        let names = |text: &str| {
            let (directives, messages) = parsed(text);
            assert_eq!(messages, [""; 0], "{text:?}");
            let raw = |word: Option<Word>| word.map(|w| w.raw).unwrap_or_default();
            (
                raw(directives.syntax),
                raw(directives.check),
                directives.escape,
            )
        };
        let found =
            |syntax: &str, check: &str, escape| (syntax.to_owned(), check.to_owned(), escape);
        assert_eq!(names(" # syntax=a\n# escape=`\n"), found("", "", '`'));
        assert_eq!(
            names("# syntax=a\n # escape=`\n# check=skip=b\n"),
            found("a", "", '`')
        );
        assert_eq!(
            names("#!x\n# syntax=a\n# syntax=b\n# check=skip=c\n"),
            found("a", "", '\\')
        );
    }

    #[test]
    fn other_front_ends_are_recognised() {
        let check = |text: &str, expected: Option<(&str, &str)>| {
            let found = other_front_end(text);
            let found = (found.as_ref())
                .map(|word| (word.raw.as_str(), &text[word.span.start..word.span.end]));
            assert_eq!(found, expected, "{text}");
        };
        check("//syntax=foo\n//key=value", Some(("foo", "foo")));
        check("#!/bin/sh\n// Syntax = x y", Some(("x y", "x y")));
        check("// escape=`\n// syntax=x", Some(("x", "x")));
        check("// comment\n// syntax=x", None);
        check(" // syntax=x", None);
        check("# syntax=x\n// syntax=y", None);
        let json = "{\"syntax\": \"foo\", \"bar\": [\"abc\"]}";
        check(json, Some(("foo", json)));
        check(&format!("#!x\n {json}\n"), Some(("foo", json)));
        check("{\"syntax\": \"foo\"", None);
        check("{\"syntax\": 1}", None);
        check("{\"syntax\": \"foo\"}\n# syntax=bar", None);
        check("FROM a", None);
        check("", None);
    }

    #[test]
    fn check_options_are_read_up_to_a_blank() {
        let (directives, messages) = parsed("# check=skip=A,B;error=true or=not\n");
        assert_eq!(messages, [""; 0]);
        assert_eq!(
            directives.check_options,
            Check {
                skip: vec!["A".to_owned(), "B".to_owned()],
                error: true,
                ..Check::default()
            }
        );
        assert_eq!(parsed("# comment\n").0.check_options, Check::default());
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
            "#check = skip=all;eror=true\n",
            "eror=true: invalid check option \"eror\": skip, experimental and error exist",
        );
        check(
            "# syntax=a\n# syntax=b\n",
            "# syntax=b: only one syntax parser directive can be used",
        );
    }
}
