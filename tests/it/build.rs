//! `sockless build` on a base of one busybox: what each instruction does to files and config.

use serde_json::json;

use crate::support::dir::TestDir;
use crate::support::registry::Registry;
use crate::support::sockless::Place;
use crate::support::{find_program, images, namespaces, programs};

/// The registry of base images, or the end of the test.
macro_rules! upstream {
    () => {
        match images::busybox() {
            Ok(registry) => registry,
            Err(reason) => skip!("{reason}"),
        }
    };
}

#[test]
fn compose_instructions_without_steps_change_only_the_config() {
    let upstream = upstream!();
    let place = Place::new();
    let context = place.context(
        "context",
        &[(
            "Dockerfile",
            "FROM busybox\n\
             LABEL org.example.a=1 \"org.example.b\"='two words'\n\
             ENV GREETING=hello WHO=\"${GREETING} world\"\n\
             ENV AFTER=$GREETING\n\
             EXPOSE 80 53/udp\n\
             VOLUME /data\n\
             USER app:1001\n\
             STOPSIGNAL SIGQUIT\n\
             HEALTHCHECK --interval=5s CMD true\n\
             ENTRYPOINT [\"/bin/echo\", \"$GREETING\"]\n\
             CMD exit 3\n",
        )],
    );
    let image = place.built(&upstream, &context, &[]);
    assert_eq!(
        *image.run_config(),
        json!({
            "User": "app:1001",
            "ExposedPorts": { "53/udp": {}, "80/tcp": {} },
            "Env": [
                "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
                "GREETING=hello",
                // `$GREETING` has its value from before the line, which is none.
                "WHO= world",
                "AFTER=hello",
            ],
            "Entrypoint": ["/bin/echo", "$GREETING"],
            "Cmd": ["/bin/sh", "-c", "exit 3"],
            // Deprecated and of no meaning on Linux, but BuildKit writes it with every CMD.
            "ArgsEscaped": true,
            "Volumes": { "/data": {} },
            "Labels": { "org.example.a": "1", "org.example.b": "two words" },
            "StopSignal": "SIGQUIT",
            "Healthcheck": { "Test": ["CMD-SHELL", "true"], "Interval": 5_000_000_000_u64 },
        }),
    );
    assert_eq!(image.layers.len(), 1, "the base's layer and no other");
    let history = image.config["history"].as_array().expect("validated");
    assert_eq!(history.len(), 11);
}

#[test]
fn compose_copy_and_add_write_what_the_context_has() {
    let upstream = upstream!();
    let place = Place::new();
    let context = place.context(
        "context",
        &[
            (
                "Dockerfile",
                "FROM busybox\n\
                 WORKDIR /srv/app\n\
                 COPY a.txt dir ./\n\
                 COPY --chown=app:app --chmod=640 a.txt /owned/by/app\n\
                 COPY --chown=7:9 *.md docs/\n\
                 ADD packed.tar /unpacked/\n\
                 COPY <<\"END\" /here\n\
                 $not expanded\n\
                 END\n",
            ),
            (".dockerignore", "**/ignored\n*.md\n!kept.md\n"),
            ("a.txt", "a\n"),
            ("dir/b.txt", "b\n"),
            ("dir/sub/c.txt", "c\n"),
            ("dir/sub/ignored", "no\n"),
            ("left.md", "no\n"),
            ("kept.md", "yes\n"),
        ],
    );
    std::fs::write(
        context.join("packed.tar"),
        images::small_tar(&[("in/x", "x\n")]),
    )
    .expect("ours");
    std::os::unix::fs::symlink("a.txt", context.join("dir/link")).expect("ours");
    let image = place.built(&upstream, &context, &[]);
    let got: Vec<_> = [
        "srv/app",
        "srv/app/a.txt",
        "srv/app/b.txt",
        "srv/app/sub/c.txt",
        "srv/app/link",
        "srv/app/dir",
        "srv/app/sub/ignored",
        "owned/by",
        "owned/by/app",
        "srv/app/docs/kept.md",
        "srv/app/docs/left.md",
        "unpacked/in/x",
        "unpacked/packed.tar",
        "here",
    ]
    .map(|path| format!("{path} {}", image.summary(path)))
    .into();
    assert_eq!(
        got,
        [
            "srv/app 755 0:0 5",
            "srv/app/a.txt 644 0:0 0",
            "srv/app/b.txt 644 0:0 0",
            "srv/app/sub/c.txt 644 0:0 0",
            "srv/app/link 777 0:0 2",
            "srv/app/dir absent",
            "srv/app/sub/ignored absent",
            // Directories that COPY makes on the way have the owner and mode that it was given.
            "owned/by 640 1000:1001 5",
            "owned/by/app 640 1000:1001 0",
            "srv/app/docs/kept.md 644 7:9 0",
            "srv/app/docs/left.md absent",
            "unpacked/in/x 644 0:0 0",
            "unpacked/packed.tar absent",
            "here 644 0:0 0",
        ]
    );
    assert_eq!(image.entry("srv/app/link").expect("above").link, "a.txt");
    assert_eq!(image.text("here"), "$not expanded\n");
    assert_eq!(image.text("unpacked/in/x"), "x\n");
    assert_eq!(image.run_config()["WorkingDir"], "/srv/app");
}

