//! One file from an HTTP(S) URL → a blob in the store.
//!
//! As BuildKit's HTTP source means it: the file is what the server sends, decompressed only
//! where the transfer itself was compressed (`Content-Encoding: gzip`); its time is
//! `Last-Modified`, else 1970; what it is called the URL alone decides ([`file_name`]).
//! Whoever adds it gives it mode 0600 and owner 0:0.
//!
//! What a server said about a file (`ETag`, `Last-Modified`) is kept beside the blob, so that
//! the next fetch is one conditional request and no download, and none at all where the
//! checksum is known. That memory may fail and the file is then fetched.
//!
//! Servers are not trusted: redirects lead neither from HTTPS to plain HTTP nor from elsewhere
//! to this machine, credentials stay with the host that they are for, and a blob gets its name
//! when all of it came and its checksum was right. Broken connections are resumed where the
//! server allows it.
//!
//! <https://www.rfc-editor.org/rfc/rfc9110>

mod memory;
mod write;

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStringExt as _;
use std::sync::Arc;

use base64::Engine as _;
use percent_encoding::percent_decode_str;
use reqwest::header::{
    ACCEPT_ENCODING, AUTHORIZATION, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE, ETAG,
    HeaderMap, HeaderName, HeaderValue, IF_RANGE, LOCATION, RANGE,
};
use reqwest::{Method, Response, StatusCode};
use thiserror::Error;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use url::Url;

use crate::image::Digest;
use crate::registry::{
    Client, Http, Patience, RegistryError, StatusError, may_follow, next_chunk, request_label,
    same_origin,
};
use crate::secret::{RedactedUrl, Secret};
use crate::store::{Store, StoreError};
use memory::{Memory, Record};
use write::{Piece, Writer};

/// How often a request is sent on; the number that Go's client allows.
const REDIRECT_LIMIT: usize = 10;

/// What a connection must bring before it breaks, in bytes, for the retries to start afresh.
const PROGRESS_BYTES: u64 = 1 << 20;

/// How many pieces may wait to be written; each has at most some ten kilobytes.
const PIECES_AHEAD: usize = 16;

/// What a file is called whose URL says nothing.
const UNNAMED: &str = "__unnamed__";

/// What a file is called whose name would be none.
const BAD_NAME: &str = "download";

/// How a file is fetched.
#[derive(Clone, Debug, Default)]
pub struct FetchOptions {
    /// `--checksum`: what the file must be.
    pub checksum: Option<Checksum>,
    /// The value of `Authorization`, for the URL's own origin.
    pub authorization: Option<Secret>,
    /// More bytes than this are an error.
    pub limit_bytes: Option<u64>,
}

/// A file that was fetched. It is a blob in the store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fetched {
    /// Names the blob.
    pub digest: Digest,
    /// The number of bytes.
    pub size_bytes: u64,
    /// `Last-Modified`, in seconds since 1970 UTC; absent where the server does not say.
    pub last_modified: Option<i64>,
    /// Whether nothing was downloaded, because the file is the same as before.
    pub from_cache: bool,
}

impl Fetched {
    /// The time that the file gets, in seconds since 1970 UTC.
    pub fn mtime(&self) -> i64 {
        self.last_modified.unwrap_or(0)
    }
}

/// `ALGORITHM:HEX`: what a file must be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checksum {
    algorithm: Algorithm,
    text: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Algorithm {
    Sha256,
    Sha384,
    Sha512,
}

/// Why a text is no [`Checksum`].
#[derive(Debug, Error, PartialEq, Eq)]
#[error("invalid checksum {text:?}: {reason}")]
pub struct ChecksumError {
    /// The text.
    pub text: String,
    /// What was expected.
    pub reason: &'static str,
}

