//! The caches of other machines: their records and cache mounts, read once while the build
//! begins. Layers and chunks stay where they are until somebody reads them.
//!
//! Whoever names a cache trusts it: a record says which layer is the result of a step, and
//! nothing can prove that. What is checked is that bytes are those that were named, and that
//! nothing gets out of its place.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::io::{self, Read};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use anyhow::Context as _;
use futures_util::future::{BoxFuture, Shared, join_all};
use futures_util::{FutureExt as _, StreamExt as _, stream};
use tokio::io::AsyncReadExt as _;
use tokio_util::task::AbortOnDropHandle;

use super::super::content::ContentManifest;
use super::document::{
    self, CONFIG_LIMIT_BYTES, CONFIG_TYPE, Chunk, Contents, KnownResult, MountContents, Parsed,
};
use super::lost::{LostLayer, Without};
use super::records::{Definition, Inputs, Record};
use super::{Origin, Timings, contents};
use crate::image::{
    CONFIG_LIMIT_BYTES as IMAGE_CONFIG_LIMIT_BYTES, Descriptor, Digest, ImageConfig, Manifest,
    ManifestOrIndex, MediaType, Platform, RawManifest, Reference, Repository,
};
use crate::layout::Layout;
use crate::progress::{BuildEvent, Progress};
use crate::registry::Client;
use crate::store::Store;

/// How many manifests of an index are read: one for each platform.
const PLATFORMS_LIMIT: usize = 32;

/// How many layers are asked after at once, before anybody wants them.
const PARALLEL_QUESTIONS: usize = 8;

/// After how many layers is asked ahead; after the rest when a step wants them.
const QUESTIONS_AHEAD: usize = 256;

/// How many chunks are on their way at once; each has 4 MiB at most.
const PARALLEL_CHUNKS: usize = 8;

/// `--cache-from`: where a cache is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CacheSource {
    /// `type=registry`: a cache, or an image with the records of its layers in it.
    Registry(Reference),
    /// `type=local`: an OCI image layout.
    Local {
        /// Its directory.
        dir: PathBuf,
        /// The cache's name in it.
        tag: String,
        /// Its digest, which wins.
        digest: Option<Digest>,
    },
}

impl fmt::Display for CacheSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Registry(reference) => reference.fmt(f),
            Self::Local {
                dir,
                digest: Some(digest),
                ..
            } => write!(f, "{}@{digest}", dir.display()),
            Self::Local { dir, tag, .. } => write!(f, "{}:{tag}", dir.display()),
        }
    }
}

/// A record of another machine.
pub(super) struct Found {
    pub(super) record: Record,
    pub(super) origin: Origin,
    pub(super) cache: CacheSource,
    /// Whether the layer was exported.
    pub(super) has_layer: bool,
}

/// Whether a registry has a blob.
type Answer = Shared<BoxFuture<'static, bool>>;

/// All caches together; of two that know the same, the first one counts.
#[derive(Default)]
pub struct Imported {
    /// By definition and key.
    records: HashMap<(Digest, Digest), Arc<Found>>,
    /// Those whose layers were not exported.
    results: HashMap<(Digest, Digest), Arc<Found>>,
    /// Whether such a layer was needed, so that they are of no use.
    needs_layers: AtomicBool,
    definitions: HashSet<Digest>,
    /// All of them, each once, in the order in which they were read.
    all: Vec<Arc<Found>>,
    /// What steps read, by digest.
    contents: Contents,
    pub(super) mounts: BTreeMap<String, (MountContents, Origin)>,
    /// Whether registries have layers; each is asked once.
    answers: Mutex<HashMap<(Repository, Digest), Answer>>,
    /// What registries turned out not to have, although they said so.
    lost: Mutex<HashMap<Repository, Without>>,
    _asking: Option<AbortOnDropHandle<()>>,
}

impl fmt::Debug for Imported {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "Imported({} keys, {} cache mounts)",
            self.records.len(),
            self.mounts.len()
        )
    }
}

/// Gives the caches when they are read; may be asked any number of times.
pub type Importing = Shared<BoxFuture<'static, Arc<Imported>>>;

