//! Everything that a step sees, mounted in the namespace of `__enter`.
//!
//! On a tmpfs over the path of the root filesystem:
//!
//! ```text
//! root/        the root filesystem, with /dev, /sys, resolv.conf, hosts and the step's mounts
//! dev/         what is mounted at /dev
//! files/       resolv.conf, hosts and the files that are mounted from memory
//! bundle/      config.json of runc and crun
//! state/       their state
//! ```
//!
//! Sources are opened once, before anything of the step runs, and mounted through the file
//! descriptor; targets are resolved by the kernel inside the root filesystem. So no link in
//! an image leads a mount out of it. See `open_tree(2)`, `move_mount(2)`, `openat2(2)`.
//! What is missing of a target is made only where it lies in another mount of the step,
//! never in the root filesystem.
//!
//! No device works but those of `/dev` and those asked for: a step of real root has
//! `CAP_MKNOD`, as in Docker, but no device cgroup guards the host's disks here, so
//! everything is mounted `nodev`. Only an insecure step of real root may use what it makes.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, StatVfsMountFlags, StatxFlags};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MoveMountFlags, OpenTreeFlags,
    UnmountFlags,
};

use super::wire::{Doing, Failure, Launch, RuntimeKind};
use super::{Content, Mount, MountSource, Process, Security, init, sys, userns};
use crate::confined::{self, ConfinedDir};

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
    /// The capabilities of the runtime's process, by name.
    pub(super) capabilities: Vec<&'static str>,
}

/// What of `/proc` tells about the host, as Docker and BuildKit have it. The first group
/// are files, the second directories.
pub(super) const MASKED_FILES: [&str; 7] = [
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/interrupts",
];
pub(super) const MASKED_DIRS: [&str; 3] = ["/proc/acpi", "/proc/asound", "/proc/scsi"];
/// What of `/proc` changes the host.
pub(super) const READ_ONLY: [&str; 5] = [
    "/proc/bus",
    "/proc/fs",
    "/proc/irq",
    "/proc/sys",
    "/proc/sysrq-trigger",
];
/// What of `/sys` tells about the host.
pub(super) const MASKED_SYS: [&str; 2] = ["/sys/firmware", "/sys/devices/virtual/powercap"];

/// The devices of `/dev`: name, major and minor number.
pub(super) const DEVICES: [(&str, u32, u32); 6] = [
    ("null", 1, 3),
    ("zero", 1, 5),
    ("full", 1, 7),
    ("random", 1, 8),
    ("urandom", 1, 9),
    ("tty", 5, 0),
];
/// The links of `/dev`.
pub(super) const DEV_LINKS: [(&str, &str); 5] = [
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
    ("ptmx", "pts/ptmx"),
];
/// What an insecure step of real root finds in `/dev` besides, as in BuildKit.
const INSECURE_DEVICES: [(&str, u32, u32); 6] = [
    ("kmsg", 1, 11),
    ("cuse", 10, 203),
    ("fuse", 10, 229),
    ("kvm", 10, 232),
    ("net/tun", 10, 200),
    ("loop-control", 10, 237),
];
/// The major number of loop devices, and how many it finds beyond those in use.
const LOOP_MAJOR: u32 = 7;
const FREE_LOOPS: u32 = 8;
/// The size of `/dev/shm` in bytes, as Docker has it.
const SHM_SIZE: u64 = 64 * 1024 * 1024;

const NO_DEVICES: MountAttrFlags = MountAttrFlags::MOUNT_ATTR_NODEV;
const SAFE: MountAttrFlags = NO_DEVICES.union(MountAttrFlags::MOUNT_ATTR_NOSUID);
const DATA_ONLY: MountAttrFlags = SAFE.union(MountAttrFlags::MOUNT_ATTR_NOEXEC);
const STATIC: MountAttrFlags = DATA_ONLY.union(MountAttrFlags::MOUNT_ATTR_RDONLY);

/// Modes of mount points.
const DIR_MODE: Mode = Mode::from_raw_mode(0o755);
const FILE_MODE: Mode = Mode::from_raw_mode(0o644);

