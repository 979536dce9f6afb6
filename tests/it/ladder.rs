//! Rung 4 of the ladder: root in a container as Docker makes it by default, in which neither
//! namespaces nor mounts can be made.

use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::support::container::{self, CAPABILITIES};
use crate::support::oci::Image;
use crate::support::process::{Ran, run};
use crate::support::registry::Registry;
use crate::support::sockless::Place;
use crate::support::{images, programs};

/// Ends the test where it cannot run: an ordinary user's run may leave it to root's that follows.
macro_rules! needs_container {
    () => {
        if let Err(reason) = container::possible() {
            let follows = std::env::var_os("SOCKLESS_TEST_ROOT_FOLLOWS");
            if !crate::support::is_root() && follows.is_some_and(|value| value == "1") {
                eprintln!("skipped: {reason}");
                return;
            }
            skip!("{reason}");
        }
    };
}

/// The registry of a base image, or the end of the test.
macro_rules! base {
    ($image:expr) => {
        match $image {
            Ok(registry) => registry,
            Err(reason) => skip!("{reason}"),
        }
    };
}

const DATE: &str = "1700000000";
const NOTE: &str = "rung 4 (chroot): RUN steps have a root directory of their own, but share the \
                    processes, network, IPC and host name of whoever runs sockless";

/// Where a build runs.
#[derive(Clone, Copy)]
enum Where {
    /// As the tests do.
    Here,
    /// In a container with these capabilities.
    Container(&'static [&'static str]),
}

const CONTAINER: Where = Where::Container(&CAPABILITIES);

impl Where {
    fn command(self, place: &Place) -> Command {
        let words = match self {
            Self::Here => Vec::new(),
            Self::Container(capabilities) => container::words(capabilities),
        };
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        place.wrapped(&words)
    }
}

fn build_command(place: &Place, at: Where, upstream: &Registry, args: &[&str]) -> Command {
    let mut command = at.command(place);
    command
        .args(["build", "--progress", "plain"])
        .arg("--registry-mirror")
        .arg(format!("docker.io={}", upstream.url()))
        .args(args)
        .env("SOURCE_DATE_EPOCH", DATE);
    command
}

/// Builds into an archive.
fn build(place: &Place, at: Where, upstream: &Registry, context: &Path, args: &[&str]) -> Ran {
    let output = format!("type=oci,dest={}", archive(place).display());
    let args = [&["-o", output.as_str()], args].concat();
    run(build_command(place, at, upstream, &args).arg(context))
}

fn archive(place: &Place) -> PathBuf {
    place.dir.join("image.tar")
}

fn built(place: &Place, at: Where, upstream: &Registry, context: &Path, args: &[&str]) -> Image {
    build(place, at, upstream, context, args).success();
    place.archive(&archive(place))
}

#[test]
fn ladder_a_container_is_as_docker_makes_it() {
    container::enter_where_told();
    needs_container!();
    let words = container::words(&CAPABILITIES);
    let script = "grep CapEff /proc/self/status; for flag in --user --mount --net --pid; do \
                  unshare $flag true; done; mount -t tmpfs none /mnt; ls -d /proc/1";
    let ran = run(Command::new(&words[0])
        .args(&words[1..])
        .args(["sh", "-c", script]));
    assert!(ran.stdout.contains("CapEff:\t00000000a80425fb"), "{ran:?}");
    assert_eq!(
        ran.stderr.matches("Operation not permitted").count(),
        4,
        "{ran:?}"
    );
    assert!(ran.stderr.contains("permission denied"), "{ran:?}");
}

