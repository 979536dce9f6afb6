//! `--explain`: why a step was not found in the cache, in words.
//!
//! A step that misses is compared with the records that are there. The nearest is the one
//! with the fewest differences, at the same place of the Dockerfile rather than elsewhere;
//! of those the one with most layers below it in common, then the youngest. What differs from
//! it is the reason. The comparison does no I/O; [`Explaining`] has the records for it, those
//! of the store and those of imported caches, from when the build begins.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::SystemTime;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::Engine;
use super::cache::{self, CacheSource, Imported, Record};
use super::content::ContentManifest;
use crate::image::{DiffId, Digest, chain_id};
use crate::progress::BuildEvent;
use crate::store::Store;

/// The records that were there, or in imported caches, when a build with `--explain` began.
pub(super) struct Explaining {
    known: Vec<Known<Recorded>>,
    imported: Arc<Imported>,
}

/// A record, and the cache that it was imported from; none for the store's.
struct Recorded {
    record: Record,
    cache: Option<CacheSource>,
}

impl Explaining {
    /// Reads all records of the store, and has those of other machines. Blocking.
    pub(super) fn read(store: &Store, imported: Arc<Imported>) -> Self {
        let known = |record: Record, used: SystemTime, cache: Option<CacheSource>| Known {
            step: Looked {
                name: record.name.clone(),
                definition: record.definition.clone(),
                below: record.below.clone(),
            },
            used,
            key: Recorded { record, cache },
        };
        let here = cache::all_records(store).into_iter();
        let here = here.map(|(record, used)| known(record, used, None));
        // When another machine used them nobody knows.
        let made = |record: &Record| {
            let made = OffsetDateTime::parse(&record.created, &Rfc3339);
            made.map_or(SystemTime::UNIX_EPOCH, SystemTime::from)
        };
        let elsewhere = imported.records();
        let elsewhere = elsewhere
            .map(|(record, cache)| known(record.clone(), made(record), Some(cache.clone())));
        Self {
            known: here.chain(elsewhere).collect(),
            imported,
        }
    }

    /// What a step read, by its digest.
    fn content(&self, store: &Store, digest: &Digest) -> Option<ContentManifest> {
        let here = std::fs::read(store.content_path(digest)).ok();
        let here = here.as_deref().and_then(ContentManifest::parse);
        here.or_else(|| self.imported.content(digest))
    }

    /// Why no record is that of `now`, which reads `content` as far as that is known. Blocking.
    pub(super) fn miss(
        &self,
        store: &Store,
        now: &Looked,
        arguments: &BTreeSet<String>,
        content: Option<&ContentManifest>,
    ) -> Vec<String> {
        let Some((known, differences)) = nearest(&self.known, now, arguments) else {
            return vec!["no step like this one is in the cache".to_owned()];
        };
        let Recorded { record, cache } = &known.key;
        let mut reasons = differences.reasons;
        // In an image's config no record says in words what is below it.
        if let (None, Some(below)) = (&record.below, &now.below) {
            let below: Vec<DiffId> = below.iter().map(|layer| layer.diff_id.clone()).collect();
            if chain_id(&below) != record.inputs.parent {
                reasons.push("other layers are below it".to_owned());
            }
        }
        if let (Some(old), Some(new)) = (&record.inputs.content, content)
            && *old != new.digest()
        {
            match self.content(store, old) {
                Some(old) => {
                    let files = old.compare(new);
                    let files: Vec<String> = files.iter().map(ToString::to_string).collect();
                    reasons.extend(shortened(files, "files"));
                }
                None => reasons.push("what it reads has changed".to_owned()),
            }
        }
        let layer = &record.descriptor.digest;
        match cache {
            None if reasons.is_empty() => {
                reasons.push(format!("its layer {layer} is no longer in the store"));
            }
            None => {}
            Some(cache) if reasons.is_empty() => {
                reasons.push(format!(
                    "its layer {layer} cannot be had from the cache {cache}"
                ));
            }
            Some(cache) => reasons.push(format!("compared with the cache {cache}")),
        }
        reasons
    }
}

impl Engine {
    /// Says what the cache has of a step, where that is wanted.
    pub(super) fn explain(&self, step: usize, name: &str, cached: bool, reasons: Vec<String>) {
        if self.explaining.is_some() {
            self.progress.event(BuildEvent::StepExplained {
                step,
                name: name.to_owned(),
                cached,
                reasons,
            });
        }
    }
}

/// How many differences of one kind are named; of more, only their number is said.
const NAMED_MAX: usize = 5;

