//! A job's child process: its command line, its life and its output.
//!
//! The child leads a process group of its own, so that it and what it started can be
//! ended together. It is started and waited for by a thread that lives as long as it
//! does: the kernel's "tell me when my parent dies" (which the child asks for when
//! given `--die-with-parent`) is about the thread that started it, not the process.

#![allow(
    clippy::disallowed_methods,
    reason = "each job is a child process, started here"
)]

use std::ffi::OsString;
use std::io::{self, BufRead, BufReader, Read};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process_group, waitid};
use tokio::sync::{mpsc, oneshot};

use super::source::Prepared;
use crate::config::ServiceConfig;
use crate::progress::Stream;

/// The longest line that is taken in one piece, in bytes. Longer ones come in several.
const LINE_LIMIT: u64 = 256 * 1024;

/// How many lines wait between the child's pipes and the log.
const LINES: usize = 64;

/// The variables that a child sees, apart from `XDG_…`. None of them is a secret.
const VARIABLES: [&str; 5] = [
    "PATH",
    "HOME",
    "DOCKER_CONFIG",
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
];

/// A line that the child printed, without its line end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Line {
    pub(crate) stream: Stream,
    pub(crate) bytes: Vec<u8>,
}

/// The arguments of `sockless` that build and push one job.
pub(crate) fn arguments(config: &ServiceConfig, root: &Path, prepared: &Prepared) -> Vec<OsString> {
    let mut arguments: Vec<OsString> = vec!["build".into()];
    let mut flag = |name: &str, value: OsString| {
        // One argument, so that no value can be taken for a flag.
        let mut argument = OsString::from(format!("--{name}="));
        argument.push(value);
        arguments.push(argument);
    };
    // Relative to the context, which the child starts in: messages point into the
    // repository, not into a directory that is gone when they are read.
    let dockerfile = prepared.dockerfile.strip_prefix(&prepared.context);
    flag("file", dockerfile.unwrap_or(&prepared.dockerfile).into());
    flag("tag", prepared.image.to_string().into());
    flag("progress", "rawjson".into());
    flag("root", root.into());
    flag("sandbox", config.build.sandbox_name().into());
    flag("rootfs", config.build.rootfs_name().into());
    if config.build.allow_old_runc {
        flag("allow-old-runc", "true".into());
    }
    let limits = &config.build.limits;
    let limits = [
        ("memory", limits.memory.map(|bytes| bytes.to_string())),
        ("cpus", limits.cpus.map(|cpus| cpus.to_string())),
        ("pids-limit", limits.pids.map(|pids| pids.to_string())),
        (
            "step-timeout",
            limits.timeout.map(|time| format!("{}s", time.as_secs())),
        ),
        ("output-limit", limits.output.map(|bytes| bytes.to_string())),
        ("disk-limit", limits.disk.map(|bytes| bytes.to_string())),
    ];
    for (name, value) in limits {
        if let Some(value) = value {
            flag(name, value.into());
        }
    }
    for mirror in &config.build.mirrors {
        flag("registry-mirror", mirror.into());
    }
    for registry in &config.build.insecure {
        flag("insecure-registry", registry.into());
    }
    for file in &config.build.ca_files {
        flag("registry-ca", file.into());
    }
    if let Some(limit) = config.build.store_limit {
        flag("store-limit", limit.to_string().into());
    }
    if !config.build.allow_weak_isolation {
        arguments.push("--require-isolation".into());
    }
    // Whoever writes the Dockerfile shall not read what this machine can.
    if !config.build.private_sources {
        arguments.push("--public-sources-only".into());
    }
    arguments.push("--push".into());
    // The build ends when this service does, however it does.
    arguments.push("--die-with-parent".into());
    arguments.push(".".into());
    arguments
}

/// The environment of a child, picked from this process's.
pub(crate) fn environment(
    config: &ServiceConfig,
    variables: impl Iterator<Item = (OsString, OsString)>,
) -> Vec<(OsString, OsString)> {
    let mut kept: Vec<_> = variables
        .filter(|(name, _)| {
            let name = name.as_encoded_bytes();
            name.starts_with(b"XDG_") || VARIABLES.iter().any(|kept| kept.as_bytes() == name)
        })
        .collect();
    if let Some(directory) = &config.build.docker_config {
        kept.retain(|(name, _)| name != "DOCKER_CONFIG");
        kept.push(("DOCKER_CONFIG".into(), directory.into()));
    }
    kept
}

/// A running child. Dropping it kills its process group.
#[derive(Debug)]
pub(crate) struct Child {
    group: Group,
    exit: oneshot::Receiver<io::Result<ExitStatus>>,
}

