//! The program as a file: one, static, and content with nothing around it.

use std::process::Command;

use crate::support::dir::TestDir;
use crate::support::process::run;
use crate::support::sockless::{Place, program};
use crate::support::{is_root, namespaces, programs};

#[test]
fn the_program_is_static() {
    needs!(programs(&["ldd"]));
    let ran = run(Command::new("ldd").arg(program()).env("LC_ALL", "C"));
    let said = format!("{}{}", ran.stdout, ran.stderr);
    assert!(
        said.contains("statically linked") || said.contains("not a dynamic executable"),
        "{said}"
    );
}

#[test]
fn sandbox_the_program_runs_where_nothing_else_is() {
    needs!(namespaces());
    let root = TestDir::new("empty-root");
    std::fs::copy(program(), root.join("sockless")).expect("the program is readable");
    let mut command = if is_root() {
        Command::new("chroot")
    } else {
        let mut command = Command::new("unshare");
        command.args(["--user", "--map-root-user", "chroot"]);
        command
    };
    let ran = run(command
        .arg(root.path())
        .args(["/sockless", "version"])
        .env_clear()
        .env("PATH", "/usr/sbin:/usr/bin"));
    let ran = ran.success();
    assert!(
        ran.stdout.contains(env!("CARGO_PKG_VERSION")),
        "{}",
        ran.stdout
    );
}

#[test]
fn help_and_mistakes_are_answered() {
    let place = Place::new();
    let ask = |args: &[&str]| run(place.command().args(args));
    let help = ask(&["build", "--help"]).success();
    for flag in [
        "--file",
        "--tag",
        "--push",
        "--build-arg",
        "--target",
        "--output",
        "--registry-mirror",
        "--insecure-registry",
        "--registry-ca",
        "--sandbox",
        "--root",
        "--progress",
        "--no-cache",
        "--metadata-file",
        "--iidfile",
    ] {
        assert!(
            help.stdout.contains(flag),
            "{flag} is not in the help:\n{}",
            help.stdout
        );
    }
    assert!(
        ask(&["serve", "--help"])
            .success()
            .stdout
            .contains("--config")
    );
    ask(&["build", "--bogus", "."]).failure().says("--bogus");
    ask(&["build"]).failure().says("CONTEXT");
    ask(&["build", "-t", "UPPER case", "."])
        .failure()
        .says("UPPER case");
    ask(&["build", "--push", "."]).failure().says("--tag");
}
