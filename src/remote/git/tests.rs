//! Fetching from git's own server program behind a small HTTP server.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::Ordering;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use super::*;

/// Ends the test where git is not installed; fails it where every test must run.
macro_rules! needs_git {
    () => {
        if Command::new("git").arg("http-backend").output().is_err() {
            crate::rootfs::testing::skip("git is not installed");
            return;
        }
    };
}

/// A request as the server saw it; header names in lower case.
#[derive(Clone, Debug)]
struct Request {
    method: String,
    target: String,
    headers: BTreeMap<String, String>,
    body: Vec<u8>,
}

/// What a test answers instead of git; `None` leaves it to git.
type Answer = Box<dyn Fn(&Request) -> Option<String> + Send + Sync>;

/// Repositories below a directory, served until the end of the process.
struct Server {
    root: tempfile::TempDir,
    port: u16,
    seen: Arc<Mutex<Vec<Request>>>,
}

impl Server {
    fn start() -> Self {
        Self::with(|_| None)
    }

    fn with(answer: impl Fn(&Request) -> Option<String> + Send + Sync + 'static) -> Self {
        Self::new(answer, true)
    }

    /// One that knows nothing of protocol versions where `is_new` is not set.
    fn new(
        answer: impl Fn(&Request) -> Option<String> + Send + Sync + 'static,
        is_new: bool,
    ) -> Self {
        let root = tempfile::tempdir().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let seen = Arc::<Mutex<Vec<Request>>>::default();
        let answer: Arc<Answer> = Arc::new(Box::new(answer));
        let (path, log) = (root.path().to_owned(), seen.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (path, log, answer) = (path.clone(), log.clone(), answer.clone());
                // A client that goes away is part of some tests.
                std::thread::spawn(move || serve(stream.unwrap(), &path, &log, &answer, is_new));
            }
        });
        Self { root, port, seen }
    }

    fn url(&self, name: &str) -> String {
        format!("http://127.0.0.1:{}/{name}", self.port)
    }

    /// A new repository with a work tree, served as `name`.
    fn repository(&self, name: &str) -> Repository {
        let path = self.root.path().join(name);
        fs::create_dir_all(&path).unwrap();
        let repository = Repository { path };
        repository.git(&["init", "-q", "-b", "main"]);
        repository
    }

    fn targets(&self) -> Vec<String> {
        let seen = self.seen.lock().unwrap();
        seen.iter()
            .map(|r| format!("{} {}", r.method, r.target))
            .collect()
    }
}

fn serve(
    stream: TcpStream,
    root: &Path,
    log: &Mutex<Vec<Request>>,
    answer: &Answer,
    is_new: bool,
) -> Option<()> {
    let mut reader = BufReader::new(stream.try_clone().ok()?);
    let mut line = String::new();
    reader.read_line(&mut line).ok()?;
    let mut words = line.split(' ');
    let (method, target) = (words.next()?.to_owned(), words.next()?.to_owned());
    let mut headers = BTreeMap::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).ok()?;
        let Some((name, value)) = line.trim_end().split_once(": ") else {
            break;
        };
        headers.insert(name.to_lowercase(), value.to_owned());
    }
    let length = headers
        .get("content-length")
        .map_or(0, |l| l.parse().unwrap());
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    let request = Request {
        method,
        target,
        headers,
        body,
    };
    log.lock().unwrap().push(request.clone());
    let mut stream = stream;
    if let Some(answer) = answer(&request) {
        stream.write_all(answer.as_bytes()).ok()?;
        return Some(());
    }
    let (path, query) = request
        .target
        .split_once('?')
        .unwrap_or((&request.target, ""));
    let header = |name: &str| request.headers.get(name).map_or("", String::as_str);
    let mut child = Command::new("git")
        .arg("http-backend")
        .env("GIT_PROJECT_ROOT", root)
        .env("GIT_HTTP_EXPORT_ALL", "1")
        .env("REQUEST_METHOD", &request.method)
        .env("PATH_INFO", path)
        .env("QUERY_STRING", query)
        .env("CONTENT_TYPE", header("content-type"))
        .env("CONTENT_LENGTH", length.to_string())
        .env(
            "GIT_PROTOCOL",
            if is_new { header("git-protocol") } else { "" },
        )
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let sent = child.stdin.take().unwrap().write_all(&request.body);
    let output = child.wait_with_output().unwrap().stdout;
    sent.ok()?;
    let end = output.windows(4).position(|w| w == b"\r\n\r\n")?;
    let head = String::from_utf8_lossy(&output[..end]).into_owned();
    let status = head
        .lines()
        .find_map(|line| line.strip_prefix("Status: "))
        .unwrap_or("200 OK");
    let head: String = head
        .lines()
        .filter(|line| !line.starts_with("Status: "))
        .map(|line| format!("{line}\r\n"))
        .collect();
    let body = &output[end + 4..];
    write!(
        stream,
        "HTTP/1.1 {status}\r\n{head}Connection: close\r\nContent-Length: {}\r\n\r\n",
        body.len()
    )
    .ok()?;
    stream.write_all(body).ok()
}

/// A repository that a test fills.
struct Repository {
    path: PathBuf,
}

/// When all commits of tests are made, in seconds since 1970.
const TIME: i64 = 1_234_567_890;

