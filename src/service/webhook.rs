//! `POST /webhook`: a signed delivery becomes a job, or a reason why not.
//!
//! The signature is checked over the raw body before a byte of it is interpreted.
//! Only HMAC-SHA256 is taken; the older SHA-1 header is not looked at. Nothing from
//! a delivery is ever part of a command line, except through values that were
//! validated here: the repository's name and the commit.
//!
//! <https://docs.github.com/en/webhooks/webhook-events-and-payloads#pull_request>

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::body::{Body, BodyDataStream};
use axum::extract::{Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use futures_util::StreamExt;
use hmac::{Hmac, KeyInit, Mac};
use serde_json::{Value, json};
use sha2::Sha256;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::App;
use super::error::ApiError;
use super::jobs::{Accepted, JobRequest};
use crate::config::ServiceConfig;
use crate::secret::Secret;

/// How long a delivery's body may take. GitHub itself waits ten seconds for the answer.
const BODY_TIMEOUT: Duration = Duration::from_secs(30);

/// Unverified bodies may take this many times the body limit of memory together.
const BODIES: u64 = 4;

/// The unit in which [`Bodies`] counts.
const BLOCK: u64 = 4096;

/// Seconds after which a delivery that found the queue full may come again.
const RETRY_AFTER_SECONDS: u64 = 60;

/// The memory that bodies may take until they are verified, so that whoever has no
/// secret cannot fill it, however many connections they open. A slow sender holds
/// only what it sent.
#[derive(Debug)]
pub(crate) struct Bodies(Arc<Semaphore>);

impl Bodies {
    /// Room for some bodies of `body_limit` bytes.
    pub(crate) fn new(body_limit: u64) -> Self {
        let blocks = (body_limit.div_ceil(BLOCK) + 1).saturating_mul(BODIES);
        let blocks = usize::try_from(blocks).unwrap_or(usize::MAX);
        Self(Arc::new(Semaphore::new(blocks.min(Semaphore::MAX_PERMITS))))
    }

    fn take(&self, blocks: u64) -> Result<OwnedSemaphorePermit, ApiError> {
        u32::try_from(blocks)
            .ok()
            .and_then(|blocks| self.0.clone().try_acquire_many_owned(blocks).ok())
            .ok_or_else(|| ApiError::busy("too many deliveries at the same time", 10))
    }
}

/// What a delivery leads to.
#[derive(Debug, PartialEq, Eq)]
enum Decision {
    Build(JobRequest),
    Skip(String),
}

/// Answers a delivery.
pub(crate) async fn receive(
    State(app): State<App>,
    request: Request,
) -> Result<Response, ApiError> {
    let (parts, body) = request.into_parts();
    let result = handle(&app, &parts.headers, body).await;
    if let Err(error) = &result {
        let delivery = parts.headers.get("x-github-delivery");
        tracing::warn!(?delivery, status = error.status().as_u16(), error = ?error.message(), "a delivery was refused");
    }
    result
}

async fn handle(app: &App, headers: &HeaderMap, body: Body) -> Result<Response, ApiError> {
    let signature = signature(headers)?;
    let (body, _memory) = read_body(app, headers, body).await?;
    verify(&app.config.webhook_secret, &signature, &body)?;
    let event = required_header(headers, "x-github-event")?;
    let delivery = required_header(headers, "x-github-delivery")?;
    if delivery.len() > 100 || !delivery.bytes().all(|b| b.is_ascii_graphic()) {
        return Err(bad("header X-GitHub-Delivery: expected a UUID"));
    }
    let decision = match event {
        "ping" => Decision::Skip("ping: the webhook is set up".to_owned()),
        "pull_request" => {
            let payload = parse(headers, &body)?;
            decide(&app.config, delivery, &payload)?
        }
        other => Decision::Skip(format!("event {other:?} is not \"pull_request\"")),
    };
    let request = match decision {
        Decision::Build(request) => request,
        Decision::Skip(reason) => {
            tracing::info!(delivery, ?reason, "a delivery builds nothing");
            return Ok(Json(json!({ "built": false, "reason": reason })).into_response());
        }
    };
    let accepted = app
        .jobs
        .accept(&request, app.config.jobs.queue_limit, super::now_ms())
        .await?;
    let id = match accepted {
        Accepted::New(id) => {
            // Debug formatting escapes control characters: the title is anybody's text.
            tracing::info!(
                job = %id, delivery, repository = request.repository, commit = request.commit,
                pull_request = request.pull_request, title = ?request.title, "accepted a job"
            );
            id
        }
        Accepted::Known(id) => {
            tracing::info!(job = %id, delivery, "a delivery came again");
            id
        }
        Accepted::Full => {
            return Err(ApiError::busy(
                format!(
                    "{} jobs are waiting, which is the limit; deliver again later",
                    app.config.jobs.queue_limit
                ),
                RETRY_AFTER_SECONDS,
            ));
        }
    };
    let answer = json!({ "job": id, "url": format!("/api/v1/jobs/{id}") });
    Ok((StatusCode::ACCEPTED, Json(answer)).into_response())
}

fn bad(message: impl Into<String>) -> ApiError {
    ApiError::new(StatusCode::BAD_REQUEST, message)
}

fn required_header<'h>(headers: &'h HeaderMap, name: &'static str) -> Result<&'h str, ApiError> {
    headers
        .get(name)
        .ok_or_else(|| bad(format!("header {name}: missing")))?
        .to_str()
        .map_err(|_| bad(format!("header {name}: expected visible ASCII")))
}

/// The MAC that the delivery claims; checked before the body is read, so that who does
/// not even try is turned away at once.
fn signature(headers: &HeaderMap) -> Result<[u8; 32], ApiError> {
    let refuse = |message| ApiError::new(StatusCode::UNAUTHORIZED, message);
    let header = headers.get("x-hub-signature-256").ok_or_else(|| {
        refuse("header X-Hub-Signature-256: missing; set a secret at the webhook")
    })?;
    header
        .to_str()
        .ok()
        .and_then(|text| text.strip_prefix("sha256="))
        .and_then(decode_hex)
        .ok_or_else(|| {
            refuse("header X-Hub-Signature-256: expected \"sha256=\" and 64 hexadecimal digits")
        })
}

fn decode_hex(text: &str) -> Option<[u8; 32]> {
    let digits = text.as_bytes();
    if digits.len() != 64 {
        return None;
    }
    let mut bytes = [0; 32];
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        let digit = |c: u8| char::from(c).to_digit(16);
        *byte = u8::try_from(digit(pair[0])? << 4 | digit(pair[1])?).ok()?;
    }
    Some(bytes)
}

