//! What the terminal shows, as lines of text. Draws nothing and asks no clock.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use super::text::{self, StepOutput};
use crate::progress::BuildEvent;

/// How many of its last lines a running step shows, where there is room.
const TAIL_LINES: usize = 6;

/// The size of a terminal and whether it has colours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Screen {
    pub(super) columns: usize,
    pub(super) rows: usize,
    pub(super) colour: bool,
}

/// What is running, and how much has ended.
#[derive(Debug)]
pub(super) struct View {
    planned: Option<usize>,
    done: usize,
    steps: BTreeMap<usize, Step>,
    tasks: Vec<Task>,
}

#[derive(Debug)]
struct Step {
    name: String,
    started: Duration,
    output: StepOutput,
    tail: VecDeque<String>,
}

#[derive(Debug)]
struct Task {
    id: String,
    name: String,
    started: Duration,
    done_bytes: u64,
    total_bytes: Option<u64>,
}

/// How a line stands out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Look {
    Plain,
    Done,
    Warning,
    Error,
    Dim,
}

impl Look {
    /// "Select graphic rendition" parameters, BuildKit's choice of colours.
    fn sgr(self) -> Option<&'static str> {
        match self {
            Self::Plain => None,
            Self::Done => Some("34"),
            Self::Warning => Some("33"),
            Self::Error => Some("31"),
            Self::Dim => Some("2"),
        }
    }
}

impl Screen {
    /// `left` and, at the right edge, `right`; never wider than the screen.
    fn row(&self, look: Look, left: &str, right: &str) -> String {
        let right_width = console::measure_text_width(right);
        let space = usize::from(!right.is_empty());
        let room = self.columns.saturating_sub(right_width + space);
        // A tab is as wide as where it stands makes it.
        let left = left.replace('\t', "    ");
        // Where there is no room, there is none for the ellipsis either.
        let ellipsis = if room == 0 { "" } else { "…" };
        let left = console::truncate_str(&left, room, ellipsis);
        let padding = if right.is_empty() {
            0
        } else {
            room - console::measure_text_width(&left).min(room) + space
        };
        let row = format!("{left}{:padding$}{right}", "");
        match look.sgr().filter(|_| self.colour) {
            Some(sgr) => format!("\u{1b}[{sgr}m{row}\u{1b}[0m"),
            None => row,
        }
    }
}

impl View {
    pub(super) fn new() -> Self {
        Self {
            planned: None,
            done: 0,
            steps: BTreeMap::new(),
            tasks: Vec::new(),
        }
    }

    /// Takes an event that comes at `now` and returns lines that stay on the screen for good.
    pub(super) fn event(
        &mut self,
        event: BuildEvent,
        now: Duration,
        screen: &Screen,
    ) -> Vec<String> {
        let millis = |ms| text::seconds(Duration::from_millis(ms));
        match event {
            BuildEvent::Environment { message } => {
                message_rows(screen, Look::Plain, " => ", &message)
            }
            BuildEvent::Warning { message } => {
                message_rows(screen, Look::Warning, "warning: ", &message)
            }
            BuildEvent::Planned { steps } => {
                if self.planned.replace(steps).is_some() {
                    // The build begins again.
                    self.done = 0;
                    self.steps.clear();
                    self.tasks.clear();
                }
                Vec::new()
            }
            BuildEvent::StepStarted { step, name } => {
                let running = Step {
                    name: text::one_line(&name),
                    started: now,
                    output: StepOutput::default(),
                    tail: VecDeque::new(),
                };
                self.steps.insert(step, running);
                Vec::new()
            }
            BuildEvent::StepExplained {
                name,
                cached,
                reasons,
                ..
            } => {
                let mut rows =
                    vec![screen.row(Look::Plain, &format!(" => {}", text::one_line(&name)), "")];
                for line in text::explanation(cached, &reasons) {
                    rows.extend(message_rows(screen, Look::Dim, " => => ", &line));
                }
                rows
            }
            BuildEvent::StepOutput { step, stream, text } => {
                if let Some(step) = self.steps.get_mut(&step) {
                    let tail = &mut step.tail;
                    step.output.stream(stream).push(&text, |line| {
                        if tail.len() == TAIL_LINES {
                            tail.pop_front();
                        }
                        tail.push_back(line.to_owned());
                    });
                }
                Vec::new()
            }
            BuildEvent::StepDone {
                step,
                cached,
                duration_ms,
            } => {
                self.done += 1;
                let cached = if cached { "CACHED " } else { "" };
                let left = format!(" => {cached}{}", self.take_name(step));
                vec![screen.row(Look::Done, &left, &millis(duration_ms))]
            }
            BuildEvent::StepFailed {
                step,
                duration_ms,
                message,
            } => {
                let left = format!(" => ERROR {}", self.take_name(step));
                let mut rows = vec![screen.row(Look::Error, &left, &millis(duration_ms))];
                rows.extend(message_rows(screen, Look::Error, " => => ", &message));
                rows
            }
            BuildEvent::TaskStarted {
                id,
                name,
                total_bytes,
            } => {
                self.tasks.push(Task {
                    id,
                    name: text::one_line(&name),
                    started: now,
                    done_bytes: 0,
                    total_bytes,
                });
                Vec::new()
            }
            BuildEvent::TaskProgress { id, done_bytes } => {
                if let Some(task) = self.tasks.iter_mut().find(|task| task.id == id) {
                    task.done_bytes = done_bytes;
                }
                Vec::new()
            }
            BuildEvent::TaskDone {
                id,
                outcome,
                duration_ms,
            } => {
                let Some(at) = self.tasks.iter().position(|task| task.id == id) else {
                    return Vec::new();
                };
                let task = self.tasks.remove(at);
                let outcome = text::one_line(&outcome);
                let space = if outcome.is_empty() { "" } else { ": " };
                let left = format!(" => {}{space}{outcome}", task.name);
                vec![screen.row(Look::Done, &left, &millis(duration_ms))]
            }
            BuildEvent::Published {
                reference,
                digest,
                uploaded_bytes,
            } => {
                // Whole, because it is what a person copies from here.
                vec![super::published(&reference, &digest, uploaded_bytes)]
            }
            BuildEvent::Finished { .. } => {
                self.steps.clear();
                self.tasks.clear();
                Vec::new()
            }
        }
    }

