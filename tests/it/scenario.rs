//! The whole way: a merged pull request for `develop` becomes `REGISTRY/apache:0.4.0`, whose Apache
//! answers.
//!
//! GitHub and Docker Hub are servers on the loopback (the base image is a Debian), everything else
//! is as in production: a signed delivery, a private registry with TLS and a password, real packages
//! installed in a real sandbox. Run as root and as an ordinary user by `make test`.

use std::process::Command;

use crate::support::github::{COMMIT, GitHub, fixture};
use crate::support::oci::Image;
use crate::support::process::run;
use crate::support::registry::Registry;
use crate::support::sockless::{Place, job_id};
use crate::support::{debian_mirror, images, namespaces, programs, repository};

/// Runs it in one sandbox. `more` are further settings of the service.
fn merged(sandbox: &str, source: &str) {
    needs!(
        programs(&[sandbox, "busybox"]),
        namespaces(),
        debian_mirror()
    );
    let upstream = match images::debian() {
        Ok(registry) => registry,
        Err(reason) => skip!("{reason}"),
    };
    let registry = Registry::private();
    let github = GitHub::start();
    for name in ["Dockerfile", "spec.json"] {
        github.file(COMMIT, name, fixture(name));
    }
    let place = Place::new();
    let config = place.service_config(
        &registry,
        &upstream,
        &github,
        &format!("sandbox = \"{sandbox}\"\nsource = \"{source}\"\n"),
    );
    let service = place.serve(&config);

    let answer = service.deliver(
        "pull_request",
        "72d3162e-cc78-11e3-81ab-4c9367dc0958",
        &fixture("pull_request.json"),
    );
    let id = job_id(&answer);
    let job = service.succeeded(&id);
    assert!(
        job.to_string()
            .contains(&format!("{}/apache:0.4.0", registry.host)),
        "{job}"
    );
    let log = service.log(&id);
    assert!(
        log.contains("Setting up apache2"),
        "the job's log has what the steps print:\n{log}"
    );
    assert!(!log.contains(Registry::PASSWORD), "{log}");

    let layout = place.dir.join("pulled");
    registry.pull("apache:0.4.0", &layout);
    let image = Image::read(&layout);
    assert!(
        job.to_string().contains(&image.digest),
        "{} is not in {job}",
        image.digest
    );
    check_config(&image);
    check_owners(&image);

    // The image runs without the program that built it: util-linux, GNU tar and busybox unpack and
    // run it in namespaces of its own, and fetch the page there.
    let script = repository().join("tests/run-image.sh");
    let mut command = Command::new(script);
    command.arg(place.dir.join("root")).arg("http://127.0.0.1/");
    command
        .args(image.layers.iter().map(|layer| &layer.file))
        .arg("--");
    command.args(
        image.run_config()["Cmd"]
            .as_array()
            .expect("checked above")
            .iter()
            .map(|word| word.as_str().expect("checked above")),
    );
    let page = run(&mut command).success();
    assert!(page.stdout.contains("It works"), "{}", page.stdout);
    assert!(page.stdout.contains("Apache2"), "{}", page.stdout);
}

fn check_config(image: &Image) {
    let config = image.run_config();
    assert_eq!(
        config["Cmd"],
        serde_json::json!([
            "/bin/sh",
            "-c",
            "service apache2 start && tail -f /var/log/apache2/access.log"
        ])
    );
    assert_eq!(config["ExposedPorts"], serde_json::json!({ "80/tcp": {} }));
    assert_eq!(image.config["os"], "linux");
    assert_eq!(image.layers.len(), 3, "the base and two steps");
    let made: Vec<_> = image.config["history"]
        .as_array()
        .expect("validated")
        .iter()
        .skip(1)
        .map(|h| {
            (
                h["created_by"].as_str().unwrap_or_default(),
                h["empty_layer"] == true,
            )
        })
        .collect();
    let [
        (update, false),
        (install, false),
        (expose, true),
        (cmd, true),
    ] = made.as_slice()
    else {
        panic!("{made:?}");
    };
    assert!(update.contains("apt-get update -y"), "{update}");
    assert!(install.contains("apt-get install apache2 -y"), "{install}");
    assert!(expose.contains("EXPOSE"), "{expose}");
    assert!(cmd.contains("service apache2 start"), "{cmd}");
}

/// Files of users and groups other than root come out as packages made them, whoever built it.
fn check_owners(image: &Image) {
    let owner = |path: &str| {
        image.entry(path).map_or_else(
            || format!("{path}: absent"),
            |e| format!("{path}: {}:{} {:o}", e.uid, e.gid, e.mode),
        )
    };
    let got: Vec<_> = [
        "var/lib/apt/lists/partial",
        "var/cache/apt/archives/partial",
        "etc/shadow",
        "etc/gshadow",
        "var/mail",
        "var/local",
        "usr/bin/passwd",
        "usr/bin/chage",
        "tmp",
        "var/log/apache2",
        "var/cache/apache2/mod_cache_disk",
    ]
    .map(owner)
    .into();
    assert_eq!(
        got,
        [
            // apt-get gives them to its user _apt.
            "var/lib/apt/lists/partial: 42:0 700",
            "var/cache/apt/archives/partial: 42:0 700",
            "etc/shadow: 0:42 640",
            "etc/gshadow: 0:42 640",
            "var/mail: 0:8 2775",
            "var/local: 0:50 2775",
            "usr/bin/passwd: 0:0 4755",
            "usr/bin/chage: 0:42 2755",
            "tmp: 0:0 1777",
            "var/log/apache2: 0:4 750",
            "var/cache/apache2/mod_cache_disk: 33:33 755",
        ]
    );
}

#[test]
fn sandbox_bwrap_builds_what_was_merged() {
    merged("bwrap", "files");
}

#[test]
fn sandbox_runc_builds_what_was_merged() {
    merged("runc", "archive");
}
