//! [`ConfinedDir`]: names that somebody else chose, resolved inside one directory.
//!
//! Every path is resolved by the kernel with `openat2` and `RESOLVE_IN_ROOT`: the
//! directory is the root, `..` stops there, and absolute links start there, exactly
//! as they would for a process whose root it is. Nothing ever joins strings.
//!
//! [`remove_tree`] is the counterpart for removing: it follows no link and enters
//! no other mount.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, ResolveFlags, Stat};
use rustix::io::Errno;

/// A directory outside of which nothing is opened, whatever the paths and links say.
#[derive(Debug)]
pub struct ConfinedDir {
    fd: OwnedFd,
    path: PathBuf,
}

const IN_ROOT: ResolveFlags = ResolveFlags::IN_ROOT.union(ResolveFlags::NO_MAGICLINKS);

const EXACT: ResolveFlags = ResolveFlags::BENEATH
    .union(ResolveFlags::NO_SYMLINKS)
    .union(ResolveFlags::NO_MAGICLINKS)
    .union(ResolveFlags::NO_XDEV);

/// Bytes of a path that are given to the kernel at once, which takes less than 4096
/// (`PATH_MAX`). Room for one more name of 255 bytes is left.
const PIECE_BYTES: usize = 3800;

impl ConfinedDir {
    /// Opens `path`, which is trusted and may lead through links.
    ///
    /// # Errors
    /// Those of `open(2)`; not a directory is `ENOTDIR`.
    pub fn open(path: &Path) -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = rustix::fs::open(path, flags, Mode::empty())?;
        Ok(Self {
            fd,
            path: path.to_owned(),
        })
    }

    /// Where it was when it was opened; for messages, never for opening.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Opens `path` inside, following links inside. An empty path is the directory itself.
    ///
    /// # Errors
    /// Those of `openat2(2)`.
    pub fn open_at(&self, path: &Path, flags: OFlags, mode: Mode) -> io::Result<OwnedFd> {
        let path = if path.as_os_str().is_empty() {
            Path::new(".")
        } else {
            path
        };
        loop {
            let flags = flags | OFlags::CLOEXEC;
            match rustix::fs::openat2(&self.fd, path, flags, mode, IN_ROOT) {
                // The kernel asks to try again where a rename elsewhere raced with the look-up.
                Err(Errno::AGAIN) => {}
                other => return Ok(other?),
            }
        }
    }

    /// Opens exactly `path` (relative, without `..`): no component may be a link or lie
    /// on another mount. It may be longer than `PATH_MAX`. An empty path is the
    /// directory itself. With `O_PATH | O_NOFOLLOW` a link as last component is opened itself.
    ///
    /// # Errors
    /// Those of `openat2(2)`: `ELOOP` for a link, `EXDEV` for a mount point, a `..` that
    /// leads outside, or an absolute path.
    pub fn open_exact(&self, path: &Path, flags: OFlags, mode: Mode) -> io::Result<OwnedFd> {
        open_exact(self.fd.as_fd(), path, flags, mode)
    }

    /// Opens the directory that holds the last component of `path` as [`Self::open_exact`]
    /// does, and returns it with that component.
    ///
    /// # Errors
    /// `EINVAL` where `path` ends in `..` or names the directory itself; those of [`Self::open_exact`].
    pub fn open_exact_parent<'p>(&self, path: &'p Path) -> io::Result<(OwnedFd, &'p OsStr)> {
        let name = path.file_name().ok_or(Errno::INVAL)?;
        let parent = path.parent().unwrap_or(Path::new(""));
        let fd = self.open_exact(parent, OFlags::PATH | OFlags::DIRECTORY, Mode::empty())?;
        Ok((fd, name))
    }

    /// Opens the directory that holds the last component of `path`, following links
    /// in all parents, and returns it with that component; the component is not followed.
    ///
    /// # Errors
    /// `EINVAL` where `path` ends in `..` or names the directory itself; those of `openat2(2)`.
    pub fn open_parent<'p>(&self, path: &'p Path) -> io::Result<(OwnedFd, &'p OsStr)> {
        let name = path.file_name().ok_or(Errno::INVAL)?;
        let parent = path.parent().unwrap_or(Path::new(""));
        let fd = self.open_at(parent, OFlags::PATH | OFlags::DIRECTORY, Mode::empty())?;
        Ok((fd, name))
    }

    /// Makes the directory `path` and its parents where they are missing, following links.
    ///
    /// # Errors
    /// `ENOTDIR` where something else is in the way; those of `mkdirat(2)`.
    pub fn create_dir_all(&self, path: &Path, mode: Mode) -> io::Result<()> {
        let mut made = PathBuf::new();
        for component in path.components() {
            made.push(component);
            match self.open_at(&made, OFlags::PATH | OFlags::DIRECTORY, Mode::empty()) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    let (parent, name) = self.open_parent(&made)?;
                    make_dir(parent, name, mode)?;
                }
                other => drop(other?),
            }
        }
        Ok(())
    }

    /// The metadata of `path`; its last component is not followed.
    ///
    /// # Errors
    /// Those of `openat2(2)` and `fstatat(2)`.
    pub fn lstat(&self, path: &Path) -> io::Result<Stat> {
        if path.file_name().is_none() {
            let fd = self.open_at(path, OFlags::PATH, Mode::empty())?;
            return Ok(rustix::fs::fstat(fd)?);
        }
        let (parent, name) = self.open_parent(path)?;
        Ok(rustix::fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW)?)
    }
}

