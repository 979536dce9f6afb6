//! Each rung, tried in a process that is there for nothing else.

use std::io::{self, Write};
use std::process::{Command, Stdio};

use rustix::mount::{MountFlags, MountPropagationFlags};
use rustix::process::Pid;
use rustix::thread::UnshareFlags;

use super::{Guards, Lack, ids};
use crate::sandbox::chroot::Chroot;
use crate::sandbox::{ChrootLack, Rung, UsernsError, World, ladder, sys, tracer, userns};

/// The second argument of the process that is traced by another.
const TRACED: &str = "wait";

/// `__doctor RUNG`: tries it, and prints what is missing as a JSON list. `__doctor wait` waits for
/// the end of its input.
pub(crate) fn rung_main(args: &[std::ffi::OsString]) -> i32 {
    let name = args.first().and_then(|name| name.to_str());
    if name == Some(TRACED) {
        return match io::copy(&mut io::stdin(), &mut io::sink()) {
            Ok(_) => 0,
            Err(_) => 1,
        };
    }
    let Some(rung) = Rung::ALL.into_iter().find(|rung| name == Some(rung.name())) else {
        return 2;
    };
    // The helper that maps IDs must not get what the caller had open.
    if sys::keep_from(3).is_err() {
        return 1;
    }
    let lacks = match rung {
        Rung::Root => try_root(),
        Rung::MappedUser => try_mapped(),
        Rung::SingleId => try_single(),
        Rung::Chroot => try_chroot(),
        Rung::Traced => try_traced(),
    };
    let text = serde_json::to_string(&lacks).unwrap_or_default();
    match writeln!(io::stdout(), "{text}") {
        Ok(()) => 0,
        Err(_) => 1,
    }
}

fn try_root() -> Vec<Lack> {
    let uid = rustix::process::geteuid();
    if !uid.is_root() {
        return vec![not_root(uid.as_raw())];
    }
    if !userns::is_powerful_root() {
        return vec![
            Lack::new("root has no CAP_SYS_ADMIN")
                .by("CapEff")
                .unlocked_by("docker run --cap-add=SYS_ADMIN --security-opt apparmor=unconfined …"),
        ];
    }
    if let Err(error) = sys::unshare(UnshareFlags::NEWNS) {
        return Guards::here().of_namespaces("unshare(CLONE_NEWNS)", &error);
    }
    let map = std::fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    if userns::mapped_ids(&map) <= 1 {
        return vec![inherited_single()];
    }
    try_mount()
}

fn inherited_single() -> Lack {
    let lack = Lack::new(UsernsError::InheritedSingle.to_string()).by("/proc/self/uid_map");
    lack.unlocked_by("unshare --user --map-root-user --map-auto sockless build …")
}

fn not_root(uid: u32) -> Lack {
    let lack = Lack::new(format!("uid {uid} is not root"));
    lack.unlocked_by("sudo sockless build …")
}

fn try_mapped() -> Vec<Lack> {
    let (lacks, guards) = (missing_ids(), Guards::here());
    match userns::enter_user_namespace() {
        // The map of who has one ID only can be copied, and is of no use.
        Ok(World::MappedUser { uids: 0 | 1, .. }) => vec![inherited_single()],
        Ok(World::MappedUser { .. }) => try_mount(),
        Ok(World::SingleId { reason }) if lacks.is_empty() => vec![of_map(&reason)],
        Ok(World::SingleId { .. }) => lacks,
        Ok(World::Chroot { reason } | World::None { reason, .. }) => {
            // Both have to be lifted.
            [of_unshare(&guards, &reason), lacks].concat()
        }
        Ok(World::Root) => Vec::new(),
        Err(reason) => vec![of_inside(&guards, &reason)],
    }
}

/// Root maps its own IDs itself.
fn missing_ids() -> Vec<Lack> {
    match rustix::process::geteuid().is_root() {
        true => Vec::new(),
        false => ids::missing(&Guards::here()),
    }
}

fn of_map(reason: &UsernsError) -> Lack {
    let lack = Lack::new(reason.to_string());
    match reason.hint() {
        Some(hint) => lack.unlocked_by(hint),
        None => lack,
    }
}

const NEW_USER: &str = "unshare(CLONE_NEWUSER|CLONE_NEWNS)";

fn of_unshare(guards: &Guards, reason: &UsernsError) -> Vec<Lack> {
    match reason {
        UsernsError::Unshare { source, .. } => guards.of_namespaces(NEW_USER, source),
        other => vec![of_inside(guards, other)],
    }
}

