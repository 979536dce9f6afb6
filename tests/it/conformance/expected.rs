//! `expected.json`: made of an image or a message, compared, and written as `generate.py` does.

use std::fmt::Write as _;

use serde_json::{Map, Value, json};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::bases::Base;
use super::case::Spec;
use super::flatten::Tree;
use crate::support::oci::Image;

/// The keys of the image configuration that are compared.
const CONFIG_KEYS: [&str; 13] = [
    "Env",
    "Cmd",
    "Entrypoint",
    "WorkingDir",
    "User",
    "Labels",
    "ExposedPorts",
    "Volumes",
    "StopSignal",
    "Healthcheck",
    "OnBuild",
    "Shell",
    "ArgsEscaped",
];

/// What `expected.json` would say of an image.
///
/// # Errors
/// Why the image cannot be a result of the case.
pub fn of_image(image: &Image, base: &Base, spec: &Spec) -> Result<Value, String> {
    let config = &image.config;
    let empty = Vec::new();
    let list = |value: &Value| value.as_array().unwrap_or(&empty).clone();
    let diff_ids = list(&config["rootfs"]["diff_ids"]);
    let history = list(&config["history"]);
    if !diff_ids.starts_with(&base.diff_ids) || !history.starts_with(&base.history) {
        return Err(format!("the image is not based on {}", spec.base));
    }
    let mut tree = Tree::new();
    for layer in &image.layers {
        tree.apply(&layer.entries)
            .map_err(|e| format!("layer {}: {e}", layer.digest))?;
    }
    let (delta, removed) = tree.delta(&base.tree, &spec.content_varies);
    let history: Vec<Value> = history[base.history.len()..]
        .iter()
        .map(|entry| {
            json!({
                "created_by": entry["created_by"].as_str().unwrap_or_default(),
                "empty_layer": entry["empty_layer"] == true,
            })
        })
        .collect();
    let mut result = Map::new();
    result.insert("base".into(), spec.base.as_str().into());
    for key in ["os", "architecture", "variant", "author"] {
        if config[key].as_str().is_some_and(|value| !value.is_empty()) {
            result.insert(key.into(), config[key].clone());
        }
    }
    if spec.build_args.contains_key("SOURCE_DATE_EPOCH") {
        result.insert("created".into(), config["created"].clone());
    }
    result.insert("config".into(), run_config(&config["config"]));
    result.insert(
        "layers".into(),
        (diff_ids.len() - base.diff_ids.len()).into(),
    );
    result.insert("history".into(), history.into());
    result.insert("delta".into(), delta.into());
    result.insert("removed".into(), removed.into());
    for key in &spec.not_compared {
        if key.starts_with('/') {
            if let Some(Value::Array(delta)) = result.get_mut("delta") {
                delta.retain(|entry| entry["path"] != key.as_str());
            }
        } else {
            result.remove(key);
        }
    }
    Ok(result.into())
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::String(text) => text.is_empty(),
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
        _ => false,
    }
}

/// The image configuration's `config` as `expected.json` has it.
fn run_config(config: &Value) -> Value {
    let mut result = Map::new();
    for key in CONFIG_KEYS {
        let value = match (&config[key], key) {
            (Value::Object(set), "ExposedPorts" | "Volumes") => {
                let mut keys: Vec<&String> = set.keys().collect();
                keys.sort();
                json!(keys)
            }
            (Value::Object(check), "Healthcheck") => (check.iter())
                .filter(|(_, value)| !is_empty(value) && **value != 0)
                .map(|(key, value)| (key.clone(), value.clone()))
                .collect(),
            (value, _) => value.clone(),
        };
        if !is_empty(&value) {
            result.insert(key.into(), value);
        }
    }
    result.into()
}

