//! [`choose`]: which sandbox works here, found out by running something in it; and the
//! part of [`Sandbox::run`] that happens in this process.

use std::ffi::OsString;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::sync::OnceLock;
use std::thread::JoinHandle;

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use rustix::pipe::PipeFlags;
use rustix::process::Pid;
use serde::Deserialize;

use super::chroot::{self, Chroot};
use super::guard::{self, Hold};
use super::networks::Networks;
use super::output::{Ears, Heard, listen};
use super::wire::{Attachment, Failure, Launch, Part, Purpose, Runtime, RuntimeKind};
use super::{
    Cancel, Choice, Content, Device, Limits, Mount, MountSource, Network, Outcome, OutputSink,
    Process, Refusal, Sandbox, SandboxError, Security, Ulimit, User, World, doctor, hosts, init,
    network, seccomp, supervise, tracer, userns, version,
};
use crate::owners::{Inodes, Owner};
use crate::progress::Stream;

/// Finds a sandbox that works here, by running nothing in it.
///
/// [`Choice::Auto`] takes the first of bubblewrap, runc and crun that works; in a [`World`] without
/// namespaces, in which none of them can, chroot. A way to make a private network is tried, too;
/// without one, [`Sandbox::notes`] says that steps get the host's. Takes some ten milliseconds; call it only when there is something to run.
///
/// A runc with known holes is refused unless `allow_old_runc`.
///
/// `scratch` is a directory for what it is tried with, which somebody removes should this process
/// be killed.
///
/// # Errors
/// [`SandboxError::Unavailable`] with the reason for each that was tried.
pub fn choose(
    choice: Choice,
    allow_old_runc: bool,
    world: &World,
    scratch: &Path,
) -> Result<Box<dyn Sandbox>, SandboxError> {
    let kinds: &[RuntimeKind] = match choice {
        Choice::Auto if matches!(world, World::Chroot { .. }) => &[RuntimeKind::Chroot],
        Choice::Auto => &[RuntimeKind::Bwrap, RuntimeKind::Runc, RuntimeKind::Crun],
        Choice::Bwrap => &[RuntimeKind::Bwrap],
        Choice::Runc => &[RuntimeKind::Runc],
        Choice::Crun => &[RuntimeKind::Crun],
        Choice::Chroot => &[RuntimeKind::Chroot],
        Choice::Youki => &[RuntimeKind::Youki],
    };
    let mut refusals = Vec::new();
    for &kind in kinds {
        let probed: Result<Box<dyn Sandbox>, SandboxError> = match kind {
            RuntimeKind::Chroot => Chroot::probe(scratch).map(|sandbox| Box::new(sandbox) as _),
            _ => Contained::probe(kind, allow_old_runc, scratch)
                .map(|sandbox| Box::new(sandbox) as _),
        };
        match probed {
            Ok(sandbox) => return Ok(sandbox),
            Err(SandboxError::Refused { refusal, .. }) => refusals.push(refusal),
            Err(SandboxError::Mount { target, reason }) => refusals.push(Refusal::Failed {
                program: kind.name(),
                message: format!("mounting {target}: {reason}"),
            }),
            Err(SandboxError::Asked { doing, reason }) => refusals.push(Refusal::Failed {
                program: kind.name(),
                message: format!("{doing}: {reason}"),
            }),
            Err(SandboxError::Lost { sandbox }) => refusals.push(Refusal::Failed {
                program: sandbox,
                message: "it ended without a word".to_owned(),
            }),
            Err(other) => return Err(other),
        }
    }
    Err(SandboxError::Unavailable(refusals))
}

/// A sandbox that was seen to work.
#[derive(Debug)]
struct Contained {
    runtime: Runtime,
    /// What makes private networks; without it, private is the host's.
    networks: Option<Networks>,
    /// Why there is none.
    shared_network: Option<String>,
    notes: Vec<String>,
}

