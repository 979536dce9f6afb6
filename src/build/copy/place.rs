//! Where the files of a COPY go: a selection → changes on top of a filesystem.

use std::ffi::OsStr;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::FileType;
use rustix::io::Errno;

use super::super::additions::{Addition, Additions, Content, NewDirectory, inline, own_time};
use super::super::below::Below;
use super::super::listing::{CopiedFile, Listing, read_ahead};
use super::super::unpack;
use super::select::{Item, ItemKind, Selected, Selection};
use super::{CopyError, SourceNode};
use crate::plan::mode::SymbolicMode;
use crate::plan::{Chmod, CopyDefinition};
use crate::rootfs::{Change, Metadata};

/// The mode of directories that are made on the way.
const DIRECTORY_MODE: u32 = 0o755;

/// Works out what `selection` adds on top of `below`.
///
/// `owner` is `--chown` in numbers; `epoch` dates directories that are made on the way;
/// `spool` is an empty directory that lives until the changes have been written.
pub(in super::super) fn place(
    selection: Selection,
    definition: &CopyDefinition,
    below: impl Into<Below>,
    owner: Option<(u32, u32)>,
    epoch: Option<i64>,
    spool: &Path,
) -> Result<Vec<Change>, CopyError> {
    let mode = match &definition.chmod {
        None => Mode::Kept,
        Some(Chmod::Mode(mode)) => Mode::Given(*mode),
        Some(Chmod::Symbolic(text)) => {
            Mode::Changed(SymbolicMode::parse(text).map_err(|_| CopyError::Mode(text.clone()))?)
        }
    };
    // Special bits are for what is copied.
    let directory_mode = match mode {
        Mode::Given(mode) => mode & 0o777,
        Mode::Kept | Mode::Changed(_) => DIRECTORY_MODE,
    };
    let new_directory = NewDirectory {
        owner: owner.unwrap_or_default(),
        mode: directory_mode,
        mtime: own_time(epoch),
    };
    let below = below.into();
    let mut placing = Placing {
        additions: Additions::new(&below, new_directory),
        new_directory,
        all: Applied { owner, mode },
        epoch,
        listing: Arc::clone(&selection.listing),
    };
    let destination = Path::new(&definition.destination);
    let is_directory = definition.destination.ends_with('/');
    for (index, item) in selection.items.into_iter().enumerate() {
        // What came before may have changed where links lead.
        let to = placing.resolve(destination)?;
        let Item { kind, .. } = item;
        match kind {
            ItemKind::Directory { root, entries, .. } => {
                match root {
                    Some(root) if !is_directory => placing.root(&to, &root)?,
                    _ => placing.make_directory(&to)?,
                }
                for entry in entries {
                    placing.entry(&to, index, entry)?;
                }
            }
            ItemKind::File { name, node, number } => {
                let path = placing.target(&to, is_directory, &name)?;
                placing.file(&path, index, &node, number)?;
            }
            ItemKind::Archive { node, number } => {
                let unpacked = Unpacked {
                    owner,
                    index,
                    spool,
                };
                placing.archive(&to, &node, number, &unpacked)?;
            }
            ItemKind::Inline { name, content } => {
                let path = placing.target(&to, is_directory, OsStr::new(&name))?;
                placing.inline(&path, &content)?;
            }
        }
    }
    let mut changes = placing.additions.into_changes();
    read_ahead(&mut changes);
    Ok(changes)
}

struct Placing<'s> {
    additions: Additions<'s>,
    /// What is made where nothing is copied.
    new_directory: NewDirectory,
    all: Applied,
    epoch: Option<i64>,
    /// What is read.
    listing: Arc<Listing>,
}

/// What is made of the metadata of everything that is copied.
struct Applied {
    /// The owner; absent: each file's own.
    owner: Option<(u32, u32)>,
    /// The mode of everything but links.
    mode: Mode,
}

enum Mode {
    /// Each file's own.
    Kept,
    /// The same for all.
    Given(u32),
    /// Made of each file's own.
    Changed(SymbolicMode),
}

