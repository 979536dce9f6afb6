//! Contexts of every kind, and what is no context.

use std::io::Cursor;

use super::*;

/// An archive of files, each with its content; the Dockerfile's is `FROM scratch`.
fn tar(files: &[(&str, &str)]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (name, content) in files {
        let mut header = tar::Header::new_ustar();
        header.set_size(content.len() as u64);
        header.set_mode(0o640);
        header.set_uid(1000);
        header.set_gid(50);
        header.set_mtime(1_000_000_000);
        builder
            .append_data(&mut header, name, content.as_bytes())
            .unwrap();
    }
    builder.into_inner().unwrap()
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    io::Write::write_all(&mut encoder, bytes).unwrap();
    encoder.finish().unwrap()
}

fn bzip2(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = bzip2::write::BzEncoder::new(Vec::new(), bzip2::Compression::fast());
    io::Write::write_all(&mut encoder, bytes).unwrap();
    encoder.finish().unwrap()
}

fn xz(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = liblzma::write::XzEncoder::new(Vec::new(), 1);
    io::Write::write_all(&mut encoder, bytes).unwrap();
    encoder.finish().unwrap()
}

/// A directory for what is temporary, which must be empty in the end.
struct Fixture(tempfile::TempDir);

impl Fixture {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("tmp")).unwrap();
        Self(dir)
    }

    fn tmp(&self) -> PathBuf {
        self.0.path().join("tmp")
    }

    fn file(&self, name: &str, content: &[u8]) -> PathBuf {
        let path = self.0.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, content).unwrap();
        path
    }

    fn fetched(&self, content: &[u8], last_modified: Option<i64>) -> InputFile {
        InputFile {
            shown: "https://h/x".into(),
            path: self.file("fetched", content),
            last_modified,
        }
    }

    fn open(
        &self,
        input: &SourceInput,
        file: Option<&str>,
        stdin: &[u8],
    ) -> Result<OpenedContext, ContextError> {
        let file = file.map(|file| DockerfileLocation::parse(file).unwrap());
        let fetched = InputFile {
            shown: "https://h/Dockerfile".into(),
            path: self.file("fetched-dockerfile", b"FROM fetched"),
            last_modified: None,
        };
        let stdin = Cursor::new(stdin.to_vec());
        open(input, file.as_ref(), Some(&fetched), stdin, &self.tmp())
    }

    fn stdin(&self, file: Option<&str>, stdin: &[u8]) -> Result<OpenedContext, ContextError> {
        self.open(&SourceInput::StandardInput, file, stdin)
    }

    #[track_caller]
    fn check_clean(&self) {
        assert_eq!(fs::read_dir(self.tmp()).unwrap().count(), 0);
    }
}

/// The names of everything that steps may see.
fn names(opened: &OpenedContext) -> Vec<String> {
    let nodes = opened.context.walk(Path::new("")).skip(1);
    nodes
        .map(|node| node.unwrap().path.display().to_string())
        .collect()
}

fn text(opened: &OpenedContext) -> String {
    String::from_utf8(opened.dockerfile.text.clone()).unwrap()
}

fn message(error: ContextError) -> String {
    format!("{:#}", anyhow::Error::new(error))
}

#[test]
fn arguments_are_told_apart() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().to_str().unwrap();
    let source = |text: &str| ContextSource::parse(text);
    assert_eq!(source("-").unwrap(), ContextSource::StandardInput);
    assert_eq!(
        source(path).unwrap(),
        ContextSource::Directory(dir.path().into())
    );
    for git in [
        "https://h/x.git#v1",
        "git@h:x",
        "github.com/a/b",
        "ssh://h/x",
    ] {
        assert_eq!(source(git).unwrap(), ContextSource::Git(git.into()));
    }
    let url = Url::parse("https://u:hunter2@h/x.tar.gz").unwrap();
    let parsed = source(url.as_str()).unwrap();
    assert_eq!(parsed, ContextSource::Url(url));
    assert_eq!(format!("{parsed:?}"), "ContextSource(https://h/x.tar.gz)");
    assert_eq!(
        message(source("https://[").unwrap_err()),
        "invalid URL of the build context https://[: invalid IPv6 address"
    );
    assert_eq!(
        message(source("./absent").unwrap_err()),
        "unable to prepare context: \"./absent\" is neither a directory, a URL nor \"-\""
    );
    let file = |text: &str| DockerfileLocation::parse(text).unwrap();
    assert_eq!(file("-"), DockerfileLocation::StandardInput);
    assert_eq!(file("a/b"), DockerfileLocation::Path("a/b".into()));
    assert_eq!(
        format!("{:?}", file("https://u:hunter2@h/x")),
        "Url(https://h/x)"
    );
}

