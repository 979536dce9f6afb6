//! A worker with a local server in the shape of raw.githubusercontent.com and
//! codeload.github.com, and a shell script in the place of `sockless`.

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;

use axum::Router;
use axum::extract::State as Shared;
use axum::http::{HeaderMap, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use tar::EntryType;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

use super::super::archive::tests::{entry, pack};
use super::super::jobs::{Accepted, JobRequest, State};
use super::super::tests::{config, until_gone};
use super::*;
use crate::config::SourceMode;
use crate::progress::Stream;
use crate::secret::Secret;

const COMMIT: &str = "6dcb09b5b57875f334f61aebed695e2e4193db5e";
const SPEC: &str = r#"{"service": {"name": "shop", "version": "1.2.3"}}"#;
const DIGEST: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

type Files = Arc<BTreeMap<String, (StatusCode, Vec<u8>)>>;

async fn answer(Shared(files): Shared<Files>, uri: Uri, headers: HeaderMap) -> Response {
    if uri.path().ends_with("/needs-token") && headers[header::AUTHORIZATION] != "Bearer t0ken" {
        return StatusCode::UNAUTHORIZED.into_response();
    }
    match files.get(uri.path()) {
        Some((status, body)) if status.is_redirection() => {
            let to = String::from_utf8(body.clone()).unwrap();
            (*status, [(header::LOCATION, to)]).into_response()
        }
        Some((status, body)) => (*status, body.clone()).into_response(),
        None => StatusCode::NOT_FOUND.into_response(),
    }
}

struct Setting {
    dir: tempfile::TempDir,
    config: ServiceConfig,
    files: BTreeMap<String, (StatusCode, Vec<u8>)>,
}

/// The database, which has been closed when its directory is removed: the worker's next
/// connection would make the file again.
struct OpenJobs(Jobs);

impl std::ops::Deref for OpenJobs {
    type Target = Jobs;

    fn deref(&self) -> &Jobs {
        &self.0
    }
}

impl Drop for OpenJobs {
    fn drop(&mut self) {
        let closing = || tokio::runtime::Handle::current().block_on(self.0.close());
        tokio::task::block_in_place(closing);
    }
}

struct Running {
    // Dropped in this order: the database before the directory.
    jobs: OpenJobs,
    setting: Setting,
    base: String,
    id: JobId,
    stop: Stop,
    worker: Arc<Worker>,
    task: JoinHandle<()>,
}

impl Setting {
    /// `script` plays `sockless`; its arguments are those of a build.
    fn new(script: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut config = config(dir.path());
        config.executable = dir.path().join("sockless");
        let script = format!("#!/bin/sh\ncd {}\n{script}\n", dir.path().display());
        std::fs::write(&config.executable, script).unwrap();
        let mode = std::fs::Permissions::from_mode(0o755);
        std::fs::set_permissions(&config.executable, mode).unwrap();
        Self {
            dir,
            config,
            files: BTreeMap::new(),
        }
    }

    fn file(mut self, path: &str, body: impl Into<Vec<u8>>) -> Self {
        let path = format!("/octo-org/shop/{path}");
        self.files.insert(path, (StatusCode::OK, body.into()));
        self
    }

    fn usual(self) -> Self {
        self.file(&format!("{COMMIT}/spec.json"), SPEC)
            .file(&format!("{COMMIT}/Dockerfile"), "FROM scratch\n")
    }

    async fn start(mut self) -> Running {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let base = format!("http://{}", listener.local_addr().unwrap());
        let router = Router::new()
            .fallback(answer)
            .with_state(Arc::new(self.files.clone()));
        tokio::spawn(async move { axum::serve(listener, router).await });
        self.config.source.raw_url = base.parse().unwrap();
        self.config.source.archive_url = base.parse().unwrap();
        let store = Arc::new(Store::open(&self.config.root).unwrap());
        let jobs = Jobs::open(&self.dir.path().join("j.sqlite")).await.unwrap();
        let request = JobRequest {
            delivery: "d".to_owned(),
            repository: "octo-org/shop".to_owned(),
            commit: COMMIT.to_owned(),
            branch: "develop".to_owned(),
            pull_request: 1,
            title: "t".to_owned(),
        };
        let Accepted::New(id) = jobs.accept(&request, 9, 1).await.unwrap() else {
            panic!("the queue is new");
        };
        let stop = Stop::default();
        let worker = Arc::new(Worker::new(
            Arc::new(self.config.clone()),
            jobs.clone(),
            SourceClient::new(&self.config.source).unwrap(),
            store,
            stop.clone(),
        ));
        let task = tokio::spawn(worker.clone().work());
        Running {
            jobs: OpenJobs(jobs),
            setting: self,
            base,
            id,
            stop,
            worker,
            task,
        }
    }

    async fn run(self) -> Running {
        let running = self.start().await;
        running.wait(|job| job.state.is_end()).await;
        running
    }
}

impl Running {
    async fn job(&self) -> Job {
        self.jobs.get(self.id).await.unwrap().unwrap()
    }

    async fn wait(&self, is_reached: impl Fn(&Job) -> bool) -> Job {
        let mut changes = self.jobs.subscribe();
        loop {
            let job = self.job().await;
            if is_reached(&job) {
                return job;
            }
            changes.changed().await.unwrap();
        }
    }

    /// Waits until the script has written the file `name`.
    async fn read(&self, name: &str) -> String {
        loop {
            match std::fs::read_to_string(self.setting.dir.path().join(name)) {
                Ok(text) if text.ends_with('\n') => return text,
                _ => tokio::time::sleep(Duration::from_millis(10)).await,
            }
        }
    }

    async fn events(&self) -> Vec<LogEvent> {
        let entries = self.jobs.log(self.id, 0, 999).await.unwrap();
        entries.into_iter().map(|entry| entry.event).collect()
    }

    async fn text(&self) -> String {
        self.events().await.iter().map(LogEvent::to_text).collect()
    }

    #[track_caller]
    fn check_error(&self, job: &Job, expected: &str) {
        assert_eq!(job.state, State::Failed);
        assert_eq!(
            job.error.as_deref().map(|e| e.replace(&self.base, "BASE")),
            Some(expected.to_owned())
        );
        let tmp = self.setting.config.root.join("tmp");
        let left = std::fs::read_dir(tmp)
            .unwrap()
            .flat_map(|own| std::fs::read_dir(own.unwrap().path()).unwrap())
            .count();
        assert_eq!(left, 0);
    }
}

fn says(event: &BuildEvent) -> String {
    let json = serde_json::to_string(event).unwrap();
    format!("printf '%s\\n' '{json}' >&2\n")
}

fn published() -> BuildEvent {
    BuildEvent::Published {
        reference: "r.example:5000/shop:1.2.3".to_owned(),
        digest: Digest::parse(DIGEST).unwrap(),
        uploaded_bytes: 12,
    }
}

fn finished(success: bool, message: &str) -> BuildEvent {
    BuildEvent::Finished {
        success,
        message: message.to_owned(),
        timings_ms: BTreeMap::new(),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_becomes_an_image() {
    let output = BuildEvent::StepOutput {
        step: 1,
        stream: Stream::Stdout,
        text: "hello\n".to_owned(),
    };
    let script = [
        "echo \"$*\" > arguments; env > environment; for last; do :; done",
        "(cd \"$OLDPWD/$last\"; find . | sort; cat Dockerfile; stat -c %Y Dockerfile) > context",
        "echo plain; echo; printf 'no \\377 json' >&2; echo >&2",
        &says(&output),
        &says(&published()),
        &says(&finished(true, "")),
    ]
    .join("\n");
    let mut setting = Setting::new(&script).usual();
    setting.config.build.docker_config = Some("/own".into());
    let running = setting.run().await;
    let job = running.job().await;
    assert_eq!(job.error, None);
    assert_eq!(job.state, State::Succeeded);
    assert_eq!(job.image.as_deref(), Some("r.example:5000/shop:1.2.3"));
    assert_eq!(job.digest.as_deref(), Some(DIGEST));

    let arguments = running.read("arguments").await;
    assert!(
        arguments.starts_with("build --file=Dockerfile "),
        "{arguments}"
    );
    assert!(
        arguments.contains(" --tag=r.example:5000/shop:1.2.3 --progress=rawjson --root=/"),
        "{arguments}"
    );
    let environment = running.read("environment").await;
    for line in environment.lines() {
        let name = line.split('=').next().unwrap();
        assert!(
            // The last three are the shell's own.
            [
                "PATH",
                "HOME",
                "DOCKER_CONFIG",
                "SSL_CERT_FILE",
                "SSL_CERT_DIR",
                "PWD",
                "OLDPWD",
                "_"
            ]
            .contains(&name)
                || name.starts_with("XDG_"),
            "{line}"
        );
    }
    assert!(environment.contains("DOCKER_CONFIG=/own\n"));
    assert_eq!(
        running.read("context").await,
        ".\n./Dockerfile\n./spec.json\nFROM scratch\n0\n"
    );

    // The two streams are read side by side, so their order is not fixed.
    let mut text: Vec<String> = running
        .text()
        .await
        .replace(&running.base, "BASE")
        .lines()
        .map(str::to_owned)
        .collect();
    let plain = text.iter().position(|line| line == "plain").unwrap();
    text.remove(plain);
    assert_eq!(
        text,
        [
            &format!("sockless: fetching BASE/octo-org/shop/{COMMIT}/spec.json"),
            "sockless: building r.example:5000/shop:1.2.3",
            "no \u{fffd} json",
            "#1 | hello",
            &format!("published r.example:5000/shop:1.2.3@{DIGEST}"),
            "the build succeeded",
        ]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_missing_in_the_repository_is_named() {
    let running = Setting::new("")
        .file(&format!("{COMMIT}/spec.json"), SPEC)
        .run()
        .await;
    let job = running.job().await;
    running.check_error(
        &job,
        &format!("there is no Dockerfile at BASE/octo-org/shop/{COMMIT}/Dockerfile (404 Not Found); for a private repository set source_token"),
    );
    // The reason stands in the log as well.
    let text = running.text().await;
    assert!(
        text.contains("sockless: there is no Dockerfile at "),
        "{text}"
    );

    for (spec, expected) in [
        (r#"{"service": {"version": "1"}}"#, "service.name: missing"),
        (
            r#"{"service": {"name": "shop"}}"#,
            "service.version: missing",
        ),
        (
            "{",
            "it is no JSON: EOF while parsing an object at line 1 column 1",
        ),
    ] {
        let running = Setting::new("")
            .usual()
            .file(&format!("{COMMIT}/spec.json"), spec)
            .run()
            .await;
        let job = running.job().await;
        running.check_error(
            &job,
            &format!("BASE/octo-org/shop/{COMMIT}/spec.json: {expected}"),
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn security_s15_downloads_are_limited_and_stay_on_their_host() {
    let mut setting = Setting::new("").usual();
    setting.config.source.file_limit = 10;
    let running = setting.run().await;
    let job = running.job().await;
    running.check_error(
        &job,
        &format!(
            "BASE/octo-org/shop/{COMMIT}/spec.json is larger than 10 bytes (setting file_limit)"
        ),
    );

    let mut setting = Setting::new("").usual();
    let path = format!("/octo-org/shop/{COMMIT}/spec.json");
    let elsewhere = b"http://localhost:1/canary".to_vec();
    setting.files.insert(path, (StatusCode::FOUND, elsewhere));
    let running = setting.run().await;
    let job = running.job().await;
    running.check_error(
        &job,
        &format!("GET BASE/octo-org/shop/{COMMIT}/spec.json: it redirects to another host, which is not followed"),
    );

    let mut setting = Setting::new("").usual();
    let path = format!("/octo-org/shop/{COMMIT}/spec.json");
    setting
        .files
        .insert(path, (StatusCode::FORBIDDEN, Vec::new()));
    let running = setting.run().await;
    let job = running.job().await;
    running.check_error(
        &job,
        &format!("GET BASE/octo-org/shop/{COMMIT}/spec.json: 403 Forbidden"),
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn redirects_on_the_same_host_are_followed_with_the_token() {
    let script = says(&published()) + &says(&finished(true, ""));
    let mut setting = Setting::new(&script).usual();
    setting.config.source.token = Some(Secret::new("t0ken"));
    let path = format!("/octo-org/shop/{COMMIT}/spec.json");
    let here = b"/moved/needs-token".to_vec();
    setting.files.insert(path, (StatusCode::FOUND, here));
    let file = (StatusCode::OK, SPEC.as_bytes().to_vec());
    setting.files.insert("/moved/needs-token".to_owned(), file);
    let running = setting.run().await;
    assert_eq!(running.job().await.state, State::Succeeded);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_archive_is_the_whole_context() {
    let script = [
        "for last; do :; done; (cd \"$OLDPWD/$last\"; find . | sort; readlink link) > context",
        &says(&published()),
        &says(&finished(true, "")),
    ]
    .join("\n");
    let archive = |entries: &[Vec<u8>]| {
        let mut setting = Setting::new(&script).file(&format!("tar.gz/{COMMIT}"), pack(entries));
        setting.config.source.mode = SourceMode::Archive;
        setting
    };
    let spec = entry(EntryType::Regular, "shop-6dcb/spec.json", SPEC);
    let dockerfile = entry(EntryType::Regular, "shop-6dcb/Dockerfile", "FROM scratch\n");
    let source = entry(EntryType::Regular, "shop-6dcb/src/main.c", "int main;");
    let link = entry(EntryType::Symlink, "shop-6dcb/link", "/etc/passwd");
    let running = archive(&[spec.clone(), dockerfile.clone(), source, link])
        .run()
        .await;
    assert_eq!(running.job().await.error, None);
    assert_eq!(
        running.read("context").await,
        ".\n./Dockerfile\n./link\n./spec.json\n./src\n./src/main.c\n/etc/passwd\n"
    );

    let evil = entry(EntryType::Symlink, "shop-6dcb/Dockerfile", "/etc/passwd");
    for (entries, expected) in [
        (
            vec![spec.clone(), evil],
            format!(
                "reading Dockerfile of BASE/octo-org/shop/tar.gz/{COMMIT}: No such file or directory (os error 2)"
            ),
        ),
        (
            vec![dockerfile],
            format!(
                "reading spec.json of BASE/octo-org/shop/tar.gz/{COMMIT}: No such file or directory (os error 2)"
            ),
        ),
        (
            vec![entry(EntryType::Regular, "../x", "")],
            format!(
                "unpacking BASE/octo-org/shop/tar.gz/{COMMIT}: entry \"../x\": its name leads out of the archive"
            ),
        ),
    ] {
        let running = archive(&entries).run().await;
        let job = running.job().await;
        running.check_error(&job, &expected);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_build_says_why_it_failed() {
    let failed = says(&finished(false, "Dockerfile:2: RUN false: status 1"));
    let silent = says(&finished(true, ""));
    for (script, expected) in [
        (
            format!("{failed}exit 1"),
            "Dockerfile:2: RUN false: status 1",
        ),
        (
            "exit 2".to_owned(),
            "the build ended with status 2 without saying how it went",
        ),
        (
            "echo thread panicked >&2; kill -9 $$".to_owned(),
            "the build was killed by signal 9, perhaps for want of memory without saying how it went; its last lines:\nthread panicked",
        ),
        (silent, "the build ended well but published no image"),
        // A status of 0 alone is no success.
        (
            says(&published()),
            "the build ended with status 0 without saying how it went",
        ),
    ] {
        let running = Setting::new(&script).usual().run().await;
        let job = running.job().await;
        running.check_error(&job, expected);
        assert_eq!(job.attempts, 1);
    }
    let mut setting = Setting::new("").usual();
    setting.config.executable = "/none/sockless".into();
    let running = setting.run().await;
    let job = running.job().await;
    running.check_error(
        &job,
        "starting /none/sockless: No such file or directory (os error 2)",
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_ends_with_its_time() {
    // It ignores SIGTERM's default and leaves a child behind: the whole group must go.
    let script = "sleep 1000 & echo $! > pid; echo $! ; wait";
    let mut setting = Setting::new(script).usual();
    setting.config.jobs.timeout = Duration::from_secs(1);
    let running = setting.run().await;
    let job = running.job().await;
    running.check_error(
        &job,
        "the job took longer than 1 seconds (setting job_timeout) and was ended",
    );
    until_gone(&running.read("pid").await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_running_job_is_cancelled() {
    let script = "sleep 1000 & echo $! > pid; wait";
    let running = Setting::new(script).usual().start().await;
    let pid = running.read("pid").await;
    running.jobs.cancel(running.id, now_ms()).await.unwrap();
    let job = running.wait(|job| job.state.is_end()).await;
    assert_eq!((job.state, job.error), (State::Cancelled, None));
    until_gone(&pid).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_ending_service_gives_its_jobs_back() {
    let script = "sleep 1000 & echo $! > pid; wait";
    let running = Setting::new(script).usual().start().await;
    let pid = running.read("pid").await;
    running.stop.draining.cancel();
    running.stop.killing.cancel();
    running.task.await.unwrap();
    let job = running.jobs.get(running.id).await.unwrap().unwrap();
    assert_eq!((job.state, job.attempts), (State::Queued, 0));
    assert_eq!(running.worker.returned(), 1);
    until_gone(&pid).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_lost_a_job_ends_its_child_and_changes_nothing() {
    let script = "sleep 1000 & echo $! > pid; wait";
    let running = Setting::new(script).usual().start().await;
    let pid = running.read("pid").await;
    running.stop.draining.cancel();
    // As another service would that thinks this one is dead.
    running.jobs.take_over().await.unwrap();
    let attempts = running.worker.config.jobs.attempts;
    let other = running
        .jobs
        .claim("other", LEASE, attempts, now_ms())
        .await
        .unwrap()
        .unwrap();
    assert_eq!((other.job.id, other.fence), (running.id, 2));
    // Makes the worker look at its lease now.
    running.jobs.cancel(running.id, now_ms()).await.unwrap();
    running.task.await.unwrap();
    until_gone(&pid).await;
    let job = running.jobs.get(running.id).await.unwrap().unwrap();
    assert_eq!((job.state, job.attempts), (State::Running, 2));
}
