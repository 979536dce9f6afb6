//! ADD of archives.

use super::*;

/// One entry of a tar: `mode name` and what it is as for [`change`], owner 9:9. Names are
/// written as they are, also those that a decent archiver would not write.
pub(super) fn tar_of(lines: &[&str]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for text in lines {
        let change = change(text);
        let ChangeKind::Entry(entry) = change.kind else {
            panic!("archives remove nothing");
        };
        let mut header = tar::Header::new_ustar();
        header.set_mode(entry.metadata.mode);
        header.set_uid(9);
        header.set_gid(9);
        header.set_mtime(u64::try_from(THEN.seconds).unwrap());
        let (kind, link, content) = match entry.data {
            Data::File(FileContent {
                source: FileSource::Bytes(bytes),
                ..
            }) => (tar::EntryType::Regular, OsString::new(), bytes.to_vec()),
            Data::Directory { .. } => (tar::EntryType::Directory, OsString::new(), Vec::new()),
            Data::Symlink(target) => (tar::EntryType::Symlink, target, Vec::new()),
            Data::Hardlink(first) => (tar::EntryType::Link, first.into(), Vec::new()),
            Data::Fifo => (tar::EntryType::Fifo, OsString::new(), Vec::new()),
            other => panic!("{other:?}"),
        };
        let raw = header.as_old_mut();
        let name = change.path.as_os_str().as_bytes();
        raw.name[..name.len()].copy_from_slice(name);
        raw.linkname[..link.len()].copy_from_slice(link.as_bytes());
        header.set_entry_type(kind);
        header.set_size(content.len() as u64);
        header.set_cksum();
        builder.append(&header, &content[..]).unwrap();
    }
    builder.into_inner().unwrap()
}

/// `ADD t.tar` of an archive with these entries.
fn add(lines: &[&str], base: &[&str], destination: &str) -> (Fixture, CopyDefinition) {
    let fixture = fixture(&[], base);
    std::fs::write(fixture.context.path().join("t.tar"), tar_of(lines)).unwrap();
    let mut what = definition(&["t.tar"], destination);
    what.unpack = true;
    (fixture, what)
}

#[test]
fn archives_are_unpacked() {
    let check = |lines: &[&str], base: &[&str], destination: &str, expected: &[&str]| {
        let (fixture, what) = add(lines, base, destination);
        fixture.check(&what, expected);
    };
    let plain = ["750 d/", "4755 d/f = x", "777 l -> d/f", "600 p |"];
    // With or without a slash; parents that it lacks are made.
    for destination in ["/w", "/w/"] {
        check(
            &plain,
            &[],
            destination,
            &[
                "755 w/",
                "750 w/d/ (9:9)",
                "4755 w/d/f = x (9:9)",
                "777 w/l -> d/f (9:9)",
                "600 w/p | (9:9)",
            ],
        );
    }
    check(
        &["644 a/b/c = 1"],
        &[],
        "/",
        &["755 a/", "755 a/b/", "644 a/b/c = 1 (9:9)"],
    );
    // Names end at the destination.
    check(
        &[
            "644 ../../up = 1",
            "644 a/../../../far = 2",
            "644 /abs = 3",
            "644 ./fine = 4",
        ],
        &[],
        "/deep/down/",
        &[
            "755 deep/",
            "755 deep/down/",
            "644 deep/down/abs = 3 (9:9)",
            "644 deep/down/far = 2 (9:9)",
            "644 deep/down/fine = 4 (9:9)",
            "644 deep/down/up = 1 (9:9)",
        ],
    );
    // The last of several entries wins, of whatever type.
    check(
        &[
            "644 f = first",
            "600 f = second",
            "755 d/",
            "644 d/x = 1",
            "777 d -> /e",
            "644 g = 1",
            "700 g/",
        ],
        &[],
        "/w/",
        &[
            "755 w/",
            "777 w/d -> /e (9:9)",
            "600 w/f = second (9:9)",
            "700 w/g/ (9:9)",
        ],
    );
    // Hard links, also of a name that changes later. All names of a file have the metadata
    // of the last.
    check(
        &["640 a = 1", "777 b == a", "644 c == ./b", "600 a = 2"],
        &[],
        "/w/",
        &[
            "755 w/",
            "600 w/a = 2 (9:9)",
            "644 w/b = 1 (9:9)",
            "644 w/c == w/b (9:9)",
        ],
    );
    // Of a link and of a pipe too; a link keeps its mode.
    check(
        &["777 l -> x", "600 m == l", "600 p |", "640 q == p"],
        &[],
        "/w/",
        &[
            "755 w/",
            "777 w/l -> x (9:9)",
            "777 w/m == w/l (9:9)",
            "640 w/p | (9:9)",
            "640 w/q == w/p (9:9)",
        ],
    );
    // What is there is replaced; a directory that is there takes the entry's metadata, the
    // destination does not.
    check(
        &["700 ./", "711 sub/", "644 sub/x = 1", "644 old = new"],
        &[
            "755 w/",
            "600 w/old = old",
            "755 w/sub/",
            "644 w/sub/kept = k",
        ],
        "/w",
        &[
            "755 w/",
            "644 w/old = new (9:9)",
            "711 w/sub/ (9:9)",
            "644 w/sub/x = 1 (9:9)",
        ],
    );
}

