//! [`Worker`]: claims jobs and runs each one: source, child, ending.
//!
//! While a job runs its lease is renewed. A job ends because its child ended, its
//! time ran out, somebody cancelled it, its lease was lost, or the service ends; in
//! all but the first case the child's process group is asked to end and then killed,
//! and only when it is gone the job's state changes.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::Context;
use rustix::process::Signal;
use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::child::{self, Child, Line};
use super::error::chain;
use super::joblog::JobLog;
use super::jobs::{Ending, Job, JobId, Jobs, JobsError, Lease, Renewal};
use super::log::{LogEvent, ServiceEvent};
use super::now_ms;
use super::source::SourceClient;
use crate::config::ServiceConfig;
use crate::image::Digest;
use crate::progress::BuildEvent;
use crate::store::{Store, remove_tree};

/// How long a job is a worker's without a sign of life.
const LEASE: Duration = Duration::from_secs(30);

/// How often the sign is given; twice in vain is still in time.
const RENEW_EVERY: Duration = Duration::from_secs(10);

/// How long to wait for a change of the queue before looking anyway: leases run out
/// without anybody changing anything.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// How long a child may take to end when asked to.
const TERM_GRACE: Duration = Duration::from_secs(10);

/// How long to read on when the child is gone but something still holds its pipes.
const OUTPUT_GRACE: Duration = Duration::from_secs(30);

/// How many of the child's last lines that are no events go into the error of a crash.
const TAIL: usize = 20;

/// The longest error that is kept, in bytes; the log has the rest.
const ERROR_LIMIT: usize = 16 * 1024;

/// How often an ending is written in all, and the pause between.
const TRIES: u32 = 10;
const PAUSE: Duration = Duration::from_secs(1);

/// How the service tells its workers to end.
#[derive(Clone, Debug, Default)]
pub(crate) struct Stop {
    /// No new jobs.
    pub(crate) draining: CancellationToken,
    /// No jobs at all.
    pub(crate) killing: CancellationToken,
}

/// Runs jobs.
#[derive(Debug)]
pub(crate) struct Worker {
    config: Arc<ServiceConfig>,
    jobs: Jobs,
    source: SourceClient,
    store: Arc<Store>,
    stop: Stop,
    /// Names this process in leases, for who reads the database.
    instance: String,
    returned: AtomicUsize,
}

/// Why a running job has to end before its child does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Why {
    TimedOut,
    Cancelled,
    Lost,
    ServiceEnds,
}

/// What becomes of a job.
#[derive(Debug)]
enum Verdict {
    Ended(Ending),
    /// Back to the queue.
    Returned,
    /// Somebody else's.
    Lost,
}

/// What a child said that decides about its job.
#[derive(Debug, Default)]
struct Said {
    published: Option<(String, Digest)>,
    finished: Option<(bool, String)>,
    tail: VecDeque<String>,
}

impl Worker {
    pub(crate) fn new(
        config: Arc<ServiceConfig>,
        jobs: Jobs,
        source: SourceClient,
        store: Arc<Store>,
        stop: Stop,
    ) -> Self {
        Self {
            config,
            jobs,
            source,
            store,
            stop,
            instance: Uuid::now_v7().to_string(),
            returned: AtomicUsize::new(0),
        }
    }

    /// How many jobs went back to the queue because the service ends.
    pub(crate) fn returned(&self) -> usize {
        self.returned.load(Ordering::Relaxed)
    }

    /// Runs jobs, one after the other, until the service drains.
    pub(crate) async fn work(self: Arc<Self>) {
        let mut changes = self.jobs.subscribe();
        while !self.stop.draining.is_cancelled() {
            changes.mark_unchanged();
            match self.claim().await {
                Ok(Some(lease)) => {
                    let worker = self.clone();
                    // A task of its own: a panic there costs one attempt, not the worker.
                    let job = tokio::spawn(async move { worker.run(&lease).await });
                    if let Err(error) = job.await {
                        tracing::error!(%error, "running a job failed; it runs again when its lease ends");
                    }
                    continue;
                }
                Ok(None) => {}
                Err(error) => tracing::error!(error = chain(&error), "looking for jobs failed"),
            }
            tokio::select! {
                _ = changes.changed() => {}
                () = tokio::time::sleep(LOOK_EVERY) => {}
                () = self.stop.draining.cancelled() => {}
            }
        }
    }

