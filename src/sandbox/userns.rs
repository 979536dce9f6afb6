//! [`enter`]: becoming root without being root, before any thread exists.
//!
//! An ordinary user gets a user namespace in which they are uid 0, with their subordinate
//! IDs (`/etc/subuid`, `/etc/subgid`) as 1 and up. Only the setuid programs `newuidmap` and
//! `newgidmap` may write such a map, and only from outside; so a helper process is started
//! first, waits until this process is inside, and then runs them. See
//! `user_namespaces(7)` and `subuid(5)`.

use std::fmt;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use rustix::mount::MountPropagationFlags;
use rustix::thread::{CapabilitySet, UnshareFlags};

use super::ladder::{self, ChrootLack};
use super::sys;
use crate::owners::Kind;

/// The powers this process ended up with.
#[derive(Debug)]
pub enum World {
    /// uid 0 with `CAP_SYS_ADMIN` and many IDs: root, or root of a container or namespace.
    Root,
    /// uid 0 of a user namespace with subordinate IDs.
    MappedUser {
        /// How many users there are inside, 0 included.
        uids: u64,
        /// How many groups there are inside, 0 included.
        gids: u64,
    },
    /// uid 0 of a user namespace in which no other ID exists.
    SingleId {
        /// Why there are no more.
        reason: UsernsError,
    },
    /// uid 0 of the namespaces it was started in, as of a container: it can make none, and
    /// mount nothing, but change its root directory and files' owners.
    Chroot {
        /// Why there is no namespace.
        reason: UsernsError,
    },
    /// No namespace: nothing can be mounted, nothing can be run.
    None {
        /// Why there is none.
        reason: UsernsError,
        /// Why it is not [`Self::Chroot`] either.
        lack: ChrootLack,
    },
}

impl World {
    /// What of files has to be recorded, because they cannot have it.
    pub fn recorded(&self) -> Option<Kind> {
        match self {
            Self::Root | Self::MappedUser { .. } | Self::Chroot { .. } => None,
            Self::SingleId { .. } => Some(Kind::Owners),
            Self::None { .. } => Some(Kind::All),
        }
    }
}

/// Why fewer powers could be had than wanted.
#[derive(Debug, thiserror::Error)]
pub enum UsernsError {
    /// The kernel did not allow a user namespace.
    #[error("creating a user namespace: {source}")]
    Unshare {
        /// Its answer.
        #[source]
        source: io::Error,
        /// The kernel settings that forbid it, as `name = value`.
        settings: Vec<String>,
    },
    /// A file grants this user no IDs.
    #[error("{file} has no line for user {user}")]
    NoRange {
        /// `/etc/subuid` or `/etc/subgid`.
        file: &'static str,
        /// Name, or number where the user has no name.
        user: String,
    },
    /// A helper program is missing.
    #[error("{0} is not installed")]
    NotInstalled(&'static str),
    /// A helper program failed.
    #[error("{command}: {message}")]
    Map {
        /// The command as it was run.
        command: String,
        /// What it wrote to its standard error.
        message: String,
    },
    /// The namespace this process was started in has one ID only.
    #[error("the user namespace in which sockless was started has one ID only")]
    InheritedSingle,
    /// A mount or map could not be made although the namespace could.
    #[error("{doing}: {source}")]
    Io {
        /// What was being done.
        doing: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// A thread was already running: a mistake of the program.
    #[error("entering namespaces with {0} threads running; must be called first in main")]
    Threads(u64),
}

impl UsernsError {
    /// What to do about it, for people.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Unshare { settings, .. } if !settings.is_empty() => Some(format!(
                "change the kernel setting (sysctl): {}",
                settings.join(", ")
            )),
            Self::Unshare { .. } => Some(
                "in a container, allow it with --security-opt seccomp=unconfined or a profile \
                 that permits unshare(2)"
                    .to_owned(),
            ),
            Self::NoRange { file, user } => {
                let option = if file.ends_with("gid") {
                    "--add-subgids"
                } else {
                    "--add-subuids"
                };
                Some(format!(
                    "as root: usermod {option} 100000-165535 {user} (or add the line \
                     `{user}:100000:65536` to {file})"
                ))
            }
            Self::NotInstalled(_) => {
                Some("install the package `uidmap` (or `shadow-utils`)".to_owned())
            }
            Self::Map { .. } => Some(
                "newuidmap and newgidmap must be setuid root or have CAP_SETUID and CAP_SETGID; \
                 the ranges in /etc/subuid and /etc/subgid must be this user's"
                    .to_owned(),
            ),
            _ => None,
        }
    }
}

