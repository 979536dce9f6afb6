//! `RUN --mount=type=cache`: directories that stay from build to build.
//!
//! ```text
//! cache/mounts/<sha256 of what names it>/<number>/lock     held while a step has the directory
//!                                                 /filling  held while it is made
//!                                                 /reading  held while it is copied elsewhere
//!                                                 /files    the directory
//! ```
//!
//! A step that may not share the directory it finds in use gets one with the next number.

use std::collections::BTreeSet;
use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;

use super::Cancelled;
use crate::confined::remove_tree;
use crate::image::Digest;
use crate::owners::Owners;
use crate::plan::Sharing;
use crate::sandbox::Cancel;
use crate::store::{MOUNT_OWNERS_RECORDED, Store};

/// How often a step that waits for a directory looks again.
const POLL: Duration = Duration::from_millis(50);

/// How many directories of one name are in use at once, at most.
const DIRECTORIES_LIMIT: usize = 1024;

/// A cache directory in use. Others may have it when this is dropped.
#[derive(Debug)]
pub(super) struct CacheDirectory {
    /// What is mounted.
    pub(super) files: PathBuf,
    _lock: File,
}

/// Takes the directory that `name` means, made by `fill` in an empty directory where it is
/// new. `fill` returns the path of what becomes the directory. `waits` is called before
/// another step's end is waited for.
///
/// # Errors
/// [`Cancelled`] while it waits; those of `fill`; that the store cannot be written.
pub(super) fn take(
    store: &Store,
    cancel: &Cancel,
    name: &str,
    sharing: Sharing,
    mut waits: impl FnMut(),
    fill: impl FnOnce(&Path) -> anyhow::Result<PathBuf>,
) -> anyhow::Result<CacheDirectory> {
    let all = directories(store, name);
    let mut number = 0;
    loop {
        let dir = all.join(number.to_string());
        let path = dir.join("lock");
        // Whoever prunes would otherwise remove what is here and not locked yet.
        let (lock, locked) = store.while_nothing_is_removed(|| {
            fs::create_dir_all(&dir).with_context(|| format!("creating {}", dir.display()))?;
            if number == 0 && !all.join("name").exists() {
                store.write_file(&all.join("name"), name.as_bytes())?;
            }
            let lock = lock_file(&path)?;
            let locked = match sharing {
                Sharing::Shared => lock.try_lock_shared(),
                Sharing::Private | Sharing::Locked => lock.try_lock(),
            };
            anyhow::Ok((lock, locked))
        })?;
        match locked {
            Ok(()) => {
                store.touch(&path);
                return open(store, cancel, &dir, lock, fill);
            }
            // Whoever copies it is soon done, and another directory would be empty.
            Err(TryLockError::WouldBlock) if sharing == Sharing::Locked || is_being_read(&dir)? => {
                waits();
                wait(cancel)?;
            }
            Err(TryLockError::WouldBlock) => {
                number += 1;
                anyhow::ensure!(
                    number < DIRECTORIES_LIMIT,
                    "{DIRECTORIES_LIMIT} directories of the cache mount {name:?} are in use"
                );
            }
            Err(TryLockError::Error(error)) => {
                return Err(error).with_context(|| format!("locking {}", path.display()));
            }
        }
    }
}

/// Where the directories that `name` means are. Those whose owners are recorded are of no use where
/// files have their own.
fn directories(store: &Store, name: &str) -> PathBuf {
    let kind = match store.records_owners() {
        true => MOUNT_OWNERS_RECORDED,
        false => "",
    };
    let name = Digest::of(format!("{name}{kind}").as_bytes());
    store.cache_mounts_path().join(name.hex())
}

fn lock_file(path: &Path) -> anyhow::Result<File> {
    let lock = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(path);
    lock.with_context(|| format!("opening {}", path.display()))
}

fn wait(cancel: &Cancel) -> Result<(), Cancelled> {
    if cancel.is_cancelled() {
        return Err(Cancelled);
    }
    std::thread::sleep(POLL);
    Ok(())
}

/// A cache directory that is to be copied elsewhere.
#[derive(Debug)]
pub(super) enum Reading {
    /// There is none.
    Nothing,
    /// A step of another build has it, and may change it.
    InUse,
    /// Nobody else has it while this lives.
    Files {
        /// The directory.
        files: PathBuf,
        _locks: [File; 2],
    },
}

/// Takes the first directory that `name` means, to read it, unless somebody has it.
///
/// # Errors
/// That the store cannot be read or written.
pub(super) fn read(store: &Store, name: &str) -> anyhow::Result<Reading> {
    let all = directories(store, name);
    let dir = all.join("0");
    let files = dir.join("files");
    if !files.is_dir() {
        return Ok(Reading::Nothing);
    }
    let reading = lock_file(&dir.join("reading"))?;
    let lock = lock_file(&dir.join("lock"))?;
    for lock in [&reading, &lock] {
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Ok(Reading::InUse),
            Err(TryLockError::Error(error)) => {
                return Err(error).with_context(|| format!("locking {}", dir.display()));
            }
        }
    }
    if !files.is_dir() {
        return Ok(Reading::Nothing);
    }
    Ok(Reading::Files {
        files,
        _locks: [lock, reading],
    })
}

