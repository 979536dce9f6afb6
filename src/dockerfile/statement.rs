//! One logical line with its here-documents → one typed instruction.

use super::error::quoted;
use super::heredoc;
use super::json::{self, Json};
use super::lines::{Line, Slice};
use super::split::{self, FlagKind, Flags, RawFlag};
use super::{
    ArgDeclaration, CommandLine, Copy, Heredoc, Instruction, InstructionKind, KeyValue, Problem,
    Span, Stage, Word, suggest,
};

/// Every instruction, in capitals.
const NAMES: &[&str] = &[
    "ADD",
    "ARG",
    "CMD",
    "COPY",
    "ENTRYPOINT",
    "ENV",
    "EXPOSE",
    "FROM",
    "HEALTHCHECK",
    "LABEL",
    "MAINTAINER",
    "ONBUILD",
    "RUN",
    "SHELL",
    "STOPSIGNAL",
    "USER",
    "VOLUME",
    "WORKDIR",
];

const ADD_FLAGS: &[(&str, FlagKind)] = &[
    ("checksum", FlagKind::One),
    ("chmod", FlagKind::One),
    ("chown", FlagKind::One),
    ("exclude", FlagKind::Many),
    ("keep-git-dir", FlagKind::Switch),
    ("link", FlagKind::Switch),
    ("unpack", FlagKind::Switch),
];

const COPY_FLAGS: &[(&str, FlagKind)] = &[
    ("chmod", FlagKind::One),
    ("chown", FlagKind::One),
    ("exclude", FlagKind::Many),
    ("from", FlagKind::One),
    ("link", FlagKind::Switch),
    ("parents", FlagKind::Switch),
];

const FROM_FLAGS: &[(&str, FlagKind)] = &[("platform", FlagKind::One)];

/// What a line turned out to be.
#[derive(Debug)]
pub(super) enum Statement {
    /// `FROM`: a stage without instructions yet.
    From(Stage),
    /// Anything else.
    Other(Instruction),
}

/// The upper-case name of the instruction on `line`, if it is a known one.
pub(super) fn known_name(line: &Line, escape: char) -> Option<&'static str> {
    let split = split::split(line.slice(), escape);
    find_name(split.name.text())
}

/// Whether here-documents may follow `line`: `ADD`, `COPY` and `RUN`, also as triggers, but
/// not with a JSON array.
pub(super) fn may_have_heredocs(line: &Line, escape: char) -> bool {
    let mut split = split::split(line.slice(), escape);
    if find_name(split.name.text()) == Some("ONBUILD") && !split.args.is_empty() {
        split = split::split(split.args, escape);
    }
    matches!(find_name(split.name.text()), Some("ADD" | "COPY" | "RUN"))
        && json::parse_array(split.args.text()) == Json::Other
}

/// [`may_have_heredocs`] for the text of a line.
pub(super) fn may_have_heredocs_text(text: &str, escape: char) -> bool {
    may_have_heredocs(&Line::of(text), escape)
}

fn find_name(written: &str) -> Option<&'static str> {
    let mut names = NAMES.iter().copied();
    names.find(|name| name.eq_ignore_ascii_case(written))
}

/// Types an instruction, `line` of `source`. `None` if `problems` got longer.
pub(super) fn parse(
    source: &str,
    line: &Line,
    heredocs: Vec<Heredoc>,
    span: Span,
    escape: char,
    problems: &mut Vec<Problem>,
) -> Option<Statement> {
    Parser {
        source,
        escape,
        heredocs,
        span,
        problems,
    }
    .statement(line.slice())
}

/// Types one statement; `run` and `healthcheck` add to it.
pub(super) struct Parser<'p> {
    /// The text that spans refer to.
    pub(super) source: &'p str,
    escape: char,
    pub(super) heredocs: Vec<Heredoc>,
    /// The whole statement; where it starts is not where a trigger in it does.
    span: Span,
    pub(super) problems: &'p mut Vec<Problem>,
}

