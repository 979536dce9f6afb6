//! What a step finds of the network: helpers that carry its packets, name servers, hosts.
//!
//! A private network is a namespace whose only way out is an ordinary process of the user:
//! pasta or slirp4netns. Neither forwards to the host's loopback. The addresses at which
//! clouds hand out credentials are made unreachable besides.

use std::io::{self, Read, Seek};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::{Command, Stdio};

use rustix::io::FdFlags;
use rustix::pipe::PipeFlags;

use super::wire::{Attachment, Doing, Failure, Helper, HelperKind, Part};
use super::{netlink, userns};

/// Where pasta answers name queries by asking the host's own name server.
const PASTA_DNS: &str = "169.254.1.1";
/// The same for slirp4netns, with its default network.
const SLIRP_DNS: &str = "10.0.2.3";

/// Networks in which clouds serve instance metadata and credentials to anyone who asks:
/// AWS, Google, Azure, Oracle and OpenStack at 169.254.169.254, AWS containers at
/// 169.254.170.2 and .23, Alibaba at 100.100.100.200, AWS by IPv6 at fd00:ec2::254.
const METADATA: [(IpAddr, u8); 4] = [
    (IpAddr::V4(Ipv4Addr::new(169, 254, 169, 0)), 24),
    (IpAddr::V4(Ipv4Addr::new(169, 254, 170, 0)), 24),
    (IpAddr::V4(Ipv4Addr::new(100, 100, 100, 200)), 32),
    (
        IpAddr::V6(Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0)),
        32,
    ),
];

/// Makes the metadata services of clouds unreachable from this network namespace.
///
/// # Errors
/// Where the kernel refuses a route, other than for want of IPv6.
pub(super) fn hide_metadata() -> Result<(), Failure> {
    for (network, length) in METADATA {
        let made = netlink::make_unreachable(network, length);
        // Where the kernel has no IPv6, nothing is reachable by it anyway.
        if network.is_ipv4() {
            made.doing(|| format!("making {network} unreachable"))?;
        }
    }
    Ok(())
}

/// Which helpers are installed, the better one first.
pub(super) fn installed_helpers() -> Vec<Helper> {
    [HelperKind::Pasta, HelperKind::Slirp4netns]
        .into_iter()
        .filter_map(|kind| {
            let program = userns::find_program(kind.name())?;
            Some(Helper { kind, program })
        })
        .collect()
}

/// Attaches `helper` to the namespace that the file `netns` stands for, and returns once
/// packets pass. It runs until the PID namespace of this process ends.
///
/// `netns` is a bind mount of the namespace: the helpers give up the privilege that it
/// takes to open `/proc/PID/ns/net` before they open it. `resolv_conf` is what the step
/// will see. Whether it must `reach_host` at [`own_address`] decides which one it gets itself.
///
/// # Errors
/// Where it does not start; with its own words.
pub(super) fn attach(
    helper: &Helper,
    netns: &Path,
    resolv_conf: &str,
    reach_host: bool,
) -> Result<(), Failure> {
    match helper.kind {
        HelperKind::Pasta => {
            let forward_dns =
                name_servers(resolv_conf).any(|address| address.to_string() == PASTA_DNS);
            attach_pasta(helper, netns, forward_dns, reach_host)
        }
        HelperKind::Slirp4netns => attach_slirp4netns(helper, netns),
    }
    .map_err(Failure::of_network)
}

fn command(helper: &Helper) -> Command {
    let mut command = Command::new(&helper.program);
    command
        .env_clear()
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .stdout(Stdio::null());
    command
}

