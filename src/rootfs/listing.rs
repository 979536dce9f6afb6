//! [`Listing`]: what one layer has, without the contents.
//!
//! Enough to answer what is where, of whom, and where links lead; a listing is a few
//! hundred kilobytes where the layer is a few hundred megabytes. It says exactly what the
//! [`Tree`](super::Tree) of the same layer would, except that a directory no entry names is
//! only marked as such: what the layers below say of it is not known where it is made.
//!
//! As bytes ([`Listing::to_bytes`]): a line with the version; the number of files; the
//! files, a directory before what is in it, each by its number where it is named; the
//! SHA-256 of all that. Numbers are LEB128, texts have their length in front.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;
use std::sync::Arc;

use rustix::fs::FileType;

use super::change::{Change, ChangeKind, Data, Entry, FileSource, Metadata, Time};
use super::stack::ROOT_MODE;
use super::tree::Attributes;
use crate::image::Digest;

/// The first line of a stored listing. Counts up when the bytes come to mean something else.
const VERSION: &[u8] = b"sockless listing 1\n";

/// Files that are read to look names up, and whose contents are therefore kept.
const KEPT: [[&str; 2]; 2] = [["etc", "passwd"], ["etc", "group"]];

/// The largest content that is kept, in bytes. Real ones have one or two kilobytes; whoever
/// has more is asked in the tree.
pub(crate) const KEPT_CONTENT_BYTES: u64 = 256 << 10;

/// The number of the root directory.
pub(crate) const ROOT: u32 = 0;

/// The files of one layer, without their contents.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listing {
    /// Those that were replaced stay, without a name.
    files: Vec<Listed>,
}

/// One file; hard links are several names of one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Listed {
    pub(crate) metadata: Metadata,
    pub(crate) kind: ListedKind,
    /// The number of its names.
    pub(crate) links: u32,
}

/// Type of a file, and what comes with it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum ListedKind {
    Directory(ListedDirectory),
    File {
        size_bytes: u64,
        /// Absent unless it is one of [`KEPT`].
        content: Option<Arc<[u8]>>,
    },
    Symlink(OsString),
    CharDevice(u32, u32),
    BlockDevice(u32, u32),
    Fifo,
    /// Nothing, which hides what lower layers have.
    Whiteout,
}

/// What a directory has.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct ListedDirectory {
    /// Numbers of files, by name.
    pub(crate) entries: BTreeMap<OsString, u32>,
    /// Whether it hides what lower layers have in it.
    pub(crate) opaque: bool,
    /// Whether the layer has files in it and says nothing of the directory itself.
    pub(crate) implied: bool,
}

impl Listed {
    /// A file with one name, with what of `metadata` a file of its kind can have.
    pub(crate) fn new(metadata: Metadata, kind: ListedKind) -> Self {
        let mut listed = Self {
            metadata,
            kind,
            links: 1,
        };
        listed.forget_impossible();
        listed
    }

    /// Linux has `user.` attributes for files and directories only; see xattr(7).
    fn forget_impossible(&mut self) {
        if !matches!(
            self.kind,
            ListedKind::File { .. } | ListedKind::Directory(_)
        ) {
            let is_user = |name: &OsStr| name.as_bytes().starts_with(b"user.");
            self.metadata.xattrs.retain(|name, _| !is_user(name));
        }
    }

    /// A directory that no entry names, of the owner and mode of its tree's.
    pub(crate) fn implied(opaque: bool) -> Self {
        let metadata = Metadata {
            mode: ROOT_MODE,
            ..Metadata::default()
        };
        let directory = ListedDirectory {
            opaque,
            implied: true,
            ..ListedDirectory::default()
        };
        Self::new(metadata, ListedKind::Directory(directory))
    }

    pub(crate) fn directory(&self) -> Option<&ListedDirectory> {
        match &self.kind {
            ListedKind::Directory(directory) => Some(directory),
            _ => None,
        }
    }

