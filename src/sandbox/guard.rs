//! [`Guard`]: ends a step that runs for too long, or writes too much. And [`run`], which has a step
//! run under all of its limits.
//!
//! What it has written is measured beside it, for the kernel offers no quota to who is not root of
//! the machine: first after a quarter of a second, then whenever nine times as long has passed as
//! measuring took, so that it takes a tenth of a processor at most; and once more at the end, so that
//! no step gets away by being quick. What a step deletes while it has it open is not found; of that,
//! too, no file is larger than the limit.

use std::collections::BTreeSet;
use std::ffi::{CStr, OsStr};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::EventfdFlags;
use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, ResolveFlags};

use super::cgroup::{Controller, Group, Place};
use super::choose::io as failed;
use super::{Cancel, LimitReached, Limits, Outcome, OutputSink, Process, SandboxError};
use crate::progress::Stream;

/// What a step runs under.
#[derive(Debug)]
pub(super) struct Hold<'h> {
    /// Becomes readable when the step is to be ended.
    pub(super) alarm: Option<BorrowedFd<'h>>,
    /// Its cgroups.
    pub(super) doors: &'h [OwnedFd],
}

/// Has `body` run the process under its limits. What it is given are the process with the limits
/// that stand in for cgroups, and what it has to heed; when the alarm is given it ends the step and
/// says [`SandboxError::Cancelled`].
///
/// # Errors
/// Those of `body`, [`SandboxError::LimitReached`], and [`SandboxError::Asked`] for a limit that the
/// kernel does not take.
pub(super) fn run(
    process: &Process,
    output: OutputSink<'_>,
    cancel: &Cancel,
    body: impl FnOnce(&Process, &Hold<'_>, OutputSink<'_>) -> Result<Outcome, SandboxError>,
) -> Result<Outcome, SandboxError> {
    let limits = &process.limits;
    let place = Place::of(limits)?;
    let group = Group::make(&place, limits)?;
    let doors = match &group {
        Some(group) => group.doors().map_err(failed("opening a cgroup"))?,
        None => Vec::new(),
    };
    let process = &Process {
        ulimits: limits.stand_ins(&place, &process.ulimits),
        ..process.clone()
    };
    let written_dir = process.written_dir.as_ref().unwrap_or(&process.rootfs);
    let guard = Guard::start(limits, written_dir).map_err(failed("watching over the step"))?;
    let hold = Hold {
        alarm: guard.as_ref().map(|guard| guard.alarm.as_fd()),
        doors: &doors,
    };
    let outcome = body(process, &hold, output);
    let reached = match guard.map(Guard::finish) {
        Some(reached) => reached.map_err(failed("measuring what the step has written"))?,
        None => None,
    };
    drop(doors);
    let refusals = |controller| group.as_ref().map_or(0, |group| group.refusals(controller));
    match (outcome, reached) {
        (Err(SandboxError::Cancelled), None) => Err(SandboxError::Cancelled),
        // Whoever cancelled does not care what else was wrong.
        (Err(SandboxError::Cancelled), Some(_)) if cancel.is_cancelled() => {
            Err(SandboxError::Cancelled)
        }
        (Err(SandboxError::Cancelled) | Ok(_), Some(reached)) => {
            Err(SandboxError::LimitReached(reached))
        }
        (outcome, _) => explain(outcome, limits, &refusals, output),
    }
}

