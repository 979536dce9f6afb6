//! The cache: which steps it spares, and how it goes from one machine to another.
//!
//! A machine is a [`Place`]: its store is its own. What a step prints is computed, so that the
//! text of a step, which is shown too, is not taken for its output.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::support::http;
use crate::support::process::{Ran, run};
use crate::support::registry::{Options, Registry, Request};
use crate::support::sockless::Place;
use crate::support::{images, namespaces, oci};

/// The registry of base images and one to push to, or the end of the test.
macro_rules! registries {
    () => {{
        needs!(namespaces());
        match images::busybox() {
            Ok(upstream) => Registries {
                upstream,
                registry: Registry::start(Options::default()),
            },
            Err(reason) => skip!("{reason}"),
        }
    }};
}

struct Registries {
    upstream: Registry,
    registry: Registry,
}

impl Registries {
    /// A name in the registry that is pushed to.
    fn name(&self, name: &str) -> String {
        format!("{}/{name}", self.registry.host)
    }

    /// Builds `files` on a machine.
    #[track_caller]
    fn build(&self, place: &Place, files: &[(&str, &str)], args: &[&str]) -> Ran {
        let context = place.dir.join("context");
        let _ = std::fs::remove_dir_all(&context);
        let context = place.context("context", files);
        let mut all = vec!["--insecure-registry", self.registry.host.as_str()];
        all.extend(args);
        place.build(&self.upstream, &context, &all)
    }

    /// Builds and pushes `app:TAG`; gives what was said and the manifest's digest.
    #[track_caller]
    fn push(
        &self,
        place: &Place,
        files: &[(&str, &str)],
        tag: &str,
        args: &[&str],
    ) -> (Ran, String) {
        let name = self.name(&format!("app:{tag}"));
        let mut all = vec!["-t", name.as_str(), "--push"];
        all.extend(args);
        let ran = self.build(place, files, &all).success();
        let manifest = self.manifest("app", tag);
        (ran, oci::sha256(&manifest))
    }

    fn manifest(&self, repository: &str, tag: &str) -> Vec<u8> {
        let path = format!("/v2/{repository}/manifests/{tag}");
        let accept = [("Accept", "application/vnd.oci.image.manifest.v1+json")];
        let response = http::request(&self.registry.host, "GET", &path, &accept, b"");
        assert_eq!(response.status, 200, "{}", response.text());
        response.body
    }

    /// Digests and sizes of what a manifest names beside its config.
    fn layers(&self, repository: &str, tag: &str) -> Vec<(String, u64)> {
        let manifest: Value =
            serde_json::from_slice(&self.manifest(repository, tag)).expect("a manifest");
        let layers = manifest["layers"].as_array().expect("a list").iter();
        let of = |layer: &Value| {
            let digest = layer["digest"].as_str().expect("a text").to_owned();
            (digest, layer["size"].as_u64().expect("a number"))
        };
        layers.map(of).collect()
    }

    /// What was asked of both registries since `before`.
    fn since(&self, before: (usize, usize)) -> Vec<Request> {
        let mut requests = self.registry.requests().split_off(before.0);
        requests.extend(self.upstream.requests().split_off(before.1));
        requests
    }

    fn now(&self) -> (usize, usize) {
        (
            self.registry.requests().len(),
            self.upstream.requests().len(),
        )
    }
}

/// The digests of blobs that were downloaded.
fn downloads(requests: &[Request]) -> BTreeSet<String> {
    let gets = requests.iter().filter(|r| r.method == "GET");
    gets.filter_map(|r| Some(r.path.split_once("/blobs/")?.1.to_owned()))
        .collect()
}

/// How many uploads were committed.
fn uploads(requests: &[Request]) -> usize {
    let is_upload = |r: &&Request| r.method == "PUT" && r.path.contains("/blobs/uploads/");
    requests.iter().filter(is_upload).count()
}

fn cached(ran: &Ran) -> usize {
    ran.stderr.matches(" CACHED").count()
}

/// Two stages; of five steps three make the image's layers.
const STAGES: &str = "FROM busybox AS build\n\
                      COPY a /a\n\
                      RUN echo built $((6*7)) && mkdir /out && cat /a > /out/made\n\
                      FROM busybox\n\
                      COPY --from=build /out /out\n\
                      COPY b /b\n\
                      RUN echo last $((6*7)) && echo done > /last\n";

