//! Whom files belong to, where they cannot be given away: who has one ID only, or none that the
//! kernel lets them use, owns every file they make, and the owner that an image says is recorded
//! beside it.
//!
//! A directory has its owners recorded where there is a file of its name and `.owners` beside it:
//! [`record`] makes that, [`Owners::of`] reads it. What it does not name belongs to 0:0. Who has no
//! privilege at all ([`Kind::All`]) is held off by modes, too, and may not set some attributes: so
//! files get modes with which their owner can use them, and what they should be is recorded.
//!
//! While a step runs, files are renamed and linked, so what is known then is known by inode:
//! [`Inodes`].

mod inodes;

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

pub use inodes::{Born, Inode, Inodes, Overlay, born};

/// What the names of the files end in.
const SUFFIX: &str = ".owners";

/// The first line, which says what is recorded.
const HEADERS: [(&[u8], Kind); 2] = [
    (b"sockless owners 1\n", Kind::Owners),
    (b"sockless owners, modes and attributes 1\n", Kind::All),
];

/// What is recorded of files.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Kind {
    /// Their owners.
    #[default]
    Owners,
    /// Also modes that would hold off who owns the files, and attributes other than of users.
    All,
}

/// A user and a group, as numbers of the image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Owner {
    /// The user.
    pub uid: u32,
    /// The group.
    pub gid: u32,
}

/// What is recorded of one file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Recorded {
    /// Whom it belongs to.
    pub owner: Owner,
    /// Its permissions, where the file has others.
    pub mode: Option<u32>,
    /// Extended attributes that the file does not have itself.
    pub xattrs: BTreeMap<OsString, Vec<u8>>,
}

/// What is recorded of what is in one directory, by path relative to it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Owners {
    kind: Kind,
    files: BTreeMap<PathBuf, Recorded>,
}

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
pub fn record(dir: &Path, kind: Kind) -> io::Result<()> {
    let nothing = Owners {
        kind,
        ..Owners::default()
    };
    nothing.save(dir)
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
        let mut bytes = Vec::new();
        for (header, kind) in HEADERS {
            if kind == self.kind {
                bytes.extend_from_slice(header);
            }
        }
        for (path, recorded) in &self.files {
            let Recorded {
                owner,
                mode,
                xattrs,
            } = recorded;
            let mode = mode.map_or("-".to_owned(), |mode| format!("{mode:o}"));
            let line = format!("{} {} {mode} {} ", owner.uid, owner.gid, xattrs.len());
            bytes.extend_from_slice(line.as_bytes());
            bytes.extend_from_slice(path.as_os_str().as_bytes());
            bytes.push(0);
            for (name, value) in xattrs {
                bytes.extend_from_slice(format!("{} ", value.len()).as_bytes());
                bytes.extend_from_slice(name.as_bytes());
                bytes.push(0);
                bytes.extend_from_slice(value);
            }
        }
        // What was cut off is told from what is whole.
        bytes.push(b'.');
        fs::write(file_of(dir), bytes)
    }

    /// What is recorded of `path`.
    pub fn recorded(&self, path: &Path) -> Option<&Recorded> {
        self.files.get(path)
    }

    /// Whom `path` belongs to.
    pub fn get(&self, path: &Path) -> Owner {
        self.recorded(path)
            .map_or(Owner::default(), |recorded| recorded.owner)
    }

    /// Says whom `path` belongs to, and nothing else of it.
    pub fn set(&mut self, path: &Path, owner: Owner) {
        let recorded = Recorded {
            owner,
            ..Recorded::default()
        };
        self.put(path, recorded);
    }

    /// Says of `path` what `other` has.
    pub fn set_same(&mut self, path: &Path, other: &Path) {
        let recorded = self.files.get(other).cloned().unwrap_or_default();
        self.put(path, recorded);
    }

    fn put(&mut self, path: &Path, recorded: Recorded) {
        match recorded == Recorded::default() {
            true => drop(self.files.remove(path)),
            false => drop(self.files.insert(path.to_owned(), recorded)),
        }
    }

    /// Says what `path` should be like: a directory or something else, with this owner, mode and
    /// these attributes. Returns the mode to set, and which attributes not.
    pub fn keep(
        &mut self,
        path: &Path,
        is_dir: bool,
        owner: Owner,
        mode: u32,
        xattrs: &BTreeMap<OsString, Vec<u8>>,
    ) -> Kept {
        let mut recorded = Recorded {
            owner,
            ..Recorded::default()
        };
        let mut usable = mode;
        if self.kind == Kind::All {
            usable |= if is_dir { 0o700 } else { 0o600 };
            recorded.mode = (usable != mode).then_some(mode);
            let held = xattrs.iter().filter(|(name, _)| !is_of_users(name));
            recorded.xattrs = held
                .map(|(name, value)| (name.clone(), value.clone()))
                .collect();
        }
        self.put(path, recorded);
        Kept {
            mode: usable,
            holds_xattrs: self.kind == Kind::All,
        }
    }

    /// Those of what is in the directory `dir`, and its own, by path relative to it.
    #[must_use]
    pub fn inside(&self, dir: &Path) -> Self {
        let inside = |(path, recorded): (&PathBuf, &Recorded)| {
            Some((path.strip_prefix(dir).ok()?.to_owned(), recorded.clone()))
        };
        Self {
            kind: self.kind,
            files: self.files.iter().filter_map(inside).collect(),
        }
    }

    /// The paths of which something is recorded.
    pub fn paths(&self) -> impl Iterator<Item = &Path> {
        self.files.keys().map(PathBuf::as_path)
    }
}

