//! Credentials and where they go.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use axum::http::request::Parts;
use axum::response::Response;
use serde_json::json;

use super::testing::{TestRegistry, answer, client, client_with, docker_config, image, line};
use super::{BlobContent, Client, Options, PushedBlob, RegistryError};
use crate::image::{Descriptor, MediaType};

/// What any request to `registry` showed.
fn shown(registry: &TestRegistry) -> Vec<Option<String>> {
    let all = registry.seen().into_iter();
    all.map(|seen| seen.headers.get("authorization").cloned())
        .collect()
}

fn header<'a>(parts: &'a Parts, name: &str) -> &'a str {
    parts.headers.get(name).map_or("", |v| v.to_str().unwrap())
}

fn challenge(text: &str) -> Response {
    let body = r#"{"errors":[{"code":"UNAUTHORIZED","message":"authentication required"}]}"#;
    answer(401, &[("www-authenticate", text)], body)
}

/// A registry whose `/token` hands out `token1`, `token2`, … of which only the last is good.
async fn with_tokens() -> (TestRegistry, Arc<AtomicUsize>) {
    let issued = Arc::new(AtomicUsize::new(0));
    let last = issued.clone();
    let registry = TestRegistry::with_hook(move |parts| {
        if parts.uri.path() == "/token" {
            let number = last.fetch_add(1, Ordering::SeqCst) + 1;
            let token = json!({"token": format!("token{number}"), "expires_in": 600});
            return Some(answer(200, &[], token.to_string()));
        }
        let good = format!("Bearer token{}", last.load(Ordering::SeqCst));
        if parts.uri.path() == "/v2/" || header(parts, "authorization") == good {
            return None;
        }
        let host = header(parts, "host");
        Some(challenge(&format!(
            r#"Bearer realm="http://{host}/token?kept=1",service="s & t""#
        )))
    })
    .await;
    (registry, issued)
}

fn with_password(registry: &TestRegistry, config: &tempfile::TempDir) -> Client {
    let options = Options {
        docker_config: Some(config.path().to_owned()),
        ..Options::default()
    };
    client_with(&[registry], options)
}

#[tokio::test]
async fn a_token_is_fetched_once_a_set_of_scopes_and_again_when_refused() {
    let (registry, issued) = with_tokens().await;
    registry.put_image("a", "1", "linux/amd64", &[b"x"]);
    let client = client(&[&registry]);
    let reference = registry.reference("a:1");
    let fetch = async || client.fetch_manifest(&reference).await.unwrap();
    // Side by side they share the token.
    tokio::join!(fetch(), fetch(), fetch());
    fetch().await;
    let tokens = |registry: &TestRegistry| {
        let all = registry.lines().into_iter();
        all.filter(|line| line.contains("/token"))
            .collect::<Vec<_>>()
    };
    assert_eq!(
        tokens(&registry),
        ["GET /token?kept=1&service=s+%26+t&scope=repository%3Aa%3Apull"]
    );
    // The registry forgets the token.
    issued.fetch_add(1, Ordering::SeqCst);
    fetch().await;
    assert_eq!(tokens(&registry).len(), 2);
    assert!(shown(&registry).contains(&Some("Bearer token3".to_owned())));
}

#[tokio::test]
async fn a_mount_asks_for_both_repositories_and_tokens_are_asked_for_ahead_once_known() {
    let (registry, _) = with_tokens().await;
    let descriptor = registry.put_blob("from", b"x");
    let client = client(&[&registry]);
    let pushed = client
        .push_blob(
            &registry.repository("to"),
            &descriptor,
            Some(&registry.repository("from")),
            BlobContent::Bytes(b"x".to_vec()),
            |_| {},
        )
        .await;
    assert_eq!(pushed.unwrap(), PushedBlob::Mounted);
    let digest = &descriptor.digest;
    assert_eq!(
        registry.lines(),
        [
            "GET /v2/".to_owned(),
            format!("HEAD /v2/to/blobs/{digest}"),
            "GET /token?kept=1&service=s+%26+t&scope=repository%3Ato%3Apull%2Cpush".to_owned(),
            format!("HEAD /v2/to/blobs/{digest}"),
            "GET /token?kept=1&service=s+%26+t&scope=repository%3Afrom%3Apull\
             &scope=repository%3Ato%3Apull%2Cpush"
                .to_owned(),
            format!(
                "POST /v2/to/blobs/uploads/?mount={}&from=from",
                digest.as_str().replace(':', "%3A")
            ),
        ]
    );
}

#[tokio::test]
async fn passwords_go_to_the_token_server_and_tokens_to_the_registry() {
    let (registry, _) = with_tokens().await;
    let raw = registry.put_image("a", "1", "linux/amd64", &[]);
    let config = docker_config(&json!({registry.name(): {"auth": "dTpodW50ZXIy"}}));
    let client = with_password(&registry, &config);
    let got = client.fetch_manifest(&registry.reference("a:1")).await;
    assert_eq!(got.unwrap(), raw);
    let password = Some("Basic dTpodW50ZXIy".to_owned());
    let token = Some("Bearer token1".to_owned());
    assert_eq!(shown(&registry), [None, None, password, token]);
}

