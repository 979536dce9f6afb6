//! [`Cancel`], and the loop that carries a step's output while it runs.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use rustix::event::{EventfdFlags, PollFd, PollFlags};
use rustix::process::Pid;
use tokio::sync::Notify;

use super::OutputSink;
use super::wire::{self, Failure, Report};
use crate::progress::Stream;

/// Ends running steps. Clones are the same.
#[derive(Clone, Debug, Default)]
pub struct Cancel {
    inner: Arc<Mutex<State>>,
    /// Wakes the tasks that wait for it.
    notify: Arc<Notify>,
}

#[derive(Debug, Default)]
struct State {
    cancelled: bool,
    /// One event file for each step that runs.
    wakers: Vec<Weak<OwnedFd>>,
}

impl Cancel {
    /// Returns one that nobody has used yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Ends all steps that run under it, and those that will.
    pub fn cancel(&self) {
        let mut state = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        state.cancelled = true;
        for waker in state.wakers.drain(..).filter_map(|waker| waker.upgrade()) {
            // Cannot fail: the counter is far from its limit and the file is open.
            let _ = rustix::io::write(&*waker, &1_u64.to_ne_bytes());
        }
        drop(state);
        self.notify.notify_waiters();
    }

    /// Waits until it is used.
    pub async fn cancelled(&self) {
        let mut notified = std::pin::pin!(self.notify.notified());
        // From here on it is woken, so that nothing is missed between the two.
        notified.as_mut().enable();
        if !self.is_cancelled() {
            notified.await;
        }
    }

    /// Whether it was used.
    pub fn is_cancelled(&self) -> bool {
        self.inner
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .cancelled
    }

    /// Returns a file that becomes readable when it is used; at once if it already was.
    pub(super) fn waker(&self) -> io::Result<Arc<OwnedFd>> {
        let mut state = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        let fd = rustix::event::eventfd(u32::from(state.cancelled), EventfdFlags::CLOEXEC)?;
        let fd = Arc::new(fd);
        state.wakers.retain(|waker| waker.strong_count() > 0);
        state.wakers.push(Arc::downgrade(&fd));
        Ok(fd)
    }
}

/// What was heard from a sandbox until its end.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Heard {
    /// Whether the step itself was reached.
    pub(super) started: bool,
    /// How the runtime ended.
    pub(super) exited: Option<i32>,
    /// The first failure of a stage.
    pub(super) failure: Option<Failure>,
    /// Whether it was cancelled, or ended by a limit, while it ran.
    pub(super) cancelled: bool,
    /// The end of what runtime and helpers wrote for people.
    pub(super) log: Vec<u8>,
}

/// The files on which a sandbox is heard.
#[derive(Debug)]
pub(super) struct Ears {
    /// Reports.
    pub(super) socket: OwnedFd,
    /// The step's standard output.
    pub(super) stdout: OwnedFd,
    /// The step's standard error.
    pub(super) stderr: OwnedFd,
    /// What runtime and helpers write.
    pub(super) log: OwnedFd,
}

/// How much of the runtime's own words is kept.
const LOG_LIMIT_BYTES: usize = 16 * 1024;

/// Carries output to `sink` until every writer is gone.
///
/// All of them go when the sandbox's PID namespace ends, so a background process that
/// holds a pipe cannot keep this waiting. When `cancel` or `alarm` becomes readable, the socket is
/// shut down, which makes the supervisor kill everything. `traceable` gets the process that waits
/// to be traced.
///
/// # Errors
/// Those of `poll(2)`, `read(2)` and `traceable`; the caller must then end the supervisor.
pub(super) fn listen(
    ears: &Ears,
    cancel: BorrowedFd<'_>,
    alarm: Option<BorrowedFd<'_>>,
    sink: OutputSink<'_>,
    traceable: &mut dyn FnMut(Pid) -> io::Result<()>,
) -> io::Result<Heard> {
    let mut heard = Heard::default();
    // In this order, so that output that precedes a report is carried before it.
    let fds = [
        ears.stdout.as_fd(),
        ears.stderr.as_fd(),
        ears.log.as_fd(),
        ears.socket.as_fd(),
        cancel,
        alarm.unwrap_or(cancel),
    ];
    let mut open = [true; 6];
    let mut buffer = vec![0; 64 * 1024];
    while open[..4].contains(&true) {
        let watched: Vec<usize> = (0..fds.len()).filter(|&index| open[index]).collect();
        let mut polled: Vec<PollFd<'_>> = watched
            .iter()
            .map(|&index| PollFd::from_borrowed_fd(fds[index], PollFlags::IN))
            .collect();
        rustix::io::retry_on_intr(|| rustix::event::poll(&mut polled, None))?;
        let ready: Vec<usize> = watched
            .iter()
            .zip(&polled)
            .filter(|(_, fd)| !fd.revents().is_empty())
            .map(|(&index, _)| index)
            .collect();
        for index in ready {
            match index {
                0..=2 => {
                    let length = rustix::io::retry_on_intr(|| {
                        rustix::io::read(fds[index], &mut buffer[..])
                    })?;
                    let bytes = &buffer[..length];
                    match index {
                        _ if length == 0 => open[index] = false,
                        0 => sink(Stream::Stdout, bytes),
                        1 => sink(Stream::Stderr, bytes),
                        _ => keep_tail(&mut heard.log, bytes),
                    }
                }
                3 => match wire::receive_report_with(fds[index])?.map(|r| (r.report, r.sender)) {
                    Some((Report::Traceable, Some(pid))) => traceable(pid)?,
                    Some((Report::Traceable, None)) => {}
                    Some((Report::Started, _)) => heard.started = true,
                    // Of no process that runs.
                    Some((Report::Network, _)) => {}
                    Some((Report::Exited(status), _)) => heard.exited = Some(status),
                    Some((Report::Failed(failure), _)) => {
                        heard.failure.get_or_insert(failure);
                    }
                    None => open[index] = false,
                },
                _ => {
                    open[index] = false;
                    heard.cancelled = true;
                    // That the other end is gone already is as good.
                    let _ = rustix::net::shutdown(&ears.socket, rustix::net::Shutdown::Both);
                }
            }
        }
    }
    Ok(heard)
}

