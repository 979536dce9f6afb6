//! Re-derives every digest, size and diff ID from the bytes it is given.
//!
//! Trusts nothing but the manifest it starts from: descriptors, config, layers and
//! history must agree with each other and with the bytes. It does no I/O of its own,
//! looks into no layer's tar, and reports everything it finds, not only the first.
//!
//! <https://github.com/opencontainers/image-spec/blob/main/manifest.md> and `config.md`

use std::fmt;
use std::io::{self, BufReader, Read};

use thiserror::Error;

use super::{
    CONFIG_LIMIT_BYTES, Descriptor, DiffId, Digest, ImageConfig, Index, MANIFEST_LIMIT_BYTES,
    Manifest, ManifestError, ManifestOrIndex, MediaType, Platform, RawManifest,
};
use crate::io::{HashingReader, HashingWriter, LimitedReader};

/// Which document or blob of an image a [`Finding`] is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Part {
    /// The document that validation started from.
    Root,
    /// A manifest that an index names, by its place, from 0.
    Manifest(usize),
    /// The config.
    Config,
    /// A layer, by its place in the manifest, from 0.
    Layer(usize),
}

/// One thing that does not agree.
#[derive(Debug, Error)]
pub enum Finding {
    /// The bytes are others than the digest says.
    #[error("{part}: got {got}, want {want}")]
    Digest {
        /// What the bytes are of.
        part: Part,
        /// The bytes' digest.
        got: Digest,
        /// The digest they are named by.
        want: Digest,
    },
    /// There are more or fewer bytes than the descriptor says.
    #[error("{part}: got {got} bytes, want {want}")]
    Size {
        /// What the bytes are of.
        part: Part,
        /// Their number.
        got: u64,
        /// The descriptor's number.
        want: u64,
    },
    /// An uncompressed layer is another than the config says.
    #[error("{part}: got diff ID {got}, want {want}")]
    DiffId {
        /// The layer.
        part: Part,
        /// Derived from its bytes.
        got: DiffId,
        /// From the config.
        want: DiffId,
    },
    /// The bytes cannot be had.
    #[error("{part}: reading its bytes")]
    Fetch {
        /// What the bytes are of.
        part: Part,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A layer's bytes are not compressed as its media type says.
    #[error("{part}: decompressing as {media_type}")]
    Decompress {
        /// The layer.
        part: Part,
        /// Its type.
        media_type: MediaType,
        /// What the decompressor says.
        #[source]
        source: io::Error,
    },
    /// A document is no manifest or index.
    #[error("{part}")]
    Manifest {
        /// The document.
        part: Part,
        /// What is wrong with it.
        #[source]
        source: ManifestError,
    },
    /// The config is no image config.
    #[error("{part}: not an image config")]
    Config {
        /// Always the config.
        part: Part,
        /// What the parser says.
        #[source]
        source: serde_json::Error,
    },
    /// Something has a type that does not belong there.
    #[error("{part}: got media type {got:?}, want {want}")]
    MediaType {
        /// What has it.
        part: Part,
        /// Its type; empty where it has none.
        got: String,
        /// What belongs there.
        want: String,
    },
    /// Two counts that must be the same.
    #[error("got {got} {what}, want {want} as there are layers")]
    Count {
        /// What was counted.
        what: &'static str,
        /// How many there are.
        got: usize,
        /// How many layers there are.
        want: usize,
    },
    /// A field of the config has a value that it must not have.
    #[error("config: {field} is {got:?}, want {want}")]
    Field {
        /// The field.
        field: &'static str,
        /// Its value.
        got: String,
        /// What it should be.
        want: String,
    },
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Root => f.write_str("document"),
            Self::Manifest(index) => write!(f, "manifest {index} of the index"),
            Self::Config => f.write_str("config"),
            Self::Layer(index) => write!(f, "layer {index}"),
        }
    }
}

/// Opens the bytes that a descriptor names.
pub trait Fetch: FnMut(&Descriptor) -> io::Result<Box<dyn Read>> {}

