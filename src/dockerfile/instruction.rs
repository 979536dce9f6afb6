//! Typed instructions, as written: variables stay unexpanded.
//!
//! Everything that the author wrote and that may matter later carries its
//! [`Span`]. Texts in which variables are expanded are [`Word`]s: the raw text
//! with its quotes and escapes, as [`super::expand`] takes it.
//!
//! <https://docs.docker.com/reference/dockerfile/>

use std::fmt;
use std::ops::Range;

use super::Check;

/// A range of bytes in the Dockerfile's text.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Span {
    /// The first byte.
    pub start: usize,
    /// One past the last byte.
    pub end: usize,
}

impl fmt::Debug for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}..{}", self.start, self.end)
    }
}

/// A text in which variables, quotes and escapes have not been processed yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Word {
    /// The text, continuation lines already joined.
    pub raw: String,
    /// Where it stands.
    pub span: Span,
}

impl Word {
    /// Where the bytes `range` of [`Self::raw`] stand in `text`, which the word is from; all
    /// of the word where quotes, escapes or continuation lines make that unclear.
    pub fn span_of(&self, text: &str, range: Range<usize>) -> Span {
        let Some(part) = self.raw.get(range.clone()) else {
            return self.span;
        };
        let source = text.get(self.span.start..self.span.end).unwrap_or_default();
        let at = if source == self.raw {
            range.start
        } else {
            match (source.find(part), source.rfind(part)) {
                (Some(first), Some(last)) if first == last => first,
                _ => return self.span,
            }
        };
        let start = self.span.start + at;
        Span {
            start,
            end: start + part.len(),
        }
    }
}

/// A parsed Dockerfile.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dockerfile {
    /// The name for messages, such as `Dockerfile`.
    pub name: String,
    /// The whole text that spans refer to.
    pub text: String,
    /// The parser directives at its top.
    pub directives: Directives,
    /// `ARG` instructions before the first `FROM`.
    pub global_args: Vec<Instruction>,
    /// The stages; at least one.
    pub stages: Vec<Stage>,
}

/// Parser directives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Directives {
    /// `# syntax=`: a hint about the version, never fetched or executed.
    pub syntax: Option<Word>,
    /// `# escape=`: `\` or `` ` ``.
    pub escape: char,
    /// `# check=`: the raw value.
    pub check: Option<Word>,
    /// What [`Self::check`] says, or the default.
    pub check_options: Check,
}

/// A stage: `FROM` and what follows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stage {
    /// The image or stage it starts from.
    pub base: Word,
    /// `AS name`, in lower case.
    pub name: Option<Word>,
    /// `--platform=`.
    pub platform: Option<Word>,
    /// The `FROM` instruction.
    pub span: Span,
    /// The instruction's text as history and progress show it.
    pub original: String,
    /// The instructions that follow.
    pub instructions: Vec<Instruction>,
}

/// One instruction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Instruction {
    /// What it is.
    pub kind: InstructionKind,
    /// The whole instruction, here-documents included.
    pub span: Span,
    /// Its text as BuildKit keeps it: continuation lines joined, comments gone,
    /// here-documents not included.
    pub original: String,
}

/// What an instruction is, with its arguments.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum InstructionKind {
    /// `ADD`.
    Add(Copy),
    /// `ARG NAME[=VALUE] …`.
    Arg(Vec<ArgDeclaration>),
    /// `CMD`.
    Cmd(CommandLine),
    /// `COPY`.
    Copy(Copy),
    /// `ENTRYPOINT`.
    Entrypoint(CommandLine),
    /// `ENV NAME=VALUE …` or `ENV NAME VALUE`.
    Env(Vec<KeyValue>),
    /// `EXPOSE`, sorted as BuildKit does before anything is expanded.
    Expose(Vec<Word>),
    /// `HEALTHCHECK`.
    Healthcheck(Healthcheck),
    /// `LABEL NAME=VALUE …` or `LABEL NAME VALUE`.
    Label(Vec<KeyValue>),
    /// `MAINTAINER`.
    Maintainer(String),
    /// `ONBUILD`: the trigger's text as the image config keeps it, and the trigger parsed.
    Onbuild {
        /// Kept in the image.
        expression: String,
        /// Checked now, executed in images built on this one.
        trigger: Box<Instruction>,
    },
    /// `RUN`.
    Run(Run),
    /// `SHELL`.
    Shell(Vec<String>),
    /// `STOPSIGNAL`.
    Stopsignal(Word),
    /// `USER`.
    User(Word),
    /// `VOLUME`.
    Volume(Vec<Word>),
    /// `WORKDIR`.
    Workdir(Word),
}

/// A `NAME=VALUE` pair; names are words too (`ENV $A=b` expands both).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyValue {
    /// Left of the `=`.
    pub key: Word,
    /// Right of the `=`.
    pub value: Word,
    /// Whether this is the old `ENV NAME VALUE` form without `=`.
    pub legacy: bool,
}

/// One name of an `ARG`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ArgDeclaration {
    /// The name; may itself hold variables.
    pub name: Word,
    /// The default, where there is a `=`.
    pub default: Option<Word>,
}