    pub(crate) fn directory_mut(&mut self) -> Option<&mut ListedDirectory> {
        match &mut self.kind {
            ListedKind::Directory(directory) => Some(directory),
            _ => None,
        }
    }

    pub(crate) fn is_whiteout(&self) -> bool {
        matches!(self.kind, ListedKind::Whiteout)
    }

    /// What `stat(2)` would say in the layer's tree.
    pub(super) fn attributes(&self, number: u32) -> Attributes {
        let (file_type, size, rdev) = match &self.kind {
            ListedKind::Directory(_) => (FileType::Directory, 0, 0),
            ListedKind::File { size_bytes, .. } => (FileType::RegularFile, *size_bytes, 0),
            ListedKind::Symlink(target) => (FileType::Symlink, target.len() as u64, 0),
            ListedKind::CharDevice(major, minor) => {
                let rdev = rustix::fs::makedev(*major, *minor);
                (FileType::CharacterDevice, 0, rdev)
            }
            ListedKind::BlockDevice(major, minor) => {
                let rdev = rustix::fs::makedev(*major, *minor);
                (FileType::BlockDevice, 0, rdev)
            }
            ListedKind::Fifo => (FileType::Fifo, 0, 0),
            ListedKind::Whiteout => (FileType::CharacterDevice, 0, 0),
        };
        Attributes {
            file_type,
            mode: self.metadata.mode,
            uid: self.metadata.uid,
            gid: self.metadata.gid,
            mtime: self.metadata.mtime,
            size,
            nlink: u64::from(self.links),
            rdev,
            // No device has this number.
            id: (u64::MAX, u64::from(number)),
        }
    }
}

impl Default for Listing {
    fn default() -> Self {
        let mut root = Listed::implied(false);
        if let Some(directory) = root.directory_mut() {
            directory.implied = false;
        }
        Self { files: vec![root] }
    }
}

impl Listing {
    /// The layer that `changes` become when they are written with times up to `epoch`, in
    /// seconds since 1970 UTC. `None` where only the layer's bytes can say it all: the
    /// content of an account file that is read when its turn comes.
    pub fn of_changes(changes: &[Change], epoch: Option<i64>) -> Option<Self> {
        let mut listing = Self::default();
        for Change { path, kind } in changes {
            let name = path.file_name()?;
            let parent = listing.directory(path.parent()?)?;
            let Entry { metadata, data } = match kind {
                ChangeKind::Entry(entry) => entry,
                ChangeKind::Removed => {
                    let whiteout = Listed::new(Metadata::default(), ListedKind::Whiteout);
                    listing.put(parent, name, whiteout);
                    continue;
                }
            };
            // What an archive says of times.
            let mtime = Time {
                seconds: epoch.map_or(metadata.mtime.seconds, |epoch| {
                    metadata.mtime.seconds.min(epoch)
                }),
                nanoseconds: 0,
            };
            let mut metadata = Metadata {
                mtime,
                ..metadata.clone()
            };
            let kind = match data {
                Data::File(content) => {
                    let kept = match &content.source {
                        _ if !listing.keeps_content(parent, name) => None,
                        _ if content.size_bytes > KEPT_CONTENT_BYTES => None,
                        FileSource::Bytes(bytes) => Some(Arc::clone(bytes)),
                        FileSource::Open(_) | FileSource::Read(_) => return None,
                    };
                    ListedKind::File {
                        size_bytes: content.size_bytes,
                        content: kept,
                    }
                }
                Data::Directory { opaque } => ListedKind::Directory(ListedDirectory {
                    opaque: *opaque,
                    ..ListedDirectory::default()
                }),
                Data::Symlink(target) => {
                    metadata.mode = 0o777;
                    ListedKind::Symlink(target.clone())
                }
                Data::Hardlink(first) => {
                    let number = listing.find(first)?;
                    listing.link(parent, name, number);
                    listing.set_metadata_of_link(number, metadata);
                    continue;
                }
                Data::CharDevice { major, minor } => ListedKind::CharDevice(*major, *minor),
                Data::BlockDevice { major, minor } => ListedKind::BlockDevice(*major, *minor),
                Data::Fifo => ListedKind::Fifo,
            };
            listing.put(parent, name, Listed::new(metadata, kind));
        }
        Some(listing)
    }