/// Steps of every kind: what they leave has to be the same with and without mounts.
const STEPS: &str = "\
FROM busybox AS stage\n\
RUN mkdir -p /from/deep && echo stage > /from/deep/file && chown 7:8 /from/deep/file\n\
\n\
FROM busybox\n\
RUN chown 1000:42 /etc/base && chmod 4711 /bin/busybox && rm /etc/group && mkdir -m 2750 /opt && ln -s ../x /opt/link\n\
RUN echo mine >> /etc/hosts || true; echo mine > /etc/resolv.conf || true; echo x > /dev/file; mkdir /dev/shm/x\n\
RUN echo kept > /etc/kept && touch /tmp/file && ln /etc/kept /tmp/hard && mkfifo /tmp/pipe && cat /dev/null\n\
USER app\n\
WORKDIR /home/app\n\
RUN id > ids && ! touch /etc/forbidden 2>/dev/null && echo \"$HOME\" > home && umask > mask\n\
USER root\n\
RUN --mount=type=secret,id=s,target=/run/secrets/deep/s,uid=1000 \
    stat -c '%a %u' /run/secrets/deep/s > /seen && wc -c < /run/secrets/deep/s >> /seen\n\
RUN --mount=type=cache,target=/var/cache/x,id=ladder echo 1 >> /var/cache/x/log && cp /var/cache/x/log /log1\n\
RUN --mount=type=cache,target=/var/cache/x,id=ladder echo 2 >> /var/cache/x/log && cp /var/cache/x/log /log2\n\
RUN --mount=type=bind,source=dir,target=/ctx --mount=type=bind,from=stage,source=/from,target=/st \
    --mount=type=tmpfs,target=/home/app \
    cp -p /ctx/b.txt /b && cp -pr /st/deep /deep && touch /home/app/lost && ls /home/app > /listing\n\
RUN <<END\n\
echo from a here-document > /doc\n\
END\n\
RUN ls -A / /dev/shm /run /var/cache /home/app > /final; test ! -e /ctx\n";

#[test]
fn ladder_a_container_gives_the_layers_of_root() {
    needs_container!();
    let upstream = base!(images::busybox());
    let make = |at| {
        let place = Place::new();
        let context = place.context(
            "context",
            &[
                ("Dockerfile", STEPS),
                ("dir/b.txt", "b\n"),
                ("secret", "hunter2"),
            ],
        );
        let secret = format!("id=s,src={}", context.join("secret").display());
        let ran = build(&place, at, &upstream, &context, &["--secret", &secret]).success();
        let image = place.archive(&archive(&place));
        // Its files are read where they lie.
        (ran, image, place)
    };
    let (_, root, _root_place) = make(Where::Here);
    let (ran, container, _place) = make(CONTAINER);
    ran.says("RUN steps run in chroot, as no namespaces can be made")
        .says(NOTE);
    for (a, b) in root.layers.iter().zip(&container.layers) {
        assert_eq!(a.entries, b.entries);
    }
    assert_eq!(container.digest, root.digest);
    // The steps did what they are there for.
    assert_eq!(container.text("seen"), "400 1000\n7\n");
    assert_eq!(container.text("log2"), "1\n2\n");
    assert_eq!(container.text("deep/file"), "stage\n");
    assert_eq!(container.summary("deep/file"), "644 7:8 0");
    assert_eq!(container.text("listing"), "lost\n");
    assert_eq!(container.summary("etc/base"), "644 1000:42 0");
    assert!(!container.text("final").contains("secrets"));
}

/// What a package's scripts do: accounts, owners, attributes, links, triggers. Three files have
/// the time of the run in them, and numbers of inodes.
const PACKAGES: &str = "\
FROM ubuntu\n\
RUN groupadd -g 4242 staffers && useradd -m -u 4243 -g staffers ada && chown -R ada:staffers /srv && \
    dpkg --configure -a && ldconfig && update-alternatives --install /usr/bin/pager2 pager2 /bin/cat 5 && \
    rm /var/log/alternatives.log /var/log/dpkg.log /var/cache/ldconfig/aux-cache\n\
RUN rm -rf /usr/share/doc && mv /etc/skel /etc/skeleton && cp -a /etc/skeleton /etc/skel && \
    su ada -s /bin/bash -c 'id -un > /home/ada/who'\n";

