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
use crate::dockerfile::parse_bool;

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
                raw = parse_bool(value)
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

#[cfg(test)]
mod tests {
    use super::super::testing::chain;
    use super::*;

    fn agents(values: &[String], socket: Option<&Path>) -> Result<SshAgents, SessionError> {
        SshAgents::new(SshSpec::parse_all(values)?, |name| {
            assert_eq!(name, "SSH_AUTH_SOCK");
            socket.map(OsString::from)
        })
    }

    #[test]
    fn arguments_are_parsed_as_docker_does() {
        let check = |text: &str, id: &str, paths: &[&str], raw: bool| {
            let expected = SshSpec {
                id: id.into(),
                paths: paths.iter().map(PathBuf::from).collect(),
                raw,
            };
            assert_eq!(text.parse::<SshSpec>().unwrap(), expected, "{text}");
        };
        check("default", "default", &[], false);
        check("default=", "default", &[], false);
        check("=a", "default", &["a"], false);
        check("x=a", "x", &["a"], false);
        check("x=a,b=c", "x", &["a", "b=c"], false);
        check("x=a,raw=true", "x", &["a"], true);
        check("x=raw=1,a", "x", &["a"], true);
        check("x=a,raw=F", "x", &["a"], false);
        assert_eq!(SshSpec::parse_all(["", "x"]).unwrap().len(), 1);
        let wrong = |text: &str, problem: &str| {
            let error = text.parse::<SshSpec>().unwrap_err();
            assert_eq!(chain(&error), format!("--ssh {text:?}: {problem}"));
        };
        wrong("x=a,raw=yes", "raw is true or false, not \"yes\"");
        wrong("x=a,b,raw=true", "raw=true goes with exactly one socket");
        wrong("x=raw=true", "raw=true goes with exactly one socket");
        wrong(
            "x=a,,b",
            "one of its paths is empty; write ID=SOCKET or ID=KEY,KEY",
        );
    }

    #[test]
    fn agents_are_sockets_or_keys() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("socket");
        let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        let file = dir.path().join("file");
        std::fs::write(&file, "hello").unwrap();
        let (shown, file) = (socket.display(), file.display());

        let found = agents(
            &[
                "default".into(),
                format!("b={shown}"),
                format!("c={shown},raw=1"),
            ],
            Some(&socket),
        );
        assert_eq!(
            format!("{:?}", found.unwrap().sources),
            format!(
                "{{\"b\": Agent({socket:?}), \"c\": Raw({socket:?}), \"default\": Agent({socket:?})}}"
            )
        );

        let check = |value: String, problem: &str| {
            let error = agents(&[value], Some(Path::new(""))).unwrap_err();
            assert_eq!(chain(&error), problem);
        };
        check(
            "default".into(),
            "--ssh \"default\": SSH_AUTH_SOCK is not set, so there is no agent; \
             start one or write default=SOCKET|KEY",
        );
        check(
            format!("x={shown},{shown}"),
            "--ssh \"x\": an agent is one socket or any number of keys, not both",
        );
        check(
            format!("x={file},raw=true"),
            &format!("--ssh \"x\": raw=true needs a socket, and {file} is none"),
        );
        check(
            format!("x={file}.not"),
            &format!("--ssh x: looking for {file}.not: No such file or directory (os error 2)"),
        );
        check(
            format!("x={}", dir.path().display()),
            &format!("--ssh x: reading {}: is a directory", dir.path().display()),
        );
        check(
            format!("x={shown},{file}"),
            &format!(
                "--ssh x: key file {file}: \
                 it is no private key: it has no -----BEGIN … PRIVATE KEY-----"
            ),
        );
        let error = agents(&[format!("x={shown}"), format!("x={shown}")], None).unwrap_err();
        assert_eq!(
            chain(&error),
            "--ssh \"x\": there are two agents of this id; give each its own"
        );
    }

    #[test]
    fn an_agent_that_is_missing_or_dead_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let (dead, path) = (dir.path().join("dead"), dir.path().join("socket"));
        drop(std::os::unix::net::UnixListener::bind(&dead).unwrap());
        let agents = agents(&[format!("x={}", dead.display())], None).unwrap();
        assert!(agents.contains("x") && !agents.contains(""));
        let check = |id: &str, expected: String| {
            assert_eq!(chain(&agents.serve(id, &path).unwrap_err()), expected);
            assert!(!path.exists());
        };
        check(
            "",
            "SSH agent \"default\" is needed and was not given; add --ssh default \
             (the agent at SSH_AUTH_SOCK) or --ssh default=SOCKET|KEY"
                .into(),
        );
        check(
            "y",
            "SSH agent \"y\" is needed and was not given; add --ssh y=SOCKET|KEY".into(),
        );
        check(
            "x",
            format!(
                "--ssh x: connecting to the agent at {}: Connection refused (os error 111)",
                dead.display()
            ),
        );
    }
}
