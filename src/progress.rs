//! [`BuildEvent`]: everything a build says while it runs, and where it goes.
//!
//! Only `cli` turns events into text for people. `--progress rawjson` writes them
//! as they are, a JSON object a line; the service reads them from its child that way.

mod recorder;

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::image::Digest;

pub use recorder::Recorder;

/// Which of a step's two output streams.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// Something that happened in a build. Step numbers count from 1 in plan order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum BuildEvent {
    /// Which sandbox and root-filesystem backend were chosen, and what they do not give.
    Environment {
        /// For people.
        message: String,
    },
    /// Something surely not meant, that does not stop the build.
    Warning {
        /// `file:line:column: …` where it has a place.
        message: String,
    },
    /// How many steps there are. Comes again where the build begins again, because a layer of
    /// an imported cache could not be had: then steps that had begun and not ended never do.
    Planned {
        /// The number of steps.
        steps: usize,
    },
    /// A step has begun (or was found in the cache: `StepDone` follows at once).
    StepStarted {
        /// The step's number.
        step: usize,
        /// Such as `[build 2/5] RUN make`.
        name: String,
    },
    /// Whether the cache has a step, and why not; only where that was asked for. Follows
    /// `StepStarted`.
    StepExplained {
        /// The step's number.
        step: usize,
        /// Its name.
        name: String,
        /// Whether the cache has it.
        cached: bool,
        /// By what it was found, or what differs from the nearest record; for people.
        reasons: Vec<String>,
    },
    /// A line or part of a line that a step printed. Not UTF-8 is replaced.
    StepOutput {
        /// The step's number.
        step: usize,
        /// Where it was printed.
        stream: Stream,
        /// The text, with its line end if it had one.
        text: String,
    },
    /// A step has ended well.
    StepDone {
        /// The step's number.
        step: usize,
        /// Whether the result came from the cache.
        cached: bool,
        /// How long it took.
        duration_ms: u64,
    },
    /// A step has failed; the build's error follows as its result.
    StepFailed {
        /// The step's number.
        step: usize,
        /// How long it took.
        duration_ms: u64,
        /// For people.
        message: String,
    },
    /// Work that is no step has begun, such as pulling a layer; ends with `TaskDone`.
    TaskStarted {
        /// Names the task among those running.
        id: String,
        /// Such as `pulling docker.io/library/ubuntu:latest`.
        name: String,
        /// Bytes there are to move, where known.
        total_bytes: Option<u64>,
    },
    /// How far a task is.
    TaskProgress {
        /// The task.
        id: String,
        /// Bytes moved so far.
        done_bytes: u64,
    },
    /// A task has ended well.
    TaskDone {
        /// The task.
        id: String,
        /// What came of it, such as `already there`; may be empty.
        outcome: String,
        /// How long it took.
        duration_ms: u64,
    },
    /// An image is where it was wanted.
    Published {
        /// `REGISTRY/REPOSITORY:TAG`, or a file.
        reference: String,
        /// The manifest's digest.
        digest: Digest,
        /// Layer and config bytes that were sent for it.
        uploaded_bytes: u64,
    },
    /// The build has ended; the last event.
    Finished {
        /// Whether it ended well.
        success: bool,
        /// The error and its causes, or empty.
        message: String,
        /// The summed times by kind of work, in milliseconds, for measurements.
        timings_ms: std::collections::BTreeMap<String, u64>,
    },
}

/// Takes events. Implementations: terminal, plain text, JSON lines, a recorder, nothing.
pub trait Progress: Send + Sync {
    /// Takes one event; must not block for long.
    fn event(&self, event: BuildEvent);
}

/// Takes events and forgets them.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoProgress;

impl Progress for NoProgress {
    fn event(&self, _: BuildEvent) {}
}

/// Whole milliseconds, for events.
pub fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
