//! The bytes of one blob on their way to a registry.
//!
//! ```text
//! POST …/blobs/uploads/         a session: its upload location
//! PATCH location                all bytes, streamed      ─┐ after a failure: GET location
//! PUT location?digest=…         no bytes: commit          ├─ says what arrived (Range), and
//!                                                        ─┘ PATCH sends the rest
//! PUT location?digest=…         all bytes: where PATCH is refused
//! ```
//!
//! A rest is always sent in one piece, so `OCI-Chunk-Min-Length`, which the last chunk
//! need not reach, is kept by construction. The registry checks the digest at the
//! commit; a session that got confused is dropped and another one started.
//!
//! <https://github.com/opencontainers/distribution-spec/blob/main/spec.md#pushing-blobs>

use std::future::Future;
use std::io::{self, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::{Stream, StreamExt, stream};
use reqwest::header::{CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, HeaderMap, HeaderValue};
use reqwest::{Method, StatusCode};
use tokio::io::{AsyncReadExt, AsyncSeekExt};
use tokio_util::io::ReaderStream;
use url::Url;

use super::address::Endpoint;
use super::auth::Scopes;
use super::http::Patience;
use super::pull::{content_digest, from_io};
use super::transport::{Answer, BodySource, Call, Payload};
use super::{Client, RegistryError, lock};
use crate::image::{Descriptor, Repository};

/// How much of a file is read at once, in bytes. Less costs system calls, more memory.
const PIECE_BYTES: usize = 256 << 10;
/// How often progress is told.
const TICK: Duration = Duration::from_millis(100);
/// What a session must take before it breaks, in bytes, for the retries to start afresh.
const PROGRESS_BYTES: u64 = 1 << 20;

/// Where a blob's bytes are.
#[derive(Clone, Debug)]
pub enum BlobContent {
    /// A file with exactly these bytes, opened again for each attempt.
    File(PathBuf),
    /// Another repository, at this or another registry; streamed across.
    Remote(Repository),
    /// Memory.
    Bytes(Vec<u8>),
}

/// One blob, and where it goes.
pub(super) struct Upload<'a> {
    pub(super) client: &'a Client,
    pub(super) endpoint: &'a Endpoint,
    pub(super) scopes: &'a Scopes,
    pub(super) descriptor: &'a Descriptor,
    pub(super) content: &'a Source,
    pub(super) progress: &'a (dyn Fn(u64) + Send + Sync),
}

/// [`BlobContent`], cheap to clone.
#[derive(Clone, Debug)]
pub(super) enum Source {
    File(PathBuf),
    Remote(Repository),
    Bytes(Bytes),
}

impl From<BlobContent> for Source {
    fn from(content: BlobContent) -> Self {
        match content {
            BlobContent::File(path) => Self::File(path),
            BlobContent::Remote(repository) => Self::Remote(repository),
            BlobContent::Bytes(bytes) => Self::Bytes(bytes.into()),
        }
    }
}

/// Why a session did not end well.
enum Failure {
    /// Nothing will help.
    Fatal(RegistryError),
    /// The registry takes no PATCH.
    Refused(RegistryError),
    /// Another session may do.
    Session(RegistryError),
}

impl Failure {
    /// Of a session that was resumed or is lost. The reference registry, for one, may still
    /// be busy with the request whose connection broke, and then refuses the next one with
    /// 404 or has the bytes of both; another session knows nothing of that.
    fn of_session(error: RegistryError) -> Self {
        match &error {
            RegistryError::Status(e) if matches!(e.status, 400 | 404 | 409 | 416) => {
                Self::Session(error)
            }
            _ => Self::Fatal(error),
        }
    }
}

