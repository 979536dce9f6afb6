//! `--check`, `--call`: questions that are answered without building.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::path::Path;

use serde_json::{Value, json};
use sockless::call::{CheckResults, Outline, Targets};
use sockless::dockerfile::{self, Dockerfile, Span, line_column};
use sockless::image::Platform;
use sockless::lint::{self, Facts, Lines, Placed, Source};

use crate::support::process::{Ran, run};
use crate::support::registry::{Options, Registry};
use crate::support::sockless::Place;
use crate::support::{images, namespaces, programs, repository};

const URL: &str = "https://docs.docker.com/go/dockerfile/rule/";

/// `sockless build` of a context that has this Dockerfile.
fn build(place: &Place, dockerfile: &str, args: &[&str]) -> Ran {
    let context = place.context("context", &[("Dockerfile", dockerfile)]);
    run(place.command().arg("build").args(args).arg(context))
}

#[track_caller]
fn ends_with(ran: &Ran, code: i32) {
    assert_eq!(
        ran.status.code(),
        Some(code),
        "{}{}",
        ran.stdout,
        ran.stderr
    );
}

#[test]
fn violations_are_shown_and_counted_in_the_exit_code() {
    let place = Place::new();
    let clean = build(&place, "FROM scratch\nCOPY Dockerfile /\n", &["--check"]).success();
    assert_eq!(clean.stdout, "Check complete, no warnings found.\n");
    assert_eq!(clean.stderr, "");

    let text = "FROM scratch AS a\nUSER $x\n\nFROM scratch\nCMD x\n";
    let found = build(&place, text, &["--check"]);
    ends_with(&found, 1);
    assert_eq!(
        found.stdout,
        format!(
            "Check complete, 2 warnings have been found!

WARNING: UndefinedVar - {URL}undefined-var/
Usage of undefined variable '$x'
Dockerfile:2
--------------------
   1 |     FROM scratch AS a
   2 | >>> USER $x
   3 |     
   4 |     FROM scratch
--------------------

WARNING: JSONArgsRecommended - {URL}json-args-recommended/
JSON arguments recommended for CMD to prevent unintended behavior related to OS signals
Dockerfile:5
--------------------
   3 |     
   4 |     FROM scratch
   5 | >>> CMD x
   6 |     
--------------------
"
        )
    );
    assert_eq!(found.stderr, "");
    // What the target does not need is not checked where one is named.
    let target = build(&place, text, &["--check", "--target", "a"]);
    ends_with(&target, 1);
    assert!(
        target.stdout.contains("1 warning has been found!"),
        "{}",
        target.stdout
    );
    assert!(!target.stdout.contains("JSONArgs"), "{}", target.stdout);
    build(&place, text, &["--call=check,ignorestatus=true"]).success();
    let chosen = "BUILDKIT_DOCKERFILE_CHECK=skip=JSONArgsRecommended,UndefinedVar";
    build(&place, text, &["--check", "--build-arg", chosen]).success();
    // Nothing was built or kept.
    assert_eq!(
        std::fs::read_dir(place.dir.join("store")).unwrap().count(),
        0
    );
}

#[test]
fn ignored_files_are_known() {
    let place = Place::new();
    let text = "FROM scratch\nCOPY secret.txt .\nCOPY . .\n";
    let with_rules = |rules: &str| {
        place.context("context", &[(".dockerignore", rules)]);
        build(&place, text, &["--call=check,format=json"])
    };
    let found = with_rules("*.txt\n");
    ends_with(&found, 1);
    let answer: Value = serde_json::from_str(&found.stdout).unwrap();
    assert_eq!(answer["warnings"].as_array().map(Vec::len), Some(1));
    assert_eq!(
        answer["warnings"][0],
        json!({
            "ruleName": "CopyIgnoredFile",
            "description": "Attempting to Copy file that is excluded by .dockerignore",
            "url": format!("{URL}copy-ignored-file/"),
            "detail": "Attempting to Copy file \"secret.txt\" that is excluded by .dockerignore",
            "location": {"ranges": [{"start": {"line": 2}, "end": {"line": 2}}]},
        })
    );
    with_rules("*.txt\n!secret.txt\n").success();
    let all = with_rules("*\n");
    ends_with(&all, 1);
    assert_eq!(
        all.stdout.matches("CopyIgnoredFile").count(),
        2,
        "{}",
        all.stdout
    );
}