/// Starts to read `sources`; ends when nobody waits for it any more.
///
/// What is not there or broken is a warning: a cache never fails a build.
pub(crate) fn import(
    client: &Client,
    store: &Arc<Store>,
    sources: Vec<CacheSource>,
    progress: &Arc<dyn Progress>,
    timings: &Arc<Timings>,
) -> Importing {
    if sources.is_empty() {
        return std::future::ready(Arc::default()).boxed().shared();
    }
    let (client, store) = (client.clone(), Arc::clone(store));
    let (progress, timings) = (Arc::clone(progress), Arc::clone(timings));
    let task = tokio::spawn(async move {
        let started = Instant::now();
        let imported = read_all(&client, &store, &sources, &progress).await;
        timings.add("cache import", started.elapsed());
        Arc::new(imported)
    });
    let task = AbortOnDropHandle::new(task);
    // What panics there has said so.
    async move { task.await.unwrap_or_default() }
        .boxed()
        .shared()
}

async fn read_all(
    client: &Client,
    store: &Arc<Store>,
    sources: &[CacheSource],
    progress: &Arc<dyn Progress>,
) -> Imported {
    let reading = sources.iter().map(|source| async move {
        let read = match source {
            CacheSource::Registry(reference) => read_registry(client, reference).await,
            CacheSource::Local { dir, tag, digest } => {
                let (dir, tag, digest) = (dir.clone(), tag.clone(), digest.clone());
                let reading = move || {
                    let layout = Layout::open(&dir)?;
                    read_layout(&layout, &tag, digest.as_ref())
                };
                let task = tokio::task::spawn_blocking(reading);
                task.await.context("a task ended abnormally").flatten()
            }
        };
        (source, read)
    });
    let warn = |message| progress.event(BuildEvent::Warning { message });
    let mut imported = Imported::default();
    for (source, read) in join_all(reading).await {
        match read {
            Ok((parsed, origin)) => {
                if parsed.ignored > 0 {
                    warn(format!(
                        "{} entries of the cache {source} are malformed and are not used",
                        parsed.ignored
                    ));
                }
                imported.add(parsed, &origin, source);
            }
            Err(error) => warn(format!("the cache {source} is not used: {error:#}")),
        }
    }
    imported.ask_ahead(client, store, progress);
    imported
}

async fn read_registry(client: &Client, reference: &Reference) -> anyhow::Result<(Parsed, Origin)> {
    let repository = reference.repository();
    let mut manifests = Vec::new();
    let first = client.fetch_manifest(reference).await?;
    match first.parse()? {
        ManifestOrIndex::Manifest(manifest) => manifests.push(manifest),
        ManifestOrIndex::Index(index) => {
            let real = |d: &&Descriptor| {
                let is_unknown = |p: &Platform| p.os == "unknown";
                d.media_type.is_manifest() && !d.platform.as_ref().is_some_and(is_unknown)
            };
            for descriptor in index.manifests.iter().filter(real).take(PLATFORMS_LIMIT) {
                let one = reference.with_digest(descriptor.digest.clone());
                if let ManifestOrIndex::Manifest(manifest) =
                    client.fetch_manifest(&one).await?.parse()?
                {
                    manifests.push(manifest);
                }
            }
        }
    }
    let mut all = Vec::new();
    for manifest in manifests {
        let config = &manifest.config;
        check_config(config)?;
        let mut bytes = Vec::new();
        let mut blob = client.open_blob(repository, config).await?;
        blob.read_to_end(&mut bytes)
            .await
            .context("reading its config")?;
        all.push((manifest, bytes));
    }
    let origin = Origin::Registry(repository.clone());
    Ok((parse(all)?, origin))
}

fn read_layout(
    layout: &Layout,
    tag: &str,
    digest: Option<&Digest>,
) -> anyhow::Result<(Parsed, Origin)> {
    let raw: RawManifest = layout.find(tag, digest)?;
    let manifest = match raw.parse()? {
        ManifestOrIndex::Manifest(manifest) => manifest,
        ManifestOrIndex::Index(_) => anyhow::bail!("it is an index, and no cache"),
    };
    check_config(&manifest.config)?;
    let mut bytes = Vec::new();
    layout
        .open_blob(&manifest.config)?
        .read_to_end(&mut bytes)
        .context("reading its config")?;
    let origin = Origin::Layout(layout.clone());
    Ok((parse(vec![(manifest, bytes)])?, origin))
}

/// Refuses what is no cache or too large, before it is read.
fn check_config(config: &Descriptor) -> anyhow::Result<()> {
    let limit = match &config.media_type {
        media_type if *media_type == CONFIG_TYPE => CONFIG_LIMIT_BYTES,
        media_type if is_image(media_type) => IMAGE_CONFIG_LIMIT_BYTES,
        other => anyhow::bail!(
            "its config is {:?}, so it is neither a cache of sockless nor an image",
            other.as_str()
        ),
    };
    anyhow::ensure!(
        config.size <= limit,
        "its config has {} bytes, at most {limit} are read",
        config.size
    );
    Ok(())
}

