//! [`Store`]: what is kept on disk between builds, shared by several processes at once.
//!
//! ```text
//! $SOCKLESS_ROOT
//! ├── version             "2\n"
//! ├── boot.json           in which boot of the machine the store was last used, and when
//! ├── lock                shared while something is looked up, exclusive while something is removed
//! ├── blobs/sha256/<hex>  compressed layers, configs, manifests
//! ├── trees/<hex>/files/  unpacked layers, named by diff ID; info.json beside has what is known
//! ├── trees/<hex>.chain/  those that depend on the layers below, named by chain ID
//! ├── trees/….recorded/   the same, where owners are recorded beside them
//! ├── trees/….unprivileged/  and modes and attributes
//! ├── cache/steps/<definition>/<inputs>.json
//! ├── cache/listings/<hex>  what a layer has without its contents, named by diff ID
//! ├── cache/http/<url>.json  what servers said about files that are blobs now
//! ├── cache/listings/<hex>   what is in a layer, named by diff ID
//! ├── cache/contents/<hex>   what a step read, named by its digest
//! ├── cache/conversions/<name>.json  how a layer was compressed anew
//! ├── cache/stat/<context>   digests of the files of contexts, as long as they stay as they are
//! ├── cache/mounts/<hex>/<number>/  directories of `RUN --mount=type=cache`
//! ├── jobs/               the service's database
//! └── tmp/<random>/       everything unfinished, one locked directory per process
//!     tmp/<random>.holds  what that process uses, locked too
//! ```
//!
//! Whatever has a name outside `tmp/` is complete: it was written to `tmp/` on the
//! same file system and renamed. Nothing is synced, so that holds for the death of a
//! process, not of the machine: a blob that a power loss tore is found by its length
//! when it is looked up and by its digest when it is read, and a tree that may be torn is
//! removed (`boot.rs`). A process that
//! dies leaves its directory in `tmp/`, whose lock the kernel released with it; the
//! next `open` removes it. It is the directory itself that is locked: a lock file could be
//! the first thing that an interrupted removal takes away, and nobody would finish it.
//!
//! # Use
//!
//! Every look-up ([`Store::has_blob_of`], [`Store::open_blob`], [`Store::find_tree`],
//! [`Store::touch`]) records when it was: as the access time of the blob's or record's own
//! file, of a tree's `info.json`, and of a cache mount's `lock`, set by `utimensat(2)`. The
//! modification time of the same file is when the thing was made. No file of its own is
//! written, no index has to be kept, and two processes cannot disagree; mounts with
//! `noatime` make no difference, because the kernel does not choose the time. Reading a
//! file may set it too, which is use. The times inside a tree belong to its layer.
//!
//! What was looked up stays until the process ends or says [`Store::release`]
//! (`hold.rs`). [`Store::prune`] removes the least recently used of the rest.

mod blob;
mod boot;
mod growing;
mod hold;
mod inventory;
mod prune;
mod size;
#[cfg(test)]
mod tests;
mod tree;
mod verify;

use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::confined;
use crate::image::{Descriptor, DiffId, Digest};
use crate::owners;

use boot::Moment;
use hold::Holds;

pub use blob::{BlobReader, BlobWriter};
pub use growing::{GivenUp, GrowingBlob, Growth};
pub use inventory::{Kind, Object};
pub use prune::{PruneOptions, Pruned};
pub use verify::Finding;

/// The layout's version; a store with another one is refused. 2: trees have their files in
/// a directory, and an info file beside it.
const VERSION: &str = "2\n";

/// What the name of a cache mount is followed by in what its directory is called after, where the
/// owners of its files are recorded.
pub const MOUNT_OWNERS_RECORDED: &str = "\nowners recorded";

