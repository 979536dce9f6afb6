//! Layers made to break out, to lie or to exhaust; and what is unusual but allowed.

use std::io::{self, Read};
use std::path::{Path, PathBuf};

use super::header::{MTIME, SIZE};
use super::testing::{Archive, apply_bytes, describe, is_root, walk};
use super::{AppliedLayer, LayerError, Limits, apply};
use crate::image::{DiffId, Digest, MediaType};

/// A tree with canaries around it.
struct Arena {
    dir: tempfile::TempDir,
}

impl Arena {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("tree")).unwrap();
        std::fs::create_dir(dir.path().join("outside")).unwrap();
        std::fs::write(dir.path().join("outside/canary"), "untouched").unwrap();
        Self { dir }
    }

    fn tree(&self) -> PathBuf {
        self.dir.path().join("tree")
    }

    fn outside(&self) -> String {
        self.dir.path().join("outside").to_str().unwrap().to_owned()
    }

    fn apply(&self, archive: Archive) -> Result<AppliedLayer, LayerError> {
        self.apply_within(archive, &Limits::default())
    }

    fn apply_within(&self, archive: Archive, limits: &Limits) -> Result<AppliedLayer, LayerError> {
        let before = describe(walk(&self.dir.path().join("outside")));
        let result = apply_bytes(&archive.end(), &self.tree(), limits);
        assert_eq!(describe(walk(&self.dir.path().join("outside"))), before);
        let mut names: Vec<_> = std::fs::read_dir(self.dir.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        names.sort();
        assert_eq!(names, ["outside", "tree"]);
        result
    }

    fn lines(&self) -> Vec<String> {
        describe(walk(&self.tree()))
            .into_iter()
            .map(|line| line.replace(" 0:0 1000000000.000000000 {}", ""))
            .map(|line| line.replace(" 0:0 0.000000000 {}", " implied"))
            .collect()
    }
}

fn new() -> Archive {
    Archive::default()
}

/// The digest of `x`, as in the lines.
const X: &str = "file 1 2d711642b726";

#[track_caller]
fn check_tree(archive: Archive, expected: &[&str]) {
    let arena = Arena::new();
    arena.apply(archive).unwrap();
    assert_eq!(arena.lines(), expected);
}

#[track_caller]
fn check_error(archive: Archive, expected: &str) {
    let arena = Arena::new();
    let error = arena.apply(archive).unwrap_err();
    assert_eq!(error.to_string(), expected);
}

#[test]
fn security_s01_names_stay_inside() {
    if !is_root() {
        return;
    }
    let file = |name: &str| new().file(name, b"x");
    let x = format!("a/b {X} 644");
    let b = ["a Directory { opaque: false } 755 implied", &x];
    check_tree(file("/a/b"), &b);
    check_tree(file("//a/./b"), &b);
    check_tree(file("./a//b"), &b);
    for name in [
        "../outside/canary",
        "a/../../outside/canary",
        "..",
        "/..",
        "a/..",
        "./../x",
    ] {
        check_error(
            file(name),
            &format!("refusing entry {name:?} of the archive: its path has a \"..\""),
        );
        check_error(
            new().pax(&[("path", name.as_bytes())]).file("x", b"x"),
            &format!("refusing entry {name:?} of the archive: its path has a \"..\""),
        );
    }
    // The root itself is left alone. So is what has no name, as it is the same.
    check_tree(
        new()
            .directory("./")
            .directory("/")
            .file(".", b"x")
            .file("", b"y"),
        &[],
    );
}

