//! [`apply`]: one layer → a tree in overlay form. Input is hostile.

use std::fs::File;
use std::io::{self, BufRead, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FileType, Mode, OFlags};
use rustix::io::Errno;

use super::ahead::{ReadAhead, read_ahead};
use super::guard::guarded;
use super::list::Lister;
pub use super::metadata::SkippedXattr;
use super::metadata::{check_xattrs, set_by_name, set_on_fd, set_on_link};
use super::tree::{Place, Tree, normalise};
use super::whiteout::{self, Meaning};
use super::{EntryKind, LayerError, Limits, Segment, TarEntry, TarReader, decompress};
use crate::image::{DiffId, MediaType};
use crate::rootfs::Listing;

/// What came of applying a layer, beside the tree.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AppliedLayer {
    /// Bytes of the uncompressed tar.
    pub uncompressed_bytes: u64,
    /// Device nodes that are missing in the tree, because this process must not make any.
    pub skipped_devices: Vec<SkippedDevice>,
    /// Extended attributes that are missing in the tree, because the file system or the
    /// user namespace cannot hold them. Never `security.capability`.
    pub skipped_xattrs: Vec<SkippedXattr>,
    /// Directories that no entry of the layer names and that were made, 0755, root's, for
    /// what is in them. In an overlay they would wrongly replace the metadata of the same
    /// directories in lower layers. In path order, relative to the root.
    pub implied_directories: Vec<PathBuf>,
}

/// A device node that was not made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SkippedDevice {
    /// Where it would be, relative to the root.
    pub path: PathBuf,
    /// Whether it is a block device, and not a character device.
    pub is_block: bool,
    /// Major number.
    pub major: u32,
    /// Minor number.
    pub minor: u32,
}

/// Applies one layer alone, given as its compressed stream, to the empty directory `tree`.
///
/// Whiteouts become character devices 0/0, opaque whiteouts the attribute
/// `user.overlay.opaque=y`; what the layer has itself at such a path stays. Names are
/// resolved inside the tree: a leading `/` is dropped, `..` is refused, links in parents
/// are followed inside, a link at the end is replaced. Of several entries of one path, the
/// last counts. Metadata of the root itself is not applied; it becomes 0755. Where owners are
/// recorded beside `tree` ([`crate::owners`]), those of the layer are, and no file is given away.
///
/// `want` is verified over all uncompressed bytes, also those after the archive's end; the
/// stream is read to its end, so that a reader that verifies a digest there does. It is
/// read and hashed on threads of their own, which end before this returns.
///
/// On an error the tree is incomplete and the caller removes it. Blocking.
///
/// # Errors
/// [`LayerError::Read`] where the stream fails or is damaged; [`LayerError::Malformed`],
/// [`LayerError::Limit`], [`LayerError::Refused`], [`LayerError::ForbiddenXattr`] for bad
/// archives; [`LayerError::HardlinkOutsideLayer`]; [`LayerError::DiffId`];
/// [`LayerError::WhiteoutNotPermitted`], [`LayerError::Owner`], [`LayerError::Xattr`],
/// [`LayerError::Tree`] where the tree cannot hold what the layer has.
///
/// <https://github.com/opencontainers/image-spec/blob/main/layer.md#applying-changesets>
pub fn apply(
    compressed: impl Read + Send,
    media_type: &MediaType,
    want: &DiffId,
    tree: &Path,
    limits: &Limits,
) -> Result<AppliedLayer, LayerError> {
    apply_and(compressed, media_type, want, tree, limits, None)
}

/// [`apply`], and the layer's listing from the same bytes; absent where it would be too long.
///
/// # Errors
/// As [`apply`].
pub fn apply_and_list(
    compressed: impl Read + Send,
    media_type: &MediaType,
    want: &DiffId,
    tree: &Path,
    limits: &Limits,
) -> Result<(AppliedLayer, Option<Listing>), LayerError> {
    let mut lister = Some(Lister::new(limits.clone()));
    let applied = apply_and(
        compressed,
        media_type,
        want,
        tree,
        limits,
        Some(&mut lister),
    )?;
    Ok((applied, lister.map(Lister::finish)))
}