/// How long a value may be in a reason, in characters. Longer ones are cut in the middle.
const VALUE_CHARS_MAX: usize = 120;

/// How much of a long value is shown before and after what differs in it, in characters.
const AROUND_CHARS: usize = 30;

/// A layer below a step, as people know it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Below {
    /// Which layer it is.
    pub(super) diff_id: DiffId,
    /// What made it.
    pub(super) made_by: MadeBy,
}

/// What made a layer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum MadeBy {
    /// It came with an image.
    Image {
        /// Its name.
        reference: String,
        /// The digest of its manifest.
        digest: String,
    },
    /// A step of this name.
    Step(String),
}

/// A step as it was looked up, or as it was when its record was made.
#[derive(Clone, Debug)]
pub(super) struct Looked {
    /// The step's name, such as `[build 2/5] RUN make`.
    pub(super) name: String,
    /// Its definition, of one kind such as `run`.
    pub(super) definition: Value,
    /// The layers below it, base first; absent where they are not known.
    pub(super) below: Option<Vec<Below>>,
}

/// What a miss is compared with.
#[derive(Clone, Debug)]
pub(super) struct Known<K> {
    /// The step when the record was made.
    pub(super) step: Looked,
    /// When the record was made or used last.
    pub(super) used: SystemTime,
    /// Which record it is.
    pub(super) key: K,
}

/// What of a step differs from a record, beside the files that it reads.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Differences {
    /// Each in words, such as `ARG V: "1" → "2"`.
    pub(super) reasons: Vec<String>,
    /// Whether what it does, its command or its sources, is something else.
    is_other_work: bool,
}

/// The record that is nearest to `now`, with what differs; none where nothing is like it.
///
/// `arguments` are the names of build arguments, which are told from `ENV`.
pub(super) fn nearest<'k, K>(
    known: &'k [Known<K>],
    now: &Looked,
    arguments: &BTreeSet<String>,
) -> Option<(&'k Known<K>, Differences)> {
    let compared = known.iter().filter_map(|known| {
        let differences = differences(&known.step, now, arguments)?;
        let is_elsewhere = position(&known.step.name) != position(&now.name);
        // Another command at another place is another step.
        if differences.is_other_work && is_elsewhere {
            return None;
        }
        let distance = differences.reasons.len() + usize::from(is_elsewhere);
        let order = (
            distance,
            Reverse(in_common(&known.step, now)),
            Reverse(known.used),
        );
        Some((order, known, differences))
    });
    let nearest = compared.min_by_key(|(order, ..)| *order);
    nearest.map(|(_, known, differences)| (known, differences))
}

/// How many layers below two steps are the same.
fn in_common(a: &Looked, b: &Looked) -> usize {
    let (a, b) = (a.below.iter().flatten(), b.below.iter().flatten());
    a.zip(b).take_while(|(a, b)| a.diff_id == b.diff_id).count()
}

/// What differs; none where the two are not of one kind.
pub(super) fn differences(
    old: &Looked,
    new: &Looked,
    arguments: &BTreeSet<String>,
) -> Option<Differences> {
    let kind = kind(&new.definition)?;
    let (old_work, new_work) = (old.definition.get(kind)?, new.definition.get(kind)?);
    let mut found = Differences::default();
    let (old_engine, new_engine) = (old.definition.get("engine"), new.definition.get("engine"));
    if old_engine != new_engine {
        found.reasons.push(format!(
            "another version of sockless made it: engine {} → {}",
            shown(old_engine),
            shown(new_engine)
        ));
    }
    let comparing = Comparing {
        arguments,
        found: &mut found,
    };
    comparing.work(kind, old_work, new_work);
    if let (Some(old), Some(new)) = (&old.below, &new.below) {
        found.reasons.extend(below(old, new));
    }
    Some(found)
}

/// The one field of a definition beside the engine's version.
fn kind(definition: &Value) -> Option<&str> {
    let fields = definition.as_object()?;
    let mut kinds = fields.keys().filter(|key| *key != "engine");
    kinds.next().map(String::as_str)
}

/// The stage and the number of a step in it: of `[build 2/5] RUN make`, `build 2`.
fn position(name: &str) -> Option<&str> {
    let inside = name.strip_prefix('[')?.split(']').next()?;
    Some(inside.rsplit_once('/').map_or(inside, |(before, _)| before))
}

