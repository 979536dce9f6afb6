//! Laws that bind both directions, and comparisons with GNU tar.

use std::num::NonZeroUsize;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use super::testing::{all_well, apply_bytes, describe, is_real_root, tar_of, walk};
use super::{
    AppliedLayer, Compression, Limits, Pool, SealOptions, SealedLayer, Watch, apply, seal,
    seal_and_apply,
};
use crate::image::{DiffId, Digest, MediaType};
use crate::rootfs::{Change, ChangeKind, Data, Entry, FileContent, FileSource, Metadata, Time};
use crate::store::Store;

fn metadata(mode: u32, uid: u32, seconds: i64, xattrs: &[(&str, &[u8])]) -> Metadata {
    Metadata {
        mode,
        uid,
        gid: uid / 2,
        mtime: Time {
            seconds,
            nanoseconds: 0,
        },
        xattrs: xattrs
            .iter()
            .map(|(name, value)| ((*name).into(), value.to_vec()))
            .collect(),
    }
}

fn entry(path: impl Into<PathBuf>, metadata: Metadata, data: Data) -> Change {
    Change {
        path: path.into(),
        kind: ChangeKind::Entry(Entry { metadata, data }),
    }
}

fn file(bytes: &[u8]) -> Data {
    Data::File(FileContent {
        size_bytes: bytes.len() as u64,
        source: FileSource::Bytes(Arc::from(bytes)),
    })
}

fn removed(path: impl Into<PathBuf>) -> Change {
    Change {
        path: path.into(),
        kind: ChangeKind::Removed,
    }
}

/// Everything that a layer can hold.
fn everything() -> Vec<Change> {
    let directory = |opaque| Data::Directory { opaque };
    let plain = |mode| metadata(mode, 0, 1_500_000_000, &[]);
    // cap_net_raw+ep, version 2.
    let capability =
        b"\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00";
    let binary = b"12 a=b\n\0\xff\n";
    let long = "n".repeat(200);
    let deep = format!("{}/{}", "d".repeat(90), "e".repeat(90));
    let mut changes = vec![
        entry("dev", plain(0o755), directory(false)),
        entry(
            "dev/block",
            plain(0o660),
            Data::BlockDevice {
                major: 8,
                minor: 1_000_000,
            },
        ),
        entry(
            "dev/null",
            plain(0o666),
            Data::CharDevice { major: 1, minor: 3 },
        ),
        entry("dev/pipe", metadata(0o640, 7, 1, &[]), Data::Fifo),
        entry("d".repeat(90), plain(0o755), directory(false)),
        entry(deep.clone(), plain(0o1777), directory(true)),
        entry(
            format!("{deep}/file"),
            plain(0o644),
            file(b"split by ustar"),
        ),
        entry(
            "etc",
            metadata(0o2775, 3_000_000, 0, &[("user.x", binary)]),
            directory(true),
        ),
        entry(
            "etc/closed",
            metadata(0, 65_534, 86_400, &[]),
            directory(false),
        ),
        removed("etc/closed/gone"),
        entry("etc/empty", plain(0o600), file(b"")),
        entry(
            "etc/file",
            metadata(
                0o4755,
                1000,
                -5,
                &[("security.capability", capability), ("user.empty", b"")],
            ),
            file(&[7; 300_000]),
        ),
        entry(
            "etc/hard",
            metadata(
                0o4755,
                1000,
                -5,
                &[("security.capability", capability), ("user.empty", b"")],
            ),
            Data::Hardlink("etc/file".into()),
        ),
        entry(
            "etc/link",
            metadata(0o777, 1000, 5, &[]),
            Data::Symlink("../../../../outside".into()),
        ),
        entry(
            "etc/link.hard",
            metadata(0o777, 1000, 5, &[]),
            Data::Hardlink("etc/link".into()),
        ),
        entry("etc/new\nline = \"x\"", plain(0o644), file(b"x")),
        entry(
            PathBuf::from(std::ffi::OsString::from_vec(b"etc/\xff\xfe".to_vec())),
            plain(0o644),
            file(b"not UTF-8"),
        ),
        removed("gone"),
        entry(long.clone(), plain(0o644), file(&[b'l'; 512])),
        entry(
            format!("{long}x"),
            plain(0o644),
            Data::Hardlink(long.clone().into()),
        ),
        entry(
            format!("{long}y"),
            plain(0o777),
            Data::Symlink("t".repeat(300).into()),
        ),
        entry("süß", plain(0o644), file("ä".as_bytes())),
        removed("süß.weg"),
        entry(
            "z-far-future",
            metadata(0o644, 0, 20_000_000_000, &[]),
            file(b""),
        ),
    ];
    changes.sort_by(|a, b| crate::rootfs::order(&a.path, &b.path));
    changes
}

