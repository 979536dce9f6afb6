//! [`Store::verify`]: whether everything in the store is what it says it is.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::inventory::{self, MOUNT_SIZE, RecordView};
use super::prune::ignore_gone;
use super::size::Size;
use super::tree::{self, FILES, INFO, OWNERS, TreeInfo};
use super::{MOUNT_OWNERS_RECORDED, Store, StoreError, remove_tree};
use crate::image::{Digest, Hasher};
use crate::owners::Owners;

/// What the store's directory has.
const TOP: [&str; 8] = [
    "version",
    "boot.json",
    "lock",
    "blobs",
    "trees",
    "cache",
    "jobs",
    "tmp",
];

/// What `cache/` has.
const CACHES: [&str; 7] = [
    "steps",
    "http",
    "mounts",
    "contents",
    "conversions",
    "listings",
    "stat",
];

/// How much the bytes that a file system uses for the same files may change by themselves:
/// it compresses when it writes back, and gives back what it had set aside.
const SLACK_BYTES: u64 = 64 << 10;

/// Something that is not as it should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// The file or directory.
    pub path: PathBuf,
    /// What is wrong with it.
    pub problem: String,
    /// What to do about it.
    pub advice: &'static str,
    /// Whether that was done.
    pub repaired: bool,
}

/// What is done about a finding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Repair {
    /// It is made again by the next build that needs it.
    Remove,
    /// Its size is measured again.
    Measure,
    /// It may be somebody else's.
    Leave,
}

impl Repair {
    fn advice(self) -> &'static str {
        match self {
            Self::Remove => {
                "remove it with `sockless store verify --repair`; builds make again what they need"
            }
            Self::Measure => "measure it again with `sockless store verify --repair`",
            Self::Leave => "sockless did not put it there: move it away if it is yours",
        }
    }
}

impl Store {
    /// Compares everything in the store with its name, and with what is known about it: reads
    /// all blobs and walks through all trees. With `repair`, removes what is damaged, unless a
    /// running build uses it. Then all that is sound is written to disk for good.
    ///
    /// Builds may run meanwhile.
    ///
    /// # Errors
    /// [`StoreError::Io`] where something cannot be listed, read or removed.
    pub fn verify(&self, repair: bool) -> Result<Vec<Finding>, StoreError> {
        let mut checking = Verifying {
            store: self,
            repair,
            findings: Vec::new(),
        };
        checking.known_names(&self.root, &TOP, Repair::Leave)?;
        checking.known_names(&self.root.join("blobs"), &["sha256"], Repair::Leave)?;
        checking.known_names(&self.root.join("cache"), &CACHES, Repair::Leave)?;
        checking.blobs()?;
        checking.trees()?;
        checking.steps()?;
        checking.http()?;
        checking.mounts()?;
        for (path, error) in self.remove_garbage() {
            let problem = format!("nobody uses it, and it cannot be removed: {error}");
            checking.found(&path, problem, Repair::Remove)?;
        }
        self.settle()?;
        checking.findings.sort_by(|a, b| a.path.cmp(&b.path));
        Ok(checking.findings)
    }
}

struct Verifying<'s> {
    store: &'s Store,
    repair: bool,
    findings: Vec<Finding>,
}

