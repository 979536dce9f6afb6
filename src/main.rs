//! Arguments, the world to run in, exit code; nothing else.

use std::process::ExitCode;

use sockless::cli::{self, Invocation};
use sockless::sandbox::{self, World};

fn main() -> ExitCode {
    // This program is its own helper; then it is nothing else.
    sandbox::hidden_command();
    let invocation = match cli::parse(std::env::args_os(), |name| std::env::var_os(name)) {
        Ok(invocation) => invocation,
        Err(error) => return error.report().into(),
    };
    let code = match invocation {
        Invocation::Build(build) => match prepare(build.dies_with_parent()) {
            Ok(world) => cli::build(*build, world),
            Err(error) => cli::report(&error),
        },
        Invocation::Call(build) => cli::ask(*build),
        Invocation::Serve(config) => cli::serve(config.as_deref()),
        // Unpacked layers belong to whom the namespace has, and only there can be removed.
        Invocation::Store(command) => match prepare(false) {
            Ok(_) => cli::store(*command),
            Err(error) => cli::report(&error),
        },
        Invocation::Doctor(command) if command.is_inside() => match prepare(false) {
            Ok(world) => cli::doctor_inside(&command, &world),
            Err(error) => cli::report(&error),
        },
        // It enters nothing itself: each way is tried by a process of its own.
        Invocation::Doctor(command) => cli::doctor(*command),
        Invocation::Version => cli::print_version(),
    };
    code.into()
}

/// What has to happen before this process has a second thread.
fn prepare(die_with_parent: bool) -> anyhow::Result<World> {
    if die_with_parent {
        cli::die_with_parent()?;
    }
    let world = sandbox::enter()?;
    if die_with_parent {
        // The kernel forgets it where credentials change.
        cli::die_with_parent()?;
    }
    Ok(world)
}
