//! `type=oci,tar=false`: an OCI image layout in a directory, which may hold other images.
//!
//! Blobs come first and `index.json` last, each under its name when it is complete, so
//! that whoever reads meanwhile finds a whole layout, with the image or without.
//!
//! <https://github.com/opencontainers/image-spec/blob/main/image-layout.md>

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::ExportError;
use super::file::{IsCancelled, parent_of, persist, temporary_in};
use super::oci::{LAYOUT, NAME, REF_NAME, Source, blob_name, blobs, read_blob};
use crate::image::{Descriptor, ImageOrIndex, MANIFEST_LIMIT_BYTES, MediaType, Reference};
use crate::io::LimitedReader;
use crate::layout::Layout;
use crate::store::Store;

/// The tag of an image without a name, as with BuildKit.
const DEFAULT_TAG: &str = "latest";

/// Adds `image` to the layout in the directory `dest`, which is made where it is missing.
///
/// All layers have to be in `store`. Other entries of `index.json` stay as they are, those
/// with the same name are replaced; blobs that are there are not written again. Several
/// processes may do this at once.
///
/// # Errors
/// [`ExportError`]. A directory that was not there is not there then either; in one that
/// was, complete blobs may have been added.
pub fn image_layout(
    image: &ImageOrIndex,
    names: &[Reference],
    store: &Store,
    dest: &Path,
    is_cancelled: IsCancelled<'_>,
) -> Result<(), ExportError> {
    if dest.exists() {
        let extended = extend(image, names, store, dest, is_cancelled);
        return extended.map_err(|error| error.at(dest));
    }
    let parent = parent_of(dest);
    fs::create_dir_all(parent).map_err(ExportError::io("creating", parent))?;
    let temporary = tempfile::Builder::new()
        .prefix(".sockless-")
        // What `mkdir(2)` would give; the umask takes its part.
        .permissions(fs::Permissions::from_mode(0o777))
        .tempdir_in(parent)
        .map_err(ExportError::io("creating a directory in", parent))?;
    let extended = extend(image, names, store, temporary.path(), is_cancelled);
    extended.map_err(|error| error.at(dest))?;
    fs::rename(temporary.path(), dest).map_err(ExportError::io("naming", dest))?;
    // It has another name now, so there is nothing to remove.
    drop(temporary.keep());
    Ok(())
}

fn extend(
    image: &ImageOrIndex,
    names: &[Reference],
    store: &Store,
    dir: &Path,
    is_cancelled: IsCancelled<'_>,
) -> Result<(), ExportError> {
    let mut layout = open_layout(dir)?;
    for (digest, source) in blobs(image) {
        if is_cancelled() {
            let stopped = io::Error::other("stopped");
            return Err(ExportError::io("writing", dir)(stopped));
        }
        let path = dir.join(blob_name(digest));
        let size = match &source {
            Source::Bytes(bytes) => bytes.len() as u64,
            Source::Store(descriptor) => descriptor.size,
        };
        if fs::metadata(&path).is_ok_and(|found| found.is_file() && found.len() == size) {
            continue;
        }
        let mut file = temporary_in(dir)?;
        match source {
            Source::Bytes(bytes) => file
                .write_all(bytes)
                .map_err(ExportError::io("writing", &path))?,
            Source::Store(descriptor) => read_blob(descriptor, store, |blob| {
                io::copy(blob, &mut file).map(drop)
            })?,
        }
        persist(file, &path)?;
    }
    layout.add(entries(image, names))?;
    layout.write()
}

/// A layout that nobody else changes.
pub(super) struct Layouted {
    dir: PathBuf,
    index: Map<String, Value>,
    _lock: File,
}

/// Opens the layout in the directory `dir`, which may be empty, to add to it.
pub(super) fn open_layout(dir: &Path) -> Result<Layouted, ExportError> {
    Layout::open(dir)?;
    let lock = File::open(dir).map_err(ExportError::io("opening", dir))?;
    lock.lock().map_err(ExportError::io("locking", dir))?;
    let index = read_index(&dir.join("index.json"))?;
    make_blobs_dir(dir)?;
    Ok(Layouted {
        dir: dir.to_owned(),
        index,
        _lock: lock,
    })
}

/// Makes the directories of blobs where they are missing. A link in their place is an error:
/// whoever made the layout would choose where blobs are written.
fn make_blobs_dir(dir: &Path) -> Result<(), ExportError> {
    for name in ["blobs", "blobs/sha256"] {
        let path = dir.join(name);
        match fs::create_dir(&path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            made => made.map_err(ExportError::io("creating", &path))?,
        }
        let found = fs::symlink_metadata(&path).map_err(ExportError::io("looking at", &path))?;
        if !found.is_dir() {
            let error = io::ErrorKind::NotADirectory.into();
            return Err(ExportError::io("writing to", &path)(error));
        }
    }
    Ok(())
}

impl Layouted {
    /// Adds entries: each with its name, if it has one, and its tag. Takes out those that had
    /// these names.
    pub(super) fn add(
        &mut self,
        entries: Vec<(Option<String>, &str, Descriptor)>,
    ) -> Result<(), ExportError> {
        add(&mut self.index, entries, &self.dir.join("index.json"))
    }

