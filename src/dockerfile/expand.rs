//! Word expansion: variables, quotes and escapes, against a given environment.

use std::collections::BTreeMap;

use super::Word;

/// What variables are worth.
pub type Environment = BTreeMap<String, String>;

/// Why a word cannot be expanded.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ExpandError(pub String);

/// Expands `word` to one text: variables replaced, quotes removed.
///
/// # Errors
/// [`ExpandError`] for `${NAME:?message}`, unterminated quotes, unknown modifiers.
pub fn expand_word(
    word: &Word,
    escape: char,
    environment: &Environment,
) -> Result<String, ExpandError> {
    let _ = (word, escape, environment);
    unimplemented!()
}