#[test]
fn a_hard_link_to_a_file_of_the_image_is_one() {
    let (fixture, what) = add(
        &["600 x == d/f", "640 y == l", "644 z == to/f"],
        &["755 d/", "755 d/f = old", "777 l -> gone", "777 to -> d"],
        "/",
    );
    // The file becomes part of the layer, with what the archive says of it.
    fixture.check(
        &what,
        &[
            "755 d/",
            "644 d/f = old (9:9)",
            "777 l -> gone (9:9)",
            "644 x == d/f (9:9)",
            "777 y == l (9:9)",
            "644 z == d/f (9:9)",
        ],
    );
    for (entry, reason) in [
        (
            "644 x == d",
            "unpacking \"x\": Operation not permitted (os error 1)",
        ),
        (
            "644 d == d/f",
            "\"d\" is a hard link to \"d/f\", which is neither in the archive before it nor in the image",
        ),
    ] {
        let (fixture, what) = add(&[entry], &["755 d/", "755 d/f = old"], "/");
        fixture.fails(&what, &format!("unpacking the archive \"t.tar\": {reason}"));
    }
}

#[test]
fn what_replaces_a_directory_of_the_image_hides_what_is_in_it() {
    let base = ["755 d/", "755 d/e/", "644 d/e/f = old", "644 g = g"];
    let check = |lines: &[&str], expected: &[(&str, bool)]| {
        let (fixture, what) = add(lines, &base, "/");
        let show = |change: Change| match change.kind {
            ChangeKind::Entry(entry) => {
                let opaque = matches!(entry.data, Data::Directory { opaque: true });
                format!("{} {opaque}", change.path.display())
            }
            ChangeKind::Removed => panic!("ADD removes nothing"),
        };
        let expected: Vec<_> = expected.iter().map(|(p, o)| format!("{p} {o}")).collect();
        assert_eq!(fixture.changes(&what, show).unwrap(), expected, "{lines:?}");
    };
    check(&["644 d = x"], &[("d", false)]);
    check(&["700 d/"], &[("d", false)]);
    check(
        &["644 d = x", "700 d/", "644 d/n = n"],
        &[("d", true), ("d/n", false)],
    );
    // What is below is made anew, and cannot be linked to.
    check(
        &["777 d -> /g", "755 d/", "644 d/e/n = n"],
        &[("d", true), ("d/e", false), ("d/e/n", false)],
    );
    let (fixture, what) = add(&["644 d = x", "700 d/", "644 y == d/e/f"], &base, "/");
    let error = fixture.lines(&what).unwrap_err();
    assert!(
        error.contains("\"y\" is a hard link to \"d/e/f\""),
        "{error}"
    );
}

