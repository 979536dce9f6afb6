//! COPY and ADD: files of a source → changes on top of a filesystem.
//!
//! In two parts, because the first alone decides the cache key: [`select`] says which
//! files are read, [`place`] where they go.
//!
//! Follows BuildKit's file operations where the reference is silent: links named as
//! sources are followed, inside copied directories they stay links; an existing
//! destination directory keeps its metadata, directories below it take the source's.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::FileType;
use rustix::io::Errno;
use thiserror::Error;

use super::additions::{Addition, Additions, NewDirectory, inline, own_time};
use super::unpack::{self, UnpackError};
use crate::context::glob::Pattern;
use crate::image::{Digest, Hasher};
use crate::io::HashingReader;
use crate::layer::archive::is_archive;
use crate::plan::{Chmod, CopyDefinition, CopySource};
use crate::rootfs::{Change, Data, FileContent, FileSource, Metadata, Node, Stack, Time};

/// A filesystem that COPY reads: a build context, or the layers of a stage or an image.
pub(super) trait SourceTree: Send + Sync {
    /// What is at `path`. Links in parents are followed inside the tree; the last
    /// component's only where `follow_last`.
    fn lookup(&self, path: &Path, follow_last: bool) -> io::Result<Option<SourceNode>>;
    /// What is in the directory `path` (without links), sorted by name.
    fn read_dir(&self, path: &Path) -> io::Result<Vec<(OsString, SourceNode)>>;
    /// Opens the regular file `path` (without links).
    fn open(&self, path: &Path) -> io::Result<File>;
    /// The target of the link `path` (without links in its parents).
    fn read_link(&self, path: &Path) -> io::Result<OsString>;
    /// The extended attributes of `path` that belong in a layer.
    fn xattrs(&self, path: &Path) -> io::Result<BTreeMap<OsString, Vec<u8>>>;
}

/// A file of a [`SourceTree`].
#[derive(Clone, Debug)]
pub(super) struct SourceNode {
    /// Its path in the tree, without links.
    pub(super) path: PathBuf,
    /// Its type.
    pub(super) file_type: FileType,
    /// Mode, owner and time.
    pub(super) metadata: Metadata,
    /// Its size.
    pub(super) size_bytes: u64,
    /// Device and inode.
    pub(super) identity: (u64, u64),
    /// When content or metadata last changed; the same for all files that cannot.
    pub(super) changed: Time,
    /// The number of its names.
    pub(super) links: u64,
    /// Major and minor number of a device.
    pub(super) device: (u32, u32),
}

/// What is wrong with a COPY.
#[derive(Debug, Error)]
pub(super) enum CopyError {
    /// A source that has no wildcard is not there.
    #[error("{path:?} not found in {place}")]
    Missing {
        /// As written.
        path: String,
        /// Such as `the build context`.
        place: &'static str,
    },
    /// A wildcard pattern is none.
    #[error("invalid pattern {pattern:?}: {reason}")]
    Pattern {
        /// As written.
        pattern: String,
        /// What is wrong with it.
        reason: String,
    },
    /// An archive cannot be unpacked.
    #[error("unpacking the archive {path:?}")]
    Unpack {
        /// The archive.
        path: PathBuf,
        /// Why.
        #[source]
        source: UnpackError,
    },
    /// The source cannot be read.
    #[error("reading {path:?} of {place}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Such as `the build context`.
        place: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The destination has something of another type.
    #[error("cannot copy {what} to {path:?}: {reason}")]
    Place {
        /// Such as `a directory`.
        what: &'static str,
        /// Where.
        path: PathBuf,
        /// What is there.
        reason: String,
    },
    /// A socket or something unknown.
    #[error("{0} is not supported yet")]
    Unsupported(String),
    /// A socket or something unknown.
    #[error("{0:?} is neither file, directory, link, pipe nor device")]
    Type(PathBuf),
}

/// The files that a COPY reads, in the order in which it names them.
pub(super) struct Selection {
    tree: Arc<dyn SourceTree>,
    place: &'static str,
    items: Vec<Item>,
}

enum Item {
    /// One file, under the name that the Dockerfile has for it.
    File { name: OsString, node: SourceNode },
    /// An archive whose entries are added.
    Archive { node: SourceNode },
    /// The content of a directory, in path order, with paths relative to it.
    Directory { entries: Vec<(PathBuf, SourceNode)> },
    /// A file whose content stands in the Dockerfile.
    Inline { name: String, content: String },
}

