//! `RUN --mount` with variables expanded → [`Mount`].

use std::path::Path;

use super::text::absolute;
use super::{Mount, MountFrom, MountKind, Sharing};
use crate::dockerfile::expand::{Environment, expand_word};
use crate::dockerfile::{self as parsed, Problem, Span, Word};

/// Where secrets are when nothing else is said.
const SECRETS: &str = "/run/secrets";

/// Where the sockets of SSH agents are when nothing else is said, with a number behind it.
const SSH_AGENT: &str = "/run/buildkit/ssh_agent";

/// What a mount's text is read with.
pub(super) struct Context<'a> {
    /// The Dockerfile's escape character.
    pub escape: char,
    /// What variables are worth.
    pub environment: &'a Environment,
    /// The working directory, absolute.
    pub directory: &'a str,
    /// `BUILDKIT_CACHE_MOUNT_NS`: keeps the caches of projects apart.
    pub cache_namespace: &'a str,
    /// How many agents' sockets the step has already.
    pub sockets: usize,
}

/// The mount that `word` describes; `from` is what its `from` names.
///
/// # Errors
/// [`Problem`] at the faulty field.
pub(super) fn mount(
    word: &Word,
    from: Option<MountFrom>,
    context: &Context<'_>,
) -> Result<Mount, Problem> {
    let mut expand = |text: &str| {
        let word = Word {
            raw: text.to_owned(),
            span: word.span,
        };
        expand_word(&word, context.escape, context.environment)
    };
    let mount = parsed::parse_mount(&word.raw, &mut expand).map_err(|error| {
        let problem = Problem::new(field_span(word, &error.range), error.to_string());
        match error.hint {
            Some(hint) => problem.with_hint(hint),
            None => problem,
        }
    })?;
    let target = mount.target.as_deref();
    let place = |target: Option<&str>| {
        let absolute = absolute(context.directory, target.unwrap_or_default());
        if absolute == "/" {
            let message = format!("invalid mount target {:?}", target.unwrap_or_default());
            return Err(Problem::new(word.span, message)
                .with_hint("a step's root filesystem is not covered: mount below it"));
        }
        Ok(Some(absolute))
    };
    let source = |source: Option<String>| absolute("/", source.as_deref().unwrap_or("/"));
    Ok(match mount.kind {
        parsed::MountKind::Bind {
            source: path,
            read_write,
            ..
        } => Mount {
            target: place(target)?,
            kind: MountKind::Bind {
                from: from.unwrap_or(MountFrom::Context(super::ContextId::MAIN)),
                source: source(path),
                read_write,
            },
        },
        parsed::MountKind::Cache {
            id,
            source: path,
            sharing,
            read_only,
            mode,
            uid,
            gid,
            ..
        } => {
            // The name is the target as written: relative ones are not joined.
            let id = id.unwrap_or_else(|| clean(target.unwrap_or_default()));
            Mount {
                target: place(target)?,
                kind: MountKind::Cache {
                    id: format!("{}/{id}", context.cache_namespace),
                    from: from.unwrap_or(MountFrom::Scratch),
                    source: source(path),
                    sharing: match sharing {
                        parsed::Sharing::Shared => Sharing::Shared,
                        parsed::Sharing::Private => Sharing::Private,
                        parsed::Sharing::Locked => Sharing::Locked,
                    },
                    read_only,
                    mode,
                    uid,
                    gid,
                },
            }
        }
        parsed::MountKind::Tmpfs { size_bytes } => Mount {
            target: place(target)?,
            kind: MountKind::Tmpfs { size_bytes },
        },
        parsed::MountKind::Secret {
            id,
            env,
            required,
            mode,
            uid,
            gid,
        } => {
            let base = |path: &str| {
                let name = Path::new(path).file_name().unwrap_or_default();
                name.to_string_lossy().into_owned()
            };
            let id = id.unwrap_or_else(|| base(target.unwrap_or_default()));
            let target = match (target, &env) {
                (Some(target), _) => place(Some(target))?,
                (None, Some(_)) => None,
                (None, None) => Some(format!("{SECRETS}/{}", base(&id))),
            };
            Mount {
                target,
                kind: MountKind::Secret {
                    id,
                    env,
                    required,
                    mode: mode.unwrap_or(0o400),
                    uid: uid.unwrap_or(0),
                    gid: gid.unwrap_or(0),
                },
            }
        }
        parsed::MountKind::Ssh {
            id,
            required,
            mode,
            uid,
            gid,
        } => Mount {
            target: match target {
                Some(target) => place(Some(target))?,
                None => Some(format!("{SSH_AGENT}.{}", context.sockets)),
            },
            kind: MountKind::Ssh {
                id: id.unwrap_or_else(|| "default".to_owned()),
                required,
                mode: mode.unwrap_or(0o600),
                uid: uid.unwrap_or(0),
                gid: gid.unwrap_or(0),
            },
        },
    })
}

/// The options of a mount that its type does not use. BuildKit takes them without a word.
pub(super) fn unused_options(raw: &str, kind: &MountKind) -> Vec<String> {
    let used: &[&str] = match kind {
        MountKind::Bind { .. } => &["from", "source", "src", "readonly", "ro", "readwrite", "rw"],
        MountKind::Cache { .. } => &[
            "from",
            "source",
            "src",
            "readonly",
            "ro",
            "readwrite",
            "rw",
            "id",
            "sharing",
            "mode",
            "uid",
            "gid",
        ],
        MountKind::Tmpfs { .. } => &["size"],
        MountKind::Secret { .. } => &[
            "id", "source", "src", "env", "required", "mode", "uid", "gid",
        ],
        MountKind::Ssh { .. } => &["id", "required", "mode", "uid", "gid"],
        MountKind::Script { .. } => &[],
    };
    let fields = parsed::comma_fields(raw).unwrap_or_default();
    let keys = fields.iter().map(|field| {
        let key = field.split_once('=').map_or(field.as_str(), |(key, _)| key);
        key.to_ascii_lowercase()
    });
    let always = ["type", "target", "dst", "destination"];
    keys.filter(|key| !always.contains(&key.as_str()) && !used.contains(&key.as_str()))
        .collect()
}

/// Where a field of the flag's value stands in the file; all of the value where that
/// cannot be said, because lines were joined or quotes removed.
fn field_span(word: &Word, range: &std::ops::Range<usize>) -> Span {
    if word.span.end - word.span.start != word.raw.len() || range.end > word.raw.len() {
        return word.span;
    }
    Span {
        start: word.span.start + range.start,
        end: word.span.start + range.end,
    }
}

/// Go's `path.Clean`.
fn clean(path: &str) -> String {
    let rooted = path.starts_with('/');
    let mut parts: Vec<&str> = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." if parts.last().is_some_and(|last| *last != "..") => drop(parts.pop()),
            ".." if rooted => {}
            part => parts.push(part),
        }
    }
    match (rooted, parts.is_empty()) {
        (true, _) => format!("/{}", parts.join("/")),
        (false, true) => ".".to_owned(),
        (false, false) => parts.join("/"),
    }
}
