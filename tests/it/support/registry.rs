//! Real registries on the loopback: Debian's `docker-registry`, which is registry:2.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::dir::TestDir;
use super::process::{Daemon, Ran, run};
use super::{find_program, repository};

/// How a registry is.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// HTTPS with a certificate of an authority of the test's own.
    pub tls: bool,
    /// Wants [`Registry::USER`] and [`Registry::PASSWORD`].
    pub htpasswd: bool,
    /// Serves this directory and changes nothing in it; absent: an empty one of its own.
    pub read_only_storage: Option<PathBuf>,
    /// Keeps what is pushed here.
    pub storage: Option<PathBuf>,
}

/// A running registry.
#[derive(Debug)]
pub struct Registry {
    /// `HOST:PORT`.
    pub host: String,
    options: Options,
    // Ends, and shows its log, before the directory goes.
    daemon: Option<Daemon>,
    dir: TestDir,
}

/// One line of the access log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    pub method: String,
    pub path: String,
    pub status: u16,
}

impl Registry {
    /// The one user of a registry with `htpasswd`.
    pub const USER: &str = "sockless";
    /// The password, of all characters that URLs and shells treat specially.
    pub const PASSWORD: &str = "s3cret:/@&%\"'$ x";

    /// Starts one and waits until it answers.
    #[track_caller]
    pub fn start(options: Options) -> Self {
        let dir = TestDir::new("registry");
        if find_program("docker-registry").is_none()
            && !options.tls
            && !options.htpasswd
            && let Ok(host) = std::env::var("SOCKLESS_TEST_REGISTRY")
        {
            return Self {
                host,
                options,
                dir,
                daemon: None,
            };
        }
        let storage = (options.read_only_storage.clone())
            .or_else(|| options.storage.clone())
            .unwrap_or_else(|| dir.dir("storage"));
        let mut config = format!(
            "version: 0.1\n\
             log:\n  level: info\n  formatter: text\n\
             storage:\n  filesystem:\n    rootdirectory: {}\n  delete:\n    enabled: true\n",
            storage.display()
        );
        if options.read_only_storage.is_some() {
            config += "  maintenance:\n    readonly:\n      enabled: true\n";
        }
        // Port 0: the kernel picks a free one and the log says which, so no other process can take
        // it in between.
        config += "http:\n  addr: 127.0.0.1:0\n  secret: for-tests-only\n";
        if options.tls || options.htpasswd {
            let certs = dir.dir("certs");
            run(Command::new(repository().join("certs/make.sh"))
                .args(["--user", Self::USER, "--password", Self::PASSWORD, "--out"])
                .arg(&certs))
            .success();
            let certs = certs.display();
            if options.tls {
                write!(
                    config,
                    "  tls:\n    certificate: {certs}/registry.crt\n    key: {certs}/registry.key\n"
                )
                .expect("a string");
            }
            if options.htpasswd {
                write!(
                    config,
                    "auth:\n  htpasswd:\n    realm: sockless tests\n    path: {certs}/htpasswd\n"
                )
                .expect("a string");
            }
        }
        let config = dir.file("config.yml", config);
        let mut command = Command::new(find_program("docker-registry").expect("probed"));
        command.arg("serve").arg(config).env_clear();
        let mut daemon = Daemon::start(command, &dir.join("log"));
        let host = daemon.wait_for("\"listening on\"", |log| {
            let (_, rest) = log.split_once("msg=\"listening on ")?;
            rest.find(['"', ',']).map(|end| rest[..end].to_owned())
        });
        Self {
            host,
            options,
            dir,
            daemon: Some(daemon),
        }
    }

    /// A private registry as production has it: TLS, and a password.
    #[track_caller]
    pub fn private() -> Self {
        Self::start(Options {
            tls: true,
            htpasswd: true,
            ..Options::default()
        })
    }

    /// The authority that vouches for its certificate.
    pub fn ca(&self) -> PathBuf {
        assert!(self.options.tls, "a registry without TLS has no authority");
        self.dir.join("certs/ca.crt")
    }

