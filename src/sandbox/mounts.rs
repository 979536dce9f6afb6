//! Everything that a step sees, mounted in the namespace of `__enter`.
//!
//! On a tmpfs over the path of the root filesystem:
//!
//! ```text
//! root/        the root filesystem, with /dev, /sys, resolv.conf, hosts and the step's mounts
//! dev/         what is mounted at /dev
//! files/       resolv.conf and hosts
//! bundle/      config.json of runc and crun
//! state/       their state
//! ```
//!
//! Sources are opened once, before anything of the step runs, and mounted through the file
//! descriptor; targets are resolved by the kernel inside the root filesystem. So no link in
//! an image leads a mount out of it. See `open_tree(2)`, `move_mount(2)`, `openat2(2)`.
//!
//! No device works but those of `/dev`: a step of real root has `CAP_MKNOD`, as in Docker,
//! but no device cgroup guards the host's disks here, so everything is mounted `nodev`.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use rustix::fs::{CWD, FileType, Mode, OFlags};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MoveMountFlags, OpenTreeFlags,
    UnmountFlags,
};

use super::wire::{Doing, Failure, Launch, RuntimeKind};
use super::{Mount, MountKind, sys, userns};
use crate::confined::ConfinedDir;

/// What the runtime needs to know.
#[derive(Debug)]
pub(super) struct View {
    /// The root filesystem with everything mounted but `/proc` and `/dev/mqueue`.
    pub(super) root: PathBuf,
    /// Host name inside.
    pub(super) hostname: String,
    /// The directory that is to be `/dev`; it is mounted in `root` already.
    pub(super) dev: PathBuf,
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

/// The devices of `/dev`: name, major and minor number.
const DEVICES: [(&str, u32, u32); 6] = [
    ("null", 1, 3),
    ("zero", 1, 5),
    ("full", 1, 7),
    ("random", 1, 8),
    ("urandom", 1, 9),
    ("tty", 5, 0),
];
/// The links of `/dev`.
const DEV_LINKS: [(&str, &str); 5] = [
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
    ("ptmx", "pts/ptmx"),
];
/// The size of `/dev/shm`, as Docker has it.
const SHM_SIZE: &str = "65536k";

const NO_DEVICES: MountAttrFlags = MountAttrFlags::MOUNT_ATTR_NODEV;
const SAFE: MountAttrFlags = NO_DEVICES.union(MountAttrFlags::MOUNT_ATTR_NOSUID);
const DATA_ONLY: MountAttrFlags = SAFE.union(MountAttrFlags::MOUNT_ATTR_NOEXEC);
const STATIC: MountAttrFlags = DATA_ONLY.union(MountAttrFlags::MOUNT_ATTR_RDONLY);

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

/// Mounts everything; afterwards this mount namespace is ready for the runtime.
///
/// # Errors
/// Where a source or a target is missing, or the kernel refuses a mount.
pub(super) fn mount_all(launch: &Launch) -> Result<View, Failure> {
    let process = &launch.process;
    let base = &process.rootfs;
    let doing = || format!("opening the root filesystem {}", base.display());
    let root_tree = clone_tree(base).doing(doing)?;
    sys::restrict_mount(root_tree.as_fd(), NO_DEVICES).doing(doing)?;
    let mut trees = Vec::new();
    for mount in in_mount_order(&process.mounts) {
        check_target(&mount.target)?;
        trees.push((mount, mount_tree(mount)?));
    }
    detach_newer(launch)?;
    if matches!(launch.runtime.kind, RuntimeKind::Runc | RuntimeKind::Crun) {
        hide_cgroups()?;
    }

    let flags = MountFlags::NOSUID | MountFlags::NODEV;
    rustix::mount::mount("tmpfs", base, "tmpfs", flags, Some(c"mode=0755"))
        .doing(|| format!("mounting a tmpfs on {}", base.display()))?;
    let dir = |name: &str| -> Result<PathBuf, Failure> {
        let path = base.join(name);
        std::fs::create_dir(&path).doing(|| format!("creating {}", path.display()))?;
        Ok(path)
    };
    let (root, dev, files) = (dir("root")?, dir("dev")?, dir("files")?);
    attach_at(&root_tree, &root).doing(|| "mounting the root filesystem".to_owned())?;
    let inside = ConfinedDir::open(&root).doing(|| format!("opening {}", root.display()))?;

    mount_dev(&dev)?;
    let (below_dev, others): (Vec<_>, Vec<_>) = trees
        .into_iter()
        .partition(|(mount, _)| is_below_dev(&mount.target));
    for (mount, tree) in below_dev {
        attach_below_dev(&dev, &tree, &mount.target)?;
    }
    let dev_tree = clone_tree(&dev).doing(|| "opening the new /dev".to_owned())?;
    attach_inside(&inside, &dev_tree, Path::new("/dev"))?;
    mount_sys(&inside, &root)?;
    for (name, text) in [
        ("resolv.conf", &launch.resolv_conf),
        ("hosts", &launch.hosts),
    ] {
        let file = files.join(name);
        let doing = || format!("making {}", file.display());
        std::fs::write(&file, text).doing(doing)?;
        let tree = clone_tree(&file).doing(doing)?;
        sys::restrict_mount(tree.as_fd(), STATIC).doing(doing)?;
        attach_inside(&inside, &tree, &Path::new("/etc").join(name))?;
    }
    for (mount, tree) in others {
        attach_inside(&inside, &tree, &mount.target)?;
    }
    Ok(View {
        root,
        dev,
        hostname: process.hostname.clone(),
        masked_files: existing(&MASKED_FILES),
        masked_dirs: existing(&MASKED_DIRS),
        read_only: existing(&READ_ONLY),
    })
}

fn mount_info() -> Result<String, Failure> {
    std::fs::read_to_string("/proc/self/mountinfo")
        .doing(|| "reading /proc/self/mountinfo".to_owned())
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
    let target = &mount.target;
    let (tree, doing) = match &mount.kind {
        MountKind::Bind { source, read_only } => {
            let mut attributes = SAFE;
            attributes.set(MountAttrFlags::MOUNT_ATTR_RDONLY, *read_only);
            let tree = clone_tree(source).and_then(|tree| {
                sys::restrict_mount(tree.as_fd(), attributes)?;
                Ok(tree)
            });
            (tree, format!("opening {}", source.display()))
        }
        MountKind::Tmpfs { size_bytes } => {
            let size = size_bytes.map(|size| size.to_string());
            let options: Vec<(&str, &str)> = std::iter::once(("mode", "1777"))
                .chain(size.as_deref().map(|size| ("size", size)))
                .collect();
            (
                new_mount("tmpfs", &options, SAFE),
                "making a tmpfs".to_owned(),
            )
        }
    };
    tree.map_err(|error| Failure::new(doing, &error).of_mount(target))
}

fn new_mount(
    kind: &str,
    options: &[(&str, &str)],
    attributes: MountAttrFlags,
) -> io::Result<OwnedFd> {
    let context = rustix::mount::fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC)?;
    for (key, value) in options {
        // An empty value stands for an option that has none.
        if value.is_empty() {
            rustix::mount::fsconfig_set_flag(&context, *key)?;
        } else {
            rustix::mount::fsconfig_set_string(&context, *key, *value)?;
        }
    }
    rustix::mount::fsconfig_create(&context)?;
    let flags = FsMountFlags::FSMOUNT_CLOEXEC;
    Ok(rustix::mount::fsmount(&context, flags, attributes)?)
}

