//! The patterns of `${name#pattern}` and `${name/pattern/…}`: `*`, `?` and `\` escapes.
//!
//! Brackets have no meaning here. `*` and `?` do not match a line feed. Matching takes time
//! proportional to pattern times value and no stack, whatever the pattern.

/// Larger products of pattern length and value length are refused: about a second of work.
const MAX_WORK: usize = 1 << 27;

/// Why a pattern cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PatternError {
    /// `\` before something else than `*`, `?`, `\`, `/`, `}`.
    #[error("invalid escape \"\\{0}\"")]
    Escape(char),
    /// `\` as the last character.
    #[error("\"\\\" at the end escapes nothing")]
    Trailing,
    /// Matching would take too long.
    #[error("a pattern of {pattern} characters is too long for a value of {value}")]
    TooCostly {
        /// The pattern's length.
        pattern: usize,
        /// The value's length in characters.
        value: usize,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Token {
    Literal(char),
    Any,
    Star,
}

/// How much of the value a pattern takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Extent {
    /// As little as possible.
    Shortest,
    /// As much as possible.
    Longest,
}

/// A pattern.
#[derive(Debug)]
pub(super) struct Pattern(Vec<Token>);

impl Pattern {
    /// Reads a pattern. The escape is `\` whatever the Dockerfile's escape character is.
    pub(super) fn parse(text: &str) -> Result<Self, PatternError> {
        let mut tokens = Vec::new();
        let mut chars = text.chars().peekable();
        while let Some(c) = chars.next() {
            tokens.push(match c {
                '*' if tokens.last() == Some(&Token::Star) => continue,
                '*' => Token::Star,
                '?' => Token::Any,
                // Needed only to get these two past the end of the substitution.
                '\\' if matches!(chars.peek(), Some('}' | '/')) => continue,
                '\\' => match chars.next() {
                    Some(c @ ('*' | '?' | '\\')) => Token::Literal(c),
                    Some(c) => return Err(PatternError::Escape(c)),
                    None => return Err(PatternError::Trailing),
                },
                c => Token::Literal(c),
            });
        }
        Ok(Self(tokens))
    }

    /// `value` without what the pattern matches at its start.
    pub(super) fn trim_start(&self, value: &str, extent: Extent) -> Result<String, PatternError> {
        let chars: Vec<char> = value.chars().collect();
        let ends = self.ends(&chars, false, extent)?;
        Ok(chars[ends[0].unwrap_or(0)..].iter().collect())
    }

    /// `value` without what the pattern matches at its end.
    pub(super) fn trim_end(&self, value: &str, extent: Extent) -> Result<String, PatternError> {
        let chars: Vec<char> = value.chars().collect();
        let ends = self.ends(&chars, true, extent)?;
        let mut starts = (0..ends.len()).filter(|&i| ends[i].is_some());
        let start = match extent {
            Extent::Longest => starts.next(),
            Extent::Shortest => starts.next_back(),
        };
        Ok(chars[..start.unwrap_or(chars.len())].iter().collect())
    }

    /// `value` with the first match replaced.
    pub(super) fn replace(&self, value: &str, by: &str) -> Result<String, PatternError> {
        let chars: Vec<char> = value.chars().collect();
        let ends = self.ends(&chars, false, Extent::Longest)?;
        let found = ends.iter().enumerate().find_map(|(i, e)| Some((i, (*e)?)));
        let Some((start, end)) = found else {
            return Ok(value.to_owned());
        };
        let mut out: String = chars[..start].iter().collect();
        out.push_str(by);
        out.extend(&chars[end..]);
        Ok(out)
    }

