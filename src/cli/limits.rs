//! The flags that limit RUN steps: those of `docker build` and `docker run`, and four of our own.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use thiserror::Error;

use super::store::duration;
use crate::dockerfile::parse_size;
use crate::sandbox::{CpuLimits, Limits, Swap};

/// The least memory that Docker gives a container.
const MEMORY_MIN_BYTES: u64 = 6 << 20;
/// What the kernel takes for the length of a period, and the least quota, in microseconds.
const PERIOD_US: std::ops::RangeInclusive<u64> = 1_000..=1_000_000;
/// The period of `--cpus`.
const USUAL_PERIOD_US: f64 = 100_000.0;

/// How much each RUN step may use. 0 is no limit.
#[derive(Args, Clone, Debug, Default)]
pub(super) struct LimitArgs {
    /// Memory of each RUN step, such as 2g
    #[arg(long, short = 'm', value_name = "BYTES")]
    pub(super) memory: Option<String>,

    /// Memory and swap of each RUN step together; -1 for as much swap as there is
    /// [default: twice the memory]
    #[arg(long, value_name = "BYTES", allow_negative_numbers = true)]
    pub(super) memory_swap: Option<String>,

    /// How many processors each RUN step may keep busy, such as 1.5
    #[arg(long, value_name = "NUMBER")]
    pub(super) cpus: Option<String>,

    /// The length of the periods of --cpu-quota in microseconds [default: 100000]
    #[arg(long, value_name = "MICROSECONDS")]
    pub(super) cpu_period: Option<u64>,

    /// Processor time of each RUN step in each period; -1 for no limit
    #[arg(long, value_name = "MICROSECONDS", allow_negative_numbers = true)]
    pub(super) cpu_quota: Option<i64>,

    /// The weight of each RUN step where others want the processors too; usual is 1024
    #[arg(long, short = 'c', value_name = "WEIGHT")]
    pub(super) cpu_shares: Option<u64>,

    /// The processors that RUN steps may use, such as 0-2,4
    #[arg(long, value_name = "LIST")]
    pub(super) cpuset_cpus: Option<String>,

    /// The memory nodes that RUN steps may use
    #[arg(long, value_name = "LIST")]
    pub(super) cpuset_mems: Option<String>,

    /// How many processes and threads each RUN step may have at a time; -1 for no limit
    #[arg(long, value_name = "NUMBER", allow_negative_numbers = true)]
    pub(super) pids_limit: Option<i64>,

    /// How long each RUN step may run, such as 10m
    #[arg(long, value_name = "DURATION")]
    pub(super) step_timeout: Option<String>,

    /// How much of the output of each RUN step is shown, such as 2m
    #[arg(long, value_name = "BYTES")]
    pub(super) output_limit: Option<String>,

    /// How much each RUN step may write into its root filesystem, such as 10g
    #[arg(long, value_name = "BYTES")]
    pub(super) disk_limit: Option<String>,

    /// The cgroup in which those of RUN steps are made
    #[arg(long, value_name = "CGROUP")]
    pub(super) cgroup_parent: Option<PathBuf>,
}

/// What is wrong with a limit.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub(super) enum LimitError {
    /// A size.
    #[error("--{flag} {value:?}: expected a number of bytes, such as 67108864, 64m or 1g")]
    Size {
        /// Which flag.
        flag: &'static str,
        /// As given.
        value: String,
    },
    /// Less than a runtime needs.
    #[error("--memory {0:?}: the least is 6m")]
    TooLittleMemory(String),
    /// Swap alone.
    #[error("--memory-swap needs --memory")]
    SwapWithoutMemory,
    /// Less than memory alone.
    #[error("--memory-swap {0:?} is memory and swap together, and less than --memory")]
    SwapBelowMemory(String),
    /// `--cpus`.
    #[error("--cpus {0:?}: expected a number of processors such as 2 or 0.5, at least 0.01")]
    Cpus(String),
    /// Two ways to say one thing.
    #[error("--cpus says what --cpu-period and --cpu-quota say; give one of the two")]
    CpusAndQuota,
    /// `--cpu-period`.
    #[error("--cpu-period {0}: expected 1000 to 1000000 microseconds")]
    Period(u64),
    /// `--cpu-quota`.
    #[error("--cpu-quota {0}: expected at least 1000 microseconds")]
    Quota(i64),
    /// `--cpu-shares`.
    #[error("--cpu-shares {0}: expected 2 to 262144")]
    Shares(u64),
    /// A list.
    #[error("--{flag} {value:?}: expected numbers and ranges such as 0-2,4")]
    List {
        /// Which flag.
        flag: &'static str,
        /// As given.
        value: String,
    },
    /// `--pids-limit`.
    #[error("--pids-limit {0}: expected a number, or -1 for no limit")]
    Pids(i64),
    /// `--step-timeout`.
    #[error("--step-timeout {0:?}: expected a duration such as 90s, 10m or 1h30m")]
    Timeout(String),
}

