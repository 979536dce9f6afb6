//! The service's settings: raw strings in, validated values out.
//!
//! [`SETTINGS`] is the one table of them. Each setting has a key in the
//! configuration file (TOML, no tables) and an environment variable; the variable
//! wins. An empty variable counts as absent, because compose files and unit files
//! cannot express absence otherwise. Lists are arrays of strings in the file and
//! separated by commas in a variable. Relative paths in the file start at the
//! file's directory, in a variable at the working directory.
//!
//! This module reads the configuration file and the files that hold secrets, and
//! nothing else: no process environment (it is given as a function), no network.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use thiserror::Error;
use url::Url;

use crate::image::Reference;
use crate::rootfs;
use crate::sandbox;
use crate::secret::Secret;

/// One setting: its names, its default and what it means.
#[derive(Clone, Copy, Debug)]
pub struct Setting {
    /// The key in the configuration file.
    pub name: &'static str,
    /// The environment variable; wins over the file.
    pub env: &'static str,
    /// What applies where neither is given; empty: nothing, or see the meaning.
    pub default: &'static str,
    /// What a value looks like, for errors.
    pub expected: &'static str,
    /// What it is for, for people.
    pub meaning: &'static str,
}

const fn setting(
    name: &'static str,
    env: &'static str,
    default: &'static str,
    expected: &'static str,
    meaning: &'static str,
) -> Setting {
    Setting {
        name,
        env,
        default,
        expected,
        meaning,
    }
}

const TEXT: &str = "a text that is not empty";
const PATH: &str = "a path";
const PATHS: &str = "a list of paths";
const INSIDE: &str = "a relative path without \".\" and \"..\"";
const NAMES: &str = "a list of names";
const SIZE: &str = "a size such as 512KiB, 25MiB or 2GiB, more than 0";
const LIMIT: &str = "a size such as 512KiB, 25MiB or 2GiB, more than 0, or none";
const SPAN: &str = "a duration such as 30s, 10m, 2h or 7d, more than 0";
const BASE_URL: &str = "an http or https URL without user, query and fragment";

