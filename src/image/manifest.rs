//! [`Manifest`] and [`Index`], with the limits and checks for documents from elsewhere.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use thiserror::Error;

use super::{Descriptor, Digest, MediaType, Platform};

/// The largest manifest or index that is read, in bytes: what registries accept (4 MiB).
pub const MANIFEST_LIMIT_BYTES: u64 = 4 << 20;

/// The manifest of one image.
///
/// <https://github.com/opencontainers/image-spec/blob/main/manifest.md>
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Manifest {
    /// Always 2.
    pub schema_version: u32,
    /// The manifest's own type; absent in some old OCI manifests.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub media_type: Option<MediaType>,
    /// The image config.
    pub config: Descriptor,
    /// The layers, base first.
    pub layers: Vec<Descriptor>,
    /// Annotations, sorted by key.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
}

/// An index: one manifest per platform.
///
/// <https://github.com/opencontainers/image-spec/blob/main/image-index.md>
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Index {
    /// Always 2.
    pub schema_version: u32,
    /// The index's own type.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub media_type: Option<MediaType>,
    /// The manifests.
    pub manifests: Vec<Descriptor>,
    /// Annotations, sorted by key.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
}

/// A manifest or an index, told apart by content and type.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ManifestOrIndex {
    /// One image.
    Manifest(Manifest),
    /// Several.
    Index(Index),
}

/// Bytes as a registry gave them: digest and type belong to exactly these.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RawManifest {
    /// The document.
    pub bytes: Vec<u8>,
    /// Its type, from the registry's `Content-Type`.
    pub media_type: MediaType,
    /// The digest of `bytes`.
    pub digest: Digest,
}

/// Why a document is neither manifest nor index.
#[derive(Debug, Error)]
pub enum ManifestError {
    /// Not JSON, or fields are missing.
    #[error("the document is not a valid {media_type}")]
    Malformed {
        /// What it was said to be.
        media_type: MediaType,
        /// What the parser says.
        #[source]
        source: serde_json::Error,
    },
    /// A type that sockless does not read.
    #[error(
        "unsupported manifest type {0}: expected an OCI or Docker (schema 2) manifest or index"
    )]
    Unsupported(MediaType),
    /// The document could be read as either (CVE-2021-41190).
    #[error("the document has the fields of a manifest and of an index at once")]
    Ambiguous,
    /// The document says it is something else than the registry said.
    #[error("the document says it is {inside}, the registry said {outside}")]
    TypeMismatch {
        /// `mediaType` in the document.
        inside: MediaType,
        /// The `Content-Type` it came with.
        outside: MediaType,
    },
    /// The schema version is not 2.
    #[error("unsupported schema version {0}: expected 2")]
    SchemaVersion(u32),
    /// An index has no image for the platform.
    #[error("no image for {wanted}: the index has {offered}")]
    NoPlatform {
        /// What was asked for.
        wanted: Platform,
        /// What there is, for people.
        offered: String,
    },
}

impl RawManifest {
    /// Hashes `bytes`.
    pub fn new(media_type: MediaType, bytes: Vec<u8>) -> Self {
        Self {
            digest: Digest::of(&bytes),
            media_type,
            bytes,
        }
    }

    /// A descriptor of the document.
    pub fn descriptor(&self) -> Descriptor {
        Descriptor::new(
            self.media_type.clone(),
            self.digest.clone(),
            self.bytes.len() as u64,
        )
    }

    /// Parses the document and checks that it is what its type says and nothing else.
    ///
    /// # Errors
    /// Every variant of [`ManifestError`] but `NoPlatform`.
    pub fn parse(&self) -> Result<ManifestOrIndex, ManifestError> {
        let malformed = |source| ManifestError::Malformed {
            media_type: self.media_type.clone(),
            source,
        };
        if !self.media_type.is_index() && !self.media_type.is_manifest() {
            return Err(ManifestError::Unsupported(self.media_type.clone()));
        }
        let value: Value = serde_json::from_slice(&self.bytes).map_err(malformed)?;
        let has = |key| value.get(key).is_some();
        if has("manifests") && (has("layers") || has("config")) {
            return Err(ManifestError::Ambiguous);
        }
        let parsed = if self.media_type.is_index() {
            ManifestOrIndex::Index(serde_json::from_value(value).map_err(malformed)?)
        } else {
            ManifestOrIndex::Manifest(serde_json::from_value(value).map_err(malformed)?)
        };
        let (version, inside) = match &parsed {
            ManifestOrIndex::Manifest(m) => (m.schema_version, &m.media_type),
            ManifestOrIndex::Index(i) => (i.schema_version, &i.media_type),
        };
        if version != 2 {
            return Err(ManifestError::SchemaVersion(version));
        }
        if let Some(inside) = inside
            && *inside != self.media_type
        {
            return Err(ManifestError::TypeMismatch {
                inside: inside.clone(),
                outside: self.media_type.clone(),
            });
        }
        Ok(parsed)
    }
}

