//! [`Reach`]: which servers a stranger's Dockerfile may have fetched from.
//!
//! Names are judged by their addresses when a connection is made, so that no name can lead
//! inside after it was looked at. Through a proxy, the proxy decides.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use url::{Host, Url};

/// Why a server is not asked.
const INSIDE: &str = "its address is not a public one";

/// Which servers may be asked for files.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Reach {
    /// All.
    #[default]
    Anywhere,
    /// Those with public addresses: neither this machine, nor its link (where clouds keep
    /// their metadata services), nor private networks.
    PublicOnly,
}

impl Reach {
    /// Whether `url`, where it names its server by address, may be asked.
    ///
    /// # Errors
    /// The reason why not, for people.
    pub(crate) fn check(self, url: &Url) -> Result<(), &'static str> {
        let address = match url.host() {
            Some(Host::Ipv4(address)) => IpAddr::V4(address),
            Some(Host::Ipv6(address)) => IpAddr::V6(address),
            Some(Host::Domain(_)) | None => return Ok(()),
        };
        self.check_address(address)
    }

    /// Whether a server at `address` may be asked.
    ///
    /// # Errors
    /// The reason why not, for people.
    pub(crate) fn check_address(self, address: IpAddr) -> Result<(), &'static str> {
        match self {
            Self::PublicOnly if !is_public(address) => Err(INSIDE),
            Self::Anywhere | Self::PublicOnly => Ok(()),
        }
    }

    /// What looks names up for a client, if not the usual way.
    pub(super) fn resolver(self) -> Option<Arc<PublicResolver>> {
        (self == Self::PublicOnly).then(|| Arc::new(PublicResolver))
    }
}

/// Whether the address is none of those that are kept for machines, links, private networks,
/// documentation and multicast.
///
/// <https://www.iana.org/assignments/iana-ipv4-special-registry/> and its counterpart for IPv6
fn is_public(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => is_public_v4(address),
        IpAddr::V6(address) => match embedded(address) {
            Some(address) => is_public_v4(address),
            None => is_public_v6(address),
        },
    }
}

fn is_public_v4(address: Ipv4Addr) -> bool {
    let [a, b, c, _] = address.octets();
    !(a == 0
        || address.is_private()
        || address.is_loopback()
        || address.is_link_local()
        || address.is_documentation()
        // Carriers' own networks, protocol assignments, benchmarks, multicast and beyond.
        || (a == 100 && (64..128).contains(&b))
        || (a, b, c) == (192, 0, 0)
        || (a == 198 && (b == 18 || b == 19))
        || a >= 224)
}

fn is_public_v6(address: Ipv6Addr) -> bool {
    // 2000::/3 without documentation.
    let [first, second, ..] = address.segments();
    first & 0xe000 == 0x2000 && !(first == 0x2001 && second == 0x0db8) && first != 0x3fff
}

/// The IPv4 address that an IPv6 address leads to: mapped, NAT64, 6to4.
fn embedded(address: Ipv6Addr) -> Option<Ipv4Addr> {
    let from = |high: u16, low: u16| {
        let [a, b] = high.to_be_bytes();
        let [c, d] = low.to_be_bytes();
        Ipv4Addr::new(a, b, c, d)
    };
    match address.segments() {
        [0x2002, high, low, ..] => Some(from(high, low)),
        [0x64, 0xff9b, 0, 0, 0, 0, high, low] => Some(from(high, low)),
        _ => address.to_ipv4_mapped(),
    }
}

/// Looks names up and gives public addresses only.
pub(super) struct PublicResolver;

/// A name has no public address.
#[derive(Debug)]
struct Inside(String);

impl fmt::Display for Inside {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {INSIDE}", self.0)
    }
}

impl std::error::Error for Inside {}

impl Resolve for PublicResolver {
    fn resolve(&self, name: Name) -> Resolving {
        Box::pin(async move {
            let found = tokio::net::lookup_host((name.as_str(), 0)).await?;
            let public: Vec<_> = found.filter(|found| is_public(found.ip())).collect();
            if public.is_empty() {
                return Err(Inside(name.as_str().to_owned()).into());
            }
            Ok(Box::new(public.into_iter()) as Addrs)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_inside_is_known() {
        for address in [
            "0.0.0.0",
            "10.1.2.3",
            "100.64.0.1",
            "127.0.0.1",
            "127.9.9.9",
            "169.254.169.254",
            "172.16.0.1",
            "172.31.255.255",
            "192.0.0.1",
            "192.168.1.1",
            "198.18.0.1",
            "224.0.0.1",
            "255.255.255.255",
            "::",
            "::1",
            "::ffff:127.0.0.1",
            "::ffff:10.0.0.1",
            "fe80::1",
            "fc00::1",
            "fd00:ec2::254",
            "ff02::1",
            "2001:db8::1",
            "2002:7f00:1::",
            "64:ff9b::a9fe:a9fe",
        ] {
            let parsed: IpAddr = address.parse().unwrap();
            assert_eq!(
                Reach::PublicOnly.check_address(parsed),
                Err(INSIDE),
                "{address}"
            );
            assert_eq!(Reach::Anywhere.check_address(parsed), Ok(()));
        }
        for address in [
            "1.1.1.1",
            "100.128.0.1",
            "172.32.0.1",
            "192.0.1.1",
            "223.255.255.255",
            "2606:4700::1111",
            "::ffff:1.1.1.1",
            "2002:101:101::",
            "64:ff9b::101:101",
        ] {
            let parsed: IpAddr = address.parse().unwrap();
            assert_eq!(Reach::PublicOnly.check_address(parsed), Ok(()), "{address}");
        }
    }

    #[test]
    fn security_s15_urls_are_judged_by_the_address_they_name() {
        let check = |url: &str| Reach::PublicOnly.check(&Url::parse(url).unwrap());
        for url in [
            "http://127.0.0.1/",
            "http://2130706433/",
            "http://0x7f.1/",
            "http://[::1]:80/x",
            "https://169.254.169.254/latest/meta-data/",
        ] {
            assert_eq!(check(url), Err(INSIDE), "{url}");
        }
        assert_eq!(check("https://1.1.1.1/"), Ok(()));
        assert_eq!(check("https://localhost/"), Ok(()));
    }

    #[tokio::test]
    async fn security_s15_names_are_judged_when_they_are_looked_up() {
        let name: Name = "localhost".parse().unwrap();
        let Err(error) = PublicResolver.resolve(name).await else {
            panic!("localhost is public");
        };
        assert_eq!(error.to_string(), format!("localhost: {INSIDE}"));
    }
}
