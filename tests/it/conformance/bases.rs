//! The fixture images, as `base/images.json` and `base/make-base.sh` say.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::Command;

use serde::Deserialize;
use serde_json::{Value, json};

use super::flatten::Tree;
use crate::support::dir::TestDir;
use crate::support::oci::sha256;
use crate::support::process::run;
use crate::support::registry::Registry;
use crate::support::{find_program, images, tarball};

/// `base/images.json`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    rootfs: Rootfs,
    history: Vec<Value>,
    images: Vec<Image>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Rootfs {
    script: String,
    mtime: u64,
    uid: u64,
    gid: u64,
    overrides: Vec<Override>,
}

/// What a directory of an ordinary user cannot hold of one path.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Override {
    path: String,
    uid: Option<u64>,
    gid: Option<u64>,
    #[serde(default)]
    xattrs: BTreeMap<String, String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Image {
    name: String,
    platforms: Vec<String>,
    config: Value,
    history: Option<Vec<Value>>,
}

/// The fixture images and a registry that has them.
#[derive(Debug)]
pub struct Bases {
    /// The mirror of docker.io.
    pub registry: Registry,
    images: BTreeMap<String, Base>,
    /// The layer that all have, uncompressed.
    pub layer: Vec<u8>,
}

/// What an image that is built from a base begins with.
#[derive(Clone, Debug)]
pub struct Base {
    /// Of its manifest, or of its index if it has several platforms; empty for `scratch`.
    pub digest: String,
    pub diff_ids: Vec<Value>,
    pub history: Vec<Value>,
    pub tree: Tree,
}

impl Bases {
    /// Makes the images, and starts a registry that has them.
    ///
    /// # Errors
    /// What the machine lacks, or what is wrong with the description.
    pub fn new(directory: &Path) -> Result<Self, String> {
        images::registry_present()?;
        let file = directory.join("images.json");
        let text = std::fs::read(&file).map_err(|e| format!("{}: {e}", file.display()))?;
        let document: Document =
            serde_json::from_slice(&text).map_err(|e| format!("{}: {e}", file.display()))?;
        let layer = layer(directory, &document.rootfs)?;
        let mut tree = Tree::new();
        tree.apply(&tarball::list(&layer[..])?)?;

        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::new(6));
        let compressed = (gzip.write_all(&layer))
            .and_then(|()| gzip.finish())
            .map_err(|e| e.to_string())?;
        let diff_id = sha256(&layer);
        let work = TestDir::new("conformance-bases");
        let mut bases = BTreeMap::new();
        let mut layouts = Vec::new();
        for image in &document.images {
            let history = image.history.as_ref().unwrap_or(&document.history);
            let layout = work.join(image.name.replace('/', "-"));
            let digest = write(&layout, image, history, &diff_id, &compressed)?;
            let base = Base {
                digest,
                diff_ids: vec![diff_id.as_str().into()],
                history: history.clone(),
                tree: tree.clone(),
            };
            layouts.push((layout, format!("{}:latest", image.name)));
            bases.insert(image.name.clone(), base);
        }
        // The name says what is in it, so that nothing stale is served.
        let digests: String = bases.values().map(|base| base.digest.as_str()).collect();
        let name = format!("conformance-{}", &sha256(digests.as_bytes())[7..19]);
        Ok(Self {
            registry: images::serve(&name, |_| Ok(layouts))?,
            images: bases,
            layer,
        })
    }

    /// An image by its name, or the empty one: `scratch`.
    ///
    /// # Errors
    /// There is none of this name.
    pub fn get(&self, name: &str) -> Result<Base, String> {
        if name == "scratch" {
            return Ok(Base {
                digest: String::new(),
                diff_ids: Vec::new(),
                history: Vec::new(),
                tree: Tree::new(),
            });
        }
        (self.images.get(name).cloned()).ok_or_else(|| format!("there is no fixture image {name}"))
    }

    /// Replaces each `{{digest:NAME}}` in a text.
    ///
    /// # Errors
    /// A name that no image has.
    pub fn fill(&self, text: &str) -> Result<String, String> {
        const OPENING: &str = "{{digest:";
        let mut filled = String::new();
        let mut rest = text;
        while let Some((before, after)) = rest.split_once(OPENING) {
            let (name, behind) = after
                .split_once("}}")
                .ok_or_else(|| format!("{text:?}: no }}}} behind {OPENING}"))?;
            filled += before;
            filled += &self.get(name)?.digest;
            rest = behind;
        }
        Ok(filled + rest)
    }
}

/// The layer: the directory that the script makes, in the order of its paths.
fn layer(directory: &Path, rootfs: &Rootfs) -> Result<Vec<u8>, String> {
    let work = TestDir::new("conformance-rootfs");
    let root = work.join("rootfs");
    let made = run(Command::new("sh")
        .arg(directory.join(&rootfs.script))
        .arg(&root)
        .env("BUSYBOX", find_program("busybox").ok_or("no busybox")?));
    if !made.status.success() {
        return Err(format!("{}: {}", rootfs.script, made.stderr));
    }
    let mut overrides: BTreeMap<&str, &Override> =
        (rootfs.overrides.iter().map(|o| (o.path.as_str(), o))).collect();
    let mut paths = Vec::new();
    walk(&root, &mut paths)?;
    paths.sort();
    let mut archive = tar::Builder::new(Vec::new());
    let mut inodes: BTreeMap<u64, PathBuf> = BTreeMap::new();
    for path in paths {
        let name = path.strip_prefix(&root).expect("found below it");
        let special = overrides.remove(format!("/{}", name.display()).as_str());
        add(&mut archive, &path, name, rootfs, special, &mut inodes)
            .map_err(|e| format!("{}: {e}", path.display()))?;
    }
    if let Some(path) = overrides.keys().next() {
        return Err(format!("images.json: there is no {path} to override"));
    }
    archive.into_inner().map_err(|e| e.to_string())
}

