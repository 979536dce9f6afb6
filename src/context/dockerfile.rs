//! Finds and reads the Dockerfile and the ignore rules that go with it.
//!
//! Both are read whatever the rules say: they hide files from steps, not from the builder.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileTypeExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};

use super::{ContextError, IgnoreRules, InputFile, only_regular};
use crate::confined::ConfinedDir;
use crate::io::LimitedReader;

/// The largest Dockerfile or ignore file that is read, in bytes: what a message to
/// BuildKit can hold, so that whatever builds there is read here.
const LIMIT_BYTES: u64 = 16 << 20;

/// The name of a Dockerfile where none is given.
const DEFAULT_NAME: &str = "Dockerfile";

/// The same, second choice.
const LOWER_CASE_NAME: &str = "dockerfile";

/// A Dockerfile as found, not parsed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DockerfileSource {
    /// The name for messages: the path as given, or relative to the context.
    pub name: String,
    /// The text.
    pub text: Vec<u8>,
    /// The ignore rules' text; empty where there is no file with any.
    pub ignore: Vec<u8>,
    /// The name of the file that `ignore` is from.
    pub ignore_name: Option<String>,
    /// Whether there are no rules but a `.containerignore`, which Podman and Buildah read.
    pub has_containerignore: bool,
}

impl DockerfileSource {
    /// Parses the ignore rules.
    ///
    /// # Errors
    /// [`ContextError::Ignore`].
    pub fn ignore_rules(&self) -> Result<IgnoreRules, ContextError> {
        IgnoreRules::parse(&self.ignore).map_err(|source| ContextError::Ignore {
            name: self.ignore_name.clone().unwrap_or_default(),
            source,
        })
    }
}

/// Reads the Dockerfile of a build and the ignore rules that apply to it.
///
/// `file` is `--file`: a path from the current directory, `-` for standard input (whose
/// text is taken from `stdin`), or absent for `Dockerfile` in `context`. Where there is
/// no `Dockerfile`, `dockerfile` will do. A Dockerfile's own rules, in `NAME.dockerignore`
/// beside it, are taken instead of `.dockerignore` in the context.
///
/// In the context, links are resolved inside of it. A Dockerfile elsewhere was named by
/// the user, so its directory is trusted, but a link in that does not lead out of it.
///
/// # Errors
/// [`ContextError::Open`], [`ContextError::NoDockerfile`], [`ContextError::Read`].
pub fn read_dockerfile(
    context: &Path,
    file: Option<&Path>,
    stdin: impl Read,
) -> Result<DockerfileSource, ContextError> {
    let place = match file {
        None => DockerfilePlace::Default,
        Some(file) if file == Path::new("-") => DockerfilePlace::Stdin(Box::new(stdin)),
        Some(file) => DockerfilePlace::Path(file),
    };
    read_dockerfile_at(context, place, true)
}

