//! "Did you mean": the known word nearest to an unknown one.

/// Words that differ more are not suggested.
const MAX_DISTANCE: usize = 2;

/// In words as short as this a single slip is all that may differ.
const SHORT_CHARS: usize = 3;

/// The option nearest to `word`, if it is near enough. The first of equally near ones.
pub(crate) fn nearest<'o>(word: &str, options: &[&'o str]) -> Option<&'o str> {
    let word: Vec<char> = word.chars().take(64).collect();
    let most = if word.len() > SHORT_CHARS {
        MAX_DISTANCE
    } else {
        1
    };
    options
        .iter()
        .map(|option| (distance(&word, option), *option))
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
    let letters: Vec<char> = written.chars().collect();
    written.to_lowercase() == meant.to_lowercase()
        || letters.len() >= SHORT_CHARS && distance(&letters, meant) == 1
}

/// How many letters are missing, too many, wrong or swapped with their neighbour: the
/// "optimal string alignment" variant of Levenshtein's distance.
fn distance(word: &[char], option: &str) -> usize {
    let option: Vec<char> = option.chars().collect();
    let mut before: Vec<usize> = Vec::new();
    let mut row: Vec<usize> = (0..=option.len()).collect();
    for (i, a) in word.iter().enumerate() {
        let mut next = vec![i + 1];
        for (j, b) in option.iter().enumerate() {
            let substituted = row[j] + usize::from(a != b);
            let mut least = substituted.min(row[j + 1] + 1).min(next[j] + 1);
            if i > 0 && j > 0 && *a == option[j - 1] && word[i - 1] == *b {
                least = least.min(before[j - 1] + 1);
            }
            next.push(least);
        }
        before = std::mem::replace(&mut row, next);
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
        check("RNU", Some("RUN"));
        check("CDM", Some("CMD"));
        check("EOF", None);
        check("CPY", Some("COPY"));
        check("XYZZY", None);
        check(&"R".repeat(100_000), None);
    }
}
