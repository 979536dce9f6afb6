//! Where cgroups of version 2 can be made that have controllers.

use std::collections::BTreeSet;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use super::group::write;
use super::{Hierarchy, OWN_LEAF, cannot, try_in};

/// How often processes are looked for that were started while others were moved.
const ROUNDS: usize = 10;

/// A cgroup whose children have controllers, and which of `wanted` they have.
///
/// `named` is used as it is. Else it is the own one, from which this program moves away where
/// nothing but itself is in it, or the one above, where processes of others are in the own one.
///
/// # Errors
/// Why there is none, for people.
pub(super) fn find(
    hierarchy: &Hierarchy,
    named: Option<&Path>,
    wanted: &[&str],
) -> Result<(PathBuf, BTreeSet<String>), String> {
    let own = hierarchy.start(named)?;
    let why = match use_dir(&own, wanted) {
        Ok(found) => return Ok((own, found)),
        Err(error) if named.is_some() => return Err(cannot(&own, &error)),
        Err(error) if is_busy(&error) && is_ours_alone(&own) => {
            let moved = move_into_leaf(&own).and_then(|()| use_dir(&own, wanted));
            match moved {
                Ok(found) => return Ok((own, found)),
                Err(error) => cannot(&own, &error),
            }
        }
        Err(error) if is_busy(&error) => {
            format!("other processes are in the cgroup {}", own.display())
        }
        Err(error) => cannot(&own, &error),
    };
    if own == hierarchy.top {
        return Err(why);
    }
    let above = own.parent().unwrap_or(&own);
    match use_dir(above, wanted) {
        Ok(found) => Ok((above.to_owned(), found)),
        // The own one is what can be given to this program.
        Err(_) => Err(why),
    }
}

/// Has the children of `dir` have controllers, and makes sure that one can be made.
fn use_dir(dir: &Path, wanted: &[&str]) -> io::Result<BTreeSet<String>> {
    let found = enable(dir, wanted)?;
    try_in(dir).map_err(io::Error::other)?;
    Ok(found)
}

/// Gives the children of `dir` those of `wanted` that it has; returns which these are.
///
/// # Errors
/// `EBUSY` where processes are in `dir`; others where it cannot be written.
fn enable(dir: &Path, wanted: &[&str]) -> io::Result<BTreeSet<String>> {
    let names = |file: &str| -> io::Result<BTreeSet<String>> {
        let text = std::fs::read_to_string(dir.join(file))?;
        Ok(text.split_whitespace().map(str::to_owned).collect())
    };
    let (there, mut enabled) = (
        names("cgroup.controllers")?,
        names("cgroup.subtree_control")?,
    );
    for &name in wanted {
        if there.contains(name) && !enabled.contains(name) {
            // One at a time: none is lost for another's sake.
            write(&dir.join("cgroup.subtree_control"), &format!("+{name}"))?;
            enabled.insert(name.to_owned());
        }
    }
    enabled.retain(|name| wanted.contains(&name.as_str()));
    Ok(enabled)
}

fn is_busy(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EBUSY)
}

/// Whether all processes of `dir` are this one, those that run this program above it, such as the
/// service, and what these have started.
fn is_ours_alone(dir: &Path) -> bool {
    let program = |pid: u32| {
        let file = std::fs::metadata(format!("/proc/{pid}/exe")).ok()?;
        Some((file.dev(), file.ino()))
    };
    let own = std::process::id();
    let mut top = own;
    while let Some(parent) = parent_of(top)
        && program(parent).is_some()
        && program(parent) == program(own)
    {
        top = parent;
    }
    let is_ours =
        |pid: u32| std::iter::successors(Some(pid), |&pid| parent_of(pid)).any(|pid| pid == top);
    processes(dir).is_ok_and(|pids| pids.into_iter().all(is_ours))
}

fn processes(dir: &Path) -> io::Result<Vec<u32>> {
    let text = std::fs::read_to_string(dir.join("cgroup.procs"))?;
    Ok(text.lines().filter_map(|pid| pid.parse().ok()).collect())
}