/// Every setting of the service, in the order of the documentation.
pub static SETTINGS: &[Setting] = &[
    setting(
        "listen",
        "SOCKLESS_LISTEN",
        "127.0.0.1:8080",
        "an address such as 127.0.0.1:8080 or [::]:8080",
        "Where HTTP is answered. Port 0 takes a free one.",
    ),
    setting(
        "webhook_secret",
        "SOCKLESS_WEBHOOK_SECRET",
        "",
        TEXT,
        "The secret that deliveries are signed with. This or `webhook_secret_file` is required.",
    ),
    setting(
        "webhook_secret_file",
        "SOCKLESS_WEBHOOK_SECRET_FILE",
        "",
        PATH,
        "A file that holds the secret; one line end at its end is ignored.",
    ),
    setting(
        "admin_token",
        "SOCKLESS_ADMIN_TOKEN",
        "",
        TEXT,
        "The bearer token that may cancel jobs. Without it nobody can.",
    ),
    setting(
        "admin_token_file",
        "SOCKLESS_ADMIN_TOKEN_FILE",
        "",
        PATH,
        "A file that holds this token.",
    ),
    setting(
        "branches",
        "SOCKLESS_BRANCHES",
        "develop",
        NAMES,
        "The base branches whose merged pull requests are built.",
    ),
    setting(
        "repositories",
        "SOCKLESS_REPOSITORIES",
        "",
        "a list of OWNER/NAME",
        "The repositories that are built. Absent: every one that signs with the secret.",
    ),
    setting(
        "source",
        "SOCKLESS_SOURCE",
        "files",
        "files or archive",
        "What the build context is: `files` fetches the Dockerfile and the spec alone, `archive` the whole repository.",
    ),
    setting(
        "raw_url",
        "SOCKLESS_RAW_URL",
        "https://raw.githubusercontent.com",
        BASE_URL,
        "Where files come from: `{raw_url}/{owner}/{repo}/{commit}/{path}`.",
    ),
    setting(
        "archive_url",
        "SOCKLESS_ARCHIVE_URL",
        "https://codeload.github.com",
        BASE_URL,
        "Where archives come from: `{archive_url}/{owner}/{repo}/tar.gz/{commit}`.",
    ),
    setting(
        "source_token",
        "SOCKLESS_SOURCE_TOKEN",
        "",
        TEXT,
        "The bearer token for private repositories. Sent to the two URLs' hosts only, and over https or loopback only.",
    ),
    setting(
        "source_token_file",
        "SOCKLESS_SOURCE_TOKEN_FILE",
        "",
        PATH,
        "A file that holds this token.",
    ),
    setting(
        "source_ca_files",
        "SOCKLESS_SOURCE_CA_FILES",
        "",
        PATHS,
        "PEM certificates trusted for the two URLs beside the system's.",
    ),
    setting(
        "source_timeout",
        "SOCKLESS_SOURCE_TIMEOUT",
        "5m",
        SPAN,
        "How long one download may take.",
    ),
    setting(
        "dockerfile",
        "SOCKLESS_DOCKERFILE",
        "Dockerfile",
        INSIDE,
        "The Dockerfile's path in the repository.",
    ),
    setting(
        "spec",
        "SOCKLESS_SPEC",
        "spec.json",
        INSIDE,
        "The spec's path in the repository: JSON whose `service.name` and `service.version` name the image.",
    ),
    setting(
        "registry",
        "SOCKLESS_REGISTRY",
        "",
        "HOST or HOST:PORT",
        "The registry that images are pushed to. Required.",
    ),
    setting(
        "repository_prefix",
        "SOCKLESS_REPOSITORY_PREFIX",
        "",
        "a path of [a-z0-9] components such as team/apps",
        "Put before `service.name` in the repository's name.",
    ),
    setting(
        "registry_mirrors",
        "SOCKLESS_REGISTRY_MIRRORS",
        "",
        "a list of HOST=URL",
        "Base URLs that are asked before a registry, such as `docker.io=https://mirror.example`.",
    ),
    setting(
        "insecure_registries",
        "SOCKLESS_INSECURE_REGISTRIES",
        "",
        "a list of HOST or HOST:PORT",
        "Registries that may be spoken to over plain HTTP or with a certificate nobody vouches for.",
    ),
    setting(
        "registry_ca_files",
        "SOCKLESS_REGISTRY_CA_FILES",
        "",
        PATHS,
        "PEM certificates trusted for registries beside the system's.",
    ),
    setting(
        "docker_config",
        "SOCKLESS_DOCKER_CONFIG",
        "",
        PATH,
        "The directory of the `config.json` with registry credentials. Absent: `$DOCKER_CONFIG`, else `~/.docker`.",
    ),
    setting(
        "sandbox",
        "SOCKLESS_SANDBOX",
        "auto",
        "auto, bwrap, runc, crun, youki or chroot",
        "What runs the steps, as `--sandbox` of `sockless build`.",
    ),
    setting(
        "allow_weak_isolation",
        "SOCKLESS_ALLOW_WEAK_ISOLATION",
        "false",
        "true or false",
        "Whether steps are run where they share this machine's processes or network, for want of namespaces or of a way to make a network; else such jobs fail, as with `--require-isolation`.",
    ),
    setting(
        "rootfs",
        "SOCKLESS_ROOTFS",
        "auto",
        "auto, overlay or copy",
        "How the steps' root filesystems are made, as `--rootfs` of `sockless build`.",
    ),
    setting(
        "allow_old_runc",
        "SOCKLESS_ALLOW_OLD_RUNC",
        "false",
        "true or false",
        "Whether a runc with known holes may run the steps, as `--allow-old-runc` of `sockless build`.",
    ),
    setting(
        "step_memory",
        "SOCKLESS_STEP_MEMORY",
        "4GiB",
        LIMIT,
        "How much memory each RUN step may have, as `--memory` of `sockless build`.",
    ),
    setting(
        "step_cpus",
        "SOCKLESS_STEP_CPUS",
        "none",
        "a number of processors such as 1.5, or none",
        "How many processors each RUN step may keep busy, as `--cpus`.",
    ),
    setting(
        "step_pids",
        "SOCKLESS_STEP_PIDS",
        "4096",
        "a number from 1 to 4194304, or none",
        "How many processes and threads each RUN step may have, as `--pids-limit`.",
    ),
    setting(
        "step_timeout",
        "SOCKLESS_STEP_TIMEOUT",
        "none",
        "a duration such as 30s, 10m, 2h or 7d, more than 0, or none",
        "How long each RUN step may run, as `--step-timeout`; `job_timeout` ends them too.",
    ),
    setting(
        "step_output",
        "SOCKLESS_STEP_OUTPUT",
        "4MiB",
        LIMIT,
        "How much of the output of each RUN step is shown, as `--output-limit`.",
    ),
    setting(
        "step_disk",
        "SOCKLESS_STEP_DISK",
        "20GiB",
        LIMIT,
        "How much each RUN step may write into its root filesystem, as `--disk-limit`.",
    ),
    setting(
        "private_sources",
        "SOCKLESS_PRIVATE_SOURCES",
        "false",
        "true or false",
        "Whether Dockerfiles may `ADD` URLs and repositories of servers without public addresses: this machine, its link, private networks.",
    ),
    setting(
        "root",
        "SOCKLESS_ROOT",
        "",
        PATH,
        "The store. Absent: `/var/lib/sockless` as root, else `$XDG_DATA_HOME/sockless` or `~/.local/share/sockless`.",
    ),
    setting(
        "store_limit",
        "SOCKLESS_STORE_LIMIT",
        "",
        SIZE,
        "How much disk the store may take, without the job database. Beyond, each build ends by removing what was not used for longest. Absent: no limit.",
    ),
    setting(
        "database",
        "SOCKLESS_DATABASE",
        "",
        PATH,
        "The job database. Absent: `jobs/jobs.sqlite` in the store. Its directory is locked by one service.",
    ),
    setting(
        "concurrent_jobs",
        "SOCKLESS_CONCURRENT_JOBS",
        "1",
        "a number from 1 to 64",
        "How many jobs run at the same time; those of one repository never do.",
    ),
    setting(
        "job_timeout",
        "SOCKLESS_JOB_TIMEOUT",
        "1h",
        SPAN,
        "How long one job may run.",
    ),
    setting(
        "job_attempts",
        "SOCKLESS_JOB_ATTEMPTS",
        "3",
        "a number from 1 to 100",
        "How often a job is started in all where the service dies while it runs. A failed build is not tried again.",
    ),
    setting(
        "job_retention",
        "SOCKLESS_JOB_RETENTION",
        "30d",
        SPAN,
        "How long ended jobs and their logs are kept.",
    ),
    setting(
        "queue_limit",
        "SOCKLESS_QUEUE_LIMIT",
        "1000",
        "a number from 1 to 1000000",
        "How many jobs may wait. Beyond, deliveries are answered with 503.",
    ),
    setting(
        "log_limit",
        "SOCKLESS_LOG_LIMIT",
        "16MiB",
        SIZE,
        "How much log is kept of one job.",
    ),
    setting(
        "shutdown_grace",
        "SOCKLESS_SHUTDOWN_GRACE",
        "30s",
        SPAN,
        "How long running jobs may go on after SIGTERM before they return to the queue.",
    ),
    setting(
        "body_limit",
        "SOCKLESS_BODY_LIMIT",
        "25MiB",
        SIZE,
        "The largest delivery that is read.",
    ),
    setting(
        "connection_limit",
        "SOCKLESS_CONNECTION_LIMIT",
        "512",
        "a number from 1 to 65536",
        "How many connections are served at the same time; further ones wait.",
    ),
    setting(
        "file_limit",
        "SOCKLESS_FILE_LIMIT",
        "1MiB",
        SIZE,
        "The largest Dockerfile or spec that is fetched.",
    ),
    setting(
        "archive_limit",
        "SOCKLESS_ARCHIVE_LIMIT",
        "512MiB",
        SIZE,
        "The largest archive that is fetched, compressed.",
    ),
    setting(
        "unpacked_limit",
        "SOCKLESS_UNPACKED_LIMIT",
        "2GiB",
        SIZE,
        "How much an archive may unpack to.",
    ),
    setting(
        "entry_limit",
        "SOCKLESS_ENTRY_LIMIT",
        "200000",
        "a number from 1 to 100000000",
        "How many entries an archive may have.",
    ),
];