/// Every difference between an image's description and the expected one; none: the case passes.
pub fn differences(got: &Value, want: &Value) -> Vec<String> {
    let mut found = Vec::new();
    for key in ["os", "architecture", "variant", "author", "layers"] {
        differs(&mut found, key, &got[key], &want[key]);
    }
    let time = |value: &Value| {
        let text = value.as_str()?;
        OffsetDateTime::parse(text, &Rfc3339).ok()
    };
    if !want["created"].is_null() && time(&got["created"]) != time(&want["created"]) {
        differs(&mut found, "created", &got["created"], &want["created"]);
    }
    let setting = |of: &Value, key: &str| match (&of["config"][key], key) {
        (Value::Null, "WorkingDir") => "/".into(),
        (value, _) => value.clone(),
    };
    for key in CONFIG_KEYS.into_iter().filter(|key| *key != "ArgsEscaped") {
        let name = format!("config {key}");
        differs(&mut found, &name, &setting(got, key), &setting(want, key));
    }
    if !want["history"].is_null() {
        let (got, want) = (elements(&got["history"]), elements(&want["history"]));
        for at in 0..got.len().max(want.len()) {
            let entry = |list: &[Value]| list.get(at).cloned().unwrap_or_default();
            let name = format!("history {}", at + 1);
            differs(&mut found, &name, &entry(got), &entry(want));
        }
    }
    delta_differences(
        &mut found,
        elements(&got["delta"]),
        elements(&want["delta"]),
    );
    differs(&mut found, "removed", &got["removed"], &want["removed"]);
    found
}

fn differs(found: &mut Vec<String>, name: &str, got: &Value, want: &Value) {
    if got != want {
        found.push(format!("{name}: got {got}, want {want}"));
    }
}

