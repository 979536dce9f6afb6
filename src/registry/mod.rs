//! A client of the OCI distribution specification.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

/// How registries are reached.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// `--registry-mirror`: for a registry's name, base URLs that are asked before it, in order.
    /// A URL may have a path, which is put before `/v2/`'s repository name.
    pub mirrors: BTreeMap<String, Vec<url::Url>>,
    /// `--insecure-registry`: `HOST[:PORT]` that may be spoken to over plain HTTP
    /// or with a certificate that nobody vouches for.
    pub insecure: BTreeSet<String>,
    /// Files with PEM certificates that are trusted beside the system's.
    pub ca_files: Vec<PathBuf>,
    /// The directory of `config.json` with credentials; absent: `$DOCKER_CONFIG`, else `~/.docker`.
    pub docker_config: Option<PathBuf>,
}