impl Parser<'_> {
    fn statement(&mut self, line: Slice<'_>) -> Option<Statement> {
        let split = split::split(line, self.escape);
        let before = self.problems.len();
        let Some(name) = find_name(split.name.text()) else {
            self.problems.push(unknown_instruction(split.name));
            return None;
        };
        let original = line.text().trim().to_owned();
        let span = Span {
            start: split.name.span().start,
            end: self.span.end,
        };
        let statement = if name == "FROM" {
            self.from(&split, span, original).map(Statement::From)
        } else {
            self.kind(name, line, &split).map(|kind| {
                Statement::Other(Instruction {
                    kind,
                    span,
                    original,
                })
            })
        };
        match statement {
            Ok(statement) => (self.problems.len() == before).then_some(statement),
            Err(problem) => {
                self.problems.push(problem);
                None
            }
        }
    }

    /// The flags of `raw`, checked; wrong ones become problems.
    pub(super) fn flags(
        &mut self,
        raw: &[RawFlag<'_>],
        name: &str,
        known: &[(&'static str, FlagKind)],
    ) -> Flags {
        split::check_flags(raw, name, known, self.problems)
    }

    fn from(
        &mut self,
        split: &split::Split<'_>,
        span: Span,
        original: String,
    ) -> Result<Stage, Problem> {
        let flags = self.flags(&split.flags, "FROM", FROM_FLAGS);
        let words = split.args.split_blanks();
        let (base, name) = match words.as_slice() {
            [base] => (base, None),
            [base, r#as, name] if r#as.text().eq_ignore_ascii_case("as") => (base, Some(name)),
            [_, r#as, _] => {
                return Err(Problem::new(
                    r#as.span(),
                    format!(
                        "FROM takes an image and optionally \"AS name\", not {}",
                        quoted(r#as.text())
                    ),
                ));
            }
            words => {
                return Err(Problem::new(
                    self.arguments_span(split),
                    format!(
                        "FROM takes an image and optionally \"AS name\": one or three \
                         arguments, not {}",
                        words.len()
                    ),
                ));
            }
        };
        let name = match name {
            None => None,
            Some(name) => {
                let mut word = name.word();
                word.raw = word.raw.to_lowercase();
                if !is_stage_name(&word.raw) {
                    return Err(Problem::new(
                        word.span,
                        format!(
                            "invalid stage name {}: it must begin with a letter and consist \
                             of letters, digits, \"-\", \"_\" and \".\"",
                            quoted(name.text())
                        ),
                    ));
                }
                Some(word)
            }
        };
        Ok(Stage {
            base: base.word(),
            name,
            platform: flags.non_empty("platform"),
            span,
            original,
            instructions: Vec::new(),
        })
    }

    fn kind(
        &mut self,
        name: &'static str,
        line: Slice<'_>,
        split: &split::Split<'_>,
    ) -> Result<InstructionKind, Problem> {
        let args = split.args;
        match name {
            "ADD" => Ok(InstructionKind::Add(self.copy(name, split)?)),
            "COPY" => Ok(InstructionKind::Copy(self.copy(name, split)?)),
            "RUN" => Ok(InstructionKind::Run(self.run(split)?)),
            "HEALTHCHECK" => Ok(InstructionKind::Healthcheck(self.healthcheck(split)?)),
            "ONBUILD" => self.onbuild(line, split),
            // BuildKit does not look at flags of these two: `ignored` tells of them.
            "ARG" => Ok(InstructionKind::Arg(self.arg(split)?)),
            "STOPSIGNAL" => Ok(InstructionKind::Stopsignal(
                self.one_argument(name, split)?.word(),
            )),
            _ => {
                self.flags(&split.flags, name, &[]);
                match name {
                    "CMD" => Ok(InstructionKind::Cmd(command(args)?)),
                    "ENTRYPOINT" => Ok(InstructionKind::Entrypoint(command(args)?)),
                    "ENV" => Ok(InstructionKind::Env(self.pairs(name, split)?)),
                    "LABEL" => Ok(InstructionKind::Label(self.pairs(name, split)?)),
                    "EXPOSE" => self.expose(split),
                    "SHELL" => self.shell(split),
                    "VOLUME" => self.volume(split),
                    "MAINTAINER" => {
                        let author = self.one_argument(name, split)?;
                        Ok(InstructionKind::Maintainer(author.text().to_owned()))
                    }
                    "USER" => Ok(InstructionKind::User(
                        self.one_argument(name, split)?.word(),
                    )),
                    _ => Ok(InstructionKind::Workdir(
                        self.one_argument(name, split)?.word(),
                    )),
                }
            }
        }
    }

    /// Where the arguments stand, or the name if there are none.
    fn arguments_span(&self, split: &split::Split<'_>) -> Span {
        if split.args.is_empty() {
            split.name.span()
        } else {
            split.args.span()
        }
    }

    fn one_argument<'a>(&self, name: &str, split: &split::Split<'a>) -> Result<Slice<'a>, Problem> {
        if split.args.is_empty() {
            return Err(Problem::new(
                split.name.span(),
                format!("{name} requires exactly one argument"),
            ));
        }
        Ok(split.args)
    }

    pub(super) fn at_least_one(&self, name: &str, split: &split::Split<'_>) -> Problem {
        Problem::new(
            split.name.span(),
            format!("{name} requires at least one argument"),
        )
    }

    fn copy(&mut self, name: &str, split: &split::Split<'_>) -> Result<Copy, Problem> {
        let known = if name == "ADD" { ADD_FLAGS } else { COPY_FLAGS };
        let flags = self.flags(&split.flags, name, known);
        let mut words = list(split.args)?;
        let Some(destination) = words.pop().filter(|_| !words.is_empty()) else {
            return Err(Problem::new(
                self.arguments_span(split),
                format!("{name} requires at least two arguments: sources, then a destination"),
            ));
        };
        let announced = |word: &Word| heredoc::announced(&word.raw).ok().flatten();
        if announced(&destination).is_some() {
            return Err(Problem::new(
                destination.span,
                format!("{name} cannot accept a here-document as a destination"),
            ));
        }
        let mut sources = Vec::new();
        let mut heredocs = Vec::new();
        for word in words {
            let Some(announced) = announced(&word) else {
                sources.push(word);
                continue;
            };
            // Of several with one name the last one's content is everybody's.
            let with_name = self
                .heredocs
                .iter()
                .rev()
                .find(|h| h.name == announced.name);
            heredocs.push(Heredoc {
                content: with_name.map(|h| h.content.clone()).unwrap_or_default(),
                span: with_name.map_or(word.span, |h| h.span),
                name: announced.name,
                file_descriptor: announced.file_descriptor,
                expand: announced.expand,
                chomp: announced.chomp,
            });
        }
        Ok(Copy {
            sources,
            heredocs,
            destination,
            from: flags.non_empty("from"),
            chown: flags.non_empty("chown"),
            chmod: flags.non_empty("chmod"),
            link: flags.switch("link").unwrap_or(false),
            parents: flags.switch("parents").unwrap_or(false),
            excludes: flags.many("exclude"),
            checksum: flags.non_empty("checksum"),
            keep_git_dir: flags.switch("keep-git-dir"),
            unpack: flags.switch("unpack"),
            flags: flags.places,
        })
    }

    fn onbuild(
        &mut self,
        line: Slice<'_>,
        split: &split::Split<'_>,
    ) -> Result<InstructionKind, Problem> {
        if split.args.is_empty() {
            return Err(self.at_least_one("ONBUILD", split));
        }
        self.flags(&split.flags, "ONBUILD", &[]);
        let inner = split::split(split.args, self.escape).name;
        match find_name(inner.text()) {
            Some("ONBUILD") => {
                return Err(Problem::new(
                    inner.span(),
                    "chaining ONBUILD with ONBUILD ONBUILD is not allowed",
                ));
            }
            Some(name @ ("FROM" | "MAINTAINER")) => {
                return Err(Problem::new(
                    inner.span(),
                    format!("{name} is not allowed as an ONBUILD trigger"),
                ));
            }
            _ => {}
        }
        let written = line.text().trim_start();
        let mut expression = written[split.name.text().len()..]
            .trim_start_matches([' ', '\t', '\r', '\n', '\x0c'])
            .to_owned();
        for heredoc in &self.heredocs {
            expression.push('\n');
            expression.push_str(&heredoc.content);
            expression.push_str(&heredoc.name);
        }
        match self.statement(split.args) {
            Some(Statement::Other(trigger)) => Ok(InstructionKind::Onbuild {
                expression,
                trigger: Box::new(trigger),
            }),
            // Its problems are in the list already.
            _ => Err(self
                .problems
                .pop()
                .unwrap_or_else(|| Problem::new(inner.span(), "invalid ONBUILD trigger"))),
        }
    }

    fn arg(&self, split: &split::Split<'_>) -> Result<Vec<ArgDeclaration>, Problem> {
        let words = split::quoted_words(split.args, self.escape);
        if words.is_empty() {
            return Err(self.at_least_one("ARG", split));
        }
        words
            .iter()
            .map(|word| match word.pair() {
                Some((name, _)) if name.raw.is_empty() => {
                    Err(Problem::new(word.span(), "ARG names can not be blank"))
                }
                Some((name, default)) => Ok(ArgDeclaration {
                    name,
                    default: Some(default),
                }),
                None => Ok(ArgDeclaration {
                    name: word.whole(),
                    default: None,
                }),
            })
            .collect()
    }

    /// The pairs of `ENV` and `LABEL`.
    fn pairs(&self, name: &str, split: &split::Split<'_>) -> Result<Vec<KeyValue>, Problem> {
        let words = split::quoted_words(split.args, self.escape);
        let Some(first) = words.first() else {
            return Err(self.at_least_one(name, split));
        };
        if !first.text().contains('=') {
            let Some((key, value)) = split.args.split_once_blank() else {
                return Err(Problem::new(
                    first.span(),
                    format!("{name} must have two arguments: {name} name=value"),
                ));
            };
            return Ok(vec![KeyValue {
                key: key.word(),
                value: value.word(),
                legacy: true,
            }]);
        }
        words
            .iter()
            .map(|word| match word.pair() {
                None => Err(Problem::new(
                    word.span(),
                    format!(
                        "can't find \"=\" in {}: {name} takes name=value",
                        quoted(word.text())
                    ),
                )),
                Some((key, _)) if key.raw.is_empty() => Err(Problem::new(
                    word.span(),
                    format!("{name} names can not be blank"),
                )),
                Some((key, value)) => Ok(KeyValue {
                    key,
                    value,
                    legacy: false,
                }),
            })
            .collect()
    }

    fn expose(&self, split: &split::Split<'_>) -> Result<InstructionKind, Problem> {
        let mut ports: Vec<Word> = split.args.split_blanks().iter().map(|s| s.word()).collect();
        if ports.is_empty() {
            return Err(self.at_least_one("EXPOSE", split));
        }
        // BuildKit sorts them before anything is expanded, and the history shows it.
        ports.sort_by(|a, b| a.raw.cmp(&b.raw));
        Ok(InstructionKind::Expose(ports))
    }

    fn shell(&self, split: &split::Split<'_>) -> Result<InstructionKind, Problem> {
        match command(split.args)? {
            CommandLine::Exec(words) if !words.is_empty() => Ok(InstructionKind::Shell(words)),
            CommandLine::Shell(text) if !text.is_empty() => Err(Problem::new(
                split.args.span(),
                "SHELL requires the arguments to be in JSON form, such as [\"/bin/sh\", \"-c\"]",
            )),
            _ => Err(self.at_least_one("SHELL", split)),
        }
    }

    fn volume(&self, split: &split::Split<'_>) -> Result<InstructionKind, Problem> {
        let mut words = list(split.args)?;
        if words.is_empty() {
            return Err(self.at_least_one("VOLUME", split));
        }
        for word in &mut words {
            let trimmed = word.raw.trim();
            if trimmed.is_empty() {
                return Err(Problem::new(
                    word.span,
                    "a path of VOLUME can not be an empty string",
                ));
            }
            if trimmed.len() < word.raw.len() {
                word.raw = trimmed.to_owned();
            }
        }
        Ok(InstructionKind::Volume(words))
    }
}

fn unknown_instruction(name: Slice<'_>) -> Problem {
    if name.is_empty() {
        return Problem::new(name.span(), "a continued line without an instruction");
    }
    let written = name.text();
    let problem = Problem::new(
        name.span(),
        format!("unknown instruction {}", quoted(written)),
    );
    match suggest::nearest(&written.to_uppercase(), NAMES) {
        Some(near) => problem.with_hint(format!("did you mean {near:?}?")),
        None => problem,
    }
}

/// `name` must be in lower case already.
fn is_stage_name(name: &str) -> bool {
    name.starts_with(|c: char| c.is_ascii_lowercase())
        && name
            .bytes()
            .all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' | b'.'))
}

/// Exec form if `args` is a JSON array, shell form otherwise.
pub(super) fn command(args: Slice<'_>) -> Result<CommandLine, Problem> {
    match json::parse_array(args.text()) {
        Json::Strings(words) => Ok(CommandLine::Exec(
            words.into_iter().map(|(word, _)| word).collect(),
        )),
        Json::NotStrings(at) => Err(not_strings(args, at)),
        Json::Other => Ok(CommandLine::Shell(args.text().to_owned())),
    }
}

/// The elements if `args` is a JSON array, the words otherwise.
fn list(args: Slice<'_>) -> Result<Vec<Word>, Problem> {
    match json::parse_array(args.text()) {
        Json::Strings(words) => Ok(words
            .into_iter()
            .map(|(raw, range)| Word {
                raw,
                span: args.span_of(range),
            })
            .collect()),
        Json::NotStrings(at) => Err(not_strings(args, at)),
        Json::Other => Ok(args.split_blanks().iter().map(|s| s.word()).collect()),
    }
}

fn not_strings(args: Slice<'_>, at: usize) -> Problem {
    let span = args.span_of(at..args.text().len());
    Problem::new(
        span,
        "when using JSON array syntax, arrays must be comprised of strings only",
    )
}

#[cfg(test)]
mod tests {
    use super::super::lines::Reader;
    use super::*;

    fn parsed(text: &str) -> Result<Statement, Vec<String>> {
        let line = Reader::new(text, '\\').logical().unwrap();
        let mut problems = Vec::new();
        parse(text, &line, Vec::new(), line.span, '\\', &mut problems).ok_or_else(|| {
            let place = |span: Span| &text[span.start..span.end];
            let problems = problems.iter();
            problems
                .map(|p| format!("{}| {}", place(p.span), p.message))
                .collect()
        })
    }

    fn kind(text: &str) -> InstructionKind {
        match parsed(text) {
            Ok(Statement::Other(instruction)) => instruction.kind,
            other => panic!("{text}: {other:?}"),
        }
    }

    #[test]
    fn json_or_shell() {
        let exec = |words: &[&str]| {
            CommandLine::Exec(words.iter().map(|word| (*word).to_owned()).collect())
        };
        let shell = |text: &str| CommandLine::Shell(text.to_owned());
        let check = |args: &str, expected: CommandLine| {
            let cmd = kind(&format!("CMD {args}"));
            assert_eq!(cmd, InstructionKind::Cmd(expected.clone()), "{args}");
            let entrypoint = kind(&format!("ENTRYPOINT {args}"));
            assert_eq!(entrypoint, InstructionKind::Entrypoint(expected), "{args}");
        };
        check("[\"a\", \"b c\"]", exec(&["a", "b c"]));
        check("[]", exec(&[]));
        check("['a']", shell("['a']"));
        check("[\"a\"] b", shell("[\"a\"] b"));
        check("[ -f x ] && y", shell("[ -f x ] && y"));
        check("", shell(""));
        check("  a   b  ", shell("a   b"));
        assert_eq!(
            parsed("CMD [\"a\", 1]").unwrap_err(),
            ["1]| when using JSON array syntax, arrays must be comprised of strings only"]
        );
    }

    #[test]
    fn stages_are_named() {
        let check = |text: &str, expected: Option<&str>| {
            let Ok(Statement::From(stage)) = parsed(text) else {
                panic!("{text}");
            };
            assert_eq!(
                stage.name.map(|name| name.raw).as_deref(),
                expected,
                "{text}"
            );
        };
        check("FROM a", None);
        check("from a As B.c-1_", Some("b.c-1_"));
        for name in ["1a", "a$b", "_a", "ä", "-", "a/b"] {
            let text = format!("FROM a AS {name}");
            assert_eq!(
                parsed(&text).unwrap_err(),
                [format!(
                    "{name}| invalid stage name {name:?}: it must begin with a letter and \
                     consist of letters, digits, \"-\", \"_\" and \".\""
                )]
            );
        }
    }

    #[test]
    fn names_of_stages_and_pairs_keep_their_raw_text() {
        let pairs = |text: &str| -> Vec<(String, String, bool)> {
            let InstructionKind::Env(pairs) = kind(text) else {
                panic!("{text}");
            };
            let pairs = pairs.into_iter();
            pairs
                .map(|pair| (pair.key.raw, pair.value.raw, pair.legacy))
                .collect()
        };
        let new = |key: &str, value: &str| (key.to_owned(), value.to_owned(), false);
        let old = |key: &str, value: &str| (key.to_owned(), value.to_owned(), true);
        assert_eq!(
            pairs("ENV a=1 $b=\"x y\" c= d='=' e=\\ f"),
            [
                new("a", "1"),
                new("$b", "\"x y\""),
                new("c", ""),
                new("d", "'='"),
                new("e", "\\ f")
            ]
        );
        assert_eq!(pairs("ENV a  b=c \"d\"  e"), [old("a", "b=c \"d\"  e")]);
        assert_eq!(pairs("ENV \"a b\" c=d"), [old("\"a", "b\" c=d")]);
    }

    #[test]
    fn heredocs_may_follow_only_where_they_mean_something() {
        let check = |text: &str, expected: bool| {
            let line = Reader::new(text, '\\').logical().unwrap();
            assert_eq!(may_have_heredocs(&line, '\\'), expected, "{text}");
        };
        check("RUN x <<E", true);
        check("copy --from=x <<E y", true);
        check("ADD <<E y", true);
        check("ONBUILD RUN <<E", true);
        check("ONBUILD ONBUILD RUN <<E", false);
        check("RUN [\"<<E\"]", false);
        check("ONBUILD RUN [\"<<E\"]", false);
        check("CMD <<E", false);
        check("ENV a=<<E", false);
    }
}
