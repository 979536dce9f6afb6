//! The cache: what steps made, here and on other machines, and how it travels.
//!
//! ```text
//! records    what a step made, and where that is written on this machine
//! document   records and cache mounts as documents of a registry
//! import     caches of other machines
//! lost       what they no longer have when it is needed
//! chunks     streams in chunks that changes leave alone
//! contents   a cache mount as two streams
//! mounts     cache mounts that come and go
//! ```
//!
//! A step asks this machine first and waits for other caches only where that has nothing. A
//! record of another machine is used where its layer can be had: a registry is asked whether
//! it has the blob, and then the layer stays there until a step reads it; from a layout the
//! blob is copied into the store. Such a record is written into the store as BuildKit does
//! it, so that the next build knows it without the other cache; until the blob is here too,
//! it is passed over there.
//!
//! Of steps whose layers are not exported, a cache says which layers they made. That is enough to
//! find the steps after them, as long as nobody needs the layers themselves.
//!
//! Whatever fails here is told and costs time, never the build. A layer that is not there when
//! it is read has the build begin again without it ([`LostLayer`]).

mod chunks;
mod contents;
mod document;
mod import;
mod lost;
mod mounts;
mod records;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use serde_json::Value;

use super::content::ContentManifest;
use super::layer::{Layer, Origin};
use super::twins::Made;
use super::{Engine, Timings};
use crate::image::{Descriptor, DiffId, Digest, ImageLayer, RawManifest, Repository};
use crate::plan::Joined;
use crate::store::Store;

pub use import::{CacheSource, Imported, Importing};

pub(crate) use document::INLINE_KEY;
pub(crate) use import::import;
pub(super) use lost::LostLayer;
pub(crate) use mounts::PackedMounts;
pub(super) use records::{Definition, Inputs, Record, all as all_records};

use document::CONFIG_TYPE;

/// What a build knows of caches.
pub(super) struct Cache {
    importing: Importing,
    /// The numbers of the steps whose layers the result has.
    wanted: BTreeSet<usize>,
    steps: Mutex<Vec<CachedStep>>,
    /// The numbers of the steps that were done here and recorded.
    done: Mutex<BTreeSet<usize>>,
    /// The names of cache mounts that steps had.
    taken: Mutex<BTreeSet<String>>,
    /// The names of cache mounts of all steps, as far as they are known without any layer.
    named: BTreeSet<String>,
    /// The IDs of cache mounts that begin anew.
    forgotten: BTreeSet<String>,
}

/// A step that was done or found, and its layer.
#[derive(Clone, Debug)]
struct CachedStep {
    number: usize,
    record: Record,
    /// Where the blob can be fetched, if the store may not have it.
    origin: Option<Repository>,
    /// Whether there is a blob at all: not of what was found without its layer.
    has_layer: bool,
    is_of_result: bool,
}

/// A record that was found.
pub(super) struct Hit {
    record: Record,
    elsewhere: Option<Elsewhere>,
    is_imported: bool,
    /// What the step read, where its record is imported and says it.
    content: Option<ContentManifest>,
    /// The layer, where this build made it.
    layer: Option<Arc<Layer>>,
}

impl Hit {
    /// The record of an equal step of this build.
    pub(super) fn made(made: &Made) -> Self {
        Self {
            record: made.record.clone(),
            elsewhere: None,
            is_imported: false,
            content: None,
            layer: Some(Arc::clone(&made.layer)),
        }
    }
}

/// Where the blob of a record is that the store does not have.
struct Elsewhere {
    /// The registry that has it; none where the cache was exported without it.
    repository: Option<Repository>,
    cache: CacheSource,
}

impl Cache {
    pub(super) fn new(
        importing: Importing,
        plan: &Joined,
        wanted: BTreeSet<usize>,
        forgotten: BTreeSet<String>,
    ) -> Self {
        Self {
            importing,
            wanted,
            steps: Mutex::default(),
            done: Mutex::default(),
            taken: Mutex::default(),
            named: plan.steps.iter().flat_map(mounts::names).collect(),
            forgotten,
        }
    }

