//! JSON arrays of strings, as the exec form of instructions takes them.
//!
//! An own reader because three outcomes must be told apart just as Go's `encoding/json`
//! does (an array of strings, JSON with something else in it, no JSON at all: then the
//! text is a shell command), and because every string's place is needed. It does not
//! recurse, so depth costs no stack.

use std::ops::Range;

/// Go's decoder gives up on deeper nesting.
const MAX_DEPTH: usize = 10_000;

/// What a text is.
#[derive(Debug, PartialEq)]
pub(super) enum Json {
    /// An array of strings, each with its place in the text, quotes included.
    Strings(Vec<(String, Range<usize>)>),
    /// A valid array with an element that is no string; where that starts.
    NotStrings(usize),
    /// No JSON array.
    Other,
}

/// Reads `text`.
pub(super) fn parse_array(text: &str) -> Json {
    let start = text.len() - text.trim_start().len();
    if !text[start..].starts_with('[') {
        return Json::Other;
    }
    let mut reader = Reader {
        bytes: text.as_bytes(),
        text,
        at: start,
    };
    reader.array().unwrap_or(Json::Other)
}

struct Reader<'t> {
    bytes: &'t [u8],
    text: &'t str,
    at: usize,
}

/// Methods answer `None` for what is not JSON.
impl Reader<'_> {
    fn array(&mut self) -> Option<Json> {
        let mut strings = Vec::new();
        let mut other = None;
        let mut open: Vec<u8> = Vec::new();
        'value: loop {
            self.blanks();
            let start = self.at;
            let element = open.len() == 1;
            let first = self.peek()?;
            if element && first != b'"' && other.is_none() {
                other = Some(start);
            }
            match first {
                b'[' | b'{' => {
                    if open.len() == MAX_DEPTH {
                        return None;
                    }
                    open.push(first);
                    self.at += 1;
                    self.blanks();
                    if self.peek()? == closing(first) {
                        self.at += 1;
                        open.pop();
                    } else {
                        if first == b'{' {
                            self.key()?;
                        }
                        continue 'value;
                    }
                }
                b'"' => {
                    let value = self.string()?;
                    if element {
                        strings.push((value, start..self.at));
                    }
                }
                b't' => self.literal("true")?,
                b'f' => self.literal("false")?,
                b'n' => self.literal("null")?,
                _ => self.number()?,
            }
            while let Some(&container) = open.last() {
                self.blanks();
                let next = self.peek()?;
                self.at += 1;
                if next == b',' {
                    if container == b'{' {
                        self.blanks();
                        self.key()?;
                    }
                    continue 'value;
                }
                if next != closing(container) {
                    return None;
                }
                open.pop();
            }
            break;
        }
        self.blanks();
        if self.at != self.bytes.len() {
            return None;
        }
        Some(match other {
            Some(start) => Json::NotStrings(start),
            None => Json::Strings(strings),
        })
    }

    fn peek(&self) -> Option<u8> {
        self.bytes.get(self.at).copied()
    }

    fn blanks(&mut self) {
        while matches!(self.peek(), Some(b' ' | b'\t' | b'\r' | b'\n')) {
            self.at += 1;
        }
    }

    /// An object's key and the colon.
    fn key(&mut self) -> Option<()> {
        self.string()?;
        self.blanks();
        (self.peek()? == b':').then(|| self.at += 1)
    }

    fn literal(&mut self, word: &str) -> Option<()> {
        self.bytes[self.at..]
            .starts_with(word.as_bytes())
            .then(|| self.at += word.len())
    }

    fn digits(&mut self) -> Option<()> {
        let start = self.at;
        while self.peek().is_some_and(|b| b.is_ascii_digit()) {
            self.at += 1;
        }
        (self.at > start).then_some(())
    }

    fn number(&mut self) -> Option<()> {
        let start = self.at;
        if self.peek()? == b'-' {
            self.at += 1;
        }
        if self.peek()? == b'0' {
            self.at += 1;
        } else {
            self.digits()?;
        }
        if self.peek() == Some(b'.') {
            self.at += 1;
            self.digits()?;
        }
        if matches!(self.peek(), Some(b'e' | b'E')) {
            self.at += 1;
            if matches!(self.peek(), Some(b'+' | b'-')) {
                self.at += 1;
            }
            self.digits()?;
        }
        // A number out of range is a decoding error to Go, hence no JSON array either.
        let value: f64 = self.text[start..self.at].parse().ok()?;
        value.is_finite().then_some(())
    }

    /// A string, decoded. Halves of surrogate pairs become U+FFFD.
    fn string(&mut self) -> Option<String> {
        if self.peek()? != b'"' {
            return None;
        }
        self.at += 1;
        let mut out = String::new();
        loop {
            let rest = &self.text[self.at..];
            let plain = rest.find(|c: char| c == '"' || c == '\\' || c < ' ')?;
            out.push_str(&rest[..plain]);
            self.at += plain;
            match self.peek()? {
                b'"' => {
                    self.at += 1;
                    return Some(out);
                }
                b'\\' => {
                    self.at += 1;
                    out.push(self.escaped()?);
                }
                _ => return None,
            }
        }
    }

    /// What follows a backslash.
    fn escaped(&mut self) -> Option<char> {
        let kind = self.peek()?;
        self.at += 1;
        Some(match kind {
            b'"' | b'\\' | b'/' => char::from(kind),
            b'b' => '\x08',
            b'f' => '\x0c',
            b'n' => '\n',
            b'r' => '\r',
            b't' => '\t',
            b'u' => {
                let unit = self.hex4()?;
                if (0xd800..0xdc00).contains(&unit) && self.bytes[self.at..].starts_with(b"\\u") {
                    let before = self.at;
                    self.at += 2;
                    let low = self.hex4()?;
                    if (0xdc00..0xe000).contains(&low) {
                        let point = 0x10000 + ((unit - 0xd800) << 10) + (low - 0xdc00);
                        return char::from_u32(point);
                    }
                    // The second one stands for itself.
                    self.at = before;
                }
                char::from_u32(unit).unwrap_or(char::REPLACEMENT_CHARACTER)
            }
            _ => return None,
        })
    }

    fn hex4(&mut self) -> Option<u32> {
        let digits = self.bytes.get(self.at..self.at + 4)?;
        let mut value = 0;
        for &digit in digits {
            value = value * 16 + char::from(digit).to_digit(16)?;
        }
        self.at += 4;
        Some(value)
    }
}

