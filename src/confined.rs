//! [`ConfinedDir`]: names that somebody else chose, resolved inside one directory.
//!
//! Every path is resolved by the kernel with `openat2` and `RESOLVE_IN_ROOT`: the
//! directory is the root, `..` stops there, and absolute links start there, exactly
//! as they would for a process whose root it is. Nothing ever joins strings.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Mode, OFlags, ResolveFlags, Stat};

/// A directory outside of which nothing is opened, whatever the paths and links say.
#[derive(Debug)]
pub struct ConfinedDir {
    fd: OwnedFd,
    path: PathBuf,
}

const IN_ROOT: ResolveFlags = ResolveFlags::IN_ROOT.union(ResolveFlags::NO_MAGICLINKS);

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
                Err(rustix::io::Errno::AGAIN) => {}
                other => return Ok(other?),
            }
        }
    }

    /// Opens the directory that holds the last component of `path`, following links
    /// in all parents, and returns it with that component; the component is not followed.
    ///
    /// # Errors
    /// `EINVAL` where `path` ends in `..` or names the directory itself; those of `openat2(2)`.
    pub fn open_parent<'p>(&self, path: &'p Path) -> io::Result<(OwnedFd, &'p std::ffi::OsStr)> {
        let name = path.file_name().ok_or(rustix::io::Errno::INVAL)?;
        let parent = path.parent().unwrap_or(Path::new(""));
        let fd = self.open_at(parent, OFlags::PATH | OFlags::DIRECTORY, Mode::empty())?;
        Ok((fd, name))
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

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn links_and_dots_stay_inside() {
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
}
