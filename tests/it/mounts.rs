//! What RUN steps have mounted, over several builds: caches, contexts, memory, secrets; devices.

use std::path::Path;

use crate::support::process::{Ran, run};
use crate::support::registry::Registry;
use crate::support::sockless::Place;
use crate::support::{images, is_root, namespaces};

/// The registry of base images, or the end of the test.
macro_rules! upstream {
    () => {{
        needs!(namespaces());
        match images::busybox() {
            Ok(registry) => registry,
            Err(reason) => skip!("{reason}"),
        }
    }};
}

/// Builds a Dockerfile with these variables, arguments and nothing else in its context.
#[track_caller]
fn build(
    place: &Place,
    upstream: &Registry,
    dockerfile: &str,
    env: &[(&str, &str)],
    args: &[&str],
) -> Ran {
    let context = place.context("context", &[("Dockerfile", dockerfile)]);
    build_in(place, upstream, &context, env, args)
}

#[track_caller]
fn build_in(
    place: &Place,
    upstream: &Registry,
    context: &Path,
    env: &[(&str, &str)],
    args: &[&str],
) -> Ran {
    run(place
        .command()
        .envs(env.iter().copied())
        .args(["build", "--progress", "plain", "--registry-mirror"])
        .arg(format!("docker.io={}", upstream.url()))
        .args(args)
        .arg(context))
}

#[test]
fn sandbox_caches_outlive_builds_that_fail() {
    let (upstream, place) = (upstream!(), Place::new());
    let dockerfile = |command: &str| {
        format!("FROM busybox\nRUN --mount=type=cache,target=/var/keep {command}\n")
    };
    let fails = dockerfile("echo one > /var/keep/first && exit 9");
    build(&place, &upstream, &fails, &[], &[])
        .failure()
        .says("exit code: 9");
    let sees = dockerfile("echo \"found: $(cat /var/keep/first)\" && test ! -e /var/keep/other");
    build(&place, &upstream, &sees, &[], &[])
        .success()
        .says("found: one");
    // Another target is another cache, and a namespace has its own.
    let other = "FROM busybox\nRUN --mount=type=cache,target=/var/more test ! -e /var/more/first";
    build(&place, &upstream, other, &[], &[]).success();
    let namespace = ["--build-arg", "BUILDKIT_CACHE_MOUNT_NS=mine"];
    let empty = dockerfile("echo \"has $(ls /var/keep | wc -l) files\"");
    build(&place, &upstream, &empty, &[], &namespace)
        .success()
        .says("has 0 files");
}

#[test]
fn sandbox_caches_are_new_in_a_build_without_the_cache() {
    let (upstream, place) = (upstream!(), Place::new());
    let dockerfile = "FROM busybox AS fresh\n\
                      ARG NAME\n\
                      RUN --mount=type=cache,target=/shelf,mode=0773 \
                      touch /shelf/$NAME && echo \"shelf: $(echo $(ls /shelf))\"\n\
                      RUN --mount=type=cache,target=/plain touch /plain/$NAME && \
                      echo \"plain: $(echo $(ls /plain))\"\n";
    let named = |name: &str, args: &[&str]| {
        let name = format!("NAME={name}");
        let mut all = vec!["--build-arg", name.as_str()];
        all.extend(args);
        build(&place, &upstream, dockerfile, &[], &all).success()
    };
    named("a", &[]).says("shelf: a\n").says("plain: a\n");
    named("b", &[]).says("shelf: a b\n").says("plain: a b\n");
    named("c", &["--no-cache"])
        .says("shelf: c\n")
        .says("plain: c\n");
    named("d", &["--no-cache-filter", "other"])
        .says("shelf: c d\n")
        .says("plain: c d\n");
    named("e", &["--no-cache-filter", "fresh"])
        .says("shelf: e\n")
        .says("plain: e\n");
}

