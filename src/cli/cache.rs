//! `--cache-from` and `--cache-to`: comma-separated `key=value` fields, as `buildx build`
//! takes them.

use std::collections::BTreeMap;
use std::path::PathBuf;

use thiserror::Error;

use super::output::{parse_bool, split_fields};
use crate::image::{Digest, Reference};
use crate::pipeline::{CachePlace, CacheSource, CacheTarget};

/// The tag of a cache in a layout, as with BuildKit.
const DEFAULT_TAG: &str = "latest";

/// Fields of exports, and the one value each that says what is done anyway.
const AS_IT_IS: [(&str, &str); 4] = [
    ("compression", "gzip"),
    ("force-compression", "false"),
    ("image-manifest", "true"),
    ("oci-mediatypes", "true"),
];

/// Caches that `buildx` has and this program does not.
const UNSUPPORTED: [&str; 3] = ["azblob", "gha", "s3"];

/// Why a `--cache-from` or `--cache-to` is refused.
#[derive(Debug, Error, PartialEq, Eq)]
pub(super) enum CacheError {
    /// It is no list of fields, or they do not go together.
    #[error("invalid --{flag} {value:?}: {reason}")]
    Malformed {
        /// Its name.
        flag: &'static str,
        /// As given.
        value: String,
        /// What is wrong with it.
        reason: String,
    },
    /// `buildx` has it, this program does not.
    #[error("--{flag} {value:?}: {what} is not supported")]
    Unsupported {
        /// Its name.
        flag: &'static str,
        /// As given.
        value: String,
        /// The type or field.
        what: String,
    },
}

impl CacheError {
    /// What to do about it.
    pub(super) fn hint(&self) -> Option<&'static str> {
        match self {
            Self::Unsupported { what, .. } if what.starts_with("type=") => {
                Some("use type=registry, or type=local with a directory that your CI keeps")
            }
            Self::Unsupported { what, .. } if what.contains("compression") => {
                Some("a cache has the layers as the image has them; leave it out")
            }
            _ => None,
        }
    }
}

/// The fields of one flag that are not read yet.
struct Fields<'v> {
    flag: &'static str,
    value: &'v str,
    fields: BTreeMap<String, String>,
}

/// Parses all `--cache-from`.
///
/// # Errors
/// [`CacheError`].
///
/// <https://docs.docker.com/reference/cli/docker/buildx/build/#cache-from>
pub(super) fn sources(flags: &[String]) -> Result<Vec<CacheSource>, CacheError> {
    let mut sources = Vec::new();
    for flag in flags {
        let Some((kind, mut fields)) = Fields::read("cache-from", flag)? else {
            let names = Fields::names("cache-from", flag)?;
            sources.extend(names.into_iter().map(CacheSource::Registry));
            continue;
        };
        let source = match kind.as_str() {
            "registry" => {
                // An image has a digest, and a cache may be named by one.
                CacheSource::Registry(fields.reference(true)?)
            }
            "local" => CacheSource::Local {
                dir: fields.directory("src")?,
                tag: fields.tag(),
                digest: match fields.take("digest") {
                    Some(digest) => {
                        let digest = Digest::parse(&digest);
                        Some(digest.map_err(|error| fields.malformed(error.to_string()))?)
                    }
                    None => None,
                },
            },
            "inline" => {
                let reason = "an image with an inline cache is named by type=registry,ref=IMAGE";
                return Err(fields.malformed(reason.to_owned()));
            }
            other => return Err(fields.unknown(other)),
        };
        fields.finish(&kind)?;
        sources.push(source);
    }
    Ok(sources)
}

/// Parses all `--cache-to`.
///
/// A failure to export is a warning unless `ignore-error=false` says otherwise.
///
/// # Errors
/// [`CacheError`].
///
/// <https://docs.docker.com/reference/cli/docker/buildx/build/#cache-to>
pub(super) fn targets(flags: &[String]) -> Result<Vec<CacheTarget>, CacheError> {
    let target = |place| CacheTarget {
        place,
        max: false,
        mounts: false,
        ignore_error: true,
    };
    let mut targets = Vec::new();
    for flag in flags {
        let Some((kind, mut fields)) = Fields::read("cache-to", flag)? else {
            let names = Fields::names("cache-to", flag)?;
            targets.extend(
                names
                    .into_iter()
                    .map(|name| target(CachePlace::Registry(name))),
            );
            continue;
        };
        let place = match kind.as_str() {
            "registry" => CachePlace::Registry(fields.reference(false)?),
            "local" => CachePlace::Local {
                dir: fields.directory("dest")?,
                tag: fields.tag(),
            },
            "inline" => CachePlace::Inline,
            other => return Err(fields.unknown(other)),
        };
        let mut target = target(place);
        match fields.take("mode").as_deref() {
            None | Some("min") => {}
            Some("max") if target.place == CachePlace::Inline => {
                let reason = "an image has its own layers alone, so there is no mode=max";
                return Err(fields.malformed(reason.to_owned()));
            }
            Some("max") => target.max = true,
            Some(other) => {
                let reason = format!("mode is {other:?}, expected \"min\" or \"max\"");
                return Err(fields.malformed(reason));
            }
        }
        target.ignore_error = fields.bool("ignore-error")?.unwrap_or(true);
        target.mounts = fields.bool("mounts")?.unwrap_or(false);
        if target.mounts && target.place == CachePlace::Inline {
            let reason = "an image has no room for cache mounts";
            return Err(fields.malformed(reason.to_owned()));
        }
        fields.as_it_is()?;
        fields.finish(&kind)?;
        targets.push(target);
    }
    Ok(targets)
}

