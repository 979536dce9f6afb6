//! Base + layers + config → [`Image`].

use std::collections::BTreeMap;

use super::{Descriptor, DiffId, ImageConfig, Manifest, MediaType, RawManifest};

/// One layer of an image under both of its names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageLayer {
    /// The uncompressed tar.
    pub diff_id: DiffId,
    /// The stored bytes.
    pub descriptor: Descriptor,
}

/// A complete image: values, and the bytes that carry their digests.
#[derive(Clone, Debug)]
pub struct Image {
    /// The config as a value.
    pub config: ImageConfig,
    /// The config's bytes.
    pub config_bytes: Vec<u8>,
    /// The manifest as a value.
    pub manifest: Manifest,
    /// The manifest's bytes, type and digest.
    pub raw_manifest: RawManifest,
    /// The layers, base first.
    pub layers: Vec<ImageLayer>,
    /// What the manifest's descriptor says of it in an index.
    pub descriptor_annotations: BTreeMap<String, String>,
}

/// Annotations that the user asked for, by what they are added to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Annotations {
    /// The manifest.
    pub manifest: BTreeMap<String, String>,
    /// The manifest's descriptor, wherever an index names it.
    pub descriptor: BTreeMap<String, String>,
}

impl Image {
    /// What an index says of the image.
    pub fn descriptor(&self) -> Descriptor {
        Descriptor {
            annotations: self.descriptor_annotations.clone(),
            ..self.raw_manifest.descriptor()
        }
    }
}

/// Joins `config` and `layers` (base first) into an OCI image.
///
/// `rootfs.diff_ids` is set from `layers`. Layers under Docker's media types get
/// OCI's name for the same bytes, because a manifest must not mix the two.
pub fn assemble(
    mut config: ImageConfig,
    mut layers: Vec<ImageLayer>,
    annotations: Annotations,
) -> Image {
    for layer in &mut layers {
        if let Some(media_type) = layer.descriptor.media_type.oci_layer() {
            layer.descriptor.media_type = media_type;
        }
    }
    config.rootfs.diff_ids = layers.iter().map(|l| l.diff_id.clone()).collect();
    let config_bytes = serde_json::to_vec(&config).expect("a config has only string keys");
    let manifest = Manifest {
        schema_version: 2,
        media_type: Some(MediaType::MANIFEST),
        config: Descriptor::of(MediaType::CONFIG, &config_bytes),
        layers: layers.iter().map(|l| l.descriptor.clone()).collect(),
        annotations: annotations.manifest,
    };
    let bytes = serde_json::to_vec(&manifest).expect("a manifest has only string keys");
    let raw_manifest = RawManifest::new(MediaType::MANIFEST, bytes);
    Image {
        config,
        config_bytes,
        manifest,
        raw_manifest,
        layers,
        descriptor_annotations: annotations.descriptor,
    }
}
