//! `compose.yaml`, and the script that makes its certificates.

use std::os::unix::fs::PermissionsExt as _;
use std::process::Command;

use crate::support::dir::TestDir;
use crate::support::process::run;
use crate::support::{programs, repository};

#[test]
fn compose_file_is_understood_and_gives_nothing_away() {
    let file = repository().join("compose.yaml");
    let text = std::fs::read_to_string(&file).expect("part of the repository");
    let lines = || {
        text.lines()
            .map(|line| line.split('#').next().unwrap_or_default())
    };
    assert!(
        !lines().any(|line| line.contains("docker.sock")),
        "the daemon's socket"
    );
    assert!(
        !lines().any(|line| line.contains("privileged: true")),
        "all privileges"
    );
    needs!(programs(&["docker-compose"]));
    let ran = run(Command::new("docker-compose")
        .arg("-f")
        .arg(&file)
        .arg("config")
        .env("SOCKLESS_WEBHOOK_SECRET", "secret")
        .env("NGROK_AUTHTOKEN", "token")
        .current_dir(repository()))
    .success();
    for service in ["registry", "sockless", "ngrok"] {
        assert!(
            ran.stdout.contains(&format!("{service}:")),
            "{service} is not in\n{}",
            ran.stdout
        );
    }
}

#[test]
fn compose_certificates_are_made_once_and_their_keys_are_private() {
    needs!(programs(&["openssl", "htpasswd"]));
    let dir = TestDir::new("certs");
    let make = |more: &[&str]| {
        run(Command::new(repository().join("certs/make.sh"))
            .arg("--out")
            .arg(dir.path())
            .args(more))
        .success();
        ["ca.crt", "registry.crt", "htpasswd"].map(|f| std::fs::read(dir.join(f)).expect("made"))
    };
    let first = make(&["--san", "registry.example.org"]);
    assert_eq!(
        make(&["--san", "registry.example.org"]),
        first,
        "the second run changes nothing"
    );
    for secret in ["ca.key", "registry.key", "htpasswd", "htpasswd.txt"] {
        let mode = std::fs::metadata(dir.join(secret))
            .expect("made")
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o600, "{secret}");
    }
    let names = run(Command::new("openssl")
        .args(["x509", "-noout", "-ext", "subjectAltName", "-in"])
        .arg(dir.join("registry.crt")))
    .success()
    .stdout;
    for name in [
        "DNS:localhost",
        "DNS:registry",
        "DNS:registry.example.org",
        "IP Address:127.0.0.1",
        "IP Address:0:0:0:0:0:0:0:1",
    ] {
        assert!(names.contains(name), "{name} is not in {names}");
    }
    // A further name makes a new certificate, of the same authority.
    let [ca, certificate, _] = make(&[]);
    assert_eq!(ca, first[0]);
    assert_ne!(certificate, first[1]);
    run(Command::new("openssl")
        .args(["verify", "-CAfile"])
        .arg(dir.join("ca.crt"))
        .arg(dir.join("registry.crt")))
    .success();
}
