//! `RUN --mount`: one flag's value → a typed [`Mount`].
//!
//! Follows BuildKit, which reads the fields from left to right: `size`, `required` are
//! known only after the `type` that takes them, and the last of several values wins.
//!
//! <https://docs.docker.com/reference/dockerfile/#run---mount>

use std::ops::Range;

use thiserror::Error;

use super::csv::{self, CommaError, CommaField};
use super::error::quoted;
use super::expand::ExpandError;
use super::suggest;

/// The types of mounts.
const TYPES: &[&str] = &["bind", "cache", "secret", "ssh", "tmpfs"];

/// The ways to share a cache.
const SHARINGS: &[&str] = &["locked", "private", "shared"];

/// All keys, aliases included.
const KEYS: &[&str] = &[
    "type",
    "from",
    "source",
    "target",
    "readonly",
    "id",
    "sharing",
    "required",
    "size",
    "mode",
    "uid",
    "gid",
    "src",
    "dst",
    "destination",
    "ro",
    "rw",
    "readwrite",
    "env",
];

/// What a `--mount` asks for. Empty values count as absent, except where it says otherwise.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// Where it appears; relative to the working directory. Every kind but a secret or an
    /// agent's socket needs one other than `/`, which only whoever knows the working
    /// directory can check.
    pub target: Option<String>,
    /// What appears there.
    pub kind: MountKind,
}

/// The `type` of a mount with the options that matter to it.
///
/// Options that BuildKit takes for a type and does not use (such as `id` of a bind mount)
/// are dropped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MountKind {
    /// Files of the build context, a stage or an image.
    Bind {
        /// A stage, a named context or an image; absent for the build context.
        from: Option<String>,
        /// The path in it; absent for its root.
        source: Option<String>,
        /// Whether the process may write; what it writes is thrown away.
        read_write: bool,
    },
    /// A directory that outlives the build.
    Cache {
        /// Its name; absent for the cleaned `target`.
        id: Option<String>,
        /// What it holds at first; absent for nothing.
        from: Option<String>,
        /// The path in `from`; absent for its root.
        source: Option<String>,
        /// What happens when two steps want it at once.
        sharing: Sharing,
        /// Whether the process may only read.
        read_only: bool,
        /// Permissions of a directory made anew; 0755 where absent. Any 32 bits.
        mode: Option<u32>,
        /// Owner of a directory made anew; 0 where absent.
        uid: Option<u32>,
        /// Group of a directory made anew; 0 where absent.
        gid: Option<u32>,
    },
    /// An empty directory in memory.
    Tmpfs {
        /// Its size in bytes; absent for no limit of its own. Never 0.
        size_bytes: Option<u64>,
    },
    /// A secret as a file, a variable or both.
    Secret {
        /// Its name (`id` or `source`); absent for the last component of the `target`,
        /// which is then present.
        id: Option<String>,
        /// The variable that holds it. With one there is a file only if there is a
        /// `target`. May be empty: then nothing can be read from the variable, and there
        /// is no file all the same.
        env: Option<String>,
        /// Whether the step fails without it.
        required: bool,
        /// The file's permissions; 0400 where absent. Any 32 bits.
        mode: Option<u32>,
        /// The file's owner; 0 where absent.
        uid: Option<u32>,
        /// The file's group; 0 where absent.
        gid: Option<u32>,
    },
    /// The socket of an SSH agent.
    Ssh {
        /// Its name; absent for `default`.
        id: Option<String>,
        /// Whether the step fails without it.
        required: bool,
        /// The socket's permissions; 0600 where absent. Any 32 bits.
        mode: Option<u32>,
        /// The socket's owner; 0 where absent.
        uid: Option<u32>,
        /// The socket's group; 0 where absent.
        gid: Option<u32>,
    },
}

/// What happens when two steps want a cache at once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Sharing {
    /// Both have it.
    #[default]
    Shared,
    /// The second one gets another directory.
    Private,
    /// The second one waits.
    Locked,
}

