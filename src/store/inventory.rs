//! What is in the store: each object with its size and when it was used.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs::{self, File, Metadata, TryLockError};
use std::io::{self, Read as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rustix::fs::{AtFlags, CWD, Mode, OFlags, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT};
use serde::{Deserialize, Serialize};

use super::hold::Removing;
use super::size::{BLOCK_BYTES, Size};
use super::tree::{self, INFO};
use super::{Store, StoreError, blob_name};
use crate::image::{Descriptor, DiffId, Digest};

/// How long the remembered size of a cache mount is good enough for a size limit. Steps
/// change their mounts, and a walk through one may take long.
const MOUNT_SIZE_AGE: Duration = Duration::from_secs(60 * 60);

/// The name of a cache mount's file with its size.
pub(super) const MOUNT_SIZE: &str = "size.json";

/// The directories of [`Kind::Note`] in `cache/`, and what they have.
pub(super) const NOTES: [(&str, &str); 4] = [
    ("contents", "what a step read"),
    ("conversions", "a layer compressed anew"),
    ("listings", "what is in a layer"),
    ("stat", "digests of a context's files"),
];

/// What an object is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// An unpacked layer. It can be made again from its blob, or from the registry.
    Tree,
    /// A compressed layer, or a file from a server.
    Blob,
    /// What a step made, as the cache finds it.
    Step,
    /// What a server said about a file that is a blob now.
    Http,
    /// Something that is remembered so that nobody has to find it out again: what is in a
    /// layer, digests of the files of a context, how a layer was compressed anew.
    Note,
    /// A directory of `RUN --mount=type=cache`.
    Mount,
}

impl Kind {
    /// All of them, those first that are removed first.
    pub const ALL: [Self; 6] = [
        Self::Tree,
        Self::Blob,
        Self::Step,
        Self::Http,
        Self::Note,
        Self::Mount,
    ];

    /// Its name in lists and filters.
    pub fn name(self) -> &'static str {
        match self {
            Self::Tree => "tree",
            Self::Blob => "blob",
            Self::Step => "step",
            Self::Http => "http",
            Self::Note => "note",
            Self::Mount => "mount",
        }
    }
}

/// Something in the store that can be removed on its own.
#[derive(Clone, Debug)]
pub struct Object {
    /// What it is.
    pub kind: Kind,
    /// Its name, unique among those of its kind.
    pub id: String,
    /// Where it is.
    pub path: PathBuf,
    /// Bytes on disk.
    pub bytes: u64,
    /// When it was made.
    pub created: SystemTime,
    /// When it was last used.
    pub last_used: SystemTime,
    /// Whether a running build uses it.
    pub in_use: bool,
    /// What it is, for people; may be empty.
    pub description: String,
    /// The blob that it is or names.
    pub blob: Option<Digest>,
    /// The layer that it is or names, where that is known.
    pub layer: Option<DiffId>,
    /// The layers below those of a step, as a chain ID.
    parent: Option<Digest>,
}

/// How exactly sizes have to be known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Exactness {
    /// As they are.
    Now,
    /// As they were not long ago, where finding out takes long.
    Remembered,
}

/// What a record of `cache/steps` or `cache/http` says to the store.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct RecordView {
    /// Of a step.
    #[serde(default)]
    diff_id: Option<DiffId>,
    #[serde(default)]
    descriptor: Option<Descriptor>,
    #[serde(default)]
    name: String,
    #[serde(default)]
    inputs: InputsView,
    /// Of a server's file.
    #[serde(default)]
    digest: Option<Digest>,
    #[serde(default)]
    size_bytes: Option<u64>,
}

#[derive(Clone, Debug, Default, Deserialize)]
struct InputsView {
    #[serde(default)]
    parent: Option<Digest>,
}

impl RecordView {
    /// Parses the content of a record; absent where it is none.
    pub(super) fn parse(bytes: &[u8]) -> Option<Self> {
        let view: Self = serde_json::from_slice(bytes).ok()?;
        view.blob().is_some().then_some(view)
    }

    /// The blob that it needs, and the number of its bytes.
    pub(super) fn blob(&self) -> Option<(&Digest, u64)> {
        match (&self.descriptor, &self.digest) {
            (Some(descriptor), _) => Some((&descriptor.digest, descriptor.size)),
            (None, Some(digest)) => Some((digest, self.size_bytes?)),
            (None, None) => None,
        }
    }
}

