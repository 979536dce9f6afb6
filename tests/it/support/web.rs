//! A server of files and git repositories: the test says what is there, git's own program
//! speaks its protocol.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};

use super::dir::TestDir;

/// The path of a file → headers and content.
type Files = Arc<Mutex<BTreeMap<String, (String, Vec<u8>)>>>;

/// Serves until the end of the process.
#[derive(Debug)]
pub struct Web {
    /// `http://HOST:PORT`.
    pub url: String,
    files: Files,
    dir: TestDir,
}

/// A repository with a work tree that a [`Web`] serves.
#[derive(Debug)]
pub struct Repository {
    /// Its work tree.
    pub path: PathBuf,
}

impl Web {
    /// Starts one on a free port of the loopback.
    pub fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let port = listener.local_addr().expect("bound").port();
        let (dir, files) = (TestDir::new("web"), Files::default());
        let (root, shared) = (dir.path().to_owned(), Arc::clone(&files));
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (root, files) = (root.clone(), Arc::clone(&shared));
                std::thread::spawn(move || serve(stream, &root, &files));
            }
        });
        Self {
            url: format!("http://127.0.0.1:{port}"),
            files,
            dir,
        }
    }

    /// Serves `content` at `path`; `headers` are whole lines, such as `Last-Modified: …`.
    pub fn file(&self, path: &str, headers: &[&str], content: impl Into<Vec<u8>>) -> String {
        let headers = headers.iter().map(|line| format!("{line}\r\n")).collect();
        let mut files = self.files.lock().expect("no test panics with it");
        files.insert(path.to_owned(), (headers, content.into()));
        format!("{}{path}", self.url)
    }

    /// A new repository, served as `NAME/.git`.
    pub fn repository(&self, name: &str) -> Repository {
        let path = self.dir.dir(name);
        let repository = Repository { path };
        repository.git(&["init", "-q", "-b", "main"]);
        repository
    }
}

impl Repository {
    /// Runs git in it at a fixed time; gives what it prints.
    #[track_caller]
    pub fn git(&self, args: &[&str]) -> String {
        self.git_at(1_234_567_890, args)
    }

    /// Runs git in it at a time in seconds since 1970.
    #[track_caller]
    pub fn git_at(&self, time: i64, args: &[&str]) -> String {
        let output = Command::new("git")
            .args(["-c", "user.name=n", "-c", "user.email=e@x"])
            .args(args)
            .current_dir(&self.path)
            .env("GIT_CONFIG_NOSYSTEM", "1")
            .env("GIT_CONFIG_GLOBAL", "/dev/null")
            .env("GIT_AUTHOR_DATE", format!("{time} +0100"))
            .env("GIT_COMMITTER_DATE", format!("{time} +0100"))
            .stdin(Stdio::null())
            .output()
            .expect("git is installed");
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "git {args:?}: {error}");
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    }

    /// Writes files and commits them; gives the commit.
    #[track_caller]
    pub fn commit(&self, message: &str, files: &[(&str, &str)]) -> String {
        for (path, content) in files {
            super::dir::write(&self.path, path, content);
        }
        self.git(&["add", "-A"]);
        self.git(&["commit", "-q", "-m", message]);
        self.git(&["rev-parse", "HEAD"])
    }
}

/// Answers one request; a client that goes away is nobody's mistake.
fn serve(mut stream: TcpStream, root: &Path, files: &Files) -> Option<()> {
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
    let header = |name: &str| headers.get(name).map_or("", String::as_str);
    let mut body = vec![0; header("content-length").parse().unwrap_or(0)];
    reader.read_exact(&mut body).ok()?;
    let (path, query) = target.split_once('?').unwrap_or((&target, ""));
    let found = files.lock().ok()?.get(path).cloned();
    let (status, head, content) = match found {
        Some((head, content)) => ("200 OK".to_owned(), head, content),
        None => {
            let mut child = Command::new("git")
                .arg("http-backend")
                .env("GIT_PROJECT_ROOT", root)
                .env("GIT_HTTP_EXPORT_ALL", "1")
                .env("GIT_CONFIG_COUNT", "1")
                .env("GIT_CONFIG_KEY_0", "safe.directory")
                .env("GIT_CONFIG_VALUE_0", "*")
                .env("REQUEST_METHOD", &method)
                .env("PATH_INFO", path)
                .env("QUERY_STRING", query)
                .env("CONTENT_TYPE", header("content-type"))
                .env("CONTENT_LENGTH", body.len().to_string())
                .env("GIT_PROTOCOL", header("git-protocol"))
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .stderr(Stdio::null())
                .spawn()
                .ok()?;
            let sent = child.stdin.take()?.write_all(&body);
            let output = child.wait_with_output().ok()?.stdout;
            sent.ok()?;
            let end = output.windows(4).position(|w| w == b"\r\n\r\n")?;
            let head = String::from_utf8_lossy(&output[..end]).into_owned();
            let is_status = |line: &&str| line.starts_with("Status: ");
            let status = head
                .lines()
                .find(is_status)
                .map(|line| line[8..].to_owned());
            let head = head.lines().filter(|line| !is_status(line));
            (
                status.unwrap_or_else(|| "200 OK".to_owned()),
                head.map(|line| format!("{line}\r\n")).collect(),
                output[end + 4..].to_vec(),
            )
        }
    };
    let length = content.len();
    let head =
        format!("HTTP/1.1 {status}\r\n{head}Connection: close\r\nContent-Length: {length}\r\n\r\n");
    stream.write_all(head.as_bytes()).ok()?;
    if method != "HEAD" {
        stream.write_all(&content).ok()?;
    }
    Some(())
}
