//! Named contexts: `--build-context NAME=VALUE`, and which of them a name in a Dockerfile means.
//!
//! A name in `FROM`, in `COPY --from`, in `RUN --mount=from` and after `AS` is looked up
//! here before it is taken for an image; a stage whose name is found is replaced as a whole.
//! Values are read as Docker's command line does, names compared as BuildKit does. No I/O.
//!
//! What a context holds: [`NamedContext::Directory`] the files less what its own
//! `.dockerignore` hides ([`open_named_directory`]), an image its root filesystem,
//! [`NamedContext::Url`] one file, `context`, never unpacked, and a git repository its checkout.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use thiserror::Error;
use url::Url;

use super::address::{Shown, is_git, is_http};
use super::dockerfile::context_rules;
use super::{BuildContext, ContextError};
use crate::image::{DOCKER_HUB, Digest, Platform, Reference};
use crate::secret::RedactedUrl;

/// The name of the only file of a [`NamedContext::Url`].
pub const URL_FILE_NAME: &str = "context";

/// What stands between a name and the platform that it is for.
const PLATFORM_SEPARATOR: &str = "::";

/// Where the files of a named context come from.
#[derive(Clone, PartialEq, Eq)]
pub enum NamedContext {
    /// A directory of this machine.
    Directory(PathBuf),
    /// `docker-image://REFERENCE`: an image of a registry.
    Image(Reference),
    /// `docker-image://scratch`: nothing.
    Scratch,
    /// `oci-layout://PATH[:TAG][@DIGEST]`: an image in a directory of this machine.
    OciLayout(LayoutReference),
    /// An HTTP(S) URL: one file, [`URL_FILE_NAME`], readable by its owner alone.
    Url(Url),
    /// The address of a git repository, with its fragment or query, as given.
    Git(String),
}

/// An image in a directory that is an OCI image layout.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayoutReference {
    /// The layout's directory.
    pub path: PathBuf,
    /// The name in `index.json`; `latest` where none is given.
    pub tag: String,
    /// What decides where it is given.
    pub digest: Option<Digest>,
}

/// The named contexts of a build.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NamedContexts(BTreeMap<String, NamedContext>);

/// Why a `--build-context` cannot be used.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum NamedContextError {
    /// There is no `=`.
    #[error("invalid build context {value:?}: expected NAME=VALUE, such as \"src=./dir\"")]
    NoValue {
        /// What was given, redacted.
        value: String,
    },
    /// The name is none that an image could have.
    #[error("invalid name of a build context {name:?}: {reason}")]
    Name {
        /// The name.
        name: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The value cannot be understood.
    #[error("invalid build context {name:?}: {value}: {reason}")]
    Value {
        /// Its name.
        name: String,
        /// The value, redacted.
        value: String,
        /// What is wrong with it.
        reason: String,
    },
}

impl NamedContexts {
    /// Parses values of `--build-context`; of equal names the last counts, empty values are
    /// passed over.
    ///
    /// A name may end in `::PLATFORM`; then it is for stages of that platform, and comes
    /// before the same name without.
    ///
    /// # Errors
    /// [`NamedContextError`].
    pub fn parse<T: AsRef<str>>(
        values: impl IntoIterator<Item = T>,
    ) -> Result<Self, NamedContextError> {
        let mut contexts = BTreeMap::new();
        for value in values {
            let value = value.as_ref();
            if value.is_empty() {
                continue;
            }
            let (name, value) =
                value
                    .split_once('=')
                    .ok_or_else(|| NamedContextError::NoValue {
                        value: Shown(value).to_string(),
                    })?;
            contexts.insert(key(name)?, NamedContext::parse(name, value)?);
        }
        Ok(Self(contexts))
    }

    /// The context that `name` means in a stage for `platform`, with the name it was found by.
    ///
    /// `alpine`, `alpine:latest` and `docker.io/library/alpine` are one name. `scratch` and
    /// `context`, in any case, are never looked up.
    ///
    /// # Errors
    /// [`NamedContextError::Name`] for what cannot be the name of an image. BuildKit looks
    /// up the name of each stage and each base, so such a Dockerfile fails there too.
    pub fn lookup(
        &self,
        name: &str,
        platform: &Platform,
    ) -> Result<Option<(&str, &NamedContext)>, NamedContextError> {
        if name.eq_ignore_ascii_case("scratch") || name.eq_ignore_ascii_case("context") {
            return Ok(None);
        }
        let name = normalised(name)?;
        let specific = with_platform(&name, platform);
        let found = self
            .0
            .get_key_value(&specific)
            .or_else(|| self.0.get_key_value(&name));
        Ok(found.map(|(name, context)| (name.as_str(), context)))
    }