#[test]
fn a_directory_has_its_rules_whatever_its_dockerfile() {
    let fixture = Fixture::new();
    fixture.file("c/Dockerfile", b"FROM c");
    fixture.file("c/hidden", b"");
    fixture.file("c/.dockerignore", b"hidden\n");
    let own = fixture.file("elsewhere/D", b"FROM elsewhere");
    fixture.file("elsewhere/D.dockerignore", b"Dockerfile\n");
    let input = SourceInput::Directory(fixture.0.path().join("c"));
    for (file, expected, name) in [
        (None, "FROM c", "Dockerfile"),
        (Some("-"), "FROM stdin", "-"),
        (
            Some("https://h/Dockerfile"),
            "FROM fetched",
            "https://h/Dockerfile",
        ),
    ] {
        let opened = fixture.open(&input, file, b"FROM stdin").unwrap();
        assert_eq!(text(&opened), expected);
        assert_eq!(opened.dockerfile.name, name);
        assert_eq!(names(&opened), [".dockerignore", "Dockerfile"], "{file:?}");
    }
    let opened = fixture.open(&input, own.to_str(), b"").unwrap();
    assert_eq!(text(&opened), "FROM elsewhere");
    assert_eq!(names(&opened), [".dockerignore", "hidden"]);
    assert_eq!(opened.source_date, None);
}

#[test]
fn an_archive_on_standard_input_is_unpacked_with_its_owners() {
    let plain = tar(&[
        ("Dockerfile", "FROM tar"),
        ("sub/D", "FROM sub"),
        (".dockerignore", "sub\n"),
    ]);
    let compressed = [
        plain.clone(),
        gzip(&plain),
        bzip2(&plain),
        xz(&plain),
        zstd::encode_all(&plain[..], 1).unwrap(),
    ];
    let fixture = Fixture::new();
    for archive in compressed {
        let opened = fixture.stdin(None, &archive).unwrap();
        assert_eq!(text(&opened), "FROM tar");
        // As in BuildKit, where archives have no ignore rules.
        let all = [".dockerignore", "Dockerfile", "sub", "sub/D"];
        assert_eq!(names(&opened), all);
        assert_eq!(opened.source_date, Some(1_000_000_000));
        let lookup = |path: &str| opened.context.lookup(Path::new(path), false);
        let node = lookup("sub/D").unwrap().unwrap();
        assert_eq!(opened.context.owner(&node), (1000, 50));
        assert_eq!((node.mode, node.mtime.seconds), (0o640, 1_000_000_000));
        let implied = lookup("sub").unwrap().unwrap();
        assert_eq!(opened.context.owner(&implied), (0, 0));
        drop(opened);
        fixture.check_clean();
    }
    let file = |name: &str| {
        fixture
            .stdin(Some(name), &plain)
            .map(|opened| text(&opened))
    };
    assert_eq!(file("sub/D").unwrap(), "FROM sub");
    // Paths are those of the archive, however they begin.
    assert_eq!(file("/sub/../sub/D").unwrap(), "FROM sub");
    assert_eq!(file("https://h/D").unwrap(), "FROM fetched");
    assert_eq!(
        message(file("-").unwrap_err()),
        "standard input cannot be both the build context and the Dockerfile"
    );
    // Not where the archive was unpacked, which nobody asked for and is gone.
    assert_eq!(
        message(file("sub/absent").unwrap_err()),
        "no Dockerfile at sub/absent"
    );
    fixture.check_clean();
}

#[test]
fn a_dockerfile_on_standard_input_has_nothing_around_it() {
    let fixture = Fixture::new();
    let opened = fixture.stdin(None, b"FROM stdin").unwrap();
    assert_eq!(
        (text(&opened).as_str(), names(&opened).len()),
        ("FROM stdin", 0)
    );
    drop(opened);
    let long = format!("FROM a\n#{}", "x".repeat(5000));
    assert_eq!(text(&fixture.stdin(None, long.as_bytes()).unwrap()), long);
    assert_eq!(
        message(fixture.stdin(Some("D"), b"FROM stdin").unwrap_err()),
        "ambiguous Dockerfile: standard input is one, and --file names another; \
         as the build context, standard input must be a tar archive"
    );
    assert_eq!(
        message(fixture.stdin(None, b"").unwrap_err()),
        "standard input is empty: expected a tar archive or a Dockerfile"
    );
    fixture.check_clean();
}

