//! Credentials that Docker and Podman keep: files, and helper programs that the files name.
//!
//! Nothing is asked interactively and nothing is stored. `docker_credential` is not
//! used because it knows no repository's own credentials (Podman's), has no time
//! limit on helpers and does not say which file it could not read.
//!
//! <https://docs.docker.com/reference/cli/docker/login/#credential-stores>,
//! <https://github.com/containers/image/blob/main/docs/containers-auth.json.5.md>

#![allow(
    clippy::disallowed_methods,
    reason = "credential helpers are programs, started here"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::DecodePaddingMode;
use base64::engine::general_purpose::{GeneralPurpose, GeneralPurposeConfig};
use serde::Deserialize;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::RegistryError;
use super::error::clean;
use crate::image::DOCKER_HUB;
use crate::secret::Secret;

/// The key under which Docker Hub's credentials are kept.
const DOCKER_HUB_KEY: &str = "https://index.docker.io/v1/";
/// The largest file or helper answer that is read, in bytes; real ones have a few KiB.
const FILE_LIMIT_BYTES: u64 = 4 << 20;
/// How long a helper may take. Those of clouds ask a service for a token.
const HELPER_TIMEOUT: Duration = Duration::from_secs(60);
/// What helpers answer where they know nothing; part of their protocol.
const NOT_FOUND: &str = "credentials not found in native keychain";

/// What a registry or its token server is shown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Credential {
    /// A name and a password.
    Password {
        /// The name.
        username: String,
        /// The password.
        password: Secret,
    },
    /// An OAuth2 refresh token.
    IdentityToken(Secret),
    /// A bearer token for the registry itself.
    RegistryToken(Secret),
}

/// What a look-up found, and where.
#[derive(Debug)]
pub(super) struct Lookup {
    /// The credential, if there is one.
    pub(super) credential: Option<Credential>,
    /// Where it was found, or where it was looked for; for people.
    pub(super) places: String,
}

