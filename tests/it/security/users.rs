//! S19: accounts and variables that an image makes up.

use super::canary::{Canary, SONG};
use crate::support::archive::Archive;
use crate::support::images::write_layout;
use crate::support::oci::Image;
use crate::support::process::Ran;
use crate::support::registry::Registry;
use crate::support::rungs::{Rung, on_every_rung};
use crate::support::sockless::Place;

/// A base whose accounts are what the archive says, as the named context `evil`.
fn layout(place: &Place, evil: &dyn Fn(Archive) -> Archive, config: &serde_json::Value) -> String {
    let busybox = crate::support::find_program("busybox").expect("probed by rungs");
    let busybox = std::fs::read(busybox).expect("readable");
    let archive = Archive::default()
        .entry(b'0', "bin/busybox", "", &busybox, &[("mode", "x")])
        .symlink("bin/sh", "busybox")
        .directory("etc/");
    let layout = place.dir.join("evil");
    let _ = std::fs::remove_dir_all(&layout);
    write_layout(&layout, &evil(archive).end()[..], config);
    format!("evil=oci-layout://{}", layout.display())
}

const TOOLS: &str = "FROM busybox AS tools\nFROM evil\n\
     COPY --from=tools --chmod=755 /bin/busybox /bin/busybox\n";

fn build(
    rung: &Rung,
    upstream: &Registry,
    place: &Place,
    evil: &dyn Fn(Archive) -> Archive,
    lines: &str,
) -> Ran {
    let evil = layout(place, evil, &serde_json::json!({}));
    let dockerfile = format!("{TOOLS}{lines}");
    let context = place.context("context", &[("Dockerfile", &dockerfile)]);
    rung.build(place, upstream, &context, &["--build-context", &evil])
}

#[test]
fn security_s19_accounts_are_looked_up_inside() {
    let canary = Canary::new();
    let outside = crate::support::dir::TestDir::new("accounts");
    let passwd = outside.file(
        "passwd",
        format!("stolen:x:4242:4242:{SONG}:/home:/bin/sh\n"),
    );
    let group = outside.file("group", "stolen:x:4343:\nroot:x:0:stolen\n");
    let (passwd, group) = (passwd.display().to_string(), group.display().to_string());
    on_every_rung(|rung, upstream| {
        let place = Place::new();
        let climb = format!("{}{}", "../".repeat(40), passwd.trim_start_matches('/'));
        for target in [&passwd, &climb, &"/proc/self/root/etc/passwd".to_owned()] {
            let evil = |a: Archive| a.symlink("etc/passwd", target).symlink("etc/group", &group);
            let run = |lines: &str| build(rung, upstream, &place, &evil, lines);
            run("USER stolen\nRUN true\n")
                .failure()
                .says("no user \"stolen\" in the image's /etc/passwd");
            run("USER 7:stolen\nRUN true\n")
                .failure()
                .says("no group \"stolen\" in the image's /etc/group");
            run("COPY --chown=stolen:stolen --from=tools /bin/sh /x\nRUN test \"$(busybox stat -c %u:%g /x)\" = 0:0\n")
                .success()
                .says("no user \"stolen\"");
        }
        // A directory and a link inside are what they would be for a process in the image.
        let inside = |a: Archive| {
            a.symlink("etc/passwd", "/../../usr/passwd")
                .file("usr/passwd", "here:x:1:2:::\n")
        };
        build(
            rung,
            upstream,
            &place,
            &inside,
            "USER here\nRUN busybox id\n",
        )
        .success()
        .says("uid=1(here) gid=2");
        // What is no file has no accounts, and nobody waits for it.
        for kind in [b'6', b'5', b'3'] {
            let evil = |a: Archive| a.entry(kind, "etc/passwd", "", b"", &[]);
            build(rung, upstream, &place, &evil, "USER x\nRUN true\n")
                .failure()
                .says("no user \"x\"");
        }
        canary.is_untouched(rung.name);
    });
}

#[test]
fn security_s19_account_files_and_environments_have_a_size_limit() {
    let large = "x:x:1:1:::\n".repeat(1 << 20);
    on_every_rung(|rung, upstream| {
        let place = Place::new();
        for name in ["etc/passwd", "etc/group"] {
            let evil = |a: Archive| a.file(name, &large);
            build(rung, upstream, &place, &evil, "USER x\nRUN true\n")
                .failure()
                .says("the image's account file is larger than 10485760 bytes");
        }
        // More than the kernel lets a process have is said, not met by a crash.
        for (count, bytes) in [(40, 130_000), (1, 140_000), (30_000, 100)] {
            let env: Vec<_> = (0..count)
                .map(|n| format!("V{n}={}", "x".repeat(bytes)))
                .collect();
            let config = serde_json::json!({ "Env": env });
            let evil = layout(&place, &|a| a, &config);
            let dockerfile = format!("{TOOLS}RUN true\n");
            let context = place.context("context", &[("Dockerfile", &dockerfile)]);
            let ran = rung.build(&place, upstream, &context, &["--build-context", &evil]);
            let code = ran.status.code();
            assert!(matches!(code, Some(0..=70)), "{count} of {bytes}: {code:?}");
            assert!(!ran.stderr.contains("panicked"), "{}", rung.name);
        }
    });
}

/// What a step is told of its groups, by `USER` line.
fn groups(image: &Image) -> Vec<String> {
    let text = image.text("groups");
    text.lines().map(str::to_owned).collect()
}

/// CVE-2023-25173 and CVE-2022-2990: groups of whoever builds, or of nobody, are not the step's.
#[test]
fn security_s19_a_step_has_the_groups_of_its_user_and_no_others() {
    on_every_rung(|rung, upstream| {
        let place = Place::new();
        let dockerfile = "FROM busybox\n\
             RUN printf 'one:x:1001:\\ntwo:x:1002:user\\nthree:x:1003:user,other\\nroot:x:0:root\\nwheel:x:10:root\\n' > /etc/group && \
             printf 'root:x:0:0::/root:/bin/sh\\nuser:x:1000:1001::/:/bin/sh\\n' > /etc/passwd && \
             touch /groups && chmod 666 /groups\n\
             RUN id -G >> /groups\n\
             USER user\nRUN id -G >> /groups\n\
             USER user:three\nRUN id -G >> /groups\n\
             USER 1000\nRUN id -G >> /groups\n\
             USER 2000\nRUN id -G >> /groups; grep Groups: /proc/self/status >> /groups\n\
             USER 2000:3000\nRUN id -G >> /groups\n\
             USER root\nRUN id -G >> /groups\n";
        let context = place.context("context", &[("Dockerfile", dockerfile)]);
        let (image, _) = rung.built(&place, upstream, &context, &[]);
        let mut want = vec![
            "0 10",
            "1001 1002 1003",
            "1003",
            "1001 1002 1003",
            "0",
            "Groups:\t0 ",
            "3000",
            "0 10",
        ];
        let mut got = groups(&image);
        // Where users are made up, /proc shows what the kernel knows of.
        if rung.name.starts_with("one ID") {
            want.remove(5);
            let of_kernel = got.remove(5);
            let own = ["Groups:\t ", "Groups:\t0 "];
            assert!(
                own.contains(&of_kernel.as_str()),
                "{}: {of_kernel:?}",
                rung.name
            );
        }
        assert_eq!(got, want, "{}", rung.name);
    });
}
