//! An error → text on standard error and an exit code.

use std::fmt::Write as _;

use crate::dockerfile::DockerfileError;
use crate::failure::Failure;

/// Prints `error` and returns the exit code of its kind.
#[allow(clippy::print_stderr, reason = "this is where errors are printed")]
pub fn report(error: &anyhow::Error) -> u8 {
    eprint!("{}", render(error));
    Failure::kind_of(error).exit_code()
}

/// `error: a: b: c`, then `hint:` lines; each with its line end.
///
/// A [`DockerfileError`] shows places and excerpts, so it stands alone.
pub(super) fn render(error: &anyhow::Error) -> String {
    let mut text = String::new();
    let dockerfile = error
        .chain()
        .find_map(|cause| cause.downcast_ref::<DockerfileError>());
    // Writing to a string cannot fail.
    let _ = match dockerfile {
        Some(dockerfile) => writeln!(text, "{dockerfile}"),
        None => writeln!(text, "error: {}", message(error)),
    };
    for hint in Failure::hints_of(error) {
        let _ = writeln!(text, "hint: {hint}");
    }
    text
}

/// The error and its causes on one line where they have one line.
///
/// A cause that its parent's text already ends with is not repeated: not every
/// library leaves its source out of its own message.
pub(super) fn message(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain() {
        let cause = cause.to_string();
        if cause.is_empty() || text.ends_with(&cause) {
            continue;
        }
        if !text.is_empty() {
            text.push_str(": ");
        }
        text.push_str(&cause);
    }
    text
}

#[cfg(test)]
mod tests {
    use anyhow::anyhow;

    use super::*;
    use crate::dockerfile::{Problem, Span};
    use crate::failure::Kind;

    #[test]
    fn a_chain_is_one_line_with_hints_below() {
        let failure = Failure::new(Kind::Registry, "pushing h/a:1")
            .with_hint("log in")
            .with_hint("or not");
        let error = anyhow!("401 UNAUTHORIZED")
            .context("uploading")
            .context(failure);
        assert_eq!(
            render(&error),
            "error: pushing h/a:1: uploading: 401 UNAUTHORIZED\nhint: log in\nhint: or not\n"
        );
    }

    #[test]
    fn what_a_parent_said_is_not_said_again() {
        let error = anyhow!("refused")
            .context("connecting: refused")
            .context("pulling");
        assert_eq!(render(&error), "error: pulling: connecting: refused\n");
    }

    #[test]
    fn a_dockerfile_error_stands_alone() {
        let error = DockerfileError {
            name: "Dockerfile".into(),
            text: "FRM a\n".into(),
            problems: vec![
                Problem::new(Span { start: 0, end: 3 }, "unknown instruction \"FRM\"")
                    .with_hint("did you mean \"FROM\"?"),
            ],
        };
        assert_eq!(
            render(&anyhow::Error::new(error).context("parsing")),
            "Dockerfile:1:1: unknown instruction \"FRM\"\n   1 | FRM a\n     | ^^^\n\
             hint: did you mean \"FROM\"?\n"
        );
    }
}
