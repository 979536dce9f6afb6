//! What a build was not allowed to do, so that it is refused before anything is pulled.

use std::collections::BTreeSet;

use super::Entitlement;
use crate::dockerfile::{Instruction, InstructionKind, Problem, Span};

/// The problems of one instruction of a needed stage.
pub(super) fn refused(instruction: &Instruction, allowed: &BTreeSet<Entitlement>) -> Vec<Problem> {
    let InstructionKind::Run(run) = &instruction.kind else {
        return Vec::new();
    };
    let mut problems = Vec::new();
    let mut need = |entitlement: Entitlement, span: Span, what: &str| {
        if !allowed.contains(&entitlement) {
            let name = entitlement.name();
            problems.push(
                Problem::new(
                    span,
                    format!("RUN {what} needs the entitlement {name}, which was not allowed"),
                )
                .with_hint(format!(
                    "allow it with --allow {name} if you trust this Dockerfile"
                )),
            );
        }
    };
    if let Some(security) = run.security.as_ref().filter(|s| s.raw == "insecure") {
        need(
            Entitlement::SecurityInsecure,
            security.span,
            "--security=insecure",
        );
    }
    if let Some(network) = run.network.as_ref().filter(|n| n.raw == "host") {
        need(Entitlement::NetworkHost, network.span, "--network=host");
    }
    problems
}
