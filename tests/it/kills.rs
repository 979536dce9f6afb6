//! Builds killed with SIGKILL at every moment of their work, for each way to make a root filesystem
//! and for whoever has one ID only: nothing of them stays but what the next build, or `prune`,
//! removes.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::soak::{Random, ended, nothing_runs, seed};
use crate::store::{EMPTY, asked, digest_in, files, sockless};
use crate::support::registry::Registry;
use crate::support::sockless::Place;
use crate::support::{images, namespaces, programs};

/// A way to build, and how many builds of it are killed.
struct Way {
    name: &'static str,
    /// What starts sockless.
    before: &'static [&'static str],
    args: &'static [&'static str],
    kills: usize,
}

const WAYS: &[Way] = &[
    Way {
        name: "overlays",
        before: &[],
        args: &["--rootfs=overlay"],
        kills: 100,
    },
    Way {
        name: "copies",
        before: &[],
        args: &["--rootfs=copy"],
        kills: 60,
    },
    // Its steps are traced.
    Way {
        name: "one ID",
        before: &["unshare", "--user", "--map-root-user"],
        args: &[],
        kills: 60,
    },
];

/// Builds at a time.
const AT_ONCE: usize = 4;

/// So many parts of a build's duration have the same number of kills.
const PARTS: usize = 10;

/// After so many builds everything is removed from the store, and the base is fetched again.
const PRUNED_AFTER: usize = 8;

/// `mark` is in the command line of each process of a step.
fn dockerfile(mark: &str) -> String {
    format!(
        "FROM busybox\n\
         RUN --network=none : {mark}; mkdir /d && seq 1 5000 > /d/list && chmod 700 /d\n\
         COPY data /data\n\
         RUN --network=none --mount=type=cache,target=/cache : {mark}; echo x > /cache/x; \
         (sleep 0.05; seq 1 3000 > /own) & wait; rm /d/list\n"
    )
}

/// A store of one way, and what builds in it.
struct Site<'w> {
    way: &'w Way,
    place: Place,
    context: PathBuf,
    upstream: &'w Registry,
}

impl<'w> Site<'w> {
    /// Whose steps have `mark` in their command lines, or the name of the place.
    fn new(way: &'w Way, upstream: &'w Registry, mark: Option<&str>) -> Self {
        let place = Place::new();
        let own = place.dir.path().display().to_string();
        let mark = mark.unwrap_or(&own);
        let data = "data\n".repeat(2000);
        let files = [("Dockerfile", dockerfile(mark)), ("data", data)];
        let files = files.each_ref().map(|(name, text)| (*name, text.as_str()));
        let context = place.context("context", &files);
        Self {
            way,
            place,
            context,
            upstream,
        }
    }

    /// The place's own directory, whose name occurs nowhere else on this machine.
    fn mark(&self) -> String {
        self.place.dir.path().display().to_string()
    }

    fn command(&self, metadata: &Path, log: &Path) -> Command {
        let mut command = self.place.wrapped(self.way.before);
        command
            .env("SOURCE_DATE_EPOCH", "1700000000")
            .args(["build", "--progress=plain", "--no-cache"])
            .args(["-o", "type=cacheonly"])
            .arg(format!(
                "--registry-mirror=docker.io={}",
                self.upstream.url()
            ))
            .args(self.way.args)
            .arg("--metadata-file")
            .arg(metadata)
            .arg(&self.context)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(log).expect("ours"));
        command
    }

    /// Builds, or is killed; the image's digest, or nothing.
    #[track_caller]
    fn build(&self, number: usize, kill_after: Option<Duration>) -> Option<String> {
        let metadata = self.place.dir.join(format!("metadata-{number}.json"));
        let log = self.place.dir.join(format!("log-{number}"));
        let status = ended(self.command(&metadata, &log), kill_after);
        if status.success() {
            return Some(digest_in(&metadata));
        }
        let said = std::fs::read_to_string(&log).unwrap_or_default();
        let is_killed = kill_after.is_some() && status.code().is_none();
        let name = self.way.name;
        assert!(is_killed, "build {number} on {name}: {status}\n{said}");
        None
    }

    /// What a store has left when all was removed: the size of each file.
    #[track_caller]
    fn pruned(&self) -> BTreeMap<String, u64> {
        let used = asked(&self.place, &["du"]);
        assert_eq!(
            used["bytes"], used["reclaimable_bytes"],
            "nobody holds anything"
        );
        sockless(&self.place, &["prune", "--all"]).success();
        let root = self.place.dir.join("store");
        let size = |name: &String| {
            let found = root.join(name).symlink_metadata().expect("just listed");
            // A directory that once had many names stays as long.
            if found.is_dir() { 0 } else { found.size() }
        };
        let files = files(&self.place);
        files
            .into_iter()
            .map(|name| (name.clone(), size(&name)))
            .collect()
    }
}

