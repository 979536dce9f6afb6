//! Whole Dockerfiles → plans, in a form that is easy to read; problems with their places.

use std::fmt::Write as _;

use super::*;
use crate::dockerfile::{self, DockerfileError};
use crate::image::{Platform, Reference};

/// A Dockerfile with everything that planning it takes.
#[derive(Clone)]
struct Case {
    text: String,
    settings: Settings,
    /// Configs of bases that differ from [`base`].
    bases: Vec<(&'static str, ImageConfig)>,
}

fn case(text: &str) -> Case {
    Case {
        text: text.to_owned(),
        settings: Settings::new(
            Platform::parse("linux/arm64").unwrap(),
            Platform::parse("linux/amd64").unwrap(),
        ),
        bases: Vec::new(),
    }
}

/// An image config with a bit of everything that is inherited.
fn base() -> ImageConfig {
    let mut image = ImageConfig::scratch(Platform::parse("linux/arm64").unwrap());
    image.config.env = vec!["PATH=/bin".into(), "BASE=base".into()];
    image.config.cmd = Some(vec!["/bin/sh".into()]);
    image.config.working_dir = "/start".into();
    image
}

/// The name of a needed image.
fn source(need: &ImageNeed) -> String {
    match &need.source {
        ImageSource::Registry(reference) => reference.to_string(),
        ImageSource::Layout(context) => format!("layout {}", context.0),
    }
}

impl Case {
    fn arg(mut self, name: &str, value: &str) -> Self {
        self.settings.build_args.insert(name.into(), value.into());
        self
    }

    fn target(mut self, name: &str) -> Self {
        self.settings.target = Some(name.into());
        self
    }

    fn base(mut self, name: &'static str, change: impl FnOnce(&mut ImageConfig)) -> Self {
        let mut image = base();
        change(&mut image);
        self.bases.push((name, image));
        self
    }

    fn triggers(self, triggers: &[&str]) -> Self {
        let triggers = triggers.iter().map(ToString::to_string).collect();
        self.base("base", |image| image.config.on_build = Some(triggers))
    }

    fn graph(&self) -> Result<(dockerfile::Dockerfile, StageGraph), DockerfileError> {
        let dockerfile = dockerfile::parse("Dockerfile", self.text.as_bytes())?;
        let graph = graph(&dockerfile, &self.settings, &|need| Some(self.image(need)))?;
        Ok((dockerfile, graph))
    }

    fn image(&self, need: &ImageNeed) -> ImageConfig {
        let is_it = |name| ImageSource::Registry(Reference::parse(name).unwrap()) == need.source;
        let given = self.bases.iter().find(|(name, _)| is_it(name));
        given.map_or_else(base, |(_, image)| image.clone())
    }

    fn try_plan(&self) -> Result<Plan, DockerfileError> {
        let (dockerfile, graph) = self.graph()?;
        let images: Vec<ImageConfig> = graph.images.iter().map(|need| self.image(need)).collect();
        lower(&dockerfile, &graph, &self.settings, &images)
    }

    fn plan(&self) -> Plan {
        self.try_plan()
            .unwrap_or_else(|error| panic!("{}\n{error}", self.text))
    }

    /// What is told of it.
    fn warnings(&self) -> Vec<String> {
        self.joined(&["linux/arm64"]).warnings
    }

    /// The plans for all of `platforms` as one; with one, for that of the settings.
    fn joined(&self, platforms: &[&str]) -> Joined {
        let several = platforms.len() > 1;
        let plans = platforms.iter().map(|platform| {
            let mut case = self.clone();
            case.settings.multi_platform = several;
            if several {
                case.settings.platform = Platform::parse(platform).unwrap();
            }
            let (_, graph) = case.graph().unwrap();
            (graph, case.plan())
        });
        join(plans.collect())
    }

    /// One line for each step.
    #[track_caller]
    fn steps(&self, expected: &[&str]) {
        let plan = self.plan();
        let mut lines: Vec<String> = plan.steps.iter().enumerate().map(step_line).collect();
        let result = plan.result.map_or("nothing".into(), |id| id.0.to_string());
        lines.push(format!("result {result}"));
        assert_eq!(lines, expected, "{}", self.text);
    }

    /// The config as JSON, without what [`base`] has.
    #[track_caller]
    fn config(&self, expected: &str) {
        let mut config = serde_json::to_value(&self.plan().config.config).unwrap();
        let inherited = serde_json::to_value(&base().config).unwrap();
        let all = config.as_object_mut().unwrap();
        all.retain(|key, value| inherited.get(key) != Some(value));
        assert_eq!(config.to_string(), expected, "{}", self.text);
    }

    /// The history; entries without a layer in parentheses.
    #[track_caller]
    fn history(&self, expected: &[&str]) {
        let lines: Vec<String> = (self.plan().history.iter())
            .map(|entry| {
                let text = entry.created_by.as_deref().unwrap();
                if entry.empty_layer {
                    format!("({text})")
                } else {
                    text.to_owned()
                }
            })
            .collect();
        assert_eq!(lines, expected, "{}", self.text);
    }

    /// What the last `RUN` has as environment, proxy settings after a `|`.
    #[track_caller]
    fn environment(&self, expected: &str) {
        let plan = self.plan();
        let run = plan
            .steps
            .iter()
            .rev()
            .find_map(|step| match &step.operation {
                Operation::Run(run) => Some(run),
                _ => None,
            });
        let run = run.unwrap();
        let mut text = run.env.join(" ");
        if !run.proxy_env.is_empty() {
            let _ = write!(text, " | {}", run.proxy_env.join(" "));
        }
        assert_eq!(text, expected, "{}", self.text);
    }

