//! What a build would find on this host: sandboxes, root filesystems, networks, the store and
//! registries joined into one document, for `sockless doctor`. Nothing of the host is changed.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use futures_util::future::join_all;
use serde::{Deserialize, Serialize};

use crate::failure::{Failure, Kind};
use crate::image::{DOCKER_HUB, Repository};
use crate::registry::{self, Client, Examined};
use crate::rootfs;
use crate::sandbox::World;
use crate::sandbox::doctor::{self, Filters, Guards, Helper, Lack, Program, RungReport};
use crate::store;

/// The number of the form of [`Report`]. Fields are added without a new one.
pub const VERSION: u32 = 1;

/// The document of `sockless doctor --json`.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// [`VERSION`].
    pub version: u32,
    /// Who asks.
    pub user: User,
    /// The kernel's release, such as `6.12.1`.
    pub kernel: String,
    /// What guards this process.
    pub guards: Guards,
    /// Each rung of the ladder, the best first.
    pub rungs: Vec<RungReport>,
    /// What a build with RUN steps would take.
    pub build: Outlook,
    /// What works on the rung that a build would take; absent where it could not be tried.
    pub inside: Option<Inside>,
    /// Registries; empty where none was asked for.
    pub registries: Vec<Examined>,
}

/// Who asks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct User {
    /// Name, or number where there is none.
    pub name: String,
    /// Number.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

/// What a build with RUN steps would take here.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Outlook {
    /// Whether it would run them.
    pub works: bool,
    /// On which rung; absent where there is none.
    pub rung: Option<u8>,
    /// In which sandbox.
    pub sandbox: Option<String>,
    /// `overlay` or `copy`.
    pub rootfs: Option<String>,
    /// `private` or `host`.
    pub network: Option<String>,
    /// The helper that makes it private.
    pub network_helper: Option<String>,
    /// Why it would not.
    pub lacks: Vec<Lack>,
}

/// What works in the namespaces that a build would enter.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Inside {
    /// The rung's number.
    pub rung: u8,
    /// How many users there are inside of a user namespace with subordinate IDs.
    pub users: Option<u64>,
    /// How many groups.
    pub groups: Option<u64>,
    /// Programs that run steps, in the order in which they are taken.
    pub sandboxes: Vec<Program>,
    /// Helpers for private networks, in the same way.
    pub networks: Vec<Helper>,
    /// How root filesystems are made.
    pub rootfs: RootfsReport,
    /// The store.
    pub store: StoreReport,
    /// Where temporary files go.
    pub temporary: Place,
    /// What keeps steps beside namespaces.
    pub filters: Filters,
}

/// How root filesystems are made.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RootfsReport {
    /// `overlay` or `copy`; absent where it could not be tried.
    pub backend: Option<String>,
    /// Why it is no overlay.
    pub lacks: Vec<Lack>,
}

/// A directory that is written to.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// Where it is.
    pub path: PathBuf,
    /// Whether it can be written to.
    pub writable: bool,
    /// Why not.
    pub lacks: Vec<Lack>,
}

/// The store.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoreReport {
    /// Where it is, or would be made.
    #[serde(flatten)]
    pub place: Place,
    /// Whether it is there.
    pub exists: bool,
    /// What is free on its file system for this user, in bytes.
    pub free_bytes: Option<u64>,
    /// How many files can still be made there; absent where the file system has no such limit.
    pub free_files: Option<u64>,
}

/// Tries what a build takes in `world`, in which this process is, with the store at `root`. Blocking.
pub fn inside(root: &Path, world: &World) -> Inside {
    let (users, groups) = match world {
        World::MappedUser { uids, gids } => (Some(*uids), Some(*gids)),
        _ => (None, None),
    };
    // As `sockless build` reads it; what is neither is refused there.
    let allowed = std::env::var("SOCKLESS_ALLOW_OLD_RUNC");
    let allow_old_runc = allowed.is_ok_and(|value| ["1", "true"].contains(&value.as_str()));
    let sandboxes = doctor::sandboxes(world, allow_old_runc);
    let chosen = sandboxes.iter().find(|sandbox| sandbox.works);
    let networks = match chosen {
        Some(sandbox) if sandbox.path.is_some() => doctor::helpers(sandbox),
        _ => Vec::new(),
    };
    let mounts = chosen.is_none_or(|sandbox| sandbox.path.is_some());
    let (store, rootfs) = look_at_store(root, mounts && !matches!(world, World::None { .. }));
    Inside {
        rung: world.rung().number(),
        users,
        groups,
        networks,
        sandboxes,
        rootfs,
        store,
        temporary: look_at_temporary(),
        filters: Filters::here(),
    }
}

