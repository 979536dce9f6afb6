//! `--output`: comma-separated `key=value` fields, as `buildx build` takes them.

use std::path::PathBuf;

use thiserror::Error;

use super::values::annotate;
use crate::image::{Annotations, Reference};
use crate::pipeline::{Compression, ImageFormat, ImageOutput, LayerCompression, Output};

/// What one `--output` asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Wanted {
    /// A file or directory.
    File(Output),
    /// An image with further names, and whether it is pushed.
    Image {
        /// From `name=`.
        names: Vec<String>,
        /// `type=registry`, or `push=true`.
        push: bool,
        /// From `annotation.NAME=`.
        annotations: Annotations,
        /// From `compression=` and its like, or what the flags say.
        compression: LayerCompression,
    },
    /// `type=cacheonly`: nothing, and knowingly so.
    Nothing,
}

/// Why an `--output` is refused.
#[derive(Debug, Error, PartialEq, Eq)]
pub(super) enum OutputError {
    /// It is no list of fields, or they do not go together.
    #[error("invalid --output {output:?}: {reason}")]
    Malformed {
        /// As given.
        output: String,
        /// What is wrong with it.
        reason: String,
    },
    /// `buildx` has it, this program does not.
    #[error("--output {output:?}: {what} is not supported yet")]
    Unsupported {
        /// As given.
        output: String,
        /// The type or field.
        what: String,
    },
    /// `type=docker` without a file.
    #[error("--output {0:?}: there is no daemon to load into")]
    Load(String),
}

impl OutputError {
    /// What to do about it.
    pub(super) fn hint(&self) -> Option<&'static str> {
        match self {
            Self::Load(_) => Some("use -o type=docker,dest=- and pipe into `docker load`"),
            Self::Malformed { .. } | Self::Unsupported { .. } => None,
        }
    }
}

/// How layers are compressed, as the user says it: for all outputs, or for one of them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct CompressionText {
    /// `gzip`, `zstd`, `uncompressed`.
    pub(super) kind: Option<String>,
    /// A number.
    pub(super) level: Option<String>,
    /// Whether layers that exist are converted.
    pub(super) force: Option<bool>,
}

impl CompressionText {
    /// What this says, and where it says nothing, `others`; else gzip.
    ///
    /// # Errors
    /// What is wrong, for people.
    pub(super) fn resolve(&self, others: &Self) -> Result<LayerCompression, String> {
        let kind = self.kind.as_ref().or(others.kind.as_ref());
        let kind = kind.map_or("gzip", String::as_str);
        // A level for another format would mean something else.
        let is_own = self.kind.is_some() && self.kind != others.kind;
        let others_level = others.level.as_ref().filter(|_| !is_own);
        let level = self.level.as_ref().or(others_level);
        let number = level.map(|text| {
            text.parse::<u8>()
                .map_err(|_| format!("the compression level {text:?} is no number from 0 to 22"))
        });
        let number = number.transpose()?;
        let compression = match kind {
            "gzip" => number.map_or(Compression::GZIP, |level| Compression::Gzip { level }),
            "zstd" => number.map_or(Compression::ZSTD, |level| Compression::Zstd { level }),
            "uncompressed" if number.is_some() => {
                return Err("layers that are uncompressed have no compression level".to_owned());
            }
            "uncompressed" => Compression::None,
            "estargz" => {
                return Err(
                    "compression \"estargz\" is not supported: it is gzip with an index for \
                     readers that fetch single files, which sockless does not write; use \
                     \"gzip\" or \"zstd\""
                        .to_owned(),
                );
            }
            other => {
                return Err(format!(
                    "unknown compression {other:?}: expected \"uncompressed\", \"gzip\" or \"zstd\""
                ));
            }
        };
        compression.check().map_err(|error| error.to_string())?;
        Ok(LayerCompression {
            compression,
            force: self.force.or(others.force).unwrap_or(false),
        })
    }
}

