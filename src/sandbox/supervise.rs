//! `__supervise` and `__reap`: the two processes that make everything else mortal.
//!
//! `__supervise` is killed with its parent (`PR_SET_PDEATHSIG`), or hears on its socket
//! that nobody listens any more; `__reap` is killed with `__supervise`. It is PID 1 of a
//! PID namespace, so the kernel kills all that is in it when it ends, whatever they do to
//! hide: see `pid_namespaces(7)`.

use std::ffi::OsString;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::FdFlags;
use rustix::mount::{MountFlags, MountPropagationFlags};
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use rustix::process::{Pid, PidfdFlags, Signal, WaitOptions};
use rustix::thread::UnshareFlags;

use super::enter::{self, Inherited};
use super::wire::{self, Attachment, Doing, Failure, Launch, Purpose, Report};
use super::{mounts, network, sys};

/// Runs a stage and reports its failure; returns the exit status.
///
/// The socket for reports is standard input.
pub(super) fn stage(body: impl FnOnce() -> Result<(), Failure>) -> i32 {
    match body() {
        Ok(()) => 0,
        Err(failure) => {
            wire::send_report(rustix::stdio::stdin(), &Report::Failed(failure));
            1
        }
    }
}

/// `__supervise`: receives its file descriptors on standard input, starts `__reap` in a new
/// PID namespace and waits for it.
pub(super) fn supervise_main() -> i32 {
    stage(|| {
        die_with_parent()?;
        let socket = rustix::stdio::stdin();
        let fds = wire::receive_fds(socket).doing(|| "receiving files".to_owned())?;
        sys::unshare(UnshareFlags::NEWPID | UnshareFlags::NEWNS)
            .doing(|| "entering PID and mount namespaces".to_owned())?;
        rustix::mount::mount_change(
            "/",
            MountPropagationFlags::PRIVATE | MountPropagationFlags::REC,
        )
        .doing(|| "keeping mounts to the sandbox".to_owned())?;
        let mut child = spawn_stage("__reap", &fds.iter().collect::<Vec<_>>())?;
        drop(fds);
        wait_or_kill(&mut child)
    })
}

/// Waits for `__reap`; kills it, and with it the namespace, when nobody listens any more.
///
/// The wait ends only when every process of the namespace is dead.
fn wait_or_kill(child: &mut Child) -> Result<(), Failure> {
    let doing = || "waiting for the sandbox".to_owned();
    let socket = rustix::stdio::stdin();
    let pidfd = Pid::from_raw(child.id().cast_signed())
        .ok_or(rustix::io::Errno::SRCH)
        .and_then(|pid| rustix::process::pidfd_open(pid, PidfdFlags::empty()))
        .doing(doing)?;
    let mut polled = [
        PollFd::new(&pidfd, PollFlags::IN),
        PollFd::from_borrowed_fd(socket, PollFlags::empty()),
    ];
    rustix::io::retry_on_intr(|| rustix::event::poll(&mut polled, None)).doing(doing)?;
    if polled[0].revents().is_empty() {
        child.kill().doing(|| "killing the sandbox".to_owned())?;
    }
    child.wait().doing(doing)?;
    Ok(())
}

/// Asks to be killed when the parent is, and makes sure that it still lives.
fn die_with_parent() -> Result<(), Failure> {
    let doing = || "tying this process to its parent".to_owned();
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL)).doing(doing)?;
    // It may have died before that call; then its end of the socket is closed. This holds
    // for `__reap`, too: what kills `__supervise` first hangs up.
    let mut polled = [PollFd::from_borrowed_fd(
        rustix::stdio::stdin(),
        PollFlags::empty(),
    )];
    let now = Timespec::default();
    rustix::io::retry_on_intr(|| rustix::event::poll(&mut polled, Some(&now))).doing(doing)?;
    match polled[0].revents().contains(PollFlags::HUP) {
        true => Err(Failure::new(doing(), &rustix::io::Errno::PIPE.into())),
        false => Ok(()),
    }
}

