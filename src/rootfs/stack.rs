//! [`Stack`]: several trees as one read-only filesystem, without mounting anything; and
//! [`LayerView`]: the same of layers that need not be unpacked.
//!
//! The rules are those of the kernel's overlay: of several entries with one name the
//! topmost counts; directories merge down to the first that is opaque or hidden by
//! something else. Links are resolved across trees, with the stack as root.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStringExt;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use rustix::fs::FileType;
use rustix::io::Errno;

use super::change::{Metadata, Time};
use super::listing::{ListedKind, Listing};
use super::tree::{self, Attributes, Tree};
use super::xattr;

/// Links followed in one look-up; the kernel's limit (`MAXSYMLINKS`).
const LINKS_LIMIT: u32 = 40;

/// The mode of a root directory in every image; see the module [`super`].
pub(super) const ROOT_MODE: u32 = 0o755;

/// Several trees looked at as one read-only filesystem.
#[derive(Clone, Debug, Default)]
pub struct Stack {
    trees: Vec<Arc<Tree>>,
    view: LayerView,
}

/// Several layers looked at as one read-only filesystem, each in the form in which it is there.
///
/// All look-ups give the same whatever the forms are. Only what is in files, [`LayerForm::Listing`]
/// does not know.
#[derive(Clone, Debug, Default)]
pub struct LayerView {
    layers: Vec<LayerForm>,
}

/// One layer.
#[derive(Clone, Debug)]
pub enum LayerForm {
    /// Unpacked.
    Tree(Arc<Tree>),
    /// Without contents.
    Listing(Arc<Listing>),
}

/// One file of a [`Stack`] or [`LayerView`], of any type. It means nothing to another one.
#[derive(Clone, Debug)]
pub struct Node {
    path: PathBuf,
    attributes: Attributes,
    /// Indices of the layers that have it, the one that counts first. More than one
    /// only for directories; none only for the root of an empty stack.
    trees: Vec<usize>,
    /// The layer whose word on owner, mode, time and attributes counts: the first, unless
    /// that has the directory and says nothing of it.
    described_by: usize,
}

/// What a layer has at a path.
struct Found {
    attributes: Attributes,
    /// Whether it is a directory that hides what lower layers have in it.
    opaque: bool,
    /// Whether it is a directory of which only lower layers can say what it is like.
    implied: bool,
}

impl Stack {
    /// Puts `trees` on top of each other, the base first.
    pub fn new(trees: Vec<Arc<Tree>>) -> Self {
        let layers = trees.iter().cloned().map(LayerForm::Tree).collect();
        let view = LayerView { layers };
        Self { trees, view }
    }

    /// Puts `tree` on top.
    pub fn push(&mut self, tree: Arc<Tree>) {
        self.view.layers.push(LayerForm::Tree(Arc::clone(&tree)));
        self.trees.push(tree);
    }

    /// The trees, the base first.
    pub fn trees(&self) -> &[Arc<Tree>] {
        &self.trees
    }

    /// See [`LayerView::lookup`].
    ///
    /// # Errors
    /// See there.
    pub fn lookup(&self, path: &Path, follow_last: bool) -> io::Result<Option<Node>> {
        self.view.lookup(path, follow_last)
    }

    /// See [`LayerView::read_dir`].
    ///
    /// # Errors
    /// See there.
    pub fn read_dir(&self, dir: &Node) -> io::Result<Vec<(OsString, Node)>> {
        self.view.read_dir(dir)
    }

    /// Opens the regular file `node` for reading.
    ///
    /// # Errors
    /// `EINVAL` where it is no regular file; those of `openat2(2)`.
    pub fn open(&self, node: &Node) -> io::Result<File> {
        let index = node.trees.first().ok_or(Errno::INVAL)?;
        tree::open_file(self.trees[*index].root(), &node.path, &node.attributes)
    }

    /// See [`LayerView::read_link`].
    ///
    /// # Errors
    /// See there.
    pub fn read_link(&self, node: &Node) -> io::Result<OsString> {
        self.view.read_link(node)
    }

    /// See [`LayerView::xattrs`].
    ///
    /// # Errors
    /// See there.
    pub fn xattrs(&self, node: &Node) -> io::Result<BTreeMap<OsString, Vec<u8>>> {
        self.view.xattrs(node)
    }

    /// The root directory.
    pub(super) fn root(&self) -> io::Result<Node> {
        self.view.root()
    }

