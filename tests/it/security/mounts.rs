//! S6, S7, S8, S11: what steps have mounted, and where.

use std::os::unix::fs::symlink;

use super::canary::{Canary, SONG};
use crate::support::rungs::on_every_rung;
use crate::support::sockless::Place;

/// CVE-2024-1753: the source of a mount is a link of the image or context that it is from.
#[test]
fn security_s06_sources_of_mounts_are_looked_for_inside() {
    let canary = Canary::new();
    let (path, climb) = (canary.path().display(), canary.climb());
    on_every_rung(|rung, upstream| {
        let place = Place::new();
        // The reproducer has the link in a stage and mounts it read-write.
        for (from, source) in [
            ("from=evil,", "/cve"),
            ("from=evil,", "/cve/dir"),
            ("from=evil,", "/climb"),
            ("", "cve"),
            ("", "climb/dir"),
        ] {
            for kind in ["bind", "cache"] {
                let dockerfile = format!(
                    "FROM busybox AS evil\n\
                     RUN ln -s {path} /cve && ln -s {climb} /climb\n\
                     FROM busybox\n\
                     RUN --mount=type={kind},{from}source={source},target=/m,rw \
                     cat /m/secret /m/*/secret; rm -rf /m/*; echo dead > /m/dead; true\n"
                );
                let context = place.context("context", &[("Dockerfile", &dockerfile)]);
                for (name, target) in [("cve", path.to_string()), ("climb", climb.clone())] {
                    let link = context.join(name);
                    let _ = std::fs::remove_file(&link);
                    symlink(target, link).expect("ours");
                }
                let by = format!("{} {kind} {from}{source}", rung.name);
                rung.build(&place, upstream, &context, &[])
                    .failure()
                    .does_not_say(SONG);
                canary.is_untouched(&by);
            }
        }
    });
}

/// CVE-2024-9675: the ID of a cache climbs out of the directory of caches.
#[test]
fn security_s06_ids_of_caches_are_no_paths() {
    let canary = Canary::new();
    let (path, climb) = (canary.path().display(), canary.climb());
    on_every_rung(|rung, upstream| {
        let place = Place::new();
        let relative = "../".repeat(3);
        for id in [
            path.to_string(),
            climb.clone(),
            format!("{relative}home"),
            format!("x/{climb}/dir"),
            "..".to_owned(),
            ".".to_owned(),
        ] {
            let dockerfile = format!(
                "FROM busybox\nRUN --mount=type=cache,id={id},target=/m \
                 test -z \"$(ls -A /m)\" && echo dead > /m/dead\n"
            );
            let context = place.context("context", &[("Dockerfile", &dockerfile)]);
            rung.build(&place, upstream, &context, &[]).success();
            canary.is_untouched(&format!("{} {id}", rung.name));
        }
        let home = std::fs::read_dir(place.dir.join("home")).expect("still there");
        assert_eq!(home.count(), 0, "{}", rung.name);
        // Each has a directory with the name of a hash, and that is all there is.
        let caches = std::fs::read_dir(place.dir.join("store/cache/mounts")).expect("there");
        let names: Vec<_> = caches.map(|e| e.expect("there").file_name()).collect();
        let is_hash = |name: &str| name.len() == 64 && name.bytes().all(|b| b.is_ascii_hexdigit());
        assert_eq!(names.len(), 6, "{names:?}");
        assert!(names.iter().all(|name| name.to_str().is_some_and(is_hash)));
    });
}

