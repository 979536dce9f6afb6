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

/// What BuildKit's lexer is tested with, from `fixtures/dockerfiles/expansions.txt`.
#[test]
fn texts_are_expanded_as_buildkit_does() {
    use dockerfile::expand::{Environment, Options, expand};
    let table = fs::read_to_string(root().join("fixtures/dockerfiles/expansions.txt")).unwrap();
    let mut environment = Environment::new();
    let mut as_words = false;
    let mut count = 0;
    let mut differing = Vec::new();
    for line in table.lines().filter(|line| !line.starts_with('#')) {
        let mut columns = line.split('\t');
        let text = columns.next().unwrap();
        if ["@", "@words"].contains(&text) {
            as_words = text == "@words";
            environment = columns
                .map(|pair| pair.split_once('=').unwrap())
                .map(|(name, value)| (name.to_owned(), value.to_owned()))
                .collect();
            continue;
        }
        count += 1;
        let expected: Vec<&str> = columns.collect();
        let found: Vec<String> = match expand(text, '\\', &environment, Options::default()) {
            Err(_) => vec!["error".to_owned()],
            Ok(expansion) if as_words => expansion.words,
            Ok(expansion) => [
                expansion.text,
                Vec::from_iter(expansion.used).join(" "),
                Vec::from_iter(expansion.unset).join(" "),
            ]
            .into_iter()
            .take(expected.len())
            .collect(),
        };
        if found != expected {
            differing.push(format!("{text}: {expected:?}, found {found:?}"));
        }
    }
    assert!(differing.is_empty(), "{}", differing.join("\n"));
    assert!(count > 250, "{count}");
}

/// The instructions of a Dockerfile without their places, for comparison.
fn without_places(file: &Dockerfile) -> String {
    let mut file = file.clone();
    for instruction in file.stages.iter_mut().flat_map(|s| &mut s.instructions) {
        if let dockerfile::InstructionKind::Onbuild { expression, .. } = &mut instruction.kind {
            // Blanks at the end of its first line have no other text.
            let (first, rest) =
                expression.split_at(expression.find('\n').unwrap_or(expression.len()));
            *expression = format!("{}{rest}", first.trim_end());
        }
    }
    let shown = format!(
        "{:?} {:?} {:?}",
        file.directives, file.global_args, file.stages
    );
    let mut out = String::new();
    let mut rest = shown.as_str();
    while let Some(at) = rest.find("..") {
        let digit = |c: char| c.is_ascii_digit();
        out.push_str(rest[..at].trim_end_matches(digit));
        out.push_str("..");
        rest = rest[at + 2..].trim_start_matches(digit);
    }
    out + rest
}

/// Parses, prints, parses and prints.
fn round_trip(file: &Dockerfile) {
    let printed = file.to_string();
    let again = dockerfile::parse(&file.name, printed.as_bytes())
        .unwrap_or_else(|error| panic!("{error}\n--- of\n{}\n--- printed\n{printed}", file.text));
    assert_eq!(without_places(file), without_places(&again), "{printed}");
    assert_eq!(printed, again.to_string());
}

#[test]
fn what_is_printed_parses_to_the_same() {
    let mut files = dockerfiles(&root().join("fixtures/dockerfiles/good"));
    let cases = root().join("fixtures/conformance/cases");
    if let Ok(entries) = fs::read_dir(&cases) {
        let found = entries.map(|entry| entry.unwrap().path().join("Dockerfile"));
        files.extend(found.filter(|path| path.is_file()));
    }
    let mut count = 0;
    for path in &files {
        match dockerfile::parse("Dockerfile", &fs::read(path).unwrap()) {
            Ok(file) => round_trip(&file),
            Err(_) => continue,
        }
        count += 1;
    }
    assert!(count * 4 > files.len() * 3, "{count} of {}", files.len());
}