fn attach_pasta(
    helper: &Helper,
    netns: &Path,
    forward_dns: bool,
    reach_host: bool,
) -> Result<(), Failure> {
    let mut command = command(helper);
    command
        .args(["--quiet", "--config-net"])
        // The namespace belongs to this user namespace; in another one it would be lost.
        .arg("--netns-only")
        // Nothing is forwarded in either direction, and the gateway's address is the
        // gateway, not the host's loopback.
        .args(["-t", "none", "-u", "none", "-T", "none", "-U", "none"])
        .arg("--no-map-gw");
    // Only where steps ask the forwarder: with it, answers of the host's name server
    // come from the forwarder's address, also to those who asked the server itself, and
    // the C library's connected sockets drop them.
    if forward_dns {
        command.args(["--dns-forward", PASTA_DNS]);
    }
    if reach_host {
        let host = own_address(&Attachment::None)
            .doing(|| "finding an address of this machine".to_owned())?;
        let (address, gateway) = apart_from(host);
        command
            .args(["--address", &address.to_string()])
            .args(["--netmask", "24"])
            .args(["--gateway", &gateway.to_string()]);
    }
    if userns::is_initial() {
        // As real root it would become nobody, who may not enter the namespace. It keeps
        // only the capabilities that entering takes, and filters its own system calls.
        command.args(["--runas", "0:0"]);
    }
    command.arg("--netns").arg(netns);
    // It goes to the background when it is ready. Its output is a file rather than a
    // pipe, which the background process would keep open.
    let log = rustix::fs::memfd_create("pasta-log", rustix::fs::MemfdFlags::CLOEXEC)
        .doing(|| "making a memory file".to_owned())?;
    let log = std::fs::File::from(log);
    let stderr = log
        .try_clone()
        .doing(|| "making a memory file".to_owned())?;
    let status = command
        .stderr(stderr)
        .status()
        .doing(|| format!("starting {}", helper.program.display()))?;
    if status.success() {
        return Ok(());
    }
    Err(failed(helper, &words_of(&log), &status.to_string()))
}

fn attach_slirp4netns(helper: &Helper, netns: &Path) -> Result<(), Failure> {
    let doing = || "making a pipe".to_owned();
    let (ready, ready_far) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC).doing(doing)?;
    // This process has one thread and starts nothing else meanwhile.
    rustix::io::fcntl_setfd(&ready_far, FdFlags::empty()).doing(doing)?;
    let log = rustix::fs::memfd_create("slirp4netns-log", rustix::fs::MemfdFlags::CLOEXEC)
        .doing(|| "making a memory file".to_owned())?;
    let log = std::fs::File::from(log);
    let stderr = log
        .try_clone()
        .doing(|| "making a memory file".to_owned())?;
    let mut child = command(helper)
        .args(["--configure", "--mtu=65520", "--disable-host-loopback"])
        .arg(format!("--ready-fd={}", ready_far.as_raw_fd()))
        .arg("--netns-type=path")
        .arg(netns)
        .arg("tap0")
        .stderr(stderr)
        .spawn()
        .doing(|| format!("starting {}", helper.program.display()))?;
    drop(ready_far);
    let mut byte = [0];
    if std::fs::File::from(ready).read_exact(&mut byte).is_ok() {
        return Ok(());
    }
    let status = child
        .wait()
        .doing(|| "waiting for slirp4netns".to_owned())?;
    Err(failed(helper, &words_of(&log), &status.to_string()))
}

fn failed(helper: &Helper, words: &str, status: &str) -> Failure {
    Failure {
        doing: helper.kind.name().to_owned(),
        reason: match words {
            "" => status.to_owned(),
            words => words.to_owned(),
        },
        errno: None,
        part: Part::Network,
    }
}

/// What a helper said, without what it says everywhere, on one line.
fn words_of(mut log: &std::fs::File) -> String {
    let mut text = Vec::new();
    if log.rewind().is_err() || log.take(16 * 1024).read_to_end(&mut text).is_err() {
        // Then its status is reported.
        return String::new();
    }
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty() && !line.contains("bytes to syslog"))
        .collect();
    lines.join("; ")
}

/// Reads the host's name servers and returns `/etc/resolv.conf` as a step must see it.
pub(super) fn resolv_conf(attachment: &Attachment) -> String {
    let read = |path| std::fs::read_to_string(path).unwrap_or_default();
    let mut host = read("/etc/resolv.conf");
    if matches!(attachment, Attachment::Host) {
        // Whatever listens on the loopback can be reached.
        return host;
    }
    if name_servers(&host).all(|address| address == SYSTEMD_STUB) {
        // systemd-resolved answers on the host's loopback and writes here whom it asks.
        let upstream = read("/run/systemd/resolve/resolv.conf");
        if name_servers(&upstream).next().is_some() {
            host = upstream;
        }
    }
    let forwarder = match attachment {
        Attachment::Host | Attachment::None | Attachment::Held => None,
        Attachment::Private(helper) => Some(match helper.kind {
            HelperKind::Pasta => PASTA_DNS,
            HelperKind::Slirp4netns => SLIRP_DNS,
        }),
    };
    rewrite_resolv_conf(&host, forwarder)
}

