//! [`RegistryError`]: what a registry refused, broke or lied about.
//!
//! Messages name method, redacted URL and status, and then the registry's own
//! codes and words, which are cut and cleaned because a terminal will show them.

use std::error::Error as _;
use std::fmt;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use reqwest::{Method, StatusCode, header};
use serde_json::Value;
use thiserror::Error;
use url::Url;

use crate::image::{Digest, ManifestError};
use crate::secret::RedactedUrl;

/// The longest text of a registry that is shown, in characters.
const MESSAGE_LIMIT_CHARS: usize = 400;
/// How many of a registry's errors are shown; more than one is rare.
const ERRORS_LIMIT: usize = 4;

/// Why something could not be had from or brought to a registry.
///
/// Where there is advice, the message ends with a line `hint: …`.
#[derive(Debug, Error)]
pub enum RegistryError {
    /// A file of [`Options::ca_files`](super::Options) cannot be used.
    #[error("reading CA certificates from {path:?}: {reason}")]
    CaFile {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A URL of [`Options::mirrors`](super::Options) cannot be used.
    #[error("invalid registry mirror {url}: {reason}")]
    Mirror {
        /// The mirror, redacted.
        url: String,
        /// What was expected.
        reason: &'static str,
    },
    /// No HTTP client can be made.
    #[error("setting up TLS: {reason}")]
    Tls {
        /// What the TLS library says.
        reason: String,
    },
    /// A registry's name is no address.
    #[error("{0:?} is not the address of a registry: expected HOST[:PORT]")]
    Address(String),
    /// No answer came: no connection, or it broke.
    #[error("{request}: {reason}{}", Hint(.hint))]
    Connection {
        /// Method and redacted URL.
        request: String,
        /// The chain of causes.
        reason: String,
        /// What kind of failure it was.
        failure: ConnectionFailure,
        /// Advice.
        hint: Option<String>,
    },
    /// Nothing moved for too long.
    #[error("{request}: {waiting_for}: nothing came for {} seconds", .waited.as_secs())]
    Timeout {
        /// Method and redacted URL.
        request: String,
        /// What was waited for.
        waiting_for: &'static str,
        /// How long.
        waited: Duration,
    },
    /// The registry answered with a status that is no success.
    #[error(transparent)]
    Status(Box<StatusError>),
    /// The registry answered with success, but not with what the specification asks for.
    #[error("{request}: {reason}")]
    Reply {
        /// Method and redacted URL.
        request: String,
        /// What is missing or wrong.
        reason: String,
    },
    /// A redirect or upload location leads where no request may go.
    #[error("{request}: the registry sends us to {location}: {reason}")]
    Location {
        /// Method and redacted URL.
        request: String,
        /// Where it leads, redacted.
        location: String,
        /// Why not.
        reason: &'static str,
    },
    /// The registry names a token server that credentials must not be sent to.
    #[error("the registry {registry} asks for credentials to be sent to {realm}: {reason}")]
    Realm {
        /// The registry.
        registry: String,
        /// The token server, redacted.
        realm: String,
        /// Why not.
        reason: &'static str,
    },
    /// Credentials are configured but cannot be read.
    #[error("getting credentials for {registry} from {from}: {reason}")]
    Credentials {
        /// The registry.
        registry: String,
        /// The file or helper.
        from: String,
        /// What failed.
        reason: String,
    },
    /// A document is larger than what is read.
    #[error("{what} is larger than {limit_bytes} bytes")]
    TooLarge {
        /// The document.
        what: String,
        /// The limit.
        limit_bytes: u64,
    },
    /// A document is not the manifest or index that it should be.
    #[error("reading the manifest of {reference}")]
    Manifest {
        /// Where it came from.
        reference: String,
        /// What is wrong.
        #[source]
        source: Box<ManifestError>,
    },
    /// The image config contradicts itself or the manifest.
    #[error("reading the config of {reference}: {reason}")]
    Config {
        /// The image.
        reference: String,
        /// What is wrong.
        reason: String,
    },
    /// Bytes are not those that were asked for.
    #[error("{what}: got {got}, want {want}")]
    Digest {
        /// The document or blob.
        what: String,
        /// The digest of what came.
        got: Digest,
        /// The digest asked for.
        want: Digest,
    },
    /// Bytes are too many or too few.
    #[error("{what}: got {got} bytes, want {want} bytes")]
    Size {
        /// The document or blob.
        what: String,
        /// How many came (at least, where there are too many).
        got: u64,
        /// How many the descriptor says.
        want: u64,
    },
    /// A blob that should be uploaded cannot be read.
    #[error("reading {what} for the upload")]
    Content {
        /// The file or blob.
        what: String,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// What kind of failure left a request without an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConnectionFailure {
    /// The server's certificate is not trusted.
    Certificate,
    /// The server does not speak TLS.
    NotTls,
    /// The request could not even be written.
    Invalid,
    /// Anything else: name resolution, refusal, reset, …
    Network,
}

/// An answer whose status is no success.
///
/// <https://github.com/opencontainers/distribution-spec/blob/main/spec.md#error-codes>
#[derive(Debug)]
pub struct StatusError {
    /// Method and redacted URL.
    pub request: String,
    /// The HTTP status.
    pub status: u16,
    /// What the registry says.
    pub errors: Vec<SpecError>,
    /// How long the registry wants to be left alone.
    pub retry_after: Option<Duration>,
    /// Advice.
    pub hint: Option<String>,
}

/// One entry of the specification's error document.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SpecError {
    /// Such as `NAME_UNKNOWN`; may be empty.
    pub code: String,
    /// For people; may be empty.
    pub message: String,
}

impl std::error::Error for StatusError {}

impl fmt::Display for StatusError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.request, self.status)?;
        if self.errors.is_empty() {
            let reason = StatusCode::from_u16(self.status)
                .ok()
                .and_then(|status| status.canonical_reason());
            if let Some(reason) = reason {
                write!(f, " {reason}")?;
            }
        }
        for (at, error) in self.errors.iter().enumerate() {
            f.write_str(if at == 0 { " " } else { "; " })?;
            match (error.code.as_str(), error.message.as_str()) {
                (code, "") => f.write_str(code)?,
                ("", message) => f.write_str(message)?,
                (code, message) => write!(f, "{code}: {message}")?,
            }
        }
        Hint(&self.hint).fmt(f)
    }
}

