//! The cache as bytes: what a registry, a layout or an image's config has of it.
//!
//! ```text
//! manifest   an OCI image manifest; its layers are all blobs that the config names, so that
//!            a registry keeps them: layers of images, shared with those, and chunks
//! config     of a type of our own:
//!            {"version": 1, "records": […], "results": […], "mounts": […], "contents": {…}}
//! ```
//!
//! `results` are records of steps whose layers are not there.
//!
//! `contents` has what the steps read, file by file ([`ContentManifest`]), by its digest: zstd
//! in base64. It is there for people alone, who are told what differs; what is large is left
//! out.
//!
//! In an image (`type=inline`) the records of its own layers stand in its config, under a key
//! of our own: layers by their place, without what the image says already. Of the other steps
//! of the build, such as those of earlier stages, it says by digests alone which layers they
//! made: their commands and arguments are nobody's business who has the image.
//!
//! Whoever wrote it may be hostile. Documents have size limits, what a record names must be
//! in the manifest, and what does not fit is left out and counted.

use std::collections::{BTreeMap, HashMap};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use time::format_description::well_known::Rfc3339;

use super::super::content::ContentManifest;
use super::records::{Definition, Inputs, Record};
use crate::image::{
    Descriptor, DiffId, Digest, ImageConfig, ImageLayer, MANIFEST_LIMIT_BYTES, Manifest, MediaType,
    RawManifest,
};

/// What the config of a cache is.
pub(super) const CONFIG_TYPE: MediaType = MediaType::SOCKLESS_CACHE_CONFIG;

/// What a chunk of a cache mount is: one zstd frame.
pub(super) const CHUNK_TYPE: MediaType = MediaType::SOCKLESS_CACHE_CHUNK;

/// Where an image's config has the records of its layers.
pub(crate) const INLINE_KEY: &str = "sockless.cache.v1";

/// The largest config of a cache, in bytes. A record has a few KiB, most of it the
/// environment of a RUN step.
pub(super) const CONFIG_LIMIT_BYTES: u64 = 32 << 20;

/// The version of both forms. Another one is not read.
const VERSION: u32 = 1;

/// When a layer was made of which an image does not say it.
const NO_TIME: &str = "1970-01-01T00:00:00Z";

/// The longest name of a cache mount, in bytes.
const NAME_LIMIT_BYTES: usize = 4096;

/// The largest chunk, in bytes, before it is compressed.
pub(super) const CHUNK_LIMIT_BYTES: u64 = 4 << 20;

/// The largest blob of a chunk, in bytes: what cannot be compressed grows by less.
const BLOB_LIMIT_BYTES: u64 = CHUNK_LIMIT_BYTES + (64 << 10);

/// How hard texts of what steps read are compressed.
const CONTENT_ZSTD_LEVEL: i32 = 9;

/// The largest text of what a step read, in bytes: some thousand files.
pub(super) const CONTENT_LIMIT_BYTES: u64 = 512 << 10;

/// How large all texts of what steps read may become together, in bytes of base64: every
/// build that uses the cache downloads them.
const CONTENTS_LIMIT_BYTES: usize = 1 << 20;

/// What steps read, by digest, as it is in a document.
pub(super) type Contents = BTreeMap<Digest, String>;

/// The largest contents of one cache mount, in bytes: those of the largest layers.
pub(super) const MOUNT_LIMIT_BYTES: u64 = 64 << 30;

/// A piece of a cache mount's contents, as a blob.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Chunk {
    /// The digest of its bytes.
    pub(super) digest: Digest,
    /// The number of its bytes.
    pub(super) bytes: u64,
    /// The digest of the blob, which is compressed.
    pub(super) blob: Digest,
    /// The size of the blob.
    pub(super) size: u64,
}

/// A cache mount.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct MountContents {
    /// What names its directory.
    pub(super) name: String,
    /// One line a file, in path order: [`super::contents`].
    pub(super) entries: Vec<Chunk>,
    /// The bytes of all regular files, in the same order.
    pub(super) content: Vec<Chunk>,
}

