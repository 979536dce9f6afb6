//! `--output`: what stands in files and directories afterwards, read by other programs.

use std::collections::BTreeMap;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::support::oci::Image;
use crate::support::process::run;
use crate::support::registry::skopeo;
use crate::support::sockless::Place;
use crate::support::tarball::{self, Entry};
use crate::support::{images, namespaces, programs};

/// The registry of base images, or the end of the test.
macro_rules! upstream {
    () => {
        match images::busybox() {
            Ok(registry) => registry,
            Err(reason) => skip!("{reason}"),
        }
    };
}

/// Two stages' worth of files: of the base, copied, made, removed, linked.
const DOCKERFILE: &str = "FROM busybox\n\
     COPY --chown=7:9 --chmod=4750 tool /opt/tool\n\
     RUN echo text > /opt/first && ln /opt/first /opt/second && chown 5:6 /opt/first && \
         ln -s ../../../escape /opt/out && mkfifo -m 600 /opt/pipe && \
         rm -r /home && mkdir -m 1777 /opt/open && chown 1000:1001 /opt/open\n";

fn context(place: &Place) -> std::path::PathBuf {
    place.context("context", &[("Dockerfile", DOCKERFILE), ("tool", "text")])
}

fn entries(tar: &Path) -> BTreeMap<String, Entry> {
    let list = tarball::list(std::fs::File::open(tar).expect("it was written"));
    let list = list.unwrap_or_else(|wrong| panic!("{}: {wrong}", tar.display()));
    let paths: Vec<&str> = list.iter().map(|e| e.path.as_str()).collect();
    let by_path = |e: &Entry| e.path.split('/').map(str::to_owned).collect::<Vec<_>>();
    assert!(
        list.is_sorted_by_key(by_path),
        "not in path order: {paths:?}"
    );
    list.into_iter().map(|e| (e.path.clone(), e)).collect()
}

/// What the layers are together, worked out from their archives alone.
fn flattened(image: &Image) -> BTreeMap<String, Entry> {
    let mut files: BTreeMap<String, Entry> = BTreeMap::new();
    for layer in &image.layers {
        for entry in &layer.entries {
            let (dir, name) = entry.path.rsplit_once('/').unwrap_or(("", &entry.path));
            let below = |path: &str, of: &str| path.starts_with(&format!("{of}/"));
            if let Some(gone) = name.strip_prefix(".wh.") {
                let gone = format!("{dir}/{gone}");
                let gone = gone.trim_start_matches('/');
                files.retain(|path, _| path != gone && !below(path, gone));
                continue;
            }
            if entry.kind != '5' {
                files.retain(|path, _| !below(path, &entry.path));
            }
            files.insert(entry.path.clone(), entry.clone());
        }
    }
    files
}

