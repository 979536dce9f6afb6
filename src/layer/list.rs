//! [`list`]: one layer → what [`apply`](super::apply()) would make of it, in memory. Input is
//! hostile.
//!
//! The rules are those of [`Tree`](super::tree) and [`Applier`](mod@super::apply), and so are the
//! errors; only the kernel's part is played here.

use std::ffi::{OsStr, OsString};
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::io::Errno;

use super::apply::{Action, action, read_verified, refused};
use super::metadata::check_xattrs;
use super::tree::{LINKS_MAX, REMEMBERED_OVERHEAD_BYTES, normalise, push_components};
use super::whiteout;
use super::{EntryKind, LayerError, Limits, TarEntry};
use crate::image::{DiffId, MediaType};
use crate::rootfs::listing::{KEPT_CONTENT_BYTES, Listed, ListedKind, ROOT};
use crate::rootfs::{Listing, Metadata};

/// The longest name of a file, in bytes: `NAME_MAX`.
const NAME_MAX: usize = 255;

/// Lists one layer alone, given as its compressed stream, without writing anything.
///
/// What is listed is what [`apply`](super::apply()) makes in an empty directory, by a process
/// that may make devices, on a file system that holds all attributes. Reading, limits and
/// verification are the same; contents are passed over. Memory is limited by
/// [`Limits::remembered_bytes`]. Blocking.
///
/// # Errors
/// Those of [`apply`](super::apply()); [`LayerError::Limit`] also for a layer that could be
/// unpacked but has too many files to keep in mind: see [`is_too_long`].
pub fn list(
    compressed: impl Read + Send,
    media_type: &MediaType,
    want: &DiffId,
    limits: &Limits,
) -> Result<Listing, LayerError> {
    let mut lister = Lister::new(limits.clone());
    read_verified(compressed, media_type, want, limits, |tar| {
        while let Some(entry) = tar.next()? {
            lister.entry(&entry, || {
                let mut content = Vec::new();
                loop {
                    let chunk = tar.chunk()?;
                    if chunk.is_empty() {
                        return Ok(content);
                    }
                    content.extend_from_slice(chunk);
                    let length = chunk.len();
                    tar.consume(length);
                }
            })?;
        }
        Ok(())
    })?;
    Ok(lister.finish())
}

/// What a listing of too many files is refused with.
const TOO_LONG: &str = "too many files to list (bytes of memory)";

/// Whether [`list`] failed for the number of files alone, which [`apply`](super::apply()) might bear.
pub fn is_too_long(error: &LayerError) -> bool {
    matches!(error, LayerError::Limit { what, .. } if *what == TOO_LONG)
}

/// Makes a [`Listing`] of the entries of a layer.
#[derive(Debug)]
pub(super) struct Lister {
    listing: Listing,
    limits: Limits,
    remembered_bytes: u64,
    implied: u64,
}

/// A directory that was found, with those that it is in; the root first.
type Way = Vec<(u32, OsString)>;

/// Where a file is.
struct Place {
    parent: u32,
    name: OsString,
    /// Without links.
    path: PathBuf,
}

impl Lister {
    pub(super) fn new(limits: Limits) -> Self {
        Self {
            listing: Listing::default(),
            limits,
            remembered_bytes: 0,
            implied: 0,
        }
    }

    pub(super) fn finish(self) -> Listing {
        self.listing
    }

