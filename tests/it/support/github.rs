//! A server in the shape of GitHub's: raw files, archives, and signed deliveries.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use hmac::{Hmac, KeyInit as _, Mac as _};
use serde_json::Value;
use sha2::Sha256;

use super::repository;

/// The commit that the fixtures' pull request was merged as.
pub const COMMIT: &str = "6dcb09b5b57875f334f61aebed695e2e4193db5e";
/// Owner and name of the fixtures' repository.
pub const REPOSITORY: &str = "octo-org/apache";

/// A running server. It ends with the test.
#[derive(Debug)]
pub struct GitHub {
    /// `HOST:PORT`.
    pub host: String,
    shared: Arc<Mutex<Shared>>,
    runtime: Option<tokio::runtime::Runtime>,
}

#[derive(Debug, Default)]
struct Shared {
    /// By commit and path.
    files: BTreeMap<(String, String), Vec<u8>>,
    /// `GET /raw/…`, and the `Authorization` that came with it.
    requests: Vec<(String, Option<String>)>,
}

impl GitHub {
    /// Starts one on a free port of the loopback.
    pub fn start() -> Self {
        let shared = Arc::new(Mutex::new(Shared::default()));
        let routes = Router::new()
            .route("/raw/{owner}/{repository}/{commit}/{*path}", get(raw))
            .route(
                "/archive/{owner}/{repository}/tar.gz/{commit}",
                get(archive),
            )
            .with_state(shared.clone());
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .expect("threads");
        let listener = runtime
            .block_on(tokio::net::TcpListener::bind(SocketAddr::from((
                [127, 0, 0, 1],
                0,
            ))))
            .expect("a free port");
        let host = listener.local_addr().expect("bound").to_string();
        runtime.spawn(async move { axum::serve(listener, routes).await });
        Self {
            host,
            shared,
            runtime: Some(runtime),
        }
    }

    /// Stands in for `https://raw.githubusercontent.com`.
    pub fn raw_url(&self) -> String {
        format!("http://{}/raw", self.host)
    }

    /// Stands in for `https://codeload.github.com`.
    pub fn archive_url(&self) -> String {
        format!("http://{}/archive", self.host)
    }

    /// Puts a file into the tree of a commit.
    pub fn file(&self, commit: &str, path: &str, content: impl Into<Vec<u8>>) {
        let mut shared = self.shared.lock().expect("no panic while held");
        shared
            .files
            .insert((commit.to_owned(), path.to_owned()), content.into());
    }

    /// Paths asked for so far, each with its `Authorization`.
    pub fn requests(&self) -> Vec<(String, Option<String>)> {
        self.shared
            .lock()
            .expect("no panic while held")
            .requests
            .clone()
    }
}

impl Drop for GitHub {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

type Server = State<Arc<Mutex<Shared>>>;

fn note(shared: &mut Shared, path: String, headers: &HeaderMap) {
    let authorization = headers
        .get(header::AUTHORIZATION)
        .and_then(|v| v.to_str().ok());
    shared
        .requests
        .push((path, authorization.map(str::to_owned)));
}

async fn raw(
    State(shared): Server,
    Path((owner, name, commit, path)): Path<(String, String, String, String)>,
    headers: HeaderMap,
) -> Response {
    let mut shared = shared.lock().expect("no panic while held");
    note(
        &mut shared,
        format!("/raw/{owner}/{name}/{commit}/{path}"),
        &headers,
    );
    match shared.files.get(&(commit, path)) {
        Some(content) if format!("{owner}/{name}") == REPOSITORY => (
            [(header::CONTENT_TYPE, "text/plain; charset=utf-8")],
            content.clone(),
        )
            .into_response(),
        _ => (StatusCode::NOT_FOUND, "404: Not Found").into_response(),
    }
}

async fn archive(
    State(shared): Server,
    Path((owner, name, commit)): Path<(String, String, String)>,
    headers: HeaderMap,
) -> Response {
    let mut shared = shared.lock().expect("no panic while held");
    note(
        &mut shared,
        format!("/archive/{owner}/{name}/tar.gz/{commit}"),
        &headers,
    );
    let files: Vec<_> = shared
        .files
        .iter()
        .filter(|((c, _), _)| *c == commit)
        .collect();
    if files.is_empty() || format!("{owner}/{name}") != REPOSITORY {
        return (StatusCode::NOT_FOUND, "404: Not Found").into_response();
    }
    // As `git archive` does it: the commit in a global PAX header, everything in one directory.
    let mut tar = tar::Builder::new(flate2::write::GzEncoder::new(
        Vec::new(),
        flate2::Compression::fast(),
    ));
    let comment = format!("52 comment={commit}\n");
    let mut add = |kind, path: &str, content: &[u8], mode| {
        let mut header = tar::Header::new_ustar();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_size(content.len() as u64);
        header.set_mtime(1_704_067_200);
        tar.append_data(&mut header, path, content).expect("memory");
    };
    add(
        tar::EntryType::XGlobalHeader,
        "pax_global_header",
        comment.as_bytes(),
        0o666,
    );
    let top = format!("{name}-{commit}");
    add(tar::EntryType::Directory, &format!("{top}/"), b"", 0o775);
    for ((_, path), content) in files {
        add(
            tar::EntryType::Regular,
            &format!("{top}/{path}"),
            content,
            0o664,
        );
    }
    let body = tar
        .into_inner()
        .and_then(|gzip| gzip.finish())
        .expect("memory");
    ([(header::CONTENT_TYPE, "application/x-gzip")], body).into_response()
}

/// `sha256=…`, as GitHub puts it into `X-Hub-Signature-256`.
pub fn sign(secret: &str, body: &[u8]) -> String {
    let mut mac = Hmac::<Sha256>::new_from_slice(secret.as_bytes()).expect("any length");
    mac.update(body);
    format!("sha256={}", super::oci::hex(&mac.finalize().into_bytes()))
}

/// A file of `fixtures/scenario/`.
#[track_caller]
pub fn fixture(name: &str) -> Vec<u8> {
    let path = repository().join("fixtures/scenario").join(name);
    std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// The fixtures' delivery, a merged pull request, for tests that change something in it.
#[track_caller]
pub fn pull_request() -> Value {
    serde_json::from_slice(&fixture("pull_request.json")).expect("the fixture is JSON")
}

#[test]
fn signatures_are_those_of_githubs_documentation() {
    // <https://docs.github.com/en/webhooks/using-webhooks/validating-webhook-deliveries>
    assert_eq!(
        sign("It's a Secret to Everybody", b"Hello, World!"),
        "sha256=757107ea0eb2509fc211221cce984b8a37570b6d7586c22c46f4379c8b043e17"
    );
}