#[test]
fn ladder_a_debian_is_built_as_by_root() {
    needs_container!();
    let upstream = base!(images::debian());
    let image = |at| {
        let place = Place::new();
        let context = place.context("context", &[("Dockerfile", PACKAGES)]);
        (built(&place, at, &upstream, &context, &[]), place)
    };
    let ((root, _root_place), (container, _place)) = (image(Where::Here), image(CONTAINER));
    for (a, b) in root.layers.iter().zip(&container.layers) {
        assert_eq!(a.entries.len(), b.entries.len());
        let differ: Vec<_> = a
            .entries
            .iter()
            .zip(&b.entries)
            .filter(|(a, b)| a != b)
            .collect();
        assert!(differ.is_empty(), "{differ:?}");
    }
    assert_eq!(container.digest, root.digest);
    assert_eq!(container.text("home/ada/who"), "ada\n");
    assert_eq!(container.summary("srv"), "755 4243:4242 5");
}

#[test]
fn ladder_isolation_that_is_required_is_had_or_refused() {
    needs_container!();
    let upstream = base!(images::busybox());
    let place = Place::new();
    let context = place.context(
        "context",
        &[(
            "Dockerfile",
            "FROM busybox\nRUN --network=host echo \"the step $((40 + 2)) ran\"\n",
        )],
    );
    let required = ["--require-isolation", "--allow=network.host"];
    let ran = build(&place, CONTAINER, &upstream, &context, &required);
    assert_eq!(ran.status.code(), Some(4), "{ran:?}");
    let ran = ran
        .says("isolation is required (--require-isolation): RUN steps have a root directory")
        .says("hint: ")
        .does_not_say("the step 42 ran");
    assert!(!archive(&place).exists(), "{ran:?}");
    // Also where it could be had, and was not chosen.
    let chosen = [
        "--require-isolation",
        "--allow=network.host",
        "--sandbox=chroot",
    ];
    let ran = build(&place, Where::Here, &upstream, &context, &chosen);
    assert_eq!(ran.status.code(), Some(4), "{ran:?}");
    build(&place, Where::Here, &upstream, &context, &required)
        .success()
        .says("the step 42 ran")
        .does_not_say("rung 4");
    // It is what steps have; without any there is nothing to refuse.
    let context = place.context(
        "files",
        &[("Dockerfile", "FROM busybox\nCOPY a /\n"), ("a", "a")],
    );
    let ran = build(&place, CONTAINER, &upstream, &context, &required);
    ran.success().does_not_say(NOTE);
}

#[test]
fn ladder_what_is_missing_for_chroot_is_named() {
    needs_container!();
    let upstream = base!(images::busybox());
    let place = Place::new();
    let context = place.context("context", &[("Dockerfile", "FROM busybox\nRUN true\n")]);
    const FEWER: &[&str] = &[
        "chown",
        "dac_override",
        "fowner",
        "setuid",
        "setgid",
        "setpcap",
    ];
    let ran = build(&place, Where::Container(FEWER), &upstream, &context, &[]);
    assert_eq!(ran.status.code(), Some(4), "{ran:?}");
    ran.says("nor can root do it without one: root has no CAP_SYS_CHROOT, CAP_KILL")
        .says("--cap-add=SYS_CHROOT --cap-add=KILL");
    // Without devices no step has a /dev/null.
    const NO_DEVICES: &[&str] = &[
        "chown",
        "dac_override",
        "fowner",
        "setuid",
        "setgid",
        "setpcap",
        "sys_chroot",
        "kill",
    ];
    let ran = build(
        &place,
        Where::Container(NO_DEVICES),
        &upstream,
        &context,
        &[],
    );
    assert_eq!(ran.status.code(), Some(4), "{ran:?}");
    ran.says("making /dev/null: no devices can be made in the store");
}

#[test]
fn ladder_what_takes_namespaces_or_mounts_is_refused_by_name() {
    needs_container!();
    let upstream = base!(images::busybox());
    let place = Place::new();
    let check = |flags: &str, args: &[&str], want: &str| {
        let dockerfile = format!("FROM busybox\nRUN {flags} echo \"ran $((40 + 2))\"\n");
        let context = place.context("context", &[("Dockerfile", dockerfile.as_str())]);
        let ran = build(&place, CONTAINER, &upstream, &context, args);
        assert_eq!(ran.status.code(), Some(4), "{ran:?}");
        ran.says("Dockerfile:2").says(want).does_not_say("ran 42");
    };
    check(
        "--network=none",
        &[],
        "giving a step no network (--network=none): that takes a network namespace",
    );
    check(
        "--security=insecure",
        &["--allow=security.insecure"],
        "running a step with --security=insecure: that takes mounts of its own",
    );
    check(
        "",
        &["--rootfs=overlay"],
        "mounting an overlay (--rootfs=overlay): with the sandbox chroot",
    );
}