/// What differs below the step.
fn below(old: &[Below], new: &[Below]) -> Option<String> {
    let differ = |(old, new): (&Below, &Below)| old.diff_id != new.diff_id;
    let Some(at) = old.iter().zip(new).position(differ) else {
        return match (old.get(new.len()), new.get(old.len())) {
            (Some(old), None) => Some(format!("{} is no longer below it", made_by(old))),
            (None, Some(new)) => Some(format!("{} is new below it", made_by(new))),
            _ => None,
        };
    };
    let (old_after, new_after) = (&old[at + 1..], &new[at + 1..]);
    let (old, new) = (&old[at], &new[at]);
    Some(match (&old.made_by, &new.made_by) {
        (
            MadeBy::Image { reference, digest },
            MadeBy::Image {
                reference: new_reference,
                digest: new_digest,
            },
        ) if reference == new_reference => {
            format!("base {reference}: digest changed from {digest} to {new_digest}")
        }
        (MadeBy::Image { reference, .. }, MadeBy::Image { reference: new, .. }) => {
            format!("base changed from {reference} to {new}")
        }
        (MadeBy::Step(old), MadeBy::Step(new))
            if without_position(old) == without_position(new) =>
        {
            format!("{} below it made another layer", quoted(new))
        }
        // What was there comes later, or what is there came later.
        (_, MadeBy::Step(name)) if has_step(new_after, old) && !has_step(old_after, new) => {
            format!("{} is new below it", quoted(name))
        }
        (MadeBy::Step(name), _) if has_step(old_after, new) && !has_step(new_after, old) => {
            format!("{} is no longer below it", quoted(name))
        }
        _ => format!("below it, {} → {}", made_by(old), made_by(new)),
    })
}

/// Whether one of `layers` was made by the step that made `layer`, wherever it stands.
fn has_step(layers: &[Below], layer: &Below) -> bool {
    let step = |layer: &Below| match &layer.made_by {
        MadeBy::Step(name) => Some(without_position(name).to_owned()),
        MadeBy::Image { .. } => None,
    };
    let wanted = step(layer);
    wanted.is_some() && layers.iter().any(|layer| step(layer) == wanted)
}

fn made_by(layer: &Below) -> String {
    match &layer.made_by {
        MadeBy::Image { reference, .. } => format!("a layer of {reference}"),
        MadeBy::Step(name) => quoted(name),
    }
}

/// `RUN make` of `[build 2/5] RUN make`.
fn without_position(name: &str) -> &str {
    let after = name
        .strip_prefix('[')
        .and_then(|rest| rest.split_once("] "));
    after.map_or(name, |(_, after)| after)
}

struct Comparing<'c> {
    arguments: &'c BTreeSet<String>,
    found: &'c mut Differences,
}

/// Fields that say what a step does; the others say how.
const WORK: [&str; 5] = ["args", "sources", "destination", "path", "mounts"];

