//! One case: what `case.json` says, the copy that is built, the command line.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, SystemTime};

use serde::Deserialize;

use super::bases::Bases;
use super::flatten::INPUT_TIME_LIMIT;
use crate::support::process::{Ran, run, run_reading};

/// 2017-07-14T02:40:00Z, the time of everything in a copy that is not older than 2020.
const CONTEXT_MTIME: i64 = 1_500_000_000;

/// How the case ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Expect {
    Image,
    Error,
}

/// `case.json`. The keys are explained in `fixtures/conformance/README.md`.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Spec {
    /// For readers.
    #[serde(rename = "description")]
    _description: String,
    pub expect: Option<Expect>,
    dockerfile: Option<String>,
    target: Option<String>,
    platform: Option<String>,
    pub build_args: BTreeMap<String, String>,
    labels: BTreeMap<String, String>,
    named_contexts: BTreeMap<String, String>,
    secrets: BTreeMap<String, String>,
    options: BTreeMap<String, String>,
    pub base: String,
    pub requires: Vec<String>,
    pub content_varies: Vec<String>,
    pub not_compared: Vec<String>,
    pub must_mention: Vec<String>,

    // Our own cases only.
    args: Vec<String>,
    stdin: Option<String>,
    context: Option<String>,
    no_cache: bool,
}

impl Default for Spec {
    fn default() -> Self {
        Self {
            _description: String::new(),
            expect: None,
            dockerfile: Some("Dockerfile".into()),
            target: None,
            platform: None,
            build_args: BTreeMap::new(),
            labels: BTreeMap::new(),
            named_contexts: BTreeMap::new(),
            secrets: BTreeMap::new(),
            options: BTreeMap::new(),
            base: "conformance/base".into(),
            requires: Vec::new(),
            content_varies: Vec::new(),
            not_compared: Vec::new(),
            must_mention: Vec::new(),
            args: Vec::new(),
            stdin: None,
            context: None,
            no_cache: true,
        }
    }
}

/// A directory of `cases/` or `own/`.
#[derive(Clone, Debug)]
pub struct Case {
    /// `NNN-name`, of our own ones `own/NNN-name`.
    pub name: String,
    pub directory: PathBuf,
    pub own: bool,
}

impl Case {
    /// All cases below a directory, in the order of their names.
    ///
    /// # Errors
    /// What cannot be read.
    pub fn all(directory: &Path, own: bool) -> Result<Vec<Self>, String> {
        let shown = directory.display();
        let mut cases = Vec::new();
        for entry in std::fs::read_dir(directory).map_err(|e| format!("{shown}: {e}"))? {
            let directory = entry.map_err(|e| format!("{shown}: {e}"))?.path();
            let name = (directory.file_name().and_then(|n| n.to_str()))
                .ok_or_else(|| format!("{}: no name for a case", directory.display()))?;
            cases.push(Self {
                name: if own {
                    format!("own/{name}")
                } else {
                    name.to_owned()
                },
                directory,
                own,
            });
        }
        cases.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(cases)
    }

    /// Whether its name, or its number, begins so.
    pub fn begins_with(&self, beginning: &str) -> bool {
        self.name.starts_with(beginning)
            || (self.name.strip_prefix("own/")).is_some_and(|name| name.starts_with(beginning))
    }

    /// Reads `case.json`.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn spec(&self) -> Result<Spec, String> {
        let text = std::fs::read(self.directory.join("case.json"))
            .map_err(|e| format!("case.json: {e}"))?;
        let spec: Spec = serde_json::from_slice(&text).map_err(|e| format!("case.json: {e}"))?;
        if let Some(option) = spec.options.keys().next() {
            return Err(format!("case.json: unknown option {option}"));
        }
        let extended = !spec.args.is_empty()
            || spec.stdin.is_some()
            || spec.context.is_some()
            || !spec.no_cache;
        if extended && !self.own {
            return Err(
                "case.json: args, stdin, context and no_cache are for cases in own/".into(),
            );
        }
        Ok(spec)
    }

    /// Makes the copy that is built, with the modes and times that README.md promises.
    ///
    /// # Errors
    /// What went wrong, `setup.sh` included.
    pub fn stage(&self, copy: &Path) -> Result<(), String> {
        copy_directory(&self.directory, copy)?;
        let context = copy.join("context");
        std::fs::create_dir_all(&context).map_err(|e| e.to_string())?;
        std::fs::set_permissions(&context, PermissionsExt::from_mode(0o755))
            .map_err(|e| e.to_string())?;
        if copy.join("setup.sh").exists() {
            let script = "umask 022; exec sh ../setup.sh";
            let ran = run(Command::new("sh")
                .args(["-c", script])
                .current_dir(&context));
            if !ran.status.success() {
                return Err(format!("setup.sh: {}: {}", ran.status, ran.stderr));
            }
        }
        set_times(copy)
    }
}