fn git_in(dir: &Path, input: &[u8], arguments: &[&str]) -> String {
    let time = format!("{TIME} +0100");
    let mut child = Command::new("git")
        .args(["-c", "protocol.file.allow=always", "-c", "safe.directory=*"])
        .args(["-c", "user.name=n", "-c", "user.email=e@x"])
        .args(arguments)
        .current_dir(dir)
        .env("GIT_CONFIG_NOSYSTEM", "1")
        .env("GIT_CONFIG_GLOBAL", "/dev/null")
        .env("GIT_AUTHOR_DATE", &time)
        .env("GIT_COMMITTER_DATE", &time)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(input).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(
        output.status.success(),
        "git {arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

impl Repository {
    fn git(&self, arguments: &[&str]) -> String {
        git_in(&self.path, b"", arguments)
    }

    fn write(&self, name: &str, text: &str) {
        let path = self.path.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn commit(&self, message: &str) -> String {
        self.git(&["add", "-A"]);
        self.git(&["commit", "-q", "--allow-empty", "-m", message]);
        self.git(&["rev-parse", "HEAD"])
    }

    /// Writes an object as it is, whatever git thinks of it.
    fn object(&self, kind: &str, bytes: &[u8]) -> String {
        let arguments = ["hash-object", "-t", kind, "--literally", "-w", "--stdin"];
        git_in(&self.path, bytes, &arguments)
    }

    /// A tree of entries as they are, and a commit of it on the branch `name`.
    fn hostile(&self, name: &str, entries: &[(&str, &[u8], &str)]) {
        let tree = self.tree(entries);
        let commit = self.git(&["commit-tree", "-m", "x", &tree]);
        self.git(&["update-ref", &format!("refs/heads/{name}"), &commit]);
    }

    fn tree(&self, entries: &[(&str, &[u8], &str)]) -> String {
        let mut bytes = Vec::new();
        for (mode, name, id) in entries {
            bytes.extend_from_slice(mode.as_bytes());
            bytes.push(b' ');
            bytes.extend_from_slice(name);
            bytes.push(0);
            bytes.extend_from_slice(ObjectId::from_hex(id.as_bytes()).unwrap().as_slice());
        }
        self.object("tree", &bytes)
    }
}

fn options(scratch: &tempfile::TempDir) -> Options {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let client = reqwest::Client::builder()
        .redirect(reqwest::redirect::Policy::none())
        .no_proxy()
        .build()
        .unwrap();
    Options::new(client, scratch.path())
}

fn reference(text: &str) -> GitRef {
    parse(text).unwrap().expect("a git reference")
}

/// Fetches into a new directory of `work`; checks that nothing else is left there.
fn fetch_with(
    text: &str,
    change: impl FnOnce(&mut Options),
) -> (tempfile::TempDir, Result<Fetched, GitError>) {
    let work = tempfile::tempdir().unwrap();
    let scratch = tempfile::tempdir().unwrap();
    let mut options = options(&scratch);
    change(&mut options);
    let result = fetch(&reference(text), &options, &work.path().join("x"));
    assert_eq!(fs::read_dir(scratch.path()).unwrap().count(), 0);
    assert_eq!(work.path().join("x").exists(), result.is_ok());
    (work, result)
}

fn fetched(text: &str) -> (tempfile::TempDir, Fetched) {
    let (work, result) = fetch_with(text, |_| {});
    (
        work,
        result.unwrap_or_else(|error| panic!("{text}: {error:?}")),
    )
}

/// The error, with its causes.
fn refused(text: &str) -> String {
    refused_with(text, |_| {})
}

fn refused_with(text: &str, change: impl FnOnce(&mut Options)) -> String {
    let (_, result) = fetch_with(text, change);
    let error = result.expect_err(text);
    format!("{:#}", anyhow::Error::from(error))
}

/// Everything in a directory but `.git`: paths, kinds, modes, and contents or targets.
fn listing(dir: &Path) -> Vec<String> {
    let mut found = Vec::new();
    let mut left = vec![dir.to_owned()];
    while let Some(here) = left.pop() {
        for entry in fs::read_dir(&here).unwrap() {
            let path = entry.unwrap().path();
            if path.file_name().unwrap() == ".git" {
                continue;
            }
            let name = path.strip_prefix(dir).unwrap().display().to_string();
            let meta = fs::symlink_metadata(&path).unwrap();
            let mode = meta.permissions().mode() & 0o7777;
            if meta.is_symlink() {
                let target = fs::read_link(&path).unwrap();
                found.push(format!("{name} -> {}", target.display()));
            } else if meta.is_dir() {
                found.push(format!("{name}/ {mode:o}"));
                left.push(path);
            } else {
                let text = fs::read_to_string(&path).unwrap();
                found.push(format!("{name} {mode:o} {text:?}"));
            }
        }
    }
    found.sort();
    found
}

/// A repository with a history, one of each kind of entry, a branch and tags.
fn sample(server: &Server) -> (Repository, String, String) {
    let repository = server.repository("r.git");
    repository.write("old", "1");
    let first = repository.commit("first");
    repository.git(&["tag", "light"]);
    repository.git(&["tag", "-a", "noted", "-m", "note"]);
    repository.git(&["branch", "side/one"]);
    repository.git(&["rm", "-q", "old"]);
    repository.write("a", "2\n");
    repository.write("d/run", "#!/bin/sh\n");
    repository.write("d/e/deep", "3");
    let mode = fs::Permissions::from_mode(0o755);
    fs::set_permissions(repository.path.join("d/run"), mode).unwrap();
    symlink("/etc/passwd", repository.path.join("d/link")).unwrap();
    let second = repository.commit("second");
    (repository, first, second)
}

const SECOND: [&str; 6] = [
    "a 644 \"2\\n\"",
    "d/ 755",
    "d/e/ 755",
    "d/e/deep 644 \"3\"",
    "d/link -> /etc/passwd",
    "d/run 755 \"#!/bin/sh\\n\"",
];

#[test]
fn every_kind_of_reference() {
    needs_git!();
    let server = Server::start();
    let (repository, first, second) = sample(&server);
    let noted = repository.git(&["rev-parse", "noted"]);
    repository.git(&["update-ref", "refs/pull/1/head", &first]);
    let url = server.url("r.git/.git");
    let old = ["old 644 \"1\""];

    let check = |suffix: &str, object: &str, commit: &str, name: Option<&str>, files: &[&str]| {
        let (work, got) = fetched(&format!("{url}{suffix}"));
        let expected = Fetched {
            commit: commit.to_owned(),
            time: TIME,
            resolved: Commit {
                object: object.to_owned(),
                peeled: (object != commit && name.is_some()).then(|| commit.to_owned()),
                reference: name.map(str::to_owned),
            },
        };
        assert_eq!(got, expected, "{suffix}");
        assert_eq!(listing(&work.path().join("x")), files, "{suffix}");
        assert!(!work.path().join("x/.git").exists(), "{suffix}");
        let scratch = tempfile::tempdir().unwrap();
        let resolved = resolve(&reference(&format!("{url}{suffix}")), &options(&scratch));
        assert_eq!(resolved.unwrap(), expected.resolved, "{suffix}");
    };
    let main = Some("refs/heads/main");
    check("", &second, &second, main, &SECOND);
    check("#main", &second, &second, main, &SECOND);
    check("#heads/main", &second, &second, main, &SECOND);
    check("#refs/heads/main", &second, &second, main, &SECOND);
    check("?branch=main", &second, &second, main, &SECOND);
    let side = Some("refs/heads/side/one");
    check("#side/one", &first, &first, side, &old);
    check("#light", &first, &first, Some("refs/tags/light"), &old);
    check("#noted", &noted, &first, Some("refs/tags/noted"), &old);
    check("?tag=noted", &noted, &first, Some("refs/tags/noted"), &old);
    check(
        "#refs/pull/1/head",
        &first,
        &first,
        Some("refs/pull/1/head"),
        &old,
    );
    check(&format!("#{first}"), &first, &first, None, &old);
    check(&format!("#{noted}"), &noted, &first, None, &old);
    // A branch comes before a tag of the same name.
    repository.git(&["tag", "main", &first]);
    check("#main", &second, &second, main, &SECOND);
    check("?tag=main", &first, &first, Some("refs/tags/main"), &old);
    // A commit that no branch and no tag has any more.
    repository.write("lost", "x");
    let lost = repository.commit("lost");
    repository.git(&["reset", "-q", "--hard", "HEAD^"]);
    let files = [&SECOND[..], &["lost 644 \"x\""]].concat();
    check(&format!("#{lost}"), &lost, &lost, None, &files);
    // The name is only a name there.
    let by_commit = format!("?fetch-by-commit&checksum={first}#nowhere");
    check(&by_commit, &first, &first, Some("refs/heads/nowhere"), &old);
}

#[test]
fn no_more_is_transferred_than_the_commit() {
    needs_git!();
    let server = Server::start();
    let (_, first, _) = sample(&server);
    let url = server.url("r.git/.git");
    fetched(&format!("{url}#{first}"));
    assert_eq!(
        server.targets(),
        [
            "GET /r.git/.git/info/refs?service=git-upload-pack",
            "POST /r.git/.git/git-upload-pack"
        ]
    );
    let (work, _) = fetched(&format!("{url}?keep-git-dir#main"));
    let objects = git_in(
        &work.path().join("x"),
        b"",
        &["cat-file", "--batch-all-objects", "--batch-check"],
    );
    assert_eq!(objects.lines().filter(|l| l.contains("commit")).count(), 1);
}

#[test]
fn a_kept_git_directory_is_a_shallow_clone() {
    needs_git!();
    let server = Server::start();
    let (repository, first, second) = sample(&server);
    let noted = repository.git(&["rev-parse", "noted"]);
    let url = server.url("r.git/.git");
    let check = |suffix: &str, head: &str, shallow: &str, references: &[(&str, &str)]| {
        let (work, _) = fetched(&format!("{url}?keep-git-dir{suffix}"));
        let git = |arguments: &[&str]| git_in(&work.path().join("x"), b"", arguments);
        assert_eq!(git(&["status", "--porcelain"]), "", "{suffix}");
        git(&["fsck", "--strict"]);
        assert_eq!(git(&["rev-parse", "HEAD"]), head, "{suffix}");
        assert_eq!(git(&["log", "--format=%H"]), head, "{suffix}");
        assert_eq!(git(&["rev-parse", "--is-shallow-repository"]), shallow);
        assert_eq!(git(&["config", "remote.origin.url"]), url);
        let got = git(&["for-each-ref", "--format=%(refname) %(objectname)"]);
        let want: Vec<String> = references
            .iter()
            .map(|(n, id)| format!("{n} {id}"))
            .collect();
        assert_eq!(got.lines().collect::<Vec<_>>(), want, "{suffix}");
        // Nothing but the entries themselves may be needed to see that all is unchanged.
        let racy = git(&["diff-files", "--name-only"]);
        assert_eq!(racy, "", "{suffix}");
    };
    check("#main", &second, "true", &[("refs/heads/main", &second)]);
    check("", &second, "true", &[("refs/heads/main", &second)]);
    check(&format!("#{second}"), &second, "true", &[]);
    check("#noted", &first, "false", &[("refs/tags/noted", &noted)]);
    let light = [("refs/heads/light", &*first), ("refs/tags/light", &first)];
    check("#light", &first, "false", &light);
    check(
        "#refs/tags/light",
        &first,
        "false",
        &[("refs/tags/light", &first)],
    );
    // Of a part there is no repository.
    let (work, _) = fetched(&format!("{url}?keep-git-dir#main:d"));
    assert!(!work.path().join("x/.git").exists());
}

#[test]
fn security_s05_subdirectories() {
    needs_git!();
    let server = Server::start();
    let (repository, ..) = sample(&server);
    symlink("d", repository.path.join("alias")).unwrap();
    repository.write("d/.gitattributes", "deep eol=crlf\n");
    repository.write("d/e/deep", "3\n");
    repository.commit("third");
    let url = server.url("r.git/.git");
    let check = |subdir: &str, files: &[&str]| {
        let (work, _) = fetched(&format!("{url}#main:{subdir}"));
        assert_eq!(listing(&work.path().join("x")), files, "{subdir}");
    };
    let deep = ["deep 644 \"3\\r\\n\""];
    check("d/e", &deep);
    check("/d/./e/", &deep);
    check("../../d/x/../e", &deep);
    let wrong = |subdir: &str, expected: &str| {
        let error = refused(&format!("{url}#main:{subdir}"));
        assert!(error.contains(expected), "{subdir}: {error}");
    };
    wrong("none", "git subpath \"none\": there is no \"none\"");
    wrong(
        "d/none/x",
        "git subpath \"d/none/x\": there is no \"d/none\"",
    );
    wrong("a", "\"a\" is no directory");
    wrong(
        "alias/e",
        "\"alias\" is no directory; links are not followed there",
    );
    wrong("d/link", "\"d/link\" is no directory");
}

#[test]
fn files_are_as_git_checks_them_out() {
    needs_git!();
    let server = Server::start();
    let repository = server.repository("r");
    repository.write(
        ".gitattributes",
        "[attr]dos text eol=crlf\n*.bat dos\n*.txt text=auto\n*.id ident\n\
         *.u16 text working-tree-encoding=UTF-16LE eol=crlf\n\
         *.u16b text working-tree-encoding=UTF-16\n*.u32 working-tree-encoding=UTF-32BE\n\
         *.l1 working-tree-encoding=ISO-8859-1\n\
         *.lfs filter=lfs diff=lfs merge=lfs -text\n/top export-subst\n\"a b\" eol=crlf\n",
    );
    repository.write(
        "sub/.gitattributes",
        "*.bat -text\nsub.txt eol=crlf\n[attr]x eol=crlf\n",
    );
    let text = "one\ntwo $Id$\n\u{e9}\n";
    for name in [
        "x.bat",
        "x.txt",
        "x.id",
        "x.lfs",
        "top",
        "a b",
        "sub/x.bat",
        "sub/sub.txt",
        "sub/x.id",
    ] {
        repository.write(name, text);
    }
    // Added as they are in the repository, without a conversion the other way.
    repository.git(&["add", "-A"]);
    for name in ["x.u16", "x.u16b", "x.u32", "x.l1"] {
        let id = repository.object("blob", text.as_bytes());
        let entry = format!("100644,{id},{name}");
        repository.git(&["update-index", "--add", "--cacheinfo", &entry]);
    }
    repository.git(&["commit", "-q", "-m", "x"]);
    let other = server.root.path().join("other");
    let (from, to) = (repository.path.display(), other.display());
    repository.git(&["clone", "-q", &from.to_string(), &to.to_string()]);
    let (work, _) = fetched(&format!("{}?keep-git-dir", server.url("r/.git")));
    let x = work.path().join("x");
    let names = git_in(&other, b"", &["ls-files", "-z"]);
    let names: Vec<&str> = names.split_terminator('\0').collect();
    assert_eq!(names.len(), 15);
    for name in names {
        let (ours, gits) = (fs::read(x.join(name)), fs::read(other.join(name)));
        assert_eq!(ours.unwrap(), gits.unwrap(), "{name}");
    }
    assert_eq!(git_in(&x, b"", &["status", "--porcelain"]), "");
}

#[test]
fn times_are_those_of_writing_or_of_the_commit() {
    needs_git!();
    let server = Server::start();
    sample(&server);
    let url = server.url("r.git/.git");
    let (work, _) = fetched(&format!("{url}?mtime=commit&keep-git-dir"));
    for name in ["", "a", "d", "d/link", "d/e/deep", ".git", ".git/HEAD"] {
        let meta = fs::symlink_metadata(work.path().join("x").join(name)).unwrap();
        assert_eq!((meta.mtime(), meta.mtime_nsec()), (TIME, 0), "{name}");
    }
    let (work, _) = fetched(&url);
    for name in ["a", "d", "d/link"] {
        let meta = fs::symlink_metadata(work.path().join("x").join(name)).unwrap();
        assert!(meta.mtime() > TIME + 1_000_000, "{name}");
    }
}

#[test]
fn checksums() {
    needs_git!();
    let server = Server::start();
    let (repository, first, second) = sample(&server);
    let noted = repository.git(&["rev-parse", "noted"]);
    let url = server.url("r.git/.git");
    for (checksum, name) in [
        (&second[..], "main"),
        (&second[..7], "main"),
        (&noted[..], "noted"),
        (&first[..12], "noted"),
        (&first[..], &first[..]),
        (&first[..8], &first[..]),
    ] {
        fetched(&format!("{url}?checksum={checksum}#{name}"));
    }
    let wrong = |checksum: &str, name: &str, expected: &str| {
        let error = refused(&format!("{url}?checksum={checksum}#{name}"));
        assert!(error.contains(expected), "{checksum} {name}: {error}");
    };
    wrong(
        &first,
        "main",
        &format!("expected checksum to match {first}, got {second}"),
    );
    wrong(
        &second,
        "noted",
        &format!("expected checksum to match {second}, got {noted} or {first}"),
    );
    wrong(&second, &first, "expected checksum to match");
    wrong(
        "foobar",
        "main",
        "invalid checksum \"foobar\" for Git URL, expected hex commit hash",
    );
    let error = refused(&format!("{url}?fetch-by-commit&checksum=abc"));
    assert!(error.contains("invalid checksum \"abc\""), "{error}");
    assert!(error.contains("in full"), "{error}");
}

#[test]
fn what_is_not_there_is_named() {
    needs_git!();
    let server = Server::start();
    let (_, first, second) = sample(&server);
    server.repository("empty");
    let url = server.url("r.git/.git");
    let wrong = |suffix: &str, expected: &str| {
        let error = refused(&format!("{url}{suffix}"));
        assert!(error.contains(expected), "{suffix}: {error}");
    };
    wrong(
        "#mian",
        "r.git/.git does not contain ref \"mian\"; did you mean \"main\"?",
    );
    wrong("#one", "did you mean \"side/one\"?");
    wrong(
        "#zzzzzzzz",
        "it has 4 branches and tags, none with a name like that",
    );
    wrong("#HEAD", "for the default branch name no ref at all");
    let whole = format!("must be named by its whole hash: {second}");
    wrong(&format!("#{}", &second[..7]), &whole);
    wrong("#abcdef0", "servers do not look up shortened ones");
    let none = "0123456789".repeat(4);
    wrong(&format!("#{none}"), &format!("does not give commit {none}"));
    // One of sha256, where the server has none.
    wrong(&format!("#{}", "0".repeat(64)), "does not give commit");
    let tree = git_in(
        &server.root.path().join("r.git"),
        b"",
        &["rev-parse", "main:d"],
    );
    wrong(&format!("#{tree}"), "it is a tree, and no commit");
    assert_ne!(first, second);
    let error = refused(&server.url("empty/.git"));
    assert!(error.contains("could not find default branch"), "{error}");
    let error = refused(&server.url("none.git"));
    assert!(
        error.contains("the server answered 404: there is no such"),
        "{error}"
    );
}

#[test]
fn old_servers_are_understood() {
    needs_git!();
    let server = Server::new(|_| None, false);
    let (repository, first, second) = sample(&server);
    let noted = repository.git(&["rev-parse", "noted"]);
    let url = server.url("r.git/.git");
    let check = |suffix: &str, object: &str, commit: &str| {
        let (work, got) = fetched(&format!("{url}?keep-git-dir{suffix}"));
        assert_eq!(got.resolved.object, object, "{suffix}");
        assert_eq!(got.commit, commit, "{suffix}");
        let log = git_in(&work.path().join("x"), b"", &["log", "--format=%H"]);
        assert_eq!(log, commit, "{suffix}");
    };
    check("", &second, &second);
    check("#main", &second, &second);
    check("#noted", &noted, &first);
    check(&format!("#{second}"), &second, &second);
    assert_eq!(server.targets().len(), 8);
    let error = refused(&format!("{url}#mian"));
    assert!(error.contains("did you mean \"main\"?"), "{error}");
    // What no reference names is in the history of one, or it is not there.
    repository.write("a", "3");
    repository.commit("third");
    server.seen.lock().unwrap().clear();
    check(&format!("#{second}"), &second, &second);
    assert_eq!(server.targets().len(), 2);
    let none = "0123456789".repeat(4);
    let error = refused(&format!("{url}#{none}"));
    assert!(
        error.contains(&format!("does not give commit {none}")),
        "{error}"
    );
}

#[test]
fn submodules() {
    needs_git!();
    let server = Server::start();
    let inner = server.repository("inner");
    inner.write("i", "inner\n");
    inner.commit("inner");
    let middle = server.repository("middle");
    middle.write("m", "middle\n");
    let inner_path = server.root.path().join("inner");
    let add = |repository: &Repository, from: &Path, to: &str, url: &str| {
        repository.git(&["submodule", "--quiet", "add", from.to_str().unwrap(), to]);
        repository.git(&[
            "config",
            "-f",
            ".gitmodules",
            &format!("submodule.{to}.url"),
            url,
        ]);
    };
    add(&middle, &inner_path, "deps/inner", "../../inner/.git");
    middle.commit("middle");
    let outer = server.repository("outer");
    outer.write("o", "outer\n");
    add(
        &outer,
        &server.root.path().join("middle"),
        "sub/middle",
        &server.url("middle/.git"),
    );
    outer.commit("outer");
    let url = server.url("outer/.git");

    let modules = fs::read_to_string(outer.path.join(".gitmodules")).unwrap();
    let below = |prefix: &str| {
        let inner = fs::read_to_string(middle.path.join(".gitmodules")).unwrap();
        [
            format!("{prefix}.gitmodules 644 {inner:?}"),
            format!("{prefix}deps/ 755"),
            format!("{prefix}deps/inner/ 755"),
            format!("{prefix}deps/inner/i 644 \"inner\\n\""),
            format!("{prefix}m 644 \"middle\\n\""),
        ]
    };
    let mut all = vec![
        format!(".gitmodules 644 {modules:?}"),
        "o 644 \"outer\\n\"".to_owned(),
        "sub/ 755".to_owned(),
        "sub/middle/ 755".to_owned(),
    ];
    let without = all.clone();
    all.extend(below("sub/middle/"));
    let (work, _) = fetched(&url);
    let x = work.path().join("x");
    assert_eq!(listing(&x), all);
    assert!(!x.join("sub/middle/.git").exists());

    let (work, _) = fetched(&format!("{url}?submodules=false"));
    assert_eq!(listing(&work.path().join("x")), without);

    let (work, _) = fetched(&format!("{url}?keep-git-dir"));
    let x = work.path().join("x");
    assert_eq!(listing(&x), all);
    let git = |dir: &str, arguments: &[&str]| git_in(&x.join(dir), b"", arguments);
    let head = |r: &Repository| r.git(&["rev-parse", "HEAD"]);
    assert_eq!(git("", &["status", "--porcelain"]), "");
    for (dir, repository) in [
        ("", &outer),
        ("sub/middle", &middle),
        ("sub/middle/deps/inner", &inner),
    ] {
        assert_eq!(git(dir, &["log", "--format=%H"]), head(repository), "{dir}");
        assert_eq!(git(dir, &["status", "--porcelain"]), "", "{dir}");
    }
    let status = git("", &["submodule", "status", "--recursive"]);
    let lines: Vec<&str> = status.lines().map(str::trim).collect();
    assert_eq!(lines.len(), 2, "{status}");
    assert!(lines[0].starts_with(&head(&middle)), "{status}");
    assert!(lines[1].starts_with(&head(&inner)), "{status}");

    // Of a subdirectory only the submodules in it, or the one that it is in.
    let (work, _) = fetched(&format!("{url}#main:sub/middle/deps"));
    assert_eq!(
        listing(&work.path().join("x")),
        ["inner/ 755", "inner/i 644 \"inner\\n\""]
    );
    let (work, _) = fetched(&format!("{url}#main:sub"));
    let mut expected = vec!["middle/ 755".to_owned()];
    expected.extend(below("middle/"));
    assert_eq!(listing(&work.path().join("x")), expected);
    let error = refused(&format!("{url}?submodules=0#main:sub/middle"));
    assert!(error.contains("submodules are not wanted"), "{error}");
}

#[test]
fn security_s05_submodules_come_only_from_other_machines() {
    needs_git!();
    let server = Server::start();
    let repository = server.repository("r");
    repository.write("secret", "x");
    let commit = repository.commit("x");
    let check = |branch: &str, modules: &str, path: &str, expected: &str| {
        let text = repository.object("blob", modules.as_bytes());
        let entries: [(&str, &[u8], &str); 2] = [
            ("100644", b".gitmodules", &text),
            ("160000", path.as_bytes(), &commit),
        ];
        repository.hostile(branch, &entries);
        let error = refused(&format!("{}?keep-git-dir#{branch}", server.url("r/.git")));
        assert!(error.contains(expected), "{branch}: {error}");
    };
    let module = |name: &str, url: &str| format!("[submodule \"{name}\"]\npath = m\nurl = {url}\n");
    let local = server.root.path().join("r").display().to_string();
    check(
        "file",
        &module("m", &format!("file://{local}")),
        "m",
        "files of this machine are no remote",
    );
    check("path", &module("m", &local), "m", "a path on this machine");
    check(
        "ext",
        &module("m", "\"ext::sh -c id\""),
        "m",
        "a remote helper",
    );
    check("dash", &module("m", "-uid"), "m", "a path on this machine");
    check(
        "ssh",
        &module("m", "ssh://-oProxyCommand=id/x"),
        "m",
        "no host",
    );
    check(
        "up",
        &module("m", "../../../../../../x"),
        "m",
        "submodule \"m\"",
    );
    check(
        "name",
        &module("../../hooks", "../x"),
        "m",
        "a submodule cannot have the name \"../../hooks\"",
    );
    check(
        "within",
        &format!(
            "{}[submodule \"m/objects\"]\npath = n\nurl = u\n",
            module("m", "../.git")
        ),
        "m",
        "its name is within that of another submodule",
    );
    check("none", "", "m", ".gitmodules has no url for it");
    check(
        "ssh2",
        &module("m", "git@example.com:x.git"),
        "m",
        "needs an ssh agent: give --ssh default",
    );
    // One that is in itself, as far as its names go: the commit of another that has it again.
    let own = repository.object("blob", module("m", &server.url("r/.git")).as_bytes());
    let mut inside = commit.clone();
    for _ in 0..=MODULE_DEPTH {
        let tree = repository.tree(&[("100644", b".gitmodules", &own), ("160000", b"m", &inside)]);
        inside = repository.git(&["commit-tree", "-m", "x", &tree]);
    }
    repository.git(&["update-ref", "refs/heads/deep", &inside]);
    let error = refused(&format!("{}#deep", server.url("r/.git")));
    assert!(
        error.contains("submodules in submodules, is over the limit"),
        "{error}"
    );
}

#[test]
fn security_s05_hostile_trees_write_nothing_elsewhere() {
    needs_git!();
    let server = Server::start();
    let repository = server.repository("r");
    repository.commit("x");
    let text = repository.object("blob", b"hostile");
    let up = repository.object("blob", b"..");
    let tree = repository.tree(&[("100644", b"canary", &text)]);
    let url = server.url("r/.git");
    let check = |branch: &str, entries: &[(&str, &[u8], &str)], expected: &str| {
        repository.hostile(branch, entries);
        let (work, result) = fetch_with(&format!("{url}?keep-git-dir#{branch}"), |_| {});
        let error = format!("{:#}", anyhow::Error::from(result.expect_err(branch)));
        assert!(error.contains(expected), "{branch}: {error}");
        assert_eq!(fs::read_dir(work.path()).unwrap().count(), 0, "{branch}");
    };
    let no_name = "that is no name of a file";
    let own = "git's own directory";
    check("dots", &[("40000", b"..", &tree)], no_name);
    check("dot", &[("40000", b".", &tree)], no_name);
    check("slash", &[("100644", b"../canary", &text)], no_name);
    check("slash2", &[("100644", b"a/b", &text)], no_name);
    check("absolute", &[("100644", b"/tmp/canary", &text)], no_name);
    check("git", &[("40000", b".git", &tree)], own);
    check("git2", &[("40000", b".GiT", &tree)], own);
    check("git3", &[("120000", b".git", &up)], own);
    // A link, and then something through it.
    check(
        "link",
        &[("120000", b"a", &up), ("40000", b"a", &tree)],
        "two entries of that name",
    );
    check(
        "link2",
        &[("120000", b"canary", &up), ("100644", b"canary", &text)],
        "two entries of that name",
    );
    let zero = repository.object("blob", b"a\0b");
    check("zero", &[("120000", b"a", &zero)], "a zero byte");
    let long = vec![b'n'; 300];
    check("long", &[("100644", &long, &text)], "writing");
    // A directory in a directory in a directory …
    let mut deep = tree.clone();
    for _ in 0..300 {
        deep = repository.tree(&[("40000", b"d", &deep)]);
    }
    check(
        "deep",
        &[("40000", b"d", &deep)],
        "the depth of directories",
    );
    // Few objects, and a million files.
    let mut many = tree.clone();
    for _ in 0..20 {
        many = repository.tree(&[("40000", b"a", &many), ("40000", b"b", &many)]);
    }
    repository.hostile("bomb", &[("40000", b"d", &many)]);
    let error = refused_with(&format!("{url}#bomb"), |o| o.limits.files = 1000);
    assert!(error.contains("over the limit of 1000"), "{error}");
    // A commit of something that is no tree.
    let bad =
        format!("tree {text}\nauthor n <e> {TIME} +0000\ncommitter n <e> {TIME} +0000\n\nx\n");
    let bad = repository.object("commit", bad.as_bytes());
    repository.git(&["update-ref", "refs/heads/bad", &bad]);
    let error = refused(&format!("{url}#bad"));
    assert!(error.contains("r/.git"), "{error}");
}

#[test]
fn limits() {
    needs_git!();
    let server = Server::start();
    let repository = server.repository("r");
    let noise: String = (0..40_000u32)
        .map(|n| char::from(33 + (n.wrapping_mul(2_654_435_761) >> 24) as u8 % 90))
        .collect();
    repository.write("noise", &noise);
    repository.write("zeros", &"0".repeat(3_000_000));
    repository.commit("x");
    let url = server.url("r/.git");
    fetched(&url);
    let check = |change: &dyn Fn(&mut Limits), expected: &str| {
        let error = refused_with(&url, |options| change(&mut options.limits));
        assert!(error.contains(expected), "{expected}: {error}");
    };
    check(
        &|l| l.pack_bytes = 2000,
        "the pack is over the limit of 2000 bytes",
    );
    check(
        &|l| l.objects = 3,
        "the number of objects (4) is over the limit of 3",
    );
    check(&|l| l.object_bytes = 2_000_000, "the pack: ");
    check(&|l| l.files = 1, "the number of files and directories");
    check(&|l| l.checkout_bytes = 100, "the size of all files");
    check(&|l| l.time = Duration::ZERO, "not done after 0ns");
}

#[test]
fn it_can_be_cancelled() {
    needs_git!();
    // A server that greets and then says nothing more.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let options = {
        let scratch = tempfile::tempdir().unwrap();
        options(&scratch)
    };
    let cancelled = options.cancelled.clone();
    let server = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut line = String::new();
        BufReader::new(stream.try_clone().unwrap())
            .read_line(&mut line)
            .unwrap();
        let head = "HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\
                    Content-Type: application/x-git-upload-pack-advertisement\r\n\r\n001e# serv";
        stream.write_all(head.as_bytes()).unwrap();
        cancelled.store(true, Ordering::Relaxed);
        // Until the client is gone.
        let _ = stream.read_to_end(&mut Vec::new());
    });
    let text = format!("http://127.0.0.1:{port}/r.git");
    let error = resolve(&reference(&text), &options).unwrap_err();
    assert!(matches!(error, GitError::Cancelled), "{error:?}");
    server.join().unwrap();
    let error = resolve(&reference(&text), &options).unwrap_err();
    assert!(matches!(error, GitError::Cancelled), "{error:?}");
}

