//! The numbers of system calls, and what the profile says of each: `syscalls.txt`.

use std::collections::BTreeMap;

/// What is done with a system call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rule {
    /// It is made, whatever its arguments.
    Allow,
    /// It fails with `EPERM`.
    Deny,
    /// It fails with `ENOSYS`.
    Missing,
    /// `socket(2)`: not for `AF_ALG` and `AF_VSOCK`.
    Socket,
    /// `personality(2)`: those that change nothing but what `uname` says, and asking.
    Personality,
    /// `clone(2)`: without new namespaces.
    Clone,
}

/// How programs of one kind make system calls.
#[derive(Debug)]
pub(super) struct Abi {
    /// The machine whose kernel runs them.
    pub(super) machine: &'static str,
    /// What the kernel calls it: `AUDIT_ARCH_*` of `linux/audit.h`.
    pub(super) audit: u32,
    /// Where its numbers are in the table.
    column: usize,
}

/// All that the table has; those of one machine beside each other, its own first.
pub(super) const ABIS: [Abi; 4] = [
    abi("x86_64", 0xc000_003e, 0),
    abi("x86_64", 0x4000_0003, 1),
    abi("aarch64", 0xc000_00b7, 2),
    abi("aarch64", 0x4000_0028, 3),
];

const fn abi(machine: &'static str, audit: u32, column: usize) -> Abi {
    Abi {
        machine,
        audit,
        column,
    }
}

/// What is said of the numbers of one ABI.
#[derive(Debug)]
pub(super) struct Numbers {
    /// By number.
    pub(super) rules: BTreeMap<u32, Rule>,
    /// The largest number that the table's kernel has, other than those that some machines have far above.
    pub(super) newest: u32,
}

impl Numbers {
    /// Those of `abi`.
    pub(super) fn of(abi: &Abi) -> Self {
        let mut numbers = Self {
            rules: BTreeMap::new(),
            newest: 0,
        };
        for (_, rule, columns) in lines() {
            let Ok(number) = columns[abi.column].parse() else {
                continue;
            };
            let rule = match rule {
                "allow" => Rule::Allow,
                "missing" => Rule::Missing,
                "socket" => Rule::Socket,
                "personality" => Rule::Personality,
                "clone" => Rule::Clone,
                "newest" => {
                    numbers.newest = number;
                    continue;
                }
                // What the table does not say is not allowed.
                _ => Rule::Deny,
            };
            numbers.rules.insert(number, rule);
        }
        numbers
    }
}

/// Name, rule and numbers of each line.
fn lines() -> impl Iterator<Item = (&'static str, &'static str, [&'static str; 4])> {
    let lines = include_str!("syscalls.txt").lines();
    lines
        .filter(|line| !line.starts_with('#'))
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            let (name, rule) = (words.next()?, words.next()?);
            let columns = <[&str; 4]>::try_from(words.collect::<Vec<_>>()).ok()?;
            Some((name, rule, columns))
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_line_says_something_and_no_number_is_there_twice() {
        let text = include_str!("syscalls.txt");
        let meant = text.lines().filter(|line| !line.starts_with('#')).count();
        assert_eq!(lines().count(), meant);
        let rules = [
            "allow",
            "missing",
            "socket",
            "personality",
            "clone",
            "newest",
        ];
        for (name, rule, columns) in lines() {
            assert!(rules.contains(&rule), "{name}");
            assert!(columns.iter().any(|number| *number != "-"), "{name}");
        }
        for abi in &ABIS {
            let numbered = lines().filter(|(_, rule, columns)| {
                *rule != "newest" && columns[abi.column].parse::<u32>().is_ok()
            });
            let numbers = Numbers::of(abi);
            assert_eq!(numbered.count(), numbers.rules.len(), "{abi:?}");
            assert_eq!(numbers.newest, 471);
        }
    }

    /// Those that this program itself is compiled with.
    #[test]
    #[cfg(target_arch = "x86_64")]
    fn numbers_are_those_of_the_kernel() {
        let numbers = Numbers::of(&ABIS[0]);
        for (number, rule) in [
            (libc::SYS_openat, Some(Rule::Allow)),
            (libc::SYS_execve, Some(Rule::Allow)),
            (libc::SYS_chroot, Some(Rule::Allow)),
            (libc::SYS_ptrace, Some(Rule::Allow)),
            (libc::SYS_socket, Some(Rule::Socket)),
            (libc::SYS_personality, Some(Rule::Personality)),
            (libc::SYS_clone, Some(Rule::Clone)),
            (libc::SYS_clone3, Some(Rule::Missing)),
            (libc::SYS_mount, None),
            (libc::SYS_unshare, None),
            (libc::SYS_bpf, None),
            (libc::SYS_keyctl, None),
            (libc::SYS_open_by_handle_at, None),
            (libc::SYS_io_uring_setup, None),
        ] {
            let number = u32::try_from(number).unwrap();
            assert_eq!(numbers.rules.get(&number).copied(), rule, "{number}");
        }
    }
}
