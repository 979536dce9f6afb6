//! Contexts, ADD and dates from servers and repositories.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use serde_json::json;

use crate::support::oci::Image;
use crate::support::process::{Ran, run};
use crate::support::registry::Registry;
use crate::support::sockless::Place;
use crate::support::web::{Repository, Web};
use crate::support::{images, namespaces, programs};

/// The registry of base images, or the end of the test.
macro_rules! upstream {
    () => {{
        needs!(programs(&["git"]));
        match images::busybox() {
            Ok(registry) => registry,
            Err(reason) => skip!("{reason}"),
        }
    }};
}

/// The file at `path` of what `context`, a directory or an address, is built to.
#[track_caller]
fn text(place: &Place, upstream: &Registry, context: &str, args: &[&str], path: &str) -> String {
    let image = place.built(upstream, Path::new(context), args);
    image.text(path)
}

/// A failing build of a context.
#[track_caller]
fn fails(place: &Place, upstream: &Registry, context: &str, args: &[&str]) -> Ran {
    let output = ["-o", "type=cacheonly"];
    let args: Vec<&str> = output.iter().chain(args).copied().collect();
    place.build(upstream, Path::new(context), &args).failure()
}

/// A repository with three commits: tags `v1` and `v2`, branches `main` and `side`, and in
/// the last one a subdirectory. What stands in `what` tells them apart.
fn library(web: &Web) -> (Repository, [String; 3]) {
    let inner = web.repository("inner");
    inner.commit("inner", &[("thing", "from inside\n")]);
    let repository = web.repository("library");
    let dockerfile = "FROM scratch AS head\nCOPY .git/HEAD what\n\
                      FROM scratch AS inner\nCOPY inner/thing what\n\
                      FROM scratch\nCOPY what what\n";
    repository.git(&[
        "submodule",
        "--quiet",
        "add",
        &format!("{}/inner/.git", web.url),
        "inner",
    ]);
    let files = [("Dockerfile", dockerfile), ("what", "one\n")];
    let one = repository.commit("one", &files);
    repository.git(&["tag", "v1"]);
    let two = repository.commit("two", &[("what", "two\n")]);
    repository.git(&["tag", "-a", "v2", "-m", "second"]);
    repository.git(&["checkout", "-q", "-b", "side", "v1"]);
    repository.commit(
        "side",
        &[
            ("what", "side\n"),
            ("part/what", "part of side\n"),
            ("part/Dockerfile", "FROM scratch\nCOPY what what\n"),
        ],
    );
    repository.git(&["checkout", "-q", "main"]);
    let three = repository.commit("three", &[("what", "three\n")]);
    (repository, [one, two, three])
}

#[test]
fn compose_git_addresses_name_one_commit() {
    let (upstream, place, web) = (upstream!(), Place::new(), Web::start());
    let (_repository, [one, two, three]) = library(&web);
    let url = format!("{}/library/.git", web.url);
    let short = &three[..8];
    let good = [
        (String::new(), "three\n"),
        ("#v1".into(), "one\n"),
        ("#v2".into(), "two\n"),
        ("?ref=side".into(), "side\n"),
        ("?branch=side".into(), "side\n"),
        ("?tag=v2".into(), "two\n"),
        ("?tag=v2#refs/tags/v2".into(), "two\n"),
        (format!("?commit={three}"), "three\n"),
        (format!("?commit={short}"), "three\n"),
        (format!("?ref={one}"), "one\n"),
        (format!("?ref={one}&commit={one}"), "one\n"),
        (format!("?tag=v2&commit={two}"), "two\n"),
        ("#side:part".into(), "part of side\n"),
        ("?subdir=part&ref=side".into(), "part of side\n"),
    ];
    for (suffix, expected) in &good {
        let context = format!("{url}{suffix}");
        assert_eq!(
            text(&place, &upstream, &context, &[], "what"),
            *expected,
            "{context}"
        );
        let adding = format!("FROM scratch\nADD {context} /repo/\n");
        let adding = place.context("adding", &[("Dockerfile", &adding)]);
        let adding = adding.display().to_string();
        assert_eq!(
            text(&place, &upstream, &adding, &[], "repo/what"),
            *expected,
            "ADD {context}"
        );
    }
    let bad = [
        (
            format!("?tag=v2&commit={three}"),
            "expected checksum to match",
        ),
        (
            format!("?commit={}", &two[..8]),
            "expected checksum to match",
        ),
        ("?branch=none".into(), "does not contain ref"),
        ("?branch=v2".into(), "does not contain ref"),
        (format!("?ref={}", &two[..8]), "does not contain ref"),
        ("?tag=v2#refs/heads/main".into(), "ref conflicts"),
    ];
    for (suffix, expected) in &bad {
        let context = format!("{url}{suffix}");
        fails(&place, &upstream, &context, &[]).says(expected);
        let adding = format!("FROM scratch\nADD {context} /repo/\n");
        let adding = place.context("adding", &[("Dockerfile", &adding)]);
        let adding = adding.display().to_string();
        fails(&place, &upstream, &adding, &[])
            .says(expected)
            .says("Dockerfile:2");
    }
}

