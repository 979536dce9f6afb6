//! [`Store`]: what is kept on disk between builds, shared by several processes at once.
//!
//! ```text
//! $SOCKLESS_ROOT
//! ├── version             "1\n"
//! ├── blobs/sha256/<hex>  compressed layers, configs, manifests
//! ├── trees/<hex>/        unpacked layers, named by diff ID
//! ├── trees/<hex>.chain/  those that depend on the layers below, named by chain ID
//! ├── cache/steps/<definition>/<inputs>.json
//! ├── cache/listings/<hex>  what a layer has without its contents, named by diff ID
//! ├── cache/http/<url>.json  what servers said about files that are blobs now
//! ├── cache/stat/<context>   digests of the files of contexts, as long as they stay as they are
//! ├── jobs/               the service's database
//! └── tmp/<random>/       everything unfinished, one locked directory per process
//! ```
//!
//! Whatever has a name outside `tmp/` is complete: it was written to `tmp/` on the
//! same file system and renamed. Nothing is synced, so that holds for the death of a
//! process, not of the machine: a blob that a power loss tore is found by its length
//! when it is looked up and by its digest when it is read. A process that
//! dies leaves its directory in `tmp/`, whose lock the kernel released with it; the
//! next `open` removes it. It is the directory itself that is locked: a lock file could be
//! the first thing that an interrupted removal takes away, and nobody would finish it.

mod blob;
mod growing;

use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::confined;
use crate::image::{Descriptor, DiffId, Digest};

pub use blob::{BlobReader, BlobWriter};
pub use growing::{GivenUp, GrowingBlob, Growth};

/// The layout's version; a store with another one is refused.
const VERSION: &str = "1\n";

/// A store, opened by this process.
#[derive(Debug)]
pub struct Store {
    root: PathBuf,
    tmp: PathBuf,
    /// Held as long as the store is open; says that `tmp` is in use.
    _lock: File,
}

/// What can go wrong with a store.
#[derive(Debug, Error)]
pub enum StoreError {
    /// A file operation failed.
    #[error("{action} {}", path.display())]
    Io {
        /// Such as `creating`.
        action: &'static str,
        /// What it was done to.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The store was made by another version of sockless.
    #[error("the store {} has version {found:?}, this sockless reads {VERSION:?}; use another --root or remove it", root.display())]
    Version {
        /// The store.
        root: PathBuf,
        /// What its version file says.
        found: String,
    },
    /// What should become a blob is not what it was announced as.
    #[error("the bytes of the blob are damaged: got {got}, want {want}")]
    Damaged {
        /// Digest of the bytes there.
        got: Digest,
        /// The digest announced.
        want: Digest,
    },
    /// A blob in the store was not what its name says.
    #[error(
        "the blob {want} in the store was damaged (its bytes were {got}) and has been removed; run the build again, which fetches or makes it anew"
    )]
    Removed {
        /// Digest of the bytes that were there.
        got: Digest,
        /// Its name.
        want: Digest,
    },
}

impl StoreError {
    /// Wraps an I/O error with what was attempted.
    pub fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io {
            action,
            path,
            source,
        }
    }
}

impl Store {
    /// Opens the store at `root`, makes it where there is none, and removes what
    /// dead processes left in `tmp/`.
    ///
    /// # Errors
    /// [`StoreError::Version`] for a store of another version; [`StoreError::Io`].
    pub fn open(root: &Path) -> Result<Self, StoreError> {
        for dir in ["blobs/sha256", "trees", "cache/steps", "jobs", "tmp"] {
            let dir = root.join(dir);
            fs::create_dir_all(&dir).map_err(StoreError::io("creating", &dir))?;
        }
        let root = root
            .canonicalize()
            .map_err(StoreError::io("resolving", root))?;
        check_version(&root)?;
        let (tmp, lock) = own_tmp(&root.join("tmp"))?;
        let store = Self {
            root,
            tmp,
            _lock: lock,
        };
        store.remove_garbage();
        Ok(store)
    }

    /// The store's directory.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// This process's directory for unfinished things; on the same file system as the rest.
    pub fn tmp(&self) -> &Path {
        &self.tmp
    }

    /// Makes a directory with a name of its own in [`Store::tmp`].
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn tmp_dir(&self, prefix: &str) -> Result<PathBuf, StoreError> {
        tempfile::Builder::new()
            .prefix(prefix)
            .tempdir_in(&self.tmp)
            .map(tempfile::TempDir::keep)
            .map_err(StoreError::io("creating a directory in", &self.tmp))
    }