impl<'v> Fields<'v> {
    /// The type and the other fields; absent for a list of names.
    fn read(flag: &'static str, value: &'v str) -> Result<Option<(String, Self)>, CacheError> {
        let mut fields = Self {
            flag,
            value,
            fields: BTreeMap::new(),
        };
        let list = split_fields(value).map_err(|reason| fields.malformed(reason.to_owned()))?;
        if list.iter().all(|field| !field.contains('=')) {
            return Ok(None);
        }
        for field in list {
            let Some((key, value)) = field.split_once('=') else {
                return Err(fields.malformed(format!("the field {field:?} has no \"=\"")));
            };
            let key = key.trim().to_ascii_lowercase();
            fields.fields.insert(key, value.to_owned());
        }
        let Some(kind) = fields.take("type") else {
            return Err(fields.malformed("the field \"type=\" is missing".to_owned()));
        };
        Ok(Some((kind, fields)))
    }

    /// The short form: names of a registry.
    fn names(flag: &'static str, value: &'v str) -> Result<Vec<Reference>, CacheError> {
        let fields = Self {
            flag,
            value,
            fields: BTreeMap::new(),
        };
        let list = split_fields(value).map_err(|reason| fields.malformed(reason.to_owned()))?;
        let names = list
            .iter()
            .map(|name| fields.parse(name, flag == "cache-from"));
        names.collect()
    }

    fn malformed(&self, reason: String) -> CacheError {
        CacheError::Malformed {
            flag: self.flag,
            value: self.value.to_owned(),
            reason,
        }
    }

    fn unsupported(&self, what: String) -> CacheError {
        CacheError::Unsupported {
            flag: self.flag,
            value: self.value.to_owned(),
            what,
        }
    }

    fn unknown(&self, kind: &str) -> CacheError {
        if UNSUPPORTED.contains(&kind) {
            return self.unsupported(format!("type={kind}"));
        }
        self.malformed(format!(
            "unknown type {kind:?}: expected \"registry\", \"local\" or \"inline\""
        ))
    }

    /// A field; empty is absent.
    fn take(&mut self, key: &str) -> Option<String> {
        self.fields.remove(key).filter(|value| !value.is_empty())
    }

    fn needed(&mut self, key: &str) -> Result<String, CacheError> {
        let value = self.take(key);
        value.ok_or_else(|| self.malformed(format!("the field \"{key}=\" is missing")))
    }

    fn bool(&mut self, key: &str) -> Result<Option<bool>, CacheError> {
        let Some(value) = self.take(key) else {
            return Ok(None);
        };
        let parsed = parse_bool(&value);
        parsed.map(Some).ok_or_else(|| {
            self.malformed(format!(
                "{key} is {value:?}, expected \"true\" or \"false\""
            ))
        })
    }

    fn reference(&mut self, may_have_digest: bool) -> Result<Reference, CacheError> {
        let name = self.needed("ref")?;
        self.parse(&name, may_have_digest)
    }

    fn parse(&self, name: &str, may_have_digest: bool) -> Result<Reference, CacheError> {
        match Reference::parse(name) {
            Err(error) => Err(self.malformed(error.to_string())),
            Ok(name) if name.digest().is_some() && !may_have_digest => {
                Err(self.malformed(format!("the name {name} has a digest")))
            }
            Ok(name) => Ok(name),
        }
    }

    fn directory(&mut self, key: &str) -> Result<PathBuf, CacheError> {
        self.needed(key).map(PathBuf::from)
    }

    fn tag(&mut self) -> String {
        self.take("tag").unwrap_or_else(|| DEFAULT_TAG.to_owned())
    }

    /// Fields that may say what is done anyway.
    fn as_it_is(&mut self) -> Result<(), CacheError> {
        for (key, said) in AS_IT_IS {
            let Some(value) = self.take(key) else {
                continue;
            };
            let is_said = match parse_bool(said) {
                Some(said) => parse_bool(&value) == Some(said),
                None => value == said,
            };
            if !is_said {
                return Err(self.unsupported(format!("{key}={value}")));
            }
        }
        Ok(())
    }

