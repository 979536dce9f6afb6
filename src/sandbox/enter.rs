//! `__enter`: enters the last namespaces, has everything mounted, and becomes the runtime.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use rustix::io::FdFlags;
use rustix::thread::{LinkNameSpaceType, UnshareFlags};

use super::mounts::{self, View};
use super::wire::{Attachment, Doing, Failure, Launch, Report, RuntimeKind};
use super::{Security, bwrap, netlink, network, runc, sys, wire};

/// The file descriptors that the innermost stage is started with, in the order of its
/// arguments: its own program, the launch, the reports, standard output and error. Those of cgroups
/// follow.
pub(super) const INIT_FDS: std::ops::RangeInclusive<i32> = 3..=7;

/// What a step is started with.
pub(super) struct Inherited {
    /// A copy of this program that nobody can write.
    pub(super) exe: OwnedFd,
    /// The launch.
    pub(super) launch: OwnedFd,
    /// Where the runtime writes.
    pub(super) log: OwnedFd,
    /// The other end, at `__reap`, waits until the namespaces are there, and answers.
    pub(super) reaper: OwnedFd,
    /// The network, where another process holds it.
    pub(super) netns: Option<OwnedFd>,
    /// Files by which the innermost stage enters cgroups.
    pub(super) doors: Vec<OwnedFd>,
}

/// Does what the module says; returns only where that failed.
pub(super) fn enter(
    launch: &Launch,
    inherited: Inherited,
) -> Result<std::convert::Infallible, Failure> {
    // No terminal of the user can be reached, and none of their keys.
    rustix::process::setsid().doing(|| "starting a session".to_owned())?;
    // Where that fails, keyrings cannot be used at all, and there is none to be inherited.
    let _ = sys::join_new_keyring();
    let mut namespaces = UnshareFlags::NEWNS;
    if !matches!(launch.network, Attachment::Host | Attachment::Held) {
        namespaces |= UnshareFlags::NEWNET;
    }
    if launch.process.security == Security::Insecure {
        // Only who owns this namespace may mount cgroups.
        namespaces |= UnshareFlags::NEWCGROUP;
    }
    if matches!(launch.network, Attachment::Held) {
        let doing = || "entering the network".to_owned();
        let netns = inherited.netns.as_ref().ok_or(rustix::io::Errno::BADF);
        let netns = netns.doing(doing)?.as_fd();
        let kind = Some(LinkNameSpaceType::Network);
        rustix::thread::move_into_link_name_space(netns, kind).doing(doing)?;
    }
    sys::unshare(namespaces).doing(|| "entering mount and network namespaces".to_owned())?;
    if namespaces.contains(UnshareFlags::NEWNET) {
        netlink::bring_loopback_up().doing(|| "bringing the loopback up".to_owned())?;
    }
    wait_for_reaper(&inherited.reaper)?;
    if matches!(launch.network, Attachment::Private(_)) {
        network::hide_metadata()?;
    }
    let view = mounts::mount_all(launch)?;
    become_runtime(launch, &view, inherited)
}

/// Makes a network, hands it to who listens, and answers as long as they ask whether anything
/// is left in it of who used it.
pub(super) fn hold_network(launch: &Launch, reaper: &OwnedFd) -> Result<(), Failure> {
    rustix::process::setsid().doing(|| "starting a session".to_owned())?;
    sys::unshare(UnshareFlags::NEWNET).doing(|| "entering a network namespace".to_owned())?;
    netlink::bring_loopback_up().doing(|| "bringing the loopback up".to_owned())?;
    wait_for_reaper(reaper)?;
    if matches!(launch.network, Attachment::Private(_)) {
        network::hide_metadata()?;
    }
    let doing = || "handing the network over".to_owned();
    let netns = std::fs::File::open("/proc/self/ns/net").doing(doing)?;
    let socket = rustix::stdio::stdin();
    wire::send_report_with(socket, &Report::Network, &[netns.as_fd()]);
    drop(netns);
    let mut byte = [0];
    loop {
        let asked = rustix::io::retry_on_intr(|| rustix::io::read(socket, &mut byte[..]));
        if asked.doing(doing)? == 0 {
            return Ok(());
        }
        let answer = match network::is_unused().doing(doing)? {
            true => wire::UNUSED,
            false => wire::USED,
        };
        rustix::io::write(socket, &[answer]).doing(doing)?;
    }
}

