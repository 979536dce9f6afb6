//! The build context as a tree that COPY reads.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Arc;

use rustix::fs::FileType;

use super::copy::{SourceNode, SourceTree};
use crate::context::{BuildContext, ContextError, ContextNode, NodeKind};
use crate::rootfs::Metadata;

/// A context, read through its ignore rules.
pub(super) struct ContextTree(pub(super) Arc<BuildContext>);

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
            path: node.path,
        }
    }
}

impl ContextTree {
    /// A node with the owner that it has in the archive that the context was.
    fn with_owner(&self, node: ContextNode) -> SourceNode {
        let (uid, gid) = self.0.owner(&node);
        let mut node = SourceNode::from(node);
        (node.metadata.uid, node.metadata.gid) = (uid, gid);
        node
    }
}

impl SourceTree for ContextTree {
    fn lookup(&self, path: &Path, follow_last: bool) -> io::Result<Option<SourceNode>> {
        let node = self.0.lookup(path, follow_last).map_err(into_io)?;
        Ok(node.map(|node| self.with_owner(node)))
    }

    fn read_dir(&self, path: &Path) -> io::Result<Vec<(OsString, SourceNode)>> {
        let nodes = self.0.read_dir(path).map_err(into_io)?;
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
        self.0.open(path).map_err(into_io)
    }

    fn read_link(&self, path: &Path) -> io::Result<OsString> {
        self.0.read_link(path).map_err(into_io)
    }

    /// Attributes of the user's files stay on the user's machine; those in an archive do not.
    fn xattrs(&self, path: &Path) -> io::Result<BTreeMap<OsString, Vec<u8>>> {
        self.0.xattrs(path).map_err(into_io)
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
        let tree = ContextTree(Arc::new(opened.context));
        let path = Path::new("Dockerfile");
        let node = tree.lookup(path, true).unwrap().unwrap();
        assert_eq!((node.metadata.uid, node.metadata.gid), (1000, 50));
        let (name, listed) = &tree.read_dir(Path::new("")).unwrap()[0];
        assert_eq!(name, "Dockerfile");
        assert_eq!(listed.metadata, node.metadata);
        let attributes = BTreeMap::from([("user.a".into(), b"b".to_vec())]);
        assert_eq!(tree.xattrs(path).unwrap(), attributes);

        let rules = IgnoreRules::default();
        let directory = BuildContext::directory(tree.0.path(), rules).unwrap();
        let directory = ContextTree(Arc::new(directory));
        let node = directory.lookup(path, true).unwrap().unwrap();
        assert_eq!((node.metadata.uid, node.metadata.gid), (0, 0));
        assert_eq!(directory.xattrs(path).unwrap(), BTreeMap::new());
    }
}
