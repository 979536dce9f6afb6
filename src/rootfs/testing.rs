//! For tests that mount: runs each in a process of its own in every world there is here,
//! and looks at filesystems in a form that can be compared.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

use rustix::fs::FileType;

use super::change::{Change, ChangeKind, Data, Entry, FileContent, FileSource, Metadata, Time};
use super::stack::Stack;
use super::tree::{self, Attributes, Tree};
use super::xattr;
use crate::confined::ConfinedDir;

/// Names the world in which a test process already is.
const WORLD: &str = "SOCKLESS_TEST_WORLD";

/// Says that a test does not run, which is a failure where everything has to.
#[allow(clippy::print_stderr, reason = "a skipped test is to be seen")]
pub(crate) fn skip(reason: &str) {
    assert_ne!(
        std::env::var("SOCKLESS_TEST_REQUIRE_ALL").as_deref(),
        Ok("1"),
        "skipped: {reason}"
    );
    eprintln!("skipped: {reason}");
}

/// Runs `body` in a mount namespace of its own: as root, and as root of a user namespace,
/// as far as this machine allows. `module` is `module_path!()`, `name` the test's function.
///
/// A test process has threads, which cannot enter namespaces; so the test binary is
/// started again for this one test.
pub(crate) fn in_worlds(module: &str, name: &str, body: impl FnOnce()) {
    if std::env::var_os(WORLD).is_some() {
        return body();
    }
    let (_, module) = module.split_once("::").expect("a module of this crate");
    let test = format!("{module}::{name}");
    let mut ran = 0;
    for world in World::ALL {
        if matches!(world, World::Root) && !rustix::process::geteuid().is_root() {
            continue;
        }
        // A filter that matches nothing: shows whether processes can be started there.
        let (possible, _) = world.run(&["--list", "--exact", "no::such::test"]);
        if !possible {
            skip(&format!("no {world:?} here"));
            continue;
        }
        let (passed, output) = world.run(&["--exact", &test, "--nocapture"]);
        assert!(passed, "{test} as {world:?}:\n{output}");
        assert!(
            output.contains("1 passed"),
            "{test} was not found:\n{output}"
        );
        ran += 1;
    }
    if ran == 0 {
        skip("no mount namespaces here");
    }
}

/// Whether other owners than the one who runs the test can be given.
pub(crate) fn has_many_ids() -> bool {
    let map = std::fs::read_to_string("/proc/self/uid_map").unwrap();
    let count = map.split_whitespace().nth(2).unwrap();
    count.parse::<u64>().unwrap() > 1000
}

#[derive(Clone, Copy, Debug)]
enum World {
    /// Real root.
    Root,
    /// Root of a user namespace.
    UserNamespace,
}

impl World {
    const ALL: [Self; 2] = [Self::Root, Self::UserNamespace];

