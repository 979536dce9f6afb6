//! A registry in this process for tests: honest by itself, and as faulty as a hook makes it.

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::request::Parts;
use axum::response::Response;
use futures_util::StreamExt;

use super::http::Timing;
use super::{Client, Options};
use crate::image::{
    Descriptor, Digest, ImageConfig, Manifest, MediaType, Platform, RawManifest, Reference,
    Repository,
};

/// What a hook sees of a request: everything but the body.
pub(crate) type Hook = dyn Fn(&Parts) -> Option<Response> + Send + Sync;

/// A registry on a port of its own; it ends with the test's runtime.
pub(crate) struct TestRegistry {
    address: SocketAddr,
    state: Arc<Inner>,
}

struct Inner {
    hook: Box<Hook>,
    /// Whether PATCH takes only this many bytes and then fails, once each.
    cuts: Mutex<Vec<usize>>,
    blobs: Mutex<HashMap<Key, Vec<u8>>>,
    /// Type and bytes.
    manifests: Mutex<HashMap<Key, (String, Vec<u8>)>>,
    uploads: Mutex<HashMap<String, Vec<u8>>>,
    seen: Mutex<Vec<Seen>>,
    /// What was posted to `/token`.
    forms: Mutex<Vec<String>>,
}

/// A repository, and a digest or tag in it.
type Key = (String, String);

/// A request that came, in the order of coming.
#[derive(Clone, Debug)]
pub(crate) struct Seen {
    /// `METHOD /path?query`.
    pub(crate) line: String,
    /// Of the headers, what tests look at.
    pub(crate) headers: BTreeMap<String, String>,
}

impl TestRegistry {
    /// An honest registry.
    pub(crate) async fn start() -> Self {
        Self::with_hook(|_| None).await
    }

    /// A registry that answers with what `hook` gives, where it gives something.
    pub(crate) async fn with_hook(
        hook: impl Fn(&Parts) -> Option<Response> + Send + Sync + 'static,
    ) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let state = Arc::new(Inner {
            hook: Box::new(hook),
            cuts: Mutex::default(),
            blobs: Mutex::default(),
            manifests: Mutex::default(),
            uploads: Mutex::default(),
            seen: Mutex::default(),
            forms: Mutex::default(),
        });
        let router = Router::new().fallback(serve).with_state(state.clone());
        tokio::spawn(async move { axum::serve(listener, router).await });
        Self { address, state }
    }

    /// `127.0.0.1:PORT`.
    pub(crate) fn name(&self) -> String {
        self.address.to_string()
    }

    pub(crate) fn repository(&self, name: &str) -> Repository {
        self.reference(name).repository().clone()
    }

    /// `name` may have a tag or a digest.
    pub(crate) fn reference(&self, name: &str) -> Reference {
        Reference::parse(&format!("{}/{name}", self.address)).unwrap()
    }

    /// The next PATCHes take this many bytes each and then fail with 500.
    pub(crate) fn cut_patches(&self, sizes: &[usize]) {
        *self.state.cuts.lock().unwrap() = sizes.to_vec();
    }

    /// Begins an upload session without a request, as a storage service is made to.
    pub(crate) fn open_session(&self, id: &str) {
        let mut uploads = self.state.uploads.lock().unwrap();
        uploads.insert(id.to_owned(), Vec::new());
    }

    /// Stores a blob and describes it.
    pub(crate) fn put_blob(&self, repository: &str, bytes: &[u8]) -> Descriptor {
        let descriptor = Descriptor::of(MediaType::LAYER_GZIP, bytes);
        let key = (repository.to_owned(), descriptor.digest.to_string());
        self.state.blobs.lock().unwrap().insert(key, bytes.to_vec());
        descriptor
    }

    pub(crate) fn blob(&self, repository: &str, digest: &Digest) -> Option<Vec<u8>> {
        let key = (repository.to_owned(), digest.to_string());
        self.state.blobs.lock().unwrap().get(&key).cloned()
    }

    /// Stores a manifest under its digest and `tag`.
    pub(crate) fn put_manifest(&self, repository: &str, tag: &str, manifest: &RawManifest) {
        for selector in [tag, manifest.digest.as_str()] {
            let key = (repository.to_owned(), selector.to_owned());
            let value = (manifest.media_type.to_string(), manifest.bytes.clone());
            self.state.manifests.lock().unwrap().insert(key, value);
        }
    }

    /// Stores an image with `layers` and returns its manifest.
    pub(crate) fn put_image(
        &self,
        repository: &str,
        tag: &str,
        platform: &str,
        layers: &[&[u8]],
    ) -> RawManifest {
        let raw = image(platform, layers, |bytes| {
            self.put_blob(repository, bytes);
        });
        self.put_manifest(repository, tag, &raw);
        raw
    }

    /// All requests so far, as `METHOD /path?query`.
    pub(crate) fn lines(&self) -> Vec<String> {
        self.seen().into_iter().map(|seen| seen.line).collect()
    }

    pub(crate) fn seen(&self) -> Vec<Seen> {
        self.state.seen.lock().unwrap().clone()
    }

    /// The bodies of all requests for `/token`.
    pub(crate) fn forms(&self) -> Vec<String> {
        self.state.forms.lock().unwrap().clone()
    }

    pub(crate) fn forget_seen(&self) {
        self.state.seen.lock().unwrap().clear();
    }
}

