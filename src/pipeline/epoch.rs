//! `SOURCE_DATE_EPOCH`: what an image and the files that a build makes are dated.
//!
//! <https://reproducible-builds.org/specs/source-date-epoch/>

use super::BuildRequest;
use crate::dockerfile::{Dockerfile, InstructionKind};
use crate::plan;

/// The build argument.
const EPOCH: &str = "SOURCE_DATE_EPOCH";

/// The last second of the year 9999, beyond which RFC 3339 cannot write a time.
const EPOCH_MAX: i64 = 253_402_300_799;

/// The value that stands for the time of the main context.
const CONTEXT: &str = "context";

/// The date in seconds since 1970 UTC, if there is one. Arguments that name where it comes
/// from get the number instead, as in BuildKit.
///
/// It is the build argument, else the default of a global `ARG`. `context` is the time of
/// a context that has one: the commit's, `Last-Modified`, the newest file of an archive.
///
/// # Errors
/// A value that is neither a number of seconds nor `context`.
pub(super) fn resolve(
    request: &BuildRequest,
    settings: &mut plan::Settings,
    dockerfile: &Dockerfile,
    source_date: Option<i64>,
) -> anyhow::Result<Option<i64>> {
    let given = request.plan.build_args.get(EPOCH).cloned();
    let Some(text) = given.or_else(|| default(dockerfile)) else {
        return Ok(request.epoch);
    };
    if text.is_empty() {
        return Ok(None);
    }
    if text == CONTEXT {
        match source_date {
            Some(seconds) => settings
                .build_args
                .insert(EPOCH.to_owned(), seconds.to_string()),
            None => settings.build_args.remove(EPOCH),
        };
        return Ok(source_date);
    }
    let seconds = text.parse::<i64>().ok();
    let seconds = seconds.filter(|seconds| (0..=EPOCH_MAX).contains(seconds));
    match seconds {
        Some(seconds) => Ok(Some(seconds)),
        None => anyhow::bail!(
            "{EPOCH}={text:?}: expected seconds since 1970 as a whole number, or {CONTEXT:?}"
        ),
    }
}

/// The default of a global `ARG`, where it is a plain text.
fn default(dockerfile: &Dockerfile) -> Option<String> {
    let arguments = dockerfile.global_args.iter().rev();
    let mut declarations = arguments.flat_map(|instruction| match &instruction.kind {
        InstructionKind::Arg(declarations) => declarations.as_slice(),
        _ => &[],
    });
    let declaration = declarations.find(|declaration| declaration.name.raw == EPOCH)?;
    let default = declaration.default.as_ref()?;
    Some(default.raw.trim_matches(['"', '\'']).to_owned()).filter(|text| !text.contains('$'))
}
