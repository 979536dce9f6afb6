//! Gives files the metadata of their entries.
//!
//! The order matters: `chown` clears setuid bits and capabilities, so owner, extended
//! attributes, mode, and the time last.

use std::ffi::{OsStr, OsString};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Gid, Mode, Timespec, Timestamps, Uid, XattrFlags};
use rustix::io::Errno;

use super::LayerError;
use crate::owners::{Kept, Owners};
use crate::rootfs::{Metadata, Time};

/// Extended attributes that steer overlay mounts of the tree.
const OVERLAY_PREFIXES: [&[u8]; 2] = [b"user.overlay.", b"trusted.overlay."];

/// An extended attribute whose loss changes what a program may do.
const CAPABILITY: &str = "security.capability";

/// An extended attribute that could not be set here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SkippedXattr {
    /// The file, relative to the root.
    pub path: PathBuf,
    /// The attribute's name.
    pub name: OsString,
}

/// Refuses attributes that nobody but this program may set in a tree.
pub(super) fn check_xattrs(path: &Path, metadata: &Metadata) -> Result<(), LayerError> {
    let is_forbidden = |name: &&OsString| {
        let name = name.as_bytes();
        OVERLAY_PREFIXES
            .iter()
            .any(|prefix| name.starts_with(prefix))
    };
    match metadata.xattrs.keys().find(is_forbidden) {
        None => Ok(()),
        Some(name) => Err(LayerError::ForbiddenXattr {
            path: path.to_owned(),
            name: name.clone(),
        }),
    }
}

/// Gives the open file or directory `fd` its metadata; what it cannot have goes to `owners`, under
/// `path`, where there are any.
pub(super) fn set_on_fd(
    fd: BorrowedFd<'_>,
    path: &Path,
    metadata: &Metadata,
    is_dir: bool,
    skipped: &mut Vec<SkippedXattr>,
    owners: Option<&mut Owners>,
) -> Result<(), LayerError> {
    let kept = owners.map(|owners| keep(owners, path, metadata, is_dir));
    if kept.is_none() {
        let (uid, gid) = owner(metadata);
        rustix::fs::fchown(fd, Some(uid), Some(gid)).map_err(owner_error(path, metadata))?;
    }
    for (name, value) in own_xattrs(metadata, kept) {
        let result = rustix::fs::fsetxattr(fd, name, value, XattrFlags::empty());
        xattr_result(result, path, name, skipped)?;
    }
    rustix::fs::fchmod(fd, own_mode(metadata, kept))
        .map_err(LayerError::tree("setting the mode of", path))?;
    rustix::fs::futimens(fd, &times(metadata.mtime))
        .map_err(LayerError::tree("setting the time of", path))
}

/// Gives `name` in the directory `parent`, which is no regular file and no directory, its
/// metadata; the owner as [`set_on_fd`]. A symbolic link has no mode of its own.
pub(super) fn set_by_name(
    parent: BorrowedFd<'_>,
    name: &OsStr,
    path: &Path,
    metadata: &Metadata,
    is_symlink: bool,
    skipped: &mut Vec<SkippedXattr>,
    owners: Option<&mut Owners>,
) -> Result<(), LayerError> {
    let kept = owners.map(|owners| keep(owners, path, metadata, false));
    if kept.is_none() {
        let (uid, gid) = owner(metadata);
        rustix::fs::chownat(
            parent,
            name,
            Some(uid),
            Some(gid),
            AtFlags::SYMLINK_NOFOLLOW,
        )
        .map_err(owner_error(path, metadata))?;
    }
    set_xattrs_by_name(parent, name, path, own_xattrs(metadata, kept), skipped)?;
    if !is_symlink {
        // Does not follow, because the file was made a moment ago and nobody else is here.
        rustix::fs::chmodat(parent, name, own_mode(metadata, kept), AtFlags::empty())
            .map_err(LayerError::tree("setting the mode of", path))?;
    }
    let flags = AtFlags::SYMLINK_NOFOLLOW;
    rustix::fs::utimensat(parent, name, &times(metadata.mtime), flags)
        .map_err(LayerError::tree("setting the time of", path))
}

