//! How registries are reached: mirrors, insecure ones, certificates.

use std::ffi::OsString;
use std::path::PathBuf;

use url::Url;

use super::request::{Machine, RequestError};
use crate::image::Reference;
use crate::registry;
use crate::secret::RedactedUrl;

/// Flags first, then what the environment adds.
///
/// # Errors
/// `Mirror`, `InsecureRegistry` and `NotUtf8` of [`RequestError`].
pub(super) fn options<E: Fn(&str) -> Option<OsString>>(
    mirrors: &[String],
    insecure: &[String],
    mut ca_files: Vec<PathBuf>,
    machine: &Machine<E>,
) -> Result<registry::Options, RequestError> {
    let mut options = registry::Options::default();
    for mirror in machine.list(mirrors, "SOCKLESS_REGISTRY_MIRROR")? {
        let (host, url) = parse_mirror(&mirror)?;
        options.mirrors.entry(host).or_default().push(url);
    }
    for host in machine.list(insecure, "SOCKLESS_INSECURE_REGISTRY")? {
        let registry =
            parse_registry(&host).ok_or_else(|| RequestError::InsecureRegistry(host.clone()))?;
        options.insecure.insert(registry);
    }
    ca_files.extend(
        machine
            .list(&[], "SOCKLESS_REGISTRY_CA")?
            .into_iter()
            .map(PathBuf::from),
    );
    options.ca_files = ca_files;
    Ok(options)
}

/// The registry that `host` names, as references spell it.
pub(super) fn parse_registry(host: &str) -> Option<String> {
    if host.contains('/') {
        return None;
    }
    // Only a first component that is a host leaves the second as the whole repository.
    let reference = Reference::parse(&format!("{host}/a/b")).ok()?;
    (reference.repository().name() == "a/b").then(|| reference.repository().registry().to_owned())
}

fn parse_mirror(text: &str) -> Result<(String, Url), RequestError> {
    let (host, url) = text.split_once('=').ok_or_else(|| RequestError::Mirror {
        host: text.to_owned(),
        reason: "expected HOST=URL".to_owned(),
    })?;
    let fail = |reason: String| RequestError::Mirror {
        host: host.to_owned(),
        reason,
    };
    let registry = parse_registry(host).ok_or_else(|| {
        fail("the registry must be HOST[:PORT], such as \"docker.io\"".to_owned())
    })?;
    let url = Url::parse(url).map_err(|error| fail(format!("the URL is invalid: {error}")))?;
    let shown = RedactedUrl(&url);
    if !matches!(url.scheme(), "http" | "https") {
        return Err(fail(format!("{shown} is neither http nor https")));
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err(fail(format!(
            "{shown} has a user name or a password; credentials belong into Docker's config.json"
        )));
    }
    if url.query().is_some() || url.fragment().is_some() {
        return Err(fail(format!("{shown} has a query or a fragment")));
    }
    Ok((registry, url))
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use super::*;
    use crate::cli::request::tests::{check_error, convert};

    #[test]
    fn registries_come_from_flags_and_the_environment() {
        let options = convert(
            &[
                "--registry-mirror",
                "index.docker.io=https://m.example/hub",
                "--insecure-registry",
                "localhost:5000",
                "--registry-ca",
                "a.pem",
                ".",
            ],
            &[
                (
                    "SOCKLESS_REGISTRY_MIRROR",
                    "docker.io=http://127.0.0.1:1, q.io=https://q",
                ),
                ("SOCKLESS_INSECURE_REGISTRY", "10.0.0.1"),
                ("SOCKLESS_REGISTRY_CA", "/b.pem,/c.pem"),
            ],
        )
        .unwrap()
        .request
        .registry;
        let urls = |texts: &[&str]| texts.iter().map(|t| Url::parse(t).unwrap()).collect();
        assert_eq!(
            options.mirrors,
            BTreeMap::from([
                (
                    "docker.io".to_owned(),
                    urls(&["https://m.example/hub", "http://127.0.0.1:1"])
                ),
                ("q.io".to_owned(), urls(&["https://q"])),
            ])
        );
        let insecure = ["10.0.0.1", "localhost:5000"].map(str::to_owned);
        assert_eq!(options.insecure, BTreeSet::from(insecure));
        assert_eq!(
            options.ca_files,
            ["a.pem", "/b.pem", "/c.pem"].map(PathBuf::from)
        );
    }

    #[test]
    fn a_bad_registry_setting_shows_no_secret() {
        for (mirror, expected) in [
            (
                "docker.io",
                "--registry-mirror for \"docker.io\": expected HOST=URL",
            ),
            (
                "hub=https://m",
                "--registry-mirror for \"hub\": the registry must be HOST[:PORT], such as \"docker.io\"",
            ),
            (
                "docker.io=ftp://u:hunter2@m/",
                "--registry-mirror for \"docker.io\": ftp://m/ is neither http nor https",
            ),
            (
                "docker.io=https://u:hunter2@m",
                "--registry-mirror for \"docker.io\": https://m/ has a user name or a password; \
                 credentials belong into Docker's config.json",
            ),
            (
                "docker.io=https://m?a=hunter2",
                "--registry-mirror for \"docker.io\": https://m/?… has a query or a fragment",
            ),
            (
                "docker.io=m",
                "--registry-mirror for \"docker.io\": the URL is invalid: relative URL without a base",
            ),
        ] {
            check_error(&["--registry-mirror", mirror, "."], &[], expected);
        }
        check_error(
            &["--insecure-registry", "a.b/c", "."],
            &[],
            "--insecure-registry \"a.b/c\": expected HOST[:PORT] with a dot, a port or \"localhost\"",
        );
    }
}
