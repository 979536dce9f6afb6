//! `sockless serve` over a real socket: what it takes, what it refuses, and what survives a crash.

use std::time::Duration;

use serde_json::{Value, json};

use crate::support::github::{COMMIT, GitHub, fixture, pull_request, sign};
use crate::support::registry::Registry;
use crate::support::sockless::{Place, Service, WEBHOOK, job_id};
use crate::support::{http, images, namespaces};

/// A repository whose image is made without any step.
const PLAIN: &str = "FROM busybox\nLABEL a=b\n";

/// Everything around a service, and the service.
struct World {
    // Dropped in this order: the service before what it uses.
    service: Service,
    place: Place,
    config: std::path::PathBuf,
    registry: Registry,
    upstream: Registry,
    github: GitHub,
}

fn world(dockerfile: &str, spec: &str, more: &str) -> Result<World, String> {
    let upstream = images::busybox()?;
    let registry = Registry::private();
    let github = GitHub::start();
    github.file(COMMIT, "Dockerfile", dockerfile);
    github.file(COMMIT, "spec.json", spec);
    let place = Place::new();
    let config = place.service_config(&registry, &upstream, &github, more);
    let service = place.serve(&config);
    Ok(World {
        service,
        place,
        config,
        registry,
        upstream,
        github,
    })
}

macro_rules! world {
    ($($arg:expr),*) => {
        match world($($arg),*) {
            Ok(world) => world,
            Err(reason) => skip!("{reason}"),
        }
    };
}

const SPEC: &str = "{ \"service\": { \"name\": \"apache\", \"version\": \"0.4.0\" } }";

fn body(change: impl FnOnce(&mut Value)) -> Vec<u8> {
    let mut payload = pull_request();
    change(&mut payload);
    payload.to_string().into_bytes()
}

#[test]
fn security_s21_compose_a_delivery_is_taken_only_if_it_is_signed_whole_and_small_enough() {
    let world = world!(PLAIN, SPEC, "body_limit = \"100KiB\"\n");
    let service = &world.service;
    let good = fixture("pull_request.json");
    let signature = sign(Service::SECRET, &good);

    // Not signed, signed by another, signed over something else, signed the old way, half a signature.
    let mut other = good.clone();
    other.push(b' ');
    let sha1 = "sha1=7d38cdd689735b008b3c702edd92eea23791c5f6";
    for wrong in [
        "",
        "sha256=",
        sha1,
        &sign("another secret", &good),
        &sign(Service::SECRET, &other),
        &signature[..40],
        &signature.to_uppercase(),
    ] {
        let answer = service.deliver_signed("pull_request", "d-1", &good, wrong);
        assert_eq!(answer.status, 401, "{wrong:?}: {}", answer.text());
    }
    let unsigned = http::request(
        &service.host,
        "POST",
        WEBHOOK,
        &[
            ("X-GitHub-Event", "pull_request"),
            ("X-GitHub-Delivery", "d-1"),
        ],
        &good,
    );
    assert_eq!(unsigned.status, 401, "{}", unsigned.text());

    // Signed, but not what GitHub sends.
    for (event, wrong) in [
        ("pull_request", b"{".to_vec()),
        ("pull_request", b"\xff\xfe".to_vec()),
        ("pull_request", b"[]".to_vec()),
        ("pull_request", b"{\"action\":\"closed\"}".to_vec()),
        (
            "pull_request",
            body(|p| p["pull_request"]["merge_commit_sha"] = json!("main; reboot")),
        ),
        (
            "pull_request",
            body(|p| p["repository"]["full_name"] = json!("../../etc/passwd")),
        ),
    ] {
        let answer = service.deliver(event, "d-2", &wrong);
        assert_eq!(
            answer.status,
            400,
            "{}: {}",
            String::from_utf8_lossy(&wrong),
            answer.text()
        );
    }

    // Too large: by its own word, and by its length.
    let large = body(|p| p["padding"] = json!("x".repeat(200 << 10)));
    let answer = service.deliver("pull_request", "d-3", &large);
    assert_eq!(answer.status, 413, "{}", answer.text());
    assert_eq!(http::get(&service.host, WEBHOOK).status, 405);
    assert_eq!(http::get(&service.host, "/nonesuch").status, 404);

    assert_eq!(
        world.github.requests(),
        [],
        "nothing of this may cost a request"
    );
}

