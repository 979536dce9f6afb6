//! What the processes of one sandbox tell each other.
//!
//! `sockless build` writes a [`Launch`] once, into a memory file that every stage inherits
//! and reads; the stages answer with [`Report`]s, one message each on a Unix socket.

use std::io::{self, IoSlice, IoSliceMut, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};
use rustix::process::Pid;
use serde::{Deserialize, Serialize};

use super::Process;
use crate::owners::Owner;

/// Everything the stages need to know.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Launch {
    /// Which program makes the container.
    pub(super) runtime: Runtime,
    /// What is to run.
    pub(super) process: Process,
    /// How far the stages go.
    pub(super) purpose: Purpose,
    /// How the network is made.
    pub(super) network: Attachment,
    /// The text of `/etc/resolv.conf` inside.
    pub(super) resolv_conf: String,
    /// The text of `/etc/hosts` inside.
    pub(super) hosts: String,
    /// Whether the process must be able to reach this machine at its own address.
    pub(super) reach_host: bool,
    /// The mount points that were there when `sockless` started. All others are root
    /// filesystems of other steps, which this step's mount namespace must not keep alive.
    pub(super) old_mounts: Option<Vec<String>>,
    /// Whether the process is traced, which makes up users and owners for it.
    pub(super) is_traced: bool,
    /// Whom files in memory belong to for a process that is traced: not to be known by the stages.
    #[serde(skip)]
    pub(super) file_owners: Vec<(PathBuf, Owner)>,
}

/// What the stages are started for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Purpose {
    /// To run the process.
    Run,
    /// To stop just before the process would start; nothing of it is executed.
    Probe,
    /// To hold a network for other launches; there is no process.
    HoldNetwork,
}

/// A program that makes containers.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Runtime {
    /// Which one.
    pub(super) kind: RuntimeKind,
    /// Where it is.
    #[serde(with = "path")]
    pub(super) program: PathBuf,
}

/// Which program makes the container.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum RuntimeKind {
    /// bubblewrap.
    Bwrap,
    /// runc.
    Runc,
    /// crun.
    Crun,
    /// None: this program, by `chroot(2)`.
    Chroot,
    /// youki.
    Youki,
}

impl RuntimeKind {
    /// The name of the program.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Bwrap => "bwrap",
            Self::Runc => "runc",
            Self::Crun => "crun",
            Self::Chroot => "chroot",
            Self::Youki => "youki",
        }
    }
}

/// How a network is made.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) enum Attachment {
    /// It is the host's.
    Host,
    /// A namespace with a loopback.
    None,
    /// A namespace with a program that carries packets out of it.
    Private(Helper),
    /// The same, made before and handed over as the last file.
    Held,
}

/// A program that carries packets out of a network namespace.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Helper {
    /// Which one.
    pub(super) kind: HelperKind,
    /// Where it is.
    #[serde(with = "path")]
    pub(super) program: PathBuf,
}

/// Which program carries packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum HelperKind {
    /// pasta, of passt.
    Pasta,
    /// slirp4netns.
    Slirp4netns,
}

impl HelperKind {
    /// The name of the program.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Pasta => "pasta",
            Self::Slirp4netns => "slirp4netns",
        }
    }
}

/// What a stage says.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Report {
    /// The innermost stage, which sends this, waits until it is traced.
    Traceable,
    /// The innermost stage runs; whatever happens now is the step's own doing.
    Started,
    /// The network is ready; its namespace comes with this message, as a file.
    Network,
    /// The runtime has ended with this status; 128 + the signal where one ended it.
    Exited(i32),
    /// A stage could not do its part.
    Failed(Failure),
}

/// Why a stage could not do its part.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Failure {
    /// What it was doing, such as `mounting /proc`.
    pub(super) doing: String,
    /// Why that failed.
    pub(super) reason: String,
    /// The error number, if there was one.
    pub(super) errno: Option<i32>,
    /// What was at fault.
    pub(super) part: Part,
}

/// Which part of a sandbox failed.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Part {
    /// None in particular.
    Setup,
    /// The network.
    Network,
    /// The mount at this target.
    Mount(String),
    /// None: what was asked for cannot be had here.
    Asked,
}

impl Failure {
    /// Describes an operation that failed.
    pub(super) fn new(doing: impl Into<String>, error: &io::Error) -> Self {
        Self {
            doing: doing.into(),
            reason: error.to_string(),
            errno: error.raw_os_error(),
            part: Part::Setup,
        }
    }

