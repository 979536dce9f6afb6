//! A whole build read top to bottom: parse, graph, resolve, lower, execute, assemble, export.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use crate::image::{Digest, Platform, Reference};
use crate::progress::Progress;
use crate::{registry, sandbox};

/// Everything a build needs to know, validated.
#[derive(Clone, Debug)]
pub struct BuildRequest {
    /// The build context's directory.
    pub context: PathBuf,
    /// The Dockerfile; absent: `Dockerfile` in the context.
    pub dockerfile: Option<PathBuf>,
    /// Names for the image.
    pub tags: Vec<Reference>,
    /// Whether the image is pushed to every tag.
    pub push: bool,
    /// Files that are written.
    pub outputs: Vec<Output>,
    /// `--build-arg`: values by name.
    pub build_args: BTreeMap<String, String>,
    /// `--target`: the stage to build; absent: the last.
    pub target: Option<String>,
    /// `--platform`.
    pub platform: Platform,
    /// `--no-cache`: no step is looked up in the cache.
    pub no_cache: bool,
    /// `SOURCE_DATE_EPOCH`, in seconds since 1970 UTC.
    pub epoch: Option<i64>,
    /// How registries are reached.
    pub registry: registry::Options,
    /// Which sandbox runs the steps.
    pub sandbox: sandbox::Choice,
    /// The store's directory.
    pub root: PathBuf,
    /// `--iidfile`: where the image's digest is written.
    pub iid_file: Option<PathBuf>,
    /// `--metadata-file`: where a JSON object about the result is written.
    pub metadata_file: Option<PathBuf>,
}

/// A file that the image is written to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    /// `type=oci,dest=FILE`: a tar of an OCI image layout.
    OciArchive {
        /// The file.
        dest: PathBuf,
    },
}

/// What a build made.
#[derive(Clone, Debug)]
pub struct BuildResult {
    /// The manifest's digest.
    pub digest: Digest,
    /// The config's digest, Docker's image ID.
    pub image_id: Digest,
}

/// Builds an image.
///
/// # Errors
/// Any; the chain names what failed, where, and what was expected.
pub async fn build(
    request: BuildRequest,
    progress: Arc<dyn Progress>,
) -> anyhow::Result<BuildResult> {
    let _ = (request, progress);
    unimplemented!()
}
