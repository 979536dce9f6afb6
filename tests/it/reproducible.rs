//! The same inputs give the same bytes: on every number of cores, in every sandbox, with every way
//! to make a root filesystem, for every user, wherever and whenever it is built.

use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::{PermissionsExt as _, lchown};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime};

use crate::support::images;
use crate::support::oci::Image;
use crate::support::process::run;
use crate::support::registry::Registry;
use crate::support::sockless::{Place, program};
use crate::support::web::Web;
use crate::support::{is_root, namespaces, programs};

/// The registry of base images, or the end of the test.
macro_rules! upstream {
    () => {{
        needs!(programs(&["bwrap", "runc"]), namespaces());
        match images::busybox() {
            Ok(registry) => registry,
            Err(reason) => skip!("{reason}"),
        }
    }};
}

/// Seconds since 1970; earlier than everything that the tests make.
const DATE: &str = "1700000000";

/// What starts a program in a user namespace with one ID.
const ONE_ID: &[&str] = &["unshare", "--user", "--map-root-user"];

/// What a step may do to files of its own and of layers below. Each is a layer.
const STEPS: &[&str] = &[
    "true",
    "mkdir -p /opt/d/sub /opt/h && echo 1 > /opt/d/a && echo 2 > /opt/d/sub/b && echo 3 > /opt/h/a \
     && ln /opt/h/a /opt/h/hard && ln -s a /opt/h/soft && ln /opt/h/a /opt/again",
    "echo new > /etc/new && echo more >> /etc/group",
    // Opened for writing and left as it was; and written with what it had.
    ": >> /etc/base",
    "cp -p /etc/passwd /tmp/x && cat /tmp/x > /etc/passwd && touch -r /tmp/x /etc/passwd && rm /tmp/x",
    // Names of one file below.
    "echo more >> /opt/h/hard",
    "chmod 600 /opt/again",
    "ln /opt/h/a /opt/h/third && ln /etc/base /etc/base2",
    "chown 1000:1001 /opt/h/a /opt/h/hard && ln /opt/h/hard /opt/h/fourth",
    // Files and directories that move.
    "mv /etc/new /etc/moved && mv /opt/d /opt/e && mv /opt/e/a /opt/e/sub/a",
    "mkdir /opt/n && echo 5 > /opt/n/f && mv /opt/n /opt/m",
    // Removed, and made again.
    "rm -r /opt/e/sub && mkdir /opt/e/sub && echo 4 > /opt/e/sub/c",
    "rm -r /opt/e && mkdir -p /opt/e/sub",
    "rm -r /opt/e && echo file > /opt/e",
    "rm /opt/e && mkdir /opt/e && echo 1 > /opt/e/a",
    "rm /etc/base2 && echo 6 > /opt/gone && rm /opt/gone",
    // Nothing but metadata.
    "touch /opt/h",
    "touch /opt/m/f",
    "chmod 750 /opt/h && chmod 2755 /opt/m",
    "chown -R 7:8 /opt",
    "cp /bin/busybox /opt/suid && chmod 4755 /opt/suid",
    "chown 5:6 /opt/suid",
    // Kinds of files.
    "busybox mkfifo /opt/pipe && ln -s /nowhere /opt/soft",
    "echo x | dd of=/opt/sparse bs=1 seek=5000000 && echo y > \"/opt/$(printf '\\303\\274\\001 ')\"",
    "rm /opt/soft && mkdir /opt/soft && echo 7 > /opt/soft/x",
    "d=/deep; for n in $(seq 40); do d=$d/nnnnnnnnnnnnnnnnnnnnnnnnnnnn; done; mkdir -p $d && echo 8 > $d/f",
    "rm -r /deep/* && rm -r /opt/h /opt/m",
];

/// Stages with a step of each kind, and everything that makes layers.
const DOCKERFILE: &str = "\
FROM busybox AS first
WORKDIR /made/by/workdir
COPY --chown=11:12 tree /copied
ADD archive.tar /added
RUN echo one > f && ln f g && chmod 640 /copied/script && rm /added/linked && mkdir /added/d2
RUN mv /copied/sub /copied/moved && chown -R 3:4 /added && rm -r /made/by && mkdir -p /made/by/hand
FROM busybox AS second
RUN --mount=type=bind,from=first,source=/copied,target=/mnt cp -a /mnt /kept && head -c 300000 /bin/busybox > /big
FROM first
COPY --from=second /kept /from/second
COPY --link --from=second --chmod=444 /big /linked/
COPY <<EOT /inline
text
EOT
RUN --mount=type=cache,target=/cache --mount=type=tmpfs,target=/scratch \
    echo x > /cache/x && cp /cache/x /from/cache && touch /scratch/y && chmod 700 /from && rm -r /made
";

