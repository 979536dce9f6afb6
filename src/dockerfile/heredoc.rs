//! Here-documents: which ones a line announces, and their content.

use super::error::quoted;
use super::expand::{self, Environment, ExpandError, Options};
use super::lines::{Line, Reader, trim_line_end};
use super::{Heredoc, MAX_HEREDOCS, Problem, Span};

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
    if !text.contains("<<") {
        return Vec::new();
    }
    let options = Options {
        keep_quotes: true,
        keep_escapes: true,
        keep_unset: true,
        ..Options::default()
    };
    let Ok(expansion) = expand::expand(text, '\\', &Environment::new(), options) else {
        return Vec::new();
    };
    let mut heredocs = Vec::new();
    let mut searched = 0;
    for word in &expansion.words {
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

/// The problem of a missing terminator; `almost` is the number of a line that is nearly one.
fn unterminated(place: Span, announced: &Announced, almost: Option<usize>) -> Problem {
    let problem = Problem::new(
        place,
        format!(
            "unterminated here-document: no line after this consists of {} alone",
            quoted(&announced.name)
        ),
    );
    match almost {
        Some(number) => problem.with_hint(format!(
            "line {number} has it between blanks; only tabs before it are allowed, and only \
             with \"<<-\""
        )),
        None => problem,
    }
}

/// Reads up to the terminator. The error is the number of a line that almost is one.
fn content(announced: &Announced, reader: &mut Reader<'_>) -> Result<Heredoc, Option<usize>> {
    let text = reader.text();
    let mut span: Option<Span> = None;
    let mut almost = None;
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
        if almost.is_none() && line.trim() == announced.name {
            almost = Some(range.start);
        }
        span = Some(Span {
            start: span.map_or(range.start, |s| s.start),
            end: range.end,
        });
    }
    Err(almost.map(|at| super::line_column(text, at).0))
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
    fn what_the_lexer_cannot_follow_is_left_to_the_shell() {
        for text in ["RUN echo it's <<EOF\nnext", "RUN echo ${x^} <<EOF\nnext"] {
            let (heredocs, problems, next) = read_all(text);
            assert_eq!((heredocs.len(), problems.len()), (0, 0), "{text}");
            assert_eq!(next.unwrap(), "next");
        }
    }
}
