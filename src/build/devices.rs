//! `RUN --device`: which devices a build may have, and what a step needs for its own.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use crate::plan::{Device, Joined, Operation};
use crate::sandbox::cdi::{CdiError, Edits, Registry};

/// Where devices are described, and who may have them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeviceSettings {
    /// The directories with descriptions, the one with the highest priority last; see
    /// [`crate::sandbox::cdi::DIRS`].
    pub dirs: Vec<PathBuf>,
    /// `--allow device`: steps may have all.
    pub all: bool,
    /// `--allow device=NAME`: steps may have these.
    pub names: BTreeSet<String>,
    /// `--allow device=NAME,alias=ALIAS`: what a Dockerfile calls ALIAS is the device NAME.
    pub aliases: BTreeMap<String, String>,
}

/// Why a step may not have its devices.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// One that it needs cannot be had.
    #[error("RUN --device")]
    Cdi(#[from] CdiError),
    /// Whoever builds did not allow it.
    #[error(
        "RUN --device needs {}, which {} not allowed (allow {} with --allow device={} if you trust this Dockerfile)",
        .0.join(", "),
        if .0.len() == 1 { "was" } else { "were" },
        if .0.len() == 1 { "it" } else { "them" },
        .0.join(" --allow device=")
    )]
    NotAllowed(Vec<String>),
}

/// The devices of a build.
#[derive(Debug)]
pub(super) struct Devices {
    settings: DeviceSettings,
    registry: Registry,
}

impl Devices {
    /// Reads the descriptions where a step of `plan` asks for a device.
    pub(super) fn new(settings: DeviceSettings, plan: &Joined) -> Self {
        let is_needed = plan
            .steps
            .iter()
            .any(|step| matches!(&step.operation, Operation::Run(run) if !run.devices.is_empty()));
        let registry = match is_needed {
            true => Registry::read(&settings.dirs),
            false => Registry::default(),
        };
        Self { settings, registry }
    }

    /// What a step with `wanted` needs.
    ///
    /// # Errors
    /// [`DeviceError`]; as in BuildKit, a device that is not registered and not required
    /// needs no permission.
    pub(super) fn edits(&self, wanted: &[Device]) -> Result<Edits, DeviceError> {
        let mut granted = BTreeSet::new();
        let mut names = Vec::new();
        for device in wanted {
            let alias = self.settings.aliases.get(&device.name);
            let name = alias.unwrap_or(&device.name).as_str();
            names.push((name, device.required));
            if alias.is_some() {
                granted.extend(self.full_names(name)?);
            }
        }
        let edits = self.registry.edits(&names)?;
        if self.settings.all {
            return Ok(edits);
        }
        for name in &self.settings.names {
            granted.extend(self.full_names(name)?);
        }
        let missing: Vec<String> = edits
            .names
            .iter()
            .filter(|(name, is_free)| !is_free && !granted.contains(name))
            .map(|(name, _)| name.clone())
            .collect();
        match missing.is_empty() {
            true => Ok(edits),
            false => Err(DeviceError::NotAllowed(missing)),
        }
    }

    /// The devices that a name stands for, none where it is not registered.
    fn full_names(&self, name: &str) -> Result<Vec<String>, CdiError> {
        let edits = self.registry.edits(&[(name, false)])?;
        Ok(edits.names.into_iter().map(|(name, _)| name).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DESCRIPTION: &str = r#"{
        "cdiVersion": "0.6.0",
        "kind": "acme.test/dial",
        "devices": [
            {"name": "a", "containerEdits": {"env": ["A=1"]}},
            {"name": "b", "containerEdits": {"env": ["B=1"]}},
            {"name": "free",
             "annotations": {"org.mobyproject.buildkit.device.autoallow": "true"},
             "containerEdits": {"env": ["FREE=1"]}}
        ]
    }"#;

    /// What a step gets that asks for `wanted`, with these allowed.
    fn env(wanted: &[(&str, bool)], change: impl FnOnce(&mut DeviceSettings)) -> String {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("acme.json"), DESCRIPTION).unwrap();
        let mut settings = DeviceSettings {
            dirs: vec![dir.path().to_owned()],
            ..DeviceSettings::default()
        };
        change(&mut settings);
        let registry = Registry::read(&settings.dirs);
        let wanted: Vec<Device> = wanted
            .iter()
            .map(|(name, required)| Device {
                name: (*name).to_owned(),
                required: *required,
            })
            .collect();
        match (Devices { settings, registry }).edits(&wanted) {
            Ok(edits) => edits.env.join(" "),
            Err(error) => format!("{:#}", anyhow::Error::new(error))
                .replace(&*dir.path().to_string_lossy(), "DIR"),
        }
    }

    #[test]
    fn what_is_not_allowed_is_refused() {
        let nothing = |_: &mut DeviceSettings| {};
        assert_eq!(env(&[("acme.test/dial=free", true)], nothing), "FREE=1");
        assert_eq!(
            env(&[("acme.test/dial=a", false)], nothing),
            "RUN --device needs acme.test/dial=a, which was not allowed (allow it with --allow \
             device=acme.test/dial=a if you trust this Dockerfile)"
        );
        assert_eq!(
            env(&[("acme.test/dial=*", true)], nothing),
            "RUN --device needs acme.test/dial=a, acme.test/dial=b, which were not allowed \
             (allow them with --allow device=acme.test/dial=a --allow device=acme.test/dial=b \
             if you trust this Dockerfile)"
        );
        assert_eq!(
            env(&[("acme.test/dial=*", true)], |s| s.all = true),
            "A=1 B=1 FREE=1"
        );
    }

    #[test]
    fn single_devices_and_aliases_are_allowed() {
        let allow =
            |name: &'static str| move |s: &mut DeviceSettings| s.names = [name.to_owned()].into();
        assert_eq!(
            env(&[("acme.test/dial=a", true)], allow("acme.test/dial=a")),
            "A=1"
        );
        // Without a device's name it is the first one.
        assert_eq!(
            env(&[("acme.test/dial=a", true)], allow("acme.test/dial")),
            "A=1"
        );
        let other = env(&[("acme.test/dial=b", true)], allow("acme.test/dial=a"));
        assert!(
            other.contains("acme.test/dial=b, which was not allowed"),
            "{other}"
        );
        // What is allowed need not be there.
        assert_eq!(
            env(&[("acme.test/dial=free", true)], allow("acme.test/none=x")),
            "FREE=1"
        );
        let alias = |s: &mut DeviceSettings| {
            s.aliases = [("any".to_owned(), "acme.test/dial=b".to_owned())].into();
        };
        assert_eq!(env(&[("any", true)], alias), "B=1");
    }

    #[test]
    fn what_is_not_registered_needs_no_permission() {
        let nothing = |_: &mut DeviceSettings| {};
        assert_eq!(env(&[("acme.test/none=x", false)], nothing), "");
        assert_eq!(
            env(&[("acme.test/none=x", true)], nothing),
            "RUN --device: required device \"acme.test/none=x\" is not registered in DIR"
        );
    }
}