/// A store, opened by this process.
#[derive(Debug)]
pub struct Store {
    root: PathBuf,
    tmp: PathBuf,
    holds: Holds,
    /// Since the machine was started; see [`Moment::boot`].
    boot: String,
    recorded: Option<owners::Kind>,
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
    #[error("the store {} is of version {found:?}, and this sockless reads version {:?}: another one made it; use that, or give another directory with --root DIR or SOCKLESS_ROOT", root.display(), VERSION.trim_end())]
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
    /// [`StoreError::Version`] for a store of another version, which is left as it is;
    /// [`StoreError::Io`].
    pub fn open(root: &Path) -> Result<Self, StoreError> {
        Self::open_at(root, Moment::now())
    }

    /// [`Store::open`] at a moment in the life of the machine.
    fn open_at(root: &Path, now: Moment) -> Result<Self, StoreError> {
        let is_new = !check_version(root)?;
        for dir in ["blobs/sha256", "trees", "cache/steps", "jobs", "tmp"] {
            let dir = root.join(dir);
            fs::create_dir_all(&dir).map_err(StoreError::io("creating", &dir))?;
        }
        let root = root
            .canonicalize()
            .map_err(StoreError::io("resolving", root))?;
        let (tmp, lock) = own_tmp(&root.join("tmp"))?;
        let store = Self {
            holds: Holds::new(&root, &tmp)?,
            root,
            tmp,
            boot: now.boot.clone(),
            recorded: None,
            _lock: lock,
        };
        if is_new {
            store.write_file(&store.root.join("version"), VERSION.as_bytes())?;
        }
        let last = Moment::read(&store.boot_path());
        if last.as_ref().is_none_or(|last| last.boot != now.boot) {
            store.settle_after_restart(&now, last.as_ref())?;
        }
        store.note_use(&now, last.as_ref())?;
        store.remove_garbage();
        Ok(store)
    }

    /// Opens the store at `root` if there is one.
    ///
    /// # Errors
    /// As [`Store::open`].
    pub fn open_existing(root: &Path) -> Result<Option<Self>, StoreError> {
        if check_version(root)? {
            Self::open(root).map(Some)
        } else {
            Ok(None)
        }
    }

    fn boot_path(&self) -> PathBuf {
        self.root.join("boot.json")
    }

    /// Writes down that the store is in use, unless that was done a moment ago.
    fn note_use(&self, now: &Moment, last: Option<&Moment>) -> Result<(), StoreError> {
        let is_known = last.is_some_and(|last| {
            last.boot == now.boot
                && now.seconds < last.seconds.saturating_add(boot::EXACTNESS_SECONDS)
        });
        if is_known {
            return Ok(());
        }
        let bytes = serde_json::to_vec(now).expect("a moment has only string keys");
        self.write_file(&self.boot_path(), &bytes)
    }

    /// The store's directory.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// This process's directory for unfinished things; on the same file system as the rest.
    pub fn tmp(&self) -> &Path {
        &self.tmp
    }