#[test]
fn security_s02_links_in_parents_are_followed_inside_only() {
    if !is_root() {
        return;
    }
    let arena = Arena::new();
    let outside = arena.outside();
    let inside = outside.trim_start_matches('/');
    let archive = new()
        .pax(&[("linkpath", outside.as_bytes())])
        .symlink("absolute", "")
        .symlink("up", "../../../../../../outside")
        .file("absolute/canary", b"x")
        .file("up/canary", b"x")
        .directory("up/")
        .symlink("chain", "chain2/sub")
        .symlink("chain2", "/real")
        .file("chain/f", b"x");
    arena.apply(archive).unwrap();
    assert_eq!(
        std::fs::read(arena.tree().join(inside).join("canary")).unwrap(),
        b"x"
    );
    assert_eq!(
        std::fs::read(arena.tree().join("outside/canary")).unwrap(),
        b"x"
    );
    assert_eq!(
        std::fs::read(arena.tree().join("real/sub/f")).unwrap(),
        b"x"
    );
    // A directory replaces a link, and does not go through it.
    assert!(arena.tree().join("up").symlink_metadata().unwrap().is_dir());
    assert!(arena.tree().join("absolute").is_symlink());

    check_error(
        new().symlink("a", "b").symlink("b", "a").file("a/f", b"x"),
        "resolving \"a\" of the layer",
    );
    check_error(
        new().file("a", b"x").file("a/f", b"x"),
        "looking up \"a\" of the layer",
    );
}

#[test]
fn security_s02_the_last_component_is_replaced_and_never_followed() {
    if !is_root() {
        return;
    }
    for kind in [b'0', b'5', b'6', b'2'] {
        let arena = Arena::new();
        let canary = format!("{}/canary", arena.outside());
        let archive = new()
            .pax(&[("linkpath", canary.as_bytes())])
            .symlink("f", "")
            .pax(&[("SCHILY.xattr.user.x", b"y")])
            .raw(kind, "f", b"", |header| {
                header.set_text(super::header::LINK, b"elsewhere");
                header.set_number(super::header::MODE, 0o777);
                header.set_number(super::header::MTIME, 77);
            });
        arena.apply(archive).unwrap();
        let is = arena.tree().join("f").symlink_metadata().unwrap();
        assert_eq!(std::os::unix::fs::MetadataExt::mtime(&is), 77);
        assert_eq!(is.is_symlink(), kind == b'2');
    }
}

#[test]
fn security_s02_hard_links_stay_inside_and_do_not_follow() {
    if !is_root() {
        return;
    }
    let arena = Arena::new();
    let canary = format!("{}/canary", arena.outside());
    let outside = arena.outside();
    let archive = new()
        .pax(&[("linkpath", canary.as_bytes())])
        .symlink("link", "")
        .hardlink("hard", "link");
    arena.apply(archive).unwrap();
    assert!(arena.tree().join("hard").is_symlink());

    for (archive, target) in [
        (
            new()
                .pax(&[("linkpath", canary.as_bytes())])
                .hardlink("h", ""),
            canary.as_str(),
        ),
        (
            new()
                .pax(&[("linkpath", outside.as_bytes())])
                .symlink("s", "")
                .hardlink("h", "s/canary"),
            "s/canary",
        ),
        (new().file(".wh.gone", b"").hardlink("h", "gone"), "gone"),
        (new().file("f", b"x").hardlink("h", "f/below"), "f/below"),
        (new().hardlink("h", "lower"), "lower"),
    ] {
        let arena = Arena::new();
        match arena.apply(archive).unwrap_err() {
            LayerError::HardlinkOutsideLayer { path, target: got } => {
                assert_eq!(
                    (path.as_path(), got.as_path()),
                    (Path::new("h"), Path::new(target))
                );
            }
            error => panic!("{error}"),
        }
    }
    check_error(
        new().hardlink("h", "../outside/canary"),
        "refusing entry \"../outside/canary\" of the archive: its path has a \"..\"",
    );
    check_error(
        new().file("h", b"x").hardlink("./h", "/h"),
        "refusing entry \"./h\" of the archive: it is a hard link to itself",
    );
    // The entry's metadata is the file's, as in containerd; a capability survives.
    check_tree(
        new().file("f", b"x").raw(b'1', "h", b"", |header| {
            header.set_text(super::header::LINK, b"/f");
            header.set_number(super::header::MODE, 0o4711);
        }),
        &[&format!("f {X} 4711"), "h Hardlink(f) 4711"],
    );
}

