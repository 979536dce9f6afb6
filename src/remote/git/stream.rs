//! Git's protocol over one connection: a socket (`git://`), or an `ssh` program.
//!
//! The `ssh` program is the only one that is started; keys are those of the agent that the
//! caller names, and no configuration of the user is read.

#![allow(
    clippy::disallowed_methods,
    reason = "there is no ssh but the program; it is started here"
)]

use std::io::{self, Read, Seek, SeekFrom, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};

use super::error::{GitError, shown};
use super::packet::put;
use super::watch::Watch;
use crate::registry::Reach;

/// Until a connection stands.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(15);
/// How long a read waits before it looks whether it is still wanted.
const TICK: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 50_000_000,
};
/// How much of ssh's own messages is read, in bytes.
const MESSAGES_BYTES: u64 = 4 << 10;

/// What ssh is given.
#[derive(Clone, Debug)]
pub struct Ssh {
    /// The program; a mere name is looked for in `PATH`.
    pub program: PathBuf,
    /// The socket of the agent that has the keys (`SSH_AUTH_SOCK`).
    pub agent: PathBuf,
    /// A file of known hosts; without one any host is believed, as BuildKit does.
    pub known_hosts: Option<PathBuf>,
}

/// A connection on which both sides speak.
pub(super) struct Stream<'o> {
    reader: Polled<'o>,
    writer: Polled<'o>,
    remote: String,
    child: Option<(Child, std::fs::File)>,
}

impl<'o> Stream<'o> {
    /// Connects to a git daemon and asks for a repository.
    ///
    /// # Errors
    /// [`GitError::Connection`].
    pub(super) fn daemon(
        host: &str,
        port: u16,
        path: &str,
        remote: &str,
        watch: &'o Watch,
        idle: Duration,
        reach: Reach,
    ) -> Result<Self, GitError> {
        let fail = |reason: String| GitError::Connection {
            remote: remote.to_owned(),
            reason,
        };
        let addresses = (host, port)
            .to_socket_addrs()
            .map_err(|error| fail(error.to_string()))?;
        let mut last = fail("the host has no address".to_owned());
        for address in addresses {
            watch.check(remote)?;
            if let Err(reason) = reach.check_address(address.ip()) {
                last = fail(reason.to_owned());
                continue;
            }
            match TcpStream::connect_timeout(&address, CONNECT_TIMEOUT) {
                Err(error) => last = fail(format!("connecting to {address}: {error}")),
                Ok(socket) => {
                    let other = socket.try_clone().map_err(|e| fail(e.to_string()))?;
                    let mut stream = Self {
                        reader: Polled::new(socket.into(), watch, idle),
                        writer: Polled::new(other.into(), watch, idle),
                        remote: remote.to_owned(),
                        child: None,
                    };
                    let authority = if port == 9418 {
                        host.to_owned()
                    } else {
                        format!("{host}:{port}")
                    };
                    let request =
                        format!("git-upload-pack {path}\0host={authority}\0\0version=2\0");
                    let mut packet = Vec::new();
                    put(&mut packet, request.as_bytes());
                    stream.send(&packet)?;
                    return Ok(stream);
                }
            }
        }
        Err(last)
    }

    /// Starts `ssh` and in it, at the other end, git's upload service.
    ///
    /// # Errors
    /// [`GitError::Remote`] without an agent or a program.
    #[allow(
        clippy::too_many_arguments,
        reason = "an address has that many parts, and each is used once"
    )]
    pub(super) fn ssh(
        user: Option<&str>,
        host: &str,
        port: Option<u16>,
        path: &str,
        remote: &str,
        ssh: Option<&Ssh>,
        watch: &'o Watch,
        idle: Duration,
    ) -> Result<Self, GitError> {
        let fail = |reason: String| GitError::Remote {
            remote: remote.to_owned(),
            reason,
        };
        let ssh = ssh.ok_or_else(|| {
            fail(
                "cloning over ssh needs an ssh agent: give --ssh default (with SSH_AUTH_SOCK \
                 set), or use the repository's https:// address with a GIT_AUTH_TOKEN secret"
                    .to_owned(),
            )
        })?;
        let command = arguments(user, host, port, path, ssh);
        let messages = tempfile::tempfile().map_err(|e| fail(e.to_string()))?;
        let stderr = messages.try_clone().map_err(|e| fail(e.to_string()))?;
        let mut child = Command::new(&ssh.program)
            .args(command)
            .env("SSH_AUTH_SOCK", &ssh.agent)
            .env("GIT_PROTOCOL", "version=2")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(stderr)
            .spawn()
            .map_err(|error| {
                fail(if error.kind() == io::ErrorKind::NotFound {
                    format!(
                        "the program {} is not installed (OpenSSH's client); install it, or use \
                         the repository's https:// address",
                        ssh.program.display()
                    )
                } else {
                    format!("starting {}: {error}", ssh.program.display())
                })
            })?;
        let (Some(stdin), Some(stdout)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(fail("ssh has no pipes".to_owned()));
        };
        Ok(Self {
            reader: Polled::new(stdout.into(), watch, idle),
            writer: Polled::new(stdin.into(), watch, idle),
            remote: remote.to_owned(),
            child: Some((child, messages)),
        })
    }

    /// # Errors
    /// [`GitError::Connection`].
    pub(super) fn send(&mut self, bytes: &[u8]) -> Result<(), GitError> {
        self.writer
            .write_all(bytes)
            .map_err(|error| GitError::Connection {
                remote: self.remote.clone(),
                reason: format!("sending: {error}"),
            })
    }

    pub(super) fn reader(&mut self) -> &mut dyn Read {
        &mut self.reader
    }

    /// Adds what ssh says to an error of a connection that it ended.
    pub(super) fn explained(&mut self, error: GitError) -> GitError {
        let Some((_, messages)) = &mut self.child else {
            return error;
        };
        let mut text = Vec::new();
        let read = messages
            .seek(SeekFrom::Start(0))
            .and_then(|_| messages.take(MESSAGES_BYTES).read_to_end(&mut text));
        match error {
            GitError::Connection { remote, reason } if read.is_ok() && !text.is_empty() => {
                GitError::Connection {
                    remote,
                    reason: format!("{reason}; ssh says: {}", shown(&text)),
                }
            }
            error => error,
        }
    }
}

