//! Pulling from an in-process registry, honest and faulty.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::io::AsyncReadExt;

use super::pull::from_io;
use super::testing::{TestRegistry, answer, breaking, client, client_with, image, line};
use super::{Client, Options, RegistryError};
use crate::image::{Descriptor, Index, MediaType, Platform, RawManifest, Repository};

async fn read(
    client: &Client,
    repository: &Repository,
    descriptor: &Descriptor,
) -> Result<Vec<u8>, RegistryError> {
    let mut bytes = Vec::new();
    let mut stream = client.open_blob(repository, descriptor).await?;
    stream.read_to_end(&mut bytes).await.map_err(from_io)?;
    Ok(bytes)
}

fn amd64() -> Platform {
    Platform::parse("linux/amd64").unwrap()
}

/// Bytes that differ everywhere, so that a piece at a wrong place shows.
fn bytes(length: usize) -> Vec<u8> {
    (0..length as u32)
        .flat_map(u32::to_le_bytes)
        .take(length)
        .collect()
}

#[tokio::test]
async fn an_image_is_resolved_with_its_config() {
    let registry = TestRegistry::start().await;
    let raw = registry.put_image("a/b", "1", "linux/amd64", &[b"one", b"two"]);
    let client = client(&[&registry]);
    let got = client
        .resolve(&registry.reference("a/b:1"), &amd64())
        .await
        .unwrap();
    assert_eq!(got.raw, raw);
    assert_eq!(got.index, None);
    assert_eq!(got.manifest.layers.len(), 2);
    assert_eq!(got.config.rootfs.diff_ids.len(), 2);
    assert_eq!(serde_json::to_vec(&got.config).unwrap(), got.config_bytes);
    let layer = read(
        &client,
        &registry.repository("a/b"),
        &got.manifest.layers[1],
    )
    .await;
    assert_eq!(layer.unwrap(), b"two");
}

#[tokio::test]
async fn an_index_gives_the_manifest_of_the_platform() {
    let registry = TestRegistry::start().await;
    let mut manifests = Vec::new();
    for platform in ["linux/arm64", "linux/amd64"] {
        let raw = registry.put_image("a", platform.split_once('/').unwrap().1, platform, &[b"x"]);
        let mut descriptor = raw.descriptor();
        descriptor.platform = Some(Platform::parse(platform).unwrap());
        manifests.push(descriptor);
    }
    let put_index = |tag: &str, manifests: Vec<Descriptor>| {
        let index = Index {
            schema_version: 2,
            media_type: None,
            manifests,
            annotations: std::collections::BTreeMap::new(),
        };
        let raw = RawManifest::new(MediaType::INDEX, serde_json::to_vec(&index).unwrap());
        registry.put_manifest("a", tag, &raw);
        raw
    };
    let index = put_index("all", manifests.clone());
    let client = client(&[&registry]);
    let got = client
        .resolve(&registry.reference("a:all"), &amd64())
        .await
        .unwrap();
    assert_eq!(got.index, Some(index));
    assert_eq!(got.raw.digest, manifests[1].digest);
    assert_eq!(got.config.platform, amd64());

    let s390x = Platform::parse("linux/s390x").unwrap();
    let error = client
        .resolve(&registry.reference("a:all"), &s390x)
        .await
        .unwrap_err();
    let cause = std::error::Error::source(&error).unwrap().to_string();
    assert_eq!(
        cause,
        "no image for linux/s390x: the index has linux/arm64, linux/amd64"
    );

    manifests[1].size += 1;
    put_index("lies", manifests);
    let error = client
        .resolve(&registry.reference("a:lies"), &amd64())
        .await
        .unwrap_err();
    assert!(matches!(error, RegistryError::Size { .. }), "{error}");
}

