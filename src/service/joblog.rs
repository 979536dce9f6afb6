//! Writes a running job's log, in batches: each append waits for the disk.

use std::time::Duration;

use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::jobs::{Jobs, JobsError, Lease, LogEntry};
use super::log::{LogEvent, ServiceEvent};
use super::{error, now_ms};

/// How long an entry may wait for others. People read along, so not long.
const FLUSH_AFTER: Duration = Duration::from_millis(200);

/// How many entries are written at a time.
const BATCH: usize = 256;

/// How many entries wait before the build has to.
const WAITING: usize = 256;

/// How often a batch is tried in all, and the pause between.
const TRIES: u32 = 5;
const PAUSE: Duration = Duration::from_millis(500);

/// The log of one running job.
#[derive(Debug)]
pub(crate) struct JobLog {
    sender: mpsc::Sender<LogEvent>,
    writer: JoinHandle<()>,
}

impl JobLog {
    /// Continues the log of the job that `lease` is for; at most `limit_bytes` are
    /// kept of this attempt, apart from how it ends.
    ///
    /// # Errors
    /// [`JobsError::Statement`].
    pub(crate) async fn start(
        jobs: &Jobs,
        lease: &Lease,
        limit_bytes: u64,
    ) -> Result<Self, JobsError> {
        let last_seq = jobs.last_seq(lease.job.id).await?;
        let (sender, receiver) = mpsc::channel(WAITING);
        let writer = Writer {
            jobs: jobs.clone(),
            lease: lease.clone(),
            seq: last_seq,
            limit_bytes,
            written_bytes: 0,
            truncated: false,
        };
        Ok(Self {
            sender,
            writer: tokio::spawn(writer.run(receiver)),
        })
    }

    /// Adds an entry. Waits where the database is slower than the build.
    pub(crate) async fn add(&self, event: LogEvent) {
        if event.is_kept() {
            // The writer ends early only when the lease is lost; then nobody reads this.
            let _ = self.sender.send(event).await;
        }
    }

    /// Waits until everything is written.
    pub(crate) async fn finish(self) {
        drop(self.sender);
        if let Err(error) = self.writer.await {
            tracing::error!(%error, "the writer of a log failed");
        }
    }
}

struct Writer {
    jobs: Jobs,
    lease: Lease,
    seq: i64,
    limit_bytes: u64,
    written_bytes: u64,
    truncated: bool,
}

impl Writer {
    async fn run(mut self, mut events: mpsc::Receiver<LogEvent>) {
        loop {
            let mut batch = Vec::new();
            let Some(first) = events.recv().await else {
                return;
            };
            self.take(first, &mut batch);
            let flush_at = Instant::now() + FLUSH_AFTER;
            while batch.len() < BATCH {
                match tokio::time::timeout_at(flush_at, events.recv()).await {
                    Ok(Some(event)) => self.take(event, &mut batch),
                    // The end is noticed by the next `recv`.
                    Ok(None) | Err(_) => break,
                }
            }
            if !self.write(&batch).await {
                return;
            }
        }
    }

    fn take(&mut self, event: LogEvent, batch: &mut Vec<LogEntry>) {
        self.written_bytes += serde_json::to_string(&event).map_or(0, |body| body.len() as u64);
        if self.written_bytes > self.limit_bytes && !event.is_vital() {
            if !self.truncated {
                self.truncated = true;
                let limit_bytes = self.limit_bytes;
                let notice = LogEvent::Service(ServiceEvent::Truncated { limit_bytes });
                self.push(notice, batch);
            }
            return;
        }
        self.push(event, batch);
    }

    fn push(&mut self, event: LogEvent, batch: &mut Vec<LogEntry>) {
        self.seq += 1;
        batch.push(LogEntry {
            seq: self.seq,
            at_ms: now_ms(),
            event,
        });
    }