/// Finds the files that `definition` names in `tree`; `place` names that in errors.
pub(super) fn select(
    definition: &CopyDefinition,
    tree: Arc<dyn SourceTree>,
    place: &'static str,
) -> Result<Selection, CopyError> {
    let mut items = Vec::new();
    for source in &definition.sources {
        let source = match source {
            CopySource::Path(path) => path,
            CopySource::Inline { name, content } => {
                items.push(Item::Inline {
                    name: name.clone(),
                    content: content.clone(),
                });
                continue;
            }
            CopySource::Url { .. } | CopySource::Git { .. } => {
                return Err(CopyError::Unsupported(format!("{source:?}")));
            }
        };
        let read_error = |source_error| CopyError::Read {
            path: source.into(),
            place,
            source: source_error,
        };
        let found = if has_wildcards(source) {
            expand(tree.as_ref(), source, place)?
        } else {
            let name = file_name(source);
            let node = tree.lookup(Path::new(source), true).map_err(read_error)?;
            let node = node.ok_or_else(|| CopyError::Missing {
                path: source.clone(),
                place,
            })?;
            vec![(name, node)]
        };
        for (name, node) in found {
            if node.file_type == FileType::Directory {
                let mut entries = Vec::new();
                walk(tree.as_ref(), &node.path, &PathBuf::new(), &mut entries).map_err(
                    |(path, source)| CopyError::Read {
                        path,
                        place,
                        source,
                    },
                )?;
                items.push(Item::Directory { entries });
            } else {
                let is_archive = definition.unpack && node.file_type == FileType::RegularFile && {
                    let file = tree.open(&node.path).map_err(read_error)?;
                    is_archive(file).map_err(read_error)?
                };
                items.push(if is_archive {
                    Item::Archive { node }
                } else {
                    Item::File { name, node }
                });
            }
        }
    }
    Ok(Selection { tree, place, items })
}

/// Whether the path has a wildcard; escaped ones are none.
fn has_wildcards(path: &str) -> bool {
    let mut chars = path.chars();
    while let Some(c) = chars.next() {
        match c {
            '*' | '?' | '[' => return true,
            '\\' => drop(chars.next()),
            _ => {}
        }
    }
    false
}

/// The name that a file gets in a directory: the last component as written.
fn file_name(source: &str) -> OsString {
    Path::new(source).file_name().unwrap_or_default().to_owned()
}

/// The files that match a pattern, sorted. Links on the way are followed only before the
/// first wildcard, as a walk over the tree sees them.
fn expand(
    tree: &dyn SourceTree,
    pattern: &str,
    place: &'static str,
) -> Result<Vec<(OsString, SourceNode)>, CopyError> {
    let parts: Vec<&str> = pattern
        .split('/')
        .filter(|p| !p.is_empty() && *p != ".")
        .collect();
    let first = parts
        .iter()
        .position(|p| has_wildcards(p))
        .unwrap_or(parts.len());
    let prefix: PathBuf = parts[..first].iter().collect();
    let read_error = |path: &Path| {
        let path = path.to_owned();
        move |source| CopyError::Read {
            path,
            place,
            source,
        }
    };
    let Some(root) = tree.lookup(&prefix, true).map_err(read_error(&prefix))? else {
        return Ok(Vec::new());
    };
    let mut found = vec![(OsString::new(), root)];
    for part in &parts[first..] {
        let matcher = Pattern::parse(part).map_err(|error| CopyError::Pattern {
            pattern: pattern.to_owned(),
            reason: error.to_string(),
        })?;
        let mut next = Vec::new();
        for (_, node) in found
            .iter()
            .filter(|(_, node)| node.file_type == FileType::Directory)
        {
            let entries = tree.read_dir(&node.path).map_err(read_error(&node.path))?;
            next.extend(
                entries
                    .into_iter()
                    .filter(|(name, _)| matcher.matches(name.as_bytes())),
            );
        }
        found = next;
    }
    // A link that matches is followed, as one that is named.
    let mut followed = Vec::new();
    for (name, node) in found {
        let node = if node.file_type == FileType::Symlink {
            let target = tree
                .lookup(&node.path, true)
                .map_err(read_error(&node.path))?;
            target.ok_or_else(|| CopyError::Missing {
                path: node.path.display().to_string(),
                place,
            })?
        } else {
            node
        };
        followed.push((name, node));
    }
    Ok(followed)
}

