//! [`Limits`]: how much a process may use, and what is done where nothing can hold it to that.
//!
//! | limit | with a cgroup | without one |
//! | --- | --- | --- |
//! | memory | of all processes of the step together | of each process (`RLIMIT_DATA`) |
//! | pids | of the step's processes and threads | of those of the user, sockless's included (`RLIMIT_NPROC`); of root not at all |
//! | CPU, processors, memory nodes | yes | no |
//! | time, disk | by this program, see [`super::guard`] | the same |
//!
//! What holds is found out by making a cgroup with these limits, see [`super::cgroup`].

use std::collections::BTreeSet;
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use rustix::process::Resource;
use serde::{Deserialize, Serialize};

use super::cgroup::{Controller, Place};
use super::{Ulimit, userns};

/// How much one process, with all that it starts, may use. Absent is without a limit.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Memory, in bytes.
    pub memory_bytes: Option<u64>,
    /// Memory and swap together; where it is absent, twice the memory, as in Docker.
    pub memory_swap: Option<Swap>,
    /// The time of processors.
    pub cpu: CpuLimits,
    /// How many processes and threads there may be at a time.
    pub pids: Option<u64>,
    /// How long it may run.
    pub time: Option<Duration>,
    /// How much may be added to [`super::Process::written_dir`], in bytes.
    pub disk_bytes: Option<u64>,
    /// How much of its output whoever runs it should show, in bytes. The sandbox itself hands on
    /// everything.
    pub output_bytes: Option<u64>,
    /// The cgroup in which those of the steps are made: absolute from the top of each hierarchy, else
    /// below this program's own.
    pub cgroup_parent: Option<PathBuf>,
}

/// `--memory-swap`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Swap {
    /// As much swap as there is.
    Unlimited,
    /// Memory and swap together, in bytes.
    Total(u64),
}

/// How much of the processors may be used; Docker's words.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuLimits {
    /// The length of a period, in microseconds; 100 000 where it is absent.
    pub period_us: Option<u64>,
    /// The time in each period, in microseconds, of all processors together.
    pub quota_us: Option<u64>,
    /// The share where others want the processors too; 1024 is the usual one.
    pub shares: Option<u64>,
    /// Which processors, such as `0-2,4`.
    pub cpus: Option<String>,
    /// Which memory nodes.
    pub mems: Option<String>,
}

impl Limits {
    /// The controllers of cgroups that these limits need.
    pub(super) fn controllers(&self) -> BTreeSet<Controller> {
        let cpu = &self.cpu;
        let is_any = |wanted: &[bool]| wanted.contains(&true);
        let needed = [
            (
                Controller::Memory,
                is_any(&[self.memory_bytes.is_some(), self.memory_swap.is_some()]),
            ),
            (Controller::Pids, self.pids.is_some()),
            (
                Controller::Cpu,
                is_any(&[
                    cpu.period_us.is_some(),
                    cpu.quota_us.is_some(),
                    cpu.shares.is_some(),
                ]),
            ),
            (
                Controller::Cpuset,
                is_any(&[cpu.cpus.is_some(), cpu.mems.is_some()]),
            ),
        ];
        let needed = needed.into_iter().filter(|(_, needed)| *needed);
        needed.map(|(controller, _)| controller).collect()
    }

    /// What stands in for cgroups that are not there: limits of each process.
    ///
    /// Of `asked`, what somebody asked for by name, the lower one is kept.
    pub(super) fn stand_ins(&self, place: &Place, asked: &[Ulimit]) -> Vec<Ulimit> {
        let mut limits = asked.to_vec();
        let mut lower = |name: &str, resource: Resource, value: u64| {
            // Above the own limit, nobody but real root can go.
            let own = rustix::process::getrlimit(resource).maximum;
            let value = i64::try_from(value.min(own.unwrap_or(u64::MAX))).unwrap_or(i64::MAX);
            let least = |limit: i64| if limit < 0 { value } else { limit.min(value) };
            match limits.iter_mut().find(|limit| limit.name == name) {
                Some(limit) => (limit.soft, limit.hard) = (least(limit.soft), least(limit.hard)),
                None => limits.push(Ulimit {
                    name: name.to_owned(),
                    soft: value,
                    hard: value,
                }),
            }
        };
        if let Some(bytes) = self.memory_bytes
            && !place.has(Controller::Memory)
        {
            lower("data", Resource::Data, bytes);
        }
        if let Some(pids) = self.pids
            && !place.has(Controller::Pids)
            && counts_processes()
        {
            lower("nproc", Resource::Nproc, pids + processes_of_user());
        }
        // The kernel stops one large file at once; the sum of many is measured now and then.
        if let Some(bytes) = self.disk_bytes {
            lower("fsize", Resource::Fsize, bytes);
        }
        limits
    }