impl Upload<'_> {
    /// Uploads, beginning in the session at `location` where there is one already.
    pub(super) async fn run(&self, mut location: Option<Url>) -> Result<(), RegistryError> {
        let mut patience = self.client.transport().http.patience();
        let mut whole = false;
        loop {
            let mut session = match location.take() {
                Some(location) => location,
                None => self.start(&mut patience).await?,
            };
            let result = if whole {
                self.commit(&session, true).await
            } else {
                self.send_resuming(&mut session, &mut patience).await
            };
            let error = match result {
                Ok(()) => {
                    (self.progress)(self.descriptor.size);
                    return Ok(());
                }
                Err(Failure::Refused(error)) => {
                    tracing::debug!(%error, registry = self.endpoint.authority, "uploading in one PUT");
                    whole = true;
                    self.cancel(session).await;
                    continue;
                }
                Err(Failure::Session(error)) => error,
                Err(Failure::Fatal(error)) => {
                    self.cancel(session).await;
                    return Err(error);
                }
            };
            self.cancel(session).await;
            if !patience.wait_anyway(&error).await {
                return Err(error);
            }
            // The answer to a commit that did succeed may be what was lost.
            let digest = &self.descriptor.digest;
            let found = self
                .client
                .blob_exists(self.endpoint, self.scopes, digest)
                .await;
            if found.unwrap_or(false) {
                return Ok(());
            }
        }
    }

    async fn start(&self, patience: &mut Patience) -> Result<Url, RegistryError> {
        let transport = self.client.transport();
        let call = transport
            .call(self.endpoint, self.scopes, Method::POST, "blobs/uploads/")
            .await?;
        let answer = transport.send_with(&call, patience).await?;
        self.client.upload_location(self.endpoint, &answer).await
    }

    /// PATCH, with what arrived asked for after failures, then an empty PUT.
    async fn send_resuming(
        &self,
        location: &mut Url,
        patience: &mut Patience,
    ) -> Result<(), Failure> {
        let size = self.descriptor.size;
        let mut offset = 0;
        let mut resumed = false;
        while offset < size {
            let error = match self.patch(location, offset, resumed).await {
                Ok(answer) => {
                    // Absent: not every registry repeats it, then it is the same one.
                    if answer.header("location").is_some() {
                        *location = self
                            .client
                            .upload_location(self.endpoint, &answer)
                            .await
                            .map_err(Failure::Fatal)?;
                    }
                    let end = answer.header("range").and_then(range_end);
                    match end {
                        Some(end) if end < size && end > offset => {
                            offset = end;
                            resumed = true;
                            continue;
                        }
                        Some(end) if end < size => {
                            return Err(Failure::Session(RegistryError::Reply {
                                request: answer.label(),
                                reason: format!("{size} bytes were sent, {end} arrived"),
                            }));
                        }
                        _ => break,
                    }
                }
                Err(error) => error,
            };
            if offset == 0 && !resumed && is_refusal(&error) {
                return Err(Failure::Refused(error));
            }
            let confused = error.status() == Some(416);
            if !error.is_temporary() && !confused {
                return Err(if resumed || error.is_not_found() {
                    Failure::of_session(error)
                } else {
                    Failure::Fatal(error)
                });
            }
            if !patience.wait_anyway(&error).await {
                return Err(Failure::Fatal(error));
            }
            let Some(arrived) = self.arrived(location).await else {
                return Err(Failure::Session(error));
            };
            if confused && arrived == offset {
                // It does not take what it says it wants.
                return Err(Failure::Session(error));
            }
            if arrived >= offset.saturating_add(PROGRESS_BYTES) {
                patience.renew();
            }
            tracing::debug!(blob = %self.descriptor.digest, offset = arrived, "resuming an upload");
            offset = arrived;
            resumed = true;
        }
        match self.commit(location, false).await {
            Err(Failure::Fatal(error)) if resumed => Err(Failure::of_session(error)),
            result => result,
        }
    }

    async fn patch(
        &self,
        location: &Url,
        offset: u64,
        resumed: bool,
    ) -> Result<Answer, RegistryError> {
        let transport = self.client.transport();
        let mut call =
            transport.call_url(self.endpoint, self.scopes, Method::PATCH, location.clone());
        let size = self.descriptor.size;
        call.headers = body_headers(size - offset);
        // Docker sends none with a whole blob, so some registries expect none then; with
        // a rest it guards against writing at the wrong place.
        if resumed {
            call.headers
                .insert(CONTENT_RANGE, text(&format!("{offset}-{}", size - 1)));
        }
        self.stream(call, offset).await
    }

    /// `PUT location?digest=…`, empty or with the `whole` blob.
    async fn commit(&self, location: &Url, whole: bool) -> Result<(), Failure> {
        let transport = self.client.transport();
        let mut url = location.clone();
        // The registry's own query is signed by some, so it is kept as it is.
        let query = match url.query() {
            Some(query) if !query.is_empty() => {
                format!("{query}&digest={}", self.descriptor.digest)
            }
            _ => format!("digest={}", self.descriptor.digest),
        };
        url.set_query(Some(&query));
        let mut call = transport.call_url(self.endpoint, self.scopes, Method::PUT, url);
        let sent = if whole {
            call.headers = body_headers(self.descriptor.size);
            self.stream(call, 0).await
        } else {
            call.headers = body_headers(0);
            call.limit = Some(transport.http.timing.commit);
            transport.send_once(&call).await
        };
        let answer = sent.map_err(|error| {
            // 404 and 416: the session is gone or holds something else than was thought.
            if error.is_temporary() || matches!(error.status(), Some(404 | 416)) {
                Failure::Session(error)
            } else {
                Failure::Fatal(error)
            }
        })?;
        match content_digest(&answer) {
            Some(got) if got != self.descriptor.digest => {
                Err(Failure::Fatal(RegistryError::Digest {
                    what: format!("what {} stored as a blob", self.endpoint.registry),
                    got,
                    want: self.descriptor.digest.clone(),
                }))
            }
            _ => Ok(()),
        }
    }

    /// How many bytes the registry has, where it can say.
    async fn arrived(&self, location: &mut Url) -> Option<u64> {
        let transport = self.client.transport();
        let call = transport.call_url(self.endpoint, self.scopes, Method::GET, location.clone());
        let answer = transport.send_once(&call).await.ok()?;
        if answer.header("location").is_some() {
            let next = self.client.upload_location(self.endpoint, &answer).await;
            *location = next.ok()?;
        }
        // "0-0" is what registries say of one byte and of none. Taken as none: if it was
        // one, the range of the next PATCH does not fit, and another session is started.
        match range_end(answer.header("range")?)? {
            0 | 1 => Some(0),
            end => Some(end).filter(|end| *end <= self.descriptor.size),
        }
    }

    /// Ends a session that will not be committed, as a courtesy.
    async fn cancel(&self, location: Url) {
        self.client
            .cancel_upload(self.endpoint, self.scopes, location)
            .await;
    }

    /// Sends the bytes from `offset` on as the body of `call`, telling of progress and
    /// watching for standstill.
    async fn stream(&self, mut call: Call<'_>, offset: u64) -> Result<Answer, RegistryError> {
        let sent = Arc::new(AtomicU64::new(0));
        // The HTTP library would wrap an error of the source beyond recognition.
        let fault = Arc::new(Mutex::new(None));
        call.limit = None;
        call.payload = Payload::Stream(self.body(offset, &sent, &fault));
        let label = super::error::request_label(&call.method, &call.url);
        let sending = self.client.transport().send_once(&call);
        let result = self.watch(sending, offset, &sent, &label).await;
        match lock(&fault).take() {
            Some(fault) if result.is_err() => Err(fault),
            _ => result,
        }
    }

    async fn watch(
        &self,
        sending: impl Future<Output = Result<Answer, RegistryError>>,
        offset: u64,
        sent: &AtomicU64,
        label: &str,
    ) -> Result<Answer, RegistryError> {
        tokio::pin!(sending);
        let timing = self.client.transport().http.timing;
        let (mut last, mut since) = (0, Instant::now());
        loop {
            if let Ok(result) = tokio::time::timeout(TICK, &mut sending).await {
                return result;
            }
            let now = sent.load(Ordering::Relaxed);
            // With all sent, the registry may be storing it.
            let limit = if offset + now >= self.descriptor.size {
                timing.commit
            } else {
                timing.upload_idle
            };
            if now != last {
                (last, since) = (now, Instant::now());
                (self.progress)(offset + now);
            } else if since.elapsed() > limit {
                return Err(RegistryError::Timeout {
                    request: label.to_owned(),
                    waiting_for: "uploading",
                    waited: limit,
                });
            }
        }
    }

    fn body(
        &self,
        offset: u64,
        sent: &Arc<AtomicU64>,
        fault: &Arc<Mutex<Option<RegistryError>>>,
    ) -> BodySource {
        let client = self.client.clone();
        let descriptor = self.descriptor.clone();
        let source = self.content.clone();
        let (sent, fault) = (sent.clone(), fault.clone());
        Arc::new(move || {
            let (client, descriptor, source) = (client.clone(), descriptor.clone(), source.clone());
            let (sent, fault) = (sent.clone(), fault.clone());
            Box::pin(async move {
                sent.store(0, Ordering::Relaxed);
                let pieces = open(&client, &descriptor, &source, offset).await?;
                let pieces = pieces.map(move |piece| match piece {
                    Ok(piece) => {
                        sent.fetch_add(piece.len() as u64, Ordering::Relaxed);
                        Ok(piece)
                    }
                    Err(error) => {
                        *lock(&fault) = Some(error);
                        Err(io::Error::other("the blob could not be read"))
                    }
                });
                Ok(reqwest::Body::wrap_stream(pieces))
            })
        })
    }
}