/// CVE-2024-9407: an option of mount(2) goes through a flag, and makes the host's mounts shared.
#[test]
fn security_s06_options_of_mounts_are_those_that_are_known() {
    on_every_rung(|rung, upstream| {
        let place = Place::new();
        for option in [
            "bind-propagation=shared",
            "bind-propagation=rshared",
            "propagation=shared",
            "rshared",
            "bind-nonrecursive=true",
            "exec",
            "suid",
            "dev",
            "z",
            "O",
            "U",
            "idmap",
            "options=rshared",
            "upperdir=/",
        ] {
            for kind in ["bind", "cache", "tmpfs"] {
                let dockerfile = format!(
                    "FROM busybox\nRUN true\nRUN --mount=type={kind},target=/m,{option} true\n"
                );
                let context = place.context("context", &[("Dockerfile", &dockerfile)]);
                rung.build(&place, upstream, &context, &[])
                    .failure()
                    .says("Dockerfile:3")
                    .does_not_say("[1/2]");
            }
        }
        // What a step mounts is its own, whoever owns the namespace around it.
        let dockerfile = "FROM busybox\n\
             RUN --mount=type=bind,target=/b,rw --mount=type=cache,target=/c --mount=type=tmpfs,target=/t \
             test \"$(grep -c ' /[bct] ' /proc/self/mountinfo)\" = 3 && \
             ! grep ' shared:' /proc/self/mountinfo && \
             test \"$(grep -c ' /[bct] .*nosuid,nodev' /proc/self/mountinfo)\" = 3\n";
        let context = place.context("context", &[("Dockerfile", dockerfile)]);
        rung.build(&place, upstream, &context, &[]).success();
    });
}

/// CVE-2024-23651: of two steps with one cache, one swaps a directory for a link while the other
/// has mount points made below it.
#[test]
fn security_s07_a_cache_that_changes_while_it_is_mounted_leads_nowhere() {
    let canary = Canary::new();
    let path = canary.path().display();
    // The attack goes on as long as the victims run, 10 000 swaps at least.
    let attack = format!(
        "cd /cache && ln -s {path} link && mkdir -p a/dir && n=0 && \
         until test $n -ge 10000 && test -e done; do \
         mv -T a b && mv -T link a && mv -T a link && mv -T b a; n=$((n+1)); \
         rm -rf a/dir/* 2>/dev/null; done"
    );
    let victim = |number: u32| {
        format!(
            "RUN --mount=type=cache,id=both,target=/cache \
             --mount=type=tmpfs,target=/cache/a/dir/new/{number} \
             --mount=type=bind,source=/,target=/cache/a/secret/{number} \
             cat /cache/a/secret /cache/link/secret; echo dead > /cache/a/dir/dead; \
             echo dead > /cache/a/secret; true\n"
        )
    };
    on_every_rung(|rung, upstream| {
        let place = Place::new();
        // Mounting may fail where the place has gone; the next stage tries again.
        let mut dockerfile = String::new();
        dockerfile.push_str(&format!(
            "FROM busybox AS attack\nRUN --mount=type=cache,id=both,target=/cache {attack} 2>/dev/null\n\
             FROM busybox AS victim\nARG TURN\n{}\
             FROM busybox AS done\nRUN --mount=type=cache,id=both,target=/cache touch /cache/done\n",
            victim(1)
        ));
        let context = place.context("context", &[("Dockerfile", &dockerfile)]);
        std::thread::scope(|scope| {
            let attacker =
                scope.spawn(|| rung.build(&place, upstream, &context, &["--target", "attack"]));
            for turn in 0..8 {
                let turn = format!("TURN={turn}");
                let args = ["--target", "victim", "--build-arg", &turn, "--no-cache"];
                let ran = rung.build(&place, upstream, &context, &args);
                assert!(ran.status.code().is_some(), "{ran:?}");
                ran.does_not_say(SONG);
            }
            rung.build(&place, upstream, &context, &["--target", "done"])
                .success();
            attacker.join().expect("no panic").success();
        });
        canary.is_untouched(rung.name);
    });
}

