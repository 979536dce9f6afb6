//! The cases of BuildKit's own tests of its checks, and those that they leave open.

use super::*;
use crate::image::RootfsDiffIds;

/// What is checked and with what.
struct Case<'t> {
    text: &'t str,
    args: &'t [(&'t str, &'t str)],
    target: Option<&'t str>,
    all_stages: bool,
    contexts: &'t [&'t str],
    /// `ENV` of every base image.
    env: &'t [&'t str],
    platform: &'t str,
    ignored: Option<&'t dyn Fn(&str) -> bool>,
    /// `ONBUILD` of every base image.
    triggers: &'t [&'t str],
}

fn case(text: &str) -> Case<'_> {
    Case {
        text,
        args: &[],
        target: None,
        all_stages: false,
        contexts: &[],
        env: &["PATH=/bin"],
        platform: "linux/amd64",
        ignored: None,
        triggers: &[],
    }
}

fn config(case: &Case<'_>) -> ImageConfig {
    let mut config = ImageConfig::scratch(Platform::parse(case.platform).unwrap());
    config.config.env = case.env.iter().map(|pair| (*pair).to_owned()).collect();
    config.config.on_build = Some(case.triggers.iter().map(|t| (*t).to_owned()).collect());
    let layer = crate::image::DiffId::from_uncompressed(crate::image::Digest::of(b"layer"));
    config.rootfs = RootfsDiffIds {
        kind: "layers".to_owned(),
        diff_ids: vec![layer],
    };
    config
}

/// The report; every base that is asked for is there.
fn report(case: &Case<'_>) -> Report {
    let args = case
        .args
        .iter()
        .map(|(n, v)| ((*n).to_owned(), (*v).to_owned()));
    let args: BTreeMap<String, String> = args.collect();
    let platform = Platform::parse("linux/amd64").unwrap();
    let contexts = case
        .contexts
        .iter()
        .map(|name| (*name).to_owned())
        .collect();
    let mut images = BTreeMap::new();
    let facts = |images| Facts {
        build_args: &args,
        target: case.target,
        all_stages: case.all_stages,
        platform: &platform,
        build_platform: &platform,
        contexts: &contexts,
        images,
        ignored: case.ignored,
    };
    let dockerfile = match dockerfile::parse("Dockerfile", case.text.as_bytes()) {
        Ok(dockerfile) => dockerfile,
        Err(error) => return check_broken(&error, &facts(&images)),
    };
    let none = BTreeMap::new();
    if let Ok(needs) = bases(&dockerfile, &facts(&none)) {
        for need in needs {
            images.insert(need.stage, config(case));
        }
    }
    check(&dockerfile, &facts(&images))
}

/// `LINE RULE: DETAIL` for each violation, sorted by line as BuildKit's tests do.
fn found(report: &Report) -> Vec<String> {
    let mut found: Vec<(usize, String)> = (report.violations.iter())
        .map(|v| {
            (
                v.lines.first,
                format!("{} {}: {}", v.lines.first, v.rule.name, v.detail),
            )
        })
        .collect();
    found.sort();
    let error = report.error.iter().map(|error| {
        let lines = error.lines().map_or(0, |lines| lines.first);
        format!("{lines} error: {error}")
    });
    found
        .into_iter()
        .map(|(_, text)| text)
        .chain(error)
        .collect()
}

#[track_caller]
fn check_case(case: &Case<'_>, expected: &[&str]) {
    assert_eq!(found(&report(case)), expected, "{}", case.text);
}

#[track_caller]
fn check_text(text: &str, expected: &[&str]) {
    check_case(&case(text), expected);
}

const CASING: &str = "FromAsCasing: 'as' and 'FROM' keywords' casing do not match";

