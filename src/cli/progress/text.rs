//! Output of steps → clean lines, and numbers → words, for people.

use std::time::Duration;

use crate::progress::Stream;

/// A line that grows beyond this is shown in pieces, so that memory stays bounded
/// whatever a step prints.
const LINE_LIMIT_BYTES: usize = 16 << 10;

/// Where a control sequence has got to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Escape {
    /// Plain text.
    #[default]
    None,
    /// After `ESC`.
    Start,
    /// After `ESC` and an intermediate byte, such as `ESC (`: one more byte follows.
    Intermediate,
    /// In a control sequence, `ESC [ … final`.
    Csi,
    /// In a string for the terminal (title, link), until `BEL` or `ESC \`.
    String,
    /// After `ESC` in such a string.
    StringEnd,
}

/// Joins the pieces of one stream to lines, without anything that moves a cursor.
///
/// Control sequences are removed, also where they are torn across pieces. A carriage
/// return starts the line anew, so of a progress bar its last state remains.
#[derive(Debug, Default)]
pub(super) struct LineJoiner {
    line: String,
    escape: Escape,
    /// A carriage return came; what comes next replaces the line, unless it ends it.
    returned: bool,
}

impl LineJoiner {
    /// Takes the next piece and gives each line that it completes to `emit`.
    pub(super) fn push(&mut self, text: &str, mut emit: impl FnMut(&str)) {
        for c in text.chars() {
            if !self.is_text(c) {
                continue;
            }
            match c {
                '\n' => {
                    emit(&self.line);
                    self.line.clear();
                    self.returned = false;
                }
                '\r' => self.returned = true,
                '\u{8}' => {
                    self.line.pop();
                }
                c if c.is_control() && c != '\t' => {}
                c => {
                    if std::mem::take(&mut self.returned) {
                        self.line.clear();
                    }
                    if self.line.len() + c.len_utf8() > LINE_LIMIT_BYTES {
                        emit(&self.line);
                        self.line.clear();
                    }
                    self.line.push(c);
                }
            }
        }
    }

    /// The line that has not ended yet.
    pub(super) fn current(&self) -> &str {
        &self.line
    }

    /// Gives what has no line end to `emit`.
    pub(super) fn finish(&mut self, mut emit: impl FnMut(&str)) {
        if !self.line.is_empty() {
            emit(&self.line);
        }
        *self = Self::default();
    }

    /// Follows control sequences; whether `c` is outside of them.
    ///
    /// ECMA-48, sections 5.3 to 5.6. A line end always counts, so that a torn
    /// sequence cannot swallow more than its own line.
    fn is_text(&mut self, c: char) -> bool {
        if c == '\n' {
            self.escape = Escape::None;
            return true;
        }
        self.escape = match (self.escape, c) {
            (Escape::String, '\u{1b}') => Escape::StringEnd,
            (_, '\u{1b}') => Escape::Start,
            (Escape::None, '\u{9b}') => Escape::Csi,
            (Escape::None, _) => return true,
            (Escape::Start, '[') => Escape::Csi,
            (Escape::Start, ']' | 'P' | 'X' | '^' | '_') => Escape::String,
            (Escape::Start, ' '..='/') | (Escape::Intermediate, ' '..='/') => Escape::Intermediate,
            (Escape::Csi, ' '..='?') => Escape::Csi,
            (Escape::String, '\u{7}') => Escape::None,
            (Escape::String, _) => Escape::String,
            // The final byte; and whatever cannot be part of the sequence ends it.
            (Escape::Start | Escape::Intermediate | Escape::Csi | Escape::StringEnd, _) => {
                Escape::None
            }
        };
        false
    }
}

/// The two streams of one step.
#[derive(Debug, Default)]
pub(super) struct StepOutput {
    stdout: LineJoiner,
    stderr: LineJoiner,
}

impl StepOutput {
    /// The joiner of `stream`.
    pub(super) fn stream(&mut self, stream: Stream) -> &mut LineJoiner {
        match stream {
            Stream::Stdout => &mut self.stdout,
            Stream::Stderr => &mut self.stderr,
        }
    }

    /// The lines that have not ended yet, where there are any.
    pub(super) fn current(&self) -> impl Iterator<Item = &str> {
        [&self.stdout, &self.stderr]
            .into_iter()
            .map(LineJoiner::current)
            .filter(|line| !line.is_empty())
    }

    /// Gives what has no line end to `emit`.
    pub(super) fn finish(&mut self, mut emit: impl FnMut(&str)) {
        self.stdout.finish(&mut emit);
        self.stderr.finish(&mut emit);
    }
}

