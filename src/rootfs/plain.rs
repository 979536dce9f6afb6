//! [`Copied`]: a stack copied into a directory, for hosts where no overlay can be mounted.
//!
//! What a process changed is found by facts that are remembered of every file when it is
//! copied: its inode number, the directory and name that it was given, and the time of its
//! last change (`ctime`), which no process can set. A file of which all of this is as it was
//! has not been touched, and no content is read. Everything else is renamed out of the copy
//! into a directory in overlay form, so that [`super::changes`] and whatever comes after it
//! see no difference to the upper directory of an overlay mount.
//!
//! Names that are one file below are as many files in the copy: in an overlay mount writing
//! to one of them leaves the others as they are, and layers have to be the same. What
//! differs is what a process may see of its filesystem while it runs: the number of names of
//! such files, and that a directory of lower layers can be renamed, which an overlay refuses
//! with `EXDEV`.
//!
//! Trees mark what is removed by character devices 0/0, which an overlay lets nobody make: a
//! store that itself lies on an overlay, as in a container without a volume, takes no step
//! that removes files of lower layers.
//!
//! Copying and looking for changes cost in proportion to the whole filesystem.

use std::collections::{BTreeSet, HashMap};
use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, Stat, Timestamps, Uid, makedev};
use rustix::io::Errno;

use super::change::Metadata;
use super::materialize::{apply_metadata, copy};
use super::overlay::Changed;
use super::stack::{Node, ROOT_MODE, Stack};
use super::stand_ins::{self, TakenOut};
use super::tree::{self, Attributes};
use super::{RootfsError, xattr};
use crate::confined::{self, ConfinedDir};
use crate::owners::{Inodes, Owners};

/// How many threads copy at most; more only wait for the same disk.
const THREADS_MAX: usize = 8;

/// Up to this many bytes a file is copied with two calls, where more clever ways cost more.
const SMALL_BYTES: u64 = 64 * 1024;

/// How long the file system's clock may take to go on: its resolution, with ample room.
const TICK_MAX: Duration = Duration::from_secs(3);

/// A copy of a stack, in which a process may change what it likes.
#[derive(Debug)]
pub(super) struct Copied {
    scratch: PathBuf,
    path: PathBuf,
    root: ConfinedDir,
    stack: Stack,
    facts: Facts,
    left_out: BTreeSet<PathBuf>,
    /// Whose files these are, where they cannot be given away.
    inodes: Option<Inodes>,
    /// What stood in the copy while a process ran and is nowhere in a layer, by inode number;
    /// open, so that nothing else can get that.
    strangers: HashMap<u64, OwnedFd>,
}

/// What every file of the copy was when it was made, by inode number.
type Facts = HashMap<u64, Fact>;

/// What one file of the copy was when it was made.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Fact {
    /// Inode number of its directory; of the root's own fact 0.
    parent: u64,
    name: Box<OsStr>,
    is_dir: bool,
    changed: ChangeTime,
}

/// A `ctime`: seconds and nanoseconds.
type ChangeTime = (i64, u64);

impl Copied {
    /// Copies `stack` into a new directory in `scratch`, which is there and empty.
    ///
    /// Owners, modes, times, attributes and holes are as in `stack`; blocks are shared with
    /// it where the file system can do that. Devices that this process may not make are left
    /// out, all where not `with_devices`: see [`Self::left_out`]. With `inodes`, files are not given
    /// to their owners: whoever uses the copy fills them in there.
    ///
    /// # Errors
    /// [`RootfsError::Io`]; [`RootfsError::Size`] where a file below changes meanwhile.
    pub(super) fn make(
        stack: &Stack,
        scratch: &Path,
        with_devices: bool,
        inodes: Option<&Inodes>,
    ) -> Result<Self, RootfsError> {
        let path = scratch.join("copy");
        fs::create_dir(&path).map_err(RootfsError::io("creating", &path))?;
        let root = ConfinedDir::open(&path).map_err(RootfsError::io("opening", &path))?;
        let node = stack
            .root()
            .map_err(RootfsError::io("reading the layers below", scratch))?;
        let copier = Copier {
            stack,
            root: &root,
            queue: Queue::default(),
            can_clone: AtomicBool::new(true),
            gives_away: inodes.is_none(),
            with_devices,
        };
        let copies = copier.run(node)?;
        let last = copies.facts.iter().map(|(_, fact)| fact.changed).max();
        wait_for_tick(scratch, last.unwrap_or_default())
            .map_err(RootfsError::io("reading the clock of", scratch))?;
        Ok(Self {
            scratch: scratch.to_owned(),
            path,
            root,
            stack: stack.clone(),
            facts: copies.facts.into_iter().collect(),
            left_out: copies.left_out.into_iter().collect(),
            inodes: inodes.cloned(),
            strangers: HashMap::new(),
        })
    }

    /// Takes note of stand-ins that were taken out: what was put back is as it was copied, though
    /// the kernel dates its moves, and what stood in is no part of what was changed.
    ///
    /// # Errors
    /// [`RootfsError::Io`].
    pub(super) fn settle(&mut self, out: TakenOut) -> Result<(), RootfsError> {
        let failed = || RootfsError::io("reading what was put back in", &self.path);
        for (fd, parent) in out.restored {
            let stat = rustix::fs::fstat(fd).map_err(failed())?;
            let parent = rustix::fs::fstat(parent).map_err(failed())?.st_ino;
            // What is none of the copy's, as a mount point, is removed later or is new.
            if let Some(fact) = self.facts.get_mut(&stat.st_ino)
                && fact.parent == parent
            {
                fact.changed = changed(&stat);
            }
        }
        for fd in out.strangers {
            let stat = rustix::fs::fstat(&fd).map_err(failed())?;
            self.strangers.insert(stat.st_ino, fd);
        }
        Ok(())
    }

