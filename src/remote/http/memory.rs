//! What servers said about files that are blobs now.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::UNIX_EPOCH;

use reqwest::StatusCode;
use reqwest::header::{
    DATE, ETAG, HeaderMap, HeaderValue, IF_MODIFIED_SINCE, IF_NONE_MATCH, LAST_MODIFIED,
};
use serde::{Deserialize, Serialize};
use url::Url;

use super::{Fetched, text};
use crate::image::Digest;
use crate::store::{Store, StoreError};

/// `Last-Modified` tells versions apart only where it was this long ago when it was said,
/// in seconds (RFC 9110, 8.8.2.2).
const SETTLED_SECONDS: i64 = 60;

/// What is remembered of a URL, as it is written to a file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Record {
    version: u32,
    pub(super) digest: Digest,
    size_bytes: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    etag: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    last_modified: Option<String>,
    /// Whether `last_modified` tells this version from all others.
    #[serde(default)]
    settled: bool,
}

impl Record {
    const VERSION: u32 = 1;

    pub(super) fn new(headers: &HeaderMap, digest: Digest, size_bytes: u64) -> Self {
        let last_modified = text(headers, LAST_MODIFIED).map(str::to_owned);
        let modified = last_modified.as_deref().and_then(seconds);
        let said = text(headers, DATE).and_then(seconds);
        Self {
            version: Self::VERSION,
            digest,
            size_bytes,
            etag: text(headers, ETAG).map(str::to_owned),
            settled: matches!((modified, said), (Some(modified), Some(said))
                if modified <= said - SETTLED_SECONDS),
            last_modified,
        }
    }

    pub(super) fn into_fetched(self) -> Fetched {
        Fetched {
            last_modified: self.last_modified.as_deref().and_then(seconds),
            digest: self.digest,
            size_bytes: self.size_bytes,
            from_cache: true,
        }
    }

    /// The question whether the file is still the same.
    pub(super) fn ask(&self, headers: &mut HeaderMap) {
        if let Some(etag) = &self.etag {
            if let Ok(value) = HeaderValue::from_str(etag) {
                headers.insert(IF_NONE_MATCH, value);
            }
        } else if self.settled
            && let Some(date) = &self.last_modified
            && let Ok(value) = HeaderValue::from_str(date)
        {
            headers.insert(IF_MODIFIED_SINCE, value);
        }
    }

    /// Whether the answer `headers` to [`Self::ask`] is about this version. Some servers
    /// send the file again although they give it the same tag; it need not be read.
    pub(super) fn is_same(&self, status: StatusCode, headers: &HeaderMap) -> bool {
        match (&self.etag, text(headers, ETAG)) {
            (Some(ours), Some(theirs)) => strong(ours) == strong(theirs),
            _ => status == StatusCode::NOT_MODIFIED,
        }
    }
}

/// Where the record of one URL is. Whatever fails here, fails silently but for the log.
pub(super) struct Memory {
    store: Arc<Store>,
    path: PathBuf,
}

impl Memory {
    pub(super) fn new(store: &Arc<Store>, url: &Url) -> Self {
        // A hash, because URLs may hold credentials.
        let name = Digest::of(url.as_str().as_bytes());
        Self {
            path: store.http_path().join(format!("{}.json", name.hex())),
            store: store.clone(),
        }
    }

    /// The record, if the blob is still there and whole.
    pub(super) async fn load(&self) -> Option<Record> {
        let (store, path) = (self.store.clone(), self.path.clone());
        let load = move || {
            let record: Record = serde_json::from_slice(&std::fs::read(&path).ok()?).ok()?;
            let whole = record.version == Record::VERSION
                && matches!(store.verify_blob(&record.digest), Ok(true));
            whole.then(|| store.touch(&path))?;
            Some(record)
        };
        tokio::task::spawn_blocking(load).await.ok().flatten()
    }

    pub(super) async fn save(self, record: Record) {
        let save = move || {
            let bytes = serde_json::to_vec(&record).map_err(io::Error::other);
            let bytes = bytes.map_err(StoreError::io("serialising", &self.path))?;
            self.store.write_file(&self.path, &bytes)
        };
        match tokio::task::spawn_blocking(save).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                tracing::warn!(%error, "a fetched file will be fetched again by the next build");
            }
            Err(error) => tracing::warn!(%error, "a fetched file will be fetched again"),
        }
    }
}

/// The tag without what marks it as weak, as BuildKit compares them.
fn strong(etag: &str) -> &str {
    etag.strip_prefix("W/").unwrap_or(etag)
}

/// Seconds since 1970 of an HTTP date.
fn seconds(date: &str) -> Option<i64> {
    let time = httpdate::parse_http_date(date).ok()?;
    let since = time.duration_since(UNIX_EPOCH).ok()?;
    i64::try_from(since.as_secs()).ok()
}
