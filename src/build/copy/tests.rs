//! COPY and ADD of real directories onto real trees, as lists of changes.

use std::error::Error as _;
use std::fmt::Write as _;
use std::os::unix::fs::PermissionsExt;

use rustix::process::{getegid, geteuid};
use tempfile::TempDir;

use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;

use super::*;
use crate::build::below::Below;
use crate::build::context_tree::ContextTree;
use crate::build::remote::{Fetched, FetchedFile};
use crate::context::{BuildContext, IgnoreRules};
use crate::plan::{Chmod, CopyDefinition, CopySource};
use crate::rootfs::testing::{THEN, change, line, tree_of};
use crate::rootfs::{
    Change, ChangeKind, Data, Entry, FileContent, FileSource, LayerForm, LayerView, Listing, Tree,
    changes, materialize,
};

mod archives;
mod reading;

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
        self.select_with(what, BTreeMap::new())
    }

    fn select_with(
        &self,
        what: &CopyDefinition,
        fetched: BTreeMap<usize, Fetched>,
    ) -> Result<Selection, CopyError> {
        let rules = IgnoreRules::parse(self.ignore.as_bytes()).unwrap();
        let context = BuildContext::directory(self.context.path(), rules).unwrap();
        let tree = Arc::new(ContextTree::new(Arc::new(context)));
        select(what, tree, "the build context", fetched)
    }

    /// The changes, each handed to `show` while all that they read is there.
    fn changes(
        &self,
        what: &CopyDefinition,
        show: impl FnMut(Change) -> String,
    ) -> Result<Vec<String>, CopyError> {
        self.changes_with(what, BTreeMap::new(), show)
    }

    fn changes_with(
        &self,
        what: &CopyDefinition,
        fetched: BTreeMap<usize, Fetched>,
        mut show: impl FnMut(Change) -> String,
    ) -> Result<Vec<String>, CopyError> {
        let below = Stack::new(vec![Arc::clone(&self.base.1)]);
        let spool = tempfile::tempdir().unwrap();
        let selection = self.select_with(what, fetched.clone())?;
        let placed = place(
            selection,
            what,
            &below,
            self.owner,
            self.epoch,
            spool.path(),
        );
        let unpacked = placed.map(|changes| changes.into_iter().map(&mut show).collect::<Vec<_>>());
        // On a base that is only listed it is all the same.
        let spool = tempfile::tempdir().unwrap();
        let placed = place(
            self.select_with(what, fetched)?,
            what,
            self.listed(),
            self.owner,
            self.epoch,
            spool.path(),
        );
        let listed = placed.map(|changes| changes.into_iter().map(&mut show).collect::<Vec<_>>());
        match (&unpacked, &listed) {
            (Ok(unpacked), Ok(listed)) => assert_eq!(listed, unpacked),
            (Err(unpacked), Err(listed)) => assert_eq!(listed.to_string(), unpacked.to_string()),
            _ => panic!("unpacked {unpacked:?}, listed {listed:?}"),
        }
        unpacked
    }

    /// The base by its listing, unpacked when a content is asked for.
    fn listed(&self) -> Below {
        let tree = Arc::clone(&self.base.1);
        let files: Vec<Change> = changes(&tree, &Stack::default())
            .map(Result::unwrap)
            .collect();
        let listing = Listing::of_changes(&files, None).unwrap();
        let view = LayerView::new(vec![LayerForm::Listing(Arc::new(listing))]);
        Below::new(view, move || Ok(Stack::new(vec![Arc::clone(&tree)])))
    }

    fn lines(&self, what: &CopyDefinition) -> Result<Vec<String>, String> {
        self.fetched_lines(what, BTreeMap::new())
    }

    fn fetched_lines(
        &self,
        what: &CopyDefinition,
        fetched: BTreeMap<usize, Fetched>,
    ) -> Result<Vec<String>, String> {
        // An ordinary user's fixtures belong to that user.
        let own = format!(" ({}:{})", geteuid().as_raw(), getegid().as_raw());
        self.changes_with(what, fetched, |change| line(change).replace(&own, ""))
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
        let digest = selection.listing.manifest().unwrap().digest();
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
            "710 opt/new/ (5:6)",
            "710 opt/new/dir/ (5:6)",
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
        let selection = select(what, tree, "the stage", BTreeMap::new()).unwrap();
        let changes = place(selection, what, &below, owner, None, dir.path()).unwrap();
        let file = changes.into_iter().find(|c| c.path.ends_with("f")).unwrap();
        match file.kind {
            ChangeKind::Entry(entry) => (entry.metadata.uid, entry.metadata.gid),
            ChangeKind::Removed => panic!("COPY removes nothing"),
        }
    };
    let mut what = definition(&["d/f"], "/w/");
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
        BTreeMap::new(),
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