impl Store {
    /// Everything that is in the store and can be removed, in no order. What disappears
    /// meanwhile is left out.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn objects(&self) -> Result<Vec<Object>, StoreError> {
        self.inventory(Exactness::Now)
    }

    /// The bytes that everything in the store takes on disk, but for what is unfinished and
    /// for the service's database.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn used_bytes(&self) -> Result<u64, StoreError> {
        Ok(sum(&self.objects()?))
    }

    pub(super) fn inventory(&self, exactness: Exactness) -> Result<Vec<Object>, StoreError> {
        // In this order, so that a record that somebody writes while we look cannot escape:
        // its blob is held when `held` is read, or was used after it was listed.
        let (mut blobs, mut trees) = (self.blobs()?, self.trees()?);
        let held = self.held()?;
        let mut steps = self.steps()?;
        let mut http = self.http()?;
        let in_use = |digest: &Option<Digest>| {
            let name = digest.as_ref().map(blob_name);
            name.is_some_and(|name| held.contains(&name))
        };
        for object in blobs.iter_mut().chain(&mut steps).chain(&mut http) {
            object.in_use = in_use(&object.blob);
        }
        for tree in &mut trees {
            tree.in_use = held.contains(&tree::hold_name(&tree.id));
        }
        describe(&mut blobs, &mut trees, steps.iter().chain(&http));
        let (notes, mounts) = (self.notes()?, self.mounts(exactness)?);
        let all = [trees, blobs, steps, http, notes, mounts];
        Ok(all.into_iter().flatten().collect())
    }

    /// The names that running builds hold, this one too.
    pub(super) fn held(&self) -> Result<BTreeSet<String>, StoreError> {
        self.holds.remove()?.held(&self.root.join("tmp"))
    }

    fn blobs(&self) -> Result<Vec<Object>, StoreError> {
        let mut blobs = Vec::new();
        each(&self.root.join("blobs/sha256"), |path, name| {
            let digest = Digest::parse(&format!("sha256:{name}")).ok();
            if let (Some(digest), Some(found)) = (digest, file(&path)?) {
                blobs.push(Object {
                    blob: Some(digest),
                    ..Object::of(Kind::Blob, name.to_owned(), path, &found)
                });
            }
            Ok(())
        })?;
        Ok(blobs)
    }

    fn trees(&self) -> Result<Vec<Object>, StoreError> {
        let mut trees = Vec::new();
        each(&self.trees_path(), |path, name| {
            let known = (tree::parse_name(name), file(&path.join(INFO))?);
            let (Some((digest, is_chain)), Some(found)) = known else {
                return Ok(());
            };
            let size = match self.tree_size(name) {
                Err(error) if error.is_not_found() => return Ok(()),
                size => size?,
            };
            trees.push(Object {
                bytes: size.bytes,
                layer: (!is_chain).then(|| DiffId::from_uncompressed(digest)),
                ..Object::of(Kind::Tree, name.to_owned(), path, &found)
            });
            Ok(())
        })?;
        Ok(trees)
    }

    fn steps(&self) -> Result<Vec<Object>, StoreError> {
        let mut steps = Vec::new();
        each(&self.steps_path(), |dir, definition| {
            if !dir.is_dir() {
                return Ok(());
            }
            each(&dir, |path, name| {
                let Some(inputs) = name.strip_suffix(".json") else {
                    return Ok(());
                };
                let id = format!("{definition}/{inputs}");
                steps.extend(record(Kind::Step, id, path)?);
                Ok(())
            })
        })?;
        Ok(steps)
    }

    fn http(&self) -> Result<Vec<Object>, StoreError> {
        let mut all = Vec::new();
        each(&self.http_path(), |path, name| {
            if let Some(url) = name.strip_suffix(".json") {
                all.extend(record(Kind::Http, url.to_owned(), path)?);
            }
            Ok(())
        })?;
        Ok(all)
    }

    fn notes(&self) -> Result<Vec<Object>, StoreError> {
        let mut notes = Vec::new();
        for (kind, what) in NOTES {
            each(&self.root.join("cache").join(kind), |path, name| {
                if let Some(found) = file(&path)? {
                    notes.push(Object {
                        description: what.to_owned(),
                        ..Object::of(Kind::Note, format!("{kind}/{name}"), path, &found)
                    });
                }
                Ok(())
            })?;
        }
        Ok(notes)
    }

    fn mounts(&self, exactness: Exactness) -> Result<Vec<Object>, StoreError> {
        let mut mounts = Vec::new();
        each(&self.cache_mounts_path(), |all, hash| {
            if !all.is_dir() {
                return Ok(());
            }
            let name = fs::read(all.join("name")).unwrap_or_default();
            let name = String::from_utf8_lossy(&name);
            // What stands in further lines is what it was made from.
            let id = name.lines().next().unwrap_or_default();
            let description = id.trim_start_matches('/').to_owned();
            each(&all, |path, number| {
                if number.parse::<u32>().is_err() {
                    return Ok(());
                }
                let lock = path.join("lock");
                let (found, in_use) = match file(&lock)? {
                    Some(found) => (found, is_locked(&lock, &self.holds.remove()?)?),
                    // Whoever was making it was killed, or has not got further yet.
                    None => match fs::symlink_metadata(&path) {
                        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
                        found => (found.map_err(StoreError::io("reading", &path))?, false),
                    },
                };
                let used = accessed(&found);
                let bytes = self.mount_bytes(&path, used, exactness)?;
                mounts.push(Object {
                    bytes,
                    in_use,
                    description: description.clone(),
                    ..Object::of(Kind::Mount, format!("{hash}/{number}"), path, &found)
                });
                Ok(())
            })
        })?;
        Ok(mounts)
    }

    /// The size of a cache mount; where it was measured after it was last `used`, or not long
    /// before and that is enough, as it was then.
    fn mount_bytes(
        &self,
        dir: &Path,
        used: SystemTime,
        exactness: Exactness,
    ) -> Result<u64, StoreError> {
        let remembered = dir.join(MOUNT_SIZE);
        if exactness == Exactness::Remembered
            && let Some(found) = file(&remembered)?
            && let Ok(measured) = found.modified()
            && used < measured + MOUNT_SIZE_AGE
            && let Some(size) = read_quietly(&remembered)
                .ok()
                .and_then(|bytes| serde_json::from_slice::<Size>(&bytes).ok())
        {
            return Ok(size.bytes);
        }
        let size = match Size::measure(&dir.join("files")) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
            size => size.map_err(StoreError::io("measuring", dir))?,
        };
        let bytes = serde_json::to_vec(&size).expect("a size has only string keys");
        match self.unnamed_file(&remembered, &bytes)?.persist(&remembered) {
            Err(error) if error.error.kind() != io::ErrorKind::NotFound => {
                Err(StoreError::io("naming", &remembered)(error.error))
            }
            _ => Ok(size.bytes),
        }
    }
}

