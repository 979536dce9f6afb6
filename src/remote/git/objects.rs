//! [`Objects`]: the pack that a server sent, checked and indexed.

use std::cell::RefCell;
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};

use gix_hash::ObjectId;
use gix_object::{CommitRefIter, Kind, TagRefIter};

use super::error::GitError;
use super::packet::PackReader;
use super::watch::Watch;
use super::{Limits, io_error};

/// The most threads that resolve deltas.
const THREADS: usize = 4;
/// How many tags may be tags of tags.
const TAG_DEPTH: usize = 16;
/// Bytes of a pack's header: signature, version, number of objects.
const HEADER_BYTES: usize = 12;

/// Objects by their names. Every object's name was computed from its bytes.
pub(super) struct Objects {
    bundle: gix_pack::Bundle,
    hash: gix_hash::Kind,
    remote: String,
    inflate: RefCell<gix_zlib::Inflate>,
    /// The pack's file.
    pub(super) pack: PathBuf,
    /// Its index's file.
    pub(super) index: PathBuf,
}

/// What of a commit matters here.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct CommitObject {
    /// Its hash.
    pub(super) id: ObjectId,
    /// The root of its files.
    pub(super) tree: ObjectId,
    /// Whether it has a history.
    pub(super) has_parents: bool,
    /// When it was committed, in seconds since 1970.
    pub(super) time: i64,
}

impl Objects {
    /// Takes a pack into `directory`.
    ///
    /// # Errors
    /// [`GitError::Object`] where it is damaged, [`GitError::Limit`].
    pub(super) fn receive(
        pack: &mut PackReader<'_, '_>,
        directory: &Path,
        hash: gix_hash::Kind,
        remote: &str,
        limits: &Limits,
        watch: &Watch,
    ) -> Result<Self, GitError> {
        let limit = |what: &str, limit: String| GitError::Limit {
            remote: remote.to_owned(),
            what: what.to_owned(),
            limit,
        };
        let damaged = |reason: String| GitError::Object {
            remote: remote.to_owned(),
            object: "the pack".to_owned(),
            reason,
        };
        let mut header = [0; HEADER_BYTES];
        pack.read_exact(&mut header)
            .map_err(|error| damaged(error.to_string()))?;
        let count = u32::from_be_bytes([header[8], header[9], header[10], header[11]]);
        if count > limits.objects {
            return Err(limit(
                &format!("the number of objects ({count})"),
                limits.objects.to_string(),
            ));
        }
        let mut counted = (&header[..]).chain(Counted {
            inner: pack,
            left: limits.pack_bytes,
            over: false,
        });
        let options = gix_pack::bundle::write::Options {
            thread_limit: Some(THREADS),
            alloc_limit_bytes: Some(usize::try_from(limits.object_bytes).unwrap_or(usize::MAX)),
            ..Default::default()
        };
        let written = gix_pack::Bundle::write_to_directory(
            &mut BufReader::with_capacity(64 << 10, &mut counted),
            Some(directory),
            &mut gix_utils::progress::Discard,
            watch.flag(),
            None::<gix_object::find::Never>,
            hash,
            options,
        );
        let counted = counted.into_inner().1;
        watch.check(remote)?;
        if counted.over {
            return Err(limit("the pack", format!("{} bytes", limits.pack_bytes)));
        }
        if let Some(failure) = counted.inner.failure.take() {
            return Err(failure);
        }
        let written = written.map_err(|error| damaged(causes(&error)))?;
        // What follows the pack's checksum is the end of the answer, or noise.
        std::io::copy(counted.inner, &mut std::io::sink())
            .map_err(|error| damaged(error.to_string()))?;
        let (Some(pack), Some(index)) = (written.data_path, written.index_path) else {
            return Err(damaged("it is empty".to_owned()));
        };
        let bundle = gix_pack::Bundle::at(&index, hash).map_err(|e| damaged(causes(&e)))?;
        let gix_pack::Bundle {
            pack: data,
            index: names,
        } = bundle;
        let bundle = gix_pack::Bundle {
            pack: data.with_alloc_limit_bytes(options_limit(limits)),
            index: names,
        };
        Ok(Self {
            bundle,
            hash,
            remote: remote.to_owned(),
            inflate: RefCell::default(),
            pack,
            index,
        })
    }

    pub(super) fn hash(&self) -> gix_hash::Kind {
        self.hash
    }