/// The tree of BuildKit's own tests of `--parents`.
const PARENTS: [&str; 16] = [
    "755 test/",
    "750 test/a/",
    "700 test/a/b/",
    "755 test/a/b/c/",
    "755 test/a/b/c/d/",
    "755 test/a/b/c/d/e/",
    "644 test/a/b/c/d/e/bay = 1",
    "644 test/a/b/c/d/foo = 1",
    "755 test/a/b/c2/",
    "755 test/a/b/c2/d/",
    "711 test/a/b/c2/d/e/",
    "644 test/a/b/c2/d/e/baz = 1",
    "755 test/a/b2/",
    "755 test/a/b2/c/",
    "777 test/l -> a",
    "644 top = t",
];

fn with_parents(sources: &[&str], destination: &str) -> CopyDefinition {
    CopyDefinition {
        parents: true,
        ..definition(sources, destination)
    }
}

#[test]
fn parents_are_kept() {
    let fixture = fixture(&PARENTS, &["700 out/", "711 out/c/", "644 out/c/old = o"]);
    for (sources, expected) in [
        // Parents have the metadata of the source's; siblings stay behind.
        (
            &["/test/a/b/c/d/foo", "top"][..],
            &[
                "755 to/",
                "755 to/test/",
                "750 to/test/a/",
                "700 to/test/a/b/",
                "755 to/test/a/b/c/",
                "755 to/test/a/b/c/d/",
                "644 to/test/a/b/c/d/foo = 1",
                "644 to/top = t",
            ][..],
        ),
        // What stands before the first pivot is not copied.
        (
            &["test/a/./b/./c/../c2/d/e"],
            &[
                "755 to/",
                "700 to/b/",
                "755 to/b/c2/",
                "755 to/b/c2/d/",
                "711 to/b/c2/d/e/",
                "644 to/b/c2/d/e/baz = 1",
            ],
        ),
        (&["./test/a/b/c/d/./foo"], &["755 to/", "644 to/foo = 1"]),
        // Wildcards, also before the pivot.
        (
            &["test/a/b*/./c*/**/ba?"],
            &[
                "755 to/",
                "755 to/c/",
                "755 to/c/d/",
                "755 to/c/d/e/",
                "644 to/c/d/e/bay = 1",
                "755 to/c2/",
                "755 to/c2/d/",
                "711 to/c2/d/e/",
                "644 to/c2/d/e/baz = 1",
            ],
        ),
        (
            &["**/c", "t*p"],
            &[
                "755 to/",
                "755 to/test/",
                "750 to/test/a/",
                "700 to/test/a/b/",
                "755 to/test/a/b/c/",
                "755 to/test/a/b/c/d/",
                "755 to/test/a/b/c/d/e/",
                "644 to/test/a/b/c/d/e/bay = 1",
                "644 to/test/a/b/c/d/foo = 1",
                "755 to/test/a/b2/",
                "755 to/test/a/b2/c/",
                "644 to/top = t",
            ],
        ),
        // A link before the pivot is followed; behind it, it is copied.
        (
            &["test/l/./b2", "test/./l"],
            &["755 to/", "755 to/b2/", "755 to/b2/c/", "777 to/l -> a"],
        ),
        // Where a wildcard matches nothing, the destination is made all the same.
        (&["test/none*", "*/nothing"], &["755 to/"]),
        (&["none*/./x"], &[]),
    ] {
        fixture.check(&with_parents(sources, "/to/"), expected);
        fixture.check(&with_parents(sources, "/to"), expected);
    }
    // A parent that is there takes the mode and keeps the rest.
    fixture.check(
        &with_parents(&["test/a/b/./c/d/foo"], "/out"),
        &[
            "700 out/",
            "755 out/c/",
            "755 out/c/d/",
            "644 out/c/d/foo = 1",
        ],
    );
    for missing in ["test/none", "test/a/./none", "none/./x*", "test/l/b2"] {
        fixture.fails(
            &with_parents(&[missing], "/to/"),
            &format!("{missing:?} not found in the build context"),
        );
    }
    for root in [".", "/", "test/./", "./"] {
        let error = fixture.lines(&with_parents(&[root], "/to/")).unwrap_err();
        assert!(
            error.starts_with("--parents needs a path"),
            "{root}: {error}"
        );
    }
}

