//! This program's own log (`tracing`), on standard error beside the progress.

use std::ffi::OsStr;
use std::io::{self, Write};
use std::sync::Arc;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;

use super::progress::Display;
use crate::failure::{Failure, Kind};

/// What is logged where `SOCKLESS_LOG` does not say.
const DEFAULT: &str = "warn";

/// The same for the service, whose log is all that it says.
const SERVICE_DEFAULT: &str = "info";

/// Sends the log through `display` from now on; `filter` is the value of `SOCKLESS_LOG`.
///
/// # Errors
/// A [`Failure`] for a filter that cannot be parsed.
pub(super) fn init(display: Arc<dyn Display>, filter: Option<&OsStr>) -> anyhow::Result<()> {
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(parse(filter)?)
        .with_ansi(false)
        .with_writer(Lines(display))
        .finish();
    // It fails only where a program that uses this as a library has its own log.
    let _ = tracing::subscriber::set_global_default(subscriber);
    Ok(())
}

/// Sends the log of the service to standard error; `filter` is the value of `SOCKLESS_LOG`.
///
/// # Errors
/// As [`init`].
pub(super) fn init_service(filter: Option<&OsStr>) -> anyhow::Result<()> {
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(parse_or(filter, SERVICE_DEFAULT)?)
        .with_ansi(false)
        .with_writer(io::stderr)
        .finish();
    let _ = tracing::subscriber::set_global_default(subscriber);
    Ok(())
}

fn parse(filter: Option<&OsStr>) -> anyhow::Result<EnvFilter> {
    parse_or(filter, DEFAULT)
}

fn parse_or(filter: Option<&OsStr>, default: &str) -> anyhow::Result<EnvFilter> {
    let filter = filter
        .filter(|f| !f.is_empty())
        .unwrap_or(OsStr::new(default));
    // What is not UTF-8 becomes a character that no filter has.
    EnvFilter::try_new(filter.to_string_lossy()).map_err(|error| {
        let failure = Failure::new(Kind::Configuration, format!("SOCKLESS_LOG is {filter:?}"))
            .with_hint("expected a level such as \"debug\", or TARGET=LEVEL separated by commas");
        anyhow::Error::new(error).context(failure)
    })
}

/// Makes a writer for each event.
struct Lines(Arc<dyn Display>);

/// Collects one event and shows it as a whole.
struct Line<'d> {
    display: &'d dyn Display,
    text: Vec<u8>,
}

impl<'w> MakeWriter<'w> for Lines {
    type Writer = Line<'w>;

    fn make_writer(&'w self) -> Line<'w> {
        Line {
            display: &*self.0,
            text: Vec::new(),
        }
    }
}

impl Write for Line<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.text.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Line<'_> {
    fn drop(&mut self) {
        let text = String::from_utf8_lossy(&self.text);
        let text = text.trim_end();
        if !text.is_empty() {
            self.display.log(text);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use crate::progress::{BuildEvent, Progress};

    #[derive(Default)]
    struct Kept(Mutex<Vec<String>>);

    impl Progress for Kept {
        fn event(&self, _: BuildEvent) {}
    }

    impl Display for Kept {
        fn log(&self, line: &str) {
            self.0.lock().unwrap().push(line.to_owned());
        }

        fn close(&self) {}
    }

    #[test]
    fn an_event_is_shown_as_a_whole() {
        let kept = Arc::new(Kept::default());
        let subscriber = tracing_subscriber::fmt()
            .with_env_filter(parse(Some(OsStr::new("info"))).unwrap())
            .with_ansi(false)
            .without_time()
            .with_target(false)
            .with_writer(Lines(Arc::clone(&kept) as Arc<dyn Display>))
            .finish();
        tracing::subscriber::with_default(subscriber, || {
            tracing::info!(step = 1, "seen");
            tracing::debug!("not seen");
        });
        assert_eq!(*kept.0.lock().unwrap(), [" INFO seen step=1"]);
    }

    #[test]
    fn a_bad_filter_is_an_error() {
        let error = parse(Some(OsStr::new("a=b=c"))).unwrap_err();
        assert_eq!(Failure::kind_of(&error), Kind::Configuration);
        assert!(parse(Some(OsStr::new(""))).is_ok());
    }
}
