//! How much room a directory takes on disk.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, Stat};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::confined::{self, ConfinedDir};

/// `st_blocks` counts these, whatever the file system's blocks are.
pub(super) const BLOCK_BYTES: u64 = 512;

/// What a directory has, itself included. A file with several names counts once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Size {
    /// Bytes on disk.
    pub(super) bytes: u64,
    /// Files of all types, and directories.
    pub(super) entries: u64,
    /// The summed lengths of regular files. Unlike `bytes` it is not the file system's business.
    pub(super) length: u64,
}

impl Size {
    /// Walks the directory `path`. What disappears meanwhile counts as not there; what is
    /// mounted in it is an error.
    ///
    /// # Errors
    /// Those of `openat2(2)` and `getdents(2)`.
    pub(super) fn measure(path: &Path) -> io::Result<Self> {
        let root = ConfinedDir::open(path)?;
        let mut size = Self::default();
        let mut seen = BTreeSet::new();
        let itself = root.open_exact(Path::new(""), OFlags::PATH, Mode::empty())?;
        size.add(&rustix::fs::fstat(itself)?, &mut seen);
        let mut left = vec![PathBuf::new()];
        while let Some(dir) = left.pop() {
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW;
            let fd = match root.open_exact(&dir, flags, Mode::empty()) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                fd => fd?,
            };
            for (name, _) in confined::list(fd.as_fd())? {
                let stat = match rustix::fs::statat(&fd, &name, AtFlags::SYMLINK_NOFOLLOW) {
                    Err(Errno::NOENT) => continue,
                    stat => stat?,
                };
                size.add(&stat, &mut seen);
                if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
                    left.push(dir.join(&name));
                }
            }
        }
        Ok(size)
    }

    // The fields' types differ between architectures.
    #[allow(clippy::unnecessary_cast, clippy::useless_conversion)]
    fn add(&mut self, stat: &Stat, seen: &mut BTreeSet<(u64, u64)>) {
        let file_type = FileType::from_raw_mode(stat.st_mode);
        let is_shared = file_type != FileType::Directory && stat.st_nlink > 1;
        if is_shared && !seen.insert((stat.st_dev as u64, stat.st_ino as u64)) {
            return;
        }
        self.bytes += u64::try_from(stat.st_blocks as i64).unwrap_or(0) * BLOCK_BYTES;
        self.entries += 1;
        if file_type == FileType::RegularFile {
            self.length += u64::try_from(stat.st_size).unwrap_or(0);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn a_directory_is_measured_with_hard_links_once_and_links_unfollowed() {
        let dir = tempfile::tempdir().unwrap();
        let tree = dir.path().join("tree");
        fs::create_dir_all(tree.join("a/b")).unwrap();
        fs::write(tree.join("a/f"), vec![1; 10_000]).unwrap();
        fs::hard_link(tree.join("a/f"), tree.join("a/b/again")).unwrap();
        fs::write(dir.path().join("outside"), vec![1; 100_000]).unwrap();
        std::os::unix::fs::symlink("../outside", tree.join("link")).unwrap();
        std::os::unix::fs::symlink("..", tree.join("up")).unwrap();
        let sparse = fs::File::create(tree.join("sparse")).unwrap();
        sparse.set_len(1 << 30).unwrap();
        let blocks = |path: &str| fs::symlink_metadata(tree.join(path)).unwrap().blocks() * 512;
        let paths = ["", "a", "a/b", "a/f", "link", "up", "sparse"];
        let want = Size {
            bytes: paths.iter().map(|path| blocks(path)).sum(),
            entries: 7,
            length: 10_000 + (1 << 30),
        };
        assert_eq!(Size::measure(&tree).unwrap(), want);
        assert!(want.bytes < 1 << 20, "{want:?}");
        let missing = Size::measure(&dir.path().join("none")).unwrap_err();
        assert_eq!(missing.kind(), io::ErrorKind::NotFound);
    }
}
