//! [`Below`]: the filesystem that COPY, ADD and WORKDIR add to.
//!
//! They ask it what is where, whose it is, and where links lead. For that its layers need not
//! be unpacked: their listings give the same answers. The rare question that only a file's
//! content answers has the layers unpacked when it is asked.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;
use std::sync::Arc;

use rustix::io::Errno;

use crate::rootfs::{LayerView, Node, Stack};

/// Gives the layers unpacked. Blocking.
type Trees = Arc<dyn Fn() -> io::Result<Stack> + Send + Sync>;

/// Layers as one read-only filesystem, whether or not they are unpacked.
#[derive(Clone)]
pub(super) struct Below {
    view: LayerView,
    trees: Trees,
}

impl Below {
    /// The layers of `view`; `trees` unpacks them. Blocking.
    pub(super) fn new(
        view: LayerView,
        trees: impl Fn() -> io::Result<Stack> + Send + Sync + 'static,
    ) -> Self {
        Self {
            view,
            trees: Arc::new(trees),
        }
    }

    /// Whether there is no layer.
    pub(super) fn is_empty(&self) -> bool {
        self.view.is_empty()
    }

    /// See [`LayerView::lookup`].
    pub(super) fn lookup(&self, path: &Path, follow_last: bool) -> io::Result<Option<Node>> {
        self.view.lookup(path, follow_last)
    }

    /// See [`LayerView::read_link`].
    pub(super) fn read_link(&self, node: &Node) -> io::Result<OsString> {
        self.view.read_link(node)
    }

    /// See [`LayerView::xattrs`].
    pub(super) fn xattrs(&self, node: &Node) -> io::Result<BTreeMap<OsString, Vec<u8>>> {
        self.view.xattrs(node)
    }

    /// Opens the regular file `node`, whose layer is unpacked for that.
    pub(super) fn open(&self, node: &Node) -> io::Result<File> {
        match self.view.open(node)? {
            Some(file) => Ok(file),
            None => self.open_in_tree(node),
        }
    }

    /// The content of the regular file `node`.
    pub(super) fn content(&self, node: &Node) -> io::Result<Box<dyn Read>> {
        match self.view.content(node)? {
            Some(content) => Ok(content),
            None => Ok(Box::new(self.open_in_tree(node)?)),
        }
    }

    fn open_in_tree(&self, node: &Node) -> io::Result<File> {
        let stack = (self.trees)()?;
        let node = stack.lookup(node.path(), false)?.ok_or(Errno::NOENT)?;
        stack.open(&node)
    }
}

impl From<&Stack> for Below {
    fn from(stack: &Stack) -> Self {
        let trees = stack.clone();
        Self::new(LayerView::from(stack), move || Ok(trees.clone()))
    }
}

impl From<&Below> for Below {
    fn from(below: &Below) -> Self {
        below.clone()
    }
}