/// What a document says and what fits.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Parsed {
    pub(super) records: Vec<Record>,
    /// Steps whose layers are not there.
    pub(super) results: Vec<KnownResult>,
    pub(super) mounts: Vec<MountContents>,
    /// What steps read; not looked at before it is wanted.
    pub(super) contents: Contents,
    /// How many records and cache mounts do not fit.
    pub(super) ignored: usize,
}

#[derive(Deserialize)]
struct Raw {
    version: u32,
    #[serde(default)]
    records: Vec<Value>,
    #[serde(default)]
    results: Vec<Value>,
    #[serde(default)]
    mounts: Vec<Value>,
    #[serde(default)]
    contents: Map<String, Value>,
}

/// A record of a step whose layer is not there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct KnownResult {
    /// The digest of the step's definition.
    pub(super) definition: Digest,
    /// The record; its definition may be this digest.
    pub(super) record: Record,
}

/// What an image says of a step whose layer it does not have. When that was made it does not
/// say: the same layer made later is to give the same image.
#[derive(Serialize, Deserialize)]
struct InlineResult {
    definition: Digest,
    inputs: Inputs,
    diff_id: DiffId,
    #[serde(rename = "mediaType")]
    media_type: MediaType,
    digest: Digest,
    size: u64,
}

/// A record of a layer that is in the image.
#[derive(Serialize, Deserialize)]
struct InlineRecord {
    /// Its place among the layers.
    layer: usize,
    created: String,
    definition: Value,
    inputs: Inputs,
}

impl Chunk {
    /// The blob.
    pub(super) fn descriptor(&self) -> Descriptor {
        Descriptor::new(CHUNK_TYPE, self.blob.clone(), self.size)
    }
}

impl MountContents {
    /// All its chunks.
    pub(super) fn chunks(&self) -> impl Iterator<Item = &Chunk> {
        self.entries.iter().chain(&self.content)
    }
}

/// The config of a cache.
pub(super) fn config(
    records: &[&Record],
    results: &[&Record],
    mounts: &[MountContents],
    contents: &Contents,
) -> Vec<u8> {
    let document = json!({
        "version": VERSION,
        "records": records,
        "results": results,
        "mounts": mounts,
        "contents": contents,
    });
    document.to_string().into_bytes()
}

/// As much of what steps read as has its place in a document. `text` gives the text of each,
/// where it is known.
pub(super) fn contents<'d>(
    digests: impl IntoIterator<Item = &'d Digest>,
    text: impl Fn(&Digest) -> Option<Vec<u8>>,
) -> Contents {
    let mut contents = Contents::new();
    let mut rest = CONTENTS_LIMIT_BYTES;
    for digest in digests {
        if contents.contains_key(digest) {
            continue;
        }
        let packed = text(digest)
            .filter(|text| text.len() as u64 <= CONTENT_LIMIT_BYTES)
            .and_then(|text| zstd::bulk::compress(&text, CONTENT_ZSTD_LEVEL).ok())
            .map(|bytes| BASE64.encode(bytes));
        if let Some(packed) = packed.filter(|packed| packed.len() <= rest) {
            rest -= packed.len();
            contents.insert(digest.clone(), packed);
        }
    }
    contents
}

/// What a step read, from a document that says that it is what `digest` names; absent where
/// it is not.
pub(super) fn open_content(digest: &Digest, packed: &str) -> Option<ContentManifest> {
    let bytes = BASE64.decode(packed).ok()?;
    let text = zstd::bulk::decompress(&bytes, CONTENT_LIMIT_BYTES as usize).ok()?;
    let content = ContentManifest::parse(&text)?;
    (content.digest() == *digest).then_some(content)
}

/// The manifest of a cache; absent where it would be larger than registries take.
pub(super) fn manifest(config: &[u8], blobs: Vec<Descriptor>) -> Option<RawManifest> {
    let manifest = Manifest {
        schema_version: 2,
        media_type: Some(MediaType::MANIFEST),
        config: Descriptor::of(CONFIG_TYPE, config),
        layers: blobs,
        annotations: std::collections::BTreeMap::new(),
    };
    let bytes = serde_json::to_vec(&manifest).expect("a manifest has only string keys");
    (bytes.len() as u64 <= MANIFEST_LIMIT_BYTES)
        .then(|| RawManifest::new(MediaType::MANIFEST, bytes))
}