/// The step's mounts, parents before what lies below them.
pub(super) fn in_mount_order(mounts: &[Mount]) -> Vec<&Mount> {
    let mut mounts: Vec<&Mount> = mounts.iter().collect();
    mounts.sort_by_key(|mount| mount.target.components().count());
    mounts
}

/// Whether a target lies in what is mounted over the root filesystem: the fresh `/dev` and
/// `/sys`, or one of `mounts`.
pub(super) fn is_covered(target: &Path, mounts: &[Mount]) -> bool {
    let others = mounts
        .iter()
        .map(|mount| mount.target.as_path())
        .filter(|other| *other != target);
    ["/dev", "/sys"]
        .map(Path::new)
        .into_iter()
        .chain(others)
        .any(|other| target.starts_with(other))
}

/// Whether devices that this step makes may work.
fn allows_devices(process: &Process) -> bool {
    process.security == Security::Insecure && userns::is_initial()
}

/// Something of the step that is to be mounted.
#[derive(Debug)]
struct Wanted<'p> {
    target: &'p Path,
    what: What<'p>,
}

#[derive(Debug)]
enum What<'p> {
    /// A mount that is nowhere yet.
    Tree(OwnedFd),
    Tmpfs {
        size_bytes: Option<u64>,
        mode: Option<u32>,
        read_only: bool,
    },
    File {
        content: &'p Content,
        uid: u32,
        gid: u32,
        mode: u32,
        read_only: bool,
    },
}

/// Mounts everything; afterwards this mount namespace is ready for the runtime.
///
/// # Errors
/// Where a source or a target is missing, or the kernel refuses a mount.
pub(super) fn mount_all(launch: &Launch) -> Result<View, Failure> {
    let process = &launch.process;
    let base = &process.rootfs;
    let insecure = process.security == Security::Insecure;
    let doing = || format!("opening the root filesystem {}", base.display());
    let root_tree = clone_tree(base).doing(doing)?;
    if !allows_devices(process) {
        sys::restrict_mount(root_tree.as_fd(), NO_DEVICES).doing(doing)?;
    }
    let wanted = open_all(process)?;
    detach_newer(launch)?;
    if matches!(
        launch.runtime.kind,
        RuntimeKind::Runc | RuntimeKind::Crun | RuntimeKind::Youki
    ) {
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
    let inside = Inside::of(&root)?;

    mount_dev(&dev, process)?;
    let dev_tree = clone_tree(&dev).doing(|| "opening the new /dev".to_owned())?;
    inside.attach(&dev_tree, Path::new("/dev"))?;
    mount_sys(&inside, &root, insecure)?;
    for (name, text) in [
        ("resolv.conf", &launch.resolv_conf),
        ("hosts", &launch.hosts),
    ] {
        let file = files.join(name);
        let doing = || format!("making {}", file.display());
        std::fs::write(&file, text).doing(doing)?;
        let tree = clone_tree(&file).doing(doing)?;
        sys::restrict_mount(tree.as_fd(), STATIC).doing(doing)?;
        inside.attach(&tree, &Path::new("/etc").join(name))?;
    }
    for (number, wanted) in wanted.into_iter().enumerate() {
        let file = files.join(number.to_string());
        mount_wanted(&inside, &wanted, &file).map_err(|failure| failure.of_mount(wanted.target))?;
    }
    // With what the step mounts below it: this is the one that runtimes mount.
    inside
        .open(Path::new("/dev"))
        .and_then(|place| clone_fd(&place))
        .and_then(|tree| attach_at(&tree, &dev))
        .doing(|| "opening the new /dev".to_owned())?;
    inside.make_cwd(&process.cwd)?;
    let of_proc = |paths: &[&'static str]| match insecure {
        true => Vec::new(),
        false => existing(paths),
    };
    Ok(View {
        root,
        dev,
        hostname: process.hostname.clone(),
        masked_files: of_proc(&MASKED_FILES),
        masked_dirs: of_proc(&MASKED_DIRS),
        read_only: of_proc(&READ_ONLY),
        capabilities: init::runtime_capabilities(process.security)?,
    })
}

/// Opens the sources of what the step mounts, parents before what lies below them.
fn open_all(process: &Process) -> Result<Vec<Wanted<'_>>, Failure> {
    let mut all = Vec::new();
    for mount in in_mount_order(&process.mounts) {
        let target = mount.target.as_path();
        check_target(target)?;
        let read_only = mount.read_only;
        let what = match &mount.source {
            MountSource::Bind(source) => {
                let mut attributes = SAFE;
                attributes.set(MountAttrFlags::MOUNT_ATTR_RDONLY, read_only);
                let tree = clone_tree(source).and_then(|tree| {
                    sys::restrict_mount(tree.as_fd(), attributes)?;
                    Ok(tree)
                });
                let doing = || format!("opening {}", source.display());
                What::Tree(
                    tree.doing(doing)
                        .map_err(|failure| failure.of_mount(target))?,
                )
            }
            &MountSource::Tmpfs { size_bytes, mode } => What::Tmpfs {
                size_bytes,
                mode,
                read_only,
            },
            MountSource::File {
                content,
                uid,
                gid,
                mode,
            } => What::File {
                content,
                uid: *uid,
                gid: *gid,
                mode: *mode,
                read_only,
            },
        };
        all.push(Wanted { target, what });
    }
    for device in &process.devices {
        let target = device.path.as_path();
        check_target(target)?;
        let tree = open_device(&device.host_path).map_err(|failure| failure.of_mount(target))?;
        let what = What::Tree(tree);
        all.push(Wanted { target, what });
    }
    // Stable: of two with the same target the later one is seen.
    all.sort_by_key(|wanted| wanted.target.components().count());
    Ok(all)
}

