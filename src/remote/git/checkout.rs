//! A tree of the repository → files below a directory.
//!
//! Names come from whoever can push to the repository. Each is one component that is created
//! new in a directory that was created here and is open, so no name, link or order of entries
//! leads anywhere else.

use std::ffi::OsStr;
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use gix_hash::ObjectId;
use gix_object::bstr::BString;
use gix_object::tree::EntryKind;
use gix_object::{Kind, TreeRefIter};
use rustix::fs::{AtFlags, Mode, OFlags, Stat};
use rustix::io::Errno;

use super::attributes::{self, Attributes};
use super::error::GitError;
use super::modules;
use super::objects::Objects;
use super::watch::Watch;
use super::{Limits, display};

/// The longest path, in bytes (`PATH_MAX`).
const PATH_LIMIT_BYTES: usize = 4096;
/// How deep directories may be; each level holds a descriptor.
const DEPTH_LIMIT: usize = 256;
/// The largest `.gitattributes` and `.gitmodules`, in bytes.
const SETTINGS_LIMIT_BYTES: usize = 4 << 20;

/// What was written so far, submodules included.
#[derive(Debug, Default)]
pub(super) struct Usage {
    pub(super) files: u64,
    pub(super) bytes: u64,
    pub(super) modules: u32,
}

/// A submodule's place, and its commit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Link {
    /// From the root of the repository.
    pub(super) path: BString,
    /// The commit.
    pub(super) commit: ObjectId,
}

/// Where a subdirectory is.
pub(super) enum Place {
    /// In the repository.
    Tree(ObjectId),
    /// In a submodule; the rest of the path is the subdirectory there.
    Module { link: Link, depth: usize },
}

/// Writes the files of one commit.
pub(super) struct Checkout<'c> {
    pub(super) objects: &'c Objects,
    pub(super) remote: &'c str,
    pub(super) limits: &'c Limits,
    pub(super) watch: &'c Watch,
    pub(super) usage: &'c mut Usage,
    /// Where it is written; for messages.
    pub(super) target: &'c Path,
    attributes: Attributes,
    /// From the root of the repository; the entry that is worked on.
    path: BString,
    /// The submodules that were met, as empty directories.
    pub(super) links: Vec<Link>,
    /// What is written into git's index, where one is wanted.
    pub(super) index: Option<gix_index::State>,
}

impl<'c> Checkout<'c> {
    /// # Errors
    /// [`GitError::Object`].
    pub(super) fn new(
        objects: &'c Objects,
        remote: &'c str,
        limits: &'c Limits,
        watch: &'c Watch,
        usage: &'c mut Usage,
        target: &'c Path,
        with_index: bool,
    ) -> Result<Self, GitError> {
        let hash = objects.hash();
        let attributes = Attributes::new(hash).map_err(|reason| GitError::Object {
            remote: remote.to_owned(),
            object: ".gitattributes".to_owned(),
            reason,
        })?;
        Ok(Self {
            objects,
            remote,
            limits,
            watch,
            usage,
            target,
            attributes,
            path: BString::default(),
            links: Vec::new(),
            index: with_index.then(|| gix_index::State::new(hash)),
        })
    }

