//! [`Rootfs`]: a writable root filesystem, in the way that works here.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use super::change::ChangeKind;
use super::overlay::{Changed, Overlay};
use super::plain::Copied;
use super::stack::Stack;
use super::stand_ins::{StandIn, StandIns};
use super::stubs::{self, MountPoint, Stubs};
use super::tree::Tree;
use super::{RootfsError, changes, keep_owners, ownership};
use crate::confined::ConfinedDir;
use crate::owners::{self, Inodes};

/// Which way the user wants.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Choice {
    /// Overlay mounts where they work, else copies.
    #[default]
    Auto,
    /// Overlay mounts.
    Overlay,
    /// Copies.
    Copy,
}

/// How root filesystems are made. The layers that come of it are the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backend {
    /// The kernel's overlay filesystem: nothing of the image is read or copied.
    Overlay,
    /// A copy of the whole image for each: needs no mount.
    Copy,
    /// The same, without any device of the image: for processes from which nothing else keeps
    /// them.
    CopyWithoutDevices,
}

/// Finds the way that works here; for [`Choice::Auto`] by mounting an overlay in `scratch`,
/// an existing, empty directory on the file system in question. Also returns why not, where
/// that fails.
pub fn choose(choice: Choice, scratch: &Path) -> (Backend, Option<RootfsError>) {
    match choice {
        Choice::Overlay => (Backend::Overlay, None),
        Choice::Copy => (Backend::Copy, None),
        Choice::Auto => match try_overlay(scratch) {
            Ok(()) => (Backend::Overlay, None),
            Err(error) => (Backend::Copy, Some(error)),
        },
    }
}

/// Mounts an overlay and changes something in it in each of the ways that ask something of
/// the file system: by a whiteout, and by an attribute of a directory.
fn try_overlay(scratch: &Path) -> Result<(), RootfsError> {
    let [lower, step] = ["lower", "step"].map(|name| scratch.join(name));
    let make = |path: &Path| fs::create_dir_all(path).map_err(RootfsError::io("creating", path));
    make(&lower.join("dir/inside"))?;
    make(&step)?;
    let tree = Tree::open(&lower).map_err(RootfsError::io("opening", &lower))?;
    let stack = Stack::new(vec![tree]);
    let rootfs = Overlay::mount(&stack, &step, true)?;
    let dir = rootfs.path().join("dir");
    fs::remove_dir_all(&dir).map_err(RootfsError::io("removing", &dir))?;
    fs::create_dir(&dir).map_err(RootfsError::io("creating", &dir))?;
    let upper = rootfs.finish()?.upper;
    let upper = Tree::open(&upper).map_err(RootfsError::io("opening", &upper))?;
    let mut removed = Vec::new();
    for change in changes(&upper, &stack) {
        let change = change?;
        if matches!(change.kind, ChangeKind::Removed) {
            removed.push(change.path);
        }
    }
    if removed == [Path::new("dir/inside")] {
        return Ok(());
    }
    let error = io::Error::other("what was removed in an overlay is not marked as that");
    Err(RootfsError::io("trying", &step)(error))
}

/// A writable root filesystem on top of a stack of trees.
///
/// Dropping it unmounts what is mounted and leaves its directory to whoever made that.
#[derive(Debug)]
pub struct Rootfs {
    // Dropped first: their descriptors would keep a mount busy.
    stubs: Stubs,
    recorded: Option<Recorded>,
    stand_ins: Option<StandIns>,
    made: Made,
}

/// Whose the files are, where they cannot be given away.
#[derive(Debug)]
struct Recorded {
    inodes: Inodes,
    lower: Stack,
    /// What keeps the inode numbers.
    _pins: Vec<OwnedFd>,
}

#[derive(Debug)]
enum Made {
    Overlay(Overlay),
    Copy(Copied),
}

impl Backend {
    /// Makes a root filesystem with what is in `stack`.
    ///
    /// `scratch` is an existing, empty directory, on the file system of the trees where
    /// copies should be cheap; several directories are made in it. For an overlay the
    /// calling process must be in a mount namespace of its own, from which no mount
    /// propagates, and be allowed to mount there.
    ///
    /// Where owners are recorded beside `scratch` ([`crate::owners`]), files are not given away:
    /// [`Rootfs::inodes`] says whose they are.
    ///
    /// Contents are not synced; a store that has to survive a crash syncs what it gives a
    /// name to.
    ///
    /// # Errors
    /// For an overlay [`RootfsError::TooManyLayers`] beyond 500, or on Linux before 6.5
    /// beyond about 200, and [`RootfsError::Mount`] where the kernel refuses; for a copy
    /// [`RootfsError::Size`] where a file changes meanwhile; [`RootfsError::Io`].
    pub fn open(self, stack: &Stack, scratch: &Path) -> Result<Rootfs, RootfsError> {
        let is_recorded = owners::is_recorded(scratch)
            .map_err(RootfsError::io("looking for the owners of", scratch))?;
        let (made, inodes) = match self {
            Self::Overlay => {
                let overlay = Overlay::mount(stack, scratch, !is_recorded)?;
                let inodes = Inodes::of_overlay(owners::Overlay {
                    upper: overlay.upper(),
                    device: overlay.device()?,
                });
                (Made::Overlay(overlay), inodes)
            }
            Self::Copy | Self::CopyWithoutDevices => {
                let inodes = Inodes::default();
                let with_devices = self == Self::Copy;
                let recorded = is_recorded.then_some(&inodes);
                let copied = Copied::make(stack, scratch, with_devices, recorded)?;
                (Made::Copy(copied), inodes)
            }
        };
        let mut rootfs = Rootfs {
            stubs: Stubs::default(),
            recorded: None,
            stand_ins: None,
            made,
        };
        if is_recorded {
            let pins = ownership::find(stack, rootfs.root(), &inodes)?;
            rootfs.recorded = Some(Recorded {
                inodes,
                lower: stack.clone(),
                _pins: pins,
            });
        }
        Ok(rootfs)
    }
}

