//! Which files of a cgroup hold which limit. No I/O.
//!
//! <https://docs.kernel.org/admin-guide/cgroup-v2.html>,
//! <https://docs.kernel.org/admin-guide/cgroup-v1/index.html>

use super::super::resources::{Limits, Swap};

/// What limits one kind of resource.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(in crate::sandbox) enum Controller {
    /// Memory and swap.
    Memory,
    /// Processes and threads.
    Pids,
    /// The time of processors.
    Cpu,
    /// Which processors and memory nodes.
    Cpuset,
}

impl Controller {
    /// All that this program uses.
    pub(super) const ALL: [Self; 4] = [Self::Memory, Self::Pids, Self::Cpu, Self::Cpuset];

    /// The kernel's name.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::Pids => "pids",
            Self::Cpu => "cpu",
            Self::Cpuset => "cpuset",
        }
    }
}

/// Which kind of hierarchy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Version {
    /// One hierarchy for each controller.
    V1,
    /// One for all.
    V2,
}

/// A value and where it is written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Setting {
    /// The file's name.
    pub(super) file: &'static str,
    /// What is written.
    pub(super) value: String,
    /// Whether the kernel may lack the file: without swap, nothing accounts for it.
    pub(super) may_lack: bool,
}

/// The file that says how much swap there may be.
pub(super) fn swap_file(version: Version) -> &'static str {
    match version {
        Version::V1 => "memory.memsw.limit_in_bytes",
        Version::V2 => "memory.swap.max",
    }
}

/// What holds a cgroup of this controller to `limits`, in the order in which it is written.
pub(super) fn settings(controller: Controller, version: Version, limits: &Limits) -> Vec<Setting> {
    let set = |file, value: String| Setting {
        file,
        value,
        may_lack: false,
    };
    let cpu = &limits.cpu;
    match controller {
        Controller::Memory => memory(version, limits),
        Controller::Pids => {
            let pids = limits.pids.map(|pids| set("pids.max", pids.to_string()));
            pids.into_iter().collect()
        }
        Controller::Cpu => match version {
            Version::V1 => [
                ("cpu.cfs_period_us", cpu.period_us),
                ("cpu.cfs_quota_us", cpu.quota_us),
                ("cpu.shares", cpu.shares),
            ]
            .into_iter()
            .filter_map(|(file, value)| Some(set(file, value?.to_string())))
            .collect(),
            Version::V2 => {
                let quota = cpu.quota_us.map_or("max".to_owned(), |us| us.to_string());
                let max = match (cpu.quota_us, cpu.period_us) {
                    (None, None) => None,
                    (_, Some(period)) => Some(set("cpu.max", format!("{quota} {period}"))),
                    // The period stays what it is: 100 000.
                    (Some(_), None) => Some(set("cpu.max", quota)),
                };
                let weight = cpu.shares.map(weight);
                let weight = weight.map(|weight| set("cpu.weight", weight.to_string()));
                max.into_iter().chain(weight).collect()
            }
        },
        Controller::Cpuset => [("cpuset.cpus", &cpu.cpus), ("cpuset.mems", &cpu.mems)]
            .into_iter()
            .filter_map(|(file, value)| Some(set(file, value.clone()?)))
            .collect(),
    }
}

fn memory(version: Version, limits: &Limits) -> Vec<Setting> {
    let Some(bytes) = limits.memory_bytes else {
        return Vec::new();
    };
    let total = match limits.memory_swap {
        Some(Swap::Unlimited) => None,
        Some(Swap::Total(total)) => Some(total),
        // As in Docker.
        None => Some(bytes.saturating_mul(2)),
    };
    let memory = match version {
        Version::V1 => "memory.limit_in_bytes",
        Version::V2 => "memory.max",
    };
    let swap = match (version, total) {
        (Version::V1, None) => "-1".to_owned(),
        (Version::V1, Some(total)) => total.to_string(),
        (Version::V2, None) => "max".to_owned(),
        (Version::V2, Some(total)) => total.saturating_sub(bytes).to_string(),
    };
    // The first never goes above the second, which has no limit before.
    vec![
        Setting {
            file: memory,
            value: bytes.to_string(),
            may_lack: false,
        },
        Setting {
            file: swap_file(version),
            value: swap,
            may_lack: true,
        },
    ]
}

/// The weight of version 2, from 1 to 10 000, of shares from 2 to 262 144; as runc has it.
fn weight(shares: u64) -> u64 {
    1 + (shares.clamp(2, 262_144) - 2) * 9_999 / 262_142
}

