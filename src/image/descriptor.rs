//! [`Descriptor`], [`MediaType`] and [`Platform`].

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::Digest;

/// What stored bytes are. Unknown types are kept as they came.
///
/// <https://github.com/opencontainers/image-spec/blob/main/media-types.md>
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct MediaType(std::borrow::Cow<'static, str>);

impl MediaType {
    /// An OCI image manifest.
    pub const MANIFEST: Self = Self::of("application/vnd.oci.image.manifest.v1+json");
    /// An OCI image index.
    pub const INDEX: Self = Self::of("application/vnd.oci.image.index.v1+json");
    /// An OCI image config.
    pub const CONFIG: Self = Self::of("application/vnd.oci.image.config.v1+json");
    /// An uncompressed OCI layer.
    pub const LAYER_TAR: Self = Self::of("application/vnd.oci.image.layer.v1.tar");
    /// A gzip-compressed OCI layer.
    pub const LAYER_GZIP: Self = Self::of("application/vnd.oci.image.layer.v1.tar+gzip");
    /// A zstd-compressed OCI layer.
    pub const LAYER_ZSTD: Self = Self::of("application/vnd.oci.image.layer.v1.tar+zstd");
    /// Docker's image manifest, version 2 schema 2.
    pub const DOCKER_MANIFEST: Self =
        Self::of("application/vnd.docker.distribution.manifest.v2+json");
    /// Docker's manifest list.
    pub const DOCKER_LIST: Self =
        Self::of("application/vnd.docker.distribution.manifest.list.v2+json");
    /// Docker's image config.
    pub const DOCKER_CONFIG: Self = Self::of("application/vnd.docker.container.image.v1+json");
    /// Docker's gzip-compressed layer.
    pub const DOCKER_LAYER_GZIP: Self =
        Self::of("application/vnd.docker.image.rootfs.diff.tar.gzip");
    /// Docker's uncompressed layer.
    pub const DOCKER_LAYER_TAR: Self = Self::of("application/vnd.docker.image.rootfs.diff.tar");
    /// Docker's zstd-compressed layer.
    pub const DOCKER_LAYER_ZSTD: Self =
        Self::of("application/vnd.docker.image.rootfs.diff.tar.zstd");

    /// The config of a cache of this program's: records of steps, contents of cache mounts.
    pub const SOCKLESS_CACHE_CONFIG: Self =
        Self::of("application/vnd.sockless.cache.config.v1+json");
    /// A piece of the contents of a cache mount, compressed with zstd.
    pub const SOCKLESS_CACHE_CHUNK: Self = Self::of("application/vnd.sockless.cache.chunk.v1+zstd");

    const fn of(text: &'static str) -> Self {
        Self(std::borrow::Cow::Borrowed(text))
    }

    /// Takes any text as a media type.
    pub fn new(text: impl Into<String>) -> Self {
        Self(std::borrow::Cow::Owned(text.into()))
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether this is an index of several manifests, OCI's or Docker's.
    pub fn is_index(&self) -> bool {
        *self == Self::INDEX || *self == Self::DOCKER_LIST
    }

    /// Whether this is a manifest of one image, OCI's or Docker's.
    pub fn is_manifest(&self) -> bool {
        *self == Self::MANIFEST || *self == Self::DOCKER_MANIFEST
    }

    /// The OCI type of a layer that Docker or OCI named, and `None` for what is no layer.
    ///
    /// The bytes are the same under both names, and a manifest must not mix them.
    pub fn oci_layer(&self) -> Option<Self> {
        [
            (Self::LAYER_TAR, Self::DOCKER_LAYER_TAR),
            (Self::LAYER_GZIP, Self::DOCKER_LAYER_GZIP),
            (Self::LAYER_ZSTD, Self::DOCKER_LAYER_ZSTD),
        ]
        .into_iter()
        .find_map(|(oci, docker)| (*self == oci || *self == docker).then_some(oci))
    }
}

impl fmt::Display for MediaType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Names stored bytes: what they are, their digest, their number.
///
/// `urls` is deliberately not read: fetching a layer from where a manifest says
/// would send requests (and once credentials, CVE-2020-15157) to a host that
/// the manifest's author chose.
///
/// <https://github.com/opencontainers/image-spec/blob/main/descriptor.md>
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    /// What the bytes are.
    pub media_type: MediaType,
    /// The digest of the bytes.
    pub digest: Digest,
    /// The number of bytes.
    pub size: u64,
    /// In an index: which platform the manifest is for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub platform: Option<Platform>,
    /// Annotations, sorted by key.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
}

impl Descriptor {
    /// Describes `size` bytes of type `media_type` with digest `digest`.
    pub fn new(media_type: MediaType, digest: Digest, size: u64) -> Self {
        Self {
            media_type,
            digest,
            size,
            platform: None,
            annotations: BTreeMap::new(),
        }
    }

    /// Describes `bytes` themselves.
    pub fn of(media_type: MediaType, bytes: &[u8]) -> Self {
        Self::new(media_type, Digest::of(bytes), bytes.len() as u64)
    }
}

/// An operating system and an architecture, in Go's names.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Platform {
    /// The architecture, such as `amd64`.
    pub architecture: String,
    /// The operating system, such as `linux`.
    pub os: String,
    /// The version of the operating system; Windows only.
    #[serde(
        rename = "os.version",
        default,
        skip_serializing_if = "Option::is_none"
    )]
    pub os_version: Option<String>,
    /// The variant of the architecture, such as `v7`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub variant: Option<String>,
}

