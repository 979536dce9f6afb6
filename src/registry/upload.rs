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
//! A blob that is still being written ([`GrowingBlob`]) goes up in a PATCH without a length,
//! as Docker's own client sends every layer; after a failure in pieces of what is there, and
//! as a rest like any other once it is complete. Then its digest is known, and where the
//! registry has it already, the session is dropped.
//!
//! A rest is always sent in one piece, so `OCI-Chunk-Min-Length`, which the last chunk
//! need not reach, is kept by construction. The registry checks the digest at the
//! commit; a session that got confused is dropped and another one started.
//!
//! <https://github.com/opencontainers/distribution-spec/blob/main/spec.md#pushing-blobs>

use std::future::Future;
use std::io::{self, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
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
use super::pull::{content_digest, into_io};
use super::transport::{Answer, BodySource, Call, Payload};
use super::{Client, RegistryError, lock};
use crate::image::{Descriptor, Digest, Repository};
use crate::store::{GivenUp, GrowingBlob};

/// How much of a file is read at once, in bytes. Less costs system calls, more memory.
const PIECE_BYTES: usize = 256 << 10;
/// How often progress is told.
const TICK: Duration = Duration::from_millis(100);
/// How long sessions of dropped uploads are cancelled for.
const CANCEL_LIMIT: Duration = Duration::from_secs(5);
/// What a session must take before it breaks, in bytes, for the retries to start afresh.
const PROGRESS_BYTES: u64 = 1 << 20;

/// The least that is sent of a blob that is still being written, after a failure, in bytes:
/// registries that store at Amazon's refuse less than 5 MiB but at the end.
const GROWN_PIECE_BYTES: u64 = 8 << 20;

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
    pub(super) to: &'a Repository,
    pub(super) blob: Blob<'a>,
    /// What [`Client::note_session`] knows it by.
    pub(super) number: u64,
    pub(super) progress: &'a (dyn Fn(u64) + Send + Sync),
}

/// What is known of a blob.
pub(super) enum Blob<'a> {
    /// Everything.
    Known(&'a Descriptor, Source),
    /// It is being written.
    Growing {
        /// Tells digest and size at the end.
        growing: &'a GrowingBlob,
        /// Whether the registry had it when its digest became known.
        was_there: tokio::sync::OnceCell<bool>,
    },
}

/// How an upload ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Uploaded {
    /// It was sent.
    Sent,
    /// It had come there meanwhile.
    AlreadyThere,
    /// The registry takes no blob that is still being written.
    Refused,
}

/// What one PATCH sends.
#[derive(Clone, Copy)]
struct Span {
    from: u64,
    /// Where it ends; absent where that is not known yet.
    end: Option<u64>,
}

/// [`BlobContent`], cheap to clone.
#[derive(Clone, Debug)]
pub(super) enum Source {
    File(PathBuf),
    Remote(Repository),
    Bytes(Bytes),
}

/// What a body is made of, each time anew.
#[derive(Clone)]
enum Body {
    Known(Source, Descriptor),
    Growing(GrowingBlob),
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
    /// None: the registry has it.
    AlreadyThere,
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
    /// Digest and size in bytes, where they are known.
    fn known(&self) -> Option<(Digest, u64)> {
        match &self.blob {
            Blob::Known(descriptor, _) => Some((descriptor.digest.clone(), descriptor.size)),
            Blob::Growing { growing, .. } => {
                let growth = growing.growth();
                growth.digest.map(|digest| (digest, growth.bytes))
            }
        }
    }

    /// For the log.
    fn name(&self) -> String {
        self.known().map_or_else(
            || "being written".to_owned(),
            |(digest, _)| digest.to_string(),
        )
    }

    /// Ends when it is known that a blob that was still being written is not needed.
    async fn found(&self) {
        if let Blob::Growing { growing, was_there } = &self.blob
            && let Ok((digest, _)) = growing.completed().await
            && self.was_there(was_there, &digest).await
        {
            return;
        }
        std::future::pending().await
    }