impl Child {
    /// Starts `program` in a process group of its own, with nothing to read and only
    /// the given environment. What it prints ends when nobody holds its pipes any more.
    ///
    /// # Errors
    /// Those of `execve(2)` and of starting a thread.
    pub(crate) async fn spawn(
        program: &Path,
        arguments: &[OsString],
        environment: Vec<(OsString, OsString)>,
        directory: &Path,
    ) -> io::Result<(Self, mpsc::Receiver<Line>)> {
        let mut command = Command::new(program);
        command
            .args(arguments)
            .env_clear()
            .envs(environment)
            .current_dir(directory)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0);
        let (started, start) = oneshot::channel();
        let (ended, exit) = oneshot::channel();
        let (sender, lines) = mpsc::channel(LINES);
        thread::Builder::new()
            .name("build-child".to_owned())
            .spawn(move || live(command, started, ended, sender))?;
        let group = start
            .await
            .map_err(|_| io::Error::other("the thread that starts it ended early"))??;
        Ok((Self { group, exit }, lines))
    }

    /// Sends `signal` to the whole group; nothing where the child has ended.
    pub(crate) fn signal(&self, signal: Signal) {
        self.group.signal(signal);
    }

    /// Waits for the end of the child. Whatever else was in its group is killed then.
    ///
    /// # Errors
    /// Those of `waitid(2)`. Must not be called again after it returned.
    pub(crate) async fn exit(&mut self) -> io::Result<ExitStatus> {
        (&mut self.exit)
            .await
            .map_err(|_| io::Error::other("the thread that waits for it ended early"))?
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        self.group.signal(Signal::KILL);
    }
}

/// A process group that is signalled only as long as its leader is not reaped: after
/// that its number may be somebody else's.
#[derive(Clone, Debug)]
struct Group(Arc<Mutex<Option<Pid>>>);

impl Group {
    fn signal(&self, signal: Signal) {
        let leader = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(leader) = *leader {
            // Fails only when all of the group are gone.
            let _ = kill_process_group(leader, signal);
        }
    }

