//! The HTTP interface, called without a socket, and the service as a whole.

use std::collections::HashMap;

use axum::body::{Body, to_bytes};
use axum::http::{HeaderMap, Request, StatusCode};
use futures_util::StreamExt;
use serde_json::{Value, json};
use tower::ServiceExt;

use super::jobs::{Ending, JobId, JobRequest, Lease, LogEntry, State};
use super::log::LogEvent;
use super::webhook::sign;
use super::*;
use crate::image::Digest;
use crate::secret::Secret;

const MERGED: &str = include_str!("../../fixtures/webhook/merged.json");
const CLOSED: &str = include_str!("../../fixtures/webhook/closed.json");
const OPENED: &str = include_str!("../../fixtures/webhook/opened.json");
const HOSTILE: &str = include_str!("../../fixtures/webhook/hostile-title.json");
const PING: &str = include_str!("../../fixtures/webhook/ping.json");
const SIGNATURES: &str = include_str!("../../fixtures/webhook/signatures.txt");

/// A configuration whose files are all in `dir`.
pub(super) fn config(dir: &Path) -> ServiceConfig {
    let root = dir.join("store");
    let env: HashMap<&str, String> = [
        ("SOCKLESS_LISTEN", "127.0.0.1:0".to_owned()),
        ("SOCKLESS_WEBHOOK_SECRET", "s3cret".to_owned()),
        ("SOCKLESS_REGISTRY", "r.example:5000".to_owned()),
        ("SOCKLESS_ROOT", root.display().to_string()),
        ("SOCKLESS_SHUTDOWN_GRACE", "1s".to_owned()),
    ]
    .into();
    ServiceConfig::load(None, |name| env.get(name).cloned()).unwrap()
}

/// Waits until the process is gone, or a zombie that init has yet to reap. A process
/// closes its files a moment before.
pub(super) async fn until_gone(pid: &str) {
    for _ in 0..1000 {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid.trim()));
        if stat.map_or(true, |stat| stat.contains(") Z ")) {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("process {pid} is still alive");
}

struct Service {
    _dir: tempfile::TempDir,
    jobs: Jobs,
    router: Router,
    stop: CancellationToken,
}

async fn service_with(change: impl FnOnce(&mut ServiceConfig)) -> Service {
    let dir = tempfile::tempdir().unwrap();
    let mut config = config(dir.path());
    change(&mut config);
    let jobs = Jobs::open(&dir.path().join("j.sqlite")).await.unwrap();
    let stop = CancellationToken::new();
    let router = router(App::new(Arc::new(config), jobs.clone(), stop.clone()));
    Service {
        _dir: dir,
        jobs,
        router,
        stop,
    }
}

async fn service() -> Service {
    service_with(|_| {}).await
}

impl Service {
    async fn send(&self, request: Request<Body>) -> (StatusCode, HeaderMap, String) {
        let response = self.router.clone().oneshot(request).await.unwrap();
        let (parts, body) = response.into_parts();
        let body = to_bytes(body, usize::MAX).await.unwrap();
        let text = String::from_utf8(body.to_vec()).unwrap();
        (parts.status, parts.headers, text)
    }

    async fn get(&self, path: &str) -> (StatusCode, String) {
        let request = Request::get(path).body(Body::empty()).unwrap();
        let (status, _, body) = self.send(request).await;
        (status, body)
    }

    async fn deliver(&self, delivery: &str, body: &str) -> (StatusCode, Value) {
        self.post(&signed("pull_request", delivery, body), body)
            .await
    }

    async fn post(&self, headers: &[(&str, String)], body: &str) -> (StatusCode, Value) {
        let mut request = Request::post("/webhook");
        for (name, value) in headers {
            request = request.header(*name, value);
        }
        let body = Body::from(body.to_owned());
        let (status, _, body) = self.send(request.body(body).unwrap()).await;
        (status, serde_json::from_str(&body).unwrap())
    }

