//! [`Files`]: everything in a root filesystem, in one list; [`Root`]: those of several.

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, major, minor};

use crate::image::Platform;
use crate::rootfs::{
    Change, ChangeKind, Data, Entry, FileContent, FileSource, Metadata, Node, RootfsError, Stack,
    Time,
};

/// The files of one platform's image, and where they go.
#[derive(Clone, Debug)]
pub struct Root {
    /// What the image is for.
    pub platform: Platform,
    /// Whether the files go to a directory named after it, and not to where all begins.
    pub in_directory: bool,
    /// The files.
    pub stack: Stack,
}

/// The permissions of directories named after platforms, as in BuildKit.
const DIRECTORY_MODE: u32 = 0o755;

impl Root {
    /// The directory: `linux/arm/v7` is `linux_arm_v7`.
    fn directory(&self) -> Option<PathBuf> {
        let name = self.platform.to_string().replace('/', "_");
        self.in_directory.then(|| name.into())
    }

    /// All files, as [`files`] lists them, below the directory where they go to one. That
    /// is dated `epoch`, or 1970, as in BuildKit.
    pub(super) fn files(
        &self,
        epoch: Option<i64>,
    ) -> impl Iterator<Item = Result<Change, RootfsError>> + use<> {
        let directory = self.directory();
        let entry = directory.clone().map(|path| {
            let metadata = Metadata {
                mode: DIRECTORY_MODE,
                uid: 0,
                gid: 0,
                mtime: Time {
                    seconds: epoch.unwrap_or(0),
                    nanoseconds: 0,
                },
                xattrs: BTreeMap::new(),
            };
            let data = Data::Directory { opaque: false };
            let kind = ChangeKind::Entry(Entry { metadata, data });
            Ok(Change { path, kind })
        });
        let files = files(&self.stack, epoch).map(move |change| match (&directory, change) {
            (Some(directory), Ok(change)) => Ok(below(directory, change)),
            (_, change) => change,
        });
        entry.into_iter().chain(files)
    }
}

/// Sorts by where the files go, which is the order of an archive.
pub(super) fn sorted(roots: &[Root]) -> Vec<&Root> {
    let mut sorted: Vec<&Root> = roots.iter().collect();
    sorted.sort_by_key(|root| root.directory());
    sorted
}

/// The change with its paths below `directory`.
fn below(directory: &Path, mut change: Change) -> Change {
    change.path = directory.join(&change.path);
    if let ChangeKind::Entry(Entry {
        data: Data::Hardlink(first),
        ..
    }) = &mut change.kind
    {
        *first = directory.join(&first);
    }
    change
}

/// Lists all files but the root itself, in the order of [`crate::rootfs::order`]: a
/// directory, then what is in it, sorted by bytes. Of several names of one file, those
/// after the first are hard links to that.
///
/// Times are whole seconds, as in layers: what was just made and what comes from a layer
/// must not differ. With an `epoch` (seconds since 1970 UTC) all are that, as in BuildKit.
/// Sockets, which no layer can hold, are left out.
///
/// Each item may be an error; nothing follows it.
pub(super) fn files(stack: &Stack, epoch: Option<i64>) -> Files {
    Files {
        stack: stack.clone(),
        epoch,
        state: State::New,
        levels: Vec::new(),
        links: HashMap::new(),
    }
}

/// The iterator of [`files`].
pub(super) struct Files {
    stack: Stack,
    epoch: Option<i64>,
    state: State,
    /// What is left of the directories from the root down to the one that is being read.
    levels: Vec<std::vec::IntoIter<(OsString, Node)>>,
    /// Where files with several names were met first, by device and inode.
    links: HashMap<(u64, u64), PathBuf>,
}

enum State {
    New,
    Walking,
    Over,
}

impl Iterator for Files {
    type Item = Result<Change, RootfsError>;

    fn next(&mut self) -> Option<Self::Item> {
        let step = match self.state {
            State::Over => return None,
            State::New => self.start().and_then(|()| self.step()),
            State::Walking => self.step(),
        };
        let item = step.transpose();
        if !matches!(item, Some(Ok(_))) {
            self.state = State::Over;
        }
        item
    }
}

impl Files {
    fn start(&mut self) -> Result<(), RootfsError> {
        self.state = State::Walking;
        let failed = || RootfsError::io("listing", Path::new("/"));
        if let Some(root) = self.stack.lookup(Path::new("/"), true).map_err(failed())? {
            let entries = self.stack.read_dir(&root).map_err(failed())?;
            self.levels.push(entries.into_iter());
        }
        Ok(())
    }

