//! [`Location`]: where a repository is and how to speak to it.

use url::Url;

use super::error::GitError;
use super::reference::redacted;

/// Where a repository is.
#[derive(Clone, PartialEq, Eq)]
pub(super) enum Location {
    /// `http://`, `https://`; user information included.
    Http(Url),
    /// `git://`.
    Git {
        /// Name or address.
        host: String,
        /// TCP port.
        port: u16,
        /// Absolute path.
        path: String,
    },
    /// `ssh://` and `user@host:path`.
    Ssh {
        /// The user, where it is named.
        user: Option<String>,
        /// Name or address.
        host: String,
        /// TCP port, where it is named.
        port: Option<u16>,
        /// Path; relative to the user's home where it does not begin with `/`.
        path: String,
    },
}

impl Location {
    /// Reads a remote, also one that a repository names for its submodule.
    ///
    /// # Errors
    /// [`GitError::Remote`] where it is on this machine, needs a program other than ssh, or
    /// is none.
    pub(super) fn parse(remote: &str) -> Result<Self, GitError> {
        let fail = |reason: &str| GitError::Remote {
            remote: redacted(remote),
            reason: reason.to_owned(),
        };
        if remote.chars().any(char::is_control) {
            return Err(fail("a remote has no control characters"));
        }
        if remote.contains("://") {
            let url = Url::parse(remote).map_err(|error| fail(&error.to_string()))?;
            let path = percent_decoded(url.path()).ok_or_else(|| fail("its path is no text"))?;
            let host = || {
                let host = url.host_str().filter(|host| !host.is_empty());
                host.map(|host| host.trim_matches(['[', ']']).to_owned())
                    .ok_or_else(|| fail("it has no host"))
            };
            return match url.scheme() {
                "http" | "https" => Ok(Self::Http(url)),
                "git" => Ok(Self::Git {
                    host: safe(host()?).ok_or_else(|| fail("that is no host"))?,
                    port: url.port().unwrap_or(9418),
                    path,
                }),
                "ssh" => {
                    let user = percent_decoded(url.username()).filter(|user| !user.is_empty());
                    if user.as_deref().is_some_and(|user| user.starts_with('-')) {
                        return Err(fail("a user's name does not begin with a dash"));
                    }
                    Ok(Self::Ssh {
                        user,
                        host: safe(host()?).ok_or_else(|| fail("that is no host"))?,
                        port: url.port(),
                        // `ssh://host/~user/x` is how a home directory is written.
                        path: match path.strip_prefix("/~") {
                            Some(home) => format!("~{home}"),
                            None => path,
                        },
                    })
                }
                "file" => Err(fail(
                    "files of this machine are no remote; use a local build context",
                )),
                _ => Err(fail(
                    "expected an https://, http://, ssh:// or git:// address, or user@host:path",
                )),
            };
        }
        let local = || {
            fail(
                "that is a path on this machine or a remote helper; expected an https://, \
                 http://, ssh:// or git:// address, or user@host:path",
            )
        };
        let (address, path) = remote.split_once(':').ok_or_else(local)?;
        // `ext::…` and the like start programs.
        if address.contains('/') || path.starts_with(':') || path.is_empty() {
            return Err(local());
        }
        let (user, host) = match address.split_once('@') {
            Some((user, host)) => (Some(user.to_owned()), host),
            None => (None, address),
        };
        let user_is_safe = user
            .as_deref()
            .is_none_or(|user| !user.is_empty() && !user.starts_with('-'));
        let host = safe(host.to_owned()).filter(|_| user_is_safe);
        Ok(Self::Ssh {
            user,
            host: host.ok_or_else(|| fail("that is no user and host"))?,
            port: None,
            path: path.to_owned(),
        })
    }
}

/// A host that no program takes for an option.
fn safe(host: String) -> Option<String> {
    let fine = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_' | ':');
    (!host.is_empty() && !host.starts_with('-') && host.chars().all(fine)).then_some(host)
}

fn percent_decoded(text: &str) -> Option<String> {
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        if byte != b'%' {
            out.push(byte);
            continue;
        }
        let mut digit = || char::from(bytes.next()?).to_digit(16);
        let (high, low) = (digit()?, digit()?);
        out.push(u8::try_from(high * 16 + low).ok()?);
    }
    let text = String::from_utf8(out).ok()?;
    (!text.chars().any(char::is_control)).then_some(text)
}

