//! Runs one process in one root filesystem. Knows nothing about images or Dockerfiles.
//!
//! A step is run by a chain of processes, each of them this program again with a hidden
//! first argument (see [`hidden_command`]). Each has one job and one thread:
//!
//! ```text
//! sockless build              run(): sends a Launch, drains output, waits
//! └─ __supervise              dies with its parent; unshares PID and mount namespaces
//!    └─ __reap                PID 1 of them: mounts /proc, attaches the network, reaps;
//!       │                     when it ends, the kernel kills all that is below
//!       ├─ pasta | slirp4netns
//!       └─ __enter            unshares the network, mounts what the step may see, becomes …
//!          └─ bwrap | runc | crun
//!             └─ __init       inside: user, capabilities, limits, directory, becomes …
//!                └─ the step  PID 1 of the innermost PID namespace
//! ```
//!
//! Everything that could differ between the runtimes is done by this program: bind mounts,
//! `/dev`, `/sys`, the network, users and capabilities, the look-up of the program. A runtime only
//! pivots into the root filesystem and makes the innermost `/proc`. All that
//! is mounted lives in namespaces of the step, on a tmpfs over the path of the root
//! filesystem; so there is nothing to clean up, even after a `SIGKILL`.
//!
//! A private network takes longer to make than all the rest, so it is made before, by a chain of
//! its own that ends in `__enter` (see `networks`), and serves one step after the other.
//!
//! Where there is a single ID, a thread of `sockless build` traces the step and has it see the
//! users and owners that it would see otherwise (see `tracer`).
//!
//! Where no namespace can be had, there is a shorter chain, in which nothing is mounted: see
//! `chroot`. Which ways there are, and which one a machine is good for, says [`Rung`].
//!
//! Limits hold by cgroups where this program may make them (`cgroup`), else by limits of processes
//! (`resources`); time and disk are watched over by this program (`guard`).
//!
//! What it does not do: make mount points; [`mount_points`] tells the caller which are needed. Needs
//! Linux 5.12 for `mount_setattr(2)`.

#![allow(
    clippy::disallowed_methods,
    reason = "starting processes is what this module is for"
)]

mod bwrap;
pub mod cdi;
mod cgroup;
mod choose;
mod chroot;
pub mod doctor;
mod emulation;
mod enter;
mod error;
mod guard;
mod hosts;
mod init;
mod ladder;
mod landlock;
mod limits;
mod mounts;
mod netlink;
mod network;
mod networks;
mod output;
mod resources;
mod runc;
mod seccomp;
mod supervise;
mod sys;
mod tracer;
mod userns;
mod verify;
mod version;
mod wire;

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::owners::Inodes;
use crate::progress::Stream;

pub use choose::{choose, hidden_command};
pub use emulation::cannot_run;
pub use error::{Refusal, SandboxError};
pub use hosts::{HOST_GATEWAY, HostError, parse_extra_host};
pub use ladder::{ChrootLack, Rung};
pub use limits::{Ulimit, UlimitError};
pub use output::Cancel;
pub use resources::{Bytes, CpuLimits, LimitReached, Limits, Swap};
pub use userns::{UsernsError, World, enter};

/// Runs processes. Implementations: bubblewrap, runc, crun, chroot.
pub trait Sandbox: Send + Sync {
    /// What it is called on the command line: `bwrap`, `runc`, `crun`, `chroot`.
    fn name(&self) -> &str;

    /// What it does not give here, in words for people; shown once when a build starts.
    fn notes(&self) -> Vec<String> {
        Vec::new()
    }

    /// Whether processes are kept from those of this machine by namespaces; else what is not
    /// given, as a sentence.
    ///
    /// # Errors
    /// That sentence.
    fn isolates(&self) -> Result<(), String> {
        Ok(())
    }

    /// Whether [`Network::Private`] is private here; else what it is, as a sentence.
    ///
    /// # Errors
    /// That sentence.
    fn private_network(&self) -> Result<(), String> {
        Ok(())
    }

    /// Whether it mounts what a process may see. For one that does not, the root filesystem is a
    /// directory without devices, and there are [`Self::stand_ins`].
    fn mounts(&self) -> bool {
        true
    }

    /// What has to stand in the root filesystem of `process` while it is [run](Self::run), in this
    /// order, and be gone after, where this sandbox mounts nothing. All [`mount_points`] are there
    /// before.
    ///
    /// # Errors
    /// [`SandboxError::Asked`], [`SandboxError::Mount`] where something that `process` asks for
    /// cannot be had.
    fn stand_ins(&self, process: &Process) -> Result<Vec<StandIn>, SandboxError> {
        let _ = process;
        Ok(Vec::new())
    }