/// The last line of a message.
struct Hint<'a>(&'a Option<String>);

impl fmt::Display for Hint<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(hint) => write!(f, "\nhint: {hint}"),
            None => Ok(()),
        }
    }
}

impl RegistryError {
    /// Whether the same request may succeed a little later.
    ///
    /// True for broken connections, silence, 408, 429 and 5xx (but what is not implemented).
    pub fn is_temporary(&self) -> bool {
        match self {
            Self::Connection { failure, .. } => *failure == ConnectionFailure::Network,
            Self::Timeout { .. } => true,
            Self::Status(e) => matches!(e.status, 408 | 429 | 500 | 502..=504 | 506..=599),
            _ => false,
        }
    }

    /// The HTTP status, where there was one.
    pub fn status(&self) -> Option<u16> {
        match self {
            Self::Status(e) => Some(e.status),
            _ => None,
        }
    }

    /// Whether the registry says that what was asked for is not there.
    pub fn is_not_found(&self) -> bool {
        self.status() == Some(404)
    }

    /// Whether the registry wants credentials, or better ones.
    pub fn is_denied(&self) -> bool {
        matches!(self.status(), Some(401 | 403))
    }

    /// What to do, where there is advice; the message ends with it too.
    pub fn hint(&self) -> Option<&str> {
        match self {
            Self::Status(e) => e.hint.as_deref(),
            Self::Connection { hint, .. } => hint.as_deref(),
            _ => None,
        }
    }

    /// Whether the bytes that came are not what was asked for, as opposed to none having come.
    pub(super) fn is_integrity(&self) -> bool {
        matches!(
            self,
            Self::Digest { .. }
                | Self::Size { .. }
                | Self::TooLarge { .. }
                | Self::Manifest { .. }
                | Self::Config { .. }
        )
    }

