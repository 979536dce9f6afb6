//! The cgroup of one step, from its making to its end.
//!
//! Its directory is locked (`flock(2)`) by the process that made it as long as that lives, in
//! whatever PID namespace: so who finds an unlocked one knows that nobody will use it any more.

use std::collections::BTreeMap;
use std::io::{self, Write as _};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use rustix::fs::{FlockOperation, Mode, OFlags};

use super::super::SandboxError;
use super::super::resources::Limits;
use super::files::{self, Controller, Version};
use super::{Home, Place};

/// What the names of cgroups begin with; two numbers follow.
const PREFIX: &str = "sockless-";
/// How long a cgroup may be busy when all its processes have ended: the kernel takes them out of it
/// a moment later.
const BUSY_TRIES: u32 = 100;
const BUSY_PAUSE: Duration = Duration::from_millis(10);
/// How often a name is looked for that nobody has.
const NAME_TRIES: u32 = 1000;

/// A cgroup in each hierarchy that limits something. Dropping it removes it.
#[derive(Debug)]
pub(in crate::sandbox) struct Group {
    dirs: Vec<Dir>,
    /// Where the kernel counts what it refused.
    events: BTreeMap<Controller, (PathBuf, &'static str)>,
}

#[derive(Debug)]
pub(super) struct Dir {
    path: PathBuf,
    /// Locked.
    _lock: OwnedFd,
}

impl Dir {
    /// Where it is.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    fn make(parent: &Path) -> io::Result<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        for _ in 0..NAME_TRIES {
            let number = NUMBER.fetch_add(1, Ordering::Relaxed);
            let path = parent.join(format!("{PREFIX}{}-{number}", std::process::id()));
            match std::fs::create_dir(&path) {
                // Of a process with the same number, in another namespace or before.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => continue,
                made => made?,
            }
            // Somebody who sweeps may have been faster than the lock; then it is gone.
            match lock(&path) {
                Ok(Some(lock)) => return Ok(Self { path, _lock: lock }),
                Ok(None) => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => {
                    remove_soon(&path);
                    return Err(error);
                }
            }
        }
        Err(io::ErrorKind::AlreadyExists.into())
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        remove_soon(&self.path);
    }
}

/// Locks a directory, if nobody else has, and if it is still there then.
fn lock(path: &Path) -> io::Result<Option<OwnedFd>> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let fd = rustix::fs::open(path, flags, Mode::empty())?;
    match rustix::fs::flock(&fd, FlockOperation::NonBlockingLockExclusive) {
        Err(rustix::io::Errno::WOULDBLOCK) => return Ok(None),
        locked => locked?,
    }
    let is_same = std::fs::metadata(path)?.ino() == rustix::fs::fstat(&fd)?.st_ino;
    Ok(is_same.then_some(fd))
}

impl Group {
    /// One without limits, in one hierarchy.
    pub(super) fn empty(parent: &Path) -> io::Result<Dir> {
        Dir::make(parent)
    }

    /// Makes one with `limits`; none where no cgroup of `place` could hold anything.
    ///
    /// # Errors
    /// [`SandboxError::Asked`] where the kernel does not take a limit.
    pub(in crate::sandbox) fn make(
        place: &Place,
        limits: &Limits,
    ) -> Result<Option<Self>, SandboxError> {
        let mut homes: BTreeMap<(&Path, Version), Vec<Controller>> = BTreeMap::new();
        for (&controller, home) in &place.homes {
            if let Ok(Home { dir, version }) = home {
                homes.entry((dir, *version)).or_default().push(controller);
            }
        }
        if homes.is_empty() {
            return Ok(None);
        }
        let mut group = Self {
            dirs: Vec::new(),
            events: BTreeMap::new(),
        };
        for ((parent, version), controllers) in homes {
            let dir = Dir::make(parent).map_err(|error| SandboxError::Asked {
                doing: format!("making a cgroup in {}", parent.display()),
                reason: error.to_string(),
            })?;
            for controller in controllers {
                if (controller, version) == (Controller::Cpuset, Version::V1) {
                    inherit_cpuset(parent, &dir.path)?;
                }
                for setting in files::settings(controller, version, limits) {
                    let path = dir.path.join(setting.file);
                    match write(&path, &setting.value) {
                        Err(error)
                            if setting.may_lack && error.kind() == io::ErrorKind::NotFound => {}
                        written => written.map_err(refused(setting.file, &setting.value))?,
                    }
                }
                if let Some((file, key)) = files::events(controller, version) {
                    group.events.insert(controller, (dir.path.join(file), key));
                }
            }
            group.dirs.push(dir);
        }
        Ok(Some(group))
    }