/// Whether somebody copies the directory elsewhere.
fn is_being_read(dir: &Path) -> anyhow::Result<bool> {
    let path = dir.join("reading");
    match File::open(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error).with_context(|| format!("opening {}", path.display())),
        Ok(reading) => Ok(matches!(
            reading.try_lock_shared(),
            Err(TryLockError::WouldBlock)
        )),
    }
}

/// What stands in a name between a cache's ID and what it is made from, and how.
pub(super) const DETAIL: char = '\n';

/// Empties the caches with these IDs, whatever they are made from: a build without the cache
/// begins with new ones, as in BuildKit. Gives the IDs of those that are in use, which stay.
///
/// # Errors
/// That the store cannot be read or written.
pub(super) fn empty(store: &Store, ids: &BTreeSet<&str>) -> anyhow::Result<BTreeSet<String>> {
    let mut in_use = BTreeSet::new();
    if ids.is_empty() {
        return Ok(in_use);
    }
    let all = store.cache_mounts_path();
    let entries = match fs::read_dir(&all) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(in_use),
        entries => entries.with_context(|| format!("listing {}", all.display()))?,
    };
    for entry in entries {
        let dir = entry
            .with_context(|| format!("listing {}", all.display()))?
            .path();
        let Ok(name) = fs::read(dir.join("name")) else {
            continue;
        };
        let name = String::from_utf8_lossy(&name);
        let id = name.split(DETAIL).next().unwrap_or_default();
        if ids.contains(id) && !empty_one(store, &dir)? {
            in_use.insert(id.to_owned());
        }
    }
    Ok(in_use)
}

/// Whether nobody had any of the directories of one name.
fn empty_one(store: &Store, all: &Path) -> anyhow::Result<bool> {
    let mut is_free = true;
    for number in 0..DIRECTORIES_LIMIT {
        let dir = all.join(number.to_string());
        let path = dir.join("lock");
        let lock = match File::options().write(true).open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => break,
            lock => lock.with_context(|| format!("opening {}", path.display()))?,
        };
        if lock.try_lock().is_err() {
            is_free = false;
            continue;
        }
        // Out of sight first: what is half removed is no cache.
        let old = store.tmp_dir("old-cache-")?.join("files");
        match fs::rename(dir.join("files"), &old) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            moved => {
                moved.with_context(|| format!("emptying {}", dir.display()))?;
                remove_tree(&old).with_context(|| format!("removing {}", old.display()))?;
            }
        }
    }
    Ok(is_free)
}

fn open(
    store: &Store,
    cancel: &Cancel,
    dir: &Path,
    lock: File,
    fill: impl FnOnce(&Path) -> anyhow::Result<PathBuf>,
) -> anyhow::Result<CacheDirectory> {
    let files = dir.join("files");
    if !files.is_dir() {
        // Of several steps that share it, one makes it: that may be a long download.
        let path = dir.join("filling");
        let filling = lock_file(&path)?;
        loop {
            match filling.try_lock() {
                Ok(()) => break,
                Err(TryLockError::WouldBlock) => wait(cancel)?,
                Err(TryLockError::Error(error)) => {
                    return Err(error).with_context(|| format!("locking {}", path.display()));
                }
            }
        }
        if !files.is_dir() {
            let made = fill(&store.tmp_dir("cache-")?)?;
            let naming = || format!("naming {}", files.display());
            if store.records_owners() {
                owners_of(&made)?.save(&files).with_context(naming)?;
            }
            fs::rename(&made, &files).with_context(naming)?;
        }
    }
    Ok(CacheDirectory { files, _lock: lock })
}

