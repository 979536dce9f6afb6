//! The socket that a step sees, and what is behind it: the user's agent or keys from files.
//!
//! Clients are hostile: a step may send anything. Lists of keys and signatures are all that
//! it gets, messages and connections are bounded, and nothing outlives the [`AgentSocket`].

use std::fmt;
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use tokio::net::{UnixListener, UnixStream};
use tokio::task::{JoinHandle, JoinSet};
use tokio_util::sync::CancellationToken;

use super::keys::Key;
use super::protocol::{
    EXTENSION_FAILURE, FAILURE, IDENTITIES_ANSWER, Request, SIGN_RESPONSE, identities_answer,
    read_message, request, sign_response, write_message,
};

/// How many connections one socket has at a time; more wait. Each may hold a message of
/// [`super::protocol::MAX_MESSAGE_BYTES`] and its answer.
const MAX_CONNECTIONS: usize = 64;
/// How long connecting to the user's agent may take. It is on the same machine.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// How long to wait before accepting again when the system has no room for a connection.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What is behind a socket.
#[derive(Clone)]
pub(super) enum Source {
    /// The user's agent at this socket.
    Agent(PathBuf),
    /// Any server at this socket, with nothing in between.
    Raw(PathBuf),
    /// Keys in this process.
    Keys(Arc<Vec<Key>>),
}

impl fmt::Debug for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Agent(path) => f.debug_tuple("Agent").field(path).finish(),
            Self::Raw(path) => f.debug_tuple("Raw").field(path).finish(),
            Self::Keys(keys) => write!(f, "Keys({})", keys.len()),
        }
    }
}

/// A socket that is an SSH agent. Dropping it removes the socket, refuses further
/// connections and ends those there are.
#[must_use = "the agent ends when this is dropped"]
#[derive(Debug)]
pub struct AgentSocket {
    path: PathBuf,
    listener: std::os::unix::net::UnixListener,
    cancel: CancellationToken,
    task: Option<JoinHandle<()>>,
}

impl AgentSocket {
    pub(super) fn new(id: &str, source: Source, path: &Path) -> io::Result<Self> {
        let runtime = tokio::runtime::Handle::try_current().map_err(io::Error::other)?;
        let listener = listen(path)?;
        let mut socket = Self {
            path: path.to_owned(),
            listener,
            cancel: CancellationToken::new(),
            task: None,
        };
        // From here on a failure drops `socket`, which removes the file.
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
        socket.listener.set_nonblocking(true)?;
        let listener = {
            let _runtime = runtime.enter();
            UnixListener::from_std(socket.listener.try_clone()?)?
        };
        let served = serve(id.to_owned(), source, listener, socket.cancel.clone());
        socket.task = Some(runtime.spawn(served));
        Ok(socket)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// As dropping it, and waits until the last connection has ended.
    pub async fn close(mut self) {
        let task = self.task.take();
        drop(self);
        if let Some(task) = task
            && let Err(error) = task.await
        {
            tracing::warn!(%error, "an SSH agent's socket ended badly");
        }
    }
}

impl Drop for AgentSocket {
    fn drop(&mut self) {
        self.cancel.cancel();
        // The socket may be bound into a step: without a name it could still be connected
        // to until the task has dropped it.
        let _ = rustix::net::shutdown(&self.listener, rustix::net::Shutdown::Both);
        match std::fs::remove_file(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                let path = self.path.display();
                tracing::warn!(%path, %error, "an SSH agent's socket cannot be removed");
            }
            _ => {}
        }
    }
}

/// Binds `path`, however long it is.
fn listen(path: &Path) -> io::Result<std::os::unix::net::UnixListener> {
    use rustix::fs::{CWD, Mode, OFlags};

    match std::os::unix::net::UnixListener::bind(path) {
        // An address has room for 107 bytes. A directory's descriptor makes it short.
        Err(error) if error.kind() == io::ErrorKind::InvalidInput => {
            let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
                return Err(error);
            };
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let parent = rustix::fs::openat(CWD, parent, flags, Mode::empty())?;
            let short = Path::new("/proc/self/fd").join(parent.as_raw_fd().to_string());
            std::os::unix::net::UnixListener::bind(short.join(name))
        }
        bound => bound,
    }
}

/// Whether somebody listens at `path`; does not wait.
pub(super) fn probe(path: &Path) -> io::Result<()> {
    let socket = rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        None,
    )?;
    match rustix::net::connect(&socket, &SocketAddrUnix::new(path)?) {
        // It listens and is busy.
        Err(rustix::io::Errno::AGAIN) => Ok(()),
        connected => Ok(connected?),
    }
}

