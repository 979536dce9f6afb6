//! Several platforms in one build, what becomes of them, and how many steps run at once.
//!
//! The images say that they are for other architectures, and have programs for this machine.

use std::net::TcpListener;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::support::oci::{Image, sha256};
use crate::support::process::{Daemon, Ran, run};
use crate::support::registry::{Options, Registry, skopeo};
use crate::support::sockless::Place;
use crate::support::tarball;
use crate::support::{images, namespaces, programs};

const INDEX: &str = "application/vnd.oci.image.index.v1+json";
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

/// This machine's architecture, and two that it is not.
fn architectures() -> [&'static str; 3] {
    if cfg!(target_arch = "aarch64") {
        ["arm64", "amd64", "riscv64"]
    } else {
        ["amd64", "arm64", "riscv64"]
    }
}

/// A registry that can be written to, and that has `library/base:latest`: an index of one
/// busybox for each of [`architectures`]. The variable `BASE` says which it is.
fn upstream(place: &Place) -> Result<Registry, String> {
    let busybox = images::busybox()?;
    let layout = place.dir.join("base");
    busybox.pull("library/busybox:latest", &layout);
    let blob = |digest: &Value| layout.join("blobs/sha256").join(&text(digest)[7..]);
    let index = read(&layout.join("index.json"));
    let manifest = read(&blob(&index["manifests"][0]["digest"]));
    let config = read(&blob(&manifest["config"]["digest"]));
    let put = |document: &Value, media_type: &str| {
        let bytes = document.to_string().into_bytes();
        let digest = json!(sha256(&bytes));
        std::fs::write(blob(&digest), &bytes).expect("ours");
        json!({ "mediaType": media_type, "digest": digest, "size": bytes.len() })
    };
    let entries = architectures().map(|architecture| {
        let mut config = config.clone();
        config["architecture"] = json!(architecture);
        let env = config["config"]["Env"].as_array_mut().expect("it has some");
        env.push(json!(format!("BASE={architecture}")));
        let mut manifest = manifest.clone();
        manifest["config"] = put(&config, "application/vnd.oci.image.config.v1+json");
        let mut entry = put(&manifest, MANIFEST);
        entry["platform"] = json!({ "architecture": architecture, "os": "linux" });
        entry
    });
    let all = json!({ "schemaVersion": 2, "mediaType": INDEX, "manifests": entries });
    let top = json!({ "schemaVersion": 2, "manifests": [put(&all, INDEX)] });
    std::fs::write(layout.join("index.json"), top.to_string()).expect("ours");
    let registry = Registry::start(Options::default());
    registry.push(&layout, "library/base:latest");
    Ok(registry)
}

/// A place and a registry of base images, or the end of the test.
macro_rules! begin {
    ($($needed:expr),*) => {{
        needs!(programs(&["skopeo"]), images::registry_present() $(, $needed)*);
        let place = Place::new();
        match upstream(&place) {
            Ok(registry) => (place, registry),
            Err(reason) => skip!("{reason}"),
        }
    }};
}

fn read(path: &Path) -> Value {
    let bytes = std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_slice(&bytes).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_else(|| panic!("no text: {value}"))
}

/// `linux/a,linux/b` of these architectures.
fn platforms(architectures: &[&str]) -> String {
    let platforms: Vec<String> = (architectures.iter())
        .map(|architecture| format!("linux/{architecture}"))
        .collect();
    platforms.join(",")
}

#[track_caller]
fn build(place: &Place, upstream: &Registry, dockerfile: &str, args: &[&str]) -> Ran {
    let context = place.context("context", &[("Dockerfile", dockerfile), ("file", "text\n")]);
    let insecure = ["--insecure-registry", upstream.host.as_str()];
    place.build(upstream, &context, &[&insecure[..], args].concat())
}

/// What stands under a name at a registry, by the registry's own reader: its bytes' digest, and
/// the bytes.
#[track_caller]
fn inspected(registry: &Registry, name: &str) -> (String, Value) {
    let raw = registry.inspect(name).success().stdout;
    let value = serde_json::from_str(&raw).expect("JSON");
    (sha256(raw.as_bytes()), value)
}

