//! Git repositories as sources: of `ADD`, of the build context, of named contexts.
//!
//! [`parse`] says whether a text names a repository, [`resolve`] which commit that is now
//! (for cache keys; nothing of the commit is transferred), and [`fetch`] writes its files.
//! All as BuildKit means it (`source/git` there), with these differences, all on purpose:
//!
//! - No `git` program is started: this speaks git's protocol itself, over HTTP with the crate's
//!   own client. For `ssh` remotes the program `ssh` is started.
//! - Only the one commit is asked for, also where it is named by its hash.
//! - Submodules outside of a wanted subdirectory are not fetched.
//! - Without a `.git` directory, submodules have no `.git` files either, which lead nowhere.
//! - Repositories that are plain files behind a web server ("dumb HTTP") are refused.
//!
//! The server and the repository are hostile until proven otherwise: what is received is
//! limited by [`Limits`], every object is checked against its name, names are written as
//! `checkout` says, and submodules may come only from where a user could fetch from.
//!
//! ```text
//! text ─ reference::parse ─▶ GitRef ─ location ─▶ http, stream ─ protocol ─▶ references, a pack
//! pack ─ objects ─▶ commit, trees ─ checkout (attributes) ─▶ files ─ modules ─▶ again; gitdir
//! ```

mod attributes;
mod checkout;
mod error;
mod gitdir;
mod http;
mod location;
mod modules;
mod objects;
mod packet;
mod protocol;
mod reference;
mod stream;
#[cfg(test)]
mod tests;
mod watch;

use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use gix_hash::ObjectId;
use reqwest::header::HeaderValue;
use rustix::fs::{AtFlags, FileType, Mode, OFlags, Timespec, Timestamps};
use tokio::runtime::Runtime;

pub use error::GitError;
pub use reference::{FileTime, GitRef, GitRefError, parse};
pub use stream::Ssh;

use checkout::{Checkout, Link, Place, Usage};
use gitdir::GitDir;
use http::{Authorization, Http};
use location::Location;
use objects::{CommitObject, Objects};
use protocol::{Connection, Reference, Server, parse_id};
use reference::redacted;
use stream::Stream;
use watch::Watch;

use crate::confined::{self, ConfinedDir};
use crate::registry::Reach;
use crate::session::Secrets;

/// How deep submodules may contain each other.
const MODULE_DEPTH: usize = 16;
/// How many names are compared with one that is not there.
const COMPARED_NAMES: usize = 20_000;
/// How many names are suggested.
const SUGGESTED_NAMES: usize = 3;

/// What is taken of a repository at most, its submodules included where it is written.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// A pack as it is transferred, in bytes.
    pub pack_bytes: u64,
    /// Objects in a pack.
    pub objects: u32,
    /// One object, unpacked, in bytes. Two of them are in memory at times.
    pub object_bytes: u64,
    /// Files, links and directories that are written.
    pub files: u64,
    /// Their sizes together, in bytes.
    pub checkout_bytes: u64,
    /// Submodules.
    pub modules: u32,
    /// How long it may take altogether.
    pub time: Duration,
    /// How long a server may be silent.
    pub idle: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            pack_bytes: 8 << 30,
            objects: 20_000_000,
            object_bytes: 1 << 30,
            files: 4_000_000,
            checkout_bytes: 32 << 30,
            modules: 1000,
            time: Duration::from_secs(3600),
            // Large repositories are packed in silence.
            idle: Duration::from_secs(120),
        }
    }
}

/// How repositories are fetched.
#[derive(Clone)]
pub struct Options {
    /// The HTTP client; one that follows no redirects. It is used in a runtime of its own, so
    /// it should be one that nobody else has connections of.
    pub client: reqwest::Client,
    /// A directory for packs while they are worked on.
    pub scratch: PathBuf,
    /// What may be shown to a server: see [`Secrets::git_auth`].
    pub secrets: Arc<Secrets>,
    /// For remotes over ssh; absent where the user gave no agent.
    pub ssh: Option<Ssh>,
    /// What is too much.
    pub limits: Limits,
    /// Which servers may be asked; the client looks names up accordingly.
    pub reach: Reach,
    /// Set where the result is not wanted any more.
    pub cancelled: Arc<AtomicBool>,
}