/// Accepts until cancelled, then ends all connections.
async fn serve(id: String, source: Source, listener: UnixListener, cancel: CancellationToken) {
    let mut connections = JoinSet::new();
    // Signing is work: one at a time, as an agent does it, however many clients ask.
    let signing = Arc::new(tokio::sync::Semaphore::new(1));
    loop {
        tokio::select! {
            () = cancel.cancelled() => break,
            Some(ended) = connections.join_next(), if !connections.is_empty() => {
                if let Err(error) = ended {
                    tracing::warn!(ssh.id = id, %error, "a connection to an SSH agent ended badly");
                }
            }
            accepted = listener.accept(), if connections.len() < MAX_CONNECTIONS => match accepted {
                Ok((stream, _)) => {
                    let (id, source) = (id.clone(), source.clone());
                    let signing = Arc::clone(&signing);
                    connections.spawn(async move { connection(&id, source, stream, signing).await });
                }
                Err(error) => {
                    tracing::warn!(ssh.id = id, %error, "an SSH agent's socket cannot accept");
                    tokio::select! {
                        () = cancel.cancelled() => break,
                        () = tokio::time::sleep(ACCEPT_PAUSE) => {}
                    }
                }
            },
        }
    }
    drop(listener);
    connections.shutdown().await;
}

/// Serves one client until it leaves or breaks the protocol.
async fn connection(
    id: &str,
    source: Source,
    mut client: UnixStream,
    signing: Arc<tokio::sync::Semaphore>,
) {
    let ended = match source {
        Source::Keys(keys) => with_keys(keys, &mut client, signing).await,
        Source::Agent(path) => match connect(&path).await {
            Ok(agent) => with_agent(agent, &mut client).await,
            Err(error) => return unreachable_agent(id, &path, &error),
        },
        Source::Raw(path) => match connect(&path).await {
            Ok(mut server) => tokio::io::copy_bidirectional(&mut client, &mut server)
                .await
                .map(|_| ()),
            Err(error) => return unreachable_agent(id, &path, &error),
        },
    };
    if let Err(error) = ended {
        tracing::debug!(ssh.id = id, %error, "a connection to an SSH agent ended");
    }
}

fn unreachable_agent(id: &str, path: &Path, error: &io::Error) {
    let path = path.display();
    tracing::warn!(ssh.id = id, %path, %error, "the SSH agent cannot be reached");
}

async fn connect(path: &Path) -> io::Result<UnixStream> {
    tokio::time::timeout(CONNECT_TIMEOUT, UnixStream::connect(path))
        .await
        .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
}

/// Answers from keys in this process.
async fn with_keys(
    keys: Arc<Vec<Key>>,
    client: &mut UnixStream,
    signing: Arc<tokio::sync::Semaphore>,
) -> io::Result<()> {
    while let Some(message) = read_message(client).await? {
        let answer = match request(&message) {
            Request::Identities => identities_answer(keys.iter().map(Key::blob)),
            Request::Sign { .. } => {
                let keys = Arc::clone(&keys);
                let permit = Arc::clone(&signing)
                    .acquire_owned()
                    .await
                    .map_err(io::Error::other)?;
                tokio::task::spawn_blocking(move || {
                    // Held until the work is done, also if nobody waits for it any more.
                    let _permit = permit;
                    sign(&keys, &message)
                })
                .await
                .map_err(io::Error::other)?
            }
            Request::Extension | Request::Other(_) => vec![FAILURE],
        };
        write_message(client, &answer).await?;
    }
    Ok(())
}

/// The answer to a request for a signature.
fn sign(keys: &[Key], message: &[u8]) -> Vec<u8> {
    let Request::Sign { key, data, flags } = request(message) else {
        return vec![FAILURE];
    };
    let Some(key) = keys.iter().find(|known| known.blob() == key) else {
        return vec![FAILURE];
    };
    match key.sign(data, flags) {
        Ok(signature) => sign_response(&signature),
        Err(error) => {
            tracing::debug!(%error, "an SSH agent does not sign");
            vec![FAILURE]
        }
    }
}

/// Passes what is allowed on to the user's agent, and its answers back.
async fn with_agent(mut agent: UnixStream, client: &mut UnixStream) -> io::Result<()> {
    while let Some(message) = read_message(client).await? {
        let expected = match request(&message) {
            Request::Identities => IDENTITIES_ANSWER,
            Request::Sign { .. } => SIGN_RESPONSE,
            Request::Extension => {
                write_message(client, &[EXTENSION_FAILURE]).await?;
                continue;
            }
            Request::Other(_) => {
                write_message(client, &[FAILURE]).await?;
                continue;
            }
        };
        write_message(&mut agent, &message).await?;
        let answer = read_message(&mut agent)
            .await?
            .ok_or(io::ErrorKind::UnexpectedEof)?;
        // Agents have three kinds of failure; clients need one.
        if answer.first() == Some(&expected) {
            write_message(client, &answer).await?;
        } else {
            write_message(client, &[FAILURE]).await?;
        }
    }
    Ok(())
}
