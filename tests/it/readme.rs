//! Tables in README.md: settings, made from the table that the program reads by, and the tests of
//! known holes, made from the sources.
//!
//! After a change, `SOCKLESS_REGENERATE=1 cargo test --test it readme` writes them anew.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use crate::support::repository;

/// What stands between two lines of README.md is what `make` makes of it; or is written so.
#[track_caller]
fn check(begin: &str, end: &str, make: impl Fn(&str) -> String) {
    // Two tests may write at the same time.
    static LOCK: std::sync::Mutex<()> = std::sync::Mutex::new(());
    let _guard = LOCK.lock();
    let path = repository().join("README.md");
    let text = std::fs::read_to_string(&path).expect("README.md");
    let (before, rest) = text.split_once(begin).expect("the begin of the table");
    let (table, after) = rest.split_once(end).expect("the end of the table");
    let want = make(table);
    if std::env::var_os("SOCKLESS_REGENERATE").is_some() {
        std::fs::write(&path, format!("{before}{begin}{want}{end}{after}")).expect("README.md");
    } else {
        assert_eq!(table, want, "see the top of tests/it/readme.rs");
    }
}

#[test]
fn readme_has_the_settings_of_the_program() {
    check(
        "<!-- settings: made from src/config.rs -->\n",
        "<!-- end of settings -->",
        |_| format!("\n{}\n", sockless::config::settings_table_markdown().trim()),
    );
}

/// How many classes of holes there are.
const HOLES: usize = 22;

/// Every row has tests, every test that is named is there, and every test of a hole is named.
#[test]
fn readme_names_the_tests_of_every_known_hole() {
    let mut tests = BTreeMap::new();
    for dir in ["src", "tests"] {
        tests_below(&repository().join(dir), &mut tests);
    }
    let rows: Vec<usize> = tests.keys().copied().collect();
    assert_eq!(
        rows,
        (1..=HOLES).collect::<Vec<_>>(),
        "rows that have tests"
    );
    check(
        "<!-- holes: tests are filled in from the sources -->\n",
        "<!-- end of holes -->",
        |table| {
            let mut lines = table.lines();
            let mut made: Vec<String> = lines.by_ref().take(2).map(str::to_owned).collect();
            for (number, line) in (1..).zip(lines) {
                let cells: Vec<&str> = line.split(" | ").collect();
                assert_eq!(cells[0], format!("| S{number}"), "{line}");
                let names: Vec<String> = tests[&number].iter().map(|n| format!("`{n}`")).collect();
                made.push(format!(
                    "{} | {} | {} |",
                    cells[0],
                    cells[1],
                    names.join(", ")
                ));
            }
            assert_eq!(made.len(), HOLES + 2, "rows of the table");
            made.join("\n") + "\n"
        },
    );
}

/// Row → names of functions `security_sROW_…` that are tests.
fn tests_below(path: &Path, found: &mut BTreeMap<usize, BTreeSet<String>>) {
    if path.is_dir() {
        for entry in std::fs::read_dir(path).expect("a directory of sources") {
            tests_below(&entry.expect("an entry").path(), found);
        }
        return;
    }
    if path.extension().is_none_or(|extension| extension != "rs") {
        return;
    }
    let text = std::fs::read_to_string(path).expect("a source");
    let mut is_test = false;
    for line in text.lines().map(str::trim) {
        let Some((_, name)) = line.split_once("fn security_s") else {
            is_test |= line.starts_with("#[test]") || line.starts_with("#[tokio::test");
            is_test &= line.starts_with('#') || line.starts_with("//");
            continue;
        };
        // Texts that show how such a name looks have no number.
        let Some(row) = name.get(..2).and_then(|row| row.parse().ok()) else {
            continue;
        };
        assert!(is_test, "{}: {line}: not a test", path.display());
        is_test = false;
        let (name, _) = name.split_once('(').expect("a function");
        let names: &mut BTreeSet<String> = found.entry(row).or_default();
        names.insert(format!("security_s{name}"));
    }
}
