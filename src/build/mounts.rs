//! What a RUN step has mounted: files of contexts and stages, caches, secrets, agents, scripts.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use anyhow::Context as _;

use super::Engine;
use super::cache_mount::{self, CacheDirectory, DETAIL};
use super::content::{self, ContentManifest, Entry, Kind};
use super::mask::SecretTexts;
use super::slot::Slot;
use super::subtree::{self, SharedFiles, Subtree};
use crate::confined;
use crate::image::Digest;
use crate::owners::{Inodes, Owner};
use crate::plan::{Mount, MountFrom, MountKind, Run, Sharing};
use crate::rootfs::{self, Metadata, Rootfs, Stack, Tree};
use crate::sandbox::{self, Content, MountSource};
use crate::session::{AgentSocket, SecretBytes};

/// How a mounted filesystem is called in errors.
const STAGE: &str = "the stage or image mounted";
const CONTEXT: &str = "the build context";

/// A filesystem that is mounted, or whose files are.
#[derive(Clone)]
pub(super) struct Source {
    /// Its files.
    pub(super) stack: Stack,
    /// Its layers; absent for an empty one.
    pub(super) chain: Option<Digest>,
}

/// What is mounted while a step runs, and what has to live as long.
#[derive(Default)]
pub(super) struct Mounts {
    /// For the sandbox, in order.
    pub(super) mounts: Vec<sandbox::Mount>,
    /// Variables that come with them: name and value.
    pub(super) env: Vec<(String, Vec<u8>)>,
    /// The secrets among them.
    pub(super) secrets: SecretTexts,
    sockets: Vec<AgentSocket>,
    caches: BTreeMap<String, CacheDirectory>,
    /// By the place of a source first, then those of contexts.
    filesystems: Vec<Option<Rootfs>>,
    temporary: Vec<PathBuf>,
    /// Whose the mounted files are, where that is recorded.
    inodes: Option<Inodes>,
}

impl Mounts {
    /// Makes everything that `run` mounts; `sources` are the filesystems of [`Run::sources`].
    /// While it waits for a cache, the step gives up its `slot`. Blocking.
    pub(super) fn prepare(
        engine: &Engine,
        run: &Run,
        sources: &[Source],
        slot: &mut Slot,
    ) -> anyhow::Result<Self> {
        let mut mounts = Self {
            inodes: engine.store.records_owners().then(Inodes::default),
            ..Self::default()
        };
        mounts.filesystems.resize_with(sources.len(), || None);
        // Two steps that want the same caches take them in one order, and neither waits for
        // the other.
        let mut caches: Vec<(String, &Mount)> = Vec::new();
        for mount in &run.mounts {
            caches.extend(cache_name(mount, sources).map(|name| (name, mount)));
        }
        caches.sort_by(|(a, _), (b, _)| a.cmp(b));
        for (name, mount) in caches {
            mounts
                .take_cache(engine, name, mount, sources, slot)
                .with_context(|| format!("--mount of a cache at {}", target(mount)))?;
        }
        for mount in &run.mounts {
            mounts
                .add(engine, mount, sources)
                .with_context(|| format!("--mount at {}", target(mount)))?;
        }
        Ok(mounts)
    }

    /// Notes in `inodes`, those of a step's root filesystem, whose the mounted files are; from then
    /// on the two are the same.
    pub(super) fn join_owners(&mut self, inodes: &Inodes) -> anyhow::Result<()> {
        let Some(own) = self.inodes.replace(inodes.clone()) else {
            return Ok(());
        };
        inodes.add(&own);
        let filesystems = self.filesystems.iter().flatten();
        filesystems
            .filter_map(Rootfs::inodes)
            .for_each(|mounted| inodes.add(mounted));
        for cache in self.caches.values() {
            rootfs::learn_owners(&cache.files, inodes)?;
        }
        for dir in &self.temporary {
            rootfs::learn_owners(dir, inodes)?;
        }
        Ok(())
    }

    /// Whether this is the directory of a cache mount.
    pub(super) fn is_cache(&self, path: &Path) -> bool {
        self.caches.values().any(|cache| cache.files == path)
    }

