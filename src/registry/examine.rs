//! [`Client::examine`]: whether a registry can be reached, what it wants, and whether what is kept
//! for it is accepted; for `sockless doctor`. Nothing is written there.

use std::collections::BTreeSet;
use std::time::Duration;

use reqwest::{Method, StatusCode};
use serde::Serialize;

use super::address::Endpoint;
use super::auth::{self, Scopes};
use super::credentials::{Credential, Lookup};
use super::{Client, ConnectionFailure, Options, RegistryError, StatusError, http};
use crate::image::Repository;
use crate::secret::RedactedUrl;

/// How one server of a registry was found. Part of the document of `sockless doctor --json`; no
/// field has a secret.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Examined {
    /// The registry, as references spell it.
    pub registry: String,
    /// Where it was asked, such as `https://registry-1.docker.io/v2/`; absent where it is not known
    /// how an insecure registry is spoken to.
    pub url: Option<String>,
    /// Whether this is a mirror of it.
    pub is_mirror: bool,
    /// Whether it answers as a registry does.
    pub reachable: bool,
    /// What kind of failure it is where something failed.
    pub failure: Option<RegistryFailure>,
    /// What failed, for people.
    pub reason: Option<String>,
    /// The line that helps.
    pub unlock: Option<String>,
    /// What it wants before it answers: `none`, `basic`, `bearer`, or `unknown`.
    pub authentication: Option<&'static str>,
    /// What is kept for it: `password`, `identity-token`, `registry-token`; absent where nothing is.
    pub credentials: Option<&'static str>,
    /// Where that was found; where nothing was, where it was looked for.
    pub places: Option<String>,
    /// Whether the registry, or its token server, accepts it; absent where that does not show.
    pub accepted: Option<bool>,
}

/// What kind of failure it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum RegistryFailure {
    /// Its name is not known.
    Name,
    /// No connection could be made.
    Connection,
    /// It is silent.
    Timeout,
    /// Its certificate is not trusted.
    Certificate,
    /// It does not speak TLS.
    NotTls,
    /// It answers, but not as a registry.
    Answer,
    /// Credentials are kept, but cannot be read.
    Credentials,
    /// It refuses the credentials.
    Refused,
}

impl Client {
    /// A client that gives up soon and tries nothing twice.
    ///
    /// # Errors
    /// As [`Client::new`].
    pub fn impatient(options: Options) -> Result<Self, RegistryError> {
        let timing = http::Timing {
            connect: Duration::from_secs(5),
            answer: Duration::from_secs(10),
            retries: 0,
            ..http::Timing::default()
        };
        Self::with_timing(options, timing)
    }

    /// Registries that credentials are kept for, as references spell them.
    ///
    /// # Errors
    /// [`RegistryError::Credentials`] where a file exists but cannot be read.
    pub async fn known_registries(&self) -> Result<BTreeSet<String>, RegistryError> {
        self.transport().authenticator().files().registries().await
    }

    /// Asks the registry of `repository`, and its mirrors before it, at `/v2/`.
    pub async fn examine(&self, repository: &Repository) -> Vec<Examined> {
        let mut all = Vec::new();
        for mut endpoint in Endpoint::all(&self.0.options, repository) {
            // Of the whole server, not of one repository.
            endpoint.name.clear();
            let mut examined = Examined {
                registry: repository.registry().to_owned(),
                is_mirror: endpoint.is_mirror,
                ..Examined::default()
            };
            if let Err(error) = self.examine_endpoint(&endpoint, &mut examined).await {
                examined.fail(&endpoint, &error);
            }
            all.push(examined);
        }
        all
    }