impl Verifying<'_> {
    /// Says what is wrong, and repairs it where that is wanted.
    fn found(
        &mut self,
        path: &Path,
        problem: impl Into<String>,
        repair: Repair,
    ) -> Result<(), StoreError> {
        let repaired = self.repair
            && match repair {
                Repair::Remove => self.remove(path)?,
                Repair::Measure => true,
                Repair::Leave => false,
            };
        self.findings.push(Finding {
            path: path.to_owned(),
            problem: problem.into(),
            advice: repair.advice(),
            repaired,
        });
        Ok(())
    }

    /// Moves it out of sight and removes it; false where a running build uses it.
    fn remove(&self, path: &Path) -> Result<bool, StoreError> {
        let store = self.store;
        let old = store.tmp_dir("old-")?;
        let name = path.file_name().unwrap_or_default();
        {
            let removing = store.holds.remove()?;
            let held = removing.held(&store.root.join("tmp"))?;
            if path.parent() == Some(&store.trees_path())
                && held.contains(&tree::hold_name(&name.to_string_lossy()))
            {
                return Ok(false);
            }
            ignore_gone(fs::rename(path, old.join(name)))
                .map_err(StoreError::io("removing", path))?;
        }
        remove_tree(&old).map_err(StoreError::io("removing", &old))?;
        Ok(true)
    }

    /// Whether all names in `dir` are among `known`.
    fn known_names(
        &mut self,
        dir: &Path,
        known: &[&str],
        repair: Repair,
    ) -> Result<(), StoreError> {
        let entries = match fs::read_dir(dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            entries => entries.map_err(StoreError::io("listing", dir))?,
        };
        for entry in entries {
            let entry = entry.map_err(StoreError::io("listing", dir))?;
            if !known.iter().any(|known| entry.file_name() == *known) {
                self.does_not_belong(&entry.path(), repair)?;
            }
        }
        Ok(())
    }

    fn does_not_belong(&mut self, path: &Path, repair: Repair) -> Result<(), StoreError> {
        self.found(path, "it does not belong here", repair)
    }

    /// The entries of `dir` that have such a name as `is_ours` says; of the others it is said
    /// that they do not belong there.
    fn entries(
        &mut self,
        dir: &Path,
        is_ours: impl Fn(&str) -> bool,
    ) -> Result<Vec<PathBuf>, StoreError> {
        let mut ours = Vec::new();
        let entries = match fs::read_dir(dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(ours),
            // A directory that was pruned, or a file in its place.
            Err(error) if error.kind() == io::ErrorKind::NotADirectory => {
                self.does_not_belong(dir, Repair::Remove)?;
                return Ok(ours);
            }
            entries => entries.map_err(StoreError::io("listing", dir))?,
        };
        for entry in entries {
            let path = entry.map_err(StoreError::io("listing", dir))?.path();
            if path
                .file_name()
                .and_then(|name| name.to_str())
                .is_some_and(&is_ours)
            {
                ours.push(path);
            } else {
                self.does_not_belong(&path, Repair::Remove)?;
            }
        }
        ours.sort();
        Ok(ours)
    }

    fn blobs(&mut self) -> Result<(), StoreError> {
        let dir = self.store.root.join("blobs/sha256");
        for path in self.entries(&dir, |name| digest_of(name).is_some())? {
            let mut file = match inventory::open_quietly(&path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => {
                    self.found(&path, format!("it cannot be read: {error}"), Repair::Remove)?;
                    continue;
                }
                Ok(file) => file,
            };
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            match digest(&mut file) {
                Err(error) => {
                    self.found(&path, format!("it cannot be read: {error}"), Repair::Remove)?;
                }
                Ok(got) if got.hex() != name => {
                    let problem = format!("the blob is damaged: the digest of its bytes is {got}");
                    self.found(&path, problem, Repair::Remove)?;
                }
                Ok(_) => {}
            }
        }
        Ok(())
    }

    fn trees(&mut self) -> Result<(), StoreError> {
        let dir = self.store.trees_path();
        for path in self.entries(&dir, |name| tree::parse_name(name).is_some())? {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            let checked = self.tree(&path, &name);
            match checked {
                // Pruned meanwhile.
                Err(_) if fs::symlink_metadata(&path).is_err() => {}
                checked => checked?,
            }
        }
        Ok(())
    }

    fn tree(&mut self, path: &Path, name: &str) -> Result<(), StoreError> {
        if !fs::symlink_metadata(path).is_ok_and(|found| found.is_dir()) {
            return self.does_not_belong(path, Repair::Remove);
        }
        self.known_names(path, &[FILES, INFO, OWNERS], Repair::Remove)?;
        let Some(info) = TreeInfo::read(path) else {
            let problem = format!("what {INFO} says about the tree cannot be read");
            return self.found(path, problem, Repair::Remove);
        };
        if info.name != name {
            let problem = format!("the tree is {:?}, going by its {INFO}", info.name);
            return self.found(path, problem, Repair::Remove);
        }
        if let Err(error) = Owners::of(&path.join(FILES)) {
            let problem = format!("the owners of its files cannot be read: {error}");
            return self.found(path, problem, Repair::Remove);
        }
        let measured = match Size::measure(&path.join(FILES)) {
            Err(error) => {
                let problem = format!("the tree cannot be read: {error}");
                return self.found(path, problem, Repair::Remove);
            }
            Ok(measured) => measured,
        };
        let Some(known) = info.size else {
            // Nobody has asked for it yet.
            return Ok(());
        };
        if (known.entries, known.length) != (measured.entries, measured.length) {
            let problem = format!(
                "the tree is not what it was: it has {} files with {} bytes, and had {} with {}",
                measured.entries, measured.length, known.entries, known.length
            );
            return self.found(path, problem, Repair::Remove);
        }
        let (less, more) = (
            known.bytes.min(measured.bytes),
            known.bytes.max(measured.bytes),
        );
        if less.saturating_mul(2).saturating_add(SLACK_BYTES) < more {
            let problem = format!(
                "the tree takes {} bytes on disk, and {INFO} says {}",
                measured.bytes, known.bytes
            );
            if self.repair {
                let info = TreeInfo { size: None, ..info };
                self.store.replace_in(path, INFO, &info.to_bytes())?;
                self.store.tree_size(name)?;
            }
            return self.found(path, problem, Repair::Measure);
        }
        Ok(())
    }

    fn steps(&mut self) -> Result<(), StoreError> {
        let dir = self.store.steps_path();
        for definition in self.entries(&dir, |name| digest_of(name).is_some())? {
            for path in self.entries(&definition, is_record)? {
                self.record(&path)?;
            }
        }
        Ok(())
    }

    fn http(&mut self) -> Result<(), StoreError> {
        let dir = self.store.http_path();
        for path in self.entries(&dir, is_record)? {
            self.record(&path)?;
        }
        Ok(())
    }

    fn record(&mut self, path: &Path) -> Result<(), StoreError> {
        let problem = {
            // Whoever prunes a blob removes its records under the same lock.
            let _removing = self.store.holds.remove()?;
            let bytes = match inventory::read_quietly(path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
                bytes => bytes,
            };
            match bytes.map(|bytes| RecordView::parse(&bytes)) {
                Err(error) => Some(format!("the record cannot be read: {error}")),
                Ok(None) => {
                    Some("the record cannot be read: it is torn or of no known form".into())
                }
                Ok(Some(view)) => {
                    let (digest, size) = view.blob().expect("a record names a blob");
                    match inventory::file(&self.store.blob_path(digest))? {
                        None => Some(format!("it names the blob {digest}, which is not here")),
                        Some(found) if found.len() != size => Some(format!(
                            "it says that the blob {digest} has {size} bytes, which has {}",
                            found.len()
                        )),
                        Some(_) => None,
                    }
                }
            }
        };
        match problem {
            Some(problem) => self.found(path, problem, Repair::Remove),
            None => Ok(()),
        }
    }

    fn mounts(&mut self) -> Result<(), StoreError> {
        let dir = self.store.cache_mounts_path();
        for all in self.entries(&dir, |name| digest_of(name).is_some())? {
            let is_ours = |name: &str| name == "name" || name.parse::<u32>().is_ok();
            for path in self.entries(&all, is_ours)? {
                if path.ends_with("name") {
                    self.mount_name(&path)?;
                } else if fs::symlink_metadata(&path).is_ok_and(|found| !found.is_dir()) {
                    self.does_not_belong(&path, Repair::Remove)?;
                } else {
                    self.known_names(
                        &path,
                        &["lock", "reading", "filling", FILES, OWNERS, MOUNT_SIZE],
                        Repair::Remove,
                    )?;
                }
            }
        }
        Ok(())
    }

    /// Whether the directory of a cache mount is called as its name says.
    fn mount_name(&mut self, path: &Path) -> Result<(), StoreError> {
        let name = match inventory::read_quietly(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            name => name.map_err(StoreError::io("reading", path))?,
        };
        let dir = path.parent().and_then(Path::file_name).unwrap_or_default();
        let recorded = [&*name, MOUNT_OWNERS_RECORDED.as_bytes()].concat();
        let is_for = |name: &[u8]| *dir == *Digest::of(name).hex();
        if !is_for(&name) && !is_for(&recorded) {
            let problem = "the name of the cache mount is not the one that its directory is for";
            return self.found(path, problem, Repair::Remove);
        }
        Ok(())
    }
}

fn digest_of(hex: &str) -> Option<Digest> {
    Digest::parse(&format!("sha256:{hex}")).ok()
}

fn is_record(name: &str) -> bool {
    name.strip_suffix(".json").and_then(digest_of).is_some()
}

fn digest(file: &mut fs::File) -> io::Result<Digest> {
    let mut hasher = Hasher::new();
    let mut buffer = vec![0; 256 << 10];
    loop {
        match io::Read::read(file, &mut buffer)? {
            0 => return Ok(hasher.finish()),
            read => hasher.update(&buffer[..read]),
        }
    }
}
