//! `--call=outline`: what a target can be given.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

use super::{Location, base64, json, table};
use crate::dockerfile::Dockerfile;
use crate::lint::{ArgInfo, Base, MountInfo, Source, Walked};

/// What a target and the stages that it needs can be given.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Outline {
    /// The target's name; may be empty.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub name: String,
    /// What the comment above it says.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub description: String,
    /// Build arguments.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub args: Vec<OutlineArg>,
    /// Secrets.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub secrets: Vec<OutlineMount>,
    /// SSH agents.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub ssh: Vec<OutlineMount>,
    sources: [String; 1],
}

/// A build argument.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct OutlineArg {
    /// Its name.
    pub name: String,
    /// What the comment above it says.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub description: String,
    /// What it is worth in this build.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub value: String,
    /// Where it is declared.
    pub location: Location,
}

/// A secret or an agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct OutlineMount {
    /// Its name.
    pub name: String,
    /// Whether the build fails without.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub required: bool,
    /// Where it is used first.
    pub location: Location,
}

impl Outline {
    /// That of the target of `walked`, which came of `dockerfile` without an error.
    pub fn new(dockerfile: &Dockerfile, walked: &Walked) -> Self {
        let mut args = BTreeMap::new();
        let mut secrets = BTreeMap::new();
        let mut ssh = BTreeMap::new();
        for stage in needed(walked) {
            let Some(declared) = walked.declared.get(stage) else {
                continue;
            };
            for (name, info) in stage_args(walked, stage) {
                args.entry(name).or_insert(info);
            }
            for (all, own) in [(&mut secrets, &declared.secrets), (&mut ssh, &declared.ssh)] {
                for (name, info) in own {
                    all.entry(name.as_str()).or_insert(info);
                }
            }
        }
        let args = args.into_iter().map(|(name, info)| OutlineArg {
            name: name.to_owned(),
            description: info.description.clone(),
            value: info.value.clone(),
            location: Location::of(info.lines),
        });
        let mut args: Vec<OutlineArg> = args.collect();
        args.sort_by_key(|arg| arg.location.line());
        let stage = dockerfile.stages.get(walked.target);
        let name = stage.and_then(|stage| stage.name.as_ref());
        let name = name.map(|name| name.raw.clone()).unwrap_or_default();
        let source = Source::of(dockerfile);
        let placed = source.stages.get(walked.target).map(|(from, _)| from);
        Self {
            description: placed.map_or("", |from| from.description(&name)).to_owned(),
            name,
            args,
            secrets: mounts(secrets),
            ssh: mounts(ssh),
            sources: [base64(&dockerfile.text)],
        }
    }

    /// As JSON, without a line end.
    pub fn to_json(&self) -> String {
        json(self)
    }

    /// As tables with line ends.
    pub fn to_text(&self) -> String {
        let mut out = String::new();
        let mut add = |rows: Vec<Vec<String>>, padding| {
            out.push_str(&table(&rows, padding));
            out.push('\n');
        };
        if !self.name.is_empty() || !self.description.is_empty() {
            let row = |name: &str, value: &str| vec![name.to_owned(), value.to_owned()];
            let mut rows = vec![row("TARGET:", &self.name)];
            if !self.description.is_empty() {
                rows.push(row("DESCRIPTION:", &self.description));
            }
            add(rows, 1);
        }
        if !self.args.is_empty() {
            let title = ["BUILD ARG", "VALUE", "DESCRIPTION"].map(str::to_owned);
            let row = |a: &OutlineArg| vec![a.name.clone(), a.value.clone(), a.description.clone()];
            let rows = std::iter::once(title.to_vec()).chain(self.args.iter().map(row));
            add(rows.collect(), 3);
        }
        for (title, mounts) in [("SECRET", &self.secrets), ("SSH", &self.ssh)] {
            if !mounts.is_empty() {
                let title = vec![title.to_owned(), "REQUIRED".to_owned()];
                let required = |m: &OutlineMount| if m.required { "true" } else { "" };
                let row = |m: &OutlineMount| vec![m.name.clone(), required(m).to_owned()];
                let rows = std::iter::once(title).chain(mounts.iter().map(row));
                add(rows.collect(), 3);
            }
        }
        out
    }
}

