//! What this host allows, found out by trying it: for `sockless doctor`.
//!
//! To have entered one namespace excludes another, so every rung is tried by a process of its own,
//! this program again with a hidden first argument. It changes nothing that outlives it, and says
//! what it saw in JSON.

mod guards;
mod host;
mod ids;
mod lack;
mod rungs;

use std::io;
use std::path::Path;
use std::process::{Command, Stdio};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::Rung;

pub use guards::Guards;
pub use host::{Filters, Helper, Program, helpers, sandboxes};
pub use lack::Lack;
pub(super) use rungs::rung_main;

/// The name of this user, or the number where there is none.
pub fn user_name() -> String {
    super::userns::user_name()
}

/// How one rung was found. Part of the document of `sockless doctor --json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RungReport {
    /// Its number, from 1 for the best.
    pub number: u8,
    /// Its name.
    pub name: String,
    /// Whether steps on it are kept from this machine's processes and network by namespaces.
    pub isolates: bool,
    /// Whether it can be had here.
    pub works: bool,
    /// Why not; empty where it works.
    pub lacks: Vec<Lack>,
}

impl RungReport {
    fn new(rung: Rung, lacks: Vec<Lack>) -> Self {
        Self {
            number: rung.number(),
            name: rung.name().to_owned(),
            isolates: rung.isolates(),
            works: lacks.is_empty(),
            lacks,
        }
    }
}

/// Tries every rung, the best first. Blocking: a moment for each.
pub fn rungs() -> Vec<RungReport> {
    let tried = Rung::ALL.map(|rung| {
        let lacks = ask(&["__doctor".as_ref(), rung.name().as_ref()]).unwrap_or_else(|reason| {
            vec![Lack::new(format!(
                "the process that tried it failed: {reason}"
            ))]
        });
        RungReport::new(rung, lacks)
    });
    tried.into()
}

/// Starts this program again with `args`, and reads the JSON that it prints. Blocking.
///
/// # Errors
/// Its own words, or why it could not be started.
pub fn ask<T: DeserializeOwned>(args: &[&std::ffi::OsStr]) -> Result<T, String> {
    let output = Command::new("/proc/self/exe")
        .args(args)
        .stdin(Stdio::null())
        .output()
        .map_err(|error| format!("starting /proc/self/exe: {error}"))?;
    serde_json::from_slice(&output.stdout).map_err(|_| {
        let words = String::from_utf8_lossy(&output.stderr);
        match words.trim() {
            "" => format!("it ended with {}", output.status),
            words => words.replace('\n', "; "),
        }
    })
}

/// A lack of something to write to: a directory could not be made in `dir`; `flag` is the line that
/// names another place.
pub fn unwritable(dir: &Path, error: &io::Error, flag: &str) -> Lack {
    // What makes temporary directories does not keep the kernel's number.
    let probe = dir.join(format!(".sockless-doctor-{}", std::process::id()));
    let refused = std::fs::create_dir(&probe).err();
    if refused.is_none() {
        let _ = std::fs::remove_dir(&probe);
    }
    let error = refused.as_ref().unwrap_or(error);
    let lack =
        Lack::of_call(format!("mkdir({})", dir.display()), error).by(dir.display().to_string());
    let lack = match lack.errno.as_deref() {
        Some("EACCES" | "EPERM") => {
            lack.because(&format!("user {} may not write there", user_name()))
        }
        Some("ENOSPC" | "EDQUOT") => lack.because("no room or no inodes are left"),
        _ => lack,
    };
    lack.unlocked_by(flag)
}