/// The number behind `key` in a file of lines of a key and a number.
pub(super) fn count(text: &str, key: &str) -> Option<u64> {
    text.lines().find_map(|line| {
        let (name, value) = line.split_once(' ')?;
        (name == key).then(|| value.trim().parse().ok())?
    })
}

/// Where the kernel counts what it refused: the file and the key.
pub(super) fn events(
    controller: Controller,
    version: Version,
) -> Option<(&'static str, &'static str)> {
    match (controller, version) {
        (Controller::Memory, Version::V1) => Some(("memory.oom_control", "oom_kill")),
        (Controller::Memory, Version::V2) => Some(("memory.events", "oom_kill")),
        (Controller::Pids, _) => Some(("pids.events", "max")),
        (Controller::Cpu | Controller::Cpuset, _) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::resources::CpuLimits;
    use super::*;

    fn check(limits: &Limits, version: Version, expected: &[(&str, &str)]) {
        let all = Controller::ALL
            .into_iter()
            .flat_map(|controller| settings(controller, version, limits));
        let got: Vec<(&str, String)> = all.map(|setting| (setting.file, setting.value)).collect();
        let expected: Vec<(&str, String)> = expected
            .iter()
            .map(|(file, value)| (*file, (*value).to_owned()))
            .collect();
        assert_eq!(got, expected, "{version:?}");
    }

    #[test]
    fn each_limit_has_its_file() {
        let limits = Limits {
            memory_bytes: Some(1 << 20),
            memory_swap: Some(Swap::Total(3 << 20)),
            cpu: CpuLimits {
                period_us: Some(50_000),
                quota_us: Some(25_000),
                shares: Some(512),
                cpus: Some("0-1".to_owned()),
                mems: Some("0".to_owned()),
            },
            pids: Some(64),
            ..Limits::default()
        };
        check(
            &limits,
            Version::V1,
            &[
                ("memory.limit_in_bytes", "1048576"),
                ("memory.memsw.limit_in_bytes", "3145728"),
                ("pids.max", "64"),
                ("cpu.cfs_period_us", "50000"),
                ("cpu.cfs_quota_us", "25000"),
                ("cpu.shares", "512"),
                ("cpuset.cpus", "0-1"),
                ("cpuset.mems", "0"),
            ],
        );
        check(
            &limits,
            Version::V2,
            &[
                ("memory.max", "1048576"),
                ("memory.swap.max", "2097152"),
                ("pids.max", "64"),
                ("cpu.max", "25000 50000"),
                ("cpu.weight", "20"),
                ("cpuset.cpus", "0-1"),
                ("cpuset.mems", "0"),
            ],
        );
        check(&Limits::default(), Version::V1, &[]);
        check(&Limits::default(), Version::V2, &[]);
    }

    #[test]
    fn swap_is_as_much_as_memory_unless_said() {
        let limits = |memory_swap| Limits {
            memory_bytes: Some(100),
            memory_swap,
            ..Limits::default()
        };
        let swap = |version, memory_swap| {
            let settings = settings(Controller::Memory, version, &limits(memory_swap));
            settings[1].value.clone()
        };
        for (asked, v1, v2) in [
            (None, "200", "100"),
            (Some(Swap::Unlimited), "-1", "max"),
            (Some(Swap::Total(100)), "100", "0"),
        ] {
            assert_eq!(swap(Version::V1, asked), v1);
            assert_eq!(swap(Version::V2, asked), v2);
        }
    }

    #[test]
    fn half_a_quota_is_completed() {
        let cpu = |period_us, quota_us| Limits {
            cpu: CpuLimits {
                period_us,
                quota_us,
                ..CpuLimits::default()
            },
            ..Limits::default()
        };
        check(&cpu(None, Some(5000)), Version::V2, &[("cpu.max", "5000")]);
        check(&cpu(Some(9), None), Version::V2, &[("cpu.max", "max 9")]);
        assert_eq!([2, 1024, 262_144].map(weight), [1, 39, 10_000]);
    }

    #[test]
    fn counts_are_found_by_their_key() {
        let text = "low 0\noom 3\noom_kill 2\n";
        assert_eq!(count(text, "oom_kill"), Some(2));
        assert_eq!(count(text, "max"), None);
        assert_eq!(count("max many\n", "max"), None);
    }
}