/// The mount points that were there before this program mounted anything.
static OLD_MOUNTS: OnceLock<Vec<String>> = OnceLock::new();

/// Returns the mount points from before [`enter`], if it was called.
pub(super) fn old_mounts() -> Option<&'static Vec<String>> {
    OLD_MOUNTS.get()
}

/// Enters the namespaces in which images are built, and says what they are.
///
/// Call it first in `main`, after [`super::hidden_command`] and before any thread exists.
/// Afterwards this process has a mount namespace of its own, into which the host's mounts
/// propagate and from which nothing propagates.
///
/// # Errors
/// Only where it stopped half-way, so that the process is of no use any more. That the host
/// allows nothing is [`World::Chroot`] or [`World::None`].
pub fn enter() -> Result<World, UsernsError> {
    let threads = threads().map_err(|source| UsernsError::Io {
        doing: "reading /proc/self/status",
        source,
    })?;
    if threads != 1 {
        return Err(UsernsError::Threads(threads));
    }
    // What the caller had open is none of a step's business, and would be in the way of
    // the descriptors that are handed to runtimes by number.
    sys::keep_from(3).map_err(|source| UsernsError::Io {
        doing: "keeping inherited descriptors to this process",
        source,
    })?;
    let world = if is_powerful_root() {
        if let Err(source) = sys::unshare(UnshareFlags::NEWNS) {
            let settings = forbidding_settings();
            let reason = UsernsError::Unshare { source, settings };
            return Ok(ladder::without_namespaces(reason));
        }
        let map = std::fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
        match mapped_ids(&map) {
            0 | 1 => World::SingleId {
                reason: UsernsError::InheritedSingle,
            },
            _ => World::Root,
        }
    } else {
        match enter_user_namespace()? {
            none @ (World::Chroot { .. } | World::None { .. }) => return Ok(none),
            world => world,
        }
    };
    // Slaves, not private: what the administrator unmounts must not stay busy here.
    let slave = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
    if let Err(error) = rustix::mount::mount_change("/", slave) {
        let source = error.into();
        // After chroot(2) into an ordinary directory there is no mount to change, and
        // what is mounted here could show up outside.
        let doing = "keeping mounts to this process (the root directory must be a mount point)";
        return Ok(ladder::without_namespaces(UsernsError::Io {
            doing,
            source,
        }));
    }
    if let Ok(text) = std::fs::read_to_string("/proc/self/mountinfo") {
        let _ = OLD_MOUNTS.set(mount_points_of(&text));
    }
    Ok(world)
}

/// Enters a user namespace with as many IDs as can be had.
///
/// # Errors
/// As [`enter`].
pub(super) fn enter_user_namespace() -> Result<World, UsernsError> {
    let (uid, gid) = (
        rustix::process::geteuid().as_raw(),
        rustix::process::getegid().as_raw(),
    );
    let maps = Maps::plan(uid, gid);
    let helper = match &maps {
        Ok(maps) => Some(Helper::start(maps).map_err(|source| UsernsError::Io {
            doing: "starting the process that maps IDs",
            source,
        })?),
        Err(_) => None,
    };
    if let Err(source) = sys::unshare(UnshareFlags::NEWUSER | UnshareFlags::NEWNS) {
        if let Some(helper) = helper {
            helper.dismiss();
        }
        let settings = forbidding_settings();
        let reason = UsernsError::Unshare { source, settings };
        return Ok(ladder::without_namespaces(reason));
    }
    let reason = match (maps, helper) {
        (Ok(maps), Some(helper)) => match helper.map() {
            Ok(()) => {
                return Ok(World::MappedUser {
                    uids: maps.uid.iter().map(|range| range.count).sum(),
                    gids: maps.gid.iter().map(|range| range.count).sum(),
                });
            }
            Err(reason) => reason,
        },
        (Err(reason), _) => reason,
        (Ok(_), None) => unreachable!("a helper is started for every plan"),
    };
    map_single(uid, gid)?;
    Ok(World::SingleId { reason })
}

