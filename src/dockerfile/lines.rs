//! Physical lines → [`Line`]s: comments gone, continuations joined, places kept.
//!
//! Here-documents are read by [`super::heredoc`], directives by [`super::directive`].

use std::ops::Range;

use super::{Span, Word};

/// A logical line: what continuation characters join, without comments and empty lines.
#[derive(Debug)]
pub(super) struct Line {
    /// The joined text.
    text: String,
    /// Which part of the text comes from where, ascending.
    segments: Vec<Segment>,
    /// From the first to the last byte in the source.
    pub(super) span: Span,
}

/// From byte `logical` of the joined text on, bytes come from `source` on.
#[derive(Debug)]
struct Segment {
    logical: usize,
    source: usize,
}

impl Line {
    /// A line that stands in one piece at the start of its source.
    pub(super) fn of(text: &str) -> Self {
        Self {
            text: text.to_owned(),
            segments: Vec::new(),
            span: Span {
                start: 0,
                end: text.len(),
            },
        }
    }

    /// The whole line as a slice.
    pub(super) fn slice(&self) -> Slice<'_> {
        Slice {
            line: self,
            start: 0,
            end: self.text.len(),
        }
    }

    /// The source's byte for byte `at` of the text; one past the last for the text's end.
    fn source(&self, at: usize) -> usize {
        let after = self.segments.partition_point(|s| s.logical <= at);
        match after.checked_sub(1).and_then(|i| self.segments.get(i)) {
            Some(segment) => segment.source + (at - segment.logical),
            None => self.span.start,
        }
    }

    /// Where the bytes `start..end` of the text stand.
    fn span_of(&self, start: usize, end: usize) -> Span {
        let first = self.source(start);
        let last = if end > start {
            self.source(end - 1) + 1
        } else {
            first
        };
        Span {
            start: first,
            end: last,
        }
    }
}

/// Part of a [`Line`].
#[derive(Clone, Copy, Debug)]
pub(super) struct Slice<'a> {
    line: &'a Line,
    start: usize,
    end: usize,
}

impl<'a> Slice<'a> {
    /// Its text.
    pub(super) fn text(self) -> &'a str {
        &self.line.text[self.start..self.end]
    }

    /// Whether it has no text.
    pub(super) fn is_empty(self) -> bool {
        self.start == self.end
    }

    /// Part of it; `range` counts from its own start and lies on character boundaries.
    pub(super) fn get(self, range: Range<usize>) -> Self {
        Self {
            line: self.line,
            start: self.start + range.start,
            end: self.start + range.end,
        }
    }

    /// It without white space at its ends.
    pub(super) fn trim(self) -> Self {
        let text = self.text();
        let start = text.len() - text.trim_start().len();
        let end = start + text.trim().len();
        self.get(start..end)
    }

    /// Where it stands in the source.
    pub(super) fn span(self) -> Span {
        self.line.span_of(self.start, self.end)
    }

    /// Where a part of it stands; `range` counts from its own start.
    pub(super) fn span_of(self, range: Range<usize>) -> Span {
        self.line
            .span_of(self.start + range.start, self.start + range.end)
    }

    /// It as an unexpanded word.
    pub(super) fn word(self) -> Word {
        Word {
            raw: self.text().to_owned(),
            span: self.span(),
        }
    }

    /// Its parts between runs of blanks, as BuildKit splits arguments. None if it is empty.
    pub(super) fn split_blanks(self) -> Vec<Self> {
        let text = self.text();
        if text.is_empty() {
            return Vec::new();
        }
        let mut parts = Vec::new();
        let mut start = 0;
        while let Some(at) = text[start..].find(is_blank) {
            let blank = start + at;
            parts.push(self.get(start..blank));
            start = text.len() - text[blank..].trim_start_matches(is_blank).len();
        }
        parts.push(self.get(start..text.len()));
        parts
    }

    /// Its text before and after the first run of white space, if there is one.
    pub(super) fn split_once_space(self) -> Option<(Self, Self)> {
        let text = self.text();
        let space = text.find(char::is_whitespace)?;
        let rest = text.len() - text[space..].trim_start().len();
        Some((self.get(0..space), self.get(rest..text.len())))
    }

    /// Nothing, at its end.
    pub(super) fn end(self) -> Self {
        let end = self.text().len();
        self.get(end..end)
    }

    /// Its text before and after the first run of blanks, if there is one.
    pub(super) fn split_once_blank(self) -> Option<(Self, Self)> {
        let text = self.text();
        let blank = text.find(is_blank)?;
        let rest = text.len() - text[blank..].trim_start_matches(is_blank).len();
        Some((self.get(0..blank), self.get(rest..text.len())))
    }
}

/// What separates arguments inside a logical line.
fn is_blank(c: char) -> bool {
    matches!(c, '\t' | '\x0b' | '\x0c' | '\r' | ' ')
}

/// Reads a text line by line.
#[derive(Debug)]
pub(super) struct Reader<'t> {
    text: &'t str,
    at: usize,
    escape: char,
}

