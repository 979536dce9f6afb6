//! Calls that are carried out in steps: what is asked of the kernel in place of a call or after it,
//! and what comes of it.

use std::io;

use rustix::io::Errno;
use rustix::process::Pid;

use super::calls::{self, At, Meaning};
use super::files::{descriptor, inode};
use super::ids::{Change, GROUPS_MAX};
use super::ptrace::{self, Go};
use super::registers::{Call, Registers};
use super::{KEEP, Tracer, Work};
use crate::owners::Inode;

/// A call that is carried out in steps.
#[derive(Clone, Debug)]
pub(super) struct Job {
    /// The thread's registers at the begin of its call.
    original: Registers,
    /// The signals that it blocks, where all are blocked meanwhile.
    blocked: Option<u64>,
    step: Step,
}

/// What has been asked of the kernel last, and what for.
#[derive(Clone, Copy, Debug)]
enum Step {
    /// `stat(2)`, into this place.
    Stat { buffer: u64, is_statx: bool },
    /// A descriptor for the file that is to get an owner; then the call itself.
    ToChown { ids_at: usize, uid: u32, gid: u32 },
    /// The call itself, to nobody else; then the descriptor is closed.
    Chown {
        fd: i32,
        uid: u32,
        gid: u32,
        is_ours: bool,
    },
    /// Whether there is a file; then the call itself.
    IsThere,
    /// The call that opens a new file.
    Open,
    /// A descriptor for the file that is to get another name; then the call itself.
    ToLink(At),
    /// The call itself; then a descriptor for the new name.
    Link { fd: i32, to: At },
    /// A descriptor for the new name, which is closed, and then the first one.
    Linked { fd: i32 },
    /// One of two descriptors is closed; then the other.
    CloseTwo { other: i32 },
    /// The call that makes a directory, link or special file; then a descriptor for it.
    Make(At),
    /// A descriptor for what was made; then it is closed.
    Made,
    /// A descriptor is closed; the call's result is this.
    Close { result: i64 },
}

