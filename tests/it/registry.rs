//! What goes to registries, and what does not.

use crate::support::images;
use crate::support::registry::{Options, Registry};
use crate::support::sockless::Place;

macro_rules! upstream {
    () => {
        match images::busybox() {
            Ok(registry) => registry,
            Err(reason) => skip!("{reason}"),
        }
    };
}

const DOCKERFILE: (&str, &str) = ("Dockerfile", "FROM busybox\nLABEL a=b\n");

#[test]
fn compose_a_private_registry_gets_the_image_and_keeps_its_bytes() {
    let upstream = upstream!();
    let registry = Registry::private();
    let place = Place::new();
    place.docker_config(&registry.docker_config(Registry::USER, Registry::PASSWORD));
    let context = place.context("context", &[DOCKERFILE]);
    let iid = place.dir.join("iid");
    let tags = ["team/app:1", "team/app:latest", "other:x"];
    let full: Vec<String> = tags
        .iter()
        .map(|t| format!("{}/{t}", registry.host))
        .collect();
    let ca = registry.ca().display().to_string();
    let iid_text = iid.display().to_string();
    place
        .build(
            &upstream,
            &context,
            &[
                "-t",
                &full[0],
                "-t",
                &full[1],
                "-t",
                &full[2],
                "--push",
                "--registry-ca",
                &ca,
                "--iidfile",
                &iid_text,
            ],
        )
        .success();
    for tag in tags {
        let layout = place
            .dir
            .join(format!("pulled-{}", tag.replace([':', '/'], "-")));
        registry.pull(tag, &layout);
        let image = crate::support::oci::Image::read(&layout);
        assert_eq!(
            std::fs::read_to_string(&iid).expect("written").trim(),
            image.manifest["config"]["digest"]
                .as_str()
                .expect("validated")
        );
        assert_eq!(
            image.run_config()["Labels"],
            serde_json::json!({ "a": "b" })
        );
    }
}

#[test]
fn compose_wrong_or_missing_credentials_and_certificates_are_told_apart() {
    let upstream = upstream!();
    let registry = Registry::private();
    let place = Place::new();
    let context = place.context("context", &[DOCKERFILE]);
    let tag = format!("{}/app:1", registry.host);
    let ca = registry.ca().display().to_string();

    let with_ca = ["-t", &tag, "--push", "--registry-ca", &ca];
    place
        .build(&upstream, &context, &with_ca)
        .failure()
        .says(&registry.host)
        .says("401");
    place.docker_config(&registry.docker_config(Registry::USER, "canary-password"));
    place
        .build(&upstream, &context, &with_ca)
        .failure()
        .says(&registry.host)
        .says("401")
        .does_not_say("canary-password");
    // Nobody vouches for the certificate: no request of ours arrives, so no credentials either.
    let before = registry.requests().len();
    place
        .build(&upstream, &context, &["-t", &tag, "--push"])
        .failure()
        .says(&registry.host)
        .says("certificate");
    assert_eq!(registry.requests().split_off(before), []);
    assert!(!registry.inspect("app:1").status.success());
}

#[test]
fn compose_plain_http_is_refused_unless_allowed_by_name() {
    let upstream = upstream!();
    // With a password: over plain HTTP everyone on the way could read it.
    let registry = Registry::start(Options {
        htpasswd: true,
        ..Options::default()
    });
    let place = Place::new();
    place.docker_config(&registry.docker_config(Registry::USER, Registry::PASSWORD));
    let context = place.context("context", &[DOCKERFILE]);
    // The loopback by number is allowed by other builders without being asked; by name it is as here.
    let tag = format!("{}/app:1", registry.host);
    let args = ["-t", tag.as_str(), "--push"];
    place
        .build(&upstream, &context, &args)
        .failure()
        .says(&registry.host);
    assert_eq!(registry.writes(), []);
    place
        .build(
            &upstream,
            &context,
            &[&args[..], &["--insecure-registry", &registry.host]].concat(),
        )
        .success();
    assert!(registry.inspect("app:1").status.success());
}

#[test]
fn security_s14_compose_credentials_for_one_registry_never_reach_another() {
    let upstream = upstream!();
    let registry = Registry::private();
    let place = Place::new();
    // Credentials for Docker Hub must not be sent to a mirror over plain HTTP.
    place.docker_config(
        "{\"auths\":{\"https://index.docker.io/v1/\":{\"auth\":\"Y2FuYXJ5OmNhbmFyeQ==\"}}}",
    );
    let context = place.context("context", &[DOCKERFILE]);
    let tag = format!("{}/app:1", registry.host);
    let ca = registry.ca().display().to_string();
    place
        .build(
            &upstream,
            &context,
            &["-t", &tag, "--push", "--registry-ca", &ca],
        )
        .failure()
        .says("401");
    // The registry logs the user name of whoever gave one.
    for log in [upstream.log(), registry.log()] {
        assert!(!log.contains("canary"), "{log}");
    }
}

#[test]
fn compose_the_right_to_push_is_checked_before_anything_is_built() {
    let upstream = upstream!();
    let registry = Registry::private();
    let place = Place::new();
    let context = place.context(
        "context",
        &[(
            "Dockerfile",
            "FROM busybox\nRUN echo was $((6 * 7)) built\n",
        )],
    );
    let tag = format!("{}/app:1", registry.host);
    let ca = registry.ca().display().to_string();
    place
        .build(
            &upstream,
            &context,
            &["-t", &tag, "--push", "--registry-ca", &ca],
        )
        .failure()
        .says("401")
        .does_not_say("was 42 built");
}

#[test]
fn compose_a_base_that_is_not_there_is_named() {
    let upstream = upstream!();
    let place = Place::new();
    let dockerfile = format!("FROM {}/library/busybox:no-such-tag\n", upstream.host);
    let context = place.context("context", &[("Dockerfile", &dockerfile)]);
    place
        .build(
            &upstream,
            &context,
            &["--insecure-registry", &upstream.host],
        )
        .failure()
        .says("Dockerfile:1:")
        .says("library/busybox:no-such-tag")
        .says("404");
}
