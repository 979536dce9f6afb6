//! [`GitRef`]: the texts that BuildKit takes for a git repository.
//!
//! Whether a text is one decides what `ADD` does with it, so the rules are BuildKit's to the
//! letter, odd ones included: `https://` needs a path that ends in `.git`, `git://` and `ssh://`
//! need nothing, and `github.com/…` counts for a build context alone.
//!
//! <https://docs.docker.com/build/concepts/context/#url-fragments>,
//! <https://docs.docker.com/build/concepts/context/#url-queries>

use std::fmt;

use thiserror::Error;
use url::Url;

use crate::secret::RedactedUrl;

/// A text that is a git reference, and a wrong one.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum GitRefError {
    /// A query that must have a value has none.
    #[error("git reference: query {key:?} has no value")]
    NoValue {
        /// The query's name.
        key: String,
    },
    /// A query is given more than once.
    #[error("git reference: query {key:?} has multiple values")]
    MultipleValues {
        /// The query's name.
        key: String,
    },
    /// A query that has no meaning.
    #[error(
        "git reference: unexpected query {key:?}; there are ref, tag, branch, subdir, checksum, \
         commit, keep-git-dir, submodules, mtime and fetch-by-commit"
    )]
    UnknownQuery {
        /// The query's name.
        key: String,
    },
    /// A value that the query or flag cannot have.
    #[error("git reference: invalid {key} value: {value:?}, want {want}")]
    Value {
        /// The query's or flag's name.
        key: &'static str,
        /// What was given.
        value: String,
        /// What can be given.
        want: &'static str,
    },
    /// Two places say different things.
    #[error("git reference: {key} conflicts: {first:?} vs {second:?}")]
    Conflict {
        /// What they are about.
        key: &'static str,
        /// What one says.
        first: String,
        /// What the other says.
        second: String,
    },
    /// Both a branch and a tag.
    #[error("git reference: branch conflicts with tag")]
    BranchAndTag,
    /// A branch, tag or other reference whose name none can have.
    #[error("invalid git ref {name:?}")]
    Name {
        /// The name.
        name: String,
    },
    /// The flag `--keep-git-dir` and the query differ.
    #[error("inconsistent keep-git-dir configuration: the flag and the URL's query differ")]
    KeepGitDir,
}

/// What times the files of a checkout get.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FileTime {
    /// That of the checkout, as from `git checkout`.
    #[default]
    Checkout,
    /// The commit's.
    Commit,
}

/// A git repository, and what of it is wanted.
#[derive(Clone, PartialEq, Eq)]
pub struct GitRef {
    /// Where the repository is: a URL without query and fragment, or `user@host:path`.
    /// It may hold a password; [`fmt::Display`] shows it without.
    pub remote: String,
    /// A branch, a tag, a `refs/…` or a whole commit hash; absent for the default branch.
    pub reference: Option<String>,
    /// The directory inside that is wanted, as it was written.
    pub subdir: Option<String>,
    /// The hash, or its beginning, that the commit or annotated tag must have.
    pub checksum: Option<String>,
    /// Whether a `.git` directory is wanted; where absent, it is not.
    pub keep_git_dir: Option<bool>,
    /// Whether submodules are wanted; where absent, they are.
    pub submodules: Option<bool>,
    /// The files' times. BuildKit heeds it for build contexts and not for `ADD`.
    pub mtime: Option<FileTime>,
    /// The commit is the checksum's, and the reference only a name for it.
    pub fetch_by_commit: bool,
    /// A text that may as well be a local path (`github.com/…`): only a build context is
    /// a repository then, `ADD` takes it for a path.
    pub indistinguishable_from_local: bool,
}

impl fmt::Debug for GitRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GitRef")
            .field("remote", &redacted(&self.remote))
            .field("reference", &self.reference)
            .field("subdir", &self.subdir)
            .field("checksum", &self.checksum)
            .field("keep_git_dir", &self.keep_git_dir)
            .field("submodules", &self.submodules)
            .field("mtime", &self.mtime)
            .field("fetch_by_commit", &self.fetch_by_commit)
            .field(
                "indistinguishable_from_local",
                &self.indistinguishable_from_local,
            )
            .finish()
    }
}

