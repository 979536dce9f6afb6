//! Texts: Go's spellings that history entries have, and values that are checked by their form.

use std::fmt::Write as _;

use super::Chmod;
use super::mode::SymbolicMode;
use crate::dockerfile::{Problem, Span};
use crate::image::Healthcheck;

/// The largest number of ports that one `EXPOSE` may name as a range: all of them.
const MAX_PORT: u32 = 65_535;

/// The names of signals that an image may have.
const SIGNALS: [&str; 32] = [
    "ABRT", "ALRM", "BUS", "CHLD", "CLD", "CONT", "FPE", "HUP", "ILL", "INT", "IO", "IOT", "KILL",
    "PIPE", "POLL", "PROF", "PWR", "QUIT", "SEGV", "STKFLT", "STOP", "SYS", "TERM", "TRAP", "TSTP",
    "TTIN", "TTOU", "URG", "USR1", "USR2", "VTALRM", "WINCH",
];

/// ` A=1 B=2`.
pub(super) fn joined(pairs: &[(String, String)]) -> String {
    pairs.iter().fold(String::new(), |mut text, (name, value)| {
        let _ = write!(text, " {name}={value}");
        text
    })
}

/// Go's `%q` of a list of texts.
pub(super) fn quoted(args: &[String]) -> String {
    let args: Vec<String> = args.iter().map(|arg| go_quote(arg)).collect();
    format!("[{}]", args.join(" "))
}

/// Go's `%q`: printable characters as they are, the rest escaped.
pub(super) fn go_quote(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 2);
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\u{7}' => out.push_str("\\a"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{b}' => out.push_str("\\v"),
            c if (c as u32) < 0x20 || c == '\u{7f}' => {
                let _ = write!(out, "\\x{:02x}", c as u32);
            }
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

/// Go's `%+v` of the healthcheck.
pub(super) fn healthcheck_text(check: &Healthcheck) -> String {
    format!(
        "{{Test:[{}] Interval:{} Timeout:{} StartPeriod:{} StartInterval:{} Retries:{}}}",
        check.test.join(" "),
        go_duration(check.interval),
        go_duration(check.timeout),
        go_duration(check.start_period),
        go_duration(check.start_interval),
        check.retries
    )
}

/// Go's text of a duration in nanoseconds: `1m30s`, `2.5s`, `500ms`.
pub(super) fn go_duration(nanoseconds: i64) -> String {
    let fraction = |value: u64, unit: u64, name: &str| {
        let digits = unit.ilog10() as usize;
        let rest = format!("{:0digits$}", value % unit);
        let rest = rest.trim_end_matches('0');
        let dot = if rest.is_empty() || digits == 0 {
            ""
        } else {
            "."
        };
        format!(
            "{}{dot}{}{name}",
            value / unit,
            if digits == 0 { "" } else { rest }
        )
    };
    let sign = if nanoseconds < 0 { "-" } else { "" };
    let n = nanoseconds.unsigned_abs();
    let text = match n {
        0 => return "0s".to_owned(),
        1..1_000 => format!("{n}ns"),
        1_000..1_000_000 => fraction(n, 1_000, "µs"),
        1_000_000..1_000_000_000 => fraction(n, 1_000_000, "ms"),
        _ => {
            let minutes = n / 60_000_000_000;
            let seconds = fraction(n % 60_000_000_000, 1_000_000_000, "s");
            match (minutes / 60, minutes % 60) {
                (0, 0) => seconds,
                (0, minutes) => format!("{minutes}m{seconds}"),
                (hours, minutes) => format!("{hours}h{minutes}m{seconds}"),
            }
        }
    };
    format!("{sign}{text}")
}

