//! Values of the OCI image specification. No I/O.
//!
//! Types are this crate's own, because those of `oci-spec` and `oci-client` drop
//! `Healthcheck`, `OnBuild` and `Shell`, and fields that they do not know.

mod assemble;
mod config;
mod descriptor;
mod digest;
mod manifest;
mod reference;
pub mod validate;

pub use assemble::{
    Annotations, Image, ImageIndex, ImageLayer, ImageOrIndex, PlatformAnnotations, assemble,
    assemble_index, is_annotated,
};
pub use config::{
    CONFIG_LIMIT_BYTES, DEFAULT_PATH, Empty, Healthcheck, History, ImageConfig, RootfsDiffIds,
    RunConfig,
};
pub use descriptor::{Descriptor, MediaType, Platform, PlatformError};
pub use digest::{DiffId, Digest, DigestError, Hasher, chain_id};
pub use manifest::{
    Index, MANIFEST_LIMIT_BYTES, Manifest, ManifestError, ManifestOrIndex, RawManifest,
};
pub use reference::{DOCKER_HUB, Reference, ReferenceError, Repository};
