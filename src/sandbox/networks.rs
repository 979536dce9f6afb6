//! [`Networks`]: private networks that are ready before a step needs one.
//!
//! pasta takes several times as long to start as a step does. A network is therefore made while
//! there is something else to wait for, and used by one step after the other, never by two at
//! once. Nothing passes from one to the next: no process of the first lives when it is given back,
//! and it is thrown away where the kernel still has a connection in it. Without capabilities over
//! it, a step cannot change its addresses, routes or filters; a step that has them gets its own.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::process::Child;
use std::sync::mpsc::{Sender, SyncSender, channel, sync_channel};
use std::sync::{Mutex, PoisonError};
use std::thread::JoinHandle;

use rustix::event::{PollFd, PollFlags};
use tempfile::TempDir;

use super::choose::{error_of, io, launch, nothing_in, start};
use super::output::Ears;
use super::wire::{self, Attachment, Helper, Launch, Purpose, Report, Runtime};
use super::{Cancel, Process, SandboxError, Security, hosts};

/// The private networks of one build.
#[derive(Debug)]
pub(super) struct Networks {
    helper: Helper,
    /// Those that nobody uses.
    idle: Mutex<Vec<HeldNetwork>>,
    maker: Maker,
}

/// A network namespace, and the processes that carry packets out of it. They end when it is
/// dropped.
#[derive(Debug)]
pub(super) struct HeldNetwork {
    netns: OwnedFd,
    resolv_conf: String,
    ears: Ears,
    child: Child,
}

/// The thread that starts them: the kernel ends such a chain of processes with the thread that
/// started it, and the others come and go.
#[derive(Debug)]
struct Maker {
    /// Absent when it is to end.
    requests: Option<Mutex<Sender<Request>>>,
    thread: Option<JoinHandle<()>>,
}

struct Request {
    cancel: Cancel,
    made: SyncSender<Result<HeldNetwork, SandboxError>>,
}

impl Networks {
    /// Makes the first one with `helper`, so that it is seen to work. `runtime` is for messages;
    /// their directory is in `scratch`.
    ///
    /// # Errors
    /// [`SandboxError::Refused`] with [`Refusal::Network`](super::Refusal::Network) where the
    /// helper does not work; other refusals where the kernel allows less than any sandbox needs.
    pub(super) fn start(
        runtime: &Runtime,
        helper: Helper,
        scratch: &Path,
    ) -> Result<Self, SandboxError> {
        let base = tempfile::tempdir_in(scratch).map_err(io("making a directory for networks"))?;
        let process = nothing_in(base.path());
        let attachment = Attachment::Private(helper.clone());
        let launch = launch(runtime, process, attachment, Purpose::HoldNetwork)?;
        let networks = Self {
            helper,
            idle: Mutex::default(),
            maker: Maker::start(launch, base)?,
        };
        let first = networks.take(&Cancel::new())?;
        networks.give_back(first);
        Ok(networks)
    }

    /// What carries their packets.
    pub(super) fn helper(&self) -> &Helper {
        &self.helper
    }

    /// Whether `process` may have one that others have after it: it can change nothing of it, and
    /// needs nothing special.
    pub(super) fn suits(process: &Process) -> bool {
        process.security == Security::Sandbox && !hosts::want_gateway(&process.extra_hosts)
    }

    /// One that nobody uses; made now where there is none.
    ///
    /// # Errors
    /// As [`Networks::start`]; [`SandboxError::Cancelled`].
    pub(super) fn take(&self, cancel: &Cancel) -> Result<HeldNetwork, SandboxError> {
        while let Some(network) = self.lock().pop() {
            if network.is_unused() {
                return Ok(network);
            }
        }
        self.maker.make(cancel)
    }

