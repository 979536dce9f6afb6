//! A logical line → name, flags, arguments; and arguments → quoted words.

use std::ops::Range;

use super::error::quoted;
use super::lines::Slice;
use super::{Problem, Span, Word, suggest};

/// A logical line taken apart.
#[derive(Debug)]
pub(super) struct Split<'a> {
    /// The instruction's name as written.
    pub(super) name: Slice<'a>,
    /// What begins with `--` after it.
    pub(super) flags: Vec<RawFlag<'a>>,
    /// The rest, without white space at its ends.
    pub(super) args: Slice<'a>,
}

/// A flag as written, `--name` or `--name=value`.
#[derive(Debug)]
pub(super) struct RawFlag<'a> {
    /// Quotes and escapes are processed.
    text: String,
    /// For every byte of `text`, where it stands in `slice`.
    places: Vec<usize>,
    slice: Slice<'a>,
}

/// Takes `line` apart.
///
/// Differs from BuildKit in text that is not ASCII: that goes through its flags byte by
/// byte and comes out garbled.
pub(super) fn split(line: Slice<'_>, escape: char) -> Split<'_> {
    let line = line.trim();
    let Some((name, rest)) = line.split_once_blank() else {
        let end = line.text().len();
        return Split {
            name: line,
            flags: Vec::new(),
            args: line.get(end..end),
        };
    };
    let text = rest.text();
    let mut flags = Vec::new();
    let mut at = 0;
    loop {
        at = text.len() - text[at..].trim_start().len();
        if !text[at..].starts_with("--") {
            break;
        }
        let (flag, end) = raw_flag(rest, at, escape);
        at = end;
        if flag.text == "--" {
            break;
        }
        flags.push(flag);
    }
    Split {
        name,
        flags,
        args: rest.get(at..text.len()).trim(),
    }
}

/// Reads the flag at `start` of `rest`, up to unquoted white space.
fn raw_flag(rest: Slice<'_>, start: usize, escape: char) -> (RawFlag<'_>, usize) {
    let whole = rest.text();
    let mut text = String::new();
    let mut places = Vec::new();
    let mut push = |c: char, at: usize| {
        text.push(c);
        places.extend((0..c.len_utf8()).map(|i| at - start + i));
    };
    let mut quote = None;
    let mut end = whole.len();
    let mut chars = whole[start..].char_indices().map(|(i, c)| (start + i, c));
    while let Some((at, c)) = chars.next() {
        if c == escape {
            // At the very end it vanishes.
            if let Some((at, c)) = chars.next() {
                push(c, at);
            }
        } else if quote == Some(c) {
            quote = None;
        } else if quote.is_none() && matches!(c, '\'' | '"') {
            quote = Some(c);
        } else if quote.is_none() && c.is_whitespace() {
            end = at;
            break;
        } else {
            push(c, at);
        }
    }
    let flag = RawFlag {
        text,
        places,
        slice: rest.get(start..end),
    };
    (flag, end)
}

/// What values a flag takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FlagKind {
    /// None, `true` or `false`.
    Switch,
    /// One.
    One,
    /// One each time it is given.
    Many,
}

/// The flags of one instruction, checked.
#[derive(Debug, Default)]
pub(super) struct Flags {
    list: Vec<(&'static str, Word)>,
    /// Name and place of each.
    pub(super) places: Vec<(String, Span)>,
}

impl Flags {
    /// The value of a [`FlagKind::One`].
    pub(super) fn one(&self, name: &str) -> Option<Word> {
        self.many(name).pop()
    }

    /// The value of a [`FlagKind::One`] whose empty value means that it is not given.
    pub(super) fn non_empty(&self, name: &str) -> Option<Word> {
        self.one(name).filter(|word| !word.raw.is_empty())
    }

