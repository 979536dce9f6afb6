//! Instructions + base image configs → a graph of steps. No I/O.
//!
//! Planning has two passes because a base image's `ENV`, `SHELL` and `ONBUILD`
//! change what later lines mean: [`graph::graph`] needs only the text and says which
//! images are needed, the network happens in between, and [`lower::lower`] is pure again.

mod epoch;
pub mod graph;
mod join;
pub mod lower;
pub mod mode;
mod mounts;
mod state;
mod support;
#[cfg(test)]
mod tests;
mod text;

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::context::named::{NamedContext, NamedContexts};
use crate::image::{History, ImageConfig, Platform};

pub use epoch::{SOURCE_DATE_EPOCH, SourceDate, source_date};
pub use graph::{ImageNeed, ImageSource, StageGraph, graph};
pub use join::{Joined, Target, join};
pub use lower::lower;

/// What the user gave beside the Dockerfile.
#[derive(Clone, Debug)]
pub struct Settings {
    /// `--build-arg`.
    pub build_args: BTreeMap<String, String>,
    /// `--target`.
    pub target: Option<String>,
    /// `--platform`: what the image is for.
    pub platform: Platform,
    /// Whether somebody asked for `platform`. Where nobody did, the image is for what its base
    /// is for, which `FROM --platform` can choose.
    pub platform_is_given: bool,
    /// Whether the result is an index, with this platform's image or among others; names of
    /// steps say the platform then.
    pub multi_platform: bool,
    /// What this machine is.
    pub build_platform: Platform,
    /// `--label`: labels that win over those of the Dockerfile.
    pub labels: BTreeMap<String, String>,
    /// `--build-context`: what stands in for a stage, an image or a `--from`.
    pub contexts: NamedContexts,
    /// `--no-cache` and `--no-cache-filter`.
    pub no_cache: NoCache,
    /// `--allow`: what steps may ask for beyond the sandbox.
    pub allowed: BTreeSet<Entitlement>,
    /// What the default of a global `ARG SOURCE_DATE_EPOCH` is worth once [`source_date`] was
    /// asked where it leads; empty where that has no date.
    pub source_date: Option<String>,
    /// What every RUN step gets.
    pub run: RunSettings,
}

impl Settings {
    /// The settings of a build that nothing else was said about.
    pub fn new(platform: Platform, build_platform: Platform) -> Self {
        Self {
            build_args: BTreeMap::new(),
            target: None,
            platform,
            platform_is_given: true,
            multi_platform: false,
            build_platform,
            labels: BTreeMap::new(),
            contexts: NamedContexts::default(),
            no_cache: NoCache::default(),
            allowed: BTreeSet::new(),
            source_date: None,
            run: RunSettings::default(),
        }
    }
}

/// Which steps are not looked up in the cache.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum NoCache {
    /// None.
    #[default]
    Nothing,
    /// `--no-cache`: all.
    Everything,
    /// `--no-cache-filter`: those of the stages with these names, in any case.
    Stages(BTreeSet<String>),
}

/// What a step may ask for beyond the sandbox when `--allow` names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Entitlement {
    /// `network.host`: `RUN --network=host`.
    NetworkHost,
    /// `security.insecure`: `RUN --security=insecure`.
    SecurityInsecure,
}

impl Entitlement {
    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::NetworkHost => "network.host",
            Self::SecurityInsecure => "security.insecure",
        }
    }
}

/// What every RUN step gets from the command line.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunSettings {
    /// `--network`: the network of steps that name none.
    pub network: Network,
    /// `--add-host`: names and addresses in `/etc/hosts`.
    pub extra_hosts: Vec<(String, String)>,
    /// `--shm-size`, in bytes.
    pub shm_size: Option<u64>,
    /// `--ulimit`.
    pub ulimits: Vec<Ulimit>,
}

/// One `--ulimit`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Ulimit {
    /// Such as `nofile`.
    pub name: String,
    /// The soft limit; -1 is none.
    pub soft: i64,
    /// The hard limit; -1 is none.
    pub hard: i64,
}

/// Names a build context: 0 is the main one, the others are [`Settings::contexts`] in their
/// order from 1 on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ContextId(pub usize);

impl ContextId {
    /// The main one.
    pub const MAIN: Self = Self(0);

    /// The name and the value of a named one; none of the main one.
    pub fn named(self, contexts: &NamedContexts) -> Option<(&str, &NamedContext)> {
        contexts.iter().nth(self.0.checked_sub(1)?)
    }
}

/// Names a step: its place in [`Plan::steps`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StepId(pub usize);

/// Names an image that the plan needs: its place in [`StageGraph::images`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ImageId(pub usize);