/// Secrets with these names and values.
fn secrets(pairs: &[(&str, &str)]) -> Arc<Secrets> {
    let specs = pairs
        .iter()
        .map(|(id, _)| format!("id={id},env={id}").parse().unwrap());
    let value = |name: &str| {
        let pair = pairs.iter().find(|(id, _)| *id == name);
        pair.map(|(_, value)| value.into())
    };
    Arc::new(Secrets::new(specs, value).unwrap())
}

#[test]
fn security_s05_secrets_are_shown_to_their_repository_alone() {
    needs_git!();
    let wanted = format!("basic {}", STANDARD.encode("x-access-token:hunter2"));
    let server = Server::with({
        let wanted = wanted.clone();
        move |request| {
            let given = request.headers.get("authorization");
            let open = request.target.starts_with("/open");
            (!open && given != Some(&wanted)).then(|| {
                "HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
                    .to_owned()
            })
        }
    });
    let repository = server.repository("closed");
    repository.write("a", "1");
    repository.commit("x");
    let url = server.url("closed/.git");
    let host = format!("127.0.0.1:{}", server.port);

    let error = refused(&url);
    assert!(error.contains("401"), "{error}");
    assert!(error.contains(&format!("GIT_AUTH_TOKEN.{host}")), "{error}");
    assert!(!error.contains("one was sent"), "{error}");
    let with = |text: &str, pairs: &[(&str, &str)]| {
        fetch_with(text, |options| options.secrets = secrets(pairs)).1
    };
    let error = with(&url, &[("GIT_AUTH_TOKEN", "wrong")])
        .unwrap_err()
        .to_string();
    assert!(error.contains("one was sent"), "{error}");
    assert!(!error.contains("wrong"), "{error}");
    let error = with(&url, &[("GIT_AUTH_HEADER", "a\nb")])
        .unwrap_err()
        .to_string();
    assert!(
        error
            .contains("secret \"GIT_AUTH_HEADER\" cannot authorise a request: it has a line break"),
        "{error}"
    );
    with(&url, &[("GIT_AUTH_TOKEN", "hunter2\n")]).unwrap();
    with(
        &url,
        &[("GIT_AUTH_HEADER", &wanted), ("GIT_AUTH_TOKEN", "wrong")],
    )
    .unwrap();
    let own = format!("GIT_AUTH_TOKEN.{host}");
    with(&url, &[(&own, "hunter2"), ("GIT_AUTH_HEADER", "wrong")]).unwrap();
    let user = url.replace("http://", "http://x-access-token:hunter2@");
    let error = refused(&user.replace("hunter2", "hunter3"));
    assert!(
        error.contains("one was sent") && !error.contains("hunter3"),
        "{error}"
    );
    // The server of this test compares letters; the client writes Basic.
    server.seen.lock().unwrap().clear();
    let _ = with(&user, &[]);
    let seen = server.seen.lock().unwrap()[0].headers["authorization"].clone();
    assert!(seen.eq_ignore_ascii_case(&wanted), "{seen}");

    // A submodule elsewhere on the same host sees nothing.
    let open = server.repository("open");
    open.write("o", "1");
    let commit = open.commit("x");
    let text = format!(
        "[submodule \"m\"]\npath = m\nurl = {}\n",
        server.url("open/.git")
    );
    let text = repository.object("blob", text.as_bytes());
    repository.hostile(
        "module",
        &[("100644", b".gitmodules", &text), ("160000", b"m", &commit)],
    );
    server.seen.lock().unwrap().clear();
    with(&format!("{url}#module"), &[("GIT_AUTH_TOKEN", "hunter2")]).unwrap();
    for request in server.seen.lock().unwrap().iter() {
        let shown = request.headers.contains_key("authorization");
        assert_eq!(shown, request.target.starts_with("/closed"), "{request:?}");
    }
}