/// Why a file could not be had.
#[derive(Debug, Error)]
pub enum HttpError {
    /// The URL cannot be fetched.
    #[error("fetching {url}: {reason}")]
    Url {
        /// The URL, redacted.
        url: String,
        /// What was expected.
        reason: &'static str,
    },
    /// No answer came, or one that is no success.
    #[error(transparent)]
    Request(Box<RegistryError>),
    /// A redirect leads where no request may go.
    #[error("{request}: the server sends us to {location}: {reason}")]
    Redirect {
        /// Method and redacted URL.
        request: String,
        /// Where it leads, redacted.
        location: String,
        /// Why not.
        reason: &'static str,
    },
    /// The bytes are compressed on their way, and damaged.
    #[error("{request}: the answer is not the gzip stream that it says it is")]
    Decode {
        /// Method and redacted URL.
        request: String,
        /// What is wrong.
        #[source]
        source: io::Error,
    },
    /// The file is not the one that was asked for.
    #[error("digest mismatch for {url}: got {got}, want {want}")]
    Checksum {
        /// The URL, redacted.
        url: String,
        /// Of what came.
        got: String,
        /// What was asked for.
        want: String,
    },
    /// The file is larger than what is read.
    #[error("{url} is larger than {limit_bytes} bytes")]
    TooLarge {
        /// The URL, redacted.
        url: String,
        /// The limit.
        limit_bytes: u64,
    },
    /// The file cannot be stored; a full disk is `StorageFull`.
    #[error("storing {url}")]
    Store {
        /// The URL, redacted.
        url: String,
        /// Why.
        #[source]
        source: StoreError,
    },
}

impl From<RegistryError> for HttpError {
    fn from(error: RegistryError) -> Self {
        Self::Request(Box::new(error))
    }
}

impl Checksum {
    /// Parses `sha256:…`, `sha384:…` or `sha512:…` with lower-case digits.
    ///
    /// # Errors
    /// [`ChecksumError`].
    ///
    /// <https://github.com/opencontainers/image-spec/blob/main/descriptor.md#digests>
    pub fn parse(text: &str) -> Result<Self, ChecksumError> {
        let fail = |reason| ChecksumError {
            text: text.to_owned(),
            reason,
        };
        let (name, hex) = text
            .split_once(':')
            .ok_or_else(|| fail("expected ALGORITHM:HEX, such as sha256:…"))?;
        let (algorithm, digits) = match name {
            "sha256" => (Algorithm::Sha256, 64),
            "sha384" => (Algorithm::Sha384, 96),
            "sha512" => (Algorithm::Sha512, 128),
            _ => return Err(fail("the algorithm is none of sha256, sha384 and sha512")),
        };
        if hex.len() != digits {
            return Err(fail("the number of digits is not that of the algorithm"));
        }
        if !hex.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
            return Err(fail("expected digits 0-9 and a-f"));
        }
        Ok(Self {
            algorithm,
            text: text.to_owned(),
        })
    }

    /// `ALGORITHM:HEX`.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// The digest by which the store names the file, if it is of that algorithm.
    fn blob(&self) -> Option<Digest> {
        Digest::parse(&self.text).ok()
    }
}

/// What the file at `url` is called where the destination is a directory: the last part of
/// the path, decoded. The server is not asked.
pub fn file_name(url: &Url) -> OsString {
    let decoded: Vec<u8> = percent_decode_str(url.path()).collect();
    let last = decoded.split(|b| *b == b'/').rfind(|part| !part.is_empty());
    let Some(last) = last else {
        return UNNAMED.into();
    };
    let last = last.trim_ascii();
    let has_control = String::from_utf8_lossy(last).chars().any(char::is_control);
    if has_control || matches!(last, b"" | b"." | b"..") {
        return BAD_NAME.into();
    }
    OsString::from_vec(last.to_vec())
}

