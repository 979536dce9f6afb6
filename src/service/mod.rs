//! The service: a signed webhook delivery becomes a job, a job becomes a pushed image.
//!
//! ```text
//! delivery ─ webhook ─▶ JobRequest ─ jobs::accept ─▶ Job (durable; only now 202)
//! Job ─ worker: jobs::claim ─▶ Lease ─ source ─▶ context directory
//! Lease + context ─ child: `sockless build` ─▶ events ─ joblog ─▶ log
//! exit + Published ─ jobs::finish ─▶ succeeded, failed or cancelled
//! api, page ─ jobs::{list, get, log} ─▶ people
//! ```
//!
//! A job is a process of its own: what crashes, eats memory or hangs there is the
//! child's. The service holds the queue, and gives a job back to it when the service
//! itself ends. One service has its database for itself (a lock beside it), so what
//! runs in there at its start belongs to a dead one and is run again at once.
//!
//! Deliberately not here: TLS (a reverse proxy's), users (the API shows everything to
//! whoever reaches it; it listens on loopback until told otherwise), and trying a
//! failed build again (a new delivery does).

mod api;
mod archive;
mod child;
mod error;
mod joblog;
pub mod jobs;
pub mod log;
mod page;
mod server;
mod source;
mod webhook;
mod worker;

use std::fs::{File, TryLockError};
use std::io::Write;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Context;
use axum::Router;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::config::ServiceConfig;
use crate::store::Store;
use jobs::Jobs;
use worker::{Stop, Worker};

/// How often ended jobs are looked through for old ones.
const PRUNE_EVERY: Duration = Duration::from_secs(60 * 60);

/// What every request handler sees.
#[derive(Clone, Debug)]
pub(crate) struct App {
    config: Arc<ServiceConfig>,
    jobs: Jobs,
    bodies: Arc<webhook::Bodies>,
    /// Ends streams that would go on for ever.
    stop: CancellationToken,
}

impl App {
    fn new(config: Arc<ServiceConfig>, jobs: Jobs, stop: CancellationToken) -> Self {
        Self {
            bodies: Arc::new(webhook::Bodies::new(config.body_limit)),
            config,
            jobs,
            stop,
        }
    }
}

/// The whole HTTP interface.
fn router(app: App) -> Router {
    api::routes()
        .merge(page::routes())
        .route("/webhook", axum::routing::post(webhook::receive))
        .fallback(api::not_found)
        .method_not_allowed_fallback(api::method_not_allowed)
        .layer(axum::middleware::map_response(api::with_common_headers))
        .with_state(app)
}

/// Serves until SIGTERM or SIGINT, and then ends in order: no new connections, jobs
/// may go on for the configured grace, what still runs returns to the queue. A second
/// signal ends the grace.
///
/// Writes the line `sockless: listening on http://ADDRESS` to stderr once requests
/// are answered. Must be called on a multi-threaded runtime.
///
/// # Errors
/// What keeps the service from starting: the store, the database, its lock, a
/// certificate file, the address. Later troubles are logged and outlived.
pub async fn serve(config: ServiceConfig) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("catching SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("catching SIGINT")?;
    let (sender, signals) = mpsc::channel(1);
    tokio::spawn(async move {
        loop {
            let name = tokio::select! {
                _ = terminate.recv() => "SIGTERM",
                _ = interrupt.recv() => "SIGINT",
            };
            if sender.send(name).await.is_err() {
                return;
            }
        }
    });
    run(config, signals, |address| {
        // Written as it is, whatever the log's format: scripts wait for this line.
        // A closed stderr is no reason not to serve.
        let _ = writeln!(std::io::stderr(), "sockless: listening on http://{address}");
    })
    .await
}