fn apply_and(
    compressed: impl Read + Send,
    media_type: &MediaType,
    want: &DiffId,
    tree: &Path,
    limits: &Limits,
    mut lister: Option<&mut Option<Lister>>,
) -> Result<AppliedLayer, LayerError> {
    let mut applier = Applier::new(tree, limits)?;
    let uncompressed_bytes = read_verified(compressed, media_type, want, limits, |tar| {
        while let Some(entry) = tar.next()? {
            applier.entry(&entry, tar)?;
            let Some(slot) = lister.as_deref_mut() else {
                continue;
            };
            let content = || applier.tree.content(&entry.name);
            let listed = slot.as_mut().map(|lister| lister.entry(&entry, content));
            if let Some(Err(error)) = listed {
                tracing::debug!(%error, "the layer is unpacked and not listed");
                *slot = None;
            }
        }
        Ok(())
    })?;
    applier.finish(uncompressed_bytes)
}

/// [`apply`] for the tar itself, which nobody needs to verify.
///
/// # Errors
/// As [`apply`], other than those of what is not looked at.
pub(super) fn apply_uncompressed(
    tar: impl BufRead,
    tree: &Path,
    limits: &Limits,
) -> Result<AppliedLayer, LayerError> {
    let mut applier = Applier::new(tree, limits)?;
    let mut tar = TarReader::new(tar, limits.clone());
    while let Some(entry) = tar.next()? {
        applier.entry(&entry, &mut tar)?;
    }
    let uncompressed_bytes = tar.offset();
    tar.finish()?;
    applier.finish(uncompressed_bytes)
}

/// Hands the archive in `compressed` to `read`, reads the rest, and verifies all. Returns the
/// number of uncompressed bytes.
///
/// # Errors
/// That of `read`; those of [`apply`] that are not about a tree.
pub(super) fn read_verified(
    compressed: impl Read + Send,
    media_type: &MediaType,
    want: &DiffId,
    limits: &Limits,
    read: impl FnOnce(&mut TarReader<ReadAhead>) -> Result<(), LayerError>,
) -> Result<u64, LayerError> {
    let guard = guarded(compressed, limits, |counted| {
        decompress(media_type, counted)
    })?;
    let (digest, uncompressed_bytes) = std::thread::scope(|scope| {
        let (input, threads) = read_ahead(scope, guard).map_err(LayerError::Read)?;
        let mut tar = TarReader::new(input, limits.clone());
        read(&mut tar)?;
        tar.finish()?;
        let (_, digest, bytes) = threads.join().map_err(LayerError::Read)?;
        Ok::<_, LayerError>((digest, bytes))
    })?;
    let got = DiffId::from_uncompressed(digest);
    if got != *want {
        return Err(LayerError::DiffId {
            got,
            want: want.clone(),
        });
    }
    Ok(uncompressed_bytes)
}

/// What an entry asks for. Paths are normalised and relative to the root.
pub(super) enum Action {
    /// Nothing: it is about the root itself, or AUFS's bookkeeping.
    Nothing,
    /// This directory hides what lower layers have in it.
    Opaque(PathBuf),
    /// What lower layers have at this path is gone.
    Whiteout(PathBuf),
    /// A file is made at this path, which is not that of the root.
    File(PathBuf),
}

/// Says what `entry` asks for, going by its name.
pub(super) fn action(entry: &TarEntry) -> Result<Action, LayerError> {
    let path = normalise(&entry.name)?;
    let Some(name) = path.file_name() else {
        return Ok(Action::Nothing);
    };
    let parent = path.parent().unwrap_or(Path::new(""));
    for component in parent.iter() {
        match whiteout::meaning(component) {
            Meaning::File => {}
            Meaning::Aufs => return Ok(Action::Nothing),
            _ => {
                return Err(refused(
                    entry,
                    "a directory cannot have the name of a whiteout",
                ));
            }
        }
    }
    Ok(match whiteout::meaning(name) {
        Meaning::File => Action::File(path),
        Meaning::Aufs => Action::Nothing,
        Meaning::Invalid => return Err(refused(entry, "it is a whiteout of nothing")),
        Meaning::Opaque => Action::Opaque(parent.to_owned()),
        Meaning::Whiteout(name) => Action::Whiteout(parent.join(name)),
    })
}

struct Applier<'t> {
    dir: &'t Path,
    tree: Tree,
    applied: AppliedLayer,
}

