//! `__init`: the innermost stage. Inside the container it becomes the step's user, takes
//! the step's capabilities and limits, and becomes the step.
//!
//! It does the same in every runtime, and so the step sees the same in every runtime.

use std::ffi::{CString, OsStr, OsString};
use std::io::{self, Write};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;

use rustix::fs::{Gid, Mode, OFlags, StatVfsMountFlags, Uid};
use rustix::io::Errno;
use rustix::mount::UnmountFlags;
use rustix::process::{Resource, Rlimit};
use rustix::thread::{CapabilitySet, CapabilitySets, UnshareFlags};

use super::enter::INIT_FDS;
use super::wire::{self, Doing, Failure, Launch, Part, Purpose, Report, RuntimeKind};
use super::{
    Process, Security, User, cgroup, chroot, limits, seccomp, sys, tracer, userns, verify,
};

/// All capabilities that this program knows, by the names of the runtime specification, at
/// their numbers; those of Linux 5.9. See `capabilities(7)`.
const CAPABILITY_NAMES: [&str; 41] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_DAC_READ_SEARCH",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETPCAP",
    "CAP_LINUX_IMMUTABLE",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_BROADCAST",
    "CAP_NET_ADMIN",
    "CAP_NET_RAW",
    "CAP_IPC_LOCK",
    "CAP_IPC_OWNER",
    "CAP_SYS_MODULE",
    "CAP_SYS_RAWIO",
    "CAP_SYS_CHROOT",
    "CAP_SYS_PTRACE",
    "CAP_SYS_PACCT",
    "CAP_SYS_ADMIN",
    "CAP_SYS_BOOT",
    "CAP_SYS_NICE",
    "CAP_SYS_RESOURCE",
    "CAP_SYS_TIME",
    "CAP_SYS_TTY_CONFIG",
    "CAP_MKNOD",
    "CAP_LEASE",
    "CAP_AUDIT_WRITE",
    "CAP_AUDIT_CONTROL",
    "CAP_SETFCAP",
    "CAP_MAC_OVERRIDE",
    "CAP_MAC_ADMIN",
    "CAP_SYSLOG",
    "CAP_WAKE_ALARM",
    "CAP_BLOCK_SUSPEND",
    "CAP_AUDIT_READ",
    "CAP_PERFMON",
    "CAP_BPF",
    "CAP_CHECKPOINT_RESTORE",
];

/// Docker's default capabilities.
const CAPABILITIES: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::MKNOD)
    .union(CapabilitySet::NET_RAW)
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::SETUID)
    .union(CapabilitySet::SETFCAP)
    .union(CapabilitySet::SETPCAP)
    .union(CapabilitySet::NET_BIND_SERVICE)
    .union(CapabilitySet::SYS_CHROOT)
    .union(CapabilitySet::KILL)
    .union(CapabilitySet::AUDIT_WRITE);

/// What a step does not have whose root directory was changed, and nothing mounted: with the first
/// it could change it once more and leave it, with the second open the disks of the host.
const WAYS_OUT: CapabilitySet = CapabilitySet::SYS_CHROOT.union(CapabilitySet::MKNOD);

/// The number of open files that Docker allows.
const OPEN_FILES_LIMIT: u64 = 1024 * 1024;

/// What is searched where the step has no `PATH`.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The exit status of a program that is not there, as in a shell and in Docker.
const NOT_FOUND: i32 = 127;
/// That of one that cannot be executed.
const NOT_EXECUTABLE: i32 = 126;