    /// Where the blob `digest` is, or would be.
    pub fn blob_path(&self, digest: &Digest) -> PathBuf {
        self.root.join("blobs/sha256").join(digest.hex())
    }

    /// Whether the blob is here.
    pub fn has_blob(&self, digest: &Digest) -> bool {
        self.blob_path(digest).is_file()
    }

    /// Whether the blob is here, and as long as `descriptor` says: after a crash of the
    /// machine it may not be.
    pub fn has_blob_of(&self, descriptor: &Descriptor) -> bool {
        let found = fs::metadata(self.blob_path(&descriptor.digest));
        found.is_ok_and(|found| found.is_file() && found.len() == descriptor.size)
    }

    /// Where the tree of the layer `diff_id` is, or would be.
    pub fn tree_path(&self, diff_id: &DiffId) -> PathBuf {
        self.root.join("trees").join(diff_id.digest().hex())
    }

    /// Whether the layer's tree is here.
    pub fn has_tree(&self, diff_id: &DiffId) -> bool {
        self.tree_path(diff_id).is_dir()
    }

    /// Where the tree of the topmost layer of `chain` is, or would be, if that layer cannot
    /// be unpacked without those below it, or if the tree has more than the layer: what a
    /// step left as it was below.
    pub fn chained_tree_path(&self, chain: &Digest) -> PathBuf {
        self.root
            .join("trees")
            .join(format!("{}.chain", chain.hex()))
    }

    /// Gives the complete directory `from` (in [`Store::tmp`]) its name as the tree of `diff_id`.
    ///
    /// Where another process was faster, its tree stays, and `from` until the store is dropped.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn adopt_tree(&self, from: &Path, diff_id: &DiffId) -> Result<PathBuf, StoreError> {
        self.adopt(from, self.tree_path(diff_id))
    }

    /// Like [`Store::adopt_tree`], for [`Store::chained_tree_path`].
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn adopt_chained_tree(&self, from: &Path, chain: &Digest) -> Result<PathBuf, StoreError> {
        self.adopt(from, self.chained_tree_path(chain))
    }

    fn adopt(&self, from: &Path, to: PathBuf) -> Result<PathBuf, StoreError> {
        match fs::rename(from, &to) {
            Ok(()) => Ok(to),
            Err(error)
                if matches!(
                    error.raw_os_error(),
                    Some(libc_errno::EEXIST | libc_errno::ENOTEMPTY)
                ) =>
            {
                // An identical tree is there. An open overlay may still use `from`,
                // which goes on working: removed files live as long as they are open,
                // but directory entries do not, so leave it to the end of the process.
                Ok(to)
            }
            Err(error) => Err(StoreError::io("naming the tree", &to)(error)),
        }
    }

    /// Where the listing of the layer `diff_id` is, or would be.
    pub fn listing_path(&self, diff_id: &DiffId) -> PathBuf {
        let listings = self.root.join("cache/listings");
        listings.join(diff_id.digest().hex())
    }

    /// Where step records live.
    pub fn steps_path(&self) -> PathBuf {
        self.root.join("cache/steps")
    }

    /// Where the directories of cache mounts live.
    pub fn cache_mounts_path(&self) -> PathBuf {
        self.root.join("cache/mounts")
    }

    /// Where is remembered what came from URLs.
    pub fn http_path(&self) -> PathBuf {
        self.root.join("cache/http")
    }

    /// Where digests of the files of contexts live.
    pub fn stat_cache_path(&self) -> PathBuf {
        self.root.join("cache/stat")
    }

    /// Where the service keeps its database.
    pub fn jobs_path(&self) -> PathBuf {
        self.root.join("jobs")
    }

    /// Writes `bytes` as the file `path` (below the root) in one atomic step.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn write_file(&self, path: &Path, bytes: &[u8]) -> Result<(), StoreError> {
        use io::Write;
        let mut file = tempfile::NamedTempFile::new_in(&self.tmp)
            .map_err(StoreError::io("creating a file in", &self.tmp))?;
        file.write_all(bytes)
            .map_err(StoreError::io("writing", path))?;
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).map_err(StoreError::io("creating", parent))?;
        }
        file.persist(path)
            .map_err(|e| StoreError::io("naming", path)(e.error))?;
        Ok(())
    }

    /// Removes directories in `tmp/` whose owner is dead. Failures are left for the next time.
    fn remove_garbage(&self) {
        let Ok(entries) = fs::read_dir(self.root.join("tmp")) else {
            return;
        };
        for dir in entries
            .flatten()
            .map(|e| e.path())
            .filter(|p| *p != self.tmp)
        {
            let Ok(lock) = File::open(&dir) else {
                continue;
            };
            match lock.try_lock() {
                Ok(()) => {
                    if let Err(error) = remove_tree(&dir) {
                        tracing::debug!(dir = %dir.display(), %error, "garbage stays");
                    }
                }
                Err(TryLockError::WouldBlock) => {}
                Err(TryLockError::Error(error)) => {
                    tracing::debug!(dir = %dir.display(), %error, "cannot test the lock");
                }
            }
        }
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        if let Err(error) = remove_tree(&self.tmp) {
            tracing::debug!(dir = %self.tmp.display(), %error, "tmp stays for the next build to remove");
        }
    }
}