#[test]
fn whiteouts_hide_lower_layers_only() {
    if !is_root() {
        return;
    }
    check_tree(
        new().file(".wh.gone", b"").file("a/.wh.b", b""),
        &[
            "a Directory { opaque: false } 755 implied",
            "a/b removed",
            "gone removed",
        ],
    );
    // What the layer has itself stays, wherever the whiteout stands.
    let f = format!("f {X} 644");
    check_tree(new().file(".wh.f", b"").file("f", b"x"), &[&f]);
    check_tree(new().file("f", b"x").file(".wh.f", b""), &[&f]);
    let d = ["d Directory { opaque: true } 755", &format!("d/f {X} 644")];
    check_tree(
        new().file(".wh.d", b"").directory("d").file("d/f", b"x"),
        &d,
    );
    check_tree(
        new().directory("d").file("d/f", b"x").file(".wh.d", b""),
        &d,
    );
    check_tree(
        new()
            .directory("d")
            .file("d/.wh..wh..opq", b"")
            .file("d/f", b"x"),
        &d,
    );
    check_tree(
        new()
            .file("d/f", b"x")
            .file("d/.wh..wh..opq", b"")
            .directory("d"),
        &d,
    );
    check_tree(
        new().file(".wh.d", b"").file("d/f", b"x"),
        &[
            "d Directory { opaque: true } 755 implied",
            &format!("d/f {X} 644"),
        ],
    );
    // A file, and then a directory of that name: nothing of lower layers is in it.
    check_tree(new().file("d", b"x").directory("d").file("d/f", b"x"), &d);
    // A symbolic link in the parents.
    check_tree(
        new()
            .directory("real")
            .symlink("s", "/real")
            .file("s/.wh.f", b"")
            .file("s/.wh..wh..opq", b""),
        &[
            "real Directory { opaque: true } 755",
            "real/f removed",
            "s Symlink(/real) 777",
        ],
    );
    // Books of AUFS.
    check_tree(
        new()
            .directory(".wh..wh.plnk")
            .file(".wh..wh.plnk/1.2", b"x")
            .file(".wh..wh.aufs", b""),
        &[],
    );
    for name in [".wh.", "a/.wh..", "a/.wh..."] {
        check_error(
            new().file(name, b""),
            &format!("refusing entry {name:?} of the archive: it is a whiteout of nothing"),
        );
    }
    check_error(
        new().file(".wh.a/b", b""),
        "refusing entry \".wh.a/b\" of the archive: a directory cannot have the name of a whiteout",
    );
    check_error(
        new().file(".wh..wh..opq", b""),
        "refusing entry \".wh..wh..opq\" of the archive: it would hide all layers below this one, which is not supported",
    );
}

#[test]
fn security_s02_a_whiteout_through_a_link_removes_nothing_outside() {
    if !is_root() {
        return;
    }
    let arena = Arena::new();
    let outside = arena.outside();
    let archive = new()
        .pax(&[("linkpath", outside.as_bytes())])
        .symlink("s", "")
        .file("s/.wh.canary", b"")
        .file("s/.wh..wh..opq", b"");
    arena.apply(archive).unwrap();
    let inside = arena.tree().join(outside.trim_start_matches('/'));
    let changes = describe(walk(&inside));
    assert_eq!(changes, ["canary removed"]);
}

#[test]
fn of_several_entries_the_last_counts() {
    if !is_root() {
        return;
    }
    check_tree(
        new().file("f", b"long").file("f", b"x"),
        &[&format!("f {X} 644")],
    );
    check_tree(
        new()
            .directory("d")
            .file("d/a/b", b"x")
            .file("d", b"x")
            .file("e", b"x"),
        &[&format!("d {X} 644"), &format!("e {X} 644")],
    );
    // Deeper than there are file descriptors.
    let deep = "d/".repeat(1900) + "f";
    check_tree(
        new()
            .pax(&[("path", deep.as_bytes())])
            .file("f", b"x")
            .file("d.", b"x")
            .file("d", b"x"),
        &[&format!("d {X} 644"), &format!("d. {X} 644")],
    );
    // The metadata of a directory that is gone goes nowhere.
    check_tree(
        new()
            .raw(b'5', "d/", b"", |h| {
                h.set_number(super::header::MODE, 0o7777)
            })
            .symlink("d", "e")
            .directory("e"),
        &["d Symlink(e) 777", "e Directory { opaque: false } 755"],
    );
    check_tree(
        new()
            .directory("d")
            .file("d/f", b"x")
            .raw(b'5', "d", b"", |h| {
                h.set_number(super::header::MODE, 0o1700)
            }),
        &[
            "d Directory { opaque: false } 1700",
            &format!("d/f {X} 644"),
        ],
    );
    // A cached parent that is replaced.
    check_tree(
        new()
            .directory("a")
            .directory("b")
            .symlink("s", "a")
            .file("s/one", b"x")
            .symlink("s", "b")
            .file("s/two", b"x"),
        &[
            "a Directory { opaque: false } 755",
            &format!("a/one {X} 644"),
            "b Directory { opaque: false } 755",
            &format!("b/two {X} 644"),
            "s Symlink(b) 777",
        ],
    );
}

