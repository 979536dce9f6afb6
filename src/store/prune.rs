//! [`Store::prune`]: removes the least recently used.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use super::hold::Removing;
use super::inventory::{self, Exactness, sum};
use super::{Kind, Object, Store, StoreError, blob_name, remove_tree, tree};
use crate::image::Digest;

/// How many things are removed under one exclusive lock: builds that look something up wait
/// as long as renaming so many takes.
const BATCH: usize = 32;

/// What was used within the same minute counts as used together. A build uses a layer's
/// blob and its tree some seconds apart, and the tree has to go first: it can be made again
/// from the blob, but without the blob the step runs again, and the tree was of no use.
const TOGETHER_SECONDS: u64 = 60;

/// What is removed. With none of the amounts, everything that no running build uses.
#[derive(Clone, Debug, Default)]
pub struct PruneOptions {
    /// Also what sockless notes for itself: what servers said about files, and those files.
    pub all: bool,
    /// Only what was not used since.
    pub unused_since: Option<SystemTime>,
    /// Only these kinds, if any are given.
    pub kinds: BTreeSet<Kind>,
    /// Only the object of this name, or those whose names begin so.
    pub id: Option<String>,
    /// How much may be left, in bytes.
    pub max_used_bytes: Option<u64>,
    /// How much is always left, in bytes, whatever the other amounts say.
    pub reserved_bytes: Option<u64>,
    /// How much of the file system is to be free then, in bytes.
    pub min_free_bytes: Option<u64>,
    /// Removes nothing, but says what it would.
    pub dry_run: bool,
}

/// What was removed.
#[derive(Clone, Debug, Default)]
pub struct Pruned {
    /// In the order in which it went.
    pub removed: Vec<Object>,
    /// The bytes on disk that it took.
    pub bytes: u64,
    /// The bytes on disk that everything takes that is left.
    pub left_bytes: u64,
}

impl Store {
    /// Removes what `options` say, the least recently used first; never what a running build
    /// uses, this one included. What has a name stays complete: it is moved to `tmp/` first.
    ///
    /// A blob takes the records with it that name it. Where anything is removed, records
    /// whose blob is not there go first: they are of no use.
    ///
    /// # Errors
    /// [`StoreError::Io`]; what was removed before is gone.
    pub fn prune(&self, options: &PruneOptions) -> Result<Pruned, StoreError> {
        self.prune_with(options, Exactness::Now)
    }

    /// Removes the least recently used until everything together takes at most `limit_bytes`.
    ///
    /// # Errors
    /// As [`Store::prune`].
    pub fn limit(&self, limit_bytes: u64) -> Result<Pruned, StoreError> {
        let options = PruneOptions {
            all: true,
            max_used_bytes: Some(limit_bytes),
            ..PruneOptions::default()
        };
        self.prune_with(&options, Exactness::Remembered)
    }

    fn prune_with(
        &self,
        options: &PruneOptions,
        exactness: Exactness,
    ) -> Result<Pruned, StoreError> {
        let objects = self.inventory(exactness)?;
        let total = sum(&objects);
        let keep = match self.keep_bytes(options, total)? {
            Some(keep) if total <= keep => {
                return Ok(Pruned {
                    left_bytes: total,
                    ..Pruned::default()
                });
            }
            keep => keep,
        };
        let mut pruning = Pruning::new(self, options, objects, total);
        let order = pruning.order();
        let mut renamed = Vec::new();
        for batch in order.chunks(BATCH) {
            let removing = self.holds.remove()?;
            let held = removing.held(&self.root.join("tmp"))?;
            for &index in batch {
                if keep.is_some_and(|keep| pruning.left <= keep) && !pruning.is_useless(index) {
                    continue;
                }
                pruning.remove(index, &removing, &held, &mut renamed)?;
            }
            drop(removing);
            for path in renamed.drain(..) {
                self.remove_renamed(&path)?;
            }
        }
        Ok(Pruned {
            removed: pruning.removed,
            bytes: total - pruning.left,
            left_bytes: pruning.left,
        })
    }

