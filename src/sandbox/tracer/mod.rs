//! Owners and users for a step that has one ID only, by tracing its system calls (`ptrace(2)`).
//!
//! In a user namespace with one ID no file can be given away, and nobody can become another user.
//! So the step's calls for that are answered here, as the kernel would have: who a process is, is
//! kept for each ([`ids`]), and whom a file belongs to is noted by its inode
//! ([`crate::owners::Inodes`]), which calls like `stat(2)` then show. Everything else is the
//! kernel's own doing: paths are resolved by it, in the step's namespaces, and a filter has only
//! the calls stop that matter ([`calls`]).
//!
//! ```text
//! stat        runs; of what it found, owner and group are replaced
//! chown       the file is opened for its inode; chown runs, to nobody else; the owner is noted
//! link        the same, as the new name can have another inode in an overlay mount
//! open, mkdir runs; whom the new file belongs to is noted: the process, or its directory's group
//! setuid …    is answered, and the kernel not asked
//! ```
//!
//! What differs from a kernel that has the users: permissions are root's, whoever a process is;
//! `/proc` shows root; and no process can trace another, as debuggers do.

mod calls;
mod files;
mod ids;
mod jobs;
mod ptrace;
mod registers;

use std::collections::HashMap;
use std::io;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use rustix::process::Pid;

use files::{inode, proc};
use ids::Ids;
use jobs::Job;
use ptrace::{Go, Stop};

use crate::owners::{Inodes, Owner};

pub(super) use calls::filter;

/// What tells a step that it is traced.
pub(super) const TRACED: u8 = b't';

/// Leaves an ID as it is.
const KEEP: u32 = u32::MAX;

/// Whether this process may trace `pid`, which is killed with this thread if so.
///
/// # Errors
/// That of `ptrace(2)`.
pub(super) fn may_trace(pid: Pid) -> io::Result<()> {
    ptrace::seize(pid)
}

/// Traces `pid`, and all that it starts, until they have ended; whom their files belong to is kept
/// true in `inodes`. `files` of its root filesystem belong to others from the begin. `ready` gets [`TRACED`] when they can begin. Call it on a thread of its own.
///
/// # Errors
/// Those of `ptrace(2)`: `EPERM` where this process may not trace that one. All that is traced is
/// killed then.
pub(super) fn trace(
    pid: Pid,
    inodes: &Inodes,
    files: &[(PathBuf, Owner)],
    ready: BorrowedFd<'_>,
) -> io::Result<()> {
    ptrace::seize(pid)?;
    // Without what is there, owners would be lost, and nobody told.
    std::fs::read_link(proc(pid, "exe"))?;
    for (path, owner) in files {
        let path = proc(pid, "root").join(path.strip_prefix("/").unwrap_or(path));
        if let Ok(found) = std::fs::metadata(path) {
            inodes.set(inode(&found), *owner);
        }
    }
    let mut tracer = Tracer {
        inodes,
        threads: HashMap::from([(pid, Thread::default())]),
        early: Vec::new(),
    };
    rustix::io::write(ready, &[TRACED])?;
    while let Some((pid, stop)) = ptrace::wait()? {
        match tracer.stopped(pid, stop) {
            // It was killed meanwhile, and its end is still to come.
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => {}
            other => other?,
        }
    }
    Ok(())
}

struct Tracer<'i> {
    inodes: &'i Inodes,
    threads: HashMap<Pid, Thread>,
    /// New threads that have stopped before their parents told of them.
    early: Vec<Pid>,
}

/// A thread of the step.
#[derive(Clone, Debug, Default)]
struct Thread {
    ids: Ids,
    work: Work,
}

/// What a thread has to do beside its own.
#[derive(Clone, Debug, Default)]
enum Work {
    /// Nothing.
    #[default]
    None,
    /// The next call is its own, which was looked at before; until then all signals are blocked,
    /// and then these.
    Pass(Option<u64>),
    /// A call of its own, or some in its place.
    Do(Box<Job>),
}