#[test]
fn compose_a_linked_layer_needs_nothing_of_its_base() {
    let upstream = upstream!();
    let place = Place::new();
    let linked = |from: &str| {
        let dockerfile = format!("FROM {from}\nCOPY --link a.txt /etc/linked/\n");
        let files = [("Dockerfile", dockerfile.as_str()), ("a.txt", "a\n")];
        let context = place.context("context", &files);
        let output = format!("type=oci,dest={}", place.dir.join("image.tar").display());
        let ran = place.build(&upstream, &context, &["-o", &output]);
        (ran.success(), place.archive(&place.dir.join("image.tar")))
    };
    let (_, image) = linked("busybox");
    assert_eq!(image.summary("etc/linked/a.txt"), "644 0:0 0");
    // Nothing was unpacked.
    let trees = std::fs::read_dir(place.dir.join("store/trees"));
    assert_eq!(trees.map_or(0, Iterator::count), 0);
    // On another base it is the same layer, not made again.
    let (ran, other) = linked("scratch");
    ran.says("CACHED");
    assert_eq!((image.layers.len(), other.layers.len()), (2, 1));
    assert_eq!(image.layers[1].digest, other.layers[0].digest);
    assert_eq!(other.summary("etc"), "755 0:0 5");
}

/// Everything that RUN sees and leaves behind, so that every sandbox is held to the same.
const STEPS: &str = "\
FROM busybox AS build\n\
ARG WORD=default\n\
ENV FIXED=1\n\
RUN echo \"$WORD $FIXED $(id -u):$(id -g) $(pwd) $HOME\" > /made && chmod 600 /made && chown 1000:42 /made\n\
RUN rm /etc/base && mkdir -m 2750 /var/new && cp -p /made /var/new/file && ln /var/new/file /var/new/hard && ln -s ../made /var/new/soft\n\
USER app\n\
WORKDIR /home/app\n\
RUN id > ids && test \"$PPID\" -lt 10 && ! touch /etc/forbidden 2>/dev/null\n\
RUN <<END\n\
echo from a here-document > doc\n\
END\n\
SHELL [\"/bin/sh\", \"-eu\", \"-c\"]\n\
RUN echo \"$0 $-\" > shell\n\
\n\
FROM busybox\n\
COPY --from=build /home/app /made /out/\n\
COPY --from=build --chown=5:6 /var/new /out/new\n";