impl Contained {
    fn probe(
        kind: RuntimeKind,
        allow_old_runc: bool,
        scratch: &Path,
    ) -> Result<Self, SandboxError> {
        let refused = |refusal| SandboxError::Refused {
            sandbox: kind.name(),
            refusal,
        };
        let program = userns::find_program(kind.name()).ok_or_else(|| {
            refused(Refusal::NotInstalled {
                program: kind.name(),
            })
        })?;
        if kind == RuntimeKind::Runc && !allow_old_runc {
            version::check_runc(&program).map_err(refused)?;
        }
        let runtime = Runtime { kind, program };
        probe(&runtime, scratch)?;
        let mut reasons = Vec::new();
        let mut networks = None;
        for helper in network::installed_helpers() {
            match Networks::start(&runtime, helper, scratch) {
                Ok(started) => {
                    networks = Some(started);
                    break;
                }
                Err(SandboxError::Refused {
                    refusal: Refusal::Network { message, .. },
                    ..
                }) => reasons.push(message),
                Err(other) => return Err(other),
            }
        }
        if networks.is_none() && reasons.is_empty() {
            reasons.push("neither pasta nor slirp4netns is installed".to_owned());
        }
        let mut notes = Vec::new();
        if kind == RuntimeKind::Bwrap {
            notes.push("bwrap: setuid programs gain no privileges in RUN steps".to_owned());
        }
        if kind == RuntimeKind::Crun && userns::is_initial() {
            notes.push("crun: RUN steps cannot make device nodes".to_owned());
        }
        notes.extend(seccomp::unfiltered_note());
        let shared_network = networks.is_none().then(|| {
            format!(
                "RUN steps share the host's network, its loopback included, for want of a \
                 private one ({})",
                reasons.join("; ")
            )
        });
        notes.extend(shared_network.clone());
        Ok(Self {
            runtime,
            networks,
            shared_network,
            notes,
        })
    }
}

impl Sandbox for Contained {
    fn name(&self) -> &str {
        self.runtime.kind.name()
    }

    fn notes(&self) -> Vec<String> {
        self.notes.clone()
    }

    fn private_network(&self) -> Result<(), String> {
        self.shared_network.clone().map_or(Ok(()), Err)
    }

    fn run(
        &self,
        process: &Process,
        output: OutputSink<'_>,
        cancel: &Cancel,
    ) -> Result<Outcome, SandboxError> {
        guard::run(process, output, cancel, |process, hold, output| {
            self.run_held(process, hold, output, cancel)
        })
    }
}

impl Contained {
    fn run_held(
        &self,
        process: &Process,
        hold: &Hold<'_>,
        output: OutputSink<'_>,
        cancel: &Cancel,
    ) -> Result<Outcome, SandboxError> {
        let attachment = match (process.network, &self.networks) {
            (Network::None, _) => Attachment::None,
            (Network::Private, None) | (Network::Host, _) => Attachment::Host,
            (Network::Private, Some(networks)) if Networks::suits(process) => {
                let network = networks.take(cancel)?;
                let launch = Launch {
                    network: Attachment::Held,
                    resolv_conf: network.resolv_conf().to_owned(),
                    ..launch(
                        &self.runtime,
                        process.clone(),
                        Attachment::None,
                        Purpose::Run,
                    )?
                };
                let outcome = run(&launch, Some(network.netns()), hold, output, cancel);
                // After anything unusual, nobody knows what is left of it.
                if outcome.is_ok() {
                    networks.give_back(network);
                }
                return outcome;
            }
            (Network::Private, Some(networks)) => Attachment::Private(networks.helper().clone()),
        };
        let launch = launch(&self.runtime, process.clone(), attachment, Purpose::Run)?;
        run(&launch, None, hold, output, cancel)
    }
}