/// What a hostile step tries; each line of the report is one attempt and what came of it.
const HOSTILE: &str = r#"
use strict; use Socket;
sub said { my ($what, $result) = @_; printf "%s: %s\n", $what, $result ? "YES" : $!; }
my @open = grep { open(my $fd, "<&=", $_) } 3 .. 1023; print "open files: @open\n";
my $parent = $ENV{SUPERVISOR} + 0;
said("kill the supervisor", kill(0, $parent));
said("kill the builder", kill(0, $ENV{BUILDER}));
said("trace the supervisor", syscall(101, 16, $parent, 0, 0) == 0);
said("trace the builder", syscall(101, 16, $ENV{BUILDER} + 0, 0, 0) == 0);
said("open the builder's pidfd", syscall(434, $ENV{BUILDER} + 0, 0) >= 0 ? kill(9, $ENV{BUILDER}) : 0);
mkdir "/jail"; said("chroot in the chroot", chroot("/jail"));
said("a user namespace", syscall(272, 0x10000000) == 0);
my $path = "/disk"; said("a disk", syscall(133, $path, 060666, 0x0800) == 0);
$path = "/memory"; said("the memory", syscall(133, $path, 020666, 0x0101) == 0);
my $target = "/jail"; my $type = "proc"; said("mount proc", syscall(165, $type, $target, $type, 0, 0) == 0);
socket(my $s, PF_UNIX, SOCK_STREAM, 0); said("the abstract socket", connect($s, pack_sockaddr_un("\0$ENV{SOCKET}")));
my @environ = glob("/proc/[0-9]*/environ"); print "environments: @environ\n";
chdir "/"; chdir ".." for 1 .. 99; my @found = glob("*"); print "above the root: ", (grep { $_ eq "jail" } @found) ? "the root" : "@found", "\n";
"#;

#[test]
fn ladder_a_hostile_step_finds_nothing_of_the_builder_and_stays_inside() {
    needs_container!();
    let upstream = base!(images::debian());
    let place = Place::new();
    let canary = format!("canary-{}", std::process::id());
    place.docker_config(&format!("{{\"auths\":{{\"{canary}.example\":{{}}}}}}"));
    place.dir.file("home/.docker/config.json", &canary);
    let name = format!("sockless-socket-{}", std::process::id());
    let address = SocketAddr::from_abstract_name(&name).expect("a name");
    let listener = UnixListener::bind_addr(&address).expect("nobody has that name");
    // In the container the builder is PID 1's child; the shell says which.
    let dockerfile = format!(
        "FROM ubuntu\n\
         ARG SOCKET BUILDER\n\
         COPY hostile.pl /\n\
         RUN env > /environment; SUPERVISOR=$PPID perl < /hostile.pl > /report; kill -9 -1; true\n\
         RUN find / -xdev -name config.json > /configs; grep -rls {} / > /canaries; true\n",
        // In two pieces, so that the command line itself is not found.
        format_args!("'[c]{}'", &canary[1..]),
    );
    let files = [("Dockerfile", dockerfile.as_str()), ("hostile.pl", HOSTILE)];
    let context = place.context("context", &files);
    let words = container::words(&CAPABILITIES);
    let script = "exec \"$0\" build --build-arg BUILDER=$$ \"$@\"";
    let mut words: Vec<&str> = words.iter().map(String::as_str).collect();
    words.extend(["sh", "-euc", script]);
    let ran = run(place
        .wrapped(&words)
        .env("CANARY", &canary)
        .args(["--progress", "plain", "--registry-mirror"])
        .arg(format!("docker.io={}", upstream.url()))
        .args(["--build-arg", &format!("SOCKET={name}")])
        .arg("-o")
        .arg(format!("type=oci,dest={}", archive(&place).display()))
        .arg(&context));
    ran.success();
    drop(listener);
    let image = place.archive(&archive(&place));
    let refused = "Operation not permitted";
    let expected = [
        ("open files", ""),
        ("kill the supervisor", refused),
        ("kill the builder", refused),
        ("trace the supervisor", refused),
        ("trace the builder", refused),
        ("open the builder's pidfd", refused),
        ("chroot in the chroot", refused),
        ("a user namespace", refused),
        ("a disk", "Permission denied"),
        ("the memory", "Permission denied"),
        ("mount proc", refused),
        ("the abstract socket", refused),
        ("environments", ""),
        ("above the root", "the root"),
    ];
    let expected: Vec<String> = expected
        .iter()
        .map(|(what, came)| format!("{what}: {came}"))
        .collect();
    let report = image.text("report");
    assert_eq!(report.lines().collect::<Vec<_>>(), expected, "{report}");
    assert_eq!(image.text("configs"), "");
    // Not in the environment, which is a file there, nor in any other.
    assert!(image.text("environment").contains("SOCKET="));
    assert_eq!(image.text("canaries"), "");
}