/// Why a `--mount` cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("invalid --mount: {fault}")]
pub struct MountError {
    /// What is wrong.
    pub fault: MountFault,
    /// The bytes of the flag's value with the faulty field, or all of them.
    pub range: Range<usize>,
    /// Advice.
    pub hint: Option<String>,
}

/// What is wrong with a `--mount`.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum MountFault {
    /// It is no list of comma-separated fields.
    #[error(transparent)]
    Fields(#[from] CommaError),
    /// It is empty.
    #[error("it has no fields, such as type=cache,target=/var/cache")]
    Empty,
    /// A value cannot be expanded.
    #[error(transparent)]
    Expand(Box<ExpandError>),
    /// `from` holds a variable.
    #[error("\"from\" does not support variables, got {}", quoted(.0))]
    Variable(String),
    /// An unknown key.
    #[error("unexpected key {} in {}", quoted(.key), quoted(.field))]
    UnknownKey {
        /// In lower case.
        key: String,
        /// The whole field.
        field: String,
    },
    /// A field without `=`.
    #[error("field {} must be a key=value pair", quoted(.0))]
    NoValue(String),
    /// An unknown `type`.
    #[error("unsupported mount type {}: it must be {}", quoted(.0), TYPES.join(" or "))]
    Type(String),
    /// An unknown `sharing`.
    #[error("unsupported sharing value {}: it must be {}", quoted(.0), SHARINGS.join(" or "))]
    Sharing(String),
    /// A value that its key does not take.
    #[error("invalid value {} for {key}: {expected}", quoted(.value))]
    Value {
        /// The key as written, in lower case.
        key: &'static str,
        /// The value, expanded.
        value: String,
        /// What it must be.
        expected: &'static str,
    },
    /// A key that does not go with the mount's type.
    #[error("{key} is not for mounts of type {kind}")]
    NotForType {
        /// The key.
        key: &'static str,
        /// The type that is in force.
        kind: &'static str,
    },
    /// A secret that nothing names.
    #[error("a secret mount needs an id or a target")]
    SecretWithoutName,
    /// Two names for a secret.
    #[error("a secret mount can not have both source and id")]
    SecretTwoNames,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Type {
    Bind,
    Cache,
    Tmpfs,
    Secret,
    Ssh,
}

impl Type {
    fn name(self) -> &'static str {
        match self {
            Self::Bind => "bind",
            Self::Cache => "cache",
            Self::Tmpfs => "tmpfs",
            Self::Secret => "secret",
            Self::Ssh => "ssh",
        }
    }
}

/// A value and the place of its field. Later fields replace earlier ones.
type Placed<T> = Option<(T, Range<usize>)>;

/// What the fields said, before it is known whether it goes together.
#[derive(Debug)]
struct Fields {
    kind: Type,
    from: Placed<String>,
    source: Placed<String>,
    target: Placed<String>,
    id: Placed<String>,
    env: Option<String>,
    read_only: Option<bool>,
    required: bool,
    size_bytes: Option<u64>,
    sharing: Placed<Sharing>,
    mode: Placed<u32>,
    uid: Placed<u32>,
    gid: Placed<u32>,
}

/// Reads the value of a `--mount`. `expand` replaces the variables in one value; it is
/// called once for every field with a `=`, in their order.
///
/// # Errors
/// [`MountError`] for the first fault.
pub fn parse_mount(
    raw: &str,
    expand: &mut dyn FnMut(&str) -> Result<String, ExpandError>,
) -> Result<Mount, MountError> {
    check_mount(raw)?;
    let mut fields = Fields {
        kind: Type::Bind,
        from: None,
        source: None,
        target: None,
        id: None,
        env: None,
        read_only: None,
        required: false,
        size_bytes: None,
        sharing: None,
        mode: None,
        uid: None,
        gid: None,
    };
    for field in split(raw)? {
        fields.take(&field, expand)?;
    }
    fields.finish(raw)
}

