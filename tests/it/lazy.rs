//! What of a base image is fetched and made, and how often: counted in the log of its registry
//! and in the store.

use std::path::Path;

use crate::support::images;
use crate::support::registry::{Options, Registry};
use crate::support::sockless::Place;
use crate::support::{namespaces, programs};

/// The registry of base images, or the end of the test.
macro_rules! upstream {
    () => {
        match images::busybox() {
            Ok(registry) => registry,
            Err(reason) => skip!("{reason}"),
        }
    };
}

/// The digests of an image's layers.
#[track_caller]
fn layers(registry: &Registry, name: &str) -> Vec<String> {
    let manifest = registry.inspect(name).success().stdout;
    let manifest: serde_json::Value = serde_json::from_str(&manifest).expect("a manifest");
    let layers = manifest["layers"].as_array().expect("of an image");
    let digests = layers
        .iter()
        .map(|layer| layer["digest"].as_str().expect("of a layer"));
    digests.map(str::to_owned).collect()
}

/// How often each of the blobs was downloaded since the `first` request.
fn downloads(registry: &Registry, first: usize, blobs: &[String]) -> Vec<usize> {
    let requests = registry.requests().split_off(first);
    let count = |blob: &String| {
        let gets = requests.iter().filter(|request| request.method == "GET");
        gets.filter(|request| request.path.ends_with(blob)).count()
    };
    blobs.iter().map(count).collect()
}

/// The names in a directory of the store; none where it is not there.
fn stored(place: &Place, directory: &str) -> Vec<String> {
    let entries = std::fs::read_dir(place.dir.join("store").join(directory));
    let entries = entries.into_iter().flatten().flatten();
    let mut names: Vec<String> = entries
        .map(|entry| entry.file_name().into_string().expect("hexadecimal"))
        .collect();
    names.sort();
    names
}

/// Whether the store has any of the blobs.
fn has_blobs(place: &Place, blobs: &[String]) -> bool {
    let names = stored(place, "blobs/sha256");
    blobs
        .iter()
        .any(|blob| names.iter().any(|name| blob.ends_with(name)))
}

/// Builds a Dockerfile, beside files `a` and `b`, and pushes it.
#[track_caller]
fn push(place: &Place, upstream: &Registry, tag: &str, dockerfile: &str) {
    let files = [("Dockerfile", dockerfile), ("a", "a\n"), ("b", "b\n")];
    let context = place.context("context", &files);
    let (host, _) = tag.split_once('/').expect("a registry");
    // Files of contexts that are written again have other times.
    let epoch = ["--build-arg", "SOURCE_DATE_EPOCH=1700000000"];
    let args = ["-t", tag, "--push", "--insecure-registry", host];
    let args = [&args[..], &epoch].concat();
    place.build(upstream, &context, &args).success();
}

/// Where images go, with an image `base` of six layers in it.
fn destination(upstream: &Registry) -> (Registry, Vec<String>) {
    let registry = Registry::start(Options::default());
    let tag = format!("{}/base:1", registry.host);
    let dockerfile = "FROM busybox\n\
                      COPY --chmod=750 a /opt/one/\n\
                      COPY a /opt/two/\n\
                      COPY --chown=7:8 a /opt/three/\n\
                      COPY a /opt/one/four\n\
                      COPY b /srv/five\n";
    push(&Place::new(), upstream, &tag, dockerfile);
    let layers = layers(&registry, "base:1");
    assert_eq!(layers.len(), 6);
    (registry, layers)
}

#[test]
fn compose_a_build_that_only_asks_downloads_its_base_once_and_then_never() {
    let upstream = upstream!();
    let (registry, base) = destination(&upstream);
    let host = registry.host.clone();
    let place = Place::new();
    let build = |dockerfile: &str| {
        let first = registry.requests().len();
        let dockerfile = format!("FROM {host}/base:1\n{dockerfile}");
        push(&place, &upstream, &format!("{host}/app:1"), &dockerfile);
        assert_eq!(&layers(&registry, "app:1")[..6], &base[..]);
        downloads(&registry, first, &base)
    };
    // Nobody asks.
    let config = build("ENV A=1\nLABEL b=c\nCMD [\"d\"]\nCOPY --link a /linked/\n");
    assert_eq!(config, [0; 6]);
    // Something is asked for the first time.
    assert_eq!(
        build("WORKDIR /opt/new\nCOPY --chown=app:extra a .\n"),
        [1; 6]
    );
    assert_eq!(stored(&place, "trees"), [""; 0]);
    assert!(!has_blobs(&place, &base));
    let listings = stored(&place, "cache/listings");
    assert_eq!(listings.len(), 6);
    // And again, of a cached layer too.
    let again = "WORKDIR /opt/new\nCOPY --chown=app:extra a .\nCOPY b /opt/new/\nWORKDIR /srv/x\n";
    assert_eq!(build(again), [0; 6]);
    assert_eq!(stored(&place, "trees"), [""; 0]);
    // A listing that was damaged is made anew, and that alone.
    let damaged = place.dir.join("store/cache/listings").join(&listings[0]);
    let bytes = std::fs::read(&damaged).expect("listed above");
    std::fs::write(&damaged, &bytes[..bytes.len() / 2]).expect("ours");
    assert_eq!(build("WORKDIR /another\n").iter().sum::<usize>(), 1);
    assert_eq!(std::fs::read(&damaged).expect("made anew"), bytes);
}

