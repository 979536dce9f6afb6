//! Caches whose layers go away, are damaged, or whose registry fails, between the look-up of a
//! step and the use of its layer: the build goes on and does the step itself.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use serde_json::Value;

use crate::support::process::Ran;
use crate::support::proxy::{Action, Head, Proxy};
use crate::support::registry::{Options, Registry};
use crate::support::sockless::Place;
use crate::support::{http, images, namespaces, oci, programs};

/// What happens when a layer of the cache is asked for.
#[derive(Clone, Copy, Debug)]
enum Fault {
    /// The first time, all layers are removed from the registry.
    Removed,
    /// Other bytes come.
    Spoilt,
    /// No bytes come.
    Failing,
}

/// A registry with a cache behind a proxy, and one to push to.
struct Scene {
    upstream: Registry,
    proxy: Proxy,
    behind: Registry,
    destination: Registry,
    /// The layers that are lost when they are asked for, and how.
    lost: Arc<Mutex<(BTreeSet<String>, Fault)>>,
}

/// A scene, or the end of the test.
macro_rules! scene {
    () => {{
        needs!(namespaces(), programs(&["skopeo"]));
        match images::busybox() {
            Ok(upstream) => Scene::new(upstream),
            Err(reason) => skip!("{reason}"),
        }
    }};
}

impl Scene {
    fn new(upstream: Registry) -> Self {
        let [behind, destination] = [(); 2].map(|()| Registry::start(Options::default()));
        let lost = Arc::new(Mutex::new((BTreeSet::new(), Fault::Removed)));
        let (shared, host) = (Arc::clone(&lost), behind.host.clone());
        let proxy = Proxy::start(&behind.host, move |head| {
            let (layers, fault) = &*shared.lock().expect("no panic while held");
            let digest = |head: &Head| Some(head.path.split_once("/blobs/")?.1.to_owned());
            let is_lost = |digest: String| head.method == "GET" && layers.contains(&digest);
            match fault {
                _ if !digest(head).is_some_and(is_lost) => Action::Pass,
                Fault::Removed => {
                    let (repository, _) = head.path.split_once("/blobs/").expect("a blob");
                    for layer in layers {
                        let path = format!("{repository}/blobs/{layer}");
                        http::request(&host, "DELETE", &path, &[], b"");
                    }
                    Action::Pass
                }
                Fault::Spoilt => Action::Spoil,
                Fault::Failing => Action::Status(500),
            }
        });
        Self {
            upstream,
            proxy,
            behind,
            destination,
            lost,
        }
    }

    /// Builds `files` on a machine.
    #[track_caller]
    fn build(&self, place: &Place, files: &[(&str, &str)], args: &[&str]) -> Ran {
        let context = place.dir.join("context");
        let _ = std::fs::remove_dir_all(&context);
        let context = place.context("context", files);
        let hosts = [&self.proxy.host, &self.destination.host];
        let insecure = hosts.map(|host| format!("--insecure-registry={host}"));
        let mut all: Vec<&str> = insecure.iter().map(String::as_str).collect();
        all.extend(args);
        place.build(&self.upstream, &context, &all)
    }

    /// Fills the cache `NAME:main` with the steps of `files`; from now on its layers are lost.
    /// Gives what `--cache-from` takes.
    #[track_caller]
    fn fill(&self, name: &str, files: &[(&str, &str)], fault: Fault) -> String {
        let from = format!("type=registry,ref={}/{name}:main", self.proxy.host);
        let to = format!("{from},mode=max");
        let args = ["--cache-to", &to, "-o", "type=cacheonly"];
        self.build(&Place::new(), files, &args)
            .success()
            .does_not_say("warning");
        self.lose(name, fault);
        from
    }

    /// Has the layers of what is `NAME:main` lost from now on.
    #[track_caller]
    fn lose(&self, name: &str, fault: Fault) {
        let accept = [("Accept", "application/vnd.oci.image.manifest.v1+json")];
        let path = format!("/v2/{name}/manifests/main");
        let manifest = http::request(&self.behind.host, "GET", &path, &accept, b"").json();
        let layers = manifest["layers"].as_array().expect("a list").iter();
        let digest = |layer: &Value| layer["digest"].as_str().expect("a text").to_owned();
        let upstream = http::request(
            &self.upstream.host,
            "GET",
            "/v2/library/busybox/manifests/latest",
            &accept,
            b"",
        );
        // An image has the base's too, which is no layer of a cache.
        let base = digest(&upstream.json()["layers"][0]);
        let layers: BTreeSet<String> = layers.map(digest).filter(|layer| *layer != base).collect();
        assert!(!layers.is_empty());
        *self.lost.lock().expect("no panic while held") = (layers, fault);
    }

