//! Which system calls are asked about, and what they mean for owners; and the program that has the
//! kernel's filter ask (`seccomp(2)`).
//!
//! Only calls of this machine's own kind: a program of another (32 bits on a machine of 64) makes
//! them unasked, and is refused users that do not exist.

use libc::sock_filter;

use super::ids::{Change, Kind};
use super::registers::Call;

/// A file as a call names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct At {
    /// The directory that a relative path begins at; `AT_FDCWD`.
    pub(super) dir: i32,
    /// Address of the path.
    pub(super) path: u64,
    /// Whether a link at the end is followed.
    pub(super) follow: bool,
}

/// What a call means.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Meaning {
    /// `stat(2)` into a `struct stat` at this address.
    Stat(u64),
    /// `statx(2)` into a `struct statx` at this address.
    Statx(u64),
    /// A file that is open gets another owner.
    ChownOpen { fd: i32, uid: u32, gid: u32 },
    /// A file with a name does. The owner is in the arguments from `ids_at` on.
    Chown {
        at: At,
        /// Whether an empty path means `at.dir` itself.
        may_be_empty: bool,
        uid: u32,
        gid: u32,
        ids_at: usize,
    },
    /// A file is opened, and made where there is none.
    Open {
        at: At,
        /// Whether it is surely new where that succeeds.
        is_new: bool,
    },
    /// The same, with its flags in a `struct open_how` at this address.
    OpenHow { at: At, how: u64 },
    /// A directory, link or special file is made.
    Make(At),
    /// A file gets another name.
    Link {
        from: At,
        /// Whether an empty path means `from.dir` itself.
        may_be_empty: bool,
        to: At,
    },
    /// The process changes who it is.
    Become(Change),
    /// `setgroups`, of so many at this address.
    SetGroups { count: u64, list: u64 },
    /// It asks for one of its numbers.
    Tell { kind: Kind, effective: bool },
    /// It asks for real, effective and saved number, at these addresses.
    TellThree { kind: Kind, places: [u64; 3] },
    /// It asks for its groups: so many, at this address.
    TellGroups { count: u64, list: u64 },
}

const AT_CWD: i32 = libc::AT_FDCWD;

/// Bits of `open(2)` that make files: `O_CREAT`, and that of `O_TMPFILE` which is its own.
const MAKES: u32 = libc::O_CREAT.cast_unsigned() | UNNAMED;
const UNNAMED: u32 = (libc::O_TMPFILE & !libc::O_DIRECTORY).cast_unsigned();

/// The calls that are asked about always.
const ALWAYS: &[i64] = &[
    libc::SYS_fstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_fchown,
    libc::SYS_fchownat,
    libc::SYS_openat2,
    libc::SYS_mkdirat,
    libc::SYS_mknodat,
    libc::SYS_symlinkat,
    libc::SYS_linkat,
    libc::SYS_setuid,
    libc::SYS_setgid,
    libc::SYS_setreuid,
    libc::SYS_setregid,
    libc::SYS_setresuid,
    libc::SYS_setresgid,
    libc::SYS_setfsuid,
    libc::SYS_setfsgid,
    libc::SYS_setgroups,
    libc::SYS_getuid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getegid,
    libc::SYS_getresuid,
    libc::SYS_getresgid,
    libc::SYS_getgroups,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_stat,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_lstat,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_chown,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_lchown,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_creat,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_mkdir,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_mknod,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_symlink,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_link,
];

/// Those that are asked about where the argument of this number has one of the bits [`MAKES`].
const WHERE_IT_MAKES: &[(i64, u32)] = &[
    (libc::SYS_openat, 2),
    #[cfg(target_arch = "x86_64")]
    (libc::SYS_open, 1),
];

#[cfg(target_arch = "x86_64")]
const ARCHITECTURE: u32 = 0xc000_003e;
#[cfg(target_arch = "aarch64")]
const ARCHITECTURE: u32 = 0xc000_00b7;

