//! [`materialize`]: a list of changes becomes a tree.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, Timespec, Timestamps, Uid, makedev};
use rustix::io::Errno;

use super::change::{Change, ChangeKind, Data, Entry, FileContent, FileSource, Metadata, Time};
use super::tree::{Attributes, look_at};
use super::{RootfsError, order, xattr};
use crate::confined::ConfinedDir;
use crate::owners::Owners;

/// Writes `changes`, in the order of [`order`] and each after its parents, into the empty
/// directory `dir` as a tree.
///
/// Whoever made the list may be hostile: nothing outside `dir` is touched. Owners, modes,
/// times and extended attributes become those of the list, those of a directory after
/// everything in it. The directory itself gets the mode 0755. Where owners are recorded beside
/// `dir` ([`crate::owners`]), those of the list are, and the files stay this process's own.
///
/// # Errors
/// [`RootfsError::BadChange`] where the list breaks its rules, [`RootfsError::Attribute`]
/// for an extended attribute that does not belong into layers, [`RootfsError::Size`] where
/// a file has become shorter or longer, [`RootfsError::Io`]. The directory is then
/// incomplete.
pub fn materialize(
    changes: impl IntoIterator<Item = Change>,
    dir: &Path,
) -> Result<(), RootfsError> {
    let root = ConfinedDir::open(dir).map_err(RootfsError::io("opening", dir))?;
    let mode = Mode::from_raw_mode(super::stack::ROOT_MODE);
    rustix::fs::chmod(dir, mode).map_err(RootfsError::io("changing the mode of", dir))?;
    let mut writer = Writer {
        root,
        owners: Owners::of(dir).map_err(RootfsError::io("reading the owners of", dir))?,
        open: Vec::new(),
        last: PathBuf::new(),
    };
    for change in changes {
        writer.write(change)?;
    }
    writer.close_until(None)?;
    if let Some(owners) = &writer.owners {
        owners
            .save(dir)
            .map_err(RootfsError::io("recording the owners of", dir))?;
    }
    Ok(())
}

struct Writer {
    root: ConfinedDir,
    /// Where files are not given away.
    owners: Option<Owners>,
    /// Directories that are not finished, each inside the one before.
    open: Vec<(PathBuf, Metadata)>,
    last: PathBuf,
}