impl Comparing<'_> {
    /// The definition of a `kind` of step: the step's fields, or a list that begins with them.
    fn work(mut self, kind: &str, old: &Value, new: &Value) {
        let (old_fields, old_rest) = parts(old);
        let (new_fields, new_rest) = parts(new);
        if let (Value::Object(old), Value::Object(new)) = (old_fields, new_fields) {
            let names: BTreeSet<&String> = old.keys().chain(new.keys()).collect();
            for name in names {
                let (old, new) = (old.get(name), new.get(name));
                if old != new {
                    self.found.is_other_work |= WORK.contains(&name.as_str());
                    self.field(name, old, new);
                }
            }
        } else if old_fields != new_fields {
            self.say(format!(
                "{kind}: {}",
                change(Some(old_fields), Some(new_fields))
            ));
        }
        // A platform is a text, the epoch a number or nothing.
        let rest = old_rest.len().max(new_rest.len());
        for at in 0..rest {
            let (old, new) = (old_rest.get(at), new_rest.get(at));
            if old == new {
                continue;
            }
            let is_text = |value: Option<&Value>| value.is_some_and(Value::is_string);
            let what = if is_text(old) || is_text(new) {
                "platform"
            } else {
                "SOURCE_DATE_EPOCH"
            };
            self.say(format!("{what}: {}", change(old, new)));
        }
    }

    fn say(&mut self, reason: String) {
        self.found.reasons.push(reason);
    }

    fn field(&mut self, name: &str, old: Option<&Value>, new: Option<&Value>) {
        let label = match name {
            "env" => return self.environment(old, new),
            "args" => return self.say(format!("command: {}", commands(old, new))),
            "mounts" => {
                self.list("--mount", &entries(old, is_mount), &entries(new, is_mount));
                let (old, new) = (entries(old, is_script), entries(new, is_script));
                return self.list("here-document", &old, &new);
            }
            "sources" => "source",
            "excludes" => "--exclude",
            "cwd" => "WORKDIR",
            "user" => "USER",
            "chmod" => {
                let (old, new) = (octal(old), octal(new));
                return self.say(format!("--chmod: {old} → {new}"));
            }
            "network" | "security" => {
                let word = |value: Option<&Value>| {
                    let word = value.and_then(Value::as_str);
                    word.map_or_else(|| shown(value), str::to_lowercase)
                };
                return self.say(format!("--{name}: {} → {}", word(old), word(new)));
            }
            "chown" | "link" | "parents" | "unpack" => {
                return self.say(format!("--{name}: {}", change(old, new)));
            }
            "devices" => "--device",
            "extra_hosts" => "--add-host",
            "ulimits" => "--ulimit",
            "shm_size" => "--shm-size",
            other => other,
        };
        let is_list = |value: Option<&Value>| value.is_some_and(Value::is_array);
        if is_list(old) || is_list(new) {
            return self.list(label, &entries(old, |_| true), &entries(new, |_| true));
        }
        self.say(format!("{label}: {}", change(old, new)));
    }

    /// Variables, `NAME=VALUE`: each by its name.
    fn environment(&mut self, old: Option<&Value>, new: Option<&Value>) {
        let (old, new) = (variables(old), variables(new));
        let names: BTreeSet<&str> = old.keys().chain(new.keys()).copied().collect();
        let mut reasons = Vec::new();
        for name in names {
            let kind = if self.arguments.contains(name) {
                "ARG"
            } else {
                "ENV"
            };
            reasons.push(match (old.get(name), new.get(name)) {
                (old, new) if old == new => continue,
                (Some(old), Some(new)) => format!("{kind} {name}: {}", text_change(old, new)),
                (None, Some(new)) => format!("{kind} {name}: {} is new", quoted(new)),
                (_, None) => format!("{kind} {name} is gone"),
            });
        }
        if reasons.is_empty() {
            reasons.push("the order of the variables".to_owned());
        }
        self.found.reasons.extend(shortened(reasons, "variables"));
    }

    /// Lists of which each entry counts by itself; nothing where they are the same.
    fn list(&mut self, label: &str, old: &[&Value], new: &[&Value]) {
        if old == new {
            return;
        }
        let gone: Vec<&Value> = old.iter().filter(|e| !new.contains(e)).copied().collect();
        let come: Vec<&Value> = new.iter().filter(|e| !old.contains(e)).copied().collect();
        let reason = match (gone.as_slice(), come.as_slice()) {
            ([old], [new]) => format!("{label}: {}", change(Some(old), Some(new))),
            ([], []) => format!("{label}: another order"),
            _ => {
                let gone = gone.iter().map(|e| format!("{} is gone", shown(Some(e))));
                let come = come.iter().map(|e| format!("{} is new", shown(Some(e))));
                let all: Vec<String> = gone.chain(come).collect();
                format!("{label}: {}", shortened(all, "entries").join(", "))
            }
        };
        self.say(reason);
    }
}

/// The entries of a list that are `wanted`.
fn entries(list: Option<&Value>, wanted: impl Fn(&Value) -> bool) -> Vec<&Value> {
    let list = list.and_then(Value::as_array).into_iter().flatten();
    list.filter(|entry| wanted(entry)).collect()
}

/// Whether an entry of `mounts` is a script from a here-document.
fn is_script(entry: &Value) -> bool {
    entry["kind"]["Script"].is_object()
}

fn is_mount(entry: &Value) -> bool {
    !is_script(entry)
}

/// The fields of a definition, and what stands behind them.
fn parts(work: &Value) -> (&Value, &[Value]) {
    match work {
        Value::Array(parts) => match parts.split_first() {
            Some((first, rest)) => (first, rest),
            None => (work, &[]),
        },
        other => (other, &[]),
    }
}

/// Two commands; of shell forms with one shell, only what it is given.
fn commands(old: Option<&Value>, new: Option<&Value>) -> String {
    let words = |value: Option<&Value>| -> Vec<String> {
        let words = value.and_then(Value::as_array).into_iter().flatten();
        words.filter_map(Value::as_str).map(str::to_owned).collect()
    };
    let (old, new) = (words(old), words(new));
    match (old.as_slice(), new.as_slice()) {
        ([old_before @ .., old], [new_before @ .., new])
            if old_before == new_before && !old_before.is_empty() =>
        {
            text_change(old, new)
        }
        _ => text_change(&old.join(" "), &new.join(" ")),
    }
}