/// Maps this user, and no other, to uid 0 of the namespace that was just entered.
///
/// # Errors
/// [`UsernsError::Io`] where not even that is allowed.
pub(super) fn map_single(uid: u32, gid: u32) -> Result<(), UsernsError> {
    // The map was not written, or only that of the groups; one that exists stays.
    for (file, text) in [
        ("/proc/self/setgroups", "deny".to_owned()),
        ("/proc/self/gid_map", format!("0 {gid} 1\n")),
        ("/proc/self/uid_map", format!("0 {uid} 1\n")),
    ] {
        if let Err(source) = std::fs::write(file, text) {
            let written = std::fs::read_to_string(file).unwrap_or_default();
            if file.ends_with("_map") && mapped_ids(&written) == 0 {
                return Err(UsernsError::Io {
                    doing: "mapping this user to uid 0",
                    source,
                });
            }
        }
    }
    Ok(())
}

/// The name of this user, or the number where there is none.
pub(super) fn user_name() -> String {
    let uid = rustix::process::geteuid().as_raw();
    let passwd = std::fs::read_to_string("/etc/passwd").unwrap_or_default();
    name_of(&passwd, uid).unwrap_or_else(|| uid.to_string())
}

/// Whether the text of `/etc/subuid` or `/etc/subgid` grants this user anything.
pub(super) fn has_range(text: &str) -> bool {
    let uid = rustix::process::geteuid().as_raw();
    !subordinate_ranges(text, Some(&user_name()), uid).is_empty()
}

/// One line of an ID map: `count` IDs from `inside` on are those from `outside` on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Range {
    inside: u64,
    outside: u64,
    count: u64,
}

/// How IDs are to be mapped.
#[derive(Debug, PartialEq, Eq)]
struct Maps {
    /// The program for each, or none where this process may write the map itself.
    programs: Option<(PathBuf, PathBuf)>,
    uid: Vec<Range>,
    gid: Vec<Range>,
}

impl Maps {
    fn plan(uid: u32, gid: u32) -> Result<Self, UsernsError> {
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        if uid == 0 {
            // Root of a container that has CAP_SETUID but not CAP_SYS_ADMIN: all its IDs
            // can be the same inside.
            return Ok(Self {
                programs: None,
                uid: identity(&read("/proc/self/uid_map")),
                gid: identity(&read("/proc/self/gid_map")),
            });
        }
        let programs = (find("newuidmap")?, find("newgidmap")?);
        let name = name_of(&read("/etc/passwd"), uid);
        let ranges = |file: &'static str, own: u32| {
            let ranges = subordinate_ranges(&read(file), name.as_deref(), uid);
            if ranges.is_empty() {
                let user = name.clone().unwrap_or_else(|| uid.to_string());
                return Err(UsernsError::NoRange { file, user });
            }
            Ok(with_own(own, &ranges))
        };
        Ok(Self {
            uid: ranges("/etc/subuid", uid)?,
            gid: ranges("/etc/subgid", gid)?,
            programs: Some(programs),
        })
    }
}

/// The process outside that maps the IDs of this one.
struct Helper {
    child: std::process::Child,
}

impl Helper {
    /// Starts it; it waits for a byte.
    fn start(maps: &Maps) -> io::Result<Self> {
        let mut command = Command::new("/proc/self/exe");
        command.arg("__idmap").arg(std::process::id().to_string());
        match &maps.programs {
            Some((uid, gid)) => command.arg(gid).arg(uid),
            None => command.arg("-").arg("-"),
        };
        command
            .arg(map_text(&maps.gid))
            .arg(map_text(&maps.uid))
            .env_clear()
            .env("LC_ALL", "C")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        Ok(Self {
            child: command.spawn()?,
        })
    }

