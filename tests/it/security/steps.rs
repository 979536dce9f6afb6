//! S9, S10, S12, S22: what a step can find, reach and leave behind.

use std::net::TcpListener;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::canary::{Canary, SONG};
use super::upstream;
use crate::support::process::run;
use crate::support::rungs::on_every_rung;
use crate::support::sockless::Place;

/// A server on the loopback that counts who comes.
struct Visits {
    host: String,
    count: Arc<AtomicUsize>,
}

impl Visits {
    fn listen() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let host = listener.local_addr().expect("bound").to_string();
        let count = Arc::new(AtomicUsize::new(0));
        let counter = Arc::clone(&count);
        std::thread::spawn(move || {
            for _ in listener.incoming() {
                counter.fetch_add(1, Ordering::SeqCst);
            }
        });
        Self { host, count }
    }

    fn number(&self) -> usize {
        self.count.load(Ordering::SeqCst)
    }
}

/// CVE-2024-23653: what a Dockerfile names as its front end is a program of a stranger.
#[test]
fn security_s09_front_ends_are_not_even_asked_for() {
    let upstream = upstream!();
    let visits = Visits::listen();
    let host = &visits.host;
    for (image, builds) in [
        (format!("{host}/docker/dockerfile:1"), true),
        (format!("{host}/evil:latest"), false),
        (format!("{host}/evil@sha256:{}", "0".repeat(64)), false),
        (format!("{host}/tonistiigi/dockerfile:insecure"), true),
    ] {
        let place = Place::new();
        let insecure = ["--insecure-registry", host.as_str()];
        let build = |text: &str, args: &[&str]| {
            let context = place.context("context", &[("Dockerfile", text)]);
            place.build(&upstream, &context, &[&insecure[..], args].concat())
        };
        let plain = "FROM scratch\nCOPY Dockerfile /\n";
        for text in [
            format!("# syntax={image}\n{plain}"),
            format!("#syntax = {image}\n{plain}"),
            format!("#!/bin/x\n// syntax={image}\n{plain}"),
            format!("{{\"syntax\": \"{image}\"}}\n{plain}"),
        ] {
            let ran = build(&text, &[]);
            assert_eq!(visits.number(), 0, "{text}: {ran:?}");
        }
        let ran = build(&format!("# syntax={image}\n{plain}"), &[]);
        assert_eq!(ran.status.success(), builds, "{image}: {ran:?}");
        let argument = format!("BUILDKIT_SYNTAX={image}");
        let ran = build(plain, &["--build-arg", &argument]);
        assert_eq!(ran.status.success(), builds, "{image}: {ran:?}");
        for question in ["--check", "--call=outline", "--call=targets"] {
            build(&format!("# syntax={image}\n{plain}"), &[question]);
        }
        assert_eq!(visits.number(), 0, "{image}");
    }
    // The counter counts: an image that is needed is asked for.
    let place = Place::new();
    let context = place.context("context", &[("Dockerfile", &format!("FROM {host}/a\n"))]);
    let mut command = place.command();
    command.args(["build", "--insecure-registry", host.as_str()]);
    // Closed at once, it is tried again for a while, which is long enough to be seen.
    command.arg(&context);
    run(&mut command).failure();
    assert!(visits.number() > 0);
}