    /// The directory at `path`, made where it is missing; `None` where something else is.
    fn directory(&mut self, path: &Path) -> Option<u32> {
        let mut here = ROOT;
        for name in path {
            here = match self.child(here, name) {
                Some(number) => {
                    self.file(number).directory()?;
                    number
                }
                None => self.put(here, name, Listed::implied(false)),
            };
        }
        Some(here)
    }

    /// The file at `path`, a relative one without links.
    pub(crate) fn find(&self, path: &Path) -> Option<u32> {
        path.iter()
            .try_fold(ROOT, |here, name| self.child(here, name))
    }

    pub(crate) fn file(&self, number: u32) -> &Listed {
        &self.files[number as usize]
    }

    pub(crate) fn file_mut(&mut self, number: u32) -> &mut Listed {
        &mut self.files[number as usize]
    }

    /// What the directory `parent` has at `name`.
    pub(crate) fn child(&self, parent: u32, name: &OsStr) -> Option<u32> {
        let directory = self.file(parent).directory()?;
        directory.entries.get(name).copied()
    }

    /// Puts a new file into the directory `parent`, in the place of whatever is there.
    pub(crate) fn put(&mut self, parent: u32, name: &OsStr, file: Listed) -> u32 {
        self.remove(parent, name);
        let number = u32::try_from(self.files.len()).expect("limits allow fewer entries");
        self.files.push(file);
        if let Some(directory) = self.file_mut(parent).directory_mut() {
            directory.entries.insert(name.to_owned(), number);
        }
        number
    }

    /// Gives the file `number` another name.
    pub(crate) fn link(&mut self, parent: u32, name: &OsStr, number: u32) {
        self.remove(parent, name);
        self.file_mut(number).links += 1;
        if let Some(directory) = self.file_mut(parent).directory_mut() {
            directory.entries.insert(name.to_owned(), number);
        }
    }

    /// Gives a file that has several names the metadata that an entry for another one has,
    /// with what that does in a file system: attributes are added to those that are there,
    /// a link's mode stays, and a file that changes its owner loses its capabilities.
    pub(crate) fn set_metadata_of_link(&mut self, number: u32, mut metadata: Metadata) {
        let file = self.file_mut(number);
        let before = std::mem::take(&mut file.metadata);
        let same_owner = (before.uid, before.gid) == (metadata.uid, metadata.gid);
        let mut xattrs = before.xattrs;
        if !same_owner && matches!(file.kind, ListedKind::File { .. }) {
            xattrs.remove(OsStr::new("security.capability"));
        }
        xattrs.append(&mut metadata.xattrs);
        if matches!(file.kind, ListedKind::Symlink(_)) {
            metadata.mode = before.mode;
        }
        file.metadata = Metadata { xattrs, ..metadata };
        file.forget_impossible();
    }

    /// Takes away what the directory `parent` has at `name`, with everything in it.
    pub(crate) fn remove(&mut self, parent: u32, name: &OsStr) {
        let Some(directory) = self.file_mut(parent).directory_mut() else {
            return;
        };
        let mut gone: Vec<u32> = directory.entries.remove(name).into_iter().collect();
        while let Some(number) = gone.pop() {
            let file = self.file_mut(number);
            file.links = file.links.saturating_sub(1);
            if let Some(directory) = file.directory_mut() {
                gone.extend(std::mem::take(&mut directory.entries).into_values());
            }
        }
    }

    /// Whether the content of a file at this place is kept.
    pub(crate) fn keeps_content(&self, parent: u32, name: &OsStr) -> bool {
        let is_kept = |[directory, file]: &[&str; 2]| {
            name == *file && self.child(ROOT, OsStr::new(directory)) == Some(parent)
        };
        KEPT.iter().any(is_kept)
    }

