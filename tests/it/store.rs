//! The store over several builds: what it has, what is removed and when, what is found damaged.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::support::process::{Ran, run};
use crate::support::registry::Registry;
use crate::support::sockless::Place;
use crate::support::{images, namespaces};

/// The registry of base images, or the end of the test.
macro_rules! upstream {
    () => {{
        needs!(namespaces());
        match images::busybox() {
            Ok(registry) => registry,
            Err(reason) => skip!("{reason}"),
        }
    }};
}

const DOCKERFILE: &str = "FROM busybox\n\
    RUN --network=none echo one > /one\n\
    COPY file /file\n\
    RUN --network=none --mount=type=cache,target=/cache,id=shelf echo x > /cache/x; echo two > /two\n";

/// `sockless ARGS` on the place's store.
#[track_caller]
pub fn sockless(place: &Place, args: &[&str]) -> Ran {
    run(place.command().args(args))
}

/// The JSON that `sockless ARGS --json` prints.
#[track_caller]
pub fn asked(place: &Place, args: &[&str]) -> Value {
    let ran = sockless(place, &[args, &["--json"]].concat()).success();
    serde_json::from_str(&ran.stdout).unwrap_or_else(|e| panic!("{e}: {}", ran.stdout))
}

/// Builds with fixed times and returns the image's digest.
#[track_caller]
fn digest(place: &Place, upstream: &Registry, context: &Path, args: &[&str]) -> String {
    let metadata = place.dir.join("metadata.json");
    let ran = run(build(place, upstream, context, args)
        .arg("--metadata-file")
        .arg(&metadata));
    ran.success();
    digest_in(&metadata)
}

/// The image's digest in a `--metadata-file`.
#[track_caller]
pub fn digest_in(metadata: &Path) -> String {
    let text = std::fs::read(metadata).unwrap_or_else(|e| panic!("{}: {e}", metadata.display()));
    let json: Value = serde_json::from_slice(&text).expect("JSON");
    json["containerimage.digest"]
        .as_str()
        .expect("a digest")
        .to_owned()
}

/// `sockless build` with fixed times, whose image goes nowhere.
pub fn build(
    place: &Place,
    upstream: &Registry,
    context: &Path,
    args: &[&str],
) -> std::process::Command {
    let mut command = place.command();
    command
        .env("SOURCE_DATE_EPOCH", "1700000000")
        .args(["build", "--progress=plain", "-o", "type=cacheonly"])
        .arg(format!("--registry-mirror=docker.io={}", upstream.url()))
        .args(args)
        .arg(context);
    command
}

fn context(place: &Place, name: &str, dockerfile: &str) -> PathBuf {
    place.context(name, &[("Dockerfile", dockerfile), ("file", "content\n")])
}

/// How many objects of each kind there are.
fn counts(du: &Value) -> BTreeMap<String, u64> {
    let kinds = du["kinds"].as_array().expect("kinds");
    let count = |kind: &Value| {
        let name = kind["kind"].as_str().expect("a name").to_owned();
        (name, kind["count"].as_u64().expect("a number"))
    };
    kinds
        .iter()
        .map(count)
        .filter(|(_, count)| *count > 0)
        .collect()
}

/// What is in the store's directory but the service's things.
pub fn files(place: &Place) -> Vec<String> {
    let root = place.dir.join("store");
    let mut found = Vec::new();
    let mut left = vec![root.clone()];
    while let Some(dir) = left.pop() {
        for entry in std::fs::read_dir(&dir).expect("ours").flatten() {
            let path = entry.path();
            if path.is_dir() {
                left.push(path.clone());
            }
            let relative = path.strip_prefix(&root).expect("below it");
            found.push(relative.display().to_string());
        }
    }
    found.sort();
    found
}

/// What an empty store has, where steps with cache mounts were built.
pub const EMPTY: [&str; 11] = [
    "blobs",
    "blobs/sha256",
    "boot.json",
    "cache",
    "cache/mounts",
    "cache/steps",
    "jobs",
    "lock",
    "tmp",
    "trees",
    "version",
];

