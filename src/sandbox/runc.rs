//! The bundle and the command line of OCI runtimes: runc, crun, youki.
//!
//! The container's process is the innermost stage, as root with the capabilities of a
//! step; it switches to the step's user itself. No cgroup is made.
//! <https://github.com/opencontainers/runtime-spec/blob/main/config.md>

use std::ffi::OsString;
use std::path::Path;

use serde_json::{Value, json};

use super::mounts::View;
use super::wire::RuntimeKind;

/// Returns the arguments that run the container of `bundle`.
///
/// `fds` is the number of file descriptors from 3 on that the container gets.
pub(super) fn args(kind: RuntimeKind, state: &Path, bundle: &Path, fds: usize) -> Vec<OsString> {
    let mut args: Vec<OsString> = vec!["--root".into(), state.into()];
    match kind {
        // Read-only cgroups are then no error.
        RuntimeKind::Runc => args.push("--rootless=true".into()),
        // It finds out by itself whether it is root. Untested: its command line is said to be runc's.
        RuntimeKind::Youki => {}
        _ => args.push("--cgroup-manager=disabled".into()),
    }
    args.extend(["run".into(), "--preserve-fds".into()]);
    args.push(fds.to_string().into());
    args.extend(["--bundle".into(), bundle.into()]);
    // The state is in a directory of its own: the name need not be.
    args.push("step".into());
    args
}

/// Returns the `config.json` that runs `command` in `view`.
pub(super) fn spec(view: &View, command: &[OsString]) -> Value {
    let command: Vec<_> = command.iter().map(|word| word.to_string_lossy()).collect();
    let dev = view.dev.to_string_lossy();
    let data = ["nosuid", "noexec", "nodev"];
    let mounts = [
        mount("/proc", "proc", "proc", &data),
        // It is there already, but a runtime that does not see this line makes its own
        // devices, and in a directory where others can be made.
        mount("/dev", "bind", &dev, &["rbind", "nosuid", "nodev"]),
        mount("/dev/mqueue", "mqueue", "mqueue", &data),
    ];
    let masked: Vec<&str> = [&view.masked_files[..], &view.masked_dirs[..]].concat();
    json!({
        "ociVersion": "1.0.2",
        "root": { "path": view.root.to_string_lossy(), "readonly": false },
        "hostname": view.hostname,
        "process": {
            "terminal": false,
            "user": { "uid": 0, "gid": 0 },
            "args": command,
            "env": ["PATH=/usr/bin:/bin"],
            "cwd": "/",
            "noNewPrivileges": false,
            "capabilities": {
                "bounding": view.capabilities,
                "effective": view.capabilities,
                "permitted": view.capabilities,
            },
        },
        "mounts": mounts,
        "linux": {
            "namespaces": [
                { "type": "pid" },
                { "type": "ipc" },
                { "type": "uts" },
                { "type": "mount" },
                { "type": "cgroup" },
            ],
            "maskedPaths": masked,
            "readonlyPaths": view.read_only,
        },
    })
}

fn mount(destination: &str, kind: &str, source: &str, options: &[&str]) -> Value {
    json!({
        "destination": destination,
        "type": kind,
        "source": source,
        "options": options,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_differ_where_the_runtimes_do() {
        let check = |kind, expected: &str| {
            let args = args(kind, Path::new("/s"), Path::new("/b"), 5);
            let text: Vec<&str> = args.iter().map(|arg| arg.to_str().unwrap()).collect();
            assert_eq!(text.join(" "), expected);
        };
        check(
            RuntimeKind::Runc,
            "--root /s --rootless=true run --preserve-fds 5 --bundle /b step",
        );
        check(
            RuntimeKind::Crun,
            "--root /s --cgroup-manager=disabled run --preserve-fds 5 --bundle /b step",
        );
        check(
            RuntimeKind::Youki,
            "--root /s run --preserve-fds 5 --bundle /b step",
        );
    }

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
        let spec = spec(&view, &["init".into(), "3".into()]);
        assert_eq!(spec["root"]["path"], "/r");
        assert_eq!(spec["hostname"], "box");
        assert_eq!(spec["process"]["args"], json!(["init", "3"]));
        assert_eq!(
            spec["process"]["capabilities"]["bounding"],
            json!(["CAP_CHOWN"])
        );
        assert_eq!(spec["process"]["capabilities"]["inheritable"], Value::Null);
        assert_eq!(
            spec["linux"]["maskedPaths"],
            json!(["/proc/kcore", "/proc/acpi"])
        );
        assert_eq!(spec["linux"]["readonlyPaths"], json!(["/proc/sys"]));
        let mounts = spec["mounts"].as_array().unwrap();
        let places: Vec<&str> = mounts
            .iter()
            .map(|mount| mount["destination"].as_str().unwrap())
            .collect();
        assert_eq!(places, ["/proc", "/dev", "/dev/mqueue"]);
        assert_eq!(mounts[1]["source"], "/d");
    }
}
