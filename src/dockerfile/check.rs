//! `# check=`: which lint rules apply, and whether their warnings fail the build.
//!
//! <https://docs.docker.com/reference/dockerfile/#check>

use std::ops::Range;

use thiserror::Error;

use super::error::quoted;
use super::{mount, suggest};

/// The options there are.
const OPTIONS: &[&str] = &["skip", "experimental", "error"];

/// What `# check=` says. The default is what holds where nothing is said.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Check {
    /// `skip=all`: no rule applies, unless it is experimental.
    pub skip_all: bool,
    /// `skip=`: names of rules that do not apply. Any names, as written.
    pub skip: Vec<String>,
    /// `experimental=all`: all experimental rules apply.
    pub experimental_all: bool,
    /// `experimental=`: names of experimental rules that apply.
    pub experimental: Vec<String>,
    /// `error=true`: a warning fails the build.
    pub error: bool,
}

/// Why check options cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{fault}")]
pub struct CheckError {
    /// What is wrong.
    pub fault: CheckFault,
    /// The bytes of the text with the faulty option.
    pub range: Range<usize>,
    /// Advice.
    pub hint: Option<String>,
}

/// What is wrong with check options.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum CheckFault {
    /// An option without `=`.
    #[error("invalid check option {}: it has no value", quoted(.0))]
    NoValue(String),
    /// An unknown option.
    #[error("invalid check option {}: skip, experimental and error exist", quoted(.0))]
    Unknown(String),
    /// The value of `error` is neither true nor false.
    #[error("invalid check option {}: error is true or false", quoted(.0))]
    NotBool(String),
}

/// Reads check options: `skip=RULE,RULE;experimental=all;error=true`, in any order. The
/// build argument `BUILDKIT_DOCKERFILE_CHECK` has the same syntax and stands above the
/// directive. Of two values of one option the later one holds; an `all` holds in any case.
///
/// # Errors
/// [`CheckError`] for the first wrong option.
pub fn parse_check(text: &str) -> Result<Check, CheckError> {
    let mut check = Check::default();
    let trimmed = text.trim();
    if trimmed.is_empty() {
        return Ok(check);
    }
    let mut start = text.len() - text.trim_start().len();
    // As in BuildKit, what is after the third option belongs to its value.
    for option in trimmed.splitn(3, ';') {
        let range = start..start + option.len();
        start = range.end + 1;
        let fail = |fault, hint| Err(CheckError { fault, range, hint });
        let near = |name: &str| {
            suggest::nearest(name, OPTIONS).map(|near| format!("did you mean {near:?}?"))
        };
        let Some((name, value)) = option.split_once('=') else {
            let known = OPTIONS.contains(&option.trim());
            let hint = if known { None } else { near(option.trim()) };
            return fail(CheckFault::NoValue(option.to_owned()), hint);
        };
        let (name, value) = (name.trim(), value.trim());
        let rules = || value.split(',').map(|rule| rule.trim().to_owned());
        match (name, value) {
            ("skip", "all") => check.skip_all = true,
            ("skip", _) => check.skip = rules().collect(),
            ("experimental", "all") => check.experimental_all = true,
            ("experimental", _) => check.experimental = rules().collect(),
            ("error", _) => match mount::parse_bool(value) {
                Some(error) => check.error = error,
                None => return fail(CheckFault::NotBool(option.to_owned()), None),
            },
            _ => return fail(CheckFault::Unknown(name.to_owned()), near(name)),
        }
    }
    Ok(check)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(list: &[&str]) -> Vec<String> {
        list.iter().map(|name| (*name).to_owned()).collect()
    }

    #[test]
    fn options_are_read() {
        let check = |text: &str, expected: Check| {
            assert_eq!(parse_check(text), Ok(expected), "{text}");
        };
        check("", Check::default());
        check(" \t", Check::default());
        check(
            "skip=all",
            Check {
                skip_all: true,
                ..Check::default()
            },
        );
        check(
            " skip = A, B ,; error = T ; experimental=X",
            Check {
                skip: names(&["A", "B", ""]),
                experimental: names(&["X"]),
                error: true,
                ..Check::default()
            },
        );
        check(
            "experimental=all;error=false",
            Check {
                experimental_all: true,
                ..Check::default()
            },
        );
        check(
            "skip=A;skip=all;skip=B;skip=C",
            Check {
                skip_all: true,
                skip: names(&["B;skip=C"]),
                ..Check::default()
            },
        );
        check(
            "skip=ALL",
            Check {
                skip: names(&["ALL"]),
                ..Check::default()
            },
        );
    }

    #[test]
    fn wrong_options_are_named() {
        let check = |text: &str, at: &str, message: &str, hint: Option<&str>| {
            let error = parse_check(text).unwrap_err();
            assert_eq!(error.to_string(), message);
            assert_eq!(&text[error.range], at);
            assert_eq!(error.hint.as_deref(), hint);
        };
        check(
            "skip",
            "skip",
            "invalid check option \"skip\": it has no value",
            None,
        );
        check(
            "skip=A;eror",
            "eror",
            "invalid check option \"eror\": it has no value",
            Some("did you mean \"error\"?"),
        );
        check(
            " skip=A;",
            "",
            "invalid check option \"\": it has no value",
            None,
        );
        check(
            " skp=all;error=true",
            "skp=all",
            "invalid check option \"skp\": skip, experimental and error exist",
            Some("did you mean \"skip\"?"),
        );
        check(
            "SKIP=all",
            "SKIP=all",
            "invalid check option \"SKIP\": skip, experimental and error exist",
            None,
        );
        check(
            "skip=A;error=yes",
            "error=yes",
            "invalid check option \"error=yes\": error is true or false",
            None,
        );
    }
}