    /// Lets it do its work and waits for that.
    fn map(mut self) -> Result<(), UsernsError> {
        let failed = |message: String| UsernsError::Map {
            command: "mapping IDs".to_owned(),
            message,
        };
        let mut answer = String::new();
        let io = |child: &mut std::process::Child, answer: &mut String| -> io::Result<()> {
            if let Some(mut stdin) = child.stdin.take() {
                stdin.write_all(b"g")?;
            }
            if let Some(mut stdout) = child.stdout.take() {
                stdout.read_to_string(answer)?;
            }
            Ok(())
        };
        let told = io(&mut self.child, &mut answer);
        let status = self.child.wait();
        told.map_err(|error| failed(error.to_string()))?;
        let status = status.map_err(|error| failed(error.to_string()))?;
        if status.success() {
            return Ok(());
        }
        match answer.split_once('\n') {
            Some((command, message)) => Err(UsernsError::Map {
                command: command.to_owned(),
                message: message.trim().to_owned(),
            }),
            None => Err(failed(format!("the helper ended with {status}"))),
        }
    }

    /// Ends it without any work done.
    fn dismiss(mut self) {
        // It reads the end of its input and exits.
        drop(self.child.stdin.take());
        let _ = self.child.wait();
    }
}

/// `__idmap PID NEWGIDMAP NEWUIDMAP GIDMAP UIDMAP`: writes both maps once told to.
///
/// Prints the command that failed and its error, on lines of their own, and returns the
/// exit status.
pub(super) fn idmap_main(args: &[std::ffi::OsString]) -> i32 {
    let [pid, newgidmap, newuidmap, gid_map, uid_map] = args else {
        return 2;
    };
    let mut go = [0];
    if io::stdin().read_exact(&mut go).is_err() {
        return 1;
    }
    for (program, kind, map) in [(newgidmap, "gid", gid_map), (newuidmap, "uid", uid_map)] {
        let (pid, map) = (pid.to_string_lossy(), map.to_string_lossy());
        let result = if program == "-" {
            let file = format!("/proc/{pid}/{kind}_map");
            let text = map.replace(',', "\n");
            std::fs::write(&file, text)
                .map_err(|error| (format!("writing {file}"), error.to_string()))
        } else {
            run_map_program(Path::new(program), &pid, &map)
        };
        if let Err((command, message)) = result {
            let _ = io::stdout().write_all(format!("{command}\n{message}\n").as_bytes());
            return 1;
        }
    }
    0
}

fn run_map_program(program: &Path, pid: &str, map: &str) -> Result<(), (String, String)> {
    let args: Vec<&str> = std::iter::once(pid).chain(map.split([' ', ','])).collect();
    let name = || format!("{} {}", program.display(), args.join(" "));
    let output = Command::new(program)
        .args(&args)
        .env_clear()
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .output()
        .map_err(|error| (name(), error.to_string()))?;
    if output.status.success() {
        return Ok(());
    }
    let stderr = String::from_utf8_lossy(&output.stderr);
    let message = match stderr.trim() {
        "" => output.status.to_string(),
        text => text.to_owned(),
    };
    Err((name(), message))
}

/// The map as lines, joined by commas.
fn map_text(ranges: &[Range]) -> String {
    let lines: Vec<String> = ranges
        .iter()
        .map(|range| format!("{} {} {}", range.inside, range.outside, range.count))
        .collect();
    lines.join(",")
}

/// The user as 0, then the given ranges as 1 and up, without gaps.
fn with_own(own: u32, ranges: &[(u64, u64)]) -> Vec<Range> {
    let mut map = vec![Range {
        inside: 0,
        outside: own.into(),
        count: 1,
    }];
    let mut inside = 1;
    for &(outside, count) in ranges {
        map.push(Range {
            inside,
            outside,
            count,
        });
        inside += count;
    }
    map
}

