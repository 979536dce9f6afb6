//! [`Recorder`]: keeps events, so that a test can look at them.

use std::sync::{Mutex, PoisonError};

use super::{BuildEvent, Progress};

/// Keeps every event in the order in which they came.
#[derive(Debug, Default)]
pub struct Recorder {
    events: Mutex<Vec<BuildEvent>>,
}

impl Recorder {
    /// All events so far.
    pub fn events(&self) -> Vec<BuildEvent> {
        self.events
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Everything that step `step` printed on both streams, joined.
    pub fn output_of(&self, step: usize) -> String {
        self.events()
            .into_iter()
            .filter_map(|event| match event {
                BuildEvent::StepOutput { step: s, text, .. } if s == step => Some(text),
                _ => None,
            })
            .collect()
    }
}

impl Progress for Recorder {
    fn event(&self, event: BuildEvent) {
        self.events
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(event);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::progress::Stream;

    #[test]
    fn events_are_kept_in_order() {
        let recorder = Recorder::default();
        for (step, text) in [(1, "a"), (2, "x"), (1, "b\n")] {
            recorder.event(BuildEvent::StepOutput {
                step,
                stream: Stream::Stdout,
                text: text.to_owned(),
            });
        }
        recorder.event(BuildEvent::Planned { steps: 2 });
        assert_eq!(recorder.output_of(1), "ab\n");
        assert_eq!(
            recorder.events().last(),
            Some(&BuildEvent::Planned { steps: 2 })
        );
    }
}
