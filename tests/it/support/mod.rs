//! What the tests stand on. Nothing here uses the library's own code for what it checks.

use std::path::PathBuf;
use std::process::Command;

pub mod archive;
pub mod container;
pub mod dir;
pub mod github;
pub mod http;
pub mod images;
pub mod oci;
pub mod process;
pub mod proxy;
pub mod registry;
pub mod rungs;
pub mod sockless;
pub mod tarball;
pub mod web;

/// Ends the test with the reason why it cannot run here; fails it where every test must run.
macro_rules! skip {
    ($($arg:tt)*) => {{
        $crate::support::skipped(&format!($($arg)*));
        return;
    }};
}

/// Skips the test unless the probe says that the machine has what it needs.
macro_rules! needs {
    ($($probe:expr),+ $(,)?) => {
        $(if let Err(reason) = $probe {
            skip!("{reason}");
        })+
    };
}

/// See [`skip!`].
///
/// # Panics
/// With `SOCKLESS_TEST_REQUIRE_ALL=1`.
pub fn skipped(reason: &str) {
    assert_ne!(
        std::env::var("SOCKLESS_TEST_REQUIRE_ALL").as_deref(),
        Ok("1"),
        "a test cannot run here, and SOCKLESS_TEST_REQUIRE_ALL=1 demands every one: {reason}"
    );
    eprintln!("skipped: {reason}");
}

/// The repository's directory.
pub fn repository() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// Whether the tests run as root.
pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// The programs, or the one that is missing.
pub fn programs(names: &[&str]) -> Result<(), String> {
    names.iter().try_for_each(|name| {
        find_program(name)
            .map(|_| ())
            .ok_or_else(|| format!("{name} is not installed"))
    })
}

/// Where a program is; administrators' directories are looked into for every user.
pub fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain([
            "/usr/sbin".into(),
            "/sbin".into(),
            "/usr/bin".into(),
            "/bin".into(),
        ])
        .map(|dir| dir.join(name))
        .find(|file| file.is_file())
}

/// A command that is the given one in namespaces where its user is root and has subordinate IDs.
/// As root the IDs are the machine's own.
pub fn unshared(extra: &[&str], script: &str) -> Command {
    let mut command = Command::new("unshare");
    if !is_root() {
        command.args(["--user", "--map-auto", "--map-root-user"]);
    }
    command
        .args(["--mount", "--pid", "--fork", "--kill-child"])
        .args(extra)
        .args(["sh", "-euc", script]);
    command
}

/// Whether this user can make namespaces with more IDs than one.
pub fn namespaces() -> Result<(), String> {
    let output = unshared(
        &[],
        "file=$(mktemp); trap 'rm \"$file\"' EXIT; chown 1:1 \"$file\"",
    )
    .output()
    .map_err(|e| format!("unshare: {e}"))?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!(
        "no user namespace with subordinate IDs: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    ))
}

/// Whether a Debian mirror can be reached, for steps that install packages.
pub fn debian_mirror() -> Result<(), String> {
    use std::net::{TcpStream, ToSocketAddrs};
    use std::time::Duration;
    let host = "deb.debian.org:80";
    let address = host
        .to_socket_addrs()
        .map_err(|e| format!("{host}: {e}"))?
        .next()
        .ok_or_else(|| format!("{host} has no address"))?;
    TcpStream::connect_timeout(&address, Duration::from_secs(10))
        .map(|_| ())
        .map_err(|e| format!("{host}: {e}"))
}
