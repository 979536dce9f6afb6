//! [`Subtree`]: one path of a context, a stage or an image with everything below it, for mounts.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use anyhow::Context as _;
use rustix::fs::{FileType, Gid, Mode, Uid};

use super::copy::{SourceNode, SourceTree};
use super::listing::{Listing, Origin, Role, read_ahead};
use crate::owners::{Inodes, Owner};
use crate::rootfs::{
    Change, ChangeKind, Data, Entry, FileContent, FileSource, Metadata, materialize,
};

/// The name of the subtree's root while it is written.
const ROOT: &str = "files";

/// Larger files are copied by the kernel, which may share their blocks, and hashed then;
/// others are hashed on the way.
const HASHED_ON_THE_WAY_BYTES: u64 = 1 << 20;

/// A path of a [`SourceTree`] and everything below it, with the contents as they were copied.
pub(super) struct Subtree {
    tree: Arc<dyn SourceTree>,
    /// The root with the path [`ROOT`] and what is below it, in path order; and which file of
    /// the listing it is.
    entries: Vec<(PathBuf, SourceNode, Option<usize>)>,
    /// All of it as one source.
    listing: Arc<Listing>,
    /// Whether the files may change while they are read.
    is_live: bool,
}

impl Subtree {
    /// Lists everything at and below `path`, whose links are followed; `place` names the tree
    /// in errors. `is_live` says that its files may change.
    pub(super) fn find(
        tree: Arc<dyn SourceTree>,
        path: &str,
        place: &'static str,
        is_live: bool,
    ) -> anyhow::Result<Self> {
        let found = tree.lookup(Path::new(path), true);
        let root = found
            .with_context(|| format!("reading {path:?} of {place}"))?
            .with_context(|| format!("{path:?} not found in {place}"))?;
        let mut listing = Listing::default();
        listing.source(&root.path);
        let mut nodes = vec![(PathBuf::new(), root.clone())];
        let mut pending = vec![(PathBuf::new(), root)];
        while let Some((relative, node)) = pending.pop() {
            if node.file_type != FileType::Directory {
                continue;
            }
            let children = tree.read_dir(&node.path);
            let children =
                children.with_context(|| format!("reading {:?} of {place}", node.path))?;
            for (name, child) in children {
                let relative = relative.join(name);
                if child.file_type == FileType::Directory {
                    pending.push((relative.clone(), child.clone()));
                }
                nodes.push((relative, child));
            }
        }
        nodes.sort_by(|(a, _), (b, _)| crate::rootfs::order(a, b));
        let origin = Origin {
            tree: Arc::clone(&tree),
            place,
            is_dated: false,
        };
        let mut entries = Vec::with_capacity(nodes.len());
        for (path, mut node) in nodes {
            origin.complete(&mut node)?;
            let number = listing.node(&origin, &path, &node, Role::Content)?;
            let path = match path.as_os_str().is_empty() {
                true => PathBuf::from(ROOT),
                false => Path::new(ROOT).join(path),
            };
            entries.push((path, node, number));
        }
        Ok(Self {
            tree,
            entries,
            listing: Arc::new(listing),
            is_live,
        })
    }

    /// What is in it: names, types, modes, owners, and contents; no times.
    pub(super) fn listing(&self) -> &Arc<Listing> {
        &self.listing
    }

    /// Writes it into the empty directory `dir` and returns the path of its root. The listing
    /// has the digests of what was written.
    pub(super) fn write(&self, dir: &Path) -> anyhow::Result<PathBuf> {
        let wanted = self.entries.iter();
        let wanted = wanted.filter(|(_, node, _)| node.file_type != FileType::Socket);
        let mut changes: Vec<Change> = wanted.map(|entry| self.change(entry)).collect();
        read_ahead(&mut changes);
        materialize(changes, dir)?;
        if self.is_live {
            let copied_by_kernel = self.entries.iter().filter_map(|(path, node, number)| {
                let number = (*number)?;
                (node.size_bytes > HASHED_ON_THE_WAY_BYTES).then(|| (number, dir.join(path)))
            });
            self.listing.hash_copies(copied_by_kernel.collect())?;
        }
        Ok(dir.join(ROOT))
    }