    /// How long the registry wants to be left alone.
    pub(super) fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Status(e) => e.retry_after,
            _ => None,
        }
    }

    /// Adds advice to the error of a refused request.
    pub(super) fn with_hint(mut self, advice: Option<String>) -> Self {
        if let Self::Status(e) = &mut self
            && e.hint.is_none()
        {
            e.hint = advice;
        }
        self
    }

    /// The error of a request that got no answer.
    pub(crate) fn connection(method: &Method, url: &Url, error: reqwest::Error) -> Self {
        let error = error.without_url();
        let failure = if error.is_builder() {
            ConnectionFailure::Invalid
        } else {
            tls_failure(&error).unwrap_or(ConnectionFailure::Network)
        };
        let host = authority(url);
        let hint = match failure {
            ConnectionFailure::Certificate => Some(format!(
                "trust the issuer of the certificate with --registry-ca FILE; for a registry of \
                 your own that nobody vouches for, --insecure-registry {host}"
            )),
            ConnectionFailure::NotTls => Some(format!(
                "{host} does not speak TLS; if it is yours, allow plain HTTP with \
                 --insecure-registry {host}"
            )),
            ConnectionFailure::Invalid | ConnectionFailure::Network => None,
        };
        let mut reason = error.to_string();
        let mut cause = error.source();
        while let Some(error) = cause {
            let text = error.to_string();
            if !reason.contains(&text) {
                reason = format!("{reason}: {text}");
            }
            cause = error.source();
        }
        Self::Connection {
            request: request_label(method, url),
            reason: clean(&reason),
            failure,
            hint,
        }
    }
}

impl StatusError {
    /// Reads the specification's error document in `body`, which may be anything.
    pub(crate) fn new(
        method: &Method,
        url: &Url,
        status: StatusCode,
        headers: &header::HeaderMap,
        body: &[u8],
    ) -> Self {
        Self {
            request: request_label(method, url),
            status: status.as_u16(),
            errors: parse_errors(body),
            retry_after: headers
                .get(header::RETRY_AFTER)
                .and_then(|value| value.to_str().ok())
                .and_then(|text| parse_retry_after(text, time::OffsetDateTime::now_utc())),
            hint: None,
        }
    }

    /// Whether one of the registry's errors has this code.
    pub(super) fn has_code(&self, code: &str) -> bool {
        self.errors.iter().any(|error| error.code == code)
    }
}

impl From<StatusError> for RegistryError {
    fn from(error: StatusError) -> Self {
        Self::Status(Box::new(error))
    }
}

/// Method and redacted URL, as every message names a request.
pub(crate) fn request_label(method: &Method, url: &Url) -> String {
    format!("{method} {}", RedactedUrl(url))
}

/// `HOST[:PORT]` of a URL, as `--insecure-registry` takes it.
pub(super) fn authority(url: &Url) -> String {
    let host = url.host_str().unwrap_or_default();
    match url.port() {
        Some(port) => format!("{host}:{port}"),
        None => host.to_owned(),
    }
}

/// A stranger's text without control characters and of bounded length.
pub(super) fn clean(text: &str) -> String {
    let mut out: String = text
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .take(MESSAGE_LIMIT_CHARS)
        .collect();
    if text.chars().nth(MESSAGE_LIMIT_CHARS).is_some() {
        out.push('…');
    }
    out.trim().to_owned()
}

/// The errors in a body: the specification's document, or the one text that token servers
/// give under various names. Fields of other types are as good as absent.
fn parse_errors(body: &[u8]) -> Vec<SpecError> {
    let document: Value = serde_json::from_slice(body).unwrap_or_default();
    let text = |value: &Value, key: &str| clean(value[key].as_str().unwrap_or_default());
    let listed = document["errors"].as_array().map(Vec::as_slice);
    let mut errors: Vec<SpecError> = listed
        .unwrap_or_default()
        .iter()
        .map(|error| SpecError {
            code: text(error, "code"),
            message: text(error, "message"),
        })
        .collect();
    if errors.is_empty() {
        let names = ["error_description", "details", "message", "error"];
        errors.extend(names.map(|name| SpecError {
            code: String::new(),
            message: text(&document, name),
        }));
        errors.retain(|error| !error.message.is_empty());
        errors.truncate(1);
    }
    errors.retain(|error| !error.code.is_empty() || !error.message.is_empty());
    errors.truncate(ERRORS_LIMIT);
    errors
}

