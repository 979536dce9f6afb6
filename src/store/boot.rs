//! Which trees were surely on disk when the machine went down.
//!
//! Nothing is synced while building, so a tree that has its name may have lost files when
//! the machine loses its power. The kernel writes everything back within half a minute
//! (`vm.dirty_expire_centisecs`, and a few seconds of the file system's journal); so a tree
//! is known to be on disk where the store was used [`SETTLED_SECONDS`] after it was named,
//! in the same boot. `boot.json` says in which boot the store was used last, and when.
//!
//! The first process after a restart removes the trees of which that is not known: they
//! are made again from their blobs. A store that is opened in the boot in which it was last
//! used is asked nothing.

use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};

/// After this long what was named is on disk. The kernel's defaults are 30 s until it begins,
/// looked at every 5 s, and up to 30 s more between two transactions of the file system.
pub(super) const SETTLED_SECONDS: u64 = 120;

/// How exact `boot.json` is, in seconds: it is not written for every build.
pub(super) const EXACTNESS_SECONDS: u64 = 30;

/// A moment in the life of this machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Moment {
    /// The kernel's name for the time between two starts of the machine; a UUID.
    pub(super) boot: String,
    /// Seconds since it was started, times of sleep included.
    pub(super) seconds: u64,
}

impl Moment {
    /// Now.
    pub(super) fn now() -> Self {
        let read = |path| {
            fs::read_to_string(path).unwrap_or_else(|error| {
                tracing::debug!(path, %error, "the kernel does not say when the machine was started");
                String::new()
            })
        };
        let uptime = read("/proc/uptime");
        let seconds = uptime.split('.').next().and_then(|text| text.parse().ok());
        Self {
            boot: read("/proc/sys/kernel/random/boot_id").trim().to_owned(),
            seconds: seconds.unwrap_or(0),
        }
    }

    /// When a store was last used, as its `boot.json` says. What cannot be read says nothing:
    /// it may have been torn itself.
    pub(super) fn read(path: &Path) -> Option<Self> {
        serde_json::from_slice(&fs::read(path).ok()?).ok()
    }

    /// Whether what was named at this moment was on disk when the machine went down, if the
    /// store was last used at `last`.
    pub(super) fn is_settled(&self, last: Option<&Self>) -> bool {
        last.is_some_and(|last| {
            last.boot == self.boot && self.seconds.saturating_add(SETTLED_SECONDS) <= last.seconds
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_moment_is_settled_by_a_later_use_in_the_same_boot() {
        let at = |boot: &str, seconds| Moment {
            boot: boot.to_owned(),
            seconds,
        };
        let named = at("a", 1000);
        for (last, want) in [
            (Some(at("a", 1120)), true),
            (Some(at("a", 1119)), false),
            (Some(at("a", 10)), false),
            (Some(at("b", 9999)), false),
            (None, false),
        ] {
            assert_eq!(named.is_settled(last.as_ref()), want, "{last:?}");
        }
        assert!(!at("a", u64::MAX).is_settled(Some(&at("a", 5))));
        let now = Moment::now();
        assert_eq!(now.boot.len(), 36, "{now:?}");
        assert!(now.seconds > 0);
    }
}
