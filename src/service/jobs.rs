//! [`Jobs`]: the queue of jobs and their logs, in a database.
//!
//! A job is *queued*, *running*, and then *succeeded*, *failed* or *cancelled*. Who
//! runs it holds a lease that must be renewed; a job whose lease ran out is claimed
//! again, until its attempts are used up. Each claim raises the job's *fence*, and
//! every change names the fence it was made under, so that a worker that was thought
//! dead changes nothing any more.
//!
//! Each operation is one statement, or a transaction that begins with a write:
//! SQLite cannot wait for the write lock in a transaction that began with a read.
//! The SQL is text that SQLite and PostgreSQL both take. Clocks are the callers'.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use serde::{Serialize, Serializer};
use sqlx::any::{AnyPoolOptions, AnyRow};
use sqlx::migrate::MigrateError;
use sqlx::{AnyPool, Row};
use thiserror::Error;
use tokio::sync::watch;
use uuid::Uuid;

use super::log::LogEvent;
use crate::image::Digest;

/// Connections to the database: one writer at a time is SQLite's rule, the others read.
const CONNECTIONS: u32 = 8;

/// How many ended jobs one [`Jobs::prune`] removes, so that its transaction stays short.
const PRUNE_BATCH: i64 = 100;

const COLUMNS: &str = "id, repository, commit_id, branch, pull_request, title, state, attempts, \
    image, digest, error, accepted_at_ms, started_at_ms, finished_at_ms";

/// Names a job: a UUID of version 7, so that names sort by age.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct JobId(Uuid);

impl JobId {
    fn new() -> Self {
        Self(Uuid::now_v7())
    }

    /// Reads what [`fmt::Display`] writes, and nothing else.
    pub fn parse(text: &str) -> Option<Self> {
        let id = Self(Uuid::parse_str(text).ok()?);
        (id.to_string() == text).then_some(id)
    }
}

impl fmt::Display for JobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.hyphenated().fmt(f)
    }
}

impl fmt::Debug for JobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Serialize for JobId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// Where a job is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// Waits for a worker.
    Queued,
    /// A worker holds it.
    Running,
    /// The image is at the registry.
    Succeeded,
    /// It ended without an image.
    Failed,
    /// Somebody ended it.
    Cancelled,
}

impl State {
    fn as_str(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Running => "running",
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }

    /// Whether nothing will happen to the job any more.
    pub fn is_end(self) -> bool {
        !matches!(self, Self::Queued | Self::Running)
    }
}

impl FromStr for State {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        [
            Self::Queued,
            Self::Running,
            Self::Succeeded,
            Self::Failed,
            Self::Cancelled,
        ]
        .into_iter()
        .find(|state| state.as_str() == text)
        .ok_or(())
    }
}

/// What a delivery asks for, validated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JobRequest {
    /// The delivery's own name; a second one with it is the same job.
    pub delivery: String,
    /// `OWNER/NAME`.
    pub repository: String,
    /// The commit, 40 or 64 hexadecimal digits.
    pub commit: String,
    /// The base branch.
    pub branch: String,
    /// The pull request's number.
    pub pull_request: i64,
    /// The pull request's title; a stranger's text, only ever shown.
    pub title: String,
}

/// A job as the database has it. Times are milliseconds since 1970 UTC.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Job {
    /// Its name.
    pub id: JobId,
    /// `OWNER/NAME`.
    pub repository: String,
    /// The commit that is built.
    pub commit: String,
    /// The base branch.
    pub branch: String,
    /// The pull request's number.
    pub pull_request: i64,
    /// The pull request's title.
    pub title: String,
    /// Where it is in its life.
    pub state: State,
    /// How often it was started.
    pub attempts: i64,
    /// What was published.
    pub image: Option<String>,
    /// Its manifest's digest.
    pub digest: Option<String>,
    /// Why it failed.
    pub error: Option<String>,
    /// When it was accepted.
    pub accepted_at_ms: i64,
    /// When it was last started.
    pub started_at_ms: Option<i64>,
    /// When it ended.
    pub finished_at_ms: Option<i64>,
}

/// The right to run a job and to change it.
#[derive(Clone, Debug)]
pub struct Lease {
    /// The job when it was claimed.
    pub job: Job,
    /// Counts the claims of this job.
    pub fence: i64,
}