#[test]
fn sandbox_stages_side_by_side_share_caches_as_they_say() {
    let (upstream, place) = (upstream!(), Place::new());
    // Each stage says that it is there and waits for the other one: only where both have the
    // directory at once do they see each other.
    let stages = |sharing: &str, meet: &str| {
        let stage = |name: &str, other: &str| {
            format!(
                "FROM busybox AS {name}\n\
                 RUN --mount=type=cache,target=/both,id=meeting \
                 --mount=type=cache,target=/cache,id=x-{sharing},sharing={sharing} \
                 touch /both/{name} && until test -e /both/{other}; do sleep 0.02; done; \
                 {meet}\n"
            )
            .replace("NAME", name)
            .replace("OTHER", other)
        };
        format!(
            "{}{}FROM busybox\nCOPY --from=left /etc/base /l\nCOPY --from=right /etc/base /r\n",
            stage("left", "right"),
            stage("right", "left")
        )
    };
    let shared = stages(
        "shared",
        "touch /cache/NAME; until test -e /cache/OTHER; do sleep 0.02; done",
    );
    build(&place, &upstream, &shared, &[], &[]).success();
    // Each has its own while both run.
    let private = stages(
        "private",
        "touch /cache/NAME /both/NAME.done; \
        until test -e /both/OTHER.done; do sleep 0.02; done; test ! -e /cache/OTHER",
    );
    build(&place, &upstream, &private, &[], &["--no-cache"]).success();
    // One after the other: whoever is there finds nobody, and the second one what the first left.
    let one = |name: &str| {
        format!(
            "FROM busybox AS {name}\n\
             RUN --mount=type=cache,target=/cache,sharing=locked \
             test ! -e /cache/busy && touch /cache/busy && \
             echo {name} >> /cache/who && rm /cache/busy && echo \"so far $(cat /cache/who | wc -l)\"\n"
        )
    };
    let locked = format!(
        "{}{}FROM busybox\nCOPY --from=a /etc/base /a\nCOPY --from=b /etc/base /b\n",
        one("a"),
        one("b")
    );
    build(&place, &upstream, &locked, &[], &[])
        .success()
        .says("so far 1")
        .says("so far 2");
}

#[test]
fn sandbox_caches_inside_each_other_mount_again_and_again() {
    let (upstream, place) = (upstream!(), Place::new());
    let stage = |name: &str| {
        format!(
            "FROM busybox AS {name}\n\
             RUN --mount=type=cache,target=/outer/a --mount=type=cache,target=/outer/a/b/c \
             touch /outer/a/{name} /outer/a/b/c/{name}\n"
        )
    };
    let dockerfile = format!(
        "{}{}FROM busybox\nCOPY --from=one /etc/base /1\nCOPY --from=two /etc/base /2\n",
        stage("one"),
        stage("two")
    );
    for _ in 0..4 {
        build(&place, &upstream, &dockerfile, &[], &["--no-cache"]).success();
    }
}

#[test]
fn security_s18_sandbox_steps_are_cached_by_what_their_mounts_hold() {
    let (upstream, place) = (upstream!(), Place::new());
    let dockerfile = "FROM busybox AS made\n\
                      COPY changes /\n\
                      RUN mkdir /out && echo fixed > /out/file\n\
                      FROM busybox\n\
                      RUN --mount=from=made,source=out,target=/out,rw \
                      touch /out/more && echo step one\n\
                      RUN --mount=source=.,target=/c --mount=source=b,target=/tmp/b \
                      echo \"read $(cat /c/a /tmp/b | tr -d '\\n')\"\n";
    let with = |changes: &str, a: &str| {
        let files = [
            ("Dockerfile", dockerfile),
            (".dockerignore", "Dockerfile\nchanges.left\n"),
            ("changes", changes),
            ("a", a),
            ("b", "bee\n"),
        ];
        let context = place.context("context", &files);
        build_in(&place, &upstream, &context, &[], &[]).success()
    };
    with("0", "ay\n").says("step one").says("read aybee");
    // What was mounted is what it was, although the stage that made it is another.
    with("1", "ay\n").does_not_say("] step one");
    let again = with("1", "new\n");
    again.does_not_say("] step one").says("read newbee");
}

