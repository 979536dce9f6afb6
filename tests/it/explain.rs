use std::path::Path;

use crate::support::images::{self, small_tar, write_layout};
use crate::support::process::run;
use crate::support::registry::{Options, Registry};
use crate::support::sockless::Place;
use crate::support::{dir, namespaces};

const DOCKERFILE: &str = "\
FROM busybox AS tools
RUN mkdir /out && echo tool > /out/tool
FROM busybox
ARG V=1
ENV MODE=fast
WORKDIR /app
COPY src src
RUN echo $V $MODE > /built
COPY --from=tools --chmod=644 /out /tools
";

const FILES: [(&str, &str); 4] = [
    ("Dockerfile", DOCKERFILE),
    ("src/a.rs", "a\n"),
    ("src/b.rs", "b\n"),
    ("src/lib/c.rs", "c\n"),
];

/// What `--explain` says: for each step that was looked up its name, `hit` or `miss`, and why.
fn explained(
    place: &Place,
    upstream: &Registry,
    context: &Path,
    args: &[&str],
) -> Vec<(String, &'static str, Vec<String>)> {
    let mut command = place.command();
    command
        .args(["build", "--progress", "rawjson", "--explain"])
        .arg("--registry-mirror")
        .arg(format!("docker.io={}", upstream.url()))
        .args(["-o", "type=cacheonly"])
        .args(args)
        .arg(context);
    let ran = run(&mut command).success();
    let events = ran.stderr.lines().chain(ran.stdout.lines());
    let events = events.filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
    let mut explained: Vec<_> = events
        .filter(|event| event["event"] == "step_explained")
        .map(|event| {
            let reasons = event["reasons"].as_array().unwrap().iter();
            let hit = event["cached"].as_bool().unwrap();
            (
                event["name"].as_str().unwrap().to_owned(),
                if hit { "hit" } else { "miss" },
                reasons.map(|r| r.as_str().unwrap().to_owned()).collect(),
            )
        })
        .collect();
    // Independent stages are looked up in any order.
    explained.sort();
    explained
}

/// The steps that miss, with why; their names without `[stage 2/5] `.
fn misses(explained: &[(String, &'static str, Vec<String>)]) -> Vec<(String, Vec<String>)> {
    let misses = explained.iter().filter(|(_, what, _)| *what == "miss");
    misses
        .map(|(name, _, reasons)| {
            let name = name.split_once("] ").map_or(&**name, |(_, name)| name);
            (name.to_owned(), reasons.clone())
        })
        .collect()
}

/// A change, the options of the second build, and what misses then.
struct Case {
    what: &'static str,
    change: fn(&Path),
    args: &'static [&'static str],
    misses: &'static [(&'static str, &'static [&'static str])],
}

fn dockerfile(context: &Path, from: &str, to: &str) {
    assert!(DOCKERFILE.contains(from), "{from}");
    dir::write(context, "Dockerfile", DOCKERFILE.replace(from, to));
}

const COPY: &str = "COPY src src";
const RUN: &str = "RUN echo $V $MODE > /built";
const TOOLS: &str = "COPY --from=tools --chmod=644 /out /tools";

/// What lies above a step that missed.
const ABOVE_COPY: &str = r#""[stage-1 3/5] COPY src src" below it made another layer"#;