impl<F: FnMut(&Descriptor) -> io::Result<Box<dyn Read>>> Fetch for F {}

/// Checks an image, or every image of an index, and returns all findings; none is well.
///
/// `fetch` is called once for each blob that is named, and what it returns is read to
/// its end. Documents are held in memory up to their limits, layers are streamed.
pub fn validate(root: &RawManifest, mut fetch: impl Fetch) -> Vec<Finding> {
    let mut validator = Validator {
        fetch: &mut fetch,
        findings: Vec::new(),
    };
    validator.document(Part::Root, root, None);
    validator.findings
}

struct Validator<'f, F> {
    fetch: &'f mut F,
    findings: Vec<Finding>,
}

impl<F: Fetch> Validator<'_, F> {
    fn document(&mut self, part: Part, raw: &RawManifest, platform: Option<&Platform>) {
        let got = Digest::of(&raw.bytes);
        if got != raw.digest {
            let want = raw.digest.clone();
            self.findings.push(Finding::Digest {
                part: part.clone(),
                got,
                want,
            });
        }
        match raw.parse() {
            Err(source) => self.findings.push(Finding::Manifest { part, source }),
            Ok(ManifestOrIndex::Manifest(manifest)) => {
                self.manifest(&part, &raw.media_type, &manifest, platform);
            }
            Ok(ManifestOrIndex::Index(index)) => self.index(&index),
        }
    }

    fn index(&mut self, index: &Index) {
        for (place, descriptor) in index.manifests.iter().enumerate() {
            let part = Part::Manifest(place);
            // An index in an index is allowed by the specification and used by nobody.
            if !descriptor.media_type.is_manifest() {
                self.findings.push(Finding::MediaType {
                    part,
                    got: descriptor.media_type.to_string(),
                    want: "a manifest's".to_owned(),
                });
                continue;
            }
            if let Some(bytes) = self.read(&part, descriptor, MANIFEST_LIMIT_BYTES) {
                let raw = RawManifest::new(descriptor.media_type.clone(), bytes);
                self.document(part, &raw, descriptor.platform.as_ref());
            }
        }
    }

    fn manifest(
        &mut self,
        part: &Part,
        media_type: &MediaType,
        manifest: &Manifest,
        platform: Option<&Platform>,
    ) {
        let is_docker = *media_type == MediaType::DOCKER_MANIFEST;
        // OCI allows it to be absent, Docker does not.
        if is_docker && manifest.media_type.is_none() {
            self.findings.push(Finding::MediaType {
                part: part.clone(),
                got: String::new(),
                want: MediaType::DOCKER_MANIFEST.to_string(),
            });
        }
        let want = if is_docker {
            MediaType::DOCKER_CONFIG
        } else {
            MediaType::CONFIG
        };
        if manifest.config.media_type != want {
            self.findings.push(Finding::MediaType {
                part: Part::Config,
                got: manifest.config.media_type.to_string(),
                want: want.to_string(),
            });
        }
        let config = self
            .read(&Part::Config, &manifest.config, CONFIG_LIMIT_BYTES)
            .and_then(|bytes| self.config(&bytes, manifest, platform));
        for (place, descriptor) in manifest.layers.iter().enumerate() {
            let part = Part::Layer(place);
            if !is_layer(&descriptor.media_type, is_docker) {
                let family = if is_docker { "a Docker" } else { "an OCI" };
                self.findings.push(Finding::MediaType {
                    part: part.clone(),
                    got: descriptor.media_type.to_string(),
                    want: format!("{family} layer's"),
                });
            }
            let want = config.as_ref().and_then(|c| c.rootfs.diff_ids.get(place));
            self.layer(part, descriptor, want);
        }
    }

    fn config(
        &mut self,
        bytes: &[u8],
        manifest: &Manifest,
        platform: Option<&Platform>,
    ) -> Option<ImageConfig> {
        let config: ImageConfig = match serde_json::from_slice(bytes) {
            Ok(config) => config,
            Err(source) => {
                let part = Part::Config;
                self.findings.push(Finding::Config { part, source });
                return None;
            }
        };
        let want = manifest.layers.len();
        let mut count = |what, got| {
            if got != want {
                self.findings.push(Finding::Count { what, got, want });
            }
        };
        count("diff IDs", config.rootfs.diff_ids.len());
        // The history as a whole is optional.
        if !config.history.is_empty() {
            let with_layer = config.history.iter().filter(|h| !h.empty_layer).count();
            count("history entries with a layer", with_layer);
        }
        let mut field = |field, got: &str, is_right: bool, want: &str| {
            if !is_right {
                self.findings.push(Finding::Field {
                    field,
                    got: got.to_owned(),
                    want: want.to_owned(),
                });
            }
        };
        let kind = &config.rootfs.kind;
        field("rootfs.type", kind, kind == "layers", "\"layers\"");
        let own = &config.platform;
        field("os", &own.os, !own.os.is_empty(), "a name");
        let architecture = &own.architecture;
        field(
            "architecture",
            architecture,
            !architecture.is_empty(),
            "a name",
        );
        if let Some(platform) = platform {
            let same = (&own.os, architecture, &own.variant)
                == (&platform.os, &platform.architecture, &platform.variant);
            let want = format!("{platform}, as the index says");
            field("platform", &own.to_string(), same, &want);
        }
        Some(config)
    }

    /// Reads a document's bytes; `None` where they cannot be had.
    fn read(&mut self, part: &Part, descriptor: &Descriptor, limit: u64) -> Option<Vec<u8>> {
        let read = |reader| {
            let mut bytes = Vec::new();
            LimitedReader::new(reader, limit, "the document").read_to_end(&mut bytes)?;
            Ok(bytes)
        };
        match (self.fetch)(descriptor).and_then(read) {
            Ok(bytes) => {
                self.compare(part, &Digest::of(&bytes), bytes.len() as u64, descriptor);
                Some(bytes)
            }
            Err(source) => {
                let part = part.clone();
                self.findings.push(Finding::Fetch { part, source });
                None
            }
        }
    }

    fn layer(&mut self, part: Part, descriptor: &Descriptor, want: Option<&DiffId>) {
        let reader = match (self.fetch)(descriptor) {
            Ok(reader) => reader,
            Err(source) => {
                self.findings.push(Finding::Fetch { part, source });
                return;
            }
        };
        let mut stored = HashingReader::new(BufReader::new(reader));
        let diff_id = decompress(&descriptor.media_type, &mut stored);
        // What a decompressor did not want is part of the stored bytes too.
        let rest = io::copy(&mut stored, &mut io::sink());
        let (_, digest, size) = stored.finish();
        if let Err(source) = rest {
            self.findings.push(Finding::Fetch { part, source });
            return;
        }
        self.compare(&part, &digest, size, descriptor);
        match (diff_id, want) {
            (Ok(Some(got)), Some(want)) if got != *want => {
                let want = want.clone();
                self.findings.push(Finding::DiffId { part, got, want });
            }
            // An unknown type was found before; a missing diff ID is counted.
            (Ok(_), _) => {}
            (Err(source), _) => self.findings.push(Finding::Decompress {
                part,
                media_type: descriptor.media_type.clone(),
                source,
            }),
        }
    }

    fn compare(&mut self, part: &Part, digest: &Digest, size: u64, descriptor: &Descriptor) {
        if size != descriptor.size {
            self.findings.push(Finding::Size {
                part: part.clone(),
                got: size,
                want: descriptor.size,
            });
        }
        if *digest != descriptor.digest {
            self.findings.push(Finding::Digest {
                part: part.clone(),
                got: digest.clone(),
                want: descriptor.digest.clone(),
            });
        }
    }
}