#[test]
fn sandbox_the_store_tells_what_it_has_and_gives_it_up() {
    let (upstream, place) = (upstream!(), Place::new());
    let context = context(&place, "context", DOCKERFILE);
    let first = digest(&place, &upstream, &context, &[]);

    let du = asked(&place, &["du", "--verbose"]);
    let want = [
        ("blob", 3),
        ("mount", 1),
        ("note", 3),
        ("step", 3),
        ("tree", 4),
    ];
    assert_eq!(
        counts(&du),
        want.map(|(k, n)| (k.to_owned(), n)).into(),
        "{du:#}"
    );
    assert_eq!(du["bytes"], du["reclaimable_bytes"], "nothing runs");
    let objects = du["objects"].as_array().expect("a list");
    let sum: u64 = objects
        .iter()
        .filter_map(|object| object["bytes"].as_u64())
        .sum();
    assert_eq!(du["bytes"], sum);
    let described = |kind: &str| {
        let of = objects.iter().filter(|object| object["kind"] == kind);
        let mut names: Vec<_> = of.filter_map(|o| o["description"].as_str()).collect();
        names.sort_unstable();
        names
    };
    let steps: Vec<_> = DOCKERFILE
        .lines()
        .skip(1)
        .map(|line| line.split(' ').next())
        .collect();
    assert_eq!(described("mount"), ["shelf"]);
    let names = described("step");
    assert!(names.iter().all(|name| !name.is_empty()), "{names:?}");
    assert_eq!(described("blob"), names, "each blob is a step's");
    let trees = described("tree");
    assert_eq!(trees[0], "", "the base's");
    assert_eq!(trees[1..], names);

    let ls = asked(&place, &["ls"]);
    assert_eq!(ls.as_array().map(Vec::len), Some(steps.len()), "{ls:#}");
    assert!(
        ls[0]["layer"]
            .as_str()
            .is_some_and(|layer| layer.starts_with("sha256:"))
    );
    let table = sockless(&place, &["ls"]).success().stdout;
    assert!(table.starts_with("STEP "), "{table}");
    assert_eq!(table.lines().count(), 1 + steps.len());
    let table = sockless(&place, &["du"]).success().stdout;
    assert!(table.starts_with("KIND   COUNT  SIZE"), "{table}");

    let sound = sockless(&place, &["store", "verify"]).success().stdout;
    assert!(sound.ends_with(" is sound\n"), "{sound}");
    let nowhere = place.dir.join("nowhere");
    let ran = sockless(
        &place,
        &["store", "verify", "--root", nowhere.to_str().unwrap()],
    );
    let expected = format!("there is no store at {}\n", nowhere.display());
    assert_eq!(ran.success().stdout, expected);
    assert!(!nowhere.exists());
    let would = asked(&place, &["prune", "--dry-run"]);
    assert_eq!(would["reclaimed_bytes"], du["bytes"]);
    assert_eq!(asked(&place, &["du"])["bytes"], du["bytes"]);
    let recently = asked(&place, &["prune", "--filter", "until=1h"]);
    assert_eq!(recently["reclaimed_bytes"], 0);
    let pruned = asked(&place, &["prune"]);
    assert_eq!(pruned["reclaimed_bytes"], du["bytes"]);
    assert_eq!(pruned["left_bytes"], 0);
    assert_eq!(
        pruned["removed"].as_array().map(Vec::len),
        Some(objects.len())
    );
    assert_eq!(files(&place), EMPTY);
    assert_eq!(sockless(&place, &["prune"]).success().stdout, "Total: 0B\n");

    assert_eq!(digest(&place, &upstream, &context, &[]), first);
    sockless(&place, &["store", "verify"]).success();
}

#[test]
fn sandbox_a_limit_is_kept_after_the_build() {
    let (upstream, place) = (upstream!(), Place::new());
    let context = context(&place, "context", DOCKERFILE);
    let first = digest(&place, &upstream, &context, &[]);
    let bytes = asked(&place, &["du"])["bytes"].as_u64().expect("a number");
    let limit = bytes.to_string();
    assert_eq!(
        digest(&place, &upstream, &context, &["--store-limit", &limit]),
        first
    );
    assert_eq!(asked(&place, &["du"])["bytes"], bytes, "it is just enough");
    // Less than one build: all that it made goes when it has ended.
    assert_eq!(
        digest(&place, &upstream, &context, &["--store-limit=1"]),
        first
    );
    assert_eq!(asked(&place, &["du"])["bytes"], 0);
    assert_eq!(
        digest(&place, &upstream, &context, &["--store-limit", &limit]),
        first
    );
    assert_eq!(asked(&place, &["du"])["bytes"], bytes);
    // Trees go first: nothing is lost but time.
    let less = (bytes - 1).to_string();
    let removed = asked(&place, &["prune", "--max-used-space", &less]);
    assert_eq!(removed["removed"][0]["kind"], "tree");
    assert_eq!(removed["removed"].as_array().map(Vec::len), Some(1));
    assert_eq!(digest(&place, &upstream, &context, &[]), first);
}

