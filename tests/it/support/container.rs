//! A container as Docker makes it by default, without Docker: root with the capabilities of its
//! default set, in PID, IPC, UTS and mount namespaces, and with a filter of system calls that
//! refuses what makes namespaces and mounts.
//!
//! The filter is set by this test binary, which is started again for that: see
//! [`enter_where_told`].

use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;

use libc::sock_filter;

/// Docker's default capabilities, in the words of `setpriv`.
pub const CAPABILITIES: [&str; 14] = [
    "chown",
    "dac_override",
    "fsetid",
    "fowner",
    "mknod",
    "net_raw",
    "setgid",
    "setuid",
    "setfcap",
    "setpcap",
    "net_bind_service",
    "sys_chroot",
    "kill",
    "audit_write",
];

/// The test that calls [`enter_where_told`].
const HELPER: &str = "ladder::ladder_a_container_is_as_docker_makes_it";
/// What separates its name from the command.
const SEPARATOR: &str = "--in-container";

/// Whether one can be made here; else why not.
///
/// # Errors
/// What is missing.
pub fn possible() -> Result<(), String> {
    if !super::is_root() {
        return Err("only root has devices and all users without a user namespace".into());
    }
    super::programs(&["unshare", "setpriv"])
}

/// The words before a command that have it run in a container with these capabilities.
pub fn words(capabilities: &[&str]) -> Vec<String> {
    let own = std::env::current_exe().expect("this test binary");
    let namespaces = [
        "unshare",
        "--mount",
        "--pid",
        "--fork",
        "--kill-child",
        "--mount-proc",
        "--ipc",
        "--uts",
    ];
    let list: Vec<String> = std::iter::once("-all".to_owned())
        .chain(capabilities.iter().map(|name| format!("+{name}")))
        .collect();
    let helper = ["--exact", "--nocapture", "--quiet", "--", HELPER, SEPARATOR];
    let setpriv = [
        "setpriv".to_owned(),
        "--inh-caps=-all".to_owned(),
        format!("--bounding-set={}", list.join(",")),
    ];
    let mut words: Vec<String> = namespaces.map(str::to_owned).into();
    words.push(own.to_str().expect("a path of text").to_owned());
    words.extend(helper.map(str::to_owned));
    words.extend(setpriv);
    words
}

/// Where this test binary was started by [`words`], becomes the command, filtered.
///
/// # Panics
/// Where that fails.
pub fn enter_where_told() {
    let mut args = std::env::args_os()
        .skip_while(|arg| arg != SEPARATOR)
        .skip(1);
    let Some(program) = args.next() else { return };
    filter().expect("root can filter system calls");
    let error = Command::new(&program).args(args).exec();
    panic!("{}: {error}", program.display());
}

/// Refuses what Docker's profile refuses who has not `CAP_SYS_ADMIN`, as far as it makes or
/// enters namespaces, or mounts.
fn filter() -> io::Result<()> {
    const NUMBER_AT: u32 = 0;
    const FIRST_ARGUMENT_AT: u32 = 16;
    const NEW_NAMESPACES: u32 = 0x7e02_0000;
    let refused = libc::SECCOMP_RET_ERRNO | libc::EPERM.cast_unsigned();
    let missing = libc::SECCOMP_RET_ERRNO | libc::ENOSYS.cast_unsigned();
    let number = |number: libc::c_long| u32::try_from(number).expect("a system call");
    let load = |at| instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, at);
    let answer = |answer| instruction(libc::BPF_RET | libc::BPF_K, 0, 0, answer);
    let unless = |comparison, with, length| {
        instruction(libc::BPF_JMP | comparison | libc::BPF_K, 0, length, with)
    };
    let mut program = vec![load(NUMBER_AT)];
    for call in [
        libc::SYS_unshare,
        libc::SYS_setns,
        libc::SYS_mount,
        libc::SYS_umount2,
        libc::SYS_pivot_root,
        libc::SYS_open_tree,
        libc::SYS_move_mount,
        libc::SYS_fsopen,
        libc::SYS_fsconfig,
        libc::SYS_fsmount,
        libc::SYS_fspick,
        libc::SYS_mount_setattr,
    ] {
        program.push(unless(libc::BPF_JEQ, number(call), 1));
        program.push(answer(refused));
    }
    // Its flags lie in memory, where no filter can read them.
    program.push(unless(libc::BPF_JEQ, number(libc::SYS_clone3), 1));
    program.push(answer(missing));
    program.push(unless(libc::BPF_JEQ, number(libc::SYS_clone), 3));
    program.push(load(FIRST_ARGUMENT_AT));
    program.push(unless(libc::BPF_JSET, NEW_NAMESPACES, 1));
    program.push(answer(refused));
    program.push(answer(libc::SECCOMP_RET_ALLOW));
    install(&program)
}

fn instruction(code: u32, yes: u8, no: u8, k: u32) -> sock_filter {
    sock_filter {
        code: u16::try_from(code).expect("eight bits"),
        jt: yes,
        jf: no,
        k,
    }
}

#[allow(unsafe_code, reason = "no safe wrapper is in the tree")]
fn install(program: &[sock_filter]) -> io::Result<()> {
    let program = libc::sock_fprog {
        len: u16::try_from(program.len()).expect("short"),
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
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