    /// Where it is.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// The root directory.
    pub(super) fn root(&self) -> &ConfinedDir {
        &self.root
    }

    /// Devices of the stack that could not be made here, in path order.
    pub(super) fn left_out(&self) -> impl Iterator<Item = &Path> {
        self.left_out.iter().map(PathBuf::as_path)
    }

    /// Makes a directory that is on the file system of the copy and not in it.
    ///
    /// # Errors
    /// [`RootfsError::Io`].
    pub(super) fn make_aside(&self) -> Result<PathBuf, RootfsError> {
        let path = self.scratch.join("aside");
        fs::create_dir(&path).map_err(RootfsError::io("creating", &path))?;
        Ok(path)
    }

    /// Moves what was changed into a tree, and removes the rest.
    ///
    /// # Errors
    /// [`RootfsError::BadChange`] for a device that would be taken for a removed file, which
    /// an overlay would not have let anybody make; [`RootfsError::Io`].
    pub(super) fn finish(self) -> Result<Changed, RootfsError> {
        let upper = self.scratch.join("upper");
        fs::create_dir(&upper).map_err(RootfsError::io("creating", &upper))?;
        Gather {
            copied: &self,
            upper: ConfinedDir::open(&upper).map_err(RootfsError::io("opening", &upper))?,
            above: Vec::new(),
            made: Vec::new(),
        }
        .run()?;
        confined::remove_tree(&self.path).map_err(RootfsError::io("removing", &self.path))?;
        let aside = self.scratch.join("aside");
        if aside.is_dir() {
            confined::remove_tree(&aside).map_err(RootfsError::io("removing", &aside))?;
        }
        Ok(Changed { upper })
    }

    /// Removes it. Failures are left to whoever removes `scratch`.
    pub(super) fn discard(self) {
        for dir in [&self.path, &self.scratch.join("aside")] {
            if dir.is_dir()
                && let Err(error) = confined::remove_tree(dir)
            {
                tracing::debug!(dir = %dir.display(), %error, "a copy stays");
            }
        }
    }

    /// The fact of the file with this `stat`, if it still has the name that it was given.
    fn at_home(&self, parent: u64, name: &OsStr, stat: &Stat) -> Option<&Fact> {
        let is_dir = FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
        self.facts
            .get(&stat.st_ino)
            .filter(|fact| fact.parent == parent && *fact.name == *name && fact.is_dir == is_dir)
    }
}

/// What an operation is done to, for its error.
#[derive(Clone, Copy)]
struct Place<'p>(&'p Path);

impl Place<'_> {
    fn failed<E: Into<std::io::Error>>(
        self,
        action: &'static str,
    ) -> impl FnOnce(E) -> RootfsError + use<E> {
        RootfsError::io(action, self.0)
    }
}

#[allow(
    clippy::unnecessary_cast,
    reason = "the fields' types differ between architectures"
)]
fn changed(stat: &Stat) -> ChangeTime {
    (stat.st_ctime as i64, stat.st_ctime_nsec as u64)
}

/// Waits until a change made from now on has a later time than `last`: the kernel dates
/// changes by a clock that stands still for some milliseconds.
fn wait_for_tick(dir: &Path, last: ChangeTime) -> std::io::Result<()> {
    let file = tempfile::tempfile_in(dir)?;
    let start = Instant::now();
    loop {
        rustix::fs::fchmod(&file, Mode::RUSR)?;
        // A clock that was set back gives other times, too.
        if changed(&rustix::fs::fstat(&file)?) > last || start.elapsed() > TICK_MAX {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// What threads that copy have made.
#[derive(Debug, Default)]
struct Copies {
    facts: Vec<(u64, Fact)>,
    left_out: Vec<PathBuf>,
}

/// A directory whose entries are to be copied. It exists already.
#[derive(Debug)]
struct Job {
    node: Node,
    /// Inode number of the directory that it is in.
    parent: u64,
}

/// Directories that wait for a thread.
#[derive(Debug, Default)]
struct Queue {
    state: Mutex<Waiting>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Waiting {
    left: Vec<Job>,
    busy: usize,
    failed: bool,
}

/// A job that a thread has; dropped, it is done, with [`Taken::more`] found in it.
struct Taken<'q> {
    queue: &'q Queue,
    job: Job,
    more: Vec<Job>,
    failed: bool,
}

impl Queue {
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.state
            .lock()
            .expect("nothing panics while it holds this lock")
    }

    /// The next job; `None` when nothing is left and nothing more can come.
    fn take(&self) -> Option<Taken<'_>> {
        let mut state = self.lock();
        loop {
            if state.failed {
                return None;
            }
            if let Some(job) = state.left.pop() {
                state.busy += 1;
                return Some(Taken {
                    queue: self,
                    job,
                    more: Vec::new(),
                    failed: true,
                });
            }
            if state.busy == 0 {
                return None;
            }
            state = self
                .changed
                .wait(state)
                .expect("nothing panics while it holds this lock");
        }
    }
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        let mut state = self.queue.lock();
        state.busy -= 1;
        state.failed |= self.failed;
        state.left.append(&mut self.more);
        drop(state);
        self.queue.changed.notify_all();
    }
}

