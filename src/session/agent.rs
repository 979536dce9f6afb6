//! The socket that a step sees, and what is behind it: the user's agent or keys from files.
//!
//! Clients are hostile: a step may send anything. Lists of keys and signatures are all that
//! it gets, messages and connections are bounded, and nothing outlives the [`AgentSocket`].

use std::fmt;
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixListener as StdListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
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

/// A socket that is an SSH agent. Dropping it removes the socket, and ends its connections
/// as soon as the runtime gets to it; [`AgentSocket::close`] waits for that.
#[must_use = "the agent ends when this is dropped"]
#[derive(Debug)]
pub struct AgentSocket {
    path: PathBuf,
    cancel: CancellationToken,
    task: Option<JoinHandle<()>>,
}

impl AgentSocket {
    pub(super) fn new(id: &str, source: Source, path: &Path) -> io::Result<Self> {
        let runtime = tokio::runtime::Handle::try_current().map_err(io::Error::other)?;
        let listener = listen(path)?;
        // From here on a failure drops `socket`, which removes the file.
        let mut socket = Self {
            path: path.to_owned(),
            cancel: CancellationToken::new(),
            task: None,
        };
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
        listener.set_nonblocking(true)?;
        let listener = UnixListener::from_std(listener)?;
        let served = serve(id.to_owned(), source, listener, socket.cancel.clone());
        socket.task = Some(runtime.spawn(served));
        Ok(socket)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Removes the socket, ends its connections and waits until nobody can connect to it any
    /// more, under whatever name it was bound into a step.
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
        // Not `shutdown` of the listener, which would refuse connections at once: it is then
        // ready for ever with nothing to accept, and tokio's `accept` never returns.
        self.cancel.cancel();
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
fn listen(path: &Path) -> io::Result<StdListener> {
    use rustix::fs::{CWD, Mode, OFlags};

    match StdListener::bind(path) {
        // An address has room for 107 bytes. A directory's descriptor makes it short.
        Err(error) if error.kind() == io::ErrorKind::InvalidInput => {
            let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
                return Err(error);
            };
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let parent = rustix::fs::openat(CWD, parent, flags, Mode::empty())?;
            let short = Path::new("/proc/self/fd").join(parent.as_raw_fd().to_string());
            StdListener::bind(short.join(name))
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
    let signing = Arc::new(Semaphore::new(1));
    loop {
        tokio::select! {
            // In this order, so that nobody is served once it is cancelled.
            biased;
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
async fn connection(id: &str, source: Source, mut client: UnixStream, signing: Arc<Semaphore>) {
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
    signing: Arc<Semaphore>,
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

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::os::unix::net::UnixStream as Client;

    use ssh_key::Algorithm;

    use super::super::keys::tests::{generate, verifies};
    use super::super::protocol::{MAX_MESSAGE_BYTES, put_string, string};
    use super::super::{SshAgents, SshSpec};
    use super::*;

    fn runtime() -> tokio::runtime::Runtime {
        tokio::runtime::Runtime::new().unwrap()
    }

    fn agents(spec: &str) -> SshAgents {
        SshAgents::new([spec.parse::<SshSpec>().unwrap()], |_| None).unwrap()
    }

    fn send(client: &mut Client, message: &[u8]) {
        let mut framed = Vec::new();
        put_string(&mut framed, message);
        client.write_all(&framed).unwrap();
    }

    fn receive(client: &mut Client) -> Vec<u8> {
        let mut length = [0; 4];
        client.read_exact(&mut length).unwrap();
        let mut message = vec![0; u32::from_be_bytes(length) as usize];
        client.read_exact(&mut message).unwrap();
        message
    }

    fn ask(client: &mut Client, message: &[u8]) -> Vec<u8> {
        send(client, message);
        receive(client)
    }

    /// Reads until the other side has closed; a reset is as good.
    fn ends(client: &mut Client) {
        let mut rest = Vec::new();
        match client.read_to_end(&mut rest) {
            Ok(_) => assert_eq!(rest, b""),
            Err(error) => assert_eq!(error.kind(), io::ErrorKind::ConnectionReset),
        }
    }

    fn sign_request(key: &[u8], data: &[u8], flags: u32) -> Vec<u8> {
        let mut message = vec![13];
        put_string(&mut message, key);
        put_string(&mut message, data);
        message.extend(flags.to_be_bytes());
        message
    }

    /// Everything that changes an agent: add, remove, remove all, smartcards, lock, unlock,
    /// with constraints; version 1; answers; what does not exist.
    const REFUSED: &[u8] = &[
        0, 1, 2, 3, 5, 6, 7, 8, 9, 10, 12, 14, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 28, 255,
    ];

    #[test]
    fn keys_from_files_are_listed_and_sign() {
        let dir = tempfile::tempdir().unwrap();
        let (one, two) = (dir.path().join("one"), dir.path().join("two"));
        let (text, first) = generate(Algorithm::Ed25519);
        std::fs::write(&one, text).unwrap();
        let (text, second) = generate(Algorithm::Ed25519);
        std::fs::write(&two, text).unwrap();
        let (one, two) = (one.display(), two.display());
        let agents = agents(&format!("x={one},{two},{one}"));
        let runtime = runtime();
        let _runtime = runtime.enter();
        let path = dir.path().join("socket");
        let socket = agents.serve("x", &path).unwrap();
        assert_eq!(socket.path(), path);
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o600);

        let mut client = Client::connect(&path).unwrap();
        let (first_blob, second_blob) = (first.to_bytes().unwrap(), second.to_bytes().unwrap());
        let mut listed = vec![12, 0, 0, 0, 2];
        for blob in [&first_blob, &second_blob] {
            put_string(&mut listed, blob);
            put_string(&mut listed, b"");
        }
        assert_eq!(ask(&mut client, &[11]), listed);

        let answer = ask(&mut client, &sign_request(&second_blob, b"data", 0));
        assert_eq!(answer[0], 14);
        let (signature, rest) = string(&answer[1..]).unwrap();
        assert_eq!(rest, b"");
        assert!(verifies(&second, b"data", signature));
        assert!(!verifies(&first, b"data", signature));

        assert_eq!(ask(&mut client, &sign_request(b"other", b"data", 0)), [5]);
        assert_eq!(ask(&mut client, &[27]), [5]);
        for &kind in REFUSED {
            assert_eq!(ask(&mut client, &[kind]), [5], "{kind}");
        }
        // Still there, after all that.
        assert_eq!(ask(&mut client, &[11]), listed);
        drop(socket);
        ends(&mut client);
    }

    /// An agent that answers each request with the next of `answers`, and gives back what it
    /// was asked when its client leaves.
    fn fake_agent(path: &Path, answers: Vec<Vec<u8>>) -> std::thread::JoinHandle<Vec<Vec<u8>>> {
        let listener = StdListener::bind(path).unwrap();
        std::thread::spawn(move || {
            let mut asked = Vec::new();
            // The first connection only looks whether somebody is there.
            listener.accept().unwrap();
            let (mut client, _) = listener.accept().unwrap();
            for answer in answers {
                asked.push(receive(&mut client));
                send(&mut client, &answer);
            }
            ends(&mut client);
            asked
        })
    }

    #[test]
    fn of_an_agent_only_lists_and_signatures_are_asked() {
        let dir = tempfile::tempdir().unwrap();
        let upstream = dir.path().join("upstream");
        let answers = [
            b"\x0c\0\0\0\0".to_vec(),
            b"\x0e\0\0\0\x03sig".to_vec(),
            vec![102],
            b"\x0c\0\0\0\0".to_vec(),
        ];
        let agent = fake_agent(&upstream, answers.to_vec());
        let agents = agents(&format!("x={}", upstream.display()));
        let runtime = runtime();
        let _runtime = runtime.enter();
        let path = dir.path().join("socket");
        let socket = agents.serve("x", &path).unwrap();
        let mut client = Client::connect(&path).unwrap();
        let sign = sign_request(b"key", b"data", 4);

        assert_eq!(ask(&mut client, &[11]), answers[0]);
        for &kind in REFUSED {
            assert_eq!(ask(&mut client, &[kind]), [5], "{kind}");
        }
        assert_eq!(ask(&mut client, b"\x1b\0\0\0\x01x"), [28]);
        assert_eq!(ask(&mut client, &sign[..sign.len() - 1]), [5]);
        assert_eq!(ask(&mut client, &sign), answers[1]);
        // A refusal, and the answer to another question.
        assert_eq!(ask(&mut client, &sign), [5]);
        assert_eq!(ask(&mut client, &sign), [5]);
        drop(client);
        let asked = agent.join().unwrap();
        assert_eq!(asked, [vec![11], sign.clone(), sign.clone(), sign]);
        runtime.block_on(socket.close());
    }

    #[test]
    fn a_raw_socket_passes_everything() {
        let dir = tempfile::tempdir().unwrap();
        let upstream = dir.path().join("upstream");
        let listener = StdListener::bind(&upstream).unwrap();
        let agents = agents(&format!("x={},raw=true", upstream.display()));
        let runtime = runtime();
        let _runtime = runtime.enter();
        let socket = agents.serve("x", &dir.path().join("socket")).unwrap();
        let mut client = Client::connect(socket.path()).unwrap();
        client.write_all(b"anything").unwrap();
        client.shutdown(std::net::Shutdown::Write).unwrap();
        let (mut server, _) = listener.accept().unwrap();
        let mut got = String::new();
        server.read_to_string(&mut got).unwrap();
        assert_eq!(got, "anything");
        server.write_all(b"at all").unwrap();
        drop(server);
        got.clear();
        client.read_to_string(&mut got).unwrap();
        assert_eq!(got, "at all");
    }

    /// An agent of one new key at `socket` below the returned directory.
    fn one_key() -> (tempfile::TempDir, SshAgents) {
        let dir = tempfile::tempdir().unwrap();
        let key = dir.path().join("key");
        std::fs::write(&key, generate(Algorithm::Ed25519).0).unwrap();
        (dir, agents(&format!("x={}", key.display())))
    }

    #[test]
    fn nothing_outlives_the_guard() {
        let (dir, agents) = one_key();
        let runtime = runtime();
        let _runtime = runtime.enter();
        let path = dir.path().join("socket");
        // Another name, as a bind mount into a step is one.
        let bound = dir.path().join("bound");
        for close in [false, true] {
            let socket = agents.serve("x", &path).unwrap();
            std::fs::hard_link(&path, &bound).unwrap();
            let mut idle = Client::connect(&bound).unwrap();
            assert_eq!(ask(&mut idle, &[11])[0], 12);
            let mut halfway = Client::connect(&bound).unwrap();
            halfway.write_all(&[0, 0]).unwrap();
            if close {
                runtime.block_on(socket.close());
            } else {
                drop(socket);
            }
            assert!(!path.exists());
            match Client::connect(&bound) {
                Err(error) => assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused),
                // Just before the listener closes; nobody answers.
                Ok(mut late) if !close => ends(&mut late),
                Ok(_) => panic!("it is closed"),
            }
            ends(&mut idle);
            ends(&mut halfway);
            std::fs::remove_file(&bound).unwrap();
        }
    }

    #[test]
    fn a_message_that_is_too_long_ends_its_connection_only() {
        let (dir, agents) = one_key();
        let runtime = runtime();
        let _runtime = runtime.enter();
        let socket = agents.serve("x", &dir.path().join("socket")).unwrap();
        let mut other = Client::connect(socket.path()).unwrap();
        let mut client = Client::connect(socket.path()).unwrap();
        // The longest that is read, and one byte more.
        let mut longest = vec![0; MAX_MESSAGE_BYTES];
        longest[0] = 99;
        assert_eq!(ask(&mut client, &longest), [5]);
        let length = u32::try_from(MAX_MESSAGE_BYTES + 1).unwrap();
        client.write_all(&length.to_be_bytes()).unwrap();
        ends(&mut client);
        assert_eq!(ask(&mut other, &[11])[0], 12);
    }

    #[test]
    fn connections_beyond_the_limit_wait_for_their_turn() {
        let (dir, agents) = one_key();
        let runtime = runtime();
        let _runtime = runtime.enter();
        let socket = agents.serve("x", &dir.path().join("socket")).unwrap();
        let mut clients: Vec<_> = (0..MAX_CONNECTIONS)
            .map(|_| Client::connect(socket.path()).unwrap())
            .collect();
        for client in &mut clients {
            assert_eq!(ask(client, &[11])[0], 12);
        }
        let mut waiting = Client::connect(socket.path()).unwrap();
        send(&mut waiting, &[11]);
        waiting.set_nonblocking(true).unwrap();
        assert_eq!(ask(&mut clients[0], &[11])[0], 12);
        let error = waiting.read(&mut [0]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        waiting.set_nonblocking(false).unwrap();
        clients.pop();
        assert_eq!(receive(&mut waiting)[0], 12);
    }

    #[test]
    fn a_long_path_is_no_obstacle_and_a_taken_one_is_left_alone() {
        let (dir, agents) = one_key();
        let runtime = runtime();
        let _runtime = runtime.enter();
        let deep = dir.path().join("d".repeat(150));
        std::fs::create_dir(&deep).unwrap();
        let path = deep.join("socket");
        let socket = agents.serve("x", &path).unwrap();
        assert!(std::fs::symlink_metadata(&path).is_ok());
        drop(socket);
        assert!(!path.exists());

        std::fs::write(&path, "a file").unwrap();
        let error = agents.serve("x", &path).unwrap_err();
        assert_eq!(
            super::super::testing::chain(&error),
            format!(
                "making the socket {} for SSH agent \"x\": Address already in use (os error 98)",
                path.display()
            )
        );
        assert_eq!(std::fs::read(&path).unwrap(), b"a file");
    }
}
