//! Word expansion: variables, quotes and escapes, against a given environment.
//!
//! Three uses, as in BuildKit:
//! - [`expand_word`]: one text in, one text out. Everything but the two below.
//! - [`expand_words`]: the result is split at unquoted white space. `EXPOSE`.
//! - [`expand_text`]: quotes have no meaning. The content of here-documents in `COPY`, `ADD`.
//!
//! [`expand`] offers the same with [`Options`] and tells which variables were used.
//! Substitutions: `$a`, `${a}`, `${a-w}`, `${a:-w}`, `${a+w}`, `${a:+w}`, `${a?m}`,
//! `${a:?m}`, `${a#p}`, `${a##p}`, `${a%p}`, `${a%%p}`, `${a/p/r}`, `${a//p/r}`, where words,
//! messages and patterns are expanded themselves.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use super::Word;
use super::error::quoted;
use super::pattern::{Extent, Pattern};

pub use super::pattern::PatternError;

/// What variables are worth.
pub type Environment = BTreeMap<String, String>;

/// The most bytes that one expansion may produce, intermediate results included.
/// Variables that double each other would otherwise fill the memory in a few lines.
pub const MAX_EXPANSION_BYTES: usize = 4 << 20;

/// How deep substitutions may stand in substitutions.
pub const MAX_NESTING: usize = 64;

/// Why a text cannot be expanded.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("cannot expand {}: {fault}", quoted(.text))]
pub struct ExpandError {
    /// The whole text.
    pub text: String,
    /// The bytes of the text with the faulty quotes or substitution.
    pub range: Range<usize>,
    /// What is wrong.
    pub fault: ExpandFault,
}

/// Departures from the usual treatment. The default is what [`expand_word`] does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// Quotes work but stay in the result.
    pub keep_quotes: bool,
    /// Escapes work but stay in the result.
    pub keep_escapes: bool,
    /// Quotes are ordinary characters.
    pub literal_quotes: bool,
    /// Substitutions of unset variables stay as they are.
    pub keep_unset: bool,
}

/// What became of a text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Expansion {
    /// The expanded text.
    pub text: String,
    /// The text split at white space that is neither quoted nor escaped. White space in
    /// the values of unquoted variables splits too. Empty words are dropped.
    pub words: Vec<String>,
    /// Names of the variables looked up that are set.
    pub used: BTreeSet<String>,
    /// Names of the variables looked up that are not set, also where a default stood in.
    pub unset: BTreeSet<String>,
}

/// Expands `word` to one text: variables replaced, quotes removed.
///
/// # Errors
/// [`ExpandError`] for `${NAME:?message}`, unterminated quotes, unknown modifiers.
pub fn expand_word(
    word: &Word,
    escape: char,
    environment: &Environment,
) -> Result<String, ExpandError> {
    Ok(expand(&word.raw, escape, environment, Options::default())?.text)
}

/// Expands `word` and splits it: see [`Expansion::words`].
///
/// # Errors
/// As [`expand_word`].
pub fn expand_words(
    word: &Word,
    escape: char,
    environment: &Environment,
) -> Result<Vec<String>, ExpandError> {
    Ok(expand(&word.raw, escape, environment, Options::default())?.words)
}

/// Expands the content of a here-document: quotes stay, and `\` escapes whatever the
/// Dockerfile's escape character is.
///
/// # Errors
/// As [`expand_word`], except for quotes.
pub fn expand_text(text: &str, environment: &Environment) -> Result<String, ExpandError> {
    let options = Options {
        literal_quotes: true,
        ..Options::default()
    };
    Ok(expand(text, '\\', environment, options)?.text)
}

