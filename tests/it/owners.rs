//! Users and owners in RUN steps of whoever has one ID only: what they see, and what is in the
//! layers, is what it is for everybody else.

use std::path::Path;
use std::process::Command;

use crate::support::oci::Image;
use crate::support::process::{Ran, run};
use crate::support::registry::Registry;
use crate::support::sockless::Place;
use crate::support::{images, is_root, namespaces, programs};

/// Ways to have one ID: a namespace that has no more, and a user to whom setuid programs give none.
const WAYS: &[&[&str]] = &[
    &["unshare", "--user", "--map-root-user"],
    &["setpriv", "--no-new-privs"],
];

/// The registry of base images, or the end of the test.
macro_rules! upstream {
    () => {{
        needs!(programs(&["bwrap"]), namespaces());
        match images::busybox() {
            Ok(registry) => registry,
            Err(reason) => skip!("{reason}"),
        }
    }};
}

/// Builds into an archive, started by `way`.
fn build(way: &[&str], place: &Place, upstream: &Registry, context: &Path) -> (Ran, Image) {
    let archive = place.dir.join("image.tar");
    let mut command: Command = place.wrapped(way);
    command
        .args(["build", "--progress", "plain", "--registry-mirror"])
        .arg(format!("docker.io={}", upstream.url()))
        .env("SOURCE_DATE_EPOCH", "1700000000")
        .arg("-o")
        .arg(format!("type=oci,dest={}", archive.display()))
        .arg(context);
    let ran = run(&mut command).success();
    (ran, place.archive(&archive))
}

/// The ways that this test's user has: root's own IDs are never taken away from it.
fn ways() -> impl Iterator<Item = &'static [&'static str]> {
    let count = if is_root() { 1 } else { WAYS.len() };
    WAYS.iter().take(count).copied()
}

/// Builds with every ID, and with one in each way; all give the same image, which is returned with
/// what each said.
fn build_all(dockerfile: &str) -> Option<(Image, Vec<Ran>)> {
    let upstream = match images::busybox() {
        Ok(registry) => registry,
        Err(reason) => {
            crate::support::skipped(&reason);
            return None;
        }
    };
    let place = Place::new();
    let context = place.context("context", &[("Dockerfile", dockerfile), ("file", "text")]);
    let (first, image) = build(&[], &place, &upstream, &context);
    let mut all = vec![first.does_not_say("there is one ID only")];
    for way in ways() {
        // Its own store: what is found in a cache was not made.
        let place = Place::new();
        let context = place.context("context", &[("Dockerfile", dockerfile), ("file", "text")]);
        let (ran, other) = build(way, &place, &upstream, &context);
        let lines = |image: &Image| -> Vec<String> {
            let layers = image.layers.iter().flat_map(|layer| &layer.entries);
            layers.map(|entry| format!("{entry:?}")).collect()
        };
        assert_eq!(lines(&other), lines(&image), "{way:?}");
        assert_eq!(other.digest, image.digest, "{way:?}");
        all.push(ran.says("users and owners are made up for RUN steps"));
    }
    Some((image, all))
}

/// What steps printed, without their numbers and times.
fn printed(ran: &Ran) -> Vec<&str> {
    let lines = ran.stderr.lines().filter_map(|line| line.split_once(" = "));
    lines.map(|(_, text)| text).collect()
}

#[test]
fn sandbox_files_have_the_owners_that_they_are_given() {
    needs!(programs(&["bwrap", "unshare"]), namespaces());
    let Some((image, all)) = build_all(
        "FROM busybox\n\
         RUN mkdir /d && cd /d && echo a > a && chown 33:44 a && chown 7 a && ln -s a l \
           && chown -h 5:6 l && ln a hard && mkfifo p && chown 8:9 p && mv a b\n\
         RUN cd /d && for f in b l hard p; do echo \"= $f $(stat -c '%u:%g %h' $f)\"; done\n\
         RUN cd /d && mkdir -m 2775 s && chown 0:50 s && touch s/x && mkdir -p s/y/z && ln -s x s/l \
           && cp -r s t && for f in s/x s/y s/y/z s/l t t/x; do echo \"= $f $(stat -c '%a %u:%g' $f)\"; done\n\
         RUN cd /d && rm b hard && echo new > b && echo \"= b $(stat -c '%u:%g' b)\" \
           && chmod 4755 b && chown 1:1 b && echo \"= b $(stat -c '%a %u:%g' b)\"\n\
         RUN chown -R 70:71 /d/s && chown :72 /d/s/y && rm -r /d/t && echo more >> /d/s/x\n\
         COPY --chown=80:81 file /d/copied\n\
         RUN cd /d && cp -a copied again && cat copied > plain && chown --help 2>/dev/null; \
           echo \"= $(stat -c '%u:%g' copied again plain s/x | xargs)\"\n",
    ) else {
        return;
    };
    let want = [
        "b 7:44 2",
        "l 5:6 1",
        "hard 7:44 2",
        "p 8:9 1",
        "s/x 644 0:50",
        "s/y 2755 0:50",
        "s/y/z 2755 0:50",
        "s/l 777 0:50",
        "t 2755 0:0",
        "t/x 644 0:0",
        "b 0:0",
        "b 755 1:1",
        "80:81 80:81 0:0 70:71",
    ];
    // What busybox's `cp` makes of a set-group-ID directory is the same everywhere, but not here to say.
    let is_copy = |line: &&&str| line.starts_with("t ");
    for ran in &all {
        let got = printed(ran);
        let without = |lines: &[&str]| -> Vec<String> {
            let lines = lines.iter().filter(|line| !is_copy(line));
            lines.map(ToString::to_string).collect()
        };
        assert_eq!(without(&got), without(&want));
    }
    for (path, summary) in [
        ("d/l", "777 5:6 2"),
        ("d/p", "644 8:9 6"),
        ("d/s", "2775 70:71 5"),
        ("d/s/y", "2755 70:72 5"),
        ("d/s/x", "644 70:71 0"),
        ("d/copied", "644 80:81 0"),
        ("d/again", "644 80:81 0"),
        ("d/plain", "644 0:0 0"),
    ] {
        assert_eq!(image.summary(path), summary, "{path}");
    }
}