/// Reads the config of a cache.
///
/// # Errors
/// What is wrong, for people.
pub(super) fn parse(manifest: &Manifest, bytes: &[u8]) -> Result<Parsed, String> {
    let raw: Raw = serde_json::from_slice(bytes).map_err(|e| format!("it is not valid: {e}"))?;
    check_version(raw.version)?;
    let blobs: HashMap<&Digest, u64> = manifest
        .layers
        .iter()
        .map(|blob| (&blob.digest, blob.size))
        .collect();
    let has = |digest: &Digest, size: u64| blobs.get(digest) == Some(&size);
    let mut parsed = Parsed::default();
    for (digest, packed) in raw.contents {
        match (Digest::parse(&digest), packed) {
            (Ok(digest), Value::String(packed)) => {
                parsed.contents.insert(digest, packed);
            }
            _ => parsed.ignored += 1,
        }
    }
    for value in raw.records {
        let record = serde_json::from_value(value).ok().and_then(checked);
        match record.filter(|r| has(&r.descriptor.digest, r.descriptor.size)) {
            Some(record) => parsed.records.push(record),
            None => parsed.ignored += 1,
        }
    }
    for value in raw.results {
        let record = serde_json::from_value(value).ok().and_then(checked);
        match record {
            Some(record) => parsed.results.push(KnownResult {
                definition: Definition::of_record(&record.definition).digest().clone(),
                record,
            }),
            None => parsed.ignored += 1,
        }
    }
    for value in raw.mounts {
        let fits = |mount: &MountContents| {
            let bytes = mount.chunks().try_fold(0_u64, |sum, chunk| {
                let is_possible = (1..=CHUNK_LIMIT_BYTES).contains(&chunk.bytes)
                    && chunk.size <= BLOB_LIMIT_BYTES
                    && has(&chunk.blob, chunk.size);
                is_possible.then(|| sum.saturating_add(chunk.bytes))
            });
            mount.name.len() <= NAME_LIMIT_BYTES && bytes.is_some_and(|b| b <= MOUNT_LIMIT_BYTES)
        };
        match serde_json::from_value(value).ok().filter(fits) {
            Some(mount) => parsed.mounts.push(mount),
            None => parsed.ignored += 1,
        }
    }
    Ok(parsed)
}

fn check_version(version: u32) -> Result<(), String> {
    if version == VERSION {
        return Ok(());
    }
    Err(format!(
        "it has version {version}, this sockless reads {VERSION}"
    ))
}

/// The record, if it can become part of an image: its layer is one, and its time is one.
fn checked(record: Record) -> Option<Record> {
    let Descriptor {
        media_type,
        digest,
        size,
        ..
    } = record.descriptor;
    time::OffsetDateTime::parse(&record.created, &Rfc3339).ok()?;
    Some(Record {
        // Nothing beside these three gets into a manifest.
        descriptor: Descriptor::new(media_type.oci_layer()?, digest, size),
        ..record
    })
}

/// What an image's config says of the records of its layers, each with its layer's place, and
/// of the other steps of its build.
///
/// The same build gives the same value, whether its steps ran or not: names of steps are
/// left out, because those of a record are as they were when it was made.
pub(super) fn inline<'r>(
    records: impl IntoIterator<Item = (usize, &'r Record)>,
    results: impl IntoIterator<Item = &'r Record>,
) -> Value {
    let mut once: Vec<Value> = Vec::new();
    for record in results {
        let descriptor = &record.descriptor;
        let result = json!(InlineResult {
            definition: Definition::of_record(&record.definition).digest().clone(),
            inputs: record.inputs.clone(),
            diff_id: record.diff_id.clone(),
            media_type: descriptor.media_type.clone(),
            digest: descriptor.digest.clone(),
            size: descriptor.size,
        });
        if !once.contains(&result) {
            once.push(result);
        }
    }
    let records = records.into_iter().map(|(layer, record)| InlineRecord {
        layer,
        created: record.created.clone(),
        definition: record.definition.clone(),
        inputs: record.inputs.clone(),
    });
    let mut value = json!({ "version": VERSION, "records": records.collect::<Vec<_>>() });
    if !once.is_empty() {
        value["results"] = Value::Array(once);
    }
    value
}

