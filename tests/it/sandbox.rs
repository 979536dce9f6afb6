//! Steps in real sandboxes: each case runs through bwrap, runc and crun, and, when the
//! tests run as root, also as users with and without subordinate IDs.
//!
//! `sockless __sandbox` enters the namespaces, which the tests' own process cannot, having
//! threads.

use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

const SANDBOXES: [&str; 3] = ["bwrap", "runc", "crun"];
/// What `__sandbox` exits with where the step did not run.
const NO_OUTCOME: i32 = 200;
/// Docker's default set, and without `CAP_MKNOD`.
const CAPABILITIES: &str = "00000000a80425fb";
const CAPABILITIES_WITHOUT_MKNOD: &str = "00000000a00425fb";

/// Who runs sockless.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Who {
    /// The user of the tests.
    Own,
    /// A user with subordinate IDs.
    Mapped { uid: u32 },
    /// A user that has none, nor a name.
    Single,
}

/// A user number that nobody has.
const NOBODYS_UID: u32 = 54_321;

impl Who {
    fn all() -> Vec<Self> {
        let mut all = vec![Self::Own];
        if rustix::process::geteuid().is_root() {
            match mapped_users().first().copied() {
                Some(uid) => all.push(Self::Mapped { uid }),
                None => skip("no user has lines in /etc/subuid and /etc/subgid"),
            }
            all.push(Self::Single);
        }
        all
    }

    fn uid(self) -> Option<u32> {
        match self {
            Self::Own => None,
            Self::Mapped { uid } => Some(uid),
            Self::Single => Some(NOBODYS_UID),
        }
    }

    /// Whether user 1000 exists inside.
    fn has_many_ids(self) -> bool {
        match self {
            Self::Own => {
                let own = rustix::process::geteuid();
                own.is_root() || mapped_users().contains(&own.as_raw())
            }
            Self::Mapped { .. } => true,
            Self::Single => false,
        }
    }

    fn is_real_root(self) -> bool {
        let map = std::fs::read_to_string("/proc/self/uid_map").unwrap();
        self == Self::Own
            && rustix::process::geteuid().is_root()
            && map.split_whitespace().eq(["0", "0", "4294967295"])
    }
}

pub(crate) fn mapped_users() -> Vec<u32> {
    let read = |path| std::fs::read_to_string(path).unwrap_or_default();
    let (uids, gids) = (read("/etc/subuid"), read("/etc/subgid"));
    let has_line = |text: &str, name: &str| {
        text.lines()
            .any(|line| line.split(':').next() == Some(name))
    };
    let passwd = read("/etc/passwd");
    let users = passwd.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let (name, uid) = (fields.next()?, fields.nth(1)?.parse().ok()?);
        (uid != 0 && has_line(&uids, name) && has_line(&gids, name)).then_some(uid)
    });
    users.collect()
}

fn skip(reason: &str) {
    assert!(
        std::env::var_os("SOCKLESS_TEST_REQUIRE_ALL").is_none_or(|value| value != "1"),
        "required, but: {reason}"
    );
    eprintln!("skipped: {reason}");
}

/// A root filesystem of busybox and a copy of sockless that everybody can reach.
struct Fixture {
    dir: tempfile::TempDir,
    who: Who,
}

impl Fixture {
    fn new(who: Who) -> Option<Self> {
        if !Path::new("/bin/busybox").is_file() {
            skip("/bin/busybox is not there");
            return None;
        }
        let dir = tempfile::Builder::new()
            .prefix("sockless-sandbox-")
            .tempdir_in("/tmp")
            .unwrap();
        let set_mode = |path: &Path, mode| {
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
        };
        set_mode(dir.path(), 0o755);
        let program = dir.path().join("sockless");
        std::fs::copy(env!("CARGO_BIN_EXE_sockless"), &program).unwrap();
        set_mode(&program, 0o755);
        let root = dir.path().join("root");
        for name in ["bin", "proc", "dev", "sys", "etc", "tmp", "mnt", "work"] {
            std::fs::create_dir_all(root.join(name)).unwrap();
        }
        set_mode(&root.join("tmp"), 0o1777);
        std::fs::copy("/bin/busybox", root.join("bin/busybox")).unwrap();
        for applet in [
            "cat", "df", "echo", "env", "grep", "head", "hostname", "id", "ip", "kill", "ln",
            "logger", "ls", "mkdir", "mknod", "nc", "pwd", "readlink", "seq", "setsid", "sh",
            "sleep", "stat", "touch", "tr", "true", "wc",
        ] {
            std::os::unix::fs::symlink("busybox", root.join("bin").join(applet)).unwrap();
        }
        for name in ["etc/resolv.conf", "etc/hosts"] {
            std::fs::write(root.join(name), "of the image\n").unwrap();
        }
        let fixture = Self { dir, who };
        fixture.give(fixture.dir.path());
        Some(fixture)
    }

    fn root(&self) -> PathBuf {
        self.dir.path().join("root")
    }

    /// Gives a directory and what is in it to the user under test.
    fn give(&self, path: &Path) {
        let Some(uid) = self.who.uid() else { return };
        std::os::unix::fs::lchown(path, Some(uid), Some(uid)).unwrap();
        if path.is_dir() && !path.is_symlink() {
            for entry in std::fs::read_dir(path).unwrap() {
                self.give(&entry.unwrap().path());
            }
        }
    }