#[test]
fn implied_directories_are_reported() {
    if !is_root() {
        return;
    }
    let arena = Arena::new();
    let applied = arena
        .apply(
            new()
                .file("a/b/f", b"x")
                .file("c/d/f", b"x")
                .directory("c/d"),
        )
        .unwrap();
    assert_eq!(
        applied.implied_directories,
        ["a", "a/b", "c"].map(PathBuf::from)
    );
}

#[test]
fn extended_attributes_of_the_overlay_are_refused() {
    if !is_root() {
        return;
    }
    for name in [
        "user.overlay.opaque",
        "trusted.overlay.redirect",
        "user.overlay.metacopy",
    ] {
        check_error(
            new()
                .pax(&[(&format!("SCHILY.xattr.{name}"), b"y")])
                .directory("d"),
            &format!(
                "refusing entry \"d\" of the layer: extended attribute {name:?} is the overlay file system's own"
            ),
        );
    }
    // An attribute that no link can have is passed over and reported.
    let arena = Arena::new();
    let applied = arena
        .apply(
            new()
                .pax(&[("SCHILY.xattr.user.x", b"y")])
                .symlink("s", "t"),
        )
        .unwrap();
    let skipped = &applied.skipped_xattrs;
    assert_eq!(skipped.len(), 1);
    assert_eq!(
        (skipped[0].path.to_str(), skipped[0].name.to_str()),
        (Some("s"), Some("user.x"))
    );
}

#[test]
fn a_capability_is_kept_and_seen_inside() {
    if !is_root() {
        return;
    }
    // cap_net_raw+ep. In a user namespace the kernel adds the namespace's root and takes
    // it off again for who reads it inside.
    let capability = [
        1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    ];
    let records: [(&str, &[u8]); 1] = [("SCHILY.xattr.security.capability", &capability)];
    let arena = Arena::new();
    arena
        .apply(
            new()
                .pax(&records)
                .file("ping", b"x")
                .hardlink("ping6", "ping"),
        )
        .unwrap();
    let mut value = [0; 64];
    for name in ["ping", "ping6"] {
        let file = arena.tree().join(name);
        let length = rustix::fs::getxattr(file, "security.capability", &mut value[..]).unwrap();
        assert_eq!(value[..length], capability, "{name}");
    }
}

#[test]
fn devices_that_may_not_be_made_are_reported() {
    if !is_root() {
        return;
    }
    // In a user namespace no device can be made; in a process that lacks the capability, too.
    let archive = new()
        .device(b'3', "tty", 5, 0)
        .device(b'4', "sda", 8, 0)
        .raw(b'6', "pipe", b"", |_| {});
    let arena = Arena::new();
    let applied = std::thread::scope(|scope| {
        let apply = || {
            let mut sets = rustix::thread::capabilities(None).unwrap();
            sets.effective.remove(rustix::thread::CapabilitySet::MKNOD);
            // Of this thread alone.
            rustix::thread::set_capabilities(None, sets).unwrap();
            arena.apply(archive)
        };
        scope.spawn(apply).join().unwrap()
    })
    .unwrap();
    let devices: Vec<_> = applied
        .skipped_devices
        .iter()
        .map(|d| (d.path.to_str().unwrap(), d.is_block, d.major, d.minor))
        .collect();
    assert_eq!(devices, [("tty", false, 5, 0), ("sda", true, 8, 0)]);
    assert_eq!(arena.lines(), ["pipe Fifo 644"]);
}