type Pieces = std::pin::Pin<Box<dyn Stream<Item = Result<Bytes, RegistryError>> + Send>>;

/// Exactly the bytes of the blob from `offset` on.
async fn open(
    client: &Client,
    descriptor: &Descriptor,
    source: &Source,
    offset: u64,
) -> Result<Pieces, RegistryError> {
    let size = descriptor.size;
    let wrong_size = |what: String, got| RegistryError::Size {
        what,
        got,
        want: size,
    };
    Ok(match source {
        Source::Bytes(bytes) => {
            if bytes.len() as u64 != size {
                let what = format!("blob {} in memory", descriptor.digest);
                return Err(wrong_size(what, bytes.len() as u64));
            }
            // Both are at most the length of a buffer, so the conversion is exact.
            let rest = bytes.slice(offset as usize..);
            Box::pin(stream::iter(pieces_of(rest).into_iter().map(Ok)))
        }
        Source::Remote(repository) => {
            let chunks = client
                .blob_chunks_from(repository, descriptor, offset)
                .await?;
            Box::pin(chunks.map(|chunk| chunk.map_err(from_io)))
        }
        Source::File(path) => {
            let content = |source| content_error(path, source);
            let mut file = tokio::fs::File::open(path).await.map_err(content)?;
            file.set_max_buf_size(PIECE_BYTES);
            let got = file.metadata().await.map_err(content)?.len();
            if got != size {
                return Err(wrong_size(format!("file {}", path.display()), got));
            }
            file.seek(SeekFrom::Start(offset)).await.map_err(content)?;
            let path = path.clone();
            let pieces = ReaderStream::with_capacity(file.take(size - offset), PIECE_BYTES);
            Box::pin(pieces.map(move |piece| piece.map_err(|e| content_error(&path, e))))
        }
    })
}