/// What can be said about the value of a `--mount` before variables are known.
///
/// # Errors
/// [`MountError`] for misplaced quotes and for variables in `from`.
pub fn check_mount(raw: &str) -> Result<(), MountError> {
    for CommaField { text, range } in split(raw)? {
        let Some((key, value)) = text.split_once('=') else {
            continue;
        };
        let variable = value.find('$').is_some_and(|at| at + 1 < value.len());
        if key.to_lowercase() == "from" && variable {
            return Err(MountError {
                fault: MountFault::Variable(value.to_owned()),
                range,
                hint: Some("define a stage with FROM and name that".to_owned()),
            });
        }
    }
    Ok(())
}

fn split(raw: &str) -> Result<Vec<CommaField>, MountError> {
    let error = |fault, range| MountError {
        fault,
        range,
        hint: None,
    };
    match csv::placed_fields(raw) {
        Ok(fields) if fields.is_empty() => Err(error(MountFault::Empty, 0..0)),
        Ok(fields) => Ok(fields),
        Err((fault, range)) => Err(error(MountFault::Fields(fault), range)),
    }
}

impl Fields {
    /// Takes one field.
    fn take(
        &mut self,
        field: &CommaField,
        expand: &mut dyn FnMut(&str) -> Result<String, ExpandError>,
    ) -> Result<(), MountError> {
        let range = || field.range.clone();
        let fail = |fault| {
            Err(MountError {
                fault,
                range: range(),
                hint: None,
            })
        };
        let Some((key, value)) = field.text.split_once('=') else {
            match field.text.to_lowercase().as_str() {
                "readonly" | "ro" => self.read_only = Some(true),
                "readwrite" | "rw" => self.read_only = Some(false),
                "required" => {
                    self.only_for("required", &[Type::Secret, Type::Ssh], range())?;
                    self.required = true;
                }
                key => {
                    // A known key needs its value, not another key.
                    let known = KEYS.contains(&key);
                    return Err(MountError {
                        fault: MountFault::NoValue(field.text.clone()),
                        range: range(),
                        hint: did_you_mean(key, KEYS).filter(|_| !known && !key.is_empty()),
                    });
                }
            }
            return Ok(());
        };
        let key = key.to_lowercase();
        let value = match expand(value) {
            Ok(value) => value,
            Err(error) => return fail(MountFault::Expand(Box::new(error))),
        };
        let Some(&key) = KEYS.iter().find(|known| **known == key) else {
            return Err(MountError {
                hint: did_you_mean(&key, KEYS),
                fault: MountFault::UnknownKey {
                    key,
                    field: field.text.clone(),
                },
                range: range(),
            });
        };
        let wrong = |value, expected| {
            Err(MountError {
                fault: MountFault::Value {
                    key,
                    value,
                    expected,
                },
                range: range(),
                hint: None,
            })
        };
        match key {
            "type" => {
                self.kind = match value.to_lowercase().as_str() {
                    "bind" => Type::Bind,
                    "cache" => Type::Cache,
                    "tmpfs" => Type::Tmpfs,
                    "secret" => Type::Secret,
                    "ssh" => Type::Ssh,
                    lower => {
                        return Err(MountError {
                            hint: did_you_mean(lower, TYPES),
                            fault: MountFault::Type(value),
                            range: range(),
                        });
                    }
                };
            }
            "from" => self.from = Some((value, range())),
            "source" | "src" => self.source = Some((value, range())),
            "target" | "dst" | "destination" => self.target = Some((value, range())),
            "id" => self.id = Some((value, range())),
            "env" => self.env = Some(value),
            "readonly" | "ro" => match parse_bool(&value) {
                Some(read_only) => self.read_only = Some(read_only),
                None => return wrong(value, "it must be true or false"),
            },
            "readwrite" | "rw" => match parse_bool(&value) {
                Some(read_write) => self.read_only = Some(!read_write),
                None => return wrong(value, "it must be true or false"),
            },
            "required" => {
                self.only_for(key, &[Type::Secret, Type::Ssh], range())?;
                match parse_bool(&value) {
                    Some(required) => self.required = required,
                    None => return wrong(value, "it must be true or false"),
                }
            }
            "size" => {
                self.only_for(key, &[Type::Tmpfs], range())?;
                match parse_size(&value) {
                    Some(size) => self.size_bytes = Some(size).filter(|size| *size > 0),
                    None => return wrong(value, "it must be a size in bytes, such as 64m"),
                }
            }
            "sharing" => {
                let sharing = match value.to_lowercase().as_str() {
                    "shared" => Sharing::Shared,
                    "private" => Sharing::Private,
                    "locked" => Sharing::Locked,
                    lower => {
                        return Err(MountError {
                            hint: did_you_mean(lower, SHARINGS),
                            fault: MountFault::Sharing(value),
                            range: range(),
                        });
                    }
                };
                self.sharing = Some((sharing, range()));
            }
            "mode" => match parse_u32(&value, 8) {
                Some(mode) => self.mode = Some((mode, range())),
                None => return wrong(value, "it must be an octal number, such as 0400"),
            },
            "uid" => match parse_u32(&value, 10) {
                Some(uid) => self.uid = Some((uid, range())),
                None => return wrong(value, "it must be a number, names are not looked up"),
            },
            // The last of the keys.
            _ => match parse_u32(&value, 10) {
                Some(gid) => self.gid = Some((gid, range())),
                None => return wrong(value, "it must be a number, names are not looked up"),
            },
        }
        Ok(())
    }

