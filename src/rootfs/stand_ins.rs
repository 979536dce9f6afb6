//! Stand-ins: files and directories that take the place of what is in a copied root filesystem
//! while a process runs, where nothing can be mounted over it.
//!
//! What was there is moved into a directory outside of the copy, which the process cannot reach,
//! and moved back after: the same file, with everything that it has. The times of the directory
//! around it are restored each time, so that neither shows. As with mount points, everything is
//! done through descriptors of the directories around, which the process may have moved.
//!
//! Unlike a mount point, a stand-in can be moved and linked to by the process. Where one is found
//! elsewhere in the end, it is no part of the layer: see [`super::plain`].

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, Stat, Timespec, Timestamps, makedev};
use rustix::io::Errno;

use super::plain::{Copied, dress};
use super::stack::Stack;
use super::stubs;
use super::tree::Tree;
use super::{Metadata, RootfsError};
use crate::confined::{self, ConfinedDir};

/// Something that takes the place of what is at a path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StandIn {
    /// Where, inside; links are followed inside. What is missing above it is made, and goes only
    /// with a stand-in around it.
    pub path: PathBuf,
    /// What.
    pub kind: StandInKind,
}

/// What takes a place.
#[derive(Clone, PartialEq, Eq)]
pub enum StandInKind {
    /// An empty directory of root; its mode, or that of the directory whose place it takes.
    Directory(Option<u32>),
    /// A file.
    File {
        /// What is in it; does not show in debug output.
        content: Vec<u8>,
        /// Its owner.
        uid: u32,
        /// Its group.
        gid: u32,
        /// Its mode.
        mode: u32,
    },
    /// A symbolic link to this.
    Link(PathBuf),
    /// A character device of root, with mode 0666.
    Device {
        /// Its major number.
        major: u32,
        /// Its minor number.
        minor: u32,
    },
    /// A copy of this directory or file, without its devices; of a socket, the socket itself,
    /// which has to be on the file system of the copy.
    Copy(PathBuf),
    /// This directory itself, which has to be on the file system of the copy, and goes back when
    /// the process has ended.
    Itself(PathBuf),
}

impl std::fmt::Debug for StandInKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Directory(mode) => write!(f, "Directory({mode:?})"),
            Self::File { content, .. } => write!(f, "File({} bytes)", content.len()),
            Self::Link(target) => write!(f, "Link({target:?})"),
            Self::Device { major, minor } => write!(f, "Device({major}:{minor})"),
            Self::Copy(source) => write!(f, "Copy({source:?})"),
            Self::Itself(source) => write!(f, "Itself({source:?})"),
        }
    }
}

/// The stand-ins of one copied root filesystem.
#[derive(Debug)]
pub(super) struct StandIns {
    /// Outside of the copy, on its file system: what was there, and what is thrown away.
    aside: PathBuf,
    put: Vec<Put>,
}

/// A stand-in in its place.
#[derive(Debug)]
struct Put {
    parent: OwnedFd,
    name: OsString,
    /// For messages.
    path: PathBuf,
    /// Where that is whose place it takes, if anything was there.
    original: Option<PathBuf>,
    /// It; kept open, so that no other file can get its number.
    ours: OwnedFd,
    /// Where it goes, if it is kept.
    home: Option<PathBuf>,
}

/// What came of taking stand-ins out.
#[derive(Debug, Default)]
pub(super) struct TakenOut {
    /// What was put back, open, with the directory that it is in.
    pub(super) restored: Vec<(OwnedFd, OwnedFd)>,
    /// What stood in and is not to be in any layer.
    pub(super) strangers: Vec<OwnedFd>,
}

impl StandIns {
    /// None yet; `aside` is a directory outside of the copy that is there and empty.
    pub(super) fn new(aside: PathBuf) -> Self {
        Self {
            aside,
            put: Vec::new(),
        }
    }

