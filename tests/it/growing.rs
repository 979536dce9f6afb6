//! Layers that go up while they are made: to several registries at once, to a slow one beside a
//! fast one, and until the build is stopped.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::memory::{PEAK_KIB, peak_of, write_large};
use crate::soak::nothing_runs;
use crate::store::{Running, sockless, wait_for};
use crate::support::oci::Image;
use crate::support::proxy::{Action, Gate, Head, Proxy};
use crate::support::registry::{Options, Registry, Request};
use crate::support::sockless::Place;
use crate::support::{http, images, namespaces, programs};

/// How many bytes of a held upload pass.
const BEGIN_BYTES: usize = 1 << 20;

/// The registry of base images, or the end of the test.
macro_rules! upstream {
    ($($program:literal),*) => {{
        needs!(programs(&["skopeo", "docker-registry" $(, $program)*]));
        match images::busybox() {
            Ok(registry) => registry,
            Err(reason) => skip!("{reason}"),
        }
    }};
}

/// Whether it sends a layer whose end is not known yet.
fn is_growing(head: &Head) -> bool {
    head.method == "PATCH" && head.is_chunked
}

/// A registry behind a proxy that holds what grows until the gate is open.
fn behind(gate: &Gate, begun: impl Fn() + Send + Sync + 'static) -> (Registry, Proxy) {
    let registry = Registry::start(Options::default());
    let gate = gate.clone();
    let proxy = Proxy::start(&registry.host, move |head| {
        if is_growing(head) {
            begun();
            Action::Hold(BEGIN_BYTES, gate.clone())
        } else {
            Action::Pass
        }
    });
    (registry, proxy)
}

/// Opens a gate in any case, so that who waits there ends when a test fails.
struct Opened(Gate);

impl Drop for Opened {
    fn drop(&mut self) {
        self.0.open();
    }
}

/// A context of one large file, which does not compress well.
fn context(place: &Place, mebibytes: u64) -> std::path::PathBuf {
    let context = place.context("context", &[("Dockerfile", "FROM scratch\nCOPY large /\n")]);
    write_large(&context.join("large"), mebibytes, 1);
    context
}

/// The only layer's digest, from an image that is whole.
#[track_caller]
fn pulled(place: &Place, registry: &Registry, name: &str, mebibytes: u64) -> String {
    let layout = place
        .dir
        .join(format!("{}-{name}", registry.host).replace(':', "-"));
    registry.pull(name, &layout);
    let image = Image::read(&layout);
    assert_eq!(image.entry("large").expect("copied").size, mebibytes << 20);
    let digest = &image.manifest["layers"][0]["digest"];
    digest.as_str().expect("a text").to_owned()
}

/// The requests with which uploads were committed.
fn commits(registry: &Registry) -> Vec<Request> {
    let mut requests = registry.requests();
    requests.retain(|r| r.method == "PUT" && r.path.contains("/blobs/uploads/") && r.status == 201);
    requests
}

#[test]
fn several_registries_follow_one_layer_at_the_same_time() {
    let upstream = upstream!();
    let place = Place::new();
    let gate = Gate::default();
    let _opened = Opened(gate.clone());
    // Nothing passes before all three have begun.
    let begun = Arc::new(AtomicUsize::new(0));
    let count = || {
        let (begun, gate) = (Arc::clone(&begun), gate.clone());
        move || {
            if begun.fetch_add(1, Ordering::SeqCst) == 2 {
                gate.open();
            }
        }
    };
    let (one, to_one) = behind(&gate, count());
    let (two, to_two) = behind(&gate, count());
    let hosts = [&to_one.host, &to_two.host];
    let names = [(0, "a:1"), (1, "a:1"), (1, "b:1")];
    let names = names.map(|(at, name): (usize, _)| format!("{}/{name}", hosts[at]));
    let insecure = hosts.map(|host| format!("--insecure-registry={host}"));
    let mut args = vec!["--push", &insecure[0], &insecure[1]];
    args.extend(names.iter().flat_map(|name| ["-t", name.as_str()]));
    let context = context(&place, 64);
    place.build(&upstream, &context, &args).success();

    assert_eq!(begun.load(Ordering::SeqCst), 3);
    let seen = [to_one.seen(), to_two.seen()];
    let patches = |head: &&Head| head.method == "PATCH" && is_growing(head);
    let patches = seen.map(|heads| heads.iter().filter(patches).count());
    assert_eq!(patches, [1, 2]);
    // Each once: the layer and the config.
    assert_eq!((commits(&one).len(), commits(&two).len()), (2, 4));
    let first = pulled(&place, &one, "a:1", 64);
    for name in ["a:1", "b:1"] {
        assert_eq!(pulled(&place, &two, name, 64), first, "{name}");
    }
}