    /// How often the build began again. Each time it says which layer of which cache is lost.
    #[track_caller]
    fn losses(&self, ran: &Ran, name: &str) -> usize {
        let (layers, _) = &*self.lost.lock().expect("no panic while held");
        let begin = "warning: the layer ";
        let middle = format!(
            " of the cache {}/{name}:main cannot be had, so",
            self.proxy.host
        );
        let lines = ran.stderr.lines().filter_map(|l| l.strip_prefix(begin));
        let lost: Vec<_> = lines.filter_map(|line| line.split_once(&middle)).collect();
        for (digest, rest) in &lost {
            assert!(layers.contains(*digest), "{digest} in {}", ran.stderr);
            assert!(
                rest.starts_with(" the build begins again without "),
                "{rest}"
            );
        }
        assert!(!ran.stderr.contains("ERROR"), "{}", ran.stderr);
        assert!(!ran.stderr.contains("error:"), "{}", ran.stderr);
        lost.len()
    }
}

/// How often a step printed a line.
fn count(ran: &Ran, line: &str) -> usize {
    ran.stderr.lines().filter(|l| l.ends_with(line)).count()
}

const DOCKERFILE: &str = "FROM busybox\n\
                          COPY a /a\n\
                          RUN echo first $((6*7)) && cat /a > /made\n\
                          COPY b /b\n\
                          RUN echo second $((6*7)) && cat /made /b > /both\n";

fn files(b: &str) -> [(&'static str, &str); 3] {
    [("Dockerfile", DOCKERFILE), ("a", "a"), ("b", b)]
}

#[test]
fn sandbox_a_step_runs_on_layers_that_went_away() {
    let scene = scene!();
    for (name, fault, losses) in [
        ("removed", Fault::Removed, 1..=1),
        // Each layer that is read is wrong; the second one takes the cache with it.
        ("spoilt", Fault::Spoilt, 1..=2),
        ("failing", Fault::Failing, 1..=2),
    ] {
        let from = scene.fill(name, &files("b"), fault);
        let place = Place::new();
        let archive = place.dir.join("image.tar");
        let output = format!("type=oci,dest={}", archive.display());
        let args = ["--cache-from", &from, "-o", &output];
        let ran = scene.build(&place, &files("other"), &args).success();
        assert!(losses.contains(&scene.losses(&ran, name)), "{}", ran.stderr);
        for line in [" first 42", " second 42"] {
            assert_eq!(count(&ran, line), 1, "{line}: {}", ran.stderr);
        }
        assert_eq!(
            ran.stderr.matches("published ").count(),
            1,
            "{}",
            ran.stderr
        );
        assert_eq!(place.archive(&archive).text("both"), "aother");
        // All is here now.
        let args = ["--cache-from", &from, "-o", "type=cacheonly"];
        let ran = scene.build(&place, &files("other"), &args).success();
        assert_eq!(ran.stderr.matches(" CACHED").count(), 4, "{}", ran.stderr);
        let ran = ran.does_not_say("begins again");
        assert_eq!(scene.losses(&ran, name), 0);
    }
}

/// What an image from a cache with lost layers goes to.
struct Goal {
    name: &'static str,
    args: Vec<String>,
    /// Reads `/both` of what was written.
    read: Box<ReadBoth>,
}

type ReadBoth = dyn Fn(&Scene, &Place) -> String;

fn goals(scene: &Scene, place: &Place) -> Vec<Goal> {
    let pushed = |name: &'static str| {
        move |scene: &Scene, place: &Place| {
            let layout: PathBuf = place.dir.join(name);
            scene.destination.pull(&format!("{name}:1"), &layout);
            oci::Image::read(&layout).text("both")
        }
    };
    let host = &scene.destination.host;
    let (archive, local) = (place.dir.join("image.tar"), place.dir.join("local"));
    let output = |output: String| vec!["-o".to_owned(), output];
    vec![
        Goal {
            name: "push",
            args: vec!["--push".into(), "-t".into(), format!("{host}/push:1")],
            read: Box::new(pushed("push")),
        },
        Goal {
            name: "compressed",
            args: output(format!(
                "type=registry,name={host}/compressed:1,compression=zstd,force-compression=true"
            )),
            read: Box::new(pushed("compressed")),
        },
        Goal {
            name: "archive",
            args: output(format!("type=oci,dest={}", archive.display())),
            read: Box::new(move |_, place| place.archive(&archive).text("both")),
        },
        Goal {
            name: "local",
            args: output(format!("type=local,dest={}", local.display())),
            read: Box::new(move |_, _| {
                std::fs::read_to_string(local.join("both")).expect("it was written")
            }),
        },
    ]
}

