//! [`guarded`]: decompression that ends where the output is out of proportion.

use std::io::{self, Read};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::{LayerError, Limits};

/// What `decompress` makes of `compressed`, as far as the limits allow: reading more fails with
/// [`LayerError::Limit`] inside of the [`io::Error`].
///
/// # Errors
/// That of `decompress`.
pub(super) fn guarded<R: Read, D: Read>(
    compressed: R,
    limits: &Limits,
    decompress: impl FnOnce(CountingReader<R>) -> Result<D, LayerError>,
) -> Result<Guard<D>, LayerError> {
    let compressed_bytes = Arc::new(AtomicU64::new(0));
    let counted = CountingReader {
        inner: compressed,
        count: Arc::clone(&compressed_bytes),
    };
    Ok(Guard {
        inner: decompress(counted)?,
        compressed_bytes,
        uncompressed_bytes: 0,
        limits: limits.clone(),
    })
}

/// Counts what passes, for somebody else to look at.
pub(super) struct CountingReader<R> {
    inner: R,
    count: Arc<AtomicU64>,
}

impl<R: Read> Read for CountingReader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buffer)?;
        self.count.fetch_add(read as u64, Ordering::Relaxed);
        Ok(read)
    }
}

/// Ends an archive that grows too large while it is decompressed.
pub(super) struct Guard<R> {
    inner: R,
    compressed_bytes: Arc<AtomicU64>,
    uncompressed_bytes: u64,
    limits: Limits,
}

impl<R: Read> Read for Guard<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buffer)?;
        self.uncompressed_bytes += read as u64;
        let limits = &self.limits;
        let too_much = |what, limit| {
            let path = PathBuf::new();
            Err(io::Error::other(LayerError::Limit { what, limit, path }))
        };
        if self.uncompressed_bytes > limits.uncompressed_bytes {
            return too_much("too many uncompressed bytes", limits.uncompressed_bytes);
        }
        let compressed_bytes = self.compressed_bytes.load(Ordering::Relaxed);
        let allowed = compressed_bytes.saturating_mul(limits.ratio);
        if self.uncompressed_bytes > limits.ratio_free_bytes.max(allowed) {
            return too_much(
                "too many uncompressed bytes for each compressed one",
                limits.ratio,
            );
        }
        Ok(read)
    }
}
