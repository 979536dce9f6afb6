//! [`Failure`]: what kind of failure an error is, and advice, for whoever reports it.
//!
//! Errors keep their own types; where only a report follows (`pipeline`, `cli`), a
//! `Failure` is attached as `anyhow` context. The kind decides the exit code and is
//! asked of the error, never of its text.

mod disk;

use std::error::Error;
use std::fmt;
use std::io;
use std::path::Path;

use crate::build::{NoRootfs, NotIsolated, SandboxUnavailable, Shared_, StepFailed, StepPlace};
use crate::context::{ContextError, NamedContextError};
use crate::dockerfile::DockerfileError;
use crate::layer::LayerError;
use crate::layout::LayoutError;
use crate::lint::{CheckError, LintError};
use crate::registry::RegistryError;
use crate::remote::git::{GitError, GitRefError};
use crate::remote::http::{ChecksumError, HttpError};
use crate::sandbox::SandboxError;
use crate::session::SessionError;
use crate::store::StoreError;

/// What kind of failure ended a build.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// A step's process ended with a status other than 0, or a step cannot be done: what it
    /// copies is not there, or does not go where it should.
    StepFailed,
    /// The Dockerfile is wrong, or asks for what this program does not do.
    Dockerfile,
    /// Arguments, settings, files that were named and are not there.
    Configuration,
    /// A registry or another server refused, answered nonsense or was out of reach.
    Registry,
    /// This machine offers no sandbox that was allowed.
    SandboxUnavailable,
    /// Everything else: a full disk, an error in this program.
    Internal,
}

impl Kind {
    /// The status this program exits with.
    ///
    /// 0 is success, 130 and 143 are an interrupt and a termination; 2 is what
    /// command lines are refused with everywhere, 70 is `EX_SOFTWARE` of `sysexits.h`.
    pub fn exit_code(self) -> u8 {
        match self {
            Self::StepFailed => 1,
            Self::Dockerfile | Self::Configuration => 2,
            Self::Registry => 3,
            Self::SandboxUnavailable => 4,
            Self::Internal => 70,
        }
    }
}

/// Context for an error: what was being done, what kind of failure it is, and advice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// What kind it is.
    pub kind: Kind,
    /// What was being done: a gerund with its subject, or the whole error where it has no source.
    /// Empty where there is advice alone.
    pub message: String,
    /// Advice, one sentence each.
    pub hints: Vec<String>,
}

impl Failure {
    /// A failure without advice.
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self {
            kind,
            message: message.into(),
            hints: Vec::new(),
        }
    }

    /// Adds advice.
    #[must_use]
    pub fn with_hint(mut self, hint: impl Into<String>) -> Self {
        self.hints.push(hint.into());
        self
    }

    /// The kind of `error`: that of the outermost `Failure` in it, else what its types tell.
    pub fn kind_of(error: &anyhow::Error) -> Kind {
        if let Some(failure) = error.downcast_ref::<Self>() {
            return failure.kind;
        }
        let told = error.chain().find_map(kind_of_cause);
        told.unwrap_or(if StepPlace::is_of(error) {
            Kind::StepFailed
        } else {
            Kind::Internal
        })
    }

    /// The advice that `error` and its causes give, outermost first.
    pub fn hints_of(error: &anyhow::Error) -> Vec<String> {
        let mut hints = error
            .downcast_ref::<Self>()
            .map_or_else(Vec::new, |failure| failure.hints.clone());
        hints.extend(error.chain().filter_map(hint_of_cause));
        hints
    }

    /// Adds to `error`, of a program whose store is at `store`, what there is to say of a disk that
    /// is full or read-only. Its text stays as it is.
    pub fn with_disk_advice(error: anyhow::Error, store: &Path) -> anyhow::Error {
        let Some(advice) = disk::advice(&error, store) else {
            return error;
        };
        let outermost = error.downcast_ref::<Self>();
        let hints = outermost.map_or_else(Vec::new, |failure| failure.hints.clone());
        let failure = Self {
            kind: Self::kind_of(&error),
            message: String::new(),
            hints,
        };
        error.context(failure.with_hint(advice))
    }
}

/// The end of what the failed step printed, if a step failed.
pub fn output_of_failed_step(error: &anyhow::Error) -> Option<&str> {
    let step = error
        .chain()
        .find_map(|cause| Shared_::unwrapped(cause).downcast_ref::<StepFailed>())?;
    Some(step.tail.as_str()).filter(|tail| !tail.is_empty())
}