/// Makes the mount of a device.
fn open_device(source: &Path) -> Result<OwnedFd, Failure> {
    let doing = || format!("opening the device {}", source.display());
    let tree = clone_tree(source).doing(doing)?;
    let found = FileType::from_raw_mode(rustix::fs::fstat(&tree).doing(doing)?.st_mode);
    let reason = if !matches!(found, FileType::CharacterDevice | FileType::BlockDevice) {
        "it is no device"
    } else if rustix::fs::fstatvfs(&tree)
        .doing(doing)?
        .f_flag
        .contains(StatVfsMountFlags::NODEV)
    {
        "the filesystem that it is in is mounted with `nodev`"
    } else {
        let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NOEXEC;
        sys::restrict_mount(tree.as_fd(), attributes).doing(doing)?;
        return Ok(tree);
    };
    Err(Failure {
        reason: reason.to_owned(),
        ..Failure::new(doing(), &rustix::io::Errno::NODEV.into())
    })
}

/// Mounts one thing of the step; a file from memory is made at `file`.
fn mount_wanted(inside: &Inside, wanted: &Wanted<'_>, file: &Path) -> Result<(), Failure> {
    let made;
    let (tree, place) = match &wanted.what {
        What::Tree(tree) => {
            let mode = rustix::fs::fstat(tree).doing(|| "looking at its source".to_owned())?;
            let is_dir = FileType::from_raw_mode(mode.st_mode) == FileType::Directory;
            (tree, inside.place(wanted.target, is_dir)?)
        }
        What::Tmpfs {
            size_bytes,
            mode,
            read_only,
        } => {
            let doing = || "making a tmpfs".to_owned();
            let place = inside.place(wanted.target, true)?;
            let covered = rustix::fs::fstat(&place).doing(doing)?.st_mode;
            let mode = format!("{:o}", mode.unwrap_or(covered) & 0o7777);
            let size = size_bytes.map(|size| size.to_string());
            let options: Vec<(&str, &str)> = std::iter::once(("mode", mode.as_str()))
                .chain(size.as_deref().map(|size| ("size", size)))
                .collect();
            let mut attributes = SAFE;
            attributes.set(MountAttrFlags::MOUNT_ATTR_RDONLY, *read_only);
            made = new_mount("tmpfs", &options, attributes).doing(doing)?;
            (&made, place)
        }
        What::File {
            content,
            uid,
            gid,
            mode,
            read_only,
        } => {
            write_file(file, content, *uid, *gid, *mode)?;
            let mut attributes = SAFE;
            attributes.set(MountAttrFlags::MOUNT_ATTR_RDONLY, *read_only);
            attributes.set(MountAttrFlags::MOUNT_ATTR_NOEXEC, mode & 0o111 == 0);
            let doing = || "opening the file".to_owned();
            made = clone_tree(file).doing(doing)?;
            sys::restrict_mount(made.as_fd(), attributes).doing(doing)?;
            (&made, inside.place(wanted.target, false)?)
        }
    };
    attach(tree, &place).doing(|| "attaching it".to_owned())
}