#[test]
fn what_would_end_a_build_ends_a_check() {
    let place = Place::new();
    let broken = build(&place, "FROM scratch AS A\nRUNN x\n", &["--check"]);
    ends_with(&broken, 2);
    assert!(
        broken.stdout.contains("Stage name 'A' should be lowercase"),
        "{}",
        broken.stdout
    );
    broken.says("Dockerfile:2:1: unknown instruction \"RUNN\"");

    let broken = build(&place, "RUNN x\n", &["--call=check,format=json"]);
    ends_with(&broken, 2);
    let answer: Value = serde_json::from_str(&broken.stdout).unwrap();
    assert_eq!(answer["warnings"], Value::Null);
    assert_eq!(
        answer["buildError"]["location"],
        json!({"ranges": [{"start": {"line": 1}, "end": {"line": 1}}]})
    );

    // What only planning finds.
    let planned = build(&place, "FROM scratch\nSTOPSIGNAL nonsense\n", &["--check"]);
    ends_with(&planned, 2);
    planned.says("Dockerfile:2:12: ");

    let missing = build(&place, "from localhost:1/no/image\nCMD x\n", &["--check"]);
    ends_with(&missing, 3);
    assert!(
        missing.stdout.contains("ConsistentInstructionCasing"),
        "{}",
        missing.stdout
    );
    assert!(
        !missing.stdout.contains("JSONArgsRecommended"),
        "{}",
        missing.stdout
    );
    missing.says("Dockerfile:1: resolving localhost:1/no/image");

    let wrong = build(&place, "# check=skip\nFROM scratch\n", &["--check"]);
    ends_with(&wrong, 2);
    wrong.says("Dockerfile:1:9: invalid check option \"skip\": it has no value");

    build(&place, "FROM scratch\n", &["--call=describe"])
        .failure()
        .says("--call \"describe\": expected one of");
}

#[test]
fn targets_are_listed_without_any_image() {
    let place = Place::new();
    let text = "# tools are for building\nFROM localhost:1/a AS tools\nFROM localhost:1/b\n";
    let listed = build(&place, text, &["--call=targets"]).success();
    assert_eq!(
        listed.stdout,
        "TARGET    DESCRIPTION\ntools     are for building\n(default) \n"
    );
    // From standard input, too.
    let context = place.context("context", &[("d", text)]);
    let output = place
        .command()
        .args(["build", "--call=targets,format=json", "-f", "-"])
        .arg(&context)
        .stdin(File::open(context.join("d")).unwrap())
        .output()
        .unwrap();
    assert!(output.status.success());
    let answer: Value = serde_json::from_slice(&output.stdout).unwrap();
    let location =
        |line: u32| json!({"ranges": [{"start": {"line": line}, "end": {"line": line}}]});
    assert_eq!(
        answer["targets"],
        json!([
            {
                "name": "tools",
                "description": "are for building",
                "base": "localhost:1/a",
                "location": location(2),
            },
            {"default": true, "base": "localhost:1/b", "location": location(3)},
        ])
    );
}

#[test]
fn an_outline_says_what_can_be_given() {
    let place = Place::new();
    let text = "# VERSION is what is built\nARG VERSION=1\n\n# app is the result\nFROM scratch AS app\n\
                ARG VERSION\nRUN --mount=type=secret,id=token,required x\n";
    let outline = build(
        &place,
        text,
        &["--call=outline", "--build-arg", "VERSION=2"],
    )
    .success();
    assert_eq!(
        outline.stdout,
        "TARGET:      app
DESCRIPTION: is the result

BUILD ARG   VALUE   DESCRIPTION
VERSION     2       

SECRET   REQUIRED
token    true

"
    );
    let json = build(&place, text, &["--call=outline,format=json"]).success();
    let answer: Value = serde_json::from_str(&json.stdout).unwrap();
    assert_eq!(answer["args"][0]["value"], "1");
    assert_eq!(answer["args"][0]["description"], "is what is built");
    assert_eq!(answer["secrets"][0]["required"], true);
}

#[test]
fn sandbox_builds_warn_and_fail_where_the_dockerfile_wants_it() {
    needs!(namespaces());
    let place = Place::new();
    let archive = place.dir.join("image.tar");
    let output = format!("type=oci,dest={}", archive.display());
    let args = ["--progress", "plain", "-o", output.as_str()];
    let text = "FROM scratch\nEXPOSE 1:2\nCMD x\nLABEL a=$b$b\n";
    let warned = build(&place, text, &args).success();
    for warning in [
        "Dockerfile:2:1: ExposeInvalidFormat: EXPOSE instruction should not define an IP address or host-port mapping, found '1:2'",
        "Dockerfile:3:1: JSONArgsRecommended: JSON arguments recommended for CMD to prevent unintended behavior related to OS signals",
        "Dockerfile:4:1: UndefinedVar: Usage of undefined variable '$b'",
    ] {
        assert_eq!(
            warned.stderr.matches(warning).count(),
            1,
            "{warning}\n{}",
            warned.stderr
        );
    }
    std::fs::remove_file(&archive).unwrap();
    let failed = build(&place, &format!("# check=error=true\n{text}"), &args);
    ends_with(&failed, 2);
    failed.says(
        "lint violation found for rules: ExposeInvalidFormat, JSONArgsRecommended, UndefinedVar",
    );
    assert!(!Path::new(&archive).exists());
}

