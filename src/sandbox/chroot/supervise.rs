//! `__chroot`: the process that makes a step without a PID namespace mortal.
//!
//! It is the "subreaper" of the step: whatever the step starts, and however that hides, becomes its
//! child when its own parent ends. It hears on its socket when sockless is gone, by whatever death.
//! It outlives the step's processes by design, and ends when they have.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::process::{DumpableBehavior, Pid, PidfdFlags, Signal, WaitOptions};

use super::super::landlock::Landlock;
use super::super::wire::{self, Doing, Failure, Launch, Report};
use super::super::{MountSource, enter, supervise, sys};
use super::open_root;
use crate::confined::ConfinedDir;

/// How long killed processes are given before they are looked for again.
const PAUSE: Duration = Duration::from_millis(1);

/// `__chroot`: receives its file descriptors on standard input, starts the step's `__init` and
/// waits until nothing is left of it.
pub(in super::super) fn supervise_main() -> i32 {
    supervise::stage(|| {
        let fds =
            wire::receive_fds(rustix::stdio::stdin()).doing(|| "receiving files".to_owned())?;
        let mut fds = fds.into_iter();
        let (Some(exe), Some(launch), Some(log)) = (fds.next(), fds.next(), fds.next()) else {
            return Err(Failure::new("receiving files", &Errno::BADF.into()));
        };
        let fds = Received {
            exe,
            launch,
            log,
            doors: fds.collect(),
        };
        let launch = wire::read_launch(&fds.launch).doing(|| "reading the launch".to_owned())?;
        let landlock = Landlock::here();
        prepare(landlock)?;
        // The step must find its descriptors at their numbers, so these come first.
        let mut child = start_init(fds)?;
        let secrets = open_secrets(&launch);
        let status = match &secrets {
            Ok(_) => wait(&mut child),
            Err(_) => Ok(None),
        };
        let ended = end_all(landlock);
        wipe(secrets?)?;
        ended.doing(|| "ending what is left of the step".to_owned())?;
        if let Some(status) = status? {
            wire::send_report(rustix::stdio::stdin(), &Report::Exited(status));
        }
        Ok(())
    })
}

struct Received {
    exe: OwnedFd,
    launch: OwnedFd,
    log: OwnedFd,
    /// Into the step's cgroups.
    doors: Vec<OwnedFd>,
}

/// Makes this process what it has to be before it starts anything.
fn prepare(landlock: Landlock) -> Result<(), Failure> {
    let doing = || "preparing to supervise the step".to_owned();
    // No key of the user can be reached; `__init` sees to their terminal.
    let _ = sys::join_new_keyring();
    // Only its own children are its to end; by this call they are all that the step starts.
    rustix::process::set_child_subreaper(Some(rustix::process::getpid())).doing(doing)?;
    // Nobody traces it who has not got more capabilities than a step.
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable).doing(doing)?;
    rustix::thread::set_no_new_privs(true).doing(doing)?;
    landlock
        .scope_signals(open_root().doing(doing)?.as_fd())
        .doing(doing)
}

fn start_init(fds: Received) -> Result<Child, Failure> {
    let doing = || "handing file descriptors to the step".to_owned();
    let [stdout, stderr] = [(); 2].map(|()| enter::aside(fds.log.as_fd()).map(Stdio::from));
    let args = enter::init_args(enter::INIT_FDS.count() + fds.doors.len());
    let [program, args @ ..] = &args[..] else {
        unreachable!("there is a program");
    };
    let mut command = Command::new(program);
    command
        .args(args)
        .env_clear()
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(stdout.doing(doing)?)
        .stderr(stderr.doing(doing)?);
    drop(fds.log);
    let passed = enter::hand_over(fds.exe, fds.launch, fds.doors).doing(doing)?;
    let child = command.spawn();
    drop(passed);
    child.doing(|| "starting the step".to_owned())
}