/// Fields of images, and the one value each that says what is done anyway.
const AS_IT_IS: [(&str, &str); 7] = [
    ("name-canonical", "false"),
    ("oci-mediatypes", "true"),
    ("prefer-nondist-layers", "false"),
    ("push-by-digest", "false"),
    ("registry.insecure", "false"),
    ("rewrite-timestamp", "false"),
    ("unpack", "false"),
];

/// The fields of one `--output`, read and not judged.
#[derive(Default)]
struct Fields {
    kind: Option<String>,
    dest: Option<String>,
    push: Option<bool>,
    tar: Option<bool>,
    platform_split: Option<bool>,
    names: Vec<String>,
    annotations: Annotations,
    compression: CompressionText,
    /// The first field that only images have.
    of_images: Option<String>,
    /// The first field that only root filesystems have.
    of_files: Option<String>,
}

impl Wanted {
    /// Parses the value of one `--output`; `compression` is what the flags say of all.
    ///
    /// # Errors
    /// [`OutputError`].
    ///
    /// <https://docs.docker.com/reference/cli/docker/buildx/build/#output>
    pub(super) fn parse(output: &str, compression: &CompressionText) -> Result<Self, OutputError> {
        let malformed = |reason: String| OutputError::Malformed {
            output: output.to_owned(),
            reason,
        };
        let unsupported = |what: String| OutputError::Unsupported {
            output: output.to_owned(),
            what,
        };
        if output == "-" {
            let dest = PathBuf::from(output);
            return Ok(Self::File(Output::Tar {
                dest,
                platform_split: None,
            }));
        }
        let list = split_fields(output).map_err(|reason| malformed(reason.to_owned()))?;
        if let [path] = &list[..]
            && !path.is_empty()
            && !path.contains('=')
        {
            let dest = PathBuf::from(path);
            return Ok(Self::File(Output::Local {
                dest,
                platform_split: None,
            }));
        }
        let fields = Fields::read(output, &list)?;
        let kind = fields
            .kind
            .ok_or_else(|| malformed("the field \"type=\" is missing".to_owned()))?;
        let dest = fields.dest.filter(|dest| !dest.is_empty());
        let has_no = |field: &str| Err(malformed(format!("type={kind} has no {field:?}")));
        match kind.as_str() {
            "oci" | "docker" | "registry" | "image" => {
                if let Some(field) = fields.of_files {
                    return has_no(&format!("{field}="));
                }
            }
            "tar" | "local" | "cacheonly" => {
                if let Some(field) = fields.of_images {
                    return has_no(&format!("{field}="));
                }
            }
            _ => {}
        }
        let compression = fields.compression.resolve(compression).map_err(malformed)?;
        let file = |dest: Option<String>| PathBuf::from(dest.as_deref().unwrap_or("-"));
        let directory = |dest: Option<String>| match dest.as_deref() {
            None => Err(malformed(format!("type={kind} needs \"dest=DIR\""))),
            Some("-") => Err(malformed(
                "a directory cannot be written to standard output".to_owned(),
            )),
            Some(dest) => Ok(PathBuf::from(dest)),
        };
        match kind.as_str() {
            "oci" | "docker" => {
                if fields.push.is_some() {
                    return has_no("push=");
                }
                let (format, dest) = match (kind.as_str(), fields.tar) {
                    (_, Some(false)) => (ImageFormat::OciLayout, directory(dest)?),
                    ("docker", _) if dest.is_none() => {
                        return Err(OutputError::Load(output.to_owned()));
                    }
                    ("docker", _) => (ImageFormat::DockerArchive, file(dest)),
                    _ => (ImageFormat::OciArchive, file(dest)),
                };
                let names = fields
                    .names
                    .iter()
                    .map(|name| match Reference::parse(name) {
                        Ok(name) if name.digest().is_some() => {
                            Err(malformed(format!("the name {name} has a digest")))
                        }
                        Ok(name) => Ok(name),
                        Err(error) => Err(malformed(error.to_string())),
                    });
                Ok(Self::File(Output::Image(ImageOutput {
                    format,
                    dest,
                    names: names.collect::<Result<_, _>>()?,
                    annotations: fields.annotations,
                    compression,
                })))
            }
            "tar" => Ok(Self::File(Output::Tar {
                dest: file(dest),
                platform_split: fields.platform_split,
            })),
            "local" => Ok(Self::File(Output::Local {
                dest: directory(dest)?,
                platform_split: fields.platform_split,
            })),
            "registry" | "image" if dest.is_some() => has_no("dest="),
            "registry" | "image" if fields.tar.is_some() => has_no("tar="),
            "registry" | "image" => Ok(Self::Image {
                names: fields.names,
                push: fields.push.unwrap_or(kind == "registry"),
                annotations: fields.annotations,
                compression,
            }),
            "cacheonly" if dest.is_some() => has_no("dest="),
            "cacheonly" => Ok(Self::Nothing),
            "moby" => Err(unsupported(format!("type={kind}"))),
            other => Err(malformed(format!(
                "unknown type {other:?}: expected \"oci\", \"docker\", \"tar\", \"local\", \"registry\", \"image\" or \"cacheonly\""
            ))),
        }
    }
}

