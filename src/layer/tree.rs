//! [`Tree`]: a directory that a layer is unpacked into, and nothing outside of it.
//!
//! Nothing is ever opened by a joined path. A parent is opened with `openat2` below the
//! root, without links; where there are links, they are resolved here, component by
//! component, so that each directory is known under one path only. The last component is
//! created exclusively, relative to its parent's descriptor, and never followed.
//!
//! Directories get their metadata at the end, from the leaves up: files made in them
//! would change their times, and a mode or a default access list would hinder or colour
//! what comes later.

use std::collections::{BTreeMap, HashMap};
use std::ffi::{OsStr, OsString};
use std::io::Read as _;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Component, Path, PathBuf};
use std::rc::Rc;

use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, ResolveFlags, XattrFlags};
use rustix::io::Errno;

use super::metadata::{self, SkippedXattr};
use super::{LayerError, Limits, whiteout};
use crate::owners::Owners;
use crate::rootfs::Metadata;

/// Open parents. A tar is mostly in path order, so few are enough.
const PARENTS_MAX: usize = 64;

/// Links that may be followed for one path, as in the kernel.
pub(super) const LINKS_MAX: usize = 40;

/// What remembering a path costs beside its bytes, about.
pub(super) const REMEMBERED_OVERHEAD_BYTES: u64 = 200;

const BENEATH: ResolveFlags = ResolveFlags::BENEATH
    .union(ResolveFlags::NO_SYMLINKS)
    .union(ResolveFlags::NO_MAGICLINKS);

/// An open directory of the tree.
#[derive(Debug)]
pub(super) struct Parent {
    fd: OwnedFd,
    /// Relative to the root, without links.
    path: PathBuf,
}

/// Where a file is: its directory and its name in there.
#[derive(Clone, Debug)]
pub(super) struct Place {
    parent: Rc<Parent>,
    name: OsString,
}

/// The tree, and what is known of it.
#[derive(Debug)]
pub(super) struct Tree {
    root: Rc<Parent>,
    /// By path as an archive writes it, which may lead through links.
    parents: HashMap<PathBuf, Rc<Parent>>,
    /// Every directory but the root, by path without links.
    directories: BTreeMap<PathBuf, Directory>,
    limits: Limits,
    remembered_bytes: u64,
    /// Who gets the directories that no entry names.
    pub(super) owner_of_implied: (u32, u32),
    /// Attributes that could not be set.
    pub(super) skipped_xattrs: Vec<SkippedXattr>,
    /// Where files are not given away.
    pub(super) owners: Option<Owners>,
}

#[derive(Debug)]
struct Directory {
    metadata: Metadata,
    opaque: bool,
    /// Whether no entry of the layer names it.
    implied: bool,
}

impl Place {
    /// The directory.
    pub(super) fn parent(&self) -> BorrowedFd<'_> {
        self.parent.fd.as_fd()
    }

    /// The name in the directory.
    pub(super) fn name(&self) -> &OsStr {
        &self.name
    }

    /// The path without links, for messages and keys.
    pub(super) fn path(&self) -> PathBuf {
        self.parent.path.join(&self.name)
    }
}

/// A name of an archive as a path below the root; empty for the root itself.
///
/// # Errors
/// [`LayerError::Refused`] where it has a `..`.
pub(super) fn normalise(name: &Path) -> Result<PathBuf, LayerError> {
    let mut path = PathBuf::with_capacity(name.as_os_str().len());
    for component in name.components() {
        match component {
            Component::Normal(part) => path.push(part),
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
            Component::ParentDir => {
                return Err(LayerError::Refused {
                    path: name.to_owned(),
                    reason: "its path has a \"..\"",
                });
            }
        }
    }
    Ok(path)
}