    fn remove_renamed(&self, path: &Path) -> Result<(), StoreError> {
        match remove_tree(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(StoreError::io("removing", path)(error))
            }
            _ => Ok(()),
        }
    }

    /// How much may stay; absent where nothing may. As BuildKit counts it: the smaller of
    /// the two amounts, but at least what is reserved.
    fn keep_bytes(&self, options: &PruneOptions, total: u64) -> Result<Option<u64>, StoreError> {
        let free = match options.min_free_bytes {
            None => None,
            Some(wanted) => {
                let found = rustix::fs::statvfs(&self.root)
                    .map_err(io::Error::from)
                    .map_err(StoreError::io("asking for the free space of", &self.root))?;
                let free = found.f_bavail.saturating_mul(found.f_frsize);
                Some(total.saturating_sub(wanted.saturating_sub(free)))
            }
        };
        let keep = options.max_used_bytes.into_iter().chain(free).min();
        Ok(match (keep, options.reserved_bytes) {
            (Some(keep), Some(reserved)) => Some(keep.max(reserved)),
            (keep, reserved) => keep.or(reserved),
        })
    }
}

/// A removal under way.
struct Pruning<'p> {
    store: &'p Store,
    options: &'p PruneOptions,
    objects: Vec<Object>,
    /// Which records name a blob.
    records: BTreeMap<Digest, Vec<usize>>,
    /// The blobs that are there.
    blobs: BTreeSet<Digest>,
    /// Which objects are gone.
    gone: BTreeSet<usize>,
    removed: Vec<Object>,
    /// The bytes that are left.
    left: u64,
}

impl<'p> Pruning<'p> {
    fn new(store: &'p Store, options: &'p PruneOptions, objects: Vec<Object>, total: u64) -> Self {
        let mut records: BTreeMap<_, Vec<_>> = BTreeMap::new();
        let mut blobs = BTreeSet::new();
        for (index, object) in objects.iter().enumerate() {
            match (object.kind, &object.blob) {
                (Kind::Blob, Some(blob)) => drop(blobs.insert(blob.clone())),
                (_, Some(blob)) => records.entry(blob.clone()).or_default().push(index),
                (_, None) => {}
            }
        }
        Self {
            store,
            options,
            objects,
            records,
            blobs,
            gone: BTreeSet::new(),
            removed: Vec::new(),
            left: total,
        }
    }

    /// What may go, in the order in which it does.
    fn order(&self) -> Vec<usize> {
        let mut order: Vec<usize> = (0..self.objects.len())
            .filter(|&index| self.is_wanted(index))
            .collect();
        order.sort_by_cached_key(|&index| {
            let object = &self.objects[index];
            let used = object.last_used.duration_since(SystemTime::UNIX_EPOCH);
            let used = used.unwrap_or_default();
            (
                !self.is_useless(index),
                used.as_secs() / TOGETHER_SECONDS,
                object.kind,
                used,
                object.id.clone(),
            )
        });
        order
    }

    /// Whether it is a record that names no blob that is here.
    fn is_useless(&self, index: usize) -> bool {
        let object = &self.objects[index];
        matches!(object.kind, Kind::Step | Kind::Http)
            && object
                .blob
                .as_ref()
                .is_none_or(|blob| !self.blobs.contains(blob))
    }

    /// Whether the options ask for it.
    fn is_wanted(&self, index: usize) -> bool {
        let object = &self.objects[index];
        let options = self.options;
        let is_noted = |blob: &Digest| {
            let records = self.records.get(blob).map_or(&[][..], Vec::as_slice);
            let mut kinds = records.iter().map(|&record| self.objects[record].kind);
            kinds.any(|kind| kind == Kind::Http)
        };
        let is_own = match object.kind {
            Kind::Http => true,
            Kind::Blob => object.blob.as_ref().is_some_and(is_noted),
            Kind::Tree | Kind::Step | Kind::Note | Kind::Mount => false,
        };
        let is_old = |since: SystemTime| object.last_used < since;
        !object.in_use
            && (options.all || !is_own)
            && (options.kinds.is_empty() || options.kinds.contains(&object.kind))
            && options.unused_since.is_none_or(is_old)
            && options
                .id
                .as_deref()
                .is_none_or(|id| object.id.starts_with(id))
    }

