//! Step records: what they say, and those of this machine.
//!
//! A record says which layer a step made. It is found by the step's *definition* and
//! by its *inputs*: the layers below it, and what it reads beside them. A COPY from
//! another stage is stored under two keys, one with the stage's layers and one with the
//! content that was read, so that it is found without reading when nothing changed, and by
//! content when the stage ran again and made the same files.
//!
//! ```text
//! cache/steps/<sha256 of the definition>/<sha256 of the key>.json
//! ```

use std::path::PathBuf;
use std::time::SystemTime;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::build::explain::Below;
use crate::image::{Descriptor, DiffId, Digest, chain_id};
use crate::store::{Store, StoreError};

/// Part of every definition. Counts up when the same definition comes to mean other layers:
/// a change of sandbox rules, of the copy rules, of the archive writer.
const ENGINE_VERSION: u32 = 6;

/// What a step is, in words, independent of what it is applied to.
#[derive(Clone, Debug)]
pub(in crate::build) struct Definition {
    value: Value,
    digest: Digest,
}

/// What a step is applied to. As a key, with one of `source` and `content` at most.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(in crate::build) struct Inputs {
    /// The layers below, as a chain ID; absent for an empty filesystem.
    pub(in crate::build) parent: Option<Digest>,
    /// The layers of the filesystem that is read, where it is not the parent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(in crate::build) source: Option<Digest>,
    /// The digest of names, modes and contents that are read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(in crate::build) content: Option<Digest>,
}

/// What a step made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::build) struct Record {
    /// The layer's uncompressed digest.
    pub(in crate::build) diff_id: DiffId,
    /// The layer's blob.
    pub(in crate::build) descriptor: Descriptor,
    /// When it was made; RFC 3339. Goes into history.
    pub(in crate::build) created: String,
    /// The step's name when it was made, for people.
    pub(in crate::build) name: String,
    /// The definition in words, or, in records from an image's config, its digest.
    pub(in crate::build) definition: Value,
    /// The inputs in words: all that is known of them, of which each key has a part.
    pub(in crate::build) inputs: Inputs,
    /// The layers below in words, base first; for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(in crate::build) below: Option<Vec<Below>>,
}

impl Definition {
    /// A definition of the `kind` of step, such as `run`, with what distinguishes it.
    pub(in crate::build) fn new(kind: &str, what: &impl Serialize) -> Self {
        let what = serde_json::to_value(what).expect("definitions have only string keys");
        let value = serde_json::json!({ "engine": ENGINE_VERSION, kind: what });
        Self {
            digest: Digest::of(value.to_string().as_bytes()),
            value,
        }
    }

    /// The definition that a record has in words.
    pub(in crate::build) fn of_record(value: &Value) -> Self {
        Self {
            digest: Digest::of(value.to_string().as_bytes()),
            value: value.clone(),
        }
    }

    /// What names it.
    pub(in crate::build) fn digest(&self) -> &Digest {
        &self.digest
    }

    /// It in words.
    pub(in crate::build) fn value(&self) -> &Value {
        &self.value
    }
}

impl Inputs {
    /// What names it, where it is a key.
    pub(in crate::build) fn digest(&self) -> Digest {
        Digest::of(&serde_json::to_vec(self).expect("inputs have only string keys"))
    }

    /// The keys under which a step with these inputs may be found, the one that needs nothing
    /// to be read first.
    pub(in crate::build) fn keys(&self) -> Vec<Self> {
        let key = |source: &Option<Digest>, content: &Option<Digest>| Self {
            parent: self.parent.clone(),
            source: source.clone(),
            content: content.clone(),
        };
        let mut keys = Vec::new();
        if self.source.is_some() {
            keys.push(key(&self.source, &None));
        }
        if self.content.is_some() || keys.is_empty() {
            keys.push(key(&None, &self.content));
        }
        keys
    }

    /// Whether a step with these inputs is found under `key`.
    fn answers(&self, key: &Self) -> bool {
        let fits =
            |wanted: &Option<Digest>, has: &Option<Digest>| wanted.is_none() || wanted == has;
        self.parent == key.parent
            && fits(&key.source, &self.source)
            && fits(&key.content, &self.content)
            // A key of nothing is that of a step that reads nothing.
            && (key.source.is_some() || key.content.is_some() || *self == *key)
    }
}

fn directory(store: &Store, definition: &Definition) -> PathBuf {
    store.steps_path().join(definition.digest.hex())
}

fn path(store: &Store, definition: &Definition, key: &Inputs) -> PathBuf {
    directory(store, definition).join(format!("{}.json", key.digest().hex()))
}

/// Whether a step with this definition was ever recorded, with whatever inputs.
pub(in crate::build) fn has_definition(store: &Store, definition: &Definition) -> bool {
    directory(store, definition).is_dir()
}