/// `80`, `80/udp`, `7000-7002/tcp`; what stands before a colon is for a host and ignored.
pub(super) fn parse_ports(text: &str) -> Result<Vec<String>, String> {
    let (ports, protocol) = text.split_once('/').unwrap_or((text, "tcp"));
    let protocol = protocol.to_ascii_lowercase();
    let protocol = if protocol.is_empty() {
        "tcp".to_owned()
    } else {
        protocol
    };
    if !matches!(protocol.as_str(), "tcp" | "udp" | "sctp") {
        return Err(format!(
            "invalid port: {text:?}: invalid proto: {protocol} (expected tcp, udp or sctp)"
        ));
    }
    let ports = ports.rsplit(':').next().unwrap_or_default();
    let invalid = || {
        format!(
            "invalid containerPort: {ports} (expected a number from 0 to {MAX_PORT} or a range)"
        )
    };
    let number = |text: &str| {
        let all_digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
        let number = if all_digits {
            text.parse::<u32>().ok()
        } else {
            None
        };
        number.filter(|n| *n <= MAX_PORT).ok_or_else(invalid)
    };
    let (first, last) = ports.split_once('-').unwrap_or((ports, ports));
    let (first, last) = (number(first)?, number(last)?);
    if first > last {
        return Err(invalid());
    }
    Ok((first..=last)
        .map(|port| format!("{port}/{protocol}"))
        .collect())
}

/// `--chmod`: an octal mode up to 7777, or changes such as `u+x,go=rX`.
pub(super) fn parse_mode(text: &str, span: Span) -> Result<Chmod, Problem> {
    let octal = || {
        Problem::new(
            span,
            format!(
                "invalid chmod parameter: {text:?}: it should be octal and between 0 and 07777"
            ),
        )
    };
    if !text.is_empty() && text.bytes().all(|b| (b'0'..=b'7').contains(&b)) {
        let mode = u32::from_str_radix(text, 8).ok();
        return mode
            .filter(|mode| *mode <= 0o7777)
            .map(Chmod::Mode)
            .ok_or_else(octal);
    }
    // What begins as a number was meant as one.
    if text.starts_with(|c: char| c.is_ascii_digit()) {
        return Err(octal());
    }
    if let Err(at) = SymbolicMode::parse(text) {
        let what = if at.is_empty() {
            "it ends too early".to_owned()
        } else {
            format!("invalid syntax at {at:?}")
        };
        let message = format!("invalid chmod parameter: {text:?}: {what}");
        return Err(Problem::new(span, message).with_hint(
            "it should be octal and between 0 and 07777, or changes such as u+x,go=rX",
        ));
    }
    Ok(Chmod::Symbolic(text.to_owned()))
}

pub(super) fn is_signal(text: &str) -> bool {
    if let Ok(number) = text.parse::<u32>() {
        return (1..=64).contains(&number);
    }
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    let realtime = |base: &str| {
        let offset = |n: &str| n.strip_prefix(['+', '-'])?.parse::<u32>().ok();
        name.strip_prefix(base)
            .is_some_and(|n| n.is_empty() || offset(n).is_some_and(|n| n <= 15))
    };
    SIGNALS.contains(&name)
        || matches!(name, "XCPU" | "XFSZ")
        || realtime("RTMIN")
        || realtime("RTMAX")
}

/// `path` seen from `directory`, without `.`, `..` and doubled slashes.
pub(super) fn absolute(directory: &str, path: &str) -> String {
    let joined = if path.starts_with('/') {
        path.to_owned()
    } else {
        format!("{directory}/{path}")
    };
    let mut parts: Vec<&str> = Vec::new();
    for part in joined.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop();
            }
            part => parts.push(part),
        }
    }
    format!("/{}", parts.join("/"))
}

/// As [`absolute`], but what names a directory (`x/`, `.`, `x/.`, nothing at all) keeps a
/// trailing slash.
pub(super) fn copy_destination(directory: &str, path: &str) -> String {
    let is_directory = path.is_empty()
        || path.ends_with('/')
        || path == "."
        || path.ends_with("/.")
        || path == ".."
        || path.ends_with("/..");
    let absolute = absolute(directory, path);
    if is_directory && absolute != "/" {
        format!("{absolute}/")
    } else {
        absolute
    }
}

