//! What is kept, what is removed, and what is found out about a store, over several processes:
//! each `Store` here stands for one, with locks of its own.

use std::time::{Duration, SystemTime};

use super::*;
use crate::image::{DiffId, MediaType};

/// A store with things in it, whose use can be dated.
struct Fixture {
    dir: tempfile::TempDir,
    /// A process that lives as long as this.
    store: Store,
}

/// Times of use, in minutes after an arbitrary beginning.
fn minute(n: u64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_020 + 60 * n)
}

fn diff_id(name: &str) -> DiffId {
    DiffId::from_uncompressed(Digest::of(name.as_bytes()))
}

impl Fixture {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        Self { dir, store }
    }

    /// Another process.
    fn other(&self) -> Store {
        Store::open(self.dir.path()).unwrap()
    }

    /// A blob that was last used at `minute(used)`.
    fn blob(&self, content: &str, used: u64) -> Digest {
        let digest = self.other().put_blob(content.as_bytes()).unwrap();
        set_used(&self.store.blob_path(&digest), used);
        digest
    }

    fn tree(&self, name: &str, used: u64) -> PathBuf {
        let store = self.other();
        let from = store.tmp_dir("tree-").unwrap();
        fs::write(from.join("file"), name).unwrap();
        let path = store.adopt_tree(&from, &diff_id(name)).unwrap();
        set_used(&path.with_file_name("info.json"), used);
        path
    }

    /// A record of a step that made `blob`.
    fn step(&self, name: &str, blob: &Digest, size: u64, used: u64) -> PathBuf {
        let record = serde_json::json!({
            "diff_id": diff_id(name),
            "descriptor": { "mediaType": MediaType::LAYER_GZIP, "digest": blob, "size": size },
            "name": name,
            "inputs": {},
        });
        self.record(self.step_path(name), &record, used)
    }

    fn step_path(&self, name: &str) -> PathBuf {
        let digest = Digest::of(name.as_bytes());
        let definition = self.store.steps_path().join(digest.hex());
        definition.join(format!("{}.json", digest.hex()))
    }

    fn http(&self, url: &str, blob: &Digest, size: u64, used: u64) -> PathBuf {
        let name = format!("{}.json", Digest::of(url.as_bytes()).hex());
        let record = serde_json::json!({ "version": 1, "digest": blob, "size_bytes": size });
        self.record(self.store.http_path().join(name), &record, used)
    }

    fn record(&self, path: PathBuf, record: &serde_json::Value, used: u64) -> PathBuf {
        let bytes = record.to_string().into_bytes();
        self.store.write_file(&path, &bytes).unwrap();
        set_used(&path, used);
        path
    }

    /// A cache mount as a step leaves it.
    fn mount(&self, name: &str, used: u64) -> PathBuf {
        let all = self.store.cache_mounts_path();
        let dir = all.join(Digest::of(name.as_bytes()).hex());
        fs::create_dir_all(dir.join("0/files/sub")).unwrap();
        fs::write(dir.join("name"), name).unwrap();
        fs::write(dir.join("0/lock"), "").unwrap();
        fs::write(dir.join("0/files/sub/f"), vec![0; 5000]).unwrap();
        set_used(&dir.join("0/lock"), used);
        dir.join("0")
    }

    /// Every file and directory of the store, but for what is unfinished.
    fn paths(&self) -> Vec<String> {
        let mut paths = Vec::new();
        let mut left = vec![self.dir.path().to_owned()];
        while let Some(dir) = left.pop() {
            for entry in fs::read_dir(dir).unwrap() {
                let path = entry.unwrap().path();
                let relative = path.strip_prefix(self.dir.path()).unwrap();
                if relative.starts_with("tmp") {
                    continue;
                }
                paths.push(relative.display().to_string());
                if path.is_dir() {
                    left.push(path);
                }
            }
        }
        paths.sort();
        paths
    }

    fn prune(&self, options: &PruneOptions) -> Vec<String> {
        let pruned = self.other().prune(options).unwrap();
        names(&pruned)
    }

    fn verify(&self, repair: bool) -> Vec<(String, String, bool)> {
        let findings = self.other().verify(repair).unwrap();
        let root = self.dir.path();
        let findings = findings.into_iter().map(|finding| {
            let path = finding.path.strip_prefix(root).unwrap();
            (
                path.display().to_string(),
                finding.problem,
                finding.repaired,
            )
        });
        findings.collect()
    }
}