impl<'t> Applier<'t> {
    fn new(tree: &'t Path, limits: &Limits) -> Result<Self, LayerError> {
        Ok(Self {
            dir: tree,
            tree: Tree::open(tree, limits.clone())?,
            applied: AppliedLayer::default(),
        })
    }

    fn finish(self, uncompressed_bytes: u64) -> Result<AppliedLayer, LayerError> {
        let (implied_directories, skipped_xattrs) = self.tree.finish(self.dir)?;
        Ok(AppliedLayer {
            uncompressed_bytes,
            implied_directories,
            skipped_xattrs,
            ..self.applied
        })
    }

    fn entry<R: BufRead>(
        &mut self,
        entry: &TarEntry,
        tar: &mut TarReader<R>,
    ) -> Result<(), LayerError> {
        let path = match action(entry)? {
            Action::Nothing => return Ok(()),
            Action::Opaque(path) => return self.tree.make_opaque(&path),
            Action::Whiteout(path) => {
                let place = self.tree.place(&path)?;
                return self.tree.whiteout(&place);
            }
            Action::File(path) => path,
        };
        check_xattrs(&path, &entry.metadata)?;
        let place = self.tree.place(&path)?;
        match &entry.kind {
            EntryKind::File(segments) => self.file(&place, entry, segments.as_deref(), tar),
            EntryKind::Directory => self.tree.make_directory(&place, entry.metadata.clone()),
            EntryKind::Symlink(target) => {
                self.tree
                    .create(&place, |parent, name| {
                        rustix::fs::symlinkat(target, parent, name)
                    })?
                    .map_err(LayerError::tree("making the link", &path))?;
                self.metadata(&place, entry, true)
            }
            EntryKind::Hardlink(target) => self.hardlink(&place, entry, target),
            EntryKind::CharDevice { major, minor } => {
                self.device(&place, entry, FileType::CharacterDevice, (*major, *minor))
            }
            EntryKind::BlockDevice { major, minor } => {
                self.device(&place, entry, FileType::BlockDevice, (*major, *minor))
            }
            EntryKind::Fifo => self.device(&place, entry, FileType::Fifo, (0, 0)),
        }
    }

    fn file<R: BufRead>(
        &mut self,
        place: &Place,
        entry: &TarEntry,
        segments: Option<&[Segment]>,
        tar: &mut TarReader<R>,
    ) -> Result<(), LayerError> {
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::NOFOLLOW;
        let file = self
            .tree
            .create(place, |parent, name| {
                let mode = Mode::RUSR | Mode::WUSR;
                rustix::fs::openat(parent, name, flags | OFlags::CLOEXEC, mode)
            })?
            .map_err(LayerError::tree("creating", &entry.name))?;
        let file = File::from(file);
        write_content(tar, segments, entry.size_bytes, &file, &entry.name)?;
        let skipped = &mut self.tree.skipped_xattrs;
        let before = skipped.len();
        set_on_fd(
            file.as_fd(),
            &place.path(),
            &entry.metadata,
            false,
            skipped,
            self.tree.owners.as_mut(),
        )?;
        self.account_for_skipped(before)
    }

    fn hardlink(
        &mut self,
        place: &Place,
        entry: &TarEntry,
        target: &Path,
    ) -> Result<(), LayerError> {
        let outside = || LayerError::HardlinkOutsideLayer {
            path: place.path(),
            target: target.to_owned(),
        };
        let target_path = normalise(target)?;
        if target_path.as_os_str().is_empty() {
            return Err(refused(entry, "it is a hard link to the root"));
        }
        let target_place = self.tree.find(&target_path)?.ok_or_else(outside)?;
        if target_place.path() == place.path() {
            return Err(refused(entry, "it is a hard link to itself"));
        }
        self.tree
            .create(place, |parent, name| {
                // No flag to follow a link: its own inode is what is linked.
                rustix::fs::linkat(
                    target_place.parent(),
                    target_place.name(),
                    parent,
                    name,
                    AtFlags::empty(),
                )
            })?
            .map_err(LayerError::tree("making the hard link", &place.path()))?;
        let skipped = &mut self.tree.skipped_xattrs;
        let before = skipped.len();
        set_on_link(
            place.parent(),
            place.name(),
            &place.path(),
            &entry.metadata,
            skipped,
            self.tree.owners.as_mut(),
        )?;
        if let Some(owners) = &mut self.tree.owners {
            // It is the same file.
            owners.set_same(&target_place.path(), &place.path());
        }
        self.account_for_skipped(before)
    }

