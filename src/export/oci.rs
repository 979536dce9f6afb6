//! `type=oci` and `type=docker`: an OCI image layout in a tar.
//!
//! ```text
//! blobs/
//! blobs/sha256/
//! blobs/sha256/<hex>   config, layers and manifest
//! index.json           one entry a name, with the annotations that BuildKit sets
//! manifest.json        type=docker only: what `docker load` reads
//! oci-layout
//! ```
//!
//! The same image and tags give the same bytes: entries are sorted and carry neither
//! time nor owner.
//!
//! <https://github.com/opencontainers/image-spec/blob/main/image-layout.md>

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::path::Path;

use serde::Serialize;

use super::ExportError;
use super::file::{IsCancelled, write_whole};
use crate::image::{Descriptor, Digest, Image, ImageOrIndex, Index, MediaType, Reference};
use crate::store::Store;

/// The content of `oci-layout`.
pub(super) const LAYOUT: &[u8] = br#"{"imageLayoutVersion":"1.0.0"}"#;

/// The whole name, which containerd imports under.
pub(super) const NAME: &str = "io.containerd.image.name";

/// The tag alone, which tools after the specification select by.
pub(super) const REF_NAME: &str = "org.opencontainers.image.ref.name";

/// What an archive is made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ArchiveKind {
    /// Readers of OCI image layouts.
    Oci,
    /// `docker load` too.
    Docker,
}

/// Where a blob's bytes are.
pub(super) enum Source<'i> {
    /// In the image.
    Bytes(&'i [u8]),
    /// In the store.
    Store(&'i Descriptor),
}

/// All blobs of an image, or of all images of an index, by digest: one layer may be in it
/// twice, and is named once.
pub(super) fn blobs(image: &ImageOrIndex) -> BTreeMap<&Digest, Source<'_>> {
    let raw = image.raw();
    let mut blobs = BTreeMap::from([(&raw.digest, Source::Bytes(&raw.bytes))]);
    for image in image.images() {
        let manifest = &image.raw_manifest;
        blobs.insert(&manifest.digest, Source::Bytes(&manifest.bytes));
        let config = &image.manifest.config.digest;
        blobs.insert(config, Source::Bytes(&image.config_bytes));
        for layer in &image.layers {
            blobs.insert(&layer.descriptor.digest, Source::Store(&layer.descriptor));
        }
    }
    blobs
}

/// Writes `image` as a tar of an OCI image layout to `dest`; `-` is standard output.
///
/// All layers have to be in `store`. A file appears under its name when it is
/// complete, or not at all; what is no regular file, such as a pipe, is written as it is.
///
/// # Errors
/// [`ExportError`]; a damaged blob is `CopyBlob`, an index for Docker `IndexForDocker`.
pub fn image_archive(
    kind: ArchiveKind,
    image: &ImageOrIndex,
    names: &[Reference],
    store: &Store,
    dest: &Path,
    is_cancelled: IsCancelled<'_>,
) -> Result<(), ExportError> {
    write_whole(dest, is_cancelled, |out| {
        write_archive(kind, image, names, store, out)
    })
}

fn write_archive(
    kind: ArchiveKind,
    image: &ImageOrIndex,
    names: &[Reference],
    store: &Store,
    out: impl Write,
) -> Result<(), ExportError> {
    let docker = match (kind, image) {
        (ArchiveKind::Oci, _) => None,
        (ArchiveKind::Docker, ImageOrIndex::Image(image)) => Some(DockerManifest::of(image, names)),
        (ArchiveKind::Docker, ImageOrIndex::Index(_)) => return Err(ExportError::IndexForDocker),
    };
    let mut tar = tar::Builder::new(out);
    append_directory(&mut tar, "blobs/")?;
    append_directory(&mut tar, "blobs/sha256/")?;
    for (digest, source) in blobs(image) {
        let name = blob_name(digest);
        match source {
            Source::Bytes(bytes) => append(&mut tar, &name, bytes)?,
            Source::Store(descriptor) => append_blob(&mut tar, &name, descriptor, store)?,
        }
    }
    let index = serde_json::to_vec(&index(image, names)).expect("an index has only string keys");
    append(&mut tar, "index.json", &index)?;
    if let Some(manifest) = docker {
        let manifest = serde_json::to_vec(&[manifest]).expect("there are no maps in it");
        append(&mut tar, "manifest.json", &manifest)?;
    }
    append(&mut tar, "oci-layout", LAYOUT)?;
    tar.finish().map_err(ExportError::Archive)
}

/// Where a blob is in a layout.
pub(super) fn blob_name(digest: &Digest) -> String {
    format!("blobs/sha256/{}", digest.hex())
}