/// A map in which everything that exists in the map `text` stays what it is.
fn identity(text: &str) -> Vec<Range> {
    parse_map(text)
        .map(|range| Range {
            outside: range.inside,
            ..range
        })
        .collect()
}

fn parse_map(text: &str) -> impl Iterator<Item = Range> {
    text.lines().filter_map(|line| {
        let mut numbers = line.split_whitespace().map(|word| word.parse().ok());
        Some(Range {
            inside: numbers.next()??,
            outside: numbers.next()??,
            count: numbers.next()??,
        })
    })
}

/// How many IDs the map `text` has.
pub(super) fn mapped_ids(text: &str) -> u64 {
    parse_map(text).map(|range| range.count).sum()
}

/// The largest number of lines that any kernel takes in a map, less the user's own.
const RANGES_LIMIT: usize = 339;

/// The user's ranges, start and count, in the order of the file. Lines that make no sense,
/// overlap an earlier one or are empty are passed over, as `newuidmap` does.
fn subordinate_ranges(text: &str, name: Option<&str>, uid: u32) -> Vec<(u64, u64)> {
    let number = uid.to_string();
    let mut ranges: Vec<(u64, u64)> = Vec::new();
    for line in text.lines() {
        let mut fields = line.trim().split(':');
        let (Some(owner), Some(start), Some(count), None) =
            (fields.next(), fields.next(), fields.next(), fields.next())
        else {
            continue;
        };
        if Some(owner) != name && owner != number {
            continue;
        }
        let (Ok(start), Ok(count)) = (start.parse::<u32>(), count.parse::<u32>()) else {
            continue;
        };
        let (start, end) = (u64::from(start), u64::from(start) + u64::from(count));
        let overlaps = |&(other, length): &(u64, u64)| start < other + length && other < end;
        if count == 0 || ranges.iter().any(overlaps) {
            continue;
        }
        ranges.push((start, count.into()));
    }
    ranges.truncate(RANGES_LIMIT);
    ranges
}

/// The name of a user in the text of `/etc/passwd`.
fn name_of(passwd: &str, uid: u32) -> Option<String> {
    passwd.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        let number = fields.nth(1)?;
        (number.parse() == Ok(uid)).then(|| name.to_owned())
    })
}

/// Finds one of the two programs; `sbin` too, for users who have not got it in their path.
fn find(name: &'static str) -> Result<PathBuf, UsernsError> {
    find_program(name).ok_or(UsernsError::NotInstalled(name))
}

/// Looks a program up in `PATH` and the usual directories.
pub(super) fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let usual = ["/usr/bin", "/bin", "/usr/sbin", "/sbin", "/usr/local/bin"].map(PathBuf::from);
    std::env::split_paths(&path)
        .filter(|directory| directory.is_absolute())
        .chain(usual)
        .map(|directory| directory.join(name))
        .find(|path| {
            path.is_file() && rustix::fs::access(path, rustix::fs::Access::EXEC_OK).is_ok()
        })
}

/// Whether this is the first user namespace, in which all IDs are mapped to themselves.
pub(super) fn is_initial() -> bool {
    std::fs::read_to_string("/proc/self/uid_map")
        .is_ok_and(|map| map.split_whitespace().eq(["0", "0", "4294967295"]))
}

pub(super) fn is_powerful_root() -> bool {
    rustix::process::geteuid().is_root()
        && rustix::thread::capabilities(None)
            .is_ok_and(|sets| sets.effective.contains(CapabilitySet::SYS_ADMIN))
}

fn threads() -> io::Result<u64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    status
        .lines()
        .find_map(|line| line.strip_prefix("Threads:")?.trim().parse().ok())
        .ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// The kernel settings that forbid user namespaces here.