/// The service's settings, validated.
#[derive(Clone, Debug)]
pub struct ServiceConfig {
    /// Where HTTP is answered.
    pub listen: SocketAddr,
    /// What deliveries are signed with; not empty.
    pub webhook_secret: Secret,
    /// Who may cancel; absent: nobody.
    pub admin_token: Option<Secret>,
    /// Base branches that are built; at least one.
    pub branches: Vec<String>,
    /// `OWNER/NAME` that are built, compared without case; absent: all.
    pub repositories: Option<Vec<String>>,
    /// Where the context comes from.
    pub source: SourceConfig,
    /// `HOST[:PORT]` that images are pushed to.
    pub registry: String,
    /// Put before the image's name.
    pub repository_prefix: Option<String>,
    /// What is passed on to the build.
    pub build: BuildConfig,
    /// The store's directory.
    pub root: PathBuf,
    /// The database's file.
    pub database: PathBuf,
    /// How jobs run.
    pub jobs: JobsConfig,
    /// The largest delivery, in bytes.
    pub body_limit: u64,
    /// The most connections at a time.
    pub connection_limit: usize,
    /// The program that runs `build`; not a setting, so that no file can name another.
    pub executable: PathBuf,
}

/// Where the context of a job comes from.
#[derive(Clone, Debug)]
pub struct SourceConfig {
    /// What is fetched.
    pub mode: SourceMode,
    /// Base of raw files' URLs.
    pub raw_url: Url,
    /// Base of archives' URLs.
    pub archive_url: Url,
    /// Sent as bearer token.
    pub token: Option<Secret>,
    /// Files with PEM certificates.
    pub ca_files: Vec<PathBuf>,
    /// How long one download may take.
    pub timeout: Duration,
    /// The Dockerfile, relative.
    pub dockerfile: String,
    /// The spec, relative.
    pub spec: String,
    /// The largest single file, in bytes.
    pub file_limit: u64,
    /// The largest archive, in bytes as sent.
    pub archive_limit: u64,
    /// The most bytes an archive may unpack to.
    pub unpacked_limit: u64,
    /// The most entries of an archive.
    pub entry_limit: u64,
}

/// What is fetched of a repository.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SourceMode {
    /// The Dockerfile and the spec, and nothing else.
    Files,
    /// The whole tree at the commit.
    Archive,
}

/// What is passed on to `sockless build`.
#[derive(Clone, Debug)]
pub struct BuildConfig {
    /// `HOST=URL`, validated.
    pub mirrors: Vec<String>,
    /// `HOST[:PORT]`.
    pub insecure: Vec<String>,
    /// Files with PEM certificates.
    pub ca_files: Vec<PathBuf>,
    /// The directory of `config.json`.
    pub docker_config: Option<PathBuf>,
    /// What runs the steps.
    pub sandbox: sandbox::Choice,
    /// Whether steps are run that share this machine's processes or network.
    pub allow_weak_isolation: bool,
    /// Whether that may be a runc with known holes.
    pub allow_old_runc: bool,
    /// How much each RUN step may use.
    pub limits: StepLimits,
    /// How root filesystems are made.
    pub rootfs: rootfs::Choice,
    /// Whether sources may come from servers without public addresses.
    pub private_sources: bool,
    /// How much disk the store may take, in bytes.
    pub store_limit: Option<u64>,
}

/// How much each RUN step may use; absent is without a limit.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StepLimits {
    /// Memory, in bytes.
    pub memory: Option<u64>,
    /// How many processors.
    pub cpus: Option<f64>,
    /// Processes and threads.
    pub pids: Option<u64>,
    /// How long.
    pub timeout: Option<Duration>,
    /// What is shown of the output, in bytes.
    pub output: Option<u64>,
    /// What is written into the root filesystem, in bytes.
    pub disk: Option<u64>,
}

/// How jobs run.
#[derive(Clone, Copy, Debug)]
pub struct JobsConfig {
    /// How many at a time.
    pub concurrent: usize,
    /// How long one may run.
    pub timeout: Duration,
    /// How often one is started in all.
    pub attempts: u32,
    /// How long ended ones are kept.
    pub retention: Duration,
    /// How many may wait.
    pub queue_limit: u32,
    /// The most log of one, in bytes.
    pub log_limit: u64,
    /// How long they may go on when the service is told to end.
    pub shutdown_grace: Duration,
}

/// What is wrong with the configuration. No message contains a secret.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// The file, or one it names, cannot be read.
    #[error("reading {}{}", path.display(), .setting.map(|s| format!(", named by {s}")).unwrap_or_default())]
    Read {
        /// Which.
        path: PathBuf,
        /// The setting that names it; absent for the configuration file itself.
        setting: Option<&'static str>,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// The file is not TOML.
    #[error("{}:{line}: {message}", path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// Counted from 1.
        line: usize,
        /// What is wrong; never the line itself, which may hold a secret.
        message: String,
    },
    /// The file has a key that is no setting.
    #[error("{}: unknown key {key:?}{}", path.display(), .suggestion.map(|s| format!("; did you mean {s:?}?")).unwrap_or_default())]
    UnknownKey {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
        /// The nearest setting.
        suggestion: Option<&'static str>,
    },
    /// A value is not what its setting expects.
    #[error("{origin}: got {got}, expected {expected}")]
    Invalid {
        /// Where the value is.
        origin: Origin,
        /// The value, quoted; of a secret only what is wrong.
        got: String,
        /// What a value looks like.
        expected: &'static str,
    },
    /// A required setting is absent.
    #[error(
        "{name} is not set: give {env} or the key {name} in the configuration file; expected {expected}"
    )]
    Missing {
        /// The setting.
        name: &'static str,
        /// Its variable.
        env: &'static str,
        /// What a value looks like.
        expected: &'static str,
    },
    /// A secret is given as value and as file.
    #[error("{value} and {file} are both set; keep one")]
    Conflict {
        /// Where the value is.
        value: Origin,
        /// Where the file is.
        file: Origin,
    },
    /// This program's own path is unknown.
    #[error("finding the path of this program")]
    Executable(#[source] std::io::Error),
}

