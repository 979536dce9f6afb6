//! `SOURCE_DATE_EPOCH`: what an image and the files that a build makes are dated.
//!
//! <https://reproducible-builds.org/specs/source-date-epoch/>

use anyhow::Context as _;
use url::Url;

use super::{BuildRequest, contexts};
use crate::context::NamedContext;
use crate::dockerfile::Dockerfile;
use crate::failure::{Failure, Kind};
use crate::layer::{Limits, archive};
use crate::plan::{self, CopySource, SOURCE_DATE_EPOCH, SourceDate};
use crate::progress::{BuildEvent, Progress};
use crate::remote::{Fetcher, git, http};
use crate::store::Store;

/// The date in seconds since 1970 UTC, if there is one. Arguments that name where it comes
/// from get the number instead, as in BuildKit.
///
/// The date of a repository is the commit's, and that of a URL its `Last-Modified`, else the
/// time of the newest file where it is an archive; directories and images have none, which is
/// a warning.
/// `main` is that of the main context. All platforms have one date.
///
/// # Errors
/// A value that means nothing, or another thing for each platform; whatever goes wrong when
/// the source is fetched.
pub(super) async fn resolve(
    request: &BuildRequest,
    platforms: &mut [plan::Settings],
    dockerfile: &Dockerfile,
    main: Option<i64>,
    (store, fetcher): (&Store, &Fetcher),
    progress: &dyn Progress,
) -> anyhow::Result<Option<i64>> {
    let mut said = Vec::new();
    for settings in &*platforms {
        said.push(plan::source_date(dockerfile, settings)?);
    }
    let differs = |(at, other): &(usize, &Option<SourceDate>)| **other != said[0] && *at > 0;
    if let Some((at, _)) = said.iter().enumerate().find(differs) {
        let [first, other] = [0, at].map(|at| &platforms[at].platform);
        anyhow::bail!(
            Failure::new(
                Kind::Dockerfile,
                format!("{SOURCE_DATE_EPOCH} is from another place for {other} than for {first}"),
            )
            .with_hint("build these platforms one after the other")
        );
    }
    let Some(Some(from)) = said.into_iter().next() else {
        return Ok(request.epoch);
    };
    let date = match &from {
        SourceDate::Nothing => None,
        SourceDate::Seconds(seconds) => Some(*seconds),
        SourceDate::MainContext => main,
        SourceDate::NamedContext(name) => {
            let mut contexts = request.plan.contexts.iter();
            let found = contexts.find(|(known, _)| known == name);
            let date = match found {
                Some((_, NamedContext::Url(url))) => of_url(url, None, store, fetcher).await,
                Some((_, NamedContext::Git(address))) => {
                    let checkout = contexts::checkout(store, fetcher, address, None).await;
                    checkout.map(|(_, time)| Some(time))
                }
                _ => Ok(None),
            };
            date.with_context(|| format!("{SOURCE_DATE_EPOCH} of --build-context {name}"))?
        }
        SourceDate::Source(source) => of_source(source, store, fetcher)
            .await
            .with_context(|| format!("{SOURCE_DATE_EPOCH} of the stage that it names"))?,
    };
    if let (None, Some(what)) = (date, named(&from)) {
        progress.event(BuildEvent::Warning {
            message: format!(
                "{SOURCE_DATE_EPOCH}: {what} has no date, as a repository or an archive would, so the image has none either"
            ),
        });
    }
    let text = date.map_or_else(String::new, |seconds| seconds.to_string());
    for settings in platforms {
        if let Some(given) = settings.build_args.get_mut(SOURCE_DATE_EPOCH) {
            given.clone_from(&text);
            if text.is_empty() {
                settings.build_args.remove(SOURCE_DATE_EPOCH);
            }
        }
        settings.source_date = Some(text.clone());
    }
    Ok(date)
}

/// What the date is asked of; nothing where it is said or not wanted.
fn named(from: &SourceDate) -> Option<String> {
    match from {
        SourceDate::Nothing | SourceDate::Seconds(_) => None,
        SourceDate::MainContext => Some("the build context".to_owned()),
        SourceDate::NamedContext(name) => Some(format!("the build context {name:?}")),
        SourceDate::Source(_) => Some("what the stage fetches".to_owned()),
    }
}

/// The date of what a stage fetches.
async fn of_source(
    source: &CopySource,
    store: &Store,
    fetcher: &Fetcher,
) -> anyhow::Result<Option<i64>> {
    match source {
        CopySource::Url { url, checksum } => {
            let url = Url::parse(url).with_context(|| format!("ADD {url:?}"))?;
            let checksum = checksum.as_deref().map(http::Checksum::parse).transpose()?;
            of_url(&url, checksum, store, fetcher).await
        }
        CopySource::Git {
            reference,
            checksum,
            keep_git_dir,
        } => {
            let parsed = git::parse(reference)?;
            let parsed = parsed.with_context(|| format!("{reference:?} is no git repository"))?;
            let parsed = parsed.with_flags(*keep_git_dir, checksum.as_deref())?;
            let path = store.tmp_dir("date-")?.join("checkout");
            Ok(Some(fetcher.repository(parsed, &path).await?.time))
        }
        CopySource::Path(_) | CopySource::Inline { .. } => Ok(None),
    }
}

/// The date of a file that is fetched, if it has one.
async fn of_url(
    url: &Url,
    checksum: Option<http::Checksum>,
    store: &Store,
    fetcher: &Fetcher,
) -> anyhow::Result<Option<i64>> {
    let fetched = fetcher.file(url, checksum).await?;
    if fetched.last_modified.is_some() {
        return Ok(fetched.last_modified);
    }
    let path = store.blob_path(&fetched.digest);
    let newest = tokio::task::spawn_blocking(move || {
        let file = std::fs::File::open(&path)?;
        // What is no archive has no date.
        anyhow::Ok(archive::newest(file, &Limits::default()).unwrap_or_default())
    });
    newest.await.context("a task ended abnormally")?
}
