//! Values that must not reach a log: secrets, and URLs that may carry one.

use std::fmt;

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_of_a_secret_is_printed() {
        assert_eq!(format!("{:?}", Secret::new("hunter2")), "Secret(…)");
        let url = Url::parse("https://user:hunter2@host:1/p?token=hunter2#hunter2").unwrap();
        assert_eq!(RedactedUrl(&url).to_string(), "https://host:1/p?…");
    }
}
