//! Resource limits, in the words of Docker's `--ulimit`. See `setrlimit(2)`.

use std::num::IntErrorKind;
use std::str::FromStr;

use rustix::io::Errno;
use rustix::process::{Resource, Rlimit};
use serde::{Deserialize, Serialize};

use super::wire::{Failure, Part};

/// One resource limit.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Ulimit {
    /// Which resource, such as `nofile`.
    pub name: String,
    /// The limit that the kernel enforces, in the resource's own unit; -1 for none.
    pub soft: i64,
    /// The one up to which the process may raise it; -1 for none.
    pub hard: i64,
}

/// The resources by Docker's names; not `as`, which Docker leaves out as well.
const RESOURCES: [(&str, Resource); 15] = [
    ("core", Resource::Core),
    ("cpu", Resource::Cpu),
    ("data", Resource::Data),
    ("fsize", Resource::Fsize),
    ("locks", Resource::Locks),
    ("memlock", Resource::Memlock),
    ("msgqueue", Resource::Msgqueue),
    ("nice", Resource::Nice),
    ("nofile", Resource::Nofile),
    ("nproc", Resource::Nproc),
    ("rss", Resource::Rss),
    ("rtprio", Resource::Rtprio),
    ("rttime", Resource::Rttime),
    ("sigpending", Resource::Sigpending),
    ("stack", Resource::Stack),
];

/// What is wrong with a limit; in Docker's words.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UlimitError {
    /// There is no `=`.
    #[error("invalid ulimit argument: {0:?}: expected NAME=SOFT[:HARD], such as nofile=1024:4096")]
    Format(String),
    /// There is no such resource.
    #[error("invalid ulimit type: {0}")]
    Name(String),
    /// A limit is no number.
    #[error("invalid ulimit value: {0:?} is not a whole number")]
    Number(String),
    /// A limit does not fit into 64 bits.
    #[error("invalid ulimit value: {0} is out of range")]
    Range(String),
    /// There are more than two limits.
    #[error("too many limit value arguments - {0}, can only have up to two, `soft[:hard]`")]
    TooMany(String),
    /// The soft limit is above the hard one.
    #[error("ulimit soft limit must be less than or equal to hard limit: {0}")]
    Order(String),
}

impl FromStr for Ulimit {
    type Err = UlimitError;

    /// Reads `NAME=SOFT[:HARD]`; -1 stands for no limit, and a single value for both.
    fn from_str(text: &str) -> Result<Self, UlimitError> {
        let (name, values) = text
            .split_once('=')
            .ok_or_else(|| UlimitError::Format(text.to_owned()))?;
        if resource(name).is_none() {
            return Err(UlimitError::Name(name.to_owned()));
        }
        let (soft, hard) = match values.split(':').collect::<Vec<_>>()[..] {
            [both] => (number(both)?, number(both)?),
            [soft, hard] => (number(soft)?, number(hard)?),
            _ => return Err(UlimitError::TooMany(values.to_owned())),
        };
        if hard != -1 && soft == -1 {
            let values = format!("soft: -1 (unlimited), hard: {hard}");
            return Err(UlimitError::Order(values));
        }
        if hard != -1 && soft > hard {
            return Err(UlimitError::Order(format!("{soft} > {hard}")));
        }
        Ok(Self {
            name: name.to_owned(),
            soft,
            hard,
        })
    }
}

fn number(text: &str) -> Result<i64, UlimitError> {
    match text.parse::<i64>() {
        // Only -1 has a meaning.
        Ok(value) if value < -1 => Err(UlimitError::Range(text.to_owned())),
        Ok(value) => Ok(value),
        Err(error) => Err(match error.kind() {
            IntErrorKind::PosOverflow | IntErrorKind::NegOverflow => {
                UlimitError::Range(text.to_owned())
            }
            _ => UlimitError::Number(text.to_owned()),
        }),
    }
}

fn resource(name: &str) -> Option<Resource> {
    let known = RESOURCES.iter().find(|(known, _)| *known == name);
    known.map(|(_, resource)| *resource)
}

/// Sets the limits of this process.
///
/// # Errors
/// Where there is no such resource, or the kernel refuses: only real root may raise a hard
/// limit.
pub(super) fn apply(ulimits: &[Ulimit]) -> Result<(), Failure> {
    ulimits.iter().try_for_each(|ulimit| {
        let failed = |reason: String| Failure {
            doing: format!(
                "setting the limit {}={}:{}",
                ulimit.name, ulimit.soft, ulimit.hard
            ),
            reason,
            errno: None,
            part: Part::Asked,
        };
        let Some(resource) = resource(&ulimit.name) else {
            return Err(failed("there is no limit of this name".to_owned()));
        };
        // -1 is no limit.
        let value = |limit: i64| u64::try_from(limit).ok();
        let wanted = Rlimit {
            current: value(ulimit.soft),
            maximum: value(ulimit.hard),
        };
        rustix::process::setrlimit(resource, wanted).map_err(|error| {
            let own = rustix::process::getrlimit(resource).maximum;
            let own = own.map_or("unlimited".to_owned(), |limit| limit.to_string());
            failed(match error {
                Errno::PERM => format!(
                    "only root can go above the hard limit, which is {own} for whoever runs this \
                     build; ask for less, or raise that one (`ulimit -H`, limits.conf(5), \
                     systemd's Limit…=)"
                ),
                error => std::io::Error::from(error).to_string(),
            })
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_read_as_docker_reads_them() {
        let check = |text: &str, name: &str, soft: i64, hard: i64| {
            let expected = Ulimit {
                name: name.to_owned(),
                soft,
                hard,
            };
            assert_eq!(text.parse(), Ok(expected), "{text}");
        };
        check("nofile=1024:2048", "nofile", 1024, 2048);
        check("nofile=1024", "nofile", 1024, 1024);
        check("core=0", "core", 0, 0);
        check("memlock=-1", "memlock", -1, -1);
        check("memlock=-1:-1", "memlock", -1, -1);
        check("nproc=5:-1", "nproc", 5, -1);
    }

    #[test]
    fn what_is_no_limit_is_said() {
        let check = |text: &str, message: &str| {
            let error = text.parse::<Ulimit>().unwrap_err();
            assert_eq!(error.to_string(), message, "{text}");
        };
        check(
            "",
            "invalid ulimit argument: \"\": expected NAME=SOFT[:HARD], such as nofile=1024:4096",
        );
        check(
            "nofile",
            "invalid ulimit argument: \"nofile\": expected NAME=SOFT[:HARD], such as nofile=1024:4096",
        );
        check("files=1", "invalid ulimit type: files");
        check("as=1", "invalid ulimit type: as");
        check("=1", "invalid ulimit type: ");
        check(
            "nofile=",
            "invalid ulimit value: \"\" is not a whole number",
        );
        check(
            "nofile=1k",
            "invalid ulimit value: \"1k\" is not a whole number",
        );
        check("nofile=-2", "invalid ulimit value: -2 is out of range");
        check(
            "nofile=9223372036854775808",
            "invalid ulimit value: 9223372036854775808 is out of range",
        );
        check(
            "nofile=1:2:3",
            "too many limit value arguments - 1:2:3, can only have up to two, `soft[:hard]`",
        );
        check(
            "nofile=2:1",
            "ulimit soft limit must be less than or equal to hard limit: 2 > 1",
        );
        check(
            "nofile=-1:1",
            "ulimit soft limit must be less than or equal to hard limit: soft: -1 (unlimited), \
             hard: 1",
        );
    }
}