impl fmt::Debug for Options {
    /// Without the client, whose proxies may have passwords, and the secrets.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Options")
            .field("scratch", &self.scratch)
            .field("ssh", &self.ssh)
            .field("limits", &self.limits)
            .finish_non_exhaustive()
    }
}

impl Options {
    /// With no secrets, no ssh and the usual limits.
    pub fn new(client: reqwest::Client, scratch: impl Into<PathBuf>) -> Self {
        Self {
            client,
            scratch: scratch.into(),
            secrets: Arc::default(),
            ssh: None,
            limits: Limits::default(),
            reach: Reach::default(),
            cancelled: Arc::default(),
        }
    }
}

/// What a reference names at present.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Commit {
    /// The hash of the commit, or of the annotated tag. Where the reference was a hash itself,
    /// it is that hash, and nothing was asked of the server.
    pub object: String,
    /// The commit that an annotated tag names.
    pub peeled: Option<String>,
    /// The full name, such as `refs/heads/main`; absent where a hash was given.
    pub reference: Option<String>,
}

impl Commit {
    /// A text that is the same for the same files, and differs for others, as BuildKit's is.
    pub fn cache_key(&self, reference: &GitRef) -> String {
        let keep = reference.keep_git_dir == Some(true);
        let mut key = match &self.peeled {
            Some(commit) if !keep => commit.clone(),
            _ => self.object.clone(),
        };
        if keep {
            let name = self.reference.as_deref().unwrap_or(&self.object);
            key = format!("{key}.git#{name}");
        }
        let subdir = reference.subdir_parts().join("/");
        if !subdir.is_empty() {
            key = format!("{key}:{subdir}");
        }
        if reference.submodules == Some(false) {
            key.push_str("(skip-submodules)");
        }
        if reference.mtime == Some(FileTime::Commit) {
            key.push_str("(mtime=commit)");
        }
        key
    }
}

/// What was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fetched {
    /// The hash of the commit.
    pub commit: String,
    /// When it was committed, in seconds since 1970: what `SOURCE_DATE_EPOCH` is for a
    /// context from git.
    pub time: i64,
    /// What the reference named.
    pub resolved: Commit,
}

/// Finds out which commit `reference` names, without transferring it.
///
/// Blocks, and must not be called from asynchronous code (but from `spawn_blocking`).
///
/// # Errors
/// [`GitError`].
pub fn resolve(reference: &GitRef, options: &Options) -> Result<Commit, GitError> {
    let session = Session::new(reference, options)?;
    session.resolve(reference).map(|(commit, _)| commit)
}

/// Writes the files that `reference` names into the directory `into`, which is made, or empty.
///
/// Files have the modes 0644 and 0755, directories 0755; they belong to the user, and their
/// times are those of writing unless [`GitRef::mtime`] says otherwise.
///
/// Blocks, and must not be called from asynchronous code (but from `spawn_blocking`).
///
/// # Errors
/// [`GitError`]; then `into` is gone.
pub fn fetch(reference: &GitRef, options: &Options, into: &Path) -> Result<Fetched, GitError> {
    let session = Session::new(reference, options)?;
    let (commit, server) = session.resolve(reference)?;
    session.fetch(reference, commit, server, into)
}

/// As [`fetch`], of what [`resolve`] said, even where the reference has moved on since.
///
/// # Errors
/// [`GitError`]; then `into` is gone.
pub fn fetch_resolved(
    reference: &GitRef,
    commit: &Commit,
    options: &Options,
    into: &Path,
) -> Result<Fetched, GitError> {
    let session = Session::new(reference, options)?;
    session.fetch(reference, commit.clone(), None, into)
}

/// A remote, and how it is spoken to.
#[derive(Clone)]
struct Remote {
    /// As it was written, user information included.
    text: String,
    /// For messages.
    shown: String,
    location: Location,
}

impl Remote {
    fn parse(text: &str) -> Result<Self, GitError> {
        Ok(Self {
            text: text.to_owned(),
            shown: redacted(text),
            location: Location::parse(text)?,
        })
    }
}