/// CVE-2024-23652: a step puts a link where the directory of its mount points was.
#[test]
fn security_s08_mount_points_are_removed_from_where_they_were_made() {
    let canary = Canary::new();
    let (path, climb) = (canary.path().display(), canary.climb());
    on_every_rung(|rung, upstream| {
        let place = Place::new();
        // The names are those of the canary: a removal by path would find them there.
        let dockerfile = format!(
            "FROM busybox\n\
             RUN --mount=type=tmpfs,target=/x/empty-dir/x/y --mount=type=tmpfs,target=/y/dir \
             --mount=type=secret,id=s,target=/x/empty --mount=type=cache,target=/y/empty-dir \
             mv /x /was-x && ln -s {path} /x && mv /y /was-y && ln -s {climb} /y\n\
             RUN --mount=type=bind,source=/,target=/z/dir \
             mv /z /was-z && ln -s {path} /z\n"
        );
        let context = place.context("context", &[("Dockerfile", &dockerfile)]);
        let secret = place.dir.file("s", "s");
        let secret = format!("id=s,src={}", secret.display());
        let (image, _) = rung.built(&place, upstream, &context, &["--secret", &secret]);
        canary.is_untouched(rung.name);
        let link = |name: &str| image.entry(name).map(|entry| entry.link.clone());
        assert_eq!(link("x"), Some(path.to_string()), "{}", rung.name);
        assert_eq!(link("y"), Some(climb.clone()), "{}", rung.name);
        // Moved away, they are found and leave nothing but what held them.
        for stub in ["was-x/empty", "was-x/empty-dir", "was-y/dir", "was-z/dir"] {
            assert_eq!(image.summary(stub), "absent", "{} {stub}", rung.name);
        }
    });
}

/// CVE-2025-31133 and its siblings: mounts on what hides and guards `/proc`, `/sys` and `/dev`.
#[test]
fn security_s11_nothing_is_mounted_on_what_guards_the_host() {
    on_every_rung(|rung, upstream| {
        let place = Place::new();
        let refused = |links: &str, target: &str, reason: &str| {
            for mount in ["tmpfs", "cache", "bind,rw"] {
                let dockerfile = format!(
                    "FROM busybox\nRUN true{links}\n\
                     RUN --mount=type={mount},target={target} echo reached $((6*7))\n"
                );
                let context = place.context("context", &[("Dockerfile", &dockerfile)]);
                rung.build(&place, upstream, &context, &[])
                    .failure()
                    .says(reason)
                    .does_not_say("reached 42");
            }
        };
        let reason = "nothing can be mounted there";
        for target in [
            "/proc",
            "/proc/self",
            "/proc/sys",
            "/proc/sysrq-trigger",
            "/proc/kcore",
            "/proc/self/attr",
            "/proc/1/fd",
            "/dev",
        ] {
            refused("", target, reason);
        }
        for (links, target) in [
            (" && ln -s /proc /p", "/p/sys"),
            (" && ln -s /proc/self /p", "/p"),
            (" && ln -s ../../proc/sys/kernel /p", "/p"),
            (" && ln -s /dev /d", "/d"),
            (" && ln -s / /r", "/r"),
        ] {
            refused(links, target, reason);
        }
        // Links of an image at the places themselves lead no mount away: a `/proc` that is a link,
        // and masks that are links.
        for links in [
            "rm -rf /mnt && mkdir -p /mnt/sys/kernel && touch /mnt/sysrq-trigger",
            "ln -sf /etc/passwd /null && ln -sf /proc/sysrq-trigger /kcore",
        ] {
            let dockerfile = format!(
                "FROM busybox\nRUN {links}\nRUN --mount=type=tmpfs,target=/mnt true\n\
                 RUN ! (echo x > /proc/sysrq-trigger) 2>/dev/null && \
                 ! (echo x > /proc/sys/kernel/core_pattern) 2>/dev/null && \
                 test -c /dev/null && test \"$(stat -c %t:%T /dev/null)\" = 1:3 && \
                 test -z \"$(cat /proc/kcore | head -c 1)\"\n"
            );
            let context = place.context("context", &[("Dockerfile", &dockerfile)]);
            rung.build(&place, upstream, &context, &[]).success();
        }
    });
}

