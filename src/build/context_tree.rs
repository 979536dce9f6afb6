//! The build context as a tree that COPY reads.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::fd::AsFd as _;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};

use rustix::fs::FileType;

use super::Engine;
use super::copy::{SourceNode, SourceTree};
use super::stat_cache::{FileState, StatCache};
use crate::context::{BuildContext, ContextError, ContextNode, NodeKind};
use crate::image::Digest;
use crate::plan::ContextId;
use crate::rootfs::{Metadata, Time};
use crate::store::Store;

/// A context, read through its ignore rules.
pub(super) struct ContextTree {
    context: Arc<BuildContext>,
    stat_cache: Option<Arc<StatCache>>,
}

/// The stat caches of a build's contexts, each read when it is first needed.
#[derive(Debug, Default)]
pub(super) struct StatCaches(Mutex<BTreeMap<ContextId, Option<Arc<StatCache>>>>);

impl StatCaches {
    /// Of the context `id`. None for what was fetched or unpacked for this build alone.
    fn of(&self, store: &Store, id: ContextId, context: &BuildContext) -> Option<Arc<StatCache>> {
        if context.path().starts_with(store.tmp()) {
            return None;
        }
        let mut caches = self.lock();
        let cache = caches.entry(id).or_insert_with(|| {
            StatCache::open(store, context.path(), context.as_fd()).map(Arc::new)
        });
        cache.clone()
    }