#[test]
fn compose_git_contexts_have_what_was_asked_for() {
    let (upstream, place, web) = (upstream!(), Place::new(), Web::start());
    let (_repository, [_, two, three]) = library(&web);
    let url = format!("{}/library/.git", web.url);
    for (suffix, target, expected) in [
        ("?keep-git-dir=true", "head", format!("{three}\n")),
        ("?keep-git-dir&submodules", "head", format!("{three}\n")),
        ("?tag=v2&keep-git-dir=true", "head", format!("{two}\n")),
        ("", "inner", "from inside\n".to_owned()),
        ("?submodules=true", "inner", "from inside\n".to_owned()),
        ("?submodules", "inner", "from inside\n".to_owned()),
    ] {
        let context = format!("{url}{suffix}");
        let args = ["--target", target];
        assert_eq!(
            text(&place, &upstream, &context, &args, "what"),
            expected,
            "{context}"
        );
    }
    let keep = [
        "--target=head",
        "--build-arg=BUILDKIT_CONTEXT_KEEP_GIT_DIR=1",
    ];
    assert_eq!(
        text(&place, &upstream, &url, &keep, "what"),
        format!("{three}\n")
    );
    for (suffix, target) in [
        ("", "head"),
        ("?keep-git-dir=false", "head"),
        ("?submodules=false", "inner"),
    ] {
        let context = format!("{url}{suffix}");
        fails(&place, &upstream, &context, &["--target", target]).says("not found");
    }
}

#[test]
fn sandbox_add_of_a_repository_with_a_checksum() {
    let (upstream, place, web) = (upstream!(), Place::new(), Web::start());
    needs!(namespaces());
    let (_repository, [_, two, three]) = library(&web);
    let dockerfile = |flags: &str| {
        let url = format!("{}/library/.git", web.url);
        let text = format!(
            "FROM busybox\nARG REPO={url} TAG=v2\nADD {flags} ${{REPO}}#${{TAG}} /src\n\
             RUN echo \"ran with $(stat -c '%u %g' /src/what) $(cat /src/what)\" && \
             cp /src/.git/HEAD /head || touch /none\n"
        );
        let context = place.context("context", &[("Dockerfile", &text)]);
        context.display().to_string()
    };
    let keep = dockerfile("--keep-git-dir --chown=42:84");
    let image = place.built(&upstream, Path::new(&keep), &[]);
    assert_eq!(image.text("head"), format!("{two}\n"));
    assert_eq!(image.summary("src/what"), "644 42:84 0");

    let plain = dockerfile("");
    place
        .build(&upstream, Path::new(&plain), &["-o", "type=cacheonly"])
        .success()
        .says("ran with 0 0 two");
    // What is checked is not another thing, so later steps are in the cache.
    let checked = dockerfile(&format!("--checksum={two}"));
    place
        .build(&upstream, Path::new(&checked), &["-o", "type=cacheonly"])
        .success()
        .does_not_say("ran with 0 0 two");
    let wrong = dockerfile(&format!("--checksum={three}"));
    fails(&place, &upstream, &wrong, &[]).says("expected checksum to match");
    let garbage = dockerfile("--checksum=sha256:00");
    fails(&place, &upstream, &garbage, &[])
        .says("invalid checksum")
        .says("expected hex commit hash")
        .says("Dockerfile:3");
}