/// An image in `manifest.json`.
///
/// <https://github.com/moby/docker-image-spec/blob/main/v1.2.md#combined-image-json--filesystem-changeset-format>
#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct DockerManifest {
    config: String,
    /// Null for an image without a name, as containerd writes it.
    repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
}

impl DockerManifest {
    fn of(image: &Image, names: &[Reference]) -> Self {
        Self {
            config: blob_name(&image.manifest.config.digest),
            repo_tags: (!names.is_empty()).then(|| names.iter().map(familiar).collect()),
            layers: (image.layers.iter())
                .map(|layer| blob_name(&layer.descriptor.digest))
                .collect(),
        }
    }
}

/// A name as Docker's users write it: without the parts that Docker Hub's have by default.
fn familiar(name: &Reference) -> String {
    let whole = name.to_string();
    let Some(path) = whole.strip_prefix("docker.io/") else {
        return whole;
    };
    match path.strip_prefix("library/") {
        Some(official) if !official.contains('/') => official.to_owned(),
        _ => path.to_owned(),
    }
}

/// One entry a name, or one without.
fn index(image: &ImageOrIndex, tags: &[Reference]) -> Index {
    let unnamed = image.descriptor();
    let manifests = if tags.is_empty() {
        vec![unnamed]
    } else {
        tags.iter().map(|tag| named(&unnamed, tag)).collect()
    };
    Index {
        schema_version: 2,
        media_type: Some(MediaType::INDEX),
        manifests,
        annotations: BTreeMap::new(),
    }
}

fn named(unnamed: &Descriptor, tag: &Reference) -> Descriptor {
    let mut descriptor = unnamed.clone();
    let annotations = &mut descriptor.annotations;
    annotations.insert(NAME.to_owned(), tag.to_string());
    if let Some(tag) = tag.tag() {
        annotations.insert(REF_NAME.to_owned(), tag.to_owned());
    }
    descriptor
}

fn header(kind: tar::EntryType, mode: u32, size: u64) -> tar::Header {
    let mut header = tar::Header::new_ustar();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_size(size);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header
}

fn append_directory(tar: &mut tar::Builder<impl Write>, name: &str) -> Result<(), ExportError> {
    let mut header = header(tar::EntryType::Directory, 0o755, 0);
    tar.append_data(&mut header, name, io::empty())
        .map_err(ExportError::Archive)
}

fn append(tar: &mut tar::Builder<impl Write>, name: &str, bytes: &[u8]) -> Result<(), ExportError> {
    let mut header = header(tar::EntryType::Regular, 0o644, bytes.len() as u64);
    tar.append_data(&mut header, name, bytes)
        .map_err(ExportError::Archive)
}

fn append_blob(
    tar: &mut tar::Builder<impl Write>,
    name: &str,
    descriptor: &Descriptor,
    store: &Store,
) -> Result<(), ExportError> {
    let mut header = header(tar::EntryType::Regular, 0o644, descriptor.size);
    read_blob(descriptor, store, |blob| {
        tar.append_data(&mut header, name, blob)
    })
}

