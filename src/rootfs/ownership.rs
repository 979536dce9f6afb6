//! The way of recorded owners ([`crate::owners`]) through a root filesystem: from the paths of the
//! trees below to the inodes that a step sees, and from those to the paths of the new tree.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::FileType;

use super::overlay::Changed;
use super::stack::Stack;
use super::tree::{Attributes, look_at};
use super::{RootfsError, tree, xattr};
use crate::confined::ConfinedDir;
use crate::owners::{self, Inodes, Owner, Owners};

/// What the kernel gives a file that it copies up; without privileges, with nothing in it.
const ORIGIN: &str = "user.overlay.origin";

/// Finds the inodes in `root` of whatever in `stack` does not belong to 0:0. As long as what is
/// returned is open, their numbers stay; of those beyond [`pins_max`] the kernel may forget them, and
/// files that were copied up then are known by their paths ([`of_changed`]).
pub(super) fn find(
    stack: &Stack,
    root: &ConfinedDir,
    inodes: &Inodes,
) -> Result<Vec<OwnedFd>, RootfsError> {
    let (mut pins, most) = (Vec::new(), pins_max());
    for path in recorded_paths(stack) {
        let failed = || RootfsError::io("looking up the owner of", path);
        let node = match path.as_os_str().is_empty() {
            true => Some(stack.root().map_err(failed())?),
            false => exactly(stack, path)?,
        };
        let Some(node) = node else { continue };
        if let Some((fd, found)) = look_at(root, path).map_err(failed())? {
            inodes.set(found.id, node.metadata().owner());
            if pins.len() < most {
                pins.push(fd);
            }
        }
    }
    Ok(pins)
}

/// How many files one root filesystem keeps open: several are in use at once, beside all else.
fn pins_max() -> usize {
    const PART: u64 = 16;
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
    limit.map_or(usize::MAX, |limit| (limit / PART) as usize)
}

/// The paths in trees of `stack` that do not belong to 0:0 there.
pub(super) fn recorded_paths(stack: &Stack) -> BTreeSet<&Path> {
    let trees = stack.trees().iter();
    let recorded = trees.filter_map(|tree| tree.owners());
    recorded.flat_map(Owners::paths).collect()
}

/// What the stack shows at `path`, if that is a path without links there.
fn exactly(stack: &Stack, path: &Path) -> Result<Option<super::Node>, RootfsError> {
    let node = stack.lookup(path, false);
    let node = node.map_err(RootfsError::io("looking up", path))?;
    Ok(node.filter(|node| node.path() == path))
}

/// The owners of what is in the directory `dir`, by the inodes that the same paths have in `root`,
/// and in an overlay mount by what `lower` has there.
pub(super) fn of_changed(
    dir: &Path,
    root: &ConfinedDir,
    inodes: &Inodes,
    lower: &Stack,
) -> Result<Owners, RootfsError> {
    let mut all = Owners::default();
    if inodes.is_empty() {
        return Ok(all);
    }
    let dir = ConfinedDir::open(dir).map_err(RootfsError::io("opening", dir))?;
    let mut left = vec![PathBuf::new()];
    while let Some(path) = left.pop() {
        let failed = || RootfsError::io("reading the owner of", &path);
        let Some((fd, found)) = look_at(&dir, &path).map_err(failed())? else {
            continue;
        };
        if found.is_whiteout() {
            continue;
        }
        let Some((_, shown)) = look_at(root, &path).map_err(failed())? else {
            continue;
        };
        let known = inodes.of_upper(shown.id, found.id, owners::born(fd.as_fd()));
        let owner = match known {
            Some(owner) => owner,
            None if is_copy(fd.as_fd(), &found) => match exactly(lower, &path)? {
                Some(node) if node.file_type() == found.file_type => node.metadata().owner(),
                _ => Owner::default(),
            },
            None => Owner::default(),
        };
        all.set(&path, owner);
        if found.is_dir() {
            let inside = tree::list(&dir, &path).map_err(failed())?;
            left.extend(inside.into_iter().map(|(name, _)| path.join(name)));
        }
    }
    Ok(all)
}

/// Whether the kernel copied it from a lower layer: of files that can have the attribute, it says so.
fn is_copy(fd: BorrowedFd<'_>, found: &Attributes) -> bool {
    matches!(found.file_type, FileType::RegularFile | FileType::Directory)
        && matches!(xattr::get(fd, OsStr::new(ORIGIN)), Ok(Some(_)))
}

/// Says whose the files in `dir` are, as recorded beside it; nothing where nothing is recorded.
///
/// # Errors
/// [`RootfsError::Io`].
pub fn learn_owners(dir: &Path, inodes: &Inodes) -> Result<(), RootfsError> {
    let owners = Owners::of(dir).map_err(RootfsError::io("reading the owners of", dir))?;
    let Some(owners) = owners else { return Ok(()) };
    let root = ConfinedDir::open(dir).map_err(RootfsError::io("opening", dir))?;
    for path in owners.paths() {
        let found = look_at(&root, path).map_err(RootfsError::io("looking up", path))?;
        if let Some((_, found)) = found {
            inodes.set(found.id, owners.get(path));
        }
    }
    Ok(())
}

/// Records whose the files in `dir` are now.
///
/// # Errors
/// [`RootfsError::Io`].
pub fn keep_owners(dir: &Path, inodes: &Inodes) -> Result<(), RootfsError> {
    let root = ConfinedDir::open(dir).map_err(RootfsError::io("opening", dir))?;
    of_changed(dir, &root, inodes, &Stack::default())?
        .save(dir)
        .map_err(RootfsError::io("recording the owners of", dir))
}

/// Records `owners` beside what was changed.
pub(super) fn save(owners: &Owners, changed: Changed) -> Result<Changed, RootfsError> {
    let upper = &changed.upper;
    owners
        .save(upper)
        .map_err(RootfsError::io("recording the owners of", upper))?;
    Ok(changed)
}
