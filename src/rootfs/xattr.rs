//! Extended attributes: which belong into layers, and access to them through descriptors.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;

use rustix::fs::XattrFlags;
use rustix::io::Errno;

/// Marks a directory that hides what lower trees have in it; its value is [`YES`].
pub(super) const OPAQUE: &str = "user.overlay.opaque";

/// The value of [`OPAQUE`]. Others, such as `x`, mean other things to newer kernels.
pub(super) const YES: &[u8] = b"y";

/// Attributes with which an overlay says that the content is elsewhere.
pub(super) const REDIRECTS: [&str; 2] = ["user.overlay.redirect", "user.overlay.metacopy"];

/// Limit of the kernel for a list of names and for a value (`XATTR_LIST_MAX`, `XATTR_SIZE_MAX`).
const LIMIT_BYTES: usize = 65536;

/// Whether the extended attribute `name` is part of an image: file capabilities and
/// `user.*`, but nothing by which an overlay mount keeps its books.
///
/// Access control lists and labels of security modules belong to the machine.
pub fn belongs_in_layer(name: &OsStr) -> bool {
    let name = name.as_bytes();
    name == b"security.capability"
        || name.starts_with(b"user.") && !name.starts_with(b"user.overlay.")
}

/// The name of an open file itself for calls that take a path. Unlike the calls on
/// descriptors these work with `O_PATH`, thus for links and devices, which cannot be opened.
pub(super) fn path_of(fd: BorrowedFd<'_>) -> String {
    format!("/proc/self/fd/{}", fd.as_raw_fd())
}

/// Names of all attributes of an open file, of whatever kind it was opened.
pub(super) fn names(fd: BorrowedFd<'_>) -> io::Result<Vec<OsString>> {
    let path = path_of(fd);
    let mut list = match rustix::fs::listxattr_query(path.as_str()) {
        Ok(0) | Err(Errno::NOTSUP) => return Ok(Vec::new()),
        Ok(_) => Vec::with_capacity(LIMIT_BYTES),
        Err(error) => return Err(error.into()),
    };
    rustix::fs::listxattr(path.as_str(), rustix::buffer::spare_capacity(&mut list))?;
    Ok(list
        .split(|byte| *byte == 0)
        .filter(|name| !name.is_empty())
        .map(|name| OsStr::from_bytes(name).to_owned())
        .collect())
}

/// The value of one attribute, if it has it.
pub(super) fn get(fd: BorrowedFd<'_>, name: &OsStr) -> io::Result<Option<Vec<u8>>> {
    let path = path_of(fd);
    match rustix::fs::getxattr_query(path.as_str(), name) {
        Ok(_) => {}
        Err(Errno::NODATA | Errno::NOTSUP) => return Ok(None),
        Err(error) => return Err(error.into()),
    }
    let mut value = Vec::with_capacity(LIMIT_BYTES);
    let spare = rustix::buffer::spare_capacity(&mut value);
    match rustix::fs::getxattr(path.as_str(), name, spare) {
        Ok(_) => {
            value.shrink_to_fit();
            Ok(Some(value))
        }
        Err(Errno::NODATA) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// The attributes that belong into layers.
pub(super) fn of_layer(fd: BorrowedFd<'_>) -> io::Result<BTreeMap<OsString, Vec<u8>>> {
    read(fd, belongs_in_layer)
}

fn read(
    fd: BorrowedFd<'_>,
    wanted: impl Fn(&OsStr) -> bool,
) -> io::Result<BTreeMap<OsString, Vec<u8>>> {
    let mut attributes = BTreeMap::new();
    for name in names(fd)? {
        if wanted(&name)
            && let Some(value) = get(fd, &name)?
        {
            attributes.insert(name, value);
        }
    }
    Ok(attributes)
}

/// Whether an overlay mount takes the attribute for its own, so that no process in it could
/// have set it.
pub(super) fn is_of_overlay(name: &OsStr) -> bool {
    name.as_bytes().starts_with(b"user.overlay.")
}

/// Whether it is an access control list, which layers do not have but which stays from one
/// step to the next.
fn is_acl(name: &OsStr) -> bool {
    name.as_bytes().starts_with(b"system.posix_acl_")
}

/// The attributes that a file's copy on this machine has too.
pub(super) fn to_copy(fd: BorrowedFd<'_>) -> io::Result<BTreeMap<OsString, Vec<u8>>> {
    read(fd, |name| belongs_in_layer(name) || is_acl(name))
}

/// Sets one of the attributes that [`to_copy`] gave.
pub(super) fn set_copied(fd: BorrowedFd<'_>, name: &OsStr, value: &[u8]) -> Result<(), Errno> {
    match set(fd, name, value) {
        // A file system without lists; no layer would have shown them.
        Err(Errno::NOTSUP) if is_acl(name) => Ok(()),
        other => other,
    }
}

/// Removes one attribute.
pub(super) fn remove(fd: BorrowedFd<'_>, name: &OsStr) -> Result<(), Errno> {
    rustix::fs::removexattr(path_of(fd), name)
}

/// Whether a directory hides what is below.
pub(super) fn is_opaque(fd: BorrowedFd<'_>) -> io::Result<bool> {
    Ok(get(fd, OsStr::new(OPAQUE))?.as_deref() == Some(YES))
}

/// Sets one attribute.
pub(super) fn set(fd: BorrowedFd<'_>, name: &OsStr, value: &[u8]) -> Result<(), Errno> {
    rustix::fs::setxattr(path_of(fd), name, value, XattrFlags::empty())
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn what_belongs_into_layers() {
        let check =
            |name: &str, want: bool| assert_eq!(belongs_in_layer(name.as_ref()), want, "{name}");
        check("security.capability", true);
        check("user.mime_type", true);
        check("user.overlayfs", true);
        check("user.overlay.opaque", false);
        check("trusted.overlay.opaque", false);
        check("security.selinux", false);
        check("system.posix_acl_access", false);
        check("security.capability2", false);
    }

    #[test]
    fn attributes_are_read_and_written_through_any_descriptor() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, "").unwrap();
        let flags = rustix::fs::OFlags::PATH;
        let fd = rustix::fs::open(&path, flags, rustix::fs::Mode::empty()).unwrap();
        match set(fd.as_fd(), "user.a".as_ref(), b"1") {
            Err(Errno::NOTSUP) => {
                return super::super::testing::skip(
                    "no user attributes in the temporary directory",
                );
            }
            other => other.unwrap(),
        }
        set(fd.as_fd(), "user.empty".as_ref(), b"").unwrap();
        set(fd.as_fd(), OPAQUE.as_ref(), b"y").unwrap();
        let want = [
            ("user.a".into(), b"1".to_vec()),
            ("user.empty".into(), vec![]),
        ];
        assert_eq!(of_layer(fd.as_fd()).unwrap(), BTreeMap::from(want));
        assert!(is_opaque(fd.as_fd()).unwrap());
        set(fd.as_fd(), OPAQUE.as_ref(), b"x").unwrap();
        assert!(!is_opaque(fd.as_fd()).unwrap());
        assert_eq!(get(fd.as_fd(), "user.none".as_ref()).unwrap(), None);
    }
}
