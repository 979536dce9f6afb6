//! `--call=targets`: the stages that can be built.

use serde::Serialize;

use super::{Location, base64, json, table};
use crate::dockerfile::{Dockerfile, Word};
use crate::lint::Source;

/// The stages of a Dockerfile.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Targets {
    /// In the order of the file.
    pub targets: Vec<Target>,
    sources: [String; 1],
}

/// A stage.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Target {
    /// Its name; may be empty.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub name: String,
    /// Whether it is built where no target is named.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub default: bool,
    /// What the comment above it says.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub description: String,
    /// What it starts from, as written.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub base: String,
    /// Its platform, as written.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub platform: String,
    /// Where its `FROM` is.
    pub location: Location,
}

impl Targets {
    /// Those of `dockerfile`.
    pub fn new(dockerfile: &Dockerfile) -> Self {
        let source = Source::of(dockerfile);
        let text = |word: &Option<Word>| word.as_ref().map(|w| w.raw.clone()).unwrap_or_default();
        let mut targets = Vec::new();
        for (stage, (from, _)) in dockerfile.stages.iter().zip(&source.stages) {
            let name = text(&stage.name);
            targets.push(Target {
                default: targets.len() + 1 == dockerfile.stages.len(),
                description: from.description(&name).to_owned(),
                name,
                base: stage.base.raw.clone(),
                platform: text(&stage.platform),
                location: Location::of(from.lines),
            });
        }
        Self {
            targets,
            sources: [base64(&dockerfile.text)],
        }
    }

    /// As JSON, without a line end.
    pub fn to_json(&self) -> String {
        json(self)
    }

    /// As a table with line ends.
    pub fn to_text(&self) -> String {
        let mut rows = vec![vec!["TARGET".to_owned(), "DESCRIPTION".to_owned()]];
        for target in &self.targets {
            let name = match (target.name.as_str(), target.default) {
                ("", true) => "(default)".to_owned(),
                (name, true) => format!("{name} (default)"),
                (name, false) => name.to_owned(),
            };
            rows.push(vec![name, target.description.clone()]);
        }
        table(&rows, 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dockerfile;

    fn targets(text: &str) -> Targets {
        Targets::new(&dockerfile::parse("Dockerfile", text.as_bytes()).unwrap())
    }

    #[test]
    fn stages_are_listed_with_what_is_said_of_them() {
        let found = targets(
            "
# build defines stage for compiling the binary
FROM alpine AS build
RUN true

FROM busybox as second
RUN false

FROM alpine
RUN false

# binary returns the compiled binary
FROM second AS binary
",
        );
        let lines: Vec<usize> = found.targets.iter().map(|t| t.location.line()).collect();
        assert_eq!(lines, [3, 6, 9, 13]);
        assert_eq!(
            found.to_text(),
            "TARGET           DESCRIPTION
build            defines stage for compiling the binary
second           
                 
binary (default) returns the compiled binary
"
        );
    }

    #[test]
    fn json_has_buildkits_shape() {
        let found = targets("# a & b\nFROM --platform=$P x \\\n AS a\nFROM $y\n");
        assert_eq!(
            found.to_json(),
            r#"{
  "targets": [
    {
      "name": "a",
      "description": "\u0026 b",
      "base": "x",
      "platform": "$P",
      "location": {
        "ranges": [
          {
            "start": {
              "line": 2
            },
            "end": {
              "line": 2
            }
          },
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
    },
    {
      "default": true,
      "base": "$y",
      "location": {
        "ranges": [
          {
            "start": {
              "line": 4
            },
            "end": {
              "line": 4
            }
          }
        ]
      }
    }
  ],
  "sources": [
    "IyBhICYgYgpGUk9NIC0tcGxhdGZvcm09JFAgeCBcCiBBUyBhCkZST00gJHkK"
  ]
}"#
        );
        assert_eq!(
            found.to_text(),
            "TARGET    DESCRIPTION\na         & b\n(default) \n"
        );
    }
}