/// What became of a [`JobRequest`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accepted {
    /// It is a job now, durably.
    New(JobId),
    /// The same delivery was accepted before, as this job.
    Known(JobId),
    /// Too many jobs wait.
    Full,
}

/// What a renewal found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Renewal {
    /// The lease goes on.
    Held,
    /// The lease goes on, and somebody wants the job to end.
    CancelRequested,
    /// The job is no longer this worker's.
    Lost,
}

/// How a job ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ending {
    /// The image is at the registry.
    Succeeded {
        /// `REGISTRY/REPOSITORY:TAG`.
        image: String,
        /// The manifest's digest.
        digest: Digest,
    },
    /// There is no image.
    Failed {
        /// Why, for people.
        error: String,
    },
    /// Somebody ended it.
    Cancelled,
}

/// What became of a wish to cancel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cancel {
    /// It waited and is cancelled.
    Done,
    /// It runs; its worker ends it soon.
    Requested,
    /// It had ended before.
    Ended,
    /// There is no such job.
    Unknown,
}

/// One entry of a log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct LogEntry {
    /// Counts from 1 in each job.
    pub seq: i64,
    /// When it was written, in milliseconds since 1970 UTC.
    pub at_ms: i64,
    /// What it says.
    #[serde(flatten)]
    pub event: LogEvent,
}

/// What can go wrong with the database.
#[derive(Debug, Error)]
pub enum JobsError {
    /// It cannot be opened.
    #[error("opening the job database {}", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: sqlx::Error,
    },
    /// Its path cannot stand in a URL.
    #[error("the job database's path {} is not absolute UTF-8", path.display())]
    Path {
        /// The file.
        path: PathBuf,
    },
    /// Its tables cannot be made, or are of a newer version.
    #[error("preparing the tables of the job database {}", path.display())]
    Migrate {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: MigrateError,
    },
    /// A statement failed.
    #[error("{action} in the job database")]
    Statement {
        /// Such as `accepting a job`.
        action: &'static str,
        /// Why it failed.
        #[source]
        source: sqlx::Error,
    },
    /// A row is not what this program writes.
    #[error("the job database is damaged: {what} of job {job}")]
    Damaged {
        /// The column.
        what: &'static str,
        /// The job.
        job: String,
    },
}

fn failed(action: &'static str) -> impl FnOnce(sqlx::Error) -> JobsError {
    move |source| JobsError::Statement { action, source }
}

/// The database. Cheap to clone; clones share everything.
#[derive(Clone, Debug)]
pub struct Jobs {
    pool: AnyPool,
    /// Bumped at every change made through this value, to wake who waits for one.
    changes: watch::Sender<u64>,
    /// Bumped when somebody wants a running job to end.
    cancels: watch::Sender<u64>,
}

impl Jobs {
    /// Opens the SQLite database in the file `path` and makes it where there is none.
    ///
    /// # Errors
    /// Every [`JobsError`] but `Statement` and `Damaged`.
    pub async fn open(path: &Path) -> Result<Self, JobsError> {
        sqlx::any::install_default_drivers();
        let url = url::Url::from_file_path(path)
            .map_err(|()| JobsError::Path {
                path: path.to_owned(),
            })?
            .as_str()
            .replacen("file://", "sqlite://", 1)
            + "?mode=rwc";
        let open = |source| JobsError::Open {
            path: path.to_owned(),
            source,
        };
        let pool = AnyPoolOptions::new()
            .max_connections(CONNECTIONS)
            .acquire_timeout(Duration::from_secs(30))
            .after_connect(|connection, _| {
                Box::pin(async move {
                    // FULL: in WAL mode only then a commit survives the loss of power,
                    // and a 202 promises that.
                    sqlx::raw_sql(
                        "PRAGMA busy_timeout = 10000; \
                         PRAGMA journal_mode = WAL; \
                         PRAGMA synchronous = FULL;",
                    )
                    .execute(&mut *connection)
                    .await?;
                    Ok(())
                })
            })
            .connect(&url)
            .await
            .map_err(open)?;
        sqlx::migrate!("src/service/migrations")
            .run(&pool)
            .await
            .map_err(|source| JobsError::Migrate {
                path: path.to_owned(),
                source,
            })?;
        Ok(Self {
            pool,
            changes: watch::Sender::new(0),
            cancels: watch::Sender::new(0),
        })
    }

