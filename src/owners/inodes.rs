//! [`Inodes`]: whom the files of a root filesystem belong to while it is in use.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::{AtFlags, Mode, OFlags, StatxFlags};

use super::Owner;
use crate::confined::ConfinedDir;

/// Device and inode number of a file, as `stat(2)` has them.
pub type Inode = (u64, u64);

/// When a file was made, in seconds and nanoseconds: tells it from one that has its number later.
pub type Born = (i64, u32);

/// The owners of the files of a root filesystem while it is in use. Clones are the same.
///
/// In an overlay mount a file of a lower layer that was copied up has, without privileges, the
/// number of the lower file as long as the kernel remembers it, and that of the upper one later:
/// so what is noted of such a file is noted of both.
#[derive(Clone, Debug, Default)]
pub struct Inodes(Arc<Mutex<Known>>);

#[derive(Clone, Debug, Default)]
struct Known {
    owners: HashMap<Inode, (Owner, Option<Born>)>,
    /// The upper file of a lower one.
    copies: HashMap<Inode, Inode>,
    overlay: Option<Overlay>,
}

/// An overlay mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Overlay {
    /// The directory that takes the changes.
    pub upper: PathBuf,
    /// The device number of the mount.
    pub device: u64,
}

impl Known {
    fn of(&self, inode: Inode) -> Inode {
        self.copies.get(&inode).copied().unwrap_or(inode)
    }
}

impl Inodes {
    /// Those of the files of an overlay mount.
    pub fn of_overlay(overlay: Overlay) -> Self {
        let known = Known {
            overlay: Some(overlay),
            ..Known::default()
        };
        Self(Arc::new(Mutex::new(known)))
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The overlay mount, if it is one.
    pub fn overlay(&self) -> Option<Overlay> {
        self.lock().overlay.clone()
    }

    /// Whom the file belongs to.
    pub fn get(&self, inode: Inode) -> Owner {
        self.known(inode).unwrap_or_default()
    }

    /// Whom the file belongs to; absent where nothing was ever said of it.
    pub fn known(&self, inode: Inode) -> Option<Owner> {
        let known = self.lock();
        known.owners.get(&known.of(inode)).map(|(owner, _)| *owner)
    }

    /// Whom the file of an upper directory belongs to that is `upper` there and `inode` in the
    /// mount; absent where nothing was said of it, but perhaps of one that had its number before.
    pub fn of_upper(&self, inode: Inode, upper: Inode, born: Option<Born>) -> Option<Owner> {
        let known = self.lock();
        let is_it = |(owner, known): &(Owner, Option<Born>)| {
            (known.is_none() || *known == born).then_some(*owner)
        };
        let of = |inode: Inode| known.owners.get(&known.of(inode)).and_then(is_it);
        of(inode).or_else(|| of((inode.0, upper.1)))
    }

    /// Says whom the file belongs to.
    pub fn set(&self, inode: Inode, owner: Owner) {
        let mut known = self.lock();
        let inode = known.of(inode);
        match owner == Owner::default() {
            true => drop(known.owners.remove(&inode)),
            false => drop(known.owners.insert(inode, (owner, None))),
        }
    }

    /// Says whom a file belongs to that is `upper` in the upper directory, even if that is 0:0.
    pub fn set_copied(&self, inode: Inode, upper: Inode, born: Option<Born>, owner: Owner) {
        let upper = (inode.0, upper.1);
        let mut known = self.lock();
        if inode != upper {
            known.copies.insert(inode, upper);
        }
        known.owners.insert(upper, (owner, born));
    }

    /// Says whom the file `inode` belongs to, which has the path `path` in the root filesystem.
    pub fn note(&self, inode: Inode, path: &Path, owner: Owner) {
        let overlay = self.overlay().filter(|overlay| overlay.device == inode.0);
        match overlay.and_then(|overlay| upper_file(&overlay.upper, path)) {
            Some((upper, born)) => self.set_copied(inode, upper, born, owner),
            None => self.set(inode, owner),
        }
    }

    /// Takes over all that `other` says.
    pub fn add(&self, other: &Self) {
        let more = other.lock().clone();
        let mut known = self.lock();
        known.owners.extend(more.owners);
        known.copies.extend(more.copies);
    }

    /// Whether all files belong to 0:0.
    pub fn is_empty(&self) -> bool {
        self.lock().owners.is_empty()
    }
}

/// When the open file was made, where the file system knows.
pub fn born(fd: BorrowedFd<'_>) -> Option<Born> {
    let found = rustix::fs::statx(fd, "", AtFlags::EMPTY_PATH, StatxFlags::BTIME).ok()?;
    let has = found.stx_mask & StatxFlags::BTIME.bits() != 0;
    has.then_some((found.stx_btime.tv_sec, found.stx_btime.tv_nsec))
}

/// Which file the upper directory `dir` has at `path`, a path without links of the mount.
fn upper_file(dir: &Path, path: &Path) -> Option<(Inode, Option<Born>)> {
    let path = path.strip_prefix("/").ok()?;
    let dir = ConfinedDir::open(dir).ok()?;
    let flags = OFlags::PATH | OFlags::NOFOLLOW;
    let fd = dir.open_exact(path, flags, Mode::empty()).ok()?;
    let found = rustix::fs::fstat(&fd).ok()?;
    Some(((found.st_dev, found.st_ino), born(fd.as_fd())))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn owner(uid: u32, gid: u32) -> Owner {
        Owner { uid, gid }
    }

    #[test]
    fn inodes_are_shared_and_forget_the_common_owner() {
        let inodes = Inodes::default();
        let same = inodes.clone();
        assert!(inodes.is_empty());
        inodes.set((1, 2), owner(3, 4));
        assert_eq!(same.get((1, 2)), owner(3, 4));
        assert_eq!(same.get((2, 2)), owner(0, 0));
        same.set((1, 2), owner(0, 0));
        assert!(inodes.is_empty());
    }

    #[test]
    fn a_copied_file_is_known_by_both_its_numbers() {
        let inodes = Inodes::default();
        let (born, later) = (Some((5, 6)), Some((7, 8)));
        inodes.set((1, 2), owner(3, 4));
        inodes.set_copied((1, 2), (9, 20), born, owner(5, 6));
        assert_eq!(inodes.get((1, 2)), owner(5, 6));
        assert_eq!(inodes.get((1, 20)), owner(5, 6));
        assert_eq!(inodes.of_upper((1, 2), (9, 20), born), Some(owner(5, 6)));
        assert_eq!(inodes.of_upper((1, 20), (9, 20), born), Some(owner(5, 6)));
        // Another file has its number by now.
        assert_eq!(inodes.of_upper((1, 20), (9, 20), later), None);
        assert_eq!(inodes.known((1, 3)), None);
        // To nobody else is an answer, too.
        inodes.set_copied((1, 3), (9, 21), born, owner(0, 0));
        assert_eq!(inodes.known((1, 3)), Some(owner(0, 0)));
        // Of what was not copied in this mount only the one number is known.
        inodes.set((1, 4), owner(7, 7));
        assert_eq!(inodes.of_upper((1, 4), (9, 22), born), Some(owner(7, 7)));
    }
}
