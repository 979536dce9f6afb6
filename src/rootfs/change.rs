//! [`Change`]: one added, modified or removed path of a layer.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt;
use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use rustix::fs::FileType;

use crate::owners::Owner;

/// One path that a layer adds, modifies or removes.
///
/// In a list of changes, paths are in the order of [`order`]: parents before
/// children, siblings by bytes, a path's own change before those below it.
#[derive(Debug)]
pub struct Change {
    /// Relative to the root, without `.`, `..`, a leading or a trailing slash; never empty.
    pub path: PathBuf,
    /// What became of it.
    pub kind: ChangeKind,
}

/// What became of a path.
#[derive(Debug)]
pub enum ChangeKind {
    /// It is gone.
    Removed,
    /// It is there, new or modified.
    Entry(Entry),
}

/// A file of any type with its metadata.
#[derive(Debug)]
pub struct Entry {
    /// Owner, permissions, times, extended attributes.
    pub metadata: Metadata,
    /// Its type and content.
    pub data: Data,
}

/// What every type of file has.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Metadata {
    /// Permission bits with setuid, setgid and sticky: the lowest twelve.
    pub mode: u32,
    /// Owner, as seen inside the image.
    pub uid: u32,
    /// Group, as seen inside the image.
    pub gid: u32,
    /// Modification time.
    pub mtime: Time,
    /// Extended attributes that belong into a layer, by name.
    pub xattrs: BTreeMap<OsString, Vec<u8>>,
}

impl Metadata {
    /// User and group.
    pub fn owner(&self) -> Owner {
        Owner {
            uid: self.uid,
            gid: self.gid,
        }
    }
}

/// A time of a file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Time {
    /// Seconds since 1970 UTC.
    pub seconds: i64,
    /// Nanoseconds after that, below 10^9.
    pub nanoseconds: u32,
}

/// Type and content of a file.
pub enum Data {
    /// A regular file.
    File(FileContent),
    /// A directory. Where `opaque`, nothing of lower layers is in it.
    Directory {
        /// Whether it hides what lower layers have below it.
        opaque: bool,
    },
    /// A symbolic link and its target, verbatim.
    Symlink(OsString),
    /// Another name of the file at this path, which is an earlier change of the same
    /// list and anything but a directory: links and devices can have several names too.
    Hardlink(PathBuf),
    /// A character device.
    CharDevice {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// A block device.
    BlockDevice {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// A named pipe.
    Fifo,
}

impl Data {
    /// The type of the file; a hard link is a regular file.
    pub fn file_type(&self) -> FileType {
        match self {
            Self::File(_) | Self::Hardlink(_) => FileType::RegularFile,
            Self::Directory { .. } => FileType::Directory,
            Self::Symlink(_) => FileType::Symlink,
            Self::CharDevice { .. } => FileType::CharacterDevice,
            Self::BlockDevice { .. } => FileType::BlockDevice,
            Self::Fifo => FileType::Fifo,
        }
    }
}

/// Where a regular file's bytes are.
pub struct FileContent {
    /// The number of bytes that will be read; fewer or more is an error.
    pub size_bytes: u64,
    /// The bytes.
    pub source: FileSource,
}

/// Opens the content of a file, once, when its turn comes.
pub type OpenFile = Box<dyn FnOnce() -> io::Result<File> + Send>;

/// Opens the content of a file that is looked at while it is read, once, when its turn comes.
pub type OpenReader = Box<dyn FnOnce() -> io::Result<Box<dyn io::Read + Send>> + Send>;

/// Where bytes come from.
pub enum FileSource {
    /// From memory.
    Bytes(Arc<[u8]>),
    /// From a file that is opened when its turn comes.
    Open(OpenFile),
    /// From a reader that is made when its turn comes.
    Read(OpenReader),
}

impl FileSource {
    /// Opens it to be read from its beginning.
    ///
    /// # Errors
    /// Those of opening the file.
    pub fn reader(self) -> io::Result<Box<dyn io::Read + Send>> {
        Ok(match self {
            Self::Bytes(bytes) => Box::new(io::Cursor::new(bytes)),
            Self::Open(open) => Box::new(open()?),
            Self::Read(open) => open()?,
        })
    }
}

impl fmt::Debug for Data {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(content) => write!(f, "File({} bytes)", content.size_bytes),
            Self::Directory { opaque } => write!(f, "Directory {{ opaque: {opaque} }}"),
            Self::Symlink(target) => write!(f, "Symlink({})", target.display()),
            Self::Hardlink(path) => write!(f, "Hardlink({})", path.display()),
            Self::CharDevice { major, minor } => write!(f, "CharDevice({major}, {minor})"),
            Self::BlockDevice { major, minor } => write!(f, "BlockDevice({major}, {minor})"),
            Self::Fifo => f.write_str("Fifo"),
        }
    }
}

impl fmt::Debug for FileSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bytes(bytes) => write!(f, "Bytes({})", bytes.len()),
            Self::Open(_) => f.write_str("Open"),
            Self::Read(_) => f.write_str("Read"),
        }
    }
}

impl fmt::Debug for FileContent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "FileContent({} bytes)", self.size_bytes)
    }
}

/// The order of paths in a list of changes: component by component, by bytes.
pub fn order(a: &std::path::Path, b: &std::path::Path) -> std::cmp::Ordering {
    a.components().cmp(b.components())
}
