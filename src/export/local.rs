//! `type=local`: the root filesystem as files in a directory, or those of several platforms.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::fs::{DirBuilder, File};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, Timespec, Timestamps, Uid, XattrFlags, makedev,
};
use rustix::io::Errno;

use super::ExportError;
use super::file::IsCancelled;
use super::files::{Root, sorted};
use crate::confined::{self, ConfinedDir};
use crate::rootfs::{
    Change, ChangeKind, Data, Entry, FileContent, FileSource, Metadata, copy_content,
};

/// The attribute that gives a program powers. A file that belongs to somebody else than in
/// the image has none, as the kernel takes them away with every change of the owner.
const CAPABILITY: &str = "security.capability";

/// What could not be written as it is in the image.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LocalReport {
    /// Extended attributes that the directory's file system does not hold, by path and name.
    pub skipped_xattrs: Vec<(PathBuf, OsString)>,
}

/// How many skipped attributes are remembered.
const SKIPPED_LIMIT: usize = 1000;

/// Whether files can be written below `dest`, as far as that is to be seen before.
///
/// # Errors
/// [`ExportError::Io`] where it is something else than a directory.
pub fn check_directory(dest: &Path) -> Result<(), ExportError> {
    if dest.exists() && !dest.is_dir() {
        let error = io::Error::from(io::ErrorKind::NotADirectory);
        return Err(ExportError::io("writing", dest)(error));
    }
    Ok(())
}

/// Writes all files of `roots` below the directory `dest`, which is made where it is missing.
/// What several of them have under one name has to be a directory in all.
///
/// As BuildKit does it: all belong to the user of this process; modes are those of the
/// image, times too, in whole seconds, or all are the `epoch` (seconds since 1970 UTC);
/// what is there under the same name is replaced, what has another stays, and directories
/// merge. Links are replaced and never followed, so nothing outside `dest` is touched,
/// whatever the image or `dest` has. Each file appears under its name when it is complete;
/// after an error some are there.
///
/// # Errors
/// [`ExportError::Local`], naming the file; devices need root. [`ExportError::Rootfs`] where
/// the image's files cannot be read. [`ExportError::SamePath`], before anything is written.
///
/// <https://docs.docker.com/build/exporters/local-tar/>
pub fn local(
    roots: &[Root],
    epoch: Option<i64>,
    dest: &Path,
    is_cancelled: IsCancelled<'_>,
) -> Result<LocalReport, ExportError> {
    check_directory(dest)?;
    check_paths(roots)?;
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dest)
        .map_err(ExportError::io("creating", dest))?;
    let root = ConfinedDir::open(dest).map_err(ExportError::io("opening", dest))?;
    let mut writer = Writer {
        root,
        open: Vec::new(),
        made: 0,
        report: LocalReport::default(),
    };
    for change in sorted(roots).iter().flat_map(|root| root.files(epoch)) {
        let Change { path, kind } = change.map_err(ExportError::Rootfs)?;
        let failed = |source| ExportError::Local {
            path: path.clone(),
            dest: dest.to_owned(),
            source,
        };
        if is_cancelled() {
            return Err(failed(io::Error::other("stopped")));
        }
        let ChangeKind::Entry(entry) = kind else {
            continue;
        };
        writer.close_until(path.parent()).map_err(failed)?;
        writer.write(&path, entry).map_err(failed)?;
    }
    writer
        .close_until(None)
        .map_err(ExportError::io("writing", dest))?;
    Ok(writer.report)
}

