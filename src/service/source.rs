//! Fetches what a job builds: the Dockerfile and the spec, or the whole repository.
//!
//! URLs are made of configured bases and validated names; nothing in a delivery can
//! name a host. Redirects are followed only to the same scheme, host and port, so
//! that the token goes nowhere else. Everything read has a limit.

use std::fs::Permissions;
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use backon::{ExponentialBuilder, Retryable};
use reqwest::redirect::Policy;
use reqwest::{Certificate, Client, ClientBuilder, Response, StatusCode};
use rustix::fs::{Mode, OFlags};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use serde_json::Value;
use thiserror::Error;
use url::Url;

use super::archive::{self, ArchiveError, Limits};
use super::jobs::Job;
use crate::config::{SourceConfig, SourceMode};
use crate::confined::ConfinedDir;
use crate::image::Reference;

/// How long a connection may take to be made.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(20);

/// How often a download that failed for a passing reason is tried again.
const RETRIES: usize = 3;

/// How many redirects on the same host are followed.
const REDIRECTS: usize = 5;

/// The directory of the context in a job's directory.
const CONTEXT: &str = "context";

/// What a build needs, on disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Prepared {
    /// The context's directory.
    pub(crate) context: PathBuf,
    /// The Dockerfile, inside the context.
    pub(crate) dockerfile: PathBuf,
    /// What the image is to be called.
    pub(crate) image: Reference,
}

/// Why the source of a job is not there.
#[derive(Debug, Error)]
pub(crate) enum SourceError {
    /// A configured certificate file is unusable.
    #[error("reading certificates from {}", path.display())]
    Certificates {
        path: PathBuf,
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The HTTP client cannot be made.
    #[error("preparing the HTTP client")]
    Client(#[source] reqwest::Error),
    /// A request got no answer, or not all of it.
    #[error("GET {url}")]
    Request {
        url: Url,
        #[source]
        source: reqwest::Error,
    },
    /// There is no such file.
    #[error(
        "there is no {what} at {url} (404 Not Found); for a private repository set source_token"
    )]
    NotFound { what: String, url: Url },
    /// Another status than 200.
    #[error("GET {url}: {status}")]
    Status { url: Url, status: StatusCode },
    /// It leads elsewhere.
    #[error("GET {url}: it redirects to another host, which is not followed")]
    Redirect { url: Url },
    /// It is too large.
    #[error("{url} is larger than {limit} bytes (setting {setting})")]
    TooLarge {
        url: Url,
        limit: u64,
        setting: &'static str,
    },
    /// The spec does not name an image.
    #[error("{place}: {problem}")]
    Spec { place: String, problem: String },
    /// The archive is refused.
    #[error("unpacking {url}")]
    Archive {
        url: Url,
        #[source]
        source: Box<ArchiveError>,
    },
    /// A file of the archive is unusable.
    #[error("reading {path} of {url}")]
    Inside {
        path: String,
        url: Url,
        #[source]
        source: std::io::Error,
    },
    /// A local file operation failed.
    #[error("{action} {}", path.display())]
    Io {
        action: &'static str,
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
}

impl SourceError {
    fn io(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io {
            action,
            path,
            source,
        }
    }