/// Reads what an image says of its layers; absent where it says nothing.
///
/// # Errors
/// What is wrong, for people.
pub(super) fn parse_inline(
    manifest: &Manifest,
    config: &ImageConfig,
) -> Result<Option<Parsed>, String> {
    let Some(value) = config.other.get(INLINE_KEY) else {
        return Ok(None);
    };
    let raw: Raw = Raw::deserialize(value).map_err(|e| format!("it is not valid: {e}"))?;
    check_version(raw.version)?;
    let diff_ids = config.rootfs.diff_ids.iter();
    let layers: Vec<ImageLayer> = diff_ids
        .zip(&manifest.layers)
        .map(|(diff_id, descriptor)| ImageLayer {
            diff_id: diff_id.clone(),
            descriptor: descriptor.clone(),
        })
        .collect();
    let mut parsed = Parsed::default();
    for value in raw.records {
        let record = serde_json::from_value::<InlineRecord>(value).ok();
        let record = record.and_then(|inline| {
            let layer = layers.get(inline.layer)?.clone();
            checked(Record {
                diff_id: layer.diff_id,
                descriptor: layer.descriptor,
                created: inline.created,
                name: String::new(),
                definition: inline.definition,
                inputs: inline.inputs,
                below: None,
            })
        });
        match record {
            Some(record) => parsed.records.push(record),
            None => parsed.ignored += 1,
        }
    }
    for value in raw.results {
        let result = serde_json::from_value::<InlineResult>(value).ok();
        let result = result.and_then(|result| {
            let record = checked(Record {
                diff_id: result.diff_id,
                descriptor: Descriptor::new(result.media_type, result.digest, result.size),
                created: NO_TIME.to_owned(),
                name: String::new(),
                definition: json!(result.definition),
                inputs: result.inputs,
                below: None,
            })?;
            Some(KnownResult {
                definition: result.definition,
                record,
            })
        });
        match result {
            Some(result) => parsed.results.push(result),
            None => parsed.ignored += 1,
        }
    }
    Ok(Some(parsed))
}

#[cfg(test)]
mod tests {
    use super::super::super::content::Source;
    use super::*;
    use crate::image::Platform;

    fn record(name: &str) -> Record {
        Record::new(
            &Definition::new("run", &[name]),
            Inputs {
                parent: Some(Digest::of(b"parent")),
                source: Some(Digest::of(b"source")),
                content: Some(Digest::of(b"content")),
            },
            format!("RUN {name}"),
            "2026-01-01T00:00:00Z".to_owned(),
            DiffId::from_uncompressed(Digest::of(name.as_bytes())),
            Descriptor::new(MediaType::LAYER_GZIP, Digest::of(name.as_bytes()), 7),
        )
    }

    fn mount() -> MountContents {
        let chunk = |text: &str| Chunk {
            digest: Digest::of(text.as_bytes()),
            bytes: 9,
            blob: Digest::of(format!("blob {text}").as_bytes()),
            size: 5,
        };
        MountContents {
            name: "/cache".to_owned(),
            entries: vec![chunk("entries")],
            content: vec![chunk("one"), chunk("two")],
        }
    }

    fn manifest_of(config: &[u8], records: &[Record], mounts: &[MountContents]) -> Manifest {
        let layers = records.iter().map(|r| r.descriptor.clone());
        let chunks = mounts
            .iter()
            .flat_map(|m| m.chunks().map(Chunk::descriptor));
        let raw = manifest(config, layers.chain(chunks).collect()).unwrap();
        match raw.parse().unwrap() {
            crate::image::ManifestOrIndex::Manifest(manifest) => manifest,
            crate::image::ManifestOrIndex::Index(_) => unreachable!("it was made as a manifest"),
        }
    }