    /// The entry `name` of the directory `dir`.
    pub(super) fn child(&self, dir: &Node, name: &OsStr) -> io::Result<Option<Node>> {
        self.view.child(dir, name)
    }
}

impl From<&Stack> for LayerView {
    fn from(stack: &Stack) -> Self {
        stack.view.clone()
    }
}

impl LayerForm {
    /// What the layer has at `path`, exactly that: no links.
    fn look_at(&self, path: &Path) -> io::Result<Option<Found>> {
        match self {
            Self::Tree(tree) => {
                let Some((fd, attributes)) = tree.look_at(path)? else {
                    return Ok(None);
                };
                Ok(Some(Found {
                    attributes,
                    opaque: attributes.is_dir() && xattr::is_opaque(fd.as_fd())?,
                    implied: false,
                }))
            }
            Self::Listing(listing) => Ok(listing.find(path).map(|number| {
                let file = listing.file(number);
                let directory = file.directory();
                Found {
                    attributes: file.attributes(number),
                    opaque: directory.is_some_and(|directory| directory.opaque),
                    implied: directory.is_some_and(|directory| directory.implied),
                }
            })),
        }
    }

    /// The names in the directory `path`, in no order.
    fn names(&self, path: &Path) -> io::Result<Vec<OsString>> {
        match self {
            Self::Tree(tree) => {
                let entries = tree::list(tree.root(), path)?;
                Ok(entries.into_iter().map(|(name, _)| name).collect())
            }
            Self::Listing(listing) => {
                let number = listing.find(path).ok_or(Errno::NOENT)?;
                let directory = listing.file(number).directory().ok_or(Errno::NOTDIR)?;
                Ok(directory.entries.keys().cloned().collect())
            }
        }
    }

    fn read_link(&self, path: &Path) -> io::Result<OsString> {
        match self {
            Self::Tree(tree) => {
                let (parent, name) = tree.root().open_exact_parent(path)?;
                let target = rustix::fs::readlinkat(parent, name, Vec::new())?;
                Ok(OsString::from_vec(target.into_bytes()))
            }
            Self::Listing(listing) => {
                let number = listing.find(path).ok_or(Errno::NOENT)?;
                match &listing.file(number).kind {
                    ListedKind::Symlink(target) => Ok(target.clone()),
                    _ => Err(Errno::INVAL.into()),
                }
            }
        }
    }

    fn xattrs(&self, path: &Path) -> io::Result<BTreeMap<OsString, Vec<u8>>> {
        match self {
            Self::Tree(tree) => {
                let (fd, _) = tree::look_at(tree.root(), path)?.ok_or(Errno::STALE)?;
                let mut xattrs = xattr::of_layer(fd.as_fd())?;
                if let Some(recorded) = tree.owners().and_then(|owners| owners.recorded(path)) {
                    let more = recorded.xattrs.iter();
                    let more = more.filter(|(name, _)| xattr::belongs_in_layer(name));
                    xattrs.extend(more.map(|(name, value)| (name.clone(), value.clone())));
                }
                Ok(xattrs)
            }
            Self::Listing(listing) => {
                let number = listing.find(path).ok_or(Errno::STALE)?;
                let mut xattrs = listing.file(number).metadata.xattrs.clone();
                xattrs.retain(|name, _| xattr::belongs_in_layer(name));
                Ok(xattrs)
            }
        }
    }
}

impl LayerView {
    /// Puts `layers` on top of each other, the base first.
    pub fn new(layers: Vec<LayerForm>) -> Self {
        Self { layers }
    }

    /// Whether there is no layer at all.
    pub fn is_empty(&self) -> bool {
        self.layers.is_empty()
    }

    /// Finds `path`, whether or not it has a leading slash. Links in all parents are
    /// followed, the last component only if `follow_last`; `..` stops at the root. A
    /// trailing slash means nothing. `None` if there is no such file, also where a
    /// parent is not a directory.
    ///
    /// # Errors
    /// `ELOOP` after 40 links; those of reading the trees.
    pub fn lookup(&self, path: &Path, follow_last: bool) -> io::Result<Option<Node>> {
        let mut found = vec![self.root()?];
        let mut left: Vec<OsString> = names(path);
        left.reverse();
        let mut links = 0;
        while let Some(name) = left.pop() {
            let here = found.last().expect("the root is never popped");
            if !here.attributes.is_dir() {
                return Ok(None);
            }
            if name == ".." {
                if found.len() > 1 {
                    found.pop();
                }
                continue;
            }
            let Some(node) = self.child(here, &name)? else {
                return Ok(None);
            };
            if node.file_type() == FileType::Symlink && (follow_last || !left.is_empty()) {
                links += 1;
                if links > LINKS_LIMIT {
                    return Err(Errno::LOOP.into());
                }
                let target = PathBuf::from(self.read_link(&node)?);
                if target.is_absolute() {
                    found.truncate(1);
                }
                left.extend(names(&target).into_iter().rev());
            } else {
                found.push(node);
            }
        }
        Ok(found.pop())
    }