    /// Runs `process` to its end and returns how it ended; blocks.
    ///
    /// A program that is not there or cannot be run is an outcome (127, 126) with a
    /// message on the step's standard error. When this returns, with whatever result,
    /// no process of the step is left.
    ///
    /// # Errors
    /// [`SandboxError::Cancelled`] after [`Cancel::cancel`]; [`SandboxError::LimitReached`] where a
    /// limit ended it or had it fail; all others say why the process was never started.
    fn run(
        &self,
        process: &Process,
        output: OutputSink<'_>,
        cancel: &Cancel,
    ) -> Result<Outcome, SandboxError>;
}

/// One process and everything it may see.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Process {
    /// The root filesystem on this machine, writable.
    #[serde(with = "wire::path")]
    pub rootfs: PathBuf,
    /// The program and its arguments; the program is looked up in the process's own `PATH`.
    pub args: Vec<OsString>,
    /// The whole environment, `NAME=VALUE`.
    pub env: Vec<OsString>,
    /// The working directory inside; exists.
    #[serde(with = "wire::path")]
    pub cwd: PathBuf,
    /// Who it runs as.
    pub user: User,
    /// What is mounted beside the root filesystem. A target that is named twice has the
    /// later one.
    pub mounts: Vec<Mount>,
    /// What it can reach.
    pub network: Network,
    /// Host name inside.
    pub hostname: String,
    /// Names and addresses in `/etc/hosts` inside, beyond the usual lines; the address
    /// [`HOST_GATEWAY`] stands for that of this machine as the process sees it. See
    /// [`parse_extra_host`].
    pub extra_hosts: Vec<(String, String)>,
    /// What it is allowed.
    pub security: Security,
    /// Devices of this machine, beside the usual ones of `/dev`.
    pub devices: Vec<Device>,
    /// The size of `/dev/shm` in bytes, if not Docker's 64 MiB.
    pub shm_size: Option<u64>,
    /// Its resource limits; those that are not named are sockless's own, but open files are
    /// as many as in Docker.
    pub ulimits: Vec<Ulimit>,
    /// Whom files belong to, where that is recorded because there is a single ID; then users are
    /// made up for the process, too, and this is kept true.
    #[serde(skip)]
    pub owners: Option<Inodes>,
    /// How much it may use.
    pub limits: Limits,
    /// The directory of this machine that grows with what it writes into its root filesystem, if
    /// not `rootfs`: the upper directory of an overlay.
    pub written_dir: Option<PathBuf>,
}

/// Numbers of user and groups, as inside.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct User {
    /// User.
    pub uid: u32,
    /// Primary group.
    pub gid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
}

/// Something that is mounted inside, without setuid programs and devices.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mount {
    /// Where, absolute, inside; links are followed inside. A target that lies inside
    /// another mount, or below `/dev`, is made there where it is missing; all others
    /// are in [`mount_points`]. Nothing can be mounted on `/` and `/dev`, nor on and below
    /// `/proc`.
    #[serde(with = "wire::path")]
    pub target: PathBuf,
    /// What.
    pub source: MountSource,
    /// Whether writes fail.
    pub read_only: bool,
}

/// What is mounted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum MountSource {
    /// A directory, file or socket of this machine.
    Bind(#[serde(with = "wire::path")] PathBuf),
    /// An empty directory in memory.
    Tmpfs {
        /// Its size limit; half of the memory where there is none.
        size_bytes: Option<u64>,
        /// Its mode; that of the directory it covers where there is none.
        mode: Option<u32>,
    },
    /// A file in memory, which no disk ever sees. It cannot be executed where its mode
    /// does not say so.
    File {
        /// What is in it.
        content: Content,
        /// Its owner, as inside.
        uid: u32,
        /// Its group, as inside.
        gid: u32,
        /// Its mode.
        mode: u32,
    },
}

/// A file or directory that takes the place of what is at a path of a root filesystem.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StandIn {
    /// Where, absolute, inside; links are followed inside.
    pub path: PathBuf,
    /// What.
    pub kind: StandInKind,
}

impl StandIn {
    fn new(path: impl Into<PathBuf>, kind: StandInKind) -> Self {
        let path = path.into();
        Self { path, kind }
    }
}