/// A directed acyclic graph of the steps that produce filesystems, for one platform.
#[derive(Clone, Debug)]
pub struct Plan {
    /// What the image is for, as an index says it.
    pub platform: Platform,
    /// The steps; each comes after those that it needs.
    pub steps: Vec<Step>,
    /// The step whose filesystem is the image's; absent for a `scratch` without layers.
    pub result: Option<StepId>,
    /// The image's config, with the base's history but without the new entries.
    pub config: ImageConfig,
    /// The new history entries. Those that are not `empty_layer` belong, in order, to
    /// the layers above the base's.
    pub history: Vec<History>,
    /// What is surely not meant but stops nothing: `file:line:column: …`.
    pub warnings: Vec<String>,
    /// What was given and nothing of this plan uses. Another platform's plan may use it, so
    /// [`join()`] says it.
    pub unused: Unused,
}

/// What was given on the command line and has no effect.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Unused {
    /// Names of `--build-arg`.
    pub args: BTreeSet<String>,
    /// Names of `--build-context`.
    pub contexts: BTreeSet<String>,
}

/// One node of the plan: something that produces a filesystem.
#[derive(Clone, Debug)]
pub struct Step {
    /// The filesystem that it starts from; absent: an empty one.
    pub parent: Option<StepId>,
    /// What people see, such as `[build 2/5] RUN make`.
    pub name: String,
    /// `file:line:column` of its instruction.
    pub place: String,
    /// What a process of it runs on: the platform of its stage.
    pub platform: Platform,
    /// Whether it may be looked up in the cache.
    pub use_cache: bool,
    /// What it does.
    pub operation: Operation,
}

impl Step {
    /// The steps whose filesystems it reads beside its parent's.
    pub fn sources(&self) -> &[StepId] {
        match &self.operation {
            Operation::Run(run) => &run.sources,
            Operation::Copy(copy) => copy.source_step.as_slice(),
            Operation::Image(_) | Operation::MakeDirectory(_) => &[],
        }
    }
}

/// What a step does.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Operation {
    /// The layers of a base image; adds no layer of its own.
    Image(ImageId),
    /// Runs a process; what it changes is a layer.
    Run(Run),
    /// Copies files; they are a layer.
    Copy(Copy),
    /// Makes a directory where there is none, with its parents; that is a layer.
    MakeDirectory(MakeDirectory),
}

/// `RUN`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Run {
    /// The program and its arguments.
    pub args: Vec<String>,
    /// The environment, `NAME=VALUE`.
    pub env: Vec<String>,
    /// Which names in it come from `ARG`, for people.
    #[serde(skip)]
    pub arguments: BTreeSet<String>,
    /// Proxy settings that reach the process but neither cache key nor image.
    #[serde(skip)]
    pub proxy_env: Vec<String>,
    /// The working directory, absolute.
    pub cwd: String,
    /// `USER` as written; empty is root.
    pub user: String,
    /// `--network`.
    pub network: Network,
    /// `--security`.
    pub security: Security,
    /// `--device`.
    pub devices: Vec<Device>,
    /// `--mount`, and the directory of a script from a here-document, in order.
    pub mounts: Vec<Mount>,
    /// The steps whose filesystems are mounted.
    #[serde(skip)]
    pub sources: Vec<StepId>,
    /// The name that the host has inside.
    pub hostname: String,
    /// `--add-host`: names and addresses.
    pub extra_hosts: Vec<(String, String)>,
    /// `--shm-size`, in bytes.
    pub shm_size: Option<u64>,
    /// `--ulimit`.
    pub ulimits: Vec<Ulimit>,
}

/// `RUN --network`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Network {
    /// Outbound connections.
    #[default]
    Default,
    /// Nothing.
    None,
    /// The network of this machine.
    Host,
}

/// `RUN --security`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Security {
    /// The default capabilities.
    #[default]
    Sandbox,
    /// All that this user has.
    Insecure,
}

/// `RUN --device`: a device by its name of the Container Device Interface.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Device {
    /// `vendor/class=device`, or a class.
    pub name: String,
    /// Whether the step fails where there is none.
    pub required: bool,
}

/// Something mounted while a step runs. Nothing of it is in the layer.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Mount {
    /// Where: absolute, without `.` and `..`. Absent only for a secret that is a variable alone.
    pub target: Option<String>,
    /// What.
    pub kind: MountKind,
}