    /// Makes a directory with a name of its own in [`Store::tmp`]. Where this store records owners,
    /// it does so of what will be in it.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn tmp_dir(&self, prefix: &str) -> Result<PathBuf, StoreError> {
        tempfile::Builder::new()
            .prefix(prefix)
            .tempdir_in(&self.tmp)
            .map(tempfile::TempDir::keep)
            .and_then(|dir| {
                if let Some(kind) = self.recorded {
                    owners::record(&dir, kind)?;
                }
                Ok(dir)
            })
            .map_err(StoreError::io("creating a directory in", &self.tmp))
    }

    /// Records the owners of files, and perhaps more, instead of giving files away, which whoever has
    /// a single ID cannot do. Trees of one kind are of no use to the others, and have other names.
    #[must_use]
    pub fn recording(mut self, kind: owners::Kind) -> Self {
        self.recorded = Some(kind);
        self
    }

    /// Whether owners of files are recorded.
    pub fn records_owners(&self) -> bool {
        self.recorded.is_some()
    }

    /// Where the blob `digest` is, or would be.
    pub fn blob_path(&self, digest: &Digest) -> PathBuf {
        self.root.join("blobs/sha256").join(digest.hex())
    }

    /// Whether the blob is here. Then it stays until this process ends.
    pub fn has_blob(&self, digest: &Digest) -> bool {
        self.look_up_blob(digest, |_| true)
    }

    /// Whether the blob is here, and as long as `descriptor` says: after a crash of the
    /// machine it may not be. Then it stays until this process ends.
    pub fn has_blob_of(&self, descriptor: &Descriptor) -> bool {
        self.look_up_blob(&descriptor.digest, |bytes| bytes == descriptor.size)
    }

    fn look_up_blob(&self, digest: &Digest, is_long_enough: impl Fn(u64) -> bool) -> bool {
        let path = self.blob_path(digest);
        let look_up = || {
            let mut looking = self.holds.look()?;
            let found = fs::metadata(&path);
            if !found.is_ok_and(|found| found.is_file() && is_long_enough(found.len())) {
                return Ok(false);
            }
            looking.hold(&blob_name(digest))?;
            inventory::touch(&path);
            Ok::<_, StoreError>(true)
        };
        look_up().unwrap_or_else(|error| {
            // As good as not there: it could disappear before it is used.
            let error = causes(&error);
            tracing::warn!(%digest, error, "a blob in the store cannot be used");
            false
        })
    }

    /// Records that the record at `path` (below the root) was used now.
    pub fn touch(&self, path: &Path) {
        inventory::touch(path);
    }

    /// Does `work` while nothing is removed from the store. It has to be short: whoever
    /// removes waits for it. It must not look anything else up.
    ///
    /// # Errors
    /// Those of `work`; [`StoreError::Io`].
    pub fn while_nothing_is_removed<T, E: From<StoreError>>(
        &self,
        work: impl FnOnce() -> Result<T, E>,
    ) -> Result<T, E> {
        let _looking = self.holds.look()?;
        work()
    }

    /// Lets go of everything that was looked up: what is used from now on has to be
    /// looked up again.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn release(&self) -> Result<(), StoreError> {
        self.holds.release()
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

    /// Where the list of what a step read is, or would be; by its digest.
    pub fn content_path(&self, digest: &Digest) -> PathBuf {
        self.root.join("cache/contents").join(digest.hex())
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
        let mut file = self.unnamed_file(path, bytes)?;
        let mut attempts = 0;
        loop {
            if let Some(parent) = path.parent() {
                fs::create_dir_all(parent).map_err(StoreError::io("creating", parent))?;
            }
            match file.persist(path) {
                Ok(_) => return Ok(()),
                // Whoever prunes has just found the directory empty.
                Err(error) if error.error.kind() == io::ErrorKind::NotFound && attempts < 10 => {
                    file = error.file;
                    attempts += 1;
                }
                Err(error) => return Err(StoreError::io("naming", path)(error.error)),
            }
        }
    }

    /// Replaces the file `name` in `dir`, keeping its times. Where `dir` was removed
    /// meanwhile, there is nothing to replace.
    fn replace_in(&self, dir: &Path, name: &str, bytes: &[u8]) -> Result<(), StoreError> {
        let path = dir.join(name);
        let file = self.unnamed_file(&path, bytes)?;
        if let Ok(found) = fs::symlink_metadata(&path) {
            inventory::copy_times(&found, file.as_file())
                .map_err(StoreError::io("writing", &path))?;
        }
        match file.persist(&path) {
            Err(error) if error.error.kind() != io::ErrorKind::NotFound => {
                Err(StoreError::io("naming", &path)(error.error))
            }
            _ => Ok(()),
        }
    }

    /// A file in `tmp/` with what `path` is going to have.
    fn unnamed_file(
        &self,
        path: &Path,
        bytes: &[u8],
    ) -> Result<tempfile::NamedTempFile, StoreError> {
        use io::Write;
        let mut file = tempfile::NamedTempFile::new_in(&self.tmp)
            .map_err(StoreError::io("creating a file in", &self.tmp))?;
        file.write_all(bytes)
            .map_err(StoreError::io("writing", path))?;
        Ok(file)
    }

    /// Removes what is in `tmp/` and whose owner is dead. Failures are left for the next
    /// time; gives what is left, with why.
    fn remove_garbage(&self) -> Vec<(PathBuf, io::Error)> {
        let mut left = Vec::new();
        let tmp = self.root.join("tmp");
        let entries = match fs::read_dir(&tmp) {
            Ok(entries) => entries,
            Err(error) => return vec![(tmp, error)],
        };
        let mut has_holds = false;
        for dir in entries
            .flatten()
            .map(|e| e.path())
            .filter(|p| *p != self.tmp)
        {
            if hold::is_holds(&dir) {
                has_holds |= File::open(&dir).is_ok_and(|file| file.try_lock().is_ok());
                continue;
            }
            let removed = match File::open(&dir) {
                Err(error) => Err(error),
                Ok(lock) => match lock.try_lock() {
                    Ok(()) if dir.is_dir() => remove_tree(&dir),
                    Ok(()) => fs::remove_file(&dir),
                    Err(TryLockError::WouldBlock) => Ok(()),
                    Err(TryLockError::Error(error)) => Err(error),
                },
            };
            match removed {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    tracing::debug!(dir = %dir.display(), %error, "garbage stays");
                    left.push((dir, error));
                }
                _ => {}
            }
        }
        if has_holds {
            // Under the lock under which they are made and locked.
            let removed = self.holds.remove().and_then(|removing| removing.held(&tmp));
            if let Err(error) = removed {
                tracing::debug!(error = causes(&error), "garbage stays");
            }
        }
        left
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        let last = Moment::read(&self.boot_path());
        let now = Moment {
            seconds: Moment::now().seconds,
            boot: self.boot.clone(),
        };
        if let Err(error) = self.note_use(&now, last.as_ref()) {
            tracing::debug!(error = causes(&error), "the use of the store is not noted");
        }
        if let Err(error) = remove_tree(&self.tmp) {
            tracing::debug!(dir = %self.tmp.display(), %error, "tmp stays for the next build to remove");
        }
    }
}