fn walk(
    tree: &dyn SourceTree,
    directory: &Path,
    relative: &Path,
    entries: &mut Vec<(PathBuf, SourceNode)>,
) -> Result<(), (PathBuf, io::Error)> {
    for (name, node) in tree
        .read_dir(directory)
        .map_err(|error| (directory.to_owned(), error))?
    {
        let path = relative.join(name);
        let below = (node.file_type == FileType::Directory).then(|| node.path.clone());
        entries.push((path.clone(), node));
        if let Some(below) = below {
            walk(tree, &below, &path, entries)?;
        }
    }
    Ok(())
}

impl Selection {
    /// The digest of everything that reaches the layer but times: names, types, modes,
    /// owners where they are kept, link targets and contents.
    pub(super) fn content_digest(&self, keep_owner: bool) -> Result<Digest, CopyError> {
        let mut hasher = Hasher::new();
        for item in &self.items {
            match item {
                Item::File { name, node } => {
                    self.hash_node(&mut hasher, Path::new(name), node, keep_owner)?
                }
                Item::Archive { node } => {
                    hash_fields(&mut hasher, &[b"archive"]);
                    self.hash_node(&mut hasher, Path::new(""), node, keep_owner)?;
                }
                Item::Directory { entries } => {
                    hash_fields(&mut hasher, &[b"directory"]);
                    for (path, node) in entries {
                        self.hash_node(&mut hasher, path, node, keep_owner)?;
                    }
                }
                Item::Inline { name, content } => {
                    hash_fields(
                        &mut hasher,
                        &[b"inline", name.as_bytes(), content.as_bytes()],
                    );
                }
            }
        }
        Ok(hasher.finish())
    }

    fn hash_node(
        &self,
        hasher: &mut Hasher,
        path: &Path,
        node: &SourceNode,
        keep_owner: bool,
    ) -> Result<(), CopyError> {
        let read = |source| CopyError::Read {
            path: node.path.clone(),
            place: self.place,
            source,
        };
        let owner = keep_owner.then_some((node.metadata.uid, node.metadata.gid));
        let facts = format!(
            "{:?} {:o} {owner:?} {:?}",
            node.file_type, node.metadata.mode, node.device
        );
        hash_fields(hasher, &[path.as_os_str().as_bytes(), facts.as_bytes()]);
        if node.file_type != FileType::Symlink {
            for (name, value) in self.tree.xattrs(&node.path).map_err(read)? {
                hash_fields(hasher, &[name.as_bytes(), &value]);
            }
        }
        match node.file_type {
            FileType::Symlink => {
                let target = self.tree.read_link(&node.path).map_err(read)?;
                hash_fields(hasher, &[target.as_bytes()]);
            }
            FileType::RegularFile => {
                let mut reader = HashingReader::new(self.tree.open(&node.path).map_err(read)?);
                io::copy(&mut reader, &mut io::sink()).map_err(read)?;
                let (_, digest, size) = reader.finish();
                hash_fields(
                    hasher,
                    &[digest.as_str().as_bytes(), size.to_string().as_bytes()],
                );
            }
            _ => {}
        }
        Ok(())
    }
}

/// The files of a selection as they were when their digest was made.
pub(super) struct Snapshot {
    tree: Arc<dyn SourceTree>,
    nodes: Vec<SourceNode>,
}

impl Selection {
    /// The regular files as they were selected, to be compared when they have been read again.
    pub(super) fn snapshot(&self) -> Snapshot {
        let nodes = self.items.iter().flat_map(|item| match item {
            Item::File { node, .. } | Item::Archive { node } => vec![node],
            Item::Directory { entries } => entries.iter().map(|(_, node)| node).collect(),
            Item::Inline { .. } => Vec::new(),
        });
        let nodes = nodes.filter(|node| node.file_type == FileType::RegularFile);
        Snapshot {
            tree: Arc::clone(&self.tree),
            nodes: nodes.cloned().collect(),
        }
    }
}

impl Snapshot {
    /// A file that is not what it was, if there is one.
    pub(super) fn changed(&self) -> Option<&Path> {
        let facts = |node: &SourceNode| {
            let SourceNode {
                size_bytes,
                identity,
                changed,
                ..
            } = *node;
            (size_bytes, identity, changed, node.metadata.mtime)
        };
        let is_same = |node: &&SourceNode| {
            let now = self.tree.lookup(&node.path, false);
            now.is_ok_and(|now| now.is_some_and(|now| facts(&now) == facts(node)))
        };
        let changed = self.nodes.iter().find(|node| !is_same(node));
        changed.map(|node| node.path.as_path())
    }
}

