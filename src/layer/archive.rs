//! Archives that are no layers: what `ADD` unpacks, and build contexts.
//!
//! What is an archive is told by content, as in Docker: a tar, plain or compressed with
//! gzip, bzip2, xz or zstd. A compressed file that is no tar is none.
//!
//! [`extract`] makes a directory of one. Unlike a layer it has no whiteouts, its owners are
//! reported and not set, because the user who builds may not give files away, and so are
//! its extended attributes.

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, BufReader, Read};
use std::os::fd::AsFd as _;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{AtFlags, FileType, Mode, OFlags};
use rustix::io::Errno;

use super::apply::{SkippedDevice, write_content};
use super::guard::guarded;
use super::metadata::{set_by_name, set_on_fd};
use super::read::{EntryKind, TarEntry, TarReader};
use super::tree::{Place, Tree};
use super::{LayerError, Limits};
use crate::image::MediaType;
use crate::rootfs::Metadata;

/// The first block of a tar, which is its first header.
const HEADER_BYTES: usize = 512;

/// The most memory that an xz archive may take to decompress, in bytes: `xz -9` takes
/// 65 MiB; a hostile header could ask for 4 GiB.
const XZ_MEMORY_BYTES: u64 = 96 << 20;

/// Whether `file` is a tar, plain or compressed, which ADD unpacks.
///
/// # Errors
/// Those of reading the first bytes.
pub fn is_archive(file: impl Read + Send + 'static) -> io::Result<bool> {
    let mut first = Vec::new();
    // What cannot be decompressed is a file that happens to begin like an archive; one that
    // breaks off later has a header, and its error comes when it is unpacked.
    let Ok(decompressed) = decompress(file, &Limits::default()) else {
        return Ok(false);
    };
    let read = decompressed
        .take(HEADER_BYTES as u64)
        .read_to_end(&mut first);
    Ok(read.is_ok() && is_header(&first))
}

/// Whether what begins with `first`, at least 512 bytes where there are as many, is meant to
/// be an archive: its first block is a tar header, or it is compressed.
pub fn looks_like_archive(first: &[u8]) -> bool {
    const COMPRESSED: [&[u8]; 4] = [b"BZh", b"\x1f\x8b\x08", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd"];
    COMPRESSED.iter().any(|magic| first.starts_with(magic))
        || first.get(..HEADER_BYTES).is_some_and(is_header)
}

/// The bytes of `file`, decompressed if it is gzip, bzip2, xz or zstd. Reading fails where they
/// are too many, in all or for each compressed one.
///
/// # Errors
/// [`LayerError::Read`]; damage shows later, while reading.
pub fn decompress(
    file: impl Read + Send + 'static,
    limits: &Limits,
) -> Result<Box<dyn Read + Send>, LayerError> {
    Ok(Box::new(guarded(file, limits, decompress_all)?))
}

/// As [`decompress`], however many bytes it is.
fn decompress_all(
    mut file: impl Read + Send + 'static,
) -> Result<Box<dyn Read + Send>, LayerError> {
    let mut magic = Vec::new();
    (&mut file)
        .take(6)
        .read_to_end(&mut magic)
        .map_err(LayerError::Read)?;
    let is_bzip2 = magic.starts_with(b"BZh");
    let is_xz = magic == [0xfd, b'7', b'z', b'X', b'Z', 0];
    let whole = io::Cursor::new(magic).chain(file);
    Ok(if is_bzip2 {
        Box::new(bzip2::read::MultiBzDecoder::new(whole))
    } else if is_xz {
        let stream = liblzma::stream::Stream::new_stream_decoder(
            XZ_MEMORY_BYTES,
            liblzma::stream::CONCATENATED,
        );
        let stream = stream.map_err(|error| LayerError::Read(error.into()))?;
        Box::new(liblzma::read::XzDecoder::new_stream(whole, stream))
    } else {
        Box::new(super::decompress(&MediaType::LAYER_TAR, whole)?)
    })
}

/// Whether a block is a tar header: its checksum is right, which a block of zeros has none of.
/// Not all tars have a magic, and extended headers need no name.
fn is_header(block: &[u8]) -> bool {
    if block.len() != HEADER_BYTES {
        return false;
    }
    let digits = block[148..156]
        .split(|b| *b == 0 || *b == b' ')
        .find(|digits| !digits.is_empty());
    let stored =
        digits.and_then(|digits| u32::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
    let sum = block.iter().enumerate().map(|(at, byte)| match at {
        148..156 => u32::from(b' '),
        _ => u32::from(*byte),
    });
    stored == Some(sum.sum())
}

/// What [`extract`] made, and what of the archive the files themselves do not have.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Extracted {
    /// By device and inode: what owner and which attributes a file has in the archive. What
    /// is not listed belongs to 0:0 and has none.
    pub owners: HashMap<(u64, u64), Owner>,
    /// Devices that this process may not make.
    pub skipped_devices: Vec<SkippedDevice>,
    /// The latest time of a regular file, in seconds since 1970 UTC.
    pub latest: Option<i64>,
}

/// To whom a file belongs, and its extended attributes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Owner {
    /// The user.
    pub uid: u32,
    /// The group.
    pub gid: u32,
    /// Names and values.
    pub xattrs: BTreeMap<OsString, Vec<u8>>,
}