/// Makes a file of the step in memory.
fn write_file(
    path: &Path,
    content: &Content,
    uid: u32,
    gid: u32,
    mode: u32,
) -> Result<(), Failure> {
    std::fs::write(path, &content.0).doing(|| "writing the file to memory".to_owned())?;
    std::os::unix::fs::chown(path, Some(uid), Some(gid)).map_err(|error| {
        let mut failure = Failure::new(format!("giving the file to {uid}:{gid}"), &error);
        if error.raw_os_error() == Some(libc::EINVAL) {
            failure.reason = "not all of these exist in this user namespace; more subordinate IDs \
                              (/etc/subuid, /etc/subgid) are needed"
                .to_owned();
        }
        failure
    })?;
    // After the owner, whose change takes away bits.
    let mode = std::os::unix::fs::PermissionsExt::from_mode(mode & 0o777);
    std::fs::set_permissions(path, mode).doing(|| "setting the file's mode".to_owned())
}

/// The root filesystem with what is mounted in it.
#[derive(Debug)]
struct Inside {
    dir: ConfinedDir,
    /// Where the kernel says it is.
    path: PathBuf,
    /// The number of its mount.
    mount: u64,
}

impl Inside {
    fn of(root: &Path) -> Result<Self, Failure> {
        let doing = || format!("opening {}", root.display());
        let dir = ConfinedDir::open(root).doing(doing)?;
        Ok(Self {
            path: path_of(&dir).doing(doing)?,
            mount: mount_of(&dir).doing(doing)?,
            dir,
        })
    }

    /// Opens a path inside as a place, following links inside.
    fn open(&self, path: &Path) -> io::Result<OwnedFd> {
        self.dir.open_at(path, OFlags::PATH, Mode::empty())
    }

    /// Mounts at a path that is there.
    fn attach(&self, tree: &OwnedFd, target: &Path) -> Result<(), Failure> {
        self.open(target)
            .and_then(|place| attach(tree, &place))
            .map_err(|error| Failure::new("attaching it", &error).of_mount(target))
    }

    /// Opens the place that a target of the step leads to. What is missing of it is made
    /// where it lies in another mount.
    fn place(&self, target: &Path, is_dir: bool) -> Result<OwnedFd, Failure> {
        let opened = match self.open(target) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                self.make(target, is_dir)?;
                self.open(target)
            }
            result => result,
        };
        let place = opened.doing(|| "attaching it".to_owned())?;
        // Not as written: a link may lead to where nothing can be mounted.
        let path = path_of(&place).doing(|| "finding out where its target is".to_owned())?;
        match path.strip_prefix(&self.path) {
            Ok(below) => check_target(&Path::new("/").join(below))?,
            Err(_) => return Err(nothing_there()),
        }
        Ok(place)
    }

    /// Makes what is missing of a path, in the step's mounts only.
    fn make(&self, path: &Path, is_dir: bool) -> Result<(), Failure> {
        let doing = || "making its mount point".to_owned();
        let mut made = PathBuf::new();
        let mut names = path.components().peekable();
        while let Some(name) = names.next() {
            made.push(name);
            match self.open(&made) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                other => {
                    other.doing(doing)?;
                    continue;
                }
            }
            let (parent, name) = self.dir.open_parent(&made).doing(doing)?;
            if mount_of(&parent).doing(doing)? == self.mount {
                let error = io::Error::from(rustix::io::Errno::NOENT);
                return Err(Failure::new("attaching it", &error));
            }
            // The modes are not as the umask of whoever runs the build would have them.
            let done = if is_dir || names.peek().is_some() {
                // Steps beside this one may share the mount: not by name.
                confined::make_dir(&parent, name, DIR_MODE)
            } else {
                let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
                rustix::fs::openat(&parent, name, flags, FILE_MODE)
                    .and_then(|file| rustix::fs::fchmod(&file, FILE_MODE))
            };
            match done {
                // Another step that shares the mount was faster.
                Err(rustix::io::Errno::EXIST) => {}
                done => done.doing(doing)?,
            }
        }
        Ok(())
    }

    /// Makes the working directory where a mount covers it.
    fn make_cwd(&self, cwd: &Path) -> Result<(), Failure> {
        match self.open(cwd) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                self.make(cwd, true).map_err(|failure| Failure {
                    doing: format!("making the working directory {}", cwd.display()),
                    ..failure
                })
            }
            // Whatever else is wrong shows when it is entered.
            _ => Ok(()),
        }
    }
}