/// Memory is handed over in pieces too, so that progress means something.
fn pieces_of(mut bytes: Bytes) -> Vec<Bytes> {
    let mut pieces = Vec::with_capacity(bytes.len() / PIECE_BYTES + 1);
    while !bytes.is_empty() {
        pieces.push(bytes.split_to(PIECE_BYTES.min(bytes.len())));
    }
    pieces
}

fn content_error(path: &Path, source: io::Error) -> RegistryError {
    RegistryError::Content {
        what: path.display().to_string(),
        source,
    }
}

fn body_headers(length: u64) -> HeaderMap {
    HeaderMap::from_iter([
        (
            CONTENT_TYPE,
            HeaderValue::from_static("application/octet-stream"),
        ),
        (CONTENT_LENGTH, HeaderValue::from(length)),
    ])
}

fn text(value: &str) -> HeaderValue {
    HeaderValue::from_str(value).expect("digits and a hyphen are a valid header value")
}

/// Whether a registry says that it takes no PATCH, so that a PUT may do.
fn is_refusal(error: &RegistryError) -> bool {
    match error {
        RegistryError::Status(e) => {
            matches!(e.status, 405 | 411 | 415 | 501)
                || (matches!(e.status, 400 | 404) && e.has_code("UNSUPPORTED"))
        }
        _ => false,
    }
}

/// One past the last byte of `FIRST-LAST`, which some write with a unit before it,
/// and some with -1 as the last byte of nothing.
fn range_end(text: &str) -> Option<u64> {
    let last = text.trim().split_once('-')?.1;
    u64::try_from(last.parse::<i64>().ok()?.checked_add(1)?).ok()
}

impl Client {
    /// Where an upload goes on, from the answer that began or advanced it.
    pub(super) async fn upload_location(
        &self,
        endpoint: &Endpoint,
        answer: &Answer,
    ) -> Result<Url, RegistryError> {
        let location = answer
            .header("location")
            .ok_or_else(|| RegistryError::Reply {
                request: answer.label(),
                reason: format!("status {} without a Location", answer.status().as_u16()),
            })?;
        let origin = self.transport().origin(endpoint).await?;
        self.transport()
            .follow(&origin, answer.method(), &answer.url, location)
    }

    pub(super) async fn cancel_upload(&self, endpoint: &Endpoint, scopes: &Scopes, location: Url) {
        let mut call = self
            .transport()
            .call_url(endpoint, scopes, Method::DELETE, location);
        call.accept = &[StatusCode::NOT_FOUND, StatusCode::METHOD_NOT_ALLOWED];
        if let Err(error) = self.transport().send_once(&call).await {
            tracing::debug!(%error, "an upload session could not be cancelled");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_ends_after_its_last_byte() {
        for (text, expected) in [
            ("0-1023", Some(1024)),
            ("bytes=0-9", Some(10)),
            ("0-0", Some(1)),
            ("0--1", Some(0)),
            ("0--2", None),
            ("0-9223372036854775807", None),
            ("7", None),
            ("", None),
        ] {
            assert_eq!(range_end(text), expected, "{text}");
        }
    }

    #[test]
    fn memory_goes_in_pieces_and_stays_whole() {
        let bytes = Bytes::from(vec![7; PIECE_BYTES * 2 + 1]);
        let lengths: Vec<usize> = pieces_of(bytes).iter().map(Bytes::len).collect();
        assert_eq!(lengths, [PIECE_BYTES, PIECE_BYTES, 1]);
        assert!(pieces_of(Bytes::new()).is_empty());
    }
}