/// The file system's idea of times is narrower than the archive's in one entry.
fn clamp_times(lines: Vec<String>) -> Vec<String> {
    lines
        .into_iter()
        .filter(|line| !line.starts_with("z-far-future"))
        .collect()
}

#[test]
fn security_s03_what_is_written_and_applied_is_the_same() {
    if !is_real_root() {
        return;
    }
    let bytes = tar_of(everything());
    let dir = tempfile::tempdir().unwrap();
    let applied = apply_bytes(&bytes, dir.path(), &Limits::default()).unwrap();
    assert_eq!(applied.uncompressed_bytes, bytes.len() as u64);
    assert_eq!(applied.skipped_devices, []);
    assert_eq!(applied.skipped_xattrs, []);
    assert_eq!(applied.implied_directories, [] as [PathBuf; 0]);
    let want: Vec<String> = clamp_times(describe(everything()));
    let got = clamp_times(describe(walk(dir.path())));
    for (got, want) in got.iter().zip(&want) {
        assert_eq!(got, want);
    }
    assert_eq!(got.len(), want.len());
    let root = dir.path().metadata().unwrap();
    assert_eq!((root.mode() & 0o7777, root.mtime()), (0o755, 0));

    // And once more from the tree: the bytes are stable.
    let without_far_future = everything()
        .into_iter()
        .filter(|c| c.path != Path::new("z-far-future"));
    let again = walk(dir.path())
        .into_iter()
        .filter(|c| c.path != Path::new("z-far-future"));
    assert_eq!(
        Digest::of(&tar_of(again.collect())),
        Digest::of(&tar_of(without_far_future.collect()))
    );
}

fn seal_in(pool: &Pool, options: &SealOptions, store: &Store) -> SealedLayer {
    let watch = Watch {
        is_stopped: &|| false,
        follow: Box::new(drop),
    };
    seal(all_well(everything()), options, pool, watch, store).unwrap()
}

#[test]
fn sealing_that_is_stopped_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let pool = Pool::new(NonZeroUsize::MIN).unwrap();
    // In the middle of a file that has no end in sight.
    let endless = || {
        let open = || std::fs::File::open("/dev/zero");
        Data::File(FileContent {
            size_bytes: u64::MAX >> 1,
            source: FileSource::Open(Box::new(open)),
        })
    };
    for compression in [Compression::GZIP, Compression::ZSTD, Compression::None] {
        let options = SealOptions {
            epoch: None,
            compression,
        };
        let asked = std::sync::atomic::AtomicU32::new(0);
        let is_stopped = || asked.fetch_add(1, std::sync::atomic::Ordering::Relaxed) > 40;
        let mut growing = None;
        let watch = Watch {
            is_stopped: &is_stopped,
            follow: Box::new(|blob| growing = Some(blob)),
        };
        let changes = vec![entry("endless", metadata(0o644, 0, 0, &[]), endless())];
        let error = seal(all_well(changes), &options, &pool, watch, &store).unwrap_err();
        assert_eq!(
            format!("{:#}", anyhow::Error::new(error)),
            "writing the layer: stopped"
        );
        let growing = growing.unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap();
        assert!(runtime.block_on(growing.completed()).is_err());
        assert_eq!(std::fs::read_dir(store.tmp()).unwrap().count(), 0);
        assert_eq!(
            std::fs::read_dir(dir.path().join("blobs/sha256"))
                .unwrap()
                .count(),
            0
        );
    }
}