    /// Everything that is wrong: place, message and hint.
    #[track_caller]
    fn problems(&self, expected: &[&str]) {
        let Err(error) = self.try_plan() else {
            panic!("nothing is wrong with\n{}", self.text);
        };
        let lines: Vec<String> = (error.problems.iter())
            .map(|problem| {
                let place = dockerfile::place(&error.name, &error.text, problem.span);
                let hint = problem.hint.as_ref();
                let hint = hint.map_or(String::new(), |hint| format!(" ({hint})"));
                format!("{place}: {}{hint}", problem.message)
            })
            .collect();
        assert_eq!(lines, expected, "{}", self.text);
    }
}

fn step_line((number, step): (usize, &Step)) -> String {
    let parent = step
        .parent
        .map_or(String::new(), |p| format!(" on {}", p.0));
    let operation = match &step.operation {
        Operation::Image(image) => format!("image {}", image.0),
        Operation::Run(run) => {
            let network = match run.network {
                Network::Default => "",
                Network::None => " offline",
                Network::Host => " online",
            };
            let user = format!(
                "{}{}",
                if run.user.is_empty() { "" } else { " as " },
                run.user
            );
            let mut text = format!("run {:?} in {}{user}{network}", run.args, run.cwd);
            for mount in &run.mounts {
                let _ = write!(text, " mount {:?}: {:?}", mount.target, mount.kind);
            }
            for source in &run.sources {
                let _ = write!(text, " from {}", source.0);
            }
            text
        }
        Operation::Copy(copy) => {
            let what = &copy.definition;
            let from = match (copy.from, copy.source_step) {
                (CopyFrom::Context(_), _) => "context".to_owned(),
                (CopyFrom::Step, Some(step)) => step.0.to_string(),
                (CopyFrom::Step, None) => "nothing".to_owned(),
            };
            let paths = what.sources.iter().filter_map(|source| match source {
                CopySource::Path(path) => Some(path),
                _ => None,
            });
            let mut text = format!("copy {from} {:?}", paths.collect::<Vec<_>>());
            for source in &what.sources {
                let _ = match source {
                    CopySource::Path(_) => Ok(()),
                    CopySource::Inline { name, content } => write!(text, " {name}={content:?}"),
                    other => write!(text, " {other:?}"),
                };
            }
            let _ = write!(text, " to {}", what.destination);
            if let Some(chown) = &what.chown {
                let _ = write!(text, " chown {chown}");
            }
            match &what.chmod {
                Some(Chmod::Mode(mode)) => text.push_str(&format!(" chmod {mode:o}")),
                Some(Chmod::Symbolic(changes)) => text.push_str(&format!(" chmod {changes}")),
                None => {}
            }
            for pattern in &what.excludes {
                let _ = write!(text, " without {pattern}");
            }
            for (is_set, flag) in [
                (what.unpack, " unpack"),
                (what.unpack_remote, " unpack-remote"),
                (what.link, " link"),
                (what.parents, " parents"),
            ] {
                text.push_str(if is_set { flag } else { "" });
            }
            text
        }
        Operation::MakeDirectory(make) => format!("mkdir {} {:?}", make.path, make.user),
    };
    let place = step.place.strip_prefix("Dockerfile:").unwrap();
    format!("{number}{parent} {place} {}: {operation}", step.name)
}

#[test]
fn stages_that_the_target_needs_are_planned() {
    let text = "FROM base AS one\nRUN a\nFROM other AS unused\nRUN --network=host x\n\
                FROM one AS Two\nRUN b\nFROM scratch\nCOPY --from=TWO /x /y/\n";
    case(text).steps(&[
        "0 1:6 [one 1/2] FROM base AS one: image 0",
        "1 on 0 2:1 [one 2/2] RUN a: run [\"/bin/sh\", \"-c\", \"a\"] in /start",
        "2 on 1 6:1 [two 2/2] RUN b: run [\"/bin/sh\", \"-c\", \"b\"] in /start",
        "3 8:1 [stage-3 1/1] COPY --from=TWO /x /y/: copy 2 [\"/x\"] to /y/",
        "result 3",
    ]);
    for (target, result) in [("ONE", "result 1"), ("two", "result 2")] {
        let plan = case(text).target(target).plan();
        assert_eq!(format!("result {}", plan.result.unwrap().0), result);
        assert_eq!(plan.steps.len(), plan.result.unwrap().0 + 1);
    }
    // What is wrong with a stage stops the build only where it is needed.
    case(text).target("unused").problems(&[
        "Dockerfile:4:15: RUN --network=host needs the entitlement network.host, which was not allowed (allow it with --allow network.host if you trust this Dockerfile)",
    ]);
    for target in ["three", "0", "3", ""] {
        case(text).target(target).problems(&[&format!(
            "Dockerfile:1:1: target stage {target:?} could not be found (the stages are: one, unused, two)"
        )]);
    }
    case("FROM scratch").target("x").problems(&[
        "Dockerfile:1:1: target stage \"x\" could not be found (no stage of this Dockerfile has a name (\"FROM image AS name\"))",
    ]);
    case("FROM scratch\nENV A=1").steps(&["result nothing"]);
}

#[test]
fn images_are_needed_once_for_each_platform() {
    let text = "FROM base AS a\nFROM --platform=$BUILDPLATFORM docker.io/library/base:latest AS b\n\
                FROM base\nCOPY --from=a / /a\nCOPY --from=b / /b\nCOPY --from=Tool:1 /t /t\n";
    // An image's name has no upper case.
    case(text).problems(&[
        "Dockerfile:6:13: invalid reference \"Tool:1\": the repository must be lower case",
    ]);
    let text = text.replace("Tool", "tool");
    let (_, graph) = case(&text).graph().unwrap();
    let images: Vec<String> = (graph.images.iter())
        .map(|i| format!("{} {} {}", source(i), i.platform, i.place))
        .collect();
    assert_eq!(
        images,
        [
            "docker.io/library/base:latest linux/arm64 Dockerfile:3:6",
            "docker.io/library/tool:1 linux/arm64 Dockerfile:6:13",
            "docker.io/library/base:latest linux/amd64 Dockerfile:2:32",
        ]
    );
    case(&text).steps(&[
        "0 1:6 [a 1/1] FROM base AS a: image 0",
        "1 2:32 [b 1/1] FROM --platform=$BUILDPLATFORM docker.io/library/base:latest AS b: image 2",
        "2 on 0 4:1 [stage-2 2/4] COPY --from=a / /a: copy 0 [\"/\"] to /a",
        "3 on 2 5:1 [stage-2 3/4] COPY --from=b / /b: copy 1 [\"/\"] to /b",
        "4 6:13 FROM docker.io/library/tool:1: image 1",
        "5 on 3 6:1 [stage-2 4/4] COPY --from=tool:1 /t /t: copy 4 [\"/t\"] to /t",
        "result 5",
    ]);
}

#[test]
fn copy_from_names_stages_before_it() {
    let ok = |from: &str, step: Option<&str>| {
        let text = format!(
            "FROM base AS s\nRUN 1\nFROM base AS user\nRUN 2\nFROM base AS s\nRUN 3\n\
             FROM scratch\nCOPY --from={from} /f /f"
        );
        let plan = case(&text).plan();
        let Operation::Copy(copy) = &plan.steps.last().unwrap().operation else {
            panic!("the last step is no copy");
        };
        let source = match copy.source_step.map(|id| &plan.steps[id.0].operation) {
            Some(Operation::Run(run)) => run.args.last().map(String::as_str),
            _ => None,
        };
        assert_eq!(source, step, "{from}");
    };
    // The last of two stages with one name is meant; the first is reached by its number.
    ok("s", Some("3"));
    ok("S", Some("3"));
    ok("\"s\"", Some("3"));
    ok("0", Some("1"));
    ok("2", Some("3"));
    ok("user", Some("2"));
    ok("scratch", None);
    let fails = |from: &str, problem: &str| {
        case(&format!(
            "FROM base AS before\nFROM base AS here\nCOPY --from={from} /f /f\nFROM base AS later\nFROM here\n"
        ))
        .problems(&[&format!("Dockerfile:3:13: {problem}")]);
    };
    let hint = "(a stage can read only from stages before it)";
    fails(
        "here",
        &format!("cannot copy from stage \"here\": it is this stage itself {hint}"),
    );
    fails(
        "Later",
        &format!("cannot copy from stage \"Later\": it is a later stage {hint}"),
    );
    fails(
        "1",
        "invalid stage index 1: this is stage 1, counted from 0",
    );
    fails(
        "7",
        "invalid stage index 7: this is stage 1, counted from 0",
    );
    fails(
        "$A",
        "variables are not expanded in --from (name a stage (\"FROM $IMAGE AS source\") and copy from that)",
    );
}

#[test]
fn from_takes_global_arguments() {
    let from = |text: &str, expected: &str| {
        let (_, graph) = case(text).arg("GIVEN", "given").graph().unwrap();
        let images: Vec<String> = (graph.images.iter()).map(source).collect();
        assert_eq!(images.join(" "), expected, "{text}");
    };
    from("ARG A=a\nARG B=$A/b\nFROM $B:${C:-1}", "docker.io/a/b:1");
    from("ARG A=a B=${A}b\nFROM $B", "docker.io/library/ab:latest");
    from(
        "ARG GIVEN=default\nFROM $GIVEN",
        "docker.io/library/given:latest",
    );
    from(
        "ARG GIVEN\nFROM x-$GIVEN",
        "docker.io/library/x-given:latest",
    );
    from(
        "FROM base-$TARGETARCH-$BUILDARCH",
        "docker.io/library/base-arm64-amd64:latest",
    );
    from(
        "FROM base-$TARGETSTAGE AS Last",
        "docker.io/library/base-last:latest",
    );
    from(
        "FROM base-$TARGETSTAGE",
        "docker.io/library/base-default:latest",
    );
    // An argument of a stage, or one that nobody declared, is not seen.
    let blank = "(variables in FROM come from ARG instructions before the first FROM)";
    case("FROM base\nARG A=x\nFROM $A").problems(&[&format!(
        "Dockerfile:3:6: base name ($A) should not be blank {blank}"
    )]);
    case("FROM $GIVEN").arg("GIVEN", "x").problems(&[&format!(
        "Dockerfile:1:6: base name ($GIVEN) should not be blank {blank}"
    )]);
}

#[test]
fn arguments_and_variables() {
    // The later of ENV and ARG wins, for expansion and RUN; history says what RUN saw.
    let text = "FROM base\nARG BASE=argument\nARG X=argument\nENV X=environment\nENV Y=environment\n\
                ARG Y=argument\nRUN x\nLABEL seen=\"$BASE $X $Y\"";
    let all = || {
        case(text)
            .arg("X", "given")
            .arg("Y", "given")
            .arg("BASE", "given")
    };
    all().environment("PATH=/bin BASE=given X=environment Y=given");
    all().history(&[
        "(ARG BASE=given)",
        "(ARG X=given)",
        "(ENV X=environment)",
        "(ENV Y=environment)",
        "(ARG Y=given)",
        "RUN |3 BASE=given X=environment Y=given /bin/sh -c x # buildkit",
        "(LABEL seen=given environment given)",
    ]);
    all().config(
        r#"{"Env":["PATH=/bin","BASE=base","X=environment","Y=environment"],"Labels":{"seen":"given environment given"}}"#,
    );
    // Declared without a value: counted, not set. Declared again: counted once.
    let text = "ARG GLOBAL=g\nFROM base\nARG ONE=1\nARG TWO THREE=\"x y\"\nARG GLOBAL\nRUN [\"/c\"]\n\
                ARG THREE=\nRUN d\n";
    case(text).history(&[
        "(ARG ONE=1)",
        "(ARG TWO THREE=x y)",
        "(ARG GLOBAL=g)",
        "RUN |4 ONE=1 TWO= THREE=x y GLOBAL=g /c # buildkit",
        "(ARG THREE=)",
        "RUN |4 ONE=1 TWO= THREE= GLOBAL=g /bin/sh -c d # buildkit",
    ]);
    case(text).environment("PATH=/bin BASE=base ONE=1 THREE= GLOBAL=g");
    // Names of one ARG see each other, pairs of one ENV do not.
    case("FROM base\nARG A=1 B=${A}2 C\nENV A=3 D=$A$B\nRUN x")
        .arg("C", "c")
        .history(&[
            "(ARG A=1 B=12 C=c)",
            "(ENV A=3 D=112)",
            "RUN |3 A=3 B=12 C=c /bin/sh -c x # buildkit",
        ]);
    // A stage built on another has its arguments; one beside it has not.
    case("FROM base AS a\nARG A=1\nFROM a\nRUN x$A").environment("PATH=/bin BASE=base A=1");
    case("FROM base AS a\nARG A=1\nFROM base\nCOPY --from=a /x$A /x\nRUN x")
        .environment("PATH=/bin BASE=base");
    case("FROM base\nRUN x")
        .arg("A", "1")
        .environment("PATH=/bin BASE=base");
    // Shell forms are the shell's to expand; everything else is done here.
    case("FROM base\nENV A=\"a b\"\nRUN echo $A\nCOPY $A ${A#a} \"$A\" /$A/\n").history(&[
        "(ENV A=a b)",
        "RUN /bin/sh -c echo $A # buildkit",
        "COPY a b  b a b /a b/ # buildkit",
    ]);
    case("FROM base\nENV A=${B:?missing}\nLABEL ${A:?no}=1").problems(&[
        "Dockerfile:2:7: cannot expand \"${B:?missing}\": B: missing",
        "Dockerfile:3:7: cannot expand \"${A:?no}\": A: no",
    ]);
}

#[test]
fn platform_arguments() {
    let names =
        "TARGETPLATFORM TARGETOS TARGETARCH TARGETVARIANT BUILDPLATFORM BUILDARCH TARGETSTAGE";
    let text = format!("FROM base AS One\nARG {names}\nRUN x\nFROM base\n");
    case(&text).target("oNE").environment(
        "PATH=/bin BASE=base TARGETPLATFORM=linux/arm64 TARGETOS=linux TARGETARCH=arm64 \
         TARGETVARIANT= BUILDPLATFORM=linux/amd64 BUILDARCH=amd64 TARGETSTAGE=oNE",
    );
    case("FROM base\nARG TARGETARCH\nARG TARGETOS=mine\nARG TARGETSTAGE\nRUN x")
        .arg("TARGETARCH", "other")
        .environment("PATH=/bin BASE=base TARGETARCH=other TARGETOS=mine TARGETSTAGE=default");
    case("FROM base AS Last\nARG TARGETSTAGE\nRUN x")
        .environment("PATH=/bin BASE=base TARGETSTAGE=last");
    // Not declared, not seen.
    case("FROM base\nLABEL a=[$TARGETARCH]").config(r#"{"Labels":{"a":"[]"}}"#);
    case("FROM --platform=linux/nonsense/v1/x base").problems(&[
        "Dockerfile:1:17: invalid platform \"linux/nonsense/v1/x\": expected OS/ARCHITECTURE[/VARIANT], such as \"linux/arm64\"",
    ]);
}

#[test]
fn some_arguments_are_for_the_builder() {
    let scan = case("FROM base\nARG BUILDKIT_SBOM_SCAN_STAGE=true\nRUN x");
    scan.environment("PATH=/bin BASE=base");
    scan.history(&[
        "(ARG BUILDKIT_SBOM_SCAN_STAGE=true)",
        "RUN |1 BUILDKIT_SBOM_SCAN_STAGE=true /bin/sh -c x # buildkit",
    ]);
    let warnings = |name: &str, value: &str| case("FROM base").arg(name, value).warnings();
    assert_eq!(
        warnings("BUILDKIT_MULTI_PLATFORM", "true"),
        [] as [String; 0]
    );
    assert_eq!(warnings("BUILDKIT_INLINE_CACHE", "1"), [] as [String; 0]);
}

#[test]
fn proxies_reach_run_alone() {
    let text = "FROM base\nRUN x\nENV E=[$HTTP_PROXY]";
    let all = || {
        case(text)
            .arg("HTTP_PROXY", "http://p:1")
            .arg("no_proxy", "h")
    };
    all().environment(
        "PATH=/bin BASE=base | HTTP_PROXY=http://p:1 http_proxy=http://p:1 NO_PROXY=h no_proxy=h",
    );
    all().history(&["RUN /bin/sh -c x # buildkit", "(ENV E=[])"]);
    // Declared or set, it is a variable as any other.
    case("FROM base\nARG NO_PROXY\nENV http_proxy=own\nRUN x")
        .arg("NO_PROXY", "a")
        .arg("HTTP_PROXY", "b")
        .environment("PATH=/bin BASE=base NO_PROXY=a http_proxy=own");
}

#[test]
fn triggers_of_the_base_run_first() {
    let all = || {
        case("FROM base\nRUN own\nONBUILD RUN next")
            .triggers(&["ARG F=plain", "RUN echo $F", "WORKDIR sub", "COPY a ."])
            .arg("F", "given")
    };
    all().steps(&[
        "0 1:6 [1/5] FROM base: image 0",
        "1 on 0 1:6 [2/5] RUN echo $F: run [\"/bin/sh\", \"-c\", \"echo $F\"] in /start",
        "2 on 1 1:6 [3/5] WORKDIR sub: mkdir /start/sub \"\"",
        "3 on 2 1:6 [4/5] COPY a .: copy context [\"a\"] to /start/sub/",
        "4 on 3 2:1 [5/5] RUN own: run [\"/bin/sh\", \"-c\", \"own\"] in /start/sub",
        "result 4",
    ]);
    all().config(r#"{"OnBuild":["RUN next"],"WorkingDir":"/start/sub"}"#);
    all().history(&[
        "(ARG F=given)",
        "RUN |1 F=given /bin/sh -c echo $F # buildkit",
        "WORKDIR /start/sub",
        "COPY a . # buildkit",
        "RUN |1 F=given /bin/sh -c own # buildkit",
    ]);
    // Those of a stage run in its children, not in its grandchildren.
    case("FROM base AS p\nONBUILD LABEL a=1\nFROM p AS c\nONBUILD LABEL b=1\nFROM c")
        .history(&["(LABEL a=1)", "(LABEL b=1)"]);
    case("FROM base AS b\nRUN ok").triggers(&["RUN --network=host x", "COPY --from=b a b", "FROM x"]).problems(&[
        "Dockerfile:1:6: ONBUILD \"RUN --network=host x\" of the base image: RUN --network=host needs the entitlement network.host, which was not allowed (allow it with --allow network.host if you trust this Dockerfile)",
        "Dockerfile:1:6: cannot copy from stage \"b\": it is this stage itself (a stage can read only from stages before it)",
        "Dockerfile:1:6: ONBUILD \"FROM x\" of the base image: FROM is not allowed as an ONBUILD trigger",
    ]);
    case("FROM base AS b\nRUN ok")
        .triggers(&["STOPSIGNAL NONE"])
        .problems(&[
            "Dockerfile:1:6: ONBUILD \"STOPSIGNAL NONE\" of the base image: invalid signal: NONE (a signal is a number from 1 to 64 or a name such as SIGTERM)",
        ]);
    // Its advice comes with it, and its own places do not.
    case("FROM base AS b\nRUN ok")
        .triggers(&[
            "RUN --mount=type=bind,target=/ ls",
            "RUN --mount=type=cache,target=/c,sharing=$A ls",
        ])
        .problems(&[
            "Dockerfile:1:6: ONBUILD \"RUN --mount=type=bind,target=/ ls\" of the base image: invalid mount target \"/\" (a step's root filesystem is not covered: mount below it)",
            "Dockerfile:1:6: ONBUILD \"RUN --mount=type=cache,target=/c,sharing=$A ls\" of the base image: invalid --mount: unsupported sharing value \"\": it must be locked or private or shared",
        ]);
    // A trigger may need more stages and images.
    case("FROM other AS one\nFROM base")
        .triggers(&["COPY --from=one a b", "RUN --mount=from=third,target=/t x"])
        .steps(&[
            "0 1:6 [one 1/1] FROM other AS one: image 2",
            "1 2:6 [stage-1 1/3] FROM base: image 0",
            "2 on 1 2:6 [stage-1 2/3] COPY --from=one a b: copy 0 [\"a\"] to /start/b",
            "3 2:6 FROM docker.io/library/third:latest: image 1",
            "4 on 2 2:6 [stage-1 3/3] RUN --mount=from=third,target=/t x: run [\"/bin/sh\", \"-c\", \"x\"] in /start mount Some(\"/t\"): Bind { from: Step(0), source: \"/\", read_write: false } from 3",
            "result 4",
        ]);
}

#[test]
fn working_directories_and_users() {
    let text = "FROM base\nENV D=deep\nWORKDIR a/../$D\nUSER app:staff\nWORKDIR //x//y/\nRUN --network=none r\n\
                WORKDIR /\nRUN s\nCOPY --chown=$D:1 --chmod=4755 f g/\nADD a.tar ..\nUSER\n";
    case(text.trim_end_matches("USER\n")).steps(&[
        "0 1:6 [1/7] FROM base: image 0",
        "1 on 0 3:1 [2/7] WORKDIR a/../$D: mkdir /start/deep \"\"",
        "2 on 1 5:1 [3/7] WORKDIR //x//y/: mkdir /x/y \"app:staff\"",
        "3 on 2 6:1 [4/7] RUN --network=none r: run [\"/bin/sh\", \"-c\", \"r\"] in /x/y as app:staff offline",
        "4 on 3 8:1 [5/7] RUN s: run [\"/bin/sh\", \"-c\", \"s\"] in / as app:staff",
        "5 on 4 9:1 [6/7] COPY --chown=$D:1 --chmod=4755 f g/: copy context [\"f\"] to /g/ chown deep:1 chmod 4755",
        "6 on 5 10:1 [7/7] ADD a.tar ..: copy context [\"a.tar\"] to / unpack",
        "result 6",
    ]);
    case(text.trim_end_matches("USER\n")).history(&[
        "(ENV D=deep)",
        "WORKDIR /start/deep",
        "(USER app:staff)",
        "WORKDIR //x//y/",
        "RUN /bin/sh -c r # buildkit",
        "(WORKDIR /)",
        "RUN /bin/sh -c s # buildkit",
        "COPY --chown=deep:1 --chmod=4755 f g/ # buildkit",
        "ADD a.tar .. # buildkit",
    ]);
    // A base without a working directory starts at the root.
    case("FROM base\nWORKDIR x")
        .base("base", |image| image.config.working_dir.clear())
        .config(r#"{"WorkingDir":"/x"}"#);
    case("FROM scratch\nWORKDIR w").steps(&["0 2:1 [1/1] WORKDIR w: mkdir /w \"\"", "result 0"]);
}

#[test]
fn instructions_that_change_the_config() {
    for (instructions, config, history) in [
        (
            "EXPOSE 80 443/tcp 53/UDP 7000-7001 80/tcp",
            r#"{"ExposedPorts":{"443/tcp":{},"53/udp":{},"7000/tcp":{},"7001/tcp":{},"80/tcp":{}}}"#,
            "(EXPOSE [443/tcp 53/udp 7000/tcp 7001/tcp 80/tcp 80/tcp])",
        ),
        (
            "VOLUME /a b",
            r#"{"Volumes":{"/a":{},"b":{}}}"#,
            "(VOLUME [/a b])",
        ),
        (
            "VOLUME [\"/a b\", \"/c\"]",
            r#"{"Volumes":{"/a b":{},"/c":{}}}"#,
            "(VOLUME [/a b /c])",
        ),
        (
            "LABEL a=1 \"b c\"='d e' f=$BASE",
            r#"{"Labels":{"a":"1","b c":"d e","f":"base"}}"#,
            "(LABEL a=1 b c=d e f=base)",
        ),
        (
            "STOPSIGNAL SIGUSR1",
            r#"{"StopSignal":"SIGUSR1"}"#,
            "(STOPSIGNAL SIGUSR1)",
        ),
        (
            "HEALTHCHECK --interval=90s --timeout=500ms --retries=2 CMD curl x || exit 1",
            r#"{"Healthcheck":{"Interval":90000000000,"Retries":2,"Test":["CMD-SHELL","curl x || exit 1"],"Timeout":500000000}}"#,
            "(HEALTHCHECK {Test:[CMD-SHELL curl x || exit 1] Interval:1m30s Timeout:500ms StartPeriod:0s StartInterval:0s Retries:2})",
        ),
        (
            "HEALTHCHECK --start-period=1h --start-interval=2.5s CMD [\"/c\", \"d e\"]",
            r#"{"Healthcheck":{"StartInterval":2500000000,"StartPeriod":3600000000000,"Test":["CMD","/c","d e"]}}"#,
            "(HEALTHCHECK {Test:[CMD /c d e] Interval:0s Timeout:0s StartPeriod:1h0m0s StartInterval:2.5s Retries:0})",
        ),
        (
            "HEALTHCHECK NONE",
            r#"{"Healthcheck":{"Test":["NONE"]}}"#,
            "(HEALTHCHECK {Test:[NONE] Interval:0s Timeout:0s StartPeriod:0s StartInterval:0s Retries:0})",
        ),
        (
            "SHELL [\"/bin/ash\", \"-e\"]",
            r#"{"Shell":["/bin/ash","-e"]}"#,
            "(SHELL [/bin/ash -e])",
        ),
        (
            "CMD echo \"$HOME\"",
            r#"{"ArgsEscaped":true,"Cmd":["/bin/sh","-c","echo \"$HOME\""]}"#,
            r#"(CMD ["/bin/sh" "-c" "echo \"$HOME\""])"#,
        ),
        ("CMD []", r#"{"ArgsEscaped":true,"Cmd":[]}"#, "(CMD [])"),
        ("USER $BASE:1", r#"{"User":"base:1"}"#, "(USER base:1)"),
        ("MAINTAINER A B <c@d>", "{}", "(MAINTAINER A B <c@d>)"),
    ] {
        let case = case(&format!("FROM base\n{instructions}"));
        case.config(config);
        case.history(&[history]);
    }
    let author = case("FROM base\nMAINTAINER A B <c@d>").plan().config.author;
    assert_eq!(author.as_deref(), Some("A B <c@d>"));
}

#[test]
fn entrypoints_drop_what_the_base_runs() {
    for (text, config) in [
        // The base's CMD goes, also where the base is a stage; the stage's own stays.
        ("FROM base\nENTRYPOINT [\"/e\"]", r#"{"Entrypoint":["/e"]}"#),
        (
            "FROM base AS a\nCMD [\"a\"]\nFROM a\nENTRYPOINT [\"/e\"]",
            r#"{"ArgsEscaped":true,"Entrypoint":["/e"]}"#,
        ),
        (
            "FROM base\nCMD [\"c\"]\nENTRYPOINT e",
            r#"{"ArgsEscaped":true,"Cmd":["c"],"Entrypoint":["/bin/sh","-c","e"]}"#,
        ),
        (
            "FROM base\nSHELL [\"/s\"]\nENTRYPOINT e\nCMD c",
            r#"{"ArgsEscaped":true,"Cmd":["/s","c"],"Entrypoint":["/s","e"],"Shell":["/s"]}"#,
        ),
    ] {
        case(text).config(config);
    }
}

#[test]
fn here_documents() {
    let text = "FROM base\nENV A=1\nRUN <<X\necho $A\nX\nRUN <<-Y\n\t\ttabs\nY\nRUN cat <<Z\nin $A\nZ\n\
                COPY <<one <<'two' f /d/\n$A\none\n$A\ntwo\n";
    case(text).steps(&[
        "0 1:6 [1/5] FROM base: image 0",
        "1 on 0 3:1 [2/5] RUN <<X: run [\"/bin/sh\", \"-c\", \"echo $A\\n\"] in /start",
        "2 on 1 6:1 [3/5] RUN <<-Y: run [\"/bin/sh\", \"-c\", \"tabs\\n\"] in /start",
        "3 on 2 9:1 [4/5] RUN cat <<Z: run [\"/bin/sh\", \"-c\", \"cat <<Z\\nin $A\\nZ\"] in /start",
        "4 on 3 12:1 [5/5] COPY <<one <<'two' f /d/: copy context [\"f\"] one=\"1\\n\" two=\"$A\\n\" to /d/",
        "result 4",
    ]);
    // A script with an interpreter of its own is mounted, and run.
    let script = case("FROM base\nRUN <<X\n#!/bin/python\nX\n");
    script.steps(&[
        "0 1:6 [1/2] FROM base: image 0",
        "1 on 0 2:1 [2/2] RUN <<X: run [\"/bin/sh\", \"-c\", \"/dev/pipes/X\"] in /start mount Some(\"/dev/pipes\"): Script { name: \"X\", content: \"#!/bin/python\\n\" }",
        "result 1",
    ]);
    script.history(&["RUN /bin/sh -c /dev/pipes/X # buildkit"]);
}

#[test]
fn warnings_stop_nothing() {
    let plan = case("FROM base\nCOPY a b c\nCOPY a b c/\nCOPY a b .").plan();
    assert_eq!(
        plan.warnings,
        [
            "Dockerfile:2:10: several sources and a destination without a trailing slash: unless it is a directory, the last file wins",
        ]
    );
}

#[test]
fn build_arguments_that_nothing_takes_are_named() {
    let given = |text: &str| {
        let names = ["A", "B", "HTTP_PROXY", "TARGETARCH", "SOURCE_DATE_EPOCH"];
        let case = names
            .iter()
            .fold(case(text), |case, name| case.arg(name, "amd64"));
        case.warnings()
    };
    assert_eq!(given("FROM base\nARG A B"), [] as [String; 0]);
    // A stage that is not built takes it all the same.
    assert_eq!(
        given("ARG A\nFROM base\nARG B\nFROM base"),
        [] as [String; 0]
    );
    assert_eq!(
        given("FROM base\nENV A=1"),
        ["build arguments that no ARG takes: A, B"]
    );
}

#[test]
fn what_was_not_allowed_is_refused_at_its_place() {
    for (instruction, column, what, entitlement) in [
        (
            "RUN --security=insecure x",
            16,
            "--security=insecure",
            Entitlement::SecurityInsecure,
        ),
        (
            "RUN --network=host x",
            15,
            "--network=host",
            Entitlement::NetworkHost,
        ),
    ] {
        let name = entitlement.name();
        let mut case = case(&format!("FROM base\n{instruction}"));
        case.problems(&[&format!(
            "Dockerfile:2:{column}: RUN {what} needs the entitlement {name}, which was not allowed (allow it with --allow {name} if you trust this Dockerfile)"
        )]);
        case.settings.allowed.insert(entitlement);
        case.plan();
    }
    // A stage that is not built asks for nothing.
    case("FROM base AS x\nRUN --network=host x\nFROM base").plan();
    for fine in [
        "RUN --security=sandbox x",
        "RUN --network=default x",
        // Which devices there are and may be had, the machine knows.
        "RUN --device=v/c=d x",
    ] {
        case(&format!("FROM base\n{fine}")).plan();
    }
}

/// The plan's last step as a RUN.
fn last_run(case: &Case) -> Run {
    match case.plan().steps.pop().map(|step| step.operation) {
        Some(Operation::Run(run)) => run,
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_a_run_may_is_in_its_step() {
    let mut case = case(
        "FROM base\nRUN --network=host --security=insecure --device=a/b=c,required --device=d/e --device=f/g,required=false x",
    );
    case.settings.allowed = [Entitlement::NetworkHost, Entitlement::SecurityInsecure].into();
    case.settings.run = RunSettings {
        network: Network::None,
        extra_hosts: vec![("h".into(), "1.2.3.4".into())],
        shm_size: Some(5),
        ulimits: Vec::new(),
    };
    let case = case.arg("BUILDKIT_SANDBOX_HOSTNAME", "box");
    let run = last_run(&case);
    assert_eq!(
        (run.network, run.security),
        (Network::Host, Security::Insecure)
    );
    let device = |name: &str, required| Device {
        name: name.into(),
        required,
    };
    assert_eq!(
        run.devices,
        [
            device("a/b=c", true),
            device("d/e", false),
            device("f/g", false)
        ]
    );
    assert_eq!(run.extra_hosts, [("h".to_owned(), "1.2.3.4".to_owned())]);
    assert_eq!((run.shm_size, run.hostname.as_str()), (Some(5), "box"));
    let text = "FROM base\nRUN x";
    let mut plain = self::case(text);
    assert_eq!(last_run(&plain).hostname, "buildkitsandbox");
    assert_eq!(last_run(&plain).network, Network::Default);
    plain.settings.run.network = Network::None;
    assert_eq!(last_run(&plain).network, Network::None);
}

#[test]
fn mounts_have_their_places_and_sources() {
    let case = case(
        "FROM base AS a\nFROM base\nWORKDIR /w\nENV T=tmp\n\
         RUN --mount=target=in,source=sub/../x --mount=from=a,source=/etc,target=/a,rw \
         --mount=type=cache,target=c/../d,sharing=locked,uid=3 --mount=type=cache,id=i,target=/i,from=scratch,ro \
         --mount=type=tmpfs,target=/$T,size=1k --mount=type=secret,id=s --mount=type=secret,id=p/q,env=E \
         --mount=type=secret,target=/k,mode=0644 --mount=type=ssh --mount=type=ssh,id=o,uid=7 --mount=type=ssh,target=/s x",
    )
    .arg("BUILDKIT_CACHE_MOUNT_NS", "ns");
    let run = last_run(&case);
    assert_eq!(run.sources, [StepId(0)]);
    let mounts: Vec<String> = run
        .mounts
        .iter()
        .map(|mount| {
            format!(
                "{} {:?}",
                mount.target.as_deref().unwrap_or("-"),
                mount.kind
            )
        })
        .collect();
    let secret = |rest: &str| format!("required: false, {rest}, uid: 0, gid: 0 }}");
    assert_eq!(
        mounts,
        [
            "/w/in Bind { from: Context(ContextId(0)), source: \"/x\", read_write: false }".to_owned(),
            "/a Bind { from: Step(0), source: \"/etc\", read_write: true }".to_owned(),
            "/w/d Cache { id: \"ns/d\", from: Scratch, source: \"/\", sharing: Locked, read_only: false, mode: None, uid: Some(3), gid: None }".to_owned(),
            "/i Cache { id: \"ns/i\", from: Scratch, source: \"/\", sharing: Shared, read_only: true, mode: None, uid: None, gid: None }".to_owned(),
            "/tmp Tmpfs { size_bytes: Some(1024) }".to_owned(),
            format!("/run/secrets/s Secret {{ id: \"s\", env: None, {}", secret("mode: 256")),
            format!("- Secret {{ id: \"p/q\", env: Some(\"E\"), {}", secret("mode: 256")),
            format!("/k Secret {{ id: \"k\", env: None, {}", secret("mode: 420")),
            "/run/buildkit/ssh_agent.0 Ssh { id: \"default\", required: false, mode: 384, uid: 0, gid: 0 }".to_owned(),
            "/run/buildkit/ssh_agent.1 Ssh { id: \"o\", required: false, mode: 384, uid: 7, gid: 0 }".to_owned(),
            "/s Ssh { id: \"default\", required: false, mode: 384, uid: 0, gid: 0 }".to_owned(),
        ]
    );
    self::case("FROM base\nRUN --mount=type=tmpfs,target=/ x\nRUN --mount=from=later,target=/x y\nRUN --mount=type=bind,targt=/x y\nFROM base AS later").target("later").plan();
    self::case("FROM base AS t\nRUN --mount=type=tmpfs,target=/ x\nFROM base AS later").target("t").problems(&[
        "Dockerfile:2:13: invalid mount target \"/\" (a step's root filesystem is not covered: mount below it)",
    ]);
}

#[test]
fn what_copies_may_is_in_their_steps() {
    let steps = |instruction: &str, expected: &str| {
        let plan = case(&format!("FROM base\n{instruction}")).plan();
        let line = step_line((1, plan.steps.last().unwrap()));
        let (_, operation) = line.split_once(&format!("{instruction}: ")).unwrap();
        assert_eq!(operation, expected);
    };
    steps("COPY --link a b", "copy context [\"a\"] to /start/b link");
    steps(
        "COPY --link --chmod=7 a b",
        "copy context [\"a\"] to /start/b chmod 7",
    );
    steps(
        "COPY --parents a/b/./c d/",
        "copy context [\"a/b/./c\"] to /start/d/ parents",
    );
    steps(
        "COPY --exclude=x --exclude=y/* a b",
        "copy context [\"a\"] to /start/b without x without y/*",
    );
    steps(
        "COPY --chmod=u+x,go=rX a b",
        "copy context [\"a\"] to /start/b chmod u+x,go=rX",
    );
    steps("ADD --unpack=false a b", "copy context [\"a\"] to /start/b");
    steps(
        "ADD --unpack a b",
        "copy context [\"a\"] to /start/b unpack unpack-remote",
    );
    steps(
        "ADD http://h/f b",
        "copy context [] Url { url: \"http://h/f\", checksum: None } to /start/b unpack",
    );
    steps(
        "ADD --keep-git-dir --checksum=abc https://h/r.git#v1:d b",
        "copy context [] Git { reference: \"https://h/r.git#v1:d\", checksum: Some(\"abc\"), keep_git_dir: Some(true) } to /start/b unpack",
    );
    let plan =
        case("FROM base\nCOPY --parents --chown=1 --chmod=u+x --link --exclude=e a b").plan();
    assert_eq!(
        plan.history[0].created_by.as_deref(),
        Some("COPY --parents --chown=1 --chmod=u+x a b # buildkit")
    );
    let digest = "sha256:000";
    case(&format!("FROM base\nADD --checksum={digest} http://h/f b\nADD --checksum={digest} f b\nADD --checksum=a http://h/f f b\nCOPY http://h/f git@h:r.git b\n"))
        .problems(&[
            "Dockerfile:2:16: invalid checksum \"sha256:000\": the number of digits is not that of the algorithm",
            "Dockerfile:3:16: checksum requires HTTP(S) or Git sources",
            "Dockerfile:4:16: checksum can't be specified for multiple sources",
            "Dockerfile:5:6: source can't be a URL for COPY: \"http://h/f\" (ADD fetches; COPY takes files of the context, of a stage or of an image)",
        ]);
}

#[test]
fn named_contexts_stand_in_for_stages_and_images() {
    let mut all = case(
        "FROM base AS dep\nRUN exit 1\nFROM docker.io/library/other:latest\nCOPY --from=dep /f /f\n\
         COPY --from=files x y\nCOPY --from=lay x y\nCOPY --from=none x y\n",
    );
    all.settings.contexts = NamedContexts::parse([
        "dep=./dir",
        "other::linux/amd64=docker-image://wrong",
        "other=docker-image://right:1",
        "files=./files",
        "lay=oci-layout:///layout",
        "none=docker-image://scratch",
    ])
    .unwrap();
    let (_, graph) = all.graph().unwrap();
    let images: Vec<String> = graph.images.iter().map(source).collect();
    assert_eq!(images, ["docker.io/library/right:1", "layout 3"]);
    let plan = all.plan();
    assert!(
        !plan
            .steps
            .iter()
            .any(|step| matches!(step.operation, Operation::Run(_)))
    );
    let froms: Vec<String> = plan
        .steps
        .iter()
        .filter_map(|step| match &step.operation {
            Operation::Copy(copy) => Some(format!("{:?} {:?}", copy.from, copy.source_step)),
            _ => None,
        })
        .collect();
    assert_eq!(
        froms,
        [
            "Context(ContextId(1)) None",
            "Step Some(StepId(0))",
            "Context(ContextId(2)) None",
            "Step Some(StepId(4))",
            "Step None",
        ]
    );
}

#[test]
fn what_has_no_effect_is_told() {
    let mut unused = case("FROM base AS a\nCOPY --from=used x y\nFROM base");
    unused.settings.contexts =
        NamedContexts::parse(["used=./a", "late=./b", "base::linux/386=./c"]).unwrap();
    let warnings = |case: &Case| case.warnings();
    assert_eq!(
        warnings(&unused),
        ["named contexts that nothing uses: late, used"]
    );
    assert_eq!(
        warnings(&unused.target("a")),
        ["named contexts that nothing uses: late"]
    );
    assert_eq!(
        warnings(&case(
            "FROM base\nRUN --mount=target=/b,id=x,RW --mount=type=tmpfs,target=/t,size=1k,id=y \
             --mount=type=cache,target=/c,id=x,mode=0700,sharing=locked x"
        )),
        [
            "Dockerfile:2:13: --mount: a mount of this type does not use \"id\"",
            "Dockerfile:2:39: --mount: a mount of this type does not use \"id\"",
        ]
    );
    let mut windows = case("FROM scratch\nCOPY a C:\\\\b");
    windows.settings.platform = Platform::parse("windows/amd64").unwrap();
    assert_eq!(
        warnings(&windows),
        [
            "paths of images for Windows are read as those of Linux: drive letters and backslashes are parts of names"
        ]
    );
}

#[test]
fn stages_of_their_own_are_not_looked_up() {
    let mut all = case("FROM base AS a\nRUN a\nFROM a AS b\nRUN b");
    let looked_up = |case: &Case| -> Vec<bool> {
        let plan = case.plan();
        plan.steps
            .iter()
            .skip(1)
            .map(|step| step.use_cache)
            .collect()
    };
    assert_eq!(looked_up(&all), [true, true]);
    all.settings.no_cache = NoCache::Stages(["B".to_owned()].into());
    assert_eq!(looked_up(&all), [true, false]);
    all.settings.no_cache = NoCache::Everything;
    assert_eq!(looked_up(&all), [false, false]);
}

#[test]
fn labels_of_the_command_line_win() {
    let mut all = case("FROM base\nLABEL a=1 b=2");
    all.settings.labels = BTreeMap::from([("a".into(), "x".into()), ("c".into(), String::new())]);
    all.config(r#"{"Labels":{"a":"x","b":"2","c":""}}"#);
}

#[test]
fn all_problems_are_told_at_once() {
    case("FROM base\nRUN --network=host x\nADD http://a/b c\nCOPY --from=3 a b\n").problems(&[
        "Dockerfile:2:15: RUN --network=host needs the entitlement network.host, which was not allowed (allow it with --allow network.host if you trust this Dockerfile)",
        "Dockerfile:4:13: invalid stage index 3: this is stage 0, counted from 0",
    ]);
    let signal = "(a signal is a number from 1 to 64 or a name such as SIGTERM)";
    let range = "(expected a number from 0 to 65535 or a range)";
    case(
        "FROM base\nSTOPSIGNAL SIGNOTHING\nEXPOSE 80/carrier\nEXPOSE 70000\nEXPOSE 9-8\nCOPY --chmod=8 a b\n\
         COPY --chmod=10000 a b\nCOPY --chmod=u+x a b\nVOLUME /a $NONE\n",
    )
    .problems(&[
        &format!("Dockerfile:2:12: invalid signal: SIGNOTHING {signal}"),
        "Dockerfile:3:8: invalid port: \"80/carrier\": invalid proto: carrier (expected tcp, udp or sctp)",
        &format!("Dockerfile:4:8: invalid containerPort: 70000 {range}"),
        &format!("Dockerfile:5:8: invalid containerPort: 9-8 {range}"),
        "Dockerfile:6:14: invalid chmod parameter: \"8\": it should be octal and between 0 and 07777",
        "Dockerfile:7:14: invalid chmod parameter: \"10000\": it should be octal and between 0 and 07777",
        "Dockerfile:9:11: VOLUME specified can not be an empty string",
    ]);
}

#[test]
fn the_image_keeps_what_is_still_true_of_its_base() {
    let config = case("FROM base")
        .base("base", |image| {
            for key in ["container", "os.features"] {
                image.other.insert(key.into(), "x".into());
            }
            for key in ["Hostname", "StopTimeout"] {
                image.config.other.insert(key.into(), 5.into());
            }
            image.platform = Platform::parse("linux/386").unwrap();
        })
        .plan()
        .config;
    assert_eq!(config.other.keys().collect::<Vec<_>>(), ["os.features"]);
    assert_eq!(
        config.config.other.keys().collect::<Vec<_>>(),
        ["StopTimeout"]
    );
    // The image is for what was asked for.
    assert_eq!(config.platform.to_string(), "linux/arm64");
}

#[test]
fn frontends_of_other_languages_are_not_run() {
    for known in [
        "docker/dockerfile:1",
        "docker.io/docker/dockerfile:1.7-labs@sha256:00 --more",
        "docker/dockerfile-upstream:master",
        "mirror.example:5000/dockerfile",
    ] {
        case(&format!("# syntax={known}\nFROM scratch")).plan();
    }
    let problem = |line: &str, origin: &str, image: &str| {
        format!(
            "Dockerfile:{line}: {origin} asks for the frontend {image:?}, which is not run here \
             (to have the file read as a plain Dockerfile: --build-arg BUILDKIT_SYNTAX=dockerfile.v0)"
        )
    };
    for other in [
        "foobar",
        "some/dockerfile-x:1",
        "dockerfile/other:dockerfile",
    ] {
        let other_case = || case(&format!("#syntax={other}\nFROM scratch"));
        other_case().problems(&[&problem("1:9", "the syntax directive", other)]);
        other_case().arg("BUILDKIT_SYNTAX", "dockerfile.v0").plan();
    }
    case("# syntax=docker/dockerfile:1\nFROM scratch")
        .arg("BUILDKIT_SYNTAX", "a/b c=d")
        .problems(&[&problem("2:1", "BUILDKIT_SYNTAX", "a/b")]);
}

#[test]
fn the_platform_of_the_image() {
    let marked = |text: &str, asked: Option<&str>, base: &str| {
        let mut case = case(text).base("base", |image| {
            image.platform = Platform {
                os_version: (base == "windows/amd64").then(|| "10.0.20348.1006".to_owned()),
                ..Platform::parse(base).unwrap()
            };
        });
        case.settings.platform_is_given = asked.is_some();
        case.settings.platform = Platform::parse(asked.unwrap_or("linux/amd64")).unwrap();
        case.plan().config.platform.to_string()
    };
    let from = "FROM base";
    // Asked for: whatever the base says, which is kept only where it says more.
    assert_eq!(
        marked(from, Some("linux/arm64"), "linux/386"),
        "linux/arm64"
    );
    assert_eq!(
        marked(from, Some("linux/amd64"), "linux/amd64/v3"),
        "linux/amd64/v3"
    );
    assert_eq!(
        marked(from, Some("windows/amd64"), "windows/amd64"),
        "windows(10.0.20348.1006)/amd64"
    );
    assert_eq!(
        marked(from, Some("windows(1.2.3)/amd64"), "windows/amd64"),
        "windows(1.2.3)/amd64"
    );
    assert_eq!(
        marked(from, Some("windows/arm64"), "windows/amd64"),
        "windows/arm64"
    );
    // Not asked for: the base's.
    assert_eq!(marked(from, None, "linux/s390x"), "linux/s390x");
    let other = "FROM --platform=linux/riscv64 scratch";
    assert_eq!(marked(other, None, "linux/386"), "linux/riscv64");
    assert_eq!(
        marked(other, Some("linux/amd64"), "linux/386"),
        "linux/amd64"
    );
}

#[test]
fn every_image_but_those_for_windows_has_a_path_and_a_shell() {
    let config = |platform: &str, text: &str| {
        let mut case = case(text).base("base", |image| {
            image.platform = Platform::parse(platform).unwrap();
            image.config.env = vec!["A=1".into()];
        });
        case.settings.platform = Platform::parse(platform).unwrap();
        let config = case.plan().config.config;
        (config.env.join(" "), config.entrypoint.unwrap().join(" "))
    };
    let path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
    for (platform, text, env, entrypoint) in [
        (
            "linux/amd64",
            "FROM base\nENTRYPOINT e",
            &*format!("A=1 {path}"),
            "/bin/sh -c e",
        ),
        (
            "linux/amd64",
            "FROM scratch\nENTRYPOINT e",
            path,
            "/bin/sh -c e",
        ),
        (
            "windows/amd64",
            "FROM base\nENTRYPOINT e",
            "A=1",
            "cmd /S /C e",
        ),
        (
            "windows/amd64",
            "FROM scratch\nENTRYPOINT e",
            "",
            "cmd /S /C e",
        ),
        (
            "windows/amd64",
            "FROM scratch\nSHELL [\"ps\"]\nENTRYPOINT e",
            "",
            "ps e",
        ),
    ] {
        assert_eq!(
            config(platform, text),
            (env.to_owned(), entrypoint.to_owned()),
            "{text}"
        );
    }
}

#[test]
fn texts_that_grow_without_end_are_refused_where_they_do() {
    let double = |count: usize| {
        let mut text = "FROM base\nENV A=0123456789abcdef\n".to_owned();
        for _ in 0..count {
            text.push_str("ENV A=$A$A\n");
        }
        text
    };
    // 16 bytes, doubled 18 times: 4 MiB.
    case(&double(18)).plan();
    let four = double(18);
    case(&format!("{four}ENV B=$A C=$A\nENV D=$A\nRUN x")).problems(&[
        "Dockerfile:22:1: the stage's variables and labels are longer than 16 MiB here",
    ]);
    case(&format!("{four}ENV B=$A C=$A D=$A E=$A F=$A")).problems(&[
        "Dockerfile:21:22: the instruction's values are longer than 16 MiB up to here",
    ]);
    case(&format!("{four}LABEL a=$A b=$A\nLABEL c=$A d=$A")).problems(&[
        "Dockerfile:22:1: the stage's variables and labels are longer than 16 MiB here",
    ]);
    // One variable, again and again in the history and in each step.
    case(&format!("{four}{}", "ENV B=$A\n".repeat(100))).problems(&[
        "Dockerfile:82:1: the variables of all steps and the history are longer than 256 MiB up to here",
    ]);
    case(&format!("{four}{}", "RUN x\n".repeat(100))).problems(&[
        "Dockerfile:82:1: the variables of all steps and the history are longer than 256 MiB up to here",
    ]);
}

#[test]
fn equal_steps_of_several_platforms_are_one() {
    let text = "FROM --platform=$BUILDPLATFORM base AS tools\nRUN make tools\n\
                FROM tools AS cross\nARG TARGETARCH\nRUN make\n\
                FROM base\nCOPY --from=tools a b\nCOPY --from=cross a c\nRUN check";
    let joined = case(text).joined(&["linux/amd64", "linux/arm/v7"]);
    let lines = joined.steps.iter().enumerate().map(|(number, step)| {
        let parent = step.parent.map_or("-".to_owned(), |id| id.0.to_string());
        let sources: Vec<usize> = step.sources().iter().map(|id| id.0).collect();
        let Step { name, platform, .. } = step;
        format!("{number} on {parent} {sources:?} {platform}: {name}")
    });
    assert_eq!(
        lines.collect::<Vec<_>>(),
        [
            "0 on - [] linux/amd64: [linux/amd64 tools 1/2] FROM --platform=$BUILDPLATFORM base AS tools",
            "1 on 0 [] linux/amd64: [linux/amd64 tools 2/2] RUN make tools",
            "2 on 1 [] linux/amd64: [linux/amd64 cross 2/2] RUN make",
            "3 on 0 [1] linux/amd64: [linux/amd64 stage-2 2/4] COPY --from=tools a b",
            "4 on 3 [2] linux/amd64: [linux/amd64 stage-2 3/4] COPY --from=cross a c",
            "5 on 4 [] linux/amd64: [linux/amd64 stage-2 4/4] RUN check",
            "6 on 1 [] linux/amd64: [linux/amd64->arm/v7 cross 2/2] RUN make",
            "7 on - [] linux/arm/v7: [linux/arm/v7 stage-2 1/4] FROM base",
            "8 on 7 [1] linux/arm/v7: [linux/arm/v7 stage-2 2/4] COPY --from=tools a b",
            "9 on 8 [6] linux/arm/v7: [linux/arm/v7 stage-2 3/4] COPY --from=cross a c",
            "10 on 9 [] linux/arm/v7: [linux/arm/v7 stage-2 4/4] RUN check",
        ]
    );
    let images: Vec<String> = (joined.images.iter())
        .map(|need| need.platform.to_string())
        .collect();
    assert_eq!(images, ["linux/amd64", "linux/arm/v7"]);
    let targets: Vec<_> = (joined.targets.iter())
        .map(|target| (target.platform.to_string(), target.result.map(|id| id.0)))
        .collect();
    assert_eq!(
        targets,
        [
            ("linux/amd64".to_owned(), Some(5)),
            ("linux/arm/v7".to_owned(), Some(10)),
        ]
    );
}

#[test]
fn what_runs_on_another_platform_is_another_step_and_what_only_copies_is_not() {
    let steps = |text: &str| {
        let joined = case(text).joined(&["linux/amd64", "linux/arm64"]);
        let result = joined.targets.iter().map(|t| t.result.map(|id| id.0));
        (joined.steps.len(), result.collect::<Vec<_>>())
    };
    assert_eq!(steps("FROM scratch\nCOPY a b"), (1, vec![Some(0), Some(0)]));
    assert_eq!(
        steps("FROM scratch\nCOPY a b\nRUN [\"b\"]"),
        (3, vec![Some(1), Some(2)])
    );
    // Also in one plan.
    let twice = "FROM base AS a\nRUN x\nFROM base AS b\nRUN x\nFROM scratch\n\
                 COPY --from=a / /\nCOPY --from=b / /b";
    assert_eq!(case(twice).joined(&["linux/amd64"]).steps.len(), 4);
    // But not what the cache may have and what it may not.
    let mut filtered = case(twice);
    filtered.settings.no_cache = NoCache::Stages(["a".to_owned()].into());
    assert_eq!(filtered.joined(&["linux/amd64"]).steps.len(), 5);
}

#[test]
fn platforms_warn_once_and_only_of_what_none_uses() {
    let mut both = case("FROM base AS a\nFROM base\nCOPY a b c\nCOPY --from=late x y");
    both.settings.contexts =
        NamedContexts::parse(["late=./a", "late::linux/arm64=./b", "none=./c"]).unwrap();
    assert_eq!(
        both.joined(&["linux/amd64", "linux/arm64"]).warnings,
        [
            "Dockerfile:3:10: several sources and a destination without a trailing slash: unless it is a directory, the last file wins",
            "named contexts that nothing uses: none",
        ]
    );
}

#[test]
fn a_stage_has_the_platform_of_the_stage_below_it() {
    let platforms = |text: &str| {
        let (_, graph) = case(text).graph().unwrap();
        let stages = graph.stages.iter().map(|node| node.platform.to_string());
        let images = graph.images.iter().map(|need| need.platform.to_string());
        (stages.collect::<Vec<_>>(), images.collect::<Vec<_>>())
    };
    let chain = "FROM --platform=linux/386 base AS a\nFROM a AS b\nFROM --platform=linux/s390x b\n\
                 COPY --from=image x y";
    // What is copied from is for what is built, as in BuildKit.
    assert_eq!(
        platforms(chain),
        (
            vec!["linux/386".to_owned(); 3],
            vec!["linux/arm64".to_owned(), "linux/386".to_owned()]
        )
    );
    // What is wrong is told once, where it stands.
    case("FROM --platform=x/y/z/z base AS a\nFROM a").problems(&[
        "Dockerfile:1:17: invalid platform \"x/y/z/z\": expected OS/ARCHITECTURE[/VARIANT], such as \"linux/arm64\"",
    ]);
}