/// The files that are looked into, in order.
#[derive(Clone, Debug)]
pub(super) struct CredentialFiles(Vec<PathBuf>);

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Config {
    auths: Option<BTreeMap<String, Auth>>,
    creds_store: Option<String>,
    cred_helpers: Option<BTreeMap<String, String>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Auth {
    auth: Option<Secret>,
    username: Option<String>,
    password: Option<Secret>,
    identitytoken: Option<Secret>,
    registrytoken: Option<Secret>,
}

impl CredentialFiles {
    /// `config.json` in `directory` and nothing else; without one, what `variable`,
    /// the environment, says Docker and Podman use.
    pub(super) fn new(
        directory: Option<&Path>,
        variable: impl Fn(&str) -> Option<std::ffi::OsString>,
    ) -> Self {
        if let Some(directory) = directory {
            return Self(vec![directory.join("config.json")]);
        }
        let path = |name: &str| variable(name).filter(|v| !v.is_empty()).map(PathBuf::from);
        let home = path("HOME");
        let docker = path("DOCKER_CONFIG").or_else(|| Some(home.as_ref()?.join(".docker")));
        let config = path("XDG_CONFIG_HOME").or_else(|| Some(home.as_ref()?.join(".config")));
        let podman = |directory: Option<PathBuf>| Some(directory?.join("containers/auth.json"));
        let files = [
            docker.map(|directory| directory.join("config.json")),
            path("REGISTRY_AUTH_FILE"),
            podman(path("XDG_RUNTIME_DIR")),
            podman(config),
        ];
        Self(files.into_iter().flatten().collect())
    }

    /// The registries that the files name, whatever they have for them.
    ///
    /// # Errors
    /// [`RegistryError::Credentials`] where a file exists but cannot be read.
    pub(super) async fn registries(&self) -> Result<BTreeSet<String>, RegistryError> {
        let mut all = BTreeSet::new();
        for file in &self.0 {
            let config = read(file)
                .await
                .map_err(|error| RegistryError::Credentials {
                    registry: "all registries".to_owned(),
                    from: file.display().to_string(),
                    reason: error.to_string(),
                })?;
            let Some(Config {
                auths,
                cred_helpers,
                ..
            }) = config
            else {
                continue;
            };
            let keys = auths.into_iter().flat_map(BTreeMap::into_keys);
            let helped = cred_helpers.into_iter().flat_map(BTreeMap::into_keys);
            for key in keys.chain(helped) {
                // Podman's may go on with a repository.
                let key = normal_key(&key);
                all.insert(key.split('/').next().unwrap_or_default().to_owned());
            }
        }
        all.remove("");
        Ok(all)
    }

    /// Finds the credential for `repository` (its path) at `registry`.
    ///
    /// # Errors
    /// [`RegistryError::Credentials`] where a file or helper exists but fails.
    pub(super) async fn look_up(
        &self,
        registry: &str,
        repository: &str,
    ) -> Result<Lookup, RegistryError> {
        let mut looked = Vec::new();
        for file in &self.0 {
            let fail = |reason: String| RegistryError::Credentials {
                registry: registry.to_owned(),
                from: file.display().to_string(),
                reason,
            };
            let Some(config) = read(file).await.map_err(|e| fail(e.to_string()))? else {
                looked.push(format!("{} (not there)", file.display()));
                continue;
            };
            let found = config.find(registry, repository).map_err(fail)?;
            let (credential, place) = match found {
                Found::Credential(credential) => (Some(credential), file.display().to_string()),
                Found::Helper { program, key } => {
                    let credential = ask_helper(&program, &key).await.map_err(|reason| {
                        RegistryError::Credentials {
                            registry: registry.to_owned(),
                            from: format!("{program} (named in {})", file.display()),
                            reason,
                        }
                    })?;
                    (credential, format!("{program} ({})", file.display()))
                }
                Found::Nothing => (None, file.display().to_string()),
            };
            if credential.is_some() {
                return Ok(Lookup {
                    credential,
                    places: place,
                });
            }
            looked.push(place);
        }
        Ok(Lookup {
            credential: None,
            places: if looked.is_empty() {
                "nothing, because neither DOCKER_CONFIG nor HOME is set".to_owned()
            } else {
                looked.join(", ")
            },
        })
    }
}

/// What one file says.
#[derive(Debug, PartialEq, Eq)]
enum Found {
    Credential(Credential),
    Helper { program: String, key: String },
    Nothing,
}

impl Config {
    /// A registry's own helper wins, then an entry of the file, then the store for all.
    fn find(&self, registry: &str, repository: &str) -> Result<Found, String> {
        let key = if registry == DOCKER_HUB {
            DOCKER_HUB_KEY
        } else {
            registry
        };
        let helpers = self.cred_helpers.as_ref();
        let helper = [key, registry]
            .iter()
            .find_map(|key| Some((helpers?.get(*key)?, *key)))
            .filter(|(name, _)| !name.is_empty());
        if let Some((name, key)) = helper {
            return helper_program(name, key);
        }
        if let Some((key, auth)) = self.entry(registry, repository)
            && let Some(credential) = auth
                .credential()
                .map_err(|reason| format!("entry {key:?} of \"auths\": {reason}"))?
        {
            return Ok(Found::Credential(credential));
        }
        match self.creds_store.as_deref() {
            None | Some("") => Ok(Found::Nothing),
            Some(name) => helper_program(name, key),
        }
    }

    /// The entry with the most specific key: Podman's may name a repository or a part of its path.
    fn entry(&self, registry: &str, repository: &str) -> Option<(&String, &Auth)> {
        let auths = self.auths.as_ref()?;
        let mut wanted = format!("{registry}/{repository}");
        loop {
            // An exact key goes before one with a scheme or an old API's path.
            if let Some(exact) = auths.get_key_value(&wanted) {
                return Some(exact);
            }
            if let Some(similar) = auths.iter().find(|(key, _)| normal_key(key) == wanted) {
                return Some(similar);
            }
            wanted.truncate(wanted.rfind('/')?);
        }
    }
}

/// A key of `auths` without scheme and API version, under Docker Hub's one name.
fn normal_key(key: &str) -> String {
    let rest = key
        .strip_prefix("https://")
        .or_else(|| key.strip_prefix("http://"));
    let rest = match rest {
        // A URL names a host; what follows are API versions of the past.
        Some(rest) => rest.split('/').next().unwrap_or_default(),
        None => key.trim_end_matches('/'),
    };
    let (host, path) = match rest.split_once('/') {
        Some((host, path)) => (host, Some(path)),
        None => (rest, None),
    };
    let host = match host {
        "index.docker.io" | "registry-1.docker.io" => DOCKER_HUB,
        other => other,
    };
    match path {
        None | Some("v1" | "v2") => host.to_owned(),
        Some(path) => format!("{host}/{path}"),
    }
}

impl Auth {
    /// Absent for an empty entry, which `docker login` leaves where a store has the password.
    fn credential(&self) -> Result<Option<Credential>, &'static str> {
        let set = |secret: &Option<Secret>| secret.clone().filter(|s| !s.expose().is_empty());
        if let Some(token) = set(&self.registrytoken) {
            return Ok(Some(Credential::RegistryToken(token)));
        }
        if let Some(token) = set(&self.identitytoken) {
            return Ok(Some(Credential::IdentityToken(token)));
        }
        if let Some(auth) = set(&self.auth) {
            return decode_auth(auth.expose()).map(Some);
        }
        Ok(match (&self.username, set(&self.password)) {
            (Some(username), Some(password)) if !username.is_empty() => {
                Some(Credential::Password {
                    username: username.clone(),
                    password,
                })
            }
            _ => None,
        })
    }
}

