//! Runs what the command line asked for and says how it went.

use std::any::Any;
use std::collections::BTreeMap;
use std::io::{self, Write as _};
use std::panic::AssertUnwindSafe;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context as _, anyhow};
use futures_util::FutureExt as _;

use super::args::ProgressArg;
use super::progress::{self, Display};
use super::report::{message, render};
use super::signal::{Ended, Signals};
use super::{Build, VERSION, log};
use crate::config::ServiceConfig;
use crate::failure::{self, Failure, Kind};
use crate::pipeline::{self, BuildRequest, BuildResult};
use crate::progress::{BuildEvent, Progress};
use crate::sandbox::{Cancel, World};

/// How long work that is in the middle of a system call may take to end after a signal.
/// What it leaves in the store's `tmp/` is removed by the next build.
const CLEAN_UP_LIMIT: Duration = Duration::from_secs(10);

/// Why there is no result.
#[derive(Debug)]
enum Stopped {
    Failed(anyhow::Error),
    Signalled(Ended),
}

impl Stopped {
    fn exit_code(&self) -> u8 {
        match self {
            Self::Failed(error) => Failure::kind_of(error).exit_code(),
            Self::Signalled(signal) => signal.exit_code(),
        }
    }

    /// On one line where it has one, for events.
    fn message(&self) -> String {
        match self {
            Self::Failed(error) => message(error),
            Self::Signalled(signal) => signal.message().to_owned(),
        }
    }

    /// With line ends, for people.
    fn render(&self) -> String {
        match self {
            Self::Failed(error) => render(error),
            Self::Signalled(signal) => format!("error: {}\n", signal.message()),
        }
    }
}

impl From<anyhow::Error> for Stopped {
    fn from(error: anyhow::Error) -> Self {
        Self::Failed(error)
    }
}

/// Runs a build and returns the exit code.
#[allow(clippy::print_stderr, reason = "this is where errors are printed")]
pub fn build(build: Build, world: World) -> u8 {
    let settings = build.settings;
    let display = progress::choose(settings.progress, |name| std::env::var_os(name));
    let watched = Arc::new(Watched {
        display: Arc::clone(&display),
        finished: AtomicBool::new(false),
    });
    let outcome =
        try_build(settings.request, world, settings.without_output, &watched).and_then(|result| {
            if settings.print_image_id {
                print_line(result.image_id.as_str()).context("printing the image ID")?;
            }
            Ok(())
        });
    watched.finish(&outcome);
    display.close();
    match outcome {
        Ok(()) => 0,
        Err(stopped) => {
            // Whoever watched has seen it.
            if settings.progress == ProgressArg::Quiet
                && let Stopped::Failed(error) = &stopped
                && let Some(output) = failure::output_of_failed_step(error)
            {
                eprintln!("{}", output.trim_end());
            }
            // There the event said it, and every line is an event.
            if settings.progress != ProgressArg::Rawjson {
                eprint!("{}", stopped.render());
            }
            stopped.exit_code()
        }
    }
}

/// Answers what `--call` asks and returns the exit code.
pub fn ask(build: Build) -> u8 {
    match build.settings.call {
        Some(call) => super::call::run(call, &build.settings.request, build.settings.progress),
        None => 0,
    }
}

fn try_build(
    request: BuildRequest,
    world: World,
    without_output: bool,
    watched: &Arc<Watched>,
) -> Result<BuildResult, Stopped> {
    log::init(
        Arc::clone(&watched.display),
        std::env::var_os("SOCKLESS_LOG").as_deref(),
    )?;
    if without_output {
        watched.event(BuildEvent::Warning {
            message: "nothing says where the image goes, so it stays in the store: \
                      push it with --push, or write it with -o type=oci,dest=FILE"
                .to_owned(),
        });
    }
    let root = request.root.clone();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(std::thread::available_parallelism().map_or(2, |n| n.get().max(2)))
        .enable_all()
        .build()
        .context("starting the async runtime")?;
    let outcome = runtime.block_on(async {
        let mut signals = Signals::catch().context("catching signals")?;
        let progress = Arc::clone(watched) as Arc<dyn Progress>;
        let cancel = Cancel::new();
        let work = pipeline::build(request, world, progress, cancel.clone());
        let mut work = std::pin::pin!(AssertUnwindSafe(work).catch_unwind());
        let outcome = match signals.run(&mut work).await {
            Ok(outcome) => outcome,
            Err(signal) => {
                cancel.cancel();
                // Steps are killed and what is unfinished is removed. Who asks twice does
                // not want to wait for that.
                tokio::select! {
                    _ = &mut work => {}
                    () = tokio::time::sleep(CLEAN_UP_LIMIT) => {}
                    again = signals.next() => std::process::exit(again.exit_code().into()),
                }
                return Err(Stopped::Signalled(signal));
            }
        };
        match outcome {
            Ok(result) => Ok(result?),
            // Whoever reads events waits for the last one, also then.
            Err(panic) => Err(Stopped::Failed(anyhow!(panic_message(&*panic)))),
        }
    });
    runtime.shutdown_timeout(CLEAN_UP_LIMIT);
    outcome.map_err(|stopped| match stopped {
        // When everything has ended, and removed what it had not finished.
        Stopped::Failed(error) => Stopped::Failed(Failure::with_disk_advice(error, &root)),
        signalled @ Stopped::Signalled(_) => signalled,
    })
}

