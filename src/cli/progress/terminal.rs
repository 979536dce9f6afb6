//! `--progress tty`: running steps are redrawn in place, finished ones scroll up.

use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::Display;
use super::view::{Screen, View};
use crate::progress::{BuildEvent, Progress};

/// How often times are redrawn.
const REDRAW: Duration = Duration::from_millis(100);

/// Draws on standard error, which must be a terminal.
#[derive(Debug)]
pub(crate) struct Terminal {
    shared: Arc<Shared>,
    redraw: Mutex<Option<Redraw>>,
}

#[derive(Debug)]
struct Shared {
    view: Mutex<View>,
    bar: ProgressBar,
    started: Instant,
    colour: bool,
}

/// The thread that keeps times running; ends when `stop` is dropped.
#[derive(Debug)]
struct Redraw {
    stop: mpsc::Sender<()>,
    thread: JoinHandle<()>,
}

impl Terminal {
    /// Starts to draw.
    pub(crate) fn new(colour: bool) -> Self {
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
        bar.set_style(ProgressStyle::with_template("{msg}").expect("the template is constant"));
        let shared = Arc::new(Shared {
            view: Mutex::new(View::new()),
            bar,
            started: Instant::now(),
            colour,
        });
        let (stop, stopped) = mpsc::channel();
        let thread = thread::spawn({
            let shared = Arc::clone(&shared);
            move || {
                while stopped.recv_timeout(REDRAW) == Err(RecvTimeoutError::Timeout) {
                    shared.draw(&shared.view());
                }
            }
        });
        Self {
            shared,
            redraw: Mutex::new(Some(Redraw { stop, thread })),
        }
    }
}

impl Shared {
    fn screen(&self) -> Screen {
        let (rows, columns) = console::Term::stderr().size();
        Screen {
            columns: columns.into(),
            rows: rows.into(),
            colour: self.colour,
        }
    }

    fn draw(&self, view: &View) {
        let frame = view.frame(self.started.elapsed(), &self.screen());
        self.bar.set_message(frame.join("\n"));
    }

    fn view(&self) -> MutexGuard<'_, View> {
        self.view.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Progress for Terminal {
    fn event(&self, event: BuildEvent) {
        let shared = &self.shared;
        let mut view = shared.view();
        let rows = view.event(event, shared.started.elapsed(), &shared.screen());
        if !rows.is_empty() {
            // First, so that nothing is on the screen both as running and as ended.
            shared.draw(&view);
            shared.bar.println(rows.join("\n"));
        }
    }
}

impl Display for Terminal {
    fn log(&self, line: &str) {
        self.shared.bar.println(line);
    }

    fn close(&self) {
        let redraw = self
            .redraw
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(Redraw { stop, thread }) = redraw {
            drop(stop);
            // It only fails where drawing panicked, which was printed then.
            let _ = thread.join();
            self.shared.bar.finish_and_clear();
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        self.close();
    }
}
