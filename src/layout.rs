//! Images in directories of this machine: OCI image layouts, read.
//!
//! A layout is named by the user and written by anybody: every document and blob is
//! checked against the digest and size that named it before anything is made of it, and
//! documents have size limits. Only `index.json` has no digest. Links are followed, because
//! build tools make layouts of links; what they lead to is checked in the same way.
//!
//! [`Layout::resolve`] gives what [`registry::Client::resolve`](crate::registry::Client::resolve)
//! gives for an image of a registry. Its blobs stay where they are until somebody reads them;
//! [`Layout::import`] brings one into the store.
//!
//! Not here: writing ([`export`](crate::export)), and layouts in archives. Everything blocks.
//!
//! <https://github.com/opencontainers/image-spec/blob/main/image-layout.md>

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;
use serde::Deserialize;
use thiserror::Error;

use crate::image::{
    CONFIG_LIMIT_BYTES, Descriptor, Digest, Hasher, ImageConfig, Index, MANIFEST_LIMIT_BYTES,
    Manifest, ManifestError, ManifestOrIndex, MediaType, Platform, RawManifest, Reference,
};
use crate::io::LimitedReader;
use crate::registry::Resolved;
use crate::store::{Store, StoreError};

/// Annotations of `index.json` that name an image, in the order in which they are asked.
const NAMES: [&str; 2] = [
    "io.containerd.image.name",
    "org.opencontainers.image.ref.name",
];

/// How deep indexes are followed into indexes. Real layouts have two.
const DEPTH_LIMIT: usize = 8;

/// How many manifests and indexes are read to find one image.
const DOCUMENTS_LIMIT: usize = 256;

/// A directory with an OCI image layout.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    path: PathBuf,
}

/// What can go wrong with a layout.
#[derive(Debug, Error)]
pub enum LayoutError {
    /// A file cannot be read.
    #[error("reading {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not; another type than a regular file is `InvalidInput`, more than the limit
        /// `FileTooLarge`.
        #[source]
        source: io::Error,
    },
    /// A file is not the document that it should be.
    #[error("{} is not valid", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What the parser says.
        #[source]
        source: serde_json::Error,
    },
    /// The directory is a layout of an unknown version.
    #[error("{} has imageLayoutVersion {found:?}: expected 1.x", path.display())]
    Version {
        /// Its `oci-layout`.
        path: PathBuf,
        /// What that says.
        found: String,
    },
    /// No image has the name.
    #[error("no image {tag:?} in {}: it has {offered}", path.display())]
    NoImage {
        /// The name.
        tag: String,
        /// The layout's `index.json`.
        path: PathBuf,
        /// The names there are, for people.
        offered: String,
    },
    /// A manifest or index is not what it is said to be, or has nothing for the platform.
    #[error("the manifest {digest} in {}", path.display())]
    Manifest {
        /// Its digest.
        digest: Digest,
        /// The layout.
        path: PathBuf,
        /// What is wrong.
        #[source]
        source: Box<ManifestError>,
    },
    /// Indexes lead to more and more indexes.
    #[error(
        "the index {digest} in {} leads through more than {DEPTH_LIMIT} levels or \
         {DOCUMENTS_LIMIT} documents",
        path.display()
    )]
    TooDeep {
        /// Where it begins.
        digest: Digest,
        /// The layout.
        path: PathBuf,
    },
    /// The config contradicts itself or the manifest.
    #[error("the config {digest} in {}: {reason}", path.display())]
    Config {
        /// Its digest.
        digest: Digest,
        /// The layout.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A blob is not what its name says.
    #[error("{}: got {got}, want {want}", path.display())]
    Digest {
        /// The blob.
        path: PathBuf,
        /// The digest of its bytes.
        got: Digest,
        /// Its name.
        want: Digest,
    },
    /// A blob has another size than its descriptor says.
    #[error("{}: got {got} bytes, want {want} bytes", path.display())]
    Size {
        /// The blob.
        path: PathBuf,
        /// Its size.
        got: u64,
        /// The descriptor's.
        want: u64,
    },
    /// A blob cannot be stored.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// A blob of a layout, checked while it is read.
///
/// The read that reaches the end fails with [`io::ErrorKind::InvalidData`] and a
/// [`LayoutError`] inside where size or digest are wrong; it hands out no further bytes.
#[derive(Debug)]
pub struct LayoutBlob {
    file: File,
    path: PathBuf,
    hasher: Option<Hasher>,
    descriptor: Descriptor,
    read: u64,
}

/// What is in `oci-layout`.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Marker {
    image_layout_version: String,
}

