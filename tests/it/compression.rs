//! How layers are compressed where they go, and when they go there.

use std::io::Write as _;
use std::path::Path;

use crate::support::images;
use crate::support::oci::Image;
use crate::support::process::run;
use crate::support::programs;
use crate::support::registry::{Options, Registry, Request, skopeo};
use crate::support::sockless::Place;

/// The registry of base images, or the end of the test.
macro_rules! upstream {
    () => {
        match images::busybox() {
            Ok(registry) => registry,
            Err(reason) => skip!("{reason}"),
        }
    };
}

/// What the manifest says of each layer after `application/vnd.oci.image.layer.v1.`.
fn types(image: &Image) -> Vec<String> {
    let layers = image.manifest["layers"].as_array().expect("a list");
    let kind = |layer: &serde_json::Value| {
        let name = layer["mediaType"].as_str().expect("a text");
        let kind = name.strip_prefix("application/vnd.oci.image.layer.v1.");
        kind.unwrap_or(name).to_owned()
    };
    layers.iter().map(kind).collect()
}

/// Where a layer's bytes say how they are compressed, they must say what the manifest says.
fn magic(layer: &Path) -> &'static str {
    let bytes = std::fs::read(layer).expect("a blob of the layout");
    match bytes.as_slice() {
        [0x1f, 0x8b, ..] => "tar+gzip",
        [0x28, 0xb5, 0x2f, 0xfd, ..] => "tar+zstd",
        _ => "tar",
    }
}

fn check(image: &Image, expected: &[&str]) {
    assert_eq!(types(image), expected);
    let found: Vec<&str> = image
        .layers
        .iter()
        .map(|layer| magic(&layer.file))
        .collect();
    assert_eq!(found, expected);
}

fn diff_ids(image: &Image) -> String {
    image.config["rootfs"]["diff_ids"].to_string()
}

/// Numbers that a multiplier has gone over: they do not compress well.
fn large(path: &Path, mebibytes: u64) {
    let mut file = std::io::BufWriter::new(std::fs::File::create(path).expect("ours"));
    let mut state = 1_u64;
    for _ in 0..mebibytes << 17 {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        file.write_all(&(state >> 20).to_le_bytes())
            .expect("room on the disk");
    }
    file.flush().expect("room on the disk");
}

#[test]
fn new_layers_are_compressed_as_wanted_and_with_force_all_are() {
    needs!(programs(&["skopeo"]));
    let upstream = upstream!();
    let place = Place::new();
    let context = place.context(
        "context",
        &[("Dockerfile", "FROM busybox\nCOPY a /\n"), ("a", "text")],
    );
    let first = place.built(&upstream, &context, &[]);
    check(&first, &["tar+gzip", "tar+gzip"]);
    // Another file, and one that the cache has: what exists stays as it is.
    std::fs::write(context.join("b"), "other").expect("ours");
    std::fs::write(
        context.join("Dockerfile"),
        "FROM busybox\nCOPY a /\nCOPY b /\n",
    )
    .expect("ours");
    let mixed = place.built(&upstream, &context, &["--compression", "zstd"]);
    check(&mixed, &["tar+gzip", "tar+gzip", "tar+zstd"]);
    assert_eq!(mixed.layers[1].digest, first.layers[1].digest);

    let forced = ["--compression=zstd", "--force-compression"];
    let zstd = place.built(&upstream, &context, &forced);
    check(&zstd, &["tar+zstd", "tar+zstd", "tar+zstd"]);
    assert_eq!(diff_ids(&zstd), diff_ids(&mixed));
    assert_eq!(zstd.layers[2].digest, mixed.layers[2].digest);
    // It is remembered what became of each: nothing is made again.
    let conversions = place.dir.join("store/cache/conversions");
    let written = || {
        let files = std::fs::read_dir(&conversions).expect("there are some");
        let time = |file: std::fs::DirEntry| file.metadata().unwrap().modified().unwrap();
        files.map(|file| time(file.unwrap())).max()
    };
    let before = written();
    let again = place.built(&upstream, &context, &forced);
    assert_eq!(again.digest, zstd.digest);
    assert_eq!(written(), before);

    let plain = place.built(
        &upstream,
        &context,
        &[
            "--compression",
            "uncompressed",
            "--force-compression=true",
            "--no-cache",
        ],
    );
    check(&plain, &["tar", "tar", "tar"]);
    assert_eq!(diff_ids(&plain), diff_ids(&zstd));
}