    /// Puts one into its place; returns whether it could be made: devices may be forbidden.
    ///
    /// # Errors
    /// [`RootfsError::Io`]. Nothing is in the place then, and [`Self::take_out`] restores it.
    pub(super) fn put(
        &mut self,
        root: &ConfinedDir,
        wanted: &StandIn,
    ) -> Result<bool, RootfsError> {
        let failed = |action| RootfsError::io(action, &wanted.path);
        let (parent, name) = place(root, &wanted.path).map_err(failed("finding the place of"))?;
        let number = self.put.len();
        let made = self.aside.join(format!("{number}.new"));
        let before = rustix::fs::statat(&parent, &name, AtFlags::SYMLINK_NOFOLLOW);
        let covered = match before {
            Ok(stat) => Some(stat),
            Err(Errno::NOENT) => None,
            Err(error) => return Err(failed("reading")(error.into())),
        };
        match make(&made, &wanted.kind, covered.as_ref()) {
            Err(Error::NoDevice) => return Ok(false),
            Err(Error::Io(error)) => return Err(failed("making what stands in for")(error)),
            Err(Error::Rootfs(error)) => return Err(error),
            Ok(()) => {}
        }
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let put = || {
            let ours = rustix::fs::open(&made, flags, Mode::empty())?;
            let time = mtime(&parent)?;
            let original = self.aside.join(format!("{number}.original"));
            if covered.is_some() {
                rustix::fs::renameat(&parent, &name, rustix::fs::CWD, &original)?;
            }
            let moved = rustix::fs::renameat(rustix::fs::CWD, &made, &parent, &name);
            if moved.is_err() && covered.is_some() {
                rustix::fs::renameat(rustix::fs::CWD, &original, &parent, &name)?;
            }
            set_mtime(&parent, time)?;
            moved.map(|()| (ours, covered.is_some().then_some(original)))
        };
        let (ours, original) = put()
            .map_err(io::Error::from)
            .map_err(failed("putting a stand-in for"))?;
        self.put.push(Put {
            parent,
            name,
            path: wanted.path.clone(),
            original,
            ours,
            home: match &wanted.kind {
                StandInKind::Itself(home) => Some(home.clone()),
                _ => None,
            },
        });
        Ok(true)
    }

    /// Takes all out, the last first, and puts back what was there. No process may use the
    /// filesystem any more.
    ///
    /// # Errors
    /// [`RootfsError::Io`], the first; the others are taken out all the same.
    pub(super) fn take_out(&mut self) -> Result<TakenOut, RootfsError> {
        let mut out = TakenOut::default();
        let mut result = Ok(());
        let aside = std::mem::take(&mut self.put);
        for (number, put) in aside.into_iter().enumerate().rev() {
            let junk = self.aside.join(format!("{number}.old"));
            let path = put.path.clone();
            let taken = put.take_out(&junk, &mut out);
            result = result.and(taken.map_err(RootfsError::io("restoring", &path)));
        }
        result.map(|()| out)
    }
}

impl Drop for StandIns {
    fn drop(&mut self) {
        // After an error: above all, what is kept goes back to where it belongs.
        if let Err(error) = self.take_out() {
            tracing::warn!(%error, "what stood in for mounts is not where it belongs");
        }
    }
}

impl Put {
    fn take_out(self, junk: &Path, out: &mut TakenOut) -> Result<(), Errno> {
        let time = mtime(&self.parent)?;
        let found = rustix::fs::statat(&self.parent, &self.name, AtFlags::SYMLINK_NOFOLLOW);
        let is_there = match found {
            Ok(found) => {
                let is_dir = FileType::from_raw_mode(found.st_mode) == FileType::Directory;
                // Also another directory: under a mount, what is in it would be what it was
                // changed to.
                let goes_home = self.home.as_deref().filter(|_| is_dir);
                let to = goes_home.unwrap_or(junk);
                rustix::fs::renameat(&self.parent, &self.name, rustix::fs::CWD, to)?;
                if goes_home.is_none() && !is_dir {
                    rustix::fs::unlink(junk)?;
                }
                goes_home.is_some()
            }
            Err(Errno::NOENT) => false,
            Err(error) => return Err(error),
        };
        if let (Some(home), false) = (&self.home, is_there) {
            // The process has moved or removed it, as it cannot do to a mount.
            rustix::fs::mkdir(home, Mode::from_raw_mode(0o755))?;
        }
        if let Some(original) = &self.original {
            match rustix::fs::renameat(rustix::fs::CWD, original, &self.parent, &self.name) {
                Ok(()) => {
                    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                    let fd = rustix::fs::openat(&self.parent, &self.name, flags, Mode::empty())?;
                    out.restored.push((fd, rustix::io::dup(&self.parent)?));
                }
                // The process has removed the directory around it.
                Err(Errno::NOENT) => {}
                Err(error) => return Err(error),
            }
        }
        set_mtime(&self.parent, time)?;
        // Also of what went home, if it is another directory than the one that came from there.
        out.strangers.push(self.ours);
        Ok(())
    }
}

