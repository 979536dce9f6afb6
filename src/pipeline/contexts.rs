//! The main context with its Dockerfile, and the named contexts that steps read.

use std::collections::BTreeMap;
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::Context as _;
use url::Url;

use super::BuildRequest;
use crate::context::{
    self, BuildContext, ContextSource, DockerfileLocation, IgnoreRules, InputFile, NamedContext,
    OpenedContext, SourceInput,
};
use crate::dockerfile::parse_bool;
use crate::plan::{ContextId, CopyFrom, MountFrom, MountKind, Operation, Step};
use crate::remote::{Fetcher, git};
use crate::secret::RedactedUrl;
use crate::store::Store;

/// The only file of a context that is a file at a URL.
const URL_FILE: &str = "context";

/// The build argument that keeps `.git` in a context from git.
const KEEP_GIT_DIR: &str = "BUILDKIT_CONTEXT_KEEP_GIT_DIR";

/// Whether opening the context needs a [`Fetcher`].
pub(super) fn is_remote(request: &BuildRequest) -> bool {
    matches!(
        request.context,
        ContextSource::Url(_) | ContextSource::Git(_)
    ) || matches!(request.dockerfile, Some(DockerfileLocation::Url(_)))
}

/// Fetches what has to be fetched and opens the main context.
///
/// `store` and `fetcher` are there where [`is_remote`] says so; `tmp` takes what is unpacked.
///
/// # Errors
/// Any.
pub(super) async fn open(
    request: &BuildRequest,
    remote: Option<(&Store, &Fetcher)>,
    tmp: &Path,
) -> anyhow::Result<OpenedContext> {
    let needed = || remote.context("nothing was made to fetch the context with");
    let fetch = async |url: &Url| {
        let (store, fetcher) = needed()?;
        let fetched = fetcher.file(url, None).await?;
        anyhow::Ok(InputFile {
            shown: RedactedUrl(url).to_string(),
            path: store.blob_path(&fetched.digest),
            last_modified: fetched.last_modified,
        })
    };
    let mut commit_time = None;
    let input = match &request.context {
        ContextSource::Directory(path) => SourceInput::Directory(path.clone()),
        ContextSource::StandardInput => SourceInput::StandardInput,
        ContextSource::Url(url) => SourceInput::Fetched(fetch(url).await?),
        ContextSource::Git(address) => {
            let (store, fetcher) = needed()?;
            let keep = request.plan.build_args.get(KEEP_GIT_DIR);
            let keep = keep.is_some_and(|value| parse_bool(value) == Some(true));
            let (path, time) = checkout(store, fetcher, address, keep.then_some(true)).await?;
            commit_time = Some(time);
            SourceInput::Checkout(path)
        }
    };
    let fetched = match &request.dockerfile {
        Some(DockerfileLocation::Url(url)) => Some(fetch(url).await?),
        _ => None,
    };
    let (file, tmp) = (request.dockerfile.clone(), tmp.to_owned());
    let opening = tokio::task::spawn_blocking(move || {
        context::open(&input, file.as_ref(), fetched.as_ref(), io::stdin(), &tmp)
    });
    let mut opened = opening.await.context("a task ended abnormally")??;
    opened.source_date = opened.source_date.or(commit_time);
    Ok(opened)
}

/// Checks a repository out; gives its directory, which goes with the store's `tmp/`, and the
/// time of the commit.
pub(super) async fn checkout(
    store: &Store,
    fetcher: &Fetcher,
    address: &str,
    keep_git_dir: Option<bool>,
) -> anyhow::Result<(PathBuf, i64)> {
    let reference = git::parse(address)?;
    let reference = reference.with_context(|| format!("{address:?} is no git repository"))?;
    let reference = match reference.keep_git_dir {
        Some(_) => reference,
        None => reference.with_flags(keep_git_dir, None)?,
    };
    let path = store.tmp_dir("context-")?.join("checkout");
    let fetched = fetcher.repository(reference, &path).await?;
    Ok((path, fetched.time))
}

/// Whether the named contexts that are directories are there, also those that nothing reads.
///
/// # Errors
/// The first that is not; the chain names it.
pub(super) fn check_named(request: &BuildRequest) -> anyhow::Result<()> {
    for (name, context) in request.plan.contexts.iter() {
        if let NamedContext::Directory(path) = context {
            BuildContext::directory(path, IgnoreRules::default())
                .with_context(|| format!("--build-context {name}"))?;
        }
    }
    Ok(())
}

/// Opens the named contexts that `steps` read.
///
/// # Errors
/// Any; the chain names the context.
pub(super) async fn open_named(
    request: &BuildRequest,
    steps: &[Step],
    store: &Store,
    fetcher: &Fetcher,
) -> anyhow::Result<BTreeMap<ContextId, Arc<BuildContext>>> {
    let mut opened = BTreeMap::new();
    for id in steps.iter().flat_map(|step| reads(&step.operation)) {
        let Some((name, context)) = id.named(&request.plan.contexts) else {
            continue;
        };
        if opened.contains_key(&id) {
            continue;
        }
        let files = open_one(context, store, fetcher).await;
        let files = files.with_context(|| format!("--build-context {name}"))?;
        opened.insert(id, Arc::new(files));
    }
    Ok(opened)
}

async fn open_one(
    context: &NamedContext,
    store: &Store,
    fetcher: &Fetcher,
) -> anyhow::Result<BuildContext> {
    match context {
        NamedContext::Directory(path) => Ok(context::open_named_directory(path)?),
        NamedContext::Git(address) => {
            let (path, _) = checkout(store, fetcher, address, None).await?;
            Ok(BuildContext::directory(&path, IgnoreRules::default())?)
        }
        NamedContext::Url(url) => {
            let fetched = fetcher.file(url, None).await?;
            let dir = store.tmp_dir("context-")?;
            let path = dir.join(URL_FILE);
            let time = u64::try_from(fetched.mtime()).unwrap_or(0);
            let write = || {
                std::fs::copy(store.blob_path(&fetched.digest), &path)?;
                std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600))?;
                let time = SystemTime::UNIX_EPOCH + Duration::from_secs(time);
                std::fs::File::options()
                    .append(true)
                    .open(&path)?
                    .set_modified(time)
            };
            write().with_context(|| format!("writing {}", path.display()))?;
            Ok(BuildContext::directory(&dir, IgnoreRules::default())?)
        }
        NamedContext::Scratch | NamedContext::Image(_) | NamedContext::OciLayout(_) => {
            anyhow::bail!("{context} has no files of its own")
        }
    }
}

/// The contexts that an operation reads.
fn reads(operation: &Operation) -> Vec<ContextId> {
    match operation {
        Operation::Copy(copy) => match copy.from {
            CopyFrom::Context(id) => vec![id],
            CopyFrom::Step => Vec::new(),
        },
        Operation::Run(run) => {
            let mounts = run.mounts.iter();
            let contexts = mounts.filter_map(|mount| match &mount.kind {
                MountKind::Bind {
                    from: MountFrom::Context(id),
                    ..
                }
                | MountKind::Cache {
                    from: MountFrom::Context(id),
                    ..
                } => Some(*id),
                _ => None,
            });
            contexts.collect()
        }
        Operation::Image(_) | Operation::MakeDirectory(_) => Vec::new(),
    }
}