    /// Asks once; an error is found out by what is sent next.
    async fn was_there(&self, known: &tokio::sync::OnceCell<bool>, digest: &Digest) -> bool {
        let ask = || async {
            let asked = self.client.blob_exists(self.endpoint, self.scopes, digest);
            asked.await.unwrap_or(false)
        };
        *known.get_or_init(ask).await
    }

    /// Uploads, beginning in the session at `location` where there is one already.
    pub(super) async fn run(&self, mut location: Option<Url>) -> Result<Uploaded, RegistryError> {
        let mut patience = self.client.transport().http.patience();
        let mut whole = false;
        loop {
            let session = match location.take() {
                Some(location) => location,
                None => self.start(&mut patience).await?,
            };
            // Both futures need it, and one of them is dropped.
            let session = Mutex::new(session);
            self.note(&session);
            let result = if whole {
                let at = lock(&session).clone();
                self.commit(&at, true).await
            } else {
                tokio::select! {
                    biased;
                    result = self.send_resuming(&session, &mut patience) => result,
                    () = self.found() => Err(Failure::AlreadyThere),
                }
            };
            let at = lock(&session).clone();
            let error = match result {
                Ok(()) => {
                    self.client.forget_session(self.number);
                    if let Some((_, size)) = self.known() {
                        (self.progress)(size);
                    }
                    return Ok(Uploaded::Sent);
                }
                Err(Failure::AlreadyThere) => {
                    self.cancel(at).await;
                    return Ok(Uploaded::AlreadyThere);
                }
                Err(Failure::Refused(error)) => {
                    tracing::debug!(%error, registry = self.endpoint.authority, "uploading in one PUT");
                    self.cancel(at).await;
                    if matches!(self.blob, Blob::Growing { .. }) {
                        return Ok(Uploaded::Refused);
                    }
                    whole = true;
                    continue;
                }
                Err(Failure::Session(error)) => error,
                Err(Failure::Fatal(error)) => {
                    self.cancel(at).await;
                    return Err(error);
                }
            };
            self.cancel(at).await;
            if !patience.wait_anyway(&error).await {
                return Err(error);
            }
            // The answer to a commit that did succeed may be what was lost.
            if let Some((digest, _)) = self.known() {
                let found = self.client.blob_exists(self.endpoint, self.scopes, &digest);
                if found.await.unwrap_or(false) {
                    return Ok(Uploaded::Sent);
                }
            }
        }
    }