    /// The values of a [`FlagKind::Many`].
    pub(super) fn many(&self, name: &str) -> Vec<Word> {
        let with_name = self.list.iter().filter(|(n, _)| *n == name);
        with_name.map(|(_, word)| word.clone()).collect()
    }

    /// The value of a [`FlagKind::Switch`].
    pub(super) fn switch(&self, name: &str) -> Option<bool> {
        let value = self.one(name)?;
        Some(!value.raw.eq_ignore_ascii_case("false"))
    }
}

/// Checks `raw` against the flags that `instruction` takes.
pub(super) fn check_flags(
    raw: &[RawFlag<'_>],
    instruction: &str,
    known: &[(&'static str, FlagKind)],
    problems: &mut Vec<Problem>,
) -> Flags {
    let mut flags = Flags::default();
    let mut seen = vec![false; known.len()];
    for flag in raw {
        let span = flag.slice.span();
        let (written, value) = match flag.text.split_once('=') {
            Some((name, value)) => (name, Some(value)),
            None => (flag.text.as_str(), None),
        };
        let name = written.strip_prefix("--").unwrap_or(written);
        let Some(index) = known.iter().position(|(known, _)| *known == name) else {
            problems.push(unknown_flag(flag, written, name, instruction, known));
            continue;
        };
        let (name, kind) = known[index];
        if std::mem::replace(&mut seen[index], true) && kind != FlagKind::Many {
            problems.push(Problem::new(
                span,
                format!("duplicate flag --{name}: {instruction} takes it once"),
            ));
            continue;
        }
        let value_start = flag.text.len() - value.map_or(0, str::len);
        let value_span = flag.span_of(value_start..flag.text.len());
        let problem = match (kind, value) {
            (FlagKind::Switch, Some("")) | (FlagKind::One | FlagKind::Many, None) => Some(
                Problem::new(span, format!("flag --{name} of {instruction} has no value")),
            ),
            (FlagKind::Switch, Some(value))
                if !["true", "false"].contains(&value.to_ascii_lowercase().as_str()) =>
            {
                Some(Problem::new(
                    value_span,
                    format!(
                        "flag --{name} of {instruction} is true or false, not {}",
                        quoted(value)
                    ),
                ))
            }
            _ => None,
        };
        if let Some(problem) = problem {
            problems.push(problem);
            continue;
        }
        flags.places.push((name.to_owned(), span));
        let word = Word {
            raw: value.unwrap_or_default().to_owned(),
            span: value_span,
        };
        flags.list.push((name, word));
    }
    flags
}

fn unknown_flag(
    flag: &RawFlag<'_>,
    written: &str,
    name: &str,
    instruction: &str,
    known: &[(&'static str, FlagKind)],
) -> Problem {
    let names: Vec<&str> = known.iter().map(|(name, _)| *name).collect();
    let accepted = match names.as_slice() {
        [] => format!("{instruction} takes no flags"),
        [name] => format!("{instruction} takes --{name} only"),
        names => format!("{instruction} takes --{}", names.join(", --")),
    };
    let span = flag.span_of(0..written.len());
    let problem = Problem::new(
        span,
        format!("unknown flag {}: {accepted}", quoted(written)),
    );
    match suggest::nearest(name, &names) {
        Some(near) => problem.with_hint(format!("did you mean \"--{near}\"?")),
        None => problem,
    }
}

impl RawFlag<'_> {
    /// `--name` or `--name=value`, without quotes and escapes.
    pub(super) fn text(&self) -> &str {
        &self.text
    }

    /// Where bytes of its processed text stand.
    fn span_of(&self, range: Range<usize>) -> Span {
        let end = self.slice.text().len();
        let place = |at: usize| self.places.get(at).copied();
        let start = place(range.start).unwrap_or(end);
        let last = match range.end.checked_sub(1).and_then(place) {
            Some(last) if range.end > range.start => last + 1,
            _ => start,
        };
        self.slice.span_of(start..last)
    }
}

/// A word of `ENV`, `LABEL` or `ARG`, quotes and escapes still in it.
#[derive(Debug)]
pub(super) struct QuotedWord<'a> {
    /// Its text; without an escape character that ended the line.
    text: &'a str,
    slice: Slice<'a>,
}

impl<'a> QuotedWord<'a> {
    /// Its text.
    pub(super) fn text(&self) -> &'a str {
        self.text
    }

    /// Where it stands.
    pub(super) fn span(&self) -> Span {
        self.slice.span()
    }

    /// Part of it as an unexpanded word.
    pub(super) fn word(&self, range: Range<usize>) -> Word {
        self.slice.get(range).word()
    }

    /// All of it as an unexpanded word.
    pub(super) fn whole(&self) -> Word {
        self.word(0..self.text.len())
    }

    /// Left and right of the first `=`.
    pub(super) fn pair(&self) -> Option<(Word, Word)> {
        let equals = self.text.find('=')?;
        let value = self.word(equals + 1..self.text.len());
        Some((self.word(0..equals), value))
    }
}

/// Splits `args` at white space that is neither quoted nor escaped.
pub(super) fn quoted_words(args: Slice<'_>, escape: char) -> Vec<QuotedWord<'_>> {
    let text = args.text();
    let mut words = Vec::new();
    let mut at = 0;
    loop {
        at = text.len() - text[at..].trim_start().len();
        if at == text.len() {
            return words;
        }
        let start = at;
        let mut end = text.len();
        let mut quote = None;
        at = text.len();
        let mut chars = text[start..].char_indices();
        while let Some((offset, c)) = chars.next() {
            match quote {
                None if c.is_whitespace() => {
                    end = start + offset;
                    at = end;
                    break;
                }
                None if matches!(c, '\'' | '"') => quote = Some(c),
                Some(open) if open == c => quote = None,
                // Single quotes hide the escape character; at the very end it vanishes.
                _ if c == escape && quote != Some('\'') && chars.next().is_none() => {
                    end = start + offset;
                }
                _ => {}
            }
        }
        if end > start {
            words.push(QuotedWord {
                text: &text[start..end],
                slice: args.get(start..end),
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::lines::{Line, Reader};
    use super::*;

    fn line(text: &str) -> Line {
        Reader::new(text, '\\').logical().unwrap()
    }

    #[test]
    fn names_flags_and_arguments_part() {
        let check = |text: &str, name: &str, flags: &[&str], args: &str| {
            let line = line(text);
            let split = split(line.slice(), '\\');
            let found: Vec<&str> = split.flags.iter().map(|f| f.text.as_str()).collect();
            assert_eq!(
                (split.name.text(), found.as_slice()),
                (name, flags),
                "{text}"
            );
            assert_eq!(split.args.text(), args, "{text}");
        };
        check("RUN", "RUN", &[], "");
        check("RUN  \t a  b ", "RUN", &[], "a  b");
        check("RUN --a --b=c d --e", "RUN", &["--a", "--b=c"], "d --e");
        check("RUN --a", "RUN", &["--a"], "");
        check("RUN --a -- --b", "RUN", &["--a"], "--b");
        check("RUN --", "RUN", &[], "");
        check("RUN -a b", "RUN", &[], "-a b");
        check("RUN --a='b \"c' d", "RUN", &["--a=b \"c"], "d");
        check("RUN --a=\"b\\\"c\" d", "RUN", &["--a=b\"c"], "d");
        check("RUN --a=b\\ c d", "RUN", &["--a=b c"], "d");
        check("RUN --ä=ö ü", "RUN", &["--ä=ö"], "ü");
    }

    const KNOWN: &[(&str, FlagKind)] = &[
        ("from", FlagKind::One),
        ("link", FlagKind::Switch),
        ("exclude", FlagKind::Many),
    ];

    fn flags(text: &str) -> (Flags, Vec<String>) {
        let line = line(text);
        let mut problems = Vec::new();
        let flags = check_flags(
            &split(line.slice(), '\\').flags,
            "COPY",
            KNOWN,
            &mut problems,
        );
        let problems = problems
            .into_iter()
            .map(|p| {
                let at = &text[p.span.start..p.span.end];
                format!("{at}| {}| {}", p.message, p.hint.unwrap_or_default())
            })
            .collect();
        (flags, problems)
    }

    #[test]
    fn values_are_found_with_their_places() {
        let text = "COPY --from=a\\ b --link --exclude=x --exclude='y z' --from2";
        let (flags, problems) = flags(text);
        let from = flags.one("from").unwrap();
        assert_eq!(from.raw, "a b");
        assert_eq!(&text[from.span.start..from.span.end], "a\\ b");
        assert_eq!(flags.switch("link"), Some(true));
        let excludes: Vec<String> = flags.many("exclude").into_iter().map(|w| w.raw).collect();
        assert_eq!(excludes, ["x", "y z"]);
        let places: Vec<&str> = (flags.places.iter())
            .map(|(_, span)| &text[span.start..span.end])
            .collect();
        assert_eq!(
            places,
            ["--from=a\\ b", "--link", "--exclude=x", "--exclude='y z'"]
        );
        assert_eq!(
            problems,
            [
                "--from2| unknown flag \"--from2\": COPY takes --from, --link, --exclude\
                 | did you mean \"--from\"?"
            ]
        );
    }

    #[test]
    fn switches_are_read() {
        let check = |text: &str, value: Option<bool>| {
            assert_eq!(flags(text).0.switch("link"), value, "{text}");
        };
        check("COPY a", None);
        check("COPY --link", Some(true));
        check("COPY --link=TRUE", Some(true));
        check("COPY --link=False", Some(false));
        check("COPY --link=no", None);
    }

    #[test]
    fn wrong_flags_are_problems() {
        let check = |text: &str, expected: &[&str]| assert_eq!(flags(text).1, expected, "{text}");
        check(
            "COPY --form=x --zzz",
            &[
                "--form| unknown flag \"--form\": COPY takes --from, --link, --exclude\
                 | did you mean \"--from\"?",
                "--zzz| unknown flag \"--zzz\": COPY takes --from, --link, --exclude| ",
            ],
        );
        check(
            "COPY --from=a --from=b",
            &["--from=b| duplicate flag --from: COPY takes it once| "],
        );
        check(
            "COPY --from",
            &["--from| flag --from of COPY has no value| "],
        );
        check(
            "COPY --link=",
            &["--link=| flag --link of COPY has no value| "],
        );
        check(
            "COPY --link=no",
            &["no| flag --link of COPY is true or false, not \"no\"| "],
        );
    }

    #[test]
    fn words_keep_quotes() {
        let check = |text: &str, escape: char, expected: &[&str]| {
            let line = Reader::new(text, '~').logical().unwrap();
            let words = quoted_words(line.slice(), escape);
            let words: Vec<&str> = words.iter().map(QuotedWord::text).collect();
            assert_eq!(words, expected, "{text}");
        };
        check("a=1  b=2", '\\', &["a=1", "b=2"]);
        check(r#"a="x y" b='c d'e"#, '\\', &[r#"a="x y""#, "b='c d'e"]);
        check(r"a=x\ y \'b c", '\\', &[r"a=x\ y", r"\'b", "c"]);
        check(r#"a="x\" y" b"#, '\\', &[r#"a="x\" y""#, "b"]);
        check(r"a='x\' y", '\\', &[r"a='x\'", "y"]);
        check(r"a=b\", '\\', &["a=b"]);
        check(r"a \", '\\', &["a"]);
        check("a=x` y\\ z", '`', &["a=x` y\\", "z"]);
        check(r#"a="open b"#, '\\', &[r#"a="open b"#]);
        check("\"\" ''", '\\', &["\"\"", "''"]);
    }
}