    /// Fails unless the type so far is one of `types`.
    fn only_for(
        &self,
        key: &'static str,
        types: &[Type],
        range: Range<usize>,
    ) -> Result<(), MountError> {
        if types.contains(&self.kind) {
            return Ok(());
        }
        let names: Vec<&str> = types.iter().map(|t| t.name()).collect();
        Err(MountError {
            fault: MountFault::NotForType {
                key,
                kind: self.kind.name(),
            },
            range,
            hint: Some(format!(
                "{key} goes with type={}, which must stand before it",
                names.join(" or type=")
            )),
        })
    }

    /// Checks what goes together.
    fn finish(self, raw: &str) -> Result<Mount, MountError> {
        let kind = self.kind;
        let not_for_type = |key, range: &Range<usize>| MountError {
            fault: MountFault::NotForType {
                key,
                kind: kind.name(),
            },
            range: range.clone(),
            hint: None,
        };
        if matches!(kind, Type::Bind | Type::Tmpfs) {
            let owner = [("mode", &self.mode), ("uid", &self.uid), ("gid", &self.gid)];
            for (key, value) in owner {
                if let Some((_, range)) = value {
                    return Err(not_for_type(key, range));
                }
            }
        }
        let given = |value: &Placed<String>| value.as_ref().is_some_and(|(v, _)| !v.is_empty());
        if kind == Type::Secret
            && let Some((from, range)) = &self.from
            && !from.is_empty()
        {
            return Err(not_for_type("from", range));
        }
        if kind != Type::Cache
            && let Some((_, range)) = &self.sharing
        {
            return Err(not_for_type("sharing", range));
        }
        if kind == Type::Secret {
            if !given(&self.source) && !given(&self.target) && !given(&self.id) {
                let hint = match self.env.as_deref() {
                    None => "id=NAME says which secret is meant".to_owned(),
                    Some("") => "id=NAME,env=NAME gives the secret as a variable".to_owned(),
                    Some(env) => format!("id={env},env={env} says which secret is meant"),
                };
                return Err(MountError {
                    fault: MountFault::SecretWithoutName,
                    range: 0..raw.len(),
                    hint: Some(hint),
                });
            }
            if let Some((source, range)) = &self.source
                && !source.is_empty()
                && given(&self.id)
            {
                return Err(MountError {
                    fault: MountFault::SecretTwoNames,
                    range: range.clone(),
                    hint: Some("source is another word for a secret's id".to_owned()),
                });
            }
        }
        if kind == Type::Ssh
            && let Some((source, range)) = &self.source
            && !source.is_empty()
        {
            return Err(MountError {
                hint: Some("id=NAME says which agent is meant".to_owned()),
                ..not_for_type("source", range)
            });
        }
        let text = |value: Placed<String>| value.map(|(v, _)| v).filter(|v| !v.is_empty());
        let number = |value: Placed<u32>| value.map(|(v, _)| v);
        let target = text(self.target);
        let (id, from, source) = (text(self.id), text(self.from), text(self.source));
        let (mode, uid, gid) = (number(self.mode), number(self.uid), number(self.gid));
        let kind = match kind {
            Type::Bind => MountKind::Bind {
                from,
                source,
                read_write: self.read_only == Some(false),
            },
            Type::Cache => MountKind::Cache {
                id,
                from,
                source,
                sharing: self.sharing.map(|(v, _)| v).unwrap_or_default(),
                read_only: self.read_only == Some(true),
                mode,
                uid,
                gid,
            },
            Type::Tmpfs => MountKind::Tmpfs {
                size_bytes: self.size_bytes,
            },
            Type::Secret => MountKind::Secret {
                id: source.or(id),
                env: self.env,
                required: self.required,
                mode,
                uid,
                gid,
            },
            Type::Ssh => MountKind::Ssh {
                id,
                required: self.required,
                mode,
                uid,
                gid,
            },
        };
        Ok(Mount { target, kind })
    }
}