    /// What of this does not hold, or holds for something else, in words for people.
    pub(super) fn notes(&self, place: &Place) -> Vec<String> {
        let missing = |controller: Controller| {
            let is_needed = self.controllers().contains(&controller);
            place.missing(controller).filter(|_| is_needed)
        };
        let mut notes = Vec::new();
        if let Some(why) = missing(Controller::Memory) {
            if self.memory_bytes.is_some() {
                notes.push(format!(
                    "--memory limits the private memory of each process of a RUN step, not of all \
                     together (RLIMIT_DATA): {why}"
                ));
            }
            if self.memory_swap.is_some() {
                notes.push(format!("--memory-swap is not enforced: {why}"));
            }
        }
        if let Some(why) = missing(Controller::Pids) {
            notes.push(match counts_processes() {
                true => format!(
                    "--pids-limit counts the processes and threads of this user in all RUN steps \
                     together, beyond those there are when a step begins (RLIMIT_NPROC): {why}"
                ),
                false => format!("--pids-limit is not enforced: {why}"),
            });
        }
        if let Some(why) = missing(Controller::Cpu) {
            notes.push(format!(
                "--cpus, --cpu-period, --cpu-quota and --cpu-shares are not enforced: {why}"
            ));
        }
        if let Some(why) = missing(Controller::Cpuset) {
            notes.push(format!(
                "--cpuset-cpus and --cpuset-mems are not enforced: {why}"
            ));
        }
        if let Some(Swap::Total(_)) = self.memory_swap
            && place.has(Controller::Memory)
            && !place.counts_swap()
        {
            notes.push(
                "--memory-swap is not enforced: this kernel does not account for swap".to_owned(),
            );
        }
        notes
    }
}

/// Whether the kernel holds a step's processes to `RLIMIT_NPROC`: never those of real root.
fn counts_processes() -> bool {
    !userns::is_initial() || !rustix::process::geteuid().is_root()
}

/// How many processes and threads `RLIMIT_NPROC` counts already: those of this user in this user
/// namespace, this program's own included.
fn processes_of_user() -> u64 {
    use std::os::unix::fs::MetadataExt as _;
    let namespace = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/user")).ok();
    let own = namespace("self");
    let uid = rustix::process::getuid().as_raw();
    let Ok(entries) = std::fs::read_dir("/proc") else {
        return 0;
    };
    let pids = entries
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| name.bytes().all(|byte| byte.is_ascii_digit()));
    let threads = pids.filter_map(|pid| {
        let dir = std::fs::metadata(format!("/proc/{pid}")).ok()?;
        if dir.uid() != uid || namespace(&pid) != own {
            return None;
        }
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("Threads:"))?;
        line.trim().parse::<u64>().ok()
    });
    threads.sum()
}

/// A limit that a step ran into.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LimitReached {
    /// It ran for too long and was ended.
    #[error("timed out after {} (--step-timeout)", Seconds(*.0))]
    Time(Duration),
    /// It wrote too much and was ended.
    #[error("it wrote more than {} into its root filesystem (--disk-limit)", Bytes(*.0))]
    Disk(u64),
    /// The kernel killed one of its processes for memory.
    #[error(
        "{}killed for memory, of which the limit is {} (--memory)",
        ExitCode(*.status),
        Bytes(*.bytes)
    )]
    Memory {
        /// The limit.
        bytes: u64,
        /// How the step ended, if it had begun.
        status: Option<i32>,
    },
    /// The kernel refused it a process, and it failed.
    #[error(
        "{}no more than {pids} processes and threads were allowed (--pids-limit)",
        ExitCode(*.status)
    )]
    Pids {
        /// The limit.
        pids: u64,
        /// How the step ended, if it had begun.
        status: Option<i32>,
    },
}

impl LimitReached {
    /// How the step ended; where this program ended it, by its signal.
    pub fn status(&self) -> i32 {
        const KILLED: i32 = 128 + 9;
        match self {
            Self::Time(_) | Self::Disk(_) => KILLED,
            Self::Memory { status, .. } | Self::Pids { status, .. } => status.unwrap_or(KILLED),
        }
    }
}