const SYSTEMD_STUB: IpAddr = IpAddr::V4(Ipv4Addr::new(127, 0, 0, 53));

/// Takes out name servers that cannot be reached from another network namespace, and puts
/// the forwarder in place of the first of them, or where there is none at all.
fn rewrite_resolv_conf(host: &str, forwarder: Option<&str>) -> String {
    let mut text = String::new();
    let mut forwarder = forwarder;
    let mut kept = 0;
    for line in host.lines() {
        match name_server(line) {
            None if line.trim_start().starts_with("nameserver") => continue,
            None => text.push_str(line),
            Some(address) if is_reachable_from_elsewhere(address) => {
                kept += 1;
                text.push_str(line);
            }
            Some(_) => match forwarder.take() {
                Some(forwarder) => {
                    kept += 1;
                    text.push_str("nameserver ");
                    text.push_str(forwarder);
                }
                None => continue,
            },
        }
        text.push('\n');
    }
    if let (0, Some(forwarder)) = (kept, forwarder) {
        text.push_str(&format!("nameserver {forwarder}\n"));
    }
    text
}

fn name_servers(text: &str) -> impl Iterator<Item = IpAddr> {
    text.lines().filter_map(name_server)
}

/// The address of a `nameserver` line; none where it has a zone, which is a number of an
/// interface of the host.
fn name_server(line: &str) -> Option<IpAddr> {
    let mut words = line.split_whitespace();
    if words.next()? != "nameserver" {
        return None;
    }
    words.next()?.parse().ok()
}

fn is_reachable_from_elsewhere(address: IpAddr) -> bool {
    match address {
        // Link-local is where clouds have metadata and name servers at one address.
        IpAddr::V4(address) => {
            !address.is_loopback() && !address.is_link_local() && !address.is_unspecified()
        }
        IpAddr::V6(address) => {
            !address.is_loopback() && !address.is_unspecified() && !address.is_unicast_link_local()
        }
    }
}

/// The address at which a process with this network finds this machine.
///
/// In a private network that is the one from which this machine reaches others; what
/// listens there is what other machines can reach, too.
///
/// # Errors
/// Where this machine has no way to others, and so no such address.
pub(super) fn own_address(network: &Attachment) -> io::Result<Ipv4Addr> {
    if matches!(network, Attachment::Host) {
        return Ok(Ipv4Addr::LOCALHOST);
    }
    // Choosing the way to an address sends nothing. This one is nobody's (RFC 5737).
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    socket.connect((Ipv4Addr::new(192, 0, 2, 1), 9))?;
    match socket.local_addr()?.ip() {
        IpAddr::V4(address) => Ok(address),
        IpAddr::V6(_) => Err(io::ErrorKind::AddrNotAvailable.into()),
    }
}

/// Networks of which a process that must reach this machine gets one: pasta otherwise gives
/// it this machine's own address, at which it would find only itself.
const APART: [Ipv4Addr; 2] = [Ipv4Addr::new(10, 0, 2, 0), Ipv4Addr::new(10, 0, 3, 0)];

/// The address in, and the gateway of, the first such network that `host` is not in.
fn apart_from(host: Ipv4Addr) -> (Ipv4Addr, Ipv4Addr) {
    let prefix = |address: Ipv4Addr| {
        [
            address.octets()[0],
            address.octets()[1],
            address.octets()[2],
        ]
    };
    let network = APART
        .into_iter()
        .find(|network| prefix(*network) != prefix(host))
        .unwrap_or(APART[0]);
    let [a, b, c] = prefix(network);
    (Ipv4Addr::new(a, b, c, 100), Ipv4Addr::new(a, b, c, 2))
}