    /// Takes one back from a step no process of which lives any more.
    pub(super) fn give_back(&self, network: HeldNetwork) {
        self.lock().push(network);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<HeldNetwork>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Networks {
    fn drop(&mut self) {
        let mut idle = self.lock();
        // All end at one time.
        for network in &*idle {
            network.hang_up();
        }
        idle.clear();
    }
}

impl HeldNetwork {
    /// The namespace.
    pub(super) fn netns(&self) -> &OwnedFd {
        &self.netns
    }

    /// The `/etc/resolv.conf` that goes with it.
    pub(super) fn resolv_conf(&self) -> &str {
        &self.resolv_conf
    }

    /// Whether nothing of who used it is left; false, too, where it has ended.
    fn is_unused(&self) -> bool {
        let socket = self.ears.socket.as_fd();
        let mut answer = [0];
        let asked = rustix::net::send(socket, &[wire::IS_UNUSED], rustix::net::SendFlags::NOSIGNAL);
        let read = asked
            .and_then(|_| rustix::io::retry_on_intr(|| rustix::io::read(socket, &mut answer[..])));
        read == Ok(1) && answer == [wire::UNUSED]
    }

    fn hang_up(&self) {
        // That the other end is gone already is as good.
        let _ = rustix::net::shutdown(&self.ears.socket, rustix::net::Shutdown::Both);
    }
}

impl Drop for HeldNetwork {
    fn drop(&mut self) {
        self.hang_up();
        // Its supervisor ends after everything else; how, is of no interest.
        let _ = self.child.wait();
    }
}

impl Maker {
    /// Starts the thread; `base` is where the root filesystem of `launch` would be.
    fn start(launch: Launch, base: TempDir) -> Result<Self, SandboxError> {
        let (requests, receiver) = channel::<Request>();
        let thread = std::thread::Builder::new()
            .name("networks".to_owned())
            .spawn(move || {
                for Request { cancel, made } in receiver {
                    // Nobody waits any more where that fails, and what was made ends at once.
                    let _ = made.send(make(&launch, &cancel));
                }
                drop(base);
            })
            .map_err(io("starting a thread"))?;
        Ok(Self {
            requests: Some(Mutex::new(requests)),
            thread: Some(thread),
        })
    }

    fn make(&self, cancel: &Cancel) -> Result<HeldNetwork, SandboxError> {
        let (made, result) = sync_channel(1);
        let request = Request {
            cancel: cancel.clone(),
            made,
        };
        let gone = || io("making a network")(std::io::Error::other("its thread has died"));
        if let Some(requests) = &self.requests {
            let requests = requests.lock().unwrap_or_else(PoisonError::into_inner);
            requests.send(request).map_err(|_| gone())?;
        }
        result.recv().map_err(|_| gone())?
    }
}

impl Drop for Maker {
    fn drop(&mut self) {
        self.requests = None;
        if let Some(thread) = self.thread.take() {
            // A panic in there has shown itself as an error.
            let _ = thread.join();
        }
    }
}

/// Starts the chain of `launch`, and waits until its network is ready.
fn make(launch: &Launch, cancel: &Cancel) -> Result<HeldNetwork, SandboxError> {
    let sandbox = launch.runtime.kind.name();
    let waker = cancel.waker().map_err(io("making an event file"))?;
    let (mut child, ears) = start(launch, None, &[])?;
    let ready = ready(&ears, waker.as_fd());
    let error = match ready {
        Ok(Some((Report::Network, fds))) => match <[OwnedFd; 1]>::try_from(fds) {
            Ok([netns]) => {
                return Ok(HeldNetwork {
                    netns,
                    resolv_conf: launch.resolv_conf.clone(),
                    ears,
                    child,
                });
            }
            Err(_) => SandboxError::Lost { sandbox },
        },
        Ok(Some((Report::Failed(failure), _))) => error_of(sandbox, failure),
        Ok(_) if cancel.is_cancelled() => SandboxError::Cancelled,
        Ok(_) => SandboxError::Lost { sandbox },
        Err(source) => io("waiting for a network")(source),
    };
    // That the other end is gone already is as good.
    let _ = rustix::net::shutdown(&ears.socket, rustix::net::Shutdown::Both);
    child.wait().map_err(io("waiting for the sandbox"))?;
    Err(error)
}

/// What is heard first; nothing where `cancel` becomes readable before.
fn ready(ears: &Ears, cancel: BorrowedFd<'_>) -> std::io::Result<Option<(Report, Vec<OwnedFd>)>> {
    let mut polled = [
        PollFd::from_borrowed_fd(cancel, PollFlags::IN),
        PollFd::new(&ears.socket, PollFlags::IN),
    ];
    rustix::io::retry_on_intr(|| rustix::event::poll(&mut polled, None))?;
    if !polled[0].revents().is_empty() {
        return Ok(None);
    }
    let received = wire::receive_report_with(&ears.socket)?;
    Ok(received.map(|received| (received.report, received.fds)))
}
