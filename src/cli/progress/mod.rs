//! How a build is shown: on a terminal, as lines, as JSON, not at all.
//!
//! Everything goes to standard error; standard output is for data.

mod json;
mod plain;
mod terminal;
mod text;
mod view;

use std::ffi::OsString;
use std::io::IsTerminal as _;
use std::sync::Arc;

pub(super) use json::RawJson;
pub(super) use plain::Plain;
pub(super) use terminal::Terminal;

use super::args::ProgressArg;
use crate::image::Digest;
use crate::progress::{BuildEvent, Progress};

/// A [`Progress`] that owns standard error while a build runs.
pub(super) trait Display: Progress {
    /// Shows a line of this program's own log without disturbing the rest.
    fn log(&self, line: &str);

    /// Takes what is redrawn off the screen; what follows may print.
    fn close(&self);
}

/// `--progress quiet`: nothing but the log.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Quiet;

impl Progress for Quiet {
    fn event(&self, _: BuildEvent) {}
}

impl Display for Quiet {
    #[allow(clippy::print_stderr, reason = "this is where the log goes")]
    fn log(&self, line: &str) {
        eprintln!("{line}");
    }

    fn close(&self) {}
}

/// The display that `arg` asks for on this process's standard error.
pub(super) fn choose(arg: ProgressArg, env: impl Fn(&str) -> Option<OsString>) -> Arc<dyn Display> {
    match resolve(arg, std::io::stderr().is_terminal(), &env) {
        ProgressArg::Tty => Arc::new(Terminal::new(has_colour(&env))),
        ProgressArg::Quiet => Arc::new(Quiet),
        ProgressArg::Rawjson => Arc::new(RawJson::new(std::io::stderr())),
        ProgressArg::Plain | ProgressArg::Auto => Arc::new(Plain::new(std::io::stderr())),
    }
}

/// A terminal that cannot move its cursor gets lines too.
fn resolve(
    arg: ProgressArg,
    is_terminal: bool,
    env: impl Fn(&str) -> Option<OsString>,
) -> ProgressArg {
    let dumb = env("TERM").is_none_or(|term| term.is_empty() || term == "dumb");
    match arg {
        ProgressArg::Auto if is_terminal && !dumb => ProgressArg::Tty,
        // Drawing where nothing can be drawn would show nothing at all.
        ProgressArg::Auto => ProgressArg::Plain,
        ProgressArg::Tty if !is_terminal => ProgressArg::Plain,
        other => other,
    }
}

/// <https://no-color.org>: present and not empty.
fn has_colour(env: impl Fn(&str) -> Option<OsString>) -> bool {
    env("NO_COLOR").is_none_or(|value| value.is_empty())
}

/// The line for a published image, for both kinds of text.
fn published(reference: &str, digest: &Digest, uploaded_bytes: u64) -> String {
    let reference = text::one_line(reference);
    let sent = if uploaded_bytes > 0 {
        format!(" ({} uploaded)", text::bytes(uploaded_bytes))
    } else {
        String::new()
    };
    format!("published {reference}@{digest}{sent}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn automatic_is_a_terminal_only_where_there_is_one() {
        let term = |value: &'static str| move |name: &str| (name == "TERM").then(|| value.into());
        let none = |_: &str| None;
        use ProgressArg::{Auto, Plain, Rawjson, Tty};
        assert_eq!(resolve(Auto, true, term("xterm")), Tty);
        assert_eq!(resolve(Auto, true, term("dumb")), Plain);
        assert_eq!(resolve(Auto, true, none), Plain);
        assert_eq!(resolve(Auto, false, term("xterm")), Plain);
        assert_eq!(resolve(Tty, false, term("xterm")), Plain);
        assert_eq!(resolve(Tty, true, term("dumb")), Tty);
        assert_eq!(resolve(Rawjson, true, term("xterm")), Rawjson);
    }

    #[test]
    fn no_color_counts_where_it_is_not_empty() {
        let with =
            |value: &'static str| move |name: &str| (name == "NO_COLOR").then(|| value.into());
        assert!(has_colour(|_: &str| None));
        assert!(has_colour(with("")));
        assert!(!has_colour(with("1")));
    }
}