/// When an image and its last layer were made.
fn created(image: &Image) -> (String, String) {
    let history = image.config["history"].as_array().expect("validated");
    let last = history.last().expect("one entry at least");
    let text = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
    (text(&image.config["created"]), text(&last["created"]))
}

/// A tar of files with times in seconds since 1970.
fn dated_tar(files: &[(&str, &str, u64)]) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    for (path, content, time) in files {
        let mut header = tar::Header::new_ustar();
        header.set_mode(0o644);
        header.set_mtime(*time);
        header.set_size(content.len() as u64);
        tar.append_data(&mut header, path, content.as_bytes())
            .expect("memory");
    }
    tar.into_inner().expect("memory")
}

/// 2023-11-14T22:15:01Z.
const DATE: u64 = 1_700_000_101;
const DATE_TEXT: &str = "2023-11-14T22:15:01Z";
const LAST_MODIFIED: &str = "Last-Modified: Tue, 14 Nov 2023 22:15:01 GMT";

#[test]
fn compose_dates_come_from_what_is_named() {
    let (upstream, place, web) = (upstream!(), Place::new(), Web::start());
    let own = "FROM scratch\nARG SOURCE_DATE_EPOCH\nLABEL epoch=$SOURCE_DATE_EPOCH\nCOPY f f\n";
    let repository = web.repository("dated");
    fs::write(repository.path.join("Dockerfile"), own).expect("ours");
    fs::write(repository.path.join("f"), "f").expect("ours");
    repository.git(&["add", "-A"]);
    repository.git_at(DATE as i64, &["commit", "-q", "-m", "dated"]);
    let git = format!("{}/dated/.git", web.url);
    let inside = [("Dockerfile", own, DATE - 9), ("f", "f", DATE)];
    let old_tar = web.file("/old.tar", &[], dated_tar(&inside));
    let later = [("Dockerfile", own, DATE + 7), ("f", "f", DATE + 8)];
    let new_tar = web.file("/new.tar", &[LAST_MODIFIED], dated_tar(&later));
    let no_tar = web.file("/plain", &[], "no archive");

    let check = |context: &str, args: &[&str], why: &str| {
        let image = place.built(&upstream, Path::new(context), args);
        let dates = (DATE_TEXT.to_owned(), DATE_TEXT.to_owned());
        assert_eq!(created(&image), dates, "{why}");
        let labels = &image.run_config()["Labels"];
        assert_eq!(*labels, json!({ "epoch": DATE.to_string() }), "{why}");
        let layer = image.layers.last().expect("COPY's");
        let latest = layer.entries.iter().map(|entry| entry.mtime).max();
        assert!(latest <= Some(DATE as i64), "{why}: {latest:?}");
    };
    let context = ["--build-arg", "SOURCE_DATE_EPOCH=context"];
    check(&git, &context, "the commit of the context");
    check(&old_tar, &context, "the newest file of the context");
    check(&new_tar, &context, "what the server says of the context");

    let local = |first: &str, more: &str| {
        let text = format!("{first}\n{more}{own}");
        let dir = place.context("local", &[("Dockerfile", text.as_str()), ("f", "f")]);
        dir.display().to_string()
    };
    let named = local("ARG SOURCE_DATE_EPOCH=mine", "");
    for value in [&git, &old_tar, &new_tar] {
        let flag = format!("mine={value}");
        check(&named, &["--build-context", &flag], &flag);
    }
    for source in [&git, &old_tar, &new_tar] {
        let stage = format!("FROM scratch AS Mine\nARG WHERE=\nADD {source}$WHERE /x\n");
        check(&local("ARG SOURCE_DATE_EPOCH=mine", &stage), &[], &stage);
    }
    let number = [
        "--build-arg".to_owned(),
        format!("SOURCE_DATE_EPOCH={DATE}"),
    ];
    let number = number.each_ref().map(String::as_str);
    check(&named, &number, "a number wins");
    check(
        &local(&format!("ARG SOURCE_DATE_EPOCH={DATE}"), ""),
        &[],
        "a default",
    );

    // What has no date leaves things as they are, and the argument empty; that is said.
    let undated = |what: &str, context: &str, args: &[&str]| {
        let warned = [args, &["-o", "type=cacheonly"]].concat();
        place
            .build(&upstream, Path::new(context), &warned)
            .success()
            .says(&format!("SOURCE_DATE_EPOCH: {what} has no date"));
        let image = place.built(&upstream, Path::new(context), args);
        assert_eq!(image.run_config()["Labels"], json!({ "epoch": "" }));
        assert_ne!(created(&image).0, DATE_TEXT);
    };
    undated("the build context", &local("", ""), &context);
    // The directory is the same one, with another Dockerfile by now.
    let named = local("ARG SOURCE_DATE_EPOCH=mine", "");
    let mine = r#"the build context "mine""#;
    undated(
        mine,
        &named,
        &["--build-context", &format!("mine={no_tar}")],
    );
    undated(mine, &named, &["--build-context", &format!("mine={named}")]);

    let stage = "FROM scratch AS mine\nCOPY f f\n";
    let wrong = local("ARG SOURCE_DATE_EPOCH=mine", stage);
    fails(&place, &upstream, &wrong, &[])
        .says("Dockerfile:3:1")
        .says("does more than fetch one source");
    let wrong = local("ARG SOURCE_DATE_EPOCH=soon", "");
    fails(&place, &upstream, &wrong, &[])
        .says("Dockerfile:1:1")
        .says("invalid SOURCE_DATE_EPOCH: soon");
}

