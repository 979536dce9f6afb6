//! What this machine lacks: room on a disk, inodes, leave to write, programs, a store of our
//! version. Each is told exactly, nothing half done stays, and with the lack made good the same
//! build succeeds from what was there.

use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use crate::store::digest_in;
use crate::support::process::{Ran, run};
use crate::support::registry::Registry;
use crate::support::sockless::Place;
use crate::support::{images, is_root, namespaces, programs};

/// The registry of base images, or the end of the test.
macro_rules! upstream {
    () => {{
        needs!(namespaces(), programs(&["nsenter", "bwrap"]));
        match images::busybox() {
            Ok(registry) => registry,
            Err(reason) => skip!("{reason}"),
        }
    }};
}

/// What a store has in which nothing was built.
const SKELETON: [&str; 9] = [
    "blobs",
    "blobs/sha256",
    "boot.json",
    "cache",
    "cache/steps",
    "jobs",
    "lock",
    "tmp",
    "trees",
];

const FULL: &str = "No space left on device (os error 28)";

/// The exit status of what this machine lacks, and of a step that failed.
const INTERNAL: i32 = 70;
const STEP_FAILED: i32 = 1;
const NO_SANDBOX: i32 = 4;

/// A machine whose store, and whose directory for outputs, are small file systems of their own.
struct Machine {
    /// Holds the mount namespace; as an ordinary user, also a user namespace.
    holder: Child,
    place: Place,
    store: PathBuf,
    out: PathBuf,
}

impl Machine {
    /// One whose store has these mount options of tmpfs.
    #[track_caller]
    fn new(options: &str) -> Self {
        let place = Place::new();
        let (store, out) = (place.dir.join("store"), place.dir.dir("out"));
        let mut command = Command::new("unshare");
        if !is_root() {
            command.args(["--user", "--map-auto", "--map-root-user"]);
        }
        let script = "mount -t tmpfs -o \"$1\" none \"$2\"; mount -t tmpfs -o size=64k none \"$3\"; \
                      echo ready; exec sleep 900";
        let mut holder = command
            .args(["--mount", "--propagation", "private"])
            .args(["sh", "-euc", script, "sh", options])
            .args([&store, &out])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .expect("unshare");
        let mut line = String::new();
        let stdout = holder.stdout.take().expect("piped");
        let read = BufReader::new(stdout).read_line(&mut line);
        let machine = Self {
            holder,
            place,
            store,
            out,
        };
        read.expect("the holder's output");
        assert_eq!(line, "ready\n");
        machine
    }

    /// What enters its namespaces.
    fn enter(&self) -> Vec<String> {
        let mut words = vec!["nsenter".to_owned(), "--mount".to_owned()];
        if !is_root() {
            words.push("--user".to_owned());
        }
        words.push(format!("--target={}", self.holder.id()));
        words
    }