/// Fetches the file at `url` into `store`, or finds it there unchanged.
///
/// Memory is bounded, the size is not but by [`FetchOptions::limit_bytes`] and the disk.
/// Dropping the future leaves nothing behind.
///
/// # Errors
/// [`HttpError`].
pub async fn fetch(
    client: &Client,
    store: &Arc<Store>,
    url: &Url,
    options: &FetchOptions,
) -> Result<Fetched, HttpError> {
    let fail = |reason| HttpError::Url {
        url: RedactedUrl(url).to_string(),
        reason,
    };
    if !matches!(url.scheme(), "http" | "https") || !url.has_host() {
        return Err(fail("expected a URL that begins with http:// or https://"));
    }
    let memory = Memory::new(store, url);
    let known = match (&options.checksum, memory.load().await) {
        (None, known) => known,
        (Some(checksum), Some(known)) if checksum.blob().as_ref() == Some(&known.digest) => {
            return Ok(known.into_fetched());
        }
        (Some(_), _) => None,
    };
    let authorization = match &options.authorization {
        Some(secret) => Some(secret.clone()),
        None => basic(url),
    };
    let authorization = authorization
        .map(|secret| {
            let mut value = HeaderValue::from_str(secret.expose())
                .map_err(|_| fail("its credentials have characters that no header can have"))?;
            value.set_sensitive(true);
            Ok::<_, HttpError>(value)
        })
        .transpose()?;
    let mut download = Download {
        http: client.http(),
        store,
        options,
        origin: without_credentials(url),
        authorization,
        patience: client.http().patience(),
        furthest: 0,
        sink: None,
    };
    let (fetched, record) = match download.run(known.as_ref()).await? {
        Outcome::Same => match known {
            Some(known) => return Ok(known.into_fetched()),
            // Nothing was asked that could be answered so.
            None => return Err(download.unexpected(StatusCode::NOT_MODIFIED)),
        },
        Outcome::Fetched(fetched, record) => (fetched, record),
    };
    memory.save(record).await;
    Ok(fetched)
}

/// The first, and the only one as a rule, of the header `name`.
fn text(headers: &HeaderMap, name: HeaderName) -> Option<&str> {
    headers.get(name)?.to_str().ok()
}

fn without_credentials(url: &Url) -> Url {
    let mut url = url.clone();
    // Both fail only for URLs that cannot have any.
    let _ = url.set_username("");
    let _ = url.set_password(None);
    url.set_fragment(None);
    url
}

/// The `Authorization` that a URL's own user information means.
fn basic(url: &Url) -> Option<Secret> {
    if url.username().is_empty() && url.password().is_none() {
        return None;
    }
    let mut pair: Vec<u8> = percent_decode_str(url.username()).collect();
    pair.push(b':');
    pair.extend(percent_decode_str(url.password().unwrap_or_default()));
    let encoded = base64::engine::general_purpose::STANDARD.encode(pair);
    Some(Secret::new(format!("Basic {encoded}")))
}

/// What a download ended with.
enum Outcome {
    /// It is what is known.
    Same,
    Fetched(Fetched, Record),
}

/// Bytes on their way into a blob. Dropped, nothing stays.
struct Sink {
    pieces: mpsc::Sender<Piece>,
    task: JoinHandle<Result<(Digest, u64), HttpError>>,
    /// Headers of the answer that it began with.
    headers: HeaderMap,
    /// Bytes received, as they came.
    received: u64,
    /// What says that a later answer is about the same file, where it can be resumed.
    validator: Option<HeaderValue>,
}

struct Download<'a> {
    http: &'a Http,
    store: &'a Arc<Store>,
    options: &'a FetchOptions,
    /// The URL without credentials.
    origin: Url,
    authorization: Option<HeaderValue>,
    patience: Patience,
    /// The most bytes that any attempt got; what is beyond is progress.
    furthest: u64,
    sink: Option<Sink>,
}

