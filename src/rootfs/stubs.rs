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
    /// Kept open, so that no other file can get the same number.
    fd: OwnedFd,
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
            fd: stub,
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
        let made = rustix::fs::fstat(&self.fd)?;
        if identity(&stat) != identity(&made) || is_dir != self.is_dir || used {
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

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{MetadataExt, symlink};

    use super::super::testing::{in_worlds, line, tree_of};
    use super::*;
    use crate::rootfs::{Backend, Stack, Tree, changes};

    fn point(path: &str) -> MountPoint {
        MountPoint {
            path: path.trim_end_matches('/').into(),
            is_dir: path.ends_with('/'),
        }
    }

    const BOTH: [Backend; 2] = [Backend::Overlay, Backend::Copy];

    /// Prepares `points` (a slash at the end of directories) in a small image, checks that
    /// they are there, does `act`, and compares what is left.
    fn check(points: &[&str], act: impl Fn(&Path), want: &[&str]) {
        let (_base, base) = tree_of(&[
            "755 etc/",
            "644 etc/hosts = x",
            "777 etc/resolv.conf -> ../run/resolve/stub",
            "755 opt/",
            "777 up -> ../../../../opt",
        ]);
        let lower = Stack::new(vec![base]);
        let points: Vec<MountPoint> = points.iter().map(|path| point(path)).collect();
        for backend in BOTH {
            let outside = tempfile::tempdir().unwrap();
            let scratch = outside.path().join("scratch");
            fs::create_dir(&scratch).unwrap();
            let mut rootfs = backend.open(&lower, &scratch).unwrap();
            let root = rootfs.path().to_owned();
            rootfs.prepare_mount_points(&points).unwrap();
            for point in &points {
                let path = root.join(rootfs.resolve(&point.path).unwrap());
                assert_eq!(
                    fs::symlink_metadata(&path).unwrap().is_dir(),
                    point.is_dir,
                    "{point:?}"
                );
            }
            act(&root);
            let upper = Tree::open(&rootfs.finish().unwrap().upper).unwrap();
            let got: Vec<String> = changes(&upper, &lower).map(|c| line(c.unwrap())).collect();
            assert_eq!(got, want, "{points:?} {backend:?}");
        }
    }

    #[test]
    fn sandbox_borrowed_directories_get_their_time_back() {
        in_worlds(
            module_path!(),
            "sandbox_borrowed_directories_get_their_time_back",
            || {
                let (_base, base) = tree_of(&["755 idle/", "755 used/"]);
                let stack = Stack::new(vec![base]);
                for backend in BOTH {
                    let scratch = tempfile::tempdir().unwrap();
                    let mut rootfs = backend.open(&stack, scratch.path()).unwrap();
                    let points = ["/idle/a/b", "/idle/c/", "/used/a/b", "/used/c/"].map(point);
                    rootfs.prepare_mount_points(&points).unwrap();
                    let used = rootfs.path().join("used");
                    fs::write(used.join("file"), "").unwrap();
                    let time =
                        std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_300_000_000);
                    fs::File::open(&used).unwrap().set_modified(time).unwrap();
                    let upper = rootfs.finish().unwrap().upper;
                    let mtime = |name| fs::metadata(upper.join(name)).unwrap().mtime();
                    assert_eq!(mtime("idle"), 1_400_000_000, "{backend:?}");
                    assert_eq!(mtime("used"), 1_300_000_000, "{backend:?}");
                    let names = |name| fs::read_dir(upper.join(name)).unwrap().count();
                    assert_eq!((names("idle"), names("used")), (0, 1), "{backend:?}");
                }
            },
        );
    }

    #[test]
    fn sandbox_mount_points_leave_no_trace_unless_used() {
        in_worlds(
            module_path!(),
            "sandbox_mount_points_leave_no_trace_unless_used",
            || {
                let all = [
                    "/etc/hosts",
                    "/etc/resolv.conf",
                    "/proc/",
                    "/opt/a/b/c/",
                    "/opt/a/file",
                    "up/secret",
                    "/../../dot/./x/../y",
                ];
                check(&all, |_| (), &[]);
                // Used: written to; something put beside it; removed; replaced.
                check(
                    &all,
                    |root| fs::write(root.join("opt/a/file"), "x").unwrap(),
                    &["755 opt/", "755 opt/a/", "644 opt/a/file = x"],
                );
                check(
                    &all,
                    |root| fs::write(root.join("opt/a/mine"), "x").unwrap(),
                    &["755 opt/", "755 opt/a/", "644 opt/a/mine = x"],
                );
                check(
                    &all,
                    |root| fs::remove_dir_all(root.join("opt/a")).unwrap(),
                    &[],
                );
                check(
                    &all,
                    |root| {
                        fs::remove_file(root.join("opt/secret")).unwrap();
                        fs::write(root.join("opt/new"), "").unwrap();
                        fs::rename(root.join("opt/new"), root.join("opt/secret")).unwrap();
                    },
                    &["755 opt/", "644 opt/secret = "],
                );
                // Moved with its directory, it is still removed.
                check(
                    &["/opt/a/file"],
                    |root| fs::rename(root.join("opt/a"), root.join("etc/a")).unwrap(),
                    &["755 etc/", "755 etc/a/"],
                );
            },
        );
    }

    #[test]
    fn security_s08_sandbox_a_replaced_parent_leads_nowhere() {
        // The process replaces the directory of a mount point by a link to another that has
        // files of the same names (CVE-2024-23652).
        in_worlds(
            module_path!(),
            "security_s08_sandbox_a_replaced_parent_leads_nowhere",
            || {
                let victim = tempfile::tempdir().unwrap();
                fs::write(victim.path().join("file"), "").unwrap();
                fs::create_dir(victim.path().join("dir")).unwrap();
                let target = victim.path().to_str().unwrap().to_owned();
                check(
                    &["/x/file", "/x/dir/", "/y/file"],
                    |root| {
                        fs::remove_dir_all(root.join("x")).unwrap();
                        symlink(&target, root.join("x")).unwrap();
                        fs::rename(root.join("y"), root.join("z")).unwrap();
                        symlink(&target, root.join("y")).unwrap();
                    },
                    &[
                        &format!("777 x -> {target}"),
                        &format!("777 y -> {target}"),
                        "755 z/",
                    ],
                );
                assert!(victim.path().join("file").exists());
                assert!(victim.path().join("dir").exists());
            },
        );
    }

    #[test]
    fn sandbox_something_else_at_a_mount_point_is_an_error() {
        in_worlds(
            module_path!(),
            "sandbox_something_else_at_a_mount_point_is_an_error",
            || {
                let (_base, base) = tree_of(&["755 d/", "644 f = x", "777 loop -> loop"]);
                let scratch = tempfile::tempdir().unwrap();
                let stack = Stack::new(vec![base]);
                let mut rootfs = Backend::Copy.open(&stack, scratch.path()).unwrap();
                let mut check = |path: &str, want: &str| {
                    let error = rootfs.prepare_mount_points(&[point(path)]).unwrap_err();
                    let mut message = error.to_string();
                    if let Some(source) = std::error::Error::source(&error) {
                        message += &format!(": {source}");
                    }
                    assert_eq!(message, want, "{path}");
                };
                check(
                    "/d",
                    r#"mount point "d" is a directory, want not a directory"#,
                );
                check(
                    "/f/",
                    r#"mount point "f" is not a directory, want a directory"#,
                );
                check(
                    "/f/x/",
                    r#"making the mount point "/f/x": Not a directory (os error 20)"#,
                );
                check(
                    "/loop/x/",
                    r#"making the mount point "/loop/x": Too many levels of symbolic links (os error 40)"#,
                );
            },
        );
    }
}