/// The directory that `path` leads into, open for more than its name, and the name in it.
fn place(root: &ConfinedDir, path: &Path) -> io::Result<(OwnedFd, OsString)> {
    let resolved = stubs::resolve(root, path)?;
    let name = resolved.file_name().ok_or(Errno::INVAL)?.to_owned();
    let parent = resolved.parent().unwrap_or(Path::new(""));
    // What is missing lies in another stand-in: the rest are mount points that were made before.
    root.create_dir_all(parent, Mode::from_raw_mode(0o755))?;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW;
    Ok((root.open_exact(parent, flags, Mode::empty())?, name))
}

/// Why a stand-in was not made.
enum Error {
    NoDevice,
    Io(io::Error),
    Rootfs(RootfsError),
}

impl From<Errno> for Error {
    fn from(error: Errno) -> Self {
        Self::Io(error.into())
    }
}

impl From<io::Error> for Error {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

/// Makes it at `at`, where nothing is.
fn make(at: &Path, kind: &StandInKind, covered: Option<&Stat>) -> Result<(), Error> {
    match kind {
        StandInKind::Directory(mode) => {
            let mode = mode.unwrap_or_else(|| covered.map_or(0o755, |stat| stat.st_mode));
            fs::create_dir(at)?;
            set_mode(at, mode)?;
        }
        StandInKind::File {
            content,
            uid,
            gid,
            mode,
        } => {
            use std::io::Write as _;
            use std::os::unix::fs::OpenOptionsExt as _;
            let mut file = fs::File::options()
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(at)?;
            file.write_all(content)?;
            std::os::unix::fs::chown(at, Some(*uid), Some(*gid))?;
            set_mode(at, *mode)?;
        }
        StandInKind::Link(target) => std::os::unix::fs::symlink(target, at)?,
        StandInKind::Device { major, minor } => {
            let (kind, number) = (FileType::CharacterDevice, makedev(*major, *minor));
            match rustix::fs::mknodat(rustix::fs::CWD, at, kind, Mode::empty(), number) {
                Err(Errno::PERM) => return Err(Error::NoDevice),
                made => made?,
            }
            set_mode(at, 0o666)?;
            // Made is not yet usable: the file system, or who guards devices, may forbid that.
            if let Err(error) = fs::File::open(at)
                && error.kind() == io::ErrorKind::PermissionDenied
            {
                fs::remove_file(at)?;
                return Err(Error::NoDevice);
            }
        }
        StandInKind::Copy(source) => copy(source, at)?,
        StandInKind::Itself(source) => fs::rename(source, at)?,
    }
    Ok(())
}

fn set_mode(path: &Path, mode: u32) -> Result<(), Errno> {
    let mode = Mode::from_raw_mode(mode & 0o7777);
    rustix::fs::chmodat(rustix::fs::CWD, path, mode, AtFlags::empty())
}

fn copy(source: &Path, at: &Path) -> Result<(), Error> {
    let found = fs::metadata(source)?;
    if found.file_type().is_socket() {
        fs::hard_link(source, at)?;
        return Ok(());
    }
    if found.is_dir() {
        let work = at.with_extension("copy");
        fs::create_dir(&work)?;
        let stack = Stack::new(vec![Tree::open(source)?]);
        let copied = Copied::make(&stack, &work, false, None).map_err(Error::Rootfs)?;
        fs::rename(copied.path(), at)?;
        fs::remove_dir(&work)?;
    } else {
        fs::copy(source, at)?;
    }
    let fd = rustix::fs::open(at, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    let metadata = Metadata {
        mode: found.mode() & 0o7777,
        uid: found.uid(),
        gid: found.gid(),
        mtime: super::Time {
            seconds: found.mtime(),
            nanoseconds: u32::try_from(found.mtime_nsec()).unwrap_or_default(),
        },
        ..Metadata::default()
    };
    dress(&fd, at, &metadata, true).map_err(Error::Rootfs)
}

/// Removes a stand-in that was found at `name` in `dir`, whatever it is; `aside` is a directory
/// outside of the copy. The directory's time stays.
pub(super) fn remove_stranger(dir: impl AsFd, name: &OsStr, aside: &Path) -> Result<(), io::Error> {
    let time = mtime(&dir)?;
    let junk = aside.join("stranger");
    rustix::fs::renameat(&dir, name, rustix::fs::CWD, &junk)?;
    set_mtime(&dir, time)?;
    if fs::symlink_metadata(&junk)?.is_dir() {
        confined::remove_tree(&junk)
    } else {
        fs::remove_file(&junk)
    }
}

#[allow(
    clippy::unnecessary_cast,
    reason = "the fields' types differ between architectures"
)]
fn mtime(dir: impl AsFd) -> Result<Timespec, Errno> {
    let stat = rustix::fs::fstat(dir)?;
    Ok(Timespec {
        tv_sec: stat.st_mtime as _,
        tv_nsec: stat.st_mtime_nsec as _,
    })
}