    /// Runs the test binary with `args` there; returns whether it succeeded, and its output.
    fn run(self, args: &[&str]) -> (bool, String) {
        let exe = std::env::current_exe().unwrap();
        let root = rustix::process::geteuid().is_root();
        let unshare: &[&str] = &["unshare", "--mount", "--propagation", "private"];
        let mut line: Vec<&str> = match self {
            Self::Root => unshare.to_vec(),
            // As root, the namespace's IDs are written by this process, which needs no
            // configuration: an ordinary user's process waits for that.
            Self::UserNamespace if root => {
                let mut line = vec!["setpriv", "--reuid=100000", "--regid=100000"];
                line.extend(["--clear-groups", "unshare", "--user", "sh", "-c"]);
                line.extend([r#"echo ready; read _; exec "$@""#, "sh"]);
                line.extend(unshare);
                line
            }
            Self::UserNamespace => {
                let mut line = unshare.to_vec();
                line.extend(["--user", "--map-root-user"]);
                let auto = Command::new("unshare")
                    .args(["--user", "--map-root-user", "--map-auto", "true"])
                    .output();
                if auto.is_ok_and(|output| output.status.success()) {
                    line.push("--map-auto");
                }
                line
            }
        };
        let exe = exe.to_str().unwrap();
        line.push(exe);
        line.extend(args);
        let child = Command::new(line[0])
            .args(&line[1..])
            .env(WORLD, format!("{self:?}"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn();
        let Ok(mut child) = child else {
            return (false, String::new());
        };
        let mut stdout = BufReader::new(child.stdout.take().unwrap());
        if matches!(self, Self::UserNamespace) && root {
            let mut ready = String::new();
            stdout.read_line(&mut ready).unwrap();
            for map in ["uid_map", "gid_map"] {
                let path = format!("/proc/{}/{map}", child.id());
                // A failure shows in the process's own exit status.
                let _ = std::fs::write(path, "0 100000 65536");
            }
            let _ = child.stdin.take().unwrap().write_all(b"\n");
        }
        let mut output = String::new();
        stdout.read_to_string(&mut output).unwrap();
        (child.wait().unwrap().success(), output)
    }
}

/// One file as it is seen, in a form that can be compared.
///
/// Inode numbers are left out: the kernel's overlay shows several for one file where the
/// file cannot carry the attribute by which it remembers them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) kind: String,
    pub(crate) metadata: Metadata,
}

pub(crate) type View = BTreeMap<PathBuf, Seen>;

/// What the kernel shows in the directory `dir`.
pub(crate) fn view_of_dir(dir: &Path) -> View {
    let root = ConfinedDir::open(dir).unwrap();
    let (mut view, mut left) = (View::new(), vec![PathBuf::new()]);
    while let Some(path) = left.pop() {
        let (fd, found) = tree::look_at(&root, &path).unwrap().unwrap();
        let content = || {
            let mut file = tree::open_file(&root, &path, &found).unwrap();
            let mut bytes = Vec::new();
            file.read_to_end(&mut bytes).unwrap();
            bytes
        };
        let link = || {
            rustix::fs::readlinkat(&fd, "", Vec::new())
                .unwrap()
                .into_bytes()
        };
        let xattrs = xattr::of_layer(fd.as_fd()).unwrap();
        see(&mut view, &path, &found, xattrs, content, link);
        if found.is_dir() {
            left.extend(sorted(
                tree::list(&root, &path)
                    .unwrap()
                    .into_iter()
                    .map(|(name, _)| path.join(name)),
            ));
        }
    }
    view
}

/// What a stack shows.
pub(crate) fn view_of_stack(stack: &Stack) -> View {
    let mut view = View::new();
    let mut left = vec![stack.lookup(Path::new("/"), true).unwrap().unwrap()];
    while let Some(node) = left.pop() {
        let content = || {
            let mut bytes = Vec::new();
            stack.open(&node).unwrap().read_to_end(&mut bytes).unwrap();
            bytes
        };
        let link = || stack.read_link(&node).unwrap().into_encoded_bytes();
        let xattrs = stack.xattrs(&node).unwrap();
        let found = node.attributes();
        see(&mut view, node.path(), found, xattrs, content, link);
        if found.is_dir() {
            let entries = stack.read_dir(&node).unwrap();
            for (name, entry) in &entries {
                // Both ways to an entry lead to the same.
                let by_path = stack
                    .lookup(&node.path().join(name), false)
                    .unwrap()
                    .unwrap();
                assert_eq!(format!("{entry:?}"), format!("{by_path:?}"));
            }
            left.extend(entries.into_iter().rev().map(|(_, entry)| entry));
        }
    }
    view
}

fn sorted(paths: impl Iterator<Item = PathBuf>) -> Vec<PathBuf> {
    let mut paths: Vec<_> = paths.collect();
    paths.sort_unstable_by(|a, b| b.cmp(a));
    paths
}

fn see(
    view: &mut View,
    path: &Path,
    found: &Attributes,
    xattrs: BTreeMap<OsString, Vec<u8>>,
    content: impl FnOnce() -> Vec<u8>,
    link: impl FnOnce() -> Vec<u8>,
) {
    let kind = match found.file_type {
        FileType::RegularFile => {
            let bytes = content();
            assert_eq!(bytes.len() as u64, found.size);
            format!("file {:?}", String::from_utf8_lossy(&bytes))
        }
        FileType::Symlink => format!("link {:?}", String::from_utf8_lossy(&link())),
        FileType::CharacterDevice | FileType::BlockDevice => {
            format!("{:?} {}", found.file_type, found.rdev)
        }
        other => format!("{other:?}"),
    };
    let metadata = Metadata {
        xattrs,
        ..found.metadata()
    };
    let seen = Seen { kind, metadata };
    view.insert(path.to_owned(), seen);
}

/// The time that fixtures have.
pub(crate) const THEN: Time = Time {
    seconds: 1_400_000_000,
    nanoseconds: 0,
};

/// A change from one line: `path/` a directory, `path = text` a file, `path -> target` a
/// link, `path == other` a hard link, `path |` a pipe, `-path` removed; a mode in front.
pub(crate) fn change(line: &str) -> Change {
    if let Some(path) = line.strip_prefix('-') {
        return Change {
            path: path.into(),
            kind: ChangeKind::Removed,
        };
    }
    let (mode, line) = line.split_once(' ').unwrap();
    let (path, data) = if let Some((path, text)) = line.split_once(" = ") {
        let content = FileContent {
            size_bytes: text.len() as u64,
            source: FileSource::Bytes(text.as_bytes().into()),
        };
        (path, Data::File(content))
    } else if let Some((path, target)) = line.split_once(" -> ") {
        (path, Data::Symlink(target.into()))
    } else if let Some((path, first)) = line.split_once(" == ") {
        (path, Data::Hardlink(first.into()))
    } else if let Some(path) = line.strip_suffix(" |") {
        (path, Data::Fifo)
    } else {
        let path = line.strip_suffix('/').unwrap();
        let opaque = path.ends_with('!');
        (path.trim_end_matches('!'), Data::Directory { opaque })
    };
    let metadata = Metadata {
        mode: u32::from_str_radix(mode, 8).unwrap(),
        uid: rustix::process::geteuid().as_raw(),
        gid: rustix::process::getegid().as_raw(),
        mtime: THEN,
        ..Metadata::default()
    };
    Change {
        path: path.into(),
        kind: ChangeKind::Entry(Entry { metadata, data }),
    }
}

/// A tree from lines as of [`change`].
pub(crate) fn tree_of(lines: &[&str]) -> (tempfile::TempDir, Arc<Tree>) {
    let dir = tempfile::tempdir().unwrap();
    super::materialize(lines.iter().map(|line| change(line)), dir.path()).unwrap();
    let tree = Tree::open(dir.path()).unwrap();
    (dir, tree)
}

/// A change as one line, in the form of [`change`], but with every time that is not
/// [`THEN`], owner that is not 0:0 and extended attribute.
pub(crate) fn line(change: Change) -> String {
    let path = change.path.to_str().unwrap().to_owned();
    let ChangeKind::Entry(Entry { metadata, data }) = change.kind else {
        return format!("-{path}");
    };
    let what = match data {
        Data::File(FileContent { size_bytes, source }) => {
            let (mut bytes, mut reader) = (Vec::new(), source.reader().unwrap());
            reader.read_to_end(&mut bytes).unwrap();
            assert_eq!(bytes.len() as u64, size_bytes, "{path}");
            format!("{path} = {}", String::from_utf8(bytes).unwrap())
        }
        Data::Symlink(target) => format!("{path} -> {}", target.to_str().unwrap()),
        Data::Hardlink(first) => format!("{path} == {}", first.display()),
        Data::Fifo => format!("{path} |"),
        Data::Directory { opaque: true } => format!("{path}!/"),
        Data::Directory { opaque: false } => format!("{path}/"),
        other => format!("{path} {other:?}"),
    };
    let mut line = format!("{:o} {what}", metadata.mode);
    if (metadata.uid, metadata.gid) != (0, 0) {
        line += &format!(" ({}:{})", metadata.uid, metadata.gid);
    }
    for (name, value) in metadata.xattrs {
        line += &format!(" [{}={}]", name.display(), String::from_utf8_lossy(&value));
    }
    line
}