/// What a document says that it is.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Typed {
    media_type: Option<MediaType>,
    manifests: Option<serde::de::IgnoredAny>,
}

/// An image that was found: its index, manifest as it is, and parsed.
type Found = (Option<RawManifest>, RawManifest, Manifest);

impl Layout {
    /// Names the layout in the directory `path`. Where it has an `oci-layout`, its version is checked.
    ///
    /// # Errors
    /// [`LayoutError::Version`]; [`LayoutError::Read`] also where `path` is no directory;
    /// [`LayoutError::Malformed`].
    pub fn open(path: &Path) -> Result<Self, LayoutError> {
        let layout = Self {
            path: path.to_owned(),
        };
        let not_directory = match std::fs::metadata(path) {
            Ok(metadata) if metadata.is_dir() => None,
            Ok(_) => Some(io::ErrorKind::NotADirectory.into()),
            Err(error) => Some(error),
        };
        if let Some(source) = not_directory {
            return Err(read_error(path)(source));
        }
        let marker = path.join("oci-layout");
        let bytes = match read_file(&marker, MANIFEST_LIMIT_BYTES) {
            // Tools read layouts without, and BuildKit does.
            Err(LayoutError::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                return Ok(layout);
            }
            other => other?,
        };
        let found: Marker = serde_json::from_slice(&bytes).map_err(malformed(&marker))?;
        if !found.image_layout_version.starts_with("1.") {
            return Err(LayoutError::Version {
                path: marker,
                found: found.image_layout_version,
            });
        }
        Ok(layout)
    }

    /// Its directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Finds the image for `platform`: that of `digest`, else the one named `tag`, else the
    /// only one there is. Indexes are followed into indexes.
    ///
    /// `reference` is what the result is called, for messages and records. An image that is
    /// named without an index is taken whatever its platform is.
    ///
    /// # Errors
    /// Any but [`LayoutError::Version`] and [`LayoutError::Store`]; an index without the
    /// platform is [`LayoutError::Manifest`].
    pub fn resolve(
        &self,
        tag: &str,
        digest: Option<&Digest>,
        platform: &Platform,
        reference: &Reference,
    ) -> Result<Resolved, LayoutError> {
        let (index, raw, manifest) = match digest {
            Some(digest) => self.find_digest(digest, platform)?,
            None => self.find_tag(tag, platform)?,
        };
        let (config, config_bytes) = self.config(&manifest)?;
        Ok(Resolved {
            reference: reference.with_digest(index.as_ref().unwrap_or(&raw).digest.clone()),
            index,
            raw,
            manifest,
            config,
            config_bytes,
        })
    }

    /// Finds the manifest or index of `digest`, else the one named `tag`, else the only one
    /// there is, whatever its config is.
    ///
    /// # Errors
    /// [`LayoutError::Read`], [`LayoutError::Malformed`], [`LayoutError::NoImage`],
    /// [`LayoutError::Digest`], [`LayoutError::Size`].
    pub fn find(&self, tag: &str, digest: Option<&Digest>) -> Result<RawManifest, LayoutError> {
        match digest {
            Some(digest) => self.document_of(digest),
            None => self.document(&self.named(tag)?),
        }
    }

    /// Opens a blob.
    ///
    /// # Errors
    /// [`LayoutError::Read`]; [`LayoutError::Size`] where the file has another size already.
    pub fn open_blob(&self, descriptor: &Descriptor) -> Result<LayoutBlob, LayoutError> {
        let path = self.blob_path(&descriptor.digest);
        let (file, size) = open_file(&path)?;
        if size != descriptor.size {
            return Err(LayoutError::Size {
                path,
                got: size,
                want: descriptor.size,
            });
        }
        Ok(LayoutBlob {
            file,
            path,
            hasher: Some(Hasher::new()),
            descriptor: descriptor.clone(),
            read: 0,
        })
    }