#[test]
fn parents_that_are_there_keep_their_owner() {
    let mut fixture = fixture(&["750 d/", "700 d/e/", "644 d/e/f = f"], &["755 d/"]);
    fixture.owner = Some((5, 6));
    let mut what = with_parents(&["d/e/f"], "/");
    what.chmod = Some(Chmod::Mode(0o640));
    // The mode is the source's, not that of --chmod.
    fixture.check(&what, &["750 d/", "640 d/e/ (5:6)", "640 d/e/f = f (5:6)"]);
    // A directory that is copied, and not only led through, takes all of it.
    what.sources = vec![CopySource::Path("d".to_owned())];
    fixture.check(
        &what,
        &["640 d/ (5:6)", "640 d/e/ (5:6)", "640 d/e/f = f (5:6)"],
    );
}

#[test]
fn excludes_are_relative_to_what_is_copied() {
    let fixture = fixture(
        &[
            "644 a.md = 1",
            "644 a.txt = 2",
            "750 sub/",
            "644 sub/c.md = 3",
            "755 sub/deep/",
            "644 sub/deep/c.txt = 4",
            "644 sub/deep/e.md = 5",
        ],
        &[],
    );
    for (source, excludes, expected) in [
        (
            ".",
            &["*.md", "sub/deep"][..],
            &[
                "755 w/",
                "644 w/a.txt = 2",
                "750 w/sub/",
                "644 w/sub/c.md = 3",
            ][..],
        ),
        (".", &["sub", "*.txt"], &["755 w/", "644 w/a.md = 1"]),
        (
            "./sub",
            &["**/*.md"],
            &["755 w/", "755 w/deep/", "644 w/deep/c.txt = 4"],
        ),
        (
            "sub",
            &["sub/deep", "deep/*.md", "c.md"],
            &["755 w/", "755 w/deep/", "644 w/deep/c.txt = 4"],
        ),
        // Directories that are left out are made for what is taken back in.
        (
            ".",
            &["*", "!sub/deep/*.txt"],
            &[
                "755 w/",
                "750 w/sub/",
                "755 w/sub/deep/",
                "644 w/sub/deep/c.txt = 4",
            ],
        ),
        (".", &["*", "! sub"], &["755 w/"]),
        (
            "*",
            &["deep"],
            &[
                "755 w/",
                "644 w/a.md = 1",
                "644 w/a.txt = 2",
                "644 w/c.md = 3",
            ],
        ),
        // A file that is named is not left out.
        ("a.md", &["*.md"], &["755 w/", "644 w/a.md = 1"]),
        (
            "*",
            &["**"],
            &["755 w/", "644 w/a.md = 1", "644 w/a.txt = 2"],
        ),
    ] {
        let mut what = definition(&[source], "/w/");
        what.excludes = excludes.iter().map(|&text| text.to_owned()).collect();
        fixture.check(&what, expected);
    }
    let mut what = with_parents(&["sub/deep"], "/w/");
    what.excludes = vec!["sub/deep/*.md".to_owned()];
    fixture.check(
        &what,
        &[
            "755 w/",
            "750 w/sub/",
            "755 w/sub/deep/",
            "644 w/sub/deep/c.txt = 4",
        ],
    );
    // What has to be there is not there when it is left out.
    what.excludes = vec!["**/deep".to_owned()];
    fixture.fails(&what, "\"sub/deep\" not found in the build context");
    what.excludes = vec!["a[".to_owned()];
    fixture.fails(
        &what,
        "invalid pattern \"a[\": the class that begins with \"[\" has no end",
    );
}

#[test]
fn wildcards_that_match_nothing_are_told() {
    let fixture = fixture(&CONTEXT, &[]);
    let notes = |sources: &[&str]| fixture.select(&definition(sources, "/w/")).unwrap().notes;
    assert_eq!(notes(&["a", "*"]), [] as [String; 0]);
    assert_eq!(
        notes(&["no*", "a", "d/no?"]),
        [
            "nothing matches \"no*\" in the build context",
            "nothing matches \"d/no?\" in the build context",
        ]
    );
}

#[test]
fn excludes_without_effect_are_told() {
    let fixture = fixture(&["644 a = 1", "755 d/", "644 d/f = 2"], &[]);
    let notes = |sources: &[&str], excludes: &[&str]| {
        let mut what = definition(sources, "/w/");
        what.excludes = excludes.iter().map(|&text| text.to_owned()).collect();
        fixture.select(&what).unwrap().notes
    };
    assert_eq!(notes(&["a", "d"], &["f"]), [""; 0]);
    assert_eq!(
        notes(&["a"], &["a"]),
        ["--exclude leaves nothing out: it is for what is in directories, and no source is one"]
    );
    assert_eq!(
        notes(&["d"], &["/f", "!/d/f"]),
        [
            "--exclude=/f leaves nothing out: patterns are relative to the directory that is copied, as in --exclude=f",
            "--exclude=!/d/f leaves nothing out: patterns are relative to the directory that is copied, as in --exclude=d/f",
        ]
    );
}

