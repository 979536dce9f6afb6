//! Pushing to an in-process registry, honest and faulty.

use std::io::Write as _;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::testing::{TestRegistry, answer, client, client_with, image, line};
use super::{BlobContent, Client, Options, PushedBlob, RegistryError};
use crate::image::{Descriptor, Digest, MediaType, RawManifest, Repository};
use crate::store::{BlobWriter, Store};

/// Bytes that differ everywhere, so that a piece at a wrong place shows.
fn bytes(length: usize) -> Vec<u8> {
    (0..length as u32)
        .flat_map(u32::to_le_bytes)
        .take(length)
        .collect()
}

fn describe(content: &[u8]) -> Descriptor {
    Descriptor::of(MediaType::LAYER_GZIP, content)
}

async fn push(
    client: &Client,
    to: &Repository,
    content: &[u8],
) -> Result<PushedBlob, RegistryError> {
    let source = BlobContent::Bytes(content.to_vec());
    client
        .push_blob(to, &describe(content), None, source, |_| {})
        .await
}

/// The requests so far without the parts that differ from run to run.
fn methods(registry: &TestRegistry) -> Vec<String> {
    let all = registry.lines().into_iter();
    let method = |line: String| line.split(' ').next().unwrap().to_owned();
    all.filter(|line| line != "GET /v2/").map(method).collect()
}

#[tokio::test]
async fn a_blob_is_streamed_once() {
    let registry = TestRegistry::start().await;
    let content = bytes(2_000_000);
    let descriptor = describe(&content);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("blob");
    std::fs::write(&path, &content).unwrap();
    let to = registry.repository("a/b");
    let done = AtomicU64::new(0);
    let first = client(&[&registry]);
    let push = async |client: &Client| {
        let source = BlobContent::File(path.clone());
        let progress = |bytes| done.store(bytes, Ordering::Relaxed);
        let pushed = client.push_blob(&to, &descriptor, None, source, progress);
        pushed.await.unwrap()
    };
    assert_eq!(push(&first).await, PushedBlob::Uploaded);
    assert_eq!(done.load(Ordering::Relaxed), 2_000_000);
    assert!(registry.blob("a/b", &descriptor.digest).unwrap() == content);
    let digest = &descriptor.digest;
    assert_eq!(
        registry.lines(),
        [
            "GET /v2/".to_owned(),
            format!("HEAD /v2/a/b/blobs/{digest}"),
            "POST /v2/a/b/blobs/uploads/".to_owned(),
            "PATCH /v2/a/b/blobs/uploads/u0?state=s".to_owned(),
            format!("PUT /v2/a/b/blobs/uploads/u0?state=t&digest={digest}"),
        ]
    );
    let patch = &registry.seen()[3].headers;
    assert_eq!(patch["content-length"], "2000000");
    assert_eq!(patch["content-type"], "application/octet-stream");
    assert!(!patch.contains_key("transfer-encoding"));
    assert!(patch["user-agent"].starts_with("sockless/"));

    registry.forget_seen();
    assert_eq!(push(&first).await, PushedBlob::AlreadyThere);
    assert_eq!(methods(&registry), [""; 0], "this client knows");
    assert_eq!(push(&client(&[&registry])).await, PushedBlob::AlreadyThere);
    assert_eq!(methods(&registry), ["HEAD"], "another one asks");
    assert!(first.has_blob(&to, digest).await.unwrap());
    assert!(!first.has_blob(&to, &Digest::of(b"?")).await.unwrap());
}

#[tokio::test]
async fn pushes_of_one_blob_at_one_time_are_one_push() {
    let registry = TestRegistry::start().await;
    let content = bytes(1_000_000);
    let client = client(&[&registry]);
    let to = registry.repository("a");
    let (x, y, z) = tokio::join!(
        push(&client, &to, &content),
        push(&client, &to, &content),
        push(&client, &to, &content)
    );
    let mut got = [x.unwrap(), y.unwrap(), z.unwrap()];
    got.sort_by_key(|pushed| *pushed as u8);
    use PushedBlob::{AlreadyThere, Uploaded};
    assert_eq!(got, [AlreadyThere, AlreadyThere, Uploaded]);
    assert_eq!(methods(&registry), ["HEAD", "POST", "PATCH", "PUT"]);
}

