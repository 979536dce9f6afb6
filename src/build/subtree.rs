//! [`Subtree`]: one path of a context, a stage or an image with everything below it, for mounts.

use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context as _;
use rustix::fs::{FileType, Gid, Mode, Uid};

use super::copy::{SourceNode, SourceTree};
use crate::image::{Digest, Hasher};
use crate::io::HashingReader;
use crate::rootfs::{
    Change, ChangeKind, Data, Entry, FileContent, FileSource, Metadata, materialize,
};

/// The name of the subtree's root while it is written.
const ROOT: &str = "files";

/// A path of a [`SourceTree`] and everything below it.
pub(super) struct Subtree {
    tree: Arc<dyn SourceTree>,
    root: SourceNode,
    /// What is below the root, in path order; relative to it.
    entries: Vec<(PathBuf, SourceNode)>,
}

impl Subtree {
    /// Looks at everything below `path`, whose links are followed; `place` names the tree in errors.
    pub(super) fn find(tree: Arc<dyn SourceTree>, path: &str, place: &str) -> anyhow::Result<Self> {
        let found = tree.lookup(Path::new(path), true);
        let root = found
            .with_context(|| format!("reading {path:?} of {place}"))?
            .with_context(|| format!("{path:?} not found in {place}"))?;
        let mut entries = Vec::new();
        let mut pending = vec![(PathBuf::new(), root.clone())];
        while let Some((relative, node)) = pending.pop() {
            if node.file_type != FileType::Directory {
                continue;
            }
            let children = tree.read_dir(&node.path);
            let children =
                children.with_context(|| format!("reading {:?} of {place}", node.path))?;
            for (name, child) in children {
                let relative = relative.join(name);
                entries.push((relative.clone(), child.clone()));
                pending.push((relative, child));
            }
        }
        entries.sort_by(|(a, _), (b, _)| crate::rootfs::order(a, b));
        Ok(Self {
            tree,
            root,
            entries,
        })
    }

    /// The digest of names, types, modes, owners, and contents; no times.
    pub(super) fn digest(&self) -> anyhow::Result<Digest> {
        let mut hasher = Hasher::new();
        let mut field = |bytes: &[u8]| {
            hasher.update(&(bytes.len() as u64).to_le_bytes());
            hasher.update(bytes);
        };
        for (path, node) in self.all() {
            let owner = (node.metadata.uid, node.metadata.gid);
            let facts = format!(
                "{:?} {:o} {owner:?} {:?}",
                node.file_type, node.metadata.mode, node.device
            );
            field(path.as_os_str().as_bytes());
            field(facts.as_bytes());
            if node.file_type != FileType::Symlink {
                for (name, value) in self.tree.xattrs(&node.path)? {
                    field(name.as_bytes());
                    field(&value);
                }
            }
            match node.file_type {
                FileType::Symlink => field(self.tree.read_link(&node.path)?.as_bytes()),
                FileType::RegularFile => {
                    let mut reader = HashingReader::new(self.tree.open(&node.path)?);
                    io::copy(&mut reader, &mut io::sink())?;
                    field(reader.finish().1.as_str().as_bytes());
                }
                _ => {}
            }
        }
        Ok(hasher.finish())
    }

    /// Writes it into the empty directory `dir` and returns the path of its root.
    pub(super) fn write(&self, dir: &Path) -> anyhow::Result<PathBuf> {
        let changes = self
            .all()
            .filter(|(_, node)| node.file_type != FileType::Socket)
            .map(|(path, node)| self.change(&path, node))
            .collect::<io::Result<Vec<_>>>()?;
        materialize(changes, dir)?;
        Ok(dir.join(ROOT))
    }

    /// Root and entries with the paths that they are written to.
    fn all(&self) -> impl Iterator<Item = (PathBuf, &SourceNode)> {
        let entries = self.entries.iter();
        let entries = entries.map(|(path, node)| (Path::new(ROOT).join(path), node));
        std::iter::once((PathBuf::from(ROOT), &self.root)).chain(entries)
    }

    fn change(&self, path: &Path, node: &SourceNode) -> io::Result<Change> {
        let (major, minor) = node.device;
        let data = match node.file_type {
            FileType::Directory => Data::Directory { opaque: false },
            FileType::Symlink => Data::Symlink(self.tree.read_link(&node.path)?),
            FileType::Fifo => Data::Fifo,
            FileType::CharacterDevice => Data::CharDevice { major, minor },
            FileType::BlockDevice => Data::BlockDevice { major, minor },
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
        let mut metadata = node.metadata.clone();
        if node.file_type != FileType::Symlink {
            metadata.xattrs = self.tree.xattrs(&node.path)?;
        }
        Ok(Change {
            path: path.to_owned(),
            kind: ChangeKind::Entry(Entry { metadata, data }),
        })
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

/// Gives `path` an owner and a mode.
pub(super) fn dress(path: &Path, mode: u32, uid: u32, gid: u32) -> io::Result<()> {
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    rustix::fs::chown(path, Some(uid), Some(gid))?;
    rustix::fs::chmod(path, Mode::from_raw_mode(mode & 0o7777))?;
    Ok(())
}