#[test]
fn symbolic_modes_change_each_file() {
    let fixture = fixture(
        &["770 d/", "600 d/f = f", "700 d/x = x", "777 l -> d"],
        &["700 old/"],
    );
    let mut what = definition(&["."], "/old/new/");
    what.chmod = Some(Chmod::Symbolic("u=rwX,go=rX".to_owned()));
    // Directories that are made on the way are as always.
    fixture.check(
        &what,
        &[
            "700 old/",
            "755 old/new/",
            "755 old/new/d/",
            "644 old/new/d/f = f",
            "755 old/new/d/x = x",
            "777 old/new/l -> d",
        ],
    );
    what.sources = vec![inline_source("i", "")];
    what.chmod = Some(Chmod::Symbolic("a-w,u+s".to_owned()));
    fixture.check(&what, &["700 old/", "755 old/new/", "4444 old/new/i = "]);
}

#[test]
fn sockets_become_empty_files() {
    let fixture = fixture(&["755 d/"], &[]);
    let path = fixture.context.path().join("d/s");
    let _listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o750)).unwrap();
    let expected = ["755 w/", "750 w/s = "];
    fixture.check(&definition(&["d"], "/w/"), &expected);
    fixture.check(&definition(&["d/s"], "/w/"), &expected);
}

#[test]
fn files_and_directories_in_each_others_place() {
    let fixture = fixture(
        &[
            "755 d/",
            "644 d/x = 1",
            "644 f = 2",
            "755 o/",
            "755 o/f/",
            "755 p/",
            "644 p/link = 3",
        ],
        &[
            "755 to/",
            "600 to/f = old",
            "777 to/link -> f",
            "777 zat -> to/",
        ],
    );
    // Below the destination links are replaced, not followed.
    fixture.check(&definition(&["p"], "/to"), &["755 to/", "644 to/link = 3"]);
    fixture.check(
        &definition(&["p/link"], "/to"),
        &["755 to/", "644 to/link = 3"],
    );
    fixture.check(
        &definition(&["f"], "/to/link"),
        &["755 to/", "644 to/f = 2"],
    );
    fixture.check(&definition(&["f"], "/zat/"), &["755 to/", "644 to/f = 2"]);
    fixture.check(
        &definition(&["d", "f"], "/zat"),
        &["755 to/", "644 to/f = 2", "644 to/x = 1"],
    );
    fixture.check(&definition(&["f", "d/x"], "/new"), &["644 new = 1"]);
    fixture.fails(
        &definition(&["o"], "/to"),
        "cannot copy a directory to \"/to/f\": it, or a parent of it, is there and not a directory",
    );
    fixture.fails(
        &definition(&["f", "d"], "/new"),
        "cannot copy a directory to \"/new\": it, or a parent of it, is there and not a directory",
    );
}

/// A fetched file with this content.
fn fetched(dir: &TempDir, name: &str, content: &[u8]) -> Fetched {
    let path = dir.path().join("fetched");
    std::fs::write(&path, content).unwrap();
    Fetched::File(FetchedFile {
        path,
        name: name.to_owned(),
        mtime: Some(THEN),
        digest: Digest::of(content),
    })
}

