//! What keeps this process from namespaces and mounts, and what lifts it.

use std::io;

use serde::{Deserialize, Serialize};

use super::Lack;

/// What Docker has to be told so that nothing of it forbids namespaces and mounts.
pub(super) const DOCKER: &str = "docker run --security-opt seccomp=unconfined \
                                 --security-opt apparmor=unconfined \
                                 --security-opt systempaths=unconfined …";

/// What the kernel says of this process. Part of the document of `sockless doctor --json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Guards {
    /// Whether setuid programs gain nothing.
    pub no_new_privs: bool,
    /// Whether a filter decides about system calls (`Seccomp: 2`).
    pub seccomp_filter: bool,
    /// The AppArmor profile, where there is one.
    pub apparmor: Option<String>,
    /// The effective capabilities, in hexadecimal as in `/proc/self/status`.
    pub capabilities: String,
}

impl Guards {
    /// Reads `/proc/self`.
    pub fn here() -> Self {
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        let profile = [
            "/proc/self/attr/apparmor/current",
            "/proc/self/attr/current",
        ]
        .iter()
        .find_map(|file| std::fs::read_to_string(file).ok());
        Self::parse(&status, profile.as_deref())
    }

    fn parse(status: &str, profile: Option<&str>) -> Self {
        let field = |name: &str| {
            let mut lines = status.lines();
            lines.find_map(|line| Some(line.strip_prefix(name)?.strip_prefix(':')?.trim()))
        };
        let profile = profile.map(|text| text.trim_matches(['\0', '\n', ' ']));
        Self {
            no_new_privs: field("NoNewPrivs") == Some("1"),
            seccomp_filter: field("Seccomp") == Some("2"),
            apparmor: profile
                .filter(|name| !name.is_empty() && *name != "unconfined")
                .map(str::to_owned),
            capabilities: field("CapEff").unwrap_or_default().to_owned(),
        }
    }

    /// What it means that namespaces could not be made by `call`.
    pub(super) fn of_namespaces(&self, call: &str, error: &io::Error) -> Vec<Lack> {
        let lack = Lack::of_call(call, error);
        let settings: Vec<&Setting> = SETTINGS
            .iter()
            .filter(|setting| error.raw_os_error() == Some(setting.errno) && setting.forbids())
            .collect();
        if !settings.is_empty() {
            let of = |setting: &&Setting| setting.lack(&lack);
            return settings.iter().map(of).collect();
        }
        vec![match error.raw_os_error() {
            Some(libc::ENOSPC) => lack
                .because("as many user namespaces as are allowed exist here or in an outer one")
                .by("user.max_user_namespaces")
                .unlocked_by("sysctl -w user.max_user_namespaces=15000"),
            Some(libc::EINVAL | libc::ENOSYS) => {
                lack.because("this kernel has no user namespaces (CONFIG_USER_NS)")
            }
            _ => self.of_refusal(lack),
        }]
    }

    /// What it means that something was refused inside of new namespaces.
    pub(super) fn of_mount(&self, call: &str, error: &io::Error) -> Lack {
        let lack = Lack::of_call(call, error);
        let denied = matches!(error.raw_os_error(), Some(libc::EPERM | libc::EACCES));
        match SETTINGS
            .iter()
            .find(|setting| setting.is_of_mounts && setting.forbids())
        {
            Some(setting) if denied => setting.lack(&lack),
            _ => self.of_refusal(lack),
        }
    }

    fn of_refusal(&self, lack: Lack) -> Lack {
        let is_denied = matches!(lack.errno.as_deref(), Some("EPERM" | "EACCES" | "ENOSYS"));
        match &self.apparmor {
            _ if !is_denied => lack,
            _ if self.seccomp_filter => lack
                .because("a seccomp filter is set")
                .by("Seccomp = 2")
                .unlocked_by(DOCKER),
            Some(profile) => lack
                .because(&format!("the AppArmor profile is {profile}"))
                .by(format!("AppArmor profile = {profile}"))
                .unlocked_by("docker run --security-opt apparmor=unconfined …"),
            None => lack,
        }
    }
}

