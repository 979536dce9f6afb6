//! COPY and ADD of real directories onto real trees, as lists of changes.

use std::error::Error as _;
use std::fmt::Write as _;
use std::os::unix::fs::PermissionsExt;

use rustix::process::{getegid, geteuid};
use tempfile::TempDir;

use super::*;
use crate::build::context_tree::ContextTree;
use crate::context::{BuildContext, IgnoreRules};
use crate::rootfs::testing::{THEN, change, line, tree_of};
use crate::rootfs::{ChangeKind, Tree, materialize};

mod archives;

const CONTEXT: [&str; 8] = [
    "600 a = A",
    "644 b = B",
    "755 d/",
    "644 d/f = f",
    "700 d/sub/",
    "644 d/sub/g = g",
    "4755 d/sub/x = x",
    "777 l -> d/../a",
];

const BASE: [&str; 10] = [
    "755 etc/",
    "640 etc/f = old",
    "777 loop -> loop",
    "755 opt/",
    "777 opt/abs -> /srv",
    "777 opt/dangling -> /new/place",
    "1777 opt/sticky/",
    "755 opt/sticky/sub/",
    "777 opt/up -> ../../../srv",
    "750 srv/",
];

/// What a COPY is made with; the directories live as long as this.
struct Fixture {
    context: TempDir,
    base: (TempDir, Arc<Tree>),
    ignore: &'static str,
    owner: Option<(u32, u32)>,
    epoch: Option<i64>,
}

fn fixture(context: &[&str], base: &[&str]) -> Fixture {
    let dir = tempfile::tempdir().unwrap();
    materialize(context.iter().map(|line| change(line)), dir.path()).unwrap();
    Fixture {
        context: dir,
        base: tree_of(base),
        ignore: "",
        owner: None,
        epoch: None,
    }
}

fn definition(sources: &[&str], destination: &str) -> CopyDefinition {
    CopyDefinition {
        sources: sources
            .iter()
            .map(|path| CopySource::Path(path.to_string()))
            .collect(),
        destination: destination.to_owned(),
        chown: None,
        chmod: None,
        unpack: false,
        unpack_remote: false,
        keep_owner: false,
        link: false,
        parents: false,
        excludes: Vec::new(),
    }
}

fn inline_source(name: &str, content: &str) -> CopySource {
    CopySource::Inline {
        name: name.to_owned(),
        content: content.to_owned(),
    }
}

impl Fixture {
    fn select(&self, what: &CopyDefinition) -> Result<Selection, CopyError> {
        let rules = IgnoreRules::parse(self.ignore.as_bytes()).unwrap();
        let context = BuildContext::directory(self.context.path(), rules).unwrap();
        let tree = Arc::new(ContextTree(Arc::new(context)));
        select(what, tree, "the build context")
    }

    /// The changes, each handed to `show` while all that they read is there.
    fn changes(
        &self,
        what: &CopyDefinition,
        mut show: impl FnMut(Change) -> String,
    ) -> Result<Vec<String>, CopyError> {
        let below = Stack::new(vec![Arc::clone(&self.base.1)]);
        let spool = tempfile::tempdir().unwrap();
        let selection = self.select(what)?;
        let changes = place(
            selection,
            what,
            &below,
            self.owner,
            self.epoch,
            spool.path(),
        )?;
        Ok(changes.into_iter().map(&mut show).collect())
    }

    fn lines(&self, what: &CopyDefinition) -> Result<Vec<String>, String> {
        // An ordinary user's fixtures belong to that user.
        let own = format!(" ({}:{})", geteuid().as_raw(), getegid().as_raw());
        self.changes(what, |change| line(change).replace(&own, ""))
            .map_err(|error| {
                let mut text = error.to_string();
                let mut source = error.source();
                while let Some(error) = source {
                    let _ = write!(text, ": {error}");
                    source = error.source();
                }
                text
            })
    }

    #[track_caller]
    fn check(&self, what: &CopyDefinition, expected: &[&str]) {
        assert_eq!(self.lines(what).unwrap(), expected, "{what:?}");
    }