/// The parent of a process; none of the first one, and of one that is outside of this namespace.
fn parent_of(pid: u32) -> Option<u32> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let parent = status.lines().find_map(|line| line.strip_prefix("PPid:"))?;
    parent.trim().parse().ok().filter(|&parent| parent != 0)
}

/// Moves all processes of `dir` into a child of it.
fn move_into_leaf(dir: &Path) -> io::Result<()> {
    let leaf = dir.join(OWN_LEAF);
    match std::fs::create_dir(&leaf) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    for _ in 0..ROUNDS {
        let pids = processes(dir)?;
        if pids.is_empty() {
            return Ok(());
        }
        for pid in pids {
            match write(&leaf.join("cgroup.procs"), &pid.to_string()) {
                // It has ended.
                Err(error) if error.raw_os_error() == Some(libc::ESRCH) => {}
                moved => moved?,
            }
        }
    }
    Err(rustix::io::Errno::BUSY.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A real hierarchy of version 2 that this user may write, as root's `/sys/fs/cgroup` on a machine
    /// whose controllers are elsewhere.
    fn writable_v2() -> Option<PathBuf> {
        let info = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        let line = info.lines().find(|line| line.contains(" - cgroup2 "))?;
        let top = PathBuf::from(line.split(' ').nth(4)?);
        let trial = top.join(format!("sockless-unit-{}", std::process::id()));
        std::fs::create_dir(&trial).ok()?;
        Some(trial)
    }

    /// A process that waits in `dir` until it is killed.
    struct Inhabitant(std::process::Child);

    impl Inhabitant {
        fn of(dir: &Path) -> Self {
            let child = std::process::Command::new("sleep").arg("60").spawn();
            let child = Self(child.unwrap());
            write(&dir.join("cgroup.procs"), &child.0.id().to_string()).unwrap();
            child
        }
    }

    impl Drop for Inhabitant {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    #[test]
    fn processes_make_way_for_controllers() {
        let Some(dir) = writable_v2() else {
            assert!(
                !std::fs::metadata("/sys/fs/cgroup/unified")
                    .is_ok_and(|_| rustix::process::geteuid().is_root()),
                "root may write its cgroups"
            );
            // Said here; root's run of the same tests has the case, and fails where it cannot.
            let _ = std::io::Write::write_all(
                &mut std::io::stderr(),
                b"skipped: no hierarchy of version 2 that this user may write\n",
            );
            return;
        };
        let there = std::fs::read_to_string(dir.join("cgroup.controllers")).unwrap();
        let name = there.split_whitespace().next();
        let inhabitant = Inhabitant::of(&dir);
        assert!(is_ours_alone(&dir), "a child is ours");
        if let Some(name) = name {
            let busy = enable(&dir, &[name]).unwrap_err();
            assert!(is_busy(&busy), "{busy}");
        }
        move_into_leaf(&dir).unwrap();
        let leaf = dir.join(OWN_LEAF);
        assert_eq!(processes(&dir).unwrap(), [0; 0]);
        assert_eq!(processes(&leaf).unwrap(), [inhabitant.0.id()]);
        if let Some(name) = name {
            let wanted = [name, "no-such-controller"];
            assert_eq!(enable(&dir, &wanted).unwrap(), [name.to_owned()].into());
            assert_eq!(enable(&dir, &wanted).unwrap(), [name.to_owned()].into());
            let text = std::fs::read_to_string(dir.join("cgroup.subtree_control")).unwrap();
            assert_eq!(text.trim(), name);
        }
        drop(inhabitant);
        super::super::group::remove_soon(&dir);
        assert!(!dir.exists());
    }

    #[test]
    fn processes_of_others_stay_where_they_are() {
        // PID 1 is an ancestor, and runs something else.
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("cgroup.procs"), "1\n").unwrap();
        assert!(!is_ours_alone(dir.path()));
        let own = std::process::id();
        std::fs::write(dir.path().join("cgroup.procs"), format!("{own}\n")).unwrap();
        assert!(is_ours_alone(dir.path()));
    }
}
