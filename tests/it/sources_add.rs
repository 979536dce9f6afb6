//! Where COPY and ADD have their files from: servers, contexts that change between builds, images
//! that this program made itself.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixListener;
use std::sync::{Arc, Mutex};

use crate::support::oci::sha256;
use crate::support::registry::{Options, Registry};
use crate::support::sockless::Place;
use crate::support::{images, namespaces, programs};

/// Sat, 08 Feb 2014 10:11:12 GMT.
const MODIFIED: (&str, i64) = ("Sat, 08 Feb 2014 10:11:12 GMT", 1_391_854_272);

/// A server of a few files, each with an `ETag`.
struct Files {
    host: String,
    /// Method, path, status and `User-Agent` of what was asked so far.
    asked: Arc<Mutex<Vec<[String; 4]>>>,
}

impl Files {
    /// Serves until the tests end.
    fn serve(files: &[(&'static str, Vec<u8>)]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let host = listener.local_addr().expect("bound").to_string();
        let asked = Arc::new(Mutex::new(Vec::new()));
        let files: BTreeMap<&str, Vec<u8>> = files.iter().cloned().collect();
        let log = asked.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                // Who goes away early is no concern of the others.
                let _ = answer(&stream, &files, &log);
            }
        });
        Self { host, asked }
    }

    fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.host)
    }

    /// Methods, paths and statuses, oldest first.
    fn asked(&self) -> Vec<String> {
        let asked = self.asked.lock().expect("no panic while held");
        for [_, _, _, agent] in asked.iter() {
            assert!(agent.starts_with("sockless/"), "{agent:?}");
        }
        asked
            .iter()
            .map(|[method, path, status, _]| format!("{method} {path} {status}"))
            .collect()
    }
}

fn answer(
    mut stream: &TcpStream,
    files: &BTreeMap<&str, Vec<u8>>,
    log: &Mutex<Vec<[String; 4]>>,
) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream).lines();
    let first = lines.next().unwrap_or_else(|| Ok(String::new()))?;
    let (mut agent, mut known) = (String::new(), String::new());
    for line in lines {
        let line = line?;
        match line.split_once(": ") {
            Some((name, value)) if name.eq_ignore_ascii_case("user-agent") => agent = value.into(),
            Some((name, value)) if name.eq_ignore_ascii_case("if-none-match") => {
                known = value.into();
            }
            Some(_) => {}
            None => break,
        }
    }
    let mut words = first.split(' ');
    let method = words.next().unwrap_or_default().to_owned();
    let path = words.next().unwrap_or_default().to_owned();
    let (status, content) = match files.get(path.as_str()) {
        None => ("404 Not Found", &Vec::new()),
        Some(content) if known.contains(&sha256(content)) => ("304 Not Modified", content),
        Some(content) => ("200 OK", content),
    };
    let has_body = method != "HEAD" && status.starts_with('2');
    log.lock()
        .expect("no panic while held")
        .push([method, path, status[..3].to_owned(), agent]);
    let length = content.len();
    write!(
        stream,
        "HTTP/1.1 {status}\r\nETag: \"{}\"\r\nLast-Modified: {}\r\nContent-Length: {length}\r\n\
         Connection: close\r\n\r\n",
        sha256(content),
        MODIFIED.0
    )?;
    if !has_body {
        return Ok(());
    }
    stream.write_all(content)
}

/// The registry of base images, or the end of the test.
macro_rules! upstream {
    () => {
        match images::busybox() {
            Ok(registry) => registry,
            Err(reason) => skip!("{reason}"),
        }
    };
}