    /// Whether the same request may succeed a moment later.
    fn is_temporary(&self) -> bool {
        match self {
            Self::Request { source, .. } => !source.is_builder(),
            Self::Status { status, .. } => {
                status.is_server_error()
                    || matches!(
                        *status,
                        StatusCode::TOO_MANY_REQUESTS | StatusCode::REQUEST_TIMEOUT
                    )
            }
            _ => false,
        }
    }
}

/// Fetches sources.
#[derive(Clone, Debug)]
pub(crate) struct SourceClient {
    client: Client,
    config: Arc<SourceConfig>,
}

impl SourceClient {
    /// Prepares a client for the configured hosts.
    ///
    /// # Errors
    /// [`SourceError::Certificates`]; [`SourceError::Client`].
    pub(crate) fn new(config: &SourceConfig) -> Result<Self, SourceError> {
        // Fails where one is installed already, which is as good.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let mut pem = Vec::new();
        for path in &config.ca_files {
            pem.push((path, read_pem(path)?));
        }
        let certificates = || {
            pem.iter()
                .flat_map(|(path, text)| match Certificate::from_pem_bundle(text) {
                    Ok(certificates) => certificates.into_iter().map(Ok).collect(),
                    Err(source) => vec![Err(SourceError::Certificates {
                        path: (*path).clone(),
                        source: Box::new(source),
                    })],
                })
                .collect::<Result<Vec<_>, _>>()
        };
        let client = match builder(config).tls_certs_merge(certificates()?).build() {
            Ok(client) => client,
            // Fails where the system has no certificates at all, as in small images,
            // even if plain HTTP is all that is needed.
            Err(error) => {
                tracing::warn!(%error, "the system's certificates are unusable; using built-in ones");
                let mut roots = rustls::RootCertStore {
                    roots: webpki_roots::TLS_SERVER_ROOTS.to_vec(),
                };
                for (_, text) in &pem {
                    roots.add_parsable_certificates(
                        CertificateDer::pem_slice_iter(text).filter_map(Result::ok),
                    );
                }
                let tls = rustls::ClientConfig::builder()
                    .with_root_certificates(roots)
                    .with_no_client_auth();
                builder(config)
                    .tls_backend_preconfigured(tls)
                    .build()
                    .map_err(SourceError::Client)?
            }
        };
        Ok(Self {
            client,
            config: Arc::new(config.clone()),
        })
    }

    /// Fetches the source of `job` into the empty directory `dir` and reads what the
    /// image is to be called at `registry`, below `prefix`.
    ///
    /// # Errors
    /// [`SourceError`]; every one names the URL.
    pub(crate) async fn prepare(
        &self,
        job: &Job,
        dir: &Path,
        registry: &str,
        prefix: Option<&str>,
    ) -> Result<Prepared, SourceError> {
        let context = dir.join(CONTEXT);
        std::fs::create_dir(&context).map_err(SourceError::io("creating", &context))?;
        let (spec, place, dockerfile) = match self.config.mode {
            SourceMode::Files => self.files(job, &context).await?,
            SourceMode::Archive => self.archive(job, dir, &context).await?,
        };
        let image = image_name(&spec, registry, prefix)
            .map_err(|problem| SourceError::Spec { place, problem })?;
        Ok(Prepared {
            context,
            dockerfile,
            image,
        })
    }

    /// What will be fetched first, for the log.
    pub(crate) fn describe(&self, job: &Job) -> Url {
        match self.config.mode {
            SourceMode::Files => self.raw_url(job, &self.config.spec),
            SourceMode::Archive => self.archive_url(job),
        }
    }

    async fn files(
        &self,
        job: &Job,
        context: &Path,
    ) -> Result<(Vec<u8>, String, PathBuf), SourceError> {
        let spec_url = self.raw_url(job, &self.config.spec);
        let spec = self.file(&spec_url, &self.config.spec).await?;
        let dockerfile_url = self.raw_url(job, &self.config.dockerfile);
        let dockerfile = self.file(&dockerfile_url, &self.config.dockerfile).await?;
        write_file(&context.join(&self.config.spec), &spec)?;
        let path = context.join(&self.config.dockerfile);
        write_file(&path, &dockerfile)?;
        fix_directories(context, &self.config.spec)?;
        fix_directories(context, &self.config.dockerfile)?;
        Ok((spec, spec_url.to_string(), path))
    }

    async fn archive(
        &self,
        job: &Job,
        dir: &Path,
        context: &Path,
    ) -> Result<(Vec<u8>, String, PathBuf), SourceError> {
        let url = self.archive_url(job);
        let file = dir.join("archive.tar.gz");
        self.retried(|| self.download(&url, &file)).await?;
        let work = Unpacking {
            config: self.config.clone(),
            url,
            file,
            context: context.to_owned(),
        };
        match tokio::task::spawn_blocking(move || work.run()).await {
            Ok(result) => result,
            Err(error) => match error.try_into_panic() {
                Ok(panic) => std::panic::resume_unwind(panic),
                // The runtime ends, and with it whoever would have seen this.
                Err(error) => Err(SourceError::io("unpacking into", context)(error.into())),
            },
        }
    }