    /// Goes from the root `tree` to the subdirectory `parts`.
    ///
    /// # Errors
    /// [`GitError::Subdir`] where it is none.
    pub(super) fn descend(&mut self, tree: ObjectId, parts: &[&str]) -> Result<Place, GitError> {
        let mut tree = tree;
        for (depth, part) in parts.iter().enumerate() {
            let bytes = self.objects.read_as(&tree, Kind::Tree)?;
            let fail = |reason: String| GitError::Subdir {
                remote: self.remote.to_owned(),
                subdir: parts.join("/"),
                reason,
            };
            let so_far = parts[..=depth].join("/");
            let mut found = None;
            for entry in TreeRefIter::from_bytes(&bytes, self.objects.hash()) {
                let entry = entry.map_err(|_| self.objects.damaged(&tree, "it is no tree"))?;
                if entry.filename == part.as_bytes() {
                    found = Some((entry.mode.kind(), entry.oid.to_owned()));
                    break;
                }
            }
            match found {
                Some((EntryKind::Tree, id)) => {
                    self.enter(&bytes, &tree)?;
                    if !self.path.is_empty() {
                        self.path.push(b'/');
                    }
                    self.path.extend_from_slice(part.as_bytes());
                    tree = id;
                }
                Some((EntryKind::Commit, commit)) => {
                    let link = Link {
                        path: so_far.into(),
                        commit,
                    };
                    return Ok(Place::Module {
                        link,
                        depth: depth + 1,
                    });
                }
                Some(_) => {
                    return Err(fail(format!(
                        "{so_far:?} is no directory; links are not followed there"
                    )));
                }
                None => return Err(fail(format!("there is no {so_far:?}"))),
            }
        }
        Ok(Place::Tree(tree))
    }

    /// Writes what is in `tree` into the empty directory `dir`.
    ///
    /// # Errors
    /// [`GitError::Path`] for names and links that are not written, [`GitError::Limit`],
    /// [`GitError::Object`], [`GitError::Io`].
    pub(super) fn write(&mut self, tree: &ObjectId, dir: BorrowedFd<'_>) -> Result<(), GitError> {
        self.write_tree(tree, dir, 0)
    }

    fn write_tree(
        &mut self,
        tree: &ObjectId,
        dir: BorrowedFd<'_>,
        depth: usize,
    ) -> Result<(), GitError> {
        if depth > DEPTH_LIMIT {
            return Err(self.limit("the depth of directories", &DEPTH_LIMIT.to_string()));
        }
        let bytes = self.objects.read_as(tree, Kind::Tree)?;
        let entered = self.enter(&bytes, tree)?;
        for entry in TreeRefIter::from_bytes(&bytes, self.objects.hash()) {
            self.watch.check(self.remote)?;
            let entry = entry.map_err(|_| self.objects.damaged(tree, "it is no tree"))?;
            let length = self.path.len();
            if length > 0 {
                self.path.push(b'/');
            }
            self.path.extend_from_slice(entry.filename);
            let name = component(entry.filename).map_err(|reason| self.wrong(reason))?;
            if self.path.len() > PATH_LIMIT_BYTES {
                let limit = format!("{PATH_LIMIT_BYTES} bytes");
                return Err(self.limit("the length of a path", &limit));
            }
            self.usage.files += 1;
            if self.usage.files > self.limits.files {
                let limit = self.limits.files.to_string();
                return Err(self.limit("the number of files and directories", &limit));
            }
            let id = entry.oid.to_owned();
            match entry.mode.kind() {
                EntryKind::Tree => {
                    let below = self.make_directory(dir, name)?;
                    self.write_tree(&id, below.as_fd(), depth + 1)?;
                }
                EntryKind::Commit => {
                    let made = self.make_directory(dir, name)?;
                    let path = self.path.clone();
                    self.links.push(Link { path, commit: id });
                    self.note(&made, id, gix_index::entry::Mode::COMMIT)?;
                }
                EntryKind::Link => {
                    let target = self.objects.read_as(&id, Kind::Blob)?;
                    if target.contains(&0) {
                        return Err(self.wrong("its target has a zero byte"));
                    }
                    self.take(target.len())?;
                    rustix::fs::symlinkat(OsStr::from_bytes(&target), dir, name)
                        .map_err(|error| self.failed(error))?;
                    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                    let made = rustix::fs::openat(dir, name, flags, Mode::empty())
                        .map_err(|error| self.failed(error))?;
                    self.note(&made, id, gix_index::entry::Mode::SYMLINK)?;
                }
                EntryKind::Blob => self.write_file(dir, name, id, false)?,
                EntryKind::BlobExecutable => self.write_file(dir, name, id, true)?,
            }
            self.path.truncate(length);
        }
        if entered {
            self.attributes.pop();
        }
        Ok(())
    }