impl LimitArgs {
    /// Validates the flags.
    ///
    /// # Errors
    /// The first that is wrong.
    pub(super) fn limits(&self) -> Result<Limits, LimitError> {
        let memory_bytes = size("memory", self.memory.as_deref())?;
        if let (Some(bytes), Some(text)) = (memory_bytes, &self.memory)
            && bytes < MEMORY_MIN_BYTES
        {
            return Err(LimitError::TooLittleMemory(text.clone()));
        }
        Ok(Limits {
            memory_bytes,
            memory_swap: self.swap(memory_bytes)?,
            cpu: self.cpu()?,
            pids: match self.pids_limit {
                None | Some(0 | -1) => None,
                Some(number) => Some(u64::try_from(number).map_err(|_| LimitError::Pids(number))?),
            },
            time: match self.step_timeout.as_deref() {
                None => None,
                Some(text) => {
                    let time = duration(text);
                    time.ok_or_else(|| LimitError::Timeout(text.to_owned()))
                        .map(|time| Some(time).filter(|time| *time > Duration::ZERO))?
                }
            },
            disk_bytes: size("disk-limit", self.disk_limit.as_deref())?,
            output_bytes: size("output-limit", self.output_limit.as_deref())?,
            cgroup_parent: self
                .cgroup_parent
                .clone()
                .filter(|path| !path.as_os_str().is_empty()),
        })
    }

    fn swap(&self, memory_bytes: Option<u64>) -> Result<Option<Swap>, LimitError> {
        let Some(text) = &self.memory_swap else {
            return Ok(None);
        };
        let total = match text.as_str() {
            "-1" => return Ok(memory_bytes.map(|_| Swap::Unlimited)),
            text => size("memory-swap", Some(text))?,
        };
        match (total, memory_bytes) {
            (None, _) => Ok(None),
            (Some(_), None) => Err(LimitError::SwapWithoutMemory),
            (Some(total), Some(memory)) if total < memory => {
                Err(LimitError::SwapBelowMemory(text.clone()))
            }
            (Some(total), Some(_)) => Ok(Some(Swap::Total(total))),
        }
    }

    fn cpu(&self) -> Result<CpuLimits, LimitError> {
        let period_us = self.cpu_period.filter(|period| *period > 0);
        let quota_us = match self.cpu_quota {
            None | Some(0 | -1) => None,
            Some(quota) => {
                let us = u64::try_from(quota).ok();
                let us = us.filter(|us| us >= PERIOD_US.start());
                Some(us.ok_or(LimitError::Quota(quota))?)
            }
        };
        if let Some(period) = period_us
            && !PERIOD_US.contains(&period)
        {
            return Err(LimitError::Period(period));
        }
        let shares = self.cpu_shares.filter(|shares| *shares > 0);
        if let Some(shares) = shares
            && !(2..=262_144).contains(&shares)
        {
            return Err(LimitError::Shares(shares));
        }
        let mut limits = CpuLimits {
            period_us,
            quota_us,
            shares,
            cpus: list("cpuset-cpus", self.cpuset_cpus.as_deref())?,
            mems: list("cpuset-mems", self.cpuset_mems.as_deref())?,
        };
        if let Some(text) = &self.cpus {
            let wrong = || LimitError::Cpus(text.clone());
            let cpus: f64 = text.parse().map_err(|_| wrong())?;
            if cpus == 0.0 {
                return Ok(limits);
            }
            if period_us.is_some() || quota_us.is_some() {
                return Err(LimitError::CpusAndQuota);
            }
            if !(0.01..=10_000.0).contains(&cpus) {
                return Err(wrong());
            }
            limits.period_us = Some(USUAL_PERIOD_US as u64);
            limits.quota_us = Some((cpus * USUAL_PERIOD_US).round() as u64);
        }
        Ok(limits)
    }
}

/// A size, of which 0 is no limit.
fn size(flag: &'static str, text: Option<&str>) -> Result<Option<u64>, LimitError> {
    let Some(text) = text else { return Ok(None) };
    let wrong = || LimitError::Size {
        flag,
        value: text.to_owned(),
    };
    let bytes = parse_size(text).ok_or_else(wrong)?;
    Ok(Some(bytes).filter(|bytes| *bytes > 0))
}

