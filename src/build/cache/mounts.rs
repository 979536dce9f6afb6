//! Cache mounts that come from another machine's cache and go to one.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context as _;

use super::contents;
use super::document::{Chunk, MOUNT_LIMIT_BYTES, MountContents};
use super::import::read_chunks;
use super::{BlobSource, CacheContents, Engine, Imported};
use crate::build::cache_mount::{self, DETAIL, Reading};
use crate::build::mounts::fixed_cache_names;
use crate::image::{Descriptor, Digest};
use crate::plan::{Operation, Step};
use crate::progress::{BuildEvent, millis};
use crate::store::Store;

/// The names of the cache mounts of a step, as far as they are known without any layer.
pub(super) fn names(step: &Step) -> BTreeSet<String> {
    match &step.operation {
        Operation::Run(run) => fixed_cache_names(run),
        _ => BTreeSet::new(),
    }
}

impl Engine {
    /// Says that a step has the cache mount `name`.
    pub(in crate::build) fn note_cache_mount(&self, name: &str) {
        let taken = self.cache.taken.lock();
        taken
            .expect("nothing panics while it holds this lock")
            .insert(name.to_owned());
    }

    /// Makes the cache mount `name` in the empty directory `dir` as an imported cache has it,
    /// and gives its path. Absent where none has it, where the build begins without the cache,
    /// and, with a warning, where that fails; `dir` is empty then. Blocking, on the runtime's
    /// threads.
    pub(in crate::build) fn restore_cache_mount(&self, name: &str, dir: &Path) -> Option<PathBuf> {
        let id = name.split(DETAIL).next().unwrap_or_default();
        if self.cache.forgotten.contains(id) {
            return None;
        }
        let imported = tokio::runtime::Handle::current().block_on(self.cache.imported());
        let (mount, origin) = imported.mounts.get(name)?;
        let started = std::time::Instant::now();
        let task = format!("restore {name}");
        self.progress.event(BuildEvent::TaskStarted {
            id: task.clone(),
            name: format!("restoring the cache mount {:?}", shown(name)),
            total_bytes: Some(mount.chunks().map(|chunk| chunk.size).sum()),
        });
        let entries = read_chunks(&self.client, origin, &mount.entries);
        let content = read_chunks(&self.client, origin, &mount.content);
        let made = contents::restore(entries, content, dir);
        let outcome = match &made {
            Ok(_) => "",
            Err(_) => "failed",
        };
        self.progress.event(BuildEvent::TaskDone {
            id: task,
            outcome: outcome.to_owned(),
            duration_ms: millis(started.elapsed()),
        });
        self.timings.add("cache import", started.elapsed());
        let error = match made {
            Ok(made) => return Some(made),
            Err(error) => error,
        };
        self.warn(format!(
            "the cache mount {:?} begins empty: restoring it: {error:#}",
            shown(name)
        ));
        let emptied = crate::confined::remove_tree(dir).and_then(|()| fs::create_dir(dir));
        if let Err(error) = emptied {
            // Filling it fails next, with its own error.
            tracing::warn!(dir = %dir.display(), %error, "an incomplete cache mount stays");
        }
        None
    }
}

/// A cache mount's ID as people wrote it.
fn shown(name: &str) -> &str {
    let id = name.split(DETAIL).next().unwrap_or_default();
    id.trim_start_matches('/')
}

/// Cache mounts that are ready to go.
#[derive(Debug, Default)]
pub(crate) struct PackedMounts {
    pub(super) mounts: Vec<MountContents>,
    pub(super) blobs: Vec<(Descriptor, BlobSource)>,
    /// What is not in it, for people.
    pub(super) notes: Vec<String>,
}