/// Starts this program again as another stage, with its standard files and `fds`.
fn spawn_stage(name: &str, fds: &[&OwnedFd]) -> Result<Child, Failure> {
    let mut command = Command::new("/proc/self/exe");
    command.arg(name).env_clear();
    if let Some(path) = std::env::var_os("PATH") {
        command.env("PATH", path);
    }
    for fd in fds {
        // This process has one thread, and starts nothing before these are closed that
        // would not have them anyway.
        rustix::io::fcntl_setfd(fd, FdFlags::empty()).doing(|| "passing files".to_owned())?;
        command.arg(fd.as_raw_fd().to_string());
    }
    let child = command.spawn();
    for fd in fds {
        rustix::io::fcntl_setfd(fd, FdFlags::CLOEXEC).doing(|| "passing files".to_owned())?;
    }
    child.doing(|| format!("starting {name}"))
}

fn adopt_all(args: &[OsString]) -> Result<Vec<OwnedFd>, Failure> {
    args.iter()
        .map(|arg| {
            let number = arg.to_str().and_then(|arg| arg.parse().ok()).unwrap_or(-1);
            sys::adopt(number).doing(|| format!("taking file descriptor {arg:?}"))
        })
        .collect()
}

fn missing_fd() -> Failure {
    Failure::new("taking file descriptors", &rustix::io::Errno::BADF.into())
}

/// `__reap EXE LAUNCH LOG [NETNS] [CGROUP…]`: PID 1 of the sandbox's outer namespace.
pub(super) fn reap_main(args: &[OsString]) -> i32 {
    stage(|| {
        die_with_parent()?;
        let fds = adopt_all(args)?;
        let [_, launch_file, _, ..] = &fds[..] else {
            return Err(missing_fd());
        };
        let launch = wire::read_launch(launch_file).doing(|| "reading the launch".to_owned())?;
        // The one of the namespace outside would show, and let reach, its processes.
        rustix::mount::mount(
            "proc",
            "/proc",
            "proc",
            MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC,
            None,
        )
        .doing(|| "mounting /proc".to_owned())?;
        let (ours, theirs) = socket_pair()?;
        let mut passed: Vec<&OwnedFd> = fds.iter().collect();
        passed.insert(REAPER_AT, &theirs);
        let child = spawn_stage("__enter", &passed)?;
        drop(theirs);
        let mut byte = [0];
        let read = rustix::io::retry_on_intr(|| rustix::io::read(&ours, &mut byte[..]));
        // Where it ended instead, it has reported why.
        if read.doing(|| "waiting for the namespaces".to_owned())? > 0 {
            if let Err(failure) = assist(&launch, child.id()) {
                // Before the other end hears that nobody answers, and complains.
                wire::send_report(rustix::stdio::stdin(), &Report::Failed(failure));
                return Ok(());
            }
            rustix::io::write(&ours, b"g").doing(|| "announcing the network".to_owned())?;
        }
        // What it passed on must be closed here, so that it is closed when they end.
        drop(fds);
        let status = match launch.purpose {
            // Without its helper a network is of no use.
            Purpose::HoldNetwork => wait_for(None)?,
            Purpose::Run | Purpose::Probe => wait_for(Some(child.id()))?,
        };
        wire::send_report(rustix::stdio::stdin(), &Report::Exited(status));
        Ok(())
    })
}

/// Does what is left to do once `__enter`, which is `pid`, has namespaces of its own.
fn assist(launch: &Launch, pid: u32) -> Result<(), Failure> {
    // From here on nothing of this mount namespace is needed.
    mounts::detach_newer(launch)?;
    match &launch.network {
        Attachment::Private(helper) => {
            let netns = netns_file(&launch.process.rootfs, pid)?;
            network::attach(helper, &netns, &launch.resolv_conf, launch.reach_host)
        }
        Attachment::Host | Attachment::None | Attachment::Held => Ok(()),
    }
}

