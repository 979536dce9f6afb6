//! Values that must not reach a log: secrets, and URLs that may carry one.

use std::borrow::Cow;
use std::fmt;
use std::ops::Range;

use serde::Deserialize;
use url::Url;

/// A secret text. `Debug` prints no part of it and there is no `Display`.
#[derive(Clone, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
pub struct Secret(String);

impl Secret {
    /// Wraps `value`.
    pub fn new(value: impl Into<String>) -> Self {
        Self(value.into())
    }

    /// The secret itself; for the one place that sends or compares it.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

/// Shows a URL without user information, query values and fragment.
///
/// Upload locations and tokens carry credentials in their query, so only the
/// query's presence is shown.
#[derive(Debug)]
pub struct RedactedUrl<'a>(pub &'a Url);

impl fmt::Display for RedactedUrl<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut url = self.0.clone();
        // Both fail only for URLs that cannot have user information at all.
        let _ = url.set_username("");
        let _ = url.set_password(None);
        url.set_fragment(None);
        let query = url.query().is_some();
        url.set_query(None);
        write!(f, "{url}{}", if query { "?…" } else { "" })
    }
}

/// `text` without the user information of the URLs in it, which may be anywhere, as in a line of
/// a Dockerfile. The user of `ssh://user@host` stays where no password is with it.
pub fn without_userinfo(text: &str) -> Cow<'_, str> {
    let found = userinfo(text);
    if found.is_empty() {
        return Cow::Borrowed(text);
    }
    let mut rest = text.to_owned();
    for range in found.into_iter().rev() {
        // With its `@`.
        rest.replace_range(range.start..=range.end, "");
    }
    Cow::Owned(rest)
}

/// As [`without_userinfo`], with a star for each character, so that all others stay at their place.
pub fn starred_userinfo(text: &str) -> Cow<'_, str> {
    let found = userinfo(text);
    if found.is_empty() {
        return Cow::Borrowed(text);
    }
    let mut starred = text.to_owned();
    for range in found.into_iter().rev() {
        let stars = "*".repeat(text[range.clone()].chars().count());
        starred.replace_range(range, &stars);
    }
    Cow::Owned(starred)
}

/// Where user information stands in `text`, each without its `@`.
fn userinfo(text: &str) -> Vec<Range<usize>> {
    let ends = |c: char| c.is_whitespace() || "/?#\"'\\<>".contains(c);
    let mut found = Vec::new();
    for (scheme_end, separator) in text.match_indices("://") {
        let start = scheme_end + separator.len();
        let authority = text[start..].split(ends).next().unwrap_or_default();
        let Some(length) = authority.rfind('@') else {
            continue;
        };
        let is_name = text[..scheme_end].ends_with("ssh") && !authority[..length].contains(':');
        if !is_name {
            found.push(start..start + length);
        }
    }
    found
}

/// Serializes a text [`without_userinfo`].
///
/// # Errors
/// Those of the serializer.
pub fn serialize_without_userinfo<S: serde::Serializer>(
    text: &str,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&without_userinfo(text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn security_s13_nothing_of_a_secret_is_printed() {
        assert_eq!(format!("{:?}", Secret::new("hunter2")), "Secret(…)");
        let url = Url::parse("https://user:hunter2@host:1/p?token=hunter2#hunter2").unwrap();
        assert_eq!(RedactedUrl(&url).to_string(), "https://host:1/p?…");
    }

    #[test]
    fn security_s05_user_information_is_left_out_of_any_text() {
        let check = |text: &str, without: &str, starred: &str| {
            assert_eq!(without_userinfo(text), without);
            assert_eq!(starred_userinfo(text), starred);
        };
        for text in [
            "",
            "ADD a@b /c@d",
            "https://host/p@q",
            "https://host?a@b",
            "git@host:p.git",
            "ssh://git@host/p",
        ] {
            check(text, text, text);
        }
        check("https://tok@h/p", "https://h/p", "https://***@h/p");
        check("http://u:p@h:1", "http://h:1", "http://***@h:1");
        check("ssh://u:p@h/p", "ssh://h/p", "ssh://***@h/p");
        check(
            "ADD [\"http://ü:p@x@h\", \"git://u@h/a\"] /d@e/",
            "ADD [\"http://h\", \"git://h/a\"] /d@e/",
            "ADD [\"http://*****@h\", \"git://*@h/a\"] /d@e/",
        );
    }
}
