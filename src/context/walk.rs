//! [`Walk`]: everything that can be seen below a path, in a stable order.

use std::path::{Path, PathBuf};

use super::{BuildContext, ContextError, ContextNode, NodeKind};

/// Iterates over a subtree: parents before children, siblings by bytes, as
/// [`crate::rootfs::order`] has it. Memory holds the siblings of the current path only.
#[derive(Debug)]
pub struct Walk<'c> {
    context: &'c BuildContext,
    /// Where it starts, until it has started.
    start: Option<PathBuf>,
    /// What is still to come, the next one last.
    todo: Vec<ContextNode>,
}

impl<'c> Walk<'c> {
    pub(super) fn new(context: &'c BuildContext, start: &Path) -> Self {
        Self {
            context,
            start: Some(start.to_owned()),
            todo: Vec::new(),
        }
    }
}

impl Iterator for Walk<'_> {
    type Item = Result<ContextNode, ContextError>;

    fn next(&mut self) -> Option<Self::Item> {
        if let Some(start) = self.start.take() {
            match self.context.visible(&start) {
                Ok(node) => self.todo.extend(node),
                Err(error) => return Some(Err(error)),
            }
        }
        let node = self.todo.pop()?;
        if node.kind == NodeKind::Directory {
            match self.context.read_dir(&node.path) {
                Ok(children) => self.todo.extend(children.into_iter().rev()),
                Err(error) => {
                    // After an error there is nothing sensible to go on with.
                    self.todo.clear();
                    return Some(Err(error));
                }
            }
        }
        Some(Ok(node))
    }
}
