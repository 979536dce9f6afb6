//! RUN → one process in a sandbox; what it changed is a layer.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use anyhow::Context as _;
use rustix::fs::Mode;

use super::mask::Masked;
use super::mounts::{Mounts, Source};
use super::slot::Slot;
use super::user::Accounts;
use super::{Engine, StepFailed, stand_ins};
use crate::confined::ConfinedDir;
use crate::image::{DEFAULT_PATH, Platform};
use crate::plan::{Network, Run, Security, Ulimit};
use crate::progress::{BuildEvent, Stream};
use crate::rootfs::{MountPoint, Stack, Tree};
use crate::sandbox::{self, Bytes, MountSource, Outcome, Process, SandboxError};

/// The status of a step whose program is there and cannot be run.
const NOT_EXECUTABLE: i32 = 126;

/// Runs `run`, the step of this number for this platform, on top of `below`, with `sources` to
/// mount, and returns the tree of what it changed. `slot` is free when the process has
/// ended. Blocking.
pub(super) fn run(
    engine: &Arc<Engine>,
    run: &Run,
    (step, platform): (usize, &Platform),
    below: &Stack,
    sources: &[Source],
    mut slot: Slot,
) -> anyhow::Result<Arc<Tree>> {
    let sandbox = engine.sandbox()?;
    let accounts = Accounts::read(below).context("reading the image's accounts")?;
    let account = accounts
        .user(&run.user)
        .map_err(|reason| anyhow::anyhow!("USER {}: {reason}", run.user))?;

    let mounting = Instant::now();
    let devices = engine.devices.edits(&run.devices)?;
    for what in &devices.left_out {
        engine.warn(format!("step {step}: RUN --device: {what}"));
    }
    let mut mounts = Mounts::prepare(engine, run, sources, &mut slot)?;
    // What a device brings wins.
    let mut step_mounts = std::mem::take(&mut mounts.mounts);
    step_mounts.extend(devices.mounts);
    open_new_tmpfs(&mut step_mounts, below)?;
    let mut user = account.user;
    user.groups.extend(&devices.groups);
    let scratch = engine.store.tmp_dir("step-")?;
    let mut rootfs = engine.rootfs(below, &scratch)?;
    if let Some(inodes) = rootfs.inodes() {
        mounts.join_owners(inodes)?;
    }
    let process = Process {
        rootfs: rootfs.path().to_owned(),
        owners: rootfs.inodes().cloned(),
        args: run.args.iter().map(Into::into).collect(),
        env: environment(run, &account.home, &mounts.env, &devices.env),
        cwd: run.cwd.clone().into(),
        user,
        mounts: step_mounts,
        network: match run.network {
            Network::Default => sandbox::Network::Private,
            Network::None => sandbox::Network::None,
            Network::Host => sandbox::Network::Host,
        },
        hostname: run.hostname.clone(),
        extra_hosts: run.extra_hosts.clone(),
        security: match run.security {
            Security::Sandbox => sandbox::Security::Sandbox,
            Security::Insecure => sandbox::Security::Insecure,
        },
        devices: devices.devices,
        shm_size: run.shm_size,
        ulimits: run.ulimits.iter().map(ulimit).collect(),
        limits: engine.limits.clone(),
        written_dir: Some(rootfs.written_dir()),
    };
    make_cwd(rootfs.path(), &process.cwd)?;
    let points = sandbox::mount_points(&process).into_iter();
    let points: Vec<_> = points
        .map(|point| MountPoint {
            path: point.path,
            is_dir: point.is_dir,
        })
        .collect();
    rootfs.prepare_mount_points(&points)?;
    stand_ins::put(engine, step, sandbox, &process, &mounts, &mut rootfs)?;
    engine.timings.add("mount", mounting.elapsed());

    slot.retake(&engine.cancel)?;
    let running = Instant::now();
    let mut tail = Tail::default();
    let say = |stream, bytes: &[u8]| {
        let text = String::from_utf8_lossy(bytes).into_owned();
        engine
            .progress
            .event(BuildEvent::StepOutput { step, stream, text });
    };
    let (mut stdout, mut stderr) = (Output::default(), Output::default());
    let mut clip = Clip::new(engine.limits.output_bytes);
    let outcome = {
        let mut sink = |stream, bytes: &[u8]| {
            let output = match stream {
                Stream::Stdout => &mut stdout,
                Stream::Stderr => &mut stderr,
            };
            let mut notices = Vec::new();
            output.masked.add(&mounts.secrets, bytes, |bytes| {
                tail.add(bytes);
                let (bytes, notice) = clip.cut(bytes);
                output.lines.add(bytes, |bytes| say(stream, bytes));
                notices.extend(notice);
            });
            for notice in notices {
                // On a line of its own.
                output
                    .lines
                    .end(|bytes| say(stream, &[bytes, b"\n"].concat()));
                say(stream, notice.as_bytes());
            }
        };
        sandbox.run(&process, &mut sink, &engine.cancel)
    };
    for (stream, output) in [(Stream::Stdout, stdout), (Stream::Stderr, stderr)] {
        let Output {
            mut masked,
            mut lines,
        } = output;
        masked.end(&mounts.secrets, |bytes| {
            tail.add(bytes);
            let (bytes, _) = clip.cut(bytes);
            lines.add(bytes, |bytes| say(stream, bytes));
        });
        lines.end(|bytes| say(stream, bytes));
    }
    if clip.is_clipped() && !matches!(outcome, Ok(Outcome::Exited(0))) {
        // Why it failed is said at the end.
        say(Stream::Stderr, b"[the last lines of the output]\n");
        let last = tail.text() + "\n";
        last.split_inclusive('\n')
            .for_each(|line| say(Stream::Stderr, line.as_bytes()));
    }
    engine.timings.add("run", running.elapsed());
    drop(slot);
    // Before the caches among them are anybody else's.
    let taken_out = rootfs.take_out_stand_ins();
    mounts.finish();
    match outcome {
        Ok(Outcome::Exited(0)) => {}
        Ok(Outcome::Exited(status)) => {
            rootfs.discard();
            engine.check_cancelled()?;
            return Err(StepFailed {
                command: run.args.join(" "),
                status,
                tail: tail.text(),
                foreign: (status == NOT_EXECUTABLE
                    && engine.foreign.contains(&platform.architecture))
                .then(|| platform.clone()),
                limit: None,
            }
            .into());
        }
        Err(SandboxError::LimitReached(reached)) => {
            rootfs.discard();
            engine.check_cancelled()?;
            return Err(StepFailed {
                command: run.args.join(" "),
                status: reached.status(),
                tail: tail.text(),
                foreign: None,
                limit: Some(reached),
            }
            .into());
        }
        Err(error) => {
            rootfs.discard();
            return Err(error.into());
        }
    }
    taken_out?;
    let changed = rootfs.finish()?;
    Tree::open(&changed.upper).with_context(|| format!("opening {}", changed.upper.display()))
}