    /// Writes what names its blobs.
    pub(super) fn write(&self) -> Result<(), ExportError> {
        write_file(&self.dir, "oci-layout", LAYOUT)?;
        let index = serde_json::to_vec(&self.index).expect("it was read from JSON");
        write_file(&self.dir, "index.json", &index)
    }
}

fn write_file(dir: &Path, name: &str, bytes: &[u8]) -> Result<(), ExportError> {
    let path = dir.join(name);
    let mut file = temporary_in(dir)?;
    file.write_all(bytes)
        .map_err(ExportError::io("writing", &path))?;
    persist(file, &path)
}

/// The index that is there, with whatever it says beside what this program knows.
fn read_index(path: &Path) -> Result<Map<String, Value>, ExportError> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Map::new()),
        Err(error) => return Err(ExportError::io("opening", path)(error)),
    };
    let limited = LimitedReader::new(file, MANIFEST_LIMIT_BYTES, "the index");
    let text = io::read_to_string(limited).map_err(ExportError::io("reading", path))?;
    if text.is_empty() {
        return Ok(Map::new());
    }
    serde_json::from_str(&text).map_err(|source| ExportError::io("reading", path)(source.into()))
}

/// One entry for each name of the image.
fn entries<'n>(
    image: &ImageOrIndex,
    names: &'n [Reference],
) -> Vec<(Option<String>, &'n str, Descriptor)> {
    let named: Vec<(Option<String>, &str)> = if names.is_empty() {
        vec![(None, DEFAULT_TAG)]
    } else {
        names
            .iter()
            .map(|name| (Some(name.to_string()), name.tag().unwrap_or(DEFAULT_TAG)))
            .collect()
    };
    let named = named.into_iter().map(|(name, tag)| {
        let mut descriptor = image.descriptor();
        let annotations = &mut descriptor.annotations;
        annotations.extend(name.clone().map(|name| (NAME.to_owned(), name)));
        annotations.insert(REF_NAME.to_owned(), tag.to_owned());
        (name, tag, descriptor)
    });
    named.collect()
}