/// Where a value was given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// An environment variable.
    Variable(&'static str),
    /// A key of the configuration file.
    Key {
        /// The file.
        path: PathBuf,
        /// The key.
        key: &'static str,
    },
    /// The table of defaults.
    Default(&'static str),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Variable(name) => write!(f, "variable {name}"),
            Self::Key { path, key } => write!(f, "{}: key {key}", path.display()),
            Self::Default(name) => write!(f, "default of {name}"),
        }
    }
}

impl ServiceConfig {
    /// Reads the configuration: `file` where one is given, and `env`, which wins.
    ///
    /// # Errors
    /// The first thing that is wrong, in the order of [`SETTINGS`]; a broken file first.
    pub fn load(
        file: Option<&Path>,
        env: impl Fn(&str) -> Option<String>,
    ) -> Result<Self, ConfigError> {
        Self::from_values(&Values::read(file, &env)?, &env)
    }

    fn from_values(
        values: &Values<'_>,
        env: &dyn Fn(&str) -> Option<String>,
    ) -> Result<Self, ConfigError> {
        let root = match values.path("root")? {
            Some(root) => root,
            None => default_root(env).ok_or_else(|| missing(find("root")))?,
        };
        let registry = values.required("registry", |text| {
            Reference::parse(&format!("{text}/x"))
                .ok()
                .filter(|reference| reference.repository().registry() == text)
                .map(|_| text.to_owned())
        })?;
        let repository_prefix = values.parsed("repository_prefix", |text| {
            let reference = Reference::parse(&format!("{registry}/{text}/x")).ok()?;
            let kept = reference.repository().name() == format!("{text}/x");
            kept.then(|| text.to_owned())
        })?;
        Ok(Self {
            listen: values.required("listen", parse)?,
            webhook_secret: values
                .secret("webhook_secret", "webhook_secret_file")?
                .ok_or_else(|| missing(find("webhook_secret")))?,
            admin_token: values.secret("admin_token", "admin_token_file")?,
            branches: values.list("branches", non_empty)?,
            repositories: Some(values.list("repositories", owner_and_name)?)
                .filter(|list| !list.is_empty()),
            source: SourceConfig::from_values(values)?,
            registry,
            repository_prefix,
            build: BuildConfig::from_values(values)?,
            database: values
                .path("database")?
                .unwrap_or_else(|| root.join("jobs/jobs.sqlite")),
            root,
            jobs: JobsConfig::from_values(values)?,
            body_limit: values.required("body_limit", size)?,
            connection_limit: values.required("connection_limit", number(65_536))? as usize,
            executable: std::env::current_exe().map_err(ConfigError::Executable)?,
        })
    }
}

impl SourceConfig {
    fn from_values(values: &Values<'_>) -> Result<Self, ConfigError> {
        let token = values.secret("source_token", "source_token_file")?;
        let url = |name| -> Result<Url, ConfigError> {
            let url = values.required(name, base_url)?;
            if token.is_some() && url.scheme() == "http" && !is_loopback(&url) {
                return Err(ConfigError::Invalid {
                    origin: values.get(name).map_or(Origin::Default(name), |v| v.0),
                    got: format!("{:?} together with a token", url.as_str()),
                    expected: "an https URL, because plain http would show the token to everybody",
                });
            }
            Ok(url)
        };
        Ok(Self {
            mode: values.required("source", |text| match text {
                "files" => Some(SourceMode::Files),
                "archive" => Some(SourceMode::Archive),
                _ => None,
            })?,
            raw_url: url("raw_url")?,
            archive_url: url("archive_url")?,
            token,
            ca_files: values.paths("source_ca_files")?,
            timeout: values.required("source_timeout", duration)?,
            dockerfile: values.required("dockerfile", inside)?,
            spec: values.required("spec", inside)?,
            file_limit: values.required("file_limit", size)?,
            archive_limit: values.required("archive_limit", size)?,
            unpacked_limit: values.required("unpacked_limit", size)?,
            entry_limit: values.required("entry_limit", number(100_000_000))?,
        })
    }
}

impl BuildConfig {
    fn from_values(values: &Values<'_>) -> Result<Self, ConfigError> {
        Ok(Self {
            mirrors: values.list("registry_mirrors", |text| {
                let (host, url) = text.split_once('=')?;
                base_url(url)?;
                host_and_port(host)?;
                Some(text.to_owned())
            })?,
            insecure: values.list("insecure_registries", host_and_port)?,
            ca_files: values.paths("registry_ca_files")?,
            docker_config: values.path("docker_config")?,
            sandbox: values.required("sandbox", |text| match text {
                "auto" => Some(sandbox::Choice::Auto),
                "bwrap" => Some(sandbox::Choice::Bwrap),
                "runc" => Some(sandbox::Choice::Runc),
                "crun" => Some(sandbox::Choice::Crun),
                "youki" => Some(sandbox::Choice::Youki),
                "chroot" => Some(sandbox::Choice::Chroot),
                _ => None,
            })?,
            allow_weak_isolation: values.required("allow_weak_isolation", |text| match text {
                "true" => Some(true),
                "false" => Some(false),
                _ => None,
            })?,
            allow_old_runc: values.required("allow_old_runc", |text| match text {
                // `sockless build` takes numbers in the variable of the same name.
                "true" | "1" => Some(true),
                "false" | "0" => Some(false),
                _ => None,
            })?,
            limits: StepLimits::from_values(values)?,
            rootfs: values.required("rootfs", |text| match text {
                "auto" => Some(rootfs::Choice::Auto),
                "overlay" => Some(rootfs::Choice::Overlay),
                "copy" => Some(rootfs::Choice::Copy),
                _ => None,
            })?,
            private_sources: values.required("private_sources", |text| match text {
                "true" => Some(true),
                "false" => Some(false),
                _ => None,
            })?,
            store_limit: values.parsed("store_limit", size)?,
        })
    }