    #[track_caller]
    fn fails(&self, what: &CopyDefinition, expected: &str) {
        assert_eq!(self.lines(what).unwrap_err(), expected, "{what:?}");
    }

    fn digest(&self, what: &CopyDefinition) -> String {
        let selection = self.select(what).unwrap();
        let digest = selection.content_digest(what.keep_owner).unwrap();
        digest.to_string()
    }
}

#[test]
fn destinations() {
    let fixture = fixture(&CONTEXT, &BASE);
    for (sources, destination, expected) in [
        // A file gets the destination's name, or its own in a directory.
        (&["a"][..], "/new", &["600 new = A"][..]),
        (&["a"], "/new/", &["755 new/", "600 new/a = A"]),
        (&["./d//f"], "/new/", &["755 new/", "644 new/f = f"]),
        (&["/../d/../a"], "/x/y", &["755 x/", "600 x/y = A"]),
        (&["a"], "/etc", &["755 etc/", "600 etc/a = A"]),
        (&["a"], "/etc/f", &["755 etc/", "600 etc/f = A"]),
        (&["a"], "/", &["600 a = A"]),
        // Without a slash the last one wins, as for cp.
        (&["a", "b"], "/new", &["644 new = B"]),
        (
            &["a", "b"],
            "/new/",
            &["755 new/", "600 new/a = A", "644 new/b = B"],
        ),
        // Links of the image are followed, inside its root.
        (&["a"], "/opt/abs", &["750 srv/", "600 srv/a = A"]),
        (&["a"], "/opt/abs/x", &["750 srv/", "600 srv/x = A"]),
        (&["a"], "/opt/up/", &["750 srv/", "600 srv/a = A"]),
        (&["a"], "/opt/dangling", &["755 new/", "600 new/place = A"]),
        (
            &["a"],
            "/opt/dangling/",
            &["755 new/", "755 new/place/", "600 new/place/a = A"],
        ),
        // A directory's content is copied; what is there already keeps its metadata, but
        // not below the destination.
        (
            &["d"],
            "/opt/sticky",
            &[
                "755 opt/",
                "1777 opt/sticky/",
                "644 opt/sticky/f = f",
                "700 opt/sticky/sub/",
                "644 opt/sticky/sub/g = g",
                "4755 opt/sticky/sub/x = x",
            ],
        ),
        (
            &["d/sub/", "a"],
            "/opt/up",
            &[
                "750 srv/",
                "600 srv/a = A",
                "644 srv/g = g",
                "4755 srv/x = x",
            ],
        ),
        // A link that is named is followed, one in a directory is not.
        (&["l"], "/new/", &["755 new/", "600 new/l = A"]),
        (
            &["."],
            "/n/w",
            &[
                "755 n/",
                "755 n/w/",
                "600 n/w/a = A",
                "644 n/w/b = B",
                "755 n/w/d/",
                "644 n/w/d/f = f",
                "700 n/w/d/sub/",
                "644 n/w/d/sub/g = g",
                "4755 n/w/d/sub/x = x",
                "777 n/w/l -> d/../a",
            ],
        ),
    ] {
        fixture.check(&definition(sources, destination), expected);
    }
}

#[test]
fn what_is_in_the_way_is_told() {
    let mut context = CONTEXT.to_vec();
    context.extend(["755 m/", "644 m/sub = x", "755 n/", "755 n/abs/"]);
    let fixture = fixture(&context, &BASE);
    let not_directory = "it, or a parent of it, is there and not a directory";
    for (source, destination, expected) in [
        (
            "d",
            "/etc/f",
            format!("cannot copy a directory to \"/etc/f\": {not_directory}"),
        ),
        (
            "a",
            "/etc/f/",
            format!("cannot copy a file to \"/etc/f/a\": {not_directory}"),
        ),
        (
            "a",
            "/etc/f/g",
            format!("cannot copy a file to \"/etc/f/g\": {not_directory}"),
        ),
        (
            "m",
            "/opt/sticky",
            "cannot copy a file to \"/opt/sticky/sub\": a directory is there".into(),
        ),
        (
            "n",
            "/opt",
            format!("cannot copy a directory to \"/opt/abs\": {not_directory}"),
        ),
        (
            "a",
            "/loop/x",
            "cannot copy anything to \"/loop/x\": Too many levels of symbolic links (os error 40)"
                .into(),
        ),
        (
            "none",
            "/x",
            "\"none\" not found in the build context".into(),
        ),
        (
            "a/below",
            "/x",
            "\"a/below\" not found in the build context".into(),
        ),
        (
            "d/none/",
            "/x",
            "\"d/none/\" not found in the build context".into(),
        ),
    ] {
        fixture.fails(&definition(&[source], destination), &expected);
    }
}