fn is_image(media_type: &MediaType) -> bool {
    *media_type == MediaType::CONFIG || *media_type == MediaType::DOCKER_CONFIG
}

/// What manifests with their configs say together.
fn parse(all: Vec<(Manifest, Vec<u8>)>) -> anyhow::Result<Parsed> {
    let mut whole = None;
    for (manifest, bytes) in all {
        let parsed = if is_image(&manifest.config.media_type) {
            let config = ImageConfig::parse_for(&manifest, &bytes).map_err(anyhow::Error::msg)?;
            document::parse_inline(&manifest, &config)
        } else {
            document::parse(&manifest, &bytes).map(Some)
        };
        if let Some(parsed) = parsed
            .map_err(anyhow::Error::msg)
            .context("reading its config")?
        {
            let whole: &mut Parsed = whole.get_or_insert_default();
            whole.records.extend(parsed.records);
            whole.results.extend(parsed.results);
            whole.mounts.extend(parsed.mounts);
            whole.contents.extend(parsed.contents);
            whole.ignored += parsed.ignored;
        }
    }
    whole.context("the image has no cache in it; build it with --cache-to type=inline")
}

impl Imported {
    fn add(&mut self, parsed: Parsed, origin: &Origin, cache: &CacheSource) {
        let records = parsed.records.into_iter().map(|record| {
            let definition = Definition::of_record(&record.definition).digest().clone();
            (definition, record, true)
        });
        let results = parsed.results.into_iter();
        let results = results.map(|KnownResult { definition, record }| (definition, record, false));
        for (definition, record, has_layer) in records.chain(results) {
            let keys = record.inputs.keys();
            let found = Arc::new(Found {
                record,
                origin: origin.clone(),
                cache: cache.clone(),
                has_layer,
            });
            let known = if has_layer {
                &mut self.records
            } else {
                &mut self.results
            };
            for key in keys {
                known
                    .entry((definition.clone(), key.digest()))
                    .or_insert_with(|| Arc::clone(&found));
            }
            self.definitions.insert(definition);
            self.all.push(found);
        }
        for (digest, packed) in parsed.contents {
            self.contents.entry(digest).or_insert(packed);
        }
        for mount in parsed.mounts {
            self.mounts
                .entry(mount.name.clone())
                .or_insert_with(|| (mount, origin.clone()));
        }
    }

    /// Asks registries whether they have the layers, so that the answer is there when a step
    /// asks; a registry may have removed what nothing but the cache names.
    fn ask_ahead(&mut self, client: &Client, store: &Store, progress: &Arc<dyn Progress>) {
        let mut layers = BTreeMap::new();
        for found in self.records.values() {
            let descriptor = &found.record.descriptor;
            if let Origin::Registry(repository) = &found.origin
                && !store.has_blob_of(descriptor)
            {
                layers.insert((repository.clone(), descriptor.digest.clone()), ());
            }
        }
        let questions: Vec<_> = layers
            .into_keys()
            .take(QUESTIONS_AHEAD)
            .map(|(repository, digest)| self.has(client, &repository, &digest, progress))
            .collect();
        let asking = tokio::spawn(async move {
            let mut answers = stream::iter(questions).buffer_unordered(PARALLEL_QUESTIONS);
            while answers.next().await.is_some() {}
        });
        self._asking = Some(AbortOnDropHandle::new(asking));
    }

    /// Whether the registry has the blob.
    pub(super) fn has(
        &self,
        client: &Client,
        repository: &Repository,
        digest: &Digest,
        progress: &Arc<dyn Progress>,
    ) -> Answer {
        let lost = self.lost.lock();
        let lost = lost.expect("nothing panics while it holds this lock");
        if lost.get(repository) == Some(&Without::Cache) {
            return std::future::ready(false).boxed().shared();
        }
        drop(lost);
        let mut answers = self
            .answers
            .lock()
            .expect("nothing panics while it holds this lock");
        let answer = answers.entry((repository.clone(), digest.clone()));
        let answer = answer.or_insert_with(|| {
            let (client, progress) = (client.clone(), Arc::clone(progress));
            let (repository, digest) = (repository.clone(), digest.clone());
            let question = async move {
                let message = match client.has_blob(&repository, &digest).await {
                    Ok(true) => return true,
                    Ok(false) => {
                        format!("{repository} no longer has the layer {digest} of its cache")
                    }
                    Err(error) => format!(
                        "the layer {digest} of a cache is not used: {:#}",
                        anyhow::Error::new(error)
                    ),
                };
                progress.event(BuildEvent::Warning { message });
                false
            };
            question.boxed().shared()
        });
        answer.clone()
    }

