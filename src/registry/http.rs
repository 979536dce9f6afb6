//! The HTTP clients below everything: TLS roots, proxies, time limits, retry policy.
//!
//! Redirects are never followed here: `transport` does, by rules that this layer cannot know.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBackoff, ExponentialBuilder};
use reqwest::{ClientBuilder, Method, RequestBuilder, Response};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use url::Url;

use super::address::{is_insecure, is_loopback};
use super::error::request_label;
use super::reach::Reach;
use super::{Options, RegistryError};

const USER_AGENT: &str = concat!("sockless/", env!("CARGO_PKG_VERSION"));
/// The longest pause that a registry may ask for with `Retry-After`.
const RETRY_AFTER_LIMIT: Duration = Duration::from_secs(60);
/// Variables by which proxies are named.
const PROXY_VARIABLES: [&str; 6] = [
    "HTTP_PROXY",
    "http_proxy",
    "HTTPS_PROXY",
    "https_proxy",
    "ALL_PROXY",
    "all_proxy",
];

/// How long things may take and how often they are tried.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Timing {
    /// Until a connection stands, TLS included.
    pub(super) connect: Duration,
    /// Until an answer begins, where no long body is sent.
    pub(crate) answer: Duration,
    /// Between two pieces of an answer.
    pub(crate) idle: Duration,
    /// While uploading: without a byte taken, or from the last byte to the answer.
    pub(super) upload_idle: Duration,
    /// Until an upload is committed. Some registries copy the whole blob then.
    pub(super) commit: Duration,
    /// The first pause before trying again; each next one is twice as long.
    pub(super) first_pause: Duration,
    /// How often is tried again.
    pub(super) retries: usize,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(15),
            answer: Duration::from_secs(60),
            idle: Duration::from_secs(60),
            upload_idle: Duration::from_secs(180),
            commit: Duration::from_secs(900),
            first_pause: Duration::from_millis(400),
            retries: 4,
        }
    }
}

/// The clients for trusted and insecure hosts, through proxies and not.
pub(crate) struct Http {
    verified: Pair,
    unverified: Pair,
    insecure: BTreeSet<String>,
    pub(crate) reach: Reach,
    pub(crate) timing: Timing,
}

struct Pair {
    proxied: reqwest::Client,
    direct: reqwest::Client,
}

impl std::fmt::Debug for Http {
    /// Without the clients, whose proxies may have passwords in their URLs.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Http")
            .field("insecure", &self.insecure)
            .field("timing", &self.timing)
            .finish_non_exhaustive()
    }
}

impl Http {
    /// Loads certificates and makes the clients.
    ///
    /// # Errors
    /// [`RegistryError::CaFile`], [`RegistryError::Tls`].
    pub(super) fn new(options: &Options, timing: Timing) -> Result<Self, RegistryError> {
        // Fails where a provider is installed already, and then that one serves.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let extra = load_ca_files(&options.ca_files)?;
        let proxied = PROXY_VARIABLES
            .iter()
            .any(|name| std::env::var_os(name).is_some_and(|value| !value.is_empty()));
        let reaching = |builder: ClientBuilder| match options.reach.resolver() {
            Some(resolver) => builder.dns_resolver(resolver),
            None => builder,
        };
        let unverified = |builder: ClientBuilder| {
            reaching(builder)
                .tls_danger_accept_invalid_certs(true)
                .build()
                .map_err(tls_error)
        };
        Ok(Self {
            verified: Pair::new(proxied, timing, |builder| {
                verified(reaching(builder), &extra)
            })?,
            unverified: Pair::new(proxied, timing, unverified)?,
            insecure: options.insecure.clone(),
            reach: options.reach,
            timing,
        })
    }

    /// A client of its own for what is no registry; it follows no redirects.
    pub(super) fn into_plain(self) -> reqwest::Client {
        self.verified.proxied
    }

    /// The hosts that the user named as insecure.
    pub(crate) fn insecure(&self) -> &BTreeSet<String> {
        &self.insecure
    }

    /// Starts a request with the client that fits the URL.
    pub(crate) fn request(&self, method: &Method, url: &Url) -> RequestBuilder {
        let pair = if is_insecure(&self.insecure, url) {
            &self.unverified
        } else {
            &self.verified
        };
        // A proxy's own loopback is another machine.
        let client = if is_loopback(url) {
            &pair.direct
        } else {
            &pair.proxied
        };
        client.request(method.clone(), url.clone())
    }

    /// Sends a request and waits for the head of the answer, not longer than `limit` where given.
    pub(crate) async fn execute(
        &self,
        request: RequestBuilder,
        method: &Method,
        url: &Url,
        limit: Option<Duration>,
    ) -> Result<Response, RegistryError> {
        let answer = match limit {
            None => request.send().await,
            Some(limit) => tokio::time::timeout(limit, request.send())
                .await
                .map_err(|_| RegistryError::Timeout {
                    request: request_label(method, url),
                    waiting_for: "waiting for the answer",
                    waited: limit,
                })?,
        };
        answer.map_err(|error| RegistryError::connection(method, url, error))
    }