    /// The listing as bytes.
    pub fn to_bytes(&self) -> Vec<u8> {
        // A directory's number is lower than those of the directories in it.
        let mut numbers: BTreeMap<u32, u64> = BTreeMap::from([(ROOT, 0)]);
        let mut order = vec![ROOT];
        let mut at = 0;
        while let Some(number) = order.get(at).copied() {
            at += 1;
            let entries = self.file(number).directory().map(|d| d.entries.values());
            for child in entries.into_iter().flatten() {
                let next = numbers.len() as u64;
                numbers.entry(*child).or_insert_with(|| {
                    order.push(*child);
                    next
                });
            }
        }
        let mut out = Writer(VERSION.to_vec());
        out.number(order.len() as u64);
        for number in order {
            out.file(self.file(number), &numbers);
        }
        let digest = Digest::of(&out.0);
        out.0.extend_from_slice(digest.hex().as_bytes());
        out.0
    }

    /// Reads what [`Listing::to_bytes`] wrote; `None` for anything else.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        const HEX_LENGTH: usize = 64;
        let (body, digest) = bytes.split_at_checked(bytes.len().checked_sub(HEX_LENGTH)?)?;
        if Digest::of(body).hex().as_bytes() != digest {
            return None;
        }
        let mut input = Reader(body.strip_prefix(VERSION)?);
        let count = u32::try_from(input.number()?).ok()?;
        let mut files = Vec::new();
        for _ in 0..count {
            files.push(input.file(count)?);
        }
        files.first()?.directory()?;
        let mut listing = Self { files };
        listing.count_links();
        (input.0.is_empty() && listing.is_a_tree()).then_some(listing)
    }

    /// Whether no directory is in itself.
    fn is_a_tree(&self) -> bool {
        self.files.iter().zip(0..).all(|(file, number)| {
            let entries = file.directory().map(|d| d.entries.values());
            let mut entries = entries.into_iter().flatten();
            entries.all(|child| *child > number || self.file(*child).directory().is_none())
        })
    }

    fn count_links(&mut self) {
        let mut links = vec![0_u32; self.files.len()];
        links[ROOT as usize] = 1;
        for file in &self.files {
            for number in file
                .directory()
                .into_iter()
                .flat_map(|d| d.entries.values())
            {
                links[*number as usize] += 1;
            }
        }
        for (file, links) in self.files.iter_mut().zip(links) {
            file.links = links;
        }
    }
}

/// The types of files in a stored listing.
mod tag {
    pub(super) const DIRECTORY: u8 = 0;
    pub(super) const FILE: u8 = 1;
    pub(super) const KEPT_FILE: u8 = 2;
    pub(super) const SYMLINK: u8 = 3;
    pub(super) const CHAR_DEVICE: u8 = 4;
    pub(super) const BLOCK_DEVICE: u8 = 5;
    pub(super) const FIFO: u8 = 6;
    pub(super) const WHITEOUT: u8 = 7;
}

struct Writer(Vec<u8>);