    /// Runs a script there, with the store as `$1` and the directory for outputs as `$2`.
    #[track_caller]
    fn shell(&self, script: &str) -> String {
        let words = self.enter();
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]).args(["sh", "-euc", script, "sh"]);
        run(command.args([&self.store, &self.out])).success().stdout
    }

    /// Sockless there.
    fn command(&self) -> Command {
        let words = self.enter();
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let mut command = self.place.wrapped(&words);
        command.env("SOURCE_DATE_EPOCH", "1700000000");
        command
    }

    #[track_caller]
    fn sockless(&self, args: &[&str]) -> Ran {
        run(self.command().args(args))
    }

    #[track_caller]
    fn build(&self, upstream: &Registry, context: &Path, args: &[&str]) -> Ran {
        run(self
            .command()
            .args(["build", "--progress=plain"])
            .arg(format!("--registry-mirror=docker.io={}", upstream.url()))
            .args(args)
            .arg(context))
    }

    /// Builds without an output, and gives the image's digest.
    #[track_caller]
    fn digest(&self, upstream: &Registry, context: &Path) -> String {
        let metadata = self.place.dir.join("metadata.json");
        let file = metadata.to_str().expect("ours");
        let args = ["-o", "type=cacheonly", "--metadata-file", file];
        self.build(upstream, context, &args).success();
        digest_in(&metadata)
    }

    /// What is in the store.
    #[track_caller]
    fn files(&self) -> Vec<String> {
        let found = self.shell("cd \"$1\" && find . -mindepth 1 -printf '%P\\n'");
        let mut lines: Vec<String> = found.lines().map(str::to_owned).collect();
        lines.sort();
        lines
    }

    /// Fails unless the store is whole: everything with a name is what it should be, and nothing
    /// unfinished is left.
    #[track_caller]
    fn is_sound(&self) {
        self.sockless(&["store", "verify"]).success();
        let files = self.files();
        let unfinished = files.iter().find(|name| name.starts_with("tmp/"));
        assert_eq!(unfinished, None);
    }

    /// Gives the store room.
    #[track_caller]
    fn make_room(&self) {
        self.shell("mount -o remount,size=128m,nr_inodes=20000 \"$1\"");
    }

    /// What it says of a full disk of the store.
    #[track_caller]
    fn advises(&self, ran: Ran, of: &str) -> Ran {
        let start = format!("hint: the disk of the store {} has ", self.store.display());
        let lines: Vec<&str> =
            (ran.stderr.lines().filter_map(|l| l.strip_prefix(&start))).collect();
        assert_eq!(lines.len(), 1, "{}", ran.stderr);
        let (free, rest) = lines[0].split_once(" KiB free of ").expect("so much");
        let free: u64 = free.parse().expect("a number");
        let (all, rest) = rest.split_once(" KiB and ").expect("of so much");
        assert!(free <= all.parse().expect("a number"), "{}", lines[0]);
        assert!(lines[0].contains(of), "{:?} is not in {}", of, lines[0]);
        let end = " inodes, after what was unfinished has been removed; \"sockless prune\" removes \
                   what no build uses, and --root DIR or SOCKLESS_ROOT gives a store on another disk";
        assert!(rest.ends_with(end), "{rest}");
        ran
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // Its mounts go with it.
        let _ = self.holder.kill();
        let _ = self.holder.wait();
    }
}

/// The digest of the image where nothing is lacking.
#[track_caller]
fn expected(upstream: &Registry, context: &Path) -> String {
    Machine::new("size=128m").digest(upstream, context)
}

#[track_caller]
fn exits(ran: Ran, code: i32) -> Ran {
    assert_eq!(ran.status.code(), Some(code), "{}", ran.stderr);
    ran
}

/// Bytes that no compression makes smaller.
fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x9E37_79B9_7F4A_7C15_u64;
    let numbers = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    });
    numbers.flatten().take(length).collect()
}

const RUN: &str = "FROM busybox\nRUN --network=none echo x > /x\n";
const COPY: &str = "FROM busybox\nCOPY file /file\n";

#[test]
fn sandbox_a_disk_that_fills_while_a_base_is_fetched_or_unpacked() {
    let upstream = upstream!();
    for (dockerfile, options, said, of) in [
        (
            RUN,
            "size=256k",
            "writing \"bin/busybox\" of the layer",
            "of 256 KiB",
        ),
        (COPY, "size=256k", "listing layer sha256:", "of 256 KiB"),
        (
            RUN,
            "size=64m,nr_inodes=60",
            "making the link \"bin/",
            " of 60 inodes",
        ),
    ] {
        let machine = Machine::new(options);
        let files = [("Dockerfile", dockerfile), ("file", "x\n")];
        let context = machine.place.context("context", &files);
        let archive = machine.place.dir.join("image.tar");
        let output = format!("type=oci,dest={}", archive.display());
        let ran = machine.build(&upstream, &context, &["-o", &output]);
        let ran = exits(ran, INTERNAL).says("error: Dockerfile:2:1: ");
        assert!(!archive.exists(), "{options}");
        machine.advises(ran.says(said).says(FULL), of);
        let skeleton = [&SKELETON[..], &["version"]].concat();
        assert_eq!(machine.files(), skeleton, "{options}");
        machine.make_room();
        let digest = machine.digest(&upstream, &context);
        assert_eq!(digest, expected(&upstream, &context), "{options}");
        machine.is_sound();
    }
}