    fn spawn(&self, request: &Value) -> Child {
        let program = self.dir.path().join("sockless");
        let mut command = match self.who.uid() {
            None => Command::new(program),
            Some(uid) => {
                let mut command = Command::new("setpriv");
                command
                    .args([format!("--reuid={uid}"), format!("--regid={uid}")])
                    .arg("--clear-groups")
                    .arg(program);
                command
            }
        };
        let mut child = command
            .arg("__sandbox")
            .env("CANARY", "secret-of-the-builder")
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdin = child.stdin.take().unwrap();
        stdin.write_all(request.to_string().as_bytes()).unwrap();
        child
    }

    fn run(&self, sandbox: &str, step: Step) -> Ran {
        let mut request = json!({
            "sandbox": sandbox,
            // Debian's may be one.
            "allow_old_runc": true,
            "rootfs": self.root(),
            "args": ["sh", "-c", step.script],
            "env": ["PATH=/bin"],
        });
        let (Value::Object(all), Value::Object(more)) = (&mut request, step.more) else {
            panic!("objects");
        };
        all.extend(more);
        let output = self.spawn(&request).wait_with_output().unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        let (own, step): (Vec<&str>, Vec<&str>) = stderr
            .lines()
            .partition(|line| line.starts_with("sandbox: "));
        Ran {
            status: output.status.code().unwrap(),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: step.join("\n"),
            own: own.join("\n"),
        }
    }
}

struct Step<'s> {
    script: &'s str,
    more: Value,
}

#[derive(Debug)]
struct Ran {
    status: i32,
    stdout: String,
    stderr: String,
    /// What sockless itself said.
    own: String,
}

fn sh(script: &str) -> Step<'_> {
    with(script, json!({}))
}

fn with(script: &str, more: Value) -> Step<'_> {
    Step { script, more }
}

/// Calls `case` for every kind of user and every sandbox that works.
fn everywhere(case: impl Fn(&Fixture, &str)) {
    for who in Who::all() {
        let Some(fixture) = Fixture::new(who) else {
            return;
        };
        for sandbox in SANDBOXES {
            let ran = fixture.run(sandbox, sh("exit 0"));
            if ran.status == NO_OUTCOME {
                skip(&format!("{sandbox} as {who:?}: {}", ran.own));
                continue;
            }
            assert_eq!(ran.status, 0, "{sandbox} as {who:?}: {ran:?}");
            case(&fixture, sandbox);
        }
    }
}

/// A number that no other process has on its command line.
fn marker() -> String {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    format!("9{:07}{count:03}", std::process::id())
}

/// How many processes have `marker` as an argument.
fn processes_with(marker: &str) -> usize {
    std::fs::read_dir("/proc")
        .unwrap()
        .filter_map(|entry| std::fs::read(entry.unwrap().path().join("cmdline")).ok())
        .filter(|line| {
            line.split(|&byte| byte == 0)
                .any(|arg| arg == marker.as_bytes())
        })
        .count()
}

#[test]
fn sandbox_statuses_are_the_steps_own() {
    everywhere(|fixture, sandbox| {
        let check = |script: &str, status: i32, stderr: &str| {
            let ran = fixture.run(sandbox, sh(script));
            let got = (ran.status, ran.stderr.as_str());
            assert_eq!(
                got,
                (status, stderr),
                "{sandbox} {:?} {script}",
                fixture.who
            );
        };
        check("exit 7", 7, "");
        check("echo no >&2; exit 1", 1, "no");
        check("exit 255", 255, "");
        check("sh -c 'kill -9 $$'; exit $?", 137, "Killed");
        let check = |args: Value, status: i32, stderr: &str| {
            let ran = fixture.run(sandbox, with("", json!({"args": args})));
            let got = (ran.status, ran.stderr.as_str());
            assert_eq!(got, (status, stderr), "{sandbox} {:?} {args}", fixture.who);
        };
        check(
            json!(["absent"]),
            127,
            "sockless: exec: \"absent\": executable file not found in $PATH",
        );
        check(
            json!(["/etc/hosts"]),
            126,
            "sockless: exec: \"/etc/hosts\": permission denied",
        );
        check(json!(["true", "ignored"]), 0, "");
        // By signal, PID 1 itself: it has no handler for what it sends itself but SIGSEGV
        // by the kernel, which nothing here causes; the runtime's own death is no status.
    });
}

#[test]
fn sandbox_view_of_root_is_the_same_everywhere() {
    everywhere(|fixture, sandbox| {
        let capabilities = match fixture.who.is_real_root() && sandbox == "crun" {
            true => CAPABILITIES_WITHOUT_MKNOD,
            false => CAPABILITIES,
        };
        let script = "echo pid $$; id -u; id -g; env; umask; pwd; hostname; ls /proc/self/fd; \
                      readlink /proc/self/fd/0; grep -E '^(Cap|Sig(Blk|Ign))' /proc/self/status; \
                      cat /etc/hosts; stat -c %t:%T /dev/null; ls /dev; df -P /dev/shm | grep -c 65536; \
                      cat /proc/self/cgroup | grep -v ':/$'";
        let more = json!({
            "env": ["PATH=/bin", "B=2 x", "A=1", "EMPTY="],
            "cwd": "/work",
            "extra_hosts": [["db", "10.0.0.7"]],
        });
        let ran = fixture.run(sandbox, with(script, more));
        let mut expected = String::new();
        // `SHLVL` and `PWD` are the shell's; it lists what it was given last first.
        let _ = write!(
            expected,
            "pid 1\n0\n0\n\
             EMPTY=\nSHLVL=1\nA=1\nPATH=/bin\nPWD=/work\nB=2 x\n\
             0022\n/work\nsockless\n0\n1\n2\n3\n/dev/null\n\
             SigBlk:\t0000000000000000\nSigIgn:\t0000000000000000\n\
             CapInh:\t0000000000000000\nCapPrm:\t{capabilities}\nCapEff:\t{capabilities}\n\
             CapBnd:\t{capabilities}\nCapAmb:\t0000000000000000\n\
             127.0.0.1\tlocalhost sockless\n::1\tlocalhost ip6-localhost ip6-loopback\n10.0.0.7\tdb\n\
             1:3\nfd\nfull\nmqueue\nnull\nptmx\npts\nrandom\nshm\nstderr\nstdin\nstdout\ntty\n\
             urandom\nzero\n1\n"
        );
        let sorted = |text: &str| {
            let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
            lines.sort();
            lines
        };
        assert_eq!(
            sorted(&ran.stdout),
            sorted(&expected),
            "{sandbox} {:?}",
            fixture.who
        );
        assert_eq!(ran.stderr, "", "{sandbox} {:?}", fixture.who);
    });
}