/// Unpacks `archive`, plain or compressed, into the empty directory `directory`.
///
/// Names are resolved inside: leading slashes are passed over, and links on the way lead
/// nowhere else. Modes, times to the nanosecond, links and hard links are those of the
/// archive. On an error the directory is incomplete and the caller removes it. Blocking.
///
/// # Errors
/// [`LayerError::Read`], [`LayerError::Malformed`], [`LayerError::Limit`] for bad archives;
/// [`LayerError::Refused`] for an entry that would be outside; [`LayerError::Tree`] where
/// the file system cannot hold what the archive has.
pub fn extract(
    archive: impl Read + Send + 'static,
    directory: &Path,
    limits: &Limits,
) -> Result<Extracted, LayerError> {
    let mut tar = TarReader::new(BufReader::new(decompress(archive, limits)?), limits.clone());
    let (uid, gid) = ours();
    let mut tree = Tree::open(directory, limits.clone())?;
    tree.owner_of_implied = (uid, gid);
    let mut extractor = Extractor {
        tree,
        extracted: Extracted::default(),
    };
    while let Some(entry) = tar.next()? {
        extractor.entry(entry, &mut tar)?;
    }
    tar.finish()?;
    extractor.finish(directory)
}

/// The owner of what is extracted: what is ours already needs no permission to be made ours.
fn ours() -> (u32, u32) {
    let (uid, gid) = (rustix::process::geteuid(), rustix::process::getegid());
    (uid.as_raw(), gid.as_raw())
}

/// The latest time of a regular file in `archive`, plain or compressed, in seconds since
/// 1970 UTC. Blocking.
///
/// # Errors
/// As [`extract`], but for what has to do with a directory.
pub fn newest(
    archive: impl Read + Send + 'static,
    limits: &Limits,
) -> Result<Option<i64>, LayerError> {
    let mut tar = TarReader::new(BufReader::new(decompress(archive, limits)?), limits.clone());
    let mut newest = None;
    while let Some(entry) = tar.next()? {
        if matches!(entry.kind, EntryKind::File(_)) {
            newest = newest.max(Some(entry.metadata.mtime.seconds));
        }
    }
    Ok(newest)
}

struct Extractor {
    tree: Tree,
    extracted: Extracted,
}

