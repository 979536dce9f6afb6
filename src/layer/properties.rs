//! What holds for any bytes that are given as a layer, hostile or real: see
//! [`corpus`](super::corpus).

use std::io::BufReader;
use std::path::Path;

use super::testing::{apply_bytes, describe, tar_of, walk};
use super::{EntryKind, LayerError, Limits, TarReader, list};
use crate::image::{DiffId, Digest, MediaType};
use crate::rootfs::ChangeKind;

/// Limits under which whatever is allowed is done in no time.
fn limits() -> Limits {
    Limits {
        uncompressed_bytes: 1 << 20,
        ratio_free_bytes: 1 << 20,
        entries: 2000,
        remembered_bytes: 1 << 20,
        ..Limits::default()
    }
}

/// An error with its causes.
pub(super) fn text(error: LayerError) -> String {
    format!("{:#}", anyhow::Error::new(error))
}

/// Reads an archive to its end: each entry, with the digest of its content, or the error.
fn read(bytes: &[u8], buffer_bytes: usize) -> Result<Vec<String>, String> {
    let input = BufReader::with_capacity(buffer_bytes, bytes);
    let mut tar = TarReader::new(input, limits());
    let mut lines = Vec::new();
    while let Some(entry) = tar.next().map_err(text)? {
        assert!(!entry.name.as_os_str().is_empty(), "{entry:?}");
        let name = entry.name.as_os_str().as_encoded_bytes();
        assert!(!name.contains(&0), "{entry:?}");
        assert!(
            entry.metadata.mtime.nanoseconds < 1_000_000_000,
            "{entry:?}"
        );
        assert!(entry.metadata.mode <= 0o7777, "{entry:?}");
        let mut content = Vec::new();
        loop {
            let chunk = tar.chunk().map_err(text)?;
            if chunk.is_empty() {
                break;
            }
            content.extend_from_slice(chunk);
            let length = chunk.len();
            tar.consume(length);
        }
        let want = match &entry.kind {
            EntryKind::File(None) => entry.size_bytes,
            EntryKind::File(Some(segments)) => {
                let mut end = 0;
                for segment in segments {
                    assert!(segment.offset >= end, "{entry:?}");
                    end = segment.offset + segment.length;
                }
                assert!(end <= entry.size_bytes, "{entry:?}");
                segments.iter().map(|segment| segment.length).sum()
            }
            _ => 0,
        };
        assert_eq!(content.len() as u64, want, "{entry:?}");
        lines.push(format!("{entry:?} {}", Digest::of(&content)));
    }
    Ok(lines)
}

/// The reader gives the same whatever pieces the bytes come in, ends, and panics at nothing.
pub(super) fn reader(bytes: &[u8]) {
    let whole = read(bytes, 64 << 10);
    for buffer_bytes in [1, 511, 1000] {
        assert_eq!(read(bytes, buffer_bytes), whole, "{buffer_bytes}");
    }
}

/// What a tree has. Layers are written with whole seconds, as containerd does it.
fn look(tree: &Path) -> Vec<String> {
    let mut changes = walk(tree);
    for change in &mut changes {
        if let ChangeKind::Entry(entry) = &mut change.kind {
            entry.metadata.mtime.nanoseconds = 0;
        }
    }
    describe(changes)
}

/// What became of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// It was applied; so many lines describe its tree.
    Applied(usize),
    /// It was refused.
    Refused,
}

/// Applies a layer in the empty directory `arena`, which is empty again afterwards. Nothing outside
/// of its tree is touched; its listing says what its tree has; and written again from the tree, it
/// is a layer that makes the same tree, byte for byte: nothing is lost.
///
/// Owners need the IDs that they have; `has_all_ids` says that there is none that could fail, and
/// that devices can be made.
pub(super) fn layer(bytes: &[u8], arena: &Path, has_all_ids: bool) -> Outcome {
    let (outside, tree, again) = ("outside", arena.join("tree"), arena.join("again"));
    let canary = arena.join(outside);
    std::fs::create_dir(&canary).expect("the arena is ours");
    std::fs::write(canary.join("canary"), "untouched").expect("ours");
    std::fs::create_dir(&tree).expect("ours");
    std::fs::create_dir(&again).expect("ours");
    let before = describe(walk(&canary));
    let outcome = apply_and_compare(bytes, &tree, &again, has_all_ids);
    assert_eq!(describe(walk(&canary)), before);
    let mut names: Vec<_> = std::fs::read_dir(arena)
        .expect("ours")
        .map(|entry| entry.expect("ours").file_name())
        .collect();
    names.sort();
    assert_eq!(names, ["again", outside, "tree"]);
    for dir in [&canary, &tree, &again] {
        crate::store::remove_tree(dir).expect("ours");
    }
    outcome
}

fn apply_and_compare(bytes: &[u8], tree: &Path, again: &Path, has_all_ids: bool) -> Outcome {
    let limits = limits();
    let listing = |bytes: &[u8]| {
        let want = DiffId::from_uncompressed(Digest::of(bytes));
        list(bytes, &MediaType::LAYER_TAR, &want, &limits)
    };
    let listed = listing(bytes);
    let applied = match apply_bytes(bytes, tree, &limits) {
        Ok(applied) => applied,
        Err(error) => {
            let error = text(error);
            assert!(!error.is_empty());
            if has_all_ids {
                assert_eq!(listed.map(drop).map_err(text), Err(error));
            }
            return Outcome::Refused;
        }
    };
    let want = look(tree);
    let written = tar_of(walk(tree));
    let wide = Limits::default();
    let reapplied = apply_bytes(&written, again, &wide)
        .unwrap_or_else(|error| panic!("what was written is refused: {}", text(error)));
    assert_eq!(look(again), want);
    assert_eq!(
        reapplied.implied_directories,
        [""; 0].map(std::path::PathBuf::from)
    );
    assert_eq!(Digest::of(&tar_of(walk(again))), Digest::of(&written));
    // A character device 0/0 is a whiteout, and what else an entry says of it means nothing.
    let is_kept = |line: &String| {
        !line.contains("CharDevice { major: 0, minor: 0 }") && line.contains("nanoseconds: 0 }")
    };
    let is_whole = read(bytes, 64 << 10).is_ok_and(|lines| lines.iter().all(is_kept))
        && applied.implied_directories.is_empty()
        && applied.skipped_devices.is_empty()
        && applied.skipped_xattrs.is_empty();
    if has_all_ids {
        let listed = listed.unwrap_or_else(|error| panic!("not listed: {}", text(error)));
        let relisted = listing(&written);
        let relisted = relisted.unwrap_or_else(|error| panic!("not listed: {}", text(error)));
        if is_whole {
            assert!(
                listed.to_bytes() == relisted.to_bytes(),
                "{listed:?}\n{relisted:?}"
            );
        }
    }
    Outcome::Applied(want.len())
}
