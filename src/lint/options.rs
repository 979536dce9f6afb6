//! `check=skip=A,B;experimental=C;error=true`: which rules apply and what a violation means.

use std::collections::BTreeSet;

use super::rule::Rule;
use crate::dockerfile::{Check, parse_check};

/// The build argument that replaces the directive.
pub const CHECK_ARG: &str = "BUILDKIT_DOCKERFILE_CHECK";

/// Which rules apply.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Options {
    skip_all: bool,
    skip: BTreeSet<String>,
    experimental_all: bool,
    experimental: BTreeSet<String>,
    /// Whether a violation ends a build.
    pub(super) error: bool,
}

/// Why check options cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub(super) struct OptionsError(String);

impl Options {
    /// Reads options, separated by semicolons; of several of one name the last counts.
    ///
    /// # Errors
    /// [`OptionsError`] with what [`parse_check`] says.
    pub(super) fn parse(text: &str) -> Result<Self, OptionsError> {
        let Check {
            skip_all,
            skip,
            experimental_all,
            experimental,
            error,
        } = parse_check(text).map_err(|error| OptionsError(error.to_string()))?;
        Ok(Self {
            skip_all,
            skip: skip.into_iter().collect(),
            experimental_all,
            experimental: experimental.into_iter().collect(),
            error,
        })
    }

    /// The options that a `check=` directive has: what stands before the first blank.
    ///
    /// # Errors
    /// As [`Self::parse`].
    pub(super) fn of_directive(value: &str) -> Result<Self, OptionsError> {
        Self::parse(value.split(' ').next().unwrap_or_default())
    }

    /// These, and what a comment before an instruction says for that alone. What it says of
    /// errors does not count, nor does a comment that cannot be read.
    pub(super) fn with_comments(&self, comments: &[String]) -> Self {
        let mut merged = self.clone();
        let value = comments.iter().find_map(|comment| {
            directive(comment)
                .filter(|(name, _)| name == "check")
                .map(|(_, value)| value)
        });
        let Some(Ok(other)) = value.map(Self::of_directive) else {
            return merged;
        };
        merged.skip_all |= other.skip_all;
        merged.experimental_all |= other.experimental_all;
        merged.skip.extend(other.skip);
        merged.experimental.extend(other.experimental);
        merged
    }

    /// Whether `rule` is looked for.
    pub(super) fn applies(&self, rule: &Rule) -> bool {
        if rule.is_experimental {
            self.experimental_all || self.experimental.contains(rule.name)
        } else {
            !self.skip_all && !self.skip.contains(rule.name)
        }
    }
}

/// A comment's text as a parser directive: its name in lower case and its value.
pub(super) fn directive(comment: &str) -> Option<(String, &str)> {
    let (name, value) = comment.trim_start().split_once('=')?;
    let name = name.trim_end().to_ascii_lowercase();
    let known = matches!(name.as_str(), "syntax" | "escape" | "check");
    (known && !value.is_empty()).then(|| (name, value.trim()))
}

#[cfg(test)]
mod tests {
    use super::super::rule::{INVALID_DEFINITION_DESCRIPTION, RULES, UNDEFINED_VAR};
    use super::*;

    #[test]
    fn options_choose_rules() {
        let applies = |text: &str, rule: &Rule| Options::parse(text).unwrap().applies(rule);
        let (usual, experimental) = (&UNDEFINED_VAR, &INVALID_DEFINITION_DESCRIPTION);
        assert!(applies("", usual));
        assert!(!applies("", experimental));
        assert!(!applies("skip=all", usual));
        assert!(!applies("skip = FromAsCasing , UndefinedVar ", usual));
        assert!(applies("skip=FromAsCasing", usual));
        assert!(applies("skip=all;experimental=all", experimental));
        assert!(applies(
            "experimental=InvalidDefinitionDescription;error=1",
            experimental
        ));
        assert!(applies(
            "skip=InvalidDefinitionDescription;experimental=all",
            experimental
        ));
        assert!(Options::parse("error=true;skip=all").unwrap().error);
        assert!(!Options::parse("error=F").unwrap().error);
    }

    #[test]
    fn a_comment_counts_for_one_instruction() {
        let merged = |comments: &[&str]| {
            let comments: Vec<String> = comments.iter().map(|c| (*c).to_owned()).collect();
            Options::default().with_comments(&comments)
        };
        assert!(!merged(&["check=skip=UndefinedVar // why"]).applies(&UNDEFINED_VAR));
        assert!(!merged(&["words", "Check = skip=all;error=true"]).applies(&UNDEFINED_VAR));
        assert!(!merged(&["check=skip=all;error=true"]).error);
        // Only the first counts, and only if it can be read.
        assert!(merged(&["check=nonsense", "check=skip=all"]).applies(&UNDEFINED_VAR));
        assert!(merged(&["see check=skip=all"]).applies(&UNDEFINED_VAR));
        assert!(merged(&["checks=skip=all"]).applies(&UNDEFINED_VAR));
    }

    #[test]
    fn every_rule_is_in_the_list_once() {
        let names: BTreeSet<&str> = RULES.iter().map(|rule| rule.name).collect();
        assert_eq!(names.len(), RULES.len());
        for rule in RULES {
            // `FromAsCasing` is explained at `…/from-as-casing/`.
            let last = rule.url.trim_end_matches('/').rsplit('/').next();
            let joined: String = last.unwrap_or_default().split('-').collect();
            assert!(
                rule.url.is_empty() || joined.eq_ignore_ascii_case(rule.name),
                "{rule:?}"
            );
        }
    }
}
