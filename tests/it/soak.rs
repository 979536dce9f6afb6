//! Many builds on one store at once, some of them killed: what is not killed succeeds, and what
//! is left behind is sound.

use std::fs::File;
use std::path::PathBuf;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant, SystemTime};

use crate::store::{EMPTY, asked, build, digest_in, files, sockless};
use crate::support::process::run;
use crate::support::registry::Registry;
use crate::support::sockless::Place;
use crate::support::{images, namespaces};

/// Builds in all.
const BUILDS: usize = 200;

/// Builds at a time.
const AT_ONCE: usize = 8;

/// Different Dockerfiles.
const KINDS: usize = 6;

/// One of so many is killed.
const KILLED: u64 = 4;

/// How long a build may take that nobody kills.
const PATIENCE: Duration = Duration::from_secs(120);

/// Numbers that a seed decides: xorshift64*.
pub struct Random(u64);

impl Random {
    /// Those of a seed.
    pub fn new(seed: u64) -> Self {
        Self(seed.max(1))
    }

    /// A number below `limit`.
    pub fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 32) % limit
    }
}

/// What `SOCKLESS_TEST_SEED` says, or any number; printed, so that a run can be repeated.
pub fn seed() -> u64 {
    let seed = std::env::var("SOCKLESS_TEST_SEED").ok();
    let seed = seed.and_then(|seed| seed.parse().ok()).unwrap_or_else(|| {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        now.expect("after 1970").subsec_nanos().into()
    });
    eprintln!("SOCKLESS_TEST_SEED={seed}");
    seed
}

/// Dockerfiles that share steps, layers and cache mounts. `mark` is in the command line of each
/// process of a step.
fn contexts(place: &Place, mark: &str) -> Vec<PathBuf> {
    let context = |kind: usize| {
        let dockerfile = format!(
            "FROM busybox AS tools\n\
             RUN --network=none : {mark}; seq 1 {} > /tool\n\
             FROM busybox\n\
             RUN --network=none : {mark}; mkdir /shared && seq 1 9000 > /shared/list\n\
             COPY data /data\n\
             RUN --network=none --mount=type=cache,target=/cache,id=c{},sharing={} \
             : {mark}; echo {kind} >> /cache/log; sleep 0.0{kind}; seq {kind} 5000 > /own\n\
             COPY --from=tools /tool /usr/tool\n",
            4000 + kind % 3,
            kind % 2,
            ["shared", "private", "locked"][kind % 3],
        );
        let data = format!("{}\n", kind % 2).repeat(3000);
        let name = format!("context-{kind}");
        place.context(&name, &[("Dockerfile", &dockerfile), ("data", &data)])
    };
    (0..KINDS).map(context).collect()
}