#[test]
fn sandbox_memory_without_a_directory_below_is_for_everybody() {
    let (upstream, place) = (upstream!(), Place::new());
    let dockerfile = "FROM busybox\n\
        RUN --mount=type=tmpfs,target=/nowhere/yet --mount=type=tmpfs,target=/root \
        --mount=type=tmpfs,target=/etc/x,size=1m \
        echo \"modes: $(echo $(stat -c %a /nowhere/yet /root /etc/x))\" && touch /nowhere/yet/f\n\
        RUN test ! -e /nowhere/yet/f && grep ' /dev/shm ' /proc/mounts\n\
        RUN --mount=type=tmpfs,target=/dev/shm,size=128m grep ' /dev/shm ' /proc/mounts\n";
    build(&place, &upstream, dockerfile, &[], &["--shm-size", "0"])
        .success()
        .says("modes: 1777 700 1777")
        .says("size=65536k")
        .says("size=131072k");
    let sized = ["--shm-size=2m", "--no-cache"];
    build(&place, &upstream, dockerfile, &[], &sized)
        .success()
        .says("size=2048k");
}

#[test]
fn security_s13_sandbox_secrets_have_their_owner_and_leave_nothing() {
    let (upstream, place) = (upstream!(), Place::new());
    let dockerfile = "FROM busybox\n\
        ENV WORD=outside\n\
        RUN --mount=type=secret,mode=741,uid=100,gid=102,target=/deep/token \
        echo \"is $(stat -c '%u %g %a' /deep/token) $(sha256sum < /deep/token | cut -c 1-12)\" && \
        echo \"shown as $(cat /deep/token)\"\n\
        RUN test ! -e /deep/token && \
        echo \"$WORD stays\"\n\
        RUN --mount=type=secret,id=token,env=WORD \
        test \"$WORD\" = open-sesame && test ! -e /run/secrets/token && echo as variable\n\
        RUN --mount=type=secret,id=token,env=WORD,target=/t \
        test \"$WORD\" = \"$(cat /t)\" && echo as both\n";
    let env = [("CI_TOKEN", "open-sesame")];
    build(
        &place,
        &upstream,
        dockerfile,
        &env,
        &["--secret", "id=token,env=CI_TOKEN"],
    )
    .success()
    .says("is 100 102 741 d7ecdf25eaf3")
    .says("shown as ***")
    .says("outside stays")
    .says("as variable")
    .says("as both");
    let required = "FROM busybox\nRUN --mount=type=secret,required,id=token true";
    build(&place, &upstream, required, &[], &[])
        .failure()
        .says("Dockerfile:2")
        .says("token");
    // Empty without a word would be a riddle.
    let optional = "FROM busybox\nRUN --mount=type=secret,id=token true";
    build(
        &place,
        &upstream,
        optional,
        &[],
        &["--secret", "id=token,env=CI_TOKEN"],
    )
    .success()
    .says(
        "--secret id=token: the environment variable CI_TOKEN is not set, so the secret is empty",
    );
}

/// Two devices, one of which anybody may have.
const DEVICES: &str = "\
cdiVersion: \"0.6.0\"
kind: \"acme.test/meter\"
containerEdits:
  env:
  - ACME=all
devices:
- name: free
  annotations:
    org.mobyproject.buildkit.device.autoallow: true
  containerEdits:
    env:
    - METER=free
    - SET=by the device
- name: held
  containerEdits:
    env:
    - METER=held
    deviceNodes:
    - path: /dev/meter
      hostPath: /dev/null
    mounts:
    - hostPath: LIBRARY
      containerPath: /opt/meter
      options: [ro, rbind]
    hooks:
    - hookName: createContainer
      path: /bin/hook
";

