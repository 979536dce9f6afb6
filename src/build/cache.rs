//! Step records: look-up, store.
//!
//! A record says which layer a step made. It is found by the step's *definition* and
//! by its *inputs*: the layers below it, and what it reads beside them. A COPY from
//! another stage is stored under two inputs, the stage's layers and the content that
//! was read, so that it is found without reading when nothing changed, and by content
//! when the stage ran again and made the same files.
//!
//! ```text
//! cache/steps/<sha256 of the definition>/<sha256 of the inputs>.json
//! ```

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::image::{Descriptor, DiffId, Digest};
use crate::store::{Store, StoreError};

/// Part of every definition. Counts up when the same definition comes to mean other layers:
/// a change of sandbox rules, of the copy rules, of the archive writer.
const ENGINE_VERSION: u32 = 5;

/// What a step is, in words, independent of what it is applied to.
#[derive(Clone, Debug)]
pub(super) struct Definition {
    value: Value,
    digest: Digest,
}

/// What a step is applied to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Inputs {
    /// The layers below, as a chain ID; absent for an empty filesystem.
    pub(super) parent: Option<Digest>,
    /// The layers of the filesystem that is read, where it is not the parent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) source: Option<Digest>,
    /// The digest of names, modes and contents that are read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) content: Option<Digest>,
}

/// What a step made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Record {
    /// The layer's uncompressed digest.
    pub(super) diff_id: DiffId,
    /// The layer's blob.
    pub(super) descriptor: Descriptor,
    /// When it was made; RFC 3339. Goes into history.
    pub(super) created: String,
    /// The step's name when it was made, for people.
    pub(super) name: String,
    /// The definition in words.
    pub(super) definition: Value,
    /// The inputs in words.
    pub(super) inputs: Inputs,
}

impl Definition {
    /// A definition of the `kind` of step, such as `run`, with what distinguishes it.
    pub(super) fn new(kind: &str, what: &impl Serialize) -> Self {
        let what = serde_json::to_value(what).expect("definitions have only string keys");
        let value = serde_json::json!({ "engine": ENGINE_VERSION, kind: what });
        Self {
            digest: Digest::of(value.to_string().as_bytes()),
            value,
        }
    }
}

impl Inputs {
    fn digest(&self) -> Digest {
        Digest::of(&serde_json::to_vec(self).expect("inputs have only string keys"))
    }
}

fn directory(store: &Store, definition: &Definition) -> PathBuf {
    store.steps_path().join(definition.digest.hex())
}

fn path(store: &Store, definition: &Definition, inputs: &Inputs) -> PathBuf {
    directory(store, definition).join(format!("{}.json", inputs.digest().hex()))
}

/// Whether a step with this definition was ever recorded, with whatever inputs.
pub(super) fn has_definition(store: &Store, definition: &Definition) -> bool {
    directory(store, definition).is_dir()
}

/// The record of the step on these inputs, if its layer is still here.
///
/// A record that cannot be read is a miss: a cache failure never fails a build.
pub(super) fn look_up(store: &Store, definition: &Definition, inputs: &Inputs) -> Option<Record> {
    let path = path(store, definition, inputs);
    let bytes = std::fs::read(&path).ok()?;
    let record: Record = match serde_json::from_slice(&bytes) {
        Ok(record) => record,
        Err(error) => {
            tracing::warn!(path = %path.display(), %error, "unreadable cache record");
            return None;
        }
    };
    let is_it = record.definition == definition.value && record.inputs == *inputs;
    (is_it && store.has_blob_of(&record.descriptor)).then_some(record)
}

/// Records what the step made.
///
/// # Errors
/// [`StoreError`]; the caller says it and goes on.
pub(super) fn record(
    store: &Store,
    definition: &Definition,
    record: &Record,
) -> Result<(), StoreError> {
    let bytes = serde_json::to_vec_pretty(record).expect("records have only string keys");
    store.write_file(&path(store, definition, &record.inputs), &bytes)
}

impl Record {
    /// A record of `definition`.
    pub(super) fn new(
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
        }
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
}