    /// Does without a layer that was lost, and where it is the second of its repository,
    /// without all that are there; does without all that were not exported where it is one of
    /// those. So a build begins again once, and twice for each cache, at most.
    pub(in crate::build) fn leave_out(&self, lost: &LostLayer) -> Without {
        let LostLayer::Gone {
            repository, digest, ..
        } = lost
        else {
            self.needs_layers.store(true, Ordering::Relaxed);
            return Without::NotExported;
        };
        let of_registries = self.lost.lock();
        let mut of_registries = of_registries.expect("nothing panics while it holds this lock");
        let without = match of_registries.get(repository) {
            None => Without::Layer,
            Some(_) => Without::Cache,
        };
        of_registries.insert(repository.clone(), without);
        let answers = self.answers.lock();
        let mut answers = answers.expect("nothing panics while it holds this lock");
        // Others may have gone with it.
        answers.retain(|(of, _), _| of != repository);
        let key = (repository.clone(), digest.clone());
        answers.insert(key, std::future::ready(false).boxed().shared());
        without
    }

    /// Whether it has a step with this definition, on whatever inputs.
    pub(super) fn has_definition(&self, definition: &Definition) -> bool {
        self.definitions.contains(definition.digest())
    }

    /// The records of the step under these keys, the best first: those whose layers were
    /// exported, and in the order of the keys.
    pub(super) fn look_up(&self, definition: &Definition, keys: &[Inputs]) -> Vec<Arc<Found>> {
        let of = |known: &HashMap<_, Arc<Found>>, key: &Inputs| {
            known
                .get(&(definition.digest().clone(), key.digest()))
                // Digests name it; that it is the same in words costs nothing to see.
                .filter(|found| found.record.is_of(definition, key))
                .cloned()
        };
        let mut found: Vec<_> = keys.iter().filter_map(|k| of(&self.records, k)).collect();
        if !self.needs_layers.load(Ordering::Relaxed) {
            found.extend(keys.iter().filter_map(|k| of(&self.results, k)));
        }
        found
    }

    /// All records, each with the cache that it is of.
    pub(in crate::build) fn records(&self) -> impl Iterator<Item = (&Record, &CacheSource)> {
        self.all.iter().map(|found| (&found.record, &found.cache))
    }

    /// What a step read, where one of the caches says it.
    pub(in crate::build) fn content(&self, digest: &Digest) -> Option<ContentManifest> {
        document::open_content(digest, self.contents.get(digest)?)
    }

    /// Chunks that are somewhere already, by the digest of their bytes.
    pub(super) fn chunks(&self) -> HashMap<&Digest, (&Chunk, &Origin)> {
        let mounts = self.mounts.values();
        let chunks = mounts.flat_map(|(mount, origin)| mount.chunks().map(move |c| (c, origin)));
        chunks
            .map(|(chunk, origin)| (&chunk.digest, (chunk, origin)))
            .collect()
    }
}

/// The bytes of chunks one after the other, in blocking code on the runtime's threads.
pub(super) fn read_chunks(client: &Client, origin: &Origin, chunks: &[Chunk]) -> Box<dyn Read> {
    let chunks = chunks.to_vec();
    match origin {
        Origin::Layout(layout) => {
            let layout = layout.clone();
            let pieces = chunks.into_iter().map(move |chunk| {
                let mut blob = Vec::new();
                let opened = layout.open_blob(&chunk.descriptor());
                opened.map_err(io::Error::other)?.read_to_end(&mut blob)?;
                contents::open(&chunk, &blob)
            });
            Box::new(Pieces {
                pieces,
                piece: io::Cursor::default(),
            })
        }
        Origin::Registry(repository) => {
            let (client, repository) = (client.clone(), repository.clone());
            let fetches = chunks.into_iter().map(move |chunk| {
                let (client, repository) = (client.clone(), repository.clone());
                async move {
                    let blob = client.open_blob(&repository, &chunk.descriptor()).await;
                    let mut bytes = Vec::new();
                    blob.map_err(io::Error::other)?
                        .read_to_end(&mut bytes)
                        .await?;
                    contents::open(&chunk, &bytes)
                }
            });
            // The channel adds one to those that are on their way.
            let (send, mut receive) = tokio::sync::mpsc::channel(1);
            let task = tokio::spawn(async move {
                let mut fetched = stream::iter(fetches).buffered(PARALLEL_CHUNKS);
                while let Some(piece) = fetched.next().await {
                    if send.send(piece).await.is_err() {
                        break;
                    }
                }
            });
            let task = AbortOnDropHandle::new(task);
            let pieces = std::iter::from_fn(move || {
                let _alive = &task;
                receive.blocking_recv()
            });
            Box::new(Pieces {
                pieces,
                piece: io::Cursor::default(),
            })
        }
    }
}