fn set_used(path: &Path, used: u64) {
    let times = fs::FileTimes::new().set_accessed(minute(used));
    File::open(path).unwrap().set_times(times).unwrap();
}

fn names(pruned: &Pruned) -> Vec<String> {
    let names = pruned.removed.iter();
    let names = names.map(|object| format!("{} {}", object.kind.name(), object.id));
    names.collect()
}

fn all() -> PruneOptions {
    PruneOptions {
        all: true,
        ..PruneOptions::default()
    }
}

#[test]
fn everything_that_nobody_uses_is_removed() {
    let fixture = Fixture::new();
    let empty = fixture.paths();
    let blob = fixture.blob("layer", 1);
    fixture.step("RUN a", &blob, 5, 1);
    fixture.tree("RUN a", 1);
    fixture.mount("/cache", 1);
    let file = fixture.blob("file", 1);
    let note = fixture.http("http://h/", &file, 4, 1);

    let objects = fixture.store.objects().unwrap();
    let used = fixture.store.used_bytes().unwrap();
    assert_eq!(used, objects.iter().map(|o| o.bytes).sum::<u64>());
    let told = |kind| {
        let found = objects.iter().find(|object| object.kind == kind).unwrap();
        (found.description.as_str(), found.in_use)
    };
    assert_eq!(told(Kind::Tree), ("RUN a", false));
    assert_eq!(told(Kind::Step), ("RUN a", false));
    assert_eq!(told(Kind::Mount), ("cache", false));

    let mut would = fixture.prune(&PruneOptions {
        dry_run: true,
        ..all()
    });
    assert_eq!(fixture.store.objects().unwrap().len(), objects.len());
    fixture.prune(&PruneOptions::default());
    let left = fixture.store.objects().unwrap();
    assert_eq!(
        left.len(),
        2,
        "files and what servers said about them: {left:?}"
    );
    assert!(note.exists() && fixture.store.blob_path(&file).exists());
    fixture.prune(&all());
    let mut dirs = vec!["cache/http".to_owned(), "cache/mounts".to_owned()];
    dirs.extend(empty);
    dirs.sort();
    assert_eq!(fixture.paths(), dirs);
    assert_eq!(fixture.store.used_bytes().unwrap(), 0);
    would.sort();
    let mut were: Vec<_> = objects
        .iter()
        .map(|o| format!("{} {}", o.kind.name(), o.id))
        .collect();
    were.sort();
    assert_eq!(would, were);
}

#[test]
fn the_least_recently_used_goes_first_and_trees_before_their_blobs() {
    let fixture = Fixture::new();
    let old = fixture.blob("old", 10);
    let new = fixture.blob("new", 20);
    // The tree was used some seconds after its blob, in the same minute.
    let tree = fixture.tree("new tree", 20);
    let info = tree.with_file_name("info.json");
    let later = fs::FileTimes::new().set_accessed(minute(20) + Duration::from_secs(9));
    File::open(&info).unwrap().set_times(later).unwrap();
    let mount = fixture.mount("/m", 5);
    let order = fixture.prune(&PruneOptions {
        dry_run: true,
        ..all()
    });
    let want = [
        format!("mount {}/0", Digest::of(b"/m").hex()),
        format!("blob {}", old.hex()),
        format!("tree {}", diff_id("new tree").digest().hex()),
        format!("blob {}", new.hex()),
    ];
    assert_eq!(order, want);

    let total = fixture.store.used_bytes().unwrap();
    let sized = |max_used_bytes, reserved_bytes| PruneOptions {
        max_used_bytes,
        reserved_bytes,
        ..all()
    };
    assert_eq!(fixture.prune(&sized(Some(total), None)), [""; 0]);
    assert_eq!(fixture.prune(&sized(Some(1), Some(total))), [""; 0]);
    assert_eq!(fixture.prune(&sized(Some(total - 1), None)), want[..1]);
    assert!(!mount.exists());
    let since = |n| PruneOptions {
        unused_since: Some(minute(n)),
        ..all()
    };
    assert_eq!(fixture.prune(&since(10)), [""; 0]);
    assert_eq!(fixture.prune(&since(11)), want[1..2]);
    let only = PruneOptions {
        kinds: [Kind::Blob].into(),
        id: Some(new.hex()[..10].to_owned()),
        ..all()
    };
    assert_eq!(fixture.prune(&only), want[3..]);
    let free = |min_free_bytes| PruneOptions {
        min_free_bytes: Some(min_free_bytes),
        ..all()
    };
    assert_eq!(fixture.prune(&free(1)), [""; 0]);
    assert_eq!(fixture.prune(&free(u64::MAX)), want[2..3]);
}