/// Runs the stage with the numbers of its file descriptors; returns its exit status, where
/// it has not become the step.
pub(super) fn init_main(args: &[OsString]) -> i32 {
    let numbers: Vec<i32> = args
        .iter()
        .filter_map(|arg| arg.to_str()?.parse().ok())
        .collect();
    let wanted = *INIT_FDS.start()..;
    if numbers.len() < INIT_FDS.count() || !numbers.iter().copied().eq(wanted.take(numbers.len())) {
        return 2;
    }
    // First of all: whatever else a runtime left open is no business of the step.
    if sys::close_from(INIT_FDS.start() + numbers.len() as i32).is_err() {
        return 2;
    }
    let fds: io::Result<Vec<OwnedFd>> = numbers.iter().copied().map(sys::adopt).collect();
    let Ok(mut fds) = fds else { return 2 };
    let doors = fds.split_off(INIT_FDS.count());
    let Ok([exe, launch, socket, stdout, stderr]) = <[OwnedFd; 5]>::try_from(fds) else {
        return 2;
    };
    drop(exe);
    let prepared = wire::read_launch(&launch)
        .doing(|| "reading the launch".to_owned())
        .and_then(|launch| {
            enter_cgroups(&launch, doors)?;
            let command = prepare(&launch, &socket, stdout, stderr)?;
            Ok((launch, command))
        });
    drop(launch);
    match prepared {
        Ok((launch, command)) => {
            wire::send_report(&socket, &Report::Started);
            drop(socket);
            if launch.purpose != Purpose::Run {
                return 0;
            }
            let refused = become_step(&command);
            let _ = io::stderr().write_all(format!("sockless: {}\n", refused.message).as_bytes());
            refused.status
        }
        Err(failure) => {
            wire::send_report(&socket, &Report::Failed(failure));
            1
        }
    }
}

/// Enters the cgroups of the step, in which nothing but the step is, and has it see them as the
/// topmost ones.
fn enter_cgroups(launch: &Launch, doors: Vec<OwnedFd>) -> Result<(), Failure> {
    for door in &doors {
        let entered = cgroup::enter(door.as_fd()).doing(|| "entering a cgroup".to_owned());
        entered.map_err(|failure| Failure {
            part: Part::Asked,
            ..failure
        })?;
    }
    // An insecure step has mounted them from a namespace of its own; without namespaces there is
    // none to be had, and nothing of /sys to be seen.
    let is_insecure = launch.process.security == Security::Insecure;
    if doors.is_empty() || is_insecure || launch.runtime.kind == RuntimeKind::Chroot {
        return Ok(());
    }
    let doing = || "entering a cgroup namespace".to_owned();
    sys::unshare(UnshareFlags::NEWCGROUP).doing(doing)
}

/// A command ready for `execve(2)`.
#[derive(Debug)]
struct Command {
    args: Vec<CString>,
    env: Vec<CString>,
    /// The directories to search, colon separated.
    path: OsString,
}

fn prepare(
    launch: &Launch,
    socket: &OwnedFd,
    stdout: OwnedFd,
    stderr: OwnedFd,
) -> Result<Command, Failure> {
    let process = &launch.process;
    let command = command(process)?;
    let is_chroot = launch.runtime.kind == RuntimeKind::Chroot;
    match is_chroot {
        true => chroot::confine(&process.rootfs)?,
        false => verify::check(launch)?,
    }
    // Fails where a runtime has already done it.
    let _ = rustix::process::setsid();
    set_stdio(
        &process.user,
        (!is_chroot).then_some("/dev/null"),
        stdout,
        stderr,
    )?;
    rustix::process::umask(Mode::from_raw_mode(0o022));
    if process.security == Security::Insecure {
        uncover_proc()?;
    }
    // As root, who can enter everything; as the user where root may not, as on some
    // network filesystems.
    let entered = rustix::process::chdir(&process.cwd);
    if !process.ulimits.iter().any(|ulimit| ulimit.name == "nofile") {
        raise_open_files();
    }
    match process.security {
        Security::Sandbox => {
            let capabilities = match is_chroot {
                true => CAPABILITIES.difference(WAYS_OUT),
                false => safe_capabilities(),
            };
            drop_bounding_set(capabilities)?;
            limits::apply(&process.ulimits)?;
            // Before CAP_SYS_ADMIN is lost, which it takes where setuid programs are to work.
            if let Some(program) = seccomp::program() {
                let doing = || "filtering system calls".to_owned();
                sys::filter_calls(&program).doing(doing)?;
            }
            if launch.is_traced {
                wait_for_tracer(socket)?;
                keep_capabilities(&User::default(), capabilities)?;
            }
            become_user(&process.user, launch.is_traced)?;
            if !launch.is_traced {
                keep_capabilities(&process.user, capabilities)?;
            }
        }
        Security::Insecure => {
            limits::apply(&process.ulimits)?;
            let doing = || "keeping capabilities".to_owned();
            rustix::thread::set_keep_capabilities(true).doing(doing)?;
            if launch.is_traced {
                wait_for_tracer(socket)?;
            }
            become_user(&process.user, launch.is_traced)?;
            keep_all_capabilities().doing(doing)?;
        }
    }
    if entered.is_err() {
        rustix::process::chdir(&process.cwd)
            .doing(|| format!("entering {}", process.cwd.display()))?;
    }
    // A directory that was reached through a leaked file descriptor has no path here.
    let cwd = std::env::current_dir().doing(|| "checking the working directory".to_owned())?;
    if !cwd.is_absolute() {
        return Err(Failure::new(
            format!("entering {}: it is outside the root", process.cwd.display()),
            &Errno::NOENT.into(),
        ));
    }
    sys::reset_signals();
    Ok(command)
}

