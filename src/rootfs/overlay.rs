//! [`Overlay`]: a stack mounted by the kernel's overlay filesystem, with a new directory on top.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Gid, Mode, OFlags, Timespec, Timestamps, Uid};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MoveMountFlags, UnmountFlags,
};

use super::RootfsError;
use super::stack::{ROOT_MODE, Stack};
use crate::confined::{self, ConfinedDir};

/// Lower layers that one overlay mount can have (`OVL_MAX_STACK`).
const KERNEL_LIMIT: usize = 500;

/// Bytes of options that `mount(2)` takes: one page with its final NUL.
const OPTIONS_LIMIT_BYTES: usize = 4095;

/// A writable root filesystem: a stack of trees with a new, empty directory on top that
/// takes all changes.
///
/// Dropping it unmounts it and leaves its directory to whoever made that.
#[derive(Debug)]
pub(super) struct Overlay {
    scratch: PathBuf,
    merged: PathBuf,
    /// The mounted root; none once it is unmounted.
    root: Option<ConfinedDir>,
}

/// What was written into a [`super::Rootfs`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Changed {
    /// A directory that is a tree, to be opened or renamed; on the file system of `scratch`.
    pub upper: PathBuf,
}

/// How the kernel is asked for the mount.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Method {
    /// `fsconfig(2)` with one `lowerdir+` for each layer; Linux 6.5.
    Config,
    /// `mount(2)` with everything in one page.
    Mount,
}

impl Overlay {
    /// Mounts `stack` below a new upper directory.
    ///
    /// `scratch` is an existing, empty directory; `upper`, `work`, `merged` and `none` are
    /// made in it; the root is given to its owner where it `gives_away`. The calling process must be in a mount namespace of its own, from which
    /// no mount propagates, and be allowed to mount there.
    ///
    /// Contents are not synced when it is unmounted; a store that has to survive a crash
    /// syncs what it gives a name to.
    ///
    /// # Errors
    /// [`RootfsError::TooManyLayers`] beyond 500, or on Linux before 6.5 beyond about 200;
    /// [`RootfsError::Mount`] where the kernel refuses; [`RootfsError::Io`].
    pub(super) fn mount(
        stack: &Stack,
        scratch: &Path,
        gives_away: bool,
    ) -> Result<Self, RootfsError> {
        let first = match Self::mount_by(stack, scratch, gives_away, Method::Config) {
            Err(first) => first,
            mounted => return mounted,
        };
        let RootfsError::Mount {
            source, messages, ..
        } = &first
        else {
            return Err(first);
        };
        // ENOSYS: no fsopen; EINVAL: perhaps no `lowerdir+`. Both come with a kernel's age,
        // but the second has many other reasons.
        let is_age = matches!(
            Errno::from_io_error(source),
            Some(Errno::NOSYS | Errno::INVAL)
        );
        if !is_age {
            return Err(first);
        }
        match Self::mount_by(stack, scratch, gives_away, Method::Mount) {
            Err(_) if !messages.is_empty() => Err(first),
            second => second,
        }
    }

    fn mount_by(
        stack: &Stack,
        scratch: &Path,
        gives_away: bool,
        method: Method,
    ) -> Result<Self, RootfsError> {
        let root = stack
            .root()
            .map_err(RootfsError::io("reading the layers below", scratch))?;
        let [upper, work, merged, none] =
            ["upper", "work", "merged", "none"].map(|name| scratch.join(name));
        for dir in [&upper, &work, &merged, &none] {
            match fs::create_dir(dir) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
                other => other,
            }
            .map_err(RootfsError::io("creating", dir))?;
        }
        let open = |path: &Path| ConfinedDir::open(path).map_err(RootfsError::io("opening", path));
        let (upper_dir, work_dir) = (open(&upper)?, open(&work)?);
        dress_root(&upper, root.attributes(), gives_away)
            .map_err(RootfsError::io("preparing", &upper))?;