    /// Takes in the next entry. `content` reads what it has, if that is to be kept.
    pub(super) fn entry(
        &mut self,
        entry: &TarEntry,
        content: impl FnOnce() -> Result<Vec<u8>, LayerError>,
    ) -> Result<(), LayerError> {
        let path = match action(entry)? {
            Action::Nothing => return Ok(()),
            Action::Opaque(path) => return self.make_opaque(&path),
            Action::Whiteout(path) => {
                let place = self.place(&path)?;
                return self.whiteout(&place);
            }
            Action::File(path) => path,
        };
        check_xattrs(&path, &entry.metadata)?;
        let place = self.place(&path)?;
        let mut more = 0;
        let kind = match &entry.kind {
            EntryKind::File(segments) => {
                let is_kept = self.listing.keeps_content(place.parent, &place.name)
                    && segments.is_none()
                    && entry.size_bytes <= KEPT_CONTENT_BYTES;
                let content = is_kept.then(content).transpose()?;
                more = content.as_ref().map_or(0, Vec::len);
                ListedKind::File {
                    size_bytes: entry.size_bytes,
                    content: content.map(Into::into),
                }
            }
            EntryKind::Directory => return self.make_directory(&place, entry.metadata.clone()),
            EntryKind::Symlink(target) => {
                more = target.len();
                ListedKind::Symlink(target.clone())
            }
            EntryKind::Hardlink(target) => return self.hardlink(&place, entry, target),
            EntryKind::CharDevice { major: 0, minor: 0 } => ListedKind::Whiteout,
            EntryKind::CharDevice { major, minor } => ListedKind::CharDevice(*major, *minor),
            EntryKind::BlockDevice { major, minor } => ListedKind::BlockDevice(*major, *minor),
            EntryKind::Fifo => ListedKind::Fifo,
        };
        let mut metadata = entry.metadata.clone();
        if matches!(kind, ListedKind::Symlink(_)) {
            // The only mode of links in Linux.
            metadata.mode = 0o777;
        }
        self.remember(&place.path, bytes_of(&metadata) + more)?;
        let file = Listed::new(metadata, kind);
        self.listing.put(place.parent, &place.name, file);
        Ok(())
    }

    /// Makes a directory, or takes the one that is there.
    fn make_directory(&mut self, place: &Place, metadata: Metadata) -> Result<(), LayerError> {
        self.remember(&place.path, bytes_of(&metadata))?;
        let number = self.mkdir(place, false);
        let file = self.listing.file_mut(number);
        file.metadata = metadata;
        if let Some(directory) = file.directory_mut() {
            directory.implied = false;
        }
        Ok(())
    }

    /// A new directory in the place of something else hides what lower layers have there.
    fn mkdir(&mut self, place: &Place, implied: bool) -> u32 {
        let found = self.listing.child(place.parent, &place.name);
        if let Some(number) = found
            && self.listing.file(number).directory().is_some()
        {
            return number;
        }
        let mut file = Listed::implied(found.is_some());
        if let Some(directory) = file.directory_mut() {
            directory.implied = implied;
        }
        self.listing.put(place.parent, &place.name, file)
    }

    fn whiteout(&mut self, place: &Place) -> Result<(), LayerError> {
        check_name(&place.name, &place.path)?;
        let Some(number) = self.listing.child(place.parent, &place.name) else {
            self.remember(&place.path, 0)?;
            let file = Listed::new(Metadata::default(), ListedKind::Whiteout);
            self.listing.put(place.parent, &place.name, file);
            return Ok(());
        };
        if let Some(directory) = self.listing.file_mut(number).directory_mut() {
            directory.opaque = true;
        }
        Ok(())
    }

    fn make_opaque(&mut self, path: &Path) -> Result<(), LayerError> {
        let number = self.directory(path)?;
        match self.listing.file_mut(number).directory_mut() {
            Some(directory) if number != ROOT => {
                directory.opaque = true;
                Ok(())
            }
            _ => Err(LayerError::Refused {
                path: path.join(whiteout::OPAQUE),
                reason: "it would hide all layers below this one, which is not supported",
            }),
        }
    }