    /// Unmounts and removes what is not kept. What cannot be removed goes with the store's `tmp/`.
    pub(super) fn finish(self) {
        if let Some(inodes) = &self.inodes {
            for cache in self.caches.values() {
                if let Err(error) = rootfs::keep_owners(&cache.files, inodes) {
                    tracing::warn!(%error, "the owners of a cache mount's files are lost");
                }
            }
        }
        let filesystems = self.filesystems.into_iter().flatten();
        filesystems.for_each(Rootfs::discard);
        drop(self.sockets);
        for dir in self.temporary {
            if let Err(error) = confined::remove_tree(&dir) {
                tracing::debug!(dir = %dir.display(), %error, "a directory stays");
            }
        }
    }

    /// A directory that is removed when the step has ended.
    fn temporary(&mut self, engine: &Engine, prefix: &str) -> anyhow::Result<PathBuf> {
        let dir = engine.store.tmp_dir(prefix)?;
        self.temporary.push(dir.clone());
        Ok(dir)
    }

    fn push(&mut self, mount: &Mount, source: MountSource, read_only: bool) {
        if let Some(target) = &mount.target {
            self.mounts.push(sandbox::Mount {
                target: target.into(),
                source,
                read_only,
            });
        }
    }

    fn add(&mut self, engine: &Engine, mount: &Mount, sources: &[Source]) -> anyhow::Result<()> {
        match &mount.kind {
            MountKind::Bind {
                from,
                source,
                read_write,
            } => {
                let path = self.files(engine, *from, source, sources)?;
                self.push(mount, MountSource::Bind(path), !read_write);
            }
            MountKind::Cache { read_only, .. } => {
                let name = cache_name(mount, sources).unwrap_or_default();
                let cache = self.caches.get(&name).context("the cache was not taken")?;
                let source = MountSource::Bind(cache.files.clone());
                self.push(mount, source, *read_only);
            }
            MountKind::Tmpfs { size_bytes } => {
                let source = MountSource::Tmpfs {
                    size_bytes: *size_bytes,
                    mode: None,
                };
                self.push(mount, source, false);
            }
            MountKind::Secret {
                id,
                env,
                required,
                mode,
                uid,
                gid,
            } => {
                let secret = if *required {
                    Some(engine.secrets.require(id)?)
                } else {
                    engine.secrets.get(id)?
                };
                if let Some(secret) = &secret {
                    self.secrets.add(secret.expose());
                }
                if let Some(name) = env {
                    // An optional secret that was not given is an empty variable, as in BuildKit.
                    let value = secret.as_ref().map_or(&[][..], SecretBytes::expose);
                    self.env.push((name.clone(), value.to_vec()));
                }
                let Some(secret) = secret else {
                    return Ok(());
                };
                let source = MountSource::File {
                    content: Content(secret.expose().to_vec()),
                    uid: *uid,
                    gid: *gid,
                    mode: mode & 0o777,
                };
                self.push(mount, source, true);
            }
            MountKind::Ssh {
                id,
                required,
                mode,
                uid,
                gid,
            } => {
                if let (true, Some(target)) = (self.sockets.is_empty(), &mount.target) {
                    self.env
                        .push(("SSH_AUTH_SOCK".to_owned(), target.clone().into()));
                }
                if !required && !engine.agents.contains(id) {
                    return Ok(());
                }
                let path = self.agent(engine, id)?;
                let owner = Owner {
                    uid: *uid,
                    gid: *gid,
                };
                let inodes = self.inodes.as_ref();
                subtree::dress(&path, mode & 0o777, owner, inodes)
                    .context("dressing the socket")?;
                self.push(mount, MountSource::Bind(path), false);
            }
            MountKind::Script { name, content } => {
                let dir = self.temporary(engine, "script-")?;
                let (nobody, inodes) = (Owner::default(), self.inodes.as_ref());
                subtree::dress(&dir, 0o755, nobody, inodes).context("dressing the directory")?;
                let path = dir.join(Path::new(name).file_name().unwrap_or_default());
                fs::write(&path, content).with_context(|| format!("writing {}", path.display()))?;
                subtree::dress(&path, 0o755, nobody, inodes).context("dressing the script")?;
                self.push(mount, MountSource::Bind(dir), true);
            }
        }
        Ok(())
    }