/// Whether a step with this definition was recorded on layers that may be those of `below`, base
/// first, where not all of these are known yet.
///
/// A key names the layers below by one digest, for which all have to be known. But a record says
/// them one by one, and where one that is known is another, no key can be that record's.
pub(in crate::build) fn may_have(
    store: &Store,
    definition: &Definition,
    below: &[Option<DiffId>],
) -> bool {
    let entries = std::fs::read_dir(directory(store, definition));
    let mut entries = entries.into_iter().flatten().flatten();
    entries.any(|entry| {
        let record = std::fs::read(entry.path()).ok();
        let record = record.and_then(|bytes| serde_json::from_slice::<Record>(&bytes).ok());
        // What cannot be read is no record for a look-up either.
        record.is_some_and(|record| record.may_be_on(below))
    })
}

/// The record of the step under this key, if its layer is still here.
///
/// A record that cannot be read is a miss: a cache failure never fails a build.
pub(in crate::build) fn look_up(
    store: &Store,
    definition: &Definition,
    key: &Inputs,
) -> Option<Record> {
    let path = path(store, definition, key);
    let bytes = std::fs::read(&path).ok()?;
    let record: Record = match serde_json::from_slice(&bytes) {
        Ok(record) => record,
        Err(error) => {
            tracing::warn!(path = %path.display(), %error, "unreadable cache record");
            return None;
        }
    };
    if !record.is_of(definition, key) || !store.has_blob_of(&record.descriptor) {
        return None;
    }
    store.touch(&path);
    Some(record)
}

/// All records, each once, with when it was used last. What cannot be read is left out.
pub(in crate::build) fn all(store: &Store) -> Vec<(Record, SystemTime)> {
    let entries = |dir: PathBuf| {
        let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
        entries.map(|entry| entry.path())
    };
    let mut records: Vec<(Record, SystemTime)> = Vec::new();
    for definition in entries(store.steps_path()) {
        let begin = records.len();
        for path in entries(definition) {
            let used = std::fs::metadata(&path).and_then(|found| found.accessed());
            let record = std::fs::read(&path).ok();
            let record = record.and_then(|bytes| serde_json::from_slice::<Record>(&bytes).ok());
            // It stands there under each of its keys.
            if let (Ok(used), Some(record)) = (used, record)
                && !records[begin..].iter().any(|(known, _)| *known == record)
            {
                records.push((record, used));
            }
        }
    }
    records
}

/// Records what the step made, under each of its keys.
///
/// # Errors
/// [`StoreError`]; the caller says it and goes on.
pub(in crate::build) fn record(
    store: &Store,
    definition: &Definition,
    record: &Record,
) -> Result<(), StoreError> {
    let bytes = serde_json::to_vec_pretty(record).expect("records have only string keys");
    let mut keys = record.inputs.keys().into_iter();
    keys.try_for_each(|key| store.write_file(&path(store, definition, &key), &bytes))
}

impl Record {
    /// A record of `definition`.
    pub(in crate::build) fn new(
        definition: &Definition,
        inputs: Inputs,
        name: String,
        created: String,
        diff_id: DiffId,
        descriptor: Descriptor,
    ) -> Self {
        Self {
            diff_id,
            descriptor,
            created,
            name,
            definition: definition.value.clone(),
            inputs,
            below: None,
        }
    }

    /// The same with what it was made on.
    pub(in crate::build) fn on(self, below: Vec<Below>) -> Self {
        Self {
            below: Some(below),
            ..self
        }
    }

    /// Whether the layers below may be these, base first, of which not all need be known.
    fn may_be_on(&self, layers: &[Option<DiffId>]) -> bool {
        let Some(below) = &self.below else {
            return true;
        };
        let diff_ids: Vec<DiffId> = below.iter().map(|layer| layer.diff_id.clone()).collect();
        // They are for people: only where the key says the same do they decide anything.
        if chain_id(&diff_ids) != self.inputs.parent {
            return true;
        }
        let mut pairs = diff_ids.iter().zip(layers);
        diff_ids.len() == layers.len()
            && pairs.all(|(has, known)| known.as_ref().is_none_or(|known| known == has))
    }

