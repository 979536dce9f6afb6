//! `sockless doctor` on hosts that are broken for it: what it says is missing, and that the line
//! which it says unlocks it does.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use crate::support::container::{self, CAPABILITIES};
use crate::support::process::{Ran, run};
use crate::support::registry::{Options, Registry};
use crate::support::sockless::{Place, program};
use crate::support::{find_program, images, is_root, namespaces, programs};

/// Ends the test where only root can make the host: an ordinary user's run may leave it to root's
/// that follows.
macro_rules! needs_root {
    () => {
        if !is_root() {
            let follows = std::env::var_os("SOCKLESS_TEST_ROOT_FOLLOWS");
            if follows.is_some_and(|value| value == "1") {
                eprintln!("skipped: only root can hide files of the host");
                return;
            }
            skip!("only root can hide files of the host");
        }
    };
}

/// The exit status where no RUN would work.
const NO_SANDBOX: i32 = 4;
/// A user number that nobody has.
const NOBODYS_UID: u32 = 54_321;

/// A place that every user may use, with a copy of the program that every user can reach.
struct Host {
    place: Place,
    program: PathBuf,
}

impl Host {
    fn new() -> Self {
        let place = Place::new();
        let copy = place.dir.join("sockless");
        std::fs::copy(program(), &copy).expect("room for a copy");
        open_to_all(&copy);
        for name in ["", "home", "tmp", "run", "docker", "store"] {
            open_to_all(&place.dir.join(name));
        }
        // Where the suite has temporary files of its own, others may pass through to these.
        let above = place.dir.path().parent().expect("it is in a directory");
        let mode = std::fs::metadata(above)
            .expect("there")
            .permissions()
            .mode();
        if mode & 0o011 != 0o011 {
            let open = std::fs::Permissions::from_mode(mode | 0o011);
            std::fs::set_permissions(above, open).expect("ours");
        }
        Self {
            place,
            program: copy,
        }
    }

    /// `doctor` as the user of the tests has it.
    fn here(&self, args: &[&str]) -> Ran {
        run(self.place.command().arg("doctor").args(args))
    }

    /// `doctor` behind other words.
    fn behind(&self, words: &[String], args: &[&str]) -> Ran {
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        run(self.place.wrapped(&words).arg("doctor").args(args))
    }

    /// `doctor` by root's `words` (`setpriv` and such) after `setup` in a mount namespace.
    fn after(&self, setup: &str, words: &str, args: &[&str]) -> Ran {
        run(&mut self.after_command(setup, words, args))
    }

    fn after_command(&self, setup: &str, words: &str, args: &[&str]) -> Command {
        let script = format!("{setup}\nexec {words} {} \"$@\"", self.program.display());
        let unshare = if is_root() {
            "unshare --mount --propagation private sh -euc"
        } else {
            "unshare --user --map-root-user --map-auto --mount sh -euc"
        };
        let words: Vec<&str> = unshare.split(' ').chain([script.as_str()]).collect();
        // The program's name becomes that of the script.
        let mut command = self.place.wrapped(&words);
        command.arg("doctor").args(args);
        command
    }

    /// That nothing was left in the store, or beside it.
    #[track_caller]
    fn is_untouched(&self) {
        for name in ["store", "tmp"] {
            let dir = self.place.dir.join(name);
            let left: Vec<_> = std::fs::read_dir(dir).expect("ours").collect();
            assert!(left.is_empty(), "{name}: {left:?}");
        }
    }
}

fn open_to_all(path: &Path) {
    let open = std::fs::Permissions::from_mode(0o777);
    std::fs::set_permissions(path, open).expect("it is ours");
}

#[track_caller]
fn document(ran: &Ran) -> Value {
    // In a container, the program that set the filter has said something before.
    let at = ran.stdout.find("{\n").unwrap_or(0);
    serde_json::from_str(&ran.stdout[at..]).unwrap_or_else(|error| panic!("{error}: {ran:?}"))
}

/// The words that have root's command run by `uid`.
fn by(uid: u32) -> String {
    format!("setpriv --reuid={uid} --regid={uid} --clear-groups")
}

/// Whether a rung, from 1, works.
#[track_caller]
fn works(document: &Value, rung: usize) -> bool {
    document["rungs"][rung - 1]["works"]
        .as_bool()
        .expect("yes or no")
}