#[tokio::test]
async fn an_identity_token_is_exchanged_by_post() {
    let registry = TestRegistry::with_hook(|parts| {
        if line(parts) == "POST /token" {
            let form = header(parts, "content-type") == "application/x-www-form-urlencoded";
            let token = r#"{"access_token":"good"}"#;
            return Some(answer(if form { 200 } else { 415 }, &[], token));
        }
        let good = header(parts, "authorization") == "Bearer good";
        let realm = format!(r#"Bearer realm="http://{}/token""#, header(parts, "host"));
        (!good && parts.uri.path() != "/v2/").then(|| challenge(&realm))
    })
    .await;
    registry.put_image("a", "1", "linux/amd64", &[]);
    let config = docker_config(&json!({registry.name(): {"auth": "", "identitytoken": "i d"}}));
    let client = with_password(&registry, &config);
    client
        .fetch_manifest(&registry.reference("a:1"))
        .await
        .unwrap();
    assert_eq!(
        registry.forms(),
        [
            "grant_type=refresh_token&client_id=sockless&refresh_token=i+d\
          &scope=repository%3Aa%3Apull"
        ]
    );
}

#[tokio::test]
async fn basic_is_answered_with_the_password_and_a_refusal_says_where_it_was() {
    let registry = TestRegistry::with_hook(|parts| {
        let good = header(parts, "authorization") == "Basic dTpw";
        (!good && parts.uri.path() != "/v2/").then(|| challenge("Basic realm=\"x\""))
    })
    .await;
    registry.put_image("a", "1", "linux/amd64", &[]);
    let reference = registry.reference("a:1");
    let name = registry.name();
    let good = docker_config(&json!({name.clone(): {"auth": "dTpw"}}));
    let client = with_password(&registry, &good);
    for _ in 0..2 {
        client.fetch_manifest(&reference).await.unwrap();
    }
    let password = Some("Basic dTpw".to_owned());
    assert_eq!(
        shown(&registry),
        [None, None, password.clone(), password],
        "shown unasked from then on"
    );

    let wrong = docker_config(&json!({name.clone(): {"auth": "dTp4"}}));
    let error = with_password(&registry, &wrong)
        .fetch_manifest(&reference)
        .await
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        format!(
            "GET http://{name}/v2/a/manifests/1: 401 UNAUTHORIZED: authentication required\n\
             hint: the credentials for {name} from {} do not allow this",
            wrong.path().join("config.json").display()
        )
    );

    let none = docker_config(&json!({"other": {"auth": "dTpw"}}));
    let error = with_password(&registry, &none)
        .fetch_manifest(&reference)
        .await
        .unwrap_err();
    assert_eq!(
        error.hint().unwrap(),
        format!(
            "no credentials for {name} were found; looked in {}; \
             `docker login {name}` puts them there",
            none.path().join("config.json").display()
        )
    );
}

/// CVE-2020-15157, CVE-2026-50151 and the advisory on redirects: host B sees no secret.
#[tokio::test]
async fn security_s14_another_host_sees_no_authorization() {
    let other = TestRegistry::start().await;
    let content = b"layer".to_vec();
    let descriptor = other.put_blob("a", &content);
    other.open_session("u0");
    let host = other.name();
    let registry = TestRegistry::with_hook(move |parts| {
        if parts.uri.path() == "/v2/" {
            return None;
        }
        if header(parts, "authorization") != "Basic dTpw" {
            return Some(challenge("Basic"));
        }
        let there = format!("http://user:name@{host}{}", parts.uri);
        let session = format!("http://{host}/v2/a/blobs/uploads/u0");
        match parts.method.as_str() {
            "GET" => Some(answer(307, &[("location", &there)], "")),
            "POST" => Some(answer(202, &[("location", &session)], "")),
            _ => None,
        }
    })
    .await;
    let config = docker_config(&json!({
        registry.name(): {"auth": "dTpw"},
        other.name(): {"auth": "dTpw"},
    }));
    let options = Options {
        docker_config: Some(config.path().to_owned()),
        ..Options::default()
    };
    let client = client_with(&[&registry, &other], options);
    let mut stream = client
        .open_blob(&registry.repository("a"), &descriptor)
        .await
        .unwrap();
    let mut got = Vec::new();
    tokio::io::AsyncReadExt::read_to_end(&mut stream, &mut got)
        .await
        .unwrap();
    assert_eq!(got, content);

    let new = b"new".to_vec();
    let pushed = client
        .push_blob(
            &registry.repository("a"),
            &Descriptor::of(MediaType::LAYER_GZIP, &new),
            None,
            BlobContent::Bytes(new),
            |_| {},
        )
        .await;
    assert_eq!(pushed.unwrap(), PushedBlob::Uploaded);
    let lines = other.lines();
    assert_eq!(lines.len(), 3, "{lines:?}");
    assert_eq!(shown(&other), [None, None, None]);
}