    /// Whether it is of this step, and found under `key`.
    pub(in crate::build) fn is_of(&self, definition: &Definition, key: &Inputs) -> bool {
        let is_same = match &self.definition {
            Value::String(digest) => digest == definition.digest.as_str(),
            words => *words == definition.value,
        };
        is_same && self.inputs.answers(key)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::MediaType;

    #[test]
    fn a_record_is_found_by_definition_and_inputs_while_its_blob_is_there() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let blob = store.put_blob(b"layer").unwrap();
        let definition = Definition::new("run", &["make"]);
        let inputs = |parent: &[u8]| Inputs {
            parent: Some(Digest::of(parent)),
            source: None,
            content: None,
        };
        let made = Record::new(
            &definition,
            inputs(b"a"),
            "RUN make".into(),
            "2026-01-01T00:00:00Z".into(),
            DiffId::from_uncompressed(Digest::of(b"tar")),
            Descriptor::new(MediaType::LAYER_GZIP, blob.clone(), 5),
        );
        assert!(!has_definition(&store, &definition));
        record(&store, &definition, &made).unwrap();
        assert!(has_definition(&store, &definition));
        assert_eq!(look_up(&store, &definition, &inputs(b"a")), Some(made));
        assert_eq!(look_up(&store, &definition, &inputs(b"b")), None);
        assert_eq!(
            look_up(&store, &Definition::new("run", &["true"]), &inputs(b"a")),
            None
        );

        std::fs::write(path(&store, &definition, &inputs(b"c")), "{").unwrap();
        assert_eq!(look_up(&store, &definition, &inputs(b"c")), None);
        std::fs::remove_file(store.blob_path(&blob)).unwrap();
        assert_eq!(look_up(&store, &definition, &inputs(b"a")), None);
    }

    #[test]
    fn security_s18_a_step_that_reads_is_found_by_what_it_reads_from_and_by_what_it_reads() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let blob = store.put_blob(b"layer").unwrap();
        let definition = Definition::new("copy", &["a"]);
        let [stage, other, content] =
            [b"stage", b"other", b"files"].map(|text| Some(Digest::of(text)));
        let inputs = |source: &Option<Digest>, content: &Option<Digest>| Inputs {
            parent: None,
            source: source.clone(),
            content: content.clone(),
        };
        let all = inputs(&stage, &content);
        assert_eq!(all.keys(), [inputs(&stage, &None), inputs(&None, &content)]);
        let nothing = inputs(&None, &None);
        assert_eq!(nothing.keys(), std::slice::from_ref(&nothing));
        let made = Record::new(
            &definition,
            all,
            "COPY".into(),
            "2026-01-01T00:00:00Z".into(),
            DiffId::from_uncompressed(Digest::of(b"tar")),
            Descriptor::new(MediaType::LAYER_GZIP, blob, 5),
        );
        record(&store, &definition, &made).unwrap();
        let found = |key: &Inputs| look_up(&store, &definition, key);
        assert_eq!(found(&inputs(&stage, &None)).as_ref(), Some(&made));
        assert_eq!(found(&inputs(&None, &content)).as_ref(), Some(&made));
        assert_eq!(found(&inputs(&other, &None)), None);
        assert_eq!(found(&nothing), None);
        // A file under a name that is not its own proves nothing.
        let from = path(&store, &definition, &inputs(&stage, &None));
        for key in [inputs(&other, &None), nothing] {
            std::fs::copy(&from, path(&store, &definition, &key)).unwrap();
            assert_eq!(found(&key), None);
        }
    }

    #[test]
    fn a_layer_that_is_known_and_another_rules_a_record_out_before_all_are_known() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let definition = Definition::new("run", &["make"]);
        let layer = |text: &[u8]| DiffId::from_uncompressed(Digest::of(text));
        let below = |names: &[&[u8]]| -> Vec<Below> {
            let layers = names.iter().map(|name| Below {
                diff_id: layer(name),
                made_by: crate::build::explain::MadeBy::Step("RUN".into()),
            });
            layers.collect()
        };
        let record_on = |parent: Option<Digest>, below: Option<Vec<Below>>| {
            let inputs = Inputs {
                parent,
                source: None,
                content: None,
            };
            let descriptor = Descriptor::new(MediaType::LAYER_GZIP, Digest::of(b"blob"), 5);
            let made = Record::new(
                &definition,
                inputs,
                "RUN make".into(),
                "2026-01-01T00:00:00Z".into(),
                layer(b"made"),
                descriptor,
            );
            record(&store, &definition, &Record { below, ..made }).unwrap();
        };
        let may_have = |layers: &[Option<&[u8]>]| {
            let layers: Vec<_> = layers.iter().map(|name| name.map(layer)).collect();
            super::may_have(&store, &definition, &layers)
        };
        assert!(!may_have(&[None, None]), "there is none at all");
        let chain = chain_id(&[layer(b"base"), layer(b"huge")]);
        record_on(chain, Some(below(&[b"base", b"huge"])));
        let (base, huge, other) = (&b"base"[..], &b"huge"[..], &b"other"[..]);
        for (layers, expected) in [
            (&[Some(base), None][..], true),
            (&[None, Some(huge)], true),
            (&[Some(base), Some(huge)], true),
            (&[Some(other), None], false),
            (&[None, Some(other)], false),
            (&[None], false),
            (&[Some(base), None, None], false),
            (&[], false),
        ] {
            assert_eq!(may_have(layers), expected, "{layers:?}");
        }
        // What does not say its layers, or says others than its key, rules nothing out.
        for below in [None, Some(below(&[b"base"]))] {
            record_on(Some(Digest::of(b"elsewhere")), below);
            assert!(may_have(&[Some(other), None]));
        }
    }
}
