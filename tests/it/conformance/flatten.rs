//! The file system that layers amount to, and how it differs from another.
//!
//! A twin of `fixtures/conformance/flatten.py`, whose rules `fixtures/conformance/README.md` has.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value, json};

use crate::support::oci::hex;
use crate::support::tarball::Entry;

/// Times after this (2020-01-01T00:00:00Z) come from the build itself, earlier ones from its input.
pub const INPUT_TIME_LIMIT: i64 = 1_577_836_800;

/// What the specification allows as whiteouts.
///
/// <https://github.com/opencontainers/image-spec/blob/main/layer.md#whiteouts>
const WHITEOUT: &str = ".wh.";
const OPAQUE: &str = ".wh..wh..opq";

/// A file, directory or other thing, whatever its names are.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Node {
    kind: &'static str,
    mode: u32,
    uid: u64,
    gid: u64,
    mtime: i64,
    size: u64,
    sha256: String,
    short: Vec<u8>,
    link: String,
    device: (u64, u64),
    /// `security.capability`, the one attribute that builders agree to store, in hexadecimal.
    capability: Option<String>,
}

impl Node {
    fn directory() -> Self {
        Self {
            kind: "dir",
            mode: 0o755,
            uid: 0,
            gid: 0,
            mtime: i64::MAX,
            size: 0,
            sha256: String::new(),
            short: Vec::new(),
            link: String::new(),
            device: (0, 0),
            capability: None,
        }
    }

    fn of(entry: &Entry) -> Result<Self, String> {
        let kind = match entry.kind {
            '0' | '7' => "file",
            '2' => "symlink",
            '3' => "char",
            '4' => "block",
            '5' => "dir",
            '6' => "fifo",
            other => return Err(format!("{}: an entry of type {other:?}", entry.path)),
        };
        Ok(Self {
            kind,
            mode: entry.mode,
            uid: entry.uid,
            gid: entry.gid,
            mtime: entry.mtime,
            size: entry.size,
            sha256: entry.sha256.clone(),
            short: entry.short.clone(),
            link: if kind == "symlink" {
                entry.link.clone()
            } else {
                String::new()
            },
            device: entry.device,
            capability: entry
                .extensions
                .get("SCHILY.xattr.security.capability")
                .map(|value| hex(value)),
        })
    }

    /// Whether an image that has the one instead of the other is another image.
    fn differs(&self, other: &Self) -> bool {
        let essence = |node: &Self| {
            let mut node = node.clone();
            match node.kind {
                "symlink" => node.mode = 0,
                "dir" => node.mtime = 0,
                _ => {}
            }
            node
        };
        essence(self) != essence(other)
    }

    /// An element of `delta`. Of a file whose content varies neither that nor the time is told.
    fn describe(&self, path: &str, first_name: &str, varies: bool) -> Value {
        let mut entry = Map::new();
        let mut set = |key: &str, value: Value| entry.insert(key.to_owned(), value);
        set("path", path.into());
        set("type", self.kind.into());
        if self.kind != "symlink" {
            set("mode", format!("{:04o}", self.mode).into());
        }
        set("uid", self.uid.into());
        set("gid", self.gid.into());
        if self.kind == "file" && !varies {
            set("size", self.size.into());
            set("sha256", self.sha256.as_str().into());
            if let Ok(text) = std::str::from_utf8(&self.short)
                && !text.is_empty()
                && text
                    .chars()
                    .all(|c| !c.is_control() || matches!(c, '\n' | '\t' | '\r'))
            {
                set("text", text.into());
            }
        }
        match self.kind {
            "symlink" => drop(set("link", self.link.as_str().into())),
            "char" | "block" => {
                set("major", self.device.0.into());
                set("minor", self.device.1.into());
            }
            _ => {}
        }
        if let Some(capability) = &self.capability {
            set("xattrs", json!({ "security.capability": capability }));
        }
        if path != first_name {
            set("hardlink_of", first_name.into());
        }
        if self.mtime < INPUT_TIME_LIMIT && self.kind != "dir" && !varies {
            set("mtime", self.mtime.into());
        }
        entry.into()
    }
}

/// A file system: names that begin with `/`, and what they name. `/` is always there.
#[derive(Clone, Debug)]
pub struct Tree {
    nodes: Vec<Node>,
    /// Hard links are names of the same index.
    names: BTreeMap<String, usize>,
}

impl Tree {
    /// Nothing but `/`.
    pub fn new() -> Self {
        Self {
            nodes: vec![Node::directory()],
            names: BTreeMap::from([("/".to_owned(), 0)]),
        }
    }

