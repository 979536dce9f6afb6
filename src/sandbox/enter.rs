//! `__enter`: mounts what a step may see, and becomes the runtime.
//!
//! On a tmpfs over the path of the root filesystem:
//!
//! ```text
//! root/        the root filesystem, with /sys, resolv.conf, hosts and the step's mounts
//! late/N       mounts whose place is below /dev, which only the runtime makes
//! files/       resolv.conf and hosts
//! bundle/      config.json of runc and crun
//! state/       their state
//! ```
//!
//! Sources are opened once, before anything of the step runs, and mounted through the file
//! descriptor; targets are resolved by the kernel inside the root filesystem. So no link in
//! an image leads a mount out of it. See `open_tree(2)`, `move_mount(2)`, `openat2(2)`.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Component, Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::fs::{CWD, FileType, Mode, OFlags};
use rustix::io::FdFlags;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MoveMountFlags, OpenTreeFlags,
    UnmountFlags,
};
use rustix::thread::UnshareFlags;

use super::wire::{Attachment, Doing, Failure, Launch, RuntimeKind};
use super::{Mount, MountKind, bwrap, netlink, network, runc, sys, userns};
use crate::confined::ConfinedDir;

/// The file descriptors that the innermost stage is started with, in the order of its
/// arguments: its own program, the launch, the reports, standard output and error.
pub(super) const INIT_FDS: std::ops::RangeInclusive<i32> = 3..=7;

/// What the runtime needs to know.
#[derive(Debug)]
pub(super) struct View {
    /// The root filesystem with everything mounted but `/proc` and `/dev`.
    pub(super) root: PathBuf,
    /// Host name inside.
    pub(super) hostname: String,
    /// What goes below `/dev`: from where, to where.
    pub(super) late: Vec<(PathBuf, PathBuf)>,
    /// Files of `/proc` that read as empty.
    pub(super) masked_files: Vec<&'static str>,
    /// Directories of `/proc` that read as empty.
    pub(super) masked_dirs: Vec<&'static str>,
    /// What of `/proc` cannot be written.
    pub(super) read_only: Vec<&'static str>,
}

/// What of `/proc` tells about the host, as Docker and BuildKit have it. The first group
/// are files, the second directories.
const MASKED_FILES: [&str; 7] = [
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/interrupts",
];
const MASKED_DIRS: [&str; 3] = ["/proc/acpi", "/proc/asound", "/proc/scsi"];
/// What of `/proc` changes the host.
const READ_ONLY: [&str; 5] = [
    "/proc/bus",
    "/proc/fs",
    "/proc/irq",
    "/proc/sys",
    "/proc/sysrq-trigger",
];
/// What of `/sys` tells about the host.
const MASKED_SYS: [&str; 2] = ["/sys/firmware", "/sys/devices/virtual/powercap"];

/// What a step is started with.
pub(super) struct Inherited {
    /// A copy of this program that nobody can write.
    pub(super) exe: OwnedFd,
    /// The launch.
    pub(super) launch: OwnedFd,
    /// Where the runtime writes.
    pub(super) log: OwnedFd,
    /// The other end waits until the network namespace is there, and answers.
    pub(super) network_ready: Option<OwnedFd>,
}

/// Does what the module says; returns only where that failed.
pub(super) fn enter(
    launch: &Launch,
    inherited: Inherited,
) -> Result<std::convert::Infallible, Failure> {
    // No terminal of the user can be reached, and none of their keys.
    rustix::process::setsid().doing(|| "starting a session".to_owned())?;
    // Where that fails, keyrings cannot be used at all, and there is none to be inherited.
    let _ = sys::join_new_keyring();
    let mut namespaces = UnshareFlags::NEWNS;
    if !matches!(launch.network, Attachment::Host) {
        namespaces |= UnshareFlags::NEWNET;
    }
    sys::unshare(namespaces).doing(|| "entering mount and network namespaces".to_owned())?;
    if namespaces.contains(UnshareFlags::NEWNET) {
        netlink::bring_loopback_up().doing(|| "bringing the loopback up".to_owned())?;
    }
    if let Some(socket) = &inherited.network_ready {
        wait_for_network(socket)?;
        network::hide_metadata()?;
    }
    let view = mount_all(launch)?;
    become_runtime(launch, &view, inherited)
}