/// What a rung lacks.
fn lacks(document: &Value, rung: usize) -> &Value {
    &document["rungs"][rung - 1]["lacks"]
}

const JSON: &[&str] = &["--json", "--offline"];

#[test]
fn doctor_says_what_a_build_takes() {
    needs!(programs(&["bwrap"]), namespaces());
    let upstream = match images::busybox() {
        Ok(registry) => registry,
        Err(reason) => skip!("{reason}"),
    };
    let host = Host::new();
    let ran = host.here(JSON).success();
    host.is_untouched();
    let found = document(&ran);
    assert_eq!(found["version"], 1);
    let uid = rustix::process::geteuid().as_raw();
    assert_eq!(found["user"]["uid"], uid);
    let names: Vec<_> = (0..5)
        .map(|at| found["rungs"][at]["name"].clone())
        .collect();
    assert_eq!(
        names,
        ["root", "mapped-user", "single-id", "chroot", "traced"]
    );
    let rung = if is_root() { 1 } else { 2 };
    let build = &found["build"];
    assert_eq!(
        (&build["works"], &build["rung"]),
        (&json!(true), &json!(rung))
    );
    assert!(works(&found, rung), "{found}");
    if !is_root() {
        let reason = json!([{
            "reason": format!("uid {uid} is not root"), "call": null, "errno": null,
            "setting": null, "unlock": "sudo sockless build …",
        }]);
        assert_eq!(*lacks(&found, 1), reason);
        assert_eq!(*lacks(&found, 4), reason);
    }
    // A build takes just that.
    let context = host.place.context(
        "context",
        &[(
            "Dockerfile",
            "FROM busybox\nRUN grep -c . /proc/net/route || true\n",
        )],
    );
    let built = host.place.build(&upstream, &context, &[]).success();
    let sandbox = build["sandbox"].as_str().expect("a name");
    let shares = built.stderr.contains("RUN steps share the host's network");
    let copies = built.stderr.contains("RUN steps work on copies");
    let built = built.says(&format!("RUN steps run in {sandbox}"));
    assert_eq!(shares, build["network"] == "host", "{built:?}");
    if std::env::var_os("SOCKLESS_ROOTFS").is_none() {
        assert_eq!(copies, build["rootfs"] == "copy", "{built:?}");
    }
    let inside = &found["inside"];
    let bwrap = &inside["sandboxes"][0];
    assert_eq!(
        (&bwrap["name"], &bwrap["works"]),
        (&json!("bwrap"), &json!(true))
    );
    let version = bwrap["version"].as_str().expect("a version");
    assert!(version.starts_with("bubblewrap "), "{version}");
    assert!(inside["store"]["free_bytes"].as_u64().expect("room") > 0);
    assert_eq!(found["registries"], json!([]));
}

#[test]
fn doctor_names_missing_lines_and_these_lines_give_a_rung() {
    needs_root!();
    needs!(programs(&["newuidmap", "setpriv", "unshare", "bwrap"]));
    let host = Host::new();
    for file in ["subuid", "subgid"] {
        host.place.dir.file(file, "somebody:100000:65536\n");
    }
    let passwd = std::fs::read("/etc/passwd").expect("every machine has one");
    host.place.dir.file("passwd", passwd);
    let dir = host.place.dir.path().display().to_string();
    let setup = format!(
        "mount --bind {dir}/subuid /etc/subuid; mount --bind {dir}/subgid /etc/subgid; \
         mount --bind {dir}/passwd /etc/passwd"
    );
    let broken = host.after(&setup, &by(NOBODYS_UID), JSON);
    let found = document(&broken.success());
    host.is_untouched();
    let line = |file| {
        json!({
            "reason": format!("{file} has no line for user {NOBODYS_UID}"), "call": null, "errno": null,
            "setting": file, "unlock": format!("echo '{NOBODYS_UID}:165536:65536' >> {file}"),
        })
    };
    let name = json!({
        "reason": format!(
            "uid {NOBODYS_UID} has no line in /etc/passwd, without which newuidmap gives it nothing"
        ),
        "call": null, "errno": null, "setting": "/etc/passwd",
        "unlock": format!(
            "echo 'sockless:x:{NOBODYS_UID}:{NOBODYS_UID}::/:/sbin/nologin' >> /etc/passwd"
        ),
    });
    let expected = json!([name, line("/etc/subuid"), line("/etc/subgid")]);
    assert_eq!(*lacks(&found, 2), expected);
    assert_eq!(
        (works(&found, 3), &found["build"]["rung"]),
        (true, &json!(3))
    );

    let unlock = |at: usize| lacks(&found, 2)[at]["unlock"].as_str().expect("a line");
    let unlocked = [&setup, unlock(0), unlock(1), unlock(2)]
        .map(String::from)
        .join("\n");
    let found = document(&host.after(&unlocked, &by(NOBODYS_UID), JSON).success());
    assert!(works(&found, 2), "{found}");
    assert_eq!(found["build"]["rung"], 2);
    assert_eq!(found["inside"]["users"], 65_537);
}