impl<'t> Reader<'t> {
    /// A reader at the start of `text` in which `escape` continues lines.
    pub(super) fn new(text: &'t str, escape: char) -> Self {
        Self {
            text,
            at: 0,
            escape,
        }
    }

    /// The text read from.
    pub(super) fn text(&self) -> &'t str {
        self.text
    }

    /// Where the content of the physical line read last ends.
    pub(super) fn end_of_last(&self) -> usize {
        trim_line_end(&self.text[..self.at]).len()
    }

    /// The next physical line, its line end included.
    pub(super) fn physical(&mut self) -> Option<Range<usize>> {
        if self.at == self.text.len() {
            return None;
        }
        let start = self.at;
        self.at = self.text[start..]
            .find('\n')
            .map_or(self.text.len(), |at| start + at + 1);
        Some(start..self.at)
    }

    /// The next logical line that is not empty.
    pub(super) fn logical(&mut self) -> Option<Line> {
        loop {
            let range = self.physical()?;
            let (start, body) = {
                let line = trim_line_end(&self.text[range.clone()]);
                let body = line.trim_start();
                (range.start + (line.len() - body.len()), body)
            };
            if body.is_empty() || body.starts_with('#') {
                continue;
            }
            let mut line = Line {
                text: String::new(),
                segments: Vec::new(),
                span: Span {
                    start,
                    end: start + body.len(),
                },
            };
            let mut continued = line.append(body, start, self.escape);
            while continued {
                let Some(range) = self.physical() else { break };
                let body = trim_line_end(&self.text[range.clone()]);
                let content = body.trim_start();
                // Both are allowed between continued lines and end nothing.
                if content.is_empty() || content.starts_with('#') {
                    continue;
                }
                line.span.end = range.start + body.len();
                continued = line.append(body, range.start, self.escape);
            }
            return Some(line);
        }
    }
}

impl Line {
    /// Adds a physical line without its continuation character; says whether it had one.
    fn append(&mut self, body: &str, source: usize, escape: char) -> bool {
        self.segments.push(Segment {
            logical: self.text.len(),
            source,
        });
        match continuation(body, escape) {
            Some(at) => {
                self.text.push_str(&body[..at]);
                true
            }
            None => {
                self.text.push_str(body);
                false
            }
        }
    }
}

/// Where the escape character stands that continues `line`. A doubled one continues nothing.
pub(super) fn continuation(line: &str, escape: char) -> Option<usize> {
    let before = line.trim_end_matches([' ', '\t']).strip_suffix(escape)?;
    (!before.ends_with(escape)).then_some(before.len())
}

/// `line` without its line end.
pub(super) fn trim_line_end(line: &str) -> &str {
    line.trim_end_matches(['\r', '\n'])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(text: &str, escape: char) -> Vec<String> {
        let mut reader = Reader::new(text, escape);
        std::iter::from_fn(|| reader.logical())
            .map(|line| line.slice().text().to_owned())
            .collect()
    }

    #[test]
    fn continuations_join_and_comments_vanish() {
        let check = |text: &str, expected: &[&str]| assert_eq!(lines(text, '\\'), expected);
        check("a \\\n  b\nc", &["a   b", "c"]);
        check("a \\  \t\n b\n", &["a  b"]);
        check("a \\\n# x\n\n \t\n  # y\nb\n", &["a b"]);
        check("a \\\\\nb\n", &["a \\\\", "b"]);
        check("\\\na\n", &["a"]);
        check("a \\", &["a "]);
        check("a \\\r\n b\r\n", &["a  b"]);
        check("  # c\n\n\t a\n", &["a"]);
        check("a # no comment\n", &["a # no comment"]);
        check("\\\n", &[""]);
        check("", &[]);
        assert_eq!(lines("a `\nb \\\nc", '`'), ["a b \\", "c"]);
    }

    #[test]
    fn spans_survive_joining() {
        let text = "RUN a \\\n# x\n bcd";
        let line = Reader::new(text, '\\').logical().unwrap();
        assert_eq!(line.slice().text(), "RUN a  bcd");
        assert_eq!(line.span, Span { start: 0, end: 16 });
        let bcd = line.slice().get(7..10);
        assert_eq!(bcd.text(), "bcd");
        assert_eq!(&text[bcd.span().start..bcd.span().end], "bcd");
        let across = line.slice().get(4..10);
        assert_eq!(across.span(), Span { start: 4, end: 16 });
    }

    #[test]
    fn blanks_split() {
        let split = |text: &str| -> Vec<String> {
            match Reader::new(text, '\\').logical() {
                Some(line) => (line.slice().split_blanks().iter())
                    .map(|s| s.text().to_owned())
                    .collect(),
                None => Vec::new(),
            }
        };
        assert_eq!(split("a \t b\x0bc"), ["a", "b", "c"]);
        assert_eq!(split("a "), ["a", ""]);
        assert_eq!(split("a"), ["a"]);
    }
}