impl Tracer<'_> {
    pub(super) fn begin(
        &mut self,
        pid: Pid,
        registers: &Registers,
        call: &Call,
        meaning: Meaning,
    ) -> io::Result<()> {
        let is_owned = !self.inodes.is_empty();
        match meaning {
            Meaning::Stat(_) | Meaning::Statx(_) if !is_owned => ptrace::go(pid, Go::On, 0),
            Meaning::Stat(buffer) => {
                let is_statx = false;
                self.watch(pid, registers, Step::Stat { buffer, is_statx })
            }
            Meaning::Statx(buffer) => {
                let is_statx = true;
                self.watch(pid, registers, Step::Stat { buffer, is_statx })
            }
            Meaning::ChownOpen { fd, uid, gid } => {
                self.chown_open(pid, registers, call, fd, (uid, gid))
            }
            Meaning::Chown {
                at,
                may_be_empty,
                uid,
                gid,
                ids_at,
            } => {
                if may_be_empty && is_empty(pid, at.path) && at.dir >= 0 {
                    return self.chown_open(pid, registers, call, at.dir, (uid, gid));
                }
                let step = Step::ToChown { ids_at, uid, gid };
                self.instead(pid, registers, open_call(&at), step)
            }
            Meaning::Open { at, is_new } => self.open(pid, registers, at, is_new),
            Meaning::OpenHow { at, how } => {
                let mut flags = [0; 8];
                let flags = match ptrace::read_memory(pid, how, &mut flags) {
                    // The kernel says what is wrong with it.
                    Err(_) => 0,
                    Ok(()) => u64::from_ne_bytes(flags) as u32,
                };
                match calls::open(at, flags) {
                    Some(Meaning::Open { at, is_new }) => self.open(pid, registers, at, is_new),
                    _ => ptrace::go(pid, Go::On, 0),
                }
            }
            Meaning::Make(at) => self.watch(pid, registers, Step::Make(at)),
            Meaning::Link { .. } if !is_owned => ptrace::go(pid, Go::On, 0),
            // A file without a name, which was made a moment ago: its inode stays.
            Meaning::Link {
                from, may_be_empty, ..
            } if may_be_empty && is_empty(pid, from.path) => ptrace::go(pid, Go::On, 0),
            Meaning::Link { from, to, .. } => {
                self.instead(pid, registers, open_call(&from), Step::ToLink(to))
            }
            Meaning::Become(change) => {
                let result = self.ids(pid).change(&change).map(u64::from);
                answer(pid, registers, result)
            }
            Meaning::SetGroups { count, list } => {
                let result = read_groups(pid, count, list)
                    .and_then(|groups| self.ids(pid).change(&Change::Groups(groups)));
                answer(pid, registers, result.map(u64::from))
            }
            Meaning::Tell { kind, effective } => {
                let four = *self.ids(pid).four(kind);
                let id = if effective { four.effective } else { four.real };
                answer(pid, registers, Ok(id.into()))
            }
            Meaning::TellThree { kind, places } => {
                let four = *self.ids(pid).four(kind);
                let ids = [four.real, four.effective, four.saved];
                let written = places.iter().zip(ids).try_for_each(|(place, id)| {
                    ptrace::write_memory(pid, *place, &id.to_ne_bytes())
                });
                answer(
                    pid,
                    registers,
                    written.map(|()| 0).map_err(|_| Errno::FAULT),
                )
            }
            Meaning::TellGroups { count, list } => {
                let groups = self.ids(pid).groups.clone();
                answer(pid, registers, write_groups(pid, &groups, count, list))
            }
        }
    }

    /// Lets the call run to its end, and looks at it again then.
    fn watch(&mut self, pid: Pid, registers: &Registers, step: Step) -> io::Result<()> {
        self.thread(pid).work = Work::Do(Box::new(Job {
            original: *registers,
            blocked: None,
            step,
        }));
        ptrace::go(pid, Go::ToCall, 0)
    }

    /// Makes another call in place of the one that is about to begin.
    fn instead(
        &mut self,
        pid: Pid,
        registers: &Registers,
        call: Call,
        step: Step,
    ) -> io::Result<()> {
        // A handler would run between two calls, with registers that are not its thread's.
        let blocked = ptrace::blocked(pid)?;
        ptrace::block(pid, u64::MAX)?;
        self.thread(pid).work = Work::Do(Box::new(Job {
            original: *registers,
            blocked: Some(blocked),
            step,
        }));
        let mut changed = *registers;
        changed.replace(call);
        begin_call(pid, &changed, call.number)?;
        ptrace::go(pid, Go::ToCall, 0)
    }

    fn chown_open(
        &mut self,
        pid: Pid,
        registers: &Registers,
        call: &Call,
        fd: i32,
        (uid, gid): (u32, u32),
    ) -> io::Result<()> {
        let found = std::fs::metadata(descriptor(pid, fd));
        if let Ok(found) = &found
            && !self.may_chown(pid, inode(found), uid, gid)
        {
            return answer(pid, registers, Err(Errno::PERM));
        }
        let ids_at = match call.number {
            libc::SYS_fchown => 1,
            _ => 2,
        };
        let step = Step::Chown {
            fd,
            uid,
            gid,
            is_ours: false,
        };
        self.instead(pid, registers, to_nobody_else(call, ids_at), step)
    }

    /// Whether a process may give this file to that owner: root any, its owner to a group of theirs.
    fn may_chown(&mut self, pid: Pid, inode: Inode, uid: u32, gid: u32) -> bool {
        let owner = self.inodes.get(inode);
        let ids = self.ids(pid);
        let is_owner = ids.user.filesystem == owner.uid;
        let keeps_user = uid == KEEP || (is_owner && uid == owner.uid);
        let keeps_group = gid == KEEP || (is_owner && (gid == owner.gid || ids.is_in(gid)));
        ids.is_root() || (keeps_user && keeps_group)
    }

    fn open(&mut self, pid: Pid, registers: &Registers, at: At, is_new: bool) -> io::Result<()> {
        if is_new {
            return self.watch(pid, registers, Step::Open);
        }
        let call = Call {
            number: libc::SYS_faccessat,
            arguments: [at.dir as u64, at.path, libc::F_OK as u64, 0, 0, 0],
        };
        self.instead(pid, registers, call, Step::IsThere)
    }

    /// A call begins or has ended that somebody waits for.
    pub(super) fn call(&mut self, pid: Pid) -> io::Result<()> {
        if !ptrace::is_at_end(pid)? {
            return ptrace::go(pid, Go::ToCall, 0);
        }
        let Work::Do(job) = std::mem::take(&mut self.thread(pid).work) else {
            return ptrace::go(pid, Go::On, 0);
        };
        let registers = ptrace::registers(pid)?;
        self.ended(pid, *job, &registers)
    }

    fn ended(&mut self, pid: Pid, mut job: Job, registers: &Registers) -> io::Result<()> {
        let result = registers.result();
        let has_failed = (-4095..0).contains(&result);
        let own = job.original.call();
        match job.step {
            Step::Stat { buffer, is_statx } => {
                if !has_failed {
                    self.show(pid, buffer, is_statx);
                }
                ptrace::go(pid, Go::On, 0)
            }
            Step::ToChown { .. } if has_failed => self.finish(pid, &job, result),
            Step::ToChown { ids_at, uid, gid } => {
                let fd = result as i32;
                let found = std::fs::metadata(descriptor(pid, fd));
                if let Ok(found) = found
                    && !self.may_chown(pid, inode(&found), uid, gid)
                {
                    return self.close(pid, job, registers, fd, -i64::from(libc::EPERM));
                }
                job.step = Step::Chown {
                    fd,
                    uid,
                    gid,
                    is_ours: true,
                };
                self.next(pid, job, registers, to_nobody_else(&own, ids_at))
            }
            Step::Chown {
                fd,
                uid,
                gid,
                is_ours,
            } => {
                if !has_failed {
                    self.note_owner(pid, fd, uid, gid);
                }
                match is_ours {
                    true => self.close(pid, job, registers, fd, result),
                    false => self.finish(pid, &job, result),
                }
            }
            Step::IsThere if result == -i64::from(libc::ENOENT) => {
                job.step = Step::Open;
                self.next(pid, job, registers, own)
            }
            Step::IsThere => self.pass(pid, &job, own),
            Step::Open => {
                if !has_failed {
                    self.note_new(pid, result as i32);
                }
                self.finish(pid, &job, result)
            }
            Step::ToLink(_) if has_failed => self.finish(pid, &job, result),
            Step::ToLink(to) => {
                let fd = result as i32;
                job.step = Step::Link { fd, to };
                self.next(pid, job, registers, own)
            }
            Step::Link { fd, .. } if has_failed => self.close(pid, job, registers, fd, result),
            Step::Link { fd, to } => {
                job.step = Step::Linked { fd };
                self.next(pid, job, registers, open_call(&to))
            }
            Step::Linked { fd } if has_failed => self.close(pid, job, registers, fd, 0),
            Step::Linked { fd } => {
                let new = result as i32;
                self.note_same(pid, fd, new);
                job.step = Step::CloseTwo { other: fd };
                self.next(pid, job, registers, close_call(new))
            }
            Step::CloseTwo { other } => self.close(pid, job, registers, other, 0),
            Step::Make(_) if has_failed => self.finish(pid, &job, result),
            Step::Make(at) => {
                job.step = Step::Made;
                self.next(pid, job, registers, open_call(&at))
            }
            Step::Made if has_failed => self.finish(pid, &job, 0),
            Step::Made => {
                let fd = result as i32;
                self.note_new(pid, fd);
                self.close(pid, job, registers, fd, 0)
            }
            Step::Close { result } => self.finish(pid, &job, result),
        }
    }

    /// Makes another call after the one that has ended.
    fn next(&mut self, pid: Pid, mut job: Job, now: &Registers, call: Call) -> io::Result<()> {
        if job.blocked.is_none() {
            job.blocked = Some(ptrace::blocked(pid)?);
            ptrace::block(pid, u64::MAX)?;
        }
        let mut registers = *now;
        registers.again(call);
        ptrace::set_registers(pid, &registers)?;
        self.thread(pid).work = Work::Do(Box::new(job));
        ptrace::go(pid, Go::ToCall, 0)
    }

    fn close(
        &mut self,
        pid: Pid,
        mut job: Job,
        now: &Registers,
        fd: i32,
        result: i64,
    ) -> io::Result<()> {
        job.step = Step::Close { result };
        self.next(pid, job, now, close_call(fd))
    }

    /// Makes the thread's own call, which nobody needs to look at.
    fn pass(&mut self, pid: Pid, job: &Job, own: Call) -> io::Result<()> {
        let mut registers = job.original;
        registers.again(own);
        ptrace::set_registers(pid, &registers)?;
        self.thread(pid).work = Work::Pass(job.blocked);
        ptrace::go(pid, Go::On, 0)
    }

    /// Gives the thread the result of its own call.
    fn finish(&mut self, pid: Pid, job: &Job, result: i64) -> io::Result<()> {
        if let Some(blocked) = job.blocked {
            ptrace::block(pid, blocked)?;
        }
        let mut registers = job.original;
        registers.set_result(result);
        ptrace::set_registers(pid, &registers)?;
        ptrace::go(pid, Go::On, 0)
    }
}

