//! The command line as `clap` sees it. Raw texts only; `request` gives them meaning.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{ArgAction, Args, Parser, Subcommand, ValueEnum};

use crate::pipeline::RootfsChoice;
use crate::sandbox;

/// The whole command line.
#[derive(Clone, Debug, Parser)]
#[command(
    name = "sockless",
    about = "Builds OCI images from Dockerfiles with no docker.sock, no daemon and no root",
    version = super::VERSION.as_str(),
    after_help = "Exit codes: 0 success, 1 a build step failed, 2 wrong arguments, settings or Dockerfile,\n\
                  3 registry, 4 no sandbox available, 70 anything else, 130 and 143 interrupted.\n\
                  SOCKLESS_LOG sets what is logged to stderr (default \"warn\")."
)]
pub(super) struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Clone, Debug, Subcommand)]
pub(super) enum Command {
    /// Builds an image from a Dockerfile
    Build(Box<BuildArgs>),
    /// Builds and pushes images when a webhook says so
    Serve(ServeArgs),
    /// Removes what builds have kept and no running build uses
    Prune(super::store::PruneArgs),
    /// Says how much disk the store takes
    Du(super::store::DuArgs),
    /// Lists the steps that the cache has
    Ls(super::store::LsArgs),
    /// Looks after the store
    Store(super::store::StoreArgs),
    /// Says which sandboxes, root filesystems, networks and registries work here, and what unlocks the rest
    Doctor(super::doctor::DoctorArgs),
    /// Prints the version and what it was built for
    Version,
}

/// Arguments of `sockless serve`.
#[derive(Clone, Debug, Args)]
pub(super) struct ServeArgs {
    /// The configuration file
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
}

/// Arguments of `sockless build`, named as those of `docker build`.
#[derive(Clone, Debug, Args)]
pub(super) struct BuildArgs {
    /// The Dockerfile [default: Dockerfile in CONTEXT]; "-" reads it from standard input
    #[arg(short, long, value_name = "FILE")]
    pub file: Option<PathBuf>,

    /// A name for the image, REGISTRY/REPOSITORY:TAG
    #[arg(short, long = "tag", value_name = "REF")]
    pub tags: Vec<String>,