    /// Puts a layer on top.
    ///
    /// # Errors
    /// What the layer has that makes no sense on what lies below.
    pub fn apply(&mut self, layer: &[Entry]) -> Result<(), String> {
        // What this layer itself has, which its whiteouts do not concern.
        let mut fresh = BTreeSet::new();
        for entry in layer {
            let path = self.locate(&entry.path)?;
            if path == "/" {
                self.nodes[0] = Node::of(entry)?;
                continue;
            }
            let (parent, name) = split(&path);
            if name == OPAQUE {
                for below in self.below(parent) {
                    if !fresh.contains(&below) {
                        self.names.remove(&below);
                    }
                }
                continue;
            }
            if let Some(name) = name.strip_prefix(WHITEOUT) {
                let gone = join(parent, name);
                if fresh.contains(&gone) {
                    return Err(format!("a layer has both {gone} and its whiteout"));
                }
                if !self.names.contains_key(&gone) {
                    return Err(format!("a whiteout of {gone}, which does not exist"));
                }
                self.remove(&gone);
                continue;
            }
            self.make_parents(parent);
            if entry.kind == '1' {
                let target = self.locate(&entry.link)?;
                let node = (self.names.get(&target).copied())
                    .filter(|&node| self.nodes[node].kind != "dir")
                    .ok_or_else(|| {
                        format!("{path} is a hard link to {}, which is no file", entry.link)
                    })?;
                self.remove(&path);
                self.names.insert(path.clone(), node);
            } else {
                let node = Node::of(entry)?;
                let both_directories = node.kind == "dir" && self.is_dir(&path);
                if !both_directories {
                    self.remove(&path);
                }
                self.nodes.push(node);
                self.names.insert(path.clone(), self.nodes.len() - 1);
            }
            let mut at = path.as_str();
            while at != "/" && fresh.insert(at.to_owned()) {
                at = split(at).0;
            }
        }
        Ok(())
    }

    /// What this adds to and changes in `base`, and what of `base` is gone.
    pub fn delta(&self, base: &Self, content_varies: &[String]) -> (Vec<Value>, Vec<Value>) {
        let mut first_names = BTreeMap::new();
        let mut changed = Vec::new();
        for (path, &index) in self.names.iter().filter(|(path, _)| *path != "/") {
            let node = &self.nodes[index];
            if base.node(path).is_none_or(|before| before.differs(node)) {
                let first = *first_names.entry(index).or_insert(path);
                changed.push(node.describe(path, first, content_varies.contains(path)));
            }
        }
        let removed = base
            .names
            .keys()
            .filter(|path| !self.names.contains_key(*path) && self.is_dir(split(path).0))
            .map(|path| path.as_str().into())
            .collect();
        (changed, removed)
    }

    fn node(&self, path: &str) -> Option<&Node> {
        self.names.get(path).map(|&index| &self.nodes[index])
    }

    fn is_dir(&self, path: &str) -> bool {
        self.node(path).is_some_and(|node| node.kind == "dir")
    }

    /// The place that an entry's name means: links in all parts but the last are followed.
    fn locate(&self, name: &str) -> Result<String, String> {
        let parts = |path: &str| -> Vec<String> {
            (path.split('/').rev())
                .filter(|part| !matches!(*part, "" | "."))
                .map(str::to_owned)
                .collect()
        };
        // Last part first, so that the next one is at the end.
        let mut rest = parts(name);
        if rest.is_empty() {
            return Ok("/".into());
        }
        let last = rest.remove(0);
        let mut at = "/".to_owned();
        let mut links = 0;
        while let Some(part) = rest.pop() {
            if part == ".." {
                at = split(&at).0.to_owned();
                continue;
            }
            let next = join(&at, &part);
            match self.node(&next) {
                Some(node) if node.kind == "symlink" => {
                    links += 1;
                    if links > 255 {
                        return Err(format!("too many symbolic links at {next}"));
                    }
                    if node.link.starts_with('/') {
                        "/".clone_into(&mut at);
                    }
                    rest.extend(parts(&node.link));
                }
                _ => at = next,
            }
        }
        Ok(join(&at, &last))
    }

    fn make_parents(&mut self, path: &str) {
        if self.is_dir(path) {
            return;
        }
        self.make_parents(split(path).0);
        self.remove(path);
        self.nodes.push(Node::directory());
        self.names.insert(path.to_owned(), self.nodes.len() - 1);
    }