/// Hashes fields so that no two lists of fields give the same bytes.
fn hash_fields(hasher: &mut Hasher, fields: &[&[u8]]) {
    hasher.update(&(fields.len() as u64).to_le_bytes());
    for field in fields {
        hasher.update(&(field.len() as u64).to_le_bytes());
        hasher.update(field);
    }
}

/// Works out what `selection` adds on top of `below`.
///
/// `owner` is `--chown` in numbers; `epoch` dates directories that are made on the way;
/// `spool` is an empty directory that lives until the changes have been written.
pub(super) fn place(
    selection: Selection,
    definition: &CopyDefinition,
    below: &Stack,
    owner: Option<(u32, u32)>,
    epoch: Option<i64>,
    spool: &Path,
) -> Result<Vec<Change>, CopyError> {
    let new_directory = NewDirectory {
        owner: owner.unwrap_or_default(),
        mode: octal(definition).unwrap_or(0o755),
        mtime: own_time(epoch),
    };
    let mut placing = Placing {
        additions: Additions::new(below, new_directory),
        tree: selection.tree,
        from: selection.place,
        owner: if definition.keep_owner {
            owner
        } else {
            Some(owner.unwrap_or_default())
        },
        mode: octal(definition),
        epoch,
    };
    let destination = Path::new(&definition.destination);
    let resolved = placing.resolve(destination)?;
    let is_directory = definition.destination.ends_with('/');
    for (index, item) in selection.items.into_iter().enumerate() {
        match item {
            Item::Directory { entries } => {
                placing.make_directory(&resolved)?;
                for (path, node) in entries {
                    placing.add(&resolved.join(path), index, &node)?;
                }
            }
            Item::File { name, node } => {
                let path = placing.target(&resolved, is_directory, &name)?;
                placing.add(&path, index, &node)?;
            }
            Item::Archive { node } => {
                placing.make_directory(&resolved)?;
                let archive = placing
                    .tree
                    .open(&node.path)
                    .map_err(|source| CopyError::Read {
                        path: node.path.clone(),
                        place: placing.from,
                        source,
                    })?;
                unpack::unpack(
                    archive,
                    &resolved,
                    owner,
                    index,
                    spool,
                    &mut placing.additions,
                )
                .map_err(|source| CopyError::Unpack {
                    path: node.path,
                    source,
                })?;
            }
            Item::Inline { name, content } => {
                let path = placing.target(&resolved, is_directory, OsStr::new(&name))?;
                placing.add_inline(&path, &content)?;
            }
        }
    }
    Ok(placing.additions.into_changes())
}

/// `--chmod` as a mode.
fn octal(definition: &CopyDefinition) -> Option<u32> {
    match definition.chmod {
        Some(Chmod::Mode(mode)) => Some(mode),
        _ => None,
    }
}

struct Placing<'s> {
    additions: Additions<'s>,
    tree: Arc<dyn SourceTree>,
    from: &'static str,
    /// The owner of everything; absent: each file's own.
    owner: Option<(u32, u32)>,
    /// The mode of everything but links; absent: each file's own.
    mode: Option<u32>,
    epoch: Option<i64>,
}