fn closing(open: u8) -> u8 {
    if open == b'[' { b']' } else { b'}' }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn strings(text: &str) -> Option<Vec<String>> {
        match parse_array(text) {
            Json::Strings(list) => Some(list.into_iter().map(|(s, _)| s).collect()),
            _ => None,
        }
    }

    #[test]
    fn arrays_of_strings_are_read() {
        let check = |text: &str, expected: &[&str]| {
            assert_eq!(strings(text).unwrap(), expected, "{text}");
        };
        check("[]", &[]);
        check(" [ ] ", &[]);
        check(r#"["a" , "b c"]"#, &["a", "b c"]);
        check(r#"["\"\\\/\b\f\n\r\t"]"#, &["\"\\/\u{8}\u{c}\n\r\t"]);
        check(r#"["\u00e9\uD83D\uDE00é"]"#, &["é😀é"]);
        check(
            r#"["\ud800", "\udc00x", "\ud800\u0041"]"#,
            &["\u{fffd}", "\u{fffd}x", "\u{fffd}A"],
        );
        check(r#"[""]"#, &[""]);
    }

    #[test]
    fn places_include_the_quotes() {
        let text = r#" ["a",  "bc"]"#;
        let Json::Strings(list) = parse_array(text) else {
            panic!("not an array");
        };
        let places: Vec<&str> = list.iter().map(|(_, at)| &text[at.clone()]).collect();
        assert_eq!(places, [r#""a""#, r#""bc""#]);
    }

    #[test]
    fn other_elements_are_told_apart() {
        let check = |text: &str, at: usize| assert_eq!(parse_array(text), Json::NotStrings(at));
        check("[1]", 1);
        check(r#"["a", 2]"#, 6);
        check("[null]", 1);
        check(r#"[{"a": [true, {}]}, "b"]"#, 1);
        check("[[]]", 1);
        check("[-0.5e-3]", 1);
        let deep = format!("{}{}", "[".repeat(10_000), "]".repeat(10_000));
        check(&deep, 1);
    }

    #[test]
    fn everything_else_is_no_json() {
        let deep = format!("{}{}", "[".repeat(10_001), "]".repeat(10_001));
        let unclosed = "[".repeat(1_000_000);
        for text in [
            "",
            "a",
            "[",
            "[a]",
            "['a']",
            r#"["a""#,
            r#"["a",]"#,
            r#"["a"] b"#,
            r#"["a" "b"]"#,
            r#"["\x"]"#,
            "[\"\t\"]",
            r#"["\u12"]"#,
            "[01]",
            "[1e999]",
            "[+1]",
            "[tru]",
            r#"{"a": "b"}"#,
            r#"[{"a"}]"#,
            r#"[{"a": 1]"#,
            &deep,
            &unclosed,
        ] {
            assert_eq!(parse_array(text), Json::Other, "{text:.40}");
        }
    }
}