fn did_you_mean(word: &str, options: &[&str]) -> Option<String> {
    suggest::nearest(word, options).map(|near| format!("did you mean {near:?}?"))
}

/// A boolean as Go's `strconv.ParseBool` takes it: what BuildKit reads most of them with.
pub fn parse_bool(text: &str) -> Option<bool> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Some(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Some(false),
        _ => None,
    }
}

/// As Go's `strconv.ParseUint`: no sign.
fn parse_u32(text: &str, radix: u32) -> Option<u32> {
    if text.starts_with('+') {
        return None;
    }
    u32::from_str_radix(text, radix).ok()
}

/// A size in bytes with an optional binary unit, `1.5g`, `64 MiB`, `512b`; as Docker reads
/// sizes of memory. Fractions of a byte are dropped.
pub fn parse_size(text: &str) -> Option<u64> {
    let last = text.rfind(|c: char| c.is_ascii_digit() || matches!(c, '.' | ' '))?;
    let suffix = text[last + 1..].to_lowercase();
    let number = if text[last..].starts_with(' ') {
        &text[..last]
    } else {
        &text[..=last]
    };
    let factor: u32 = match suffix.as_str() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 1,
        "m" | "mb" | "mib" => 2,
        "g" | "gb" | "gib" => 3,
        "t" | "tb" | "tib" => 4,
        "p" | "pb" | "pib" => 5,
        _ => return None,
    };
    let number: f64 = number.parse().ok()?;
    let bytes = number * 1024f64.powi(factor.cast_signed());
    // What Go does outside of this is up to the processor.
    (bytes.is_finite() && bytes >= 0.0 && bytes < i64::MAX as f64).then_some(bytes as u64)
}

#[cfg(test)]
mod tests {
    use super::super::expand::{self, Environment, Options};
    use super::*;

    fn parse(raw: &str) -> Result<Mount, MountError> {
        let environment = Environment::from([
            ("T".to_owned(), "/target".to_owned()),
            ("K".to_owned(), "cache".to_owned()),
            ("E".to_owned(), String::new()),
        ]);
        parse_mount(raw, &mut |text| {
            Ok(expand::expand(text, '\\', &environment, Options::default())?.text)
        })
    }

    fn mount(raw: &str) -> (Option<String>, MountKind) {
        let mount = parse(raw).unwrap_or_else(|error| panic!("{raw}: {error}"));
        (mount.target, mount.kind)
    }