fn set_mtime(dir: impl AsFd, time: Timespec) -> Result<(), Errno> {
    let times = Timestamps {
        last_access: Timespec {
            tv_sec: 0,
            tv_nsec: rustix::fs::UTIME_OMIT,
        },
        last_modification: time,
    };
    rustix::fs::futimens(dir, &times)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::super::testing::{in_worlds, line, tree_of};
    use super::super::{Backend, Rootfs, changes};
    use super::*;

    const BASE: &[&str] = &[
        "777 conf -> etc",
        "700 dev/",
        "644 dev/mine = x",
        "755 etc/",
        "640 etc/hosts = of the image",
    ];

    fn stand_in(path: &str, kind: StandInKind) -> StandIn {
        StandIn {
            path: path.into(),
            kind,
        }
    }

    fn file(path: &str, text: &str) -> StandIn {
        let kind = StandInKind::File {
            content: text.into(),
            uid: 0,
            gid: 0,
            mode: 0o644,
        };
        stand_in(path, kind)
    }

    /// Puts `wanted` into a small image, does `act` as the process would, and compares what is
    /// left: the lines of the layer.
    fn check(wanted: &[StandIn], act: impl Fn(&Path), want: &[&str]) {
        let (_base, base) = tree_of(BASE);
        let lower = Stack::new(vec![base]);
        let scratch = tempfile::tempdir().unwrap();
        let mut rootfs: Rootfs = Backend::CopyWithoutDevices
            .open(&lower, scratch.path())
            .unwrap();
        let missing = rootfs.put_stand_ins(wanted).unwrap();
        assert_eq!(missing, [] as [PathBuf; 0]);
        act(rootfs.path());
        let upper = Tree::open(&rootfs.finish().unwrap().upper).unwrap();
        let got: Vec<String> = changes(&upper, &lower).map(|c| line(c.unwrap())).collect();
        assert_eq!(got, want);
        // Nothing is left beside the layer.
        let left: Vec<_> = fs::read_dir(scratch.path()).unwrap().flatten().collect();
        assert_eq!(left.len(), 1, "{left:?}");
    }

    #[test]
    fn sandbox_stand_ins_leave_no_trace() {
        in_worlds(module_path!(), "sandbox_stand_ins_leave_no_trace", || {
            let all = [
                stand_in("/dev", StandInKind::Directory(Some(0o755))),
                stand_in("/dev/fd", StandInKind::Link("/proc/self/fd".into())),
                stand_in("/dev/shm", StandInKind::Directory(Some(0o1777))),
                file("/conf/hosts", "of the step"),
                file("/dev/deep/in/it", "x"),
            ];
            let look = |root: &Path| {
                let text = fs::read_to_string(root.join("etc/hosts")).unwrap();
                assert_eq!(text, "of the step");
                assert_eq!(fs::metadata(root.join("dev")).unwrap().mode(), 0o40755);
                assert!(!root.join("dev/mine").exists());
                assert!(root.join("dev/deep/in/it").exists());
            };
            check(&all, look, &[]);
            // Whatever the process does to them.
            let write = |root: &Path| {
                fs::write(root.join("etc/hosts"), "changed").unwrap();
                fs::write(root.join("dev/new"), "x").unwrap();
            };
            check(&all, write, &[]);
            let replace = |root: &Path| {
                fs::remove_file(root.join("etc/hosts")).unwrap();
                symlink("/elsewhere", root.join("etc/hosts")).unwrap();
                fs::remove_dir_all(root.join("dev")).unwrap();
                fs::write(root.join("dev"), "no directory").unwrap();
            };
            check(&all, replace, &[]);
            // Also under other names, and in new directories.
            let spread = |root: &Path| {
                fs::create_dir_all(root.join("new/below")).unwrap();
                fs::hard_link(root.join("etc/hosts"), root.join("new/below/linked")).unwrap();
                fs::rename(root.join("etc/hosts"), root.join("etc/moved")).unwrap();
                fs::rename(root.join("dev"), root.join("new/dev")).unwrap();
            };
            check(&all, spread, &["755 new/", "755 new/below/"]);
            // With the directory around it moved, what was there moves along.
            let move_parent = |root: &Path| {
                fs::rename(root.join("etc"), root.join("etc2")).unwrap();
            };
            check(
                &all,
                move_parent,
                &["-etc", "755 etc2/", "640 etc2/hosts = of the image"],
            );
        });
    }

    #[test]
    fn sandbox_what_is_kept_goes_home_and_what_is_copied_does_not() {
        in_worlds(
            module_path!(),
            "sandbox_what_is_kept_goes_home_and_what_is_copied_does_not",
            || {
                let outside = tempfile::tempdir().unwrap();
                let make = |name: &str| {
                    let path = outside.path().join(name);
                    fs::create_dir(&path).unwrap();
                    fs::write(path.join("file"), name).unwrap();
                    path
                };
                let (kept, copied) = (make("kept"), make("copied"));
                let wanted = [
                    stand_in("/etc/kept", StandInKind::Itself(kept.clone())),
                    stand_in("/etc/kept/copied", StandInKind::Copy(copied.clone())),
                    stand_in("/etc/one", StandInKind::Copy(copied.join("file"))),
                ];
                let write = |root: &Path| {
                    assert!(!kept.exists());
                    for name in ["kept/file", "kept/copied/file", "one"] {
                        fs::write(root.join("etc").join(name), "written").unwrap();
                    }
                };
                check(&wanted, write, &[]);
                let text = |path: &Path| fs::read_to_string(path.join("file")).unwrap();
                assert_eq!(
                    (text(&kept), text(&copied)),
                    ("written".into(), "copied".into())
                );
                assert!(!kept.join("copied").exists());
                // Where the process has thrown it away, it is empty as under a mount.
                let remove = |root: &Path| fs::remove_dir_all(root.join("etc/kept")).unwrap();
                check(&wanted[..1], remove, &[]);
                assert_eq!(fs::read_dir(&kept).unwrap().count(), 0);
                // A build that ends before it is begun gives it back, too.
                let (_base, base) = tree_of(BASE);
                let scratch = tempfile::tempdir().unwrap();
                let stack = Stack::new(vec![base]);
                let mut rootfs = Backend::Copy.open(&stack, scratch.path()).unwrap();
                rootfs.put_stand_ins(&wanted[..1]).unwrap();
                assert!(!kept.exists());
                drop(rootfs);
                assert!(kept.exists());
            },
        );
    }
}