impl CacheContents {
    /// Reads the cache mounts of this build, which began with those of `imported`: those that steps had, and those of steps that had
    /// not to run, where no imported cache has them. What an imported cache has and no step
    /// had stays as it is there. Chunks are written below the store's `tmp/`. Blocking.
    ///
    /// # Errors
    /// That the store cannot be written. A cache mount that cannot be read is a note.
    pub(crate) fn pack_mounts(
        &self,
        imported: &Imported,
        store: &Store,
        is_cancelled: &dyn Fn() -> bool,
    ) -> anyhow::Result<PackedMounts> {
        let mut packed = PackedMounts::default();
        let known = imported.chunks();
        let dir = store.tmp_dir("chunks-")?;
        let known_chunk = |digest: &_| known.get(digest).map(|(chunk, _)| (*chunk).clone());
        let mut names = self.taken.clone();
        let theirs = imported.mounts.keys();
        let untouched: BTreeSet<String> = theirs
            .filter(|name| !names.contains(*name))
            .cloned()
            .collect();
        names.extend(self.named.difference(&untouched).cloned());
        for name in &names {
            let reading = cache_mount::read(store, name)?;
            let files = match &reading {
                Reading::Nothing => continue,
                Reading::InUse => {
                    let kept = packed.keep(imported, name);
                    packed.notes.push(format!(
                        "the cache mount {:?} is in use by another build{kept}",
                        shown(name)
                    ));
                    continue;
                }
                Reading::Files { files, .. } => files,
            };
            let made = contents::pack(files, &known_chunk, &dir, is_cancelled);
            drop(reading);
            let made = match made {
                Ok(made) => made,
                Err(error) if is_cancelled() => return Err(error),
                Err(error) => {
                    let kept = packed.keep(imported, name);
                    packed.notes.push(format!(
                        "the cache mount {:?} cannot be read{kept}: {error:#}",
                        shown(name)
                    ));
                    continue;
                }
            };
            for device in &made.devices {
                packed.notes.push(format!(
                    "the device {device:?} in the cache mount {:?} is left out",
                    shown(name)
                ));
            }
            let mount = MountContents {
                name: name.clone(),
                entries: made.entries,
                content: made.content,
            };
            let bytes: u64 = mount.chunks().map(|chunk| chunk.bytes).sum();
            if bytes > MOUNT_LIMIT_BYTES {
                packed.notes.push(format!(
                    "the cache mount {:?} is left out: it has {bytes} bytes, at most {MOUNT_LIMIT_BYTES} travel",
                    shown(name)
                ));
                continue;
            }
            packed.add(mount, |chunk| {
                let path = dir.join(chunk.blob.hex());
                if path.exists() {
                    return Some(BlobSource::File(path));
                }
                let (_, origin) = known.get(&chunk.digest)?;
                Some(BlobSource::Origin((*origin).clone()))
            })?;
        }
        for name in &untouched {
            packed.keep(imported, name);
        }
        packed.mounts.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(packed)
    }
}

impl PackedMounts {
    /// Whether it has a blob.
    pub(crate) fn has(&self, digest: &Digest) -> bool {
        let mut blobs = self.blobs.iter();
        blobs.any(|(descriptor, _)| descriptor.digest == *digest)
    }

    /// Takes what the imported caches have of a cache mount; says so, to be read after a reason.
    fn keep(&mut self, imported: &Imported, name: &str) -> &'static str {
        let Some((mount, origin)) = imported.mounts.get(name) else {
            return " and is left out";
        };
        let from = |_: &Chunk| Some(BlobSource::Origin(origin.clone()));
        match self.add(mount.clone(), from) {
            Ok(()) => "; the cache keeps what it had of it",
            Err(_) => " and is left out",
        }
    }

    fn add(
        &mut self,
        mount: MountContents,
        source: impl Fn(&Chunk) -> Option<BlobSource>,
    ) -> anyhow::Result<()> {
        for chunk in mount.chunks() {
            let source = source(chunk).context("a chunk that was made is gone")?;
            self.blobs.push((chunk.descriptor(), source));
        }
        self.mounts.push(mount);
        Ok(())
    }
}
