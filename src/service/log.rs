//! What a job's log holds, and how it reads as plain text.

use serde::{Deserialize, Serialize};

use crate::progress::{BuildEvent, Stream};

/// One entry of a job's log; JSON with the tag `event`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum LogEvent {
    /// What the build says.
    Build(BuildEvent),
    /// What the service says.
    Service(ServiceEvent),
}

/// What the service itself adds to a job's log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum ServiceEvent {
    /// Something the service did or found, such as where it fetched from.
    Service {
        /// For people.
        message: String,
    },
    /// A line of the child's that is no event, such as a panic's message.
    Text {
        /// Where it was printed.
        stream: Stream,
        /// The text, without its line end. Not UTF-8 is replaced.
        text: String,
    },
    /// The log reached its limit; everything but the last events is missing from here on.
    Truncated {
        /// The limit.
        limit_bytes: u64,
    },
}

impl LogEvent {
    /// Wraps a message of the service.
    pub fn service(message: impl Into<String>) -> Self {
        Self::Service(ServiceEvent::Service {
            message: message.into(),
        })
    }

    /// Whether the log keeps it. How far a transfer has come is not worth a row;
    /// that it began and ended is.
    pub fn is_kept(&self) -> bool {
        !matches!(self, Self::Build(BuildEvent::TaskProgress { .. }))
    }

    /// Whether it is kept beyond the log's limit, because it says how the job ended.
    pub fn is_vital(&self) -> bool {
        matches!(
            self,
            Self::Build(
                BuildEvent::StepFailed { .. }
                    | BuildEvent::Published { .. }
                    | BuildEvent::Finished { .. }
            ) | Self::Service(ServiceEvent::Service { .. } | ServiceEvent::Truncated { .. })
        )
    }

    /// The entry for a terminal: whole lines, no control characters but line ends and tabs.
    /// Empty for what only a machine wants to know.
    pub fn to_text(&self) -> String {
        let text = match self {
            Self::Service(ServiceEvent::Service { message }) => format!("sockless: {message}"),
            Self::Service(ServiceEvent::Text { text, .. }) => text.clone(),
            Self::Service(ServiceEvent::Truncated { limit_bytes }) => format!(
                "sockless: the log reached its limit of {limit_bytes} bytes; what follows is incomplete"
            ),
            Self::Build(event) => build_text(event),
        };
        let mut text = without_controls(&text);
        if !text.is_empty() && !text.ends_with('\n') {
            text.push('\n');
        }
        text
    }
}

fn build_text(event: &BuildEvent) -> String {
    let seconds = |ms: &u64| format!("{}.{}s", ms / 1000, ms % 1000 / 100);
    match event {
        BuildEvent::Environment { message } => message.clone(),
        BuildEvent::Warning { message } => format!("warning: {message}"),
        BuildEvent::Planned { steps } => format!("{steps} steps"),
        BuildEvent::StepStarted { step, name } => format!("#{step} {name}"),
        BuildEvent::StepExplained {
            step,
            cached,
            reasons,
            ..
        } => {
            let what = if *cached { "cache hit" } else { "cache miss" };
            format!("#{step} {what}: {}", reasons.join("; "))
        }
        BuildEvent::StepOutput { step, text, .. } => format!("#{step} | {text}"),
        BuildEvent::StepDone {
            step, cached: true, ..
        } => format!("#{step} cached"),
        BuildEvent::StepDone {
            step, duration_ms, ..
        } => format!("#{step} done in {}", seconds(duration_ms)),
        BuildEvent::StepFailed {
            step,
            duration_ms,
            message,
        } => format!("#{step} failed after {}: {message}", seconds(duration_ms)),
        BuildEvent::TaskStarted { name, .. } => name.clone(),
        BuildEvent::TaskProgress { .. } | BuildEvent::TaskDone { .. } => String::new(),
        BuildEvent::Published {
            reference, digest, ..
        } => format!("published {reference}@{digest}"),
        BuildEvent::Finished { success: true, .. } => "the build succeeded".to_owned(),
        BuildEvent::Finished { message, .. } => format!("the build failed: {message}"),
    }
}

/// Removes terminal control sequences and escapes every other control character.
///
/// A build's output is a stranger's: shown raw it could rename the reader's window,
/// hide lines or rewrite earlier ones.
fn without_controls(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '\n' | '\t' => out.push(c),
            // A progress bar's "back to the start of the line".
            '\r' => {
                if chars.peek().is_some_and(|next| *next != '\n') {
                    out.push('\n');
                }
            }
            '\x1b' => match chars.peek() {
                // CSI: parameters, then one final byte.
                Some('[') => {
                    chars.next();
                    while let Some(c) = chars.next_if(|c| matches!(c, ' '..='~')) {
                        if matches!(c, '@'..='~') {
                            break;
                        }
                    }
                }
                // OSC: to BEL or ESC \.
                Some(']') => {
                    while let Some(c) = chars.next_if(|c| *c != '\n') {
                        if c == '\x07' || (c == '\x1b' && chars.next_if_eq(&'\\').is_some()) {
                            break;
                        }
                    }
                }
                _ => out.push_str("\\u{1b}"),
            },
            c if c.is_control() || is_bidirectional(c) => out.extend(c.escape_unicode()),
            c => out.push(c),
        }
    }
    out
}

/// Characters that reorder the text around them.
fn is_bidirectional(c: char) -> bool {
    matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_survive_their_json() {
        let output = LogEvent::Build(BuildEvent::StepOutput {
            step: 2,
            stream: Stream::Stderr,
            text: "hi\n".to_owned(),
        });
        let json = r#"{"event":"step_output","step":2,"stream":"stderr","text":"hi\n"}"#;
        assert_eq!(serde_json::to_string(&output).unwrap(), json);
        assert_eq!(serde_json::from_str::<LogEvent>(json).unwrap(), output);

        let service = LogEvent::service("fetching");
        let json = r#"{"event":"service","message":"fetching"}"#;
        assert_eq!(serde_json::to_string(&service).unwrap(), json);
        assert_eq!(serde_json::from_str::<LogEvent>(json).unwrap(), service);
    }

    #[test]
    fn security_s21_text_has_no_control_characters() {
        for (text, expected) in [
            ("a\tb\n", "a\tb\n"),
            ("\x1b[1;31mred\x1b[0m", "red"),
            ("\x1b]0;title\x07x", "x"),
            ("\x1b]0;title\x1b\\x", "x"),
            ("10%\r20%\r\n", "10%\n20%\n"),
            ("\x1bc\x08\u{9b}2J", "\\u{1b}c\\u{8}\\u{9b}2J"),
            ("\u{202e}txt", "\\u{202e}txt"),
            ("\x1b[", ""),
        ] {
            assert_eq!(without_controls(text), expected, "{text:?}");
        }
    }

    #[test]
    fn every_entry_is_whole_lines() {
        let done = |cached| {
            LogEvent::Build(BuildEvent::StepDone {
                step: 1,
                cached,
                duration_ms: 1234,
            })
        };
        assert_eq!(done(false).to_text(), "#1 done in 1.2s\n");
        assert_eq!(done(true).to_text(), "#1 cached\n");
        assert_eq!(LogEvent::service("x").to_text(), "sockless: x\n");
        let failed = LogEvent::Build(BuildEvent::Finished {
            success: false,
            message: "a\x1b[2Jb".to_owned(),
            timings_ms: Default::default(),
        });
        assert_eq!(failed.to_text(), "the build failed: ab\n");
    }
}
