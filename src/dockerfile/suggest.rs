//! "Did you mean": the known word nearest to an unknown one.

/// Words that differ more are not suggested.
const MAX_DISTANCE: usize = 2;

/// The option nearest to `word`, if it is near enough. The first of equally near ones.
pub(super) fn nearest<'o>(word: &str, options: &[&'o str]) -> Option<&'o str> {
    let word: Vec<char> = word.chars().take(64).collect();
    options
        .iter()
        .map(|option| (distance(&word, option), *option))
        .filter(|(distance, _)| *distance <= MAX_DISTANCE)
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, option)| option)
}

/// Whether `written` is probably `meant`: the same but for upper and lower case, or for a
/// slip in a word long enough.
pub(super) fn is_typo(written: &str, meant: &str) -> bool {
    if written.len() > meant.len() + MAX_DISTANCE || written.is_empty() {
        return false;
    }
    let same_letters = || {
        let sorted = |text: &str| {
            let mut letters: Vec<char> = text.chars().collect();
            letters.sort_unstable();
            letters
        };
        sorted(written) == sorted(meant)
    };
    let letters: Vec<char> = written.chars().collect();
    written.to_lowercase() == meant.to_lowercase()
        || letters.len() > 2 && (same_letters() || distance(&letters, meant) < MAX_DISTANCE)
}

/// Levenshtein's distance.
fn distance(word: &[char], option: &str) -> usize {
    let option: Vec<char> = option.chars().collect();
    let mut row: Vec<usize> = (0..=option.len()).collect();
    for (i, a) in word.iter().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, b) in option.iter().enumerate() {
            let substituted = diagonal + usize::from(a != b);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[option.len()]
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
        check("CPY", Some("COPY"));
        check("XYZZY", None);
        check(&"R".repeat(100_000), None);
    }
}