impl Drop for Stream<'_> {
    fn drop(&mut self) {
        if let Some((child, _)) = &mut self.child {
            // It may have ended already; in both cases there is nobody to tell.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// What `ssh` is started with.
fn arguments(
    user: Option<&str>,
    host: &str,
    port: Option<u16>,
    path: &str,
    ssh: &Ssh,
) -> Vec<String> {
    let mut arguments: Vec<String> = ["-F", "/dev/null", "-o", "BatchMode=yes", "-o"]
        .map(str::to_owned)
        .into();
    arguments.push(match &ssh.known_hosts {
        Some(file) => format!("UserKnownHostsFile=\"{}\"", file.display()),
        None => "StrictHostKeyChecking=no".to_owned(),
    });
    arguments.extend(["-o", "SendEnv=GIT_PROTOCOL"].map(str::to_owned));
    if let Some(port) = port {
        arguments.extend(["-p".to_owned(), port.to_string()]);
    }
    let user = user.map(|user| format!("{user}@")).unwrap_or_default();
    arguments.extend(["--".to_owned(), format!("{user}{host}")]);
    arguments.push(format!("git-upload-pack '{}'", path.replace('\'', "'\\''")));
    arguments
}

/// A descriptor that gives up where nothing happens, or nobody wants it.
struct Polled<'o> {
    file: std::fs::File,
    watch: &'o Watch,
    idle: Duration,
}

impl<'o> Polled<'o> {
    fn new(fd: OwnedFd, watch: &'o Watch, idle: Duration) -> Self {
        Self {
            file: fd.into(),
            watch,
            idle,
        }
    }

    fn wait(&self, flags: PollFlags) -> io::Result<()> {
        let began = Instant::now();
        loop {
            let mut fds = [PollFd::from_borrowed_fd(self.file.as_fd(), flags)];
            match rustix::event::poll(&mut fds, Some(&TICK)) {
                Ok(0) | Err(rustix::io::Errno::INTR) => {}
                Ok(_) => return Ok(()),
                Err(error) => return Err(error.into()),
            }
            if self.watch.is_over() {
                return Err(io::Error::other("stopped"));
            }
            if began.elapsed() >= self.idle {
                let reason = format!("nothing happened for {:?}", self.idle);
                return Err(io::Error::new(io::ErrorKind::TimedOut, reason));
            }
        }
    }
}

impl Read for Polled<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.wait(PollFlags::IN)?;
        self.file.read(buffer)
    }
}

impl Write for Polled<'_> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        self.wait(PollFlags::OUT)?;
        self.file.write(buffer)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn security_s05_nothing_of_an_address_is_an_option_or_a_command() {
        let ssh = Ssh {
            program: "ssh".into(),
            agent: "/run/agent".into(),
            known_hosts: Some("/k h".into()),
        };
        let got = arguments(Some("git"), "h", Some(2222), "a'; id; '", &ssh);
        let expected = [
            "-F",
            "/dev/null",
            "-o",
            "BatchMode=yes",
            "-o",
            "UserKnownHostsFile=\"/k h\"",
            "-o",
            "SendEnv=GIT_PROTOCOL",
            "-p",
            "2222",
            "--",
            "git@h",
            "git-upload-pack 'a'\\''; id; '\\'''",
        ];
        assert_eq!(got, expected);
        let ssh = Ssh {
            known_hosts: None,
            ..ssh
        };
        let got = arguments(None, "h", None, "/r", &ssh);
        assert_eq!(got[5], "StrictHostKeyChecking=no");
        assert_eq!(got[8..], ["--", "h", "git-upload-pack '/r'"]);
    }
}