    /// The same, with the network at fault.
    pub(super) fn of_network(self) -> Self {
        Self {
            part: Part::Network,
            ..self
        }
    }

    /// The same, with the mount at `target` at fault.
    pub(super) fn of_mount(self, target: &std::path::Path) -> Self {
        Self {
            part: Part::Mount(target.display().to_string()),
            ..self
        }
    }
}

/// Adds what was being done to an error.
pub(super) trait Doing<T> {
    /// Turns an error into a [`Failure`].
    fn doing(self, what: impl FnOnce() -> String) -> Result<T, Failure>;
}

impl<T, E: Into<io::Error>> Doing<T> for Result<T, E> {
    fn doing(self, what: impl FnOnce() -> String) -> Result<T, Failure> {
        self.map_err(|error| Failure::new(what(), &error.into()))
    }
}

/// What is asked of who holds a network: whether anything is left in it.
pub(super) const IS_UNUSED: u8 = b'?';
/// The answer: nothing.
pub(super) const UNUSED: u8 = b'y';
/// The answer: something.
pub(super) const USED: u8 = b'n';

/// The longest report: a path or two and a sentence.
const REPORT_LIMIT_BYTES: usize = 64 * 1024;

/// Sends one report. That nobody listens any more is no error of the sender.
pub(super) fn send_report(socket: impl AsFd, report: &Report) {
    send_report_with(socket, report, &[]);
}