/// Every step is found, and its layer is missing where the image goes.
#[test]
fn sandbox_an_image_goes_out_although_layers_of_its_cache_went_away() {
    let scene = scene!();
    let place = Place::new();
    for Goal { name, args, read } in goals(&scene, &place) {
        let from = scene.fill(name, &files("b"), Fault::Removed);
        let machine = Place::new();
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let args = [&["--cache-from", &from][..], &args].concat();
        let ran = scene.build(&machine, &files("b"), &args).success();
        assert_eq!(scene.losses(&ran, name), 1, "{name}: {}", ran.stderr);
        for line in [" first 42", " second 42"] {
            assert_eq!(count(&ran, line), 1, "{name}{line}: {}", ran.stderr);
        }
        assert_eq!(
            ran.stderr.matches("published ").count(),
            1,
            "{}",
            ran.stderr
        );
        assert_eq!(read(&scene, &place), "ab", "{name}");
        // What is in the store is enough without any cache.
        let again = ["-o", "type=cacheonly"];
        let ran = scene.build(&machine, &files("b"), &again).success();
        assert_eq!(ran.stderr.matches(" CACHED").count(), 4, "{}", ran.stderr);
    }
}

#[test]
fn sandbox_an_image_that_is_its_own_cache_loses_layers() {
    let scene = scene!();
    let name = format!("{}/app:main", scene.proxy.host);
    let args = ["--push", "-t", &name, "--cache-to", "type=inline"];
    scene.build(&Place::new(), &files("b"), &args).success();
    scene.lose("app", Fault::Removed);
    let next = format!("{}/next:1", scene.destination.host);
    let args = ["--push", "-t", &next, "--cache-from", &name];
    let place = Place::new();
    let ran = scene.build(&place, &files("b"), &args).success();
    assert_eq!(scene.losses(&ran, "app"), 1, "{}", ran.stderr);
    let layout = place.dir.join("pulled");
    scene.destination.pull("next:1", &layout);
    assert_eq!(oci::Image::read(&layout).text("both"), "ab");
}

/// What COPY asks of the layers below it.
#[test]
fn a_layer_that_is_only_listed_went_away() {
    let scene = scene!();
    let dockerfile = "FROM busybox\nCOPY a /dir/a\nCOPY b /dir/\n";
    let files = |b| [("Dockerfile", dockerfile), ("a", "a"), ("b", b)];
    let from = scene.fill("listed", &files("b"), Fault::Removed);
    let name = format!("{}/listed:1", scene.destination.host);
    let args = ["--push", "-t", &name, "--cache-from", &from];
    let place = Place::new();
    let ran = scene.build(&place, &files("other"), &args).success();
    assert_eq!(scene.losses(&ran, "listed"), 1, "{}", ran.stderr);
    let layout = place.dir.join("pulled");
    scene.destination.pull("listed:1", &layout);
    let image = oci::Image::read(&layout);
    assert_eq!(
        (image.text("dir/a"), image.text("dir/b")),
        ("a".into(), "other".into())
    );
}