    /// The lines that are redrawn: a summary, running tasks, running steps with their last output.
    pub(super) fn frame(&self, now: Duration, screen: &Screen) -> Vec<String> {
        let since = |started| text::seconds(now.saturating_sub(started));
        let count = match self.planned {
            Some(planned) => format!(" ({}/{planned})", self.done),
            None => String::new(),
        };
        let mut rows = vec![screen.row(
            Look::Plain,
            &format!("[+] building{count}"),
            &text::seconds(now),
        )];
        // One row stays free for the cursor.
        let room = screen.rows.saturating_sub(rows.len() + 1);
        let with_output = self
            .steps
            .values()
            .filter(|step| step.tail_len() > 0)
            .count();
        let heads = self.tasks.len() + self.steps.len();
        let tail_rows = room
            .saturating_sub(heads)
            .checked_div(with_output)
            .unwrap_or(0)
            .min(TAIL_LINES);
        for task in &self.tasks {
            let moved = if task.done_bytes > 0 || task.total_bytes.is_some() {
                format!("{}  ", text::transfer(task.done_bytes, task.total_bytes))
            } else {
                String::new()
            };
            let right = format!("{moved}{}", since(task.started));
            rows.push(screen.row(Look::Plain, &format!(" => {}", task.name), &right));
        }
        for step in self.steps.values() {
            let left = format!(" => {}", step.name);
            rows.push(screen.row(Look::Plain, &left, &since(step.started)));
            let lines: Vec<&str> = step
                .tail
                .iter()
                .map(String::as_str)
                .chain(step.output.current())
                .collect();
            for line in &lines[lines.len().saturating_sub(tail_rows)..] {
                rows.push(screen.row(Look::Dim, &format!(" => => # {line}"), ""));
            }
        }
        rows.truncate(room + 1);
        rows
    }

    fn take_name(&mut self, step: usize) -> String {
        self.steps
            .remove(&step)
            .map_or_else(|| format!("step {step}"), |step| step.name)
    }
}

impl Step {
    fn tail_len(&self) -> usize {
        self.tail.len() + self.output.current().count()
    }
}

