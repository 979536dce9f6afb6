//! Trees: unpacked layers, with what is known about them beside them.
//!
//! ```text
//! trees/<name>/files/      the layer; its times, modes and owners belong to the layer
//! trees/<name>/files.owners   those owners, where files cannot be given away
//! trees/<name>/info.json   when it was named, and how large it is where somebody measured it
//! ```
//!
//! Both get their name at once. The info file's own times are when the tree was made
//! (modification) and when it was last used (access).

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::boot::Moment;
use super::size::Size;
use super::{Store, StoreError, inventory, remove_tree};
use crate::image::{DiffId, Digest};
use crate::owners::{self, Kind};

/// The directory with the layer's files.
pub(super) const FILES: &str = "files";

/// What is known about the tree.
pub(super) const INFO: &str = "info.json";

/// Whose the files are, where that is recorded ([`crate::owners`]).
pub(super) const OWNERS: &str = "files.owners";

/// What ends the names of trees that depend on the layers below.
const CHAIN: &str = ".chain";

/// What ends the names of trees whose owners are recorded beside them.
const RECORDED: &str = ".recorded";

/// The same where modes and attributes are, too.
const ALL_RECORDED: &str = ".unprivileged";

/// What is known about a tree.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct TreeInfo {
    /// The tree's name, so that it cannot be taken for another.
    pub(super) name: String,
    /// When it got its name.
    pub(super) named: Moment,
    /// Whether all of it is known to be on disk, whatever happens to the machine.
    pub(super) settled: bool,
    /// Measured when somebody first asks: a walk is too much for who waits for the tree.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) size: Option<Size>,
}

impl Store {
    /// Where the tree of the layer `diff_id` is, or would be.
    pub fn tree_path(&self, diff_id: &DiffId) -> PathBuf {
        self.named_tree(&self.tree_name(diff_id)).join(FILES)
    }

    /// Where the tree of the topmost layer of `chain` is, or would be, if that layer cannot
    /// be unpacked without those below it, or if the tree has more than the layer: what a
    /// step left as it was below.
    pub fn chained_tree_path(&self, chain: &Digest) -> PathBuf {
        self.named_tree(&self.chained_name(chain)).join(FILES)
    }

    /// The tree of the layer `diff_id`, the topmost of `chain`, if it is here. It stays until
    /// this process ends.
    ///
    /// # Errors
    /// [`StoreError::Io`] where that cannot be said to other processes.
    pub fn find_tree(
        &self,
        diff_id: &DiffId,
        chain: &Digest,
    ) -> Result<Option<PathBuf>, StoreError> {
        for name in [self.tree_name(diff_id), self.chained_name(chain)] {
            let path = self.named_tree(&name);
            let mut looking = self.holds.look()?;
            if path.join(FILES).is_dir() {
                looking.hold(&hold_name(&name))?;
                inventory::touch(&path.join(INFO));
                return Ok(Some(path.join(FILES)));
            }
        }
        Ok(None)
    }