/// Writes to the file system of the store, and mounts there; what is made is removed.
fn look_at_store(root: &Path, mounts: bool) -> (StoreReport, RootfsReport) {
    let exists = root.is_dir();
    let mut report = StoreReport {
        place: Place {
            path: root.to_owned(),
            ..Place::default()
        },
        exists,
        ..StoreReport::default()
    };
    // Where it is not there yet, a build makes it below the first directory that is.
    let absolute = std::path::absolute(root).unwrap_or_else(|_| root.to_owned());
    let base = absolute.ancestors().find(|dir| dir.is_dir());
    let base = base.unwrap_or(Path::new("/"));
    if let Ok(found) = rustix::fs::statvfs(base) {
        report.free_bytes = Some(found.f_bavail.saturating_mul(found.f_frsize));
        report.free_files = (found.f_files > 0).then_some(found.f_favail);
    }
    let mut rootfs = RootfsReport::default();
    let made = tempfile::Builder::new()
        .prefix(".sockless-doctor-")
        .tempdir_in(base);
    match made {
        Err(error) => {
            let line = "sockless build --root DIR …, or export SOCKLESS_ROOT=DIR";
            report
                .place
                .lacks
                .push(doctor::unwritable(base, &error, line));
        }
        Ok(scratch) => {
            report.place.writable = true;
            rootfs = look_at_rootfs(scratch.path(), mounts);
            // Nothing of it is mounted any more; what an overlay has made can have no mode at all.
            if let Err(error) = store::remove_tree(scratch.path()) {
                tracing::debug!(%error, "a directory stays");
            }
        }
    }
    (report, rootfs)
}

fn look_at_rootfs(scratch: &Path, mounts: bool) -> RootfsReport {
    if !mounts {
        return RootfsReport {
            backend: Some("copy".to_owned()),
            lacks: vec![Lack::new("nothing is mounted on this rung")],
        };
    }
    let (backend, refusal) = rootfs::choose(rootfs::Choice::Auto, scratch);
    let backend = match backend {
        rootfs::Backend::Overlay => "overlay",
        rootfs::Backend::Copy | rootfs::Backend::CopyWithoutDevices => "copy",
    };
    let lacks = refusal.map(|refusal| {
        let lack = Lack::new(format!("{:#}", anyhow::Error::new(refusal)));
        lack.unlocked_by("sockless build --root DIR …, with DIR on a file system such as ext4, XFS or btrfs (in a container: a volume)")
    });
    RootfsReport {
        backend: Some(backend.to_owned()),
        lacks: lacks.into_iter().collect(),
    }
}

fn look_at_temporary() -> Place {
    let path = std::env::temp_dir();
    let lacks = match tempfile::tempdir() {
        Ok(_) => Vec::new(),
        Err(error) => {
            let line = "export TMPDIR=/a/directory/that/is/writable";
            vec![doctor::unwritable(&path, &error, line)]
        }
    };
    Place {
        writable: lacks.is_empty(),
        path,
        lacks,
    }
}

/// Everything but registries, for the store at `root`. Blocking; call it in no namespace of this
/// program's own.
pub fn host(root: &Path) -> Report {
    let rungs = doctor::rungs();
    let words: [&OsStr; 4] = [
        "doctor".as_ref(),
        "--inside".as_ref(),
        "--root".as_ref(),
        root.as_os_str(),
    ];
    let inside = doctor::ask::<Inside>(&words);
    let build = match &inside {
        Ok(inside) => outlook(inside, &rungs),
        Err(reason) => Outlook {
            lacks: vec![Lack::new(reason.clone())],
            ..Outlook::default()
        },
    };
    let (uid, gid) = (rustix::process::geteuid(), rustix::process::getegid());
    Report {
        version: VERSION,
        user: User {
            name: doctor::user_name(),
            uid: uid.as_raw(),
            gid: gid.as_raw(),
        },
        kernel: rustix::system::uname()
            .release()
            .to_string_lossy()
            .into_owned(),
        guards: Guards::here(),
        rungs,
        build,
        inside: inside.ok(),
        registries: Vec::new(),
    }
}

fn outlook(inside: &Inside, rungs: &[RungReport]) -> Outlook {
    let sandbox = inside.sandboxes.iter().find(|sandbox| sandbox.works);
    let Some(sandbox) = sandbox else {
        let lacks: Vec<Lack> = match inside.sandboxes.is_empty() {
            // Any of these would do; the best that does not ask for root comes first.
            true => rungs
                .iter()
                .filter(|rung| rung.number == 3)
                .flat_map(|rung| rung.lacks.clone())
                .collect(),
            false => {
                let all = inside.temporary.lacks.iter();
                let tried = inside.sandboxes.iter().flat_map(|program| &program.lacks);
                all.chain(tried).cloned().collect()
            }
        };
        return Outlook {
            lacks,
            ..Outlook::default()
        };
    };
    let helper = inside.networks.iter().find(|helper| helper.works);
    let network = if helper.is_some() { "private" } else { "host" };
    Outlook {
        works: inside.store.place.writable,
        rung: Some(inside.rung),
        sandbox: Some(sandbox.name.clone()),
        rootfs: inside.rootfs.backend.clone(),
        network: Some(network.to_owned()),
        network_helper: helper.map(|helper| helper.name.clone()),
        lacks: inside.store.place.lacks.clone(),
    }
}

/// Asks registries, all at once: those of `named`; without any, Docker Hub and all for which
/// credentials are kept.
///
/// # Errors
/// Settings that no client can be made of, and files with credentials that cannot be read.
pub async fn registries(
    options: registry::Options,
    named: Vec<Repository>,
    parse: impl Fn(&str) -> Option<Repository>,
) -> anyhow::Result<Vec<Examined>> {
    let client = Client::impatient(options)?;
    let mut all = named;
    if all.is_empty() {
        let mut known = client.known_registries().await.context(Failure::new(
            Kind::Configuration,
            "looking for registries that credentials are kept for",
        ))?;
        known.insert(DOCKER_HUB.to_owned());
        all = known.iter().filter_map(|name| parse(name)).collect();
    }
    let examined = join_all(all.iter().map(|repository| client.examine(repository))).await;
    Ok(examined.into_iter().flatten().collect())
}