fn socket_pair() -> Result<(OwnedFd, OwnedFd), Failure> {
    rustix::net::socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )
    .doing(|| "making a socket".to_owned())
}

/// Makes a file of the network namespace of `pid`, in this mount namespace only.
fn netns_file(base: &Path, pid: u32) -> Result<std::path::PathBuf, Failure> {
    rustix::mount::mount(
        "tmpfs",
        base,
        "tmpfs",
        MountFlags::NOSUID,
        Some(c"mode=0755"),
    )
    .doing(|| format!("mounting a tmpfs on {}", base.display()))?;
    let path = base.join("netns");
    network::pin_netns(pid, &path)?;
    Ok(path)
}

/// Reaps everything until `pid` ends, or where there is none the first process, and returns how
/// it did.
fn wait_for(pid: Option<u32>) -> Result<i32, Failure> {
    loop {
        let waited = rustix::io::retry_on_intr(|| rustix::process::wait(WaitOptions::empty()))
            .doing(|| "waiting for the runtime".to_owned())?;
        if let Some((ended, status)) = waited
            && pid.is_none_or(|pid| ended.as_raw_nonzero().get() == pid.cast_signed())
        {
            let status = ExitStatus::from_raw(status.as_raw());
            return Ok(match (status.code(), status.signal()) {
                (Some(code), _) => code,
                (None, signal) => 128 + signal.unwrap_or_default(),
            });
        }
    }
}

/// Where the socket of `__reap` is among the arguments of `__enter`.
const REAPER_AT: usize = 3;

/// `__enter EXE LAUNCH LOG REAPER [NETNS] [CGROUP…]`: becomes the runtime, or holds a network.
pub(super) fn enter_main(args: &[OsString]) -> i32 {
    stage(|| {
        let mut fds = adopt_all(args)?;
        let mut more = fds.drain(REAPER_AT + 1..).collect::<Vec<_>>().into_iter();
        let fds: Result<[OwnedFd; REAPER_AT + 1], _> = fds.try_into();
        let [exe, launch_file, log, reaper] = fds.map_err(|_| missing_fd())?;
        let launch = wire::read_launch(&launch_file).doing(|| "reading the launch".to_owned())?;
        if launch.purpose == Purpose::HoldNetwork {
            return enter::hold_network(&launch, &reaper);
        }
        let netns = match launch.network {
            Attachment::Held => more.next(),
            _ => None,
        };
        let inherited = Inherited {
            exe,
            launch: launch_file,
            log,
            reaper,
            netns,
            doors: more.collect(),
        };
        match enter::enter(&launch, inherited)? {}
    })
}

/// Starts the first stage, of this name, with what it needs; `fds` are the program, the launch, the
/// log, perhaps a network that is held, and the doors of cgroups.
///
/// # Errors
/// Those of starting a process and of sending to it.
pub(super) fn start(
    stage: &str,
    fds: &[&OwnedFd],
    socket: &OwnedFd,
    far_socket: OwnedFd,
) -> std::io::Result<Child> {
    let mut command = Command::new("/proc/self/exe");
    command.arg(stage).env_clear();
    if let Some(path) = std::env::var_os("PATH") {
        command.env("PATH", path);
    }
    let mut child = {
        use std::os::unix::process::CommandExt;
        command
            .stdin(Stdio::from(far_socket))
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            // An interrupt from the keyboard is for this program to handle.
            .process_group(0)
            .spawn()?
    };
    // It must not stay open in this process: its closing is how the stages' end is seen.
    drop(command);
    let fds: Vec<_> = fds.iter().map(|fd| fd.as_fd()).collect();
    let sent = wire::send_fds(socket, &fds);
    if let Err(error) = sent {
        // It ends when it hears that; without waiting, it would stay a zombie.
        let _ = rustix::net::shutdown(socket, rustix::net::Shutdown::Both);
        let _ = child.wait();
        return Err(error);
    }
    Ok(child)
}