    /// `http://HOST:PORT` or `https://…`.
    pub fn url(&self) -> String {
        let scheme = if self.options.tls { "https" } else { "http" };
        format!("{scheme}://{}", self.host)
    }

    /// `config.json` with credentials for it.
    pub fn docker_config(&self, user: &str, password: &str) -> String {
        use base64::Engine as _;
        let auth = base64::engine::general_purpose::STANDARD.encode(format!("{user}:{password}"));
        serde_json::json!({ "auths": { &self.host: { "auth": auth } } }).to_string()
    }

    /// What was asked so far, oldest first, our own health checks left out.
    pub fn requests(&self) -> Vec<Request> {
        let daemon = self
            .daemon
            .as_ref()
            .expect("needs docker-registry, whose log can be read");
        daemon.log().lines().filter_map(access_line).collect()
    }

    /// Everything that the registry printed.
    pub fn log(&self) -> String {
        self.daemon.as_ref().map(Daemon::log).unwrap_or_default()
    }

    /// Requests that change something.
    pub fn writes(&self) -> Vec<Request> {
        let mut requests = self.requests();
        requests.retain(|r| !matches!(r.method.as_str(), "GET" | "HEAD"));
        requests
    }

    /// The options that make skopeo trust it and known to it, for `--src-…` or `--dest-…`.
    fn skopeo_flags(&self, side: &str) -> Vec<String> {
        let mut flags = Vec::new();
        if self.options.tls {
            flags.push(format!("--{side}cert-dir"));
            // skopeo takes every *.crt as an authority and wants a key beside every *.cert.
            let dir = self.dir.dir("skopeo");
            std::fs::copy(self.ca(), dir.join("ca.crt")).expect("made by make.sh");
            flags.push(dir.display().to_string());
        } else {
            flags.push(format!("--{side}tls-verify=false"));
        }
        if self.options.htpasswd {
            flags.push(format!("--{side}creds"));
            flags.push(format!("{}:{}", Self::USER, Self::PASSWORD));
        }
        flags
    }

    /// Pulls an image into an OCI layout, its bytes as they are.
    #[track_caller]
    pub fn pull(&self, name: &str, layout: &Path) {
        run(skopeo()
            .args(["copy", "--preserve-digests"])
            .args(self.skopeo_flags("src-"))
            .arg(format!("docker://{}/{name}", self.host))
            .arg(format!("oci:{}:pulled", layout.display())))
        .success();
    }

    /// Pushes the image of an OCI layout, for all its platforms.
    #[track_caller]
    pub fn push(&self, layout: &Path, name: &str) {
        run(skopeo()
            .args(["copy", "--all", "--preserve-digests"])
            .args(self.skopeo_flags("dest-"))
            .arg(format!("oci:{}", layout.display()))
            .arg(format!("docker://{}/{name}", self.host)))
        .success();
    }

    /// Asks for an image's manifest, which may be missing.
    pub fn inspect(&self, name: &str) -> Ran {
        run(skopeo()
            .args(["inspect", "--raw"])
            .args(self.skopeo_flags(""))
            .arg(format!("docker://{}/{name}", self.host)))
    }
}

/// `skopeo`, with nobody's settings.
pub fn skopeo() -> Command {
    let mut command = Command::new("skopeo");
    command.arg("--insecure-policy").env_remove("DOCKER_CONFIG");
    // Without it skopeo looks below /run/containers, which root may have closed to others.
    command.env("XDG_RUNTIME_DIR", std::env::temp_dir());
    command
}

/// `127.0.0.1 - - [date] "GET /v2/ HTTP/1.1" 200 2 "" "agent"`.
fn access_line(line: &str) -> Option<Request> {
    let (_, rest) = line.split_once("] \"")?;
    let (request, rest) = rest.split_once("\" ")?;
    let mut words = request.split(' ');
    Some(Request {
        method: words.next()?.to_owned(),
        path: words.next()?.to_owned(),
        status: rest.split(' ').next()?.parse().ok()?,
    })
}