#[tokio::test]
async fn an_empty_blob_is_only_committed() {
    let registry = TestRegistry::start().await;
    let pushed = push(&client(&[&registry]), &registry.repository("a"), b"").await;
    assert_eq!(pushed.unwrap(), PushedBlob::Uploaded);
    assert_eq!(methods(&registry), ["HEAD", "POST", "PUT"]);
    assert!(registry.blob("a", &Digest::of(b"")).is_some());
}

/// How the registry answers a mount, what comes of it, and with which requests.
#[tokio::test]
async fn a_mount_is_taken_continued_or_replaced() {
    for (status, expected, requests) in [
        (0, PushedBlob::Mounted, &["HEAD", "POST"][..]),
        (202, PushedBlob::Uploaded, &["HEAD", "POST", "PATCH", "PUT"]),
        (
            403,
            PushedBlob::Uploaded,
            &["HEAD", "POST", "POST", "PATCH", "PUT"],
        ),
    ] {
        let registry = TestRegistry::with_hook(move |parts| {
            let mount = parts.uri.query().is_some_and(|q| q.contains("mount="));
            match status {
                403 if mount => Some(answer(403, &[], "")),
                _ => None,
            }
        })
        .await;
        let content = bytes(1000);
        // A registry that does not have the blob there begins an upload instead.
        let at = if status == 202 { "elsewhere" } else { "from" };
        let descriptor = registry.put_blob(at, &content);
        let from = registry.repository("from");
        let to = registry.repository("to");
        let source = BlobContent::Bytes(content.clone());
        let pushed = client(&[&registry])
            .push_blob(&to, &descriptor, Some(&from), source, |_| {})
            .await;
        assert_eq!(pushed.unwrap(), expected, "{status}");
        assert_eq!(methods(&registry), requests, "{status}");
        assert!(registry.blob("to", &descriptor.digest).unwrap() == content);
    }
}

#[tokio::test]
async fn a_registry_without_patch_gets_one_put() {
    for status in [405, 411, 501] {
        let registry = TestRegistry::with_hook(move |parts| {
            (parts.method == "PATCH").then(|| answer(status, &[], ""))
        })
        .await;
        // More than the sockets hold: the answer comes before all is sent.
        let content = bytes(30_000_000);
        let to = registry.repository("a");
        push(&client(&[&registry]), &to, &content).await.unwrap();
        assert_eq!(
            methods(&registry),
            ["HEAD", "POST", "PATCH", "DELETE", "POST", "PUT"]
        );
        let put = registry.seen().pop().unwrap();
        assert_eq!(put.headers["content-length"], "30000000");
        assert!(registry.blob("a", &Digest::of(&content)).unwrap() == content);
    }
}

#[tokio::test]
async fn a_broken_upload_goes_on_where_it_broke() {
    let registry = TestRegistry::start().await;
    registry.cut_patches(&[1_000_000, 500_000]);
    let content = bytes(3_000_000);
    let to = registry.repository("a");
    push(&client(&[&registry]), &to, &content).await.unwrap();
    assert!(registry.blob("a", &Digest::of(&content)).unwrap() == content);
    let ranges: Vec<_> = registry
        .seen()
        .into_iter()
        .filter(|seen| seen.line.starts_with("PATCH"))
        .map(|seen| seen.headers.get("content-range").cloned())
        .collect();
    assert_eq!(
        ranges,
        [
            None,
            Some("1000000-2999999".to_owned()),
            Some("1500000-2999999".to_owned())
        ]
    );
}

/// "Range: 0-0" means one byte or none; the wrong guess must not shift the rest.
#[tokio::test]
async fn an_upload_that_broke_after_one_byte_begins_anew() {
    let registry = TestRegistry::start().await;
    registry.cut_patches(&[1]);
    let content = bytes(500_000);
    let to = registry.repository("a");
    push(&client(&[&registry]), &to, &content).await.unwrap();
    assert!(registry.blob("a", &Digest::of(&content)).unwrap() == content);
    let posts = methods(&registry).iter().filter(|m| *m == "POST").count();
    assert_eq!(posts, 2);
}

