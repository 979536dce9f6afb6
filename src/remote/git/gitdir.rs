//! A `.git` directory for a checkout: what `git clone --depth 1` leaves, without its extras.

use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use gix_hash::ObjectId;

use super::error::GitError;
use super::io_error;
use super::objects::{CommitObject, Objects};

/// What a `.git` directory is made of.
pub(super) struct GitDir<'g> {
    pub(super) objects: &'g Objects,
    pub(super) commit: &'g CommitObject,
    /// Full names, and what they name.
    pub(super) references: Vec<(String, ObjectId)>,
    /// The remote, without credentials.
    pub(super) remote: &'g str,
    pub(super) index: gix_index::State,
    /// For a submodule: from here to its files.
    pub(super) worktree: Option<String>,
    /// Names and URLs of its own submodules that are there.
    pub(super) modules: Vec<(String, String)>,
}

impl GitDir<'_> {
    /// Fills the directory `path`, which was made with [`make_directory`] and in which no name
    /// from a repository is.
    ///
    /// # Errors
    /// [`GitError::Io`].
    pub(super) fn write(self, path: &Path) -> Result<(), GitError> {
        for part in [
            "objects",
            "objects/info",
            "objects/pack",
            "refs",
            "refs/heads",
            "refs/tags",
        ] {
            make_directory(&path.join(part))?;
        }
        self.objects.copy_to(&path.join("objects/pack"))?;
        let put = |name: &str, text: &str| {
            let file = path.join(name);
            fs::write(&file, text).map_err(io_error("writing", &file))?;
            mode(&file, 0o644)
        };
        put("HEAD", &format!("{}\n", self.commit.id))?;
        put("config", &self.config())?;
        if self.commit.has_parents {
            // What the pack has no parents of.
            put("shallow", &format!("{}\n", self.commit.id))?;
        }
        // One file, so that no name becomes a path.
        let mut references = self.references;
        references.retain(|(name, _)| is_name(name));
        references.sort();
        references.dedup();
        let mut packed = String::from("# pack-refs with: peeled fully-peeled sorted \n");
        for (name, id) in references {
            let _ = writeln!(packed, "{id} {name}");
            if id != self.commit.id {
                let _ = writeln!(packed, "^{}", self.commit.id);
            }
        }
        put("packed-refs", &packed)?;

        let file = path.join("index");
        let mut index = self.index;
        index.sort_entries();
        gix_index::File::from_state(index, file.clone())
            .write(gix_index::write::Options::default())
            .map_err(|error| GitError::Io {
                doing: "writing",
                path: file.clone(),
                source: std::io::Error::other(super::objects::causes(&error)),
            })?;
        mode(&file, 0o644)
    }

    fn config(&self) -> String {
        let is_sha1 = self.objects.hash() == gix_hash::Kind::Sha1;
        let mut text = format!(
            "[core]\n\trepositoryformatversion = {}\n\tfilemode = true\n\tbare = false\n\
             \tlogallrefupdates = true\n",
            u8::from(!is_sha1)
        );
        if let Some(worktree) = &self.worktree {
            let _ = writeln!(text, "\tworktree = {}", quoted(worktree));
        }
        if !is_sha1 {
            let _ = writeln!(
                text,
                "[extensions]\n\tobjectformat = {}",
                self.objects.hash()
            );
        }
        let _ = writeln!(
            text,
            "[remote \"origin\"]\n\turl = {}\n\tfetch = +refs/heads/*:refs/remotes/origin/*",
            quoted(self.remote)
        );
        for (name, url) in &self.modules {
            let _ = writeln!(
                text,
                "[submodule {}]\n\tactive = true\n\turl = {}",
                quoted(name),
                quoted(url)
            );
        }
        text
    }
}

/// Makes a directory that is not there yet, with git's usual mode.
pub(super) fn make_directory(path: &Path) -> Result<(), GitError> {
    fs::create_dir(path).map_err(io_error("making the directory", path))?;
    mode(path, 0o755)
}

/// Sets a mode, whatever the umask.
fn mode(path: &Path, mode: u32) -> Result<(), GitError> {
    fs::set_permissions(path, fs::Permissions::from_mode(mode))
        .map_err(io_error("setting the mode of", path))
}

/// A value in git's configuration. It has no control characters.
fn quoted(text: &str) -> String {
    format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""))
}

/// Whether git would take it for the name of a reference.
///
/// <https://git-scm.com/docs/git-check-ref-format>
fn is_name(name: &str) -> bool {
    name.starts_with("refs/")
        && !name.ends_with(['/', '.'])
        && !name.contains("..")
        && !name.contains("@{")
        && !name.contains(|c: char| c.is_control() || " ~^:?*[\\".contains(c))
        && name
            .split('/')
            .all(|part| !part.is_empty() && !part.starts_with('.') && !part.ends_with(".lock"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn security_s05_names_that_git_would_not_take() {
        for name in ["refs/heads/main", "refs/tags/v1.0", "refs/heads/a/b@c"] {
            assert!(is_name(name), "{name}");
        }
        for name in [
            "HEAD",
            "refs/heads/../../config",
            "refs/heads/a b",
            "refs/heads/a\nb",
            "refs//a",
            "refs/heads/.a",
            "refs/heads/a.lock",
            "refs/heads/a/",
            "refs/heads/a.",
            "refs/heads/a^",
        ] {
            assert!(!is_name(name), "{name}");
        }
    }
}