#[test]
fn security_s19_sandbox_other_users_have_their_groups_and_no_capabilities() {
    everywhere(|fixture, sandbox| {
        let more = json!({"user": {"uid": 1000, "gid": 1001, "groups": [1001, 2000]}});
        let script = "echo pid $$; id -u; id -g; id -G; grep -E '^Cap(Prm|Eff|Inh|Amb)' \
                      /proc/self/status; echo to stdout > /dev/stdout; echo to stderr > /dev/stderr; \
                      touch /tmp/own; stat -c %u:%g /tmp/own; touch /no 2>/dev/null || echo denied";
        let ran = fixture.run(sandbox, with(script, more));
        if !fixture.who.has_many_ids() {
            assert_eq!(ran.status, NO_OUTCOME, "{ran:?}");
            assert!(
                ran.own.contains(
                    "switching to group 1001: it does not exist in this user namespace, which has 1 gids"
                ),
                "{ran:?}"
            );
            return;
        }
        let zero = "0000000000000000";
        assert_eq!(
            ran.stdout,
            format!(
                "pid 1\n1000\n1001\n1001 2000\nCapInh:\t{zero}\nCapPrm:\t{zero}\nCapEff:\t{zero}\n\
                 CapAmb:\t{zero}\nto stdout\n1000:1001\ndenied\n"
            ),
            "{sandbox} {:?} {}",
            fixture.who,
            ran.stderr,
        );
        assert_eq!(ran.stderr, "to stderr");
        std::fs::remove_file(fixture.root().join("tmp/own")).unwrap();
    });
}

#[test]
fn sandbox_system_calls_are_those_of_docker() {
    everywhere(|fixture, sandbox| {
        let script = "grep Seccomp: /proc/self/status; unshare --user true; echo $?; \
                      chroot / echo chroot; (sleep 0.01; echo child) & wait";
        let ran = fixture.run(sandbox, sh(script));
        assert_eq!(
            (ran.status, ran.stdout.as_str()),
            (0, "Seccomp:\t2\n1\nchroot\nchild\n"),
            "{sandbox} {:?} {ran:?}",
            fixture.who
        );
        assert!(ran.stderr.contains("Operation not permitted"), "{ran:?}");
        // Whoever may do everything may call everything.
        let all = with(
            "grep Seccomp: /proc/self/status",
            json!({"security": "Insecure"}),
        );
        let ran = fixture.run(sandbox, all);
        assert_eq!(ran.stdout, "Seccomp:\t0\n", "{sandbox} {ran:?}");
    });
}

#[test]
fn security_s22_sandbox_nothing_outlives_the_step() {
    everywhere(|fixture, sandbox| {
        let marker = marker();
        // It holds the pipes, too: the end of output must not be waited for.
        let script = format!("setsid sleep {marker} & sleep {marker} & echo started; exit 3");
        let ran = fixture.run(sandbox, sh(&script));
        assert_eq!(
            (ran.status, ran.stdout.as_str()),
            (3, "started\n"),
            "{sandbox} {ran:?}"
        );
        assert_eq!(processes_with(&marker), 0, "{sandbox} {:?}", fixture.who);
    });
}

#[test]
fn security_s22_sandbox_cancel_ends_everything_before_it_returns() {
    everywhere(|fixture, sandbox| {
        let marker = marker();
        let script = format!("setsid sleep {marker} & echo started; sleep {marker}");
        let ran = fixture.run(sandbox, with(&script, json!({"cancel_on_output": true})));
        assert_eq!(ran.status, NO_OUTCOME, "{sandbox} {ran:?}");
        assert!(
            ran.own.ends_with("sandbox: the step was cancelled"),
            "{ran:?}"
        );
        assert_eq!(ran.stdout, "started\n");
        assert_eq!(processes_with(&marker), 0, "{sandbox} {:?}", fixture.who);
    });
}

#[test]
fn security_s22_sandbox_killing_sockless_kills_the_step() {
    everywhere(|fixture, sandbox| {
        let marker = marker();
        let mut child = fixture.spawn(&json!({
            "sandbox": sandbox,
            "allow_old_runc": true,
            "rootfs": fixture.root(),
            "args": ["sh", "-c", format!("setsid sleep {marker} & echo started; sleep {marker}")],
            "env": ["PATH=/bin"],
        }));
        let mut line = String::new();
        let mut stdout = BufReader::new(child.stdout.take().unwrap());
        stdout.read_line(&mut line).unwrap();
        assert_eq!(line, "started\n");
        child.kill().unwrap();
        child.wait().unwrap();
        // Nobody is left to wait for their end.
        let patience = Instant::now() + Duration::from_secs(60);
        while processes_with(&marker) > 0 {
            assert!(Instant::now() < patience, "{sandbox} {:?}", fixture.who);
            std::thread::sleep(Duration::from_millis(10));
        }
    });
}