#[test]
fn redirects() {
    needs_git!();
    let target = Server::start();
    let repository = target.repository("r");
    repository.write("a", "1");
    repository.commit("x");
    let to = target.url("");
    let server = Server::with(move |request| {
        let location = match request.target.split('/').nth(1)? {
            "good.git" => format!("{to}r/.git/info/refs?service=git-upload-pack"),
            "page.git" => format!("{to}login"),
            "file.git" => "file:///etc/info/refs?service=git-upload-pack".to_owned(),
            "loop.git" => "/loop.git/info/refs?service=git-upload-pack".to_owned(),
            "user.git" => {
                let to = to.replace("http://", "http://evil:pw@");
                format!("{to}r/.git/info/refs?service=git-upload-pack")
            }
            _ => return None,
        };
        Some(format!(
            "HTTP/1.1 302 Found\r\nLocation: {location}\r\nContent-Length: 0\r\n\
             Connection: close\r\n\r\n"
        ))
    });
    let secrets = |options: &mut Options| {
        options.secrets = secrets(&[("GIT_AUTH_HEADER", "hunter2")]);
    };
    for name in ["good.git", "user.git"] {
        fetch_with(&server.url(name), secrets).1.unwrap();
    }
    // What was for one server is not shown to the other, nor what that one says to show.
    assert_eq!(target.targets().len(), 6);
    for request in target.seen.lock().unwrap().iter() {
        assert!(
            !request.headers.contains_key("authorization"),
            "{request:?}"
        );
    }
    assert!(
        server.seen.lock().unwrap()[0]
            .headers
            .contains_key("authorization")
    );
    let check = |name: &str, expected: &str| {
        let error = refused(&server.url(name));
        assert!(error.contains(expected), "{name}: {error}");
    };
    check(
        "page.git",
        "it leads to something that is no git repository",
    );
    check("file.git", "its scheme is not https");
    check("loop.git", "too many redirects");
}

