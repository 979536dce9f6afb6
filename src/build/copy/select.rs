//! Which files a COPY reads, and the digest of what of them reaches the layer.

use std::collections::{BTreeMap, VecDeque};
use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::FileType;

use super::super::context_tree::ContextTree;
use super::super::remote::Fetched;
use super::{CopyError, SourceNode, SourceTree};
use crate::context::glob::Pattern;
use crate::context::ignore::DirectoryMatch;
use crate::context::{BuildContext, IgnoreRules};
use crate::image::{Digest, Hasher};
use crate::io::HashingReader;
use crate::layer::archive::is_archive;
use crate::plan::{CopyDefinition, CopySource};

/// The files that a COPY reads, in the order in which it names them.
pub(in super::super) struct Selection {
    pub(super) items: Vec<Item>,
    /// What is surely not meant.
    pub(in super::super) notes: Vec<String>,
}

/// One source, or one file that a pattern matches.
pub(super) struct Item {
    pub(super) origin: Origin,
    pub(super) kind: ItemKind,
}

/// Where files are read.
#[derive(Clone)]
pub(super) struct Origin {
    pub(super) tree: Arc<dyn SourceTree>,
    /// What that is in errors, such as `the build context`.
    pub(super) place: &'static str,
    /// Whether times are part of what was fetched, and not only of where it lay.
    is_dated: bool,
}

pub(super) enum ItemKind {
    /// One file, under the name that the Dockerfile has for it.
    File { name: OsString, node: SourceNode },
    /// An archive whose entries are added.
    Archive { node: SourceNode },
    /// What is in a directory, in path order.
    Directory {
        /// The directory itself, where it becomes the destination; absent: only its content
        /// is copied.
        root: Option<SourceNode>,
        entries: Vec<Selected>,
    },
    /// A file whose content stands in the Dockerfile.
    Inline { name: String, content: String },
}

/// A file in a directory that is copied.
pub(super) struct Selected {
    /// Its path in the directory.
    pub(super) path: PathBuf,
    pub(super) node: SourceNode,
    /// A directory that is not selected itself, but something in it.
    pub(super) is_parent: bool,
}

/// Finds the files that `definition` names.
///
/// Paths are looked up in `tree`; `place` names that in errors. `fetched` has, by its place
/// among the sources, each that is a URL or a git repository.
pub(in super::super) fn select(
    definition: &CopyDefinition,
    tree: Arc<dyn SourceTree>,
    place: &'static str,
    mut fetched: BTreeMap<usize, Fetched>,
) -> Result<Selection, CopyError> {
    let excludes = rules(&definition.excludes)?;
    let origin = Origin {
        tree,
        place,
        is_dated: false,
    };
    let (mut items, mut notes) = (Vec::new(), Vec::new());
    for (index, source) in definition.sources.iter().enumerate() {
        match source {
            CopySource::Path(path) => {
                let paths = Paths::new(path, definition.parents, &excludes)?;
                let before = items.len();
                paths.select(&origin, definition.unpack, &mut items)?;
                if items.len() == before {
                    notes.push(format!("nothing matches {path:?} in {}", origin.place));
                }
            }
            CopySource::Inline { name, content } => items.push(Item {
                origin: origin.clone(),
                kind: ItemKind::Inline {
                    name: name.clone(),
                    content: content.clone(),
                },
            }),
            CopySource::Url { .. } | CopySource::Git { .. } => {
                let source = fetched
                    .remove(&index)
                    .ok_or_else(|| CopyError::NotFetched(format!("{source:?}")))?;
                items.push(remote(source, definition.unpack_remote, &excludes)?);
            }
        }
    }
    notes.extend(excluded_nothing(definition, &items));
    Ok(Selection { items, notes })
}