#[test]
fn wildcards() {
    let mut context = CONTEXT.to_vec();
    context.insert(2, "644 c* = star");
    context.insert(0, "644 .hidden = h");
    let mut fixture = fixture(&context, &[]);
    for (source, expected) in [
        // Nothing matches: nothing is copied, not even the directory made.
        ("*.none", &[][..]),
        ("none/*", &[]),
        ("a/*", &[]),
        ("[ab]", &["755 w/", "600 w/a = A", "644 w/b = B"]),
        ("[^a-z.]*", &[]),
        ("c[*]", &["755 w/", "644 w/c* = star"]),
        ("d/*/g", &["755 w/", "644 w/g = g"]),
        ("*/f", &["755 w/", "644 w/f = f"]),
        // A directory that matches gives its content, a link what it leads to.
        (
            "d*",
            &[
                "755 w/",
                "644 w/f = f",
                "700 w/sub/",
                "644 w/sub/g = g",
                "4755 w/sub/x = x",
            ],
        ),
        (
            "?",
            &[
                "755 w/",
                "600 w/a = A",
                "644 w/b = B",
                "644 w/f = f",
                "600 w/l = A",
                "700 w/sub/",
                "644 w/sub/g = g",
                "4755 w/sub/x = x",
            ],
        ),
        (".*", &["755 w/", "644 w/.hidden = h"]),
    ] {
        fixture.check(&definition(&[source], "/w/"), expected);
    }
    fixture.check(&definition(&["none*", "a"], "/w"), &["600 w = A"]);
    // An escaped one is none, and then the name is taken as it is.
    fixture.fails(
        &definition(&["c\\*"], "/w/"),
        "\"c\\\\*\" not found in the build context",
    );
    fixture.fails(
        &definition(&["[a"], "/w/"),
        "invalid pattern \"[a\": the class that begins with \"[\" has no end",
    );
    fixture.ignore = "a\n";
    fixture.fails(
        &definition(&["l*"], "/w/"),
        "\"l\" not found in the build context",
    );
}

#[test]
fn a_file_that_changes_after_it_was_selected_is_found() {
    let fixture = fixture(&CONTEXT, &BASE);
    let what = definition(&["a", "d"], "/to/");
    let snapshot = fixture.select(&what).unwrap().snapshot();
    assert_eq!(snapshot.changed(), None);

    // The same size, and the time put back: only its change shows.
    let path = fixture.context.path().join("d/sub/g");
    let was = std::fs::metadata(&path).unwrap().modified().unwrap();
    std::fs::write(&path, "G").unwrap();
    let file = File::options().append(true).open(&path).unwrap();
    file.set_modified(was).unwrap();
    assert_eq!(snapshot.changed(), Some(Path::new("d/sub/g")));

    let snapshot = fixture.select(&what).unwrap().snapshot();
    assert_eq!(snapshot.changed(), None);
    std::fs::remove_file(fixture.context.path().join("a")).unwrap();
    assert_eq!(snapshot.changed(), Some(Path::new("a")));
}