/// The path of something open, as the kernel has it.
fn path_of(fd: impl AsFd) -> io::Result<PathBuf> {
    std::fs::read_link(format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd()))
}

/// The number of the mount that something open is in.
fn mount_of(fd: impl AsFd) -> io::Result<u64> {
    let stat = rustix::fs::statx(fd, "", AtFlags::EMPTY_PATH, StatxFlags::MNT_ID)?;
    Ok(stat.stx_mnt_id)
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

/// As [`clone_tree`], of what is open.
fn clone_fd(place: &OwnedFd) -> io::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_RECURSIVE
        | OpenTreeFlags::AT_EMPTY_PATH;
    Ok(rustix::mount::open_tree(place, "", flags)?)
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

/// Refuses targets that would cover what the sandbox itself needs, or mean nothing.
pub(super) fn check_target(target: &Path) -> Result<(), Failure> {
    let forbidden = !target.is_absolute()
        || target.components().any(|part| part == Component::ParentDir)
        || target.starts_with("/proc")
        || ["/", "/dev"].map(Path::new).contains(&target);
    match forbidden {
        true => Err(nothing_there().of_mount(target)),
        false => Ok(()),
    }
}

fn nothing_there() -> Failure {
    let error = io::Error::from(rustix::io::Errno::INVAL);
    Failure::new("nothing can be mounted there", &error)
}

/// Makes the new `/dev` at `dev`.
///
/// Only the host's devices themselves are shown, each by a mount of its own: in a user
/// namespace none can be made.
fn mount_dev(dev: &Path, process: &Process) -> Result<(), Failure> {
    let doing = |name: &str| {
        let name = name.to_owned();
        move || format!("making /dev/{name}")
    };
    let attributes = match allows_devices(process) {
        true => MountAttrFlags::MOUNT_ATTR_NOSUID,
        false => SAFE,
    };
    let tree = new_mount("tmpfs", &[("mode", "755"), ("size", "65536k")], attributes)
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
    if allows_devices(process) {
        make_insecure_devices(dev)?;
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
    let shm_size = process.shm_size.unwrap_or(SHM_SIZE).to_string();
    let shm = new_mount("tmpfs", &[("mode", "1777"), ("size", &shm_size)], DATA_ONLY)
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

/// Makes the further devices of an insecure step of real root.
fn make_insecure_devices(dev: &Path) -> Result<(), Failure> {
    let make = |name: &str, kind: FileType, major: u32, minor: u32| {
        let path = dev.join(name);
        let doing = || format!("making /dev/{name}");
        std::fs::create_dir_all(path.parent().unwrap_or(dev)).doing(doing)?;
        let (mode, number) = (
            Mode::from_raw_mode(0o666),
            rustix::fs::makedev(major, minor),
        );
        match rustix::fs::mknodat(CWD, &path, kind, mode, number) {
            // A container that this program runs in may not.
            Err(rustix::io::Errno::PERM) => Ok(()),
            made => made
                .and_then(|()| rustix::fs::chmodat(CWD, &path, mode, AtFlags::empty()))
                .doing(doing),
        }
    };
    for (name, major, minor) in INSECURE_DEVICES {
        make(name, FileType::CharacterDevice, major, minor)?;
    }
    let in_use =
        |number: &u32| Path::new(&format!("/sys/block/loop{number}/loop/backing_file")).exists();
    let first_free = (0..).find(|number| !in_use(number)).unwrap_or(0);
    for number in 0..first_free + FREE_LOOPS {
        make(
            &format!("loop{number}"),
            FileType::BlockDevice,
            LOOP_MAJOR,
            number,
        )?;
    }
    Ok(())
}

/// Mounts `/sys`, read-only unless `insecure`: one that shows the step's own network, else
/// the host's.
fn mount_sys(inside: &Inside, root: &Path, insecure: bool) -> Result<(), Failure> {
    let sys = Path::new("/sys");
    let attributes = if insecure { DATA_ONLY } else { STATIC };
    match new_mount("sysfs", &[], attributes) {
        Ok(tree) => inside.attach(&tree, sys)?,
        // With the host's network a user namespace may not: then a copy of the host's,
        // with all that is mounted in it covered.
        Err(_) => {
            let tree = clone_tree(sys).doing(|| "opening /sys".to_owned())?;
            sys::restrict_mount(tree.as_fd(), attributes)
                .doing(|| "restricting /sys".to_owned())?;
            inside.attach(&tree, sys)?;
            let copy = root.join("sys");
            for point in userns::mount_points_of(&mount_info()?) {
                let point = PathBuf::from(unescape(&point));
                if let Ok(below) = point.strip_prefix(&copy)
                    && !below.as_os_str().is_empty()
                    && !insecure
                {
                    cover(inside, &sys.join(below))?;
                }
            }
        }
    }
    if insecure {
        return mount_cgroups(inside);
    }
    for path in MASKED_SYS {
        cover(inside, Path::new(path))?;
    }
    Ok(())
}

/// Mounts the cgroup hierarchy of version 2, which begins at the group of this process.
fn mount_cgroups(inside: &Inside) -> Result<(), Failure> {
    // Where the kernel has none or does not let this user, there is none, as in a sandbox
    // that is not insecure.
    match (
        inside.open(Path::new("/sys/fs/cgroup")),
        new_mount("cgroup2", &[], DATA_ONLY),
    ) {
        (Ok(place), Ok(tree)) => {
            attach(&tree, &place).doing(|| "mounting /sys/fs/cgroup".to_owned())
        }
        _ => Ok(()),
    }
}

/// Mounts an empty directory over one, if it is there.
fn cover(inside: &Inside, path: &Path) -> Result<(), Failure> {
    let doing = || format!("hiding {}", path.display());
    let flags = OFlags::PATH | OFlags::DIRECTORY;
    match inside.dir.open_at(path, flags, Mode::empty()) {
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
pub(super) fn unescape(text: &str) -> OsString {
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
            source: MountSource::Tmpfs {
                size_bytes: None,
                mode: None,
            },
            read_only: false,
        };
        let mounts = [tmpfs("/a/b"), tmpfs("/c"), tmpfs("/a")];
        let order: Vec<&Path> = in_mount_order(&mounts)
            .iter()
            .map(|mount| mount.target.as_path())
            .collect();
        assert_eq!(order, ["/c", "/a", "/a/b"].map(Path::new));
    }

    #[test]
    fn security_s11_what_the_sandbox_mounts_cannot_be_covered() {
        for target in ["/", "/dev", "/proc", "/proc/1", "a", "/a/../proc"] {
            let failure = check_target(Path::new(target)).unwrap_err();
            assert_eq!(failure.part, Part::Mount(target.to_owned()), "{target}");
        }
        for target in ["/a", "/dev/shm", "/sys", "/device", "/process"] {
            assert_eq!(check_target(Path::new(target)), Ok(()), "{target}");
        }
    }
}