/// Why a text is no [`Platform`].
#[derive(Debug, Error, PartialEq, Eq)]
#[error("invalid platform {0:?}: expected OS/ARCHITECTURE[/VARIANT], such as \"linux/arm64\"")]
pub struct PlatformError(pub String);

/// The operating systems that may stand alone.
const KNOWN_OS: &[&str] = &[
    "aix",
    "android",
    "darwin",
    "dragonfly",
    "freebsd",
    "hurd",
    "illumos",
    "ios",
    "js",
    "linux",
    "nacl",
    "netbsd",
    "openbsd",
    "plan9",
    "solaris",
    "windows",
    "zos",
];

/// The architectures that may stand alone.
const KNOWN_ARCHITECTURES: &[&str] = &[
    "386",
    "amd64",
    "amd64p32",
    "arm",
    "arm64",
    "arm64be",
    "armbe",
    "loong64",
    "mips",
    "mips64",
    "mips64le",
    "mips64p32",
    "mips64p32le",
    "mipsle",
    "ppc",
    "ppc64",
    "ppc64le",
    "riscv",
    "riscv64",
    "s390",
    "s390x",
    "sparc",
    "sparc64",
    "wasm",
];

/// The first build of Windows that runs images for other builds: those from the release before
/// up to its own.
const WINDOWS_COMPATIBLE_SINCE: [u16; 2] = [20348, 26100];