/// Goes through everything but the last step, in an empty root filesystem.
fn probe(runtime: &Runtime, scratch: &Path) -> Result<(), SandboxError> {
    let io = |source| SandboxError::Io {
        doing: "making a root filesystem to try the sandbox with",
        source,
    };
    let rootfs = tempfile::tempdir_in(scratch).map_err(io)?;
    let process = nothing_in(rootfs.path());
    for point in super::mount_points(&process) {
        let path = point.path.strip_prefix("/").unwrap_or(&point.path);
        let path = rootfs.path().join(path);
        if point.is_dir {
            std::fs::create_dir_all(path).map_err(io)?;
        } else {
            std::fs::create_dir_all(path.parent().unwrap_or(rootfs.path())).map_err(io)?;
            std::fs::File::create(path).map_err(io)?;
        }
    }
    let launch = launch(runtime, process, Attachment::None, Purpose::Probe)?;
    let mut ignore = |_: Stream, _: &[u8]| {};
    let hold = Hold {
        alarm: None,
        doors: &[],
    };
    match run(&launch, None, &hold, &mut ignore, &Cancel::new())? {
        Outcome::Exited(0) => Ok(()),
        Outcome::Exited(status) => Err(SandboxError::Refused {
            sandbox: runtime.kind.name(),
            refusal: Refusal::Failed {
                program: runtime.kind.name(),
                message: format!("it ended with status {status} where 0 was expected"),
            },
        }),
    }
}

/// No process at all, in the root filesystem `rootfs`.
pub(super) fn nothing_in(rootfs: &Path) -> Process {
    Process {
        rootfs: rootfs.to_owned(),
        args: Vec::new(),
        env: Vec::new(),
        cwd: "/".into(),
        user: User::default(),
        mounts: Vec::new(),
        network: Network::None,
        hostname: "sockless".to_owned(),
        extra_hosts: Vec::new(),
        security: Security::Sandbox,
        devices: Vec::new(),
        shm_size: None,
        ulimits: Vec::new(),
        owners: None,
        limits: Limits::default(),
        written_dir: None,
    }
}

pub(super) fn launch(
    runtime: &Runtime,
    mut process: Process,
    network: Attachment,
    purpose: Purpose,
) -> Result<Launch, SandboxError> {
    let reach_host = hosts::want_gateway(&process.extra_hosts);
    let gateway = match reach_host {
        true => Some(
            network::own_address(&network).map_err(|error| SandboxError::Asked {
                doing: format!("finding the address of {}", hosts::HOST_GATEWAY),
                reason: format!("this machine has none to reach others from: {error}"),
            })?,
        ),
        false => None,
    };
    let file_owners = match process.owners {
        Some(_) => take_file_owners(&mut process.mounts),
        None => Vec::new(),
    };
    Ok(Launch {
        runtime: runtime.clone(),
        purpose,
        resolv_conf: network::resolv_conf(&network),
        hosts: hosts::text(&process.hostname, &process.extra_hosts, gateway),
        reach_host,
        old_mounts: userns::old_mounts().cloned(),
        is_traced: process.owners.is_some(),
        file_owners,
        network,
        process,
    })
}

/// Has files in memory belong to the only user there is; returns whom they should belong to.
fn take_file_owners(mounts: &mut [Mount]) -> Vec<(PathBuf, Owner)> {
    let mut owners = Vec::new();
    for mount in mounts {
        if let MountSource::File { uid, gid, .. } = &mut mount.source {
            let owner = Owner {
                uid: std::mem::take(uid),
                gid: std::mem::take(gid),
            };
            owners.push((mount.target.clone(), owner));
        }
    }
    owners
}

