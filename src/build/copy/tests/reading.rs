//! What COPY reads, how often, and under which digest it is kept.

use std::io::Read as _;
use std::os::unix::fs::MetadataExt as _;
use std::sync::Mutex;
use std::time::{Duration, SystemTime};

use super::*;
use crate::build::content::{ContentManifest, Kind};
use crate::build::stat_cache::{FileState, StatCache};
use crate::image::Digest;
use crate::store::Store;

type Hook = Box<dyn FnMut(&Path) + Send>;

/// A context that notes what is opened, may be changed just before, and whose clock may be
/// another than that of its files.
struct Watched {
    inner: ContextTree,
    cache: Arc<StatCache>,
    opened: Mutex<Vec<PathBuf>>,
    before_open: Mutex<Option<Hook>>,
    /// How many seconds the clock is ahead when files are hashed.
    ahead_seconds: i64,
}

impl SourceTree for Watched {
    fn lookup(&self, path: &Path, follow_last: bool) -> io::Result<Option<SourceNode>> {
        self.inner.lookup(path, follow_last)
    }

    fn read_dir(&self, path: &Path) -> io::Result<Vec<(OsString, SourceNode)>> {
        self.inner.read_dir(path)
    }

    fn open(&self, path: &Path) -> io::Result<File> {
        self.opened.lock().unwrap().push(path.to_owned());
        if let Some(hook) = &mut *self.before_open.lock().unwrap() {
            hook(path);
        }
        self.inner.open(path)
    }

    fn read_link(&self, path: &Path) -> io::Result<OsString> {
        self.inner.read_link(path)
    }

    fn xattrs(&self, path: &Path) -> io::Result<BTreeMap<OsString, Vec<u8>>> {
        self.inner.xattrs(path)
    }

    fn digest(&self, node: &SourceNode) -> Option<Digest> {
        self.inner.digest(node)
    }

    fn learn(&self, state: &FileState, digest: &Digest, since: Time) {
        let seconds = since.seconds + self.ahead_seconds;
        self.cache.learn(state, digest, Time { seconds, ..since });
    }
}

/// A context and a store, for several builds one after the other.
struct Builds {
    context: TempDir,
    _root: TempDir,
    store: Store,
    ahead_seconds: i64,
}

/// One build's view.
struct Build {
    tree: Arc<Watched>,
    selection: Selection,
    spool: TempDir,
    what: CopyDefinition,
}

fn builds(lines: &[&str]) -> Builds {
    let context = tempfile::tempdir().unwrap();
    materialize(lines.iter().map(|line| change(line)), context.path()).unwrap();
    let root = tempfile::tempdir().unwrap();
    let store = Store::open(root.path()).unwrap();
    Builds {
        context,
        _root: root,
        store,
        // Files that were made just now are old enough.
        ahead_seconds: 3600,
    }
}

impl Builds {
    fn begin(&self, what: &CopyDefinition) -> Build {
        let context = BuildContext::directory(self.context.path(), IgnoreRules::default()).unwrap();
        let cache = StatCache::open(&self.store, self.context.path(), &context)
            .expect("tests run where there are stat caches");
        let cache = Arc::new(cache);
        let tree = Arc::new(Watched {
            inner: ContextTree::with_cache(Arc::new(context), Arc::clone(&cache)),
            cache,
            opened: Mutex::default(),
            before_open: Mutex::default(),
            ahead_seconds: self.ahead_seconds,
        });
        let selection = select(what, tree.clone(), "the build context", BTreeMap::new()).unwrap();
        Build {
            tree,
            selection,
            spool: tempfile::tempdir().unwrap(),
            what: what.clone(),
        }
    }

    /// The content key found ahead, and which files were opened for it.
    fn ahead(&self, what: &CopyDefinition) -> (Digest, Vec<PathBuf>) {
        let build = self.begin(what);
        let manifest = build.selection.listing.manifest().unwrap();
        build.tree.cache.save(&self.store).unwrap();
        (manifest.digest(), build.opened())
    }

    fn path(&self, path: &str) -> PathBuf {
        self.context.path().join(path)
    }

    fn state(&self, path: &str) -> FileState {
        FileState::of(File::open(self.path(path)).unwrap()).unwrap()
    }

