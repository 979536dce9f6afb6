//! Questions about a Dockerfile that are answered without building: `--call`.
//!
//! Configs of base images are asked for as far as the answer depends on them; no layer is.

use std::collections::{BTreeMap, BTreeSet};

use futures_util::future::try_join_all;

use super::{BuildRequest, resolve};
use crate::call::{CheckResults, Outline, Targets};
use crate::context::{self, IgnoreRules};
use crate::dockerfile::{self, Dockerfile};
use crate::image::{ImageConfig, Platform, Reference};
use crate::lint::{self, BaseNeed, CheckError, Facts, Lines, Report};
use crate::plan::{self, ImageNeed, StageGraph};
use crate::progress::{BuildEvent, Progress};
use crate::registry::Client;

/// What is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Question {
    /// What in the Dockerfile is surely not meant. Without a target: in all its stages.
    Check,
    /// What the target can be given.
    Outline,
    /// Which targets there are.
    Targets,
}

/// What is answered.
#[derive(Debug)]
pub struct Answer {
    /// For programs; without a line end.
    pub json: String,
    /// For people, with line ends; may be empty.
    pub text: String,
    /// Whether there is nothing to do about the Dockerfile.
    pub is_clean: bool,
    /// Why the answer is not complete: what would end a build, too.
    pub error: Option<anyhow::Error>,
}

/// Answers `question` about the Dockerfile of `request`.
///
/// # Errors
/// Any that comes before there is an answer; for [`Question::Check`] that is the Dockerfile
/// not being there, everything else is part of the answer.
pub async fn ask(request: &BuildRequest, question: Question) -> anyhow::Result<Answer> {
    let file = request.dockerfile.as_deref();
    let source = context::read_dockerfile(&request.context, file, std::io::stdin())?;
    let rules = source.ignore_rules()?;
    let parsed = dockerfile::parse(&source.name, &source.text);
    match (question, parsed) {
        (Question::Check, Ok(dockerfile)) => check(request, &dockerfile, &rules).await,
        (Question::Check, Err(error)) => {
            let with = Known::new(request, &rules);
            let report = with.facts(&BTreeMap::new(), true, |facts| {
                lint::check_broken(&error, facts)
            });
            let text = error.text.clone();
            Ok(answer(&source.name, &text, &report, Some(error.into())))
        }
        (Question::Outline, parsed) => outline(request, &parsed?, &rules).await,
        (Question::Targets, parsed) => {
            let targets = Targets::new(&parsed?);
            Ok(Answer {
                json: targets.to_json(),
                text: targets.to_text(),
                is_clean: true,
                error: None,
            })
        }
    }
}

/// Checks a Dockerfile that is being built and says what is found.
///
/// # Errors
/// A [`lint::LintError`] where the Dockerfile wants violations to be errors, and options
/// for checks that cannot be read.
pub(super) fn check_build(
    request: &BuildRequest,
    dockerfile: &Dockerfile,
    rules: &IgnoreRules,
    (graph, configs): (&StageGraph, &[ImageConfig]),
    progress: &dyn Progress,
) -> anyhow::Result<()> {
    let images = graph.stages.iter().filter_map(|node| match node.base {
        plan::graph::Base::Image(image) => Some((node.index, configs.get(image.0)?.clone())),
        _ => None,
    });
    let images = images.collect();
    let with = Known::new(request, rules);
    let report = with.facts(&images, false, |facts| lint::check(dockerfile, facts));
    for message in report.warnings(&dockerfile.name) {
        progress.event(BuildEvent::Warning { message });
    }
    let lint_error = report.lint_error();
    match report.error {
        Some(error @ CheckError::Options(_)) => return Err(error.into()),
        // The plan is made, so it stops the checks and not the build.
        Some(error) => progress.event(BuildEvent::Warning {
            message: error.to_string(),
        }),
        None => {}
    }
    lint_error.map_or(Ok(()), |error| Err(error.into()))
}