#[test]
fn sandbox_layers_on_listed_and_on_unpacked_bases_are_the_same() {
    let upstream = upstream!();
    needs!(programs(&["bwrap"]), namespaces());
    let (registry, base) = destination(&upstream);
    let host = registry.host.clone();
    let steps = "WORKDIR /opt/one/sub\n\
                 COPY --chown=app:extra a .\n\
                 COPY a b /opt/three/\n\
                 WORKDIR /home/app/x\n\
                 COPY a /srv/five\n";
    let listed = Place::new();
    let dockerfile = format!("FROM {host}/base:1\n{steps}");
    push(&listed, &upstream, &format!("{host}/listed:1"), &dockerfile);
    assert_eq!(stored(&listed, "trees"), [""; 0]);

    // The step at the end has all unpacked from the first one on.
    let unpacked = Place::new();
    let first = registry.requests().len();
    let dockerfile = format!("{dockerfile}RUN test -f /srv/five\n");
    push(
        &unpacked,
        &upstream,
        &format!("{host}/unpacked:1"),
        &dockerfile,
    );
    assert_eq!(downloads(&registry, first, &base), [1; 6]);
    assert!(!has_blobs(&unpacked, &base), "the destination has them");
    // The base's six, those of the five steps, and the last one's.
    assert_eq!(stored(&unpacked, "trees").len(), 12);

    let (listed, unpacked) = (
        layers(&registry, "listed:1"),
        layers(&registry, "unpacked:1"),
    );
    assert_eq!(listed.len(), 6 + 5);
    assert_eq!(unpacked[..11], listed[..]);
}

#[test]
fn sandbox_blobs_for_another_registry_come_once_and_are_kept_while_needed() {
    let upstream = upstream!();
    needs!(programs(&["bwrap"]), namespaces());
    let base = layers(&upstream, "library/busybox:latest");
    let registry = Registry::start(Options::default());
    for (number, (steps, kept)) in [
        // Straight through.
        ("LABEL a=b\n", false),
        // Read for its listing, and pushed from the store.
        ("WORKDIR /a/b\n", true),
        ("WORKDIR /a/b\nRUN touch c\n", true),
        // One stage asks, the other one mounts, and each may be first.
        (
            "RUN touch /b\nFROM busybox\nWORKDIR /a\nCOPY --from=0 /b /a/\n",
            true,
        ),
    ]
    .into_iter()
    .enumerate()
    {
        let place = Place::new();
        let first = upstream.requests().len();
        let tag = format!("{}/app{number}:1", registry.host);
        push(&place, &upstream, &tag, &format!("FROM busybox\n{steps}"));
        assert_eq!(downloads(&upstream, first, &base), [1], "{steps}");
        assert_eq!(has_blobs(&place, &base), kept, "{steps}");
        // The bytes arrived.
        assert_eq!(layers(&registry, &format!("app{number}:1"))[..1], base[..]);
    }
}

#[test]
fn sandbox_a_layer_of_two_images_is_fetched_once() {
    let upstream = upstream!();
    needs!(programs(&["bwrap"]), namespaces());
    let (registry, base) = destination(&upstream);
    let host = registry.host.clone();
    let dockerfile = format!("FROM {host}/base:1\nCOPY b /other\n");
    push(
        &Place::new(),
        &upstream,
        &format!("{host}/other:1"),
        &dockerfile,
    );
    for ask in ["WORKDIR /new", "RUN touch /new"] {
        let place = Place::new();
        let first = registry.requests().len();
        let dockerfile = format!(
            "FROM {host}/base:1 AS one\n{ask}\n\
             FROM {host}/other:1 AS two\n{ask}\n\
             FROM scratch\nCOPY --from=one /new /1\nCOPY --from=two /new /2\n"
        );
        push(&place, &upstream, &format!("{host}/app:1"), &dockerfile);
        assert_eq!(downloads(&registry, first, &base), [1; 6], "{ask}");
    }
}

