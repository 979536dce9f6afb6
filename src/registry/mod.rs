//! A client of the OCI distribution specification: pull, push, and little else.
//!
//! Registries are not trusted. Every byte that is handed out was checked against the
//! digest and size that named it; documents have size limits; credentials go to the
//! registry that they are for and to its token server, and nowhere else, whatever
//! redirects, upload locations and challenges say. A descriptor's `urls` are not read.
//!
//! Deliberately absent: pushing of what is in no file (a layer may go up while it is still
//! being written, but what was sent can be read again, so an upload can be repeated), schema 1
//! manifests, client certificates, the catalogue and deletion of images.
//!
//! ```text
//! mod.rs          Options, Client
//! pull.rs         manifests, configs, blobs
//! push.rs         what goes to a registry besides the bytes of blobs
//! upload.rs       the bytes of one blob: sessions, resuming, fall-backs
//! transport.rs    one request: scheme, authorization, redirects, retries
//! auth.rs         challenges and tokens
//! credentials.rs  what `docker login` and `podman login` left
//! address.rs      where requests go and where they must not
//! http.rs         TLS, proxies, time limits
//! examine.rs      what `doctor` says of a registry
//! error.rs        RegistryError
//! ```
//!
//! <https://github.com/opencontainers/distribution-spec/blob/main/spec.md>

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::path::PathBuf;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::image::{Digest, Repository};

mod address;
mod auth;
mod credentials;
mod error;
mod examine;
mod http;
mod pull;
mod push;
mod reach;
mod transport;
mod upload;

#[cfg(test)]
mod auth_tests;
#[cfg(test)]
mod pull_tests;
#[cfg(test)]
mod push_tests;
#[cfg(test)]
mod real_tests;
#[cfg(test)]
pub(crate) mod testing;

pub(crate) use address::{may_follow, same_origin};
pub(crate) use error::request_label;
pub use error::{ConnectionFailure, RegistryError, SpecError, StatusError};
pub use examine::{Examined, RegistryFailure};
pub(crate) use http::{Http, Patience};
pub use pull::{BlobStream, Resolved};
pub use push::PushedBlob;
pub use reach::Reach;
pub(crate) use transport::next_chunk;
pub use upload::BlobContent;

/// How registries are reached.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// `--registry-mirror`: for a registry's name, base URLs that are asked before it, in order.
    /// A URL may have a path, which is put before `/v2/`'s repository name.
    pub mirrors: BTreeMap<String, Vec<url::Url>>,
    /// `--insecure-registry`: `HOST[:PORT]` that may be spoken to over plain HTTP
    /// or with a certificate that nobody vouches for.
    pub insecure: BTreeSet<String>,
    /// Files with PEM certificates that are trusted beside the system's.
    pub ca_files: Vec<PathBuf>,
    /// The directory of `config.json` with credentials; absent: `$DOCKER_CONFIG`, else `~/.docker`,
    /// and then the places of Podman's `auth.json`.
    pub docker_config: Option<PathBuf>,
    /// Which servers may be asked; for what a Dockerfile names by URL, not for registries.
    pub reach: Reach,
}

impl Options {
    /// A client for servers that are no registries, with the same certificates and proxies. It
    /// follows no redirects.
    ///
    /// # Errors
    /// [`RegistryError::CaFile`], [`RegistryError::Tls`].
    pub fn plain_client(&self) -> Result<reqwest::Client, RegistryError> {
        Ok(http::Http::new(self, http::Timing::default())?.into_plain())
    }
}

/// Speaks to registries. Clones share connections, tokens and what was learnt.
#[derive(Clone, Debug)]
pub struct Client(Arc<Inner>);

/// One blob in one repository: a lock, and whether it is known to be there.
type PushSlot = Arc<tokio::sync::Mutex<bool>>;

#[derive(Debug)]
struct Inner {
    options: Options,
    transport: transport::Transport,
    /// Blobs that were pushed or are being pushed, so that each is pushed once.
    pushes: Mutex<HashMap<(Repository, Digest), PushSlot>>,
    /// By number, the sessions of uploads that have not ended.
    sessions: Mutex<HashMap<u64, (Repository, url::Url)>>,
    last_upload: AtomicU64,
    /// Mirrors that could not be reached; they are not waited for a second time.
    dead_mirrors: Mutex<HashSet<String>>,
}

impl Client {
    /// Loads certificates and reads the environment (proxies, places of credentials).
    /// Nothing is sent yet.
    ///
    /// # Errors
    /// [`RegistryError::CaFile`], [`RegistryError::Mirror`], [`RegistryError::Tls`].
    pub fn new(options: Options) -> Result<Self, RegistryError> {
        Self::with_timing(options, http::Timing::default())
    }

    fn with_timing(options: Options, timing: http::Timing) -> Result<Self, RegistryError> {
        address::check_mirrors(&options)?;
        let http = http::Http::new(&options, timing)?;
        let files = credentials::CredentialFiles::new(options.docker_config.as_deref(), |name| {
            std::env::var_os(name)
        });
        let transport = transport::Transport::new(http, auth::Authenticator::new(files));
        Ok(Self(Arc::new(Inner {
            options,
            transport,
            pushes: Mutex::default(),
            sessions: Mutex::default(),
            last_upload: AtomicU64::new(0),
            dead_mirrors: Mutex::default(),
        })))
    }

    /// What other servers than registries are reached with: the same certificates, proxies,
    /// time limits and patience.
    pub(crate) fn http(&self) -> &Http {
        &self.0.transport.http
    }

    fn transport(&self) -> &transport::Transport {
        &self.0.transport
    }

    /// The registry of `repository` itself, for everything that writes.
    fn registry(&self, repository: &Repository) -> address::Endpoint {
        address::Endpoint::registry(&self.0.options, repository)
    }

    /// Everything that can be read from, in order; the registry is last and always there.
    fn sources(&self, repository: &Repository) -> Vec<address::Endpoint> {
        let dead = lock(&self.0.dead_mirrors);
        address::Endpoint::all(&self.0.options, repository)
            .into_iter()
            .filter(|endpoint| !endpoint.is_mirror || !dead.contains(&endpoint.authority))
            .collect()
    }

    /// Whether a mirror's failure is passed over, which is said aloud.
    fn pass_over(&self, mirror: &address::Endpoint, error: &RegistryError) -> bool {
        if !mirror.is_mirror || error.is_integrity() {
            return false;
        }
        if matches!(
            error,
            RegistryError::Connection { .. } | RegistryError::Timeout { .. }
        ) {
            lock(&self.0.dead_mirrors).insert(mirror.authority.clone());
        }
        if error.is_not_found() {
            tracing::debug!(
                mirror = mirror.authority,
                repository = mirror.name,
                "the mirror does not have it: asking the next"
            );
        } else {
            tracing::warn!(mirror = mirror.authority, repository = mirror.name, %error, "the registry mirror failed: asking the next");
        }
        true
    }

    fn push_slot(&self, repository: &Repository, digest: &Digest) -> PushSlot {
        lock(&self.0.pushes)
            .entry((repository.clone(), digest.clone()))
            .or_default()
            .clone()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing panics while holding one of these, and the collections are whole at any time.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