        let none_dir = open(&none)?;
        let mut seen = std::collections::HashSet::new();
        // Where one layer occurs twice, its upper occurrence has all that the lower one has,
        // and the kernel refuses to take a directory twice.
        let mut lowers: Vec<BorrowedFd<'_>> = Vec::new();
        for &index in root.trees() {
            let tree = stack.trees()[index].root().as_fd();
            let stat = rustix::fs::fstat(tree)
                .map_err(RootfsError::io("reading", stack.trees()[index].path()))?;
            if seen.insert((stat.st_dev, stat.st_ino)) {
                lowers.push(tree);
            }
        }
        if lowers.is_empty() {
            lowers.push(none_dir.as_fd());
        }
        let parts = Parts {
            lowers: &lowers,
            upper: upper_dir.as_fd(),
            work: work_dir.as_fd(),
        };
        parts.check(method)?;
        let outcome = match method {
            Method::Config => parts.config(&merged),
            Method::Mount => parts.mount(&merged).map_err(|error| (error, String::new())),
        };
        outcome.map_err(|(source, messages)| RootfsError::Mount {
            path: merged.clone(),
            layers: lowers.len(),
            messages,
            source: source.into(),
        })?;
        let mut rootfs = Self {
            scratch: scratch.to_owned(),
            merged,
            root: None,
        };
        match ConfinedDir::open(&rootfs.merged) {
            Ok(root) => rootfs.root = Some(root),
            Err(error) => {
                let failed = RootfsError::io("opening", &rootfs.merged)(error);
                rootfs.unmount()?;
                return Err(failed);
            }
        }
        Ok(rootfs)
    }

    /// Where it is mounted.
    pub(super) fn path(&self) -> &Path {
        &self.merged
    }

    /// The directory that takes the changes.
    pub(super) fn upper(&self) -> PathBuf {
        self.scratch.join("upper")
    }

    /// The device number of the mount.
    pub(super) fn device(&self) -> Result<u64, RootfsError> {
        let found = rustix::fs::stat(&self.merged);
        let found = found.map_err(RootfsError::io("reading", &self.merged))?;
        Ok(found.st_dev)
    }

    /// The root directory.
    pub(super) fn root(&self) -> &ConfinedDir {
        self.root
            .as_ref()
            .expect("it is mounted until it is consumed")
    }

    /// Unmounts, and hands over what was changed.
    ///
    /// No process may use the filesystem any more.
    ///
    /// # Errors
    /// [`RootfsError::Io`]; it is unmounted even then.
    pub(super) fn finish(mut self) -> Result<Changed, RootfsError> {
        self.unmount()?;
        for name in ["merged", "none"] {
            let dir = self.scratch.join(name);
            fs::remove_dir(&dir).map_err(RootfsError::io("removing", &dir))?;
        }
        let work = self.scratch.join("work");
        confined::remove_tree(&work).map_err(RootfsError::io("removing", &work))?;
        Ok(Changed {
            upper: self.upper(),
        })
    }

    /// Unmounts it and removes what was changed. Failures are left to whoever removes `scratch`.
    pub(super) fn discard(mut self) {
        if let Err(error) = self.unmount() {
            tracing::debug!(%error, "a root filesystem stays mounted");
            return;
        }
        for name in ["upper", "work", "merged", "none"] {
            let dir = self.scratch.join(name);
            if let Err(error) = confined::remove_tree(&dir) {
                tracing::debug!(dir = %dir.display(), %error, "a directory stays");
            }
        }
    }

    fn unmount(&mut self) -> Result<(), RootfsError> {
        // An open descriptor would keep it busy.
        self.root = None;
        let unmount = |flags| rustix::mount::unmount(&self.merged, flags | UnmountFlags::NOFOLLOW);
        match unmount(UnmountFlags::empty()) {
            // Somebody looks into it from outside. It disappears from here at once and
            // altogether when they are done; nobody writes any more.
            Err(Errno::BUSY) => unmount(UnmountFlags::DETACH),
            other => other,
        }
        .map_err(RootfsError::io("unmounting", &self.merged))
    }
}

impl Drop for Overlay {
    fn drop(&mut self) {
        if self.root.is_some()
            && let Err(error) = self.unmount()
        {
            tracing::debug!(%error, "a root filesystem stays mounted");
        }
    }
}

/// The directories of an overlay mount. The kernel is given them by their descriptors'
/// names, which are short, free of characters with a meaning, and lead nowhere else.
struct Parts<'a> {
    /// The topmost first.
    lowers: &'a [BorrowedFd<'a>],
    upper: BorrowedFd<'a>,
    work: BorrowedFd<'a>,
}

fn name_of(fd: BorrowedFd<'_>) -> String {
    format!("/proc/self/fd/{}", fd.as_raw_fd())
}