/// What the type of one cause tells.
fn kind_of_cause(cause: &(dyn Error + 'static)) -> Option<Kind> {
    let cause = Shared_::unwrapped(cause);
    if cause.is::<SandboxUnavailable>() && has_machine_cause(cause) {
        return Some(Kind::Internal);
    }
    if cause.is::<DockerfileError>()
        || cause.is::<CheckError>()
        || cause.is::<LintError>()
        || cause.is::<ChecksumError>()
        || cause.is::<GitRefError>()
    {
        Some(Kind::Dockerfile)
    } else if cause.is::<ContextError>()
        || cause.is::<NamedContextError>()
        || cause.is::<LayoutError>()
        || cause.is::<SessionError>()
    {
        Some(Kind::Configuration)
    } else if cause.is::<StepFailed>() {
        Some(Kind::StepFailed)
    } else if cause.is::<SandboxUnavailable>()
        || cause.is::<NoRootfs>()
        || cause.is::<NotIsolated>()
        || cause.is::<SandboxError>()
    {
        Some(Kind::SandboxUnavailable)
    } else if let Some(error) = cause.downcast_ref::<HttpError>() {
        Some(match error {
            // A full disk.
            HttpError::Store { .. } => Kind::Internal,
            _ => Kind::Registry,
        })
    } else if let Some(error) = cause.downcast_ref::<GitError>() {
        Some(kind_of_git(error))
    } else if cause.is::<RegistryError>() {
        Some(Kind::Registry)
    } else if cause.is::<StoreError>() || is_of_machine(cause) {
        Some(Kind::Internal)
    } else if let Some(LayerError::Malformed { .. } | LayerError::DiffId { .. }) =
        cause.downcast_ref()
    {
        // A layer of a base image.
        Some(Kind::Registry)
    } else {
        None
    }
}

fn kind_of_git(error: &GitError) -> Kind {
    match error {
        GitError::InvalidChecksum { .. } => Kind::Dockerfile,
        GitError::Submodule { source, .. } => kind_of_git(source),
        GitError::Io { .. } => Kind::Internal,
        _ => Kind::Registry,
    }
}

/// Whether an error says what is wrong with this machine, whatever was done: a full disk.
fn is_of_machine(cause: &(dyn Error + 'static)) -> bool {
    use io::ErrorKind::{OutOfMemory, QuotaExceeded, ReadOnlyFilesystem, StorageFull};
    /// `EIO`, `ENFILE`, `EMFILE`, which have no kind.
    const NUMBERS: [i32; 3] = [5, 23, 24];
    let Some(error) = cause.downcast_ref::<io::Error>() else {
        return cause.is::<tokio::task::JoinError>();
    };
    matches!(
        error.kind(),
        OutOfMemory | QuotaExceeded | ReadOnlyFilesystem | StorageFull
    ) || error.raw_os_error().is_some_and(|n| NUMBERS.contains(&n))
}

/// Whether a cause of `error` says what is wrong with this machine.
fn has_machine_cause(error: &(dyn Error + 'static)) -> bool {
    std::iter::successors(error.source(), |&cause| cause.source()).any(is_of_machine)
}

fn hint_of_cause(cause: &(dyn Error + 'static)) -> Option<String> {
    let cause = Shared_::unwrapped(cause);
    if let Some(failed) = Shared_::unwrapped(cause).downcast_ref::<StepFailed>() {
        return failed.hint();
    }
    if let Some(NoRootfs { hint, .. }) = cause.downcast_ref() {
        return hint.clone();
    }
    if let Some(NotIsolated { hint, .. }) = cause.downcast_ref() {
        return Some(hint.clone());
    }
    if let Some(SandboxUnavailable(error)) = cause.downcast_ref() {
        return error.hint();
    }
    cause.downcast_ref::<SandboxError>()?.hint()
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Failure {}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use anyhow::{Context as _, anyhow};

    use super::*;

    #[test]
    fn the_kind_is_found_below_further_context() {
        let error = Err::<(), _>(anyhow!("401"))
            .context(Failure::new(Kind::Registry, "pulling a").with_hint("log in"))
            .context("building b")
            .unwrap_err();
        assert_eq!(Failure::kind_of(&error), Kind::Registry);
        assert_eq!(Failure::hints_of(&error), ["log in"]);
        assert_eq!(format!("{error:#}"), "building b: pulling a: 401");

        let error = anyhow::Error::new(Failure::new(Kind::StepFailed, "x")).context("y");
        assert_eq!(Failure::kind_of(&error), Kind::StepFailed);
    }

    #[test]
    fn an_error_without_failure_is_told_by_its_type() {
        let dockerfile = DockerfileError {
            name: "Dockerfile".into(),
            text: String::new(),
            problems: Vec::new(),
        };
        let error = anyhow::Error::new(dockerfile).context("reading");
        assert_eq!(Failure::kind_of(&error), Kind::Dockerfile);
        assert_eq!(Failure::kind_of(&anyhow!("x")), Kind::Internal);
        assert_eq!(Failure::hints_of(&anyhow!("x")), [] as [String; 0]);
    }

    #[test]
    fn an_error_that_came_to_several_steps_keeps_its_kind_and_advice() {
        let reason = NoRootfs {
            reason: "no subordinate IDs".into(),
            hint: Some("add some".into()),
        };
        let once = crate::build::unshare(&Arc::new(reason.into()));
        let twice = crate::build::unshare(&Arc::new(once)).context("Dockerfile:2:1");
        assert_eq!(Failure::kind_of(&twice), Kind::SandboxUnavailable);
        assert_eq!(Failure::hints_of(&twice), ["add some"]);
    }

    #[test]
    fn what_a_step_cannot_do_is_the_steps_failure_unless_it_is_somebody_elses() {
        let of_step = |error: anyhow::Error| {
            let error = error.context(StepPlace("Dockerfile:2:1".into()));
            let error = crate::build::unshare(&Arc::new(error)).context("building");
            Failure::kind_of(&error)
        };
        let os = |number| anyhow::Error::new(io::Error::from_raw_os_error(number)).context("x");
        assert_eq!(of_step(anyhow!("not found")), Kind::StepFailed);
        // ENOTDIR, ENOSPC, EMFILE
        assert_eq!(of_step(os(20)), Kind::StepFailed);
        assert_eq!(of_step(os(28)), Kind::Internal);
        assert_eq!(of_step(os(24)), Kind::Internal);
        let connection = GitError::Connection {
            remote: "https://example.org/a.git".into(),
            reason: "refused".into(),
        };
        assert_eq!(of_step(connection.into()), Kind::Registry);
        let missing = SessionError::SecretMissing { id: "a".into() };
        assert_eq!(of_step(missing.into()), Kind::Configuration);
        assert_eq!(Failure::kind_of(&os(20)), Kind::Internal);
    }

    #[test]
    fn advice_on_a_disk_changes_neither_kind_nor_text() {
        let store = Path::new("/store");
        let error = anyhow::Error::new(io::Error::from_raw_os_error(30));
        let error = error.context(Failure::new(Kind::Configuration, "x").with_hint("y"));
        let error = Failure::with_disk_advice(error, store);
        assert_eq!(Failure::kind_of(&error), Kind::Configuration);
        let hints = Failure::hints_of(&error);
        assert_eq!(hints.len(), 2, "{hints:?}");
        assert_eq!(hints[0], "y");
        assert!(hints[1].starts_with("the store /store is "), "{hints:?}");
        let other = Failure::with_disk_advice(anyhow!("z"), store);
        assert_eq!(Failure::hints_of(&other), [""; 0]);
        assert_eq!(other.chain().count(), 1);
    }

    #[test]
    fn the_output_of_a_failed_step_is_found() {
        let failed = StepFailed {
            command: "make".into(),
            status: 2,
            tail: "no rule".into(),
            foreign: None,
            limit: None,
        };
        let error = crate::build::unshare(&Arc::new(failed.into())).context("Dockerfile:2:1");
        assert_eq!(output_of_failed_step(&error), Some("no rule"));
        assert_eq!(output_of_failed_step(&anyhow!("x")), None);
    }

    #[test]
    fn every_kind_has_its_exit_code() {
        let codes = [
            Kind::StepFailed,
            Kind::Dockerfile,
            Kind::Configuration,
            Kind::Registry,
            Kind::SandboxUnavailable,
            Kind::Internal,
        ]
        .map(Kind::exit_code);
        assert_eq!(codes, [1, 2, 2, 3, 4, 70]);
    }
}