    fn write_file(
        &mut self,
        dir: BorrowedFd<'_>,
        name: &OsStr,
        id: ObjectId,
        is_executable: bool,
    ) -> Result<(), GitError> {
        let bytes = self.objects.read_as(&id, Kind::Blob)?;
        let converted = self
            .attributes
            .converted(self.path.as_ref(), &id, &bytes)
            .map_err(|reason| self.wrong(reason))?;
        let bytes = converted.as_ref().unwrap_or(&bytes);
        self.take(bytes.len())?;
        let flags =
            OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(dir, name, flags, Mode::RUSR | Mode::WUSR)
            .map_err(|error| self.failed(error))?;
        let mut file = File::from(fd);
        file.write_all(bytes).map_err(|error| self.io(error))?;
        // Not as the process's umask would have it.
        let mode = if is_executable { 0o755 } else { 0o644 };
        rustix::fs::fchmod(&file, Mode::from_raw_mode(mode)).map_err(|error| self.failed(error))?;
        let mode = if is_executable {
            gix_index::entry::Mode::FILE_EXECUTABLE
        } else {
            gix_index::entry::Mode::FILE
        };
        self.note(&file.into(), id, mode)
    }

    fn make_directory(&self, dir: BorrowedFd<'_>, name: &OsStr) -> Result<OwnedFd, GitError> {
        let mode = Mode::from_raw_mode(0o755);
        rustix::fs::mkdirat(dir, name, mode).map_err(|error| self.failed(error))?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let made = rustix::fs::openat(dir, name, flags, Mode::empty())
            .map_err(|error| self.failed(error))?;
        rustix::fs::fchmod(&made, mode).map_err(|error| self.failed(error))?;
        Ok(made)
    }

