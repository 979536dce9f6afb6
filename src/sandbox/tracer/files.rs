//! Files of the step: which they are, whom they belong to, and what `stat(2)` says of them.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::process::Pid;

use super::{KEEP, Tracer, ptrace};
use crate::owners::{Inode, Owner};

/// The bit of a directory that gives its group to what is made in it.
const SETGID: u32 = 0o2000;

impl Tracer<'_> {
    /// Puts owner and group into what a `stat(2)` found.
    pub(super) fn show(&self, pid: Pid, buffer: u64, is_statx: bool) {
        let mut bytes = [0; STAT_BYTES];
        // Where the memory is gone by now, another thread of the step took it.
        if ptrace::read_memory(pid, buffer, &mut bytes).is_err() {
            return;
        }
        let layout = if is_statx { STATX } else { STAT };
        let owner = self.inodes.get((layout.inode)(&bytes));
        if owner != Owner::default() {
            let pair = [owner.uid.to_ne_bytes(), owner.gid.to_ne_bytes()].concat();
            let _ = ptrace::write_memory(pid, buffer + layout.owner_at, &pair);
        }
    }

    /// Notes that the files that are open as `old` and `new` are one.
    pub(super) fn note_same(&mut self, pid: Pid, old: i32, new: i32) {
        let known = std::fs::metadata(descriptor(pid, old));
        let Some(owner) = known
            .ok()
            .and_then(|found| self.inodes.known(inode(&found)))
        else {
            return;
        };
        for fd in [old, new] {
            let file = descriptor(pid, fd);
            if let (Ok(found), Ok(path)) = (std::fs::metadata(&file), std::fs::read_link(&file)) {
                self.inodes.note(inode(&found), &path, owner);
            }
        }
    }

    pub(super) fn note_owner(&mut self, pid: Pid, fd: i32, uid: u32, gid: u32) {
        let file = descriptor(pid, fd);
        let (Ok(found), Ok(path)) = (std::fs::metadata(&file), std::fs::read_link(&file)) else {
            return;
        };
        let inode = inode(&found);
        let mut owner = self.inodes.get(inode);
        if uid != KEEP {
            owner.uid = uid;
        }
        if gid != KEEP {
            owner.gid = gid;
        }
        self.inodes.note(inode, &path, owner);
    }

    /// Notes whom a new file belongs to, which is open as `fd`.
    pub(super) fn note_new(&mut self, pid: Pid, fd: i32) {
        let path = descriptor(pid, fd);
        let Ok(found) = std::fs::metadata(&path) else {
            return;
        };
        let mut owner = Owner {
            uid: self.ids(pid).user.filesystem,
            gid: self.ids(pid).group.filesystem,
        };
        if let Some(gid) = self.group_of_directory(pid, &path) {
            owner.gid = gid;
        }
        match std::fs::read_link(&path) {
            Ok(name) if owner != Owner::default() => self.inodes.note(inode(&found), &name, owner),
            _ => self.inodes.set(inode(&found), owner),
        }
    }

    /// The group that the directory of the file that is open as `path` gives to what is in it.
    fn group_of_directory(&self, pid: Pid, path: &Path) -> Option<u32> {
        let file = std::fs::read_link(path).ok()?;
        let directory = file.parent()?.strip_prefix("/").ok()?;
        let directory = proc(pid, "root").join(directory);
        let found = std::fs::symlink_metadata(directory).ok()?;
        (found.is_dir() && found.mode() & SETGID != 0).then(|| self.inodes.get(inode(&found)).gid)
    }
}

/// Where a `stat(2)` has what; see `stat(3type)` and `statx(2)`.
struct Layout {
    inode: fn(&[u8; STAT_BYTES]) -> Inode,
    /// User and group, 32 bits each, one after the other.
    owner_at: u64,
}

/// As many bytes of either as are looked at.
const STAT_BYTES: usize = 144;

fn long(bytes: &[u8; STAT_BYTES], at: usize) -> u64 {
    u64::from_ne_bytes(std::array::from_fn(|index| bytes[at + index]))
}

fn word(bytes: &[u8; STAT_BYTES], at: usize) -> u32 {
    u32::from_ne_bytes(std::array::from_fn(|index| bytes[at + index]))
}

const STAT: Layout = Layout {
    inode: |bytes| (long(bytes, 0), long(bytes, 8)),
    owner_at: if cfg!(target_arch = "x86_64") { 28 } else { 24 },
};

const STATX: Layout = Layout {
    inode: |bytes| {
        let device = rustix::fs::makedev(word(bytes, 136), word(bytes, 140));
        (device, long(bytes, 32))
    },
    owner_at: 20,
};

pub(super) fn inode(found: &std::fs::Metadata) -> Inode {
    (found.dev(), found.ino())
}

pub(super) fn descriptor(pid: Pid, fd: i32) -> PathBuf {
    proc(pid, &format!("fd/{fd}"))
}

pub(super) fn proc(pid: Pid, name: &str) -> PathBuf {
    format!("/proc/{}/{name}", pid.as_raw_nonzero()).into()
}
