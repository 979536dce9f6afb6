//! The command line of bubblewrap, as of its version 0.8.
//!
//! It makes namespaces, pivots and mounts `/proc` and `/dev/mqueue`; ours is already uid 0, so it
//! makes no user namespace. It sets `no_new_privs`: setuid programs gain nothing inside.

use std::ffi::OsString;
use std::path::Path;

use super::mounts::View;

/// Returns the arguments that run `command` in `view`.
pub(super) fn args(view: &View, command: &[OsString]) -> Vec<OsString> {
    let mut args: Vec<OsString> = Vec::new();
    let mut add = |words: &[&str]| args.extend(words.iter().map(OsString::from));
    add(&["--unshare-pid", "--unshare-ipc", "--unshare-uts"]);
    add(&["--unshare-cgroup-try"]);
    // The step is PID 1, as in Docker, and dies with the supervisor.
    add(&["--as-pid-1", "--die-with-parent"]);
    add(&["--hostname", &view.hostname]);
    // It would take the devices out of /dev with --bind; all other mounts are `nodev` already.
    push_paths(&mut args, "--dev-bind", &[&view.root, Path::new("/")]);

    let mut add = |words: &[&str]| args.extend(words.iter().map(OsString::from));
    add(&["--proc", "/proc"]);
    for path in &view.masked_files {
        // Not --ro-bind: a device on a mount without devices cannot even be read.
        add(&["--dev-bind", "/dev/null", path]);
    }
    for path in &view.masked_dirs {
        add(&["--tmpfs", path, "--remount-ro", path]);
    }
    for path in &view.read_only {
        add(&["--ro-bind", path, path]);
    }
    add(&["--mqueue", "/dev/mqueue"]);
    args.push("--".into());
    args.extend_from_slice(command);
    args
}

fn push_paths(args: &mut Vec<OsString>, option: &str, paths: &[&Path]) {
    args.push(option.into());
    args.extend(paths.iter().map(|path| path.as_os_str().to_owned()));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_view_is_all_there() {
        let view = View {
            root: "/r".into(),
            hostname: "box".to_owned(),
            dev: "/d".into(),
            masked_files: vec!["/proc/kcore"],
            masked_dirs: vec!["/proc/acpi"],
            read_only: vec!["/proc/sys"],
            capabilities: vec!["CAP_CHOWN"],
        };
        let args = args(&view, &["init".into(), "3".into()]);
        let text: Vec<&str> = args.iter().map(|arg| arg.to_str().unwrap()).collect();
        assert_eq!(
            text.join(" "),
            "--unshare-pid --unshare-ipc --unshare-uts --unshare-cgroup-try --as-pid-1 \
             --die-with-parent --hostname box --dev-bind /r / --proc /proc --dev-bind /dev/null \
             /proc/kcore --tmpfs /proc/acpi --remount-ro /proc/acpi --ro-bind /proc/sys /proc/sys \
             --mqueue /dev/mqueue -- init 3"
        );
    }
}