/// Makes an image; its config and layers go to `store`.
pub(crate) fn image(platform: &str, layers: &[&[u8]], store: impl Fn(&[u8])) -> RawManifest {
    let mut config = ImageConfig::scratch(Platform::parse(platform).unwrap());
    for layer in layers {
        store(layer);
        let diff_id = crate::image::DiffId::from_uncompressed(Digest::of(layer));
        config.rootfs.diff_ids.push(diff_id);
    }
    let config = serde_json::to_vec(&config).unwrap();
    store(&config);
    let manifest = Manifest {
        schema_version: 2,
        media_type: Some(MediaType::MANIFEST),
        config: Descriptor::of(MediaType::CONFIG, &config),
        layers: layers
            .iter()
            .map(|layer| Descriptor::of(MediaType::LAYER_TAR, layer))
            .collect(),
        annotations: BTreeMap::new(),
    };
    RawManifest::new(MediaType::MANIFEST, serde_json::to_vec(&manifest).unwrap())
}

/// A client that allows plain HTTP to `registries`, knows no credentials and waits little.
pub(crate) fn client(registries: &[&TestRegistry]) -> Client {
    client_with(registries, Options::default())
}

pub(crate) fn client_with(registries: &[&TestRegistry], mut options: Options) -> Client {
    options.insecure.extend(registries.iter().map(|r| r.name()));
    options
        .docker_config
        .get_or_insert_with(|| PathBuf::from("/nonexistent"));
    Client::with_timing(options, quick()).unwrap()
}

/// Long enough for a loaded machine, but for the pauses, which nothing is expected of.
pub(crate) fn quick() -> Timing {
    Timing {
        first_pause: Duration::from_millis(1),
        ..Timing::default()
    }
}

/// A directory with a `config.json` that has `auths`.
pub(crate) fn docker_config(auths: &serde_json::Value) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let text = serde_json::json!({ "auths": auths }).to_string();
    std::fs::write(dir.path().join("config.json"), text).unwrap();
    dir
}

pub(crate) fn answer(status: u16, headers: &[(&str, &str)], body: impl Into<Body>) -> Response {
    let mut response = Response::builder().status(status);
    for (name, value) in headers {
        response = response.header(*name, *value);
    }
    response.body(body.into()).unwrap()
}