    /// Replaces a file's content, until the file system's clock has moved on, and puts its
    /// modification time back.
    fn change_unseen(&self, path: &str, content: &str) {
        let path = self.path(path);
        let before = std::fs::metadata(&path).unwrap();
        loop {
            std::fs::write(&path, content).unwrap();
            let file = File::options().append(true).open(&path).unwrap();
            file.set_modified(before.modified().unwrap()).unwrap();
            let now = std::fs::metadata(&path).unwrap();
            assert_eq!((now.len(), now.mtime()), (before.len(), before.mtime()));
            if (now.ctime(), now.ctime_nsec()) != (before.ctime(), before.ctime_nsec()) {
                return;
            }
        }
    }
}

impl Build {
    fn opened(&self) -> Vec<PathBuf> {
        let mut opened = std::mem::take(&mut *self.tree.opened.lock().unwrap());
        opened.sort();
        opened
    }

    /// Copies everything: what each file in the layer is, and what the step is recorded with.
    fn copy(
        self,
    ) -> (
        BTreeMap<String, String>,
        Option<ContentManifest>,
        Arc<Watched>,
    ) {
        let listing = Arc::clone(&self.selection.listing);
        let below = Stack::new(Vec::new());
        let spool = self.spool.path();
        let changes = place(self.selection, &self.what, &below, None, None, spool).unwrap();
        let mut layer = BTreeMap::new();
        for change in changes {
            let path = change.path.to_str().unwrap().to_owned();
            if let ChangeKind::Entry(entry) = change.kind
                && let Data::File(content) = entry.data
            {
                let mut text = String::new();
                let mut reader = content.source.reader().unwrap();
                reader.read_to_string(&mut text).unwrap();
                layer.insert(path, text);
            }
        }
        (layer, listing.copied().unwrap(), self.tree)
    }
}

/// The digests of the files in a manifest, in order.
fn files(manifest: &ContentManifest) -> Vec<Digest> {
    let entries = manifest.sources.iter().flat_map(|source| &source.entries);
    let digests = entries.filter_map(|entry| match &entry.kind {
        Kind::File(digest) | Kind::Archive(digest) => Some(digest.clone()),
        _ => None,
    });
    digests.collect()
}

fn digests(texts: &[&str]) -> Vec<Digest> {
    texts
        .iter()
        .map(|text| Digest::of(text.as_bytes()))
        .collect()
}

#[test]
fn a_first_build_reads_each_file_once_and_a_second_none() {
    let mut lines: Vec<String> = (0..200)
        .map(|number| format!("644 d/f{number:03} = content of {number}"))
        .collect();
    lines.insert(0, "755 d/".to_owned());
    // Larger than what is read ahead, and nothing at all.
    lines.push(format!("644 d/large = {}", "large ".repeat(100_000)));
    lines.push("644 d/nothing = ".to_owned());
    let lines: Vec<&str> = lines.iter().map(String::as_str).collect();
    let builds = builds(&lines);
    let what = definition(&["d"], "/to/");
    let first = builds.begin(&what);
    assert_eq!(first.opened(), [] as [&Path; 0], "nothing is read ahead");
    let (layer, manifest, tree) = first.copy();
    let manifest = manifest.unwrap();
    let mut opened = std::mem::take(&mut *tree.opened.lock().unwrap());
    opened.sort();
    let all: Vec<PathBuf> = layer
        .keys()
        .map(|path| path.replacen("to/", "d/", 1).into())
        .collect();
    assert_eq!((opened, all.len()), (all, 202));
    let copied: Vec<Digest> = layer
        .values()
        .map(|text| Digest::of(text.as_bytes()))
        .collect();
    assert_eq!(files(&manifest), copied);
    tree.cache.save(&builds.store).unwrap();

    let (key, opened) = builds.ahead(&what);
    assert_eq!((key, opened), (manifest.digest(), vec![]));
    // Without the cache they are all read, on several threads, and give the same.
    std::fs::remove_dir_all(builds.store.stat_cache_path()).unwrap();
    let (key, opened) = builds.ahead(&what);
    assert_eq!((key, opened.len()), (manifest.digest(), 202));
}