/// What a file gets that should be different.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kept {
    /// Its mode.
    pub mode: u32,
    /// Whether attributes other than of users are recorded instead.
    holds_xattrs: bool,
}

impl Kept {
    /// Whether the file itself gets the attribute of this name.
    pub fn sets(self, name: &OsStr) -> bool {
        !self.holds_xattrs || is_of_users(name)
    }
}

fn is_of_users(name: &OsStr) -> bool {
    name.as_bytes().starts_with(b"user.")
}

fn parse(bytes: &[u8]) -> Option<Owners> {
    let mut headers = HEADERS.iter();
    let (mut rest, kind) =
        headers.find_map(|(header, kind)| Some((bytes.strip_prefix(*header)?, *kind)))?;
    let mut files = BTreeMap::new();
    while rest != b"." {
        let (path, fields) = fields(&mut rest, 4)?;
        let recorded = Recorded {
            owner: Owner {
                uid: number(fields[0])?,
                gid: number(fields[1])?,
            },
            mode: match fields[2] {
                b"-" => None,
                mode => Some(u32::from_str_radix(std::str::from_utf8(mode).ok()?, 8).ok()?),
            },
            xattrs: (0..number(fields[3])?)
                .map(|_| {
                    let (name, fields) = self::fields(&mut rest, 1)?;
                    let (value, after) = rest.split_at_checked(number(fields[0])? as usize)?;
                    rest = after;
                    Some((name, value.to_vec()))
                })
                .collect::<Option<_>>()?,
        };
        files.insert(path.into(), recorded);
    }
    Some(Owners { kind, files })
}

/// Takes `count` fields from `rest`, each with a space behind it, and a name with its NUL.
fn fields<'r>(rest: &mut &'r [u8], count: usize) -> Option<(OsString, Vec<&'r [u8]>)> {
    let end = rest.iter().position(|byte| *byte == 0)?;
    let (line, after) = (&rest[..end], &rest[end + 1..]);
    *rest = after;
    let mut parts: Vec<&[u8]> = line.splitn(count + 1, |byte| *byte == b' ').collect();
    let name = parts.pop()?;
    (parts.len() == count).then(|| (OsString::from_vec(name.to_vec()), parts))
}

fn number(digits: &[u8]) -> Option<u32> {
    std::str::from_utf8(digits).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn owner(uid: u32, gid: u32) -> Owner {
        Owner { uid, gid }
    }

    #[test]
    fn what_is_saved_is_read_again() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("tree");
        assert_eq!(Owners::of(&dir).unwrap(), None);
        record(&dir, Kind::Owners).unwrap();
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
        for text in [
            "1 - 0 a\0.",
            "1 -2 - 0 a\0.",
            "1 2 9 0 a\0.",
            "1 2 - 1 a\0.",
            "1 2 - 1 a\09 x\0.",
        ] {
            fs::write(file_of(&dir), [HEADERS[0].0, text.as_bytes()].concat()).unwrap();
            assert!(Owners::of(&dir).is_err(), "{text:?}");
        }
    }

    #[test]
    fn who_has_no_privilege_gets_files_that_can_be_used() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("tree");
        let xattrs: BTreeMap<OsString, Vec<u8>> = [("security.capability", 1), ("user.a", 2)]
            .map(|(name, value)| (name.into(), vec![value, 0, b'.']))
            .into();
        let nobody = Owner::default();
        for (kind, usable) in [(Kind::Owners, 0o4055), (Kind::All, 0o4755)] {
            record(&dir, kind).unwrap();
            let mut owners = Owners::of(&dir).unwrap().unwrap();
            let kept = owners.keep(Path::new("d"), true, nobody, 0o4055, &xattrs);
            assert_eq!(kept.mode, usable);
            assert!(kept.sets(OsStr::new("user.a")));
            let is_all = kind == Kind::All;
            assert_eq!(kept.sets(OsStr::new("security.capability")), !is_all);
            owners.keep(Path::new("f"), false, owner(1, 2), 0o200, &BTreeMap::new());
            owners.keep(Path::new("g"), false, nobody, 0o644, &BTreeMap::new());
            owners.set_same(Path::new("h"), Path::new("d"));
            owners.save(&dir).unwrap();
            let owners = Owners::of(&dir).unwrap().unwrap();
            let what = owners.recorded(Path::new("d"));
            assert_eq!(what, owners.recorded(Path::new("h")));
            let mode = |path: &str| owners.recorded(Path::new(path)).and_then(|r| r.mode);
            assert_eq!(mode("d"), is_all.then_some(0o4055));
            assert_eq!(mode("f"), is_all.then_some(0o200));
            assert_eq!(owners.recorded(Path::new("g")), None);
            let names = |r: &Recorded| r.xattrs.keys().cloned().collect::<Vec<_>>();
            let want = is_all.then(|| vec![OsString::from("security.capability")]);
            assert_eq!(what.map(names), want);
        }
    }
}