#[test]
fn options_skip_rules() {
    let text = "#check=OPTIONS\nFROM scratch as base\ncopy Dockerfile .\n";
    let with = |options: &str| text.replace("OPTIONS", options);
    let from_as = format!("2 {CASING}");
    let casing = "3 ConsistentInstructionCasing: Command 'copy' should match the case of the command majority (uppercase)";
    for (options, expected) in [
        ("skip=all", &[][..]),
        ("skip=all;error=true", &[]),
        ("skip=ConsistentInstructionCasing,FromAsCasing", &[]),
        (
            "skip=ConsistentInstructionCasing,FromAsCasing;error=true",
            &[],
        ),
        ("skip=ConsistentInstructionCasing", &[from_as.as_str()]),
        (
            "skip=ConsistentInstructionCasing;error=true // why",
            &[&from_as],
        ),
        ("error=true", &[&from_as, casing]),
    ] {
        check_text(&with(options), expected);
    }
    // The argument replaces the directive.
    let replaced = |directive: &str, value: &str| {
        report(&Case {
            args: &[(CHECK_ARG, value)],
            ..case(&with(directive))
        })
    };
    let replaced_all = replaced("error=true", "skip=all");
    assert_eq!(
        (found(&replaced_all), replaced_all.lint_error()),
        (vec![], None)
    );
    let failing = replaced("skip=all", "skip=ConsistentInstructionCasing;error=true");
    assert_eq!(found(&failing), [from_as]);
    assert_eq!(
        failing.lint_error().unwrap().to_string(),
        "lint violation found for rules: FromAsCasing"
    );
    assert_eq!(
        replaced("skip=all", "error=true")
            .lint_error()
            .unwrap()
            .to_string(),
        "lint violation found for rules: ConsistentInstructionCasing, FromAsCasing"
    );
    assert_eq!(
        found(&replaced("skip=all", "error=maybe")),
        [
            "0 error: failed to parse BUILDKIT_DOCKERFILE_CHECK: invalid check option \"error=maybe\": error is true or false"
        ]
    );
    assert_eq!(replaced("skip=all", "").lint_error(), None);
}

#[test]
fn names_of_stages() {
    check_text(
        "\n# warning: stage name should be lowercase\n#\nFROM scratch AS BadStageName\n\n#\nFROM scratch as base2\n\nFROM scratch AS base3\n",
        &[
            "4 StageNameCasing: Stage name 'BadStageName' should be lowercase",
            &format!("7 {CASING}"),
        ],
    );
    check_text(
        "\nfrom scratch AS base\n\nfrom scratch as base2\n",
        &["2 FromAsCasing: 'AS' and 'from' keywords' casing do not match"],
    );
    check_text(
        "\nFROM scratch AS b\nFROM scratch AS b\n",
        &["3 DuplicateStageName: Duplicate stage name \"b\", stage names should be unique"],
    );
    check_text("\nFROM scratch AS b1\nFROM scratch AS b2\n", &[]);
    check_text(
        "\nFROM scratch AS scratch\nFROM scratch AS context\n",
        &[
            "2 ReservedStageName: Stage name should not use the same name as reserved stage \"scratch\"",
            "3 ReservedStageName: Stage name should not use the same name as reserved stage \"context\"",
        ],
    );
    check_text("\nFROM scratch\nFROM scratch AS a\n", &[]);
}

#[test]
fn casing_of_instructions() {
    let wrong = |line: usize, name: &str, majority: &str| {
        format!(
            "{line} ConsistentInstructionCasing: Command '{name}' should match the case of the command majority ({majority})"
        )
    };
    for (text, line, name, majority) in [
        (
            "#\nFrom scratch as base\nFROM scratch AS base2\n",
            2,
            "From",
            "uppercase",
        ),
        (
            "FROM scratch\ncopy D /foo\nCOPY D /bar\n",
            2,
            "copy",
            "uppercase",
        ),
        (
            "#\nfrOM scratch as base\nfrom scratch as base2\n",
            2,
            "frOM",
            "lowercase",
        ),
        (
            "from scratch\nCOPY D /foo\ncopy D /bar\n",
            2,
            "COPY",
            "lowercase",
        ),
        (
            "from scratch\nCOPY D /foo\nCOPY D /bar\nCOPY D /baz\n",
            1,
            "from",
            "uppercase",
        ),
        (
            "FROM scratch\ncopy D /foo\ncopy D /bar\ncopy D /baz\n",
            1,
            "FROM",
            "lowercase",
        ),
        // As many of both: upper case it is.
        ("FROM scratch\nrun [\"x\"]\n", 2, "run", "uppercase"),
    ] {
        check_text(text, &[&wrong(line, name, majority)]);
    }
    check_text("from scratch\ncopy D /foo\ncopy D /bar\n", &[]);
    check_text("FROM scratch\nCOPY D /foo\nCOPY D /bar\n", &[]);
    check_text("FROM alpine\nRUN <<'EOT'\nenv\nEOT\n", &[]);
}