    async fn claim(&self) -> Result<Option<Lease>, JobsError> {
        let attempts = self.config.jobs.attempts;
        for id in self.jobs.give_up(attempts, now_ms()).await? {
            tracing::error!(job = %id, attempts, "gave up a job");
        }
        self.jobs
            .claim(&self.instance, LEASE, attempts, now_ms())
            .await
    }

    async fn run(&self, lease: &Lease) {
        let id = lease.job.id;
        tracing::info!(
            job = %id, repository = lease.job.repository, commit = lease.job.commit,
            attempt = lease.job.attempts, "a job starts"
        );
        let started = Instant::now();
        let log = match JobLog::start(&self.jobs, lease, self.config.jobs.log_limit).await {
            Ok(log) => log,
            // The lease runs out, and the job is claimed again.
            Err(error) => {
                tracing::error!(job = %id, error = chain(&error), "a job could not start");
                return;
            }
        };
        if lease.job.attempts > 1 {
            let message = format!(
                "attempt {} of {}: the service died during an earlier one",
                lease.job.attempts, self.config.jobs.attempts
            );
            log.add(LogEvent::service(message)).await;
        }
        let verdict = self.attempt(lease, &log).await;
        let last_word = match &verdict {
            Verdict::Ended(Ending::Failed { error }) => Some(error.clone()),
            Verdict::Ended(Ending::Cancelled) => Some("the job was cancelled".to_owned()),
            Verdict::Returned => Some("the service ends; the job returns to the queue".to_owned()),
            Verdict::Ended(Ending::Succeeded { .. }) | Verdict::Lost => None,
        };
        if let Some(message) = last_word {
            log.add(LogEvent::service(message)).await;
        }
        log.finish().await;
        let duration_ms = crate::progress::millis(started.elapsed());
        match verdict {
            Verdict::Ended(ending) => {
                let kept = self
                    .persist(id, || self.jobs.finish(lease, &ending, now_ms()))
                    .await;
                match &ending {
                    Ending::Succeeded { image, digest } => {
                        tracing::info!(job = %id, kept, duration_ms, image, %digest, "a job succeeded");
                    }
                    Ending::Failed { error } => {
                        tracing::warn!(job = %id, kept, duration_ms, ?error, "a job failed");
                    }
                    Ending::Cancelled => {
                        tracing::info!(job = %id, kept, duration_ms, "a job was cancelled");
                    }
                }
            }
            Verdict::Returned => {
                if self.persist(id, || self.jobs.release(lease)).await {
                    self.returned.fetch_add(1, Ordering::Relaxed);
                    tracing::warn!(job = %id, duration_ms, "a job returns to the queue");
                }
            }
            Verdict::Lost => tracing::warn!(job = %id, duration_ms, "a job is another's now"),
        }
    }

    /// Makes a change of state, stubbornly. False where the lease was lost meanwhile,
    /// or the database is gone; then the lease runs out.
    async fn persist<F>(&self, id: JobId, change: impl Fn() -> F) -> bool
    where
        F: Future<Output = Result<bool, JobsError>>,
    {
        for attempt in 1..=TRIES {
            match change().await {
                Ok(held) => return held,
                Err(error) => {
                    let error = chain(&error);
                    tracing::error!(job = %id, attempt, error, "changing a job failed");
                }
            }
            tokio::time::sleep(PAUSE).await;
        }
        false
    }