    fn raw_url(&self, job: &Job, path: &str) -> Url {
        let tail = job
            .repository
            .split('/')
            .chain([job.commit.as_str()])
            .chain(path.split('/'));
        with_path(&self.config.raw_url, tail)
    }

    fn archive_url(&self, job: &Job) -> Url {
        let tail = job
            .repository
            .split('/')
            .chain(["tar.gz", job.commit.as_str()]);
        with_path(&self.config.archive_url, tail)
    }

    async fn file(&self, url: &Url, what: &str) -> Result<Vec<u8>, SourceError> {
        self.retried(|| async {
            let mut response = self.get(url, what).await?;
            let mut bytes = Vec::new();
            let limit = self.config.file_limit;
            while let Some(chunk) = self.chunk(url, &mut response).await? {
                bytes.extend_from_slice(&chunk);
                if bytes.len() as u64 > limit {
                    return Err(SourceError::TooLarge {
                        url: url.clone(),
                        limit,
                        setting: "file_limit",
                    });
                }
            }
            Ok(bytes)
        })
        .await
    }

    async fn download(&self, url: &Url, to: &Path) -> Result<(), SourceError> {
        let mut response = self.get(url, "archive").await?;
        let mut file = std::fs::File::create(to).map_err(SourceError::io("creating", to))?;
        let limit = self.config.archive_limit;
        let mut count = 0;
        while let Some(chunk) = self.chunk(url, &mut response).await? {
            count += chunk.len() as u64;
            if count > limit {
                return Err(SourceError::TooLarge {
                    url: url.clone(),
                    limit,
                    setting: "archive_limit",
                });
            }
            // Chunks are small, and end in the page cache.
            file.write_all(&chunk)
                .map_err(SourceError::io("writing", to))?;
        }
        Ok(())
    }

    async fn retried<T, F>(&self, operation: impl Fn() -> F) -> Result<T, SourceError>
    where
        F: Future<Output = Result<T, SourceError>>,
    {
        operation
            .retry(ExponentialBuilder::default().with_max_times(RETRIES))
            .when(SourceError::is_temporary)
            .notify(|error, pause| {
                tracing::warn!(
                    error = super::error::chain(error),
                    pause_ms = pause.as_millis(),
                    "a download failed and is tried again"
                );
            })
            .await
    }

    async fn get(&self, url: &Url, what: &str) -> Result<Response, SourceError> {
        let mut request = self.client.get(url.clone());
        if let Some(token) = &self.config.token {
            request = request.bearer_auth(token.expose());
        }
        let response = request
            .send()
            .await
            .map_err(|source| request_error(url, source))?;
        match response.status() {
            StatusCode::OK => Ok(response),
            StatusCode::NOT_FOUND => Err(SourceError::NotFound {
                what: what.to_owned(),
                url: url.clone(),
            }),
            status if status.is_redirection() => Err(SourceError::Redirect { url: url.clone() }),
            status => Err(SourceError::Status {
                url: url.clone(),
                status,
            }),
        }
    }

    async fn chunk(
        &self,
        url: &Url,
        response: &mut Response,
    ) -> Result<Option<bytes::Bytes>, SourceError> {
        response
            .chunk()
            .await
            .map_err(|source| request_error(url, source))
    }
}

fn request_error(url: &Url, source: reqwest::Error) -> SourceError {
    SourceError::Request {
        url: url.clone(),
        // It is in our own message.
        source: source.without_url(),
    }
}

fn builder(config: &SourceConfig) -> ClientBuilder {
    Client::builder()
        .user_agent(concat!("sockless/", env!("CARGO_PKG_VERSION")))
        .connect_timeout(CONNECT_TIMEOUT)
        .timeout(config.timeout)
        .redirect(Policy::custom(|attempt| {
            let same = attempt
                .previous()
                .last()
                .is_some_and(|previous| previous.origin() == attempt.url().origin());
            if same && attempt.previous().len() <= REDIRECTS {
                attempt.follow()
            } else {
                attempt.stop()
            }
        }))
}

fn read_pem(path: &Path) -> Result<Vec<u8>, SourceError> {
    let failed = |source| SourceError::Certificates {
        path: path.to_owned(),
        source,
    };
    let text = std::fs::read(path).map_err(|error| failed(error.into()))?;
    // An empty bundle is a mistake that would otherwise show as a failed handshake later.
    if CertificateDer::pem_slice_iter(&text).next().is_none() {
        return Err(failed("no PEM certificate in it".into()));
    }
    Ok(text)
}

fn with_path<'a>(base: &Url, tail: impl IntoIterator<Item = &'a str>) -> Url {
    let mut url = base.clone();
    url.path_segments_mut()
        .expect("the configuration takes http and https URLs only, which have paths")
        .pop_if_empty()
        .extend(tail);
    url
}

