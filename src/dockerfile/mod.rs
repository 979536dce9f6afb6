//! Dockerfile text → typed instructions. No I/O; variables stay unexpanded.
//!
//! Follows BuildKit's parser, which is the language's definition where its reference
//! <https://docs.docker.com/reference/dockerfile/> is silent.

mod error;
pub mod expand;
mod instruction;

pub use error::{DockerfileError, Problem, line_column, place};
pub use instruction::{
    ArgDeclaration, CommandLine, Copy, Directives, Dockerfile, Healthcheck, Heredoc, Instruction,
    InstructionKind, KeyValue, Run, Span, Stage, Word,
};

/// Parses a Dockerfile. `name` is for messages.
///
/// # Errors
/// [`DockerfileError`] with every independent problem found.
pub fn parse(name: &str, text: &[u8]) -> Result<Dockerfile, DockerfileError> {
    let _ = (name, text);
    unimplemented!()
}

/// Parses one `ONBUILD` trigger, as an image config keeps it.
///
/// # Errors
/// [`DockerfileError`] whose spans refer to `expression`.
pub fn parse_trigger(expression: &str) -> Result<Instruction, DockerfileError> {
    let _ = expression;
    unimplemented!()
}
