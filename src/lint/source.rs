//! Where each instruction stands in lines, and which comments stand above it.

use super::options::directive;
use crate::dockerfile::{Dockerfile, Span};

/// Lines of a Dockerfile, counted from 1, the last one included.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Lines {
    /// The first.
    pub first: usize,
    /// The last.
    pub last: usize,
}

/// An instruction's surroundings.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Placed {
    /// Its lines, here-documents included.
    pub lines: Lines,
    /// The column of its name in its first line, in characters from 1.
    pub column: usize,
    /// The comments above it, without `#` and blanks; an empty one ends what belongs to it.
    pub comments: Vec<String>,
    /// The last line of what continuation characters join, where there is an empty one in it.
    pub empty_continuation: Option<usize>,
}

impl Placed {
    /// What the comments say of `name`: the rest of the first that begins with it.
    pub fn description(&self, name: &str) -> &str {
        if name.is_empty() {
            return "";
        }
        let rest = |comment: &'_ str| comment.strip_prefix(name)?.strip_prefix(' ').map(str::len);
        (self.comments.iter())
            .find_map(|comment| Some(&comment[comment.len() - rest(comment)?..]))
            .unwrap_or_default()
    }
}

/// The surroundings of all instructions of a Dockerfile.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Source {
    /// Those before the first `FROM`.
    pub global_args: Vec<Placed>,
    /// For each stage: its `FROM`, then its instructions.
    pub stages: Vec<(Placed, Vec<Placed>)>,
}

impl Source {
    /// Reads the lines of `dockerfile`.
    pub fn of(dockerfile: &Dockerfile) -> Self {
        let mut scanner = Scanner {
            text: &dockerfile.text,
            at: 0,
            line: 0,
            escape: dockerfile.directives.escape,
            comments: Vec::new(),
            in_directives: true,
        };
        let global_args = dockerfile.global_args.iter();
        Self {
            global_args: global_args.map(|i| scanner.statement(i.span)).collect(),
            stages: (dockerfile.stages.iter())
                .map(|stage| {
                    let from = scanner.statement(stage.span);
                    let instructions = stage.instructions.iter();
                    let placed = instructions.map(|i| scanner.statement(i.span)).collect();
                    (from, placed)
                })
                .collect(),
        }
    }
}

struct Scanner<'t> {
    text: &'t str,
    at: usize,
    /// The line read last.
    line: usize,
    escape: char,
    comments: Vec<String>,
    /// Whether parser directives may still follow.
    in_directives: bool,
}

impl<'t> Scanner<'t> {
    /// The next line without its line end.
    fn next(&mut self) -> Option<&'t str> {
        let rest = self.text.get(self.at..).filter(|rest| !rest.is_empty())?;
        let length = rest.find('\n').map_or(rest.len(), |at| at + 1);
        self.at += length;
        self.line += 1;
        Some(rest[..length].trim_end_matches(['\r', '\n']))
    }

    /// The next statement, which ends at the end of `span`.
    fn statement(&mut self, span: Span) -> Placed {
        let mut placed = Placed::default();
        while let Some(line) = self.next() {
            let body = line.trim_start();
            if body.starts_with('#') {
                self.comment(line, body);
                continue;
            }
            self.in_directives = false;
            if body.is_empty() {
                continue;
            }
            placed.lines.first = self.line;
            placed.column = line[..line.len() - body.len()].chars().count() + 1;
            self.continuations(body, &mut placed);
            break;
        }
        // Here-documents.
        while self.at < span.end && self.next().is_some() {}
        placed.lines.last = self.line;
        placed.comments = std::mem::take(&mut self.comments);
        placed
    }

    fn comment(&mut self, line: &str, body: &str) {
        let is_directive = body.strip_prefix('#').and_then(directive).is_some();
        if self.in_directives && is_directive {
            return;
        }
        self.in_directives = false;
        // BuildKit takes away the line's first character, whichever that is: an indented
        // comment keeps its `#` and so describes nothing.
        let mut chars = line.chars();
        chars.next();
        match chars.as_str().trim() {
            "" => self.comments.clear(),
            comment => self.comments.push(comment.to_owned()),
        }
    }

    /// Reads on as long as lines are continued.
    fn continuations(&mut self, first: &str, placed: &mut Placed) {
        let mut continued = self.is_continued(first);
        let mut has_empty = false;
        while continued && let Some(line) = self.next() {
            match line.trim_start() {
                "" => has_empty = true,
                body if body.starts_with('#') => {}
                _ => continued = self.is_continued(line),
            }
        }
        placed.empty_continuation = has_empty.then_some(self.line);
    }

    fn is_continued(&self, line: &str) -> bool {
        let before = line.trim_end_matches([' ', '\t']).strip_suffix(self.escape);
        before.is_some_and(|before| !before.ends_with(self.escape))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dockerfile;

    fn source(text: &str) -> Source {
        Source::of(&dockerfile::parse("Dockerfile", text.as_bytes()).unwrap())
    }

    fn placed(first: usize, last: usize, column: usize, comments: &[&str]) -> Placed {
        Placed {
            lines: Lines { first, last },
            column,
            comments: comments.iter().map(|c| (*c).to_owned()).collect(),
            empty_continuation: None,
        }
    }

    #[test]
    fn instructions_have_lines_and_comments() {
        let text = "# check=skip=all\n# syntax=x\n# A is one\n\nARG A\n\n  FROM x AS y\n# gone\n#\n\
                    # kept\n # indented\nRUN a \\\n# inside\n  b\nCOPY <<E <<F /\na\nE\nb\nF\n\
                    RUN c \\\n\n";
        let found = source(text);
        assert_eq!(found.global_args, [placed(5, 5, 1, &["A is one"])]);
        let (from, instructions) = &found.stages[0];
        assert_eq!(*from, placed(7, 7, 3, &[]));
        assert_eq!(
            instructions[..2],
            [
                placed(12, 14, 1, &["kept", "# indented"]),
                placed(15, 19, 1, &[])
            ]
        );
        assert_eq!(
            instructions[2].lines,
            Lines {
                first: 20,
                last: 21
            }
        );
        assert_eq!(instructions[2].empty_continuation, Some(21));
    }

    #[test]
    fn after_another_comment_no_directive_follows() {
        let found = source("# words\n# check=skip=all\nFROM x\n");
        assert_eq!(found.stages[0].0.comments, ["words", "check=skip=all"]);
        let found = source("#!/bin/x\n# escape=`\nFROM x\n");
        assert_eq!(found.stages[0].0.comments, ["!/bin/x", "escape=`"]);
    }

    #[test]
    fn a_description_begins_with_the_name() {
        let placed = placed(1, 1, 1, &["foo", "foobar x", "foo is it", "foo again"]);
        assert_eq!(placed.description("foo"), "is it");
        assert_eq!(placed.description("bar"), "");
        assert_eq!(placed.description(""), "");
    }
}
