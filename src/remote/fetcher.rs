//! [`Fetcher`]: what one build fetches other servers' files and repositories with.

use std::fmt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Context as _;
use url::Url;

use super::git::{self, GitRef};
use super::http::{self, Checksum, FetchOptions};
use crate::registry::{self, Client, RegistryError};
use crate::secret::{RedactedUrl, Secret};
use crate::session::{DEFAULT_SSH_ID, Secrets, SshAgents};
use crate::store::Store;

/// The program that speaks ssh.
const SSH_PROGRAM: &str = "ssh";

/// How often a fetch that blocks is told whether it is still wanted.
const POLL: Duration = Duration::from_millis(100);

/// Fetches with the registry client's certificates and proxies, the user's secrets and agents.
pub struct Fetcher {
    client: Client,
    registry: registry::Options,
    store: Arc<Store>,
    secrets: Arc<Secrets>,
    agents: Arc<SshAgents>,
    is_cancelled: Arc<dyn Fn() -> bool + Send + Sync>,
}

impl fmt::Debug for Fetcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Fetcher")
            .field("secrets", &self.secrets)
            .field("agents", &self.agents)
            .finish_non_exhaustive()
    }
}

impl Fetcher {
    /// A fetcher into `store`, from servers in the reach of `registry`. `is_cancelled` says that
    /// nothing is wanted any more.
    ///
    /// # Errors
    /// Those of [`Client::new`].
    pub fn new(
        registry: registry::Options,
        store: Arc<Store>,
        secrets: Arc<Secrets>,
        agents: Arc<SshAgents>,
        is_cancelled: impl Fn() -> bool + Send + Sync + 'static,
    ) -> Result<Self, RegistryError> {
        Ok(Self {
            client: Client::new(registry.clone())?,
            registry,
            store,
            secrets,
            agents,
            is_cancelled: Arc::new(is_cancelled),
        })
    }

    /// Fetches the file at `url` as a blob of the store.
    ///
    /// # Errors
    /// Any; the chain names the URL.
    pub async fn file(
        &self,
        url: &Url,
        checksum: Option<Checksum>,
    ) -> anyhow::Result<http::Fetched> {
        let secrets = Arc::clone(&self.secrets);
        let host = url.host_str().unwrap_or_default().to_owned();
        let authorization = tokio::task::spawn_blocking(move || secrets.http_auth(&host))
            .await
            .context("a task ended abnormally")??;
        let options = FetchOptions {
            checksum,
            authorization: authorization.map(|found| Secret::new(found.expose().to_owned())),
            limit_bytes: None,
        };
        http::fetch(&self.client, &self.store, url, &options)
            .await
            .with_context(|| format!("fetching {}", RedactedUrl(url)))
    }

    /// Writes the files of a repository into the new directory `into`.
    ///
    /// # Errors
    /// Any; the chain names the repository.
    pub async fn repository(&self, reference: GitRef, into: &Path) -> anyhow::Result<git::Fetched> {
        let what = format!("fetching {reference}");
        let scratch = self.store.tmp_dir("git-")?;
        let mut options = git::Options::new(self.registry.plain_client()?, &scratch);
        let secrets = Arc::clone(&self.secrets);
        options.reach = self.registry.reach;
        options.secrets = Some(Arc::new(move |name: &str| {
            let found = secrets.get(name).ok().flatten()?;
            let text = String::from_utf8(found.expose().to_vec()).ok()?;
            Some(Secret::new(text.trim_end_matches(['\r', '\n']).to_owned()))
        }));
        let mut socket = None;
        if self.agents.contains(DEFAULT_SSH_ID) {
            let path = scratch.join("agent");
            socket = Some(self.agents.serve(DEFAULT_SSH_ID, &path)?);
            options.ssh = Some(git::Ssh {
                program: SSH_PROGRAM.into(),
                agent: path,
                known_hosts: None,
            });
        }
        let cancelled = Arc::clone(&options.cancelled);
        let into = into.to_owned();
        let mut fetching =
            tokio::task::spawn_blocking(move || git::fetch(&reference, &options, &into));
        let fetched = loop {
            tokio::select! {
                joined = &mut fetching => break joined.context("a task ended abnormally")?,
                () = tokio::time::sleep(POLL) => self.pass_on(&cancelled),
            }
        };
        drop(socket);
        fetched.context(what)
    }

    fn pass_on(&self, cancelled: &AtomicBool) {
        if (self.is_cancelled)() {
            cancelled.store(true, Ordering::Relaxed);
        }
    }
}