    /// Builds, and watches over lease, time and signals meanwhile.
    async fn attempt(&self, lease: &Lease, log: &JobLog) -> Verdict {
        let cancel = CancellationToken::new();
        let mut build = std::pin::pin!(self.build(&lease.job, log, &cancel));
        let mut timeout = std::pin::pin!(tokio::time::sleep(self.config.jobs.timeout));
        let mut renewals = tokio::time::interval(RENEW_EVERY);
        renewals.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut cancels = self.jobs.subscribe_cancels();
        let mut held_until = Instant::now() + LEASE;
        let mut why = None;
        loop {
            let now = tokio::select! {
                result = &mut build => {
                    let result = result.unwrap_or_else(|error| Ending::Failed {
                        error: limited(format!("{error:#}")),
                    });
                    return self.verdict(why, result);
                }
                () = &mut timeout, if why.is_none() => Some(Why::TimedOut),
                () = self.stop.killing.cancelled(), if why.is_none() => Some(Why::ServiceEnds),
                _ = renewals.tick() => self.renew(lease, &mut held_until).await,
                Ok(()) = cancels.changed() => self.renew(lease, &mut held_until).await,
            };
            if why.is_none() && now.is_some() {
                why = now;
                cancel.cancel();
            }
        }
    }

    async fn renew(&self, lease: &Lease, held_until: &mut Instant) -> Option<Why> {
        let asked = Instant::now();
        match self.jobs.renew(lease, LEASE, now_ms()).await {
            Ok(Renewal::Held) => {
                *held_until = asked + LEASE;
                None
            }
            Ok(Renewal::CancelRequested) => Some(Why::Cancelled),
            Ok(Renewal::Lost) => Some(Why::Lost),
            Err(error) => {
                tracing::error!(job = %lease.job.id, error = chain(&error), "renewing a lease failed");
                (Instant::now() > *held_until).then_some(Why::Lost)
            }
        }
    }

    fn verdict(&self, why: Option<Why>, ending: Ending) -> Verdict {
        match (why, ending) {
            (Some(Why::Lost), _) => Verdict::Lost,
            // It was faster than whoever wanted it to end.
            (_, ending @ Ending::Succeeded { .. }) | (None, ending) => Verdict::Ended(ending),
            (Some(Why::Cancelled), _) => Verdict::Ended(Ending::Cancelled),
            (Some(Why::ServiceEnds), _) => Verdict::Returned,
            (Some(Why::TimedOut), _) => Verdict::Ended(Ending::Failed {
                error: format!(
                    "the job took longer than {} seconds (setting job_timeout) and was ended",
                    self.config.jobs.timeout.as_secs()
                ),
            }),
        }
    }

    /// Fetches and builds one job in a directory of its own. `cancel` ends it early,
    /// with an ending that says nothing then.
    async fn build(
        &self,
        job: &Job,
        log: &JobLog,
        cancel: &CancellationToken,
    ) -> anyhow::Result<Ending> {
        let dir = self.store.tmp_dir("job-")?;
        let result = self.build_in(&dir, job, log, cancel).await;
        remove(dir).await;
        result
    }

    async fn build_in(
        &self,
        dir: &Path,
        job: &Job,
        log: &JobLog,
        cancel: &CancellationToken,
    ) -> anyhow::Result<Ending> {
        let message = format!("fetching {}", self.source.describe(job));
        log.add(LogEvent::service(message)).await;
        let prefix = self.config.repository_prefix.as_deref();
        let prepared = tokio::select! {
            prepared = self.source.prepare(job, dir, &self.config.registry, prefix) => prepared?,
            () = cancel.cancelled() => anyhow::bail!("ended while fetching"),
        };
        let message = format!("building {}", prepared.image);
        log.add(LogEvent::service(message)).await;
        let program = &self.config.executable;
        let (child, lines) = Child::spawn(
            program,
            &child::arguments(&self.config, self.store.root(), &prepared),
            child::environment(&self.config, std::env::vars_os()),
            &prepared.context,
        )
        .await
        .with_context(|| format!("starting {}", program.display()))?;
        let (status, said) = watch(child, lines, log, cancel).await?;
        Ok(said.conclude(status))
    }
}

