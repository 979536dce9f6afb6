//! Which texts are addresses of git repositories, and how addresses are shown.

use std::fmt;

use url::Url;

use crate::remote::git;
use crate::secret::RedactedUrl;

/// What a repository of GitHub may begin with where the main context is named.
const SHORT_FORM: &str = "github.com/";

/// Whether BuildKit takes `text` for the address of a git repository: a URL of git or ssh,
/// an HTTP(S) URL whose path ends in `.git`, or `USER@HOST:PATH`.
///
/// `github.com/OWNER/NAME` is one where the main context is named, and only there: see
/// [`is_git_context`].
pub fn is_git(text: &str) -> bool {
    is_git_context(text) && !text.starts_with(SHORT_FORM)
}

/// [`is_git`], and also for the old short form of GitHub's repositories.
pub fn is_git_context(text: &str) -> bool {
    // One that is wrong is one, too: whoever fetches it says what is wrong.
    !matches!(git::parse(text), Ok(None))
}

/// Whether `text` begins as an address for HTTP does.
pub(super) fn is_http(text: &str) -> bool {
    text.starts_with("https://") || text.starts_with("http://")
}

/// Shows an address without what may be secret in it.
pub(super) struct Shown<'a>(pub(super) &'a str);

impl fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Here an `@` is before a digest.
        if self.0.starts_with("oci-layout:") || self.0.starts_with("docker-image:") {
            return f.write_str(self.0);
        }
        match Url::parse(self.0) {
            Ok(url) if url.has_host() => RedactedUrl(&url).fmt(f),
            // Not a URL, so nothing in it is a password by its form, but for one that is
            // written wrong.
            _ if self.0.contains("://") && self.0.contains('@') => {
                f.write_str("an address with credentials, which is not a valid URL")
            }
            _ => f.write_str(self.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn git_is_told_from_http_and_paths() {
        for text in [
            "https://github.com/a/b.git",
            "https://github.com/a/b.git#main:sub",
            "https://github.com/a/b.git?ref=main&subdir=x",
            "http://user:pass@host/b.git",
            "git://host/b",
            "ssh://git@host:22/b",
            "SSH://host/b",
            "git@github.com:a/b",
            "me@host.example:b.git#v1",
        ] {
            assert!(is_git(text), "{text}");
            assert!(is_git_context(text), "{text}");
        }
        for text in [
            "https://github.com/a/b",
            "https://host.git",
            "https://host/b.git/archive.tar.gz",
            "https://host/x?y=/b.git",
            "file:///b.git",
            "./github.com/a/b",
            "../git@host:b",
            "dir/x@host:b",
            "/a/b.git",
            "b.git",
            "@host:b",
            "git@:b",
            "git@host",
            "",
        ] {
            assert!(!is_git(text), "{text}");
            assert!(!is_git_context(text), "{text}");
        }
        assert!(is_git_context("github.com/a/b"));
        assert!(!is_git("github.com/a/b"));
    }

    #[test]
    fn security_s05_nothing_secret_is_shown() {
        for (text, expected) in [
            ("https://u:hunter2@host/b.git#x", "https://host/b.git"),
            ("https://host/x?token=hunter2", "https://host/x?…"),
            ("git@host:b", "git@host:b"),
            (
                "https://u:hunter2@[/b",
                "an address with credentials, which is not a valid URL",
            ),
        ] {
            assert_eq!(Shown(text).to_string(), expected);
        }
    }
}