    /// All of them, by normalised name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &NamedContext)> {
        self.0
            .iter()
            .map(|(name, context)| (name.as_str(), context))
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl NamedContext {
    /// Parses the value of the context `name`.
    ///
    /// Whether a directory or layout exists is not looked at.
    ///
    /// # Errors
    /// [`NamedContextError::Value`].
    pub fn parse(name: &str, value: &str) -> Result<Self, NamedContextError> {
        let fail = |reason: String| NamedContextError::Value {
            name: name.to_owned(),
            value: Shown(value).to_string(),
            reason,
        };
        if let Some(image) = value.strip_prefix("docker-image://") {
            if image == "scratch" {
                return Ok(Self::Scratch);
            }
            return Reference::parse(image)
                .map(Self::Image)
                .map_err(|error| fail(error.to_string()));
        }
        if let Some(layout) = value.strip_prefix("oci-layout://") {
            return LayoutReference::parse(layout)
                .map(Self::OciLayout)
                .map_err(|reason| fail(reason.to_owned()));
        }
        if is_git(value) {
            return Ok(Self::Git(value.to_owned()));
        }
        if is_http(value) {
            return Url::parse(value)
                .map(Self::Url)
                .map_err(|error| fail(format!("not a valid URL: {error}")));
        }
        if value.starts_with("target:") {
            return Err(fail(
                "a target can be named in a bake file only; build it first and name the image"
                    .to_owned(),
            ));
        }
        if value.starts_with("github.com/") {
            return Err(fail(
                "this short form is for the main context only: write https://… for a \
                 repository, ./… for a directory"
                    .to_owned(),
            ));
        }
        if let Some((scheme, _)) = value.split_once("://") {
            return Err(fail(format!(
                "unsupported context source {scheme:?}: expected a directory, docker-image://, \
                 oci-layout://, http(s):// or the address of a git repository"
            )));
        }
        if value.is_empty() {
            return Err(fail("the value is empty".to_owned()));
        }
        Ok(Self::Directory(PathBuf::from(value)))
    }
}

impl LayoutReference {
    /// `PATH[:TAG][@DIGEST]`. A colon before the last slash belongs to the path.
    fn parse(text: &str) -> Result<Self, &'static str> {
        let (text, digest) = match text.rsplit_once('@') {
            Some((text, digest)) if !digest.contains('/') => {
                let digest = Digest::parse(digest)
                    .map_err(|_| "the part after \"@\" is not a sha256 digest")?;
                (text, Some(digest))
            }
            _ => (text, None),
        };
        let (path, tag) = match text.rsplit_once(':') {
            Some((path, tag)) if !tag.contains('/') => (path, tag),
            _ => (text, "latest"),
        };
        if path.is_empty() {
            return Err("the path is empty: expected oci-layout://PATH[:TAG][@DIGEST]");
        }
        if tag.is_empty() {
            return Err("the tag is empty: expected oci-layout://PATH[:TAG][@DIGEST]");
        }
        Ok(Self {
            path: PathBuf::from(path),
            tag: tag.to_owned(),
            digest,
        })
    }
}

impl fmt::Display for LayoutReference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "oci-layout://{}:{}", self.path.display(), self.tag)?;
        match &self.digest {
            Some(digest) => write!(f, "@{digest}"),
            None => Ok(()),
        }
    }
}

/// Shows the value without what may be secret in it.
impl fmt::Display for NamedContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Directory(path) => path.display().fmt(f),
            Self::Image(reference) => write!(f, "docker-image://{reference}"),
            Self::Scratch => f.write_str("docker-image://scratch"),
            Self::OciLayout(layout) => layout.fmt(f),
            Self::Url(url) => RedactedUrl(url).fmt(f),
            Self::Git(address) => Shown(address).fmt(f),
        }
    }
}

impl fmt::Debug for NamedContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "NamedContext({self})")
    }
}

/// Opens the directory of a named context with the rules of its own `.dockerignore`.
///
/// # Errors
/// [`ContextError::Open`] where it is not there or no directory; [`ContextError::Ignore`],
/// [`ContextError::Read`].
pub fn open_named_directory(path: &Path) -> Result<BuildContext, ContextError> {
    BuildContext::directory(path, context_rules(path)?)
}

/// What a name is compared by, with the platform if it has one.
fn key(name: &str) -> Result<String, NamedContextError> {
    let Some((name, platform)) = name.split_once(PLATFORM_SEPARATOR) else {
        return normalised(name);
    };
    let platform = Platform::parse(platform).map_err(|error| NamedContextError::Name {
        name: name.to_owned(),
        reason: error.to_string(),
    })?;
    Ok(with_platform(&normalised(name)?, &platform))
}

