//! Which module may use which: the map in `lib.rs` as a table that fails when code leaves it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use crate::support::repository;

/// A module, and the modules that it may name. Leaves that anyone may use are in [`ANYONE`].
const MAY_USE: &[(&str, &[&str])] = &[
    ("main", &["cli", "sandbox"]),
    (
        "cli",
        &[
            "config",
            "pipeline",
            "service",
            "dockerfile",
            "image",
            "lint",
            "registry",
            "sandbox",
            "store",
            "failure",
            "context",
            "plan",
            "session",
        ],
    ),
    (
        "service",
        &["config", "confined", "store", "image", "failure"],
    ),
    (
        "pipeline",
        &[
            "dockerfile",
            "call",
            "lint",
            "plan",
            "registry",
            "context",
            "build",
            "export",
            "image",
            "layer",
            "layout",
            "remote",
            "session",
            "store",
            "sandbox",
            "rootfs",
            "failure",
        ],
    ),
    (
        "build",
        &[
            "plan",
            "dockerfile",
            "context",
            "rootfs",
            "sandbox",
            "layer",
            "layout",
            "registry",
            "remote",
            "session",
            "store",
            "image",
            "confined",
            "owners",
        ],
    ),
    (
        "export",
        &["layer", "layout", "rootfs", "confined", "store", "image"],
    ),
    ("layer", &["rootfs", "store", "image", "confined", "owners"]),
    ("registry", &["store", "image"]),
    (
        "remote",
        &[
            "registry", "session", "store", "image", "confined", "rootfs",
        ],
    ),
    ("layout", &["registry", "store", "image"]),
    ("call", &["dockerfile", "lint"]),
    ("lint", &["dockerfile", "image"]),
    ("plan", &["dockerfile", "context", "remote", "image"]),
    ("store", &["image", "confined", "owners"]),
    (
        "context",
        &["confined", "image", "layer", "remote", "rootfs"],
    ),
    ("rootfs", &["confined", "image", "owners"]),
    ("config", &["image", "sandbox", "rootfs", "registry"]),
    (
        "failure",
        &[
            "build",
            "context",
            "dockerfile",
            "export",
            "layer",
            "layout",
            "lint",
            "registry",
            "remote",
            "sandbox",
            "session",
            "store",
        ],
    ),
    ("session", &["dockerfile"]),
    ("confined", &[]),
    ("owners", &["confined"]),
    ("dockerfile", &[]),
    ("image", &[]),
    ("sandbox", &["confined", "owners"]),
    ("io", &["image"]),
    ("secret", &[]),
    ("progress", &["image"]),
];

/// Small, and of no knowledge of the rest.
const ANYONE: &[&str] = &["io", "secret", "progress"];

#[test]
fn modules_use_only_what_the_map_allows() {
    let source = repository().join("src");
    let allowed: BTreeMap<_, BTreeSet<_>> = MAY_USE
        .iter()
        .map(|(module, uses)| (*module, uses.iter().chain(ANYONE).copied().collect()))
        .collect();
    let mut wrong = Vec::new();
    let mut seen = BTreeSet::new();
    for file in files(&source) {
        let module = module_of(&source, &file);
        if module == "lib" {
            continue;
        }
        let Some(may) = allowed.get(module.as_str()) else {
            wrong.push(format!(
                "{}: module {module:?} is not in the table",
                file.display()
            ));
            continue;
        };
        seen.insert(module.clone());
        let text = std::fs::read_to_string(&file).expect("our own source");
        for (line, used) in uses(&text) {
            if used != module && !may.contains(used.as_str()) {
                wrong.push(format!("{}:{line}: {module} uses {used}", file.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(
        seen.len() > 5,
        "too few modules found below {}: {seen:?}",
        source.display()
    );
}

fn files(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).expect("our own source").flatten() {
        let path = entry.path();
        if path.is_dir() {
            found.extend(files(&path));
        } else if path.extension().is_some_and(|e| e == "rs") {
            found.push(path);
        }
    }
    found.sort();
    found
}

/// The first part of a file's path below `src`.
fn module_of(source: &Path, file: &Path) -> String {
    let relative = file.strip_prefix(source).expect("found below it");
    let first = relative.iter().next().expect("a file").to_string_lossy();
    first.trim_end_matches(".rs").to_owned()
}

/// Modules named as `crate::…` (in `main.rs` as `sockless::…`), each with its line, outside comments
/// and tests, which may use anything.
fn uses(text: &str) -> Vec<(usize, String)> {
    let code: Vec<&str> = text
        .lines()
        .take_while(|line| !line.starts_with("#[cfg(test)]"))
        .map(|line| line.split("//").next().unwrap_or_default())
        .collect();
    let mut starts = Vec::new();
    let whole = code.join("\n");
    for prefix in ["crate::", "sockless::"] {
        for (at, _) in whole.match_indices(prefix) {
            let boundary = whole[..at].chars().next_back();
            if !boundary.is_some_and(|c| c.is_alphanumeric() || c == '_' || c == ':') {
                starts.push((at, &whole[at + prefix.len()..]));
            }
        }
    }
    let mut found = Vec::new();
    for (at, rest) in starts {
        let line = whole[..at].matches('\n').count() + 1;
        for name in names(rest) {
            found.push((line, name));
        }
    }
    found
}

/// `a::b` → `a`; `{a::b, c::{d, e}, f}` → `a`, `c`, `f`. Types and macros at the root are no modules.
fn names(rest: &str) -> Vec<String> {
    let word = |text: &str| -> String {
        text.trim()
            .chars()
            .take_while(|c| c.is_alphanumeric() || *c == '_')
            .collect()
    };
    let Some(list) = rest.strip_prefix('{') else {
        let name = word(rest);
        return if rest[name.len()..].starts_with("::") || rest[name.len()..].starts_with([';', ','])
        {
            vec![name]
        } else {
            Vec::new()
        };
    };
    let mut depth = 0;
    let mut items = vec![String::new()];
    for c in list.chars() {
        match c {
            '{' => depth += 1,
            '}' if depth == 0 => break,
            '}' => depth -= 1,
            ',' if depth == 0 => {
                items.push(String::new());
                continue;
            }
            _ => {}
        }
        items.last_mut().expect("never empty").push(c);
    }
    items
        .iter()
        .map(|item| word(item))
        .filter(|name| !name.is_empty())
        .collect()
}

#[test]
fn the_check_sees_every_form_of_use() {
    let check = |text: &str, expected: &[&str]| {
        let got: Vec<_> = uses(text).into_iter().map(|(_, name)| name).collect();
        assert_eq!(got, expected, "{text}");
    };
    check("use crate::image::Digest;", &["image"]);
    check(
        "use crate::{image::Digest, store::{Blob, Store}, io};",
        &["image", "store", "io"],
    );
    check(
        "use crate::{\n    registry,\n    sandbox,\n};",
        &["registry", "sandbox"],
    );
    check("use crate::registry;", &["registry"]);
    check(
        "fn f(x: crate::secret::Secret) {} // crate::cli::X",
        &["secret"],
    );
    check("use other_crate::image; use a::crate::b;", &[]);
    check("use sockless::cli::main;", &["cli"]);
    check(
        "fn f() {}\n#[cfg(test)]\nmod tests { use crate::cli::X; }",
        &[],
    );
}