#[test]
fn ignored_files_are_not_there() {
    let mut fixture = fixture(&CONTEXT, &[]);
    fixture.ignore = "b\nd/sub\n!d/sub/g\nl";
    fixture.check(
        &definition(&["."], "/"),
        &[
            "600 a = A",
            "755 d/",
            "644 d/f = f",
            "700 d/sub/",
            "644 d/sub/g = g",
        ],
    );
    fixture.check(&definition(&["b*", "a"], "/w/"), &["755 w/", "600 w/a = A"]);
    for source in ["b", "d/sub/x", "l"] {
        fixture.fails(
            &definition(&[source], "/w/"),
            &format!("{source:?} not found in the build context"),
        );
    }
    fixture.ignore = "*";
    fixture.check(&definition(&["."], "/w/"), &["755 w/"]);
}

#[test]
fn owner_and_mode_apply_to_all_that_is_new() {
    let mut fixture = fixture(&CONTEXT, &BASE);
    fixture.owner = Some((5, 6));
    let mut what = definition(&["a"], "/opt/new/dir/");
    what.chmod = Some(Chmod::Mode(0o4710));
    fixture.check(
        &what,
        &[
            "755 opt/",
            "4710 opt/new/ (5:6)",
            "4710 opt/new/dir/ (5:6)",
            "4710 opt/new/dir/a = A (5:6)",
        ],
    );
    // A link has an owner, but no mode of its own.
    let mut what = definition(&["."], "/opt/sticky");
    what.chmod = Some(Chmod::Mode(0o600));
    fixture.ignore = "b\nd/f\nd/sub";
    fixture.check(
        &what,
        &[
            "755 opt/",
            "1777 opt/sticky/",
            "600 opt/sticky/a = A (5:6)",
            "600 opt/sticky/d/ (5:6)",
            "777 opt/sticky/l -> d/../a (5:6)",
        ],
    );
    let mut what = definition(&[], "/w/");
    what.sources = vec![inline_source("x", "1"), inline_source("y", "")];
    fixture.check(
        &what,
        &["755 w/ (5:6)", "644 w/x = 1 (5:6)", "644 w/y =  (5:6)"],
    );
    what.chmod = Some(Chmod::Mode(0o400));
    "/etc/f".clone_into(&mut what.destination);
    fixture.check(&what, &["755 etc/", "400 etc/f =  (5:6)"]);
}

#[test]
fn owners_are_kept_from_stages_only() {
    let (dir, tree) = tree_of(&["755 d/", "640 d/f = f", "777 d/l -> f"]);
    // Only root can give files away.
    let owner = match std::os::unix::fs::chown(dir.path().join("d/f"), Some(7), Some(8)) {
        Ok(()) => (7, 8),
        Err(_) => (geteuid().as_raw(), getegid().as_raw()),
    };
    std::fs::set_permissions(dir.path().join("d/f"), PermissionsExt::from_mode(0o640)).unwrap();
    let below = Stack::new(Vec::new());
    let file_owner = |what: &CopyDefinition, owner| {
        let tree = Arc::new(Stack::new(vec![Arc::clone(&tree)]));
        let selection = select(what, tree, "the stage").unwrap();
        let changes = place(selection, what, &below, owner, None, dir.path()).unwrap();
        let file = changes.into_iter().find(|c| c.path.ends_with("f")).unwrap();
        match file.kind {
            ChangeKind::Entry(entry) => (entry.metadata.uid, entry.metadata.gid),
            ChangeKind::Removed => panic!("COPY removes nothing"),
        }
    };
    let mut what = definition(&["d/f"], "/w/");
    assert_eq!(file_owner(&what, None), (0, 0));
    what.keep_owner = true;
    assert_eq!(file_owner(&what, None), owner);
    assert_eq!(file_owner(&what, Some((5, 6))), (5, 6));
    // A link that is named is followed in the stage's own root.
    what.sources = vec![CopySource::Path("d/l".to_owned())];
    "/f".clone_into(&mut what.destination);
    assert_eq!(file_owner(&what, None), owner);
    let missing = select(
        &definition(&["/d/x"], "/"),
        Arc::new(Stack::new(vec![tree.clone()])),
        "the stage",
    );
    assert_eq!(
        missing.err().unwrap().to_string(),
        "\"/d/x\" not found in the stage"
    );
}