/// The reference registry may still be busy with the request that broke: it then refuses
/// the next one, or has stored the bytes of both.
#[tokio::test]
async fn a_session_that_was_spoilt_by_resuming_is_replaced() {
    for (method, status) in [("PATCH", 404), ("PUT", 400)] {
        let spoilt = AtomicU64::new(0);
        let registry = TestRegistry::with_hook(move |parts| {
            let first = parts.uri.path().ends_with("/u0");
            let resumed = method == "PUT" || parts.headers.contains_key("content-range");
            let hit = first && resumed && parts.method == method;
            (hit && spoilt.fetch_add(1, Ordering::SeqCst) == 0).then(|| answer(status, &[], "{}"))
        })
        .await;
        registry.cut_patches(&[100_000]);
        let content = bytes(300_000);
        let to = registry.repository("a");
        push(&client(&[&registry]), &to, &content).await.unwrap();
        assert!(registry.blob("a", &Digest::of(&content)).unwrap() == content);
        let posts = methods(&registry).iter().filter(|m| *m == "POST").count();
        assert_eq!(posts, 2, "{method}");
    }
}

#[tokio::test]
async fn an_upload_that_always_breaks_ends_and_cleans_up() {
    let registry =
        TestRegistry::with_hook(|parts| (parts.method == "PATCH").then(|| answer(500, &[], "")))
            .await;
    let to = registry.repository("a");
    let error = push(&client(&[&registry]), &to, &bytes(1000))
        .await
        .unwrap_err();
    assert_eq!(error.status(), Some(500));
    let methods = methods(&registry);
    let count = |method: &str| methods.iter().filter(|m| *m == method).count();
    assert_eq!(count("PATCH"), 5, "one and four more");
    assert_eq!(count("DELETE"), count("POST"), "{methods:?}");
}

#[tokio::test]
async fn a_commit_whose_answer_was_lost_is_noticed() {
    let committed = AtomicBool::new(false);
    let registry = TestRegistry::with_hook(move |parts| match parts.method.as_str() {
        "PUT" => {
            committed.store(true, Ordering::SeqCst);
            Some(answer(502, &[], ""))
        }
        "HEAD" if committed.load(Ordering::SeqCst) => Some(answer(200, &[], "")),
        _ => None,
    })
    .await;
    let to = registry.repository("a");
    push(&client(&[&registry]), &to, &bytes(10)).await.unwrap();
    let puts = methods(&registry).iter().filter(|m| *m == "PUT").count();
    assert_eq!(puts, 1);
}

#[tokio::test]
async fn content_that_is_not_the_blob_is_an_error() {
    let registry = TestRegistry::start().await;
    let client = client(&[&registry]);
    let to = registry.repository("a");
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("blob");
    let descriptor = describe(b"right");
    let push = async |content: BlobContent| {
        let pushed = client.push_blob(&to, &descriptor, None, content, |_| {});
        pushed.await.unwrap_err()
    };
    let missing = push(BlobContent::File(path.clone())).await;
    assert_eq!(
        missing.to_string(),
        format!("reading {} for the upload", path.display())
    );
    std::fs::write(&path, "longer").unwrap();
    let long = push(BlobContent::File(path.clone())).await;
    assert_eq!(
        long.to_string(),
        format!("file {}: got 6 bytes, want 5 bytes", path.display())
    );
    std::fs::write(&path, "wrong").unwrap();
    let wrong = push(BlobContent::File(path)).await;
    assert!(
        wrong
            .to_string()
            .ends_with("400 DIGEST_INVALID: other bytes"),
        "{wrong}"
    );
    let short = push(BlobContent::Bytes(b"shor".to_vec())).await;
    assert!(matches!(
        short,
        RegistryError::Size {
            got: 4,
            want: 5,
            ..
        }
    ));
    assert!(registry.blob("a", &descriptor.digest).is_none());
}