    /// Remembers where the session is, for when this upload is dropped.
    fn note(&self, session: &Mutex<Url>) {
        let at = lock(session).clone();
        self.client.note_session(self.number, self.to, at);
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
        session: &Mutex<Url>,
        patience: &mut Patience,
    ) -> Result<(), Failure> {
        let mut offset = 0;
        let mut resumed = false;
        while self.known().is_none_or(|(_, size)| offset < size) {
            let span = self.next_span(offset, resumed).await?;
            let location = lock(session).clone();
            let error = match self.patch(&location, span, resumed).await {
                Ok(answer) => {
                    // Absent: not every registry repeats it, then it is the same one.
                    if answer.header("location").is_some() {
                        let moved = self.client.upload_location(self.endpoint, &answer);
                        *lock(session) = moved.await.map_err(Failure::Fatal)?;
                        self.note(session);
                    }
                    let early = |reason| {
                        Failure::Session(RegistryError::Reply {
                            request: answer.label(),
                            reason,
                        })
                    };
                    // What was sent without an end was sent to the end, which is known now.
                    let Some(sent) = span.end.or(self.known().map(|(_, size)| size)) else {
                        return Err(early("it came before all was sent".to_owned()));
                    };
                    match answer.header("range").and_then(range_end) {
                        Some(arrived) if arrived < sent && arrived > offset => {
                            offset = arrived;
                            resumed = true;
                        }
                        Some(arrived) if arrived < sent => {
                            let reason = format!("{sent} bytes were sent, {arrived} arrived");
                            return Err(early(reason));
                        }
                        _ => offset = sent,
                    }
                    continue;
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
            let Some(arrived) = self.arrived(session).await else {
                return Err(Failure::Session(error));
            };
            if confused && arrived == offset {
                // It does not take what it says it wants.
                return Err(Failure::Session(error));
            }
            if arrived >= offset.saturating_add(PROGRESS_BYTES) {
                patience.renew();
            }
            tracing::debug!(blob = self.name(), offset = arrived, "resuming an upload");
            offset = arrived;
            resumed = true;
        }
        let location = lock(session).clone();
        match self.commit_grown(&location).await {
            Err(Failure::Fatal(error)) if resumed => Err(Failure::of_session(error)),
            result => result,
        }
    }

    /// What the next PATCH sends.
    async fn next_span(&self, from: u64, resumed: bool) -> Result<Span, Failure> {
        let growing = match &self.blob {
            Blob::Known(descriptor, _) => {
                let end = Some(descriptor.size);
                return Ok(Span { from, end });
            }
            Blob::Growing { growing, .. } => growing,
        };
        let growth = if resumed {
            let least = from.saturating_add(GROWN_PIECE_BYTES);
            let grown = growing.reaches(least).await;
            grown.map_err(|error| Failure::Fatal(given_up(error)))?
        } else {
            growing.growth()
        };
        let is_open = growth.digest.is_none() && !resumed;
        let end = (!is_open).then_some(growth.bytes);
        Ok(Span { from, end })
    }

    async fn patch(
        &self,
        location: &Url,
        span: Span,
        resumed: bool,
    ) -> Result<Answer, RegistryError> {
        let transport = self.client.transport();
        let mut call =
            transport.call_url(self.endpoint, self.scopes, Method::PATCH, location.clone());
        call.headers = body_headers(span.end.map(|end| end - span.from));
        // Docker sends none with a whole blob, so some registries expect none then; with
        // a rest it guards against writing at the wrong place.
        if resumed && let Some(end) = span.end {
            let range = format!("{}-{}", span.from, end.saturating_sub(1));
            call.headers.insert(CONTENT_RANGE, text(&range));
        }
        self.stream(call, span).await
    }

    /// Commits, unless what was still being written turned out to be there already, or another
    /// layer of this build to have the same bytes.
    async fn commit_grown(&self, location: &Url) -> Result<(), Failure> {
        let (Blob::Growing { was_there, .. }, Some((digest, _))) = (&self.blob, self.known())
        else {
            return self.commit(location, false).await;
        };
        let slot = self.client.push_slot(self.to, &digest);
        let mut done = slot.lock().await;
        if *done || self.was_there(was_there, &digest).await {
            *done = true;
            return Err(Failure::AlreadyThere);
        }
        self.commit(location, false).await?;
        *done = true;
        Ok(())
    }

    /// `PUT location?digest=…`, empty or with the `whole` blob.
    async fn commit(&self, location: &Url, whole: bool) -> Result<(), Failure> {
        let transport = self.client.transport();
        let Some((digest, size)) = self.known() else {
            let error = RegistryError::Reply {
                request: format!("PUT {}", self.endpoint.registry),
                reason: "the blob is not complete".to_owned(),
            };
            return Err(Failure::Fatal(error));
        };
        let mut url = location.clone();
        // The registry's own query is signed by some, so it is kept as it is.
        let query = match url.query() {
            Some(query) if !query.is_empty() => {
                format!("{query}&digest={digest}")
            }
            _ => format!("digest={digest}"),
        };
        url.set_query(Some(&query));
        let mut call = transport.call_url(self.endpoint, self.scopes, Method::PUT, url);
        let sent = if whole {
            call.headers = body_headers(Some(size));
            let span = Span {
                from: 0,
                end: Some(size),
            };
            self.stream(call, span).await
        } else {
            call.headers = body_headers(Some(0));
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
            Some(got) if got != digest => Err(Failure::Fatal(RegistryError::Digest {
                what: format!("what {} stored as a blob", self.endpoint.registry),
                got,
                want: digest,
            })),
            _ => Ok(()),
        }
    }

    /// How many bytes the registry has, where it can say.
    async fn arrived(&self, session: &Mutex<Url>) -> Option<u64> {
        let transport = self.client.transport();
        let location = lock(session).clone();
        let call = transport.call_url(self.endpoint, self.scopes, Method::GET, location);
        let answer = transport.send_once(&call).await.ok()?;
        if answer.header("location").is_some() {
            let next = self.client.upload_location(self.endpoint, &answer).await;
            *lock(session) = next.ok()?;
            self.note(session);
        }
        let there = match &self.blob {
            Blob::Known(descriptor, _) => descriptor.size,
            Blob::Growing { growing, .. } => growing.growth().bytes,
        };
        // "0-0" is what registries say of one byte and of none. Taken as none: if it was
        // one, the range of the next PATCH does not fit, and another session is started.
        match range_end(answer.header("range")?)? {
            0 | 1 => Some(0),
            end => Some(end).filter(|end| *end <= there),
        }
    }

    /// Ends a session that will not be committed, as a courtesy.
    async fn cancel(&self, location: Url) {
        self.client
            .cancel_upload(self.endpoint, self.scopes, location)
            .await;
        self.client.forget_session(self.number);
    }

    /// Sends the bytes of `span` as the body of `call`, telling of progress and watching for
    /// standstill.
    async fn stream(&self, mut call: Call<'_>, span: Span) -> Result<Answer, RegistryError> {
        let sent = Arc::new(AtomicU64::new(0));
        // The HTTP library would wrap an error of the source beyond recognition.
        let fault = Arc::new(Mutex::new(None));
        call.limit = None;
        let starved = Arc::new(AtomicBool::new(false));
        call.payload = Payload::Stream(self.body(span, &sent, &fault, &starved));
        let label = super::error::request_label(&call.method, &call.url);
        let sending = self.client.transport().send_once(&call);
        let result = self.watch(sending, span, (&sent, &starved), &label).await;
        match lock(&fault).take() {
            Some(fault) if result.is_err() => Err(fault),
            _ => result,
        }
    }

    async fn watch(
        &self,
        sending: impl Future<Output = Result<Answer, RegistryError>>,
        span: Span,
        (sent, starved): (&AtomicU64, &AtomicBool),
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
            let end = span.end.or(self.known().map(|(_, size)| size));
            let limit = if end.is_some_and(|end| span.from + now >= end) {
                timing.commit
            } else {
                timing.upload_idle
            };
            if now != last {
                (last, since) = (now, Instant::now());
                (self.progress)(span.from + now);
            } else if starved.load(Ordering::Relaxed) {
                // Not the registry is slow, but whoever writes the blob.
                since = Instant::now();
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
        span: Span,
        sent: &Arc<AtomicU64>,
        fault: &Arc<Mutex<Option<RegistryError>>>,
        starved: &Arc<AtomicBool>,
    ) -> BodySource {
        let client = self.client.clone();
        let body = match &self.blob {
            Blob::Known(descriptor, source) => Body::Known(source.clone(), (*descriptor).clone()),
            Blob::Growing { growing, .. } => Body::Growing((*growing).clone()),
        };
        let (sent, fault, starved) = (sent.clone(), fault.clone(), starved.clone());
        Arc::new(move || {
            let (client, body) = (client.clone(), body.clone());
            let (sent, fault, starved) = (sent.clone(), fault.clone(), starved.clone());
            Box::pin(async move {
                sent.store(0, Ordering::Relaxed);
                let pieces = match &body {
                    Body::Growing(growing) => follow(growing.clone(), span, starved),
                    Body::Known(source, descriptor) => {
                        open(&client, descriptor, source, span.from).await?
                    }
                };
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

/// The bytes of `span` of a blob that is still being written, as they come; `starved` says
/// whether they are waited for.
fn follow(growing: GrowingBlob, span: Span, starved: Arc<AtomicBool>) -> Pieces {
    let end = span.end.unwrap_or(u64::MAX);
    Box::pin(stream::try_unfold(span.from, move |at| {
        let (growing, starved) = (growing.clone(), starved.clone());
        async move {
            if at >= end {
                return Ok(None);
            }
            let wanted = at.saturating_add(PIECE_BYTES as u64).min(end);
            starved.store(true, Ordering::Relaxed);
            let growth = growing.reaches(wanted).await;
            starved.store(false, Ordering::Relaxed);
            let there = growth.map_err(given_up)?.bytes.min(wanted);
            let Some(length) = there.checked_sub(at).filter(|length| *length > 0) else {
                return Ok(None);
            };
            // At most the size of a piece, so the conversion is exact.
            let mut piece = vec![0; length as usize];
            let read = tokio::task::spawn_blocking(move || {
                growing.read_at(at, &mut piece)?;
                io::Result::Ok(Bytes::from(piece))
            });
            let piece = read.await.map_err(io::Error::other).flatten();
            let piece = piece.map_err(|source| RegistryError::Content {
                what: GROWING.to_owned(),
                source,
            })?;
            Ok(Some((piece, there)))
        }
    }))
}

/// What errors call a blob that has no name yet.
const GROWING: &str = "a layer that is being written";

fn given_up(error: GivenUp) -> RegistryError {
    RegistryError::Content {
        what: GROWING.to_owned(),
        source: io::Error::other(error),
    }
}

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
            // Of the source, and not of where it goes.
            let what = format!("blob {} of {repository}", descriptor.digest);
            let content = move |source| RegistryError::Content {
                what: what.clone(),
                source,
            };
            let chunks = client.blob_chunks_from(repository, descriptor, offset);
            let chunks = chunks.await.map_err(|error| content(into_io(error)))?;
            Box::pin(chunks.map(move |chunk| chunk.map_err(&content)))
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

fn body_headers(length: Option<u64>) -> HeaderMap {
    let octets = HeaderValue::from_static("application/octet-stream");
    let mut headers = HeaderMap::from_iter([(CONTENT_TYPE, octets)]);
    headers.extend(length.map(|length| (CONTENT_LENGTH, HeaderValue::from(length))));
    headers
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

    /// A number for an upload.
    pub(super) fn new_upload(&self) -> u64 {
        self.0.last_upload.fetch_add(1, Ordering::Relaxed)
    }

    /// Remembers where an upload's session is.
    fn note_session(&self, number: u64, to: &Repository, location: Url) {
        lock(&self.0.sessions).insert(number, (to.clone(), location));
    }

    /// Forgets a session that was committed or cancelled.
    fn forget_session(&self, number: u64) {
        lock(&self.0.sessions).remove(&number);
    }

    /// Cancels the sessions of uploads that were dropped on the way, as a courtesy: it takes a
    /// few seconds at most and says nothing of failures.
    pub async fn cancel_dropped_uploads(&self) {
        let sessions = std::mem::take(&mut *lock(&self.0.sessions));
        let cancelling = sessions.into_values().map(|(to, location)| async move {
            let endpoint = self.registry(&to);
            let scopes = Scopes::push(&endpoint.name);
            self.cancel_upload(&endpoint, &scopes, location).await;
        });
        let all = futures_util::future::join_all(cancelling);
        if tokio::time::timeout(CANCEL_LIMIT, all).await.is_err() {
            tracing::debug!("the registry did not cancel all uploads in time");
        }
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