    #[track_caller]
    fn fails(raw: &str, at: &str, message: &str, hint: &str) {
        let error = parse(raw).unwrap_err();
        assert_eq!(error.to_string(), format!("invalid --mount: {message}"));
        assert_eq!(&raw[error.range.clone()], at, "{raw}");
        assert_eq!(error.hint.as_deref().unwrap_or_default(), hint, "{raw}");
    }

    fn some(text: &str) -> Option<String> {
        Some(text.to_owned())
    }

    fn bind(from: Option<&str>, source: Option<&str>, read_write: bool) -> MountKind {
        MountKind::Bind {
            from: from.map(str::to_owned),
            source: source.map(str::to_owned),
            read_write,
        }
    }

    #[test]
    fn binds() {
        assert_eq!(mount("target=/a"), (some("/a"), bind(None, None, false)));
        assert_eq!(mount("type=bind"), (None, bind(None, None, false)));
        assert_eq!(
            mount("type=Bind,FROM=s,src=/b/c,Dst=d,rw"),
            (some("d"), bind(Some("s"), Some("/b/c"), true))
        );
        for (raw, read_write) in [
            ("destination=/a,readwrite", true),
            ("destination=/a,readwrite=0", false),
            ("destination=/a,RW=T", true),
            ("destination=/a,ro=false", true),
            ("destination=/a,readonly=1", false),
            ("destination=/a,rw,ro", false),
            ("destination=/a,ro,rw", true),
        ] {
            assert_eq!(mount(raw), (some("/a"), bind(None, None, read_write)));
        }
        // Taken and of no effect; the last value wins; empty is absent.
        assert_eq!(
            mount("target=/x,id=i,env=e,target=$T,from=,source=$E,from=b$"),
            (some("/target"), bind(Some("b$"), None, false))
        );
        assert_eq!(mount("\"target=/a,b\"").0, some("/a,b"));
        assert_eq!(mount("target='/a b'").0, some("/a b"));
    }

    #[test]
    fn caches() {
        let cache = |sharing, read_only| MountKind::Cache {
            id: None,
            from: None,
            source: None,
            sharing,
            read_only,
            mode: None,
            uid: None,
            gid: None,
        };
        let check = |raw: &str, sharing, read_only| {
            let raw = format!("type=cache,target=/c{raw}");
            assert_eq!(mount(&raw), (some("/c"), cache(sharing, read_only)));
        };
        check("", Sharing::Shared, false);
        check(",ro", Sharing::Shared, true);
        check(",rw=false", Sharing::Shared, true);
        check(",sharing=Locked", Sharing::Locked, false);
        check(",sharing=locked,sharing=private", Sharing::Private, false);
        assert_eq!(
            mount(
                "mode=1777,uid=0,type=$K,id=i,from=f,source=s,gid=4294967295,target=/c,sharing=shared"
            ),
            (
                some("/c"),
                MountKind::Cache {
                    id: some("i"),
                    from: some("f"),
                    source: some("s"),
                    sharing: Sharing::Shared,
                    read_only: false,
                    mode: Some(0o1777),
                    uid: Some(0),
                    gid: Some(u32::MAX),
                }
            )
        );
    }

    #[test]
    fn tmpfs_sizes() {
        let check = |size: &str, size_bytes: Option<u64>| {
            let raw = format!("type=tmpfs,target=/t,size={size}");
            assert_eq!(
                mount(&raw),
                (some("/t"), MountKind::Tmpfs { size_bytes }),
                "{size}"
            );
        };
        check("1", Some(1));
        check("0", None);
        check("0.5", None);
        check("512b", Some(512));
        check("64k", Some(64 << 10));
        check("64 KiB", Some(64 << 10));
        check("1.5M", Some(3 << 19));
        check("2gb", Some(2 << 30));
        check("1T", Some(1 << 40));
        check(".5p", Some(1 << 49));
        check("1e3", Some(1000));
        check("5 ", Some(5));
        for size in [
            "", "k", "-1", "1x", "1bb", "1kbb", "1kb2", "1 0", "1e999", "9e18k", "0x1p", "inf ",
        ] {
            fails(
                &format!("type=tmpfs,size={size},target=/t"),
                &format!("size={size}"),
                &format!(
                    "invalid value {size:?} for size: it must be a size in bytes, such as 64m"
                ),
                "",
            );
        }
    }

