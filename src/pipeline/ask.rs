//! Questions about a Dockerfile that are answered without building: `--call`.
//!
//! Configs of base images are asked for as far as the answer depends on them; no layer is.

use std::collections::{BTreeMap, BTreeSet};

use std::sync::Arc;

use anyhow::Context as _;

use super::images::Images;
use super::{BuildRequest, contexts, fetcher, resolved_graphs};
use crate::call::{CheckResults, Outline, Targets};
use crate::context::IgnoreRules;
use crate::dockerfile::{self, Dockerfile};
use crate::image::{ImageConfig, Platform};
use crate::lint::{self, BaseNeed, CheckError, Facts, Lines, Report};
use crate::plan::{self, ImageNeed, ImageSource, Plan, StageGraph};
use crate::progress::{BuildEvent, NoProgress, Progress};
use crate::registry::Client;
use crate::store::Store;

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
    // What is unpacked for the question is gone with it.
    let tmp = tempfile::tempdir().context("creating a temporary directory")?;
    let opened = if contexts::is_remote(request) {
        let store = Arc::new(Store::open(&request.root)?);
        let silent: Arc<dyn Progress> = Arc::new(NoProgress);
        let fetcher = fetcher(request, &store, &silent, || false)?;
        contexts::open(request, Some((&store, &fetcher)), tmp.path()).await?
    } else {
        contexts::open(request, None, tmp.path()).await?
    };
    let source = opened.dockerfile;
    let rules = source.ignore_rules()?;
    let parsed = dockerfile::parse(&source.name, &source.text);
    match (question, parsed) {
        (Question::Check, Ok(dockerfile)) => check(request, &dockerfile, &rules).await,
        (Question::Check, Err(error)) => {
            let with = Known::new(request, &rules, &request.plan.platform);
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
    plans: &[(StageGraph, Plan)],
    images: &Images,
    progress: &dyn Progress,
) -> anyhow::Result<()> {
    let mut report = Report::default();
    for ((graph, _), settings) in plans.iter().zip(request.plans()) {
        let bases = graph.stages.iter().filter_map(|node| match node.base {
            plan::graph::Base::Image(image) => {
                Some((node.index, images.config(graph.images.get(image.0)?)?))
            }
            _ => None,
        });
        let bases = bases.collect();
        let with = Known::new(request, rules, &settings.platform);
        let more = with.facts(&bases, false, |facts| lint::check(dockerfile, facts));
        report = joined(report, more);
    }
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

/// What is found for two platforms, once.
fn joined(mut report: Report, more: Report) -> Report {
    let own = report.violations.clone();
    let new = more.violations.into_iter();
    report
        .violations
        .extend(new.filter(|new| !own.contains(new)));
    report.error_on_violation |= more.error_on_violation;
    report.error = report.error.or(more.error);
    report
}

/// What does not depend on the images.
struct Known<'a> {
    request: &'a BuildRequest,
    platform: &'a Platform,
    build_platform: Platform,
    rules: &'a IgnoreRules,
    /// The names of named contexts.
    contexts: BTreeSet<String>,
}

impl<'a> Known<'a> {
    fn new(request: &'a BuildRequest, rules: &'a IgnoreRules, platform: &'a Platform) -> Self {
        Self {
            request,
            platform,
            build_platform: Platform::host(),
            rules,
            contexts: (request.plan.contexts.iter())
                .map(|(name, _)| name.split("::").next().unwrap_or(name).to_owned())
                .collect(),
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
        let target = self.request.plan.target.as_deref();
        ask(&Facts {
            build_args: &self.request.plan.build_args,
            target,
            all_stages: may_be_all && target.is_none(),
            platform: self.platform,
            build_platform: &self.build_platform,
            contexts: &self.contexts,
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
    let mut images = Images::default();
    let (mut report, mut error) = (Report::default(), None);
    for settings in request.plans() {
        let (more, why) = check_for(request, &settings, dockerfile, rules, &mut images).await;
        report = joined(report, more);
        error = error.or(why);
    }
    let (name, text) = (&dockerfile.name, &dockerfile.text);
    Ok(answer(name, text, &report, error))
}

/// What is found for one platform, and why there may be more.
async fn check_for(
    request: &BuildRequest,
    settings: &plan::Settings,
    dockerfile: &Dockerfile,
    rules: &IgnoreRules,
    images: &mut Images,
) -> (Report, Option<anyhow::Error>) {
    let with = Known::new(request, rules, &settings.platform);
    let none = BTreeMap::new();
    let needs = with.facts(&none, true, |facts| lint::bases(dockerfile, facts));
    // Where it is not known what is needed, the check says why.
    let needs = needs.unwrap_or_default();
    let bases = match bases(images, request, dockerfile, &needs).await {
        Ok(bases) => bases,
        Err((lines, error)) => {
            let mut report = with.facts(&none, true, |facts| {
                lint::check_without_bases(dockerfile, facts)
            });
            let message = format!("{error:#}");
            report.error = Some(CheckError::Dockerfile { message, lines });
            return (report, Some(error));
        }
    };
    let mut report = with.facts(&bases, true, |facts| lint::check(dockerfile, facts));
    let error = match &report.error {
        Some(error) => Some(
            match error.in_dockerfile(&dockerfile.name, &dockerfile.text) {
                Some(error) => error.into(),
                None => error.clone().into(),
            },
        ),
        None => match plan(request, settings, dockerfile, images).await {
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
    (report, error)
}

/// Plans the target: what the checks do not look at may be wrong all the same.
async fn plan(
    request: &BuildRequest,
    settings: &plan::Settings,
    dockerfile: &Dockerfile,
    images: &mut Images,
) -> anyhow::Result<()> {
    let settings = std::slice::from_ref(settings);
    let graphs = resolved_graphs(request, dockerfile, settings, images, || client(request));
    for (graph, settings) in graphs.await?.iter().zip(settings) {
        plan::lower(dockerfile, graph, settings, &images.configs(graph)?)?;
    }
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
    let with = Known::new(request, rules, &request.plan.platform);
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
    let bases = bases(&mut Images::default(), request, dockerfile, &needs).await;
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

/// The configs of base images by stage; with an error, the lines that name the image.
async fn bases(
    images: &mut Images,
    request: &BuildRequest,
    dockerfile: &Dockerfile,
    needs: &[BaseNeed],
) -> Result<BTreeMap<usize, ImageConfig>, (Lines, anyhow::Error)> {
    let wanted: Vec<ImageNeed> = (needs.iter())
        .map(|need| ImageNeed {
            source: ImageSource::Registry(need.reference.clone()),
            platform: need.platform.clone(),
            place: format!("{}:{}", dockerfile.name, need.lines.first),
        })
        .collect();
    let resolved = images.resolve(request, || client(request), &wanted).await;
    resolved.map_err(|(index, error)| (needs[index].lines, error))?;
    let configs = needs.iter().zip(&wanted);
    Ok(configs
        .filter_map(|(need, wanted)| Some((need.stage, images.config(wanted)?)))
        .collect())
}

fn client(request: &BuildRequest) -> anyhow::Result<Client> {
    Ok(Client::new(request.registry.clone())?)
}
