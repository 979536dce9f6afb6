//! File name patterns as Go's `path/filepath.Match` has them, used for wildcards in `COPY`.
//!
//! `*` any characters but `/`, `?` one character but `/`, `[a-c]` one of a class, `[^x]` one
//! not of a class, `\x` the character itself. There is no `**` here; [`super::ignore`] adds it.
//! Matching takes time proportional to pattern times name, whatever the pattern.
//!
//! <https://pkg.go.dev/path/filepath#Match>

/// Why a pattern cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GlobError {
    /// `[` without its `]`, or a class that ends in the middle of a range.
    #[error("the class that begins with \"[\" has no end")]
    UnterminatedClass,
    /// A `]` or `-` where a character of a class is expected.
    #[error("{0:?} must be escaped with \"\\\" to stand here in a class")]
    Unescaped(char),
    /// `\` as the last character.
    #[error("\"\\\" at the end escapes nothing")]
    TrailingEscape,
    /// A class with bytes that are not UTF-8.
    #[error("a class must be UTF-8 text")]
    NotUtf8,
    /// Longer than [`MAX_PATTERN_BYTES`].
    #[error("{0} bytes are more than the {MAX_PATTERN_BYTES} a pattern may have")]
    TooLong(usize),
}

/// Longer patterns are refused: no path that could match is longer.
pub const MAX_PATTERN_BYTES: usize = 4096;

/// A character, or a byte that is not UTF-8 (then above all characters).
pub(super) type Symbol = u32;

const SLASH: Symbol = '/' as Symbol;
const LINE_FEED: Symbol = '\n' as Symbol;

/// One step of a pattern.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Token {
    /// This symbol.
    Literal(Symbol),
    /// Any symbol but `/`.
    One,
    /// Any number of symbols but `/`.
    Star,
    /// A symbol in one of the ranges, or in none of them.
    Class {
        negated: bool,
        ranges: Vec<(Symbol, Symbol)>,
    },
    /// Any number of symbols, also `/`.
    Everything,
    /// The next two tokens may be left out.
    SkipTwo,
}

/// A pattern for one name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pattern {
    tokens: Vec<Token>,
}

impl Pattern {
    /// Reads a pattern.
    ///
    /// # Errors
    /// [`GlobError`] where Go reports a bad pattern.
    pub fn parse(text: &str) -> Result<Self, GlobError> {
        if text.len() > MAX_PATTERN_BYTES {
            return Err(GlobError::TooLong(text.len()));
        }
        let symbols = symbols(text.as_bytes());
        let mut rest = symbols.as_slice();
        let mut tokens = Vec::new();
        while let Some(token) = next_token(&mut rest)? {
            tokens.push(token);
        }
        Ok(Self { tokens })
    }

    /// Whether the pattern matches all of `name`, one component of a path.
    pub fn matches(&self, name: &[u8]) -> bool {
        States::new(&self.tokens).advance(&symbols(name)).accepted()
    }

    /// Whether it can match anything else than one name.
    pub fn has_wildcards(&self) -> bool {
        !(self.tokens.iter()).all(|token| matches!(token, Token::Literal(_)))
    }
}

/// The characters of `bytes`, and the bytes between them that are none.
pub(super) fn symbols(bytes: &[u8]) -> Vec<Symbol> {
    let mut symbols = Vec::with_capacity(bytes.len());
    for chunk in bytes.utf8_chunks() {
        symbols.extend(chunk.valid().chars().map(Symbol::from));
        let invalid = chunk.invalid().iter();
        symbols.extend(invalid.map(|&byte| Symbol::from(char::MAX) + 1 + Symbol::from(byte)));
    }
    symbols
}