#[test]
fn empty_continuations() {
    check_text(
        "\nFROM scratch\n# warning: empty continuation line\nCOPY Dockerfile \\\n\n.\nCOPY Dockerfile \\\n.\n",
        &["6 NoEmptyContinuation: Empty continuation line"],
    );
}

#[test]
fn descriptions_are_experimental() {
    let text = "# bar this is the bar\nARG foo=bar\n# BasE this is the BasE image\nFROM scratch AS base\n# definitely a bad comment\nARG version=latest\n# definitely a bad comment\nARG foo=baz bar=qux baz=quux\n";
    check_text(text, &[]);
    check_text(
        &format!("# check=experimental=InvalidDefinitionDescription\n{text}"),
        &[
            "3 InvalidDefinitionDescription: Comment for ARG should follow the format: `# foo <description>`",
            "5 InvalidDefinitionDescription: Comment for FROM should follow the format: `# base <description>`",
            "7 InvalidDefinitionDescription: Comment for ARG should follow the format: `# version <description>`",
            "9 InvalidDefinitionDescription: Comment for ARG should follow the format: `# <arg_key> <description>`",
        ],
    );
    check_text(
        "# check=skip=all;experimental=InvalidDefinitionDescription\n# foo this is the foo\nARG foo=bar\n\n# base this is the base image\nFROM scratch AS base\n\n# version this is the version number\nARG version=latest\n\n# baz this is the baz\nARG foo=baz bar=qux baz=quux\n#\nARG bit=bat\n\n# comment for something other than ARG or FROM\nCOPY Dockerfile .\n",
        &[],
    );
}

#[test]
fn shell_forms_of_commands() {
    let wrong = |line: usize, name: &str| {
        format!(
            "{line} JSONArgsRecommended: JSON arguments recommended for {name} to prevent unintended behavior related to OS signals"
        )
    };
    for name in ["CMD", "ENTRYPOINT"] {
        check_text(
            &format!("\nFROM scratch\n{name} mycommand\n"),
            &[&wrong(3, name)],
        );
        check_text(&format!("\nFROM scratch\n{name} [\"mycommand\"]\n"), &[]);
        check_text(
            &format!("\nFROM scratch\nSHELL [\"/usr/bin/customshell\"]\n{name} mycommand\n"),
            &[],
        );
        check_text(
            &format!("FROM scratch AS base\nSHELL [\"/x\"]\n\nFROM base\n{name} mycommand\n"),
            &[],
        );
        check_text(
            &format!("FROM scratch\n# check=skip=JSONArgsRecommended\n{name} mycommand\n"),
            &[],
        );
    }
    check_text("from scratch\ncmd x \\\n y\n", &[&wrong(2, "cmd")]);
}

#[test]
fn maintainers() {
    check_text(
        "\nFROM scratch\nMAINTAINER me@example.org\n",
        &["3 MaintainerDeprecated: Maintainer instruction is deprecated in favor of using label"],
    );
    check_text("\nFROM scratch\nLABEL authors=\"me@example.org\"\n", &[]);
    check_text(
        "\nFROM scratch\n# check=skip=MaintainerDeprecated\nMAINTAINER me@example.org\n",
        &[],
    );
}

#[test]
fn what_stands_before_an_error_is_checked() {
    check_text(
        "\nFROM scratch AS BadStageName\nMAINTAINER me@example.org\nBADCMD\n",
        &[
            "2 StageNameCasing: Stage name 'BadStageName' should be lowercase",
            "3 MaintainerDeprecated: Maintainer instruction is deprecated in favor of using label",
            "4 error: unknown instruction \"BADCMD\"",
        ],
    );
    check_text(
        "FROM scratch AS A\nCOPY \\\n --nonsense x /\n",
        &[
            "1 StageNameCasing: Stage name 'A' should be lowercase",
            "3 error: unknown flag \"--nonsense\": COPY takes --chmod, --chown, --exclude, --from, --link, --parents",
        ],
    );
    check_text(
        "",
        &["1 error: the Dockerfile is empty: it must have a FROM"],
    );
}