    /// False where the lease was lost.
    async fn write(&self, batch: &[LogEntry]) -> bool {
        let job = self.lease.job.id;
        for attempt in 1..=TRIES {
            match self.jobs.append(&self.lease, batch).await {
                Ok(held) => return held,
                Err(error) => {
                    let error = error::chain(&error);
                    tracing::error!(%job, attempt, error, "writing a log failed");
                }
            }
            tokio::time::sleep(PAUSE).await;
        }
        tracing::error!(%job, entries = batch.len(), "a part of a log is lost");
        true
    }
}

#[cfg(test)]
mod tests {
    use super::super::jobs::{Accepted, JobRequest};
    use super::*;
    use crate::progress::{BuildEvent, Stream};

    async fn running() -> (tempfile::TempDir, Jobs, Lease) {
        let dir = tempfile::tempdir().unwrap();
        let jobs = Jobs::open(&dir.path().join("j.sqlite")).await.unwrap();
        let request = JobRequest {
            delivery: "d".to_owned(),
            repository: "o/a".to_owned(),
            commit: "a".repeat(40),
            branch: "develop".to_owned(),
            pull_request: 1,
            title: String::new(),
        };
        let accepted = jobs.accept(&request, 9, 1).await.unwrap();
        assert!(matches!(accepted, Accepted::New(_)));
        let lease = jobs
            .claim("x", Duration::from_secs(30), 3, 1)
            .await
            .unwrap()
            .unwrap();
        (dir, jobs, lease)
    }

    fn output(text: &str) -> LogEvent {
        LogEvent::Build(BuildEvent::StepOutput {
            step: 1,
            stream: Stream::Stdout,
            text: text.to_owned(),
        })
    }

    #[tokio::test]
    async fn everything_is_there_in_order_and_a_second_attempt_continues() {
        let (_dir, jobs, lease) = running().await;
        for attempt in 0..2 {
            let log = JobLog::start(&jobs, &lease, 1 << 20).await.unwrap();
            for n in 0..600 {
                log.add(output(&format!("{attempt}.{n}"))).await;
                log.add(LogEvent::Build(BuildEvent::TaskProgress {
                    id: "pull".to_owned(),
                    done_bytes: n,
                }))
                .await;
            }
            log.finish().await;
        }
        let entries = jobs.log(lease.job.id, 0, 9999).await.unwrap();
        assert_eq!(entries.len(), 1200);
        for (n, entry) in entries.iter().enumerate() {
            assert_eq!(entry.seq, n as i64 + 1);
            assert_eq!(entry.event, output(&format!("{}.{}", n / 600, n % 600)));
        }
    }

    #[tokio::test]
    async fn a_log_is_cut_aloud_and_keeps_its_end() {
        let (_dir, jobs, lease) = running().await;
        let log = JobLog::start(&jobs, &lease, 200).await.unwrap();
        let short = output("short");
        let finished = LogEvent::Build(BuildEvent::Finished {
            success: false,
            message: "no".to_owned(),
            timings_ms: Default::default(),
        });
        for event in [&short, &output(&"x".repeat(300)), &short, &finished] {
            log.add(event.clone()).await;
        }
        log.finish().await;
        let events: Vec<_> = jobs
            .log(lease.job.id, 0, 99)
            .await
            .unwrap()
            .into_iter()
            .map(|entry| entry.event)
            .collect();
        let truncated = LogEvent::Service(ServiceEvent::Truncated { limit_bytes: 200 });
        assert_eq!(events, [short, truncated, finished]);
    }

    #[tokio::test]
    async fn a_lost_lease_ends_the_writer() {
        let (_dir, jobs, lease) = running().await;
        let log = JobLog::start(&jobs, &lease, 1 << 20).await.unwrap();
        jobs.release(&lease).await.unwrap();
        for n in 0..2000 {
            log.add(output(&n.to_string())).await;
        }
        log.finish().await;
        assert_eq!(jobs.last_seq(lease.job.id).await.unwrap(), 0);
    }
}