/// Pulls one image of an index.
#[track_caller]
fn pulled(place: &Place, registry: &Registry, name: &str, entry: &Value) -> Image {
    let digest = text(&entry["digest"]);
    let layout = place.dir.join(format!("pulled-{}", &digest[7..19]));
    let (repository, _) = name.rsplit_once(':').expect("a tag");
    registry.pull(&format!("{repository}@{digest}"), &layout);
    let image = Image::read(&layout);
    assert_eq!(image.digest, digest);
    image
}

/// How often the output of a step has a line.
fn count(ran: &Ran, line: &str) -> usize {
    let lines = ran.stderr.lines();
    lines.filter(|found| found.ends_with(line)).count()
}

#[test]
fn sandbox_a_stage_for_this_machine_is_built_once_and_the_index_names_every_image() {
    let (place, upstream) = begin!(namespaces());
    let [own, other, _] = architectures();
    let dockerfile = "FROM --platform=$BUILDPLATFORM base AS tools\n\
        RUN echo \"made on $BASE\" > /made; cat /made\n\
        FROM base\n\
        ARG TARGETPLATFORM\n\
        COPY --from=tools /made /\n\
        RUN echo \"$TARGETPLATFORM of $BASE\" > /for; cat /for\n\
        LABEL for=$TARGETPLATFORM\n";
    let tags = ["app/a:1", "app/a:2", "app/b:1"].map(|tag| format!("{}/{tag}", upstream.host));
    let metadata = place.dir.join("metadata.json");
    let iid = place.dir.join("iid");
    let asked = platforms(&[other, own, other]);
    let mut args = vec!["--push", "--platform", asked.as_str()];
    args.extend(tags.iter().flat_map(|tag| ["-t", tag.as_str()]));
    args.extend(["--metadata-file", metadata.to_str().expect("UTF-8")]);
    args.extend(["--iidfile", iid.to_str().expect("UTF-8")]);
    // The bases have the same layers, so that steps on them share a record, and its date.
    args.extend(["--build-arg", "SOURCE_DATE_EPOCH=1700000000"]);
    let ran = build(&place, &upstream, dockerfile, &args).success();
    assert_eq!(count(&ran, &format!(" made on {own}")), 1, "{}", ran.stderr);
    for architecture in [own, other] {
        let line = format!(" linux/{architecture} of {architecture}");
        assert_eq!(count(&ran, &line), 1, "{}", ran.stderr);
    }
    let ran = ran
        .says(&format!("[linux/{own} tools 2/2] RUN echo"))
        .says(&format!("[linux/{other} stage-1 3/3] RUN echo"));
    assert_eq!(count(&ran, "AS tools"), 1, "{}", ran.stderr);

    let (digest, index) = inspected(&upstream, "app/a:1");
    for tag in ["app/a:2", "app/b:1"] {
        assert_eq!(inspected(&upstream, tag).0, digest, "{tag}");
    }
    assert_eq!(
        (&index["mediaType"], &index["schemaVersion"]),
        (&json!(INDEX), &json!(2))
    );
    let entries = index["manifests"].as_array().expect("a list");
    assert_eq!(entries.len(), 2);
    for (entry, architecture) in entries.iter().zip([other, own]) {
        let platform = json!({ "architecture": architecture, "os": "linux" });
        assert_eq!(
            (&entry["platform"], &entry["mediaType"]),
            (&platform, &json!(MANIFEST))
        );
        let image = pulled(&place, &upstream, "app/b:1", entry);
        assert_eq!(image.config["architecture"], architecture);
        assert_eq!(
            image.run_config()["Labels"]["for"],
            format!("linux/{architecture}")
        );
        assert_eq!(image.text("made"), format!("made on {own}\n"));
        assert_eq!(
            image.text("for"),
            format!("linux/{architecture} of {architecture}\n")
        );
    }
    // The manifests are there before the index that names them.
    let puts = upstream.writes().into_iter();
    let puts = puts.filter(|r| r.method == "PUT" && r.path.contains("/app/a/manifests/"));
    let puts: Vec<String> = puts.map(|r| r.path).collect();
    let (before, tagged) = puts.split_at(2);
    for entry in entries {
        let end = format!("/manifests/{}", text(&entry["digest"]));
        assert!(before.iter().any(|path| path.ends_with(&end)), "{puts:?}");
    }
    assert_eq!(
        tagged,
        ["/v2/app/a/manifests/1", "/v2/app/a/manifests/2"],
        "{puts:?}"
    );

    assert_eq!(
        std::fs::read_to_string(&iid).expect("it was written"),
        digest
    );
    let raw = upstream.inspect("app/a:1").success().stdout;
    assert_eq!(
        read(&metadata),
        json!({
            "containerimage.digest": digest,
            "containerimage.descriptor": { "mediaType": INDEX, "digest": digest, "size": raw.len() },
            "image.name": tags.join(","),
        })
    );

    // Again: all is there, and the index is the same.
    let again = build(&place, &upstream, dockerfile, &args).success();
    assert_eq!(
        count(&again, &format!(" made on {own}")),
        0,
        "{}",
        again.stderr
    );
    assert_eq!(inspected(&upstream, "app/a:1").0, digest);
}