    /// The value of `--sandbox`.
    pub fn sandbox_name(&self) -> &'static str {
        match self.sandbox {
            sandbox::Choice::Auto => "auto",
            sandbox::Choice::Bwrap => "bwrap",
            sandbox::Choice::Runc => "runc",
            sandbox::Choice::Crun => "crun",
            sandbox::Choice::Chroot => "chroot",
            sandbox::Choice::Youki => "youki",
        }
    }

    /// The value of `--rootfs`.
    pub fn rootfs_name(&self) -> &'static str {
        match self.rootfs {
            rootfs::Choice::Auto => "auto",
            rootfs::Choice::Overlay => "overlay",
            rootfs::Choice::Copy => "copy",
        }
    }
}

impl StepLimits {
    fn from_values(values: &Values<'_>) -> Result<Self, ConfigError> {
        Ok(Self {
            memory: values.required("step_memory", limit(size))?,
            cpus: values.required("step_cpus", limit(cpus))?,
            pids: values.required("step_pids", limit(number(4_194_304)))?,
            timeout: values.required("step_timeout", limit(duration))?,
            output: values.required("step_output", limit(size))?,
            disk: values.required("step_disk", limit(size))?,
        })
    }
}

impl JobsConfig {
    fn from_values(values: &Values<'_>) -> Result<Self, ConfigError> {
        Ok(Self {
            concurrent: values.required("concurrent_jobs", number(64))? as usize,
            timeout: values.required("job_timeout", duration)?,
            attempts: values.required("job_attempts", number(100))? as u32,
            retention: values.required("job_retention", duration)?,
            queue_limit: values.required("queue_limit", number(1_000_000))? as u32,
            log_limit: values.required("log_limit", size)?,
            shutdown_grace: values.required("shutdown_grace", duration)?,
        })
    }
}

/// The table of settings as Markdown, for the manual.
pub fn settings_table_markdown() -> String {
    let mut text = String::from("| Key | Variable | Default | Meaning |\n|---|---|---|---|\n");
    for setting in SETTINGS {
        let default = match setting.default {
            "" => String::new(),
            default => format!("`{default}`"),
        };
        text += &format!(
            "| `{}` | `{}` | {default} | {} |\n",
            setting.name, setting.env, setting.meaning
        );
    }
    text
}

/// A value as it was given, before anything is known about it.
#[derive(Clone, Debug)]
enum Raw {
    Text(String),
    List(Vec<String>),
}

/// The values of the file and the environment, looked up by setting.
struct Values<'e> {
    file: BTreeMap<&'static str, Raw>,
    path: PathBuf,
    env: &'e dyn Fn(&str) -> Option<String>,
    /// Which settings were asked for; a test compares it with the table.
    asked: RefCell<BTreeSet<&'static str>>,
}

impl<'e> Values<'e> {
    fn read(
        path: Option<&Path>,
        env: &'e dyn Fn(&str) -> Option<String>,
    ) -> Result<Self, ConfigError> {
        let file = path.map_or_else(|| Ok(BTreeMap::new()), read_file)?;
        Ok(Self {
            file,
            path: path.unwrap_or(Path::new("")).to_owned(),
            env,
            asked: RefCell::default(),
        })
    }

    /// The value that applies, without the default.
    fn get(&self, name: &str) -> Option<(Origin, Raw)> {
        let setting = find(name);
        self.asked.borrow_mut().insert(setting.name);
        if let Some(text) = (self.env)(setting.env).filter(|text| !text.is_empty()) {
            return Some((Origin::Variable(setting.env), Raw::Text(text)));
        }
        let raw = self.file.get(name)?.clone();
        let origin = Origin::Key {
            path: self.path.clone(),
            key: setting.name,
        };
        Some((origin, raw))
    }

    fn text(&self, name: &str) -> Result<Option<(Origin, String)>, ConfigError> {
        match self.get(name) {
            None => Ok(None),
            Some((origin, Raw::Text(text))) => Ok(Some((origin, text))),
            Some((origin, Raw::List(_))) => Err(ConfigError::Invalid {
                origin,
                got: "a list".to_owned(),
                expected: find(name).expected,
            }),
        }
    }

    fn parsed<T>(
        &self,
        name: &str,
        parse: impl Fn(&str) -> Option<T>,
    ) -> Result<Option<T>, ConfigError> {
        let setting = find(name);
        let (origin, text) = match self.text(name)? {
            Some(given) => given,
            None if setting.default.is_empty() => return Ok(None),
            None => (Origin::Default(setting.name), setting.default.to_owned()),
        };
        parse(&text).map(Some).ok_or_else(|| ConfigError::Invalid {
            origin,
            got: format!("{text:?}"),
            expected: setting.expected,
        })
    }

    fn required<T>(&self, name: &str, parse: impl Fn(&str) -> Option<T>) -> Result<T, ConfigError> {
        self.parsed(name, parse)?.ok_or_else(|| missing(find(name)))
    }

    fn list<T>(
        &self,
        name: &str,
        parse: impl Fn(&str) -> Option<T>,
    ) -> Result<Vec<T>, ConfigError> {
        self.list_with_origin(name)?
            .1
            .iter()
            .map(|item| {
                parse(item).ok_or_else(|| ConfigError::Invalid {
                    origin: self.list_origin(name),
                    got: format!("{item:?}"),
                    expected: find(name).expected,
                })
            })
            .collect()
    }

