//! Mount points inside a root filesystem: made before a process runs, taken away after.
//!
//! What a process did with the filesystem in between must not matter: it may have
//! replaced a parent by a link that leads elsewhere. So every directory that a stub was
//! made in stays open, and stubs are removed through these descriptors, by name and only
//! while they are still the very files that were made. The process's own use of such a
//! file or directory makes it a part of the image.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, Stat, Timespec, Timestamps};
use rustix::io::Errno;

use super::RootfsError;
use super::tree::look_at;
use crate::confined::ConfinedDir;

/// Links followed for one mount point; the kernel's limit (`MAXSYMLINKS`).
const LINKS_LIMIT: u32 = 40;

const STUB_DIR_MODE: Mode = Mode::from_raw_mode(0o755);
const STUB_FILE_MODE: Mode = Mode::from_raw_mode(0o644);

/// Something that will be mounted over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountPoint {
    /// Where, inside the image, with or without a leading slash; links are followed inside.
    pub path: PathBuf,
    /// Whether a directory will be mounted there, or anything else.
    pub is_dir: bool,
}

/// The stubs of one root filesystem.
#[derive(Debug, Default)]
pub(super) struct Stubs {
    parents: Vec<Parent>,
    made: Vec<Stub>,
}

/// A directory that stubs were made in.
#[derive(Debug)]
struct Parent {
    fd: OwnedFd,
    id: (u64, u64),
    /// Modification time before the first stub, to be restored.
    before: Timespec,
    /// Modification time after the last stub: another one later is the process's doing.
    after: Timespec,
}

#[derive(Debug)]
struct Stub {
    /// Index in `parents`.
    parent: usize,
    name: OsString,
    id: (u64, u64),
    is_dir: bool,
    /// For messages.
    path: PathBuf,
}

impl Stubs {
    /// Makes sure that `point` exists below `root`.
    pub(super) fn prepare(
        &mut self,
        root: &ConfinedDir,
        point: &MountPoint,
    ) -> Result<(), RootfsError> {
        let failed = |path: &Path| RootfsError::io("making the mount point", path);
        let resolved = resolve(root, &point.path).map_err(failed(&point.path))?;
        let mut path = PathBuf::new();
        let mut names = resolved.iter().peekable();
        while let Some(name) = names.next() {
            let parent = path.clone();
            path.push(name);
            let want_dir = names.peek().is_some() || point.is_dir;
            match look_at(root, &path).map_err(failed(&path))? {
                Some((_, found)) if want_dir != found.is_dir() => {
                    let name_of = |dir| {
                        if dir {
                            "a directory"
                        } else {
                            "not a directory"
                        }
                    };
                    return Err(RootfsError::MountPoint {
                        path,
                        found: name_of(found.is_dir()),
                        want: name_of(want_dir),
                    });
                }
                Some(_) => {}
                None => self
                    .make(root, &parent, name, &path, want_dir)
                    .map_err(failed(&path))?,
            }
        }
        Ok(())
    }

    fn make(
        &mut self,
        root: &ConfinedDir,
        parent: &Path,
        name: &OsStr,
        path: &Path,
        is_dir: bool,
    ) -> io::Result<()> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW;
        let fd = root.open_exact(parent, flags, Mode::empty())?;
        let stat = rustix::fs::fstat(&fd)?;
        let known = self.parents.iter().position(|p| p.id == identity(&stat));
        let parent = known.unwrap_or_else(|| {
            self.parents.push(Parent {
                fd,
                id: identity(&stat),
                before: mtime(&stat),
                after: mtime(&stat),
            });
            self.parents.len() - 1
        });
        let dir = &mut self.parents[parent];
        let stub = if is_dir {
            rustix::fs::mkdirat(&dir.fd, name, STUB_DIR_MODE)?;
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            rustix::fs::openat(&dir.fd, name, flags, Mode::empty())?
        } else {
            let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
            rustix::fs::openat(&dir.fd, name, flags, STUB_FILE_MODE)?
        };
        // Without regard to the umask of whoever runs the build.
        let mode = if is_dir {
            STUB_DIR_MODE
        } else {
            STUB_FILE_MODE
        };
        rustix::fs::fchmod(&stub, mode)?;
        dir.after = mtime(&rustix::fs::fstat(&dir.fd)?);
        self.made.push(Stub {
            parent,
            name: name.to_owned(),
            id: identity(&rustix::fs::fstat(&stub)?),
            is_dir,
            path: path.to_owned(),
        });
        Ok(())
    }

    /// Removes the stubs that nobody has used, and restores their parents' times.
    /// All descriptors are closed after.
    pub(super) fn remove(self) -> Result<(), RootfsError> {
        // Last first: what was made inside a stub goes before it.
        for stub in self.made.iter().rev() {
            let parent = &self.parents[stub.parent];
            parent
                .without_trace(|fd| stub.remove_from(fd))
                .map_err(RootfsError::io("removing the mount point", &stub.path))?;
        }
        Ok(())
    }
}