/// Everything below a directory, itself left out.
fn walk(directory: &Path, found: &mut Vec<PathBuf>) -> Result<(), String> {
    let entries =
        std::fs::read_dir(directory).map_err(|e| format!("{}: {e}", directory.display()))?;
    for entry in entries {
        let path = entry.map_err(|e| e.to_string())?.path();
        if path.symlink_metadata().is_ok_and(|meta| meta.is_dir()) {
            walk(&path, found)?;
        }
        found.push(path);
    }
    Ok(())
}

fn add(
    archive: &mut tar::Builder<Vec<u8>>,
    path: &Path,
    name: &Path,
    rootfs: &Rootfs,
    special: Option<&Override>,
    inodes: &mut BTreeMap<u64, PathBuf>,
) -> std::io::Result<()> {
    let meta = path.symlink_metadata()?;
    if let Some(special) = special {
        for (key, value) in &special.xattrs {
            let value = unhex(value)
                .ok_or_else(|| std::io::Error::other(format!("{value:?} is not hexadecimal")))?;
            archive
                .append_pax_extensions([(format!("SCHILY.xattr.{key}").as_str(), &value[..])])?;
        }
    }
    let mut header = tar::Header::new_ustar();
    header.set_mode(meta.permissions().mode() & 0o7777);
    header.set_uid(special.and_then(|s| s.uid).unwrap_or(rootfs.uid));
    header.set_gid(special.and_then(|s| s.gid).unwrap_or(rootfs.gid));
    header.set_mtime(rootfs.mtime);
    header.set_size(0);
    if meta.is_dir() {
        header.set_entry_type(tar::EntryType::Directory);
        return archive.append_data(&mut header, name.join(""), std::io::empty());
    }
    if meta.is_symlink() {
        header.set_entry_type(tar::EntryType::Symlink);
        return archive.append_link(&mut header, name, std::fs::read_link(path)?);
    }
    if let Some(first) = inodes.get(&meta.ino()) {
        header.set_entry_type(tar::EntryType::Link);
        return archive.append_link(&mut header, name, first);
    }
    inodes.insert(meta.ino(), name.to_path_buf());
    header.set_entry_type(tar::EntryType::Regular);
    header.set_size(meta.len());
    archive.append_data(&mut header, name, File::open(path)?)
}

fn unhex(text: &str) -> Option<Vec<u8>> {
    let digits: Option<Vec<u32>> = text.chars().map(|c| c.to_digit(16)).collect();
    (digits?.chunks(2))
        .map(|pair| match pair {
            [high, low] => u8::try_from(high << 4 | low).ok(),
            _ => None,
        })
        .collect()
}

/// Writes an image of one layer as OCI layout, for each of its platforms; returns its digest.
fn write(
    layout: &Path,
    image: &Image,
    history: &[Value],
    diff_id: &str,
    compressed: &[u8],
) -> Result<String, String> {
    let blobs = layout.join("blobs/sha256");
    std::fs::create_dir_all(&blobs).map_err(|e| e.to_string())?;
    let put = |bytes: &[u8], media_type: &str| -> Result<Value, String> {
        let digest = sha256(bytes);
        std::fs::write(blobs.join(&digest[7..]), bytes).map_err(|e| e.to_string())?;
        Ok(json!({ "mediaType": media_type, "digest": digest, "size": bytes.len() }))
    };
    let layer = put(compressed, "application/vnd.oci.image.layer.v1.tar+gzip")?;
    let mut descriptors = Vec::new();
    for platform in &image.platforms {
        let (os, architecture) = platform
            .split_once('/')
            .ok_or_else(|| format!("{}: platform {platform:?}", image.name))?;
        let config = json!({
            "created": "2014-05-13T16:53:20Z",
            "architecture": architecture,
            "os": os,
            "config": image.config,
            "rootfs": { "type": "layers", "diff_ids": [diff_id] },
            "history": history,
        });
        let config = put(
            config.to_string().as_bytes(),
            "application/vnd.oci.image.config.v1+json",
        )?;
        let media_type = "application/vnd.oci.image.manifest.v1+json";
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": media_type,
            "config": config,
            "layers": [layer],
        });
        let mut descriptor = put(manifest.to_string().as_bytes(), media_type)?;
        descriptor["platform"] = json!({ "os": os, "architecture": architecture });
        descriptors.push(descriptor);
    }
    let top = if let [only] = descriptors.as_slice() {
        only.clone()
    } else {
        let media_type = "application/vnd.oci.image.index.v1+json";
        let index =
            json!({ "schemaVersion": 2, "mediaType": media_type, "manifests": descriptors });
        put(index.to_string().as_bytes(), media_type)?
    };
    let digest = top["digest"].as_str().expect("made above").to_owned();
    let index = json!({ "schemaVersion": 2, "manifests": [top] });
    std::fs::write(layout.join("index.json"), index.to_string()).map_err(|e| e.to_string())?;
    std::fs::write(
        layout.join("oci-layout"),
        r#"{"imageLayoutVersion":"1.0.0"}"#,
    )
    .map_err(|e| e.to_string())?;
    Ok(digest)
}