    /// The file of a blob, which has the right size and is not verified otherwise: for
    /// whoever sends it to where its digest is checked.
    ///
    /// # Errors
    /// As [`Layout::open_blob`].
    pub fn blob_file(&self, descriptor: &Descriptor) -> Result<PathBuf, LayoutError> {
        Ok(self.open_blob(descriptor)?.path)
    }

    /// Copies a blob into `store`, unless it is there. It gets its name there when it is verified.
    ///
    /// # Errors
    /// [`LayoutError::Read`], [`LayoutError::Size`], [`LayoutError::Digest`], [`LayoutError::Store`].
    pub fn import(&self, descriptor: &Descriptor, store: &Store) -> Result<(), LayoutError> {
        if store.has_blob_of(descriptor) {
            return Ok(());
        }
        let mut blob = self.open_blob(descriptor)?;
        let mut writer = store.write_blob()?;
        let mut buffer = vec![0; 256 << 10];
        loop {
            let read = blob.read(&mut buffer).map_err(|error| blob.error(error))?;
            if read == 0 {
                break;
            }
            io::Write::write_all(&mut writer, &buffer[..read])
                .map_err(StoreError::io("writing a blob in", store.tmp()))?;
        }
        writer.commit(Some(&descriptor.digest))?;
        Ok(())
    }

    fn find_tag(&self, tag: &str, platform: &Platform) -> Result<Found, LayoutError> {
        self.follow(self.document(&self.named(tag)?)?, platform)
    }

    /// What `index.json` says of the name `tag`.
    fn named(&self, tag: &str) -> Result<Descriptor, LayoutError> {
        let path = self.path.join("index.json");
        let bytes = read_file(&path, MANIFEST_LIMIT_BYTES)?;
        let index: Index = serde_json::from_slice(&bytes).map_err(malformed(&path))?;
        let named = |key: &str| {
            let named = |d: &&Descriptor| d.annotations.get(key).is_some_and(|name| name == tag);
            index.manifests.iter().find(named)
        };
        let found = NAMES.iter().find_map(|key| named(key));
        let found = found.or(match index.manifests.as_slice() {
            [only] => Some(only),
            _ => None,
        });
        let Some(found) = found else {
            let mut offered: Vec<&str> = index
                .manifests
                .iter()
                .flat_map(|d| NAMES.iter().filter_map(|key| d.annotations.get(*key)))
                .map(String::as_str)
                .collect();
            offered.sort_unstable();
            offered.dedup();
            return Err(LayoutError::NoImage {
                tag: tag.to_owned(),
                path,
                offered: match (index.manifests.len(), offered.as_slice()) {
                    (0, _) => "none".to_owned(),
                    (count, []) => format!("{count} without a name; name one by its digest"),
                    (_, names) => names.join(", "),
                },
            });
        };
        Ok(found.clone())
    }

    fn find_digest(&self, digest: &Digest, platform: &Platform) -> Result<Found, LayoutError> {
        self.follow(self.document_of(digest)?, platform)
    }

    /// The manifest or index of this digest.
    fn document_of(&self, digest: &Digest) -> Result<RawManifest, LayoutError> {
        let path = self.blob_path(digest);
        let bytes = read_file(&path, MANIFEST_LIMIT_BYTES)?;
        let raw = RawManifest::new(MediaType::new(""), bytes);
        if raw.digest != *digest {
            return Err(LayoutError::Digest {
                path,
                got: raw.digest,
                want: digest.clone(),
            });
        }
        let typed: Typed = serde_json::from_slice(&raw.bytes).map_err(malformed(&path))?;
        let media_type = match (typed.media_type, typed.manifests) {
            (Some(media_type), _) => media_type,
            (None, Some(_)) => MediaType::INDEX,
            (None, None) => MediaType::MANIFEST,
        };
        Ok(RawManifest { media_type, ..raw })
    }