#[test]
fn compose_named_contexts_are_bases() {
    let (upstream, place, web) = (upstream!(), Place::new(), Web::start());
    let (_repository, _) = library(&web);
    let file = web.file("/data.txt", &[LAST_MODIFIED], "data\n");
    place.dir.file("named/out", "kept\n");
    place.dir.file("named/left", "ignored\n");
    place.dir.file("named/.dockerignore", "left\n");
    let directory = place.dir.join("named").display().to_string();
    let dockerfile = "FROM busybox AS start\nENV GONE=1\nRUN exit 1\nFROM start\nLABEL a=b\n";
    let context = place.context("context", &[("Dockerfile", dockerfile)]);
    let git = format!("{}/library/.git#side:part", web.url);
    for (value, path, content) in [
        (&directory, "out", "kept\n"),
        (&git, "what", "part of side\n"),
        (&file, "context", "data\n"),
    ] {
        let flag = format!("start={value}");
        let image = place.built(&upstream, &context, &["--build-context", &flag]);
        assert_eq!(image.text(path), content, "{flag}");
        assert_eq!(image.summary("left"), "absent");
        assert_eq!(image.layers.len(), 1, "{flag}");
        // A stage that begins with nothing has a PATH; the replaced stage's ENV is gone.
        assert_eq!(
            *image.run_config(),
            json!({
                "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
                "WorkingDir": "/",
                "Labels": { "a": "b" },
            }),
            "{flag}"
        );
        let history = image.config["history"].as_array().expect("validated");
        let made: Vec<_> = history.iter().map(|entry| &entry["empty_layer"]).collect();
        assert_eq!(made, [&json!(null), &json!(true)], "{flag}");
    }
    // An image's configuration comes with it.
    let flag = "start=docker-image://busybox";
    let image = place.built(&upstream, &context, &["--build-context", flag]);
    assert_eq!(image.run_config()["Cmd"], json!(["sh"]));
    assert_eq!(image.layers.len(), 1);
    let flag = "busybox=docker-image://scratch";
    let text = "FROM busybox\nCOPY <<EOF /only\nthis\nEOF\n";
    let context = place.context("scratch", &[("Dockerfile", text)]);
    let image = place.built(&upstream, &context, &["--build-context", flag]);
    assert_eq!(image.layers.len(), 1);
    assert_eq!(image.text("only"), "this\n");
}

