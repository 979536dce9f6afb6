//! What the user's machine lends to steps: secrets and SSH agents.
//!
//! `--secret` and `--ssh` name them; [`SecretSpec`] and [`SshSpec`] are those arguments
//! parsed, [`Secrets`] and [`SshAgents`] what they name, checked before the build starts.
//! Both keep what BuildKit's client does with the same arguments: which field wins, which
//! environment variable a name falls back to, how large a secret may be, and that a step
//! may list an agent's keys and sign with them and do nothing else.
//!
//! It does not know Dockerfiles' mounts, steps or sandboxes: the caller asks for an id and
//! gets bytes ([`Secrets::get`]) or a socket to bind ([`SshAgents::serve`]). Nothing here
//! writes a secret to a file, and no type here shows one in its `Debug`.
//!
//! Semantics: BuildKit's `session/secrets`, `session/sshforward`, `source/git` and
//! `source/http`; the agent's protocol:
//! <https://datatracker.ietf.org/doc/draft-ietf-sshm-ssh-agent/>.

mod agent;
mod auth;
mod keys;
mod protocol;
mod secrets;
mod ssh;

use std::io;
use std::path::{Path, PathBuf};

pub use agent::AgentSocket;
pub use auth::Authorization;
pub use keys::KeyError;
pub use secrets::{MAX_SECRET_BYTES, SecretBytes, SecretSpec, Secrets};
pub use ssh::{DEFAULT_SSH_ID, SshAgents, SshSpec};

use crate::dockerfile::CommaError;

/// Why `--secret` or `--ssh` cannot be understood, or what they name cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// The fields of a `--secret` are no comma-separated values.
    #[error("--secret {spec:?}")]
    SecretFields {
        /// The argument.
        spec: String,
        /// Which quote is in the wrong place.
        #[source]
        source: CommaError,
    },
    /// A `--secret` is wrong.
    #[error(
        "--secret {spec:?}: {problem}; \
         write id=ID,src=FILE or id=ID,env=VARIABLE, or id=ID for the variable or file of that name"
    )]
    SecretSpec {
        /// The argument.
        spec: String,
        /// What is wrong with it.
        problem: String,
    },
    /// An `--ssh` is wrong.
    #[error("--ssh {spec:?}: {problem}")]
    SshSpec {
        /// The argument.
        spec: String,
        /// What is wrong with it, and what is right.
        problem: String,
    },
    /// A secret's file is not there, or cannot be read.
    #[error("secret {id:?}: {doing} {}", path.display())]
    SecretFile {
        /// The secret.
        id: String,
        /// The file, as it was given.
        path: PathBuf,
        /// `looking for`, `reading`.
        doing: &'static str,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// A secret is larger than [`MAX_SECRET_BYTES`].
    #[error(
        "secret {id:?}: {origin} has more than {MAX_SECRET_BYTES} bytes, the most a secret may have"
    )]
    SecretTooLarge {
        /// The secret.
        id: String,
        /// `file …` or `variable …`.
        origin: String,
    },
    /// A secret is needed that no `--secret` gives.
    #[error(
        "secret {id:?} is needed and was not given; \
         add --secret id={id},src=FILE or --secret id={id},env=VARIABLE"
    )]
    SecretMissing {
        /// The secret.
        id: String,
    },
    /// A secret that is to authorise a fetch is no text that fits into a header.
    #[error("secret {id:?} cannot authorise a request: {problem}")]
    AuthSecret {
        /// The secret.
        id: String,
        /// What is wrong with it; nothing of its value.
        problem: &'static str,
    },
    /// An agent is needed that no `--ssh` gives.
    #[error(
        "SSH agent {id:?} is needed and was not given; add --ssh {}",
        ssh_flag(id)
    )]
    AgentMissing {
        /// The agent.
        id: String,
    },
    /// A file or socket that an `--ssh` names cannot be used.
    #[error("--ssh {id}: {doing} {}", path.display())]
    AgentFile {
        /// The agent.
        id: String,
        /// The file or socket, as it was given.
        path: PathBuf,
        /// `looking for`, `reading`, `connecting to the agent at`.
        doing: &'static str,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// A file that an `--ssh` names is no private key that can sign.
    #[error("--ssh {id}: key file {}", path.display())]
    Key {
        /// The agent.
        id: String,
        /// The file, as it was given.
        path: PathBuf,
        /// Why.
        #[source]
        source: KeyError,
    },
    /// The socket for a step cannot be made.
    #[error("making the socket {} for SSH agent {id:?}", path.display())]
    Socket {
        /// The agent.
        id: String,
        /// Where the socket was to be.
        path: PathBuf,
        /// What the system says.
        #[source]
        source: io::Error,
    },
}

/// What to write after `--ssh` to have the agent `id`.
fn ssh_flag(id: &str) -> String {
    match id {
        DEFAULT_SSH_ID => format!("{id} (the agent at SSH_AUTH_SOCK) or --ssh {id}=SOCKET|KEY"),
        _ => format!("{id}=SOCKET|KEY"),
    }
}

/// What reads from the environment: a variable's name to its value.
type Lookup<'f> = &'f dyn Fn(&str) -> Option<std::ffi::OsString>;

/// Reads at most `limit` bytes of a file into memory that is wiped when it is dropped.
/// `None` if there are more.
fn read_wiped(path: &Path, limit: usize) -> io::Result<Option<zeroize::Zeroizing<Vec<u8>>>> {
    use std::io::Read as _;

    let file = std::fs::File::open(path)?;
    // All of the room at once: growing would leave copies behind that nobody wipes.
    let mut buffer = zeroize::Zeroizing::new(Vec::with_capacity(limit + 1));
    file.take(limit as u64 + 1).read_to_end(&mut buffer)?;
    if buffer.len() > limit {
        return Ok(None);
    }
    Ok(Some(zeroize::Zeroizing::new(buffer.to_vec())))
}

#[cfg(test)]
mod testing {
    use std::error::Error;

    /// An error and its sources as a report shows them.
    pub(super) fn chain(error: &dyn Error) -> String {
        let mut text = error.to_string();
        let mut source = error.source();
        while let Some(error) = source {
            text.push_str(": ");
            text.push_str(&error.to_string());
            source = error.source();
        }
        text
    }
}