    /// Gives the complete directory `from` (in [`Store::tmp`]) its name as the tree of
    /// `diff_id`, and returns where it is. It stays until this process ends.
    ///
    /// Where another process was faster, its tree stays, and `from` until the store is
    /// dropped, under another name.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn adopt_tree(&self, from: &Path, diff_id: &DiffId) -> Result<PathBuf, StoreError> {
        self.adopt(from, &self.tree_name(diff_id))
    }

    /// Like [`Store::adopt_tree`], for [`Store::chained_tree_path`].
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn adopt_chained_tree(&self, from: &Path, chain: &Digest) -> Result<PathBuf, StoreError> {
        self.adopt(from, &self.chained_name(chain))
    }

    /// The name of the tree of one layer alone.
    fn tree_name(&self, diff_id: &DiffId) -> String {
        format!("{}{}", diff_id.digest().hex(), self.kind())
    }

    /// The name of the tree of the topmost layer of `chain`.
    fn chained_name(&self, chain: &Digest) -> String {
        format!("{}{CHAIN}{}", chain.hex(), self.kind())
    }

    fn kind(&self) -> &'static str {
        match self.recorded {
            Some(Kind::Owners) => RECORDED,
            Some(Kind::All) => ALL_RECORDED,
            None => "",
        }
    }

    fn adopt(&self, from: &Path, name: &str) -> Result<PathBuf, StoreError> {
        let to = self.named_tree(name);
        let unnamed = self.tmp_dir("named-")?;
        let files = unnamed.join(FILES);
        fs::rename(from, &files).map_err(StoreError::io("naming the tree", &to))?;
        owners::rename(from, &files).map_err(StoreError::io("naming the tree", &to))?;
        let info = TreeInfo {
            name: name.to_owned(),
            named: Moment {
                seconds: Moment::now().seconds,
                boot: self.boot.clone(),
            },
            settled: false,
            size: None,
        };
        let info_path = unnamed.join(INFO);
        fs::write(&info_path, info.to_bytes()).map_err(StoreError::io("writing", &info_path))?;
        let mut looking = self.holds.look()?;
        looking.hold(&hold_name(name))?;
        match fs::rename(&unnamed, &to) {
            Ok(()) => {}
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::AlreadyExists | io::ErrorKind::DirectoryNotEmpty
                ) =>
            {
                // An identical tree is there. An open overlay may still use `from`,
                // which goes on working: removed files live as long as they are open,
                // but directory entries do not, so leave it to the end of the process.
                inventory::touch(&to.join(INFO));
            }
            Err(error) => return Err(StoreError::io("naming the tree", &to)(error)),
        }
        Ok(to.join(FILES))
    }

    /// Where the tree of this name and what is known about it are.
    pub(super) fn named_tree(&self, name: &str) -> PathBuf {
        self.trees_path().join(name)
    }

    pub(super) fn trees_path(&self) -> PathBuf {
        self.root.join("trees")
    }

    /// Says that everything that was named before `now` is on disk, or removes it where that
    /// is not known. Called once after a restart of the machine, before anything is looked up.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub(super) fn settle_after_restart(
        &self,
        now: &Moment,
        last: Option<&Moment>,
    ) -> Result<(), StoreError> {
        let trees = self.trees_path();
        let mut removed = Vec::new();
        {
            // Nobody names or finds a tree meanwhile.
            let _removing = self.holds.remove()?;
            let entries = fs::read_dir(&trees).map_err(StoreError::io("listing", &trees))?;
            for entry in entries {
                let dir = entry.map_err(StoreError::io("listing", &trees))?.path();
                if !dir.is_dir() {
                    // Nothing of ours: `verify` tells.
                    continue;
                }
                let info = TreeInfo::read(&dir);
                if let Some(info) = &info
                    && (info.settled || info.named.boot == now.boot)
                {
                    continue;
                }
                match info {
                    Some(mut info) if info.named.is_settled(last) => {
                        info.settled = true;
                        self.replace_in(&dir, INFO, &info.to_bytes())?;
                    }
                    _ => {
                        let old = self.tmp_dir("old-tree-")?.join("tree");
                        fs::rename(&dir, &old).map_err(StoreError::io("removing", &dir))?;
                        removed.push(old);
                    }
                }
            }
        }
        for old in removed {
            if let Err(error) = remove_tree(&old) {
                // Who is not root of a user namespace cannot; whoever is will.
                tracing::debug!(dir = %old.display(), %error, "garbage stays");
            }
        }
        Ok(())
    }

    /// Writes everything to disk and notes of all trees that they are there.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub(super) fn settle(&self) -> Result<(), StoreError> {
        let trees = self.trees_path();
        let mut named = Vec::new();
        inventory::each(&trees, |dir, _| {
            named.extend(TreeInfo::read(&dir).map(|info| (dir, info)));
            Ok(())
        })?;
        let root = fs::File::open(&trees).map_err(StoreError::io("opening", &trees))?;
        rustix::fs::syncfs(root)
            .map_err(io::Error::from)
            .map_err(StoreError::io("writing to disk", &trees))?;
        for (dir, mut info) in named.into_iter().filter(|(_, info)| !info.settled) {
            info.settled = true;
            self.replace_in(&dir, INFO, &info.to_bytes())?;
        }
        Ok(())
    }

    /// The tree's size, measured where nobody has yet, and then remembered.
    ///
    /// # Errors
    /// [`StoreError::Io`]; `NotFound` where the tree is not there or not any more.
    pub(super) fn tree_size(&self, name: &str) -> Result<Size, StoreError> {
        let dir = self.named_tree(name);
        let info = TreeInfo::read(&dir);
        if let Some(size) = info.as_ref().and_then(|info| info.size) {
            return Ok(size);
        }
        let size = Size::measure(&dir.join(FILES)).map_err(StoreError::io("measuring", &dir))?;
        if let Some(info) = info {
            let known = TreeInfo {
                size: Some(size),
                ..info
            };
            self.replace_in(&dir, INFO, &known.to_bytes())?;
        }
        Ok(size)
    }
}

impl TreeInfo {
    /// What is known about the tree in the directory `dir`; absent where that is unreadable.
    pub(super) fn read(dir: &Path) -> Option<Self> {
        serde_json::from_slice(&inventory::read_quietly(&dir.join(INFO)).ok()?).ok()
    }

    pub(super) fn to_bytes(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("an info has only string keys")
    }
}

/// What names a tree for [`super::hold`].
pub(super) fn hold_name(name: &str) -> String {
    format!("tree {name}")
}

/// The digest in the name of a tree, and whether it is that of a chain.
pub(super) fn parse_name(name: &str) -> Option<(Digest, bool)> {
    let stripped = name.strip_suffix(RECORDED);
    let stripped = stripped.or_else(|| name.strip_suffix(ALL_RECORDED));
    let name = stripped.unwrap_or(name);
    let (hex, is_chain) = match name.strip_suffix(CHAIN) {
        Some(hex) => (hex, true),
        None => (name, false),
    };
    let digest = Digest::parse(&format!("sha256:{hex}")).ok()?;
    Some((digest, is_chain))
}