#[test]
fn answers_that_are_not_gits() {
    needs_git!();
    let answer = |kind: &str, body: &str| {
        format!(
            "HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nContent-Length: {}\r\n\
             Connection: close\r\n\r\n{body}",
            body.len()
        )
    };
    let kind = "application/x-git-upload-pack-advertisement";
    let server = Server::with(move |request| {
        Some(match request.target.split('/').nth(1)? {
            "html.git" => answer("text/html", "<html>"),
            "dumb.git" => answer("text/plain", "0123 refs/heads/main\n"),
            "text.git" => answer(kind, "hello, world"),
            "short.git" => answer(kind, "001e# service=git-upl"),
            "error.git" => answer(kind, "0014ERR not for you\n"),
            "hash.git" => answer(
                kind,
                "000eversion 2\n000efetch=x  \n0019object-format=sha512\n0000",
            ),
            "busy.git" => "HTTP/1.1 503 x\r\nContent-Length: 0\r\n\r\n".to_owned(),
            _ => return None,
        })
    });
    let check = |name: &str, expected: &str| {
        let error = refused(&server.url(name));
        assert!(error.contains(expected), "{name}: {error}");
    };
    check("html.git", "\"text/html\"");
    check("dumb.git", "(\"dumb HTTP\") are not supported");
    check("text.git", "expected a packet's length, got \"hell\"");
    check("short.git", "ended in the middle of an answer");
    check("error.git", "the server says: not for you");
    check("hash.git", "named by \"sha512\"");
    check("busy.git", "the server answered 503");
    let scratch = tempfile::tempdir().unwrap();
    let options = options(&scratch);
    let of = |name: &str| resolve(&reference(&server.url(name)), &options).unwrap_err();
    assert!(of("busy.git").is_temporary());
    assert!(!of("error.git").is_temporary());
    // Nobody listens there.
    let port = {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.local_addr().unwrap().port()
    };
    let text = format!("http://user:hunter2@127.0.0.1:{port}/r.git");
    let error = resolve(&reference(&text), &options).unwrap_err();
    assert!(error.is_temporary());
    assert!(!format!("{error:?}").contains("hunter2"));
}