#[test]
fn security_s12_sandbox_the_host_is_out_of_sight() {
    everywhere(|fixture, sandbox| {
        let canary = fixture.dir.path().join("canary");
        std::fs::write(&canary, "secret-of-the-builder").unwrap();
        let canary = canary.display();
        let script = format!(
            "cat {canary} 2>/dev/null; grep -l secret-of-the-builder /proc/*/environ 2>/dev/null; \
             ls /proc | grep -c '^[0-9]'; ls /; \
             for file in /proc/keys /proc/timer_list /proc/kcore; do \
             if [ -e $file ]; then cat $file; fi; done; \
             for dir in /proc/acpi /proc/scsi /sys/firmware /sys/fs/cgroup; do \
             if [ -d $dir ]; then ls $dir; fi; done; \
             echo x 2>/dev/null > /proc/sys/kernel/hostname || echo denied; \
             echo x 2>/dev/null > /proc/sysrq-trigger || echo denied; \
             mkdir /sys/x 2>/dev/null || echo denied; \
             echo x 2>/dev/null >> /etc/resolv.conf || echo denied; \
             echo x 2>/dev/null >> /etc/hosts || echo denied; \
             mknod /tmp/kmsg c 1 11 2>/dev/null; cat /tmp/kmsg 2>/dev/null || echo denied; \
             mknod /dev/kmsg c 1 11 2>/dev/null; cat /dev/kmsg 2>/dev/null || echo denied; \
             rm -f /tmp/kmsg"
        );
        let ran = fixture.run(
            sandbox,
            with(
                &script,
                json!({"args": ["/bin/busybox", "sh", "-c", script]}),
            ),
        );
        // Two processes: the shell and `ls`; `grep` may have started as well.
        let stdout = ran.stdout.replacen("3\n", "2\n", 1);
        assert_eq!(
            stdout,
            "2\nbin\ndev\netc\nmnt\nproc\nsys\ntmp\nwork\n".to_owned() + &"denied\n".repeat(7),
            "{sandbox} {:?} {}",
            fixture.who,
            ran.stderr,
        );
        for name in ["resolv.conf", "hosts"] {
            let text = std::fs::read_to_string(fixture.root().join("etc").join(name)).unwrap();
            assert_eq!(text, "of the image\n");
        }
    });
}

/// CVE-2019-16884, CVE-2025-31133: an image, or what is mounted, takes the place of what protects the host.
#[test]
fn security_s11_what_protects_the_host_is_looked_at_from_inside() {
    everywhere(|fixture, sandbox| {
        // Nothing may lie over a device: it would be what masks have been made of.
        let file = fixture.dir.path().join("file");
        std::fs::write(&file, "not a device\n").unwrap();
        for name in ["null", "tty"] {
            let target = format!("/dev/{name}");
            let more = json!({"mounts": [{"source": file, "target": target}]});
            let ran = fixture.run(sandbox, with("echo begun", more));
            let expected = format!(
                "checking {target} in the sandbox: it is another file; the step was not begun"
            );
            assert_eq!(
                (ran.status, ran.stdout.as_str()),
                (NO_OUTCOME, ""),
                "{sandbox}"
            );
            // crun opens what it masks with, and may notice before.
            let noticed = "crun failed: failed open()ing /dev/null";
            let is_said = ran.own.contains(&expected)
                || (sandbox, name) == ("crun", "null") && ran.own.contains(noticed);
            assert!(is_said, "{sandbox} {ran:?}");
        }
        // An image whose directories are links: a step sees the real ones, or nothing runs.
        for name in ["proc", "dev", "sys"] {
            let dir = fixture.root().join(name);
            std::fs::remove_dir(&dir).unwrap();
            std::os::unix::fs::symlink("/tmp", &dir).unwrap();
            let script = "grep -q ^Name: /proc/self/status || echo no proc; \
                          cat /proc/kcore /proc/keys | wc -c; stat -c %t:%T /dev/null; \
                          mkdir /sys/x 2>/dev/null || echo denied";
            let ran = fixture.run(sandbox, sh(script));
            let seen = (ran.status, ran.stdout.as_str());
            assert!(
                seen == (NO_OUTCOME, "") || seen == (0, "0\n1:3\ndenied\n"),
                "{sandbox} {name} {ran:?}"
            );
            std::fs::remove_file(&dir).unwrap();
            std::fs::create_dir(&dir).unwrap();
            fixture.give(&dir);
        }
    });
}

#[test]
fn sandbox_namespaces_are_the_steps_own() {
    const KINDS: [&str; 5] = ["pid", "ipc", "uts", "mnt", "cgroup"];
    everywhere(|fixture, sandbox| {
        let script = format!(
            "for kind in {}; do readlink /proc/self/ns/$kind; done",
            KINDS.join(" ")
        );
        let ran = fixture.run(sandbox, sh(&script));
        let inside: Vec<&str> = ran.stdout.lines().collect();
        assert_eq!(inside.len(), KINDS.len(), "{sandbox} {ran:?}");
        for (kind, inside) in KINDS.iter().zip(inside) {
            let own = std::fs::read_link(format!("/proc/self/ns/{kind}")).unwrap();
            assert!(
                inside.starts_with(&format!("{kind}:[")),
                "{sandbox} {inside}"
            );
            assert_ne!(own.to_str(), Some(inside), "{sandbox} {:?}", fixture.who);
        }
    });
}