/// One call: everything that its parts share.
struct Session<'o> {
    options: &'o Options,
    runtime: Runtime,
    watch: Watch,
    remote: Remote,
    authorization: Option<Authorization>,
}

/// Which object of a repository is wanted, and whether the server need not know its name.
struct Want<'w> {
    id: &'w str,
    /// Whether only its hash is known, not a name that the server has for it.
    is_hash: bool,
}

/// Which references a `.git` directory has, by what was asked for and its commit.
type Names<'n> = dyn Fn(ObjectId, &CommitObject) -> Vec<(String, ObjectId)> + 'n;

/// Where files are written.
struct Target<'t> {
    dir: BorrowedFd<'t>,
    path: &'t Path,
    subdir: &'t [&'t str],
    /// Where the outermost repository's files are.
    root: &'t Path,
    /// The `.git` directory that is to be made, and from there to the files.
    git_dir: Option<(PathBuf, Option<String>)>,
}

impl<'o> Session<'o> {
    fn new(reference: &GitRef, options: &'o Options) -> Result<Self, GitError> {
        let remote = Remote::parse(&reference.remote)?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(io_error("starting the runtime for", &options.scratch))?;
        let authorization = authorization(&remote, options)?;
        Ok(Self {
            watch: Watch::start(&options.cancelled, options.limits.time),
            options,
            runtime,
            remote,
            authorization,
        })
    }