    /// The image that `first` is or leads to.
    fn follow(&self, first: RawManifest, platform: &Platform) -> Result<Found, LayoutError> {
        let index = match self.parse(&first)? {
            ManifestOrIndex::Manifest(manifest) => return Ok((None, first, manifest)),
            ManifestOrIndex::Index(index) => index,
        };
        let mut budget = DOCUMENTS_LIMIT;
        match self.search(&index, platform, DEPTH_LIMIT, &mut budget)? {
            Search::Found(found) => {
                let (raw, manifest) = *found;
                Ok((Some(first), raw, manifest))
            }
            Search::TooDeep => Err(LayoutError::TooDeep {
                digest: first.digest,
                path: self.path.clone(),
            }),
            Search::Nothing => {
                let source = index
                    .choose(platform)
                    .err()
                    .unwrap_or(ManifestError::NoPlatform {
                        wanted: platform.clone(),
                        offered: "none".to_owned(),
                    });
                Err(LayoutError::Manifest {
                    digest: first.digest,
                    path: self.path.clone(),
                    source: Box::new(source),
                })
            }
        }
    }

    /// The image in `index` that serves `platform` best: those that say their platform come
    /// first, the fittest of them first, then those whose config must be asked.
    fn search(
        &self,
        index: &Index,
        platform: &Platform,
        depth: usize,
        budget: &mut usize,
    ) -> Result<Search, LayoutError> {
        let mut candidates: Vec<(u8, &Descriptor)> = index
            .manifests
            .iter()
            .filter(|d| d.media_type.is_manifest() || d.media_type.is_index())
            .filter_map(|d| match &d.platform {
                Some(has) => Some((has.fitness_for(platform)?, d)),
                None => Some((u8::MAX, d)),
            })
            .collect();
        candidates.sort_by_key(|(fitness, _)| *fitness);
        let mut found = Search::Nothing;
        for (_, descriptor) in candidates {
            if depth == 0 || *budget == 0 {
                return Ok(Search::TooDeep);
            }
            *budget -= 1;
            let raw = self.document(descriptor)?;
            match self.parse(&raw)? {
                ManifestOrIndex::Index(index) => {
                    match self.search(&index, platform, depth - 1, budget)? {
                        Search::Nothing => {}
                        Search::TooDeep => found = Search::TooDeep,
                        image @ Search::Found(..) => return Ok(image),
                    }
                }
                ManifestOrIndex::Manifest(manifest) => {
                    let fits = descriptor.platform.is_some() || {
                        let (config, _) = self.config(&manifest)?;
                        config.platform.fitness_for(platform).is_some()
                    };
                    if fits {
                        return Ok(Search::Found(Box::new((raw, manifest))));
                    }
                }
            }
        }
        Ok(found)
    }

    fn parse(&self, raw: &RawManifest) -> Result<ManifestOrIndex, LayoutError> {
        raw.parse().map_err(|source| LayoutError::Manifest {
            digest: raw.digest.clone(),
            path: self.path.clone(),
            source: Box::new(source),
        })
    }

    /// A manifest or index, verified.
    fn document(&self, descriptor: &Descriptor) -> Result<RawManifest, LayoutError> {
        let bytes = self.read_blob(descriptor, MANIFEST_LIMIT_BYTES)?;
        Ok(RawManifest::new(descriptor.media_type.clone(), bytes))
    }

    fn config(&self, manifest: &Manifest) -> Result<(ImageConfig, Vec<u8>), LayoutError> {
        let descriptor = &manifest.config;
        let bad = |reason| LayoutError::Config {
            digest: descriptor.digest.clone(),
            path: self.path.clone(),
            reason,
        };
        let media_type = &descriptor.media_type;
        if *media_type != MediaType::CONFIG && *media_type != MediaType::DOCKER_CONFIG {
            return Err(bad(format!(
                "its type is {:?}, so this is no image that can be run",
                media_type.as_str()
            )));
        }
        let bytes = self.read_blob(descriptor, CONFIG_LIMIT_BYTES)?;
        let config = ImageConfig::parse_for(manifest, &bytes).map_err(bad)?;
        Ok((config, bytes))
    }

