//! `--ssh`: agents and keys that steps may sign with.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::ffi::OsString;
use std::io;
use std::os::unix::fs::FileTypeExt as _;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use super::agent::{self, AgentSocket, Source};
use super::keys::Key;
use super::{Lookup, SessionError};

/// The agent that is meant where no id is given.
pub const DEFAULT_SSH_ID: &str = "default";

/// The variable that names the user's agent.
const AGENT_VARIABLE: &str = "SSH_AUTH_SOCK";

/// One `--ssh` as it was written: `default`, or `ID[=SOCKET|KEY[,KEY]…][,raw=BOOLEAN]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SshSpec {
    /// What Dockerfiles call it; not empty.
    pub id: String,
    /// One agent's socket, or private keys; none means the socket in `SSH_AUTH_SOCK`.
    pub paths: Vec<PathBuf>,
    /// Steps get the socket itself, whatever it speaks: they may do all that its owner may.
    pub raw: bool,
}

impl SshSpec {
    /// Parses every `--ssh`. Empty ones are left out, as docker does.
    ///
    /// # Errors
    /// As [`SshSpec::from_str`].
    pub fn parse_all<S: AsRef<str>>(
        values: impl IntoIterator<Item = S>,
    ) -> Result<Vec<Self>, SessionError> {
        values
            .into_iter()
            .filter(|value| !value.as_ref().is_empty())
            .map(|value| value.as_ref().parse())
            .collect()
    }
}

impl FromStr for SshSpec {
    type Err = SessionError;

    /// # Errors
    /// [`SessionError::SshSpec`] if `raw` is no boolean, or goes with anything but one path,
    /// or one of several paths is empty.
    fn from_str(text: &str) -> Result<Self, SessionError> {
        let wrong = |problem: String| SessionError::SshSpec {
            spec: text.to_owned(),
            problem,
        };
        let (id, value) = match text.split_once('=') {
            Some((id, value)) => (id, Some(value)),
            None => (text, None),
        };
        let mut paths = Vec::new();
        let mut raw = false;
        for part in value.into_iter().flat_map(|value| value.split(',')) {
            if let Some(value) = part.strip_prefix("raw=") {
                raw = boolean(value)
                    .ok_or_else(|| wrong(format!("raw is true or false, not {value:?}")))?;
            } else {
                paths.push(PathBuf::from(part));
            }
        }
        if raw && paths.len() != 1 {
            return Err(wrong("raw=true goes with exactly one socket".to_owned()));
        }
        // `ID=` is `ID`.
        if let [path] = &paths[..]
            && path.as_os_str().is_empty()
        {
            paths.clear();
        }
        if paths.iter().any(|path| path.as_os_str().is_empty()) {
            return Err(wrong(
                "one of its paths is empty; write ID=SOCKET or ID=KEY,KEY".to_owned(),
            ));
        }
        Ok(Self {
            id: if id.is_empty() { DEFAULT_SSH_ID } else { id }.to_owned(),
            paths,
            raw,
        })
    }
}

/// A boolean as Go's `strconv.ParseBool` takes it, which BuildKit reads `raw` with.
fn boolean(text: &str) -> Option<bool> {
    match text {
        "1" | "t" | "T" | "TRUE" | "true" | "True" => Some(true),
        "0" | "f" | "F" | "FALSE" | "false" | "False" => Some(false),
        _ => None,
    }
}

/// The SSH agents of one build, by their id.
#[derive(Debug, Default)]
pub struct SshAgents {
    sources: BTreeMap<String, Source>,
}

impl SshAgents {
    /// Looks up what `specs` name and reads the keys. `environment` gives a variable's value.
    ///
    /// A path that is a socket is an agent's, everything else a file with a private key.
    ///
    /// # Errors
    /// [`SessionError::SshSpec`] for a second agent of the same id, for sockets beside
    /// anything else, and if `SSH_AUTH_SOCK` is needed and not set;
    /// [`SessionError::AgentFile`] and [`SessionError::Key`].
    pub fn new(
        specs: impl IntoIterator<Item = SshSpec>,
        environment: impl Fn(&str) -> Option<OsString>,
    ) -> Result<Self, SessionError> {
        let mut sources = BTreeMap::new();
        for spec in specs {
            let source = source(&spec, &environment)?;
            match sources.entry(spec.id) {
                Entry::Vacant(entry) => entry.insert(source),
                Entry::Occupied(entry) => {
                    return Err(SessionError::SshSpec {
                        spec: entry.key().clone(),
                        problem: "there are two agents of this id; give each its own".to_owned(),
                    });
                }
            };
        }
        Ok(Self { sources })
    }