    fn connect(&self, remote: &Remote) -> Result<Server<'_>, GitError> {
        let idle = self.options.limits.idle;
        let connection = match &remote.location {
            Location::Http(url) => Connection::Http(Box::new(Http::new(
                &self.options.client,
                &self.runtime,
                &self.watch,
                idle,
                self.authorization.clone(),
                self.options.reach,
                url,
            ))),
            Location::Git { host, port, path } => Connection::Stream(Stream::daemon(
                host,
                *port,
                path,
                &remote.shown,
                &self.watch,
                idle,
                self.options.reach,
            )?),
            Location::Ssh {
                user,
                host,
                port,
                path,
            } => Connection::Stream(Stream::ssh(
                user.as_deref(),
                host,
                *port,
                path,
                &remote.shown,
                self.options.ssh.as_ref(),
                &self.watch,
                idle,
            )?),
        };
        Server::greet(connection, remote.shown.clone(), &self.watch)
    }

    /// What `reference` names, and the server where one had to be asked.
    fn resolve(&self, reference: &GitRef) -> Result<(Commit, Option<Server<'_>>), GitError> {
        let checksum = reference.checksum.as_deref();
        if let Some(checksum) = checksum
            && (checksum.is_empty() || !checksum.bytes().all(|b| b.is_ascii_hexdigit()))
        {
            return Err(GitError::InvalidChecksum {
                checksum: checksum.to_owned(),
                whole: false,
            });
        }
        let name = reference.reference.as_deref();
        if let Some(hash) = name.filter(|name| is_hash(name)) {
            check(checksum, &self.remote.shown, &[hash])?;
            let commit = Commit {
                object: hash.to_owned(),
                peeled: None,
                reference: None,
            };
            return Ok((commit, None));
        }
        if reference.fetch_by_commit {
            let checksum = checksum.unwrap_or_default();
            if !is_hash(checksum) {
                return Err(GitError::InvalidChecksum {
                    checksum: checksum.to_owned(),
                    whole: true,
                });
            }
            let commit = Commit {
                object: checksum.to_owned(),
                peeled: None,
                reference: name.map(|name| {
                    if name.starts_with("refs/") {
                        name.to_owned()
                    } else {
                        format!("refs/heads/{name}")
                    }
                }),
            };
            return Ok((commit, None));
        }
        let mut server = self.connect(&self.remote)?;
        let found = match name {
            None => default_branch(&mut server, &self.remote)?,
            Some(name) => named(&mut server, &self.remote, name)?,
        };
        let object = found.id.to_string();
        let peeled = found.peeled.map(|id| id.to_string());
        let mut hashes = vec![object.as_str()];
        hashes.extend(peeled.as_deref());
        check(checksum, &self.remote.shown, &hashes)?;
        let commit = Commit {
            object,
            peeled,
            reference: Some(found.name),
        };
        Ok((commit, Some(server)))
    }

    fn fetch<'s>(
        &'s self,
        reference: &GitRef,
        resolved: Commit,
        server: Option<Server<'s>>,
        into: &Path,
    ) -> Result<Fetched, GitError> {
        match fs::create_dir(into) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                let mut entries = fs::read_dir(into).map_err(io_error("reading", into))?;
                if entries.next().is_some() {
                    return Err(io_error("writing a repository into", into)(
                        io::ErrorKind::DirectoryNotEmpty.into(),
                    ));
                }
            }
            other => other.map_err(io_error("making the directory", into))?,
        }
        let result = self.fill(reference, resolved, server, into);
        if result.is_err() {
            // The first error says more than one of clearing up.
            if let Err(error) = confined::remove_tree(into) {
                tracing::warn!(%error, "what was fetched in part is not removed");
            }
        }
        result
    }

    fn fill<'s>(
        &'s self,
        reference: &GitRef,
        resolved: Commit,
        server: Option<Server<'s>>,
        into: &Path,
    ) -> Result<Fetched, GitError> {
        let dir = ConfinedDir::open(into).map_err(io_error("opening", into))?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY;
        let root = dir
            .open_exact(Path::new(""), flags, Mode::empty())
            .map_err(io_error("opening", into))?;
        rustix::fs::fchmod(&root, Mode::from_raw_mode(0o755))
            .map_err(|error| io_error("setting the mode of", into)(error.into()))?;
        let subdir = reference.subdir_parts();
        // A part of a repository has no repository, as with BuildKit.
        let keep = reference.keep_git_dir == Some(true) && subdir.is_empty();
        let id = match &resolved.peeled {
            Some(commit) if !keep => commit,
            _ => &resolved.object,
        };
        let want = Want {
            id,
            is_hash: resolved.reference.is_none() || reference.fetch_by_commit,
        };
        let target = Target {
            dir: root.as_fd(),
            path: into,
            subdir: &subdir,
            root: into,
            git_dir: keep.then(|| (into.join(".git"), None)),
        };
        let names = |object: ObjectId, commit: &CommitObject| {
            reference_names(&resolved, reference, object != commit.id)
                .into_iter()
                .map(|name| (name, object))
                .collect()
        };
        let mut usage = Usage::default();
        let with_modules = reference.submodules != Some(false);
        let commit = self.repository(
            &self.remote,
            server,
            &want,
            &target,
            &names,
            with_modules,
            &mut usage,
            0,
        )?;
        if reference.mtime == Some(FileTime::Commit) {
            set_times(&root, commit.time).map_err(io_error("setting times in", into))?;
        }
        Ok(Fetched {
            commit: commit.id.to_string(),
            time: commit.time,
            resolved,
        })
    }

    /// Writes one repository, and its submodules.
    #[allow(
        clippy::too_many_arguments,
        reason = "what differs between a repository and a submodule; the rest is in self"
    )]
    fn repository<'s>(
        &'s self,
        remote: &Remote,
        server: Option<Server<'s>>,
        want: &Want<'_>,
        target: &Target<'_>,
        names: &Names<'_>,
        with_modules: bool,
        usage: &mut Usage,
        depth: usize,
    ) -> Result<CommitObject, GitError> {
        let server = match server {
            Some(server) => server,
            None => self.connect(remote)?,
        };
        let scratch = tempfile::Builder::new()
            .prefix("git-")
            .tempdir_in(&self.options.scratch)
            .map_err(io_error("making a directory in", &self.options.scratch))?;
        let (objects, object) = self.receive(remote, server, want, scratch.path())?;
        let commit = objects.commit(&object)?;
        let mut checkout = Checkout::new(
            &objects,
            &remote.shown,
            &self.options.limits,
            &self.watch,
            usage,
            target.path,
            target.git_dir.is_some(),
        )?;
        let (links, within) = match checkout.descend(commit.tree, target.subdir)? {
            Place::Tree(tree) => {
                checkout.write(&tree, target.dir)?;
                (std::mem::take(&mut checkout.links), None)
            }
            Place::Module { link, .. } if !with_modules => {
                return Err(GitError::Subdir {
                    remote: remote.shown.clone(),
                    subdir: target.subdir.join("/"),
                    reason: format!(
                        "{:?} is a submodule, and submodules are not wanted",
                        display(&link.path)
                    ),
                });
            }
            Place::Module { link, depth } => (vec![link], Some(depth)),
        };
        let index = checkout.index.take();
        if let Some((path, _)) = &target.git_dir {
            gitdir::make_directory(path)?;
        }
        let mut present = Vec::new();
        if with_modules && !links.is_empty() {
            let text = checkout.modules_file(&commit.tree)?.unwrap_or_default();
            let modules = modules::parse(&text).map_err(|reason| GitError::Path {
                remote: remote.shown.clone(),
                path: ".gitmodules".to_owned(),
                reason,
            })?;
            drop(checkout);
            for link in &links {
                let done = self.module(remote, &modules, link, target, within, usage, depth);
                let url = done.map_err(|source| GitError::Submodule {
                    remote: remote.shown.clone(),
                    path: display(&link.path),
                    source: Box::new(source),
                })?;
                present.extend(url);
            }
        }
        if let (Some((path, worktree)), Some(index)) = (&target.git_dir, index) {
            let git_dir = GitDir {
                objects: &objects,
                commit: &commit,
                references: names(object, &commit),
                remote: &remote.shown,
                index,
                worktree: worktree.clone(),
                modules: present,
            };
            git_dir.write(path)?;
        }
        Ok(commit)
    }

    /// Writes one submodule; returns its name and URL, or nothing where it is left out.
    #[allow(
        clippy::too_many_arguments,
        reason = "all that is known where the submodule is met"
    )]
    fn module(
        &self,
        parent: &Remote,
        modules: &[modules::Module],
        link: &Link,
        target: &Target<'_>,
        within: Option<usize>,
        usage: &mut Usage,
        depth: usize,
    ) -> Result<Option<(String, String)>, GitError> {
        let fail = |reason: &str| GitError::Path {
            remote: parent.shown.clone(),
            path: display(&link.path),
            reason: reason.to_owned(),
        };
        let module = modules
            .iter()
            .find(|module| module.path == link.path)
            .ok_or_else(|| fail("it is a submodule, and .gitmodules has no url for it"))?;
        if module.is_skipped {
            return Ok(None);
        }
        let limits = &self.options.limits;
        usage.modules += 1;
        if depth >= MODULE_DEPTH || usage.modules > limits.modules {
            return Err(GitError::Limit {
                remote: parent.shown.clone(),
                what: "the number of submodules, or of submodules in submodules,".to_owned(),
                limit: format!("{}, or {MODULE_DEPTH}", limits.modules),
            });
        }
        let url = location::resolve_submodule(&parent.text, &module.url)?;
        let remote = Remote::parse(&url)?;
        let id = link.commit.to_string();
        let want = Want {
            id: &id,
            is_hash: true,
        };
        let no_names = |_: ObjectId, _: &CommitObject| Vec::new();

        // Below a subdirectory, the files of the submodule are what is wanted.
        let subdir = target.subdir;
        if let Some(depth_in_subdir) = within {
            let target = Target {
                dir: target.dir,
                path: target.path,
                subdir: &subdir[depth_in_subdir..],
                root: target.root,
                git_dir: None,
            };
            let usage = &mut *usage;
            self.repository(
                &remote,
                None,
                &want,
                &target,
                &no_names,
                true,
                usage,
                depth + 1,
            )?;
            return Ok(None);
        }
        let inside = Path::new(std::ffi::OsStr::from_bytes(&link.path));
        let inside = inside
            .strip_prefix(subdir.join("/"))
            .map_err(|_| fail("it is not below the subdirectory"))?;
        let path = target.path.join(inside);
        let dir = open_below(target.dir, inside).map_err(io_error("opening", &path))?;
        let git_dir = match &target.git_dir {
            None => None,
            Some((above, _)) => {
                let overlaps = |other: &&modules::Module| {
                    other.name != module.name
                        && (Path::new(&module.name).starts_with(&other.name)
                            || Path::new(&other.name).starts_with(&module.name))
                };
                if modules.iter().any(|other| overlaps(&other)) {
                    return Err(fail("its name is within that of another submodule"));
                }
                let git_dir = module_dir(above, &module.name)?;
                let steps = |path: &Path| path.components().count();
                // From the files up to the `.git` directory's own, and down into it; and back.
                let own = git_dir.strip_prefix(target.root).unwrap_or(&git_dir);
                let files = path.strip_prefix(target.root).unwrap_or(&path);
                let to_git = format!("{}{}", "../".repeat(steps(files)), own.display());
                let to_files = format!("{}{}", "../".repeat(steps(own)), files.display());
                let file = path.join(".git");
                write_new(&dir, ".git", format!("gitdir: {to_git}\n").as_bytes())
                    .map_err(io_error("writing", &file))?;
                Some((git_dir, Some(to_files)))
            }
        };
        let target = Target {
            dir: dir.as_fd(),
            path: &path,
            subdir: &[],
            root: target.root,
            git_dir,
        };
        self.repository(
            &remote,
            None,
            &want,
            &target,
            &no_names,
            true,
            usage,
            depth + 1,
        )?;
        Ok(Some((module.name.clone(), remote.shown)))
    }

    /// Receives the wanted object and what it needs; only that where the server can do so.
    fn receive<'s>(
        &'s self,
        remote: &Remote,
        mut server: Server<'s>,
        want: &Want<'_>,
        scratch: &Path,
    ) -> Result<(Objects, ObjectId), GitError> {
        let unknown = || GitError::UnknownCommit {
            remote: remote.shown.clone(),
            commit: want.id.to_owned(),
        };
        // A hash of the other kind is none that the server can have.
        let id = parse_id(want.id, server.hash).ok_or_else(unknown)?;
        let limits = &self.options.limits;
        let take = |server: &mut Server<'_>, wants: &[ObjectId], alone| {
            let hash = server.hash;
            server.pack(wants, alone, limits.pack_bytes, |pack| {
                Objects::receive(pack, scratch, hash, &remote.shown, limits, &self.watch)
            })
        };
        let prefixes = ["refs/heads/".to_owned(), "refs/tags/".to_owned()];
        let mut ask = !want.is_hash || server.gives_any_commit();
        if !ask {
            let tips = server.references(&prefixes)?;
            ask = tips.iter().any(|tip| tip.id == id);
        }
        if ask {
            match take(&mut server, &[id], true) {
                Ok(objects) => return Ok((objects, id)),
                Err(GitError::Server { message, .. }) if is_not_there(&message) => {
                    return Err(unknown());
                }
                Err(GitError::Server { message, .. }) if want.is_hash && is_refused(&message) => {}
                Err(error) => return Err(error),
            }
        }
        // It is not given by its hash alone, so it must be in the history of something.
        tracing::info!(
            remote = remote.shown,
            commit = want.id,
            "the server gives no commits by hash: fetching all branches and tags"
        );
        let mut server = if matches!(remote.location, Location::Http(_)) {
            server
        } else {
            // An old server says nothing more after a request; and one connection is enough.
            drop(server);
            self.connect(remote)?
        };
        let tips = server.references(&prefixes)?;
        let wants: BTreeSet<ObjectId> = tips.iter().map(|tip| tip.id).collect();
        if wants.is_empty() {
            return Err(unknown());
        }
        let wants: Vec<ObjectId> = wants.into_iter().collect();
        let objects = take(&mut server, &wants, false)?;
        if !objects.contains(&id) {
            return Err(unknown());
        }
        Ok((objects, id))
    }
}

