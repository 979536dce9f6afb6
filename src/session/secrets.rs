//! `--secret`: bytes that steps may read and that no layer keeps.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt;
use std::io;
use std::os::unix::ffi::OsStringExt as _;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use zeroize::Zeroizing;

use super::{Lookup, SessionError, read_wiped};
use crate::dockerfile::comma_fields;

/// The largest secret, in bytes: BuildKit's limit, which keeps it in one message.
pub const MAX_SECRET_BYTES: usize = 500 * 1024;

/// A secret's bytes, wiped from memory when dropped. `Debug` shows nothing of them.
pub struct SecretBytes(Zeroizing<Vec<u8>>);

impl SecretBytes {
    /// The bytes; for the one place that hands them to a step or a server.
    pub fn expose(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for SecretBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SecretBytes(…)")
    }
}

/// One `--secret` as it was written: `id=ID[,src=FILE][,env=VARIABLE][,type=file|env]`.
///
/// Fields are comma-separated values (a field with a comma is quoted with `"`), keys are in
/// any case, and the last of a key wins. `source` is another name of `src`. With `type=env`
/// and no `env`, `src` names the variable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SecretSpec {
    /// What Dockerfiles call it; not empty.
    pub id: String,
    /// The file that holds it.
    pub file: Option<PathBuf>,
    /// The environment variable that holds it; wins over a file.
    pub variable: Option<String>,
}

impl SecretSpec {
    /// Parses every `--secret`. Empty ones are left out, as docker does.
    ///
    /// # Errors
    /// As [`SecretSpec::from_str`].
    pub fn parse_all<S: AsRef<str>>(
        values: impl IntoIterator<Item = S>,
    ) -> Result<Vec<Self>, SessionError> {
        values
            .into_iter()
            .filter(|value| !value.as_ref().is_empty())
            .map(|value| value.as_ref().parse())
            .collect()
    }
}

impl FromStr for SecretSpec {
    type Err = SessionError;

    /// # Errors
    /// [`SessionError::SecretFields`] and [`SessionError::SecretSpec`] for a wrong quote, a
    /// field without `=`, an unknown key or type, and a missing id.
    fn from_str(text: &str) -> Result<Self, SessionError> {
        let wrong = |problem: String| SessionError::SecretSpec {
            spec: text.to_owned(),
            problem,
        };
        let fields = comma_fields(text).map_err(|source| SessionError::SecretFields {
            spec: text.to_owned(),
            source,
        })?;
        let (mut id, mut file, mut variable) = (String::new(), String::new(), String::new());
        let mut is_variable = false;
        for field in &fields {
            let (key, value) = field
                .split_once('=')
                .ok_or_else(|| wrong(format!("field {field:?} is no KEY=VALUE")))?;
            match key.to_lowercase().as_str() {
                "type" => {
                    is_variable = match value {
                        "file" => false,
                        "env" => true,
                        _ => return Err(wrong(format!("type {value:?} is neither file nor env"))),
                    }
                }
                "id" => value.clone_into(&mut id),
                "src" | "source" => value.clone_into(&mut file),
                "env" => value.clone_into(&mut variable),
                _ => {
                    return Err(wrong(format!(
                        "key {key:?} is none of id, src, env and type"
                    )));
                }
            }
        }
        if is_variable && variable.is_empty() {
            variable = std::mem::take(&mut file);
        }
        if id.is_empty() {
            return Err(wrong("it has no id".to_owned()));
        }
        Ok(Self {
            id,
            file: (!file.is_empty()).then(|| file.into()),
            variable: (!variable.is_empty()).then_some(variable),
        })
    }
}

/// Where a secret's bytes come from.
#[derive(Debug)]
enum Source {
    File(PathBuf),
    /// `value` is none if the variable is not set, which makes an empty secret.
    Variable {
        name: String,
        value: Option<SecretBytes>,
    },
}

/// The secrets of one build, by their id.
#[derive(Debug, Default)]
pub struct Secrets {
    sources: BTreeMap<String, Source>,
}