#[test]
fn what_a_build_has_looked_up_stays_until_it_ends() {
    let fixture = Fixture::new();
    let (looked, opened, unused) = (
        fixture.blob("looked", 1),
        fixture.blob("opened", 1),
        fixture.blob("unused", 1),
    );
    fixture.step("RUN a", &looked, 6, 1);
    let tree = fixture.tree("tree", 1);
    let build = fixture.other();
    // Between the look-up and the use.
    assert!(build.has_blob(&looked));
    drop(build.open_blob(&opened).unwrap());
    let chain = Digest::of(b"chain");
    let found = build.find_tree(&diff_id("tree"), &chain).unwrap();
    assert_eq!(found, Some(tree.clone()));
    let made = build.put_blob(b"made").unwrap();
    assert_eq!(fixture.prune(&all()), [format!("blob {}", unused.hex())]);
    let objects = fixture.store.objects().unwrap();
    assert!(objects.iter().all(|object| object.in_use), "{objects:?}");
    assert!(
        objects
            .iter()
            .all(|object| object.last_used > minute(1) || object.kind == Kind::Step)
    );
    // Its own pruning leaves it too, until it lets go.
    assert_eq!(names(&build.prune(&all()).unwrap()), [""; 0]);
    build.release().unwrap();
    assert_eq!(fixture.prune(&all()).len(), 5);
    assert!(!tree.exists() && !fixture.store.blob_path(&made).exists());
    assert!(!build.has_blob(&made));
    assert_eq!(build.find_tree(&diff_id("tree"), &chain).unwrap(), None);

    // What another process uses between the listing and the removal is not taken for old.
    let blob = fixture.blob("again", 1);
    let listed = fixture.store.objects().unwrap();
    assert!(fixture.other().has_blob(&blob));
    let used = fs::metadata(fixture.store.blob_path(&blob))
        .unwrap()
        .accessed()
        .unwrap();
    assert_ne!(used, listed[0].last_used);
}

#[test]
fn a_mount_whose_owners_are_recorded_is_sound() {
    let fixture = Fixture::new();
    let mount = fixture.mount("/m", 1);
    fs::write(mount.join("files.owners"), "sockless owners 1\n.").unwrap();
    let name = format!("/m{MOUNT_OWNERS_RECORDED}");
    let all = fixture.store.cache_mounts_path();
    let dir = all.join(Digest::of(name.as_bytes()).hex());
    fs::rename(mount.parent().unwrap(), &dir).unwrap();
    assert_eq!(fixture.verify(true), []);
    assert!(dir.join("0/files.owners").exists());
}

#[test]
fn a_mount_in_use_stays() {
    let fixture = Fixture::new();
    let mount = fixture.mount("/m", 1);
    let step = File::open(mount.join("lock")).unwrap();
    step.lock_shared().unwrap();
    assert!(fixture.store.objects().unwrap()[0].in_use);
    assert_eq!(fixture.prune(&all()), [""; 0]);
    drop(step);
    assert_eq!(fixture.prune(&all()).len(), 1);
    assert!(!mount.parent().unwrap().exists(), "its name went too");
    // Whoever was making it was killed.
    fs::create_dir_all(&mount).unwrap();
    assert_eq!(fixture.prune(&all()).len(), 1);
    assert!(!mount.parent().unwrap().exists());
}