    fn hardlink(
        &mut self,
        place: &Place,
        entry: &TarEntry,
        target: &Path,
    ) -> Result<(), LayerError> {
        let outside = || LayerError::HardlinkOutsideLayer {
            path: place.path.clone(),
            target: target.to_owned(),
        };
        let target_path = normalise(target)?;
        if target_path.as_os_str().is_empty() {
            return Err(refused(entry, "it is a hard link to the root"));
        }
        let found = self.find(&target_path)?.ok_or_else(outside)?;
        if (found.parent, &found.name) == (place.parent, &place.name) {
            return Err(refused(entry, "it is a hard link to itself"));
        }
        let fail = |error: Errno| LayerError::tree("making the hard link", &place.path)(error);
        let child = |listing: &Listing| listing.child(found.parent, &found.name);
        let number = child(&self.listing).ok_or_else(outside)?;
        self.listing.remove(place.parent, &place.name);
        // It may have been in what it replaces.
        if child(&self.listing).is_none() {
            return Err(fail(Errno::NOENT));
        }
        if self.listing.file(number).directory().is_some() {
            return Err(fail(Errno::PERM));
        }
        let metadata = entry.metadata.clone();
        self.remember(&place.path, bytes_of(&metadata))?;
        self.listing.link(place.parent, &place.name, number);
        self.listing.set_metadata_of_link(number, metadata);
        Ok(())
    }

    /// Where the normalised, non-empty `path` is; missing parents are made.
    fn place(&mut self, path: &Path) -> Result<Place, LayerError> {
        let name = path.file_name().unwrap_or_default();
        let way = self.walk(path.parent().unwrap_or(Path::new("")), true)?;
        let way = way.expect("missing directories are made");
        check_name(name, path)?;
        Ok(Place::new(&way, name))
    }

    /// Where the normalised, non-empty `path` is; `None` where there is no such file.
    fn find(&mut self, path: &Path) -> Result<Option<Place>, LayerError> {
        let name = path.file_name().unwrap_or_default();
        let Some(way) = self.walk(path.parent().unwrap_or(Path::new("")), false)? else {
            return Ok(None);
        };
        let place = Place::new(&way, name);
        let found = self.listing.child(place.parent, name);
        let found = found.filter(|number| !self.listing.file(*number).is_whiteout());
        Ok(found.map(|_| place))
    }

    /// The directory at the normalised `path`, made where it is missing.
    fn directory(&mut self, path: &Path) -> Result<u32, LayerError> {
        let way = self.walk(path, true)?;
        let way = way.expect("missing directories are made");
        Ok(way.last().map_or(ROOT, |(number, _)| *number))
    }

    /// Goes to `path` component by component, following links as if the layer were `/`.
    fn walk(&mut self, path: &Path, make: bool) -> Result<Option<Way>, LayerError> {
        let mut way = Way::new();
        let mut todo: Vec<OsString> = Vec::new();
        push_components(&mut todo, path);
        let mut links = 0;
        while let Some(name) = todo.pop() {
            if name == ".." {
                way.pop();
                continue;
            }
            let place = Place::new(&way, &name);
            let found = self.listing.child(place.parent, &name);
            let kind = found.map(|number| &self.listing.file(number).kind);
            let number = match (found, kind) {
                (Some(number), Some(ListedKind::Directory(_))) => number,
                (_, Some(ListedKind::Symlink(target))) => {
                    links += 1;
                    if links > LINKS_MAX {
                        return Err(LayerError::tree("resolving", path)(Errno::LOOP));
                    }
                    let target = PathBuf::from(target);
                    push_components(&mut todo, &target);
                    if target.is_absolute() {
                        way.clear();
                    }
                    continue;
                }
                (_, Some(ListedKind::Whiteout) | None) if make => self.imply(&place)?,
                (_, Some(_)) if make => {
                    return Err(LayerError::tree("looking up", &place.path)(Errno::NOTDIR));
                }
                _ => return Ok(None),
            };
            way.push((number, name));
        }
        Ok(Some(way))
    }

