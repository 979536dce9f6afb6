//! The sandbox of root that can make no namespaces: `chroot(2)`, fewer capabilities than
//! Docker's, Docker's filter of system calls, and Landlock.
//!
//! ```text
//! sockless build              run(): as for the other sandboxes
//! └─ __chroot                 all that the step starts becomes its child; when the step ends, or
//!    │                        nobody listens any more, it kills them all
//!    └─ __init                changes the root directory, confines itself, becomes …
//!       └─ the step
//! ```
//!
//! Nothing is mounted. What other sandboxes mount, the caller puts into the root filesystem before
//! [`Sandbox::run`], and takes out of it after: see [`Sandbox::stand_ins`]. There is no `/proc`, so
//! a step sees no process, and no environment of one.
//!
//! Without namespaces, what keeps a step in its root filesystem is that it has no way to leave a
//! changed root directory: not `CAP_SYS_CHROOT`, with which it could change it once more; no
//! directory that is open and lies outside; no `CAP_MKNOD`, with which it could open the host's
//! disks, nor devices that came with the image; no `CAP_SYS_PTRACE`, so that who has more
//! capabilities than itself cannot be traced; and no user namespace, which the kernel gives nobody
//! whose root directory was changed. Landlock forbids most of this once more, and what is left:
//! see [`super::landlock`].

mod supervise;

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};

use super::guard::{self, Hold};
use super::landlock::Landlock;
use super::wire::{Attachment, Doing, Failure, Purpose, Runtime, RuntimeKind};
use super::{
    Cancel, MountSource, Network, Outcome, OutputSink, Process, Refusal, Rung, Sandbox,
    SandboxError, Security, StandIn, StandInKind, choose, mounts, seccomp,
};

pub(super) use supervise::supervise_main;

/// The name on the command line.
const NAME: &str = "chroot";

/// Steps in a changed root directory.
#[derive(Debug)]
pub(super) struct Chroot {
    runtime: Runtime,
    landlock: Landlock,
}

impl Chroot {
    /// Tries it, by running nothing in it, in a directory in `scratch`.
    ///
    /// # Errors
    /// [`SandboxError::Refused`] with what the kernel refused.
    pub(super) fn probe(scratch: &Path) -> Result<Self, SandboxError> {
        let this = Self {
            runtime: Runtime {
                kind: RuntimeKind::Chroot,
                program: PathBuf::new(),
            },
            landlock: Landlock::here(),
        };
        let rootfs = tempfile::tempdir_in(scratch).map_err(choose::io(
            "making a root filesystem to try the sandbox with",
        ))?;
        let process = choose::nothing_in(rootfs.path());
        let mut ignore = |_, _: &[u8]| {};
        let outcome = this.start(
            process,
            Purpose::Probe,
            &Hold {
                alarm: None,
                doors: &[],
            },
            &mut ignore,
            &Cancel::new(),
        )?;
        match outcome {
            Outcome::Exited(0) => Ok(this),
            Outcome::Exited(status) => Err(SandboxError::Refused {
                sandbox: NAME,
                refusal: Refusal::Failed {
                    program: NAME,
                    message: format!("it ended with status {status} where 0 was expected"),
                },
            }),
        }
    }

    fn start(
        &self,
        process: Process,
        purpose: Purpose,
        hold: &Hold<'_>,
        output: OutputSink<'_>,
        cancel: &Cancel,
    ) -> Result<Outcome, SandboxError> {
        let launch = choose::launch(&self.runtime, process, Attachment::Host, purpose)?;
        choose::run(&launch, None, hold, output, cancel)
    }
}

impl Sandbox for Chroot {
    fn name(&self) -> &str {
        NAME
    }

    fn notes(&self) -> Vec<String> {
        let mut notes = vec![
            format!("{}: {}", Rung::Chroot, Rung::Chroot.sentence()),
            "chroot: RUN steps cannot change their root directory or make device nodes, and \
             setuid programs gain no privileges in them"
                .to_owned(),
            "chroot: RUN --mount is done by files in the root filesystem, for as long as the step \
             runs; secrets are among them, and sizes of tmpfs and /dev/shm are not enforced"
                .to_owned(),
        ];
        let lacks = self.landlock.lacks();
        notes.extend(lacks.iter().map(|lack| format!("chroot: {lack}")));
        notes.extend(seccomp::unfiltered_note());
        notes
    }

    fn isolates(&self) -> Result<(), String> {
        Err(Rung::Chroot.sentence().to_owned())
    }

    fn private_network(&self) -> Result<(), String> {
        Err(
            "RUN steps share the network of whoever runs sockless, its loopback included"
                .to_owned(),
        )
    }

    fn mounts(&self) -> bool {
        false
    }