/// Opens the files that stand in for files in memory, wherever the step takes them.
fn open_secrets(launch: &Launch) -> Result<Vec<std::fs::File>, Failure> {
    let process = &launch.process;
    let files = process.mounts.iter();
    let files = files.filter(|mount| matches!(mount.source, MountSource::File { .. }));
    let mut open = Vec::new();
    for mount in files {
        let doing = || {
            format!(
                "opening the file that stands in at {}",
                mount.target.display()
            )
        };
        let root = ConfinedDir::open(&process.rootfs).doing(doing)?;
        // The later one of two with one target.
        let file = root.open_at(&mount.target, OFlags::WRONLY, Mode::empty());
        open.push(std::fs::File::from(file.doing(doing)?));
    }
    Ok(open)
}

/// Takes what is in them out of the files, under whatever names the step has given them.
fn wipe(secrets: Vec<std::fs::File>) -> Result<(), Failure> {
    for secret in secrets {
        secret
            .set_len(0)
            .doing(|| "emptying a file that stood in for one in memory".to_owned())?;
    }
    Ok(())
}

/// Waits for the step, and returns how it ended; nothing when nobody listens any more.
fn wait(child: &mut Child) -> Result<Option<i32>, Failure> {
    let doing = || "waiting for the step".to_owned();
    let pidfd = Pid::from_raw(child.id().cast_signed())
        .ok_or(Errno::SRCH)
        .and_then(|pid| rustix::process::pidfd_open(pid, PidfdFlags::empty()))
        .doing(doing)?;
    let mut polled = [
        PollFd::new(&pidfd, PollFlags::IN),
        PollFd::from_borrowed_fd(rustix::stdio::stdin(), PollFlags::empty()),
    ];
    rustix::io::retry_on_intr(|| rustix::event::poll(&mut polled, None)).doing(doing)?;
    if polled[0].revents().is_empty() {
        return Ok(None);
    }
    let status: ExitStatus = child.wait().doing(doing)?;
    Ok(Some(match (status.code(), status.signal()) {
        (Some(code), _) => code,
        (None, signal) => 128 + signal.unwrap_or_default(),
    }))
}

/// Kills until no child is left, and none can come any more.
fn end_all(landlock: Landlock) -> io::Result<()> {
    loop {
        // Only then are these the step's alone.
        if landlock.scopes_signals() {
            match sys::kill_all_others() {
                Err(error) if error.raw_os_error() != Some(libc::ESRCH) => return Err(error),
                _ => {}
            }
        } else {
            kill_children()?;
        }
        loop {
            match rustix::process::wait(WaitOptions::NOHANG) {
                Ok(Some(_)) | Err(Errno::INTR) => {}
                Ok(None) => break,
                Err(Errno::CHILD) => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
        std::thread::sleep(PAUSE);
    }
}

/// Kills the children of this process. Theirs become this process's own by that, and are next.
fn kill_children() -> io::Result<()> {
    let own = rustix::process::getpid();
    for entry in std::fs::read_dir("/proc")? {
        let name = entry?.file_name();
        let number = name.to_str().and_then(|name| name.parse().ok());
        let Some(pid) = number.and_then(Pid::from_raw) else {
            continue;
        };
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero()));
        if stat.is_ok_and(|stat| parent_in(&stat) == Some(own)) {
            // A child that ended keeps its number until this process waits for it.
            let _ = rustix::process::kill_process(pid, Signal::KILL);
        }
    }
    Ok(())
}

/// The parent in the text of `/proc/PID/stat`. The program's name may have anything in it.
fn parent_in(stat: &str) -> Option<Pid> {
    let (_, rest) = stat.rsplit_once(") ")?;
    let parent = rest.split(' ').nth(1)?;
    Pid::from_raw(parent.parse().ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_parent_is_found_behind_any_name() {
        let parent = |stat: &str| parent_in(stat).map(|pid| pid.as_raw_nonzero().get());
        assert_eq!(parent("7 (sh) S 5 7 7 0 -1"), Some(5));
        assert_eq!(parent("7 (a) R 1 () S 5 7 7 0 -1"), Some(5));
        assert_eq!(parent("1 (init) S 0 1 1 0 -1"), None);
        assert_eq!(parent(""), None);
    }
}