fn elements(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

fn delta_differences(found: &mut Vec<String>, got: &[Value], want: &[Value]) {
    let path = |entry: &Value| entry["path"].as_str().unwrap_or_default().to_owned();
    let of = |list: &[Value], name: &str| list.iter().find(|e| e["path"] == name).cloned();
    let mut paths: Vec<String> = got.iter().chain(want).map(path).collect();
    paths.sort();
    paths.dedup();
    for path in paths {
        match (of(got, &path), of(want, &path)) {
            (Some(got), Some(want)) => {
                let mut keys: Vec<String> = [&got, &want]
                    .iter()
                    .filter_map(|entry| entry.as_object())
                    .flat_map(|entry| entry.keys().cloned())
                    .collect();
                keys.sort();
                keys.dedup();
                // `text` only shows what `sha256` says.
                keys.retain(|key| key != "text");
                let mut wrong = Vec::new();
                for key in keys {
                    differs(&mut wrong, &key, &got[&key], &want[&key]);
                    if key == "sha256" && got["sha256"] != want["sha256"] {
                        differs(&mut wrong, "text", &got["text"], &want["text"]);
                    }
                }
                if !wrong.is_empty() {
                    found.push(format!("{path}: {}", wrong.join(", ")));
                }
            }
            (Some(got), None) => found.push(format!("{path} should not be there: {got}")),
            (None, Some(want)) => found.push(format!("{path} is missing: {want}")),
            (None, None) => {}
        }
    }
}

/// What the program printed without the lines of the Dockerfile that it shows with it.
pub fn message(stderr: &str) -> String {
    let shown = |line: &&str| {
        line.split_once('|').is_some_and(|(number, _)| {
            number.chars().all(|c| c.is_ascii_digit() || c == ' ') && number.ends_with(' ')
        })
    };
    let lines: Vec<&str> = stderr.lines().filter(|line| !shown(line)).collect();
    lines.join("\n")
}

/// The lines of the Dockerfile that a message points to.
pub fn lines_of(message: &str, dockerfile: &str) -> Vec<u64> {
    let name = format!("{dockerfile}:");
    (message.match_indices(&name))
        .filter_map(|(at, _)| {
            let digits = &message[at + name.len()..];
            let end = digits.find(|c: char| !c.is_ascii_digit());
            digits[..end.unwrap_or(digits.len())].parse().ok()
        })
        .collect()
}

/// What is wrong with how a build failed; nothing: the case passes.
pub fn failure_differences(
    stderr: &str,
    code: Option<i32>,
    want: &Value,
    file: &str,
) -> Vec<String> {
    let mut found = Vec::new();
    // See "Exit codes" in README.md: neither without a sandbox, nor by a signal, nor a panic.
    if !matches!(code, Some(1..=3 | 70)) {
        found.push(format!("exit status {code:?}, want 1, 2, 3 or 70"));
    }
    let message = message(stderr);
    let lower = stderr.to_lowercase();
    if lower.contains("not supported yet") {
        found.push("refused as not supported, not as wrong".into());
    }
    for word in elements(&want["must_mention"]) {
        let word = word.as_str().unwrap_or_default();
        if !lower.contains(&word.to_lowercase()) {
            found.push(format!("does not mention {word:?}"));
        }
    }
    if let Some(first) = want["line"].as_u64() {
        let last = want["last_line"].as_u64().unwrap_or(first);
        let lines = lines_of(&message, file);
        if !lines.iter().any(|line| (first..=last).contains(line)) {
            found.push(format!(
                "points to {file}:{lines:?}, want a line of {first} to {last}"
            ));
        }
    }
    if !found.is_empty() {
        found.push(format!("it said: {}", message.trim()));
    }
    found
}

/// What `expected.json` would say of a failure.
pub fn of_failure(stderr: &str, spec: &Spec) -> Value {
    let message = message(stderr);
    let line = lines_of(&message, spec.dockerfile_name());
    // The last paragraph: what comes before is progress.
    let said = (message.lines().rev())
        .skip_while(|line| line.trim().is_empty() || line.starts_with("hint: "))
        .find(|line| !line.starts_with(' '));
    let mut result = json!({
        "error": said.map(|line| line.strip_prefix("error: ").unwrap_or(line)),
        "must_mention": spec.must_mention,
    });
    if let Some(line) = line.last() {
        result["line"] = (*line).into();
    }
    for key in &spec.not_compared {
        if let Some(result) = result.as_object_mut() {
            result.remove(key);
        }
    }
    result
}

/// The order of keys in the files; all others follow by name.
const ORDER: &[&str] = &[
    "base",
    "os",
    "architecture",
    "variant",
    "author",
    "created",
    "config",
    "layers",
    "history",
    "delta",
    "removed",
    "error",
    "line",
    "last_line",
    "must_mention",
    "path",
    "type",
    "mode",
    "uid",
    "gid",
    "size",
    "sha256",
    "text",
    "link",
    "major",
    "minor",
    "xattrs",
    "hardlink_of",
    "mtime",
    "created_by",
    "empty_layer",
    "Env",
    "Cmd",
    "Entrypoint",
    "WorkingDir",
    "User",
    "Labels",
    "ExposedPorts",
    "Volumes",
    "StopSignal",
    "Healthcheck",
    "OnBuild",
    "Shell",
    "ArgsEscaped",
    "Test",
    "Interval",
    "Timeout",
    "StartPeriod",
    "StartInterval",
    "Retries",
];

/// The text of the file: one line per list element, so that differences are easy to read.
pub fn render(expected: &Value) -> String {
    let mut lines = Vec::new();
    for (key, value) in ordered(expected) {
        let elements: Vec<String> = match (key.as_str(), value) {
            ("history" | "delta" | "removed" | "must_mention", Value::Array(list)) => {
                list.iter().map(one_line).collect()
            }
            ("config", config) => (ordered(config).into_iter())
                .map(|(key, value)| format!("{}: {}", quoted(key), named(key, value)))
                .collect(),
            _ => Vec::new(),
        };
        let key = quoted(key);
        if elements.is_empty() {
            lines.push(format!("  {key}: {}", one_line(value)));
            continue;
        }
        let (open, close) = if value.is_array() {
            ('[', ']')
        } else {
            ('{', '}')
        };
        let elements: Vec<String> = elements.iter().map(|e| format!("    {e}")).collect();
        lines.push(format!(
            "  {key}: {open}\n{}\n  {close}",
            elements.join(",\n")
        ));
    }
    format!("{{\n{}\n}}\n", lines.join(",\n"))
}

fn ordered(object: &Value) -> Vec<(&String, &Value)> {
    let mut entries: Vec<_> = object.as_object().into_iter().flatten().collect();
    entries.sort_by_key(|(key, _)| {
        let rank = ORDER.iter().position(|known| known == key);
        (rank.unwrap_or(ORDER.len()), *key)
    });
    entries
}

/// A value under its key: the keys of labels are the Dockerfile's, not ours.
fn named(key: &str, value: &Value) -> String {
    match (key, value) {
        ("Labels", Value::Object(labels)) => {
            let mut labels: Vec<_> = labels.iter().collect();
            labels.sort_by_key(|(label, _)| *label);
            object(&labels)
        }
        _ => one_line(value),
    }
}

fn one_line(value: &Value) -> String {
    match value {
        Value::Object(_) => object(&ordered(value)),
        Value::Array(list) => {
            let list: Vec<String> = list.iter().map(one_line).collect();
            format!("[{}]", list.join(", "))
        }
        Value::String(text) => quoted(text),
        other => other.to_string(),
    }
}

fn object(entries: &[(&String, &Value)]) -> String {
    let entries: Vec<String> = (entries.iter())
        .map(|(key, value)| format!("{}: {}", quoted(key), one_line(value)))
        .collect();
    format!("{{{}}}", entries.join(", "))
}

/// JSON text of ASCII alone.
fn quoted(text: &str) -> String {
    let mut ascii = String::new();
    for c in Value::from(text).to_string().chars() {
        if c.is_ascii() {
            ascii.push(c);
        } else {
            for unit in c.encode_utf16(&mut [0; 2]) {
                write!(ascii, "\\u{unit:04x}").expect("a string");
            }
        }
    }
    ascii
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::support::repository;

    #[test]
    fn files_are_written_as_the_generator_writes_them() {
        let cases = repository().join("fixtures/conformance/cases");
        let mut seen = 0;
        for case in std::fs::read_dir(cases).unwrap() {
            let file = case.unwrap().path().join("expected.json");
            let text = std::fs::read_to_string(&file).unwrap();
            let value: Value = serde_json::from_str(&text).unwrap();
            assert_eq!(render(&value), text, "{}", file.display());
            seen += 1;
        }
        assert_eq!(seen, 326);
    }

    #[test]
    fn every_kind_of_difference_is_told() {
        let want = json!({
            "os": "linux", "architecture": "amd64", "created": "2023-11-14T22:13:20Z", "layers": 1,
            "config": { "Env": ["A=1"], "ArgsEscaped": true },
            "history": [{ "created_by": "RUN x", "empty_layer": false }],
            "delta": [{ "path": "/a", "type": "file", "sha256": "1", "text": "one" }],
            "removed": ["/b"],
        });
        assert_eq!(differences(&want, &want), Vec::<String>::new());
        let change = |pointer: &str, value: Value| {
            let mut got = want.clone();
            *got.pointer_mut(pointer).unwrap() = value;
            differences(&got, &want)
        };
        let none: [&str; 0] = [];
        for (pointer, value, told) in [
            ("/created", json!("2023-11-14T23:13:20+01:00"), &none[..]),
            (
                "/config",
                json!({ "Env": ["A=1"], "WorkingDir": "/" }),
                &none,
            ),
            ("/delta/0/text", json!("another"), &none),
            (
                "/os",
                json!("plan9"),
                &["os: got \"plan9\", want \"linux\""],
            ),
            ("/layers", json!(2), &["layers: got 2, want 1"]),
            (
                "/created",
                Value::Null,
                &["created: got null, want \"2023-11-14T22:13:20Z\""],
            ),
            (
                "/config/Env",
                json!(["A=2"]),
                &["config Env: got [\"A=2\"], want [\"A=1\"]"],
            ),
            (
                "/history",
                json!([]),
                &["history 1: got null, want {\"created_by\":\"RUN x\",\"empty_layer\":false}"],
            ),
            (
                "/delta/0/sha256",
                json!("2"),
                &["/a: sha256: got \"2\", want \"1\""],
            ),
            (
                "/delta/0/path",
                json!("/c"),
                &[
                    "/a is missing: {\"path\":\"/a\",\"sha256\":\"1\",\"text\":\"one\",\"type\":\"file\"}",
                    "/c should not be there: {\"path\":\"/c\",\"sha256\":\"1\",\"text\":\"one\",\"type\":\"file\"}",
                ],
            ),
            ("/removed", json!([]), &["removed: got [], want [\"/b\"]"]),
        ] {
            assert_eq!(change(pointer, value), told, "{pointer}");
        }
    }

    #[test]
    fn a_failure_has_to_say_what_and_where() {
        let stderr =
            "#3 RUN false\nDockerfile:3:5: Nothing of that name\n   3 | COPY word /\n     | ^\n";
        let judge = |code, want: Value| {
            let mut found = failure_differences(stderr, code, &want, "Dockerfile");
            found.pop();
            found
        };
        let none: [&str; 0] = [];
        assert_eq!(
            judge(
                Some(1),
                json!({ "must_mention": ["NAME"], "line": 2, "last_line": 3 })
            ),
            none
        );
        assert_eq!(
            judge(Some(4), json!({})),
            ["exit status Some(4), want 1, 2, 3 or 70"]
        );
        assert_eq!(
            judge(Some(1), json!({ "must_mention": ["path"], "line": 2 })),
            [
                "does not mention \"path\"",
                "points to Dockerfile:[3], want a line of 2 to 2"
            ]
        );
    }
}
