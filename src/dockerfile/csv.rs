//! Comma-separated options, as `--mount` and `--device` take them.

/// Splits one line of comma-separated values: fields may be quoted with `"`, which is
/// doubled inside. Blanks count. No fields if `line` is empty.
///
/// # Errors
/// What is wrong with the quotes.
pub fn comma_fields(line: &str) -> Result<Vec<String>, String> {
    let mut fields = Vec::new();
    let mut rest = line;
    if line.is_empty() {
        return Ok(fields);
    }
    loop {
        let Some(mut quoted) = rest.strip_prefix('"') else {
            let (field, after) = match rest.split_once(',') {
                Some((field, after)) => (field, Some(after)),
                None => (rest, None),
            };
            if field.contains('"') {
                return Err(format!(
                    "{field:?} has a quote inside: quote the whole field and double the quote"
                ));
            }
            fields.push(field.to_owned());
            match after {
                Some(after) => rest = after,
                None => return Ok(fields),
            }
            continue;
        };
        let mut field = String::new();
        loop {
            let Some((part, after)) = quoted.split_once('"') else {
                return Err(format!("the quote before {quoted:?} has no end"));
            };
            field.push_str(part);
            match after.strip_prefix('"') {
                Some(after) => {
                    field.push('"');
                    quoted = after;
                }
                None => {
                    quoted = after;
                    break;
                }
            }
        }
        fields.push(field);
        if quoted.is_empty() {
            return Ok(fields);
        }
        match quoted.strip_prefix(',') {
            Some(after) => rest = after,
            None => {
                return Err(format!(
                    "a comma must follow a quoted field, not {quoted:?}"
                ));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_split() {
        let check = |line: &str, expected: &[&str]| {
            assert_eq!(comma_fields(line).unwrap(), expected, "{line}");
        };
        check("", &[]);
        check("a", &["a"]);
        check(
            "type=cache,target=/x,ro",
            &["type=cache", "target=/x", "ro"],
        );
        check(r#""a,b""c",d"#, &["a,b\"c", "d"]);
        check("a,,", &["a", "", ""]);
        check(r#""a","#, &["a", ""]);
        check(" a, b", &[" a", " b"]);
    }

    #[test]
    fn wrong_quotes_are_errors() {
        let check = |line: &str, expected: &str| {
            assert_eq!(comma_fields(line).unwrap_err(), expected, "{line}");
        };
        check(
            "a\"b",
            "\"a\\\"b\" has a quote inside: quote the whole field and double the quote",
        );
        check("\"ab", "the quote before \"ab\" has no end");
        check("\"a\"b", "a comma must follow a quoted field, not \"b\"");
    }
}