fn steps(sandbox: &str) {
    let upstream = upstream!();
    needs!(programs(&[sandbox]), namespaces());
    let place = Place::new();
    let context = place.context("context", &[("Dockerfile", STEPS)]);

    let stage = place.built(
        &upstream,
        &context,
        &[
            "--sandbox",
            sandbox,
            "--target",
            "build",
            "--build-arg",
            "WORD=given",
        ],
    );
    // The root user's home is what /etc/passwd says, and RUN gets it as HOME.
    assert_eq!(stage.text("made"), "given 1 0:0 / /root\n");
    assert_eq!(
        [
            "made",
            "etc/.wh.base",
            "var/new",
            "var/new/soft",
            "home/app/ids",
            "home/app",
            "etc/forbidden"
        ]
        .map(|path| stage.summary(path)),
        [
            "600 1000:42 0",
            "0 0:0 0",
            "2750 0:0 5",
            "777 0:0 2",
            "644 1000:1001 0",
            "750 1000:1001 5",
            "absent"
        ]
        // The base's /home/app stays as it is, of its user and closed to others.
        .map(str::to_owned),
    );
    // One file of two names stays one.
    let linked = stage
        .layers
        .iter()
        .find(|l| l.entries.iter().any(|e| e.path == "var/new/hard"))
        .expect("a layer");
    let pair: Vec<_> = (linked.entries.iter())
        .filter(|e| e.path == "var/new/file" || e.path == "var/new/hard")
        .map(|e| (e.path.as_str(), e.kind, e.link.as_str()))
        .collect();
    assert_eq!(
        pair,
        [
            ("var/new/file", '0', ""),
            ("var/new/hard", '1', "var/new/file")
        ]
    );
    assert_eq!(
        stage.text("home/app/ids"),
        "uid=1000(app) gid=1001(app) groups=1001(app),1002(extra)\n"
    );
    assert_eq!(stage.text("home/app/doc"), "from a here-document\n");
    assert_eq!(stage.text("home/app/shell"), "/bin/sh uce\n");

    let whole = place.built(&upstream, &context, &["--sandbox", sandbox]);
    assert_eq!(whole.text("out/made"), "default 1 0:0 / /root\n");
    assert_eq!(
        [
            "out/made",
            "out/ids",
            "out/new",
            "out/new/hard",
            "out/new/soft"
        ]
        .map(|path| whole.summary(path)),
        // Between stages owners are kept; a directory that COPY makes is an ordinary one.
        [
            "600 1000:42 0",
            "644 1000:1001 0",
            "755 5:6 5",
            "600 5:6 1",
            "777 5:6 2"
        ]
        .map(str::to_owned),
    );
}

#[test]
fn sandbox_bwrap_runs_steps() {
    steps("bwrap");
}

#[test]
fn sandbox_runc_runs_steps() {
    steps("runc");
}

/// crun refuses hosts with both kinds of cgroups mounted; there it must be said why.
#[test]
fn sandbox_crun_runs_steps_or_says_why_it_cannot() {
    if std::path::Path::new("/sys/fs/cgroup/cgroup.controllers").exists() {
        return steps("crun");
    }
    let upstream = upstream!();
    needs!(programs(&["crun"]), namespaces());
    let place = Place::new();
    let context = place.context(
        "context",
        &[("Dockerfile", "FROM busybox\nRUN echo made > /made\n")],
    );
    let archive = place.dir.join("image.tar");
    let output = format!("type=oci,dest={}", archive.display());
    let ran = place.build(&upstream, &context, &["--sandbox", "crun", "-o", &output]);
    if ran.status.success() {
        assert_eq!(place.archive(&archive).text("made"), "made\n");
    } else {
        ran.failure().says("crun").says("cgroup");
    }
}

#[test]
fn sandbox_the_same_build_gives_the_same_bytes_in_every_sandbox() {
    let upstream = upstream!();
    needs!(programs(&["bwrap", "runc"]), namespaces());
    let mut digests = Vec::new();
    for sandbox in ["bwrap", "runc"] {
        let place = Place::new();
        let context = place.context("context", &[("Dockerfile", STEPS)]);
        let archive = place.dir.join("image.tar");
        crate::support::process::run(
            place
                .command()
                .env("SOURCE_DATE_EPOCH", "1700000000")
                .args(["build", "--sandbox", sandbox, "-o"])
                .arg(format!("type=oci,dest={}", archive.display()))
                .args([
                    "--registry-mirror",
                    &format!("docker.io={}", upstream.url()),
                ])
                .arg(&context),
        )
        .success();
        digests.push(place.archive(&archive).digest);
    }
    assert_eq!(digests[0], digests[1]);
}

