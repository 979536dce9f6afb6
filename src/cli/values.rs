//! Values of flags: lists of `NAME=VALUE`, sizes, entitlements, annotations.

use std::collections::{BTreeMap, BTreeSet};

use thiserror::Error;

use crate::dockerfile::parse_size;
use crate::image::{Annotations, Platform};
use crate::pipeline::DeviceSettings;
use crate::plan::Entitlement;

/// Why a value is refused.
#[derive(Debug, Error, PartialEq, Eq)]
pub(super) enum ValueError {
    /// `--label` without a name.
    #[error("--label {0:?}: expected NAME=VALUE")]
    Label(String),
    /// `--annotation`.
    #[error("--annotation {annotation:?}: {reason}")]
    Annotation {
        /// As given.
        annotation: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// `--allow`.
    #[error(
        "--allow {0:?}: expected network.host, security.insecure, device or device=NAME[,alias=ALIAS]"
    )]
    Entitlement(String),
    /// A size.
    #[error("--shm-size {0:?}: expected a number of bytes, such as 67108864, 64m or 1g")]
    Size(String),
    /// A size that a flag or variable of this name gives.
    #[error("{0} {1:?}: expected a number of bytes, such as 67108864, 64m or 1g")]
    Bytes(&'static str, String),
}

/// `--label`: a later one of a name wins; without `=` the value is empty.
pub(super) fn labels(flags: &[String]) -> Result<BTreeMap<String, String>, ValueError> {
    let mut labels = BTreeMap::new();
    for flag in flags {
        let (name, value) = flag.split_once('=').unwrap_or((flag, ""));
        if name.is_empty() {
            return Err(ValueError::Label(flag.clone()));
        }
        labels.insert(name.to_owned(), value.to_owned());
    }
    Ok(labels)
}

/// `--annotation [TYPE[,TYPE]:]NAME=VALUE`.
///
/// <https://docs.docker.com/build/metadata/annotations/>
pub(super) fn annotations(flags: &[String]) -> Result<Annotations, ValueError> {
    let mut all = Annotations::default();
    for flag in flags {
        let wrong = |reason| ValueError::Annotation {
            annotation: flag.clone(),
            reason,
        };
        let (left, value) = flag.split_once('=').ok_or(wrong("expected NAME=VALUE"))?;
        let (types, name) = left.split_once(':').unwrap_or(("manifest", left));
        if name.is_empty() {
            return Err(wrong("the name is empty"));
        }
        for kind in types.split(',') {
            annotate(&mut all, kind, name, value).map_err(wrong)?;
        }
    }
    Ok(all)
}

/// Adds the annotation `name` to what `kind` says: `manifest`, `manifest-descriptor`, `index`
/// or `index-descriptor`, the first two perhaps with a platform in brackets behind.
///
/// # Errors
/// What is wrong with `kind`.
pub(super) fn annotate(
    all: &mut Annotations,
    kind: &str,
    name: &str,
    value: &str,
) -> Result<(), &'static str> {
    let (kind, platform) = match kind.split_once('[') {
        None => (kind, None),
        Some((kind, platform)) => {
            let platform = platform.strip_suffix(']').unwrap_or_default();
            let parsed = Platform::parse(platform);
            (kind, Some(parsed.map_err(|_| NO_PLATFORM)?))
        }
    };
    let target = match (kind, platform) {
        ("manifest", None) => &mut all.manifest,
        ("manifest-descriptor", None) => &mut all.descriptor,
        ("manifest", Some(platform)) => &mut all.platforms.entry(platform).or_default().manifest,
        ("manifest-descriptor", Some(platform)) => {
            &mut all.platforms.entry(platform).or_default().descriptor
        }
        ("index", None) => &mut all.index,
        ("index-descriptor", None) => &mut all.index_descriptor,
        ("index" | "index-descriptor", Some(_)) => return Err("an index has no platform"),
        _ => {
            return Err(
                "unknown type: expected manifest, manifest-descriptor, index or index-descriptor",
            );
        }
    };
    target.insert(name.to_owned(), value.to_owned());
    Ok(())
}

/// What is wrong with brackets that hold something else.
const NO_PLATFORM: &str = "expected a platform in the brackets, such as [linux/arm64]";

/// `--allow`; several may stand in one, separated by commas, but for `device=…`, which
/// takes options of its own. Devices go to `devices`.
pub(super) fn entitlements(
    flags: &[String],
    devices: &mut DeviceSettings,
) -> Result<BTreeSet<Entitlement>, ValueError> {
    let mut allowed = BTreeSet::new();
    for flag in flags {
        if let Some(device) = flag.strip_prefix("device=") {
            allow_device(device, devices)
                .ok_or_else(|| ValueError::Entitlement(flag.to_owned()))?;
            continue;
        }
        for name in flag.split(',').filter(|name| !name.is_empty()) {
            match name {
                "network.host" => drop(allowed.insert(Entitlement::NetworkHost)),
                "security.insecure" => drop(allowed.insert(Entitlement::SecurityInsecure)),
                "device" => devices.all = true,
                _ => return Err(ValueError::Entitlement(name.to_owned())),
            }
        }
    }
    Ok(allowed)
}