#[test]
fn sandbox_a_limit_is_kept_after_a_build_that_fails_or_is_stopped() {
    let (upstream, place) = (upstream!(), Place::new());
    let begin = "FROM busybox\nRUN --network=none seq 1 9000 > /one\n";
    let fails = context(
        &place,
        "fails",
        &format!("{begin}RUN --network=none exit 3\n"),
    );
    let waits = format!(
        "{begin}RUN --network=none --mount=type=cache,target=/gate touch /gate/waiting; sleep 600\n"
    );
    let waits = context(&place, "waits", &waits);
    let bytes = || asked(&place, &["du"])["bytes"].as_u64().expect("a number");

    let failed = run(&mut build(&place, &upstream, &fails, &[])).failure();
    assert_eq!(failed.status.code(), Some(1));
    assert!(bytes() > 0, "what went well is kept");
    let failed = run(&mut build(&place, &upstream, &fails, &["--store-limit=1"])).failure();
    assert_eq!(failed.status.code(), Some(1));
    assert_eq!(bytes(), 0);

    for limit in [None, Some("--store-limit=1")] {
        let args: Vec<_> = limit.into_iter().collect();
        let mut running = Running::start(&place, build(&place, &upstream, &waits, &args));
        let gate = wait_for(&mut running.0, &place, || gate(&place, "waiting"));
        let status = running.interrupt();
        assert_eq!(status.code(), Some(130));
        assert_eq!(bytes() > 0, limit.is_none(), "{limit:?}");
        let _ = std::fs::remove_file(gate.join("waiting"));
    }
    sockless(&place, &["store", "verify"]).success();
    assert_eq!(files(&place), EMPTY);
}

/// A build under way. Dropped, it is killed.
pub struct Running(pub Child);

impl Running {
    /// Starts it; what it says goes to `waits.log`.
    pub fn start(place: &Place, mut command: std::process::Command) -> Self {
        let log = std::fs::File::create(place.dir.join("waits.log")).expect("ours");
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log);
        Self(command.spawn().expect("the program"))
    }

    /// Stops it as a keyboard does (SIGINT), and waits until it has ended.
    pub fn interrupt(&mut self) -> std::process::ExitStatus {
        let pid = rustix::process::Pid::from_child(&self.0);
        rustix::process::kill_process(pid, rustix::process::Signal::INT).expect("our child");
        self.0.wait().expect("our child")
    }
}

