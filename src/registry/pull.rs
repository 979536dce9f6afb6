//! Reading: manifests, configs and blobs, verified before anybody acts on them.

use std::collections::VecDeque;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use futures_util::stream::{self, Stream};
use reqwest::header::{ACCEPT, HeaderValue, RANGE};
use reqwest::{Method, StatusCode};
use tokio::io::{AsyncRead, AsyncReadExt, ReadBuf};
use tokio_util::io::StreamReader;

use super::address::Endpoint;
use super::auth::Scopes;
use super::http::Patience;
use super::transport::{Answer, Call};
use super::{Client, ConnectionFailure, RegistryError};
use crate::image::{
    CONFIG_LIMIT_BYTES, Descriptor, Digest, Hasher, ImageConfig, MANIFEST_LIMIT_BYTES, Manifest,
    ManifestError, ManifestOrIndex, MediaType, Platform, RawManifest, Reference, Repository,
};

/// Every type that [`RawManifest::parse`] reads.
const MANIFEST_TYPES: &str = "application/vnd.oci.image.index.v1+json, \
    application/vnd.oci.image.manifest.v1+json, \
    application/vnd.docker.distribution.manifest.list.v2+json, \
    application/vnd.docker.distribution.manifest.v2+json";
/// What a connection must bring before it breaks, in bytes, for the retries to start afresh.
const PROGRESS_BYTES: u64 = 1 << 20;

/// An image that a reference means on one platform.
#[derive(Clone, Debug)]
pub struct Resolved {
    /// The reference as asked for.
    pub reference: Reference,
    /// The index through which the platform was chosen, where there was one.
    pub index: Option<RawManifest>,
    /// The image's manifest as it came.
    pub raw: RawManifest,
    /// The same, parsed.
    pub manifest: Manifest,
    /// The image's config; it lists as many diff IDs as the manifest has layers.
    pub config: ImageConfig,
    /// The config's bytes, which its digest belongs to.
    pub config_bytes: Vec<u8>,
}

/// A blob while it comes in.
///
/// Reads as many bytes as its descriptor says, with that digest, or fails: the last bytes
/// are not handed out before all were verified. A broken connection is resumed where it broke.
/// Errors are [`io::Error`]s with a [`RegistryError`] inside.
pub struct BlobStream(StreamReader<Chunks, Bytes>);

type Chunks = Pin<Box<dyn Stream<Item = io::Result<Bytes>> + Send>>;

impl std::fmt::Debug for BlobStream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BlobStream").finish_non_exhaustive()
    }
}

impl AsyncRead for BlobStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buf)
    }
}

impl Client {
    /// Finds what `reference` means on `platform`: its manifest and config, verified.
    ///
    /// Mirrors are asked before the registry. An image without an index is taken whatever
    /// its platform is; the config says which.
    ///
    /// # Errors
    /// Any but [`RegistryError::Content`]; an index without the platform is
    /// [`RegistryError::Manifest`].
    pub async fn resolve(
        &self,
        reference: &Reference,
        platform: &Platform,
    ) -> Result<Resolved, RegistryError> {
        let bad = |error| RegistryError::Manifest {
            reference: reference.to_string(),
            source: Box::new(error),
        };
        let first = self.fetch_manifest(reference).await?;
        let (index, raw, manifest) = match first.parse().map_err(bad)? {
            ManifestOrIndex::Manifest(manifest) => (None, first, manifest),
            ManifestOrIndex::Index(index) => {
                let chosen = index.choose(platform).map_err(bad)?;
                let raw = self.fetch_described(reference, chosen).await?;
                match raw.parse().map_err(bad)? {
                    ManifestOrIndex::Manifest(manifest) => (Some(first), raw, manifest),
                    // The type was checked against the descriptor, and that was chosen by it.
                    ManifestOrIndex::Index(_) => unreachable!("an index of the type of a manifest"),
                }
            }
        };
        let (config, config_bytes) = self.fetch_config(reference, &manifest).await?;
        Ok(Resolved {
            reference: reference.clone(),
            index,
            raw,
            manifest,
            config,
            config_bytes,
        })
    }