#[test]
fn repositories_of_the_longer_hash() {
    needs_git!();
    let server = Server::start();
    let path = server.root.path().join("r");
    fs::create_dir(&path).unwrap();
    let repository = Repository { path };
    repository.git(&["init", "-q", "-b", "main", "--object-format=sha256"]);
    repository.write("a", "1");
    let commit = repository.commit("x");
    assert_eq!(commit.len(), 64);
    let url = server.url("r/.git");
    for suffix in ["".to_owned(), format!("#{commit}")] {
        let (work, got) = fetched(&format!("{url}?keep-git-dir{suffix}"));
        let x = work.path().join("x");
        assert_eq!(got.commit, commit);
        assert_eq!(listing(&x), ["a 644 \"1\""]);
        assert_eq!(git_in(&x, b"", &["status", "--porcelain"]), "");
        assert_eq!(git_in(&x, b"", &["rev-parse", "HEAD"]), commit);
    }
}

#[test]
fn the_git_protocol_itself() {
    needs_git!();
    let server = Server::start();
    let (repository, first, second) = sample(&server);
    repository.write("a", "3");
    repository.commit("third");
    for version in ["version=2", ""] {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let root = server.root.path().to_owned();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let mut length = [0; 4];
                stream.read_exact(&mut length).unwrap();
                let length = usize::from_str_radix(std::str::from_utf8(&length).unwrap(), 16);
                let mut request = vec![0; length.unwrap() - 4];
                stream.read_exact(&mut request).unwrap();
                let request = String::from_utf8(request).unwrap();
                let (command, rest) = request.split_once('\0').unwrap();
                assert_eq!(rest, format!("host=127.0.0.1:{port}\0\0version=2\0"));
                let path = command.strip_prefix("git-upload-pack /").unwrap();
                let output: OwnedFd = stream.try_clone().unwrap().into();
                let input: OwnedFd = stream.into();
                let mut child = Command::new("git")
                    .args(["-c", "safe.directory=*", "upload-pack"])
                    .arg(root.join(path))
                    .env("GIT_PROTOCOL", version)
                    .stdin(input)
                    .stdout(output)
                    .stderr(Stdio::null())
                    .spawn()
                    .unwrap();
                child.wait().unwrap();
            }
        });
        let url = format!("git://127.0.0.1:{port}/r.git/.git");
        let (work, got) = fetched(&format!("{url}#side/one"));
        assert_eq!(got.commit, first);
        assert_eq!(listing(&work.path().join("x")), ["old 644 \"1\""]);
        let (work, got) = fetched(&format!("{url}#{second}"));
        assert_eq!(got.commit, second);
        assert_eq!(listing(&work.path().join("x")), SECOND);
        let error = refused(&format!("{url}#mian"));
        assert!(error.contains("did you mean \"main\"?"), "{error}");
        let error = refused(&format!("git://127.0.0.1:{port}/none"));
        assert!(error.contains("/none: the connection ended"), "{error}");
    }
}

