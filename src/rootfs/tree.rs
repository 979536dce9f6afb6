//! [`Tree`]: one unpacked layer.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{FileType, Mode, OFlags, Stat};
use rustix::io::Errno;

use super::change::{Metadata, Time};
use crate::confined::ConfinedDir;
use crate::owners::Owners;

/// One unpacked layer in overlay form.
///
/// It holds the directory open, so it goes on working when the directory is renamed.
#[derive(Clone, Debug)]
pub struct Tree {
    root: Arc<ConfinedDir>,
    /// Where files do not have their own.
    owners: Option<Arc<Owners>>,
}

impl Tree {
    /// Opens the directory `path`, which is trusted; what is in it is not.
    ///
    /// Where its owners are recorded ([`crate::owners`]), those are what it shows.
    ///
    /// # Errors
    /// Those of `open(2)` and of [`Owners::of`].
    pub fn open(path: &Path) -> io::Result<Arc<Self>> {
        let root = Arc::new(ConfinedDir::open(path)?);
        let owners = Owners::of(path)?.map(Arc::new);
        Ok(Arc::new(Self { root, owners }))
    }

    /// Where it was when it was opened; for messages, never for opening.
    pub fn path(&self) -> &Path {
        self.root.path()
    }

    /// The directory; a clone keeps it open.
    pub(super) fn root(&self) -> &Arc<ConfinedDir> {
        &self.root
    }

    /// Its owners, where they are recorded.
    pub(super) fn owners(&self) -> Option<&Owners> {
        self.owners.as_deref()
    }

    /// Opens `path` as [`look_at`] does, with the owner and mode that it has in the image.
    pub(super) fn look_at(&self, path: &Path) -> io::Result<Option<(OwnedFd, Attributes)>> {
        let mut found = look_at(&self.root, path)?;
        if let (Some((_, attributes)), Some(owners)) = (&mut found, &self.owners) {
            let owner = owners.get(path);
            (attributes.uid, attributes.gid) = (owner.uid, owner.gid);
            if let Some(mode) = owners.recorded(path).and_then(|recorded| recorded.mode) {
                attributes.mode = mode;
            }
        }
        Ok(found)
    }
}

/// What `stat(2)` says, as far as images care, and where the file is on this machine.
#[derive(Clone, Copy, Debug)]
pub(super) struct Attributes {
    pub(super) file_type: FileType,
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) mtime: Time,
    pub(super) size: u64,
    pub(super) nlink: u64,
    pub(super) rdev: u64,
    pub(super) id: (u64, u64),
}

impl From<&Stat> for Attributes {
    // The fields' types differ between architectures.
    #[allow(clippy::unnecessary_cast, clippy::useless_conversion)]
    fn from(stat: &Stat) -> Self {
        Self {
            file_type: FileType::from_raw_mode(stat.st_mode),
            mode: u32::from(stat.st_mode) & 0o7777,
            uid: stat.st_uid,
            gid: stat.st_gid,
            mtime: Time {
                seconds: stat.st_mtime as i64,
                nanoseconds: stat.st_mtime_nsec as u32,
            },
            size: stat.st_size as u64,
            nlink: stat.st_nlink as u64,
            rdev: stat.st_rdev as u64,
            id: (stat.st_dev as u64, stat.st_ino as u64),
        }
    }
}

impl Attributes {
    /// Owner, permissions and times; no extended attributes.
    pub(super) fn metadata(&self) -> Metadata {
        Metadata {
            mode: self.mode,
            uid: self.uid,
            gid: self.gid,
            mtime: self.mtime,
            ..Metadata::default()
        }
    }

    /// Whether it says that something of lower trees is gone.
    pub(super) fn is_whiteout(&self) -> bool {
        self.file_type == FileType::CharacterDevice && self.rdev == 0
    }

    pub(super) fn is_dir(&self) -> bool {
        self.file_type == FileType::Directory
    }
}

/// Opens `path` (exactly that: no links) without access to its content, whatever it is.
pub(super) fn look_at(
    root: &ConfinedDir,
    path: &Path,
) -> io::Result<Option<(OwnedFd, Attributes)>> {
    let fd = match root.open_exact(path, OFlags::PATH | OFlags::NOFOLLOW, Mode::empty()) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other?,
    };
    let attributes = Attributes::from(&rustix::fs::fstat(&fd)?);
    Ok(Some((fd, attributes)))
}

/// Opens the regular file `path` for reading, which must be the one with these attributes.
///
/// # Errors
/// `EINVAL` where it is no regular file, `ESTALE` where it is another one by now.
pub(super) fn open_file(root: &ConfinedDir, path: &Path, want: &Attributes) -> io::Result<File> {
    if want.file_type != FileType::RegularFile {
        return Err(Errno::INVAL.into());
    }
    // O_NONBLOCK: should a pipe have taken its place, this must not wait for a writer.
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let fd = root.open_exact(path, flags, Mode::empty())?;
    let got = Attributes::from(&rustix::fs::fstat(&fd)?);
    if got.id != want.id || got.file_type != FileType::RegularFile {
        return Err(Errno::STALE.into());
    }
    Ok(File::from(fd))
}

/// Opens the directory `path` (exactly that: no links) and lists it, in no order.
pub(super) fn list(
    root: &ConfinedDir,
    path: &Path,
) -> io::Result<Vec<(std::ffi::OsString, FileType)>> {
    use std::os::fd::AsFd;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW;
    let fd = root.open_exact(path, flags, Mode::empty())?;
    Ok(crate::confined::list(fd.as_fd())?)
}