/// The bases have equal layers, so that what is copied onto them is one layer with one date.
#[test]
fn equal_steps_of_two_platforms_are_done_once_and_the_next_build_makes_the_same() {
    let [own, other, third] = architectures();
    for first in [&[][..], &["--no-cache"]] {
        let (place, upstream) = begin!();
        let dockerfile = "FROM base\nWORKDIR /new\nCOPY file .\nCOPY --link file /linked\n";
        let asked = platforms(&[own, other, third]);
        let name = format!("{}/app:1", upstream.host);
        let args = ["--platform", &asked, "--push", "-t", &name];
        let ran = build(&place, &upstream, dockerfile, &[&args, first].concat()).success();
        // Two of three have each of the three steps from the first.
        assert_eq!(ran.stderr.matches(" CACHED").count(), 6, "{}", ran.stderr);
        let (digest, index) = inspected(&upstream, "app:1");
        let entries = index["manifests"].as_array().expect("a list");
        let images = entries
            .iter()
            .map(|entry| pulled(&place, &upstream, "app:1", entry));
        let images: Vec<Image> = images.collect();
        for image in &images {
            assert_eq!(image.manifest["layers"], images[0].manifest["layers"]);
            assert_eq!(image.config["history"], images[0].config["history"]);
            assert_eq!(image.config["created"], images[0].config["created"]);
            assert_eq!(image.text("new/file"), "text\n");
        }

        let again = build(&place, &upstream, dockerfile, &args).success();
        assert_eq!(
            again.stderr.matches(" CACHED").count(),
            9,
            "{}",
            again.stderr
        );
        assert_eq!(inspected(&upstream, "app:1").0, digest, "{first:?}");
    }
}