fn is_layer(media_type: &MediaType, is_docker: bool) -> bool {
    let Some(oci) = media_type.oci_layer() else {
        return false;
    };
    (*media_type == oci) != is_docker
}

/// The diff ID of a layer's bytes; `None` for a type that is no layer's.
fn decompress(media_type: &MediaType, stored: &mut impl Read) -> io::Result<Option<DiffId>> {
    let Some(media_type) = media_type.oci_layer() else {
        return Ok(None);
    };
    let mut plain: Box<dyn Read> = if media_type == MediaType::LAYER_GZIP {
        Box::new(flate2::read::MultiGzDecoder::new(stored))
    } else if media_type == MediaType::LAYER_ZSTD {
        Box::new(zstd::Decoder::new(stored)?)
    } else {
        Box::new(stored)
    };
    let mut hashed = HashingWriter::new(io::sink());
    io::copy(&mut plain, &mut hashed)?;
    let (_, digest, _) = hashed.finish();
    Ok(Some(DiffId::from_uncompressed(digest)))
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::io::Write as _;

    use super::*;
    use crate::image::{History, Image, ImageLayer, PlatformAnnotations, assemble};

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
        out.write_all(bytes).unwrap();
        out.finish().unwrap()
    }

    /// An image whose bytes can be damaged; blobs are found under their right digests.
    struct Fixture {
        image: Image,
        blobs: HashMap<Digest, Vec<u8>>,
    }

    /// A gzip layer, a zstd layer and a plain one, and an instruction without a layer.
    fn fixture() -> Fixture {
        let mut blobs = HashMap::new();
        let two_members = [gzip(b"first "), gzip(b"layer")].concat();
        let stored = [
            (MediaType::LAYER_GZIP, &b"first layer"[..], two_members),
            (
                MediaType::LAYER_ZSTD,
                b"second",
                zstd::encode_all(&b"second"[..], 3).unwrap(),
            ),
            (MediaType::LAYER_TAR, b"third", b"third".to_vec()),
        ];
        let layers = stored
            .into_iter()
            .map(|(media_type, plain, stored)| {
                let descriptor = Descriptor::of(media_type, &stored);
                blobs.insert(descriptor.digest.clone(), stored);
                let diff_id = DiffId::from_uncompressed(Digest::of(plain));
                ImageLayer {
                    diff_id,
                    descriptor,
                }
            })
            .collect();
        let mut config = ImageConfig::scratch(Platform::parse("linux/amd64").unwrap());
        config.history = [false, true, false, false]
            .map(|empty_layer| History {
                empty_layer,
                ..History::default()
            })
            .to_vec();
        let image = assemble(config, layers, PlatformAnnotations::default());
        blobs.insert(
            image.manifest.config.digest.clone(),
            image.config_bytes.clone(),
        );
        Fixture { image, blobs }
    }

    impl Fixture {
        fn findings_of(&self, raw: &RawManifest) -> Vec<String> {
            let fetch = |descriptor: &Descriptor| {
                let bytes = self.blobs.get(&descriptor.digest).cloned();
                let bytes = bytes.ok_or(io::ErrorKind::NotFound)?;
                Ok(Box::new(io::Cursor::new(bytes)) as Box<dyn Read>)
            };
            validate(raw, fetch)
                .into_iter()
                .map(|finding| format!("{:#}", anyhow::Error::new(finding)))
                .collect()
        }

        fn findings(&self) -> Vec<String> {
            self.findings_of(&self.image.raw_manifest)
        }

        /// The findings after the manifest was changed and its digest made right again.
        fn with_manifest(&self, change: impl FnOnce(&mut Manifest)) -> Vec<String> {
            let mut manifest = self.image.manifest.clone();
            change(&mut manifest);
            let bytes = serde_json::to_vec(&manifest).unwrap();
            let media_type = self.image.raw_manifest.media_type.clone();
            self.findings_of(&RawManifest::new(media_type, bytes))
        }

        /// The findings after the config was changed and every digest made right again.
        fn with_config(mut self, change: impl FnOnce(&mut ImageConfig)) -> Vec<String> {
            let mut config = self.image.config.clone();
            change(&mut config);
            let bytes = serde_json::to_vec(&config).unwrap();
            let descriptor = Descriptor::of(MediaType::CONFIG, &bytes);
            self.blobs.insert(descriptor.digest.clone(), bytes);
            self.with_manifest(|manifest| manifest.config = descriptor)
        }
    }

    #[test]
    fn a_right_image_has_no_findings() {
        assert_eq!(fixture().findings(), [] as [String; 0]);
        assert_eq!(
            fixture().with_config(|c| c.history.clear()),
            [] as [String; 0]
        );
    }

    #[test]
    fn security_s17_every_flipped_byte_is_found() {
        let right = fixture();
        for at in 0..right.image.raw_manifest.bytes.len() {
            let mut raw = right.image.raw_manifest.clone();
            raw.bytes[at] ^= 1;
            let got = Digest::of(&raw.bytes);
            let expected = format!("document: got {got}, want {}", raw.digest);
            assert_eq!(right.findings_of(&raw)[0], expected, "byte {at}");
        }
        let mut parts = vec![(
            "config".to_owned(),
            right.image.manifest.config.digest.clone(),
        )];
        for (place, layer) in right.image.layers.iter().enumerate() {
            parts.push((format!("layer {place}"), layer.descriptor.digest.clone()));
        }
        for (part, digest) in parts {
            for at in 0..right.blobs[&digest].len() {
                let mut damaged = fixture();
                let bytes = damaged.blobs.get_mut(&digest).unwrap();
                bytes[at] ^= 1;
                let expected = format!("{part}: got {}, want {digest}", Digest::of(bytes));
                let findings = damaged.findings();
                assert!(
                    findings.contains(&expected),
                    "{part} byte {at}: {findings:?}"
                );
            }
        }
    }

    #[test]
    fn cut_and_lengthened_blobs_are_found() {
        let right = fixture();
        let digest = right.image.layers[0].descriptor.digest.clone();
        let size = right.blobs[&digest].len();
        let mut cut = fixture();
        cut.blobs.get_mut(&digest).unwrap().truncate(size - 1);
        let findings = cut.findings();
        assert_eq!(
            findings[0],
            format!("layer 0: got {} bytes, want {size}", size - 1)
        );
        assert!(
            findings[1].starts_with("layer 0: got sha256:"),
            "{findings:?}"
        );
        assert!(
            findings[2].starts_with(
                "layer 0: decompressing as application/vnd.oci.image.layer.v1.tar+gzip: "
            ),
            "{findings:?}"
        );

        let mut longer = fixture();
        longer.blobs.get_mut(&digest).unwrap().push(0);
        let findings = longer.findings();
        assert_eq!(
            findings[0],
            format!("layer 0: got {} bytes, want {size}", size + 1)
        );
    }

    #[test]
    fn security_s17_descriptors_that_disagree_are_found() {
        let right = fixture();
        assert_eq!(
            right.with_manifest(|m| m.config.size += 1),
            [format!(
                "config: got {} bytes, want {}",
                right.image.config_bytes.len(),
                right.image.config_bytes.len() + 1
            )]
        );
        let absent = Digest::of(b"absent");
        assert_eq!(
            right.with_manifest(|m| m.layers[2].digest = absent),
            ["layer 2: reading its bytes: entity not found"]
        );
        assert_eq!(
            right.with_manifest(|m| m.layers[0].media_type = MediaType::DOCKER_LAYER_GZIP),
            [
                "layer 0: got media type \"application/vnd.docker.image.rootfs.diff.tar.gzip\", \
              want an OCI layer's"
            ]
        );
        assert_eq!(
            right.with_manifest(|m| m.layers[2].media_type = MediaType::new("text/plain")),
            ["layer 2: got media type \"text/plain\", want an OCI layer's"]
        );
        assert_eq!(
            right.with_manifest(|m| m.config.media_type = MediaType::DOCKER_CONFIG),
            [
                "config: got media type \"application/vnd.docker.container.image.v1+json\", \
              want application/vnd.oci.image.config.v1+json"
            ]
        );
        let wrong_type = right.with_manifest(|m| m.layers[2].media_type = MediaType::LAYER_GZIP);
        assert_eq!(wrong_type.len(), 1);
        assert!(
            wrong_type[0].starts_with("layer 2: decompressing as "),
            "{wrong_type:?}"
        );
    }

    #[test]
    fn security_s17_a_config_that_disagrees_with_the_layers_is_found() {
        let other = DiffId::from_uncompressed(Digest::of(b"other"));
        let right = DiffId::from_uncompressed(Digest::of(b"second"));
        assert_eq!(
            fixture().with_config(|c| c.rootfs.diff_ids[1] = other.clone()),
            [format!("layer 1: got diff ID {right}, want {other}")]
        );
        assert_eq!(
            fixture().with_config(|c| c.rootfs.diff_ids.truncate(2)),
            ["got 2 diff IDs, want 3 as there are layers"]
        );
        assert_eq!(
            fixture().with_config(|c| c.history[1].empty_layer = false),
            ["got 4 history entries with a layer, want 3 as there are layers"]
        );
        assert_eq!(
            fixture().with_config(|c| c.rootfs.kind = "layer".into()),
            ["config: rootfs.type is \"layer\", want \"layers\""]
        );
        assert_eq!(
            fixture().with_config(|c| c.platform.os.clear()),
            ["config: os is \"\", want a name"]
        );
    }

    #[test]
    fn docker_manifests_are_of_one_family() {
        let mut fixture = fixture();
        fixture.image.raw_manifest.media_type = MediaType::DOCKER_MANIFEST;
        let docker = |m: &mut Manifest| {
            m.media_type = Some(MediaType::DOCKER_MANIFEST);
            m.config.media_type = MediaType::DOCKER_CONFIG;
            m.layers[0].media_type = MediaType::DOCKER_LAYER_GZIP;
            m.layers[1].media_type = MediaType::DOCKER_LAYER_ZSTD;
            m.layers[2].media_type = MediaType::DOCKER_LAYER_TAR;
        };
        assert_eq!(fixture.with_manifest(docker), [] as [String; 0]);
        let findings = fixture.with_manifest(|m| {
            docker(m);
            m.media_type = None;
            m.layers[2].media_type = MediaType::LAYER_TAR;
        });
        assert_eq!(
            findings,
            [
                "document: got media type \"\", want application/vnd.docker.distribution.manifest.v2+json",
                "layer 2: got media type \"application/vnd.oci.image.layer.v1.tar\", want a Docker layer's",
            ]
        );
    }

    #[test]
    fn every_image_of_an_index_is_checked() {
        let mut fixture = fixture();
        let raw = fixture.image.raw_manifest.clone();
        let entry = |platform: &str| {
            let mut descriptor = raw.descriptor();
            descriptor.platform = Some(Platform::parse(platform).unwrap());
            descriptor
        };
        let index = Index {
            schema_version: 2,
            media_type: Some(MediaType::INDEX),
            manifests: vec![
                entry("linux/amd64"),
                entry("linux/arm64"),
                Descriptor::of(MediaType::INDEX, b""),
            ],
            annotations: std::collections::BTreeMap::new(),
        };
        fixture.blobs.insert(raw.digest.clone(), raw.bytes.clone());
        let index = RawManifest::new(MediaType::INDEX, serde_json::to_vec(&index).unwrap());
        assert_eq!(
            fixture.findings_of(&index),
            [
                "config: platform is \"linux/amd64\", want linux/arm64, as the index says",
                "manifest 2 of the index: got media type \"application/vnd.oci.image.index.v1+json\", want a manifest's",
            ]
        );
    }

    #[test]
    fn what_is_no_document_is_found() {
        let raw = RawManifest::new(MediaType::MANIFEST, b"{".to_vec());
        let findings = fixture().findings_of(&raw);
        assert_eq!(findings.len(), 1);
        assert!(
            findings[0].starts_with("document: the document is not a valid application/"),
            "{findings:?}"
        );
        let mut fixture = fixture();
        let descriptor = Descriptor::of(MediaType::CONFIG, b"[]");
        fixture
            .blobs
            .insert(descriptor.digest.clone(), b"[]".to_vec());
        let findings = fixture.with_manifest(|m| m.config = descriptor);
        assert!(
            findings[0].starts_with("config: not an image config: "),
            "{findings:?}"
        );
    }
}