/// Takes the next token from `rest`.
pub(super) fn next_token(rest: &mut &[Symbol]) -> Result<Option<Token>, GlobError> {
    let Some((&first, after)) = rest.split_first() else {
        return Ok(None);
    };
    *rest = after;
    Ok(Some(match char::from_u32(first) {
        Some('*') => Token::Star,
        Some('?') => Token::One,
        Some('[') => class(rest)?,
        Some('\\') => {
            let (&escaped, after) = rest.split_first().ok_or(GlobError::TrailingEscape)?;
            *rest = after;
            Token::Literal(escaped)
        }
        _ => Token::Literal(first),
    }))
}

/// A class, after its `[`.
fn class(rest: &mut &[Symbol]) -> Result<Token, GlobError> {
    let eat = |rest: &mut &[Symbol], c: char| match rest.split_first() {
        Some((&first, after)) if first == Symbol::from(c) => {
            *rest = after;
            true
        }
        _ => false,
    };
    let negated = eat(rest, '^');
    let mut ranges = Vec::new();
    while ranges.is_empty() || !eat(rest, ']') {
        let low = class_symbol(rest)?;
        let high = if eat(rest, '-') {
            class_symbol(rest)?
        } else {
            low
        };
        ranges.push((low, high));
    }
    Ok(Token::Class { negated, ranges })
}

fn class_symbol(rest: &mut &[Symbol]) -> Result<Symbol, GlobError> {
    let mut take = || {
        let (&first, after) = rest.split_first()?;
        *rest = after;
        Some(first)
    };
    let mut symbol = take().ok_or(GlobError::UnterminatedClass)?;
    match char::from_u32(symbol) {
        Some(c @ ('-' | ']')) => return Err(GlobError::Unescaped(c)),
        Some('\\') => symbol = take().ok_or(GlobError::UnterminatedClass)?,
        _ => {}
    }
    if char::from_u32(symbol).is_none() {
        return Err(GlobError::NotUtf8);
    }
    Ok(symbol)
}

/// Which tokens may come next, while a name is read.
#[derive(Debug)]
pub(super) struct States<'t> {
    tokens: &'t [Token],
    /// One for each token, and one for having used them all.
    active: Vec<bool>,
}

impl<'t> States<'t> {
    /// Nothing read yet.
    pub(super) fn new(tokens: &'t [Token]) -> Self {
        let mut active = vec![false; tokens.len() + 1];
        active[0] = true;
        let mut states = Self { tokens, active };
        states.skip();
        states
    }

    /// Reads `name`.
    pub(super) fn advance(mut self, name: &[Symbol]) -> Self {
        for &symbol in name {
            // Nothing may follow a whole match.
            self.active[self.tokens.len()] = false;
            // From the last one on, so that each state is moved once.
            let mut any = false;
            for i in (0..self.tokens.len()).rev() {
                if !std::mem::take(&mut self.active[i]) {
                    continue;
                }
                let (stays, moves) = match &self.tokens[i] {
                    Token::Literal(literal) => (false, *literal == symbol),
                    Token::One => (false, symbol != SLASH),
                    Token::Star => (symbol != SLASH, false),
                    Token::Class { negated, ranges } => {
                        let inside = |&(low, high): &_| low <= symbol && symbol <= high;
                        (false, ranges.iter().any(inside) != *negated)
                    }
                    Token::Everything => (symbol != LINE_FEED, false),
                    Token::SkipTwo => (false, false),
                };
                self.active[i] = stays;
                self.active[i + 1] |= moves;
                any |= stays || moves;
            }
            if !any {
                self.active.fill(false);
                break;
            }
            self.skip();
        }
        self
    }

    /// Whether what was read is matched.
    pub(super) fn accepted(&self) -> bool {
        self.active[self.tokens.len()]
    }

    /// Whether something that begins with what was read, and is longer, may match.
    pub(super) fn may_go_on(&self) -> bool {
        self.active[..self.tokens.len()].contains(&true)
    }

