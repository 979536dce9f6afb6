//! Here-documents: which ones a line announces, and their content.

use std::ops::Range;

use super::error::quoted;
use super::expand::{self, Environment, ExpandError, Options};
use super::lines::{Line, Reader, trim_line_end};
use super::{Heredoc, MAX_HEREDOCS, Problem, Span, suggest};

/// A here-document operator such as `3<<-"EOF"`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Announced {
    pub(super) name: String,
    pub(super) file_descriptor: u32,
    pub(super) expand: bool,
    pub(super) chomp: bool,
}

/// Reads one word as a here-document operator, if it is one.
pub(super) fn announced(word: &str) -> Result<Option<Announced>, ExpandError> {
    let digits = word.len() - word.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let Some(rest) = word[digits..].strip_prefix("<<") else {
        return Ok(None);
    };
    let (chomp, rest) = match rest.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, rest),
    };
    let rest = rest.trim_start_matches([' ', '\t', '\r', '\n', '\x0c']);
    if rest.is_empty() || rest.contains('<') {
        return Ok(None);
    }
    let split = |keep_quotes| {
        let options = Options {
            keep_quotes,
            keep_unset: true,
            ..Options::default()
        };
        expand::expand(rest, '\\', &Environment::new(), options).map(|e| e.words)
    };
    let (plain, quoted) = (split(false)?, split(true)?);
    let ([name], [raw]) = (plain.as_slice(), quoted.as_slice()) else {
        return Ok(None);
    };
    let quotes = |text: &str| text.matches(['\'', '"']).count();
    Ok(Some(Announced {
        name: name.clone(),
        // Too large a number is saturated: no such descriptor exists either.
        file_descriptor: match &word[..digits] {
            "" => 0,
            digits => digits.parse().unwrap_or(u32::MAX),
        },
        expand: quotes(name) == quotes(raw),
        chomp,
    }))
}

/// The words of a line as the search for operators takes them. None if the shell lexer
/// cannot follow the line.
fn words(line: &str) -> Vec<String> {
    if !line.contains("<<") {
        return Vec::new();
    }
    let options = Options {
        keep_quotes: true,
        keep_escapes: true,
        keep_unset: true,
        ..Options::default()
    };
    expand::expand(line, '\\', &Environment::new(), options)
        .map(|expansion| expansion.words)
        .unwrap_or_default()
}

/// The names of the here-documents that `line`, which has been read before, announces.
pub(super) fn names(line: &str) -> Vec<String> {
    (words(line).iter())
        .filter_map(|word| announced(word).ok().flatten())
        .map(|announced| announced.name)
        .collect()
}

/// Reads the here-documents that `line` announces from what follows it.
///
/// A line whose quotes or substitutions the shell lexer cannot follow has none, as in
/// BuildKit; `RUN` leaves such lines to the shell.
pub(super) fn read(
    line: &Line,
    reader: &mut Reader<'_>,
    problems: &mut Vec<Problem>,
) -> Vec<Heredoc> {
    let text = line.slice().text();
    let mut heredocs = Vec::new();
    let mut searched = 0;
    for word in &words(text) {
        let announced = match announced(word) {
            Ok(None) => continue,
            Ok(Some(announced)) => Ok(announced),
            Err(error) => Err(error),
        };
        let place = match text[searched..].find(word.as_str()) {
            Some(at) => {
                let start = searched + at;
                searched = start + word.len();
                line.slice().span_of(start..searched)
            }
            None => line.span,
        };
        let problem = match announced {
            Err(error) => Problem::new(place, error.to_string()),
            Ok(_) if heredocs.len() == MAX_HEREDOCS => Problem::new(
                place,
                format!("more than {MAX_HEREDOCS} here-documents in one instruction"),
            ),
            Ok(announced) => match content(&announced, reader) {
                Ok(heredoc) => {
                    heredocs.push(heredoc);
                    continue;
                }
                Err(almost) => unterminated(place, &announced, almost),
            },
        };
        problems.push(problem);
        break;
    }
    heredocs
}

/// A line that was perhaps meant to be a terminator.
#[derive(Debug)]
struct Almost {
    /// Its number, from 1.
    line: usize,
    /// It, without blanks around it.
    text: String,
}

/// The problem of a missing terminator.
fn unterminated(place: Span, announced: &Announced, almost: Option<Almost>) -> Problem {
    let problem = Problem::new(
        place,
        format!(
            "unterminated here-document: no line after this consists of {} alone",
            quoted(&announced.name)
        ),
    );
    match almost {
        Some(Almost { line, text }) if text == announced.name => problem.with_hint(format!(
            "line {line} has it between blanks; only tabs before it are allowed, and only with \
             \"<<-\""
        )),
        Some(Almost { line, text }) => {
            problem.with_hint(format!("did you mean {} in line {line}?", quoted(&text)))
        }
        None => problem,
    }
}