fn command(process: &Process) -> Result<Command, Failure> {
    let strings = |what: &str, strings: &[OsString]| -> Result<Vec<CString>, Failure> {
        let string = |string: &OsString| {
            CString::new(string.as_bytes())
                .map_err(io::Error::from)
                .doing(|| format!("reading {what} {string:?}"))
        };
        strings.iter().map(string).collect()
    };
    let path = process
        .env
        .iter()
        .find_map(|entry| entry.as_bytes().strip_prefix(b"PATH="))
        .unwrap_or(DEFAULT_PATH.as_bytes());
    Ok(Command {
        args: strings("the argument", &process.args)?,
        env: strings("the environment entry", &process.env)?,
        path: OsString::from_vec(path.to_vec()),
    })
}

/// Gives the step its standard files; its input is what is at the path `stdin`, or stays.
fn set_stdio(
    user: &User,
    stdin: Option<&str>,
    stdout: OwnedFd,
    stderr: OwnedFd,
) -> Result<(), Failure> {
    for fd in [&stdout, &stderr] {
        // So that the user can open /dev/stdout; where the user does not exist, switching
        // to it tells why.
        let _ = rustix::fs::fchown(
            fd,
            Some(Uid::from_raw(user.uid)),
            Some(Gid::from_raw(user.gid)),
        );
    }
    let doing = || "setting standard input, output and error".to_owned();
    // runc makes its own input a pipe.
    if let Some(path) = stdin {
        let null = rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
        let null = null.doing(doing)?;
        if !verify::is_device(&null, 1, 3).doing(doing)? {
            return Err(Failure::new(doing(), &Errno::NODEV.into()));
        }
        rustix::stdio::dup2_stdin(null).doing(doing)?;
    }
    rustix::stdio::dup2_stdout(stdout).doing(doing)?;
    rustix::stdio::dup2_stderr(stderr).doing(doing)
}

/// Raises the limit of open files to Docker's, or as far as is allowed.
fn raise_open_files() {
    let limit = |current, maximum| Rlimit {
        current: Some(current),
        maximum: Some(maximum),
    };
    let wanted = limit(OPEN_FILES_LIMIT, OPEN_FILES_LIMIT);
    if rustix::process::setrlimit(Resource::Nofile, wanted).is_err() {
        let maximum = rustix::process::getrlimit(Resource::Nofile).maximum;
        let most = maximum.unwrap_or(OPEN_FILES_LIMIT).min(OPEN_FILES_LIMIT);
        // Raising the soft limit to the hard one is always allowed.
        let _ = rustix::process::setrlimit(Resource::Nofile, limit(most, most));
    }
}