/// The program: everything is allowed, and what means something is asked about.
pub(in crate::sandbox) fn filter() -> Vec<sock_filter> {
    const NUMBER_AT: u32 = 0;
    const ARCHITECTURE_AT: u32 = 4;
    const ARGUMENTS_AT: u32 = 16;
    let line = |code: u32, yes: u8, no: u8, k: u32| sock_filter {
        // Eight bits of it are in use.
        code: code as u16,
        jt: yes,
        jf: no,
        k,
    };
    let load = |at| line(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, at);
    let equals = |k, yes, no| line(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, yes, no, k);
    let verdict = |k| line(libc::BPF_RET | libc::BPF_K, 0, 0, k);
    let (allow, ask) = (libc::SECCOMP_RET_ALLOW, libc::SECCOMP_RET_TRACE);
    let mut program = vec![
        load(ARCHITECTURE_AT),
        equals(ARCHITECTURE, 1, 0),
        verdict(allow),
        load(NUMBER_AT),
    ];
    for number in ALWAYS {
        program.extend([equals(*number as u32, 0, 1), verdict(ask)]);
    }
    for (number, argument) in WHERE_IT_MAKES {
        let has = libc::BPF_JMP | libc::BPF_JSET | libc::BPF_K;
        program.extend([
            equals(*number as u32, 0, 4),
            load(ARGUMENTS_AT + 8 * argument),
            line(has, 0, 1, MAKES),
            verdict(ask),
            verdict(allow),
        ]);
    }
    program.push(verdict(allow));
    program
}

/// What `call` means; absent where nothing.
pub(super) fn meaning(call: &Call) -> Option<Meaning> {
    let a = &call.arguments;
    // The kernel looks at the lower halves of numbers.
    let (int, id) = (|n: usize| a[n] as i32, |n: usize| a[n] as u32);
    let at = |dir, path, follow| At { dir, path, follow };
    let no_follow = |flags: i32| flags & libc::AT_SYMLINK_NOFOLLOW != 0;
    let open = |at: At, flags: u32| open(at, flags);
    use Kind::{Group, User};
    Some(match call.number {
        #[cfg(target_arch = "x86_64")]
        libc::SYS_stat | libc::SYS_lstat => Meaning::Stat(a[1]),
        libc::SYS_fstat => Meaning::Stat(a[1]),
        libc::SYS_newfstatat => Meaning::Stat(a[2]),
        libc::SYS_statx => Meaning::Statx(a[4]),
        #[cfg(target_arch = "x86_64")]
        libc::SYS_chown | libc::SYS_lchown => Meaning::Chown {
            at: at(AT_CWD, a[0], call.number == libc::SYS_chown),
            may_be_empty: false,
            uid: id(1),
            gid: id(2),
            ids_at: 1,
        },
        libc::SYS_fchownat => Meaning::Chown {
            at: at(int(0), a[1], !no_follow(int(4))),
            may_be_empty: int(4) & libc::AT_EMPTY_PATH != 0,
            uid: id(2),
            gid: id(3),
            ids_at: 2,
        },
        libc::SYS_fchown => Meaning::ChownOpen {
            fd: int(0),
            uid: id(1),
            gid: id(2),
        },
        #[cfg(target_arch = "x86_64")]
        libc::SYS_creat => open(at(AT_CWD, a[0], true), libc::O_CREAT.cast_unsigned())?,
        #[cfg(target_arch = "x86_64")]
        libc::SYS_open => open(at(AT_CWD, a[0], true), id(1))?,
        libc::SYS_openat => open(at(int(0), a[1], true), id(2))?,
        libc::SYS_openat2 => Meaning::OpenHow {
            at: at(int(0), a[1], true),
            how: a[2],
        },
        #[cfg(target_arch = "x86_64")]
        libc::SYS_mkdir | libc::SYS_mknod => Meaning::Make(at(AT_CWD, a[0], false)),
        #[cfg(target_arch = "x86_64")]
        libc::SYS_symlink => Meaning::Make(at(AT_CWD, a[1], false)),
        libc::SYS_mkdirat | libc::SYS_mknodat => Meaning::Make(at(int(0), a[1], false)),
        libc::SYS_symlinkat => Meaning::Make(at(int(1), a[2], false)),
        #[cfg(target_arch = "x86_64")]
        libc::SYS_link => Meaning::Link {
            from: at(AT_CWD, a[0], false),
            may_be_empty: false,
            to: at(AT_CWD, a[1], false),
        },
        libc::SYS_linkat => Meaning::Link {
            from: at(int(0), a[1], int(4) & libc::AT_SYMLINK_FOLLOW != 0),
            may_be_empty: int(4) & libc::AT_EMPTY_PATH != 0,
            to: at(int(2), a[3], false),
        },
        libc::SYS_setuid => Meaning::Become(Change::One(User, id(0))),
        libc::SYS_setgid => Meaning::Become(Change::One(Group, id(0))),
        libc::SYS_setreuid => Meaning::Become(Change::Two(User, id(0), id(1))),
        libc::SYS_setregid => Meaning::Become(Change::Two(Group, id(0), id(1))),
        libc::SYS_setresuid => Meaning::Become(Change::Three(User, id(0), id(1), id(2))),
        libc::SYS_setresgid => Meaning::Become(Change::Three(Group, id(0), id(1), id(2))),
        libc::SYS_setfsuid => Meaning::Become(Change::Filesystem(User, id(0))),
        libc::SYS_setfsgid => Meaning::Become(Change::Filesystem(Group, id(0))),
        libc::SYS_setgroups => Meaning::SetGroups {
            count: u64::from(id(0)),
            list: a[1],
        },
        libc::SYS_getgroups => Meaning::TellGroups {
            count: u64::from(id(0)),
            list: a[1],
        },
        libc::SYS_getuid | libc::SYS_geteuid => Meaning::Tell {
            kind: User,
            effective: call.number == libc::SYS_geteuid,
        },
        libc::SYS_getgid | libc::SYS_getegid => Meaning::Tell {
            kind: Group,
            effective: call.number == libc::SYS_getegid,
        },
        libc::SYS_getresuid | libc::SYS_getresgid => Meaning::TellThree {
            kind: match call.number {
                libc::SYS_getresuid => User,
                _ => Group,
            },
            places: [a[0], a[1], a[2]],
        },
        _ => return None,
    })
}