    async fn accept(&self, delivery: &str) -> JobId {
        let (status, body) = self.deliver(delivery, MERGED).await;
        assert_eq!(status, StatusCode::ACCEPTED);
        JobId::parse(body["job"].as_str().unwrap()).unwrap()
    }

    async fn claim(&self) -> Lease {
        self.jobs
            .claim("test", Duration::from_secs(30), 3, 2_000)
            .await
            .unwrap()
            .unwrap()
    }

    async fn append(&self, lease: &Lease, seq: i64, text: &str) {
        let entry = LogEntry {
            seq,
            at_ms: 7,
            event: LogEvent::service(text),
        };
        assert!(self.jobs.append(lease, &[entry]).await.unwrap());
    }
}

fn signed<'a>(event: &str, delivery: &str, body: &str) -> Vec<(&'a str, String)> {
    vec![
        ("x-github-event", event.to_owned()),
        ("x-github-delivery", delivery.to_owned()),
        ("x-hub-signature-256", sign("s3cret", body.as_bytes())),
        ("content-type", "application/json".to_owned()),
    ]
}

fn without<'a>(headers: &[(&'a str, String)], name: &str) -> Vec<(&'a str, String)> {
    let mut headers = headers.to_vec();
    headers.retain(|(header, _)| *header != name);
    headers
}

#[test]
fn the_fixtures_are_signed_as_openssl_signs_them() {
    for (name, body) in [
        ("merged", MERGED),
        ("closed", CLOSED),
        ("opened", OPENED),
        ("hostile-title", HOSTILE),
        ("ping", PING),
    ] {
        let line = format!("{name}.json {}", sign("s3cret", body.as_bytes()));
        assert!(SIGNATURES.lines().any(|l| l == line), "{line}");
    }
}

#[tokio::test]
async fn a_merged_pull_request_is_a_job_and_a_second_delivery_the_same() {
    let service = service().await;
    let (status, body) = service.deliver("d-1", MERGED).await;
    assert_eq!(status, StatusCode::ACCEPTED);
    let id = body["job"].as_str().unwrap();
    let expected = json!({ "job": id, "url": format!("/api/v1/jobs/{id}") });
    assert_eq!(body, expected);
    assert_eq!(
        service.deliver("d-1", MERGED).await,
        (StatusCode::ACCEPTED, expected)
    );
    let list = service.jobs.list(None, 10).await.unwrap();
    assert_eq!(list.len(), 1);
    assert_eq!(list[0].repository, "octo-org/shop");
    assert_eq!(list[0].commit, "6dcb09b5b57875f334f61aebed695e2e4193db5e");
    assert_eq!(list[0].branch, "develop");
    assert_eq!(list[0].pull_request, 42);
    assert_eq!(list[0].title, "Ship the new checkout");
    let (status, _) = service.deliver("d-2", MERGED).await;
    assert_eq!(status, StatusCode::ACCEPTED);
    assert_eq!(service.jobs.list(None, 10).await.unwrap().len(), 2);
}

#[tokio::test]
async fn a_form_carries_the_same_payload() {
    let service = service().await;
    let body = url::form_urlencoded::Serializer::new(String::new())
        .append_pair("payload", MERGED)
        .finish();
    let mut headers = without(&signed("pull_request", "d", &body), "content-type");
    let form = "application/x-www-form-urlencoded; charset=utf-8".to_owned();
    headers.push(("content-type", form));
    assert_eq!(service.post(&headers, &body).await.0, StatusCode::ACCEPTED);
    let body = "other=1";
    for header in &mut headers {
        if header.0 == "x-hub-signature-256" {
            header.1 = sign("s3cret", body.as_bytes());
        }
    }
    let expected = json!({ "error": "form field payload: missing" });
    assert_eq!(
        service.post(&headers, body).await,
        (StatusCode::BAD_REQUEST, expected)
    );
}