#[test]
fn compose_add_of_urls() {
    let upstream = upstream!();
    let archive = images::small_tar(&[("inside", "from the archive\n")]);
    let files = Files::serve(&[
        ("/file", b"file\n".to_vec()),
        ("/", b"no name\n".to_vec()),
        ("/a.tar", archive.clone()),
    ]);
    let (file, root, tar) = (files.url("/file"), files.url("/"), files.url("/a.tar"));
    let digest = sha256(b"file\n");
    let place = Place::new();
    let dockerfile = format!(
        "FROM scratch\n\
         ADD {file} /dest/\n\
         ADD {root} /dest/\n\
         ADD {tar} /packed/\n\
         ADD {tar} /renamed.tar\n\
         ADD --unpack=true {tar} /unpacked/\n\
         ADD --chmod=644 {file} /mode1\n\
         ADD --chmod=0413 {file} /mode2\n\
         ARG mode\n\
         ADD --chmod=${{mode}} {file} /mode3\n\
         ADD --chown=7:8 {file} {root} /owned/\n\
         ENV DIGEST={digest} LINK={file}\n\
         ADD --checksum=${{DIGEST}} ${{LINK}} /checked\n"
    );
    let context = place.context("context", &[("Dockerfile", &dockerfile)]);
    let args = ["--build-arg", "mode=400"];
    let image = place.built(&upstream, &context, &args);
    for (path, summary) in [
        ("dest/file", "600 0:0 0"),
        ("dest/__unnamed__", "600 0:0 0"),
        ("mode1", "644 0:0 0"),
        ("mode2", "413 0:0 0"),
        ("mode3", "400 0:0 0"),
        ("owned/file", "600 7:8 0"),
        ("owned/__unnamed__", "600 7:8 0"),
        ("checked", "600 0:0 0"),
        ("packed/inside", "absent"),
        ("unpacked/inside", "644 0:0 0"),
    ] {
        assert_eq!(image.summary(path), summary, "{path}");
    }
    for (path, content) in [
        ("dest/file", "file\n"),
        ("dest/__unnamed__", "no name\n"),
        ("mode3", "file\n"),
        ("checked", "file\n"),
        ("unpacked/inside", "from the archive\n"),
    ] {
        assert_eq!(image.text(path), content, "{path}");
    }
    for path in ["packed/a.tar", "renamed.tar"] {
        let entry = image.entry(path).expect("copied as it is");
        assert_eq!(entry.sha256, sha256(&archive)["sha256:".len()..], "{path}");
    }
    let entry = image.entry("dest/__unnamed__").expect("just read");
    assert_eq!(entry.mtime, MODIFIED.1);

    // What is known already is asked after, and not sent again.
    let before = files.asked().len();
    let again = place.built(&upstream, &context, &args);
    assert_eq!(again.digest, image.digest);
    let asked = files.asked().split_off(before);
    assert_ne!(asked, [] as [&str; 0]);
    assert!(asked.iter().all(|a| a.ends_with(" 304")), "{asked:?}");

    let other = sha256(b"");
    let wrong = format!("FROM scratch\nADD --checksum={other} {file} /f\n");
    let context = place.context("wrong", &[("Dockerfile", &wrong)]);
    place
        .build(&upstream, &context, &[])
        .failure()
        .says("Dockerfile:2:")
        .says("digest mismatch")
        .says(&other)
        .says(&digest);
    let missing = format!("FROM scratch\nADD {} /f\n", files.url("/missing"));
    let context = place.context("missing", &[("Dockerfile", &missing)]);
    place
        .build(&upstream, &context, &[])
        .failure()
        .says("Dockerfile:2:")
        .says("404");
}

#[test]
fn compose_a_socket_in_the_context_becomes_an_empty_file() {
    let upstream = upstream!();
    let place = Place::new();
    let context = place.context("context", &[("Dockerfile", "FROM scratch\nCOPY . /\n")]);
    let _socket = UnixListener::bind(context.join("socket.sock")).expect("a short path");
    let image = place.built(&upstream, &context, &[]);
    let entry = image.entry("socket.sock").expect("copied");
    assert!(entry.summary().ends_with(" 0:0 0"), "{}", entry.summary());
    assert_eq!(image.text("socket.sock"), "");
}

#[test]
fn sandbox_a_wildcard_is_cached_by_what_it_matches() {
    let upstream = upstream!();
    needs!(programs(&["bwrap"]), namespaces());
    let place = Place::new();
    let context = place.context(
        "context",
        &[
            (
                "Dockerfile",
                "FROM busybox AS base\n\
                 COPY foo* files/\n\
                 RUN cat /proc/sys/kernel/random/uuid > unique\n\
                 COPY bar files/\n\
                 FROM scratch\n\
                 COPY --from=base unique files /\n",
            ),
            ("foo1", "1"),
            ("foo2", "2"),
            ("bar", "bar"),
        ],
    );
    let built = |file: &str| {
        let image = place.built(&upstream, &context, &[]);
        (image.text("unique"), image.text(file))
    };
    let (first, _) = built("bar");
    place.dir.file("context/bar", "other");
    assert_eq!(built("bar"), (first.clone(), "other".to_owned()));
    place.dir.file("context/foo2", "changed");
    let (second, content) = built("foo2");
    assert_ne!(second, first);
    assert_eq!(content, "changed");
    // A name is part of what is matched, and so is what is no longer there.
    std::fs::rename(context.join("foo1"), context.join("foo3")).expect("ours");
    let (third, content) = built("foo3");
    assert_ne!(third, second);
    assert_eq!(content, "1");
}