#[test]
fn archives_and_layouts_hold_the_index_with_its_annotations() {
    let (place, upstream) = begin!();
    let [own, other, third] = architectures();
    let archive = place.dir.join("index.tar");
    let layout = place.dir.join("index");
    let outputs = [
        format!("type=oci,dest={},name=h.io/app:1", archive.display()),
        format!(
            "type=oci,tar=false,dest={},name=h.io/app:1",
            layout.display()
        ),
    ];
    let asked = platforms(&[own, other]);
    let only = format!("manifest[linux/{other}]:only=one");
    let last = platforms(&[third]);
    let args = [
        &["--platform", &asked, "--platform", &last][..],
        &["-o", &outputs[0], "-o", &outputs[1]],
        &["--annotation", "index,index-descriptor:i=1"],
        &["--annotation", "manifest,manifest-descriptor:m=2"],
        &["--annotation", &only],
        &["--build-arg", "SOURCE_DATE_EPOCH=1700000000"],
    ]
    .concat();
    build(&place, &upstream, "FROM base\nCOPY file /\n", &args).success();

    // What skopeo finds in both is one index.
    let raw = |from: String| {
        let ran = run(skopeo().args(["inspect", "--raw", &from])).success();
        ran.stdout
    };
    let of_archive = raw(format!("oci-archive:{}:1", archive.display()));
    assert_eq!(of_archive, raw(format!("oci:{}:1", layout.display())));
    let index: Value = serde_json::from_str(&of_archive).expect("JSON");
    assert_eq!(index["annotations"], json!({ "i": "1" }));
    let top = read(&layout.join("index.json"));
    assert_eq!(
        top["manifests"],
        json!([{
            "mediaType": INDEX,
            "digest": sha256(of_archive.as_bytes()),
            "size": of_archive.len(),
            "annotations": {
                "i": "1",
                "io.containerd.image.name": "h.io/app:1",
                "org.opencontainers.image.ref.name": "1",
            },
        }])
    );
    // skopeo copies every image, and verifies every byte.
    let copies = ["archive", "layout"].map(|name| place.dir.join(format!("copy-{name}")));
    let froms = [
        format!("oci-archive:{}:1", archive.display()),
        format!("oci:{}:1", layout.display()),
    ];
    for (from, copy) in froms.iter().zip(&copies) {
        run(skopeo()
            .args(["copy", "--all", "--preserve-digests", from])
            .arg(format!("oci:{}:1", copy.display())))
        .success();
    }
    let blob =
        |digest: &Value| -> PathBuf { copies[0].join("blobs/sha256").join(&text(digest)[7..]) };
    let entries = index["manifests"].as_array().expect("a list");
    assert_eq!(entries.len(), 3);
    let mut layers = Vec::new();
    for (entry, architecture) in entries.iter().zip([own, other, third]) {
        assert_eq!(
            entry["platform"],
            json!({ "architecture": architecture, "os": "linux" })
        );
        assert_eq!(entry["annotations"], json!({ "m": "2" }));
        let manifest = read(&blob(&entry["digest"]));
        let annotations = if architecture == other {
            json!({ "m": "2", "only": "one" })
        } else {
            json!({ "m": "2" })
        };
        assert_eq!(manifest["annotations"], annotations);
        let config = read(&blob(&manifest["config"]["digest"]));
        assert_eq!(config["architecture"], architecture);
        let env = config["config"]["Env"].as_array().expect("a list");
        assert!(
            env.contains(&json!(format!("BASE={architecture}"))),
            "{env:?}"
        );
        layers.push(manifest["layers"].clone());
    }
    // The copied file does not depend on the platform.
    assert!(layers.iter().all(|list| *list == layers[0]), "{layers:?}");

    // The same inputs give the same index.
    let again = place.dir.join("again.tar");
    let output = format!("type=oci,dest={},name=h.io/app:1", again.display());
    let mut args = args.clone();
    args[5] = &output;
    build(&place, &upstream, "FROM base\nCOPY file /\n", &args).success();
    assert_eq!(
        std::fs::read(again).expect("it was written"),
        std::fs::read(archive).expect("it was written")
    );
}

#[test]
fn one_platform_is_an_index_where_that_is_asked_for() {
    let (place, upstream) = begin!();
    let [own, other, _] = architectures();
    let tag = format!("{}/app:1", upstream.host);
    let dockerfile = "FROM base\nCOPY file /\n";
    let args = ["--push", "-t", &tag, "--build-arg"];
    let args = [&args[..], &["BUILDKIT_MULTI_PLATFORM=true"][..]].concat();
    build(&place, &upstream, dockerfile, &args)
        .success()
        .does_not_say("warning");
    let (_, index) = inspected(&upstream, "app:1");
    let [entry] = &index["manifests"].as_array().expect("a list")[..] else {
        panic!("{index}");
    };
    assert_eq!(
        entry["platform"],
        json!({ "architecture": own, "os": "linux" })
    );

    let both = platforms(&[own, other]);
    for (args, says) in [
        (
            vec!["--platform", &both, "-o", "type=docker,dest=x.tar"],
            "type=docker: an archive for docker load holds one image and no index of several platforms",
        ),
        (
            vec![
                "--platform",
                &both,
                "-o",
                "type=tar,dest=x.tar,platform-split=false",
            ],
            "type=tar,platform-split=false: the files of several platforms cannot be in one directory",
        ),
        (
            vec![
                "--platform",
                &both,
                "--build-arg",
                "BUILDKIT_MULTI_PLATFORM=false",
            ],
            "--build-arg BUILDKIT_MULTI_PLATFORM wants no index, but several platforms are built",
        ),
        (
            vec!["--annotation", "index:a=b"],
            "the annotation \"a\" is for an index, and an image for one platform has none",
        ),
        (
            vec![
                "--platform",
                &both,
                "--annotation",
                "manifest[linux/s390x]:a=b",
            ],
            "an annotation is for the platform linux/s390x, but what is built is for linux/",
        ),
    ] {
        let ran = build(&place, &upstream, dockerfile, &args).says(says);
        assert_eq!(ran.status.code(), Some(2), "{args:?}: {}", ran.stderr);
    }
}