/// Whether the line is `<<NAME` and nothing else.
pub(super) fn is_only_heredoc(line: &str) -> bool {
    let line = line.trim();
    let digits = line.trim_start_matches(|c: char| c.is_ascii_digit());
    digits.starts_with("<<")
        && !digits[2..].contains(char::is_whitespace)
        && !digits[2..].contains("<<")
}

/// `<<-`: leading tabs of each line are not part of the content.
pub(super) fn without_tabs(content: &str) -> String {
    content
        .split_inclusive('\n')
        .map(|line| line.trim_start_matches('\t'))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_go_texts() {
        for (nanoseconds, text) in [
            (0, "0s"),
            (1, "1ns"),
            (1_500, "1.5µs"),
            (500_000_000, "500ms"),
            (2_500_000_000, "2.5s"),
            (90_000_000_000, "1m30s"),
            (3_600_000_000_000, "1h0m0s"),
            (-1_000_000_000, "-1s"),
        ] {
            assert_eq!(go_duration(nanoseconds), text);
        }
    }

    #[test]
    fn ports_are_listed_with_protocol() {
        assert_eq!(parse_ports("80").unwrap(), ["80/tcp"]);
        assert_eq!(parse_ports("53/UDP").unwrap(), ["53/udp"]);
        assert_eq!(
            parse_ports("7000-7002").unwrap(),
            ["7000/tcp", "7001/tcp", "7002/tcp"]
        );
        assert_eq!(parse_ports("8080:80").unwrap(), ["80/tcp"]);
        for bad in [
            "http-port",
            "80801/udp",
            "80/carrier",
            "9-8",
            "",
            "-",
            "1-",
            "+5",
        ] {
            assert!(parse_ports(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn modes_are_octal_or_changes() {
        let span = Span::default();
        assert_eq!(parse_mode("07755", span).unwrap(), Chmod::Mode(0o7755));
        let symbolic = Chmod::Symbolic("u=rwX,go-w".to_owned());
        assert_eq!(parse_mode("u=rwX,go-w", span).unwrap(), symbolic);
        let octal = "it should be octal and between 0 and 07777";
        for (text, reason) in [
            ("10000", octal),
            ("64a", octal),
            ("9", octal),
            ("u+q", "invalid syntax at \"q\""),
            ("rwx", "invalid syntax at \"rwx\""),
            ("-1", "invalid syntax at \"1\""),
            ("u", "it ends too early"),
        ] {
            let message = format!("invalid chmod parameter: {text:?}: {reason}");
            let problem = parse_mode(text, span).unwrap_err();
            assert_eq!(problem.message, message, "{text}");
        }
    }

    #[test]
    fn paths_become_absolute() {
        for (directory, path, expected) in [
            ("/a", "b", "/a/b"),
            ("/a/b", "../c/", "/a/c"),
            ("/", "../../x", "/x"),
            ("/w", "//d//s", "/d/s"),
            ("/w", ".", "/w"),
        ] {
            assert_eq!(absolute(directory, path), expected);
        }
        assert_eq!(copy_destination("/w", "."), "/w/");
        assert_eq!(copy_destination("/w", ""), "/w/");
        assert_eq!(copy_destination("/w", "/etc/."), "/etc/");
        assert_eq!(copy_destination("/w", "x"), "/w/x");
        assert_eq!(copy_destination("/", "./"), "/");
    }

    #[test]
    fn texts_are_quoted_as_go_does() {
        assert_eq!(
            quoted(&[
                "a \"b\"".into(),
                "c\\d".into(),
                "e\nf".into(),
                String::new()
            ]),
            r#"["a \"b\"" "c\\d" "e\nf" ""]"#
        );
    }

    #[test]
    fn signals_are_known() {
        for good in ["SIGTERM", "sigterm", "TERM", "15", "SIGRTMIN+3", "64"] {
            assert!(is_signal(good), "{good}");
        }
        for bad in ["SIGNOTHING", "0", "65", "", "RTMIN+99", "-1"] {
            assert!(!is_signal(bad), "{bad}");
        }
    }
}