#[test]
fn security_s10_sandbox_no_descriptor_leads_out() {
    // CVE-2024-21626: a working directory through a leaked descriptor of the host.
    everywhere(|fixture, sandbox| {
        for number in 3..12 {
            let cwd = format!("/proc/self/fd/{number}");
            let ran = fixture.run(sandbox, with("pwd; ls", json!({"cwd": cwd})));
            assert_eq!(ran.status, NO_OUTCOME, "{sandbox} {cwd} {ran:?}");
            assert_eq!(ran.stdout, "");
        }
    });
}

#[test]
fn sandbox_mounts_are_where_and_what_was_asked_for() {
    everywhere(|fixture, sandbox| {
        let source = fixture.dir.path().join("source");
        std::fs::create_dir_all(source.join("sub")).unwrap();
        std::fs::write(source.join("file"), "text\n").unwrap();
        fixture.give(&source);
        let root = fixture.root();
        for name in ["mnt/rw", "mnt/ro", "mnt/ro/sub", "mnt/memory"] {
            std::fs::create_dir_all(root.join(name)).unwrap();
        }
        std::fs::write(root.join("mnt/secret"), "").unwrap();
        let mounts = json!([
            // Out of order: parents come first all the same.
            {"target": "/mnt/ro/sub", "source": source, "read_only": true},
            {"target": "/mnt/rw", "source": source},
            {"target": "/mnt/ro", "source": source, "read_only": true},
            {"target": "/mnt/memory", "size_bytes": 65536},
            {"target": "/mnt/secret", "source": source.join("file"), "read_only": true},
            {"target": "/dev/shm", "size_bytes": 131_072},
            {"target": "/dev/extra/file", "source": source.join("file")},
        ]);
        let script = "cat /mnt/ro/sub/file /mnt/secret /dev/extra/file; echo new > /mnt/rw/new; \
                      cat /mnt/ro/new; touch /mnt/ro/x 2>/dev/null || echo denied; \
                      echo x 2>/dev/null >> /mnt/secret || echo denied; \
                      df -P -k /mnt/memory /dev/shm | grep -o ' \\(64\\|128\\) '; \
                      grep -c ' /mnt/rw .*nosuid,nodev' /proc/self/mountinfo";
        let ran = fixture.run(sandbox, with(script, json!({"mounts": mounts})));
        assert_eq!(
            ran.stdout, "text\ntext\ntext\nnew\ndenied\ndenied\n 64 \n 64 \n 128 \n 128 \n1\n",
            "{sandbox} {:?} {} {}",
            fixture.who, ran.stderr, ran.own,
        );
        assert_eq!(
            std::fs::read_to_string(source.join("new")).unwrap(),
            "new\n"
        );
        std::fs::remove_file(source.join("new")).unwrap();
    });
}

#[test]
fn security_s11_sandbox_mounts_lie_inside_mounts() {
    everywhere(|fixture, sandbox| {
        let cache = fixture.dir.path().join(format!("cache-{sandbox}"));
        let source = fixture.dir.path().join(format!("source-{sandbox}"));
        for dir in [&cache, &source] {
            std::fs::create_dir_all(dir).unwrap();
        }
        std::fs::write(source.join("file"), "text\n").unwrap();
        // What a step left in its cache leads no mount out of it.
        std::os::unix::fs::symlink("/mnt", cache.join("up")).unwrap();
        std::fs::set_permissions(&cache, std::fs::Permissions::from_mode(0o755)).unwrap();
        let root = fixture.root();
        let at = root.join("mnt/at");
        std::fs::create_dir_all(&at).unwrap();
        let _ = std::fs::remove_file(root.join("mnt/alias"));
        std::os::unix::fs::symlink("../../../../mnt/at", root.join("mnt/alias")).unwrap();
        fixture.give(&cache);
        fixture.give(&source);
        fixture.give(&root.join("mnt"));
        let mounts = json!([
            {"target": "/mnt/at", "source": cache},
            {"target": "/mnt/at/sub/dir", "source": source, "read_only": true},
            {"target": "/mnt/alias/other/file", "source": source.join("file")},
            {"target": "/mnt/at/memory", "mode": 0o700},
            {"target": "/mnt/at/memory/deep", "source": source},
            {"target": "/dev/memory/deep", "source": source},
            {"target": "/dev/memory", "mode": 0o700},
            {"target": "/sys/fs", "read_only": true},
            {"target": "/tmp"},
        ]);
        let script = "cat /mnt/at/sub/dir/file /mnt/at/other/file /mnt/at/memory/deep/file \
                      /dev/memory/deep/file; stat -c %a /mnt/at/memory /mnt/at/sub /tmp /sys/fs; \
                      touch /sys/fs/x 2>/dev/null || echo denied; pwd; echo new > /mnt/at/new";
        let more = json!({"mounts": mounts, "cwd": "/mnt/at/memory/work"});
        let ran = fixture.run(sandbox, with(script, more));
        assert_eq!(
            ran.stdout,
            "text\ntext\ntext\ntext\n700\n755\n1777\n755\ndenied\n/mnt/at/memory/work\n",
            "{sandbox} {:?} {} {}",
            fixture.who,
            ran.stderr,
            ran.own
        );
        let names = |dir: &Path| {
            let entries = std::fs::read_dir(dir).unwrap();
            let mut names: Vec<String> = entries
                .map(|entry| entry.unwrap().file_name().into_string().unwrap())
                .collect();
            names.sort();
            names
        };
        // The mount points stay where they were made: in the outer mount, not in the image.
        assert_eq!(names(&cache), ["memory", "new", "other", "sub", "up"]);
        assert!(names(&at).is_empty() && names(&root.join("dev")).is_empty());

        let check = |target: &str, reason: &str| {
            let mounts = json!([
                {"target": "/mnt/at", "source": cache, "read_only": true},
                {"target": target, "source": source},
            ]);
            let ran = fixture.run(sandbox, with("ls", json!({"mounts": mounts})));
            assert_eq!(ran.status, NO_OUTCOME, "{sandbox} {target} {ran:?}");
            let expected = format!("sandbox: mounting {target} in the sandbox: {reason}");
            assert!(ran.own.contains(&expected), "{sandbox} {target} {ran:?}");
        };
        check(
            "/mnt/at/absent",
            "making its mount point: Read-only file system (os error 30)",
        );
        check(
            "/mnt/at/up/absent",
            "attaching it: No such file or directory (os error 2)",
        );
        for (link, target) in [("proc", "/proc"), ("slash", "/"), ("device", "/dev")] {
            let link = cache.join(link);
            let _ = std::fs::remove_file(&link);
            std::os::unix::fs::symlink(target, &link).unwrap();
        }
        for name in ["proc", "slash", "device"] {
            check(
                &format!("/mnt/at/{name}"),
                "nothing can be mounted there: Invalid argument (os error 22)",
            );
        }
    });
}