#[test]
fn sandbox_outputs_of_one_build_agree_with_each_other() {
    needs!(namespaces(), programs(&["skopeo"]));
    let upstream = upstream!();
    let place = Place::new();
    let context = context(&place);
    let (tar, layout) = (place.dir.join("root.tar"), place.dir.join("layout"));
    let (docker, files) = (place.dir.join("docker.tar"), place.dir.join("files"));
    let metadata = place.dir.join("metadata.json");
    let outputs = [
        format!("type=tar,dest={}", tar.display()),
        format!(
            "type=oci,tar=false,dest={},annotation.a.b=c",
            layout.display()
        ),
        format!("type=docker,dest={},name=h.io/named:2", docker.display()),
        files.display().to_string(),
    ];
    let mut args = vec!["-t", "app:1", "--metadata-file", metadata.to_str().unwrap()];
    args.extend(outputs.iter().flat_map(|output| ["-o", output.as_str()]));
    place.build(&upstream, &context, &args).success();

    // The layout: its annotation is in its manifest alone.
    let copy = place.dir.join("copy");
    run(skopeo()
        .args(["copy", "--preserve-digests"])
        .arg(format!("oci:{}:1", layout.display()))
        .arg(format!("oci:{}:1", copy.display())))
    .success();
    let image = Image::read(&copy);
    assert_eq!(image.manifest["annotations"]["a.b"], "c");
    let index: Value =
        serde_json::from_slice(&std::fs::read(layout.join("index.json")).unwrap()).unwrap();
    let annotations = &index["manifests"][0]["annotations"];
    assert_eq!(
        annotations["io.containerd.image.name"],
        "docker.io/library/app:1"
    );

    // The root filesystem is what the layers say.
    let want = flattened(&image);
    let got = entries(&tar);
    assert_eq!(
        got.keys().collect::<Vec<_>>(),
        want.keys().collect::<Vec<_>>()
    );
    for (path, got) in &got {
        let want = &want[path];
        // The time of a directory that a step changed around is not in its layer.
        if got.kind == '5' {
            assert_eq!(got.summary(), want.summary(), "{path}");
        } else {
            assert_eq!(got, want, "{path}");
        }
    }
    for (path, summary) in [
        ("opt/tool", "4750 7:9 0"),
        ("opt/first", "644 5:6 0"),
        ("opt/second", "644 5:6 1"),
        ("opt/out", "777 0:0 2"),
        ("opt/pipe", "600 0:0 6"),
        ("opt/open", "1777 1000:1001 5"),
    ] {
        let got = got.get(path).map(Entry::summary);
        assert_eq!(got.as_deref(), Some(summary), "{path}");
    }
    assert!(!got.contains_key("home") && got.contains_key("bin/busybox"));

    // The files, all of which belong to this user.
    let stat = |path: &str| std::fs::symlink_metadata(files.join(path)).unwrap();
    let user = rustix::process::geteuid().as_raw();
    for (path, entry) in &got {
        let found = stat(path);
        assert_eq!(found.uid(), user, "{path}");
        assert_eq!(found.mtime(), entry.mtime, "{path}");
        if entry.kind != '2' {
            assert_eq!(found.permissions().mode() & 0o7777, entry.mode, "{path}");
        }
    }
    assert_eq!(stat("opt/first").ino(), stat("opt/second").ino());
    assert_eq!(
        std::fs::read_link(files.join("opt/out")).unwrap(),
        Path::new("../../../escape")
    );
    assert_eq!(
        std::fs::read(files.join("bin/busybox")).unwrap().len() as u64,
        got["bin/busybox"].size
    );

    // Docker's archive: without the layout's annotation, so with another manifest.
    let manifest = run(Command::new("tar")
        .args(["-xOf"])
        .arg(&docker)
        .arg("manifest.json"));
    let manifest: Value = serde_json::from_str(&manifest.success().stdout).unwrap();
    assert_eq!(
        manifest[0]["RepoTags"],
        serde_json::json!(["app:1", "h.io/named:2"])
    );
    let read = place.dir.join("read");
    for name in ["app:1", "h.io/named:2"] {
        let _ = std::fs::remove_dir_all(&read);
        run(skopeo()
            .arg("copy")
            .arg(format!("docker-archive:{}:{name}", docker.display()))
            .arg(format!("oci:{}:x", read.display())))
        .success();
    }
    let read = Image::read(&read);
    // skopeo writes another manifest around the same config and layers.
    assert_eq!(read.config, image.config);
    let contents = |image: &Image| -> Vec<_> {
        let layers = image.layers.iter();
        layers.map(|layer| layer.entries.clone()).collect()
    };
    assert_eq!(contents(&read), contents(&image));

    // Reported is the last image that was written: Docker's.
    let metadata: Value = serde_json::from_slice(&std::fs::read(&metadata).unwrap()).unwrap();
    let listed = run(Command::new("tar")
        .args(["-xOf"])
        .arg(&docker)
        .arg("index.json"));
    let index: Value = serde_json::from_str(&listed.success().stdout).unwrap();
    assert_eq!(
        metadata["containerimage.digest"],
        index["manifests"][0]["digest"]
    );
    assert_ne!(metadata["containerimage.digest"], image.digest.as_str());
}

