//! Which files a COPY reads, and what of them reaches the layer.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::FileType;

use super::super::content::{Entry, Kind, source_of_file};
use super::super::context_tree::ContextTree;
use super::super::listing::{Listing, Origin, Role};
use super::super::remote::Fetched;
use super::{CopyError, SourceNode, SourceTree};
use crate::context::glob::Pattern;
use crate::context::ignore::DirectoryMatch;
use crate::context::{BuildContext, IgnoreRules};
use crate::image::Digest;
use crate::layer::archive::is_archive;
use crate::plan::{CopyDefinition, CopySource};
use crate::rootfs::Metadata;

/// The files that a COPY reads, in the order in which it names them.
pub(in super::super) struct Selection {
    pub(super) items: Vec<Item>,
    /// What is read of them.
    pub(in super::super) listing: Arc<Listing>,
    /// What is surely not meant.
    pub(in super::super) notes: Vec<String>,
}

/// One source, or one file that a pattern matches.
pub(super) struct Item {
    pub(super) origin: Origin,
    pub(super) kind: ItemKind,
}

pub(super) enum ItemKind {
    /// One file, under the name that the Dockerfile has for it.
    File {
        name: OsString,
        node: SourceNode,
        /// Which file of the listing it is.
        number: Option<usize>,
    },
    /// An archive whose entries are added.
    Archive {
        node: SourceNode,
        /// Which file of the listing it is.
        number: Option<usize>,
    },
    /// What is in a directory, in path order.
    Directory {
        /// Where it is.
        at: PathBuf,
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
    /// Which file of the listing it is, for the first name of a regular file.
    pub(super) number: Option<usize>,
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
    let listing = Arc::new(list(&mut items)?);
    Ok(Selection {
        items,
        listing,
        notes,
    })
}

/// Lists everything that reaches the layer but times: names, types, modes, owners, link
/// targets, which names are of one file, and files, whose contents are not read yet.
fn list(items: &mut [Item]) -> Result<Listing, CopyError> {
    let mut listing = Listing::default();
    for Item { origin, kind } in items {
        match kind {
            ItemKind::File { name, node, number } => {
                origin.complete(node)?;
                listing.source(&source_of_file(&node.path, name));
                *number = listing.node(origin, Path::new(name), node, Role::Content)?;
            }
            ItemKind::Archive { node, number } => {
                origin.complete(node)?;
                listing.source(&node.path);
                *number = listing.node(origin, Path::new(""), node, Role::Archive)?;
            }
            ItemKind::Directory { at, root, entries } => {
                listing.source(at);
                if let Some(root) = root {
                    origin.complete(root)?;
                    listing.node(origin, Path::new(""), root, Role::Content)?;
                }
                list_entries(&mut listing, origin, entries)?;
            }
            ItemKind::Inline { name, content } => {
                listing.source(Path::new(""));
                let digest = Digest::of(content.as_bytes());
                let metadata = Metadata::default();
                listing.entry(Entry::new(Path::new(name), Kind::Text(digest), &metadata));
            }
        }
    }
    Ok(listing)
}

/// Lists what is in a directory.
fn list_entries(
    listing: &mut Listing,
    origin: &Origin,
    entries: &mut [Selected],
) -> Result<(), CopyError> {
    // The first name of each file that has several, and which file of the listing it is.
    let mut first: HashMap<(u64, u64), (PathBuf, Option<usize>)> = HashMap::new();
    for entry in entries {
        let Selected { path, node, .. } = entry;
        origin.complete(node)?;
        let has_names = node.file_type == FileType::RegularFile && node.links > 1;
        if has_names && let Some((first, number)) = first.get(&node.identity) {
            listing.hard_link(origin, path, node, first);
            // Only the first name in the layer is read, and that may be another one.
            entry.number = *number;
            continue;
        }
        let role = if entry.is_parent {
            Role::Parent
        } else {
            Role::Content
        };
        entry.number = listing.node(origin, path, node, role)?;
        if has_names {
            first.insert(node.identity, (path.clone(), entry.number));
        }
    }
    Ok(())
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
                tree: Arc::new(ContextTree::new(Arc::new(context))),
                place,
                is_dated: false,
            };
            let root = origin.tree.lookup(Path::new(""), false);
            let root = root.map_err(read_error)?;
            let entries = origin.walk(Path::new(""), None, excludes)?;
            let kind = ItemKind::Directory {
                at: PathBuf::new(),
                root,
                entries,
            };
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
                    at: node.path,
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
    /// One file that is no directory.
    fn file(&self, name: OsString, node: SourceNode, unpack: bool) -> Result<ItemKind, CopyError> {
        let is_archive = unpack && node.file_type == FileType::RegularFile && {
            let file = self.tree.open(&node.path);
            let is_archive = file.and_then(is_archive);
            is_archive.map_err(self.read_error(&node.path))?
        };
        Ok(if is_archive {
            ItemKind::Archive { node, number: None }
        } else {
            ItemKind::File {
                name,
                node,
                number: None,
            }
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
                    number: None,
                }));
                selected.push(Selected {
                    path: path.clone(),
                    node,
                    is_parent: false,
                    number: None,
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