    fn change(&self, entry: &(PathBuf, SourceNode, Option<usize>)) -> Change {
        let (path, node, number) = entry;
        let (major, minor) = node.device;
        let data = match (node.file_type, *number) {
            (FileType::Directory, _) => Data::Directory { opaque: false },
            (FileType::Symlink, _) => Data::Symlink(node.target.clone().unwrap_or_default()),
            (FileType::Fifo, _) => Data::Fifo,
            (FileType::CharacterDevice, _) => Data::CharDevice { major, minor },
            (FileType::BlockDevice, _) => Data::BlockDevice { major, minor },
            (_, Some(number)) if self.is_live && node.size_bytes <= HASHED_ON_THE_WAY_BYTES => {
                let listing = Arc::clone(&self.listing);
                Data::File(FileContent {
                    size_bytes: node.size_bytes,
                    source: FileSource::Read(Box::new(move || Ok(Box::new(listing.open(number)?)))),
                })
            }
            _ => {
                let (tree, source) = (Arc::clone(&self.tree), node.path.clone());
                Data::File(FileContent {
                    size_bytes: node.size_bytes,
                    source: FileSource::Open(Box::new(move || -> io::Result<File> {
                        tree.open(&source)
                    })),
                })
            }
        };
        Change {
            path: path.clone(),
            kind: ChangeKind::Entry(Entry {
                metadata: node.metadata.clone(),
                data,
            }),
        }
    }
}

/// Files that mounts show: found once for all steps of a build, and copied once.
pub(super) struct SharedFiles {
    pub(super) subtree: Subtree,
    /// The root of the copy, once there is one.
    copy: Mutex<Option<PathBuf>>,
}

impl SharedFiles {
    pub(super) fn new(subtree: Subtree) -> Self {
        Self {
            subtree,
            copy: Mutex::new(None),
        }
    }

    /// The path of a copy that nobody may write to; `dir` makes an empty directory that stays
    /// as long as the build. Blocking.
    pub(super) fn copy(
        &self,
        dir: impl FnOnce() -> anyhow::Result<PathBuf>,
    ) -> anyhow::Result<PathBuf> {
        // Who comes second waits for it.
        let mut copy = self
            .copy
            .lock()
            .expect("nothing panics while it holds this lock");
        if let Some(path) = &*copy {
            return Ok(path.clone());
        }
        let path = self.subtree.write(&dir()?)?;
        Ok(copy.insert(path).clone())
    }
}

/// Makes an empty directory with this owner and mode at `dir`, which is there and empty.
pub(super) fn empty(dir: &Path, mode: u32, uid: u32, gid: u32) -> anyhow::Result<PathBuf> {
    let entry = Entry {
        metadata: Metadata {
            mode,
            uid,
            gid,
            ..Metadata::default()
        },
        data: Data::Directory { opaque: false },
    };
    let change = Change {
        path: ROOT.into(),
        kind: ChangeKind::Entry(entry),
    };
    materialize([change], dir)?;
    Ok(dir.join(ROOT))
}

/// Gives `path` a mode and an owner, who is noted in `inodes` where there are any.
pub(super) fn dress(
    path: &Path,
    mode: u32,
    owner: Owner,
    inodes: Option<&Inodes>,
) -> io::Result<()> {
    if let Some(inodes) = inodes {
        let found = rustix::fs::stat(path)?;
        inodes.set((found.st_dev, found.st_ino), owner);
    } else {
        let (uid, gid) = (Uid::from_raw(owner.uid), Gid::from_raw(owner.gid));
        rustix::fs::chown(path, Some(uid), Some(gid))?;
    }
    rustix::fs::chmod(path, Mode::from_raw_mode(mode & 0o7777))?;
    Ok(())
}