/// Steps that are done anew are done once, and a step that fails ends the build as always.
#[test]
fn sandbox_what_was_done_is_not_done_again_and_failures_stay_failures() {
    let scene = scene!();
    let dockerfile = |last: &str| {
        format!(
            "FROM busybox AS tools\n\
             RUN echo tools $((6*7)) && echo x > /tool\n\
             FROM busybox\n\
             COPY a /a\n\
             RUN echo first $((6*7)) && cat /a > /made\n\
             COPY --from=tools /tool /tool\n\
             RUN echo last $((6*7)) && {last}\n"
        )
    };
    let (good, bad) = (dockerfile("cat /made > /two"), dockerfile("exit 7"));
    let first = dockerfile("cat /made > /one");
    let files = |text: &str| {
        [
            ("Dockerfile".to_owned(), text.to_owned()),
            ("a".into(), "a".into()),
        ]
    };
    let build = |place: &Place, text: &str, from: &str| {
        let files = files(text);
        let files = [(&*files[0].0, &*files[0].1), (&*files[1].0, &*files[1].1)];
        let args = ["--cache-from", from, "--no-cache-filter", "tools"];
        scene.build(
            place,
            &files,
            &[&args[..], &["-o", "type=cacheonly"]].concat(),
        )
    };
    let fill = |name: &str| scene.fill(name, &[("Dockerfile", &first), ("a", "a")], Fault::Removed);
    let from = fill("once");
    let ran = build(&Place::new(), &good, &from).success();
    assert_eq!(scene.losses(&ran, "once"), 1, "{}", ran.stderr);
    for line in [" tools 42", " first 42", " last 42"] {
        assert_eq!(count(&ran, line), 1, "{line}: {}", ran.stderr);
    }

    let from = fill("fails");
    let ran = build(&Place::new(), &bad, &from).failure();
    assert_eq!(ran.status.code(), Some(1));
    for line in [" tools 42", " first 42", " last 42"] {
        assert_eq!(count(&ran, line), 1, "{line}: {}", ran.stderr);
    }
    assert_eq!(
        ran.stderr.matches("begins again").count(),
        1,
        "{}",
        ran.stderr
    );
    ran.says("exit code: 7");

    // A registry that takes no image is no fault of the cache.
    let from = fill("refused");
    let name = format!("{}/app:1", scene.upstream.host);
    let insecure = format!("--insecure-registry={}", scene.upstream.host);
    let args = [&insecure, "--push", "-t", &name, "--cache-from", &from];
    let ran = scene.build(&Place::new(), &[("Dockerfile", &first), ("a", "a")], &args);
    ran.failure().does_not_say("begins again").says("405");
}

#[test]
fn security_s18_sandbox_a_directory_with_damaged_layers_is_a_cache_with_less() {
    let scene = scene!();
    let shared = Place::new();
    let dir = shared.dir.join("cache");
    let to = format!("type=local,dest={},mode=max", dir.display());
    let args = ["--cache-to", &to, "-o", "type=cacheonly"];
    scene.build(&Place::new(), &files("b"), &args).success();
    let read = |digest: &Value| {
        let path = dir
            .join("blobs/sha256")
            .join(&digest.as_str().expect("a text")[7..]);
        let bytes = std::fs::read(&path).expect("written");
        (path, bytes)
    };
    let index = std::fs::read(dir.join("index.json")).expect("written");
    let index: Value = serde_json::from_slice(&index).expect("JSON");
    let (_, manifest) = read(&index["manifests"][0]["digest"]);
    let manifest: Value = serde_json::from_slice(&manifest).expect("JSON");
    for layer in manifest["layers"].as_array().expect("a list") {
        let (path, mut bytes) = read(&layer["digest"]);
        let last = bytes.len() - 1;
        bytes[last] ^= 1;
        std::fs::write(path, bytes).expect("ours");
    }
    let from = format!("type=local,src={}", dir.display());
    let place = Place::new();
    let args = ["--cache-from", &from, "-o", "type=cacheonly"];
    let ran = scene.build(&place, &files("b"), &args).success();
    let ran = ran.says("warning: a layer of a cache is not used: ");
    for line in [" first 42", " second 42"] {
        assert_eq!(count(&ran, line), 1, "{line}: {}", ran.stderr);
    }
    crate::store::sockless(&place, &["store", "verify"]).success();
}

/// The next cache is there, with less in it.
#[test]
fn sandbox_a_cache_that_is_exported_again_does_without_what_went_away() {
    let scene = scene!();
    let local = Place::new();
    let dir = local.dir.join("cache");
    let places = [
        format!("type=registry,ref={}/next:main", scene.destination.host),
        format!("type=local,dest={}", dir.display()),
    ];
    let froms = [
        places[0].clone(),
        format!("type=local,src={}", dir.display()),
    ];
    for (at, (to, next)) in places.iter().zip(&froms).enumerate() {
        let from = scene.fill(&format!("export{at}"), &files("b"), Fault::Removed);
        let strict = format!("{to},mode=max,ignore-error=false");
        // Nothing but the export asks for the layers.
        let args = [
            "--cache-from",
            &from,
            "--cache-to",
            &strict,
            "-o",
            "type=cacheonly",
        ];
        let ran = scene.build(&Place::new(), &files("b"), &args).success();
        assert_eq!(ran.stderr.matches(" CACHED").count(), 4, "{}", ran.stderr);
        let ran = ran
            .says("its step is left out: sha256:")
            .does_not_say("begins again");
        assert_eq!(
            ran.stderr.matches("is left out: ").count(),
            4,
            "{}",
            ran.stderr
        );
        let args = ["--cache-from", next, "-o", "type=cacheonly"];
        let ran = scene.build(&Place::new(), &files("b"), &args).success();
        ran.does_not_say("warning").says(" first 42");
    }
}