/// What it means that a namespace was made and yet is of no use.
fn of_inside(guards: &Guards, reason: &UsernsError) -> Lack {
    match reason {
        UsernsError::Io { doing, source } => guards
            .of_mount("write(/proc/self/uid_map)", source)
            .because(doing),
        other => of_map(other),
    }
}

fn try_single() -> Vec<Lack> {
    let guards = Guards::here();
    let (uid, gid) = (rustix::process::geteuid(), rustix::process::getegid());
    if let Err(error) = sys::unshare(UnshareFlags::NEWUSER | UnshareFlags::NEWNS) {
        return guards.of_namespaces(NEW_USER, &error);
    }
    if let Err(reason) = userns::map_single(uid.as_raw(), gid.as_raw()) {
        return vec![of_inside(&guards, &reason)];
    }
    [try_mount(), try_trace()].concat()
}

/// Mounts something that nobody else sees.
fn try_mount() -> Vec<Lack> {
    let guards = Guards::here();
    let slave = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
    if let Err(error) = rustix::mount::mount_change("/", slave) {
        let lack = guards.of_mount("mount(/, MS_SLAVE)", &error.into());
        return vec![match error {
            rustix::io::Errno::INVAL => lack
                .because("the root directory is no mount point")
                .unlocked_by(
                    "unshare --mount --root=DIR sockless build …, after mount --bind DIR DIR",
                ),
            _ => lack,
        }];
    }
    match rustix::mount::mount("sockless", "/", "tmpfs", MountFlags::NODEV, None) {
        Ok(()) => Vec::new(),
        Err(error) => vec![guards.of_mount("mount(tmpfs)", &error.into())],
    }
}

/// Where there is one ID, steps are traced.
fn try_trace() -> Vec<Lack> {
    let child = Command::new("/proc/self/exe")
        .args(["__doctor", TRACED])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn();
    let mut child = match child {
        Ok(child) => child,
        Err(error) => return vec![Lack::of_call("execve(/proc/self/exe)", &error)],
    };
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    let traced = pid.map_or(Ok(()), tracer::may_trace);
    let _ = child.kill();
    let _ = child.wait();
    match traced {
        Ok(()) => Vec::new(),
        Err(error) => vec![of_trace(&error)],
    }
}

fn of_trace(error: &io::Error) -> Lack {
    const SETTING: &str = "kernel.yama.ptrace_scope";
    let scope = std::fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope").unwrap_or_default();
    let lack = Guards::here().of_mount("ptrace(PTRACE_SEIZE)", error);
    match scope.trim() {
        // It cannot be lowered before the machine starts anew.
        "3" => lack.by(format!("{SETTING} = 3")).unlocked_by(format!(
            "echo {SETTING}=1 > /etc/sysctl.d/99-ptrace.conf && reboot"
        )),
        scope @ "2" => lack
            .by(format!("{SETTING} = {scope}"))
            .unlocked_by(format!("sysctl -w {SETTING}=1")),
        _ => lack,
    }
}

fn try_chroot() -> Vec<Lack> {
    let lack = match ladder::try_chroot() {
        Ok(()) => match Chroot::probe(&std::env::temp_dir()) {
            Ok(_) => return Vec::new(),
            Err(error) => super::host::of_error(&error),
        },
        Err(ChrootLack::NotRoot(uid)) => not_root(uid),
        Err(ChrootLack::Capabilities(names)) => {
            let flags: Vec<String> = names
                .iter()
                .map(|name| format!("--cap-add={}", name.trim_start_matches("CAP_")))
                .collect();
            Lack::new(ChrootLack::Capabilities(names).to_string())
                .by("CapEff")
                .unlocked_by(format!("docker run {} …", flags.join(" ")))
        }
        Err(ChrootLack::Refused { doing, source }) => {
            let call = call_of(doing);
            Guards::here().of_mount(call, &source).because(doing)
        }
    };
    vec![lack]
}

/// What the kernel was asked for by what [`ladder::try_chroot`] does.
fn call_of(doing: &str) -> &'static str {
    match doing {
        "giving a file to another user" => "fchown(1:1)",
        "changing the mode of another user's file" => "fchmod(4711)",
        "making a file in memory" => "memfd_create()",
        "reading capabilities" => "capget()",
        _ => "chroot(/)",
    }
}

/// It is not there yet; what it will need is said already.
fn try_traced() -> Vec<Lack> {
    let not_built = Lack::new("this version of sockless cannot run steps on this rung yet");
    [vec![not_built], try_trace()].concat()
}