#[test]
fn a_change_is_seen_though_size_and_time_are_as_they_were() {
    let builds = builds(&["644 a = 1", "644 b = 1"]);
    let what = definition(&["a", "b"], "/");
    let (first, opened) = builds.ahead(&what);
    assert_eq!(opened, [Path::new("a"), Path::new("b")]);
    builds.change_unseen("a", "2");
    let (second, opened) = builds.ahead(&what);
    assert_ne!(second, first);
    assert_eq!(opened, [Path::new("a")]);
    // A file that was put in its place is another one, and the old content is the old key.
    std::fs::write(builds.path("new"), "1").unwrap();
    std::fs::set_permissions(builds.path("new"), PermissionsExt::from_mode(0o644)).unwrap();
    std::fs::rename(builds.path("new"), builds.path("a")).unwrap();
    let (third, opened) = builds.ahead(&what);
    assert_eq!((third, opened), (first, vec![PathBuf::from("a")]));
}

#[test]
fn changes_in_quick_succession_are_seen() {
    let mut builds = builds(&["644 a = 00"]);
    // With the right clock.
    builds.ahead_seconds = 0;
    let what = definition(&["a"], "/");
    for number in 10..60 {
        std::fs::write(builds.path("a"), number.to_string()).unwrap();
        let build = builds.begin(&what);
        let manifest = build.selection.listing.manifest().unwrap();
        build.tree.cache.save(&builds.store).unwrap();
        assert_eq!(files(&manifest), digests(&[&number.to_string()]));
    }
}

#[test]
fn files_from_the_future_are_read_every_time() {
    let mut builds = builds(&["644 a = A"]);
    builds.ahead_seconds = 0;
    let file = File::options().append(true).open(builds.path("a")).unwrap();
    file.set_modified(SystemTime::now() + Duration::from_secs(3600))
        .unwrap();
    let what = definition(&["a"], "/");
    for _ in 0..3 {
        assert_eq!(builds.ahead(&what).1, [Path::new("a")]);
    }
    // This machine's clock was set back since the file changed.
    file.set_modified(SystemTime::UNIX_EPOCH).unwrap();
    builds.ahead_seconds = -3600;
    for _ in 0..3 {
        assert_eq!(builds.ahead(&what).1, [Path::new("a")]);
    }
    builds.ahead_seconds = 3600;
    assert_eq!(builds.ahead(&what).1, [Path::new("a")]);
    assert_eq!(builds.ahead(&what).1, [] as [&Path; 0]);
}

#[test]
fn what_is_recorded_is_what_was_copied() {
    let builds = builds(&["644 a = before", "644 b = b"]);
    let what = definition(&["a", "b"], "/to/");
    let build = builds.begin(&what);
    // Looked up with what was there, which was not in the cache.
    let ahead = build.selection.listing.manifest().unwrap();
    assert_eq!(files(&ahead), digests(&["before", "b"]));
    // Changed when it is about to be copied, to something as long.
    let path = builds.path("a");
    *build.tree.before_open.lock().unwrap() = Some(Box::new(move |opened| {
        if opened == Path::new("a") {
            std::fs::write(&path, "behind").unwrap();
        }
    }));
    let (layer, copied, _) = build.copy();
    assert_eq!(layer["to/a"], "behind");
    assert_eq!(files(&copied.unwrap()), digests(&["behind", "b"]));
}

#[test]
fn a_file_that_changes_while_it_is_read_is_not_kept() {
    let builds = builds(&[&format!("644 a = {}", "1".repeat(400_000))]);
    let build = builds.begin(&definition(&["a"], "/"));
    let listing = Arc::clone(&build.selection.listing);
    let mut file = listing.open(0).unwrap();
    let mut bytes = vec![0; 100_000];
    file.read_exact(&mut bytes).unwrap();
    builds.change_unseen("a", &"2".repeat(400_000));
    file.read_to_end(&mut bytes).unwrap();
    assert_eq!(bytes.len(), 400_000);
    assert!(bytes[0] == b'1' && bytes[399_999] == b'2');
    // The record is of these bytes, which the file never was.
    assert_eq!(
        files(&listing.copied().unwrap().unwrap()),
        [Digest::of(&bytes)]
    );
    build.tree.cache.save(&builds.store).unwrap();
    let (_, opened) = builds.ahead(&definition(&["a"], "/"));
    assert_eq!(opened, [Path::new("a")]);
    let cache = builds.begin(&definition(&["a"], "/")).tree;
    let known = cache.cache.get(&builds.state("a"));
    assert_eq!(known, Some(Digest::of("2".repeat(400_000).as_bytes())));
}

