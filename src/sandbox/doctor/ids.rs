//! What a map of subordinate IDs needs: two programs with privileges, and a line in two files.

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

use rustix::fs::StatVfsMountFlags;

use super::{Guards, Lack};
use crate::sandbox::userns;

/// How many IDs a line gives, as distributions have it.
const COUNT: u64 = 65_536;

/// The first ID that is given where none are taken.
const FIRST: u64 = 100_000;

/// Everything that is missing, as far as files show it.
pub(super) fn missing(guards: &Guards) -> Vec<Lack> {
    let mut lacks = Vec::new();
    for name in ["newuidmap", "newgidmap"] {
        match userns::find_program(name) {
            None => lacks.push(
                Lack::new(format!("{name} is not installed")).unlocked_by("apt-get install uidmap"),
            ),
            Some(program) => lacks.extend(powerless(&program)),
        }
    }
    if guards.no_new_privs {
        lacks.push(
            Lack::new("no_new_privs is set: newuidmap and newgidmap gain no privileges")
                .by("NoNewPrivs = 1")
                .unlocked_by(
                    "Kubernetes: securityContext: {allowPrivilegeEscalation: true}; Docker: \
                     without --security-opt no-new-privileges",
                ),
        );
    }
    let user = userns::user_name();
    if user.parse::<u32>().is_ok() {
        let gid = rustix::process::getegid().as_raw();
        lacks.push(
            Lack::new(format!(
                "uid {user} has no line in /etc/passwd, without which newuidmap gives it nothing"
            ))
            .by("/etc/passwd")
            .unlocked_by(format!(
                "echo 'sockless:x:{user}:{gid}::/:/sbin/nologin' >> /etc/passwd"
            )),
        );
    }
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    for file in ["/etc/subuid", "/etc/subgid"] {
        let text = read(file);
        if !userns::has_range(&text) {
            let line = format!("{user}:{}:{COUNT}", first_free(&text));
            lacks.push(
                Lack::new(format!("{file} has no line for user {user}"))
                    .by(file)
                    .unlocked_by(format!("echo '{line}' >> {file}")),
            );
        }
    }
    lacks
}

/// Behind all ranges of a file.
fn first_free(text: &str) -> u64 {
    let ends = text.lines().filter_map(|line| {
        let mut fields = line.trim().split(':').skip(1);
        let start: u64 = fields.next()?.parse().ok()?;
        start.checked_add(fields.next()?.parse().ok()?)
    });
    ends.max().unwrap_or(FIRST).max(FIRST)
}

/// What keeps a program from having more privileges than who runs it.
fn powerless(program: &Path) -> Option<Lack> {
    let shown = program.display();
    let found = std::fs::metadata(program).ok()?;
    let is_setuid = found.permissions().mode() & 0o4000 != 0 && found.uid() == 0;
    let mut buffer = [0_u8; 64];
    let capable = rustix::fs::getxattr(program, "security.capability", &mut buffer).is_ok();
    if !is_setuid && !capable {
        return Some(
            Lack::new(format!(
                "{shown} is neither setuid root nor has it capabilities"
            ))
            .by(shown.to_string())
            .unlocked_by(format!("chmod u+s {shown}")),
        );
    }
    let mount = rustix::fs::statvfs(program).ok()?;
    mount.f_flag.contains(StatVfsMountFlags::NOSUID).then(|| {
        Lack::new(format!(
            "{shown} is on a file system that is mounted nosuid"
        ))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_begins_behind_all_others() {
        assert_eq!(first_free(""), 100_000);
        assert_eq!(first_free("a:100000:65536\nb:300000:10\nwrong\n"), 300_010);
        assert_eq!(first_free("a:5:5\n"), 100_000);
        assert_eq!(first_free(&format!("a:{}:5\n", u64::MAX)), 100_000);
    }
}