    /// Whether an agent of that id was given; an empty id is [`DEFAULT_SSH_ID`].
    pub fn contains(&self, id: &str) -> bool {
        self.sources.contains_key(or_default(id))
    }

    /// Makes a socket at `path` that is agent `id` for whoever can open it, until the
    /// returned guard is dropped. An empty id is [`DEFAULT_SSH_ID`].
    ///
    /// Clients may list keys and sign; whatever would change the agent is refused. The
    /// socket has mode 0600 and this process's owner, and its directory should be one that
    /// nobody else can enter: the caller changes both to what the step needs. Nothing may be
    /// at `path` before.
    ///
    /// Must be called within a tokio runtime that has time and I/O enabled.
    ///
    /// # Errors
    /// [`SessionError::AgentMissing`] if no such agent was given, [`SessionError::AgentFile`]
    /// if the user's agent takes no connections, [`SessionError::Socket`].
    pub fn serve(&self, id: &str, path: &Path) -> Result<AgentSocket, SessionError> {
        let id = or_default(id);
        let source = self
            .sources
            .get(id)
            .ok_or_else(|| SessionError::AgentMissing { id: id.to_owned() })?;
        if let Source::Agent(socket) = source {
            agent::probe(socket).map_err(|source| SessionError::AgentFile {
                id: id.to_owned(),
                path: socket.clone(),
                doing: "connecting to the agent at",
                source,
            })?;
        }
        AgentSocket::new(id, source.clone(), path).map_err(|source| SessionError::Socket {
            id: id.to_owned(),
            path: path.to_owned(),
            source,
        })
    }
}

fn or_default(id: &str) -> &str {
    if id.is_empty() { DEFAULT_SSH_ID } else { id }
}

/// What `spec` names: a socket or keys, looked for and read.
fn source(spec: &SshSpec, environment: Lookup<'_>) -> Result<Source, SessionError> {
    let wrong = |problem: String| SessionError::SshSpec {
        spec: spec.id.clone(),
        problem,
    };
    let mut paths = spec.paths.clone();
    if paths.is_empty() {
        let socket = environment(AGENT_VARIABLE)
            .filter(|value| !value.is_empty())
            .ok_or_else(|| {
                wrong(format!(
                    "{AGENT_VARIABLE} is not set, so there is no agent; \
                     start one or write {}=SOCKET|KEY",
                    spec.id
                ))
            })?;
        paths.push(socket.into());
    }
    let mut sockets = Vec::new();
    let mut keys: Vec<Key> = Vec::new();
    for path in &paths {
        let meta = std::fs::metadata(path).map_err(|source| SessionError::AgentFile {
            id: spec.id.clone(),
            path: path.clone(),
            doing: "looking for",
            source,
        })?;
        if meta.file_type().is_socket() {
            sockets.push(path.clone());
        } else if spec.raw {
            return Err(wrong(format!(
                "raw=true needs a socket, and {} is none",
                path.display()
            )));
        } else if meta.is_dir() {
            return Err(SessionError::AgentFile {
                id: spec.id.clone(),
                path: path.clone(),
                doing: "reading",
                source: io::ErrorKind::IsADirectory.into(),
            });
        } else {
            let key = Key::read(path).map_err(|source| SessionError::Key {
                id: spec.id.clone(),
                path: path.clone(),
                source,
            })?;
            // Naming a key twice is one key, as in any agent.
            if keys.iter().all(|known| known.blob() != key.blob()) {
                keys.push(key);
            }
        }
    }
    match (sockets.pop(), keys.is_empty()) {
        (None, _) => Ok(Source::Keys(Arc::new(keys))),
        (Some(socket), true) if sockets.is_empty() => Ok(if spec.raw {
            Source::Raw(socket)
        } else {
            Source::Agent(socket)
        }),
        _ => Err(wrong(
            "an agent is one socket or any number of keys, not both".to_owned(),
        )),
    }
}
