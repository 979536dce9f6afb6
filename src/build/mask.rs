//! [`SecretTexts`]: what was lent to a step, so that its output can be shown without it.
//!
//! A step that prints a secret, by mistake or `set -x`, would have it in every log. So a secret is
//! taken out of the output whole, line by line, and as base64, hexadecimal and JSON write it. That
//! is for mistakes: a step that means to tell a secret can always write it in yet another way.

use std::collections::HashMap;

use base64::Engine as _;
use zeroize::Zeroizing;

/// What stands for a secret.
const STARS: &[u8] = b"***";

/// Shorter secrets are shown: they are no secrets, and their letters are everywhere.
const SECRET_MIN_BYTES: usize = 4;

/// Shorter lines of a secret, and shorter texts that it is written as, are shown: `{` and `}` say
/// nothing.
const PART_MIN_BYTES: usize = 8;

/// By how many bytes texts are told apart at first.
const KEY_BYTES: usize = 4;

/// Texts that are not to be shown.
#[derive(Default)]
pub(super) struct SecretTexts {
    texts: HashMap<[u8; KEY_BYTES], Vec<Zeroizing<Vec<u8>>>>,
}

impl SecretTexts {
    /// Adds a secret in all its forms.
    pub(super) fn add(&mut self, secret: &[u8]) {
        let secret = secret.trim_ascii_end();
        if secret.len() < SECRET_MIN_BYTES {
            return;
        }
        self.text(secret.to_vec());
        let mut parts: Vec<Vec<u8>> = secret
            .split(|byte| *byte == b'\n')
            .map(|line| line.trim_ascii_end().to_vec())
            .collect();
        let text = String::from_utf8_lossy(secret);
        let json = serde_json::Value::from(text.as_ref()).to_string();
        parts.push(json.trim_matches('"').as_bytes().to_vec());
        for upper in [false, true] {
            let digits = secret.iter().map(|byte| match upper {
                true => format!("{byte:02X}"),
                false => format!("{byte:02x}"),
            });
            parts.push(digits.collect::<String>().into_bytes());
        }
        let alphabets = [
            &base64::engine::general_purpose::STANDARD_NO_PAD,
            &base64::engine::general_purpose::URL_SAFE_NO_PAD,
        ];
        for alphabet in alphabets {
            // At each of the places that it may have in a longer text.
            for (before, shared) in [(0, 0), (1, 2), (2, 3)] {
                let longer = Zeroizing::new([&[0; 2][..before], secret].concat());
                let text = alphabet.encode(&longer);
                parts.push(text.as_bytes()[shared..longer.len() * 8 / 6].to_vec());
            }
        }
        for part in parts {
            if part.len() >= PART_MIN_BYTES {
                self.text(part);
            }
        }
    }

    fn text(&mut self, text: Vec<u8>) {
        let Some(key) = key(&text) else { return };
        let texts = self.texts.entry(key).or_default();
        texts.push(Zeroizing::new(text));
        // Of two that begin alike, the longer is meant.
        texts.sort_by_key(|text| std::cmp::Reverse(text.len()));
    }

    /// The length of the text that `bytes` begins with, if it does with one.
    fn length_at(&self, bytes: &[u8]) -> Option<usize> {
        let texts = self.texts.get(&key(bytes)?)?;
        let found = texts.iter().find(|text| bytes.starts_with(text));
        found.map(|text| text.len())
    }

    /// Whether `bytes` may be the begin of a text, and the rest of it comes later.
    fn may_begin(&self, bytes: &[u8]) -> bool {
        let begins =
            |text: &Zeroizing<Vec<u8>>| text.len() > bytes.len() && text.starts_with(bytes);
        match key(bytes) {
            Some(key) => self.texts.get(&key).is_some_and(|t| t.iter().any(begins)),
            None => self.texts.values().flatten().any(begins),
        }
    }
}

fn key(bytes: &[u8]) -> Option<[u8; KEY_BYTES]> {
    bytes.get(..KEY_BYTES)?.try_into().ok()
}

/// One stream of a step's output.
#[derive(Default)]
pub(super) struct Masked {
    /// The end of what came, which may be the begin of a secret.
    held: Vec<u8>,
}

