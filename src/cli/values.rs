//! Values of flags: lists of `NAME=VALUE`, sizes, entitlements, annotations.

use std::collections::{BTreeMap, BTreeSet};

use thiserror::Error;

use crate::dockerfile::parse_size;
use crate::image::Annotations;
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
    #[error("--allow {0:?}: expected network.host, security.insecure or device")]
    Entitlement(String),
    /// A size.
    #[error("--shm-size {0:?}: expected a number of bytes, such as 67108864, 64m or 1g")]
    Size(String),
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
            // One platform is built, so naming it changes nothing.
            let kind = kind.split_once('[').map_or(kind, |(kind, _)| kind);
            let target = match kind {
                "manifest" => &mut all.manifest,
                "manifest-descriptor" => &mut all.descriptor,
                "index" | "index-descriptor" => {
                    return Err(wrong(
                        "an image for one platform has no index; use manifest or manifest-descriptor",
                    ));
                }
                _ => {
                    return Err(wrong(
                        "unknown type: expected manifest, manifest-descriptor, index or index-descriptor",
                    ));
                }
            };
            target.insert(name.to_owned(), value.to_owned());
        }
    }
    Ok(all)
}

/// `--allow`; several may stand in one, separated by commas.
pub(super) fn entitlements(flags: &[String]) -> Result<BTreeSet<Entitlement>, ValueError> {
    let names = flags.iter().flat_map(|flag| flag.split(','));
    names
        .filter(|name| !name.is_empty())
        .map(|name| match name {
            "network.host" => Ok(Entitlement::NetworkHost),
            "security.insecure" => Ok(Entitlement::SecurityInsecure),
            "device" => Ok(Entitlement::Device),
            _ => Err(ValueError::Entitlement(name.to_owned())),
        })
        .collect()
}

/// `--shm-size`, as Docker takes it.
pub(super) fn size(text: &str) -> Result<u64, ValueError> {
    parse_size(text).ok_or_else(|| ValueError::Size(text.to_owned()))
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
            "manifest,manifest-descriptor[linux/amd64]:c=d:e=f",
        ]))
        .unwrap();
        let pair = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        assert_eq!(
            all.manifest,
            [pair("a", "1"), pair("b", "2"), pair("c", "d:e=f")].into()
        );
        assert_eq!(all.descriptor, [pair("c", "d:e=f")].into());
        for (flag, reason) in [
            ("a", "expected NAME=VALUE"),
            ("manifest:=1", "the name is empty"),
            (
                "index:a=1",
                "an image for one platform has no index; use manifest or manifest-descriptor",
            ),
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
        assert_eq!(
            entitlements(&flags(&["network.host,device", "security.insecure"])),
            Ok([
                Entitlement::NetworkHost,
                Entitlement::SecurityInsecure,
                Entitlement::Device
            ]
            .into())
        );
        assert_eq!(
            entitlements(&flags(&["everything"]))
                .unwrap_err()
                .to_string(),
            "--allow \"everything\": expected network.host, security.insecure or device"
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
