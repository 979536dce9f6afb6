//! Rules that need nothing but the text.

use std::collections::BTreeSet;

use super::options::Options;
use super::rule::{
    CONSISTENT_INSTRUCTION_CASING, DUPLICATE_STAGE_NAME, FROM_AS_CASING,
    INVALID_DEFINITION_DESCRIPTION, MAINTAINER_DEPRECATED, NO_EMPTY_CONTINUATION,
    RESERVED_STAGE_NAME, STAGE_NAME_CASING,
};
use super::{Linter, Placed, Source, is_blank, quoted, written_name};
use crate::dockerfile::{Dockerfile, Instruction, InstructionKind, Stage};

/// Names that mean something else where stages are named.
const RESERVED_STAGE_NAMES: [&str; 2] = ["context", "scratch"];

/// Checks each instruction for itself.
pub(super) fn check(linter: &mut Linter, dockerfile: &Dockerfile, source: &Source) {
    for placed in all(source) {
        if let Some(line) = placed.empty_continuation {
            let mut placed = placed.clone();
            placed.lines.first = line;
            placed.lines.last = line;
            placed.column = 1;
            linter.add_always(&NO_EMPTY_CONTINUATION, &placed, || {
                "Empty continuation line".to_owned()
            });
        }
    }
    for (instruction, placed) in dockerfile.global_args.iter().zip(&source.global_args) {
        check_instruction(linter, instruction, placed);
    }
    for (stage, (placed, instructions)) in dockerfile.stages.iter().zip(&source.stages) {
        check_from(linter, stage, placed);
        for (instruction, placed) in stage.instructions.iter().zip(instructions) {
            check_instruction(linter, instruction, placed);
        }
    }
}

fn all(source: &Source) -> impl Iterator<Item = &Placed> {
    let stages = source.stages.iter();
    let stages = stages.flat_map(|(from, rest)| std::iter::once(from).chain(rest));
    source.global_args.iter().chain(stages)
}

fn check_instruction(linter: &mut Linter, instruction: &Instruction, placed: &Placed) {
    let options = linter.options_at(placed);
    match &instruction.kind {
        InstructionKind::Maintainer(_) => {
            linter.add(&options, &MAINTAINER_DEPRECATED, placed, || {
                "Maintainer instruction is deprecated in favor of using label".to_owned()
            });
        }
        InstructionKind::Arg(declarations) => {
            let names: Vec<&str> = declarations.iter().map(|d| d.name.raw.as_str()).collect();
            check_description(linter, &options, "ARG", &names, placed);
        }
        _ => {}
    }
}

fn check_from(linter: &mut Linter, stage: &Stage, placed: &Placed) {
    let options = linter.options_at(placed);
    let words: Vec<&str> = stage
        .original
        .split(is_blank)
        .filter(|w| !w.is_empty())
        .collect();
    let (Some(name), [from, .., r#as, written]) = (&stage.name, words.as_slice()) else {
        return;
    };
    if *written != written.to_lowercase() {
        linter.add(&options, &STAGE_NAME_CASING, placed, || {
            format!("Stage name '{written}' should be lowercase")
        });
    }
    // A FROM that is neither is told so by another rule.
    let matches = if *from == from.to_lowercase() {
        *r#as == r#as.to_lowercase()
    } else {
        *from != from.to_uppercase() || *r#as == r#as.to_uppercase()
    };
    if !matches {
        linter.add(&options, &FROM_AS_CASING, placed, || {
            format!("'{as}' and '{from}' keywords' casing do not match")
        });
    }
    check_description(linter, &options, "FROM", &[&name.raw], placed);
}

/// The last comment above should describe one of `names`.
fn check_description(
    linter: &mut Linter,
    options: &Options,
    instruction: &str,
    names: &[&str],
    placed: &Placed,
) {
    let Some(comment) = placed.comments.last() else {
        return;
    };
    let first = comment.split(' ').next().unwrap_or_default();
    if names.contains(&first) {
        return;
    }
    let example = match names {
        [name] => name,
        _ => "<arg_key>",
    };
    linter.add(options, &INVALID_DEFINITION_DESCRIPTION, placed, || {
        format!("Comment for {instruction} should follow the format: `# {example} <description>`")
    });
}

/// Checks what concerns the whole file: names of stages, then casing.
pub(super) fn check_whole(linter: &mut Linter, dockerfile: &Dockerfile, source: &Source) {
    let mut seen = BTreeSet::new();
    for (stage, (placed, _)) in dockerfile.stages.iter().zip(&source.stages) {
        let Some(name) = stage.name.as_ref().map(|name| name.raw.as_str()) else {
            continue;
        };
        if RESERVED_STAGE_NAMES.contains(&name) {
            linter.add_always(&RESERVED_STAGE_NAME, placed, || {
                let name = quoted(name);
                format!("Stage name should not use the same name as reserved stage {name}")
            });
        }
        if !seen.insert(name) {
            linter.add_always(&DUPLICATE_STAGE_NAME, placed, || {
                let name = quoted(name);
                format!("Duplicate stage name {name}, stage names should be unique")
            });
        }
    }
    check_casing(linter, dockerfile, source);
}

fn check_casing(linter: &mut Linter, dockerfile: &Dockerfile, source: &Source) {
    let mut names: Vec<(&str, &Placed)> = Vec::new();
    for (stage, (placed, instructions)) in dockerfile.stages.iter().zip(&source.stages) {
        names.push((written_name(&stage.original), placed));
        let written = stage.instructions.iter().map(|i| written_name(&i.original));
        names.extend(written.zip(instructions));
    }
    let lower = names.iter().filter(|(n, _)| *n == n.to_lowercase()).count();
    let upper = names.iter().filter(|(n, _)| *n == n.to_uppercase()).count();
    let is_majority_lower = lower > upper;
    for (name, placed) in names {
        let (right, wanted) = if is_majority_lower {
            (name.to_lowercase(), "lowercase")
        } else {
            (name.to_uppercase(), "uppercase")
        };
        if name != right {
            linter.add_always(&CONSISTENT_INSTRUCTION_CASING, placed, || {
                format!("Command '{name}' should match the case of the command majority ({wanted})")
            });
        }
    }
}
