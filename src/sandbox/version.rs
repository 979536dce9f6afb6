//! Which versions of runc may run steps.
//!
//! Older ones follow links that an image, or a step beside, puts where they mount: CVE-2025-31133
//! (masked paths by way of `/dev/null`), CVE-2025-52565 (`/dev/console`), CVE-2025-52881 (writes to
//! `/proc`). What of these concerns us is little: `/dev` is our own, no step shares a root filesystem
//! with another one that runs, and `__init` looks at what was mounted ([`super::verify`]); but who
//! runs an old runc has its other holes too.
//! <https://github.com/opencontainers/runc/security/advisories/GHSA-9493-h29p-rfm2>

use std::path::Path;
use std::process::{Command, Stdio};

use super::Refusal;

/// What is asked for, in words.
pub(super) const FIXED: &str = "1.2.8, 1.3.3 or 1.4.0-rc.3";

/// A version of runc; of what follows the numbers only the one of a release candidate counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Version {
    numbers: [u32; 3],
    candidate: Option<u32>,
}

impl Version {
    /// Reads what `runc --version` prints: `runc version 1.1.5+ds1`, and more lines.
    fn parse(text: &str) -> Option<Self> {
        let version = text.lines().next()?.strip_prefix("runc version ")?.trim();
        let end = version.find(|c: char| !c.is_ascii_digit() && c != '.');
        let (numbers, rest) = version.split_at(end.unwrap_or(version.len()));
        let numbers: Result<Vec<u32>, _> = numbers.split('.').map(str::parse).collect();
        let numbers = <[u32; 3]>::try_from(numbers.ok()?).ok()?;
        let candidate = rest.trim_start_matches(['-', '~']).strip_prefix("rc");
        let candidate = candidate.map(|rest| {
            let digits = rest.trim_start_matches('.');
            let end = digits.find(|c: char| !c.is_ascii_digit());
            digits[..end.unwrap_or(digits.len())].parse().unwrap_or(0)
        });
        Some(Self { numbers, candidate })
    }

    fn is_fixed(self) -> bool {
        match (self.numbers, self.candidate) {
            ([1, 2, patch], None) => patch >= 8,
            ([1, 3, patch], None) => patch >= 3,
            ([1, 4, 0], Some(candidate)) => candidate >= 3,
            ([1, 2 | 3, _], Some(_)) => false,
            ([1, minor, _], _) => minor >= 4,
            ([major, ..], _) => major > 1,
        }
    }
}

/// Refuses an old runc. No distribution's patches are known here: who knows that its are there says so
/// with `--allow-old-runc`.
pub(super) fn check_runc(program: &Path) -> Result<(), Refusal> {
    let output = Command::new(program)
        .arg("--version")
        .env_clear()
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output();
    let text = output.map_err(|error| Refusal::Failed {
        program: "runc",
        message: format!("running {} --version: {error}", program.display()),
    })?;
    check_text(&String::from_utf8_lossy(&text.stdout))
}

fn check_text(text: &str) -> Result<(), Refusal> {
    match Version::parse(text) {
        Some(version) if version.is_fixed() => Ok(()),
        _ => Err(Refusal::TooOld {
            program: "runc",
            version: text.lines().next().unwrap_or_default().to_owned(),
            wanted: FIXED,
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_fixed_version_of_each_line_is_known() {
        for (version, fixed) in [
            ("1.1.5+ds1", false),
            ("1.1.15", false),
            ("1.2.7", false),
            ("1.2.8", true),
            ("1.2.9-rc.1", false),
            ("1.3.0-rc.2", false),
            ("1.3.2", false),
            ("1.3.3-0ubuntu1~24.04.3", true),
            ("1.4.0-rc.2", false),
            ("1.4.0~rc3", true),
            ("1.4.0-rc.10+dev", true),
            ("1.4.0", true),
            ("1.4.1", true),
            ("1.5.0-rc.1", true),
            ("2.0.0", true),
            ("1.0.0-rc93", false),
            ("0.1.1", false),
            ("1.2", false),
            ("new", false),
        ] {
            let text = format!("runc version {version}\ncommit: 1.9.9\n");
            assert_eq!(check_text(&text).is_ok(), fixed, "{version}");
        }
        assert_eq!(
            check_text("crun version 9.9.9\n").unwrap_err().to_string(),
            "runc is too old: it says \"crun version 9.9.9\", where 1.2.8, 1.3.3 or 1.4.0-rc.3 is needed"
        );
        assert!(check_text("").is_err());
    }
}
