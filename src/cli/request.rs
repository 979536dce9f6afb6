//! Command line + environment → [`BuildRequest`], once and completely.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::ValueEnum;
use thiserror::Error;

use super::args::{BuildArgs, NetworkArg, ProgressArg, RootfsArg, SandboxArg};
use super::cache::{self, CacheError};
use super::call::{CallError, CallSettings};
use super::limits::LimitError;
use super::output::{CompressionText, OutputError, Wanted};
use super::unsupported::UnsupportedFlag;
use super::values::{self, ValueError};
use crate::context::{
    ContextError, ContextSource, DockerfileLocation, NamedContextError, NamedContexts,
};
use crate::dockerfile::parse_bool;
use crate::image::{Annotations, Platform, PlatformError, Reference, ReferenceError};
use crate::pipeline::{BuildRequest, DeviceSettings, LayerCompression, Output};
use crate::plan::{self, Entitlement, Network, NoCache, RunSettings, Ulimit};
use crate::registry::Reach;
use crate::sandbox::{self, HostError, UlimitError, cdi};
use crate::session::{SecretSpec, Secrets, SessionError, SshAgents, SshSpec};

/// The last second of the year 9999, beyond which RFC 3339 cannot write a time.
const EPOCH_MAX: i64 = 253_402_300_799;

/// The environment variable and build argument that sets every time.
const EPOCH: &str = "SOURCE_DATE_EPOCH";

/// The build argument that makes an index of the image for one platform.
const MULTI_PLATFORM: &str = "BUILDKIT_MULTI_PLATFORM";

/// A build and how it is shown.
#[derive(Clone, Debug)]
pub(super) struct BuildSettings {
    /// What is built.
    pub request: BuildRequest,
    /// `--progress`.
    pub progress: ProgressArg,
    /// `--quiet`: the image ID goes to standard output.
    pub print_image_id: bool,
    /// `--die-with-parent`.
    pub die_with_parent: bool,
    /// `--call`, `--check`: what is asked instead of building.
    pub call: Option<CallSettings>,
    /// Nobody said where the image goes, and nobody said that it goes nowhere.
    pub without_output: bool,
}