impl Writer {
    fn write(&mut self, change: Change) -> Result<(), RootfsError> {
        let Change { path, kind } = change;
        let bad = |reason| RootfsError::BadChange {
            path: path.clone(),
            reason,
        };
        let is_normal = |c: Component<'_>| matches!(c, Component::Normal(_));
        let rebuilt: PathBuf = path.components().collect();
        // `components` swallows `.` and doubled slashes, which the list must not have.
        if path.as_os_str().is_empty()
            || !path.components().all(is_normal)
            || rebuilt.as_os_str() != path.as_os_str()
        {
            return Err(bad("its path is not a plain relative one"));
        }
        if !self.last.as_os_str().is_empty() && order(&self.last, &path).is_ge() {
            return Err(bad("it is there twice or not in order"));
        }
        self.last.clone_from(&path);

        self.close_until(path.parent())?;
        let parent_is_open = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => {
                self.open.last().is_some_and(|(open, _)| open == parent)
            }
            _ => true,
        };
        if !parent_is_open {
            return Err(bad("its directory is not in the list before it"));
        }
        let (parent, name) = self
            .root
            .open_exact_parent(&path)
            .map_err(RootfsError::io("opening the directory of", &path))?;
        match kind {
            ChangeKind::Removed => rustix::fs::mknodat(
                &parent,
                name,
                FileType::CharacterDevice,
                Mode::empty(),
                makedev(0, 0),
            )
            .map_err(RootfsError::io("making the whiteout", &path)),
            ChangeKind::Entry(entry) => self.entry(&parent, name, &path, entry),
        }
    }

    fn entry(
        &mut self,
        parent: &OwnedFd,
        name: &OsStr,
        path: &Path,
        entry: Entry,
    ) -> Result<(), RootfsError> {
        let Entry { metadata, data } = entry;
        if let Some(name) = metadata.xattrs.keys().find(|n| !xattr::belongs_in_layer(n)) {
            return Err(RootfsError::Attribute {
                path: path.to_owned(),
                name: name.clone(),
            });
        }
        let failed = || RootfsError::io("creating", path);
        let node = |file_type, major, minor| {
            let mode = Mode::RUSR | Mode::WUSR;
            rustix::fs::mknodat(parent, name, file_type, mode, makedev(major, minor))
                .map_err(failed())
        };
        match data {
            Data::Directory { opaque } => {
                rustix::fs::mkdirat(parent, name, Mode::RWXU).map_err(failed())?;
                if opaque {
                    let fd = open_made(parent, name).map_err(failed())?;
                    xattr::set(fd.as_fd(), OsStr::new(xattr::OPAQUE), xattr::YES)
                        .map_err(RootfsError::io("making opaque", path))?;
                }
                self.open.push((path.to_owned(), metadata));
                return Ok(());
            }
            // The other name has the metadata.
            Data::Hardlink(target) => return self.link(parent, name, path, &target),
            Data::File(content) => write_file(parent, name, path, content)?,
            Data::Symlink(target) => {
                rustix::fs::symlinkat(&target, parent, name).map_err(failed())?;
            }
            Data::CharDevice { major: 0, minor: 0 } => {
                return Err(RootfsError::BadChange {
                    path: path.to_owned(),
                    reason: "a character device 0/0 would be taken for a removed file",
                });
            }
            Data::CharDevice { major, minor } => node(FileType::CharacterDevice, major, minor)?,
            Data::BlockDevice { major, minor } => node(FileType::BlockDevice, major, minor)?,
            Data::Fifo => node(FileType::Fifo, 0, 0)?,
        }
        let fd = open_made(parent, name).map_err(failed())?;
        apply_metadata(&fd, path, &metadata, self.owners.as_mut())
    }

    fn link(
        &mut self,
        parent: &OwnedFd,
        name: &OsStr,
        path: &Path,
        target: &Path,
    ) -> Result<(), RootfsError> {
        let failed = || RootfsError::io("linking", path);
        let bad = || RootfsError::BadChange {
            path: path.to_owned(),
            reason: "what it is a hard link to is no file before it in the list",
        };
        let plain = |path: &Path| path.components().all(|c| matches!(c, Component::Normal(_)));
        if target.as_os_str().is_empty() || !plain(target) {
            return Err(bad());
        }
        match look_at(&self.root, target) {
            Ok(Some((_, found))) if !found.is_dir() && !found.is_whiteout() => {}
            Ok(_) => return Err(bad()),
            // A file or a link where the target's path wants a directory.
            Err(error)
                if matches!(
                    Errno::from_io_error(&error),
                    Some(Errno::NOTDIR | Errno::LOOP)
                ) =>
            {
                return Err(bad());
            }
            Err(error) => return Err(failed()(error)),
        }
        let (from, from_name) = self.root.open_exact_parent(target).map_err(failed())?;
        rustix::fs::linkat(&from, from_name, parent, name, AtFlags::empty())
            .map_err(RootfsError::io("linking", path))?;
        if let Some(owners) = &mut self.owners {
            owners.set_same(path, target);
        }
        Ok(())
    }

    /// Finishes the directories that `parent` is not in; all without one.
    fn close_until(&mut self, parent: Option<&Path>) -> Result<(), RootfsError> {
        while let Some((path, _)) = self.open.last() {
            if parent.is_some_and(|parent| parent.starts_with(path)) {
                break;
            }
            let (path, metadata) = self.open.pop().expect("there is a last one");
            let fd = self
                .root
                .open_exact_parent(&path)
                .and_then(|(parent, name)| Ok(open_made(&parent, name)?))
                .map_err(RootfsError::io("opening", &path))?;
            apply_metadata(&fd, &path, &metadata, self.owners.as_mut())?;
        }
        Ok(())
    }
}

/// Opens what was just made, whatever it is, without access to its content.
fn open_made(parent: &OwnedFd, name: &OsStr) -> Result<OwnedFd, Errno> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(parent, name, flags, Mode::empty())
}