#[test]
fn ladder_a_working_directory_through_a_descriptor_leads_nowhere() {
    needs_container!();
    let upstream = base!(images::busybox());
    let place = Place::new();
    for number in [3, 5, 7, 9] {
        let dockerfile = format!(
            "FROM busybox\nWORKDIR /proc/self/fd/{number}\nRUN cat ../../../../../../../etc/shadow\n"
        );
        let context = place.context("context", &[("Dockerfile", dockerfile.as_str())]);
        let ran = build(&place, CONTAINER, &upstream, &context, &[]).failure();
        ran.says(&format!("entering /proc/self/fd/{number}"))
            .does_not_say(":99999:");
    }
}

/// The numbers of the processes of this machine with `mark` in their command line.
fn marked(mark: &str) -> Vec<String> {
    let entries = std::fs::read_dir("/proc").expect("proc");
    let names = entries
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned());
    let is_marked = |pid: &String| {
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&line).contains(mark)
    };
    names
        .filter(|name| name.bytes().all(|byte| byte.is_ascii_digit()))
        .filter(is_marked)
        .collect()
}

/// A step that leaves processes behind in every way that there is; `mark` is on their lines.
fn leaving(mark: &str, then: &str) -> String {
    format!(
        "FROM busybox\n\
         RUN --mount=type=secret,id=s,target=/secret \
         (setsid sleep {mark} &); (trap '' HUP TERM INT; sleep {mark}) & \
         (while :; do setsid sh -c 'sleep 0.{mark} & sleep {mark} & exit' ; sleep 0.01; done) & \
         sleep 0.2; ln /secret /linked; {then}\n"
    )
}

#[test]
fn ladder_no_process_outlives_its_step() {
    needs_container!();
    let upstream = base!(images::busybox());
    let place = Place::new();
    let mark = format!("98{}", std::process::id());
    for (then, status) in [("true", 0), ("exit 3", 1)] {
        let dockerfile = leaving(&mark, then);
        let files = [("Dockerfile", dockerfile.as_str()), ("secret", "hunter2")];
        let context = place.context("context", &files);
        let secret = format!("id=s,src={}", context.join("secret").display());
        // The first process of the container is not sockless, so its end ends nothing else.
        let words = container::words(&CAPABILITIES);
        let script = format!(
            "\"$0\" \"$@\" && code=0 || code=$?; ps -o args | grep -c '[s]leep.*{mark}' >&2 || true; exit $code"
        );
        let mut words: Vec<&str> = words.iter().map(String::as_str).collect();
        words.extend(["sh", "-uc", &script]);
        let ran = run(place
            .wrapped(&words)
            .args([
                "build",
                "--progress",
                "plain",
                "--no-cache",
                "--registry-mirror",
            ])
            .arg(format!("docker.io={}", upstream.url()))
            .args(["--secret", &secret])
            .arg(&context));
        assert_eq!(ran.status.code(), Some(status), "{ran:?}");
        assert_eq!(ran.stderr.lines().last(), Some("0"), "{ran:?}");
        assert_eq!(marked(&mark), [] as [&str; 0]);
        assert!(!holds(&place.dir.join("store"), "hunter2"));
    }
}

