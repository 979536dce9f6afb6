//! Files that nothing may happen to.

use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use crate::support::dir::TestDir;
use crate::support::oci::Image;

/// What the canary's files have in them, and nothing else has.
pub const SONG: &str = "canary-song-b1946ac9";

/// A directory with files of modes that an attack would change.
#[derive(Debug)]
pub struct Canary {
    dir: TestDir,
    before: Vec<String>,
}

impl Canary {
    /// Plants one. It can be reached by everybody: what keeps an attack from it is the program.
    pub fn new() -> Self {
        let dir = TestDir::new("canary");
        for name in ["secret", "dir/secret", "empty-dir/x/y", "etc/passwd"] {
            dir.file(name, SONG);
        }
        dir.file("empty", "");
        let set = |path: &Path, mode| {
            let mode = std::fs::Permissions::from_mode(mode);
            std::fs::set_permissions(path, mode).expect("ours");
        };
        set(dir.path(), 0o777);
        set(&dir.join("dir"), 0o777);
        set(&dir.join("dir/secret"), 0o606);
        set(&dir.join("secret"), 0o666);
        let before = state(dir.path());
        Self { dir, before }
    }

    /// Where it is, absolute.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// The same without the first slash.
    pub fn below_root(&self) -> PathBuf {
        let path = self.path().strip_prefix("/").expect("absolute");
        path.to_owned()
    }

    /// A way to it that climbs out of any directory.
    pub fn climb(&self) -> String {
        format!("{}{}", "../".repeat(40), self.below_root().display())
    }

    /// Fails the test where anything about it has changed, its change times included.
    #[track_caller]
    pub fn is_untouched(&self, by: &str) {
        assert_eq!(state(self.path()), self.before, "{by}");
    }

    /// Fails the test where an image has its song, in a file or in the name of one.
    #[track_caller]
    pub fn is_not_in(&self, image: &Image, by: &str) {
        for entry in image.layers.iter().flat_map(|layer| &layer.entries) {
            let text = String::from_utf8_lossy(&entry.short);
            assert!(!text.contains(SONG), "{by}: it is in {}", entry.path);
        }
    }
}

/// All that `stat(2)` says but access times, and contents.
fn state(path: &Path) -> Vec<String> {
    let is = std::fs::symlink_metadata(path).expect("still there");
    let mut lines = vec![format!(
        "{} {:o} {}:{} {} {}.{} {}.{} {:?}",
        path.display(),
        is.mode(),
        is.uid(),
        is.gid(),
        is.nlink(),
        is.mtime(),
        is.mtime_nsec(),
        is.ctime(),
        is.ctime_nsec(),
        is.is_file().then(|| String::from_utf8_lossy(
            &std::fs::read(path).expect("still readable")
        )
        .into_owned()),
    )];
    if is.is_dir() {
        let entries = std::fs::read_dir(path).expect("still readable");
        let mut paths: Vec<_> = entries.map(|e| e.expect("still there").path()).collect();
        paths.sort();
        lines.extend(paths.iter().flat_map(|path| state(path)));
    }
    lines
}