#[test]
fn arguments_in_from() {
    for text in [
        "ARG base=scratch\nFROM $base\n",
        "ARG BUILDPLATFORM=linux/amd64\nFROM --platform=$BUILDPLATFORM scratch\n",
        "FROM --platform=$BUILDPLATFORM scratch\n",
        "ARG DEBUG\nFROM scratch${DEBUG}\n",
        "ARG DEBUG\nFROM scra${DEBUG:-tch}\n",
        "ARG DEBUG=\"\"\nFROM scratch${DEBUG-@bogus}\n",
    ] {
        check_text(text, &[]);
    }
    check_text(
        "\nFROM --platform=$BULIDPLATFORM scratch\n",
        &[
            "2 UndefinedArgInFrom: FROM argument 'BULIDPLATFORM' is not declared (did you mean BUILDPLATFORM?)",
            "2 error: empty platform value from expression $BULIDPLATFORM (did you mean BUILDPLATFORM?)",
        ],
    );
    check_text(
        "ARG MY_OS=linux\nARG MY_ARCH=amd64\nFROM --platform=linux/${MYARCH} busybox\n",
        &[
            "3 UndefinedArgInFrom: FROM argument 'MYARCH' is not declared (did you mean MY_ARCH?)",
            "3 error: failed to parse platform linux/${MYARCH}: \"linux/\" is not OS/ARCHITECTURE[/VARIANT] (did you mean MY_ARCH?)",
        ],
    );
    check_text(
        "ARG tag=latest\nFROM busybox:${tag}${version} AS b\n",
        &["2 UndefinedArgInFrom: FROM argument 'version' is not declared"],
    );
    check_text(
        "ARG A\nFROM $A\n",
        &[
            "2 InvalidDefaultArgInFrom: Default value for ARG $A results in empty or invalid base image name",
            "2 error: base name ($A) should not be blank",
        ],
    );
    check_text("# check=skip=UndefinedArgInFrom\nFROM x:1${v}\n", &[]);
}

#[test]
fn defaults_of_arguments_in_from() {
    let wrong = |base: &str| {
        format!(
            "2 InvalidDefaultArgInFrom: Default value for ARG {base} results in empty or invalid base image name"
        )
    };
    let with = |text: &str, name: &str, value: &str, expected: &[&str]| {
        check_case(
            &Case {
                args: &[(name, value)],
                ..case(text)
            },
            expected,
        );
    };
    with(
        "ARG VERSION\nFROM busybox:$VERSION\n",
        "VERSION",
        "latest",
        &[&wrong("busybox:$VERSION")],
    );
    with(
        "ARG IMAGE\nFROM $IMAGE\n",
        "IMAGE",
        "busybox:latest",
        &[&wrong("$IMAGE")],
    );
    with(
        "ARG SFX=\"box:\"\nFROM busy${SFX}\n",
        "SFX",
        "box:latest",
        &[&wrong("busy${SFX}")],
    );
    with(
        "ARG VERSION=\"latest\"\nFROM busybox:${VERSION}\n",
        "VERSION",
        "latest",
        &[],
    );
    with(
        "ARG VARIANT=\"\"\nFROM busybox:stable${VARIANT}\n",
        "VARIANT",
        "-musl",
        &[],
    );
    with(
        "\tARG VARIANT\n\tFROM busybox:stable${VARIANT}\n",
        "VARIANT",
        "-musl",
        &[],
    );
}

#[test]
fn platforms_in_from() {
    let text = "Setting platform to predefined";
    check_text(
        "FROM --platform=$TARGETPLATFORM scratch\n",
        &[&format!(
            "1 RedundantTargetPlatform: {text} $TARGETPLATFORM in FROM is redundant as this is the default behavior"
        )],
    );
    check_text(
        "FROM --platform=${TARGETPLATFORM} scratch\n",
        &[&format!(
            "1 RedundantTargetPlatform: {text} ${{TARGETPLATFORM}} in FROM is redundant as this is the default behavior"
        )],
    );
    check_text("FROM --platform=$TARGETOS/$TARGETARCH scratch\n", &[]);
    check_text(
        "\n# check=skip=RedundantTargetPlatform\n# x\nFROM --platform=$TARGETPLATFORM scratch\n",
        &[],
    );
    check_text(
        "\nFROM --platform=linux/amd64 scratch\n",
        &[
            "2 FromPlatformFlagConstDisallowed: FROM --platform flag should not use constant value \"linux/amd64\"",
        ],
    );
    check_text(
        "\nFROM --platform=arm64 scratch\n",
        &[
            "2 FromPlatformFlagConstDisallowed: FROM --platform flag should not use constant value \"arm64\"",
        ],
    );
    check_text(
        "FROM --platform=linux/amd64 scratch AS my_amd64_stage\n",
        &[],
    );
    check_text("FROM --platform=linux/amd64 scratch AS linux\n", &[]);
}