    fn list_with_origin(&self, name: &str) -> Result<(Origin, Vec<String>), ConfigError> {
        let setting = find(name);
        let split = |text: &str| {
            text.split(',')
                .map(|item| item.trim().to_owned())
                .filter(|item| !item.is_empty())
                .collect()
        };
        match self.get(name) {
            None => Ok((Origin::Default(setting.name), split(setting.default))),
            Some((origin @ Origin::Variable(_), Raw::Text(text))) => Ok((origin, split(&text))),
            Some((origin, Raw::List(items))) if !items.is_empty() || setting.default.is_empty() => {
                Ok((origin, items))
            }
            Some((origin, raw)) => Err(ConfigError::Invalid {
                origin,
                got: match raw {
                    Raw::Text(text) => format!("{text:?}"),
                    Raw::List(_) => "an empty list".to_owned(),
                },
                expected: setting.expected,
            }),
        }
    }

    fn list_origin(&self, name: &str) -> Origin {
        self.get(name)
            .map_or(Origin::Default(find(name).name), |(origin, _)| origin)
    }

    fn path(&self, name: &str) -> Result<Option<PathBuf>, ConfigError> {
        Ok(self
            .text(name)?
            .map(|(origin, text)| self.resolve(&origin, &text)))
    }

    fn paths(&self, name: &str) -> Result<Vec<PathBuf>, ConfigError> {
        let (origin, items) = self.list_with_origin(name)?;
        Ok(items
            .iter()
            .map(|item| self.resolve(&origin, item))
            .collect())
    }

    fn resolve(&self, origin: &Origin, path: &str) -> PathBuf {
        match (origin, self.path.parent()) {
            (Origin::Key { .. }, Some(parent)) => parent.join(path),
            _ => PathBuf::from(path),
        }
    }

    /// A secret, from `value` or from the file that `file` names. What the
    /// environment gives wins over what the configuration file gives, whichever of the two it is.
    fn secret(
        &self,
        value: &'static str,
        file: &'static str,
    ) -> Result<Option<Secret>, ConfigError> {
        let from_env = |origin: &Origin| matches!(origin, Origin::Variable(_));
        let (text, path) = match (self.text(value)?, self.text(file)?) {
            (Some((value, text)), Some((file, path))) => {
                match (from_env(&value), from_env(&file)) {
                    (true, false) => (Some((value, text)), None),
                    (false, true) => (None, Some((file, path))),
                    _ => return Err(ConfigError::Conflict { value, file }),
                }
            }
            other => other,
        };
        let (origin, text) = match (text, path) {
            (Some(given), _) => given,
            (None, Some((origin, path))) => {
                let path = self.resolve(&origin, &path);
                let text = std::fs::read_to_string(&path).map_err(|source| ConfigError::Read {
                    path,
                    setting: Some(file),
                    source,
                })?;
                let text = text.strip_suffix('\n').unwrap_or(&text);
                (origin, text.strip_suffix('\r').unwrap_or(text).to_owned())
            }
            (None, None) => return Ok(None),
        };
        if text.trim().is_empty() {
            return Err(ConfigError::Invalid {
                origin,
                got: "an empty secret".to_owned(),
                expected: TEXT,
            });
        }
        Ok(Some(Secret::new(text)))
    }
}

fn read_file(path: &Path) -> Result<BTreeMap<&'static str, Raw>, ConfigError> {
    let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read {
        path: path.to_owned(),
        setting: None,
        source,
    })?;
    let table = text.parse::<toml::Table>().map_err(|error| {
        let start = error.span().map_or(0, |span| span.start);
        ConfigError::Syntax {
            path: path.to_owned(),
            line: 1 + text.bytes().take(start).filter(|b| *b == b'\n').count(),
            message: error.message().to_owned(),
        }
    })?;
    table
        .into_iter()
        .map(|(key, value)| {
            let Some(setting) = SETTINGS.iter().find(|s| s.name == key) else {
                return Err(ConfigError::UnknownKey {
                    path: path.to_owned(),
                    suggestion: nearest(&key),
                    key,
                });
            };
            let invalid = |got: &str| ConfigError::Invalid {
                origin: Origin::Key {
                    path: path.to_owned(),
                    key: setting.name,
                },
                got: got.to_owned(),
                expected: setting.expected,
            };
            let raw = match value {
                toml::Value::String(text) => Raw::Text(text),
                toml::Value::Integer(number) => Raw::Text(number.to_string()),
                toml::Value::Array(items) => Raw::List(
                    items
                        .into_iter()
                        .map(|item| match item {
                            toml::Value::String(text) => Ok(text),
                            other => Err(invalid(&format!("a list with a {}", other.type_str()))),
                        })
                        .collect::<Result<_, _>>()?,
                ),
                other => return Err(invalid(&format!("a {}", other.type_str()))),
            };
            Ok((setting.name, raw))
        })
        .collect()
}

fn find(name: &str) -> &'static Setting {
    SETTINGS
        .iter()
        .find(|setting| setting.name == name)
        .expect("every name that is asked for stands in SETTINGS, which a test checks")
}

fn missing(setting: &Setting) -> ConfigError {
    ConfigError::Missing {
        name: setting.name,
        env: setting.env,
        expected: setting.expected,
    }
}

fn default_root(env: &dyn Fn(&str) -> Option<String>) -> Option<PathBuf> {
    let absolute = |name| {
        env(name)
            .map(PathBuf::from)
            .filter(|path| path.is_absolute())
    };
    if rustix::process::geteuid().is_root() {
        return Some(PathBuf::from("/var/lib/sockless"));
    }
    absolute("XDG_DATA_HOME")
        .or_else(|| Some(absolute("HOME")?.join(".local/share")))
        .map(|data| data.join("sockless"))
}

fn parse<T: FromStr>(text: &str) -> Option<T> {
    text.parse().ok()
}

fn non_empty(text: &str) -> Option<String> {
    (!text.trim().is_empty()).then(|| text.to_owned())
}

fn owner_and_name(text: &str) -> Option<String> {
    let (owner, name) = text.split_once('/')?;
    let valid = |part: &str| {
        !part.is_empty()
            && part
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
    };
    (valid(owner) && valid(name)).then(|| text.to_owned())
}