    #[test]
    fn what_is_written_is_read() {
        let (records, mounts) = ([record("a"), record("b")], [mount()]);
        let mut read = ContentManifest::default();
        read.sources.push(Source::default());
        let known = |digest: &Digest| (*digest == read.digest()).then(|| read.to_text());
        let contents = contents([&read.digest(), &Digest::of(b"forgotten")], known);
        let result = record("c");
        let all = records.iter().collect::<Vec<_>>();
        let bytes = config(&all, &[&result], &mounts, &contents);
        let manifest = manifest_of(&bytes, &records, &mounts);
        assert_eq!(manifest.config.media_type, CONFIG_TYPE);
        let parsed = parse(&manifest, &bytes).unwrap();
        let expected = Parsed {
            records: records.into(),
            // The manifest does not have its layer.
            results: vec![KnownResult {
                definition: Definition::new("run", &["c"]).digest().clone(),
                record: result,
            }],
            mounts: mounts.into(),
            contents,
            ignored: 0,
        };
        assert_eq!(parsed, expected);
        let packed: Vec<_> = parsed.contents.iter().collect();
        let [(digest, packed)] = packed[..] else {
            panic!("{packed:?}");
        };
        assert_eq!(open_content(digest, packed), Some(read));
        for (digest, packed) in [
            (&Digest::of(b"other"), packed.as_str()),
            (digest, ""),
            (digest, "?"),
            (digest, "AAAA"),
        ] {
            assert_eq!(open_content(digest, packed), None, "{digest} {packed}");
        }
    }

    #[test]
    fn large_lists_of_what_was_read_are_left_out() {
        // What cannot be compressed, in base64.
        let text = |digest: &Digest| {
            let seeds = (0_u32..6000).map(|at| Digest::of(format!("{digest} {at}").as_bytes()));
            Some(
                seeds
                    .flat_map(|seed| seed.hex().as_bytes().to_vec())
                    .collect(),
            )
        };
        let digests: Vec<Digest> = (0..9_u8).map(|at| Digest::of(&[at])).collect();
        let some = contents(&digests, text);
        let bytes: usize = some.values().map(String::len).sum();
        assert!((1..9).contains(&some.len()), "{}", some.len());
        assert!(bytes <= CONTENTS_LIMIT_BYTES, "{bytes}");
        let large = |_: &Digest| Some(vec![b'a'; CONTENT_LIMIT_BYTES as usize + 1]);
        assert_eq!(contents(&digests, large), Contents::new());
        // One that becomes large when it is unpacked.
        let bomb = zstd::bulk::compress(&vec![b'a'; 64 << 20], 1).unwrap();
        assert_eq!(open_content(&digests[0], &BASE64.encode(bomb)), None);
    }

    #[test]
    fn what_does_not_fit_is_left_out_and_counted() {
        let good = [record("good")];
        let mounts = [mount()];
        let whole = manifest_of(b"", &good, &mounts);
        let bad_record = |edit: &dyn Fn(&mut Value)| {
            let mut value = json!(record("good"));
            edit(&mut value);
            let document = json!({ "version": 1, "records": [value, record("good")] });
            let parsed = parse(&whole, document.to_string().as_bytes()).unwrap();
            assert_eq!((parsed.records.len(), parsed.ignored), (1, 1), "{document}");
        };
        bad_record(&|v| v["created"] = json!("yesterday\u{1b}[2J"));
        bad_record(&|v| v["diff_id"] = json!("sha256:../../etc"));
        bad_record(&|v| v["descriptor"]["size"] = json!(8));
        bad_record(&|v| v["descriptor"]["digest"] = json!(Digest::of(b"elsewhere")));
        bad_record(&|v| v["descriptor"]["mediaType"] = json!("text/html"));
        bad_record(&|v| v["inputs"] = json!(3));
        bad_record(&|v| *v = json!(null));
        let mut spoilt = json!(record("good"));
        spoilt["descriptor"]["annotations"] = json!({"a": "b"});
        let document = json!({ "version": 1, "records": [spoilt] });
        let parsed = parse(&whole, document.to_string().as_bytes()).unwrap();
        assert_eq!(parsed.records, good);

        let document = json!({
            "version": 1,
            "contents": { "sha256:../../etc": "AAAA", Digest::of(b"").as_str(): 3 },
            "results": [record("good"), { "diff_id": 3 }, null],
        });
        let parsed = parse(&whole, document.to_string().as_bytes()).unwrap();
        assert_eq!((parsed.contents.len(), parsed.ignored), (0, 4));
        assert_eq!(parsed.results.len(), 1);

        let bad_mount = |edit: &dyn Fn(&mut Value)| {
            let mut value = json!(mount());
            edit(&mut value);
            let document = json!({ "version": 1, "mounts": [value] });
            let parsed = parse(&whole, document.to_string().as_bytes()).unwrap();
            assert_eq!((parsed.mounts.len(), parsed.ignored), (0, 1), "{document}");
        };
        bad_mount(&|v| v["name"] = json!("n".repeat(NAME_LIMIT_BYTES + 1)));
        bad_mount(&|v| v["content"][0]["bytes"] = json!(CHUNK_LIMIT_BYTES + 1));
        bad_mount(&|v| v["content"][0]["bytes"] = json!(0));
        bad_mount(&|v| v["content"][0]["size"] = json!(6));
        let mut large = mount();
        large.content[0].bytes = CHUNK_LIMIT_BYTES;
        large.content =
            vec![large.content[0].clone(); 1 + (MOUNT_LIMIT_BYTES / CHUNK_LIMIT_BYTES) as usize];
        bad_mount(&|v| *v = json!(large));

        for (text, want) in [
            ("{", "it is not valid: EOF"),
            ("[]", "it is not valid: invalid length 0"),
            (
                r#"{"version":2}"#,
                "it has version 2, this sockless reads 1",
            ),
        ] {
            let error = parse(&whole, text.as_bytes()).unwrap_err();
            assert!(error.starts_with(want), "{error}");
        }
    }

