//! What this version does not honour yet, so that it is refused before anything is pulled.

use crate::dockerfile::{Copy, Instruction, InstructionKind, Problem, Span, Stage};

/// The problems of one stage that is part of the build.
pub(super) fn unsupported(stage: &Stage) -> Vec<Problem> {
    stage
        .instructions
        .iter()
        .flat_map(unsupported_instruction)
        .collect()
}

/// The problems of one instruction.
pub(super) fn unsupported_instruction(instruction: &Instruction) -> Vec<Problem> {
    let mut problems = Vec::new();
    let mut refuse = |span: Span, what: &str| {
        problems.push(
            Problem::new(span, format!("{what} is not supported yet"))
                .with_hint("sockless stops here rather than build something else than was written"),
        );
    };
    match &instruction.kind {
        InstructionKind::Run(run) => {
            for mount in &run.mounts {
                refuse(mount.span, "RUN --mount");
            }
            if let Some(security) = run.security.as_ref().filter(|s| s.raw != "sandbox") {
                refuse(security.span, &format!("RUN --security={}", security.raw));
            }
            for device in &run.devices {
                refuse(device.span, "RUN --device");
            }
            if let Some(network) = run.network.as_ref().filter(|n| n.raw == "host") {
                refuse(network.span, "RUN --network=host");
            }
        }
        InstructionKind::Copy(copy) | InstructionKind::Add(copy) => {
            let name = instruction.kind.name();
            for (flag, span) in &copy.flags {
                let set = match flag.as_str() {
                    "link" => copy.link,
                    "parents" => copy.parents,
                    "exclude" | "checksum" | "keep-git-dir" | "unpack" => true,
                    _ => false,
                };
                if set {
                    refuse(*span, &format!("{name} --{flag}"));
                }
            }
            if matches!(instruction.kind, InstructionKind::Add(_)) {
                refuse_remote(copy, &mut refuse);
            }
        }
        _ => {}
    }
    problems
}

/// `ADD` of what is not in the context.
fn refuse_remote(add: &Copy, refuse: &mut impl FnMut(Span, &str)) {
    for source in &add.sources {
        let text = source.raw.trim_matches(['"', '\'']);
        let is_git =
            text.starts_with("git@") || text.starts_with("git://") || text.starts_with("ssh://");
        if text.starts_with("http://") || text.starts_with("https://") {
            refuse(source.span, "ADD of a URL");
        } else if is_git {
            refuse(source.span, "ADD of a git repository");
        }
    }
}