/// A context of the Dockerfile and what it copies, with `time` on every file.
fn context(dir: &Path, dockerfile: &str, time: SystemTime) {
    fs::create_dir_all(dir.join("tree/sub")).expect("ours");
    let file = |name: &str, content: &[u8], mode: u32| {
        let path = dir.join(name);
        fs::write(&path, content).expect("ours");
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).expect("ours");
    };
    file("Dockerfile", dockerfile.as_bytes(), 0o644);
    file("tree/script", b"#!/bin/sh\n", 0o755);
    file("tree/sub/data", &[7; 100_000], 0o600);
    file("tree/sub/\u{fc}", b"", 0o644);
    file("archive.tar", &archive(), 0o644);
    if !dir.join("tree/link").is_symlink() {
        std::os::unix::fs::symlink("script", dir.join("tree/link")).expect("ours");
    }
    for name in [
        "tree/script",
        "tree/sub/data",
        "tree/sub/\u{fc}",
        "tree/sub",
        "tree",
    ] {
        let path = dir.join(name);
        if path.is_dir() {
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("ours");
        }
        let file = fs::File::open(path).expect("ours");
        file.set_modified(time).expect("ours");
    }
}

/// A tar with owners, a hard link, a symbolic link and an extended attribute.
fn archive() -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    let header = |kind: tar::EntryType, mode: u32, size: usize| {
        let mut header = tar::Header::new_ustar();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_uid(21);
        header.set_gid(22);
        header.set_mtime(1_600_000_000);
        header.set_size(size as u64);
        header
    };
    let mut dir = header(tar::EntryType::Directory, 0o750, 0);
    (tar.append_data(&mut dir, "d/", &b""[..])).expect("memory");
    (tar.append_pax_extensions([("SCHILY.xattr.user.k", &b"v"[..])])).expect("memory");
    let mut file = header(tar::EntryType::Regular, 0o4711, 4);
    (tar.append_data(&mut file, "d/file", &b"text"[..])).expect("memory");
    let mut link = header(tar::EntryType::Link, 0o4711, 0);
    (tar.append_link(&mut link, "linked", "d/file")).expect("memory");
    (tar.append_link(&mut link, "d/again", "d/file")).expect("memory");
    let mut soft = header(tar::EntryType::Symlink, 0o777, 0);
    (tar.append_link(&mut soft, "soft", "d/file")).expect("memory");
    tar.into_inner().expect("memory")
}

/// A build of a context in a place of its own, as flags and variables have it.
struct Variant<'v> {
    before: &'v [&'v str],
    args: &'v [&'v str],
    env: &'v [(&'v str, &'v str)],
    uid: Option<u32>,
}

impl Variant<'_> {
    const PLAIN: Self = Variant {
        before: &[],
        args: &[],
        env: &[],
        uid: None,
    };

    /// Builds `context`, a directory or an address, into an archive. Reads it.
    #[track_caller]
    fn build(&self, upstream: &Registry, context: &Path) -> Image {
        let place = Place::new();
        // What is given to another user must not be this test's own.
        let mut context = context.to_owned();
        if self.uid.is_some() {
            let copy = place.dir.join("given");
            run(Command::new("cp").arg("-a").arg(&context).arg(&copy)).success();
            context = copy;
        }
        let own = place.dir.join("sockless");
        fs::copy(program(), &own).expect("a copy that everybody reaches");
        let mut before: Vec<String> = Vec::new();
        if let Some(uid) = self.uid {
            give(place.dir.path(), uid);
            let ids = [format!("--reuid={uid}"), format!("--regid={uid}")];
            before.extend(["setpriv".into()].into_iter().chain(ids));
            before.push("--clear-groups".into());
        }
        before.extend(self.before.iter().map(ToString::to_string));
        // In place of the program that comes next.
        let script = format!("shift; exec {} \"$@\"", own.display());
        before.extend(["sh".into(), "-c".into(), script, "sh".into()]);
        let before: Vec<&str> = before.iter().map(String::as_str).collect();
        let archive = place.dir.join("image.tar");
        let mut output = OsString::from("type=oci,dest=");
        output.push(&archive);
        let mut command = place.wrapped(&before);
        command.env_remove("SOCKLESS_ROOTFS");
        command.envs(self.env.iter().copied());
        command.args(["build", "--progress", "plain", "--registry-mirror"]);
        command.arg(format!("docker.io={}", upstream.url()));
        command.args(self.args).arg("-o").arg(output).arg(context);
        run(&mut command).success();
        place.archive(&archive)
    }
}

/// Makes a directory and everything in it another user's.
fn give(path: &Path, uid: u32) {
    lchown(path, Some(uid), Some(uid)).expect("root can");
    if path.is_dir() && !path.is_symlink() {
        for entry in fs::read_dir(path).expect("ours") {
            give(&entry.expect("ours").path(), uid);
        }
    }
}