/// Removes `dir` and everything in it, never what is mounted there.
///
/// # Errors
/// Those of [`confined::remove_tree`].
pub fn remove_tree(dir: &Path) -> io::Result<()> {
    confined::remove_tree(dir)
}

fn check_version(root: &Path) -> Result<(), StoreError> {
    let path = root.join("version");
    match fs::read_to_string(&path) {
        Ok(found) if found == VERSION => Ok(()),
        Ok(found) => Err(StoreError::Version {
            root: root.to_owned(),
            found,
        }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let tmp = tempfile::NamedTempFile::new_in(root)
                .map_err(StoreError::io("creating a file in", root))?;
            fs::write(tmp.path(), VERSION).map_err(StoreError::io("writing", &path))?;
            tmp.persist(&path)
                .map_err(|e| StoreError::io("naming", &path)(e.error))?;
            Ok(())
        }
        Err(error) => Err(StoreError::io("reading", &path)(error)),
    }
}

/// Makes a locked directory. Another process may take it for garbage between its
/// creation and its lock; then it is gone and the next try makes another.
fn own_tmp(parent: &Path) -> Result<(PathBuf, File), StoreError> {
    loop {
        let dir = tempfile::Builder::new()
            .prefix("build-")
            .tempdir_in(parent)
            .map_err(StoreError::io("creating a directory in", parent))?
            .keep();
        let lock = match File::open(&dir) {
            Ok(lock) => lock,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(StoreError::io("opening", &dir)(error)),
        };
        match lock.try_lock() {
            Ok(()) if dir.exists() => return Ok((dir, lock)),
            Ok(()) | Err(TryLockError::WouldBlock) => {}
            Err(TryLockError::Error(error)) => {
                return Err(StoreError::io("locking", &dir)(error));
            }
        }
    }
}

/// The two numbers for "there is something there" of `rename(2)`; `io::ErrorKind` splits them.
mod libc_errno {
    pub(super) const EEXIST: i32 = rustix::io::Errno::EXIST.raw_os_error();
    pub(super) const ENOTEMPTY: i32 = rustix::io::Errno::NOTEMPTY.raw_os_error();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dead_process_leaves_nothing_and_a_live_one_keeps_its_things() {
        let dir = tempfile::tempdir().unwrap();
        let live = Store::open(dir.path()).unwrap();
        fs::write(live.tmp().join("half"), "x").unwrap();
        let dead = dir.path().join("tmp/build-dead");
        fs::create_dir_all(dead.join("sub")).unwrap();

        let second = Store::open(dir.path()).unwrap();
        assert!(!dead.exists());
        assert!(live.tmp().join("half").exists());
        let tmp = live.tmp().to_owned();
        drop(live);
        assert!(!tmp.exists());
        drop(second);
        assert_eq!(fs::read_dir(dir.path().join("tmp")).unwrap().count(), 0);
    }

    #[test]
    fn a_store_of_another_version_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("version"), "99\n").unwrap();
        let error = Store::open(dir.path()).unwrap_err();
        assert!(matches!(error, StoreError::Version { found, .. } if found == "99\n"));
    }

    #[test]
    fn the_first_of_two_identical_trees_stays() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let diff_id = DiffId::from_uncompressed(Digest::of(b"layer"));
        for name in ["first", "second"] {
            let tree = store.tmp_dir("tree-").unwrap();
            fs::write(tree.join(name), "").unwrap();
            assert_eq!(
                store.adopt_tree(&tree, &diff_id).unwrap(),
                store.tree_path(&diff_id)
            );
        }
        assert!(store.tree_path(&diff_id).join("first").exists());
        assert!(!store.tree_path(&diff_id).join("second").exists());
    }
}
