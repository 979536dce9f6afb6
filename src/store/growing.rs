//! [`GrowingBlob`]: a blob that is read while it is still being written.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;

use tokio::sync::watch;

use crate::image::Digest;

/// How far a blob is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Growth {
    /// How many bytes can be read.
    pub bytes: u64,
    /// The digest, once all are there and the blob has its name.
    pub digest: Option<Digest>,
}

/// A blob that somebody writes. It stays readable when the store removes it. Clones read
/// independently.
#[derive(Clone, Debug)]
pub struct GrowingBlob {
    file: Arc<File>,
    growth: watch::Receiver<Growth>,
}

/// The writer's end. Dropped before [`Grower::complete`], it says that the blob was given up.
#[derive(Debug)]
pub(super) struct Grower(watch::Sender<Growth>);

/// The blob will never be complete.
#[derive(Clone, Copy, Debug, thiserror::Error, PartialEq, Eq)]
#[error("it was given up before it was complete")]
pub struct GivenUp;

impl Grower {
    pub(super) fn new(file: File) -> (Self, GrowingBlob) {
        let (sender, growth) = watch::channel(Growth::default());
        let file = Arc::new(file);
        (Self(sender), GrowingBlob { file, growth })
    }

    pub(super) fn grow(&self, more_bytes: u64) {
        self.0.send_modify(|growth| growth.bytes += more_bytes);
    }

    pub(super) fn complete(self, digest: Digest, bytes: u64) {
        let digest = Some(digest);
        self.0.send_replace(Growth { bytes, digest });
    }
}

impl GrowingBlob {
    /// How far it is now.
    pub fn growth(&self) -> Growth {
        self.growth.borrow().clone()
    }

    /// Waits until it is complete or has `bytes`, and says how far it is.
    ///
    /// # Errors
    /// [`GivenUp`].
    pub async fn reaches(&self, bytes: u64) -> Result<Growth, GivenUp> {
        let mut growth = self.growth.clone();
        let reached = growth.wait_for(|now| now.digest.is_some() || now.bytes >= bytes);
        let reached = reached.await.map_err(|_| GivenUp)?;
        Ok(reached.clone())
    }

    /// Waits until it is complete, and gives digest and size in bytes.
    ///
    /// # Errors
    /// [`GivenUp`].
    pub async fn completed(&self) -> Result<(Digest, u64), GivenUp> {
        let growth = self.reaches(u64::MAX).await?;
        let digest = growth.digest.ok_or(GivenUp)?;
        Ok((digest, growth.bytes))
    }

    /// Reads from `offset` until `buffer` is full. Blocking.
    ///
    /// # Errors
    /// Those of reading; `UnexpectedEof` where so much is not there yet.
    pub fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(buffer, offset)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;
    use crate::store::Store;

    #[tokio::test]
    async fn a_blob_is_read_while_it_grows_and_after() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let mut writer = store.write_blob().unwrap();
        let growing = writer.follow().unwrap();
        assert_eq!(growing.growth(), Growth::default());
        writer.write_all(b"abc").unwrap();
        assert_eq!(growing.reaches(2).await.unwrap().bytes, 3);
        let mut bytes = [0; 2];
        growing.read_at(1, &mut bytes).unwrap();
        assert_eq!(&bytes, b"bc");
        let early = growing.read_at(2, &mut bytes).unwrap_err();
        assert_eq!(early.kind(), io::ErrorKind::UnexpectedEof);
        writer.write_all(b"d").unwrap();
        let (digest, size) = writer.commit(None).unwrap();
        assert_eq!(growing.completed().await, Ok((digest.clone(), size)));
        assert_eq!(
            growing.reaches(1000).await.unwrap().digest,
            Some(digest.clone())
        );
        std::fs::remove_file(store.blob_path(&digest)).unwrap();
        growing.read_at(2, &mut bytes).unwrap();
        assert_eq!(&bytes, b"cd");

        let mut writer = store.write_blob().unwrap();
        let growing = writer.follow().unwrap();
        drop(writer);
        assert_eq!(growing.completed().await, Err(GivenUp));
        assert_eq!(growing.reaches(1).await, Err(GivenUp));
    }
}
