//! Cgroups: where this program may make them, and one for each step that has limits.
//!
//! A [`Place`] is found once: below this program's own cgroup in each hierarchy of version 1; in
//! version 2 below its own where that may have controllers, else beside it. There, a cgroup that
//! has controllers has no processes of its own, except the topmost one, so where nothing but this
//! program is in it, it moves into [`OWN_LEAF`]; this is how a service with systemd's `Delegate=yes`
//! and a container with a writable `/sys/fs/cgroup` come by limits.
//!
//! A [`Group`] is the cgroup of one step. The innermost stage enters it by itself, through files that
//! were opened here: so nothing but the step counts, and no runtime has to know of it. It is removed
//! when the step has ended. One that this program could not remove, because it was killed, is found
//! by the next, see [`group`].

mod files;
mod group;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Component, Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use super::SandboxError;
use super::mounts::unescape;
use super::resources::Limits;

pub(super) use files::Controller;
use files::Version;
pub(super) use group::{Group, enter};

/// The cgroup of this program itself, where its own former one is to have controllers.
const OWN_LEAF: &str = "sockless-main";

/// Where the cgroups of steps are made.
#[derive(Clone, Debug, Default)]
pub(super) struct Place {
    homes: BTreeMap<Controller, Result<Home, String>>,
}

/// Where one controller has them.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Home {
    dir: PathBuf,
    version: Version,
}

impl Place {
    /// No place for any.
    #[cfg(test)]
    pub(super) fn nowhere(why: &str) -> Self {
        let homes = Controller::ALL.map(|controller| (controller, Err(why.to_owned())));
        Self {
            homes: homes.into(),
        }
    }

    /// The place for cgroups with `limits`. It is looked for once.
    ///
    /// # Errors
    /// [`SandboxError::Asked`] where the cgroup that was named cannot be used at all.
    pub(super) fn of(limits: &Limits) -> Result<Arc<Self>, SandboxError> {
        type Known = BTreeMap<(Option<PathBuf>, BTreeSet<Controller>), Arc<Place>>;
        static KNOWN: Mutex<Known> = Mutex::new(BTreeMap::new());
        let wanted = match limits.cgroup_parent {
            // Its own limits are wanted, whatever they are.
            Some(_) => Controller::ALL.into(),
            None => limits.controllers(),
        };
        let key = (limits.cgroup_parent.clone(), wanted);
        let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(place) = known.get(&key) {
            return Ok(Arc::clone(place));
        }
        let place = Self::find(key.0.as_deref(), &key.1);
        if let Some(parent) = &key.0
            && let Some(Err(why)) = place.homes.values().find(|home| home.is_err())
            && place.homes.values().all(Result::is_err)
        {
            return Err(SandboxError::Asked {
                doing: format!("using the cgroup {}", parent.display()),
                reason: why.clone(),
            });
        }
        let place = Arc::new(place);
        known.insert(key, Arc::clone(&place));
        Ok(place)
    }

    fn find(parent: Option<&Path>, wanted: &BTreeSet<Controller>) -> Self {
        if wanted.is_empty() {
            return Self::default();
        }
        let read = |path: &str| {
            std::fs::read_to_string(path).map_err(|error| format!("reading {path}: {error}"))
        };
        let texts = read("/proc/self/cgroup")
            .and_then(|cgroup| Ok((cgroup, read("/proc/self/mountinfo")?)));
        let (cgroup, mountinfo) = match texts {
            Ok(texts) => texts,
            Err(why) => {
                let homes = wanted.iter().map(|&one| (one, Err(why.clone())));
                return Self {
                    homes: homes.collect(),
                };
            }
        };
        let hierarchies = hierarchies(&cgroup, &mountinfo);
        let mut homes = BTreeMap::new();
        let mut of_v2 = BTreeSet::new();
        for &controller in wanted {
            let v1 = hierarchies
                .iter()
                .find(|one| one.controllers.iter().any(|name| name == controller.name()));
            match v1 {
                Some(hierarchy) => {
                    homes.insert(controller, home_v1(hierarchy, parent));
                }
                None => {
                    of_v2.insert(controller);
                }
            }
        }
        if !of_v2.is_empty() {
            let v2 = hierarchies.iter().find(|one| one.controllers.is_empty());
            let v2 = v2.ok_or_else(|| "no cgroup hierarchy is mounted here".to_owned());
            let names: Vec<&str> = of_v2.iter().map(|controller| controller.name()).collect();
            let found = v2.and_then(|v2| v2::find(v2, parent, &names));
            homes.extend(of_v2.into_iter().map(|controller| {
                let home = match &found {
                    Ok((dir, names)) if names.contains(controller.name()) => Ok(Home {
                        dir: dir.clone(),
                        version: Version::V2,
                    }),
                    Ok((dir, _)) => Err(format!(
                        "the cgroup {} does not have the controller {} (systemd: Delegate={})",
                        dir.display(),
                        controller.name(),
                        controller.name(),
                    )),
                    Err(why) => Err(why.clone()),
                };
                (controller, home)
            }));
        }
        for home in homes.values().flatten() {
            group::sweep(&home.dir);
        }
        Self { homes }
    }