/// `text` without control sequences and on one line; for names from a Dockerfile.
pub(super) fn one_line(text: &str) -> String {
    let mut lines = clean_lines(text);
    if lines.len() == 1 {
        lines.remove(0)
    } else {
        lines.join(" ")
    }
}

/// What the cache has of a step, one line for each reason.
pub(super) fn explanation(cached: bool, reasons: &[String]) -> Vec<String> {
    let what = if cached { "cache hit" } else { "cache miss" };
    let reasons = reasons.iter();
    reasons
        .map(|reason| format!("{what}: {}", one_line(reason)))
        .collect()
}

/// The lines of `text` without control sequences; for messages.
pub(super) fn clean_lines(text: &str) -> Vec<String> {
    let mut joiner = LineJoiner::default();
    let mut lines = Vec::new();
    joiner.push(text, |line| lines.push(line.to_owned()));
    joiner.finish(|line| lines.push(line.to_owned()));
    lines
}

/// Seconds with one decimal, as BuildKit shows them.
pub(super) fn seconds(duration: Duration) -> String {
    format!("{:.1}s", duration.as_secs_f64())
}

/// A number of bytes in decimal units, as Docker shows it.
#[allow(clippy::cast_precision_loss, reason = "two decimals are shown")]
pub(super) fn bytes(count: u64) -> String {
    if count < 1000 {
        return format!("{count}B");
    }
    let mut value = count as f64 / 1e3;
    let mut units = ["kB", "MB", "GB", "TB", "PB"].into_iter();
    let mut unit = units.next().unwrap_or_default();
    for larger in units {
        // 999.995 would be shown as 1000.00.
        if value < 999.995 {
            break;
        }
        value /= 1e3;
        unit = larger;
    }
    format!("{value:.2}{unit}")
}

/// `done / total`, or `done` alone.
pub(super) fn transfer(done: u64, total: Option<u64>) -> String {
    match total {
        Some(total) => format!("{} / {}", bytes(done), bytes(total)),
        None => bytes(done),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(pieces: &[&str], expected: &[&str]) {
        let mut joiner = LineJoiner::default();
        let mut lines = Vec::new();
        for piece in pieces {
            joiner.push(piece, |line| lines.push(line.to_owned()));
        }
        joiner.finish(|line| lines.push(line.to_owned()));
        assert_eq!(lines, expected, "{pieces:?}");
    }

    #[test]
    fn pieces_become_lines() {
        check(&["a", "b\nc", "\n", "\n"], &["ab", "c", ""]);
        check(&["no end"], &["no end"]);
        check(&["a\r\nb\r", "\nc"], &["a", "b", "c"]);
        check(&["tab\tstays\n"], &["tab\tstays"]);
    }

    #[test]
    fn of_a_progress_bar_the_last_state_remains() {
        check(
            &["\r 10%", "\r 50%", "\r100%", "\ndone\n"],
            &["100%", "done"],
        );
        check(&["long text\rshort\n"], &["short"]);
        check(&["abX\u{8}c\n"], &["abc"]);
    }

    #[test]
    fn control_sequences_are_removed_also_when_torn() {
        check(&["\u{1b}[31mred\u{1b}[0m\n"], &["red"]);
        check(&["\u{1b}", "[3", "1mred\u{1b}[", "m\n"], &["red"]);
        check(
            &["\u{1b}]0;title\u{7}a\u{1b}]8;;http://x\u{1b}\\b\n"],
            &["ab"],
        );
        check(&["\u{1b}(Ba\u{1b}=b\u{1b}[?25lc\n"], &["abc"]);
        check(&["\u{9b}2Ka\u{0}\u{7}b\n"], &["ab"]);
        check(&["\u{1b}]never ended\nnext\n"], &["", "next"]);
    }

    #[test]
    fn a_line_without_end_is_shown_in_pieces() {
        let text = "x".repeat(LINE_LIMIT_BYTES + 1);
        check(&[&text], &[&"x".repeat(LINE_LIMIT_BYTES), "x"]);
    }

    #[test]
    fn names_are_one_line() {
        assert_eq!(one_line("RUN a\n\u{1b}[2Jb"), "RUN a b");
        assert_eq!(one_line(""), "");
    }

    #[test]
    fn numbers_are_shown_as_docker_shows_them() {
        for (count, expected) in [
            (0, "0B"),
            (999, "999B"),
            (1000, "1.00kB"),
            (29_536_000, "29.54MB"),
            (999_999_999, "1.00GB"),
            (u64::MAX, "18446.74PB"),
        ] {
            assert_eq!(bytes(count), expected);
        }
        assert_eq!(transfer(5, Some(1500)), "5B / 1.50kB");
        assert_eq!(seconds(Duration::from_millis(3449)), "3.4s");
    }
}