/// Sends one report with a file.
pub(super) fn send_report_with(socket: impl AsFd, report: &Report, fds: &[BorrowedFd<'_>]) {
    let Ok(mut text) = serde_json::to_vec(report) else {
        return;
    };
    if text.len() > REPORT_LIMIT_BYTES {
        // Paths of that length do not exist in Linux, but a report must arrive.
        text = br#"{"Failed":{"doing":"reporting a failure","reason":"the message is too long","errno":null,"part":"Setup"}}"#.to_vec();
    }
    let _ = send_with_fds(socket, &text, fds);
}

/// A report, and what came with it.
#[derive(Debug)]
pub(super) struct Received {
    pub(super) report: Report,
    pub(super) fds: Vec<OwnedFd>,
    /// Who sent it, where the socket is set to say that.
    pub(super) sender: Option<Pid>,
}

/// Receives one report and what comes with it; `None` when all senders are gone.
///
/// # Errors
/// Those of `recv(2)`, and `InvalidData`.
pub(super) fn receive_report_with(socket: impl AsFd) -> io::Result<Option<Received>> {
    let mut text = vec![0; REPORT_LIMIT_BYTES];
    let Message {
        length,
        fds,
        sender,
    } = receive_message(socket, &mut text)?;
    if length == 0 {
        return Ok(None);
    }
    Ok(Some(Received {
        report: serde_json::from_slice(&text[..length])?,
        fds,
        sender,
    }))
}

/// The most file descriptors of one message: program, launch, log, network, cgroups.
const FDS_MAX: usize = 8;

/// Sends file descriptors, at most [`FDS_MAX`], with one byte of data.
///
/// # Errors
/// Those of `sendmsg(2)`.
pub(super) fn send_fds(socket: impl AsFd, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    send_with_fds(socket, b"L", fds)
}

/// Receives what [`send_fds`] sent, which is at least one.
///
/// # Errors
/// Those of `recvmsg(2)`; `UnexpectedEof` where the sender is gone.
pub(super) fn receive_fds(socket: impl AsFd) -> io::Result<Vec<OwnedFd>> {
    let fds = receive_message(socket, &mut [0])?.fds;
    match fds.is_empty() {
        true => Err(io::ErrorKind::UnexpectedEof.into()),
        false => Ok(fds),
    }
}

fn send_with_fds(socket: impl AsFd, data: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    rustix::io::retry_on_intr(|| {
        rustix::net::sendmsg(
            &socket,
            &[IoSlice::new(data)],
            &mut control,
            SendFlags::NOSIGNAL,
        )
    })?;
    Ok(())
}

/// What one `recvmsg(2)` gave.
struct Message {
    length: usize,
    fds: Vec<OwnedFd>,
    sender: Option<Pid>,
}

fn receive_message(socket: impl AsFd, data: &mut [u8]) -> io::Result<Message> {
    let mut space =
        [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX), ScmCredentials(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = rustix::io::retry_on_intr(|| {
        rustix::net::recvmsg(
            &socket,
            &mut [IoSliceMut::new(data)],
            &mut control,
            RecvFlags::CMSG_CLOEXEC,
        )
    })?;
    let (mut fds, mut sender) = (Vec::new(), None);
    for message in control.drain() {
        match message {
            RecvAncillaryMessage::ScmRights(more) => fds.extend(more),
            RecvAncillaryMessage::ScmCredentials(credentials) => sender = Some(credentials.pid),
            _ => {}
        }
    }
    Ok(Message {
        length: received.bytes,
        fds,
        sender,
    })
}

/// Reads the launch from its memory file, wherever its offset is.
///
/// # Errors
/// Those of `read(2)`, and `InvalidData`.
pub(super) fn read_launch(file: &OwnedFd) -> io::Result<Launch> {
    rustix::fs::seek(file, rustix::fs::SeekFrom::Start(0))?;
    let mut text = Vec::new();
    std::fs::File::from(file.try_clone()?).read_to_end(&mut text)?;
    Ok(serde_json::from_slice(&text)?)
}

/// Paths in JSON as `OsString` has them: they need not be UTF-8.
pub(super) mod path {
    use std::ffi::{OsStr, OsString};
    use std::path::{Path, PathBuf};

    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub(in crate::sandbox) fn serialize<S: Serializer>(
        path: &Path,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        OsStr::serialize(path.as_os_str(), serializer)
    }

    pub(in crate::sandbox) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<PathBuf, D::Error> {
        OsString::deserialize(deserializer).map(PathBuf::from)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStrExt;
    use std::path::Path;

    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    use super::*;

    fn pair() -> (OwnedFd, OwnedFd) {
        socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )
        .unwrap()
    }

    fn receive_report(socket: &OwnedFd) -> io::Result<Option<Report>> {
        Ok(receive_report_with(socket)?.map(|received| received.report))
    }

    #[test]
    fn reports_arrive_one_by_one_and_then_end() {
        let (ours, theirs) = pair();
        let failure = Failure::new("mounting /x", &io::Error::from_raw_os_error(1)).of_network();
        let reports = [Report::Started, Report::Failed(failure), Report::Exited(7)];
        for report in &reports {
            send_report(&theirs, report);
        }
        drop(theirs);
        for report in reports {
            assert_eq!(receive_report(&ours).unwrap(), Some(report));
        }
        assert_eq!(receive_report(&ours).unwrap(), None);
    }

    #[test]
    fn descriptors_arrive_in_order() {
        let (ours, theirs) = pair();
        let files: Vec<std::fs::File> = (0..3).map(|_| tempfile::tempfile().unwrap()).collect();
        send_fds(
            &ours,
            &[files[0].as_fd(), files[1].as_fd(), files[2].as_fd()],
        )
        .unwrap();
        let received = receive_fds(&theirs).unwrap();
        assert_eq!(received.len(), files.len());
        for (sent, received) in files.iter().zip(&received) {
            let inode = |fd: BorrowedFd<'_>| rustix::fs::fstat(fd).unwrap().st_ino;
            assert_eq!(inode(sent.as_fd()), inode(received.as_fd()));
        }
        drop(ours);
        let error = receive_fds(&theirs).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn a_report_may_come_with_a_file() {
        let (ours, theirs) = pair();
        let file = tempfile::tempfile().unwrap();
        send_report_with(&theirs, &Report::Network, &[file.as_fd()]);
        send_report(&theirs, &Report::Started);
        let Received { report, fds, .. } = receive_report_with(&ours).unwrap().unwrap();
        let inode = |fd: BorrowedFd<'_>| rustix::fs::fstat(fd).unwrap().st_ino;
        let inodes: Vec<u64> = fds.iter().map(|fd| inode(fd.as_fd())).collect();
        assert_eq!(
            (report, inodes),
            (Report::Network, vec![inode(file.as_fd())])
        );
        let Received { report, fds, .. } = receive_report_with(&ours).unwrap().unwrap();
        assert_eq!((report, fds.len()), (Report::Started, 0));
    }

    #[test]
    fn paths_need_not_be_text() {
        #[derive(Serialize, Deserialize)]
        struct Holder(#[serde(with = "path")] PathBuf);
        let odd = Path::new(std::ffi::OsStr::from_bytes(b"/a\xff")).to_owned();
        let text = serde_json::to_string(&Holder(odd.clone())).unwrap();
        assert_eq!(serde_json::from_str::<Holder>(&text).unwrap().0, odd);
    }
}