/// Tells `__reap` that the namespaces are there, and waits until the network is attached.
fn wait_for_reaper(socket: &OwnedFd) -> Result<(), Failure> {
    let doing = || "waiting for the network".to_owned();
    rustix::io::write(socket, b"n").doing(doing)?;
    let mut byte = [0];
    match rustix::io::retry_on_intr(|| rustix::io::read(socket, &mut byte[..])).doing(doing)? {
        0 => Err(Failure::new(doing(), &io::ErrorKind::UnexpectedEof.into())),
        _ => Ok(()),
    }
}

fn become_runtime(
    launch: &Launch,
    view: &View,
    inherited: Inherited,
) -> Result<std::convert::Infallible, Failure> {
    let base = &launch.process.rootfs;
    let program = &launch.runtime.program;
    let count = INIT_FDS.count() + inherited.doors.len();
    let mut command = Command::new(program);
    match launch.runtime.kind {
        RuntimeKind::Bwrap => {
            command.args(bwrap::args(view, &init_args(count)));
        }
        kind => {
            // Its configuration is JSON, whose strings are Unicode.
            if base.to_str().is_none() {
                let error = io::Error::from(rustix::io::Errno::ILSEQ);
                let doing = format!("describing {} to {}", base.display(), kind.name());
                return Err(Failure::new(doing, &error));
            }
            let bundle = base.join("bundle");
            let config = runc::spec(view, &init_args(count)).to_string();
            let doing = || format!("writing {}", bundle.join("config.json").display());
            std::fs::create_dir(&bundle).doing(doing)?;
            std::fs::write(bundle.join("config.json"), config).doing(doing)?;
            command.args(runc::args(kind, &base.join("state"), &bundle, count));
        }
    }
    let doing = || "handing file descriptors to the runtime".to_owned();
    let stdio = |fd: &OwnedFd| aside(fd.as_fd()).map(Stdio::from);
    command
        .env_clear()
        .env(
            "PATH",
            "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        )
        .env("LC_ALL", "C")
        // runc and crun want a place for state even when told where to put it.
        .env("XDG_RUNTIME_DIR", base)
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(stdio(&inherited.log).doing(doing)?)
        .stderr(stdio(&inherited.log).doing(doing)?);
    let Inherited {
        exe,
        launch,
        log,
        reaper,
        netns,
        doors,
    } = inherited;
    // What is handed over has numbers of its own, which must be free.
    drop((log, reaper, netns));
    let passed = hand_over(exe, launch, doors).doing(doing)?;
    let error = command.exec();
    drop(passed);
    Err(Failure::new(
        format!("running {}", program.display()),
        &error,
    ))
}

/// A number far above those of the file descriptors of this process.
const OUT_OF_THE_WAY: i32 = 64;

/// Duplicates a file descriptor to where it is in nobody's way.
pub(super) fn aside(fd: BorrowedFd<'_>) -> rustix::io::Result<OwnedFd> {
    rustix::io::fcntl_dupfd_cloexec(fd, OUT_OF_THE_WAY)
}

/// Gives the file descriptors of the innermost stage the numbers from [`INIT_FDS`] on, which stay
/// open when a program is executed. These must be free but for the given ones.
pub(super) fn hand_over(
    exe: OwnedFd,
    launch: OwnedFd,
    doors: Vec<OwnedFd>,
) -> io::Result<Vec<OwnedFd>> {
    let mut fds = vec![
        aside(exe.as_fd())?,
        aside(launch.as_fd())?,
        aside(rustix::stdio::stdin())?,
        aside(rustix::stdio::stdout())?,
        aside(rustix::stdio::stderr())?,
    ];
    for door in &doors {
        fds.push(aside(door.as_fd())?);
    }
    drop((exe, launch, doors));
    let mut passed = Vec::new();
    for (fd, number) in fds.iter().zip(*INIT_FDS.start()..) {
        let duplicate = rustix::io::fcntl_dupfd_cloexec(fd, number)?;
        if duplicate.as_raw_fd() != number {
            return Err(io::Error::other(format!(
                "number {number} is in use by something else"
            )));
        }
        rustix::io::fcntl_setfd(&duplicate, FdFlags::empty())?;
        passed.push(duplicate);
    }
    Ok(passed)
}

/// The command line of the innermost stage with so many file descriptors.
pub(super) fn init_args(count: usize) -> Vec<OsString> {
    let numbers = (*INIT_FDS.start()..).take(count);
    let exe = format!("/proc/self/fd/{}", INIT_FDS.start());
    [exe, "__init".to_owned()]
        .into_iter()
        .chain(numbers.map(|fd| fd.to_string()))
        .map(OsString::from)
        .collect()
}
