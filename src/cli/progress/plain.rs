//! `--progress plain`: one line after the other, for logs of CI jobs.
//!
//! The format is BuildKit's: `#3 [2/5] RUN …`, `#3 0.512 output`, `#3 DONE 3.4s`,
//! `#3 CACHED`, `#3 ERROR: …`. Steps and tasks are numbered as they begin.

use std::collections::BTreeMap;
use std::io::Write;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::Display;
use super::text::{self, StepOutput};
use crate::progress::{BuildEvent, Progress};

/// A task says how far it is at most this often.
const TASK_INTERVAL: Duration = Duration::from_secs(5);

/// Writes lines to `W`.
pub(crate) struct Plain<W> {
    state: Mutex<State<W>>,
}

impl<W> std::fmt::Debug for Plain<W> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Plain")
    }
}

struct State<W> {
    out: W,
    /// The time since some fixed instant.
    clock: Box<dyn Fn() -> Duration + Send>,
    numbers: usize,
    steps: BTreeMap<usize, Step>,
    tasks: BTreeMap<String, Task>,
}

struct Step {
    number: usize,
    started: Duration,
    output: StepOutput,
}

struct Task {
    number: usize,
    started: Duration,
    shown: Duration,
    total_bytes: Option<u64>,
}

impl<W: Write + Send> Plain<W> {
    /// Writes to `out`.
    pub(crate) fn new(out: W) -> Self {
        let start = Instant::now();
        Self::with_clock(out, Box::new(move || start.elapsed()))
    }

    fn with_clock(out: W, clock: Box<dyn Fn() -> Duration + Send>) -> Self {
        Self {
            state: Mutex::new(State {
                out,
                clock,
                numbers: 0,
                steps: BTreeMap::new(),
                tasks: BTreeMap::new(),
            }),
        }
    }

    fn with_state(&self, change: impl FnOnce(&mut State<W>)) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut state);
        // Whoever reads the log has gone; the build goes on without.
        let _ = state.out.flush();
    }
}

impl<W: Write> State<W> {
    fn line(&mut self, line: &str) {
        let _ = writeln!(self.out, "{line}");
    }

    fn next_number(&mut self) -> usize {
        self.numbers += 1;
        self.numbers
    }

    /// Ends a step: its last line, then `result` with its number.
    fn end_step(&mut self, step: usize, result: &[String]) {
        let mut lines = Vec::new();
        let number = match self.steps.remove(&step) {
            Some(mut step) => {
                let elapsed = (self.clock)().saturating_sub(step.started).as_secs_f64();
                step.output
                    .finish(|line| lines.push(format!("{elapsed:.3} {line}")));
                step.number
            }
            None => self.next_number(),
        };
        for line in lines.iter().chain(result) {
            self.line(&format!("#{number} {line}"));
        }
    }

    fn event(&mut self, event: BuildEvent) {
        let now = (self.clock)();
        match event {
            BuildEvent::Environment { message } => {
                for line in text::clean_lines(&message) {
                    self.line(&line);
                }
            }
            BuildEvent::Warning { message } => self.message("warning: ", &message),
            BuildEvent::Planned { .. } | BuildEvent::Finished { .. } => {}
            BuildEvent::StepStarted { step, name } => {
                let number = self.next_number();
                let output = StepOutput::default();
                self.steps.insert(
                    step,
                    Step {
                        number,
                        started: now,
                        output,
                    },
                );
                self.line(&format!("#{number} {}", text::one_line(&name)));
            }
            BuildEvent::StepExplained {
                step,
                cached,
                reasons,
                ..
            } => {
                let Some(step) = self.steps.get(&step) else {
                    return;
                };
                let number = step.number;
                for line in text::explanation(cached, &reasons) {
                    self.line(&format!("#{number} {line}"));
                }
            }
            BuildEvent::StepOutput { step, stream, text } => {
                let Some(step) = self.steps.get_mut(&step) else {
                    return;
                };
                let (number, out) = (step.number, &mut self.out);
                let elapsed = now.saturating_sub(step.started).as_secs_f64();
                step.output.stream(stream).push(&text, |line| {
                    let _ = writeln!(out, "#{number} {elapsed:.3} {line}");
                });
            }
            BuildEvent::StepDone {
                step, cached: true, ..
            } => {
                self.end_step(step, &["CACHED".to_owned()]);
            }
            BuildEvent::StepDone {
                step, duration_ms, ..
            } => {
                let duration = text::seconds(Duration::from_millis(duration_ms));
                self.end_step(step, &[format!("DONE {duration}")]);
            }
            BuildEvent::StepFailed { step, message, .. } => {
                let mut lines = text::clean_lines(&message);
                if lines.is_empty() {
                    lines.push("failed".to_owned());
                }
                lines[0].insert_str(0, "ERROR: ");
                self.end_step(step, &lines);
            }
            BuildEvent::TaskStarted {
                id,
                name,
                total_bytes,
            } => {
                let number = self.next_number();
                self.tasks.insert(
                    id,
                    Task {
                        number,
                        started: now,
                        shown: now,
                        total_bytes,
                    },
                );
                self.line(&format!("#{number} {}", text::one_line(&name)));
            }
            BuildEvent::TaskProgress { id, done_bytes } => {
                let Some(task) = self.tasks.get_mut(&id) else {
                    return;
                };
                if now.saturating_sub(task.shown) < TASK_INTERVAL {
                    return;
                }
                task.shown = now;
                let line = format!(
                    "#{} {} {}",
                    task.number,
                    text::transfer(done_bytes, task.total_bytes),
                    text::seconds(now.saturating_sub(task.started))
                );
                self.line(&line);
            }
            BuildEvent::TaskDone {
                id,
                outcome,
                duration_ms,
            } => {
                let number = match self.tasks.remove(&id) {
                    Some(task) => task.number,
                    None => self.next_number(),
                };
                let duration = text::seconds(Duration::from_millis(duration_ms));
                let outcome = text::one_line(&outcome);
                let space = if outcome.is_empty() { "" } else { " " };
                self.line(&format!("#{number} DONE {duration}{space}{outcome}"));
            }
            BuildEvent::Published {
                reference,
                digest,
                uploaded_bytes,
            } => {
                self.line(&super::published(&reference, &digest, uploaded_bytes));
            }
        }
    }

