//! `--progress rawjson`: every event as one JSON object on a line of its own.

use std::io::Write;
use std::sync::{Mutex, PoisonError};

use super::Display;
use crate::progress::{BuildEvent, Progress};

/// Writes events to `W`, each flushed at once, so that a reader sees it when it happens.
#[derive(Debug)]
pub(crate) struct RawJson<W> {
    out: Mutex<W>,
}

impl<W: Write + Send> RawJson<W> {
    /// Writes to `out`.
    pub(crate) fn new(out: W) -> Self {
        Self {
            out: Mutex::new(out),
        }
    }
}

impl<W: Write + Send> Progress for RawJson<W> {
    fn event(&self, event: BuildEvent) {
        let mut line = serde_json::to_vec(&event).expect("an event has only string keys");
        line.push(b'\n');
        let mut out = self.out.lock().unwrap_or_else(PoisonError::into_inner);
        // Whoever reads the events has gone; the build goes on without.
        let _ = out.write_all(&line).and_then(|()| out.flush());
    }
}

impl<W: Write + Send> Display for RawJson<W> {
    /// A line of the log is an event too: every line of the stream stays JSON.
    fn log(&self, line: &str) {
        self.event(BuildEvent::Warning {
            message: line.to_owned(),
        });
    }

    fn close(&self) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_line_is_an_event() {
        let json = RawJson::new(Vec::new());
        json.event(BuildEvent::Planned { steps: 2 });
        json.log("logged\ntwice");
        let text = String::from_utf8(json.out.into_inner().unwrap()).unwrap();
        assert_eq!(
            text,
            "{\"event\":\"planned\",\"steps\":2}\n\
             {\"event\":\"warning\",\"message\":\"logged\\ntwice\"}\n"
        );
        let events: Vec<BuildEvent> = text
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        assert_eq!(events[0], BuildEvent::Planned { steps: 2 });
    }
}