#[test]
fn each_output_of_a_build_has_its_own_compression() {
    needs!(programs(&["skopeo", "docker-registry"]));
    let upstream = upstream!();
    let registry = Registry::start(Options::default());
    let place = Place::new();
    let context = place.context(
        "context",
        &[
            ("Dockerfile", "FROM busybox\nCOPY a /\n"),
            ("a", &"text\n".repeat(10_000)),
        ],
    );
    let (one, two) = (place.dir.join("one.tar"), place.dir.join("two.tar"));
    let metadata = place.dir.join("metadata.json");
    let name = format!("{}/a:1", registry.host);
    place
        .build(
            &upstream,
            &context,
            &[
                "-o",
                &format!("type=oci,dest={},compression=uncompressed", one.display()),
                "-o",
                &format!(
                    "type=docker,dest={},compression=gzip,compression-level=1,force-compression=true",
                    two.display()
                ),
                "-o",
                &format!("type=registry,name={name},compression=zstd,force-compression=true"),
                "--insecure-registry",
                &registry.host,
                "--metadata-file",
                &metadata.display().to_string(),
            ],
        )
        .success();
    let one = place.archive(&one);
    check(&one, &["tar+gzip", "tar"]);
    let two = place.archive(&two);
    // The base's was gzip already.
    check(&two, &["tar+gzip", "tar+gzip"]);
    assert_eq!(two.layers[0].digest, one.layers[0].digest);
    let layout = place.dir.join("pulled");
    registry.pull("a:1", &layout);
    let pushed = Image::read(&layout);
    check(&pushed, &["tar+zstd", "tar+zstd"]);
    assert_eq!(diff_ids(&one), diff_ids(&two));
    assert_eq!(diff_ids(&one), diff_ids(&pushed));
    let metadata = std::fs::read_to_string(metadata).expect("it was written");
    assert!(metadata.contains(&pushed.digest), "{metadata}");
}

/// Others read what is a series of frames, at every kind of level: skopeo, which names each
/// file by what it came to have in it, and our own check.
#[test]
fn a_large_zstd_layer_is_read_by_others() {
    needs!(programs(&["skopeo"]));
    let upstream = upstream!();
    let place = Place::new();
    let context = place.context("context", &[("Dockerfile", "FROM scratch\nCOPY large /\n")]);
    large(&context.join("large"), 13);
    let mut ids = Vec::new();
    for level in ["1", "3", "12", "22"] {
        let zstd = [
            "--compression=zstd",
            "--compression-level",
            level,
            "--no-cache",
        ];
        let image = place.built(&upstream, &context, &zstd);
        check(&image, &["tar+zstd"]);
        assert_eq!(image.entry("large").expect("it was copied").size, 13 << 20);
        let unpacked = place.dir.join(format!("unpacked-{level}"));
        run(skopeo()
            .args(["copy", "--dest-decompress"])
            .arg(format!(
                "oci-archive:{}",
                place.dir.join("image.tar").display()
            ))
            .arg(format!("dir:{}", unpacked.display())))
        .success();
        let id = image.config["rootfs"]["diff_ids"][0].as_str();
        let id = id
            .and_then(|id| id.strip_prefix("sha256:"))
            .expect("a digest");
        let tar = unpacked.join(id).metadata().expect("a tar of this digest");
        assert!(tar.len() > 13 << 20);
        ids.push(diff_ids(&image));
    }
    ids.dedup();
    assert_eq!(ids.len(), 1);
}

#[test]
fn what_cannot_be_is_refused_before_anything_is_built() {
    let place = Place::new();
    let context = place.context("context", &[("Dockerfile", "FROM scratch\n")]);
    let archive = format!("type=oci,dest={}", place.dir.join("x.tar").display());
    for (args, message) in [
        (
            vec!["--compression-level", "13", "-o", &archive],
            "--compression: there is no gzip level 13; levels are 0 to 12",
        ),
        (
            vec![
                "--compression",
                "zstd",
                "--compression-level",
                "0",
                "-o",
                &archive,
            ],
            "--compression: there is no zstd level 0; levels are 1 to 22",
        ),
        (
            vec!["--compression", "estargz", "-o", &archive],
            "--compression: compression \"estargz\" is not supported: it is gzip with an index",
        ),
        (
            vec![
                "-o",
                "type=registry,name=localhost:1/a,compression=zstd",
                "-o",
                "type=registry,name=localhost:1/b,compression=gzip",
            ],
            "two outputs compress the image that is pushed differently",
        ),
    ] {
        let mut command = place.command();
        command.arg("build").args(&args).arg(&context);
        run(&mut command).failure().says(message);
        assert!(!place.dir.join("x.tar").exists());
    }
}

/// Requests about blobs that the registry answered, in order.
fn blob_requests(registry: &Registry) -> Vec<String> {
    let requests = registry.requests().into_iter();
    let about_blobs = requests.filter(|r| r.path.contains("/blobs/"));
    about_blobs
        .map(|Request { method, status, .. }| format!("{method} {status}"))
        .collect()
}