/// Says what the kernel refused a step.
fn explain(
    outcome: Result<Outcome, SandboxError>,
    limits: &Limits,
    refusals: &dyn Fn(Controller) -> u64,
    output: OutputSink<'_>,
) -> Result<Outcome, SandboxError> {
    let status = match &outcome {
        Ok(Outcome::Exited(status)) => Some(*status),
        Err(_) => None,
    };
    let memory = limits
        .memory_bytes
        .filter(|_| refusals(Controller::Memory) > 0)
        .map(|bytes| LimitReached::Memory { bytes, status });
    let pids = limits
        .pids
        .filter(|_| refusals(Controller::Pids) > 0)
        .map(|pids| LimitReached::Pids { pids, status });
    match (memory.or(pids), status) {
        (None, _) => outcome,
        // It went on without, so this is for people to know.
        (Some(reached), Some(0)) => {
            let why = reached.to_string();
            let why = why.strip_prefix("exit code: 0: ").unwrap_or(&why);
            let line = format!("sockless: something in this step failed: {why}\n");
            output(Stream::Stderr, line.as_bytes());
            outcome
        }
        (Some(reached), _) => Err(SandboxError::LimitReached(reached)),
    }
}

/// A thread that watches over a step.
#[derive(Debug)]
struct Guard {
    alarm: OwnedFd,
    end: Sender<()>,
    thread: JoinHandle<io::Result<Option<LimitReached>>>,
}

/// When the first measurement is made, and the least time between two.
const FIRST_LOOK: Duration = Duration::from_millis(250);
/// How many times as long as measuring takes is waited before it is done again.
const REST: u32 = 9;

impl Guard {
    /// Starts it where there is something to watch over; `dir` is what grows.
    fn start(limits: &Limits, dir: &Path) -> io::Result<Option<Self>> {
        if limits.time.is_none() && limits.disk_bytes.is_none() {
            return Ok(None);
        }
        let begin = Instant::now();
        let disk = match limits.disk_bytes {
            Some(limit) => Some(Disk {
                dir: dir.to_owned(),
                limit,
                before: measure(dir, u64::MAX)?,
            }),
            None => None,
        };
        let alarm = rustix::event::eventfd(0, EventfdFlags::CLOEXEC)?;
        let (end, ended) = channel();
        let (time, ring) = (limits.time, alarm.try_clone()?);
        let thread = std::thread::Builder::new()
            .name("step guard".to_owned())
            .spawn(move || {
                let mut pause = FIRST_LOOK;
                loop {
                    let left = time.map(|time| time.saturating_sub(begin.elapsed()));
                    let wait = [left, disk.as_ref().map(|_| pause)];
                    let wait = wait.into_iter().flatten().min().unwrap_or(FIRST_LOOK);
                    // Nobody sends: the other end is dropped.
                    let is_over =
                        !matches!(ended.recv_timeout(wait), Err(RecvTimeoutError::Timeout));
                    let looked = Instant::now();
                    let wrote = disk.as_ref().map(Disk::is_over).transpose()?;
                    let reached = match (disk.as_ref(), time) {
                        (Some(disk), _) if wrote == Some(true) => LimitReached::Disk(disk.limit),
                        (_, Some(time)) if !is_over && begin.elapsed() >= time => {
                            LimitReached::Time(time)
                        }
                        _ if is_over => return Ok(None),
                        _ => {
                            pause = FIRST_LOOK.max(looked.elapsed() * REST);
                            continue;
                        }
                    };
                    rustix::io::write(&ring, &1_u64.to_ne_bytes())?;
                    return Ok(Some(reached));
                }
            })?;
        Ok(Some(Self { alarm, end, thread }))
    }

    /// What the step ran into; it has ended.
    fn finish(self) -> io::Result<Option<LimitReached>> {
        drop(self.end);
        self.thread
            .join()
            .unwrap_or_else(|_| Err(io::Error::other("the thread that watches has died")))
    }
}

#[derive(Debug)]
struct Disk {
    dir: PathBuf,
    limit: u64,
    before: u64,
}

impl Disk {
    fn is_over(&self) -> io::Result<bool> {
        let most = self.before.saturating_add(self.limit);
        Ok(measure(&self.dir, most)? > most)
    }
}

/// What a file takes beside its content: its header in the layer.
const ENTRY_BYTES: u64 = 512;
/// The longest path below a directory that is open: half of what the kernel takes.
const PATH_BYTES: usize = 2048;