fn variables(value: Option<&Value>) -> BTreeMap<&str, &str> {
    let pairs = value.and_then(Value::as_array).into_iter().flatten();
    let pairs = pairs.filter_map(Value::as_str);
    pairs
        .map(|pair| pair.split_once('=').unwrap_or((pair, "")))
        .collect()
}

/// Two values of a definition for people.
fn change(old: Option<&Value>, new: Option<&Value>) -> String {
    match (text(old), text(new)) {
        (Some(old), Some(new)) => text_change(old, new),
        _ => {
            let (old, new) = (in_words(old), in_words(new));
            if old == new {
                return format!("{}, from another place", cut(&new));
            }
            let (old, new) = where_they_differ(&old, &new);
            format!("{} → {}", cut(&old), cut(&new))
        }
    }
}

/// Two texts for people, in quotes.
fn text_change(old: &str, new: &str) -> String {
    let (old, new) = where_they_differ(old, new);
    format!("{} → {}", quoted(&old), quoted(&new))
}

/// Two texts, or what differs in them and a little around it where one of them is long.
fn where_they_differ(old: &str, new: &str) -> (String, String) {
    let [old, new] = [old, new].map(|text| text.chars().collect::<Vec<_>>());
    let shorter = old.len().min(new.len());
    let is_short = old.len().max(new.len()) <= VALUE_CHARS_MAX;
    let pairs = old.iter().zip(&new);
    let same_before = pairs.take_while(|(old, new)| old == new).count();
    let pairs = old.iter().rev().zip(new.iter().rev());
    let pairs = pairs.take(shorter - same_before);
    let same_after = pairs.take_while(|(old, new)| old == new).count();
    let part = |text: &[char]| {
        let from = same_before.saturating_sub(AROUND_CHARS);
        let to = text.len() - same_after.saturating_sub(AROUND_CHARS);
        if is_short {
            return text.iter().collect();
        }
        let before = if from > 0 { "…" } else { "" };
        let after = if to < text.len() { "…" } else { "" };
        let between: String = text[from..to].iter().collect();
        format!("{before}{between}{after}")
    };
    (part(&old), part(&new))
}

/// A value that is a text, or has one field that is.
fn text(value: Option<&Value>) -> Option<&str> {
    match value? {
        Value::String(text) => Some(text),
        Value::Object(fields) if fields.len() == 1 => fields.values().next()?.as_str(),
        _ => None,
    }
}

/// A value of a definition for people, cut where it is long.
fn shown(value: Option<&Value>) -> String {
    text(value).map_or_else(|| cut(&in_words(value)), quoted)
}

/// A value of a definition as a Dockerfile or a flag would have it, whole; texts in quotes.
fn in_words(value: Option<&Value>) -> String {
    match value {
        None | Some(Value::Null) => "none".to_owned(),
        Some(Value::String(text)) => format!("{text:?}"),
        Some(Value::Array(parts)) => {
            let parts: Vec<&str> = parts.iter().filter_map(Value::as_str).collect();
            parts.join(":")
        }
        Some(Value::Object(fields)) => object(fields),
        Some(other) => other.to_string(),
    }
}

/// `type=bind,source=/src,target=/s` of a mount, `<<NAME "CONTENT"` of a here-document, fields
/// with their names of other objects; of those with one field, what is in it.
fn object(fields: &Map<String, Value>) -> String {
    if let Some(Value::String(content)) = fields.get("content") {
        let name = fields.get("name").and_then(Value::as_str);
        return format!("<<{} {content:?}", name.unwrap_or_default());
    }
    if let Some(Value::Object(kinds)) = fields.get("kind") {
        let Some((kind, Value::Object(of_kind))) = kinds.iter().next() else {
            return in_words(fields.get("kind"));
        };
        if of_kind.contains_key("content") {
            return object(of_kind);
        }
        let mut parts = vec![format!("type={}", kind.to_lowercase())];
        parts.extend(of_kind.iter().filter_map(part));
        parts.extend(fields.get_key_value("target").and_then(part));
        return parts.join(",");
    }
    let mut values = fields.values();
    if let (Some(only), None) = (values.next(), values.next()) {
        return in_words(Some(only));
    }
    let parts: Vec<String> = fields.iter().filter_map(part).collect();
    parts.join(",")
}