impl Tracer<'_> {
    fn stopped(&mut self, pid: Pid, stop: Stop) -> io::Result<()> {
        match stop {
            Stop::Ended => {
                self.threads.remove(&pid);
                self.early.retain(|early| *early != pid);
                Ok(())
            }
            Stop::Event(libc::PTRACE_EVENT_SECCOMP, _) => self.asked(pid),
            Stop::Call => self.call(pid),
            Stop::Event(
                libc::PTRACE_EVENT_FORK | libc::PTRACE_EVENT_VFORK | libc::PTRACE_EVENT_CLONE,
                _,
            ) => self.forked(pid),
            Stop::Event(libc::PTRACE_EVENT_EXEC, _) => self.executed(pid),
            Stop::Event(libc::PTRACE_EVENT_STOP, signal) => self.rested(pid, signal),
            Stop::Event(..) => ptrace::go(pid, Go::On, 0),
            Stop::Signal(signal) => ptrace::go(pid, Go::On, signal),
        }
    }

    /// A new thread stops before it does anything, and others for job control.
    fn rested(&mut self, pid: Pid, signal: i32) -> io::Result<()> {
        if !self.threads.contains_key(&pid) {
            self.early.push(pid);
            return Ok(());
        }
        let is_job_control =
            [libc::SIGSTOP, libc::SIGTSTP, libc::SIGTTIN, libc::SIGTTOU].contains(&signal);
        match is_job_control {
            true => ptrace::go(pid, Go::Nowhere, 0),
            false => ptrace::go(pid, Go::On, 0),
        }
    }

    fn forked(&mut self, pid: Pid) -> io::Result<()> {
        if let Some(child) = new_pid(ptrace::message(pid)?) {
            let ids = self.ids(pid).clone();
            let thread = Thread {
                ids,
                work: Work::None,
            };
            self.threads.insert(child, thread);
            if let Some(at) = self.early.iter().position(|early| *early == child) {
                self.early.swap_remove(at);
                ignore_gone(ptrace::go(child, Go::On, 0))?;
            }
        }
        ptrace::go(pid, Go::On, 0)
    }

    /// All other threads are gone, and this one has the number of the first.
    fn executed(&mut self, pid: Pid) -> io::Result<()> {
        if let Some(former) = new_pid(ptrace::message(pid)?)
            && former != pid
            && let Some(thread) = self.threads.remove(&former)
        {
            self.threads.insert(pid, thread);
        }
        if let Ok(found) = std::fs::metadata(proc(pid, "exe")) {
            let owner = self.inodes.get(inode(&found));
            // As the kernel does it: what bubblewrap has forbidden stays so.
            let mode = match has_no_new_privileges(pid) {
                true => 0,
                false => found.mode(),
            };
            self.ids(pid).execute(mode, owner.uid, owner.gid);
        }
        self.thread(pid).work = Work::None;
        ptrace::go(pid, Go::On, 0)
    }

    fn thread(&mut self, pid: Pid) -> &mut Thread {
        self.threads.entry(pid).or_default()
    }

    fn ids(&mut self, pid: Pid) -> &mut Ids {
        &mut self.thread(pid).ids
    }

    /// The filter asks about a call that is about to begin.
    fn asked(&mut self, pid: Pid) -> io::Result<()> {
        match self.thread(pid).work {
            Work::None => {}
            Work::Pass(blocked) => {
                self.thread(pid).work = Work::None;
                if let Some(blocked) = blocked {
                    ptrace::block(pid, blocked)?;
                }
                return ptrace::go(pid, Go::On, 0);
            }
            // Of the step's own making.
            Work::Do(_) => return ptrace::go(pid, Go::ToCall, 0),
        }
        let registers = ptrace::registers(pid)?;
        let call = registers.call();
        let Some(meaning) = calls::meaning(&call) else {
            return ptrace::go(pid, Go::On, 0);
        };
        self.begin(pid, &registers, &call, meaning)
    }
}

/// Whether setuid programs give the process nothing (`no_new_privs`).
fn has_no_new_privileges(pid: Pid) -> bool {
    let status = std::fs::read_to_string(proc(pid, "status")).unwrap_or_default();
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("NoNewPrivs:"));
    line.is_none_or(|value| value.trim() != "0")
}

fn new_pid(number: u64) -> Option<Pid> {
    Pid::from_raw(i32::try_from(number).ok()?)
}

fn ignore_gone(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(()),
        other => other,
    }
}
