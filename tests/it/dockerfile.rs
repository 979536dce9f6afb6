//! Dockerfiles in, typed instructions or exact messages out.
//!
//! `fixtures/dockerfiles/good/NAME.Dockerfile` belongs to `NAME.dump`, what was parsed;
//! `fixtures/dockerfiles/bad/NAME.Dockerfile` to `NAME.message`, the whole message. After an
//! intended change `SOCKLESS_REGENERATE=1 cargo test --test it dockerfile` writes them anew;
//! read the difference before committing it.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use sockless::dockerfile::{self, Dockerfile, Instruction, Span, line_column};

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// The Dockerfiles in a directory of fixtures, by name.
fn dockerfiles(directory: &Path) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|e| e == "Dockerfile"))
        .collect();
    found.sort();
    assert!(!found.is_empty(), "{}", directory.display());
    found
}

/// Compares `found` with the file `path`, or writes it there.
fn compare(path: &Path, found: &str, differing: &mut Vec<String>) {
    if std::env::var_os("SOCKLESS_REGENERATE").is_some_and(|v| v == "1") {
        fs::write(path, found).unwrap();
        return;
    }
    let expected = fs::read_to_string(path).unwrap_or_default();
    if expected != found {
        differing.push(format!(
            "{}\n--- expected\n{expected}\n--- found\n{found}",
            path.display()
        ));
    }
}

fn dump(file: &Dockerfile) -> String {
    let mut out = format!("{:?}\n", file.directives);
    let line = |out: &mut String, span: Span, original: &str, what: &str| {
        let (line, column) = line_column(&file.text, span.start);
        let (last_line, last_column) = line_column(&file.text, span.end);
        writeln!(
            out,
            "{line}:{column}-{last_line}:{last_column} {original:?}\n    {what}"
        )
        .unwrap();
    };
    let instruction = |out: &mut String, i: &Instruction| {
        line(out, i.span, &i.original, &format!("{:?}", i.kind));
    };
    for argument in &file.global_args {
        instruction(&mut out, argument);
    }
    for stage in &file.stages {
        let what = format!("{:?} {:?} {:?}", stage.base, stage.name, stage.platform);
        line(&mut out, stage.span, &stage.original, &what);
        for i in &stage.instructions {
            instruction(&mut out, i);
        }
    }
    out
}

#[test]
fn good_dockerfiles_are_parsed() {
    let mut differing = Vec::new();
    for path in dockerfiles(&root().join("fixtures/dockerfiles/good")) {
        let file = dockerfile::parse("Dockerfile", &fs::read(&path).unwrap())
            .unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        compare(&path.with_extension("dump"), &dump(&file), &mut differing);
    }
    assert!(differing.is_empty(), "{}", differing.join("\n"));
}

#[test]
fn bad_dockerfiles_are_explained() {
    let mut differing = Vec::new();
    for path in dockerfiles(&root().join("fixtures/dockerfiles/bad")) {
        let Err(error) = dockerfile::parse("Dockerfile", &fs::read(&path).unwrap()) else {
            panic!("{} was parsed", path.display());
        };
        let found = format!("{error}\n");
        compare(&path.with_extension("message"), &found, &mut differing);
    }
    assert!(differing.is_empty(), "{}", differing.join("\n"));
}

/// Every prefix and every file with a byte removed: whatever comes out, nothing panics, and
/// places lie inside the text.
#[test]
fn damaged_dockerfiles_do_no_harm() {
    let mut files = dockerfiles(&root().join("fixtures/dockerfiles/good"));
    files.extend(dockerfiles(&root().join("fixtures/dockerfiles/bad")));
    for path in files {
        let bytes = fs::read(&path).unwrap();
        for at in 0..bytes.len() {
            let removed = [&bytes[..at], &bytes[at + 1..]].concat();
            for damaged in [&bytes[..at], &removed] {
                if let Err(error) = dockerfile::parse("Dockerfile", damaged) {
                    assert!(!error.problems.is_empty());
                    for problem in &error.problems {
                        let Span { start, end } = problem.span;
                        assert!(
                            start <= end && end <= error.text.len(),
                            "{}",
                            path.display()
                        );
                        assert!(error.text.get(start..end).is_some(), "{}", path.display());
                    }
                    assert!(error.to_string().contains("Dockerfile:"));
                }
            }
        }
    }
}

/// What `ONBUILD` keeps in the image is what `parse_trigger` reads there.
#[test]
fn triggers_survive_the_image() {
    use dockerfile::InstructionKind;
    let mut seen = 0;
    for path in dockerfiles(&root().join("fixtures/dockerfiles/good")) {
        let file = dockerfile::parse("Dockerfile", &fs::read(&path).unwrap()).unwrap();
        for instruction in file.stages.iter().flat_map(|stage| &stage.instructions) {
            let InstructionKind::Onbuild {
                expression,
                trigger,
            } = &instruction.kind
            else {
                continue;
            };
            seen += 1;
            let again = dockerfile::parse_trigger(expression)
                .unwrap_or_else(|error| panic!("{}: {error}", path.display()));
            assert_eq!(again.original, trigger.original, "{}", path.display());
            assert_eq!(again.kind.name(), trigger.kind.name());
        }
    }
    assert!(seen > 5, "{seen}");
}