fn stages(b: &str) -> [(&'static str, &str); 3] {
    [("Dockerfile", STAGES), ("a", "a"), ("b", b)]
}

#[test]
fn sandbox_a_new_machine_runs_nothing_and_downloads_nothing() {
    let all = registries!();
    let cache = format!("type=registry,ref={}", all.name("cache:main"));
    let to = format!("{cache},mode=max");
    let (ran, first) = all.push(&Place::new(), &stages("b"), "1", &["--cache-to", &to]);
    ran.says("built 42").says("last 42");
    assert_eq!(all.layers("cache", "main").len(), 5);
    let image: BTreeSet<_> = all.layers("app", "1").into_iter().collect();

    let before = all.now();
    let (ran, second) = all.push(&Place::new(), &stages("b"), "2", &["--cache-from", &cache]);
    assert_eq!(cached(&ran), 5, "{}", ran.stderr);
    ran.does_not_say("built 42")
        .does_not_say("last 42")
        .does_not_say("warning");
    assert_eq!(first, second);
    let requests = all.since(before);
    let downloaded = downloads(&requests);
    for (layer, _) in all.layers("cache", "main").iter().chain(&image) {
        assert!(!downloaded.contains(layer), "{downloaded:?}");
    }
    // Configs of the base and of the cache.
    assert_eq!(downloaded.len(), 2, "{downloaded:?}");
    assert_eq!(uploads(&requests), 0, "{requests:?}");

    // One file changed: the steps after it run, and what they do not read stays away.
    let before = all.now();
    let place = Place::new();
    let (ran, _) = all.push(&place, &stages("other"), "3", &["--cache-from", &cache]);
    assert_eq!(cached(&ran), 3, "{}", ran.stderr);
    ran.does_not_say("built 42").says("last 42");
    let downloaded = downloads(&all.since(before));
    let of_stage = all.layers("cache", "main").into_iter();
    let of_stage: Vec<_> = of_stage.filter(|layer| !image.contains(layer)).collect();
    assert_eq!(of_stage.len(), 2);
    for (layer, _) in of_stage {
        assert!(!downloaded.contains(&layer), "{downloaded:?}");
    }
    // What came is known here now, without the cache.
    let (ran, _) = all.push(&place, &stages("other"), "4", &[]);
    assert_eq!(cached(&ran), 3, "{}", ran.stderr);
    ran.does_not_say("last 42").says("built 42");
}

#[test]
fn sandbox_blobs_that_the_image_has_are_not_sent_twice_and_hits_are_exported_again() {
    let all = registries!();
    let cache = format!("type=registry,ref={}", all.name("cache:main"));
    let min = format!("{cache},mode=min");
    let before = all.now();
    all.push(&Place::new(), &stages("b"), "1", &["--cache-to", &min]);
    let requests = all.since(before);
    // The cache has its three layers from the image.
    let mounted = |r: &&Request| r.path.contains("mount=") && r.status == 201;
    assert_eq!(requests.iter().filter(mounted).count(), 3, "{requests:?}");
    let min_layers = all.layers("cache", "main");
    assert_eq!(min_layers.len(), 3);

    // The stage runs; what it made is found by its content, as BuildKit has it, and everything
    // after that too.
    let next = format!("type=registry,ref={},mode=max", all.name("cache:next"));
    let args = ["--cache-from", &cache, "--cache-to", &next];
    let args = [&args[..], &["--no-cache-filter", "build"]].concat();
    let (ran, _) = all.push(&Place::new(), &stages("b"), "2", &args);
    assert_eq!(cached(&ran), 3, "{}", ran.stderr);
    ran.says("built 42").does_not_say("last 42");
    // What was found is in the next cache beside what was made.
    let next_layers = all.layers("cache", "next");
    assert_eq!(next_layers.len(), 5);
    assert!(min_layers.iter().all(|layer| next_layers.contains(layer)));
    let next = format!("type=registry,ref={}", all.name("cache:next"));
    let (ran, _) = all.push(&Place::new(), &stages("b"), "3", &["--cache-from", &next]);
    assert_eq!(cached(&ran), 5, "{}", ran.stderr);
}

/// A stage that makes another file each time, and steps that have it from there.
const RANDOM: &str = "FROM busybox AS a\n\
                      RUN echo stage $((6*7)) && cat /proc/sys/kernel/random/uuid > /r && cp /r /only\n\
                      FROM busybox\n\
                      RUN echo one $((6*7)) > /one\n\
                      COPY --from=a /r /r\n\
                      COPY seed /seed\n\
                      RUN --mount=from=a,target=/a echo mounted $((6*7)) && cp /a/r /again\n";

fn random(seed: &str) -> [(&'static str, &str); 2] {
    [("Dockerfile", RANDOM), ("seed", seed)]
}

/// For each place of a cache without the layers of stages: its options of the build that
/// exports, and of those that import.
fn without_stages(all: &Registries, dir: &Path) -> Vec<(String, Vec<String>)> {
    let registry = format!("type=registry,ref={}", all.name("cache:min"));
    let local = |key: &str| format!("type=local,{key}={}", dir.display());
    let again = "--cache-to=type=inline".to_owned();
    vec![
        (
            "type=inline".to_owned(),
            vec![format!("--cache-from={}", all.name("app:1")), again],
        ),
        (
            format!("{registry},mode=min"),
            vec![format!("--cache-from={registry}")],
        ),
        (
            local("dest"),
            vec![format!("--cache-from={}", local("src"))],
        ),
    ]
}

/// What stages made is known although their layers are nowhere.
#[test]
fn sandbox_a_cache_of_the_images_layers_alone_finds_all_steps() {
    let all = registries!();
    let shared = Place::new();
    for (to, from) in without_stages(&all, &shared.dir.join("cache")) {
        let from: Vec<&str> = from.iter().map(String::as_str).collect();
        let args = ["--cache-to", &to];
        let (ran, first) = all.push(&Place::new(), &random("s"), "1", &args);
        ran.says("stage 42").says("mounted 42");
        assert_eq!(all.layers("app", "1").len(), 5);

        let before = all.now();
        let (ran, second) = all.push(&Place::new(), &random("s"), "2", &from);
        assert_eq!(cached(&ran), 5, "{to}: {}", ran.stderr);
        let ran = ran.does_not_say("stage 42").does_not_say("mounted 42");
        ran.does_not_say("warning");
        assert_eq!(second, first, "{to}");
        let downloaded = downloads(&all.since(before));
        for (layer, _) in all.layers("app", "1") {
            assert!(!downloaded.contains(&layer), "{to}: {downloaded:?}");
        }

        // A cache from this cache says as much, also where all layers are wanted.
        let next = format!("type=registry,ref={}", all.name("cache:next"));
        let max = format!("--cache-to={next},mode=max");
        let args = [&from[..1], &[&max, "-o", "type=cacheonly"]].concat();
        let ran = all.build(&Place::new(), &random("s"), &args).success();
        assert_eq!(cached(&ran), 5, "{to}: {}", ran.stderr);
        ran.does_not_say("warning");
        assert_eq!(all.layers("cache", "next").len(), 4);
        let args = ["--cache-from", &next, "-o", "type=cacheonly"];
        let ran = all.build(&Place::new(), &random("s"), &args).success();
        assert_eq!(cached(&ran), 5, "{to}: {}", ran.stderr);
    }
}

/// Where a layer is wanted that the cache was exported without, its step is done after all.
#[test]
fn sandbox_a_stage_runs_where_a_step_or_an_output_needs_what_no_cache_has() {
    let all = registries!();
    let shared = Place::new();
    for (to, from) in without_stages(&all, &shared.dir.join("cache")) {
        let from: Vec<&str> = from.iter().map(String::as_str).collect();
        let args = ["--cache-to", &to];
        let (_, first) = all.push(&Place::new(), &random("s"), "1", &args);
        let pulled = |place: &Place, tag: &str| {
            let layout = place.dir.join(format!("pulled-{tag}"));
            all.registry.pull(&format!("app:{tag}"), &layout);
            oci::Image::read(&layout)
        };
        let place = Place::new();
        let image = pulled(&place, "1");
        let old = image.text("r");
        assert_eq!(old, image.text("again"));

        // The step that mounts the stage has to run.
        let place = Place::new();
        let (ran, digest) = all.push(&place, &random("other"), "2", &from);
        assert_ne!(digest, first);
        for line in ["stage 42", "mounted 42"] {
            assert_eq!(ran.stderr.matches(line).count(), 1, "{to}: {}", ran.stderr);
        }
        ran.does_not_say("warning").does_not_say("begins again");
        let image = pulled(&place, "2");
        assert_eq!(image.text("seed"), "other");
        assert_eq!(image.text("r"), image.text("again"), "{to}");
        assert_ne!(image.text("r"), old, "{to}");
        // All is here now.
        let (ran, again) = all.push(&place, &random("other"), "3", &from);
        assert_eq!(cached(&ran), 5, "{to}: {}", ran.stderr);
        assert_eq!(again, digest, "{to}");

        // The stage itself is wanted, as files and as an image.
        let place = Place::new();
        let archive = place.dir.join("stage.tar");
        let output = format!("type=oci,dest={}", archive.display());
        let args = [&from[..1], &["--target", "a", "-o", &output]].concat();
        let ran = all.build(&place, &random("s"), &args).success();
        assert_eq!(ran.stderr.matches("stage 42").count(), 1, "{}", ran.stderr);
        let ran = ran.does_not_say("warning");
        assert_eq!(
            ran.stderr.matches("published ").count(),
            1,
            "{}",
            ran.stderr
        );
        assert_ne!(place.archive(&archive).text("r"), old, "{to}");
        let place = Place::new();
        let args = [&from[..1], &["--target", "a"]].concat();
        let (ran, _) = all.push(&place, &random("s"), "stage", &args);
        let ran = ran.says("stage 42").does_not_say("warning");
        assert_eq!(ran.stderr.matches("stage 42").count(), 1, "{}", ran.stderr);
        assert_ne!(pulled(&place, "stage").text("r"), old, "{to}");
    }
}

#[test]
fn sandbox_a_directory_is_a_cache() {
    let all = registries!();
    let shared = Place::new();
    let dir = shared.dir.join("deep/cache");
    let to = format!("type=local,dest={},mode=max", dir.display());
    let from = format!("type=local,src={}", dir.display());
    fn with(more: [&str; 2]) -> Vec<&str> {
        [&["-o", "type=cacheonly"][..], &more].concat()
    }
    let first = all.build(&Place::new(), &stages("b"), &with(["--cache-to", &to]));
    first.success().says("built 42").does_not_say("warning");
    let again = all.build(&Place::new(), &stages("b"), &with(["--cache-from", &from]));
    let again = again
        .success()
        .does_not_say("built 42")
        .does_not_say("warning");
    assert_eq!(cached(&again), 5, "{}", again.stderr);

    // Another name beside it; each is found by its own, and by its digest.
    let other = format!("{to},tag=other");
    let one = [("Dockerfile", "FROM busybox\nRUN echo other $((6*7)) > /o\n")];
    all.build(&Place::new(), &one, &with(["--cache-to", &other]))
        .success();
    let index = std::fs::read(dir.join("index.json")).expect("written");
    let index: Value = serde_json::from_slice(&index).expect("an index");
    let digest = index["manifests"][1]["digest"]
        .as_str()
        .expect("two entries");
    let other = format!("{from},tag=other");
    let by_digest = format!("{from},digest={digest}");
    for (from, hits) in [(&other, 1), (&by_digest, 1), (&from, 0)] {
        let ran = all.build(&Place::new(), &one, &with(["--cache-from", from]));
        assert_eq!(cached(&ran.success()), hits, "{from}");
    }
    // A machine without the registry's layers writes them from where they are.
    let cache = format!("type=registry,ref={}", all.name("cache:main"));
    let args = ["--cache-from", &from, "--cache-to", &cache];
    all.build(
        &Place::new(),
        &stages("b"),
        &[&args[..], &["-o", "type=cacheonly"]].concat(),
    )
    .success();
    assert_eq!(all.layers("cache", "main").len(), 3);
    let moved = shared.dir.join("moved");
    let to = format!("type=local,dest={}", moved.display());
    let args = [
        "--cache-from",
        &cache,
        "--cache-to",
        &to,
        "-o",
        "type=cacheonly",
    ];
    let place = Place::new();
    all.build(&place, &stages("b"), &args).success();
    let from = format!("type=local,src={}", moved.display());
    let args = ["--cache-from", &from, "-o", "type=cacheonly"];
    let ran = all.build(&Place::new(), &stages("b"), &args).success();
    // Those of the stage without their layers.
    assert_eq!(cached(&ran), 5, "{}", ran.stderr);
}

const ONE_STAGE: &str = "FROM busybox\n\
                         COPY a /a\n\
                         RUN echo ran $((6*7)) && cat /a > /made\n";

#[test]
fn sandbox_an_image_is_its_own_cache() {
    let all = registries!();
    let files = [("Dockerfile", ONE_STAGE), ("a", "a")];
    let place = Place::new();
    let (_, plain) = all.push(&place, &files, "plain", &[]);
    let (_, inline) = all.push(&place, &files, "inline", &["--cache-to", "type=inline"]);
    assert_ne!(plain, inline);
    assert_eq!(all.layers("app", "plain"), all.layers("app", "inline"));

    let from = all.name("app:inline");
    let args = [
        "--cache-from",
        &from,
        "--build-arg",
        "BUILDKIT_INLINE_CACHE=1",
    ];
    let (ran, again) = all.push(&Place::new(), &files, "again", &args);
    assert_eq!(cached(&ran), 2, "{}", ran.stderr);
    ran.does_not_say("warning").does_not_say("ran 42");
    // The same image, whether its steps ran or not.
    assert_eq!(inline, again);

    // Images on it do not say what only its own build knows.
    let child = format!("FROM {}\nLABEL a=b\n", all.name("app:inline"));
    all.push(&Place::new(), &[("Dockerfile", &child)], "child", &[]);
    let layout = place.dir.join("pulled");
    all.registry.pull("app:child", &layout);
    let image = oci::Image::read(&layout);
    assert_eq!(image.config["sockless.cache.v1"], Value::Null);
    assert_eq!(image.run_config()["Labels"]["a"], "b");
    let layout = place.dir.join("pulled-inline");
    all.registry.pull("app:inline", &layout);
    let image = oci::Image::read(&layout);
    let records = &image.config["sockless.cache.v1"]["records"];
    assert_eq!(records.as_array().map(Vec::len), Some(2), "{records}");
}

#[test]
fn security_s18_sandbox_a_cache_that_is_missing_or_broken_is_a_warning() {
    let all = registries!();
    let files = [("Dockerfile", ONE_STAGE), ("a", "a")];
    let shared = Place::new();
    let dir = shared.dir.join("cache");
    let to = format!("type=local,dest={}", dir.display());
    all.build(
        &Place::new(),
        &files,
        &["--cache-to", &to, "-o", "type=cacheonly"],
    )
    .success();
    let (_, _) = all.push(&Place::new(), &files, "plain", &[]);

    // A damaged config, and a name for it that is right.
    let manifest = |dir: &Path| {
        let index = std::fs::read(dir.join("index.json")).expect("written");
        let index: Value = serde_json::from_slice(&index).expect("an index");
        let digest = index["manifests"][0]["digest"].as_str().expect("one entry");
        let bytes = std::fs::read(blob(dir, digest)).expect("written");
        serde_json::from_slice::<Value>(&bytes).expect("a manifest")
    };
    let config = manifest(&dir)["config"]["digest"].clone();
    let config = blob(&dir, config.as_str().expect("a text"));
    let good = std::fs::read(&config).expect("written");
    let spoilt = good.iter().map(|b| if *b == b'{' { b'[' } else { *b });
    std::fs::write(&config, spoilt.collect::<Vec<u8>>()).expect("ours");

    let local = format!("type=local,src={}", dir.display());
    let nowhere = format!("type=local,src={}", shared.dir.join("nowhere").display());
    let missing = all.name("app:none");
    let plain = all.name("app:plain");
    for (from, says) in [
        (local.as_str(), "is not used"),
        (&nowhere, "nowhere"),
        (&missing, "404"),
        (&plain, "no cache in it"),
        ("127.0.0.1:1/app:cache", "127.0.0.1:1"),
    ] {
        let args = ["--cache-from", from, "-o", "type=cacheonly"];
        let ran = all.build(&Place::new(), &files, &args).success();
        let ran = ran.says("warning: the cache ").says(says).says("ran 42");
        assert_eq!(cached(&ran), 0);
    }

    // A layer that is no longer there: the layout says so when it is wanted, and so does the
    // registry.
    std::fs::write(&config, &good).expect("ours");
    let layers = manifest(&dir)["layers"].clone();
    for layer in layers.as_array().expect("a list") {
        std::fs::remove_file(blob(&dir, layer["digest"].as_str().expect("a text"))).expect("there");
    }
    let args = ["--cache-from", &local, "-o", "type=cacheonly"];
    let ran = all.build(&Place::new(), &files, &args).success();
    ran.says("a layer of a cache is not used").says("ran 42");

    let cache = format!("type=registry,ref={}", all.name("gone:main"));
    let args = ["--cache-to", &cache, "-o", "type=cacheonly"];
    all.build(&Place::new(), &files, &args).success();
    let removed = all.layers("gone", "main");
    for (layer, _) in &removed {
        let path = format!("/v2/gone/blobs/{layer}");
        let response = http::request(&all.registry.host, "DELETE", &path, &[], b"");
        assert_eq!(response.status, 202, "{}", response.text());
    }
    let args = ["--cache-from", &cache, "-o", "type=cacheonly"];
    let ran = all.build(&Place::new(), &files, &args).success();
    ran.says("no longer has the layer").says("ran 42");
}

fn blob(layout: &Path, digest: &str) -> PathBuf {
    layout.join("blobs/sha256").join(&digest["sha256:".len()..])
}

#[test]
fn sandbox_an_export_that_fails_is_a_warning_unless_told() {
    let all = registries!();
    let files = [("Dockerfile", ONE_STAGE), ("a", "a")];
    let nowhere = "type=registry,ref=127.0.0.1:1/app:cache";
    let place = Place::new();
    let file = place.dir.file("file", "in the way");
    let in_the_way = format!("type=local,dest={}/cache", file.display());
    for to in [nowhere, &in_the_way] {
        let args = ["--cache-to", to];
        let (ran, _) = all.push(&place, &files, "1", &args);
        ran.says("warning: exporting the cache to ");
        let strict = format!("{to},ignore-error=false");
        // The image is out all the same.
        let name = all.name("app:strict");
        let args = ["-t", &name, "--push", "--cache-to", &strict];
        all.build(&place, &files, &args)
            .failure()
            .says("exporting the cache to ");
        all.manifest("app", "strict");
    }
    for (flag, value, says) in [
        ("--cache-to", "type=gha", "type=gha is not supported"),
        (
            "--cache-from",
            "type=s3,bucket=b",
            "type=s3 is not supported",
        ),
    ] {
        let ran = all.build(&place, &files, &[flag, value, "-o", "type=cacheonly"]);
        let ran = ran.failure().says(says).does_not_say("ran 42");
        assert_eq!(ran.status.code(), Some(2));
    }
}

#[test]
fn sandbox_two_builds_export_to_one_name() {
    let all = registries!();
    let cache = format!("type=registry,ref={}", all.name("cache:main"));
    let dockerfile = |word: &str| format!("FROM busybox\nRUN echo {word} $((6*7)) > /{word}\n");
    let texts = [dockerfile("one"), dockerfile("two")];
    std::thread::scope(|scope| {
        for text in &texts {
            let (all, cache) = (&all, &cache);
            scope.spawn(move || {
                let args = ["--cache-to", cache, "-o", "type=cacheonly"];
                let files = [("Dockerfile", text.as_str())];
                let ran = all.build(&Place::new(), &files, &args);
                ran.success().does_not_say("warning");
            });
        }
    });
    // It is that of one of them, and whole.
    let hits = texts.iter().map(|text| {
        let args = ["--cache-from", &cache, "-o", "type=cacheonly"];
        let ran = all.build(&Place::new(), &[("Dockerfile", text)], &args);
        cached(&ran.success().does_not_say("warning"))
    });
    assert_eq!(hits.sum::<usize>(), 1);
}

/// A step with a cache mount of `files` files of 256 KiB of noise in it.
const MOUNT: &str = "FROM busybox\n\
                     ARG RUN\n\
                     RUN --mount=type=cache,id=pool,target=/c,uid=7,gid=9,mode=0750 \
                     echo \"in $RUN: $(ls /c | wc -l) files, $(stat -c %u:%g:%a /c)\"; \
                     if test -e /c/n1; then stat -c 'n1: %u:%g:%a' /c/n1; \
                     dd if=/dev/urandom of=/c/n9 bs=262144 count=1 2>/dev/null; touch /c/n30; \
                     else for i in $(seq 48); do \
                     dd if=/dev/urandom of=/c/n$i bs=262144 count=1 2>/dev/null; done; \
                     chown 1000:42 /c/n1; chmod 2640 /c/n1; fi\n";

#[test]
fn sandbox_cache_mounts_travel_and_only_what_changed_of_them() {
    let all = registries!();
    let cache = format!("type=registry,ref={}", all.name("cache:main"));
    let to = format!("{cache},mounts=true");
    let build = |place: &Place, run: &str, args: &[&str]| {
        let run = format!("RUN={run}");
        let fixed = ["--build-arg", run.as_str(), "-o", "type=cacheonly"];
        let ran = all.build(
            place,
            &[("Dockerfile", MOUNT)],
            &[&fixed[..], args].concat(),
        );
        ran.success()
    };
    build(&Place::new(), "a", &["--cache-to", &to]).says("in a: 0 files, 7:9:750");
    let first = all.layers("cache", "main");
    let total: u64 = first.iter().map(|(_, size)| size).sum();
    assert!(total > 12 << 20, "{total}");

    let before = all.now();
    let args = ["--cache-from", &cache, "--cache-to", &to];
    build(&Place::new(), "b", &args)
        .says("in b: 48 files, 7:9:750")
        .says("n1: 1000:42:2640")
        .does_not_say("warning");
    let second = all.layers("cache", "main");
    let new: Vec<_> = second.iter().filter(|blob| !first.contains(blob)).collect();
    let new_bytes: u64 = new.iter().map(|(_, size)| size).sum();
    // One file of 256 KiB, and the chunk or two that it lies in.
    assert!((1..4 << 20).contains(&new_bytes), "{new_bytes} of {total}");
    // These blobs were sent, the config, and no others.
    let requests = all.since(before);
    assert_eq!(uploads(&requests), new.len() + 1, "{requests:?}");

    // A machine where nothing has to run moves nothing and keeps it.
    let before = all.now();
    let args = ["--cache-from", &cache, "--cache-to", &to];
    let ran = build(&Place::new(), "b", &args);
    assert_eq!(cached(&ran), 1, "{}", ran.stderr);
    assert_eq!(all.layers("cache", "main"), second);
    assert_eq!(uploads(&all.since(before)), 0);

    // It is there once: what this machine has stays.
    let place = Place::new();
    build(&place, "c", &["--cache-from", &cache]).says("in c: 48 files");
    build(&place, "d", &["--cache-from", &cache]).says("in d: 48 files");
    // Who builds without the cache begins anew, and without mounts=true nothing travels.
    let no_cache = ["--no-cache", "--cache-from", &cache];
    build(&Place::new(), "e", &no_cache).says("in e: 0 files");
    build(
        &Place::new(),
        "f",
        &["--cache-from", &cache, "--cache-to", &cache],
    );
    let ran = build(&Place::new(), "g", &["--cache-from", &cache]);
    ran.says("in g: 0 files");

    // By way of a directory, and from there back to the registry.
    let shared = Place::new();
    let dir = shared.dir.join("cache");
    let local = format!("type=local,dest={},mounts=true", dir.display());
    build(&place, "h", &["--cache-to", &local]).says("in h: 48 files");
    // Neither fetching a cache mount nor sending it leaves in the store what is not its own.
    let verified = run(place.command().args(["store", "verify"])).success();
    assert!(
        verified.stdout.ends_with(" is sound\n"),
        "{}",
        verified.stdout
    );
    let from = format!("type=local,src={}", dir.display());
    build(
        &Place::new(),
        "i",
        &["--cache-from", &from, "--cache-to", &to],
    )
    .says("in i: 48 files")
    .says("n1: 1000:42:2640");
    let ran = build(&Place::new(), "j", &["--cache-from", &cache]);
    ran.says("in j: 48 files");
}

#[test]
fn sandbox_a_broken_cache_mount_begins_empty() {
    let all = registries!();
    let shared = Place::new();
    let dir = shared.dir.join("cache");
    let dockerfile = "FROM busybox\n\
                      ARG RUN\n\
                      RUN --mount=type=cache,target=/c echo \"in $RUN: $(ls /c)\"; touch /c/$RUN\n";
    let build = |place: &Place, run: &str, args: &[&str]| {
        let run = format!("RUN={run}");
        let fixed = ["--build-arg", run.as_str(), "-o", "type=cacheonly"];
        let files = [("Dockerfile", dockerfile)];
        all.build(place, &files, &[&fixed[..], args].concat())
            .success()
    };
    let to = format!("type=local,dest={},mounts=true", dir.display());
    let from = format!("type=local,src={}", dir.display());
    build(&Place::new(), "a", &["--cache-to", &to]);
    build(&Place::new(), "b", &["--cache-from", &from]).says("in b: a\n");
    // Only the chunks: what is no layer of a step.
    let mut spoilt = 0;
    for entry in std::fs::read_dir(dir.join("blobs/sha256")).expect("written") {
        let path = entry.expect("readable").path();
        let mut bytes = std::fs::read(&path).expect("written");
        if bytes.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) {
            let last = bytes.len() - 1;
            bytes[last] ^= 1;
            std::fs::write(&path, bytes).expect("ours");
            spoilt += 1;
        }
    }
    assert_eq!(spoilt, 1, "entries, and no content");
    build(&Place::new(), "c", &["--cache-from", &from])
        .says("warning: the cache mount \"c\" begins empty")
        .says("in c: \n");
}

#[test]
fn sandbox_a_stage_that_runs_again_and_makes_the_same_is_a_hit() {
    // https://docs.docker.com/build/cache/invalidation/: COPY --from is compared by content.
    let all = registries!();
    let place = Place::new();
    let build = |args: &[&str]| {
        let args = [args, &["-o", "type=cacheonly"]].concat();
        all.build(&place, &stages("b"), &args).success()
    };
    assert_eq!(cached(&build(&[])), 0);
    let ran = build(&["--no-cache-filter", "build"]);
    assert_eq!(cached(&ran), 3, "{}", ran.stderr);
    ran.says("built 42").does_not_say("last 42");
    // The new layers of the stage are known too: nothing is read for it again.
    let ran = build(&[]);
    assert_eq!(cached(&ran), 5, "{}", ran.stderr);
    let ran = build(&["--no-cache"]);
    assert_eq!(cached(&ran), 0, "{}", ran.stderr);
    ran.says("built 42").says("last 42");
}

#[test]
fn sandbox_triggers_are_cached_like_steps_of_ones_own() {
    let all = registries!();
    let base = "FROM busybox\n\
                ONBUILD COPY src /src\n\
                ONBUILD RUN echo triggered $((6*7)) && cat /src > /made\n";
    let name = all.name("base:1");
    let args = ["-t", &name, "--push"];
    all.build(&Place::new(), &[("Dockerfile", base)], &args)
        .success()
        .does_not_say("triggered 42");
    let child = format!("FROM {name}\nRUN echo child $((6*7))\n");
    let cache = format!("type=registry,ref={}", all.name("cache:main"));
    let build = |place: &Place, src: &str, args: &[&str]| {
        let files = [("Dockerfile", child.as_str()), ("src", src)];
        let args = [args, &["-o", "type=cacheonly"]].concat();
        all.build(place, &files, &args).success()
    };
    let place = Place::new();
    let first = build(&place, "1", &["--cache-to", &cache]);
    first.says("triggered 42").says("child 42");
    let again = build(&place, "1", &[]);
    assert_eq!(cached(&again), 3, "{}", again.stderr);
    let elsewhere = build(&Place::new(), "1", &["--cache-from", &cache]);
    assert_eq!(cached(&elsewhere), 3, "{}", elsewhere.stderr);
    let changed = build(&place, "2", &[]);
    assert_eq!(cached(&changed), 0, "{}", changed.stderr);
    changed.says("triggered 42");
}

/// The stages came to the same layers in different ways, and what runs there differs each time.
#[test]
fn sandbox_equal_steps_of_two_stages_run_once_and_the_next_build_makes_the_same() {
    let all = registries!();
    let dockerfile = "FROM busybox AS one\n\
                      COPY a /a\n\
                      RUN echo ran $((6*7)) && cat /proc/uptime /proc/sys/kernel/random/uuid > /made\n\
                      FROM busybox AS two\n\
                      COPY --chmod=0644 a /a\n\
                      RUN echo ran $((6*7)) && cat /proc/uptime /proc/sys/kernel/random/uuid > /made\n\
                      RUN --mount=from=one,target=/one echo also $((6*7)) && cat /one/made > /also\n\
                      FROM busybox\n\
                      COPY --from=one /made /one\n\
                      COPY --from=two /made /two\n\
                      COPY --from=two /also /also\n";
    let files = [("Dockerfile", dockerfile), ("a", "a")];
    let lines = |ran: &Ran, line: &str| ran.stderr.lines().filter(|l| l.ends_with(line)).count();
    for first in [&[][..], &["--no-cache"]] {
        let place = Place::new();
        let (ran, digest) = all.push(&place, &files, "1", first);
        assert_eq!(lines(&ran, " ran 42"), 1, "{}", ran.stderr);
        assert_eq!(lines(&ran, " also 42"), 1, "{}", ran.stderr);
        assert_eq!(cached(&ran), 1, "{}", ran.stderr);
        let layout = place.dir.join("pulled");
        all.registry.pull("app:1", &layout);
        let image = oci::Image::read(&layout);
        assert_eq!(image.text("one"), image.text("two"));
        assert_eq!(image.text("one"), image.text("also"));
        let (ran, again) = all.push(&place, &files, "2", &[]);
        assert_eq!(cached(&ran), 8, "{}", ran.stderr);
        assert_eq!(again, digest);
    }
}

/// What fails is not waited for in vain: an equal step does not hang, and says why.
#[test]
fn sandbox_an_equal_step_of_one_that_fails_fails_too() {
    let all = registries!();
    let dockerfile = "FROM busybox AS one\n\
                      COPY a /a\n\
                      RUN echo ran $((6*7)) && exit 3\n\
                      FROM busybox\n\
                      COPY --chmod=0644 a /a\n\
                      RUN echo ran $((6*7)) && exit 3\n\
                      COPY --from=one /a /b\n";
    let files = [("Dockerfile", dockerfile), ("a", "a")];
    let ran = all
        .build(&Place::new(), &files, &["-o", "type=cacheonly"])
        .failure();
    assert_eq!(ran.status.code(), Some(1));
    assert_eq!(
        ran.stderr
            .lines()
            .filter(|l| l.ends_with(" ran 42"))
            .count(),
        1
    );
    ran.says("exit code: 3");
}

/// A step may be looked up before all layers below it have a name, and is found nevertheless.
#[test]
fn sandbox_a_step_is_found_where_what_is_below_ran_again_and_made_the_same() {
    let all = registries!();
    let place = Place::new();
    let build = |dockerfile: &str, a: &str| {
        let files = [("Dockerfile", dockerfile), ("a", a)];
        let args = [
            "--build-arg",
            "SOURCE_DATE_EPOCH=1700000000",
            "-o",
            "type=cacheonly",
        ];
        all.build(&place, &files, &args).success()
    };
    let dockerfile = |word: &str| {
        format!(
            "FROM busybox\n\
             COPY a /a\n\
             RUN echo {word} $((6*7)) && seq 1 3000000 > /huge\n\
             RUN echo child $((6*7)) && wc -l < /huge > /lines\n"
        )
    };
    build(&dockerfile("first"), "a")
        .says("first 42")
        .says("child 42");
    // The definition is another, and what it makes is not.
    let ran = build(&dockerfile("second"), "a").says("second 42");
    assert_eq!(cached(&ran), 2, "{}", ran.stderr);
    ran.does_not_say("child 42");
    // A layer further below is another: nothing can be found, and is not.
    let ran = build(&dockerfile("second"), "b")
        .says("second 42")
        .says("child 42");
    assert_eq!(cached(&ran), 0, "{}", ran.stderr);
    let ran = build(&dockerfile("second"), "b");
    assert_eq!(cached(&ran), 3, "{}", ran.stderr);
}