/// An error and its causes on one line, for the log.
fn causes(error: &StoreError) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(inner) = cause {
        text = format!("{text}: {inner}");
        cause = inner.source();
    }
    text
}

/// What names a blob for [`hold`].
fn blob_name(digest: &Digest) -> String {
    format!("blob {}", digest.hex())
}

/// Removes `dir` and everything in it, never what is mounted there.
///
/// # Errors
/// Those of [`confined::remove_tree`].
pub fn remove_tree(dir: &Path) -> io::Result<()> {
    confined::remove_tree(dir)
}

/// Whether there is a store at `root`, of this version; false where there is none.
fn check_version(root: &Path) -> Result<bool, StoreError> {
    let path = root.join("version");
    match fs::read_to_string(&path) {
        Ok(found) if found == VERSION => Ok(true),
        Ok(found) => Err(StoreError::Version {
            root: root.to_owned(),
            found: found.trim_end().to_owned(),
        }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(StoreError::io("reading", &path)(error)),
    }
}

/// Asks the file system to put what is made in `dir` each to another place on the disk.
///
/// ext4 otherwise makes a tree where the last one was, and there looks at every inode that was
/// removed within the last minutes before it takes a free one: where a store was just removed or
/// pruned, unpacking Debian took 6 s rather than 0.5. Others have no such flag, and no need.
fn spread(dir: &File) {
    use rustix::fs::IFlags;
    let flags = rustix::fs::ioctl_getflags(dir);
    let _ = flags.and_then(|flags| rustix::fs::ioctl_setflags(dir, flags | IFlags::TOPDIR));
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
            Ok(()) if dir.exists() => {
                spread(&lock);
                return Ok((dir, lock));
            }
            Ok(()) | Err(TryLockError::WouldBlock) => {}
            Err(TryLockError::Error(error)) => {
                return Err(StoreError::io("locking", &dir)(error));
            }
        }
    }
}