/// What BuildKit builds is parsed. What it refuses and the parser refuses too is refused in
/// the same instruction and with the words that matter; the rest is for the planner.
#[test]
fn conformance_cases_are_parsed_or_refused() {
    let cases = root().join("fixtures/conformance/cases");
    let Ok(entries) = fs::read_dir(&cases) else {
        skip!("{} does not exist", cases.display());
    };
    let mut wrong = Vec::new();
    let mut refused = 0;
    for entry in entries {
        let case = entry.unwrap().path();
        let Ok(text) = fs::read(case.join("Dockerfile")) else {
            continue;
        };
        let expected: serde_json::Value =
            serde_json::from_slice(&fs::read(case.join("expected.json")).unwrap()).unwrap();
        let name = case.file_name().unwrap().to_string_lossy().into_owned();
        match dockerfile::parse("Dockerfile", &text) {
            Ok(_) => {}
            Err(error) if expected.get("error").is_none() => {
                wrong.push(format!("{name} is refused: {error}"));
            }
            Err(error) => {
                refused += 1;
                let (line, _) = line_column(&error.text, error.problems[0].span.start);
                let shown = error.to_string();
                // BuildKit names the first line of an instruction, this parser the very line.
                if let Some(expected) = expected["line"].as_u64() {
                    let between = error
                        .text
                        .lines()
                        .take(line - 1)
                        .skip(expected as usize - 1);
                    let continued = between.clone().all(|l| l.trim_end().ends_with('\\'));
                    if (line as u64) < expected || !continued {
                        wrong.push(format!("{name} is not refused in line {expected}: {shown}"));
                    }
                }
                for word in expected["must_mention"].as_array().into_iter().flatten() {
                    let word = word.as_str().unwrap();
                    if !shown.to_lowercase().contains(&word.to_lowercase()) {
                        wrong.push(format!("{name} does not mention {word}: {shown}"));
                    }
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(refused > 20, "{refused}");
}

mod laws {
    use std::fs;

    use proptest::prelude::*;
    use sockless::dockerfile::expand::{Environment, MAX_EXPANSION_BYTES, Options, expand};
    use sockless::dockerfile::{self, InstructionKind, parse_check, parse_mount};

    use super::{dockerfiles, root, round_trip};

    /// Whatever the bytes are: an answer, with places inside the text; and what can be
    /// parsed can be printed.
    fn parse_anything(bytes: &[u8]) {
        match dockerfile::parse("Dockerfile", bytes) {
            Ok(file) => {
                round_trip(&file);
                for instruction in file.stages.iter().flat_map(|stage| &stage.instructions) {
                    let span = instruction.span;
                    assert!(file.text.get(span.start..span.end).is_some());
                    // Nothing multiplies what was written, except one here-document that
                    // is named several times.
                    if !matches!(
                        instruction.kind,
                        InstructionKind::Copy(_) | InstructionKind::Add(_)
                    ) {
                        let shown = format!("{:?}", instruction.kind).len();
                        assert!(shown < 4096 + 64 * bytes.len(), "{shown}");
                    }
                }
            }
            Err(error) => {
                assert!(!error.problems.is_empty());
                assert!(error.problems.len() <= dockerfile::MAX_PROBLEMS);
                for problem in &error.problems {
                    let span = problem.span;
                    assert!(
                        error.text.get(span.start..span.end).is_some(),
                        "{problem:?}"
                    );
                    assert!(problem.message.len() < 4096, "{}", problem.message);
                }
                assert!(error.to_string().len() < 4096 * error.problems.len());
            }
        }
        let _ = dockerfile::parse_trigger(&String::from_utf8_lossy(bytes));
    }

    fn expand_anything(text: &str, environment: &Environment) {
        for escape in ['\\', '`'] {
            for bits in 0..16u8 {
                let options = Options {
                    keep_quotes: bits & 1 > 0,
                    keep_escapes: bits & 2 > 0,
                    literal_quotes: bits & 4 > 0,
                    keep_unset: bits & 8 > 0,
                };
                match expand(text, escape, environment, options) {
                    Ok(expansion) => assert!(
                        expansion.text.len() <= MAX_EXPANSION_BYTES + text.len(),
                        "{}",
                        expansion.text.len()
                    ),
                    Err(error) => {
                        assert!(text.get(error.range.clone()).is_some(), "{error}: {text:?}");
                        assert!(error.to_string().len() < 64 << 10);
                    }
                }
            }
        }
    }

    fn environment() -> Environment {
        [
            ("A", "a"),
            ("E", ""),
            ("P", "*?\\"),
            ("L", "x y\nz/*}"),
            ("é", "é"),
        ]
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .into()
    }

    /// Pieces that mean something to one part of the parser or another.
    fn piece() -> impl Strategy<Value = String> {
        let fixed = prop::sample::select(vec![
            "FROM a",
            "FROM a AS b",
            "ARG A=1",
            "RUN ",
            "COPY ",
            "ADD ",
            "ENV ",
            "LABEL ",
            "CMD ",
            "ENTRYPOINT ",
            "SHELL ",
            "VOLUME ",
            "EXPOSE ",
            "USER ",
            "WORKDIR ",
            "STOPSIGNAL ",
            "HEALTHCHECK ",
            "MAINTAINER ",
            "ONBUILD ",
            "onbuild run ",
            "CMD",
            "NONE",
            "\n",
            "\n",
            "\n",
            "\n",
            "\r\n",
            "\r",
            "\\",
            "\\\n",
            "`",
            "`\n",
            " ",
            " ",
            "\t",
            "\x0b",
            "\0",
            "\u{feff}",
            "\u{a0}",
            "#",
            "# x\n",
            "# escape=`\n",
            "# syntax=a b\n",
            "# check=skip=A;error=true\n",
            "#!/bin/x\n",
            "<<",
            "<<A",
            "<<-A",
            "2<<'A'",
            "<<\"A B\"",
            "A",
            "A\n",
            "\tA\n",
            "A B\n",
            "a",
            "b=c",
            "=",
            "\"",
            "'",
            "[",
            "]",
            "[\"a\"]",
            "[\"a\", \"b\"]",
            "[1]",
            ",",
            ":",
            "--",
            "--from=a",
            "--link",
            "--mount=",
            "type=cache",
            "target=/x",
            "--chmod=1",
            "--interval=1s",
            "$",
            "${",
            "}",
            "$A",
            "${A}",
            "${A:-b}",
            "${A#b}",
            "${A//b/c}",
            "é",
            "/x",
            "/x\n",
        ]);
        prop_oneof![8 => fixed.prop_map(str::to_owned), 1 => "\\PC{0,4}", 1 => any::<char>().prop_map(String::from)]
    }

    /// An instruction without faults, so that whole files of them parse.
    fn instruction() -> impl Strategy<Value = String> {
        let word = "[a-z$/.é\\\\\"'{}:=-]{1,8}";
        prop_oneof![
            "[ -~é\\\\`#<\t]{0,40}".prop_map(|text| format!("RUN {text}")),
            "[ -~é\\\\`\n#]{0,60}"
                .prop_map(|text| format!("RUN <<END 3<<-'Z Z'\n{text}\nEND\n\t{text}\nZ Z")),
            ("[a-z/ ]{1,10}", word)
                .prop_map(|(a, b)| format!("COPY --link --chown={b} {a} <<-X /d{b}\n\t{a}\n\tX")),
            (word, "[a-z \\\\\"']{0,9}").prop_map(|(a, b)| format!("ENV k{a} {b}x")),
            "[a-z \\\\]{0,9}".prop_map(|a| format!("ENV a=\"{a}x\" b='{a}' \\\n# c\n c=d")),
            "[ -~]{1,30}".prop_map(|text| format!("ONBUILD RUN x{text}")),
            "[a-z]{1,9}".prop_map(|text| format!(
                "ONBUILD ADD <<E <<E <<-F /\n{text}\nE\nx\nE\n{text}\n\tF"
            )),
            prop::collection::vec("\\PC{0,5}", 0..4)
                .prop_map(|list| format!("cmd {}", serde_json::to_string(&list).unwrap())),
            "[a-z ]{0,20}".prop_map(|text| format!("HEALTHCHECK --retries=3 CMD x{text}")),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, cases: 256, ..ProptestConfig::default() })]

        #[test]
        fn any_bytes_have_an_answer(bytes in prop::collection::vec(any::<u8>(), 0..512)) {
            parse_anything(&bytes);
            expand_anything(&String::from_utf8_lossy(&bytes), &environment());
        }

        #[test]
        fn any_pieces_have_an_answer(pieces in prop::collection::vec(piece(), 0..40)) {
            let text = pieces.concat();
            parse_anything(text.as_bytes());
            parse_anything(format!("FROM a\n{text}").as_bytes());
            expand_anything(&text, &environment());
            if let Err(error) = parse_check(&text) {
                prop_assert!(text.get(error.range).is_some());
            }
            let mut expand_one = |text: &str| {
                Ok(expand(text, '\\', &environment(), Options::default())?.text)
            };
            if let Err(error) = parse_mount(&text, &mut expand_one) {
                prop_assert!(text.get(error.range).is_some());
            }
        }

        #[test]
        fn good_dockerfiles_survive_printing(
            escape in any::<bool>(),
            instructions in prop::collection::vec(instruction(), 1..8),
        ) {
            let directive = if escape { "# escape=`\n" } else { "" };
            let text = format!("{directive}FROM a AS B\n{}\n", instructions.join("\n"));
            parse_anything(text.as_bytes());
        }

        #[test]
        fn damaged_dockerfiles_have_an_answer(
            file in any::<prop::sample::Index>(),
            other in any::<prop::sample::Index>(),
            at in any::<prop::sample::Index>(),
            from in any::<prop::sample::Index>(),
            length in 0usize..80,
            removed in 0usize..8,
        ) {
            let mut files = dockerfiles(&root().join("fixtures/dockerfiles/good"));
            files.extend(dockerfiles(&root().join("fixtures/dockerfiles/bad")));
            let bytes = fs::read(file.get(&files)).unwrap();
            let donor = fs::read(other.get(&files)).unwrap();
            let at = at.index(bytes.len() + 1);
            let from = from.index(donor.len() + 1);
            let part = &donor[from..donor.len().min(from + length)];
            let after = &bytes[bytes.len().min(at + removed)..];
            parse_anything(&[&bytes[..at], part, after].concat());
        }
    }

    /// What fuzzing started from and found.
    #[test]
    fn the_corpus_has_answers() {
        let directory = root().join("fixtures/dockerfiles/fuzz");
        let mut count = 0;
        for entry in fs::read_dir(directory).unwrap() {
            let bytes = fs::read(entry.unwrap().path()).unwrap();
            parse_anything(&bytes);
            expand_anything(&String::from_utf8_lossy(&bytes), &environment());
            count += 1;
        }
        assert!(count > 10, "{count}");
    }

    #[test]
    fn depth_and_growth_are_limited() {
        let deep = |open: &str, close: &str| open.repeat(20_000) + &close.repeat(20_000);
        for (open, close) in [
            ("${a:-", "}"),
            ("${a:-\"", "\"}"),
            ("${a/", "/}"),
            ("${a#", "}"),
            ("[", "]"),
            ("{\"a\":", "}"),
        ] {
            let text = deep(open, close);
            expand_anything(&text, &Environment::new());
            parse_anything(format!("FROM a\nRUN {text} <<A\nx\nA\n").as_bytes());
        }
        // Each name doubles the one before.
        let mut environment = Environment::from([("A".to_owned(), "x".repeat(64))]);
        let mut doublings = 0;
        while let Ok(expansion) = expand("$A$A", '\\', &environment, Options::default()) {
            assert!(expansion.text.len() <= MAX_EXPANSION_BYTES);
            environment.insert("A".to_owned(), expansion.text);
            doublings += 1;
        }
        assert_eq!(doublings, 16);
    }
}