/// [`serve`], with the signals and the announcement as parameters.
async fn run(
    config: ServiceConfig,
    mut signals: mpsc::Receiver<&'static str>,
    listening: impl FnOnce(SocketAddr),
) -> anyhow::Result<()> {
    let config = Arc::new(config);
    let store = Arc::new(Store::open(&config.root).context("opening the store")?);
    let database = std::path::absolute(&config.database)
        .with_context(|| format!("resolving {}", config.database.display()))?;
    let _lock = lock(&database)?;
    let jobs = Jobs::open(&database).await?;
    let taken_over = jobs.take_over().await?;
    if taken_over > 0 {
        tracing::warn!(
            jobs = taken_over,
            "the service died while jobs were running; they run again"
        );
    }
    let source = source::SourceClient::new(&config.source)?;
    let listener = TcpListener::bind(config.listen)
        .await
        .with_context(|| format!("listening on {}", config.listen))?;
    let address = listener.local_addr().context("asking for the address")?;

    let stop = Stop::default();
    let worker = Arc::new(Worker::new(
        config.clone(),
        jobs.clone(),
        source,
        store.clone(),
        stop.clone(),
    ));
    let mut workers = JoinSet::new();
    for _ in 0..config.jobs.concurrent {
        workers.spawn(worker.clone().work());
    }
    let pruner = tokio::spawn(prune(
        jobs.clone(),
        config.jobs.retention,
        stop.draining.clone(),
    ));
    let app = App::new(config.clone(), jobs.clone(), stop.draining.clone());
    let server = tokio::spawn(server::run(
        listener,
        router(app),
        config.connection_limit,
        stop.draining.clone(),
    ));
    listening(address);
    tracing::info!(%address, "serving");

    let signal = signals.recv().await.unwrap_or("the end of its signals");
    let grace = config.jobs.shutdown_grace;
    tracing::info!(
        signal,
        grace_seconds = grace.as_secs(),
        "ending: no new connections and jobs; running jobs may go on for the grace"
    );
    stop.draining.cancel();
    tokio::select! {
        () = drain(&mut workers) => {}
        () = tokio::time::sleep(grace) => {}
        // A closed channel is no second signal.
        Some(signal) = signals.recv() => tracing::info!(signal, "ending at once"),
    }
    stop.killing.cancel();
    drain(&mut workers).await;
    for (what, task) in [("the HTTP server", server), ("the pruner", pruner)] {
        if let Err(error) = task.await {
            tracing::error!(%error, what, "a part of the service failed");
        }
    }
    let returned = worker.returned();
    jobs.close().await;
    match returned {
        0 => tracing::info!("ended; no job was running any more"),
        jobs => tracing::warn!(jobs, "ended; jobs returned to the queue for the next start"),
    }
    Ok(())
}

async fn drain(workers: &mut JoinSet<()>) {
    while let Some(ended) = workers.join_next().await {
        if let Err(error) = ended {
            tracing::error!(%error, "a worker failed");
        }
    }
}

/// Makes the database's directory and locks it for this process.
fn lock(database: &Path) -> anyhow::Result<File> {
    let directory = database.parent().unwrap_or(Path::new("/"));
    std::fs::create_dir_all(directory)
        .with_context(|| format!("creating {}", directory.display()))?;
    let path = directory.join("service.lock");
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .with_context(|| format!("opening {}", path.display()))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => anyhow::bail!(
            "another sockless serve uses {}; give this one another root or database",
            directory.display()
        ),
        Err(TryLockError::Error(error)) => {
            Err(error).with_context(|| format!("locking {}", path.display()))
        }
    }
}

/// Removes old jobs, now and then.
async fn prune(jobs: Jobs, retention: Duration, stop: CancellationToken) {
    let retention_ms = i64::try_from(retention.as_millis()).unwrap_or(i64::MAX);
    loop {
        match jobs.prune(now_ms().saturating_sub(retention_ms)).await {
            // There may be more.
            Ok(1..) if !stop.is_cancelled() => continue,
            Ok(_) => {}
            Err(error) => {
                tracing::error!(error = error::chain(&error), "removing old jobs failed");
            }
        }
        tokio::select! {
            () = tokio::time::sleep(PRUNE_EVERY) => {}
            () = stop.cancelled() => return,
        }
    }
}

/// Milliseconds since 1970 UTC.
fn now_ms() -> i64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| {
            i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
        })
}

#[cfg(test)]
mod tests;
