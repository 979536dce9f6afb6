//! Go's duration syntax, as `HEALTHCHECK` options have it: `1m30s`, `1.5h`, `500ms`.
//!
//! <https://pkg.go.dev/time#ParseDuration>

/// The duration in nanoseconds; `None` if `text` is none or does not fit.
pub(super) fn parse(text: &str) -> Option<i64> {
    let (negative, mut rest) = match text.as_bytes().first()? {
        b'-' => (true, &text[1..]),
        b'+' => (false, &text[1..]),
        _ => (false, text),
    };
    if rest == "0" {
        return Some(0);
    }
    if rest.is_empty() {
        return None;
    }
    let mut total: u64 = 0;
    while !rest.is_empty() {
        let (whole, after) = split_digits(rest);
        let (fraction, after) = match after.strip_prefix('.') {
            Some(after) => split_digits(after),
            None => ("", after),
        };
        if whole.is_empty() && fraction.is_empty() {
            return None;
        }
        let unit_end = after
            .find(|c: char| c == '.' || c.is_ascii_digit())
            .unwrap_or(after.len());
        let nanoseconds: u64 = match &after[..unit_end] {
            "ns" => 1,
            "us" | "µs" | "μs" => 1_000,
            "ms" => 1_000_000,
            "s" => 1_000_000_000,
            "m" => 60 * 1_000_000_000,
            "h" => 3_600 * 1_000_000_000,
            _ => return None,
        };
        rest = &after[unit_end..];
        let whole: u64 = if whole.is_empty() {
            0
        } else {
            whole.parse().ok()?
        };
        total = total.checked_add(whole.checked_mul(nanoseconds)?)?;
        // Further digits are below a nanosecond even of an hour.
        let fraction = &fraction[..fraction.len().min(18)];
        if !fraction.is_empty() {
            let scale = 10u128.pow(fraction.len() as u32);
            let part = u128::from(fraction.parse::<u64>().ok()?) * u128::from(nanoseconds) / scale;
            total = total.checked_add(u64::try_from(part).ok()?)?;
        }
        if total > 1 << 63 {
            return None;
        }
    }
    if negative {
        return 0i64.checked_sub_unsigned(total);
    }
    i64::try_from(total).ok()
}

fn split_digits(text: &str) -> (&str, &str) {
    let end = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    text.split_at(end)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_nanoseconds() {
        let check = |text: &str, expected: Option<i64>| assert_eq!(parse(text), expected, "{text}");
        check("0", Some(0));
        check("-0", Some(0));
        check("5s", Some(5_000_000_000));
        check("1m30s", Some(90_000_000_000));
        check("2500ms", Some(2_500_000_000));
        check("1.5h", Some(5_400_000_000_000));
        check(".5s", Some(500_000_000));
        check("1.s", Some(1_000_000_000));
        check("-2s", Some(-2_000_000_000));
        check("+2us", Some(2_000));
        check("3µs", Some(3_000));
        check("3μs", Some(3_000));
        check("7ns", Some(7));
        check("0.3333333333333333333h", Some(1_199_999_999_999));
        check("9223372036854775807ns", Some(i64::MAX));
        check("-9223372036854775808ns", Some(i64::MIN));
        check("9223372036854775808ns", None);
        check("3000000h", None);
        for text in [
            "", "+", "5", "s", ".s", "soon", "1d", "1 s", "1s ", "--1s", "1.5.5s",
        ] {
            check(text, None);
        }
    }
}