impl Extractor {
    fn entry<R: io::BufRead>(
        &mut self,
        mut entry: TarEntry,
        tar: &mut TarReader<R>,
    ) -> Result<(), LayerError> {
        let path = inside(&entry.name, &entry.name)?;
        if path.as_os_str().is_empty() {
            // The root: its metadata is nobody's.
            return Ok(());
        }
        let metadata = &mut entry.metadata;
        let owner = Owner {
            uid: metadata.uid,
            gid: metadata.gid,
            xattrs: std::mem::take(&mut metadata.xattrs),
        };
        (metadata.uid, metadata.gid) = ours();
        let place = self.tree.place(&path)?;
        match &entry.kind {
            EntryKind::File(segments) => {
                let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::NOFOLLOW;
                let file = self
                    .tree
                    .create(&place, |parent, name| {
                        let mode = Mode::RUSR | Mode::WUSR;
                        rustix::fs::openat(parent, name, flags | OFlags::CLOEXEC, mode)
                    })?
                    .map_err(LayerError::tree("creating", &path))?;
                let file = File::from(file);
                write_content(tar, segments.as_deref(), entry.size_bytes, &file, &path)?;
                set_on_fd(
                    file.as_fd(),
                    &path,
                    &entry.metadata,
                    false,
                    &mut Vec::new(),
                    None,
                )?;
                let time = entry.metadata.mtime.seconds;
                self.extracted.latest = self.extracted.latest.max(Some(time));
            }
            EntryKind::Directory => {
                self.tree.make_directory(&place, entry.metadata.clone())?;
                self.tree.make_transparent(&place);
            }
            EntryKind::Symlink(target) => {
                self.tree
                    .create(&place, |parent, name| {
                        rustix::fs::symlinkat(target, parent, name)
                    })?
                    .map_err(LayerError::tree("making the link", &path))?;
                set(&place, &path, &entry.metadata, true)?;
            }
            EntryKind::Hardlink(target) => self.hardlink(&place, &entry, target)?,
            EntryKind::CharDevice { major, minor } => {
                let device = (FileType::CharacterDevice, *major, *minor);
                if !self.device(&place, &path, &entry.metadata, device)? {
                    return Ok(());
                }
            }
            EntryKind::BlockDevice { major, minor } => {
                let device = (FileType::BlockDevice, *major, *minor);
                if !self.device(&place, &path, &entry.metadata, device)? {
                    return Ok(());
                }
            }
            EntryKind::Fifo => {
                self.device(&place, &path, &entry.metadata, (FileType::Fifo, 0, 0))?;
            }
        }
        self.record(&place, owner)
    }

    fn hardlink(
        &mut self,
        place: &Place,
        entry: &TarEntry,
        target: &Path,
    ) -> Result<(), LayerError> {
        let refused = |reason| LayerError::Refused {
            path: entry.name.clone(),
            reason,
        };
        let target = inside(target, &entry.name)?;
        let absent = || refused("it is a hard link to what is not in the archive before it");
        if target.as_os_str().is_empty() {
            return Err(absent());
        }
        let target = self.tree.find(&target)?.ok_or_else(absent)?;
        if target.path() == place.path() {
            return Err(refused("it is a hard link to itself"));
        }
        let flags = AtFlags::SYMLINK_NOFOLLOW;
        let stat = rustix::fs::statat(target.parent(), target.name(), flags)
            .map_err(LayerError::tree("looking up", &target.path()))?;
        if FileType::from_raw_mode(stat.st_mode).is_dir() {
            return Err(refused("it is a hard link to a directory"));
        }
        self.tree
            .create(place, |parent, name| {
                let (at, of) = (target.parent(), target.name());
                rustix::fs::linkat(at, of, parent, name, AtFlags::empty())
            })?
            .map_err(LayerError::tree("making the hard link", &place.path()))?;
        let is_symlink = FileType::from_raw_mode(stat.st_mode).is_symlink();
        set(place, &place.path(), &entry.metadata, is_symlink)
    }

    /// Makes a device or pipe; says whether it was made.
    fn device(
        &mut self,
        place: &Place,
        path: &Path,
        metadata: &Metadata,
        (kind, major, minor): (FileType, u32, u32),
    ) -> Result<bool, LayerError> {
        let made = self.tree.create(place, |parent, name| {
            let device = rustix::fs::makedev(major, minor);
            rustix::fs::mknodat(parent, name, kind, Mode::RUSR | Mode::WUSR, device)
        })?;
        match made {
            Ok(()) => set(place, path, metadata, false).map(|()| true),
            Err(Errno::PERM) if kind != FileType::Fifo => {
                self.tree.remember(path, 0)?;
                self.extracted.skipped_devices.push(SkippedDevice {
                    path: path.to_owned(),
                    is_block: kind == FileType::BlockDevice,
                    major,
                    minor,
                });
                Ok(false)
            }
            Err(error) => Err(LayerError::tree("making the device", path)(error)),
        }
    }