/// What was fetched, as something to place.
fn remote(source: Fetched, unpack: bool, excludes: &IgnoreRules) -> Result<Item, CopyError> {
    match source {
        Fetched::File(file) => {
            let name = OsString::from(&file.name);
            let origin = Origin {
                tree: Arc::new(file),
                place: "what was fetched",
                is_dated: true,
            };
            let path = Path::new(&name);
            let node = origin.tree.lookup(path, false);
            let node = node.and_then(|node| node.ok_or_else(|| io::ErrorKind::NotFound.into()));
            let node = node.map_err(origin.read_error(path))?;
            let kind = origin.file(name, node, unpack)?;
            Ok(Item { origin, kind })
        }
        Fetched::Directory(path) => {
            let context = BuildContext::directory(&path, IgnoreRules::default());
            let place = "the git repository";
            let read_error = |source| CopyError::Read {
                path: path.clone(),
                place,
                source,
            };
            let context = context.map_err(|error| read_error(io::Error::other(error)))?;
            let origin = Origin {
                tree: Arc::new(ContextTree(Arc::new(context))),
                place,
                is_dated: false,
            };
            let root = origin.tree.lookup(Path::new(""), false);
            let root = root.map_err(read_error)?;
            let entries = origin.walk(Path::new(""), None, excludes)?;
            let kind = ItemKind::Directory { root, entries };
            Ok(Item { origin, kind })
        }
    }
}

/// What of `--exclude` cannot have the effect that it was written for.
fn excluded_nothing(definition: &CopyDefinition, items: &[Item]) -> Vec<String> {
    let mut notes = Vec::new();
    for pattern in &definition.excludes {
        let bare = pattern.strip_prefix('!').unwrap_or(pattern);
        if let Some(relative) = bare.strip_prefix('/') {
            notes.push(format!(
                "--exclude={pattern} leaves nothing out: patterns are relative to the directory that is copied, as in --exclude={relative}"
            ));
        }
    }
    let is_directory = |item: &Item| matches!(item.kind, ItemKind::Directory { .. });
    if !definition.excludes.is_empty() && !items.is_empty() && !items.iter().any(is_directory) {
        notes.push(
            "--exclude leaves nothing out: it is for what is in directories, and no source is one"
                .to_owned(),
        );
    }
    notes
}

fn rules(patterns: &[String]) -> Result<IgnoreRules, CopyError> {
    IgnoreRules::from_patterns(patterns.iter().map(String::as_str)).map_err(|(pattern, reason)| {
        CopyError::Pattern {
            pattern,
            reason: reason.to_string(),
        }
    })
}

/// A source that is a path.
struct Paths<'d> {
    /// As written.
    written: &'d str,
    /// The path, possibly with wildcards; clean.
    path: String,
    /// With `--parents`: what is copied of it.
    include: Option<IgnoreRules>,
    exclude: &'d IgnoreRules,
    /// Whether something has to be there.
    is_required: bool,
}

impl<'d> Paths<'d> {
    fn new(written: &'d str, parents: bool, exclude: &'d IgnoreRules) -> Result<Self, CopyError> {
        if !parents {
            return Ok(Self {
                written,
                path: clean(written),
                include: None,
                exclude,
                is_required: false,
            });
        }
        let (path, pattern) = written.split_once("/./").unwrap_or(("", written));
        let is_required = !has_wildcards(path) && !has_wildcards(pattern);
        // An absolute one is not made shorter, but for one slash.
        let pattern = match pattern.strip_prefix('/') {
            Some(relative) => relative.to_owned(),
            None => clean(pattern),
        };
        if clean(&pattern).is_empty() {
            return Err(CopyError::NoPath(written.to_owned()));
        }
        Ok(Self {
            written,
            path: clean(path),
            include: Some(rules(&[pattern])?),
            exclude,
            is_required,
        })
    }

