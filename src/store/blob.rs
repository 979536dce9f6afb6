//! Blobs: files named by the digest of their bytes.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;

use super::growing::{Grower, GrowingBlob};
use super::{Store, StoreError, blob_name, inventory};
use crate::image::{Digest, Hasher};
use crate::io::HashingWriter;

/// Writes a blob whose digest is known when all is written, or known before and checked.
///
/// Dropped without `commit`, it leaves nothing.
#[derive(Debug)]
pub struct BlobWriter<'s> {
    store: &'s Store,
    out: HashingWriter<NamedTempFile>,
    grower: Option<Grower>,
}

/// Reads a blob and checks its digest; the check fails at the end of the bytes, and
/// then the blob is removed, so that the next build fetches or makes it again.
#[derive(Debug)]
pub struct BlobReader {
    file: File,
    path: PathBuf,
    hasher: Option<Hasher>,
    want: Digest,
    size: u64,
}

impl Store {
    /// Starts a blob.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn write_blob(&self) -> Result<BlobWriter<'_>, StoreError> {
        let file = NamedTempFile::new_in(self.tmp())
            .map_err(StoreError::io("creating a file in", self.tmp()))?;
        Ok(BlobWriter {
            store: self,
            out: HashingWriter::new(file),
            grower: None,
        })
    }

    /// Stores `bytes` and returns their digest.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn put_blob(&self, bytes: &[u8]) -> Result<Digest, StoreError> {
        let mut writer = self.write_blob()?;
        writer
            .write_all(bytes)
            .map_err(StoreError::io("writing a blob in", self.tmp()))?;
        Ok(writer.commit(None)?.0)
    }

    /// Opens a blob for reading with verification. It stays until this process ends.
    ///
    /// # Errors
    /// [`StoreError::Io`]; a blob that is not there is `NotFound`.
    pub fn open_blob(&self, digest: &Digest) -> Result<BlobReader, StoreError> {
        let path = self.blob_path(digest);
        let open = |path: &Path| {
            let file = File::open(path)?;
            let size = file.metadata()?.len();
            Ok((file, size))
        };
        let (file, size) = {
            let mut looking = self.holds.look()?;
            let opened = open(&path).map_err(StoreError::io("opening", &path))?;
            looking.hold(&blob_name(digest))?;
            inventory::touch(&path);
            opened
        };
        Ok(BlobReader {
            file,
            path,
            hasher: Some(Hasher::new()),
            want: digest.clone(),
            size,
        })
    }

    /// Whether the blob is here and what its name says; one that is not is removed.
    ///
    /// # Errors
    /// [`StoreError::Io`]; a blob that is not there is `NotFound`.
    pub fn verify_blob(&self, digest: &Digest) -> Result<bool, StoreError> {
        let mut reader = self.open_blob(digest)?;
        match io::copy(&mut reader, &mut io::sink()) {
            Ok(_) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::InvalidData => Ok(false),
            Err(error) => Err(StoreError::io("reading", &self.blob_path(digest))(error)),
        }
    }
}

impl BlobWriter<'_> {
    /// What is written from now on, for who wants it before it is complete.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn follow(&mut self) -> Result<GrowingBlob, StoreError> {
        let file = self.out.get_ref().reopen();
        let file = file.map_err(StoreError::io("opening", self.out.get_ref().path()))?;
        let (grower, growing) = Grower::new(file);
        self.grower = Some(grower);
        Ok(growing)
    }

    /// Names the blob by its digest and returns that and the size in bytes. It stays until
    /// this process ends.
    ///
    /// # Errors
    /// [`StoreError::Damaged`] where `want` is given and is not the digest;
    /// [`StoreError::Io`]. Either way nothing is left.
    pub fn commit(self, want: Option<&Digest>) -> Result<(Digest, u64), StoreError> {
        let (file, got, size) = self.out.finish();
        if let Some(want) = want
            && *want != got
        {
            return Err(StoreError::Damaged {
                got,
                want: want.clone(),
            });
        }
        let path = self.store.blob_path(&got);
        let mut looking = self.store.holds.look()?;
        looking.hold(&blob_name(&got))?;
        file.persist(&path)
            .map_err(|e| StoreError::io("naming", &path)(e.error))?;
        if let Some(grower) = self.grower {
            grower.complete(got.clone(), size);
        }
        Ok((got, size))
    }
}

impl Write for BlobWriter<'_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let written = self.out.write(buf)?;
        if let Some(grower) = &self.grower {
            grower.grow(written as u64);
        }
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

impl BlobReader {
    /// The number of bytes.
    pub fn size(&self) -> u64 {
        self.size
    }
}

impl Read for BlobReader {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let read = self.file.read(buf)?;
        if read > 0 {
            if let Some(hasher) = &mut self.hasher {
                hasher.update(&buf[..read]);
            }
        } else if !buf.is_empty()
            && let Some(hasher) = self.hasher.take()
        {
            let got = hasher.finish();
            if got != self.want {
                if let Err(error) = std::fs::remove_file(&self.path) {
                    tracing::warn!(path = %self.path.display(), %error, "a damaged blob stays");
                }
                let error = StoreError::Removed {
                    got,
                    want: self.want.clone(),
                };
                return Err(io::Error::new(io::ErrorKind::InvalidData, error));
            }
        }
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::{Descriptor, MediaType};

    #[test]
    fn a_blob_is_named_by_its_bytes_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let digest = store.put_blob(b"abc").unwrap();
        assert_eq!(digest, Digest::of(b"abc"));
        let mut reader = store.open_blob(&digest).unwrap();
        assert_eq!(reader.size(), 3);
        assert_eq!(io::read_to_string(&mut reader).unwrap(), "abc");

        let mut writer = store.write_blob().unwrap();
        writer.write_all(b"abd").unwrap();
        let error = writer.commit(Some(&digest)).unwrap_err();
        assert!(matches!(error, StoreError::Damaged { .. }), "{error}");
        drop(store.write_blob().unwrap());
        assert_eq!(
            std::fs::read_dir(dir.path().join("blobs/sha256"))
                .unwrap()
                .count(),
            1
        );
        assert_eq!(std::fs::read_dir(store.tmp()).unwrap().count(), 0);
    }

    #[test]
    fn security_s17_a_damaged_blob_is_an_error_at_its_end_and_removed() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let digest = store.put_blob(b"abc").unwrap();
        std::fs::write(store.blob_path(&digest), "abX").unwrap();
        let error = io::read_to_string(store.open_blob(&digest).unwrap()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        assert!(!store.has_blob(&digest));

        let digest = store.put_blob(b"abc").unwrap();
        assert!(store.verify_blob(&digest).unwrap());
        std::fs::write(store.blob_path(&digest), "abX").unwrap();
        assert!(!store.verify_blob(&digest).unwrap());
        assert!(store.verify_blob(&digest).is_err(), "it is gone");
    }

    #[test]
    fn a_blob_of_another_length_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let digest = store.put_blob(b"abc").unwrap();
        let of = |size| Descriptor::new(MediaType::LAYER_GZIP, digest.clone(), size);
        assert!(store.has_blob_of(&of(3)));
        assert!(!store.has_blob_of(&of(4)));
        std::fs::remove_file(store.blob_path(&digest)).unwrap();
        assert!(!store.has_blob_of(&of(3)));
    }
}