#[test]
fn times_are_the_files_or_fixed() {
    let mut fixture = fixture(&CONTEXT, &["755 etc/"]);
    let mut what = definition(&["a", "d"], "/etc/new/");
    what.sources.push(inline_source("i", ""));
    let show = |change: Change| match change.kind {
        ChangeKind::Entry(entry) if entry.metadata.mtime == THEN => {
            format!("{} then", change.path.display())
        }
        ChangeKind::Entry(entry) => {
            format!("{} {}", change.path.display(), entry.metadata.mtime.seconds)
        }
        ChangeKind::Removed => panic!("COPY removes nothing"),
    };
    for (epoch, own) in [(None, 1_577_836_800), (Some(42), 42)] {
        fixture.epoch = epoch;
        let lines = fixture.changes(&what, show).unwrap();
        let expected = [
            "etc then".to_owned(),
            format!("etc/new {own}"),
            "etc/new/a then".to_owned(),
            "etc/new/f then".to_owned(),
            format!("etc/new/i {own}"),
            "etc/new/sub then".to_owned(),
            "etc/new/sub/g then".to_owned(),
            "etc/new/sub/x then".to_owned(),
        ];
        assert_eq!(lines, expected);
    }
}

#[test]
fn names_of_one_file_stay_together() {
    let context = [
        "755 d/",
        "644 d/c = x",
        "644 h1 == d/c",
        "644 h2 == d/c",
        "600 p |",
    ];
    let fixture = fixture(&context, &[]);
    fixture.check(
        &definition(&["."], "/w/"),
        &[
            "755 w/",
            "755 w/d/",
            "644 w/d/c = x",
            "644 w/h1 == w/d/c",
            "644 w/h2 == w/d/c",
            "600 w/p |",
        ],
    );
    // Sources are copied one by one.
    for sources in [&["h1", "h2"][..], &["h*"]] {
        fixture.check(
            &definition(sources, "/w/"),
            &["755 w/", "644 w/h1 = x", "644 w/h2 = x"],
        );
    }
}

#[test]
fn digests_tell_contents_apart() {
    let what = definition(&["."], "/w/");
    let digest_of = |context: &[&str]| fixture(context, &[]).digest(&what);
    let first = digest_of(&CONTEXT);
    assert_eq!(digest_of(&CONTEXT), first);
    for (line, other) in [
        ("600 a = A", "600 a = Z"),
        ("600 a = A", "600 a = AA"),
        ("600 a = A", "644 a = A"),
        ("600 a = A", "600 aa = A"),
        ("600 a = A", "777 a -> A"),
        ("777 l -> d/../a", "777 l -> a"),
        ("700 d/sub/", "711 d/sub/"),
        ("644 d/f = f", "755 d/f/"),
    ] {
        let context = CONTEXT.map(|known| if known == line { other } else { known });
        assert_ne!(digest_of(&context), first, "{other}");
    }
    // Times do not matter, nor what is ignored or not named.
    let mut same = fixture(&CONTEXT, &[]);
    let file = File::open(same.context.path().join("a")).unwrap();
    file.set_modified(std::time::SystemTime::now()).unwrap();
    assert_eq!(same.digest(&what), first);
    std::fs::write(same.context.path().join("more"), "x").unwrap();
    assert_ne!(same.digest(&what), first);
    same.ignore = "more";
    assert_eq!(same.digest(&what), first);
    let of = |sources: &[&str]| same.digest(&definition(sources, "/w"));
    assert_eq!(of(&["a"]), of(&["./a"]));
    assert_ne!(of(&["a"]), of(&["l"]));
    assert_ne!(of(&["a", "b"]), of(&["b", "a"]));
    assert_ne!(of(&["d"]), of(&["d/sub"]));
    let inline = |name: &str, content: &str| {
        let mut what = definition(&[], "/w");
        what.sources = vec![inline_source(name, content)];
        same.digest(&what)
    };
    assert_ne!(inline("a", "bc"), inline("ab", "c"));
    assert_ne!(inline("a", "A"), of(&["a"]));
}