impl Platform {
    /// The platform of this machine.
    pub fn host() -> Self {
        let architecture = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            "x86" => "386",
            "arm" => "arm",
            "powerpc64" => "ppc64le",
            other => other,
        };
        let variant = (architecture == "arm").then(|| "v7".to_owned());
        Self {
            architecture: architecture.to_owned(),
            os: "linux".to_owned(),
            os_version: None,
            variant,
        }
    }

    /// Parses `os[(version)]/architecture[/variant]` and normalises common other names
    /// (`x86_64`, `aarch64`, `arm64/v8`). A known operating system or architecture may stand
    /// alone: the other part is this machine's.
    ///
    /// # Errors
    /// [`PlatformError`] where a part is empty, unknown and alone, or not `[A-Za-z0-9_.-]`.
    ///
    /// <https://github.com/containerd/platforms/blob/main/platforms.go>
    pub fn parse(text: &str) -> Result<Self, PlatformError> {
        let fail = || PlatformError(text.to_owned());
        let parts: Vec<&str> = text.split('/').collect();
        let valid = |part: &str| {
            let word = |b: u8| b.is_ascii_alphanumeric() || b"_.-".contains(&b);
            !part.is_empty() && part.bytes().all(word)
        };
        let (os, version) = match parts[0].strip_suffix(')') {
            Some(option) => option.split_once('(').ok_or_else(fail)?,
            None => (parts[0], ""),
        };
        let rest_is_valid = parts[1..].iter().all(|part| valid(part));
        if !valid(os) || !(version.is_empty() || valid(version)) || !rest_is_valid {
            return Err(fail());
        }
        let os_version = (!version.is_empty()).then(|| version.to_owned());
        let os = match os.to_ascii_lowercase().as_str() {
            "macos" => "darwin".to_owned(),
            other => other.to_owned(),
        };
        let (os, (architecture, variant)) = match parts[1..] {
            [] if KNOWN_OS.contains(&os.as_str()) => {
                let host = Self::host();
                (os, (host.architecture, host.variant))
            }
            [] => {
                let (architecture, variant) = normal_architecture(parts[0], None);
                if !KNOWN_ARCHITECTURES.contains(&architecture.as_str()) {
                    return Err(fail());
                }
                (Self::host().os, (architecture, variant))
            }
            [architecture] => (os, normal_architecture(architecture, None)),
            [architecture, variant] => (os, normal_architecture(architecture, Some(variant))),
            _ => return Err(fail()),
        };
        Ok(Self {
            architecture,
            os,
            os_version,
            variant,
        })
    }

    /// How well an image for `self` serves `wanted`: lower is better, `None` not at all.
    ///
    /// An Arm machine runs images for its own variant and older ones.
    pub fn fitness_for(&self, wanted: &Self) -> Option<u8> {
        if (&self.os, &self.architecture) != (&wanted.os, &wanted.architecture)
            || !self.version_serves(wanted)
        {
            return None;
        }
        let normal = |p: &Self| {
            let default = match p.architecture.as_str() {
                "arm" => "v7",
                "arm64" => "v8",
                "amd64" => "v1",
                _ => "",
            };
            p.variant.clone().unwrap_or_else(|| default.to_owned())
        };
        let (have, want) = (normal(self), normal(wanted));
        let level = |v: &str| v.strip_prefix('v').and_then(|n| n.parse::<u8>().ok());
        match (level(&have), level(&want)) {
            _ if have == want => Some(0),
            (Some(have), Some(want)) if have < want => Some(want - have),
            _ => None,
        }
    }

    /// Whether an image for this version of Windows runs on the wanted one. Other systems'
    /// versions, and versions that nobody knows, stop nothing.
    fn version_serves(&self, wanted: &Self) -> bool {
        let (Some(have), Some(want)) = (&self.os_version, &wanted.os_version) else {
            return true;
        };
        if self.os != "windows" {
            return true;
        }
        let Some((want_release, want)) = windows_build(want) else {
            return true;
        };
        let Some((release, have)) = windows_build(have) else {
            return false;
        };
        let [oldest, newer] = WINDOWS_COMPATIBLE_SINCE;
        if release != want_release || want < oldest {
            return release == want_release && have == want;
        }
        let since = if want > newer { newer } else { oldest };
        (since..=want).contains(&have)
    }
}

/// Architecture and variant in Go's names.
fn normal_architecture(architecture: &str, variant: Option<&str>) -> (String, Option<String>) {
    let variant = variant.map(str::to_ascii_lowercase);
    match architecture.to_ascii_lowercase().as_str() {
        "x86_64" | "x86-64" | "amd64" => ("amd64".to_owned(), variant.filter(|v| v != "v1")),
        "i386" => ("386".to_owned(), None),
        "aarch64" | "arm64" => (
            "arm64".to_owned(),
            variant.filter(|v| !matches!(v.as_str(), "8" | "v8")),
        ),
        "armhf" => ("arm".to_owned(), Some("v7".to_owned())),
        "armel" => ("arm".to_owned(), Some("v6".to_owned())),
        "arm" => {
            let variant = match variant.as_deref() {
                None | Some("" | "7") => "v7".to_owned(),
                Some("5" | "6" | "8") => format!("v{}", variant.as_deref().unwrap_or_default()),
                Some(other) => other.to_owned(),
            };
            ("arm".to_owned(), Some(variant))
        }
        other => (other.to_owned(), variant),
    }
}

