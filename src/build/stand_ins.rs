//! What a RUN step has mounted, where nothing can be mounted: files that stand in for it.

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::Context as _;

use super::Engine;
use super::mounts::Mounts;
use crate::rootfs::{self, Rootfs};
use crate::sandbox::{MountSource, Process, Sandbox, SandboxError, StandIn, StandInKind};

/// Puts into `rootfs` what `sandbox` does not mount of what `process`, of this step, may see.
/// [`Rootfs::take_out_stand_ins`] takes it out. Blocking.
pub(super) fn put(
    engine: &Engine,
    step: usize,
    sandbox: &dyn Sandbox,
    process: &Process,
    mounts: &Mounts,
    rootfs: &mut Rootfs,
) -> anyhow::Result<()> {
    if sandbox.mounts() {
        return Ok(());
    }
    let mut kept = BTreeSet::new();
    let wanted = sandbox.stand_ins(process)?;
    let wanted: anyhow::Result<Vec<rootfs::StandIn>> = wanted
        .into_iter()
        .map(|one| convert(one, process, mounts, &mut kept))
        .collect();
    let missing = rootfs.put_stand_ins(&wanted?)?;
    anyhow::ensure!(
        !missing.iter().any(|path| path == Path::new("/dev/null")),
        SandboxError::Asked {
            doing: "making /dev/null".to_owned(),
            reason: "no devices can be made in the store; steps without namespaces need root with \
                     CAP_MKNOD, and a store on a file system that is not mounted `nodev`"
                .to_owned(),
        }
    );
    if !missing.is_empty() {
        let missing: Vec<String> = missing.iter().map(|p| p.display().to_string()).collect();
        engine.warn(format!(
            "step {step} has no {}: no devices can be made here",
            missing.join(", ")
        ));
    }
    for mount in &process.mounts {
        if let MountSource::Tmpfs {
            size_bytes: Some(_),
            ..
        } = mount.source
        {
            engine.warn(format!(
                "step {step}: the size of the tmpfs at {} is not enforced: it is a directory of \
                 the store",
                mount.target.display()
            ));
        }
    }
    Ok(())
}

/// What a cache mount may be changed in goes into the step itself; of all else it has a copy.
fn convert(
    wanted: StandIn,
    process: &Process,
    mounts: &Mounts,
    kept: &mut BTreeSet<std::path::PathBuf>,
) -> anyhow::Result<rootfs::StandIn> {
    let StandIn { path, kind } = wanted;
    let is_written = |source: &Path| {
        let mut all = process.mounts.iter();
        all.any(|mount| {
            mount.target == path
                && !mount.read_only
                && matches!(&mount.source, MountSource::Bind(bound) if bound == source)
        })
    };
    let kind = match kind {
        StandInKind::Directory { mode } => rootfs::StandInKind::Directory(mode),
        StandInKind::File {
            content,
            uid,
            gid,
            mode,
        } => rootfs::StandInKind::File {
            content: content.0,
            uid,
            gid,
            mode,
        },
        StandInKind::Link { target } => rootfs::StandInKind::Link(target),
        StandInKind::Device { major, minor } => rootfs::StandInKind::Device { major, minor },
        StandInKind::Files { source } if mounts.is_cache(&source) => {
            let is_written = is_written(&source);
            let is_new = kept.insert(source.clone());
            anyhow::ensure!(
                is_new,
                "--mount of a cache at {}: one cache cannot be in two places of a step here, as \
                 nothing can be mounted; use another id",
                path.display()
            );
            match is_written {
                true => rootfs::StandInKind::Itself(source),
                false => rootfs::StandInKind::Copy(source),
            }
        }
        StandInKind::Files { source } => {
            // It is looked at once more when it is copied; here its mount is known.
            std::fs::symlink_metadata(&source)
                .with_context(|| format!("--mount at {}", path.display()))?;
            rootfs::StandInKind::Copy(source)
        }
    };
    Ok(rootfs::StandIn { path, kind })
}