    /// Whether a controller's limits hold.
    pub(super) fn has(&self, controller: Controller) -> bool {
        matches!(self.homes.get(&controller), Some(Ok(_)))
    }

    /// Why they do not.
    pub(super) fn missing(&self, controller: Controller) -> Option<&str> {
        let home = self.homes.get(&controller)?;
        home.as_ref().err().map(String::as_str)
    }

    /// Whether the kernel counts swap for cgroups.
    pub(super) fn counts_swap(&self) -> bool {
        match self.homes.get(&Controller::Memory) {
            // The topmost one of version 2 has no such file.
            Some(Ok(home)) => match Group::empty(&home.dir) {
                Ok(trial) => trial.path().join(files::swap_file(home.version)).exists(),
                Err(_) => false,
            },
            _ => false,
        }
    }
}

/// A mounted hierarchy, as this process sees it.
#[derive(Debug, PartialEq, Eq)]
struct Hierarchy {
    /// Those of version 1; none for version 2.
    controllers: Vec<String>,
    /// The topmost cgroup that can be seen.
    top: PathBuf,
    /// This process's own; absent where it lies outside of what can be seen.
    own: Option<PathBuf>,
}

impl Hierarchy {
    /// The cgroup that somebody named, or this process's own.
    fn start(&self, named: Option<&Path>) -> Result<PathBuf, String> {
        let own = self
            .own
            .clone()
            .ok_or_else(|| format!("its own cgroup cannot be seen in {}", self.top.display()));
        let Some(named) = named else { return own };
        if named.components().any(|part| part == Component::ParentDir) {
            return Err(format!("{} has \"..\" in it", named.display()));
        }
        let dir = match named.strip_prefix("/") {
            Ok(below) => self.top.join(below),
            Err(_) => own?.join(named),
        };
        match dir.is_dir() {
            true => Ok(dir),
            false => Err(format!("there is no cgroup {}", dir.display())),
        }
    }
}

/// The hierarchies in `/proc/self/mountinfo` with the places in `/proc/self/cgroup`; see
/// `cgroups(7)`.
fn hierarchies(cgroup: &str, mountinfo: &str) -> Vec<Hierarchy> {
    // `hierarchy:controllers:path`; of version 2 there are no controllers.
    let paths: Vec<(Vec<&str>, &str)> = cgroup
        .lines()
        .filter_map(|line| {
            let mut fields = line.splitn(3, ':');
            let (_, controllers, path) = (fields.next()?, fields.next()?, fields.next()?);
            let controllers = controllers.split(',').filter(|name| !name.is_empty());
            Some((controllers.collect(), path))
        })
        .collect();
    let mounted = |line: &str| -> Option<Hierarchy> {
        let (left, right) = line.split_once(" - ")?;
        let left: Vec<&str> = left.split(' ').collect();
        let (root, top) = (unescape(left.get(3)?), unescape(left.get(4)?));
        let mut right = right.split(' ');
        let (kind, options) = (right.next()?, right.nth(1)?);
        let options: Vec<&str> = options.split(',').collect();
        let (controllers, path) = paths.iter().find(|(controllers, _)| match kind {
            "cgroup2" => controllers.is_empty(),
            "cgroup" => {
                !controllers.is_empty() && controllers.iter().all(|name| options.contains(name))
            }
            _ => false,
        })?;
        let top = PathBuf::from(top);
        let below = Path::new(path).strip_prefix(PathBuf::from(root)).ok();
        let below = below.filter(|path| path.components().all(|p| p != Component::ParentDir));
        Some(Hierarchy {
            controllers: controllers.iter().map(|&name| name.to_owned()).collect(),
            own: below.map(|below| match below.as_os_str().is_empty() {
                true => top.clone(),
                false => top.join(below),
            }),
            top,
        })
    };
    mountinfo.lines().filter_map(mounted).collect()
}