impl Tree {
    /// Opens the directory `path`, which is trusted and empty.
    pub(super) fn open(path: &Path, limits: Limits) -> Result<Self, LayerError> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(CWD, path, flags, Mode::empty())
            .map_err(LayerError::tree("opening the tree", path))?;
        let root = Rc::new(Parent {
            fd,
            path: PathBuf::new(),
        });
        Ok(Self {
            root,
            parents: HashMap::new(),
            directories: BTreeMap::new(),
            limits,
            remembered_bytes: 0,
            owner_of_implied: (0, 0),
            skipped_xattrs: Vec::new(),
            owners: Owners::of(path).map_err(LayerError::tree("reading the owners of", path))?,
        })
    }

    /// Where the normalised, non-empty `path` is; missing parents are made.
    pub(super) fn place(&mut self, path: &Path) -> Result<Place, LayerError> {
        let name = path.file_name().unwrap_or_default().to_owned();
        let parent = self.directory(path.parent().unwrap_or(Path::new("")))?;
        Ok(Place { parent, name })
    }

    /// Where the normalised, non-empty `path` is; `None` where there is no such file.
    pub(super) fn find(&mut self, path: &Path) -> Result<Option<Place>, LayerError> {
        let name = path.file_name().unwrap_or_default().to_owned();
        let parent = path.parent().unwrap_or(Path::new(""));
        let Some(parent) = self.resolve(parent, false)? else {
            return Ok(None);
        };
        let place = Place { parent, name };
        Ok(self.file_type(&place)?.map(|_| place))
    }

    /// The type of a file, not followed; `None` where there is none. A whiteout is none.
    fn file_type(&self, place: &Place) -> Result<Option<FileType>, LayerError> {
        match rustix::fs::statat(place.parent(), place.name(), AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) if is_whiteout(&stat) => Ok(None),
            Ok(stat) => Ok(Some(FileType::from_raw_mode(stat.st_mode))),
            Err(Errno::NOENT) => Ok(None),
            Err(error) => Err(LayerError::tree("looking up", &place.path())(error)),
        }
    }

    /// Makes a file with `make`, which fails with `EEXIST` where there is one; that is replaced.
    pub(super) fn create<T>(
        &mut self,
        place: &Place,
        make: impl Fn(BorrowedFd<'_>, &OsStr) -> rustix::io::Result<T>,
    ) -> Result<rustix::io::Result<T>, LayerError> {
        match make(place.parent(), place.name()) {
            Err(Errno::EXIST) => {
                self.remove(place)?;
                Ok(make(place.parent(), place.name()))
            }
            other => Ok(other),
        }
    }

    /// Makes a directory, or takes the one that is there.
    pub(super) fn make_directory(
        &mut self,
        place: &Place,
        metadata: Metadata,
    ) -> Result<(), LayerError> {
        let path = place.path();
        let opaque = self.mkdir(place, &path)?;
        let xattrs = metadata.xattrs.iter();
        let bytes: usize = xattrs.map(|(name, value)| name.len() + value.len()).sum();
        self.remember(&path, bytes)?;
        let directory = Directory {
            metadata,
            opaque,
            implied: false,
        };
        if let Some(before) = self.directories.insert(path.clone(), directory)
            && before.opaque
            && let Some(now) = self.directories.get_mut(&path)
        {
            now.opaque = true;
        }
        Ok(())
    }

    /// Makes a directory hide nothing of what is below: there is nothing in an archive that
    /// is no layer.
    pub(super) fn make_transparent(&mut self, place: &Place) {
        if let Some(directory) = self.directories.get_mut(&place.path()) {
            directory.opaque = false;
        }
    }

    /// Whether the new directory hides what lower layers have there: where the layer first
    /// removes or replaces a path and then makes it a directory, that is a new one.
    fn mkdir(&mut self, place: &Place, path: &Path) -> Result<bool, LayerError> {
        let make =
            |parent: BorrowedFd<'_>, name: &OsStr| rustix::fs::mkdirat(parent, name, Mode::RWXU);
        match make(place.parent(), place.name()) {
            Ok(()) => Ok(false),
            Err(Errno::EXIST) => {
                if self.file_type(place)? == Some(FileType::Directory) {
                    return Ok(false);
                }
                self.remove(place)?;
                make(place.parent(), place.name())
                    .map_err(LayerError::tree("making the directory", path))?;
                Ok(true)
            }
            Err(error) => Err(LayerError::tree("making the directory", path)(error)),
        }
    }

    /// Hides what lower layers have at `place`. What this layer has there stays: "Whiteout
    /// files MUST only apply to resources in lower/parent layers."
    pub(super) fn whiteout(&mut self, place: &Place) -> Result<(), LayerError> {
        match rustix::fs::mknodat(
            place.parent(),
            place.name(),
            FileType::CharacterDevice,
            Mode::empty(),
            rustix::fs::makedev(0, 0),
        ) {
            Ok(()) => Ok(()),
            Err(Errno::EXIST) => {
                if let Some(directory) = self.directories.get_mut(&place.path()) {
                    directory.opaque = true;
                }
                Ok(())
            }
            Err(error @ (Errno::PERM | Errno::NOSYS)) => Err(LayerError::WhiteoutNotPermitted {
                path: place.path(),
                source: error.into(),
            }),
            Err(error) => Err(LayerError::tree("making the whiteout of", &place.path())(
                error,
            )),
        }
    }

    /// Makes the directory `path` opaque.
    pub(super) fn make_opaque(&mut self, path: &Path) -> Result<(), LayerError> {
        let parent = self.directory(path)?;
        match self.directories.get_mut(&parent.path) {
            Some(directory) => {
                directory.opaque = true;
                Ok(())
            }
            // Overlay mounts look at no attribute of a layer's root, so this would be
            // silently without effect. No builder is known to write it.
            None => Err(LayerError::Refused {
                path: path.join(whiteout::OPAQUE),
                reason: "it would hide all layers below this one, which is not supported",
            }),
        }
    }

    /// The content of the regular file that was made last under this name of an archive.
    pub(super) fn content(&mut self, name: &Path) -> Result<Vec<u8>, LayerError> {
        let path = normalise(name)?;
        let fail = |error: Errno| LayerError::tree("reading", &path)(error);
        let place = self.find(&path)?.ok_or_else(|| fail(Errno::NOENT))?;
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let fd = open_beneath(place.parent(), place.name(), flags).map_err(fail)?;
        let mut content = Vec::new();
        let read = std::fs::File::from(fd).read_to_end(&mut content);
        read.map_err(LayerError::tree("reading", &path))?;
        Ok(content)
    }

    /// Accounts for `bytes` and a path that are kept until the end.
    pub(super) fn remember(&mut self, path: &Path, bytes: usize) -> Result<(), LayerError> {
        self.remembered_bytes +=
            (path.as_os_str().len() + bytes) as u64 + REMEMBERED_OVERHEAD_BYTES;
        let limit = self.limits.remembered_bytes;
        if self.remembered_bytes > limit {
            return Err(LayerError::Limit {
                what: "too many directories, devices and attributes to remember (bytes)",
                limit,
                path: path.to_owned(),
            });
        }
        Ok(())
    }

    /// Gives all directories their metadata, and records owners beside `dir`, which is this tree,
    /// where they are recorded; returns those that no entry names, in order.
    pub(super) fn finish(
        mut self,
        dir: &Path,
    ) -> Result<(Vec<PathBuf>, Vec<SkippedXattr>), LayerError> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        for (path, directory) in self.directories.iter().rev() {
            let fd = open_beneath(self.root.fd.as_fd(), path.as_os_str(), flags)
                .map_err(LayerError::tree("opening the directory", path))?;
            if directory.opaque {
                let (name, value) = whiteout::OPAQUE_XATTR;
                rustix::fs::fsetxattr(&fd, name, value, XattrFlags::empty()).map_err(|error| {
                    LayerError::Xattr {
                        path: path.clone(),
                        name: name.into(),
                        source: error.into(),
                    }
                })?;
            }
            metadata::set_on_fd(
                fd.as_fd(),
                path,
                &directory.metadata,
                true,
                &mut self.skipped_xattrs,
                self.owners.as_mut(),
            )?;
        }
        // The root's own metadata is never taken from a layer, as in containerd. But the
        // directory that is given may be a private one.
        let root = open_beneath(self.root.fd.as_fd(), OsStr::new("."), flags)
            .map_err(LayerError::tree("opening the directory", Path::new("/")))?;
        rustix::fs::fchmod(&root, Mode::from_raw_mode(0o755))
            .map_err(LayerError::tree("setting the mode of", Path::new("/")))?;
        let epoch = rustix::fs::Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let epoch = rustix::fs::Timestamps {
            last_access: epoch,
            last_modification: epoch,
        };
        rustix::fs::futimens(&root, &epoch)
            .map_err(LayerError::tree("setting the time of", Path::new("/")))?;
        if let Some(owners) = &self.owners {
            owners
                .save(dir)
                .map_err(LayerError::tree("recording the owners of", dir))?;
        }
        let implied = self.directories.into_iter().filter(|(_, d)| d.implied);
        Ok((implied.map(|(path, _)| path).collect(), self.skipped_xattrs))
    }

    /// Removes whatever is at `place`.
    fn remove(&mut self, place: &Place) -> Result<(), LayerError> {
        let path = place.path();
        let fail = |error: Errno| LayerError::tree("replacing", &path)(error);
        let stat = rustix::fs::statat(place.parent(), place.name(), AtFlags::SYMLINK_NOFOLLOW)
            .map_err(fail)?;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => {
                // Whatever was found through it is found no more.
                self.parents.clear();
                self.remove_directory(&path).map_err(fail)
            }
            kind => {
                if kind == FileType::Symlink {
                    self.parents.clear();
                }
                rustix::fs::unlinkat(place.parent(), place.name(), AtFlags::empty()).map_err(fail)
            }
        }
    }

    /// Removes a directory with everything in it. All directories are known, so this goes
    /// from the leaves up without recursion, however deep a hostile layer nests them.
    fn remove_directory(&mut self, path: &Path) -> rustix::io::Result<()> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let below: Vec<PathBuf> = self
            .directories
            .range(path.to_owned()..)
            .map(|(below, _)| below)
            .take_while(|below| below.starts_with(path))
            .cloned()
            .collect();
        for directory in below.iter().rev() {
            let fd = open_beneath(self.root.fd.as_fd(), directory.as_os_str(), flags)?;
            for entry in rustix::fs::Dir::read_from(&fd)? {
                let entry = entry?;
                let name = OsStr::from_bytes(entry.file_name().to_bytes());
                if name != "." && name != ".." {
                    rustix::fs::unlinkat(&fd, name, AtFlags::empty())?;
                }
            }
            let parent = directory.parent().unwrap_or(Path::new(""));
            let parent = match parent.as_os_str() {
                root if root.is_empty() => OsStr::new("."),
                parent => parent,
            };
            let parent = open_beneath(self.root.fd.as_fd(), parent, flags)?;
            let name = directory.file_name().unwrap_or_default();
            rustix::fs::unlinkat(&parent, name, AtFlags::REMOVEDIR)?;
            self.directories.remove(directory);
        }
        Ok(())
    }

    /// The directory at the normalised `path`, made where it is missing.
    fn directory(&mut self, path: &Path) -> Result<Rc<Parent>, LayerError> {
        let found = self.resolve(path, true)?;
        Ok(found.expect("missing directories are made"))
    }

    fn resolve(&mut self, path: &Path, make: bool) -> Result<Option<Rc<Parent>>, LayerError> {
        if path.as_os_str().is_empty() {
            return Ok(Some(Rc::clone(&self.root)));
        }
        if let Some(parent) = self.parents.get(path) {
            return Ok(Some(Rc::clone(parent)));
        }
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let parent = match open_beneath(self.root.fd.as_fd(), path.as_os_str(), flags) {
            Ok(fd) => Rc::new(Parent {
                fd,
                path: path.to_owned(),
            }),
            // Something is missing, a link, or no directory: have a closer look.
            Err(Errno::NOENT | Errno::LOOP | Errno::NOTDIR) => match self.walk(path, make)? {
                Some(parent) => parent,
                None => return Ok(None),
            },
            Err(error) => return Err(LayerError::tree("opening the directory", path)(error)),
        };
        if self.parents.len() >= PARENTS_MAX {
            self.parents.clear();
        }
        self.parents.insert(path.to_owned(), Rc::clone(&parent));
        Ok(Some(parent))
    }

    /// Goes to `path` component by component, following links as if the tree were `/`.
    fn walk(&mut self, path: &Path, make: bool) -> Result<Option<Rc<Parent>>, LayerError> {
        let mut here = Rc::clone(&self.root);
        let mut todo: Vec<OsString> = Vec::new();
        push_components(&mut todo, path);
        let mut links = 0;
        while let Some(name) = todo.pop() {
            if name == ".." {
                let above = here.path.parent().unwrap_or(Path::new("")).to_owned();
                here = self.reopen(above)?;
                continue;
            }
            let place = Place {
                parent: Rc::clone(&here),
                name,
            };
            here = match self.step(&place, make)? {
                Step::Directory(fd) => Rc::new(Parent {
                    fd,
                    path: place.path(),
                }),
                Step::Link(target) => {
                    links += 1;
                    if links > LINKS_MAX {
                        return Err(LayerError::tree("resolving", path)(Errno::LOOP));
                    }
                    push_components(&mut todo, &target);
                    if target.is_absolute() {
                        Rc::clone(&self.root)
                    } else {
                        here
                    }
                }
                Step::Missing => return Ok(None),
            };
        }
        Ok(Some(here))
    }

    fn reopen(&self, path: PathBuf) -> Result<Rc<Parent>, LayerError> {
        if path.as_os_str().is_empty() {
            return Ok(Rc::clone(&self.root));
        }
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = open_beneath(self.root.fd.as_fd(), path.as_os_str(), flags)
            .map_err(LayerError::tree("opening the directory", &path))?;
        Ok(Rc::new(Parent { fd, path }))
    }

    /// What is at `place`, seen as part of the way to something below it.
    fn step(&mut self, place: &Place, make: bool) -> Result<Step, LayerError> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let path = place.path();
        let fail = |error: Errno| LayerError::tree("looking up", &path)(error);
        match open_beneath(place.parent(), place.name(), flags) {
            Ok(fd) => {
                let stat = rustix::fs::fstat(&fd).map_err(fail)?;
                match FileType::from_raw_mode(stat.st_mode) {
                    FileType::Directory => return Ok(Step::Directory(fd)),
                    FileType::Symlink => {
                        let target = rustix::fs::readlinkat(&fd, "", Vec::new()).map_err(fail)?;
                        let target = OsString::from_vec(target.into_bytes());
                        return Ok(Step::Link(PathBuf::from(target)));
                    }
                    _ if is_whiteout(&stat) => {}
                    _ if !make => return Ok(Step::Missing),
                    _ => return Err(fail(Errno::NOTDIR)),
                }
            }
            Err(Errno::NOENT) => {}
            Err(error) => return Err(fail(error)),
        }
        if !make {
            return Ok(Step::Missing);
        }
        let opaque = self.mkdir(place, &path)?;
        self.remember(&path, 0)?;
        if self.directories.len() as u64 >= self.limits.entries {
            return Err(LayerError::Limit {
                what: "too many entries",
                limit: self.limits.entries,
                path,
            });
        }
        let directory = Directory {
            metadata: Metadata {
                mode: 0o755,
                uid: self.owner_of_implied.0,
                gid: self.owner_of_implied.1,
                ..Metadata::default()
            },
            opaque,
            implied: true,
        };
        self.directories.insert(path.clone(), directory);
        open_beneath(place.parent(), place.name(), flags | OFlags::DIRECTORY)
            .map(Step::Directory)
            .map_err(LayerError::tree("opening the directory", &path))
    }
}

enum Step {
    Directory(OwnedFd),
    Link(PathBuf),
    Missing,
}

/// Puts the components of `path` on a stack, the first on top.
pub(super) fn push_components(todo: &mut Vec<OsString>, path: &Path) {
    todo.extend(
        path.components()
            .rev()
            .filter_map(|component| match component {
                Component::Normal(name) => Some(name.to_owned()),
                Component::ParentDir => Some(OsString::from("..")),
                Component::RootDir | Component::CurDir | Component::Prefix(_) => None,
            }),
    );
}

fn open_beneath(
    directory: BorrowedFd<'_>,
    path: &OsStr,
    flags: OFlags,
) -> rustix::io::Result<OwnedFd> {
    loop {
        match rustix::fs::openat2(directory, path, flags, Mode::empty(), BENEATH) {
            // The kernel asks to try again where a rename elsewhere raced with the look-up.
            Err(Errno::AGAIN) => {}
            other => return other,
        }
    }
}

/// Whether this is the overlay file system's form of a removed file.
fn is_whiteout(stat: &rustix::fs::Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice && stat.st_rdev == 0
}