/// Reads up to the terminator. The error is the line that is nearest to being one.
fn content(announced: &Announced, reader: &mut Reader<'_>) -> Result<Heredoc, Option<Almost>> {
    let text = reader.text();
    let mut span: Option<Span> = None;
    // Between blanks, and misspelt.
    let mut blanks: Option<Range<usize>> = None;
    let mut misspelt: Option<Range<usize>> = None;
    while let Some(range) = reader.physical() {
        let line = trim_line_end(&text[range.clone()]);
        let candidate = if announced.chomp {
            line.trim_start_matches('\t')
        } else {
            line
        };
        if candidate == announced.name {
            let span = span.unwrap_or(Span {
                start: range.start,
                end: range.start,
            });
            return Ok(Heredoc {
                name: announced.name.clone(),
                file_descriptor: announced.file_descriptor,
                expand: announced.expand,
                chomp: announced.chomp,
                content: text[span.start..span.end].to_owned(),
                span,
            });
        }
        if blanks.is_none() && line.trim() == announced.name {
            blanks = Some(range.clone());
        } else if misspelt.is_none() && suggest::is_typo(line.trim(), &announced.name) {
            misspelt = Some(range.clone());
        }
        span = Some(Span {
            start: span.map_or(range.start, |s| s.start),
            end: range.end,
        });
    }
    Err(blanks.or(misspelt).map(|range| Almost {
        line: super::line_column(text, range.start).0,
        text: text[range].trim().to_owned(),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operators_are_recognised() {
        let check = |word: &str, expected: Option<(&str, u32, bool, bool)>| {
            let found = announced(word).unwrap();
            let found = found
                .as_ref()
                .map(|a| (a.name.as_str(), a.file_descriptor, a.expand, a.chomp));
            assert_eq!(found, expected, "{word}");
        };
        check("<<EOF", Some(("EOF", 0, true, false)));
        check("<<-EOF", Some(("EOF", 0, true, true)));
        check("3<<EOF", Some(("EOF", 3, true, false)));
        check("99999999999<<EOF", Some(("EOF", u32::MAX, true, false)));
        check("<<'EOF'", Some(("EOF", 0, false, false)));
        check("<<\"E F\"", Some(("E F", 0, false, false)));
        check("<<E'O'F", Some(("EOF", 0, false, false)));
        check("<<\\EOF", Some(("EOF", 0, true, false)));
        check("<< EOF", Some(("EOF", 0, true, false)));
        check("<<$EOF", Some(("$EOF", 0, true, false)));
        check("<<2))", Some(("2))", 0, true, false)));
        check("<<", None);
        check("<<-", None);
        check("<<<EOF", None);
        check("x<<EOF", None);
        check("<<E F", None);
        check("<EOF", None);
        assert!(announced("<<'EOF").is_err());
    }

    fn read_all(text: &str) -> (Vec<Heredoc>, Vec<Problem>, Option<String>) {
        let mut reader = Reader::new(text, '\\');
        let mut problems = Vec::new();
        let line = reader.logical().unwrap();
        let heredocs = read(&line, &mut reader, &mut problems);
        let next = reader.logical().map(|l| l.slice().text().to_owned());
        (heredocs, problems, next)
    }

    #[test]
    fn contents_are_kept_as_they_are() {
        let text = "RUN <<A 2<<-'B' \\\n  <<C\n\\\n# a\nA \n A\r\n\nA\r\n\t\tb\n\tB\nC\nnext";
        let (heredocs, problems, next) = read_all(text);
        assert_eq!(problems, []);
        let contents: Vec<_> = heredocs.iter().map(|h| h.content.as_str()).collect();
        assert_eq!(contents, ["\\\n# a\nA \n A\r\n\n", "\t\tb\n", ""]);
        for heredoc in &heredocs {
            assert_eq!(text[heredoc.span.start..heredoc.span.end], heredoc.content);
        }
        assert_eq!(
            (heredocs[1].file_descriptor, heredocs[1].expand),
            (2, false)
        );
        assert_eq!(next.unwrap(), "next");
    }

    #[test]
    fn a_missing_end_is_a_problem_at_the_operator() {
        let text = "RUN cat <<ONE <<TWO\nx\nONE\n  TWO\n";
        let (_, problems, _) = read_all(text);
        let [problem] = problems.as_slice() else {
            panic!("{problems:?}");
        };
        assert_eq!(&text[problem.span.start..problem.span.end], "<<TWO");
        assert_eq!(
            problem.message,
            "unterminated here-document: no line after this consists of \"TWO\" alone"
        );
        assert_eq!(
            problem.hint.as_deref().unwrap(),
            "line 4 has it between blanks; only tabs before it are allowed, and only with \"<<-\""
        );
    }

    #[test]
    fn a_misspelt_end_is_named() {
        let check = |text: &str, expected: Option<&str>| {
            let (_, problems, _) = read_all(text);
            assert_eq!(problems[0].hint.as_deref(), expected, "{text}");
        };
        let eof = |end: &str| format!("RUN <<EOF\nx\ny\n{end}\n");
        check(&eof("eof"), Some("did you mean \"eof\" in line 4?"));
        check(&eof(" EOF."), Some("did you mean \"EOF.\" in line 4?"));
        check(&eof("EFO"), Some("did you mean \"EFO\" in line 4?"));
        check(&eof("FROM"), None);
        check(&eof("EO"), None);
        check("RUN <<A\nx\ny\nB\n", None);
        check(
            "RUN <<A\nx\na\nA \n",
            Some(
                "line 4 has it between blanks; only tabs before it are allowed, and only with \"<<-\"",
            ),
        );
    }

    #[test]
    fn what_the_lexer_cannot_follow_is_left_to_the_shell() {
        for text in ["RUN echo it's <<EOF\nnext", "RUN echo ${x^} <<EOF\nnext"] {
            let (heredocs, problems, next) = read_all(text);
            assert_eq!((heredocs.len(), problems.len()), (0, 0), "{text}");
            assert_eq!(next.unwrap(), "next");
        }
    }
}