/// Starts the stages of `launch`; `netns` is a network that is held, `doors` lead into cgroups.
///
/// # Errors
/// [`SandboxError::Io`].
pub(super) fn start(
    launch: &Launch,
    netns: Option<&OwnedFd>,
    doors: &[OwnedFd],
) -> Result<(Child, Ears), SandboxError> {
    let exe = own_program().map_err(io("copying this program into memory"))?;
    let text = serde_json::to_vec(launch)
        .map_err(std::io::Error::from)
        .map_err(io("describing the step"))?;
    let launch_file = memory_file("sockless-launch", MemfdFlags::empty(), &mut &text[..])
        .map_err(io("describing the step"))?;
    let (log, far_log) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)
        .map_err(|error| io("making a pipe")(error.into()))?;
    let (socket, far_socket) = rustix::net::socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )
    .map_err(|error| io("making a socket")(error.into()))?;
    if launch.is_traced {
        rustix::net::sockopt::set_socket_passcred(&socket, true)
            .map_err(|error| io("preparing a socket")(error.into()))?;
    }
    let mut fds = vec![exe, &launch_file, &far_log];
    fds.extend(netns);
    let stage = match launch.runtime.kind {
        RuntimeKind::Chroot => "__chroot",
        _ => "__supervise",
    };
    fds.extend(doors);
    let mut child =
        supervise::start(stage, &fds, &socket, far_socket).map_err(io("starting the sandbox"))?;
    let (Some(stdout), Some(stderr)) = (child.stdout.take(), child.stderr.take()) else {
        unreachable!("both were asked for");
    };
    let ears = Ears {
        socket,
        stdout: stdout.into(),
        stderr: stderr.into(),
        log,
    };
    Ok((child, ears))
}

/// Says what was being done when it failed.
pub(super) fn io(doing: &'static str) -> impl Fn(std::io::Error) -> SandboxError {
    move |source| SandboxError::Io { doing, source }
}

pub(super) fn run(
    launch: &Launch,
    netns: Option<&OwnedFd>,
    hold: &Hold<'_>,
    output: OutputSink<'_>,
    cancel: &Cancel,
) -> Result<Outcome, SandboxError> {
    let sandbox = launch.runtime.kind.name();
    let waker = cancel.waker().map_err(io("making an event file"))?;
    if cancel.is_cancelled() {
        return Err(SandboxError::Cancelled);
    }
    let (mut child, ears) = start(launch, netns, hold.doors)?;
    let mut tracing = None;
    let heard = {
        use std::os::fd::AsFd;
        let mut traceable = |pid| {
            let inodes = launch.process.owners.clone().unwrap_or_default();
            tracing = Some(trace(pid, inodes, launch.file_owners.clone(), &ears)?);
            Ok(())
        };
        listen(&ears, waker.as_fd(), hold.alarm, output, &mut traceable)
    };
    if heard.is_err() {
        // Makes the supervisor kill everything.
        let _ = rustix::net::shutdown(&ears.socket, rustix::net::Shutdown::Both);
    }
    // Its last breath comes after that of all others.
    child.wait().map_err(io("waiting for the sandbox"))?;
    if let Some(tracing) = tracing
        && let Err(error) = tracing
            .join()
            .unwrap_or_else(|_| Err(std::io::Error::other("the thread that traces it has died")))
    {
        let refusal = Refusal::NotPermitted {
            program: "ptrace",
            message: error.to_string(),
        };
        return Err(SandboxError::Refused { sandbox, refusal });
    }
    conclude(sandbox, heard.map_err(io("reading the step's output"))?)
}

/// Traces `pid` on a thread of its own, until it has ended.
fn trace(
    pid: Pid,
    inodes: Inodes,
    files: Vec<(PathBuf, Owner)>,
    ears: &Ears,
) -> std::io::Result<JoinHandle<std::io::Result<()>>> {
    let socket = ears.socket.try_clone()?;
    let thread = std::thread::Builder::new().name("tracer".to_owned());
    thread.spawn(move || {
        use std::os::fd::AsFd;
        let traced = tracer::trace(pid, &inodes, &files, socket.as_fd());
        if traced.is_err() {
            // Makes the supervisor kill everything.
            let _ = rustix::net::shutdown(&socket, rustix::net::Shutdown::Both);
        }
        traced
    })
}

