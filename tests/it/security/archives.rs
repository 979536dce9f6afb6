//! S1, S2, S3: what the entries of archives are called, and where their links lead.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::canary::{Canary, SONG};
use super::upstream;
use crate::support::archive::Archive;
use crate::support::images::{self, write_layout};
use crate::support::oci::Image;
use crate::support::process::{Ran, run, run_reading};
use crate::support::registry::Registry;
use crate::support::rungs::on_every_rung;
use crate::support::sockless::Place;

/// The ways by which an archive comes into a build.
const DOORS: [&str; 4] = ["context", "ADD", "COPY --from", "local"];

/// Brings an archive in; what it has is below `/out` of the image, or in the directory `out`.
fn enter(place: &Place, upstream: &Registry, door: &str, archive: &Archive) -> Ran {
    let context = place.dir.dir("context");
    let output = format!("type=oci,dest={}", place.dir.join("image.tar").display());
    let layout = place.dir.join("evil");
    let _ = std::fs::remove_dir_all(&layout);
    write_layout(&layout, &archive.clone().end()[..], &serde_json::json!({}));
    let evil = format!("evil=oci-layout://{}", layout.display());
    let dockerfile = |text: &str| place.dir.file("context/Dockerfile", text);
    match door {
        "context" => {
            let whole = Archive::default()
                .file("Dockerfile", "FROM scratch\nCOPY . /out/\n")
                .bytes();
            let whole = [whole, archive.clone().end()].concat();
            let stdin = File::open(place.dir.file("context.tar", whole)).expect("just written");
            let mut command = place.command();
            command.args(["build", "--progress", "plain", "-o", &output, "-"]);
            run_reading(&mut command, Stdio::from(stdin))
        }
        "ADD" => {
            dockerfile("FROM scratch\nADD evil.tar /out/\n");
            place.dir.file("context/evil.tar", archive.clone().end());
            place.build(upstream, &context, &["-o", &output])
        }
        "COPY --from" => {
            dockerfile("FROM scratch\nCOPY --from=evil / /out/\n");
            let args = ["--build-context", evil.as_str(), "-o", output.as_str()];
            place.build(upstream, &context, &args)
        }
        "local" => {
            dockerfile("FROM evil\n");
            let out = place.dir.join("out").display().to_string();
            let args = ["--build-context", evil.as_str(), "-o", out.as_str()];
            place.build(upstream, &context, &args)
        }
        _ => unreachable!("{door}"),
    }
}

#[test]
fn security_s01_names_lead_out_of_no_archive() {
    let upstream = upstream!();
    let canary = Canary::new();
    let (path, climb) = (canary.path().display(), canary.climb());
    let refused = [
        format!("{climb}/secret"),
        format!("./{climb}/secret"),
        format!("a/b/{climb}/dir/secret"),
        format!("/{climb}/new"),
        format!("dir/../{climb}/secret"),
    ];
    let inside = [
        format!("{path}/secret"),
        format!("//{path}/./dir//secret"),
        format!("./{path}/new"),
    ];
    for door in DOORS {
        for (names, is_refused) in [(&refused[..], true), (&inside[..], false)] {
            for name in names {
                let place = Place::new();
                let by = format!("{door}: {name}");
                let ran = enter(
                    &place,
                    &upstream,
                    door,
                    &Archive::default().file(name, "dead"),
                );
                canary.is_untouched(&by);
                if is_refused && door == "ADD" {
                    // As in BuildKit, `..` ends at the destination.
                    ran.success();
                    let image = place.archive(&place.dir.join("image.tar"));
                    let entries = image.layers.iter().flat_map(|layer| &layer.entries);
                    let is_inside = |path: &str| path == "out" || path.starts_with("out/");
                    assert!(entries.map(|entry| entry.path.as_str()).all(is_inside));
                    continue;
                }
                if is_refused {
                    ran.failure().says("of the archive: its path");
                    assert!(!place.dir.join("image.tar").exists(), "{by}");
                    continue;
                }
                ran.success();
                let below: PathBuf = name
                    .split('/')
                    .filter(|part| !["", "."].contains(part))
                    .collect();
                if door == "local" {
                    let file = place.dir.join("out").join(&below);
                    assert_eq!(
                        std::fs::read_to_string(file).expect("inside"),
                        "dead",
                        "{by}"
                    );
                } else {
                    let image = place.archive(&place.dir.join("image.tar"));
                    let inside = image.text(&format!("out/{}", below.display()));
                    assert_eq!(inside, "dead", "{by}");
                }
            }
        }
        // What leads to the root itself is refused by some, and names nothing for others.
        for name in ["..", "/..", "a/..", ".", "/", ""] {
            let ran = enter(
                &Place::new(),
                &upstream,
                door,
                &Archive::default().file(name, "dead"),
            );
            assert!(
                matches!(ran.status.code(), Some(0..=70)),
                "{door} {name}: {ran:?}"
            );
            canary.is_untouched(name);
        }
        // The target of a hard link is a name, too.
        let link = Archive::default().hardlink("hard", &format!("{climb}/secret"));
        enter(&Place::new(), &upstream, door, &link).failure();
        let link = Archive::default().hardlink("hard", &format!("{path}/secret"));
        enter(&Place::new(), &upstream, door, &link)
            .failure()
            .says("hard link");
        canary.is_untouched(door);
    }
}