    /// Fetches the manifest or index that `reference` names, as it is.
    ///
    /// Its digest is checked against that of the reference, else against the registry's
    /// own word; its type against its content.
    ///
    /// # Errors
    /// Any but [`RegistryError::Config`], [`RegistryError::Size`] and [`RegistryError::Content`].
    pub async fn fetch_manifest(
        &self,
        reference: &Reference,
    ) -> Result<RawManifest, RegistryError> {
        let path = format!("manifests/{}", reference.selector());
        for endpoint in self.sources(reference.repository()) {
            match self.fetch_manifest_from(&endpoint, &path, reference).await {
                Err(error) if self.pass_over(&endpoint, &error) => {}
                result => return result,
            }
        }
        unreachable!("the registry is the last source and is never passed over")
    }

    async fn fetch_manifest_from(
        &self,
        endpoint: &Endpoint,
        path: &str,
        reference: &Reference,
    ) -> Result<RawManifest, RegistryError> {
        let scopes = Scopes::pull(&endpoint.name);
        let mut call = self
            .transport()
            .call(endpoint, &scopes, Method::GET, path)
            .await?;
        call.headers
            .insert(ACCEPT, HeaderValue::from_static(MANIFEST_TYPES));
        let what = format!("the manifest of {reference}");
        let answer = self.ask(&call).await?;
        let label = answer.label();
        let media_type = media_type(&answer).ok_or_else(|| RegistryError::Reply {
            request: label,
            reason: "the answer has no Content-Type".to_owned(),
        })?;
        let said = content_digest(&answer);
        let bytes =
            answer
                .body(MANIFEST_LIMIT_BYTES)
                .await?
                .ok_or_else(|| RegistryError::TooLarge {
                    what: what.clone(),
                    limit_bytes: MANIFEST_LIMIT_BYTES,
                })?;
        let raw = RawManifest::new(media_type, bytes);
        if let Some(want) = reference.digest().cloned().or(said)
            && want != raw.digest
        {
            let got = raw.digest;
            return Err(RegistryError::Digest { what, got, want });
        }
        raw.parse().map_err(|error| RegistryError::Manifest {
            reference: reference.to_string(),
            source: Box::new(error),
        })?;
        Ok(raw)
    }

    /// Fetches the manifest that an index describes.
    async fn fetch_described(
        &self,
        reference: &Reference,
        descriptor: &Descriptor,
    ) -> Result<RawManifest, RegistryError> {
        let pinned = reference.with_digest(descriptor.digest.clone());
        let raw = self.fetch_manifest(&pinned).await?;
        if raw.bytes.len() as u64 != descriptor.size {
            return Err(RegistryError::Size {
                what: format!("the manifest of {pinned}"),
                got: raw.bytes.len() as u64,
                want: descriptor.size,
            });
        }
        if raw.media_type != descriptor.media_type {
            return Err(RegistryError::Manifest {
                reference: pinned.to_string(),
                source: Box::new(ManifestError::TypeMismatch {
                    inside: raw.media_type,
                    outside: descriptor.media_type.clone(),
                }),
            });
        }
        Ok(raw)
    }