#[test]
fn a_slow_registry_holds_up_no_other_and_takes_no_memory() {
    let upstream = upstream!("time");
    let place = Place::new();
    let gate = Gate::default();
    let fast = Registry::start(Options::default());
    let (slow, to_slow) = behind(&gate, || ());
    // More than the bound, and all of it stays behind.
    let mebibytes = 256;
    let context = context(&place, mebibytes);
    let names = [&fast.host, &to_slow.host].map(|host| format!("{host}/a:1"));
    let insecure = [&fast.host, &to_slow.host].map(|host| format!("--insecure-registry={host}"));
    let args = [
        "--push",
        &insecure[0],
        &insecure[1],
        "-t",
        &names[0],
        "-t",
        &names[1],
    ];
    let peak = std::thread::scope(|scope| {
        let _opened = Opened(gate.clone());
        let building = scope.spawn(|| peak_of(&place, &upstream.url(), &args, &context));
        // The fast one has the whole layer while the slow one waits for its second mebibyte.
        let deadline = Instant::now() + Duration::from_secs(300);
        while commits(&fast).is_empty() {
            assert!(!building.is_finished(), "the build ended too early");
            assert!(Instant::now() < deadline, "{}", fast.log());
            std::thread::sleep(Duration::from_millis(20));
        }
        assert_eq!(to_slow.seen().iter().filter(|h| is_growing(h)).count(), 1);
        assert_eq!(commits(&slow), []);
        gate.open();
        building.join().expect("the build succeeds")
    });
    assert!(peak < PEAK_KIB, "{peak} KiB, want less than {PEAK_KIB}");
    let layer = pulled(&place, &fast, "a:1", mebibytes);
    assert_eq!(pulled(&place, &slow, "a:1", mebibytes), layer);
    assert_eq!((commits(&fast).len(), commits(&slow).len()), (2, 2));
}

#[test]
fn sandbox_a_build_that_is_stopped_in_an_upload_leaves_nothing() {
    needs!(namespaces());
    let upstream = upstream!();
    let place = Place::new();
    let gate = Gate::default();
    let _opened = Opened(gate.clone());
    let (registry, proxy) = behind(&gate, || ());
    let mark = place.dir.path().display().to_string();
    let dockerfile = format!(
        "FROM busybox\n\
         RUN --network=none : {mark}; dd if=/dev/urandom of=/large bs=1048576 count=256\n\
         RUN --network=none : {mark}; sleep 600\n"
    );
    let context = place.context("context", &[("Dockerfile", &dockerfile)]);
    let name = format!("{}/a:1", proxy.host);
    let mut command = place.command();
    command
        .args(["build", "--progress=plain", "--push", "-t", &name])
        .arg(format!("--insecure-registry={}", proxy.host))
        .arg(format!("--registry-mirror=docker.io={}", upstream.url()))
        .arg(&context);
    let mut running = Running::start(&place, command);
    wait_for(&mut running.0, &place, || {
        let heads = proxy.seen();
        heads.iter().any(is_growing).then_some(())
    });
    let status = running.interrupt();
    let said = std::fs::read_to_string(place.dir.join("waits.log")).expect("ours");
    assert_eq!(status.code(), Some(130), "{said}");
    assert!(said.ends_with("error: interrupted\n"), "{said}");
    nothing_runs(&mark);

    sockless(&place, &["store", "verify"]).success();
    let tmp = std::fs::read_dir(place.dir.join("store/tmp")).expect("ours");
    let unfinished: Vec<_> = tmp.flatten().map(|entry| entry.path()).collect();
    assert!(unfinished.is_empty(), "{unfinished:?}");
    // The registry has been told, and has nothing that anybody can name.
    gate.open();
    let is_delete = |head: &Head| head.method == "DELETE" && head.path.contains("/blobs/uploads/");
    assert!(
        proxy.seen().iter().filter(|h| is_delete(h)).count() >= 2,
        "the check, and the upload"
    );
    // But for the base's layer, which was there before.
    let accept = [("Accept", "application/vnd.oci.image.manifest.v1+json")];
    let base = "/v2/library/busybox/manifests/latest";
    let base = http::request(&upstream.host, "GET", base, &accept, b"").json();
    let base = base["layers"][0]["digest"].as_str().expect("a text")[7..].to_owned();
    let mut others = commits(&registry);
    others.retain(|commit| !commit.path.contains(&base));
    assert_eq!(others, []);
    assert!(!registry.inspect("a:1").status.success());
    let tags = http::get(&registry.host, "/v2/a/tags/list");
    assert_eq!(tags.status, 404, "{}", tags.text());
}