#[tokio::test]
async fn a_broken_download_is_resumed_where_it_broke() {
    let content = bytes(3_000_000);
    let digest_path = format!("/blobs/{}", crate::image::Digest::of(&content));
    for ranges in [true, false] {
        let (part, path) = (content[..1_000_000].to_vec(), digest_path.clone());
        let count = AtomicUsize::new(0);
        let whole = content.clone();
        let registry = TestRegistry::with_hook(move |parts| {
            if !parts.uri.path().ends_with(&path) {
                return None;
            }
            let length = whole.len().to_string();
            match count.fetch_add(1, Ordering::SeqCst) {
                0 => {
                    let headers = [("content-length", length.as_str())];
                    Some(answer(200, &headers, breaking(part.clone())))
                }
                // Without support for ranges all comes again.
                _ if !ranges => Some(answer(200, &[], whole.clone())),
                _ => None,
            }
        })
        .await;
        let descriptor = registry.put_blob("a", &content);
        let got = read(
            &client(&[&registry]),
            &registry.repository("a"),
            &descriptor,
        )
        .await;
        assert!(got.unwrap() == content, "ranges: {ranges}");
        let asked: Vec<_> = registry
            .seen()
            .into_iter()
            .filter(|seen| seen.line.contains("/blobs/"))
            .map(|seen| seen.headers.get("range").cloned())
            .collect();
        assert_eq!(asked.len(), 2);
        let start: usize = asked[1]
            .as_deref()
            .and_then(|range| range.strip_prefix("bytes=")?.strip_suffix('-'))
            .unwrap()
            .parse()
            .unwrap();
        // What was still on its way when the connection broke may be lost.
        assert!((1..=1_000_000).contains(&start), "{start}");
    }
}

#[tokio::test]
async fn a_download_that_always_breaks_ends() {
    let registry = TestRegistry::with_hook(|parts| {
        let length = [("content-length", "10")];
        let blob = parts.uri.path().contains("/blobs/");
        blob.then(|| answer(200, &length, breaking(b"abc".to_vec())))
    })
    .await;
    let descriptor = Descriptor::of(MediaType::LAYER_GZIP, b"abcdefghij");
    let error = read(
        &client(&[&registry]),
        &registry.repository("a"),
        &descriptor,
    )
    .await
    .unwrap_err();
    assert!(matches!(error, RegistryError::Connection { .. }), "{error}");
    let tries = registry
        .lines()
        .iter()
        .filter(|l| l.contains("/blobs/"))
        .count();
    assert_eq!(tries, 5, "one and four more");
}

/// What is wrong comes out as an error and never as bytes that look complete.
#[tokio::test]
async fn security_s17_wrong_short_and_long_blobs_are_errors() {
    let good = bytes(500_000);
    let mut flipped = good.clone();
    flipped[499_999] ^= 1;
    let long = [good.clone(), b"x".to_vec()].concat();
    let (descriptor, size) = (Descriptor::of(MediaType::LAYER_GZIP, &good), good.len());
    // With a length and, as a stream, without one.
    for sized in [true, false] {
        for (name, sent) in [
            ("flipped", flipped.clone()),
            ("long", long.clone()),
            ("short", good[..499_999].to_vec()),
        ] {
            let registry = TestRegistry::with_hook(move |parts| {
                if !parts.uri.path().contains("/blobs/") {
                    return None;
                }
                if parts.headers.contains_key("range") {
                    return Some(answer(416, &[], ""));
                }
                let body = if sized {
                    sent.clone().into()
                } else {
                    // What is too much comes on its own, after all that was wanted.
                    let (wanted, rest) = sent.split_at(sent.len().min(size));
                    let pieces = [wanted, rest]
                        .into_iter()
                        .filter(|piece| !piece.is_empty())
                        .map(|piece| Ok::<_, std::io::Error>(piece.to_vec()));
                    let pieces: Vec<_> = pieces.collect();
                    axum::body::Body::from_stream(futures_util::stream::iter(pieces))
                };
                Some(answer(200, &[], body))
            })
            .await;
            let client = client(&[&registry]);
            let repository = registry.repository("a");
            let mut got = Vec::new();
            let error = match client.open_blob(&repository, &descriptor).await {
                Err(error) => error,
                Ok(mut stream) => from_io(stream.read_to_end(&mut got).await.unwrap_err()),
            };
            match name {
                "flipped" => assert!(matches!(error, RegistryError::Digest { .. }), "{error}"),
                _ => assert!(matches!(error, RegistryError::Size { .. }), "{error}"),
            }
            assert!(got.len() < good.len(), "{name}: {} bytes came", got.len());
        }
    }
}

