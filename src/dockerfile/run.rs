//! `RUN`, and what its flags may say before variables are known.

use super::csv::{self, CommaField};
use super::error::quoted;
use super::split::{FlagKind, Split};
use super::statement::{Parser, command};
use super::{CommandLine, Problem, Run, Word, mount, suggest};

const RUN_FLAGS: &[(&str, FlagKind)] = &[
    ("device", FlagKind::Many),
    ("mount", FlagKind::Many),
    ("network", FlagKind::One),
    ("security", FlagKind::One),
];

impl Parser<'_> {
    /// `RUN`.
    pub(super) fn run(&mut self, split: &Split<'_>) -> Result<Run, Problem> {
        let flags = self.flags(&split.flags, "RUN", RUN_FLAGS);
        let (mounts, devices) = (flags.many("mount"), flags.many("device"));
        for mount in &mounts {
            self.problems.extend(mount_problem(mount, self.source));
        }
        for device in &devices {
            self.problems.extend(device_problem(device, self.source));
        }
        let (network, security) = (flags.one("network"), flags.one("security"));
        self.one_of("network mode", &network, &["default", "none", "host"]);
        self.one_of("security mode", &security, &["sandbox", "insecure"]);
        let command = command(split.args)?;
        if command == CommandLine::Exec(Vec::new()) {
            return Err(Problem::new(
                split.args.span(),
                "RUN requires a command: the array is empty",
            ));
        }
        Ok(Run {
            command,
            heredocs: std::mem::take(&mut self.heredocs),
            mounts,
            network,
            security,
            devices,
        })
    }

    fn one_of(&mut self, what: &str, word: &Option<Word>, allowed: &[&str]) {
        let Some(word) = word else { return };
        if allowed.contains(&word.raw.as_str()) {
            return;
        }
        let message = format!(
            "invalid {what} {}: it must be {}",
            quoted(&word.raw),
            allowed.join(" or ")
        );
        let problem = Problem::new(word.span, message);
        self.problems
            .push(match suggest::nearest(&word.raw, allowed) {
                Some(near) => problem.with_hint(format!("did you mean {near:?}?")),
                None => problem,
            });
    }
}

/// What is wrong with a `--mount` before variables are known.
fn mount_problem(mount: &Word, source: &str) -> Option<Problem> {
    let error = mount::check_mount(&mount.raw).err()?;
    Some(Problem {
        message: error.to_string(),
        hint: error.hint,
        span: mount.span_of(source, error.range),
    })
}

/// What is wrong with a `--device`; variables are not expanded in it.
fn device_problem(device: &Word, source: &str) -> Option<Problem> {
    let problem = |range, fault: String| {
        Some(Problem::new(
            device.span_of(source, range),
            format!("invalid --device: {fault}"),
        ))
    };
    let fields = match csv::placed_fields(&device.raw) {
        Ok(fields) => fields,
        Err((fault, range)) => return problem(range, fault.to_string()),
    };
    if fields.is_empty() {
        return problem(0..0, "it has no name".to_owned());
    }
    let mut named = false;
    for CommaField { text, range } in fields {
        match text.split_once('=') {
            None if text.eq_ignore_ascii_case("required") => {}
            Some((key, _)) if key.eq_ignore_ascii_case("name") && named => {
                return problem(range, format!("a second name in {}", quoted(&text)));
            }
            Some((key, value)) if key.eq_ignore_ascii_case("required") => {
                if mount::parse_bool(value).is_none() {
                    let fault = format!("invalid value {} for required", quoted(value));
                    return problem(range, fault);
                }
            }
            _ if !named => named = true,
            _ => {
                let fault = format!(
                    "unexpected field {}: name and required exist",
                    quoted(&text)
                );
                return problem(range, fault);
            }
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::super::{InstructionKind, parse_trigger};
    use super::*;

    fn parsed(text: &str) -> Result<Run, String> {
        match parse_trigger(&format!("RUN {text}")) {
            Ok(instruction) => match instruction.kind {
                InstructionKind::Run(run) => Ok(run),
                other => panic!("{other:?}"),
            },
            Err(error) => Err(error.problems[0].message.clone()),
        }
    }

    #[test]
    fn flags_are_taken() {
        let run = parsed(
            "--mount=type=tmpfs,target=/a --network=host --mount=from=a$,target=$B \
             --security=insecure --device=a/b=c,required=T --device=name=x,REQUIRED true",
        )
        .unwrap();
        let raw = |words: &[Word]| -> Vec<String> { words.iter().map(|w| w.raw.clone()).collect() };
        assert_eq!(
            raw(&run.mounts),
            ["type=tmpfs,target=/a", "from=a$,target=$B"]
        );
        assert_eq!(raw(&run.devices), ["a/b=c,required=T", "name=x,REQUIRED"]);
        assert_eq!(run.network.map(|w| w.raw).as_deref(), Some("host"));
        assert_eq!(run.security.map(|w| w.raw).as_deref(), Some("insecure"));
        assert_eq!(run.command, CommandLine::Shell("true".to_owned()));
        assert_eq!(
            parsed("").unwrap().command,
            CommandLine::Shell(String::new())
        );
    }

    #[test]
    fn wrong_ones_are_refused() {
        let check = |text: &str, expected: &str| {
            assert_eq!(parsed(text), Err(expected.to_owned()), "{text}");
        };
        check("[]", "RUN requires a command: the array is empty");
        check(
            "--network= x",
            "invalid network mode \"\": it must be default or none or host",
        );
        check(
            "--security=Sandbox x",
            "invalid security mode \"Sandbox\": it must be sandbox or insecure",
        );
        check(
            "--mount=FROM=$A,target=/x x",
            "invalid --mount: \"from\" does not support variables, got \"$A\"",
        );
        check(
            "--mount='a\"b' x",
            "invalid --mount: \"a\\\"b\" has a quote inside: quote the whole field and double \
             the quote",
        );
        check(
            "--mount= x",
            "invalid --mount: it has no fields, such as type=cache,target=/var/cache",
        );
        check("--device= x", "invalid --device: it has no name");
        check(
            "--device=a,name=b x",
            "invalid --device: a second name in \"name=b\"",
        );
        check(
            "--device=a,required=maybe x",
            "invalid --device: invalid value \"maybe\" for required",
        );
        check(
            "--device=a,b x",
            "invalid --device: unexpected field \"b\": name and required exist",
        );
    }
}