#[test]
fn security_s02_links_in_archives_stay_inside() {
    let canary = tempfile::tempdir().unwrap();
    let outside = canary.path().to_str().unwrap();
    let escape = format!("777 esc -> /../../..{outside}");
    let inside = outside.strip_prefix('/').unwrap();
    let (fixture, what) = add(
        &[
            &escape,
            "644 esc/f = x",
            "644 rel/y = y",
            "777 rel2 -> ../../../in",
            "644 rel2/z = z",
        ],
        &["755 in/", "777 rel -> in"],
        "/",
    );
    let mut expected = vec![
        "755 in/".to_owned(),
        "644 in/y = y (9:9)".into(),
        "644 in/z = z (9:9)".into(),
    ];
    expected.push(format!("777 esc -> /../../..{outside} (9:9)"));
    expected.push("777 rel2 -> ../../../in (9:9)".into());
    let mut parent = String::new();
    for part in inside.split('/') {
        let _ = write!(parent, "{part}/");
        expected.push(format!("755 {parent}"));
    }
    expected.push(format!("644 {inside}/f = x (9:9)"));
    let mut found = fixture.lines(&what).unwrap();
    found.sort();
    expected.sort();
    assert_eq!(found, expected);
    assert_eq!(std::fs::read_dir(canary.path()).unwrap().count(), 0);
}

#[test]
fn archives_with_owner_and_beside_others() {
    let (mut fixture, mut what) = add(&["750 d/", "644 d/f = x"], &[], "/w/");
    let bytes = std::fs::read(fixture.context.path().join("t.tar")).unwrap();
    std::fs::write(fixture.context.path().join("plain"), "p").unwrap();
    std::fs::set_permissions(
        fixture.context.path().join("plain"),
        PermissionsExt::from_mode(0o644),
    )
    .unwrap();
    fixture.owner = Some((5, 6));
    what.sources.push(CopySource::Path("plain".to_owned()));
    fixture.check(
        &what,
        &[
            "755 w/ (5:6)",
            "750 w/d/ (5:6)",
            "644 w/d/f = x (5:6)",
            "644 w/plain = p (5:6)",
        ],
    );
    // --chmod is not for archives, not even for the directory that is made; what they lack
    // belongs to nobody in particular.
    let (mut bare, mut flagged) = add(&["644 d/f = x"], &[], "/w/");
    bare.owner = Some((5, 6));
    flagged.chmod = Some(Chmod::Mode(0o600));
    bare.check(
        &flagged,
        &["755 w/ (5:6)", "755 w/d/", "644 w/d/f = x (5:6)"],
    );
    // COPY leaves archives as they are.
    what.unpack = false;
    what.sources.pop();
    let copied = fixture
        .changes(&what, |change| format!("{change:?}"))
        .unwrap();
    assert!(
        copied[1].contains(&format!("File({} bytes)", bytes.len())),
        "{copied:?}"
    );
    // Another copy of an archive is not the archive unpacked.
    let copied = fixture.digest(&what);
    what.unpack = true;
    assert_ne!(fixture.digest(&what), copied);
}

#[test]
fn broken_archives_are_told() {
    let (fixture, what) = add(&["644 a = 0123456789"], &[], "/w/");
    let path = fixture.context.path().join("t.tar");
    let whole = std::fs::read(&path).unwrap();
    std::fs::write(&path, &whole[..512 + 5]).unwrap();
    let error = fixture.lines(&what).unwrap_err();
    assert!(
        error.starts_with("unpacking the archive \"t.tar\": ") && error.contains("entry \"a\""),
        "{error}"
    );
    let mut damaged = tar_of(&["644 a = 1", "644 b = 2"]);
    damaged[1024 + 150] = b'9';
    std::fs::write(&path, &damaged).unwrap();
    let error = fixture.lines(&what).unwrap_err();
    assert!(error.contains("wrong checksum"), "{error}");
    let (fixture, what) = add(&["644 b == none"], &[], "/w/");
    fixture.fails(
        &what,
        "unpacking the archive \"t.tar\": \"b\" is a hard link to \"none\", which is neither in the archive before it nor in the image",
    );
    let (fixture, what) = add(&["644 f/x = 1"], &["644 f = x"], "/");
    fixture.fails(
        &what,
        "unpacking the archive \"t.tar\": unpacking \"f/x\": Not a directory (os error 20)",
    );
    let (fixture, what) = add(&["644 x = 1"], &["644 f = x"], "/f");
    fixture.fails(
        &what,
        "cannot copy a directory to \"/f\": it, or a parent of it, is there and not a directory",
    );
}