/// Why a command line or an environment is refused.
#[derive(Debug, Error)]
pub(super) enum RequestError {
    /// A flag of `docker build` that is not there yet.
    #[error(transparent)]
    Flag(#[from] UnsupportedFlag),
    /// `--call` or `--check`.
    #[error(transparent)]
    Call(#[from] CallError),
    /// `--output`.
    #[error(transparent)]
    Output(#[from] OutputError),
    /// `--cache-from`, `--cache-to`.
    #[error(transparent)]
    Cache(#[from] CacheError),
    /// `--label`, `--annotation`, `--allow`, `--shm-size`.
    #[error(transparent)]
    Value(#[from] ValueError),
    /// `--build-context`.
    #[error(transparent)]
    NamedContext(#[from] NamedContextError),
    /// `--secret`, `--ssh`.
    #[error(transparent)]
    Session(#[from] SessionError),
    /// `--add-host`.
    #[error("--add-host")]
    Host(#[from] HostError),
    /// A limit of RUN steps.
    #[error(transparent)]
    Limit(#[from] LimitError),
    /// `--ulimit`.
    #[error("--ulimit")]
    Ulimit(#[from] UlimitError),
    /// `--tag`.
    #[error("--tag")]
    Tag(#[source] ReferenceError),
    /// A tag that names a digest, which only the build can know.
    #[error("--tag {0:?}: a name for a new image cannot have a digest")]
    TagWithDigest(String),
    /// A push to nowhere.
    #[error("pushing needs a name: no --tag was given")]
    PushWithoutTag,
    /// `--build-arg` without a name.
    #[error("--build-arg {0:?}: expected NAME=VALUE or NAME")]
    BuildArg(String),
    /// A variable that is no text.
    #[error("environment variable {0} is not UTF-8")]
    NotUtf8(String),
    /// `--platform` or `DOCKER_DEFAULT_PLATFORM`.
    #[error("--platform")]
    Platform(#[from] PlatformError),
    /// `BUILDKIT_MULTI_PLATFORM` is no boolean.
    #[error("--build-arg {MULTI_PLATFORM}={0:?}: expected \"true\" or \"false\"")]
    MultiPlatform(String),
    /// It says that there is one platform, and there are several.
    #[error("--build-arg {MULTI_PLATFORM} wants no index, but several platforms are built: {0}")]
    SeveralPlatforms(String),
    /// Annotations of an index where there is none.
    #[error("the annotation {0:?} is for an index, and an image for one platform has none")]
    NoIndex(String),
    /// `SOCKLESS_JOBS`.
    #[error("environment variable SOCKLESS_JOBS is {0:?}: expected a number")]
    Jobs(String),
    /// `--registry-mirror`.
    #[error("--registry-mirror for {host:?}: {reason}")]
    Mirror {
        /// The registry, as given.
        host: String,
        /// What is wrong; never shows the URL's credentials.
        reason: String,
    },
    /// `--insecure-registry`.
    #[error("--insecure-registry {0:?}: expected HOST[:PORT] with a dot, a port or \"localhost\"")]
    InsecureRegistry(String),
    /// A registry of `doctor`.
    #[error("{0:?} is not a registry: expected HOST[:PORT] with a dot, a port or \"localhost\"")]
    Registry(String),
    /// `prune --filter`.
    #[error(
        "--filter {0:?}: expected until=DURATION such as until=24h, type=tree, blob, step, http or mount, or id=PREFIX"
    )]
    Filter(String),
    /// `SOURCE_DATE_EPOCH`.
    #[error("{EPOCH} {0:?}: expected seconds since 1970 from 0 to {EPOCH_MAX}")]
    Epoch(String),
    /// A variable that holds one word of several.
    #[error("environment variable {name} is {value:?}: expected one of {expected}")]
    Choice {
        /// The variable.
        name: &'static str,
        /// Its value.
        value: String,
        /// What there is.
        expected: String,
    },
    /// `--quiet` with another way to show progress.
    #[error("--quiet and --progress={0} exclude each other")]
    QuietWithProgress(String),
    /// Nowhere to keep anything.
    #[error(
        "no place for the store: neither SOCKLESS_ROOT nor XDG_DATA_HOME nor HOME is an absolute path"
    )]
    NoRoot,
    /// The context or the Dockerfile.
    #[error(transparent)]
    Context(#[from] ContextError),
    /// One image is pushed, and cannot have two manifests.
    #[error("two outputs give the annotation {0:?} different values, and one image is pushed")]
    TwoAnnotations(String),
    /// One image is pushed, and has each layer once.
    #[error("two outputs compress the image that is pushed differently")]
    TwoCompressions,
    /// `--compression`, `--compression-level`.
    #[error("--compression: {0}")]
    Compression(String),
    /// Two things at once on standard output.
    #[error("standard output can take one thing: only one of --quiet and one \"dest=-\"")]
    StandardOutput,
}

impl RequestError {
    /// What to do about it.
    pub(super) fn hint(&self) -> Option<&str> {
        match self {
            Self::Flag(flag) => flag.hint,
            Self::PushWithoutTag => Some("name the image with --tag REGISTRY/REPOSITORY:TAG"),
            Self::NoIndex(_) => Some(
                "use manifest: or manifest-descriptor:, or --build-arg BUILDKIT_MULTI_PLATFORM=true",
            ),
            Self::NoRoot => Some("choose a directory with --root DIR"),
            Self::Output(error) => error.hint(),
            Self::Cache(error) => error.hint(),
            _ => None,
        }
    }
}

/// What the conversion may ask of the machine: values, so that it can be tested.
#[derive(Clone, Copy, Debug)]
pub(super) struct Machine<E> {
    /// Looks up an environment variable.
    pub env: E,
    /// Whether this process is root and not only inside a user namespace.
    pub is_root: bool,
}

impl<E: Fn(&str) -> Option<OsString>> Machine<E> {
    /// A variable; empty is absent, as everywhere in Docker's tools.
    fn var(&self, name: &str) -> Result<Option<String>, RequestError> {
        match (self.env)(name) {
            None => Ok(None),
            Some(value) if value.is_empty() => Ok(None),
            Some(value) => value
                .into_string()
                .map(Some)
                .map_err(|_| RequestError::NotUtf8(name.to_owned())),
        }
    }

    /// `SOCKLESS_ALLOW_OLD_RUNC`.
    fn allow_old_runc(&self) -> Result<bool, RequestError> {
        const NAME: &str = "SOCKLESS_ALLOW_OLD_RUNC";
        let value = self.var(NAME)?;
        value.map_or(Ok(false), |value| match value.as_str() {
            "1" | "true" => Ok(true),
            "0" | "false" => Ok(false),
            _ => Err(RequestError::Choice {
                name: NAME,
                value,
                expected: "\"true\", \"false\"".to_owned(),
            }),
        })
    }

    /// `flags`, then the items of the variable `name`.
    pub(super) fn list(&self, flags: &[String], name: &str) -> Result<Vec<String>, RequestError> {
        let var = self.var(name)?.unwrap_or_default();
        let items = var
            .split(',')
            .map(str::trim)
            .filter(|item| !item.is_empty());
        Ok(flags
            .iter()
            .cloned()
            .chain(items.map(str::to_owned))
            .collect())
    }

    /// The word of a variable as a value of `T`.
    fn choice<T: ValueEnum>(&self, name: &'static str) -> Result<Option<T>, RequestError> {
        let Some(value) = self.var(name)? else {
            return Ok(None);
        };
        T::from_str(&value, true)
            .map(Some)
            .map_err(|_| RequestError::Choice {
                name,
                value,
                expected: T::value_variants()
                    .iter()
                    .filter_map(|v| Some(format!("{:?}", v.to_possible_value()?.get_name())))
                    .collect::<Vec<_>>()
                    .join(", "),
            })
    }

    /// Where devices are described: the directories of `SOCKLESS_CDI_DIRS`, separated by
    /// colons, else the usual ones.
    fn cdi_dirs(&self) -> Vec<PathBuf> {
        let dirs = (self.env)("SOCKLESS_CDI_DIRS").filter(|dirs| !dirs.is_empty());
        match dirs {
            Some(dirs) => std::env::split_paths(&dirs).collect(),
            None => cdi::DIRS.map(PathBuf::from).into(),
        }
    }

    /// `--store-limit`; 0 is none, as for all of Docker's limits.
    fn store_limit(&self, flag: Option<String>) -> Result<Option<u64>, RequestError> {
        const VARIABLE: &str = "SOCKLESS_STORE_LIMIT";
        let limit = match flag {
            Some(text) => Some(values::bytes("--store-limit", &text)?),
            None => {
                let text = self.var(VARIABLE)?;
                text.map(|text| values::bytes(VARIABLE, &text))
                    .transpose()?
            }
        };
        Ok(limit.filter(|limit| *limit > 0))
    }

    /// The store's directory.
    pub(super) fn root(&self, flag: Option<&Path>) -> Result<PathBuf, RequestError> {
        let dir = |name| {
            (self.env)(name)
                .filter(|value| !value.is_empty())
                .map(PathBuf::from)
        };
        let chosen = flag.map(Path::to_owned).or_else(|| dir("SOCKLESS_ROOT"));
        if let Some(root) = chosen {
            return Ok(root);
        }
        if self.is_root {
            return Ok(PathBuf::from("/var/lib/sockless"));
        }
        // The XDG specification: a relative path is invalid and ignored.
        dir("XDG_DATA_HOME")
            .filter(|data| data.is_absolute())
            .or_else(|| {
                Some(
                    dir("HOME")
                        .filter(|home| home.is_absolute())?
                        .join(".local/share"),
                )
            })
            .map(|data| data.join("sockless"))
            .ok_or(RequestError::NoRoot)
    }
}

impl BuildSettings {
    /// Validates the arguments and completes them from the environment.
    ///
    /// # Errors
    /// [`RequestError`] for the first thing that is wrong.
    pub(super) fn from_args<E: Fn(&str) -> Option<OsString>>(
        args: BuildArgs,
        machine: &Machine<E>,
    ) -> Result<Self, RequestError> {
        let mut tags = args.tags;
        let mut push = args.push;
        let mut outputs = Vec::new();
        let mut nowhere = false;
        let mut push_annotations = Annotations::default();
        let compression = CompressionText {
            kind: args.compression,
            level: args.compression_level,
            force: args.force_compression,
        };
        let usual = CompressionText::default().resolve(&compression);
        let usual = usual.map_err(RequestError::Compression)?;
        let mut push_compression: Option<LayerCompression> = None;
        for output in &args.outputs {
            match Wanted::parse(output, &compression)? {
                Wanted::File(file) => outputs.push(file),
                Wanted::Nothing => nowhere = true,
                Wanted::Image {
                    names,
                    push: wanted,
                    annotations,
                    compression,
                } => {
                    let is_pushed = wanted || args.push;
                    if is_pushed && *push_compression.get_or_insert(compression) != compression {
                        return Err(RequestError::TwoCompressions);
                    }
                    tags.extend(names);
                    push |= wanted;
                    push_annotations = merge_all(push_annotations, annotations)?;
                }
            }
        }
        if push && tags.is_empty() {
            return Err(RequestError::PushWithoutTag);
        }
        let to_stdout = outputs
            .iter()
            .filter(|output| output.dest() == Path::new("-"))
            .count();
        if to_stdout + usize::from(args.quiet) > 1 {
            return Err(RequestError::StandardOutput);
        }
        let mut devices = DeviceSettings {
            dirs: machine.cdi_dirs(),
            ..DeviceSettings::default()
        };
        let mut allowed = values::entitlements(&args.allow, &mut devices)?;
        // Who asks for it on the command line allows it.
        if args.network == Some(NetworkArg::Host) {
            allowed.insert(Entitlement::NetworkHost);
        }
        let mut build_args = build_args(&args.build_args, machine)?;
        let epoch = epoch(&mut build_args, machine)?;
        let mut cache_to = cache::targets(&args.cache_to)?;
        if is_inline_cache(&build_args) {
            cache_to.extend(cache::targets(&["type=inline".to_owned()])?);
        }
        let platforms = platforms(&args.platforms, machine)?;
        let multi_platform = multi_platform(&build_args, &platforms)?;
        let mut platforms = platforms.into_iter();
        let platform = platforms.next();
        let request = BuildRequest {
            context: context(&args.context)?,
            dockerfile: args.file.as_deref().map(dockerfile).transpose()?,
            tags: parse_tags(&tags)?,
            push,
            outputs,
            explain: args.explain,
            push_annotations,
            push_compression: push_compression.unwrap_or(usual),
            plan: plan::Settings {
                build_args,
                target: args.target.filter(|target| !target.is_empty()),
                no_cache: no_cache(args.no_cache, &args.no_cache_filter),
                labels: values::labels(&args.labels)?,
                contexts: NamedContexts::parse(&args.build_contexts)?,
                allowed,
                run: RunSettings {
                    network: match args.network {
                        None | Some(NetworkArg::Default) => Network::Default,
                        Some(NetworkArg::None) => Network::None,
                        Some(NetworkArg::Host) => Network::Host,
                    },
                    extra_hosts: extra_hosts(&args.add_hosts)?,
                    shm_size: shm_size(args.shm_size.as_deref())?,
                    ulimits: ulimits(&args.ulimits)?,
                },
                platform_is_given: platform.is_some(),
                multi_platform,
                ..plan::Settings::new(platform.unwrap_or_else(Platform::host), Platform::host())
            },
            further_platforms: platforms.collect(),
            jobs: jobs(args.jobs, machine)?,
            epoch,
            registry: super::registry::options(
                &args.registry_mirrors,
                &args.insecure_registries,
                args.registry_ca_files,
                machine,
            )?,
            sources: if args.public_sources_only {
                Reach::PublicOnly
            } else {
                Reach::Anywhere
            },
            secrets: Arc::new(Secrets::new(
                SecretSpec::parse_all(&args.secrets)?,
                &machine.env,
            )?),
            agents: Arc::new(SshAgents::new(
                SshSpec::parse_all(&args.ssh)?,
                &machine.env,
            )?),
            devices,
            annotations: values::annotations(&args.annotations)?,
            cache_from: cache::sources(&args.cache_from)?,
            cache_to,
            sandbox: match args.sandbox {
                Some(sandbox) => sandbox.into(),
                None => machine
                    .choice::<SandboxArg>("SOCKLESS_SANDBOX")?
                    .unwrap_or(SandboxArg::Auto)
                    .into(),
            },
            rootfs: match args.rootfs {
                Some(rootfs) => rootfs.into(),
                None => machine
                    .choice::<RootfsArg>("SOCKLESS_ROOTFS")?
                    .unwrap_or(RootfsArg::Auto)
                    .into(),
            },
            require_isolation: args.require_isolation,
            limits: args.limits.limits()?,
            allow_old_runc: match args.allow_old_runc {
                Some(allowed) => allowed,
                None => machine.allow_old_runc()?,
            },
            root: machine.root(args.root.as_deref())?,
            store_limit: machine.store_limit(args.store_limit)?,
            iid_file: args.iid_file,
            metadata_file: args.metadata_file,
        };
        check_index_annotations(&request)?;
        Ok(Self {
            without_output: !request.push && request.outputs.is_empty() && !nowhere,
            request,
            progress: progress(args.progress, args.quiet, machine)?,
            print_image_id: args.quiet,
            call: CallSettings::parse(args.call.as_deref(), args.check)?,
            die_with_parent: args.die_with_parent,
        })
    }
}

/// `BUILDKIT_INLINE_CACHE`: the way to say `--cache-to type=inline` before there was that.
fn is_inline_cache(build_args: &BTreeMap<String, String>) -> bool {
    let value = build_args.get("BUILDKIT_INLINE_CACHE");
    value.is_some_and(|value| !matches!(value.as_str(), "" | "0" | "false"))
}

/// Joins what several outputs of one image say of it.
fn merge_all(mut all: Annotations, more: Annotations) -> Result<Annotations, RequestError> {
    merge(&mut all.manifest, more.manifest)?;
    merge(&mut all.descriptor, more.descriptor)?;
    merge(&mut all.index, more.index)?;
    merge(&mut all.index_descriptor, more.index_descriptor)?;
    for (platform, more) in more.platforms {
        let own = all.platforms.entry(platform).or_default();
        merge(&mut own.manifest, more.manifest)?;
        merge(&mut own.descriptor, more.descriptor)?;
    }
    Ok(all)
}

/// Joins annotations of one thing.
fn merge(
    all: &mut BTreeMap<String, String>,
    more: BTreeMap<String, String>,
) -> Result<(), RequestError> {
    for (name, value) in more {
        if all.get(&name).is_some_and(|other| *other != value) {
            return Err(RequestError::TwoAnnotations(name));
        }
        all.insert(name, value);
    }
    Ok(())
}

/// `--no-cache` and `--no-cache-filter`, whose names are separated by commas too.
fn no_cache(everything: bool, filter: &[String]) -> NoCache {
    let names = filter.iter().flat_map(|flag| flag.split(','));
    let names: BTreeSet<String> = names
        .filter(|name| !name.is_empty())
        .map(str::to_owned)
        .collect();
    match (everything, names.is_empty()) {
        (true, _) => NoCache::Everything,
        (false, true) => NoCache::Nothing,
        (false, false) => NoCache::Stages(names),
    }
}

fn extra_hosts(flags: &[String]) -> Result<Vec<(String, String)>, RequestError> {
    let parsed = flags.iter().map(|flag| sandbox::parse_extra_host(flag));
    Ok(parsed.collect::<Result<_, _>>()?)
}

/// `--ulimit`; a later one of a name wins.
fn ulimits(flags: &[String]) -> Result<Vec<Ulimit>, RequestError> {
    let mut limits = BTreeMap::new();
    for flag in flags {
        let sandbox::Ulimit { name, soft, hard } = flag.parse()?;
        limits.insert(name.clone(), Ulimit { name, soft, hard });
    }
    Ok(limits.into_values().collect())
}

/// Whether this process is root on its machine, and not only inside a user namespace:
/// there, user 0 is somebody else outside.
pub(super) fn is_root() -> bool {
    // Without user namespaces in the kernel there is no such file.
    let map = std::fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    rustix::process::geteuid().is_root() && (map.is_empty() || maps_root_to_root(&map))
}

/// `user_namespaces(7)`: lines of the first ID inside, the first outside, and how many.
fn maps_root_to_root(uid_map: &str) -> bool {
    uid_map
        .lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>())
        .any(|fields| matches!(fields[..], ["0", "0", _]))
}

/// `--quiet` wins over the environment, but not silently over a flag.
fn progress<E: Fn(&str) -> Option<OsString>>(
    flag: Option<ProgressArg>,
    quiet: bool,
    machine: &Machine<E>,
) -> Result<ProgressArg, RequestError> {
    match (flag, quiet) {
        (None | Some(ProgressArg::Auto | ProgressArg::Quiet), true) => Ok(ProgressArg::Quiet),
        (Some(other), true) => Err(RequestError::QuietWithProgress(
            other
                .to_possible_value()
                .map_or_else(String::new, |v| v.get_name().to_owned()),
        )),
        (Some(flag), false) => Ok(flag),
        (None, false) => Ok(machine.choice("BUILDKIT_PROGRESS")?.unwrap_or_default()),
    }
}

fn parse_tags(tags: &[String]) -> Result<Vec<Reference>, RequestError> {
    let mut parsed = Vec::new();
    for tag in tags {
        let reference = Reference::parse(tag).map_err(RequestError::Tag)?;
        if reference.digest().is_some() {
            return Err(RequestError::TagWithDigest(tag.clone()));
        }
        if !parsed.contains(&reference) {
            parsed.push(reference);
        }
    }
    Ok(parsed)
}

/// A later argument of the same name wins. A name alone takes its value from the
/// environment, and where that has none, is as if it had not been given.
/// `--shm-size`; 0 is the usual size, as with Docker.
fn shm_size(text: Option<&str>) -> Result<Option<u64>, ValueError> {
    let size = text.map(values::size).transpose()?;
    Ok(size.filter(|size| *size > 0))
}

fn build_args<E: Fn(&str) -> Option<OsString>>(
    args: &[String],
    machine: &Machine<E>,
) -> Result<BTreeMap<String, String>, RequestError> {
    let mut values = BTreeMap::new();
    for arg in args {
        let (name, value) = match arg.split_once('=') {
            Some((name, value)) => (name, Some(value.to_owned())),
            None => {
                let value = (machine.env)(arg).map(OsString::into_string).transpose();
                (
                    arg.as_str(),
                    value.map_err(|_| RequestError::NotUtf8(arg.clone()))?,
                )
            }
        };
        if name.is_empty() {
            return Err(RequestError::BuildArg(arg.clone()));
        }
        match value {
            Some(value) => values.insert(name.to_owned(), value),
            None => values.remove(name),
        };
    }
    Ok(values)
}

/// The build argument wins over the environment, which is handed on as one, as `buildx` does.
fn epoch<E: Fn(&str) -> Option<OsString>>(
    build_args: &mut BTreeMap<String, String>,
    machine: &Machine<E>,
) -> Result<Option<i64>, RequestError> {
    let text = match build_args.get(EPOCH) {
        Some(text) if text.is_empty() => return Ok(None),
        Some(text) => text.clone(),
        None => match machine.var(EPOCH)? {
            Some(text) => text,
            None => return Ok(None),
        },
    };
    if text == "context" {
        build_args.insert(EPOCH.to_owned(), text);
        return Ok(None);
    }
    let epoch = text
        .bytes()
        .all(|b| b.is_ascii_digit())
        .then(|| text.parse::<i64>().ok())
        .flatten()
        .filter(|epoch| *epoch <= EPOCH_MAX)
        .ok_or_else(|| RequestError::Epoch(text.clone()))?;
    build_args.insert(EPOCH.to_owned(), text);
    Ok(Some(epoch))
}

/// Each platform once, in the order in which they are given.
fn platforms<E: Fn(&str) -> Option<OsString>>(
    flags: &[String],
    machine: &Machine<E>,
) -> Result<Vec<Platform>, RequestError> {
    let flags = if flags.is_empty() {
        machine
            .var("DOCKER_DEFAULT_PLATFORM")?
            .into_iter()
            .collect()
    } else {
        flags.to_vec()
    };
    let mut platforms = Vec::new();
    for text in flags.iter().flat_map(|flag| flag.split(',')) {
        let platform = Platform::parse(text.trim())?;
        if !platforms.contains(&platform) {
            platforms.push(platform);
        }
    }
    Ok(platforms)
}

/// Whether the result is an index: that of several platforms is, and the argument can ask for
/// one of a single image.
fn multi_platform(
    build_args: &BTreeMap<String, String>,
    platforms: &[Platform],
) -> Result<bool, RequestError> {
    let given = build_args.get(MULTI_PLATFORM);
    let wanted = given
        .filter(|text| !text.is_empty())
        .map(|text| parse_bool(text).ok_or_else(|| RequestError::MultiPlatform(text.clone())));
    match wanted.transpose()? {
        Some(false) if platforms.len() > 1 => {
            let platforms: Vec<_> = platforms.iter().map(Platform::to_string).collect();
            Err(RequestError::SeveralPlatforms(platforms.join(", ")))
        }
        wanted => Ok(wanted.unwrap_or(platforms.len() > 1)),
    }
}

/// Refuses annotations of an index where the result is none.
fn check_index_annotations(request: &BuildRequest) -> Result<(), RequestError> {
    let of_outputs = request.outputs.iter().filter_map(|output| match output {
        Output::Image(output) => Some(&output.annotations),
        Output::Tar { .. } | Output::Local { .. } => None,
    });
    let all = [&request.annotations, &request.push_annotations];
    let mut all = all.into_iter().chain(of_outputs);
    let of_index = all.find_map(|all| all.index.keys().chain(all.index_descriptor.keys()).next());
    match of_index {
        Some(name) if !request.plan.multi_platform => Err(RequestError::NoIndex(name.clone())),
        _ => Ok(()),
    }
}

fn jobs<E: Fn(&str) -> Option<OsString>>(
    flag: Option<usize>,
    machine: &Machine<E>,
) -> Result<usize, RequestError> {
    match (flag, machine.var("SOCKLESS_JOBS")?) {
        (Some(jobs), _) => Ok(jobs),
        (None, None) => Ok(0),
        (None, Some(text)) => text.parse().map_err(|_| RequestError::Jobs(text)),
    }
}

/// The context as text: URLs are, and directories with other names would be in no message.
fn context(context: &OsStr) -> Result<ContextSource, RequestError> {
    match context.to_str() {
        Some(text) => Ok(ContextSource::parse(text)?),
        None => Ok(ContextSource::Directory(context.into())),
    }
}

fn dockerfile(file: &Path) -> Result<DockerfileLocation, RequestError> {
    match file.to_str() {
        Some(text) => Ok(DockerfileLocation::parse(text)?),
        None => Ok(DockerfileLocation::Path(file.to_owned())),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::cli::args::{Cli, Command};
    use crate::pipeline::RootfsChoice;
    use crate::sandbox::Choice;

    pub(in crate::cli) fn convert(
        args: &[&str],
        env: &[(&str, &str)],
    ) -> Result<BuildSettings, RequestError> {
        let args = [&["sockless", "build"], args].concat();
        let Command::Build(args) = Cli::try_parse_from(args).unwrap().command else {
            panic!("not a build");
        };
        let env: BTreeMap<&str, &str> = [("HOME", "/home/u")]
            .into_iter()
            .chain(env.iter().copied())
            .collect();
        let machine = Machine {
            env: |name: &str| env.get(name).map(OsString::from),
            is_root: false,
        };
        BuildSettings::from_args(*args, &machine)
    }

    #[track_caller]
    pub(in crate::cli) fn check_error(args: &[&str], env: &[(&str, &str)], expected: &str) {
        let error = anyhow::Error::new(convert(args, env).unwrap_err());
        assert_eq!(format!("{error:#}"), expected);
    }

    #[test]
    fn without_flags_everything_has_its_default() {
        let settings = convert(&["src"], &[]).unwrap();
        let request = settings.request;
        assert_eq!(request.context, ContextSource::Directory("src".into()));
        assert_eq!(request.dockerfile, None);
        assert_eq!(request.tags, []);
        assert!(!request.push && request.plan.no_cache == NoCache::Nothing);
        assert_eq!(request.outputs, []);
        assert_eq!(request.plan.build_args, BTreeMap::new());
        assert_eq!(request.plan.platform, Platform::host());
        assert_eq!(request.epoch, None);
        assert_eq!(request.sandbox, Choice::Auto);
        assert_eq!(request.rootfs, RootfsChoice::Auto);
        assert_eq!(request.root, Path::new("/home/u/.local/share/sockless"));
        assert_eq!(settings.progress, ProgressArg::Auto);
        assert!(settings.without_output && !settings.print_image_id);
    }

    #[test]
    fn the_root_is_where_the_user_or_the_system_wants_it() {
        let root = |args: &[&str], env: &[(&str, &str)]| convert(args, env).unwrap().request.root;
        let xdg = ("XDG_DATA_HOME", "/data");
        let own = ("SOCKLESS_ROOT", "/own");
        assert_eq!(root(&["."], &[xdg]), Path::new("/data/sockless"));
        assert_eq!(
            root(&["."], &[("XDG_DATA_HOME", "relative")]),
            Path::new("/home/u/.local/share/sockless")
        );
        assert_eq!(root(&["."], &[xdg, own]), Path::new("/own"));
        assert_eq!(root(&["--root", "/f", "."], &[xdg, own]), Path::new("/f"));
        let machine = Machine {
            env: |name: &str| (name == "XDG_DATA_HOME").then(|| "/data".into()),
            is_root: true,
        };
        assert_eq!(machine.root(None).unwrap(), Path::new("/var/lib/sockless"));
        let nowhere = Machine {
            env: |_: &str| None,
            is_root: false,
        };
        assert!(matches!(nowhere.root(None), Err(RequestError::NoRoot)));
    }

    #[test]
    fn root_in_a_user_namespace_is_a_user() {
        assert!(maps_root_to_root("         0          0 4294967295\n"));
        assert!(!maps_root_to_root("0 1000 1\n1 100000 65536\n"));
        assert!(!maps_root_to_root("1000 0 1\n"));
    }

    #[test]
    fn build_arguments_come_from_flags_and_the_environment() {
        let args = [
            "--build-arg",
            "A=1=2",
            "--build-arg",
            "B",
            "--build-arg",
            "C",
            "--build-arg",
            "D=",
            "--build-arg",
            "A=3",
            ".",
        ];
        let settings = convert(&args, &[("B", "from env")]).unwrap();
        let expected = [("A", "3"), ("B", "from env"), ("D", "")]
            .map(|(name, value)| (name.to_owned(), value.to_owned()));
        assert_eq!(settings.request.plan.build_args, BTreeMap::from(expected));
        check_error(
            &["--build-arg", "=x", "."],
            &[],
            "--build-arg \"=x\": expected NAME=VALUE or NAME",
        );
    }

    #[test]
    fn the_epoch_is_an_argument_or_a_variable() {
        let env = [("SOURCE_DATE_EPOCH", "1")];
        let settings = convert(&["."], &env).unwrap();
        assert_eq!(settings.request.epoch, Some(1));
        assert_eq!(settings.request.plan.build_args[EPOCH], "1");
        let settings = convert(&["--build-arg", "SOURCE_DATE_EPOCH=2", "."], &env).unwrap();
        assert_eq!(settings.request.epoch, Some(2));
        assert_eq!(convert(&["."], &[(EPOCH, "")]).unwrap().request.epoch, None);
        for bad in [
            "-1",
            "x",
            "1.5",
            "+1",
            "253402300800",
            "99999999999999999999",
        ] {
            check_error(
                &["."],
                &[(EPOCH, bad)],
                &format!(
                    "SOURCE_DATE_EPOCH {bad:?}: expected seconds since 1970 from 0 to 253402300799"
                ),
            );
        }
    }

    #[test]
    fn tags_and_pushes_fit_together() {
        let settings = convert(
            &[
                "-t",
                "a",
                "-t",
                "h:1/b:2",
                "-t",
                "a:latest",
                "-o",
                "type=image,name=c,push=true",
                ".",
            ],
            &[],
        )
        .unwrap();
        let tags: Vec<String> = settings
            .request
            .tags
            .iter()
            .map(Reference::to_string)
            .collect();
        assert_eq!(
            tags,
            [
                "docker.io/library/a:latest",
                "h:1/b:2",
                "docker.io/library/c:latest"
            ]
        );
        assert!(settings.request.push && !settings.without_output);
        check_error(
            &["--push", "."],
            &[],
            "pushing needs a name: no --tag was given",
        );
        let digest = crate::image::Digest::of(b"");
        check_error(
            &["-t", &format!("a@{digest}"), "."],
            &[],
            &format!("--tag \"a@{digest}\": a name for a new image cannot have a digest"),
        );
        check_error(
            &["-t", "A", "."],
            &[],
            "--tag: invalid reference \"A\": the repository must be lower case",
        );
    }

    #[test]
    fn platforms_and_words_of_the_environment_are_checked() {
        let platform = |args: &[&str]| {
            let env = [("DOCKER_DEFAULT_PLATFORM", "linux/s390x")];
            convert(args, &env)
                .unwrap()
                .request
                .plan
                .platform
                .to_string()
        };
        assert_eq!(platform(&["."]), "linux/s390x");
        assert_eq!(
            platform(&["--platform", "linux/arm64,linux/aarch64", "."]),
            "linux/arm64"
        );
        let several: &[&str] = &[
            "--platform",
            "linux/s390x,linux/arm64",
            "--platform",
            "arm64,amd64",
            ".",
        ];
        let request = convert(several, &[]).unwrap().request;
        let texts = |platforms: &[Platform]| -> Vec<String> {
            platforms.iter().map(Platform::to_string).collect()
        };
        assert_eq!(request.plan.platform.to_string(), "linux/s390x");
        assert_eq!(
            texts(&request.further_platforms),
            ["linux/arm64", "linux/amd64"]
        );
        assert!(request.plan.multi_platform && request.plan.platform_is_given);
        check_error(
            &[several, &["--build-arg", "BUILDKIT_MULTI_PLATFORM=0"][..]].concat(),
            &[],
            "--build-arg BUILDKIT_MULTI_PLATFORM wants no index, but several platforms are built: linux/s390x, linux/arm64, linux/amd64",
        );
        check_error(
            &[".", "--build-arg", "BUILDKIT_MULTI_PLATFORM=x"],
            &[],
            "--build-arg BUILDKIT_MULTI_PLATFORM=\"x\": expected \"true\" or \"false\"",
        );
        let one = ["--build-arg", "BUILDKIT_MULTI_PLATFORM=true", "."];
        let request = convert(&one, &[]).unwrap().request;
        assert!(request.plan.multi_platform && request.further_platforms.is_empty());
        for annotation in ["--annotation=index:a=b", "-otype=oci,annotation-index.a=b"] {
            check_error(
                &[annotation, "."],
                &[],
                "the annotation \"a\" is for an index, and an image for one platform has none",
            );
            assert!(convert(&[&[annotation][..], &one].concat(), &[]).is_ok());
        }
        let jobs = |args: &[&str], env: &[(&str, &str)]| convert(args, env).unwrap().request.jobs;
        let env = [("SOCKLESS_JOBS", "3")];
        assert_eq!(jobs(&["."], &[]), 0);
        assert_eq!(jobs(&["."], &env), 3);
        assert_eq!(jobs(&["--jobs", "2", "."], &env), 2);
        check_error(
            &["."],
            &[("SOCKLESS_JOBS", "all")],
            "environment variable SOCKLESS_JOBS is \"all\": expected a number",
        );
        check_error(
            &["."],
            &[("SOCKLESS_SANDBOX", "docker")],
            "environment variable SOCKLESS_SANDBOX is \"docker\": \
             expected one of \"auto\", \"bwrap\", \"runc\", \"crun\", \"chroot\", \"youki\"",
        );
        check_error(
            &["."],
            &[("SOCKLESS_ROOTFS", "vfs")],
            "environment variable SOCKLESS_ROOTFS is \"vfs\": \
             expected one of \"auto\", \"overlay\", \"copy\"",
        );
        let rootfs = |args: &[&str]| {
            let settings = convert(args, &[("SOCKLESS_ROOTFS", "copy")]);
            settings.unwrap().request.rootfs
        };
        assert_eq!(rootfs(&["."]), RootfsChoice::Copy);
        assert_eq!(rootfs(&["--rootfs", "overlay", "."]), RootfsChoice::Overlay);
        let settings = convert(
            &["."],
            &[("SOCKLESS_SANDBOX", "crun"), ("BUILDKIT_PROGRESS", "plain")],
        )
        .unwrap();
        assert_eq!(settings.request.sandbox, Choice::Crun);
        assert_eq!(settings.progress, ProgressArg::Plain);
    }

    #[test]
    fn a_pushed_image_has_one_value_for_an_annotation() {
        let both = |second: &str| {
            let first = "type=registry,annotation.a=1,annotation.b=2";
            convert(&["-t", "h.io/a", "-o", first, "-o", second, "."], &[])
        };
        let request = both("type=image,annotation.a=1,annotation.c=3")
            .unwrap()
            .request;
        let names: Vec<&String> = request.push_annotations.manifest.keys().collect();
        assert_eq!(names, ["a", "b", "c"]);
        assert_eq!(request.annotations, Annotations::default());
        let error = both("type=image,annotation.a=other").unwrap_err();
        assert_eq!(
            error.to_string(),
            "two outputs give the annotation \"a\" different values, and one image is pushed"
        );
    }

    #[test]
    fn quiet_takes_standard_output_and_silences_progress() {
        let settings = convert(&["-q", "."], &[("BUILDKIT_PROGRESS", "plain")]).unwrap();
        assert!(settings.print_image_id);
        assert_eq!(settings.progress, ProgressArg::Quiet);
        check_error(
            &["-q", "--progress", "plain", "."],
            &[],
            "--quiet and --progress=plain exclude each other",
        );
        check_error(
            &["-q", "-o", "type=oci,dest=-", "."],
            &[],
            "standard output can take one thing: only one of --quiet and one \"dest=-\"",
        );
    }

    #[test]
    fn contexts_and_dockerfiles_may_be_elsewhere() {
        let request = |args: &[&str]| convert(args, &[]).unwrap().request;
        assert_eq!(request(&["-"]).context, ContextSource::StandardInput);
        let git = "https://u:hunter2@example.com/a.git#main:sub";
        assert_eq!(request(&[git]).context, ContextSource::Git(git.into()));
        assert_eq!(
            request(&["-f", "-", "."]).dockerfile,
            Some(DockerfileLocation::StandardInput)
        );
        let error = convert(&["no/such/directory"], &[]).unwrap_err();
        assert!(matches!(error, RequestError::Context(_)), "{error}");
    }

    #[test]
    fn what_steps_get_is_read_from_flags() {
        let args = [
            "--label",
            "a=1",
            "--annotation",
            "b=2",
            "--allow",
            "device",
            "--network=host",
            "--add-host",
            "h:1.2.3.4",
            "--shm-size",
            "1k",
            "--ulimit",
            "nofile=1:2",
            "--no-cache-filter",
            "a,b",
            "--build-context",
            "x=docker-image://y",
            ".",
        ];
        let request = convert(&args, &[]).unwrap().request;
        let plan = request.plan;
        assert_eq!(plan.labels, [("a".to_owned(), "1".to_owned())].into());
        assert_eq!(
            request.annotations.manifest,
            [("b".to_owned(), "2".to_owned())].into()
        );
        assert_eq!(plan.allowed, [Entitlement::NetworkHost].into());
        assert_eq!(
            plan.run,
            RunSettings {
                network: Network::Host,
                extra_hosts: vec![("h".into(), "1.2.3.4".into())],
                shm_size: Some(1024),
                ulimits: vec![Ulimit {
                    name: "nofile".into(),
                    soft: 1,
                    hard: 2
                }],
            }
        );
        assert_eq!(
            plan.no_cache,
            NoCache::Stages(["a".to_owned(), "b".to_owned()].into())
        );
        assert_eq!(plan.contexts.iter().count(), 1);
    }

    #[test]
    fn the_store_may_have_a_limit() {
        let limit = |args: &[&str], env: &[(&str, &str)]| {
            let args = [args, &["."]].concat();
            convert(&args, env).unwrap().request.store_limit
        };
        let variable = [("SOCKLESS_STORE_LIMIT", "1.5g")];
        assert_eq!(limit(&[], &[]), None);
        assert_eq!(limit(&["--store-limit", "20GB"], &variable), Some(20 << 30));
        assert_eq!(limit(&[], &variable), Some(3 << 29));
        assert_eq!(limit(&["--store-limit=0"], &variable), None);
        check_error(
            &["--store-limit", "much", "."],
            &[],
            "--store-limit \"much\": expected a number of bytes, such as 67108864, 64m or 1g",
        );
    }

    #[test]
    fn an_image_may_go_nowhere() {
        assert!(
            !convert(&["-o", "type=cacheonly", "."], &[])
                .unwrap()
                .without_output
        );
    }
}