    /// Kills what is left of the group, then forgets it.
    fn end(&self) {
        self.signal(Signal::KILL);
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

/// The thread of one child, from its start to its end.
fn live(
    mut command: Command,
    started: oneshot::Sender<io::Result<Group>>,
    ended: oneshot::Sender<io::Result<ExitStatus>>,
    lines: mpsc::Sender<Line>,
) {
    let mut child = match command.spawn() {
        Ok(child) => child,
        Err(error) => {
            let _ = started.send(Err(error));
            return;
        }
    };
    let leader = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    let group = Group(Arc::new(Mutex::new(leader)));
    // Readers of their own, not waited for: a process that left the group may hold a
    // pipe open for ever.
    if let Some(stdout) = child.stdout.take() {
        let lines = lines.clone();
        thread::spawn(move || read_lines(Stream::Stdout, stdout, &lines));
    }
    if let Some(stderr) = child.stderr.take() {
        thread::spawn(move || read_lines(Stream::Stderr, stderr, &lines));
    }
    if started.send(Ok(group.clone())).is_err() {
        // Nobody waits for it any more.
        group.signal(Signal::KILL);
    }
    if let Some(leader) = leader {
        // Without reaping it, so that the group's number stays taken until it was killed.
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
        while let Err(rustix::io::Errno::INTR) = waitid(WaitId::Pid(leader), options) {}
    }
    group.end();
    let _ = ended.send(child.wait());
}

fn read_lines(stream: Stream, pipe: impl Read, lines: &mpsc::Sender<Line>) {
    let mut pipe = BufReader::new(pipe);
    loop {
        let mut bytes = Vec::new();
        let read = (&mut pipe).take(LINE_LIMIT).read_until(b'\n', &mut bytes);
        match read {
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
        if bytes.last() == Some(&b'\n') {
            bytes.pop();
        }
        if lines.blocking_send(Line { stream, bytes }).is_err() {
            return;
        }
    }
}

/// How a process ended, in words: `ended with status 2`.
pub(crate) fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("ended with status {code}"),
        (None, Some(9)) => "was killed by signal 9, perhaps for want of memory".to_owned(),
        (None, Some(signal)) => format!("was ended by signal {signal}"),
        (None, None) => "ended in an unknown way".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::super::tests::{config, until_gone};
    use super::*;
    use crate::image::Reference;

    #[test]
    fn security_s21_the_command_line_is_complete_and_values_are_no_flags() {
        let dir = tempfile::tempdir().unwrap();
        let mut config = config(dir.path());
        config.build.mirrors = vec!["docker.io=https://m.example".to_owned()];
        config.build.insecure = vec!["r.example:5000".to_owned()];
        config.build.ca_files = vec![PathBuf::from("/ca.pem")];
        config.build.store_limit = Some(5 << 30);
        config.build.allow_old_runc = true;
        config.build.limits.cpus = Some(1.5);
        config.build.limits.timeout = Some(std::time::Duration::from_secs(90));
        config.build.limits.pids = None;
        let prepared = Prepared {
            context: PathBuf::from("/job/context"),
            dockerfile: PathBuf::from("/job/context/Dockerfile"),
            image: Reference::parse("r.example:5000/a:1").unwrap(),
        };
        let expected = [
            "build",
            "--file=Dockerfile",
            "--tag=r.example:5000/a:1",
            "--progress=rawjson",
            "--root=/store",
            "--sandbox=auto",
            "--rootfs=auto",
            "--allow-old-runc=true",
            "--memory=4294967296",
            "--cpus=1.5",
            "--step-timeout=90s",
            "--output-limit=4194304",
            "--disk-limit=21474836480",
            "--registry-mirror=docker.io=https://m.example",
            "--insecure-registry=r.example:5000",
            "--registry-ca=/ca.pem",
            "--store-limit=5368709120",
            "--require-isolation",
            "--public-sources-only",
            "--push",
            "--die-with-parent",
            ".",
        ];
        assert_eq!(arguments(&config, Path::new("/store"), &prepared), expected);
    }

    #[test]
    fn no_secret_variable_reaches_the_child() {
        let dir = tempfile::tempdir().unwrap();
        let mut config = config(dir.path());
        let variables = || {
            [
                ("PATH", "/bin"),
                ("SOCKLESS_WEBHOOK_SECRET", "hunter2"),
                ("GITHUB_TOKEN", "hunter2"),
                ("XDG_RUNTIME_DIR", "/run"),
                ("DOCKER_CONFIG", "/d"),
            ]
            .map(|(k, v)| (OsString::from(k), OsString::from(v)))
            .into_iter()
        };
        let names = |kept: Vec<(OsString, OsString)>| {
            kept.into_iter()
                .map(|(k, v)| format!("{}={}", k.display(), v.display()))
                .collect::<Vec<_>>()
        };
        assert_eq!(
            names(environment(&config, variables())),
            ["PATH=/bin", "XDG_RUNTIME_DIR=/run", "DOCKER_CONFIG=/d"]
        );
        config.build.docker_config = Some(PathBuf::from("/own"));
        assert_eq!(
            names(environment(&config, variables())),
            ["PATH=/bin", "XDG_RUNTIME_DIR=/run", "DOCKER_CONFIG=/own"]
        );
    }

    async fn sh(script: &str) -> (Child, mpsc::Receiver<Line>) {
        let arguments = ["-c".into(), script.into()];
        let path = std::env::var_os("PATH").unwrap();
        let environment = vec![("PATH".into(), path)];
        Child::spawn(
            Path::new("/bin/sh"),
            &arguments,
            environment,
            Path::new("/"),
        )
        .await
        .unwrap()
    }

    #[tokio::test]
    async fn output_and_status_arrive() {
        let script = "read x; echo out-$x; sleep 0.1; printf 'err\\n\\377' >&2; exit 3";
        let (mut child, mut printed) = sh(script).await;
        let mut lines = Vec::new();
        while let Some(line) = printed.recv().await {
            lines.push((line.stream, line.bytes));
        }
        let expected = [
            (Stream::Stdout, b"out-".to_vec()),
            (Stream::Stderr, b"err".to_vec()),
            (Stream::Stderr, b"\xff".to_vec()),
        ];
        assert_eq!(lines, expected);
        let status = child.exit().await.unwrap();
        assert_eq!(describe(status), "ended with status 3");
    }

    #[tokio::test]
    async fn the_group_dies_with_its_leader() {
        // The sleeper holds the pipe: were it alive, the lines would not end.
        let (mut child, mut lines) = sh("sleep 1000 & echo $!").await;
        let pid = lines.recv().await.unwrap().bytes;
        assert!(child.exit().await.unwrap().success());
        assert_eq!(lines.recv().await, None);
        until_gone(std::str::from_utf8(&pid).unwrap()).await;
    }

    #[tokio::test]
    async fn a_dropped_child_is_killed() {
        let (child, mut lines) = sh("echo ready; exec sleep 1000").await;
        lines.recv().await.unwrap();
        drop(child);
        assert_eq!(lines.recv().await, None);
    }

    #[tokio::test]
    async fn a_missing_program_is_an_error() {
        let error = Child::spawn(Path::new("/none"), &[], Vec::new(), Path::new("/"))
            .await
            .unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }
}