#[test]
fn malformed_archives_say_where() {
    if !is_root() {
        return;
    }
    let cut = |archive: Archive, length: usize| Archive(archive.0[..length].to_vec());
    let check_bytes = |bytes: &[u8], expected: &str| {
        let arena = Arena::new();
        let error = apply_bytes(bytes, &arena.tree(), &Limits::default()).unwrap_err();
        assert_eq!(error.to_string(), expected);
    };
    let file = || new().file("f", b"x");
    check_bytes(
        &cut(file(), 100).0,
        "malformed layer: the archive ends within a header (byte 100 of the tar)",
    );
    check_bytes(
        &cut(file(), 512).0,
        "malformed layer: the archive ends within an entry (byte 512 of the tar, entry \"f\")",
    );
    check_bytes(
        &cut(file(), 600).0,
        "malformed layer: the archive ends within an entry (byte 600 of the tar, entry \"f\")",
    );
    // Without an end: as Go reads it.
    apply_bytes(&file().0, &Arena::new().tree(), &Limits::default()).unwrap();
    let mut wrong = file();
    wrong.0[0] = b'g';
    check_error(
        wrong,
        "malformed layer: header with a wrong checksum (byte 512 of the tar)",
    );
    let lie = new().raw(b'0', "f", b"x", |h| h.set_number(SIZE, 100_000));
    check_error(
        lie,
        "malformed layer: the archive ends within an entry (byte 2048 of the tar, entry \"f\")",
    );
    check_error(
        new().raw(b'0', "f", b"", |h| {
            h.0[124..136].copy_from_slice(b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff")
        }),
        "malformed layer: negative size in a header (byte 512 of the tar)",
    );
    check_error(
        new().raw(b'0', "f", b"", |h| {
            h.0[MTIME].copy_from_slice(b"xxxxxxxxxxx\0")
        }),
        "malformed layer: invalid mtime in a header (byte 512 of the tar)",
    );
    check_error(
        new().raw(b'V', "label", b"", |_| {}),
        "malformed layer: entry of unsupported type 'V' (byte 512 of the tar, entry \"label\")",
    );
    check_error(
        new().pax(&[("path", b"a")]),
        "malformed layer: extended header without an entry (byte 2048 of the tar)",
    );
    check_error(
        new()
            .pax(&[("path", b"a")])
            .pax(&[("path", b"b")])
            .file("f", b""),
        "malformed layer: two extended headers of one kind for one entry (byte 1536 of the tar)",
    );
    check_error(
        new().raw(b'x', "x", b"12 path=a\n", |_| {}).file("f", b""),
        "malformed layer: extended header record without a valid length (byte 1536 of the tar)",
    );
    check_error(
        new().pax(&[("size", b"-1")]).file("f", b""),
        "malformed layer: invalid size in an extended header (byte 1536 of the tar)",
    );
    check_error(
        new().pax(&[("uid", b"4294967295")]).file("f", b""),
        "malformed layer: owner 4294967295 is out of range (byte 1536 of the tar, entry \"f\")",
    );
    check_error(
        new().link(b'2', "s", ""),
        "malformed layer: link without a target (byte 512 of the tar, entry \"s\")",
    );
    let mut zeros = new().file("f", b"");
    zeros.0.extend([0; 512]);
    check_error(
        zeros.file("g", b""),
        "malformed layer: a single block of zeros between entries (byte 1536 of the tar)",
    );
}

#[test]
fn extended_headers_override_and_global_ones_do_not() {
    if !is_root() {
        return;
    }
    // The size of the extended header counts, or content would be read as headers
    // (CVE-2026-33055, CVE-2025-62518).
    let smuggled = new().file("smuggled", b"x").0;
    let size = smuggled.len().to_string();
    let outer = new()
        .pax(&[("size", size.as_bytes())])
        .raw(b'0', "outer", &smuggled, |h| h.set_number(SIZE, 0));
    let arena = Arena::new();
    arena.apply(outer).unwrap();
    let names: Vec<_> = walk(&arena.tree()).into_iter().map(|c| c.path).collect();
    assert_eq!(names, [PathBuf::from("outer")]);
    assert_eq!(std::fs::read(arena.tree().join("outer")).unwrap(), smuggled);

    check_tree(
        new()
            .pax_of_kind(
                b'g',
                &[("path", b"evil"), ("comment", b"abc"), ("mtime", b"7")],
            )
            .pax(&[
                ("path", b"name"),
                ("mtime", b"1000000000"),
                ("uid", b""),
                ("other.key", b"v"),
            ])
            .file("f", b"x"),
        &[&format!("name {X} 644")],
    );
    check_tree(
        new()
            .raw(b'L', "././@LongLink", b"long name\0", |_| {})
            .raw(b'K', "././@LongLink", b"long target\0", |_| {})
            .symlink("short", "short"),
        &["long name Symlink(long target) 777"],
    );
    // Links, directories and devices have no content, whatever their size says.
    check_tree(
        new()
            .raw(b'5', "d", b"", |h| h.set_number(SIZE, 512))
            .file("f", b"x"),
        &["d Directory { opaque: false } 755", &format!("f {X} 644")],
    );
    // Before POSIX: type NUL, and a slash for directories.
    check_tree(
        new()
            .raw(0, "d/", b"", |h| h.0[257..265].fill(0))
            .raw(0, "f", b"x", |_| {})
            .raw(b'7', "g", b"x", |_| {}),
        &[
            "d Directory { opaque: false } 644",
            &format!("f {X} 644"),
            &format!("g {X} 644"),
        ],
    );
}

#[test]
fn security_s16_limits_end_what_is_too_much() {
    if !is_root() {
        return;
    }
    let tight = Limits {
        entries: 5,
        extended_header_bytes: 20_000,
        path_bytes: 100,
        xattr_bytes: 1000,
        uncompressed_bytes: 1 << 20,
        remembered_bytes: 2000,
        ..Limits::default()
    };
    let long = "x".repeat(101);
    let deep = "d/".repeat(49) + "f";
    let flood = || {
        (0..6).fold(new(), |archive, n| {
            archive.device(b'3', &format!("d{n}"), 1, 3)
        })
    };
    for (archive, expected) in [
        (flood(), "the layer has too many entries; the limit is 5"),
        (
            new().file(&deep, b""),
            "the layer has too many entries; the limit is 5, entry \"d/d/d/d/d/d\"",
        ),
        (
            new().pax(&[("path", long.as_bytes())]).file("f", b""),
            "the layer has a path of too many bytes; the limit is 100",
        ),
        (
            new()
                .pax(&[("linkpath", long.as_bytes())])
                .symlink("s", "t"),
            "the layer has a path of too many bytes; the limit is 100, entry \"s\"",
        ),
        (
            new()
                .pax(&[("SCHILY.xattr.user.x", &[b'v'; 1001])])
                .file("f", b""),
            "the layer has an extended attribute of too many bytes; the limit is 1000",
        ),
        (
            new().pax(&[("comment", &[b'v'; 20_000])]).file("f", b""),
            "the layer has an extended header of too many bytes; the limit is 20000",
        ),
        (
            // A hole costs nothing to store and everything to read.
            new()
                .pax(&[
                    ("GNU.sparse.size", b"1048577"),
                    ("GNU.sparse.numblocks", b"0"),
                    ("GNU.sparse.map", b"0,0"),
                ])
                .file("f", b""),
            "malformed layer: sparse file whose number of pieces is wrong (byte 1536 of the tar, entry \"f\")",
        ),
        (
            new()
                .pax(&[
                    ("GNU.sparse.size", b"1048577"),
                    ("GNU.sparse.numblocks", b"1"),
                    ("GNU.sparse.map", b"0,0"),
                ])
                .file("f", b""),
            "the layer has files of too many bytes; the limit is 1048576, entry \"f\"",
        ),
    ] {
        let arena = Arena::new();
        let error = arena.apply_within(archive, &tight).unwrap_err();
        assert_eq!(error.to_string(), expected);
    }
    let wide = Limits {
        entries: 1000,
        ..tight
    };
    let error = Arena::new()
        .apply_within(
            (0..20).fold(new(), |a, n| a.directory(&format!("d{n}"))),
            &wide,
        )
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        "the layer has too many directories, devices and attributes to remember (bytes); the limit is 2000, entry \"d9\""
    );
}