impl Secrets {
    /// Looks up what `specs` name. `environment` gives a variable's value. Of two with the
    /// same id the later wins.
    ///
    /// A spec of an id alone means the variable of that name if it is set, else the file of
    /// that name. Files are looked for here, so that a build does not fail in its last step,
    /// and read when they are needed; relative ones lie below the current directory.
    ///
    /// # Errors
    /// [`SessionError::SecretFile`] for a file that is not there or is a directory,
    /// [`SessionError::SecretTooLarge`].
    pub fn new(
        specs: impl IntoIterator<Item = SecretSpec>,
        environment: impl Fn(&str) -> Option<OsString>,
    ) -> Result<Self, SessionError> {
        let mut sources = BTreeMap::new();
        for spec in specs {
            let source = source(&spec, &environment)?;
            sources.insert(spec.id, source);
        }
        Ok(Self { sources })
    }

    /// Whether a secret of that id was given.
    pub fn contains(&self, id: &str) -> bool {
        self.sources.contains_key(id)
    }

    /// Secrets that are empty because their variable is not set: id and variable, by id.
    ///
    /// BuildKit takes this without a word; whoever starts a build should say it.
    pub fn unset_variables(&self) -> impl Iterator<Item = (&str, &str)> {
        self.sources.iter().filter_map(|(id, source)| match source {
            Source::Variable { name, value: None } => Some((id.as_str(), name.as_str())),
            _ => None,
        })
    }

    /// The bytes of secret `id`, read now; none if no such secret was given.
    ///
    /// Blocks while a file is read.
    ///
    /// # Errors
    /// [`SessionError::SecretFile`] and [`SessionError::SecretTooLarge`].
    pub fn get(&self, id: &str) -> Result<Option<SecretBytes>, SessionError> {
        match self.sources.get(id) {
            None => Ok(None),
            Some(Source::File(path)) => read(id, path).map(Some),
            Some(Source::Variable { value, .. }) => {
                let bytes = value.as_ref().map_or(&[][..], SecretBytes::expose);
                Ok(Some(SecretBytes(Zeroizing::new(bytes.to_vec()))))
            }
        }
    }

    /// As [`Secrets::get`], for a secret that must be there.
    ///
    /// # Errors
    /// Also [`SessionError::SecretMissing`].
    pub fn require(&self, id: &str) -> Result<SecretBytes, SessionError> {
        self.get(id)?
            .ok_or_else(|| SessionError::SecretMissing { id: id.to_owned() })
    }
}

/// What `spec` names, checked as far as it can be without reading a file.
fn source(spec: &SecretSpec, environment: Lookup<'_>) -> Result<Source, SessionError> {
    let id = &spec.id;
    let mut file = spec.file.clone();
    let mut variable = spec.variable.clone();
    if file.is_none() && variable.is_none() {
        if environment(id).is_some() {
            variable = Some(id.clone());
        } else {
            file = Some(id.into());
        }
    }
    // Also when the variable wins: a file that is named has to be there.
    if let Some(path) = &file {
        check_file(id, path)?;
    }
    match (variable, file) {
        (Some(name), _) => {
            let value = environment(&name)
                .map(|value| SecretBytes(Zeroizing::new(OsString::into_vec(value))));
            if value.as_ref().is_some_and(|v| v.0.len() > MAX_SECRET_BYTES) {
                return Err(SessionError::SecretTooLarge {
                    id: id.clone(),
                    origin: format!("variable {name}"),
                });
            }
            Ok(Source::Variable { name, value })
        }
        (None, Some(path)) => Ok(Source::File(path)),
        (None, None) => unreachable!("a file is set where no variable is"),
    }
}

fn check_file(id: &str, path: &Path) -> Result<(), SessionError> {
    let failed = |source| SessionError::SecretFile {
        id: id.to_owned(),
        path: path.to_owned(),
        doing: "looking for",
        source,
    };
    let meta = std::fs::metadata(path).map_err(failed)?;
    if meta.is_dir() {
        return Err(failed(io::ErrorKind::IsADirectory.into()));
    }
    if meta.len() > MAX_SECRET_BYTES as u64 {
        return Err(too_large(id, path));
    }
    Ok(())
}