fn message_rows(screen: &Screen, look: Look, prefix: &str, message: &str) -> Vec<String> {
    text::clean_lines(message)
        .iter()
        .enumerate()
        .map(|(index, line)| {
            let prefix = if index == 0 { prefix } else { "" };
            // Messages are for reading: the terminal wraps what is too long.
            let wide = Screen {
                columns: usize::MAX,
                ..*screen
            };
            wide.row(look, &format!("{prefix}{line}"), "")
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::progress::Stream;

    const SCREEN: Screen = Screen {
        columns: 30,
        rows: 24,
        colour: false,
    };

    fn ms(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    fn start(view: &mut View, step: usize, name: &str) {
        let name = name.to_owned();
        assert_eq!(
            view.event(BuildEvent::StepStarted { step, name }, ms(1000), &SCREEN),
            [] as [String; 0]
        );
    }

    fn print(view: &mut View, step: usize, text: &str) {
        let event = BuildEvent::StepOutput {
            step,
            stream: Stream::Stdout,
            text: text.to_owned(),
        };
        view.event(event, ms(1000), &SCREEN);
    }

    #[test]
    fn what_runs_is_drawn_and_what_ended_stays() {
        let mut view = View::new();
        view.event(BuildEvent::Planned { steps: 3 }, ms(0), &SCREEN);
        start(&mut view, 1, "[1/3] FROM a");
        let done = |step, cached, duration_ms| BuildEvent::StepDone {
            step,
            cached,
            duration_ms,
        };
        assert_eq!(
            view.event(done(1, true, 0), ms(1000), &SCREEN),
            [" => CACHED [1/3] FROM a   0.0s"]
        );
        start(&mut view, 2, "[2/3] RUN apt-get install everything");
        print(&mut view, 2, "\u{1b}[1mone\u{1b}[0m\ntwo\nthr");
        assert_eq!(
            view.frame(ms(4400), &SCREEN),
            [
                "[+] building (1/3)        4.4s",
                " => [2/3] RUN apt-get in… 3.4s",
                " => => # one",
                " => => # two",
                " => => # thr",
            ]
        );
        assert_eq!(
            view.event(done(2, false, 3400), ms(4400), &SCREEN),
            [" => [2/3] RUN apt-get in… 3.4s"]
        );
        start(&mut view, 3, "[3/3] RUN b");
        let failed = BuildEvent::StepFailed {
            step: 3,
            duration_ms: 100,
            message: "exit status 1".to_owned(),
        };
        assert_eq!(
            view.event(failed, ms(4500), &SCREEN),
            [" => ERROR [3/3] RUN b     0.1s", " => => exit status 1"]
        );
        assert_eq!(
            view.frame(ms(4500), &SCREEN),
            ["[+] building (2/3)        4.5s"]
        );
    }

    #[test]
    fn a_build_that_begins_again_counts_from_zero_and_draws_nothing_of_before() {
        let mut view = View::new();
        let task = BuildEvent::TaskStarted {
            id: "t".into(),
            name: "pulling a".into(),
            total_bytes: None,
        };
        view.event(task, ms(0), &SCREEN);
        view.event(BuildEvent::Planned { steps: 2 }, ms(0), &SCREEN);
        start(&mut view, 1, "[1/2] FROM a");
        let done = BuildEvent::StepDone {
            step: 1,
            cached: false,
            duration_ms: 0,
        };
        view.event(done, ms(0), &SCREEN);
        start(&mut view, 2, "[2/2] RUN b");
        assert_eq!(
            view.frame(ms(1000), &SCREEN),
            [
                "[+] building (1/2)        1.0s",
                " => pulling a             1.0s",
                " => [2/2] RUN b           0.0s",
            ]
        );
        view.event(BuildEvent::Planned { steps: 2 }, ms(1000), &SCREEN);
        assert_eq!(
            view.frame(ms(1000), &SCREEN),
            ["[+] building (0/2)        1.0s"]
        );
    }

    #[test]
    fn tasks_show_bytes_and_vanish_with_their_outcome() {
        let mut view = View::new();
        let begin = BuildEvent::TaskStarted {
            id: "t".into(),
            name: "pulling a".into(),
            total_bytes: Some(2000),
        };
        view.event(begin, ms(0), &SCREEN);
        let progress = BuildEvent::TaskProgress {
            id: "t".into(),
            done_bytes: 1500,
        };
        view.event(
            progress,
            ms(0),
            &Screen {
                columns: 50,
                ..SCREEN
            },
        );
        assert_eq!(
            view.frame(
                ms(2000),
                &Screen {
                    columns: 44,
                    ..SCREEN
                }
            )[1],
            " => pulling a          1.50kB / 2.00kB  2.0s"
        );
        let end = BuildEvent::TaskDone {
            id: "t".into(),
            outcome: "already there".into(),
            duration_ms: 2000,
        };
        assert_eq!(
            view.event(
                end,
                ms(2000),
                &Screen {
                    columns: 36,
                    ..SCREEN
                }
            ),
            [" => pulling a: already there    2.0s"]
        );
        assert_eq!(view.frame(ms(0), &SCREEN).len(), 1);
    }

    #[test]
    fn the_frame_fits_whatever_the_screen() {
        let mut view = View::new();
        for step in 1..=5 {
            start(&mut view, step, "a wide name: 漢字漢字漢字漢字漢字漢字");
            for line in 0..20 {
                print(&mut view, step, &format!("\tline {line}\n"));
            }
        }
        for (rows, drawn) in [(100, 36), (24, 21), (8, 6), (4, 3), (1, 1), (0, 1)] {
            for columns in [0, 1, 7, 40] {
                let screen = Screen {
                    columns,
                    rows,
                    colour: true,
                };
                let frame = view.frame(ms(0), &screen);
                assert_eq!(frame.len(), drawn, "{rows} rows");
                for row in frame {
                    // The time at the right edge is never cut.
                    assert!(
                        console::measure_text_width(&row) <= columns.max(5),
                        "{row:?}"
                    );
                }
            }
        }
    }

    #[test]
    fn colours_are_around_whole_lines() {
        let mut view = View::new();
        start(&mut view, 1, "x");
        let failed = BuildEvent::StepFailed {
            step: 1,
            duration_ms: 0,
            message: String::new(),
        };
        let screen = Screen {
            columns: 18,
            colour: true,
            ..SCREEN
        };
        assert_eq!(
            view.event(failed, ms(0), &screen),
            ["\u{1b}[31m => ERROR x   0.0s\u{1b}[0m"]
        );
    }
}
