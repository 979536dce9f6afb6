//! What keeps a step that has no namespaces to its own files and processes: Landlock, where the
//! kernel has it. See `landlock(7)`.
//!
//! Two rulesets, one inside the other. The outer one is about signals alone, and holds the
//! supervisor of a step and the step: the supervisor's `kill(-1)` reaches the step's processes,
//! all at once, and no other. The inner one holds the step: it may use files at and below its root
//! directory, send signals to its own processes, trace them, and connect to its own abstract
//! sockets; not those of its supervisor, of sockless or of anybody else. That tracing is kept to
//! processes under the same ruleset is so with every ruleset.
//!
//! Both need `no_new_privs`, for want of `CAP_SYS_ADMIN`: programs that are setuid, or have
//! capabilities, gain nothing by that.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use super::sys::{self, LandlockRuleset};

/// `LANDLOCK_ACCESS_FS_…`: all of the first version, to make nodes of devices included.
const FIRST_FILES: u64 = (1 << 13) - 1;
const REFER: u64 = 1 << 13;
const TRUNCATE: u64 = 1 << 14;
const IOCTL_DEVICE: u64 = 1 << 15;
/// `LANDLOCK_ACCESS_FS_MAKE_CHAR` and `…_MAKE_BLOCK`, which a step is not allowed.
const MAKE_DEVICES: u64 = 1 << 6 | 1 << 11;
/// `LANDLOCK_SCOPE_…`
const ABSTRACT_SOCKETS: u64 = 1 << 0;
const SIGNALS: u64 = 1 << 1;

/// What of Landlock there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Landlock {
    /// Its version; 0 where there is none.
    version: u64,
}

impl Landlock {
    /// Asks the kernel.
    pub(super) fn here() -> Self {
        let version = sys::landlock_version().unwrap_or(0);
        Self { version }
    }

    /// Whether signals can be kept to processes under a ruleset; since Linux 6.12.
    pub(super) fn scopes_signals(self) -> bool {
        self.version >= 6
    }

    /// What this kernel cannot do, in words for people; empty where nothing is missing.
    pub(super) fn lacks(self) -> Vec<&'static str> {
        let files = "only chroot(2) keeps RUN steps to their files, and they can trace other \
                     processes of their users (Landlock of Linux 5.19 would forbid it)";
        let scopes = "RUN steps can send signals to, and connect to abstract sockets of, other \
                      processes here (Landlock of Linux 6.12 would forbid it)";
        match self.version {
            // The first version forbids to link and move files from directory to directory.
            0 | 1 => vec![files, scopes],
            2..6 => vec![scopes],
            _ => Vec::new(),
        }
    }

    /// Keeps signals of this process, and of those that it starts, to these. Does nothing where
    /// the kernel cannot do that. `top` is the root directory.
    ///
    /// # Errors
    /// Those of Landlock's system calls, without `no_new_privs` above all.
    pub(super) fn scope_signals(self, top: BorrowedFd<'_>) -> io::Result<()> {
        if !self.scopes_signals() {
            return Ok(());
        }
        // Of all that there is to files, only this is forbidden unless it is allowed, also where a
        // ruleset is not about it: to link and move them from directory to directory.
        let about = LandlockRuleset {
            handled_access_fs: REFER,
            scoped: SIGNALS,
            ..LandlockRuleset::default()
        };
        restrict(&about, top, REFER)
    }

    /// Keeps this process, and those that it starts, to the files at and below the directory
    /// `root`, and to each other. Does what the kernel can.
    ///
    /// # Errors
    /// As of [`Self::scope_signals`].
    pub(super) fn confine(self, root: BorrowedFd<'_>) -> io::Result<()> {
        let about = self.ruleset();
        match about.handled_access_fs {
            0 => Ok(()),
            files => restrict(&about, root, files & !MAKE_DEVICES),
        }
    }

    /// All that a step is kept from.
    fn ruleset(self) -> LandlockRuleset {
        let since = |version, right| match self.version >= version {
            true => right,
            false => 0,
        };
        LandlockRuleset {
            handled_access_fs: since(2, FIRST_FILES | REFER)
                | since(3, TRUNCATE)
                | since(5, IOCTL_DEVICE),
            handled_access_net: 0,
            scoped: since(6, ABSTRACT_SOCKETS | SIGNALS),
        }
    }
}

/// Puts this process under a ruleset that allows `access` to what is at and below `place`.
fn restrict(about: &LandlockRuleset, place: BorrowedFd<'_>, access: u64) -> io::Result<()> {
    let ruleset = sys::landlock_ruleset(about)?;
    sys::landlock_allow(ruleset.as_fd(), place, access)?;
    sys::landlock_restrict(ruleset.as_fd())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_older_kernel_is_asked_for_less_and_says_what_it_lacks() {
        let check = |version, files: u64, scoped: u64, lacks: usize| {
            let landlock = Landlock { version };
            let got = landlock.ruleset();
            assert_eq!(
                (got.handled_access_fs, got.handled_access_net, got.scoped),
                (files, 0, scoped),
                "{version}"
            );
            assert_eq!(landlock.lacks().len(), lacks, "{version}");
        };
        check(0, 0, 0, 2);
        // To move files to other directories could not be allowed.
        check(1, 0, 0, 2);
        check(2, 0x3fff, 0, 1);
        check(3, 0x7fff, 0, 1);
        check(4, 0x7fff, 0, 1);
        check(5, 0xffff, 0, 1);
        check(6, 0xffff, 3, 0);
        check(7, 0xffff, 3, 0);
    }
}