impl Parts<'_> {
    fn check(&self, method: Method) -> Result<(), RootfsError> {
        if self.lowers.len() > KERNEL_LIMIT {
            return Err(RootfsError::TooManyLayers {
                layers: self.lowers.len(),
                limit: KERNEL_LIMIT,
                hint: "join layers of the base image, for instance by copying all of it in one COPY --from",
            });
        }
        let bytes = self.options().len();
        if method == Method::Mount && bytes > OPTIONS_LIMIT_BYTES {
            return Err(RootfsError::TooManyLayers {
                layers: self.lowers.len(),
                limit: self.lowers.len() * OPTIONS_LIMIT_BYTES / bytes,
                hint: "Linux 6.5 or newer mounts 500",
            });
        }
        Ok(())
    }

    /// All options as `mount(2)` takes them.
    ///
    /// `index=off`, because an index ties the upper directory to this mount; `volatile`,
    /// because nothing is lost that a crash would not end anyway. With `userxattr` redirects
    /// and metadata-only copies are off, and saying so is an error to some kernels.
    fn options(&self) -> String {
        let lowers: Vec<String> = self.lowers.iter().map(|fd| name_of(*fd)).collect();
        format!(
            "userxattr,index=off,volatile,lowerdir={},upperdir={},workdir={}",
            lowers.join(":"),
            name_of(self.upper),
            name_of(self.work)
        )
    }

    fn mount(&self, target: &Path) -> Result<(), Errno> {
        let options = std::ffi::CString::new(self.options()).map_err(|_| Errno::INVAL)?;
        let flags = MountFlags::empty();
        rustix::mount::mount("sockless", target, "overlay", flags, options.as_c_str())
    }

    /// On failure also returns what the kernel says.
    fn config(&self, target: &Path) -> Result<(), (Errno, String)> {
        use rustix::mount::{
            fsconfig_create, fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, move_mount,
        };
        let context = fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC)
            .map_err(|error| (error, String::new()))?;
        let configure = || -> Result<OwnedFd, Errno> {
            let context = context.as_fd();
            fsconfig_set_string(context, "source", "sockless")?;
            fsconfig_set_flag(context, "userxattr")?;
            fsconfig_set_string(context, "index", "off")?;
            fsconfig_set_flag(context, "volatile")?;
            for lower in self.lowers {
                fsconfig_set_string(context, "lowerdir+", name_of(*lower))?;
            }
            fsconfig_set_string(context, "upperdir", name_of(self.upper))?;
            fsconfig_set_string(context, "workdir", name_of(self.work))?;
            fsconfig_create(context)?;
            fsmount(
                context,
                FsMountFlags::FSMOUNT_CLOEXEC,
                MountAttrFlags::empty(),
            )
        };
        let mounted = configure().map_err(|error| (error, messages(context.as_fd())))?;
        let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
        move_mount(&mounted, "", CWD, target, flags).map_err(|error| (error, String::new()))
    }
}

/// What the kernel noted in a filesystem context, one message after the other.
fn messages(context: BorrowedFd<'_>) -> String {
    let mut all: Vec<String> = Vec::new();
    let mut buffer = [0; 1024];
    // It ends with ENODATA.
    while let Ok(length @ 1..) = rustix::io::read(context, &mut buffer) {
        let line = String::from_utf8_lossy(&buffer[..length]);
        // Each begins with its kind: `e `, `w ` or `i `.
        let text = line.trim();
        all.push(text.get(2..).unwrap_or(text).to_owned());
    }
    all.join("; ")
}