#[test]
fn sandbox_after_a_cache_hit_only_what_is_read_is_made() {
    let upstream = upstream!();
    needs!(programs(&["bwrap"]), namespaces());
    let (registry, base) = destination(&upstream);
    let host = registry.host.clone();
    let place = Place::new();
    let tag = format!("{host}/app:1");
    let stages = format!(
        "FROM {host}/base:1 AS made\nRUN echo made > /made\n\
         FROM {host}/base:1\nCOPY --from=made /made /srv/\nCOPY a /srv/\n"
    );
    push(&place, &upstream, &tag, &stages);
    // All that is in the store but trees and listings, as on a machine that was tidied up.
    let tidy = |directory: &str| {
        let path = place.dir.join("store").join(directory);
        remove_all(&path);
        std::fs::create_dir_all(&path).expect("ours");
    };
    tidy("trees");
    let first = registry.requests().len();
    push(
        &place,
        &upstream,
        &tag,
        &format!("{stages}COPY b /srv/more/\n"),
    );
    assert_eq!(
        downloads(&registry, first, &base),
        [0; 6],
        "there are listings"
    );
    assert_eq!(stored(&place, "trees"), [""; 0], "no stage is unpacked");
    // A RUN on top has everything below unpacked: the base's six layers, two of COPY, one new.
    push(
        &place,
        &upstream,
        &tag,
        &format!("{stages}RUN cat /srv/made /srv/a\n"),
    );
    assert_eq!(downloads(&registry, first, &base), [1; 6]);
    assert_eq!(stored(&place, "trees").len(), 9);
}

/// Removes a directory of the store, of whichever owners.
fn remove_all(path: &Path) {
    if path.exists() && std::fs::remove_dir_all(path).is_err() {
        let script = format!("rm -rf '{}'", path.display());
        let status = crate::support::unshared(&[], &script).status();
        assert!(status.expect("unshare").success());
    }
}

#[test]
fn compose_a_layout_is_read_where_it_is() {
    let upstream = upstream!();
    let (registry, base) = destination(&upstream);
    let host = registry.host.clone();
    let place = Place::new();
    let layout = place.dir.join("layout");
    registry.pull("base:1", &layout);
    let named = format!("base=oci-layout://{}", layout.display());
    let elsewhere = Registry::start(Options::default());
    let tag = format!("{}/app:1", elsewhere.host);
    let before = registry.requests().len();
    for steps in ["LABEL a=b\n", "WORKDIR /opt/one/x\nCOPY --chown=app a .\n"] {
        let dockerfile = format!("FROM base\n{steps}");
        let context = place.context("context", &[("Dockerfile", &*dockerfile), ("a", "a\n")]);
        let insecure = ["--insecure-registry", elsewhere.host.as_str()];
        let args = ["-t", &tag, "--push", "--build-context", &named];
        let args = [&args[..], &insecure].concat();
        place.build(&upstream, &context, &args).success();
        assert_eq!(layers(&elsewhere, "app:1")[..6], base[..]);
        assert!(!has_blobs(&place, &base), "{steps}");
    }
    assert_eq!(registry.requests().len(), before, "{host} was not asked");
    // An archive has the blobs, which are checked on their way.
    let context = place.context("context", &[("Dockerfile", "FROM base\nLABEL a=b\n")]);
    let image = place.built(&upstream, &context, &["--build-context", &named]);
    assert_eq!(image.layers.len(), 6);
    // A damaged one is found, whoever reads it.
    let blob = layout
        .join("blobs/sha256")
        .join(&base[5]["sha256:".len()..]);
    let mut bytes = std::fs::read(&blob).expect("pulled above");
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    std::fs::write(&blob, bytes).expect("ours");
    let empty = Place::new();
    let context = empty.context("context", &[("Dockerfile", "FROM base\nWORKDIR /x\n")]);
    let insecure = ["--insecure-registry", elsewhere.host.as_str()];
    let args = ["-t", &tag, "--push", "--build-context", &named];
    let args = [&args[..], &insecure].concat();
    empty
        .build(&upstream, &context, &args)
        .failure()
        .says(&base[5]);
}
