//! The program under test, in an environment of its own.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use super::dir::{TestDir, write};
use super::http::{self, Response};
use super::process::{Daemon, Ran, run};
use super::registry::Registry;

/// The program.
pub fn program() -> PathBuf {
    std::env::var_os("SOCKLESS_TEST_BIN").map_or_else(
        || PathBuf::from(env!("CARGO_BIN_EXE_sockless")),
        PathBuf::from,
    )
}

/// A home, a store, credentials and contexts of one test.
#[derive(Debug)]
pub struct Place {
    pub dir: TestDir,
}

impl Place {
    /// Makes an empty one.
    pub fn new() -> Self {
        let dir = TestDir::new("place");
        for name in ["home", "tmp", "run", "docker", "store"] {
            dir.dir(name);
        }
        Self { dir }
    }

    /// The program with this place's variables and no others.
    pub fn command(&self) -> Command {
        self.wrapped(&[])
    }

    /// The same behind another program, such as `time`.
    pub fn wrapped(&self, before: &[&str]) -> Command {
        let mut command = match before {
            [] => Command::new(program()),
            [first, rest @ ..] => {
                let mut command = Command::new(first);
                command.args(rest).arg(program());
                command
            }
        };
        command
            .env_clear()
            .env(
                "PATH",
                "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            )
            .env("HOME", self.dir.join("home"))
            .env("TMPDIR", self.dir.join("tmp"))
            .env("XDG_RUNTIME_DIR", self.dir.join("run"))
            .env("DOCKER_CONFIG", self.dir.join("docker"))
            .env("SOCKLESS_ROOT", self.dir.join("store"))
            // Where tests ask for runc, they take what Debian has.
            .env("SOCKLESS_ALLOW_OLD_RUNC", "1")
            .current_dir(self.dir.join("home"));
        // The suites can be run with each way to make a root filesystem.
        if let Some(rootfs) = std::env::var_os("SOCKLESS_ROOTFS") {
            command.env("SOCKLESS_ROOTFS", rootfs);
        }
        command
    }

    /// Makes this the content of `config.json`.
    pub fn docker_config(&self, json: &str) {
        self.dir.file("docker/config.json", json);
    }

    /// A build context of these files.
    pub fn context(&self, name: &str, files: &[(&str, &str)]) -> PathBuf {
        let context = self.dir.dir(name);
        for (path, content) in files {
            write(&context, path, content);
        }
        context
    }

    /// `sockless build` of a context, with Docker Hub's images from `upstream`.
    #[track_caller]
    pub fn build(&self, upstream: &Registry, context: &Path, args: &[&str]) -> Ran {
        run(self
            .command()
            .args(["build", "--progress", "plain"])
            .arg("--registry-mirror")
            .arg(format!("docker.io={}", upstream.url()))
            .args(args)
            .arg(context))
    }

    /// Builds into an archive and reads that: skopeo must be able to, and every byte must be right.
    #[track_caller]
    pub fn built(&self, upstream: &Registry, context: &Path, args: &[&str]) -> super::oci::Image {
        let archive = self.dir.join("image.tar");
        let output = format!("type=oci,dest={}", archive.display());
        let mut all = vec!["-o", output.as_str()];
        all.extend(args);
        self.build(upstream, context, &all).success();
        self.archive(&archive)
    }

    /// Reads an archive by way of skopeo.
    #[track_caller]
    pub fn archive(&self, archive: &Path) -> super::oci::Image {
        // skopeo leaves a directory behind when it finds no archive.
        assert!(archive.is_file(), "no file {}", archive.display());
        let layout = self.dir.join("layout");
        let _ = std::fs::remove_dir_all(&layout);
        run(super::registry::skopeo()
            .args(["copy", "--preserve-digests"])
            .arg(format!("oci-archive:{}", archive.display()))
            .arg(format!("oci:{}:built", layout.display())))
        .success();
        super::oci::Image::read(&layout)
    }

    /// Writes the service's settings; `more` are further lines of TOML.
    pub fn service_config(
        &self,
        registry: &Registry,
        upstream: &Registry,
        github: &super::github::GitHub,
        more: &str,
    ) -> PathBuf {
        use std::fmt::Write as _;
        let mut toml = format!(
            "listen = \"127.0.0.1:0\"\n\
             webhook_secret = \"{}\"\n\
             branches = [\"develop\"]\n\
             raw_url = \"{}\"\n\
             archive_url = \"{}\"\n\
             registry = \"{}\"\n\
             registry_mirrors = [\"docker.io={}\"]\n",
            Service::SECRET,
            github.raw_url(),
            github.archive_url(),
            registry.host,
            upstream.url(),
        );
        if registry.url().starts_with("https:") {
            self.docker_config(&registry.docker_config(Registry::USER, Registry::PASSWORD));
            writeln!(
                toml,
                "registry_ca_files = [\"{}\"]",
                registry.ca().display()
            )
            .expect("a string");
        } else {
            writeln!(toml, "insecure_registries = [\"{}\"]", registry.host).expect("a string");
        }
        self.dir.file("sockless.toml", toml + more)
    }

    /// Starts `sockless serve` and waits until it listens.
    #[track_caller]
    pub fn serve(&self, config: &Path) -> Service {
        let mut command = self.command();
        command.arg("serve").arg("--config").arg(config);
        // A log each, so that the address of an earlier start is not read again.
        let log = (0..)
            .map(|n| self.dir.join(format!("serve-{n}.log")))
            .find(|p| !p.exists());
        let mut daemon = Daemon::start(command, &log.expect("a free number"));
        let host = daemon.wait_for("\"sockless: listening on\"", |log| {
            let (_, rest) = log.split_once("sockless: listening on http://")?;
            let (host, _) = rest.split_once('\n')?;
            Some(host.trim().to_owned())
        });
        Service { host, daemon }
    }
}

/// A running `sockless serve`.
#[derive(Debug)]
pub struct Service {
    /// `HOST:PORT`.
    pub host: String,
    pub daemon: Daemon,
}

impl Service {
    /// What its deliveries are signed with.
    pub const SECRET: &str = "It's a Secret to Everybody";