#[test]
fn platforms_of_bases() {
    let other = Case {
        platform: "linux/arm64",
        ..case("\nFROM h.example/a:1 AS x\nENV foo=bar\nFROM x\n")
    };
    let detail = "Base image h.example/a:1 was pulled with platform \"linux/arm64\", expected \"linux/amd64\" for current build";
    check_case(&other, &[&format!("2 InvalidBaseImagePlatform: {detail}")]);
    check_case(
        &Case {
            platform: "linux/arm64",
            ..case("FROM --platform=arm64 h.example/a:1 AS arm64\n")
        },
        &[],
    );
}

#[test]
fn relative_working_directories() {
    let detail = "WorkdirRelativePath: Relative workdir \"app/\" can have unexpected results if the base image changes";
    check_text(
        "\nFROM scratch\nWORKDIR app/\nWORKDIR b\n",
        &[&format!("3 {detail}")],
    );
    check_text(
        "FROM scratch\nARG d=app/\nWORKDIR $d\n",
        &[&format!("3 {detail}")],
    );
    check_text(
        "FROM scratch AS a\nWORKDIR /app\n\nFROM a AS b\nWORKDIR subdir/\n",
        &[],
    );
    check_text(
        "FROM scratch\n# check=skip=WorkdirRelativePath\nWORKDIR app/\n",
        &[],
    );
}

#[test]
fn undefined_variables() {
    check_text("FROM scratch\nARG foo\nCOPY Dockerfile${foo} .\n", &[]);
    check_text(
        "FROM alpine AS base\nARG foo=Dockerfile\n\nFROM base\nCOPY $foo .\n",
        &[],
    );
    check_text("FROM alpine\nRUN echo $PATH $nothing\n", &[]);
    check_text(
        "\nFROM alpine\nCOPY $foo .\nARG foo=bar\nRUN echo $foo\n",
        &["3 UndefinedVar: Usage of undefined variable '$foo'"],
    );
    check_text(
        "FROM alpine\nARG DIR_BINARIES=binaries/\nARG DIR_ASSETS=assets/\nARG DIR_CONFIG=config/\nCOPY $DIR_ASSET .\n",
        &["5 UndefinedVar: Usage of undefined variable '$DIR_ASSET' (did you mean $DIR_ASSETS?)"],
    );
    check_text(
        "FROM alpine\nENV PATH=$PAHT:/tmp/bin\n",
        &["2 UndefinedVar: Usage of undefined variable '$PAHT' (did you mean $PATH?)"],
    );
    check_text(
        "FROM scratch\nENV PATH=$PAHT:/tmp/bin\n",
        &["2 UndefinedVar: Usage of undefined variable '$PAHT' (did you mean $PATH?)"],
    );
    // A default is no definition; a global argument is none either until a stage takes it.
    check_text(
        "ARG g=1\nFROM scratch\nLABEL a=${x:-1} b=$g\nARG g\nLABEL c=$g\nENV $keys=1\n",
        &[
            "3 UndefinedVar: Usage of undefined variable '$g'",
            "3 UndefinedVar: Usage of undefined variable '$x'",
            "6 UndefinedVar: Usage of undefined variable '$keys'",
        ],
    );
    // Here-documents, mounts, users; not EXPOSE, CMD and triggers for others.
    check_text(
        "FROM scratch\nCOPY <<A <<'B' /\n$a\nA\n$b\nB\nRUN --mount=type=bind,source=$c,target=/x y\nUSER $d\nEXPOSE $e\nONBUILD USER $f\nCMD [\"$g\"]\n",
        &[
            "2 UndefinedVar: Usage of undefined variable '$a'",
            "7 UndefinedVar: Usage of undefined variable '$c'",
            "8 UndefinedVar: Usage of undefined variable '$d'",
        ],
    );
    check_case(
        &Case {
            env: &["HERE=1"],
            ..case("FROM alpine\nWORKDIR /$HERE\nFROM scratch\nWORKDIR /$HERE\n")
        },
        &["4 UndefinedVar: Usage of undefined variable '$HERE'"],
    );
}

