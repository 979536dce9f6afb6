//! `/etc/hosts`: the lines that every process has, and those that `--add-host` asks for.

use std::net::{IpAddr, Ipv4Addr};

/// The address that stands for this machine, as Docker and BuildKit call it.
pub const HOST_GATEWAY: &str = "host-gateway";

/// What is wrong with an extra host.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HostError {
    /// There is no name, no address, or nothing between them.
    #[error("invalid host {0}: expected NAME:IP or NAME=IP")]
    Format(String),
    /// The name could not stand in `/etc/hosts`.
    #[error("invalid host {0}: a name has no white space, `#` or control characters")]
    Name(String),
    /// The address is none.
    #[error("invalid host {host}: {address:?} is neither an IP address nor host-gateway")]
    Address {
        /// What was given.
        host: String,
        /// What should be an address.
        address: String,
    },
}

/// Reads `NAME:IP` or `NAME=IP` as of `--add-host`, and returns the two.
///
/// An address may stand in brackets, as IPv6 often does, and may be [`HOST_GATEWAY`]; it is
/// returned as the standard library writes it, without brackets.
///
/// # Errors
/// [`HostError`], which repeats what was given.
pub fn parse_extra_host(text: &str) -> Result<(String, String), HostError> {
    let format = || HostError::Format(text.to_owned());
    let (name, address) = text
        .split_once('=')
        .or_else(|| text.split_once(':'))
        .ok_or_else(format)?;
    if name.is_empty() || address.is_empty() || name.contains(':') {
        return Err(format());
    }
    let is_odd = |c: char| c.is_whitespace() || c.is_control() || c == '#';
    if name.contains(is_odd) {
        return Err(HostError::Name(text.to_owned()));
    }
    if address == HOST_GATEWAY {
        return Ok((name.to_owned(), address.to_owned()));
    }
    let bare = address
        .strip_prefix('[')
        .and_then(|rest| rest.strip_suffix(']'))
        .unwrap_or(address);
    match bare.parse::<IpAddr>() {
        // An IPv4 address in the clothes of IPv6 is shown as what it is.
        Ok(ip) => Ok((name.to_owned(), ip.to_canonical().to_string())),
        Err(_) => Err(HostError::Address {
            host: text.to_owned(),
            address: address.to_owned(),
        }),
    }
}

/// Whether any of `extra` asks for this machine's address.
pub(super) fn want_gateway(extra: &[(String, String)]) -> bool {
    extra.iter().any(|(_, address)| address == HOST_GATEWAY)
}

/// Returns `/etc/hosts` as a process sees it, in BuildKit's order; `gateway` is there
/// where [`want_gateway`].
pub(super) fn text(
    hostname: &str,
    extra: &[(String, String)],
    gateway: Option<Ipv4Addr>,
) -> String {
    let mut text =
        format!("127.0.0.1\tlocalhost {hostname}\n::1\tlocalhost ip6-localhost ip6-loopback\n");
    for (name, address) in extra {
        match (address.as_str(), gateway) {
            (HOST_GATEWAY, Some(gateway)) => text.push_str(&format!("{gateway}\t{name}\n")),
            _ => text.push_str(&format!("{address}\t{name}\n")),
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_are_read_as_docker_reads_them() {
        let check = |text: &str, name: &str, address: &str| {
            let expected = Ok((name.to_owned(), address.to_owned()));
            assert_eq!(parse_extra_host(text), expected, "{text}");
        };
        check("db:10.0.0.7", "db", "10.0.0.7");
        check("db=10.0.0.7", "db", "10.0.0.7");
        check("db:[10.0.0.7]", "db", "10.0.0.7");
        check("db:::1", "db", "::1");
        check("db=::1", "db", "::1");
        check("db:[2001:DB8::0:1]", "db", "2001:db8::1");
        check("db=::ffff:10.0.0.7", "db", "10.0.0.7");
        check("me:host-gateway", "me", "host-gateway");
        check("me=host-gateway", "me", "host-gateway");
    }

    #[test]
    fn what_is_no_host_is_said() {
        let check = |text: &str, message: &str| {
            let error = parse_extra_host(text).unwrap_err();
            assert_eq!(error.to_string(), message, "{text:?}");
        };
        for text in [
            "",
            "db",
            "db:",
            "db=",
            ":10.0.0.7",
            "=10.0.0.7",
            "a:b=10.0.0.7",
        ] {
            check(
                text,
                &format!("invalid host {text}: expected NAME:IP or NAME=IP"),
            );
        }
        for address in [
            "10.0.0",
            "010.0.0.7",
            "x",
            "[::1",
            "::1]",
            "[host-gateway]",
            "fe80::1%2",
        ] {
            check(
                &format!("db={address}"),
                &format!(
                    "invalid host db={address}: {address:?} is neither an IP address nor \
                     host-gateway"
                ),
            );
        }
        for name in ["a b", "a\nb", "a#"] {
            check(
                &format!("{name}:10.0.0.7"),
                &format!(
                    "invalid host {name}:10.0.0.7: a name has no white space, `#` or control \
                     characters"
                ),
            );
        }
    }

    #[test]
    fn the_text_names_this_machine_and_the_extra_hosts() {
        let extra = [("db", "10.0.0.7"), ("me", HOST_GATEWAY)]
            .map(|(name, address)| (name.to_owned(), address.to_owned()));
        assert_eq!(
            text("box", &extra, Some(Ipv4Addr::new(192, 0, 2, 1))),
            "127.0.0.1\tlocalhost box\n::1\tlocalhost ip6-localhost ip6-loopback\n\
             10.0.0.7\tdb\n192.0.2.1\tme\n"
        );
        assert!(want_gateway(&extra));
        assert!(!want_gateway(&extra[..1]));
    }
}