    /// The whole of a small blob, verified.
    fn read_blob(&self, descriptor: &Descriptor, limit: u64) -> Result<Vec<u8>, LayoutError> {
        let blob = self.open_blob(descriptor)?;
        let mut reader = LimitedReader::new(blob, limit, "the document");
        let mut bytes = Vec::new();
        reader.read_to_end(&mut bytes).map_err(|error| {
            let path = self.blob_path(&descriptor.digest);
            from_io(&path, error)
        })?;
        Ok(bytes)
    }

    /// Where the blob is, or would be.
    pub fn blob_path(&self, digest: &Digest) -> PathBuf {
        self.path.join("blobs/sha256").join(digest.hex())
    }
}

/// What a search in an index ended with.
enum Search {
    Found(Box<(RawManifest, Manifest)>),
    Nothing,
    TooDeep,
}

impl LayoutBlob {
    fn error(&self, error: io::Error) -> LayoutError {
        from_io(&self.path, error)
    }

    fn check(&mut self) -> Result<(), LayoutError> {
        let want = &self.descriptor;
        if self.read != want.size {
            return Err(LayoutError::Size {
                path: self.path.clone(),
                got: self.read,
                want: want.size,
            });
        }
        let got = self.hasher.take().map(Hasher::finish);
        match got {
            Some(got) if got != want.digest => Err(LayoutError::Digest {
                path: self.path.clone(),
                got,
                want: want.digest.clone(),
            }),
            _ => Ok(()),
        }
    }
}

impl Read for LayoutBlob {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let read = self.file.read(buf)?;
        if buf.is_empty() {
            return Ok(0);
        }
        self.read += read as u64;
        if let Some(hasher) = &mut self.hasher {
            hasher.update(&buf[..read]);
        }
        // A file that grew while it was read.
        if read == 0 || self.read > self.descriptor.size {
            self.check()
                .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
        }
        Ok(read)
    }
}

/// The error of a layout inside of an I/O error, else one about the file `path`.
fn from_io(path: &Path, error: io::Error) -> LayoutError {
    match error.downcast::<LayoutError>() {
        Ok(error) => error,
        Err(source) => read_error(path)(source),
    }
}

fn read_error(path: &Path) -> impl FnOnce(io::Error) -> LayoutError {
    let path = path.to_owned();
    move |source| LayoutError::Read { path, source }
}

fn malformed(path: &Path) -> impl FnOnce(serde_json::Error) -> LayoutError {
    let path = path.to_owned();
    move |source| LayoutError::Malformed { path, source }
}

/// Opens a regular file, which a pipe or device is not, and waits for nothing; with its size.
fn open_file(path: &Path) -> Result<(File, u64), LayoutError> {
    let flags = OFlags::NONBLOCK | OFlags::NOCTTY;
    let open = || {
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(flags.bits().cast_signed())
            .open(path)?;
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "not a regular file",
            ));
        }
        Ok((file, metadata.len()))
    };
    open().map_err(read_error(path))
}