    /// A fresh retry budget.
    pub(crate) fn patience(&self) -> Patience {
        Patience::new(self.timing)
    }
}

impl Pair {
    fn new(
        proxied: bool,
        timing: Timing,
        build: impl Fn(ClientBuilder) -> Result<reqwest::Client, RegistryError>,
    ) -> Result<Self, RegistryError> {
        let through = build(builder(timing))?;
        let direct = if proxied {
            build(builder(timing).no_proxy())?
        } else {
            through.clone()
        };
        Ok(Self {
            proxied: through,
            direct,
        })
    }
}

/// When to try again, and when to give up.
#[derive(Debug)]
pub(crate) struct Patience {
    timing: Timing,
    pauses: ExponentialBackoff,
}

impl Patience {
    fn new(timing: Timing) -> Self {
        let pauses = ExponentialBuilder::default()
            .with_min_delay(timing.first_pause)
            .with_max_times(timing.retries)
            .with_jitter()
            .build();
        Self { timing, pauses }
    }

    /// Waits where `error` may pass and the budget is not used up; says whether to try again.
    pub(crate) async fn wait(&mut self, error: &RegistryError) -> bool {
        error.is_temporary() && self.wait_anyway(error).await
    }

    /// As [`Self::wait`], where the caller knows that trying again makes sense.
    pub(super) async fn wait_anyway(&mut self, error: &RegistryError) -> bool {
        let Some(pause) = self.pauses.next() else {
            return false;
        };
        let pause = match error.retry_after() {
            // Waiting shorter would only be refused again.
            Some(asked) if asked > RETRY_AFTER_LIMIT => return false,
            Some(asked) => asked.max(pause),
            None => pause,
        };
        tracing::debug!(%error, pause_ms = crate::progress::millis(pause), "trying again");
        tokio::time::sleep(pause).await;
        true
    }

    /// Starts afresh, because there was progress.
    pub(crate) fn renew(&mut self) {
        *self = Self::new(self.timing);
    }
}

fn builder(timing: Timing) -> ClientBuilder {
    reqwest::Client::builder()
        .user_agent(USER_AGENT)
        .redirect(reqwest::redirect::Policy::none())
        .referer(false)
        .connect_timeout(timing.connect)
        .tcp_keepalive(Duration::from_secs(30))
    // No `read_timeout`: it counts from the start of a request to its answer and
    // would end long uploads. Time limits are set by the callers.
}

/// Trusts the system's roots and `extra`; Mozilla's where the system has none, as in small images.
fn verified(
    settings: ClientBuilder,
    extra: &[CertificateDer<'static>],
) -> Result<reqwest::Client, RegistryError> {
    // Building is the only way to learn whether the system has roots: without any it
    // fails, unless there are others, and those would then be all.
    let alone = reqwest::Client::builder().build();
    if alone.is_ok() {
        let certificates: Vec<_> = extra
            .iter()
            .map(|der| reqwest::Certificate::from_der(der))
            .collect::<Result<_, _>>()
            .map_err(tls_error)?;
        let settings = settings.tls_certs_merge(certificates);
        return settings.build().map_err(tls_error);
    }
    tracing::debug!("the system has no CA certificates: using the ones built in");
    settings
        .tls_backend_preconfigured(with_built_in_roots(extra)?)
        .build()
        .map_err(tls_error)
}

fn with_built_in_roots(
    extra: &[CertificateDer<'static>],
) -> Result<rustls::ClientConfig, RegistryError> {
    let mut roots = rustls::RootCertStore {
        roots: webpki_roots::TLS_SERVER_ROOTS.to_vec(),
    };
    for certificate in extra {
        roots
            .add(certificate.clone())
            .map_err(|e| RegistryError::Tls {
                reason: e.to_string(),
            })?;
    }
    let mut config = rustls::ClientConfig::builder()
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(config)
}

fn load_ca_files(
    files: &[std::path::PathBuf],
) -> Result<Vec<CertificateDer<'static>>, RegistryError> {
    let mut all = Vec::new();
    for path in files {
        all.extend(load_ca_file(path).map_err(|reason| RegistryError::CaFile {
            path: path.clone(),
            reason,
        })?);
    }
    Ok(all)
}

fn load_ca_file(path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let bytes = std::fs::read(path).map_err(|e| e.to_string())?;
    let certificates: Vec<CertificateDer<'static>> = CertificateDer::pem_slice_iter(&bytes)
        .collect::<Result<_, _>>()
        .map_err(|e| e.to_string())?;
    if certificates.is_empty() {
        return Err("no PEM certificate (\"-----BEGIN CERTIFICATE-----\") in it".to_owned());
    }
    for (at, certificate) in certificates.iter().enumerate() {
        rustls::RootCertStore::empty()
            .add(certificate.clone())
            .map_err(|e| format!("certificate {} in it: {e}", at + 1))?;
    }
    Ok(certificates)
}

fn tls_error(error: reqwest::Error) -> RegistryError {
    let mut reason = error.to_string();
    let mut cause = std::error::Error::source(&error);
    while let Some(error) = cause {
        reason = format!("{reason}: {error}");
        cause = error.source();
    }
    RegistryError::Tls { reason }
}