/// Where a Dockerfile is.
pub(super) enum DockerfilePlace<'a> {
    /// In the context, under its usual name.
    Default,
    /// In the context, under this name, whose leading slashes mean nothing.
    Inside(&'a Path),
    /// At this path of the machine, from the current directory.
    Path(&'a Path),
    /// On standard input.
    Stdin(Box<dyn Read + 'a>),
    /// In a file that was fetched.
    Fetched(&'a InputFile),
}

/// [`read_dockerfile`] for all places; the ignore rules stay empty unless `with_ignore`.
pub(super) fn read_dockerfile_at(
    context: &Path,
    place: DockerfilePlace<'_>,
    with_ignore: bool,
) -> Result<DockerfileSource, ContextError> {
    let root = open_dir(context)?;
    let (name, text, own) = find(context, &root, place)?;
    if with_ignore {
        return with_rules(name, text, own, &root);
    }
    Ok(DockerfileSource {
        name,
        text,
        ignore: Vec::new(),
        ignore_name: None,
        has_containerignore: false,
    })
}

/// The rules of one Dockerfile alone: their name and text.
type OwnRules = Option<(String, Vec<u8>)>;

/// Finds and reads a Dockerfile: its name, its text, its own rules.
fn find(
    context: &Path,
    root: &ConfinedDir,
    place: DockerfilePlace<'_>,
) -> Result<(String, Vec<u8>, OwnRules), ContextError> {
    let within;
    let file = match place {
        DockerfilePlace::Default => None,
        DockerfilePlace::Inside(file) => {
            within = context.join(super::clean(file));
            Some((file, within.as_path()))
        }
        DockerfilePlace::Path(file) => Some((file, file)),
        DockerfilePlace::Stdin(stdin) => {
            let text = read_limited(stdin).map_err(read_error(Path::new("-")))?;
            return Ok(("-".to_owned(), text, None));
        }
        DockerfilePlace::Fetched(file) => {
            let text = File::open(&file.path).and_then(read_limited);
            let text = text.map_err(read_error(Path::new(&file.shown)))?;
            return Ok((file.shown.clone(), text, None));
        }
    };
    let (given, file) = file.unzip();
    let shown = file.map_or_else(|| context.join(DEFAULT_NAME), Path::to_owned);
    let inside_context = file.and_then(|file| path_inside(context, file));
    if file.is_some() && inside_context.is_none() && is_pipe(&shown) {
        // What a shell makes of `-f <(…)`.
        let text = File::open(&shown)
            .and_then(read_limited)
            .map_err(read_error(&shown))?;
        return Ok((shown.display().to_string(), text, None));
    }
    let beside;
    let (dir, inside) = match file {
        None => (root, PathBuf::from(DEFAULT_NAME)),
        Some(file) => match inside_context {
            Some(inside) => (root, inside),
            None => {
                let name = file
                    .file_name()
                    .ok_or_else(|| no_dockerfile(&shown, false, false))?;
                beside = open_beside(file)?;
                (&beside, PathBuf::from(name))
            }
        },
    };
    let name = match given {
        None => inside.display().to_string(),
        Some(file) => file.display().to_string(),
    };
    let mut text = read_inside(dir, &inside)?;
    let mut name_read = name;
    if text.is_none() && inside.file_name() == Some(OsStr::new(DEFAULT_NAME)) {
        text = read_inside(dir, &inside.with_file_name(LOWER_CASE_NAME))?;
        name_read.truncate(name_read.len() - DEFAULT_NAME.len());
        name_read.push_str(LOWER_CASE_NAME);
    }
    let text = text.ok_or_else(|| {
        let is_link = dir
            .lstat(&inside)
            .is_ok_and(|stat| rustix::fs::FileType::from_raw_mode(stat.st_mode).is_symlink());
        let has_containerfile = given.is_none() && dir.lstat(Path::new("Containerfile")).is_ok();
        no_dockerfile(&shown, is_link, has_containerfile)
    })?;
    // Also beside `dockerfile` they are those of `Dockerfile`, as in BuildKit.
    let mut rules = inside.into_os_string();
    rules.push(".dockerignore");
    let rules = PathBuf::from(rules);
    let own = read_inside(dir, &rules)?.map(|bytes| (rules.display().to_string(), bytes));
    Ok((name_read, text, own))
}

/// The rules of the `.dockerignore` in the directory `context`; none where there is no such file.
///
/// # Errors
/// [`ContextError::Open`], [`ContextError::Read`], [`ContextError::Ignore`].
pub(super) fn context_rules(context: &Path) -> Result<IgnoreRules, ContextError> {
    let root = open_dir(context)?;
    with_rules(String::new(), Vec::new(), None, &root)?.ignore_rules()
}

/// Completes a Dockerfile with its own rules, else with those of the context.
fn with_rules(
    name: String,
    text: Vec<u8>,
    own: Option<(String, Vec<u8>)>,
    context: &ConfinedDir,
) -> Result<DockerfileSource, ContextError> {
    let rules = match own {
        Some(own) => Some(own),
        None => read_inside(context, Path::new(".dockerignore"))?
            .map(|bytes| (".dockerignore".to_owned(), bytes)),
    };
    let has_containerignore =
        rules.is_none() && context.lstat(Path::new(".containerignore")).is_ok();
    let (ignore_name, ignore) = rules.unzip();
    Ok(DockerfileSource {
        name,
        text,
        ignore: ignore.unwrap_or_default(),
        ignore_name,
        has_containerignore,
    })
}

fn open_dir(path: &Path) -> Result<ConfinedDir, ContextError> {
    ConfinedDir::open(path).map_err(|source| ContextError::Open {
        path: path.to_owned(),
        source,
    })
}

/// Opens the directory that holds a Dockerfile outside of the context.
fn open_beside(file: &Path) -> Result<ConfinedDir, ContextError> {
    let parent = match file.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    ConfinedDir::open(parent).map_err(|source| match source.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => no_dockerfile(file, false, false),
        _ => read_error(file)(source),
    })
}

fn is_pipe(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|metadata| metadata.file_type().is_fifo())
}

/// `file` relative to `context`, where it is written as a path below it.
///
/// Decided by text, so that a link on the way is resolved inside of the context and
/// cannot make its own target the trusted directory.
fn path_inside(context: &Path, file: &Path) -> Option<PathBuf> {
    let absolute = |path: &Path| {
        std::path::absolute(path)
            .ok()
            .map(|path| super::clean(&path))
    };
    let inside = absolute(file)?
        .strip_prefix(absolute(context)?)
        .ok()?
        .to_owned();
    (!inside.as_os_str().is_empty()).then_some(inside)
}

/// The regular file at `path` in `dir`, links resolved inside; `None` where there is none.
fn read_inside(dir: &ConfinedDir, path: &Path) -> Result<Option<Vec<u8>>, ContextError> {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY;
    let read = || {
        read_limited(only_regular(File::from(dir.open_at(
            path,
            flags,
            Mode::empty(),
        )?))?)
    };
    match read() {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
            ) =>
        {
            Ok(None)
        }
        Err(error) => Err(read_error(&dir.path().join(path))(error)),
    }
}