fn with_platform(name: &str, platform: &Platform) -> String {
    // Parsing again normalises what was put together otherwise.
    let platform = Platform::parse(&platform.to_string()).unwrap_or_else(|_| platform.clone());
    format!("{name}{PLATFORM_SEPARATOR}{platform}")
}

/// The shortest name of the same image, without `:latest`.
fn normalised(name: &str) -> Result<String, NamedContextError> {
    let fail = |reason: &str| NamedContextError::Name {
        name: name.to_owned(),
        reason: reason.to_owned(),
    };
    if name.len() == 64 && name.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
        return Err(fail("64 hexadecimal digits are no name"));
    }
    let reference = Reference::parse(name).map_err(|error| fail(error.reason))?;
    let repository = reference.repository();
    let mut short = if repository.registry() == DOCKER_HUB {
        match repository.name().strip_prefix("library/") {
            Some(official) if !official.contains('/') => official.to_owned(),
            _ => repository.name().to_owned(),
        }
    } else {
        repository.to_string()
    };
    match (reference.tag(), reference.digest()) {
        (Some("latest"), None) | (None, None) => {}
        (tag, digest) => {
            for (separator, part) in [(':', tag), ('@', digest.map(Digest::as_str))] {
                if let Some(part) = part {
                    short.push(separator);
                    short.push_str(part);
                }
            }
        }
    }
    Ok(short)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(values: &[&str]) -> NamedContexts {
        NamedContexts::parse(values).unwrap()
    }

    fn platform(text: &str) -> Platform {
        Platform::parse(text).unwrap()
    }

    #[test]
    fn each_kind_of_value_is_told() {
        let digest = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        let layout = |path: &str, tag: &str, digest: Option<&str>| {
            NamedContext::OciLayout(LayoutReference {
                path: path.into(),
                tag: tag.into(),
                digest: digest.map(|d| Digest::parse(d).unwrap()),
            })
        };
        for (value, expected) in [
            ("./dir", NamedContext::Directory("./dir".into())),
            ("a=b", NamedContext::Directory("a=b".into())),
            ("input:x", NamedContext::Directory("input:x".into())),
            (
                "docker-image://alpine:3",
                NamedContext::Image(Reference::parse("alpine:3").unwrap()),
            ),
            ("docker-image://scratch", NamedContext::Scratch),
            ("oci-layout://l", layout("l", "latest", None)),
            ("oci-layout:///a:b/l:v1", layout("/a:b/l", "v1", None)),
            (
                &format!("oci-layout://l:v1@{digest}"),
                layout("l", "v1", Some(digest)),
            ),
            (
                &format!("oci-layout://a@b/l@{digest}"),
                layout("a@b/l", "latest", Some(digest)),
            ),
            (
                "https://host/x.tar.gz",
                NamedContext::Url(Url::parse("https://host/x.tar.gz").unwrap()),
            ),
            (
                "https://host/x.git#v1",
                NamedContext::Git("https://host/x.git#v1".into()),
            ),
            ("git@host:x", NamedContext::Git("git@host:x".into())),
        ] {
            assert_eq!(
                NamedContext::parse("n", value).unwrap(),
                expected,
                "{value}"
            );
        }
    }

    #[test]
    fn what_is_no_context_is_said() {
        let error = |value: &str| NamedContexts::parse([value]).unwrap_err().to_string();
        for (value, expected) in [
            (
                "src",
                "invalid build context \"src\": expected NAME=VALUE, such as \"src=./dir\"",
            ),
            (
                "=x",
                "invalid name of a build context \"\": the repository is empty",
            ),
            (
                "Src=x",
                "invalid name of a build context \"Src\": the repository must be lower case",
            ),
            (
                "a::b=x",
                "invalid name of a build context \"a\": invalid platform \"b\": \
                 expected OS/ARCHITECTURE[/VARIANT], such as \"linux/arm64\"",
            ),
            ("a=", "invalid build context \"a\": : the value is empty"),
            (
                "a=docker-image://B",
                "invalid build context \"a\": docker-image://B: invalid reference \"B\": \
                 the repository must be lower case",
            ),
            (
                "a=oci-layout://x@sha256:1",
                "invalid build context \"a\": oci-layout://x@sha256:1: \
                 the part after \"@\" is not a sha256 digest",
            ),
            (
                "a=oci-layout://",
                "invalid build context \"a\": oci-layout://: \
                 the path is empty: expected oci-layout://PATH[:TAG][@DIGEST]",
            ),
            (
                "a=ftp://u:hunter2@h/x",
                "invalid build context \"a\": ftp://h/x: unsupported context source \"ftp\": \
                 expected a directory, docker-image://, oci-layout://, http(s):// or the address \
                 of a git repository",
            ),
            (
                "a=https://[",
                "invalid build context \"a\": https://[: not a valid URL: invalid IPv6 address",
            ),
            (
                "a=target:b",
                "invalid build context \"a\": target:b: a target can be named in a bake file \
                 only; build it first and name the image",
            ),
            (
                "a=github.com/a/b",
                "invalid build context \"a\": github.com/a/b: this short form is for the main \
                 context only: write https://… for a repository, ./… for a directory",
            ),
        ] {
            assert_eq!(error(value), expected, "{value}");
        }
    }

    #[test]
    fn one_image_has_one_name() {
        let contexts = parse(&["docker.io/library/alpine:latest=./a"]);
        let amd64 = platform("linux/amd64");
        for name in [
            "alpine",
            "alpine:latest",
            "library/alpine",
            "docker.io/alpine",
            "index.docker.io/library/alpine:latest",
        ] {
            let found = contexts.lookup(name, &amd64).unwrap();
            let expected = NamedContext::Directory("./a".into());
            assert_eq!(found, Some(("alpine", &expected)), "{name}");
        }
        for name in [
            "alpine:3",
            "me/alpine",
            "ghcr.io/alpine",
            "ghcr.io/library/alpine",
        ] {
            assert_eq!(contexts.lookup(name, &amd64).unwrap(), None, "{name}");
        }
        let digest = Digest::of(b"");
        let names = parse(&[
            "b:3=x",
            "c/d:latest=x",
            "localhost:5000/e:latest=x",
            &format!("f:latest@{digest}=x"),
            &format!("g@{digest}=x"),
            "docker.io/library/h/i=x",
        ]);
        let names: Vec<&str> = names.iter().map(|(name, _)| name).collect();
        assert_eq!(
            names,
            [
                "b:3",
                "c/d",
                &format!("f:latest@{digest}"),
                &format!("g@{digest}"),
                "library/h/i",
                "localhost:5000/e",
            ]
        );
    }

    #[test]
    fn the_platforms_own_context_comes_first_and_the_last_of_equals_counts() {
        let contexts = parse(&[
            "a=./first",
            "",
            "a:latest=./any",
            "a::linux/aarch64=./arm",
            "b::linux/arm/v7=./b",
        ]);
        let directory = |path: &str| NamedContext::Directory(path.into());
        let found = |name: &str, on: &str| {
            let platform = platform(on);
            let found = contexts.lookup(name, &platform).unwrap();
            found.map(|(name, context)| (name.to_owned(), context.clone()))
        };
        assert_eq!(
            found("a", "linux/arm64/v8"),
            Some(("a::linux/arm64".into(), directory("./arm")))
        );
        assert_eq!(
            found("a", "linux/amd64"),
            Some(("a".into(), directory("./any")))
        );
        assert_eq!(
            found("b", "linux/arm"),
            Some(("b::linux/arm/v7".into(), directory("./b")))
        );
        assert_eq!(found("b", "linux/arm/v6"), None);
    }

    #[test]
    fn reserved_names_are_never_looked_up_and_bad_ones_are_errors() {
        let contexts = parse(&["scratch=./a", "context=./b"]);
        let amd64 = platform("linux/amd64");
        for name in ["scratch", "Scratch", "context", "CONTEXT"] {
            assert_eq!(contexts.lookup(name, &amd64).unwrap(), None, "{name}");
        }
        let hexadecimal = "0".repeat(64);
        for name in ["stage-", "A", hexadecimal.as_str()] {
            let error = contexts.lookup(name, &amd64).unwrap_err();
            assert!(matches!(error, NamedContextError::Name { .. }), "{name}");
        }
    }

    #[test]
    fn credentials_are_not_shown() {
        for value in [
            "https://u:hunter2@host/x.git",
            "https://u:hunter2@host/x?hunter2",
        ] {
            let context = NamedContext::parse("a", value).unwrap();
            let shown = format!("{context} {context:?}");
            assert!(!shown.contains("hunter2"), "{shown}");
        }
    }

    #[test]
    fn a_named_directory_has_rules_of_its_own() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("a"), "").unwrap();
        std::fs::write(dir.path().join("b"), "").unwrap();
        std::fs::write(dir.path().join(".dockerignore"), "a\n").unwrap();
        let context = open_named_directory(dir.path()).unwrap();
        let names: Vec<_> = context.read_dir(Path::new("")).unwrap();
        let names: Vec<_> = names.into_iter().map(|node| node.path).collect();
        assert_eq!(names, [Path::new(".dockerignore"), Path::new("b")]);
        let error = open_named_directory(&dir.path().join("a")).unwrap_err();
        assert!(matches!(error, ContextError::Open { .. }), "{error:?}");
    }
}