impl Object {
    /// With the times and the size of the file that carries them.
    fn of(kind: Kind, id: String, path: PathBuf, found: &Metadata) -> Self {
        Self {
            kind,
            id,
            path,
            bytes: found.blocks() * BLOCK_BYTES,
            created: found.modified().unwrap_or(SystemTime::UNIX_EPOCH),
            last_used: accessed(found),
            in_use: false,
            description: String::new(),
            blob: None,
            layer: None,
            parent: None,
        }
    }

    /// What a step's layer and those below it are together.
    fn chain(&self) -> Option<Digest> {
        let layer = self.layer.as_ref()?;
        let Some(parent) = &self.parent else {
            return Some(layer.digest().clone());
        };
        // As `image::chain_id` does it for the last of several.
        Some(Digest::of(format!("{parent} {layer}").as_bytes()))
    }

    /// The file whose access time says when it was last used.
    pub(super) fn time_path(&self) -> PathBuf {
        match self.kind {
            Kind::Tree => self.path.join(INFO),
            Kind::Mount => self.path.join("lock"),
            Kind::Blob | Kind::Step | Kind::Http | Kind::Note => self.path.clone(),
        }
    }
}

impl StoreError {
    /// Whether something was not there.
    pub(super) fn is_not_found(&self) -> bool {
        matches!(self, Self::Io { source, .. } if source.kind() == io::ErrorKind::NotFound)
    }
}

/// The sum of what objects take on disk.
pub(super) fn sum<'o>(objects: impl IntoIterator<Item = &'o Object>) -> u64 {
    objects.into_iter().map(|object| object.bytes).sum()
}

/// Says of blobs and trees which step made them.
fn describe<'o>(
    blobs: &mut [Object],
    trees: &mut [Object],
    records: impl Iterator<Item = &'o Object> + Clone,
) {
    let mut by_blob = BTreeMap::new();
    let mut by_layer = BTreeMap::new();
    let mut by_tree = BTreeMap::new();
    // The one that was used last gives its name.
    let mut sorted: Vec<&Object> = records.collect();
    sorted.sort_by_key(|record| record.last_used);
    for record in sorted {
        let said = (&record.description, &record.layer);
        if let Some(blob) = &record.blob {
            by_blob.insert(blob.clone(), said);
        }
        if let Some(layer) = &record.layer {
            by_layer.insert(layer.digest().clone(), said);
        }
        if let Some(chain) = &record.chain() {
            by_tree.insert(chain.clone(), said);
        }
    }
    for blob in blobs {
        if let Some((description, layer)) = blob.blob.as_ref().and_then(|blob| by_blob.get(blob)) {
            blob.description.clone_from(description);
            blob.layer.clone_from(layer);
        }
    }
    for tree in trees {
        let found = match tree::parse_name(&tree.id) {
            Some((chain, true)) => by_tree.get(&chain),
            Some((layer, false)) => by_layer.get(&layer),
            None => None,
        };
        if let Some((description, layer)) = found {
            tree.description.clone_from(description);
            tree.layer.clone_from(layer);
        }
    }
}