#[tokio::test]
async fn an_empty_blob_is_not_asked_for() {
    let registry = TestRegistry::start().await;
    let client = client(&[&registry]);
    let repository = registry.repository("a");
    let empty = Descriptor::of(MediaType::LAYER_TAR, b"");
    assert_eq!(read(&client, &repository, &empty).await.unwrap(), b"");
    let mut lie = Descriptor::of(MediaType::LAYER_TAR, b"x");
    lie.size = 0;
    let error = read(&client, &repository, &lie).await.unwrap_err();
    assert!(matches!(error, RegistryError::Digest { .. }), "{error}");
    assert_eq!(registry.lines(), [""; 0]);
}

#[tokio::test]
async fn a_registry_that_is_busy_is_asked_again_and_an_end_is_an_end() {
    let count = Arc::new(AtomicUsize::new(0));
    let counter = count.clone();
    let registry = TestRegistry::with_hook(move |parts| {
        if !parts.uri.path().contains("/manifests/") {
            return None;
        }
        match counter.fetch_add(1, Ordering::SeqCst) {
            0 => Some(answer(429, &[("retry-after", "0")], "")),
            1 => Some(answer(503, &[], "<html>")),
            _ => None,
        }
    })
    .await;
    let raw = registry.put_image("a", "1", "linux/amd64", &[]);
    let client = client(&[&registry]);
    let got = client.fetch_manifest(&registry.reference("a:1")).await;
    assert_eq!(got.unwrap(), raw);
    assert_eq!(count.load(Ordering::SeqCst), 3);

    let error = client
        .fetch_manifest(&registry.reference("a:2"))
        .await
        .unwrap_err();
    assert!(error.is_not_found() && !error.is_temporary());
    assert_eq!(
        error.to_string(),
        format!(
            "GET http://{}/v2/a/manifests/2: 404 MANIFEST_UNKNOWN: not here",
            registry.name()
        )
    );
    assert_eq!(count.load(Ordering::SeqCst), 4);
}

#[tokio::test]
async fn a_registry_that_wants_hours_is_not_waited_for() {
    let registry = TestRegistry::with_hook(|parts| {
        let manifest = parts.uri.path().contains("/manifests/");
        manifest.then(|| answer(429, &[("retry-after", "7200")], ""))
    })
    .await;
    let error = client(&[&registry])
        .fetch_manifest(&registry.reference("a"))
        .await
        .unwrap_err();
    assert_eq!(error.status(), Some(429));
    assert!(error.hint().unwrap().contains("--registry-mirror"));
    assert_eq!(
        registry
            .lines()
            .iter()
            .filter(|l| l.contains("man"))
            .count(),
        1
    );
}