fn read_file(path: &Path, limit: u64) -> Result<Vec<u8>, LayoutError> {
    let (file, _) = open_file(path)?;
    let mut bytes = Vec::new();
    LimitedReader::new(file, limit, "the document")
        .read_to_end(&mut bytes)
        .map_err(read_error(path))?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::fs;

    use super::*;
    use crate::image::DiffId;

    /// A layout that is being made.
    struct Maker {
        dir: tempfile::TempDir,
        entries: Vec<Descriptor>,
    }

    impl Maker {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            fs::create_dir_all(dir.path().join("blobs/sha256")).unwrap();
            fs::write(
                dir.path().join("oci-layout"),
                r#"{"imageLayoutVersion":"1.0.0"}"#,
            )
            .unwrap();
            Self {
                dir,
                entries: Vec::new(),
            }
        }

        fn blob(&self, media_type: MediaType, bytes: &[u8]) -> Descriptor {
            let descriptor = Descriptor::of(media_type, bytes);
            fs::write(self.blob_path(&descriptor), bytes).unwrap();
            descriptor
        }

        fn blob_path(&self, descriptor: &Descriptor) -> PathBuf {
            let blobs = self.dir.path().join("blobs/sha256");
            blobs.join(descriptor.digest.hex())
        }

        /// An image of one layer, whose content is its platform's name.
        fn image(&self, platform: &str) -> Descriptor {
            let mut config = ImageConfig::scratch(Platform::parse(platform).unwrap());
            let layer = self.blob(MediaType::LAYER_TAR, platform.as_bytes());
            let diff_id = DiffId::from_uncompressed(layer.digest.clone());
            config.rootfs.diff_ids.push(diff_id);
            let config = serde_json::to_vec(&config).unwrap();
            let manifest = Manifest {
                schema_version: 2,
                media_type: Some(MediaType::MANIFEST),
                config: self.blob(MediaType::CONFIG, &config),
                layers: vec![layer],
                annotations: BTreeMap::new(),
            };
            let manifest = serde_json::to_vec(&manifest).unwrap();
            let mut descriptor = self.blob(MediaType::MANIFEST, &manifest);
            descriptor.platform = Some(Platform::parse(platform).unwrap());
            descriptor
        }

        fn index(&self, manifests: Vec<Descriptor>) -> Descriptor {
            let bytes = serde_json::to_vec(&index(manifests)).unwrap();
            self.blob(MediaType::INDEX, &bytes)
        }

        fn add(&mut self, mut descriptor: Descriptor, key: &str, name: &str) {
            descriptor.annotations.insert(key.into(), name.into());
            self.entries.push(descriptor);
            self.write_index();
        }

        fn write_index(&self) {
            let bytes = serde_json::to_vec(&index(self.entries.clone())).unwrap();
            fs::write(self.dir.path().join("index.json"), bytes).unwrap();
        }

        /// The content of the layer of what is found.
        fn find(
            &self,
            tag: &str,
            digest: Option<&Digest>,
            platform: &str,
        ) -> Result<String, LayoutError> {
            let layout = Layout::open(self.dir.path())?;
            let platform = Platform::parse(platform).unwrap();
            let reference = Reference::parse("name").unwrap();
            let resolved = layout.resolve(tag, digest, &platform, &reference)?;
            let mut text = String::new();
            layout
                .open_blob(&resolved.manifest.layers[0])?
                .read_to_string(&mut text)
                .unwrap();
            Ok(text)
        }

        fn message(&self, tag: &str) -> String {
            let error = self.find(tag, None, "linux/amd64").unwrap_err();
            let text = format!("{:#}", anyhow::Error::new(error));
            text.replace(self.dir.path().to_str().unwrap(), "L")
        }
    }

    fn index(manifests: Vec<Descriptor>) -> Index {
        Index {
            schema_version: 2,
            media_type: Some(MediaType::INDEX),
            manifests,
            annotations: BTreeMap::new(),
        }
    }

    #[test]
    fn an_image_is_found_by_its_name_its_digest_or_as_the_only_one() {
        let mut maker = Maker::new();
        let (amd64, arm64) = (maker.image("linux/amd64"), maker.image("linux/arm64"));
        maker.add(amd64.clone(), NAMES[1], "v1");
        // As the only one it is taken, whatever its name and platform.
        for (tag, platform) in [("v1", "linux/amd64"), ("latest", "linux/s390x")] {
            assert_eq!(maker.find(tag, None, platform).unwrap(), "linux/amd64");
        }
        maker.add(arm64.clone(), NAMES[1], "v2");
        maker.add(arm64.clone(), NAMES[0], "v1");
        // The whole name comes before the tag.
        let found = |tag| maker.find(tag, None, "linux/arm64").unwrap();
        assert_eq!(found("v1"), "linux/arm64");
        assert_eq!(found("v2"), "linux/arm64");
        assert_eq!(
            maker.message("v3"),
            "no image \"v3\" in L/index.json: it has v1, v2"
        );
        let by_digest = maker.find("v2", Some(&amd64.digest), "linux/amd64");
        assert_eq!(by_digest.unwrap(), "linux/amd64");
        let absent = maker.find("v2", Some(&Digest::of(b"absent")), "linux/amd64");
        assert!(
            matches!(&absent, Err(LayoutError::Read { source, .. })
                if source.kind() == io::ErrorKind::NotFound),
            "{absent:?}"
        );
    }

    #[test]
    fn the_platform_is_chosen_also_in_nested_indexes() {
        let mut maker = Maker::new();
        let (amd64, arm64) = (maker.image("linux/amd64"), maker.image("linux/arm64"));
        let mut silent = maker.image("linux/riscv64");
        silent.platform = None;
        let inner = maker.index(vec![arm64, silent]);
        let outer = maker.index(vec![inner.clone(), amd64]);
        maker.add(outer.clone(), NAMES[1], "latest");
        for platform in ["linux/amd64", "linux/arm64", "linux/riscv64"] {
            assert_eq!(maker.find("latest", None, platform).unwrap(), platform);
            let found = maker.find("latest", Some(&outer.digest), platform);
            assert_eq!(found.unwrap(), platform);
        }
        let error = maker.find("latest", None, "linux/s390x").unwrap_err();
        let source = std::error::Error::source(&error).unwrap().to_string();
        assert_eq!(
            source,
            "no image for linux/s390x: the index has linux/amd64"
        );

        let layout = Layout::open(maker.dir.path()).unwrap();
        let platform = Platform::parse("linux/arm64").unwrap();
        let reference = Reference::parse("base:1").unwrap();
        let resolved = layout
            .resolve("latest", None, &platform, &reference)
            .unwrap();
        assert_eq!(resolved.index.unwrap().digest, outer.digest);
        assert_eq!(
            resolved.reference.to_string(),
            format!("docker.io/library/base@{}", outer.digest)
        );
        assert_eq!(resolved.config.platform, platform);
        assert_eq!(
            Digest::of(&resolved.config_bytes),
            resolved.manifest.config.digest
        );
    }

    #[test]
    fn security_s16_indexes_without_end_are_an_error() {
        let mut maker = Maker::new();
        let mut descriptor = maker.image("linux/riscv64");
        descriptor.platform = None;
        for _ in 0..=DEPTH_LIMIT {
            descriptor = maker.index(vec![descriptor]);
        }
        let digest = descriptor.digest.clone();
        maker.add(descriptor, NAMES[1], "latest");
        assert_eq!(
            maker.message("latest"),
            format!("the index {digest} in L leads through more than 8 levels or 256 documents")
        );
        // Wide ones too: each of these names the one below many times.
        let mut maker = Maker::new();
        let mut descriptor = maker.index(Vec::new());
        for _ in 0..4 {
            descriptor = maker.index(vec![descriptor; 16]);
        }
        maker.add(descriptor, NAMES[1], "latest");
        let error = maker.find("latest", None, "linux/amd64").unwrap_err();
        assert!(matches!(error, LayoutError::TooDeep { .. }), "{error:?}");
    }

    #[test]
    fn security_s17_blobs_are_imported_verified_or_not_at_all() {
        let maker = Maker::new();
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let layout = Layout::open(maker.dir.path()).unwrap();
        let good = maker.blob(MediaType::LAYER_TAR, b"good");
        layout.import(&good, &store).unwrap();
        assert!(store.has_blob_of(&good));
        // It is there, so the layout is not asked.
        fs::remove_file(maker.blob_path(&good)).unwrap();
        layout.import(&good, &store).unwrap();

        let bad = maker.blob(MediaType::LAYER_TAR, b"fine");
        fs::write(maker.blob_path(&bad), b"evil").unwrap();
        let error = layout.import(&bad, &store).unwrap_err();
        assert!(matches!(error, LayoutError::Digest { .. }), "{error:?}");
        fs::write(maker.blob_path(&bad), b"longer").unwrap();
        let error = layout.import(&bad, &store).unwrap_err();
        assert!(
            matches!(
                error,
                LayoutError::Size {
                    got: 6,
                    want: 4,
                    ..
                }
            ),
            "{error:?}"
        );
        assert!(!store.has_blob(&bad.digest));
        assert_eq!(fs::read_dir(store.tmp()).unwrap().count(), 0);
    }

    #[test]
    fn a_blob_that_grows_while_it_is_read_hands_out_no_more() {
        let maker = Maker::new();
        let layout = Layout::open(maker.dir.path()).unwrap();
        let blob = maker.blob(MediaType::LAYER_TAR, b"abc");
        let mut reader = layout.open_blob(&blob).unwrap();
        let mut first = [0; 2];
        reader.read_exact(&mut first).unwrap();
        fs::write(maker.blob_path(&blob), b"abcdef").unwrap();
        let error = reader.read(&mut [0; 8]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }

    #[test]
    fn what_is_damaged_is_said() {
        let maker = Maker::new();
        let index = maker.dir.path().join("index.json");
        assert!(maker.message("a").starts_with("reading L/index.json: "));
        fs::write(&index, "{").unwrap();
        assert!(
            maker
                .message("a")
                .starts_with("L/index.json is not valid: ")
        );
        maker.write_index();
        assert_eq!(
            maker.message("a"),
            "no image \"a\" in L/index.json: it has none"
        );

        let mut maker = Maker::new();
        let image = maker.image("linux/amd64");
        let other = maker.image("linux/arm64");
        maker.add(image.clone(), NAMES[1], "a");
        fs::write(maker.blob_path(&image), vec![b' '; image.size as usize]).unwrap();
        let path = format!("L/blobs/sha256/{}", image.digest.hex());
        let got = Digest::of(&vec![b' '; image.size as usize]);
        assert_eq!(
            maker.message("a"),
            format!("{path}: got {got}, want {}", image.digest)
        );
        // A pipe is not waited for.
        fs::remove_file(maker.blob_path(&image)).unwrap();
        rustix::fs::mkfifoat(
            rustix::fs::CWD,
            maker.blob_path(&image),
            rustix::fs::Mode::from_raw_mode(0o600),
        )
        .unwrap();
        assert_eq!(
            maker.message("a"),
            format!("reading {path}: not a regular file")
        );
        // A document that is larger than any manifest.
        let mut large = other;
        large.digest = Digest::of(b"large");
        large.size = MANIFEST_LIMIT_BYTES + 1;
        let file = File::create(maker.blob_path(&large)).unwrap();
        file.set_len(large.size).unwrap();
        maker.entries.clear();
        maker.add(large, NAMES[1], "a");
        assert!(
            maker.message("a").ends_with(&format!(
                "the document is larger than {MANIFEST_LIMIT_BYTES} bytes"
            )),
            "{}",
            maker.message("a")
        );

        fs::write(
            maker.dir.path().join("oci-layout"),
            r#"{"imageLayoutVersion":"2.0.0"}"#,
        )
        .unwrap();
        assert_eq!(
            maker.message("a"),
            "L/oci-layout has imageLayoutVersion \"2.0.0\": expected 1.x"
        );
        let error = Layout::open(&maker.dir.path().join("oci-layout")).unwrap_err();
        assert!(
            matches!(&error, LayoutError::Read { source, .. }
                if source.kind() == io::ErrorKind::NotADirectory),
            "{error:?}"
        );
    }

    #[test]
    fn links_are_followed_and_what_they_lead_to_is_checked() {
        let mut maker = Maker::new();
        let image = maker.image("linux/amd64");
        maker.add(image.clone(), NAMES[1], "a");
        let elsewhere = tempfile::tempdir().unwrap();
        let target = elsewhere.path().join("blob");
        fs::rename(maker.blob_path(&image), &target).unwrap();
        std::os::unix::fs::symlink(&target, maker.blob_path(&image)).unwrap();
        assert_eq!(maker.find("a", None, "linux/amd64").unwrap(), "linux/amd64");
        fs::write(&target, vec![b' '; image.size as usize]).unwrap();
        let error = maker.find("a", None, "linux/amd64").unwrap_err();
        assert!(matches!(error, LayoutError::Digest { .. }), "{error:?}");
    }
}