/// How many bytes the files in `dir` take, in a layer or on the disk, whichever is more; more than
/// `most` is not counted further. Files with several names count once.
///
/// Nothing outside of `dir` is looked at, whatever is moved meanwhile; what vanishes does not count.
///
/// # Errors
/// Where `dir` itself cannot be read.
fn measure(dir: &Path, most: u64) -> io::Result<u64> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let top = Rc::new(rustix::fs::openat(CWD, dir, flags, Mode::empty())?);
    let mut sum = 0_u64;
    let mut linked = BTreeSet::new();
    let mut waiting: Vec<(Rc<OwnedFd>, PathBuf)> = vec![(top, PathBuf::from("."))];
    while let Some((base, path)) = waiting.pop() {
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
        let Ok(fd) = rustix::fs::openat2(&*base, &path, flags, Mode::empty(), resolve) else {
            continue;
        };
        let Ok(entries) = Dir::read_from(&fd) else {
            continue;
        };
        // From a path that is long, the next begin anew, however deep they lie.
        let fd = Rc::new(fd);
        let is_long = path.as_os_str().len() > PATH_BYTES;
        for entry in entries.flatten() {
            let name: &CStr = entry.file_name();
            if matches!(name.to_bytes(), b"." | b"..") {
                continue;
            }
            let Ok(stat) = rustix::fs::statat(&*fd, name, AtFlags::SYMLINK_NOFOLLOW) else {
                continue;
            };
            let kind = FileType::from_raw_mode(stat.st_mode);
            if kind == FileType::Directory {
                let name = OsStr::from_bytes(name.to_bytes());
                waiting.push(match is_long {
                    true => (Rc::clone(&fd), PathBuf::from(name)),
                    false => (Rc::clone(&base), path.join(name)),
                });
            } else if stat.st_nlink > 1 && !linked.insert(stat.st_ino) {
                continue;
            }
            let on_disk = u64::try_from(stat.st_blocks).unwrap_or(0) * 512;
            let content = match kind {
                FileType::RegularFile => u64::try_from(stat.st_size).unwrap_or(0),
                _ => 0,
            };
            sum = sum
                .saturating_add(ENTRY_BYTES)
                .saturating_add(content.max(on_disk));
            if sum > most {
                return Ok(sum);
            }
        }
    }
    Ok(sum)
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd as _;

    use super::*;

    #[test]
    fn what_is_written_is_measured() {
        let dir = tempfile::tempdir().unwrap();
        let top = dir.path().join("top");
        std::fs::create_dir(&top).unwrap();
        assert_eq!(measure(&top, u64::MAX).unwrap(), 0);
        // Holes count as what a layer has of them.
        let file = std::fs::File::create(top.join("holes")).unwrap();
        file.set_len(10 << 20).unwrap();
        let one = measure(&top, u64::MAX).unwrap();
        assert_eq!(one, ENTRY_BYTES + (10 << 20));
        std::fs::hard_link(top.join("holes"), top.join("again")).unwrap();
        assert_eq!(measure(&top, u64::MAX).unwrap(), one);
        // Nothing behind a link.
        std::fs::write(dir.path().join("outside"), vec![0; 1 << 20]).unwrap();
        std::os::unix::fs::symlink("../outside", top.join("link")).unwrap();
        std::os::unix::fs::symlink("..", top.join("up")).unwrap();
        assert_eq!(measure(&top, u64::MAX).unwrap(), one + 2 * ENTRY_BYTES);
        assert!(measure(&top, 5).unwrap() > 5);
        assert!(measure(&dir.path().join("absent"), 5).is_err());
    }

    #[test]
    fn what_lies_deeper_than_a_path_reaches_is_measured() {
        let dir = tempfile::tempdir().unwrap();
        let name = "d".repeat(200);
        let mut at = rustix::fs::open(
            dir.path(),
            OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .unwrap();
        for _ in 0..60 {
            rustix::fs::mkdirat(&at, &name, Mode::RWXU).unwrap();
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
            at = rustix::fs::openat(&at, &name, flags, Mode::empty()).unwrap();
        }
        let deep = format!("/proc/self/fd/{}/file", at.as_raw_fd());
        std::fs::File::create(deep)
            .unwrap()
            .set_len(1 << 30)
            .unwrap();
        assert!(measure(dir.path(), u64::MAX).unwrap() > 1 << 30);
    }

    fn limits(time: Option<Duration>, disk_bytes: Option<u64>) -> Limits {
        Limits {
            time,
            disk_bytes,
            ..Limits::default()
        }
    }

    #[test]
    fn a_guard_ends_what_lasts_or_grows() {
        let dir = tempfile::tempdir().unwrap();
        let wait = |guard: &Guard| {
            let mut polled = [rustix::event::PollFd::new(
                &guard.alarm,
                rustix::event::PollFlags::IN,
            )];
            rustix::event::poll(&mut polled, None).unwrap();
        };
        let time = Duration::from_millis(20);
        let guard = Guard::start(&limits(Some(time), None), dir.path());
        let guard = guard.unwrap().unwrap();
        wait(&guard);
        assert_eq!(guard.finish().unwrap(), Some(LimitReached::Time(time)));

        std::fs::write(dir.path().join("before"), vec![0; 100_000]).unwrap();
        let disk = limits(None, Some(50_000));
        let guard = Guard::start(&disk, dir.path()).unwrap().unwrap();
        std::fs::write(dir.path().join("more"), vec![0; 60_000]).unwrap();
        wait(&guard);
        assert_eq!(guard.finish().unwrap(), Some(LimitReached::Disk(50_000)));
    }

    #[test]
    fn a_step_that_is_quick_is_measured_too() {
        let dir = tempfile::tempdir().unwrap();
        let both = limits(Some(Duration::from_secs(3600)), Some(50_000));
        let guard = Guard::start(&both, dir.path()).unwrap().unwrap();
        assert_eq!(guard.finish().unwrap(), None);
        let guard = Guard::start(&both, dir.path()).unwrap().unwrap();
        std::fs::write(dir.path().join("more"), vec![0; 60_000]).unwrap();
        assert_eq!(guard.finish().unwrap(), Some(LimitReached::Disk(50_000)));
        assert!(
            Guard::start(&limits(None, None), dir.path())
                .unwrap()
                .is_none()
        );
    }

    #[test]
    fn what_was_refused_is_told_as_what_it_is() {
        let limits = Limits {
            memory_bytes: Some(1 << 20),
            pids: Some(7),
            ..Limits::default()
        };
        let check = |status, memory, pids, said: &str, expected: Result<i32, &str>| {
            let mut text = Vec::new();
            let mut sink = |stream, bytes: &[u8]| {
                assert_eq!(stream, Stream::Stderr);
                text.extend_from_slice(bytes);
            };
            let refusals = |controller| match controller {
                Controller::Memory => memory,
                _ => pids,
            };
            let outcome = explain(Ok(Outcome::Exited(status)), &limits, &refusals, &mut sink);
            let outcome = outcome.map(|Outcome::Exited(status)| status);
            assert_eq!(
                outcome.map_err(|error| error.to_string()),
                expected.map_err(str::to_owned)
            );
            assert_eq!(String::from_utf8(text).unwrap(), said);
        };
        check(3, 0, 0, "", Ok(3));
        let killed = "exit code: 3: killed for memory, of which the limit is 1MiB (--memory)";
        check(3, 1, 0, "", Err(killed));
        check(3, 1, 1, "", Err(killed));
        let refused =
            "exit code: 3: no more than 7 processes and threads were allowed (--pids-limit)";
        check(3, 0, 1, "", Err(refused));
        let line = "sockless: something in this step failed: killed for memory, of which the limit is \
                    1MiB (--memory)\n";
        check(0, 2, 0, line, Ok(0));
    }
}