#[test]
fn over_ssh() {
    needs_git!();
    let server = Server::start();
    let (repository, ..) = sample(&server);
    // Written by another process, so that none of this one's children can hold it open.
    let program = server.root.path().join("ssh");
    let write = Command::new("sh")
        .arg("-c")
        .arg(
            "cat > \"$0\" <<'E' && chmod 755 \"$0\"\n#!/bin/sh\necho \"$SSH_AUTH_SOCK $*\" >> \"$0.log\"\n\
             for last; do :; done\neval \"set -- $last\"\n[ \"$1\" = git-upload-pack ] || exit 1\n\
             [ -d \"$2\" ] || { echo \"no such repository\" >&2; exit 128; }\n\
             exec git upload-pack \"$2\"\nE\n",
        )
        .arg(&program)
        .status()
        .unwrap();
    assert!(write.success());
    let path = repository.path.join(".git").display().to_string();
    let with = |text: &str, program: &Path| {
        fetch_with(text, |options| {
            options.ssh = Some(Ssh {
                program: program.to_owned(),
                agent: "/run/agent".into(),
                known_hosts: None,
            });
        })
    };
    for text in [
        format!("ssh://git@example.com:22{path}"),
        format!("git@example.com:{path}"),
    ] {
        let (work, got) = with(&text, &program);
        got.unwrap();
        assert_eq!(listing(&work.path().join("x")), SECOND);
    }
    let log = fs::read_to_string(server.root.path().join("ssh.log")).unwrap();
    let options =
        "-F /dev/null -o BatchMode=yes -o StrictHostKeyChecking=no -o SendEnv=GIT_PROTOCOL";
    assert_eq!(
        log,
        format!(
            "/run/agent {options} -p 22 -- git@example.com git-upload-pack '{path}'\n\
             /run/agent {options} -- git@example.com git-upload-pack '{path}'\n"
        )
    );
    let wrong = |text: &str, program: &Path, expected: &str| {
        let error = with(text, program).1.unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    };
    let text = "git@example.com:none.git";
    wrong(
        text,
        &program,
        "ended in the middle of an answer; ssh says: no such repository",
    );
    wrong(
        text,
        Path::new("no-such-ssh"),
        "the program no-such-ssh is not installed",
    );
    let error = refused(text);
    assert!(
        error.contains("needs an ssh agent: give --ssh default"),
        "{error}"
    );
}