#[tokio::test]
async fn a_blob_goes_straight_from_one_registry_to_another() {
    let from = TestRegistry::start().await;
    let to = TestRegistry::start().await;
    to.cut_patches(&[700_000]);
    let content = bytes(2_000_000);
    let descriptor = from.put_blob("base", &content);
    let client = client(&[&from, &to]);
    let remote = || BlobContent::Remote(from.repository("base"));
    let across = client
        .push_blob(&to.repository("x"), &descriptor, None, remote(), |_| {})
        .await;
    assert_eq!(across.unwrap(), PushedBlob::Uploaded);
    assert!(to.blob("x", &descriptor.digest).unwrap() == content);
    let beside = client
        .push_blob(&from.repository("x"), &descriptor, None, remote(), |_| {})
        .await;
    assert_eq!(beside.unwrap(), PushedBlob::Mounted);

    // Damaged at the source: neither here nor there.
    let bad = bytes(1000);
    let mut lie = describe(&bad);
    lie.digest = Digest::of(b"other");
    let hooked = TestRegistry::with_hook(move |parts| {
        let blob = parts.method == "GET" && parts.uri.path().contains("/blobs/");
        blob.then(|| answer(200, &[], bad.clone()))
    })
    .await;
    let client = self::client(&[&hooked, &to]);
    let content = BlobContent::Remote(hooked.repository("base"));
    let error = client
        .push_blob(&to.repository("x"), &lie, None, content, |_| {})
        .await
        .unwrap_err();
    // The source is at fault, and not what it goes to.
    let RegistryError::Content { what, source } = error else {
        panic!("{error}");
    };
    let base = hooked.repository("base");
    assert_eq!(what, format!("blob {} of {base}", lie.digest));
    let source = super::pull::from_io(source);
    assert!(matches!(source, RegistryError::Digest { .. }), "{source}");
    assert!(to.blob("x", &lie.digest).is_none());
}

/// CVE-2026-50151: the upload location is the registry's choice.
#[tokio::test]
async fn security_s14_an_upload_location_leads_only_to_fit_places() {
    for (location, expected) in [
        (
            "http://169.254.169.254/upload",
            "a server elsewhere must not name a loopback or link-local address",
        ),
        ("gopher://127.0.0.1/", "that is not HTTP"),
    ] {
        let registry = TestRegistry::with_hook(move |parts| {
            (parts.method == "POST").then(|| answer(202, &[("location", location)], ""))
        })
        .await;
        let to = registry.repository("a");
        let error = push(&client(&[&registry]), &to, b"x").await.unwrap_err();
        assert!(matches!(error, RegistryError::Location { .. }), "{error}");
        assert!(error.to_string().ends_with(expected), "{error}");
    }
    let registry =
        TestRegistry::with_hook(|parts| (parts.method == "POST").then(|| answer(202, &[], "")))
            .await;
    let to = registry.repository("a");
    let error = push(&client(&[&registry]), &to, b"x").await.unwrap_err();
    assert!(error.to_string().ends_with("status 202 without a Location"));
}

#[tokio::test]
async fn a_redirected_upload_is_sent_on_whole() {
    let storage = TestRegistry::start().await;
    let host = storage.name();
    // The session exists at the storage under the same name.
    let registry = TestRegistry::with_hook(move |parts| match parts.method.as_str() {
        "PATCH" | "PUT" => {
            let to = format!("http://{host}{}", parts.uri);
            Some(answer(307, &[("location", &to)], ""))
        }
        _ => None,
    })
    .await;
    let client = client(&[&registry, &storage]);
    let content = bytes(600_000);
    storage.open_session("u0");
    push(&client, &registry.repository("a"), &content)
        .await
        .unwrap();
    assert!(storage.blob("a", &Digest::of(&content)).unwrap() == content);
}