/// Reads what the child says until it has ended; ends it when `cancel` says so.
async fn watch(
    mut child: Child,
    mut lines: mpsc::Receiver<Line>,
    log: &JobLog,
    cancel: &CancellationToken,
) -> anyhow::Result<(ExitStatus, Said)> {
    const NEVER: Duration = Duration::from_secs(u32::MAX as u64);
    let mut said = Said::default();
    let mut status = None;
    let mut printing = true;
    let mut asked_to_end = false;
    let mut patience = std::pin::pin!(tokio::time::sleep(NEVER));
    loop {
        if let Some(status) = status
            && !printing
        {
            return Ok((status, said));
        }
        tokio::select! {
            // In this order: a child that prints without end must not outlive its time,
            // and of one that ended everything printed before is to be seen.
            biased;
            () = cancel.cancelled(), if !asked_to_end && status.is_none() => {
                asked_to_end = true;
                child.signal(Signal::TERM);
                patience.as_mut().reset(Instant::now() + TERM_GRACE);
            }
            () = &mut patience => match status {
                Some(status) => return Ok((status, said)),
                None => {
                    child.signal(Signal::KILL);
                    patience.as_mut().reset(Instant::now() + TERM_GRACE);
                }
            },
            line = lines.recv(), if printing => match line {
                Some(line) => {
                    if let Some(event) = said.hear(line) {
                        log.add(event).await;
                    }
                }
                None => printing = false,
            },
            exit = child.exit(), if status.is_none() => {
                status = Some(exit.context("waiting for the build")?);
                patience.as_mut().reset(Instant::now() + OUTPUT_GRACE);
            }
        }
    }
}

/// Removes a job's directory. What cannot be removed now goes when the store is next opened.
async fn remove(dir: PathBuf) {
    let removed =
        tokio::task::spawn_blocking(move || remove_tree(&dir).map_err(|error| (dir, error)));
    if let Ok(Err((dir, error))) = removed.await {
        tracing::warn!(dir = %dir.display(), %error, "a job's directory stays for now");
    }
}

impl Said {
    /// Takes a line and says what the log gets of it.
    fn hear(&mut self, line: Line) -> Option<LogEvent> {
        match serde_json::from_slice::<BuildEvent>(&line.bytes) {
            Ok(event) => {
                match &event {
                    BuildEvent::Published {
                        reference, digest, ..
                    } => self.published = Some((reference.clone(), digest.clone())),
                    BuildEvent::Finished {
                        success, message, ..
                    } => self.finished = Some((*success, message.clone())),
                    _ => {}
                }
                Some(LogEvent::Build(event))
            }
            Err(_) => {
                let text = String::from_utf8_lossy(&line.bytes).into_owned();
                if text.trim().is_empty() {
                    return None;
                }
                if self.tail.len() == TAIL {
                    self.tail.pop_front();
                }
                self.tail.push_back(text.clone());
                let stream = line.stream;
                Some(LogEvent::Service(ServiceEvent::Text { stream, text }))
            }
        }
    }

    /// Says how the job ended. Only a status of 0 with a published image is a success.
    fn conclude(self, status: ExitStatus) -> Ending {
        let error = match (status.success(), self.finished, self.published) {
            (true, Some((true, _)), Some((image, digest))) => {
                return Ending::Succeeded { image, digest };
            }
            (true, Some((true, _)), None) => {
                "the build ended well but published no image".to_owned()
            }
            (false, Some((false, message)), _) if !message.is_empty() => message,
            (_, _, _) => {
                let mut error = format!(
                    "the build {} without saying how it went",
                    child::describe(status)
                );
                if !self.tail.is_empty() {
                    error += "; its last lines:\n";
                    error += &self.tail.into_iter().collect::<Vec<_>>().join("\n");
                }
                error
            }
        };
        Ending::Failed {
            error: limited(error),
        }
    }
}

fn limited(mut error: String) -> String {
    if error.len() > ERROR_LIMIT {
        let end = (0..=ERROR_LIMIT)
            .rev()
            .find(|end| error.is_char_boundary(*end))
            .unwrap_or(0);
        error.truncate(end);
        error.push('…');
    }
    error
}

#[cfg(test)]
mod tests;