    /// Closes all connections; what is under way is finished first.
    pub async fn close(&self) {
        self.pool.close().await;
    }

    /// Something to wait on for a change. Changes that other processes make are not
    /// seen, so waits need a time limit too.
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// The same for wishes to cancel a running job, which [`Jobs::renew`] shows.
    pub fn subscribe_cancels(&self) -> watch::Receiver<u64> {
        self.cancels.subscribe()
    }

    fn changed(&self) {
        self.changes
            .send_modify(|count| *count = count.wrapping_add(1));
    }

    /// Whether the database answers.
    ///
    /// # Errors
    /// [`JobsError::Statement`], as for every further operation.
    pub async fn ping(&self) -> Result<(), JobsError> {
        sqlx::query("SELECT COUNT(*) FROM jobs WHERE state = 'running'")
            .fetch_one(&self.pool)
            .await
            .map(|_| ())
            .map_err(failed("looking"))
    }

    /// Makes a job of `request`, unless its delivery is one already or `queue_limit` jobs
    /// wait. When this returns, the job survives the loss of power.
    ///
    /// # Errors
    /// [`JobsError::Statement`].
    pub async fn accept(
        &self,
        request: &JobRequest,
        queue_limit: u32,
        now_ms: i64,
    ) -> Result<Accepted, JobsError> {
        let action = "accepting a job";
        let id = JobId::new();
        let inserted = sqlx::query(
            "INSERT INTO jobs (id, delivery, repository, commit_id, branch, pull_request, title, \
                 state, owner, fence, lease_until_ms, attempts, cancel_requested, accepted_at_ms) \
             SELECT $1, $2, $3, $4, $5, CAST($6 AS BIGINT), $7, \
                 'queued', '', 0, 0, 0, 0, CAST($8 AS BIGINT) \
             WHERE (SELECT COUNT(*) FROM jobs WHERE state = 'queued') < $9 \
             ON CONFLICT (delivery) DO NOTHING",
        )
        .bind(id.to_string())
        .bind(&request.delivery)
        .bind(&request.repository)
        .bind(&request.commit)
        .bind(&request.branch)
        .bind(request.pull_request)
        .bind(&request.title)
        .bind(now_ms)
        .bind(i64::from(queue_limit))
        .execute(&self.pool)
        .await
        .map_err(failed(action))?;
        if inserted.rows_affected() == 1 {
            self.changed();
            return Ok(Accepted::New(id));
        }
        let known = sqlx::query("SELECT id FROM jobs WHERE delivery = $1")
            .bind(&request.delivery)
            .fetch_optional(&self.pool)
            .await
            .map_err(failed(action))?;
        Ok(match known {
            Some(row) => Accepted::Known(read_id(&row)?),
            None => Accepted::Full,
        })
    }

    /// Ends every lease, however long it would last: for the start of a service that knows
    /// itself to be alone with the database. Returns how many there were.
    ///
    /// # Errors
    /// [`JobsError::Statement`].
    pub async fn take_over(&self) -> Result<u64, JobsError> {
        let ended = sqlx::query("UPDATE jobs SET lease_until_ms = 0 WHERE state = 'running'")
            .execute(&self.pool)
            .await
            .map_err(failed("taking over jobs"))?;
        Ok(ended.rows_affected())
    }

    /// Fails the jobs whose lease ran out in their last attempt. Returns them.
    ///
    /// # Errors
    /// [`JobsError::Statement`].
    pub async fn give_up(&self, max_attempts: u32, now_ms: i64) -> Result<Vec<JobId>, JobsError> {
        let rows = sqlx::query(
            "UPDATE jobs SET state = 'failed', finished_at_ms = $1, fence = fence + 1, \
                 error = 'gave up after ' || attempts || ' attempts: the service died each time' \
             WHERE state = 'running' AND lease_until_ms < $1 AND attempts >= $2 \
             RETURNING id",
        )
        .bind(now_ms)
        .bind(i64::from(max_attempts))
        .fetch_all(&self.pool)
        .await
        .map_err(failed("giving up jobs"))?;
        if !rows.is_empty() {
            self.changed();
        }
        rows.iter().map(read_id).collect()
    }