    /// Follows tokens that may match nothing.
    fn skip(&mut self) {
        for i in 0..self.tokens.len() {
            if self.active[i] {
                match self.tokens[i] {
                    Token::Star | Token::Everything => self.active[i + 1] = true,
                    Token::SkipTwo => {
                        self.active[i + 1] = true;
                        self.active[i + 3] = true;
                    }
                    _ => {}
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_match_as_in_go() {
        let check = |pattern: &str, name: &str, expected: bool| {
            let parsed = Pattern::parse(pattern).unwrap();
            let found = parsed.matches(name.as_bytes());
            assert_eq!(found, expected, "{pattern} {name}");
        };
        check("abc", "abc", true);
        check("*", "abc", true);
        check("*c", "abc", true);
        check("a*", "a", true);
        check("a*", "ab/c", false);
        check("a*/b", "abc/b", true);
        check("a*/b", "a/c/b", false);
        check("a*b*c*d*e*/f", "axbxcxdxe/f", true);
        check("a*b*c*d*e*/f", "axbxcxdxexxx/fff", false);
        check("a*b?c*x", "abxbbxdbxebxczzx", true);
        check("a*b?c*x", "abxbbxdbxebxczzy", false);
        check("ab[c]", "abc", true);
        check("ab[b-d]", "abc", true);
        check("ab[e-g]", "abc", false);
        check("ab[^c]", "abc", false);
        check("ab[^e-g]", "abc", true);
        check("a\\*b", "a*b", true);
        check("a\\*b", "ab", false);
        check("a?b", "a☺b", true);
        check("a[^a]b", "a☺b", true);
        check("a???b", "a☺b", false);
        check("[a-ζ]*", "α", true);
        check("*[a-ζ]", "A", false);
        check("a?b", "a/b", false);
        check("[\\]a]", "]", true);
        check("[\\-]", "-", true);
        check("[x\\-]", "-", true);
        check("[x\\-]", "z", false);
        check("[!a]", "!", true);
        check("a]", "a]", true);
        check("", "", true);
        check("*x", "xxx", true);
        check("**", "a", true);
    }

    #[test]
    fn names_need_not_be_utf8() {
        let pattern = Pattern::parse("a?b*").unwrap();
        assert!(pattern.matches(b"a\xffb"));
        assert!(!pattern.matches(b"a\xff\xffb"));
        assert!(!Pattern::parse("[a-\u{10ffff}]").unwrap().matches(b"\xff"));
    }

    #[test]
    fn bad_patterns_are_errors() {
        let check = |pattern: &str, expected: GlobError| {
            assert_eq!(Pattern::parse(pattern), Err(expected), "{pattern}");
        };
        check("[", GlobError::UnterminatedClass);
        check("[^", GlobError::UnterminatedClass);
        check("[a", GlobError::UnterminatedClass);
        check("a[", GlobError::UnterminatedClass);
        check("[a-", GlobError::UnterminatedClass);
        check("[^bc", GlobError::UnterminatedClass);
        check("[\\", GlobError::UnterminatedClass);
        check("[]a]", GlobError::Unescaped(']'));
        check("[-]", GlobError::Unescaped('-'));
        check("[x-]", GlobError::Unescaped(']'));
        check("[a-b-c]", GlobError::Unescaped('-'));
        check("a\\", GlobError::TrailingEscape);
        check(&"a".repeat(4097), GlobError::TooLong(4097));
    }

    #[test]
    fn wildcards_are_seen() {
        let check = |pattern: &str, expected: bool| {
            let found = Pattern::parse(pattern).unwrap().has_wildcards();
            assert_eq!(found, expected, "{pattern}");
        };
        check("a.b", false);
        check("a\\*", false);
        check("a*", true);
        check("a?", true);
        check("[a]", true);
    }

    #[test]
    fn no_pattern_is_slow() {
        let pattern = Pattern::parse(&("a*".repeat(1000) + "b")).unwrap();
        assert!(!pattern.matches("a".repeat(1000).as_bytes()));
    }
}