/// Every operation that an archive has, through links in the parents and at the end.
fn through_links(canary: &Canary) -> Archive {
    let path = canary.path().display();
    let mut archive = Archive::default();
    for (name, target) in [
        ("abs", path.to_string()),
        ("up", canary.climb()),
        ("twice", "up/../../../../../../../../abs".to_owned()),
    ] {
        archive = archive
            .symlink(name, &target)
            .file(&format!("{name}/secret"), "dead")
            .entry(
                b'0',
                &format!("{name}/empty"),
                "",
                b"dead",
                &[("SCHILY.xattr.user.dead", "dead")],
            )
            .directory(&format!("{name}/dir/"))
            .directory(&format!("{name}/new/"))
            .symlink(&format!("{name}/link"), "dead")
            .entry(b'6', &format!("{name}/pipe"), "", b"", &[])
            .file(&format!("{name}/first"), "dead")
            .hardlink(&format!("{name}/hard"), &format!("{name}/first"));
    }
    // At the end a link gives way.
    archive
        .symlink("leaf", &format!("{path}/secret"))
        .file("leaf", "alive")
        .symlink("leaf-dir", &format!("{path}/dir"))
        .directory("leaf-dir/")
        .file("leaf-dir/secret", "alive")
        .symlink("leaf-link", &format!("{path}/empty"))
        .hardlink("leaf-hard", "leaf-link")
        .file("leaf-hard", "alive")
}

#[test]
fn security_s02_links_of_an_archive_lead_out_of_none() {
    let upstream = upstream!();
    let canary = Canary::new();
    let below = canary.below_root();
    for door in DOORS {
        let place = Place::new();
        enter(&place, &upstream, door, &through_links(&canary)).success();
        canary.is_untouched(door);
        if door == "local" {
            let out = place.dir.join("out");
            let text = |path: &Path| std::fs::read_to_string(out.join(path)).expect("inside");
            assert_eq!(text(&below.join("secret")), "dead");
            assert_eq!(text(Path::new("leaf")), "alive");
            assert_eq!(text(Path::new("leaf-dir/secret")), "alive");
            continue;
        }
        let image = place.archive(&place.dir.join("image.tar"));
        canary.is_not_in(&image, door);
        let inside = |name: &str| format!("out/{}/{name}", below.display());
        assert_eq!(image.text(&inside("secret")), "dead", "{door}");
        assert_eq!(image.summary(&inside("pipe")), "644 0:0 6", "{door}");
        assert_eq!(image.text("out/leaf"), "alive", "{door}");
        assert_eq!(image.text("out/leaf-dir/secret"), "alive", "{door}");
        let link = image.entry("out/leaf-link").expect("it stays");
        assert_eq!(link.link, format!("{}/empty", canary.path().display()));
    }
    // Hard links are to what the archive itself has, never to what a link leads to.
    let path = canary.path().display().to_string();
    for target in ["abs/secret", "abs/dir/secret"] {
        let archive = Archive::default()
            .symlink("abs", &path)
            .hardlink("hard", target);
        for door in DOORS {
            enter(&Place::new(), &upstream, door, &archive)
                .failure()
                .says("hard link");
            canary.is_untouched(door);
        }
    }
}