/// The target and the stages that it needs: each before what it starts from, and that
/// before what it copies from.
fn needed(walked: &Walked) -> Vec<usize> {
    let mut needed = Vec::new();
    let mut seen = BTreeSet::new();
    let mut pending = vec![walked.target];
    while let Some(index) = pending.pop() {
        let Some(node) = walked.nodes.get(index).filter(|_| seen.insert(index)) else {
            continue;
        };
        needed.push(index);
        pending.extend(node.sources.iter().rev());
        if let Base::Stage(base) = node.base {
            pending.push(base);
        }
    }
    needed
}

/// The arguments that one stage uses, also those that only make up others' values.
fn stage_args(walked: &Walked, stage: usize) -> BTreeMap<&str, &ArgInfo> {
    let declared = &walked.declared[stage];
    let mut used = BTreeMap::new();
    let mut pending: Vec<&str> = (walked.nodes[stage].used_args.iter())
        .chain(&declared.used_args)
        .map(String::as_str)
        .collect();
    while let Some(name) = pending.pop() {
        let info = declared
            .args
            .get(name)
            .or_else(|| walked.global_args.get(name));
        if let Some(info) = info
            && used.insert(name, info).is_none()
        {
            pending.extend(info.needs.iter().map(String::as_str));
        }
    }
    used
}

