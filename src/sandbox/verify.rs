//! Looks, from inside, whether what protects the host is what it should be, before the step begins.
//!
//! A runtime mounts by paths in a root filesystem that somebody else made. Runtimes have been led
//! elsewhere by links in it, or by a second container that moved things about meanwhile, and
//! masked nothing or something of the host's: CVE-2019-16884, CVE-2025-31133 and its kin. So `__init`
//! opens what was mounted, without following links, and asks the open files what they are: names may
//! change afterwards, but nothing has run in this root filesystem yet, and no other step has it.
//!
//! Most of such holes find less here than in the runtimes they are known from: `/dev`, `/sys`, and what
//! steps mount are made by this program, by file descriptors (`mounts`); a runtime mounts `/proc`,
//! masks, and `/dev/mqueue`, on a `/dev` that is ours.

use std::io;
use std::os::fd::OwnedFd;

use rustix::fs::{CWD, Dir, FileType, Mode, OFlags, StatVfsMountFlags};

use super::Security;
use super::mounts::{DEVICES, MASKED_DIRS, MASKED_FILES, MASKED_SYS, READ_ONLY};
use super::wire::{Doing, Failure, Launch};

/// The kinds of file systems, of `statfs(2)`.
const PROC_MAGIC: rustix::fs::FsWord = 0x9fa0;
const SYSFS_MAGIC: rustix::fs::FsWord = 0x6265_6572;
const TMPFS_MAGIC: rustix::fs::FsWord = 0x0102_1994;

/// Refuses to begin where `/proc`, `/sys` or `/dev` are not as a step must have them.
///
/// # Errors
/// What is there instead.
pub(super) fn check(launch: &Launch) -> Result<(), Failure> {
    let proc = Place::open("/proc")?;
    proc.must(proc.is_of(PROC_MAGIC), "it is no procfs")?;
    let dev = Place::open("/dev")?;
    dev.must(dev.is_of(TMPFS_MAGIC), "it is no tmpfs")?;
    for (name, major, minor) in DEVICES {
        let device = dev.below(name)?;
        let device = device.ok_or_else(|| wrong(&format!("/dev/{name}"), "it is missing"))?;
        device.must(device.is_device(major, minor), "it is another file")?;
    }
    if launch.process.security == Security::Insecure {
        return Ok(());
    }
    for path in MASKED_FILES {
        if let Some(file) = proc.inside(path)? {
            file.must(file.is_device(1, 3), "it is not masked")?;
        }
    }
    for path in MASKED_DIRS {
        if let Some(dir) = proc.inside(path)? {
            dir.must_be_masked()?;
        }
    }
    for path in READ_ONLY {
        if let Some(place) = proc.inside(path)? {
            place.must(place.is_of(PROC_MAGIC), "it is not of procfs")?;
            place.must(place.is_read_only(), "it can be written")?;
        }
    }
    let sys = Place::open("/sys")?;
    sys.must(sys.is_of(SYSFS_MAGIC), "it is no sysfs")?;
    sys.must(sys.is_read_only(), "it can be written")?;
    for path in MASKED_SYS {
        if let Some(dir) = sys.inside(path)? {
            dir.must_be_masked()?;
        }
    }
    Ok(())
}

/// Whether an open file is this device.
pub(super) fn is_device(file: &OwnedFd, major: u32, minor: u32) -> io::Result<bool> {
    let stat = rustix::fs::fstat(file)?;
    let kind = FileType::from_raw_mode(stat.st_mode);
    Ok(kind == FileType::CharacterDevice && stat.st_rdev == rustix::fs::makedev(major, minor))
}

/// Something open, and what it was opened as.
#[derive(Debug)]
struct Place {
    path: String,
    fd: OwnedFd,
}

const WHERE_IT_IS: OFlags = OFlags::PATH.union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

impl Place {
    /// Opens a directory at the top.
    fn open(path: &str) -> Result<Self, Failure> {
        let flags = WHERE_IT_IS | OFlags::DIRECTORY;
        let fd = rustix::fs::openat(CWD, path, flags, Mode::empty());
        Ok(Self {
            path: path.to_owned(),
            fd: fd.doing(|| checking(path))?,
        })
    }

    /// Opens what has this whole path, if this kernel has it.
    fn inside(&self, path: &str) -> Result<Option<Self>, Failure> {
        let below = path.strip_prefix(&self.path).unwrap_or(path);
        self.below(below.trim_start_matches('/'))
    }