/// The images of the advisories: `/dev/null`, `/dev/pts` and `/proc` are links or files of theirs.
#[test]
fn security_s11_an_image_has_no_part_in_devices_and_masks() {
    use crate::support::archive::Archive;
    let canary = Canary::new();
    let path = canary.path().display().to_string();
    let busybox = std::fs::read(crate::support::find_program("busybox").expect("probed by rungs"));
    let busybox = busybox.expect("readable");
    let base = |evil: &dyn Fn(Archive) -> Archive| {
        let archive = Archive::default()
            .directory("bin/")
            .entry(b'0', "bin/busybox", "", &busybox, &[])
            .symlink("bin/sh", "busybox");
        evil(archive)
    };
    on_every_rung(|rung, upstream| {
        let run = |evil: &dyn Fn(Archive) -> Archive, command: &str| {
            let place = Place::new();
            let layout = place.dir.join("evil");
            let archive = base(evil).end();
            crate::support::images::write_layout(&layout, &archive[..], &serde_json::json!({}));
            let named = format!("evil=oci-layout://{}", layout.display());
            let dockerfile = format!(
                "FROM busybox AS tools\nFROM evil\nCOPY --from=tools --chmod=755 /bin/busybox /bin/busybox\n\
                 RUN {command}\n"
            );
            let context = place.context("context", &[("Dockerfile", &dockerfile)]);
            let ran = rung.build(&place, upstream, &context, &["--build-context", &named]);
            canary.is_untouched(rung.name);
            ran
        };
        let guarded = "test \"$(busybox stat -c %t:%T /dev/null)\" = 1:3 && echo x > /dev/null && \
             ! (echo x > /proc/sysrq-trigger) 2>/dev/null && \
             ! (echo x > /proc/sys/kernel/core_pattern) 2>/dev/null && \
             test -z \"$(busybox head -c 1 /proc/kcore)\" && test -e /proc/self/status";
        // In directories of the image: covered.
        run(
            &|a| {
                a.directory("dev/")
                    .symlink("dev/null", &format!("{path}/empty"))
                    .symlink("dev/pts", &path)
                    .symlink("dev/console", "/proc/sysrq-trigger")
                    .directory("proc/")
                    .symlink("proc/self", &path)
                    .symlink("proc/kcore", &format!("{path}/secret"))
            },
            guarded,
        )
        .success()
        .does_not_say(SONG);
        // The places themselves are links.
        for name in ["proc", "dev", "sys", "etc"] {
            for target in [
                path.clone(),
                canary.climb(),
                "/".to_owned(),
                "bin".to_owned(),
            ] {
                let ran = run(&|a| a.symlink(name, &target), guarded);
                assert!(ran.status.code().is_some(), "{ran:?}");
                ran.does_not_say(SONG);
            }
        }
    });
}

/// Steps beside each other have no directory in common that either can write to, but a cache
/// with `sharing=shared`.
#[test]
fn security_s11_steps_beside_each_other_share_caches_alone() {
    let stage = |name: &str, other: &str| {
        format!(
            "FROM busybox AS {name}\n\
             RUN --mount=type=cache,id=meet,target=/meet \
             --mount=type=bind,source=dir,target=/context,rw \
             --mount=type=bind,from=both,source=/shared,target=/stage,rw \
             --mount=type=cache,id=private,target=/private,sharing=private \
             --mount=type=tmpfs,target=/memory \
             for dir in / /tmp /context /stage /private /memory /dev /dev/shm /var; do \
             touch $dir/of-{name}; done; touch /meet/{name}; \
             until test -e /meet/{other}; do sleep 0.02; done; \
             for dir in / /tmp /context /stage /private /memory /dev /dev/shm /var; do \
             test -e $dir/of-{name} || exit 3; test ! -e $dir/of-{other} || exit 4; done; \
             touch /meet/{name}.done; until test -e /meet/{other}.done; do sleep 0.02; done\n"
        )
    };
    let dockerfile = format!(
        "FROM busybox AS both\nRUN mkdir /shared\n{}{}FROM busybox\n\
         COPY --from=left /etc/base /l\nCOPY --from=right /etc/base /r\n",
        stage("left", "right"),
        stage("right", "left")
    );
    on_every_rung(|rung, upstream| {
        let place = Place::new();
        let files = [("Dockerfile", dockerfile.as_str()), ("dir/file", "text")];
        let context = place.context("context", &files);
        rung.build(&place, upstream, &context, &["--jobs", "2"])
            .success();
        let left = std::fs::read_dir(context.join("dir")).expect("still there");
        assert_eq!(left.count(), 1, "{}", rung.name);
    });
}
