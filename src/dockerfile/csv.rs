//! Comma-separated options, as `--mount` and `--device` take them.

use super::error::quoted;

/// What is wrong with comma-separated options.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CommaError {
    /// A quote inside this field, which does not begin with one.
    #[error("{} has a quote inside: quote the whole field and double the quote", quoted(.0))]
    BareQuote(String),
    /// A quote before this text that has no counterpart.
    #[error("the quote before {} has no end", quoted(.0))]
    Unterminated(String),
    /// Text after a closing quote.
    #[error("a comma must follow a quoted field, not {}", quoted(.0))]
    AfterQuote(String),
}

/// Splits one line of comma-separated values: fields may be quoted with `"`, which is
/// doubled inside. Blanks count. No fields if `line` is empty.
///
/// # Errors
/// [`CommaError`] for quotes in the wrong place.
pub fn comma_fields(line: &str) -> Result<Vec<String>, CommaError> {
    let mut fields = Vec::new();
    if line.is_empty() {
        return Ok(fields);
    }
    let mut rest = Some(line);
    while let Some(text) = rest {
        let (field, after) = match text.strip_prefix('"') {
            Some(text) => quoted_field(text)?,
            None => plain_field(text)?,
        };
        fields.push(field);
        rest = after;
    }
    Ok(fields)
}

/// A field and what follows its comma, if there is one.
type Field<'t> = (String, Option<&'t str>);

fn plain_field(text: &str) -> Result<Field<'_>, CommaError> {
    let (field, after) = match text.split_once(',') {
        Some((field, after)) => (field, Some(after)),
        None => (text, None),
    };
    if field.contains('"') {
        return Err(CommaError::BareQuote(field.to_owned()));
    }
    Ok((field.to_owned(), after))
}

/// As [`plain_field`], after the opening quote.
fn quoted_field(text: &str) -> Result<Field<'_>, CommaError> {
    let mut field = String::new();
    let mut rest = text;
    loop {
        let (part, after) = rest
            .split_once('"')
            .ok_or_else(|| CommaError::Unterminated(rest.to_owned()))?;
        field.push_str(part);
        if let Some(after) = after.strip_prefix('"') {
            field.push('"');
            rest = after;
        } else if after.is_empty() {
            return Ok((field, None));
        } else if let Some(after) = after.strip_prefix(',') {
            return Ok((field, Some(after)));
        } else {
            return Err(CommaError::AfterQuote(after.to_owned()));
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
            assert_eq!(
                comma_fields(line).unwrap_err().to_string(),
                expected,
                "{line}"
            );
        };
        check(
            "a\"b",
            "\"a\\\"b\" has a quote inside: quote the whole field and double the quote",
        );
        check("\"ab", "the quote before \"ab\" has no end");
        check("\"a\"b", "a comma must follow a quoted field, not \"b\"");
    }
}