#[test]
fn sandbox_files_from_memory_have_owner_and_mode() {
    everywhere(|fixture, sandbox| {
        for name in ["mnt/secret", "mnt/program"] {
            std::fs::write(fixture.root().join(name), "").unwrap();
        }
        let owner = if fixture.who.has_many_ids() { 1000 } else { 0 };
        let mounts = json!([
            {"target": "/mnt/secret", "content": "hidden\n", "mode": 0o440, "uid": owner,
             "gid": owner, "read_only": true},
            {"target": "/mnt/program", "content": "#!/bin/sh\necho runs\n", "mode": 0o700},
            {"target": "/dev/secret", "content": "below dev\n"},
        ]);
        let script = "cat /mnt/secret /dev/secret; stat -c '%a %u %g' /mnt/secret /dev/secret; \
                      /mnt/program; echo x >> /mnt/program && echo written; \
                      echo x 2>/dev/null >> /mnt/secret || echo denied; \
                      grep -c ' /mnt/secret ro,nosuid,nodev,noexec' /proc/self/mountinfo";
        let ran = fixture.run(sandbox, with(script, json!({"mounts": mounts})));
        assert_eq!(
            ran.stdout,
            format!("hidden\nbelow dev\n440 {owner} {owner}\n400 0 0\nruns\nwritten\ndenied\n1\n"),
            "{sandbox} {:?} {} {}",
            fixture.who,
            ran.stderr,
            ran.own
        );
        let left = std::fs::read(fixture.root().join("mnt/secret")).unwrap();
        assert!(left.is_empty());

        let mounts =
            json!([{"target": "/mnt/secret", "content": "hidden", "uid": 4_000_000_000_u32}]);
        let ran = fixture.run(sandbox, with("ls", json!({"mounts": mounts})));
        if !fixture.who.is_real_root() {
            let expected = "mounting /mnt/secret in the sandbox: giving the file to 4000000000:0: \
                            not all of these exist in this user namespace";
            assert_eq!(ran.status, NO_OUTCOME);
            assert!(ran.own.contains(expected), "{sandbox} {ran:?}");
        }
        assert!(!ran.own.contains("hidden"));
    });
}

#[test]
fn sandbox_sockets_can_be_reached() {
    everywhere(|fixture, sandbox| {
        let path = fixture.dir.path().join(format!("log-{sandbox}"));
        let socket = std::os::unix::net::UnixDatagram::bind(&path).unwrap();
        socket
            .set_read_timeout(Some(Duration::from_secs(60)))
            .unwrap();
        fixture.give(&path);
        // `logger` writes to the socket /dev/log.
        let mounts = json!([{"target": "/dev/log", "source": path, "read_only": true}]);
        let script = "stat -c %F /dev/log; logger from the step";
        let ran = fixture.run(sandbox, with(script, json!({"mounts": mounts})));
        assert_eq!(
            (ran.status, ran.stdout.as_str()),
            (0, "socket\n"),
            "{sandbox} {ran:?}"
        );
        let mut message = [0; 256];
        let length = socket.recv(&mut message).unwrap();
        let message = String::from_utf8_lossy(&message[..length]);
        assert!(message.contains("from the step"), "{sandbox} {message}");
    });
}

#[test]
fn sandbox_devices_are_those_of_this_machine() {
    everywhere(|fixture, sandbox| {
        std::fs::write(fixture.root().join("work/node"), "").unwrap();
        let device = |path: &str, host_path: &Path| json!({"path": path, "host_path": host_path});
        let zero = Path::new("/dev/zero");
        let devices = [device("/dev/extra/zero", zero), device("/work/node", zero)];
        let script = "head -c 4 /dev/extra/zero | wc -c; head -c 5 /work/node | wc -c; \
                      echo x > /dev/extra/zero && stat -c %F:%t:%T /dev/extra/zero";
        let ran = fixture.run(sandbox, with(script, json!({"devices": devices})));
        assert_eq!(
            ran.stdout, "4\n5\ncharacter special file:1:5\n",
            "{sandbox} {:?} {} {}",
            fixture.who, ran.stderr, ran.own
        );
        let check = |host_path: &Path, reason: &str| {
            let devices = [device("/dev/extra", host_path)];
            let ran = fixture.run(sandbox, with("ls", json!({"devices": devices})));
            let expected = format!(
                "mounting /dev/extra in the sandbox: opening the device {}: {reason}",
                host_path.display()
            );
            assert_eq!(ran.status, NO_OUTCOME, "{sandbox} {ran:?}");
            assert!(ran.own.contains(&expected), "{sandbox} {ran:?}");
        };
        check(&fixture.root().join("etc/hosts"), "it is no device");
        check(
            Path::new("/dev/absent"),
            "No such file or directory (os error 2)",
        );
    });
}