fn attach(tree: &OwnedFd, place: &OwnedFd) -> io::Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    Ok(rustix::mount::move_mount(tree, "", place, "", flags)?)
}

/// Mounts at a path that this program made.
fn attach_at(tree: &OwnedFd, path: &Path) -> io::Result<()> {
    let flags = OFlags::PATH | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    attach(tree, &rustix::fs::open(path, flags, Mode::empty())?)
}

/// Refuses targets that would cover what the sandbox itself mounts, or mean nothing.
fn check_target(target: &Path) -> Result<(), Failure> {
    let forbidden = !target.is_absolute()
        || target.components().any(|part| part == Component::ParentDir)
        || target.starts_with("/proc")
        || ["/", "/dev", "/sys"].map(Path::new).contains(&target);
    match forbidden {
        true => {
            let error = io::Error::from(rustix::io::Errno::INVAL);
            Err(Failure::new("nothing can be mounted there", &error).of_mount(target))
        }
        false => Ok(()),
    }
}

/// Mounts at a path inside, following links inside.
fn attach_inside(inside: &ConfinedDir, tree: &OwnedFd, target: &Path) -> Result<(), Failure> {
    inside
        .open_at(target, OFlags::PATH, Mode::empty())
        .and_then(|place| attach(tree, &place))
        .map_err(|error| Failure::new("attaching it", &error).of_mount(target))
}