/// Owner, attributes, mode, time: in this order, because a new owner takes away
/// capabilities and the setuid bit, and the mode may forbid to set attributes. What the file cannot
/// have goes to `owners` where there are any.
pub(super) fn apply_metadata(
    fd: &OwnedFd,
    path: &Path,
    want: &Metadata,
    owners: Option<&mut Owners>,
) -> Result<(), RootfsError> {
    let failed = |action| RootfsError::io(action, path);
    let stat = rustix::fs::fstat(fd).map_err(failed("reading"))?;
    let found = Attributes::from(&stat);
    let is_dir = found.is_dir();
    let kept = owners
        .map(|owners| owners.keep(path, is_dir, want.owner(), want.mode & 0o7777, &want.xattrs));
    if kept.is_none() && (found.uid, found.gid) != (want.uid, want.gid) {
        let (uid, gid) = (Uid::from_raw(want.uid), Gid::from_raw(want.gid));
        rustix::fs::chownat(fd, "", Some(uid), Some(gid), AtFlags::EMPTY_PATH)
            .map_err(failed("changing the owner of"))?;
    }
    let is_own = |name: &OsStr| kept.is_none_or(|kept| kept.sets(name));
    for (name, value) in want.xattrs.iter().filter(|(name, _)| is_own(name)) {
        xattr::set(fd.as_fd(), name, value).map_err(failed("setting an attribute of"))?;
    }
    if found.file_type != FileType::Symlink {
        let mode = kept.map_or(want.mode & 0o7777, |kept| kept.mode);
        let mode = Mode::from_raw_mode(mode);
        rustix::fs::chmod(xattr::path_of(fd.as_fd()), mode)
            .map_err(failed("changing the mode of"))?;
    }
    let times = Timestamps {
        last_access: want.mtime.into(),
        last_modification: want.mtime.into(),
    };
    rustix::fs::utimensat(fd, "", &times, AtFlags::EMPTY_PATH)
        .map_err(failed("setting the time of"))
}

fn write_file(
    parent: &OwnedFd,
    name: &OsStr,
    path: &Path,
    content: FileContent,
) -> Result<(), RootfsError> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let fd = rustix::fs::openat(parent, name, flags, Mode::RUSR | Mode::WUSR)
        .map_err(RootfsError::io("creating", path))?;
    let mut file = File::from(fd);
    let want = content.size_bytes;
    let got = match content.source {
        FileSource::Bytes(bytes) => {
            file.write_all(&bytes)
                .map_err(RootfsError::io("writing", path))?;
            bytes.len() as u64
        }
        FileSource::Open(open) => {
            let source = open().map_err(RootfsError::io("opening", path))?;
            copy(&source, &file, want).map_err(RootfsError::io("copying", path))?
        }
        FileSource::Read(open) => {
            let source = open().map_err(RootfsError::io("opening", path))?;
            let mut source = source.take(want.saturating_add(1));
            io::copy(&mut source, &mut file).map_err(RootfsError::io("copying", path))?
        }
    };
    if got == want {
        Ok(())
    } else {
        Err(RootfsError::Size {
            path: path.to_owned(),
            got,
            want,
        })
    }
}

/// Copies `source` to the empty file `target`, sharing blocks or leaving holes where the
/// file system can. Returns the source's length, or `want + 1` if it is longer than `want`.
pub(crate) fn copy(mut source: &File, mut target: &File, want: u64) -> io::Result<u64> {
    let length = source.metadata()?.len();
    if length != want {
        return Ok(length.min(want.saturating_add(1)));
    }
    if length > 0 && rustix::fs::ioctl_ficlone(target, source).is_ok() {
        return Ok(target.metadata()?.len().min(want.saturating_add(1)));
    }
    let mut done = 0;
    while done < want {
        let (from, to) = next_data(source, done, want)?;
        source.seek(SeekFrom::Start(from))?;
        target.seek(SeekFrom::Start(from))?;
        // `io::copy` of files is copy_file_range where that works.
        let copied = io::copy(&mut source.take(to - from), &mut target)?;
        if copied < to - from {
            return Ok(from + copied);
        }
        done = to;
        if from == to {
            break;
        }
    }
    // A hole at the end.
    target.set_len(want)?;
    source.seek(SeekFrom::Start(want))?;
    let more = io::copy(&mut source.take(1), &mut io::sink())?;
    Ok(want + more)
}