#[test]
fn without_a_bases_config_nothing_is_said_of_variables() {
    let none = BTreeMap::new();
    let platform = Platform::parse("linux/amd64").unwrap();
    let facts = Facts {
        build_args: &BTreeMap::new(),
        target: None,
        all_stages: false,
        platform: &platform,
        build_platform: &platform,
        contexts: &BTreeSet::new(),
        images: &none,
        ignored: None,
    };
    let text = b"FROM alpine AS a\nWORKDIR $x\nFROM a\nCMD $y\nUSER $z\n";
    let dockerfile = dockerfile::parse("Dockerfile", text).unwrap();
    let names: Vec<&str> = (check(&dockerfile, &facts).violations.iter())
        .map(|v| v.rule.name)
        .collect();
    assert_eq!(names, ["WorkdirRelativePath", "JSONArgsRecommended"]);
}

#[test]
fn stages_that_the_target_does_not_need() {
    let text = "\nFROM scratch AS first\nCOPY $foo .\n\nFROM scratch AS second\nCOPY $bar .\n";
    let (first, second) = (
        "3 UndefinedVar: Usage of undefined variable '$foo'",
        "6 UndefinedVar: Usage of undefined variable '$bar'",
    );
    check_text(text, &[second]);
    let with = |target, all_stages, expected: &[&str]| {
        check_case(
            &Case {
                target,
                all_stages,
                ..case(text)
            },
            expected,
        );
    };
    with(None, true, &[first, second]);
    with(Some("FIRST"), false, &[first]);
    with(
        Some("secnd"),
        false,
        &["0 error: target stage \"secnd\" could not be found (did you mean second?)"],
    );
    // What it copies from, it needs.
    check_text(
        &format!("{text}FROM scratch\nCOPY --from=0 /x /\n"),
        &[first],
    );
    check_text(
        &format!("{text}FROM scratch\nRUN --mount=from=second x\n"),
        &[second],
    );
    check_text(&format!("{text}FROM first\n"), &[first]);
    check_text(
        "FROM scratch AS a\nCOPY --from=b / /\nFROM a AS b\n",
        &[
            "2 error: cannot copy from stage \"b\", it needs to be defined before current stage \"a\"",
        ],
    );
    check_text(
        "FROM scratch\nCOPY --from=7 / /\n",
        &["2 error: invalid stage index 7"],
    );
}

#[test]
fn triggers_point_at_their_from() {
    let own = Case {
        triggers: &["CMD x $y", "USER $missing"],
        ..case("FROM scratch\n\n# check=skip=all\nFROM alpine\nCMD z\n")
    };
    check_case(
        &own,
        &[
            "4 JSONArgsRecommended: JSON arguments recommended for CMD to prevent unintended behavior related to OS signals",
            "4 MultipleInstructionsDisallowed: Multiple CMD instructions should not be used in the same stage because only the last one will be used",
            "4 UndefinedVar: Usage of undefined variable '$missing'",
            "5 JSONArgsRecommended: JSON arguments recommended for CMD to prevent unintended behavior related to OS signals",
        ],
    );
    check_text(
        "FROM scratch AS a\nONBUILD USER $u\nFROM scratch AS c\nUSER $w\nFROM a\n",
        &["5 UndefinedVar: Usage of undefined variable '$u'"],
    );
    check_text(
        "FROM scratch AS a\nONBUILD COPY --from=c / /\nFROM scratch AS c\nUSER $w\nFROM a\n",
        &["4 UndefinedVar: Usage of undefined variable '$w'"],
    );
}

