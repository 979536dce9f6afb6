//! The ways in which steps are isolated, from the strongest to the weakest: each test of a known
//! hole runs on every one of them that this machine has.
//!
//! A rung is one entry of [`RUNGS`]: which flags and variables sockless is started with, and in
//! which world. A new one needs no other change.

use std::path::Path;
use std::process::Command;
use std::sync::OnceLock;

use super::oci::Image;
use super::process::{Ran, run};
use super::registry::Registry;
use super::sockless::Place;
use super::{images, namespaces, programs, skipped};

/// A way to start sockless.
#[derive(Clone, Copy, Debug)]
pub struct Rung {
    /// For messages.
    pub name: &'static str,
    /// Programs that have to be installed.
    needs: &'static [&'static str],
    /// A program and its arguments that sockless is started through, such as `unshare`.
    before: &'static [&'static str],
    /// Further arguments of `sockless build`.
    args: &'static [&'static str],
}

/// All of them. An ordinary user and root have the same: the suite runs as both.
const RUNGS: &[Rung] = &[
    Rung {
        name: "bwrap on overlays",
        needs: &["bwrap"],
        before: &[],
        args: &["--sandbox", "bwrap", "--rootfs", "overlay"],
    },
    Rung {
        name: "runc on overlays",
        needs: &["runc"],
        before: &[],
        args: &["--sandbox", "runc", "--rootfs", "overlay"],
    },
    Rung {
        name: "crun on overlays",
        needs: &["crun"],
        before: &[],
        args: &["--sandbox", "crun", "--rootfs", "overlay"],
    },
    Rung {
        name: "bwrap on copies",
        needs: &["bwrap"],
        before: &[],
        args: &["--sandbox", "bwrap", "--rootfs", "copy"],
    },
    Rung {
        name: "one ID, bwrap on overlays",
        needs: &["bwrap", "unshare"],
        before: &["unshare", "--user", "--map-root-user"],
        args: &["--sandbox", "bwrap", "--rootfs", "overlay"],
    },
];

/// The exit status of a build for which no sandbox works here.
const NO_SANDBOX: i32 = 4;

impl Rung {
    /// Sockless as this rung has it, about to build; variables, flags and the context are up
    /// to the test.
    pub fn command(&self, place: &Place, upstream: &Registry) -> Command {
        let mut command = place.wrapped(self.before);
        command
            .arg("build")
            .arg("--registry-mirror")
            .arg(format!("docker.io={}", upstream.url()))
            .args(self.args);
        command
    }

    /// Builds a context.
    #[track_caller]
    pub fn build(&self, place: &Place, upstream: &Registry, context: &Path, args: &[&str]) -> Ran {
        run(self
            .command(place, upstream)
            .args(["--progress", "plain"])
            .args(args)
            .arg(context))
    }

    /// Builds a context into an archive, and reads that.
    #[track_caller]
    pub fn built(
        &self,
        place: &Place,
        upstream: &Registry,
        context: &Path,
        args: &[&str],
    ) -> (Image, Ran) {
        let archive = place.dir.join("image.tar");
        let output = format!("type=oci,dest={}", archive.display());
        let ran = self.build(place, upstream, context, &[args, &["-o", &output]].concat());
        let ran = ran.success();
        (place.archive(&archive), ran)
    }

    /// Why this machine does not have it.
    fn lacks(&self, upstream: &Registry) -> Result<(), String> {
        programs(self.needs)?;
        let place = Place::new();
        let context = place.context("probe", &[("Dockerfile", "FROM busybox\nRUN true\n")]);
        let ran = self.build(&place, upstream, &context, &[]);
        match ran.status.code() {
            Some(NO_SANDBOX) => Err(ran.stderr),
            _ => {
                ran.success();
                Ok(())
            }
        }
    }
}

/// Calls `case` on every rung that this machine has, with the registry of base images. What it
/// does not have is said, and fails where every test must run.
pub fn on_every_rung(case: impl Fn(&Rung, &Registry)) {
    static PRESENT: OnceLock<Vec<Result<(), String>>> = OnceLock::new();
    if let Err(reason) = namespaces() {
        return skipped(&reason);
    }
    let upstream = match images::busybox() {
        Ok(registry) => registry,
        Err(reason) => return skipped(&reason),
    };
    let present = PRESENT.get_or_init(|| RUNGS.iter().map(|rung| rung.lacks(&upstream)).collect());
    for (rung, present) in RUNGS.iter().zip(present) {
        match present {
            Ok(()) => case(rung, &upstream),
            Err(reason) => skipped(&format!("{}: {reason}", rung.name)),
        }
    }
}
