//! Runs one process in one root filesystem. Knows nothing about images or Dockerfiles.

use std::ffi::OsString;
use std::path::PathBuf;

use crate::progress::Stream;

/// One process and everything it may see.
#[derive(Clone, Debug)]
pub struct Process {
    /// The root filesystem on this machine, writable.
    pub rootfs: PathBuf,
    /// The program and its arguments; the program is looked up in the process's own `PATH`.
    pub args: Vec<OsString>,
    /// The whole environment, `NAME=VALUE`.
    pub env: Vec<OsString>,
    /// The working directory inside; exists.
    pub cwd: PathBuf,
    /// Who it runs as.
    pub user: User,
    /// What is mounted beside the root filesystem.
    pub mounts: Vec<Mount>,
    /// What it can reach.
    pub network: Network,
    /// Host name inside.
    pub hostname: String,
    /// `/etc/hosts` inside, beyond the usual lines.
    pub extra_hosts: Vec<(String, String)>,
}

/// Numbers of user and groups, as inside.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct User {
    /// User.
    pub uid: u32,
    /// Primary group.
    pub gid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
}

/// Something that is mounted inside.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// Where, absolute, inside.
    pub target: PathBuf,
    /// What.
    pub kind: MountKind,
}

/// What is mounted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MountKind {
    /// A file or directory of this machine.
    Bind {
        /// Where it is, outside.
        source: PathBuf,
        /// Whether writes fail.
        read_only: bool,
    },
    /// An empty directory in memory.
    Tmpfs {
        /// Its size limit, if any.
        size_bytes: Option<u64>,
    },
}

/// What a process can reach.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Network {
    /// Outbound connections from a network namespace of its own; the host's loopback is out of reach.
    Private,
    /// Nothing but a loopback of its own.
    None,
    /// The host's network.
    Host,
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It exited with this status; 128 + the signal where one ended it.
    Exited(i32),
}

/// Takes output as it comes; called from one thread at a time.
pub type OutputSink<'a> = &'a mut (dyn FnMut(Stream, &[u8]) + Send);

/// `--sandbox`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
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
}