    /// A path of this machine with the files at `source` of `from`.
    fn files(
        &mut self,
        engine: &Engine,
        from: MountFrom,
        source: &str,
        sources: &[Source],
    ) -> anyhow::Result<PathBuf> {
        match from {
            MountFrom::Scratch => {
                anyhow::ensure!(source == "/", "{source:?} not found in an empty filesystem");
                subtree::empty(&self.temporary(engine, "mount-")?, 0o755, 0, 0)
            }
            MountFrom::Context(_) => {
                let shared = engine.mounted.files(engine, from, source, sources)?;
                // It lies in the store's `tmp/` until the build ends: other steps want it too.
                let copy = shared.copy(|| Ok(engine.store.tmp_dir("context-copy-")?))?;
                let (Some(above), Some(name)) = (copy.parent(), copy.file_name()) else {
                    anyhow::bail!("the copy {} is in no directory", copy.display());
                };
                // Whatever the step writes, and mount points that are made in it, are its own.
                let tree = Tree::open(above);
                let tree = tree.with_context(|| format!("opening {}", above.display()))?;
                let scratch = self.temporary(engine, "mount-")?;
                let mounted = engine.rootfs(&Stack::new(vec![tree]), &scratch)?;
                let path = mounted.path().join(name);
                self.filesystems.push(Some(mounted));
                Ok(path)
            }
            MountFrom::Step(index) => {
                let stack = &sources[index].stack;
                let node = stack.lookup(Path::new(source), true);
                let node = node
                    .with_context(|| format!("reading {source:?} of {STAGE}"))?
                    .with_context(|| format!("{source:?} not found in {STAGE}"))?;
                let mounted = match self.filesystems[index].take() {
                    Some(mounted) => mounted,
                    None => engine.rootfs(stack, &self.temporary(engine, "mount-")?)?,
                };
                let path = mounted.path().join(node.path());
                self.filesystems[index] = Some(mounted);
                Ok(path)
            }
        }
    }

    fn take_cache(
        &mut self,
        engine: &Engine,
        name: String,
        mount: &Mount,
        sources: &[Source],
        slot: &mut Slot,
    ) -> anyhow::Result<()> {
        let MountKind::Cache {
            from,
            source,
            sharing,
            mode,
            uid,
            gid,
            ..
        } = &mount.kind
        else {
            return Ok(());
        };
        if self.caches.contains_key(&name) {
            return Ok(());
        }
        engine.note_cache_mount(&name);
        let fill = |dir: &Path| {
            if let Some(restored) = engine.restore_cache_mount(&name, dir) {
                return Ok(restored);
            }
            let is_dressed = mode.is_some() || uid.is_some() || gid.is_some();
            if source == "/" && (is_dressed || *from == MountFrom::Scratch) {
                let (mode, uid) = (mode.unwrap_or(0o755) & 0o7777, uid.unwrap_or(0));
                return subtree::empty(dir, mode, uid, gid.unwrap_or(0));
            }
            anyhow::ensure!(
                *from != MountFrom::Scratch,
                "{source:?} not found in an empty filesystem"
            );
            engine
                .mounted
                .files(engine, *from, source, sources)?
                .subtree
                .write(dir)
        };
        let (store, cancel) = (&engine.store, &engine.cancel);
        let waits = || slot.release();
        // A directory that is not mounted can be in one step only.
        let sharing = match sharing {
            Sharing::Shared if !engine.sandbox()?.mounts() => Sharing::Locked,
            sharing => *sharing,
        };
        let cache = cache_mount::take(store, cancel, &name, sharing, waits, fill)?;
        self.caches.insert(name, cache);
        Ok(())
    }

    /// A socket that speaks for the agent `id`.
    fn agent(&mut self, engine: &Engine, id: &str) -> anyhow::Result<PathBuf> {
        let dir = self.temporary(engine, "agent-")?;
        self.sockets
            .push(engine.agents.serve(id, &dir.join("agent"))?);
        Ok(dir.join("agent"))
    }
}

fn target(mount: &Mount) -> &str {
    mount.target.as_deref().unwrap_or("no path")
}

/// What names the directory of a cache mount: its ID, what it is made from, and how.
fn cache_name(mount: &Mount, sources: &[Source]) -> Option<String> {
    let MountKind::Cache {
        id,
        from,
        source,
        mode,
        uid,
        gid,
        ..
    } = &mount.kind
    else {
        return None;
    };
    let mut name = id.clone();
    if source != "/" {
        name.push_str(&format!("{DETAIL}source {source}"));
    } else if mode.is_some() || uid.is_some() || gid.is_some() {
        name.push_str(&format!("{DETAIL}mode {mode:?} uid {uid:?} gid {gid:?}"));
    }
    match from {
        MountFrom::Scratch => {}
        MountFrom::Context(context) => name.push_str(&format!("{DETAIL}context {}", context.0)),
        MountFrom::Step(index) => {
            let layers = sources[*index].chain.as_ref();
            let layers = layers.map_or("nothing", Digest::as_str);
            name.push_str(&format!("{DETAIL}on {layers}"));
        }
    }
    Some(name)
}