/// Expands `text`.
///
/// # Errors
/// As [`expand_word`]; the message begins with the text, shortened if it is long.
pub fn expand(
    text: &str,
    escape: char,
    environment: &Environment,
    options: Options,
) -> Result<Expansion, ExpandError> {
    let mut lexer = Lexer {
        length: text.len(),
        // Go's scanner, which BuildKit reads words with, skips this one.
        rest: text.strip_prefix('\u{feff}').unwrap_or(text),
        place: None,
        escape,
        environment,
        options,
        keep_escapes: options.keep_escapes,
        depth: 0,
        produced: 0,
        used: BTreeSet::new(),
        unset: BTreeSet::new(),
    };
    match lexer.until(None, options.keep_escapes) {
        Ok((expanded, words)) => Ok(Expansion {
            text: expanded,
            words: words.finish(),
            used: lexer.used,
            unset: lexer.unset,
        }),
        Err(fault) => Err(ExpandError {
            text: text.to_owned(),
            range: lexer.place.unwrap_or(0..text.len()),
            fault,
        }),
    }
}

/// What is wrong inside a text.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ExpandFault {
    /// A quote that nothing closes: `single` or `double`.
    #[error("a {0} quote has no end")]
    Quote(&'static str),
    /// `${` without `}`.
    #[error("the \"}}\" of \"${{\" is missing")]
    Brace,
    /// `${name/` without the second `/`.
    #[error("the second \"/\" of \"${{…/…/…}}\" is missing")]
    Slash,
    /// `${}` and its kin.
    #[error("bad substitution: a name must follow \"${{\"")]
    Name,
    /// What follows the name is no operator.
    #[error("unsupported modifier {modifier:?} in the substitution of \"{name}\"")]
    Modifier {
        /// The variable.
        name: String,
        /// What stands where an operator is expected.
        modifier: String,
    },
    /// `${name:?message}`, and there is no value.
    #[error("{name}: {message}")]
    Required {
        /// The variable.
        name: String,
        /// The author's message, or what is usual.
        message: String,
    },
    /// The pattern of `${name#pattern}` or `${name/pattern/…}` makes no sense.
    #[error("invalid pattern {} in the substitution of \"{name}\": {source}", quoted(.pattern))]
    Pattern {
        /// The variable.
        name: String,
        /// The pattern, expanded.
        pattern: String,
        /// What is wrong with it.
        source: PatternError,
    },
    /// Above [`MAX_NESTING`].
    #[error("substitutions stand more than {MAX_NESTING} deep in each other")]
    Nesting,
    /// Above [`MAX_EXPANSION_BYTES`].
    #[error("the result is larger than {MAX_EXPANSION_BYTES} bytes")]
    Size,
}

/// Collects the words of a result.
#[derive(Debug, Default)]
struct Words {
    list: Vec<String>,
    word: String,
}

impl Words {
    fn split_char(&mut self, c: char) {
        if !c.is_whitespace() {
            self.word.push(c);
        } else if !self.word.is_empty() {
            self.list.push(std::mem::take(&mut self.word));
        }
    }

    fn finish(mut self) -> Vec<String> {
        if !self.word.is_empty() {
            self.list.push(self.word);
        }
        self.list
    }
}

struct Lexer<'a> {
    /// Of the whole text, in bytes.
    length: usize,
    rest: &'a str,
    /// Where the innermost fault is.
    place: Option<Range<usize>>,
    escape: char,
    environment: &'a Environment,
    options: Options,
    /// Whether escapes are kept just now; patterns keep theirs until they are parsed.
    keep_escapes: bool,
    depth: usize,
    produced: usize,
    used: BTreeSet<String>,
    unset: BTreeSet<String>,
}

