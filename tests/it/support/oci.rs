//! An image read from an OCI layout, every byte of it checked.
//!
//! Written against the specification and on none of the program's own types.
//!
//! <https://github.com/opencontainers/image-spec/blob/main/image-layout.md>

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};

use serde_json::Value;
use sha2::{Digest as _, Sha256};

use super::tarball::{self, Entry};

/// An image that holds what it promises.
#[derive(Clone, Debug)]
pub struct Image {
    /// `sha256:…` of the manifest.
    pub digest: String,
    pub manifest: Value,
    pub config: Value,
    /// Lowest first.
    pub layers: Vec<Layer>,
}

/// A layer of it.
#[derive(Clone, Debug)]
pub struct Layer {
    /// `sha256:…` of the blob.
    pub digest: String,
    pub file: PathBuf,
    pub entries: Vec<Entry>,
}

impl Image {
    /// Reads the only image of a layout.
    ///
    /// # Panics
    /// With what is wrong.
    #[track_caller]
    pub fn read(layout: &Path) -> Self {
        Self::try_read(layout).unwrap_or_else(|wrong| panic!("{}: {wrong}", layout.display()))
    }

    /// Reads the only image of a layout.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn try_read(layout: &Path) -> Result<Self, String> {
        read(layout)
    }

    /// The entry that the topmost layer with this path has for it.
    pub fn entry(&self, path: &str) -> Option<&Entry> {
        self.layers
            .iter()
            .rev()
            .find_map(|layer| layer.entries.iter().find(|e| e.path == path))
    }

    /// `MODE UID:GID KIND` of a path, or `absent`.
    pub fn summary(&self, path: &str) -> String {
        self.entry(path)
            .map_or_else(|| "absent".into(), Entry::summary)
    }

    /// A file's content, as text.
    #[track_caller]
    pub fn text(&self, path: &str) -> String {
        let layer = (self.layers.iter().rev())
            .find(|layer| layer.entries.iter().any(|e| e.path == path))
            .unwrap_or_else(|| panic!("no layer has {path}"));
        // GNU tar as second opinion: it must find the same file in the same blob.
        let ran = super::process::run(
            std::process::Command::new("tar")
                .args(["--extract", "--to-stdout", "--file"])
                .arg(&layer.file)
                .arg(path),
        );
        ran.success().stdout
    }

    /// The image config's `config`.
    pub fn run_config(&self) -> &Value {
        &self.config["config"]
    }
}

/// `0123…` of bytes.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// `sha256:…` of bytes.
pub fn sha256(bytes: &[u8]) -> String {
    format!("sha256:{}", hex(&Sha256::digest(bytes)))
}

fn read(layout: &Path) -> Result<Image, String> {
    let marker =
        json(&std::fs::read(layout.join("oci-layout")).map_err(|e| format!("oci-layout: {e}"))?)?;
    equal(
        "oci-layout version",
        &marker["imageLayoutVersion"],
        &Value::from("1.0.0"),
    )?;
    let index =
        json(&std::fs::read(layout.join("index.json")).map_err(|e| format!("index.json: {e}"))?)?;
    equal(
        "index schemaVersion",
        &index["schemaVersion"],
        &Value::from(2),
    )?;
    let manifests = list(&index, "manifests")?;
    let [descriptor] = manifests.as_slice() else {
        return Err(format!(
            "{} manifests in index.json, want 1",
            manifests.len()
        ));
    };
    equal(
        "manifest media type",
        &descriptor["mediaType"],
        &Value::from("application/vnd.oci.image.manifest.v1+json"),
    )?;
    let manifest = json(&blob(layout, descriptor)?)?;
    equal(
        "manifest schemaVersion",
        &manifest["schemaVersion"],
        &Value::from(2),
    )?;
    equal(
        "manifest mediaType",
        &manifest["mediaType"],
        &descriptor["mediaType"],
    )?;
    let config_descriptor = &manifest["config"];
    equal(
        "config media type",
        &config_descriptor["mediaType"],
        &Value::from("application/vnd.oci.image.config.v1+json"),
    )?;
    let config = json(&blob(layout, config_descriptor)?)?;
    for key in ["architecture", "os"] {
        if config[key].as_str().is_none_or(str::is_empty) {
            return Err(format!("the config has no {key}"));
        }
    }
    equal(
        "rootfs type",
        &config["rootfs"]["type"],
        &Value::from("layers"),
    )?;
    let diff_ids = list(&config["rootfs"], "diff_ids")?;
    let descriptors = list(&manifest, "layers")?;
    if diff_ids.len() != descriptors.len() {
        return Err(format!(
            "{} diff IDs for {} layers",
            diff_ids.len(),
            descriptors.len()
        ));
    }
    let history = list(&config, "history")?;
    let made = history
        .iter()
        .filter(|h| h["empty_layer"] != Value::Bool(true))
        .count();
    if made != diff_ids.len() {
        return Err(format!(
            "history tells of {made} layers, there are {}",
            diff_ids.len()
        ));
    }
    let mut layers = Vec::new();
    for (descriptor, diff_id) in descriptors.iter().zip(diff_ids) {
        layers.push(layer(
            layout,
            descriptor,
            diff_id.as_str().unwrap_or_default(),
        )?);
    }
    Ok(Image {
        digest: descriptor["digest"].as_str().unwrap_or_default().to_owned(),
        manifest,
        config,
        layers,
    })
}