    /// Enters the directory whose tree has `bytes`; says whether it has attributes.
    fn enter(&mut self, bytes: &[u8], tree: &ObjectId) -> Result<bool, GitError> {
        for entry in TreeRefIter::from_bytes(bytes, self.objects.hash()) {
            let entry = entry.map_err(|_| self.objects.damaged(tree, "it is no tree"))?;
            let is_file = matches!(
                entry.mode.kind(),
                EntryKind::Blob | EntryKind::BlobExecutable
            );
            // Git does not read one that is a link.
            if entry.filename == attributes::FILE_NAME && is_file {
                let text = self.settings(entry.oid, ".gitattributes")?;
                let path = Path::new(OsStr::from_bytes(&self.path)).to_owned();
                self.attributes
                    .push(&path, &text)
                    .map_err(|reason| self.wrong(format!("its .gitattributes: {reason}")))?;
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// The text of `.gitmodules` in the root `tree`; `None` where there is none that is a file.
    ///
    /// # Errors
    /// [`GitError::Object`], [`GitError::Limit`].
    pub(super) fn modules_file(&self, tree: &ObjectId) -> Result<Option<Vec<u8>>, GitError> {
        let bytes = self.objects.read_as(tree, Kind::Tree)?;
        for entry in TreeRefIter::from_bytes(&bytes, self.objects.hash()) {
            let entry = entry.map_err(|_| self.objects.damaged(tree, "it is no tree"))?;
            let is_file = matches!(
                entry.mode.kind(),
                EntryKind::Blob | EntryKind::BlobExecutable
            );
            if entry.filename == modules::FILE_NAME && is_file {
                return self.settings(entry.oid, ".gitmodules").map(Some);
            }
        }
        Ok(None)
    }

    fn settings(&self, id: &gix_hash::oid, name: &str) -> Result<Vec<u8>, GitError> {
        let text = self.objects.read_as(&id.to_owned(), Kind::Blob)?;
        if text.len() > SETTINGS_LIMIT_BYTES {
            let limit = format!("{SETTINGS_LIMIT_BYTES} bytes");
            return Err(self.limit(name, &limit));
        }
        Ok(text)
    }

    /// Counts `bytes` that are written.
    fn take(&mut self, bytes: usize) -> Result<(), GitError> {
        self.usage.bytes += bytes as u64;
        if self.usage.bytes > self.limits.checkout_bytes {
            let limit = format!("{} bytes", self.limits.checkout_bytes);
            return Err(self.limit("the size of all files", &limit));
        }
        Ok(())
    }

    /// Notes what was written for the index.
    fn note(
        &mut self,
        made: &OwnedFd,
        id: ObjectId,
        mode: gix_index::entry::Mode,
    ) -> Result<(), GitError> {
        if self.index.is_none() {
            return Ok(());
        }
        let stat = rustix::fs::statat(made, "", AtFlags::EMPTY_PATH | AtFlags::SYMLINK_NOFOLLOW)
            .map_err(|error| self.failed(error))?;
        let path = self.path.clone();
        if let Some(index) = &mut self.index {
            let flags = gix_index::entry::Flags::empty();
            index.dangerously_push_entry(index_stat(&stat), id, flags, mode, path.as_ref());
        }
        Ok(())
    }

    fn wrong(&self, reason: impl Into<String>) -> GitError {
        GitError::Path {
            remote: self.remote.to_owned(),
            path: display(&self.path),
            reason: reason.into(),
        }
    }

    fn limit(&self, what: &str, limit: &str) -> GitError {
        GitError::Limit {
            remote: self.remote.to_owned(),
            what: format!("{what} (at {:?})", display(&self.path)),
            limit: limit.to_owned(),
        }
    }

    fn failed(&self, error: Errno) -> GitError {
        if error == Errno::EXIST {
            return self.wrong("its directory has two entries of that name");
        }
        self.io(error.into())
    }

    fn io(&self, source: std::io::Error) -> GitError {
        GitError::Io {
            doing: "writing",
            path: self.target.join(OsStr::from_bytes(&self.path)),
            source,
        }
    }
}

/// A name that is one component of a path, and not git's own directory.
fn component(name: &[u8]) -> Result<&OsStr, &'static str> {
    match name {
        b"" => Err("it has no name"),
        b"." | b".." => Err("that is no name of a file"),
        name if name.eq_ignore_ascii_case(b".git") => {
            Err("no file may have the name of git's own directory")
        }
        name if name.contains(&b'/') || name.contains(&0) => Err("that is no name of a file"),
        name => Ok(OsStr::from_bytes(name)),
    }
}

/// The parts of a file's metadata that git keeps, cut to 32 bits as git does.
fn index_stat(stat: &Stat) -> gix_index::entry::Stat {
    #[allow(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "git's index has 32 bits of each"
    )]
    let time = |secs: i64, nsecs: u64| gix_index::entry::stat::Time {
        secs: secs as u32,
        nsecs: nsecs as u32,
    };
    #[allow(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "git's index has 32 bits of each"
    )]
    gix_index::entry::Stat {
        mtime: time(stat.st_mtime, stat.st_mtime_nsec),
        ctime: time(stat.st_ctime, stat.st_ctime_nsec),
        dev: stat.st_dev as u32,
        ino: stat.st_ino as u32,
        uid: stat.st_uid,
        gid: stat.st_gid,
        size: stat.st_size as u32,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_one_component() {
        for name in [
            &b"a"[..],
            b"...",
            b"-rf",
            b".gitignore",
            b"\xff",
            b"a\nb",
            b"git",
        ] {
            assert_eq!(component(name), Ok(OsStr::from_bytes(name)));
        }
        for name in [
            &b""[..],
            b".",
            b"..",
            b".git",
            b".GIT",
            b"a/b",
            b"/",
            b"a/../b",
            b"a\0b",
        ] {
            assert!(component(name).is_err(), "{name:?}");
        }
    }
}