impl Index {
    /// The manifest that serves `platform` best; the first of equally good ones.
    ///
    /// # Errors
    /// [`ManifestError::NoPlatform`] with the platforms there are.
    pub fn choose(&self, platform: &Platform) -> Result<&Descriptor, ManifestError> {
        self.manifests
            .iter()
            .filter(|d| d.media_type.is_manifest())
            .filter_map(|d| Some((d.platform.as_ref()?.fitness_for(platform)?, d)))
            .min_by_key(|(fitness, _)| *fitness)
            .map(|(_, d)| d)
            .ok_or_else(|| {
                let offered: Vec<String> = self
                    .manifests
                    .iter()
                    .filter_map(|d| d.platform.as_ref().map(Platform::to_string))
                    .filter(|p| p != "unknown/unknown")
                    .collect();
                ManifestError::NoPlatform {
                    wanted: platform.clone(),
                    offered: if offered.is_empty() {
                        "none".to_owned()
                    } else {
                        offered.join(", ")
                    },
                }
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EMPTY: &str = r#"{"mediaType":"a","size":0,"digest":"sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"}"#;

    fn parse(media_type: MediaType, text: &str) -> Result<ManifestOrIndex, ManifestError> {
        RawManifest::new(media_type, text.as_bytes().to_vec()).parse()
    }

    #[test]
    fn security_s17_a_document_is_what_it_says_or_an_error() {
        let manifest = format!(r#"{{"schemaVersion":2,"config":{EMPTY},"layers":[]}}"#);
        assert!(matches!(
            parse(MediaType::MANIFEST, &manifest),
            Ok(ManifestOrIndex::Manifest(_))
        ));
        assert!(matches!(
            parse(MediaType::INDEX, &manifest),
            Err(ManifestError::Malformed { .. })
        ));
        let both = format!(r#"{{"schemaVersion":2,"config":{EMPTY},"layers":[],"manifests":[]}}"#);
        for media_type in [MediaType::MANIFEST, MediaType::INDEX] {
            assert!(matches!(
                parse(media_type, &both),
                Err(ManifestError::Ambiguous)
            ));
        }
        let typed = format!(
            r#"{{"schemaVersion":2,"mediaType":"{}","config":{EMPTY},"layers":[]}}"#,
            MediaType::DOCKER_MANIFEST
        );
        assert!(matches!(
            parse(MediaType::MANIFEST, &typed),
            Err(ManifestError::TypeMismatch { .. })
        ));
        assert!(matches!(
            parse(MediaType::new("text/html"), "<html>"),
            Err(ManifestError::Unsupported(_))
        ));
    }

    #[test]
    fn an_index_gives_the_best_platform() {
        let entry = |platform: &str, n: u64| {
            let mut d = Descriptor::new(MediaType::MANIFEST, Digest::of(b""), n);
            d.platform = Some(Platform::parse(platform).unwrap());
            d
        };
        let index = Index {
            schema_version: 2,
            media_type: None,
            manifests: vec![
                entry("linux/arm/v6", 1),
                entry("linux/arm/v7", 2),
                entry("linux/amd64", 3),
            ],
            annotations: BTreeMap::new(),
        };
        let choose = |p| index.choose(&Platform::parse(p).unwrap()).map(|d| d.size);
        assert_eq!(choose("linux/arm/v7").unwrap(), 2);
        assert_eq!(choose("linux/arm/v8").unwrap(), 2);
        assert_eq!(choose("linux/amd64").unwrap(), 3);
        assert_eq!(
            choose("linux/s390x").unwrap_err().to_string(),
            "no image for linux/s390x: the index has linux/arm/v6, linux/arm/v7, linux/amd64"
        );
    }
}
