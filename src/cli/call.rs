//! `--check` and `--call`: what is asked instead of building, and how the answer is shown.

use std::io::Write as _;
use std::sync::Arc;

use anyhow::Context as _;
use thiserror::Error;

use super::args::ProgressArg;
use super::{log, progress, report};
use crate::dockerfile::comma_fields;
use crate::failure::Failure;
use crate::lint::LintError;
use crate::pipeline::{self, BuildRequest, Question};

/// The exit code where there are violations, as `docker build --check` has it.
const VIOLATIONS: u8 = 1;

/// `--call`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct CallSettings {
    /// What is asked.
    pub question: Question,
    /// Whether the answer is for programs.
    pub json: bool,
    /// Whether violations are no failure.
    pub ignore_status: bool,
}

/// Why `--call` or `--check` is refused.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub(super) enum CallError {
    /// Something that is not there.
    #[error("--call {0:?}: expected one of \"build\", \"check\", \"outline\", \"targets\"")]
    Method(String),
    /// An option after the method.
    #[error("--call: {0:?} is not format=json, format=text or ignorestatus=BOOL")]
    Field(String),
    /// Two different things.
    #[error("--check and --call={0} exclude each other")]
    Both(String),
}

impl CallSettings {
    /// Reads the values of `--call` and `--check`; absent where a build is wanted.
    ///
    /// # Errors
    /// [`CallError`].
    pub(super) fn parse(call: Option<&str>, check: bool) -> Result<Option<Self>, CallError> {
        let call = call.unwrap_or_default();
        let field_error = |field: &str| CallError::Field(field.to_owned());
        let mut method = None;
        let mut json = false;
        let mut ignore_status = false;
        for field in comma_fields(call).map_err(|_| field_error(call))? {
            match field.split_once('=') {
                Some(("format", "json")) => json = true,
                Some(("format", "text" | "")) => json = false,
                Some(("ignorestatus", "true" | "1")) => ignore_status = true,
                Some(("ignorestatus", "false" | "0")) => ignore_status = false,
                None if method.is_none() => method = Some(field),
                _ => return Err(field_error(&field)),
            }
        }
        let method = method.unwrap_or_else(|| (if check { "check" } else { "build" }).to_owned());
        let question = match method.as_str() {
            "check" | "lint" => Question::Check,
            "outline" => Question::Outline,
            "targets" => Question::Targets,
            "build" => {
                return if check {
                    Err(CallError::Both(method))
                } else {
                    Ok(None)
                };
            }
            _ => return Err(CallError::Method(method)),
        };
        if check && question != Question::Check {
            return Err(CallError::Both(method));
        }
        Ok(Some(Self {
            question,
            json,
            ignore_status,
        }))
    }
}

/// Asks, prints the answer on standard output, and returns the exit code.
pub(super) fn run(call: CallSettings, request: &BuildRequest, progress: ProgressArg) -> u8 {
    match try_run(call, request, progress) {
        Ok(code) => code,
        Err(error) => report(&Failure::with_disk_advice(error, &request.root)),
    }
}

fn try_run(
    call: CallSettings,
    request: &BuildRequest,
    progress: ProgressArg,
) -> anyhow::Result<u8> {
    let display = progress::choose(progress, |name| std::env::var_os(name));
    log::init(
        Arc::clone(&display),
        std::env::var_os("SOCKLESS_LOG").as_deref(),
    )?;
    let answer = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("starting the async runtime")?
        .block_on(pipeline::ask(request, call.question));
    display.close();
    let answer = answer?;
    let text = if call.json {
        answer.json + "\n"
    } else {
        answer.text
    };
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())
        .and_then(|()| out.flush())
        .context("printing the answer")?;
    match answer.error {
        Some(error) if error.is::<LintError>() => {
            report(&error);
            Ok(if call.ignore_status { 0 } else { VIOLATIONS })
        }
        Some(error) => Err(error),
        None if answer.is_clean || call.ignore_status => Ok(0),
        None => Ok(VIOLATIONS),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn methods_and_formats_are_read() {
        let asked = |question, json, ignore_status| {
            Ok(Some(CallSettings {
                question,
                json,
                ignore_status,
            }))
        };
        let parse = CallSettings::parse;
        assert_eq!(parse(None, false), Ok(None));
        assert_eq!(parse(Some("build"), false), Ok(None));
        assert_eq!(parse(None, true), asked(Question::Check, false, false));
        assert_eq!(
            parse(Some("format=json"), true),
            asked(Question::Check, true, false)
        );
        assert_eq!(
            parse(Some("lint"), true),
            asked(Question::Check, false, false)
        );
        assert_eq!(
            parse(Some("check,format=json,ignorestatus=true"), false),
            asked(Question::Check, true, true)
        );
        assert_eq!(
            parse(Some("outline"), false),
            asked(Question::Outline, false, false)
        );
        assert_eq!(
            parse(Some("format=json,targets"), false),
            asked(Question::Targets, true, false)
        );
    }

    #[test]
    fn what_cannot_be_asked_is_refused() {
        for (call, check, message) in [
            (
                "chek",
                false,
                "--call \"chek\": expected one of \"build\", \"check\", \"outline\", \"targets\"",
            ),
            (
                "check,format=yaml",
                false,
                "--call: \"format=yaml\" is not format=json, format=text or ignorestatus=BOOL",
            ),
            (
                "check,outline",
                false,
                "--call: \"outline\" is not format=json, format=text or ignorestatus=BOOL",
            ),
            (
                "outline",
                true,
                "--check and --call=outline exclude each other",
            ),
            ("build", true, "--check and --call=build exclude each other"),
        ] {
            let error = CallSettings::parse(Some(call), check).unwrap_err();
            assert_eq!(error.to_string(), message);
        }
    }
}
