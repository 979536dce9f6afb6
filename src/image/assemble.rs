//! Base + layers + config → [`Image`]; images of several platforms → [`ImageIndex`].

use std::collections::BTreeMap;

use super::{Descriptor, DiffId, Digest, ImageConfig, Index, Manifest, MediaType};
use super::{Platform, RawManifest};

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
    /// The manifest, or every manifest of an index.
    pub manifest: BTreeMap<String, String>,
    /// The manifest's descriptor, wherever an index names it.
    pub descriptor: BTreeMap<String, String>,
    /// The same for the image of one platform alone; they win over those for all.
    pub platforms: BTreeMap<Platform, PlatformAnnotations>,
    /// The index.
    pub index: BTreeMap<String, String>,
    /// The index's descriptor, wherever another index names it.
    pub index_descriptor: BTreeMap<String, String>,
}

/// Annotations for one platform.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PlatformAnnotations {
    /// The manifest.
    pub manifest: BTreeMap<String, String>,
    /// The manifest's descriptor.
    pub descriptor: BTreeMap<String, String>,
}

impl Annotations {
    /// These and `more`, which win.
    #[must_use]
    pub fn with(&self, more: &Self) -> Self {
        let mut all = self.clone();
        all.manifest.extend(more.manifest.clone());
        all.descriptor.extend(more.descriptor.clone());
        for (platform, more) in &more.platforms {
            let own = all.platforms.entry(platform.clone()).or_default();
            own.manifest.extend(more.manifest.clone());
            own.descriptor.extend(more.descriptor.clone());
        }
        all.index.extend(more.index.clone());
        all.index_descriptor.extend(more.index_descriptor.clone());
        all
    }

    /// What they say of the image for `platform`.
    #[must_use]
    pub fn of(&self, platform: &Platform) -> PlatformAnnotations {
        let mut all = PlatformAnnotations {
            manifest: self.manifest.clone(),
            descriptor: self.descriptor.clone(),
        };
        let own = self.platforms.iter();
        for (_, own) in own.filter(|(named, _)| is_annotated(platform, named)) {
            all.manifest.extend(own.manifest.clone());
            all.descriptor.extend(own.descriptor.clone());
        }
        all
    }
}

/// Whether an annotation for the platform `named` is for an image for `platform`, which may
/// have a version that nobody asked for.
pub fn is_annotated(platform: &Platform, named: &Platform) -> bool {
    let version = named.os_version.as_ref();
    let version = version.or(platform.os_version.as_ref());
    *platform
        == Platform {
            os_version: version.cloned(),
            ..named.clone()
        }
}

/// Images for several platforms under one name.
#[derive(Clone, Debug)]
pub struct ImageIndex {
    /// The images, in the order of the index.
    pub images: Vec<Image>,
    /// The index's bytes, type and digest.
    pub raw: RawManifest,
    /// What the index's descriptor says of it in another index.
    pub descriptor_annotations: BTreeMap<String, String>,
}

/// What a build gives under one name.
#[derive(Clone, Debug)]
pub enum ImageOrIndex {
    /// One image.
    Image(Box<Image>),
    /// Images for several platforms.
    Index(ImageIndex),
}

impl ImageOrIndex {
    /// The images, in the order of the index.
    pub fn images(&self) -> &[Image] {
        match self {
            Self::Image(image) => std::slice::from_ref(image),
            Self::Index(index) => &index.images,
        }
    }

    /// The bytes, type and digest of what the name is for.
    pub fn raw(&self) -> &RawManifest {
        match self {
            Self::Image(image) => &image.raw_manifest,
            Self::Index(index) => &index.raw,
        }
    }

    /// What an index says of it; of an image also its platform.
    pub fn descriptor(&self) -> Descriptor {
        match self {
            Self::Image(image) => Descriptor {
                platform: Some(image.config.platform.clone()),
                ..image.descriptor()
            },
            Self::Index(index) => Descriptor {
                annotations: index.descriptor_annotations.clone(),
                ..index.raw.descriptor()
            },
        }
    }

    /// Docker's image ID: the digest of an image's config, and of an index itself.
    pub fn id(&self) -> &Digest {
        match self {
            Self::Image(image) => &image.manifest.config.digest,
            Self::Index(index) => &index.raw.digest,
        }
    }
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
    annotations: PlatformAnnotations,
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

/// Joins images, each with what it is for, into an OCI index that names them in this order.
pub fn assemble_index(images: Vec<(Platform, Image)>, annotations: &Annotations) -> ImageIndex {
    let descriptors = images.iter().map(|(platform, image)| Descriptor {
        platform: Some(platform.clone()),
        ..image.descriptor()
    });
    let index = Index {
        schema_version: 2,
        media_type: Some(MediaType::INDEX),
        manifests: descriptors.collect(),
        annotations: annotations.index.clone(),
    };
    let bytes = serde_json::to_vec(&index).expect("an index has only string keys");
    ImageIndex {
        images: images.into_iter().map(|(_, image)| image).collect(),
        raw: RawManifest::new(MediaType::INDEX, bytes),
        descriptor_annotations: annotations.index_descriptor.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pairs(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        let pairs = pairs.iter();
        pairs
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
            .collect()
    }

    #[test]
    fn an_index_names_its_images_in_order_and_says_what_they_are_for() {
        let platform = |text| Platform::parse(text).unwrap();
        let (arm, amd) = (platform("linux/arm64"), platform("linux/amd64"));
        let mut annotations = Annotations {
            manifest: pairs(&[("a", "all"), ("b", "all")]),
            descriptor: pairs(&[("d", "1")]),
            index: pairs(&[("i", "2")]),
            index_descriptor: pairs(&[("x", "3")]),
            ..Annotations::default()
        };
        let own = annotations.platforms.entry(arm.clone()).or_default();
        own.manifest = pairs(&[("a", "arm")]);
        let more = Annotations {
            manifest: pairs(&[("b", "more")]),
            ..Annotations::default()
        };
        let all = annotations.with(&more);
        let image = |platform: &Platform| {
            let config = ImageConfig::scratch(platform.clone());
            (
                platform.clone(),
                assemble(config, Vec::new(), all.of(platform)),
            )
        };
        let (first, second) = (image(&arm), image(&amd));
        assert_eq!(
            first.1.manifest.annotations,
            pairs(&[("a", "arm"), ("b", "more")])
        );
        assert_eq!(
            second.1.manifest.annotations,
            pairs(&[("a", "all"), ("b", "more")])
        );
        let index = assemble_index(vec![first.clone(), second.clone()], &all);
        let entry = |(_, image): &(Platform, Image), architecture: &str| {
            serde_json::json!({
                "mediaType": "application/vnd.oci.image.manifest.v1+json",
                "digest": image.raw_manifest.digest,
                "size": image.raw_manifest.bytes.len(),
                "platform": {"architecture": architecture, "os": "linux"},
                "annotations": {"d": "1"},
            })
        };
        assert_eq!(
            serde_json::from_slice::<serde_json::Value>(&index.raw.bytes).unwrap(),
            serde_json::json!({
                "schemaVersion": 2,
                "mediaType": "application/vnd.oci.image.index.v1+json",
                "manifests": [entry(&first, "arm64"), entry(&second, "amd64")],
                "annotations": {"i": "2"},
            })
        );
        let named = ImageOrIndex::Index(index);
        assert_eq!(named.id(), &named.raw().digest);
        let descriptor = named.descriptor();
        assert_eq!(
            (descriptor.annotations, descriptor.platform),
            (pairs(&[("x", "3")]), None)
        );
    }
}
