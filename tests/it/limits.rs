//! How much RUN steps may use. Root's limits are held by cgroups, those of ordinary users by limits of
//! processes where nobody gave them a cgroup.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use crate::memory::PEAK_KIB;
use crate::support::process::Ran;
use crate::support::registry::Registry;
use crate::support::sockless::Place;
use crate::support::{find_program, images, is_root, namespaces, programs};

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

#[track_caller]
fn build(place: &Place, upstream: &Registry, command: &str, args: &[&str]) -> Ran {
    let dockerfile = format!("FROM busybox\nRUN {command}\n");
    let context = place.context("context", &[("Dockerfile", &dockerfile)]);
    place.build(upstream, &context, args)
}

/// What holds this user to limits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Holder {
    Cgroups,
    Processes,
}

impl Holder {
    /// Tries it: whether a cgroup can be made below the own one of the controller of memory.
    ///
    /// # Panics
    /// As root, for whom there must be some.
    fn of_this_user() -> Self {
        let own = std::fs::read_to_string("/proc/self/cgroup").expect("of the kernel");
        let v1 = own.lines().find_map(|line| line.split_once(":memory:"));
        let dir = match v1 {
            Some((_, path)) => format!("/sys/fs/cgroup/memory{path}"),
            None => {
                let line = own.lines().find_map(|line| line.strip_prefix("0::"));
                format!("/sys/fs/cgroup{}", line.expect("a cgroup of version 2"))
            }
        };
        let trial = Path::new(&dir).join(format!("test-{}", std::process::id()));
        let holder = match std::fs::create_dir(&trial).and_then(|()| std::fs::remove_dir(&trial)) {
            Ok(()) => Self::Cgroups,
            Err(_) => Self::Processes,
        };
        assert!(
            !is_root() || holder == Self::Cgroups,
            "root can make no cgroup in {dir}"
        );
        holder
    }
}

/// The cgroups that sockless made, of the process `pid` or of all.
fn cgroups(pid: Option<u32>) -> Vec<PathBuf> {
    fn walk(dir: &Path, prefix: &str, found: &mut Vec<PathBuf>) {
        let Ok(entries) = std::fs::read_dir(dir) else {
            return;
        };
        for entry in entries.flatten() {
            if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                continue;
            }
            match entry.file_name().to_string_lossy().starts_with(prefix) {
                true => found.push(entry.path()),
                false => walk(&entry.path(), prefix, found),
            }
        }
    }
    let prefix = pid.map_or("sockless-".to_owned(), |pid| format!("sockless-{pid}-"));
    let mut found = Vec::new();
    walk(Path::new("/sys/fs/cgroup"), &prefix, &mut found);
    found
}

/// How many processes have `argument` on their command line.
fn processes_with(argument: &str) -> usize {
    let entries = std::fs::read_dir("/proc").expect("procfs").flatten();
    let lines = entries.filter_map(|entry| std::fs::read(entry.path().join("cmdline")).ok());
    let has = |line: &Vec<u8>| {
        line.split(|&b| b == 0)
            .any(|arg| arg == argument.as_bytes())
    };
    lines.filter(has).count()
}

/// Holds this many bytes, or up to twice as many, in the memory of one process.
fn hold(bytes: u64) -> String {
    format!(
        "awk 'BEGIN {{ s = \"x\"; while (length(s) < {bytes}) s = s s; print \"held \" length(s) }}'"
    )
}

#[test]
fn sandbox_memory_has_a_limit() {
    let (upstream, place) = (upstream!(), Place::new());
    let ran = build(&place, &upstream, &hold(200_000_000), &["--memory", "64m"]).failure();
    match Holder::of_this_user() {
        Holder::Cgroups => ran.says(
            "did not complete successfully: exit code: 137: killed for memory, of which the limit is \
             64MiB (--memory)",
        ),
        Holder::Processes => ran
            .says("--memory limits the private memory of each process of a RUN step, not of all")
            .says("out of memory"),
    };
    build(&place, &upstream, &hold(8_000_000), &["--memory", "64m"])
        .success()
        .says("held 8388608");
    // What a step may use says nothing about what it makes.
    build(&place, &upstream, &hold(8_000_000), &["--memory", "128m"])
        .success()
        .says("CACHED");
}