    /// Opens what lies below; links on the way are followed by nobody, for procfs, sysfs and our `/dev`
    /// have none there.
    fn below(&self, name: &str) -> Result<Option<Self>, Failure> {
        let path = format!("{}/{name}", self.path);
        match rustix::fs::openat(&self.fd, name, WHERE_IT_IS, Mode::empty()) {
            Err(rustix::io::Errno::NOENT) => Ok(None),
            opened => {
                let fd = opened.doing(|| checking(&path))?;
                Ok(Some(Self { path, fd }))
            }
        }
    }

    fn is_of(&self, magic: rustix::fs::FsWord) -> bool {
        rustix::fs::fstatfs(&self.fd).is_ok_and(|stat| stat.f_type == magic)
    }

    fn is_read_only(&self) -> bool {
        rustix::fs::fstatvfs(&self.fd)
            .is_ok_and(|stat| stat.f_flag.contains(StatVfsMountFlags::RDONLY))
    }

    fn is_device(&self, major: u32, minor: u32) -> bool {
        is_device(&self.fd, major, minor).unwrap_or(false)
    }

    fn is_empty_dir(&self) -> io::Result<bool> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let dir = rustix::fs::openat(&self.fd, ".", flags, Mode::empty())?;
        for entry in Dir::read_from(&dir)? {
            if !matches!(entry?.file_name().to_bytes(), b"." | b"..") {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn must_be_masked(&self) -> Result<(), Failure> {
        let is_empty = self.is_empty_dir().doing(|| checking(&self.path))?;
        let is_masked = is_empty && self.is_of(TMPFS_MAGIC) && self.is_read_only();
        self.must(is_masked, "it is not masked")
    }

    fn must(&self, is_so: bool, otherwise: &str) -> Result<(), Failure> {
        match is_so {
            true => Ok(()),
            false => Err(wrong(&self.path, otherwise)),
        }
    }
}

fn checking(path: &str) -> String {
    format!("checking {path} in the sandbox")
}

/// Not by a number, which would be taken for what the kernel does not permit.
fn wrong(path: &str, what: &str) -> Failure {
    let error = io::Error::other(format!("{what}; the step was not begun"));
    Failure::new(checking(path), &error)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refuses(checked: Result<(), Failure>, path: &str, reason: &str) {
        let failure = checked.unwrap_err();
        assert_eq!(
            (failure.doing, failure.reason),
            (
                format!("checking {path} in the sandbox"),
                format!("{reason}; the step was not begun")
            )
        );
    }

    #[test]
    fn what_is_not_masked_is_found_out() {
        // Files of the host's, which a step must not have.
        let proc = Place::open("/proc").unwrap();
        assert!(proc.is_of(PROC_MAGIC) && !proc.is_of(TMPFS_MAGIC));
        let version = proc.inside("/proc/version").unwrap().unwrap();
        assert!(!version.is_device(1, 3));
        refuses(
            version.must(version.is_device(1, 3), "it is not masked"),
            "/proc/version",
            "it is not masked",
        );
        let own = proc.inside("/proc/self/task").unwrap_or(None);
        refuses(
            own.unwrap().must_be_masked(),
            "/proc/self/task",
            "it is not masked",
        );
        assert!(proc.inside("/proc/no-such-file").unwrap().is_none());
    }

    #[test]
    fn an_empty_directory_is_no_mask_where_it_can_be_written() {
        let dir = tempfile::tempdir().unwrap();
        let place = Place::open(dir.path().to_str().unwrap()).unwrap();
        assert!(place.is_empty_dir().unwrap());
        let path = place.path.clone();
        refuses(place.must_be_masked(), &path, "it is not masked");
        std::fs::write(dir.path().join("file"), "").unwrap();
        assert!(!place.is_empty_dir().unwrap());
    }

    #[test]
    fn devices_are_told_by_their_numbers_and_links_by_being_links() {
        let dev = Place::open("/dev").unwrap();
        let null = dev.below("null").unwrap().unwrap();
        assert!(null.is_device(1, 3) && !null.is_device(1, 5));
        let dir = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("/dev/null", dir.path().join("null")).unwrap();
        std::os::unix::fs::symlink("/proc", dir.path().join("proc")).unwrap();
        let place = Place::open(dir.path().to_str().unwrap()).unwrap();
        assert!(!place.below("null").unwrap().unwrap().is_device(1, 3));
        let link = dir.path().join("proc");
        assert!(Place::open(link.to_str().unwrap()).is_err());
    }
}
