//! `--output`: comma-separated `key=value` fields, as `buildx build` takes them.

use std::path::PathBuf;

use thiserror::Error;

use crate::pipeline::Output;

/// What one `--output` asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Wanted {
    /// A file.
    File(Output),
    /// An image with further names, and whether it is pushed.
    Image {
        /// From `name=`.
        names: Vec<String>,
        /// `type=registry`, or `push=true`.
        push: bool,
    },
    /// `type=cacheonly`: nothing, and knowingly so.
    Nothing,
}

/// Why an `--output` is refused.
#[derive(Debug, Error, PartialEq, Eq)]
pub(super) enum OutputError {
    /// It is no list of fields.
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
}

impl Wanted {
    /// Parses the value of one `--output`.
    ///
    /// # Errors
    /// [`OutputError`].
    ///
    /// <https://docs.docker.com/reference/cli/docker/buildx/build/#output>
    pub(super) fn parse(output: &str) -> Result<Self, OutputError> {
        let malformed = |reason: String| OutputError::Malformed {
            output: output.to_owned(),
            reason,
        };
        let unsupported = |what: String| OutputError::Unsupported {
            output: output.to_owned(),
            what,
        };
        if output == "-" {
            return Err(unsupported("type=tar (what \"-\" means)".to_owned()));
        }
        let fields = split_fields(output).map_err(|reason| malformed(reason.to_owned()))?;
        if let [path] = &fields[..]
            && !path.is_empty()
            && !path.contains('=')
        {
            return Err(unsupported(
                "type=local (what a path alone means)".to_owned(),
            ));
        }
        let (mut kind, mut dest, mut push) = (None, None, None);
        let mut names = Vec::new();
        for field in &fields {
            let (key, value) = field
                .split_once('=')
                .ok_or_else(|| malformed(format!("the field {field:?} has no \"=\"")))?;
            match key.trim().to_ascii_lowercase().as_str() {
                "type" => kind = Some(value.to_owned()),
                "dest" => dest = Some(value.to_owned()),
                "name" => names.extend(value.split(',').map(str::to_owned)),
                "push" => push = Some(parse_bool(value).ok_or_else(|| not_bool(output, field))?),
                "tar" => match parse_bool(value) {
                    Some(true) => {}
                    Some(false) => return Err(unsupported("a layout in a directory".to_owned())),
                    None => return Err(not_bool(output, field)),
                },
                other => return Err(unsupported(format!("the field {other:?}"))),
            }
        }
        let kind = kind.ok_or_else(|| malformed("the field \"type=\" is missing".to_owned()))?;
        let no_dest = |wanted| match &dest {
            None => Ok(wanted),
            Some(_) => Err(malformed(format!("type={kind} has no \"dest=\""))),
        };
        match kind.as_str() {
            "oci" if push.is_some() => Err(malformed("type=oci has no \"push=\"".to_owned())),
            "oci" if !names.is_empty() => Err(unsupported(
                "the field \"name\" of type=oci (use --tag)".to_owned(),
            )),
            "oci" => match dest.as_deref() {
                None | Some("") => Err(malformed(
                    "type=oci needs \"dest=FILE\", or \"dest=-\" for standard output".to_owned(),
                )),
                Some(dest) => Ok(Self::File(Output::OciArchive {
                    dest: PathBuf::from(dest),
                })),
            },
            "registry" => no_dest(Self::Image {
                names,
                push: push.unwrap_or(true),
            }),
            "image" => no_dest(Self::Image {
                names,
                push: push.unwrap_or(false),
            }),
            "cacheonly" => no_dest(Self::Nothing),
            "docker" | "local" | "tar" => Err(unsupported(format!("type={kind}"))),
            other => Err(malformed(format!(
                "unknown type {other:?}: expected \"oci\" or \"registry\""
            ))),
        }
    }
}

fn not_bool(output: &str, field: &str) -> OutputError {
    OutputError::Malformed {
        output: output.to_owned(),
        reason: format!("the field {field:?} is not \"true\" or \"false\""),
    }
}

/// What Go's `strconv.ParseBool` takes.
fn parse_bool(text: &str) -> Option<bool> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Some(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Some(false),
        _ => None,
    }
}

/// Splits one CSV record; a field in double quotes may hold commas, `""` is a quote in it.
fn split_fields(text: &str) -> Result<Vec<String>, &'static str> {
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

    #[test]
    fn outputs_are_read_as_buildx_reads_them() {
        let file = |dest: &str| Wanted::File(Output::OciArchive { dest: dest.into() });
        let image = |names: &[&str], push| Wanted::Image {
            names: names.iter().map(|&n| n.to_owned()).collect(),
            push,
        };
        for (output, expected) in [
            ("type=oci,dest=a.tar", file("a.tar")),
            ("dest=-,type=oci,tar=true", file("-")),
            ("type=oci,\"dest=a,b\"\"c\"", file("a,b\"c")),
            ("type=registry", image(&[], true)),
            ("type=image", image(&[], false)),
            (
                "type=image,\"name=a,b\",push=true",
                image(&["a", "b"], true),
            ),
            ("type=cacheonly", Wanted::Nothing),
        ] {
            assert_eq!(Wanted::parse(output), Ok(expected), "{output}");
        }
    }

    #[test]
    fn what_cannot_be_honoured_is_refused() {
        for (output, expected) in [
            (
                "-",
                "--output \"-\": type=tar (what \"-\" means) is not supported yet",
            ),
            (
                "out",
                "--output \"out\": type=local (what a path alone means) is not supported yet",
            ),
            (
                "type=docker",
                "--output \"type=docker\": type=docker is not supported yet",
            ),
            (
                "type=oci,dest=a,compression=zstd",
                "--output \"type=oci,dest=a,compression=zstd\": the field \"compression\" is not supported yet",
            ),
            (
                "type=oci",
                "invalid --output \"type=oci\": type=oci needs \"dest=FILE\", or \"dest=-\" for standard output",
            ),
            (
                "dest=a",
                "invalid --output \"dest=a\": the field \"type=\" is missing",
            ),
            (
                "type=oic,dest=a",
                "invalid --output \"type=oic,dest=a\": unknown type \"oic\": expected \"oci\" or \"registry\"",
            ),
            ("", "invalid --output \"\": the field \"\" has no \"=\""),
            (
                "type=\"oci",
                "invalid --output \"type=\\\"oci\": unknown type \"\\\"oci\": expected \"oci\" or \"registry\"",
            ),
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
            assert_eq!(Wanted::parse(output).unwrap_err().to_string(), expected);
        }
    }
}
