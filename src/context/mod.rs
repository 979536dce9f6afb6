//! What `COPY`, `ADD` and bind mounts may see: a directory, less what is ignored.
//!
//! Everything below the root is somebody else's: no path and no link leads outside,
//! and a file that the ignore rules hide does not exist, whichever way leads to it.
//! Nothing is copied or hashed here.
//!
//! Paths are relative to the root. [`BuildContext::lookup`] resolves links; what it
//! returns and what [`BuildContext::read_dir`] lists below it are resolved paths, and
//! only those can be opened: a link on the way is an error there.

mod address;
mod dockerfile;
pub mod glob;
pub mod ignore;
pub mod named;
mod source;
mod walk;

use std::collections::{BTreeMap, HashMap};
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Component, Path, PathBuf};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags, Stat};
use rustix::io::Errno;
use thiserror::Error;

use crate::confined::{self, ConfinedDir};
use crate::layer::LayerError;
use crate::layer::archive::Owner;
use crate::rootfs::Time;

pub use address::{is_git, is_git_context};
pub use dockerfile::{DockerfileSource, read_dockerfile};
use ignore::DirectoryMatch;
pub use ignore::{IgnoreRules, PatternError};
pub use named::{
    LayoutReference, NamedContext, NamedContextError, NamedContexts, open_named_directory,
};
pub use source::{ContextSource, DockerfileLocation, InputFile, OpenedContext, SourceInput, open};
pub use walk::Walk;

/// How many links one look-up follows; the number that Docker's tools allow.
const LINK_LIMIT: usize = 255;

/// The longest name of a file, in bytes, on every file system of Linux.
const NAME_MAX: usize = 255;

/// How much of a directory is listed at once.
const LISTING_BYTES: usize = 32 << 10;

/// A directory whose files steps may read.
#[derive(Debug)]
pub struct BuildContext {
    dir: ConfinedDir,
    rules: IgnoreRules,
    /// By device and inode; absent where the directory is the user's own, whose owners
    /// mean nothing in an image.
    owners: Option<HashMap<(u64, u64), Owner>>,
    /// Removed with the context.
    temporary: Option<Temporary>,
}

/// A directory that is removed when nobody needs it any more.
#[derive(Debug)]
struct Temporary(PathBuf);

impl Drop for Temporary {
    fn drop(&mut self) {
        if let Err(error) = confined::remove_tree(&self.0) {
            tracing::warn!(path = %self.0.display(), %error, "a temporary directory stays");
        }
    }
}

/// A file of the context, of any type, and its metadata.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ContextNode {
    /// Where it is: relative to the root, without links, `.` and `..`; empty for the root itself.
    pub path: PathBuf,
    /// Its type.
    pub kind: NodeKind,
    /// Permission bits with setuid, setgid and sticky.
    pub mode: u32,
    /// The number of bytes; 0 for what is no regular file.
    pub size_bytes: u64,
    /// Modification time.
    pub mtime: Time,
    /// When content or metadata last changed.
    pub ctime: Time,
    /// Device and inode: names of the same file have them in common.
    pub inode: (u64, u64),
    /// How many names the file has, in the context and elsewhere.
    pub links: u64,
}

/// The type of a [`ContextNode`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum NodeKind {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link.
    Symlink,
    /// A named pipe.
    Fifo,
    /// A socket, which no image can hold.
    Socket,
    /// A character device with its number.
    CharDevice(u64),
    /// A block device with its number.
    BlockDevice(u64),
}