fn forbidding_settings() -> Vec<String> {
    let read = |name: &str| std::fs::read_to_string(format!("/proc/sys/{name}")).ok();
    [
        ("kernel/unprivileged_userns_clone", "0"),
        ("user/max_user_namespaces", "0"),
        ("kernel/apparmor_restrict_unprivileged_userns", "1"),
    ]
    .into_iter()
    .filter(|(name, forbidding)| read(name).is_some_and(|value| value.trim() == *forbidding))
    .map(|(name, forbidding)| format!("{} = {forbidding}", name.replace('/', ".")))
    .collect()
}

/// The mount points in the text of a `mountinfo` file, escaped as they are there.
pub(super) fn mount_points_of(mountinfo: &str) -> Vec<String> {
    mountinfo
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .map(str::to_owned)
        .collect()
}

impl fmt::Display for World {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Root => write!(f, "root"),
            Self::MappedUser { uids, gids } => {
                write!(f, "user namespace with {uids} users and {gids} groups")
            }
            Self::SingleId { reason } => write!(f, "user namespace with one user ({reason})"),
            Self::Chroot { reason } => write!(f, "root without namespaces ({reason})"),
            Self::None { reason, lack } => write!(f, "no namespaces ({reason}; {lack})"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_the_users_own_by_name_or_number() {
        let check = |text: &str, expected: &[(u64, u64)]| {
            assert_eq!(
                subordinate_ranges(text, Some("ada"), 1000),
                expected,
                "{text}"
            );
        };
        check("", &[]);
        check("ada:100000:65536\n", &[(100_000, 65536)]);
        check("1000:100000:65536", &[(100_000, 65536)]);
        check("bob:100000:65536\nadam:5:5\n10000:5:5", &[]);
        check("ada:1:2\nada:10:2\n", &[(1, 2), (10, 2)]);
        // Overlapping, empty, broken.
        check("ada:1:5\nada:5:2\nada:6:2\n", &[(1, 5), (6, 2)]);
        check("ada:1:0\nada:x:2\nada:1\nada:1:2:3\n# ada:1:2", &[]);
        check("ada:-1:5\nada:4294967296:1", &[]);
    }

    #[test]
    fn the_user_is_zero_and_the_others_follow_without_gaps() {
        let map = with_own(1000, &[(100_000, 65536), (300_000, 10)]);
        assert_eq!(map_text(&map), "0 1000 1,1 100000 65536,65537 300000 10");
    }

    #[test]
    fn all_ids_of_a_container_stay_themselves() {
        let map = identity("         0     100000      65536\n     70000    200000   1\n");
        assert_eq!(map_text(&map), "0 0 65536,70000 70000 1");
        assert_eq!(mapped_ids("0 0 4294967295\n"), 4_294_967_295);
        assert_eq!(mapped_ids("0 1000 1\n"), 1);
        assert_eq!(mapped_ids(""), 0);
    }

    #[test]
    fn users_are_found_by_number() {
        let passwd = "root:x:0:0:root:/root:/bin/sh\nbroken\nada:x:1000:1000::/home/ada:/bin/sh\n";
        assert_eq!(name_of(passwd, 1000).as_deref(), Some("ada"));
        assert_eq!(name_of(passwd, 1001), None);
    }

    #[test]
    fn mount_points_are_the_fifth_field() {
        let text =
            "22 1 0:20 / /sys rw - sysfs sysfs rw\n23 1 0:21 / /a\\040b rw shared:1 - tmpfs t rw\n";
        assert_eq!(mount_points_of(text), ["/sys", "/a\\040b"]);
    }

    #[test]
    fn a_missing_line_is_named_and_can_be_added() {
        let error = UsernsError::NoRange {
            file: "/etc/subgid",
            user: "ada".to_owned(),
        };
        assert_eq!(error.to_string(), "/etc/subgid has no line for user ada");
        assert_eq!(
            error.hint().as_deref(),
            Some(
                "as root: usermod --add-subgids 100000-165535 ada (or add the line \
                 `ada:100000:65536` to /etc/subgid)"
            )
        );
    }

    #[test]
    fn a_test_has_threads_and_is_refused() {
        assert!(matches!(enter(), Err(UsernsError::Threads(n)) if n > 1));
    }
}