/// Gives the upper directory what the root directory of the mounted filesystem should have.
fn dress_root(upper: &Path, want: &super::tree::Attributes, gives_away: bool) -> io::Result<()> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let fd = rustix::fs::open(upper, flags, Mode::empty())?;
    let stat = rustix::fs::fstat(&fd)?;
    if gives_away && (stat.st_uid, stat.st_gid) != (want.uid, want.gid) {
        let (uid, gid) = (Uid::from_raw(want.uid), Gid::from_raw(want.gid));
        rustix::fs::fchown(&fd, Some(uid), Some(gid))?;
    }
    fs::set_permissions(upper, fs::Permissions::from_mode(ROOT_MODE))?;
    let times = Timestamps {
        last_access: Timespec {
            tv_sec: 0,
            tv_nsec: rustix::fs::UTIME_OMIT,
        },
        last_modification: want.mtime.into(),
    };
    Ok(rustix::fs::futimens(&fd, &times)?)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::testing::{in_worlds, tree_of, view_of_dir, view_of_stack};
    use super::super::tree::Tree;
    use super::*;

    /// `count` trees, of which each has a file of its own and one that all have.
    fn trees(count: usize) -> (Vec<tempfile::TempDir>, Stack) {
        let tree = |n| {
            tree_of(&[
                &format!("644 all = {n}"),
                "755 d/",
                &format!("644 d/{n} = x"),
            ])
        };
        let (dirs, trees): (_, Vec<Arc<Tree>>) = (0..count).map(tree).unzip();
        (dirs, Stack::new(trees))
    }

    #[test]
    fn sandbox_one_to_five_hundred_layers_are_mounted() {
        in_worlds(
            module_path!(),
            "sandbox_one_to_five_hundred_layers_are_mounted",
            || {
                let (_dirs, all) = trees(500);
                for (count, methods) in [
                    (0, &[Method::Config, Method::Mount][..]),
                    (1, &[Method::Config, Method::Mount]),
                    (128, &[Method::Config, Method::Mount]),
                    (500, &[Method::Config]),
                ] {
                    let stack = Stack::new(all.trees()[..count].to_vec());
                    for method in methods {
                        let scratch = tempfile::tempdir().unwrap();
                        let rootfs =
                            Overlay::mount_by(&stack, scratch.path(), true, *method).unwrap();
                        if count < 100 {
                            let views = (view_of_dir(rootfs.path()), view_of_stack(&stack));
                            assert_eq!(views.0, views.1, "{count} {method:?}");
                        } else {
                            // The last layer is on top, the first is there, and all merge.
                            let read = |path| fs::read_to_string(rootfs.path().join(path)).unwrap();
                            assert_eq!(read("all"), (count - 1).to_string());
                            assert_eq!(read("d/0"), "x");
                            let entries = fs::read_dir(rootfs.path().join("d")).unwrap();
                            assert_eq!(entries.count(), count);
                        }
                        fs::write(rootfs.path().join("new"), "").unwrap();
                        assert_eq!(rootfs.finish().unwrap().upper, scratch.path().join("upper"));
                        let left: Vec<_> = fs::read_dir(scratch.path())
                            .unwrap()
                            .map(|e| e.unwrap().file_name())
                            .collect();
                        assert_eq!(left, ["upper"]);
                        assert!(scratch.path().join("upper/new").exists());
                    }
                }
            },
        );
    }

    #[test]
    fn sandbox_what_cannot_be_mounted_says_why() {
        in_worlds(
            module_path!(),
            "sandbox_what_cannot_be_mounted_says_why",
            || {
                let (_dirs, stack) = trees(501);
                let mount = |scratch: &Path, method| {
                    Overlay::mount_by(&stack, scratch, true, method)
                        .unwrap_err()
                        .to_string()
                };
                let scratch = tempfile::tempdir().unwrap();
                assert_eq!(
                    mount(scratch.path(), Method::Config),
                    "the image has 501 layers, this kernel can mount 500; join layers of the base image, \
                 for instance by copying all of it in one COPY --from"
                );
                let (_dirs, stack) = trees(300);
                let error =
                    Overlay::mount_by(&stack, scratch.path(), true, Method::Mount).unwrap_err();
                let RootfsError::TooManyLayers {
                    layers: 300,
                    limit,
                    hint,
                } = error
                else {
                    panic!("{error}");
                };
                assert!((200..300).contains(&limit), "{limit}");
                assert_eq!(hint, "Linux 6.5 or newer mounts 500");

                // A lower directory is inside the upper one.
                let inner = scratch.path().join("upper/inner");
                fs::create_dir_all(&inner).unwrap();
                let stack = Stack::new(vec![Tree::open(&inner).unwrap()]);
                let error = Overlay::mount(&stack, scratch.path(), true).unwrap_err();
                let RootfsError::Mount {
                    path,
                    layers: 1,
                    source,
                    ..
                } = error
                else {
                    panic!("{error}");
                };
                assert_eq!(path, scratch.path().join("merged"));
                assert_eq!(source.raw_os_error(), Some(Errno::LOOP.raw_os_error()));
            },
        );
    }

    #[test]
    fn sandbox_a_busy_or_forgotten_filesystem_is_unmounted() {
        in_worlds(
            module_path!(),
            "sandbox_a_busy_or_forgotten_filesystem_is_unmounted",
            || {
                let mounts = || {
                    fs::read_to_string("/proc/self/mountinfo")
                        .unwrap()
                        .lines()
                        .count()
                };
                let before = mounts();
                let scratch = tempfile::tempdir().unwrap();
                let rootfs = Overlay::mount(&Stack::default(), scratch.path(), true).unwrap();
                fs::write(rootfs.path().join("f"), "x").unwrap();
                let busy = fs::File::open(rootfs.path().join("f")).unwrap();
                assert_eq!(mounts(), before + 1);
                let changed = rootfs.finish().unwrap();
                assert_eq!(mounts(), before);
                assert_eq!(fs::read(changed.upper.join("f")).unwrap(), b"x");
                drop(busy);

                let scratch = tempfile::tempdir().unwrap();
                drop(Overlay::mount(&Stack::default(), scratch.path(), true).unwrap());
                assert_eq!(mounts(), before);
            },
        );
    }
}