/// Adds entries with their names and tags, and takes out those that had these names.
fn add(
    index: &mut Map<String, Value>,
    entries: Vec<(Option<String>, &str, Descriptor)>,
    path: &Path,
) -> Result<(), ExportError> {
    index.entry("schemaVersion").or_insert(json!(2));
    index
        .entry("mediaType")
        .or_insert_with(|| json!(MediaType::INDEX));
    let manifests = index.entry("manifests").or_insert_with(|| json!([]));
    if manifests.is_null() {
        // As Go writes a list of nothing.
        *manifests = json!([]);
    }
    let Value::Array(manifests) = manifests else {
        let reason = io::Error::new(io::ErrorKind::InvalidData, "\"manifests\" is no list");
        return Err(ExportError::io("reading", path)(reason));
    };
    for (name, tag, descriptor) in entries {
        manifests.retain(|entry| {
            let annotation = |key: &str| entry["annotations"][key].as_str().unwrap_or_default();
            annotation(REF_NAME) != tag || annotation(NAME) != name.as_deref().unwrap_or_default()
        });
        manifests.push(json!(descriptor));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::super::testing::{Fixture, fixture, image_of, index_of, one, skip, tags};
    use super::*;
    use crate::image::{Image, Platform};

    fn names_in(dir: &Path) -> Vec<(String, String, String)> {
        let index: Value =
            serde_json::from_slice(&fs::read(dir.join("index.json")).unwrap()).unwrap();
        let entries = index["manifests"].as_array().unwrap().iter();
        let text = |value: &Value| value.as_str().unwrap_or("-").to_owned();
        entries
            .map(|entry| {
                let annotations = &entry["annotations"];
                (
                    text(&annotations[NAME]),
                    text(&annotations[REF_NAME]),
                    text(&entry["digest"]),
                )
            })
            .collect()
    }

    fn listing(dir: &Path) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(dir)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn a_layout_grows_and_keeps_what_it_had() {
        let Fixture { dir, store, image } = fixture();
        let other = image_of(&store, &["one", "three"]);
        let dest = dir.path().join("deep/layout");
        let write = |image: &Image, names: &[&str]| {
            image_layout(&one(image), &tags(names), &store, &dest, &|| false).unwrap();
        };
        let entry = |name: &str, tag: &str, image: &Image| {
            let digest = image.raw_manifest.digest.to_string();
            (name.to_owned(), tag.to_owned(), digest)
        };
        write(&image, &["a:1", "h.io/b:2"]);
        assert_eq!(
            names_in(&dest),
            [
                entry("docker.io/library/a:1", "1", &image),
                entry("h.io/b:2", "2", &image)
            ]
        );
        assert_eq!(listing(&dest), ["blobs", "index.json", "oci-layout"]);
        assert_eq!(fs::read(dest.join("oci-layout")).unwrap(), LAYOUT);

        // What others wrote stays, known or not.
        let path = dest.join("index.json");
        let mut index: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        index["subject"] = json!({"x": 1});
        index["manifests"][1]["artifactType"] = json!("t/t");
        fs::write(&path, index.to_string()).unwrap();
        let shared = dest.join(blob_name(&image.layers[0].descriptor.digest));
        let inode = |path: &Path| std::os::unix::fs::MetadataExt::ino(&fs::metadata(path).unwrap());
        let before = inode(&shared);

        write(&other, &["a:1"]);
        write(&other, &[]);
        assert_eq!(
            names_in(&dest),
            [
                entry("h.io/b:2", "2", &image),
                entry("docker.io/library/a:1", "1", &other),
                entry("-", "latest", &other),
            ]
        );
        let index: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        assert_eq!(index["subject"], json!({"x": 1}));
        assert_eq!(index["manifests"][0]["artifactType"], "t/t");
        assert_eq!(inode(&shared), before);

        // The program's own reader finds both, every byte verified.
        let layout = Layout::open(&dest).unwrap();
        let platform = Platform::parse("linux/amd64").unwrap();
        for (name, image) in [("h.io/b:2", &image), ("docker.io/library/a:1", &other)] {
            let reference = &tags(&["x/y:1"])[0];
            let found = layout.resolve(name, None, &platform, reference).unwrap();
            assert_eq!(found.raw.digest, image.raw_manifest.digest);
            let empty = Store::open(&dir.path().join(format!("store-{}", found.raw.digest.hex())));
            let empty = empty.unwrap();
            for layer in &image.layers {
                layout.import(&layer.descriptor, &empty).unwrap();
            }
        }
    }

    #[test]
    fn a_failure_changes_no_layout() {
        let Fixture { dir, store, image } = fixture();
        let layout = dir.path().join("layout");
        let write = |image: &Image| image_layout(&one(image), &[], &store, &layout, &|| false);
        let broken = image_of(&store, &["broken"]);
        let blob = store.blob_path(&broken.layers[0].descriptor.digest);
        let mut flipped = fs::read(&blob).unwrap();
        flipped[0] ^= 1;
        fs::write(&blob, &flipped).unwrap();
        let before = listing(dir.path());
        let error = write(&broken).unwrap_err();
        assert!(matches!(error, ExportError::CopyBlob { .. }), "{error:?}");
        assert_eq!(listing(dir.path()), before);

        write(&image).unwrap();
        let index = fs::read(layout.join("index.json")).unwrap();
        let error = write(&broken).unwrap_err();
        assert!(matches!(error, ExportError::OpenBlob { .. }), "{error:?}");
        assert_eq!(fs::read(layout.join("index.json")).unwrap(), index);
        assert_eq!(listing(&layout), ["blobs", "index.json", "oci-layout"]);

        for (text, want) in [
            ("{", "EOF while parsing an object at line 1 column 1"),
            (r#"{"manifests": 1}"#, "\"manifests\" is no list"),
        ] {
            fs::write(layout.join("index.json"), text).unwrap();
            let error = anyhow::Error::new(write(&image).unwrap_err());
            assert!(format!("{error:#}").contains(want), "{error:#}");
            assert_eq!(fs::read_to_string(layout.join("index.json")).unwrap(), text);
        }
        fs::write(layout.join("oci-layout"), r#"{"imageLayoutVersion":"2.0"}"#).unwrap();
        let error = write(&image).unwrap_err();
        assert!(error.to_string().contains("expected 1.x"), "{error}");
    }

    #[test]
    fn skopeo_reads_the_layout() {
        if Command::new("skopeo").arg("--version").output().is_err() {
            skip("skopeo is not installed");
            return;
        }
        let Fixture { dir, store, image } = fixture();
        let dest = dir.path().join("layout");
        image_layout(&one(&image), &tags(&["a:1"]), &store, &dest, &|| false).unwrap();
        let output = Command::new("skopeo")
            .args(["inspect", &format!("oci:{}:1", dest.display())])
            .output()
            .unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{stderr}");
        let inspected: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(inspected["Digest"], image.raw_manifest.digest.as_str());
    }

    #[test]
    fn an_index_is_read_back_by_platform() {
        let Fixture { dir, store, image } = fixture();
        let both = index_of(&store, &image);
        let dest = dir.path().join("layout");
        image_layout(&both, &tags(&["h.io/a:1"]), &store, &dest, &|| false).unwrap();
        let entry = ("h.io/a:1", "1", both.raw().digest.as_str());
        let entry = (entry.0.to_owned(), entry.1.to_owned(), entry.2.to_owned());
        assert_eq!(names_in(&dest), [entry]);
        let layout = Layout::open(&dest).unwrap();
        for (text, image) in ["linux/amd64", "linux/arm64"].iter().zip(both.images()) {
            let platform = Platform::parse(text).unwrap();
            let found = layout.resolve("1", None, &platform, &tags(&["x/y:1"])[0]);
            assert_eq!(found.unwrap().raw.digest, image.raw_manifest.digest);
        }
    }
}
