//! What `--call` prints instead of building: checks, the outline of a target, the targets.
//!
//! Values, their JSON and their text are those of BuildKit's subrequests as `buildx` shows
//! them, so that programs that read the one read the other. No I/O: texts are returned.
//!
//! <https://docs.docker.com/reference/cli/docker/buildx/build/#call>

mod check;
mod outline;
mod targets;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use serde::Serialize;

use crate::lint::Lines;

pub use check::{CheckResults, Warning};
pub use outline::{Outline, OutlineArg, OutlineMount};
pub use targets::{Target, Targets};

/// Where something stands: a range for each line.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Location {
    /// The lines.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub ranges: Vec<Range>,
}

/// From a line to a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Range {
    /// Where it begins.
    pub start: Position,
    /// Where it ends, that line included.
    pub end: Position,
}

/// A line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Position {
    /// From 1.
    pub line: usize,
}

impl Location {
    fn of(lines: Lines) -> Self {
        let range = |line| Range {
            start: Position { line },
            end: Position { line },
        };
        Self {
            ranges: (lines.first..=lines.last).map(range).collect(),
        }
    }

    /// The first line; 0 where there is none.
    fn line(&self) -> usize {
        self.ranges.first().map_or(0, |range| range.start.line)
    }
}

/// `value` as Go writes it: indented by two spaces, and safe inside HTML.
fn json(value: &impl Serialize) -> String {
    let text = serde_json::to_string_pretty(value).expect("keys are texts, and nothing fails");
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            // They stand in strings only.
            '<' | '>' | '&' | '\u{2028}' | '\u{2029}' => {
                out.push_str(&format!("\\u{:04x}", c as u32));
            }
            c => out.push(c),
        }
    }
    out
}

/// Bytes as Go's JSON has them.
fn base64(text: &str) -> String {
    BASE64_STANDARD.encode(text)
}

/// Lines of aligned columns with `padding` blanks between; the last column is not filled up.
fn table(rows: &[Vec<String>], padding: usize) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |cell: &String| cell.chars().count();
    let widths: Vec<usize> = (0..columns)
        .map(|at| rows.iter().filter_map(|row| row.get(at)).map(width).max())
        .map(|width| width.unwrap_or(0) + padding)
        .collect();
    let mut out = String::new();
    for row in rows {
        for (at, cell) in row.iter().enumerate() {
            let cell = visible(cell);
            out.push_str(&cell);
            if at + 1 < row.len() {
                let used = cell.chars().count();
                out.extend(std::iter::repeat_n(' ', widths[at].saturating_sub(used)));
            }
        }
        out.push('\n');
    }
    out
}

/// `text` for a terminal, which control characters of a Dockerfile must not reach.
fn visible(text: &str) -> String {
    let replace = |c: char| match c {
        '\t' => c,
        c if c.is_control() => char::REPLACEMENT_CHARACTER,
        c => c,
    };
    text.chars().map(replace).collect()
}

/// Some lines of `text` around `lines`, which are marked.
fn excerpt(name: &str, text: &str, lines: Lines) -> String {
    let all: Vec<&str> = text.split('\n').collect();
    let (mut start, mut end) = (lines.first, lines.last.min(all.len()));
    if start < 1 || start > all.len() {
        return String::new();
    }
    let wanted = if start == end { 4 } else { 2 };
    let mut padding = 0;
    while padding < wanted {
        if start > 1 {
            start -= 1;
            padding += 1;
        }
        if end != all.len() {
            end += 1;
            padding += 1;
        }
        padding += 1;
    }
    let mut out = format!("{}:{}\n{RULER}\n", visible(name), lines.first);
    for number in start..=end {
        let is_meant = (lines.first..=lines.last).contains(&number);
        let mark = if is_meant { ">>>" } else { "   " };
        let line = visible(all[number - 1].trim_end_matches('\r'));
        out.push_str(&format!(" {number:3} | {mark} {line}\n"));
    }
    out + RULER + "\n"
}

const RULER: &str = "--------------------";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned() {
        let rows = |rows: &[&[&str]]| -> Vec<Vec<String>> {
            let row = |row: &&[&str]| row.iter().map(|cell| (*cell).to_owned()).collect();
            rows.iter().map(row).collect()
        };
        assert_eq!(
            table(&rows(&[&["A", "B"], &["äöü", ""], &["", "x\u{1b}[2J"]]), 1),
            "A   B\näöü \n    x\u{fffd}[2J\n"
        );
        assert_eq!(
            table(&rows(&[&["A", "", "C"], &["", "", ""]]), 3),
            "A      C\n       \n"
        );
        assert_eq!(table(&[], 1), "");
    }

    #[test]
    fn excerpts_have_lines_around() {
        let text = "a\nb\nc\r\nd\ne\nf\n";
        let at = |first, last| excerpt("D", text, Lines { first, last });
        assert_eq!(
            at(3, 3),
            "D:3\n--------------------\n   1 |     a\n   2 |     b\n   3 | >>> c\n   4 |     d\n   5 |     e\n--------------------\n"
        );
        assert_eq!(
            at(1, 1),
            "D:1\n--------------------\n   1 | >>> a\n   2 |     b\n   3 |     c\n--------------------\n"
        );
        assert_eq!(
            at(2, 4),
            "D:2\n--------------------\n   1 |     a\n   2 | >>> b\n   3 | >>> c\n   4 | >>> d\n   5 |     e\n--------------------\n"
        );
        assert_eq!(at(0, 0), "");
        assert_eq!(at(99, 99), "");
        assert_eq!(
            excerpt("D", "x", Lines { first: 1, last: 9 }),
            "D:1\n--------------------\n   1 | >>> x\n--------------------\n"
        );
    }
}