/// Makes the new `/dev` at `dev`.
///
/// Only the host's devices themselves are shown, each by a mount of its own: in a user
/// namespace none can be made.
fn mount_dev(dev: &Path) -> Result<(), Failure> {
    let doing = |name: &str| {
        let name = name.to_owned();
        move || format!("making /dev/{name}")
    };
    let tree = new_mount("tmpfs", &[("mode", "755"), ("size", "65536k")], SAFE)
        .doing(|| "making /dev".to_owned())?;
    attach_at(&tree, dev).doing(|| "making /dev".to_owned())?;
    for (name, major, minor) in DEVICES {
        let source = Path::new("/dev").join(name);
        let tree = clone_tree(&source).doing(doing(name))?;
        // What is mounted is checked, not what had the name a moment ago.
        let found = rustix::fs::fstat(&tree).doing(doing(name))?;
        if FileType::from_raw_mode(found.st_mode) != FileType::CharacterDevice
            || found.st_rdev != rustix::fs::makedev(major, minor)
        {
            let error = io::Error::from(rustix::io::Errno::NODEV);
            return Err(Failure::new(
                format!("{} is not device {major}:{minor}", source.display()),
                &error,
            ));
        }
        let place = dev.join(name);
        std::fs::File::create(&place).doing(doing(name))?;
        attach_at(&tree, &place).doing(doing(name))?;
    }
    for (name, target) in DEV_LINKS {
        std::os::unix::fs::symlink(target, dev.join(name)).doing(doing(name))?;
    }
    // Not `nodev`: terminals are devices.
    let terminals = MountAttrFlags::MOUNT_ATTR_NOSUID.union(MountAttrFlags::MOUNT_ATTR_NOEXEC);
    let options = [
        ("newinstance", ""),
        ("ptmxmode", "0666"),
        ("mode", "0620"),
        ("gid", "5"),
    ];
    // Group 5 is `tty` everywhere, but does not exist in every user namespace.
    let pts = new_mount("devpts", &options, terminals)
        .or_else(|_| new_mount("devpts", &options[..3], terminals))
        .doing(doing("pts"))?;
    let shm = new_mount("tmpfs", &[("mode", "1777"), ("size", SHM_SIZE)], DATA_ONLY)
        .doing(doing("shm"))?;
    for (name, tree) in [("pts", Some(pts)), ("shm", Some(shm)), ("mqueue", None)] {
        let place = dev.join(name);
        std::fs::create_dir(&place).doing(doing(name))?;
        if let Some(tree) = tree {
            attach_at(&tree, &place).doing(doing(name))?;
        }
    }
    Ok(())
}

/// Mounts below the new `/dev`, where only this program has made anything.
fn attach_below_dev(dev: &Path, tree: &OwnedFd, target: &Path) -> Result<(), Failure> {
    let attach = || -> io::Result<()> {
        let below = target.strip_prefix("/dev").map_err(io::Error::other)?;
        let place = dev.join(below);
        if std::fs::symlink_metadata(&place).is_err() {
            let mode = rustix::fs::fstat(tree)?.st_mode;
            if FileType::from_raw_mode(mode) == FileType::Directory {
                std::fs::create_dir_all(&place)?;
            } else {
                std::fs::create_dir_all(place.parent().unwrap_or(dev))?;
                std::fs::File::create(&place)?;
            }
        }
        attach_at(tree, &place)
    };
    attach().map_err(|error| Failure::new("attaching it", &error).of_mount(target))
}

/// Mounts `/sys`, read-only: one that shows the step's own network, else the host's.
fn mount_sys(inside: &ConfinedDir, root: &Path) -> Result<(), Failure> {
    let sys = Path::new("/sys");
    match new_mount("sysfs", &[], STATIC) {
        Ok(tree) => attach_inside(inside, &tree, sys)?,
        // With the host's network a user namespace may not: then a copy of the host's,
        // with all that is mounted in it covered.
        Err(_) => {
            let tree = clone_tree(sys).doing(|| "opening /sys".to_owned())?;
            sys::restrict_mount(tree.as_fd(), STATIC)
                .doing(|| "making /sys read-only".to_owned())?;
            attach_inside(inside, &tree, sys)?;
            let copy = root.join("sys");
            for point in userns::mount_points_of(&mount_info()?) {
                let point = PathBuf::from(unescape(&point));
                if let Ok(below) = point.strip_prefix(&copy)
                    && !below.as_os_str().is_empty()
                {
                    cover(inside, &sys.join(below))?;
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
        Ok(place) => new_mount("tmpfs", &[("mode", "0555")], STATIC)
            .and_then(|tree| attach(&tree, &place))
            .doing(doing),
        Err(_) => Ok(()),
    }
}

/// Lets go of the root filesystems of other steps, which this mount namespace has copies
/// of: as long as it had, their layers would be in use. What the root filesystem of this
/// step lies in stays, and so does it.
///
/// # Errors
/// Where the list of mounts cannot be read.
pub(super) fn detach_newer(launch: &Launch) -> Result<(), Failure> {
    let Some(old) = &launch.old_mounts else {
        return Ok(());
    };
    for point in userns::mount_points_of(&mount_info()?).iter().rev() {
        let path = PathBuf::from(unescape(point));
        if !old.contains(point) && !launch.process.rootfs.starts_with(&path) {
            // A mount that cannot be let go of is as before.
            let _ = rustix::mount::unmount(&path, UnmountFlags::DETACH);
        }
    }
    Ok(())
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
    const CGROUP2_MAGIC: rustix::fs::FsWord = 0x6367_7270;
    let is_cgroup2 =
        |path: &Path| rustix::fs::statfs(path).is_ok_and(|stat| stat.f_type == CGROUP2_MAGIC);
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

#[cfg(test)]
mod tests {
    use super::super::wire::Part;
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

    #[test]
    fn what_the_sandbox_mounts_cannot_be_covered() {
        for target in ["/", "/dev", "/sys", "/proc", "/proc/1", "a", "/a/../proc"] {
            let failure = check_target(Path::new(target)).unwrap_err();
            assert_eq!(failure.part, Part::Mount(target.to_owned()), "{target}");
        }
        for target in ["/a", "/dev/shm", "/device", "/process"] {
            assert_eq!(check_target(Path::new(target)), Ok(()), "{target}");
        }
    }
}