#[test]
fn sandbox_an_insecure_step_may_do_what_the_builder_may() {
    everywhere(|fixture, sandbox| {
        let script = "grep -E '^Cap' /proc/self/status; \
                      grep -cE ' /(proc|sys)/[^ ]* ' /proc/self/mountinfo; \
                      grep -cE ' /sys rw' /proc/self/mountinfo; \
                      grep -cE ' /proc rw' /proc/self/mountinfo; \
                      cat /proc/sys/net/ipv4/ip_forward; echo 1 > /proc/sys/net/ipv4/ip_forward; \
                      cat /proc/sys/net/ipv4/ip_forward; \
                      ls /dev | grep -E '^(fuse|kmsg|loop0|net)$'; \
                      mknod /work/made c 1 5 2>/dev/null && head -c 3 /work/made | wc -c; exit 0";
        let _ = std::fs::remove_file(fixture.root().join("work/made"));
        let run = |user: u32| {
            let more =
                json!({"security": "Insecure", "user": {"uid": user, "gid": user, "groups": []}});
            fixture.run(sandbox, with(script, more))
        };
        let all = (0..41).fold(0_u64, |all, number| all | 1 << number);
        let ran = run(0);
        let mut lines = ran.stdout.lines();
        let mut masks = Vec::new();
        for _ in 0..5 {
            let (_, mask) = lines.next().unwrap().split_once('\t').unwrap();
            masks.push(u64::from_str_radix(mask, 16).unwrap());
        }
        // A container that the tests run in may have fewer.
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let own = status
            .lines()
            .find_map(|line| line.strip_prefix("CapBnd:\t"))
            .unwrap();
        let own = u64::from_str_radix(own, 16).unwrap();
        // A user namespace of its own has all that there are.
        let expected = if fixture.who.is_real_root() {
            own
        } else {
            masks[3]
        };
        assert_eq!(masks, [expected; 5], "{sandbox} {:?} {ran:?}", fixture.who);
        if !fixture.who.is_real_root() {
            assert_eq!(expected & all, all, "{sandbox} {:?}", fixture.who);
        }

        let rest: Vec<&str> = lines.collect();
        let (mounts, rest) = rest.split_first().unwrap();
        // Nothing but cgroups is mounted in /proc and /sys.
        assert!(["0", "1"].contains(mounts), "{sandbox} {ran:?}");
        let devices: &[&str] = match fixture.who.is_real_root() {
            true => &["fuse", "kmsg", "loop0", "net", "3"],
            false => &[],
        };
        let expected = [&["1", "1", "0", "1"], devices].concat();
        assert_eq!(rest, expected, "{sandbox} {:?} {}", fixture.who, ran.stderr);

        if fixture.who.has_many_ids() {
            let script = "id -u; grep -E '^Cap(Eff|Amb)' /proc/self/status";
            let more =
                json!({"security": "Insecure", "user": {"uid": 1000, "gid": 1000, "groups": []}});
            let ran = fixture.run(sandbox, with(script, more));
            let mask = format!("{:016x}", masks[0]);
            assert_eq!(
                ran.stdout,
                format!("1000\nCapEff:\t{mask}\nCapAmb:\t{mask}\n"),
                "{sandbox} {:?} {ran:?}",
                fixture.who
            );
        }
    });
}

#[test]
fn sandbox_limits_are_those_asked_for() {
    everywhere(|fixture, sandbox| {
        let limit =
            |name: &str, soft: i64, hard: i64| json!({"name": name, "soft": soft, "hard": hard});
        let limits = [
            limit("nofile", 100, 200),
            limit("core", 0, 0),
            limit("nproc", 500, 600),
        ];
        let script = "ulimit -S -n; ulimit -H -n; ulimit -c; grep processes /proc/self/limits | tr -s ' '; \
                      df -P -k /dev/shm | grep -o ' 128 ' | head -1";
        let more = json!({"ulimits": limits, "shm_size": 131_072});
        let ran = fixture.run(sandbox, with(script, more));
        assert_eq!(
            ran.stdout, "100\n200\n0\nMax processes 500 600 processes \n 128 \n",
            "{sandbox} {:?} {} {}",
            fixture.who, ran.stderr, ran.own
        );
        // More files than a kernel lets anybody open, root included.
        let max = std::fs::read_to_string("/proc/sys/fs/nr_open").unwrap();
        let above = max.trim().parse::<i64>().unwrap() + 1;
        let more = json!({"ulimits": [limit("nofile", 100, above)]});
        let ran = fixture.run(sandbox, with("ls", more));
        let expected = format!(
            "sandbox: setting the limit nofile=100:{above}: only root can go above the hard limit, \
             which is "
        );
        assert_eq!(ran.status, NO_OUTCOME, "{sandbox} {ran:?}");
        assert!(ran.own.contains(&expected), "{sandbox} {ran:?}");
    });
}