    /// The caches of other machines; waits until they are read.
    pub(super) async fn imported(&self) -> Arc<Imported> {
        self.importing.clone().await
    }

    /// The numbers of the steps that were done here and recorded.
    pub(super) fn done(&self) -> BTreeSet<usize> {
        let done = self.done.lock();
        done.expect("nothing panics while it holds this lock")
            .clone()
    }

    /// What there is to export when all steps are done.
    pub(super) fn contents(&self) -> CacheContents {
        let steps = self.steps.lock();
        let mut steps =
            std::mem::take(&mut *steps.expect("nothing panics while it holds this lock"));
        // Steps end in any order, and the same build makes the same document.
        steps.sort_by_key(|step| step.number);
        let taken = self.taken.lock();
        CacheContents {
            steps,
            taken: taken
                .expect("nothing panics while it holds this lock")
                .clone(),
            named: self.named.clone(),
            importing: self.importing.clone(),
        }
    }
}

impl Engine {
    /// Whether a step with this definition may have been recorded on the layers `below`, base
    /// first, as far as these are known yet.
    pub(super) async fn may_have(
        &self,
        definition: &Definition,
        below: Vec<Option<DiffId>>,
    ) -> bool {
        // Where all are known, looking it up costs less.
        let may_be_here = records::has_definition(&self.store, definition)
            && (below.iter().all(Option::is_some) || {
                let (store, definition) = (Arc::clone(&self.store), definition.clone());
                let reading = move || Ok(records::may_have(&store, &definition, &below));
                // A task that ended abnormally has said nothing.
                self.blocking(reading).await.unwrap_or(true)
            });
        may_be_here || self.cache.imported().await.has_definition(definition)
    }

    /// The record of a step on these inputs, under any of their keys, if its layer can be had.
    pub(super) async fn look_up(&self, definition: &Definition, inputs: &Inputs) -> Option<Hit> {
        let keys = inputs.keys();
        let mut here = keys.iter();
        let here = here.find_map(|key| records::look_up(&self.store, definition, key));
        if let Some(record) = here {
            return Some(Hit {
                record,
                elsewhere: None,
                is_imported: false,
                content: None,
                layer: None,
            });
        }
        let imported = self.cache.imported().await;
        for found in imported.look_up(definition, &keys) {
            let descriptor = &found.record.descriptor;
            let elsewhere = match &found.origin {
                _ if self.store.has_blob_of(descriptor) => None,
                _ if !found.has_layer => Some(Elsewhere {
                    repository: None,
                    cache: found.cache.clone(),
                }),
                Origin::Registry(repository) => {
                    let digest = &descriptor.digest;
                    let answer = imported.has(&self.client, repository, digest, &self.progress);
                    if !answer.await {
                        continue;
                    }
                    Some(Elsewhere {
                        repository: Some(repository.clone()),
                        cache: found.cache.clone(),
                    })
                }
                Origin::Layout(layout) => {
                    let (layout, store) = (layout.clone(), Arc::clone(&self.store));
                    let wanted = descriptor.clone();
                    let copying = self.blocking(move || Ok(layout.import(&wanted, &store)?));
                    if let Err(error) = copying.await {
                        self.warn(format!("a layer of a cache is not used: {error:#}"));
                        continue;
                    }
                    None
                }
            };
            return Some(Hit {
                record: Record {
                    definition: definition.value().clone(),
                    ..found.record.clone()
                },
                elsewhere,
                is_imported: true,
                content: found
                    .record
                    .inputs
                    .content
                    .as_ref()
                    .and_then(|digest| imported.content(digest)),
                layer: None,
            });
        }
        None
    }

