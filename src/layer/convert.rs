//! [`convert()`]: a layer's blob → the same layer, compressed otherwise.
//!
//! What came of it is remembered in the store by diff ID, because the tar and the way of
//! compressing decide the bytes.
//!
//! ```text
//! cache/conversions/<version>-<diff ID>-<compression>.json    a descriptor
//! ```

use std::io;
use std::path::PathBuf;

use super::compress::Compressor;
use super::{Compression, LayerError, Limits, Pool, Stoppable, decompress};
use crate::image::{Descriptor, DiffId};
use crate::io::{HashingReader, LimitedReader};
use crate::store::{Store, StoreError};

/// Counts up when the same tar comes to give other bytes.
const VERSION: u32 = 2;

/// How much is copied at once.
const BUFFER_BYTES: usize = 256 << 10;

/// What [`convert()`] has made of the layer before, if that is still in the store.
pub fn converted(diff_id: &DiffId, compression: Compression, store: &Store) -> Option<Descriptor> {
    let bytes = std::fs::read(record_path(diff_id, compression, store)).ok()?;
    let descriptor: Descriptor = serde_json::from_slice(&bytes).ok()?;
    let is_it = descriptor.media_type == compression.media_type();
    (is_it && store.has_blob_of(&descriptor)).then_some(descriptor)
}

/// Compresses the tar of a layer, whose blob is in the store, in another way. Blocking.
///
/// `is_stopped` is asked now and then, and ends it.
///
/// # Errors
/// [`LayerError::MediaType`], [`LayerError::Read`] where the blob is no layer or damaged;
/// [`LayerError::DiffId`] where it is another layer; [`LayerError::Write`], also where it was
/// stopped; [`LayerError::Store`].
pub fn convert(
    blob: &Descriptor,
    diff_id: &DiffId,
    compression: Compression,
    pool: &Pool,
    is_stopped: &(dyn Fn() -> bool + Sync),
    store: &Store,
) -> Result<Descriptor, LayerError> {
    if let Some(known) = converted(diff_id, compression, store) {
        return Ok(known);
    }
    let limit = Limits::default().uncompressed_bytes;
    let tar = decompress(&blob.media_type, store.open_blob(&blob.digest)?)?;
    let mut tar = HashingReader::new(LimitedReader::new(tar, limit, "the layer"));
    let out = store.write_blob()?;
    let out = std::thread::scope(|scope| {
        let inner = Compressor::new(scope, compression, pool, out).map_err(LayerError::Write)?;
        let mut out = Stoppable { inner, is_stopped };
        copy(&mut tar, &mut out)?;
        out.inner.finish().map_err(LayerError::Write)
    })?;
    let (_, got, _) = tar.finish();
    if got != *diff_id.digest() {
        return Err(LayerError::DiffId {
            got: DiffId::from_uncompressed(got),
            want: diff_id.clone(),
        });
    }
    let (digest, size) = out.commit(None)?;
    let descriptor = Descriptor::new(compression.media_type(), digest, size);
    let record = serde_json::to_vec(&descriptor).expect("a descriptor has only string keys");
    store.write_file(&record_path(diff_id, compression, store), &record)?;
    Ok(descriptor)
}

/// As [`io::copy`], but says which of the two failed.
fn copy(from: &mut impl io::Read, to: &mut impl io::Write) -> Result<(), LayerError> {
    let mut buffer = vec![0; BUFFER_BYTES];
    loop {
        let read = match from.read(&mut buffer) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(read_error(error)),
            Ok(0) => return Ok(()),
            Ok(read) => read,
        };
        to.write_all(&buffer[..read]).map_err(LayerError::Write)?;
    }
}

/// A damaged blob is the store's error, and says what to do.
fn read_error(error: io::Error) -> LayerError {
    match error.downcast::<StoreError>() {
        Ok(damaged) => LayerError::Store(damaged),
        Err(error) => LayerError::Read(error),
    }
}

fn record_path(diff_id: &DiffId, compression: Compression, store: &Store) -> PathBuf {
    let hex = diff_id.digest().hex();
    let how = match compression {
        Compression::Gzip { level } => format!("gzip-{level}"),
        Compression::Zstd { level } => format!("zstd-{level}"),
        Compression::None => "tar".to_owned(),
    };
    let name = format!("{VERSION}-{hex}-{how}.json");
    store.root().join("cache/conversions").join(name)
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};

    use super::*;
    use crate::image::{Digest, MediaType};

    #[test]
    fn a_layer_is_converted_once_and_stays_the_same_layer() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let pool = Pool::shared().unwrap();
        let tar: Vec<u8> = (0..3_000_000_u32).map(|n| (n / 7 % 251) as u8).collect();
        let diff_id = DiffId::from_uncompressed(Digest::of(&tar));
        let digest = store.put_blob(&tar).unwrap();
        let mut blob = Descriptor::new(MediaType::LAYER_TAR, digest, tar.len() as u64);
        let run = |blob: &Descriptor, diff_id: &DiffId, compression| {
            convert(blob, diff_id, compression, &pool, &|| false, &store)
        };
        // There and back, each from what the last one made.
        for compression in [Compression::ZSTD, Compression::GZIP, Compression::None] {
            let converted = run(&blob, &diff_id, compression).unwrap();
            assert_eq!(converted.media_type, compression.media_type());
            let stored = store.open_blob(&converted.digest).unwrap();
            let mut back = Vec::new();
            let mut reader = decompress(&converted.media_type, stored).unwrap();
            reader.read_to_end(&mut back).unwrap();
            assert!(back == tar, "{compression:?}");
            blob = converted;
        }
        // Remembered: the blob that it would be made of is not looked at.
        let gone = Descriptor::of(MediaType::LAYER_TAR, b"gone");
        let again = run(&gone, &diff_id, Compression::ZSTD).unwrap();
        assert_eq!(
            Some(&again),
            converted(&diff_id, Compression::ZSTD, &store).as_ref()
        );
        std::fs::remove_file(store.blob_path(&again.digest)).unwrap();
        assert_eq!(converted(&diff_id, Compression::ZSTD, &store), None);
        assert!(run(&gone, &diff_id, Compression::ZSTD).is_err());

        let blobs = || {
            std::fs::read_dir(dir.path().join("blobs/sha256"))
                .unwrap()
                .count()
        };
        let before = blobs();
        let other = DiffId::from_uncompressed(Digest::of(b"other"));
        let error = run(&blob, &other, Compression::ZSTD).unwrap_err();
        assert!(matches!(error, LayerError::DiffId { .. }), "{error}");
        let stopped = convert(&blob, &diff_id, Compression::ZSTD, &pool, &|| true, &store);
        assert!(matches!(stopped, Err(LayerError::Write(_))));
        assert_eq!(blobs(), before);
        assert_eq!(std::fs::read_dir(store.tmp()).unwrap().count(), 0);

        let mut damaged = std::fs::File::create(store.blob_path(&blob.digest)).unwrap();
        damaged.write_all(&tar[1..]).unwrap();
        let error = run(&blob, &diff_id, Compression::Zstd { level: 1 }).unwrap_err();
        assert!(
            matches!(error, LayerError::Store(StoreError::Removed { .. })),
            "{error:?}"
        );
    }
}