#[test]
fn a_tree_that_is_made_while_sealing_is_what_the_blob_holds() {
    if !is_real_root() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(&dir.path().join("store")).unwrap();
    let pool = Pool::new(NonZeroUsize::MIN).unwrap();
    let options = SealOptions::default();
    let watch = || Watch {
        is_stopped: &|| false,
        follow: Box::new(drop),
    };
    let changes = || {
        let mut all = everything();
        let directory = Data::Directory { opaque: false };
        all.push(entry("zz", metadata(0o755, 0, 0, &[]), directory));
        // More than what waits between the two.
        all.extend((0..2000_u32).map(|n| {
            let path = format!("zz/{n:04}");
            entry(path, metadata(0o644, n, 0, &[]), file(&[n as u8; 5000]))
        }));
        all_well(all)
    };
    let want = seal(changes(), &options, &pool, watch(), &store).unwrap();
    let trees = [dir.path().join("beside"), dir.path().join("after")];
    for tree in &trees {
        std::fs::create_dir(tree).unwrap();
    }
    let (got, applied) =
        seal_and_apply(changes(), &options, &pool, watch(), &store, &trees[0]).unwrap();
    assert_eq!(got, want);
    let blob = store.open_blob(&want.descriptor.digest).unwrap();
    let again = apply(
        blob,
        &MediaType::LAYER_GZIP,
        &want.diff_id,
        &trees[1],
        &Limits::default(),
    );
    // Where the archive ends is not told by who only reads up to there.
    let uncompressed_bytes = want.uncompressed_bytes;
    let applied = applied.unwrap();
    assert_eq!(
        AppliedLayer {
            uncompressed_bytes,
            ..applied
        },
        again.unwrap()
    );
    let [beside, after] = trees.map(|tree| describe(walk(&tree)));
    assert!(beside.len() > 2000);
    assert_eq!(beside, after);

    // What hinders the tree does not hinder the layer.
    let tree = dir.path().join("missing");
    let (got, applied) =
        seal_and_apply(changes(), &options, &pool, watch(), &store, &tree).unwrap();
    assert_eq!(got, want);
    let error = applied.unwrap_err().to_string();
    assert!(error.starts_with("opening the tree"), "{error}");
}

#[test]
fn sealing_is_reproducible_and_what_is_sealed_applies() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(&dir.path().join("store")).unwrap();
    let mut diff_ids = Vec::new();
    for (compression, media_type) in [
        (Compression::GZIP, MediaType::LAYER_GZIP),
        (Compression::ZSTD, MediaType::LAYER_ZSTD),
        (Compression::None, MediaType::LAYER_TAR),
    ] {
        let options = SealOptions {
            epoch: Some(1_400_000_000),
            compression,
        };
        let sealed = seal_in(&Pool::shared().unwrap(), &options, &store);
        for threads in [1, 2, 5] {
            let pool = Pool::new(NonZeroUsize::new(threads).unwrap()).unwrap();
            assert_eq!(seal_in(&pool, &options, &store), sealed);
        }
        assert_eq!(sealed.descriptor.media_type, media_type);
        let blob = std::fs::read(store.blob_path(&sealed.descriptor.digest)).unwrap();
        assert_eq!(blob.len() as u64, sealed.descriptor.size);
        assert_eq!(Digest::of(&blob), sealed.descriptor.digest);
        diff_ids.push((sealed.diff_id.clone(), sealed.uncompressed_bytes));

        if is_real_root() {
            let tree = dir
                .path()
                .join(compression.media_type().as_str().replace('/', "-"));
            std::fs::create_dir(&tree).unwrap();
            let blob = store.open_blob(&sealed.descriptor.digest).unwrap();
            apply(
                blob,
                &media_type,
                &sealed.diff_id,
                &tree,
                &Limits::default(),
            )
            .unwrap();
            let late = walk(&tree)
                .into_iter()
                .filter_map(|change| match change.kind {
                    ChangeKind::Entry(entry) => Some(entry.metadata.mtime.seconds),
                    ChangeKind::Removed => None,
                });
            assert_eq!(late.max(), Some(1_400_000_000));
        }
    }
    diff_ids.dedup();
    assert_eq!(diff_ids.len(), 1, "{diff_ids:?}");
    // A changed digest here means that every cache and registry sees new layers.
    let (diff_id, bytes) = &diff_ids[0];
    assert_eq!(
        (diff_id.digest().short(), *bytes),
        ("b11244d456bf", 327_680)
    );
}

#[test]
fn security_s17_a_wrong_diff_id_is_found_also_behind_the_end() {
    let dir = tempfile::tempdir().unwrap();
    let mut bytes = tar_of(Vec::new());
    assert_eq!(bytes, [0; 1024]);
    bytes.extend([0; 5000]);
    apply_bytes(&bytes, dir.path(), &Limits::default()).unwrap();
    let want = DiffId::from_uncompressed(Digest::of(&bytes));
    *bytes.last_mut().unwrap() = 1;
    let got = Digest::of(&bytes);
    let error = apply(
        &bytes[..],
        &MediaType::LAYER_TAR,
        &want,
        dir.path(),
        &Limits::default(),
    )
    .unwrap_err();
    assert_eq!(
        error.to_string(),
        format!(
            "the layer's uncompressed bytes are not those of the image config: got {got}, want {want}"
        )
    );
}

