//! The main context, whatever it is: a directory, an archive or a Dockerfile on standard
//! input or from a URL, a git repository.
//!
//! The network is somebody else's: [`ContextSource::parse`] says what is to be fetched, and
//! [`open`] takes what was. As in BuildKit, `.dockerignore` counts in directories of this
//! machine alone, not in archives and checkouts, where whatever is there was meant to be; and
//! only archives say to whom their files belong.

use std::fmt;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Timespec, Timestamps};
use url::Url;

use super::address::{Shown, is_git_context, is_http};
use super::dockerfile::{DockerfilePlace, read_dockerfile_at, read_limited};
use super::named::URL_FILE_NAME;
use super::{BuildContext, ContextError, DockerfileSource, IgnoreRules, Temporary};
use crate::layer::Limits;
use crate::layer::SkippedDevice;
use crate::layer::archive::{Extracted, extract, looks_like_archive};
use crate::secret::RedactedUrl;

/// How many bytes tell an archive from a Dockerfile.
const PEEK_BYTES: u64 = 1024;

/// Standard input would have to be read twice.
const TWICE: ContextError =
    ContextError::Conflict("standard input cannot be both the build context and the Dockerfile");

/// What the command line names as the context.
#[derive(Clone, PartialEq, Eq)]
pub enum ContextSource {
    /// A directory of this machine.
    Directory(PathBuf),
    /// `-`: an archive or a Dockerfile on standard input.
    StandardInput,
    /// An archive or a Dockerfile to be fetched.
    Url(Url),
    /// The address of a git repository, with its fragment or query, as given.
    Git(String),
}

/// What `--file` names.
#[derive(Clone, PartialEq, Eq)]
pub enum DockerfileLocation {
    /// A path: for a directory from the current directory, else inside of the context unless
    /// it is absolute.
    Path(PathBuf),
    /// `-`: standard input.
    StandardInput,
    /// A Dockerfile to be fetched.
    Url(Url),
}

/// A file that was fetched.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InputFile {
    /// Where it came from, redacted, for messages.
    pub shown: String,
    /// Where it is.
    pub path: PathBuf,
    /// `Last-Modified`, in seconds since 1970 UTC.
    pub last_modified: Option<i64>,
}

/// A context that needs no network any more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SourceInput {
    /// [`ContextSource::Directory`].
    Directory(PathBuf),
    /// [`ContextSource::StandardInput`].
    StandardInput,
    /// [`ContextSource::Url`], fetched.
    Fetched(InputFile),
    /// [`ContextSource::Git`], checked out. Who made the directory removes it.
    Checkout(PathBuf),
}

/// A main context and its Dockerfile.
#[derive(Debug)]
pub struct OpenedContext {
    /// What steps may see. What was unpacked for it is removed with it.
    pub context: BuildContext,
    /// The Dockerfile, not parsed. Its rules are part of `context` already.
    pub dockerfile: DockerfileSource,
    /// Devices of an archive that this process may not make, for warnings.
    pub skipped_devices: Vec<SkippedDevice>,
    /// What `SOURCE_DATE_EPOCH=context` means, in seconds since 1970 UTC: when the server says
    /// that the file was modified, else the latest time of a file in the archive. Directories
    /// have none, and checkouts that of their commit, which is not known here.
    pub source_date: Option<i64>,
}

impl ContextSource {
    /// Parses the argument: `-`, else a directory that there is, else a URL or git address.
    ///
    /// # Errors
    /// [`ContextError::NoContext`], [`ContextError::Url`].
    pub fn parse(text: &str) -> Result<Self, ContextError> {
        if text == "-" {
            return Ok(Self::StandardInput);
        }
        if Path::new(text).is_dir() {
            return Ok(Self::Directory(PathBuf::from(text)));
        }
        if is_git_context(text) {
            return Ok(Self::Git(text.to_owned()));
        }
        if is_http(text) {
            return parse_url(text).map(Self::Url);
        }
        Err(ContextError::NoContext {
            source_text: Shown(text).to_string(),
        })
    }
}

impl DockerfileLocation {
    /// Parses the value of `--file`.
    ///
    /// # Errors
    /// [`ContextError::Url`].
    pub fn parse(text: &str) -> Result<Self, ContextError> {
        Ok(match text {
            "-" => Self::StandardInput,
            text if is_http(text) => Self::Url(parse_url(text)?),
            text => Self::Path(PathBuf::from(text)),
        })
    }
}

fn parse_url(text: &str) -> Result<Url, ContextError> {
    Url::parse(text).map_err(|error| ContextError::Url {
        url: Shown(text).to_string(),
        reason: error.to_string(),
    })
}