#[test]
fn a_blob_takes_its_records_and_records_without_blob_go_first() {
    let fixture = Fixture::new();
    let (old, new) = (fixture.blob("old", 1), fixture.blob("new", 9));
    let records = [
        fixture.step("RUN old", &old, 3, 8),
        fixture.step("RUN new", &new, 3, 9),
        fixture.step("RUN gone", &Digest::of(b"gone"), 4, 10),
    ];
    let total = fixture.store.used_bytes().unwrap();
    let one_byte_less = PruneOptions {
        max_used_bytes: Some(total - 1),
        ..all()
    };
    let removed = fixture.prune(&one_byte_less);
    assert_eq!(removed.len(), 1);
    assert!(!records[2].exists() && !records[2].parent().unwrap().exists());
    let removed = fixture.prune(&PruneOptions {
        unused_since: Some(minute(2)),
        ..all()
    });
    assert_eq!(removed.len(), 2, "{removed:?}");
    assert_eq!(records.map(|path| path.exists()), [false, true, false]);
    assert_eq!(fixture.verify(false), []);
}

#[test]
fn sizes_of_trees_are_remembered() {
    let fixture = Fixture::new();
    let tree = fixture.tree("tree", 3);
    let info = tree.with_file_name("info.json");
    let named = inventory::read_quietly(&info).unwrap();
    assert!(!String::from_utf8(named).unwrap().contains("bytes"));
    let bytes = fixture.store.used_bytes().unwrap();
    let remembered = String::from_utf8(inventory::read_quietly(&info).unwrap()).unwrap();
    assert!(
        remembered.contains(&format!("\"bytes\":{bytes},")),
        "{remembered}"
    );
    let times = fs::metadata(&info).unwrap();
    assert_eq!(times.accessed().unwrap(), minute(3), "measuring is no use");
    // No walk: what is there now is not seen.
    fs::write(tree.join("more"), vec![1; 100_000]).unwrap();
    assert_eq!(fixture.store.used_bytes().unwrap(), bytes);
}

#[test]
fn after_a_restart_only_trees_that_are_surely_on_disk_are_left() {
    let dir = tempfile::tempdir().unwrap();
    let at = |boot: &str, seconds| Moment {
        boot: boot.to_owned(),
        seconds,
    };
    let name = |store: &Store, name: &str, named: Moment| {
        let from = store.tmp_dir("tree-").unwrap();
        let path = store.adopt_tree(&from, &diff_id(name)).unwrap();
        let dir = path.parent().unwrap();
        let info = tree::TreeInfo {
            named,
            ..tree::TreeInfo::read(dir).unwrap()
        };
        store
            .replace_in(dir, "info.json", &info.to_bytes())
            .unwrap();
    };
    // Stores that are dropped would note the real time; these processes die.
    let open = |moment| std::mem::ManuallyDrop::new(Store::open_at(dir.path(), moment).unwrap());
    let trees = || {
        let known = ["early", "late", "settled", "new"].into_iter();
        let is_there = |name: &&str| {
            let hex = diff_id(name).digest().hex().to_owned();
            dir.path().join("trees").join(hex).exists()
        };
        known.filter(is_there).collect::<Vec<_>>()
    };
    let first = open(at("one", 100));
    name(&first, "early", at("one", 100));
    name(&first, "late", at("one", 101));
    assert_eq!(trees(), ["early", "late"]);
    open(at("one", 220));
    // Power loss.
    let second = open(at("two", 5));
    assert_eq!(trees(), ["early"]);
    name(&second, "settled", at("two", 6));
    second.settle().unwrap();
    name(&second, "new", at("two", 7));
    open(at("two", 20));
    assert_eq!(
        trees(),
        ["early", "settled", "new"],
        "in the same boot all stay"
    );
    // Another one, and what was known about the last use is torn.
    fs::write(dir.path().join("boot.json"), "").unwrap();
    let third = open(at("three", 1));
    assert_eq!(trees(), ["early", "settled"]);
    assert_eq!(third.verify(false).unwrap(), []);
}