/// The next part of `file` at or after `offset` that is no hole; empty at `end` if there is none.
fn next_data(file: &File, offset: u64, end: u64) -> io::Result<(u64, u64)> {
    use rustix::fs::SeekFrom::{Data, Hole};
    let from = match rustix::fs::seek(file, Data(offset)) {
        Ok(from) => from.min(end),
        Err(Errno::NXIO) => return Ok((end, end)),
        // The file system does not know.
        Err(Errno::INVAL | Errno::NOTSUP) => return Ok((offset, end)),
        Err(error) => return Err(error.into()),
    };
    let to = rustix::fs::seek(file, Hole(from))?.min(end);
    Ok((from, to))
}

impl From<Time> for Timespec {
    fn from(time: Time) -> Self {
        Self {
            tv_sec: time.seconds,
            tv_nsec: i64::from(time.nanoseconds),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{MetadataExt, symlink};

    use super::super::testing::{change, tree_of};
    use super::*;

    #[test]
    fn a_tree_is_what_the_list_says() {
        let (dir, _tree) = tree_of(&[
            "500 d/",
            "4640 d/file = text",
            "640 d/link == d/file",
            "755 d/made!/",
            "777 d/soft -> ../../x",
            "-gone",
            "600 pipe |",
        ]);
        let stat = |path: &str| fs::symlink_metadata(dir.path().join(path)).unwrap();
        assert_eq!(stat("").mode(), 0o40755);
        assert_eq!(stat("d").mode(), 0o40500);
        assert_eq!(stat("d").mtime(), 1_400_000_000);
        assert_eq!(stat("d/file").mode(), 0o104640);
        assert_eq!(stat("d/file").mtime(), 1_400_000_000);
        assert_eq!(stat("d/link").ino(), stat("d/file").ino());
        assert_eq!(stat("d/soft").mtime(), 1_400_000_000);
        assert_eq!(
            fs::read_link(dir.path().join("d/soft")).unwrap().to_str(),
            Some("../../x")
        );
        assert_eq!(
            (stat("gone").mode() & 0o170_000, stat("gone").rdev()),
            (0o020_000, 0)
        );
        assert_eq!(stat("pipe").mode(), 0o010_600);
        let opaque = OFlags::PATH;
        let made = rustix::fs::open(dir.path().join("d/made"), opaque, Mode::empty()).unwrap();
        assert!(xattr::is_opaque(made.as_fd()).unwrap());
        crate::confined::remove_tree(&dir.keep()).unwrap();
    }

    fn check(lines: &[&str], want: &str) {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("root");
        fs::create_dir(&root).unwrap();
        fs::write(dir.path().join("canary"), "alive").unwrap();
        let error = materialize(lines.iter().map(|line| change(line)), &root).unwrap_err();
        let mut message = error.to_string();
        if let Some(source) = std::error::Error::source(&error) {
            message += &format!(": {source}");
        }
        assert_eq!(message, want, "{lines:?}");
        let mut outside: Vec<_> = fs::read_dir(dir.path())
            .unwrap()
            .map(|e| e.unwrap().file_name())
            .collect();
        outside.sort();
        assert_eq!(outside, ["canary", "root"]);
        let canary = dir.path().join("canary");
        assert_eq!(fs::read_to_string(&canary).unwrap(), "alive");
        assert_eq!(fs::metadata(&canary).unwrap().nlink(), 1);
    }

    #[test]
    fn security_s01_hostile_lists_change_nothing_outside() {
        let plain = |path: &str| {
            format!("cannot put {path:?} into a layer: its path is not a plain relative one")
        };
        for path in ["../x", "/x", "d/../x", "./x", "d//x", "d/.", ".."] {
            check(&["755 d/", &format!("644 {path} = x")], &plain(path));
        }
        check(
            &["777 d -> ..", "644 d/canary = dead"],
            r#"cannot put "d/canary" into a layer: its directory is not in the list before it"#,
        );
        check(
            &["777 d -> ..", "755 d/"],
            r#"cannot put "d" into a layer: it is there twice or not in order"#,
        );
        check(
            &["644 b = x", "644 a = x"],
            r#"cannot put "a" into a layer: it is there twice or not in order"#,
        );
        let link = |path: &str| {
            format!(
                "cannot put {path:?} into a layer: what it is a hard link to is no file before it in the list"
            )
        };
        check(&["777 d -> ..", "644 x == d/canary"], &link("x"));
        check(&["644 x == ../canary"], &link("x"));
        check(&["644 x == /canary"], &link("x"));
        check(&["644 x == y"], &link("x"));
        check(&["755 d/", "644 x == d"], &link("x"));
        check(&["-gone", "644 x == gone"], &link("x"));
        check(&["644 f = x", "644 x == f/y"], &link("x"));
    }

    #[test]
    fn what_cannot_be_in_a_tree_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let with = |alter: fn(&mut Entry)| {
            let mut change = change("644 f = 12345");
            if let ChangeKind::Entry(entry) = &mut change.kind {
                alter(entry);
            }
            let root = tempfile::tempdir_in(dir.path()).unwrap();
            materialize([change], root.path()).unwrap_err().to_string()
        };
        let text = with(|entry| entry.data = Data::CharDevice { major: 0, minor: 0 });
        assert_eq!(
            text,
            r#"cannot put "f" into a layer: a character device 0/0 would be taken for a removed file"#
        );
        let text = with(|entry| {
            entry
                .metadata
                .xattrs
                .insert("user.overlay.opaque".into(), b"y".to_vec());
        });
        assert_eq!(
            text,
            r#""f" has the extended attribute "user.overlay.opaque", which does not belong into layers"#
        );
        let text = with(|entry| {
            if let Data::File(content) = &mut entry.data {
                content.size_bytes = 7;
            }
        });
        assert_eq!(
            text,
            r#""f" has changed while it was read: got 5 bytes, want 7"#
        );
    }

    #[test]
    fn contents_come_from_files_with_holes_and_of_the_right_length() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("source");
        let mut source = File::create_new(&path).unwrap();
        let mut bytes = vec![0; 3 << 20];
        for (at, byte) in [(5, b'a'), (1 << 20, b'b'), ((2 << 20) + 7, b'c')] {
            bytes[at] = byte;
            source.seek(SeekFrom::Start(at as u64)).unwrap();
            source.write_all(&[byte]).unwrap();
        }
        source.set_len(bytes.len() as u64).unwrap();
        let make = |name: &str, size_bytes: u64| {
            let root = dir.path().join(name);
            fs::create_dir(&root).unwrap();
            let path = path.clone();
            let mut change = change("644 f = ");
            if let ChangeKind::Entry(entry) = &mut change.kind {
                let source = FileSource::Open(Box::new(move || File::open(path)));
                entry.data = Data::File(FileContent { size_bytes, source });
            }
            materialize([change], &root).map(|()| root.join("f"))
        };
        let right = bytes.len() as u64;
        let made = make("right", right).unwrap();
        assert!(fs::read(&made).unwrap() == bytes);
        let check = |name: &str, want: u64, message: &str| {
            assert_eq!(make(name, want).unwrap_err().to_string(), message);
        };
        check(
            "short",
            right + 1,
            r#""f" has changed while it was read: got 3145728 bytes, want 3145729"#,
        );
        check(
            "long",
            right - 1,
            r#""f" has changed while it was read: got 3145728 bytes, want 3145727"#,
        );
        check(
            "empty",
            0,
            r#""f" has changed while it was read: got 1 bytes, want 0"#,
        );
    }

    #[test]
    fn security_s02_a_directory_in_the_way_is_not_followed() {
        // The directory is not empty after all: a link lies where the list has a directory.
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("root");
        fs::create_dir(&root).unwrap();
        symlink("..", root.join("d")).unwrap();
        let list = [change("755 d/"), change("644 d/x = x")];
        let error = materialize(list, &root).unwrap_err();
        assert_eq!(error.to_string(), r#"creating "d""#);
        assert!(!dir.path().join("x").exists());
    }
}