/// Seconds, or an HTTP date.
fn parse_retry_after(text: &str, now: time::OffsetDateTime) -> Option<Duration> {
    if let Ok(seconds) = text.trim().parse() {
        return Some(Duration::from_secs(seconds));
    }
    let at =
        time::OffsetDateTime::parse(text.trim(), &time::format_description::well_known::Rfc2822)
            .ok()?;
    Some((at - now).try_into().unwrap_or_default())
}

/// What TLS says about a failed request, found among its causes.
fn tls_failure(error: &(dyn std::error::Error + 'static)) -> Option<ConnectionFailure> {
    if let Some(error) = error.downcast_ref::<rustls::Error>() {
        return match error {
            rustls::Error::InvalidCertificate(_) => Some(ConnectionFailure::Certificate),
            rustls::Error::InvalidMessage(_) => Some(ConnectionFailure::NotTls),
            _ => None,
        };
    }
    // An `io::Error` passes over the error inside it and gives that one's source.
    let inner = error
        .downcast_ref::<io::Error>()
        .and_then(|error| error.get_ref())
        .and_then(|inner| tls_failure(inner));
    inner.or_else(|| error.source().and_then(tls_failure))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(code: u16, body: &str) -> StatusError {
        let url = Url::parse("https://u:p@host/v2/a/blobs/x?state=secret").unwrap();
        StatusError::new(
            &Method::PUT,
            &url,
            StatusCode::from_u16(code).unwrap(),
            &header::HeaderMap::new(),
            body.as_bytes(),
        )
    }

    #[test]
    fn a_status_shows_request_code_and_message_and_no_secret() {
        let body =
            r#"{"errors":[{"code":"DENIED","message":"no\u001b[31m","detail":[1]},{"code":"X"}]}"#;
        let check = |code, body, expected: &str| {
            assert_eq!(status(code, body).to_string(), expected);
        };
        check(
            403,
            body,
            "PUT https://host/v2/a/blobs/x?…: 403 DENIED: no [31m; X",
        );
        check(
            502,
            "<html>",
            "PUT https://host/v2/a/blobs/x?…: 502 Bad Gateway",
        );
        check(599, "", "PUT https://host/v2/a/blobs/x?…: 599");
        check(
            401,
            r#"{"details":"wrong password","error":"x"}"#,
            "PUT https://host/v2/a/blobs/x?…: 401 wrong password",
        );
        check(
            404,
            r#"{"errors":[{"code":404,"message":null},{"message":"gone"},7]}"#,
            "PUT https://host/v2/a/blobs/x?…: 404 gone",
        );
        let error = RegistryError::from(status(401, "")).with_hint(Some("log in".to_owned()));
        assert_eq!(
            error.to_string(),
            "PUT https://host/v2/a/blobs/x?…: 401 Unauthorized\nhint: log in"
        );
    }

    #[test]
    fn what_may_pass_is_temporary() {
        for (code, temporary) in [
            (400, false),
            (401, false),
            (404, false),
            (408, true),
            (429, true),
            (500, true),
            (501, false),
            (503, true),
            (505, false),
        ] {
            assert_eq!(
                RegistryError::from(status(code, "")).is_temporary(),
                temporary,
                "{code}"
            );
        }
    }

    #[test]
    fn retry_after_is_seconds_or_a_date() {
        let now = time::OffsetDateTime::from_unix_timestamp(784_111_777 - 30).unwrap();
        for (text, seconds) in [
            ("7", Some(7)),
            ("Sun, 06 Nov 1994 08:49:37 GMT", Some(30)),
            ("Sun, 06 Nov 1994 08:40:37 GMT", Some(0)),
            ("soon", None),
        ] {
            let expected = seconds.map(Duration::from_secs);
            assert_eq!(parse_retry_after(text, now), expected, "{text}");
        }
    }

    #[test]
    fn a_long_text_is_cut_where_one_sees_it() {
        let text = clean(&"ä".repeat(MESSAGE_LIMIT_CHARS + 1));
        assert_eq!(text.chars().count(), MESSAGE_LIMIT_CHARS + 1);
        assert!(text.ends_with('…'));
        assert_eq!(clean("a\r\nb\0"), "a  b");
    }
}