    #[test]
    fn secrets() {
        let secret = |id: Option<&str>, env: Option<&str>, required| MountKind::Secret {
            id: id.map(str::to_owned),
            env: env.map(str::to_owned),
            required,
            mode: None,
            uid: None,
            gid: None,
        };
        let check = |raw: &str, target: Option<&str>, kind: MountKind| {
            assert_eq!(mount(raw), (target.map(str::to_owned), kind), "{raw}");
        };
        check("type=secret,id=a", None, secret(Some("a"), None, false));
        check("type=secret,src=a", None, secret(Some("a"), None, false));
        check(
            "type=secret,target=/a,required",
            Some("/a"),
            secret(None, None, true),
        );
        check(
            "type=secret,required=true,id=a,env=",
            None,
            secret(Some("a"), Some(""), true),
        );
        check(
            "type=secret,id=a,source=,env=B,required,required=f",
            None,
            secret(Some("a"), Some("B"), false),
        );
        assert_eq!(
            mount("type=secret,id=a,mode=0440,uid=1,gid=2").1,
            MountKind::Secret {
                id: some("a"),
                env: None,
                required: false,
                mode: Some(0o440),
                uid: Some(1),
                gid: Some(2),
            }
        );
    }

    #[test]
    fn agents() {
        assert_eq!(
            mount("type=ssh"),
            (
                None,
                MountKind::Ssh {
                    id: None,
                    required: false,
                    mode: None,
                    uid: None,
                    gid: None
                }
            )
        );
        assert_eq!(
            mount("type=ssh,id=x,target=/s,required,mode=600,uid=3,gid=4"),
            (
                some("/s"),
                MountKind::Ssh {
                    id: some("x"),
                    required: true,
                    mode: Some(0o600),
                    uid: Some(3),
                    gid: Some(4)
                }
            )
        );
    }

    #[test]
    fn fields_that_are_wrong() {
        fails(
            "",
            "",
            "it has no fields, such as type=cache,target=/var/cache",
            "",
        );
        fails(
            "type=magic,target=/x",
            "type=magic",
            "unsupported mount type \"magic\": it must be bind or cache or secret or ssh or tmpfs",
            "",
        );
        fails(
            "target=/x,type=Cahe",
            "type=Cahe",
            "unsupported mount type \"Cahe\": it must be bind or cache or secret or ssh or tmpfs",
            "did you mean \"cache\"?",
        );
        fails(
            "type=bind,targt=/x",
            "targt=/x",
            "unexpected key \"targt\" in \"targt=/x\"",
            "did you mean \"target\"?",
        );
        fails(
            "target=/x,colour=red",
            "colour=red",
            "unexpected key \"colour\" in \"colour=red\"",
            "",
        );
        fails(
            "type=bind,target",
            "target",
            "field \"target\" must be a key=value pair",
            "",
        );
        fails(
            "readwrit,target=/x",
            "readwrit",
            "field \"readwrit\" must be a key=value pair",
            "did you mean \"readwrite\"?",
        );
        fails(
            "type=bind,,target=/x",
            "",
            "field \"\" must be a key=value pair",
            "",
        );
        fails(
            "type=cache,sharing=lock",
            "sharing=lock",
            "unsupported sharing value \"lock\": it must be locked or private or shared",
            "did you mean \"locked\"?",
        );
        for (key, value) in [("ro", "yes"), ("readwrite", ""), ("readonly", "tRUE")] {
            let field = format!("{key}={value}");
            fails(
                &format!("{field},target=/x"),
                &field,
                &format!("invalid value {value:?} for {key}: it must be true or false"),
                "",
            );
        }
        fails(
            "type=ssh,required=2",
            "required=2",
            "invalid value \"2\" for required: it must be true or false",
            "",
        );
        for mode in ["", "+644", "-1", "8", "u=rw", "77777777777"] {
            fails(
                &format!("type=cache,target=/x,mode={mode}"),
                &format!("mode={mode}"),
                &format!(
                    "invalid value {mode:?} for mode: it must be an octal number, such as 0400"
                ),
                "",
            );
        }
        for (key, value) in [("uid", "root"), ("gid", "4294967296"), ("uid", "0x1")] {
            fails(
                &format!("type=cache,target=/x,{key}={value}"),
                &format!("{key}={value}"),
                &format!(
                    "invalid value {value:?} for {key}: it must be a number, names are not \
                     looked up"
                ),
                "",
            );
        }
        fails(
            "target=/x,from=a$b",
            "from=a$b",
            "\"from\" does not support variables, got \"a$b\"",
            "define a stage with FROM and name that",
        );
        fails(
            "type=bind,target=${X",
            "target=${X",
            "cannot expand \"${X\": the \"}\" of \"${\" is missing",
            "",
        );
        fails(
            "type=bind,a\"b=c",
            "a\"b=c",
            "\"a\\\"b=c\" has a quote inside: quote the whole field and double the quote",
            "",
        );
    }

