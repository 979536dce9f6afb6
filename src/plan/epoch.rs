//! `SOURCE_DATE_EPOCH`: seconds, or what to ask for them.
//!
//! <https://reproducible-builds.org/specs/source-date-epoch/>

use super::graph::global_args;
use super::lower::{copy_source, set_checksum};
use super::{CopySource, Settings};
use crate::dockerfile::expand::{Environment, expand_word};
use crate::dockerfile::{
    Dockerfile, DockerfileError, Instruction, InstructionKind, Problem, Stage, Word,
};

/// The build argument.
pub const SOURCE_DATE_EPOCH: &str = "SOURCE_DATE_EPOCH";

/// The last second of the year 9999, beyond which RFC 3339 cannot write a time.
const EPOCH_MAX: i64 = 253_402_300_799;

/// Where the date of a build comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SourceDate {
    /// The argument is there and says that there is none.
    Nothing,
    /// Seconds since 1970 UTC.
    Seconds(i64),
    /// `context`: the main context.
    MainContext,
    /// The named context of this name.
    NamedContext(String),
    /// The only source of a stage that does nothing but fetch it: a URL or a repository.
    Source(CopySource),
}

/// What `SOURCE_DATE_EPOCH` says: the build argument, else the default of a global `ARG`.
/// `None` where there is neither.
///
/// As in BuildKit, a value that is no number is `context`, or the name of a named context,
/// or of a stage with nothing but `FROM scratch`, `ARG` and one `ADD` of one remote source.
///
/// # Errors
/// [`DockerfileError`] for a value that is none of these, and a stage that does more.
pub fn source_date(
    dockerfile: &Dockerfile,
    settings: &Settings,
) -> Result<Option<SourceDate>, DockerfileError> {
    let args = global_args(dockerfile, settings)?;
    let given = settings.build_args.get(SOURCE_DATE_EPOCH);
    let default = args.get(SOURCE_DATE_EPOCH).filter(|text| !text.is_empty());
    let Some(text) = given.or(default) else {
        return Ok(None);
    };
    if text.is_empty() {
        return Ok(Some(SourceDate::Nothing));
    }
    let fail = |problem| super::graph::error(dockerfile, vec![problem]);
    let span = declaration(dockerfile).or_else(|| dockerfile.stages.first().map(|s| s.span));
    let fail_here = |message| fail(Problem::new(span.unwrap_or_default(), message));
    if let Ok(seconds) = text.parse::<i64>() {
        if (0..=EPOCH_MAX).contains(&seconds) {
            return Ok(Some(SourceDate::Seconds(seconds)));
        }
        return Err(fail_here(format!(
            "invalid {SOURCE_DATE_EPOCH}: {text}: expected seconds from 1970 to the year 9999"
        )));
    }
    if text == "context" {
        return Ok(Some(SourceDate::MainContext));
    }
    // What cannot be a context's name can be a stage's, or is none.
    if let Ok(Some((name, _))) = settings.contexts.lookup(text, &settings.platform) {
        return Ok(Some(SourceDate::NamedContext(name.to_owned())));
    }
    let named = |stage: &&Stage| {
        let name = stage.name.as_ref();
        name.is_some_and(|name| name.raw.eq_ignore_ascii_case(text))
    };
    match dockerfile.stages.iter().find(named) {
        Some(stage) => {
            let mut environment = args.clone();
            environment.remove(SOURCE_DATE_EPOCH);
            let source = only_source(dockerfile, settings, stage, environment).map_err(fail)?;
            Ok(Some(SourceDate::Source(source)))
        }
        None => Err(fail_here(format!(
            "invalid {SOURCE_DATE_EPOCH}: {text}: expected seconds since 1970 as a whole number, \
             \"context\", or the name of a named context or of a stage with one remote source"
        ))),
    }
}