#[test]
fn doctor_names_helpers_that_are_missing_or_have_no_privileges() {
    needs_root!();
    needs!(programs(&["newuidmap", "setpriv", "unshare", "bwrap"]));
    let Some(uid) = crate::sandbox::mapped_users().first().copied() else {
        skip!("no user has lines in /etc/subuid and /etc/subgid");
    };
    let host = Host::new();
    let newuidmap = find_program("newuidmap").expect("probed");
    let shown = newuidmap.display();
    let hidden = format!("mount --bind /dev/null {shown}");
    let found = document(&host.after(&hidden, &by(uid), JSON).success());
    assert_eq!(
        *lacks(&found, 2),
        json!([{
            "reason": "newuidmap is not installed", "call": null, "errno": null, "setting": null,
            "unlock": "apt-get install uidmap",
        }])
    );
    assert_eq!(found["build"]["rung"], 3);

    let copy = host.place.dir.join("newuidmap");
    std::fs::copy(&newuidmap, &copy).expect("room for a copy");
    std::fs::set_permissions(&copy, std::fs::Permissions::from_mode(0o755)).expect("ours");
    let replaced = format!("mount --bind {} {shown}", copy.display());
    let found = document(&host.after(&replaced, &by(uid), JSON).success());
    let unlock = format!("chmod u+s {shown}");
    assert_eq!(
        *lacks(&found, 2),
        json!([{
            "reason": format!("{shown} is neither setuid root nor has it capabilities"),
            "call": null, "errno": null, "setting": shown.to_string(), "unlock": unlock,
        }])
    );
    let unlocked = format!("{replaced}\n{unlock}");
    let found = document(&host.after(&unlocked, &by(uid), JSON).success());
    assert!(works(&found, 2), "{found}");
    assert_eq!(found["build"]["rung"], 2);
}

#[test]
fn doctor_says_that_setuid_programs_gain_nothing() {
    needs!(programs(&["setpriv", "newuidmap", "bwrap"]), namespaces());
    let host = Host::new();
    let ran = if is_root() {
        let Some(uid) = crate::sandbox::mapped_users().first().copied() else {
            skip!("no user has lines in /etc/subuid and /etc/subgid");
        };
        host.after("", &format!("{} --no-new-privs", by(uid)), JSON)
    } else {
        host.behind(&["setpriv".into(), "--no-new-privs".into()], JSON)
    };
    let found = document(&ran.success());
    assert_eq!(
        *lacks(&found, 2),
        json!([{
            "reason": "no_new_privs is set: newuidmap and newgidmap gain no privileges",
            "call": null, "errno": null, "setting": "NoNewPrivs = 1",
            "unlock": "Kubernetes: securityContext: {allowPrivilegeEscalation: true}; Docker: \
                       without --security-opt no-new-privileges",
        }])
    );
    assert_eq!(found["guards"]["no_new_privs"], true);
    assert_eq!(
        (works(&found, 3), &found["build"]["rung"]),
        (true, &json!(3))
    );
}

