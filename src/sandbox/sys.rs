//! The system calls that no safe wrapper offers; the only `unsafe` code of the crate.
//!
//! Everything here is called from processes with one thread: `main` before it
//! starts any, and the stages of a sandbox, which never start one.

#![allow(unsafe_code)]

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use rustix::io::FdFlags;
use rustix::mount::MountAttrFlags;
use rustix::thread::UnshareFlags;

/// Takes a file descriptor that this process was started with, and makes it close on exec.
///
/// `fd` is above 2 and named by the command line; a process takes each number once.
///
/// # Errors
/// `EBADF` where the process was started without it.
pub(super) fn adopt(fd: RawFd) -> io::Result<OwnedFd> {
    if fd <= 2 {
        return Err(rustix::io::Errno::BADF.into());
    }
    // SAFETY: the number is valid for the call only; the kernel refuses one that is not open.
    let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
    rustix::io::fcntl_setfd(borrowed, FdFlags::CLOEXEC)?;
    // SAFETY: it is open (checked above), and nothing in this process owns it: it was
    // inherited, and the caller takes each number once.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Moves this process into new namespaces.
///
/// # Errors
/// Those of `unshare(2)`.
pub(super) fn unshare(flags: UnshareFlags) -> io::Result<()> {
    debug_assert!(!flags.intersects(UnshareFlags::FILES));
    // SAFETY: only `CLONE_FILES` can break what Rust believes about file descriptors,
    // and no caller passes it.
    Ok(unsafe { rustix::thread::unshare_unsafe(flags) }?)
}

/// Adds `attributes` to a mount and to all mounts below it.
///
/// # Errors
/// `ENOSYS` before Linux 5.12, otherwise those of `mount_setattr(2)`.
pub(super) fn restrict_mount(tree: BorrowedFd<'_>, attributes: MountAttrFlags) -> io::Result<()> {
    let attr = libc::mount_attr {
        attr_set: attributes.bits().into(),
        attr_clr: 0,
        propagation: 0,
        userns_fd: 0,
    };
    // SAFETY: the path is an empty C string, the structure lives through the call and
    // its true size is passed.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | libc::AT_RECURSIVE,
            &raw const attr,
            size_of::<libc::mount_attr>(),
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Joins a new, empty session keyring, so that no key of the user is inherited.
///
/// # Errors
/// Those of `keyctl(2)`; `ENOSYS` and `EPERM` are common in containers.
pub(super) fn join_new_keyring() -> io::Result<()> {
    const KEYCTL_JOIN_SESSION_KEYRING: libc::c_long = 1;
    // SAFETY: a null name asks for an anonymous keyring; no memory is touched.
    let result = unsafe {
        libc::syscall(
            libc::SYS_keyctl,
            KEYCTL_JOIN_SESSION_KEYRING,
            std::ptr::null::<libc::c_char>(),
        )
    };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Closes every file descriptor from `first` on.
///
/// # Errors
/// `ENOSYS` before Linux 5.9.
pub(super) fn close_from(first: RawFd) -> io::Result<()> {
    let first = libc::c_uint::try_from(first).map_err(|_| rustix::io::Errno::BADF)?;
    // SAFETY: called when this process has opened nothing itself, so no value owns any
    // of the closed numbers.
    let result = unsafe { libc::syscall(libc::SYS_close_range, first, libc::c_uint::MAX, 0) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Keeps all descriptors from `first` on to this process: those that it starts do not get them.
///
/// # Errors
/// `ENOSYS` before Linux 5.9, `EINVAL` before 5.11.
pub(super) fn keep_from(first: RawFd) -> io::Result<()> {
    let first = libc::c_uint::try_from(first).map_err(|_| rustix::io::Errno::BADF)?;
    // SAFETY: no descriptor is closed or made; only their close-on-exec flag changes.
    let result = unsafe {
        libc::syscall(
            libc::SYS_close_range,
            first,
            libc::c_uint::MAX,
            libc::CLOSE_RANGE_CLOEXEC,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Gives signals the state a fresh process expects: none blocked, none ignored.
///
/// Rust's runtime ignores `SIGPIPE`, and that would be inherited: `yes | head` would
/// end in an error instead of quietly.
pub(super) fn reset_signals() {
    // A kernel `sigaction` of zeros is `SIG_DFL`; on no machine is it longer. Not by
    // `signal(3)`, which leaves two signals alone that the C library keeps for itself.
    let default = [0_u64; 8];
    for signal in 1..=64 {
        // SAFETY: the structure is longer than what the kernel reads, nothing is written,
        // and the default action runs no code of this process. The kernel refuses to set
        // those of SIGKILL and SIGSTOP.
        unsafe {
            libc::syscall(
                libc::SYS_rt_sigaction,
                signal,
                default.as_ptr(),
                std::ptr::null_mut::<u64>(),
                size_of::<u64>(),
            );
        }
    }
    // SAFETY: the set is initialised by `sigemptyset` before it is read.
    unsafe {
        let mut none = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
        libc::sigemptyset(none.as_mut_ptr());
        libc::sigprocmask(libc::SIG_SETMASK, none.as_ptr(), std::ptr::null_mut());
    }
}

/// Lets the kernel decide about each system call that this process and its children make from
/// here on by `program`.
///
/// # Errors
/// `EACCES` without `CAP_SYS_ADMIN` where `no_new_privs` is not set; `ENOSYS`, `EINVAL` on a kernel
/// without filters.
pub(super) fn filter_calls(program: &[libc::sock_filter]) -> io::Result<()> {
    let length = u16::try_from(program.len()).map_err(|_| rustix::io::Errno::INVAL)?;
    let program = libc::sock_fprog {
        len: length,
        filter: program.as_ptr().cast_mut(),
    };
    // SAFETY: the structure and the program, of the length it says, live through the call, which
    // copies them and writes to neither.
    let result = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            0,
            &raw const program,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Kills every process that this one may send signals to, in one go: none of them can start
/// another meanwhile. Only for a process whose signals are scoped.
///
/// # Errors
/// `ESRCH` where there is none; otherwise those of `kill(2)`.
pub(super) fn kill_all_others() -> io::Result<()> {
    // SAFETY: no memory is touched.
    match unsafe { libc::kill(-1, libc::SIGKILL) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// What a Landlock ruleset is about; `struct landlock_ruleset_attr` of Linux 6.12.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct LandlockRuleset {
    /// What of files is forbidden unless a rule allows it.
    pub(super) handled_access_fs: u64,
    /// What of the network.
    pub(super) handled_access_net: u64,
    /// What does not reach processes outside.
    pub(super) scoped: u64,
}

/// Returns the version of Landlock that this kernel has.
///
/// # Errors
/// `ENOSYS`, `EOPNOTSUPP` where it has none or does not use it; `EPERM` where it is filtered.
pub(super) fn landlock_version() -> io::Result<u64> {
    const VERSION: u32 = 1;
    // SAFETY: with this flag no memory is touched.
    let result = unsafe {
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            std::ptr::null::<LandlockRuleset>(),
            0_usize,
            VERSION,
        )
    };
    u64::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// Makes a ruleset.
///
/// # Errors
/// `E2BIG`, `EINVAL` where the kernel does not know all that is asked for.
pub(super) fn landlock_ruleset(about: &LandlockRuleset) -> io::Result<OwnedFd> {
    // SAFETY: the structure lives through the call, and its true size is passed.
    let result = unsafe {
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            std::ptr::from_ref(about),
            size_of::<LandlockRuleset>(),
            0_u32,
        )
    };
    match RawFd::try_from(result) {
        // SAFETY: the kernel has just made it for this call.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Allows `access` to what is at and below the open `place`.
///
/// # Errors
/// Those of `landlock_add_rule(2)`.
pub(super) fn landlock_allow(
    ruleset: BorrowedFd<'_>,
    place: BorrowedFd<'_>,
    access: u64,
) -> io::Result<()> {
    const PATH_BENEATH: u32 = 1;
    // `struct landlock_path_beneath_attr` is packed.
    #[repr(C, packed)]
    struct PathBeneath {
        allowed_access: u64,
        parent_fd: i32,
    }
    let rule = PathBeneath {
        allowed_access: access,
        parent_fd: place.as_raw_fd(),
    };
    // SAFETY: the structure, which is that of this kind of rule, lives through the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_landlock_add_rule,
            ruleset.as_raw_fd(),
            PATH_BENEATH,
            &raw const rule,
            0_u32,
        )
    };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Puts this process, and all that it starts from here on, under a ruleset.
///
/// # Errors
/// `EPERM` without `no_new_privs` and `CAP_SYS_ADMIN`; `E2BIG` beyond 16 rulesets.
pub(super) fn landlock_restrict(ruleset: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: no memory is touched.
    let result =
        unsafe { libc::syscall(libc::SYS_landlock_restrict_self, ruleset.as_raw_fd(), 0_u32) };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Becomes the program at `path`; returns only where that failed.
pub(super) fn execve(path: &CStr, args: &[CString], env: &[CString]) -> io::Error {
    let pointers = |strings: &[CString]| -> Vec<*const libc::c_char> {
        strings
            .iter()
            .map(|string| string.as_ptr())
            .chain([std::ptr::null()])
            .collect()
    };
    let (args, env) = (pointers(args), pointers(env));
    // SAFETY: all three are null-terminated and outlive the call.
    unsafe { libc::execve(path.as_ptr(), args.as_ptr(), env.as_ptr()) };
    io::Error::last_os_error()
}
