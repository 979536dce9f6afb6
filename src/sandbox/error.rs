//! [`SandboxError`]: why a process could not be run.

use std::fmt;
use std::io;

use super::LimitReached;

/// Why no sandbox could be had, or why one could not run a process.
///
/// A process that ran and failed is no error but an [`super::Outcome`].
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// Somebody asked for the step to be ended.
    #[error("the step was cancelled")]
    Cancelled,
    /// The step was ended by a limit, or failed because of one.
    #[error(transparent)]
    LimitReached(#[from] LimitReached),
    /// Nothing that was tried works here.
    #[error("no sandbox works here: {}", list(.0))]
    Unavailable(Vec<Refusal>),
    /// The sandbox could not be made for this process.
    #[error("{sandbox}: {refusal}")]
    Refused {
        /// Which sandbox.
        sandbox: &'static str,
        /// Why.
        refusal: Refusal,
    },
    /// Something that is to be mounted, or on which something is to be mounted, is not there.
    #[error("mounting {target} in the sandbox: {reason}")]
    Mount {
        /// Where it was to be mounted, inside.
        target: String,
        /// Why that failed.
        reason: String,
    },
    /// What was asked for this process cannot be had here.
    #[error("{doing}: {reason}")]
    Asked {
        /// What that was, such as `setting the limit nofile=1:1`.
        doing: String,
        /// Why not.
        reason: String,
    },
    /// An operation of this program itself failed.
    #[error("{doing}: {source}")]
    Io {
        /// What was being done.
        doing: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The chain of processes broke in the middle, as after an out-of-memory kill.
    #[error("{sandbox}: the sandbox ended without a word; it may have been killed")]
    Lost {
        /// Which sandbox.
        sandbox: &'static str,
    },
}

impl SandboxError {
    /// What to do about it, for people.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Unavailable(refusals) => refusals.iter().find_map(Refusal::hint),
            Self::Refused { refusal, .. } => refusal.hint(),
            _ => None,
        }
    }
}

/// Why one sandbox does not work here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The program is not there.
    NotInstalled {
        /// Its name.
        program: &'static str,
    },
    /// It has holes that later versions have not.
    TooOld {
        /// Its name.
        program: &'static str,
        /// What it says of itself.
        version: String,
        /// The first versions that would do.
        wanted: &'static str,
    },
    /// The kernel, or something that guards it, said no.
    NotPermitted {
        /// Which sandbox.
        program: &'static str,
        /// What was refused.
        message: String,
    },
    /// It is there and allowed, and yet failed.
    Failed {
        /// Which sandbox.
        program: &'static str,
        /// Its own words.
        message: String,
    },
    /// A network of its own could not be made.
    Network {
        /// Which helper, or which sandbox.
        program: &'static str,
        /// Why.
        message: String,
    },
}

impl Refusal {
    /// What to do about it, for people.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::NotInstalled { program } => Some(match *program {
                "bwrap" => "install bubblewrap (package `bubblewrap`)".to_owned(),
                "pasta" => "install pasta (package `passt`)".to_owned(),
                other => format!("install the package `{other}`"),
            }),
            Self::NotPermitted {
                program: "chroot", ..
            } => Some(
                "in a container, give it Docker's default capabilities (--cap-add=SYS_CHROOT and \
                 others; see `sockless doctor`)"
                    .to_owned(),
            ),
            Self::TooOld { .. } => Some(
                "install a newer one, or bubblewrap; where a distribution has mended an old one, \
                 --allow-old-runc has it used"
                    .to_owned(),
            ),
            Self::NotPermitted { .. } => Some(
                "in a container, allow namespaces and an unmasked /proc (Docker: --security-opt \
                 seccomp=unconfined --security-opt apparmor=unconfined --security-opt \
                 systempaths=unconfined; Kubernetes: procMount: Unmasked); on a host, see \
                 `sockless doctor`"
                    .to_owned(),
            ),
            Self::Network { .. } => Some(
                "install passt or slirp4netns and make /dev/net/tun accessible, or use \
                 --network=host"
                    .to_owned(),
            ),
            Self::Failed { .. } => None,
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotInstalled { program } => write!(f, "{program} is not installed"),
            Self::TooOld {
                program,
                version,
                wanted,
            } => write!(
                f,
                "{program} is too old: it says {version:?}, where {wanted} is needed"
            ),
            Self::NotPermitted { program, message } => {
                write!(f, "{program} is not permitted here: {message}")
            }
            Self::Failed { program, message } => write!(f, "{program} failed: {message}"),
            Self::Network { program, message } => {
                write!(f, "{program} could not make a network: {message}")
            }
        }
    }
}

fn list(refusals: &[Refusal]) -> String {
    let texts: Vec<String> = refusals.iter().map(ToString::to_string).collect();
    texts.join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_refusal_is_named() {
        let error = SandboxError::Unavailable(vec![
            Refusal::NotInstalled { program: "bwrap" },
            Refusal::NotPermitted {
                program: "runc",
                message: "mounting /proc: Operation not permitted".to_owned(),
            },
        ]);
        assert_eq!(
            error.to_string(),
            "no sandbox works here: bwrap is not installed; runc is not permitted here: mounting \
             /proc: Operation not permitted"
        );
        assert_eq!(
            error.hint().as_deref(),
            Some("install bubblewrap (package `bubblewrap`)")
        );
    }
}