#[test]
fn doctor_says_which_sandbox_is_missing_and_finds_it_in_path() {
    needs!(programs(&["unshare", "bwrap"]), namespaces());
    let host = Host::new();
    let bwrap = find_program("bwrap").expect("probed");
    let bin = host.place.dir.dir("bin");
    std::fs::copy(&bwrap, bin.join("bwrap")).expect("room for a copy");
    open_to_all(&bin.join("bwrap"));
    let hide: Vec<String> = ["bwrap", "runc", "crun", "pasta", "slirp4netns"]
        .iter()
        .filter_map(|name| find_program(name))
        .map(|path| format!("mount --bind /dev/null {}", path.display()))
        .collect();
    let setup = hide.join("\n");
    let ran = host.after(&setup, "", JSON);
    assert_eq!(ran.status.code(), Some(NO_SANDBOX), "{ran:?}");
    host.is_untouched();
    let found = document(&ran);
    let missing = |name, package| {
        json!({
            "reason": format!("{name} is not installed"), "call": null, "errno": null, "setting": null,
            "unlock": format!("apt-get install {package}"),
        })
    };
    let all = json!([
        missing("bwrap", "bubblewrap"),
        missing("runc", "runc"),
        missing("crun", "crun")
    ]);
    assert_eq!(found["build"]["lacks"], all);
    assert_eq!(found["build"]["works"], false);

    let mut again = host.after_command(&setup, "", JSON);
    let ran = run(again.env("PATH", format!("{}:/usr/bin:/bin", bin.display())));
    let found = document(&ran.success());
    assert_eq!(
        found["inside"]["sandboxes"][0]["path"],
        json!(bin.join("bwrap"))
    );
    assert_eq!(found["build"]["sandbox"], "bwrap");
    assert_eq!(found["build"]["network"], "host");
    assert_eq!(
        found["inside"]["networks"][0]["lacks"],
        json!([missing("pasta", "passt")])
    );
}

#[test]
fn doctor_names_the_setting_that_forbids_namespaces() {
    needs!(programs(&["unshare", "setpriv", "bwrap"]), namespaces());
    let host = Host::new();
    let mut before = Vec::new();
    if is_root() {
        let Some(uid) = crate::sandbox::mapped_users().first().copied() else {
            skip!("no user has lines in /etc/subuid and /etc/subgid");
        };
        before.extend(by(uid).split(' ').map(str::to_owned));
    }
    // The setting is one of each user namespace: that of the machine stays.
    let world = |lines: &str| -> Vec<String> {
        let script = format!(
            "echo 0 > /proc/sys/user/max_user_namespaces\n{lines}\n\
             exec setpriv --reuid=1000 --regid=1000 --clear-groups {} \"$@\"",
            host.program.display()
        );
        let unshare = "unshare --user --map-root-user --map-auto --mount sh -euc";
        let words = unshare.split(' ').map(str::to_owned);
        before
            .iter()
            .cloned()
            .chain(words)
            .chain([script])
            .collect()
    };
    let ran = host.behind(&world(""), JSON);
    assert_eq!(ran.status.code(), Some(NO_SANDBOX), "{ran:?}");
    host.is_untouched();
    let found = document(&ran);
    let refused = json!([{
        "reason": "unshare(CLONE_NEWUSER|CLONE_NEWNS): ENOSPC, No space left on device: \
                   user.max_user_namespaces = 0",
        "call": "unshare(CLONE_NEWUSER|CLONE_NEWNS)", "errno": "ENOSPC",
        "setting": "user.max_user_namespaces = 0",
        "unlock": "sysctl -w user.max_user_namespaces=15000",
    }]);
    assert_eq!(*lacks(&found, 3), refused);
    assert_eq!(found["build"]["lacks"], refused);
    assert_eq!(lacks(&found, 2)[0], refused[0]);

    // Not by sysctl(8), which need not be installed.
    let unlock = refused[0]["unlock"].as_str().expect("a line");
    let value = unlock.rsplit_once('=').expect("a value").1;
    let lifted = format!("echo {value} > /proc/sys/user/max_user_namespaces");
    let found = document(&host.behind(&world(&lifted), JSON).success());
    assert_eq!(
        (works(&found, 3), &found["build"]["rung"]),
        (true, &json!(3))
    );
}