fn home_v1(hierarchy: &Hierarchy, parent: Option<&Path>) -> Result<Home, String> {
    let dir = hierarchy.start(parent)?;
    try_in(&dir)?;
    Ok(Home {
        dir,
        version: Version::V1,
    })
}

/// Whether a cgroup can be made in `dir`: it is made, and removed again.
fn try_in(dir: &Path) -> Result<(), String> {
    Group::empty(dir)
        .map(drop)
        .map_err(|error| cannot(dir, &error))
}

fn cannot(dir: &Path, error: &io::Error) -> String {
    format!("no cgroup can be made in {}: {error}", dir.display())
}

mod v2;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hierarchies_are_those_that_are_mounted() {
        let cgroup = "12:cpu,cpuacct:/user.slice\n4:memory:/docker/ab/inner\n3:pids:/elsewhere\n\
                      1:name=systemd:/x\n0::/../out\n";
        let mountinfo = "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755\n\
                         32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n\
                         35 31 0:32 /docker/ab /sys/fs/cgroup/my\\040memory rw shared:1 - cgroup cgroup rw,memory\n\
                         36 31 0:33 /here /sys/fs/cgroup/pids rw - cgroup cgroup rw,pids\n\
                         39 31 0:36 / /sys/fs/cgroup/freezer rw - cgroup cgroup rw,freezer\n\
                         41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n";
        let hierarchy = |controllers: &[&str], top: &str, own: Option<&str>| Hierarchy {
            controllers: controllers.iter().map(|&name| name.to_owned()).collect(),
            top: format!("/sys/fs/cgroup/{top}").into(),
            own: own.map(|own| format!("/sys/fs/cgroup/{own}").into()),
        };
        assert_eq!(
            hierarchies(cgroup, mountinfo),
            [
                hierarchy(
                    &["cpu", "cpuacct"],
                    "cpu,cpuacct",
                    Some("cpu,cpuacct/user.slice")
                ),
                hierarchy(&["memory"], "my memory", Some("my memory/inner")),
                hierarchy(&["pids"], "pids", None),
                hierarchy(&[], "unified", None),
            ]
        );
        let own = "0::/\n";
        let v2 = "41 31 0:38 / /sys/fs/cgroup rw,relatime - cgroup2 cgroup2 rw\n";
        assert_eq!(hierarchies(own, v2)[0].own, Some("/sys/fs/cgroup".into()));
        assert_eq!(hierarchies("", ""), []);
    }

    #[test]
    fn a_named_cgroup_is_there_and_inside() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("own/below")).unwrap();
        let hierarchy = Hierarchy {
            controllers: Vec::new(),
            top: dir.path().to_owned(),
            own: Some(dir.path().join("own")),
        };
        let start = |named: &str| hierarchy.start(Some(Path::new(named)));
        assert_eq!(hierarchy.start(None), Ok(dir.path().join("own")));
        assert_eq!(start("/own"), Ok(dir.path().join("own")));
        assert_eq!(start("below"), Ok(dir.path().join("own/below")));
        assert_eq!(
            start("/below"),
            Err(format!("there is no cgroup {}/below", dir.path().display()))
        );
        assert_eq!(
            start("/own/../.."),
            Err("/own/../.. has \"..\" in it".to_owned())
        );
    }
}
