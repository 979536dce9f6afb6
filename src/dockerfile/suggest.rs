//! "Did you mean": the known word nearest to an unknown one.
//!
//! Near is how many letters are missing, too many, wrong or swapped with their neighbour.

use strsim::osa_distance;

/// Words that differ more are not suggested.
const MAX_DISTANCE: usize = 2;

/// In words as short as this a single slip is all that may differ.
const SHORT_CHARS: usize = 3;

/// The option nearest to `word`, if it is near enough. The first of equally near ones.
pub(crate) fn nearest<'o>(word: &str, options: &[&'o str]) -> Option<&'o str> {
    let word: String = word.chars().take(64).collect();
    let most = if word.chars().count() > SHORT_CHARS {
        MAX_DISTANCE
    } else {
        1
    };
    options
        .iter()
        .map(|option| (osa_distance(&word, option), *option))
        .filter(|(distance, _)| *distance <= most)
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, option)| option)
}

/// Whether `written` is probably `meant`: the same but for upper and lower case, or for a
/// slip in a word long enough.
pub(super) fn is_typo(written: &str, meant: &str) -> bool {
    if written.len() > meant.len() + MAX_DISTANCE || written.is_empty() {
        return false;
    }
    written.to_lowercase() == meant.to_lowercase()
        || written.chars().count() >= SHORT_CHARS && osa_distance(written, meant) == 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_word_wins() {
        let check = |word: &str, expected: Option<&str>| {
            assert_eq!(nearest(word, &["COPY", "CMD", "FROM", "RUN"]), expected);
        };
        check("COPPY", Some("COPY"));
        check("FORM", Some("FROM"));
        check("RN", Some("RUN"));
        check("RNU", Some("RUN"));
        check("CDM", Some("CMD"));
        check("EOF", None);
        check("CPY", Some("COPY"));
        check("XYZZY", None);
        check(&"R".repeat(100_000), None);
    }
}