/// What came of it.
fn conclude(sandbox: &'static str, heard: Heard) -> Result<Outcome, SandboxError> {
    let log = String::from_utf8_lossy(&heard.log);
    let log = log.trim();
    if heard.cancelled {
        return Err(SandboxError::Cancelled);
    }
    if let Some(failure) = heard.failure {
        return Err(error_of(sandbox, failure));
    }
    match (heard.started, heard.exited) {
        (true, Some(status)) => Ok(Outcome::Exited(status)),
        (false, Some(status)) => {
            let message = match log {
                "" => format!("it ended with status {status} before the step began"),
                log => log.replace('\n', "; "),
            };
            // The words of a foreign program are all there is to tell the two apart.
            let refusal = if ["Operation not permitted", "operation not permitted"]
                .iter()
                .any(|words| message.contains(words))
            {
                Refusal::NotPermitted {
                    program: sandbox,
                    message,
                }
            } else {
                Refusal::Failed {
                    program: sandbox,
                    message,
                }
            };
            Err(SandboxError::Refused { sandbox, refusal })
        }
        (_, None) => Err(SandboxError::Lost { sandbox }),
    }
}

/// What it means that a stage failed.
pub(super) fn error_of(sandbox: &'static str, failure: Failure) -> SandboxError {
    let message = format!("{}: {}", failure.doing, failure.reason);
    let program = sandbox;
    let refusal = match (failure.part, failure.errno) {
        // That the kernel refuses every mount is no fault of this one.
        (Part::Mount(target), errno) if errno != Some(libc::EPERM) => {
            return SandboxError::Mount {
                target,
                reason: message,
            };
        }
        (Part::Asked, _) => {
            return SandboxError::Asked {
                doing: failure.doing,
                reason: failure.reason,
            };
        }
        (Part::Network, _) => Refusal::Network { program, message },
        (_, Some(libc::EPERM | libc::EACCES)) => Refusal::NotPermitted { program, message },
        _ => Refusal::Failed { program, message },
    };
    SandboxError::Refused { sandbox, refusal }
}

/// A copy of this program in memory that cannot be written.
///
/// It is what runs inside. A step that got hold of the file of the program that started
/// it (`/proc/1/exe`, an interpreter line `#!/proc/self/exe`) could otherwise write to the
/// program of the host: CVE-2019-5736.
fn own_program() -> std::io::Result<&'static OwnedFd> {
    static PROGRAM: OnceLock<OwnedFd> = OnceLock::new();
    if let Some(program) = PROGRAM.get() {
        return Ok(program);
    }
    let mut exe = std::fs::File::open("/proc/self/exe")?;
    // Kernels before 6.3 know no such flag, and let every memory file be executed.
    let program = match memory_file("sockless", MemfdFlags::EXEC, &mut exe) {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            exe = std::fs::File::open("/proc/self/exe")?;
            memory_file("sockless", MemfdFlags::empty(), &mut exe)?
        }
        result => result?,
    };
    // Two threads may have made one each; then one is closed again.
    Ok(PROGRAM.get_or_init(|| program))
}

/// Fills a memory file and seals it.
fn memory_file(name: &str, flags: MemfdFlags, content: &mut dyn Read) -> std::io::Result<OwnedFd> {
    let flags = flags | MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let mut file = std::fs::File::from(rustix::fs::memfd_create(name, flags)?);
    std::io::copy(content, &mut file)?;
    let seals = SealFlags::SEAL | SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE;
    rustix::fs::fcntl_add_seals(&file, seals)?;
    Ok(file.into())
}

