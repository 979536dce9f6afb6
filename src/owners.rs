//! Whom files belong to, where they cannot be given away: who has one ID only, or none that the
//! kernel lets them use, owns every file they make, and the owner that an image says is recorded
//! beside it.
//!
//! A directory has its owners recorded where there is a file of its name and `.owners` beside it:
//! [`record`] makes that, [`Owners::of`] reads it. What it does not name belongs to 0:0. While a
//! step runs, files are renamed and linked, so what is known then is known by inode: [`Inodes`].

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::{AtFlags, Mode, OFlags, StatxFlags};

use crate::confined::ConfinedDir;

/// What the names of the files end in.
const SUFFIX: &str = ".owners";

/// The first line.
const HEADER: &[u8] = b"sockless owners 1\n";

/// A user and a group, as numbers of the image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Owner {
    /// The user.
    pub uid: u32,
    /// The group.
    pub gid: u32,
}

/// The owners of what is in one directory, by path relative to it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Owners(BTreeMap<PathBuf, Owner>);

/// Where the owners of what is in `dir` are.
fn file_of(dir: &Path) -> PathBuf {
    let mut name = OsString::from(dir);
    name.push(SUFFIX);
    name.into()
}

/// Has the owners of what is in the directory `dir` recorded from now on; all belongs to 0:0.
///
/// # Errors
/// Those of writing a file.
pub fn record(dir: &Path) -> io::Result<()> {
    Owners::default().save(dir)
}

/// Gives what is recorded of `from` to `to`, which takes its name.
///
/// # Errors
/// Those of `rename(2)`, other than that nothing is recorded.
pub fn rename(from: &Path, to: &Path) -> io::Result<()> {
    match fs::rename(file_of(from), file_of(to)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Whether the owners of what is in the directory `dir` are recorded.
///
/// # Errors
/// Those of `stat(2)`.
pub fn is_recorded(dir: &Path) -> io::Result<bool> {
    file_of(dir).try_exists()
}

impl Owners {
    /// What is recorded of `dir`; nothing where files have their own owners.
    ///
    /// # Errors
    /// Those of reading a file; `InvalidData` where it is damaged.
    pub fn of(dir: &Path) -> io::Result<Option<Self>> {
        let file = file_of(dir);
        match fs::read(&file) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
            Ok(bytes) => match parse(&bytes) {
                Some(owners) => Ok(Some(owners)),
                None => {
                    let message = format!("{} is damaged", file.display());
                    Err(io::Error::new(io::ErrorKind::InvalidData, message))
                }
            },
        }
    }

    /// Writes it beside `dir`.
    ///
    /// # Errors
    /// Those of writing a file.
    pub fn save(&self, dir: &Path) -> io::Result<()> {
        let mut bytes = HEADER.to_vec();
        for (path, owner) in &self.0 {
            bytes.extend_from_slice(format!("{} {} ", owner.uid, owner.gid).as_bytes());
            bytes.extend_from_slice(path.as_os_str().as_bytes());
            bytes.push(0);
        }
        // What was cut off is told from what is whole.
        bytes.push(b'.');
        fs::write(file_of(dir), bytes)
    }

    /// Whom `path` belongs to.
    pub fn get(&self, path: &Path) -> Owner {
        self.0.get(path).copied().unwrap_or_default()
    }

    /// Says whom `path` belongs to.
    pub fn set(&mut self, path: &Path, owner: Owner) {
        match owner == Owner::default() {
            true => drop(self.0.remove(path)),
            false => drop(self.0.insert(path.to_owned(), owner)),
        }
    }

    /// Those of what is in the directory `dir`, and its own, by path relative to it.
    #[must_use]
    pub fn inside(&self, dir: &Path) -> Self {
        let inside = |(path, owner): (&PathBuf, &Owner)| {
            Some((path.strip_prefix(dir).ok()?.to_owned(), *owner))
        };
        Self(self.0.iter().filter_map(inside).collect())
    }

    /// The paths that belong to somebody else than 0:0.
    pub fn paths(&self) -> impl Iterator<Item = &Path> {
        self.0.keys().map(PathBuf::as_path)
    }
}

fn parse(bytes: &[u8]) -> Option<Owners> {
    let body = bytes.strip_prefix(HEADER)?.strip_suffix(b".")?;
    let mut owners = BTreeMap::new();
    let records = body.split_inclusive(|byte| *byte == 0);
    for record in records {
        let mut parts = record.strip_suffix(b"\0")?.splitn(3, |byte| *byte == b' ');
        let mut number = || std::str::from_utf8(parts.next()?).ok()?.parse().ok();
        let owner = Owner {
            uid: number()?,
            gid: number()?,
        };
        let path = OsString::from_vec(parts.next()?.to_vec());
        owners.insert(path.into(), owner);
    }
    Some(Owners(owners))
}

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
    use std::ffi::OsStr;

    use super::*;

    fn owner(uid: u32, gid: u32) -> Owner {
        Owner { uid, gid }
    }

    #[test]
    fn what_is_saved_is_read_again() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("tree");
        assert_eq!(Owners::of(&dir).unwrap(), None);
        record(&dir).unwrap();
        assert!(is_recorded(&dir).unwrap());
        assert_eq!(Owners::of(&dir).unwrap(), Some(Owners::default()));
        let odd = Path::new(OsStr::from_bytes(b"a b/\xff \n.x"));
        let mut owners = Owners::default();
        owners.set(odd, owner(33, u32::MAX));
        owners.set(Path::new(""), owner(0, 1));
        owners.set(Path::new("gone"), owner(5, 5));
        owners.set(Path::new("gone"), owner(0, 0));
        owners.save(&dir).unwrap();
        let read = Owners::of(&dir).unwrap().unwrap();
        assert_eq!(read, owners);
        assert_eq!(read.get(odd), owner(33, u32::MAX));
        assert_eq!(read.get(Path::new("gone")), owner(0, 0));
        assert_eq!(read.paths().collect::<Vec<_>>(), [Path::new(""), odd]);
        let other = root.path().join("other");
        rename(&dir, &other).unwrap();
        assert!(!is_recorded(&dir).unwrap());
        assert_eq!(Owners::of(&other).unwrap(), Some(owners));
        // Where nothing is recorded there is nothing to rename.
        rename(&dir, &other).unwrap();
    }

    #[test]
    fn what_is_damaged_is_no_record() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("tree");
        let mut owners = Owners::default();
        owners.set(Path::new("a"), owner(1, 2));
        owners.set(Path::new("b"), owner(3, 4));
        owners.save(&dir).unwrap();
        let whole = fs::read(file_of(&dir)).unwrap();
        for length in 0..whole.len() {
            fs::write(file_of(&dir), &whole[..length]).unwrap();
            let error = Owners::of(&dir).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{length}");
            assert!(error.to_string().ends_with("tree.owners is damaged"));
        }
        for text in ["1 a\0.", "1 -2 a\0.", "1 2\0.", "x 2 a\0."] {
            fs::write(file_of(&dir), [HEADER, text.as_bytes()].concat()).unwrap();
            assert!(Owners::of(&dir).is_err(), "{text:?}");
        }
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