#[test]
fn doctor_says_what_a_default_container_forbids() {
    needs_root!();
    needs!(container::possible());
    let host = Host::new();
    let found = document(
        &host
            .behind(&container::words(&CAPABILITIES), JSON)
            .success(),
    );
    host.is_untouched();
    let docker = "docker run --security-opt seccomp=unconfined --security-opt apparmor=unconfined \
                  --security-opt systempaths=unconfined …";
    assert_eq!(
        *lacks(&found, 1),
        json!([{
            "reason": "root has no CAP_SYS_ADMIN", "call": null, "errno": null, "setting": "CapEff",
            "unlock": "docker run --cap-add=SYS_ADMIN --security-opt apparmor=unconfined …",
        }])
    );
    let filtered = json!([{
        "reason": "unshare(CLONE_NEWUSER|CLONE_NEWNS): EPERM, Operation not permitted: a seccomp \
                   filter is set",
        "call": "unshare(CLONE_NEWUSER|CLONE_NEWNS)", "errno": "EPERM", "setting": "Seccomp = 2",
        "unlock": docker,
    }]);
    assert_eq!(*lacks(&found, 2), filtered);
    assert_eq!(*lacks(&found, 3), filtered);
    assert!(works(&found, 4), "{found}");
    assert_eq!(
        found["build"],
        json!({
            "works": true, "rung": 4, "sandbox": "chroot", "rootfs": "copy", "network": "host",
            "network_helper": null, "lacks": [],
        })
    );
}

#[test]
fn doctor_names_each_guard_of_a_restricted_pod() {
    needs_root!();
    needs!(container::possible());
    let host = Host::new();
    let mut words = container::words(&CAPABILITIES);
    words.extend(by(NOBODYS_UID).split(' ').map(str::to_owned));
    let program = format!("exec {} \"$@\"", host.program.display());
    words.extend(["--no-new-privs", "sh", "-c", &program].map(str::to_owned));
    let ran = host.behind(&words, JSON);
    assert_eq!(ran.status.code(), Some(NO_SANDBOX), "{ran:?}");
    host.is_untouched();
    let found = document(&ran);
    for rung in 1..=4 {
        assert!(!works(&found, rung), "{found}");
    }
    let guards = &found["guards"];
    assert_eq!(
        (
            &guards["no_new_privs"],
            &guards["seccomp_filter"],
            &guards["capabilities"]
        ),
        (&json!(true), &json!(true), &json!("0000000000000000"))
    );
    let settings = |rung| -> Vec<&str> {
        let all = lacks(&found, rung).as_array().expect("a list");
        all.iter()
            .map(|lack| lack["setting"].as_str().unwrap_or(""))
            .collect()
    };
    assert_eq!(
        settings(2),
        [
            "Seccomp = 2",
            "NoNewPrivs = 1",
            "/etc/passwd",
            "/etc/subuid",
            "/etc/subgid"
        ]
    );
    assert_eq!(settings(3), ["Seccomp = 2"]);
    assert_eq!(found["build"]["lacks"], *lacks(&found, 3));
}

#[test]
fn doctor_sees_that_a_namespace_has_one_id() {
    needs!(programs(&["unshare", "bwrap"]), namespaces());
    let host = Host::new();
    let words = ["unshare", "--user", "--map-root-user"].map(str::to_owned);
    let found = document(&host.behind(&words, JSON).success());
    host.is_untouched();
    let single = json!([{
        "reason": "the user namespace in which sockless was started has one ID only",
        "call": null, "errno": null, "setting": "/proc/self/uid_map",
        "unlock": "unshare --user --map-root-user --map-auto sockless build …",
    }]);
    assert_eq!(*lacks(&found, 1), single);
    assert_eq!(*lacks(&found, 2), single);
    assert_eq!(
        (works(&found, 3), &found["build"]["rung"]),
        (true, &json!(3))
    );
    assert_eq!(
        *lacks(&found, 4),
        json!([{
            "reason": "fchown(1:1): EINVAL, Invalid argument: giving a file to another user",
            "call": "fchown(1:1)", "errno": "EINVAL", "setting": null, "unlock": null,
        }])
    );
}

#[test]
fn doctor_names_capabilities_that_are_missing() {
    needs_root!();
    needs!(container::possible());
    let host = Host::new();
    let fewer: Vec<&str> = CAPABILITIES
        .into_iter()
        .filter(|name| !["sys_chroot", "chown"].contains(name))
        .collect();
    let ran = host.behind(&container::words(&fewer), JSON);
    assert_eq!(ran.status.code(), Some(NO_SANDBOX), "{ran:?}");
    let found = document(&ran);
    assert_eq!(
        *lacks(&found, 4),
        json!([{
            "reason": "root has no CAP_SYS_CHROOT, CAP_CHOWN", "call": null, "errno": null,
            "setting": "CapEff", "unlock": "docker run --cap-add=SYS_CHROOT --cap-add=CHOWN …",
        }])
    );
    // With what it names, it works: see the default container.
    assert!(!works(&found, 3), "{found}");
}