pub(super) fn read_limited(reader: impl Read) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    LimitedReader::new(reader, LIMIT_BYTES, "the file").read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn read_error(path: &Path) -> impl FnOnce(io::Error) -> ContextError + '_ {
    |source| ContextError::Read {
        path: path.to_owned(),
        source,
    }
}

fn no_dockerfile(path: &Path, is_link: bool, has_containerfile: bool) -> ContextError {
    ContextError::NoDockerfile {
        path: path.to_owned(),
        is_link,
        has_containerfile,
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    /// A directory with a context `c` and `files`, which contain their own names.
    fn fixture(files: &[&str]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("c")).unwrap();
        for file in files {
            let path = dir.path().join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, file).unwrap();
        }
        dir
    }

    fn read(dir: &tempfile::TempDir, file: Option<&str>) -> Result<DockerfileSource, ContextError> {
        let file = file.map(|file| match file {
            "-" => PathBuf::from("-"),
            file => dir.path().join(file),
        });
        read_dockerfile(&dir.path().join("c"), file.as_deref(), &b"stdin"[..])
    }

    /// Checks the Dockerfile's text and that of its rules.
    #[track_caller]
    fn check(files: &[&str], file: Option<&str>, text: &str, ignore: &str) -> DockerfileSource {
        let source = read(&fixture(files), file).unwrap();
        assert_eq!(String::from_utf8_lossy(&source.text), text);
        assert_eq!(String::from_utf8_lossy(&source.ignore), ignore);
        source
    }

    #[test]
    fn a_dockerfile_is_found_with_its_rules() {
        let both = ["c/Dockerfile", "c/dockerfile", "c/.dockerignore"];
        let source = check(&both, None, "c/Dockerfile", "c/.dockerignore");
        assert_eq!(source.name, "Dockerfile");
        assert_eq!(source.ignore_name.as_deref(), Some(".dockerignore"));

        let source = check(&["c/dockerfile"], None, "c/dockerfile", "");
        assert_eq!(
            (source.name.as_str(), source.ignore_name),
            ("dockerfile", None)
        );

        let own = [
            "c/Dockerfile",
            "c/Dockerfile.dockerignore",
            "c/.dockerignore",
        ];
        let source = check(&own, None, "c/Dockerfile", "c/Dockerfile.dockerignore");
        assert_eq!(
            source.ignore_name.as_deref(),
            Some("Dockerfile.dockerignore")
        );

        let named = [
            "c/d/x",
            "c/d/x.dockerignore",
            "c/d/.dockerignore",
            "c/.dockerignore",
        ];
        check(&named, Some("c/d/x"), "c/d/x", "c/d/x.dockerignore");
        check(
            &["c/d/dockerfile"],
            Some("c/d/Dockerfile"),
            "c/d/dockerfile",
            "",
        );
    }

    #[test]
    fn a_dockerfile_may_be_elsewhere_or_on_standard_input() {
        let files = [
            "o/x",
            "o/x.dockerignore",
            "o/y",
            "o/.dockerignore",
            "c/.dockerignore",
        ];
        let source = check(&files, Some("o/x"), "o/x", "o/x.dockerignore");
        assert!(source.name.ends_with("/o/x"), "{}", source.name);
        check(&files, Some("o/y"), "o/y", "c/.dockerignore");
        check(&files, Some("c/../o/y"), "o/y", "c/.dockerignore");
        let source = check(&files, Some("-"), "stdin", "c/.dockerignore");
        assert_eq!(source.name, "-");
    }

    #[test]
    fn a_bad_rule_is_shown_with_its_file() {
        let dir = fixture(&["c/Dockerfile"]);
        fs::write(dir.path().join("c/.dockerignore"), "a\n!\n").unwrap();
        let error = read(&dir, None).unwrap().ignore_rules().unwrap_err();
        assert_eq!(
            format!("{:#}", anyhow::Error::new(error)),
            ".dockerignore: line 2: \"!\" must be followed by a pattern"
        );
        fs::write(dir.path().join("c/.dockerignore"), "a\n").unwrap();
        let rules = read(&dir, None).unwrap().ignore_rules().unwrap();
        assert!(rules.is_ignored(Path::new("a")) && !rules.is_ignored(Path::new("b")));
    }

    #[test]
    fn a_pipe_is_read_where_the_user_names_one() {
        let dir = fixture(&[]);
        let pipe = dir.path().join("pipe");
        rustix::fs::mkfifoat(rustix::fs::CWD, &pipe, Mode::from_raw_mode(0o600)).unwrap();
        let writer = std::thread::spawn(move || fs::write(pipe, "FROM a").unwrap());
        assert_eq!(read(&dir, Some("pipe")).unwrap().text, b"FROM a");
        writer.join().unwrap();
    }

    #[test]
    fn security_s04_links_stay_inside() {
        let dir = fixture(&["canary", "c/sub/real", "o/real"]);
        let link = |target: &str, at: &str| symlink(target, dir.path().join(at)).unwrap();
        let canary = dir.path().join("canary");
        link("sub/real", "c/Dockerfile");
        link(canary.to_str().unwrap(), "c/absolute");
        link("../canary", "c/relative");
        link("../../canary", "c/.dockerignore");
        link("real", "o/fine");
        link("../canary", "o/up");
        link("..", "c/parent");
        let source = read(&dir, None).unwrap();
        assert_eq!(source.text, b"c/sub/real");
        assert_eq!(source.ignore, b"");
        assert_eq!(read(&dir, Some("o/fine")).unwrap().text, b"o/real");
        for file in ["c/absolute", "c/relative", "c/parent/canary", "o/up"] {
            let error = read(&dir, Some(file)).unwrap_err();
            let is_a_link = file != "c/parent/canary";
            assert!(
                matches!(error, ContextError::NoDockerfile { is_link, .. } if is_link == is_a_link),
                "{file}: {error:?}"
            );
        }
        // A pipe of the machine is out of reach too, and nobody waits for it.
        let pipe = dir.path().join("pipe");
        rustix::fs::mkfifoat(rustix::fs::CWD, &pipe, Mode::from_raw_mode(0o600)).unwrap();
        link("../pipe", "c/to-pipe");
        assert!(read(&dir, Some("c/to-pipe")).is_err());
    }

    #[test]
    fn rules_under_another_name_are_noticed_where_there_are_none() {
        let dir = fixture(&["c/Dockerfile"]);
        let noticed = || read(&dir, None).unwrap().has_containerignore;
        assert!(!noticed());
        fs::write(dir.path().join("c/.containerignore"), "secret\n").unwrap();
        assert!(noticed());
        assert_eq!(read(&dir, None).unwrap().ignore, b"");
        fs::write(dir.path().join("c/.dockerignore"), "").unwrap();
        assert!(!noticed());
    }

    #[test]
    fn what_cannot_be_read_is_said() {
        let dir = fixture(&["c/file"]);
        let context = dir.path().join("c");
        let text = |file| format!("{:#}", anyhow::Error::new(read(&dir, file).unwrap_err()));
        let at = |name: &str| dir.path().join(name).display().to_string();
        assert_eq!(
            text(None),
            format!("no Dockerfile at {}/Dockerfile", context.display())
        );
        assert_eq!(text(Some("c/x")), format!("no Dockerfile at {}", at("c/x")));
        fs::write(context.join("Containerfile"), "").unwrap();
        assert_eq!(text(Some("c/x")), format!("no Dockerfile at {}", at("c/x")));
        assert_eq!(
            text(None),
            format!(
                "no Dockerfile at {}: there is a Containerfile, which is read only where --file names it",
                at("c/Dockerfile")
            )
        );
        assert_eq!(text(Some("o/x")), format!("no Dockerfile at {}", at("o/x")));
        fs::create_dir(context.join("Dockerfile")).unwrap();
        assert_eq!(
            text(None),
            format!("reading {}: not a regular file", at("c/Dockerfile"))
        );
        let big = fs::File::create(context.join("big")).unwrap();
        big.set_len(LIMIT_BYTES + 1).unwrap();
        assert_eq!(
            text(Some("c/big")),
            format!(
                "reading {}: the file is larger than {LIMIT_BYTES} bytes",
                at("c/big")
            )
        );
        big.set_len(LIMIT_BYTES).unwrap();
        assert_eq!(
            read(&dir, Some("c/big")).unwrap().text.len() as u64,
            LIMIT_BYTES
        );
        let error = read_dockerfile(&dir.path().join("absent"), None, io::empty()).unwrap_err();
        assert!(matches!(error, ContextError::Open { .. }), "{error:?}");
    }
}