/// Docker's capabilities, but `CAP_MKNOD` only where the devices it makes are of no use.
///
/// Everything was mounted `nodev`, but crun mounts the root once more without; with real
/// root's `CAP_MKNOD` a step could then open the host's disks. In a user namespace the
/// kernel lets nobody make devices anyway.
fn safe_capabilities() -> CapabilitySet {
    let no_devices = ["/", "/dev"].iter().all(|path| {
        rustix::fs::statvfs(*path).is_ok_and(|stat| stat.f_flag.contains(StatVfsMountFlags::NODEV))
    });
    match no_devices || !userns::is_initial() {
        true => CAPABILITIES,
        false => CAPABILITIES.difference(CapabilitySet::MKNOD),
    }
}

fn drop_bounding_set(kept: CapabilitySet) -> Result<(), Failure> {
    let doing = || "giving up capabilities".to_owned();
    for number in 0..u64::BITS {
        let capability = CapabilitySet::from_bits_retain(1 << number);
        if kept.contains(capability) {
            continue;
        }
        match rustix::thread::remove_capability_from_bounding_set(capability) {
            // One more than the kernel knows.
            Err(Errno::INVAL) => break,
            result => result.doing(doing)?,
        }
    }
    rustix::thread::clear_ambient_capability_set().doing(doing)
}

/// Waits until this process is traced, and has its calls asked about from then on.
fn wait_for_tracer(socket: &OwnedFd) -> Result<(), Failure> {
    let doing = || "waiting to be traced".to_owned();
    wire::send_report(socket, &Report::Traceable);
    let mut byte = [0];
    let read = rustix::io::retry_on_intr(|| rustix::io::read(socket, &mut byte[..]));
    if read.doing(doing)? == 0 {
        return Err(Failure::new(doing(), &io::ErrorKind::UnexpectedEof.into()));
    }
    sys::filter_calls(&tracer::filter()).doing(|| "having system calls traced".to_owned())
}

/// Becomes the user; for who `is_traced`, users and groups are made up that do not exist.
fn become_user(user: &User, is_traced: bool) -> Result<(), Failure> {
    let map = |kind: &str| std::fs::read_to_string(format!("/proc/self/{kind}_map"));
    let known = |kind: &str| map(kind).map_or(u64::MAX, |map| userns::mapped_ids(&map));
    let switching = |kind: &'static str, what: String, error: Errno| {
        let mut failure = Failure::new(format!("switching to {what}"), &error.into());
        if error == Errno::INVAL {
            failure.reason = format!(
                "it does not exist in this user namespace, which has {} {kind}s; more \
                 subordinate IDs (/etc/sub{kind}) are needed",
                known(kind)
            );
        }
        failure
    };
    // With a single ID there are no other groups to be had, and the kernel may forbid
    // even to ask.
    if is_traced || known("gid") > 1 {
        let groups: Vec<Gid> = user.groups.iter().map(|&gid| Gid::from_raw(gid)).collect();
        rustix::thread::set_thread_groups(&groups)
            .map_err(|error| switching("gid", format!("groups {:?}", user.groups), error))?;
    }
    let gid = Gid::from_raw(user.gid);
    rustix::thread::set_thread_res_gid(gid, gid, gid)
        .map_err(|error| switching("gid", format!("group {}", user.gid), error))?;
    let uid = Uid::from_raw(user.uid);
    rustix::thread::set_thread_res_uid(uid, uid, uid)
        .map_err(|error| switching("uid", format!("user {}", user.uid), error))?;
    Ok(())
}

fn keep_capabilities(user: &User, capabilities: CapabilitySet) -> Result<(), Failure> {
    let doing = || "setting capabilities".to_owned();
    let current = rustix::thread::capabilities(None).doing(doing)?;
    // Switching from root to another user has taken all of them already.
    let kept = match user.uid {
        0 => current.permitted & capabilities,
        _ => CapabilitySet::empty(),
    };
    let sets = CapabilitySets {
        effective: kept,
        permitted: kept,
        inheritable: CapabilitySet::empty(),
    };
    rustix::thread::set_capabilities(None, sets).doing(doing)
}