/// The packets on the loopback tell one network from another, which may have its number.
#[test]
fn sandbox_steps_have_a_network_in_turn_until_something_is_left_in_it() {
    let upstream = upstream!();
    needs!(namespaces());
    let place = Place::new();
    let context = place.context(
        "context",
        &[(
            "Dockerfile",
            "FROM busybox\n\
             RUN ping -c 1 127.0.0.1\n\
             RUN grep lo: /proc/net/dev > /second\n\
             # Whoever closes a connection first holds its port for a minute.\n\
             RUN nc -l -p 999 < /dev/null & \\\n\
                 until nc 127.0.0.1 999 < /dev/null; do usleep 10000; done; wait; \\\n\
                 grep lo: /proc/net/dev > /third; cat /proc/net/sockstat > /left\n\
             RUN grep lo: /proc/net/dev > /fourth; cat /proc/net/sockstat > /clean\n",
        )],
    );
    let archive = place.dir.join("image.tar");
    let output = format!("type=oci,dest={}", archive.display());
    let ran = place.build(&upstream, &context, &["-o", &output]).success();
    if ran.stderr.contains("RUN steps share the host's network") {
        skip!("no private network: {}", ran.stderr);
    }
    let image = place.archive(&archive);
    let packets = |path: &str| {
        let counters = image.text(path);
        let received = counters.split_whitespace().nth(2).map(str::parse::<u64>);
        received.expect("a counter").expect("a number")
    };
    let waiting = |path: &str| {
        let sockets = image.text(path);
        let tcp = sockets.lines().find(|line| line.starts_with("TCP:"));
        let mut words = tcp.expect("a line").split_whitespace();
        words.find(|word| *word == "tw");
        words.next().expect("a number").to_owned()
    };
    let second = packets("second");
    assert!(second >= 2, "the first step's are not there: {second}");
    assert!(packets("third") > second);
    assert_eq!(
        (waiting("left"), waiting("clean")),
        ("1".into(), "0".into())
    );
    assert_eq!(packets("fourth"), 0);
}

#[test]
fn sandbox_a_step_that_fails_ends_the_build_with_its_output_and_status() {
    let upstream = upstream!();
    needs!(namespaces());
    let place = Place::new();
    let context = place.context(
        "context",
        &[(
            "Dockerfile",
            "FROM busybox\nRUN echo about to fail; exit 7\nRUN echo never reached\n",
        )],
    );
    place
        .build(&upstream, &context, &["-t", "localhost:1/never:pushed"])
        .failure()
        .says("about to fail")
        .says("exit 7")
        .says("7")
        .does_not_say("never reached\n");
}

#[test]
fn security_s12_sandbox_a_step_sees_nothing_of_the_builder() {
    let upstream = upstream!();
    needs!(namespaces());
    let listener = std::net::TcpListener::bind(("127.0.0.1", 0)).expect("a free port");
    let port = listener.local_addr().expect("bound").port();
    let (visit, visits) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        // Accepts and closes at once, so that no visitor waits for more.
        while let Ok((_, visitor)) = listener.accept() {
            let _ = visit.send(visitor);
        }
    });
    // A network of the steps' own needs the device. Where it is closed, as it never is on hosts with
    // udev, the build says that steps share the host's, and that is what they do.
    let private = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/net/tun")
        .is_ok();
    for sandbox in ["bwrap", "runc"] {
        if find_program(sandbox).is_none() {
            skip!("{sandbox} is not installed");
        }
        let place = Place::new();
        place.docker_config("{\"auths\":{\"canary.example\":{\"auth\":\"Y2FuYXJ5OmNhbmFyeQ==\"}}}");
        let context = place.context(
            "context",
            &[(
                "Dockerfile",
                &format!(
                    "FROM busybox\n\
                     RUN {{ env; ls -a /; find / -name 'conf*.json' -not -path '/sys/*' 2>/dev/null; \
                     cat /proc/[0-9]*/environ /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' '\\n'; \
                     echo canary | nc -w 2 127.0.0.1 {port} && echo reached $((6 * 7)); \
                     ls /proc | grep -c '^[0-9]'; setsid sleep 8765 & true; }} > /seen 2>&1\n"
                ),
            )],
        );
        let archive = place.dir.join("image.tar");
        let ran = crate::support::process::run(
            place
                .command()
                .env("CANARY_VARIABLE", "seen")
                .args(["build", "--sandbox", sandbox, "-o"])
                .arg(format!("type=oci,dest={}", archive.display()))
                .args([
                    "--registry-mirror",
                    &format!("docker.io={}", upstream.url()),
                ])
                .arg(&context),
        )
        .success();
        let seen = place.archive(&archive).text("seen");
        for canary in [
            "CANARY_VARIABLE",
            "DOCKER_CONFIG",
            "config.json",
            "SOCKLESS",
            "docker.io",
        ] {
            assert!(
                !seen.contains(canary),
                "{sandbox}: a step sees {canary}:\n{seen}"
            );
        }
        assert!(seen.contains("PATH=/usr/local/sbin"), "{seen}");
        let reached =
            seen.contains("reached 42") || !visits.try_iter().collect::<Vec<_>>().is_empty();
        let said = ran
            .stderr
            .contains("share the host's network, its loopback included");
        assert_eq!(
            (reached, said),
            (!private, !private),
            "{sandbox}: whether a step reached the host's loopback, and whether that was said:\n{}\n{seen}",
            ran.stderr
        );
        // What a step leaves running ends with it.
        let ps = std::fs::read_dir("/proc")
            .expect("procfs")
            .flatten()
            .any(|process| {
                std::fs::read(process.path().join("cmdline"))
                    .is_ok_and(|c| c.ends_with(b"sleep\x008765\0"))
            });
        assert!(!ps, "{sandbox}: a process of the step is still there");
    }
}