/// A zstd frame that never ends: a tar header, then 128 KiB of zeros from every four bytes.
struct Bomb {
    head: Vec<u8>,
    at: usize,
}

impl Bomb {
    fn new() -> Self {
        let header = new()
            .raw(b'0', "bomb", b"", |h| h.set_number(SIZE, 8 << 30))
            .0;
        // Magic number, window of 128 KiB, then a raw block with the header.
        let mut head = vec![0x28, 0xb5, 0x2f, 0xfd, 0x00, (17 - 10) << 3];
        head.extend_from_slice(&(512_u32 << 3).to_le_bytes()[..3]);
        head.extend_from_slice(&header);
        Self { head, at: 0 }
    }
}

impl Read for Bomb {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        // A block of one repeated byte: type 1, size 128 KiB.
        let block = ((1_u32 << 20) | 2).to_le_bytes();
        for byte in buffer.iter_mut() {
            *byte = match self.head.get(self.at) {
                Some(byte) => *byte,
                None => [block[0], block[1], block[2], 0][(self.at - self.head.len()) % 4],
            };
            self.at += 1;
        }
        Ok(buffer.len())
    }
}

#[test]
fn security_s16_bombs_end_early() {
    if !is_root() {
        return;
    }
    let want = DiffId::from_uncompressed(Digest::of(b""));
    let by_ratio = Limits {
        ratio_free_bytes: 4 << 20,
        ..Limits::default()
    };
    let by_size = Limits {
        uncompressed_bytes: 4 << 20,
        ratio: u64::MAX,
        ..Limits::default()
    };
    for (limits, expected) in [
        // One read ahead of the source is 128 KiB, which at 200 allows 25 MiB.
        (
            &by_ratio,
            "the layer has too many uncompressed bytes for each compressed one; the limit is 200",
        ),
        (
            &by_size,
            "the layer has too many uncompressed bytes; the limit is 4194304",
        ),
    ] {
        let arena = Arena::new();
        let error = apply(
            Bomb::new(),
            &MediaType::LAYER_ZSTD,
            &want,
            &arena.tree(),
            limits,
        )
        .unwrap_err();
        assert_eq!(error.to_string(), expected);
        let written = arena.tree().join("bomb").metadata().unwrap().len();
        assert!(written <= 26 << 20, "{written}");
    }

    // Behind the end of the archive.
    let mut encoder =
        flate2::read::GzEncoder::new(io::repeat(0).take(64 << 20), flate2::Compression::best());
    let mut compressed = Vec::new();
    encoder.read_to_end(&mut compressed).unwrap();
    assert!(compressed.len() < 70_000);
    let arena = Arena::new();
    let error = apply(
        &compressed[..],
        &MediaType::LAYER_GZIP,
        &want,
        &arena.tree(),
        &by_ratio,
    )
    .unwrap_err();
    assert_eq!(
        error.to_string(),
        "the layer has too many uncompressed bytes for each compressed one; the limit is 200"
    );
}

/// Sixty gigabytes in two kilobytes: a hole costs nothing to store, and a layer made of it all
/// the time that its zeros take.
#[test]
fn security_s16_holes_are_in_proportion_to_what_holds_them() {
    if !is_root() {
        return;
    }
    let hole = |bytes: u64| {
        new()
            .pax(&[
                ("GNU.sparse.size", bytes.to_string().as_bytes()),
                ("GNU.sparse.numblocks", b"1"),
                ("GNU.sparse.map", b"0,0"),
            ])
            .file("f", b"")
    };
    check_error(
        hole(60 << 30),
        "the layer has holes of too many bytes for each byte of it; the limit is 200, entry \"f\"",
    );
    let arena = Arena::new();
    arena.apply(hole(2 << 30)).unwrap();
    let made = arena.tree().join("f").metadata().unwrap();
    assert_eq!(made.len(), 2 << 30);
}