/// What can go wrong while a context is read.
#[derive(Debug, Error)]
pub enum ContextError {
    /// The context cannot be used at all.
    #[error("opening the build context {}", path.display())]
    Open {
        /// Its directory.
        path: PathBuf,
        /// Why not; not a directory is `ENOTDIR`.
        #[source]
        source: io::Error,
    },
    /// A file operation inside failed.
    #[error("{action} {:?} in the build context {}", path.display(), context.display())]
    Io {
        /// Such as `reading`.
        action: &'static str,
        /// What it was done to, inside.
        path: PathBuf,
        /// The context's directory.
        context: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The ignore rules cannot be read.
    #[error("{name}")]
    Ignore {
        /// Their file.
        name: String,
        /// Which line and why.
        #[source]
        source: ignore::IgnoreError,
    },
    /// Links lead in a circle, or as good as.
    #[error("{:?} in the build context leads through more than {LINK_LIMIT} symbolic links", path.display())]
    TooManyLinks {
        /// What was looked up.
        path: PathBuf,
    },
    /// There is no Dockerfile.
    #[error("no Dockerfile at {}{}", path.display(),
        if *is_link {
            ": it is a symbolic link to nothing inside its directory"
        } else if *has_containerfile {
            ": there is a Containerfile, which is read only where --file names it"
        } else {
            ""
        })]
    NoDockerfile {
        /// Where it was looked for.
        path: PathBuf,
        /// Whether a link is there, to nothing inside of the directory it was looked for in.
        is_link: bool,
        /// Whether no name was given and what Podman and Buildah read then is there.
        has_containerfile: bool,
    },
    /// The main context is none of the forms that there are.
    #[error("unable to prepare context: {source_text:?} is neither a directory, a URL nor \"-\"")]
    NoContext {
        /// What was given.
        source_text: String,
    },
    /// The address of the main context is none.
    #[error("invalid URL of the build context {url}: {reason}")]
    Url {
        /// The URL, redacted.
        url: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Two things are to be read from where there is one.
    #[error("{0}")]
    Conflict(&'static str),
    /// Standard input or a download is no context.
    #[error("{input} {reason}")]
    NotAContext {
        /// Where it came from.
        input: String,
        /// What was expected.
        reason: &'static str,
    },
    /// An archive cannot be unpacked.
    #[error("unpacking the build context from {input}")]
    Unpack {
        /// Where it came from.
        input: String,
        /// Why.
        #[source]
        source: LayerError,
    },
    /// There is no place for the files of a context.
    #[error("making a temporary directory in {}", path.display())]
    Temporary {
        /// Where.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A Dockerfile or ignore file cannot be read.
    #[error("reading {}", path.display())]
    Read {
        /// The file, or `-` for standard input.
        path: PathBuf,
        /// Why not; more than the limit is `FileTooLarge`.
        #[source]
        source: io::Error,
    },
}

impl BuildContext {
    /// Opens the directory `path`, which is trusted and may lead through links.
    ///
    /// # Errors
    /// [`ContextError::Open`].
    pub fn directory(path: &Path, rules: IgnoreRules) -> Result<Self, ContextError> {
        let dir = ConfinedDir::open(path).map_err(|source| ContextError::Open {
            path: path.to_owned(),
            source,
        })?;
        Ok(Self {
            dir,
            rules,
            owners: None,
            temporary: None,
        })
    }

    /// The user and group that own the file in the image, if nobody says otherwise: as in the
    /// archive that the context was; else 0:0.
    pub fn owner(&self, node: &ContextNode) -> (u32, u32) {
        self.recorded(node)
            .map_or((0, 0), |owner| (owner.uid, owner.gid))
    }

    /// The extended attributes that the file at `path`, a resolved path, has in the archive
    /// that the context was; none where it was a directory.
    ///
    /// # Errors
    /// [`ContextError::Io`].
    pub fn xattrs(&self, path: &Path) -> Result<BTreeMap<OsString, Vec<u8>>, ContextError> {
        if self.owners.is_none() {
            return Ok(BTreeMap::new());
        }
        let node = self.visible(path)?;
        let owner = node.and_then(|node| self.recorded(&node));
        Ok(owner.map_or_else(BTreeMap::new, |owner| owner.xattrs.clone()))
    }

    fn recorded(&self, node: &ContextNode) -> Option<&Owner> {
        self.owners.as_ref()?.get(&node.inode)
    }

    /// Where the context is; for messages.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// What is hidden.
    pub fn rules(&self) -> &IgnoreRules {
        &self.rules
    }

    /// Finds `path`, following links inside the context; `None` where there is nothing to see.
    ///
    /// `..` in `path` itself is resolved by text, as Docker does with the sources of
    /// `COPY`; in the targets of links by directory, as the kernel does. Both stop at
    /// the root, where absolute links start. With `follow_last` the result is not a link.
    ///
    /// # Errors
    /// [`ContextError::TooManyLinks`]; [`ContextError::Io`].
    pub fn lookup(
        &self,
        path: &Path,
        follow_last: bool,
    ) -> Result<Option<ContextNode>, ContextError> {
        // Components still to go, the next one last.
        let mut todo: Vec<OsString> = clean(path)
            .components()
            .rev()
            .map(|component| component.as_os_str().to_owned())
            .collect();
        let mut at = PathBuf::new();
        let mut node = self.root()?;
        let mut links = 0;
        while let Some(name) = todo.pop() {
            if name == ".." {
                at.pop();
                continue;
            }
            let next = at.join(&name);
            let Some(found) = self.visible(&next)? else {
                return Ok(None);
            };
            let is_last = todo.is_empty();
            match found.kind {
                NodeKind::Symlink if !is_last || follow_last => {
                    links += 1;
                    if links > LINK_LIMIT {
                        return Err(ContextError::TooManyLinks {
                            path: path.to_owned(),
                        });
                    }
                    let target = PathBuf::from(self.read_link(&next)?);
                    if target.has_root() {
                        at = PathBuf::new();
                    }
                    todo.extend(target.components().rev().filter_map(|c| match c {
                        Component::Normal(name) => Some(name.to_owned()),
                        Component::ParentDir => Some("..".into()),
                        _ => None,
                    }));
                }
                // A file has nothing below it.
                kind if kind != NodeKind::Directory && !is_last => return Ok(None),
                _ => {
                    at = next;
                    node = found;
                }
            }
        }
        if node.path == at {
            return Ok(Some(node));
        }
        // `..` or a link to the root came last: `at` is a directory that was walked through.
        self.visible(&at)
    }

    /// What is in the directory `path`, a resolved path, in the order of the names' bytes.
    ///
    /// A directory that is ignored is listed where something below it is not.
    ///
    /// # Errors
    /// [`ContextError::Io`].
    pub fn read_dir(&self, path: &Path) -> Result<Vec<ContextNode>, ContextError> {
        let above = self.matched(path);
        let dir = self.directory_at(path).map_err(self.io("listing", path))?;
        let names = list(&dir).map_err(self.io("listing", path))?;
        let mut nodes = Vec::with_capacity(names.len());
        for name in names {
            let path = path.join(&name);
            let stat = || self.found(&path, stat_in(&dir, &name));
            // What vanished since it was listed is as if it had gone before.
            nodes.extend(self.visible_in(&path, above.as_ref(), stat)?);
        }
        Ok(nodes)
    }

    /// Everything that can be seen at and below `path`, a resolved path: parents before
    /// children, siblings by bytes, `path` itself first.
    pub fn walk(&self, path: &Path) -> Walk<'_> {
        Walk::new(self, path)
    }

    /// Opens the regular file at `path`, a resolved path.
    ///
    /// # Errors
    /// [`ContextError::Io`]; ignored or absent is `NotFound`, another type `InvalidInput`.
    pub fn open(&self, path: &Path) -> Result<File, ContextError> {
        if self.rules.is_ignored(path) {
            let absent = io::ErrorKind::NotFound.into();
            return Err(self.io("opening", path)(absent));
        }
        self.open_seen(path)
    }

    /// The same for the path of a node that [`BuildContext::lookup`] or
    /// [`BuildContext::read_dir`] gave, about which the ignore rules need not be asked again.
    ///
    /// # Errors
    /// As for [`BuildContext::open`].
    pub fn open_seen(&self, path: &Path) -> Result<File, ContextError> {
        // One call to the kernel for the whole path: there may be very many files. What is
        // no file must not block, nor act.
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY;
        let file = self.resolved(path, flags).map(File::from);
        file.and_then(only_regular)
            .map_err(self.io("opening", path))
    }

    /// The target of the link at `path`, a resolved path, verbatim.
    ///
    /// # Errors
    /// [`ContextError::Io`]; ignored or absent is `NotFound`.
    pub fn read_link(&self, path: &Path) -> Result<OsString, ContextError> {
        let read = || {
            if self.rules.is_ignored(path) {
                return Err(io::ErrorKind::NotFound.into());
            }
            let (parent, name) = self.parent(path)?;
            let target = rustix::fs::readlinkat(parent, name, Vec::new())?;
            Ok(OsString::from_vec(target.into_bytes()))
        };
        read().map_err(self.io("reading the link", path))
    }

    fn root(&self) -> Result<ContextNode, ContextError> {
        let path = Path::new("");
        let stat =
            rustix::fs::fstat(&self.dir).map_err(|e| self.io("looking at", path)(e.into()))?;
        Ok(ContextNode::new(PathBuf::new(), &stat))
    }

    /// The node at the resolved path `path` if it exists and is not hidden.
    fn visible(&self, path: &Path) -> Result<Option<ContextNode>, ContextError> {
        if path.as_os_str().is_empty() {
            return self.root().map(Some);
        }
        let above = path.parent().and_then(|parent| self.matched(parent));
        self.visible_in(path, above.as_ref(), || self.stat(path))
    }

    /// The same, where `above` is what the rules say about the directory that it is in, and
    /// `stat` finds its metadata.
    fn visible_in(
        &self,
        path: &Path,
        above: Option<&DirectoryMatch>,
        stat: impl FnOnce() -> Result<Option<Stat>, ContextError>,
    ) -> Result<Option<ContextNode>, ContextError> {
        let (hidden, matched) = self.rules.step(path, above);
        if hidden && !self.rules.may_reinclude_below(path) {
            return Ok(None);
        }
        let Some(stat) = stat()? else {
            return Ok(None);
        };
        let node = ContextNode::new(path.to_owned(), &stat);
        // An ignored directory is there for what is below it, if anything is.
        if hidden && (node.kind != NodeKind::Directory || self.is_all_hidden(path, matched)?) {
            return Ok(None);
        }
        Ok(Some(node))
    }

    /// The metadata of the resolved path `path`; `None` where nothing is.
    fn stat(&self, path: &Path) -> Result<Option<Stat>, ContextError> {
        let parent = self.parent(path);
        self.found(path, parent.and_then(|(dir, name)| stat_in(dir, name)))
    }

    /// What was found at `path`, which may be nothing.
    fn found(&self, path: &Path, stat: io::Result<Stat>) -> Result<Option<Stat>, ContextError> {
        stat.map(Some)
            .or_else(|error| match Errno::from_io_error(&error) {
                Some(Errno::NOENT | Errno::NOTDIR) => Ok(None),
                // No file has such a name. A path that is too long as a whole is an error:
                // something may well be there.
                Some(Errno::NAMETOOLONG) if path.iter().any(|name| name.len() > NAME_MAX) => {
                    Ok(None)
                }
                _ => Err(self.io("looking at", path)(error)),
            })
    }

    /// Whether nothing below the directory `path` can be seen; `matched` is what the rules say about it.
    fn is_all_hidden(&self, path: &Path, matched: DirectoryMatch) -> Result<bool, ContextError> {
        // No recursion: how deep it goes is somebody else's choice.
        let mut todo = vec![(path.to_owned(), matched)];
        while let Some((dir, matched)) = todo.pop() {
            for name in self.names(&dir)? {
                let child = dir.join(name);
                let (hidden, matched) = self.rules.step(&child, Some(&matched));
                if !hidden {
                    return Ok(false);
                }
                let is_directory = |stat: Stat| FileType::from_raw_mode(stat.st_mode).is_dir();
                if self.rules.may_reinclude_below(&child)
                    && self.stat(&child)?.is_some_and(is_directory)
                {
                    todo.push((child, matched));
                }
            }
        }
        Ok(true)
    }

    /// What the rules say about the directory `path`; `None` for the root.
    fn matched(&self, path: &Path) -> Option<DirectoryMatch> {
        let mut at = PathBuf::new();
        let mut matched = None;
        for component in path.components() {
            at.push(component);
            matched = Some(self.rules.step(&at, matched.as_ref()).1);
        }
        matched
    }

    /// All names in the directory `path`, sorted by bytes.
    fn names(&self, path: &Path) -> Result<Vec<OsString>, ContextError> {
        let names = self.directory_at(path).and_then(list);
        names.map_err(self.io("listing", path))
    }

    /// Opens the directory at the resolved path `path` to list it.
    fn directory_at(&self, path: &Path) -> io::Result<OwnedFd> {
        self.resolved(path, OFlags::RDONLY | OFlags::DIRECTORY)
    }

    /// Opens the directory above `path`.
    fn parent<'p>(&self, path: &'p Path) -> io::Result<(OwnedFd, &'p OsStr)> {
        let name = path.file_name().ok_or(Errno::INVAL)?;
        let parent = path.parent().unwrap_or(Path::new(""));
        let dir = self.resolved(parent, OFlags::PATH | OFlags::DIRECTORY)?;
        Ok((dir, name))
    }

    /// Opens a path that has no links. One that appeared since is `ELOOP`: what it
    /// leads to was not asked of the ignore rules.
    fn resolved(&self, path: &Path, flags: OFlags) -> io::Result<OwnedFd> {
        let path = if path.as_os_str().is_empty() {
            Path::new(".")
        } else {
            path
        };
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
        loop {
            let flags = flags | OFlags::CLOEXEC;
            match rustix::fs::openat2(&self.dir, path, flags, Mode::empty(), resolve) {
                // The kernel asks to try again where a rename elsewhere raced with the look-up.
                Err(Errno::AGAIN) => {}
                other => return Ok(other?),
            }
        }
    }

    fn io<'a>(
        &'a self,
        action: &'static str,
        path: &'a Path,
    ) -> impl FnOnce(io::Error) -> ContextError + 'a {
        move |source| ContextError::Io {
            action,
            path: path.to_owned(),
            context: self.path().to_owned(),
            source,
        }
    }
}

