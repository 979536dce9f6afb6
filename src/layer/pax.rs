//! Extended header records: `LENGTH KEY=VALUE\n`, parsed by their length alone, because
//! values are binary and may hold newlines.
//!
//! <https://pubs.opengroup.org/onlinepubs/9799919799/utilities/pax.html#tag_20_94_13_03>

use crate::rootfs::Time;

/// Begins the keys of extended attributes.
pub(super) const XATTR_PREFIX: &[u8] = b"SCHILY.xattr.";

/// One record.
pub(super) type Record<'d> = (&'d [u8], &'d [u8]);

/// Splits the body of an extended header into its records, in their order.
///
/// # Errors
/// What is wrong, for people.
pub(super) fn parse(mut data: &[u8]) -> Result<Vec<Record<'_>>, &'static str> {
    let mut records = Vec::new();
    while !data.is_empty() {
        let (record, rest) = first_record(data)?;
        records.push(record);
        data = rest;
    }
    Ok(records)
}

fn first_record(data: &[u8]) -> Result<(Record<'_>, &[u8]), &'static str> {
    const BAD_LENGTH: &str = "extended header record without a valid length";
    let space = data.iter().position(|b| *b == b' ').ok_or(BAD_LENGTH)?;
    let length = decimal(&data[..space])
        .and_then(|n| usize::try_from(n).ok())
        .filter(|n| *n > space + 1 && *n <= data.len())
        .ok_or(BAD_LENGTH)?;
    let (record, rest) = data.split_at(length);
    let record = record[space + 1..]
        .strip_suffix(b"\n")
        .ok_or("extended header record that does not end in a newline")?;
    let equals = record
        .iter()
        .position(|b| *b == b'=')
        .filter(|at| *at > 0)
        .ok_or("extended header record without a key")?;
    let (key, value) = (&record[..equals], &record[equals + 1..]);
    if key.contains(&0) {
        return Err("extended header record with a NUL in its key");
    }
    if matches!(key, b"path" | b"linkpath" | b"GNU.sparse.name") && value.contains(&0) {
        return Err("extended header record with a NUL in a path");
    }
    Ok(((key, value), rest))
}

/// A decimal number of digits only.
pub(super) fn decimal(text: &[u8]) -> Option<u64> {
    if text.is_empty() {
        return None;
    }
    text.iter().try_fold(0_u64, |value, byte| {
        let digit = (*byte as char).to_digit(10)?;
        value.checked_mul(10)?.checked_add(u64::from(digit))
    })
}

/// A time such as `-1.5`, digits below a nanosecond cut off.
pub(super) fn time(text: &[u8]) -> Option<Time> {
    let (negative, text) = match text.strip_prefix(b"-") {
        Some(rest) => (true, rest),
        None => (false, text),
    };
    let mut parts = text.splitn(2, |b| *b == b'.');
    let seconds = i64::try_from(decimal(parts.next()?)?).ok()?;
    let fraction = parts.next().unwrap_or_default();
    if !fraction.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let digit = |at: usize| fraction.get(at).map_or(0, |b| u32::from(b - b'0'));
    let nanoseconds = (0..9).fold(0, |value, at| value * 10 + digit(at));
    Some(match (negative, nanoseconds) {
        (false, nanoseconds) => Time {
            seconds,
            nanoseconds,
        },
        (true, 0) => Time {
            seconds: -seconds,
            nanoseconds: 0,
        },
        (true, nanoseconds) => Time {
            seconds: -seconds - 1,
            nanoseconds: 1_000_000_000 - nanoseconds,
        },
    })
}

/// Appends one record. The length counts its own digits.
pub(super) fn push(out: &mut Vec<u8>, key: &[u8], value: &[u8]) {
    let rest = " =\n".len() + key.len() + value.len();
    let mut length = rest;
    loop {
        let total = rest + length.to_string().len();
        if total == length {
            break;
        }
        length = total;
    }
    out.extend_from_slice(length.to_string().as_bytes());
    out.push(b' ');
    out.extend_from_slice(key);
    out.push(b'=');
    out.extend_from_slice(value);
    out.push(b'\n');
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_cut_by_their_length() {
        let mut data = Vec::new();
        push(&mut data, b"path", b"a");
        push(&mut data, b"SCHILY.xattr.user.x", b"1 a=b\n\0\xff\n");
        push(&mut data, b"mtime", b"");
        assert!(
            data.starts_with(b"9 path=a\n33 "),
            "{}",
            data.escape_ascii()
        );
        assert_eq!(
            parse(&data).unwrap(),
            [
                (&b"path"[..], &b"a"[..]),
                (b"SCHILY.xattr.user.x", b"1 a=b\n\0\xff\n"),
                (b"mtime", b""),
            ]
        );
        for length in 0..2000 {
            let mut data = Vec::new();
            let value = vec![b'v'; length];
            push(&mut data, b"k", &value);
            assert_eq!(parse(&data).unwrap(), [(&b"k"[..], &value[..])]);
        }
    }

    #[test]
    fn malformed_records_are_refused() {
        for (data, problem) in [
            (
                &b"9 path=a"[..],
                "extended header record without a valid length",
            ),
            (
                b"9 path=ab\n",
                "extended header record that does not end in a newline",
            ),
            (
                b"-9 path=a\n",
                "extended header record without a valid length",
            ),
            (
                b"99999999999999999999999 path=a\n",
                "extended header record without a valid length",
            ),
            (b"path=a\n", "extended header record without a valid length"),
            (b"2 \n", "extended header record without a valid length"),
            (b"3 \n", "extended header record without a key"),
            (b"8 =path\n", "extended header record without a key"),
            (
                b"8 k\0y=v\n",
                "extended header record with a NUL in its key",
            ),
            (
                b"12 path=a\0b\n",
                "extended header record with a NUL in a path",
            ),
            (
                b"9 path=a\n\0\0",
                "extended header record without a valid length",
            ),
        ] {
            assert_eq!(
                parse(data).map(|_| ()),
                Err(problem),
                "{}",
                data.escape_ascii()
            );
        }
    }

    #[test]
    fn times_have_nanoseconds() {
        let t = |seconds, nanoseconds| {
            Some(Time {
                seconds,
                nanoseconds,
            })
        };
        for (text, expected) in [
            ("0", t(0, 0)),
            ("1350244992.023960108", t(1_350_244_992, 23_960_108)),
            ("1.5", t(1, 500_000_000)),
            ("1.", t(1, 0)),
            ("-1", t(-1, 0)),
            ("-1.5", t(-2, 500_000_000)),
            ("-0.5", t(-1, 500_000_000)),
            ("1.1234567899", t(1, 123_456_789)),
            ("", None),
            ("-", None),
            (".5", None),
            ("1.x", None),
            ("1e9", None),
            ("99999999999999999999", None),
        ] {
            assert_eq!(time(text.as_bytes()), expected, "{text}");
        }
    }
}