    /// Gives `owner` the oldest job that waits, or whose lease ran out, until
    /// `now_ms + lease`. Jobs of a repository that another job runs for stay where they
    /// are: the tag they push may be the same, and the younger must win.
    ///
    /// # Errors
    /// [`JobsError::Statement`]; [`JobsError::Damaged`].
    pub async fn claim(
        &self,
        owner: &str,
        lease: Duration,
        max_attempts: u32,
        now_ms: i64,
    ) -> Result<Option<Lease>, JobsError> {
        // "Claimable" is asked a second time outside, where the row is locked: on a
        // database with several writers two workers could find the same row inside.
        const SQL: &str = "UPDATE jobs SET state = 'running', owner = $1, fence = fence + 1, \
                 attempts = attempts + 1, lease_until_ms = $2, started_at_ms = $3 \
             WHERE id = ( \
                 SELECT id FROM jobs AS j \
                 WHERE (state = 'queued' OR (state = 'running' AND lease_until_ms < $3)) \
                     AND attempts < $4 \
                     AND NOT EXISTS ( \
                         SELECT 1 FROM jobs AS other \
                         WHERE other.repository = j.repository AND other.id <> j.id \
                             AND other.state = 'running' AND other.lease_until_ms >= $3) \
                 ORDER BY id LIMIT 1) \
             AND (state = 'queued' OR (state = 'running' AND lease_until_ms < $3)) \
             RETURNING fence, id, repository, commit_id, branch, pull_request, title, state, \
                 attempts, image, digest, error, accepted_at_ms, started_at_ms, finished_at_ms";
        let action = "claiming a job";
        let row = sqlx::query(SQL)
            .bind(owner)
            .bind(now_ms.saturating_add(millis(lease)))
            .bind(now_ms)
            .bind(i64::from(max_attempts))
            .fetch_optional(&self.pool)
            .await
            .map_err(failed(action))?;
        let Some(row) = row else { return Ok(None) };
        self.changed();
        Ok(Some(Lease {
            job: read_job(&row)?,
            fence: row.try_get("fence").map_err(failed(action))?,
        }))
    }

    /// Prolongs a lease until `now_ms + lease`.
    ///
    /// # Errors
    /// [`JobsError::Statement`].
    pub async fn renew(
        &self,
        held: &Lease,
        lease: Duration,
        now_ms: i64,
    ) -> Result<Renewal, JobsError> {
        let action = "renewing a lease";
        let row = sqlx::query(
            "UPDATE jobs SET lease_until_ms = $1 \
             WHERE id = $2 AND fence = $3 AND state = 'running' RETURNING cancel_requested",
        )
        .bind(now_ms.saturating_add(millis(lease)))
        .bind(held.job.id.to_string())
        .bind(held.fence)
        .fetch_optional(&self.pool)
        .await
        .map_err(failed(action))?;
        let Some(row) = row else {
            return Ok(Renewal::Lost);
        };
        let requested: i64 = row.try_get("cancel_requested").map_err(failed(action))?;
        Ok(match requested {
            0 => Renewal::Held,
            _ => Renewal::CancelRequested,
        })
    }

    /// Ends a job. False where the lease was lost: then nothing changed.
    ///
    /// # Errors
    /// [`JobsError::Statement`].
    pub async fn finish(
        &self,
        held: &Lease,
        ending: &Ending,
        now_ms: i64,
    ) -> Result<bool, JobsError> {
        let (state, image, digest, error) = match ending {
            Ending::Succeeded { image, digest } => {
                (State::Succeeded, Some(image), Some(digest.as_str()), None)
            }
            Ending::Failed { error } => (State::Failed, None, None, Some(error)),
            Ending::Cancelled => (State::Cancelled, None, None, None),
        };
        let done = sqlx::query(
            "UPDATE jobs SET state = $1, image = $2, digest = $3, error = $4, finished_at_ms = $5 \
             WHERE id = $6 AND fence = $7 AND state = 'running'",
        )
        .bind(state.as_str())
        .bind(image)
        .bind(digest)
        .bind(error)
        .bind(now_ms)
        .bind(held.job.id.to_string())
        .bind(held.fence)
        .execute(&self.pool)
        .await
        .map_err(failed("ending a job"))?;
        self.changed();
        Ok(done.rows_affected() == 1)
    }

