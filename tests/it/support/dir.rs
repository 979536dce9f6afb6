//! Temporary directories in which files of other users may be left behind.

use std::path::{Path, PathBuf};

/// A temporary directory, removed with everything in it, whoever owns that in our subordinate IDs.
#[derive(Debug)]
pub struct TestDir {
    path: PathBuf,
}

impl TestDir {
    /// Makes one below `TMPDIR`.
    pub fn new(purpose: &str) -> Self {
        let dir = tempfile::Builder::new()
            .prefix(&format!("sockless-test-{purpose}-"))
            .tempdir()
            .expect("TMPDIR is writable");
        Self { path: dir.keep() }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A path in it.
    pub fn join(&self, name: impl AsRef<Path>) -> PathBuf {
        self.path.join(name)
    }

    /// A new directory in it.
    pub fn dir(&self, name: &str) -> PathBuf {
        let path = self.join(name);
        std::fs::create_dir_all(&path).expect("the directory is ours");
        path
    }

    /// A new file in it, with the directories above.
    pub fn file(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        write(&self.path, name, content)
    }
}

/// Writes a file below a directory, with the directories between.
pub fn write(dir: &Path, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
    let path = dir.join(name);
    let parent = path.parent().expect("a name below a directory");
    std::fs::create_dir_all(parent).expect("the directory is ours");
    std::fs::write(&path, content).expect("the directory is ours");
    path
}

impl Drop for TestDir {
    fn drop(&mut self) {
        if std::env::var_os("SOCKLESS_TEST_KEEP").is_some() {
            eprintln!("kept: {}", self.path.display());
            return;
        }
        if std::fs::remove_dir_all(&self.path).is_ok() {
            return;
        }
        // Unpacked images hold directories of subordinate users, which only their "root" removes.
        let status = super::unshared(&[], "exec rm -rf --one-file-system -- \"$DIR\"")
            .env("DIR", &self.path)
            .status();
        if self.path.exists() {
            eprintln!("left behind: {} ({status:?})", self.path.display());
        }
    }
}
