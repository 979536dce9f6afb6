//! `HEALTHCHECK` and its options.

use super::error::quoted;
use super::split::{FlagKind, Flags, Split};
use super::statement::{Parser, command};
use super::{CommandLine, Healthcheck, Problem, duration};

const HEALTHCHECK_FLAGS: &[(&str, FlagKind)] = &[
    ("interval", FlagKind::One),
    ("retries", FlagKind::One),
    ("start-interval", FlagKind::One),
    ("start-period", FlagKind::One),
    ("timeout", FlagKind::One),
];

/// Shorter health check durations are refused; 0 means the default.
const MIN_HEALTHCHECK_DURATION_NS: i64 = 1_000_000;

impl Parser<'_> {
    /// `HEALTHCHECK`.
    pub(super) fn healthcheck(&mut self, split: &Split<'_>) -> Result<Healthcheck, Problem> {
        let (kind, rest) = match split.args.split_once_space() {
            Some((kind, rest)) => (kind, rest),
            None => (split.args, split.args.end()),
        };
        let is = |name: &str| kind.text().eq_ignore_ascii_case(name);
        if kind.is_empty() {
            return Err(self.at_least_one("HEALTHCHECK", split));
        }
        if is("NONE") {
            // Nor does BuildKit look at flags here: `ignored` tells of them.
            return match command(rest)? {
                CommandLine::Exec(arguments) if !arguments.is_empty() => Err(Problem::new(
                    rest.span(),
                    "HEALTHCHECK NONE takes no arguments",
                )),
                CommandLine::Shell(text) if !text.is_empty() => Err(Problem::new(
                    rest.span(),
                    "HEALTHCHECK NONE takes no arguments",
                )),
                _ => Ok(Healthcheck::None),
            };
        }
        let flags = self.flags(&split.flags, "HEALTHCHECK", HEALTHCHECK_FLAGS);
        let interval = self.duration("interval", &flags);
        let timeout = self.duration("timeout", &flags);
        let start_period = self.duration("start-period", &flags);
        let start_interval = self.duration("start-interval", &flags);
        let retries = self.retries(&flags);
        if !is("CMD") {
            return Err(Problem::new(
                kind.span(),
                format!(
                    "unknown type {} in HEALTHCHECK: it must be CMD or NONE",
                    quoted(kind.text())
                ),
            ));
        }
        let command = command(rest)?;
        if matches!(&command, CommandLine::Exec(list) if list.is_empty())
            || matches!(&command, CommandLine::Shell(text) if text.is_empty())
        {
            return Err(Problem::new(
                kind.span(),
                "missing command after HEALTHCHECK CMD",
            ));
        }
        Ok(Healthcheck::Cmd {
            command,
            interval,
            timeout,
            start_period,
            start_interval,
            retries,
        })
    }

    fn duration(&mut self, name: &str, flags: &Flags) -> i64 {
        let Some(word) = flags.non_empty(name) else {
            return 0;
        };
        match duration::parse(&word.raw) {
            Some(0) => 0,
            Some(nanoseconds) if nanoseconds >= MIN_HEALTHCHECK_DURATION_NS => nanoseconds,
            Some(_) => {
                self.problems.push(Problem::new(
                    word.span,
                    format!(
                        "--{name} cannot be less than 1ms, got {}",
                        quoted(&word.raw)
                    ),
                ));
                0
            }
            None => {
                self.problems.push(Problem::new(
                    word.span,
                    format!(
                        "invalid duration {} for --{name}: numbers with units (h, m, s, ms, \
                         us, ns) are expected, such as 1m30s",
                        quoted(&word.raw)
                    ),
                ));
                0
            }
        }
    }

    fn retries(&mut self, flags: &Flags) -> i64 {
        let Some(word) = flags.non_empty("retries") else {
            return 0;
        };
        match word.raw.parse::<i32>() {
            Ok(retries) if retries >= 0 => i64::from(retries),
            _ => {
                self.problems.push(Problem::new(
                    word.span,
                    format!(
                        "invalid number {} for --retries: it must be from 0 to {}",
                        quoted(&word.raw),
                        i32::MAX
                    ),
                ));
                0
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{InstructionKind, parse_trigger};
    use super::*;

    fn parsed(text: &str) -> Result<Healthcheck, String> {
        match parse_trigger(&format!("HEALTHCHECK {text}")) {
            Ok(instruction) => match instruction.kind {
                InstructionKind::Healthcheck(healthcheck) => Ok(healthcheck),
                other => panic!("{other:?}"),
            },
            Err(error) => Err(error.problems[0].message.clone()),
        }
    }

    #[test]
    fn options_have_defaults_and_units() {
        let command = CommandLine::Shell("x  y".to_owned());
        assert_eq!(
            parsed(
                "--interval=1m --timeout=0 --start-period= --start-interval=1ms --retries=+3 cmd x  y"
            ),
            Ok(Healthcheck::Cmd {
                command,
                interval: 60_000_000_000,
                timeout: 0,
                start_period: 0,
                start_interval: 1_000_000,
                retries: 3,
            })
        );
        let Ok(Healthcheck::Cmd {
            command, retries, ..
        }) = parsed("CMD [\"x\"]")
        else {
            panic!("no command");
        };
        assert_eq!(
            (command, retries),
            (CommandLine::Exec(vec!["x".to_owned()]), 0)
        );
    }

    #[test]
    fn none_ignores_flags_but_takes_no_arguments() {
        assert_eq!(parsed("none"), Ok(Healthcheck::None));
        assert_eq!(parsed("--bogus NONE"), Ok(Healthcheck::None));
        let error = "HEALTHCHECK NONE takes no arguments".to_owned();
        assert_eq!(parsed("NONE x"), Err(error.clone()));
        assert_eq!(parsed("NONE [\"x\"]"), Err(error));
    }

    #[test]
    fn wrong_ones_are_refused() {
        let check = |text: &str, expected: &str| {
            assert_eq!(parsed(text), Err(expected.to_owned()), "{text}");
        };
        check("", "HEALTHCHECK requires at least one argument");
        check("CMD", "missing command after HEALTHCHECK CMD");
        check("CMD []", "missing command after HEALTHCHECK CMD");
        check(
            "curl x",
            "unknown type \"curl\" in HEALTHCHECK: it must be CMD or NONE",
        );
        check(
            "--interval=999us CMD x",
            "--interval cannot be less than 1ms, got \"999us\"",
        );
        check(
            "--timeout=-1s CMD x",
            "--timeout cannot be less than 1ms, got \"-1s\"",
        );
        check(
            "--retries=2147483648 CMD x",
            "invalid number \"2147483648\" for --retries: it must be from 0 to 2147483647",
        );
    }
}