#[test]
fn compose_base_images_are_asked_for_their_configs_and_no_more() {
    needs!(programs(&["docker-registry", "skopeo"]));
    let registry = Registry::start(Options::default());
    let place = Place::new();
    let layout = place.dir.dir("base");
    let config = json!({"Env": ["FROM_BASE=1"], "OnBuild": ["CMD x $FROM_BASE", "USER $UNSET"]});
    images::write_layout(&layout, &images::small_tar(&[("a", "b")])[..], &config);
    registry.push(&layout, "library/base:latest");
    let before = registry.requests().len();

    let text = "FROM base AS one\nUSER $FROM_BAS\nFROM base\nUSER $FROM_BASE\n";
    let context = place.context("context", &[("Dockerfile", text)]);
    let found = place.build(&registry, &context, &["--check", "--target", "one"]);
    ends_with(&found, 1);
    let shown: Vec<&str> = (found.stdout.lines())
        .filter(|line| line.contains("WARNING") || line.contains("$") || line.contains("JSON arg"))
        .filter(|line| !line.contains(" | "))
        .collect();
    assert_eq!(
        shown,
        [
            &format!("WARNING: JSONArgsRecommended - {URL}json-args-recommended/"),
            "JSON arguments recommended for CMD to prevent unintended behavior related to OS signals",
            &format!("WARNING: UndefinedVar - {URL}undefined-var/"),
            "Usage of undefined variable '$UNSET'",
            &format!("WARNING: UndefinedVar - {URL}undefined-var/"),
            "Usage of undefined variable '$FROM_BAS' (did you mean $FROM_BASE?)",
        ]
    );
    // The config is one small blob; the layer stays where it is.
    let asked: Vec<String> = (registry.requests()[before..].iter())
        .filter(|request| request.path.contains("/blobs/"))
        .map(|request| request.method.clone())
        .collect();
    assert_eq!(asked, ["GET"]);
    assert_eq!(
        registry.requests()[before..]
            .iter()
            .filter(|r| r.method != "GET" && r.method != "HEAD")
            .count(),
        0
    );

    let other = place.build(
        &registry,
        &context,
        &["--check", "--platform", "linux/s390x"],
    );
    ends_with(&other, 1);
    assert!(
        other
            .stdout
            .contains("Base image base was pulled with platform \"linux/"),
        "{}{}",
        other.stdout,
        other.stderr
    );
}

/// Every prefix of every Dockerfile of the fixtures: nothing panics, and what is found lies
/// inside the file, where the parser says that the instruction is.
#[test]
fn damaged_dockerfiles_are_checked_without_harm() {
    let platform = Platform::parse("linux/amd64").unwrap();
    let facts = Facts {
        build_args: &BTreeMap::new(),
        target: None,
        all_stages: true,
        platform: &platform,
        build_platform: &platform,
        contexts: &BTreeSet::new(),
        images: &BTreeMap::new(),
        ignored: Some(&|_| true),
    };
    let mut checked = 0;
    for kind in ["good", "bad"] {
        let fixtures = repository().join("fixtures/dockerfiles").join(kind);
        for file in std::fs::read_dir(fixtures).unwrap() {
            let path = file.unwrap().path();
            if path.extension().is_none_or(|e| e != "Dockerfile") {
                continue;
            }
            let bytes = std::fs::read(&path).unwrap();
            for end in (0..bytes.len()).rev().step_by(7) {
                let (report, text) = match dockerfile::parse("Dockerfile", &bytes[..end]) {
                    Ok(file) => {
                        checked += 1;
                        places_agree(&file, &path);
                        let walked = lint::walk(&file, &facts);
                        let _ = Outline::new(&file, &walked).to_text();
                        let _ = Targets::new(&file).to_text();
                        (walked.report, file.text)
                    }
                    Err(error) => (lint::check_broken(&error, &facts), error.text),
                };
                let lines = text.split('\n').count();
                for violation in &report.violations {
                    let Lines { first, last } = violation.lines;
                    assert!(
                        1 <= first && first <= last && last <= lines,
                        "{violation:?}"
                    );
                }
                let _ = CheckResults::new("Dockerfile", &text, &report).to_text();
            }
        }
    }
    assert!(checked > 100, "{checked}");
}

/// Compares the lines of instructions with their spans.
fn places_agree(file: &Dockerfile, path: &Path) {
    let source = Source::of(file);
    let agree = |placed: &Placed, span: Span| {
        let (first, _) = line_column(&file.text, span.start);
        let (last, _) = line_column(&file.text, span.end.max(1) - 1);
        let Lines {
            first: from,
            last: to,
        } = placed.lines;
        assert!(
            from <= first && first <= to && from <= last && last <= to,
            "{}: {placed:?} {first}-{last}",
            path.display()
        );
    };
    for (instruction, placed) in file.global_args.iter().zip(&source.global_args) {
        agree(placed, instruction.span);
    }
    for (stage, (from, instructions)) in file.stages.iter().zip(&source.stages) {
        agree(from, stage.span);
        assert_eq!(stage.instructions.len(), instructions.len());
        for (instruction, placed) in stage.instructions.iter().zip(instructions) {
            agree(placed, instruction.span);
        }
    }
}