#[test]
fn sandbox_processes_become_the_users_that_they_ask_for() {
    needs!(programs(&["bwrap", "unshare"]), namespaces());
    let Some((image, all)) = build_all(
        "FROM busybox\n\
         RUN echo 'root:x:0:0::/root:/bin/sh' > /etc/passwd && echo 'app:x:1000:1001::/home:/bin/sh' >> /etc/passwd \
           && echo 'app:x:1001:' > /etc/group && echo 'more:x:7:app' >> /etc/group && mkdir -m 1777 /all\n\
         RUN su app -c 'echo \"= $(id -u):$(id -g) $(id -G)\"; echo x > /all/su; mkdir /all/dir; ln -s x /all/link'\n\
         USER app\n\
         RUN echo \"= $(id -u):$(id -g) $(id -G)\" && echo x > /all/user && (chown 0:0 /all/user || echo '= denied') \
           && chgrp 7 /all/user && (chgrp 0 /all/user || echo '= denied')\n\
         USER 1234:5678\n\
         RUN echo x > /all/number && stat -c '= %n %u:%g' /all/su /all/dir /all/link /all/user /all/number\n\
         USER root\n\
         RUN --mount=type=secret,id=none,required=false --mount=type=cache,target=/cache,uid=5,gid=6,mode=0750 \
           stat -c '= %n %a %u:%g' /cache && echo x > /cache/x && chown 3:4 /cache/x\n\
         RUN --mount=type=cache,target=/cache,uid=5,gid=6,mode=0750 stat -c '= %n %u:%g' /cache/x\n\
         RUN --mount=type=bind,from=busybox,target=/mnt --mount=type=bind,source=.,target=/ctx stat -c '= %u:%g' /mnt/bin /ctx/file\n",
    ) else {
        return;
    };
    let want = [
        "1000:1001 1001 7",
        "1000:1001 1001 7",
        "denied",
        "denied",
        "/all/su 1000:1001",
        "/all/dir 1000:1001",
        "/all/link 1000:1001",
        "/all/user 1000:7",
        "/all/number 1234:5678",
        "/cache 750 5:6",
        "/cache/x 3:4",
        "0:0",
        "0:0",
    ];
    for ran in &all {
        assert_eq!(printed(ran), want);
    }
    assert_eq!(image.summary("all/user"), "644 1000:7 0");
    assert_eq!(image.summary("all/link"), "777 1000:1001 2");
    assert_eq!(image.summary("all/number"), "644 1234:5678 0");
}

#[test]
fn sandbox_whoever_has_one_id_keeps_a_store_of_their_own_kind() {
    let upstream = upstream!();
    needs!(programs(&["unshare"]));
    let place = Place::new();
    let context = place.context(
        "context",
        &[(
            "Dockerfile",
            "FROM busybox\nRUN echo x > /x && chown 5:6 /x\nRUN stat -c '= %u:%g' /x\n",
        )],
    );
    let way = WAYS[0];
    let (first, image) = build(way, &place, &upstream, &context);
    assert_eq!(printed(&first), ["5:6"]);
    // The same store, whose trees are of no use to who has all IDs: the layers are.
    let (all, same) = build(&[], &place, &upstream, &context);
    assert_eq!(same.digest, image.digest);
    assert_eq!(printed(&all), [""; 0]);
    let context = place.context(
        "more",
        &[(
            "Dockerfile",
            "FROM busybox\nRUN echo x > /x && chown 5:6 /x\nRUN stat -c '= %u:%g' /x\nRUN stat -c '= %u-%g' /x\n",
        )],
    );
    let (all, _) = build(&[], &place, &upstream, &context);
    assert_eq!(printed(&all), ["5-6"]);
    run(place.command().args(["store", "verify"])).success();
}