    async fn fetch_config(
        &self,
        reference: &Reference,
        manifest: &Manifest,
    ) -> Result<(ImageConfig, Vec<u8>), RegistryError> {
        let bad = |reason: String| RegistryError::Config {
            reference: reference.to_string(),
            reason,
        };
        let descriptor = &manifest.config;
        let media_type = &descriptor.media_type;
        if *media_type != MediaType::CONFIG && *media_type != MediaType::DOCKER_CONFIG {
            return Err(bad(format!(
                "its type is {:?}, so this is no image that can be run",
                media_type.as_str()
            )));
        }
        if descriptor.size > CONFIG_LIMIT_BYTES {
            return Err(RegistryError::TooLarge {
                what: format!("the config of {reference}"),
                limit_bytes: CONFIG_LIMIT_BYTES,
            });
        }
        let mut bytes = Vec::new();
        self.open_blob(reference.repository(), descriptor)
            .await?
            .read_to_end(&mut bytes)
            .await
            .map_err(from_io)?;
        let config = ImageConfig::parse_for(manifest, &bytes).map_err(bad)?;
        Ok((config, bytes))
    }

    /// Starts to download a blob; mirrors are asked before the registry.
    ///
    /// # Errors
    /// Those of the first answer. Later ones come out of the stream.
    pub async fn open_blob(
        &self,
        repository: &Repository,
        descriptor: &Descriptor,
    ) -> Result<BlobStream, RegistryError> {
        let mut download = Download::new(self, repository, descriptor, Some(Hasher::new()), 0);
        download.start().await?;
        Ok(BlobStream(StreamReader::new(download.into_chunks())))
    }

    /// As [`Self::open_blob`] from the byte `offset` on, which leaves the digest
    /// unchecked unless it is 0: for an upload, where the receiver checks it.
    pub(super) async fn blob_chunks_from(
        &self,
        repository: &Repository,
        descriptor: &Descriptor,
        offset: u64,
    ) -> Result<Chunks, RegistryError> {
        let hasher = (offset == 0).then(Hasher::new);
        let mut download = Download::new(self, repository, descriptor, hasher, offset);
        download.start().await?;
        Ok(download.into_chunks())
    }

    /// Whether the registry itself, not a mirror, has the blob in `repository`.
    ///
    /// # Errors
    /// Those of a request; that the blob is not there is none.
    pub async fn has_blob(
        &self,
        repository: &Repository,
        digest: &Digest,
    ) -> Result<bool, RegistryError> {
        let endpoint = self.registry(repository);
        let scopes = Scopes::pull(&endpoint.name);
        self.blob_exists(&endpoint, &scopes, digest).await
    }

    pub(super) async fn blob_exists(
        &self,
        endpoint: &Endpoint,
        scopes: &Scopes,
        digest: &Digest,
    ) -> Result<bool, RegistryError> {
        let path = format!("blobs/{digest}");
        let mut call = self
            .transport()
            .call(endpoint, scopes, Method::HEAD, &path)
            .await?;
        call.accept = &[StatusCode::NOT_FOUND];
        Ok(self.transport().send(&call).await?.status() != StatusCode::NOT_FOUND)
    }

    /// Sends a request; a mirror gets one chance only, because another source follows.
    async fn ask(&self, call: &Call<'_>) -> Result<Answer, RegistryError> {
        if call.endpoint.is_mirror {
            self.transport().send_once(call).await
        } else {
            self.transport().send(call).await
        }
    }
}

/// The registry's error inside an I/O error that came out of a [`BlobStream`].
pub(super) fn from_io(error: io::Error) -> RegistryError {
    match error.downcast::<RegistryError>() {
        Ok(error) => error,
        Err(source) => RegistryError::Content {
            what: "a blob".to_owned(),
            source,
        },
    }
}

/// The registry's error as one that comes out of a reader.
pub(super) fn into_io(error: RegistryError) -> io::Error {
    let kind = match &error {
        RegistryError::Timeout { .. } => io::ErrorKind::TimedOut,
        error if error.is_integrity() => io::ErrorKind::InvalidData,
        _ => io::ErrorKind::Other,
    };
    io::Error::new(kind, error)
}

/// The type without parameters such as `charset`.
fn media_type(answer: &Answer) -> Option<MediaType> {
    let text = answer.header("content-type")?;
    let text = text.split(';').next().unwrap_or_default().trim();
    (!text.is_empty()).then(|| MediaType::new(text))
}

