//! [`Fetcher`]: what one build fetches other servers' files and repositories with.

use std::fmt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use url::Url;

use super::git::{self, GitRef};
use super::http::{self, Checksum, FetchOptions};
use crate::progress::{BuildEvent, Progress, millis};
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
    progress: Arc<dyn Progress>,
    is_cancelled: Arc<dyn Fn() -> bool + Send + Sync>,
    /// How many fetches have begun.
    tasks: AtomicUsize,
}

impl fmt::Debug for Fetcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Fetcher")
            .field("secrets", &self.secrets)
            .field("agents", &self.agents)
            .finish_non_exhaustive()
    }
}

/// A fetch that has begun.
struct Task<'f> {
    progress: &'f dyn Progress,
    id: String,
    started: Instant,
}

impl Task<'_> {
    /// Says that it has ended well, and what came.
    fn done(self, outcome: &str) {
        self.progress.event(BuildEvent::TaskDone {
            id: self.id,
            outcome: outcome.to_owned(),
            duration_ms: millis(self.started.elapsed()),
        });
    }
}

impl Fetcher {
    /// A fetcher into `store`, from servers in the reach of `registry`. `progress` hears of each
    /// fetch as a task; `is_cancelled` says that nothing is wanted any more.
    ///
    /// # Errors
    /// Those of [`Client::new`].
    pub fn new(
        registry: registry::Options,
        store: Arc<Store>,
        secrets: Arc<Secrets>,
        agents: Arc<SshAgents>,
        progress: Arc<dyn Progress>,
        is_cancelled: impl Fn() -> bool + Send + Sync + 'static,
    ) -> Result<Self, RegistryError> {
        Ok(Self {
            client: Client::new(registry.clone())?,
            registry,
            store,
            secrets,
            agents,
            progress,
            is_cancelled: Arc::new(is_cancelled),
            tasks: AtomicUsize::new(0),
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
        let what = format!("fetching {}", RedactedUrl(url));
        let task = self.begin(&what);
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
        let fetched = http::fetch(&self.client, &self.store, url, &options).await;
        let fetched = fetched.context(what)?;
        task.done(fetched.digest.short());
        Ok(fetched)
    }

    /// Writes the files of a repository into the new directory `into`.
    ///
    /// # Errors
    /// Any; the chain names the repository.
    pub async fn repository(&self, reference: GitRef, into: &Path) -> anyhow::Result<git::Fetched> {
        let what = format!("fetching {reference}");
        let task = self.begin(&what);
        let scratch = self.store.tmp_dir("git-")?;
        let mut options = git::Options::new(self.registry.plain_client()?, &scratch);
        options.reach = self.registry.reach;
        options.secrets = Arc::clone(&self.secrets);
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
        let fetched = fetched.context(what)?;
        task.done(&fetched.commit);
        Ok(fetched)
    }

    /// Says that a fetch has begun.
    fn begin(&self, name: &str) -> Task<'_> {
        let number = self.tasks.fetch_add(1, Ordering::Relaxed);
        let id = format!("fetch {number}");
        self.progress.event(BuildEvent::TaskStarted {
            id: id.clone(),
            name: name.to_owned(),
            total_bytes: None,
        });
        Task {
            progress: &*self.progress,
            id,
            started: Instant::now(),
        }
    }

    fn pass_on(&self, cancelled: &AtomicBool) {
        if (self.is_cancelled)() {
            cancelled.store(true, Ordering::Relaxed);
        }
    }
}