/// `MAJOR.MINOR.BUILD[.REVISION]` → major and minor, build.
fn windows_build(version: &str) -> Option<((u8, u8), u16)> {
    let mut parts = version.split('.');
    let release = (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?);
    Some((release, parts.next()?.parse().ok()?))
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.os)?;
        if let Some(version) = &self.os_version {
            write!(f, "({version})")?;
        }
        write!(f, "/{}", self.architecture)?;
        if let Some(variant) = &self.variant {
            write!(f, "/{variant}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn platforms_are_normalised() {
        for (text, expected) in [
            ("linux/amd64", "linux/amd64"),
            ("Linux/x86_64", "linux/amd64"),
            ("linux/arm64/v8", "linux/arm64"),
            ("linux/arm", "linux/arm/v7"),
            ("linux/armel", "linux/arm/v6"),
            ("linux/amd64/v3", "linux/amd64/v3"),
            ("linux/s390x", "linux/s390x"),
            ("windows(10.0.17763)/amd64", "windows(10.0.17763)/amd64"),
            ("windows()/x86_64", "windows/amd64"),
            ("x86_64", "linux/amd64"),
            ("arm", "linux/arm/v7"),
        ] {
            assert_eq!(
                Platform::parse(text).unwrap().to_string(),
                expected,
                "{text}"
            );
        }
        let mut host = Platform::host();
        assert_eq!(Platform::parse("linux"), Ok(host.clone()));
        host.os = "darwin".to_owned();
        assert_eq!(Platform::parse("macos"), Ok(host));
        for bad in [
            "",
            "lnux",
            "linux/",
            "linux/a/b/c",
            "li nux/amd64",
            "windows(1/amd64",
            "(1)/amd64",
            "windows(1))/amd64",
            "windows(a b)/amd64",
            "linux/amd64(1)",
        ] {
            assert_eq!(Platform::parse(bad), Err(PlatformError(bad.to_owned())));
        }
    }

    #[test]
    fn an_older_variant_serves_and_a_newer_does_not() {
        let p = |text| Platform::parse(text).unwrap();
        assert_eq!(p("linux/arm/v6").fitness_for(&p("linux/arm/v7")), Some(1));
        assert_eq!(p("linux/arm/v7").fitness_for(&p("linux/arm/v6")), None);
        assert_eq!(p("linux/amd64").fitness_for(&p("linux/amd64")), Some(0));
        assert_eq!(p("linux/amd64/v3").fitness_for(&p("linux/amd64")), None);
        assert_eq!(p("linux/amd64").fitness_for(&p("linux/arm64")), None);
    }

    #[test]
    fn a_version_of_windows_runs_images_for_those_that_it_is_compatible_with() {
        let serves = |have: &str, want: &str| {
            let [have, want] = [have, want].map(|v| format!("windows({v})/amd64"));
            let have = Platform::parse(&have).unwrap();
            have.fitness_for(&Platform::parse(&want).unwrap()).is_some()
        };
        for (have, want, expected) in [
            ("10.0.17763.1", "10.0.17763.9", true),
            ("10.0.17763", "10.0.17764", false),
            ("10.0.17763", "10.0.20348", false),
            ("10.0.20348", "10.0.20349", true),
            ("10.0.20348", "10.0.26100", true),
            ("10.0.20348", "10.0.26101", false),
            ("10.0.26100", "10.0.26101", true),
            ("10.0.26100", "10.0.20348", false),
            ("1.1.0", "1.2.3", false),
            ("", "10.0.17763", true),
            ("10.0.17763", "", true),
            ("10.0.17763", "some", true),
            ("some", "10.0.17763", false),
        ] {
            assert_eq!(serves(have, want), expected, "{have} for {want}");
        }
    }
}