/// More files of others than may be open at once.
#[test]
fn sandbox_any_number_of_files_has_owners() {
    let upstream = upstream!();
    needs!(programs(&["unshare"]));
    let place = Place::new();
    let dockerfile = "FROM busybox\n\
                      RUN mkdir /d && cd /d && for n in $(seq 300); do : > $n; done && chown -R 5:6 /d\n\
                      RUN cd /d && for n in $(seq 300); do echo x >> $n; done && mv 7 moved && \
                        echo \"= $(stat -c '%u:%g' * | sort | uniq -c | xargs)\"\n";
    let context = place.context("context", &[("Dockerfile", dockerfile)]);
    let few = [
        "sh",
        "-c",
        "ulimit -n 256; exec unshare --user --map-root-user \"$@\"",
        "sh",
    ];
    let (ran, image) = build(&few, &place, &upstream, &context);
    assert_eq!(printed(&ran), ["300 5:6"]);
    let top = image.layers.last().expect("it has layers");
    assert!(top.entries.iter().any(|e| e.path == "d/.wh.7"));
    let is_file = |path: &str, kind| kind == '0' && !path.contains(".wh.");
    let files: Vec<_> = (top.entries.iter())
        .filter(|e| is_file(&e.path, e.kind))
        .collect();
    assert_eq!(files.len(), 300);
    assert!(files.iter().all(|e| (e.uid, e.gid) == (5, 6)), "{files:?}");
}

/// What tells a test that it is a step.
const INSIDE: &str = "SOCKLESS_TEST_STEP";

/// Threads that give files away while signals come in, in a step: whatever call is under way, none
/// sees another's owner, and no call is lost.
#[test]
fn sandbox_threads_and_signals_do_not_confuse_owners() {
    if std::env::var_os(INSIDE).is_some() {
        return give_away_in_threads();
    }
    let upstream = upstream!();
    needs!(programs(&["unshare"]));
    let place = Place::new();
    let dockerfile = format!(
        "FROM busybox\n\
         RUN --mount=type=bind,source=test,target=/test mkdir -p /tmp /w && {INSIDE}=1 /test --exact \
         owners::sandbox_threads_and_signals_do_not_confuse_owners && stat -c '= %u:%g' /w/3\n"
    );
    let context = place.context("context", &[("Dockerfile", &dockerfile)]);
    let test = std::env::current_exe().expect("there is one");
    std::fs::copy(test, context.join("test")).expect("a copy");
    for way in ways() {
        let place = Place::new();
        let (ran, image) = build(way, &place, &upstream, &context);
        assert_eq!(printed(&ran), ["1003:2003"], "{way:?}");
        assert_eq!(image.summary("w/3"), "600 1003:2003 0");
        assert_eq!(image.summary("w/link3"), "600 1003:2003 1");
    }
}

fn give_away_in_threads() {
    use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, chown};
    use std::sync::atomic::{AtomicBool, Ordering};

    // A child that ends is a signal to this process.
    let over = AtomicBool::new(false);
    let children = std::thread::scope(|scope| {
        let signals = scope.spawn(|| {
            let mut count = 0;
            while !over.load(Ordering::Relaxed) {
                run(&mut Command::new("/bin/true")).success();
                count += 1;
            }
            count
        });
        let workers: Vec<_> = (0..6_u32)
            .map(|worker| {
                scope.spawn(move || {
                    let owner = |path: &str| {
                        let found = std::fs::symlink_metadata(path).expect("it was made");
                        (found.uid(), found.gid())
                    };
                    let (file, link) = (format!("/w/{worker}"), format!("/w/link{worker}"));
                    for round in 0..200 {
                        for path in [&file, &link] {
                            let _ = std::fs::remove_file(path);
                        }
                        let mut options = std::fs::OpenOptions::new();
                        options.write(true).create(true).mode(0o600);
                        options.open(&file).expect("a new file");
                        assert_eq!(owner(&file), (0, 0), "{file} {round}");
                        let want = (1000 + worker, 2000 + worker);
                        chown(&file, Some(want.0), None).expect("root can");
                        chown(&file, None, Some(want.1)).expect("root can");
                        std::fs::hard_link(&file, &link).expect("on one file system");
                        assert_eq!((owner(&file), owner(&link)), (want, want), "{round}");
                    }
                })
            })
            .collect();
        for worker in workers {
            worker.join().expect("no thread saw another's owner");
        }
        over.store(true, Ordering::Relaxed);
        signals.join().expect("children end")
    });
    assert!(children > 0);
}