impl Parent {
    /// Does something in the directory that should not show in its modification time.
    /// `act` says whether it has changed anything.
    fn without_trace(
        &self,
        act: impl FnOnce(BorrowedFd<'_>) -> Result<bool, Errno>,
    ) -> Result<(), Errno> {
        let now = mtime(&rustix::fs::fstat(&self.fd)?);
        if !act(self.fd.as_fd())? {
            return Ok(());
        }
        let untouched = now == self.after || now == self.before;
        let times = Timestamps {
            last_access: Timespec {
                tv_sec: 0,
                tv_nsec: rustix::fs::UTIME_OMIT,
            },
            last_modification: if untouched { self.before } else { now },
        };
        rustix::fs::futimens(&self.fd, &times)
    }
}

impl Stub {
    /// Returns whether it was there and unused.
    fn remove_from(&self, parent: BorrowedFd<'_>) -> Result<bool, Errno> {
        let stat = match rustix::fs::statat(parent, &self.name, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => return Ok(false),
            other => other?,
        };
        let used = !self.is_dir && stat.st_size != 0;
        let is_dir = FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
        if identity(&stat) != self.id || is_dir != self.is_dir || used {
            return Ok(false);
        }
        let flags = if self.is_dir {
            AtFlags::REMOVEDIR
        } else {
            AtFlags::empty()
        };
        match rustix::fs::unlinkat(parent, &self.name, flags) {
            // The process put something into the directory, which is now part of the image.
            Err(Errno::NOTEMPTY | Errno::EXIST | Errno::NOENT) => Ok(false),
            other => other.map(|()| true),
        }
    }
}

/// Where `path` leads below `root`, without links, relative; it need not exist.
pub(super) fn resolve(root: &ConfinedDir, path: &Path) -> io::Result<PathBuf> {
    let names = |path: &Path| -> Vec<OsString> {
        path.components()
            .filter(|c| matches!(c, Component::Normal(_) | Component::ParentDir))
            .map(|c| c.as_os_str().to_owned())
            .collect()
    };
    let mut left = names(path);
    left.reverse();
    let mut resolved = PathBuf::new();
    let mut links = 0;
    while let Some(name) = left.pop() {
        if name == ".." {
            resolved.pop();
            continue;
        }
        resolved.push(&name);
        let Some((_, found)) = look_at(root, &resolved)? else {
            continue;
        };
        if found.file_type != FileType::Symlink {
            continue;
        }
        links += 1;
        if links > LINKS_LIMIT {
            return Err(Errno::LOOP.into());
        }
        let (parent, name) = root.open_exact_parent(&resolved)?;
        let target = rustix::fs::readlinkat(parent, name, Vec::new())?;
        let target = PathBuf::from(OsString::from_vec(target.into_bytes()));
        if target.is_absolute() {
            resolved.clear();
        } else {
            resolved.pop();
        }
        left.extend(names(&target).into_iter().rev());
    }
    Ok(resolved)
}

fn identity(stat: &Stat) -> (u64, u64) {
    (stat.st_dev, stat.st_ino)
}

#[allow(
    clippy::unnecessary_cast,
    reason = "the fields' types differ between architectures"
)]
fn mtime(stat: &Stat) -> Timespec {
    Timespec {
        tv_sec: stat.st_mtime as _,
        tv_nsec: stat.st_mtime_nsec as _,
    }
}