fn read(id: &str, path: &Path) -> Result<SecretBytes, SessionError> {
    let bytes = read_wiped(path, MAX_SECRET_BYTES).map_err(|source| SessionError::SecretFile {
        id: id.to_owned(),
        path: path.to_owned(),
        doing: "reading",
        source,
    })?;
    bytes.map(SecretBytes).ok_or_else(|| too_large(id, path))
}

fn too_large(id: &str, path: &Path) -> SessionError {
    SessionError::SecretTooLarge {
        id: id.to_owned(),
        origin: format!("file {}", path.display()),
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::chain;
    use super::*;

    fn environment(name: &str) -> Option<OsString> {
        match name {
            "TOKEN" => Some("from TOKEN".into()),
            "BYTES" => Some(OsString::from_vec(b"\xff\n".to_vec())),
            "LARGEST" => Some("x".repeat(MAX_SECRET_BYTES).into()),
            "TOO_LARGE" => Some("x".repeat(MAX_SECRET_BYTES + 1).into()),
            _ => None,
        }
    }

    fn secrets(values: &[String]) -> Result<Secrets, SessionError> {
        Secrets::new(SecretSpec::parse_all(values)?, environment)
    }

    #[test]
    fn arguments_are_parsed_as_docker_does() {
        let check = |text: &str, id: &str, file: Option<&str>, variable: Option<&str>| {
            let expected = SecretSpec {
                id: id.into(),
                file: file.map(PathBuf::from),
                variable: variable.map(str::to_owned),
            };
            assert_eq!(text.parse::<SecretSpec>().unwrap(), expected, "{text}");
        };
        check("id=a", "a", None, None);
        check("id=a,src=f", "a", Some("f"), None);
        check("ID=a,Source=f=g", "a", Some("f=g"), None);
        check("id=a,env=V", "a", None, Some("V"));
        check("id=a,src=f,env=V", "a", Some("f"), Some("V"));
        check("type=file,id=a,src=f", "a", Some("f"), None);
        check("type=env,id=a,src=V", "a", None, Some("V"));
        check("type=env,id=a,src=f,env=V", "a", Some("f"), Some("V"));
        check("type=env,id=a", "a", None, None);
        check("type=file,id=a,env=V", "a", None, Some("V"));
        check("id=a,\"src=f,g\"\"h\"", "a", Some("f,g\"h"), None);
        check("id=a,id=b,src=", "b", None, None);
    }

    #[test]
    fn wrong_arguments_say_what_is_wrong() {
        let advice = "write id=ID,src=FILE or id=ID,env=VARIABLE, \
                      or id=ID for the variable or file of that name";
        let check = |text: &str, problem: &str| {
            let error = text.parse::<SecretSpec>().unwrap_err();
            assert_eq!(
                chain(&error),
                format!("--secret {text:?}: {problem}; {advice}")
            );
        };
        check("file", "field \"file\" is no KEY=VALUE");
        check("id=a,", "field \"\" is no KEY=VALUE");
        check("src=f", "it has no id");
        check("id=,src=f", "it has no id");
        check("id=a,uid=0", "key \"uid\" is none of id, src, env and type");
        check("id=a,type=Env", "type \"Env\" is neither file nor env");
        let error = "id=a,src=\"f\"".parse::<SecretSpec>().unwrap_err();
        assert_eq!(
            chain(&error),
            "--secret \"id=a,src=\\\"f\\\"\": \
             \"src=\\\"f\\\"\" has a quote inside: quote the whole field and double the quote"
        );
        assert_eq!(SecretSpec::parse_all(["", "id=a"]).unwrap().len(), 1);
    }

    #[test]
    fn secrets_come_from_files_and_variables() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("f");
        std::fs::write(&file, "first").unwrap();
        let file = file.display();
        let secrets = secrets(&[
            format!("id=file,src={file}"),
            "id=variable,env=TOKEN".into(),
            "id=TOKEN".into(),
            format!("id={file}"),
            "id=bytes,type=env,src=BYTES".into(),
            format!("id=both,src={file},env=TOKEN"),
            "id=twice,env=TOKEN".into(),
            format!("id=twice,src={file}"),
            "id=unset,env=NOWHERE".into(),
            "id=largest,env=LARGEST".into(),
        ])
        .unwrap();
        let get = |id: &str| secrets.get(id).unwrap().map(|s| s.expose().to_vec());
        assert_eq!(get("file").unwrap(), b"first");
        assert_eq!(get("variable").unwrap(), b"from TOKEN");
        assert_eq!(get("TOKEN").unwrap(), b"from TOKEN");
        assert_eq!(get(&file.to_string()).unwrap(), b"first");
        assert_eq!(get("bytes").unwrap(), b"\xff\n");
        assert_eq!(get("both").unwrap(), b"from TOKEN");
        assert_eq!(get("twice").unwrap(), b"first");
        assert_eq!(get("unset").unwrap(), b"");
        assert_eq!(get("largest").unwrap().len(), MAX_SECRET_BYTES);
        assert_eq!(get("other"), None);
        assert!(secrets.contains("file") && !secrets.contains("other"));
        let unset: Vec<_> = secrets.unset_variables().collect();
        assert_eq!(unset, [("unset", "NOWHERE")]);

        // Read when used, so what is in the file then counts.
        std::fs::write(file.to_string(), "second").unwrap();
        assert_eq!(get("file").unwrap(), b"second");
        assert_eq!(
            secrets.require("other").unwrap_err().to_string(),
            "secret \"other\" is needed and was not given; \
             add --secret id=other,src=FILE or --secret id=other,env=VARIABLE"
        );
    }

    #[test]
    fn files_that_cannot_be_secrets_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("f");
        let given = [format!("id=s,src={}", file.display())];
        let check = |result: Result<Secrets, SessionError>, expected: String| {
            assert_eq!(chain(&result.unwrap_err()), expected);
        };
        let missing = format!(
            "secret \"s\": looking for {}: No such file or directory (os error 2)",
            file.display()
        );
        check(secrets(&given), missing.clone());
        check(
            secrets(&[format!("id=s,env=TOKEN,src={}", file.display())]),
            missing,
        );
        check(
            secrets(&[format!("id=s,src={}", dir.path().display())]),
            format!(
                "secret \"s\": looking for {}: is a directory",
                dir.path().display()
            ),
        );
        check(
            secrets(&["id=s,env=TOO_LARGE".into()]),
            "secret \"s\": variable TOO_LARGE has more than 512000 bytes, \
             the most a secret may have"
                .into(),
        );

        std::fs::write(&file, vec![b'x'; MAX_SECRET_BYTES]).unwrap();
        let found = secrets(&given).unwrap();
        let bytes = found.get("s").unwrap().unwrap();
        assert_eq!(bytes.expose(), vec![b'x'; MAX_SECRET_BYTES]);
        std::fs::write(&file, vec![b'x'; MAX_SECRET_BYTES + 1]).unwrap();
        let too_large = format!(
            "secret \"s\": file {} has more than 512000 bytes, the most a secret may have",
            file.display()
        );
        check(secrets(&given), too_large.clone());
        // It grew after it was looked for.
        assert_eq!(chain(&found.get("s").unwrap_err()), too_large);
        std::fs::remove_file(&file).unwrap();
        assert_eq!(
            chain(&found.get("s").unwrap_err()),
            format!(
                "secret \"s\": reading {}: No such file or directory (os error 2)",
                file.display()
            )
        );
    }

    #[test]
    fn security_s13_nothing_of_a_secret_is_printed() {
        let secrets = secrets(&["id=a,env=TOKEN".into()]).unwrap();
        assert_eq!(
            format!("{secrets:?} {:?}", secrets.get("a").unwrap()),
            "Secrets { sources: {\"a\": Variable { name: \"TOKEN\", \
             value: Some(SecretBytes(…)) }} } Some(SecretBytes(…))"
        );
    }
}