#[tokio::test]
async fn what_is_not_wanted_builds_nothing_and_says_why() {
    let service = service_with(|config| {
        config.repositories = Some(vec!["Octo-Org/Shop".to_owned()]);
    })
    .await;
    for (event, body, reason) in [
        ("ping", PING.to_owned(), "ping: the webhook is set up"),
        (
            "push",
            "{}".to_owned(),
            "event \"push\" is not \"pull_request\"",
        ),
        (
            "pull_request",
            OPENED.to_owned(),
            "action \"opened\" is not \"closed\"",
        ),
        (
            "pull_request",
            CLOSED.to_owned(),
            "pull request 42 was closed, not merged",
        ),
        (
            "pull_request",
            MERGED.replace("\"ref\": \"develop\"", "\"ref\": \"ma\\u001bin\""),
            "base branch \"ma\\u{1b}in\" is none of develop",
        ),
        (
            "pull_request",
            MERGED.replace("\"octo-org/shop\"", "\"octo-org/other\""),
            "repository \"octo-org/other\" is not in the list of those built",
        ),
    ] {
        let answer = service.post(&signed(event, "d", &body), &body).await;
        let expected = json!({ "built": false, "reason": reason });
        assert_eq!(answer, (StatusCode::OK, expected));
    }
    assert_eq!(service.jobs.list(None, 10).await.unwrap(), []);
    // Names are compared without case, as GitHub does.
    let (status, _) = service.deliver("d", MERGED).await;
    assert_eq!(status, StatusCode::ACCEPTED);
}

#[tokio::test]
async fn security_s21_nothing_unsigned_is_looked_at() {
    const MISSING: &str = "header X-Hub-Signature-256: missing; set a secret at the webhook";
    const FORM: &str = "header X-Hub-Signature-256: expected \"sha256=\" and 64 hexadecimal digits";
    const WRONG: &str =
        "the signature does not match the body; is the secret the same on both sides?";
    let service = service().await;
    // Neither JSON nor a known event: that must not show before the signature is right.
    let body = "not json";
    let good = sign("s3cret", body.as_bytes());
    for (signature, expected) in [
        (None, MISSING),
        (Some(String::new()), FORM),
        (
            Some("sha1=0123456789012345678901234567890123456789".to_owned()),
            FORM,
        ),
        (Some(good.replace("sha256", "sha512")), FORM),
        (Some(good.replace("sha256=", "")), FORM),
        (Some(format!("{good}00")), FORM),
        (Some(format!("sha256=+{}", &good[8..])), FORM),
        (Some(format!("sha256={}", "0".repeat(64))), WRONG),
        (Some(sign("S3cret", body.as_bytes())), WRONG),
        (Some(sign("s3cret", b"not json ")), WRONG),
    ] {
        let mut headers = without(&signed("x", "d", body), "x-hub-signature-256");
        headers.push(("x-hub-signature", "sha1=00".to_owned()));
        if let Some(signature) = signature {
            headers.push(("x-hub-signature-256", signature));
        }
        let answer = service.post(&headers, body).await;
        let expected = json!({ "error": expected });
        assert_eq!(answer, (StatusCode::UNAUTHORIZED, expected));
    }
}