/// Tells `__reap` that the network namespace is there and waits until it is attached.
fn wait_for_network(socket: &OwnedFd) -> Result<(), Failure> {
    let doing = || "waiting for the network".to_owned();
    rustix::io::write(socket, b"n").doing(doing)?;
    let mut byte = [0];
    match rustix::io::retry_on_intr(|| rustix::io::read(socket, &mut byte[..])).doing(doing)? {
        0 => Err(Failure::new(doing(), &io::ErrorKind::UnexpectedEof.into())),
        _ => Ok(()),
    }
}

/// The step's mounts, parents before what lies below them.
pub(super) fn in_mount_order(mounts: &[Mount]) -> Vec<&Mount> {
    let mut mounts: Vec<&Mount> = mounts.iter().collect();
    mounts.sort_by_key(|mount| mount.target.components().count());
    mounts
}

/// Whether a target lies in the fresh `/dev`.
pub(super) fn is_below_dev(target: &Path) -> bool {
    target.starts_with("/dev")
}

fn mount_all(launch: &Launch) -> Result<View, Failure> {
    let process = &launch.process;
    let base = &process.rootfs;
    let root_tree =
        clone_tree(base).doing(|| format!("opening the root filesystem {}", base.display()))?;
    let mut trees = Vec::new();
    for mount in in_mount_order(&process.mounts) {
        trees.push((mount, mount_tree(mount)?));
    }
    if let Some(old) = &launch.old_mounts {
        let text = std::fs::read_to_string("/proc/self/mountinfo")
            .doing(|| "reading /proc/self/mountinfo".to_owned())?;
        detach_newer(&text, old, base);
    }
    if matches!(launch.runtime.kind, RuntimeKind::Runc | RuntimeKind::Crun) {
        hide_cgroups()?;
    }

    rustix::mount::mount(
        "tmpfs",
        base,
        "tmpfs",
        MountFlags::NOSUID | MountFlags::NODEV,
        Some(c"mode=0755"),
    )
    .doing(|| format!("mounting a tmpfs on {}", base.display()))?;
    let dir = |name: &str| -> Result<PathBuf, Failure> {
        let path = base.join(name);
        std::fs::create_dir(&path).doing(|| format!("creating {}", path.display()))?;
        Ok(path)
    };
    let (root, late_dir, files) = (dir("root")?, dir("late")?, dir("files")?);
    let place = rustix::fs::open(&root, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
        .doing(|| format!("opening {}", root.display()))?;
    attach(&root_tree, &place).doing(|| "mounting the root filesystem".to_owned())?;
    // Opened again: the descriptor above is of the directory under the mount.
    let inside = ConfinedDir::open(&root).doing(|| format!("opening {}", root.display()))?;

    mount_sys(&inside, &root)?;
    for (name, text) in [
        ("resolv.conf", &launch.resolv_conf),
        ("hosts", &launch.hosts),
    ] {
        let file = files.join(name);
        let target = Path::new("/etc").join(name);
        std::fs::write(&file, text).doing(|| format!("writing {}", file.display()))?;
        let tree = clone_tree(&file).doing(|| format!("opening {}", file.display()))?;
        let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY
            | MountAttrFlags::MOUNT_ATTR_NOSUID
            | MountAttrFlags::MOUNT_ATTR_NODEV
            | MountAttrFlags::MOUNT_ATTR_NOEXEC;
        sys::restrict_mount(tree.as_fd(), attributes)
            .doing(|| format!("making {} read-only", target.display()))?;
        attach_inside(&inside, &tree, &target)?;
    }
    let mut late = Vec::new();
    for (mount, tree) in trees {
        if is_below_dev(&mount.target) {
            late.push((
                place_late(&late_dir, late.len(), &tree)?,
                mount.target.clone(),
            ));
        } else {
            attach_inside(&inside, &tree, &mount.target)?;
        }
    }
    Ok(View {
        root,
        hostname: process.hostname.clone(),
        late,
        masked_files: existing(&MASKED_FILES),
        masked_dirs: existing(&MASKED_DIRS),
        read_only: existing(&READ_ONLY),
    })
}

/// Those that this kernel has.
fn existing(paths: &[&'static str]) -> Vec<&'static str> {
    let exists = |path: &&&str| std::fs::symlink_metadata(path).is_ok();
    paths.iter().filter(exists).copied().collect()
}

fn clone_tree(path: &Path) -> io::Result<OwnedFd> {
    // Recursive, because in a user namespace a mount may not be parted from those that
    // cover parts of it.
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_RECURSIVE;
    Ok(rustix::mount::open_tree(CWD, path, flags)?)
}

/// Makes the mount that is to appear at the target; it is nowhere yet.
fn mount_tree(mount: &Mount) -> Result<OwnedFd, Failure> {
    let safe = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV;
    match &mount.kind {
        MountKind::Bind { source, read_only } => {
            let tree = clone_tree(source).doing(|| {
                let (target, source) = (mount.target.display(), source.display());
                format!("opening {source} for {target}")
            })?;
            let mut attributes = safe;
            attributes.set(MountAttrFlags::MOUNT_ATTR_RDONLY, *read_only);
            sys::restrict_mount(tree.as_fd(), attributes)
                .doing(|| format!("restricting the mount for {}", mount.target.display()))?;
            Ok(tree)
        }
        MountKind::Tmpfs { size_bytes } => {
            let doing = || format!("making a tmpfs for {}", mount.target.display());
            let size = size_bytes.map(|size| size.to_string());
            let options: Vec<(&str, &str)> = std::iter::once(("mode", "1777"))
                .chain(size.as_deref().map(|size| ("size", size)))
                .collect();
            new_mount("tmpfs", &options, safe).doing(doing)
        }
    }
}

fn new_mount(
    kind: &str,
    options: &[(&str, &str)],
    attributes: MountAttrFlags,
) -> io::Result<OwnedFd> {
    let context = rustix::mount::fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC)?;
    for (key, value) in options {
        rustix::mount::fsconfig_set_string(&context, *key, *value)?;
    }
    rustix::mount::fsconfig_create(&context)?;
    Ok(rustix::mount::fsmount(
        &context,
        FsMountFlags::FSMOUNT_CLOEXEC,
        attributes,
    )?)
}

/// An empty directory that stays so.
fn empty_dir() -> io::Result<OwnedFd> {
    let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY
        | MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    new_mount("tmpfs", &[("mode", "0555")], attributes)
}

fn attach(tree: &OwnedFd, place: &OwnedFd) -> io::Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    Ok(rustix::mount::move_mount(tree, "", place, "", flags)?)
}

/// Mounts at a path inside, following links inside.
fn attach_inside(inside: &ConfinedDir, tree: &OwnedFd, target: &Path) -> Result<(), Failure> {
    let doing = || format!("mounting {} in the sandbox", target.display());
    let forbidden = target.components().any(|part| part == Component::ParentDir)
        || target.starts_with("/proc")
        || !target.is_absolute()
        || target == Path::new("/");
    if forbidden {
        return Err(Failure::new(doing(), &io::ErrorKind::InvalidInput.into()));
    }
    let place = inside
        .open_at(target, OFlags::PATH, Mode::empty())
        .doing(doing)?;
    attach(tree, &place).doing(doing)
}

/// Mounts in a directory from which the runtime mounts it again, below its `/dev`.
fn place_late(dir: &Path, number: usize, tree: &OwnedFd) -> Result<PathBuf, Failure> {
    let path = dir.join(number.to_string());
    let doing = || format!("mounting {}", path.display());
    let kind = rustix::fs::fstat(tree).doing(doing)?.st_mode;
    if FileType::from_raw_mode(kind) == FileType::Directory {
        std::fs::create_dir(&path).doing(doing)?;
    } else {
        std::fs::File::create(&path).doing(doing)?;
    }
    let place = rustix::fs::open(&path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty());
    attach(tree, &place.doing(doing)?).doing(doing)?;
    Ok(path)
}

/// Mounts `/sys`, read-only: one that shows the step's own network, else the host's.
fn mount_sys(inside: &ConfinedDir, root: &Path) -> Result<(), Failure> {
    let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY
        | MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    match new_mount("sysfs", &[], attributes) {
        Ok(tree) => attach_inside(inside, &tree, Path::new("/sys"))?,
        // With the host's network a user namespace may not: then a copy of the host's,
        // with all that is mounted in it covered.
        Err(_) => {
            let tree = clone_tree(Path::new("/sys")).doing(|| "opening /sys".to_owned())?;
            sys::restrict_mount(tree.as_fd(), attributes)
                .doing(|| "making /sys read-only".to_owned())?;
            attach_inside(inside, &tree, Path::new("/sys"))?;
            let text = std::fs::read_to_string("/proc/self/mountinfo")
                .doing(|| "reading /proc/self/mountinfo".to_owned())?;
            let sys = root.join("sys");
            for point in userns::mount_points_of(&text) {
                let point = PathBuf::from(unescape(&point));
                let Ok(below) = point.strip_prefix(&sys) else {
                    continue;
                };
                if !below.as_os_str().is_empty() {
                    cover(inside, &Path::new("/sys").join(below))?;
                }
            }
        }
    }
    for path in MASKED_SYS {
        cover(inside, Path::new(path))?;
    }
    Ok(())
}

/// Mounts an empty directory over one, if it is there.
fn cover(inside: &ConfinedDir, path: &Path) -> Result<(), Failure> {
    let doing = || format!("hiding {}", path.display());
    let flags = OFlags::PATH | OFlags::DIRECTORY;
    match inside.open_at(path, flags, Mode::empty()) {
        Ok(place) => attach(&empty_dir().doing(doing)?, &place).doing(doing),
        Err(_) => Ok(()),
    }
}

/// Lets go of the root filesystems of other steps: as long as they were mounted here, too,
/// their layers would be in use. What `base` lies in stays.
fn detach_newer(mountinfo: &str, old: &[String], base: &Path) {
    for point in userns::mount_points_of(mountinfo).iter().rev() {
        let path = PathBuf::from(unescape(point));
        if !old.contains(point) && !base.starts_with(&path) {
            // A mount that cannot be let go of is as before.
            let _ = rustix::mount::unmount(&path, UnmountFlags::DETACH);
        }
    }
}

/// Undoes the octal escapes of `mountinfo`: space, tab, newline and backslash.
fn unescape(text: &str) -> OsString {
    use std::os::unix::ffi::OsStringExt;
    let mut bytes = text.bytes().collect::<std::collections::VecDeque<u8>>();
    let mut out = Vec::with_capacity(bytes.len());
    while let Some(byte) = bytes.pop_front() {
        let digit = |index: usize| match bytes.get(index) {
            Some(digit @ b'0'..=b'7') => Some(u32::from(digit - b'0')),
            _ => None,
        };
        match (byte, digit(0), digit(1), digit(2)) {
            (b'\\', Some(high), Some(middle), Some(low)) => {
                out.push((high * 64 + middle * 8 + low) as u8);
                bytes.drain(..3);
            }
            _ => out.push(byte),
        }
    }
    OsString::from_vec(out)
}

/// Shows runc and crun a read-only cgroup hierarchy of version 2: they must not make
/// groups that nobody removes after a `SIGKILL`, and crun refuses version 1.
fn hide_cgroups() -> Result<(), Failure> {
    let doing = || "mounting a read-only /sys/fs/cgroup for the runtime".to_owned();
    const CGROUP2_MAGIC: i64 = 0x6367_7270;
    let is_cgroup2 = |path: &Path| {
        rustix::fs::statfs(path).is_ok_and(|stat| i64::from(stat.f_type) == CGROUP2_MAGIC)
    };
    let candidates = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"].map(Path::new);
    let tree = match candidates.into_iter().find(|path| is_cgroup2(path)) {
        Some(path) => clone_tree(path),
        None => new_mount("cgroup2", &[], MountAttrFlags::empty()),
    }
    .doing(doing)?;
    sys::restrict_mount(tree.as_fd(), MountAttrFlags::MOUNT_ATTR_RDONLY).doing(doing)?;
    let place = rustix::fs::open(
        "/sys/fs/cgroup",
        OFlags::PATH | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .doing(doing)?;
    attach(&tree, &place).doing(doing)
}

fn become_runtime(
    launch: &Launch,
    view: &View,
    inherited: Inherited,
) -> Result<std::convert::Infallible, Failure> {
    let base = &launch.process.rootfs;
    let program = &launch.runtime.program;
    let mut command = Command::new(program);
    match launch.runtime.kind {
        RuntimeKind::Bwrap => {
            command.args(bwrap::args(view, &init_args()));
        }
        kind => {
            let late = view.late.iter().map(|(_, target)| target);
            if let Some(path) = late.chain([base]).find(|path| path.to_str().is_none()) {
                return Err(Failure {
                    doing: format!("describing {} to {}", path.display(), kind.name()),
                    reason: "it is not UTF-8".to_owned(),
                    errno: None,
                    is_network: false,
                });
            }
            let bundle = base.join("bundle");
            let config = runc::spec(view, &init_args()).to_string();
            let doing = || format!("writing {}", bundle.join("config.json").display());
            std::fs::create_dir(&bundle).doing(doing)?;
            std::fs::write(bundle.join("config.json"), config).doing(doing)?;
            let fds = INIT_FDS.count();
            command.args(runc::args(kind, &base.join("state"), &bundle, fds));
        }
    }
    let doing = || "handing file descriptors to the runtime".to_owned();
    let stdio = |fd: &OwnedFd| rustix::io::fcntl_dupfd_cloexec(fd, OUT_OF_THE_WAY).map(Stdio::from);
    command
        .env_clear()
        .env(
            "PATH",
            "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        )
        .env("LC_ALL", "C")
        // runc and crun want a place for state even when told where to put it.
        .env("XDG_RUNTIME_DIR", base)
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(stdio(&inherited.log).doing(doing)?)
        .stderr(stdio(&inherited.log).doing(doing)?);
    let passed = hand_over(inherited).doing(doing)?;
    let error = command.exec();
    drop(passed);
    Err(Failure::new(
        format!("running {}", program.display()),
        &error,
    ))
}

/// A number far above those of the file descriptors of this process.
const OUT_OF_THE_WAY: i32 = 64;

/// Gives the file descriptors of the innermost stage the numbers [`INIT_FDS`], which stay
/// open when a program is executed, and closes all others above 2.
fn hand_over(inherited: Inherited) -> io::Result<Vec<OwnedFd>> {
    let aside = |fd: BorrowedFd<'_>| rustix::io::fcntl_dupfd_cloexec(fd, OUT_OF_THE_WAY);
    let fds = [
        aside(inherited.exe.as_fd())?,
        aside(inherited.launch.as_fd())?,
        aside(rustix::stdio::stdin())?,
        aside(rustix::stdio::stdout())?,
        aside(rustix::stdio::stderr())?,
    ];
    drop(inherited);
    let mut passed = Vec::new();
    for (fd, number) in fds.iter().zip(INIT_FDS) {
        let duplicate = rustix::io::fcntl_dupfd_cloexec(fd, number)?;
        if duplicate.as_raw_fd() != number {
            return Err(io::Error::other(format!(
                "number {number} is in use by something else"
            )));
        }
        rustix::io::fcntl_setfd(&duplicate, FdFlags::empty())?;
        passed.push(duplicate);
    }
    Ok(passed)
}

/// The command line of the innermost stage.
fn init_args() -> Vec<OsString> {
    let exe = format!("/proc/self/fd/{}", INIT_FDS.start());
    [exe, "__init".to_owned()]
        .into_iter()
        .chain(INIT_FDS.map(|fd| fd.to_string()))
        .map(OsString::from)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escapes_are_undone() {
        let check = |text: &str, expected: &str| assert_eq!(unescape(text), expected, "{text}");
        check("/plain", "/plain");
        check("/a\\040b\\134c", "/a b\\c");
        check("/short\\04", "/short\\04");
        check("\\", "\\");
    }

    #[test]
    fn parents_are_mounted_first() {
        let tmpfs = |target: &str| Mount {
            target: target.into(),
            kind: MountKind::Tmpfs { size_bytes: None },
        };
        let mounts = [tmpfs("/a/b"), tmpfs("/c"), tmpfs("/a")];
        let order: Vec<&Path> = in_mount_order(&mounts)
            .iter()
            .map(|mount| mount.target.as_path())
            .collect();
        assert_eq!(order, ["/c", "/a", "/a/b"].map(Path::new));
    }
}