#[test]
fn instructions_that_count_once() {
    let wrong = |line: usize, name: &str| {
        format!(
            "{line} MultipleInstructionsDisallowed: Multiple {name} instructions should not be used in the same stage because only the last one will be used"
        )
    };
    check_text(
        "\nFROM scratch\nENTRYPOINT [\"/a\"]\nENTRYPOINT [\"/b\"]\nCMD [\"/a\"]\nCMD [\"/b\"]\nHEALTHCHECK CMD [\"/a\"]\nHEALTHCHECK CMD [\"/b\"]\n",
        &[
            &wrong(3, "ENTRYPOINT"),
            &wrong(5, "CMD"),
            &wrong(7, "HEALTHCHECK"),
        ],
    );
    check_text(
        "\nFROM scratch\nENTRYPOINT [\"/a\"]\nCMD [\"/a\"]\nHEALTHCHECK CMD [\"/a\"]\nCOPY <<EOF /a.txt\nHello, World!\nEOF\nENTRYPOINT [\"/b\"]\nCMD [\"/b\"]\nHEALTHCHECK CMD [\"/b\"]\n",
        &[
            &wrong(3, "ENTRYPOINT"),
            &wrong(4, "CMD"),
            &wrong(5, "HEALTHCHECK"),
        ],
    );
    check_text(
        "FROM scratch AS a\nENTRYPOINT [\"/a\"]\nCMD [\"/a\"]\nHEALTHCHECK NONE\n\nFROM a AS b\nENTRYPOINT [\"/b\"]\nCMD [\"/b\"]\nHEALTHCHECK NONE\n",
        &[],
    );
}

#[test]
fn legacy_pairs() {
    let wrong = |line: usize, name: &str| {
        format!(
            "{line} LegacyKeyValueFormat: \"{name} key=value\" should be used instead of legacy \"{name} key value\" format"
        )
    };
    check_text(
        "\nFROM scratch\nENV testkey value\nLABEL key value\n",
        &[&wrong(3, "ENV"), &wrong(4, "LABEL")],
    );
    check_text("FROM scratch\nENV testkey=value\nLABEL key=value\n", &[]);
    let unreachable =
        "\nFROM scratch AS a\n\nFROM a AS b\nENV testkey value\nLABEL key value\n\nFROM a AS c\n";
    check_text(unreachable, &[]);
    check_case(
        &Case {
            all_stages: true,
            ..case(unreachable)
        },
        &[&wrong(5, "ENV"), &wrong(6, "LABEL")],
    );
    check_text(
        "FROM scratch\n# check=skip=LegacyKeyValueFormat\nENV testkey value\n# check=skip=LegacyKeyValueFormat\nLABEL key value\n",
        &[],
    );
}

#[test]
fn secrets() {
    let wrong = |line: usize, instruction: &str, name: &str| {
        format!(
            "{line} SecretsUsedInArgOrEnv: Do not use ARG or ENV instructions for sensitive data ({instruction} \"{name}\")"
        )
    };
    let text = "# check=skip=InvalidDefinitionDescription\n\nFROM scratch\nARG SECRET_PASSPHRASE\nENV SUPER_Secret=foo\nENV password=bar secret=baz\nARG super_duper_secret_token=foo auth=bar\nENV apikey=bar sunflower=foo\nENV git_key=\nENV PUBLIC_KEY=\nARG public_token\nARG SECRET_PASSPHRASE_FILE\nENV password_file=bar secret_File=baz\nARG AUTH_MODULE_VERSION\n# check=skip=SecretsUsedInArgOrEnv // allow secret in environment\nENV password=bar\n# check=skip=SecretsUsedInArgOrEnv // allow secret in arg\nARG password\n# check=skip=all // is local to only this instruction\nENV alternate_password=bar\n# check=skip=all // is local to only this instruction\nARG alternate_password\nENV monkey=1 passwordless=2\n";
    check_text(
        text,
        &[
            &wrong(4, "ARG", "SECRET_PASSPHRASE"),
            &wrong(5, "ENV", "SUPER_Secret"),
            &wrong(6, "ENV", "password"),
            &wrong(6, "ENV", "secret"),
            &wrong(7, "ARG", "auth"),
            &wrong(7, "ARG", "super_duper_secret_token"),
            &wrong(8, "ENV", "apikey"),
            &wrong(9, "ENV", "git_key"),
        ],
    );
}