#[test]
fn sandbox_files_of_each_platform_are_in_a_directory_of_its_own() {
    let (place, upstream) = begin!(namespaces());
    let [own, other, _] = architectures();
    let dockerfile = "FROM base AS made\nARG TARGETARCH\nRUN mkdir /out && echo $TARGETARCH > /out/for-$TARGETARCH\n\
                      FROM scratch\nCOPY --from=made /out /\n";
    let [files, merged] = ["files", "merged"].map(|name| place.dir.join(name));
    let (tar, single) = (place.dir.join("files.tar"), place.dir.join("single"));
    let outputs = [
        format!("type=local,dest={}", files.display()),
        format!("type=local,dest={},platform-split=false", merged.display()),
        format!("type=tar,dest={}", tar.display()),
    ];
    let both = platforms(&[own, other]);
    let mut args = vec!["--platform", &both];
    args.extend(outputs.iter().flat_map(|output| ["-o", output.as_str()]));
    build(&place, &upstream, dockerfile, &args).success();
    let listed = |dir: &Path| {
        let entries = std::fs::read_dir(dir).expect("it was written");
        let names = entries.map(|e| e.expect("readable").file_name().into_string());
        let mut names: Vec<String> = names.map(|name| name.expect("UTF-8")).collect();
        names.sort();
        names
    };
    let mut directories = [own, other].map(|architecture| format!("linux_{architecture}"));
    directories.sort();
    assert_eq!(listed(&files), directories);
    let mut names = [own, other].map(|architecture| format!("for-{architecture}"));
    names.sort();
    assert_eq!(listed(&merged), names);
    let mut in_tar = Vec::new();
    for architecture in ["amd64", "arm64"] {
        let dir = files.join(format!("linux_{architecture}"));
        let name = format!("for-{architecture}");
        assert_eq!(listed(&dir), [name.as_str()]);
        let content = std::fs::read_to_string(dir.join(&name)).expect("it was written");
        assert_eq!(content, format!("{architecture}\n"));
        in_tar.push(format!("linux_{architecture}"));
        in_tar.push(format!("linux_{architecture}/{name}"));
    }
    let entries = tarball::list(std::fs::File::open(tar).expect("it was written"));
    let paths = entries.expect("a tar").into_iter().map(|entry| entry.path);
    assert_eq!(paths.collect::<Vec<_>>(), in_tar);

    // Of one platform where that is asked for.
    let output = format!("type=local,dest={},platform-split=true", single.display());
    build(&place, &upstream, dockerfile, &["-o", &output]).success();
    assert_eq!(listed(&single), [format!("linux_{own}")]);

    let refused = place.dir.join("refused");
    let output = format!("type=local,dest={},platform-split=false", refused.display());
    let same = "FROM base\nCOPY file /\n";
    build(
        &place,
        &upstream,
        same,
        &["--platform", &both, "-o", &output],
    )
    .failure()
    .says("is in the images for linux/");
    assert!(!refused.exists());
}