    /// Pushes the image to the registry of every --tag
    #[arg(long, action = ArgAction::Set, num_args = 0..=1, require_equals = true,
          default_value = "false", default_missing_value = "true", hide_default_value = true,
          hide_possible_values = true, value_name = "BOOL")]
    pub push: bool,

    /// Sets a build argument; without a value, takes it from the environment
    #[arg(long = "build-arg", value_name = "NAME[=VALUE]")]
    pub build_args: Vec<String>,

    /// The stage to build [default: the last one]
    #[arg(long, value_name = "STAGE")]
    pub target: Option<String>,

    /// Writes the result, several times if given so: type=oci, docker, tar or local, with dest=PATH ("-" is standard output), or type=registry; DIR is type=local, "-" is type=tar
    #[arg(short, long = "output", value_name = "type=TYPE,…")]
    pub outputs: Vec<String>,

    /// How new layers are compressed where no --output says it: gzip, zstd or uncompressed [default: gzip]
    #[arg(long, value_name = "FORMAT")]
    pub compression: Option<String>,

    /// The level of --compression: 0 to 12 for gzip, 1 to 22 for zstd [default: 6, 3]
    #[arg(long, value_name = "LEVEL", allow_hyphen_values = true)]
    pub compression_level: Option<String>,

    /// Converts layers of bases and of the cache to --compression too
    #[arg(long, action = ArgAction::Set, num_args = 0..=1, require_equals = true,
          default_missing_value = "true", hide_possible_values = true, value_name = "BOOL")]
    pub force_compression: Option<bool>,

    /// The platforms to build for, such as linux/arm64; several give an index [env: DOCKER_DEFAULT_PLATFORM] [default: this machine's]
    #[arg(long = "platform", value_name = "PLATFORM,…")]
    pub platforms: Vec<String>,

    /// How many RUN steps run at once [env: SOCKLESS_JOBS] [default: 0, all that wait for nothing]
    #[arg(long, value_name = "NUMBER")]
    pub jobs: Option<usize>,

    /// A URL that is asked before registry HOST [env: SOCKLESS_REGISTRY_MIRROR, separated by commas]
    #[arg(long = "registry-mirror", value_name = "HOST=URL")]
    pub registry_mirrors: Vec<String>,

    /// A registry that may be spoken to over HTTP or with any certificate
    /// [env: SOCKLESS_INSECURE_REGISTRY, separated by commas]
    #[arg(long = "insecure-registry", value_name = "HOST[:PORT]")]
    pub insecure_registries: Vec<String>,

    /// Certificates (PEM) that are trusted beside the system's
    /// [env: SOCKLESS_REGISTRY_CA, separated by commas]
    #[arg(long = "registry-ca", value_name = "FILE")]
    pub registry_ca_files: Vec<PathBuf>,

    /// What runs the steps [env: SOCKLESS_SANDBOX] [default: auto]
    #[arg(long, value_name = "SANDBOX")]
    pub sandbox: Option<SandboxArg>,

    /// Uses a runc older than 1.2.8, 1.3.3 and 1.4.0-rc.3, which has known holes unless a distribution
    /// has mended it [env: SOCKLESS_ALLOW_OLD_RUNC]
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true",
          hide_possible_values = true, value_name = "BOOL")]
    pub allow_old_runc: Option<bool>,

    /// How the steps' root filesystems are made [env: SOCKLESS_ROOTFS] [default: auto]
    #[arg(long, value_name = "ROOTFS")]
    pub rootfs: Option<RootfsArg>,

    /// Refuses to run steps where they share this machine's processes or network, rather than
    /// saying so
    #[arg(long)]
    pub require_isolation: bool,

    /// Where everything is kept between builds [env: SOCKLESS_ROOT]
    /// [default: /var/lib/sockless as root, else $XDG_DATA_HOME/sockless]
    #[arg(long, value_name = "DIR")]
    pub root: Option<PathBuf>,

    /// How much disk the store may take, such as 20GB; beyond, the build ends by removing what
    /// was not used for longest [env: SOCKLESS_STORE_LIMIT]
    #[arg(long, value_name = "SIZE")]
    pub store_limit: Option<String>,

    /// How progress is shown, on standard error [env: BUILDKIT_PROGRESS] [default: auto]
    #[arg(long, value_name = "STYLE")]
    pub progress: Option<ProgressArg>,

    /// Shows no progress and prints the image ID
    #[arg(short, long, action = ArgAction::Set, num_args = 0..=1, require_equals = true,
          default_value = "false", default_missing_value = "true", hide_default_value = true,
          hide_possible_values = true, value_name = "BOOL")]
    pub quiet: bool,

    /// Looks steps up in another cache too: type=registry,ref=REF (a cache, or an image with one inside) or type=local,src=DIR; REF alone is type=registry
    #[arg(long = "cache-from", value_name = "type=TYPE,…")]
    pub cache_from: Vec<String>,

    /// Exports the cache when the image is out: type=registry,ref=REF, type=local,dest=DIR or type=inline; mode=max has the layers of all steps, mounts=true cache mounts too; failures are warnings without ignore-error=false
    #[arg(long = "cache-to", value_name = "type=TYPE,…")]
    pub cache_to: Vec<String>,

    /// Runs every step, whatever the cache has
    #[arg(long, action = ArgAction::Set, num_args = 0..=1, require_equals = true,
          default_value = "false", default_missing_value = "true", hide_default_value = true,
          hide_possible_values = true, value_name = "BOOL")]
    pub no_cache: bool,

    /// Runs every step of the named stages, whatever the cache has
    #[arg(long = "no-cache-filter", value_name = "STAGE,…")]
    pub no_cache_filter: Vec<String>,

    /// Says for each step whether the cache has it, and if not, what differs from the nearest
    /// record
    #[arg(long, action = ArgAction::Set, num_args = 0..=1, require_equals = true,
          default_value = "false", default_missing_value = "true", hide_default_value = true,
          hide_possible_values = true, value_name = "BOOL")]
    pub explain: bool,

    /// Asks the registry for the newest base images; sockless always does
    #[arg(long, action = ArgAction::Set, num_args = 0..=1, require_equals = true,
          default_value = "false", default_missing_value = "true", hide_default_value = true,
          hide_possible_values = true, value_name = "BOOL")]
    pub pull: bool,

    /// Adds a label to the image's config
    #[arg(long = "label", value_name = "NAME=VALUE")]
    pub labels: Vec<String>,

    /// Adds an annotation to the image's manifest; TYPE is manifest, manifest-descriptor,
    /// index or index-descriptor, the first two perhaps with a platform in brackets
    #[arg(long = "annotation", value_name = "[TYPE:]NAME=VALUE")]
    pub annotations: Vec<String>,

    /// A directory, image, OCI layout or repository that stands in for a stage or an image
    #[arg(long = "build-context", value_name = "NAME=VALUE")]
    pub build_contexts: Vec<String>,

    /// Lends steps a secret: id=ID[,src=FILE] or id=ID,env=VARIABLE
    #[arg(long = "secret", value_name = "id=ID,…")]
    pub secrets: Vec<String>,

    /// Lends steps an SSH agent, or keys
    #[arg(long = "ssh", value_name = "default|ID[=SOCKET|KEY,…]")]
    pub ssh: Vec<String>,

    /// Allows steps network.host, security.insecure, device or device=NAME
    #[arg(long = "allow", value_name = "ENTITLEMENT")]
    pub allow: Vec<String>,

    /// The network of RUN steps that name none
    #[arg(long, value_enum, value_name = "MODE")]
    pub network: Option<NetworkArg>,

    /// Adds a line to /etc/hosts of RUN steps
    #[arg(long = "add-host", value_name = "NAME:IP")]
    pub add_hosts: Vec<String>,

    /// The size of /dev/shm of RUN steps, such as 128m
    #[arg(long = "shm-size", value_name = "BYTES")]
    pub shm_size: Option<String>,

    /// A resource limit of RUN steps
    #[arg(long = "ulimit", value_name = "NAME=SOFT[:HARD]")]
    pub ulimits: Vec<String>,

    /// How much each RUN step may use.
    #[command(flatten)]
    pub limits: super::limits::LimitArgs,

    /// Answers METHOD instead of building: check, outline, targets; ",format=json" for programs
    #[arg(long, value_name = "METHOD")]
    pub call: Option<String>,

    /// Checks the Dockerfile and builds nothing; the same as --call=check
    #[arg(long, action = ArgAction::Set, num_args = 0..=1, require_equals = true,
          default_value = "false", default_missing_value = "true", hide_default_value = true,
          hide_possible_values = true, value_name = "BOOL")]
    pub check: bool,

    /// Writes the image's digest to a file
    #[arg(long = "iidfile", value_name = "FILE")]
    pub iid_file: Option<PathBuf>,

    /// Writes a JSON object about the result to a file
    #[arg(long, value_name = "FILE")]
    pub metadata_file: Option<PathBuf>,

    /// Fetches what ADD and contexts name from servers with public addresses only
    #[arg(long, action = ArgAction::Set, num_args = 0..=1, require_equals = true,
          default_value = "false", default_missing_value = "true", hide_default_value = true,
          hide_possible_values = true, value_name = "BOOL")]
    pub public_sources_only: bool,

    /// Ends this process when its parent ends; for the service's jobs
    #[arg(long, hide = true)]
    pub die_with_parent: bool,

    /// What COPY and ADD read from: a directory, an archive's or a git repository's URL, or "-" for
    /// an archive or a Dockerfile on standard input
    #[arg(value_name = "CONTEXT")]
    pub context: OsString,
}