/// A body that breaks off after `bytes`.
pub(crate) fn breaking(bytes: Vec<u8>) -> Body {
    let pieces = [Ok(bytes), Err(std::io::Error::other("cable cut"))];
    // The pause lets the first piece leave before the connection is torn down.
    let stream = futures_util::stream::iter(pieces).then(|piece| async {
        if piece.is_err() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        piece
    });
    Body::from_stream(stream)
}

/// `METHOD /path?query`.
pub(crate) fn line(parts: &Parts) -> String {
    format!("{} {}", parts.method, parts.uri)
}

async fn serve(State(state): State<Arc<Inner>>, request: Request) -> Response {
    let (parts, body) = request.into_parts();
    let text = |(name, value): (&axum::http::HeaderName, &axum::http::HeaderValue)| {
        let value = String::from_utf8_lossy(value.as_bytes()).into_owned();
        (name.to_string(), value)
    };
    state.seen.lock().unwrap().push(Seen {
        line: line(&parts),
        headers: parts.headers.iter().map(text).collect(),
    });
    if let Some(response) = (state.hook)(&parts) {
        if parts.uri.path() == "/token" {
            let body = axum::body::to_bytes(body, 1 << 20).await.unwrap();
            let body = String::from_utf8(body.to_vec()).unwrap();
            state.forms.lock().unwrap().push(body);
        } else if parts.method == "PATCH" {
            // HTTP/1.1 does not promise that an answer is heard before its request has ended.
            // A body that breaks off is the client's affair.
            let _ = axum::body::to_bytes(body, usize::MAX).await;
        }
        return response;
    }
    let path = parts.uri.path().to_owned();
    let Some(path) = path.strip_prefix("/v2/") else {
        return answer(404, &[], "");
    };
    if path.is_empty() {
        return answer(200, &[], "{}");
    }
    if let Some((repository, rest)) = path.split_once("/blobs/uploads/") {
        return upload(&state, &parts, body, repository, rest).await;
    }
    if let Some((repository, digest)) = path.split_once("/blobs/") {
        return blob(&state, &parts, repository, digest);
    }
    if let Some((repository, selector)) = path.split_once("/manifests/") {
        return manifest(&state, &parts, body, repository, selector).await;
    }
    answer(404, &[], "")
}

fn unknown(code: &str) -> Response {
    let body = serde_json::json!({"errors": [{"code": code, "message": "not here"}]});
    answer(404, &[], body.to_string())
}

fn blob(state: &Inner, parts: &Parts, repository: &str, digest: &str) -> Response {
    let key = (repository.to_owned(), digest.to_owned());
    let Some(bytes) = state.blobs.lock().unwrap().get(&key).cloned() else {
        return unknown("BLOB_UNKNOWN");
    };
    let range = parts.headers.get("range").map(|v| v.to_str().unwrap());
    match range {
        None => answer(200, &[], bytes),
        Some(range) => {
            let start: usize = range
                .strip_prefix("bytes=")
                .and_then(|r| r.strip_suffix('-'))
                .unwrap()
                .parse()
                .unwrap();
            if start >= bytes.len() {
                return answer(416, &[], "");
            }
            let range = format!("bytes {start}-{}/{}", bytes.len() - 1, bytes.len());
            answer(206, &[("content-range", &range)], bytes[start..].to_vec())
        }
    }
}

async fn manifest(
    state: &Inner,
    parts: &Parts,
    body: Body,
    repository: &str,
    selector: &str,
) -> Response {
    if parts.method == "PUT" {
        let bytes = axum::body::to_bytes(body, 8 << 20).await.unwrap().to_vec();
        let digest = Digest::of(&bytes).to_string();
        let media_type = parts.headers["content-type"].to_str().unwrap().to_owned();
        for selector in [selector, &digest] {
            let key = (repository.to_owned(), selector.to_owned());
            let value = (media_type.clone(), bytes.clone());
            state.manifests.lock().unwrap().insert(key, value);
        }
        return answer(201, &[("docker-content-digest", &digest)], "");
    }
    let key = (repository.to_owned(), selector.to_owned());
    match state.manifests.lock().unwrap().get(&key) {
        None => unknown("MANIFEST_UNKNOWN"),
        Some((media_type, bytes)) => answer(
            200,
            &[
                ("content-type", media_type),
                ("docker-content-digest", Digest::of(bytes).as_str()),
            ],
            bytes.clone(),
        ),
    }
}