    /// Keeps what was learned so far for the next build. Blocking.
    pub(super) fn save(&self, store: &Store) {
        let caches: Vec<_> = self.lock().values().flatten().cloned().collect();
        for cache in caches {
            if let Err(error) = cache.save(store) {
                let error = format!("{:#}", anyhow::Error::new(error));
                tracing::warn!(error, "files of the context will be hashed again");
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<ContextId, Option<Arc<StatCache>>>> {
        self.0
            .lock()
            .expect("nothing panics while it holds this lock")
    }
}

impl Engine {
    /// The files of a context. Blocking.
    pub(super) fn context_tree(&self, id: ContextId) -> anyhow::Result<Arc<ContextTree>> {
        let context = self.context(id)?;
        let stat_cache = self.stat_caches.of(&self.store, id, &context);
        Ok(Arc::new(ContextTree {
            context,
            stat_cache,
        }))
    }
}

impl From<ContextNode> for SourceNode {
    fn from(node: ContextNode) -> Self {
        let device = match node.kind {
            NodeKind::CharDevice(device) | NodeKind::BlockDevice(device) => device,
            _ => 0,
        };
        Self {
            file_type: match node.kind {
                NodeKind::File => FileType::RegularFile,
                NodeKind::Directory => FileType::Directory,
                NodeKind::Symlink => FileType::Symlink,
                NodeKind::Fifo => FileType::Fifo,
                NodeKind::Socket => FileType::Socket,
                NodeKind::CharDevice(_) => FileType::CharacterDevice,
                NodeKind::BlockDevice(_) => FileType::BlockDevice,
            },
            // Who owns a file on the user's machine means nothing in the image; see `with_owner`.
            metadata: Metadata {
                mode: node.mode,
                mtime: node.mtime,
                ..Metadata::default()
            },
            size_bytes: node.size_bytes,
            identity: node.inode,
            changed: node.ctime,
            links: node.links,
            device: (rustix::fs::major(device), rustix::fs::minor(device)),
            target: None,
            path: node.path,
        }
    }
}

impl ContextTree {
    /// A context whose files nobody knows.
    pub(super) fn new(context: Arc<BuildContext>) -> Self {
        Self {
            context,
            stat_cache: None,
        }
    }

    /// A context with what is known of its files.
    #[cfg(test)]
    pub(super) fn with_cache(context: Arc<BuildContext>, cache: Arc<StatCache>) -> Self {
        Self {
            context,
            stat_cache: Some(cache),
        }
    }

    /// A node with the owner that it has in the archive that the context was.
    fn with_owner(&self, node: ContextNode) -> SourceNode {
        let (uid, gid) = self.context.owner(&node);
        let mut node = SourceNode::from(node);
        (node.metadata.uid, node.metadata.gid) = (uid, gid);
        node
    }
}

impl SourceTree for ContextTree {
    fn lookup(&self, path: &Path, follow_last: bool) -> io::Result<Option<SourceNode>> {
        let node = self.context.lookup(path, follow_last).map_err(into_io)?;
        Ok(node.map(|node| self.with_owner(node)))
    }

    fn read_dir(&self, path: &Path) -> io::Result<Vec<(OsString, SourceNode)>> {
        let nodes = self.context.read_dir(path).map_err(into_io)?;
        Ok(nodes
            .into_iter()
            .map(|node| {
                (
                    node.path.file_name().unwrap_or_default().to_owned(),
                    self.with_owner(node),
                )
            })
            .collect())
    }

    fn open(&self, path: &Path) -> io::Result<File> {
        self.context.open_seen(path).map_err(into_io)
    }

    fn read_link(&self, path: &Path) -> io::Result<OsString> {
        self.context.read_link(path).map_err(into_io)
    }

    /// Attributes of the user's files stay on the user's machine; those in an archive do not.
    fn xattrs(&self, path: &Path) -> io::Result<BTreeMap<OsString, Vec<u8>>> {
        self.context.xattrs(path).map_err(into_io)
    }

    fn digest(&self, node: &SourceNode) -> Option<Digest> {
        self.stat_cache.as_ref()?.get(&node.state())
    }

    fn learn(&self, state: &FileState, digest: &Digest, since: Time) {
        if let Some(cache) = &self.stat_cache {
            cache.learn(state, digest, since);
        }
    }
}

/// Keeps the kind, which decides what is said, and the context's own words.
fn into_io(error: ContextError) -> io::Error {
    match error {
        ContextError::Io { source, .. } => source,
        other => io::Error::other(other),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::context::{IgnoreRules, SourceInput, open};

    /// An archive with one file of user 1000, group 50, with an attribute.
    fn archive() -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        let attribute = [("SCHILY.xattr.user.a", &b"b"[..])];
        builder.append_pax_extensions(attribute).unwrap();
        let mut header = tar::Header::new_ustar();
        header.set_size(12);
        header.set_mode(0o644);
        header.set_uid(1000);
        header.set_gid(50);
        let content = &b"FROM scratch"[..];
        builder
            .append_data(&mut header, "Dockerfile", content)
            .unwrap();
        builder.into_inner().unwrap()
    }

    #[test]
    fn owners_and_attributes_are_those_of_an_archive_and_not_of_a_directory() {
        let tmp = tempfile::tempdir().unwrap();
        let stdin = io::Cursor::new(archive());
        let opened = open(&SourceInput::StandardInput, None, None, stdin, tmp.path()).unwrap();
        let tree = ContextTree::new(Arc::new(opened.context));
        let path = Path::new("Dockerfile");
        let node = tree.lookup(path, true).unwrap().unwrap();
        assert_eq!((node.metadata.uid, node.metadata.gid), (1000, 50));
        let (name, listed) = &tree.read_dir(Path::new("")).unwrap()[0];
        assert_eq!(name, "Dockerfile");
        assert_eq!(listed.metadata, node.metadata);
        let attributes = BTreeMap::from([("user.a".into(), b"b".to_vec())]);
        assert_eq!(tree.xattrs(path).unwrap(), attributes);

        let rules = IgnoreRules::default();
        let directory = BuildContext::directory(tree.context.path(), rules).unwrap();
        let directory = ContextTree::new(Arc::new(directory));
        let node = directory.lookup(path, true).unwrap().unwrap();
        assert_eq!((node.metadata.uid, node.metadata.gid), (0, 0));
        assert_eq!(directory.xattrs(path).unwrap(), BTreeMap::new());
    }
}