/// Whose the files in `made` are: a new directory, of which its own directory has the record.
fn owners_of(made: &Path) -> anyhow::Result<Owners> {
    let (Some(above), Some(name)) = (made.parent(), made.file_name()) else {
        return Ok(Owners::default());
    };
    let owners = Owners::of(above);
    let owners = owners.with_context(|| format!("reading the owners of {}", above.display()))?;
    Ok(owners
        .map(|owners| owners.inside(Path::new(name)))
        .unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::super::subtree;
    use super::*;

    struct Fixture {
        dir: tempfile::TempDir,
        store: Store,
    }

    fn fixture() -> Fixture {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        Fixture { dir, store }
    }

    impl Fixture {
        fn take(&self, name: &str, sharing: Sharing) -> anyhow::Result<CacheDirectory> {
            let (uid, gid) = (rustix::process::getuid(), rustix::process::getgid());
            take(
                &self.store,
                &Cancel::default(),
                name,
                sharing,
                || {},
                |dir| subtree::empty(dir, 0o750, uid.as_raw(), gid.as_raw()),
            )
        }
    }

    #[test]
    fn a_directory_stays_and_has_the_mode_it_was_made_with() {
        let fixture = fixture();
        let first = fixture.take("a", Sharing::Locked).unwrap();
        let mode = fs::metadata(&first.files).unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o750);
        fs::write(first.files.join("kept"), "1").unwrap();
        drop(first);
        let again = fixture.take("a", Sharing::Private).unwrap();
        assert_eq!(fs::read(again.files.join("kept")).unwrap(), b"1");
        let other = fixture.take("b", Sharing::Private).unwrap();
        assert!(!other.files.join("kept").exists());
        assert!(
            again
                .files
                .starts_with(fixture.dir.path().join("cache/mounts"))
        );
    }

    #[test]
    fn sharing_is_what_it_says() {
        let fixture = fixture();
        let shared = fixture.take("a", Sharing::Shared).unwrap();
        let also = fixture.take("a", Sharing::Shared).unwrap();
        assert_eq!(shared.files, also.files);
        let private = fixture.take("a", Sharing::Private).unwrap();
        assert_ne!(private.files, shared.files);
        let private_too = fixture.take("a", Sharing::Private).unwrap();
        assert!(private_too.files != shared.files && private_too.files != private.files);

        // Whoever wants it alone waits until the last one has left.
        let cancel = Cancel::default();
        cancel.cancel();
        let refused = take(
            &fixture.store,
            &cancel,
            "a",
            Sharing::Locked,
            || {},
            |_| panic!("it is there"),
        );
        assert!(refused.unwrap_err().is::<Cancelled>());
        let files = shared.files.clone();
        let waiting = std::thread::scope(|scope| {
            let waiting = scope.spawn(|| fixture.take("a", Sharing::Locked).unwrap());
            drop((shared, also));
            waiting.join().unwrap()
        });
        assert_eq!(waiting.files, files);
    }

    #[test]
    fn what_cannot_be_filled_is_not_there() {
        let fixture = fixture();
        let failed = take(
            &fixture.store,
            &Cancel::default(),
            "a",
            Sharing::Shared,
            || {},
            |_| anyhow::bail!("no"),
        );
        assert_eq!(failed.unwrap_err().to_string(), "no");
        let made = fixture.take("a", Sharing::Locked).unwrap();
        assert!(fs::read_dir(made.files).unwrap().next().is_none());
    }

    #[test]
    fn caches_are_emptied_by_their_ids_unless_they_are_in_use() {
        let fixture = fixture();
        let fill = |name: &str| {
            let cache = fixture.take(name, Sharing::Shared).unwrap();
            fs::write(cache.files.join("f"), "x").unwrap();
            cache
        };
        let (plain, dressed) = ("/a", format!("/a{DETAIL}mode 7"));
        drop((fill(plain), fill(&dressed), fill("/a b")));
        let used = fill("/used");
        let ids = BTreeSet::from(["/a", "/used", "/none"]);
        let in_use = empty(&fixture.store, &ids).unwrap();
        assert_eq!(in_use, BTreeSet::from(["/used".to_owned()]));
        assert!(used.files.join("f").exists());
        let has = |name: &str| {
            let cache = fixture.take(name, Sharing::Shared).unwrap();
            cache.files.join("f").exists()
        };
        assert_eq!(
            [has(plain), has(&dressed), has("/a b")],
            [false, false, true]
        );
    }

    #[test]
    fn what_is_copied_is_nobodys_and_who_wants_it_waits() {
        let fixture = fixture();
        assert!(matches!(
            read(&fixture.store, "a").unwrap(),
            Reading::Nothing
        ));
        let taken = fixture.take("a", Sharing::Shared).unwrap();
        let files = taken.files.clone();
        assert!(matches!(read(&fixture.store, "a").unwrap(), Reading::InUse));
        drop(taken);
        let reading = read(&fixture.store, "a").unwrap();
        assert!(matches!(&reading, Reading::Files { files: read, .. } if *read == files));
        assert!(matches!(read(&fixture.store, "a").unwrap(), Reading::InUse));
        let cancel = Cancel::default();
        cancel.cancel();
        for sharing in [Sharing::Shared, Sharing::Private, Sharing::Locked] {
            let refused = take(
                &fixture.store,
                &cancel,
                "a",
                sharing,
                || {},
                |_| unreachable!(),
            );
            assert!(refused.unwrap_err().is::<Cancelled>(), "{sharing:?}");
        }
        let shared = std::thread::scope(|scope| {
            let waiting = scope.spawn(|| fixture.take("a", Sharing::Shared).unwrap());
            drop(reading);
            waiting.join().unwrap()
        });
        assert_eq!(shared.files, files);
    }

    #[test]
    fn of_several_that_share_a_new_one_one_makes_it() {
        let fixture = fixture();
        let made = std::sync::atomic::AtomicUsize::new(0);
        let (uid, gid) = (rustix::process::getuid(), rustix::process::getgid());
        let take_one = || {
            let fill = |dir: &Path| {
                made.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
                subtree::empty(dir, 0o755, uid.as_raw(), gid.as_raw())
            };
            take(
                &fixture.store,
                &Cancel::default(),
                "a",
                Sharing::Shared,
                || {},
                fill,
            )
            .unwrap()
        };
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(take_one);
            }
        });
        assert_eq!(made.into_inner(), 1);
    }
}
