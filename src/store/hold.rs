//! What running builds use, so that nobody removes it.
//!
//! A build that finds a blob or a tree writes its name into a file of its own in `tmp/`,
//! which it keeps locked. Looking up and writing down happen under a shared lock of the
//! store's `lock` file; whoever removes reads all builds' files and removes under the
//! exclusive lock, so nothing disappears between a look-up and its use. The kernel releases
//! all of these locks with the process, however it ends; a file that nobody locks holds
//! nothing and is garbage.
//!
//! One look-up costs two `flock(2)`, and the first of a name one `write(2)`. The locks are
//! held for microseconds: removing happens in small batches, and only the renaming of it.

use std::collections::BTreeSet;
use std::fs::{self, File, TryLockError};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard};

use super::StoreError;

/// How the files that say what is held end; they lie beside the directories in `tmp/`.
pub(super) const SUFFIX: &str = ".holds";

/// What this process holds, and the lock under which it says so.
#[derive(Debug)]
pub(super) struct Holds {
    path: PathBuf,
    lock_path: PathBuf,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// The store's `lock`.
    lock: File,
    /// This process's file, locked; made with the first thing that is held.
    file: Option<File>,
    held: BTreeSet<String>,
}

/// The shared lock is held: what is found now can be held before it disappears.
pub(super) struct Looking<'h> {
    state: MutexGuard<'h, State>,
    path: &'h Path,
}

/// The exclusive lock is held: no build looks anything up.
pub(super) struct Removing<'h> {
    state: MutexGuard<'h, State>,
}

impl Holds {
    /// For the process whose directory is `tmp`.
    pub(super) fn new(root: &Path, tmp: &Path) -> Result<Self, StoreError> {
        let lock_path = root.join("lock");
        let lock = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&lock_path)
            .map_err(StoreError::io("opening", &lock_path))?;
        let mut path = tmp.as_os_str().to_owned();
        path.push(SUFFIX);
        Ok(Self {
            path: path.into(),
            lock_path,
            state: Mutex::new(State {
                lock,
                file: None,
                held: BTreeSet::new(),
            }),
        })
    }

    /// Waits until nobody removes anything; nobody does until the result is dropped.
    pub(super) fn look(&self) -> Result<Looking<'_>, StoreError> {
        let state = self.state();
        retry(|| state.lock.lock_shared()).map_err(StoreError::io("locking", &self.lock_path))?;
        Ok(Looking {
            state,
            path: &self.path,
        })
    }

    /// Waits until nobody looks anything up; nobody does until the result is dropped.
    pub(super) fn remove(&self) -> Result<Removing<'_>, StoreError> {
        let state = self.state();
        retry(|| state.lock.lock()).map_err(StoreError::io("locking", &self.lock_path))?;
        Ok(Removing { state })
    }

    /// Holds nothing any more.
    pub(super) fn release(&self) -> Result<(), StoreError> {
        let mut looking = self.look()?;
        looking.state.held.clear();
        if looking.state.file.take().is_some() {
            fs::remove_file(&self.path).map_err(StoreError::io("removing", &self.path))?;
        }
        Ok(())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state
            .lock()
            .expect("nothing panics while it holds this lock")
    }
}

impl Drop for Holds {
    fn drop(&mut self) {
        if let Err(error) = self.release() {
            tracing::debug!(path = %self.path.display(), %error, "what was held is garbage now");
        }
    }
}

impl Looking<'_> {
    /// Keeps `name` until this process ends.
    pub(super) fn hold(&mut self, name: &str) -> Result<(), StoreError> {
        let State { file, held, .. } = &mut *self.state;
        if held.contains(name) {
            return Ok(());
        }
        let file = match file {
            Some(file) => file,
            None => {
                let made = File::options()
                    .create_new(true)
                    .append(true)
                    .open(self.path)
                    .map_err(StoreError::io("creating", self.path))?;
                made.try_lock().map_err(|error| {
                    StoreError::io("locking", self.path)(match error {
                        TryLockError::Error(error) => error,
                        TryLockError::WouldBlock => io::ErrorKind::WouldBlock.into(),
                    })
                })?;
                file.insert(made)
            }
        };
        // One write, so that a reader sees the whole line or nothing of it.
        file.write_all(format!("{name}\n").as_bytes())
            .map_err(StoreError::io("writing", self.path))?;
        held.insert(name.to_owned());
        Ok(())
    }
}

