//! [`inherit_metadata`]: directories that a layer has without saying what they are like.

use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};

use super::materialize::apply_metadata;
use super::stack::{Node, Stack};
use super::tree::look_at;
use super::{RootfsError, xattr};
use crate::confined::ConfinedDir;
use crate::owners::Owners;

/// Gives the `directories` of the tree at `dir` what the same directories have in `below`.
///
/// A layer may have a file and no entry for the directory around it. In the image that
/// directory is the one of the layers below, but in an overlay mount the tree's own counts,
/// with whatever mode it was made. `directories` are in path order, relative to the root.
/// Those that `below` does not have, or that the tree hides, are left as they are.
///
/// # Errors
/// [`RootfsError::Io`].
pub fn inherit_metadata(
    dir: &Path,
    directories: &[PathBuf],
    below: &Stack,
) -> Result<(), RootfsError> {
    let root = ConfinedDir::open(dir).map_err(RootfsError::io("opening", dir))?;
    let mut owners = Owners::of(dir).map_err(RootfsError::io("reading the owners of", dir))?;
    // The innermost first: a mode that shuts out this process must not come before what is inside.
    for path in directories.iter().rev() {
        let Some(node) = find(&root, path, below)? else {
            continue;
        };
        let mut metadata = node.metadata();
        let read = RootfsError::io("reading the attributes of", path);
        metadata.xattrs = below.xattrs(&node).map_err(read)?;
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW;
        let fd = root
            .open_exact(path, flags, Mode::empty())
            .map_err(RootfsError::io("opening", path))?;
        apply_metadata(&fd, path, &metadata, owners.as_mut())?;
    }
    if let Some(owners) = owners {
        owners
            .save(dir)
            .map_err(RootfsError::io("recording the owners of", dir))?;
    }
    Ok(())
}

/// The directory `path` of `below` that shows through the tree `root`.
fn find(root: &ConfinedDir, path: &Path, below: &Stack) -> Result<Option<Node>, RootfsError> {
    let mut node = below.root().map_err(RootfsError::io("looking up", path))?;
    let mut here = PathBuf::new();
    for name in path {
        if !here.as_os_str().is_empty() {
            let found = look_at(root, &here).map_err(RootfsError::io("looking up", &here))?;
            let hides = match found {
                Some((fd, _)) => {
                    xattr::is_opaque(fd.as_fd()).map_err(RootfsError::io("looking up", &here))?
                }
                None => false,
            };
            if hides {
                return Ok(None);
            }
        }
        let child = below
            .child(&node, name)
            .map_err(RootfsError::io("looking up", path))?;
        let Some(child) = child.filter(|child| child.attributes().is_dir()) else {
            return Ok(None);
        };
        node = child;
        here.push(name);
    }
    Ok(Some(node))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::super::testing::tree_of;
    use super::*;

    #[test]
    fn what_shows_through_is_as_it_is_below() {
        let (_base, base) = tree_of(&[
            "700 gone/",
            "700 link/",
            "711 opaque/",
            "700 opaque/in/",
            "700 root/",
            "750 root/in/",
            "1777 tmp/",
        ]);
        let (_middle, middle) = tree_of(&["777 also -> tmp", "-gone", "644 link = x"]);
        let below = Stack::new(vec![base, middle]);
        let (dir, _tree) = tree_of(&[
            "755 also/",
            "755 gone/",
            "755 link/",
            "755 named/",
            "755 new/",
            "755 opaque!/",
            "755 opaque/in/",
            "755 root/",
            "755 root/in/",
            "755 root/new/",
            "755 tmp/",
            "644 tmp/file = x",
        ]);
        let implied: Vec<PathBuf> = [
            "also",
            "gone",
            "link",
            "new",
            "opaque",
            "opaque/in",
            "root",
            "root/in",
            "root/new",
            "tmp",
        ]
        .map(PathBuf::from)
        .into();
        inherit_metadata(dir.path(), &implied, &below).unwrap();
        let check = |path: &str, want: u32| {
            let mode = std::fs::symlink_metadata(dir.path().join(path)).unwrap();
            assert_eq!(mode.permissions().mode() & 0o7777, want, "{path}");
        };
        check("tmp", 0o1777);
        check("root", 0o700);
        check("root/in", 0o750);
        check("opaque", 0o711);
        for own in [
            "also",
            "gone",
            "link",
            "named",
            "new",
            "opaque/in",
            "root/new",
        ] {
            check(own, 0o755);
        }
        check("tmp/file", 0o644);
    }
}