#[test]
fn ignored_files() {
    let check_with = |text: &str, ignored: &dyn Fn(&str) -> bool, expected: &[&str]| {
        check_case(
            &Case {
                ignored: Some(ignored),
                ..case(text)
            },
            expected,
        );
    };
    let only_dockerfile = |path: &str| path == "Dockerfile";
    let text = "\nFROM scratch\nCOPY ./x/../Dockerfile .\nADD Dockerfile /windy\n";
    let (copy, add) = (
        "3 CopyIgnoredFile: Attempting to Copy file \"Dockerfile\" that is excluded by .dockerignore",
        "4 CopyIgnoredFile: Attempting to Add file \"Dockerfile\" that is excluded by .dockerignore",
    );
    check_text(text, &[]);
    check_with(text, &only_dockerfile, &[copy, add]);
    check_with(
        &format!("# check=skip=CopyIgnoredFile\n{text}"),
        &only_dockerfile,
        &[],
    );
    check_with(
        "FROM scratch AS base\nCOPY D /foobar\nADD http://h/foobar /windy\nFROM base\nCOPY --from=base foobar /D\n",
        &|path| path == "foobar",
        &[],
    );
    check_with("FROM scratch\nCOPY . .\n", &only_dockerfile, &[]);
    check_with(
        "\nFROM scratch\nCOPY . .\nCOPY / /y\n",
        &|path| path == ".",
        &[
            "3 CopyIgnoredFile: Attempting to Copy file \".\" that is excluded by .dockerignore",
            "4 CopyIgnoredFile: Attempting to Copy file \"/\" that is excluded by .dockerignore",
        ],
    );
}

#[test]
fn ports() {
    check_text(
        "\nFROM scratch\nEXPOSE 80/TcP 8080/TCP 8080/udp\n",
        &[
            "3 ExposeProtoCasing: Defined protocol '80/TcP' in EXPOSE instruction should be lowercase",
            "3 ExposeProtoCasing: Defined protocol '8080/TCP' in EXPOSE instruction should be lowercase",
        ],
    );
    let wrong = |port: &str| {
        format!(
            "3 ExposeInvalidFormat: EXPOSE instruction should not define an IP address or host-port mapping, found '{port}'"
        )
    };
    check_text(
        "\nFROM scratch\nEXPOSE 127.0.0.1:80:80 [::1]:8080:8080 5000:5000 8000\n",
        &[
            &wrong("127.0.0.1:80:80"),
            &wrong("5000:5000"),
            &wrong("[::1]:8080:8080"),
        ],
    );
    check_text(
        "FROM scratch\nEXPOSE 80/x\n",
        &["2 error: invalid port: \"80/x\""],
    );
}

#[test]
fn contexts_stand_in() {
    let replaced = Case {
        contexts: &["tools", "lib", "scratch"],
        ..case("FROM no.such/image AS lib\nUSER $x\nFROM tools\nCOPY --from=lib / /\nUSER $y\n")
    };
    check_case(&replaced, &[]);
    check_case(
        &Case {
            all_stages: true,
            ..case("FROM scratch\nUSER $x\n")
        },
        &["2 UndefinedVar: Usage of undefined variable '$x'"],
    );
}

#[test]
fn hostile_input_is_bounded() {
    let many = "LABEL a=$b\n".repeat(MAX_VIOLATIONS + 1);
    let report = report(&case(&format!("FROM scratch\n{many}")));
    assert_eq!(report.violations.len(), MAX_VIOLATIONS);
    assert_eq!(
        report.error.unwrap().to_string(),
        "checking stopped: there are more than 1000 violations; the rest is not listed"
    );
    let doubled = "ARG a=$a$a$a$a$a$a$a$a$a$a\n".repeat(6);
    let copies = (0..100)
        .map(|n| format!("ARG b{n}=$a\n"))
        .collect::<String>();
    let text = format!("FROM scratch\nARG a=xxxx\n{doubled}{copies}");
    let report = super::tests::report(&case(&text));
    assert_eq!(
        report.error.unwrap().to_string(),
        "checking stopped: the variables' values take more than 67108864 bytes"
    );
    // A chain of stages longer than a stack is deep.
    let mut chain = String::from("FROM scratch AS s0\n");
    for stage in 1..5000 {
        chain.push_str(&format!("FROM s{} AS s{stage}\n", stage - 1));
    }
    assert_eq!(found(&super::tests::report(&case(&chain))), [""; 0]);
}

#[test]
fn warnings_of_a_build_have_places() {
    let report = report(&case("FROM scratch\n  CMD x\nLABEL a=$b$c c=$b\n"));
    assert_eq!(
        report.warnings("d/Dockerfile"),
        [
            "d/Dockerfile:2:3: JSONArgsRecommended: JSON arguments recommended for CMD to prevent unintended behavior related to OS signals",
            "d/Dockerfile:3:1: UndefinedVar: Usage of undefined variable '$b'",
            "d/Dockerfile:3:1: UndefinedVar: Usage of undefined variable '$c'",
        ]
    );
    assert_eq!(report.violations.len(), 4);
}