#[test]
fn a_sound_store_has_no_findings() {
    let fixture = Fixture::new();
    assert_eq!(fixture.verify(false), []);
    let blob = fixture.blob("layer", 1);
    fixture.step("RUN a", &blob, 5, 1);
    fixture.http("http://h/", &blob, 5, 1);
    fixture.tree("RUN a", 1);
    fixture.mount("/cache", 1);
    fs::create_dir_all(
        fixture
            .store
            .cache_mounts_path()
            .join(Digest::of(b"x").hex())
            .join("0"),
    )
    .unwrap();
    fs::write(fixture.store.jobs_path().join("jobs.sqlite"), "").unwrap();
    let used = fixture.store.used_bytes().unwrap();
    assert_eq!(fixture.verify(false), []);
    assert_eq!(fixture.verify(true), []);
    assert_eq!(fixture.store.used_bytes().unwrap(), used);
    let blob = fs::metadata(fixture.store.blob_path(&blob)).unwrap();
    assert_eq!(blob.accessed().unwrap(), minute(1), "verifying is no use");
}

#[test]
fn whatever_is_damaged_is_found_and_repaired() {
    #[track_caller]
    fn check(damage: impl Fn(&Fixture) -> PathBuf, problem: &str) {
        let fixture = Fixture::new();
        let blob = fixture.blob("layer", 1);
        fixture.step("RUN a", &blob, 5, 1);
        fixture.tree("RUN a", 1);
        fixture.mount("/cache", 1);
        fixture.store.used_bytes().unwrap();
        assert_eq!(fixture.verify(false), []);
        let path = damage(&fixture);
        let path = path.strip_prefix(fixture.dir.path()).unwrap();
        let finding = |repaired| (path.display().to_string(), problem.to_owned(), repaired);
        let found = fixture.verify(false);
        assert!(found.contains(&finding(false)), "{problem}: {found:?}");
        let repaired = fixture.verify(true);
        assert!(repaired.contains(&finding(true)), "{problem}: {repaired:?}");
        // A record may be of no use only when its damaged blob is gone.
        fixture.verify(true);
        assert_eq!(fixture.verify(false), [], "{problem}");
    }
    let blob = Digest::of(b"layer");
    let tree = |fixture: &Fixture| fixture.store.tree_path(&diff_id("RUN a"));
    check(
        |fixture| {
            let path = fixture.store.blob_path(&blob);
            fs::write(&path, "layeX").unwrap();
            path
        },
        &format!(
            "the blob is damaged: the digest of its bytes is {}",
            Digest::of(b"layeX")
        ),
    );
    check(
        |fixture| {
            fs::remove_file(fixture.store.blob_path(&blob)).unwrap();
            fixture.step_path("RUN a")
        },
        &format!("it names the blob {blob}, which is not here"),
    );
    check(
        |fixture| {
            fs::write(fixture.step_path("RUN a"), "{\"name\":").unwrap();
            fixture.step_path("RUN a")
        },
        "the record cannot be read: it is torn or of no known form",
    );
    check(
        |fixture| {
            fs::write(tree(fixture).join("file"), "RUN").unwrap();
            tree(fixture).parent().unwrap().to_owned()
        },
        "the tree is not what it was: it has 2 files with 3 bytes, and had 2 with 5",
    );
    check(
        |fixture| {
            fs::write(tree(fixture).with_file_name("info.json"), "").unwrap();
            tree(fixture).parent().unwrap().to_owned()
        },
        "what info.json says about the tree cannot be read",
    );
    check(
        |fixture| {
            let chained = fixture.store.chained_tree_path(&blob);
            let chained = chained.parent().unwrap();
            fs::rename(tree(fixture).parent().unwrap(), chained).unwrap();
            chained.to_owned()
        },
        &format!(
            "the tree is {:?}, going by its info.json",
            diff_id("RUN a").digest().hex()
        ),
    );
    for path in [
        "blobs/sha256/x",
        "trees/x",
        "cache/steps/x",
        "cache/mounts/x",
        "cache/http/x",
    ] {
        check(
            |fixture| {
                let path = fixture.dir.path().join(path);
                fs::create_dir_all(path.join("below")).unwrap();
                path
            },
            "it does not belong here",
        );
    }
}