/// The digest, how long a build takes beside others, and what a store that saw no kill has when
/// all was removed.
fn reference(site: &Site<'_>) -> (String, Duration, BTreeMap<String, u64>) {
    let started = Instant::now();
    let digests: Vec<_> = std::thread::scope(|scope| {
        let builds: Vec<_> = (0..AT_ONCE)
            .map(|number| scope.spawn(move || site.build(number, None)))
            .collect();
        builds.into_iter().map(|build| build.join()).collect()
    });
    let duration = started.elapsed();
    let digests: Vec<_> = digests
        .into_iter()
        .map(|digest| digest.unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
        .map(|digest| digest.expect("nobody killed it"))
        .collect();
    assert!(digests.iter().all(|digest| *digest == digests[0]));
    nothing_runs(&site.mark());
    (digests[0].clone(), duration, site.pruned())
}

#[test]
fn sandbox_builds_that_are_killed_at_any_moment_leave_nothing() {
    needs!(programs(&["bwrap", "unshare"]), namespaces());
    let upstream = match images::busybox() {
        Ok(registry) => registry,
        Err(reason) => skip!("{reason}"),
    };
    let seed = seed();
    let mut all = 0;
    for way in WAYS {
        all += kill_builds(way, &upstream, seed);
    }
    assert!(all >= 200, "{all} builds were killed");
}

/// Has builds killed in one store, and looks at what is left; how many were.
fn kill_builds(way: &Way, upstream: &Registry, seed: u64) -> usize {
    let unkilled = Site::new(way, upstream, None);
    let (expected, duration, clean) = reference(&unkilled);
    // The same Dockerfile, and so the same image, in another store.
    let mark = unkilled.mark();
    let site = Site::new(way, upstream, Some(&mark));
    let random = Mutex::new(Random::new(seed));
    let (next, killed) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let work = || {
        while killed.load(Ordering::Relaxed) < way.kills {
            let number = next.fetch_add(1, Ordering::Relaxed);
            assert!(
                number < way.kills * 3,
                "most builds end too early: seed {seed}"
            );
            if number % PRUNED_AFTER == PRUNED_AFTER - 1 {
                sockless(&site.place, &["prune", "--all"]).success();
            }
            let part = duration / PARTS as u32;
            let within = random.lock().expect("no panic while held").below(1000);
            let after = part * (number % PARTS) as u32 + part * within as u32 / 1000;
            match site.build(number, Some(after)) {
                Some(digest) => assert_eq!(digest, expected, "build {number} on {}", way.name),
                None => drop(killed.fetch_add(1, Ordering::Relaxed)),
            }
        }
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..AT_ONCE).map(|_| scope.spawn(work)).collect();
        for worker in workers {
            let ended = worker.join();
            ended.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        }
    });
    let killed = killed.load(Ordering::Relaxed);
    let builds = next.load(Ordering::Relaxed);
    eprintln!("{}: {killed} of {builds} builds were killed", way.name);

    // No process, and nothing mounted, neither here nor where a process is.
    nothing_runs(&mark);
    nothing_runs(&site.mark());
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").expect("Linux");
    assert!(
        !mounts.contains(&site.mark()),
        "something is mounted:\n{mounts}"
    );
    for name in ["tmp", "run"] {
        let left: Vec<_> = std::fs::read_dir(site.place.dir.join(name))
            .expect("ours")
            .flatten()
            .map(|entry| entry.path())
            .collect();
        assert_eq!(
            left,
            [""; 0].map(PathBuf::from),
            "{}: seed {seed}",
            way.name
        );
    }
    // The next build is what every build is, and removes what the others have begun.
    assert_eq!(site.build(builds, None), Some(expected), "seed {seed}");
    let unfinished = std::fs::read_dir(site.place.dir.join("store/tmp")).expect("ours");
    let unfinished: Vec<_> = unfinished.flatten().map(|entry| entry.path()).collect();
    let name = way.name;
    assert_eq!(
        unfinished,
        [""; 0].map(PathBuf::from),
        "{name}: seed {seed}"
    );
    sockless(&site.place, &["store", "verify"]).success();
    let left = site.pruned();
    assert_eq!(left, clean, "{}: seed {seed}", way.name);
    let names: Vec<&str> = left.keys().map(String::as_str).collect();
    assert_eq!(names, EMPTY, "{}: seed {seed}", way.name);
    killed
}