/// A status in front of what explains it.
struct ExitCode(Option<i32>);

impl fmt::Display for ExitCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(status) => write!(f, "exit code: {status}: "),
            None => Ok(()),
        }
    }
}

/// A duration as it would be written on the command line.
struct Seconds(Duration);

impl fmt::Display for Seconds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = self.0.as_secs();
        match (seconds, self.0.subsec_millis()) {
            (0, millis) => write!(f, "{millis}ms"),
            (_, 0) if seconds.is_multiple_of(3600) => write!(f, "{}h", seconds / 3600),
            (_, 0) if seconds.is_multiple_of(60) => write!(f, "{}m", seconds / 60),
            (_, 0) => write!(f, "{seconds}s"),
            (_, millis) => write!(f, "{seconds}.{millis:03}s"),
        }
    }
}

/// A number of bytes in the largest unit that it is a whole number of.
#[derive(Clone, Copy, Debug)]
pub struct Bytes(pub u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let units = [(30, "GiB"), (20, "MiB"), (10, "KiB")];
        let whole = |(shift, _): &(u32, &str)| self.0 != 0 && self.0.is_multiple_of(1 << shift);
        match units.iter().find(|unit| whole(unit)) {
            Some((shift, unit)) => write!(f, "{}{unit}", self.0 >> shift),
            None => write!(f, "{}B", self.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_reached_is_said_with_its_flag() {
        let check = |reached: LimitReached, expected: &str, status| {
            assert_eq!(reached.to_string(), expected);
            assert_eq!(reached.status(), status);
        };
        let time = |millis| LimitReached::Time(Duration::from_millis(millis));
        check(time(10_000), "timed out after 10s (--step-timeout)", 137);
        check(time(1_500), "timed out after 1.500s (--step-timeout)", 137);
        check(time(200), "timed out after 200ms (--step-timeout)", 137);
        check(time(120_000), "timed out after 2m (--step-timeout)", 137);
        check(time(7_200_000), "timed out after 2h (--step-timeout)", 137);
        check(
            LimitReached::Disk(3 << 29),
            "it wrote more than 1536MiB into its root filesystem (--disk-limit)",
            137,
        );
        check(
            LimitReached::Memory {
                bytes: 64 << 20,
                status: Some(2),
            },
            "exit code: 2: killed for memory, of which the limit is 64MiB (--memory)",
            2,
        );
        check(
            LimitReached::Pids {
                pids: 20,
                status: None,
            },
            "no more than 20 processes and threads were allowed (--pids-limit)",
            137,
        );
        assert_eq!(Bytes(1000).to_string(), "1000B");
        assert_eq!(Bytes(0).to_string(), "0B");
    }

    #[test]
    fn the_lower_of_two_limits_is_kept() {
        let limits = Limits {
            memory_bytes: Some(1000),
            disk_bytes: Some(500),
            ..Limits::default()
        };
        let asked = |name: &str, soft, hard| Ulimit {
            name: name.to_owned(),
            soft,
            hard,
        };
        let nowhere = Place::nowhere("there is none");
        assert_eq!(
            limits.stand_ins(
                &nowhere,
                &[
                    asked("data", 7, -1),
                    asked("fsize", -1, -1),
                    asked("core", 0, 0)
                ]
            ),
            [
                asked("data", 7, 1000),
                asked("fsize", 500, 500),
                asked("core", 0, 0)
            ]
        );
        assert_eq!(Limits::default().stand_ins(&nowhere, &[]), []);
    }

    #[test]
    fn what_does_not_hold_is_said() {
        let nowhere = Place::nowhere("there is none");
        let all = Limits {
            memory_bytes: Some(1),
            memory_swap: Some(Swap::Total(2)),
            cpu: CpuLimits {
                shares: Some(2),
                mems: Some("0".to_owned()),
                ..CpuLimits::default()
            },
            pids: Some(1),
            ..Limits::default()
        };
        let notes = all.notes(&nowhere);
        assert_eq!(notes.len(), 5, "{notes:?}");
        assert!(notes.iter().all(|note| note.ends_with(": there is none")));
        let held_by_this_program = Limits {
            time: Some(Duration::from_secs(1)),
            disk_bytes: Some(1),
            output_bytes: Some(1),
            ..Limits::default()
        };
        assert_eq!(held_by_this_program.notes(&nowhere), [""; 0]);
        assert_eq!(held_by_this_program.controllers(), BTreeSet::new());
    }
}
