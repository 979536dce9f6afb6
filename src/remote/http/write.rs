//! The bytes of one file → a blob: decompressed, limited, checked.

use std::io::{self, Write};

use bytes::Bytes;
use sha2::{Digest as _, Sha384, Sha512};
use thiserror::Error;
use tokio::sync::mpsc;

use super::{Algorithm, Checksum, HttpError};
use crate::image::Digest;
use crate::store::{BlobWriter, Store, StoreError};

/// What goes to the thread that writes.
pub(super) enum Piece {
    Bytes(Bytes),
    /// All came: name the blob.
    End,
}

/// Writes one file; on a thread of its own, because disks block.
pub(super) struct Writer {
    /// Where the bytes come from, for messages.
    pub(super) request: String,
    /// What is fetched, for messages.
    pub(super) url: String,
    pub(super) limit_bytes: Option<u64>,
    pub(super) checksum: Option<Checksum>,
    pub(super) gzip: bool,
    /// How many bytes the server announced, for the message about a full disk.
    pub(super) expected: Option<u64>,
}

impl Writer {
    /// Writes what comes until the end, checks it, and names the blob; its digest and size.
    pub(super) fn write(
        self,
        store: &Store,
        mut pieces: mpsc::Receiver<Piece>,
    ) -> Result<(Digest, u64), HttpError> {
        let out = Out {
            blob: store
                .write_blob()
                .map_err(|error| self.store_error(error))?,
            written: 0,
            limit_bytes: self.limit_bytes,
            second: Second::of(self.checksum.as_ref()),
        };
        let mut out = if self.gzip {
            Stage::Gzip(Box::new(flate2::write::MultiGzDecoder::new(out)))
        } else {
            Stage::Plain(Box::new(out))
        };
        loop {
            match pieces.blocking_recv() {
                Some(Piece::Bytes(bytes)) => out
                    .write_all(&bytes)
                    .map_err(|error| self.write_error(store, error))?,
                Some(Piece::End) => break,
                // Whoever sent the pieces has given up and does not listen.
                None => {
                    return Err(HttpError::Url {
                        url: self.url,
                        reason: "the download was abandoned",
                    });
                }
            }
        }
        let out = match out {
            Stage::Plain(out) => *out,
            Stage::Gzip(decoder) => decoder
                .finish()
                .map_err(|error| self.write_error(store, error))?,
        };
        let mismatch = |got: String, want: &Checksum| HttpError::Checksum {
            url: self.url.clone(),
            got,
            want: want.text.clone(),
        };
        if let (Some(second), Some(want)) = (out.second, &self.checksum) {
            let got = second.finish();
            if got != want.text {
                return Err(mismatch(got, want));
            }
        }
        let want = self.checksum.as_ref().and_then(Checksum::blob);
        match (out.blob.commit(want.as_ref()), &self.checksum) {
            (Err(StoreError::Damaged { got, .. }), Some(want)) => {
                Err(mismatch(got.to_string(), want))
            }
            (result, _) => result.map_err(|error| self.store_error(error)),
        }
    }

    fn store_error(&self, source: StoreError) -> HttpError {
        let url = match self.expected {
            Some(bytes) if !self.gzip => format!("{} ({bytes} bytes)", self.url),
            _ => self.url.clone(),
        };
        HttpError::Store { url, source }
    }

    /// Tells what went wrong with the disk, with the limit and with the compressed stream.
    fn write_error(&self, store: &Store, error: io::Error) -> HttpError {
        match error.downcast::<OutError>() {
            Ok(OutError::TooLarge(limit_bytes)) => HttpError::TooLarge {
                url: self.url.clone(),
                limit_bytes,
            },
            Ok(OutError::Disk(error)) => {
                self.store_error(StoreError::io("writing a blob in", store.tmp())(error))
            }
            Err(source) => HttpError::Decode {
                request: self.request.clone(),
                source,
            },
        }
    }
}

/// What bytes go through.
enum Stage<'s> {
    Plain(Box<Out<'s>>),
    Gzip(Box<flate2::write::MultiGzDecoder<Out<'s>>>),
}

impl Stage<'_> {
    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::Plain(out) => out.write_all(bytes),
            Self::Gzip(decoder) => decoder.write_all(bytes),
        }
    }
}

/// The file's own bytes on their way to the disk.
struct Out<'s> {
    blob: BlobWriter<'s>,
    written: u64,
    limit_bytes: Option<u64>,
    second: Option<Second>,
}

/// What cannot be told from a decoder's error by its kind.
#[derive(Debug, Error)]
enum OutError {
    #[error("the file is larger than {0} bytes")]
    TooLarge(u64),
    #[error(transparent)]
    Disk(io::Error),
}

impl Write for Out<'_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let written = self
            .blob
            .write(buf)
            .map_err(|error| io::Error::other(OutError::Disk(error)))?;
        self.written += written as u64;
        if let Some(limit) = self.limit_bytes
            && self.written > limit
        {
            return Err(io::Error::other(OutError::TooLarge(limit)));
        }
        if let Some(second) = &mut self.second {
            second.update(&buf[..written]);
        }
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.blob.flush()
    }
}

/// A checksum of another algorithm than the store's.
enum Second {
    Sha384(Sha384),
    Sha512(Sha512),
}

impl Second {
    fn of(checksum: Option<&Checksum>) -> Option<Self> {
        match checksum?.algorithm {
            Algorithm::Sha256 => None,
            Algorithm::Sha384 => Some(Self::Sha384(Sha384::new())),
            Algorithm::Sha512 => Some(Self::Sha512(Sha512::new())),
        }
    }

    fn update(&mut self, bytes: &[u8]) {
        match self {
            Self::Sha384(hasher) => hasher.update(bytes),
            Self::Sha512(hasher) => hasher.update(bytes),
        }
    }

    fn finish(self) -> String {
        let (name, hash) = match self {
            Self::Sha384(hasher) => ("sha384", hasher.finalize().to_vec()),
            Self::Sha512(hasher) => ("sha512", hasher.finalize().to_vec()),
        };
        let hex: String = hash.iter().map(|byte| format!("{byte:02x}")).collect();
        format!("{name}:{hex}")
    }
}