#[test]
fn a_large_layer_goes_up_while_it_is_made_and_a_small_one_is_asked_for_first() {
    needs!(programs(&["skopeo", "docker-registry"]));
    let upstream = upstream!();
    let registry = Registry::start(Options::default());
    let place = Place::new();
    let context = place.context("context", &[("Dockerfile", "FROM scratch\nCOPY large /\n")]);
    large(&context.join("large"), 96);
    let push = |name: &str| {
        let before = blob_requests(&registry).len();
        let name = format!("{}/{name}:1", registry.host);
        // The time is in the config, which is to be the same again.
        let flags = [
            "--insecure-registry",
            &registry.host,
            "--push",
            "-t",
            &name,
            "--no-cache",
            "--build-arg",
            "SOURCE_DATE_EPOCH=1",
        ];
        place.build(&upstream, &context, &flags).success();
        blob_requests(&registry).split_off(before)
    };
    let late = ["HEAD 404", "POST 202", "PATCH 202", "PUT 201"];
    // Permission is asked for; the layer goes up before anybody can know its digest, which is
    // asked for while the end is on its way; then comes the config.
    let requests = push("large");
    let (before, config) = requests.split_at(requests.len() - late.len());
    assert_eq!(config, late);
    assert_eq!(before[..3], ["POST 202", "DELETE 204", "POST 202"]);
    assert_eq!(before.last().map(String::as_str), Some("PUT 201"));
    let mut between = before[3..before.len() - 1].to_vec();
    between.sort();
    assert_eq!(between, ["HEAD 404", "PATCH 202"]);
    let layout = place.dir.join("pulled");
    registry.pull("large:1", &layout);
    let image = Image::read(&layout);
    assert_eq!(image.entry("large").expect("it was copied").size, 96 << 20);

    // Once more, and the registry has it: the bytes were on their way, and are not kept.
    let again = push("large");
    assert!(again.contains(&"HEAD 200".to_owned()), "{again:?}");
    assert!(
        !again.iter().any(|request| request.starts_with("PUT")),
        "{again:?}"
    );

    std::fs::write(context.join("large"), "small now").expect("ours");
    let asked = ["POST 202", "DELETE 204"];
    assert_eq!(push("small"), [&asked[..], &late, &late].concat());
}

/// A registry that refuses what is sent ends the build at once, not when a long step ends.
#[test]
fn sandbox_a_failed_upload_ends_the_build_while_steps_run() {
    needs!(crate::support::namespaces());
    let upstream = upstream!();
    let place = Place::new();
    let refusing = Refusing::start();
    let context = place.context(
        "context",
        &[(
            "Dockerfile",
            "FROM busybox\nRUN echo text > /made\nRUN sleep 600\n",
        )],
    );
    let name = format!("{}/a:1", refusing.host);
    // The step would take longer than any test may.
    place
        .build(
            &upstream,
            &context,
            &["--insecure-registry", &refusing.host, "--push", "-t", &name],
        )
        .failure()
        .says("507")
        .says("pushing layer");
}

/// Says yes when it is asked whether pushing is allowed, and no when bytes come.
struct Refusing {
    host: String,
}

impl Refusing {
    fn start() -> Self {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
        let host = listener.local_addr().expect("it is bound").to_string();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                std::thread::spawn(move || answer(stream));
            }
        });
        Self { host }
    }
}

/// Answers the requests of one connection.
fn answer(stream: std::net::TcpStream) {
    use std::io::{BufRead as _, BufReader};
    let mut reader = BufReader::new(stream.try_clone().expect("a socket"));
    let mut stream = stream;
    loop {
        let mut head = Vec::new();
        loop {
            let mut line = String::new();
            if reader.read_line(&mut line).unwrap_or(0) == 0 {
                return;
            }
            if line == "\r\n" {
                break;
            }
            head.push(line);
        }
        let method = head[0].split(' ').next().unwrap_or_default().to_owned();
        let reply = match method.as_str() {
            "GET" => "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
            "HEAD" => "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n",
            "POST" => {
                "HTTP/1.1 202 Accepted\r\nLocation: /v2/a/blobs/uploads/1\r\nContent-Length: 0\r\n\r\n"
            }
            "DELETE" => "HTTP/1.1 204 No Content\r\n\r\n",
            _ => {
                "HTTP/1.1 507 Insufficient Storage\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
            }
        };
        if stream.write_all(reply.as_bytes()).is_err() {
            return;
        }
        if matches!(method.as_str(), "PATCH" | "PUT") {
            // The kernel would take the answer back if this closed with bytes unread.
            let _ = stream.shutdown(std::net::Shutdown::Write);
            let _ = std::io::copy(&mut reader, &mut std::io::sink());
            return;
        }
    }
}