    /// Puts a job back into the queue, at its old place; the attempt does not count.
    /// False where the lease was lost.
    ///
    /// # Errors
    /// [`JobsError::Statement`].
    pub async fn release(&self, held: &Lease) -> Result<bool, JobsError> {
        let done = sqlx::query(
            "UPDATE jobs SET state = 'queued', attempts = attempts - 1, fence = fence + 1 \
             WHERE id = $1 AND fence = $2 AND state = 'running'",
        )
        .bind(held.job.id.to_string())
        .bind(held.fence)
        .execute(&self.pool)
        .await
        .map_err(failed("releasing a job"))?;
        self.changed();
        Ok(done.rows_affected() == 1)
    }

    /// Cancels a job that waits, and asks the worker of one that runs to end it.
    ///
    /// # Errors
    /// [`JobsError::Statement`].
    pub async fn cancel(&self, id: JobId, now_ms: i64) -> Result<Cancel, JobsError> {
        let row = sqlx::query(
            "UPDATE jobs SET \
                 cancel_requested = 1, \
                 finished_at_ms = CASE state WHEN 'queued' THEN $1 ELSE finished_at_ms END, \
                 state = CASE state WHEN 'queued' THEN 'cancelled' ELSE state END \
             WHERE id = $2 AND state IN ('queued', 'running') RETURNING state",
        )
        .bind(now_ms)
        .bind(id.to_string())
        .fetch_optional(&self.pool)
        .await
        .map_err(failed("cancelling a job"))?;
        self.changed();
        match row {
            Some(row) if read_state(&row, id)? == State::Cancelled => Ok(Cancel::Done),
            Some(_) => {
                self.cancels
                    .send_modify(|count| *count = count.wrapping_add(1));
                Ok(Cancel::Requested)
            }
            None if self.get(id).await?.is_some() => Ok(Cancel::Ended),
            None => Ok(Cancel::Unknown),
        }
    }

    /// The number of the last entry of a job's log; 0 for an empty one.
    ///
    /// # Errors
    /// [`JobsError::Statement`].
    pub async fn last_seq(&self, id: JobId) -> Result<i64, JobsError> {
        let action = "reading a log";
        sqlx::query("SELECT COALESCE(MAX(seq), 0) AS last FROM job_log WHERE job_id = $1")
            .bind(id.to_string())
            .fetch_one(&self.pool)
            .await
            .and_then(|row| row.try_get("last"))
            .map_err(failed(action))
    }

    /// Appends `entries`, all or none. False where the lease was lost: then none.
    ///
    /// # Errors
    /// [`JobsError::Statement`].
    pub async fn append(&self, held: &Lease, entries: &[LogEntry]) -> Result<bool, JobsError> {
        let failed = || failed("appending to a log");
        let mut transaction = self.pool.begin().await.map_err(failed())?;
        for entry in entries {
            let body = serde_json::to_string(&entry.event)
                .expect("log events are maps with text keys, which JSON can hold");
            let inserted = sqlx::query(
                "INSERT INTO job_log (job_id, seq, at_ms, body) \
                 SELECT $1, CAST($2 AS BIGINT), CAST($3 AS BIGINT), $4 \
                 WHERE EXISTS (SELECT 1 FROM jobs WHERE id = $1 AND fence = $5 AND state = 'running')",
            )
            .bind(held.job.id.to_string())
            .bind(entry.seq)
            .bind(entry.at_ms)
            .bind(body)
            .bind(held.fence)
            .execute(&mut *transaction)
            .await
            .map_err(failed())?;
            if inserted.rows_affected() == 0 {
                return Ok(false);
            }
        }
        transaction.commit().await.map_err(failed())?;
        self.changed();
        Ok(true)
    }

    /// At most `limit` entries of a job's log that follow number `after`, in order.
    ///
    /// # Errors
    /// [`JobsError::Statement`]; [`JobsError::Damaged`].
    pub async fn log(&self, id: JobId, after: i64, limit: u32) -> Result<Vec<LogEntry>, JobsError> {
        let action = "reading a log";
        let rows = sqlx::query(
            "SELECT seq, at_ms, body FROM job_log WHERE job_id = $1 AND seq > $2 \
             ORDER BY seq LIMIT $3",
        )
        .bind(id.to_string())
        .bind(after)
        .bind(i64::from(limit))
        .fetch_all(&self.pool)
        .await
        .map_err(failed(action))?;
        rows.iter()
            .map(|row| {
                let body: String = row.try_get("body").map_err(failed(action))?;
                Ok(LogEntry {
                    seq: row.try_get("seq").map_err(failed(action))?,
                    at_ms: row.try_get("at_ms").map_err(failed(action))?,
                    event: serde_json::from_str(&body).map_err(|_| JobsError::Damaged {
                        what: "log",
                        job: id.to_string(),
                    })?,
                })
            })
            .collect()
    }