impl Masked {
    /// Passes on what came, with stars for secrets.
    pub(super) fn add(&mut self, secrets: &SecretTexts, bytes: &[u8], mut say: impl FnMut(&[u8])) {
        if secrets.texts.is_empty() {
            return say(bytes);
        }
        self.held.extend_from_slice(bytes);
        self.pass(secrets, true, &mut say);
    }

    /// Passes on what was held back.
    pub(super) fn end(&mut self, secrets: &SecretTexts, mut say: impl FnMut(&[u8])) {
        self.pass(secrets, false, &mut say);
    }

    fn pass(&mut self, secrets: &SecretTexts, more_may_come: bool, say: &mut impl FnMut(&[u8])) {
        let mut shown = Vec::with_capacity(self.held.len());
        let mut at = 0;
        while at < self.held.len() {
            let rest = &self.held[at..];
            // A longer text may begin where a shorter one stands.
            if more_may_come && secrets.may_begin(rest) {
                break;
            }
            if let Some(length) = secrets.length_at(rest) {
                shown.extend_from_slice(STARS);
                at += length;
            } else {
                shown.push(rest[0]);
                at += 1;
            }
        }
        self.held.drain(..at);
        if !shown.is_empty() {
            say(&shown);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is shown of pieces of output.
    fn shown(secrets: &[&str], pieces: &[&str]) -> String {
        let mut all = SecretTexts::default();
        for secret in secrets {
            all.add(secret.as_bytes());
        }
        let (mut masked, mut out) = (Masked::default(), Vec::new());
        for piece in pieces {
            masked.add(&all, piece.as_bytes(), |bytes| out.extend_from_slice(bytes));
        }
        masked.end(&all, |bytes| out.extend_from_slice(bytes));
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn security_s13_secrets_are_taken_out_of_output() {
        let check = |secrets: &[&str], pieces: &[&str], expected: &str| {
            assert_eq!(shown(secrets, pieces), expected, "{secrets:?} {pieces:?}");
        };
        check(&[], &["anything"], "anything");
        check(
            &["hunter2"],
            &["a hunter2 b hunter2hunter2"],
            "a *** b ******",
        );
        // A secret of a file has a line end that uses of it have not.
        check(&["hunter2\n"], &["hunter2", "!\nhunter2\n"], "***!\n***\n");
        check(
            &["hunter2"],
            &["hun", "t", "er2 hunt", "er3"],
            "*** hunter3",
        );
        check(&["hunter2"], &["hunter", "hunter2", " hu"], "hunter*** hu");
        // Too short, and too short for a line.
        check(&["abc"], &["abcabc"], "abcabc");
        check(&["{\n\"key\": 1\n}"], &["{ \"key\": 1 }"], "{ *** }");
        check(
            &["first line\nsecond line"],
            &["second line, first ", "line\n"],
            "***, ***\n",
        );
        // The longer one, whichever came first.
        check(
            &["token", "token-and-more"],
            &["token-and-", "more token-"],
            "*** ***-",
        );
        check(
            &["hunter2-hunter2"],
            &["68756E746572322d 68756e746572322d68756e74657232"],
            "68756E746572322d ***",
        );
        check(
            &["a\"b\\c\nd"],
            &["{\"k\":\"a\\\"b\\\\c\\nd\"}"],
            "{\"k\":\"***\"}",
        );
    }

    #[test]
    fn security_s13_a_secret_in_base64_is_one() {
        let base64 = &base64::engine::general_purpose::STANDARD;
        for before in ["", "a", "ab", "abc", "user:"] {
            for after in ["", "x", "xy", "xyz"] {
                let text = base64.encode(format!("{before}open-sesame?>{after}"));
                let got = shown(&["open-sesame?>"], &[&text]);
                assert!(got.contains("***") && got.len() < 20, "{text} {got}");
            }
        }
    }

    #[test]
    fn security_s13_pieces_of_any_length_make_no_difference() {
        let text = "x hunter2-and-more hunter2 hunter";
        for length in 1..text.len() {
            let pieces: Vec<&str> = text
                .as_bytes()
                .chunks(length)
                .map(|piece| std::str::from_utf8(piece).unwrap())
                .collect();
            let got = shown(&["hunter2", "hunter2-and-more"], &pieces);
            assert_eq!(got, "x *** *** hunter", "{length}");
        }
    }
}