/// Runs the stage of a sandbox that the command line names, if it names one, and exits.
///
/// `main` calls it before anything else: the stages are this program, started again with a
/// hidden first argument, and each expects to have one thread and no files open but those
/// it was given. Besides the stages there is `__sandbox`, which enters the namespaces and
/// runs the process that standard input describes in JSON; for tests and for `doctor`.
pub fn hidden_command() {
    let mut args = std::env::args_os().skip(1);
    let Some(name) = args.next() else { return };
    let rest: Vec<OsString> = args.collect();
    let status = match name.to_str() {
        Some("__idmap") => userns::idmap_main(&rest),
        Some("__supervise") => supervise::supervise_main(),
        Some("__chroot") => chroot::supervise_main(),
        Some("__reap") => supervise::reap_main(&rest),
        Some("__enter") => supervise::enter_main(&rest),
        Some("__init") => init::init_main(&rest),
        Some("__sandbox") => sandbox_main(),
        Some("__doctor") => doctor::rung_main(&rest),
        _ => return,
    };
    std::process::exit(status);
}

/// What `__sandbox` reads.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Request {
    #[serde(default)]
    sandbox: Choice,
    #[serde(default)]
    allow_old_runc: bool,
    rootfs: String,
    args: Vec<String>,
    #[serde(default)]
    env: Vec<String>,
    #[serde(default = "root_dir")]
    cwd: String,
    #[serde(default)]
    user: User,
    #[serde(default)]
    mounts: Vec<RequestMount>,
    #[serde(default = "no_network")]
    network: Network,
    #[serde(default)]
    extra_hosts: Vec<(String, String)>,
    #[serde(default)]
    security: Security,
    #[serde(default)]
    devices: Vec<RequestDevice>,
    shm_size: Option<u64>,
    #[serde(default)]
    ulimits: Vec<Ulimit>,
    #[serde(default)]
    limits: Limits,
    /// Cancels the step as soon as it has printed something.
    #[serde(default)]
    cancel_on_output: bool,
}

/// A mount in a [`Request`]: a file where it has content, a tmpfs where it has no source.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RequestMount {
    target: String,
    source: Option<String>,
    #[serde(default)]
    read_only: bool,
    size_bytes: Option<u64>,
    mode: Option<u32>,
    content: Option<String>,
    #[serde(default)]
    uid: u32,
    #[serde(default)]
    gid: u32,
}

/// A device in a [`Request`].
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RequestDevice {
    path: String,
    host_path: String,
}

fn root_dir() -> String {
    "/".to_owned()
}

fn no_network() -> Network {
    Network::None
}

impl Request {
    fn process(&self) -> Process {
        let os_strings = |strings: &[String]| strings.iter().map(OsString::from).collect();
        let mount = |mount: &RequestMount| Mount {
            target: mount.target.clone().into(),
            source: match (&mount.source, &mount.content) {
                (_, Some(content)) => MountSource::File {
                    content: Content(content.clone().into_bytes()),
                    uid: mount.uid,
                    gid: mount.gid,
                    mode: mount.mode.unwrap_or(0o400),
                },
                (Some(source), None) => MountSource::Bind(source.into()),
                (None, None) => MountSource::Tmpfs {
                    size_bytes: mount.size_bytes,
                    mode: mount.mode,
                },
            },
            read_only: mount.read_only,
        };
        let device = |device: &RequestDevice| Device {
            path: device.path.clone().into(),
            host_path: device.host_path.clone().into(),
            permissions: "rwm".to_owned(),
        };
        Process {
            rootfs: Path::new(&self.rootfs).to_owned(),
            args: os_strings(&self.args),
            env: os_strings(&self.env),
            cwd: Path::new(&self.cwd).to_owned(),
            user: self.user.clone(),
            mounts: self.mounts.iter().map(mount).collect(),
            network: self.network,
            hostname: "sockless".to_owned(),
            extra_hosts: self.extra_hosts.clone(),
            security: self.security,
            devices: self.devices.iter().map(device).collect(),
            shm_size: self.shm_size,
            ulimits: self.ulimits.clone(),
            owners: None,
            limits: self.limits.clone(),
            written_dir: None,
        }
    }
}

/// The exit status of `__sandbox` where there was no outcome.
const NO_OUTCOME: i32 = 200;