    #[test]
    fn too_many_blobs_make_no_manifest() {
        let blob = Descriptor::new(CHUNK_TYPE, Digest::of(b""), 1);
        assert!(manifest(b"", vec![blob.clone(); 10_000]).is_some());
        assert!(manifest(b"", vec![blob; 40_000]).is_none());
    }

    #[test]
    fn an_image_has_records_of_its_own_layers_alone() {
        let made = record("a");
        let mut config = ImageConfig::scratch(Platform::parse("linux/amd64").unwrap());
        let layer = Descriptor::new(MediaType::LAYER_GZIP, Digest::of(b"a"), 7);
        let manifest = Manifest {
            layers: vec![record("base").descriptor, layer],
            ..manifest_of(b"", &[], &[])
        };
        config.rootfs.diff_ids = vec![record("base").diff_id, made.diff_id.clone()];
        assert_eq!(parse_inline(&manifest, &config), Ok(None));
        let others = [record("b"), record("b")];
        let value = inline([(1, &made)], &others);
        assert_eq!(value["records"][0]["inputs"].as_object().unwrap().len(), 3);
        let results = value["results"].to_string();
        assert!(!results.contains("run"), "{results}");
        config.other.insert(INLINE_KEY.to_owned(), value);
        let parsed = parse_inline(&manifest, &config).unwrap().unwrap();
        let expected = Record {
            name: String::new(),
            below: None,
            ..made.clone()
        };
        assert_eq!((parsed.records, parsed.ignored), (vec![expected], 0));
        let definition = Definition::new("run", &["b"]).digest().clone();
        let expected = KnownResult {
            record: Record {
                name: String::new(),
                created: NO_TIME.to_owned(),
                definition: json!(definition),
                below: None,
                ..record("b")
            },
            definition,
        };
        let definition = Definition::new("run", &["b"]);
        let key = Inputs {
            content: None,
            ..record("b").inputs
        };
        assert!(expected.record.is_of(&definition, &key));
        assert!(!expected.record.is_of(&Definition::new("run", &["a"]), &key));
        assert_eq!(parsed.results, [expected]);
        for edit in [
            ("definition", json!("sha256:../../etc")),
            ("mediaType", json!("text/html")),
            ("size", json!(-1)),
            ("inputs", json!(3)),
        ] {
            let mut value = inline([], &others);
            value["results"][0][edit.0] = edit.1;
            config.other.insert(INLINE_KEY.to_owned(), value);
            let parsed = parse_inline(&manifest, &config).unwrap().unwrap();
            assert_eq!((parsed.results.len(), parsed.ignored), (0, 1), "{}", edit.0);
        }

        config
            .other
            .insert(INLINE_KEY.to_owned(), inline([(2, &made)], []));
        let parsed = parse_inline(&manifest, &config).unwrap().unwrap();
        assert_eq!((parsed.records.len(), parsed.ignored), (0, 1));
        config.other.insert(INLINE_KEY.to_owned(), json!("garbage"));
        assert!(parse_inline(&manifest, &config).is_err());
    }
}