#[test]
fn sandbox_standard_output_is_one_archive() {
    needs!(namespaces());
    let upstream = upstream!();
    let place = Place::new();
    let context = place.context(
        "context",
        &[("Dockerfile", "FROM scratch\nCOPY a /\n"), ("a", "text")],
    );
    let build = |args: &[&str], out: &str| {
        let out = place.dir.join(out);
        let mut command = place.command();
        command
            .args(["build", "--progress", "plain"])
            .args(args)
            .arg(&context)
            .env("SOURCE_DATE_EPOCH", "1000000000")
            .stdin(Stdio::null())
            .stdout(std::fs::File::create(&out).expect("ours"))
            .stderr(Stdio::null());
        assert!(command.status().expect("it starts").success(), "{args:?}");
        out
    };
    let first = build(&["-o", "-"], "first.tar");
    let list = entries(&first);
    assert_eq!(list.keys().collect::<Vec<_>>(), ["a"]);
    assert_eq!(list["a"].summary(), "644 0:0 0");
    assert_eq!(list["a"].mtime, 1_000_000_000);
    assert_eq!(list["a"].short, b"text");
    // The same bytes from the cache.
    let again = build(&["-o", "type=tar"], "again.tar");
    assert!(std::fs::read(first).unwrap() == std::fs::read(again).unwrap());
    let image = build(&["-o", "type=docker,dest=-"], "image.tar");
    assert_eq!(entries(&image)["manifest.json"].kind, '0');

    place
        .build(&upstream, &context, &["-o", "-", "-o", "type=oci,dest=-"])
        .failure()
        .says("standard output can take one thing");
    place
        .build(&upstream, &context, &["--load"])
        .failure()
        .says("-o type=docker,dest=- and pipe into `docker load`");
}

#[test]
fn security_s20_sandbox_links_of_an_image_lead_nowhere() {
    needs!(namespaces());
    let place = Place::new();
    let upstream = upstream!();
    let outside = place.dir.dir("outside");
    std::fs::write(outside.join("canary"), "alive").unwrap();
    let out = place.dir.join("out");
    std::fs::create_dir(&out).unwrap();
    std::fs::write(out.join("mine"), "mine").unwrap();
    let output = out.to_str().unwrap();
    let dockerfile = format!(
        "FROM busybox AS made\n\
         RUN mkdir /r && ln -s ../outside /r/up && ln -s {} /r/absolute\n\
         FROM scratch\n\
         COPY --from=made /r/ /\n",
        outside.display()
    );
    let first = place.context("first", &[("Dockerfile", &dockerfile)]);
    place.build(&upstream, &first, &["-o", output]).success();
    assert_eq!(
        std::fs::read_link(out.join("up")).unwrap(),
        Path::new("../outside")
    );
    // A second image has directories where the links are now.
    let second = place.context(
        "second",
        &[
            (
                "Dockerfile",
                "FROM scratch\nCOPY canary /up/canary\nCOPY canary /absolute/new\n",
            ),
            ("canary", "dead"),
        ],
    );
    place.build(&upstream, &second, &["-o", output]).success();
    let names = |dir: &Path| -> Vec<String> {
        let names = std::fs::read_dir(dir).unwrap();
        let mut names: Vec<String> = names
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    };
    assert_eq!(names(&outside), ["canary"]);
    assert_eq!(
        std::fs::read_to_string(outside.join("canary")).unwrap(),
        "alive"
    );
    assert_eq!(names(&out), ["absolute", "mine", "up"]);
    assert_eq!(
        std::fs::read_to_string(out.join("up/canary")).unwrap(),
        "dead"
    );
}

#[test]
fn sandbox_a_failed_build_writes_nothing() {
    needs!(namespaces());
    let upstream = upstream!();
    let place = Place::new();
    let context = place.context("context", &[("Dockerfile", "FROM busybox\nRUN false\n")]);
    let out = place.dir.dir("out");
    let outputs = [
        format!("type=tar,dest={}", out.join("root.tar").display()),
        format!("type=local,dest={}", out.join("files").display()),
        format!("type=oci,tar=false,dest={}", out.join("layout").display()),
    ];
    let args: Vec<&str> = outputs.iter().flat_map(|o| ["-o", o.as_str()]).collect();
    place.build(&upstream, &context, &args).failure();
    assert_eq!(std::fs::read_dir(&out).unwrap().count(), 0);
    // What cannot be written is said before anything is built.
    place
        .build(
            &upstream,
            &context,
            &["-o", &format!("type=tar,dest={}", out.display())],
        )
        .failure()
        .says("is a directory")
        .does_not_say("RUN false");
    let missing = out.join("missing/image.tar");
    for form in ["oci", "docker", "tar"] {
        let output = format!("type={form},dest={}", missing.display());
        let ran = place
            .build(&upstream, &context, &["-o", &output])
            .failure()
            .says(&format!(
                "--output {}: its directory is not there",
                missing.display()
            ))
            .does_not_say("RUN false");
        assert_eq!(ran.status.code(), Some(2), "{form}");
    }
    assert_eq!(std::fs::read_dir(&out).unwrap().count(), 0);
}