    /// Refuses what is left.
    fn finish(self, kind: &str) -> Result<(), CacheError> {
        match self.fields.keys().next() {
            Some(key) if key == "registry.insecure" => {
                Err(self.unsupported("registry.insecure (there is --insecure-registry)".to_owned()))
            }
            Some(key) if key == "compression-level" => Err(self.unsupported(key.clone())),
            Some(key) => Err(self.malformed(format!("type={kind} has no \"{key}=\""))),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reference(name: &str) -> Reference {
        Reference::parse(name).unwrap()
    }

    fn target(place: CachePlace) -> CacheTarget {
        CacheTarget {
            place,
            max: false,
            mounts: false,
            ignore_error: true,
        }
    }

    #[test]
    fn sources_are_those_of_buildx() {
        let digest = Digest::of(b"cache");
        let local = format!("type=local,src=/c,digest={digest}");
        let flags = [
            "type=registry,ref=h.io/app:cache",
            "h.io/short",
            "a,b:1",
            "type=local,src=rel/dir,tag=t",
            &local,
            "\"type=local\",\"src=/a,b\"",
        ];
        let flags = flags.map(str::to_owned);
        let local = |dir: &str, tag: &str, digest| CacheSource::Local {
            dir: dir.into(),
            tag: tag.to_owned(),
            digest,
        };
        let registry = |name: &str| CacheSource::Registry(reference(name));
        assert_eq!(
            sources(&flags).unwrap(),
            [
                registry("h.io/app:cache"),
                registry("h.io/short"),
                registry("a"),
                registry("b:1"),
                local("rel/dir", "t", None),
                local("/c", "latest", Some(digest)),
                local("/a,b", "latest", None),
            ]
        );
    }

    #[test]
    fn targets_are_those_of_buildx_and_fail_quietly_unless_told() {
        let flags = [
            "type=registry,ref=h.io/app:cache,mode=max,mounts=true",
            "type=local,dest=/c,oci-mediatypes=true,image-manifest=1,compression=gzip",
            "type=inline",
            "type=registry,ref=h.io/b,mode=min,ignore-error=false",
            "h.io/short",
        ];
        let registry = |name: &str| target(CachePlace::Registry(reference(name)));
        assert_eq!(
            targets(&flags.map(str::to_owned)).unwrap(),
            [
                CacheTarget {
                    max: true,
                    mounts: true,
                    ..registry("h.io/app:cache")
                },
                target(CachePlace::Local {
                    dir: "/c".into(),
                    tag: "latest".to_owned()
                }),
                target(CachePlace::Inline),
                CacheTarget {
                    ignore_error: false,
                    ..registry("h.io/b")
                },
                registry("h.io/short"),
            ]
        );
    }

    #[test]
    fn what_means_nothing_is_refused() {
        let from = |flag: &str| sources(&[flag.to_owned()]).unwrap_err().to_string();
        let to = |flag: &str| targets(&[flag.to_owned()]).unwrap_err().to_string();
        for (got, want) in [
            (from("type=gha"), "type=gha is not supported"),
            (to("type=s3,bucket=b"), "type=s3 is not supported"),
            (to("type=azblob"), "type=azblob is not supported"),
            (from("type=nfs"), "unknown type \"nfs\""),
            (from("ref=a"), "the field \"type=\" is missing"),
            (from("type=registry"), "the field \"ref=\" is missing"),
            (from("type=registry,ref=A"), "A"),
            (from("type=local,dest=/d"), "the field \"src=\" is missing"),
            (from("type=local,src=/d,digest=x"), "unsupported digest"),
            (from("type=local,src=/d,mode=max"), "has no \"mode=\""),
            (from("type=inline"), "type=registry,ref=IMAGE"),
            (from(""), "\"\""),
            (from("type=registry,ref"), "has no \"=\""),
            (to("type=local,src=/d"), "the field \"dest=\" is missing"),
            (to("type=registry,ref=a,mode=mid"), "mode is \"mid\""),
            (to("type=inline,mode=max"), "no mode=max"),
            (to("type=inline,mounts=true"), "no room"),
            (to("type=registry,ref=a,mounts=x"), "mounts is \"x\""),
            (
                to("type=registry,ref=a,compression=zstd"),
                "compression=zstd",
            ),
            (
                to("type=registry,ref=a,image-manifest=false"),
                "image-manifest=false",
            ),
            (
                to("type=registry,ref=a,registry.insecure=true"),
                "--insecure-registry",
            ),
            (to("type=registry,ref=a,scope=x"), "has no \"scope=\""),
            (
                to(&format!("type=registry,ref=a@{}", Digest::of(b""))),
                "has a digest",
            ),
        ] {
            assert!(got.contains(want), "{got}");
        }
        let error = targets(&["type=gha".to_owned()]).unwrap_err();
        assert!(error.hint().unwrap().contains("type=registry"));
    }
}
