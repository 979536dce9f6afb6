//! The ladder: which ways to run steps there are, from the best to the least, and which one a
//! machine is good for.
//!
//! | number | [`Rung`] | found by |
//! | --- | --- | --- |
//! | 1 | [`Rung::Root`] | `unshare(2)` of a mount namespace |
//! | 2 | [`Rung::MappedUser`] | a user namespace with subordinate IDs |
//! | 3 | [`Rung::SingleId`] | a user namespace |
//! | 4 | [`Rung::Chroot`] | `chroot(2)`, and `fchown(2)` to another user |
//! | 5 | [`Rung::Traced`] | that nothing else works |

use std::fmt;
use std::io;

use rustix::fs::{Gid, MemfdFlags, Mode, Uid};
use rustix::thread::CapabilitySet;

use super::{UsernsError, World};

/// A way to run steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Rung {
    /// Root that can make namespaces.
    Root,
    /// An ordinary user with subordinate IDs.
    MappedUser,
    /// An ordinary user with one ID.
    SingleId,
    /// Root of a container that can make no namespaces and mount nothing.
    Chroot,
    /// An ordinary user who can make no namespaces.
    Traced,
}

impl Rung {
    /// All, the best first.
    pub const ALL: [Self; 5] = [
        Self::Root,
        Self::MappedUser,
        Self::SingleId,
        Self::Chroot,
        Self::Traced,
    ];

    /// Its number, from 1 for the best.
    pub fn number(self) -> u8 {
        self as u8 + 1
    }

    /// Its name, for programs and people.
    pub fn name(self) -> &'static str {
        match self {
            Self::Root => "root",
            Self::MappedUser => "mapped-user",
            Self::SingleId => "single-id",
            Self::Chroot => "chroot",
            Self::Traced => "traced",
        }
    }

    /// What it gives and what it lacks, as a sentence without its period.
    pub fn sentence(self) -> &'static str {
        match self {
            Self::Root => "RUN steps have namespaces of their own, made by root",
            Self::MappedUser => {
                "RUN steps have namespaces of their own, made by an ordinary user whose \
                 subordinate IDs are the other users"
            }
            Self::SingleId => {
                "RUN steps have namespaces of their own, made by an ordinary user who has no \
                 other IDs: owners are recorded rather than set"
            }
            Self::Chroot => {
                "RUN steps have a root directory of their own, but share the processes, network, \
                 IPC and host name of whoever runs sockless, and see no /proc and /sys"
            }
            Self::Traced => {
                "RUN steps have nothing of their own: what they ask of the kernel is translated \
                 by a tracer"
            }
        }
    }

    /// Whether steps are kept from this machine's processes and network by the kernel's
    /// namespaces. Of a rung that does not isolate, a build says so when it begins.
    pub fn isolates(self) -> bool {
        matches!(self, Self::Root | Self::MappedUser | Self::SingleId)
    }
}

impl fmt::Display for Rung {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rung {} ({})", self.number(), self.name())
    }
}

impl World {
    /// Which rung this is.
    pub fn rung(&self) -> Rung {
        match self {
            Self::Root => Rung::Root,
            Self::MappedUser { .. } => Rung::MappedUser,
            Self::SingleId { .. } => Rung::SingleId,
            Self::Chroot { .. } => Rung::Chroot,
            Self::None { .. } => Rung::Traced,
        }
    }
}

/// Why this process cannot do without namespaces, as root with `chroot(2)`.
#[derive(Debug, thiserror::Error)]
pub enum ChrootLack {
    /// It is an ordinary user.
    #[error("uid {0} is not root")]
    NotRoot(u32),
    /// It has not all the capabilities that this takes.
    #[error("root has no {}", .0.join(", "))]
    Capabilities(Vec<&'static str>),
    /// It has them, and yet something is refused.
    #[error("{doing}: {source}")]
    Refused {
        /// What was tried.
        doing: &'static str,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
}

impl ChrootLack {
    /// What to do about it, for people.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Capabilities(missing) => {
                let flags: Vec<String> = missing
                    .iter()
                    .map(|name| format!("--cap-add={}", name.trim_start_matches("CAP_")))
                    .collect();
                Some(format!(
                    "in a container, give it Docker's default capabilities: {}",
                    flags.join(" ")
                ))
            }
            Self::NotRoot(_) | Self::Refused { .. } => None,
        }
    }
}