/// What takes a place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StandInKind {
    /// An empty directory of root.
    Directory {
        /// Its mode; that of the directory whose place it takes where there is none.
        mode: Option<u32>,
    },
    /// A file.
    File {
        /// What is in it.
        content: Content,
        /// Its owner.
        uid: u32,
        /// Its group.
        gid: u32,
        /// Its mode.
        mode: u32,
    },
    /// A symbolic link.
    Link {
        /// Where it leads.
        target: PathBuf,
    },
    /// A character device of root that everybody may use; missing where none can be made.
    Device {
        /// Its major number.
        major: u32,
        /// Its minor number.
        minor: u32,
    },
    /// A directory, file or socket of this machine, which the process may change or not as its
    /// owner says.
    Files {
        /// Where it is.
        source: PathBuf,
    },
}

/// The bytes of a file that may be secret: they do not show in debug output.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Content(pub Vec<u8>);

impl std::fmt::Debug for Content {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Content({} bytes)", self.0.len())
    }
}

/// What a process can reach.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Network {
    /// Outbound connections from a network namespace of its own; the host's loopback is out of reach.
    Private,
    /// Nothing but a loopback of its own.
    None,
    /// The host's network.
    Host,
}

/// What a process is allowed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Security {
    /// Docker's capabilities, a read-only `/sys`, and nothing of `/proc` that shows or
    /// changes the host.
    #[default]
    Sandbox,
    /// What whoever runs sockless may do: all capabilities that there are in the user
    /// namespace, whoever the process runs as; nothing of `/proc` and `/sys` masked or
    /// read-only, and `/sys/fs/cgroup`. In the initial user namespace, that is for real
    /// root, also device nodes and BuildKit's choice of them in `/dev`.
    Insecure,
}

/// A device of this machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Device {
    /// Where it is inside, absolute.
    #[serde(with = "wire::path")]
    pub path: PathBuf,
    /// Where it is outside: a character or block device.
    #[serde(with = "wire::path")]
    pub host_path: PathBuf,
    /// Some of `r`, `w` and `m`. No device cgroup is made, so these are not enforced: what can
    /// be done with a device is what its owner and mode let the process do.
    pub permissions: String,
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It exited with this status; 128 + the signal where one ended it.
    Exited(i32),
}

/// A path inside the root filesystem on which something is mounted.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct MountPoint {
    /// Where, absolute, inside.
    pub path: PathBuf,
    /// Whether a directory must be there, rather than a file.
    pub is_dir: bool,
}

/// Returns what must exist in the root filesystem of `process` before it is run, in the
/// order in which it is mounted; links are followed inside.
///
/// What lies below `/dev`, `/sys` or another mount of the process is not listed: it could
/// not be seen there, and is made in that mount where it is missing.
pub fn mount_points(process: &Process) -> Vec<MountPoint> {
    let point = |path: &Path, is_dir| MountPoint {
        path: path.to_owned(),
        is_dir,
    };
    let mut points = vec![
        point(Path::new("/proc"), true),
        point(Path::new("/dev"), true),
        point(Path::new("/sys"), true),
        point(Path::new("/etc/resolv.conf"), false),
        point(Path::new("/etc/hosts"), false),
    ];
    for mount in mounts::in_mount_order(&process.mounts) {
        if mounts::is_covered(&mount.target, &process.mounts) {
            continue;
        }
        let is_dir = match &mount.source {
            // A source that is missing is reported when it is mounted.
            MountSource::Bind(source) => source.is_dir(),
            MountSource::Tmpfs { .. } => true,
            MountSource::File { .. } => false,
        };
        points.push(point(&mount.target, is_dir));
    }
    for device in &process.devices {
        if !mounts::is_covered(&device.path, &process.mounts) {
            points.push(point(&device.path, false));
        }
    }
    points
}

/// Says which of `limits` do not hold on this machine, or hold for something else; in words for people,
/// shown once when a build starts.
///
/// # Errors
/// [`SandboxError::Asked`] where the cgroup that was named for the steps cannot be used.
pub fn limit_notes(limits: &Limits) -> Result<Vec<String>, SandboxError> {
    Ok(limits.notes(&*cgroup::Place::of(limits)?))
}

/// Takes output as it comes; called from one thread at a time.
pub type OutputSink<'a> = &'a mut (dyn FnMut(Stream, &[u8]) + Send);

/// `--sandbox`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Choice {
    /// The best that works here.
    #[default]
    Auto,
    /// bubblewrap.
    Bwrap,
    /// runc.
    Runc,
    /// crun.
    Crun,
    /// `chroot(2)`, which isolates less than the others.
    Chroot,
    /// youki: by the runtime specification and its own documentation; untested.
    Youki,
}