impl AsFd for BuildContext {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.dir.as_fd()
    }
}

impl ContextNode {
    #[allow(
        clippy::unnecessary_cast,
        clippy::cast_possible_wrap,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "the fields' types differ between architectures; all values fit"
    )]
    fn new(path: PathBuf, stat: &Stat) -> Self {
        let kind = match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => NodeKind::Directory,
            FileType::Symlink => NodeKind::Symlink,
            FileType::Fifo => NodeKind::Fifo,
            FileType::Socket => NodeKind::Socket,
            FileType::CharacterDevice => NodeKind::CharDevice(stat.st_rdev as u64),
            FileType::BlockDevice => NodeKind::BlockDevice(stat.st_rdev as u64),
            FileType::RegularFile | FileType::Unknown => NodeKind::File,
        };
        Self {
            path,
            kind,
            mode: stat.st_mode as u32 & 0o7777,
            size_bytes: if kind == NodeKind::File {
                stat.st_size as u64
            } else {
                0
            },
            mtime: Time {
                seconds: stat.st_mtime as i64,
                nanoseconds: stat.st_mtime_nsec as u32,
            },
            ctime: Time {
                seconds: stat.st_ctime as i64,
                nanoseconds: stat.st_ctime_nsec as u32,
            },
            inode: (stat.st_dev as u64, stat.st_ino as u64),
            links: stat.st_nlink as u64,
        }
    }
}