/// `NAME[,alias=ALIAS]`, or nothing for all.
fn allow_device(text: &str, devices: &mut DeviceSettings) -> Option<()> {
    let (name, options) = text.split_once(',').unwrap_or((text, ""));
    match (name, options) {
        ("", "") => devices.all = true,
        ("", _) => return None,
        (name, "") => drop(devices.names.insert(name.to_owned())),
        (name, options) => {
            let alias = options.strip_prefix("alias=")?;
            if alias.is_empty() || alias.contains(',') {
                return None;
            }
            devices.aliases.insert(alias.to_owned(), name.to_owned());
        }
    }
    Some(())
}

/// `--shm-size`, as Docker takes it.
pub(super) fn size(text: &str) -> Result<u64, ValueError> {
    parse_size(text).ok_or_else(|| ValueError::Size(text.to_owned()))
}

/// The number of bytes that the flag or variable `name` gives, as Docker takes sizes.
pub(super) fn bytes(name: &'static str, text: &str) -> Result<u64, ValueError> {
    parse_size(text).ok_or_else(|| ValueError::Bytes(name, text.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flags(flags: &[&str]) -> Vec<String> {
        flags.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn labels_have_names() {
        let pair = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        assert_eq!(
            labels(&flags(&["a=1", "b", "a=x=y"])),
            Ok([pair("a", "x=y"), pair("b", "")].into())
        );
        assert_eq!(
            labels(&flags(&["=1"])).unwrap_err().to_string(),
            "--label \"=1\": expected NAME=VALUE"
        );
    }

    #[test]
    fn annotations_say_what_they_are_of() {
        let all = annotations(&flags(&[
            "a=1",
            "manifest:b=2",
            "manifest,manifest-descriptor[linux/x86_64]:c=d:e=f",
            "index,index-descriptor:i=3",
        ]))
        .unwrap();
        let pair = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        assert_eq!(
            all.manifest,
            [pair("a", "1"), pair("b", "2"), pair("c", "d:e=f")].into()
        );
        assert_eq!(all.descriptor, BTreeMap::new());
        assert_eq!(all.index, [pair("i", "3")].into());
        assert_eq!(all.index_descriptor, [pair("i", "3")].into());
        let own = &all.platforms[&Platform::parse("linux/amd64").unwrap()];
        assert_eq!(own.descriptor, [pair("c", "d:e=f")].into());
        assert_eq!((own.manifest.len(), all.platforms.len()), (0, 1));
        for (flag, reason) in [
            ("a", "expected NAME=VALUE"),
            ("manifest:=1", "the name is empty"),
            ("index[linux/amd64]:a=1", "an index has no platform"),
            ("manifest[linux/]:a=1", NO_PLATFORM),
            ("manifest[linux/amd64:a=1", NO_PLATFORM),
            (
                "layer:a=1",
                "unknown type: expected manifest, manifest-descriptor, index or index-descriptor",
            ),
        ] {
            let error = annotations(&flags(&[flag])).unwrap_err().to_string();
            assert_eq!(error, format!("--annotation {flag:?}: {reason}"));
        }
    }

    #[test]
    fn entitlements_are_known() {
        let mut devices = DeviceSettings::default();
        let mut parse = |values: &[&str]| entitlements(&flags(values), &mut devices);
        assert_eq!(
            parse(&["network.host,device", "security.insecure"]),
            Ok([Entitlement::NetworkHost, Entitlement::SecurityInsecure].into())
        );
        assert_eq!(
            parse(&["device=a.test/b=c", "device=a.test/d,alias=e"]),
            Ok(BTreeSet::new())
        );
        for wrong in [
            "everything",
            "device=,alias=x",
            "device=a,alias=",
            "device=a,x=y",
        ] {
            assert_eq!(
                parse(&[wrong]),
                Err(ValueError::Entitlement(wrong.to_owned()))
            );
        }
        assert_eq!(
            devices,
            DeviceSettings {
                dirs: Vec::new(),
                all: true,
                names: ["a.test/b=c".to_owned()].into(),
                aliases: [("e".to_owned(), "a.test/d".to_owned())].into(),
            }
        );
        assert_eq!(
            ValueError::Entitlement("everything".to_owned()).to_string(),
            "--allow \"everything\": expected network.host, security.insecure, device or \
             device=NAME[,alias=ALIAS]"
        );
    }

    #[test]
    fn sizes_have_units() {
        for (text, bytes) in [
            ("0", 0),
            ("65536", 65536),
            ("64m", 64 << 20),
            ("1GB", 1 << 30),
        ] {
            assert_eq!(size(text), Ok(bytes), "{text}");
        }
        assert_eq!(
            size("1x").unwrap_err().to_string(),
            "--shm-size \"1x\": expected a number of bytes, such as 67108864, 64m or 1g"
        );
    }
}