impl Fields {
    fn read(output: &str, list: &[String]) -> Result<Self, OutputError> {
        let malformed = |reason: String| OutputError::Malformed {
            output: output.to_owned(),
            reason,
        };
        let mut fields = Self::default();
        for field in list {
            let (key, value) = field
                .split_once('=')
                .ok_or_else(|| malformed(format!("the field {field:?} has no \"=\"")))?;
            let (key, bool) = (key.trim(), || {
                parse_bool(value).ok_or_else(|| not_bool(output, field))
            });
            let lower = key.to_ascii_lowercase();
            let unsupported = || OutputError::Unsupported {
                output: output.to_owned(),
                what: format!("the field {lower:?}"),
            };
            let as_it_is = AS_IT_IS.iter().find(|(known, _)| *known == lower);
            match lower.as_str() {
                "type" => {
                    fields.kind = Some(value.to_owned());
                    continue;
                }
                "dest" => {
                    fields.dest = Some(value.to_owned());
                    continue;
                }
                "mode" if value.is_empty() || value == "copy" => {
                    fields.of_files.get_or_insert(lower);
                    continue;
                }
                "platform-split" => {
                    fields.platform_split = Some(bool()?);
                    fields.of_files.get_or_insert(lower);
                    continue;
                }
                "name" => fields.names.extend(value.split(',').map(str::to_owned)),
                "push" => fields.push = Some(bool()?),
                "compression" => fields.compression.kind = Some(value.to_owned()),
                "compression-level" => fields.compression.level = Some(value.to_owned()),
                "force-compression" => fields.compression.force = Some(bool()?),
                "tar" => fields.tar = Some(value.is_empty() || bool()?),
                _ if let Some((_, said)) = as_it_is => {
                    let is_said = match parse_bool(said) {
                        Some(said) => bool()? == said,
                        None => value == *said,
                    };
                    if !is_said {
                        return Err(unsupported());
                    }
                }
                _ => {
                    // The name of an annotation keeps its case.
                    let Some((kind, name)) = annotation(key) else {
                        return Err(unsupported());
                    };
                    annotate(&mut fields.annotations, &kind, name, value)
                        .map_err(|reason| malformed(format!("the field {field:?}: {reason}")))?;
                }
            }
            fields.of_images.get_or_insert(lower);
        }
        Ok(fields)
    }
}

/// Splits `annotation.NAME` or `annotation-TYPE[PLATFORM].NAME` into type and name.
///
/// <https://docs.docker.com/build/metadata/annotations/#specify-annotations>
fn annotation(key: &str) -> Option<(String, &str)> {
    let (kind, name) = key.strip_prefix("annotation")?.split_once('.')?;
    let kind = match kind.strip_prefix('-') {
        Some(kind) => kind.to_owned(),
        // Without a type, perhaps with a platform, it is one of the manifest.
        None if kind.is_empty() || kind.starts_with('[') => format!("manifest{kind}"),
        None => return None,
    };
    (!name.is_empty()).then_some((kind, name))
}