/// Writes a fetched file with a fixed mode and time, so that the same commit gives the
/// same layer whenever and by whomever it is fetched.
fn write_file(path: &Path, bytes: &[u8]) -> Result<(), SourceError> {
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent).map_err(SourceError::io("creating", parent))?;
    }
    std::fs::File::create(path)
        .and_then(|mut file| {
            file.write_all(bytes)?;
            file.set_permissions(Permissions::from_mode(0o644))?;
            file.set_modified(UNIX_EPOCH)
        })
        .map_err(SourceError::io("writing", path))
}

/// The same for the directories between `context` and the file `path` in it.
fn fix_directories(context: &Path, path: &str) -> Result<(), SourceError> {
    let mut path = Path::new(path);
    while let Some(parent) = path.parent() {
        let directory = context.join(parent);
        std::fs::File::open(&directory)
            .and_then(|directory| {
                directory.set_permissions(Permissions::from_mode(0o755))?;
                directory.set_modified(UNIX_EPOCH)
            })
            .map_err(SourceError::io("setting the time of", &directory))?;
        path = parent;
    }
    Ok(())
}

/// The blocking half of [`SourceClient::archive`].
struct Unpacking {
    config: Arc<SourceConfig>,
    url: Url,
    file: PathBuf,
    context: PathBuf,
}

impl Unpacking {
    fn run(self) -> Result<(Vec<u8>, String, PathBuf), SourceError> {
        let Self {
            config,
            url,
            file,
            context,
        } = self;
        let archive = std::fs::File::open(&file).map_err(SourceError::io("opening", &file))?;
        let limits = Limits {
            bytes: config.unpacked_limit,
            entries: config.entry_limit,
        };
        archive::unpack(archive, &context, limits).map_err(|source| SourceError::Archive {
            url: url.clone(),
            source: Box::new(source),
        })?;
        std::fs::remove_file(&file).map_err(SourceError::io("removing", &file))?;

        let root = ConfinedDir::open(&context).map_err(SourceError::io("opening", &context))?;
        let inside = |path: &str| {
            let (url, path) = (url.clone(), path.to_owned());
            move |source| SourceError::Inside { path, url, source }
        };
        let open = |path: &str| -> std::io::Result<std::fs::File> {
            // Not blocking: it may be anything until it is looked at.
            let flags = OFlags::RDONLY | OFlags::NONBLOCK;
            let file: std::fs::File = root.open_at(Path::new(path), flags, Mode::empty())?.into();
            if !file.metadata()?.is_file() {
                return Err(std::io::Error::other("it is not a regular file"));
            }
            Ok(file)
        };
        let mut spec = Vec::new();
        open(&config.spec)
            .and_then(|file| {
                let mut limited =
                    crate::io::LimitedReader::new(file, config.file_limit, "the file");
                std::io::Read::read_to_end(&mut limited, &mut spec)
            })
            .map_err(inside(&config.spec))?;
        // The path without links: whoever opens it later would follow them out of here.
        let dockerfile = open(&config.dockerfile)
            .and_then(|file| {
                std::fs::read_link(format!("/proc/self/fd/{}", file.as_fd().as_raw_fd()))
            })
            .map_err(inside(&config.dockerfile))?;
        let place = format!("{} of {url}", config.spec);
        Ok((spec, place, dockerfile))
    }
}