/// Has the step, whoever it runs as, have all capabilities that this process has.
fn keep_all_capabilities() -> Result<(), Errno> {
    let all = rustix::thread::capabilities(None)?.permitted;
    let sets = CapabilitySets {
        effective: all,
        permitted: all,
        inheritable: all,
    };
    rustix::thread::set_capabilities(None, sets)?;
    for capability in all.iter() {
        rustix::thread::configure_capability_in_ambient_set(capability, true)?;
    }
    Ok(())
}

/// Takes away what the runtime has mounted in `/proc`: bubblewrap makes parts of it
/// read-only unasked.
fn uncover_proc() -> Result<(), Failure> {
    let info = std::fs::read_to_string("/proc/self/mountinfo")
        .doing(|| "reading /proc/self/mountinfo".to_owned())?;
    for point in userns::mount_points_of(&info).iter().rev() {
        if point.starts_with("/proc/") {
            rustix::mount::unmount(point, UnmountFlags::DETACH)
                .doing(|| format!("uncovering {point}"))?;
        }
    }
    Ok(())
}

/// The capabilities that a runtime is to give its process, by name.
///
/// # Errors
/// Those of `capget(2)`.
pub(super) fn runtime_capabilities(security: Security) -> Result<Vec<&'static str>, Failure> {
    Ok(match security {
        // One more than the step's, to filter its system calls with; then it is given up.
        Security::Sandbox => names(CAPABILITIES | CapabilitySet::SYS_ADMIN),
        // Not one that this process lacks, which it could not give.
        Security::Insecure => {
            let own = rustix::thread::capabilities(None);
            names(own.doing(|| "reading capabilities".to_owned())?.permitted)
        }
    })
}

fn names(capabilities: CapabilitySet) -> Vec<&'static str> {
    CAPABILITY_NAMES
        .iter()
        .enumerate()
        .filter(|(number, _)| capabilities.bits() >> number & 1 == 1)
        .map(|(_, name)| *name)
        .collect()
}

/// Why a program could not be executed.
#[derive(Debug, PartialEq, Eq)]
struct Refused {
    status: i32,
    message: String,
}

/// Executes the command; returns only where that is impossible.
fn become_step(command: &Command) -> Refused {
    let Some(program) = command.args.first() else {
        return Refused {
            status: NOT_FOUND,
            message: "exec: no program was given".to_owned(),
        };
    };
    let name = OsStr::from_bytes(program.to_bytes());
    let mut denied = None;
    for candidate in candidates(name, &command.path) {
        let Ok(path) = CString::new(candidate.as_bytes()) else {
            continue;
        };
        let error = sys::execve(&path, &command.args, &command.env);
        let there = std::fs::metadata(&candidate).is_ok_and(|found| !found.is_dir());
        match error.kind() {
            // It is there, but its interpreter is not.
            io::ErrorKind::NotFound if there => return refused(&candidate, &error),
            io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => {}
            // The search goes on, as a shell's does.
            io::ErrorKind::PermissionDenied => {
                if there || name.as_bytes().contains(&b'/') {
                    denied.get_or_insert_with(|| refused(&candidate, &error));
                }
            }
            _ => return refused(&candidate, &error),
        }
    }
    denied.unwrap_or_else(|| Refused {
        status: NOT_FOUND,
        message: match name.as_bytes().contains(&b'/') {
            true => format!("exec: {name:?}: no such file or directory"),
            false => format!("exec: {name:?}: executable file not found in $PATH"),
        },
    })
}

fn refused(path: &OsStr, error: &io::Error) -> Refused {
    let (status, reason) = match error.kind() {
        io::ErrorKind::NotFound => (
            NOT_FOUND,
            "no such file or directory: its interpreter is missing".to_owned(),
        ),
        io::ErrorKind::PermissionDenied => (NOT_EXECUTABLE, "permission denied".to_owned()),
        _ if error.raw_os_error() == Some(libc::ENOEXEC) => {
            (NOT_EXECUTABLE, "exec format error".to_owned())
        }
        _ => (NOT_EXECUTABLE, error.to_string()),
    };
    Refused {
        status,
        message: format!("exec: {path:?}: {reason}"),
    }
}