#[test]
fn compose_a_delivery_that_is_no_merge_for_the_branch_is_answered_with_the_reason() {
    let world = world!(PLAIN, SPEC, "repositories = [\"octo-org/apache\"]\n");
    let check = |event: &str, body: Vec<u8>, reason: &str| {
        let answer = world.service.deliver(event, "d-1", &body);
        assert_eq!(answer.status, 200, "{}", answer.text());
        assert!(
            answer.text().contains(reason),
            "{reason:?} is not in {}",
            answer.text()
        );
    };
    check(
        "ping",
        b"{\"zen\":\"Design for failure.\",\"hook_id\":1}".to_vec(),
        "ping",
    );
    check("push", b"{\"ref\":\"refs/heads/develop\"}".to_vec(), "push");
    check(
        "pull_request",
        body(|p| p["action"] = json!("opened")),
        "opened",
    );
    check(
        "pull_request",
        body(|p| p["pull_request"]["merged"] = json!(false)),
        "merged",
    );
    check(
        "pull_request",
        body(|p| p["pull_request"]["base"]["ref"] = json!("main")),
        "main",
    );
    check(
        "pull_request",
        body(|p| p["repository"]["full_name"] = json!("octo-org/other")),
        "octo-org/other",
    );
    assert_eq!(world.github.requests(), []);
}

#[test]
fn security_s21_compose_a_delivery_that_comes_again_is_built_once() {
    let world = world!(PLAIN, SPEC, "");
    let body = fixture("pull_request.json");
    let first = job_id(
        &world
            .service
            .deliver("pull_request", "same-delivery", &body),
    );
    let again = world
        .service
        .deliver("pull_request", "same-delivery", &body);
    assert!(matches!(again.status, 200 | 202), "{}", again.text());
    assert!(
        again.text().contains(&first),
        "{first} is not in {}",
        again.text()
    );
    let job = world.service.succeeded(&first);
    assert!(
        job.to_string()
            .contains(&format!("{}/apache:0.4.0", world.registry.host)),
        "{job}"
    );
    // And once more, after its end.
    let late = world
        .service
        .deliver("pull_request", "same-delivery", &body);
    assert!(late.text().contains(&first), "{}", late.text());
    let puts = |r: &Registry| {
        r.writes()
            .iter()
            .filter(|w| w.method == "PUT" && w.path.contains("/manifests/"))
            .count()
    };
    assert_eq!(puts(&world.registry), 1);
    let jobs = http::get(&world.service.host, crate::support::sockless::JOBS).json();
    assert_eq!(jobs["jobs"].as_array().map(Vec::len), Some(1), "{jobs}");
    assert!(world.registry.inspect("apache:0.4.0").status.success());
}

#[test]
fn compose_what_is_wrong_with_a_repository_is_said_in_its_job() {
    let check = |dockerfile: Option<&str>, spec: Option<&str>, texts: &[&str]| {
        let upstream = match images::busybox() {
            Ok(registry) => registry,
            Err(reason) => skip!("{reason}"),
        };
        let registry = Registry::private();
        let github = GitHub::start();
        github.file(COMMIT, "README.md", "a repository\n");
        if let Some(text) = dockerfile {
            github.file(COMMIT, "Dockerfile", text);
        }
        if let Some(text) = spec {
            github.file(COMMIT, "spec.json", text);
        }
        let place = Place::new();
        let service = place.serve(&place.service_config(&registry, &upstream, &github, ""));
        let id = job_id(&service.deliver("pull_request", "d-1", &fixture("pull_request.json")));
        let job = service.failed(&id);
        let said = format!("{job}\n{}", service.log(&id));
        for text in texts {
            assert!(said.contains(text), "{text:?} is not in {said}");
        }
        assert_eq!(registry.writes(), [], "{said}");
    };
    check(None, Some(SPEC), &["Dockerfile", "404"]);
    check(Some(PLAIN), None, &["spec.json", "404"]);
    check(Some(PLAIN), Some("{"), &["spec.json", "line 1"]);
    check(Some(PLAIN), Some("{}"), &["spec.json", "service"]);
    check(
        Some(PLAIN),
        Some("{\"service\":{\"name\":\"apache\"}}"),
        &["spec.json", "version"],
    );
    check(
        Some(PLAIN),
        Some("{\"service\":{\"version\":\"1\"}}"),
        &["spec.json", "name"],
    );
    check(
        Some(PLAIN),
        Some("{\"service\":{\"name\":\"Apache HTTPD\",\"version\":\"1\"}}"),
        &["Apache HTTPD"],
    );
    check(
        Some(PLAIN),
        Some("{\"service\":{\"name\":\"../../x\",\"version\":\"1\"}}"),
        &["../../x"],
    );
    check(
        Some(PLAIN),
        Some("{\"service\":{\"name\":\"apache\",\"version\":\"a b\"}}"),
        &["a b"],
    );
    check(
        Some("FROM busybox\nRUNN x\n"),
        Some(SPEC),
        &["Dockerfile:2:1", "RUNN"],
    );
    check(Some("FROM busybox:none\n"), Some(SPEC), &["busybox:none"]);
}