    /// What the directory `dir` holds, sorted by the bytes of the names.
    ///
    /// # Errors
    /// `ENOTDIR` where `dir` is something else; those of reading the trees.
    pub fn read_dir(&self, dir: &Node) -> io::Result<Vec<(OsString, Node)>> {
        if !dir.attributes.is_dir() {
            return Err(Errno::NOTDIR.into());
        }
        let mut having: BTreeMap<OsString, Vec<usize>> = BTreeMap::new();
        for &index in &dir.trees {
            for name in self.layers[index].names(&dir.path)? {
                having.entry(name).or_default().push(index);
            }
        }
        let mut entries = Vec::with_capacity(having.len());
        for (name, layers) in having {
            if let Some(node) = self.node(dir.path.join(&name), &layers)? {
                entries.push((name, node));
            }
        }
        Ok(entries)
    }

    /// The target of the symbolic link `node`, verbatim.
    ///
    /// # Errors
    /// `EINVAL` where it is none; those of `readlinkat(2)`.
    pub fn read_link(&self, node: &Node) -> io::Result<OsString> {
        let index = node.trees.first().ok_or(Errno::INVAL)?;
        self.layers[*index].read_link(&node.path)
    }

    /// The extended attributes of `node` that belong into layers: see [`super::belongs_in_layer`].
    ///
    /// # Errors
    /// Those of `listxattr(2)` and `getxattr(2)`.
    pub fn xattrs(&self, node: &Node) -> io::Result<BTreeMap<OsString, Vec<u8>>> {
        if node.trees.is_empty() {
            return Ok(BTreeMap::new());
        }
        self.layers[node.described_by].xattrs(&node.path)
    }

    /// The content of the regular file `node`, as far as it is at hand: from the tree, or one
    /// of the few that listings keep. `None` where it has to be read in the tree.
    ///
    /// # Errors
    /// `EINVAL` where it is no regular file; those of `openat2(2)`.
    pub fn content(&self, node: &Node) -> io::Result<Option<Box<dyn io::Read>>> {
        let index = node.trees.first().ok_or(Errno::INVAL)?;
        match &self.layers[*index] {
            LayerForm::Tree(_) => {
                let file = self.open(node)?;
                Ok(file.map(|file| Box::new(file) as Box<dyn io::Read>))
            }
            LayerForm::Listing(listing) => {
                let number = listing.find(&node.path).ok_or(Errno::NOENT)?;
                match &listing.file(number).kind {
                    ListedKind::File { content, .. } => Ok(content.clone().map(|bytes| {
                        let reader: Box<dyn io::Read> = Box::new(io::Cursor::new(bytes));
                        reader
                    })),
                    _ => Err(Errno::INVAL.into()),
                }
            }
        }
    }

    /// Opens the regular file `node` for reading; `None` where it is in no tree.
    ///
    /// # Errors
    /// `EINVAL` where it is no regular file; those of `openat2(2)`.
    pub fn open(&self, node: &Node) -> io::Result<Option<File>> {
        let index = node.trees.first().ok_or(Errno::INVAL)?;
        match &self.layers[*index] {
            LayerForm::Tree(tree) => {
                tree::open_file(tree.root(), &node.path, &node.attributes).map(Some)
            }
            LayerForm::Listing(_) => Ok(None),
        }
    }