fn mounts(found: BTreeMap<&str, &MountInfo>) -> Vec<OutlineMount> {
    let mounts = found.into_iter().map(|(name, info)| OutlineMount {
        name: name.to_owned(),
        required: info.required,
        location: Location::of(info.lines),
    });
    let mut mounts: Vec<OutlineMount> = mounts.collect();
    mounts.sort_by_key(|mount| mount.location.line());
    mounts
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dockerfile;
    use crate::image::Platform;
    use crate::lint::{self, Facts};

    fn outline(text: &str, target: Option<&str>) -> Outline {
        let platform = Platform::parse("linux/amd64").unwrap();
        let facts = Facts {
            build_args: &BTreeMap::from([("BAR".to_owned(), "678".to_owned())]),
            target,
            all_stages: false,
            platform: &platform,
            build_platform: &platform,
            contexts: &BTreeSet::new(),
            images: &BTreeMap::new(),
            ignored: None,
        };
        let dockerfile = dockerfile::parse("Dockerfile", text.as_bytes()).unwrap();
        let walked = lint::walk(&dockerfile, &facts);
        assert_eq!(walked.report.error, None);
        Outline::new(&dockerfile, &walked)
    }

    const ARGS: &str = "
ARG inherited=box
ARG inherited2=box2
ARG unused=abc${inherited2}
# sfx is a suffix
ARG sfx=\"usy${inherited}\"

FROM b${sfx} AS first
# this is not assigned to anything
ARG FOO=123
# BAR is a number
ARG BAR=456
RUN true

FROM alpine${unused} AS second
ARG BAZ
RUN true

FROM scratch AS third
ARG ABC=a
# check=skip=all
ARG password
# alternate_password will show up in the outline
# check=skip=all
ARG alternate_password

# target defines build target
FROM third AS target
COPY --from=first /etc/passwd /

FROM second
";

    #[test]
    fn arguments_of_needed_stages_are_listed() {
        let outline = outline(ARGS, Some("target"));
        assert_eq!(
            (outline.name.as_str(), outline.description.as_str()),
            ("target", "defines build target")
        );
        let args: Vec<(&str, &str, &str, usize)> = (outline.args.iter())
            .map(|a| {
                (
                    a.name.as_str(),
                    a.value.as_str(),
                    a.description.as_str(),
                    a.location.line(),
                )
            })
            .collect();
        assert_eq!(
            args,
            [
                ("inherited", "box", "", 2),
                ("sfx", "usybox", "is a suffix", 6),
                ("FOO", "123", "", 10),
                ("BAR", "678", "is a number", 12),
                ("ABC", "a", "", 20),
                ("password", "", "", 22),
                ("alternate_password", "", "will show up in the outline", 25),
            ]
        );
        assert_eq!(
            outline.to_text(),
            "TARGET:      target
DESCRIPTION: defines build target

BUILD ARG            VALUE    DESCRIPTION
inherited            box      
sfx                  usybox   is a suffix
FOO                  123      
BAR                  678      is a number
ABC                  a        
password                      
alternate_password            will show up in the outline

"
        );
    }

    #[test]
    fn secrets_and_agents_are_listed() {
        let text = "
FROM busybox AS first
RUN --mount=type=secret,target=/etc/passwd,required=true --mount=type=ssh true

FROM alpine AS second
RUN --mount=type=secret,id=unused --mount=type=ssh,id=ssh2 true

FROM scratch AS third
ARG BAR
RUN --mount=type=secret,id=second${BAR} true

FROM third AS target
COPY --from=first /foo /
RUN --mount=type=ssh,id=ssh3,required true

FROM second
";
        let outline = outline(text, Some("target"));
        let listed = |mounts: &[OutlineMount]| -> Vec<(String, bool, usize)> {
            let one = |m: &OutlineMount| (m.name.clone(), m.required, m.location.line());
            mounts.iter().map(one).collect()
        };
        assert_eq!(
            listed(&outline.secrets),
            [
                ("passwd".to_owned(), true, 3),
                ("second678".to_owned(), false, 10)
            ]
        );
        assert_eq!(
            listed(&outline.ssh),
            [
                ("default".to_owned(), false, 3),
                ("ssh3".to_owned(), true, 14)
            ]
        );
        assert_eq!(
            outline.to_text(),
            "TARGET: target

BUILD ARG   VALUE   DESCRIPTION
BAR         678     

SECRET      REQUIRED
passwd      true
second678   

SSH       REQUIRED
default   
ssh3      true

"
        );
    }

    #[test]
    fn arguments_may_be_made_of_each_other() {
        let text = "
ARG FOO=123
ARG ABC=abc
ARG DEF=def
ARG FOO=${FOO}${ABC}
ARG BAZ=${FOO}456
ARG FOO=${FOO}456${BAZ}
FROM scratch
ARG FOO
ARG INFOO=123
ARG INBAZ=${INFOO}456
ARG INFOO=${INFOO}456${INBAZ}
";
        let outline = outline(text, None);
        let args: Vec<(&str, &str)> = (outline.args.iter())
            .map(|a| (a.name.as_str(), a.value.as_str()))
            .collect();
        assert_eq!(
            args,
            [
                ("ABC", "abc"),
                ("BAZ", "123abc456"),
                ("FOO", "123abc456123abc456"),
                ("INBAZ", "123456"),
                ("INFOO", "123456123456"),
            ]
        );
    }

    #[test]
    fn json_has_buildkits_shape() {
        assert_eq!(
            outline("FROM scratch\n", None).to_json(),
            "{\n  \"sources\": [\n    \"RlJPTSBzY3JhdGNoCg==\"\n  ]\n}"
        );
        assert_eq!(outline("FROM scratch\n", None).to_text(), "");
        let text = "# a b\nFROM scratch AS a\nARG x=<y>\nRUN --mount=type=ssh,required z\n";
        assert_eq!(
            outline(text, None).to_json(),
            r#"{
  "name": "a",
  "description": "b",
  "args": [
    {
      "name": "x",
      "value": "\u003cy\u003e",
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
  "ssh": [
    {
      "name": "default",
      "required": true,
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
    "IyBhIGIKRlJPTSBzY3JhdGNoIEFTIGEKQVJHIHg9PHk+ClJVTiAtLW1vdW50PXR5cGU9c3NoLHJlcXVpcmVkIHoK"
  ]
}"#
        );
    }
}