    /// Remembers to whom the file at `place` belongs; also that it is nobody's in
    /// particular, because the inode may have been another file's before.
    fn record(&mut self, place: &Place, owner: Owner) -> Result<(), LayerError> {
        let flags = AtFlags::SYMLINK_NOFOLLOW;
        let stat = rustix::fs::statat(place.parent(), place.name(), flags)
            .map_err(LayerError::tree("looking up", &place.path()))?;
        let inode = (stat.st_dev, stat.st_ino);
        if owner == Owner::default() {
            self.extracted.owners.remove(&inode);
            return Ok(());
        }
        let xattrs = owner.xattrs.iter();
        let bytes: usize = xattrs.map(|(name, value)| name.len() + value.len()).sum();
        if bytes > 0 {
            self.tree.remember(&place.path(), bytes)?;
        }
        self.extracted.owners.insert(inode, owner);
        Ok(())
    }

    fn finish(self, directory: &Path) -> Result<Extracted, LayerError> {
        let mut extracted = self.extracted;
        let (implied, _) = self.tree.finish(directory)?;
        // Directories that no entry names belong to nobody, whatever had their inode before.
        for path in implied {
            let whole = directory.join(&path);
            let stat = rustix::fs::lstat(&whole).map_err(LayerError::tree("looking up", &path))?;
            extracted.owners.remove(&(stat.st_dev, stat.st_ino));
        }
        Ok(extracted)
    }
}

fn set(
    place: &Place,
    path: &Path,
    metadata: &Metadata,
    is_symlink: bool,
) -> Result<(), LayerError> {
    let (parent, name) = (place.parent(), place.name());
    set_by_name(
        parent,
        name,
        path,
        metadata,
        is_symlink,
        &mut Vec::new(),
        None,
    )
}

