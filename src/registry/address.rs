//! Where requests go, and where they must not.
//!
//! A registry chooses the URLs of redirects, upload locations and token servers;
//! what it may choose is decided here (CVE-2020-15157, CVE-2026-50151, CVE-2026-48978).
//! Names are judged as written, not by what they resolve to.

use std::collections::BTreeSet;
use std::net::IpAddr;

use url::{Host, Url};

use super::{Options, RegistryError};
use crate::image::{DOCKER_HUB, Repository};
use crate::secret::RedactedUrl;

/// Where Docker Hub's API really is.
const DOCKER_HUB_HOST: &str = "registry-1.docker.io";

/// How a host is spoken to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Scheme {
    /// TLS only.
    Https,
    /// Plain, because the user wrote a mirror's URL so.
    Http,
    /// TLS without verification where it answers, else plain: an insecure registry.
    Either,
}

/// A repository at a host that serves it: its registry, or a mirror of that.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Endpoint {
    /// `HOST[:PORT]` that is connected to.
    pub(super) authority: String,
    /// How.
    pub(super) scheme: Scheme,
    /// The repository's path there; a mirror's own path is part of it.
    pub(super) name: String,
    /// The name under which credentials are looked up.
    pub(super) registry: String,
    /// Whether the registry can be asked instead.
    pub(super) is_mirror: bool,
}

/// Checks the mirrors' URLs.
pub(super) fn check_mirrors(options: &Options) -> Result<(), RegistryError> {
    for url in options.mirrors.values().flatten() {
        let fail = |reason| RegistryError::Mirror {
            url: RedactedUrl(url).to_string(),
            reason,
        };
        if !matches!(url.scheme(), "http" | "https") || url.host().is_none() {
            return Err(fail("expected http://HOST or https://HOST"));
        }
        if !url.username().is_empty() || url.password().is_some() {
            return Err(fail(
                "credentials belong into config.json, not into the URL",
            ));
        }
        if url.query().is_some() || url.fragment().is_some() {
            return Err(fail("a query or fragment has no meaning here"));
        }
    }
    Ok(())
}

impl Endpoint {
    /// The registry of `repository` itself.
    pub(super) fn registry(options: &Options, repository: &Repository) -> Self {
        let registry = repository.registry();
        let authority = if registry == DOCKER_HUB {
            DOCKER_HUB_HOST
        } else {
            registry
        };
        let insecure = [registry, authority].iter().any(|name| {
            options
                .insecure
                .iter()
                .any(|e| e.eq_ignore_ascii_case(name))
        });
        Self {
            authority: authority.to_owned(),
            scheme: if insecure {
                Scheme::Either
            } else {
                Scheme::Https
            },
            name: repository.name().to_owned(),
            registry: registry.to_owned(),
            is_mirror: false,
        }
    }

    /// Everything that may have `repository`: mirrors in the user's order, then the registry.
    pub(super) fn all(options: &Options, repository: &Repository) -> Vec<Self> {
        let mirrors = options
            .mirrors
            .get(repository.registry())
            .into_iter()
            .flatten();
        let mut all: Vec<Self> = mirrors
            .map(|url| {
                let authority = super::error::authority(url);
                let path = url.path().trim_matches('/');
                Self {
                    scheme: if url.scheme() == "http" {
                        Scheme::Http
                    } else {
                        Scheme::Https
                    },
                    name: if path.is_empty() {
                        repository.name().to_owned()
                    } else {
                        format!("{path}/{}", repository.name())
                    },
                    registry: authority.clone(),
                    authority,
                    is_mirror: true,
                }
            })
            .collect();
        all.push(Self::registry(options, repository));
        all
    }

    /// `SCHEME://HOST[:PORT]/`.
    pub(super) fn base(&self, scheme: &str) -> Result<Url, RegistryError> {
        let fail = || RegistryError::Address(self.authority.clone());
        let url = Url::parse(&format!("{scheme}://{}/", self.authority)).map_err(|_| fail())?;
        if url.host().is_none() || !url.username().is_empty() || url.path() != "/" {
            return Err(fail());
        }
        Ok(url)
    }
}

/// Whether credentials for `a` may be sent to `b`: scheme, host and port are the same.
pub(crate) fn same_origin(a: &Url, b: &Url) -> bool {
    a.scheme() == b.scheme()
        && a.host() == b.host()
        && a.port_or_known_default() == b.port_or_known_default()
}

/// Whether the user named the host of `url` as insecure.
pub(super) fn is_insecure(insecure: &BTreeSet<String>, url: &Url) -> bool {
    let host = url.host_str().unwrap_or_default();
    let with_port = format!("{host}:{}", url.port_or_known_default().unwrap_or_default());
    insecure.iter().any(|entry| {
        entry.eq_ignore_ascii_case(&with_port)
            || (url.port().is_none() && entry.eq_ignore_ascii_case(host))
    })
}

