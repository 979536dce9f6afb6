//! The system calls that a step may make: Docker's default profile, as a program for the kernel's
//! filter (`seccomp(2)`).
//!
//! The numbers of what is allowed lie close together, so the program looks a number up in a tree
//! of ranges, and a call costs some eight comparisons rather than hundreds.
//!
//! Arguments are compared by their lower halves, which are all that the kernel takes of them.

mod table;

use std::collections::BTreeMap;

use libc::sock_filter;

use table::{ABIS, Numbers, Rule};

/// Where the kernel shows what is called; `struct seccomp_data` of `seccomp(2)`.
const NUMBER_AT: u32 = 0;
const ARCHITECTURE_AT: u32 = 4;
/// The lower half of the first argument: all machines of the table are little-endian.
const ARGUMENT_AT: u32 = 16;

/// `CLONE_NEW*` of `clone(2)`, other than `CLONE_NEWTIME`, which it does not take.
const NEW_NAMESPACES: u32 = 0x7e02_0000;

/// `PER_LINUX`, `PER_LINUX32`, both with `UNAME26`, and the question which it is.
const PERSONALITIES: [u32; 5] = [0, 8, 0x0002_0000, 0x0002_0008, 0xffff_ffff];

/// The program for steps on this machine; none where its numbers are not known.
pub(super) fn program() -> Option<Vec<sock_filter>> {
    program_for(std::env::consts::ARCH)
}

/// What to say where there is no program.
pub(super) fn unfiltered_note() -> Option<String> {
    let machine = std::env::consts::ARCH;
    let note = || {
        format!(
            "system calls of RUN steps are not filtered: their numbers on {machine} are not known"
        )
    };
    program().is_none().then(note)
}

fn program_for(machine: &str) -> Option<Vec<sock_filter>> {
    let mut abis = ABIS.iter().filter(|abi| abi.machine == machine).peekable();
    abis.peek()?;
    let mut program = vec![load(ARCHITECTURE_AT)];
    program.extend(abis.fold(vec![verdict(Rule::Missing)], |rest, abi| {
        let mut body = vec![load(NUMBER_AT)];
        body.extend(tree(&ranges(&Numbers::of(abi))));
        choice(libc::BPF_JEQ, abi.audit, body, rest)
    }));
    Some(program)
}

/// From which number on which rule holds, in order, from 0 on.
fn ranges(numbers: &Numbers) -> Vec<(u32, Rule)> {
    let Numbers { rules, newest } = numbers;
    // What is newer than the table does not exist, so that programs do without it.
    let unnamed = |number: u32| match number > *newest {
        true => Rule::Missing,
        false => Rule::Deny,
    };
    let mut from = BTreeMap::from([(0, Rule::Deny), (newest + 1, Rule::Missing)]);
    for (&number, &rule) in rules {
        from.insert(number, rule);
        if !rules.contains_key(&(number + 1)) {
            from.insert(number + 1, unnamed(number + 1));
        }
    }
    let mut ranges: Vec<(u32, Rule)> = from.into_iter().collect();
    ranges.dedup_by_key(|(_, rule)| *rule);
    ranges
}

/// Finds the range of the loaded number, and does what its rule says.
fn tree(ranges: &[(u32, Rule)]) -> Vec<sock_filter> {
    match ranges {
        [] => vec![verdict(Rule::Deny)],
        [(_, rule)] => leaf(*rule),
        _ => {
            let (below, above) = ranges.split_at(ranges.len() / 2);
            choice(libc::BPF_JGE, above[0].0, tree(above), tree(below))
        }
    }
}

fn leaf(rule: Rule) -> Vec<sock_filter> {
    let (allow, deny) = (|| vec![verdict(Rule::Allow)], || vec![verdict(Rule::Deny)]);
    let mut program = match rule {
        Rule::Allow | Rule::Deny | Rule::Missing => return vec![verdict(rule)],
        _ => vec![load(ARGUMENT_AT)],
    };
    program.extend(match rule {
        Rule::Socket => [libc::AF_ALG, libc::AF_VSOCK]
            .iter()
            .fold(allow(), |rest, &family| {
                choice(libc::BPF_JEQ, family.cast_unsigned(), deny(), rest)
            }),
        Rule::Personality => PERSONALITIES.iter().fold(deny(), |rest, &persona| {
            choice(libc::BPF_JEQ, persona, allow(), rest)
        }),
        _ => choice(libc::BPF_JSET, NEW_NAMESPACES, deny(), allow()),
    });
    program
}