    /// `value` with every match replaced.
    ///
    /// As BuildKit has it, `by` is a template here: `$0` is the match, `$$` a dollar, and
    /// other `$names` are empty. At most `limit` bytes are made; `None` if they do not do.
    pub(super) fn replace_all(
        &self,
        value: &str,
        by: &str,
        limit: usize,
    ) -> Result<Option<String>, PatternError> {
        let chars: Vec<char> = value.chars().collect();
        let ends = self.ends(&chars, false, Extent::Longest)?;
        let template = Template::parse(by);
        let mut out = String::new();
        let mut copied = 0;
        let mut at = 0;
        while let Some((start, end)) = (at..ends.len()).find_map(|i| Some((i, (*ends.get(i)?)?))) {
            out.extend(&chars[copied..start]);
            // An empty match right after a match does not count.
            if end > copied || start == 0 {
                template.render(&chars[start..end], &mut out);
            }
            if out.len() > limit {
                return Ok(None);
            }
            copied = end;
            at = end.max(at + 1);
        }
        out.extend(&chars[copied.min(chars.len())..]);
        Ok(Some(out))
    }

    /// For every start in `value`, where the match that begins there ends, if there is one.
    /// With `to_end` only matches that reach the end of the value count.
    fn ends(
        &self,
        value: &[char],
        to_end: bool,
        extent: Extent,
    ) -> Result<Vec<Option<usize>>, PatternError> {
        let length = value.len();
        if self.0.len().saturating_mul(length) > MAX_WORK {
            return Err(PatternError::TooCostly {
                pattern: self.0.len(),
                value: length,
            });
        }
        // ends[i]: the best end when the tokens looked at so far, from the last one
        // backwards, match from i on.
        let mut ends: Vec<Option<usize>> = (0..=length)
            .map(|i| (!to_end || i == length).then_some(i))
            .collect();
        for token in self.0.iter().rev() {
            match *token {
                Token::Literal(c) => shift(&mut ends, |i| value[i] == c),
                Token::Any => shift(&mut ends, |i| value[i] != '\n'),
                Token::Star => {
                    for i in (0..length).rev().filter(|&i| value[i] != '\n') {
                        ends[i] = match (ends[i], ends[i + 1], extent) {
                            (Some(a), Some(b), Extent::Shortest) => Some(a.min(b)),
                            (a, b, Extent::Longest) => a.max(b),
                            (a, b, Extent::Shortest) => a.or(b),
                        };
                    }
                }
            }
        }
        Ok(ends)
    }
}

/// Takes one character more at the front, where `fits` allows it.
fn shift(ends: &mut [Option<usize>], fits: impl Fn(usize) -> bool) {
    let length = ends.len() - 1;
    for i in 0..length {
        ends[i] = if fits(i) { ends[i + 1] } else { None };
    }
    ends[length] = None;
}

/// A replacement with `$0` and `$$` in it.
struct Template(Vec<Part>);

enum Part {
    Text(String),
    Match,
}

impl Template {
    fn parse(text: &str) -> Self {
        let mut parts = Vec::new();
        let mut rest = text;
        while let Some(dollar) = rest.find('$') {
            parts.push(Part::Text(rest[..dollar].to_owned()));
            let after = &rest[dollar + 1..];
            if let Some(after) = after.strip_prefix('$') {
                parts.push(Part::Text("$".to_owned()));
                rest = after;
                continue;
            }
            let (name, remaining) = match after.strip_prefix('{') {
                Some(braced) => match braced.split_once('}') {
                    Some((name, remaining)) if word_end(name) == name.len() => (name, remaining),
                    _ => ("", after),
                },
                None => after.split_at(word_end(after)),
            };
            match name {
                "" => {
                    parts.push(Part::Text("$".to_owned()));
                    rest = after;
                    continue;
                }
                "0" => parts.push(Part::Match),
                // No other group exists.
                _ => {}
            }
            rest = remaining;
        }
        parts.push(Part::Text(rest.to_owned()));
        Self(parts)
    }

    fn render(&self, matched: &[char], out: &mut String) {
        for part in &self.0 {
            match part {
                Part::Text(text) => out.push_str(text),
                Part::Match => out.extend(matched),
            }
        }
    }
}

/// The length of the name at the start of `text`.
fn word_end(text: &str) -> usize {
    text.find(|c: char| !c.is_alphanumeric() && c != '_')
        .unwrap_or(text.len())
}

