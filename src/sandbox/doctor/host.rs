//! Which programs serve here, each of them tried, and what filters there are.

use std::path::PathBuf;
use std::process::{Command, Stdio};

use serde::{Deserialize, Serialize};

use super::Lack;
use super::guards::DOCKER;
use crate::sandbox::networks::Networks;
use crate::sandbox::wire::{HelperKind, Runtime, RuntimeKind};
use crate::sandbox::{Choice, Refusal, SandboxError, World, choose, network, seccomp, sys, userns};

/// A program that runs steps. Part of the document of `sockless doctor --json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Program {
    /// As `--sandbox` has it.
    pub name: String,
    /// Where it is; absent also for what needs none.
    pub path: Option<PathBuf>,
    /// The first line of what it says its version is.
    pub version: Option<String>,
    /// Whether it was seen to work.
    pub works: bool,
    /// What steps do not get in it, as a build says it.
    pub notes: Vec<String>,
    /// Why it does not work.
    pub lacks: Vec<Lack>,
}

/// A program that carries the packets of private networks. Part of the same document.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Helper {
    /// Its name.
    pub name: String,
    /// Where it is.
    pub path: Option<PathBuf>,
    /// Whether it was seen to work.
    pub works: bool,
    /// Why it does not.
    pub lacks: Vec<Lack>,
}

/// What steps are kept by beside namespaces. Part of the same document.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Filters {
    /// Whether Docker's filter of system calls is known for this machine.
    pub seccomp: bool,
    /// The version of Landlock that the kernel has; absent where it has none.
    pub landlock: Option<u64>,
}

impl Filters {
    /// Asks the kernel.
    pub fn here() -> Self {
        Self {
            seccomp: seccomp::unfiltered_note().is_none(),
            landlock: sys::landlock_version().ok(),
        }
    }
}

/// Tries every sandbox in `world`, in which this process is; the first that works is what a build
/// takes. A runc with known holes works where it is allowed. Blocking.
pub fn sandboxes(world: &World, allow_old_runc: bool) -> Vec<Program> {
    let kinds: &[(Choice, RuntimeKind)] = match world {
        World::Chroot { .. } => &[(Choice::Chroot, RuntimeKind::Chroot)],
        World::None { .. } => &[],
        _ => &[
            (Choice::Bwrap, RuntimeKind::Bwrap),
            (Choice::Runc, RuntimeKind::Runc),
            (Choice::Crun, RuntimeKind::Crun),
        ],
    };
    let tried = kinds.iter().map(|&(choice, kind)| {
        let path = match kind {
            RuntimeKind::Chroot => None,
            _ => userns::find_program(kind.name()),
        };
        let (notes, lacks) =
            match choose::choose(choice, allow_old_runc, world, &std::env::temp_dir()) {
                Ok(sandbox) => (sandbox.notes(), Vec::new()),
                Err(error) => (Vec::new(), lacks_of(&error)),
            };
        Program {
            name: kind.name().to_owned(),
            version: path.as_deref().and_then(version_of),
            path,
            works: lacks.is_empty(),
            notes,
            lacks,
        }
    });
    tried.collect()
}

fn version_of(program: &std::path::Path) -> Option<String> {
    let output = Command::new(program)
        .arg("--version")
        .env_clear()
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output()
        .ok()?;
    let text = String::from_utf8_lossy(&output.stdout);
    let line = text.lines().next()?.trim();
    (!line.is_empty()).then(|| line.to_owned())
}

/// Tries every helper for networks. `sandbox` is one that works. Blocking.
pub fn helpers(sandbox: &Program) -> Vec<Helper> {
    let runtime = Runtime {
        kind: match sandbox.name.as_str() {
            "runc" => RuntimeKind::Runc,
            "crun" => RuntimeKind::Crun,
            _ => RuntimeKind::Bwrap,
        },
        program: sandbox.path.clone().unwrap_or_default(),
    };
    let tried = [HelperKind::Pasta, HelperKind::Slirp4netns].map(|kind| {
        let mut installed = network::installed_helpers().into_iter();
        let found = installed.find(|helper| helper.kind == kind);
        let path = found.as_ref().map(|helper| helper.program.clone());
        let lacks =
            match found.map(|helper| Networks::start(&runtime, helper, &std::env::temp_dir())) {
                None => vec![not_installed(kind.name())],
                Some(Ok(_)) => Vec::new(),
                Some(Err(error)) => tun_lack().map_or_else(|| lacks_of(&error), |lack| vec![lack]),
            };
        Helper {
            name: kind.name().to_owned(),
            path,
            works: lacks.is_empty(),
            lacks,
        }
    });
    tried.into()
}

/// Why the device that both helpers need cannot be opened.
fn tun_lack() -> Option<Lack> {
    const DEVICE: &str = "/dev/net/tun";
    let opened = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(DEVICE);
    let error = opened.err()?;
    let line = match error.raw_os_error() {
        Some(libc::EACCES) => "chmod 666 /dev/net/tun",
        Some(libc::ENODEV | libc::ENXIO) => "modprobe tun",
        _ => "modprobe tun; in a container, docker run --device /dev/net/tun …",
    };
    Some(
        Lack::of_call(format!("open({DEVICE})"), &error)
            .by(DEVICE)
            .unlocked_by(line),
    )
}

fn not_installed(program: &str) -> Lack {
    let package = match program {
        "bwrap" => "bubblewrap",
        "pasta" => "passt",
        other => other,
    };
    Lack::new(format!("{program} is not installed"))
        .unlocked_by(format!("apt-get install {package}"))
}

/// Each reason in `error`.
fn lacks_of(error: &SandboxError) -> Vec<Lack> {
    match error {
        SandboxError::Unavailable(refusals) => refusals.iter().map(of_refusal).collect(),
        other => vec![of_error(other)],
    }
}

/// What a sandbox says of why it does not work.
pub(super) fn of_error(error: &SandboxError) -> Lack {
    match error {
        SandboxError::Refused { refusal, .. } => of_refusal(refusal),
        SandboxError::Io { doing, source } => Lack::of_call("mkdir($TMPDIR)", source)
            .because(doing)
            .by("TMPDIR")
            .unlocked_by("export TMPDIR=/a/directory/that/is/writable"),
        other => Lack::new(other.to_string()),
    }
}

fn of_refusal(refusal: &Refusal) -> Lack {
    let lack = Lack::new(refusal.to_string());
    match refusal {
        Refusal::NotInstalled { program } => not_installed(program),
        Refusal::NotPermitted {
            program: "chroot", ..
        } => match refusal.hint() {
            Some(hint) => lack.unlocked_by(hint),
            None => lack,
        },
        Refusal::NotPermitted { .. } => lack.unlocked_by(DOCKER),
        Refusal::TooOld { .. } => lack.unlocked_by("export SOCKLESS_ALLOW_OLD_RUNC=1"),
        Refusal::Network { .. } | Refusal::Failed { .. } => lack,
    }
}