/// How an archive is unpacked.
struct Unpacked<'p> {
    owner: Option<(u32, u32)>,
    index: usize,
    spool: &'p Path,
}

impl Applied {
    /// The metadata that `node` has as a copy.
    fn metadata(&self, node: &SourceNode) -> Metadata {
        let mut metadata = node.metadata.clone();
        if node.file_type != FileType::Symlink {
            let is_directory = node.file_type == FileType::Directory;
            metadata.mode = self.mode.of(metadata.mode, is_directory);
        }
        if let Some((uid, gid)) = self.owner {
            (metadata.uid, metadata.gid) = (uid, gid);
        }
        metadata
    }
}

impl Mode {
    fn of(&self, mode: u32, is_directory: bool) -> u32 {
        match self {
            Self::Kept => mode,
            Self::Given(given) => *given,
            Self::Changed(changes) => changes.apply(mode, is_directory),
        }
    }
}

impl Placing<'_> {
    fn resolve(&self, path: &Path) -> Result<PathBuf, CopyError> {
        self.additions
            .resolve(path)
            .map_err(|error| place_error("anything", path, &error))
    }

    /// What is at `path`.
    fn found(&self, path: &Path) -> Result<Option<FileType>, CopyError> {
        self.additions
            .file_type(path)
            .map_err(|error| place_error("a file", path, &error))
    }

    /// Where one file goes: into the destination where that is a directory, else onto it.
    fn target(
        &self,
        destination: &Path,
        is_directory: bool,
        name: &OsStr,
    ) -> Result<PathBuf, CopyError> {
        let into = is_directory || self.found(destination)? == Some(FileType::Directory);
        Ok(if into {
            destination.join(name)
        } else {
            destination.to_owned()
        })
    }

    fn make_directory(&mut self, path: &Path) -> Result<(), CopyError> {
        if path.as_os_str().is_empty() {
            return Ok(());
        }
        self.additions
            .make_directory(path)
            .map_err(|error| place_error("a directory", path, &error))
    }

    fn add(
        &mut self,
        what: &'static str,
        path: &Path,
        addition: Addition,
    ) -> Result<(), CopyError> {
        self.additions
            .add(path, addition)
            .map_err(|error| place_error(what, path, &error))
    }

    fn inline(&mut self, path: &Path, content: &str) -> Result<(), CopyError> {
        let (uid, gid) = self.all.owner.unwrap_or_default();
        let metadata = Metadata {
            mode: self.all.mode.of(0o644, false),
            uid,
            gid,
            mtime: own_time(self.epoch),
            ..Metadata::default()
        };
        let addition = Addition {
            metadata,
            content: inline(content),
            identity: None,
        };
        self.add("a file", path, addition)
    }

    /// A directory that becomes the destination itself, unless one is there.
    fn root(&mut self, path: &Path, node: &SourceNode) -> Result<(), CopyError> {
        if self.found(path)?.is_some() {
            return self.make_directory(path);
        }
        self.directory(path, node)
    }

    /// A file in a copied directory.
    fn entry(&mut self, destination: &Path, item: usize, entry: Selected) -> Result<(), CopyError> {
        let path = destination.join(&entry.path);
        if entry.node.file_type != FileType::Directory {
            return self.file(&path, item, &entry.node, entry.number);
        }
        if !entry.is_parent {
            return self.directory(&path, &entry.node);
        }
        // One that is there takes the mode of the source's and keeps the rest.
        match self.existing(&path)? {
            None => self.directory(&path, &entry.node),
            Some(existing) => {
                let metadata = Metadata {
                    mode: entry.node.metadata.mode,
                    ..existing
                };
                self.add("a directory", &path, directory(metadata))
            }
        }
    }

    /// A directory with the metadata of the source's; attributes are added to those of one
    /// that is there.
    fn directory(&mut self, path: &Path, node: &SourceNode) -> Result<(), CopyError> {
        let mut metadata = self.all.metadata(node);
        if let Some(existing) = self.existing(path)? {
            let added = std::mem::replace(&mut metadata.xattrs, existing.xattrs);
            metadata.xattrs.extend(added);
        }
        self.add("a directory", path, directory(metadata))
    }

    /// The metadata of the directory at `path`, if there is one.
    fn existing(&self, path: &Path) -> Result<Option<Metadata>, CopyError> {
        self.additions
            .directory_metadata(path)
            .map_err(|error| place_error("a directory", path, &error))
    }

    /// Opens a regular file to be copied.
    fn opener(
        &self,
        number: Option<usize>,
    ) -> impl Fn() -> io::Result<CopiedFile> + Send + Sync + use<> {
        let listing = Arc::clone(&self.listing);
        move || listing.open(number.ok_or(io::ErrorKind::NotFound)?)
    }

    /// Anything that is no directory; `number` says which file of the listing it is.
    fn file(
        &mut self,
        path: &Path,
        item: usize,
        node: &SourceNode,
        number: Option<usize>,
    ) -> Result<(), CopyError> {
        let (major, minor) = node.device;
        let (content, what) = match node.file_type {
            FileType::RegularFile => {
                let open = self.opener(number);
                let content = Content::Read {
                    size_bytes: node.size_bytes,
                    open: Arc::new(move || Ok(Box::new(open()?))),
                };
                (content, "a file")
            }
            // A socket is of no use to anybody but the process that made it; its name stays.
            FileType::Socket => (inline(""), "a file"),
            FileType::Symlink => {
                let target = node.target.clone().unwrap_or_default();
                (Content::Symlink(target), "a link")
            }
            FileType::Fifo => (Content::Fifo, "a pipe"),
            FileType::CharacterDevice => (Content::CharDevice(major, minor), "a device"),
            FileType::BlockDevice => (Content::BlockDevice(major, minor), "a device"),
            FileType::Directory | FileType::Unknown => {
                return Err(CopyError::Type(node.path.clone()));
            }
        };
        let is_linked = node.file_type == FileType::RegularFile && node.links > 1;
        let addition = Addition {
            metadata: self.all.metadata(node),
            content,
            identity: is_linked.then_some((item, node.identity.0, node.identity.1)),
        };
        self.add(what, path, addition)
    }

    /// The entries of an archive. Their modes are their own, and so is that of a destination
    /// that is made for them.
    fn archive(
        &mut self,
        path: &Path,
        node: &SourceNode,
        number: Option<usize>,
        unpacked: &Unpacked<'_>,
    ) -> Result<(), CopyError> {
        self.additions.set_new_directory(NewDirectory {
            mode: DIRECTORY_MODE,
            ..self.new_directory
        });
        self.make_directory(path)?;
        // The directories that an archive lacks belong to nobody in particular.
        self.additions.set_new_directory(NewDirectory {
            mode: DIRECTORY_MODE,
            owner: (0, 0),
            ..self.new_directory
        });
        let archive = self.listing.open_whole(number, node)?;
        let Unpacked {
            owner,
            index,
            spool,
        } = *unpacked;
        let result = unpack::unpack(archive, path, owner, index, spool, &mut self.additions);
        self.additions.set_new_directory(self.new_directory);
        result.map_err(|source| CopyError::Unpack {
            path: node.path.clone(),
            source,
        })
    }
}

fn directory(metadata: Metadata) -> Addition {
    Addition {
        metadata,
        content: Content::Directory,
        identity: None,
    }
}

fn place_error(what: &'static str, path: &Path, error: &io::Error) -> CopyError {
    let reason = match error.raw_os_error().map(Errno::from_raw_os_error) {
        Some(Errno::ISDIR) => "a directory is there".to_owned(),
        Some(Errno::NOTDIR) => "it, or a parent of it, is there and not a directory".to_owned(),
        _ => error.to_string(),
    };
    CopyError::Place {
        what,
        path: Path::new("/").join(path),
        reason,
    }
}