#[test]
fn what_was_fetched_is_placed_in_order() {
    let remote = tempfile::tempdir().unwrap();
    let mut fixture = fixture(&["644 a = A"], &["711 etc/"]);
    let mut what = definition(&["a"], "/etc/");
    let url = CopySource::Url {
        url: "http://example.com/x.txt".to_owned(),
        checksum: None,
    };
    what.sources.push(url);
    let place_with = |fixture: &Fixture, what: &CopyDefinition, source: Fetched| {
        let index = what.sources.len() - 1;
        fixture
            .fetched_lines(what, BTreeMap::from([(index, source)]))
            .unwrap()
    };
    let file = |content: &[u8]| fetched(&remote, "x.txt", content);
    let expected = ["711 etc/", "644 etc/a = A", "600 etc/x.txt = X"];
    assert_eq!(place_with(&fixture, &what, file(b"X")), expected);
    // Without a slash the name is the destination's, and the last one wins.
    "/y".clone_into(&mut what.destination);
    assert_eq!(place_with(&fixture, &what, file(b"X")), ["600 y = X"]);
    fixture.owner = Some((5, 6));
    what.chmod = Some(Chmod::Symbolic("+r".to_owned()));
    assert_eq!(place_with(&fixture, &what, file(b"X")), ["644 y = X (5:6)"]);
    // An archive is one only where that is asked for.
    what.sources.remove(0);
    what.unpack = true;
    fixture.owner = None;
    what.chmod = None;
    let tar = archives::tar_of(&["640 in = 1"]);
    let kept = place_with(&fixture, &what, file(&tar));
    assert!(
        kept.len() == 1 && kept[0].starts_with("600 y = "),
        "{kept:?}"
    );
    what.unpack_remote = true;
    assert_eq!(
        place_with(&fixture, &what, file(&tar)),
        ["755 y/", "640 y/in = 1 (9:9)"]
    );
    assert_eq!(place_with(&fixture, &what, file(b"X")), ["600 y = X"]);
    // Nothing was fetched.
    let error = fixture.fetched_lines(&what, BTreeMap::new()).unwrap_err();
    assert!(error.contains("was not fetched"), "{error}");
}

#[test]
fn a_repository_is_copied_as_a_directory() {
    let remote = tempfile::tempdir().unwrap();
    let files = ["644 .hidden = h", "644 README.md = r", "755 run = x"];
    materialize(files.into_iter().map(change), remote.path()).unwrap();
    std::fs::set_permissions(remote.path(), PermissionsExt::from_mode(0o711)).unwrap();
    let mut fixture = fixture(&[], &["750 srv/"]);
    // The context's rules are not the repository's.
    fixture.ignore = "*";
    let mut what = definition(&[], "/new");
    what.excludes = vec!["*.md".to_owned()];
    what.sources = vec![CopySource::Git {
        reference: "https://example.com/x.git".to_owned(),
        checksum: None,
        keep_git_dir: None,
    }];
    for (destination, expected) in [
        // Its root becomes the directory that is made.
        (
            "/new",
            ["711 new/", "644 new/.hidden = h", "755 new/run = x"],
        ),
        (
            "/new/",
            ["755 new/", "644 new/.hidden = h", "755 new/run = x"],
        ),
        (
            "/srv",
            ["750 srv/", "644 srv/.hidden = h", "755 srv/run = x"],
        ),
    ] {
        destination.clone_into(&mut what.destination);
        let source = Fetched::Directory(remote.path().to_owned());
        let lines = fixture.fetched_lines(&what, BTreeMap::from([(0, source)]));
        assert_eq!(lines.unwrap(), expected);
    }
}

#[test]
fn digests_tell_selections_apart() {
    let context = ["755 d/", "644 d/f = f", "644 d/g == d/f", "644 h = f"];
    let fixture = fixture(&context, &[]);
    let plain = definition(&["d"], "/w/");
    let first = fixture.digest(&plain);
    let mut excluding = definition(&["d"], "/w/");
    excluding.excludes = vec!["g".to_owned()];
    assert_ne!(fixture.digest(&excluding), first);
    assert_ne!(fixture.digest(&with_parents(&["d"], "/w/")), first);
    // A directory that is copied, and one that is led through.
    std::fs::remove_file(fixture.context.path().join("d/g")).unwrap();
    let whole = fixture.digest(&with_parents(&["d"], "/w/"));
    assert_ne!(fixture.digest(&with_parents(&["d/f"], "/w/")), whole);
    // Two files are not two names of one.
    std::fs::write(fixture.context.path().join("d/g"), "f").unwrap();
    std::fs::set_permissions(
        fixture.context.path().join("d/g"),
        PermissionsExt::from_mode(0o644),
    )
    .unwrap();
    assert_ne!(fixture.digest(&plain), first);
    // What was fetched has its time from where it came.
    let remote = tempfile::tempdir().unwrap();
    let mut what = definition(&[], "/w");
    what.sources = vec![CopySource::Url {
        url: "http://example.com/x".to_owned(),
        checksum: None,
    }];
    let digest = |mtime| {
        let Fetched::File(file) = fetched(&remote, "x", b"X") else {
            panic!("it is a file");
        };
        let file = Fetched::File(FetchedFile { mtime, ..file });
        let nothing = Arc::new(Stack::new(Vec::new()));
        let fetched = BTreeMap::from([(0, file)]);
        let selection = select(&what, nothing, "nothing", fetched).unwrap();
        selection.listing.manifest().unwrap().digest()
    };
    assert_eq!(digest(Some(THEN)), digest(Some(THEN)));
    assert_ne!(digest(Some(THEN)), digest(None));
}
