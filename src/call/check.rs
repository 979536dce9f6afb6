//! `--call=check`, which `--check` is short for.

use serde::Serialize;

use super::{Location, base64, excerpt, json, visible};
use crate::lint::{Lines, Report};

/// What checks found, for programs and people.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct CheckResults {
    /// The violations in the order in which they were found; absent where there are none.
    pub warnings: Option<Vec<Warning>>,
    sources: [SourceInfo; 1],
    #[serde(rename = "buildError", skip_serializing_if = "Option::is_none")]
    error: Option<BuildError>,
}

/// One violation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Warning {
    /// The rule's name.
    #[serde(rename = "ruleName")]
    pub rule: &'static str,
    /// What the rule asks for.
    pub description: &'static str,
    /// Where it is explained.
    #[serde(skip_serializing_if = "str::is_empty")]
    pub url: &'static str,
    /// What is wrong.
    pub detail: String,
    /// Where.
    pub location: Location,
    #[serde(skip)]
    lines: Lines,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct SourceInfo {
    filename: String,
    data: String,
    language: &'static str,
    #[serde(skip)]
    text: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct BuildError {
    message: String,
    location: Location,
}

impl CheckResults {
    /// Those of `report` about the file `name` with `text`.
    pub fn new(name: &str, text: &str, report: &Report) -> Self {
        let warnings: Vec<Warning> = (report.violations.iter())
            .map(|violation| Warning {
                rule: violation.rule.name,
                description: violation.rule.description,
                url: violation.rule.url,
                detail: violation.detail.clone(),
                location: Location::of(violation.lines),
                lines: violation.lines,
            })
            .collect();
        let error = match (&report.error, report.lint_error()) {
            (Some(error), _) => Some(BuildError {
                message: error.to_string(),
                location: error.lines().map(Location::of).unwrap_or_default(),
            }),
            (None, Some(error)) => Some(BuildError {
                message: error.to_string(),
                location: Location::default(),
            }),
            (None, None) => None,
        };
        Self {
            warnings: (!warnings.is_empty()).then_some(warnings),
            sources: [SourceInfo {
                filename: name.to_owned(),
                data: base64(text),
                language: "Dockerfile",
                text: text.to_owned(),
            }],
            error,
        }
    }

    /// Whether there is anything to do about the Dockerfile.
    pub fn is_clean(&self) -> bool {
        self.warnings.is_none() && self.error.is_none()
    }

    /// As JSON, without a line end.
    pub fn to_json(&self) -> String {
        json(self)
    }

    /// As text with line ends, sorted by place. An error is not in it.
    pub fn to_text(&self) -> String {
        let [source] = &self.sources;
        let Some(warnings) = &self.warnings else {
            return match self.error {
                None => "Check complete, no warnings found.\n".to_owned(),
                Some(_) => String::new(),
            };
        };
        let mut out = match warnings.len() {
            1 => "Check complete, 1 warning has been found!\n".to_owned(),
            count => format!("Check complete, {count} warnings have been found!\n"),
        };
        let mut sorted: Vec<&Warning> = warnings.iter().collect();
        sorted.sort_by_key(|warning| warning.lines.first);
        for warning in sorted {
            out.push_str(&format!("\nWARNING: {}", warning.rule));
            if !warning.url.is_empty() {
                out.push_str(&format!(" - {}", warning.url));
            }
            out.push_str(&format!("\n{}\n", visible(&warning.detail)));
            out.push_str(&excerpt(&source.filename, &source.text, warning.lines));
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use super::*;
    use crate::dockerfile;
    use crate::image::Platform;
    use crate::lint::{self, Facts};

    fn results(text: &str) -> CheckResults {
        let platform = Platform::parse("linux/amd64").unwrap();
        let facts = Facts {
            build_args: &BTreeMap::new(),
            target: None,
            all_stages: true,
            platform: &platform,
            build_platform: &platform,
            contexts: &BTreeSet::new(),
            images: &BTreeMap::new(),
            ignored: None,
        };
        let report = match dockerfile::parse("Dockerfile", text.as_bytes()) {
            Ok(dockerfile) => lint::check(&dockerfile, &facts),
            Err(error) => lint::check_broken(&error, &facts),
        };
        CheckResults::new("Dockerfile", text, &report)
    }

    #[test]
    fn nothing_found_is_said() {
        let clean = results("FROM scratch\n");
        assert!(clean.is_clean());
        assert_eq!(clean.to_text(), "Check complete, no warnings found.\n");
        assert_eq!(
            clean.to_json(),
            r#"{
  "warnings": null,
  "sources": [
    {
      "filename": "Dockerfile",
      "data": "RlJPTSBzY3JhdGNoCg==",
      "language": "Dockerfile"
    }
  ]
}"#
        );
    }

    #[test]
    fn violations_are_sorted_in_text() {
        // The rule on casing is tried after the one on comments.
        let found = results("FROM scratch\ncmd a \\\n b\nMAINTAINER x\n");
        assert!(!found.is_clean());
        assert_eq!(
            found.to_text(),
            "Check complete, 3 warnings have been found!

WARNING: ConsistentInstructionCasing - https://docs.docker.com/go/dockerfile/rule/consistent-instruction-casing/
Command 'cmd' should match the case of the command majority (uppercase)
Dockerfile:2
--------------------
   1 |     FROM scratch
   2 | >>> cmd a \\
   3 | >>>  b
   4 |     MAINTAINER x
--------------------

WARNING: JSONArgsRecommended - https://docs.docker.com/go/dockerfile/rule/json-args-recommended/
JSON arguments recommended for cmd to prevent unintended behavior related to OS signals
Dockerfile:2
--------------------
   1 |     FROM scratch
   2 | >>> cmd a \\
   3 | >>>  b
   4 |     MAINTAINER x
--------------------

WARNING: MaintainerDeprecated - https://docs.docker.com/go/dockerfile/rule/maintainer-deprecated/
Maintainer instruction is deprecated in favor of using label
Dockerfile:4
--------------------
   2 |     cmd a \\
   3 |      b
   4 | >>> MAINTAINER x
   5 |     
--------------------
"
        );
    }

    #[test]
    fn json_has_buildkits_shape() {
        let found = results("# check=error=true;experimental=all\n# x\nARG a\nFROM scratch\n");
        assert_eq!(
            found.to_json(),
            r#"{
  "warnings": [
    {
      "ruleName": "InvalidDefinitionDescription",
      "description": "Comment for build stage or argument should follow the format: `# \u003carg/stage name\u003e \u003cdescription\u003e`. If this is not intended to be a description comment, add an empty line or comment between the instruction and the comment.",
      "url": "https://docs.docker.com/go/dockerfile/rule/invalid-definition-description/",
      "detail": "Comment for ARG should follow the format: `# a \u003cdescription\u003e`",
      "location": {
        "ranges": [
          {
            "start": {
              "line": 3
            },
            "end": {
              "line": 3
            }
          }
        ]
      }
    }
  ],
  "sources": [
    {
      "filename": "Dockerfile",
      "data": "IyBjaGVjaz1lcnJvcj10cnVlO2V4cGVyaW1lbnRhbD1hbGwKIyB4CkFSRyBhCkZST00gc2NyYXRjaAo=",
      "language": "Dockerfile"
    }
  ],
  "buildError": {
    "message": "lint violation found for rules: InvalidDefinitionDescription",
    "location": {}
  }
}"#
        );
    }

    #[test]
    fn errors_stand_apart() {
        let text = "FROM scratch\nBAD\n";
        let broken = results(text);
        assert_eq!((broken.to_text().as_str(), broken.is_clean()), ("", false));
        assert!(
            broken.to_json().ends_with(
                r#"  "buildError": {
    "message": "unknown instruction \"BAD\"",
    "location": {
      "ranges": [
        {
          "start": {
            "line": 2
          },
          "end": {
            "line": 2
          }
        }
      ]
    }
  }
}"#
            ),
            "{}",
            broken.to_json()
        );
    }
}