#[test]
fn security_s02_whiteouts_through_links_remove_nothing_outside() {
    let canary = Canary::new();
    let path = canary.path().display().to_string();
    let mut archive = Archive::default();
    for (name, target) in [("abs", path), ("up", canary.climb())] {
        archive = archive
            .symlink(name, &target)
            .file(&format!("{name}/.wh.secret"), "")
            .file(&format!("{name}/dir/.wh..wh..opq"), "")
            .file(&format!("{name}/.wh.empty-dir"), "");
    }
    on_every_rung(|rung, upstream| {
        let place = Place::new();
        let layout = place.dir.join("evil");
        write_layout(&layout, &archive.clone().end()[..], &serde_json::json!({}));
        let evil = format!("evil=oci-layout://{}", layout.display());
        let dockerfile = "FROM busybox\n\
                          RUN --mount=from=evil,target=/m,rw rm -rf /m/abs/* /m/up/*; echo dead > /m/abs/secret; true\n\
                          COPY --from=evil / /\n\
                          RUN ls /abs/ /up/\n";
        let context = place.context("context", &[("Dockerfile", dockerfile)]);
        rung.build(&place, upstream, &context, &["--build-context", &evil])
            .success();
        let out = place.dir.join("out").display().to_string();
        place.dir.file("context/Dockerfile", "FROM evil\n");
        rung.build(
            &place,
            upstream,
            &context,
            &["--build-context", &evil, "-o", &out],
        )
        .success();
        canary.is_untouched(rung.name);
    });
}

/// A step of the image plants links, and every other instruction goes through them.
#[test]
fn security_s02_links_of_a_step_lead_no_later_one_out() {
    let canary = Canary::new();
    let (path, below) = (canary.path().display(), canary.below_root());
    on_every_rung(|rung, upstream| {
        let place = Place::new();
        let dockerfile = format!(
            "FROM busybox AS links\n\
             RUN mkdir -p {path}/dir && ln -s {path} /abs && ln -s {climb} /up && \
             ln -s {path}/leaf /leaf && ln -s /proc/self/root{path} /magic\n\
             COPY --chmod=777 --chown=1:1 f /abs/secret\n\
             COPY f /up/dir/secret\n\
             COPY f /leaf\n\
             ADD a.tar /up/\n\
             RUN echo dead > /up/empty && rm -r /abs/empty && chmod 0 /abs/dir && echo dead > /magic/magic\n\
             WORKDIR /abs/work\n\
             FROM busybox\n\
             COPY --from=links /abs/secret /up/secret /abs/new /copied/\n",
            climb = canary.climb(),
        );
        let context = place.context("context", &[("Dockerfile", &dockerfile), ("f", "dead")]);
        let archive = Archive::default().file("new/f", "dead").end();
        std::fs::write(context.join("a.tar"), archive).expect("ours");
        let (image, _) = rung.built(&place, upstream, &context, &["--target", "links"]);
        canary.is_untouched(rung.name);
        canary.is_not_in(&image, rung.name);
        let summary = |name: &str| image.summary(&format!("{}/{name}", below.display()));
        assert_eq!(summary("secret"), "777 1:1 0", "{}", rung.name);
        assert_eq!(summary("leaf"), "644 0:0 0", "{}", rung.name);
        assert_eq!(summary("dir/secret"), "644 0:0 0", "{}", rung.name);
        assert_eq!(summary("work"), "755 0:0 5", "{}", rung.name);
        assert_eq!(summary("magic"), "644 0:0 0", "{}", rung.name);
        let (copied, _) = rung.built(&place, upstream, &context, &[]);
        canary.is_not_in(&copied, rung.name);
        assert_eq!(copied.text("copied/secret"), "dead", "{}", rung.name);
        assert_eq!(copied.text("copied/f"), "dead", "{}", rung.name);
    });
}

/// Targets of links as images have them, and as they might.
fn targets() -> Vec<(String, String)> {
    let long = format!("{}x", "d/".repeat(2000));
    let targets = [
        "dash",
        "/bin/dash",
        "../../../../x",
        "../../../../../../../../etc/passwd",
        "/",
        ".",
        "..",
        "./",
        "/..",
        "a//b",
        "a/./b",
        "dir/",
        "with space",
        "tab\tand\nline",
        "ü",
        ":x",
        "-x",
        "~",
        "/proc/self/fd/3",
        "self",
        &long,
    ];
    let mut targets: Vec<_> = targets
        .iter()
        .enumerate()
        .map(|(n, target)| (format!("l{n}"), (*target).to_owned()))
        .collect();
    // A link to itself.
    targets.push(("self".into(), "self".into()));
    targets
}