/// A list of the form that `cpuset(7)` has.
fn list(flag: &'static str, text: Option<&str>) -> Result<Option<String>, LimitError> {
    let Some(text) = text.filter(|text| !text.is_empty()) else {
        return Ok(None);
    };
    let is_number =
        |text: &str| !text.is_empty() && text.len() < 6 && text.bytes().all(|b| b.is_ascii_digit());
    let is_range = |text: &str| match text.split_once('-') {
        Some((first, last)) => is_number(first) && is_number(last),
        None => is_number(text),
    };
    match text.split(',').all(is_range) {
        true => Ok(Some(text.to_owned())),
        false => Err(LimitError::List {
            flag,
            value: text.to_owned(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Flags {
        #[command(flatten)]
        limits: LimitArgs,
    }

    fn limits(args: &str) -> Result<Limits, String> {
        let args = std::iter::once("x").chain(args.split_whitespace());
        let flags = Flags::try_parse_from(args).map_err(|error| error.to_string())?;
        flags.limits.limits().map_err(|error| error.to_string())
    }

    #[test]
    fn flags_are_those_of_docker() {
        assert_eq!(limits(""), Ok(Limits::default()));
        let zero = "-m 0 --memory-swap 0 --cpus 0 --cpu-period 0 --cpu-quota -1 -c 0 --pids-limit -1 \
                    --step-timeout 0 --output-limit 0 --disk-limit 0";
        assert_eq!(limits(zero), Ok(Limits::default()));
        let all = "-m 64m --memory-swap 1g --cpu-period 50000 --cpu-quota 25000 -c 512 \
                   --cpuset-cpus 0-2,4 --cpuset-mems 0 --pids-limit 100 --step-timeout 1m30s \
                   --output-limit 2m --disk-limit 1.5k --cgroup-parent /builds";
        let expected = Limits {
            memory_bytes: Some(64 << 20),
            memory_swap: Some(Swap::Total(1 << 30)),
            cpu: CpuLimits {
                period_us: Some(50_000),
                quota_us: Some(25_000),
                shares: Some(512),
                cpus: Some("0-2,4".to_owned()),
                mems: Some("0".to_owned()),
            },
            pids: Some(100),
            time: Some(Duration::from_secs(90)),
            output_bytes: Some(2 << 20),
            disk_bytes: Some(1536),
            cgroup_parent: Some("/builds".into()),
        };
        assert_eq!(limits(all), Ok(expected));
        let cpu = limits("--cpus 1.5").unwrap().cpu;
        assert_eq!(
            (cpu.period_us, cpu.quota_us),
            (Some(100_000), Some(150_000))
        );
        let unlimited = limits("-m 6m --memory-swap -1").unwrap();
        assert_eq!(unlimited.memory_swap, Some(Swap::Unlimited));
    }

    #[test]
    fn what_is_no_limit_is_said() {
        let check = |args: &str, message: &str| {
            assert_eq!(limits(args), Err(message.to_owned()), "{args}");
        };
        check(
            "-m much",
            "--memory \"much\": expected a number of bytes, such as 67108864, 64m or 1g",
        );
        check("-m 5m", "--memory \"5m\": the least is 6m");
        check("--memory-swap 1g", "--memory-swap needs --memory");
        check(
            "-m 2g --memory-swap 1g",
            "--memory-swap \"1g\" is memory and swap together, and less than --memory",
        );
        for cpus in ["many", "-1", "0.001", "NaN", "inf"] {
            check(
                &format!("--cpus={cpus}"),
                &format!(
                    "--cpus {cpus:?}: expected a number of processors such as 2 or 0.5, at least 0.01"
                ),
            );
        }
        check(
            "--cpus 1 --cpu-quota 5000",
            "--cpus says what --cpu-period and --cpu-quota say; give one of the two",
        );
        check(
            "--cpu-period 5",
            "--cpu-period 5: expected 1000 to 1000000 microseconds",
        );
        check(
            "--cpu-quota -5",
            "--cpu-quota -5: expected at least 1000 microseconds",
        );
        check("-c 1", "--cpu-shares 1: expected 2 to 262144");
        for list in ["a", "1-", "1,,2", "0;1"] {
            check(
                &format!("--cpuset-cpus {list}"),
                &format!("--cpuset-cpus {list:?}: expected numbers and ranges such as 0-2,4"),
            );
        }
        check(
            "--pids-limit -2",
            "--pids-limit -2: expected a number, or -1 for no limit",
        );
        check(
            "--step-timeout 10",
            "--step-timeout \"10\": expected a duration such as 90s, 10m or 1h30m",
        );
        check(
            "--disk-limit x",
            "--disk-limit \"x\": expected a number of bytes, such as 67108864, 64m or 1g",
        );
    }
}