impl fmt::Display for ContextSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Directory(path) => path.display().fmt(f),
            Self::StandardInput => f.write_str("-"),
            Self::Url(url) => RedactedUrl(url).fmt(f),
            Self::Git(address) => Shown(address).fmt(f),
        }
    }
}

impl fmt::Debug for ContextSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ContextSource({self})")
    }
}

impl fmt::Debug for DockerfileLocation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Path(path) => write!(f, "Path({path:?})"),
            Self::StandardInput => f.write_str("StandardInput"),
            Self::Url(url) => write!(f, "Url({})", RedactedUrl(url)),
        }
    }
}

/// Opens a context and reads its Dockerfile.
///
/// `file` is `--file`, and `fetched` what [`DockerfileLocation::Url`] in it led to.
/// Archives are unpacked into a new directory in `tmp`, which goes with the returned
/// context. Blocking; `stdin` is read only where the context or `--file` is `-`.
///
/// # Errors
/// Any [`ContextError`]; nothing is left in `tmp` then.
pub fn open(
    input: &SourceInput,
    file: Option<&DockerfileLocation>,
    fetched: Option<&InputFile>,
    stdin: impl Read + Send + 'static,
    tmp: &Path,
) -> Result<OpenedContext, ContextError> {
    let mut stdin = Some(stdin);
    let place = match (file, fetched) {
        (None, _) => DockerfilePlace::Default,
        (Some(DockerfileLocation::Path(path)), _) => DockerfilePlace::Path(path),
        (Some(DockerfileLocation::StandardInput), _) => {
            if *input == SourceInput::StandardInput {
                return Err(TWICE);
            }
            let stdin = stdin.take().ok_or(TWICE)?;
            DockerfilePlace::Stdin(Box::new(stdin))
        }
        (Some(DockerfileLocation::Url(_)), Some(file)) => DockerfilePlace::Fetched(file),
        (Some(DockerfileLocation::Url(url)), None) => {
            return Err(ContextError::Url {
                url: RedactedUrl(url).to_string(),
                reason: "it was not fetched".to_owned(),
            });
        }
    };
    // Only where the context is a directory are paths from the current one. An absolute one
    // beside a URL or repository is of this machine too; standard input has only its own.
    let place = match (place, input) {
        (DockerfilePlace::Path(path), SourceInput::StandardInput) => DockerfilePlace::Inside(path),
        (DockerfilePlace::Path(path), SourceInput::Fetched(_) | SourceInput::Checkout(_))
            if !path.is_absolute() =>
        {
            DockerfilePlace::Inside(path)
        }
        (place, _) => place,
    };
    match input {
        SourceInput::Directory(path) => {
            let dockerfile = read_dockerfile_at(path, place, true)?;
            let context = BuildContext::directory(path, dockerfile.ignore_rules()?)?;
            Ok(opened(context, dockerfile))
        }
        SourceInput::Checkout(path) => {
            let dockerfile = read_dockerfile_at(path, place, false).map_err(within(path))?;
            let context = BuildContext::directory(path, IgnoreRules::default())?;
            Ok(opened(context, dockerfile))
        }
        SourceInput::StandardInput => from_stdin(stdin.ok_or(TWICE)?, file.is_some(), place, tmp),
        SourceInput::Fetched(file) => from_fetched(file, place, tmp),
    }
}

fn opened(context: BuildContext, dockerfile: DockerfileSource) -> OpenedContext {
    OpenedContext {
        context,
        dockerfile,
        skipped_devices: Vec::new(),
        source_date: None,
    }
}

/// An archive, or a Dockerfile with nothing around it.
fn from_stdin(
    mut stdin: impl Read + Send + 'static,
    has_file: bool,
    place: DockerfilePlace<'_>,
    tmp: &Path,
) -> Result<OpenedContext, ContextError> {
    let input = "standard input";
    let fail = |source| ContextError::Read {
        path: PathBuf::from("-"),
        source,
    };
    let mut first = Vec::new();
    (&mut stdin)
        .take(PEEK_BYTES)
        .read_to_end(&mut first)
        .map_err(fail)?;
    if first.is_empty() {
        return Err(ContextError::NotAContext {
            input: input.to_owned(),
            reason: "is empty: expected a tar archive or a Dockerfile",
        });
    }
    let whole = io::Cursor::new(first.clone()).chain(stdin);
    if looks_like_archive(&first) {
        return unpacked(whole, input, None, place, tmp);
    }
    if has_file {
        return Err(ContextError::Conflict(
            "ambiguous Dockerfile: standard input is one, and --file names another; \
             as the build context, standard input must be a tar archive",
        ));
    }
    let text = read_limited(whole).map_err(fail)?;
    let temporary = Temporary::new(tmp)?;
    let dockerfile = DockerfileSource {
        name: "-".to_owned(),
        text,
        ignore: Vec::new(),
        ignore_name: None,
        has_containerignore: false,
    };
    let mut context = BuildContext::directory(&temporary.0, IgnoreRules::default())?;
    context.temporary = Some(temporary);
    Ok(opened(context, dockerfile))
}