impl Lexer<'_> {
    fn peek(&self) -> Option<char> {
        self.rest.chars().next()
    }

    fn next(&mut self) -> Option<char> {
        let c = self.peek()?;
        self.rest = &self.rest[c.len_utf8()..];
        Some(c)
    }

    /// The bytes read so far.
    fn at(&self) -> usize {
        self.length - self.rest.len()
    }

    /// `result`; if it is a fault, what was read since `start` is its place.
    fn placed<T>(
        &mut self,
        start: usize,
        result: Result<T, ExpandFault>,
    ) -> Result<T, ExpandFault> {
        if result.is_err() && self.place.is_none() {
            self.place = Some(start..self.at());
        }
        result
    }

    /// Takes the next character if it is `c`.
    fn eat(&mut self, c: char) -> bool {
        let found = self.peek() == Some(c);
        if found {
            self.next();
        }
        found
    }

    /// Accounts for `bytes` more of results.
    fn produce(&mut self, bytes: usize) -> Result<(), ExpandFault> {
        self.produced = self.produced.saturating_add(bytes);
        if self.produced > MAX_EXPANSION_BYTES {
            return Err(ExpandFault::Size);
        }
        Ok(())
    }

    /// Everything up to and without `stop`, or up to the end.
    fn until(
        &mut self,
        stop: Option<char>,
        keep_escapes: bool,
    ) -> Result<(String, Words), ExpandFault> {
        let outer = std::mem::replace(&mut self.keep_escapes, keep_escapes);
        let result = self.until_inner(stop);
        self.keep_escapes = outer;
        result
    }

    fn until_inner(&mut self, stop: Option<char>) -> Result<(String, Words), ExpandFault> {
        let mut text = String::new();
        let mut words = Words::default();
        while let Some(c) = self.peek() {
            if stop == Some(c) {
                self.next();
                return Ok((text, words));
            }
            match c {
                '$' => {
                    let value = self.dollar()?;
                    self.produce(value.len())?;
                    value.chars().for_each(|c| words.split_char(c));
                    text.push_str(&value);
                }
                '<' => {
                    let operator = self.possible_heredoc();
                    words.word.push_str(&operator);
                    text.push_str(&operator);
                }
                '\'' | '"' if !self.options.literal_quotes => {
                    let start = self.at();
                    let quoted = if c == '"' {
                        self.double_quoted()
                    } else {
                        self.single_quoted()
                    };
                    let quoted = self.placed(start, quoted)?;
                    self.produce(quoted.len())?;
                    words.word.push_str(&quoted);
                    text.push_str(&quoted);
                }
                c if c == self.escape => {
                    self.next();
                    if self.keep_escapes {
                        words.word.push(c);
                        text.push(c);
                    }
                    // At the very end it escapes nothing and vanishes.
                    let Some(escaped) = self.next() else { break };
                    words.word.push(escaped);
                    text.push(escaped);
                }
                c => {
                    self.next();
                    words.split_char(c);
                    text.push(c);
                }
            }
        }
        match stop {
            None => Ok((text, words)),
            Some('/') => Err(ExpandFault::Slash),
            Some(_) => Err(ExpandFault::Brace),
        }
    }

    /// `<<` and the blanks after it stay together as one word, so that here-document
    /// operators can be recognised in the result.
    fn possible_heredoc(&mut self) -> String {
        self.next();
        if !self.eat('<') {
            return "<".to_owned();
        }
        let mut operator = "<<".to_owned();
        while let Some(c @ ('\t' | '\r' | ' ')) = self.peek() {
            self.next();
            operator.push(c);
        }
        operator
    }

    fn single_quoted(&mut self) -> Result<String, ExpandFault> {
        self.next();
        let Some(end) = self.rest.find('\'') else {
            self.rest = "";
            return Err(ExpandFault::Quote("single"));
        };
        let quoted = &self.rest[..end];
        self.rest = &self.rest[end + 1..];
        Ok(if self.options.keep_quotes {
            format!("'{quoted}'")
        } else {
            quoted.to_owned()
        })
    }

    fn double_quoted(&mut self) -> Result<String, ExpandFault> {
        let mut text = String::new();
        self.next();
        if self.options.keep_quotes {
            text.push('"');
        }
        loop {
            match self.peek().ok_or(ExpandFault::Quote("double"))? {
                '"' => {
                    self.next();
                    if self.options.keep_quotes {
                        text.push('"');
                    }
                    return Ok(text);
                }
                '$' => {
                    let value = self.dollar()?;
                    self.produce(value.len())?;
                    text.push_str(&value);
                }
                c if c == self.escape => {
                    self.next();
                    if self.keep_escapes {
                        text.push(c);
                    }
                    match self.peek() {
                        None => {}
                        // Only these can be escaped; before others the escape is text.
                        Some(escaped @ ('"' | '$')) => {
                            self.next();
                            text.push(escaped);
                        }
                        Some(escaped) if escaped == self.escape => {
                            self.next();
                            text.push(escaped);
                        }
                        Some(_) => text.push(c),
                    }
                }
                c => {
                    self.next();
                    text.push(c);
                }
            }
        }
    }

    /// The value of a variable, if it is set.
    fn look_up(&mut self, name: &str) -> Option<String> {
        let value = self.environment.get(name).cloned();
        if value.is_some() {
            self.used.insert(name.to_owned());
        } else {
            self.unset.insert(name.to_owned());
        }
        value
    }

    /// `$name` or `${…}`.
    fn dollar(&mut self) -> Result<String, ExpandFault> {
        let start = self.at();
        let result = self.dollar_inner();
        self.placed(start, result)
    }

    fn dollar_inner(&mut self) -> Result<String, ExpandFault> {
        self.next();
        if !self.eat('{') {
            let name = self.name();
            if name.is_empty() {
                return Ok("$".to_owned());
            }
            return Ok(match self.look_up(&name) {
                Some(value) => value,
                None if self.options.keep_unset => format!("${name}"),
                None => String::new(),
            });
        }
        if self.depth == MAX_NESTING {
            return Err(ExpandFault::Nesting);
        }
        self.depth += 1;
        let result = self.substitution();
        self.depth -= 1;
        result
    }

    /// What stands after `${`.
    fn substitution(&mut self) -> Result<String, ExpandFault> {
        match self.peek() {
            None => return Err(ExpandFault::Brace),
            Some('{' | '}' | ':') => return Err(ExpandFault::Name),
            Some(_) => {}
        }
        let name = self.name();
        let mut operator = self.next().ok_or(ExpandFault::Brace)?;
        let mut modifier = String::from(operator);
        let mut empty_is_unset = false;
        match operator {
            '}' => {
                return Ok(match self.look_up(&name) {
                    Some(value) => value,
                    None if self.options.keep_unset => format!("${{{name}}}"),
                    None => String::new(),
                });
            }
            '/' => return self.replacement(&name),
            ':' => {
                empty_is_unset = true;
                operator = self.next().ok_or(ExpandFault::Brace)?;
                modifier.push(operator);
            }
            '+' | '-' | '?' | '#' | '%' => {}
            _ => return Err(ExpandFault::Modifier { name, modifier }),
        }
        let trims = matches!(operator, '#' | '%');
        if trims && empty_is_unset {
            return Err(ExpandFault::Modifier { name, modifier });
        }
        let word = self.operand('}', trims)?;
        let value = self.look_up(&name);
        if value.is_none() && self.options.keep_unset {
            return Ok(format!("${{{name}{modifier}{word}}}"));
        }
        let present = match &value {
            None => false,
            Some(value) => !(empty_is_unset && value.is_empty()),
        };
        match operator {
            '-' if present => Ok(value.unwrap_or_default()),
            '-' => Ok(word),
            '+' if present => Ok(word),
            '+' => Ok(String::new()),
            '?' if present => Ok(value.unwrap_or_default()),
            '?' => {
                let message = match (word.as_str(), &value) {
                    ("", None) => "is not allowed to be unset".to_owned(),
                    ("", Some(_)) => "is not allowed to be empty".to_owned(),
                    _ => word,
                };
                Err(ExpandFault::Required { name, message })
            }
            '#' | '%' => self.trimmed(name, operator, &word, &value.unwrap_or_default()),
            _ => Err(ExpandFault::Modifier { name, modifier }),
        }
    }

    /// Like [`Self::until`]; whatever breaks off at the end of the text, it is `stop` that
    /// is missing first of all.
    fn operand(&mut self, stop: char, keep_escapes: bool) -> Result<String, ExpandFault> {
        let (text, _) = self
            .until(Some(stop), keep_escapes)
            .map_err(|fault| match fault {
                ExpandFault::Quote(_) | ExpandFault::Brace | ExpandFault::Slash if stop == '}' => {
                    self.place = None;
                    ExpandFault::Brace
                }
                fault => fault,
            })?;
        self.produce(text.len())?;
        Ok(text)
    }

    /// `${name#pattern}` and its kin; a doubled operator takes as much as possible.
    fn trimmed(
        &mut self,
        name: String,
        operator: char,
        word: &str,
        value: &str,
    ) -> Result<String, ExpandFault> {
        let (text, extent) = match word.strip_prefix(operator) {
            Some(rest) => (rest, Extent::Longest),
            None => (word, Extent::Shortest),
        };
        Pattern::parse(text)
            .and_then(|pattern| match operator {
                '#' => pattern.trim_start(value, extent),
                _ => pattern.trim_end(value, extent),
            })
            .map_err(|source| ExpandFault::Pattern {
                name,
                pattern: text.to_owned(),
                source,
            })
    }

    /// What stands after `${name/`.
    fn replacement(&mut self, name: &str) -> Result<String, ExpandFault> {
        let all = self.eat('/');
        let text = self.operand('/', true)?;
        let by = self.operand('}', true)?;
        let value = match self.look_up(name) {
            Some(value) => value,
            None if self.options.keep_unset => {
                let slashes = if all { "//" } else { "/" };
                return Ok(format!("${{{name}{slashes}{text}/{by}}}"));
            }
            None => String::new(),
        };
        let room = MAX_EXPANSION_BYTES.saturating_sub(self.produced);
        let replaced = Pattern::parse(&text)
            .and_then(|pattern| {
                if all {
                    pattern.replace_all(&value, &by, room)
                } else {
                    pattern.replace(&value, &by).map(Some)
                }
            })
            .map_err(|source| ExpandFault::Pattern {
                name: name.to_owned(),
                pattern: text.clone(),
                source,
            })?;
        replaced.ok_or(ExpandFault::Size)
    }

    /// A name: letters, digits and `_`; or digits alone; or one of the shell's special
    /// parameters. May be empty.
    fn name(&mut self) -> String {
        let length = match self.peek() {
            Some(c) if c.is_ascii_digit() => self
                .rest
                .find(|c: char| !c.is_ascii_digit())
                .unwrap_or(self.rest.len()),
            Some('@' | '*' | '#' | '?' | '-' | '$' | '!') => 1,
            _ => self
                .rest
                .find(|c: char| !c.is_alphabetic() && !c.is_ascii_digit() && c != '_')
                .unwrap_or(self.rest.len()),
        };
        let (name, rest) = self.rest.split_at(length);
        self.rest = rest;
        name.to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn environment() -> Environment {
        [
            ("S", "foobarbaz"),
            ("P", "/usr/local/lib/file.tar.gz"),
            ("Q", "a*b*c"),
            ("X", "bar"),
            ("Y", "QUX"),
            ("E", ""),
            ("W", " two words "),
            ("a", "1"),
            ("ab", "2"),
            ("a_b", "3"),
        ]
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .into()
    }

    fn run(text: &str, escape: char, options: Options) -> Result<Expansion, ExpandError> {
        expand(text, escape, &environment(), options)
    }

    #[track_caller]
    fn check(text: &str, expected: &str) {
        assert_eq!(run(text, '\\', Options::default()).unwrap().text, expected);
    }

    #[track_caller]
    fn fails(text: &str, expected: &str) {
        assert_eq!(
            run(text, '\\', Options::default()).unwrap_err().to_string(),
            expected
        );
    }

    #[test]
    fn quotes_and_escapes() {
        check("a b", "a b");
        check("\"$X\"'$X'\\$X", "bar$X$X");
        check("\"\\$X\" '\\$X' \\\\$X", "$X \\$X \\bar");
        check("\"a\\\"b\" 'a\"b' \"a'b\"", "a\"b a\"b a'b");
        check("a\\b \"a\\b\" 'a\\b' \"a\\\\b\"", "ab a\\b a\\b a\\b");
        check("$ \"$\" x$", "$ $ x$");
        check("''\"\"", "");
        check("\"\"x\"\"", "x");
        check("a\\", "a");
        check("ünï $X", "ünï bar");
        check("a<b <<  c", "a<b <<  c");
        let backtick = run("a` b \"c`\"d\" `$X back\\slash", '`', Options::default());
        assert_eq!(backtick.unwrap().text, "a b c\"d $X back\\slash");
    }

    #[test]
    fn names_end_where_they_end() {
        check("$ab $a_b $a-b $a.b $a$ab", "2 3 1-b 1.b 12");
        check("${a}b $a/$ab", "1b 1/2");
        check("$1 ${1} $@ $$ $12x", "    x");
        check("$ä|", "|");
    }

    #[test]
    fn defaults_and_alternatives() {
        check("${S:-w}|${E:-w}|${U:-w}", "foobarbaz|w|w");
        check("${S-w}|${E-w}|${U-w}", "foobarbaz||w");
        check("${S:+w}|${E:+w}|${U:+w}", "w||");
        check("${S+w}|${E+w}|${U+w}", "w|w|");
        check("${U:-}|\"${U:-c d}\"", "|c d");
        check("${U:-$X}${U:-${U:-deep-$X}}", "bardeep-bar");
        check("${U:-a:b/c}${U:-'}'}${U:-\\}}", "a:b/c}}");
        check("${X:?must}${X?}[${E?message}]", "barbar[]");
    }

    #[test]
    fn trims_and_replacements() {
        check("${S#f*b} ${S##f*b} ${S%b*} ${S%%b*}", "arbaz az foobar foo");
        check("${P##*/} ${P%.*}", "file.tar.gz /usr/local/lib/file.tar");
        check("${S#nothing} ${S#?} ${S%??}", "foobarbaz oobarbaz foobarb");
        check("${Q#a\\*} ${Q%\\**} ${U#x}", "b*c a*b ");
        check("${S#*$X} ${S%$X*}", "baz foo");
        check(
            "${S/ba/BA} ${S//ba/BA} ${S/ba/}",
            "fooBArbaz fooBArBAz foorbaz",
        );
        check(
            "${P//\\//-} ${P/\\//-}",
            "-usr-local-lib-file.tar.gz -usr/local/lib/file.tar.gz",
        );
        check("${S/$X/$Y} ${S/${X}/[${Y}]}", "fooQUXbaz foo[QUX]baz");
        check("${S/o/&} ${U/x/y}", "f&obarbaz ");
    }

    #[test]
    fn faults_are_named() {
        fails(
            "\"${V:?must be given}\"",
            "cannot expand \"\\\"${V:?must be given}\\\"\": V: must be given",
        );
        fails(
            "${V?}",
            "cannot expand \"${V?}\": V: is not allowed to be unset",
        );
        fails(
            "${E:?}",
            "cannot expand \"${E:?}\": E: is not allowed to be empty",
        );
        fails("${E:?no}", "cannot expand \"${E:?no}\": E: no");
        fails(
            "${X",
            "cannot expand \"${X\": the \"}\" of \"${\" is missing",
        );
        fails("${", "cannot expand \"${\": the \"}\" of \"${\" is missing");
        fails(
            "${X:-a",
            "cannot expand \"${X:-a\": the \"}\" of \"${\" is missing",
        );
        fails(
            "${X/a}",
            "cannot expand \"${X/a}\": the second \"/\" of \"${…/…/…}\" is missing",
        );
        fails(
            "${}",
            "cannot expand \"${}\": bad substitution: a name must follow \"${\"",
        );
        fails(
            "${X^^}",
            "cannot expand \"${X^^}\": unsupported modifier \"^\" in the substitution of \"X\"",
        );
        fails(
            "${X:#a}",
            "cannot expand \"${X:#a}\": unsupported modifier \":#\" in the substitution of \"X\"",
        );
        fails(
            "${X:1:2}",
            "cannot expand \"${X:1:2}\": unsupported modifier \":1\" in the substitution of \"X\"",
        );
        fails(
            "\"open",
            "cannot expand \"\\\"open\": a double quote has no end",
        );
        fails("it's", "cannot expand \"it's\": a single quote has no end");
        fails(
            "${X#a\\b}",
            "cannot expand \"${X#a\\\\b}\": invalid pattern \"a\\\\b\" in the substitution of \
             \"X\": invalid escape \"\\b\"",
        );
    }

    #[test]
    fn faults_have_places() {
        let check = |text: &str, expected: &str| {
            let error = run(text, '\\', Options::default()).unwrap_err();
            assert_eq!(&text[error.range], expected, "{text}");
        };
        check("a ${X} it's b", "'s b");
        check("a \"b ${X} c", "\"b ${X} c");
        check("a ${U:?x} b", "${U:?x}");
        check("a \"${U:?x}\" b", "${U:?x}");
        check("a ${X^^} b", "${X^");
        check("a ${} b", "${");
        check("a ${X:-${U?}} b", "${U?}");
        check("a ${X:-'b}", "${X:-'b}");
        check("a ${X#b\\c} d", "${X#b\\c}");
        check("a ${X/b}", "${X/b}");
    }

    #[test]
    fn words_are_split() {
        let check = |text: &str, expected: &[&str]| {
            let words = run(text, '\\', Options::default()).unwrap().words;
            assert_eq!(words, expected, "{text}");
        };
        check("a  b\tc", &["a", "b", "c"]);
        check("'a b' \"c d\" e\\ f", &["a b", "c d", "e f"]);
        check("$W", &["two", "words"]);
        check("x${W}y", &["x", "two", "words", "y"]);
        check("\"$W\"", &[" two words "]);
        check("$E ''", &[]);
        check("${P##*.}81", &["gz81"]);
        check("x${U:-y}z", &["xyz"]);
        check("cat << EOF >x <<-'B'", &["cat", "<< EOF", ">x", "<<-B"]);
    }

    #[test]
    fn options_keep_what_they_say() {
        let check = |text: &str, options: Options, expected: &str| {
            assert_eq!(run(text, '\\', options).unwrap().text, expected, "{text}");
        };
        let quotes = Options {
            keep_quotes: true,
            keep_unset: true,
            ..Options::default()
        };
        check("'a' \"$X\" \\b $U", quotes, "'a' \"bar\" b $U");
        check(
            "${U} ${U:-w$X} ${U#a} ${U//b/c}",
            quotes,
            "${U} ${U:-wbar} ${U#a} ${U//b/c}",
        );
        let escapes = Options {
            keep_escapes: true,
            ..Options::default()
        };
        check("\\a \"\\\"\\b\" ${U:-\\c}", escapes, "\\a \\\"\\\\b c");
    }

    #[test]
    fn heredoc_content_keeps_quotes() {
        let text = "$X ${U:-none} \\$X \"d\" 'single $X' back\\slash it's\n";
        assert_eq!(
            expand_text(text, &environment()).unwrap(),
            "bar none $X \"d\" 'single bar' backslash it's\n"
        );
    }

    #[test]
    fn lookups_are_reported() {
        let expansion = run("$X ${U:-$V} '$N' ${S#a}", '\\', Options::default()).unwrap();
        assert_eq!(Vec::from_iter(expansion.used), ["S", "X"]);
        assert_eq!(Vec::from_iter(expansion.unset), ["U", "V"]);
    }

    #[test]
    fn nesting_and_size_are_limited() {
        let nested = |depth: usize| "${U:-".repeat(depth) + &"}".repeat(depth);
        assert_eq!(run(&nested(64), '\\', Options::default()).unwrap().text, "");
        assert!(
            run(&nested(100_000), '\\', Options::default())
                .unwrap_err()
                .to_string()
                .ends_with("…\": substitutions stand more than 64 deep in each other")
        );
        let big = Environment::from([("B".to_owned(), "x".repeat(1 << 20))]);
        let error = expand("$B$B$B$B$B", '\\', &big, Options::default()).unwrap_err();
        assert_eq!(
            error.to_string(),
            "cannot expand \"$B$B$B$B$B\": the result is larger than 4194304 bytes"
        );
        let error = expand("${B//x/xxxxx}", '\\', &big, Options::default()).unwrap_err();
        assert_eq!(
            error.to_string(),
            "cannot expand \"${B//x/xxxxx}\": the result is larger than 4194304 bytes"
        );
    }
}