#[test]
fn a_file_that_grows_or_shrinks_is_recorded_nowhere() {
    for content in ["longer than before", "x"] {
        let builds = builds(&["644 a = before"]);
        let build = builds.begin(&definition(&["a"], "/"));
        let listing = Arc::clone(&build.selection.listing);
        std::fs::write(builds.path("a"), content).unwrap();
        let mut bytes = Vec::new();
        let node = &build.tree.lookup(Path::new("a"), false).unwrap().unwrap();
        let mut file = listing.open_whole(Some(0), node).unwrap();
        file.read_to_end(&mut bytes).unwrap();
        drop(file);
        assert_eq!(bytes, content.as_bytes());
        assert_eq!(listing.copied().unwrap(), None, "{content}");
    }
}

#[test]
fn what_is_not_in_the_layer_counts_too() {
    // The second file takes the place of the first.
    let builds = builds(&["644 a = A", "644 b = B"]);
    let build = builds.begin(&definition(&["a", "b"], "/new"));
    let (layer, copied, tree) = build.copy();
    assert_eq!(layer, BTreeMap::from([("new".to_owned(), "B".to_owned())]));
    assert_eq!(files(&copied.unwrap()), digests(&["A", "B"]));
    assert_eq!(tree.opened.lock().unwrap().len(), 2);
}

#[test]
fn all_of_an_archive_is_hashed() {
    let mut archive = archives::tar_of(&["644 f = x"]);
    archive.extend(b"not read by who unpacks it");
    let builds = builds(&[]);
    std::fs::write(builds.path("t.tar"), &archive).unwrap();
    let mut what = definition(&["t.tar"], "/");
    what.unpack = true;
    let (layer, copied, _) = builds.begin(&what).copy();
    assert_eq!(layer, BTreeMap::from([("f".to_owned(), "x".to_owned())]));
    assert_eq!(files(&copied.unwrap()), [Digest::of(&archive)]);
}

#[test]
fn names_of_one_file_are_read_once() {
    let builds = builds(&["755 d/", "644 d/a = x", "644 d/b == d/a", "644 d/c == d/a"]);
    let (layer, copied, tree) = builds.begin(&definition(&["d"], "/")).copy();
    assert_eq!(layer, BTreeMap::from([("a".to_owned(), "x".to_owned())]));
    assert_eq!(files(&copied.unwrap()), digests(&["x"]));
    assert_eq!(*tree.opened.lock().unwrap(), [Path::new("d/a")]);
}

#[test]
fn a_file_that_cannot_be_read_fails_where_it_is_needed() {
    let lines: Vec<String> = (0..50).map(|n| format!("644 f{n:02} = x")).collect();
    let lines: Vec<&str> = lines.iter().map(String::as_str).collect();
    let builds = builds(&lines);
    let build = builds.begin(&definition(&["."], "/"));
    std::fs::remove_file(builds.path("f20")).unwrap();
    let below = Stack::new(Vec::new());
    let listing = Arc::clone(&build.selection.listing);
    let spool = build.spool.path();
    let changes = place(build.selection, &build.what, &below, None, None, spool).unwrap();
    let mut failed = Vec::new();
    for change in changes {
        let ChangeKind::Entry(Entry {
            data: Data::File(content),
            ..
        }) = change.kind
        else {
            panic!("there are only files");
        };
        if let Err(error) = content.source.reader() {
            failed.push((change.path, error.kind()));
        }
    }
    assert_eq!(failed, [("f20".into(), io::ErrorKind::NotFound)]);
    let error = listing.copied().unwrap_err();
    assert_eq!(error.to_string(), "reading \"f20\" of the build context");
    // Nobody reads the rest: the thread that reads ahead ends with the list.
}