    /// Files to which a process writes `0` to enter the cgroup.
    ///
    /// # Errors
    /// Those of `open(2)`.
    pub(in crate::sandbox) fn doors(&self) -> io::Result<Vec<OwnedFd>> {
        let open = |dir: &Dir| {
            let flags = OFlags::WRONLY | OFlags::CLOEXEC;
            let procs = dir.path.join("cgroup.procs");
            Ok(rustix::fs::open(&procs, flags, Mode::empty())?)
        };
        self.dirs.iter().map(open).collect()
    }

    /// How often the kernel refused what this controller limits: killed a process for memory, or
    /// did not start one.
    pub(in crate::sandbox) fn refusals(&self, controller: Controller) -> u64 {
        let read =
            |(path, key): &(PathBuf, &str)| files::count(&std::fs::read_to_string(path).ok()?, key);
        self.events.get(&controller).and_then(read).unwrap_or(0)
    }
}

/// Enters the cgroup whose door this is.
///
/// # Errors
/// Those of the kernel.
pub(in crate::sandbox) fn enter(door: BorrowedFd<'_>) -> io::Result<()> {
    // By its own number it would have to be named as the cgroup's owner sees it.
    rustix::io::write(door, b"0")?;
    Ok(())
}

fn refused(file: &str, value: &str) -> impl Fn(io::Error) -> SandboxError {
    move |error| SandboxError::Asked {
        doing: format!("setting {file} of a cgroup to {value}"),
        reason: error.to_string(),
    }
}

/// A new cpuset of version 1 has no processors and no memory, and takes no process.
fn inherit_cpuset(parent: &Path, own: &Path) -> Result<(), SandboxError> {
    for file in ["cpuset.cpus", "cpuset.mems"] {
        let value = std::fs::read_to_string(parent.join(file)).unwrap_or_default();
        write(&own.join(file), value.trim()).map_err(refused(file, value.trim()))?;
    }
    Ok(())
}

/// Writes to a file that the kernel made.
pub(super) fn write(path: &Path, value: &str) -> io::Result<()> {
    let mut file = std::fs::OpenOptions::new().write(true).open(path)?;
    file.write_all(value.as_bytes())
}

/// Removes what processes of this program left in `dir` when they were killed.
pub(super) fn sweep(dir: &Path) {
    let Ok(entries) = std::fs::read_dir(dir) else {
        return;
    };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let is_ours = name
            .to_str()
            .and_then(|name| name.strip_prefix(PREFIX)?.split_once('-'))
            .is_some_and(|(pid, number)| {
                [pid, number]
                    .iter()
                    .all(|part| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit()))
            });
        if is_ours && let Ok(Some(lock)) = lock(&entry.path()) {
            // Where processes of it still end, the next one will find it.
            if let Err(error) = remove(&entry.path()) {
                tracing::debug!("the cgroup {} stays: {error}", entry.path().display());
            }
            drop(lock);
        }
    }
}

/// Removes a cgroup and what is below it; one that is gone is as good.
fn remove(dir: &Path) -> io::Result<()> {
    if let Ok(entries) = std::fs::read_dir(dir) {
        for entry in entries.flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                remove(&entry.path())?;
            }
        }
    }
    match std::fs::remove_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

/// Removes a cgroup whose processes have just ended.
pub(super) fn remove_soon(dir: &Path) {
    for _ in 0..BUSY_TRIES {
        match remove(dir) {
            Ok(()) => return,
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
                std::thread::sleep(BUSY_PAUSE);
            }
            Err(error) => {
                tracing::warn!("removing the cgroup {}: {error}", dir.display());
                return;
            }
        }
    }
    tracing::warn!(
        "the cgroup {} is still busy; the next build removes it",
        dir.display()
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_nobody_holds_is_swept() {
        // Any directory can be locked, and removed when it is empty.
        let place = tempfile::tempdir().unwrap();
        let held = Dir::make(place.path()).unwrap();
        let names = [
            "sockless-1-2",
            "sockless-main",
            "sockless-1-2-x",
            "other-1-2",
        ];
        for name in names {
            std::fs::create_dir(place.path().join(name)).unwrap();
        }
        sweep(place.path());
        let exists = |name: &str| place.path().join(name).exists();
        assert_eq!(names.map(exists), [false, true, true, true]);
        let path = held.path.clone();
        assert!(path.exists());
        drop(held);
        assert!(!path.exists());
    }

    #[test]
    fn names_of_others_are_passed_over() {
        let place = tempfile::tempdir().unwrap();
        let first = Dir::make(place.path()).unwrap();
        let number = first.path.to_str().unwrap().rsplit('-').next().unwrap();
        let next = number.parse::<u32>().unwrap() + 1;
        let taken = format!("{PREFIX}{}-{next}", std::process::id());
        std::fs::create_dir_all(place.path().join(&taken)).unwrap();
        let second = Dir::make(place.path()).unwrap();
        assert_ne!(second.path, first.path);
        assert_ne!(second.path, place.path().join(taken));
    }
}