    async fn examine_endpoint(
        &self,
        endpoint: &Endpoint,
        examined: &mut Examined,
    ) -> Result<(), RegistryError> {
        // First, as it needs nobody else.
        let files = self.transport().authenticator().files();
        let lookup = files.look_up(&endpoint.registry, &endpoint.name).await;
        if let Ok(lookup) = &lookup {
            examined.credentials = lookup.credential.as_ref().map(kind_of);
            examined.places = Some(lookup.places.clone());
        }
        let mut url = self.transport().origin(endpoint).await?;
        url.set_path("/v2/");
        examined.url = Some(RedactedUrl(&url).to_string());
        let http = self.http();
        let (method, limit) = (Method::GET, Some(http.timing.answer));
        let answer = http
            .execute(http.request(&method, &url), &method, &url, limit)
            .await?;
        let (status, headers) = (answer.status(), answer.headers().clone());
        examined.authentication = match status {
            StatusCode::UNAUTHORIZED => Some(auth::wanted(&headers).unwrap_or("unknown")),
            status if status.is_success() => Some("none"),
            _ => return Err(StatusError::new(&method, &url, status, &headers, &[]).into()),
        };
        examined.reachable = true;
        let lookup: Lookup = lookup?;
        if status.is_success() {
            return Ok(());
        }
        let found = lookup.credential.is_some();
        let scopes = Scopes::none();
        let call = self.transport().call_url(endpoint, &scopes, method, url);
        match self.transport().send_once(&call).await {
            Ok(_) => {
                // Without any, it lets everybody read.
                examined.accepted = found.then_some(true);
                Ok(())
            }
            Err(error) if error.is_denied() => {
                examined.accepted = found.then_some(false);
                Err(error)
            }
            Err(error) => Err(error),
        }
    }
}

impl Examined {
    fn fail(&mut self, endpoint: &Endpoint, error: &RegistryError) {
        let failure = failure_of(error);
        let text = error.to_string();
        let hint = error.hint();
        let reason = match hint {
            Some(hint) => text
                .strip_suffix(&format!("\nhint: {hint}"))
                .unwrap_or(&text),
            None => &text,
        };
        self.reason = Some(reason.to_owned());
        self.failure = Some(failure);
        let host = &endpoint.authority;
        let name = host
            .rsplit_once(':')
            .map_or(host.as_str(), |(name, _)| name);
        let registry = &endpoint.registry;
        self.unlock = match failure {
            RegistryFailure::Name => Some(format!(
                "check the name, and the name servers in /etc/resolv.conf: getent hosts {name}"
            )),
            RegistryFailure::Connection | RegistryFailure::Timeout => Some(format!(
                "export HTTPS_PROXY=http://PROXY:PORT, or start what should listen at {host}"
            )),
            RegistryFailure::Refused => Some(format!("docker login {registry}")),
            RegistryFailure::Certificate => Some("sockless build --registry-ca FILE …".to_owned()),
            RegistryFailure::NotTls => Some(format!("sockless build --insecure-registry {host} …")),
            RegistryFailure::Answer | RegistryFailure::Credentials => hint.map(str::to_owned),
        };
    }
}

fn kind_of(credential: &Credential) -> &'static str {
    match credential {
        Credential::Password { .. } => "password",
        Credential::IdentityToken(_) => "identity-token",
        Credential::RegistryToken(_) => "registry-token",
    }
}

fn failure_of(error: &RegistryError) -> RegistryFailure {
    match error {
        RegistryError::Connection {
            failure, reason, ..
        } => match failure {
            ConnectionFailure::Certificate => RegistryFailure::Certificate,
            ConnectionFailure::NotTls => RegistryFailure::NotTls,
            ConnectionFailure::Network if reason.contains("dns error") => RegistryFailure::Name,
            ConnectionFailure::Network if reason.contains("timed out") => RegistryFailure::Timeout,
            ConnectionFailure::Network | ConnectionFailure::Invalid => RegistryFailure::Connection,
        },
        RegistryError::Timeout { .. } => RegistryFailure::Timeout,
        RegistryError::Credentials { .. } => RegistryFailure::Credentials,
        error if error.is_denied() => RegistryFailure::Refused,
        _ => RegistryFailure::Answer,
    }
}