fn layer(layout: &Path, descriptor: &Value, diff_id: &str) -> Result<Layer, String> {
    let file = check(layout, descriptor)?;
    let open = || {
        File::open(&file)
            .map(BufReader::new)
            .map_err(|e| e.to_string())
    };
    let unpacked: Box<dyn Read> = match descriptor["mediaType"].as_str().unwrap_or_default() {
        "application/vnd.oci.image.layer.v1.tar" => Box::new(open()?),
        "application/vnd.oci.image.layer.v1.tar+gzip" => {
            Box::new(flate2::read::MultiGzDecoder::new(open()?))
        }
        "application/vnd.oci.image.layer.v1.tar+zstd" => {
            Box::new(zstd::Decoder::with_buffer(open()?).map_err(|e| e.to_string())?)
        }
        other => return Err(format!("a layer of media type {other:?}")),
    };
    let digest = descriptor["digest"].as_str().unwrap_or_default().to_owned();
    let mut hashing = Hashing(unpacked, Sha256::new());
    let entries = tarball::list(&mut hashing).map_err(|e| format!("layer {digest}: {e}"))?;
    let actual = format!("sha256:{}", hex(&hashing.1.finalize()));
    equal(
        &format!("diff ID of {digest}"),
        &Value::from(actual),
        &Value::from(diff_id),
    )?;
    let mut seen = BTreeMap::new();
    for entry in &entries {
        if entry.path.starts_with('/') || entry.path.split('/').any(|part| part == "..") {
            return Err(format!("layer {digest}: {:?} leaves the root", entry.path));
        }
        if seen.insert(&entry.path, ()).is_some() {
            return Err(format!("layer {digest}: {:?} twice", entry.path));
        }
        if entry.kind == '1' && !seen.contains_key(&entry.link.trim_start_matches("./").to_owned())
        {
            return Err(format!(
                "layer {digest}: {:?} is a link to {:?}, which does not come before it",
                entry.path, entry.link
            ));
        }
    }
    Ok(Layer {
        digest,
        file,
        entries,
    })
}

struct Hashing<R>(R, Sha256);

impl<R: Read> Read for Hashing<R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let got = self.0.read(buffer)?;
        self.1.update(&buffer[..got]);
        Ok(got)
    }
}

/// The file of a blob whose digest and size are those of its descriptor.
fn check(layout: &Path, descriptor: &Value) -> Result<PathBuf, String> {
    let digest = descriptor["digest"]
        .as_str()
        .ok_or("a descriptor without digest")?;
    let name = digest
        .strip_prefix("sha256:")
        .filter(|d| d.len() == 64 && d.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')))
        .ok_or_else(|| format!("digest {digest:?}"))?;
    let path = layout.join("blobs/sha256").join(name);
    let mut hashing = Hashing(
        File::open(&path).map_err(|e| format!("blob {digest}: {e}"))?,
        Sha256::new(),
    );
    let size = std::io::copy(&mut hashing, &mut std::io::sink()).map_err(|e| e.to_string())?;
    equal(
        &format!("size of {digest}"),
        &Value::from(size),
        &descriptor["size"],
    )?;
    let actual = format!("sha256:{}", hex(&hashing.1.finalize()));
    equal("blob digest", &Value::from(actual), &Value::from(digest))?;
    Ok(path)
}

fn blob(layout: &Path, descriptor: &Value) -> Result<Vec<u8>, String> {
    std::fs::read(check(layout, descriptor)?).map_err(|e| e.to_string())
}

fn json(bytes: &[u8]) -> Result<Value, String> {
    serde_json::from_slice(bytes).map_err(|e| e.to_string())
}

fn list<'a>(value: &'a Value, key: &str) -> Result<&'a Vec<Value>, String> {
    value[key]
        .as_array()
        .ok_or_else(|| format!("no list {key:?} in {value}"))
}

fn equal(what: &str, got: &Value, want: &Value) -> Result<(), String> {
    if got == want {
        return Ok(());
    }
    Err(format!("{what}: got {got}, want {want}"))
}

#[test]
fn a_flipped_byte_or_a_wrong_size_or_diff_id_is_found() {
    let dir = super::dir::TestDir::new("oci");
    let fresh = |name: &str| {
        let layout = dir.join(name);
        super::images::write_layout(
            &layout,
            &super::images::small_tar(&[("a", "text\n")])[..],
            &Value::Null,
        );
        layout
    };
    let image = Image::read(&fresh("good"));
    assert_eq!(image.summary("a"), "644 0:0 0");
    assert_eq!(image.text("a"), "text\n");

    let flipped = fresh("flipped");
    let layer = flipped
        .join("blobs/sha256")
        .join(image.layers[0].digest.trim_start_matches("sha256:"));
    let mut bytes = std::fs::read(&layer).expect("written above");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&layer, &bytes).expect("ours");
    assert!(read(&flipped).is_err_and(|e| e.starts_with("blob digest: got")));
    bytes.pop();
    std::fs::write(&layer, &bytes).expect("ours");
    assert!(read(&flipped).is_err_and(|e| e.starts_with("size of sha256:")));
}
