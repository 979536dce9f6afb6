//! `--explain`: why a step was not found in the cache, in words.
//!
//! A step that misses is compared with the records that are there. The nearest is the one
//! with the fewest differences, at the same place of the Dockerfile rather than elsewhere,
//! and the youngest of those; what differs from it is the reason. The comparison does no I/O;
//! [`Explaining`] reads the records for it when the build begins.

use std::collections::{BTreeMap, BTreeSet};
use std::time::SystemTime;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::Engine;
use super::cache::{self, Record};
use super::content::ContentManifest;
use crate::image::DiffId;
use crate::progress::BuildEvent;
use crate::store::Store;

/// The records that were there when a build with `--explain` began.
pub(super) struct Explaining {
    known: Vec<Known<Record>>,
}

impl Explaining {
    /// Reads all records. Blocking.
    pub(super) fn read(store: &Store) -> Self {
        let known = cache::all_records(store).into_iter();
        let known = known.map(|(record, used)| Known {
            step: Looked {
                name: record.name.clone(),
                definition: record.definition.clone(),
                below: record.below.clone(),
            },
            used,
            key: record,
        });
        Self {
            known: known.collect(),
        }
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
        let mut reasons = differences.reasons;
        if let (Some(old), Some(new)) = (&known.key.inputs.content, content)
            && *old != new.digest()
        {
            let text = std::fs::read(store.content_path(old)).ok();
            match text.as_deref().and_then(ContentManifest::parse) {
                Some(old) => {
                    let files = old.compare(new);
                    let files: Vec<String> = files.iter().map(ToString::to_string).collect();
                    reasons.extend(shortened(files, "files"));
                }
                None => reasons.push("what it reads has changed".to_owned()),
            }
        }
        if reasons.is_empty() {
            reasons.push(format!(
                "its layer {} is no longer in the store",
                known.key.descriptor.digest
            ));
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
        Some((distance, known, differences))
    });
    let nearest = compared.min_by(|(a, known_a, _), (b, known_b, _)| {
        a.cmp(b).then_with(|| known_b.used.cmp(&known_a.used))
    });
    nearest.map(|(_, known, differences)| (known, differences))
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
    let differs = |(old, new): &(&Below, &Below)| old.diff_id != new.diff_id;
    let Some((old, new)) = old.iter().zip(new).find(differs) else {
        return match (old.get(new.len()), new.get(old.len())) {
            (Some(old), None) => Some(format!("{} is no longer below it", made_by(old))),
            (None, Some(new)) => Some(format!("{} is new below it", made_by(new))),
            _ => None,
        };
    };
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
        _ => format!("below it, {} → {}", made_by(old), made_by(new)),
    })
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
                "{kind}: {} → {}",
                shown(Some(old_fields)),
                shown(Some(new_fields))
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
            self.say(format!("{what}: {} → {}", shown(old), shown(new)));
        }
    }

    fn say(&mut self, reason: String) {
        self.found.reasons.push(reason);
    }

    fn field(&mut self, name: &str, old: Option<&Value>, new: Option<&Value>) {
        let label = match name {
            "env" => return self.environment(old, new),
            "args" => {
                let (old, new) = commands(old, new);
                return self.say(format!("command: {old} → {new}"));
            }
            "mounts" => return self.list("--mount", old, new),
            "sources" => return self.list("source", old, new),
            "excludes" => return self.list("--exclude", old, new),
            "cwd" => "WORKDIR",
            "user" => "USER",
            "chmod" => {
                let (old, new) = (octal(old), octal(new));
                return self.say(format!("--chmod: {old} → {new}"));
            }
            "network" | "security" | "chown" | "link" | "parents" | "unpack" => {
                return self.say(format!("--{name}: {} → {}", shown(old), shown(new)));
            }
            "devices" => return self.list("--device", old, new),
            "extra_hosts" => return self.list("--add-host", old, new),
            "ulimits" => return self.list("--ulimit", old, new),
            "shm_size" => "--shm-size",
            other => other,
        };
        self.say(format!("{label}: {} → {}", shown(old), shown(new)));
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
                (Some(old), Some(new)) => {
                    format!("{kind} {name}: {} → {}", quoted(old), quoted(new))
                }
                (None, Some(new)) => format!("{kind} {name}: {} is new", quoted(new)),
                (_, None) => format!("{kind} {name} is gone"),
            });
        }
        if reasons.is_empty() {
            reasons.push("the order of the variables".to_owned());
        }
        self.found.reasons.extend(shortened(reasons, "variables"));
    }

    /// A list of which each entry counts by itself.
    fn list(&mut self, label: &str, old: Option<&Value>, new: Option<&Value>) {
        let entries = |value: Option<&Value>| {
            let entries = value.and_then(Value::as_array).cloned();
            entries.unwrap_or_default()
        };
        let (old, new) = (entries(old), entries(new));
        let gone: Vec<&Value> = old.iter().filter(|entry| !new.contains(entry)).collect();
        let come: Vec<&Value> = new.iter().filter(|entry| !old.contains(entry)).collect();
        let reason = match (gone.as_slice(), come.as_slice()) {
            ([old], [new]) => format!("{label}: {} → {}", shown(Some(old)), shown(Some(new))),
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
fn commands(old: Option<&Value>, new: Option<&Value>) -> (String, String) {
    let words = |value: Option<&Value>| -> Vec<String> {
        let words = value.and_then(Value::as_array).into_iter().flatten();
        words.filter_map(Value::as_str).map(str::to_owned).collect()
    };
    let (old, new) = (words(old), words(new));
    match (old.as_slice(), new.as_slice()) {
        ([old_before @ .., old], [new_before @ .., new])
            if old_before == new_before && !old_before.is_empty() =>
        {
            (quoted(old), quoted(new))
        }
        _ => (quoted(&old.join(" ")), quoted(&new.join(" "))),
    }
}

fn variables(value: Option<&Value>) -> BTreeMap<&str, &str> {
    let pairs = value.and_then(Value::as_array).into_iter().flatten();
    let pairs = pairs.filter_map(Value::as_str);
    pairs
        .map(|pair| pair.split_once('=').unwrap_or((pair, "")))
        .collect()
}

/// A value of a definition for people: texts in quotes, one-field objects by their field.
fn shown(value: Option<&Value>) -> String {
    match value {
        None | Some(Value::Null) => "none".to_owned(),
        Some(Value::String(text)) => quoted(text),
        Some(Value::Object(fields)) if fields.len() == 1 => match fields.iter().next() {
            Some((_, inner)) => shown(Some(inner)),
            None => "none".to_owned(),
        },
        Some(other) => cut(&other.to_string()),
    }
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