/// Gives a hard link the metadata of its entry, where that differs from what the file has:
/// a needless `chown` would take its capabilities. The owner as [`set_on_fd`].
pub(super) fn set_on_link(
    parent: BorrowedFd<'_>,
    name: &OsStr,
    path: &Path,
    metadata: &Metadata,
    skipped: &mut Vec<SkippedXattr>,
    owners: Option<&mut Owners>,
) -> Result<(), LayerError> {
    let is = rustix::fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW)
        .map_err(LayerError::tree("reading the metadata of", path))?;
    let is_symlink =
        rustix::fs::FileType::from_raw_mode(is.st_mode) == rustix::fs::FileType::Symlink;
    let kept = owners.map(|owners| keep(owners, path, metadata, false));
    let same_owner = kept.is_some() || (is.st_uid, is.st_gid) == (metadata.uid, metadata.gid);
    if !same_owner {
        let (uid, gid) = owner(metadata);
        rustix::fs::chownat(
            parent,
            name,
            Some(uid),
            Some(gid),
            AtFlags::SYMLINK_NOFOLLOW,
        )
        .map_err(owner_error(path, metadata))?;
    }
    set_xattrs_by_name(parent, name, path, own_xattrs(metadata, kept), skipped)?;
    let mode = own_mode(metadata, kept);
    if !is_symlink && (!same_owner || is.st_mode & 0o7777 != mode.as_raw_mode()) {
        rustix::fs::chmodat(parent, name, mode, AtFlags::empty())
            .map_err(LayerError::tree("setting the mode of", path))?;
    }
    let flags = AtFlags::SYMLINK_NOFOLLOW;
    rustix::fs::utimensat(parent, name, &times(metadata.mtime), flags)
        .map_err(LayerError::tree("setting the time of", path))
}

/// There is no system call that sets an attribute by directory and name before Linux 6.13;
/// the directory's name under `/proc/self/fd` and a call that does not follow the last
/// component are the same.
fn set_xattrs_by_name<'x>(
    parent: BorrowedFd<'_>,
    name: &OsStr,
    path: &Path,
    xattrs: impl Iterator<Item = (&'x OsString, &'x Vec<u8>)>,
    skipped: &mut Vec<SkippedXattr>,
) -> Result<(), LayerError> {
    let file = Path::new("/proc/self/fd")
        .join(parent.as_fd().as_raw_fd().to_string())
        .join(name);
    for (name, value) in xattrs {
        let result = rustix::fs::lsetxattr(&file, name, value, XattrFlags::empty());
        xattr_result(result, path, name, skipped)?;
    }
    Ok(())
}

/// What the file system or a user namespace cannot hold is passed over, as containerd and
/// podman do, and reported; but never a capability.
fn xattr_result(
    result: rustix::io::Result<()>,
    path: &Path,
    name: &OsStr,
    skipped: &mut Vec<SkippedXattr>,
) -> Result<(), LayerError> {
    match result {
        Ok(()) => Ok(()),
        Err(Errno::NOTSUP | Errno::PERM) if name != CAPABILITY => {
            skipped.push(SkippedXattr {
                path: path.to_owned(),
                name: name.to_owned(),
            });
            Ok(())
        }
        Err(error) => Err(LayerError::Xattr {
            path: path.to_owned(),
            name: name.to_owned(),
            source: error.into(),
        }),
    }
}

fn keep(owners: &mut Owners, path: &Path, metadata: &Metadata, is_dir: bool) -> Kept {
    let owner = metadata.owner();
    owners.keep(path, is_dir, owner, metadata.mode, &metadata.xattrs)
}

/// The attributes that the file itself gets.
fn own_xattrs(
    metadata: &Metadata,
    kept: Option<Kept>,
) -> impl Iterator<Item = (&OsString, &Vec<u8>)> {
    let xattrs = metadata.xattrs.iter();
    xattrs.filter(move |(name, _)| kept.is_none_or(|kept| kept.sets(name)))
}

/// The mode that the file itself gets.
fn own_mode(metadata: &Metadata, kept: Option<Kept>) -> Mode {
    Mode::from_raw_mode(kept.map_or(metadata.mode, |kept| kept.mode))
}

fn owner(metadata: &Metadata) -> (Uid, Gid) {
    (Uid::from_raw(metadata.uid), Gid::from_raw(metadata.gid))
}

fn owner_error(path: &Path, metadata: &Metadata) -> impl FnOnce(Errno) -> LayerError {
    move |error| LayerError::Owner {
        path: path.to_owned(),
        uid: metadata.uid,
        gid: metadata.gid,
        source: error.into(),
    }
}

fn times(mtime: Time) -> Timestamps {
    let time = Timespec {
        tv_sec: mtime.seconds,
        tv_nsec: i64::from(mtime.nanoseconds),
    };
    Timestamps {
        last_access: time,
        last_modification: time,
    }
}