    pub(super) fn contains(&self, id: &ObjectId) -> bool {
        self.bundle.index.lookup(id).is_some()
    }

    pub(super) fn damaged(&self, id: &ObjectId, reason: impl Into<String>) -> GitError {
        GitError::Object {
            remote: self.remote.clone(),
            object: format!("object {id}"),
            reason: reason.into(),
        }
    }

    /// An object and what it is.
    ///
    /// # Errors
    /// [`GitError::Object`].
    pub(super) fn read(&self, id: &ObjectId) -> Result<(Kind, Vec<u8>), GitError> {
        let mut bytes = Vec::new();
        let kind = {
            let mut inflate = self.inflate.borrow_mut();
            let found = self
                .bundle
                .find(id, &mut bytes, &mut inflate, &mut gix_pack::cache::Never)
                .map_err(|error| self.damaged(id, causes(&error)))?;
            match found {
                Some((data, _)) => data.kind,
                None => return Err(self.damaged(id, "the server did not send it")),
            }
        };
        Ok((kind, bytes))
    }

    /// An object that must be a `kind`.
    ///
    /// # Errors
    /// [`GitError::Object`].
    pub(super) fn read_as(&self, id: &ObjectId, kind: Kind) -> Result<Vec<u8>, GitError> {
        match self.read(id)? {
            (found, bytes) if found == kind => Ok(bytes),
            (found, _) => Err(self.damaged(id, format!("it is a {found}, and no {kind}"))),
        }
    }

    /// The commit that `id` is, or that the annotated tag `id` names in the end.
    ///
    /// # Errors
    /// [`GitError::Object`].
    pub(super) fn commit(&self, id: &ObjectId) -> Result<CommitObject, GitError> {
        let mut id = *id;
        for _ in 0..TAG_DEPTH {
            let (kind, bytes) = self.read(&id)?;
            let fail = |error: &dyn std::fmt::Display| self.damaged(&id, causes(error));
            match kind {
                Kind::Tag => {
                    id = TagRefIter::from_bytes(&bytes, self.hash)
                        .target_id()
                        .map_err(|error| fail(&error))?;
                }
                Kind::Commit => {
                    let mut commit = CommitRefIter::from_bytes(&bytes, self.hash);
                    let tree = commit.tree_id().map_err(|error| fail(&error))?;
                    let commit = CommitRefIter::from_bytes(&bytes, self.hash);
                    let time = commit.committer().map_err(|error| fail(&error))?.seconds();
                    return Ok(CommitObject {
                        id,
                        tree,
                        has_parents: commit.parent_ids().next().is_some(),
                        time,
                    });
                }
                Kind::Tree | Kind::Blob => {
                    return Err(self.damaged(&id, format!("it is a {kind}, and no commit")));
                }
            }
        }
        Err(self.damaged(&id, "it is a tag of too many tags"))
    }

    /// Copies pack and index into `directory`, as git names them.
    ///
    /// # Errors
    /// [`GitError::Io`].
    pub(super) fn copy_to(&self, directory: &Path) -> Result<(), GitError> {
        for file in [&self.pack, &self.index] {
            let name = file.file_name().unwrap_or_default();
            let target = directory.join(name);
            std::fs::copy(file, &target).map_err(io_error("copying the pack to", &target))?;
            let mode = std::os::unix::fs::PermissionsExt::from_mode(0o444);
            std::fs::set_permissions(&target, mode)
                .map_err(io_error("setting the mode of", &target))?;
        }
        Ok(())
    }
}

fn options_limit(limits: &Limits) -> Option<usize> {
    Some(usize::try_from(limits.object_bytes).unwrap_or(usize::MAX))
}

/// An error with its causes, in one line.
pub(super) fn causes(error: &dyn std::fmt::Display) -> String {
    super::error::shown(error.to_string().as_bytes())
}

/// Reads no more than a number of bytes.
struct Counted<'a, 'p, 'r> {
    inner: &'a mut PackReader<'p, 'r>,
    left: u64,
    over: bool,
}

impl Read for Counted<'_, '_, '_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let count = self.inner.read(buffer)?;
        match self.left.checked_sub(count as u64) {
            Some(left) => {
                self.left = left;
                Ok(count)
            }
            None => {
                self.over = true;
                Err(std::io::Error::other("the pack is over its limit"))
            }
        }
    }
}