/// What does not depend on the images.
struct Known<'a> {
    request: &'a BuildRequest,
    build_platform: Platform,
    rules: &'a IgnoreRules,
}

impl<'a> Known<'a> {
    fn new(request: &'a BuildRequest, rules: &'a IgnoreRules) -> Self {
        Self {
            request,
            build_platform: Platform::host(),
            rules,
        }
    }

    /// Calls `ask` with the facts; `may_be_all` checks all stages where no target is named.
    fn facts<T>(
        &self,
        images: &BTreeMap<usize, ImageConfig>,
        may_be_all: bool,
        ask: impl FnOnce(&Facts<'_>) -> T,
    ) -> T {
        let ignored = |path: &str| match path {
            "." => self.rules.hides_everything(),
            path => self.rules.is_ignored(std::path::Path::new(path)),
        };
        // With exceptions, something in what is left out may be there after all.
        let is_certain = !self.rules.is_empty() && !self.rules.has_exceptions();
        let target = self.request.target.as_deref();
        ask(&Facts {
            build_args: &self.request.build_args,
            target,
            all_stages: may_be_all && target.is_none(),
            platform: &self.request.platform,
            build_platform: &self.build_platform,
            contexts: &BTreeSet::new(),
            images,
            ignored: is_certain.then_some(&ignored),
        })
    }
}

async fn check(
    request: &BuildRequest,
    dockerfile: &Dockerfile,
    rules: &IgnoreRules,
) -> anyhow::Result<Answer> {
    let (name, text) = (&dockerfile.name, &dockerfile.text);
    let with = Known::new(request, rules);
    let none = BTreeMap::new();
    let needs = with.facts(&none, true, |facts| lint::bases(dockerfile, facts));
    // Where it is not known what is needed, the check says why.
    let needs = needs.unwrap_or_default();
    let mut images = Images::default();
    let bases = match images.bases(request, dockerfile, &needs).await {
        Ok(bases) => bases,
        Err((lines, error)) => {
            let mut report = with.facts(&none, true, |facts| {
                lint::check_without_bases(dockerfile, facts)
            });
            let message = format!("{error:#}");
            report.error = Some(CheckError::Dockerfile { message, lines });
            return Ok(answer(name, text, &report, Some(error)));
        }
    };
    let mut report = with.facts(&bases, true, |facts| lint::check(dockerfile, facts));
    let error = match &report.error {
        Some(error) => Some(match error.in_dockerfile(name, text) {
            Some(error) => error.into(),
            None => error.clone().into(),
        }),
        None => match plan(request, dockerfile, images).await {
            Err(error) => {
                report.error = Some(match error.downcast_ref() {
                    Some(error) => CheckError::of_dockerfile(error),
                    None => CheckError::Options(format!("{error:#}")),
                });
                Some(error)
            }
            Ok(()) => report.lint_error().map(Into::into),
        },
    };
    Ok(answer(name, text, &report, error))
}

/// Plans the target: what the checks do not look at may be wrong all the same.
async fn plan(
    request: &BuildRequest,
    dockerfile: &Dockerfile,
    mut images: Images,
) -> anyhow::Result<()> {
    let settings = plan::Settings {
        build_args: request.build_args.clone(),
        target: request.target.clone(),
        platform: request.platform.clone(),
        build_platform: Platform::host(),
    };
    let graph = plan::graph(dockerfile, &settings)?;
    let resolved = images.resolve(request, &graph.images).await;
    resolved.map_err(|(_, error)| error)?;
    let configs = (graph.images.iter())
        .filter_map(|need| images.get(&need.reference, &need.platform).cloned())
        .collect::<Vec<_>>();
    plan::lower(dockerfile, &graph, &settings, &configs)?;
    Ok(())
}

fn answer(name: &str, text: &str, report: &Report, error: Option<anyhow::Error>) -> Answer {
    let results = CheckResults::new(name, text, report);
    Answer {
        json: results.to_json(),
        text: results.to_text(),
        is_clean: results.is_clean(),
        error,
    }
}

async fn outline(
    request: &BuildRequest,
    dockerfile: &Dockerfile,
    rules: &IgnoreRules,
) -> anyhow::Result<Answer> {
    let with = Known::new(request, rules);
    let in_dockerfile = |error: CheckError| -> anyhow::Error {
        match error.in_dockerfile(&dockerfile.name, &dockerfile.text) {
            Some(error) => error.into(),
            None => error.into(),
        }
    };
    let needs = with.facts(&BTreeMap::new(), false, |facts| {
        lint::bases(dockerfile, facts)
    });
    let needs = needs.map_err(in_dockerfile)?;
    let bases = Images::default().bases(request, dockerfile, &needs).await;
    let bases = bases.map_err(|(_, error)| error)?;
    let walked = with.facts(&bases, false, |facts| lint::walk(dockerfile, facts));
    if let Some(error) = walked.report.error.clone() {
        return Err(in_dockerfile(error));
    }
    if let Some(error) = walked.report.lint_error() {
        return Err(error.into());
    }
    let outline = Outline::new(dockerfile, &walked);
    Ok(Answer {
        json: outline.to_json(),
        text: outline.to_text(),
        is_clean: true,
        error: None,
    })
}

/// Images that are resolved already, each once.
#[derive(Default)]
struct Images(Vec<(ImageNeed, ImageConfig)>);

impl Images {
    /// The config of `need`, where it is here.
    fn get(&self, reference: &Reference, platform: &Platform) -> Option<&ImageConfig> {
        let mut known = self.0.iter();
        let (_, config) = known
            .find(|(known, _)| (&known.reference, &known.platform) == (reference, platform))?;
        Some(config)
    }