#[test]
fn sandbox_200_builds_on_one_store_survive_kills_and_pruning() {
    needs!(namespaces());
    let upstream = match images::busybox() {
        Ok(registry) => registry,
        Err(reason) => skip!("{reason}"),
    };
    let seed = seed();
    let random = Mutex::new(Random::new(seed));

    let place = Place::new();
    // The directory's own name occurs nowhere else on this machine.
    let mark = place.dir.path().display().to_string();
    let contexts = contexts(&place, &mark);
    let (expected, longest, limit) = reference(&upstream, &contexts, &mark);

    let next = AtomicUsize::new(0);
    let over = AtomicBool::new(false);
    let killed = AtomicUsize::new(0);
    let work = || {
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= BUILDS {
                return;
            }
            let (kind, kill_after) = {
                let mut random = random.lock().expect("no panic while held");
                let kind = random.below(KINDS as u64) as usize;
                let is_killed = random.below(KILLED) == 0;
                let after = random.below(longest.as_millis() as u64);
                (kind, is_killed.then(|| Duration::from_millis(after)))
            };
            let metadata = place.dir.join(format!("metadata-{number}.json"));
            let log = place.dir.join(format!("log-{number}"));
            let mut command = build(&place, &upstream, &contexts[kind], &[]);
            command.arg(format!("--store-limit={limit}"));
            command.arg("--metadata-file").arg(&metadata);
            let output = File::create(&log).expect("ours");
            command
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(output);
            let status = ended(command, kill_after);
            if status.success() {
                assert_eq!(
                    digest_in(&metadata),
                    expected[kind],
                    "build {number} of {kind}"
                );
            } else {
                let said = std::fs::read_to_string(&log).unwrap_or_default();
                let by_us = kill_after.is_some() && status.code().is_none();
                assert!(by_us, "build {number} of {kind}: {status}\n{said}");
                killed.fetch_add(1, Ordering::Relaxed);
            }
        }
    };
    std::thread::scope(|scope| {
        let pruning = scope.spawn(|| {
            let mut times = 0;
            while !over.load(Ordering::Relaxed) {
                let half = format!("--max-used-space={}", limit / 2);
                match times % 4 {
                    0 => sockless(&place, &["prune", &half]),
                    1 => sockless(&place, &["du"]),
                    2 => sockless(&place, &["prune", "--all", "--filter", "until=1s"]),
                    _ => sockless(&place, &["ls"]),
                }
                .success();
                times += 1;
            }
            times
        });
        let workers: Vec<_> = (0..AT_ONCE).map(|_| scope.spawn(work)).collect();
        let results: Vec<_> = workers.into_iter().map(|worker| worker.join()).collect();
        over.store(true, Ordering::Relaxed);
        let pruned = pruning.join();
        for result in results {
            result.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        }
        assert!(pruned.expect("every prune succeeds") > 3);
    });
    let killed = killed.load(Ordering::Relaxed);
    eprintln!("{killed} of {BUILDS} builds were killed");
    assert!(killed > 0, "nobody was killed: seed {seed}");

    nothing_runs(&mark);
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").expect("Linux");
    assert!(!mounts.contains(&mark), "something is mounted:\n{mounts}");
    let verified = sockless(&place, &["store", "verify"]);
    assert!(
        verified.status.success(),
        "seed {seed}:\n{}{}",
        verified.stdout,
        verified.stderr
    );
    let used = asked(&place, &["du"]);
    assert_eq!(
        used["bytes"], used["reclaimable_bytes"],
        "nobody holds anything"
    );
    // The last build to end brought the store below the limit, unless that one was killed.
    let pruned = asked(&place, &["prune", "--all"]);
    assert_eq!(pruned["reclaimed_bytes"], used["bytes"]);
    assert_eq!(files(&place), EMPTY, "seed {seed}");
}

/// Builds all contexts in a store of their own: their digests, how long the longest took, and a
/// limit that is too small for all of them.
fn reference(
    upstream: &Registry,
    contexts: &[PathBuf],
    mark: &str,
) -> (Vec<String>, Duration, u64) {
    let place = Place::new();
    let metadata = place.dir.join("metadata.json");
    let mut longest = Duration::ZERO;
    let mut digests = Vec::new();
    for context in contexts {
        let started = Instant::now();
        let mut command = build(&place, upstream, context, &[]);
        run(command.arg("--metadata-file").arg(&metadata)).success();
        longest = longest.max(started.elapsed());
        digests.push(digest_in(&metadata));
    }
    nothing_runs(mark);
    let bytes = asked(&place, &["du"])["bytes"].as_u64().expect("a number");
    (digests, longest, bytes * 2 / 3)
}

/// Runs a program to its end, or kills it after a while.
pub fn ended(mut command: Command, kill_after: Option<Duration>) -> ExitStatus {
    let mut child = command.spawn().expect("the program");
    let started = Instant::now();
    loop {
        if let Some(status) = child.try_wait().expect("our child") {
            return status;
        }
        if kill_after.is_some_and(|after| started.elapsed() >= after) {
            child.kill().expect("our child");
            return child.wait().expect("our child");
        }
        if started.elapsed() > PATIENCE {
            let _ = child.kill();
            let _ = child.wait();
            panic!("a build did not end within {PATIENCE:?}");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Waits until the kernel has ended all processes with `mark` in their command line or in what
/// they have mounted.
#[track_caller]
pub fn nothing_runs(mark: &str) {
    let running = || {
        let processes = std::fs::read_dir("/proc").expect("Linux").flatten();
        let marked = processes.filter_map(|process| {
            let dir = process.path();
            let id: u32 = process.file_name().to_str()?.parse().ok()?;
            let command = std::fs::read(dir.join("cmdline")).ok()?;
            let command = String::from_utf8_lossy(&command).replace('\0', " ");
            let mounts = std::fs::read_to_string(dir.join("mountinfo")).unwrap_or_default();
            let is_marked = command.contains(mark) || mounts.contains(mark);
            is_marked.then(|| format!("{id}: {command}"))
        });
        marked.collect::<Vec<_>>()
    };
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        let running = running();
        if running.is_empty() {
            return;
        }
        assert!(
            Instant::now() < deadline,
            "still running:\n{}",
            running.join("\n")
        );
        std::thread::sleep(Duration::from_millis(20));
    }
}
