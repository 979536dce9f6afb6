//! The three requests to the kernel's routing that a new network namespace needs.
//!
//! Messages follow `netlink(7)` and `rtnetlink(7)`. Everything acts on the network
//! namespace of this process.

use std::io;
use std::net::IpAddr;

use rustix::io::Errno;
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};

const RTM_NEWLINK: u16 = 16;
const RTM_NEWROUTE: u16 = 24;
const NLMSG_ERROR: u16 = 2;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_CREATE: u16 = 0x400;
const HEADER_BYTES: usize = 16;

/// Brings the loopback interface up. It is number 1 in every network namespace.
///
/// # Errors
/// `EPERM` without `CAP_NET_ADMIN`.
pub(super) fn bring_loopback_up() -> io::Result<()> {
    request(RTM_NEWLINK, 0, &link_up(1))
}

/// Makes a network unreachable.
///
/// # Errors
/// `EPERM` without `CAP_NET_ADMIN`, `EAFNOSUPPORT` without IPv6.
pub(super) fn make_unreachable(network: IpAddr, prefix_length: u8) -> io::Result<()> {
    let body = unreachable_route(network, prefix_length);
    request(RTM_NEWROUTE, NLM_F_CREATE, &body)
}

/// A `struct ifinfomsg` that sets `IFF_UP`.
fn link_up(index: i32) -> Vec<u8> {
    const IFF_UP: u32 = 1;
    let mut body = vec![0; 4];
    body.extend(index.to_ne_bytes());
    body.extend(IFF_UP.to_ne_bytes());
    // The mask of flags that are to change.
    body.extend(IFF_UP.to_ne_bytes());
    body
}

/// A `struct rtmsg` with its destination.
fn unreachable_route(network: IpAddr, prefix_length: u8) -> Vec<u8> {
    const RT_TABLE_MAIN: u8 = 254;
    const RTPROT_STATIC: u8 = 4;
    const RT_SCOPE_UNIVERSE: u8 = 0;
    const RTN_UNREACHABLE: u8 = 7;
    const RTA_DST: u16 = 1;
    let (family, address) = match network {
        IpAddr::V4(address) => (AddressFamily::INET, address.octets().to_vec()),
        IpAddr::V6(address) => (AddressFamily::INET6, address.octets().to_vec()),
    };
    // Both families fit a byte: 2 and 10.
    let family = family.as_raw() as u8;
    let mut body = vec![
        family,
        prefix_length,
        0,
        0,
        RT_TABLE_MAIN,
        RTPROT_STATIC,
        RT_SCOPE_UNIVERSE,
        RTN_UNREACHABLE,
    ];
    body.extend(0_u32.to_ne_bytes());
    body.extend((4 + address.len() as u16).to_ne_bytes());
    body.extend(RTA_DST.to_ne_bytes());
    body.extend(address);
    body
}

fn request(kind: u16, flags: u16, body: &[u8]) -> io::Result<()> {
    // NETLINK_ROUTE is protocol 0, which is the default.
    let socket = rustix::net::socket_with(
        AddressFamily::NETLINK,
        SocketType::RAW,
        SocketFlags::CLOEXEC,
        None,
    )?;
    let mut message = Vec::with_capacity(HEADER_BYTES + body.len());
    message.extend(((HEADER_BYTES + body.len()) as u32).to_ne_bytes());
    message.extend(kind.to_ne_bytes());
    message.extend((NLM_F_REQUEST | NLM_F_ACK | flags).to_ne_bytes());
    message.extend(1_u32.to_ne_bytes());
    message.extend(0_u32.to_ne_bytes());
    message.extend(body);
    let kernel = SocketAddrNetlink::new(0, 0);
    rustix::net::sendto(&socket, &message, SendFlags::empty(), &kernel)?;

    let mut answer = [0; 4096];
    let (length, _) = rustix::net::recv(&socket, &mut answer[..], RecvFlags::empty())?;
    acknowledged(&answer[..length])
}

/// Reads the answer to a request with `NLM_F_ACK`: an error message whose number may be 0.
fn acknowledged(answer: &[u8]) -> io::Result<()> {
    let kind = answer.get(4..6).and_then(|bytes| bytes.try_into().ok());
    let code = answer
        .get(HEADER_BYTES..HEADER_BYTES + 4)
        .and_then(|bytes| bytes.try_into().ok());
    match (kind.map(u16::from_ne_bytes), code.map(i32::from_ne_bytes)) {
        (Some(NLMSG_ERROR), Some(0)) => Ok(()),
        (Some(NLMSG_ERROR), Some(code)) => Err(Errno::from_raw_os_error(-code).into()),
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_an_error_number_or_nothing() {
        let answer = |kind: u16, code: i32| {
            let mut bytes = vec![20, 0, 0, 0];
            bytes.extend(kind.to_ne_bytes());
            bytes.extend([0; 10]);
            bytes.extend(code.to_ne_bytes());
            bytes
        };
        assert!(acknowledged(&answer(NLMSG_ERROR, 0)).is_ok());
        let error = acknowledged(&answer(NLMSG_ERROR, -1)).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(1));
        for bytes in [&answer(3, 0)[..], &[][..], &answer(2, 0)[..19]] {
            let error = acknowledged(bytes).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        }
    }

    #[test]
    fn a_route_is_laid_out_as_the_kernel_reads_it() {
        let body = unreachable_route("169.254.169.0".parse().unwrap(), 24);
        assert_eq!(body[..8], [2, 24, 0, 0, 254, 4, 0, 7]);
        assert_eq!(body[12..14], 8_u16.to_ne_bytes());
        assert_eq!(body[16..], [169, 254, 169, 0]);
        assert_eq!(unreachable_route("fd00::".parse().unwrap(), 8).len(), 32);
    }
}