/// Whoever starts the program may leave descriptors open in it. They must neither be in its way nor
/// reach a step.
#[test]
fn security_s10_sandbox_descriptors_of_whoever_started_the_build_do_no_harm() {
    let upstream = upstream!();
    needs!(programs(&["bwrap", "runc"]), namespaces());
    let canary = TestDir::new("canary");
    canary.file("secret", "canary\n");
    for sandbox in ["bwrap", "runc"] {
        let place = Place::new();
        let context = place.context(
            "context",
            &[(
                "Dockerfile",
                "FROM busybox\nRUN cat /proc/self/fd/3 /proc/self/fd/4 /proc/self/fd/11 > /seen 2>/dev/null; ls -l /proc/self/fd > /list\n",
            )],
        );
        let archive = place.dir.join("image.tar");
        crate::support::process::run(
            place
                .wrapped(&[
                    "sh",
                    "-c",
                    "exec 3<\"$0\" 4<\"$0\" 9<\"$0\"; exec \"$@\"",
                    &canary.join("secret").display().to_string(),
                ])
                .args(["build", "--sandbox", sandbox, "-o"])
                .arg(format!("type=oci,dest={}", archive.display()))
                .args([
                    "--registry-mirror",
                    &format!("docker.io={}", upstream.url()),
                ])
                .arg(&context),
        )
        .success();
        let image = place.archive(&archive);
        assert_eq!(image.text("seen"), "", "{sandbox}: {}", image.text("list"));
        // 0, 1, 2 and the one that ls has opened to list them.
        assert_eq!(
            image
                .text("list")
                .lines()
                .filter(|l| l.starts_with('l'))
                .count(),
            4,
            "{}",
            image.text("list")
        );
    }
}

/// `(Dockerfile, what the message says)`. None of them may cost a single request.
#[test]
fn compose_what_is_not_understood_stops_the_build_before_any_request() {
    let upstream = upstream!();
    let place = Place::new();
    let check = |dockerfile: &str, place_and_reason: &[&str]| {
        let context = place.context("context", &[("Dockerfile", dockerfile)]);
        let mut ran = place.build(&upstream, &context, &[]).failure();
        for text in place_and_reason {
            ran = ran.says(text);
        }
        assert_eq!(upstream.requests(), [], "{dockerfile}");
    };
    check(
        "FROM busybox\nRUNN true\n",
        &["Dockerfile:2:1: ", "RUNN", "RUNN true"],
    );
    check(
        "FROM busybox\nRUN --security=insecure true\n",
        &["Dockerfile:2:", "insecure"],
    );
    check(
        "FROM busybox\nCOPY --bogus=1 a b\n",
        &["Dockerfile:2:", "bogus"],
    );
    check(
        "FROM busybox\nCOPY --from=nowhere: a b\n",
        &["Dockerfile:2:", "nowhere:"],
    );
    check("RUN true\n", &["Dockerfile:1:1: ", "FROM"]);
    check("FROM\n", &["Dockerfile:1:", "FROM"]);
    check(
        "FROM busybox\nENV a b=c d\nRUN <<END\ntrue\n",
        &["Dockerfile:3:", "END"],
    );
    check("", &["Dockerfile"]);
}

