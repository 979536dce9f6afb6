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
/// Words.
pub fn expand_words(
    word: &Word,
    escape: char,
    environment: &Environment,
) -> Result<Vec<String>, ExpandError> {
    expand_word(word, escape, environment).map(|w| vec![w])
}
/// Text.
pub fn expand_text(
    text: &str,
    escape: char,
    environment: &Environment,
) -> Result<String, ExpandError> {
    let _ = (text, escape, environment);
    unimplemented!()
}