/// Git's own servers say this, in the second version of the protocol, only where an object
/// does not exist.
fn is_not_there(message: &str) -> bool {
    message.contains("not our ref")
}

/// What other servers say where they do not like a hash.
fn is_refused(message: &str) -> bool {
    ["unadvertised object", "not valid", "not allowed"]
        .iter()
        .any(|text| message.contains(text))
}

/// A whole hash, as BuildKit recognises one.
fn is_hash(text: &str) -> bool {
    matches!(text.len(), 40 | 64)
        && text
            .bytes()
            .all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
}

/// # Errors
/// [`GitError::Checksum`] where no hash begins with the checksum.
fn check(checksum: Option<&str>, remote: &str, hashes: &[&str]) -> Result<(), GitError> {
    match checksum {
        Some(want) if !hashes.iter().any(|hash| hash.starts_with(want)) => {
            Err(GitError::Checksum {
                remote: remote.to_owned(),
                want: want.to_owned(),
                got: hashes.join(" or "),
            })
        }
        _ => Ok(()),
    }
}

/// The branch that `HEAD` is on.
fn default_branch(server: &mut Server<'_>, remote: &Remote) -> Result<Reference, GitError> {
    let fail = || GitError::NoDefaultBranch {
        remote: remote.shown.clone(),
    };
    let mut references = server.references(&["HEAD".to_owned()])?;
    let at = references.iter().position(|r| r.name == "HEAD");
    let mut head = references.swap_remove(at.ok_or_else(fail)?);
    match head.target.take() {
        Some(name) if name.starts_with("refs/heads/") => {
            head.name = name;
            Ok(head)
        }
        _ => Err(fail()),
    }
}