async fn upload(state: &Inner, parts: &Parts, body: Body, repository: &str, id: &str) -> Response {
    let query: HashMap<String, String> =
        url::form_urlencoded::parse(parts.uri.query().unwrap_or_default().as_bytes())
            .into_owned()
            .collect();
    match parts.method.as_str() {
        "POST" => {
            if let (Some(digest), Some(from)) = (query.get("mount"), query.get("from")) {
                let mut blobs = state.blobs.lock().unwrap();
                if let Some(bytes) = blobs.get(&(from.clone(), digest.clone())).cloned() {
                    blobs.insert((repository.to_owned(), digest.clone()), bytes);
                    return answer(201, &[("docker-content-digest", digest)], "");
                }
            }
            let mut uploads = state.uploads.lock().unwrap();
            let id = format!("u{}", uploads.len());
            uploads.insert(id.clone(), Vec::new());
            let location = format!("/v2/{repository}/blobs/uploads/{id}?state=s");
            answer(202, &[("location", &location), ("range", "0-0")], "")
        }
        "DELETE" => {
            state.uploads.lock().unwrap().remove(id);
            answer(204, &[], "")
        }
        "GET" => match state.uploads.lock().unwrap().get(id) {
            None => unknown("BLOB_UPLOAD_UNKNOWN"),
            Some(bytes) => answer(204, &[("range", &range(bytes))], ""),
        },
        _ => {
            let Some(mut bytes) = state.uploads.lock().unwrap().get(id).cloned() else {
                return unknown("BLOB_UPLOAD_UNKNOWN");
            };
            if let Some(range) = parts.headers.get("content-range") {
                let start = range
                    .to_str()
                    .unwrap()
                    .split_once('-')
                    .unwrap()
                    .0
                    .to_owned();
                if start != bytes.len().to_string() {
                    return answer(416, &[("range", &range_of(bytes.len()))], "");
                }
            }
            let cut = if parts.method == "PATCH" {
                let mut cuts = state.cuts.lock().unwrap();
                (!cuts.is_empty()).then(|| cuts.remove(0))
            } else {
                None
            };
            let mut stream = body.into_data_stream();
            let mut taken = 0;
            while let Some(piece) = stream.next().await {
                let Ok(piece) = piece else { break };
                let left = cut.map_or(piece.len(), |cut| piece.len().min(cut - taken));
                bytes.extend_from_slice(&piece[..left]);
                taken += left;
                if cut == Some(taken) {
                    state.uploads.lock().unwrap().insert(id.to_owned(), bytes);
                    return answer(500, &[], "");
                }
            }
            if parts.method == "PATCH" {
                let location = format!("/v2/{repository}/blobs/uploads/{id}?state=t");
                let range = range(&bytes);
                state.uploads.lock().unwrap().insert(id.to_owned(), bytes);
                return answer(202, &[("location", &location), ("range", &range)], "");
            }
            let digest = Digest::of(&bytes).to_string();
            if query.get("digest") != Some(&digest) {
                let body = r#"{"errors":[{"code":"DIGEST_INVALID","message":"other bytes"}]}"#;
                return answer(400, &[], body);
            }
            state.uploads.lock().unwrap().remove(id);
            let key = (repository.to_owned(), digest.clone());
            state.blobs.lock().unwrap().insert(key, bytes);
            answer(201, &[("docker-content-digest", &digest)], "")
        }
    }
}

fn range(bytes: &[u8]) -> String {
    range_of(bytes.len())
}

/// As the reference implementation writes it, which tells one byte from none no more than it.
fn range_of(length: usize) -> String {
    format!("0-{}", length.saturating_sub(1))
}
