//! `ptrace(2)`, in safe words. Each thread of the traced processes is named by its number; a wrong
//! one is `ESRCH`.

#![allow(unsafe_code)]

use std::io;
use std::mem::MaybeUninit;

use rustix::process::Pid;

use super::registers::Registers;

/// What a stopped thread is let go on to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Go {
    /// The next call that the filter asks about, signal or event.
    On,
    /// The next of these, or the begin or end of a call.
    ToCall,
    /// Nothing: it stays stopped, and its tracer hears when that ends (`PTRACE_LISTEN`).
    Nowhere,
}

/// What `waitpid(2)` said of a thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stop {
    /// It is gone.
    Ended,
    /// It is at the begin or end of a call.
    Call,
    /// One of the events `PTRACE_EVENT_*`; the signal is of use for group stops only.
    Event(i32, i32),
    /// It is about to get this signal.
    Signal(i32),
}

fn request(
    request: libc::c_uint,
    pid: Pid,
    address: usize,
    data: usize,
) -> io::Result<libc::c_long> {
    // SAFETY: the callers pass requests that read nothing of this process's memory, or pointers that
    // are valid for what the request reads and writes, as each of them says.
    let result = unsafe { libc::ptrace(request, pid.as_raw_nonzero().get(), address, data) };
    match result {
        -1 => Err(io::Error::last_os_error()),
        result => Ok(result),
    }
}

/// Traces `pid` and all that it starts from now on; they die with this thread.
///
/// # Errors
/// `EPERM` where this process may not trace that one, or somebody else does.
pub(super) fn seize(pid: Pid) -> io::Result<()> {
    let options = libc::PTRACE_O_EXITKILL
        | libc::PTRACE_O_TRACESECCOMP
        | libc::PTRACE_O_TRACESYSGOOD
        | libc::PTRACE_O_TRACEEXEC
        | libc::PTRACE_O_TRACECLONE
        | libc::PTRACE_O_TRACEFORK
        | libc::PTRACE_O_TRACEVFORK;
    request(libc::PTRACE_SEIZE, pid, 0, options as usize).map(drop)
}

/// Lets a stopped thread go on; with `signal`, where it is not 0.
///
/// # Errors
/// `ESRCH` where it was killed meanwhile.
pub(super) fn go(pid: Pid, go: Go, signal: i32) -> io::Result<()> {
    let what = match go {
        Go::On => libc::PTRACE_CONT,
        Go::ToCall => libc::PTRACE_SYSCALL,
        Go::Nowhere => libc::PTRACE_LISTEN,
    };
    request(what, pid, 0, signal as usize).map(drop)
}

/// The number that comes with an event.
///
/// # Errors
/// `ESRCH`.
pub(super) fn message(pid: Pid) -> io::Result<u64> {
    let mut message: libc::c_ulong = 0;
    // A pointer to a long, which is written.
    request(
        libc::PTRACE_GETEVENTMSG,
        pid,
        0,
        (&raw mut message) as usize,
    )?;
    Ok(message)
}

/// Whether the thread, which is at the begin or end of a call, is at its end.
///
/// # Errors
/// `ESRCH`; `EIO` before Linux 5.3.
pub(super) fn is_at_end(pid: Pid) -> io::Result<bool> {
    let mut info = MaybeUninit::<libc::ptrace_syscall_info>::zeroed();
    // The size of what is pointed to, and a pointer to that, which is written.
    request(
        libc::PTRACE_GET_SYSCALL_INFO,
        pid,
        size_of::<libc::ptrace_syscall_info>(),
        info.as_mut_ptr() as usize,
    )?;
    // SAFETY: all bytes are initialised, and the structure is of integers only.
    let info = unsafe { info.assume_init() };
    Ok(info.op == libc::PTRACE_SYSCALL_INFO_EXIT)
}

/// The registers of a stopped thread.
///
/// # Errors
/// `ESRCH`.
pub(super) fn registers(pid: Pid) -> io::Result<Registers> {
    let mut registers = MaybeUninit::<libc::user_regs_struct>::zeroed();
    let mut place = libc::iovec {
        iov_base: registers.as_mut_ptr().cast(),
        iov_len: size_of::<libc::user_regs_struct>(),
    };
    // The kind of registers, and a pointer to a place of the length that it says.
    let kind = libc::NT_PRSTATUS as usize;
    request(libc::PTRACE_GETREGSET, pid, kind, (&raw mut place) as usize)?;
    // SAFETY: all bytes are initialised, and the structure is of integers only.
    Ok(Registers(unsafe { registers.assume_init() }))
}

/// Sets the registers of a stopped thread, other than the number of the call that it begins.
///
/// # Errors
/// `ESRCH`.
pub(super) fn set_registers(pid: Pid, registers: &Registers) -> io::Result<()> {
    let mut copy = registers.0;
    let mut place = libc::iovec {
        iov_base: (&raw mut copy).cast(),
        iov_len: size_of::<libc::user_regs_struct>(),
    };
    // The kind of registers, and a pointer to a place of the length that it says, which is read.
    let kind = libc::NT_PRSTATUS as usize;
    request(libc::PTRACE_SETREGSET, pid, kind, (&raw mut place) as usize)?;
    Ok(())
}