#[tokio::test]
async fn a_manifest_is_put_unless_it_is_there() {
    let registry = TestRegistry::start().await;
    let manifest = image("linux/amd64", &[b"x"], |_| {});
    let client = client(&[&registry]);
    let tag = registry.reference("a:1");
    assert!(client.push_manifest(&tag, &manifest).await.unwrap());
    assert!(!client.push_manifest(&tag, &manifest).await.unwrap());
    assert_eq!(methods(&registry), ["HEAD", "PUT", "HEAD"]);
    assert_eq!(client.fetch_manifest(&tag).await.unwrap(), manifest);
    let other = image("linux/amd64", &[b"y"], |_| {});
    assert!(client.push_manifest(&tag, &other).await.unwrap(), "moved");

    let by_digest = registry.reference(&format!("b@{}", manifest.digest));
    assert!(client.push_manifest(&by_digest, &manifest).await.unwrap());
    let error = client.push_manifest(&by_digest, &other).await.unwrap_err();
    assert!(matches!(error, RegistryError::Digest { .. }), "{error}");
    let both = registry.reference(&format!("c:tag@{}", manifest.digest));
    assert!(client.push_manifest(&both, &manifest).await.unwrap());
    assert!(
        registry
            .lines()
            .contains(&"PUT /v2/c/manifests/tag".to_owned())
    );
}

#[tokio::test]
async fn a_registry_that_stores_something_else_is_found_out() {
    let registry = TestRegistry::with_hook(|parts| {
        let other = Digest::of(b"other");
        let said = [("docker-content-digest", other.as_str())];
        (parts.method == "PUT").then(|| answer(201, &said, ""))
    })
    .await;
    let manifest = RawManifest::new(MediaType::MANIFEST, b"{}".to_vec());
    let client = client(&[&registry]);
    let error = client
        .push_manifest(&registry.reference("a:1"), &manifest)
        .await
        .unwrap_err();
    assert!(matches!(error, RegistryError::Digest { .. }), "{error}");
    let error = push(&client, &registry.repository("a"), b"x")
        .await
        .unwrap_err();
    assert!(matches!(error, RegistryError::Digest { .. }), "{error}");
}

#[tokio::test]
async fn permission_is_asked_without_leaving_anything() {
    let registry = TestRegistry::with_hook(|parts| {
        let body = r#"{"errors":[{"code":"DENIED","message":"read only"}]}"#;
        let denied = line(parts).starts_with("POST /v2/no/");
        denied.then(|| answer(403, &[], body))
    })
    .await;
    let client = client_with(&[&registry], Options::default());
    client
        .check_push(&registry.repository("yes"))
        .await
        .unwrap();
    assert_eq!(methods(&registry), ["POST", "DELETE"]);
    let error = client
        .check_push(&registry.repository("no"))
        .await
        .unwrap_err();
    assert!(error.is_denied());
    assert!(
        error.to_string().ends_with("403 DENIED: read only"),
        "{error}"
    );
}

/// A blob that is being written, and the repository `a` of a registry that tells of each PATCH.
struct Growing {
    registry: TestRegistry,
    patches: tokio::sync::mpsc::UnboundedReceiver<()>,
    store: Store,
    _dir: tempfile::TempDir,
}

impl Growing {
    async fn new(
        hook: impl Fn(&axum::http::request::Parts) -> Option<axum::response::Response>
        + Send
        + Sync
        + 'static,
    ) -> Self {
        let (sender, patches) = tokio::sync::mpsc::unbounded_channel();
        let registry = TestRegistry::with_hook(move |parts| {
            if parts.method == "PATCH" {
                sender.send(()).unwrap();
            }
            hook(parts)
        })
        .await;
        let dir = tempfile::tempdir().unwrap();
        Self {
            registry,
            patches,
            store: Store::open(dir.path()).unwrap(),
            _dir: dir,
        }
    }

    /// Starts the upload of what is written through the writer.
    fn push(
        &self,
        client: &Client,
    ) -> (
        BlobWriter<'_>,
        tokio::task::JoinHandle<Result<Option<PushedBlob>, RegistryError>>,
    ) {
        let mut writer = self.store.write_blob().unwrap();
        let growing = writer.follow().unwrap();
        let (client, to) = (client.clone(), self.registry.repository("a"));
        let push = async move { client.push_growing(&to, &growing, |_| {}).await };
        (writer, tokio::spawn(push))
    }