fn host_and_port(text: &str) -> Option<String> {
    let valid = !text.is_empty()
        && text
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b".-:[]_".contains(&b));
    valid.then(|| text.to_owned())
}

fn inside(text: &str) -> Option<String> {
    let valid =
        !text.contains('\0') && text.split('/').all(|part| !matches!(part, "" | "." | ".."));
    valid.then(|| text.to_owned())
}

fn base_url(text: &str) -> Option<Url> {
    let url = Url::parse(text).ok()?;
    let valid = matches!(url.scheme(), "http" | "https")
        && url.has_host()
        && url.username().is_empty()
        && url.password().is_none()
        && url.query().is_none()
        && url.fragment().is_none();
    valid.then_some(url)
}

fn is_loopback(url: &Url) -> bool {
    match url.host() {
        Some(url::Host::Ipv4(ip)) => ip.is_loopback(),
        Some(url::Host::Ipv6(ip)) => ip.is_loopback(),
        Some(url::Host::Domain(name)) => name == "localhost",
        None => false,
    }
}

fn number(max: u64) -> impl Fn(&str) -> Option<u64> {
    move |text| parse(text).filter(|number| (1..=max).contains(number))
}

/// What `parse` reads, or `none`.
fn limit<T>(parse: impl Fn(&str) -> Option<T>) -> impl Fn(&str) -> Option<Option<T>> {
    move |text| match text {
        "none" => Some(None),
        text => parse(text).map(Some),
    }
}

fn cpus(text: &str) -> Option<f64> {
    parse::<f64>(text).filter(|cpus| (0.01..=10_000.0).contains(cpus))
}

fn size(text: &str) -> Option<u64> {
    let (digits, unit) = split_unit(text);
    let factor: u64 = match unit {
        "" | "B" => 1,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        _ => return None,
    };
    parse::<u64>(digits)?
        .checked_mul(factor)
        .filter(|bytes| *bytes > 0)
}

fn duration(text: &str) -> Option<Duration> {
    let (digits, unit) = split_unit(text);
    let factor: u64 = match unit {
        "s" => 1,
        "m" => 60,
        "h" => 60 * 60,
        "d" => 24 * 60 * 60,
        _ => return None,
    };
    // A hundred years; more would overflow the milliseconds that the database holds.
    const LONGEST_SECONDS: u64 = 100 * 365 * 24 * 60 * 60;
    parse::<u64>(digits)?
        .checked_mul(factor)
        .filter(|seconds| (1..=LONGEST_SECONDS).contains(seconds))
        .map(Duration::from_secs)
}

fn split_unit(text: &str) -> (&str, &str) {
    let end = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    (&text[..end], text[end..].trim_start())
}

/// The setting whose name is at most a third of its length away from `key`.
fn nearest(key: &str) -> Option<&'static str> {
    SETTINGS
        .iter()
        .map(|setting| (distance(key, setting.name), setting.name))
        .filter(|(distance, name)| *distance <= name.len().div_ceil(3))
        .min()
        .map(|(_, name)| name)
}