fn decode_auth(auth: &str) -> Result<Credential, &'static str> {
    const WRONG: &str = "\"auth\" is not the base64 of NAME:PASSWORD";
    // Written with and without padding by different programs.
    let config =
        GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent);
    let bytes = GeneralPurpose::new(&base64::alphabet::STANDARD, config)
        .decode(auth.trim())
        .map_err(|_| WRONG)?;
    let text = String::from_utf8(bytes).map_err(|_| WRONG)?;
    let (username, password) = text.split_once(':').ok_or(WRONG)?;
    Ok(Credential::Password {
        username: username.to_owned(),
        // Docker once padded the text with NUL.
        password: Secret::new(password.trim_end_matches('\0')),
    })
}

async fn read(file: &Path) -> io::Result<Option<Config>> {
    let file = match tokio::fs::File::open(file).await {
        Ok(file) => file,
        Err(e)
            if matches!(
                e.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
            ) =>
        {
            return Ok(None);
        }
        Err(e) => return Err(e),
    };
    let mut bytes = Vec::new();
    file.take(FILE_LIMIT_BYTES + 1)
        .read_to_end(&mut bytes)
        .await?;
    if bytes.len() as u64 > FILE_LIMIT_BYTES {
        return Err(io::Error::new(
            io::ErrorKind::FileTooLarge,
            format!("the file is larger than {FILE_LIMIT_BYTES} bytes"),
        ));
    }
    if bytes.iter().all(u8::is_ascii_whitespace) {
        return Ok(Some(Config::default()));
    }
    // Position only: the parser's own words may quote a secret.
    serde_json::from_slice(&bytes).map(Some).map_err(|e| {
        let place = format!("not valid at line {} column {}", e.line(), e.column());
        io::Error::new(io::ErrorKind::InvalidData, place)
    })
}

/// The name in a file becomes a program's name, so it must be one.
fn helper_program(name: &str, key: &str) -> Result<Found, String> {
    let valid = |b: u8| b.is_ascii_alphanumeric() || b"-_.".contains(&b);
    if !name.bytes().all(valid) {
        return Err(format!("{name:?} is not the name of a credential helper"));
    }
    Ok(Found::Helper {
        program: format!("docker-credential-{name}"),
        key: key.to_owned(),
    })
}