impl Download<'_> {
    /// Tries until it is done, fails for good, or the patience ends.
    async fn run(&mut self, known: Option<&Record>) -> Result<Outcome, HttpError> {
        loop {
            match self.attempt(known).await {
                Err(HttpError::Request(error)) => {
                    if let Some(sink) = &self.sink {
                        if sink.received >= self.furthest + PROGRESS_BYTES {
                            self.patience.renew();
                        }
                        self.furthest = self.furthest.max(sink.received);
                    }
                    if !self.patience.wait(&error).await {
                        return Err(HttpError::Request(error));
                    }
                }
                other => return other,
            }
        }
    }

    async fn attempt(&mut self, known: Option<&Record>) -> Result<Outcome, HttpError> {
        let mut headers = HeaderMap::new();
        let resume = self
            .sink
            .take_if(|sink| sink.received > 0 && sink.validator.is_some());
        match &resume {
            Some(sink) => {
                headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
                let range = format!("bytes={}-", sink.received);
                if let (Ok(range), Some(validator)) =
                    (HeaderValue::from_str(&range), &sink.validator)
                {
                    headers.insert(RANGE, range);
                    headers.insert(IF_RANGE, validator.clone());
                }
            }
            None => {
                // As Go's client asks, so that servers choose the same of several variants.
                headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("gzip"));
                if let Some(known) = known {
                    known.ask(&mut headers);
                }
            }
        }
        let (mut response, url) = match self.send(&headers).await {
            Ok(answer) => answer,
            Err(HttpError::Request(error)) if resume.is_some() && error.status() == Some(416) => {
                return Box::pin(self.attempt(None)).await;
            }
            Err(error) => {
                self.sink = resume.or(self.sink.take());
                return Err(error);
            }
        };
        let status = response.status();
        if resume.is_none()
            && let Some(known) = known
            && (status == StatusCode::OK || status == StatusCode::NOT_MODIFIED)
        {
            if known.is_same(status, response.headers()) {
                return Ok(Outcome::Same);
            }
            if status == StatusCode::NOT_MODIFIED {
                // Not modified since another version than ours: ask for the file itself.
                return Box::pin(self.attempt(None)).await;
            }
        }
        let sink = match resume {
            Some(sink) if continues(&sink, &response) => self.sink.insert(sink),
            // The old sink, if any, is dropped and with it what it wrote.
            _ if status.is_success() && status != StatusCode::PARTIAL_CONTENT => {
                self.sink.insert(self.start(&response, &url))
            }
            // What cannot be resumed is begun afresh.
            Some(_) => return Box::pin(self.attempt(None)).await,
            None => return Err(self.unexpected_at(&url, &response)),
        };
        let idle = self.http.timing.idle;
        while let Some(chunk) = next_chunk(&mut response, &Method::GET, &url, idle).await? {
            sink.received += chunk.len() as u64;
            if sink.pieces.send(Piece::Bytes(chunk)).await.is_err() {
                // The writer gave up, and says why below.
                break;
            }
        }
        let Some(sink) = self.sink.take() else {
            return Err(self.unexpected(status));
        };
        self.finish(sink).await
    }

    /// Waits until all is written and named.
    async fn finish(&self, sink: Sink) -> Result<Outcome, HttpError> {
        let Sink {
            pieces,
            task,
            headers,
            ..
        } = sink;
        // Fails where the writer has failed, which is the error then.
        let _ = pieces.send(Piece::End).await;
        let (digest, size_bytes) = task.await.unwrap_or_else(|error| {
            let source = StoreError::io("writing a blob in", self.store.tmp())(error.into());
            Err(HttpError::Store {
                url: RedactedUrl(&self.origin).to_string(),
                source,
            })
        })?;
        let record = Record::new(&headers, digest, size_bytes);
        let fetched = Fetched {
            from_cache: false,
            ..record.clone().into_fetched()
        };
        Ok(Outcome::Fetched(fetched, record))
    }

    /// Sends one request, and follows redirects; the answer has any other status than those.
    async fn send(&self, headers: &HeaderMap) -> Result<(Response, Url), HttpError> {
        let mut url = self.origin.clone();
        let mut redirects = 0;
        loop {
            self.http
                .reach
                .check(&url)
                .map_err(|reason| HttpError::Url {
                    url: RedactedUrl(&url).to_string(),
                    reason,
                })?;
            let mut request = self
                .http
                .request(&Method::GET, &url)
                .headers(headers.clone());
            if let Some(authorization) = &self.authorization
                && same_origin(&self.origin, &url)
            {
                request = request.header(AUTHORIZATION, authorization.clone());
            }
            let limit = Some(self.http.timing.answer);
            let response = self
                .http
                .execute(request, &Method::GET, &url, limit)
                .await?;
            let status = response.status();
            let next = text(response.headers(), LOCATION)
                .filter(|_| matches!(status.as_u16(), 301..=303 | 307 | 308));
            if let Some(next) = next {
                redirects += 1;
                url = self.follow(&url, next, redirects)?;
                continue;
            }
            if status.is_client_error() || status.is_server_error() {
                let error = StatusError::new(&Method::GET, &url, status, response.headers(), &[]);
                return Err(RegistryError::from(error).into());
            }
            return Ok((response, url));
        }
    }

    fn follow(&self, from: &Url, location: &str, redirects: usize) -> Result<Url, HttpError> {
        let joined = from.join(location);
        let fail = |reason| HttpError::Redirect {
            request: request_label(&Method::GET, from),
            location: match &joined {
                Ok(url) => RedactedUrl(url).to_string(),
                Err(_) => "something that is not a URL".to_owned(),
            },
            reason,
        };
        if redirects > REDIRECT_LIMIT {
            return Err(fail("too many redirects"));
        }
        let Ok(url) = &joined else {
            return Err(fail("that is not a URL"));
        };
        may_follow(from, url, self.http.insecure()).map_err(fail)?;
        Ok(without_credentials(url))
    }

    /// Begins a blob with the answer `response`.
    fn start(&self, response: &Response, url: &Url) -> Sink {
        let headers = response.headers().clone();
        let encoding = text(&headers, CONTENT_ENCODING).map(str::to_ascii_lowercase);
        let gzip = matches!(encoding.as_deref(), Some("gzip" | "x-gzip"));
        let (pieces, receiver) = mpsc::channel(PIECES_AHEAD);
        let writer = Writer {
            request: request_label(&Method::GET, url),
            url: RedactedUrl(&self.origin).to_string(),
            limit_bytes: self.options.limit_bytes,
            checksum: self.options.checksum.clone(),
            gzip,
            expected: text(&headers, CONTENT_LENGTH).and_then(|n| n.parse().ok()),
        };
        let store = self.store.clone();
        let task = tokio::task::spawn_blocking(move || writer.write(&store, receiver));
        // A weak tag does not promise the same bytes.
        let validator = headers
            .get(ETAG)
            .filter(|etag| !gzip && !etag.as_bytes().starts_with(b"W/"));
        Sink {
            pieces,
            task,
            received: 0,
            validator: validator.cloned(),
            headers,
        }
    }

    fn unexpected_at(&self, url: &Url, response: &Response) -> HttpError {
        let (status, headers) = (response.status(), response.headers());
        RegistryError::from(StatusError::new(&Method::GET, url, status, headers, &[])).into()
    }

    fn unexpected(&self, status: StatusCode) -> HttpError {
        let headers = HeaderMap::new();
        let error = StatusError::new(&Method::GET, &self.origin, status, &headers, &[]);
        RegistryError::from(error).into()
    }
}

/// Whether `response` is the rest of what `sink` has the beginning of.
fn continues(sink: &Sink, response: &Response) -> bool {
    let headers = response.headers();
    let from = text(headers, CONTENT_RANGE)
        .and_then(|range| range.strip_prefix("bytes ")?.split_once('-'))
        .and_then(|(from, _)| from.parse::<u64>().ok());
    response.status() == StatusCode::PARTIAL_CONTENT
        && from == Some(sink.received)
        && headers.get(CONTENT_ENCODING).is_none()
        && headers
            .get(ETAG)
            .is_none_or(|tag| Some(tag) == sink.validator.as_ref())
}

#[cfg(test)]
mod tests;