/// The number of characters to insert, remove or replace to get from `a` to `b`.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    const REQUIRED: &[(&str, &str)] = &[
        ("SOCKLESS_WEBHOOK_SECRET", "s3cret"),
        ("SOCKLESS_REGISTRY", "localhost:5000"),
        ("SOCKLESS_ROOT", "/store"),
    ];

    fn load(toml: &str, env: &[(&str, &str)]) -> Result<ServiceConfig, String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c.toml");
        std::fs::write(&path, toml).unwrap();
        let env: HashMap<String, String> = env
            .iter()
            .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
            .collect();
        ServiceConfig::load(Some(&path), |name| env.get(name).cloned()).map_err(|error| {
            error
                .to_string()
                .replace(&format!("{}/", dir.path().display()), "")
        })
    }

    fn with<'a>(more: &[(&'a str, &'a str)]) -> Vec<(&'a str, &'a str)> {
        let mut env = REQUIRED.to_vec();
        env.extend_from_slice(more);
        env
    }

    #[test]
    fn the_defaults_of_the_table_apply() {
        let config = load("", REQUIRED).unwrap();
        assert_eq!(config.listen.to_string(), "127.0.0.1:8080");
        assert_eq!(config.branches, ["develop"]);
        assert_eq!(config.repositories, None);
        assert_eq!(config.source.mode, SourceMode::Files);
        assert_eq!(
            config.source.raw_url.as_str(),
            "https://raw.githubusercontent.com/"
        );
        assert_eq!(config.body_limit, 25 << 20);
        assert_eq!(config.jobs.concurrent, 1);
        assert_eq!(config.jobs.attempts, 3);
        assert_eq!(config.jobs.queue_limit, 1000);
        assert_eq!(config.jobs.timeout, Duration::from_secs(3600));
        assert_eq!(config.database, Path::new("/store/jobs/jobs.sqlite"));
        assert_eq!(config.webhook_secret, Secret::new("s3cret"));
    }

    #[test]
    fn the_environment_wins_over_the_file() {
        let file = "webhook_secret = 'file'\nregistry = 'r.example'\nroot = 'data'\n\
                    branches = ['main', 'develop']\nconcurrent_jobs = 2\nlisten = '[::1]:0'";
        let config = load(file, &[]).unwrap();
        assert_eq!(config.branches, ["main", "develop"]);
        assert_eq!(config.jobs.concurrent, 2);
        assert_eq!(config.build.store_limit, None);
        assert!(config.root.is_absolute() && config.root.ends_with("data"));
        let env = [
            ("SOCKLESS_BRANCHES", "trunk, next"),
            ("SOCKLESS_CONCURRENT_JOBS", "3"),
            ("SOCKLESS_LISTEN", ""),
        ];
        let config = load(file, &env).unwrap();
        assert_eq!(config.branches, ["trunk", "next"]);
        assert_eq!(config.jobs.concurrent, 3);
        assert_eq!(config.listen.to_string(), "[::1]:0");
    }

    #[test]
    fn every_setting_is_read_and_has_a_name_of_its_own() {
        let env = |name: &str| {
            REQUIRED
                .iter()
                .find(|(n, _)| *n == name)
                .map(|(_, v)| (*v).to_owned())
        };
        let values = Values::read(None, &env).unwrap();
        ServiceConfig::from_values(&values, &env).unwrap();
        let all: BTreeSet<_> = SETTINGS.iter().map(|s| s.name).collect();
        assert_eq!(*values.asked.borrow(), all);
        assert_eq!(all.len(), SETTINGS.len());
        for setting in SETTINGS {
            assert_eq!(
                setting.env,
                format!("SOCKLESS_{}", setting.name.to_uppercase())
            );
            assert!(
                settings_table_markdown()
                    .contains(&format!("| `{}` | `{}` |", setting.name, setting.env))
            );
        }
    }

    #[track_caller]
    fn check(toml: &str, env: &[(&str, &str)], expected: &str) {
        assert_eq!(load(toml, env).unwrap_err(), expected);
    }

    #[test]
    fn errors_name_the_place_and_what_is_expected() {
        check(
            "",
            &[("SOCKLESS_ROOT", "/s")],
            "registry is not set: give SOCKLESS_REGISTRY or the key registry in the configuration file; expected HOST or HOST:PORT",
        );
        check(
            "",
            &[("SOCKLESS_ROOT", "/s"), ("SOCKLESS_REGISTRY", "r.example")],
            "webhook_secret is not set: give SOCKLESS_WEBHOOK_SECRET or the key webhook_secret in the configuration file; expected a text that is not empty",
        );
        check(
            "webhok_secret = 'x'",
            REQUIRED,
            "c.toml: unknown key \"webhok_secret\"; did you mean \"webhook_secret\"?",
        );
        check("zzz = 1", REQUIRED, "c.toml: unknown key \"zzz\"");
        check(
            "listen = 'nowhere'",
            REQUIRED,
            "c.toml: key listen: got \"nowhere\", expected an address such as 127.0.0.1:8080 or [::]:8080",
        );
        check(
            "",
            &with(&[("SOCKLESS_JOB_TIMEOUT", "5")]),
            "variable SOCKLESS_JOB_TIMEOUT: got \"5\", expected a duration such as 30s, 10m, 2h or 7d, more than 0",
        );
        check(
            "branches = 'main'",
            REQUIRED,
            "c.toml: key branches: got \"main\", expected a list of names",
        );
        check(
            "branches = []",
            REQUIRED,
            "c.toml: key branches: got an empty list, expected a list of names",
        );
        check(
            "registry_mirrors = ['docker.io']",
            REQUIRED,
            "c.toml: key registry_mirrors: got \"docker.io\", expected a list of HOST=URL",
        );
        check(
            "spec = '../spec.json'",
            REQUIRED,
            "c.toml: key spec: got \"../spec.json\", expected a relative path without \".\" and \"..\"",
        );
        check(
            "repository_prefix = 'Team'",
            REQUIRED,
            "c.toml: key repository_prefix: got \"Team\", expected a path of [a-z0-9] components such as team/apps",
        );
        check(
            "listen = true",
            REQUIRED,
            "c.toml: key listen: got a boolean, expected an address such as 127.0.0.1:8080 or [::]:8080",
        );
        check(
            "",
            &with(&[
                ("SOCKLESS_RAW_URL", "http://files.example"),
                ("SOCKLESS_SOURCE_TOKEN", "t"),
            ]),
            "variable SOCKLESS_RAW_URL: got \"http://files.example/\" together with a token, expected an https URL, because plain http would show the token to everybody",
        );
        check(
            "",
            &with(&[("SOCKLESS_WEBHOOK_SECRET_FILE", "/x")]),
            "variable SOCKLESS_WEBHOOK_SECRET and variable SOCKLESS_WEBHOOK_SECRET_FILE are both set; keep one",
        );
    }

    #[test]
    fn a_broken_file_is_named_with_its_line_and_without_its_text() {
        let error = load("listen = 'x'\nwebhook_secret = hunter2", REQUIRED).unwrap_err();
        assert!(error.starts_with("c.toml:2: "), "{error}");
        assert!(!error.contains("hunter2"), "{error}");
    }

    #[test]
    fn secrets_come_from_files_without_their_line_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("secret");
        std::fs::write(&path, " two words\r\n").unwrap();
        let env = [
            ("SOCKLESS_WEBHOOK_SECRET_FILE", path.to_str().unwrap()),
            ("SOCKLESS_REGISTRY", "r.example"),
            ("SOCKLESS_ROOT", "/store"),
        ];
        // The variable wins over the key although it is the other form of the secret.
        let config = load("webhook_secret = 'file'", &env).unwrap();
        assert_eq!(config.webhook_secret, Secret::new(" two words"));
        std::fs::write(&path, "\n").unwrap();
        check(
            "",
            &env,
            "variable SOCKLESS_WEBHOOK_SECRET_FILE: got an empty secret, expected a text that is not empty",
        );
    }

    #[test]
    fn sizes_and_durations_have_units() {
        for (text, expected) in [
            ("1", Some(1)),
            ("512KiB", Some(512 << 10)),
            ("2 GiB", Some(2 << 30)),
            ("0", None),
            ("1MB", None),
            ("-1", None),
            ("99999999999GiB", None),
        ] {
            assert_eq!(size(text), expected, "{text}");
        }
        assert_eq!(limit(size)("none"), Some(None));
        assert_eq!(limit(size)("1KiB"), Some(Some(1024)));
        assert_eq!(limit(size)("0"), None);
        for (text, expected) in [("1.5", Some(1.5)), ("0", None), ("NaN", None), ("-1", None)] {
            assert_eq!(cpus(text), expected, "{text}");
        }
        for (text, expected) in [
            ("30s", Some(30)),
            ("2h", Some(7200)),
            ("7d", Some(604_800)),
            ("0s", None),
            ("1w", None),
            ("99999999999d", None),
        ] {
            assert_eq!(duration(text).map(|d| d.as_secs()), expected, "{text}");
        }
    }
}