/// `--sandbox`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum SandboxArg {
    /// The best that works here
    Auto,
    /// bubblewrap
    Bwrap,
    /// runc
    Runc,
    /// crun
    Crun,
    /// chroot(2), where no namespaces can be made: isolates less
    Chroot,
    /// youki, which nobody has tested with sockless
    Youki,
}

impl From<SandboxArg> for sandbox::Choice {
    fn from(arg: SandboxArg) -> Self {
        match arg {
            SandboxArg::Auto => Self::Auto,
            SandboxArg::Bwrap => Self::Bwrap,
            SandboxArg::Runc => Self::Runc,
            SandboxArg::Crun => Self::Crun,
            SandboxArg::Chroot => Self::Chroot,
            SandboxArg::Youki => Self::Youki,
        }
    }
}

/// `--rootfs`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum RootfsArg {
    /// Overlay mounts where they work, else copies
    Auto,
    /// Overlay mounts of the kernel
    Overlay,
    /// A copy of the image for each step
    Copy,
}

impl From<RootfsArg> for RootfsChoice {
    fn from(arg: RootfsArg) -> Self {
        match arg {
            RootfsArg::Auto => Self::Auto,
            RootfsArg::Overlay => Self::Overlay,
            RootfsArg::Copy => Self::Copy,
        }
    }
}

/// `--network`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum NetworkArg {
    /// Outbound connections
    Default,
    /// Nothing
    None,
    /// This machine's network
    Host,
}

/// `--progress`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(super) enum ProgressArg {
    /// tty where standard error is a terminal, else plain
    #[default]
    Auto,
    /// Lines that are redrawn as steps run
    Tty,
    /// One line after the other
    Plain,
    /// Nothing but errors
    #[value(alias = "none")]
    Quiet,
    /// One JSON object a line
    Rawjson,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn flags_are_those_of_docker_build() {
        let args = "sockless build -f a -t b --tag c --push --build-arg D=e --target f \
                    -o type=oci,dest=g --platform linux/arm64 --no-cache=false --iidfile h \
                    --metadata-file i --progress plain -q .";
        let Command::Build(build) = Cli::try_parse_from(args.split_whitespace())
            .unwrap()
            .command
        else {
            panic!("not a build");
        };
        assert_eq!(build.file, Some("a".into()));
        assert_eq!(build.tags, ["b", "c"]);
        assert_eq!(
            (build.push, build.no_cache, build.quiet),
            (true, false, true)
        );
        assert_eq!(build.build_args, ["D=e"]);
        assert_eq!(build.target.as_deref(), Some("f"));
        assert_eq!(build.outputs, ["type=oci,dest=g"]);
        assert_eq!(build.platforms, ["linux/arm64"]);
        assert_eq!(build.progress, Some(ProgressArg::Plain));
        assert_eq!(build.context, ".");
    }
}