#[tokio::test]
async fn malformed_deliveries_name_what_is_wrong() {
    let service = service().await;
    let edit = |path: &[&str], value: Option<Value>| {
        let mut payload: Value = serde_json::from_str(MERGED).unwrap();
        let (last, parents) = path.split_last().unwrap();
        let parent = parents.iter().fold(&mut payload, |v, name| &mut v[*name]);
        match value {
            Some(value) => parent[*last] = value,
            None => drop(parent.as_object_mut().unwrap().remove(*last)),
        }
        payload.to_string()
    };
    for (body, expected) in [
        (
            "{".to_owned(),
            "the payload is no JSON: EOF while parsing an object at line 1 column 1",
        ),
        ("[]".to_owned(), "field action: missing"),
        (
            edit(&["action"], Some(json!(1))),
            "field action: got 1, expected a string",
        ),
        (
            edit(&["pull_request"], None),
            "field pull_request.number: missing",
        ),
        (
            edit(&["pull_request", "number"], Some(json!(-1))),
            "field pull_request.number: got -1, expected a positive number",
        ),
        (
            edit(&["pull_request", "merged"], None),
            "field pull_request.merged: missing",
        ),
        (
            edit(&["pull_request", "merged"], Some(json!("true"))),
            "field pull_request.merged: got \"true\", expected true or false",
        ),
        (
            edit(&["pull_request", "base"], None),
            "field pull_request.base.ref: missing",
        ),
        (
            edit(&["repository", "full_name"], Some(json!("../../etc"))),
            "field repository.full_name: got \"../../etc\", expected OWNER/NAME",
        ),
        (
            edit(&["pull_request", "merge_commit_sha"], Some(json!(null))),
            "field pull_request.merge_commit_sha: got null, expected 40 or 64 lower-case hexadecimal digits",
        ),
        (
            edit(
                &["pull_request", "merge_commit_sha"],
                Some(json!("--upload-pack=x")),
            ),
            "field pull_request.merge_commit_sha: got \"--upload-pack=x\", expected 40 or 64 lower-case hexadecimal digits",
        ),
        (
            edit(&["pull_request", "title"], None),
            "field pull_request.title: missing",
        ),
    ] {
        let answer = service.deliver("d", &body).await;
        assert_eq!(
            answer,
            (StatusCode::BAD_REQUEST, json!({ "error": expected }))
        );
    }
    let headers = signed("pull_request", "d", MERGED);
    for (name, expected) in [
        ("x-github-event", "header x-github-event: missing"),
        ("x-github-delivery", "header x-github-delivery: missing"),
        (
            "content-type",
            "header content-type: got \"\", expected application/json or application/x-www-form-urlencoded",
        ),
    ] {
        let answer = service.post(&without(&headers, name), MERGED).await;
        assert_eq!(
            answer,
            (StatusCode::BAD_REQUEST, json!({ "error": expected }))
        );
    }
    let answer = service.deliver("a b", MERGED).await;
    let expected = json!({ "error": "header X-GitHub-Delivery: expected a UUID" });
    assert_eq!(answer, (StatusCode::BAD_REQUEST, expected));
    assert_eq!(service.jobs.list(None, 10).await.unwrap(), []);
}

#[tokio::test]
async fn security_s21_a_large_body_is_refused_before_it_is_read() {
    let service = service_with(|config| config.body_limit = 1000).await;
    let expected = json!({ "error": "the body is larger than 1000 bytes" }).to_string();
    // Announced: nothing of it is read. This body fails when it is touched.
    let untouchable = Body::from_stream(futures_util::stream::once(async {
        panic!("the body was read");
        #[allow(unreachable_code)]
        Ok::<_, std::io::Error>(Vec::new())
    }));
    let request = || Request::post("/webhook").header("x-hub-signature-256", sign("x", b""));
    let announced = request()
        .header("content-length", "1001")
        .body(untouchable)
        .unwrap();
    // Not announced: an endless body is cut at the limit.
    let endless = Body::from_stream(futures_util::stream::repeat_with(|| {
        Ok::<_, std::io::Error>(vec![b'x'; 100])
    }));
    for request in [announced, request().body(endless).unwrap()] {
        let (status, _, body) = service.send(request).await;
        assert_eq!(
            (status, body),
            (StatusCode::PAYLOAD_TOO_LARGE, expected.clone())
        );
    }
    // Exactly the limit is taken; that its signature is wrong shows it was read.
    let exact = request().body(Body::from(vec![b'x'; 1000])).unwrap();
    assert_eq!(service.send(exact).await.0, StatusCode::UNAUTHORIZED);
}

#[tokio::test]
async fn a_full_queue_asks_to_come_again() {
    let service = service_with(|config| config.jobs.queue_limit = 1).await;
    service.accept("d-1").await;
    let mut request = Request::post("/webhook");
    for (name, value) in signed("pull_request", "d-2", MERGED) {
        request = request.header(name, value);
    }
    let (status, headers, body) = service
        .send(request.body(Body::from(MERGED)).unwrap())
        .await;
    assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(headers["retry-after"], "60");
    assert_eq!(
        body,
        json!({ "error": "1 jobs are waiting, which is the limit; deliver again later" })
            .to_string()
    );
    // One that is known needs no room.
    service.accept("d-1").await;
}