fn not_bool(output: &str, field: &str) -> OutputError {
    OutputError::Malformed {
        output: output.to_owned(),
        reason: format!("the field {field:?} is not \"true\" or \"false\""),
    }
}

/// What Go's `strconv.ParseBool` takes.
pub(super) fn parse_bool(text: &str) -> Option<bool> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Some(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Some(false),
        _ => None,
    }
}

/// Splits one CSV record; a field in double quotes may hold commas, `""` is a quote in it.
pub(super) fn split_fields(text: &str) -> Result<Vec<String>, &'static str> {
    let mut fields = Vec::new();
    let mut rest = text;
    loop {
        let field;
        if let Some(mut quoted) = rest.strip_prefix('"') {
            let mut value = String::new();
            loop {
                let (before, after) = quoted.split_once('"').ok_or("a quote is not closed")?;
                value.push_str(before);
                match after.strip_prefix('"') {
                    Some(more) => {
                        value.push('"');
                        quoted = more;
                    }
                    None => {
                        rest = after;
                        break;
                    }
                }
            }
            field = value;
        } else {
            let end = rest.find(',').unwrap_or(rest.len());
            field = rest[..end].to_owned();
            rest = &rest[end..];
        }
        fields.push(field);
        if rest.is_empty() {
            return Ok(fields);
        }
        rest = rest
            .strip_prefix(',')
            .ok_or("a closing quote is followed by something else than a comma")?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::{Platform, PlatformAnnotations};

    fn image(format: ImageFormat, dest: &str) -> ImageOutput {
        ImageOutput {
            format,
            dest: dest.into(),
            names: Vec::new(),
            annotations: Annotations::default(),
            compression: LayerCompression::default(),
        }
    }

    fn parse(output: &str) -> Result<Wanted, OutputError> {
        Wanted::parse(output, &CompressionText::default())
    }

    /// What an output makes of its fields and the flags.
    fn compressed(output: &str, flags: [&str; 3]) -> Result<LayerCompression, String> {
        let given = |text: &str| (!text.is_empty()).then(|| text.to_owned());
        let flags = CompressionText {
            kind: given(flags[0]),
            level: given(flags[1]),
            force: given(flags[2]).map(|text| text == "true"),
        };
        match Wanted::parse(output, &flags).map_err(|error| error.to_string())? {
            Wanted::File(Output::Image(ImageOutput { compression, .. }))
            | Wanted::Image { compression, .. } => Ok(compression),
            other => panic!("{other:?} has no layers"),
        }
    }

    #[test]
    fn each_output_compresses_as_it_says_and_else_as_the_flags_say() {
        use Compression::{Gzip, Zstd};
        let wanted = |compression, force| LayerCompression { compression, force };
        for (output, flags, expected) in [
            ("type=oci", ["", "", ""], wanted(Gzip { level: 6 }, false)),
            (
                "type=oci,compression=zstd",
                ["", "", ""],
                wanted(Zstd { level: 3 }, false),
            ),
            (
                "type=registry,compression=gzip,compression-level=0,force-compression=1",
                ["", "", ""],
                wanted(Gzip { level: 0 }, true),
            ),
            (
                "type=docker,dest=x,compression=uncompressed",
                ["zstd", "19", "true"],
                wanted(Compression::None, true),
            ),
            (
                "type=image",
                ["zstd", "19", ""],
                wanted(Zstd { level: 19 }, false),
            ),
            (
                "type=oci,compression-level=9",
                ["zstd", "", ""],
                wanted(Zstd { level: 9 }, false),
            ),
            (
                "type=oci,compression=zstd",
                ["zstd", "7", ""],
                wanted(Zstd { level: 7 }, false),
            ),
            (
                "type=oci,compression=gzip",
                ["zstd", "19", ""],
                wanted(Gzip { level: 6 }, false),
            ),
            (
                "type=oci,force-compression=false",
                ["", "12", "true"],
                wanted(Gzip { level: 12 }, false),
            ),
        ] {
            assert_eq!(
                compressed(output, flags),
                Ok(expected),
                "{output} {flags:?}"
            );
        }
        let invalid = |output: &str, reason: &str| {
            let message = format!("invalid --output {output:?}: {reason}");
            assert_eq!(compressed(output, ["", "", ""]), Err(message));
        };
        invalid(
            "type=oci,compression-level=13",
            "there is no gzip level 13; levels are 0 to 12",
        );
        invalid(
            "type=oci,compression=zstd,compression-level=0",
            "there is no zstd level 0; levels are 1 to 22",
        );
        invalid(
            "type=oci,compression-level=-1",
            "the compression level \"-1\" is no number from 0 to 22",
        );
        invalid(
            "type=oci,compression=uncompressed,compression-level=1",
            "layers that are uncompressed have no compression level",
        );
        invalid(
            "type=oci,compression=lz4",
            "unknown compression \"lz4\": expected \"uncompressed\", \"gzip\" or \"zstd\"",
        );
        invalid(
            "type=registry,compression=estargz",
            "compression \"estargz\" is not supported: it is gzip with an index for readers that \
             fetch single files, which sockless does not write; use \"gzip\" or \"zstd\"",
        );
        invalid(
            "type=tar,compression=zstd",
            "type=tar has no \"compression=\"",
        );
    }

    #[test]
    fn outputs_are_read_as_buildx_reads_them() {
        use ImageFormat::{DockerArchive, OciArchive, OciLayout};
        let file = |format, dest| Wanted::File(Output::Image(image(format, dest)));
        let pushed = |names: &[&str], push| Wanted::Image {
            names: names.iter().map(|&n| n.to_owned()).collect(),
            push,
            annotations: Annotations::default(),
            compression: LayerCompression::default(),
        };
        let tar = |dest: &str, platform_split| {
            Wanted::File(Output::Tar {
                dest: dest.into(),
                platform_split,
            })
        };
        let local = |dest: &str, platform_split| {
            Wanted::File(Output::Local {
                dest: dest.into(),
                platform_split,
            })
        };
        for (output, expected) in [
            ("-", tar("-", None)),
            ("type=tar", tar("-", None)),
            (
                "type=tar,dest=a.tar,platform-split=false",
                tar("a.tar", Some(false)),
            ),
            ("out", local("out", None)),
            ("./a b", local("./a b", None)),
            (
                "type=local,dest=out,platform-split=true",
                local("out", Some(true)),
            ),
            ("type=local,dest=out,mode=copy", local("out", None)),
            ("type=oci", file(OciArchive, "-")),
            ("type=oci,dest=a.tar", file(OciArchive, "a.tar")),
            ("dest=-,type=oci,tar=true", file(OciArchive, "-")),
            ("type=oci,\"dest=a,b\"\"c\"", file(OciArchive, "a,b\"c")),
            ("type=oci,tar=false,dest=d", file(OciLayout, "d")),
            ("type=docker,dest=-", file(DockerArchive, "-")),
            ("type=docker,tar=0,dest=d", file(OciLayout, "d")),
            (
                "type=oci,dest=a,compression=gzip,oci-mediatypes=1,Force-Compression=f",
                file(OciArchive, "a"),
            ),
            ("type=registry", pushed(&[], true)),
            ("type=image", pushed(&[], false)),
            (
                "type=image,\"name=a,b\",push=true",
                pushed(&["a", "b"], true),
            ),
            ("type=cacheonly", Wanted::Nothing),
        ] {
            assert_eq!(parse(output), Ok(expected), "{output}");
        }
    }

    #[test]
    fn names_and_annotations_belong_to_one_output() {
        let pairs = |pairs: &[(&str, &str)]| {
            let pairs = pairs.iter();
            pairs
                .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
                .collect()
        };
        let of_platform = PlatformAnnotations {
            manifest: pairs(&[("d", "4")]),
            descriptor: pairs(&[("e", "5")]),
        };
        let platform = Platform::parse("linux/amd64").unwrap();
        let annotations = Annotations {
            manifest: pairs(&[("a.b", "1=2"), ("C", "")]),
            platforms: [(platform, of_platform)].into(),
            ..Annotations::default()
        };
        let output = "annotation.a.b=1=2,annotation-manifest.C=,annotation[linux/amd64].d=4,\
                      annotation-manifest-descriptor[linux/amd64].e=5";
        assert_eq!(
            parse(&format!("type=docker,dest=x,\"name=a:1,h.io/b\",{output}")),
            Ok(Wanted::File(Output::Image(ImageOutput {
                names: ["a:1", "h.io/b"]
                    .map(|name| Reference::parse(name).unwrap())
                    .to_vec(),
                annotations: annotations.clone(),
                ..image(ImageFormat::DockerArchive, "x")
            })))
        );
        assert_eq!(
            parse(&format!("type=registry,{output}")),
            Ok(Wanted::Image {
                names: Vec::new(),
                push: true,
                annotations,
                compression: LayerCompression::default(),
            })
        );
    }

    #[test]
    fn what_cannot_be_honoured_is_refused() {
        for (output, expected) in [
            (
                "type=docker",
                "--output \"type=docker\": there is no daemon to load into",
            ),
            (
                "type=oci,dest=a,oci-mediatypes=false",
                "--output \"type=oci,dest=a,oci-mediatypes=false\": the field \"oci-mediatypes\" is not supported yet",
            ),
            (
                "type=local,dest=a,mode=delete",
                "--output \"type=local,dest=a,mode=delete\": the field \"mode\" is not supported yet",
            ),
            (
                "type=oci,platform-split=true",
                "invalid --output \"type=oci,platform-split=true\": type=oci has no \"platform-split=\"",
            ),
            (
                "type=tar,dest=a,attestation-prefix=x",
                "--output \"type=tar,dest=a,attestation-prefix=x\": the field \"attestation-prefix\" is not supported yet",
            ),
            (
                "type=local",
                "invalid --output \"type=local\": type=local needs \"dest=DIR\"",
            ),
            (
                "type=oci,tar=false,dest=-",
                "invalid --output \"type=oci,tar=false,dest=-\": a directory cannot be written to standard output",
            ),
            (
                "type=tar,name=a",
                "invalid --output \"type=tar,name=a\": type=tar has no \"name=\"",
            ),
            (
                "type=oci,mode=copy",
                "invalid --output \"type=oci,mode=copy\": type=oci has no \"mode=\"",
            ),
            (
                "type=oci,push=true",
                "invalid --output \"type=oci,push=true\": type=oci has no \"push=\"",
            ),
            (
                "type=oci,annotation-index[linux].a=b",
                "invalid --output \"type=oci,annotation-index[linux].a=b\": the field \"annotation-index[linux].a=b\": an index has no platform",
            ),
            (
                "type=oci,annotation.=b",
                "--output \"type=oci,annotation.=b\": the field \"annotation.\" is not supported yet",
            ),
            (
                "dest=a",
                "invalid --output \"dest=a\": the field \"type=\" is missing",
            ),
            (
                "type=oic,dest=a",
                "invalid --output \"type=oic,dest=a\": unknown type \"oic\": expected \"oci\", \"docker\", \"tar\", \"local\", \"registry\", \"image\" or \"cacheonly\"",
            ),
            ("", "invalid --output \"\": the field \"\" has no \"=\""),
            (
                "\"type=oci",
                "invalid --output \"\\\"type=oci\": a quote is not closed",
            ),
            (
                "\"type=oci\"x",
                "invalid --output \"\\\"type=oci\\\"x\": a closing quote is followed by something else than a comma",
            ),
            (
                "type=image,push=perhaps",
                "invalid --output \"type=image,push=perhaps\": the field \"push=perhaps\" is not \"true\" or \"false\"",
            ),
            (
                "type=registry,dest=x",
                "invalid --output \"type=registry,dest=x\": type=registry has no \"dest=\"",
            ),
        ] {
            assert_eq!(parse(output).unwrap_err().to_string(), expected);
        }
        let load = parse("type=docker").unwrap_err();
        assert_eq!(
            load.hint(),
            Some("use -o type=docker,dest=- and pipe into `docker load`")
        );
    }
}