/// The reference of that name: whole, or a branch's, or a tag's, in this order.
fn named(server: &mut Server<'_>, remote: &Remote, name: &str) -> Result<Reference, GitError> {
    let below = |prefix: &str| format!("{prefix}{}", name.strip_prefix(prefix).unwrap_or(name));
    let wanted = [below("refs/"), below("refs/heads/"), below("refs/tags/")];
    let mut references = server.references(&wanted)?;
    for name in &wanted {
        if let Some(at) = references.iter().position(|r| r.name == *name) {
            return Ok(references.swap_remove(at));
        }
    }
    let all = server.references(&["refs/heads/".to_owned(), "refs/tags/".to_owned()]);
    Err(GitError::UnknownRef {
        remote: remote.shown.clone(),
        reference: name.to_owned(),
        hint: all.map_or_else(|_| String::new(), |all| hint(name, &all)),
    })
}

/// What may have been meant by a name that is not there.
fn hint(name: &str, all: &[Reference]) -> String {
    if name == "HEAD" {
        return "; for the default branch name no ref at all".to_owned();
    }
    let is_short = |text: &str| (4..64).contains(&text.len()) && !is_hash(text);
    if is_short(name) && name.bytes().all(|b| b.is_ascii_hexdigit()) {
        let whole = all
            .iter()
            .flat_map(|r| [Some(r.id), r.peeled])
            .flatten()
            .map(|id| id.to_string())
            .find(|id| id.starts_with(&name.to_ascii_lowercase()));
        return match whole {
            Some(whole) => format!("; a commit must be named by its whole hash: {whole}"),
            None => "; a commit must be named by its whole hash, because servers do not look \
                     up shortened ones"
                .to_owned(),
        };
    }
    let short = |name: &str| {
        let name = name.strip_prefix("refs/").unwrap_or(name);
        let name = name.strip_prefix("heads/").unwrap_or(name);
        name.strip_prefix("tags/").unwrap_or(name).to_owned()
    };
    let wanted = short(name);
    let mut near: Vec<(usize, String)> = all
        .iter()
        .take(COMPARED_NAMES)
        .map(|r| short(&r.name))
        .filter(|other| other.len() < 256 && wanted.len() < 256)
        .map(|other| (strsim::levenshtein(&wanted, &other), other))
        .filter(|(distance, other)| {
            *distance <= 2 || other.contains(&wanted) || (wanted.contains(other) && other.len() > 2)
        })
        .collect();
    near.sort();
    near.dedup();
    let near: Vec<String> = near
        .into_iter()
        .take(SUGGESTED_NAMES)
        .map(|(_, name)| format!("{name:?}"))
        .collect();
    match near.as_slice() {
        [] => format!(
            "; it has {} branches and tags, none with a name like that",
            all.len()
        ),
        near => format!("; did you mean {}?", near.join(" or ")),
    }
}