    fn step(&mut self) -> Result<Option<Change>, RootfsError> {
        while let Some(level) = self.levels.last_mut() {
            let Some((_, node)) = level.next() else {
                self.levels.pop();
                continue;
            };
            if node.file_type() == FileType::Socket {
                continue;
            }
            let path = node.path().to_owned();
            let data = self.data(&node)?;
            let xattrs = self.stack.xattrs(&node);
            let found = node.metadata();
            let metadata = Metadata {
                mtime: Time {
                    seconds: self.epoch.unwrap_or(found.mtime.seconds),
                    nanoseconds: 0,
                },
                xattrs: xattrs.map_err(RootfsError::io("reading the attributes of", &path))?,
                ..found
            };
            let kind = ChangeKind::Entry(Entry { metadata, data });
            return Ok(Some(Change { path, kind }));
        }
        Ok(None)
    }

    fn data(&mut self, node: &Node) -> Result<Data, RootfsError> {
        let path = node.path();
        if node.file_type() == FileType::Directory {
            let entries = self.stack.read_dir(node);
            let entries = entries.map_err(RootfsError::io("listing", path))?;
            self.levels.push(entries.into_iter());
            return Ok(Data::Directory { opaque: false });
        }
        if node.nlink() > 1 {
            let id = node.device_and_inode();
            if let Some(first) = self.links.get(&id) {
                return Ok(Data::Hardlink(first.clone()));
            }
            self.links.insert(id, path.to_owned());
        }
        let (major, minor) = (major(node.rdev()), minor(node.rdev()));
        Ok(match node.file_type() {
            FileType::RegularFile => {
                let (stack, node) = (self.stack.clone(), node.clone());
                Data::File(FileContent {
                    size_bytes: node.size(),
                    source: FileSource::Open(Box::new(move || stack.open(&node))),
                })
            }
            FileType::Symlink => {
                let target = self.stack.read_link(node);
                Data::Symlink(target.map_err(RootfsError::io("reading the link", path))?)
            }
            FileType::CharacterDevice => Data::CharDevice { major, minor },
            FileType::BlockDevice => Data::BlockDevice { major, minor },
            FileType::Fifo => Data::Fifo,
            FileType::Directory | FileType::Socket | FileType::Unknown => {
                return Err(RootfsError::BadChange {
                    path: path.to_owned(),
                    reason: "it has an unknown file type",
                });
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rootfs::{line, tree_of};

    #[test]
    fn a_stack_is_listed_as_one_filesystem() {
        let (_base, base) = tree_of(&[
            "755 a/",
            "644 a/hidden = x",
            "644 a/linked = text",
            "644 a/other == a/linked",
            "644 a/third == a/linked",
            "755 a.b/",
            "700 gone/",
            "644 gone/x = x",
            "777 link -> ../..",
            "600 pipe |",
        ]);
        let (_top, top) = tree_of(&[
            "750 a/",
            "-a/hidden",
            "4755 a/linked = new",
            "-gone",
            "644 pipe.txt = y",
        ]);
        let stack = Stack::new(vec![base, top]);
        let lines = |epoch| -> Vec<String> {
            let listed = files(&stack, epoch).map(|change| change.unwrap());
            listed.map(line).collect()
        };
        let mut want = vec![
            "750 a/",
            "4755 a/linked = new",
            // Its first name is another file now.
            "644 a/other = text",
            "644 a/third == a/other",
            "755 a.b/",
            "777 link -> ../..",
            "600 pipe |",
            "644 pipe.txt = y",
        ];
        let owner = (rustix::process::geteuid(), rustix::process::getegid());
        if owner.0.as_raw() == 0 {
            assert_eq!(lines(None), want);
        } else {
            let owner = format!(" ({}:{})", owner.0.as_raw(), owner.1.as_raw());
            let owned = want.drain(..).map(|line| format!("{line}{owner}"));
            assert_eq!(lines(None), owned.collect::<Vec<_>>());
        }
        let times = |epoch| -> std::collections::BTreeSet<i64> {
            let listed = files(&stack, epoch).map(|change| change.unwrap().kind);
            listed
                .map(|kind| match kind {
                    ChangeKind::Entry(entry) => entry.metadata.mtime.seconds,
                    ChangeKind::Removed => panic!("nothing is removed"),
                })
                .collect()
        };
        assert_eq!(times(None), [1_400_000_000].into());
        // Later than all files, which are not only clamped.
        assert_eq!(times(Some(1_500_000_000)), [1_500_000_000].into());
        assert_eq!(files(&Stack::default(), None).count(), 0);
    }
}