/// A submodule's URL, which may be relative to the remote of what contains it.
///
/// <https://git-scm.com/docs/gitmodules#Documentation/gitmodules.txt-submoduleltnamegturl>
///
/// # Errors
/// [`GitError::Remote`] where it leads above everything.
pub(super) fn resolve_submodule(remote: &str, url: &str) -> Result<String, GitError> {
    if !url.starts_with("./") && !url.starts_with("../") {
        return Ok(url.to_owned());
    }
    let fail = || GitError::Remote {
        remote: redacted(remote),
        reason: format!("the submodule's URL {url:?} leads above it"),
    };
    let mut base = remote.trim_end_matches('/');
    let mut separator = '/';
    let mut rest = url;
    loop {
        if let Some(next) = rest.strip_prefix("./") {
            rest = next;
        } else if let Some(next) = rest.strip_prefix("../") {
            rest = next;
            if separator == ':' {
                return Err(fail());
            }
            if let Some(at) = base.rfind('/') {
                base = &base[..at];
            } else if let Some(at) = base.rfind(':') {
                base = &base[..at];
                separator = ':';
            } else {
                return Err(fail());
            }
        } else {
            break;
        }
    }
    Ok(format!("{base}{separator}{rest}")
        .trim_end_matches('/')
        .to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn security_s05_only_other_machines_are_remotes() {
        let wrong = |remote: &str, expected: &str| {
            let error = Location::parse(remote).err().expect(remote).to_string();
            assert!(error.contains(expected), "{remote}: {error}");
        };
        wrong("file:///etc", "files of this machine");
        wrong("FILE:///etc", "files of this machine");
        wrong("/srv/repo.git", "a path on this machine");
        wrong("../repo.git", "a path on this machine");
        wrong("-uid", "a path on this machine");
        wrong("ext::sh -c id", "a remote helper");
        wrong("fd::17", "a remote helper");
        wrong("./a:b", "a path on this machine");
        wrong("ftp://h/r", "expected an https://");
        wrong("ssh://-oProxyCommand=id/x", "");
        wrong("ssh://-x@h/x", "dash");
        wrong("-oProxyCommand=id:x", "no user and host");
        wrong("a@-oProxyCommand=id:x", "no user and host");
        wrong("-x@h:x", "no user and host");
        wrong("git://h/a%0ab", "no text");
        wrong("git:///a", "no host");
        wrong("a@b:c\nd", "control characters");

        let ssh = |user: Option<&str>, host: &str, port, path: &str| Location::Ssh {
            user: user.map(str::to_owned),
            host: host.to_owned(),
            port,
            path: path.to_owned(),
        };
        let check = |remote: &str, expected: Location| {
            assert!(Location::parse(remote).unwrap() == expected, "{remote}");
        };
        check("git@h:a/b.git", ssh(Some("git"), "h", None, "a/b.git"));
        check("h:/a", ssh(None, "h", None, "/a"));
        check("ssh://g@h:22/a%20b", ssh(Some("g"), "h", Some(22), "/a b"));
        check("ssh://h/~u/a", ssh(None, "h", None, "~u/a"));
        check("ssh://[::1]/a", ssh(None, "::1", None, "/a"));
        check(
            "git://h/a",
            Location::Git {
                host: "h".to_owned(),
                port: 9418,
                path: "/a".to_owned(),
            },
        );
    }

    #[test]
    fn relative_submodules_are_beside_their_parents() {
        let check = |remote: &str, url: &str, expected: &str| {
            assert_eq!(resolve_submodule(remote, url).unwrap(), expected);
        };
        check("https://h/a/b.git", "../c.git", "https://h/a/c.git");
        check("https://h/a/b.git/", "./c", "https://h/a/b.git/c");
        check("https://h/a/b.git", "../../c/", "https://h/c");
        check("git@h:a/b.git", "../c.git", "git@h:a/c.git");
        check("git@h:b.git", "../c.git", "git@h:c.git");
        check("https://h/a.git", "https://x/y", "https://x/y");
        check("https://h/a.git", "-uid", "-uid");
        assert!(resolve_submodule("git@h:b.git", "../../c").is_err());
        // One that chooses its host is on that host, and everything sees so.
        let far = resolve_submodule("https://u:p@h/a.git", "../../evil/x").unwrap();
        assert_eq!(far, "https://evil/x");
    }
}