/// Runs `program get`. It keeps the environment: helpers find their own credentials by it.
///
/// <https://github.com/docker/docker-credential-helpers#development>
async fn ask_helper(program: &str, key: &str) -> Result<Option<Credential>, String> {
    #[derive(Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct Answer {
        #[serde(default)]
        username: String,
        secret: Secret,
    }
    let mut child = tokio::process::Command::new(program)
        .arg("get")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(|e| match e.kind() {
            io::ErrorKind::NotFound => "the program is not installed".to_owned(),
            _ => format!("starting it: {e}"),
        })?;
    let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    let talk = async {
        let write = async {
            if let Some(mut stdin) = stdin {
                // One that does not read has answered without.
                let _ = stdin.write_all(key.as_bytes()).await;
            }
        };
        let ((), stdout, stderr) = tokio::join!(write, drain(stdout), drain(stderr));
        Ok::<_, io::Error>((child.wait().await?, stdout?, stderr?))
    };
    let (status, stdout, stderr) = tokio::time::timeout(HELPER_TIMEOUT, talk)
        .await
        .map_err(|_| format!("no answer in {} seconds", HELPER_TIMEOUT.as_secs()))?
        .map_err(|e| e.to_string())?;
    if !status.success() {
        let said = clean(&String::from_utf8_lossy(&[stdout, stderr].concat()));
        return if said.contains(NOT_FOUND) {
            Ok(None)
        } else {
            Err(format!("{status}: {said}"))
        };
    }
    // The answer itself is never shown: it has the secret.
    let answer: Answer = serde_json::from_slice(&stdout)
        .map_err(|_| "the answer is not a JSON object with Username and Secret".to_owned())?;
    Ok(Some(if answer.username == "<token>" {
        Credential::IdentityToken(answer.secret)
    } else {
        Credential::Password {
            username: answer.username,
            password: answer.secret,
        }
    }))
}