/// Reads pieces one after the other.
struct Pieces<I> {
    pieces: I,
    piece: io::Cursor<Vec<u8>>,
}

impl<I: Iterator<Item = io::Result<Vec<u8>>>> Read for Pieces<I> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        loop {
            let read = Read::read(&mut self.piece, buf)?;
            if read > 0 || buf.is_empty() {
                return Ok(read);
            }
            match self.pieces.next() {
                Some(piece) => self.piece = io::Cursor::new(piece?),
                None => return Ok(0),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use anyhow::anyhow;

    use super::*;
    use crate::image::DiffId;
    use crate::progress::NoProgress;
    use crate::registry::Options;
    use crate::registry::testing::TestRegistry;

    #[test]
    fn what_was_not_exported_comes_last_and_is_left_out_once_it_was_needed() {
        let definition = Definition::new("run", &["make"]);
        let inputs = Inputs {
            parent: Some(Digest::of(b"parent")),
            source: None,
            content: None,
        };
        let record = |text: &str| {
            let digest = Digest::of(text.as_bytes());
            Record::new(
                &definition,
                inputs.clone(),
                text.to_owned(),
                "2026-01-01T00:00:00Z".to_owned(),
                DiffId::from_uncompressed(digest.clone()),
                Descriptor::new(MediaType::LAYER_GZIP, digest, 7),
            )
        };
        let cache = CacheSource::Registry(Reference::parse("r.io/app:cache").unwrap());
        let origin = Origin::Registry(Reference::parse("r.io/app").unwrap().repository().clone());
        let mut imported = Imported::default();
        let first = Parsed {
            results: vec![KnownResult {
                definition: definition.digest().clone(),
                record: record("known"),
            }],
            ..Parsed::default()
        };
        let second = Parsed {
            records: vec![record("there")],
            ..Parsed::default()
        };
        imported.add(first, &origin, &cache);
        imported.add(second, &origin, &cache);
        let found = |imported: &Imported| -> Vec<(String, bool)> {
            let found = imported.look_up(&definition, &inputs.keys()).into_iter();
            found
                .map(|found| (found.record.name.clone(), found.has_layer))
                .collect()
        };
        let there = ("there".to_owned(), true);
        let known = ("known".to_owned(), false);
        assert_eq!(found(&imported), [there.clone(), known]);
        let needed = LostLayer::NotExported {
            cache,
            digest: Digest::of(b"known"),
        };
        assert_eq!(imported.leave_out(&needed), Without::NotExported);
        assert_eq!(found(&imported), [there]);
    }

    #[tokio::test]
    async fn a_lost_layer_is_left_out_and_a_second_one_takes_its_cache_with_it() {
        let registry = TestRegistry::start().await;
        let repository = registry.repository("cache");
        let other = registry.repository("other");
        let [first, second, third] = [b"1", b"2", b"3"].map(|bytes| {
            registry.put_blob("other", bytes);
            registry.put_blob("cache", bytes).digest
        });
        let options = Options {
            insecure: [registry.name()].into(),
            ..Options::default()
        };
        let client = Client::new(options).unwrap();
        let progress: Arc<dyn Progress> = Arc::new(NoProgress);
        let imported = Imported::default();
        let has = |repository: &Repository, digest: &Digest| {
            imported.has(&client, repository, digest, &progress)
        };
        let lost = |digest: &Digest| LostLayer::Gone {
            cache: CacheSource::Registry(registry.reference("cache:main")),
            repository: repository.clone(),
            digest: digest.clone(),
            source: anyhow!("404"),
        };
        assert!(has(&repository, &first).await && has(&repository, &second).await);
        registry.forget_seen();

        assert_eq!(imported.leave_out(&lost(&first)), Without::Layer);
        assert!(!has(&repository, &first).await);
        assert!(has(&repository, &second).await && has(&repository, &third).await);
        // Each was asked after again, and the lost one never.
        let asked = [&second, &third].map(|d| format!("HEAD /v2/cache/blobs/{d}"));
        assert_eq!(registry.lines(), asked);

        assert_eq!(imported.leave_out(&lost(&second)), Without::Cache);
        for digest in [&first, &second, &third] {
            assert!(!has(&repository, digest).await);
            assert!(has(&other, digest).await);
        }
    }
}