fn work(name: &str) -> (crate::support::dir::TestDir, PathBuf) {
    let dir = crate::support::dir::TestDir::new(name);
    let path = dir.dir("context");
    (dir, path)
}

/// The layers that are not the same, by number, with what differs in them.
fn differences(a: &Image, b: &Image) -> Vec<String> {
    let mut all = Vec::new();
    for (at, (left, right)) in a.layers.iter().zip(&b.layers).enumerate() {
        if left.digest == right.digest {
            continue;
        }
        let lines = |layer: &crate::support::oci::Layer| -> Vec<String> {
            layer.entries.iter().map(|e| format!("{e:?}")).collect()
        };
        let (left, right) = (lines(left), lines(right));
        let only = |sign: char, a: &[String], b: &[String]| -> Vec<String> {
            let only = a.iter().filter(|line| !b.contains(line));
            only.map(|line| format!("{sign} {line}")).collect()
        };
        let lines = [only('-', &left, &right), only('+', &right, &left)].concat();
        all.push(format!("layer {at}:\n{}", lines.join("\n")));
    }
    if a.layers.len() != b.layers.len() {
        all.push("the number of layers".into());
    }
    if a.config != b.config {
        all.push(format!("config:\n{}\n{}", a.config, b.config));
    }
    all
}

#[test]
fn sandbox_copies_give_the_layers_of_overlays() {
    let upstream = upstream!();
    let (_dir, path) = work("steps");
    let mut dockerfile = "FROM busybox\n".to_owned();
    for step in STEPS {
        dockerfile += &format!("RUN {step}\n");
    }
    context(&path, &dockerfile, SystemTime::now());
    let build = |rootfs: &str, before: &[&str]| {
        let args = ["--rootfs", rootfs];
        let env = [("SOURCE_DATE_EPOCH", DATE)];
        let variant = Variant {
            before,
            args: &args,
            env: &env,
            ..Variant::PLAIN
        };
        variant.build(&upstream, &path)
    };
    let overlay = build("overlay", &[]);
    assert_eq!(overlay.layers.len(), STEPS.len() + 1);
    for (rootfs, before) in [("copy", &[][..]), ("overlay", ONE_ID), ("copy", ONE_ID)] {
        let other = build(rootfs, before);
        let differences = differences(&overlay, &other);
        let what = format!("{rootfs} {before:?}");
        assert!(differences.is_empty(), "{what}: {}", differences.join("\n"));
        assert_eq!(overlay.digest, other.digest, "{what}");
    }
    // The steps did what they are there for.
    assert_eq!(overlay.layers[1].entries.len(), 0);
    assert_eq!(overlay.layers[4].entries.len(), 0);
    let written: Vec<&str> = overlay.layers[6]
        .entries
        .iter()
        .map(|e| e.path.as_str())
        .collect();
    assert_eq!(written, ["opt", "opt/h", "opt/h/hard"]);
}