#[test]
fn security_s03_targets_of_links_are_kept_as_they_are() {
    let archive = targets()
        .iter()
        .fold(Archive::default(), |all, (name, target)| {
            all.symlink(name, target)
        });
    let upstream = upstream!();
    let check = |image: &Image, dir: &str, by: &str| {
        for (name, target) in targets() {
            let entry = image.entry(&format!("{dir}/{name}"));
            let got = entry.map(|entry| (entry.kind, entry.link.clone()));
            assert_eq!(got, Some(('2', target)), "{by}: {name}");
        }
    };
    for door in DOORS {
        let place = Place::new();
        enter(&place, &upstream, door, &archive).success();
        if door == "local" {
            for (name, target) in targets() {
                let got = std::fs::read_link(place.dir.join("out").join(name));
                assert_eq!(got.expect("a link"), Path::new(&target), "{door}");
            }
        } else {
            check(&place.archive(&place.dir.join("image.tar")), "out", door);
        }
    }
    on_every_rung(|rung, upstream| {
        let place = Place::new();
        let layout = place.dir.join("links");
        write_layout(&layout, &archive.clone().end()[..], &serde_json::json!({}));
        let links = format!("links=oci-layout://{}", layout.display());
        let dockerfile = "FROM busybox\nCOPY --from=links / /copied/\n\
                          RUN --mount=from=links,target=/m cp -a /m /made && chown -h 1:1 /copied/*\n";
        let context = place.context("context", &[("Dockerfile", dockerfile)]);
        let (image, _) = rung.built(&place, upstream, &context, &["--build-context", &links]);
        check(&image, "made", rung.name);
        check(&image, "copied", rung.name);
        assert_eq!(image.summary("copied/l0"), "777 1:1 2", "{}", rung.name);
    });
}

/// Path → type, target of a link, content by its length; names of one file by the first of them.
fn files(dir: &Path) -> BTreeMap<PathBuf, String> {
    let mut found = BTreeMap::new();
    let mut names: BTreeMap<(u64, u64), PathBuf> = BTreeMap::new();
    let mut pending = vec![dir.to_owned()];
    while let Some(here) = pending.pop() {
        let entries = std::fs::read_dir(&here).expect("readable");
        let mut paths: Vec<_> = entries.map(|e| e.expect("there").path()).collect();
        paths.sort();
        for path in paths {
            let name = path.strip_prefix(dir).expect("below").to_owned();
            let is = path.symlink_metadata().expect("there");
            let line = if is.is_symlink() {
                format!("-> {:?}", std::fs::read_link(&path).expect("a link"))
            } else if is.is_dir() {
                pending.push(path.clone());
                "/".to_owned()
            } else {
                let first = names
                    .entry((is.dev(), is.ino()))
                    .or_insert_with(|| name.clone());
                format!("{} {} like {}", is.mtime(), is.len(), first.display())
            };
            found.insert(name, line);
        }
    }
    found
}

#[test]
fn security_s03_a_debian_is_what_tar_extracts() {
    let upstream = match images::debian() {
        Ok(registry) => registry,
        Err(reason) => skip!("{reason}"),
    };
    let place = Place::new();
    let pulled = place.dir.join("pulled");
    upstream.pull("library/ubuntu:latest", &pulled);
    let image = Image::read(&pulled);
    let [layer] = &image.layers[..] else {
        panic!("one layer")
    };
    let extracted = place.dir.dir("extracted");
    run(Command::new("tar")
        .args(["--extract", "--no-same-owner", "--file"])
        .arg(&layer.file)
        .arg("--directory")
        .arg(&extracted))
    .success();
    let context = place.context(
        "context",
        &[("Dockerfile", "FROM scratch\nCOPY --from=ubuntu / /\n")],
    );
    let dockerfile = |text: &str| std::fs::write(context.join("Dockerfile"), text).expect("ours");
    let want = files(&extracted);
    let links = want.values().filter(|line| line.starts_with("->")).count();
    assert!(want.len() > 3000 && links > 100, "{} {links}", want.len());
    for text in ["FROM ubuntu\n", "FROM scratch\nCOPY --from=ubuntu / /\n"] {
        dockerfile(text);
        let out = place.dir.join(format!("out-{}", text.len()));
        let output = out.display().to_string();
        place.build(&upstream, &context, &["-o", &output]).success();
        let got = files(&out);
        let differ: Vec<_> = want
            .iter()
            .filter(|(path, line)| got.get(*path) != Some(line))
            .map(|(path, line)| (path, line, got.get(path)))
            .collect();
        assert!(differ.is_empty(), "{text}: {differ:?}");
        assert_eq!(got.len(), want.len(), "{text}");
    }
    assert!(!want.keys().any(|path| path.ends_with(SONG)));
}