    /// The layer of a record that was found for step `number`, of whose inputs `inputs` are
    /// known now.
    pub(super) fn layer_of(
        &self,
        (number, definition): (usize, &Definition),
        inputs: Inputs,
        hit: Hit,
    ) -> Arc<Layer> {
        let Hit {
            mut record,
            elsewhere,
            is_imported,
            content,
            layer,
        } = hit;
        if let Some(content) = content {
            self.keep_content(&content);
        }
        // The layers that are read may be others than last time, and what is read of them may
        // not have been looked at.
        let whole = Inputs {
            content: inputs.content.or_else(|| record.inputs.content.clone()),
            ..inputs
        };
        let has_layer = elsewhere
            .as_ref()
            .is_none_or(|found| found.repository.is_some());
        if is_imported || record.inputs != whole {
            record.inputs = whole;
            // Of what is nowhere nobody here can make use later.
            if has_layer {
                self.write_record(definition, &record);
            }
        }
        let names = ImageLayer {
            diff_id: record.diff_id.clone(),
            descriptor: record.descriptor.clone(),
        };
        let created = record.created.clone();
        let origin = elsewhere.as_ref().and_then(|e| e.repository.clone());
        self.note_step(number, record, origin, has_layer);
        if let Some(layer) = layer {
            return layer;
        }
        Arc::new(match elsewhere {
            Some(Elsewhere { repository, cache }) => {
                Layer::cached_elsewhere(names, created, repository, cache)
            }
            None => Layer::sealed(names, Some(created)),
        })
    }

    /// Records what step `number` made.
    pub(super) fn record(&self, number: usize, definition: &Definition, record: Record) {
        self.write_record(definition, &record);
        let done = self.cache.done.lock();
        done.expect("nothing panics while it holds this lock")
            .insert(number);
        self.note_step(number, record, None, true);
    }

    /// Keeps the list of what a step read, so that a later miss can be told in names; gives
    /// its digest. Blocking.
    pub(super) fn keep_content(&self, content: &ContentManifest) -> Digest {
        let digest = content.digest();
        let path = self.store.content_path(&digest);
        if !path.exists()
            && let Err(error) = self.store.write_file(&path, &content.to_text())
        {
            tracing::debug!(%digest, %error, "what a step read is not kept");
        }
        digest
    }

    fn write_record(&self, definition: &Definition, record: &Record) {
        if let Err(error) = records::record(&self.store, definition, record) {
            self.warn(format!(
                "the step {:?} is not cached: {:#}",
                record.name,
                anyhow::Error::new(error)
            ));
        }
    }

    fn note_step(
        &self,
        number: usize,
        record: Record,
        origin: Option<Repository>,
        has_layer: bool,
    ) {
        let step = CachedStep {
            number,
            record,
            origin,
            has_layer,
            is_of_result: self.cache.wanted.contains(&number),
        };
        let steps = self.cache.steps.lock();
        steps
            .expect("nothing panics while it holds this lock")
            .push(step);
    }
}

/// What there is to export of a build, or of several.
#[derive(Clone, Debug)]
pub struct CacheContents {
    steps: Vec<CachedStep>,
    taken: BTreeSet<String>,
    named: BTreeSet<String>,
    importing: Importing,
}

/// Where the bytes of a blob of a cache are.
#[derive(Clone, Debug)]
pub(crate) enum BlobSource {
    /// In the store.
    Store,
    /// In a file.
    File(PathBuf),
    /// Elsewhere.
    Origin(Origin),
}

/// A blob of a cache.
#[derive(Clone, Debug)]
pub(crate) struct CacheBlob {
    pub(crate) descriptor: Descriptor,
    pub(crate) source: BlobSource,
    /// Whether the image has it too, as a layer.
    pub(crate) is_of_result: bool,
}

/// A cache that is ready to go somewhere.
#[derive(Debug)]
pub(crate) struct CacheDocument {
    /// Names config and blobs.
    pub(crate) manifest: RawManifest,
    /// The config's bytes.
    pub(crate) config: Vec<u8>,
    /// The config's descriptor.
    pub(crate) config_descriptor: Descriptor,
    /// Everything else that the manifest names.
    pub(crate) blobs: Vec<CacheBlob>,
    /// What is not in it although it was to be, for people.
    pub(crate) notes: Vec<String>,
}