/// What root needs for files of all owners, for steps of all users, and to end these.
const NEEDED: [(CapabilitySet, &str); 8] = [
    (CapabilitySet::SYS_CHROOT, "CAP_SYS_CHROOT"),
    (CapabilitySet::CHOWN, "CAP_CHOWN"),
    (CapabilitySet::DAC_OVERRIDE, "CAP_DAC_OVERRIDE"),
    (CapabilitySet::FOWNER, "CAP_FOWNER"),
    (CapabilitySet::SETUID, "CAP_SETUID"),
    (CapabilitySet::SETGID, "CAP_SETGID"),
    (CapabilitySet::SETPCAP, "CAP_SETPCAP"),
    (CapabilitySet::KILL, "CAP_KILL"),
];

/// What is left where there are no namespaces, for the given `reason`.
pub(super) fn without_namespaces(reason: UsernsError) -> World {
    match try_chroot() {
        Ok(()) => World::Chroot { reason },
        Err(lack) => World::None { reason, lack },
    }
}

/// Whether this process can change its root directory, and give files to others. Neither
/// shows: the root directory stays what it is, and the file is one in memory.
pub(super) fn try_chroot() -> Result<(), ChrootLack> {
    let uid = rustix::process::geteuid();
    if !uid.is_root() {
        return Err(ChrootLack::NotRoot(uid.as_raw()));
    }
    let refused = |doing| {
        move |error: rustix::io::Errno| ChrootLack::Refused {
            doing,
            source: error.into(),
        }
    };
    let own = rustix::thread::capabilities(None).map_err(refused("reading capabilities"))?;
    let missing = NEEDED
        .iter()
        .filter(|(needed, _)| !own.effective.contains(*needed));
    let missing: Vec<&str> = missing.map(|(_, name)| *name).collect();
    if !missing.is_empty() {
        return Err(ChrootLack::Capabilities(missing));
    }
    let file = rustix::fs::memfd_create("sockless-owner", MemfdFlags::CLOEXEC)
        .map_err(refused("making a file in memory"))?;
    let (uid, gid) = (Uid::from_raw(1), Gid::from_raw(1));
    rustix::fs::fchown(&file, Some(uid), Some(gid))
        .map_err(refused("giving a file to another user"))?;
    rustix::fs::fchmod(&file, Mode::from_raw_mode(0o4711))
        .map_err(refused("changing the mode of another user's file"))?;
    rustix::process::chroot("/").map_err(refused("changing the root directory"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_three_isolate() {
        let all = Rung::ALL.map(|rung| (rung.number(), rung.name(), rung.isolates()));
        assert_eq!(
            all,
            [
                (1, "root", true),
                (2, "mapped-user", true),
                (3, "single-id", true),
                (4, "chroot", false),
                (5, "traced", false),
            ]
        );
        assert_eq!(Rung::Chroot.to_string(), "rung 4 (chroot)");
        assert!(Rung::ALL.is_sorted());
    }

    #[test]
    fn what_is_missing_is_named_with_what_gives_it() {
        let lack = ChrootLack::Capabilities(vec!["CAP_SYS_CHROOT", "CAP_CHOWN"]);
        assert_eq!(lack.to_string(), "root has no CAP_SYS_CHROOT, CAP_CHOWN");
        assert_eq!(
            lack.hint().as_deref(),
            Some(
                "in a container, give it Docker's default capabilities: --cap-add=SYS_CHROOT \
                 --cap-add=CHOWN"
            )
        );
    }
}