/// Where the global `ARG` is.
fn declaration(dockerfile: &Dockerfile) -> Option<crate::dockerfile::Span> {
    let declares = |instruction: &&Instruction| match &instruction.kind {
        InstructionKind::Arg(declarations) => declarations
            .iter()
            .any(|declaration| declaration.name.raw == SOURCE_DATE_EPOCH),
        _ => false,
    };
    let mut instructions = dockerfile.global_args.iter().rev();
    instructions.find(declares).map(|found| found.span)
}

/// The one thing that a stage fetches.
fn only_source(
    dockerfile: &Dockerfile,
    settings: &Settings,
    stage: &Stage,
    mut environment: Environment,
) -> Result<CopySource, Problem> {
    let expand = |word: &Word, environment: &Environment| {
        expand_word(word, dockerfile.directives.escape, environment)
            .map_err(|error| Problem::new(word.span, error.to_string()))
    };
    if expand(&stage.base, &environment)? != "scratch" {
        return Err(Problem::new(
            stage.base.span,
            format!("the stage that {SOURCE_DATE_EPOCH} names must be FROM scratch"),
        ));
    }
    let mut source = None;
    for instruction in &stage.instructions {
        match &instruction.kind {
            InstructionKind::Arg(declarations) => {
                for declaration in declarations {
                    let name = expand(&declaration.name, &environment)?;
                    let value = match (settings.build_args.get(&name), &declaration.default) {
                        (Some(given), _) => given.clone(),
                        (None, Some(default)) => expand(default, &environment)?,
                        (None, None) => continue,
                    };
                    environment.insert(name, value);
                }
            }
            InstructionKind::Add(add) => {
                let [word] = add.sources.as_slice() else {
                    return Err(one_remote_add(instruction));
                };
                if source.is_some() || !add.heredocs.is_empty() {
                    return Err(one_remote_add(instruction));
                }
                let text = expand(word, &environment)?;
                let mut found = [copy_source(&text, word, true, add.keep_git_dir)?];
                if let Some(word) = &add.checksum {
                    let text = expand(word, &environment)?;
                    set_checksum(&mut found, &text, word, add)?;
                }
                let [found] = found;
                if !matches!(found, CopySource::Url { .. } | CopySource::Git { .. }) {
                    return Err(one_remote_add(instruction));
                }
                source = Some(found);
            }
            _ => {
                return Err(Problem::new(
                    instruction.span,
                    format!(
                        "the stage that {SOURCE_DATE_EPOCH} names does more than fetch one source"
                    ),
                )
                .with_hint("it may have ARG and one ADD of a URL or a git repository"));
            }
        }
    }
    source.ok_or_else(|| {
        Problem::new(
            stage.span,
            format!("the stage that {SOURCE_DATE_EPOCH} names has no ADD of a remote source"),
        )
    })
}