impl CacheContents {
    /// What several builds of one run have together, such as those of several platforms.
    #[must_use]
    pub fn join(mut self, others: impl IntoIterator<Item = Self>) -> Self {
        for other in others {
            self.steps.extend(other.steps);
            self.taken.extend(other.taken);
            self.named.extend(other.named);
        }
        self
    }

    /// The caches of other machines; waits until they are read.
    pub(crate) async fn imported(&self) -> Arc<Imported> {
        self.importing.clone().await
    }

    /// What the config of an image of these layers, base first, says of those that this build
    /// made or found.
    pub(crate) fn inline(&self, layers: &[ImageLayer]) -> Value {
        let mut rest = layers.iter().enumerate();
        let (of_result, others): (Vec<_>, Vec<_>) =
            self.steps.iter().partition(|step| step.is_of_result);
        // Steps and layers are in the same order, and some layers are of no step.
        let records = of_result.into_iter().filter_map(|step| {
            let mut ahead = rest.clone();
            let (place, _) = ahead.find(|(_, layer)| {
                layer.diff_id == step.record.diff_id
                    && layer.descriptor.digest == step.record.descriptor.digest
            })?;
            rest = ahead;
            Some((place, &step.record))
        });
        document::inline(records, others.into_iter().map(|step| &step.record))
    }

    /// The cache as documents: with the layers of all steps, or where not `max` of those whose
    /// layers the result has; of the others it says what they made. Steps whose layers are
    /// `lost` are left out. Absent with too many blobs for a manifest.
    pub(crate) fn document(
        &self,
        store: &Store,
        max: bool,
        mounts: &PackedMounts,
        lost: &BTreeSet<Digest>,
    ) -> Option<CacheDocument> {
        let mut notes = mounts.notes.clone();
        let mut blobs: BTreeMap<_, CacheBlob> = BTreeMap::new();
        let mut records: Vec<&Record> = Vec::new();
        let mut results: Vec<&Record> = Vec::new();
        for step in &self.steps {
            if !(max || step.is_of_result) {
                results.push(&step.record);
                continue;
            }
            let descriptor = &step.record.descriptor;
            let source = match &step.origin {
                _ if store.has_blob_of(descriptor) => BlobSource::Store,
                Some(_) if lost.contains(&descriptor.digest) => continue,
                Some(origin) => BlobSource::Origin(Origin::Registry(origin.clone())),
                None if !step.has_layer => {
                    results.push(&step.record);
                    continue;
                }
                None => {
                    notes.push(format!(
                        "the step {:?} is left out: its layer is no longer in the store",
                        step.record.name
                    ));
                    continue;
                }
            };
            let blob = blobs.entry(descriptor.digest.clone());
            let blob = blob.or_insert_with(|| CacheBlob {
                descriptor: Descriptor::new(
                    descriptor.media_type.clone(),
                    descriptor.digest.clone(),
                    descriptor.size,
                ),
                source,
                is_of_result: false,
            });
            blob.is_of_result |= step.is_of_result;
            if !records.contains(&&step.record) {
                records.push(&step.record);
            }
        }
        let mut once = Vec::new();
        for result in results {
            if !records.contains(&result) && !once.contains(&result) {
                once.push(result);
            }
        }
        let results = once;
        for (descriptor, source) in &mounts.blobs {
            let blob = blobs.entry(descriptor.digest.clone());
            blob.or_insert_with(|| CacheBlob {
                descriptor: descriptor.clone(),
                source: source.clone(),
                is_of_result: false,
            });
        }
        let blobs: Vec<CacheBlob> = blobs.into_values().collect();
        let read = records.iter().chain(&results);
        let read = read.filter_map(|record| record.inputs.content.as_ref());
        let contents = document::contents(read, |digest| fs::read(store.content_path(digest)).ok());
        let config = document::config(&records, &results, &mounts.mounts, &contents);
        let descriptors = blobs.iter().map(|blob| blob.descriptor.clone());
        Some(CacheDocument {
            manifest: document::manifest(&config, descriptors.collect())?,
            config_descriptor: Descriptor::of(CONFIG_TYPE, &config),
            config,
            blobs,
            notes,
        })
    }
}