fn keep_tail(log: &mut Vec<u8>, bytes: &[u8]) {
    log.extend_from_slice(bytes);
    if log.len() > LOG_LIMIT_BYTES {
        log.drain(..log.len() - LOG_LIMIT_BYTES);
    }
}

#[cfg(test)]
mod tests {
    use rustix::net::{AddressFamily, SocketFlags, SocketType};
    use rustix::pipe::PipeFlags;

    use super::super::wire::send_report;
    use super::*;

    fn nobody(pid: Pid) -> io::Result<()> {
        panic!("{pid:?} is not to be traced")
    }

    struct Mouths {
        socket: OwnedFd,
        stdout: OwnedFd,
        stderr: OwnedFd,
        log: OwnedFd,
    }

    fn pair() -> (Ears, Mouths) {
        let pipe = || rustix::pipe::pipe_with(PipeFlags::CLOEXEC).unwrap();
        let (socket, far_socket) = rustix::net::socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )
        .unwrap();
        let ((stdout, far_stdout), (stderr, far_stderr), (log, far_log)) = (pipe(), pipe(), pipe());
        (
            Ears {
                socket,
                stdout,
                stderr,
                log,
            },
            Mouths {
                socket: far_socket,
                stdout: far_stdout,
                stderr: far_stderr,
                log: far_log,
            },
        )
    }

    #[test]
    fn everything_is_heard_until_all_are_gone() {
        let (ears, mouths) = pair();
        // More than a pipe holds: a writer must never wait for ever.
        let long = vec![b'x'; 1024 * 1024];
        let writer = {
            let long = long.clone();
            std::thread::spawn(move || {
                let write = |fd: &OwnedFd, mut bytes: &[u8]| {
                    while !bytes.is_empty() {
                        bytes = &bytes[rustix::io::write(fd, bytes).unwrap()..];
                    }
                };
                send_report(&mouths.socket, &Report::Started);
                write(&mouths.stderr, b"to stderr");
                write(&mouths.stdout, &long);
                write(&mouths.log, &long);
                write(&mouths.log, b"the end");
                send_report(&mouths.socket, &Report::Exited(3));
            })
        };
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        let cancel = Cancel::new().waker().unwrap();
        let mut sink = |stream, bytes: &[u8]| match stream {
            Stream::Stdout => stdout.extend_from_slice(bytes),
            Stream::Stderr => stderr.extend_from_slice(bytes),
        };
        let heard = listen(&ears, cancel.as_fd(), None, &mut sink, &mut nobody).unwrap();
        writer.join().unwrap();
        assert!(stdout == long);
        assert_eq!(stderr, b"to stderr");
        assert_eq!((heard.started, heard.exited), (true, Some(3)));
        assert!(!heard.cancelled);
        assert_eq!(heard.log.len(), LOG_LIMIT_BYTES);
        assert!(heard.log.ends_with(b"xthe end"));
    }

    #[test]
    fn cancelling_hangs_up_on_the_supervisor() {
        for before in [true, false] {
            let cancel = Cancel::new();
            if before {
                cancel.cancel();
            }
            let waker = cancel.waker().unwrap();
            if !before {
                cancel.clone().cancel();
            }
            let (ears, mouths) = pair();
            let supervisor = std::thread::spawn(move || {
                let mut polled = [PollFd::new(&mouths.socket, PollFlags::empty())];
                rustix::event::poll(&mut polled, None).unwrap();
                let hung_up = polled[0].revents().contains(PollFlags::HUP);
                drop(mouths);
                hung_up
            });
            let heard = listen(&ears, waker.as_fd(), None, &mut |_, _| {}, &mut nobody).unwrap();
            assert!(heard.cancelled && cancel.is_cancelled());
            assert!(supervisor.join().unwrap());
        }
    }
}