/// Nor does the registry itself, for what another host sent back to it.
#[tokio::test]
async fn security_s14_a_request_that_was_away_comes_back_without_authorization() {
    let name = Arc::new(std::sync::OnceLock::<String>::new());
    let back = name.clone();
    let other = TestRegistry::with_hook(move |_| {
        let to = format!("http://{}/v2/secret/manifests/1", back.get().unwrap());
        Some(answer(307, &[("location", &to)], ""))
    })
    .await;
    let host = other.name();
    let registry = TestRegistry::with_hook(move |parts| {
        let to = format!("http://{host}/");
        let away = parts.uri.path().contains("/a/manifests/");
        let known = header(parts, "authorization") == "Basic dTpw";
        match parts.uri.path() {
            "/v2/" => None,
            _ if away && known => Some(answer(307, &[("location", &to)], "")),
            _ if known => Some(answer(200, &[], "the secret")),
            _ => Some(challenge("Basic")),
        }
    })
    .await;
    name.set(registry.name()).unwrap();
    let config = docker_config(&json!({registry.name(): {"auth": "dTpw"}}));
    let error = with_password(&registry, &config)
        .fetch_manifest(&registry.reference("a:1"))
        .await
        .unwrap_err();
    assert_eq!(error.status(), Some(401), "{error}");
    assert_eq!(
        shown(&registry),
        [None, None, Some("Basic dTpw".to_owned()), None]
    );
}

/// A challenge of the host that a redirect led to is not answered.
#[tokio::test]
async fn security_s14_the_challenge_of_another_host_is_not_answered() {
    let other = TestRegistry::with_hook(|_| Some(challenge("Basic"))).await;
    let host = other.name();
    let registry = TestRegistry::with_hook(move |parts| {
        let to = format!("http://{host}/x");
        parts
            .uri
            .path()
            .contains("/manifests/")
            .then(|| answer(302, &[("location", &to)], ""))
    })
    .await;
    let config = docker_config(&json!({registry.name(): {"auth": "dTpw"}}));
    let error = with_password(&registry, &config)
        .fetch_manifest(&registry.reference("a"))
        .await
        .unwrap_err();
    assert_eq!(error.status(), Some(401));
    assert_eq!(shown(&other), [None]);
}

/// CVE-2026-48978: the token server is the registry's choice.
#[tokio::test]
async fn security_s14_an_unfit_token_server_gets_nothing() {
    for (realm, reason) in [
        (
            "http://169.254.169.254/token",
            "expected a host name, because the registry is not at such an address itself",
        ),
        ("ftp://127.0.0.1/token", "expected an https URL"),
        ("/token", "that is not an absolute URL"),
        (
            "http://u@127.0.0.1/token",
            "the URL has a user name or password in it",
        ),
    ] {
        let registry = TestRegistry::with_hook(move |parts| {
            let text = format!("Bearer realm=\"{realm}\"");
            (parts.uri.path() != "/v2/").then(|| challenge(&text))
        })
        .await;
        let config = docker_config(&json!({registry.name(): {"auth": "dTpw"}}));
        let client = with_password(&registry, &config);
        let error = client
            .push_manifest(&registry.reference("a"), &image("linux/amd64", &[], |_| {}))
            .await
            .unwrap_err();
        assert!(matches!(error, RegistryError::Realm { .. }), "{error}");
        assert!(error.to_string().ends_with(reason), "{error}");
        assert_eq!(shown(&registry), [None, None]);
    }
}

#[tokio::test]
async fn a_token_server_that_refuses_or_babbles_is_named() {
    for (status, body, expected) in [
        (
            401,
            r#"{"errors":[{"code":"UNAUTHORIZED","message":"wrong password"}]}"#,
            "401 UNAUTHORIZED: wrong password\nhint: the credentials for",
        ),
        (200, "<html>", "the token server's answer is not valid JSON"),
        (200, r#"{"token":"a\nb"}"#, "characters that cannot be sent"),
    ] {
        let registry = TestRegistry::with_hook(move |parts| {
            if parts.uri.path() == "/token" {
                return Some(answer(status, &[], body));
            }
            let realm = format!(r#"Bearer realm="http://{}/token""#, header(parts, "host"));
            (parts.uri.path() != "/v2/").then(|| challenge(&realm))
        })
        .await;
        let config = docker_config(&json!({registry.name(): {"auth": "dTpw"}}));
        let client = with_password(&registry, &config);
        let error = client
            .check_push(&registry.repository("a"))
            .await
            .unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
    }
}