const CASES: &[Case] = &[
    Case {
        what: "nothing",
        change: |_| {},
        args: &[],
        misses: &[],
    },
    Case {
        what: "a file",
        change: |context| {
            dir::write(context, "src/a.rs", "changed\n");
        },
        args: &[],
        misses: &[
            (COPY, &["src/a.rs changed"]),
            (RUN, &[ABOVE_COPY]),
            (TOOLS, &[ABOVE_COPY]),
        ],
    },
    Case {
        what: "files come, go and change their modes",
        change: |context| {
            use std::os::unix::fs::PermissionsExt;
            dir::write(context, "src/new.rs", "new\n");
            std::fs::remove_file(context.join("src/lib/c.rs")).unwrap();
            let mode = std::fs::Permissions::from_mode(0o755);
            std::fs::set_permissions(context.join("src/b.rs"), mode).unwrap();
        },
        args: &[],
        misses: &[
            (
                COPY,
                &[
                    "src/b.rs changed (mode)",
                    "src/lib/c.rs removed",
                    "src/new.rs added",
                ],
            ),
            (RUN, &[ABOVE_COPY]),
            (TOOLS, &[ABOVE_COPY]),
        ],
    },
    Case {
        what: "an argument",
        change: |_| {},
        args: &["--build-arg", "V=2"],
        misses: &[
            (RUN, &[r#"ARG V: "1" → "2""#]),
            (
                TOOLS,
                &[r#""[stage-1 4/5] RUN echo $V $MODE > /built" below it made another layer"#],
            ),
        ],
    },
    Case {
        what: "a variable",
        change: |context| dockerfile(context, "MODE=fast", "MODE=slow"),
        args: &[],
        misses: &[
            (RUN, &[r#"ENV MODE: "fast" → "slow""#]),
            (
                TOOLS,
                &[r#""[stage-1 4/5] RUN echo $V $MODE > /built" below it made another layer"#],
            ),
        ],
    },
    Case {
        what: "a command",
        change: |context| dockerfile(context, "echo tool", "echo other"),
        args: &[],
        misses: &[
            (
                "RUN mkdir /out && echo other > /out/tool",
                &[
                    r#"command: "mkdir /out && echo tool > /out/tool" → "mkdir /out && echo other > /out/tool""#,
                ],
            ),
            (TOOLS, &["out/tool changed"]),
        ],
    },
    Case {
        what: "an option",
        change: |context| dockerfile(context, "--chmod=644", "--chmod=600"),
        args: &[],
        misses: &[(
            "COPY --from=tools --chmod=600 /out /tools",
            &["--chmod: 644 → 600"],
        )],
    },
    Case {
        what: "a step in between",
        change: |context| dockerfile(context, "COPY src src", "RUN echo new > /new\nCOPY src src"),
        args: &[],
        misses: &[
            (
                "RUN echo new > /new",
                &["no step like this one is in the cache"],
            ),
            (
                COPY,
                &[r#""[stage-1 3/6] RUN echo new > /new" is new below it"#],
            ),
            (
                RUN,
                &[r#""[stage-1 3/6] RUN echo new > /new" is new below it"#],
            ),
            (
                TOOLS,
                &[r#""[stage-1 3/6] RUN echo new > /new" is new below it"#],
            ),
        ],
    },
    Case {
        what: "the date",
        change: |_| {},
        args: &["--build-arg", "SOURCE_DATE_EPOCH=12"],
        misses: &[
            (
                "RUN mkdir /out && echo tool > /out/tool",
                &["SOURCE_DATE_EPOCH: none → 12"],
            ),
            ("WORKDIR /app", &["SOURCE_DATE_EPOCH: none → 12"]),
            (
                COPY,
                &[
                    "SOURCE_DATE_EPOCH: none → 12",
                    r#""[stage-1 2/5] WORKDIR /app" below it made another layer"#,
                ],
            ),
            (
                RUN,
                &[
                    "SOURCE_DATE_EPOCH: none → 12",
                    r#""[stage-1 2/5] WORKDIR /app" below it made another layer"#,
                ],
            ),
            (
                TOOLS,
                &[
                    "SOURCE_DATE_EPOCH: none → 12",
                    r#""[stage-1 2/5] WORKDIR /app" below it made another layer"#,
                ],
            ),
        ],
    },
    Case {
        what: "--no-cache-filter",
        change: |_| {},
        args: &["--no-cache-filter", "tools"],
        misses: &[(
            "RUN mkdir /out && echo tool > /out/tool",
            &["--no-cache or --no-cache-filter has it done anew"],
        )],
    },
];

#[test]
fn sandbox_what_differs_from_the_nearest_record_is_named() {
    needs!(namespaces());
    let upstream = match images::busybox() {
        Ok(upstream) => upstream,
        Err(reason) => skip!("{reason}"),
    };
    for case in CASES {
        let place = Place::new();
        let context = place.context("context", &FILES);
        let first = explained(&place, &upstream, &context, &[]);
        let nothing = vec!["no step like this one is in the cache".to_owned()];
        assert_eq!(first.len(), 5, "{first:?}");
        for (name, what, reasons) in &first {
            assert_eq!(
                (*what, reasons),
                ("miss", &nothing),
                "{}: {name}",
                case.what
            );
        }
        (case.change)(&context);
        let second = explained(&place, &upstream, &context, case.args);
        let mut expected: Vec<(String, Vec<String>)> = case
            .misses
            .iter()
            .map(|(name, reasons)| {
                let reasons = reasons.iter().map(|reason| (*reason).to_owned());
                ((*name).to_owned(), reasons.collect())
            })
            .collect();
        expected.sort();
        let mut missed = misses(&second);
        missed.sort();
        assert_eq!(missed, expected, "{}: {second:#?}", case.what);
        for (name, what, reasons) in &second {
            if *what == "hit" {
                assert!(reasons[0].starts_with("the same "), "{name}: {reasons:?}");
            }
        }
    }
}

/// What differs from the records of another machine is named as for one's own, with the cache
/// that they are of.
#[test]
fn sandbox_records_of_an_imported_cache_are_compared_with() {
    needs!(namespaces(), images::registry_present());
    let upstream = match images::busybox() {
        Ok(upstream) => upstream,
        Err(reason) => skip!("{reason}"),
    };
    let registry = Registry::start(Options::default());
    let insecure = format!("--insecure-registry={}", registry.host);
    let cache = format!("{}/cache:main", registry.host);
    let to = format!("type=registry,ref={cache},mode=max");
    let place = Place::new();
    let context = place.context("context", &FILES);
    let args = [&*insecure, "--cache-to", &to];
    explained(&place, &upstream, &context, &args);

    let compared = format!("compared with the cache {cache}");
    for case in CASES {
        let place = Place::new();
        let context = place.context("context", &FILES);
        (case.change)(&context);
        let args = [&[&*insecure, "--cache-from", &cache], case.args].concat();
        let mut missed = misses(&explained(&place, &upstream, &context, &args));
        let mut expected: Vec<(String, Vec<String>)> = case
            .misses
            .iter()
            .map(|(name, reasons)| {
                let mut reasons: Vec<_> = reasons.iter().map(|r| (*r).to_owned()).collect();
                let compares = |reason: &str| {
                    !reason.starts_with("no step like this") && !reason.starts_with("--no-cache")
                };
                if reasons.iter().all(|reason| compares(reason)) {
                    reasons.push(compared.clone());
                }
                ((*name).to_owned(), reasons)
            })
            .collect();
        expected.sort();
        missed.sort();
        assert_eq!(missed, expected, "{}", case.what);
    }

    // What was found is known here now, file by file, without the cache.
    let place = Place::new();
    let context = place.context("context", &FILES);
    let args = [&*insecure, "--cache-from", &cache, "--cache-to", &to];
    assert_eq!(misses(&explained(&place, &upstream, &context, &args)), []);
    dir::write(&context, "src/a.rs", "changed\n");
    let missed = misses(&explained(&place, &upstream, &context, &[]));
    assert!(
        missed.contains(&(COPY.to_owned(), vec!["src/a.rs changed".to_owned()])),
        "{missed:?}"
    );
    // And is exported with it again.
    let place = Place::new();
    let context = place.context("context", &FILES);
    dir::write(&context, "src/b.rs", "changed\n");
    let args = [&*insecure, "--cache-from", &cache];
    let missed = misses(&explained(&place, &upstream, &context, &args));
    let reasons = vec!["src/b.rs changed".to_owned(), compared];
    assert!(missed.contains(&(COPY.to_owned(), reasons)), "{missed:?}");
}

/// An image says of its own layers what they were made of, and nothing for people.
#[test]
fn sandbox_records_in_an_image_are_compared_with() {
    needs!(namespaces(), images::registry_present());
    let upstream = match images::busybox() {
        Ok(upstream) => upstream,
        Err(reason) => skip!("{reason}"),
    };
    let registry = Registry::start(Options::default());
    let insecure = format!("--insecure-registry={}", registry.host);
    let image = format!("{}/app:1", registry.host);
    let dockerfile = "FROM busybox\nARG V=1\nCOPY seed /seed\nRUN echo $V > /v\n";
    let files = [("Dockerfile", dockerfile), ("seed", "1")];
    let place = Place::new();
    let context = place.context("context", &files);
    let args = [&*insecure, "-t", &image, "--push", "--cache-to=type=inline"];
    explained(&place, &upstream, &context, &args);

    let place = Place::new();
    let context = place.context("context", &files);
    let compared = format!("compared with the cache {image}");
    let args = [&*insecure, "--cache-from", &image, "--build-arg", "V=2"];
    let missed = misses(&explained(&place, &upstream, &context, &args));
    let reasons = vec![r#"ARG V: "1" → "2""#.to_owned(), compared.clone()];
    assert_eq!(missed, [("RUN echo $V > /v".to_owned(), reasons)]);

    let place = Place::new();
    let context = place.context("context", &files);
    dir::write(&context, "seed", "2");
    let args = [&*insecure, "--cache-from", &image];
    let missed = misses(&explained(&place, &upstream, &context, &args));
    let reasons = |reason: &str| vec![reason.to_owned(), compared.clone()];
    let expected = [
        ("COPY seed /seed", "what it reads has changed"),
        ("RUN echo $V > /v", "other layers are below it"),
    ];
    let expected = expected.map(|(name, reason)| (name.to_owned(), reasons(reason)));
    assert_eq!(missed, expected);
}

#[test]
fn sandbox_a_new_base_is_named_with_both_digests() {
    needs!(namespaces(), images::registry_present());
    let upstream = Registry::start(Options::default());
    let place = Place::new();
    let mut digests = Vec::new();
    let context = place.context(
        "context",
        &[("Dockerfile", "FROM base\nWORKDIR /a\nCOPY Dockerfile /\n")],
    );
    let mut last = Vec::new();
    for content in ["one", "two"] {
        let layout = place.dir.join(content);
        let tar = small_tar(&[("file", content)]);
        write_layout(&layout, &tar[..], &serde_json::json!({}));
        upstream.push(&layout, "library/base:latest");
        let raw = upstream.inspect("library/base:latest").success().stdout;
        digests.push(crate::support::oci::sha256(raw.as_bytes()));
        last = explained(&place, &upstream, &context, &[]);
    }
    let reason = format!(
        "base docker.io/library/base:latest: digest changed from {} to {}",
        digests[0], digests[1]
    );
    assert_eq!(
        misses(&last),
        [
            ("WORKDIR /a".to_owned(), vec![reason.clone()]),
            ("COPY Dockerfile /".to_owned(), vec![reason]),
        ]
    );
}