impl Rootfs {
    /// Where it is.
    pub fn path(&self) -> &Path {
        match &self.made {
            Made::Overlay(overlay) => overlay.path(),
            Made::Copy(copied) => copied.path(),
        }
    }

    /// The directory that grows with what is written into it.
    pub fn written_dir(&self) -> PathBuf {
        match &self.made {
            Made::Overlay(overlay) => overlay.upper(),
            Made::Copy(copied) => copied.path().to_owned(),
        }
    }

    /// Devices of the stack that it does not show, because this process may not make them,
    /// in path order.
    pub fn left_out(&self) -> Vec<&Path> {
        match &self.made {
            Made::Overlay(_) => Vec::new(),
            Made::Copy(copied) => copied.left_out().collect(),
        }
    }

    /// Whose the files in it are, where that is recorded: to be kept true by whoever changes it.
    pub fn inodes(&self) -> Option<&Inodes> {
        self.recorded.as_ref().map(|recorded| &recorded.inodes)
    }

    fn root(&self) -> &ConfinedDir {
        match &self.made {
            Made::Overlay(overlay) => overlay.root(),
            Made::Copy(copied) => copied.root(),
        }
    }

    /// Makes every mount point that is missing, with its parents, and remembers it:
    /// [`Rootfs::finish`] removes those that the process had no other use for.
    ///
    /// # Errors
    /// [`RootfsError::MountPoint`] where something else is there; [`RootfsError::Io`].
    pub fn prepare_mount_points(&mut self, points: &[MountPoint]) -> Result<(), RootfsError> {
        let mut stubs = std::mem::take(&mut self.stubs);
        let prepared = points
            .iter()
            .try_for_each(|point| stubs.prepare(self.root(), point));
        self.stubs = stubs;
        prepared
    }

    /// Puts stand-ins into their places, in this order; returns the paths of those that cannot be
    /// made here, which are devices. [`Rootfs::finish`] takes them out.
    ///
    /// # Errors
    /// [`RootfsError::Io`]; with `ENOTSUP` where this is no copy.
    pub fn put_stand_ins(&mut self, wanted: &[StandIn]) -> Result<Vec<PathBuf>, RootfsError> {
        let Made::Copy(copied) = &self.made else {
            let error = io::Error::from(rustix::io::Errno::NOTSUP);
            return Err(RootfsError::io("putting stand-ins into", self.path())(
                error,
            ));
        };
        let stand_ins = match &mut self.stand_ins {
            Some(stand_ins) => stand_ins,
            none => none.insert(StandIns::new(copied.make_aside()?)),
        };
        let mut missing = Vec::new();
        for wanted in wanted {
            if !stand_ins.put(copied.root(), wanted)? {
                missing.push(wanted.path.clone());
            }
        }
        Ok(missing)
    }

    /// Takes out what was put in by [`Rootfs::put_stand_ins`], and puts back what was there.
    ///
    /// No process may use the filesystem any more.
    ///
    /// # Errors
    /// [`RootfsError::Io`].
    pub fn take_out_stand_ins(&mut self) -> Result<(), RootfsError> {
        match (self.stand_ins.take(), &mut self.made) {
            (Some(mut stand_ins), Made::Copy(copied)) => copied.settle(stand_ins.take_out()?),
            _ => Ok(()),
        }
    }

    /// Where `path` leads inside, without links, relative to the root; it need not exist.
    /// Mounting there is what a process inside would call mounting at `path`.
    ///
    /// # Errors
    /// [`RootfsError::Io`], also for a loop of links.
    pub fn resolve(&self, path: &Path) -> Result<PathBuf, RootfsError> {
        stubs::resolve(self.root(), path).map_err(RootfsError::io("resolving", path))
    }

    /// Takes the mount points away, unmounts what is mounted, and hands over what was changed.
    ///
    /// No process may use the filesystem any more.
    ///
    /// # Errors
    /// [`RootfsError::Io`], [`RootfsError::BadChange`]; nothing is mounted even then.
    pub fn finish(mut self) -> Result<Changed, RootfsError> {
        let taken_out = self.take_out_stand_ins();
        let removed = self.stubs.remove();
        match self.made {
            Made::Overlay(overlay) => {
                // While the inode numbers are those that the step saw.
                let owners = self.recorded.map(|recorded| {
                    let Recorded { inodes, lower, .. } = &recorded;
                    ownership::of_changed(&overlay.upper(), overlay.root(), inodes, lower)
                });
                let changed = overlay.finish();
                removed?;
                let changed = changed?;
                match owners.transpose()? {
                    Some(owners) => ownership::save(&owners, changed),
                    None => Ok(changed),
                }
            }
            Made::Copy(copied) => {
                taken_out?;
                removed?;
                let changed = copied.finish()?;
                match self.recorded {
                    Some(Recorded { inodes, .. }) => {
                        keep_owners(&changed.upper, &inodes)?;
                        Ok(changed)
                    }
                    None => Ok(changed),
                }
            }
        }
    }

    /// Unmounts it and removes what was changed. Failures are left to whoever removes `scratch`.
    pub fn discard(self) {
        drop((self.stubs, self.recorded, self.stand_ins));
        match self.made {
            Made::Overlay(overlay) => overlay.discard(),
            Made::Copy(copied) => copied.discard(),
        }
    }
}