    /// Adds an item for each file that is named.
    fn select(
        &self,
        origin: &Origin,
        unpack: bool,
        items: &mut Vec<Item>,
    ) -> Result<(), CopyError> {
        let missing = || CopyError::Missing {
            path: self.written.to_owned(),
            place: origin.place,
        };
        let path = Path::new(&self.path);
        let found = if has_wildcards(&self.path) {
            origin.expand(&self.path)?
        } else {
            let node = origin.tree.lookup(path, true);
            let node = node.map_err(origin.read_error(path))?;
            let name = path.file_name().unwrap_or_default().to_owned();
            vec![(name, node.ok_or_else(missing)?)]
        };
        let mut is_there = false;
        for (name, node) in found {
            let kind = if node.file_type == FileType::Directory {
                let entries = origin.walk(&node.path, self.include.as_ref(), self.exclude)?;
                is_there |= !entries.is_empty();
                ItemKind::Directory {
                    root: None,
                    entries,
                }
            } else {
                origin.file(name, node, unpack)?
            };
            items.push(Item {
                origin: origin.clone(),
                kind,
            });
        }
        if self.is_required && !is_there {
            return Err(missing());
        }
        Ok(())
    }
}

/// `path` relative to the root, without `.`, `..` and doubled slashes.
fn clean(path: &str) -> String {
    let mut parts: Vec<&str> = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop();
            }
            part => parts.push(part),
        }
    }
    parts.join("/")
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

impl Origin {
    pub(super) fn read_error(&self, path: &Path) -> impl FnOnce(io::Error) -> CopyError + use<> {
        let (path, place) = (path.to_owned(), self.place);
        move |source| CopyError::Read {
            path,
            place,
            source,
        }
    }

    /// One file that is no directory.
    fn file(&self, name: OsString, node: SourceNode, unpack: bool) -> Result<ItemKind, CopyError> {
        let is_archive = unpack && node.file_type == FileType::RegularFile && {
            let file = self.tree.open(&node.path);
            let is_archive = file.and_then(is_archive);
            is_archive.map_err(self.read_error(&node.path))?
        };
        Ok(if is_archive {
            ItemKind::Archive { node }
        } else {
            ItemKind::File { name, node }
        })
    }

    /// The files that match a pattern, sorted. Links on the way are followed only before the
    /// first wildcard, as a walk over the tree sees them.
    fn expand(&self, pattern: &str) -> Result<Vec<(OsString, SourceNode)>, CopyError> {
        let parts: Vec<&str> = pattern.split('/').collect();
        let first = parts.iter().position(|p| has_wildcards(p));
        let (before, wild) = parts.split_at(first.unwrap_or(parts.len()));
        let mut matchers = Vec::new();
        for part in wild {
            let matcher = Pattern::parse(part).map_err(|error| CopyError::Pattern {
                pattern: pattern.to_owned(),
                reason: error.to_string(),
            })?;
            matchers.push(matcher);
        }
        let prefix: PathBuf = before.iter().collect();
        let root = self.tree.lookup(&prefix, true);
        let Some(root) = root.map_err(self.read_error(&prefix))? else {
            return Ok(Vec::new());
        };
        let mut found = vec![(OsString::new(), root)];
        for matcher in matchers {
            let mut next = Vec::new();
            for (_, node) in found {
                if node.file_type != FileType::Directory {
                    continue;
                }
                let entries = self.tree.read_dir(&node.path);
                let entries = entries.map_err(self.read_error(&node.path))?;
                let matching = |(name, _): &(OsString, _)| matcher.matches(name.as_bytes());
                next.extend(entries.into_iter().filter(matching));
            }
            found = next;
        }
        // A link that matches is followed, as one that is named.
        for (_, node) in &mut found {
            if node.file_type != FileType::Symlink {
                continue;
            }
            let target = self.tree.lookup(&node.path, true);
            let target = target.map_err(self.read_error(&node.path))?;
            *node = target.ok_or_else(|| CopyError::Missing {
                path: node.path.display().to_string(),
                place: self.place,
            })?;
        }
        Ok(found)
    }