/// `__sandbox`: the step's output goes to standard output and error, its status is the exit
/// status; errors and notes go to standard error with the prefix `sandbox:`.
fn sandbox_main() -> i32 {
    let say = |text: &dyn std::fmt::Display| {
        let _ = writeln!(std::io::stderr(), "sandbox: {text}");
    };
    let request: Request = match serde_json::from_reader(std::io::stdin().lock()) {
        Ok(request) => request,
        Err(error) => {
            say(&error);
            return NO_OUTCOME;
        }
    };
    let world = match userns::enter() {
        Ok(world) => world,
        Err(error) => {
            say(&error);
            return NO_OUTCOME;
        }
    };
    say(&world);
    let cancel = Cancel::new();
    let mut sink = |stream: Stream, bytes: &[u8]| {
        // A reader that has gone away is no reason to end the step.
        let _ = match stream {
            Stream::Stdout => std::io::stdout().write_all(bytes),
            Stream::Stderr => std::io::stderr().write_all(bytes),
        };
        let _ = std::io::stdout().flush();
        if request.cancel_on_output {
            cancel.cancel();
        }
    };
    let (choice, old) = (request.sandbox, request.allow_old_runc);
    let outcome = choose(choice, old, &world, &std::env::temp_dir()).and_then(|sandbox| {
        let limits = super::limit_notes(&request.limits)?;
        for note in sandbox.notes().iter().chain(&limits) {
            say(&note);
        }
        sandbox.run(&request.process(), &mut sink, &cancel)
    });
    match outcome {
        Ok(Outcome::Exited(status)) => status,
        Err(error) => {
            say(&error);
            if let Some(hint) = error.hint() {
                say(&format_args!("hint: {hint}"));
            }
            NO_OUTCOME
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sandbox_that_fails_is_not_a_step_that_fails() {
        let check = |heard: Heard, expected: Result<i32, &str>| {
            let got = conclude("runc", heard)
                .map(|Outcome::Exited(status)| status)
                .map_err(|error| error.to_string());
            assert_eq!(got, expected.map_err(str::to_owned));
        };
        let heard = |started, exited, log: &str| Heard {
            started,
            exited,
            log: log.as_bytes().to_vec(),
            ..Heard::default()
        };
        check(heard(true, Some(0), "warning"), Ok(0));
        check(heard(true, Some(1), ""), Ok(1));
        check(
            heard(false, Some(1), "cannot\nstart\n"),
            Err("runc: runc failed: cannot; start"),
        );
        check(
            heard(false, Some(1), ""),
            Err("runc: runc failed: it ended with status 1 before the step began"),
        );
        check(
            heard(false, Some(1), "mount: Operation not permitted"),
            Err("runc: runc is not permitted here: mount: Operation not permitted"),
        );
        check(
            heard(true, None, ""),
            Err("runc: the sandbox ended without a word; it may have been killed"),
        );
        let cancelled = Heard {
            cancelled: true,
            ..heard(true, Some(137), "")
        };
        check(cancelled, Err("the step was cancelled"));
        let failure = Failure::new("mounting /x", &std::io::Error::from_raw_os_error(1));
        let failed = Heard {
            failure: Some(failure),
            ..heard(false, Some(1), "bwrap: noise")
        };
        check(
            failed,
            Err(
                "runc: runc is not permitted here: mounting /x: Operation not permitted (os error 1)",
            ),
        );
    }

    #[test]
    fn security_s11_the_copy_of_this_program_is_whole_and_cannot_be_written() {
        let program = own_program().unwrap();
        let size = std::fs::metadata("/proc/self/exe").unwrap().len();
        assert_eq!(
            rustix::fs::fstat(program).unwrap().st_size.cast_unsigned(),
            size
        );
        assert_eq!(
            rustix::io::pwrite(program, b"x", 0),
            Err(rustix::io::Errno::PERM)
        );
    }
}