struct Copier<'a> {
    stack: &'a Stack,
    root: &'a ConfinedDir,
    queue: Queue,
    /// Whether sharing of blocks has never failed.
    can_clone: AtomicBool,
    /// Whether files are given to their owners.
    gives_away: bool,
    with_devices: bool,
}

impl Copier<'_> {
    fn run(&self, root: Node) -> Result<Copies, RootfsError> {
        let threads = std::thread::available_parallelism().map_or(2, usize::from);
        self.queue.lock().left.push(Job {
            node: root,
            parent: 0,
        });
        let mut all = Copies::default();
        let parts: Vec<Result<Copies, RootfsError>> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..threads.clamp(2, THREADS_MAX))
                .map(|_| scope.spawn(|| self.work()))
                .collect();
            let joined = threads.into_iter().map(|thread| match thread.join() {
                Ok(copies) => copies,
                Err(panic) => std::panic::resume_unwind(panic),
            });
            joined.collect()
        });
        for part in parts {
            let mut part = part?;
            all.facts.append(&mut part.facts);
            all.left_out.append(&mut part.left_out);
        }
        Ok(all)
    }

    fn work(&self) -> Result<Copies, RootfsError> {
        let mut copies = Copies::default();
        while let Some(mut taken) = self.queue.take() {
            taken.more = self.directory(&taken.job, &mut copies)?;
            taken.failed = false;
        }
        Ok(copies)
    }

    /// Copies what is in a directory, and then what the directory itself is like. Returns
    /// those inside, which are there but empty.
    fn directory(&self, job: &Job, copies: &mut Copies) -> Result<Vec<Job>, RootfsError> {
        let (node, path) = (&job.node, job.node.path());
        let place = Place(path);
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW;
        let dir =
            (self.root.open_exact(path, flags, Mode::empty())).map_err(place.failed("opening"))?;
        let inode = rustix::fs::fstat(&dir)
            .map_err(place.failed("reading"))?
            .st_ino;
        let mut more = Vec::new();
        for (name, child) in self.stack.read_dir(node).map_err(place.failed("listing"))? {
            if child.attributes().is_dir() {
                rustix::fs::mkdirat(&dir, &name, Mode::RWXU)
                    .map_err(RootfsError::io("creating", child.path()))?;
                more.push(Job {
                    node: child,
                    parent: inode,
                });
                continue;
            }
            match self.file(&dir, &name, &child)? {
                Some(stat) => copies.facts.push((
                    stat.st_ino,
                    Fact {
                        parent: inode,
                        name: name.into(),
                        is_dir: false,
                        changed: changed(&stat),
                    },
                )),
                None => copies.left_out.push(child.path().to_owned()),
            }
        }
        let mut metadata = node.metadata();
        let is_root = path.as_os_str().is_empty();
        if is_root {
            metadata.mode = ROOT_MODE;
        } else {
            metadata.xattrs = self.attributes(node).map_err(place.failed("reading"))?;
        }
        dress(&dir, path, &metadata, self.gives_away)?;
        let stat = rustix::fs::fstat(&dir).map_err(place.failed("reading"))?;
        copies.facts.push((
            inode,
            Fact {
                parent: job.parent,
                name: path.file_name().unwrap_or_default().into(),
                is_dir: true,
                changed: changed(&stat),
            },
        ));
        Ok(more)
    }

    /// Copies one file that is no directory; `None` for a device that cannot be made here.
    fn file(&self, dir: &OwnedFd, name: &OsStr, node: &Node) -> Result<Option<Stat>, RootfsError> {
        let path = node.path();
        let place = Place(path);
        match node.file_type() {
            FileType::RegularFile => return self.regular(dir, name, node).map(Some),
            FileType::Symlink => {
                let target = self
                    .stack
                    .read_link(node)
                    .map_err(place.failed("reading"))?;
                rustix::fs::symlinkat(&target, dir, name).map_err(place.failed("creating"))?;
            }
            kind @ (FileType::Fifo
            | FileType::Socket
            | FileType::CharacterDevice
            | FileType::BlockDevice) => {
                let (major, minor) = (
                    rustix::fs::major(node.rdev()),
                    rustix::fs::minor(node.rdev()),
                );
                let is_device = matches!(kind, FileType::CharacterDevice | FileType::BlockDevice);
                if is_device && !self.with_devices {
                    return Ok(None);
                }
                let mode = Mode::RUSR | Mode::WUSR;
                match rustix::fs::mknodat(dir, name, kind, mode, makedev(major, minor)) {
                    Err(Errno::PERM) if is_device => return Ok(None),
                    other => other.map_err(place.failed("creating"))?,
                }
            }
            FileType::Directory | FileType::Unknown => {
                return Err(RootfsError::BadChange {
                    path: path.to_owned(),
                    reason: "it has an unknown file type",
                });
            }
        }
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd =
            rustix::fs::openat(dir, name, flags, Mode::empty()).map_err(place.failed("opening"))?;
        // Of any kind of file there can be capabilities.
        let metadata = Metadata {
            xattrs: self.attributes(node).map_err(place.failed("reading"))?,
            ..node.metadata()
        };
        let mut nobodys = (!self.gives_away).then(Owners::default);
        apply_metadata(&fd, path, &metadata, nobodys.as_mut())?;
        rustix::fs::fstat(&fd)
            .map(Some)
            .map_err(place.failed("reading"))
    }

    fn regular(&self, dir: &OwnedFd, name: &OsStr, node: &Node) -> Result<Stat, RootfsError> {
        let path = node.path();
        let place = Place(path);
        let source = self.stack.open(node).map_err(place.failed("opening"))?;
        let flags =
            OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(dir, name, flags, Mode::RUSR | Mode::WUSR)
            .map_err(place.failed("creating"))?;
        let target = File::from(fd);
        let (want, got) = (
            node.size(),
            self.content(&source, &target, node.size())
                .map_err(place.failed("copying"))?,
        );
        if got != want {
            return Err(RootfsError::Size {
                path: path.to_owned(),
                got,
                want,
            });
        }
        let metadata = Metadata {
            xattrs: xattr::to_copy(source.as_fd()).map_err(place.failed("reading"))?,
            ..node.metadata()
        };
        let fd = OwnedFd::from(target);
        dress(&fd, path, &metadata, self.gives_away)?;
        rustix::fs::fstat(&fd).map_err(place.failed("reading"))
    }

    /// Returns the number of bytes that were there, at most one more than `want`.
    fn content(&self, source: &File, mut target: &File, want: u64) -> std::io::Result<u64> {
        if want > 0 && self.can_clone.load(Ordering::Relaxed) {
            match rustix::fs::ioctl_ficlone(target, source) {
                Ok(()) => return Ok(target.metadata()?.len().min(want.saturating_add(1))),
                // A copy is always possible, and what failed once fails for all.
                Err(_) => self.can_clone.store(false, Ordering::Relaxed),
            }
        }
        if want > SMALL_BYTES || source.metadata()?.blocks().saturating_mul(512) < want {
            return copy(source, target, want);
        }
        let mut bytes = Vec::with_capacity(want as usize + 1);
        source.take(want + 1).read_to_end(&mut bytes)?;
        target.write_all(&bytes)?;
        Ok(bytes.len() as u64)
    }

    /// The attributes of a file of the stack, other than a regular one, that its copy has too.
    fn attributes(
        &self,
        node: &Node,
    ) -> std::io::Result<std::collections::BTreeMap<OsString, Vec<u8>>> {
        let Some(tree) = node
            .trees()
            .first()
            .and_then(|i| self.stack.trees().get(*i))
        else {
            return Ok(std::collections::BTreeMap::new());
        };
        let (fd, _) = tree::look_at(tree.root(), node.path())?.ok_or(Errno::STALE)?;
        xattr::to_copy(fd.as_fd())
    }
}

