//! [`Reference`]: `registry/repository:tag@digest`, as Docker reads it.

use std::fmt;

use thiserror::Error;

use super::Digest;

/// The registry that a name without one means.
pub const DOCKER_HUB: &str = "docker.io";

/// A repository at a registry.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Repository {
    registry: String,
    name: String,
}

/// A repository with a tag, a digest or both; the digest decides where both are given.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Reference {
    repository: Repository,
    tag: Option<String>,
    digest: Option<Digest>,
}

/// Why a text is no [`Reference`].
#[derive(Debug, Error, PartialEq, Eq)]
#[error("invalid reference {reference:?}: {reason}")]
pub struct ReferenceError {
    /// The text as given.
    pub reference: String,
    /// What is wrong with it.
    pub reason: &'static str,
}

impl Repository {
    /// The registry: a host name, with a port where it is not the usual one.
    pub fn registry(&self) -> &str {
        &self.registry
    }

    /// The path of the repository at its registry, such as `library/ubuntu`.
    pub fn name(&self) -> &str {
        &self.name
    }
}

impl fmt::Display for Repository {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.registry, self.name)
    }
}

impl Reference {
    /// Parses `text` with Docker's defaults: registry `docker.io`, prefix
    /// `library/` there, tag `latest` where neither tag nor digest is given.
    ///
    /// # Errors
    /// [`ReferenceError`] for what the grammar of the distribution project rejects.
    ///
    /// <https://github.com/distribution/reference/blob/main/reference.go>
    pub fn parse(text: &str) -> Result<Self, ReferenceError> {
        let fail = |reason| ReferenceError {
            reference: text.to_owned(),
            reason,
        };
        let (rest, digest) = match text.split_once('@') {
            Some((rest, digest)) => {
                let digest = Digest::parse(digest)
                    .map_err(|_| fail("the part after \"@\" is not a sha256 digest"))?;
                (rest, Some(digest))
            }
            None => (text, None),
        };
        let (name, tag) = match rest.rsplit_once(':') {
            // A colon before the last slash belongs to a port.
            Some((name, tag)) if !tag.contains('/') => (name, Some(tag)),
            _ => (rest, None),
        };
        if let Some(tag) = tag
            && !is_tag(tag)
        {
            return Err(fail(
                "the tag must be 1 to 128 of [A-Za-z0-9_.-], not starting with . or -",
            ));
        }
        let (registry, name) = match name.split_once('/') {
            Some((first, rest)) if is_host(first) => (first, rest),
            _ => (DOCKER_HUB, name),
        };
        let registry = if registry == "index.docker.io" {
            DOCKER_HUB
        } else {
            registry
        };
        if registry.is_empty()
            || !registry
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b".-:[]_".contains(&b))
        {
            return Err(fail("the registry is not a host name"));
        }
        if name.is_empty() {
            return Err(fail("the repository is empty"));
        }
        if name.bytes().any(|b| b.is_ascii_uppercase()) {
            return Err(fail("the repository must be lower case"));
        }
        if name.len() > 255 || !name.split('/').all(is_component) {
            return Err(fail(
                "the repository must be components of [a-z0-9] with single separators",
            ));
        }
        let name = if registry == DOCKER_HUB && !name.contains('/') {
            format!("library/{name}")
        } else {
            name.to_owned()
        };
        let tag = match (tag, &digest) {
            (Some(tag), _) => Some(tag.to_owned()),
            (None, None) => Some("latest".to_owned()),
            (None, Some(_)) => None,
        };
        let repository = Repository {
            registry: registry.to_owned(),
            name,
        };
        Ok(Self {
            repository,
            tag,
            digest,
        })
    }

    /// Where the image is.
    pub fn repository(&self) -> &Repository {
        &self.repository
    }

    /// The tag; absent only where a digest was given alone.
    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    /// The digest, where one was given.
    pub fn digest(&self) -> Option<&Digest> {
        self.digest.as_ref()
    }

    /// The same repository, pinned to `digest` alone.
    pub fn with_digest(&self, digest: Digest) -> Self {
        Self {
            repository: self.repository.clone(),
            tag: None,
            digest: Some(digest),
        }
    }

    /// What stands after `/manifests/` in a request: the digest, else the tag.
    pub fn selector(&self) -> &str {
        match (&self.digest, &self.tag) {
            (Some(digest), _) => digest.as_str(),
            (None, Some(tag)) => tag,
            (None, None) => unreachable!("a reference has a tag or a digest"),
        }
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.repository.fmt(f)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        if let Some(digest) = &self.digest {
            write!(f, "@{digest}")?;
        }
        Ok(())
    }
}

fn is_host(first: &str) -> bool {
    first == "localhost"
        || first.contains(['.', ':'])
        || first.bytes().any(|b| b.is_ascii_uppercase())
}

fn is_tag(tag: &str) -> bool {
    (1..=128).contains(&tag.len())
        && tag
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"_.-".contains(&b))
        && !tag.starts_with(['.', '-'])
}

/// `[a-z0-9]+` joined by `.`, `_`, `__` or any number of `-`.
fn is_component(component: &str) -> bool {
    let alphanumeric = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let bytes = component.as_bytes();
    let edge = |b: Option<&u8>| b.is_some_and(|b| alphanumeric(*b));
    edge(bytes.first())
        && edge(bytes.last())
        && component
            .split(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit())
            .all(|separator| {
                matches!(separator, "" | "." | "_" | "__") || separator.bytes().all(|b| b == b'-')
            })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(text: &str, expected: &str) {
        assert_eq!(Reference::parse(text).unwrap().to_string(), expected);
    }

    #[test]
    fn docker_defaults_are_filled_in() {
        check("ubuntu", "docker.io/library/ubuntu:latest");
        check("a/b", "docker.io/a/b:latest");
        check(
            "index.docker.io/ubuntu:22.04",
            "docker.io/library/ubuntu:22.04",
        );
        check("localhost/a", "localhost/a:latest");
        check("host:5000/a/b__c--d.e", "host:5000/a/b__c--d.e:latest");
        check("127.0.0.1:5000/a:1", "127.0.0.1:5000/a:1");
        check("HOST/a", "HOST/a:latest");
        let digest = Digest::of(b"");
        check(
            &format!("a@{digest}"),
            &format!("docker.io/library/a@{digest}"),
        );
        check(
            &format!("a:1@{digest}"),
            &format!("docker.io/library/a:1@{digest}"),
        );
    }

    #[test]
    fn malformed_references_say_why() {
        for (text, reason) in [
            ("", "the repository is empty"),
            ("host:5000/", "the repository is empty"),
            ("Ubuntu", "the repository must be lower case"),
            (
                "a..b",
                "the repository must be components of [a-z0-9] with single separators",
            ),
            (
                "a/-b",
                "the repository must be components of [a-z0-9] with single separators",
            ),
            (
                "a//b",
                "the repository must be components of [a-z0-9] with single separators",
            ),
            (
                "a:",
                "the tag must be 1 to 128 of [A-Za-z0-9_.-], not starting with . or -",
            ),
            (
                "a:-b",
                "the tag must be 1 to 128 of [A-Za-z0-9_.-], not starting with . or -",
            ),
            ("a@b", "the part after \"@\" is not a sha256 digest"),
            ("ho$t.com/a", "the registry is not a host name"),
        ] {
            let error = Reference::parse(text).unwrap_err();
            assert_eq!(
                error,
                ReferenceError {
                    reference: text.to_owned(),
                    reason
                }
            );
        }
    }
}