    #[test]
    fn fields_that_do_not_go_together() {
        for (raw, at, kind) in [
            ("size=1m,type=tmpfs", "size=1m", "bind"),
            ("type=cache,size=1m", "size=1m", "cache"),
        ] {
            fails(
                raw,
                at,
                &format!("size is not for mounts of type {kind}"),
                "size goes with type=tmpfs, which must stand before it",
            );
        }
        for (raw, at) in [
            ("required,type=secret,id=a", "required"),
            ("required=true,type=ssh", "required=true"),
        ] {
            fails(
                raw,
                at,
                "required is not for mounts of type bind",
                "required goes with type=secret or type=ssh, which must stand before it",
            );
        }
        for (raw, at, message) in [
            (
                "mode=1,target=/x",
                "mode=1",
                "mode is not for mounts of type bind",
            ),
            (
                "type=tmpfs,uid=1",
                "uid=1",
                "uid is not for mounts of type tmpfs",
            ),
            (
                "type=cache,gid=1,type=bind",
                "gid=1",
                "gid is not for mounts of type bind",
            ),
            (
                "type=secret,id=a,from=b",
                "from=b",
                "from is not for mounts of type secret",
            ),
            (
                "sharing=shared,type=secret,id=a",
                "sharing=shared",
                "sharing is not for mounts of type secret",
            ),
            (
                "target=/x,sharing=locked",
                "sharing=locked",
                "sharing is not for mounts of type bind",
            ),
        ] {
            fails(raw, at, message, "");
        }
        fails(
            "type=ssh,src=a",
            "src=a",
            "source is not for mounts of type ssh",
            "id=NAME says which agent is meant",
        );
        fails(
            "type=secret,id=a,src=b",
            "src=b",
            "a secret mount can not have both source and id",
            "source is another word for a secret's id",
        );
        fails(
            "type=secret",
            "type=secret",
            "a secret mount needs an id or a target",
            "id=NAME says which secret is meant",
        );
        fails(
            "type=secret,env=TOKEN",
            "type=secret,env=TOKEN",
            "a secret mount needs an id or a target",
            "id=TOKEN,env=TOKEN says which secret is meant",
        );
        fails(
            "type=secret,env=,id=$E",
            "type=secret,env=,id=$E",
            "a secret mount needs an id or a target",
            "id=NAME,env=NAME gives the secret as a variable",
        );
    }

    #[test]
    fn values_are_expanded_once_each_and_in_order() {
        let mut seen = Vec::new();
        let mount = parse_mount("type=cache,target=$T,ro,from=x", &mut |text| {
            seen.push(text.to_owned());
            Ok(text.replace("$T", "$T$T"))
        })
        .unwrap();
        assert_eq!(seen, ["cache", "$T", "x"]);
        assert_eq!(mount.target, some("$T$T"));
    }
}