    /// What is in the directory `root`, parents before children, siblings by name.
    ///
    /// `include`, where there is one, has to match a path or a directory above it; `exclude`
    /// must not. A directory that is left out is there as parent of what is not.
    fn walk(
        &self,
        root: &Path,
        include: Option<&IgnoreRules>,
        exclude: &IgnoreRules,
    ) -> Result<Vec<Selected>, CopyError> {
        let mut selected: Vec<Selected> = Vec::new();
        // The directories on the way to the current one that wait for something in them.
        let mut waiting: Vec<(PathBuf, SourceNode)> = Vec::new();
        // No recursion: how deep it goes is somebody else's choice.
        let mut todo = vec![Level {
            entries: self.list(root)?,
            path: PathBuf::new(),
            included: None,
            excluded: None,
            is_waiting: false,
        }];
        while let Some(level) = todo.last_mut() {
            let Some((name, node)) = level.entries.pop_front() else {
                if level.is_waiting {
                    waiting.pop();
                }
                todo.pop();
                continue;
            };
            let path = level.path.join(name);
            let (is_included, included) = match include {
                Some(rules) => {
                    let (matches, matched) = rules.step(&path, level.included.as_ref());
                    (matches, Some(matched))
                }
                None => (true, None),
            };
            let (is_excluded, excluded) = exclude.step(&path, level.excluded.as_ref());
            let is_selected = is_included && !is_excluded;
            let is_directory = node.file_type == FileType::Directory;
            let enters = is_directory
                && (!is_excluded || exclude.may_reinclude_below(&path))
                && (is_included || include.is_none_or(|rules| rules.may_ignore_below(&path)));
            let below = node.path.clone();
            let is_waiting = enters && !is_selected;
            if is_selected {
                // Those above were selected, or made for something earlier.
                for level in &mut todo {
                    level.is_waiting = false;
                }
                selected.extend(waiting.drain(..).map(|(path, node)| Selected {
                    path,
                    node,
                    is_parent: true,
                }));
                selected.push(Selected {
                    path: path.clone(),
                    node,
                    is_parent: false,
                });
            } else if is_waiting {
                waiting.push((path.clone(), node));
            }
            if enters {
                todo.push(Level {
                    entries: self.list(&below)?,
                    path,
                    included,
                    excluded: Some(excluded),
                    is_waiting,
                });
            }
        }
        Ok(selected)
    }

    fn list(&self, directory: &Path) -> Result<VecDeque<(OsString, SourceNode)>, CopyError> {
        let entries = self.tree.read_dir(directory);
        Ok(entries.map_err(self.read_error(directory))?.into())
    }
}

/// A directory in which a walk is.
struct Level {
    /// What is still to come in it.
    entries: VecDeque<(OsString, SourceNode)>,
    /// Where it is below the walk's root.
    path: PathBuf,
    included: Option<DirectoryMatch>,
    excluded: Option<DirectoryMatch>,
    /// Whether it waits for something that is selected in it.
    is_waiting: bool,
}

impl Selection {
    /// The digest of everything that reaches the layer but times: names, types, modes,
    /// owners, link targets, which names are of one file, and contents.
    pub(in super::super) fn content_digest(&self) -> Result<Digest, CopyError> {
        let mut hasher = Hasher::new();
        for Item { origin, kind } in &self.items {
            let mut hashing = Hashing {
                origin,
                first: BTreeMap::new(),
                hasher: &mut hasher,
            };
            match kind {
                ItemKind::File { name, node } => hashing.node(Path::new(name), node)?,
                ItemKind::Archive { node } => {
                    hash_fields(hashing.hasher, &[b"archive"]);
                    hashing.node(Path::new(""), node)?;
                }
                ItemKind::Directory { root, entries } => {
                    hash_fields(hashing.hasher, &[b"directory"]);
                    if let Some(root) = root {
                        hashing.node(Path::new(""), root)?;
                    }
                    for entry in entries {
                        if entry.is_parent {
                            hash_fields(hashing.hasher, &[b"parent"]);
                        }
                        hashing.node(&entry.path, &entry.node)?;
                    }
                }
                ItemKind::Inline { name, content } => {
                    let fields = [b"inline".as_slice(), name.as_bytes(), content.as_bytes()];
                    hash_fields(&mut hasher, &fields);
                }
            }
        }
        Ok(hasher.finish())
    }