    /// The `Content-Range` of every PATCH.
    fn ranges(&self) -> Vec<Option<String>> {
        let seen = self.registry.seen().into_iter();
        seen.filter(|seen| seen.line.starts_with("PATCH"))
            .map(|seen| seen.headers.get("content-range").cloned())
            .collect()
    }
}

/// Writes all in one piece, so that all of it is there at once.
fn write(writer: &mut BlobWriter<'_>, content: &[u8]) {
    assert_eq!(writer.write(content).unwrap(), content.len());
}

#[tokio::test]
async fn a_blob_goes_up_while_it_is_written() {
    let mut test = Growing::new(|_| None).await;
    let content = bytes(3_000_000);
    let mut patches =
        std::mem::replace(&mut test.patches, tokio::sync::mpsc::unbounded_channel().1);
    let client = client(&[&test.registry]);
    let (mut writer, pushing) = test.push(&client);
    write(&mut writer, &content[..1_000_000]);
    // It has begun before all is written.
    patches.recv().await.unwrap();
    write(&mut writer, &content[1_000_000..]);
    let (digest, _) = writer.commit(None).unwrap();
    assert_eq!(pushing.await.unwrap().unwrap(), Some(PushedBlob::Uploaded));
    assert!(test.registry.blob("a", &digest).unwrap() == content);
    assert_eq!(methods(&test.registry), ["POST", "PATCH", "HEAD", "PUT"]);
    let seen = test.registry.seen();
    let patch = seen
        .iter()
        .find(|seen| seen.line.starts_with("PATCH"))
        .unwrap();
    assert_eq!(patch.headers.get("content-length"), None);

    // The same bytes once more are known to be there.
    let (mut writer, pushing) = test.push(&client);
    write(&mut writer, &content);
    writer.commit(None).unwrap();
    assert_eq!(
        pushing.await.unwrap().unwrap(),
        Some(PushedBlob::AlreadyThere)
    );
    let puts = methods(&test.registry)
        .iter()
        .filter(|m| *m == "PUT")
        .count();
    assert_eq!(puts, 1);
}

/// Each byte that arrived is sent once, whether the blob is complete by then or not.
#[tokio::test]
async fn a_broken_upload_of_a_growing_blob_goes_on_where_it_broke() {
    let mut test = Growing::new(|_| None).await;
    test.registry.cut_patches(&[1_000_000]);
    let content = bytes(13_000_000);
    let mut patches =
        std::mem::replace(&mut test.patches, tokio::sync::mpsc::unbounded_channel().1);
    let client = client(&[&test.registry]);
    let (mut writer, pushing) = test.push(&client);
    write(&mut writer, &content[..2_000_000]);
    patches.recv().await.unwrap();
    // Enough for a piece, and more only when that is on its way.
    write(&mut writer, &content[2_000_000..12_000_000]);
    patches.recv().await.unwrap();
    write(&mut writer, &content[12_000_000..]);
    let (digest, _) = writer.commit(None).unwrap();
    assert_eq!(pushing.await.unwrap().unwrap(), Some(PushedBlob::Uploaded));
    assert!(test.registry.blob("a", &digest).unwrap() == content);
    let range = |text: &str| Some(text.to_owned());
    assert_eq!(
        test.ranges(),
        [None, range("1000000-11999999"), range("12000000-12999999")]
    );
}