#[test]
fn compose_a_directory_that_becomes_a_file_is_copied_as_what_it_is() {
    let upstream = upstream!();
    let place = Place::new();
    let dockerfile = ("Dockerfile", "FROM scratch\nCOPY foo /\n");
    let context = place.context("context", &[dockerfile, ("foo/bar", "below\n")]);
    let image = place.built(&upstream, &context, &[]);
    assert_eq!(image.text("bar"), "below\n");
    std::fs::remove_dir_all(context.join("foo")).expect("ours");
    place.dir.file("context/foo", "a file\n");
    let image = place.built(&upstream, &context, &[]);
    assert_eq!(image.text("foo"), "a file\n");
    assert_eq!(image.summary("bar"), "absent");
}

#[test]
fn sandbox_an_image_without_layers_is_a_base() {
    let upstream = upstream!();
    needs!(programs(&["bwrap"]), namespaces());
    let registry = Registry::start(Options::default());
    let place = Place::new();
    let empty = format!("{}/team/empty:1", registry.host);
    let context = place.context("empty", &[("Dockerfile", "FROM scratch\nLABEL foo=bar\n")]);
    let insecure = ["--insecure-registry", &registry.host];
    let push = [&insecure[..], &["--push", "-t", &empty]].concat();
    place.build(&upstream, &context, &push).success();

    let dockerfile = format!(
        "FROM busybox AS run\n\
         RUN --mount=from={empty},target=/empty,rw ls /empty > /list && echo 0 > /empty/f && cp /empty/f /\n\
         FROM {empty}\n\
         LABEL bar=baz\n\
         COPY foo .\n\
         COPY --from=run f list /\n"
    );
    let context = place.context("context", &[("Dockerfile", &dockerfile), ("foo", "foo\n")]);
    let image = place.built(&upstream, &context, &insecure);
    assert_eq!(image.layers.len(), 2);
    assert_eq!(image.config["rootfs"]["type"], "layers");
    assert_eq!(
        image.run_config()["Labels"],
        serde_json::json!({"foo": "bar", "bar": "baz"})
    );
    let texts = ["foo", "f", "list"].map(|path| image.text(path));
    assert_eq!(texts, ["foo\n", "0\n", ""]);
}

#[test]
fn compose_a_bases_version_of_windows_is_kept() {
    let upstream = upstream!();
    let registry = Registry::start(Options::default());
    let place = Place::new();
    let base = format!("{}/team/base:1", registry.host);
    let insecure = ["--insecure-registry", &registry.host];
    let context = place.context(
        "base",
        &[("Dockerfile", "FROM scratch\nCOPY Dockerfile /platform\n")],
    );
    let asked = "--platform=windows(10.0.20348.1006)/amd64";
    let push = [&insecure[..], &[asked, "--push", "-t", &base]].concat();
    place.build(&upstream, &context, &push).success();

    let dockerfile = format!("FROM {base}\nCOPY Dockerfile /other\n");
    let context = place.context("context", &[("Dockerfile", &dockerfile)]);
    let args = [&insecure[..], &["--platform=windows/amd64"]].concat();
    let image = place.built(&upstream, &context, &args);
    assert_eq!(image.config["os"], "windows");
    assert_eq!(image.config["os.version"], "10.0.20348.1006");
    assert_eq!(image.layers.len(), 2);
}

#[test]
fn sandbox_steps_are_named_after_their_stages() {
    let upstream = upstream!();
    needs!(programs(&["bwrap"]), namespaces());
    let place = Place::new();
    let context = place.context(
        "context",
        &[(
            "Dockerfile",
            "FROM busybox AS base\n\
             WORKDIR /out\n\
             RUN echo \"base\" > base\n\
             FROM scratch\n\
             COPY --from=base --chmod=0644 /out /out\n",
        )],
    );
    place
        .build(&upstream, &context, &[])
        .success()
        .says("[base 2/3] WORKDIR /out")
        .says("[base 3/3] RUN echo \"base\" > base")
        .says("[stage-1 1/1] COPY --from=base --chmod=0644 /out /out");
}