/// Reads `{"service": {"name": …, "version": …}}` and makes a reference of it.
fn image_name(spec: &[u8], registry: &str, prefix: Option<&str>) -> Result<Reference, String> {
    let spec: Value =
        serde_json::from_slice(spec).map_err(|error| format!("it is no JSON: {error}"))?;
    let field = |name: &str| {
        let path = format!("service.{name}");
        let value = spec
            .get("service")
            .ok_or("service: missing")?
            .get(name)
            .ok_or(format!("{path}: missing"))?;
        match value {
            Value::String(text) => Ok(text.as_str()),
            other => Err(format!("{path}: got {other}, expected a string")),
        }
    };
    let (name, version) = (field("name")?, field("version")?);
    let repository = match prefix {
        Some(prefix) => format!("{registry}/{prefix}/{name}"),
        None => format!("{registry}/{name}"),
    };
    if name.contains(['/', ':', '@']) || Reference::parse(&repository).is_err() {
        return Err(format!(
            "service.name: got {name:?}, expected lower-case letters and digits with single separators . _ __ or - between them"
        ));
    }
    Reference::parse(&format!("{repository}:{version}"))
        .ok()
        .filter(|reference| reference.tag() == Some(version) && reference.digest().is_none())
        .ok_or_else(|| {
            format!(
                "service.version: got {version:?}, expected 1 to 128 of [A-Za-z0-9_.-], not starting with . or -"
            )
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_spec_names_the_image() {
        let name = |spec: &str, prefix| {
            image_name(spec.as_bytes(), "r.example:5000", prefix).map(|image| image.to_string())
        };
        let good = r#"{"service": {"name": "shop-api", "version": "1.2.3", "more": 1}}"#;
        assert_eq!(name(good, None).unwrap(), "r.example:5000/shop-api:1.2.3");
        assert_eq!(
            name(good, Some("team/apps")).unwrap(),
            "r.example:5000/team/apps/shop-api:1.2.3"
        );
        const NAME: &str = "expected lower-case letters and digits with single separators . _ __ or - between them";
        const VERSION: &str = "expected 1 to 128 of [A-Za-z0-9_.-], not starting with . or -";
        for (spec, expected) in [
            ("{}", "service: missing".to_owned()),
            (
                r#"{"service": {"version": "1"}}"#,
                "service.name: missing".to_owned(),
            ),
            (
                r#"{"service": {"name": "a"}}"#,
                "service.version: missing".to_owned(),
            ),
            (
                r#"{"service": {"name": "a", "version": 1.0}}"#,
                "service.version: got 1.0, expected a string".to_owned(),
            ),
            (
                r#"{"service": {"name": "Shop", "version": "1"}}"#,
                format!("service.name: got \"Shop\", {NAME}"),
            ),
            (
                r#"{"service": {"name": "../x", "version": "1"}}"#,
                format!("service.name: got \"../x\", {NAME}"),
            ),
            (
                r#"{"service": {"name": "a:b", "version": "1"}}"#,
                format!("service.name: got \"a:b\", {NAME}"),
            ),
            (
                r#"{"service": {"name": "", "version": "1"}}"#,
                format!("service.name: got \"\", {NAME}"),
            ),
            (
                r#"{"service": {"name": "a", "version": "-v --push"}}"#,
                format!("service.version: got \"-v --push\", {VERSION}"),
            ),
            (
                r#"{"service": {"name": "a", "version": ""}}"#,
                format!("service.version: got \"\", {VERSION}"),
            ),
            (
                r#"{"service": {"name": "a", "version": "1/b:2"}}"#,
                format!("service.version: got \"1/b:2\", {VERSION}"),
            ),
            (
                "nope",
                "it is no JSON: expected ident at line 1 column 2".to_owned(),
            ),
        ] {
            assert_eq!(name(spec, None).unwrap_err(), expected, "{spec}");
        }
    }

    #[test]
    fn urls_are_made_of_escaped_segments() {
        let base = Url::parse("https://h.example/base/").unwrap();
        let url = with_path(&base, ["o", "r", "c", "a b", "..", "x?y"]);
        assert_eq!(url.as_str(), "https://h.example/base/o/r/c/a%20b/x%3Fy");
    }
}