#[tokio::test]
async fn a_failing_database_is_no_202() {
    let service = service().await;
    assert_eq!(
        service.get("/healthz").await,
        (StatusCode::OK, r#"{"status":"ok"}"#.to_owned())
    );
    service.jobs.close().await;
    let expected = json!({ "error": "the job database failed; try again later" });
    assert_eq!(
        service.deliver("d", MERGED).await,
        (StatusCode::SERVICE_UNAVAILABLE, expected.clone())
    );
    assert_eq!(
        service.get("/healthz").await,
        (StatusCode::SERVICE_UNAVAILABLE, expected.to_string())
    );
}

#[tokio::test]
async fn security_s21_a_hostile_title_is_only_text() {
    let service = service().await;
    let (status, body) = service.deliver("d", HOSTILE).await;
    assert_eq!(status, StatusCode::ACCEPTED);
    let (_, shown) = service.get(body["url"].as_str().unwrap()).await;
    let shown: Value = serde_json::from_str(&shown).unwrap();
    assert_eq!(
        shown["title"],
        "$(touch /tmp/x)`id`; \u{1b}[2J\u{fffd}\u{202e} <script>alert(1)</script>"
    );
}

#[tokio::test]
async fn jobs_are_shown_and_listed() {
    let service = service().await;
    let request = JobRequest {
        delivery: "d".to_owned(),
        repository: "o/a".to_owned(),
        commit: "a".repeat(40),
        branch: "develop".to_owned(),
        pull_request: 1,
        title: "t".to_owned(),
    };
    service.jobs.accept(&request, 9, 1_000).await.unwrap();
    let lease = service.claim().await;
    let digest = Digest::of(b"m");
    let ending = Ending::Succeeded {
        image: "r/a:1".to_owned(),
        digest: digest.clone(),
    };
    service.jobs.finish(&lease, &ending, 3_500).await.unwrap();
    let id = lease.job.id;
    let expected = json!({
        "id": id, "state": "succeeded", "repository": "o/a", "commit": "a".repeat(40),
        "branch": "develop", "pull_request": 1, "title": "t", "attempts": 1,
        "image": "r/a:1", "digest": digest, "error": null,
        "accepted_at": "1970-01-01T00:00:01Z", "started_at": "1970-01-01T00:00:02Z",
        "finished_at": "1970-01-01T00:00:03.5Z",
        "url": format!("/api/v1/jobs/{id}"), "log_url": format!("/api/v1/jobs/{id}/log"),
    });
    let parse = |(status, body): (StatusCode, String)| -> Value {
        assert_eq!(status, StatusCode::OK);
        serde_json::from_str(&body).unwrap()
    };
    let shown = parse(service.get(&format!("/api/v1/jobs/{id}")).await);
    assert_eq!(shown, expected);
    let list = parse(service.get("/api/v1/jobs").await);
    assert_eq!(list, json!({ "jobs": [expected], "next": null }));

    let younger = service.accept("d-2").await;
    let page = parse(service.get("/api/v1/jobs?limit=1").await);
    assert_eq!(page["jobs"][0]["id"], younger.to_string());
    assert_eq!(page["next"], younger.to_string());
    let page = parse(service.get(&format!("/api/v1/jobs?before={younger}")).await);
    assert_eq!(page, list);

    for (path, status, error) in [
        (
            "/api/v1/jobs?limit=0",
            StatusCode::BAD_REQUEST,
            "parameter limit: got \"0\", expected a number from 1 to 500",
        ),
        (
            "/api/v1/jobs?before=x",
            StatusCode::BAD_REQUEST,
            "parameter before: got \"x\", expected a job's id",
        ),
        (
            "/api/v1/jobs/x",
            StatusCode::NOT_FOUND,
            "there is no job \"x\"",
        ),
        (
            "/api/v1/jobs/x/log",
            StatusCode::NOT_FOUND,
            "there is no job \"x\"",
        ),
        ("/none", StatusCode::NOT_FOUND, "there is nothing here"),
        (
            "/webhook",
            StatusCode::METHOD_NOT_ALLOWED,
            "this method is not allowed here",
        ),
    ] {
        let expected = json!({ "error": error }).to_string();
        assert_eq!(service.get(path).await, (status, expected), "{path}");
    }
}

#[tokio::test]
async fn a_log_is_replayed_followed_and_ended() {
    let service = service().await;
    let id = service.accept("d").await;
    let lease = service.claim().await;
    service.append(&lease, 1, "one").await;
    let request = Request::get(format!("/api/v1/jobs/{id}/log"))
        .body(Body::empty())
        .unwrap();
    let response = service.router.clone().oneshot(request).await.unwrap();
    assert_eq!(response.headers()["content-type"], "text/event-stream");
    let mut stream = response.into_body().into_data_stream();
    let mut text = String::new();
    let mut read_until = async |end: &str| {
        while !text.contains(end) {
            let chunk = stream.next().await.unwrap().unwrap();
            text.push_str(std::str::from_utf8(&chunk).unwrap());
        }
        text.clone()
    };
    read_until("\"one\"").await;
    // While somebody follows.
    service.append(&lease, 2, "two").await;
    read_until("\"two\"").await;
    service
        .jobs
        .finish(&lease, &Ending::Cancelled, 9)
        .await
        .unwrap();
    let text = read_until("event: end\ndata: ").await;
    let events: Vec<&str> = text.split("\n\n").collect();
    assert!(
        events[0].starts_with("event: job\ndata: {\"id\":"),
        "{text}"
    );
    assert!(events[0].contains("\"state\":\"running\""), "{text}");
    assert_eq!(
        events[1..3],
        [
            "event: log\ndata: {\"seq\":1,\"at_ms\":7,\"event\":\"service\",\"message\":\"one\"}\nid: 1",
            "event: log\ndata: {\"seq\":2,\"at_ms\":7,\"event\":\"service\",\"message\":\"two\"}\nid: 2",
        ]
    );
    assert!(events[3].contains("\"state\":\"cancelled\""), "{text}");
    assert!(stream.next().await.is_none());

    // Again, from where it broke off.
    let request = Request::get(format!("/api/v1/jobs/{id}/log"))
        .header("last-event-id", "1")
        .body(Body::empty())
        .unwrap();
    let (_, _, text) = service.send(request).await;
    let events: Vec<&str> = text.split("\n\n").collect();
    assert!(events[0].ends_with("\nid: 2"), "{text}");
    assert!(events[1].starts_with("event: end\n"), "{text}");
    assert_eq!(events[2..], [""]);

    let request = Request::get(format!("/api/v1/jobs/{id}/log"))
        .header("accept", "text/plain")
        .body(Body::empty())
        .unwrap();
    let (_, headers, text) = service.send(request).await;
    assert_eq!(headers["content-type"], "text/plain; charset=utf-8");
    assert_eq!(text, "sockless: one\nsockless: two\n");
    let path = format!("/api/v1/jobs/{id}/log?format=text");
    assert_eq!(service.get(&path).await, (StatusCode::OK, text));
}

#[tokio::test]
async fn followers_end_with_the_service() {
    let service = service().await;
    let id = service.accept("d").await;
    service.stop.cancel();
    let (status, text) = service.get(&format!("/api/v1/jobs/{id}/log")).await;
    assert_eq!((status, text.as_str()), (StatusCode::OK, ""));
}

#[tokio::test]
async fn only_the_admin_cancels() {
    let cancel = |id: &str, token: &str| {
        Request::post(format!("/api/v1/jobs/{id}/cancel"))
            .header("authorization", token)
            .body(Body::empty())
            .unwrap()
    };
    let off = service().await;
    let id = off.accept("d").await.to_string();
    let (status, _, body) = off.send(cancel(&id, "Bearer x")).await;
    let expected = json!({ "error": "cancelling is off; set admin_token to allow it" });
    assert_eq!(
        (status, body),
        (StatusCode::FORBIDDEN, expected.to_string())
    );

    let service = service_with(|config| config.admin_token = Some(Secret::new("t0ken"))).await;
    let id = service.accept("d").await;
    for token in ["", "Bearer ", "Bearer t0ken2", "Basic t0ken"] {
        let (status, _, _) = service.send(cancel(&id.to_string(), token)).await;
        assert_eq!(status, StatusCode::UNAUTHORIZED, "{token}");
    }
    let (status, _, body) = service.send(cancel(&id.to_string(), "Bearer t0ken")).await;
    let expected = json!({ "job": id, "state": "cancelled" }).to_string();
    assert_eq!((status, body), (StatusCode::ACCEPTED, expected));
    let job = service.jobs.get(id).await.unwrap().unwrap();
    assert_eq!(job.state, State::Cancelled);
    let (status, _, body) = service.send(cancel(&id.to_string(), "Bearer t0ken")).await;
    let expected = json!({ "error": "the job has already ended" }).to_string();
    assert_eq!((status, body), (StatusCode::CONFLICT, expected));
}

#[tokio::test]
async fn the_page_has_a_policy() {
    let service = service().await;
    let request = Request::get("/").body(Body::empty()).unwrap();
    let (status, headers, body) = service.send(request).await;
    assert_eq!(status, StatusCode::OK);
    assert_eq!(headers["content-type"], "text/html; charset=utf-8");
    assert_eq!(headers["x-content-type-options"], "nosniff");
    let policy = headers["content-security-policy"].to_str().unwrap();
    assert!(policy.starts_with("default-src 'none'; style-src 'sha256-"));
    assert!(body.starts_with("<!doctype html>"));
}

/// The whole service on a socket, ended by a signal; a second one on the same database
/// is refused meanwhile.
#[tokio::test(flavor = "multi_thread")]
async fn a_service_starts_and_ends() {
    let dir = tempfile::tempdir().unwrap();
    let (signals, receiver) = mpsc::channel(1);
    let (sender, address) = tokio::sync::oneshot::channel();
    // At an address of its own: another test could take the port as soon as it is free.
    let mut config_there = config(dir.path());
    config_there.listen = "127.0.0.77:0".parse().unwrap();
    let service = tokio::spawn(run(config_there, receiver, |address| {
        sender.send(address).unwrap();
    }));
    let address = address.await.unwrap();
    let answer = reqwest::get(format!("http://{address}/healthz"))
        .await
        .unwrap();
    assert_eq!(answer.status().as_u16(), 200);

    let (_keep, receiver) = mpsc::channel(1);
    let error = run(config(dir.path()), receiver, |_| {}).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        format!(
            "another sockless serve uses {}; give this one another root or database",
            dir.path().join("store/jobs").display()
        )
    );
    signals.send("SIGTERM").await.unwrap();
    service.await.unwrap().unwrap();
    assert!(tokio::net::TcpStream::connect(address).await.is_err());
}