    /// Makes a directory that no entry names, so far.
    fn imply(&mut self, place: &Place) -> Result<u32, LayerError> {
        check_name(&place.name, &place.path)?;
        self.remember(&place.path, 0)?;
        self.implied += 1;
        if self.implied >= self.limits.entries {
            return Err(LayerError::Limit {
                what: "too many entries",
                limit: self.limits.entries,
                path: place.path.clone(),
            });
        }
        Ok(self.mkdir(place, true))
    }

    /// Accounts for a file and `bytes` more.
    fn remember(&mut self, path: &Path, bytes: usize) -> Result<(), LayerError> {
        let name = path.file_name().map_or(0, OsStr::len);
        self.remembered_bytes += (name + bytes) as u64 + REMEMBERED_OVERHEAD_BYTES;
        let limit = self.limits.remembered_bytes;
        if self.remembered_bytes > limit {
            return Err(LayerError::Limit {
                what: TOO_LONG,
                limit,
                path: path.to_owned(),
            });
        }
        Ok(())
    }
}

impl Place {
    fn new(way: &Way, name: &OsStr) -> Self {
        let mut path: PathBuf = way.iter().map(|(_, name)| name).collect();
        path.push(name);
        Self {
            parent: way.last().map_or(ROOT, |(number, _)| *number),
            name: name.to_owned(),
            path,
        }
    }
}

/// Bytes of the attributes.
fn bytes_of(metadata: &Metadata) -> usize {
    let xattrs = metadata.xattrs.iter();
    xattrs.map(|(name, value)| name.len() + value.len()).sum()
}