/// Compares in constant time.
fn verify(secret: &Secret, signature: &[u8; 32], body: &[u8]) -> Result<(), ApiError> {
    let mut mac = Hmac::<Sha256>::new_from_slice(secret.expose().as_bytes())
        .expect("HMAC takes keys of any length");
    mac.update(body);
    mac.verify_slice(signature).map_err(|_| {
        ApiError::new(
            StatusCode::UNAUTHORIZED,
            "the signature does not match the body; is the secret the same on both sides?",
        )
    })
}

/// Reads the whole body and what it takes of the shared memory.
async fn read_body(
    app: &App,
    headers: &HeaderMap,
    body: Body,
) -> Result<(Vec<u8>, OwnedSemaphorePermit), ApiError> {
    let limit = app.config.body_limit;
    let too_large = || {
        ApiError::new(
            StatusCode::PAYLOAD_TOO_LARGE,
            format!("the body is larger than {limit} bytes"),
        )
    };
    let announced = headers
        .get(header::CONTENT_LENGTH)
        .and_then(|length| length.to_str().ok())
        .and_then(|length| length.parse::<u64>().ok());
    if announced.is_some_and(|length| length > limit) {
        return Err(too_large());
    }
    let read = async {
        let mut bytes = Vec::new();
        let mut memory = app.bodies.take(1)?;
        let mut stream: BodyDataStream = body.into_data_stream();
        while let Some(chunk) = stream.next().await {
            let chunk = chunk.map_err(|_| bad("the body broke off"))?;
            let length = (bytes.len() + chunk.len()) as u64;
            if length > limit {
                return Err(too_large());
            }
            let more = length
                .div_ceil(BLOCK)
                .saturating_sub(memory.num_permits() as u64);
            if more > 0 {
                memory.merge(app.bodies.take(more)?);
            }
            bytes.extend_from_slice(&chunk);
        }
        Ok((bytes, memory))
    };
    tokio::time::timeout(BODY_TIMEOUT, read)
        .await
        .unwrap_or_else(|_| {
            Err(ApiError::new(
                StatusCode::REQUEST_TIMEOUT,
                "the body took too long",
            ))
        })
}