    /// Removes a name and all below it.
    fn remove(&mut self, path: &str) {
        self.names.remove(path);
        for below in self.below(path) {
            self.names.remove(&below);
        }
    }

    fn below(&self, path: &str) -> Vec<String> {
        let prefix = join(path, "");
        (self.names.range(prefix.clone()..))
            .map(|(name, _)| name)
            .take_while(|name| name.starts_with(&prefix))
            .filter(|name| *name != "/")
            .cloned()
            .collect()
    }
}

/// The directory and the name in it; `/` is its own directory.
fn split(path: &str) -> (&str, &str) {
    match path.rsplit_once('/') {
        Some(("", name)) => ("/", name),
        Some(both) => both,
        None => ("/", path),
    }
}

fn join(directory: &str, name: &str) -> String {
    format!("{}/{name}", directory.trim_end_matches('/'))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(kind: char, path: &str, link: &str) -> Entry {
        Entry {
            path: path.into(),
            kind,
            mode: 0o644,
            uid: 0,
            gid: 0,
            size: 0,
            mtime: 1,
            link: link.into(),
            device: (0, 0),
            extensions: BTreeMap::new(),
            sha256: String::new(),
            short: Vec::new(),
        }
    }

    fn paths(changed: &[Value]) -> Vec<&str> {
        (changed.iter())
            .map(|entry| entry["path"].as_str().expect("every entry has a path"))
            .collect()
    }

    #[test]
    fn layers_are_applied_and_compared() {
        let mut base = Tree::new();
        base.apply(&[
            entry('5', "d", ""),
            entry('0', "d/a", ""),
            entry('0', "d/b", ""),
            entry('0', "d-e", ""),
            entry('5', "opaque", ""),
            entry('0', "opaque/old", ""),
            entry('2', "l", "d"),
        ])
        .unwrap();
        let mut tree = base.clone();
        assert_eq!(tree.delta(&base, &[]), (vec![], vec![]));

        tree.apply(&[
            // Through a link, as a file system would.
            entry('0', "l/new", ""),
            entry('1', "d/same", "d/new"),
            entry('0', "d/.wh.a", ""),
            entry('5', "opaque/kept", ""),
            entry('0', "opaque/.wh..wh..opq", ""),
            entry('0', "implied/f", ""),
        ])
        .unwrap();
        let (changed, removed) = tree.delta(&base, &[]);
        assert_eq!(
            paths(&changed),
            [
                "/d/new",
                "/d/same",
                "/implied",
                "/implied/f",
                "/opaque/kept"
            ]
        );
        assert_eq!(changed[1]["hardlink_of"], "/d/new");
        assert_eq!(removed, ["/d/a", "/opaque/old"]);

        // A directory stands for what was in it, and nothing is told of what a file replaced.
        tree.apply(&[entry('0', ".wh.opaque", ""), entry('0', "d", "")])
            .unwrap();
        let (changed, removed) = tree.delta(&base, &[]);
        assert_eq!(paths(&changed), ["/d", "/implied", "/implied/f"]);
        assert_eq!(removed, ["/opaque"]);
    }

    #[test]
    fn layers_that_contradict_themselves_are_refused() {
        for (layer, wrong) in [
            (
                vec![entry('0', ".wh.a", "")],
                "a whiteout of /a, which does not exist",
            ),
            (
                vec![entry('0', "a", ""), entry('0', ".wh.a", "")],
                "a layer has both /a and its whiteout",
            ),
            (
                vec![entry('5', "a", ""), entry('1', "b", "a")],
                "/b is a hard link to a, which is no file",
            ),
            (
                vec![entry('2', "a", "a"), entry('0', "a/b", "")],
                "too many symbolic links at /a",
            ),
            (vec![entry('S', "a", "")], "a: an entry of type 'S'"),
        ] {
            assert_eq!(Tree::new().apply(&layer), Err(wrong.to_owned()));
        }
    }

    #[test]
    fn times_count_where_the_input_decides_them() {
        let of = |kind, mtime| {
            let mut entry = entry(kind, "x", "");
            entry.mtime = mtime;
            let mut tree = Tree::new();
            tree.apply(&[entry]).unwrap();
            tree
        };
        let file = of('0', 5);
        assert_eq!(of('0', 6).delta(&file, &[]).0[0]["mtime"], 6);
        assert_eq!(
            of('0', INPUT_TIME_LIMIT).delta(&file, &[]).0[0]["mtime"],
            Value::Null
        );
        assert_eq!(of('5', 6).delta(&of('5', 5), &[]).0, Vec::<Value>::new());
    }
}