/// Gives a new file or directory, which is open for more than its name, its owner (where it
/// `gives_away`), attributes, mode and time; in this order, as [`apply_metadata`] says.
pub(super) fn dress(
    fd: &OwnedFd,
    path: &Path,
    want: &Metadata,
    gives_away: bool,
) -> Result<(), RootfsError> {
    let place = Place(path);
    if gives_away {
        let (uid, gid) = (Uid::from_raw(want.uid), Gid::from_raw(want.gid));
        rustix::fs::fchown(fd, Some(uid), Some(gid))
            .map_err(place.failed("changing the owner of"))?;
    }
    for (name, value) in &want.xattrs {
        xattr::set_copied(fd.as_fd(), name, value)
            .map_err(place.failed("setting an attribute of"))?;
    }
    let mode = Mode::from_raw_mode(want.mode & 0o7777);
    rustix::fs::fchmod(fd, mode).map_err(place.failed("changing the mode of"))?;
    let times = Timestamps {
        last_access: want.mtime.into(),
        last_modification: want.mtime.into(),
    };
    rustix::fs::futimens(fd, &times).map_err(place.failed("setting the time of"))
}

/// A directory of the copy that is still to be looked through.
#[derive(Debug)]
struct Visit {
    path: PathBuf,
    /// Whether it and all directories above it are those that were copied there.
    at_home: bool,
    /// Where it is not: the directory in the stack that it takes the place of.
    lower: Option<Node>,
}

/// A directory from the root down to the one that is looked through.
#[derive(Debug)]
struct Above {
    path: PathBuf,
    attributes: Attributes,
    /// Whether it is in the tree.
    made: bool,
}

/// Moves what was changed in a copy into a tree.
struct Gather<'a> {
    copied: &'a Copied,
    upper: ConfinedDir,
    above: Vec<Above>,
    /// Directories that were made in the tree, in the order of their making, and what they
    /// have to be like in the end.
    made: Vec<(PathBuf, Metadata)>,
}