#[test]
fn sandbox_the_same_inputs_give_the_same_manifest() {
    let upstream = upstream!();
    let (dir, path) = work("same");
    let year = Duration::from_secs(365 * 86400);
    context(&path, DOCKERFILE, SystemTime::now());
    let dated = [("SOURCE_DATE_EPOCH", DATE)];
    let plain = Variant {
        env: &dated,
        ..Variant::PLAIN
    };
    let want = plain.build(&upstream, &path);
    let linked = want.entry("added/d/again").expect("of the archive");
    assert_eq!(linked.mtime, 1_600_000_000);
    let file = want.entry("added/d/file").expect("of the archive");
    let attribute = file
        .extensions
        .get("SCHILY.xattr.user.k")
        .map(Vec::as_slice);
    assert_eq!(attribute, Some(&b"v"[..]), "{file:?}");

    let check = |what: &str, variant: &Variant<'_>, context: &Path| {
        let got = variant.build(&upstream, context);
        let differences = differences(&want, &got);
        assert!(differences.is_empty(), "{what}: {}", differences.join("\n"));
        assert_eq!(got.digest, want.digest, "{what}");
    };
    let with_args = |args: &'static [&'static str]| Variant {
        args,
        ..Variant {
            env: &dated,
            ..Variant::PLAIN
        }
    };
    check("again, later", &plain, &path);
    check("copies", &with_args(&["--rootfs", "copy"]), &path);
    check("runc", &with_args(&["--sandbox", "runc"]), &path);
    check(
        "runc, copies",
        &with_args(&["--sandbox", "runc", "--rootfs", "copy"]),
        &path,
    );
    // Only root's crun can put a process anywhere without a systemd of the user.
    if is_root() && programs(&["crun"]).is_ok() {
        check("crun", &with_args(&["--sandbox", "crun"]), &path);
    }
    let one_core = Variant {
        before: &["taskset", "-c", "0"],
        env: &dated,
        ..Variant::PLAIN
    };
    check("one core", &one_core, &path);
    let one_core = Variant {
        args: &["--rootfs", "copy"],
        ..one_core
    };
    check("one core, copies", &one_core, &path);

    // Another directory and umask, files that are older, another place on earth.
    let elsewhere = dir.dir("some/where else");
    context(&elsewhere, DOCKERFILE, SystemTime::now() - year / 2);
    let strange = [
        dated[0],
        ("TZ", "Pacific/Kiritimati"),
        ("LC_ALL", "tr_TR.UTF-8"),
        ("LANG", "de_DE.UTF-8"),
        ("USER", "somebody"),
        ("HOSTNAME", "elsewhere"),
    ];
    let strange = Variant {
        before: &["sh", "-c", "umask 077; exec \"$@\"", "sh"],
        env: &strange,
        ..Variant::PLAIN
    };
    check("elsewhere", &strange, &elsewhere);
    let strange = Variant {
        args: &["--rootfs", "copy"],
        ..strange
    };
    check("elsewhere, copies", &strange, &elsewhere);

    // One ID only: users and owners are made up.
    for args in [
        &["--rootfs", "overlay"][..],
        &["--rootfs", "copy"],
        &["--sandbox", "runc"],
    ] {
        let single = Variant {
            before: ONE_ID,
            args,
            env: &dated,
            ..Variant::PLAIN
        };
        check(&format!("one ID, {args:?}"), &single, &path);
    }

    // Another user.
    if is_root() {
        let Some(uid) = crate::sandbox::mapped_users().first().copied() else {
            skip!("no user has lines in /etc/subuid and /etc/subgid");
        };
        for rootfs in ["overlay", "copy"] {
            let user = Variant {
                args: &["--rootfs", rootfs],
                env: &dated,
                uid: Some(uid),
                ..Variant::PLAIN
            };
            check(&format!("user {uid}, {rootfs}"), &user, &path);
        }
    }
}

#[test]
fn compose_copied_layers_are_the_same_without_a_date() {
    let upstream = match images::busybox() {
        Ok(registry) => registry,
        Err(reason) => skip!("{reason}"),
    };
    let (dir, path) = work("layers");
    let dockerfile = "FROM scratch\nCOPY --chown=1:2 tree /a/b\nADD archive.tar /c\nWORKDIR /d/e\nCOPY tree/sub .\n";
    let time = SystemTime::now() - Duration::from_secs(86400);
    context(&path, dockerfile, time);
    let elsewhere = dir.dir("elsewhere");
    context(&elsewhere, dockerfile, time);
    let digests = |variant: &Variant<'_>, context: &Path| -> Vec<String> {
        let image = variant.build(&upstream, context);
        image.layers.into_iter().map(|layer| layer.digest).collect()
    };
    // A link's own time cannot be set by this test's means, so it must not be there.
    for context in [&path, &elsewhere] {
        fs::remove_file(context.join("tree/link")).expect("ours");
        let tree = fs::File::open(context.join("tree")).expect("ours");
        tree.set_modified(time).expect("ours");
    }
    let want = digests(&Variant::PLAIN, &path);
    assert_eq!(want.len(), 4);
    let umask = Variant {
        before: &["sh", "-c", "umask 027; exec \"$@\"", "sh"],
        ..Variant::PLAIN
    };
    assert_eq!(digests(&umask, &elsewhere), want);
    let one_core = Variant {
        before: &["taskset", "-c", "0"],
        ..Variant::PLAIN
    };
    assert_eq!(digests(&one_core, &elsewhere), want);
}

#[test]
fn sandbox_a_commit_gives_the_same_manifest_everywhere() {
    let upstream = upstream!();
    needs!(programs(&["git"]));
    let web = Web::start();
    let repository = web.repository("same");
    context(&repository.path, DOCKERFILE, SystemTime::now());
    repository.git(&["add", "-A"]);
    repository.git_at(1_700_000_101, &["commit", "-q", "-m", "dated"]);
    let address = PathBuf::from(format!("{}/same/.git", web.url));
    let build = |args: &[&str]| {
        let mut all = vec!["--build-arg", "SOURCE_DATE_EPOCH=context"];
        all.extend(args);
        let variant = Variant {
            args: &all,
            ..Variant::PLAIN
        };
        variant.build(&upstream, &address)
    };
    let want = build(&["--rootfs", "overlay"]);
    assert_eq!(want.config["created"], "2023-11-14T22:15:01Z");
    let got = build(&["--rootfs", "copy", "--sandbox", "runc"]);
    let differences = differences(&want, &got);
    assert!(differences.is_empty(), "{}", differences.join("\n"));
    assert_eq!(got.digest, want.digest);
}