/// Whether roots that go to one directory have only directories in common.
fn check_paths(roots: &[Root]) -> Result<(), ExportError> {
    if roots.len() < 2 {
        return Ok(());
    }
    let mut seen: HashMap<PathBuf, (bool, &Root)> = HashMap::new();
    for root in roots {
        for change in root.files(None) {
            let Change { path, kind } = change.map_err(ExportError::Rootfs)?;
            let is_dir = |kind: &ChangeKind| match kind {
                ChangeKind::Entry(entry) => matches!(entry.data, Data::Directory { .. }),
                ChangeKind::Removed => false,
            };
            let is_dir = is_dir(&kind);
            match seen.get(&path) {
                Some((was_dir, _)) if *was_dir && is_dir => {}
                Some((_, first)) => {
                    return Err(ExportError::SamePath {
                        path,
                        first: first.platform.to_string(),
                        second: root.platform.to_string(),
                    });
                }
                None => drop(seen.insert(path, (is_dir, root))),
            }
        }
    }
    Ok(())
}

struct Writer {
    root: ConfinedDir,
    /// Directories whose metadata is set when everything in them is there.
    open: Vec<(PathBuf, Metadata)>,
    /// The number of temporary names so far.
    made: u64,
    report: LocalReport,
}

/// A file that has no name yet but a temporary one, and disappears unless it gets one.
struct Unnamed<'d> {
    parent: &'d OwnedFd,
    name: OsString,
}

impl Drop for Unnamed<'_> {
    fn drop(&mut self) {
        // Renamed, it is gone already.
        let _ = rustix::fs::unlinkat(self.parent, &self.name, AtFlags::empty());
    }
}

impl Writer {
    fn write(&mut self, path: &Path, entry: Entry) -> io::Result<()> {
        let Entry { metadata, data } = entry;
        let (parent, name) = self.root.open_exact_parent(path)?;
        let (existing, mode) = match rustix::fs::statat(&parent, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => (
                Some(FileType::from_raw_mode(stat.st_mode)),
                Mode::from_raw_mode(stat.st_mode),
            ),
            Err(Errno::NOENT) => (None, Mode::empty()),
            Err(error) => return Err(error.into()),
        };
        if let Data::Directory { .. } = data {
            if existing != Some(FileType::Directory) {
                if existing.is_some() {
                    rustix::fs::unlinkat(&parent, name, AtFlags::empty())?;
                }
                rustix::fs::mkdirat(&parent, name, Mode::RWXU)?;
            } else if !mode.contains(Mode::RWXU) {
                // Until its own mode is set. Where this is not allowed, privilege may make
                // it unnecessary; if not, what is written next says so.
                let _ = rustix::fs::chmod(path_of(&open_itself(&parent, name)?), Mode::RWXU);
            }
            self.open.push((path.to_owned(), metadata));
            return Ok(());
        }
        let is_link = matches!(data, Data::Hardlink(_));
        let unnamed = self.make(&parent, data)?;
        // The other name has the metadata.
        if !is_link {
            self.set_metadata(&open_itself(&parent, &unnamed.name)?, path, &metadata)?;
        }
        if existing == Some(FileType::Directory) {
            confined::remove_tree(&path_of(&parent).join(name))?;
        }
        rustix::fs::renameat(&parent, &unnamed.name, &parent, name)?;
        Ok(())
    }

