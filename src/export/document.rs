//! A manifest that is no image's, with its blobs, in an OCI image layout: a cache.

use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use super::ExportError;
use super::file::{IsCancelled, parent_of, persist, temporary_in};
use super::layout::{Layouted, open_layout};
use super::oci::{REF_NAME, blob_name, read_blob};
use crate::image::{Descriptor, RawManifest};
use crate::store::Store;

/// Where the bytes of a blob are.
#[derive(Clone, Debug)]
pub enum LayoutBlob {
    /// In memory.
    Bytes(Vec<u8>),
    /// In a file.
    File(PathBuf),
    /// In the store, or in the layout already.
    Store,
}

/// Whether the layout in `dir` has a blob of this size under this name.
pub fn has_blob(dir: &Path, descriptor: &Descriptor) -> bool {
    let found = fs::metadata(dir.join(blob_name(&descriptor.digest)));
    found.is_ok_and(|found| found.is_file() && found.len() == descriptor.size)
}

/// Adds `manifest` under the name `tag` to the layout in the directory `dir`, which is made
/// where it is missing, with the `blobs` that are not there yet. Gives the number of all and
/// the bytes of those that were written.
///
/// Blobs come first and `index.json` last. Other entries stay, the one of the same name is
/// replaced.
///
/// # Errors
/// [`ExportError`]. Complete blobs may have been added.
pub fn layout_document(
    manifest: &RawManifest,
    tag: &str,
    blobs: &[(Descriptor, LayoutBlob)],
    store: &Store,
    dir: &Path,
    is_cancelled: IsCancelled<'_>,
) -> Result<(usize, u64), ExportError> {
    fs::create_dir_all(parent_of(dir)).map_err(ExportError::io("creating", parent_of(dir)))?;
    fs::create_dir_all(dir).map_err(ExportError::io("creating", dir))?;
    let mut layout: Layouted = open_layout(dir)?;
    let mut written = 0;
    let document = LayoutBlob::Bytes(manifest.bytes.clone());
    let own = (manifest.descriptor(), document);
    for (descriptor, source) in blobs.iter().chain([&own]) {
        if is_cancelled() {
            let stopped = io::Error::other("stopped");
            return Err(ExportError::io("writing", dir)(stopped));
        }
        if has_blob(dir, descriptor) {
            continue;
        }
        let path = dir.join(blob_name(&descriptor.digest));
        let mut file = temporary_in(dir)?;
        match source {
            LayoutBlob::Bytes(bytes) => file
                .write_all(bytes)
                .map_err(ExportError::io("writing", &path))?,
            LayoutBlob::File(from) => {
                let mut from = fs::File::open(from).map_err(ExportError::io("opening", from))?;
                io::copy(&mut from, &mut file).map_err(ExportError::io("writing", &path))?;
            }
            LayoutBlob::Store => read_blob(descriptor, store, |blob| {
                io::copy(blob, &mut file).map(drop)
            })?,
        }
        persist(file, &path)?;
        written += descriptor.size;
    }
    let mut entry = manifest.descriptor();
    entry
        .annotations
        .insert(REF_NAME.to_owned(), tag.to_owned());
    layout.add(vec![(None, tag, entry)])?;
    layout.write()?;
    Ok((blobs.len(), written))
}