/// Whether any file below a directory has the text.
fn holds(dir: &Path, text: &str) -> bool {
    let ran = run(Command::new("grep").args(["-rlF", text]).arg(dir));
    assert!(ran.status.code().is_some_and(|code| code < 2), "{ran:?}");
    ran.status.success()
}

#[test]
fn ladder_a_killed_build_leaves_no_process_and_no_secret() {
    needs_container!();
    needs!(programs(&["grep"]));
    let upstream = base!(images::busybox());
    let place = Place::new();
    let mark = format!("97{}", std::process::id());
    let dockerfile = leaving(&mark, &format!("touch /ready; sleep {mark}"));
    let files = [("Dockerfile", dockerfile.as_str()), ("secret", "hunter2")];
    let context = place.context("context", &files);
    let secret = format!("id=s,src={}", context.join("secret").display());
    // Kills sockless, and nothing else, when the step is under way; then waits for the others.
    let script = format!(
        "\"$0\" \"$@\" & builder=$!\n\
         for i in $(seq 600); do find \"$SOCKLESS_ROOT/tmp\" -name ready | grep -q . && break; sleep 0.1; done\n\
         grep -rlqF hunter2 \"$SOCKLESS_ROOT/tmp\" && echo the secret is there >&2\n\
         kill -9 $builder; wait $builder; echo killed $? >&2\n\
         for i in $(seq 300); do ps -o args | grep -q '[s]leep.*{mark}\\|[_]_chroot' || break; sleep 0.1; done\n\
         ps -o args | grep '[s]leep.*{mark}\\|[_]_chroot' >&2 || echo nobody is left >&2\n"
    );
    let words = container::words(&CAPABILITIES);
    let mut words: Vec<&str> = words.iter().map(String::as_str).collect();
    words.extend(["sh", "-uc", &script]);
    run(place
        .wrapped(&words)
        .args(["build", "--progress", "plain", "--registry-mirror"])
        .arg(format!("docker.io={}", upstream.url()))
        .args(["--secret", &secret])
        .arg(&context))
    .says("the secret is there")
    .says("killed 137")
    .says("nobody is left");
    let store = place.dir.join("store");
    assert!(!holds(&store, "hunter2"), "the secret is in the store");
    let left = || std::fs::read_dir(store.join("tmp")).map_or(0, Iterator::count);
    assert!(left() > 0, "the kill came too late");
    run(CONTAINER.command(&place).args(["prune", "--all"])).success();
    assert_eq!(left(), 0, "prune removes what is unfinished");
    // And the next build succeeds.
    let context = place.context("next", &[("Dockerfile", "FROM busybox\nRUN true\n")]);
    build(&place, CONTAINER, &upstream, &context, &[]).success();
}

#[test]
fn ladder_devices_of_the_image_are_kept_and_not_shown() {
    needs_container!();
    let upstream = base!(images::busybox());
    let place = Place::new();
    // Made where devices can be, by a step that has them.
    let context = place.context(
        "context",
        &[(
            "Dockerfile",
            "FROM busybox\n\
             ADD devices.tar /\n\
             RUN if [ -e /disk ]; then echo shown; fi > /seen; touch /other\n",
        )],
    );
    let made = place.dir.dir("devices");
    let disk = made.join("disk");
    let node = Command::new("mknod")
        .arg(&disk)
        .args(["b", "7", "0"])
        .status();
    assert!(node.expect("mknod").success());
    std::fs::set_permissions(&disk, std::fs::Permissions::from_mode(0o666)).expect("ours");
    let packed = Command::new("tar")
        .arg("-cf")
        .arg(context.join("devices.tar"))
        .args(["-C", made.to_str().expect("text"), "disk"])
        .status();
    assert!(packed.expect("tar").success());
    let image = built(&place, CONTAINER, &upstream, &context, &[]);
    assert_eq!(image.text("seen"), "");
    assert_eq!(image.summary("disk"), "666 0:0 4");
    assert_eq!(
        image.layers.last().map(|layer| layer.entries.len()),
        Some(2)
    );
}