    /// A job.
    ///
    /// # Errors
    /// [`JobsError::Statement`]; [`JobsError::Damaged`].
    pub async fn get(&self, id: JobId) -> Result<Option<Job>, JobsError> {
        sqlx::query(sqlx::AssertSqlSafe(format!(
            "SELECT {COLUMNS} FROM jobs WHERE id = $1"
        )))
        .bind(id.to_string())
        .fetch_optional(&self.pool)
        .await
        .map_err(failed("reading a job"))?
        .as_ref()
        .map(read_job)
        .transpose()
    }

    /// At most `limit` jobs, newest first; only those older than `before` where it is given.
    ///
    /// # Errors
    /// [`JobsError::Statement`]; [`JobsError::Damaged`].
    pub async fn list(&self, before: Option<JobId>, limit: u32) -> Result<Vec<Job>, JobsError> {
        // No UUID sorts behind "g".
        let before = before.map_or_else(|| "g".to_owned(), |id| id.to_string());
        sqlx::query(sqlx::AssertSqlSafe(format!(
            "SELECT {COLUMNS} FROM jobs WHERE id < $1 ORDER BY id DESC LIMIT $2"
        )))
        .bind(before)
        .bind(i64::from(limit))
        .fetch_all(&self.pool)
        .await
        .map_err(failed("listing jobs"))?
        .iter()
        .map(read_job)
        .collect()
    }

    /// Removes some jobs that ended before `before_ms`, with their logs. Returns how many;
    /// 0 when none is left.
    ///
    /// # Errors
    /// [`JobsError::Statement`].
    pub async fn prune(&self, before_ms: i64) -> Result<usize, JobsError> {
        let action = "removing old jobs";
        let mut transaction = self.pool.begin().await.map_err(failed(action))?;
        let rows = sqlx::query(
            "DELETE FROM jobs WHERE id IN ( \
                 SELECT id FROM jobs \
                 WHERE state IN ('succeeded', 'failed', 'cancelled') AND finished_at_ms < $1 \
                 ORDER BY id LIMIT $2) \
             RETURNING id",
        )
        .bind(before_ms)
        .bind(PRUNE_BATCH)
        .fetch_all(&mut *transaction)
        .await
        .map_err(failed(action))?;
        for row in &rows {
            sqlx::query("DELETE FROM job_log WHERE job_id = $1")
                .bind(read_id(row)?.to_string())
                .execute(&mut *transaction)
                .await
                .map_err(failed(action))?;
        }
        transaction.commit().await.map_err(failed(action))?;
        Ok(rows.len())
    }
}

fn read_id(row: &AnyRow) -> Result<JobId, JobsError> {
    let id: String = row.try_get("id").map_err(failed("reading a job"))?;
    JobId::parse(&id).ok_or(JobsError::Damaged {
        what: "the name",
        job: id,
    })
}

fn read_state(row: &AnyRow, id: JobId) -> Result<State, JobsError> {
    let state: String = row.try_get("state").map_err(failed("reading a job"))?;
    state.parse().map_err(|()| JobsError::Damaged {
        what: "the state",
        job: id.to_string(),
    })
}

fn read_job(row: &AnyRow) -> Result<Job, JobsError> {
    let id = read_id(row)?;
    let state = read_state(row, id)?;
    let read = || -> Result<Job, sqlx::Error> {
        Ok(Job {
            id,
            state,
            repository: row.try_get("repository")?,
            commit: row.try_get("commit_id")?,
            branch: row.try_get("branch")?,
            pull_request: row.try_get("pull_request")?,
            title: row.try_get("title")?,
            attempts: row.try_get("attempts")?,
            image: row.try_get("image")?,
            digest: row.try_get("digest")?,
            error: row.try_get("error")?,
            accepted_at_ms: row.try_get("accepted_at_ms")?,
            started_at_ms: row.try_get("started_at_ms")?,
            finished_at_ms: row.try_get("finished_at_ms")?,
        })
    };
    read().map_err(failed("reading a job"))
}

fn millis(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests;