    fn make<'d>(&mut self, parent: &'d OwnedFd, data: Data) -> io::Result<Unnamed<'d>> {
        let node = |name: &OsStr, file_type, major, minor| {
            let mode = Mode::RUSR | Mode::WUSR;
            rustix::fs::mknodat(parent, name, file_type, mode, makedev(major, minor))
        };
        match data {
            Data::File(content) => {
                let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
                let mode = Mode::RUSR | Mode::WUSR;
                let (unnamed, fd) =
                    self.name(parent, |name| rustix::fs::openat(parent, name, flags, mode))?;
                write_content(&File::from(fd), content)?;
                Ok(unnamed)
            }
            Data::Symlink(target) => {
                self.named(parent, |name| rustix::fs::symlinkat(&target, parent, name))
            }
            Data::Hardlink(first) => {
                let (from, first) = self.root.open_exact_parent(&first)?;
                self.named(parent, |name| {
                    rustix::fs::linkat(&from, first, parent, name, AtFlags::empty())
                })
            }
            Data::CharDevice { major, minor } => self.named(parent, |name| {
                node(name, FileType::CharacterDevice, major, minor)
            }),
            Data::BlockDevice { major, minor } => self.named(parent, |name| {
                node(name, FileType::BlockDevice, major, minor)
            }),
            Data::Fifo => self.named(parent, |name| node(name, FileType::Fifo, 0, 0)),
            Data::Directory { .. } => Err(Errno::ISDIR.into()),
        }
    }

    fn named<'d>(
        &mut self,
        parent: &'d OwnedFd,
        make: impl Fn(&OsStr) -> Result<(), Errno>,
    ) -> io::Result<Unnamed<'d>> {
        Ok(self.name(parent, make)?.0)
    }

    /// Calls `make` with a name until that is one that is not there.
    fn name<'d, T>(
        &mut self,
        parent: &'d OwnedFd,
        make: impl Fn(&OsStr) -> Result<T, Errno>,
    ) -> io::Result<(Unnamed<'d>, T)> {
        loop {
            self.made += 1;
            let name = format!(".sockless-{}-{}", std::process::id(), self.made);
            let name = OsString::from(name);
            match make(&name) {
                Err(Errno::EXIST) => {}
                Ok(made) => return Ok((Unnamed { parent, name }, made)),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Owner, attributes, mode, time: in this order, because a new owner takes away the
    /// setuid bit, and the mode may forbid to set attributes.
    fn set_metadata(&mut self, fd: &OwnedFd, path: &Path, want: &Metadata) -> io::Result<()> {
        let stat = rustix::fs::fstat(fd)?;
        let (uid, gid) = (rustix::process::geteuid(), rustix::process::getegid());
        if (stat.st_uid, stat.st_gid) != (uid.as_raw(), gid.as_raw()) {
            let (uid, gid) = (Uid::from_raw(uid.as_raw()), Gid::from_raw(gid.as_raw()));
            rustix::fs::chownat(fd, "", Some(uid), Some(gid), AtFlags::EMPTY_PATH)?;
        }
        let itself = path_of(fd);
        for (attribute, value) in &want.xattrs {
            if attribute == CAPABILITY {
                continue;
            }
            match rustix::fs::setxattr(&itself, attribute, value, XattrFlags::empty()) {
                Ok(()) => {}
                Err(Errno::NOTSUP | Errno::PERM) => {
                    let skipped = &mut self.report.skipped_xattrs;
                    if skipped.len() < SKIPPED_LIMIT {
                        skipped.push((path.to_owned(), attribute.clone()));
                    }
                }
                Err(error) => return Err(error.into()),
            }
        }
        if FileType::from_raw_mode(stat.st_mode) != FileType::Symlink {
            rustix::fs::chmod(&itself, Mode::from_raw_mode(want.mode & 0o7777))?;
        }
        let time = Timespec {
            tv_sec: want.mtime.seconds,
            tv_nsec: i64::from(want.mtime.nanoseconds),
        };
        let times = Timestamps {
            last_access: time,
            last_modification: time,
        };
        Ok(rustix::fs::utimensat(fd, "", &times, AtFlags::EMPTY_PATH)?)
    }

    /// Finishes the directories that `parent` is not in; all without one.
    fn close_until(&mut self, parent: Option<&Path>) -> io::Result<()> {
        while let Some((path, _)) = self.open.last() {
            if parent.is_some_and(|parent| parent.starts_with(path)) {
                break;
            }
            let (path, metadata) = self.open.pop().expect("there is a last one");
            let (above, name) = self.root.open_exact_parent(&path)?;
            self.set_metadata(&open_itself(&above, name)?, &path, &metadata)?;
        }
        Ok(())
    }
}

/// Opens a file of any type without access to its content; a link itself.
fn open_itself(parent: &OwnedFd, name: &OsStr) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(parent, name, flags, Mode::empty())?)
}

