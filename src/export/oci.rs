//! `type=oci`: an OCI image layout in a tar.
//!
//! ```text
//! blobs/
//! blobs/sha256/
//! blobs/sha256/<hex>   config, layers and manifest
//! index.json           one entry a tag, with the annotations that BuildKit sets
//! oci-layout
//! ```
//!
//! The same image and tags give the same bytes: entries are sorted and carry neither
//! time nor owner.
//!
//! <https://github.com/opencontainers/image-spec/blob/main/image-layout.md>

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, BufWriter, IsTerminal as _, Read, Write};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use super::ExportError;
use crate::image::{Descriptor, Digest, Image, Index, MediaType, Reference};
use crate::store::Store;

/// The content of `oci-layout`.
const LAYOUT: &[u8] = br#"{"imageLayoutVersion":"1.0.0"}"#;

/// The whole name, which containerd imports under.
const NAME: &str = "io.containerd.image.name";

/// The tag alone, which tools after the specification select by.
const REF_NAME: &str = "org.opencontainers.image.ref.name";

/// Where an entry's bytes are.
enum Source<'i> {
    Bytes(&'i [u8]),
    Store(&'i Descriptor),
}

/// Writes `image` as a tar of an OCI image layout to `dest`; `-` is standard output.
///
/// All layers have to be in `store`. A file appears under its name when it is
/// complete, or not at all; what is no regular file, such as a pipe, is written as it is.
///
/// # Errors
/// [`ExportError`]; a damaged blob is `CopyBlob`.
pub fn oci_archive(
    image: &Image,
    tags: &[Reference],
    store: &Store,
    dest: &Path,
) -> Result<(), ExportError> {
    if dest == Path::new("-") {
        let stdout = io::stdout();
        if stdout.is_terminal() {
            return Err(ExportError::Terminal);
        }
        return write_oci_archive(image, tags, store, stdout.lock()).map(drop);
    }
    // A link keeps pointing at its file: that one is replaced, not the link.
    let resolved = fs::canonicalize(dest);
    let dest = resolved.as_deref().unwrap_or(dest);
    match fs::metadata(dest) {
        Ok(metadata) if !metadata.is_file() && !metadata.is_dir() => {
            let file = File::options()
                .write(true)
                .open(dest)
                .map_err(ExportError::io("opening", dest))?;
            return write_oci_archive(image, tags, store, file).map(drop);
        }
        Ok(metadata) if metadata.is_dir() => {
            let error = io::Error::from(io::ErrorKind::IsADirectory);
            return Err(ExportError::io("writing", dest)(error));
        }
        _ => {}
    }
    let parent = match dest.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let file = tempfile::Builder::new()
        .prefix(".sockless-")
        // What `open(2)` of a new file would give; the umask takes its part.
        .permissions(fs::Permissions::from_mode(0o666))
        .tempfile_in(parent)
        .map_err(ExportError::io("creating a file in", parent))?;
    let file = write_oci_archive(image, tags, store, file)?;
    file.persist(dest)
        .map_err(|error| ExportError::io("naming", dest)(error.error))?;
    Ok(())
}

/// Writes the tar to `out`, which is flushed and returned.
///
/// # Errors
/// [`ExportError`]; what was written by then is no archive.
pub fn write_oci_archive<W: Write>(
    image: &Image,
    tags: &[Reference],
    store: &Store,
    out: W,
) -> Result<W, ExportError> {
    // A map, because one layer may be in an image twice and a tar must name it once.
    let mut blobs = BTreeMap::from([
        (
            &image.raw_manifest.digest,
            Source::Bytes(&image.raw_manifest.bytes),
        ),
        (
            &image.manifest.config.digest,
            Source::Bytes(&image.config_bytes),
        ),
    ]);
    for layer in &image.layers {
        blobs.insert(&layer.descriptor.digest, Source::Store(&layer.descriptor));
    }
    let mut tar = tar::Builder::new(BufWriter::with_capacity(1 << 20, out));
    append_directory(&mut tar, "blobs/")?;
    append_directory(&mut tar, "blobs/sha256/")?;
    for (digest, source) in blobs {
        let name = format!("blobs/sha256/{}", digest.hex());
        match source {
            Source::Bytes(bytes) => append(&mut tar, &name, bytes)?,
            Source::Store(descriptor) => append_blob(&mut tar, &name, descriptor, store)?,
        }
    }
    let index = serde_json::to_vec(&index(image, tags)).expect("an index has only string keys");
    append(&mut tar, "index.json", &index)?;
    append(&mut tar, "oci-layout", LAYOUT)?;
    let buffered = tar.into_inner().map_err(ExportError::Archive)?;
    let mut out = buffered
        .into_inner()
        .map_err(|error| ExportError::Archive(error.into_error()))?;
    out.flush().map_err(ExportError::Archive)?;
    Ok(out)
}

/// One entry a tag, or one without a name.
fn index(image: &Image, tags: &[Reference]) -> Index {
    let mut unnamed = image.descriptor();
    unnamed.platform = Some(image.config.platform.clone());
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
    let mut header = header(tar::EntryType::Regular, 0o644, descriptor.size);
    // Not one byte more than the header says, and yet to the end: there the digest is checked.
    let mut limited = reader.by_ref().take(descriptor.size);
    tar.append_data(&mut header, name, &mut limited)
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
    use std::os::unix::fs::symlink;
    use std::process::Command;

    use super::*;
    use crate::image::validate::validate;
    use crate::image::{Annotations, DiffId, History, ImageConfig, ImageLayer, Platform, assemble};

    struct Fixture {
        dir: tempfile::TempDir,
        store: Store,
        image: Image,
    }

    /// An image of three layers, the last of which is the first again.
    fn fixture() -> Fixture {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("store")).unwrap();
        let layers = ["one", "two", "one"].map(|text| {
            let mut tar = tar::Builder::new(Vec::new());
            append(&mut tar, text, text.as_bytes()).unwrap();
            let plain = tar.into_inner().unwrap();
            let digest = store.put_blob(&plain).unwrap();
            ImageLayer {
                diff_id: DiffId::from_uncompressed(digest),
                descriptor: Descriptor::of(MediaType::LAYER_TAR, &plain),
            }
        });
        let mut config = ImageConfig::scratch(Platform::parse("linux/amd64").unwrap());
        config.history = vec![History::default(); 3];
        let image = assemble(config, layers.to_vec(), Annotations::default());
        Fixture { dir, store, image }
    }

    fn tags(names: &[&str]) -> Vec<Reference> {
        names.iter().map(|n| Reference::parse(n).unwrap()).collect()
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
        let write = || write_oci_archive(&image, &[], &store, Vec::new()).unwrap();
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
    fn what_stands_at_the_destination_is_respected() {
        let Fixture { dir, store, image } = fixture();
        let right = write_oci_archive(&image, &[], &store, Vec::new()).unwrap();
        let real = dir.path().join("real.tar");
        let link = dir.path().join("link.tar");
        fs::write(&real, "old").unwrap();
        symlink("real.tar", &link).unwrap();
        oci_archive(&image, &[], &store, &link).unwrap();
        assert_eq!(fs::read(&real).unwrap(), right);
        assert_eq!(fs::read_link(&link).unwrap(), Path::new("real.tar"));

        let error = oci_archive(&image, &[], &store, dir.path()).unwrap_err();
        assert_eq!(
            format!("{:#}", anyhow::Error::new(error)),
            format!("writing {}: is a directory", dir.path().display())
        );

        // A pipe is written to and stays a pipe.
        let pipe = dir.path().join("pipe");
        rustix::fs::mkfifoat(
            rustix::fs::CWD,
            &pipe,
            rustix::fs::Mode::from_raw_mode(0o600),
        )
        .unwrap();
        let reader = std::thread::spawn({
            let pipe = pipe.clone();
            move || fs::read(pipe).unwrap()
        });
        oci_archive(&image, &[], &store, &pipe).unwrap();
        assert_eq!(reader.join().unwrap(), right);
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

    /// A test that cannot run says so, and fails where everything has to run.
    #[allow(clippy::print_stderr, reason = "a test says that it did not run")]
    fn skip(reason: &str) {
        assert!(
            std::env::var_os("SOCKLESS_TEST_REQUIRE_ALL").is_none_or(|v| v != "1"),
            "{reason}"
        );
        eprintln!("skipped: {reason}");
    }
}