/// CVE-2024-21626: a directory of the host is open in the process that becomes the step.
#[test]
fn security_s10_no_working_directory_leads_out() {
    let canary = Canary::new();
    on_every_rung(|rung, upstream| {
        let place = Place::new();
        for number in 0..12 {
            for process in ["self", "thread-self", "1"] {
                // The parent of a directory of the host would be the way out.
                let cwd = format!("/proc/{process}/fd/{number}");
                let dockerfile = format!(
                    "FROM busybox\nWORKDIR {cwd}\n\
                     RUN pwd; ls -a . .. ../.. ../../..; cat ../../..{path}/secret; cat .{path}/secret; true\n",
                    path = canary.path().display()
                );
                if number != 7 && process != "self" {
                    continue;
                }
                let context = place.context("context", &[("Dockerfile", &dockerfile)]);
                rung.build(&place, upstream, &context, &[])
                    .does_not_say(SONG);
            }
        }
        canary.is_untouched(rung.name);
        // Whoever starts the build leaves a directory of the host open, at numbers that stages of
        // the sandbox use as well; links of the image lead there, too.
        let dockerfile = format!(
            "FROM busybox\n\
             RUN ln -s /proc/self/fd/9 /nine && ln -s /proc/self/cwd /here && ln -s /proc/1/root /root1\n\
             RUN for n in $(seq 3 200); do cat /proc/self/fd/$n/secret /proc/1/fd/$n/secret \
             /proc/self/fd/$n/../secret; done 2>/dev/null; cat /nine/secret /here/{path}/secret \
             /root1/{path}/secret; ls -l /proc/self/fd | grep -c '^l'\n",
            path = canary.below_root().display()
        );
        let context = place.context("context", &[("Dockerfile", &dockerfile)]);
        let inner = rung.command(&place, upstream);
        let mut command = Command::new("bash");
        command
            .args([
                "-c",
                "exec 3<\"$0\" 4<\"$0\" 5<\"$0\" 6<\"$0\" 7<\"$0\" 8<\"$0\" 9<\"$0\" 50<\"$0\" 90<\"$0\"; exec \"$@\"",
            ])
            .arg(canary.path())
            .arg(inner.get_program())
            .args(inner.get_args())
            .arg(&context)
            .env_clear()
            .current_dir(canary.path());
        for (name, value) in inner.get_envs() {
            command.env(name, value.unwrap_or_default());
        }
        let ran = run(&mut command).success().does_not_say(SONG);
        // 0, 1, 2 and what `ls` opens.
        assert!(
            ran.stderr.lines().any(|line| line.ends_with(" 4")),
            "{ran:?}"
        );
        canary.is_untouched(rung.name);
    });
}

/// What a step can list, dumped: it finds nothing of the builder's.
#[test]
fn security_s12_nothing_of_the_builder_is_in_sight() {
    let canary = Canary::new();
    // Abstract sockets belong to the network namespace.
    let name = format!("canary-{}", std::process::id());
    let address = SocketAddr::from_abstract_name(&name).expect("short");
    let listener = UnixListener::bind_addr(&address).expect("a name of our own");
    on_every_rung(|rung, upstream| {
        let place = Place::new();
        let auth = "Y2FuYXJ5LXVzZXI6Y2FuYXJ5LXBhc3M=";
        place.docker_config(&format!(
            "{{\"auths\":{{\"canary.example\":{{\"auth\":\"{auth}\"}}}}}}"
        ));
        for file in [
            ".docker/config.json",
            ".netrc",
            ".aws/credentials",
            ".ssh/id_rsa",
        ] {
            place.dir.file(&format!("home/{file}"), SONG);
        }
        let dockerfile = "FROM busybox\n\
             RUN { env; cat /proc/[0-9]*/environ /proc/[0-9]*/cmdline /proc/[0-9]*/mountinfo | tr '\\0' '\\n'; \
             find / -type f -size -8 -not -path '/proc/*' -not -path '/sys/*' -exec cat {} +; \
             for p in /proc/[0-9]*; do ls -l $p/fd $p/cwd $p/root $p/exe; cat $p/root/etc/hostname; done; \
             cat /proc/net/unix; ls -la / /root /run /var/run /tmp /dev/shm; \
             cat /proc/keys /proc/key-users /proc/cmdline; } > /seen 2>/dev/null; \
             find / -not -path '/sys/*' > /found 2>/dev/null; ls -d /proc/[0-9]* | wc -l > /processes; \
             kill -0 -1 2>/dev/null; for n in $(seq 2 400); do kill -0 $n 2>/dev/null && echo $n; done > /killable; \
             for n in 1 $(cat /killable); do cat /proc/$n/mem > /dev/null 2>&1; done; true\n";
        let context = place.context("context", &[("Dockerfile", dockerfile)]);
        let archive = place.dir.join("image.tar");
        let mut command = rung.command(&place, upstream);
        command
            .env("CANARY_VARIABLE", SONG)
            .env("AWS_SECRET_ACCESS_KEY", SONG)
            .env("http_proxy_password", SONG)
            .arg("-o")
            .arg(format!("type=oci,dest={}", archive.display()))
            .arg(&context);
        let ran = run(&mut command).success();
        let image = place.archive(&archive);
        let seen = image.text("seen");
        assert!(
            seen.contains("PATH=/usr/local/sbin") && seen.contains("/proc"),
            "{seen}"
        );
        let private = !ran.stderr.contains("share the host's network");
        let store = place.dir.path().display().to_string();
        let mut canaries = vec![
            SONG,
            auth,
            "canary-pass",
            "CANARY_VARIABLE",
            "DOCKER_CONFIG",
            "SOCKLESS_ROOT",
            store.as_str(),
        ];
        if private {
            canaries.push(&name);
        }
        // Where the files lie on this machine is in the mount table of overlays alone.
        let seen: Vec<_> = seen
            .lines()
            .filter(|line| !line.contains(" - overlay ") && !line.contains("/sockless-test-place-"))
            .collect();
        let seen = seen.join("\n");
        for canary in canaries {
            assert!(!seen.contains(canary), "{}: {canary}:\n{seen}", rung.name);
        }
        let found = image.text("found");
        for name in [
            "/config.json",
            "/.netrc",
            "/credentials",
            "/id_rsa",
            "/secret",
        ] {
            assert!(
                !found.lines().any(|path| path.ends_with(name)),
                "{} {name}",
                rung.name
            );
        }
        // The shell, `ls` and `wc`: nobody else's.
        let processes = image.text("processes").trim().parse::<u32>();
        assert!(processes.is_ok_and(|count| count <= 4), "{}", rung.name);
        assert_eq!(image.text("killable"), "", "{}", rung.name);
        canary.is_untouched(rung.name);
    });
    drop(listener);
}