#[tokio::test]
async fn a_session_that_lost_its_place_is_replaced_while_the_blob_grows() {
    let confused = AtomicBool::new(false);
    let test = Growing::new(move |parts| {
        let resumed = parts.method == "PATCH" && parts.headers.contains_key("content-range");
        (resumed && !confused.swap(true, Ordering::SeqCst))
            .then(|| answer(416, &[("range", "0-999999")], ""))
    })
    .await;
    test.registry.cut_patches(&[1_000_000]);
    let content = bytes(3_000_000);
    let client = client(&[&test.registry]);
    let (mut writer, pushing) = test.push(&client);
    write(&mut writer, &content);
    let (digest, _) = writer.commit(None).unwrap();
    assert_eq!(pushing.await.unwrap().unwrap(), Some(PushedBlob::Uploaded));
    assert!(test.registry.blob("a", &digest).unwrap() == content);
    let methods = methods(&test.registry);
    let count = |method: &str| methods.iter().filter(|m| *m == method).count();
    assert_eq!((count("POST"), count("DELETE")), (2, 1), "{methods:?}");
}

#[tokio::test]
async fn a_registry_that_wants_the_length_first_gets_the_file() {
    for status in [405, 411] {
        let mut test = Growing::new(move |parts| {
            let is_open = !parts.headers.contains_key("content-length");
            (parts.method == "PATCH" && is_open).then(|| answer(status, &[], ""))
        })
        .await;
        let none = tokio::sync::mpsc::unbounded_channel().1;
        let mut patches = std::mem::replace(&mut test.patches, none);
        let content = bytes(1_000_000);
        let client = client(&[&test.registry]);
        let (mut writer, pushing) = test.push(&client);
        write(&mut writer, &content);
        patches.recv().await.unwrap();
        let (digest, size) = writer.commit(None).unwrap();
        assert_eq!(pushing.await.unwrap().unwrap(), None, "{status}");
        // Once the digest is known, it is asked beside the upload whether the blob is there.
        let mut methods = methods(&test.registry);
        methods.retain(|method| method != "HEAD");
        assert_eq!(methods, ["POST", "PATCH", "DELETE"]);
        let file = BlobContent::File(test.store.blob_path(&digest));
        let descriptor = Descriptor::new(MediaType::LAYER_GZIP, digest.clone(), size);
        let to = test.registry.repository("a");
        let pushed = client.push_blob(&to, &descriptor, None, file, |_| {});
        assert_eq!(pushed.await.unwrap(), PushedBlob::Uploaded);
        assert!(test.registry.blob("a", &digest).unwrap() == content);
    }
}

#[tokio::test]
async fn a_growing_blob_that_the_registry_has_is_not_committed() {
    let test = Growing::new(|_| None).await;
    let content = bytes(1_000_000);
    test.registry.put_blob("a", &content);
    let client = client(&[&test.registry]);
    let (mut writer, pushing) = test.push(&client);
    write(&mut writer, &content);
    writer.commit(None).unwrap();
    assert_eq!(
        pushing.await.unwrap().unwrap(),
        Some(PushedBlob::AlreadyThere)
    );
    let methods = methods(&test.registry);
    assert!(methods.contains(&"DELETE".to_owned()), "{methods:?}");
    assert!(!methods.contains(&"PUT".to_owned()), "{methods:?}");
}

/// Whether the writer gives up or the upload is dropped, the registry is told.
#[tokio::test]
async fn an_upload_that_nobody_wants_any_more_is_cancelled() {
    for is_dropped in [false, true] {
        let mut test = Growing::new(|_| None).await;
        let none = tokio::sync::mpsc::unbounded_channel().1;
        let mut patches = std::mem::replace(&mut test.patches, none);
        let client = client(&[&test.registry]);
        let (mut writer, pushing) = test.push(&client);
        write(&mut writer, &bytes(1_000_000));
        patches.recv().await.unwrap();
        if is_dropped {
            pushing.abort();
            assert!(pushing.await.unwrap_err().is_cancelled());
            client.cancel_dropped_uploads().await;
        } else {
            drop(writer);
            let error = pushing.await.unwrap().unwrap_err();
            assert_eq!(
                format!("{:#}", anyhow::Error::new(error)),
                "reading a layer that is being written for the upload: \
                 it was given up before it was complete"
            );
        }
        assert_eq!(
            methods(&test.registry),
            ["POST", "PATCH", "DELETE"],
            "{is_dropped}"
        );
        client.cancel_dropped_uploads().await;
        assert_eq!(methods(&test.registry).len(), 3, "once is enough");
    }
}