#[test]
fn sandbox_a_disk_that_is_full_from_the_start() {
    let upstream = upstream!();
    let machine = Machine::new("size=1m,nr_inodes=5");
    let context = machine.place.context("context", &[("Dockerfile", RUN)]);
    let ran = machine.build(&upstream, &context, &["-o", "type=cacheonly"]);
    let ran = exits(ran, INTERNAL).says(FULL).says("error: creating ");
    machine.advises(ran, "0 of 5 inodes");
    // What was begun is no store of another version.
    machine.make_room();
    let digest = machine.digest(&upstream, &context);
    assert_eq!(digest, expected(&upstream, &context));
    machine.is_sound();
    // And a store that is as it should be is on a disk that somebody else fills.
    machine.shell("mount -o remount,nr_inodes=$(stat -f -c '%c - %d' \"$1\" | xargs expr) \"$1\"");
    let before = machine.files();
    let ran = machine.build(&upstream, &context, &["-o", "type=cacheonly"]);
    machine.advises(exits(ran, INTERNAL).says(FULL), "0 of ");
    assert_eq!(machine.files(), before);
    machine.make_room();
    let ran = machine.build(&upstream, &context, &["-o", "type=cacheonly"]);
    ran.success().says("CACHED");
}

#[test]
fn sandbox_a_disk_that_a_step_fills_is_the_steps_failure() {
    let upstream = upstream!();
    for (step, options, said) in [
        (
            "dd if=/dev/zero of=/x bs=1000000 count=20",
            "size=8m",
            "No space left on device",
        ),
        (
            "mkdir /d; i=0; while [ $i -lt 2000 ]; do : > /d/$i || exit 1; i=$((i+1)); done",
            "size=64m,nr_inodes=800",
            "No space left on device",
        ),
    ] {
        let machine = Machine::new(options);
        let dockerfile = format!("FROM busybox\nRUN --network=none {step}\n");
        let context = machine
            .place
            .context("context", &[("Dockerfile", &dockerfile)]);
        // The base has room, and stays.
        let before = {
            let base = machine.place.context("base", &[("Dockerfile", RUN)]);
            machine.digest(&upstream, &base);
            machine.files()
        };
        let ran = machine.build(&upstream, &context, &["-o", "type=cacheonly"]);
        exits(ran, STEP_FAILED)
            .says(said)
            .says("did not complete successfully: exit code: 1")
            .does_not_say("hint: the disk");
        assert_eq!(machine.files(), before, "{options}");
        machine.make_room();
        let digest = machine.digest(&upstream, &context);
        assert_eq!(digest, expected(&upstream, &context), "{options}");
        machine.is_sound();
    }
}

#[test]
fn sandbox_a_disk_that_fills_while_a_layer_is_sealed() {
    let upstream = upstream!();
    for (dockerfile, size) in [
        (
            "FROM busybox\nRUN --network=none --mount=type=bind,target=/mnt cp /mnt/file /file\n",
            "size=16m",
        ),
        (COPY, "size=4m"),
    ] {
        let machine = Machine::new(size);
        let context = machine
            .place
            .context("context", &[("Dockerfile", dockerfile)]);
        std::fs::write(context.join("file"), noise(6_000_000)).expect("ours");
        let ran = machine.build(&upstream, &context, &["-o", "type=cacheonly"]);
        let ran = exits(ran, INTERNAL).says("writing the layer: ").says(FULL);
        machine.advises(ran, " KiB free of ");
        machine.is_sound();
        let steps = machine.files();
        let steps = steps.iter().filter(|name| name.starts_with("cache/steps/"));
        assert_eq!(steps.count(), 0, "no step is done");
        machine.make_room();
        let digest = machine.digest(&upstream, &context);
        assert_eq!(digest, expected(&upstream, &context), "{dockerfile}");
        machine.is_sound();
    }
}

