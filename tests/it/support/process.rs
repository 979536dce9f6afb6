//! Running programs: to their end within a limit, or in the background until dropped.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::sync::{LazyLock, Mutex};
use std::time::{Duration, Instant};

/// What a program printed, and how it ended.
#[derive(Debug)]
pub struct Ran {
    pub status: ExitStatus,
    pub stdout: String,
    pub stderr: String,
}

impl Ran {
    /// Fails the test, showing everything, unless the program succeeded.
    #[track_caller]
    pub fn success(self) -> Self {
        assert!(
            self.status.success(),
            "{}\n--- stdout\n{}\n--- stderr\n{}",
            self.status,
            self.stdout,
            self.stderr
        );
        self
    }

    /// Fails the test, showing everything, if the program succeeded or died of a signal.
    #[track_caller]
    pub fn failure(self) -> Self {
        assert!(
            self.status.code().is_some_and(|code| code != 0),
            "expected a failure, got {}\n--- stdout\n{}\n--- stderr\n{}",
            self.status,
            self.stdout,
            self.stderr
        );
        self
    }

    /// Fails the test unless standard error has the text.
    #[track_caller]
    pub fn says(self, text: &str) -> Self {
        assert!(
            self.stderr.contains(text),
            "{text:?} is not in standard error:\n{}",
            self.stderr
        );
        self
    }

    /// Fails the test if standard error has the text.
    #[track_caller]
    pub fn does_not_say(self, text: &str) -> Self {
        assert!(
            !self.stderr.contains(text),
            "{text:?} is in standard error:\n{}",
            self.stderr
        );
        self
    }
}

/// Runs a program to its end; kills it, and fails, after ten minutes.
#[track_caller]
pub fn run(command: &mut Command) -> Ran {
    run_reading(command, Stdio::null())
}

/// The same with a standard input.
#[track_caller]
pub fn run_reading(command: &mut Command, stdin: Stdio) -> Ran {
    // Files, not pipes: nobody need read while we wait, and a grandchild that outlives the child
    // cannot keep us here.
    let mut stdout = tempfile::tempfile().expect("TMPDIR is writable");
    let mut stderr = tempfile::tempfile().expect("TMPDIR is writable");
    let mut child = command
        .stdin(stdin)
        .stdout(stdout.try_clone().expect("a descriptor"))
        .stderr(stderr.try_clone().expect("a descriptor"))
        .spawn()
        .unwrap_or_else(|e| panic!("{}: {e}", command.get_program().display()));
    let deadline = Instant::now() + Duration::from_secs(600);
    let status = loop {
        if let Some(status) = child.try_wait().expect("our child") {
            break status;
        }
        if Instant::now() > deadline {
            let _ = child.kill();
            let _ = child.wait();
            panic!(
                "still running after ten minutes: {command:?}\n--- stderr\n{}",
                text(&mut stderr)
            );
        }
        std::thread::sleep(Duration::from_millis(10));
    };
    Ran {
        status,
        stdout: text(&mut stdout),
        stderr: text(&mut stderr),
    }
}

fn text(file: &mut File) -> String {
    let mut bytes = Vec::new();
    file.seek(SeekFrom::Start(0)).expect("a plain file");
    file.read_to_end(&mut bytes).expect("a plain file");
    String::from_utf8_lossy(&bytes).into_owned()
}

/// A program in the background. Dropped, it is killed, by its process ID, and waited for.
#[derive(Debug)]
pub struct Daemon {
    child: Child,
    log: PathBuf,
}

impl Daemon {
    /// Starts a program; both its outputs go to `log`, appended.
    pub fn start(command: Command, log: &Path) -> Self {
        let open = || {
            File::options()
                .append(true)
                .create(true)
                .open(log)
                .expect("the log's directory is ours")
        };
        // Dies with the test run, also where that is killed.
        let mut wrapped = Command::new("setpriv");
        wrapped.args(["--pdeathsig", "KILL", "--"]);
        wrapped.arg(command.get_program()).args(command.get_args());
        for (name, value) in command.get_envs() {
            match value {
                Some(value) => wrapped.env(name, value),
                None => wrapped.env_remove(name),
            };
        }
        if let Some(dir) = command.get_current_dir() {
            wrapped.current_dir(dir);
        }
        wrapped.stdin(Stdio::null()).stdout(open()).stderr(open());
        Self {
            child: spawn(wrapped),
            log: log.to_path_buf(),
        }
    }

    /// What it has printed so far.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    /// Waits until `find` finds what it looks for in the log.
    #[track_caller]
    pub fn wait_for<T>(&mut self, what: &str, find: impl Fn(&str) -> Option<T>) -> T {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let log = self.log();
            if let Some(found) = find(&log) {
                return found;
            }
            if let Some(status) = self.child.try_wait().expect("our child") {
                panic!("ended ({status}) before {what}:\n{log}");
            }
            assert!(
                Instant::now() < deadline,
                "no {what} within a minute:\n{log}"
            );
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Kills it at once (SIGKILL) and waits until it is gone.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Asks it to end (SIGTERM) and waits until it has.
    #[track_caller]
    pub fn terminate(&mut self) -> ExitStatus {
        let pid = i32::try_from(self.child.id())
            .ok()
            .and_then(rustix::process::Pid::from_raw)
            .expect("a process ID");
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).expect("our child");
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            if let Some(status) = self.child.try_wait().expect("our child") {
                return status;
            }
            assert!(
                Instant::now() < deadline,
                "still there a minute after SIGTERM:\n{}",
                self.log()
            );
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.kill();
        if std::thread::panicking() {
            eprintln!("--- {}\n{}", self.log.display(), self.log());
        }
    }
}

/// Spawns from a thread that never ends: the kernel sends the parent-death signal when the
/// *thread* that forked ends, and tests run in threads that do not last.
fn spawn(command: Command) -> Child {
    type Request = (Command, mpsc::Sender<std::io::Result<Child>>);
    static SPAWNER: LazyLock<Mutex<mpsc::Sender<Request>>> = LazyLock::new(|| {
        let (requests, inbox) = mpsc::channel::<Request>();
        std::thread::spawn(move || {
            for (mut command, reply) in inbox {
                let _ = reply.send(command.spawn());
            }
        });
        Mutex::new(requests)
    });
    let (reply, answer) = mpsc::channel();
    SPAWNER
        .lock()
        .expect("no panic while held")
        .send((command, reply))
        .expect("the thread never ends");
    answer
        .recv()
        .expect("the thread never ends")
        .unwrap_or_else(|e| panic!("setpriv: {e}"))
}