fn parse(headers: &HeaderMap, body: &[u8]) -> Result<Value, ApiError> {
    let content_type = headers
        .get(header::CONTENT_TYPE)
        .and_then(|value| value.to_str().ok())
        .unwrap_or_default();
    let media_type = content_type.split(';').next().unwrap_or_default().trim();
    let json = |bytes: &[u8]| {
        serde_json::from_slice(bytes)
            .map_err(|error| bad(format!("the payload is no JSON: {error}")))
    };
    match media_type.to_ascii_lowercase().as_str() {
        "application/json" => json(body),
        "application/x-www-form-urlencoded" => url::form_urlencoded::parse(body)
            .find(|(name, _)| name == "payload")
            .ok_or_else(|| bad("form field payload: missing"))
            .and_then(|(_, payload)| json(payload.as_bytes())),
        _ => Err(bad(format!(
            "header content-type: got {content_type:?}, expected application/json or application/x-www-form-urlencoded"
        ))),
    }
}

/// Says what a `pull_request` delivery leads to.
fn decide(config: &ServiceConfig, delivery: &str, payload: &Value) -> Result<Decision, ApiError> {
    let skip = |reason: String| Ok(Decision::Skip(reason));
    let action = text(payload, "action")?;
    if action != "closed" {
        return skip(format!("action {action:?} is not \"closed\""));
    }
    let number = get(
        payload,
        "pull_request.number",
        "a positive number",
        |value| value.as_i64().filter(|number| *number > 0),
    )?;
    let merged = get(
        payload,
        "pull_request.merged",
        "true or false",
        Value::as_bool,
    )?;
    if !merged {
        return skip(format!("pull request {number} was closed, not merged"));
    }
    let branch = text(payload, "pull_request.base.ref")?;
    if !config.branches.iter().any(|allowed| allowed == branch) {
        return skip(format!(
            "base branch {branch:?} is none of {}",
            config.branches.join(", ")
        ));
    }
    let repository = get(payload, "repository.full_name", "OWNER/NAME", |value| {
        value.as_str().filter(|name| is_full_name(name))
    })?;
    if let Some(allowed) = &config.repositories
        && !allowed
            .iter()
            .any(|name| name.eq_ignore_ascii_case(repository))
    {
        return skip(format!(
            "repository {repository:?} is not in the list of those built"
        ));
    }
    let commit = get(
        payload,
        "pull_request.merge_commit_sha",
        "40 or 64 lower-case hexadecimal digits",
        |value| value.as_str().filter(|commit| is_commit(commit)),
    )?;
    let title = text(payload, "pull_request.title")?;
    Ok(Decision::Build(JobRequest {
        delivery: delivery.to_owned(),
        repository: repository.to_owned(),
        commit: commit.to_owned(),
        branch: branch.to_owned(),
        pull_request: number,
        // PostgreSQL's TEXT cannot hold a NUL.
        title: title.replace('\0', "\u{fffd}"),
    }))
}