/// The name of what is open for calls that take a path: those on descriptors do not work
/// with `O_PATH`.
fn path_of(fd: &OwnedFd) -> PathBuf {
    Path::new("/proc/self/fd").join(fd.as_raw_fd().to_string())
}

fn write_content(target: &File, content: FileContent) -> io::Result<()> {
    let want = content.size_bytes;
    let got = match content.source {
        FileSource::Bytes(bytes) => {
            io::Write::write_all(&mut &*target, &bytes)?;
            bytes.len() as u64
        }
        FileSource::Open(open) => copy_content(&open()?, target, want)?,
        FileSource::Read(open) => {
            let mut source = io::Read::take(open()?, want.saturating_add(1));
            io::copy(&mut source, &mut &*target)?
        }
    };
    if got == want {
        Ok(())
    } else {
        Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("the file has changed while it was read: got {got} bytes, want {want}"),
        ))
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{MetadataExt as _, symlink};

    use super::*;
    use crate::export::testing::whole;
    use crate::rootfs::{Stack, has_many_ids, in_worlds, tree_of};

    fn stack_of(lines: &[&str]) -> (tempfile::TempDir, Stack) {
        let (dir, tree) = tree_of(lines);
        (dir, Stack::new(vec![tree]))
    }

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(dir)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    const THEN: i64 = 1_400_000_000;

    #[test]
    fn files_have_their_modes_times_and_links() {
        let (dir, stack) = stack_of(&[
            "500 d/",
            "4640 d/file = text",
            "4640 d/same == d/file",
            "777 d/soft -> ../../x",
            "755 e/",
            "600 pipe |",
        ]);
        let out = tempfile::tempdir().unwrap();
        let dest = out.path().join("new/out");
        // Twice: what is there is replaced.
        for _ in 0..2 {
            let report = local(&whole(&stack), None, &dest, &|| false).unwrap();
            assert_eq!(report, LocalReport::default());
            let stat = |path: &str| fs::symlink_metadata(dest.join(path)).unwrap();
            assert_eq!(names(&dest), ["d", "e", "pipe"]);
            assert_eq!(names(&dest.join("d")), ["file", "same", "soft"]);
            assert_eq!(stat("").mode(), 0o40700);
            assert_eq!((stat("d").mode(), stat("d").mtime()), (0o40500, THEN));
            assert_eq!((stat("e").mode(), stat("e").mtime()), (0o40755, THEN));
            assert_eq!(stat("d/file").mode(), 0o104640);
            assert_eq!(stat("d/file").mtime(), THEN);
            assert_eq!(stat("d/same").ino(), stat("d/file").ino());
            assert_eq!(fs::read_to_string(dest.join("d/same")).unwrap(), "text");
            assert_eq!(stat("d/soft").mtime(), THEN);
            let target = fs::read_link(dest.join("d/soft")).unwrap();
            assert_eq!(target, Path::new("../../x"));
            assert_eq!(stat("pipe").mode(), 0o010_600);
        }
        local(&whole(&stack), Some(7), &dest, &|| false).unwrap();
        assert_eq!(fs::metadata(dest.join("d/file")).unwrap().mtime(), 7);
        assert_eq!(fs::metadata(dest.join("d")).unwrap().mtime(), 7);
        // Nobody but root empties the directory without write permission otherwise.
        confined::remove_tree(&dir.keep()).unwrap();
        confined::remove_tree(&out.keep()).unwrap();
    }

    #[test]
    fn directories_merge_and_other_things_give_way() {
        let (_dir, stack) = stack_of(&[
            "755 both/",
            "644 both/new = new",
            "644 dir-there = file",
            "777 dir-too -> both",
            "755 file-there/",
            "644 file-there/x = x",
            "644 old = new",
        ]);
        let out = tempfile::tempdir().unwrap();
        let at = |path: &str| out.path().join(path);
        fs::create_dir_all(at("both")).unwrap();
        fs::write(at("both/kept"), "kept").unwrap();
        fs::write(at("kept"), "kept").unwrap();
        fs::write(at("file-there"), "file").unwrap();
        fs::create_dir_all(at("dir-there/deep")).unwrap();
        fs::create_dir_all(at("dir-too/deep")).unwrap();
        fs::write(at("old"), "old").unwrap();
        fs::hard_link(at("old"), at("another-name")).unwrap();
        local(&whole(&stack), None, out.path(), &|| false).unwrap();
        let text = |path: &str| fs::read_to_string(at(path)).unwrap();
        assert_eq!(names(&at("both")), ["kept", "new"]);
        assert_eq!(text("kept"), "kept");
        assert_eq!(text("file-there/x"), "x");
        assert_eq!(text("dir-there"), "file");
        assert_eq!(fs::read_link(at("dir-too")).unwrap(), Path::new("both"));
        assert_eq!(text("old"), "new");
        assert_eq!(text("another-name"), "old");
    }

    #[test]
    fn security_s20_links_in_the_way_are_replaced_and_not_followed() {
        let outside = tempfile::tempdir().unwrap();
        let dest = outside.path().join("dest");
        fs::create_dir(&dest).unwrap();
        fs::write(outside.path().join("canary"), "alive").unwrap();
        // The image's links lead out, and so do those that are there.
        let (_dir, first) = stack_of(&["777 canary -> ../canary", "777 dir -> .."]);
        local(&whole(&first), None, &dest, &|| false).unwrap();
        symlink("../canary", dest.join("file")).unwrap();
        let (_dir, second) = stack_of(&[
            "644 canary = dead",
            "755 dir/",
            "644 dir/canary = dead",
            "644 dir/other == canary",
            "644 file = dead",
        ]);
        local(&whole(&second), None, &dest, &|| false).unwrap();
        assert_eq!(names(outside.path()), ["canary", "dest"]);
        let canary = outside.path().join("canary");
        assert_eq!(fs::read_to_string(&canary).unwrap(), "alive");
        assert_eq!(fs::metadata(&canary).unwrap().nlink(), 1);
        assert_eq!(names(&dest.join("dir")), ["canary", "other"]);
        let mode = fs::symlink_metadata(dest.join("file")).unwrap().mode();
        assert_eq!(mode, 0o100_644);
    }

    #[test]
    fn a_failure_leaves_no_unnamed_file() {
        let (tree, stack) = stack_of(&["644 a = a", "644 b = b"]);
        let out = tempfile::tempdir().unwrap();
        // Asked before each file: while the second is due, it grows.
        let asked = std::cell::Cell::new(0);
        let grow = || {
            asked.set(asked.get() + 1);
            if asked.get() == 2 {
                fs::write(tree.path().join("b"), "longer").unwrap();
            }
            false
        };
        let error = local(&whole(&stack), None, out.path(), &grow).unwrap_err();
        assert_eq!(
            format!("{:#}", anyhow::Error::new(error)),
            format!(
                "writing \"b\" to {}: the file has changed while it was read: got 2 bytes, want 1",
                out.path().display()
            )
        );
        assert_eq!(names(out.path()), ["a"]);

        let error = local(&whole(&stack), None, out.path(), &|| true).unwrap_err();
        assert_eq!(
            format!("{:#}", anyhow::Error::new(error)),
            format!("writing \"a\" to {}: stopped", out.path().display())
        );
        let file = out.path().join("a");
        let error = local(&whole(&stack), None, &file, &|| false).unwrap_err();
        assert_eq!(
            format!("{:#}", anyhow::Error::new(error)),
            format!("writing {}: not a directory", file.display())
        );
    }

    #[test]
    fn security_s20_sandbox_files_belong_to_the_user_and_have_no_powers() {
        in_worlds(
            module_path!(),
            "security_s20_sandbox_files_belong_to_the_user_and_have_no_powers",
            || {
                if !has_many_ids() {
                    return;
                }
                let (dir, tree) = tree_of(&["755 d/", "755 d/file = text"]);
                let file = dir.path().join("d/file");
                for path in [&file, &dir.path().join("d")] {
                    std::os::unix::fs::lchown(path, Some(5), Some(6)).unwrap();
                }
                // `cap_chown=ep` of revision 2.
                let mut capability = vec![1, 0, 0, 2, 1];
                capability.resize(20, 0);
                let set = |name: &str, value: &[u8]| {
                    rustix::fs::setxattr(&file, name, value, XattrFlags::empty())
                };
                set(CAPABILITY, &capability).unwrap();
                let has_user_attributes = set("user.a", b"1").is_ok();
                let stack = Stack::new(vec![tree]);
                let out = tempfile::tempdir().unwrap();
                local(&whole(&stack), None, out.path(), &|| false).unwrap();
                for path in ["d", "d/file"] {
                    let stat = fs::metadata(out.path().join(path)).unwrap();
                    let user = (rustix::process::geteuid(), rustix::process::getegid());
                    assert_eq!(
                        (stat.uid(), stat.gid()),
                        (user.0.as_raw(), user.1.as_raw()),
                        "{path}"
                    );
                }
                let written = out.path().join("d/file");
                let mut value = [0; 32];
                assert_eq!(
                    rustix::fs::getxattr(&written, CAPABILITY, &mut value),
                    Err(Errno::NODATA)
                );
                if has_user_attributes {
                    assert_eq!(rustix::fs::getxattr(&written, "user.a", &mut value), Ok(1));
                }
            },
        );
    }

    #[test]
    fn platforms_have_directories_of_their_own_or_no_file_in_common() {
        let platform = |text| crate::image::Platform::parse(text).unwrap();
        let (_arm, arm) = stack_of(&["755 d/", "644 d/arm = a", "644 d/link == d/arm"]);
        let (_amd, amd) = stack_of(&["755 d/", "644 d/amd = b"]);
        let roots = |in_directory, second: &Stack| {
            let root = |text, stack: &Stack| Root {
                platform: platform(text),
                in_directory,
                stack: stack.clone(),
            };
            [root("linux/arm/v7", &arm), root("linux/amd64", second)]
        };
        let out = tempfile::tempdir().unwrap();
        let listed = |dir: &str| {
            let mut names: Vec<String> = fs::read_dir(out.path().join(dir))
                .unwrap()
                .map(|entry| entry.unwrap().file_name().into_string().unwrap())
                .collect();
            names.sort();
            names
        };
        let split = out.path().join("split");
        local(&roots(true, &amd), None, &split, &|| false).unwrap();
        assert_eq!(listed("split"), ["linux_amd64", "linux_arm_v7"]);
        assert_eq!(listed("split/linux_amd64/d"), ["amd"]);
        assert_eq!(listed("split/linux_arm_v7/d"), ["arm", "link"]);
        let found = fs::metadata(split.join("linux_arm_v7")).unwrap();
        assert_eq!((found.mode() & 0o7777, found.mtime()), (0o755, 0));

        let merged = out.path().join("merged");
        local(&roots(false, &amd), Some(7), &merged, &|| false).unwrap();
        assert_eq!(listed("merged/d"), ["amd", "arm", "link"]);

        let (_same, same) = stack_of(&["755 d/", "644 d/arm = a"]);
        let refused = out.path().join("refused");
        let error = local(&roots(false, &same), None, &refused, &|| false).unwrap_err();
        assert_eq!(
            error.to_string(),
            "\"d/arm\" is in the images for linux/arm/v7 and for linux/amd64, whose files are to be written to one directory"
        );
        assert!(!refused.exists());
    }
}