    fn message(&mut self, prefix: &str, message: &str) {
        for (index, line) in text::clean_lines(message).iter().enumerate() {
            let prefix = if index == 0 { prefix } else { "" };
            self.line(&format!("{prefix}{line}"));
        }
    }
}

impl<W: Write + Send> Progress for Plain<W> {
    fn event(&self, event: BuildEvent) {
        self.with_state(|state| state.event(event));
    }
}

impl<W: Write + Send> Display for Plain<W> {
    fn log(&self, line: &str) {
        self.with_state(|state| state.line(line));
    }

    fn close(&self) {}
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::image::Digest;
    use crate::progress::Stream;

    /// Renders events that come at the given milliseconds.
    fn render(events: Vec<(u64, BuildEvent)>) -> String {
        let now = Arc::new(Mutex::new(Duration::ZERO));
        let clock = Arc::clone(&now);
        let plain = Plain::with_clock(Vec::new(), Box::new(move || *clock.lock().unwrap()));
        for (at, event) in events {
            *now.lock().unwrap() = Duration::from_millis(at);
            plain.event(event);
        }
        String::from_utf8(plain.state.into_inner().unwrap().out).unwrap()
    }

    fn output(step: usize, stream: Stream, text: &str) -> BuildEvent {
        BuildEvent::StepOutput {
            step,
            stream,
            text: text.to_owned(),
        }
    }

    fn started(step: usize, name: &str) -> BuildEvent {
        BuildEvent::StepStarted {
            step,
            name: name.to_owned(),
        }
    }

    fn done(step: usize, cached: bool, duration_ms: u64) -> BuildEvent {
        BuildEvent::StepDone {
            step,
            cached,
            duration_ms,
        }
    }

    #[test]
    fn steps_look_as_in_buildkit() {
        let text = render(vec![
            (
                0,
                BuildEvent::Environment {
                    message: "sandbox: bwrap".to_owned(),
                },
            ),
            (0, BuildEvent::Planned { steps: 3 }),
            (0, started(1, "[1/3] FROM a")),
            (0, done(1, true, 0)),
            (100, started(2, "[2/3] RUN \u{1b}[2Jmake")),
            (100, started(3, "[3/3] RUN test")),
            (612, output(2, Stream::Stdout, "one\ntw")),
            (700, output(2, Stream::Stderr, "oh\n")),
            (800, output(2, Stream::Stdout, "o\nlast")),
            (3500, done(2, false, 3400)),
            (3600, output(2, Stream::Stdout, "after its end\n")),
            (
                3700,
                BuildEvent::StepFailed {
                    step: 3,
                    duration_ms: 3600,
                    message: "exit status 2\nsecond".to_owned(),
                },
            ),
            (
                3700,
                BuildEvent::Warning {
                    message: "Dockerfile:1:1: w\n  | x".to_owned(),
                },
            ),
        ]);
        assert_eq!(
            text,
            "sandbox: bwrap\n\
             #1 [1/3] FROM a\n\
             #1 CACHED\n\
             #2 [2/3] RUN make\n\
             #3 [3/3] RUN test\n\
             #2 0.512 one\n\
             #2 0.600 oh\n\
             #2 0.700 two\n\
             #2 3.400 last\n\
             #2 DONE 3.4s\n\
             #3 ERROR: exit status 2\n\
             #3 second\n\
             warning: Dockerfile:1:1: w\n  | x\n"
        );
    }

    #[test]
    fn tasks_say_now_and_then_how_far_they_are() {
        let task = |done_bytes| BuildEvent::TaskProgress {
            id: "t".to_owned(),
            done_bytes,
        };
        let end = |outcome: &str| BuildEvent::TaskDone {
            id: "t".to_owned(),
            outcome: outcome.to_owned(),
            duration_ms: 6000,
        };
        let begin = || BuildEvent::TaskStarted {
            id: "t".to_owned(),
            name: "pulling a".to_owned(),
            total_bytes: Some(2_000_000),
        };
        let text = render(vec![
            (0, begin()),
            (1000, task(1)),
            (5000, task(1_500_000)),
            (5100, task(1_600_000)),
            (6000, end("")),
            (6000, begin()),
            (6000, end("already there")),
            (
                6000,
                BuildEvent::Published {
                    reference: "localhost:5000/a:1".to_owned(),
                    digest: Digest::of(b""),
                    uploaded_bytes: 1500,
                },
            ),
        ]);
        assert_eq!(
            text,
            format!(
                "#1 pulling a\n#1 1.50MB / 2.00MB 5.0s\n#1 DONE 6.0s\n#2 pulling a\n\
                 #2 DONE 6.0s already there\npublished localhost:5000/a:1@{} (1.50kB uploaded)\n",
                Digest::of(b"")
            )
        );
    }
}