#[test]
fn compose_a_missing_file_or_target_stops_the_build() {
    let upstream = upstream!();
    let place = Place::new();
    let context = place.context(
        "context",
        &[("Dockerfile", "FROM busybox AS only\nCOPY missing.txt /\n")],
    );
    place
        .build(&upstream, &context, &[])
        .failure()
        .says("missing.txt");
    place
        .build(&upstream, &context, &["--target", "nonesuch"])
        .failure()
        .says("nonesuch");
    place
        .build(&upstream, &context, &["-f", "Containerfile"])
        .failure()
        .says("Containerfile");
}

#[test]
fn compose_a_stage_that_nothing_needs_is_not_even_pulled() {
    let upstream = upstream!();
    let place = Place::new();
    let context = place.context(
        "context",
        &[(
            "Dockerfile",
            "FROM does-not-exist AS unused\nRUN false\nFROM busybox\nLABEL a=b\n",
        )],
    );
    let image = place.built(&upstream, &context, &[]);
    assert_eq!(image.run_config()["Labels"], json!({ "a": "b" }));
    let asked: Vec<_> = upstream
        .requests()
        .into_iter()
        .filter(|r| r.path.contains("does-not-exist"))
        .collect();
    assert_eq!(asked, []);
}

#[test]
fn sandbox_the_second_build_is_cached_whole_and_pushes_nothing() {
    let upstream = upstream!();
    needs!(namespaces());
    let registry = Registry::private();
    let place = Place::new();
    place.docker_config(&registry.docker_config(Registry::USER, Registry::PASSWORD));
    let context = place.context(
        "context",
        &[
            (
                "Dockerfile",
                "FROM busybox\nCOPY file /\nRUN cat file > /copy && date > /when\n",
            ),
            ("file", "content\n"),
        ],
    );
    let tag = format!("{}/team/app:1", registry.host);
    let ca = registry.ca().display().to_string();
    let args = ["-t", &tag, "--push", "--registry-ca", &ca];
    place.build(&upstream, &context, &args).success();
    let first = registry.inspect("team/app:1").success().stdout;
    let writes = registry.writes().len();
    assert_ne!(writes, 0);

    let again = place.build(&upstream, &context, &args).success();
    assert!(
        again.stderr.contains("CACHED") || again.stderr.contains("cached"),
        "{}",
        again.stderr
    );
    assert_eq!(registry.inspect("team/app:1").success().stdout, first);
    assert_eq!(
        registry.writes().split_off(writes),
        [],
        "the second build sent something"
    );

    // A changed file makes COPY and what follows anew; --no-cache makes everything anew.
    place.dir.file("context/file", "changed\n");
    place.build(&upstream, &context, &args).success();
    let changed = registry.inspect("team/app:1").success().stdout;
    assert_ne!(changed, first);
    place
        .build(&upstream, &context, &[&args[..], &["--no-cache"]].concat())
        .success()
        .does_not_say("CACHED");
}

