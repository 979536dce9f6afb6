//! Arguments, the world to run in, exit code; nothing else.

use std::process::ExitCode;

use sockless::cli::{self, Invocation};

fn main() -> ExitCode {
    if let Some(code) = hidden_command() {
        return code;
    }
    let invocation = match cli::parse(std::env::args_os(), |name| std::env::var_os(name)) {
        Ok(invocation) => invocation,
        Err(error) => return error.report().into(),
    };
    let code = match invocation {
        Invocation::Build(build) => match prepare(build.dies_with_parent()) {
            Ok(()) => cli::build(*build),
            Err(error) => cli::report(&error),
        },
        Invocation::Serve(config) => cli::serve(config.as_deref()),
        Invocation::Version => cli::print_version(),
    };
    code.into()
}

/// What has to happen before this process has a second thread.
fn prepare(die_with_parent: bool) -> anyhow::Result<()> {
    if die_with_parent {
        cli::die_with_parent()?;
    }
    enter_user_namespace()?;
    if die_with_parent {
        cli::die_with_parent()?;
    }
    Ok(())
}

/// The single call site of `sandbox::hidden_command`: this program as its own helper.
fn hidden_command() -> Option<ExitCode> {
    None
}

/// The single call site of `sandbox::userns::enter`.
fn enter_user_namespace() -> anyhow::Result<()> {
    Ok(())
}