/// What is mounted.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum MountKind {
    /// Files of a context, a stage or an image.
    Bind {
        /// Where they are.
        from: MountFrom,
        /// A path below its root; absolute.
        source: String,
        /// Whether the step may write; what it writes is gone afterwards.
        read_write: bool,
    },
    /// A directory that stays from build to build.
    Cache {
        /// Its name.
        id: String,
        /// What it has at first.
        from: MountFrom,
        /// A path below the root of `from`; absolute.
        source: String,
        /// What happens when several steps want it.
        sharing: Sharing,
        /// Whether the step may only read.
        read_only: bool,
        /// Mode of a new directory; absent with the two below where none was given.
        mode: Option<u32>,
        /// Its owner.
        uid: Option<u32>,
        /// Its group.
        gid: Option<u32>,
    },
    /// An empty filesystem in memory.
    Tmpfs {
        /// How much it holds.
        size_bytes: Option<u64>,
    },
    /// A secret, as a file, a variable or both.
    Secret {
        /// Its name.
        id: String,
        /// The variable.
        env: Option<String>,
        /// Whether the step fails without it.
        required: bool,
        /// The file's mode.
        mode: u32,
        /// The file's owner.
        uid: u32,
        /// The file's group.
        gid: u32,
    },
    /// The socket of an SSH agent.
    Ssh {
        /// The agent's name.
        id: String,
        /// Whether the step fails without it.
        required: bool,
        /// The socket's mode.
        mode: u32,
        /// The socket's owner.
        uid: u32,
        /// The socket's group.
        gid: u32,
    },
    /// A read-only directory with one executable file.
    Script {
        /// Its name.
        name: String,
        /// What it says.
        content: String,
    },
}

/// What happens when several steps want one cache mount.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Sharing {
    /// They have it together.
    #[default]
    Shared,
    /// Each has one of its own.
    Private,
    /// One waits for the other.
    Locked,
}

/// Where the files of a mount are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum MountFrom {
    /// Nowhere: an empty filesystem.
    Scratch,
    /// A build context.
    Context(ContextId),
    /// The filesystem of one of [`Run::sources`], by its place there.
    Step(usize),
}

/// `COPY` or `ADD`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Copy {
    /// Where sources that are paths are.
    pub from: CopyFrom,
    /// What to do, as far as it goes into the cache key.
    pub definition: CopyDefinition,
    /// The filesystem that is read, where it is a step's.
    pub source_step: Option<StepId>,
}

/// Where `COPY` takes files from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CopyFrom {
    /// A build context.
    Context(ContextId),
    /// The filesystem of [`Copy::source_step`]; empty where that is absent (`scratch`).
    Step,
}

/// The part of `COPY` that is its definition.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct CopyDefinition {
    /// What is copied, in the order of the Dockerfile.
    pub sources: Vec<CopySource>,
    /// Absolute; a trailing slash says that it is a directory.
    pub destination: String,
    /// `--chown`, expanded.
    pub chown: Option<String>,
    /// `--chmod`.
    pub chmod: Option<Chmod>,
    /// Whether archives among the files of a context, a stage or an image are unpacked.
    pub unpack: bool,
    /// Whether archives from URLs are unpacked.
    pub unpack_remote: bool,
    /// `--link`: the layer does not depend on what is below it.
    pub link: bool,
    /// `--parents`: paths keep their parent directories.
    pub parents: bool,
    /// `--exclude`: patterns of what is left out.
    pub excludes: Vec<String>,
}

/// One source of `COPY` or `ADD`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum CopySource {
    /// A path, possibly with wildcards, relative to the source's root.
    Path(String),
    /// A file from HTTP.
    Url {
        /// Where. What is written of it, in records of the cache too, is without its user
        /// information.
        #[serde(serialize_with = "crate::secret::serialize_without_userinfo")]
        url: String,
        /// `--checksum`: `ALGORITHM:HEX`, seen to be well formed.
        checksum: Option<String>,
    },
    /// The files of a git repository.
    Git {
        /// The reference, as written; as with a URL, user information stays here.
        #[serde(serialize_with = "crate::secret::serialize_without_userinfo")]
        reference: String,
        /// `--checksum`: the commit that it has to be.
        checksum: Option<String>,
        /// `--keep-git-dir`.
        keep_git_dir: Option<bool>,
    },
    /// A file whose content stands in the Dockerfile.
    Inline {
        /// Its name.
        name: String,
        /// What it says.
        content: String,
    },
}

/// `--chmod`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Chmod {
    /// All permission bits at once.
    Mode(u32),
    /// Changes such as `u+x,go=rX`, which were seen to be well formed.
    Symbolic(String),
}

/// `WORKDIR`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct MakeDirectory {
    /// Absolute.
    pub path: String,
    /// The owner, as `USER` gives it; empty is root.
    pub user: String,
}
