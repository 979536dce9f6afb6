//! ADD of an archive: its entries → additions on top of a filesystem.
//!
//! What an archive is, [`crate::layer::archive::is_archive`] tells. Names are resolved inside the
//! destination's root; `..` ends there.

use std::fs::File;
use std::io::{self, BufReader, Read, Write};
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use thiserror::Error;

use super::additions::{Addition, Additions, Content};
use crate::layer::archive::decompress;
use crate::layer::{EntryKind, LayerError, Limits, Segment, TarReader};
use crate::rootfs::belongs_in_layer;

/// What is wrong with an archive.
#[derive(Debug, Error)]
pub(super) enum UnpackError {
    /// The archive is damaged, or too much.
    #[error(transparent)]
    Archive(#[from] LayerError),
    /// A hard link to nothing.
    #[error(
        "{path:?} is a hard link to {target:?}, which is neither in the archive before it nor in the image"
    )]
    Hardlink {
        /// The link.
        path: PathBuf,
        /// What it names.
        target: PathBuf,
    },
    /// An entry cannot be where it says.
    #[error("unpacking {path:?}")]
    Place {
        /// The entry.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Contents wait in files until the layer is written; that failed.
    #[error("spooling {path:?}")]
    Spool {
        /// The entry.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Adds the entries of `archive` below `destination`, a path without links.
///
/// Contents are written to files in `spool`, a directory that lives as long as the
/// additions. `owner` is `--chown`; `index` tells this archive from other sources.
pub(super) fn unpack(
    archive: impl Read + Send + 'static,
    destination: &Path,
    owner: Option<(u32, u32)>,
    index: usize,
    spool: &Path,
    additions: &mut Additions<'_>,
) -> Result<(), UnpackError> {
    let limits = Limits::default();
    let input = decompress(archive, &limits)?;
    let mut reader = TarReader::new(BufReader::new(input), limits);
    let mut number = 0_u64;
    while let Some(entry) = reader.next()? {
        let place = |source| UnpackError::Place {
            path: entry.name.clone(),
            source,
        };
        let path = target(additions, destination, &entry.name).map_err(place)?;
        if path == destination {
            // The root of the archive: the destination is there and keeps its metadata.
            continue;
        }
        let mut metadata = entry.metadata.clone();
        if let Some((uid, gid)) = owner {
            (metadata.uid, metadata.gid) = (uid, gid);
        }
        metadata.xattrs.retain(|name, _| belongs_in_layer(name));
        let mut identity = None;
        let content = match &entry.kind {
            EntryKind::File(sparse) => {
                number += 1;
                let file = spool.join(format!("{index}-{number}"));
                write_content(&mut reader, sparse.as_deref(), entry.size_bytes, &file)
                    .map_err(|error| error.at(&entry.name))?;
                identity = Some((index, 0, number));
                Content::File {
                    size_bytes: entry.size_bytes,
                    open: Arc::new(move || File::open(&file)),
                }
            }
            EntryKind::Hardlink(name) => {
                number += 1;
                let target = target(additions, destination, name).map_err(place)?;
                let linked = additions.link(&path, &target, metadata, (index, 0, number));
                linked.map_err(|error| match error.kind() {
                    io::ErrorKind::NotFound => UnpackError::Hardlink {
                        path: entry.name.clone(),
                        target: name.clone(),
                    },
                    _ => place(error),
                })?;
                continue;
            }
            EntryKind::Directory => Content::Directory,
            EntryKind::Symlink(target) => Content::Symlink(target.clone()),
            EntryKind::CharDevice { major, minor } => Content::CharDevice(*major, *minor),
            EntryKind::BlockDevice { major, minor } => Content::BlockDevice(*major, *minor),
            EntryKind::Fifo => Content::Fifo,
        };
        let addition = Addition {
            metadata,
            content,
            identity,
        };
        additions.replace(&path, addition).map_err(place)?;
    }
    reader.finish()?;
    Ok(())
}

/// Where an entry goes: links in its parents are followed, its own name is not. As in
/// BuildKit, the destination is the root directory for all of them.
fn target(additions: &Additions<'_>, destination: &Path, name: &Path) -> io::Result<PathBuf> {
    let mut inside = PathBuf::new();
    for component in name.components() {
        match component {
            Component::Normal(part) => inside.push(part),
            Component::ParentDir => {
                inside.pop();
            }
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    let Some(last) = inside.file_name() else {
        return Ok(destination.to_owned());
    };
    let parent = inside.parent().unwrap_or(Path::new(""));
    Ok(additions.resolve_in(destination, parent)?.join(last))
}

enum ContentError {
    Archive(LayerError),
    Spool(io::Error),
}

impl ContentError {
    fn at(self, path: &Path) -> UnpackError {
        match self {
            Self::Archive(error) => error.into(),
            Self::Spool(source) => UnpackError::Spool {
                path: path.to_owned(),
                source,
            },
        }
    }
}

/// Writes the content of the current entry to the new file `to`; holes stay holes.
fn write_content(
    reader: &mut TarReader<impl io::BufRead>,
    sparse: Option<&[Segment]>,
    size_bytes: u64,
    to: &Path,
) -> Result<(), ContentError> {
    use std::os::unix::fs::FileExt;
    let mut file = File::create_new(to).map_err(ContentError::Spool)?;
    match sparse {
        None => loop {
            let chunk = reader.chunk().map_err(ContentError::Archive)?;
            if chunk.is_empty() {
                break;
            }
            file.write_all(chunk).map_err(ContentError::Spool)?;
            let length = chunk.len();
            reader.consume(length);
        },
        Some(segments) => {
            for segment in segments {
                let (mut at, mut left) = (segment.offset, segment.length);
                while left > 0 {
                    let chunk = reader.chunk().map_err(ContentError::Archive)?;
                    let length = chunk.len().min(usize::try_from(left).unwrap_or(usize::MAX));
                    if length == 0 {
                        break;
                    }
                    file.write_all_at(&chunk[..length], at)
                        .map_err(ContentError::Spool)?;
                    reader.consume(length);
                    at += length as u64;
                    left -= length as u64;
                }
            }
            file.set_len(size_bytes).map_err(ContentError::Spool)?;
        }
    }
    Ok(())
}