#[test]
fn sandbox_output_and_events_follow_the_contract() {
    let upstream = upstream!();
    needs!(namespaces());
    let place = Place::new();
    let context = place.context(
        "context",
        &[("Dockerfile", "FROM busybox\nRUN echo a line\n")],
    );
    let (metadata, iid) = (place.dir.join("metadata.json"), place.dir.join("iid"));
    let archive = place.dir.join("image.tar");
    let ran = crate::support::process::run(
        place
            .command()
            .args(["build", "--progress", "rawjson", "--iidfile"])
            .arg(&iid)
            .arg("--metadata-file")
            .arg(&metadata)
            .arg("-o")
            .arg(format!("type=oci,dest={}", archive.display()))
            .args([
                "--registry-mirror",
                &format!("docker.io={}", upstream.url()),
            ])
            .arg(&context),
    )
    .success();
    let events: Vec<serde_json::Value> = ran
        .stderr
        .lines()
        .chain(ran.stdout.lines())
        .filter_map(|line| serde_json::from_str(line).ok())
        .collect();
    let named = |name: &str| {
        events
            .iter()
            .filter(|e| e["event"] == name)
            .collect::<Vec<_>>()
    };
    assert!(
        named("step_output")
            .iter()
            .any(|e| e["text"] == "a line\n" && e["stream"] == "stdout"),
        "{events:?}"
    );
    let last = events.last().expect("events");
    assert_eq!(
        (&last["event"], &last["success"]),
        (&json!("finished"), &json!(true))
    );
    assert_eq!(named("step_started").len(), named("step_done").len());

    let image = place.archive(&archive);
    let metadata: serde_json::Value =
        serde_json::from_slice(&std::fs::read(metadata).expect("written")).expect("JSON");
    assert_eq!(metadata["containerimage.digest"], json!(image.digest));
    assert_eq!(
        std::fs::read_to_string(iid).expect("written").trim(),
        image.manifest["config"]["digest"]
            .as_str()
            .expect("validated")
    );
    let quiet = crate::support::process::run(
        place
            .command()
            .args([
                "build",
                "--progress",
                "quiet",
                "--no-cache",
                "--registry-mirror",
            ])
            .arg(format!("docker.io={}", upstream.url()))
            .arg(&context),
    );
    quiet.success().does_not_say("a line");
}

#[test]
fn sandbox_what_went_well_is_kept_when_another_step_fails() {
    let upstream = upstream!();
    needs!(programs(&["bwrap"]), namespaces());
    let place = Place::new();
    // Sealing the first step takes longer than the second one runs.
    let context = place.context(
        "context",
        &[(
            "Dockerfile",
            "FROM busybox\n\
             RUN head -c 60000000 /dev/urandom > /large\n\
             RUN echo the last words && exit 7\n",
        )],
    );
    for expected in [false, true] {
        let ran = place.build(&upstream, &context, &["--sandbox", "bwrap"]);
        let ran = ran
            .failure()
            .says("the last words")
            .says("error: Dockerfile:3:1: process")
            .says("exit code: 7");
        assert_eq!(ran.stderr.contains("#2 CACHED"), expected, "{}", ran.stderr);
        let left = std::fs::read_dir(place.dir.join("store/tmp")).expect("ours");
        assert_eq!(left.count(), 0);
    }
}

#[test]
fn sandbox_another_epoch_makes_another_layer() {
    let upstream = upstream!();
    needs!(programs(&["bwrap"]), namespaces());
    let place = Place::new();
    let context = place.context(
        "context",
        &[("Dockerfile", "FROM busybox\nRUN echo x > /made\n")],
    );
    let build = |epoch: &str| {
        let epoch = format!("SOURCE_DATE_EPOCH={epoch}");
        place
            .build(&upstream, &context, &["--build-arg", &epoch])
            .success()
    };
    build("7").does_not_say("#2 CACHED");
    build("8").does_not_say("#2 CACHED");
    build("7").says("#2 CACHED");
}

#[test]
fn security_s17_sandbox_damaged_blobs_are_removed_and_the_next_build_is_right() {
    let upstream = upstream!();
    needs!(programs(&["bwrap"]), namespaces());
    let place = Place::new();
    let context = place.context(
        "context",
        &[("Dockerfile", "FROM busybox\nRUN echo x > /made\n")],
    );
    let registry = Registry::private();
    place.docker_config(&registry.docker_config(Registry::USER, Registry::PASSWORD));
    let tag = format!("{}/team/damaged:1", registry.host);
    let ca = registry.ca().display().to_string();
    let push = ["-t", &tag, "--push", "--registry-ca", &ca];
    place.build(&upstream, &context, &[]).success();
    let blobs = place.dir.join("store/blobs/sha256");
    let mut damaged = 0;
    for blob in std::fs::read_dir(&blobs).expect("ours") {
        let blob = blob.expect("ours").path();
        let mut bytes = std::fs::read(&blob).expect("ours");
        bytes[30] ^= 0xff;
        std::fs::write(&blob, bytes).expect("ours");
        damaged += 1;
    }
    assert_eq!(damaged, 1, "the base's blob was not wanted");
    place
        .build(&upstream, &context, &push)
        .failure()
        .says("was damaged and has been removed; run the build again");
    place.build(&upstream, &context, &push).success();
}