fn text<'v>(payload: &'v Value, path: &str) -> Result<&'v str, ApiError> {
    get(payload, path, "a string", Value::as_str)
}

/// The value at `path`, read by `read`, or an error that names the path.
fn get<'v, T>(
    payload: &'v Value,
    path: &str,
    expected: &str,
    read: impl Fn(&'v Value) -> Option<T>,
) -> Result<T, ApiError> {
    let value = path
        .split('.')
        .try_fold(payload, |value, name| value.get(name))
        .ok_or_else(|| bad(format!("field {path}: missing")))?;
    read(value).ok_or_else(|| {
        let mut got = value.to_string();
        if let Some((end, _)) = got.char_indices().nth(80) {
            got.truncate(end);
            got.push('…');
        }
        bad(format!("field {path}: got {got}, expected {expected}"))
    })
}

/// `OWNER/NAME` as they may stand in a URL's path: no escaping, no `.` or `..`.
fn is_full_name(name: &str) -> bool {
    let valid = |part: &str| {
        (1..=100).contains(&part.len())
            && !matches!(part, "." | "..")
            && part
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
    };
    name.split_once('/')
        .is_some_and(|(owner, name)| valid(owner) && valid(name))
}

fn is_commit(commit: &str) -> bool {
    matches!(commit.len(), 40 | 64)
        && commit
            .bytes()
            .all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

#[cfg(test)]
pub(crate) fn sign(secret: &str, body: &[u8]) -> String {
    use std::fmt::Write;
    let mut mac = Hmac::<Sha256>::new_from_slice(secret.as_bytes()).unwrap();
    mac.update(body);
    let mut text = String::from("sha256=");
    for byte in mac.finalize().into_bytes() {
        write!(text, "{byte:02x}").unwrap();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The example in GitHub's manual.
    /// <https://docs.github.com/en/webhooks/using-webhooks/validating-webhook-deliveries#testing-the-webhook-payload-validation>
    #[test]
    fn security_s21_githubs_own_example_verifies() {
        let secret = "It's a Secret to Everybody";
        let signed = "sha256=757107ea0eb2509fc211221cce984b8a37570b6d7586c22c46f4379c8b043e17";
        assert_eq!(sign(secret, b"Hello, World!"), signed);
        let headers = HeaderMap::from_iter([(
            header::HeaderName::from_static("x-hub-signature-256"),
            header::HeaderValue::from_static(signed),
        )]);
        let mac = signature(&headers).unwrap();
        assert!(verify(&Secret::new(secret), &mac, b"Hello, World!").is_ok());
        assert!(verify(&Secret::new(secret), &mac, b"Hello, World?").is_err());
        assert!(verify(&Secret::new("other"), &mac, b"Hello, World!").is_err());
    }

    #[test]
    fn security_s21_names_and_commits_fit_into_a_path() {
        for (name, expected) in [
            ("a/b", true),
            ("A-b/c_d.e", true),
            ("a", false),
            ("a/", false),
            ("a/..", false),
            ("./a", false),
            ("a/b/c", false),
            ("a/b c", false),
            ("a/b?x", false),
            ("a/%2e%2e", false),
            ("ä/b", false),
        ] {
            assert_eq!(is_full_name(name), expected, "{name}");
        }
        for (commit, expected) in [
            ("a".repeat(40), true),
            ("0".repeat(64), true),
            ("a".repeat(41), false),
            ("g".repeat(40), false),
            ("A".repeat(40), false),
        ] {
            assert_eq!(is_commit(&commit), expected, "{commit}");
        }
    }

    #[test]
    fn security_s21_bodies_share_a_bounded_memory() {
        let bodies = Bodies::new(BLOCK);
        let held: Vec<_> = (0..2 * BODIES).map(|_| bodies.take(1).unwrap()).collect();
        assert_eq!(
            bodies.take(1).unwrap_err().status(),
            StatusCode::SERVICE_UNAVAILABLE
        );
        drop(held);
        assert!(bodies.take(1).is_ok());
    }
}