/// The names of the cache mounts of a step that depend on no layers.
pub(super) fn fixed_cache_names(run: &Run) -> BTreeSet<String> {
    let is_fixed = |mount: &&Mount| match mount.kind {
        MountKind::Cache { from, .. } => !matches!(from, MountFrom::Step(_)),
        _ => false,
    };
    let fixed = run.mounts.iter().filter(is_fixed);
    fixed.filter_map(|mount| cache_name(mount, &[])).collect()
}

/// The files that the mounts of a build show, each found once; by whose and which they are.
#[derive(Default)]
pub(super) struct MountedFiles(Mutex<BTreeMap<String, Arc<SharedFiles>>>);

impl MountedFiles {
    /// The files at `source` of a context or a stage. All steps see a context as the first one
    /// found it. Blocking.
    fn files(
        &self,
        engine: &Engine,
        from: MountFrom,
        source: &str,
        sources: &[Source],
    ) -> anyhow::Result<Arc<SharedFiles>> {
        let name = match from {
            MountFrom::Scratch => format!("nothing {source}"),
            MountFrom::Context(context) => format!("context {} {source}", context.0),
            MountFrom::Step(index) => format!("layers {:?} {source}", sources[index].chain),
        };
        let mut known = self
            .0
            .lock()
            .expect("nothing panics while it holds this lock");
        if let Some(files) = known.get(&name) {
            return Ok(Arc::clone(files));
        }
        let subtree = match from {
            MountFrom::Scratch => Subtree::find(Arc::new(Stack::default()), source, STAGE, false),
            MountFrom::Context(context) => {
                Subtree::find(engine.context_tree(context)?, source, CONTEXT, true)
            }
            MountFrom::Step(index) => {
                let stack = Arc::new(sources[index].stack.clone());
                Subtree::find(stack, source, STAGE, false)
            }
        };
        let files = Arc::new(SharedFiles::new(subtree?));
        known.insert(name, Arc::clone(&files));
        Ok(files)
    }
}

/// Whether the step reads files of a build context.
pub(super) fn reads_context(run: &Run) -> bool {
    sources_of(run).any(|(from, _)| matches!(from, MountFrom::Context(_)))
}

/// The places that the mounts of a step are filled from.
fn sources_of(run: &Run) -> impl Iterator<Item = (MountFrom, &str)> {
    run.mounts.iter().filter_map(|mount| match &mount.kind {
        MountKind::Bind { from, source, .. } | MountKind::Cache { from, source, .. } => {
            Some((*from, source.as_str()))
        }
        _ => None,
    })
}

/// All that the mounts of a step show it.
pub(super) struct Shown(Vec<Part>);

enum Part {
    /// A whole filesystem, known by its layers and not read.
    Layers(Option<Digest>),
    Files(Arc<SharedFiles>),
}

/// Lists all that the mounts of a step show it, without reading contents. Blocking.
pub(super) fn shown(engine: &Engine, run: &Run, sources: &[Source]) -> anyhow::Result<Shown> {
    let part = |(from, source)| {
        Ok(match from {
            MountFrom::Scratch => Part::Layers(None),
            MountFrom::Step(index) if source == "/" => Part::Layers(
                sources
                    .get(index)
                    .and_then(|source: &Source| source.chain.clone()),
            ),
            _ => Part::Files(engine.mounted.files(engine, from, source, sources)?),
        })
    };
    Ok(Shown(
        sources_of(run).map(part).collect::<anyhow::Result<_>>()?,
    ))
}

impl Shown {
    /// What it is: of what was copied, the copies. `None` where that cannot be said, because
    /// files changed meanwhile. Blocking.
    pub(super) fn manifest(&self) -> anyhow::Result<Option<ContentManifest>> {
        let mut manifest = ContentManifest::default();
        for part in &self.0 {
            match part {
                Part::Layers(chain) => {
                    let kind = Kind::Layers(chain.clone());
                    manifest.sources.push(content::Source {
                        name: PathBuf::new(),
                        entries: vec![Entry::new(Path::new(""), kind, &Metadata::default())],
                    });
                }
                Part::Files(files) => match files.subtree.listing().copied()? {
                    Some(files) => manifest.sources.extend(files.sources),
                    None => return Ok(None),
                },
            }
        }
        Ok(Some(manifest))
    }
}