#[test]
fn doctor_says_that_the_store_and_temporary_files_have_no_place() {
    needs!(programs(&["unshare", "bwrap"]), namespaces());
    let host = Host::new();
    let store = host.place.dir.join("store").display().to_string();
    let tmp = host.place.dir.join("tmp").display().to_string();
    let read_only = |dir: &str| format!("mount -t tmpfs -o ro none {dir}");
    let ran = host.after(&read_only(&store), "", JSON);
    assert_eq!(ran.status.code(), Some(NO_SANDBOX), "{ran:?}");
    let found = document(&ran);
    assert_eq!(
        found["build"]["lacks"],
        json!([{
            "reason": format!("mkdir({store}): EROFS, Read-only file system"),
            "call": format!("mkdir({store})"), "errno": "EROFS", "setting": store,
            "unlock": "sockless build --root DIR …, or export SOCKLESS_ROOT=DIR",
        }])
    );
    let other = host.place.dir.join("run").display().to_string();
    let args = [JSON, &["--root", &other]].concat();
    let found = document(&host.after(&read_only(&store), "", &args).success());
    assert_eq!(found["inside"]["store"]["path"], other);

    let ran = host.after(&read_only(&tmp), "", JSON);
    assert_eq!(ran.status.code(), Some(NO_SANDBOX), "{ran:?}");
    let found = document(&ran);
    let lack = json!({
        "reason": format!("mkdir({tmp}): EROFS, Read-only file system"),
        "call": format!("mkdir({tmp})"), "errno": "EROFS", "setting": tmp,
        "unlock": "export TMPDIR=/a/directory/that/is/writable",
    });
    assert_eq!(found["inside"]["temporary"]["lacks"], json!([lack]));
    assert_eq!(found["build"]["lacks"][0], lack);
    let mut moved = host.after_command(&read_only(&tmp), "", JSON);
    document(&run(moved.env("TMPDIR", &other)).success());
    host.is_untouched();
}

#[test]
fn doctor_prints_reasons_and_unlocking_lines_for_people() {
    needs!(programs(&["unshare", "bwrap"]), namespaces());
    let host = Host::new();
    let store = host.place.dir.join("store").display().to_string();
    let setup = format!("mount -t tmpfs -o ro none {store}");
    let ran = host.after(&setup, "", &["--offline"]);
    assert_eq!(ran.status.code(), Some(NO_SANDBOX), "{ran:?}");
    let lines: Vec<&str> = ran.stdout.lines().map(str::trim_end).collect();
    assert!(
        lines[0].starts_with("user root (uid 0, gid 0), Linux "),
        "{ran:?}"
    );
    assert!(
        lines[2].starts_with("yes 1 root            taken by builds"),
        "{ran:?}"
    );
    let reason = format!("mkdir({store}): EROFS, Read-only file system");
    let unlock =
        "                      to unlock: sockless build --root DIR …, or export SOCKLESS_ROOT=DIR";
    let at = lines
        .iter()
        .position(|line| *line == format!("no  store             {reason}"));
    assert_eq!(lines[at.expect("the store's line") + 1], unlock);
    let end = [
        "RUN does not work here:".to_owned(),
        format!("                      {reason}"),
        unlock.to_owned(),
    ];
    assert!(
        lines.ends_with(&end.each_ref().map(String::as_str)),
        "{ran:?}"
    );
    assert_eq!(ran.stderr, "");
}

/// The only entry of `registries`, of a host that needs not run anything.
#[track_caller]
fn registry_of(ran: &Ran) -> Value {
    let found = document(ran);
    let all = found["registries"].as_array().expect("a list");
    assert_eq!(all.len(), 1, "{found}");
    all[0].clone()
}