/// CVE-2021-41190, S16 and S17: documents that are too large, two things at once, of a
/// type that they do not have, or not those that were asked for.
#[tokio::test]
async fn security_s16_hostile_manifests_are_errors() {
    let good = image("linux/amd64", &[], |_| {});
    let text = String::from_utf8(good.bytes.clone()).unwrap();
    let ambiguous = text.replacen('{', r#"{"manifests":[],"#, 1);
    let huge = text.replacen('{', &format!("{{\"x\":\"{}\",", "y".repeat(5 << 20)), 1);
    let other = text.replacen('{', r#"{"x":1,"#, 1);
    let oci = MediaType::MANIFEST.to_string();
    let index = MediaType::INDEX.to_string();
    let cases: [(&str, String, &str, String); 6] = [
        ("ambiguous", ambiguous, &oci, String::new()),
        ("huge", huge, &oci, String::new()),
        ("mistyped", text.clone(), &index, String::new()),
        ("untyped", text.clone(), "", String::new()),
        ("pinned", other.clone(), &oci, format!("@{}", good.digest)),
        ("belied", other, &oci, String::new()),
    ];
    for (name, body, media_type, suffix) in cases.clone() {
        let (said, media_type) = (good.digest.to_string(), media_type.to_owned());
        let registry = TestRegistry::with_hook(move |parts| {
            if !parts.uri.path().contains("/manifests/") {
                return None;
            }
            let mut headers = vec![("content-type", media_type.as_str())];
            if media_type.is_empty() {
                headers.clear();
            }
            if name == "belied" {
                headers.push(("docker-content-digest", &said));
            }
            Some(answer(200, &headers, body.clone()))
        })
        .await;
        let reference = registry.reference(&format!("a{suffix}"));
        let error = client(&[&registry])
            .resolve(&reference, &amd64())
            .await
            .unwrap_err();
        let fits = match name {
            "ambiguous" | "mistyped" => matches!(error, RegistryError::Manifest { .. }),
            "huge" => matches!(error, RegistryError::TooLarge { .. }),
            "untyped" => matches!(error, RegistryError::Reply { .. }),
            _ => matches!(error, RegistryError::Digest { .. }),
        };
        assert!(fits, "{name}: {error}");
    }
}

#[tokio::test]
async fn security_s17_a_config_must_fit_its_manifest() {
    let registry = TestRegistry::start().await;
    let good = registry.put_image("a", "1", "linux/amd64", &[b"x"]);
    let text = String::from_utf8(good.bytes).unwrap();
    let put = |tag: &str, text: String| {
        let raw = RawManifest::new(MediaType::MANIFEST, text.into_bytes());
        registry.put_manifest("a", tag, &raw);
    };
    let start = text.find("\"layers\":[").unwrap() + "\"layers\":[".len();
    let end = text[start..].find(']').unwrap() + start;
    put("fewer", format!("{}{}", &text[..start], &text[end..]));
    put(
        "artifact",
        text.replace(MediaType::CONFIG.as_str(), "application/vnd.cncf.helm"),
    );
    let size = |text: &str| {
        let start = text.find("\"size\":").unwrap() + 7;
        let end = text[start..].find(['}', ',']).unwrap() + start;
        format!("{}9000000{}", &text[..start], &text[end..])
    };
    put("huge", size(&text));
    let client = client(&[&registry]);
    for (tag, expected) in [
        ("fewer", "it lists 1 diff IDs, the manifest 0 layers"),
        ("artifact", "its type is \"application/vnd.cncf.helm\""),
        ("huge", "is larger than 4194304 bytes"),
    ] {
        let reference = registry.reference(&format!("a:{tag}"));
        let error = client.resolve(&reference, &amd64()).await.unwrap_err();
        assert!(error.to_string().contains(expected), "{tag}: {error}");
    }
}

/// Without an accept-all answer for mirrors, the registry still serves; and a mirror that
/// cannot be reached is waited for once only.
#[tokio::test]
async fn mirrors_are_asked_first_and_passed_over() {
    let registry = TestRegistry::start().await;
    let mirror = TestRegistry::start().await;
    let raw = registry.put_image("a", "1", "linux/amd64", &[b"layer"]);
    let cached = mirror.put_image("cache/a", "2", "linux/amd64", &[b"cached"]);
    let dead = {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.local_addr().unwrap()
    };
    let url = |text: String| url::Url::parse(&text).unwrap();
    let options = Options {
        mirrors: [(
            registry.name(),
            vec![
                url(format!("http://{dead}")),
                url(format!("http://{}/cache", mirror.name())),
            ],
        )]
        .into(),
        ..Options::default()
    };
    let client = client_with(&[&registry], options);
    let resolve = async |name: &str| {
        let reference = registry.reference(name);
        client.resolve(&reference, &amd64()).await.unwrap()
    };
    assert_eq!(resolve("a:1").await.raw, raw, "from the registry");
    assert!(
        mirror
            .lines()
            .contains(&"GET /v2/cache/a/manifests/1".to_owned())
    );
    assert_eq!(
        client.sources(&registry.repository("a")).len(),
        2,
        "the dead mirror is not asked again"
    );
    registry.forget_seen();
    let got = resolve("a:2").await;
    assert_eq!(got.raw, cached, "from the mirror");
    let layer = read(&client, &registry.repository("a"), &got.manifest.layers[0]).await;
    assert_eq!(layer.unwrap(), b"cached");
    assert_eq!(registry.lines(), [""; 0]);
}

#[tokio::test]
async fn security_s17_a_mirror_that_lies_is_an_error_and_one_that_breaks_is_not() {
    let content = bytes(2_000_000);
    let registry = TestRegistry::start().await;
    let descriptor = registry.put_blob("a", &content);
    let with_mirror = |mirror: &TestRegistry| {
        let url = url::Url::parse(&format!("http://{}", mirror.name())).unwrap();
        let options = Options {
            mirrors: [(registry.name(), vec![url])].into(),
            ..Options::default()
        };
        client_with(&[&registry], options)
    };
    let part = content[..1000].to_vec();
    let breaks = TestRegistry::with_hook(move |_| {
        let headers = [("content-length", "2000000")];
        Some(answer(200, &headers, breaking(part.clone())))
    })
    .await;
    let got = read(
        &with_mirror(&breaks),
        &registry.repository("a"),
        &descriptor,
    )
    .await;
    assert!(got.unwrap() == content);

    let mut wrong = content.clone();
    wrong[0] ^= 1;
    let lies = TestRegistry::with_hook(move |_| Some(answer(200, &[], wrong.clone()))).await;
    let error = read(&with_mirror(&lies), &registry.repository("a"), &descriptor)
        .await
        .unwrap_err();
    assert!(matches!(error, RegistryError::Digest { .. }), "{error}");
}

#[tokio::test]
async fn security_s14_redirects_end_and_lead_only_to_fit_places() {
    let registry = TestRegistry::with_hook(|parts| {
        let to = match line(parts).rsplit('/').next().unwrap() {
            "loop" => "/v2/a/manifests/loop",
            "metadata" => "http://169.254.169.254/latest/",
            "file" => "file:///etc/passwd",
            _ => return None,
        };
        Some(answer(307, &[("location", to)], ""))
    })
    .await;
    let client = client(&[&registry]);
    for (tag, expected) in [
        ("loop", "too many redirects"),
        (
            "metadata",
            "a server elsewhere must not name a loopback or link-local address",
        ),
        ("file", "that is not HTTP"),
    ] {
        let reference = registry.reference(&format!("a:{tag}"));
        let error = client.fetch_manifest(&reference).await.unwrap_err();
        assert!(matches!(error, RegistryError::Location { .. }), "{error}");
        assert!(error.to_string().ends_with(expected), "{error}");
    }
}

#[tokio::test]
async fn plain_http_is_spoken_only_where_it_is_allowed() {
    let registry = TestRegistry::start().await;
    registry.put_image("a", "latest", "linux/amd64", &[]);
    let strict = client(&[]);
    let error = strict
        .fetch_manifest(&registry.reference("a"))
        .await
        .unwrap_err();
    assert!(!error.is_temporary(), "{error}");
    assert_eq!(
        error.hint().unwrap(),
        format!(
            "{0} does not speak TLS; if it is yours, allow plain HTTP with --insecure-registry {0}",
            registry.name()
        )
    );
    assert_eq!(registry.lines(), [""; 0]);

    let client = client(&[&registry]);
    for _ in 0..2 {
        client
            .fetch_manifest(&registry.reference("a"))
            .await
            .unwrap();
    }
    assert_eq!(
        registry.lines(),
        [
            "GET /v2/",
            "GET /v2/a/manifests/latest",
            "GET /v2/a/manifests/latest"
        ],
        "asked once how it speaks"
    );
}