#[test]
fn each_platform_has_its_own_stages_contexts_and_checks() {
    let (place, upstream) = begin!();
    let [own, other, _] = architectures();
    let [for_own, for_other] = ["own", "other"].map(|name| {
        let file = [(name, "text\n")];
        place.context(name, &file)
    });
    // No stage for the third one; of the unneeded, nobody knows the images.
    let dockerfile = format!(
        "FROM 127.0.0.1:1/nowhere AS unneeded\nRUN false\n\
         FROM base AS for-{own}\nCOPY file /a\n\
         FROM base AS for-{other}\nCOPY file /b\n\
         FROM for-$TARGETARCH\nCOPY --from=files / /files/\nMAINTAINER me\n"
    );
    let archive = place.dir.join("out");
    let output = format!("type=oci,tar=false,dest={}", archive.display());
    let both = platforms(&[own, other]);
    let contexts = [
        format!("files={}", for_own.display()),
        format!("files::linux/{other}={}", for_other.display()),
    ];
    let contexts: Vec<&str> = (contexts.iter())
        .flat_map(|context| ["--build-context", context.as_str()])
        .collect();
    let args = [&["--platform", &both, "-o", &output][..], &contexts[..]].concat();
    let ran = build(&place, &upstream, &dockerfile, &args).success();
    // What is told is told once, and that context was used.
    assert_eq!(ran.stderr.matches("MaintainerDeprecated").count(), 1);
    let ran = ran.does_not_say("that nothing uses");
    assert!(!ran.stderr.contains("nowhere"), "{}", ran.stderr);
    let raw = run(skopeo()
        .args(["inspect", "--raw"])
        .arg(format!("oci:{}:latest", archive.display())));
    let index: Value = serde_json::from_str(&raw.success().stdout).expect("JSON");
    let blob = |digest: &Value| archive.join("blobs/sha256").join(&text(digest)[7..]);
    for (entry, wanted) in (index["manifests"].as_array().expect("a list").iter())
        .zip([["a", "files/own"], ["b", "files/other"]])
    {
        let manifest = read(&blob(&entry["digest"]));
        let layers = manifest["layers"].as_array().expect("a list");
        let files: Vec<String> = layers[layers.len() - 2..]
            .iter()
            .flat_map(|layer| {
                let bytes = std::fs::read(blob(&layer["digest"])).expect("it is there");
                let tar = flate2::read::MultiGzDecoder::new(&bytes[..]);
                tarball::list(tar).expect("a tar")
            })
            .filter(|entry| entry.kind == '0')
            .map(|entry| entry.path)
            .collect();
        assert_eq!(files, wanted);
    }

    // Questions are asked for all of them, too.
    let needed = dockerfile.replace("FROM 127.0.0.1:1/nowhere AS unneeded\nRUN false\n", "");
    let check = |args: &[&str]| {
        let args = [args, &contexts[..], &["--check"]].concat();
        build(&place, &upstream, &needed, &args)
    };
    let ran = check(&["--platform", &both]);
    assert_eq!(ran.stdout.matches("MaintainerDeprecated").count(), 1);
    let wrong = platforms(&[own, "s390x"]);
    let ran = check(&["--platform", &wrong]).failure();
    assert!(
        ran.stderr.contains("for linux/s390x: "),
        "{}{}",
        ran.stdout,
        ran.stderr
    );
    let args = [&["--platform", &wrong, "-o", "x"][..], &contexts[..]].concat();
    let ran = build(&place, &upstream, &dockerfile, &args);
    ran.failure().says("s390x");
}

/// A program for a machine that is not this one: the head of an ELF file for s390x.
fn foreign_program() -> Vec<u8> {
    let mut bytes = vec![0x7f, b'E', b'L', b'F', 2, 2, 1];
    bytes.resize(16, 0);
    bytes.extend([0, 2, 0, 22, 0, 0, 0, 1]);
    bytes.resize(64, 0);
    bytes
}

#[test]
fn sandbox_programs_that_cannot_run_here_are_told_before_and_after() {
    let (place, upstream) = begin!(namespaces());
    let context = place.context(
        "context",
        &[(
            "Dockerfile",
            "FROM scratch\nCOPY --chmod=755 program /program\nRUN [\"/program\"]\n",
        )],
    );
    std::fs::write(context.join("program"), foreign_program()).expect("ours");
    let ran = place.build(&upstream, &context, &["--platform", "linux/s390x"]);
    let ran = ran.failure();
    if !ran.stderr.contains("exec format error") {
        skip!("an emulator for s390x is registered here");
    }
    let advice = "register an emulator for s390x with binfmt_misc (such as Debian's \
                  qemu-user-static), or compile on this machine's platform: FROM \
                  --platform=$BUILDPLATFORM";
    assert_eq!(ran.status.code(), Some(1), "{}", ran.stderr);
    let what = "this machine cannot run programs for linux/s390x";
    let ran = ran.says(&format!("warning: Dockerfile:3:1: {what}: {advice}"));
    ran.says(&format!("hint: {what}: {advice}"));
    // Where nothing is run, nothing has to be.
    let text = "FROM scratch\nCOPY program /program\n";
    std::fs::write(context.join("Dockerfile"), text).expect("ours");
    place
        .build(&upstream, &context, &["--platform", "linux/s390x"])
        .success()
        .does_not_say("cannot run");
}