/// From the delivery to the image, with the service dying in the middle: the second
/// one runs the job again at once, without waiting for the lease to run out.
#[tokio::test(flavor = "multi_thread")]
async fn a_job_survives_the_death_of_its_service() {
    use std::os::unix::fs::PermissionsExt;

    let dir = tempfile::tempdir().unwrap();
    let source = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let base = format!("http://{}", source.local_addr().unwrap());
    let files = Router::new().fallback(|uri: axum::http::Uri| async move {
        match uri.path().rsplit('/').next() {
            Some("spec.json") => r#"{"service": {"name": "shop", "version": "1"}}"#,
            _ => "FROM scratch\n",
        }
    });
    tokio::spawn(async move { axum::serve(source, files).await });
    let script = format!(
        "#!/bin/sh\ncd {}\n[ -f pid ] || {{ echo $$ > pid; exec sleep 1000; }}\n\
         echo '{{\"event\":\"published\",\"reference\":\"r/shop:1\",\"digest\":\"{}\",\"uploaded_bytes\":0}}' >&2\n\
         echo '{{\"event\":\"finished\",\"success\":true,\"message\":\"\",\"timings_ms\":{{}}}}' >&2\n",
        dir.path().display(),
        Digest::of(b"m"),
    );
    let executable = dir.path().join("sockless");
    std::fs::write(&executable, script).unwrap();
    std::fs::set_permissions(&executable, std::fs::Permissions::from_mode(0o755)).unwrap();
    let config = || {
        let mut config = config(dir.path());
        config.source.raw_url = base.parse().unwrap();
        config.executable.clone_from(&executable);
        config
    };

    // A runtime of its own, which takes everything of the service down with it.
    let (_signals, receiver) = mpsc::channel(1);
    let (sender, address) = tokio::sync::oneshot::channel();
    let doomed = tokio::runtime::Runtime::new().unwrap();
    doomed.spawn(run(config(), receiver, |address| {
        sender.send(address).unwrap();
    }));
    let address = address.await.unwrap();
    let client = reqwest::Client::new();
    let mut request = client.post(format!("http://{address}/webhook"));
    for (name, value) in signed("pull_request", "d", MERGED) {
        request = request.header(name, value);
    }
    let answer = request.body(MERGED).send().await.unwrap();
    assert_eq!(answer.status().as_u16(), 202);
    let url = answer.json::<Value>().await.unwrap()["url"].clone();
    let pid = loop {
        match std::fs::read_to_string(dir.path().join("pid")) {
            Ok(pid) if pid.ends_with('\n') => break pid,
            _ => tokio::time::sleep(Duration::from_millis(10)).await,
        }
    };
    tokio::task::spawn_blocking(move || doomed.shutdown_timeout(Duration::from_secs(60)))
        .await
        .unwrap();
    until_gone(&pid).await;

    let (signals, receiver) = mpsc::channel(1);
    let (sender, address) = tokio::sync::oneshot::channel();
    let service = tokio::spawn(run(config(), receiver, |address| {
        sender.send(address).unwrap();
    }));
    let base = format!("http://{}", address.await.unwrap());
    let log = format!("{base}{}/log", url.as_str().unwrap());
    let text = reqwest::get(log).await.unwrap().text().await.unwrap();
    let end = text.split("event: end\ndata: ").nth(1).unwrap();
    let job: Value = serde_json::from_str(end.trim()).unwrap();
    assert_eq!(job["state"], "succeeded", "{text}");
    assert_eq!(job["attempts"], 2);
    assert_eq!(job["image"], "r/shop:1");
    assert!(
        text.contains("attempt 2 of 3: the service died during an earlier one"),
        "{text}"
    );
    signals.send("SIGTERM").await.unwrap();
    service.await.unwrap().unwrap();
}

/// No more connections are served at a time than allowed; the next waits its turn.
#[tokio::test(flavor = "multi_thread")]
async fn security_s21_connections_are_bounded() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    let service = service().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let stop = CancellationToken::new();
    let server = tokio::spawn(server::run(
        listener,
        service.router.clone(),
        1,
        stop.clone(),
    ));
    let mut first = tokio::net::TcpStream::connect(address).await.unwrap();
    first
        .write_all(b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n")
        .await
        .unwrap();
    let mut byte = [0];
    first.read_exact(&mut byte).await.unwrap();
    // The second is connected by the kernel but not answered before the first is gone.
    let mut second = tokio::net::TcpStream::connect(address).await.unwrap();
    second
        .write_all(b"GET /healthz HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        .await
        .unwrap();
    let early =
        tokio::time::timeout(Duration::from_millis(100), second.read_exact(&mut byte)).await;
    assert!(early.is_err());
    drop(first);
    let mut answer = String::new();
    second.read_to_string(&mut answer).await.unwrap();
    assert!(answer.ends_with("{\"status\":\"ok\"}"), "{answer}");
    stop.cancel();
    server.await.unwrap();
}