/// Sets the number of the call that a stopped thread begins; -1 for none.
///
/// # Errors
/// `ESRCH`.
#[cfg(target_arch = "aarch64")]
pub(super) fn set_call(pid: Pid, number: i64) -> io::Result<()> {
    const NT_ARM_SYSTEM_CALL: usize = 0x404;
    let mut number = number as libc::c_int;
    let mut place = libc::iovec {
        iov_base: (&raw mut number).cast(),
        iov_len: size_of::<libc::c_int>(),
    };
    // As `set_registers`.
    request(
        libc::PTRACE_SETREGSET,
        pid,
        NT_ARM_SYSTEM_CALL,
        (&raw mut place) as usize,
    )?;
    Ok(())
}

/// The kernel's set of signals: one bit each.
const SIGNALS_BYTES: usize = 8;

/// The signals that a stopped thread has blocked.
///
/// # Errors
/// `ESRCH`.
pub(super) fn blocked(pid: Pid) -> io::Result<u64> {
    let mut signals = 0_u64;
    // The size of what is pointed to, and a pointer to that, which is written.
    request(
        libc::PTRACE_GETSIGMASK,
        pid,
        SIGNALS_BYTES,
        (&raw mut signals) as usize,
    )?;
    Ok(signals)
}

/// Has a stopped thread block these signals and no others.
///
/// # Errors
/// `ESRCH`.
pub(super) fn block(pid: Pid, signals: u64) -> io::Result<()> {
    // The size of what is pointed to, and a pointer to that, which is read.
    request(
        libc::PTRACE_SETSIGMASK,
        pid,
        SIGNALS_BYTES,
        (&raw const signals) as usize,
    )?;
    Ok(())
}

/// Waits for a thread that this one traces; absent where there are none.
///
/// # Errors
/// Those of `waitpid(2)`.
pub(super) fn wait() -> io::Result<Option<(Pid, Stop)>> {
    let mut status = 0;
    let flags = libc::__WALL | libc::__WNOTHREAD;
    let pid = loop {
        // SAFETY: the pointer is to an integer that lives through the call.
        let pid = unsafe { libc::waitpid(-1, &raw mut status, flags) };
        if pid >= 0 {
            break pid;
        }
        let error = io::Error::last_os_error();
        match error.raw_os_error() {
            Some(libc::EINTR) => {}
            Some(libc::ECHILD) => return Ok(None),
            _ => return Err(error),
        }
    };
    let Some(pid) = Pid::from_raw(pid) else {
        return Ok(None);
    };
    if !libc::WIFSTOPPED(status) {
        return Ok(Some((pid, Stop::Ended)));
    }
    let (signal, event) = (libc::WSTOPSIG(status), status >> 16);
    let stop = match (signal, event) {
        (signal, 0) if signal == libc::SIGTRAP | 0x80 => Stop::Call,
        (signal, 0) => Stop::Signal(signal),
        (signal, event) => Stop::Event(event, signal),
    };
    Ok(Some((pid, stop)))
}

/// Reads `bytes` of the memory of a process.
///
/// # Errors
/// `EFAULT` where there is none; `ESRCH`.
pub(super) fn read_memory(pid: Pid, address: u64, bytes: &mut [u8]) -> io::Result<()> {
    let here = libc::iovec {
        iov_base: bytes.as_mut_ptr().cast(),
        iov_len: bytes.len(),
    };
    let there = libc::iovec {
        iov_base: address as *mut libc::c_void,
        iov_len: bytes.len(),
    };
    let pid = pid.as_raw_nonzero().get();
    // SAFETY: what is written in this process is the slice; the other address is the other's.
    let done = unsafe { libc::process_vm_readv(pid, &raw const here, 1, &raw const there, 1, 0) };
    moved(done, bytes.len())
}

/// Writes `bytes` to the memory of a process.
///
/// # Errors
/// As [`read_memory`].
pub(super) fn write_memory(pid: Pid, address: u64, bytes: &[u8]) -> io::Result<()> {
    let here = libc::iovec {
        iov_base: bytes.as_ptr().cast_mut().cast(),
        iov_len: bytes.len(),
    };
    let there = libc::iovec {
        iov_base: address as *mut libc::c_void,
        iov_len: bytes.len(),
    };
    let pid = pid.as_raw_nonzero().get();
    // SAFETY: what is read in this process is the slice; the other address is the other's.
    let done = unsafe { libc::process_vm_writev(pid, &raw const here, 1, &raw const there, 1, 0) };
    moved(done, bytes.len())
}

fn moved(done: isize, want: usize) -> io::Result<()> {
    match usize::try_from(done) {
        Ok(done) if done == want => Ok(()),
        Ok(_) => Err(rustix::io::Errno::FAULT.into()),
        Err(_) => Err(io::Error::last_os_error()),
    }
}