/// The address at which clouds hand out credentials, and the loopback of the builder.
#[test]
fn security_s12_no_server_of_the_builder_is_in_reach() {
    let visits = Visits::listen();
    let (_, port) = visits.host.split_once(':').expect("a port");
    on_every_rung(|rung, upstream| {
        let place = Place::new();
        let dockerfile = format!(
            "FROM busybox\n\
             RUN for at in 127.0.0.1 ::1 0.0.0.0 localhost; do nc -w 1 $at {port} < /dev/null; done; \
             wget -q -T 2 -O - http://169.254.169.254/latest/meta-data/ && echo reached $((6*7)); true\n\
             RUN --network=none nc -w 1 127.0.0.1 {port} < /dev/null; true\n"
        );
        let context = place.context("context", &[("Dockerfile", &dockerfile)]);
        let before = visits.number();
        let ran = rung.build(&place, upstream, &context, &[]).success();
        let said = ran
            .stderr
            .contains("share the host's network, its loopback included");
        assert_eq!(visits.number() > before, said, "{}: {ran:?}", rung.name);
        if !said {
            ran.does_not_say("reached 42");
        }
    });
}

/// How many processes have this argument.
fn processes_with(argument: &str) -> usize {
    let processes = std::fs::read_dir("/proc").expect("procfs").flatten();
    let has = |line: Vec<u8>| {
        line.split(|byte| *byte == 0)
            .any(|word| word == argument.as_bytes())
    };
    processes
        .filter(|process| std::fs::read(process.path().join("cmdline")).is_ok_and(has))
        .count()
}

#[test]
fn security_s22_no_process_outlives_its_step() {
    on_every_rung(|rung, upstream| {
        let place = Place::new();
        for (number, (escape, ends)) in [
            ("(setsid sleep N &)", 0),
            (
                "(setsid setsid sh -c 'trap \"\" TERM HUP INT; sleep N' &) ; exit 3",
                3,
            ),
            ("(nohup sleep N >/dev/null 2>&1 </dev/null &) ; false", 1),
            (
                "(setsid sh -c 'while true; do sleep N & sleep N; done' &)",
                0,
            ),
        ]
        .iter()
        .enumerate()
        {
            let marker = format!("9{:07}{number}", std::process::id());
            let dockerfile = format!("FROM busybox\nRUN {}\n", escape.replace('N', &marker));
            let context = place.context("context", &[("Dockerfile", &dockerfile)]);
            // The next step, in a namespace of its own, waits for what must not be there.
            let ran = rung.build(&place, upstream, &context, &["--no-cache"]);
            assert_eq!(processes_with(&marker), 0, "{}: {escape}", rung.name);
            match ends {
                0 => drop(ran.success()),
                status => drop(ran.failure().says(&format!("exit code: {status}"))),
            }
        }
    });
}