/// Compares what is loaded with `with`: where the comparison holds, `yes` is run, else `no`.
fn choice(
    comparison: u32,
    with: u32,
    yes: Vec<sock_filter>,
    no: Vec<sock_filter>,
) -> Vec<sock_filter> {
    let code = libc::BPF_JMP | comparison | libc::BPF_K;
    let mut program = Vec::with_capacity(yes.len() + no.len() + 2);
    match u8::try_from(no.len()) {
        Ok(length) => program.push(instruction(code, length, 0, with)),
        Err(_) => {
            program.push(instruction(code, 0, 1, with));
            let length = u32::try_from(no.len()).unwrap_or(u32::MAX);
            program.push(instruction(libc::BPF_JMP | libc::BPF_JA, 0, 0, length));
        }
    }
    program.extend(no);
    program.extend(yes);
    program
}

fn load(at: u32) -> sock_filter {
    instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, at)
}

/// Ends the program; a rule that looks at arguments is none here.
fn verdict(rule: Rule) -> sock_filter {
    let errno = |errno: i32| libc::SECCOMP_RET_ERRNO | errno.cast_unsigned();
    let value = match rule {
        Rule::Allow => libc::SECCOMP_RET_ALLOW,
        Rule::Missing => errno(libc::ENOSYS),
        _ => errno(libc::EPERM),
    };
    instruction(libc::BPF_RET | libc::BPF_K, 0, 0, value)
}

fn instruction(code: u32, yes: u8, no: u8, k: u32) -> sock_filter {
    sock_filter {
        // Eight bits of it are in use.
        code: code as u16,
        jt: yes,
        jf: no,
        k,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the kernel does with the instructions that are used here.
    fn run(program: &[sock_filter], architecture: u32, number: u32, argument: u64) -> u32 {
        let (mut at, mut loaded) = (0, 0);
        for _ in 0..program.len() {
            let sock_filter { code, jt, jf, k } = program[at];
            let jump = |holds: bool| 1 + usize::from(if holds { jt } else { jf });
            at += match u32::from(code) {
                0x20 => {
                    loaded = match k {
                        NUMBER_AT => number,
                        ARCHITECTURE_AT => architecture,
                        ARGUMENT_AT => argument as u32,
                        _ => panic!("a load from {k}"),
                    };
                    1
                }
                0x05 => 1 + k as usize,
                0x15 => jump(loaded == k),
                0x35 => jump(loaded >= k),
                0x45 => jump(loaded & k != 0),
                0x06 => return k,
                other => panic!("instruction {other:#x}"),
            };
        }
        panic!("no end");
    }

    const ALLOW: u32 = 0x7fff_0000;
    const EPERM: u32 = 0x0005_0001;
    const ENOSYS: u32 = 0x0005_0026;

    #[test]
    fn every_number_has_the_verdict_of_its_rule() {
        for machine in ["x86_64", "aarch64"] {
            let program = program_for(machine).unwrap();
            assert!(program.len() < 1500, "{}", program.len());
            for abi in ABIS.iter().filter(|abi| abi.machine == machine) {
                let Numbers { rules, newest } = Numbers::of(abi);
                let far = [983_042, 983_045, 0x4000_0000, 0x4000_0029, u32::MAX];
                for number in (0..1000).chain(far) {
                    let want = match rules.get(&number) {
                        Some(Rule::Allow | Rule::Socket | Rule::Personality | Rule::Clone) => ALLOW,
                        Some(Rule::Missing) => ENOSYS,
                        None if number > newest => ENOSYS,
                        _ => EPERM,
                    };
                    assert_eq!(
                        run(&program, abi.audit, number, 0),
                        want,
                        "{abi:?} {number}"
                    );
                }
            }
            // Programs of an ABI that nobody knows can do nothing.
            assert_eq!(run(&program, 0xc000_0015, 1, 0), ENOSYS);
        }
        assert!(program_for("mips").is_none());
    }

    #[test]
    fn arguments_decide_where_the_profile_says_so() {
        let program = program_for("x86_64").unwrap();
        let check = |number: u32, cases: &[(u64, u32)]| {
            for (argument, want) in cases {
                let got = run(&program, 0xc000_003e, number, *argument);
                assert_eq!(got, *want, "{number} {argument:#x}");
            }
        };
        // socket: AF_UNIX, AF_NETLINK, AF_ALG, AF_VSOCK, what comes after, and one in whose upper
        // half, which the kernel does not look at, something stands.
        check(
            41,
            &[
                (1, ALLOW),
                (16, ALLOW),
                (38, EPERM),
                (40, EPERM),
                (39, ALLOW),
                (41, ALLOW),
            ],
        );
        check(41, &[((1 << 32) + 40, EPERM)]);
        // personality: none, ADDR_NO_RANDOMIZE, UNAME26, the question.
        check(
            135,
            &[
                (0, ALLOW),
                (0x0004_0000, EPERM),
                (0x0002_0000, ALLOW),
                (0xffff_ffff, ALLOW),
            ],
        );
        // clone: a thread, SIGCHLD alone, a new user namespace, a new network.
        check(
            56,
            &[
                (0x003d_0f00, ALLOW),
                (17, ALLOW),
                (0x1000_0011, EPERM),
                (0x4000_0011, EPERM),
            ],
        );
    }
}