/// What opening a file with these flags means; nothing where it makes none.
pub(super) fn open(at: At, flags: u32) -> Option<Meaning> {
    if flags & MAKES == 0 {
        return None;
    }
    let has = |flag: i32| flags & flag.cast_unsigned() != 0;
    let follow = !has(libc::O_NOFOLLOW);
    Some(Meaning::Open {
        at: At { follow, ..at },
        is_new: has(libc::O_EXCL) || flags & UNNAMED != 0,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_call_that_is_asked_about_means_something() {
        for number in ALWAYS {
            let call = Call {
                number: *number,
                arguments: [libc::O_CREAT as u64; 6],
            };
            assert!(meaning(&call).is_some(), "{number}");
        }
        for (number, argument) in WHERE_IT_MAKES {
            let mut call = Call {
                number: *number,
                arguments: [0; 6],
            };
            assert_eq!(meaning(&call), None);
            call.arguments[*argument as usize] = libc::O_CREAT as u64;
            assert!(meaning(&call).is_some(), "{number}");
        }
        let other = Call {
            number: libc::SYS_read,
            arguments: [0; 6],
        };
        assert_eq!(meaning(&other), None);
    }

    #[test]
    fn flags_say_whether_a_file_is_new() {
        let at = At {
            dir: 3,
            path: 9,
            follow: true,
        };
        let check = |flags: i32, want: Option<(bool, bool)>| {
            let got = open(at, flags.cast_unsigned()).map(|meaning| match meaning {
                Meaning::Open { at, is_new } => (at.follow, is_new),
                other => panic!("{other:?}"),
            });
            assert_eq!(got, want, "{flags:#o}");
        };
        check(libc::O_RDONLY | libc::O_DIRECTORY, None);
        check(libc::O_CREAT | libc::O_WRONLY, Some((true, false)));
        check(libc::O_CREAT | libc::O_EXCL, Some((true, true)));
        check(libc::O_CREAT | libc::O_NOFOLLOW, Some((false, false)));
        check(libc::O_TMPFILE | libc::O_RDWR, Some((true, true)));
    }
}