fn one_remote_add(instruction: &Instruction) -> Problem {
    Problem::new(
        instruction.span,
        format!(
            "the stage that {SOURCE_DATE_EPOCH} names must have one ADD, with one source that is \
             a URL or a git repository"
        ),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::context::NamedContexts;
    use crate::image::Platform;

    /// What a Dockerfile, with this build argument, says of its date.
    fn asked(text: &str, given: Option<&str>) -> Result<Option<SourceDate>, String> {
        let platform = Platform::parse("linux/amd64").unwrap();
        let mut settings = Settings::new(platform.clone(), platform);
        settings.contexts =
            NamedContexts::parse(["files=https://files.test/a.tar"].as_slice()).unwrap();
        if let Some(given) = given {
            let name = SOURCE_DATE_EPOCH.to_owned();
            settings.build_args.insert(name, given.to_owned());
        }
        settings.build_args.insert("HOST".into(), "h.test".into());
        let dockerfile = crate::dockerfile::parse("Dockerfile", text.as_bytes()).unwrap();
        source_date(&dockerfile, &settings)
            .map_err(|error| error.to_string().lines().next().unwrap().to_owned())
    }

    fn url(url: &str, checksum: Option<&str>) -> Result<Option<SourceDate>, String> {
        Ok(Some(SourceDate::Source(CopySource::Url {
            url: url.to_owned(),
            checksum: checksum.map(str::to_owned),
        })))
    }

    #[test]
    fn numbers_contexts_and_defaults() {
        let seconds = |seconds| Ok(Some(SourceDate::Seconds(seconds)));
        assert_eq!(asked("FROM scratch", None), Ok(None));
        assert_eq!(
            asked("FROM scratch", Some("")),
            Ok(Some(SourceDate::Nothing))
        );
        assert_eq!(asked("FROM scratch", Some("12")), seconds(12));
        let default = "ARG A=7\nARG SOURCE_DATE_EPOCH=${A}0\nFROM scratch";
        assert_eq!(asked(default, None), seconds(70));
        assert_eq!(asked(default, Some("1")), seconds(1));
        // An argument without a value is none.
        assert_eq!(asked("ARG SOURCE_DATE_EPOCH\nFROM scratch", None), Ok(None));
        let context = asked("FROM scratch", Some("context"));
        assert_eq!(context, Ok(Some(SourceDate::MainContext)));
        let named = asked("FROM scratch AS files\nRUN x", Some("files"));
        assert_eq!(named, Ok(Some(SourceDate::NamedContext("files".into()))));
        let wrong = "Dockerfile:1:1: invalid SOURCE_DATE_EPOCH: noon: expected seconds since 1970 \
                     as a whole number, \"context\", or the name of a named context or of a stage \
                     with one remote source";
        let text = "ARG SOURCE_DATE_EPOCH=noon\nFROM scratch";
        assert_eq!(asked(text, None), Err(wrong.to_owned()));
        let wrong = asked("FROM scratch", Some("-1")).unwrap_err();
        assert!(
            wrong.ends_with("-1: expected seconds from 1970 to the year 9999"),
            "{wrong}"
        );
    }

    #[test]
    fn stages_that_fetch_one_source() {
        let stage = |text: &str| {
            let text = format!("ARG SOURCE_DATE_EPOCH=Src\nARG V=2\n{text}\nFROM scratch");
            asked(&text, None)
        };
        let sum = format!("sha256:{}", "0".repeat(64));
        assert_eq!(
            stage(&format!(
                "FROM scratch AS src\nARG HOST=no N=a$V\nADD --checksum={sum} https://$HOST/$N.tgz /"
            )),
            url("https://h.test/a2.tgz", Some(&sum))
        );
        assert_eq!(
            stage("FROM scratch AS src\nADD --keep-git-dir=true https://h.test/r.git#v$V /x"),
            Ok(Some(SourceDate::Source(CopySource::Git {
                reference: "https://h.test/r.git#v2".into(),
                checksum: None,
                keep_git_dir: Some(true),
            })))
        );
        let one = "the stage that SOURCE_DATE_EPOCH names must have one ADD, with one source that \
                   is a URL or a git repository";
        for (text, problem) in [
            ("FROM b AS src\nADD https://h.test/a /", "Dockerfile:3:6: the stage that SOURCE_DATE_EPOCH names must be FROM scratch".to_owned()),
            ("FROM scratch AS src\nARG X", "Dockerfile:3:1: the stage that SOURCE_DATE_EPOCH names has no ADD of a remote source".to_owned()),
            ("FROM scratch AS src\nADD a /", format!("Dockerfile:4:1: {one}")),
            ("FROM scratch AS src\nADD https://h.test/a https://h.test/b /", format!("Dockerfile:4:1: {one}")),
            ("FROM scratch AS src\nADD https://h.test/a /\nADD https://h.test/b /", format!("Dockerfile:5:1: {one}")),
            ("FROM scratch AS src\nCOPY a /", "Dockerfile:4:1: the stage that SOURCE_DATE_EPOCH names does more than fetch one source".to_owned()),
        ] {
            assert_eq!(stage(text), Err(problem), "{text}");
        }
    }
}