async fn drain(pipe: Option<impl tokio::io::AsyncRead + Unpin>) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    if let Some(pipe) = pipe {
        pipe.take(FILE_LIMIT_BYTES).read_to_end(&mut bytes).await?;
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn password(username: &str, password: &str) -> Found {
        Found::Credential(Credential::Password {
            username: username.to_owned(),
            password: Secret::new(password),
        })
    }

    #[track_caller]
    fn check(config: &str, registry: &str, expected: Result<Found, &str>) {
        let config: Config = serde_json::from_str(config).unwrap();
        let got = config.find(registry, "team/app");
        assert_eq!(got, expected.map_err(str::to_owned), "{registry}");
    }

    #[test]
    fn entries_are_found_under_all_names_that_programs_give_them() {
        let ab = |key: &str| format!(r#"{{"auths":{{"{key}":{{"auth":"YTpi"}}}}}}"#);
        for (key, registry) in [
            ("host:5000", "host:5000"),
            ("https://host:5000", "host:5000"),
            ("http://host:5000/v2/", "host:5000"),
            ("host:5000/v1/", "host:5000"),
            ("https://index.docker.io/v1/", "docker.io"),
            ("index.docker.io", "docker.io"),
            ("docker.io", "docker.io"),
            ("host/team", "host"),
            ("host/team/app", "host"),
        ] {
            check(&ab(key), registry, Ok(password("a", "b")));
        }
        for (key, registry) in [
            ("host", "host:5000"),
            ("host:5000", "host"),
            ("host/other", "host"),
            ("host/te", "host"),
            ("https://host.evil/", "host"),
        ] {
            check(&ab(key), registry, Ok(Found::Nothing));
        }
    }

    #[test]
    fn the_most_specific_entry_wins_and_kinds_have_their_order() {
        let both = r#"{"auths":{"h":{"auth":"eDp5"},"h/team":{"auth":"YTpiOmM"}}}"#;
        check(both, "h", Ok(password("a", "b:c")));
        let plain = r#"{"auths":{"h":{"username":"a","password":"b"}}}"#;
        check(plain, "h", Ok(password("a", "b")));
        let token = r#"{"auths":{"h":{"auth":"YTo=","identitytoken":"t"}}}"#;
        let identity = Credential::IdentityToken(Secret::new("t"));
        check(token, "h", Ok(Found::Credential(identity)));
        check(
            r#"{"auths":{"h":{"auth":"?"}}}"#,
            "h",
            Err("entry \"h\" of \"auths\": \"auth\" is not the base64 of NAME:PASSWORD"),
        );
    }

    #[test]
    fn helpers_are_chosen_as_docker_does() {
        let config = r#"{"auths":{"h":{"auth":"YTpi"},"stored":{}},
            "credHelpers":{"ecr":"ecr-login","h":"own"},"credsStore":"pass"}"#;
        let helper = |program: &str, key: &str| {
            Ok(Found::Helper {
                program: program.to_owned(),
                key: key.to_owned(),
            })
        };
        check(config, "ecr", helper("docker-credential-ecr-login", "ecr"));
        check(config, "h", helper("docker-credential-own", "h"));
        check(config, "stored", helper("docker-credential-pass", "stored"));
        check(
            config,
            "docker.io",
            helper("docker-credential-pass", "https://index.docker.io/v1/"),
        );
        check(
            r#"{"credsStore":"../../evil"}"#,
            "h",
            Err("\"../../evil\" is not the name of a credential helper"),
        );
    }

    #[test]
    fn files_are_those_of_docker_and_podman() {
        let files = |directory: Option<&str>, vars: &[(&str, &str)]| {
            let vars: BTreeMap<String, String> = vars
                .iter()
                .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
                .collect();
            CredentialFiles::new(directory.map(Path::new), |name| {
                vars.get(name).map(Into::into)
            })
            .0
        };
        let paths = |list: &[&str]| list.iter().map(PathBuf::from).collect::<Vec<_>>();
        let env = [("HOME", "/h"), ("XDG_RUNTIME_DIR", "/run/1")];
        assert_eq!(files(Some("/d"), &env), paths(&["/d/config.json"]));
        assert_eq!(
            files(None, &env),
            paths(&[
                "/h/.docker/config.json",
                "/run/1/containers/auth.json",
                "/h/.config/containers/auth.json"
            ])
        );
        assert_eq!(
            files(
                None,
                &[("DOCKER_CONFIG", "/c"), ("REGISTRY_AUTH_FILE", "/a")]
            ),
            paths(&["/c/config.json", "/a"])
        );
        assert_eq!(files(None, &[("HOME", "")]), paths(&[]));
    }

    #[tokio::test]
    async fn a_damaged_file_is_an_error_without_its_content() {
        let dir = tempfile::tempdir().unwrap();
        let files = CredentialFiles::new(Some(dir.path()), |_| None);
        let path = dir.path().join("config.json");
        let missing = files.look_up("h", "a").await.unwrap();
        assert!(missing.credential.is_none());
        assert_eq!(missing.places, format!("{} (not there)", path.display()));
        std::fs::write(&path, r#"{"auths":{"h":{"auth":"hunter2}}"#).unwrap();
        let error = files.look_up("h", "a").await.unwrap_err().to_string();
        assert!(
            error.starts_with("getting credentials for h from"),
            "{error}"
        );
        assert!(error.contains("not valid at line 1"), "{error}");
        assert!(!error.contains("hunter2"), "{error}");
    }

    /// Helpers are programs on `PATH`, which a test must not change; the function
    /// takes any program.
    #[tokio::test]
    async fn helpers_answer_fail_or_know_nothing() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let helper = |name: &str, script: &str| {
            let path = dir.path().join(name);
            // Written by another process: a descriptor that this one had open for
            // writing could be inherited by a concurrent test's child (ETXTBSY).
            let status = std::process::Command::new("sh")
                .args(["-c", "printf '#!/bin/sh\\n%s\\n' \"$1\" > \"$0\""])
                .arg(&path)
                .arg(script)
                .status()
                .unwrap();
            assert!(status.success());
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
            path.to_str().unwrap().to_owned()
        };
        let good = helper(
            "good",
            r#"read -r k || :; printf '{"ServerURL":"x","Username":"%s","Secret":"s"}' "$1-$k""#,
        );
        let token = helper("token", r#"printf '{"Username":"<token>","Secret":"t"}'"#);
        let unknown = helper("unknown", &format!("echo '{NOT_FOUND}'; exit 1"));
        let broken = helper("broken", "echo oops >&2; exit 3");
        assert_eq!(
            ask_helper(&good, "host").await.unwrap(),
            Some(Credential::Password {
                username: "get-host".to_owned(),
                password: Secret::new("s")
            })
        );
        assert_eq!(
            ask_helper(&token, "host").await.unwrap(),
            Some(Credential::IdentityToken(Secret::new("t")))
        );
        assert_eq!(ask_helper(&unknown, "host").await.unwrap(), None);
        assert_eq!(
            ask_helper(&broken, "host").await.unwrap_err(),
            "exit status: 3: oops"
        );
        assert_eq!(
            ask_helper("/nonexistent/helper", "host").await.unwrap_err(),
            "the program is not installed"
        );
    }
}