/// The cache mount of a step, when the step has made the file `name` in it.
fn gate(place: &Place, name: &str) -> Option<PathBuf> {
    let mounts = std::fs::read_dir(place.dir.join("store/cache/mounts")).ok()?;
    let mut gates = mounts.flatten().map(|entry| entry.path().join("0/files"));
    gates.find(|gate| gate.join(name).exists())
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn sandbox_pruning_leaves_what_a_running_build_has_found() {
    let (upstream, place) = (upstream!(), Place::new());
    let found = "FROM busybox\nRUN --network=none echo found > /found\n";
    let unused = "FROM busybox\nRUN --network=none echo unused > /unused\n";
    for (name, dockerfile) in [("found", found), ("unused", unused)] {
        digest(&place, &upstream, &context(&place, name, dockerfile), &[]);
    }
    // This one finds the first step in the cache, and then waits for us.
    let waits = format!(
        "{found}RUN --network=none --mount=type=cache,target=/gate \
         touch /gate/waiting && until test -e /gate/go; do sleep 0.05; done; cat /found > /copy\n"
    );
    let waits = context(&place, "waits", &waits);
    let metadata = place.dir.join("waits.json");
    let mut command = build(&place, &upstream, &waits, &[]);
    command.arg("--metadata-file").arg(&metadata);
    let mut running = Running::start(&place, command);
    let gate = wait_for(&mut running.0, &place, || gate(&place, "waiting"));

    let pruned = asked(&place, &["prune", "--all"]);
    let removed = pruned["removed"].as_array().expect("a list");
    let mut removed: Vec<_> = removed
        .iter()
        .map(|o| &o["kind"])
        .map(Value::to_string)
        .collect();
    removed.sort();
    assert_eq!(
        removed,
        ["\"blob\"", "\"note\"", "\"step\"", "\"tree\""],
        "those of the other: {pruned:#}"
    );
    let du = asked(&place, &["du"]);
    assert_eq!(du["reclaimable_bytes"], 0);
    let want = [("blob", 1), ("mount", 1), ("step", 1), ("tree", 2)];
    assert_eq!(
        counts(&du),
        want.map(|(k, n)| (k.to_owned(), n)).into(),
        "{du:#}"
    );

    std::fs::write(gate.join("go"), "").expect("the cache is ours");
    wait_for(&mut running.0, &place, || metadata.exists().then_some(()));
    assert!(running.0.wait().expect("our child").success());
    sockless(&place, &["store", "verify"]).success();
    asked(&place, &["prune", "--all"]);
    assert_eq!(files(&place), EMPTY);
}

/// Waits until `find` finds something, while `child` runs.
pub fn wait_for<T>(child: &mut Child, place: &Place, find: impl Fn() -> Option<T>) -> T {
    let deadline = Instant::now() + Duration::from_secs(120);
    loop {
        if let Some(found) = find() {
            return found;
        }
        let ended = child.try_wait().expect("our child");
        assert!(
            ended.is_none() && Instant::now() < deadline || find().is_some(),
            "{ended:?}:\n{}",
            std::fs::read_to_string(place.dir.join("waits.log")).unwrap_or_default()
        );
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn sandbox_after_a_restart_of_the_machine_builds_make_trees_again() {
    let (upstream, place) = (upstream!(), Place::new());
    let context = context(&place, "context", DOCKERFILE);
    let first = digest(&place, &upstream, &context, &[]);
    let trees = place.dir.join("store/trees");
    let names = || {
        let entries = std::fs::read_dir(&trees).expect("ours").flatten();
        entries.map(|entry| entry.file_name()).collect::<Vec<_>>()
    };
    assert_eq!(names().len(), 4);
    // The power went off: the last use was in another boot.
    let boot = place.dir.join("store/boot.json");
    let rewrite = |path: &Path, at: &[&str], to: &str| {
        let text = std::fs::read(path).expect("ours");
        let mut json: Value = serde_json::from_slice(&text).expect("JSON");
        let field = at.iter().fold(&mut json, |json, key| &mut json[key]);
        *field = to.into();
        std::fs::write(path, json.to_string()).expect("ours");
    };
    for name in names() {
        rewrite(
            &trees.join(name).join("info.json"),
            &["named", "boot"],
            "former",
        );
    }
    rewrite(&boot, &["boot"], "former");
    assert_eq!(counts(&asked(&place, &["du"])).get("tree"), None);
    assert_eq!(names().len(), 0);
    // The steps are in the cache all the same, and a further one has the same files.
    assert_eq!(digest(&place, &upstream, &context, &[]), first);
    let more = format!(
        "{DOCKERFILE}RUN --network=none cat /one /two /file > /all && test $(wc -l < /all) = 3\n"
    );
    digest(
        &place,
        &upstream,
        &self::context(&place, "more", &more),
        &[],
    );
    assert_eq!(names().len(), 5);
    sockless(&place, &["store", "verify"]).success();
}

#[test]
fn a_store_of_another_version_and_no_store_are_left_alone() {
    let place = Place::new();
    let store = place.dir.join("store");
    for args in [&["du"][..], &["ls"], &["prune"], &["store", "verify"]] {
        sockless(&place, args).success();
        assert_eq!(files(&place), [""; 0], "{args:?}");
    }
    std::fs::write(store.join("version"), "99\n").expect("ours");
    for args in [
        &["du"][..],
        &["ls"],
        &["prune", "--all"],
        &["store", "verify", "--repair"],
    ] {
        let refused = sockless(&place, args).failure();
        assert_eq!(refused.status.code(), Some(70), "{args:?}");
        refused.says("is of version \"99\", and this sockless reads version \"2\"");
        assert_eq!(files(&place), ["version"], "{args:?}");
    }
}

#[test]
fn what_is_damaged_is_named_and_repaired() {
    let place = Place::new();
    let context = place.context(
        "context",
        &[("Dockerfile", "FROM scratch\nCOPY f /\n"), ("f", "x")],
    );
    let build = |place: &Place| {
        let args = ["build", "--progress=plain", "-o", "type=cacheonly"];
        run(place.command().args(args).arg(&context)).success();
    };
    build(&place);
    sockless(&place, &["store", "verify"]).success();
    let blobs = place.dir.join("store/blobs/sha256");
    let blob = std::fs::read_dir(&blobs)
        .expect("ours")
        .flatten()
        .next()
        .expect("a layer")
        .path();
    let mut bytes = std::fs::read(&blob).expect("ours");
    bytes[20] ^= 1;
    std::fs::write(&blob, bytes).expect("ours");
    let found = sockless(&place, &["store", "verify"]).failure();
    assert_eq!(found.status.code(), Some(1));
    let (name, says) = (
        blob.display(),
        "the blob is damaged: the digest of its bytes is sha256:",
    );
    assert!(
        found.stdout.contains(&format!("{name}: {says}")),
        "{}",
        found.stdout
    );
    assert!(
        found.stdout.contains("sockless store verify --repair"),
        "{}",
        found.stdout
    );
    sockless(&place, &["store", "verify", "--repair"]).success();
    assert!(!blob.exists());
    // The record that named it was of use until then.
    sockless(&place, &["store", "verify", "--repair"]).success();
    sockless(&place, &["store", "verify"]).success();
    build(&place);
    assert!(blob.exists());
    sockless(&place, &["prune", "--filter", "until=yesterday"])
        .failure()
        .says("until=24h");
}
