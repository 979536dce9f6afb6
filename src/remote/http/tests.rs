//! Fetching from servers in this process, honest and faulty.

use std::io::Write as _;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::*;
use crate::registry::testing::{TestRegistry, answer, breaking, client};

/// 1994-11-06 08:49:37 UTC.
const DATE_TEXT: &str = "Sun, 06 Nov 1994 08:49:37 GMT";
const DATE_SECONDS: i64 = 784_111_777;

/// A server, a client of it, and a store.
struct Fixture {
    server: TestRegistry,
    client: Client,
    store: Arc<Store>,
    _dir: tempfile::TempDir,
}

impl Fixture {
    /// `hook` gets the number of the request, from 0.
    async fn new(
        hook: impl Fn(usize, &axum::http::request::Parts) -> axum::response::Response
        + Send
        + Sync
        + 'static,
    ) -> Self {
        let count = AtomicUsize::new(0);
        let server = TestRegistry::with_hook(move |parts| {
            Some(hook(count.fetch_add(1, Ordering::SeqCst), parts))
        })
        .await;
        let dir = tempfile::tempdir().unwrap();
        Self {
            client: client(&[&server]),
            store: Arc::new(Store::open(dir.path()).unwrap()),
            server,
            _dir: dir,
        }
    }

    fn url(&self, path: &str) -> Url {
        Url::parse(&format!("http://{}{path}", self.server.name())).unwrap()
    }

    async fn fetch(&self, path: &str, options: &FetchOptions) -> Result<Fetched, HttpError> {
        fetch(&self.client, &self.store, &self.url(path), options).await
    }

    async fn get(&self, path: &str) -> Fetched {
        self.fetch(path, &FetchOptions::default()).await.unwrap()
    }

    /// The message, with `S` for the server.
    async fn message(&self, path: &str, options: &FetchOptions) -> String {
        let error = self.fetch(path, options).await.unwrap_err();
        let text = format!("{:#}", anyhow::Error::new(error));
        text.replace(&self.server.name(), "S")
    }

    fn content(&self, fetched: &Fetched) -> Vec<u8> {
        let bytes = std::fs::read(self.store.blob_path(&fetched.digest)).unwrap();
        assert_eq!(bytes.len() as u64, fetched.size_bytes);
        bytes
    }

    /// Whether nothing was left: no blob, nothing unfinished. Waits for writers that were left alone.
    async fn is_clean(&self) -> bool {
        while Arc::strong_count(&self.store) > 1 {
            tokio::task::yield_now().await;
        }
        let is_empty = |path: PathBuf| std::fs::read_dir(path).unwrap().count() == 0;
        is_empty(self.store.root().join("blobs/sha256")) && is_empty(self.store.tmp().to_owned())
    }

    fn header(&self, request: usize, name: &str) -> Option<String> {
        self.server.seen()[request].headers.get(name).cloned()
    }
}