#[test]
fn sandbox_devices_are_those_that_were_allowed() {
    let (upstream, place) = (upstream!(), Place::new());
    let library = place.dir.dir("library");
    place.dir.file("library/meter.so", "of the device\n");
    let described = DEVICES.replace("LIBRARY", &library.display().to_string());
    place.dir.file("cdi/acme.yaml", described);
    let dirs = place.dir.join("cdi").display().to_string();
    let env = [("SOCKLESS_CDI_DIRS", dirs.as_str())];

    let free = "FROM busybox\n\
                ENV SET=by-the-stage\n\
                RUN --device=acme.test/meter=free,required --device=other.test/x=y \
                echo \"$ACME $METER $SET\"\n";
    build(&place, &upstream, free, &env, &[])
        .success()
        .says("all free by the device")
        .says("optional device \"other.test/x=y\" is not registered");

    let held = "FROM busybox\nRUN true\nRUN --device=acme.test/meter=held \
                echo \"$METER: $(cat /opt/meter/meter.so)\" && echo gone > /dev/meter && \
                test -c /dev/meter && test -z \"$(cat /dev/meter)\"\n";
    build(&place, &upstream, held, &env, &[])
        .failure()
        .says("Dockerfile:3:1")
        .says("RUN --device needs acme.test/meter=held, which was not allowed")
        .does_not_say("[2/3]");
    let says = "the createContainer hook /bin/hook is not run";
    for allow in ["device", "device=acme.test/meter=held"] {
        build(
            &place,
            &upstream,
            held,
            &env,
            &["--no-cache", "--allow", allow],
        )
        .success()
        .says("held: of the device")
        .says(says);
    }
    let alias = "FROM busybox\nRUN --device=meter,required echo \"alias $METER\"\n";
    let allow = ["--allow", "device=acme.test/meter=held,alias=meter"];
    build(&place, &upstream, alias, &env, &allow)
        .success()
        .says("alias held");
    let missing = "FROM busybox\nRUN --device=acme.test/none=x,required true\n";
    build(&place, &upstream, missing, &env, &["--allow", "device"])
        .failure()
        .says("required device \"acme.test/none=x\" is not registered");
    assert_eq!(
        std::fs::read(library.join("meter.so")).expect("still there"),
        b"of the device\n",
        "as {}",
        if is_root() {
            "root"
        } else {
            "an ordinary user"
        }
    );
}

#[test]
fn sandbox_proxies_do_not_decide_what_is_cached_and_arguments_do() {
    let (upstream, place) = (upstream!(), Place::new());
    let dockerfile = "FROM busybox\nARG WORD\nARG EMPTY=\nARG UNSET\n\
                      COPY f* /files/\n\
                      RUN echo \"ran: $http_proxy $WORD ${EMPTY-unset} ${UNSET-unset}\" && \
                      ls /files/f1\n";
    let files = [
        ("Dockerfile", dockerfile),
        (".dockerignore", "Dockerfile\n"),
        ("f1", "same\n"),
    ];
    let context = place.context("context", &files);
    let with = |proxy: &str, word: &str| {
        let args = [format!("http_proxy={proxy}"), format!("WORD={word}")];
        let args = ["--build-arg", &args[0], "--build-arg", &args[1]];
        build_in(&place, &upstream, &context, &[], &args)
    };
    with("p.test:1", "a")
        .success()
        .says("ran: p.test:1 a  unset");
    with("p.test:2", "a").success().does_not_say("ran: p.test");
    with("p.test:2", "b")
        .success()
        .says("ran: p.test:2 b  unset");
    // The same content by another name is not the same.
    std::fs::rename(context.join("f1"), context.join("f2")).expect("ours");
    with("p.test:2", "b").failure().says("Dockerfile:6");
}

#[test]
fn sandbox_a_cache_from_a_stage_is_found_again_when_the_stage_is_cached() {
    let (upstream, place) = (upstream!(), Place::new());
    let dockerfile = |command: &str| {
        format!(
            "FROM busybox AS filled\nRUN mkdir /in && echo first > /in/f\nFROM busybox\n\
             RUN --mount=type=cache,id=kept,from=filled,source=/in,target=/c {command}\n"
        )
    };
    build(
        &place,
        &upstream,
        &dockerfile("cat /c/f && echo second > /c/f"),
        &[],
        &[],
    )
    .success()
    .says("first");
    build(&place, &upstream, &dockerfile("cat /c/f"), &[], &[])
        .success()
        .says("second");
}