/// Cgroups whose sockless has ended; those of tests beside this one do not count.
fn cgroups_of_ended_processes() -> Vec<PathBuf> {
    let mut left = cgroups(None);
    left.retain(|dir| {
        let name = dir.file_name().unwrap_or_default().to_string_lossy();
        let pid = name.split('-').nth(1).unwrap_or_default().to_owned();
        let is_number = pid.bytes().all(|b| b.is_ascii_digit());
        is_number && dir.exists() && !Path::new("/proc").join(pid).exists()
    });
    left
}

#[test]
fn sandbox_a_kill_for_memory_that_a_step_survives_is_said() {
    let (upstream, place) = (upstream!(), Place::new());
    if Holder::of_this_user() == Holder::Processes {
        // Nothing is killed: this is about cgroups.
        return;
    }
    let survives = format!("{} || echo went on", hold(200_000_000));
    build(&place, &upstream, &survives, &["-m", "64m"])
        .success()
        .says("went on")
        .says(
            "sockless: something in this step failed: killed for memory, of which the limit is 64MiB \
             (--memory)",
        );
}

#[test]
fn sandbox_processes_have_a_limit() {
    let (upstream, place) = (upstream!(), Place::new());
    // More than the threads of sockless, which count where there is no cgroup.
    let many = "i=0; while [ $i -lt 900 ]; do sleep 600 & i=$((i+1)); done; echo all of them";
    let ran = build(&place, &upstream, many, &["--pids-limit", "20"]).failure();
    let ran = ran.says("can't fork");
    match Holder::of_this_user() {
        Holder::Cgroups => ran.says(
            "exit code: 2: no more than 20 processes and threads were allowed (--pids-limit)",
        ),
        Holder::Processes => ran
            .says("--pids-limit counts the processes and threads of this user in all RUN steps")
            .says("exit code: 2"),
    };
    let some = "for i in $(seq 10); do sleep 600 & done; echo all of them";
    build(&place, &upstream, some, &["--pids-limit", "20"])
        .success()
        .says("all of them");
}