/// Stages `a` and `b` that do not need each other and run `command` with a cache that they share.
fn two_stages(command: &str) -> String {
    let stage = |name: &str, other: &str| {
        let command = command.replace("OWN", name).replace("OTHER", other);
        format!(
            "FROM base AS {name}\n\
             RUN --mount=type=cache,target=/c,id=shared {command}; mkdir /made\n"
        )
    };
    format!(
        "{}{}FROM scratch\nCOPY --from=a /made /a\nCOPY --from=b /made /b\n",
        stage("a", "b"),
        stage("b", "a")
    )
}

#[test]
fn sandbox_as_many_steps_run_at_once_as_there_are_jobs() {
    let (place, upstream) = begin!(namespaces());
    // Each waits for the other one, which has to run at the same time.
    let meet = two_stages("touch /c/OWN; until test -e /c/OTHER; do sleep 0.02; done");
    for jobs in [&["--jobs", "2"][..], &["--jobs=0"], &[]] {
        let args = [jobs, &["--no-cache"]].concat();
        build(&place, &upstream, &meet, &args).success();
    }
    // Nobody is there while one runs; the other one's turn comes all the same.
    let alone = two_stages(
        ": OWN; mkdir /c/busy || exit 9; for i in 1 2 3 4 5 6 7 8 9; do ls -lR /bin > /c/list; done; rmdir /c/busy",
    );
    let archive = |name: &str| place.dir.join(name);
    let mut made = Vec::new();
    for (name, args) in [("one", ["--jobs", "1"]), ("two", ["--jobs", "2"])] {
        let output = format!("type=oci,dest={}", archive(name).display());
        let quick = two_stages(": OWN");
        let dockerfile = if name == "one" { &alone } else { &quick };
        let epoch = ["--build-arg", "SOURCE_DATE_EPOCH=1"];
        let args = [&args[..], &epoch, &["--no-cache", "-o", &output]].concat();
        build(&place, &upstream, dockerfile, &args).success();
        made.push(place.archive(&archive(name)).digest);
    }
    assert_eq!(made[0], made[1]);

    // A step that waits for a cache lets others run: the one that has it waits for a third.
    let stage = |name: &str, mount: &str, command: &str| {
        format!(
            "FROM base AS {name}\n\
             RUN --mount=type=cache,target=/meet,id=meeting {mount} {command}; mkdir /made\n"
        )
    };
    let lock = "--mount=type=cache,target=/lock,id=lock,sharing=locked";
    let holds = "if mkdir /meet/first; then until test -e /meet/third; do sleep 0.02; done; fi";
    let waiting = format!(
        "{}{}{}FROM scratch\nCOPY --from=x /made /x\nCOPY --from=y /made /y\nCOPY --from=z /made /z\n",
        stage("x", lock, holds),
        stage("y", lock, &format!(": y; {holds}")),
        stage(
            "z",
            "",
            "until test -d /meet/first; do sleep 0.02; done; touch /meet/third"
        ),
    );
    let args = ["--jobs", "2", "--no-cache"];
    build(&place, &upstream, &waiting, &args).success();

    let ran = build(&place, &upstream, &meet, &["--jobs", "x"]).failure();
    assert_eq!(ran.status.code(), Some(2), "{}", ran.stderr);
}

#[test]
fn a_build_that_is_stopped_waits_for_no_registry() {
    let place = Place::new();
    // It takes connections and never answers.
    let silent = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let host = silent.local_addr().expect("it is bound");
    let dockerfile = format!("FROM {host}/never\n");
    let context = place.context("context", &[("Dockerfile", &dockerfile)]);
    let mut command = place.command();
    command
        .args(["build", "--progress", "rawjson", "--insecure-registry"])
        .arg(host.to_string())
        .arg(&context);
    let mut daemon = Daemon::start(command, &place.dir.join("log"));
    let (connection, _) = silent.accept().expect("it resolves the image");
    let status = daemon.terminate();
    drop(connection);
    assert_eq!(status.code(), Some(143), "{}", daemon.log());
    // It ended by itself, as its last event says, and was not given up.
    let log = daemon.log();
    let mut events = log
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let last = events.next_back().expect("there are events");
    assert!(last.to_string().contains("\"stopped\""), "{log}");
}