/// What a host is, as far as its spelling tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum HostKind {
    /// This machine.
    Loopback,
    /// The link, where clouds keep their metadata services.
    LinkLocal,
    /// Any other address.
    Address,
    /// A name.
    Name,
}

/// Whether `url` is this machine.
pub(super) fn is_loopback(url: &Url) -> bool {
    host_kind(url) == HostKind::Loopback
}

fn host_kind(url: &Url) -> HostKind {
    let address = match url.host() {
        Some(Host::Domain(name)) => {
            let name = name.trim_end_matches('.').to_ascii_lowercase();
            return if name == "localhost" || name.ends_with(".localhost") {
                HostKind::Loopback
            } else {
                HostKind::Name
            };
        }
        Some(Host::Ipv4(address)) => IpAddr::V4(address),
        Some(Host::Ipv6(address)) => IpAddr::V6(address).to_canonical(),
        None => return HostKind::Name,
    };
    let link_local = match address {
        IpAddr::V4(address) => address.is_link_local(),
        IpAddr::V6(address) => address.is_unicast_link_local(),
    };
    if address.is_loopback() || address.is_unspecified() {
        HostKind::Loopback
    } else if link_local {
        HostKind::LinkLocal
    } else {
        HostKind::Address
    }
}

/// Whether a registry (or any server) at `registry` may send a request on to `to`, without credentials.
///
/// # Errors
/// The reason why not, for people.
pub(crate) fn may_follow(
    registry: &Url,
    to: &Url,
    insecure: &BTreeSet<String>,
) -> Result<(), &'static str> {
    if same_origin(registry, to) {
        return Ok(());
    }
    match to.scheme() {
        "https" => {}
        "http" if registry.scheme() == "http" || is_insecure(insecure, to) => {}
        "http" => return Err("plain HTTP is not allowed there"),
        _ => return Err("that is not HTTP"),
    }
    match host_kind(to) {
        kind @ (HostKind::Loopback | HostKind::LinkLocal) if host_kind(registry) != kind => {
            Err("a server elsewhere must not name a loopback or link-local address")
        }
        _ => Ok(()),
    }
}

