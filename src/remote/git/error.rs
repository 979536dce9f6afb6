//! [`GitError`]: why a repository could not be fetched.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use thiserror::Error;

/// Text of a server that is shown, in characters.
const SHOWN_CHARS: usize = 400;

/// Why a repository could not be fetched. Messages hold no credentials.
#[derive(Debug, Error)]
pub enum GitError {
    /// A remote that this program does not fetch from.
    #[error("{remote}: {reason}")]
    Remote {
        /// The remote, without credentials.
        remote: String,
        /// What is wrong with it, and what to do.
        reason: String,
    },
    /// No answer, or half of one.
    #[error("{remote}: {reason}")]
    Connection {
        /// The remote, without credentials.
        remote: String,
        /// What happened.
        reason: String,
    },
    /// The server does not let us in.
    #[error(
        "{remote}: {status}; for a private repository give a token as the secret \
         GIT_AUTH_TOKEN or GIT_AUTH_TOKEN.{host}, or a whole Authorization header as \
         GIT_AUTH_HEADER or GIT_AUTH_HEADER.{host}{}",
        if *shown { " (one was sent, and the server does not accept it)" } else { "" }
    )]
    Authentication {
        /// The remote, without credentials.
        remote: String,
        /// Status of the answer.
        status: String,
        /// The remote's host.
        host: String,
        /// Whether credentials were sent.
        shown: bool,
    },
    /// An answer with an unwanted status.
    #[error("{remote}: the server answered {status}{hint}")]
    Status {
        /// The remote, without credentials.
        remote: String,
        /// The status.
        status: u16,
        /// What it may mean, with its separator.
        hint: &'static str,
    },
    /// A redirect that is not followed.
    #[error("{remote}: the server redirects to {location}, which is not followed: {reason}")]
    Redirect {
        /// The remote, without credentials.
        remote: String,
        /// Where to, without credentials.
        location: String,
        /// Why not.
        reason: &'static str,
    },
    /// The answer is not git's smart protocol.
    #[error("{remote}: {reason}")]
    Protocol {
        /// The remote, without credentials.
        remote: String,
        /// What was wrong.
        reason: String,
    },
    /// The server says that it cannot do it.
    #[error("{remote}: the server says: {message}")]
    Server {
        /// The remote, without credentials.
        remote: String,
        /// What it says.
        message: String,
    },
    /// No branch, tag or other reference of that name.
    #[error("{remote} does not contain ref {reference:?}{hint}")]
    UnknownRef {
        /// The remote, without credentials.
        remote: String,
        /// What was asked for.
        reference: String,
        /// Names that are near, or other advice, with its separator.
        hint: String,
    },
    /// There is no such commit, or the server does not give it.
    #[error(
        "{remote} does not give commit {commit}: it is in no branch and no tag, or does not exist"
    )]
    UnknownCommit {
        /// The remote, without credentials.
        remote: String,
        /// Its hash.
        commit: String,
    },
    /// `HEAD` names no branch.
    #[error(
        "could not find default branch for repository {remote}: it is empty, or its HEAD is \
         on no branch; name a branch or tag after #"
    )]
    NoDefaultBranch {
        /// The remote, without credentials.
        remote: String,
    },
    /// A checksum that is none.
    #[error(
        "invalid checksum {checksum:?} for Git URL, expected hex commit hash{}",
        if *whole { " in full, because fetch-by-commit asks for it alone" } else { "" }
    )]
    InvalidChecksum {
        /// What was given.
        checksum: String,
        /// Whether nothing less than a whole hash will do.
        whole: bool,
    },
    /// Another commit than the wanted one.
    #[error("{remote}: expected checksum to match {want}, got {got}")]
    Checksum {
        /// The remote, without credentials.
        remote: String,
        /// The checksum or its beginning.
        want: String,
        /// The hash of the commit, or those of the annotated tag and its commit.
        got: String,
    },
    /// Something is larger than this program was told to take.
    #[error("{remote}: {what} is over the limit of {limit}")]
    Limit {
        /// The remote, without credentials.
        remote: String,
        /// What is.
        what: String,
        /// How much is taken, with its unit.
        limit: String,
    },
    /// An object that is missing or damaged.
    #[error("{remote}: {object}: {reason}")]
    Object {
        /// The remote, without credentials.
        remote: String,
        /// The object's hash, or that of the pack.
        object: String,
        /// What is wrong.
        reason: String,
    },
    /// A path in the repository that is not written.
    #[error("{remote}: {path:?} in the repository: {reason}")]
    Path {
        /// The remote, without credentials.
        remote: String,
        /// The path.
        path: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The wanted subdirectory is none.
    #[error("{remote}: git subpath {subdir:?}: {reason}")]
    Subdir {
        /// The remote, without credentials.
        remote: String,
        /// The subdirectory.
        subdir: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A submodule could not be fetched.
    #[error("submodule {path:?} of {remote}")]
    Submodule {
        /// The remote of what contains it, without credentials.
        remote: String,
        /// Its path.
        path: String,
        /// Why.
        #[source]
        source: Box<GitError>,
    },
    /// A file or directory of this machine.
    #[error("{doing} {}", path.display())]
    Io {
        /// A gerund.
        doing: &'static str,
        /// The path.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The caller does not want it any more.
    #[error("fetching from git was cancelled")]
    Cancelled,
    /// It took too long.
    #[error("{remote}: not done after {limit:?}")]
    Timeout {
        /// The remote, without credentials.
        remote: String,
        /// The time limit.
        limit: Duration,
    },
}

impl GitError {
    /// Whether trying again may help.
    pub fn is_temporary(&self) -> bool {
        match self {
            Self::Connection { .. } => true,
            Self::Status { status, .. } => matches!(status, 408 | 425 | 429 | 500..=599),
            Self::Submodule { source, .. } => source.is_temporary(),
            _ => false,
        }
    }
}

/// A server's text for people: in one line, without control characters, and not endless.
pub(super) fn shown(text: &[u8]) -> String {
    let text = String::from_utf8_lossy(text);
    let mut out: String = text
        .trim()
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .take(SHOWN_CHARS)
        .collect();
    if text.trim().chars().nth(SHOWN_CHARS).is_some() {
        out.push('…');
    }
    out
}