#[test]
fn sandbox_a_step_that_fails_fails_its_job_and_not_the_service() {
    needs!(namespaces());
    let world = world!("FROM busybox\nRUN echo about to fail; exit 9\n", SPEC, "");
    let id = job_id(
        &world
            .service
            .deliver("pull_request", "d-1", &fixture("pull_request.json")),
    );
    let job = world.service.failed(&id);
    let log = world.service.log(&id);
    assert!(log.contains("about to fail"), "{log}");
    assert!(format!("{job}{log}").contains('9'));
    // The next one is built.
    world.github.file(COMMIT, "Dockerfile", PLAIN);
    let id = job_id(
        &world
            .service
            .deliver("pull_request", "d-2", &fixture("pull_request.json")),
    );
    world.service.succeeded(&id);
}

/// The service is killed while a step runs. Its job is in the database since before it was
/// answered for, so the next start runs it again, and to its end.
#[test]
fn sandbox_a_job_survives_the_death_of_the_service() {
    needs!(namespaces());
    let mut world = world!(
        "FROM busybox\nRUN echo step begun; sleep 6.25; echo done > /done\n",
        SPEC,
        ""
    );
    let id = job_id(
        &world
            .service
            .deliver("pull_request", "d-1", &fixture("pull_request.json")),
    );
    let deadline = std::time::Instant::now() + Duration::from_secs(120);
    while !world.service.log(&id).contains("step begun\n") {
        assert!(
            std::time::Instant::now() < deadline,
            "{}",
            world.service.log(&id)
        );
        std::thread::sleep(Duration::from_millis(20));
    }
    world.service.daemon.kill();
    // Layers go up beside the steps, the manifest only when all is there.
    assert!(!world.registry.inspect("apache:0.4.0").status.success());

    world.service = world.place.serve(&world.config);
    let job = world.service.succeeded(&id);
    assert!(job.to_string().contains("apache:0.4.0"), "{job}");
    let layout = world.place.dir.join("pulled");
    world.registry.pull("apache:0.4.0", &layout);
    assert_eq!(
        crate::support::oci::Image::read(&layout).text("done"),
        "done\n"
    );
    assert_ne!(world.upstream.requests(), []);
}

#[test]
fn sandbox_sigterm_ends_the_service_in_order() {
    needs!(namespaces());
    let mut world = world!(
        "FROM busybox\nRUN sleep 3601\n",
        SPEC,
        "shutdown_grace = \"1s\"\n"
    );
    let id = job_id(
        &world
            .service
            .deliver("pull_request", "d-1", &fixture("pull_request.json")),
    );
    let deadline = std::time::Instant::now() + Duration::from_secs(120);
    let sleeping = || {
        std::fs::read_dir("/proc")
            .expect("procfs")
            .flatten()
            .any(|process| {
                std::fs::read(process.path().join("cmdline"))
                    .is_ok_and(|c| c.ends_with(b"sleep\x003601\0"))
            })
    };
    while !sleeping() {
        assert!(
            std::time::Instant::now() < deadline,
            "{}",
            world.service.log(&id)
        );
        std::thread::sleep(Duration::from_millis(20));
    }
    world.service.daemon.terminate();
    assert!(!sleeping(), "the job's processes outlive the service");
    // The job went back to the queue, and is there after the next start.
    world.github.file(COMMIT, "Dockerfile", PLAIN);
    world.service = world.place.serve(&world.config);
    assert!(matches!(
        world.service.job(&id)["state"].as_str(),
        Some("queued" | "running" | "succeeded")
    ));
}

#[test]
fn compose_the_service_does_not_start_with_settings_that_it_does_not_understand() {
    let place = Place::new();
    let check = |toml: &str, texts: &[&str]| {
        let config = place.dir.file("bad.toml", toml);
        let mut ran =
            crate::support::process::run(place.command().arg("serve").arg("--config").arg(config))
                .failure();
        for text in texts {
            ran = ran.says(text);
        }
    };
    check("registry = \"localhost:5000\"\n", &["webhook_secret"]);
    check("webhook_secret = \"x\"\n", &["registry"]);
    check(
        "webhook_secret = \"x\"\nregistry = \"localhost:5000\"\nlissten = \"x\"\n",
        &["lissten"],
    );
    check(
        "webhook_secret = \"x\"\nregistry = \"localhost:5000\"\nlisten = \"nowhere\"\n",
        &["listen", "nowhere"],
    );
    check("webhook_secret = ", &["bad.toml"]);
}