/// Whether nothing of a process that has ended lives on in this network namespace, such as a
/// connection that waits until its last packets cannot come any more, and keeps its port.
///
/// # Errors
/// Those of reading below `/proc`.
pub(super) fn is_unused() -> io::Result<bool> {
    for file in ["/proc/self/net/sockstat", "/proc/self/net/sockstat6"] {
        let counts = match std::fs::read_to_string(file) {
            // The kernel has no IPv6.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            counts => counts?,
        };
        if !are_all_closed(&counts) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Whether the kernel counts no socket: none `inuse`, and none of those `tw`, whose last packets
/// cannot come any more only after a minute.
fn are_all_closed(counts: &str) -> bool {
    // The first line of IPv4 is not about this namespace.
    let mut lines = counts.lines().filter(|line| !line.starts_with("sockets:"));
    lines.all(|line| {
        let words: Vec<&str> = line.split_whitespace().skip(1).collect();
        let mut pairs = words.chunks_exact(2);
        let is_open = |pair: &[&str]| matches!(pair[0], "inuse" | "tw") && pair[1] != "0";
        !words.is_empty() && pairs.all(|pair| !is_open(pair)) && pairs.remainder().is_empty()
    })
}

/// Makes the network namespace of a process of this PID namespace a file at `path`.
///
/// # Errors
/// Those of `mount(2)`.
pub(super) fn pin_netns(pid: u32, path: &Path) -> Result<(), Failure> {
    let doing = || "holding the network namespace".to_owned();
    std::fs::File::create(path).doing(doing)?;
    rustix::mount::mount_bind(format!("/proc/{pid}/ns/net"), path).doing(doing)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn name_servers_on_loopback_are_replaced_and_others_kept() {
        let check = |host: &str, forwarder: Option<&str>, expected: &str| {
            assert_eq!(rewrite_resolv_conf(host, forwarder), expected, "{host:?}");
        };
        let keep = "search example.org\nnameserver 10.0.0.1\noptions ndots:2\n";
        check(keep, Some("169.254.1.1"), keep);
        check(keep, None, keep);
        check(
            "# local\nnameserver 127.0.0.53\nnameserver ::1\nsearch x\n",
            Some("169.254.1.1"),
            "# local\nnameserver 169.254.1.1\nsearch x\n",
        );
        check(
            "nameserver 127.0.0.1\nnameserver 10.0.0.1\n",
            None,
            "nameserver 10.0.0.1\n",
        );
        check(
            "nameserver 169.254.169.254\n",
            Some("10.0.2.3"),
            "nameserver 10.0.2.3\n",
        );
        check(
            "nameserver fe80::1%2\n",
            Some("10.0.2.3"),
            "nameserver 10.0.2.3\n",
        );
        check("", Some("10.0.2.3"), "nameserver 10.0.2.3\n");
        check("", None, "");
    }

    #[test]
    fn a_socket_of_any_kind_is_seen() {
        let all_closed = "sockets: used 21\nTCP: inuse 0 orphan 7 tw 0 alloc 9 mem 0\n\
            UDP: inuse 0 mem 1\nUDPLITE: inuse 0\nRAW: inuse 0\nFRAG: inuse 0 memory 0\n";
        assert!(are_all_closed(all_closed));
        assert!(are_all_closed("TCP6: inuse 0\nRAW6: inuse 0\n"));
        for (closed, open) in [
            ("TCP: inuse 0", "TCP: inuse 1"),
            (" tw 0", " tw 2"),
            ("UDP: inuse 0", "UDP: inuse 1"),
            ("RAW: inuse 0", "RAW: inuse 1"),
            // What is not understood may be anything.
            ("RAW: inuse 0", "RAW: inuse"),
            ("RAW: inuse 0", "RAW:"),
        ] {
            assert!(all_closed.contains(closed));
            assert!(!are_all_closed(&all_closed.replace(closed, open)), "{open}");
        }
    }

    #[test]
    fn the_step_has_another_network_than_this_machine() {
        let check = |host: [u8; 4], address: [u8; 4], gateway: [u8; 4]| {
            let got = apart_from(host.into());
            assert_eq!(got, (address.into(), gateway.into()), "{host:?}");
        };
        check([192, 0, 2, 1], [10, 0, 2, 100], [10, 0, 2, 2]);
        check([10, 0, 2, 15], [10, 0, 3, 100], [10, 0, 3, 2]);
        check([10, 0, 3, 15], [10, 0, 2, 100], [10, 0, 2, 2]);
    }
}