    /// The regular files as they were selected, to be compared when they have been read again.
    pub(in super::super) fn snapshot(&self) -> Snapshot {
        let mut files = Vec::new();
        for Item { origin, kind } in &self.items {
            let mut add = |node: &SourceNode| {
                if node.file_type == FileType::RegularFile {
                    files.push((Arc::clone(&origin.tree), node.clone()));
                }
            };
            match kind {
                ItemKind::File { node, .. } | ItemKind::Archive { node } => add(node),
                ItemKind::Directory { entries, .. } => {
                    entries.iter().for_each(|entry| add(&entry.node));
                }
                ItemKind::Inline { .. } => {}
            }
        }
        Snapshot(files)
    }
}

/// Hashes the files of one item.
struct Hashing<'h> {
    origin: &'h Origin,
    /// The first name of each file that has several.
    first: BTreeMap<(u64, u64), PathBuf>,
    hasher: &'h mut Hasher,
}

impl Hashing<'_> {
    fn node(&mut self, path: &Path, node: &SourceNode) -> Result<(), CopyError> {
        let tree = &self.origin.tree;
        let read = || self.origin.read_error(&node.path);
        let owner = (node.metadata.uid, node.metadata.gid);
        let time = self.origin.is_dated.then_some(node.metadata.mtime);
        let facts = format!(
            "{:?} {:o} {owner:?} {:?} {time:?}",
            node.file_type, node.metadata.mode, node.device
        );
        hash_fields(
            self.hasher,
            &[path.as_os_str().as_bytes(), facts.as_bytes()],
        );
        if node.file_type != FileType::Symlink {
            for (name, value) in tree.xattrs(&node.path).map_err(read())? {
                hash_fields(self.hasher, &[name.as_bytes(), &value]);
            }
        }
        match node.file_type {
            FileType::Symlink => {
                let target = tree.read_link(&node.path).map_err(read())?;
                hash_fields(self.hasher, &[target.as_bytes()]);
            }
            FileType::RegularFile => {
                if node.links > 1 {
                    if let Some(first) = self.first.get(&node.identity) {
                        let first = first.as_os_str().as_bytes();
                        hash_fields(self.hasher, &[b"name of", first]);
                        return Ok(());
                    }
                    self.first.insert(node.identity, path.to_owned());
                }
                let digest = match tree.digest(&node.path) {
                    Some(digest) => digest,
                    None => {
                        let file = tree.open(&node.path).map_err(read())?;
                        let mut reader = HashingReader::new(file);
                        io::copy(&mut reader, &mut io::sink()).map_err(read())?;
                        reader.finish().1
                    }
                };
                hash_fields(self.hasher, &[digest.as_str().as_bytes()]);
            }
            _ => {}
        }
        Ok(())
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

/// The files of a selection as they were when their digest was made.
pub(in super::super) struct Snapshot(Vec<(Arc<dyn SourceTree>, SourceNode)>);

impl Snapshot {
    /// A file that is not what it was, if there is one.
    pub(in super::super) fn changed(&self) -> Option<&Path> {
        let facts = |node: &SourceNode| {
            let SourceNode {
                size_bytes,
                identity,
                changed,
                ..
            } = *node;
            (size_bytes, identity, changed, node.metadata.mtime)
        };
        let is_same = |(tree, node): &&(Arc<dyn SourceTree>, SourceNode)| {
            let now = tree.lookup(&node.path, false);
            now.is_ok_and(|now| now.is_some_and(|now| facts(&now) == facts(node)))
        };
        let changed = self.0.iter().find(|file| !is_same(file));
        changed.map(|(_, node)| node.path.as_path())
    }
}