#[test]
fn cache_keys_are_buildkits() {
    let tag = Commit {
        object: "t".repeat(40),
        peeled: Some("c".repeat(40)),
        reference: Some("refs/tags/v1".to_owned()),
    };
    let check = |query: &str, expected: &str| {
        let reference = reference(&format!("https://h/r.git{query}"));
        let expected = expected
            .replace('T', &"t".repeat(40))
            .replace('C', &"c".repeat(40));
        assert_eq!(tag.cache_key(&reference), expected, "{query}");
    };
    check("", "C");
    check("#v1:a/b", "C:a/b");
    check("?keep-git-dir", "T.git#refs/tags/v1");
    check("?submodules=0", "C(skip-submodules)");
    check("?mtime=commit#:a", "C:a(mtime=commit)");
}

#[test]
fn a_full_directory_is_left_alone() {
    needs_git!();
    let work = tempfile::tempdir().unwrap();
    let scratch = tempfile::tempdir().unwrap();
    fs::write(work.path().join("mine"), "x").unwrap();
    let server = Server::start();
    sample(&server);
    let reference = reference(&server.url("r.git/.git"));
    let error = fetch(&reference, &options(&scratch), work.path()).unwrap_err();
    assert!(matches!(error, GitError::Io { .. }), "{error:?}");
    assert_eq!(fs::read_to_string(work.path().join("mine")).unwrap(), "x");
    let at = work.path().join("empty");
    fs::create_dir(&at).unwrap();
    let resolved = resolve(&reference, &options(&scratch)).unwrap();
    let got = fetch_resolved(&reference, &resolved, &options(&scratch), &at).unwrap();
    assert_eq!(got.resolved, resolved);
    assert_eq!(listing(&at), SECOND);
}