#[cfg(test)]
mod tests {
    use super::*;
    use Extent::{Longest, Shortest};

    fn pattern(text: &str) -> Pattern {
        Pattern::parse(text).unwrap()
    }

    #[test]
    fn starts_are_trimmed() {
        let check = |value: &str, text: &str, shortest: &str, longest: &str| {
            let pattern = pattern(text);
            assert_eq!(pattern.trim_start(value, Shortest).unwrap(), shortest);
            assert_eq!(pattern.trim_start(value, Longest).unwrap(), longest);
        };
        check("foobarbaz", "f*b", "arbaz", "az");
        check("/usr/lib/x", "*/", "usr/lib/x", "x");
        check("abc", "x", "abc", "abc");
        check("abc", "", "abc", "abc");
        check("abc", "*", "abc", "");
        check("abc", "**", "abc", "");
        check("äbc", "?", "bc", "bc");
        check("a*b*c", "a\\*", "b*c", "b*c");
        check("a\nb", "*", "a\nb", "\nb");
        check("a\nb", "a?b", "a\nb", "a\nb");
        check("a}b", "a\\}", "b", "b");
        check("x[a]", "x[a]", "", "");
    }

    #[test]
    fn ends_are_trimmed() {
        let check = |value: &str, text: &str, shortest: &str, longest: &str| {
            let pattern = pattern(text);
            assert_eq!(pattern.trim_end(value, Shortest).unwrap(), shortest);
            assert_eq!(pattern.trim_end(value, Longest).unwrap(), longest);
        };
        check("foobarbaz", "b*", "foobar", "foo");
        check("file.tar.gz", ".*", "file.tar", "file");
        check("abc", "??", "a", "a");
        check("abc", "*", "abc", "");
        check("abc", "", "abc", "abc");
        check("abc", "b", "abc", "abc");
        check("a*b*c", "\\**", "a*b", "a");
    }

    #[test]
    fn matches_are_replaced() {
        let check = |value: &str, text: &str, by: &str, first: &str, all: &str| {
            let pattern = pattern(text);
            assert_eq!(pattern.replace(value, by).unwrap(), first);
            assert_eq!(pattern.replace_all(value, by, 100).unwrap().unwrap(), all);
        };
        check("foobarbaz", "ba", "X", "fooXrbaz", "fooXrXz");
        check("foobarbaz", "b*r", "X", "fooXbaz", "fooXbaz");
        check("abc", "?", "x", "xbc", "xxx");
        check("abc", "z", "x", "abc", "abc");
        check("abc", "", "-", "-abc", "-a-b-c-");
        check("abc", "*", "-", "-", "-");
        check("", "*", "-", "-", "-");
        check("aab", "a", "", "ab", "b");
        check("ab", "a", "$0$$$1${0}${x}$-", "$0$$$1${0}${x}$-b", "a$a$-b");
        check("ab", "a", "${0", "${0b", "${0b");
    }

    #[test]
    fn costs_and_sizes_are_limited() {
        let text = "a*".repeat(1 << 14);
        let value = "a".repeat(1 << 14);
        assert_eq!(
            pattern(&text).trim_start(&value, Shortest),
            Err(PatternError::TooCostly {
                pattern: 1 << 15,
                value: 1 << 14
            })
        );
        let value = "a".repeat(1000);
        assert_eq!(pattern("a").replace_all(&value, &value, 4000), Ok(None));
        // What makes a backtracking matcher explode.
        let text = "a*".repeat(30) + "b";
        assert_eq!(pattern(&text).trim_start(&value, Longest).unwrap(), value);
    }

    #[test]
    fn wrong_escapes_are_errors() {
        assert_eq!(
            Pattern::parse("a\\b").unwrap_err(),
            PatternError::Escape('b')
        );
        assert_eq!(Pattern::parse("a\\").unwrap_err(), PatternError::Trailing);
    }
}
