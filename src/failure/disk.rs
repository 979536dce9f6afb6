//! Advice where a disk is full, or may not be written to: how much room there is, and where.

use std::error::Error;
use std::io;
use std::path::{Path, PathBuf};

use crate::build::Shared_;
use crate::export::ExportError;

/// What is wrong with a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Trouble {
    Full,
    ReadOnly,
}

/// How much there is, and how much of it is free.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Room {
    bytes: u64,
    free_bytes: u64,
    /// 0 where the file system has no fixed number of them.
    inodes: u64,
    free_inodes: u64,
}

/// What to do where `error` says that the disk of the store `store`, or of an output, is full
/// or read-only; absent where it says nothing of that kind.
pub(super) fn advice(error: &anyhow::Error, store: &Path) -> Option<String> {
    let trouble = error.chain().find_map(trouble_of)?;
    let output = error.chain().find_map(output_of);
    let place = output.as_deref().unwrap_or(store);
    let shown = place.display();
    Some(match (trouble, output.is_some()) {
        (Trouble::ReadOnly, false) => format!(
            "the store {shown} is on a file system that is mounted read-only; \
             give a directory that can be written to with --root DIR or SOCKLESS_ROOT"
        ),
        (Trouble::ReadOnly, true) => {
            format!(
                "{shown} is on a file system that is mounted read-only; write the output elsewhere"
            )
        }
        (Trouble::Full, false) => format!(
            "the disk of the store {shown} {}; \"sockless prune\" removes what no build uses, \
             and --root DIR or SOCKLESS_ROOT gives a store on another disk",
            described(room_of(place))
        ),
        (Trouble::Full, true) => format!(
            "the disk of {shown} {}; make room there, or write the output elsewhere",
            described(room_of(place))
        ),
    })
}

fn trouble_of(cause: &(dyn Error + 'static)) -> Option<Trouble> {
    use io::ErrorKind::{QuotaExceeded, ReadOnlyFilesystem, StorageFull};
    // An error that came to several steps has no causes of its own.
    let mut cause = Some(Shared_::unwrapped(cause));
    while let Some(error) = cause {
        match error.downcast_ref::<io::Error>().map(io::Error::kind) {
            Some(StorageFull | QuotaExceeded) => return Some(Trouble::Full),
            Some(ReadOnlyFilesystem) => return Some(Trouble::ReadOnly),
            _ => cause = error.source(),
        }
    }
    None
}

/// Where an output was to go that could not be written.
fn output_of(cause: &(dyn Error + 'static)) -> Option<PathBuf> {
    match Shared_::unwrapped(cause).downcast_ref()? {
        ExportError::Io { path, .. }
        | ExportError::Dest { path, .. }
        | ExportError::Local { dest: path, .. } => Some(path.clone()),
        _ => None,
    }
}

/// What the file system says that `path` is on, or would be.
fn room_of(path: &Path) -> Option<Room> {
    // What could not be made is not there; its directory is.
    let mut places = path.ancestors().map(|place| match place {
        empty if empty.as_os_str().is_empty() => Path::new("."),
        other => other,
    });
    let found = places.find_map(|place| rustix::fs::statvfs(place).ok())?;
    Some(Room {
        bytes: found.f_blocks.saturating_mul(found.f_frsize),
        free_bytes: found.f_bavail.saturating_mul(found.f_frsize),
        inodes: found.f_files,
        free_inodes: found.f_favail,
    })
}

fn described(room: Option<Room>) -> String {
    let Some(room) = room else {
        return "is full".to_owned();
    };
    let mut text = format!(
        "has {} free of {}",
        kibibytes(room.free_bytes),
        kibibytes(room.bytes)
    );
    if room.inodes > 0 {
        text += &format!(" and {} of {} inodes", room.free_inodes, room.inodes);
    }
    text + ", after what was unfinished has been removed"
}

/// As `df` shows it.
fn kibibytes(bytes: u64) -> String {
    format!("{} KiB", bytes / 1024)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::store::StoreError;

    fn os(number: i32) -> io::Error {
        io::Error::from_raw_os_error(number)
    }

    #[test]
    fn a_full_disk_is_told_with_its_room() {
        let dir = tempfile::tempdir().unwrap();
        let store = dir.path().join("not/there");
        let error = StoreError::io("writing", Path::new("/x"))(os(28));
        // Also where several steps have it.
        let error = crate::build::unshare(&Arc::new(error.into())).context("Dockerfile:1:1");
        let text = advice(&error, &store).unwrap();
        let start = format!("the disk of the store {} has ", store.display());
        assert!(text.starts_with(&start), "{text}");
        assert!(text.contains(" KiB free of "), "{text}");
        assert!(text.contains("\"sockless prune\""), "{text}");
        assert!(text.contains("--root DIR"), "{text}");
        // EDQUOT
        let error = anyhow::Error::new(os(122)).context("x");
        assert!(advice(&error, &store).unwrap().contains(" free of "));
    }

    #[test]
    fn an_output_has_a_disk_of_its_own() {
        let output = |number| {
            let source = os(number);
            let path = PathBuf::from("image.tar");
            let action = "writing";
            let error = ExportError::Io {
                action,
                path,
                source,
            };
            advice(&error.into(), Path::new("/store")).unwrap()
        };
        let full = output(28);
        assert!(full.starts_with("the disk of image.tar has "), "{full}");
        assert!(full.ends_with("; make room there, or write the output elsewhere"));
        assert_eq!(
            output(30),
            "image.tar is on a file system that is mounted read-only; write the output elsewhere"
        );
    }

    #[test]
    fn a_read_only_store_is_told_and_nothing_else_is() {
        let store = Path::new("/store");
        let error = anyhow::Error::new(os(30)).context("x");
        assert_eq!(
            advice(&error, store).unwrap(),
            "the store /store is on a file system that is mounted read-only; give a directory \
             that can be written to with --root DIR or SOCKLESS_ROOT"
        );
        for other in [anyhow::anyhow!("x"), anyhow::Error::new(os(2)).context("y")] {
            assert_eq!(advice(&other, store), None);
        }
    }

    #[test]
    fn inodes_are_told_where_there_is_a_number_of_them() {
        let room = Room {
            bytes: 10 << 20,
            free_bytes: 1536,
            inodes: 0,
            free_inodes: 0,
        };
        let with = |inodes, free_inodes| {
            described(Some(Room {
                inodes,
                free_inodes,
                ..room
            }))
        };
        let end = ", after what was unfinished has been removed";
        assert_eq!(with(0, 0), format!("has 1 KiB free of 10240 KiB{end}"));
        assert_eq!(
            with(60, 0),
            format!("has 1 KiB free of 10240 KiB and 0 of 60 inodes{end}")
        );
        assert_eq!(described(None), "is full");
    }
}