/// Gives `copy` a blob of the store to read: exactly as many bytes as `descriptor` says,
/// and checked by its digest at the end.
pub(super) fn read_blob(
    descriptor: &Descriptor,
    store: &Store,
    copy: impl FnOnce(&mut dyn Read) -> io::Result<()>,
) -> Result<(), ExportError> {
    let digest = || -> Digest { descriptor.digest.clone() };
    let mut reader =
        store
            .open_blob(&descriptor.digest)
            .map_err(|source| ExportError::OpenBlob {
                digest: digest(),
                source,
            })?;
    if reader.size() != descriptor.size {
        return Err(ExportError::BlobSize {
            digest: digest(),
            got: reader.size(),
            want: descriptor.size,
        });
    }
    // Not one byte more than announced, and yet to the end: there the digest is checked.
    let mut limited = reader.by_ref().take(descriptor.size);
    copy(&mut limited)
        .and_then(|()| {
            let missing = limited.limit();
            let excess = io::copy(limited.get_mut(), &mut io::sink())?;
            if missing == 0 && excess == 0 {
                Ok(())
            } else {
                Err(io::Error::new(
                    io::ErrorKind::InvalidData,
                    "the blob changed its size while it was read",
                ))
            }
        })
        .map_err(|source| ExportError::CopyBlob {
            digest: digest(),
            source,
        })
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::fs;
    use std::process::Command;

    use super::super::testing::{Fixture, fixture, index_of, one, skip, tags};
    use super::*;
    use crate::image::validate::validate;

    fn oci_archive(
        image: &Image,
        names: &[Reference],
        store: &Store,
        dest: &Path,
    ) -> Result<(), ExportError> {
        image_archive(ArchiveKind::Oci, &one(image), names, store, dest, &|| false)
    }

    fn written(kind: ArchiveKind, image: &Image, names: &[Reference], store: &Store) -> Vec<u8> {
        let mut bytes = Vec::new();
        write_archive(kind, &one(image), names, store, &mut bytes).unwrap();
        bytes
    }

    /// Name, mode and time of an entry.
    type Head = (String, u32, u64);

    /// The heads in order, and the content by name.
    fn read_back(archive: &[u8]) -> (Vec<Head>, HashMap<String, Vec<u8>>) {
        let mut heads = Vec::new();
        let mut contents = HashMap::new();
        for entry in tar::Archive::new(archive).entries().unwrap() {
            let mut entry = entry.unwrap();
            let name = entry.path().unwrap().display().to_string();
            let header = entry.header();
            heads.push((
                name.clone(),
                header.mode().unwrap(),
                header.mtime().unwrap(),
            ));
            let mut bytes = Vec::new();
            entry.read_to_end(&mut bytes).unwrap();
            contents.insert(name, bytes);
        }
        (heads, contents)
    }

    #[test]
    fn an_archive_is_a_layout_that_validates() {
        let Fixture { dir, store, image } = fixture();
        let dest = dir.path().join("out.tar");
        oci_archive(&image, &tags(&["a:1", "h.io/b/c"]), &store, &dest).unwrap();
        let (heads, contents) = read_back(&fs::read(&dest).unwrap());

        let mut digests = [
            image.raw_manifest.digest.hex(),
            image.manifest.config.digest.hex(),
            image.layers[0].descriptor.digest.hex(),
            image.layers[1].descriptor.digest.hex(),
        ];
        digests.sort_unstable();
        let file = |name: &str| (name.to_owned(), 0o644, 0);
        let mut expected = vec![
            ("blobs/".to_owned(), 0o755, 0),
            ("blobs/sha256/".to_owned(), 0o755, 0),
        ];
        expected.extend(
            digests
                .iter()
                .map(|hex| file(&format!("blobs/sha256/{hex}"))),
        );
        expected.extend([file("index.json"), file("oci-layout")]);
        assert_eq!(heads, expected);
        assert_eq!(contents["oci-layout"], LAYOUT);

        let index: serde_json::Value = serde_json::from_slice(&contents["index.json"]).unwrap();
        let entry = |name: &str, tag: &str| {
            serde_json::json!({
                "mediaType": "application/vnd.oci.image.manifest.v1+json",
                "digest": image.raw_manifest.digest.as_str(),
                "size": image.raw_manifest.bytes.len(),
                "platform": {"architecture": "amd64", "os": "linux"},
                "annotations": {NAME: name, REF_NAME: tag},
            })
        };
        assert_eq!(
            index,
            serde_json::json!({
                "schemaVersion": 2,
                "mediaType": "application/vnd.oci.image.index.v1+json",
                "manifests": [
                    entry("docker.io/library/a:1", "1"),
                    entry("h.io/b/c:latest", "latest"),
                ],
            })
        );
        let findings = validate(&image.raw_manifest, |descriptor: &Descriptor| {
            let name = format!("blobs/sha256/{}", descriptor.digest.hex());
            Ok(Box::new(io::Cursor::new(contents[&name].clone())) as Box<dyn Read>)
        });
        assert!(findings.is_empty(), "{findings:?}");
    }

    #[test]
    fn the_same_image_gives_the_same_bytes() {
        let Fixture {
            dir: _dir,
            store,
            image,
        } = fixture();
        let write = || written(ArchiveKind::Oci, &image, &[], &store);
        let first = write();
        assert_eq!(first, write());
        let (_, contents) = read_back(&first);
        let index: Index = serde_json::from_slice(&contents["index.json"]).unwrap();
        assert_eq!(index.manifests.len(), 1);
        assert_eq!(index.manifests[0].annotations, BTreeMap::new());
    }

    #[test]
    fn a_failure_leaves_nothing_half_written() {
        let Fixture { dir, store, image } = fixture();
        let out = dir.path().join("out");
        fs::create_dir(&out).unwrap();
        let dest = out.join("image.tar");
        fs::write(&dest, "old").unwrap();
        let digest = &image.layers[1].descriptor.digest;
        let path = store.blob_path(digest);
        let right = fs::read(&path).unwrap();

        let mut flipped = right.clone();
        flipped[0] ^= 1;
        fs::write(&path, &flipped).unwrap();
        let error = oci_archive(&image, &[], &store, &dest).unwrap_err();
        assert!(matches!(error, ExportError::CopyBlob { .. }), "{error:?}");
        assert_eq!(
            format!("{:#}", anyhow::Error::new(error)),
            format!(
                "copying the blob {digest}: the blob {digest} in the store was damaged (its bytes were {}) \
                 and has been removed; run the build again, which fetches or makes it anew",
                Digest::of(&flipped)
            )
        );

        fs::write(&path, &right[1..]).unwrap();
        let error = oci_archive(&image, &[], &store, &dest).unwrap_err();
        assert!(matches!(error, ExportError::BlobSize { .. }), "{error:?}");

        fs::remove_file(&path).unwrap();
        let error = oci_archive(&image, &[], &store, &dest).unwrap_err();
        assert!(matches!(error, ExportError::OpenBlob { .. }), "{error:?}");

        assert_eq!(fs::read_dir(&out).unwrap().count(), 1);
        assert_eq!(fs::read(&dest).unwrap(), b"old");
    }

    #[test]
    fn docker_finds_its_own_manifest() {
        let Fixture {
            dir: _dir,
            store,
            image,
        } = fixture();
        let names = tags(&["a:1", "me/a", "library/a/b", "h.io/library/c:2"]);
        let (heads, contents) = read_back(&written(ArchiveKind::Docker, &image, &names, &store));
        let found: Vec<&str> = heads.iter().map(|(name, ..)| name.as_str()).collect();
        assert_eq!(
            found[found.len() - 3..],
            ["index.json", "manifest.json", "oci-layout"]
        );
        let layers = [0, 1, 0].map(|at: usize| blob_name(&image.layers[at].descriptor.digest));
        let config = blob_name(&image.manifest.config.digest);
        let [one, two, again] = &layers;
        assert_eq!(
            String::from_utf8_lossy(&contents["manifest.json"]),
            format!(
                r#"[{{"Config":"{config}","RepoTags":["a:1","me/a:latest","library/a/b:latest","h.io/library/c:2"],"Layers":["{one}","{two}","{again}"]}}]"#
            )
        );
        let (_, contents) = read_back(&written(ArchiveKind::Docker, &image, &[], &store));
        let manifest: serde_json::Value =
            serde_json::from_slice(&contents["manifest.json"]).unwrap();
        assert_eq!(manifest[0]["RepoTags"], serde_json::Value::Null);
    }

    #[test]
    fn skopeo_reads_the_archive() {
        if Command::new("skopeo").arg("--version").output().is_err() {
            skip("skopeo is not installed");
            return;
        }
        let Fixture { dir, store, image } = fixture();
        let dest = dir.path().join("out.tar");
        oci_archive(&image, &tags(&["a:1", "b:2"]), &store, &dest).unwrap();
        for tag in ["1", "2"] {
            let output = Command::new("skopeo")
                .args(["inspect", &format!("oci-archive:{}:{tag}", dest.display())])
                .env("TMPDIR", dir.path())
                .output()
                .unwrap();
            let stderr = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{stderr}");
            let inspected: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
            assert_eq!(inspected["Digest"], image.raw_manifest.digest.as_str());
            assert_eq!(inspected["Layers"].as_array().unwrap().len(), 3);
        }
    }

    #[test]
    fn an_index_brings_all_its_images_once_each() {
        let Fixture { dir, store, image } = fixture();
        let both = index_of(&store, &image);
        let dest = dir.path().join("out.tar");
        let never = || false;
        let names = tags(&["h.io/a:1"]);
        image_archive(ArchiveKind::Oci, &both, &names, &store, &dest, &never).unwrap();
        let (heads, contents) = read_back(&fs::read(&dest).unwrap());
        // Of the two images' five layers two are the same, and one image has one twice.
        let blobs = heads.iter().filter(|(name, ..)| name.len() > 70);
        assert_eq!(blobs.count(), 1 + 2 * 2 + 3);
        let index: Index = serde_json::from_slice(&contents["index.json"]).unwrap();
        let [entry] = &index.manifests[..] else {
            panic!("{index:?}");
        };
        assert_eq!(
            (&entry.digest, &entry.media_type, &entry.platform),
            (&both.raw().digest, &MediaType::INDEX, &None)
        );
        assert_eq!(entry.annotations[NAME], "h.io/a:1");
        for image in both.images() {
            let findings = validate(&image.raw_manifest, |descriptor: &Descriptor| {
                let name = blob_name(&descriptor.digest);
                Ok(Box::new(io::Cursor::new(contents[&name].clone())) as Box<dyn Read>)
            });
            assert!(findings.is_empty(), "{findings:?}");
        }

        let docker = dir.path().join("docker.tar");
        let error = image_archive(ArchiveKind::Docker, &both, &[], &store, &docker, &never);
        assert!(matches!(error, Err(ExportError::IndexForDocker)));
        assert!(!docker.exists());
    }
}