/// Opens a file for nothing but to know which it is.
fn open_call(at: &At) -> Call {
    let follow = if at.follow { 0 } else { libc::O_NOFOLLOW };
    let flags = libc::O_PATH | libc::O_CLOEXEC | follow;
    Call {
        number: libc::SYS_openat,
        arguments: [at.dir as u64, at.path, flags as u64, 0, 0, 0],
    }
}

fn close_call(fd: i32) -> Call {
    Call {
        number: libc::SYS_close,
        arguments: [fd as u64, 0, 0, 0, 0, 0],
    }
}

/// A `chown` with the same effects but the owner.
fn to_nobody_else(call: &Call, ids_at: usize) -> Call {
    let mut call = *call;
    for id in &mut call.arguments[ids_at..ids_at + 2] {
        if *id as u32 != KEEP {
            *id = 0;
        }
    }
    call
}

/// Whether the string at `address` is empty.
fn is_empty(pid: Pid, address: u64) -> bool {
    let mut first = [1];
    ptrace::read_memory(pid, address, &mut first).is_ok() && first == [0]
}

/// Gives the result of a call that the kernel never sees.
fn answer(pid: Pid, registers: &Registers, result: Result<u64, Errno>) -> io::Result<()> {
    let mut changed = *registers;
    let mut call = changed.call();
    call.number = -1;
    changed.replace(call);
    changed.set_result(match result {
        Ok(value) => value.cast_signed(),
        Err(error) => -i64::from(error.raw_os_error()),
    });
    begin_call(pid, &changed, -1)?;
    ptrace::go(pid, Go::On, 0)
}