impl AsFd for ConfinedDir {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Makes the directory `name` in `parent` with exactly this mode, whatever the process's umask.
///
/// The mode goes through a descriptor: by name, it would be given to wherever a link leads that
/// has taken the directory's place since, as whoever else writes to `parent` may arrange it.
///
/// # Errors
/// Those of `mkdirat(2)`; `ENOTDIR` where something else has taken its place.
pub(crate) fn make_dir(parent: impl AsFd, name: &OsStr, mode: Mode) -> Result<(), Errno> {
    rustix::fs::mkdirat(&parent, name, mode)?;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let made = rustix::fs::openat(&parent, name, flags, Mode::empty())?;
    rustix::fs::fchmod(made, mode)
}

fn open_exact(dir: BorrowedFd<'_>, path: &Path, flags: OFlags, mode: Mode) -> io::Result<OwnedFd> {
    let one = |dir: BorrowedFd<'_>, path: &Path, flags: OFlags, mode: Mode| loop {
        match rustix::fs::openat2(dir, path, flags | OFlags::CLOEXEC, mode, EXACT) {
            Err(Errno::AGAIN) => {}
            other => return other,
        }
    };
    if path.as_os_str().is_empty() {
        return Ok(one(dir, Path::new("."), flags, mode)?);
    }
    if path.as_os_str().len() <= PIECE_BYTES {
        return Ok(one(dir, path, flags, mode)?);
    }
    let mut here: Option<OwnedFd> = None;
    let mut piece = PathBuf::new();
    for component in path {
        if piece.as_os_str().len() > PIECE_BYTES {
            let from = here.as_ref().map_or(dir, AsFd::as_fd);
            let step = OFlags::PATH | OFlags::DIRECTORY;
            here = Some(one(from, &piece, step, Mode::empty())?);
            piece.clear();
        }
        piece.push(component);
    }
    let from = here.as_ref().map_or(dir, AsFd::as_fd);
    Ok(one(from, &piece, flags, mode)?)
}

/// A directory on the way down of [`remove_tree`].
struct Level {
    name: OsString,
    /// Device and inode, by which it is recognised on the way up.
    id: (u64, u64),
    /// Directories inside that are still to be removed.
    left: Vec<OsString>,
}

