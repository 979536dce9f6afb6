//! Flags that are written where BuildKit does not look for any.
//!
//! `ARG --x`, `STOPSIGNAL --x` and `HEALTHCHECK --x NONE` build there as if the flag were not
//! written, so they build here; what is said about them is a warning.

use super::lines::Line;
use super::split::{self, RawFlag};
use super::{Dockerfile, Healthcheck, Instruction, InstructionKind, Problem};

impl Dockerfile {
    /// The flags that have no effect, each at the instruction that it stands in.
    pub fn ignored_flags(&self) -> Vec<Problem> {
        let stages = self.stages.iter().flat_map(|stage| &stage.instructions);
        let instructions = self.global_args.iter().chain(stages);
        instructions
            .flat_map(|instruction| ignored(instruction, self.directives.escape))
            .collect()
    }
}

fn ignored(instruction: &Instruction, escape: char) -> Vec<Problem> {
    let (name, is_trigger) = match &instruction.kind {
        InstructionKind::Onbuild { trigger, .. } => (takes_none(&trigger.kind), true),
        kind => (takes_none(kind), false),
    };
    let Some(name) = name else {
        return Vec::new();
    };
    let line = Line::of(&instruction.original);
    let mut split = split::split(line.slice(), escape);
    if is_trigger {
        split = split::split(split.args, escape);
    }
    let message =
        |flag: &RawFlag<'_>| format!("{name} takes no flags: {:?} is ignored", flag.text());
    let problem = |flag| Problem::new(instruction.span, message(flag));
    split.flags.iter().map(problem).collect()
}

/// What a kind of instruction is called, if its flags are ignored.
fn takes_none(kind: &InstructionKind) -> Option<&'static str> {
    match kind {
        InstructionKind::Arg(_) => Some("ARG"),
        InstructionKind::Stopsignal(_) => Some("STOPSIGNAL"),
        InstructionKind::Healthcheck(Healthcheck::None) => Some("HEALTHCHECK NONE"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use crate::dockerfile::{parse, place};

    #[test]
    fn each_flag_that_has_no_effect_is_told_with_its_place() {
        let text = "ARG --x=1 A\nFROM scratch\nARG \\\n  --y --z=\"a b\" B=--c\nSTOPSIGNAL --s 9\n\
                    HEALTHCHECK --interval=5s NONE\nHEALTHCHECK --interval=5s CMD true\n\
                    ONBUILD ARG --o C\nARG -- --no=1\nLABEL a=b\n";
        let dockerfile = parse("Dockerfile", text.as_bytes()).unwrap();
        let told: Vec<_> = (dockerfile.ignored_flags().iter())
            .map(|p| format!("{}: {}", place("Dockerfile", text, p.span), p.message))
            .collect();
        assert_eq!(
            told,
            [
                "Dockerfile:1:1: ARG takes no flags: \"--x=1\" is ignored",
                "Dockerfile:3:1: ARG takes no flags: \"--y\" is ignored",
                "Dockerfile:3:1: ARG takes no flags: \"--z=a b\" is ignored",
                "Dockerfile:5:1: STOPSIGNAL takes no flags: \"--s\" is ignored",
                "Dockerfile:6:1: HEALTHCHECK NONE takes no flags: \"--interval=5s\" is ignored",
                "Dockerfile:8:1: ARG takes no flags: \"--o\" is ignored",
            ]
        );
    }
}