    /// The root directory.
    fn root(&self) -> io::Result<Node> {
        let mut root = Node {
            path: PathBuf::new(),
            attributes: Attributes {
                file_type: FileType::Directory,
                mode: ROOT_MODE,
                uid: 0,
                gid: 0,
                mtime: Time::default(),
                size: 0,
                nlink: 1,
                rdev: 0,
                id: (0, 0),
            },
            trees: Vec::new(),
            described_by: 0,
        };
        for (index, layer) in self.layers.iter().enumerate().rev() {
            let Some(found) = layer.look_at(Path::new(""))? else {
                return Err(Errno::NOENT.into());
            };
            let Found {
                attributes, opaque, ..
            } = found;
            if root.trees.is_empty() {
                root.described_by = index;
                root.attributes.mtime = attributes.mtime;
                root.attributes.id = attributes.id;
                root.attributes.nlink = attributes.nlink;
                root.attributes.size = attributes.size;
            }
            // Most trees were made without a word about the root, so they have its default owner.
            if (root.attributes.uid, root.attributes.gid) == (0, 0) {
                root.attributes.uid = attributes.uid;
                root.attributes.gid = attributes.gid;
            }
            root.trees.push(index);
            if opaque {
                break;
            }
        }
        Ok(root)
    }

    /// The entry `name` of the directory `dir`.
    fn child(&self, dir: &Node, name: &OsStr) -> io::Result<Option<Node>> {
        self.node(dir.path.join(name), &dir.trees)
    }

    /// The file at `path`, where the directory that it is in is made of `layers`, or those of
    /// them that have the file.
    fn node(&self, path: PathBuf, layers: &[usize]) -> io::Result<Option<Node>> {
        let mut node: Option<Node> = None;
        // Whether lower layers still add to it, and say what it is like.
        let (mut open, mut implied) = (true, false);
        for &index in layers {
            let Some(found) = self.layers[index].look_at(&path)? else {
                continue;
            };
            let attributes = found.attributes;
            match &mut node {
                _ if attributes.is_whiteout() => break,
                Some(_) if !attributes.is_dir() => break,
                Some(node) => {
                    if open {
                        node.trees.push(index);
                    }
                    if implied {
                        let Attributes {
                            mode,
                            uid,
                            gid,
                            mtime,
                            ..
                        } = attributes;
                        node.described_by = index;
                        node.attributes = Attributes {
                            mode,
                            uid,
                            gid,
                            mtime,
                            ..node.attributes
                        };
                    }
                }
                None => {
                    node = Some(Node {
                        path: path.clone(),
                        attributes,
                        trees: vec![index],
                        described_by: index,
                    });
                    implied = true;
                }
            }
            open &= !found.opaque;
            implied &= found.implied;
            if !attributes.is_dir() || !(open || implied) {
                break;
            }
        }
        Ok(node)
    }
}

impl Node {
    /// Where it is, without links, relative to the root and without a leading slash:
    /// the form of [`super::Change::path`]. Empty for the root.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its type.
    pub fn file_type(&self) -> FileType {
        self.attributes.file_type
    }

    /// Owner, permissions and times; [`Metadata::xattrs`] is empty, see [`Stack::xattrs`].
    pub fn metadata(&self) -> Metadata {
        self.attributes.metadata()
    }

    /// Bytes of a regular file; of other types what the file system says.
    pub fn size(&self) -> u64 {
        self.attributes.size
    }

    /// What tells whether two nodes are one file: hard links have the same.
    pub fn device_and_inode(&self) -> (u64, u64) {
        self.attributes.id
    }

    /// The number of names that the file has in its tree.
    pub fn nlink(&self) -> u64 {
        self.attributes.nlink
    }

    /// Of a device its number, to be split by [`rustix::fs::major`] and [`rustix::fs::minor`].
    pub fn rdev(&self) -> u64 {
        self.attributes.rdev
    }

    /// Indices of the trees that it is made of, the one that counts first.
    pub(super) fn trees(&self) -> &[usize] {
        &self.trees
    }

    pub(super) fn attributes(&self) -> &Attributes {
        &self.attributes
    }
}

