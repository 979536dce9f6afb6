//! Flags that `docker build` and `buildx build` have and this program does not have yet.
//!
//! They are known by name, so that who brings a command line from there is told
//! what is missing instead of being asked whether it was misspelt. Nothing is ever
//! ignored: a flag is refused unless its value says "do not", as `--provenance=false`.

use clap::{Arg, ArgAction, ArgMatches, Command};

/// Whether a flag has a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Takes {
    /// `--flag VALUE` or `--flag=VALUE`.
    Value,
    /// `--flag` or `--flag=BOOL`.
    Bool,
}

/// One flag.
#[derive(Debug)]
struct Unsupported {
    long: &'static str,
    short: Option<char>,
    takes: Takes,
    hint: Option<&'static str>,
}

const fn value(long: &'static str) -> Unsupported {
    Unsupported {
        long,
        short: None,
        takes: Takes::Value,
        hint: None,
    }
}

const fn boolean(long: &'static str) -> Unsupported {
    Unsupported {
        takes: Takes::Bool,
        ..value(long)
    }
}

impl Unsupported {
    const fn short(self, short: char) -> Self {
        Self {
            short: Some(short),
            ..self
        }
    }

    const fn hint(self, hint: &'static str) -> Self {
        Self {
            hint: Some(hint),
            ..self
        }
    }
}

/// <https://docs.docker.com/reference/cli/docker/buildx/build/>
const FLAGS: &[Unsupported] = &[
    value("attest"),
    value("builder").hint("there is no daemon and no builder instance to choose; leave it out"),
    boolean("compress").hint("the context is read in place and never sent; leave it out"),
    boolean("debug")
        .short('D')
        .hint("SOCKLESS_LOG=debug logs more"),
    boolean("disable-content-trust"),
    boolean("force-rm").hint("steps leave no containers behind; leave it out"),
    value("isolation"),
    boolean("load").hint(
        "there is no daemon to load into; use -o type=docker,dest=- and pipe into `docker load`",
    ),
    value("policy"),
    value("provenance"),
    boolean("rm").hint("steps leave no containers behind; leave it out"),
    value("sbom"),
    value("security-opt"),
    boolean("squash"),
];

/// Adds the flags, hidden, to the definition of `build`.
pub(super) fn declare(build: Command) -> Command {
    build.args(FLAGS.iter().map(|flag| {
        let mut arg = Arg::new(flag.long)
            .long(flag.long)
            .hide(true)
            .action(ArgAction::Append);
        if let Some(short) = flag.short {
            arg = arg.short(short);
        }
        match flag.takes {
            Takes::Value => arg.num_args(1),
            Takes::Bool => arg
                .num_args(0..=1)
                .require_equals(true)
                .default_missing_value("true"),
        }
    }))
}

/// A flag that was given and is not supported.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("--{flag} is not supported yet")]
pub(super) struct UnsupportedFlag {
    /// Its long name, without dashes.
    pub flag: &'static str,
    /// What to do instead.
    pub hint: Option<&'static str>,
}

/// Looks whether `build` was given one of the flags.
///
/// # Errors
/// The first in the table's order, unless every value of it is `false`.
pub(super) fn check(build: &ArgMatches) -> Result<(), UnsupportedFlag> {
    for flag in FLAGS {
        let mut values = build.get_many::<String>(flag.long).into_iter().flatten();
        if values.any(|value| value != "false") {
            return Err(UnsupportedFlag {
                flag: flag.long,
                hint: flag.hint,
            });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;
    use crate::cli::args::Cli;

    fn try_flags(args: &[&str]) -> Result<(), UnsupportedFlag> {
        let matches = Cli::command()
            .mut_subcommand("build", declare)
            .try_get_matches_from([&["sockless", "build"], args, &["."]].concat())
            .unwrap();
        check(matches.subcommand_matches("build").unwrap())
    }

    #[test]
    fn the_definition_with_them_is_consistent() {
        Cli::command()
            .mut_subcommand("build", declare)
            .debug_assert();
    }

    #[test]
    fn each_is_refused_by_name() {
        for flag in FLAGS {
            let long = format!("--{}", flag.long);
            let args: &[&str] = match flag.takes {
                Takes::Value => &[&long, "x"],
                Takes::Bool => &[&long],
            };
            let expected = UnsupportedFlag {
                flag: flag.long,
                hint: flag.hint,
            };
            assert_eq!(try_flags(args), Err(expected));
        }
        assert_eq!(
            try_flags(&["-D"]).unwrap_err().to_string(),
            "--debug is not supported yet"
        );
    }

    #[test]
    fn what_asks_for_nothing_is_accepted() {
        assert_eq!(
            try_flags(&["--provenance=false", "--sbom", "false", "--load=false"]),
            Ok(())
        );
        assert_eq!(
            try_flags(&["--provenance=mode=max"]).map_err(|e| e.flag),
            Err("provenance")
        );
    }
}