/// Whether credentials for the registry at `registry` may be sent to the token server `realm`.
///
/// # Errors
/// The reason why not, for people.
pub(super) fn may_be_realm(
    registry: &Url,
    realm: &Url,
    insecure: &BTreeSet<String>,
) -> Result<(), &'static str> {
    match realm.scheme() {
        "https" => {}
        "http" if registry.scheme() == "http" || is_insecure(insecure, registry) => {}
        _ => return Err("expected an https URL"),
    }
    if !realm.username().is_empty() || realm.password().is_some() {
        return Err("the URL has a user name or password in it");
    }
    if realm.host() == registry.host() {
        return Ok(());
    }
    match (host_kind(realm), host_kind(registry)) {
        (HostKind::Name, _) => Ok(()),
        (HostKind::Address, from) if from != HostKind::Name => Ok(()),
        (to, from) if to == from => Ok(()),
        _ => Err("expected a host name, because the registry is not at such an address itself"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::Reference;

    fn url(text: &str) -> Url {
        Url::parse(text).unwrap()
    }

    #[test]
    fn security_s14_a_registry_sends_requests_only_to_fit_places() {
        let insecure = BTreeSet::from(["box:5000".to_owned()]);
        let check = |from: &str, to: &str, expected: bool| {
            let got = may_follow(&url(from), &url(to), &insecure);
            assert_eq!(got.is_ok(), expected, "{from} → {to}: {got:?}");
        };
        check("https://r.io", "https://cdn.io/x?sig", true);
        check("https://r.io", "https://10.0.0.1/", true);
        check("https://r.io", "http://cdn.io/", false);
        check("https://r.io", "http://r.io/", false);
        check("https://r.io", "http://box:5000/", true);
        check("https://r.io", "ftp://cdn.io/", false);
        check("https://r.io", "https://127.0.0.1/", false);
        check("https://r.io", "https://0x7f.1/", false);
        check("https://r.io", "https://[::ffff:127.0.0.1]/", false);
        check("https://r.io", "https://[::1]:1/", false);
        check("https://r.io", "https://a.localhost./", false);
        check("https://r.io", "https://169.254.169.254/latest", false);
        check("https://r.io", "https://[fe80::1]/", false);
        check("http://127.0.0.1:5000", "http://localhost:9000/", true);
        check("http://127.0.0.1:5000", "http://169.254.169.254/", false);
        check("https://127.0.0.1", "http://127.0.0.1/", false);
    }

    #[test]
    fn security_s14_credentials_go_only_to_fit_token_servers() {
        let insecure = BTreeSet::from(["box:5000".to_owned()]);
        let check = |registry: &str, realm: &str, expected: bool| {
            let got = may_be_realm(&url(registry), &url(realm), &insecure);
            assert_eq!(got.is_ok(), expected, "{registry} → {realm}: {got:?}");
        };
        check("https://r.io", "https://auth.io/token", true);
        check("https://r.io", "http://auth.io/token", false);
        check("https://r.io", "http://r.io/token", false);
        check("https://r.io", "https://10.0.0.1/token", false);
        check("https://r.io", "https://127.0.0.1/token", false);
        check("https://r.io", "https://localhost/token", false);
        check("https://r.io", "https://169.254.169.254/token", false);
        check("https://r.io", "https://user@auth.io/token", false);
        check("https://box:5000", "http://auth.io/token", true);
        check("https://10.0.0.1", "https://10.0.0.1:1/token", true);
        check("https://10.0.0.1", "https://10.0.0.2/token", true);
        check("https://10.0.0.1", "https://127.0.0.1/token", false);
        check("http://127.0.0.1:5", "http://127.0.0.1:6/token", true);
        check("http://127.0.0.1:5", "http://169.254.169.254/t", false);
    }

    #[test]
    fn an_origin_is_scheme_host_and_port() {
        let check = |a: &str, b: &str, expected: bool| {
            assert_eq!(same_origin(&url(a), &url(b)), expected, "{a} {b}");
        };
        check("https://r.io/a", "https://r.io:443/b", true);
        check("https://r.io", "https://R.IO", true);
        check("https://r.io", "http://r.io", false);
        check("https://r.io", "https://r.io:444", false);
        check("https://r.io", "https://r.io.evil", false);
    }

    #[test]
    fn mirrors_come_first_with_their_paths() {
        let repository = Reference::parse("ubuntu").unwrap().repository().clone();
        let options = Options {
            mirrors: [(
                "docker.io".to_owned(),
                vec![url("http://m:1/"), url("https://n/hub/cache/")],
            )]
            .into(),
            ..Options::default()
        };
        check_mirrors(&options).unwrap();
        let got: Vec<_> = Endpoint::all(&options, &repository)
            .into_iter()
            .map(|e| (e.scheme, e.authority, e.name, e.registry))
            .collect();
        let row = |scheme, authority: &str, name: &str, registry: &str| {
            (
                scheme,
                authority.to_owned(),
                name.to_owned(),
                registry.to_owned(),
            )
        };
        assert_eq!(
            got,
            [
                row(Scheme::Http, "m:1", "library/ubuntu", "m:1"),
                row(Scheme::Https, "n", "hub/cache/library/ubuntu", "n"),
                row(
                    Scheme::Https,
                    "registry-1.docker.io",
                    "library/ubuntu",
                    "docker.io"
                ),
            ]
        );
        for bad in ["ftp://m", "https://u:p@m", "https://m/?x"] {
            let options = Options {
                mirrors: [("docker.io".to_owned(), vec![url(bad)])].into(),
                ..Options::default()
            };
            let error = check_mirrors(&options).unwrap_err();
            assert!(matches!(error, RegistryError::Mirror { .. }), "{error}");
            assert!(!error.to_string().contains("u:p"), "{error}");
        }
    }

    #[test]
    fn an_insecure_host_is_the_one_named_with_its_port() {
        let insecure = BTreeSet::from(["Box:5000".to_owned(), "plain".to_owned()]);
        for (text, expected) in [
            ("http://box:5000", true),
            ("https://box", false),
            ("http://plain", true),
            ("https://plain", true),
            ("https://plain:5000", false),
        ] {
            assert_eq!(is_insecure(&insecure, &url(text)), expected, "{text}");
        }
        let options = Options {
            insecure,
            ..Options::default()
        };
        let scheme = |text: &str| {
            let reference = Reference::parse(text).unwrap();
            Endpoint::registry(&options, reference.repository()).scheme
        };
        assert_eq!(scheme("box:5000/a"), Scheme::Either);
        assert_eq!(scheme("box:5001/a"), Scheme::Https);
    }

    #[test]
    fn a_name_that_is_no_address_is_an_error() {
        let reference = Reference::parse("a:b:c/x").unwrap();
        let endpoint = Endpoint::registry(&Options::default(), reference.repository());
        assert_eq!(
            endpoint.base("https").unwrap_err().to_string(),
            "\"a:b:c\" is not the address of a registry: expected HOST[:PORT]"
        );
    }
}