/// Removes the directory `path` and everything in it.
///
/// The walk goes by descriptors, follows no link and never enters another mount, so
/// that a forgotten mount costs an error and not what is mounted there. It holds one
/// descriptor however deep the directories are, and opens up directories that forbid
/// their owner to read or change them. What disappears meanwhile counts as removed.
///
/// # Errors
/// [`io::ErrorKind::ResourceBusy`], naming the place, on meeting a mount point: it and
/// everything below it are untouched. Otherwise those of `openat2(2)` and `unlinkat(2)`,
/// with the path. In every case some of the rest may be gone already.
pub fn remove_tree(path: &Path) -> io::Result<()> {
    let name = path.file_name().ok_or(Errno::INVAL)?;
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let outside = rustix::fs::open(parent, flags, Mode::empty())?;

    let (mut here, top) = enter(outside.as_fd(), name, || path.to_owned())?;
    let mut levels = vec![top];
    loop {
        let place = |levels: &[Level], name: &OsStr| {
            let mut place = path.to_owned();
            place.extend(levels.iter().skip(1).map(|level| &level.name));
            place.push(name);
            place
        };
        let level = levels
            .last_mut()
            .expect("the loop ends with the first level");
        if let Some(name) = level.left.pop() {
            let entered = enter(here.as_fd(), &name, || place(&levels, &name));
            match entered {
                Ok((fd, level)) => {
                    here = fd;
                    levels.push(level);
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
            continue;
        }
        let done = levels.pop().expect("it was there above");
        let Some(above) = levels.last() else {
            return ignore_gone(rustix::fs::unlinkat(&outside, name, AtFlags::REMOVEDIR))
                .map_err(|error| failure(error, path));
        };
        let failed = |error| failure(error, &place(&levels, &done.name));
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        here = rustix::fs::openat(&here, "..", flags, Mode::empty()).map_err(failed)?;
        if identity(&rustix::fs::fstat(&here).map_err(failed)?) != above.id {
            // Somebody moved it: what is above now is none of ours.
            return Err(failed(Errno::STALE));
        }
        ignore_gone(rustix::fs::unlinkat(&here, &done.name, AtFlags::REMOVEDIR)).map_err(failed)?;
    }
}

/// Opens the directory `name` in `dir`, removes everything in it but directories, and lists those.
fn enter(
    dir: BorrowedFd<'_>,
    name: &OsStr,
    place: impl Fn() -> PathBuf,
) -> io::Result<(OwnedFd, Level)> {
    let failed = |error| failure(error, &place());
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW;
    let open = |flags| open_exact(dir, Path::new(name), flags, Mode::empty());
    let fd = match open(flags) {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            // O_PATH needs no permission on the directory itself, and chmod of the
            // descriptor cannot be led elsewhere.
            let path = open(flags | OFlags::PATH)?;
            let itself = format!("/proc/self/fd/{}", path.as_raw_fd());
            rustix::fs::chmod(itself, Mode::RWXU).map_err(failed)?;
            open(flags)
        }
        other => other,
    }
    .map_err(|error| match Errno::from_io_error(&error) {
        Some(errno) => failed(errno),
        None => error,
    })?;
    let stat = rustix::fs::fstat(&fd).map_err(failed)?;
    if !Mode::from_raw_mode(stat.st_mode).contains(Mode::RWXU) {
        // Where this is not allowed, privilege may make it unnecessary; if not, the
        // removals below say so.
        let _ = rustix::fs::fchmod(&fd, Mode::RWXU);
    }
    let mut left = Vec::new();
    for (name, file_type) in list(fd.as_fd()).map_err(failed)? {
        if file_type == FileType::Directory {
            left.push(name);
        } else {
            ignore_gone(rustix::fs::unlinkat(&fd, &name, AtFlags::empty()))
                .map_err(|error| failure(error, &place().join(&name)))?;
        }
    }
    let level = Level {
        name: name.to_owned(),
        id: identity(&stat),
        left,
    };
    Ok((fd, level))
}

fn identity(stat: &Stat) -> (u64, u64) {
    (stat.st_dev, stat.st_ino)
}

fn ignore_gone(result: Result<(), Errno>) -> Result<(), Errno> {
    match result {
        Err(Errno::NOENT) => Ok(()),
        other => other,
    }
}

fn failure(error: Errno, path: &Path) -> io::Error {
    let path = path.display();
    match error {
        // `openat2` says the first of a directory, `unlinkat` the second of a file.
        Errno::XDEV | Errno::BUSY => io::Error::new(
            io::ErrorKind::ResourceBusy,
            format!("{path} is a mount point; nothing below it was removed; unmount it first"),
        ),
        Errno::STALE => io::Error::new(
            io::ErrorKind::StaleNetworkFileHandle,
            format!("{path} was moved while it was being removed"),
        ),
        error => {
            let error = io::Error::from(error);
            io::Error::new(error.kind(), format!("removing {path}: {error}"))
        }
    }
}

/// Names and types of everything in the directory `fd` but `.` and `..`, in no order.
pub(crate) fn list(fd: BorrowedFd<'_>) -> Result<Vec<(OsString, FileType)>, Errno> {
    use std::os::unix::ffi::OsStrExt;
    let mut entries = Vec::new();
    for entry in Dir::read_from(fd)? {
        let entry = entry?;
        let name = entry.file_name();
        if name == c"." || name == c".." {
            continue;
        }
        let file_type = match entry.file_type() {
            // Some file systems do not say it here.
            FileType::Unknown => match rustix::fs::statat(fd, name, AtFlags::SYMLINK_NOFOLLOW) {
                Ok(stat) => FileType::from_raw_mode(stat.st_mode),
                Err(Errno::NOENT) => continue,
                Err(error) => return Err(error),
            },
            known => known,
        };
        entries.push((OsStr::from_bytes(name.to_bytes()).to_owned(), file_type));
    }
    Ok(entries)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{PermissionsExt as _, symlink};
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    #[test]
    fn security_s04_links_and_dots_stay_inside() {
        let outside = tempfile::tempdir().unwrap();
        std::fs::write(outside.path().join("canary"), "outside").unwrap();
        let inside = outside.path().join("root");
        std::fs::create_dir(&inside).unwrap();
        std::fs::write(inside.join("canary"), "inside").unwrap();
        symlink("../canary", inside.join("up")).unwrap();
        symlink("/canary", inside.join("absolute")).unwrap();
        symlink("/proc/self/root", inside.join("magic")).unwrap();

        let dir = ConfinedDir::open(&inside).unwrap();
        for path in ["canary", "/canary", "../../canary", "up", "absolute"] {
            let fd = dir
                .open_at(Path::new(path), OFlags::RDONLY, Mode::empty())
                .unwrap();
            let text = io::read_to_string(std::fs::File::from(fd)).unwrap();
            assert_eq!(text, "inside", "{path}");
        }
        let error = dir
            .open_at(Path::new("magic"), OFlags::PATH, Mode::empty())
            .unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
        let link = dir.lstat(Path::new("up")).unwrap();
        assert_eq!(
            rustix::fs::FileType::from_raw_mode(link.st_mode),
            rustix::fs::FileType::Symlink
        );
    }

    #[test]
    fn exact_paths_are_of_any_length_and_have_no_links() {
        let dir = tempfile::tempdir().unwrap();
        let name = "n".repeat(250);
        let root = ConfinedDir::open(dir.path()).unwrap();
        let mut path = PathBuf::new();
        for _ in 0..40 {
            let (parent, ()) = (
                root.open_exact(&path, OFlags::PATH, Mode::empty()).unwrap(),
                (),
            );
            rustix::fs::mkdirat(parent, &name, Mode::RWXU).unwrap();
            path.push(&name);
        }
        assert!(path.as_os_str().len() > 10_000);
        path.push("file");
        let (parent, name) = root.open_exact_parent(&path).unwrap();
        rustix::fs::symlinkat("..", parent, name).unwrap();
        let flags = OFlags::PATH | OFlags::NOFOLLOW;
        let link = root.open_exact(&path, flags, Mode::empty()).unwrap();
        let stat = rustix::fs::fstat(link).unwrap();
        assert_eq!(FileType::from_raw_mode(stat.st_mode), FileType::Symlink);

        let check = |path: &Path, want: Errno| {
            let error = root
                .open_exact(path, OFlags::PATH, Mode::empty())
                .unwrap_err();
            assert_eq!(Errno::from_io_error(&error), Some(want));
        };
        check(&path, Errno::LOOP);
        check(&path.join("x"), Errno::LOOP);
        check(Path::new("../x"), Errno::XDEV);
        check(Path::new("/etc"), Errno::XDEV);
        check(Path::new("none"), Errno::NOENT);
        remove_tree(dir.path()).unwrap();
    }

    /// Names that change while they are used: a directory and a link out of the root take turns,
    /// as in CVE-2024-23651, where steps beside each other had one cache.
    #[test]
    fn security_s07_a_name_that_changes_hands_leads_nowhere() {
        const SWAPS: u32 = 10_000;
        let dir = tempfile::tempdir().unwrap();
        let (root, outside) = (dir.path().join("root"), dir.path().join("outside"));
        fs::create_dir_all(root.join("name")).unwrap();
        fs::create_dir(&outside).unwrap();
        for (place, text) in [(&outside, "canary"), (&root.join("name"), "inside")] {
            fs::write(place.join("file"), text).unwrap();
        }
        symlink(&outside, root.join("link")).unwrap();
        let confined = ConfinedDir::open(&root).unwrap();
        let stop = AtomicBool::new(false);
        let read = |fd: OwnedFd| io::read_to_string(fs::File::from(fd)).unwrap();
        std::thread::scope(|scope| {
            let swapping = scope.spawn(|| {
                let swap = rustix::fs::RenameFlags::EXCHANGE;
                let mut swaps = 0;
                while swaps < SWAPS || !stop.load(Ordering::Relaxed) {
                    rustix::fs::renameat_with(&confined, "name", &confined, "link", swap).unwrap();
                    swaps += 1;
                }
                swaps
            });
            let (mut inside, mut outside) = (0, 0);
            for number in 0..SWAPS {
                let name = Path::new("name/file");
                let got = match number % 3 {
                    0 => confined.open_at(name, OFlags::RDONLY, Mode::empty()),
                    1 => confined.open_exact(name, OFlags::RDONLY, Mode::empty()),
                    _ => confined.open_parent(name).and_then(|(parent, name)| {
                        Ok(rustix::fs::openat(
                            parent,
                            name,
                            OFlags::RDONLY,
                            Mode::empty(),
                        )?)
                    }),
                };
                match got.map(read).as_deref() {
                    Ok("inside") => inside += 1,
                    Ok(_) => outside += 1,
                    Err(_) => {}
                }
                let made = format!("name/{number}");
                let _ = confined.create_dir_all(Path::new(&made), Mode::from_raw_mode(0o700));
            }
            stop.store(true, Ordering::Relaxed);
            assert!(inside > 0 && swapping.join().unwrap() >= SWAPS);
            assert_eq!(outside, 0);
        });
        let left = fs::read_dir(&outside).unwrap();
        let left: Vec<_> = left.map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left, ["file"]);
    }

    /// The mode of a new directory is not given to what has taken its place meanwhile.
    #[test]
    fn security_s07_the_mode_of_a_new_directory_is_given_to_nothing_else() {
        const TURNS: u32 = 10_000;
        let dir = tempfile::tempdir().unwrap();
        let (root, canary) = (dir.path().join("root"), dir.path().join("canary"));
        fs::create_dir(&root).unwrap();
        fs::write(&canary, "").unwrap();
        rustix::fs::chmod(&canary, Mode::from_raw_mode(0o600)).unwrap();
        let confined = ConfinedDir::open(&root).unwrap();
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let swap = rustix::fs::RenameFlags::EXCHANGE;
                while !stop.load(Ordering::Relaxed) {
                    let _ = rustix::fs::renameat_with(&confined, "new", &confined, "link", swap);
                }
            });
            for _ in 0..TURNS {
                for name in ["new", "link"] {
                    let _ = rustix::fs::unlinkat(&confined, name, AtFlags::empty());
                    let _ = rustix::fs::unlinkat(&confined, name, AtFlags::REMOVEDIR);
                }
                let _ = rustix::fs::symlinkat(&canary, &confined, "link");
                let _ = confined.create_dir_all(Path::new("new"), Mode::from_raw_mode(0o755));
            }
            stop.store(true, Ordering::Relaxed);
        });
        let mode = fs::metadata(&canary).unwrap().permissions().mode() & 0o7777;
        assert_eq!(mode, 0o600, "{mode:o}");
    }

    #[test]
    fn security_s08_everything_is_removed_and_nothing_else() {
        use std::ffi::OsStr;
        use std::fs::{self, Permissions};
        use std::os::unix::ffi::OsStrExt;
        use std::os::unix::fs::PermissionsExt;

        let outside = tempfile::tempdir().unwrap();
        let canary = outside.path().join("canary");
        fs::create_dir(&canary).unwrap();
        fs::write(canary.join("file"), "alive").unwrap();
        let dir = outside.path().join("dir");
        fs::create_dir_all(dir.join("sub/empty")).unwrap();
        symlink(&canary, dir.join("link")).unwrap();
        symlink("../../canary", dir.join("sub/link")).unwrap();
        for name in [&b"new\nline"[..], b"\xff\xfe", b"-rf", b" ", b"..."] {
            fs::write(dir.join(OsStr::from_bytes(name)), "x").unwrap();
            fs::create_dir(dir.join("sub").join(OsStr::from_bytes(name))).unwrap();
        }
        // Many entries, so that a directory is read in several parts.
        fs::create_dir(dir.join("many")).unwrap();
        for n in 0..3000 {
            fs::write(dir.join(format!("many/{n}")), "").unwrap();
        }
        for mode in [0o000, 0o100, 0o400, 0o500] {
            let closed = dir.join(format!("closed{mode:o}"));
            fs::create_dir_all(closed.join("below")).unwrap();
            fs::write(closed.join("below/file"), "").unwrap();
            fs::set_permissions(closed.join("below"), Permissions::from_mode(mode)).unwrap();
            fs::set_permissions(&closed, Permissions::from_mode(mode)).unwrap();
        }
        // Deeper than a process has descriptors or a stack has frames.
        let mut here = rustix::fs::open(&dir, OFlags::PATH, Mode::empty()).unwrap();
        for _ in 0..8000 {
            rustix::fs::mkdirat(&here, "deep", Mode::RWXU).unwrap();
            here = rustix::fs::openat(&here, "deep", OFlags::PATH, Mode::empty()).unwrap();
        }
        drop(here);

        remove_tree(&dir).unwrap();
        assert!(!dir.exists());
        assert_eq!(fs::read_to_string(canary.join("file")).unwrap(), "alive");

        let check = |path: &Path, want: io::ErrorKind| {
            assert_eq!(remove_tree(path).unwrap_err().kind(), want, "{path:?}");
        };
        check(&dir, io::ErrorKind::NotFound);
        check(&canary.join("file"), io::ErrorKind::NotADirectory);
        symlink(&canary, &dir).unwrap();
        assert!(remove_tree(&dir).is_err());
        assert_eq!(fs::read_to_string(canary.join("file")).unwrap(), "alive");
    }

    #[test]
    fn security_s08_sandbox_what_is_mounted_is_not_removed() {
        use std::fs;
        // A forgotten bind mount once emptied a machine's /dev.
        crate::rootfs::in_worlds(
            module_path!(),
            "security_s08_sandbox_what_is_mounted_is_not_removed",
            || {
                let outside = tempfile::tempdir().unwrap();
                let canary = outside.path().join("canary");
                fs::create_dir(&canary).unwrap();
                fs::write(canary.join("file"), "alive").unwrap();
                let check = |target: &str, source: &Path, want: &str| {
                    let dir = outside.path().join("dir");
                    fs::create_dir_all(dir.join("a/b")).unwrap();
                    fs::write(dir.join("a/f"), "").unwrap();
                    let target = dir.join(target);
                    rustix::mount::mount_bind_recursive(source, &target).unwrap();
                    let error = remove_tree(&dir).unwrap_err();
                    assert_eq!(error.kind(), io::ErrorKind::ResourceBusy);
                    let want = format!(
                        "{} is a mount point; nothing below it was removed; unmount it first",
                        outside.path().join(want).display()
                    );
                    assert_eq!(error.to_string(), want);
                    assert_eq!(fs::read_to_string(canary.join("file")).unwrap(), "alive");
                    rustix::mount::unmount(&target, rustix::mount::UnmountFlags::empty()).unwrap();
                    remove_tree(&dir).unwrap();
                    assert!(!dir.exists());
                };
                check("a/b", &canary, "dir/a/b");
                check("a/f", &canary.join("file"), "dir/a/f");
                check("", &canary, "dir");
                // The same file system, and a part of the very tree.
                check("a/b", &outside.path().join("dir"), "dir/a/b");
            },
        );
    }
}