/// An archive, or a Dockerfile, which is then the context's only file.
fn from_fetched<'a>(
    file: &'a InputFile,
    place: DockerfilePlace<'a>,
    tmp: &Path,
) -> Result<OpenedContext, ContextError> {
    let fail = |source| ContextError::Read {
        path: file.path.clone(),
        source,
    };
    let open = || File::open(&file.path).map_err(fail);
    let mut first = Vec::new();
    open()?
        .take(PEEK_BYTES)
        .read_to_end(&mut first)
        .map_err(fail)?;
    if looks_like_archive(&first) {
        return unpacked(open()?, &file.shown, file.last_modified, place, tmp);
    }
    let temporary = Temporary::new(tmp)?;
    let only = temporary.0.join(URL_FILE_NAME);
    let make = || {
        let mut to = File::create_new(&only)?;
        to.set_permissions(fs::Permissions::from_mode(0o600))?;
        io::copy(&mut File::open(&file.path)?, &mut to)?;
        let time = Timespec {
            tv_sec: file.last_modified.unwrap_or(0),
            tv_nsec: 0,
        };
        let times = Timestamps {
            last_access: time,
            last_modification: time,
        };
        rustix::fs::utimensat(CWD, &only, &times, AtFlags::SYMLINK_NOFOLLOW)?;
        Ok(())
    };
    make().map_err(|source| ContextError::Read {
        path: only.clone(),
        source,
    })?;
    let place = match place {
        DockerfilePlace::Inside(path) => {
            // As BuildKit does; but it does not say so.
            tracing::warn!(
                file = %path.display(),
                context = file.shown,
                "--file is not used, because the context is not an archive but the Dockerfile"
            );
            DockerfilePlace::Fetched(file)
        }
        DockerfilePlace::Default => DockerfilePlace::Fetched(file),
        other => other,
    };
    let dockerfile = read_dockerfile_at(&temporary.0, place, false);
    let dockerfile = dockerfile.map_err(within(&temporary.0))?;
    let mut context = BuildContext::directory(&temporary.0, IgnoreRules::default())?;
    context.temporary = Some(temporary);
    Ok(OpenedContext {
        source_date: file.last_modified,
        ..opened(context, dockerfile)
    })
}

/// Unpacks an archive and reads its Dockerfile.
fn unpacked(
    archive: impl Read + Send + 'static,
    input: &str,
    last_modified: Option<i64>,
    place: DockerfilePlace<'_>,
    tmp: &Path,
) -> Result<OpenedContext, ContextError> {
    let temporary = Temporary::new(tmp)?;
    let extracted = extract(archive, &temporary.0, &Limits::default());
    let Extracted {
        owners,
        skipped_devices,
        latest,
    } = extracted.map_err(|source| ContextError::Unpack {
        input: input.to_owned(),
        source,
    })?;
    let dockerfile = read_dockerfile_at(&temporary.0, place, false);
    let dockerfile = dockerfile.map_err(within(&temporary.0))?;
    let mut context = BuildContext::directory(&temporary.0, IgnoreRules::default())?;
    context.owners = Some(owners);
    context.temporary = Some(temporary);
    Ok(OpenedContext {
        context,
        dockerfile,
        skipped_devices,
        source_date: last_modified.or(latest),
    })
}

/// Names a Dockerfile that is not there as the user did, and not by the directory that its
/// context was unpacked in.
fn within(dir: &Path) -> impl FnOnce(ContextError) -> ContextError + '_ {
    move |error| match error {
        ContextError::NoDockerfile {
            path,
            is_link,
            has_containerfile,
        } => ContextError::NoDockerfile {
            has_containerfile,
            path: path.strip_prefix(dir).map(Path::to_owned).unwrap_or(path),
            is_link,
        },
        other => other,
    }
}

impl Temporary {
    fn new(tmp: &Path) -> Result<Self, ContextError> {
        tempfile::Builder::new()
            .prefix("context-")
            .tempdir_in(tmp)
            .map(|dir| Self(dir.keep()))
            .map_err(|source| ContextError::Temporary {
                path: tmp.to_owned(),
                source,
            })
    }
}

#[cfg(test)]
mod tests;