#[test]
fn doctor_tells_what_is_wrong_with_a_registry() {
    needs!(programs(&["docker-registry"]));
    let host = Host::new();
    let registry = Registry::private();
    let name = registry.host.as_str();
    let ca = registry.ca().display().to_string();
    let ask = |args: &[&str]| registry_of(&host.here(&[&["--json", name], args].concat()));
    let trusting = ["--registry-ca", ca.as_str()];

    let found = ask(&[]);
    assert_eq!(
        (&found["reachable"], &found["failure"]),
        (&json!(false), &json!("certificate"))
    );
    assert_eq!(found["unlock"], "sockless build --registry-ca FILE …");

    let found = ask(&trusting);
    assert_eq!(
        (&found["reachable"], &found["failure"]),
        (&json!(true), &json!("refused"))
    );
    assert_eq!(
        (&found["authentication"], &found["credentials"]),
        (&json!("basic"), &Value::Null)
    );
    assert_eq!(
        (&found["accepted"], &found["unlock"]),
        (&Value::Null, &json!(format!("docker login {name}")))
    );

    host.place
        .docker_config(&registry.docker_config(Registry::USER, "canary-password"));
    let found = ask(&trusting);
    assert_eq!(
        (&found["accepted"], &found["failure"]),
        (&json!(false), &json!("refused"))
    );
    assert!(!found.to_string().contains("canary"), "{found}");
    let config = host.place.dir.join("docker/config.json");
    assert_eq!(
        (&found["credentials"], &found["places"]),
        (&json!("password"), &json!(config))
    );

    host.place
        .docker_config(&registry.docker_config(Registry::USER, Registry::PASSWORD));
    let found = ask(&trusting);
    assert_eq!(
        found,
        json!({
            "registry": name, "url": format!("https://{name}/v2/"), "is_mirror": false,
            "reachable": true, "failure": null, "reason": null, "unlock": null,
            "authentication": "basic", "credentials": "password", "places": config, "accepted": true,
        })
    );
    // Nothing was pushed, and the registry was asked for nothing but what it is.
    assert_eq!(registry.writes(), []);
    let paths = registry.requests();
    assert!(
        paths.iter().all(|request| request.path == "/v2/"),
        "{paths:?}"
    );

    let text = host.here(&["--registry-ca", &ca, name]).stdout;
    assert!(
        text.contains(&format!(
            "credentials (password) from {}: accepted",
            config.display()
        )),
        "{text}"
    );
    assert!(!text.contains(Registry::PASSWORD), "{text}");

    host.place.docker_config("{\"auths\": 1}");
    let found = ask(&trusting);
    assert_eq!(
        (&found["reachable"], &found["failure"]),
        (&json!(true), &json!("credentials"))
    );
}

#[test]
fn doctor_tells_kinds_of_silence_apart() {
    needs!(programs(&["docker-registry"]));
    let host = Host::new();
    let ask = |args: &[&str]| registry_of(&host.here(&[&["--json"], args].concat()));

    let found = ask(&["127.0.0.1:1"]);
    assert_eq!(
        (&found["reachable"], &found["failure"]),
        (&json!(false), &json!("connection"))
    );
    let reason = found["reason"].as_str().expect("a reason");
    assert!(
        reason.ends_with("Connection refused (os error 111)"),
        "{reason}"
    );

    let found = ask(&["nowhere.invalid"]);
    assert_eq!(
        (&found["reachable"], &found["failure"]),
        (&json!(false), &json!("name"))
    );
    let unlock =
        "check the name, and the name servers in /etc/resolv.conf: getent hosts nowhere.invalid";
    assert_eq!(found["unlock"], unlock);

    let plain = Registry::start(Options::default());
    let name = plain.host.as_str();
    let found = ask(&[name]);
    assert_eq!(
        (&found["reachable"], &found["failure"]),
        (&json!(false), &json!("not-tls"))
    );
    assert_eq!(
        found["unlock"],
        format!("sockless build --insecure-registry {name} …")
    );
    let found = ask(&["--insecure-registry", name, name]);
    assert_eq!(
        (&found["reachable"], &found["authentication"]),
        (&json!(true), &json!("none"))
    );
    assert_eq!(found["url"], format!("http://{name}/v2/"));

    let ran = host.here(&["--json", "--offline", "not a registry"]);
    assert_eq!(ran.status.code(), Some(2), "{ran:?}");
    ran.says("\"not a registry\" is not a registry: expected HOST[:PORT]");
}