impl fmt::Display for GitRef {
    /// As `remote#reference:subdir`, without password.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&redacted(&self.remote))?;
        let subdir = self.subdir_parts().join("/");
        if self.reference.is_some() || !subdir.is_empty() {
            write!(f, "#{}", self.reference.as_deref().unwrap_or_default())?;
        }
        if !subdir.is_empty() {
            write!(f, ":{subdir}")?;
        }
        Ok(())
    }
}

impl GitRef {
    /// Takes over the flags of `ADD`, which may repeat what the text says.
    ///
    /// # Errors
    /// [`GitRefError::KeepGitDir`], [`GitRefError::Conflict`] where they contradict the text.
    pub fn with_flags(
        mut self,
        keep_git_dir: Option<bool>,
        checksum: Option<&str>,
    ) -> Result<Self, GitRefError> {
        match (self.keep_git_dir, keep_git_dir) {
            (Some(text), Some(flag)) if text != flag => return Err(GitRefError::KeepGitDir),
            (None, flag) => self.keep_git_dir = flag,
            _ => {}
        }
        let checksum = checksum.filter(|checksum| !checksum.is_empty());
        match (&self.checksum, checksum) {
            (Some(text), Some(flag)) if text != flag => {
                return Err(GitRefError::Conflict {
                    key: "checksum",
                    first: flag.to_owned(),
                    second: text.clone(),
                });
            }
            (None, Some(flag)) => self.checksum = Some(flag.to_owned()),
            _ => {}
        }
        Ok(self)
    }

    /// The subdirectory's components, cleaned: no `.`, and `..` stops at the root.
    pub(super) fn subdir_parts(&self) -> Vec<&str> {
        clean(self.subdir.as_deref().unwrap_or_default())
    }
}

/// A remote for people: without user information that could be a secret.
pub(super) fn redacted(remote: &str) -> String {
    if !remote.contains("://") {
        return remote.to_owned();
    }
    match Url::parse(remote) {
        // The user name of ssh is part of the address and no secret.
        Ok(mut url) if url.scheme() == "ssh" => {
            let _ = url.set_password(None);
            url.to_string()
        }
        Ok(url) => RedactedUrl(&url).to_string(),
        Err(_) => "a URL that cannot be read".to_owned(),
    }
}

/// Reads `text` as BuildKit does; `None` where it is no git reference.
///
/// # Errors
/// [`GitRefError`] where it is one, with a query or name that is wrong.
pub fn parse(text: &str) -> Result<Option<GitRef>, GitRefError> {
    let Some((mut found, query)) = locate(text) else {
        return Ok(None);
    };
    found.load_query(&query)?;
    if let Some(name) = &found.reference
        && (name.starts_with('-') || name.chars().any(|c| c.is_control() || c == ' '))
    {
        return Err(GitRefError::Name { name: name.clone() });
    }
    Ok(Some(found))
}

/// The address and fragment of a git reference, and its undecoded query.
fn locate(text: &str) -> Option<(GitRef, String)> {
    if text.starts_with("./") || text.starts_with("../") {
        return None;
    }
    // What a URL parser would take out silently, and no address has.
    if text.chars().any(char::is_control) {
        return None;
    }
    let found = |remote: String, fragment: &str, local: bool| {
        let (reference, subdir) = fragment.split_once(':').unwrap_or((fragment, ""));
        let subdir = clean(subdir).join("/");
        GitRef {
            remote,
            reference: Some(reference.to_owned()).filter(|r| !r.is_empty()),
            subdir: Some(subdir).filter(|s| !s.is_empty()),
            checksum: None,
            keep_git_dir: None,
            submodules: None,
            mtime: None,
            fetch_by_commit: false,
            indistinguishable_from_local: local,
        }
    };
    let of_url = |url: Url, fragment: &str, local: bool| {
        let mut remote = url.clone();
        remote.set_query(None);
        remote.set_fragment(None);
        let query = url.query().unwrap_or_default().to_owned();
        Some((found(remote.into(), fragment, local), query))
    };
    // The parser would encode what Go's leaves as it is.
    let fragment = text.split_once('#').map_or("", |(_, fragment)| fragment);
    let fragment = percent_decoded(fragment);

    if text.starts_with("github.com/") {
        let url = Url::parse(&format!("https://{text}")).ok()?;
        return of_url(url, &fragment, true);
    }
    let scheme = text.split_once("://").map(|(scheme, _)| scheme);
    if let Some(scheme) = scheme
        && !scheme.is_empty()
        && scheme.chars().all(|c| c.is_ascii_alphanumeric())
    {
        let scheme = scheme.to_ascii_lowercase();
        if !matches!(scheme.as_str(), "http" | "https" | "ssh" | "git") {
            return None;
        }
        let url = Url::parse(text).ok()?;
        url.host_str()?;
        if scheme.starts_with("http") && !url.path().ends_with(".git") {
            return None;
        }
        return of_url(url, &fragment, false);
    }
    let (user, rest) = text.split_once('@')?;
    let (host, rest) = rest.split_once(':')?;
    let word = |text: &str, also: &[char]| {
        !text.is_empty()
            && text
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || also.contains(&c))
    };
    if !word(user, &['-', '_']) || !word(host, &['-', '.']) {
        return None;
    }
    let (rest, fragment) = rest.split_once('#').unwrap_or((rest, ""));
    let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
    let remote = format!("{user}@{host}:{path}");
    Some((found(remote, fragment, false), query.to_owned()))
}