#[test]
fn sandbox_an_output_on_a_full_disk_leaves_what_was_there() {
    let upstream = upstream!();
    let machine = Machine::new("size=64m");
    let context = machine.place.context("context", &[("Dockerfile", RUN)]);
    let listed = || machine.shell("cd \"$2\" && find . -mindepth 1 -printf '%P %s\\n' | sort");
    machine.shell("echo old > \"$2\"/file; mkdir \"$2\"/dir");
    let before = listed();
    let out = machine.out.display().to_string();
    for kind in ["oci", "docker", "tar"] {
        let output = format!("type={kind},dest={out}/file");
        let ran = machine.build(&upstream, &context, &["-o", &output]);
        let ran = exits(ran, INTERNAL).says(&format!("error: writing {out}/file: "));
        ran.says(FULL)
            .says(&format!("hint: the disk of {out}/file has "))
            .says(" KiB free of 64 KiB and ")
            .says("; make room there, or write the output elsewhere")
            .does_not_say("sockless prune");
        assert_eq!(listed(), before, "{kind}");
    }
    let output = format!("type=oci,tar=false,dest={out}/layout");
    let ran = machine.build(&upstream, &context, &["-o", &output]);
    exits(ran, INTERNAL)
        .says(FULL)
        .says(&format!("hint: the disk of {out}/layout has "));
    assert_eq!(listed(), before, "a layout");
    // A directory takes the files one by one, each whole or not at all.
    let output = format!("type=local,dest={out}/dir");
    let ran = machine.build(&upstream, &context, &["-o", &output]);
    let ran = exits(ran, INTERNAL).says(&format!("writing \"bin/busybox\" to {out}/dir: {FULL}"));
    ran.says(&format!("hint: the disk of {out}/dir has "));
    let name = machine.shell("find \"$2\" -name busybox -o -name '.sockless*'");
    assert_eq!(name, "");
    // The build itself is done.
    machine.shell("mount -o remount,size=64m \"$2\"");
    let output = format!("type=oci,dest={out}/file");
    let ran = machine.build(&upstream, &context, &["-o", &output]);
    ran.success().says("CACHED");
    let length: u64 = machine
        .shell("stat -c %s \"$2\"/file")
        .trim()
        .parse()
        .expect("a number");
    assert!(length > 100_000, "{length}");
    machine.is_sound();
}

#[test]
fn sandbox_a_store_or_an_output_that_is_read_only() {
    let upstream = upstream!();
    let machine = Machine::new("size=64m");
    let context = machine.place.context("context", &[("Dockerfile", RUN)]);
    let read_only = "mount --bind \"$1\" \"$1\" && mount -o remount,bind,ro \"$1\"";
    let advice = format!(
        "hint: the store {} is on a file system that is mounted read-only; give a directory that \
         can be written to with --root DIR or SOCKLESS_ROOT\n",
        machine.store.display()
    );
    // Once while there is none in it, and once while there is one.
    for has_store in [false, true] {
        if has_store {
            machine.digest(&upstream, &context);
        }
        let before = machine.files();
        machine.shell(read_only);
        let ran = machine.build(&upstream, &context, &["-o", "type=cacheonly"]);
        exits(ran, INTERNAL)
            .says("Read-only file system (os error 30)")
            .says(&advice);
        for args in [&["prune"][..], &["du"], &["ls"], &["store", "verify"]] {
            let ran = machine.sockless(args);
            if has_store {
                exits(ran, INTERNAL)
                    .says("Read-only file system")
                    .says(&advice);
            } else {
                ran.success();
            }
        }
        assert_eq!(machine.files(), before);
        machine.shell("umount \"$1\"");
    }
    let ran = machine.build(&upstream, &context, &["-o", "type=cacheonly"]);
    ran.success().says("CACHED");

    machine.shell("mount -o remount,ro \"$2\"");
    let dest = machine.out.join("image.tar").display().to_string();
    let output = format!("type=oci,dest={dest}");
    let ran = machine.build(&upstream, &context, &["-o", &output]);
    exits(ran, INTERNAL)
        .says("Read-only file system (os error 30)")
        .says("is on a file system that is mounted read-only; write the output elsewhere\n");
    machine.is_sound();
}

