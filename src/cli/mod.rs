//! The command line: arguments in, text and an exit code out.
//!
//! `clap` types stay in here; each becomes a plain request once, before any work
//! starts. Only this module and `main` print.

mod args;
mod cache;
mod call;
mod doctor;
mod limits;
mod log;
mod output;
mod progress;
mod registry;
mod report;
mod request;
mod run;
mod signal;
mod store;
mod unsupported;
mod values;

use std::ffi::OsString;
use std::sync::LazyLock;

use clap::{CommandFactory as _, FromArgMatches as _};

use crate::failure::{Failure, Kind};
use args::{Cli, Command};
use request::{BuildSettings, Machine, RequestError};

pub use doctor::{DoctorCommand, doctor, doctor_inside};
pub use report::report;
pub use run::{ask, build, die_with_parent, print_version, serve};
pub use store::{StoreCommand, store};

/// What the command line asks for, validated.
#[derive(Debug)]
pub enum Invocation {
    /// `sockless build`.
    Build(Box<Build>),
    /// `sockless build --call`: a question about the Dockerfile.
    Call(Box<Build>),
    /// `sockless serve` with its configuration file.
    Serve(Option<std::path::PathBuf>),
    /// `sockless prune`, `du`, `ls`, `store`.
    Store(Box<StoreCommand>),
    /// `sockless doctor`.
    Doctor(Box<DoctorCommand>),
    /// `sockless version`.
    Version,
}

/// `sockless build`.
#[derive(Debug)]
pub struct Build {
    settings: BuildSettings,
}

impl Build {
    /// Whether this process ends with its parent.
    pub fn dies_with_parent(&self) -> bool {
        self.settings.die_with_parent
    }
}

/// The command line asks for nothing that can be run.
#[derive(Debug)]
pub enum ParseError {
    /// Help was asked for, or the arguments are not those of any command.
    Usage(clap::Error),
    /// They are, but make no valid request.
    Request(anyhow::Error),
}

impl ParseError {
    /// Prints the help or the error and returns the exit code.
    pub fn report(self) -> u8 {
        match self {
            Self::Usage(error) => {
                // There is nowhere to say that saying it failed.
                let _ = error.print();
                u8::try_from(error.exit_code()).unwrap_or(u8::MAX)
            }
            Self::Request(error) => report(&error),
        }
    }
}

/// Parses `args`, the program's name first, with `env` looking up environment variables.
///
/// Has to run before a user namespace is entered: the default of `--root` depends on
/// who the user is outside.
///
/// # Errors
/// [`ParseError`].
pub fn parse(
    args: impl IntoIterator<Item = OsString>,
    env: impl Fn(&str) -> Option<OsString>,
) -> Result<Invocation, ParseError> {
    let matches = Cli::command()
        .mut_subcommand("build", unsupported::declare)
        .try_get_matches_from(args)
        .map_err(ParseError::Usage)?;
    let refuse = |error: RequestError| {
        let hint = error.hint().map(str::to_owned);
        let message = report::message(&anyhow::Error::new(error));
        let mut failure = Failure::new(Kind::Configuration, message);
        failure.hints.extend(hint);
        ParseError::Request(failure.into())
    };
    if let Some(build) = matches.subcommand_matches("build") {
        unsupported::check(build).map_err(|flag| refuse(flag.into()))?;
    }
    let cli = Cli::from_arg_matches(&matches).map_err(ParseError::Usage)?;
    let machine = Machine {
        env,
        is_root: request::is_root(),
    };
    let of_store = |command: Result<StoreCommand, RequestError>| {
        let command = command.map_err(refuse)?;
        Ok(Invocation::Store(Box::new(command)))
    };
    match cli.command {
        Command::Prune(args) => of_store(StoreCommand::prune(args, &machine)),
        Command::Du(args) => of_store(StoreCommand::du(args, &machine)),
        Command::Ls(args) => of_store(StoreCommand::ls(args, &machine)),
        Command::Store(args) => of_store(StoreCommand::store(args, &machine)),
        Command::Build(args) => {
            let settings = BuildSettings::from_args(*args, &machine).map_err(refuse)?;
            let build = Box::new(Build { settings });
            Ok(match build.settings.call {
                Some(_) => Invocation::Call(build),
                None => Invocation::Build(build),
            })
        }
        Command::Doctor(args) => {
            let command = DoctorCommand::from_args(args, &machine).map_err(refuse)?;
            Ok(Invocation::Doctor(Box::new(command)))
        }
        Command::Serve(args) => Ok(Invocation::Serve(args.config)),
        Command::Version => Ok(Invocation::Version),
    }
}