/// What the registry says the digest is, where it says so with an algorithm known here.
pub(super) fn content_digest(answer: &Answer) -> Option<Digest> {
    Digest::parse(answer.header("docker-content-digest")?.trim()).ok()
}

/// The state of a download.
struct Download {
    client: Client,
    descriptor: Descriptor,
    what: String,
    /// Where it can be had, in order; the first is used.
    sources: VecDeque<Endpoint>,
    /// How many bytes are behind us.
    offset: u64,
    /// Absent where the receiver checks the digest.
    hasher: Option<Hasher>,
    /// The answer that is being read, and how many of its bytes are to be passed over.
    answer: Option<(Answer, u64)>,
    patience: Patience,
    /// Where the last connection broke.
    broke_at: u64,
    /// Set when all was handed out or an error was.
    over: bool,
}

impl Download {
    fn new(
        client: &Client,
        repository: &Repository,
        descriptor: &Descriptor,
        hasher: Option<Hasher>,
        offset: u64,
    ) -> Self {
        Self {
            client: client.clone(),
            descriptor: descriptor.clone(),
            what: format!("blob {repository}@{}", descriptor.digest),
            sources: client.sources(repository).into(),
            offset,
            hasher,
            answer: None,
            patience: client.transport().http.patience(),
            broke_at: offset,
            over: false,
        }
    }

    /// Gets the first answer, so that a missing blob is known before anything is read.
    async fn start(&mut self) -> Result<(), RegistryError> {
        // There is nothing to send for in no bytes.
        if self.descriptor.size > self.offset {
            self.answer = Some(self.connect().await?);
        }
        Ok(())
    }

    fn into_chunks(self) -> Chunks {
        Box::pin(stream::try_unfold(self, |mut download| async move {
            let chunk = download.next().await.map_err(into_io)?;
            Ok(chunk.map(|chunk| (chunk, download)))
        }))
    }

    async fn next(&mut self) -> Result<Option<Bytes>, RegistryError> {
        if self.over {
            return Ok(None);
        }
        let size = self.descriptor.size;
        if self.offset >= size {
            self.over = true;
            self.check_digest()?;
            return Ok(None);
        }
        loop {
            let (mut answer, mut skip) = match self.answer.take() {
                Some(current) => current,
                None => match self.connect().await {
                    Ok(current) => current,
                    Err(error) => {
                        self.over = true;
                        return Err(error);
                    }
                },
            };
            let error = match answer.chunk().await {
                Ok(Some(mut chunk)) => {
                    let passed = skip.min(chunk.len() as u64);
                    skip -= passed;
                    // No chunk is longer than memory, so `passed` fits.
                    let chunk = chunk.split_off(passed as usize);
                    let taken = self.take(&chunk, &mut answer).await;
                    self.answer = Some((answer, skip));
                    self.over = taken.is_err() || self.offset == size;
                    taken?;
                    if chunk.is_empty() {
                        continue;
                    }
                    return Ok(Some(chunk));
                }
                Ok(None) => RegistryError::Connection {
                    request: answer.label(),
                    reason: format!("the answer ended after {} of {size} bytes", self.offset),
                    failure: ConnectionFailure::Network,
                    hint: None,
                },
                Err(error) => error,
            };
            drop(answer);
            if let Err(error) = self.broken(error).await {
                self.over = true;
                return Err(error);
            }
        }
    }

    /// Accounts for a piece, and for the whole if this was the last of it.
    async fn take(&mut self, chunk: &Bytes, answer: &mut Answer) -> Result<(), RegistryError> {
        let size = self.descriptor.size;
        let what = self.what.clone();
        let too_long = |got| RegistryError::Size {
            what,
            got,
            want: size,
        };
        let offset = self.offset + chunk.len() as u64;
        if offset > size {
            return Err(too_long(offset));
        }
        if let Some(hasher) = &mut self.hasher {
            hasher.update(chunk);
        }
        self.offset = offset;
        if offset < size {
            return Ok(());
        }
        self.check_digest()?;
        // All is there and right; a failure to end, now, is nobody's concern.
        match answer.chunk().await {
            Ok(Some(more)) if !more.is_empty() => Err(too_long(size + more.len() as u64)),
            _ => Ok(()),
        }
    }