    fn stand_ins(&self, process: &Process) -> Result<Vec<StandIn>, SandboxError> {
        check(process)?;
        let launch = choose::launch(
            &self.runtime,
            process.clone(),
            Attachment::Host,
            Purpose::Run,
        )?;
        let mut all = system_files();
        for (name, text) in [
            ("/etc/resolv.conf", launch.resolv_conf),
            ("/etc/hosts", launch.hosts),
        ] {
            let kind = StandInKind::File {
                content: super::Content(text.into_bytes()),
                uid: 0,
                gid: 0,
                mode: 0o644,
            };
            all.push(StandIn::new(name, kind));
        }
        for mount in mounts::in_mount_order(&process.mounts) {
            mounts::check_target(&mount.target)
                .map_err(|failure| choose::error_of(NAME, failure))?;
            let kind = match &mount.source {
                MountSource::Bind(source) => StandInKind::Files {
                    source: source.clone(),
                },
                MountSource::Tmpfs { mode, .. } => StandInKind::Directory { mode: *mode },
                MountSource::File {
                    content,
                    uid,
                    gid,
                    mode,
                } => StandInKind::File {
                    content: content.clone(),
                    uid: *uid,
                    gid: *gid,
                    mode: mode & 0o777,
                },
            };
            all.push(StandIn::new(&mount.target, kind));
        }
        Ok(all)
    }

    fn run(
        &self,
        process: &Process,
        output: OutputSink<'_>,
        cancel: &Cancel,
    ) -> Result<Outcome, SandboxError> {
        check(process)?;
        guard::run(process, output, cancel, |process, hold, output| {
            self.start(process.clone(), Purpose::Run, hold, output, cancel)
        })
    }
}

/// Refuses what only a namespace or a mount can give.
fn check(process: &Process) -> Result<(), SandboxError> {
    let refuse = |doing: &str, reason: &str| {
        Err(SandboxError::Asked {
            doing: doing.to_owned(),
            reason: format!("{reason}; the sandbox {NAME} has none"),
        })
    };
    if process.network == Network::None {
        return refuse(
            "giving a step no network (--network=none)",
            "that takes a network namespace of its own",
        );
    }
    if process.security == Security::Insecure {
        return refuse(
            "running a step with --security=insecure",
            "that takes mounts of its own",
        );
    }
    if let Some(device) = process.devices.first() {
        return refuse(
            &format!("giving a step the device {}", device.path.display()),
            "that takes mounts of its own",
        );
    }
    Ok(())
}

/// What stands for `/dev`, `/sys` and `/proc`.
fn system_files() -> Vec<StandIn> {
    let directory = |path: &str, mode| {
        let kind = StandInKind::Directory { mode: Some(mode) };
        StandIn::new(path, kind)
    };
    let mut all = vec![
        directory("/proc", 0o555),
        directory("/sys", 0o555),
        directory("/dev", 0o755),
        directory("/dev/pts", 0o755),
        directory("/dev/shm", 0o1777),
        directory("/dev/mqueue", 0o1777),
    ];
    for (name, major, minor) in mounts::DEVICES {
        let kind = StandInKind::Device { major, minor };
        all.push(StandIn::new(Path::new("/dev").join(name), kind));
    }
    // They lead nowhere without /proc. Were they missing, writing to one would make a file, and
    // what was written be lost in silence.
    for (name, target) in mounts::DEV_LINKS {
        let kind = StandInKind::Link {
            target: target.into(),
        };
        all.push(StandIn::new(Path::new("/dev").join(name), kind));
    }
    all
}

/// Changes the root directory of this process to `root`, and confines it to that.
///
/// # Errors
/// Where the kernel refuses any of it.
pub(super) fn confine(root: &Path) -> Result<(), Failure> {
    let doing = || format!("changing the root directory to {}", root.display());
    rustix::process::chroot(root).doing(doing)?;
    rustix::process::chdir("/").doing(doing)?;
    let doing = || "confining the step with Landlock".to_owned();
    // The supervisor has set it before, for itself and all that it starts.
    rustix::thread::set_no_new_privs(true).doing(doing)?;
    let root = open_root().doing(doing)?;
    Landlock::here().confine(root.as_fd()).doing(doing)
}

/// Opens the root directory of this process as a place.
fn open_root() -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::open("/", flags, Mode::empty())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sandbox::Device;

    #[test]
    fn what_only_namespaces_and_mounts_give_is_refused() {
        let check = |change: &dyn Fn(&mut Process), want: Option<&str>| {
            let mut process = choose::nothing_in(Path::new("/nowhere"));
            process.network = Network::Private;
            change(&mut process);
            let got = super::check(&process).err().map(|error| error.to_string());
            assert_eq!(got.as_deref(), want);
        };
        check(&|_| (), None);
        check(&|process| process.network = Network::Host, None);
        check(
            &|process| process.network = Network::None,
            Some(
                "giving a step no network (--network=none): that takes a network namespace of its \
                 own; the sandbox chroot has none",
            ),
        );
        check(
            &|process| process.security = Security::Insecure,
            Some(
                "running a step with --security=insecure: that takes mounts of its own; the \
                 sandbox chroot has none",
            ),
        );
        check(
            &|process| {
                process.devices.push(Device {
                    path: "/dev/fuse".into(),
                    host_path: "/dev/fuse".into(),
                    permissions: "rw".into(),
                });
            },
            Some(
                "giving a step the device /dev/fuse: that takes mounts of its own; the sandbox \
                 chroot has none",
            ),
        );
    }
}