/// The names that the commit gets in a `.git` directory: those that BuildKit's `git fetch` gives it.
fn reference_names(resolved: &Commit, reference: &GitRef, is_annotated: bool) -> Vec<String> {
    let Some(full) = resolved.reference.clone() else {
        return Vec::new();
    };
    let mut names = vec![full.clone()];
    // A tag's short name becomes a branch's there, beside the tag.
    if let (Some(tag), Some(given)) = (full.strip_prefix("refs/tags/"), &reference.reference)
        && tag == given
        && !is_annotated
    {
        names.push(format!("refs/heads/{tag}"));
    }
    names
}

/// The header that a remote is shown, from the first secret that there is.
fn authorization(remote: &Remote, options: &Options) -> Result<Option<Authorization>, GitError> {
    let Location::Http(url) = &remote.location else {
        return Ok(None);
    };
    let host = url.host_str().unwrap_or_default();
    let host = match url.port() {
        Some(port) => format!("{host}:{port}"),
        None => host.to_owned(),
    };
    let refused = |reason: String| GitError::Remote {
        remote: remote.shown.clone(),
        reason,
    };
    let found = options.secrets.git_auth(&host);
    let Some(found) = found.map_err(|error| refused(error.to_string()))? else {
        return Ok(None);
    };
    let mut header = HeaderValue::from_str(found.expose()).map_err(|_| {
        let id = found.secret_id();
        refused(format!(
            "the secret {id} has characters that no HTTP header can have"
        ))
    })?;
    header.set_sensitive(true);
    // Repositories of GitHub often have submodules there that need the same token.
    let is_github = url.scheme() == "https"
        && url.port().is_none()
        && matches!(url.host_str(), Some("github.com" | "www.github.com"));
    let mut scope = url.clone();
    if is_github {
        scope.set_path("/");
    }
    Ok(Some(Authorization { scope, header }))
}