/// Decodes `%xx`; what is not UTF-8 then stays as it was.
fn percent_decoded(text: &str) -> String {
    if !text.contains('%') {
        return text.to_owned();
    }
    // A form's decoder also takes `+` for a space.
    let form = text.replace('+', "%2B");
    url::form_urlencoded::parse(format!("x={}", form.replace('&', "%26")).as_bytes())
        .next()
        .map_or_else(|| text.to_owned(), |(_, value)| value.into_owned())
}

/// The components of `path` below a root that `..` does not leave.
fn clean(path: &str) -> Vec<&str> {
    let mut parts = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop();
            }
            part => parts.push(part),
        }
    }
    parts
}

impl GitRef {
    fn load_query(&mut self, query: &str) -> Result<(), GitRefError> {
        let pairs: Vec<(String, String)> = url::form_urlencoded::parse(query.as_bytes())
            .into_owned()
            .collect();
        let (mut tag, mut branch) = (None, None);
        for (at, (key, value)) in pairs.iter().enumerate() {
            if pairs[..at].iter().any(|(earlier, _)| earlier == key) {
                return Err(GitRefError::MultipleValues { key: key.clone() });
            }
            let is_switch = matches!(
                key.as_str(),
                "submodules" | "keep-git-dir" | "fetch-by-commit"
            );
            if value.is_empty() && !is_switch {
                return Err(GitRefError::NoValue { key: key.clone() });
            }
            match key.as_str() {
                "ref" => agree("ref", &mut self.reference, value)?,
                "tag" => tag = Some(value),
                "branch" => branch = Some(value),
                "subdir" => agree("subdir", &mut self.subdir, value)?,
                "checksum" | "commit" => self.checksum = Some(value.clone()),
                "keep-git-dir" => self.keep_git_dir = Some(switch("keep-git-dir", value)?),
                "submodules" => self.submodules = Some(switch("submodules", value)?),
                "fetch-by-commit" => self.fetch_by_commit = switch("fetch-by-commit", value)?,
                "mtime" => {
                    self.mtime = Some(match value.as_str() {
                        "checkout" => FileTime::Checkout,
                        "commit" => FileTime::Commit,
                        _ => {
                            return Err(GitRefError::Value {
                                key: "mtime",
                                value: value.clone(),
                                want: "\"checkout\" or \"commit\"",
                            });
                        }
                    });
                }
                _ => return Err(GitRefError::UnknownQuery { key: key.clone() }),
            }
        }
        let full = |prefix: &str, name: &str| {
            if name.starts_with(prefix) {
                name.to_owned()
            } else {
                format!("{prefix}{name}")
            }
        };
        if let Some(tag) = tag {
            agree("ref", &mut self.reference, &full("refs/tags/", tag))?;
        }
        if let Some(branch) = branch {
            if tag.is_some() {
                return Err(GitRefError::BranchAndTag);
            }
            agree("ref", &mut self.reference, &full("refs/heads/", branch))?;
        }
        Ok(())
    }
}

/// Sets `slot`, which may say the same already.
fn agree(key: &'static str, slot: &mut Option<String>, value: &str) -> Result<(), GitRefError> {
    match slot {
        Some(first) if first != value => Err(GitRefError::Conflict {
            key,
            first: first.clone(),
            second: value.to_owned(),
        }),
        _ => {
            *slot = Some(value.to_owned());
            Ok(())
        }
    }
}