impl Placing<'_> {
    fn resolve(&self, path: &Path) -> Result<PathBuf, CopyError> {
        self.additions
            .resolve(path)
            .map_err(|error| place_error("anything", path, &error))
    }

    /// Where one file goes: into the destination where that is a directory, else onto it.
    fn target(
        &self,
        destination: &Path,
        is_directory: bool,
        name: &OsStr,
    ) -> Result<PathBuf, CopyError> {
        let found = self
            .additions
            .file_type(destination)
            .map_err(|e| place_error("a file", destination, &e))?;
        let into = is_directory || found == Some(FileType::Directory);
        Ok(if into {
            destination.join(name)
        } else {
            destination.to_owned()
        })
    }

    fn make_directory(&mut self, path: &Path) -> Result<(), CopyError> {
        if path.as_os_str().is_empty() {
            return Ok(());
        }
        self.additions
            .make_directory(path)
            .map_err(|error| place_error("a directory", path, &error))
    }

    fn add_inline(&mut self, path: &Path, content: &str) -> Result<(), CopyError> {
        let (uid, gid) = self.owner.unwrap_or_default();
        let metadata = Metadata {
            mode: self.mode.unwrap_or(0o644),
            uid,
            gid,
            mtime: own_time(self.epoch),
            xattrs: BTreeMap::new(),
        };
        self.additions
            .add(
                path,
                Addition {
                    metadata,
                    data: inline(content),
                    identity: None,
                },
            )
            .map_err(|error| place_error("a file", path, &error))
    }

    fn add(&mut self, path: &Path, item: usize, node: &SourceNode) -> Result<(), CopyError> {
        let read = |source| CopyError::Read {
            path: node.path.clone(),
            place: self.from,
            source,
        };
        let (data, what) = match node.file_type {
            FileType::RegularFile => {
                let (tree, source) = (Arc::clone(&self.tree), node.path.clone());
                let open = Box::new(move || tree.open(&source));
                let content = FileContent {
                    size_bytes: node.size_bytes,
                    source: FileSource::Open(open),
                };
                (Data::File(content), "a file")
            }
            FileType::Directory => (Data::Directory { opaque: false }, "a directory"),
            FileType::Symlink => (
                Data::Symlink(self.tree.read_link(&node.path).map_err(read)?),
                "a link",
            ),
            FileType::Fifo => (Data::Fifo, "a pipe"),
            FileType::CharacterDevice => (
                Data::CharDevice {
                    major: node.device.0,
                    minor: node.device.1,
                },
                "a device",
            ),
            FileType::BlockDevice => (
                Data::BlockDevice {
                    major: node.device.0,
                    minor: node.device.1,
                },
                "a device",
            ),
            // A socket is of no use to anybody but the process that made it.
            FileType::Socket => return Ok(()),
            FileType::Unknown => return Err(CopyError::Type(node.path.clone())),
        };
        let mut metadata = node.metadata.clone();
        if node.file_type != FileType::Symlink {
            metadata.xattrs = self.tree.xattrs(&node.path).map_err(read)?;
            metadata.mode = self.mode.unwrap_or(metadata.mode);
        }
        if let Some((uid, gid)) = self.owner {
            (metadata.uid, metadata.gid) = (uid, gid);
        }
        let is_linked = node.file_type == FileType::RegularFile && node.links > 1;
        let identity = is_linked.then_some((item, node.identity.0, node.identity.1));
        self.additions
            .add(
                path,
                Addition {
                    metadata,
                    data,
                    identity,
                },
            )
            .map_err(|error| place_error(what, path, &error))
    }
}

fn place_error(what: &'static str, path: &Path, error: &io::Error) -> CopyError {
    let reason = match error.raw_os_error().map(Errno::from_raw_os_error) {
        Some(Errno::ISDIR) => "a directory is there".to_owned(),
        Some(Errno::NOTDIR) => "it, or a parent of it, is there and not a directory".to_owned(),
        _ => error.to_string(),
    };
    CopyError::Place {
        what,
        path: Path::new("/").join(path),
        reason,
    }
}

impl From<&Node> for SourceNode {
    fn from(node: &Node) -> Self {
        let device = node.rdev();
        Self {
            path: node.path().to_owned(),
            file_type: node.file_type(),
            metadata: node.metadata(),
            size_bytes: node.size(),
            identity: node.device_and_inode(),
            changed: Time::default(),
            links: node.nlink(),
            device: (rustix::fs::major(device), rustix::fs::minor(device)),
        }
    }
}

/// The file at a path that an earlier look-up gave.
fn node_at(stack: &Stack, path: &Path) -> io::Result<Node> {
    stack
        .lookup(path, false)?
        .ok_or_else(|| Errno::NOENT.into())
}

impl SourceTree for Stack {
    fn lookup(&self, path: &Path, follow_last: bool) -> io::Result<Option<SourceNode>> {
        Ok(Self::lookup(self, path, follow_last)?.map(|node| SourceNode::from(&node)))
    }

    fn read_dir(&self, path: &Path) -> io::Result<Vec<(OsString, SourceNode)>> {
        let entries = Self::read_dir(self, &node_at(self, path)?)?;
        Ok(entries
            .into_iter()
            .map(|(name, node)| (name, SourceNode::from(&node)))
            .collect())
    }

    fn open(&self, path: &Path) -> io::Result<File> {
        Self::open(self, &node_at(self, path)?)
    }

    fn read_link(&self, path: &Path) -> io::Result<OsString> {
        Self::read_link(self, &node_at(self, path)?)
    }

    fn xattrs(&self, path: &Path) -> io::Result<BTreeMap<OsString, Vec<u8>>> {
        Self::xattrs(self, &node_at(self, path)?)
    }
}

#[cfg(test)]
mod tests;
