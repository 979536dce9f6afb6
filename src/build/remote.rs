//! Sources of `ADD` that are fetched: files from HTTP, git repositories.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context as _;
use rustix::fs::FileType;
use url::Url;

use super::Engine;
use super::copy::{SourceNode, SourceTree};
use crate::image::Digest;
use crate::plan::CopySource;
use crate::remote::{git, http};
use crate::rootfs::{Metadata, Time};

/// The mode that a fetched file has, unless `--chmod` says another.
const FILE_MODE: u32 = 0o600;

/// A source that has been fetched. It stays where it is until the layer is sealed.
#[derive(Clone, Debug)]
pub(super) enum Fetched {
    /// A file, for [`CopySource::Url`].
    File(FetchedFile),
    /// A directory of this machine, for [`CopySource::Git`]. All that is in it is copied.
    Directory(PathBuf),
}

/// A file from HTTP.
#[derive(Clone, Debug)]
pub(super) struct FetchedFile {
    /// Where its content is.
    pub(super) path: PathBuf,
    /// What it is called in a directory; see [`http::file_name`].
    pub(super) name: String,
    /// `Last-Modified`.
    pub(super) mtime: Option<Time>,
    /// What its content is.
    pub(super) digest: Digest,
}

/// Fetches one source of a step.
pub(super) async fn fetch_remote(
    engine: &Arc<Engine>,
    source: &CopySource,
) -> anyhow::Result<Fetched> {
    match source {
        CopySource::Url { url, checksum } => {
            let url = Url::parse(url).with_context(|| format!("ADD {url:?}"))?;
            let checksum = checksum.as_deref().map(http::Checksum::parse).transpose()?;
            let fetched = engine.fetcher.file(&url, checksum).await?;
            let mtime = fetched.last_modified.map(|seconds| Time {
                seconds,
                nanoseconds: 0,
            });
            Ok(Fetched::File(FetchedFile {
                path: engine.store.blob_path(&fetched.digest),
                name: http::file_name(&url).to_string_lossy().into_owned(),
                mtime,
                digest: fetched.digest,
            }))
        }
        CopySource::Git {
            reference,
            checksum,
            keep_git_dir,
        } => {
            let parsed = git::parse(reference)?;
            let parsed = parsed.with_context(|| format!("{reference:?} is no git repository"))?;
            let mut parsed = parsed.with_flags(*keep_git_dir, checksum.as_deref())?;
            // Times of files are what building makes of them, whatever the query says.
            parsed.mtime = None;
            let path = engine.store.tmp_dir("git-")?.join("checkout");
            engine.fetcher.repository(parsed, &path).await?;
            Ok(Fetched::Directory(path))
        }
        CopySource::Path(_) | CopySource::Inline { .. } => {
            anyhow::bail!("{source:?} is nothing to fetch")
        }
    }
}

impl FetchedFile {
    /// The file as its only content.
    fn node(&self) -> io::Result<SourceNode> {
        use std::os::unix::fs::MetadataExt;
        let found = std::fs::metadata(&self.path)?;
        Ok(SourceNode {
            path: PathBuf::from(&self.name),
            file_type: FileType::RegularFile,
            metadata: Metadata {
                mode: FILE_MODE,
                mtime: self.mtime.unwrap_or_default(),
                ..Metadata::default()
            },
            size_bytes: found.len(),
            identity: (found.dev(), found.ino()),
            changed: Time::default(),
            links: 1,
            device: (0, 0),
            target: None,
        })
    }
}

/// A tree with one file, whose path is its name.
impl SourceTree for FetchedFile {
    fn lookup(&self, path: &Path, _follow_last: bool) -> io::Result<Option<SourceNode>> {
        if path == Path::new(&self.name) {
            return self.node().map(Some);
        }
        Ok(None)
    }

    fn read_dir(&self, _path: &Path) -> io::Result<Vec<(OsString, SourceNode)>> {
        Ok(vec![((&self.name).into(), self.node()?)])
    }

    fn open(&self, _path: &Path) -> io::Result<File> {
        File::open(&self.path)
    }

    fn read_link(&self, _path: &Path) -> io::Result<OsString> {
        Err(io::ErrorKind::InvalidInput.into())
    }

    fn xattrs(&self, _path: &Path) -> io::Result<BTreeMap<OsString, Vec<u8>>> {
        Ok(BTreeMap::new())
    }

    fn digest(&self, _node: &SourceNode) -> Option<Digest> {
        Some(self.digest.clone())
    }
}