impl Drop for Looking<'_> {
    fn drop(&mut self) {
        unlock(&self.state.lock);
    }
}

impl Drop for Removing<'_> {
    fn drop(&mut self) {
        unlock(&self.state.lock);
    }
}

impl Removing<'_> {
    /// The names that living processes hold, read from the files in `tmp`. Files of dead
    /// ones are removed.
    pub(super) fn held(&self, tmp: &Path) -> Result<BTreeSet<String>, StoreError> {
        let mut held = BTreeSet::new();
        let entries = fs::read_dir(tmp).map_err(StoreError::io("listing", tmp))?;
        for entry in entries {
            let path = entry.map_err(StoreError::io("listing", tmp))?.path();
            if !is_holds(&path) {
                continue;
            }
            let file = match File::open(&path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                file => file.map_err(StoreError::io("opening", &path))?,
            };
            match file.try_lock() {
                Ok(()) => match fs::remove_file(&path) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => {
                        return Err(StoreError::io("removing", &path)(error));
                    }
                    _ => {}
                },
                Err(TryLockError::WouldBlock) => {
                    let names = io::read_to_string(&file);
                    let names = names.map_err(StoreError::io("reading", &path))?;
                    held.extend(names.lines().map(str::to_owned));
                }
                Err(TryLockError::Error(error)) => {
                    return Err(StoreError::io("locking", &path)(error));
                }
            }
        }
        Ok(held)
    }
}

/// Whether this is a file that says what a process holds.
pub(super) fn is_holds(path: &Path) -> bool {
    path.file_name()
        .is_some_and(|name| name.as_encoded_bytes().ends_with(SUFFIX.as_bytes()))
}

fn unlock(lock: &File) {
    if let Err(error) = lock.unlock() {
        // The kernel does it when the process ends.
        tracing::warn!(%error, "the store stays locked until this process ends");
    }
}

fn retry(mut lock: impl FnMut() -> io::Result<()>) -> io::Result<()> {
    loop {
        match lock() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            other => return other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_process_holds_is_seen_by_others_until_it_ends() {
        let dir = tempfile::tempdir().unwrap();
        let tmp = dir.path().join("tmp");
        fs::create_dir(&tmp).unwrap();
        let first = Holds::new(dir.path(), &tmp.join("a")).unwrap();
        let second = Holds::new(dir.path(), &tmp.join("b")).unwrap();
        let seen = || second.remove().unwrap().held(&tmp).unwrap();
        assert_eq!(seen(), BTreeSet::new());
        assert_eq!(
            fs::read_dir(&tmp).unwrap().count(),
            0,
            "nothing is held yet"
        );
        first.look().unwrap().hold("blob x").unwrap();
        first.look().unwrap().hold("tree y").unwrap();
        first.look().unwrap().hold("blob x").unwrap();
        let both = ["blob x", "tree y"].map(str::to_owned);
        assert_eq!(seen(), BTreeSet::from(both));
        assert_eq!(fs::read(tmp.join("a.holds")).unwrap(), b"blob x\ntree y\n");
        first.release().unwrap();
        assert_eq!(seen(), BTreeSet::new());
        first.look().unwrap().hold("blob z").unwrap();
        assert_eq!(seen(), BTreeSet::from(["blob z".to_owned()]));
        drop(first);
        assert_eq!(fs::read_dir(&tmp).unwrap().count(), 0);
        // Of a process that was killed.
        fs::write(tmp.join("dead.holds"), "blob x\n").unwrap();
        assert_eq!(seen(), BTreeSet::new());
        assert_eq!(fs::read_dir(&tmp).unwrap().count(), 0);
    }

    #[test]
    fn nothing_is_looked_up_while_something_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let holds = |name: &str| Holds::new(dir.path(), &dir.path().join(name)).unwrap();
        let (looks, removes) = (holds("a"), holds("b"));
        let other = || File::open(dir.path().join("lock")).unwrap();
        let looking = looks.look().unwrap();
        assert!(matches!(other().try_lock(), Err(TryLockError::WouldBlock)));
        other().try_lock_shared().unwrap();
        drop(looking);
        let removing = removes.remove().unwrap();
        let shared = other().try_lock_shared();
        assert!(matches!(shared, Err(TryLockError::WouldBlock)));
        drop(removing);
        other().try_lock().unwrap();
    }
}
