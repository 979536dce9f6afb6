//! The HTTP interface to jobs: `/api/v1/jobs…` and `/healthz`.
//!
//! ```text
//! GET  /api/v1/jobs?limit=&before=   newest first; "next" is the next "before", or null
//! GET  /api/v1/jobs/{id}
//! GET  /api/v1/jobs/{id}/log         server-sent events; text with ?format=text or Accept: text/plain
//! POST /api/v1/jobs/{id}/cancel      with the admin token as bearer token
//! GET  /healthz                      200 where the database answers, else 503
//! ```
//!
//! Reading needs no permission: who may reach the service is its network's to decide.

use std::convert::Infallible;
use std::time::Duration;

use axum::body::Body;
use axum::extract::{Path, Query, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use futures_util::{Stream, StreamExt, stream};
use hmac::{Hmac, KeyInit, Mac};
use serde::{Deserialize, Serialize};
use serde_json::json;
use sha2::Sha256;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::error::ApiError;
use super::jobs::{Cancel, Job, JobId, Jobs, JobsError, LogEntry};
use super::{App, jobs};
use crate::secret::Secret;

/// Jobs on a page of the list unless `limit` says otherwise, and at most.
const PAGE: u32 = 50;
const PAGE_MAX: u32 = 500;

/// Entries of a log that are read at a time.
const LOG_BATCH: u32 = 500;

/// How long a follower waits for a change before it looks anyway: another process
/// on the same database may have made one.
const LOOK_EVERY: Duration = Duration::from_secs(2);

/// How often an idle stream of events shows that it lives; proxies cut after a minute.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

pub(crate) fn routes() -> Router<App> {
    Router::new()
        .route("/healthz", get(health))
        .route("/api/v1/jobs", get(list))
        .route("/api/v1/jobs/{id}", get(show))
        .route("/api/v1/jobs/{id}/log", get(log))
        .route("/api/v1/jobs/{id}/cancel", post(cancel))
}

/// A job as the interface shows it. Times are RFC 3339 in UTC.
#[derive(Debug, Serialize)]
struct JobView {
    id: JobId,
    state: jobs::State,
    repository: String,
    commit: String,
    branch: String,
    pull_request: i64,
    title: String,
    attempts: i64,
    image: Option<String>,
    digest: Option<String>,
    error: Option<String>,
    accepted_at: Option<String>,
    started_at: Option<String>,
    finished_at: Option<String>,
    url: String,
    log_url: String,
}

impl From<Job> for JobView {
    fn from(job: Job) -> Self {
        let url = format!("/api/v1/jobs/{}", job.id);
        Self {
            id: job.id,
            state: job.state,
            repository: job.repository,
            commit: job.commit,
            branch: job.branch,
            pull_request: job.pull_request,
            title: job.title,
            attempts: job.attempts,
            image: job.image,
            digest: job.digest,
            error: job.error,
            accepted_at: rfc3339(job.accepted_at_ms),
            started_at: job.started_at_ms.and_then(rfc3339),
            finished_at: job.finished_at_ms.and_then(rfc3339),
            log_url: format!("{url}/log"),
            url,
        }
    }
}

fn rfc3339(ms: i64) -> Option<String> {
    OffsetDateTime::from_unix_timestamp_nanos(i128::from(ms) * 1_000_000)
        .ok()?
        .format(&Rfc3339)
        .ok()
}

async fn health(State(app): State<App>) -> Result<Response, ApiError> {
    app.jobs.ping().await?;
    Ok(Json(json!({ "status": "ok" })).into_response())
}

#[derive(Debug, Deserialize)]
struct ListQuery {
    limit: Option<String>,
    before: Option<String>,
}

async fn list(
    State(app): State<App>,
    Query(query): Query<ListQuery>,
) -> Result<Response, ApiError> {
    let limit = match query.limit {
        None => PAGE,
        Some(text) => text
            .parse()
            .ok()
            .filter(|limit| (1..=PAGE_MAX).contains(limit))
            .ok_or_else(|| {
                bad(format!(
                    "parameter limit: got {text:?}, expected a number from 1 to {PAGE_MAX}"
                ))
            })?,
    };
    let before = query
        .before
        .map(|text| {
            JobId::parse(&text).ok_or_else(|| {
                bad(format!(
                    "parameter before: got {text:?}, expected a job's id"
                ))
            })
        })
        .transpose()?;
    let jobs = app.jobs.list(before, limit).await?;
    let full = jobs.len() == limit as usize;
    let next = jobs.last().filter(|_| full).map(|job| job.id);
    let jobs: Vec<JobView> = jobs.into_iter().map(JobView::from).collect();
    Ok(Json(json!({ "jobs": jobs, "next": next })).into_response())
}

async fn show(State(app): State<App>, Path(id): Path<String>) -> Result<Response, ApiError> {
    Ok(Json(JobView::from(find(&app, &id).await?)).into_response())
}

#[derive(Debug, Deserialize)]
struct LogQuery {
    format: Option<String>,
}

async fn log(
    State(app): State<App>,
    Path(id): Path<String>,
    Query(query): Query<LogQuery>,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let text = match query.format.as_deref() {
        Some("text") => true,
        Some("events") => false,
        Some(other) => {
            return Err(bad(format!(
                "parameter format: got {other:?}, expected text or events"
            )));
        }
        None => headers
            .get(header::ACCEPT)
            .and_then(|accept| accept.to_str().ok())
            .is_some_and(|accept| accept.trim_start().starts_with("text/plain")),
    };
    let after = match headers.get("last-event-id") {
        None => 0,
        Some(value) => value
            .to_str()
            .ok()
            .and_then(|text| text.parse().ok())
            .filter(|seq| *seq >= 0)
            .ok_or_else(|| bad("header Last-Event-ID: expected the number of a log entry"))?,
    };
    let job = find(&app, &id).await?;
    if text {
        let body = Body::from_stream(text_stream(app.jobs, job.id));
        let content_type = (header::CONTENT_TYPE, "text/plain; charset=utf-8");
        return Ok(([content_type], body).into_response());
    }
    let follower = Follower {
        id: job.id,
        after,
        shown: None,
        changes: app.jobs.subscribe(),
        jobs: app.jobs,
        stop: app.stop,
        ended: false,
    };
    Ok(Sse::new(follower.events())
        .keep_alive(KeepAlive::new().interval(KEEP_ALIVE))
        .into_response())
}

/// The log as it is now, batch by batch.
fn text_stream(jobs: Jobs, id: JobId) -> impl Stream<Item = Result<String, JobsError>> {
    stream::try_unfold(Some(0), move |after| {
        let jobs = jobs.clone();
        async move {
            let Some(after) = after else { return Ok(None) };
            let batch = jobs.log(id, after, LOG_BATCH).await.inspect_err(|error| {
                tracing::error!(error = super::error::chain(error), job = %id, "sending a log broke off");
            })?;
            let next = batch.last().map(|entry| entry.seq);
            let text: String = batch.iter().map(|entry| entry.event.to_text()).collect();
            Ok(next.map(|next| (text, Some(next))))
        }
    })
}

/// Follows a job's log from some entry on until the job has ended.
struct Follower {
    jobs: Jobs,
    id: JobId,
    after: i64,
    /// The state and attempt that the last `job` event showed.
    shown: Option<(jobs::State, i64)>,
    changes: watch::Receiver<u64>,
    stop: CancellationToken,
    ended: bool,
}

impl Follower {
    /// Events: `job` with the job whenever its state changed, `log` with an entry, whose
    /// number is the event's id, and at last `end` with the job.
    fn events(self) -> impl Stream<Item = Result<Event, Infallible>> {
        stream::unfold(self, |mut follower| async move {
            let batch = follower.next().await?;
            Some((stream::iter(batch.into_iter().map(Ok)), follower))
        })
        .flatten()
    }

    async fn next(&mut self) -> Option<Vec<Event>> {
        while !self.ended && !self.stop.is_cancelled() {
            self.changes.mark_unchanged();
            let batch = match self.read().await {
                Ok(batch) => batch,
                Err(error) => {
                    // The client comes again, with the number of the last entry it has.
                    tracing::error!(error = super::error::chain(&error), job = %self.id, "following a log broke off");
                    return None;
                }
            };
            if !batch.is_empty() {
                return Some(batch);
            }
            tokio::select! {
                _ = self.changes.changed() => {}
                () = tokio::time::sleep(LOOK_EVERY) => {}
                () = self.stop.cancelled() => {}
            }
        }
        None
    }

    async fn read(&mut self) -> Result<Vec<Event>, JobsError> {
        // The job first: when it has ended, its log is complete.
        let Some(job) = self.jobs.get(self.id).await? else {
            self.ended = true;
            return Ok(Vec::new());
        };
        let entries = self.jobs.log(self.id, self.after, LOG_BATCH).await?;
        let mut batch = Vec::new();
        let now = (job.state, job.attempts);
        if self.shown != Some(now) && !job.state.is_end() {
            self.shown = Some(now);
            batch.push(event("job", &JobView::from(job.clone())));
        }
        if entries.is_empty() && job.state.is_end() {
            self.ended = true;
            batch.push(event("end", &JobView::from(job)));
        }
        for entry in &entries {
            self.after = entry.seq;
            batch.push(log_event(entry));
        }
        Ok(batch)
    }
}

fn log_event(entry: &LogEntry) -> Event {
    event("log", entry).id(entry.seq.to_string())
}

fn event(name: &str, data: &impl Serialize) -> Event {
    let data = serde_json::to_string(data)
        .expect("jobs and log entries are maps with text keys, which JSON can hold");
    Event::default().event(name).data(data)
}

async fn cancel(
    State(app): State<App>,
    Path(id): Path<String>,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let Some(token) = &app.config.admin_token else {
        return Err(ApiError::new(
            StatusCode::FORBIDDEN,
            "cancelling is off; set admin_token to allow it",
        ));
    };
    let given = headers
        .get(header::AUTHORIZATION)
        .and_then(|value| value.to_str().ok())
        .and_then(|value| value.strip_prefix("Bearer "))
        .unwrap_or_default();
    if !is_same(token, given) {
        return Err(ApiError::new(
            StatusCode::UNAUTHORIZED,
            "header Authorization: expected \"Bearer \" and the admin token",
        ));
    }
    let job = find(&app, &id).await?;
    let state = match app.jobs.cancel(job.id, super::now_ms()).await? {
        Cancel::Done => "cancelled",
        Cancel::Requested => "ending",
        Cancel::Ended => {
            return Err(ApiError::new(
                StatusCode::CONFLICT,
                "the job has already ended",
            ));
        }
        Cancel::Unknown => return Err(unknown(&id)),
    };
    tracing::info!(job = %job.id, state, "a job is cancelled through the interface");
    Ok((
        StatusCode::ACCEPTED,
        Json(json!({ "job": job.id, "state": state })),
    )
        .into_response())
}

/// Compares in constant time, by way of MACs of equal length.
fn is_same(secret: &Secret, given: &str) -> bool {
    let mac = |key: &str| {
        Hmac::<Sha256>::new_from_slice(key.as_bytes())
            .expect("HMAC takes keys of any length")
            .chain_update(b"admin token")
    };
    let given = mac(given).finalize().into_bytes();
    mac(secret.expose()).verify_slice(&given).is_ok()
}

async fn find(app: &App, id: &str) -> Result<Job, ApiError> {
    let parsed = JobId::parse(id).ok_or_else(|| unknown(id))?;
    app.jobs.get(parsed).await?.ok_or_else(|| unknown(id))
}

fn unknown(id: &str) -> ApiError {
    ApiError::new(StatusCode::NOT_FOUND, format!("there is no job {id:?}"))
}

fn bad(message: impl Into<String>) -> ApiError {
    ApiError::new(StatusCode::BAD_REQUEST, message)
}

pub(crate) async fn not_found() -> ApiError {
    ApiError::new(StatusCode::NOT_FOUND, "there is nothing here")
}

pub(crate) async fn method_not_allowed() -> ApiError {
    ApiError::new(
        StatusCode::METHOD_NOT_ALLOWED,
        "this method is not allowed here",
    )
}

/// Nothing that is served is to be cached, framed or taken for something else.
pub(crate) async fn with_common_headers(mut response: Response) -> Response {
    const HEADERS: [(HeaderName, HeaderValue); 3] = [
        (header::CACHE_CONTROL, HeaderValue::from_static("no-store")),
        (
            header::X_CONTENT_TYPE_OPTIONS,
            HeaderValue::from_static("nosniff"),
        ),
        (
            header::REFERRER_POLICY,
            HeaderValue::from_static("no-referrer"),
        ),
    ];
    response.headers_mut().extend(HEADERS);
    response
}