#[test]
fn security_s01_hostile_archives_leave_nothing() {
    let fixture = Fixture::new();
    let canary = fixture.file("canary", b"alive");
    let name = "Dockerfile";
    let link = |name: &str, target: &Path| {
        let mut builder = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_ustar();
        header.set_entry_type(tar::EntryType::Symlink);
        header.set_size(0);
        builder.append_link(&mut header, name, target).unwrap();
        builder.into_inner().unwrap()
    };
    // A Dockerfile that is a link to outside is not read.
    for target in [canary.as_path(), Path::new("../../canary")] {
        let error = fixture.stdin(None, &link(name, target)).unwrap_err();
        assert!(
            matches!(error, ContextError::NoDockerfile { is_link: true, .. }),
            "{error:?}"
        );
    }
    let mut escaping = tar(&[("XX/canary", "dead")]);
    escaping[..2].copy_from_slice(b"..");
    let sum: u32 = (0..512)
        .map(|at| {
            u32::from(if (148..156).contains(&at) {
                b' '
            } else {
                escaping[at]
            })
        })
        .sum();
    escaping[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    assert_eq!(
        message(fixture.stdin(None, &escaping).unwrap_err()),
        "unpacking the build context from standard input: refusing entry \"../canary\" of the \
         archive: its path leads out of the archive"
    );
    let error = fixture.stdin(None, &gzip(b"no tar")).unwrap_err();
    assert!(matches!(error, ContextError::Unpack { .. }), "{error:?}");
    let error = fixture
        .stdin(None, &gzip(&tar(&[("a", "b")]))[..60])
        .unwrap_err();
    assert!(matches!(error, ContextError::Unpack { .. }), "{error:?}");
    assert_eq!(fs::read_to_string(canary).unwrap(), "alive");
    fixture.check_clean();
}

#[test]
fn what_was_fetched_is_an_archive_or_the_dockerfile() {
    let fixture = Fixture::new();
    let archive = gzip(&tar(&[("Dockerfile", "FROM tar"), ("D", "FROM d")]));
    let outside = fixture.file("outside/Dockerfile", b"FROM outside");
    for (last_modified, expected) in [(None, 1_000_000_000), (Some(7), 7)] {
        let input = SourceInput::Fetched(fixture.fetched(&archive, last_modified));
        let opened = fixture.open(&input, None, b"").unwrap();
        assert_eq!(text(&opened), "FROM tar");
        assert_eq!(opened.source_date, Some(expected));
        for (file, expected) in [
            ("D", "FROM d"),
            ("-", "FROM stdin"),
            ("https://h/D", "FROM fetched"),
            (outside.to_str().unwrap(), "FROM outside"),
        ] {
            let opened = fixture.open(&input, Some(file), b"FROM stdin").unwrap();
            assert_eq!(text(&opened), expected);
        }
    }

    let input = SourceInput::Fetched(fixture.fetched(b"FROM plain", Some(7)));
    for (file, expected) in [
        (None, "FROM plain"),
        // There is nothing else that it could be.
        (Some("D"), "FROM plain"),
        (Some("-"), "FROM stdin"),
        (outside.to_str(), "FROM outside"),
    ] {
        let opened = fixture.open(&input, file, b"FROM stdin").unwrap();
        assert_eq!(text(&opened), expected, "{file:?}");
        assert_eq!(names(&opened), ["context"]);
        let node = opened.context.lookup(Path::new("context"), false);
        let node = node.unwrap().unwrap();
        assert_eq!((node.mode, node.mtime.seconds), (0o600, 7));
        assert_eq!(opened.context.owner(&node), (0, 0));
        assert_eq!(opened.source_date, Some(7));
    }
    fixture.check_clean();
}

#[test]
fn a_checkout_has_no_ignore_rules_and_stays() {
    let fixture = Fixture::new();
    fixture.file("g/sub/dockerfile", b"FROM git");
    fixture.file("g/.dockerignore", b"*\n");
    let input = SourceInput::Checkout(fixture.0.path().join("g"));
    let opened = fixture.open(&input, Some("sub/Dockerfile"), b"").unwrap();
    assert_eq!(text(&opened), "FROM git");
    assert_eq!(names(&opened), [".dockerignore", "sub", "sub/dockerfile"]);
    let opened = fixture.open(&input, Some("-"), b"FROM stdin").unwrap();
    assert_eq!(text(&opened), "FROM stdin");
    drop(opened);
    assert!(fixture.0.path().join("g/sub/dockerfile").exists());
    let error = fixture.open(&input, None, b"").unwrap_err();
    assert!(
        matches!(error, ContextError::NoDockerfile { .. }),
        "{error:?}"
    );
}

#[test]
fn no_place_for_files_is_said() {
    let fixture = Fixture::new();
    fs::remove_dir(fixture.tmp()).unwrap();
    let error = message(fixture.stdin(None, &tar(&[("a", "b")])).unwrap_err());
    assert!(
        error.starts_with("making a temporary directory in "),
        "{error}"
    );
}