/// The metadata of `name` in `dir`; links are not followed.
fn stat_in(dir: impl AsFd, name: &OsStr) -> io::Result<Stat> {
    Ok(rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW)?)
}

/// All names in a directory, sorted by bytes.
fn list(dir: impl AsFd) -> io::Result<Vec<OsString>> {
    let mut names = Vec::new();
    let mut buffer = Vec::with_capacity(LISTING_BYTES);
    let mut entries = rustix::fs::RawDir::new(dir, buffer.spare_capacity_mut());
    while let Some(entry) = entries.next() {
        let name = entry?.file_name().to_bytes().to_vec();
        if name != b"." && name != b".." {
            names.push(OsString::from_vec(name));
        }
    }
    names.sort_unstable_by(|a, b| a.as_bytes().cmp(b.as_bytes()));
    Ok(names)
}

/// Refuses what is no regular file, such as a pipe or a device.
fn only_regular(file: File) -> io::Result<File> {
    if file.metadata()?.is_file() {
        Ok(file)
    } else {
        Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "not a regular file",
        ))
    }
}

/// `path` relative to the root, without `.`; `..` takes back what stands before it.
fn clean(path: &Path) -> PathBuf {
    let mut cleaned = PathBuf::new();
    for component in path.components() {
        match component {
            Component::Normal(name) => cleaned.push(name),
            Component::ParentDir => {
                cleaned.pop();
            }
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    cleaned
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::Read as _;
    use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};

    use super::*;

    /// A context `root` beside a file `canary`, holding files that contain their own names.
    struct Fixture {
        _dir: tempfile::TempDir,
        root: PathBuf,
    }

    fn fixture(files: &[&str]) -> Fixture {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("canary"), "outside").unwrap();
        let root = dir.path().join("root");
        fs::create_dir(&root).unwrap();
        for file in files {
            fs::create_dir_all(root.join(file).parent().unwrap()).unwrap();
            fs::write(root.join(file), file).unwrap();
        }
        Fixture { _dir: dir, root }
    }

    impl Fixture {
        fn link(&self, target: &str, at: &str) {
            symlink(target, self.root.join(at)).unwrap();
        }

        fn context(&self, rules: &str) -> BuildContext {
            BuildContext::directory(&self.root, rules_of(rules)).unwrap()
        }
    }

    fn rules_of(text: &str) -> IgnoreRules {
        IgnoreRules::parse(text.as_bytes()).unwrap()
    }

    #[track_caller]
    fn check_lookup(context: &BuildContext, path: &str, follow_last: bool, expected: Option<&str>) {
        let node = context.lookup(Path::new(path), follow_last).unwrap();
        let found = node.map(|node| node.path);
        assert_eq!(found, expected.map(PathBuf::from), "{path}");
    }

    fn names(nodes: &[ContextNode]) -> Vec<String> {
        nodes
            .iter()
            .map(|node| node.path.display().to_string())
            .collect()
    }

    fn walk(context: &BuildContext, path: &str) -> Vec<String> {
        let nodes: Result<Vec<_>, _> = context.walk(Path::new(path)).collect();
        names(&nodes.unwrap())
    }

    #[test]
    fn security_s04_links_resolve_inside_and_never_outside() {
        let fixture = fixture(&["canary", "d/f", "d/e/g"]);
        fixture.link("../../canary", "d/up");
        fixture.link("/canary", "d/absolute");
        fixture.link("d", "to-d");
        fixture.link("/", "to-root");
        fixture.link("to-d/../d/e", "through");
        fixture.link("e/..", "d/back");
        fixture.link("nothing", "dangling");
        fixture.link("/proc/self/root/etc/passwd", "magic");
        let context = fixture.context("");
        for (path, expected) in [
            ("", Some("")),
            ("/", Some("")),
            ("../..", Some("")),
            ("./d//f", Some("d/f")),
            ("d/up", Some("canary")),
            ("d/absolute", Some("canary")),
            ("to-d/f", Some("d/f")),
            ("to-d", Some("d")),
            ("to-root", Some("")),
            ("to-root/d/e", Some("d/e")),
            ("through/g", Some("d/e/g")),
            ("d/back", Some("d")),
            ("d/back/f", Some("d/f")),
            // By text: what `..` follows is not looked at.
            ("to-d/../canary", Some("canary")),
            ("absent/../canary", Some("canary")),
            ("dangling", None),
            ("magic", None),
            ("absent", None),
            ("canary/below-a-file", None),
        ] {
            check_lookup(&context, path, true, expected);
        }
        check_lookup(&context, "to-d", false, Some("to-d"));
        check_lookup(&context, "to-d/up", false, Some("d/up"));
        check_lookup(&context, &"x".repeat(300), true, None);
    }

    #[test]
    fn circles_of_links_end() {
        let fixture = fixture(&["f"]);
        fixture.link("b", "a");
        fixture.link("a", "b");
        fixture.link("f", "l255");
        for at in (0..255).rev() {
            fixture.link(&format!("l{}", at + 1), &format!("l{at}"));
        }
        let context = fixture.context("");
        let error = context.lookup(Path::new("a"), true).unwrap_err();
        assert_eq!(
            error.to_string(),
            "\"a\" in the build context leads through more than 255 symbolic links"
        );
        check_lookup(&context, "l1", true, Some("f"));
        assert!(context.lookup(Path::new("l0"), true).is_err());
    }

    #[test]
    fn what_is_ignored_does_not_exist_whichever_way() {
        let fixture = fixture(&["a", "secret/key", "secret/public/b", "c"]);
        fixture.link("secret/key", "to-key");
        fixture.link("secret/public/b", "to-b");
        let context = fixture.context("secret\n!secret/public");
        check_lookup(&context, "secret/key", true, None);
        check_lookup(&context, "to-key", true, None);
        check_lookup(&context, "to-key", false, Some("to-key"));
        check_lookup(&context, "to-b", true, Some("secret/public/b"));
        let listed = context.read_dir(Path::new("secret")).unwrap();
        assert_eq!(names(&listed), ["secret/public"]);
        assert_eq!(
            walk(&context, ""),
            [
                "",
                "a",
                "c",
                "secret",
                "secret/public",
                "secret/public/b",
                "to-b",
                "to-key"
            ]
        );
        let error = context.open(Path::new("secret/key")).unwrap_err();
        assert!(
            matches!(&error, ContextError::Io { source, .. } if source.kind() == io::ErrorKind::NotFound),
            "{error:?}"
        );
        assert_eq!(
            error.to_string(),
            format!(
                "opening \"secret/key\" in the build context {}",
                fixture.root.display()
            )
        );
    }

    #[test]
    fn an_ignored_directory_is_there_only_for_what_is_below() {
        let fixture = fixture(&["d/e/f", "x"]);
        let context = fixture.context("*\n!d/e/g");
        check_lookup(&context, "d", true, None);
        assert_eq!(walk(&context, ""), [""]);
        let context = fixture.context("*\n!d/e/f");
        assert_eq!(walk(&context, ""), ["", "d", "d/e", "d/e/f"]);
        assert_eq!(walk(&context, "d/e"), ["d/e", "d/e/f"]);
        assert_eq!(walk(&context, "x"), [] as [String; 0]);
    }

    #[test]
    fn a_path_that_is_too_long_is_an_error_and_not_an_end() {
        let fixture = fixture(&["f"]);
        // Longer than any path that the kernel takes, so made step by step.
        let mut dir = rustix::fs::open(&fixture.root, OFlags::PATH, Mode::empty()).unwrap();
        let name = "x".repeat(200);
        for _ in 0..25 {
            rustix::fs::mkdirat(&dir, &name, Mode::from_raw_mode(0o700)).unwrap();
            dir = rustix::fs::openat(&dir, &name, OFlags::PATH, Mode::empty()).unwrap();
        }
        for rules in ["", "*\n!**/absent"] {
            let context = fixture.context(rules);
            let result: Result<Vec<_>, _> = context.walk(Path::new("")).collect();
            let error = anyhow::Error::new(result.unwrap_err());
            let text = format!("{error:#}");
            assert!(text.contains(": File name too long"), "{rules:?}: {text}");
        }
    }

    #[test]
    fn listings_are_in_the_order_of_bytes() {
        let fixture = fixture(&["b", "a/z", "a.txt", "a-b", "B", "ä"]);
        let context = fixture.context("");
        let expected = ["", "B", "a", "a/z", "a-b", "a.txt", "b", "ä"];
        let mut sorted = walk(&context, "");
        sorted.sort_by(|a, b| crate::rootfs::order(Path::new(a), Path::new(b)));
        assert_eq!(walk(&context, ""), sorted);
        assert_eq!(sorted.len(), expected.len());
        let listed = names(&context.read_dir(Path::new("")).unwrap());
        assert_eq!(listed, ["B", "a", "a-b", "a.txt", "b", "ä"]);
    }

    #[test]
    fn metadata_is_that_of_the_file() {
        let fixture = fixture(&["f"]);
        let path = fixture.root.join("f");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o4750)).unwrap();
        fs::hard_link(&path, fixture.root.join("g")).unwrap();
        let mtime = std::time::UNIX_EPOCH + std::time::Duration::new(12, 345);
        fs::File::options()
            .write(true)
            .open(&path)
            .unwrap()
            .set_modified(mtime)
            .unwrap();
        let pipe = fixture.root.join("pipe");
        rustix::fs::mkfifoat(rustix::fs::CWD, &pipe, Mode::from_raw_mode(0o600)).unwrap();
        let context = fixture.context("");
        let look = |name: &str| context.lookup(Path::new(name), false).unwrap().unwrap();
        let (f, g) = (look("f"), look("g"));
        let metadata = fs::metadata(&path).unwrap();
        assert_eq!(f.kind, NodeKind::File);
        assert_eq!((f.mode, f.size_bytes, f.links), (0o4750, 1, 2));
        assert_eq!((f.mtime.seconds, f.mtime.nanoseconds), (12, 345));
        assert_eq!(f.ctime.seconds, metadata.ctime());
        assert_eq!(f.inode, (metadata.dev(), metadata.ino()));
        assert_eq!(f.inode, g.inode);
        assert_eq!(look("pipe").kind, NodeKind::Fifo);
        assert_eq!(look("").kind, NodeKind::Directory);
        let error = context.open(Path::new("pipe")).unwrap_err();
        assert!(
            matches!(&error, ContextError::Io { source, .. } if source.kind() == io::ErrorKind::InvalidInput),
            "{error:?}"
        );
    }

    #[test]
    fn only_resolved_paths_are_opened() {
        let fixture = fixture(&["secret/key", "d/f"]);
        fixture.link("secret", "d/link");
        fixture.link("../secret/key", "d/key");
        let context = fixture.context("secret");
        let mut text = String::new();
        let mut file = context.open(Path::new("d/f")).unwrap();
        file.read_to_string(&mut text).unwrap();
        assert_eq!(text, "d/f");
        assert_eq!(
            context.read_link(Path::new("d/key")).unwrap(),
            "../secret/key"
        );
        // As if the links had appeared after the look-up: never followed.
        for path in [
            "d/key",
            "d/link/key",
            "../canary",
            "d/../../canary",
            "/canary",
        ] {
            assert!(context.open(Path::new(path)).is_err(), "{path}");
        }
        assert!(context.read_dir(Path::new("d/link")).is_err());
        assert!(context.read_dir(Path::new("..")).is_err());
    }

    #[test]
    fn a_context_is_a_directory() {
        let fixture = fixture(&["f"]);
        for (name, reason) in [("f", "Not a directory"), ("g", "No such file or directory")] {
            let path = fixture.root.join(name);
            let error = BuildContext::directory(&path, rules_of("")).unwrap_err();
            let text = format!("{:#}", anyhow::Error::new(error));
            let start = format!("opening the build context {}: {reason}", path.display());
            assert!(text.starts_with(&start), "{text}");
        }
    }
}