#[test]
fn the_side_file_of_a_tree_is_put_right_and_foreign_files_are_left() {
    let fixture = Fixture::new();
    let tree = fixture.tree("tree", 1);
    let bytes = fixture.store.used_bytes().unwrap();
    let dir = tree.parent().unwrap();
    let info = tree::TreeInfo::read(dir).unwrap();
    let size = info.size.map(|size| size::Size {
        bytes: 1 << 30,
        ..size
    });
    let wrong = tree::TreeInfo {
        size,
        ..info.clone()
    };
    fixture
        .store
        .replace_in(dir, "info.json", &wrong.to_bytes())
        .unwrap();
    let problem = format!("the tree takes {bytes} bytes on disk, and info.json says 1073741824");
    let finding = |repaired| {
        let path = dir.strip_prefix(fixture.dir.path()).unwrap();
        (path.display().to_string(), problem.clone(), repaired)
    };
    assert_eq!(fixture.verify(false), [finding(false)]);
    assert_eq!(fixture.verify(true), [finding(true)]);
    assert_eq!(tree::TreeInfo::read(dir).unwrap().size, info.size);

    // Somebody's home directory is no store, whatever was said once.
    fs::write(fixture.dir.path().join("thesis"), "x").unwrap();
    let finding = (
        "thesis".to_owned(),
        "it does not belong here".to_owned(),
        false,
    );
    assert_eq!(fixture.verify(true), [finding]);
    assert!(fixture.dir.path().join("thesis").exists());
}

#[test]
fn another_version_and_no_store_are_left_as_they_are() {
    let dir = tempfile::tempdir().unwrap();
    assert!(Store::open_existing(dir.path()).unwrap().is_none());
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    fs::write(dir.path().join("version"), "99\n").unwrap();
    for refused in [
        Store::open(dir.path()).map(drop),
        Store::open_existing(dir.path()).map(drop),
    ] {
        let error = refused.unwrap_err();
        assert!(
            matches!(error, StoreError::Version { ref found, .. } if found == "99"),
            "{error}"
        );
    }
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[test]
fn the_holds_of_a_dead_process_are_removed() {
    let fixture = Fixture::new();
    let blob = fixture.blob("x", 1);
    let dead = fixture.dir.path().join("tmp/build-dead.holds");
    fs::write(&dead, format!("blob {}\n", blob.hex())).unwrap();
    drop(fixture.other());
    assert!(!dead.exists());
    fs::write(&dead, format!("blob {}\n", blob.hex())).unwrap();
    assert_eq!(fixture.prune(&all()).len(), 1, "it holds nothing");
}

#[test]
fn a_dead_process_leaves_nothing_and_a_live_one_keeps_its_things() {
    let dir = tempfile::tempdir().unwrap();
    let live = Store::open(dir.path()).unwrap();
    fs::write(live.tmp().join("half"), "x").unwrap();
    let dead = dir.path().join("tmp/build-dead");
    fs::create_dir_all(dead.join("sub")).unwrap();

    let second = Store::open(dir.path()).unwrap();
    assert!(!dead.exists());
    assert!(live.tmp().join("half").exists());
    let tmp = live.tmp().to_owned();
    drop(live);
    assert!(!tmp.exists());
    drop(second);
    assert_eq!(fs::read_dir(dir.path().join("tmp")).unwrap().count(), 0);
}

#[test]
fn the_first_of_two_identical_trees_stays() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let diff_id = diff_id("layer");
    for name in ["first", "second"] {
        let tree = store.tmp_dir("tree-").unwrap();
        fs::write(tree.join(name), "").unwrap();
        assert_eq!(
            store.adopt_tree(&tree, &diff_id).unwrap(),
            store.tree_path(&diff_id)
        );
    }
    assert!(store.tree_path(&diff_id).join("first").exists());
    assert!(!store.tree_path(&diff_id).join("second").exists());
}