/// `name` as a path below the root, `..` resolved by text as other tools do; `entry` is for messages.
fn inside(name: &Path, entry: &Path) -> Result<PathBuf, LayerError> {
    let mut path = PathBuf::new();
    for component in name.components() {
        match component {
            Component::Normal(part) => path.push(part),
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
            Component::ParentDir => {
                if !path.pop() {
                    return Err(LayerError::Refused {
                        path: entry.to_owned(),
                        reason: "its path leads out of the archive",
                    });
                }
            }
        }
    }
    Ok(path)
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::super::header::{GID, LINK, MODE, UID};
    use super::super::testing::Archive;
    use super::*;

    fn tar_of(name: &str) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_ustar();
        header.set_size(1);
        header.set_cksum();
        builder.append_data(&mut header, name, &b"x"[..]).unwrap();
        builder.into_inner().unwrap()
    }

    #[test]
    fn archives_are_told_by_content() {
        let gzip = |bytes: &[u8]| {
            let mut encoder =
                flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            encoder.write_all(bytes).unwrap();
            encoder.finish().unwrap()
        };
        let bzip2 = |bytes: &[u8]| {
            let level = bzip2::Compression::fast();
            let mut encoder = bzip2::write::BzEncoder::new(Vec::new(), level);
            encoder.write_all(bytes).unwrap();
            encoder.finish().unwrap()
        };
        let xz = |bytes: &[u8]| {
            let mut encoder = liblzma::write::XzEncoder::new(Vec::new(), 1);
            encoder.write_all(bytes).unwrap();
            encoder.finish().unwrap()
        };
        let tar = tar_of("a");
        for (bytes, expected) in [
            (tar.clone(), true),
            (gzip(&tar), true),
            (bzip2(&tar), true),
            (xz(&tar), true),
            (zstd::encode_all(&tar[..], 1).unwrap(), true),
            (gzip(b"not a tar"), false),
            (xz(b"not a tar"), false),
            (gzip(&tar)[..20].to_vec(), false),
            (b"BZh9".to_vec(), false),
            (b"text".to_vec(), false),
            (vec![0; 1024], false),
            (Vec::new(), false),
        ] {
            assert_eq!(
                is_archive(io::Cursor::new(bytes.clone())).unwrap(),
                expected,
                "{bytes:02x?}"
            );
        }
    }

    /// Unpacks `archive` into a new directory beside a canary.
    fn unpack(archive: Vec<u8>) -> (tempfile::TempDir, Result<Extracted, LayerError>) {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("canary"), "alive").unwrap();
        let inside = dir.path().join("in");
        std::fs::create_dir(&inside).unwrap();
        let result = extract(io::Cursor::new(archive), &inside, &Limits::default());
        let canary = std::fs::read_to_string(dir.path().join("canary")).unwrap();
        assert_eq!(canary, "alive");
        let names = std::fs::read_dir(dir.path()).unwrap().count();
        assert_eq!(names, 2, "something is outside");
        (dir, result)
    }

    #[track_caller]
    fn check_refused(archive: Archive, expected: &str) {
        let error = unpack(archive.end()).1.unwrap_err();
        assert_eq!(format!("{:#}", anyhow::Error::new(error)), expected);
    }

    #[test]
    fn security_s01_nothing_leads_out() {
        let leads_out = |name: &str| {
            format!("refusing entry {name:?} of the archive: its path leads out of the archive")
        };
        check_refused(
            Archive::default().file("../canary", b"dead"),
            &leads_out("../canary"),
        );
        check_refused(
            Archive::default().file("a/../../canary", b"dead"),
            &leads_out("a/../../canary"),
        );
        check_refused(
            Archive::default().hardlink("h", "../canary"),
            &leads_out("h"),
        );
        let not_there = "refusing entry \"h\" of the archive: it is a hard link to what is not in \
                         the archive before it";
        check_refused(Archive::default().hardlink("h", "canary"), not_there);
        check_refused(Archive::default().hardlink("h", "/"), not_there);
        check_refused(
            Archive::default().directory("d").hardlink("h", "d"),
            "refusing entry \"h\" of the archive: it is a hard link to a directory",
        );
        check_refused(
            Archive::default().file("h", b"").hardlink("h", "./h"),
            "refusing entry \"h\" of the archive: it is a hard link to itself",
        );

        // Links on the way end at the root of the archive.
        for target in ["..", "/", "../../.."] {
            let archive = Archive::default()
                .symlink("out", target)
                .file("out/canary", b"inside");
            let (dir, result) = unpack(archive.end());
            result.unwrap();
            let read = std::fs::read_to_string(dir.path().join("in/canary"));
            assert_eq!(read.unwrap(), "inside", "{target}");
        }
        // A file in the place of a link does not go through it.
        let archive = Archive::default()
            .symlink("a", "../canary")
            .file("a", b"a file");
        let (dir, result) = unpack(archive.end());
        result.unwrap();
        let read = std::fs::read_to_string(dir.path().join("in/a"));
        assert_eq!(read.unwrap(), "a file");
        // Absolute names are below the root; `..` that stays inside is nothing special.
        let archive = Archive::default()
            .file("/abs/f", b"1")
            .file("x/../abs/./g", b"2");
        let (dir, result) = unpack(archive.end());
        result.unwrap();
        let read = |name: &str| std::fs::read(dir.path().join("in/abs").join(name)).unwrap();
        assert_eq!((read("f"), read("g")), (b"1".to_vec(), b"2".to_vec()));
    }

    #[test]
    fn owners_are_reported_and_whiteouts_are_files() {
        let archive = Archive::default()
            .raw(b'0', "f", b"f", |header| {
                header.set_number(UID, 1000);
                header.set_number(GID, 2000);
            })
            .raw(b'1', "h", b"", |header| {
                header.set_text(LINK, b"f");
                header.set_number(UID, 7);
                header.set_number(GID, 8);
            })
            .directory("d")
            .file("d/.wh.x", b"")
            .file("d/.wh..wh..opq", b"")
            .file("implied/g", b"");
        let (dir, result) = unpack(archive.end());
        let extracted = result.unwrap();
        let owner = |name: &str| {
            let stat = rustix::fs::lstat(dir.path().join("in").join(name)).unwrap();
            let owner = extracted.owners.get(&(stat.st_dev, stat.st_ino));
            owner.map_or((0, 0), |owner| (owner.uid, owner.gid))
        };
        // One file has one owner, the last that was named.
        assert_eq!([owner("f"), owner("h")], [(7, 8), (7, 8)]);
        assert_eq!(
            [owner("d"), owner("implied"), owner("implied/g")],
            [(0, 0); 3]
        );
        assert!(dir.path().join("in/d/.wh..wh..opq").is_file());
        assert!(dir.path().join("in/d/.wh.x").is_file());
    }

    #[test]
    fn metadata_and_every_type_are_kept() {
        use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
        let archive = Archive::default()
            .raw(b'5', "d", b"", |header| header.set_number(MODE, 0o500))
            .pax(&[("mtime", b"1500000000.25"), ("SCHILY.xattr.user.a", b"\0b")])
            .raw(b'0', "d/f", b"content", |header| {
                header.set_number(MODE, 0o4751)
            })
            .symlink("d/l", "f")
            .device(b'6', "p", 0, 0)
            .device(b'3', "null", 1, 3);
        let (dir, result) = unpack(archive.end());
        let extracted = result.unwrap();
        let stat =
            |name: &str| std::fs::symlink_metadata(dir.path().join("in").join(name)).unwrap();
        let file = stat("d/f");
        assert_eq!(file.mode() & 0o7777, 0o4751);
        assert_eq!(
            (file.mtime(), file.mtime_nsec()),
            (1_500_000_000, 250_000_000)
        );
        assert_eq!(
            (stat("d").mode() & 0o7777, stat("d").mtime()),
            (0o500, 1_000_000_000)
        );
        assert_eq!(stat("d/l").mtime(), 1_000_000_000);
        assert!(stat("p").file_type().is_fifo());
        assert_eq!(extracted.latest, Some(1_500_000_000));
        let owner = &extracted.owners[&(file.dev(), file.ino())];
        let attributes = BTreeMap::from([("user.a".into(), b"\0b".to_vec())]);
        assert_eq!(owner.xattrs, attributes);
        // The real root makes it, everybody else is told.
        let null = dir.path().join("in/null");
        match extracted.skipped_devices.as_slice() {
            [] => assert!(
                std::fs::metadata(null)
                    .unwrap()
                    .file_type()
                    .is_char_device()
            ),
            [skipped] => {
                assert_eq!(
                    (skipped.path.as_path(), skipped.major),
                    (Path::new("null"), 1)
                );
                assert!(!null.exists());
            }
            more => panic!("{more:?}"),
        }
    }

    #[test]
    fn an_owner_goes_with_the_file_that_had_it() {
        let owned = |archive: Archive, kind, name: &str| {
            archive.raw(kind, name, b"", |header| header.set_number(UID, 5))
        };
        let mut archive = owned(Archive::default(), b'5', "a");
        archive = owned(archive, b'0', "a/b");
        // Replaced, with all that was in it; what comes now may get the same inodes.
        archive = archive.file("a", b"").file("x/y", b"").file("z/z", b"");
        let (dir, result) = unpack(archive.end());
        let owners = result.unwrap().owners;
        for name in ["a", "x", "x/y", "z", "z/z"] {
            let stat = rustix::fs::lstat(dir.path().join("in").join(name)).unwrap();
            assert_eq!(owners.get(&(stat.st_dev, stat.st_ino)), None, "{name}");
        }
    }

    #[test]
    fn security_s16_limits_hold_and_damage_is_said() {
        let limits = Limits {
            entries: 2,
            ..Limits::default()
        };
        let dir = tempfile::tempdir().unwrap();
        let archive = Archive::default()
            .file("a", b"")
            .file("b", b"")
            .file("c", b"");
        let error = extract(io::Cursor::new(archive.end()), dir.path(), &limits).unwrap_err();
        assert!(
            matches!(error, LayerError::Limit { limit: 2, .. }),
            "{error:?}"
        );

        let mut cut = Archive::default().file("a", &[b'x'; 2000]).end();
        cut.truncate(1024);
        let (_, result) = unpack(cut);
        assert!(
            matches!(result, Err(LayerError::Malformed { .. })),
            "{result:?}"
        );
        let (_, result) =
            unpack(zstd::encode_all(&b"no tar at all, however long it may be"[..], 1).unwrap());
        assert!(
            matches!(result, Err(LayerError::Malformed { .. })),
            "{result:?}"
        );
    }

    #[test]
    fn what_is_meant_as_an_archive_is_told_by_its_first_bytes() {
        for (first, expected) in [
            (tar_of("a"), true),
            (Archive::default().raw(b'x', "", b"", |_| {}).0, true),
            (b"BZh91AY".to_vec(), true),
            (b"\x1f\x8b\x08\0".to_vec(), true),
            (b"\xfd7zXZ\0".to_vec(), true),
            (b"\x28\xb5\x2f\xfd".to_vec(), true),
            (b"FROM scratch\n".to_vec(), false),
            (vec![0; 1024], false),
            (Vec::new(), false),
        ] {
            assert_eq!(looks_like_archive(&first), expected, "{first:02x?}");
        }
    }
}