/// The components of a path that mean something.
fn names(path: &Path) -> Vec<OsString> {
    path.components()
        .filter_map(|component| match component {
            Component::Normal(name) => Some(name.to_owned()),
            Component::ParentDir => Some("..".into()),
            Component::CurDir | Component::RootDir | Component::Prefix(_) => None,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::super::testing::tree_of;
    use super::*;

    #[test]
    fn security_s04_paths_lead_through_links_and_never_out() {
        let (_base, base) = tree_of(&[
            "755 a/",
            "755 a/b/",
            "644 a/b/file = below",
            "644 a/hidden = x",
            "644 a/over = below",
            "777 abs -> /a/b",
            "777 dangling -> nowhere",
            "777 dot -> .",
            "777 loop -> loop",
            "777 loop1 -> loop2",
            "777 loop2 -> loop1",
            "755 made-file/",
            "644 made-file/x = x",
            "755 opaque/",
            "644 opaque/old = x",
            "777 out -> ../../../a/b/../../a/b",
            "777 rel -> a/b/",
            "777 to-link -> rel/file",
        ]);
        let (_top, top) = tree_of(&[
            "755 a/",
            "-a/hidden",
            "644 a/over = above",
            "777 into -> abs",
            "644 made-file = f",
            "755 opaque!/",
            "644 opaque/new = y",
        ]);
        let stack = Stack::new(vec![base, top]);
        let look = |path: &str, follow: bool| stack.lookup(Path::new(path), follow).unwrap();
        let check = |path: &str, want: Option<&str>| {
            let node = look(path, true);
            assert_eq!(
                node.as_ref().map(|n| n.path().to_str().unwrap()),
                want,
                "{path}"
            );
        };
        check("/", Some(""));
        check("", Some(""));
        check("..", Some(""));
        check("/../../a/./b/../b", Some("a/b"));
        check("abs/file", Some("a/b/file"));
        check("out/file", Some("a/b/file"));
        check("into/file", Some("a/b/file"));
        check("rel", Some("a/b"));
        check("to-link", Some("a/b/file"));
        check("dot/dot/dot/a", Some("a"));
        check("dangling", None);
        check("a/hidden", None);
        check("a/b/file/..", None);
        check("a/b/file/x", None);
        check("made-file/x", None);
        check("made-file", Some("made-file"));
        check("opaque/old", None);
        check("opaque/new", Some("opaque/new"));
        assert_eq!(look("abs", false).unwrap().file_type(), FileType::Symlink);
        assert_eq!(look("loop", false).unwrap().file_type(), FileType::Symlink);
        for path in ["loop", "loop1/x"] {
            let error = stack.lookup(Path::new(path), true).unwrap_err();
            assert_eq!(
                error.raw_os_error(),
                Some(Errno::LOOP.raw_os_error()),
                "{path}"
            );
        }

        let text = |path: &str| io::read_to_string(stack.open(&look(path, true).unwrap()).unwrap());
        assert_eq!(text("a/over").unwrap(), "above");
        assert_eq!(text("to-link").unwrap(), "below");
        let dir = look("a", true).unwrap();
        assert_eq!(
            stack.open(&dir).unwrap_err().raw_os_error(),
            Some(Errno::INVAL.raw_os_error())
        );
        let names = |path: &str| -> Vec<OsString> {
            let entries = stack.read_dir(&look(path, true).unwrap()).unwrap();
            entries.into_iter().map(|(name, _)| name).collect()
        };
        assert_eq!(names("a"), ["b", "over"]);
        assert_eq!(names("opaque"), ["new"]);
        let target = stack.read_link(&look("out", false).unwrap()).unwrap();
        assert_eq!(target, "../../../a/b/../../a/b");
    }

    #[test]
    fn a_stack_of_nothing_is_an_empty_root() {
        let stack = Stack::default();
        let root = stack.lookup(Path::new("/"), true).unwrap().unwrap();
        assert_eq!(root.metadata().mode, 0o755);
        assert_eq!(stack.read_dir(&root).unwrap().len(), 0);
        assert!(stack.lookup(Path::new("/x"), true).unwrap().is_none());
        assert_eq!(stack.xattrs(&root).unwrap(), BTreeMap::new());
    }

    #[test]
    fn a_tree_outlives_its_name_and_an_opaque_root_hides_all_below() {
        let (_base, base) = tree_of(&["644 below = x"]);
        let (dir, top) = tree_of(&["644 above = x"]);
        let renamed = dir.path().with_extension("renamed");
        std::fs::rename(dir.path(), &renamed).unwrap();
        let result = xattr::set(
            top.root().as_ref().as_fd(),
            xattr::OPAQUE.as_ref(),
            xattr::YES,
        );
        let stack = Stack::new(vec![base, top]);
        let exists = |path: &str| stack.lookup(Path::new(path), true).unwrap().is_some();
        assert!(exists("above"));
        // Without attributes of users in the temporary directory there are no opaque ones.
        assert_eq!(exists("below"), result.is_err());
        std::fs::remove_dir_all(renamed).unwrap();
    }
}