/// Sets the registers at the begin of a call, and the number of the call.
fn begin_call(pid: Pid, registers: &Registers, number: i64) -> io::Result<()> {
    #[cfg(target_arch = "aarch64")]
    ptrace::set_call(pid, number)?;
    let _ = number;
    ptrace::set_registers(pid, registers)
}

fn read_groups(pid: Pid, count: u64, list: u64) -> Result<Vec<u32>, Errno> {
    let count = usize::try_from(count).map_err(|_| Errno::INVAL)?;
    if count > GROUPS_MAX {
        return Err(Errno::INVAL);
    }
    let mut bytes = vec![0; 4 * count];
    if count > 0 {
        ptrace::read_memory(pid, list, &mut bytes).map_err(|_| Errno::FAULT)?;
    }
    let group = |four: &[u8]| u32::from_ne_bytes(std::array::from_fn(|index| four[index]));
    Ok(bytes.chunks_exact(4).map(group).collect())
}

fn write_groups(pid: Pid, groups: &[u32], room: u64, list: u64) -> Result<u64, Errno> {
    let count = groups.len() as u64;
    if room == 0 {
        return Ok(count);
    }
    // A negative number is a large one here.
    if room < count || room > i32::MAX as u64 {
        return Err(Errno::INVAL);
    }
    let bytes: Vec<u8> = groups
        .iter()
        .flat_map(|group| group.to_ne_bytes())
        .collect();
    if !bytes.is_empty() {
        ptrace::write_memory(pid, list, &bytes).map_err(|_| Errno::FAULT)?;
    }
    Ok(count)
}