/// A record as an object; absent where it has disappeared. One that cannot be read names no
/// blob, so nothing keeps it.
fn record(kind: Kind, id: String, path: PathBuf) -> Result<Option<Object>, StoreError> {
    let Some(found) = file(&path)? else {
        return Ok(None);
    };
    let view = read_quietly(&path).ok();
    let view = view.and_then(|bytes| RecordView::parse(&bytes));
    let mut object = Object::of(kind, id, path, &found);
    if let Some(view) = view {
        object.blob = view.blob().map(|(digest, _)| digest.clone());
        object.parent = view.inputs.parent;
        object.layer = view.diff_id;
        object.description = view.name;
    }
    Ok(Some(object))
}

/// Calls `visit` with each entry of the directory `dir`, which need not be there, and its
/// name. Names that are no text are none of ours.
pub(super) fn each(
    dir: &Path,
    mut visit: impl FnMut(PathBuf, &str) -> Result<(), StoreError>,
) -> Result<(), StoreError> {
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries.map_err(StoreError::io("listing", dir))?,
    };
    for entry in entries {
        let path = entry.map_err(StoreError::io("listing", dir))?.path();
        if let Some(name) = path.file_name().and_then(OsStr::to_str) {
            visit(path.clone(), name)?;
        }
    }
    Ok(())
}

/// What is known about the regular file `path`; absent where there is none.
pub(super) fn file(path: &Path) -> Result<Option<Metadata>, StoreError> {
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) if error.kind() == io::ErrorKind::NotADirectory => Ok(None),
        found => {
            let found = found.map_err(StoreError::io("reading", path))?;
            Ok(found.is_file().then_some(found))
        }
    }
}

/// Whether somebody has the file locked. To be asked under the store's exclusive lock: a
/// step that finds it locked by who asks would take another directory.
pub(super) fn is_locked(path: &Path, _removing: &Removing<'_>) -> Result<bool, StoreError> {
    match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(StoreError::io("opening", path)(error)),
        Ok(lock) => match lock.try_lock() {
            Ok(()) => Ok(false),
            Err(TryLockError::WouldBlock) => Ok(true),
            Err(TryLockError::Error(error)) => Err(StoreError::io("locking", path)(error)),
        },
    }
}

/// Sets the access time to now. What cannot be, stays: the thing only looks older.
pub(super) fn touch(path: &Path) {
    let now = |tv_nsec| Timespec { tv_sec: 0, tv_nsec };
    let times = Timestamps {
        last_access: now(UTIME_NOW),
        last_modification: now(UTIME_OMIT),
    };
    if let Err(error) = rustix::fs::utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW) {
        tracing::debug!(path = %path.display(), %error, "a use is not recorded");
    }
}

/// Gives `to` the times that `found` has.
pub(super) fn copy_times(found: &Metadata, to: &File) -> io::Result<()> {
    let time = |tv_sec, tv_nsec| Timespec { tv_sec, tv_nsec };
    let times = Timestamps {
        last_access: time(found.atime(), found.atime_nsec()),
        last_modification: time(found.mtime(), found.mtime_nsec()),
    };
    Ok(rustix::fs::futimens(to, &times)?)
}

/// Reads a file so that this is no use of it.
pub(super) fn read_quietly(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    open_quietly(path)?.read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Opens a regular file for reading that is no use of it.
pub(super) fn open_quietly(path: &Path) -> io::Result<File> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let fd = match rustix::fs::open(path, flags | OFlags::NOATIME, Mode::empty()) {
        // Only the owner may ask for it.
        Err(rustix::io::Errno::PERM) => rustix::fs::open(path, flags, Mode::empty()),
        opened => opened,
    };
    Ok(File::from(fd?))
}

fn accessed(found: &Metadata) -> SystemTime {
    found.accessed().unwrap_or(SystemTime::UNIX_EPOCH)
}