    fn device(
        &mut self,
        place: &Place,
        entry: &TarEntry,
        kind: FileType,
        (major, minor): (u32, u32),
    ) -> Result<(), LayerError> {
        let made = self.tree.create(place, |parent, name| {
            let device = rustix::fs::makedev(major, minor);
            rustix::fs::mknodat(parent, name, kind, Mode::RUSR | Mode::WUSR, device)
        })?;
        match made {
            Ok(()) => self.metadata(place, entry, false),
            // Nobody but the real root may make devices. An empty file in its place would
            // be worse than nothing: programs would write to it.
            Err(Errno::PERM) if kind != FileType::Fifo => {
                self.tree.remember(&place.path(), 0)?;
                self.applied.skipped_devices.push(SkippedDevice {
                    path: place.path(),
                    is_block: kind == FileType::BlockDevice,
                    major,
                    minor,
                });
                Ok(())
            }
            Err(error) => Err(LayerError::tree("making the device", &entry.name)(error)),
        }
    }

    fn metadata(
        &mut self,
        place: &Place,
        entry: &TarEntry,
        is_symlink: bool,
    ) -> Result<(), LayerError> {
        let skipped = &mut self.tree.skipped_xattrs;
        let before = skipped.len();
        set_by_name(
            place.parent(),
            place.name(),
            &place.path(),
            &entry.metadata,
            is_symlink,
            skipped,
            self.tree.owners.as_mut(),
        )?;
        self.account_for_skipped(before)
    }

    fn account_for_skipped(&mut self, before: usize) -> Result<(), LayerError> {
        for at in before..self.tree.skipped_xattrs.len() {
            let skipped = &self.tree.skipped_xattrs[at];
            let (path, bytes) = (skipped.path.clone(), skipped.name.len());
            self.tree.remember(&path, bytes)?;
        }
        Ok(())
    }
}

pub(super) fn refused(entry: &TarEntry, reason: &'static str) -> LayerError {
    LayerError::Refused {
        path: entry.name.clone(),
        reason,
    }
}

/// Writes the content of the current entry to the new `file`; holes stay holes. `path` is for messages.
pub(super) fn write_content<R: BufRead>(
    tar: &mut TarReader<R>,
    segments: Option<&[Segment]>,
    size_bytes: u64,
    mut file: &File,
    path: &Path,
) -> Result<(), LayerError> {
    let fail = |error: io::Error| LayerError::tree("writing", path)(error);
    match segments {
        None => copy(tar, |bytes| file.write_all(bytes).map_err(fail)),
        Some(segments) => {
            file.set_len(size_bytes).map_err(fail)?;
            scatter(tar, segments, |bytes, at| {
                file.write_all_at(bytes, at).map_err(fail)
            })
        }
    }
}

/// Hands the rest of the current entry's content to `write`.
fn copy<R: BufRead>(
    tar: &mut TarReader<R>,
    mut write: impl FnMut(&[u8]) -> Result<(), LayerError>,
) -> Result<(), LayerError> {
    loop {
        let chunk = tar.chunk()?;
        if chunk.is_empty() {
            return Ok(());
        }
        write(chunk)?;
        let length = chunk.len();
        tar.consume(length);
    }
}

/// Hands the content to `write` piece by piece with where it goes. The reader has checked
/// that the pieces are as long as the content.
fn scatter<R: BufRead>(
    tar: &mut TarReader<R>,
    segments: &[Segment],
    mut write: impl FnMut(&[u8], u64) -> Result<(), LayerError>,
) -> Result<(), LayerError> {
    for segment in segments {
        let mut done = 0;
        while done < segment.length {
            let chunk = tar.chunk()?;
            let left = usize::try_from(segment.length - done).unwrap_or(usize::MAX);
            let chunk = &chunk[..chunk.len().min(left)];
            write(chunk, segment.offset + done)?;
            let length = chunk.len();
            tar.consume(length);
            done += length as u64;
        }
    }
    Ok(())
}
