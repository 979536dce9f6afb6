//! [`Lack`]: what is missing, as it was seen, with the line that gives it.

use std::io;

use serde::{Deserialize, Serialize};

/// Why something does not work here. Part of the document of `sockless doctor --json`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lack {
    /// What was seen, for people, on one line.
    pub reason: String,
    /// The system call that was refused, such as `unshare(CLONE_NEWNS)`.
    pub call: Option<String>,
    /// How it was refused, such as `EPERM`.
    pub errno: Option<String>,
    /// What of the host is at fault, as `NAME = VALUE`, or the name of a file.
    pub setting: Option<String>,
    /// The line that unlocks it: for a shell, or, where it says so, for whoever starts the container.
    pub unlock: Option<String>,
}

impl Lack {
    /// Something that was seen, without more.
    pub fn new(reason: impl Into<String>) -> Self {
        Self {
            reason: reason.into(),
            ..Self::default()
        }
    }

    /// A system call that was refused.
    pub fn of_call(call: impl Into<String>, error: &io::Error) -> Self {
        let call = call.into();
        Self {
            reason: format!("{call}: {}", words_of(error)),
            errno: error.raw_os_error().map(errno_name),
            call: Some(call),
            ..Self::default()
        }
    }

    /// Adds why, behind the reason.
    #[must_use]
    pub fn because(mut self, why: &str) -> Self {
        self.reason = format!("{}: {why}", self.reason);
        self
    }

    /// Adds what is at fault.
    #[must_use]
    pub fn by(mut self, setting: impl Into<String>) -> Self {
        self.setting = Some(setting.into());
        self
    }

    /// Adds the line that unlocks it.
    #[must_use]
    pub fn unlocked_by(mut self, line: impl Into<String>) -> Self {
        self.unlock = Some(line.into());
        self
    }
}

/// `EPERM, Operation not permitted`.
fn words_of(error: &io::Error) -> String {
    let text = error.to_string();
    match error.raw_os_error() {
        Some(number) => {
            let words = text.split(" (os error").next().unwrap_or_default();
            format!("{}, {words}", errno_name(number))
        }
        None => text,
    }
}

/// The name of an error number; `errno N` for one that no call of `doctor` gives.
fn errno_name(number: i32) -> String {
    let name = match number {
        libc::EPERM => "EPERM",
        libc::ENOENT => "ENOENT",
        libc::ESRCH => "ESRCH",
        libc::EIO => "EIO",
        libc::ENXIO => "ENXIO",
        libc::EAGAIN => "EAGAIN",
        libc::ENOMEM => "ENOMEM",
        libc::EACCES => "EACCES",
        libc::EBUSY => "EBUSY",
        libc::ENODEV => "ENODEV",
        libc::ENOTDIR => "ENOTDIR",
        libc::EINVAL => "EINVAL",
        libc::ENOSPC => "ENOSPC",
        libc::EROFS => "EROFS",
        libc::ENOSYS => "ENOSYS",
        libc::EUSERS => "EUSERS",
        libc::EOPNOTSUPP => "EOPNOTSUPP",
        libc::EDQUOT => "EDQUOT",
        other => return format!("errno {other}"),
    };
    name.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refused_call_is_named_with_its_error() {
        let error = io::Error::from_raw_os_error(libc::EPERM);
        let lack = Lack::of_call("unshare(CLONE_NEWNS)", &error)
            .because("x = 1")
            .by("x = 1")
            .unlocked_by("sysctl -w x=0");
        let expected = Lack {
            reason: "unshare(CLONE_NEWNS): EPERM, Operation not permitted: x = 1".to_owned(),
            call: Some("unshare(CLONE_NEWNS)".to_owned()),
            errno: Some("EPERM".to_owned()),
            setting: Some("x = 1".to_owned()),
            unlock: Some("sysctl -w x=0".to_owned()),
        };
        assert_eq!(lack, expected);
        assert_eq!(errno_name(4095), "errno 4095");
        let other = Lack::of_call("open(x)", &io::Error::other("no"));
        assert_eq!(other.reason, "open(x): no");
        assert_eq!(other.errno, None);
    }
}