/// What a shell does that hides programs, wherever they are installed.
const HIDE: &str = "for name; do for dir in /usr/local/sbin /usr/local/bin /usr/sbin /usr/bin /sbin /bin; do \
                    if [ -f $dir/$name ]; then mount --bind /dev/null $dir/$name; fi; done; done";

#[test]
fn sandbox_programs_that_are_missing_are_named() {
    let upstream = upstream!();
    let machine = Machine::new("size=64m");
    let context = machine.place.context("context", &[("Dockerfile", RUN)]);
    let build = |args: &[&str]| {
        let args = [&["-o", "type=cacheonly", "--no-cache"], args].concat();
        machine.build(&upstream, &context, &args)
    };
    let hide = |programs: &str| machine.shell(&format!("set -- {programs}; {HIDE}"));
    hide("bwrap");
    let ran = exits(build(&["--sandbox=bwrap"]), NO_SANDBOX);
    ran.says("error: Dockerfile:2:1: no sandbox works here: bwrap is not installed\n")
        .says("hint: install bubblewrap (package `bubblewrap`)\n");
    let before = machine.files();
    hide("runc crun");
    for (sandbox, advice) in [
        ("runc", "hint: install the package `runc`\n"),
        ("crun", "hint: install the package `crun`\n"),
    ] {
        let said = format!("no sandbox works here: {sandbox} is not installed\n");
        let ran = exits(build(&[&format!("--sandbox={sandbox}")]), NO_SANDBOX);
        ran.says(&said).says(advice);
    }
    let ran = exits(build(&[]), NO_SANDBOX);
    ran.says(
        "no sandbox works here: bwrap is not installed; runc is not installed; crun is not installed\n",
    )
    .says("hint: install bubblewrap (package `bubblewrap`)\n");
    assert_eq!(machine.files(), before);
    machine.is_sound();
    // With the programs back, the same store is built on.
    machine.shell(
        "for name in bwrap runc crun; do for dir in /usr/local/sbin /usr/local/bin /usr/sbin /usr/bin; do \
         if [ -c $dir/$name ]; then umount $dir/$name; fi; done; done",
    );
    build(&[]).success();
    machine.is_sound();
}

#[test]
fn sandbox_a_store_of_a_future_version_is_left_as_it_is() {
    let upstream = upstream!();
    let machine = Machine::new("size=64m");
    let context = machine.place.context("context", &[("Dockerfile", RUN)]);
    machine.digest(&upstream, &context);
    machine.shell("echo 3 > \"$1\"/version");
    let before = machine.files();
    let expected = format!(
        "error: the store {} is of version \"3\", and this sockless reads version \"2\": another \
         one made it; use that, or give another directory with --root DIR or SOCKLESS_ROOT\n",
        machine.store.display()
    );
    let ran = machine.build(&upstream, &context, &["-o", "type=cacheonly"]);
    exits(ran, INTERNAL).says(&expected);
    for args in [
        &["prune", "--all"][..],
        &["du"],
        &["ls"],
        &["store", "verify", "--repair"],
    ] {
        let ran = exits(machine.sockless(args), INTERNAL);
        assert_eq!(ran.stderr, expected, "{args:?}");
    }
    assert_eq!(machine.files(), before);
    machine.shell("echo 2 > \"$1\"/version");
    let ran = machine.build(&upstream, &context, &["-o", "type=cacheonly"]);
    ran.success().says("CACHED");
}