fn run(command: &mut Command) {
    let output = command.env("LC_ALL", "C").output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {stderr}");
}

fn sparse_file(path: &Path, pieces: u64) {
    use std::os::unix::fs::FileExt;
    let file = std::fs::File::create(path).unwrap();
    file.set_len(pieces * 200_000 + 77).unwrap();
    for piece in 0..pieces {
        file.write_all_at(&[piece as u8 + 1; 4096], piece * 200_000 / 4096 * 4096)
            .unwrap();
    }
}

/// A tree with what GNU tar has an own form for.
fn gnu_tree(tree: &Path) {
    let long = format!("{}/{}", "a".repeat(120), "b".repeat(130));
    std::fs::create_dir_all(tree.join(&long)).unwrap();
    std::fs::write(tree.join(&long).join("file"), "long").unwrap();
    std::fs::hard_link(tree.join(&long).join("file"), tree.join("y-hard")).unwrap();
    std::os::unix::fs::symlink(&long, tree.join("x-link")).unwrap();
    sparse_file(&tree.join("few"), 3);
    sparse_file(&tree.join("many"), 60);
    sparse_file(&tree.join("hole"), 0);
    std::fs::write(tree.join("owned"), "x").unwrap();
    std::os::unix::fs::lchown(tree.join("owned"), Some(4_000_000_000), Some(3_000_000)).unwrap();
    std::fs::set_permissions(tree.join("owned"), std::fs::Permissions::from_mode(0o6711)).unwrap();
    rustix::fs::mknodat(
        rustix::fs::CWD,
        tree.join("device"),
        rustix::fs::FileType::CharacterDevice,
        rustix::fs::Mode::RUSR,
        rustix::fs::makedev(10, 200),
    )
    .unwrap();
    for name in ["few", "owned"] {
        rustix::fs::setxattr(
            tree.join(name),
            "user.test",
            b"a\nb\0\xff",
            rustix::fs::XattrFlags::empty(),
        )
        .unwrap();
    }
}

/// Bytes that the sparse files take on the disk; with their holes they are 12.6 MB.
fn allocated_bytes(tree: &Path) -> u64 {
    let blocks = |name| tree.join(name).metadata().unwrap().blocks();
    512 * (blocks("few") + blocks("many") + blocks("hole"))
}

#[test]
fn security_s03_archives_of_gnu_tar_apply_as_gnu_tar_extracts_them() {
    if !is_real_root() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    std::fs::create_dir(&source).unwrap();
    gnu_tree(&source);
    for (number, options) in [
        &["--format=gnu"][..],
        &["--format=gnu", "--sparse"],
        &["--format=posix", "--xattrs", "--xattrs-include=*"],
        &[
            "--format=posix",
            "--sparse",
            "--sparse-version=0.0",
            "--xattrs",
        ],
        &["--format=posix", "--sparse", "--sparse-version=0.1"],
        &[
            "--format=posix",
            "--sparse",
            "--sparse-version=1.0",
            "--xattrs",
        ],
        &[
            "--format=posix",
            "--sparse",
            "--pax-option=globexthdr.name=g,comment=global",
        ],
    ]
    .iter()
    .enumerate()
    {
        let archive = dir.path().join("archive.tar");
        run(Command::new("tar")
            .args(*options)
            .arg("--sort=name")
            .arg("-C")
            .arg(&source)
            .arg("-cf")
            .arg(&archive)
            .arg("."));
        let want = dir.path().join(format!("want{number}"));
        let got = dir.path().join(format!("got{number}"));
        std::fs::create_dir(&want).unwrap();
        std::fs::create_dir(&got).unwrap();
        run(Command::new("tar")
            .args(["--numeric-owner", "--xattrs", "--xattrs-include=*", "-xpf"])
            .arg(&archive)
            .arg("-C")
            .arg(&want));
        apply_bytes(&std::fs::read(&archive).unwrap(), &got, &Limits::default())
            .unwrap_or_else(|error| panic!("{options:?}: {error}"));
        assert_eq!(describe(walk(&got)), describe(walk(&want)), "{options:?}");
        if options.contains(&"--sparse") {
            let allocated = allocated_bytes(&got);
            assert!(allocated < 2_000_000, "{options:?}: {allocated}");
        }
    }
}

