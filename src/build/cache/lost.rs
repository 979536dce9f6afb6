//! [`LostLayer`]: what an imported cache promised and does not have when it is needed, or never
//! had: of steps whose layers were not exported it knows which they are.
//!
//! A step that was looked up is not done, so its layer may turn out to be missing when
//! somebody reads it: a step, an upload, an output. Layers above it were found by what it
//! is, and doing it now may give another. So the steps that do not need it go on to their
//! end, and then the build begins again without it: what was done before is in the store.

use thiserror::Error;

use super::CacheSource;
use crate::build::Shared_;
use crate::image::{Digest, Repository};

/// A layer of an imported cache cannot be had.
#[derive(Debug, Error)]
pub(in crate::build) enum LostLayer {
    /// Its registry said that it has it.
    #[error("the layer {digest} of the cache {cache} cannot be had")]
    Gone {
        /// The cache.
        cache: CacheSource,
        /// Where its layers are.
        repository: Repository,
        /// The layer's blob.
        digest: Digest,
        /// Why it cannot be had.
        source: anyhow::Error,
    },
    /// It was not exported.
    #[error("the cache {cache} was exported without the layer {digest}")]
    NotExported {
        /// The cache.
        cache: CacheSource,
        /// The layer's blob.
        digest: Digest,
    },
}

/// What a build does without after a layer was lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::build) enum Without {
    /// The layer; the cache's others are asked after again.
    Layer,
    /// All layers of the cache: it is the second that was lost.
    Cache,
    /// All layers that were not exported, of all caches.
    NotExported,
}

impl LostLayer {
    /// The lost layer that `error` comes from, if it comes from one.
    pub(in crate::build) fn of(error: &anyhow::Error) -> Option<&Self> {
        let mut causes = error.chain();
        causes.find_map(|cause| Shared_::unwrapped(cause).downcast_ref())
    }

    /// What the user is told; nothing of what is nobody's fault.
    pub(in crate::build) fn warning(&self, without: Without) -> Option<String> {
        let Self::Gone { source, .. } = self else {
            return None;
        };
        let what = match without {
            Without::Layer => "it",
            Without::Cache => "that cache",
            Without::NotExported => return None,
        };
        Some(format!(
            "{self}, so the build begins again without {what}: {source:#}"
        ))
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::Arc;

    use anyhow::{Context as _, anyhow};

    use super::*;
    use crate::build::unshare;
    use crate::image::Reference;

    fn digest() -> Digest {
        Digest::of(b"layer")
    }

    fn lost() -> LostLayer {
        let cache = Reference::parse("r.io/app:cache").unwrap();
        LostLayer::Gone {
            repository: cache.repository().clone(),
            cache: CacheSource::Registry(cache),
            digest: digest(),
            source: anyhow!("404").context("pulling"),
        }
    }

    #[test]
    fn a_lost_layer_is_found_wherever_its_error_came_by() {
        let is_found = |error: &anyhow::Error| LostLayer::of(error).is_some();
        let plain = anyhow::Error::new(lost());
        assert!(is_found(&plain));
        let shared = unshare(&Arc::new(plain));
        assert!(is_found(&shared));
        let shared = unshare(&Arc::new(shared.context("unpacking")));
        assert!(is_found(&shared));
        let read = Err::<(), _>(io::Error::other(shared)).context("reading /etc/passwd");
        assert!(is_found(&read.unwrap_err()));
        assert!(!is_found(&anyhow!("exit code: 1")));
    }

    #[test]
    fn the_warning_names_cache_digest_and_reason() {
        let lost = lost();
        let begin = format!(
            "the layer {} of the cache r.io/app:cache cannot be had, so",
            digest()
        );
        assert_eq!(
            lost.warning(Without::Layer),
            Some(format!(
                "{begin} the build begins again without it: pulling: 404"
            ))
        );
        assert_eq!(
            lost.warning(Without::Cache),
            Some(format!(
                "{begin} the build begins again without that cache: pulling: 404"
            ))
        );
        let never_there = LostLayer::NotExported {
            cache: CacheSource::Registry(Reference::parse("r.io/app:cache").unwrap()),
            digest: digest(),
        };
        assert_eq!(never_there.warning(Without::NotExported), None);
    }
}