/// A kernel setting that forbids namespaces.
struct Setting {
    name: &'static str,
    forbidding: &'static str,
    /// What the kernel answers for it.
    errno: i32,
    /// Whether it also takes away what could be done inside.
    is_of_mounts: bool,
    allowing: &'static str,
}

const SETTINGS: [Setting; 3] = [
    Setting {
        name: "kernel.unprivileged_userns_clone",
        forbidding: "0",
        errno: libc::EPERM,
        is_of_mounts: false,
        allowing: "1",
    },
    Setting {
        name: "user.max_user_namespaces",
        forbidding: "0",
        errno: libc::ENOSPC,
        is_of_mounts: false,
        allowing: "15000",
    },
    Setting {
        name: "kernel.apparmor_restrict_unprivileged_userns",
        forbidding: "1",
        errno: libc::EPERM,
        is_of_mounts: true,
        allowing: "0",
    },
];

impl Setting {
    fn forbids(&self) -> bool {
        let path = format!("/proc/sys/{}", self.name.replace('.', "/"));
        std::fs::read_to_string(path).is_ok_and(|value| value.trim() == self.forbidding)
    }

    fn lack(&self, lack: &Lack) -> Lack {
        let setting = format!("{} = {}", self.name, self.forbidding);
        lack.clone()
            .because(&setting)
            .by(setting)
            .unlocked_by(format!("sysctl -w {}={}", self.name, self.allowing))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STATUS: &str = "Name:\tx\nCapEff:\t00000000a80425fb\nNoNewPrivs:\t1\nSeccomp:\t2\n\
                          Seccomp_filters:\t1\n";

    #[test]
    fn what_the_kernel_says_of_a_process_is_read() {
        let guards = Guards::parse(STATUS, Some("docker-default (enforce)\n"));
        let expected = Guards {
            no_new_privs: true,
            seccomp_filter: true,
            apparmor: Some("docker-default (enforce)".to_owned()),
            capabilities: "00000000a80425fb".to_owned(),
        };
        assert_eq!(guards, expected);
        let none = Guards::parse("NoNewPrivs:\t0\nSeccomp:\t0\n", Some("unconfined\n"));
        assert_eq!((none.no_new_privs, none.seccomp_filter), (false, false));
        assert_eq!(none.apparmor, None);
    }

    #[test]
    fn a_refusal_names_who_refuses() {
        let error = |number| io::Error::from_raw_os_error(number);
        let mut guards = Guards::parse(STATUS, Some("docker-default (enforce)\n"));
        let lack = guards.of_refusal(Lack::of_call("mount(tmpfs)", &error(libc::EPERM)));
        assert_eq!(
            lack.reason,
            "mount(tmpfs): EPERM, Operation not permitted: a seccomp filter is set"
        );
        assert_eq!(lack.setting.as_deref(), Some("Seccomp = 2"));
        guards.seccomp_filter = false;
        let lack = guards.of_refusal(Lack::of_call("mount(tmpfs)", &error(libc::EACCES)));
        assert_eq!(
            lack.reason,
            "mount(tmpfs): EACCES, Permission denied: the AppArmor profile is docker-default (enforce)"
        );
        assert_eq!(
            lack.unlock.as_deref(),
            Some("docker run --security-opt apparmor=unconfined …")
        );
        let lack = guards.of_refusal(Lack::of_call("mount(tmpfs)", &error(libc::EBUSY)));
        assert_eq!((lack.setting, lack.unlock), (None, None));
    }

    #[test]
    fn a_setting_is_named_with_its_value_and_the_one_that_allows() {
        let refused = io::Error::from_raw_os_error(libc::EPERM);
        let lack = SETTINGS[2].lack(&Lack::of_call("unshare(CLONE_NEWUSER)", &refused));
        let setting = "kernel.apparmor_restrict_unprivileged_userns";
        assert_eq!(lack.setting, Some(format!("{setting} = 1")));
        assert_eq!(lack.unlock, Some(format!("sysctl -w {setting}=0")));
        assert_eq!(
            lack.reason,
            format!("unshare(CLONE_NEWUSER): EPERM, Operation not permitted: {setting} = 1")
        );
    }
}