impl Writer {
    fn number(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push((value as u8) | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }

    fn text(&mut self, text: &[u8]) {
        self.number(text.len() as u64);
        self.0.extend_from_slice(text);
    }

    fn file(&mut self, file: &Listed, numbers: &BTreeMap<u32, u64>) {
        let tag = match &file.kind {
            ListedKind::Directory(_) => tag::DIRECTORY,
            ListedKind::File { content: None, .. } => tag::FILE,
            ListedKind::File { .. } => tag::KEPT_FILE,
            ListedKind::Symlink(_) => tag::SYMLINK,
            ListedKind::CharDevice(..) => tag::CHAR_DEVICE,
            ListedKind::BlockDevice(..) => tag::BLOCK_DEVICE,
            ListedKind::Fifo => tag::FIFO,
            ListedKind::Whiteout => tag::WHITEOUT,
        };
        self.0.push(tag);
        let Metadata {
            mode,
            uid,
            gid,
            mtime,
            xattrs,
        } = &file.metadata;
        for number in [*mode, *uid, *gid, mtime.nanoseconds] {
            self.number(u64::from(number));
        }
        // Times before 1970 are negative.
        self.number(((mtime.seconds << 1) ^ (mtime.seconds >> 63)).cast_unsigned());
        self.number(xattrs.len() as u64);
        for (name, value) in xattrs {
            self.text(name.as_bytes());
            self.text(value);
        }
        match &file.kind {
            ListedKind::Directory(directory) => {
                self.0
                    .push(u8::from(directory.opaque) | u8::from(directory.implied) << 1);
                self.number(directory.entries.len() as u64);
                for (name, number) in &directory.entries {
                    self.text(name.as_bytes());
                    self.number(numbers.get(number).copied().unwrap_or_default());
                }
            }
            ListedKind::File {
                size_bytes,
                content,
            } => {
                self.number(*size_bytes);
                if let Some(content) = content {
                    self.text(content);
                }
            }
            ListedKind::Symlink(target) => self.text(target.as_bytes()),
            ListedKind::CharDevice(major, minor) | ListedKind::BlockDevice(major, minor) => {
                self.number(u64::from(*major));
                self.number(u64::from(*minor));
            }
            ListedKind::Fifo | ListedKind::Whiteout => {}
        }
    }
}

struct Reader<'b>(&'b [u8]);

impl<'b> Reader<'b> {
    fn byte(&mut self) -> Option<u8> {
        let (byte, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*byte)
    }

    fn number(&mut self) -> Option<u64> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Some(value);
            }
        }
        None
    }

    fn small(&mut self) -> Option<u32> {
        u32::try_from(self.number()?).ok()
    }

    fn text(&mut self) -> Option<&'b [u8]> {
        let length = usize::try_from(self.number()?).ok()?;
        let (text, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        Some(text)
    }

    fn os_text(&mut self) -> Option<OsString> {
        Some(OsString::from_vec(self.text()?.to_vec()))
    }

    /// A file of a listing of `count`.
    fn file(&mut self, count: u32) -> Option<Listed> {
        let tag = self.byte()?;
        let (mode, uid, gid) = (self.small()?, self.small()?, self.small()?);
        let nanoseconds = self.small()?;
        let zigzag = self.number()?;
        let seconds = (zigzag >> 1).cast_signed() ^ -(zigzag & 1).cast_signed();
        let mut xattrs = BTreeMap::new();
        for _ in 0..self.number()? {
            let name = self.os_text()?;
            xattrs.insert(name, self.text()?.to_vec());
        }
        let kind = match tag {
            tag::DIRECTORY => {
                let flags = self.byte()?;
                let mut entries = BTreeMap::new();
                for _ in 0..self.number()? {
                    let name = self.os_text()?;
                    let child = self.small().filter(|child| *child < count)?;
                    entries.insert(name, child);
                }
                ListedKind::Directory(ListedDirectory {
                    entries,
                    opaque: flags & 1 != 0,
                    implied: flags & 2 != 0,
                })
            }
            tag::FILE => ListedKind::File {
                size_bytes: self.number()?,
                content: None,
            },
            tag::KEPT_FILE => ListedKind::File {
                size_bytes: self.number()?,
                content: Some(self.text()?.into()),
            },
            tag::SYMLINK => ListedKind::Symlink(self.os_text()?),
            tag::CHAR_DEVICE => ListedKind::CharDevice(self.small()?, self.small()?),
            tag::BLOCK_DEVICE => ListedKind::BlockDevice(self.small()?, self.small()?),
            tag::FIFO => ListedKind::Fifo,
            tag::WHITEOUT => ListedKind::Whiteout,
            _ => return None,
        };
        let mtime = Time {
            seconds,
            nanoseconds,
        };
        let metadata = Metadata {
            mode,
            uid,
            gid,
            mtime,
            xattrs,
        };
        Some(Listed::new(metadata, kind))
    }
}