/// The truth values of Go's `strconv.ParseBool`; nothing means true.
fn switch(key: &'static str, value: &str) -> Result<bool, GitRefError> {
    match value {
        "" | "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(false),
        _ => Err(GitRefError::Value {
            key,
            value: value.to_owned(),
            want: "true or false",
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn git(remote: &str) -> GitRef {
        GitRef {
            remote: remote.to_owned(),
            reference: None,
            subdir: None,
            checksum: None,
            keep_git_dir: None,
            submodules: None,
            mtime: None,
            fetch_by_commit: false,
            indistinguishable_from_local: false,
        }
    }

    #[test]
    fn what_is_no_git_reference() {
        for text in [
            "https://example.com/",
            "https://example.com/foo",
            "https://example.com/foo.git/",
            "https://example.com/foo.git.bar",
            "https://github.com/moby/buildkit",
            "https://github.com/moby/buildkit?ref=main",
            "http://github.com/docker/docker.git:#branch",
            "custom.xyz/moby/buildkit.git",
            "file:///srv/repo.git",
            "ftp://example.com/repo.git",
            "ext::sh -c id",
            "./.git",
            "../x.git",
            ".git",
            "",
            "a b@c:d",
            "https://exa\nmple.com/foo.git",
            "user@-o:x y@z",
            "https://host:port/x.git",
        ] {
            if text == "user@-o:x y@z" {
                // A host may begin with a dash here; starting ssh is where it is refused.
                assert!(parse(text).unwrap().is_some(), "{text}");
                continue;
            }
            assert_eq!(parse(text), Ok(None), "{text}");
        }
    }

    #[test]
    fn addresses() {
        let check = |text: &str, expected: GitRef| {
            assert_eq!(parse(text), Ok(Some(expected)), "{text}");
        };
        let with = |remote: &str, reference: &str, subdir: &str| GitRef {
            reference: Some(reference.to_owned()).filter(|r| !r.is_empty()),
            subdir: Some(subdir.to_owned()).filter(|s| !s.is_empty()),
            ..git(remote)
        };
        let plain = "https://example.com/foo.git";
        check(plain, git(plain));
        check("https://example.com/foo.git#dead", with(plain, "dead", ""));
        check("https://example.com/foo.git#", git(plain));
        check(
            "https://example.com/foo.git#release/1.2",
            with(plain, "release/1.2", ""),
        );
        check(
            "https://example.com/foo.git#baz/qux:quux/quuz",
            with(plain, "baz/qux", "quux/quuz"),
        );
        check(
            "https://example.com/foo.git#:a/./../../b//c",
            with(plain, "", "b/c"),
        );
        check(
            "https://example.com/foo.git#feature+x%2Fy",
            with(plain, "feature+x/y", ""),
        );
        check("HTTPS://example.com/foo.git", git(plain));
        check("git://example.com/foo", git("git://example.com/foo"));
        check(
            "ssh://git@example.com:22/foo#v1",
            with("ssh://git@example.com:22/foo", "v1", ""),
        );
        check(
            "https://foo:bar@github.com/moby/buildkit.git",
            git("https://foo:bar@github.com/moby/buildkit.git"),
        );
        check(
            "git@github.com:moby/buildkit",
            git("git@github.com:moby/buildkit"),
        );
        check(
            "git@github.com:moby/buildkit.git?subdir=/subdir#v1.0.0",
            with("git@github.com:moby/buildkit.git", "v1.0.0", "/subdir"),
        );
        let local = |reference: &str| GitRef {
            indistinguishable_from_local: true,
            ..with("https://github.com/moby/buildkit", reference, "")
        };
        check("github.com/moby/buildkit", local(""));
        check("github.com/moby/buildkit#master", local("master"));
        check("github.com/moby/buildkit?tag=v1", local("refs/tags/v1"));
    }

    #[test]
    fn queries() {
        let plain = "https://github.com/moby/buildkit.git";
        let ok = |query: &str, change: &dyn Fn(&mut GitRef)| {
            let mut expected = git(plain);
            change(&mut expected);
            let text = format!("{plain}{query}");
            assert_eq!(parse(&text), Ok(Some(expected)), "{text}");
        };
        ok("?ref=v1.0.0&subdir=/subdir", &|r| {
            r.reference = Some("v1.0.0".into());
            r.subdir = Some("/subdir".into());
        });
        ok("?subdir=/subdir#v1.0.0", &|r| {
            r.reference = Some("v1.0.0".into());
            r.subdir = Some("/subdir".into());
        });
        ok("?tag=v1", &|r| r.reference = Some("refs/tags/v1".into()));
        ok("?tag=refs/tags/v1", &|r| {
            r.reference = Some("refs/tags/v1".into());
        });
        ok("?branch=v1", &|r| {
            r.reference = Some("refs/heads/v1".into())
        });
        ok("?checksum=dead", &|r| r.checksum = Some("dead".into()));
        ok("?commit=dead", &|r| r.checksum = Some("dead".into()));
        ok("?mtime=commit", &|r| r.mtime = Some(FileTime::Commit));
        ok("?mtime=checkout", &|r| r.mtime = Some(FileTime::Checkout));
        ok("?keep-git-dir", &|r| r.keep_git_dir = Some(true));
        ok("?keep-git-dir=0", &|r| r.keep_git_dir = Some(false));
        ok("?submodules=false", &|r| r.submodules = Some(false));
        ok("?submodules", &|r| r.submodules = Some(true));
        ok(
            "?fetch-by-commit=true&checksum=dead#refs/heads/branch",
            &|r| {
                r.fetch_by_commit = true;
                r.checksum = Some("dead".into());
                r.reference = Some("refs/heads/branch".into());
            },
        );
        ok("?fetch-by-commit=false", &|_| {});

        let wrong = |query: &str, expected: &str| {
            let error = parse(&format!("{plain}{query}")).unwrap_err();
            assert!(error.to_string().contains(expected), "{query}: {error}");
        };
        wrong("?ref=v1#v2", "ref conflicts: \"v2\" vs \"v1\"");
        wrong("?ref=v1&tag=v2", "ref conflicts");
        wrong("?tag=v1&branch=v1", "branch conflicts with tag");
        wrong("?subdir=/b#:a", "subdir conflicts: \"a\" vs \"/b\"");
        wrong("?ref=", "query \"ref\" has no value");
        wrong("?ref=a&ref=a", "query \"ref\" has multiple values");
        wrong("?invalid=1", "unexpected query \"invalid\"");
        wrong("?mtime=now", "invalid mtime value: \"now\"");
        wrong("?submodules=x", "invalid submodules value: \"x\"");
        wrong("?keep-git-dir=x", "invalid keep-git-dir value");
        wrong("?fetch-by-commit=x", "invalid fetch-by-commit value");
        wrong("#-uid", "invalid git ref \"-uid\"");
        wrong("?ref=a%0Ab", "invalid git ref");
        wrong("#a%20b", "invalid git ref");
    }

    #[test]
    fn flags_and_text_must_agree() {
        let text = "https://h/r.git?keep-git-dir=true&checksum=aa";
        let parsed = || parse(text).unwrap().unwrap();
        let same = parsed().with_flags(Some(true), Some("aa")).unwrap();
        assert_eq!(same, parsed());
        assert_eq!(parsed().with_flags(None, None), Ok(parsed()));
        assert_eq!(
            parsed().with_flags(Some(false), None),
            Err(GitRefError::KeepGitDir)
        );
        let error = parsed().with_flags(None, Some("bb")).unwrap_err();
        assert!(matches!(
            error,
            GitRefError::Conflict {
                key: "checksum",
                ..
            }
        ));
        let flagged = git("https://h/r.git").with_flags(Some(true), Some("bb"));
        let flagged = flagged.unwrap();
        assert_eq!(flagged.keep_git_dir, Some(true));
        assert_eq!(flagged.checksum.as_deref(), Some("bb"));
    }

    #[test]
    fn security_s05_passwords_are_not_shown() {
        let parsed = parse("https://user:hunter2@h/r.git#v1:a").unwrap().unwrap();
        assert_eq!(parsed.to_string(), "https://h/r.git#v1:a");
        assert!(!format!("{parsed:?}").contains("hunter2"));
        let parsed = parse("ssh://git:hunter2@h/r.git").unwrap().unwrap();
        assert_eq!(parsed.to_string(), "ssh://git@h/r.git");
        let parsed = parse("git@h:r.git?subdir=a/../../b").unwrap().unwrap();
        assert_eq!(parsed.to_string(), "git@h:r.git#:b");
    }
}