/// Makes the directories above the one that the submodule `name` has in the `.git` directory
/// `above`, and says where it will be.
fn module_dir(above: &Path, name: &str) -> Result<PathBuf, GitError> {
    let dir = above.join("modules").join(name);
    let mut missing = Vec::new();
    let mut at = dir.parent();
    while let Some(path) = at.filter(|path| !path.exists()) {
        missing.push(path);
        at = path.parent();
    }
    for path in missing.into_iter().rev() {
        gitdir::make_directory(path)?;
    }
    Ok(dir)
}

fn open_below(dir: BorrowedFd<'_>, path: &Path) -> io::Result<OwnedFd> {
    let mut here = rustix::io::fcntl_dupfd_cloexec(dir, 0)?;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    for part in path {
        here = rustix::fs::openat(&here, part, flags, Mode::empty())?;
    }
    Ok(here)
}

fn write_new(dir: &OwnedFd, name: &str, bytes: &[u8]) -> io::Result<()> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mode = Mode::from_raw_mode(0o644);
    let fd = rustix::fs::openat(dir, name, flags, mode)?;
    rustix::fs::fchmod(&fd, mode)?;
    io::Write::write_all(&mut fs::File::from(fd), bytes)
}

/// Gives everything in `dir`, and itself, one time. What is there was written by this module,
/// no deeper than it writes.
fn set_times(dir: &OwnedFd, seconds: i64) -> io::Result<()> {
    let time = Timespec {
        tv_sec: seconds,
        tv_nsec: 0,
    };
    let times = Timestamps {
        last_access: time,
        last_modification: time,
    };
    for (name, kind) in confined::list(dir.as_fd())? {
        if kind == FileType::Directory {
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            set_times(
                &rustix::fs::openat(dir, &name, flags, Mode::empty())?,
                seconds,
            )?;
        } else {
            rustix::fs::utimensat(dir, &name, &times, AtFlags::SYMLINK_NOFOLLOW)?;
        }
    }
    Ok(rustix::fs::futimens(dir, &times)?)
}

/// A path of a repository for people.
fn display(path: &[u8]) -> String {
    String::from_utf8_lossy(path).into_owned()
}

/// Names what was done to which path.
fn io_error(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> GitError {
    let path = path.to_owned();
    move |source| GitError::Io {
        doing,
        path,
        source,
    }
}