/// A here-document.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Heredoc {
    /// The delimiter, without quotes.
    pub name: String,
    /// The file descriptor before `<<`; 0 where none was given.
    pub file_descriptor: u32,
    /// Whether variables in the content are expanded (the delimiter was not quoted).
    pub expand: bool,
    /// Whether leading tabs are removed (`<<-`); `content` still has them.
    pub chomp: bool,
    /// The lines between, each with its line end.
    pub content: String,
    /// Where the content stands.
    pub span: Span,
}

/// What `RUN`, `CMD`, `ENTRYPOINT` and `HEALTHCHECK CMD` run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CommandLine {
    /// Arguments, from a JSON array. May be empty for `CMD []`.
    Exec(Vec<String>),
    /// One command line for the shell, as written after the instruction's name and flags.
    Shell(String),
}

/// `RUN`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run {
    /// What runs; never an empty [`CommandLine::Exec`]. With here-documents this is the
    /// line before them.
    pub command: CommandLine,
    /// Here-documents in the order of their `<<`.
    pub heredocs: Vec<Heredoc>,
    /// `--mount=`, each a raw comma-separated list.
    pub mounts: Vec<Word>,
    /// `--network=`.
    pub network: Option<Word>,
    /// `--security=`.
    pub security: Option<Word>,
    /// `--device=`.
    pub devices: Vec<Word>,
}

/// `COPY` or `ADD`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Copy {
    /// Sources that are paths or URLs.
    pub sources: Vec<Word>,
    /// Sources that are here-documents, each with the file's name.
    pub heredocs: Vec<Heredoc>,
    /// The destination.
    pub destination: Word,
    /// `--from=`; `COPY` only.
    pub from: Option<Word>,
    /// `--chown=`.
    pub chown: Option<Word>,
    /// `--chmod=`.
    pub chmod: Option<Word>,
    /// `--link`; false also where it is absent.
    pub link: bool,
    /// `--parents`; `COPY` only.
    pub parents: bool,
    /// `--exclude=`.
    pub excludes: Vec<Word>,
    /// `--checksum=`; `ADD` only.
    pub checksum: Option<Word>,
    /// `--keep-git-dir`; `ADD` only.
    pub keep_git_dir: Option<bool>,
    /// `--unpack`; `ADD` only. Absent is not the same as false.
    pub unpack: Option<bool>,
    /// Where each flag that was written stands, by its name without dashes.
    pub flags: Vec<(String, Span)>,
}

/// `HEALTHCHECK`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Healthcheck {
    /// `HEALTHCHECK NONE`.
    None,
    /// `HEALTHCHECK [OPTIONS] CMD …`. Durations are nanoseconds; 0 is the default.
    Cmd {
        /// What runs.
        command: CommandLine,
        /// `--interval=`.
        interval: i64,
        /// `--timeout=`.
        timeout: i64,
        /// `--start-period=`.
        start_period: i64,
        /// `--start-interval=`.
        start_interval: i64,
        /// `--retries=`.
        retries: i64,
    },
}

impl InstructionKind {
    /// The instruction's name, in capitals.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Add(_) => "ADD",
            Self::Arg(_) => "ARG",
            Self::Cmd(_) => "CMD",
            Self::Copy(_) => "COPY",
            Self::Entrypoint(_) => "ENTRYPOINT",
            Self::Env(_) => "ENV",
            Self::Expose(_) => "EXPOSE",
            Self::Healthcheck(_) => "HEALTHCHECK",
            Self::Label(_) => "LABEL",
            Self::Maintainer(_) => "MAINTAINER",
            Self::Onbuild { .. } => "ONBUILD",
            Self::Run(_) => "RUN",
            Self::Shell(_) => "SHELL",
            Self::Stopsignal(_) => "STOPSIGNAL",
            Self::User(_) => "USER",
            Self::Volume(_) => "VOLUME",
            Self::Workdir(_) => "WORKDIR",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_of_words_are_found() {
        let check = |source: &str, raw: &str, part: &str, expected: &str| {
            let text = format!("RUN {source} x");
            let word = Word {
                raw: raw.to_owned(),
                span: Span {
                    start: 4,
                    end: 4 + source.len(),
                },
            };
            let at = raw.find(part).unwrap();
            let span = word.span_of(&text, at..at + part.len());
            assert_eq!(&text[span.start..span.end], expected, "{source}");
        };
        check("a=b,c=d", "a=b,c=d", "c=d", "c=d");
        check("\"a=b,c=d\"", "a=b,c=d", "c=d", "c=d");
        check("a\\ b,c", "a b,c", "c", "c");
        // In two places, or in none.
        check("'a a,b'", "a a,b", "a", "'a a,b'");
        check("a\\ b,c", "a b,c", "a b", "a\\ b,c");
        let word = Word {
            raw: "a".to_owned(),
            span: Span { start: 0, end: 1 },
        };
        assert_eq!(word.span_of("", 0..1), word.span);
        assert_eq!(word.span_of("a", 0..9), word.span);
    }
}