/// The version and what this binary was built for.
static VERSION: LazyLock<String> = LazyLock::new(|| {
    let abi = if cfg!(target_env = "musl") {
        "musl"
    } else if cfg!(target_env = "gnu") {
        "gnu"
    } else {
        "other"
    };
    format!(
        "{} ({}-{}-{abi})",
        env!("CARGO_PKG_VERSION"),
        std::env::consts::ARCH,
        std::env::consts::OS
    )
});

#[cfg(test)]
mod tests {
    use super::*;

    fn try_parse(args: &str) -> Result<Invocation, ParseError> {
        let args = args.split_whitespace().map(OsString::from);
        parse(args, |name| (name == "HOME").then(|| "/home/u".into()))
    }

    #[track_caller]
    fn check_refused(args: &str, message: &str, hints: &[&str]) {
        match try_parse(args) {
            Err(ParseError::Request(error)) => {
                assert_eq!(format!("{error:#}"), message);
                assert_eq!(Failure::hints_of(&error), hints);
                assert_eq!(Failure::kind_of(&error).exit_code(), 2);
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn commands_are_told_apart() {
        assert!(matches!(
            try_parse("sockless build --die-with-parent ."),
            Ok(Invocation::Build(build)) if build.dies_with_parent()
        ));
        assert!(matches!(
            try_parse("sockless build --check ."),
            Ok(Invocation::Call(_))
        ));
        assert!(matches!(
            try_parse("sockless build --call=build ."),
            Ok(Invocation::Build(_))
        ));
        assert!(matches!(
            try_parse("sockless serve --config a.toml"),
            Ok(Invocation::Serve(Some(path))) if path == std::path::Path::new("a.toml")
        ));
        assert!(matches!(
            try_parse("sockless version"),
            Ok(Invocation::Version)
        ));
    }

    #[test]
    fn what_is_not_there_yet_is_refused_with_advice() {
        check_refused(
            "sockless build --load .",
            "--load is not supported yet",
            &[
                "there is no daemon to load into; use -o type=docker,dest=- and pipe into `docker load`",
            ],
        );
        check_refused(
            "sockless build --squash .",
            "--squash is not supported yet",
            &[],
        );
        check_refused(
            "sockless build --push .",
            "pushing needs a name: no --tag was given",
            &["name the image with --tag REGISTRY/REPOSITORY:TAG"],
        );
    }

    #[test]
    fn misspelt_arguments_are_usage_errors() {
        for (args, code) in [
            ("sockless", 2),
            ("sockless build", 2),
            ("sockless build --pussh .", 2),
            ("sockless build a b", 2),
            ("sockless build --sandbox docker .", 2),
            ("sockless --version", 0),
            ("sockless build --help", 0),
        ] {
            match try_parse(args) {
                Err(ParseError::Usage(error)) => assert_eq!(error.exit_code(), code, "{args}"),
                other => panic!("{args}: {other:?}"),
            }
        }
    }

    #[test]
    fn the_version_names_what_it_was_built_for() {
        let version = VERSION.as_str();
        assert!(
            version.starts_with(concat!(env!("CARGO_PKG_VERSION"), " (")),
            "{version}"
        );
        assert!(version.contains(std::env::consts::ARCH), "{version}");
    }
}