/// The step's environment: the stage's, what comes with its mounts, and what every process
/// needs. Secrets win over the stage's variables, an agent's socket does not, and what
/// `devices` bring wins over all.
fn environment(
    run: &Run,
    home: &str,
    mounted: &[(String, Vec<u8>)],
    devices: &[String],
) -> Vec<OsString> {
    let mut env: Vec<OsString> = run.env.iter().map(Into::into).collect();
    env.extend(run.proxy_env.iter().map(Into::into));
    let name = |pair: &OsString| {
        pair.as_bytes()
            .split(|b| *b == b'=')
            .next()
            .map(<[u8]>::to_vec)
    };
    for (variable, value) in mounted {
        let is_it = |pair: &OsString| name(pair).as_deref() == Some(variable.as_bytes());
        if variable == "SSH_AUTH_SOCK" && env.iter().any(is_it) {
            continue;
        }
        env.retain(|pair| !is_it(pair));
        let pair = [variable.as_bytes(), b"=", value].concat();
        env.push(OsString::from_vec(pair));
    }
    for pair in devices {
        let pair = OsString::from(pair);
        env.retain(|other| name(other) != name(&pair));
        env.push(pair);
    }
    let has = |env: &[OsString], wanted: &str| {
        env.iter()
            .any(|pair| name(pair).as_deref() == Some(wanted.as_bytes()))
    };
    if !has(&env, "PATH") {
        env.push(format!("PATH={DEFAULT_PATH}").into());
    }
    if !has(&env, "HOME") {
        env.push(format!("HOME={home}").into());
    }
    env
}

/// The mode of an empty directory in memory that covers nothing, as the kernel has it.
const TMPFS_MODE: u32 = 0o1777;

/// A tmpfs has the mode of the directory that it covers. Where the image has none, anybody
/// may write to it; the directory that is made for it does not count.
fn open_new_tmpfs(mounts: &mut [sandbox::Mount], below: &Stack) -> anyhow::Result<()> {
    for mount in mounts {
        if let MountSource::Tmpfs { mode, .. } = &mut mount.source
            && mode.is_none()
            && below.lookup(&mount.target, true)?.is_none()
        {
            *mode = Some(TMPFS_MODE);
        }
    }
    Ok(())
}

fn ulimit(limit: &Ulimit) -> sandbox::Ulimit {
    sandbox::Ulimit {
        name: limit.name.clone(),
        soft: limit.soft,
        hard: limit.hard,
    }
}

/// A base image may name a working directory that it does not have; runc makes it too.
fn make_cwd(root: &Path, cwd: &Path) -> anyhow::Result<()> {
    let root = ConfinedDir::open(root).context("opening the root filesystem")?;
    root.create_dir_all(cwd, Mode::from_raw_mode(0o755))
        .with_context(|| format!("making the working directory {}", cwd.display()))
}

/// How long a line may be before its parts are passed on.
const LINE_BYTES: usize = 4096;

/// One stream of what a step prints, on its way to whoever reads it.
#[derive(Default)]
struct Output {
    masked: Masked,
    lines: Lines,
}