    fn check_digest(&mut self) -> Result<(), RegistryError> {
        let Some(hasher) = self.hasher.take() else {
            return Ok(());
        };
        let got = hasher.finish();
        if got == self.descriptor.digest {
            return Ok(());
        }
        Err(RegistryError::Digest {
            what: self.what.clone(),
            got,
            want: self.descriptor.digest.clone(),
        })
    }

    /// Prepares another attempt after the connection broke, or gives up.
    async fn broken(&mut self, error: RegistryError) -> Result<(), RegistryError> {
        if self.offset - self.broke_at >= PROGRESS_BYTES {
            self.patience.renew();
            self.broke_at = self.offset;
        }
        if self.patience.wait(&error).await {
            tracing::debug!(blob = %self.descriptor.digest, offset = self.offset, "resuming a download");
            return Ok(());
        }
        // The others get their own chance, from where this one ended.
        if self.sources.len() > 1 && self.client.pass_over(&self.sources[0], &error) {
            self.sources.pop_front();
            self.patience.renew();
            return Ok(());
        }
        Err(error)
    }

    /// Asks the sources in order for what is missing, and drops those that do not have it.
    async fn connect(&mut self) -> Result<(Answer, u64), RegistryError> {
        loop {
            let source = self.sources[0].clone();
            match self.connect_to(&source).await {
                Err(error) if self.sources.len() > 1 && self.client.pass_over(&source, &error) => {
                    self.sources.pop_front();
                    self.patience.renew();
                }
                result => return result,
            }
        }
    }

    async fn connect_to(&self, endpoint: &Endpoint) -> Result<(Answer, u64), RegistryError> {
        let scopes = Scopes::pull(&endpoint.name);
        let path = format!("blobs/{}", self.descriptor.digest);
        let mut call = self
            .client
            .transport()
            .call(endpoint, &scopes, Method::GET, &path)
            .await?;
        if self.offset > 0 {
            let range = format!("bytes={}-", self.offset);
            let range = HeaderValue::from_str(&range).expect("digits are a valid header value");
            call.headers.insert(RANGE, range);
        }
        call.accept = &[StatusCode::RANGE_NOT_SATISFIABLE];
        let answer = self.client.ask(&call).await?;
        let size = self.descriptor.size;
        // Where the answer starts in the blob.
        let start = match answer.status() {
            StatusCode::RANGE_NOT_SATISFIABLE => {
                return Err(RegistryError::Size {
                    what: self.what.clone(),
                    got: self.offset,
                    want: size,
                });
            }
            StatusCode::PARTIAL_CONTENT => {
                let start = answer.header("content-range").and_then(range_start);
                if start != Some(self.offset) {
                    return Err(RegistryError::Reply {
                        request: answer.label(),
                        reason: format!(
                            "asked for the bytes from {} on, the answer has the range {:?}",
                            self.offset,
                            answer.header("content-range").unwrap_or_default()
                        ),
                    });
                }
                self.offset
            }
            // Ranges need not be supported.
            _ => 0,
        };
        if let Some(length) = answer.length()
            && start.saturating_add(length) != size
        {
            return Err(RegistryError::Size {
                what: self.what.clone(),
                got: start.saturating_add(length),
                want: size,
            });
        }
        Ok((answer, self.offset - start))
    }
}

/// The first byte of `bytes FIRST-LAST/SIZE`.
fn range_start(text: &str) -> Option<u64> {
    let range = text.trim().strip_prefix("bytes")?.trim_start();
    range.split_once('-')?.0.parse().ok()
}
