//! Comma-separated options, as `--mount` and `--device` take them.

use std::ops::Range;

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

/// One of several comma-separated fields.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct CommaField {
    /// The text without the quotes around it.
    pub(super) text: String,
    /// Where it stands in the line, quotes included.
    pub(super) range: Range<usize>,
}

/// Splits one line of comma-separated values: fields may be quoted with `"`, which is
/// doubled inside. Blanks count. No fields if `line` is empty.
///
/// # Errors
/// [`CommaError`] for quotes in the wrong place.
pub fn comma_fields(line: &str) -> Result<Vec<String>, CommaError> {
    match placed_fields(line) {
        Ok(fields) => Ok(fields.into_iter().map(|field| field.text).collect()),
        Err((error, _)) => Err(error),
    }
}

/// As [`comma_fields`], with the places of the fields, or of what is wrong.
pub(super) fn placed_fields(line: &str) -> Result<Vec<CommaField>, (CommaError, Range<usize>)> {
    let mut fields = Vec::new();
    if line.is_empty() {
        return Ok(fields);
    }
    let mut start = 0;
    let mut rest = Some(line);
    while let Some(text) = rest {
        let (field, after) = match text.strip_prefix('"') {
            Some(text) => quoted_field(text),
            None => plain_field(text),
        }
        .map_err(|error| (error, start..line.len()))?;
        let next = after.map_or(line.len() + 1, |after| line.len() - after.len());
        fields.push(CommaField {
            text: field,
            range: start..next - 1,
        });
        start = next;
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
    fn places_include_the_quotes() {
        let line = r#"a,"b,""c",,d"#;
        let fields = placed_fields(line).unwrap();
        let places: Vec<&str> = (fields.iter().map(|f| &line[f.range.clone()])).collect();
        assert_eq!(places, ["a", r#""b,""c""#, "", "d"]);
        let (_, range) = placed_fields("a,b\"c").unwrap_err();
        assert_eq!(range, 2..5);
        let empty_last = placed_fields("a,").unwrap();
        assert_eq!(empty_last[1].range, 2..2);
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