#[test]
fn security_s03_gnu_tar_extracts_what_is_written() {
    if !is_real_root() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let archive = dir.path().join("archive.tar");
    let (want, got) = (dir.path().join("want"), dir.path().join("got"));
    std::fs::create_dir(&want).unwrap();
    std::fs::create_dir(&got).unwrap();
    // Whiteouts are files to GNU tar.
    let changes = || {
        let mut changes = everything();
        changes.retain(|change| match &change.kind {
            ChangeKind::Removed => false,
            ChangeKind::Entry(entry) => !matches!(entry.data, Data::Directory { opaque: true }),
        });
        changes.retain(|change| !change.path.starts_with("etc"));
        changes.push(entry(
            "zz",
            metadata(0o2751, 3_000_000, -5, &[("user.x", b"1 \n\0")]),
            Data::Directory { opaque: false },
        ));
        changes.push(entry(
            "zz/file",
            metadata(0o4755, 1000, 5, &[("user.y", b"\xff")]),
            file(b"abc"),
        ));
        changes.sort_by(|a, b| crate::rootfs::order(&a.path, &b.path));
        changes
    };
    let bytes = tar_of(changes());
    std::fs::write(&archive, &bytes).unwrap();
    run(Command::new("tar")
        .args(["--numeric-owner", "--xattrs", "--xattrs-include=*", "-xpf"])
        .arg(&archive)
        .arg("-C")
        .arg(&want));
    apply_bytes(&bytes, &got, &Limits::default()).unwrap();
    // Directories that no entry names get the time of day from GNU tar.
    let lines = |tree: &Path| {
        let mut lines = describe(walk(tree));
        lines.retain(|line| !line.contains(&"d".repeat(90)) || line.contains("file"));
        lines
    };
    assert_eq!(lines(&got), lines(&want));
}

/// A small deterministic generator, so that a failure can be repeated.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 % limit as u64).unwrap()
    }
}

#[test]
fn security_s02_damaged_archives_never_panic_and_stay_inside() {
    if !is_real_root() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let canary = dir.path().join("canary");
    std::fs::write(&canary, "untouched").unwrap();
    let gnu = dir.path().join("gnu");
    std::fs::create_dir(&gnu).unwrap();
    gnu_tree(&gnu);
    let mut archives = vec![tar_of(
        everything()
            .into_iter()
            .filter(|c| !c.path.ends_with("etc/file") && !c.path.ends_with("etc/hard"))
            .collect(),
    )];
    for options in [&["--format=gnu"][..], &["--format=posix"]] {
        let archive = dir.path().join("archive.tar");
        run(Command::new("tar")
            .args(options)
            .args(["--sparse", "--xattrs", "-C"])
            .arg(&gnu)
            .arg("-cf")
            .arg(&archive)
            .arg("--exclude=many")
            .arg("."));
        archives.push(std::fs::read(&archive).unwrap());
    }
    let limits = Limits {
        uncompressed_bytes: 16 << 20,
        ..Limits::default()
    };
    let mut random = Random(42);
    let (mut good, mut bad) = (0, 0);
    for round in 0..600 {
        let mut bytes = archives[round % archives.len()].clone();
        for _ in 0..=random.below(4) {
            let header = random.below(bytes.len() / 512) * 512;
            match random.below(5) {
                0 => bytes.truncate(header + random.below(512)),
                1 => bytes[header + random.below(512)] = random.below(256) as u8,
                2 => {
                    let other = random.below(bytes.len() / 512) * 512;
                    bytes.copy_within(header..header + 512, other);
                }
                // A field changed, the checksum right: deeper than a flipped bit gets.
                _ => {
                    let at = [
                        0, 100, 108, 124, 125, 136, 156, 157, 257, 345, 386, 482, 483,
                    ][random.below(13)];
                    let mut block =
                        super::header::Header(bytes[header..header + 512].try_into().unwrap());
                    block.0[at] = b"0123456789xgLKSD/.\0\x80\xff"[random.below(21)];
                    block.seal();
                    bytes[header..header + 512].copy_from_slice(&block.0);
                }
            }
            if bytes.len() < 1024 {
                break;
            }
        }
        let tree = dir.path().join("tree");
        std::fs::create_dir(&tree).unwrap();
        match apply_bytes(&bytes, &tree, &limits) {
            Ok(_) => good += 1,
            Err(error) => {
                assert!(!error.to_string().is_empty());
                bad += 1;
            }
        }
        crate::store::remove_tree(&tree).unwrap();
        assert_eq!(std::fs::read(&canary).unwrap(), b"untouched");
    }
    assert_eq!(
        std::fs::read_dir(dir.path()).unwrap().count(),
        3,
        "nothing beside the tree"
    );
    assert!(good > 20 && bad > 200, "{good} good, {bad} bad");
}