impl Spec {
    /// The name of the Dockerfile, as messages have it.
    pub fn dockerfile_name(&self) -> &str {
        let path = self.dockerfile.as_deref().unwrap_or("Dockerfile");
        path.rsplit('/').next().unwrap_or(path)
    }

    /// How often it is built in the same store: a second time where the cache may serve.
    pub fn builds(&self) -> usize {
        if self.no_cache { 1 } else { 2 }
    }

    /// Whether its Dockerfile has anything of caches, such as the mounts that keep files between steps.
    pub fn mentions_cache(&self, copy: &Path) -> bool {
        let file = self.dockerfile.as_deref().unwrap_or("context/Dockerfile");
        std::fs::read(copy.join(file))
            .is_ok_and(|text| (text.windows(5)).any(|word| word.eq_ignore_ascii_case(b"cache")))
    }

    /// Builds the copy into an archive.
    ///
    /// # Errors
    /// What is wrong with the case.
    pub fn build(
        &self,
        mut command: Command,
        copy: &Path,
        archive: &Path,
        bases: &Bases,
    ) -> Result<Ran, String> {
        command
            .current_dir(copy)
            .args(["build", "--progress", "plain"]);
        if self.no_cache {
            command.arg("--no-cache");
        }
        let mut option = |name: &str, value: String| {
            command.args([name, value.as_str()]);
        };
        option(
            "--registry-mirror",
            format!("docker.io={}", bases.registry.url()),
        );
        option("--output", format!("type=oci,dest={}", archive.display()));
        if let Some(file) = &self.dockerfile {
            option("--file", file.clone());
        }
        for (name, value) in &self.build_args {
            option("--build-arg", format!("{name}={}", bases.fill(value)?));
        }
        for (name, value) in &self.labels {
            option("--label", format!("{name}={value}"));
        }
        if let Some(target) = &self.target {
            option("--target", target.clone());
        }
        if let Some(platform) = &self.platform {
            option("--platform", platform.clone());
        }
        for (at, (id, content)) in self.secrets.iter().enumerate() {
            // Beside the copy, as it is no part of the case.
            let file = copy.with_extension(format!("secret{at}"));
            std::fs::write(&file, content).map_err(|e| format!("{}: {e}", file.display()))?;
            option("--secret", format!("id={id},src={}", file.display()));
        }
        for (name, value) in &self.named_contexts {
            option("--build-context", format!("{name}={}", bases.fill(value)?));
        }
        for arg in &self.args {
            command.arg(bases.fill(arg)?);
        }
        command.arg(bases.fill(self.context.as_deref().unwrap_or("context"))?);
        let stdin = match &self.stdin {
            Some(file) => File::open(copy.join(file))
                .map_err(|e| format!("stdin: {file}: {e}"))?
                .into(),
            None => Stdio::null(),
        };
        Ok(run_reading(&mut command, stdin))
    }
}

fn copy_directory(from: &Path, to: &Path) -> Result<(), String> {
    let at = |e: std::io::Error| format!("{}: {e}", from.display());
    std::fs::create_dir(to).map_err(at)?;
    std::fs::set_permissions(to, PermissionsExt::from_mode(0o755)).map_err(at)?;
    for entry in std::fs::read_dir(from).map_err(at)? {
        let entry = entry.map_err(at)?;
        let (source, target) = (entry.path(), to.join(entry.file_name()));
        let kind = entry.file_type().map_err(at)?;
        if kind.is_dir() {
            copy_directory(&source, &target)?;
        } else if kind.is_symlink() {
            let link = std::fs::read_link(&source).map_err(at)?;
            std::os::unix::fs::symlink(link, &target).map_err(at)?;
        } else {
            std::fs::copy(&source, &target).map_err(at)?;
            let mode = entry.metadata().map_err(at)?.permissions().mode();
            let mode = if mode & 0o100 == 0 { 0o644 } else { 0o755 };
            std::fs::set_permissions(&target, PermissionsExt::from_mode(mode)).map_err(at)?;
        }
    }
    Ok(())
}

/// Gives everything that is not older than 2020 the same time, links themselves included.
fn set_times(path: &Path) -> Result<(), String> {
    use rustix::fs::{AtFlags, CWD, Timespec, Timestamps, utimensat};
    let at = |e: std::io::Error| format!("{}: {e}", path.display());
    let meta = path.symlink_metadata().map_err(at)?;
    if meta.is_dir() {
        for entry in std::fs::read_dir(path).map_err(at)? {
            set_times(&entry.map_err(at)?.path())?;
        }
    }
    let limit = SystemTime::UNIX_EPOCH + Duration::from_secs(INPUT_TIME_LIMIT.unsigned_abs());
    if meta.modified().map_err(at)? <= limit {
        return Ok(());
    }
    let time = Timespec {
        tv_sec: CONTEXT_MTIME,
        tv_nsec: 0,
    };
    let times = Timestamps {
        last_access: time,
        last_modification: time,
    };
    utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW).map_err(|e| at(e.into()))
}