/// Holds back the begin of a line until its end comes: programs that write a line in
/// pieces would otherwise have it torn apart between those of other steps.
#[derive(Default)]
struct Lines(Vec<u8>);

impl Lines {
    fn add(&mut self, bytes: &[u8], say: impl Fn(&[u8])) {
        self.0.extend_from_slice(bytes);
        // A carriage return ends a line that is drawn over, as progress bars are.
        let end = self
            .0
            .iter()
            .rposition(|b| matches!(b, b'\n' | b'\r'))
            .map(|at| at + 1);
        let ready = end.or((self.0.len() > LINE_BYTES).then_some(self.0.len()));
        if let Some(ready) = ready {
            let rest = self.0.split_off(ready);
            let whole = std::mem::replace(&mut self.0, rest);
            whole.split_inclusive(|b| *b == b'\n').for_each(say);
        }
    }

    fn end(&mut self, say: impl Fn(&[u8])) {
        if !self.0.is_empty() {
            say(&std::mem::take(&mut self.0));
        }
    }
}

/// What of a step's output is shown: all, or its begin.
#[derive(Debug)]
struct Clip {
    limit: Option<u64>,
    shown: u64,
}

impl Clip {
    fn new(limit: Option<u64>) -> Self {
        Self { limit, shown: 0 }
    }

    /// Whether something was not shown.
    fn is_clipped(&self) -> bool {
        self.limit.is_some_and(|limit| self.shown > limit)
    }

    /// The part of `bytes` that is shown, and, where the limit is reached, what is said of that in
    /// BuildKit's words.
    fn cut<'b>(&mut self, bytes: &'b [u8]) -> (&'b [u8], Option<String>) {
        let Some(limit) = self.limit else {
            return (bytes, None);
        };
        let left = limit.saturating_sub(self.shown);
        let was_within = !self.is_clipped();
        self.shown = self.shown.saturating_add(bytes.len() as u64);
        if self.shown <= limit {
            return (bytes, None);
        }
        let kept = usize::try_from(left).map_or(bytes, |left| &bytes[..left.min(bytes.len())]);
        let notice = || format!("[output clipped, log limit {} reached]\n", Bytes(limit));
        (kept, was_within.then(notice))
    }
}

/// How many bytes of a step's output its error repeats.
const TAIL_BYTES: usize = 2048;

/// The end of what a step printed.
#[derive(Default)]
struct Tail(Vec<u8>);

impl Tail {
    fn add(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
        if self.0.len() > 2 * TAIL_BYTES {
            self.0.drain(..self.0.len() - TAIL_BYTES);
        }
    }

    /// The last lines.
    fn text(&self) -> String {
        let text = String::from_utf8_lossy(&self.0);
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(10)..].join("\n")
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    #[test]
    fn lines_come_whole() {
        let said = RefCell::new(Vec::new());
        let say = |bytes: &[u8]| {
            said.borrow_mut()
                .push(String::from_utf8_lossy(bytes).into_owned())
        };
        let mut lines = Lines::default();
        for piece in ["E", ": ", "no\n\nne", "xt\n10%\r", "20%"] {
            lines.add(piece.as_bytes(), say);
        }
        assert_eq!(*said.borrow(), ["E: no\n", "\n", "next\n", "10%\r"]);
        lines.end(say);
        lines.end(say);
        assert_eq!(said.borrow().last().map(String::as_str), Some("20%"));
        assert_eq!(said.borrow().len(), 5);
        lines.add(&[b'x'; LINE_BYTES + 1], say);
        assert_eq!(said.borrow().last().map(String::len), Some(LINE_BYTES + 1));
    }

    #[test]
    fn output_is_clipped_once() {
        let mut all = Clip::new(None);
        assert_eq!(all.cut(b"much"), (&b"much"[..], None));
        let notice = Some("[output clipped, log limit 5B reached]\n".to_owned());
        let mut clip = Clip::new(Some(5));
        assert_eq!(clip.cut(b"abc"), (&b"abc"[..], None));
        assert_eq!(clip.cut(b"de"), (&b"de"[..], None));
        assert!(!clip.is_clipped());
        assert_eq!(clip.cut(b"f"), (&b""[..], notice.clone()));
        assert_eq!(clip.cut(b"g"), (&b""[..], None));
        assert!(clip.is_clipped());
        let mut clip = Clip::new(Some(5));
        assert_eq!(clip.cut(b"abcdefgh"), (&b"abcde"[..], notice));
        assert_eq!(clip.cut(b"i"), (&b""[..], None));
        let mut none = Clip::new(Some(0));
        assert_eq!(none.cut(b"a").0, b"");
    }

    #[test]
    fn the_tail_is_the_last_lines() {
        let mut tail = Tail::default();
        for number in 0..10_000 {
            tail.add(format!("line {number}\n").as_bytes());
        }
        let text = tail.text();
        assert_eq!(text.lines().count(), 10);
        assert_eq!(text.lines().last(), Some("line 9999"));
    }
}