/// What a panic says; its place was printed when it happened.
fn panic_message(panic: &(dyn Any + Send)) -> String {
    let text = panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message");
    format!("this is an error in sockless: {text}")
}

/// Runs the service with the configuration file `config`, until it is told to stop.
#[allow(clippy::print_stderr, reason = "this is where errors are printed")]
pub fn serve(config: Option<&Path>) -> u8 {
    match try_serve(config) {
        Ok(()) => 0,
        Err(error) => super::report(&error),
    }
}

fn try_serve(config: Option<&Path>) -> anyhow::Result<()> {
    let config = ServiceConfig::load(config, |name| std::env::var(name).ok()).context(
        Failure::new(Kind::Configuration, "reading the configuration"),
    )?;
    log::init_service(std::env::var_os("SOCKLESS_LOG").as_deref())?;
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("starting the async runtime")?
        .block_on(crate::service::serve(config))
}

/// Prints the version on standard output.
pub fn print_version() -> u8 {
    match print_line(&format!("sockless {}", *VERSION)) {
        Ok(()) => 0,
        Err(error) => super::report(&anyhow::Error::new(error).context("printing the version")),
    }
}

/// Has the kernel end this process when its parent ends.
///
/// The kernel forgets it where credentials change, so it is called again after a user
/// namespace was entered.
///
/// # Errors
/// A [`Failure`] around what `prctl(2)` says.
pub fn die_with_parent() -> anyhow::Result<()> {
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL)).context(
        Failure::new(Kind::Internal, "tying this process to its parent"),
    )
}

fn print_line(line: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{line}")?;
    out.flush()
}

/// Passes events on and knows whether the last one came.
struct Watched {
    display: Arc<dyn Display>,
    finished: AtomicBool,
}

impl Watched {
    /// Says that the build has ended, where it could not say so itself.
    fn finish(&self, outcome: &Result<(), Stopped>) {
        if !self.finished.load(Ordering::SeqCst) {
            self.event(BuildEvent::Finished {
                success: outcome.is_ok(),
                message: outcome
                    .as_ref()
                    .err()
                    .map(Stopped::message)
                    .unwrap_or_default(),
                timings_ms: BTreeMap::new(),
            });
        }
    }
}

impl Progress for Watched {
    fn event(&self, event: BuildEvent) {
        if matches!(event, BuildEvent::Finished { .. }) {
            self.finished.store(true, Ordering::SeqCst);
        }
        self.display.event(event);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::progress::Recorder;

    impl Display for Recorder {
        fn log(&self, _: &str) {}

        fn close(&self) {}
    }

    fn watch() -> (Arc<Recorder>, Watched) {
        let recorder = Arc::new(Recorder::default());
        let watched = Watched {
            display: Arc::clone(&recorder) as Arc<dyn Display>,
            finished: AtomicBool::new(false),
        };
        (recorder, watched)
    }

    fn finished(success: bool, message: &str) -> BuildEvent {
        BuildEvent::Finished {
            success,
            message: message.to_owned(),
            timings_ms: BTreeMap::new(),
        }
    }

    #[test]
    fn the_last_event_comes_once() {
        let (recorder, watched) = watch();
        watched.event(finished(false, "from the pipeline"));
        watched.finish(&Err(Stopped::Signalled(Ended::Interrupted)));
        assert_eq!(recorder.events(), [finished(false, "from the pipeline")]);

        let (recorder, watched) = watch();
        watched.finish(&Err(Stopped::Signalled(Ended::Interrupted)));
        assert_eq!(recorder.events(), [finished(false, "interrupted")]);

        let (recorder, watched) = watch();
        watched.finish(&Ok(()));
        assert_eq!(recorder.events(), [finished(true, "")]);
    }

    #[test]
    fn a_panic_is_an_internal_error() {
        let formatted = std::panic::catch_unwind(|| panic!("at {}", 1)).unwrap_err();
        assert_eq!(
            panic_message(&*formatted),
            "this is an error in sockless: at 1"
        );
        let fixed = std::panic::catch_unwind(|| panic!("fixed")).unwrap_err();
        assert_eq!(
            panic_message(&*fixed),
            "this is an error in sockless: fixed"
        );
        let stopped = Stopped::Failed(anyhow!(panic_message(&*fixed)));
        assert_eq!(stopped.exit_code(), 70);
    }

    #[test]
    fn a_stop_has_the_exit_code_of_its_cause() {
        let failed = Stopped::Failed(Failure::new(Kind::StepFailed, "x").into());
        assert_eq!((failed.exit_code(), &*failed.render()), (1, "error: x\n"));
        let signalled = Stopped::Signalled(Ended::Terminated);
        assert_eq!(signalled.exit_code(), 143);
        assert_eq!(signalled.render(), "error: terminated\n");
    }
}