/// `NAME=VALUE`; nothing of what is not there.
fn part((name, value): (&String, &Value)) -> Option<String> {
    let value = match value {
        Value::Null | Value::Bool(false) => return None,
        Value::Number(mode) if name == "mode" => mode
            .as_u64()
            .map_or(mode.to_string(), |mode| format!("{mode:o}")),
        Value::String(text) if name == "sharing" => text.to_lowercase(),
        Value::String(text) if name == "id" => text.trim_start_matches('/').to_owned(),
        // By its number, which says nothing; what it has is compared for itself.
        _ if name == "from" => return None,
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    Some(format!("{name}={value}"))
}

/// `--chmod`, whose numbers people write in octal.
fn octal(value: Option<&Value>) -> String {
    let mode = value.and_then(|value| value.get("Mode")?.as_u64());
    mode.map_or_else(|| shown(value), |mode| format!("{mode:o}"))
}

fn quoted(text: &str) -> String {
    format!("{:?}", cut(text))
}

fn cut(text: &str) -> String {
    let length = text.chars().count();
    if length <= VALUE_CHARS_MAX {
        return text.to_owned();
    }
    let half = VALUE_CHARS_MAX / 2;
    let begin: String = text.chars().take(half).collect();
    let end: String = text.chars().skip(length - half).collect();
    format!("{begin}…{end}")
}

/// The first few, and how many more there are.
pub(super) fn shortened(mut reasons: Vec<String>, what: &str) -> Vec<String> {
    if reasons.len() > NAMED_MAX + 1 {
        let more = reasons.len() - NAMED_MAX;
        reasons.truncate(NAMED_MAX);
        reasons.push(format!("{more} more {what}"));
    }
    reasons
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use serde_json::json;

    use super::*;
    use crate::image::Digest;

    fn layer(content: &str, made_by: MadeBy) -> Below {
        Below {
            diff_id: DiffId::from_uncompressed(Digest::of(content.as_bytes())),
            made_by,
        }
    }

    fn base(content: &str) -> Below {
        let made_by = MadeBy::Image {
            reference: "docker.io/library/debian:12".to_owned(),
            digest: format!("sha256:{content}"),
        };
        layer(content, made_by)
    }

    fn step(name: &str, content: &str) -> Below {
        layer(content, MadeBy::Step(name.to_owned()))
    }

    fn run(name: &str, command: &str, env: &[&str], below: Vec<Below>) -> Looked {
        Looked {
            name: name.to_owned(),
            definition: json!({
                "engine": 5,
                "run": [
                    { "args": ["/bin/sh", "-c", command], "env": env, "cwd": "/", "user": "" },
                    "linux/amd64",
                    null,
                ],
            }),
            below: Some(below),
        }
    }

    fn reasons(old: &Looked, new: &Looked) -> Vec<String> {
        let arguments = BTreeSet::from(["V".to_owned()]);
        differences(old, new, &arguments).unwrap().reasons
    }

    #[test]
    fn what_differs_is_named() {
        let old = run(
            "[2/3] RUN make",
            "make",
            &["V=1", "P=/bin"],
            vec![base("a")],
        );
        let mut new = old.clone();
        assert_eq!(reasons(&old, &new), Vec::<String>::new());
        new.definition["run"][0]["env"] = json!(["V=2", "P=/bin:/usr", "Q=3"]);
        assert_eq!(
            reasons(&old, &new),
            [
                r#"ENV P: "/bin" → "/bin:/usr""#,
                r#"ENV Q: "3" is new"#,
                r#"ARG V: "1" → "2""#,
            ]
        );
        new.definition["run"] = json!([
            { "args": ["/bin/sh", "-c", "make all"], "env": ["P=/bin", "V=1"], "cwd": "/src", "user": "1000" },
            "linux/arm64",
            12,
        ]);
        new.definition["engine"] = json!(6);
        new.below = Some(vec![base("b")]);
        assert_eq!(
            reasons(&old, &new),
            [
                "another version of sockless made it: engine 5 → 6",
                r#"command: "make" → "make all""#,
                r#"WORKDIR: "/" → "/src""#,
                "the order of the variables",
                r#"USER: "" → "1000""#,
                r#"platform: "linux/amd64" → "linux/arm64""#,
                "SOURCE_DATE_EPOCH: none → 12",
                "base docker.io/library/debian:12: digest changed from sha256:a to sha256:b",
            ]
        );
    }

    #[test]
    fn layers_below_are_named_by_what_made_them() {
        let below = |layers: Vec<Below>| run("[3/3] RUN b", "b", &[], layers);
        let old = below(vec![base("a"), step("[2/3] RUN a", "1")]);
        let cases = [
            (
                vec![base("a"), step("[2/4] RUN a", "2")],
                r#""[2/4] RUN a" below it made another layer"#,
            ),
            (
                vec![base("a"), step("[2/3] RUN c", "2")],
                r#"below it, "[2/3] RUN a" → "[2/3] RUN c""#,
            ),
            (vec![base("a")], r#""[2/3] RUN a" is no longer below it"#),
            (
                vec![
                    base("a"),
                    step("[2/3] RUN a", "1"),
                    step("[3/3] RUN d", "3"),
                ],
                r#""[3/3] RUN d" is new below it"#,
            ),
        ];
        for (layers, expected) in cases {
            assert_eq!(reasons(&old, &below(layers)), [expected]);
        }
    }

    #[test]
    fn steps_that_came_or_went_in_between_are_named() {
        let below = |steps: &[(&str, &str)]| {
            let steps = steps.iter().map(|(name, content)| step(name, content));
            let layers = [base("a")].into_iter().chain(steps).collect();
            run("[9/9] RUN b", "b", &[], layers)
        };
        let less = below(&[("[2/9] RUN a", "1"), ("[3/9] RUN c", "2")]);
        let more = below(&[
            ("[2/9] RUN a", "1"),
            ("[3/9] RUN new", "3"),
            ("[4/9] RUN c", "2"),
        ]);
        assert_eq!(
            reasons(&less, &more),
            [r#""[3/9] RUN new" is new below it"#]
        );
        assert_eq!(
            reasons(&more, &less),
            [r#""[3/9] RUN new" is no longer below it"#]
        );
        // Two that changed places are neither.
        let turned = below(&[("[2/9] RUN c", "4"), ("[3/9] RUN a", "5")]);
        assert_eq!(
            reasons(&less, &turned),
            [r#"below it, "[2/9] RUN a" → "[2/9] RUN c""#]
        );
    }

    #[test]
    fn mounts_networks_and_here_documents_are_in_a_dockerfiles_words() {
        let with = |network: &str, mounts: Value| {
            let mut step = run("[2/2] RUN a", "a", &[], Vec::new());
            step.definition["run"][0]["network"] = json!(network);
            step.definition["run"][0]["mounts"] = mounts;
            step
        };
        let bind = |source: &str, context: u32| {
            json!({ "target": "/s", "kind": { "Bind": {
                "from": { "Context": context }, "source": source, "read_write": false,
            } } })
        };
        let cache = |id: &str| {
            json!({ "target": "/c", "kind": { "Cache": {
                "id": id, "from": "Scratch", "source": "/", "sharing": "Locked",
                "read_only": true, "mode": 0o750, "uid": null, "gid": null,
            } } })
        };
        let script = |content: &str| {
            json!({ "target": "/dev/pipes", "kind": { "Script": {
                "name": "EOF", "content": content,
            } } })
        };
        let old = with("Default", json!([bind("/a", 0), script("echo 1\n")]));
        let new = with("None", json!([bind("/b", 0), script("echo 2\n")]));
        assert_eq!(
            reasons(&old, &new),
            [
                "--mount: type=bind,source=/a,target=/s → type=bind,source=/b,target=/s",
                r#"here-document: <<EOF "echo 1\n" → <<EOF "echo 2\n""#,
                "--network: default → none",
            ]
        );
        assert_eq!(
            reasons(
                &with("None", json!([cache("//c"), bind("/a", 0)])),
                &with("None", json!([cache("/x"), bind("/a", 0)]))
            ),
            [
                "--mount: type=cache,id=c,mode=750,read_only=true,sharing=locked,source=/,target=/c → \
                 type=cache,id=x,mode=750,read_only=true,sharing=locked,source=/,target=/c"
            ]
        );
        assert_eq!(
            reasons(
                &with("None", json!([bind("/a", 0)])),
                &with("None", json!([bind("/a", 1)]))
            ),
            ["--mount: type=bind,source=/a,target=/s, from another place"]
        );
        assert_eq!(
            reasons(
                &with("None", json!([])),
                &with("None", json!([bind("/a", 1)]))
            ),
            ["--mount: type=bind,source=/a,target=/s is new"]
        );
    }

    #[test]
    fn of_long_values_the_part_that_differs_is_shown() {
        let command = |middle: &str| {
            let command = format!("{}{middle}{}", "a".repeat(300), "z".repeat(300));
            run("[2/2] RUN", &command, &[], Vec::new())
        };
        // A dash before and after is the same in both.
        let (before, after) = (
            format!("…{}-", "a".repeat(AROUND_CHARS - 1)),
            format!("-{}…", "z".repeat(AROUND_CHARS - 1)),
        );
        assert_eq!(
            reasons(&command("-1-"), &command("-22-")),
            [format!(
                "command: \"{before}1{after}\" → \"{before}22{after}\""
            )]
        );
        let (old, new) = (command("").definition, command("-new-").definition);
        assert_eq!(
            where_they_differ(
                old["run"][0]["args"][2].as_str().unwrap(),
                new["run"][0]["args"][2].as_str().unwrap()
            ),
            (
                format!("…{}{}…", "a".repeat(AROUND_CHARS), "z".repeat(AROUND_CHARS)),
                format!(
                    "…{}-new-{}…",
                    "a".repeat(AROUND_CHARS),
                    "z".repeat(AROUND_CHARS)
                )
            )
        );
        // Short ones are whole.
        assert_eq!(
            where_they_differ("make all", "make none"),
            ("make all".to_owned(), "make none".to_owned())
        );
    }

    #[test]
    fn the_nearest_is_at_the_same_place_or_does_the_same() {
        let known = |name: &str, command: &str, seconds: u64| Known {
            step: run(name, command, &["V=1"], vec![base("a")]),
            used: SystemTime::UNIX_EPOCH + Duration::from_secs(seconds),
            key: (),
        };
        let all = [
            known("[build 2/3] RUN a", "a", 9),
            known("[build 3/3] RUN b", "b", 1),
            known("[build 3/3] RUN older", "older", 0),
        ];
        let nearest_to = |name: &str, command: &str| {
            let now = run(name, command, &["V=1"], vec![base("a")]);
            let found = nearest(&all, &now, &BTreeSet::new());
            found.map(|(known, differences)| (known.step.name.clone(), differences.reasons))
        };
        // Another command at the same place: the younger of the two there.
        assert_eq!(
            nearest_to("[build 3/3] RUN c", "c"),
            Some((
                "[build 3/3] RUN b".to_owned(),
                vec![r#"command: "b" → "c""#.to_owned()]
            ))
        );
        // The same at another place.
        let moved = nearest_to("[build 4/4] RUN a", "a").unwrap();
        assert_eq!(moved, ("[build 2/3] RUN a".to_owned(), Vec::new()));
        // Neither.
        assert_eq!(nearest_to("[other 7/7] RUN x", "x"), None);
    }

    #[test]
    fn of_equally_near_records_that_with_most_layers_in_common_is_the_nearest() {
        let layers = |contents: [&str; 3]| {
            let [first, second, third] = contents;
            vec![
                base(first),
                step("[2/4] RUN a", second),
                step("[3/4] RUN b", third),
            ]
        };
        let known = |contents: [&str; 3], seconds: u64| Known {
            step: run("[4/4] RUN c", "c", &[], layers(contents)),
            used: SystemTime::UNIX_EPOCH + Duration::from_secs(seconds),
            key: (),
        };
        let all = [
            known(["x", "other", "other"], 9),
            known(["x", "1", "other"], 5),
            known(["x", "1", "another"], 4),
            known(["y", "1", "2"], 8),
        ];
        let now = run("[4/4] RUN c", "c", &[], layers(["x", "1", "2"]));
        let (known, differences) = nearest(&all, &now, &BTreeSet::new()).unwrap();
        assert_eq!(
            known.used,
            SystemTime::UNIX_EPOCH + Duration::from_secs(5),
            "the younger of the two"
        );
        assert_eq!(
            differences.reasons,
            [r#""[3/4] RUN b" below it made another layer"#]
        );
    }

    #[test]
    fn lists_name_their_entries_and_do_not_grow() {
        let copy = |sources: Value| Looked {
            name: "[2/2] COPY".to_owned(),
            definition: json!({ "engine": 5, "copy": [{ "sources": sources, "destination": "/" }, null] }),
            below: None,
        };
        let paths = |paths: &[&str]| {
            let paths = paths.iter().map(|path| json!({ "Path": path }));
            copy(paths.collect())
        };
        assert_eq!(
            reasons(&paths(&["a"]), &paths(&["b"])),
            [r#"source: "a" → "b""#]
        );
        assert_eq!(
            reasons(&paths(&["a", "b"]), &paths(&["b", "a"])),
            ["source: another order"]
        );
        assert_eq!(
            reasons(
                &paths(&["a"]),
                &paths(&["a", "1", "2", "3", "4", "5", "6", "7"])
            ),
            [
                r#"source: "1" is new, "2" is new, "3" is new, "4" is new, "5" is new, 2 more entries"#
            ]
        );
        // Of another kind: nothing to compare.
        let other = run("[2/2] RUN a", "a", &[], Vec::new());
        assert_eq!(differences(&other, &paths(&["a"]), &BTreeSet::new()), None);
    }
}