#[test]
fn compose_git_over_ssh_needs_an_agent_and_uses_it() {
    let (upstream, place, web) = (upstream!(), Place::new(), Web::start());
    needs!(programs(&["ssh-keygen", "git-upload-pack"]));
    let repository = web.repository("private");
    repository.commit(
        "one",
        &[
            ("what", "over ssh\n"),
            ("Dockerfile", "FROM scratch\nCOPY what what\n"),
        ],
    );
    // What stands in for ssh: it notes how it was started and runs what it is told to, here.
    let log = place.dir.join("ssh.log");
    let script = format!(
        "#!/bin/sh\necho \"$*\" >> {log}\ntest -S \"$SSH_AUTH_SOCK\" || exit 7\n\
         for last; do :; done\ncd / && exec sh -c \"$last\"\n",
        log = log.display()
    );
    let ssh = place.dir.file("bin/ssh", script);
    fs::set_permissions(&ssh, fs::Permissions::from_mode(0o755)).expect("ours");
    let key = place.dir.join("key");
    run(std::process::Command::new("ssh-keygen")
        .args(["-q", "-t", "ed25519", "-N", "", "-f"])
        .arg(&key))
    .success();

    let url = format!("git@code.test:{}/.git", repository.path.display());
    let adding = format!("FROM scratch\nADD {url} /src/\n");
    let adding = place.context("adding", &[("Dockerfile", &adding)]);
    let path = format!(
        "{}:/usr/local/bin:/usr/bin:/bin",
        place.dir.join("bin").display()
    );
    let build = |context: &str, args: &[&str]| {
        let archive = format!("type=oci,dest={}", place.dir.join("image.tar").display());
        run(place
            .command()
            .env("PATH", &path)
            .args([
                "build",
                "--progress",
                "plain",
                "-o",
                &archive,
                "--registry-mirror",
            ])
            .arg(format!("docker.io={}", upstream.url()))
            .args(args)
            .arg(context))
    };
    let adding = adding.display().to_string();
    for context in [&adding, &url] {
        build(context, &[]).failure().says("--ssh default");
    }
    assert!(!log.exists(), "ssh was started without an agent");
    let lend = format!("default={}", key.display());
    for (context, path) in [(&adding, "src/what"), (&url, "what")] {
        build(context, &["--ssh", &lend]).success();
        let image = place.archive(&place.dir.join("image.tar"));
        assert_eq!(image.text(path), "over ssh\n");
    }
    let log = fs::read_to_string(&log).expect("ssh was started");
    assert!(log.contains("git@code.test"), "{log}");
    assert!(log.contains("git-upload-pack"), "{log}");
}

/// A directory of this machine belongs to whoever builds; an archive says whose its files are.
#[test]
fn sandbox_owners_in_an_archive_reach_the_image_and_the_steps() {
    let (upstream, place) = (upstream!(), Place::new());
    needs!(namespaces());
    let web = Web::start();
    let mut archive = tar::Builder::new(Vec::new());
    let dockerfile = "FROM busybox\nCOPY f /f\nCOPY --chown=7:8 f /g\n\
                      RUN --mount=source=f,target=/m stat -c %u:%g /m > /seen\n";
    for (name, text, uid) in [("Dockerfile", dockerfile, 0), ("f", "x", 1000)] {
        let mut header = tar::Header::new_ustar();
        header.set_size(text.len() as u64);
        header.set_mode(0o640);
        header.set_uid(uid);
        header.set_gid(uid + 1);
        archive
            .append_data(&mut header, name, text.as_bytes())
            .expect("memory");
    }
    let context = web.file("/owned.tar", &[], archive.into_inner().expect("memory"));
    let image = place.built(&upstream, Path::new(&context), &[]);
    let owner = |path: &str| image.entry(path).map(|entry| (entry.uid, entry.gid));
    assert_eq!(owner("f"), Some((1000, 1001)));
    assert_eq!(owner("g"), Some((7, 8)));
    assert_eq!(image.text("seen"), "1000:1001\n");
}