/// Refuses what no file system has.
fn check_name(name: &OsStr, path: &Path) -> Result<(), LayerError> {
    if name.as_bytes().len() > NAME_MAX {
        return Err(LayerError::tree("looking up", path)(Errno::NAMETOOLONG));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::error::Error as _;
    use std::fmt::Write as _;
    use std::sync::Arc;

    use super::super::header::{GID, LINK, MODE, UID};
    use super::super::testing::{Archive, is_real_root, is_root, tar_of};
    use super::super::{AppliedLayer, apply_and_list};
    use super::*;
    use crate::image::Digest;
    use crate::rootfs::{
        Change, ChangeKind, Data, Entry, FileContent, FileSource, LayerForm, LayerView, Node,
        Stack, Tree, inherit_metadata,
    };

    fn text(error: &LayerError) -> String {
        let mut text = error.to_string();
        let mut source = error.source();
        while let Some(error) = source {
            let _ = write!(text, ": {error}");
            source = error.source();
        }
        text
    }

    fn list_bytes(bytes: &[u8], limits: &Limits) -> Result<Listing, LayerError> {
        let want = DiffId::from_uncompressed(Digest::of(bytes));
        list(bytes, &MediaType::LAYER_TAR, &want, limits)
    }

    fn apply_bytes(bytes: &[u8], tree: &Path) -> Result<(AppliedLayer, Listing), LayerError> {
        let want = DiffId::from_uncompressed(Digest::of(bytes));
        let limits = Limits::default();
        let (applied, listing) =
            apply_and_list(bytes, &MediaType::LAYER_TAR, &want, tree, &limits)?;
        Ok((applied, listing.expect("not too long")))
    }

    /// Everything that can be asked of a view.
    fn answers(view: &LayerView) -> Vec<String> {
        let mut lines = Vec::new();
        let mut left: Vec<Node> = view
            .lookup(Path::new(""), false)
            .unwrap()
            .into_iter()
            .collect();
        while let Some(node) = left.pop() {
            let kind = node.file_type();
            let what = match kind {
                rustix::fs::FileType::RegularFile => format!("{} bytes", node.size()),
                rustix::fs::FileType::Symlink => format!("-> {:?}", view.read_link(&node).unwrap()),
                _ => format!("{kind:?} {}", node.rdev()),
            };
            let (metadata, xattrs) = (node.metadata(), view.xattrs(&node).unwrap());
            lines.push(format!("{:?} {what} {metadata:?} {xattrs:?}", node.path()));
            if kind.is_dir() {
                for (name, child) in view.read_dir(&node).unwrap() {
                    // Both ways to an entry lead to the same.
                    let by_path = view.lookup(&node.path().join(name), false).unwrap();
                    assert_eq!(format!("{:?}", by_path.unwrap()), format!("{child:?}"));
                    left.push(child);
                }
            }
        }
        lines.sort();
        lines
    }

    /// Applies layers with inheritance, as whoever mounts them, and lists them; compares all
    /// answers, of mixtures too. Returns the number of answers, or the error.
    fn compare(layers: &[Vec<u8>]) -> Result<usize, String> {
        let dir = tempfile::tempdir().unwrap();
        let (mut stack, mut listings) = (Stack::default(), Vec::new());
        for (number, bytes) in layers.iter().enumerate() {
            let tree = dir.path().join(number.to_string());
            std::fs::create_dir(&tree).unwrap();
            let listed = list_bytes(bytes, &Limits::default());
            let (applied, beside) = match (apply_bytes(bytes, &tree), &listed) {
                (Ok(applied), Ok(_)) => applied,
                (Err(applied), Err(listed)) => {
                    assert_eq!(text(listed), text(&applied));
                    return Err(text(&applied));
                }
                (applied, listed) => panic!("applied {applied:?}, listed {listed:?}"),
            };
            let listing = listed.unwrap();
            inherit_metadata(&tree, &applied.implied_directories, &stack).unwrap();
            stack.push(Tree::open(&tree).unwrap());
            assert_eq!(beside, listing);
            let stored = Listing::from_bytes(&listing.to_bytes()).unwrap();
            listings.push(Arc::new(stored));
        }
        let want = answers(&LayerView::from(&stack));
        for mixture in 0..1_usize << layers.len() {
            let forms = stack.trees().iter().zip(&listings).enumerate();
            let forms = forms.map(|(number, (tree, listing))| {
                if mixture >> number & 1 == 0 {
                    LayerForm::Listing(Arc::clone(listing))
                } else {
                    LayerForm::Tree(Arc::clone(tree))
                }
            });
            let view = LayerView::new(forms.collect());
            assert_eq!(answers(&view), want, "mixture {mixture:b}");
        }
        Ok(want.len())
    }

    struct Dice(u64);

    impl Dice {
        fn roll(&mut self, sides: u64) -> u64 {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            self.0 % sides
        }
    }

    fn random_name(dice: &mut Dice) -> String {
        let depth = 1 + dice.roll(3);
        let names = (0..depth).map(|_| ["a", "b", "c", "etc", "passwd"][dice.roll(5) as usize]);
        names.collect::<Vec<_>>().join("/")
    }

    fn random_layer(dice: &mut Dice, devices: bool) -> Vec<u8> {
        let mut archive = Archive::default();
        for _ in 0..1 + dice.roll(14) {
            let name = random_name(dice);
            let target = random_name(dice);
            let (mode, owner) = (0o600 + dice.roll(0o200), dice.roll(3));
            let header = |header: &mut super::super::header::Header| {
                header.set_number(MODE, mode);
                header.set_number(UID, owner);
                header.set_number(GID, owner / 2);
            };
            if dice.roll(8) == 0 {
                archive = archive.pax(&[("SCHILY.xattr.user.x", target.as_bytes())]);
            }
            let sibling = |prefix: &str| match name.rsplit_once('/') {
                Some((parent, name)) => format!("{parent}/{prefix}{name}"),
                None => format!("{prefix}{name}"),
            };
            archive = match dice.roll(16) {
                0..=4 => archive.raw(b'0', &name, target.as_bytes(), header),
                5..=8 => archive.raw(b'5', &name, b"", header),
                9 => archive.symlink(&name, &format!("/{target}")),
                10 => archive.symlink(&name, &format!("../{target}")),
                11 => archive.raw(b'1', &name, b"", |fields| {
                    header(fields);
                    fields.set_text(LINK, target.as_bytes());
                }),
                12 => archive.file(&sibling(".wh."), b""),
                13 => archive.file(&format!("{name}/.wh..wh..opq"), b""),
                14 if devices => archive.device(b'3', &name, dice.roll(2), 0),
                _ => archive.raw(b'6', &name, b"", header),
            };
        }
        archive.end()
    }

    #[test]
    fn sandbox_listings_answer_as_trees_do() {
        if !is_root() {
            return;
        }
        let devices = is_real_root();
        let (mut answers, mut errors) = (0, std::collections::BTreeSet::new());
        for seed in 1..=1500 {
            let mut dice = Dice(seed * 0x9E37_79B9);
            let layers: Vec<_> = (0..3).map(|_| random_layer(&mut dice, devices)).collect();
            match compare(&layers) {
                Ok(count) => answers += count,
                Err(error) => drop(errors.insert(error)),
            }
        }
        // Both happened, and often.
        assert!(answers > 1000, "{answers}");
        assert!(errors.len() > 10, "{errors:?}");
    }

    #[test]
    fn sandbox_what_only_lower_layers_say_shows_through() {
        if !is_root() {
            return;
        }
        let new = Archive::default;
        let odd = |fields: &mut super::super::header::Header| {
            fields.set_number(MODE, 0o1777);
            fields.set_number(UID, 7);
        };
        let layers = [
            new().raw(b'5', "tmp", b"", odd).raw(b'5', "gone", b"", odd),
            // One implies what the next implies again, one hides it first.
            new().file("tmp/x", b"").file(".wh.gone", b""),
            new().file("tmp/y", b"").file("gone/z", b""),
            new().file(".wh.tmp", b"").file("tmp/in/only", b""),
        ];
        compare(&layers.map(Archive::end)).unwrap();
    }

    #[test]
    fn account_files_keep_their_content_and_others_do_not() {
        let passwd = b"root:x:0:0::/:\n";
        let long = vec![b'x'; usize::try_from(KEPT_CONTENT_BYTES).unwrap() + 1];
        let listing = list_bytes(
            &Archive::default()
                .directory("etc")
                .file("etc/passwd", passwd)
                .file("etc/group", &long)
                .file("etc/shadow", b"secret")
                .file("passwd", b"another")
                .end(),
            &Limits::default(),
        )
        .unwrap();
        let view = LayerView::new(vec![LayerForm::Listing(Arc::new(
            Listing::from_bytes(&listing.to_bytes()).unwrap(),
        ))]);
        let content = |path: &str| {
            let node = view.lookup(Path::new(path), true).unwrap().unwrap();
            let content = view.content(&node).unwrap();
            content.map(|content| std::io::read_to_string(content).unwrap())
        };
        assert_eq!(content("/etc/passwd").unwrap().as_bytes(), passwd);
        for path in ["etc/group", "etc/shadow", "passwd"] {
            assert_eq!(content(path), None, "{path}");
        }
    }

    #[test]
    fn changes_are_listed_as_the_layer_that_they_become() {
        let metadata = |mode, uid| Metadata {
            mode,
            uid,
            gid: 3,
            mtime: crate::rootfs::Time {
                seconds: 1_700_000_000,
                nanoseconds: 5,
            },
            xattrs: [("user.a".into(), b"1".to_vec())].into(),
        };
        let bytes = |text: &str| {
            Data::File(FileContent {
                size_bytes: text.len() as u64,
                source: FileSource::Bytes(text.as_bytes().into()),
            })
        };
        let changes = || {
            let entry = |path: &str, data, mode| Change {
                path: path.into(),
                kind: ChangeKind::Entry(Entry {
                    metadata: metadata(mode, 1),
                    data,
                }),
            };
            vec![
                entry("etc", Data::Directory { opaque: true }, 0o750),
                entry("etc/passwd", bytes("root:x:0:0\n"), 0o644),
                Change {
                    path: "gone".into(),
                    kind: ChangeKind::Removed,
                },
                entry("hard", bytes("1234"), 0o4711),
                entry("hard2", Data::Hardlink("hard".into()), 0o4711),
                entry("in/plied", Data::Fifo, 0o600),
                entry("link", Data::Symlink("etc".into()), 0o123),
                entry("null", Data::CharDevice { major: 1, minor: 3 }, 0o666),
            ]
        };
        let from_changes = Listing::of_changes(&changes(), None).unwrap();
        let from_bytes = list_bytes(&tar_of(changes()), &Limits::default()).unwrap();
        assert_eq!(
            answers(&LayerView::new(vec![LayerForm::Listing(Arc::new(
                from_changes.clone()
            ))])),
            answers(&LayerView::new(vec![LayerForm::Listing(Arc::new(
                from_bytes
            ))])),
        );
        let early = Listing::of_changes(&changes(), Some(5)).unwrap();
        let etc = early.find(Path::new("etc")).unwrap();
        assert_eq!(early.file(etc).metadata.mtime.seconds, 5);
        // What is in the account file is known when it has been read.
        let mut later = changes();
        if let ChangeKind::Entry(entry) = &mut later[1].kind {
            entry.data = Data::File(FileContent {
                size_bytes: 1,
                source: FileSource::Open(Box::new(|| Err(std::io::ErrorKind::NotFound.into()))),
            });
        }
        assert_eq!(Listing::of_changes(&later, None), None);
    }

    #[test]
    fn a_damaged_listing_is_none() {
        let archive = Archive::default().directory("a").hardlink("a/h", "a/f");
        assert!(list_bytes(&archive.end(), &Limits::default()).is_err());
        let archive = Archive::default()
            .directory("a")
            .file("a/f", b"x")
            .directory("b")
            .hardlink("b/h", "a/f");
        let listing = list_bytes(&archive.end(), &Limits::default()).unwrap();
        let bytes = listing.to_bytes();
        let again = Listing::from_bytes(&bytes).unwrap();
        assert_eq!(again.to_bytes(), bytes);
        let linked = again.find(Path::new("b/h")).unwrap();
        assert_eq!(again.file(linked).links, 2);
        for at in 0..bytes.len() {
            assert_eq!(Listing::from_bytes(&bytes[..at]), None, "{at}");
            let mut changed = bytes.clone();
            changed[at] ^= 1;
            assert_eq!(Listing::from_bytes(&changed), None, "{at}");
        }
        // With the right checksum, a directory in itself.
        let cycle = [
            &b"sockless listing 1\n"[..],
            &[1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, b'a', 0],
        ];
        let mut cycle = cycle.concat();
        let digest = Digest::of(&cycle);
        cycle.extend_from_slice(digest.hex().as_bytes());
        assert_eq!(Listing::from_bytes(&cycle), None);
    }

    #[test]
    fn security_s17_a_wrong_diff_id_and_too_many_files_are_refused() {
        let bytes = Archive::default().directory("a").file("a/f", b"x").end();
        let other = DiffId::from_uncompressed(Digest::of(b"other"));
        let wrong = list(
            &bytes[..],
            &MediaType::LAYER_TAR,
            &other,
            &Limits::default(),
        );
        assert!(matches!(wrong, Err(LayerError::DiffId { .. })), "{wrong:?}");
        let limits = Limits {
            remembered_bytes: 300,
            ..Limits::default()
        };
        let error = list_bytes(&bytes, &limits).unwrap_err();
        assert!(is_too_long(&error), "{error}");
        let limits = Limits {
            entries: 1,
            ..Limits::default()
        };
        let error = list_bytes(&bytes, &limits).unwrap_err();
        assert!(!is_too_long(&error), "{error}");
    }
}