    /// Removes one object, and what is useless without it, unless somebody has used it since
    /// it was listed. What takes long to remove is only moved, and added to `renamed`.
    fn remove(
        &mut self,
        index: usize,
        removing: &Removing<'_>,
        held: &BTreeSet<String>,
        renamed: &mut Vec<PathBuf>,
    ) -> Result<(), StoreError> {
        let object = &self.objects[index];
        if self.gone.contains(&index) || !is_unused(object, removing, held)? {
            return Ok(());
        }
        if object.kind != Kind::Blob {
            return self.take(index, renamed);
        }
        // First what names it, so that nothing that is found is ever missing.
        let records = object.blob.as_ref().and_then(|blob| self.records.get(blob));
        for record in records.cloned().unwrap_or_default() {
            if !self.gone.contains(&record) {
                self.take(record, renamed)?;
            }
        }
        self.take(index, renamed)
    }

    fn take(&mut self, index: usize, renamed: &mut Vec<PathBuf>) -> Result<(), StoreError> {
        let object = &self.objects[index];
        if !self.options.dry_run {
            match object.kind {
                Kind::Tree | Kind::Mount => {
                    let old = self.store.tmp_dir("old-")?;
                    let moved = fs::rename(&object.path, old.join(object.kind.name()));
                    renamed.push(old);
                    ignore_gone(moved).map_err(StoreError::io("removing", &object.path))?;
                }
                Kind::Blob | Kind::Step | Kind::Http | Kind::Note => {
                    let removed = fs::remove_file(&object.path);
                    ignore_gone(removed).map_err(StoreError::io("removing", &object.path))?;
                }
            }
            match object.kind {
                Kind::Step | Kind::Note => remove_if_empty(&object.path)?,
                Kind::Mount => remove_if_nameless(&object.path)?,
                Kind::Tree | Kind::Blob | Kind::Http => {}
            }
        }
        self.left = self.left.saturating_sub(object.bytes);
        self.gone.insert(index);
        self.removed.push(object.clone());
        Ok(())
    }
}

/// Whether nobody holds the object, and nobody has used it since it was listed.
fn is_unused(
    object: &Object,
    removing: &Removing<'_>,
    held: &BTreeSet<String>,
) -> Result<bool, StoreError> {
    let name = match object.kind {
        Kind::Tree => Some(tree::hold_name(&object.id)),
        Kind::Blob | Kind::Step | Kind::Http => object.blob.as_ref().map(blob_name),
        // Whoever reads one has it open.
        Kind::Note | Kind::Mount => None,
    };
    if name.is_some_and(|name| held.contains(&name)) {
        return Ok(false);
    }
    let path = object.time_path();
    if object.kind == Kind::Mount && inventory::is_locked(&path, removing)? {
        return Ok(false);
    }
    Ok(match inventory::file(&path)? {
        Some(found) => found.accessed().ok() == Some(object.last_used),
        // A mount whose maker was killed before it had a lock, unless it has one now.
        None => object.kind == Kind::Mount,
    })
}

/// Removes the directory of the file at `path` where that was the last one.
fn remove_if_empty(path: &Path) -> Result<(), StoreError> {
    let Some(dir) = path.parent() else {
        return Ok(());
    };
    match fs::remove_dir(dir) {
        Err(error)
            if !matches!(
                error.kind(),
                io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::NotFound
            ) =>
        {
            Err(StoreError::io("removing", dir)(error))
        }
        _ => Ok(()),
    }
}

/// Removes what names the cache mount at `path`, where there is no other of that name.
fn remove_if_nameless(path: &Path) -> Result<(), StoreError> {
    let Some(all) = path.parent() else {
        return Ok(());
    };
    let mut others = 0;
    inventory::each(all, |_, name| {
        others += usize::from(name != "name");
        Ok(())
    })?;
    if others == 0 {
        let name = all.join("name");
        ignore_gone(fs::remove_file(&name)).map_err(StoreError::io("removing", &name))?;
        remove_if_empty(&name)?;
    }
    Ok(())
}

pub(super) fn ignore_gone(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}