/// A process that is killed at the end, however a test ends.
struct Killed(std::process::Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn sandbox_cgroups_have_what_was_asked_for_and_are_gone_afterwards() {
    let (upstream, place) = (upstream!(), Place::new());
    let limits = [
        "--cpus=0.5",
        "--cpu-shares=512",
        "--memory=100m",
        "--pids-limit=50",
        "--cpuset-cpus=0",
    ];
    if Holder::of_this_user() == Holder::Processes {
        build(&place, &upstream, "true", &limits)
            .success()
            .says("--cpus, --cpu-period, --cpu-quota and --cpu-shares are not enforced: ")
            .says("--cpuset-cpus and --cpuset-mems are not enforced: ");
        return;
    }
    let dockerfile = "FROM busybox\nRUN sleep 600; true\n";
    let context = place.context("context", &[("Dockerfile", dockerfile)]);
    let build_of_it = place
        .command()
        .args(["build", "--progress", "plain", "--registry-mirror"])
        .arg(format!("docker.io={}", upstream.url()))
        .args(limits)
        .arg(&context)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("sockless");
    let mut child = Killed(build_of_it);
    let pid = child.0.id();
    let read = |name: &str| -> Option<String> {
        let dirs = cgroups(Some(pid)).into_iter();
        let mut texts = dirs.filter_map(|dir| std::fs::read_to_string(dir.join(name)).ok());
        texts.find(|text| !text.is_empty())
    };
    let deadline = Instant::now() + Duration::from_secs(120);
    let inside = loop {
        let inside = read("cgroup.procs").unwrap_or_default();
        // The step and what it waits for.
        let is_begun = inside.lines().any(|pid| {
            std::fs::read(format!("/proc/{pid}/cmdline"))
                .is_ok_and(|line| line.starts_with(b"sleep\0"))
        });
        if is_begun {
            break inside;
        }
        assert!(Instant::now() < deadline, "the step did not begin");
        std::thread::sleep(Duration::from_millis(20));
    };
    assert_eq!(inside.lines().count(), 2, "{inside}");
    let either = |v1: (&str, &str), v2: (&str, &str)| match read(v1.0) {
        Some(text) => assert_eq!(text.trim(), v1.1, "{}", v1.0),
        None => assert_eq!(read(v2.0).unwrap_or_default().trim(), v2.1, "{}", v2.0),
    };
    either(("cpu.cfs_quota_us", "50000"), ("cpu.max", "50000 100000"));
    either(("cpu.shares", "512"), ("cpu.weight", "20"));
    either(
        ("memory.limit_in_bytes", "104857600"),
        ("memory.max", "104857600"),
    );
    assert_eq!(read("pids.max").unwrap_or_default().trim(), "50");
    assert_eq!(read("cpuset.cpus").unwrap_or_default().trim(), "0");
    // Nobody is left to remove them.
    child.0.kill().expect("it runs");
    child.0.wait().expect("killed");
    assert_ne!(cgroups(Some(pid)), Vec::<PathBuf>::new());
    let deadline = Instant::now() + Duration::from_secs(60);
    while inside
        .lines()
        .any(|pid| Path::new("/proc").join(pid).exists())
    {
        assert!(Instant::now() < deadline, "the step lives on");
        std::thread::sleep(Duration::from_millis(20));
    }
    build(&place, &upstream, "true", &limits).success();
    assert_eq!(cgroups(Some(pid)), Vec::<PathBuf>::new());
    assert_eq!(cgroups_of_ended_processes(), Vec::<PathBuf>::new());
}

#[test]
fn sandbox_a_named_cgroup_holds_those_of_steps() {
    let (upstream, place) = (upstream!(), Place::new());
    let absent = ["--cgroup-parent", "/no-such-cgroup"];
    build(&place, &upstream, "true", &absent)
        .failure()
        .says("using the cgroup /no-such-cgroup: ");
    if Holder::of_this_user() == Holder::Processes {
        return;
    }
    let name = format!("test-parent-{}", std::process::id());
    let dirs: Vec<PathBuf> = ["memory", "pids"]
        .map(|controller| Path::new("/sys/fs/cgroup").join(controller).join(&name))
        .into_iter()
        .filter(|dir| std::fs::create_dir(dir).is_ok())
        .collect();
    if dirs.len() < 2 {
        skip!("no cgroups of version 1 to make one in");
    }
    // The limit is that of the parent.
    std::fs::write(dirs[0].join("memory.limit_in_bytes"), "67108864").expect("root's");
    let parent = format!("/{name}");
    let ran = build(
        &place,
        &upstream,
        &hold(200_000_000),
        &["--cgroup-parent", &parent],
    );
    for dir in dirs {
        std::fs::remove_dir(&dir).expect("nothing is left in it");
    }
    ran.failure().says("exit code: 137");
}

#[test]
fn sandbox_time_has_a_limit() {
    let (upstream, place) = (upstream!(), Place::new());
    let forever = format!("7{:07}", std::process::id());
    let command = format!("echo begun; setsid sleep {forever} & sleep {forever}");
    build(&place, &upstream, &command, &["--step-timeout", "2s"])
        .failure()
        .says("begun")
        .says("did not complete successfully: timed out after 2s (--step-timeout)");
    assert_eq!(processes_with(&forever), 0);
    build(&place, &upstream, "true", &["--step-timeout", "1h"]).success();
}

#[test]
fn sandbox_output_has_a_limit() {
    let (upstream, place) = (upstream!(), Place::new());
    let talks = "seq 100000; echo the end >&2; exit 3";
    let ran = build(&place, &upstream, talks, &["--output-limit", "1k"]).failure();
    let ran = ran
        .says("[output clipped, log limit 1KiB reached]\n")
        .says("\n");
    let text = format!("{}{}", ran.stdout, ran.stderr);
    assert_eq!(text.matches("output clipped").count(), 1, "{text}");
    // What fits; and, as it failed, the last lines.
    assert!(
        text.contains(" 200\n") && !text.contains(" 500\n"),
        "{text}"
    );
    assert!(
        text.contains("100000\n") && text.contains("the end"),
        "{text}"
    );
    build(&place, &upstream, "seq 50", &["--output-limit", "1k"])
        .success()
        .says(" 50\n");
}

/// Whoever builds a stranger's Dockerfile without any limit keeps its memory.
#[test]
fn sandbox_a_step_that_prints_without_end_takes_no_memory() {
    needs!(programs(&["time"]));
    let upstream = upstream!();
    // Long lines, and one that never ends; half as much again as all that may be taken.
    let lines = "yes $(head -c 4000 /dev/zero | tr '\\0' x) | head -c 150m";
    let line = "head -c 150m /dev/zero | tr '\\0' x";
    for (progress, command) in [("plain", lines), ("rawjson", line)] {
        let place = Place::new();
        let dockerfile = format!("FROM busybox\nRUN {command}\n");
        let context = place.context("context", &[("Dockerfile", &dockerfile)]);
        let report = place.dir.join("time");
        let time = find_program("time").expect("probed");
        let status = place
            .wrapped(&[
                &time.display().to_string(),
                "--quiet",
                "--format=%M",
                "--output",
                &report.display().to_string(),
            ])
            .args(["build", "--progress", progress, "--registry-mirror"])
            .arg(format!("docker.io={}", upstream.url()))
            .arg(&context)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .expect("sockless");
        assert!(status.success(), "{progress} {command}");
        let peak = std::fs::read_to_string(&report).expect("written by time");
        let peak: u64 = peak.trim().parse().expect("a number of KiB");
        assert!(peak < PEAK_KIB, "{progress} {command}: {peak} KiB");
    }
}

#[test]
fn sandbox_what_is_written_has_a_limit() {
    let (upstream, place) = (upstream!(), Place::new());
    let too_much = "did not complete successfully: it wrote more than 10MiB into its root filesystem (--disk-limit)";
    let large = "head -c 50m /dev/zero > /large";
    let many = "i=0; while [ $i -lt 200 ]; do head -c 100k /dev/zero > /f$i; i=$((i+1)); done";
    let slow =
        "i=0; while [ $i -lt 11 ]; do head -c 1m /dev/zero > /f$i; i=$((i+1)); done; sleep 600";
    for rootfs in ["overlay", "copy"] {
        let args = ["--disk-limit", "10m", "--rootfs", rootfs, "--no-cache"];
        // One file; many that are there before anybody looks; a step that would not end.
        for command in [large, many, slow] {
            build(&place, &upstream, command, &args)
                .failure()
                .says(too_much);
        }
        // What is mounted is none of it, and what is deleted is there no more.
        let elsewhere = "--mount=type=cache,target=/keep --mount=type=tmpfs,target=/mem \
                         for i in 1 2 3; do head -c 9m /dev/zero > /keep/$i; \
                         head -c 9m /dev/zero > /mem/$i; done; head -c 9m /dev/zero > /own; \
                         rm /own; head -c 8m /dev/zero > /own";
        build(&place, &upstream, elsewhere, &args).success();
    }
    // What an image has already does not count either.
    let copy = ["--disk-limit", "100k", "--rootfs", "copy"];
    build(&place, &upstream, "echo a little > /file", &copy).success();
}

#[test]
fn sandbox_an_old_runc_is_refused() {
    let (upstream, place) = (upstream!(), Place::new());
    let runc = place.dir.dir("bin").join("runc");
    std::fs::write(&runc, "#!/bin/sh\necho runc version 1.2.7\n").expect("ours");
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(&runc, mode).expect("ours");
    let context = place.context("context", &[("Dockerfile", "FROM busybox\nRUN true\n")]);
    let build = |allowed: Option<&str>| {
        let path = format!(
            "{}:/usr/bin:/bin:/usr/sbin:/sbin",
            place.dir.join("bin").display()
        );
        let mut command = place.command();
        command
            .env("PATH", path)
            .env_remove("SOCKLESS_ALLOW_OLD_RUNC")
            .args([
                "build",
                "--sandbox=runc",
                "--progress=plain",
                "--registry-mirror",
            ])
            .arg(format!("docker.io={}", upstream.url()))
            .args(allowed)
            .arg(&context);
        crate::support::process::run(&mut command).failure()
    };
    build(None)
        .says(
            "no sandbox works here: runc is too old: it says \"runc version 1.2.7\", where 1.2.8, 1.3.3 \
             or 1.4.0-rc.3 is needed",
        )
        .says("--allow-old-runc has it used");
    // It is tried, and does nothing.
    build(Some("--allow-old-runc")).says("runc failed: runc version 1.2.7");
}