    /// Resolves those of `needs` that are not here; an error comes with the index of its need.
    async fn resolve(
        &mut self,
        request: &BuildRequest,
        needs: &[ImageNeed],
    ) -> Result<(), (usize, anyhow::Error)> {
        let mut missing: Vec<(usize, &ImageNeed)> = Vec::new();
        for (index, need) in needs.iter().enumerate() {
            let same = |(_, other): &(usize, &ImageNeed)| {
                (&other.reference, &other.platform) == (&need.reference, &need.platform)
            };
            let is_known = self.get(&need.reference, &need.platform).is_some();
            if !is_known && !missing.iter().any(same) {
                missing.push((index, need));
            }
        }
        let Some((first, _)) = missing.first() else {
            return Ok(());
        };
        let client = Client::new(request.registry.clone());
        let client = client.map_err(|error| (*first, error.into()))?;
        let resolving = missing.iter().map(async |(index, need)| {
            let resolved = resolve(&client, need).await;
            resolved.map_err(|error| (*index, error))
        });
        let resolved = try_join_all(resolving).await?;
        let new = missing.iter().zip(resolved);
        self.0
            .extend(new.map(|((_, need), image)| ((*need).clone(), image.config)));
        Ok(())
    }

    /// The configs of base images by stage; with an error, the lines that name the image.
    async fn bases(
        &mut self,
        request: &BuildRequest,
        dockerfile: &Dockerfile,
        needs: &[BaseNeed],
    ) -> Result<BTreeMap<usize, ImageConfig>, (Lines, anyhow::Error)> {
        let images: Vec<ImageNeed> = (needs.iter())
            .map(|need| ImageNeed {
                reference: need.reference.clone(),
                platform: need.platform.clone(),
                place: format!("{}:{}", dockerfile.name, need.lines.first),
            })
            .collect();
        let resolved = self.resolve(request, &images).await;
        resolved.map_err(|(index, error)| (needs[index].lines, error))?;
        let config = |need: &BaseNeed| {
            let config = self.get(&need.reference, &need.platform)?;
            Some((need.stage, config.clone()))
        };
        Ok(needs.iter().filter_map(config).collect())
    }
}