impl Gather<'_> {
    fn run(mut self) -> Result<(), RootfsError> {
        let mut left = vec![Visit {
            path: PathBuf::new(),
            at_home: true,
            lower: None,
        }];
        while let Some(visit) = left.pop() {
            self.visit(visit, &mut left)?;
        }
        // The innermost first, and all after what is in them.
        for (path, metadata) in self.made.iter().rev() {
            let fd = (self.upper)
                .open_exact(path, OFlags::PATH | OFlags::NOFOLLOW, Mode::empty())
                .map_err(RootfsError::io("opening", path))?;
            let mut nobodys = self.copied.inodes.as_ref().map(|_| Owners::default());
            apply_metadata(&fd, path, metadata, nobodys.as_mut())?;
            if let Some(inodes) = &self.copied.inodes {
                let stat = rustix::fs::fstat(&fd).map_err(RootfsError::io("reading", path))?;
                inodes.set(Attributes::from(&stat).id, metadata.owner());
            }
        }
        Ok(())
    }

    fn visit(&mut self, visit: Visit, left: &mut Vec<Visit>) -> Result<(), RootfsError> {
        let Visit {
            path,
            at_home,
            lower,
        } = visit;
        let place = Place(&path);
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW;
        let copy = &self.copied.root;
        let dir = copy
            .open_exact(&path, flags, Mode::empty())
            .map_err(place.failed("opening"))?;
        let stat = rustix::fs::fstat(&dir).map_err(place.failed("reading"))?;
        let entries = confined::list(dir.as_fd()).map_err(place.failed("listing"))?;
        while (self.above.last()).is_some_and(|above| !path.starts_with(&above.path)) {
            self.above.pop();
        }
        self.above.push(Above {
            path: path.clone(),
            attributes: Attributes::from(&stat),
            made: false,
        });

        let fact = self.copied.facts.get(&stat.st_ino);
        let is_touched = !at_home || fact.is_none_or(|fact| fact.changed != changed(&stat));
        let lower = if !is_touched {
            None
        } else if at_home {
            // All parents are directories below, too, so no link is followed.
            let found = self.copied.stack.lookup(&path, false);
            found.map_err(place.failed("looking up"))?
        } else {
            lower
        };
        // The tree's root is there in any case, and says when the image's was changed last.
        if is_touched || path.as_os_str().is_empty() {
            self.make_above()?;
        }
        let mut names = BTreeSet::new();
        for (name, _) in entries {
            let path = path.join(&name);
            let place = Place(&path);
            let found = rustix::fs::statat(&dir, &name, AtFlags::SYMLINK_NOFOLLOW)
                .map_err(place.failed("reading"))?;
            if self.copied.strangers.contains_key(&found.st_ino) {
                self.remove_stranger(&dir, &name)
                    .map_err(place.failed("removing"))?;
                continue;
            }
            let fact = (self.copied.at_home(stat.st_ino, &name, &found)).filter(|_| at_home);
            let is_dir = FileType::from_raw_mode(found.st_mode) == FileType::Directory;
            match fact {
                Some(_) if is_dir => left.push(Visit {
                    path,
                    at_home: true,
                    lower: None,
                }),
                Some(fact) if fact.changed == changed(&found) => {}
                _ => {
                    let below = match &lower {
                        Some(lower) if is_dir => (self.copied.stack.child(lower, &name))
                            .map_err(place.failed("looking up"))?
                            .filter(|node| node.attributes().is_dir()),
                        _ => None,
                    };
                    if below.is_some() {
                        left.push(Visit {
                            path,
                            at_home: false,
                            lower: below,
                        });
                    } else {
                        self.take(dir.as_fd(), &name, &path)?;
                    }
                }
            }
            if is_touched {
                names.insert(name);
            }
        }
        if let Some(lower) = lower {
            self.white_out(&path, &lower, &names)?;
        }
        Ok(())
    }

    fn remove_stranger(&self, dir: &OwnedFd, name: &OsStr) -> std::io::Result<()> {
        stand_ins::remove_stranger(dir, name, &self.copied.scratch)
    }

    /// Marks what `lower` has and the directory `path` no longer as removed.
    fn white_out(
        &mut self,
        path: &Path,
        lower: &Node,
        names: &BTreeSet<OsString>,
    ) -> Result<(), RootfsError> {
        let below = self.copied.stack.read_dir(lower);
        for (name, node) in below.map_err(RootfsError::io("listing", path))? {
            let path = path.join(&name);
            if names.contains(&name) || self.copied.left_out.contains(node.path()) {
                continue;
            }
            let failed = RootfsError::io("making the whiteout", &path);
            let (parent, name) = (self.upper)
                .open_exact_parent(&path)
                .map_err(RootfsError::io("opening the directory of", &path))?;
            let (kind, number) = (FileType::CharacterDevice, makedev(0, 0));
            rustix::fs::mknodat(parent, name, kind, Mode::empty(), number).map_err(failed)?;
        }
        Ok(())
    }

    /// Makes the directories in the tree that lead to what is changed.
    fn make_above(&mut self) -> Result<(), RootfsError> {
        for above in self.above.iter_mut().filter(|above| !above.made) {
            let path = &above.path;
            if !path.as_os_str().is_empty() {
                let (parent, name) = (self.upper)
                    .open_exact_parent(path)
                    .map_err(RootfsError::io("opening the directory of", path))?;
                rustix::fs::mkdirat(parent, name, Mode::RWXU)
                    .map_err(RootfsError::io("creating", path))?;
            }
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW;
            let xattrs = (self.copied.root)
                .open_exact(path, flags, Mode::empty())
                .and_then(|fd| xattr::of_layer(fd.as_fd()))
                .map_err(RootfsError::io("reading the attributes of", path))?;
            let mut metadata = Metadata {
                xattrs,
                ..above.attributes.metadata()
            };
            if let Some(inodes) = &self.copied.inodes {
                let owner = inodes.get(above.attributes.id);
                (metadata.uid, metadata.gid) = (owner.uid, owner.gid);
            }
            self.made.push((path.clone(), metadata));
            above.made = true;
        }
        Ok(())
    }

    /// Moves `name`, and everything in it, from the directory `dir` of the copy into the tree.
    fn take(&mut self, dir: BorrowedFd<'_>, name: &OsStr, path: &Path) -> Result<(), RootfsError> {
        self.check(path)?;
        self.make_above()?;
        let (parent, _) = (self.upper)
            .open_exact_parent(path)
            .map_err(RootfsError::io("opening the directory of", path))?;
        rustix::fs::renameat(dir, name, parent, name).map_err(RootfsError::io("moving", path))
    }

    /// Whether what is at `path` of the copy stood in for something, and is gone now.
    fn is_removed_stranger(&self, path: &Path) -> Result<bool, RootfsError> {
        if self.copied.strangers.is_empty() {
            return Ok(false);
        }
        let place = Place(path);
        let root = &self.copied.root;
        let (parent, name) = (path.parent(), path.file_name());
        let (Some(parent), Some(name)) = (parent, name) else {
            return Ok(false);
        };
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW;
        let dir = root.open_exact(parent, flags, Mode::empty());
        let dir = dir.map_err(place.failed("opening the directory of"))?;
        let stat = rustix::fs::statat(&dir, name, AtFlags::SYMLINK_NOFOLLOW);
        let is_stranger =
            (self.copied.strangers).contains_key(&stat.map_err(place.failed("reading"))?.st_ino);
        if is_stranger {
            self.remove_stranger(&dir, name)
                .map_err(place.failed("removing"))?;
        }
        Ok(is_stranger)
    }

    /// Looks at `top`, which is to become part of the tree, and everything in it. Nothing of
    /// it may have a meaning there that it did not have for who made it.
    fn check(&self, top: &Path) -> Result<(), RootfsError> {
        let root = &self.copied.root;
        let mut left = vec![top.to_owned()];
        while let Some(path) = left.pop() {
            let place = Place(&path);
            let Some((fd, found)) = tree::look_at(root, &path).map_err(place.failed("reading"))?
            else {
                return Err(place.failed("reading")(Errno::NOENT));
            };
            if found.is_whiteout() {
                return Err(RootfsError::BadChange {
                    path,
                    reason: "a character device 0/0 would be taken for a removed file",
                });
            }
            // Others have no attributes of users.
            if !matches!(found.file_type, FileType::Directory | FileType::RegularFile) {
                continue;
            }
            for name in
                xattr::names(fd.as_fd()).map_err(place.failed("reading the attributes of"))?
            {
                if xattr::is_of_overlay(&name) {
                    xattr::remove(fd.as_fd(), &name)
                        .map_err(place.failed("removing an attribute of"))?;
                }
            }
            if found.is_dir() {
                let inside = tree::list(root, &path).map_err(place.failed("listing"))?;
                for (name, _) in inside {
                    let path = path.join(&name);
                    if !self.is_removed_stranger(&path)? {
                        left.push(path);
                    }
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStrExt;
    use std::os::unix::fs::{FileTypeExt, PermissionsExt};

    use rustix::fs::{CWD, XattrFlags};

    use super::super::testing::{in_worlds, line, tree_of, view_of_dir, view_of_stack};
    use super::super::tree::Tree;
    use super::super::{Backend, Choice, changes, choose};
    use super::*;

    const BASE: &[&str] = &[
        "755 d/",
        "500 d/closed/",
        "0 d/closed/none = x",
        "755 d/empty/",
        "4711 d/file = text",
        "4711 d/link == d/file",
        "777 d/soft -> ../../nowhere",
        "640 pipe |",
    ];

    /// What is left in a scratch directory after `act` in a copy of `stack`, and the changes.
    fn changed_by(stack: &Stack, act: impl FnOnce(&Path)) -> (tempfile::TempDir, Vec<String>) {
        let scratch = tempfile::tempdir().unwrap();
        let copied = Copied::make(stack, scratch.path(), true, None).unwrap();
        act(copied.path());
        let upper = copied.finish().unwrap().upper;
        let tree = Tree::open(&upper).unwrap();
        let list = changes(&tree, stack).map(|change| line(change.unwrap()));
        let list = list.collect();
        (scratch, list)
    }

    fn names(dir: &Path) -> Vec<OsString> {
        let mut names: Vec<_> = (fs::read_dir(dir).unwrap())
            .map(|entry| entry.unwrap().file_name())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn sandbox_a_copy_is_the_stack() {
        in_worlds(module_path!(), "sandbox_a_copy_is_the_stack", || {
            let (dir, base) = tree_of(BASE);
            let odd = OsStr::from_bytes(b"\xff \n");
            fs::write(dir.path().join(odd), "x").unwrap();
            // Sparse, with data in the middle.
            let holes = File::create(dir.path().join("holes")).unwrap();
            holes.set_len(10_000_000).unwrap();
            std::os::unix::fs::FileExt::write_all_at(&holes, b"data", 5_000_000).unwrap();
            let set = |path: &str, name: &str, value: &[u8]| {
                let path = dir.path().join(path);
                rustix::fs::setxattr(path, name, value, XattrFlags::empty()).unwrap();
            };
            set("d/file", "user.k", b"v");
            set("d/empty", "user.k", b"w");
            let _listener = std::os::unix::net::UnixListener::bind(dir.path().join("s")).unwrap();
            let number = makedev(1, 3);
            let null = dir.path().join("null");
            let is_made =
                rustix::fs::mknodat(CWD, &null, FileType::CharacterDevice, Mode::RUSR, number)
                    .is_ok();
            let (_top, top) = tree_of(&["755 d!/", "644 d/new = y"]);
            for stack in [
                Stack::new(vec![base.clone()]),
                Stack::new(vec![base.clone(), top]),
                Stack::default(),
            ] {
                let scratch = tempfile::tempdir().unwrap();
                let copied = Copied::make(&stack, scratch.path(), true, None).unwrap();
                let root = copied.path();
                assert_eq!(view_of_dir(root), view_of_stack(&stack));
                if !stack.trees().is_empty() {
                    let found = fs::metadata(root.join("holes")).unwrap();
                    assert!(found.blocks() * 512 < 1_000_000, "{}", found.blocks());
                    assert!(
                        fs::metadata(root.join("s"))
                            .unwrap()
                            .file_type()
                            .is_socket()
                    );
                    assert_eq!(root.join("null").exists(), is_made);
                    assert_eq!(copied.left_out().count(), 0);
                }
                // What nobody touched is no change, and nothing stays behind.
                let upper = copied.finish().unwrap().upper;
                assert_eq!(names(&upper), Vec::<OsString>::new());
                assert_eq!(names(scratch.path()), ["upper"]);
            }
        });
    }

    #[test]
    fn sandbox_names_of_one_file_below_are_files_of_their_own() {
        in_worlds(
            module_path!(),
            "sandbox_names_of_one_file_below_are_files_of_their_own",
            || {
                let (_base, base) = tree_of(BASE);
                let stack = Stack::new(vec![base]);
                let (_scratch, list) = changed_by(&stack, |root| {
                    let mode = fs::Permissions::from_mode(0o600);
                    fs::set_permissions(root.join("d/link"), mode).unwrap();
                });
                assert_eq!(list, ["755 d/", "600 d/link = text"]);
            },
        );
    }

    #[test]
    fn sandbox_a_directory_of_lower_layers_can_be_renamed() {
        in_worlds(
            module_path!(),
            "sandbox_a_directory_of_lower_layers_can_be_renamed",
            || {
                let (_base, base) = tree_of(&["755 a/", "755 a/b/", "644 a/b/f = x", "755 c/"]);
                let stack = Stack::new(vec![base]);
                // Away; the new parent's own time is all that differs there.
                let (scratch, list) = changed_by(&stack, |root| {
                    fs::rename(root.join("a"), root.join("c/a")).unwrap();
                });
                let moved = ["755 c/", "755 c/a/", "755 c/a/b/", "644 c/a/b/f = x"];
                assert_eq!(list[0], "-a");
                assert_eq!(list[1..], moved);
                let tree = Tree::open(&scratch.path().join("upper")).unwrap();
                let found = fs::metadata(tree.path().join("c/a/b/f")).unwrap();
                assert_eq!(found.mtime(), 1_400_000_000);
                // There and back.
                let (_scratch, list) = changed_by(&stack, |root| {
                    fs::rename(root.join("a"), root.join("t")).unwrap();
                    fs::rename(root.join("t"), root.join("a")).unwrap();
                });
                assert_eq!(list, Vec::<String>::new());
                // Another takes its place, with the same names in it.
                let (_scratch, list) = changed_by(&stack, |root| {
                    fs::rename(root.join("a"), root.join("t")).unwrap();
                    fs::create_dir_all(root.join("a/b")).unwrap();
                    fs::rename(root.join("t/b"), root.join("a/b/b")).unwrap();
                });
                let want = ["755 a/", "755 a/b/", "755 a/b/b/", "644 a/b/b/f = x"];
                assert_eq!(list[..4], want);
                assert_eq!(list[4..], ["-a/b/f", "755 t/"]);
                // A link leads nowhere in the comparison: not to c/b, which is not there.
                let (_link, top) = tree_of(&["777 l -> a"]);
                let mut stack = stack.clone();
                stack.push(top);
                let (_scratch, list) = changed_by(&stack, |root| {
                    fs::remove_file(root.join("l")).unwrap();
                    fs::create_dir_all(root.join("l/b")).unwrap();
                });
                assert_eq!(list, ["755 l/", "755 l/b/"]);
            },
        );
    }

    #[test]
    fn sandbox_nothing_gets_a_meaning_in_the_tree() {
        in_worlds(
            module_path!(),
            "sandbox_nothing_gets_a_meaning_in_the_tree",
            || {
                let (_base, base) = tree_of(BASE);
                let stack = Stack::new(vec![base]);
                // Attributes that an overlay would have refused.
                let (_scratch, list) = changed_by(&stack, |root| {
                    fs::create_dir_all(root.join("new/in")).unwrap();
                    for (path, name) in [
                        ("d", "user.overlay.opaque"),
                        ("new", "user.overlay.redirect"),
                        ("new/in", "user.overlay.opaque"),
                        ("d/file", "user.overlay.metacopy"),
                    ] {
                        let path = root.join(path);
                        rustix::fs::setxattr(path, name, b"y", XattrFlags::empty()).unwrap();
                    }
                });
                assert_eq!(list, ["755 new/", "755 new/in/"]);
                // A device that would hide a file.
                let scratch = tempfile::tempdir().unwrap();
                let copied = Copied::make(&stack, scratch.path(), true, None).unwrap();
                fs::create_dir(copied.path().join("new")).unwrap();
                let hiding = copied.path().join("new/x");
                let kind = FileType::CharacterDevice;
                rustix::fs::mknodat(CWD, &hiding, kind, Mode::RUSR, makedev(0, 0)).unwrap();
                assert_eq!(
                    copied.finish().unwrap_err().to_string(),
                    r#"cannot put "new/x" into a layer: a character device 0/0 would be taken for a removed file"#
                );
            },
        );
    }

    #[test]
    fn security_s08_sandbox_what_is_mounted_in_a_copy_stays() {
        in_worlds(
            module_path!(),
            "security_s08_sandbox_what_is_mounted_in_a_copy_stays",
            || {
                let (_base, base) = tree_of(BASE);
                let stack = Stack::new(vec![base]);
                let canary = tempfile::tempdir().unwrap();
                fs::write(canary.path().join("file"), "alive").unwrap();
                for target in ["d/empty", "new/in", "d/file"] {
                    for finish in [true, false] {
                        let scratch = tempfile::tempdir().unwrap();
                        let copied = Copied::make(&stack, scratch.path(), true, None).unwrap();
                        fs::create_dir_all(copied.path().join("new/in")).unwrap();
                        let is_dir = target != "d/file";
                        let file = canary.path().join("file");
                        let source = if is_dir { canary.path() } else { &file };
                        let at = copied.path().join(target);
                        rustix::mount::mount_bind(source, &at).unwrap();
                        if finish {
                            let error = copied.finish().unwrap_err().to_string();
                            assert!(error.contains(target), "{error}");
                        } else {
                            copied.discard();
                        }
                        assert_eq!(fs::read_to_string(&file).unwrap(), "alive");
                        rustix::mount::unmount(&at, rustix::mount::UnmountFlags::empty()).unwrap();
                    }
                }
            },
        );
    }

    #[test]
    fn sandbox_deep_and_many() {
        in_worlds(module_path!(), "sandbox_deep_and_many", || {
            let (_base, base) = tree_of(&["755 many/"]);
            for number in 0..2000 {
                fs::write(base.path().join(format!("many/{number}")), "x").unwrap();
            }
            // Longer than a path may be.
            let name = "n".repeat(250);
            let mut deep = PathBuf::new();
            let mut fd = rustix::fs::open(base.path(), OFlags::PATH, Mode::empty()).unwrap();
            for _ in 0..20 {
                rustix::fs::mkdirat(&fd, &name, Mode::RWXU).unwrap();
                fd = rustix::fs::openat(&fd, &name, OFlags::PATH, Mode::empty()).unwrap();
                deep.push(&name);
            }
            rustix::fs::symlinkat("old", &fd, "link").unwrap();
            let stack = Stack::new(vec![base]);
            let scratch = tempfile::tempdir().unwrap();
            let copied = Copied::make(&stack, scratch.path(), true, None).unwrap();
            fs::remove_file(copied.path().join("many/7")).unwrap();
            let (parent, link) = (deep.clone(), deep.join("link"));
            let flags = OFlags::PATH | OFlags::DIRECTORY;
            let fd = (copied.root().open_exact(&parent, flags, Mode::empty())).unwrap();
            rustix::fs::unlinkat(&fd, "link", AtFlags::empty()).unwrap();
            drop(fd);
            let tree = Tree::open(&copied.finish().unwrap().upper).unwrap();
            let got: Vec<PathBuf> = changes(&tree, &stack).map(|c| c.unwrap().path).collect();
            let mut want = vec![PathBuf::from("many"), "many/7".into()];
            want.extend(
                deep.ancestors()
                    .map(PathBuf::from)
                    .filter(|p| *p != Path::new("")),
            );
            want.push(link);
            want.sort();
            assert_eq!(got, want);
        });
    }

    #[test]
    fn sandbox_copies_are_made_where_no_overlay_can_be_mounted() {
        in_worlds(
            module_path!(),
            "sandbox_copies_are_made_where_no_overlay_can_be_mounted",
            || {
                let scratch = tempfile::tempdir().unwrap();
                let dir = |name: &str| {
                    let dir = scratch.path().join(name);
                    fs::create_dir(&dir).unwrap();
                    dir
                };
                let (chosen, refusal) = choose(Choice::Auto, &dir("plain"));
                assert!(refusal.is_none(), "{refusal:?}");
                assert_eq!(chosen, Backend::Overlay);
                // The kernel takes no overlay as the upper directory of another.
                let outer = Backend::Overlay
                    .open(&Stack::default(), &dir("outer"))
                    .unwrap();
                let inside = outer.path().join("inside");
                fs::create_dir(&inside).unwrap();
                let (chosen, refusal) = choose(Choice::Auto, &inside);
                assert_eq!(chosen, Backend::Copy);
                assert!(
                    matches!(refusal, Some(RootfsError::Mount { .. })),
                    "{refusal:?}"
                );
                let asked = |choice| choose(choice, &inside).0;
                assert_eq!(asked(Choice::Overlay), Backend::Overlay);
                assert_eq!(asked(Choice::Copy), Backend::Copy);
                // And copies do work there, as long as nothing is removed.
                let (_base, base) = tree_of(BASE);
                let place = outer.path().join("copies");
                fs::create_dir(&place).unwrap();
                let stack = Stack::new(vec![base]);
                let rootfs = Backend::Copy.open(&stack, &place).unwrap();
                assert_eq!(view_of_dir(rootfs.path()), view_of_stack(&stack));
                fs::write(rootfs.path().join("new"), "x").unwrap();
                let upper = rootfs.finish().unwrap().upper;
                let upper = Tree::open(&upper).unwrap();
                let list: Vec<String> = (changes(&upper, &stack))
                    .map(|change| line(change.unwrap()))
                    .collect();
                assert_eq!(list, ["644 new = x"]);
                // But a file that is gone cannot be marked, which an overlay keeps to itself.
                let place = outer.path().join("removing");
                fs::create_dir(&place).unwrap();
                let rootfs = Backend::Copy.open(&stack, &place).unwrap();
                fs::remove_file(rootfs.path().join("pipe")).unwrap();
                let error = rootfs.finish().unwrap_err().to_string();
                assert_eq!(error, r#"making the whiteout "pipe""#);
            },
        );
    }
}