    /// Delivers a body as GitHub does.
    #[track_caller]
    pub fn deliver(&self, event: &str, delivery: &str, body: &[u8]) -> Response {
        self.deliver_signed(
            event,
            delivery,
            body,
            &super::github::sign(Self::SECRET, body),
        )
    }

    /// Delivers with a signature of the test's choice.
    #[track_caller]
    pub fn deliver_signed(
        &self,
        event: &str,
        delivery: &str,
        body: &[u8],
        signature: &str,
    ) -> Response {
        let headers = [
            ("User-Agent", "GitHub-Hookshot/5a3b1c2"),
            ("Accept", "*/*"),
            ("Content-Type", "application/json"),
            ("X-GitHub-Event", event),
            ("X-GitHub-Delivery", delivery),
            ("X-GitHub-Hook-ID", "292430182"),
            ("X-Hub-Signature-256", signature),
        ];
        http::request(&self.host, "POST", WEBHOOK, &headers, body)
    }

    /// A job as the API tells of it.
    #[track_caller]
    pub fn job(&self, id: &str) -> Value {
        let response = http::get(&self.host, &format!("{JOBS}/{id}"));
        assert_eq!(response.status, 200, "{}", response.text());
        response.json()
    }

    /// The job's log so far.
    #[track_caller]
    pub fn log(&self, id: &str) -> String {
        let response = http::get(&self.host, &format!("{JOBS}/{id}/log?format=text"));
        assert_eq!(response.status, 200, "{}", response.text());
        response.text()
    }

    /// Waits until a job has ended, and returns it.
    #[track_caller]
    pub fn ended(&self, id: &str) -> Value {
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(900);
        loop {
            let job = self.job(id);
            if let Some("succeeded" | "failed" | "cancelled" | "superseded") = job["state"].as_str()
            {
                return job;
            }
            assert!(
                std::time::Instant::now() < deadline,
                "a job did not end within 15 minutes: {job}\n{}",
                self.log(id)
            );
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
    }

    /// Waits until a job has succeeded, and returns it; shows the log where it has not.
    #[track_caller]
    pub fn succeeded(&self, id: &str) -> Value {
        let job = self.ended(id);
        assert_eq!(job["state"], "succeeded", "{job}\n{}", self.log(id));
        job
    }

    /// Waits until a job has failed, and returns it.
    #[track_caller]
    pub fn failed(&self, id: &str) -> Value {
        let job = self.ended(id);
        assert_eq!(job["state"], "failed", "{job}\n{}", self.log(id));
        job
    }
}

/// Where deliveries go.
pub const WEBHOOK: &str = "/webhook";
/// Where jobs are.
pub const JOBS: &str = "/api/v1/jobs";

/// The job's ID in an answer.
#[track_caller]
pub fn job_id(response: &Response) -> String {
    assert_eq!(response.status, 202, "{}", response.text());
    let json = response.json();
    let id = &json["job"];
    id.as_str()
        .unwrap_or_else(|| panic!("no job ID in {json}"))
        .to_owned()
}