/// Where a program may be: itself if it names a path, else in each directory of `path`.
fn candidates(name: &OsStr, path: &OsStr) -> Vec<OsString> {
    if name.is_empty() {
        return Vec::new();
    }
    if name.as_bytes().contains(&b'/') {
        return vec![name.to_owned()];
    }
    path.as_bytes()
        .split(|&byte| byte == b':')
        // What is empty or relative depends on the directory; Docker, too, passes it over.
        .filter(|directory| directory.starts_with(b"/"))
        .map(|directory| {
            Path::new(OsStr::from_bytes(directory))
                .join(name)
                .into_os_string()
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_are_dockers() {
        assert_eq!(CAPABILITIES.bits(), 0xa804_25fb);
        assert_eq!(
            names(CAPABILITIES),
            [
                "CAP_CHOWN",
                "CAP_DAC_OVERRIDE",
                "CAP_FOWNER",
                "CAP_FSETID",
                "CAP_KILL",
                "CAP_SETGID",
                "CAP_SETUID",
                "CAP_SETPCAP",
                "CAP_NET_BIND_SERVICE",
                "CAP_NET_RAW",
                "CAP_SYS_CHROOT",
                "CAP_MKNOD",
                "CAP_AUDIT_WRITE",
                "CAP_SETFCAP",
            ]
        );
    }

    #[test]
    fn a_program_is_searched_in_absolute_directories() {
        let check = |name: &str, path: &str, expected: &[&str]| {
            let found = candidates(OsStr::new(name), OsStr::new(path));
            assert_eq!(found, expected, "{name} in {path}");
        };
        check("ls", "/bin:/usr/bin", &["/bin/ls", "/usr/bin/ls"]);
        check("ls", ":.:bin:/bin", &["/bin/ls"]);
        check("./ls", "/bin", &["./ls"]);
        check("/x/ls", "/bin", &["/x/ls"]);
        check("", "/bin", &[]);
        check("ls", "", &[]);
    }

    #[test]
    fn what_cannot_be_executed_has_the_status_of_a_shell() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str, text: &str, mode: u32| {
            let path = dir.path().join(name);
            std::fs::write(&path, text).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
            path.into_os_string()
        };
        let check = |program: &OsStr, path: &OsStr, status: i32, message: &str| {
            let command = Command {
                args: vec![CString::new(program.as_bytes()).unwrap()],
                env: Vec::new(),
                path: path.to_owned(),
            };
            let refused = become_step(&command);
            assert_eq!(
                (refused.status, refused.message.as_str()),
                (status, message)
            );
        };
        let path = dir.path().as_os_str();
        check(
            OsStr::new("absent"),
            path,
            127,
            "exec: \"absent\": executable file not found in $PATH",
        );
        check(
            OsStr::new("/absent/x"),
            path,
            127,
            "exec: \"/absent/x\": no such file or directory",
        );
        let plain = file("plain", "text", 0o644);
        check(
            &plain,
            path,
            126,
            &format!("exec: {plain:?}: permission denied"),
        );
        check(
            OsStr::new("plain"),
            path,
            126,
            &format!("exec: {plain:?}: permission denied"),
        );
        let script = file("script", "#!/absent/interpreter\n", 0o755);
        check(
            &script,
            path,
            127,
            &format!("exec: {script:?}: no such file or directory: its interpreter is missing"),
        );
        let garbage = file("garbage", "\u{1}\u{2}", 0o755);
        check(
            &garbage,
            path,
            126,
            &format!("exec: {garbage:?}: exec format error"),
        );
        std::fs::create_dir(dir.path().join("directory")).unwrap();
        check(
            OsStr::new("directory"),
            path,
            127,
            "exec: \"directory\": executable file not found in $PATH",
        );
    }
}