fn checksum(text: &str) -> FetchOptions {
    FetchOptions {
        checksum: Some(Checksum::parse(text).unwrap()),
        ..FetchOptions::default()
    }
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// Bytes that differ everywhere, so that a piece at a wrong place shows.
fn bytes(length: usize) -> Vec<u8> {
    (0..length as u32)
        .flat_map(u32::to_le_bytes)
        .take(length)
        .collect()
}

#[tokio::test]
async fn a_file_is_fetched_with_its_time() {
    let fixture = Fixture::new(|_, parts| match parts.uri.path() {
        "/dated" => answer(200, &[("last-modified", DATE_TEXT)], "dated"),
        "/odd" => answer(200, &[("last-modified", "yesterday")], "odd"),
        _ => answer(200, &[], ""),
    })
    .await;
    let dated = fixture.get("/dated?x=1#y").await;
    assert_eq!(fixture.content(&dated), b"dated");
    assert_eq!(dated.last_modified, Some(DATE_SECONDS));
    assert!(!dated.from_cache);
    let odd = fixture.get("/odd").await;
    assert_eq!((odd.last_modified, odd.mtime()), (None, 0));
    assert_eq!(fixture.get("/empty").await.size_bytes, 0);
    assert_eq!(fixture.server.lines()[0], "GET /dated?x=1");
    assert_eq!(fixture.header(0, "accept-encoding").unwrap(), "gzip");
    let agent = fixture.header(0, "user-agent").unwrap();
    assert!(agent.starts_with("sockless/"), "{agent}");
}

#[test]
fn the_url_alone_names_the_file() {
    for (url, expected) in [
        ("https://h/a/b.tar.gz?x=/y#/z", "b.tar.gz"),
        ("https://h/a/b/", "b"),
        ("https://h/", "__unnamed__"),
        ("https://h", "__unnamed__"),
        ("https://h//", "__unnamed__"),
        ("https://h/a%20b", "a b"),
        ("https://h/%20a%20", "a"),
        ("https://h/%20", "download"),
        ("https://h/a%2Fb", "b"),
        ("https://h/a%0Ab", "download"),
        ("https://h/a%00", "download"),
        ("https://h/%E8%B3%87", "資"),
    ] {
        assert_eq!(file_name(&Url::parse(url).unwrap()), expected, "{url}");
    }
    let latin = file_name(&Url::parse("https://h/%E8").unwrap());
    assert_eq!(latin.as_encoded_bytes(), [0xe8]);
}

#[tokio::test]
async fn an_unchanged_file_is_not_downloaded_again() {
    let fixture = Fixture::new(|_, parts| {
        let asked = parts
            .headers
            .get("if-none-match")
            .map(|v| v.to_str().unwrap());
        let tag = ("etag", "W/\"one\"");
        match (parts.uri.path(), asked) {
            // Says so, without the tag.
            ("/silent", Some(_)) => answer(304, &[], ""),
            ("/silent", None) => answer(200, &[tag], "silent"),
            ("/good", Some("W/\"one\"")) => answer(304, &[("etag", "\"one\"")], ""),
            ("/good", None) => answer(200, &[tag, ("last-modified", DATE_TEXT)], "good"),
            // Does not understand the question: the tag alone tells.
            ("/dull", _) => answer(200, &[tag], vec![b'x'; 1 << 20]),
            // Not modified since something else.
            ("/mad", Some(_)) => answer(304, &[("etag", "\"two\"")], ""),
            ("/mad", None) => answer(200, &[tag], "mad"),
            _ => answer(500, &[], ""),
        }
    })
    .await;
    for path in ["/silent", "/good", "/dull"] {
        let first = fixture.get(path).await;
        let second = fixture.get(path).await;
        assert!(!first.from_cache && second.from_cache, "{path}");
        assert_eq!(
            Fetched {
                from_cache: false,
                ..second
            },
            first
        );
    }
    assert_eq!(fixture.get("/good").await.last_modified, Some(DATE_SECONDS));
    fixture.server.forget_seen();
    fixture.get("/mad").await;
    let again = fixture.get("/mad").await;
    assert!(!again.from_cache);
    assert_eq!(fixture.server.lines(), ["GET /mad"; 3]);
}

#[tokio::test]
async fn a_changed_file_is_downloaded() {
    let fixture = Fixture::new(|request, _| {
        let tag = format!("\"{request}\"");
        answer(200, &[("etag", &tag)], request.to_string())
    })
    .await;
    assert_eq!(fixture.content(&fixture.get("/").await), b"0");
    let second = fixture.get("/").await;
    assert_eq!(fixture.content(&second), b"1");
    assert_eq!(fixture.header(1, "if-none-match").unwrap(), "\"0\"");
    // Another URL is another file.
    fixture.get("/other").await;
    assert_eq!(fixture.header(2, "if-none-match"), None);
}

#[tokio::test]
async fn a_date_tells_versions_apart_only_where_it_was_settled() {
    let later = "Sun, 06 Nov 1994 08:50:36 GMT";
    let settled = "Sun, 06 Nov 1994 08:50:37 GMT";
    for (said, expected) in [(later, None), (settled, Some(DATE_TEXT))] {
        let fixture = Fixture::new(move |_, parts| {
            if parts.headers.contains_key("if-modified-since") {
                answer(304, &[], "")
            } else {
                answer(200, &[("last-modified", DATE_TEXT), ("date", said)], "x")
            }
        })
        .await;
        fixture.get("/").await;
        let second = fixture.get("/").await;
        assert_eq!(fixture.header(1, "if-modified-since").as_deref(), expected);
        assert_eq!(second.from_cache, expected.is_some());
        assert_eq!(second.last_modified, Some(DATE_SECONDS));
    }
}

#[tokio::test]
async fn a_memory_that_fails_costs_a_download_and_no_build() {
    let fixture = Fixture::new(|_, parts| {
        if parts.headers.contains_key("if-none-match") {
            answer(304, &[], "")
        } else {
            answer(200, &[("etag", "\"a\"")], "content")
        }
    })
    .await;
    let first = fixture.get("/").await;
    let records = fixture.store.http_path();
    let record = std::fs::read_dir(&records)
        .unwrap()
        .next()
        .unwrap()
        .unwrap();
    // The blob is damaged, gone; the record is nonsense, and cannot be written.
    std::fs::write(fixture.store.blob_path(&first.digest), "CONTENT").unwrap();
    assert!(!fixture.get("/").await.from_cache);
    std::fs::remove_file(fixture.store.blob_path(&first.digest)).unwrap();
    assert!(!fixture.get("/").await.from_cache);
    std::fs::write(record.path(), "{").unwrap();
    assert!(!fixture.get("/").await.from_cache);
    assert!(fixture.get("/").await.from_cache);
    std::fs::remove_dir_all(&records).unwrap();
    std::fs::write(&records, "in the way").unwrap();
    let last = fixture.get("/").await;
    assert_eq!(fixture.content(&last), b"content");
}

#[tokio::test]
async fn a_checksum_is_checked_before_the_file_has_a_name() {
    let fixture = Fixture::new(|_, _| answer(200, &[("etag", "\"a\"")], "content")).await;
    let right = "sha256:ed7002b439e9ac845f22357d822bac1444730fbdb6016d3ec9432297b9ec9f73";
    let zeros = "0".repeat(64);
    let wrong = checksum(&format!("sha256:{zeros}"));
    assert_eq!(
        fixture.message("/f?token=hunter2", &wrong).await,
        format!("digest mismatch for http://S/f?…: got {right}, want sha256:{zeros}")
    );
    assert!(fixture.is_clean().await);
    assert!(
        !fixture
            .fetch("/f", &checksum(right))
            .await
            .unwrap()
            .from_cache
    );
    // Known by its checksum: nothing is sent.
    fixture.server.forget_seen();
    assert!(
        fixture
            .fetch("/f", &checksum(right))
            .await
            .unwrap()
            .from_cache
    );
    assert_eq!(fixture.server.lines(), [] as [&str; 0]);
    // What is known does not make a wrong checksum right.
    assert!(
        fixture
            .message("/f", &wrong)
            .await
            .starts_with("digest mismatch")
    );

    // printf content | sha512sum
    let long = "sha512:b2d1d285b5199c85f988d03649c37e44fd3dde01e5d69c50fef90651962f48110e9340b60d49a479c4c0b53f5f07d690686dd87d2481937a512e8b85ee7c617f";
    let zeros = format!("sha512:{}", "0".repeat(128));
    let fetched = fixture.fetch("/l", &checksum(long)).await;
    assert_eq!(fetched.unwrap().digest.as_str(), right);
    assert_eq!(
        fixture.message("/l", &checksum(&zeros)).await,
        format!("digest mismatch for http://S/l: got {long}, want {zeros}")
    );
}

#[test]
fn what_is_no_checksum_is_said() {
    for (text, reason) in [
        ("abc", "expected ALGORITHM:HEX, such as sha256:…"),
        (
            "md5:abc",
            "the algorithm is none of sha256, sha384 and sha512",
        ),
        (
            "sha256:abc",
            "the number of digits is not that of the algorithm",
        ),
        (
            &format!("sha384:{}", "G".repeat(96)),
            "expected digits 0-9 and a-f",
        ),
    ] {
        let error = Checksum::parse(text).unwrap_err();
        assert_eq!(
            error.to_string(),
            format!("invalid checksum {text:?}: {reason}")
        );
    }
}

#[tokio::test]
async fn a_cut_connection_is_resumed_where_the_server_allows_it() {
    let whole = bytes(100_000);
    let body = whole.clone();
    let fixture = Fixture::new(move |request, parts| {
        let tag = ("etag", "\"v\"");
        let from = |at: usize| {
            let range = format!("bytes {at}-99999/100000");
            answer(
                206,
                &[tag, ("content-range", &range)],
                breaking(body[at..at + 20_000].to_vec()),
            )
        };
        match (request, parts.headers.get("range")) {
            (0, None) => answer(200, &[tag], breaking(body[..30_000].to_vec())),
            (1, Some(_)) => from(30_000),
            // For a moment nothing goes: what is there is not lost.
            (2, Some(_)) => answer(503, &[], ""),
            (_, Some(range)) if range == "bytes=50000-" => {
                let range = "bytes 50000-99999/100000";
                answer(
                    206,
                    &[tag, ("content-range", range)],
                    body[50_000..].to_vec(),
                )
            }
            _ => answer(400, &[], ""),
        }
    })
    .await;
    assert_eq!(fixture.content(&fixture.get("/").await), whole);
    let ranges: Vec<_> = (0..4).map(|n| fixture.header(n, "range")).collect();
    let expected = [
        None,
        Some("bytes=30000-"),
        Some("bytes=50000-"),
        Some("bytes=50000-"),
    ];
    assert_eq!(ranges, expected.map(|range| range.map(str::to_owned)));
    assert_eq!(fixture.header(1, "if-range").unwrap(), "\"v\"");
}

#[tokio::test]
async fn what_cannot_be_resumed_is_begun_afresh() {
    for (name, tag) in [
        ("weak", Some("W/\"v\"")),
        ("none", None),
        ("strong", Some("\"v\"")),
    ] {
        let whole = bytes(50_000);
        let body = whole.clone();
        let fixture = Fixture::new(move |request, _| {
            let headers: Vec<_> = tag.iter().map(|tag| ("etag", *tag)).collect();
            match request {
                0 => answer(200, &headers, breaking(vec![b'x'; 10_000])),
                // A changed file comes whole, whatever was asked for.
                _ => answer(200, &headers, body.clone()),
            }
        })
        .await;
        assert_eq!(fixture.content(&fixture.get("/").await), whole, "{name}");
        let asked = fixture.header(1, "range");
        assert_eq!(asked.is_some(), name == "strong", "{name}");
    }
    // A range that the server does not have, and one that is another than asked for.
    for odd in [416, 206] {
        let fixture = Fixture::new(move |request, parts| match request {
            0 => answer(200, &[("etag", "\"v\"")], breaking(vec![b'x'; 1000])),
            1 => answer(odd, &[("content-range", "bytes 999-1001/1002")], "xyz"),
            _ if parts.headers.contains_key("range") => answer(400, &[], ""),
            _ => answer(200, &[], "fresh"),
        })
        .await;
        assert_eq!(fixture.content(&fixture.get("/").await), b"fresh", "{odd}");
    }
}

#[tokio::test]
async fn a_server_that_only_breaks_is_given_up() {
    let fixture = Fixture::new(|_, _| answer(200, &[], breaking(vec![b'x'; 1000]))).await;
    let message = fixture.message("/", &FetchOptions::default()).await;
    assert!(message.starts_with("GET http://S/: "), "{message}");
    assert_eq!(fixture.server.lines().len(), 5);
    assert!(fixture.is_clean().await);
}

#[tokio::test]
async fn a_compressed_transfer_is_the_file_inside() {
    let fixture = Fixture::new(|_, parts| {
        let encoded = ("content-encoding", "gzip");
        let mut cut = gzip(&bytes(1000));
        match parts.uri.path() {
            "/whole" => answer(200, &[encoded], gzip(b"inside")),
            "/two" => answer(200, &[encoded], [gzip(b"one "), gzip(b"two")].concat()),
            // A file that is an archive is not unpacked.
            "/file.gz" => answer(
                200,
                &[("content-type", "application/gzip")],
                gzip(b"inside"),
            ),
            "/cut" => {
                cut.truncate(cut.len() / 2);
                answer(200, &[encoded], cut)
            }
            _ => answer(200, &[encoded], "plain"),
        }
    })
    .await;
    for (path, expected) in [
        ("/whole", b"inside".to_vec()),
        ("/two", b"one two".to_vec()),
        ("/file.gz", gzip(b"inside")),
    ] {
        assert_eq!(
            fixture.content(&fixture.get(path).await),
            expected,
            "{path}"
        );
    }
    for path in ["/cut", "/plain"] {
        let message = fixture.message(path, &FetchOptions::default()).await;
        let expected =
            format!("GET http://S{path}: the answer is not the gzip stream that it says it is: ");
        assert!(message.starts_with(&expected), "{message}");
    }
}

#[tokio::test]
async fn a_limit_is_an_error_and_leaves_nothing() {
    let fixture = Fixture::new(|_, parts| match parts.uri.path() {
        "/bomb" => answer(
            200,
            &[("content-encoding", "gzip")],
            gzip(&vec![0; 1 << 20]),
        ),
        _ => answer(200, &[], vec![0; 11]),
    })
    .await;
    let limited = |limit| FetchOptions {
        limit_bytes: Some(limit),
        ..FetchOptions::default()
    };
    for (path, limit) in [("/", 10), ("/bomb", 4096)] {
        assert_eq!(
            fixture.message(path, &limited(limit)).await,
            format!("http://S{path} is larger than {limit} bytes")
        );
    }
    assert!(fixture.is_clean().await);
    assert_eq!(
        fixture.fetch("/", &limited(11)).await.unwrap().size_bytes,
        11
    );
}

#[tokio::test]
async fn a_store_that_cannot_be_written_is_said() {
    let fixture = Fixture::new(|_, _| answer(200, &[], "content")).await;
    std::fs::remove_dir(fixture.store.tmp()).unwrap();
    let message = fixture.message("/", &FetchOptions::default()).await;
    let expected = "storing http://S/ (7 bytes): creating a file in ";
    assert!(message.starts_with(expected), "{message}");
}

#[tokio::test]
async fn refusals_are_said_and_temporary_ones_tried_again() {
    let fixture = Fixture::new(|request, parts| match parts.uri.path() {
        "/soon" if request < 2 => answer(503, &[], ""),
        "/soon" => answer(200, &[], "now"),
        "/odd" => answer(304, &[], ""),
        "/part" => answer(206, &[], "part"),
        "/nowhere" => answer(302, &[], ""),
        _ => answer(404, &[], "not here"),
    })
    .await;
    assert_eq!(fixture.content(&fixture.get("/soon").await), b"now");
    fixture.server.forget_seen();
    for (path, expected) in [
        ("/none", "GET http://S/none: 404 Not Found"),
        ("/odd", "GET http://S/odd: 304 Not Modified"),
        ("/part", "GET http://S/part: 206 Partial Content"),
        ("/nowhere", "GET http://S/nowhere: 302 Found"),
    ] {
        let message = fixture.message(path, &FetchOptions::default()).await;
        assert_eq!(message, expected);
    }
    assert_eq!(fixture.server.lines().len(), 4);
    let url = Url::parse("ftp://u:hunter2@h/x").unwrap();
    let options = FetchOptions::default();
    let error = fetch(&fixture.client, &fixture.store, &url, &options).await;
    assert_eq!(
        error.unwrap_err().to_string(),
        "fetching ftp://h/x: expected a URL that begins with http:// or https://"
    );
    assert!(fixture.server.lines().len() == 4 && !fixture.store.http_path().join("x").exists());
}

#[tokio::test]
async fn redirects_are_followed_but_not_for_ever_nor_anywhere() {
    let fixture = Fixture::new(|_, parts| {
        let to = |location: &str| answer(302, &[("location", location)], "");
        match parts.uri.path() {
            "/a" => to("b?x=1"),
            "/b" => answer(308, &[("location", "/c")], ""),
            "/c" => answer(200, &[], "found"),
            "/loop" => to("/loop"),
            "/file" => to("file:///etc/passwd"),
            "/link-local" => to("http://169.254.169.254/latest?hunter2"),
            _ => to("http://["),
        }
    })
    .await;
    assert_eq!(fixture.content(&fixture.get("/a").await), b"found");
    assert_eq!(fixture.server.lines(), ["GET /a", "GET /b?x=1", "GET /c"]);
    fixture.server.forget_seen();
    for (path, expected) in [
        ("/loop", "http://S/loop: too many redirects"),
        ("/file", "file:///etc/passwd: that is not HTTP"),
        (
            "/link-local",
            "http://169.254.169.254/latest?…: \
             a server elsewhere must not name a loopback or link-local address",
        ),
        ("/odd", "something that is not a URL: that is not a URL"),
    ] {
        assert_eq!(
            fixture.message(path, &FetchOptions::default()).await,
            format!("GET http://S{path}: the server sends us to {expected}")
        );
    }
    // The first, ten redirects, and the three others.
    assert_eq!(fixture.server.lines().len(), 11 + 3);
}

#[tokio::test]
async fn security_s15_no_redirect_leads_from_https_to_plain_http() {
    let fixture = Fixture::new(|_, _| answer(200, &[], "")).await;
    // The fixture's own server was named as insecure; others were not.
    let download = Download {
        http: fixture.client.http(),
        store: &fixture.store,
        options: &FetchOptions::default(),
        origin: Url::parse("https://h/a").unwrap(),
        authorization: None,
        patience: fixture.client.http().patience(),
        furthest: 0,
        sink: None,
    };
    let follow = |from: &str, to: &str| {
        let followed = download.follow(&Url::parse(from).unwrap(), to, 1);
        followed
            .map(|url| url.to_string())
            .map_err(|e| e.to_string())
    };
    assert_eq!(
        follow("https://u:hunter2@h/a", "http://h/b"),
        Err(
            "GET https://h/a: the server sends us to http://h/b: plain HTTP is not allowed there"
                .into()
        )
    );
    assert_eq!(follow("https://h/a", "//cdn/b").unwrap(), "https://cdn/b");
    assert_eq!(
        follow("http://h/a", "https://cdn/b").unwrap(),
        "https://cdn/b"
    );
    assert_eq!(
        follow("http://h/a", "http://u:p@cdn/b#c").unwrap(),
        "http://cdn/b"
    );
}

#[tokio::test]
async fn security_s14_credentials_stay_with_their_host_and_out_of_messages() {
    let other = TestRegistry::with_hook(|_| Some(answer(403, &[], ""))).await;
    let elsewhere = format!("http://{}/x", other.name());
    let fixture = Fixture::new(move |_, parts| match parts.uri.path() {
        "/here" => answer(302, &[("location", "/there")], ""),
        "/away" => answer(302, &[("location", &elsewhere)], ""),
        _ => answer(200, &[], "x"),
    })
    .await;
    let mut url = fixture.url("/here");
    url.set_username("me").unwrap();
    url.set_password(Some("hunter%202")).unwrap();
    let options = FetchOptions::default();
    fetch(&fixture.client, &fixture.store, &url, &options)
        .await
        .unwrap();
    // printf 'me:hunter 2' | base64
    for request in [0, 1] {
        let sent = fixture.header(request, "authorization");
        assert_eq!(sent.as_deref(), Some("Basic bWU6aHVudGVyIDI="));
    }
    // A secret counts before the URL's own.
    let options = FetchOptions {
        authorization: Some(Secret::new("Bearer hunter3")),
        ..FetchOptions::default()
    };
    url.set_path("/away");
    let error = fetch(&fixture.client, &fixture.store, &url, &options).await;
    let message = format!("{:#}", anyhow::Error::new(error.unwrap_err()));
    assert!(message.contains("/x: 403 Forbidden"), "{message}");
    assert!(
        !message.contains("hunter") && !message.contains("me:"),
        "{message}"
    );
    assert_eq!(
        fixture.header(2, "authorization").unwrap(),
        "Bearer hunter3"
    );
    assert!(!other.seen()[0].headers.contains_key("authorization"));

    let bad = FetchOptions {
        authorization: Some(Secret::new("a\nb")),
        ..FetchOptions::default()
    };
    assert_eq!(
        fixture.message("/", &bad).await,
        "fetching http://S/: its credentials have characters that no header can have"
    );
}

#[tokio::test]
async fn a_fetch_that_is_dropped_leaves_nothing() {
    let fixture = Fixture::new(|_, _| {
        let first = futures_util::stream::iter([Ok::<_, io::Error>(vec![b'x'; 1000])]);
        let never = futures_util::stream::pending();
        let body = futures_util::StreamExt::chain(first, never);
        answer(200, &[], axum::body::Body::from_stream(body))
    })
    .await;
    let (client, store, url) = (
        fixture.client.clone(),
        fixture.store.clone(),
        fixture.url("/"),
    );
    let task =
        tokio::spawn(async move { fetch(&client, &store, &url, &FetchOptions::default()).await });
    while std::fs::read_dir(fixture.store.tmp()).unwrap().count() == 0 {
        tokio::task::yield_now().await;
    }
    task.abort();
    assert!(task.await.unwrap_err().is_cancelled());
    assert!(fixture.is_clean().await);
}

/// Server-side request forgery by a Dockerfile, and by a name that leads inside.
#[tokio::test]
async fn security_s15_nothing_is_asked_that_is_not_public() {
    let fixture = Fixture::new(|_, _| answer(200, &[], "secret")).await;
    let options = crate::registry::Options {
        reach: crate::registry::Reach::PublicOnly,
        ..Default::default()
    };
    let client = Client::new(options).unwrap();
    let port = fixture.url("/x").port().unwrap();
    for host in ["127.0.0.1", "[::ffff:127.0.0.1]", "localhost"] {
        let url = Url::parse(&format!("http://{host}:{port}/x")).unwrap();
        let error = fetch(&client, &fixture.store, &url, &FetchOptions::default()).await;
        let text = format!("{:#}", anyhow::Error::new(error.unwrap_err()));
        assert!(
            text.contains("its address is not a public one"),
            "{host}: {text}"
        );
    }
    assert_eq!(fixture.server.seen().len(), 0);
    assert!(fixture.is_clean().await);
}