#[test]
fn sandbox_names_of_hosts_lead_where_they_should() {
    let listener = std::net::TcpListener::bind("0.0.0.0:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for connection in listener.incoming() {
            let _ = connection.and_then(|mut connection| connection.write_all(b"from the host\n"));
        }
    });
    everywhere(|fixture, sandbox| {
        // Only the first line: old versions of pasta repeat the last ones and lose the end.
        let ask = format!(
            "nc me {port} < /dev/null > /tmp/got & \
             for _ in $(seq 60); do grep -m 1 host /tmp/got && break; sleep 1; done"
        );
        let own_resolv_conf = std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
        let more =
            json!({"network": "Host", "extra_hosts": [["me", "host-gateway"], ["db", "::1"]]});
        let script = format!("hostname; grep -E 'me|db' /etc/hosts; {ask}; cat /etc/resolv.conf");
        let ran = fixture.run(sandbox, with(&script, more));
        assert_eq!(
            ran.stdout,
            format!("sockless\n127.0.0.1\tme\n::1\tdb\nfrom the host\n{own_resolv_conf}"),
            "{sandbox} {:?} {ran:?}",
            fixture.who
        );

        let more = json!({"network": "Private", "extra_hosts": [["me", "host-gateway"]]});
        let ran = fixture.run(sandbox, with(&ask, more));
        if ran
            .own
            .contains("this machine has none to reach others from")
        {
            skip(&format!("host-gateway: {}", ran.own));
        } else {
            assert_eq!(
                ran.stdout, "from the host\n",
                "{sandbox} {:?} {ran:?}",
                fixture.who
            );
        }
    });
}

#[test]
fn security_s06_sandbox_links_of_an_image_lead_no_mount_out_of_it() {
    everywhere(|fixture, sandbox| {
        let outside = fixture.dir.path().join("outside");
        std::fs::create_dir_all(&outside).unwrap();
        std::fs::write(outside.join("canary"), "").unwrap();
        let link = fixture.root().join("mnt/link");
        let _ = std::fs::remove_file(&link);
        std::os::unix::fs::symlink(&outside, &link).unwrap();
        let check = |target: &str, reason: &str| {
            let more = json!({"mounts": [{"target": target}]});
            let ran = fixture.run(sandbox, with("ls", more));
            assert_eq!(ran.status, NO_OUTCOME, "{sandbox} {target} {ran:?}");
            let expected = format!("sandbox: mounting {target} in the sandbox: {reason}");
            assert!(ran.own.contains(&expected), "{sandbox} {target} {ran:?}");
        };
        let absent = "attaching it: No such file or directory (os error 2)";
        check("/mnt/link", absent);
        check("/absent", absent);
        check(
            "/proc/self",
            "nothing can be mounted there: Invalid argument (os error 22)",
        );
        check(
            "/bin/busybox",
            "attaching it: Invalid argument (os error 22)",
        );
        assert!(outside.join("canary").exists());
    });
}

#[test]
fn security_s12_sandbox_networks_reach_what_they_should() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let count = std::sync::Arc::new(AtomicU32::new(0));
    let counter = count.clone();
    // Closes each connection, for which `nc` waits; ends with the tests' process.
    std::thread::spawn(move || {
        for connection in listener.incoming() {
            counter.fetch_add(1, Ordering::SeqCst);
            drop(connection);
        }
    });
    // Whatever was connected was counted, as `nc` returns when it is closed.
    let was_reached = || count.swap(0, Ordering::SeqCst) > 0;
    everywhere(|fixture, sandbox| {
        let script = format!("ls /sys/class/net; nc -w 5 127.0.0.1 {port} < /dev/null");
        let run = |network: &str| fixture.run(sandbox, with(&script, json!({"network": network})));
        let ran = run("Host");
        assert!(was_reached(), "{sandbox} {:?} {ran:?}", fixture.who);

        let ran = run("None");
        assert!(!was_reached(), "{sandbox} {:?} {ran:?}", fixture.who);
        assert_eq!((ran.status, ran.stdout.as_str()), (1, "lo\n"), "{ran:?}");

        let ran = run("Private");
        if ran.own.contains("RUN steps share the host's network") {
            assert!(was_reached(), "{sandbox} {:?} {ran:?}", fixture.who);
            skip(&format!(
                "a private network as {:?}: {}",
                fixture.who, ran.own
            ));
            return;
        }
        assert!(!was_reached(), "{sandbox} {:?} {ran:?}", fixture.who);
        let interfaces = ran.stdout.lines().filter(|name| *name != "lo").count();
        assert_eq!(
            (ran.status, interfaces),
            (1, 1),
            "{sandbox} {:?} {ran:?}",
            fixture.who
        );
        // The machine's other addresses do not lead to it either.
        let script = "ip route get 169.254.169.254 2>&1 | head -1";
        let ran = fixture.run(sandbox, with(script, json!({"network": "Private"})));
        assert_eq!(
            ran.stdout, "ip: RTNETLINK answers: No route to host\n",
            "{ran:?}"
        );
    });
}

#[test]
fn sandbox_much_output_arrives_whole() {
    everywhere(|fixture, sandbox| {
        let script = "seq 1 200000; seq 1 200000 >&2 & seq 1 200000; wait";
        let ran = fixture.run(sandbox, sh(script));
        let lines: usize = ran.stdout.lines().count();
        assert_eq!((ran.status, lines), (0, 400_000), "{sandbox}");
        assert_eq!(ran.stderr.lines().count(), 200_000);
        assert!(ran.stdout.ends_with("\n199999\n200000\n"));
    });
}

#[test]
fn sandbox_what_does_not_exist_is_said() {
    let Some(fixture) = Fixture::new(Who::Own) else {
        return;
    };
    let mut child = Command::new(fixture.dir.path().join("sockless"))
        .arg("__init")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    // A stage started by hand has none of its files, and must not touch anything.
    let mut text = String::new();
    child
        .stdout
        .take()
        .unwrap()
        .read_to_string(&mut text)
        .unwrap();
    assert_eq!((child.wait().unwrap().code(), text.as_str()), (Some(2), ""));
}
