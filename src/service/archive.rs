//! Unpacks a repository's archive, as forges make it, into an empty directory.
//!
//! Input is hostile. Such an archive is what `git archive` writes: directories, files
//! and symbolic links below one top directory, whose name is dropped. Anything else
//! (devices, hard links, sparse files, a name twice, a way out, a file below a link)
//! is an error and not skipped, because git never makes it. Links are stored as they
//! are and never followed here.
//!
//! Files get the modes a checkout gives them, 0644 or 0755, and the archive's times.
//!
//! <https://pubs.opengroup.org/onlinepubs/9799919799/utilities/pax.html#tag_20_94_13>

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use flate2::read::MultiGzDecoder;
use rustix::fs::{AtFlags, Mode, OFlags, ResolveFlags, Timespec, Timestamps};
use rustix::io::Errno;
use tar::{EntryType, Header};
use thiserror::Error;

use crate::io::LimitedReader;

/// The largest extended header, in bytes. Names are shorter; `git archive` writes two or three.
const EXTENSION_LIMIT: u64 = 64 * 1024;

/// The longest name, in bytes; Linux's `PATH_MAX`.
const NAME_LIMIT: usize = 4096;

/// What an archive may hold.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Bytes after decompression, headers included.
    pub(crate) bytes: u64,
    /// Entries.
    pub(crate) entries: u64,
}

/// Why an archive was refused.
#[derive(Debug, Error)]
pub(crate) enum ArchiveError {
    /// It is damaged or too large.
    #[error("reading the archive")]
    Read(#[source] io::Error),
    /// It has an entry that a repository does not have.
    #[error("entry {name:?}: {reason}")]
    Entry {
        /// As in the archive. Not UTF-8 is replaced.
        name: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// It has too many entries.
    #[error("it has more than {limit} entries (setting entry_limit)")]
    Entries {
        /// The limit.
        limit: u64,
    },
    /// It has none.
    #[error("it is empty")]
    Empty,
    /// An entry cannot be made.
    #[error("creating {name:?}")]
    Create {
        /// As in the archive.
        name: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// Unpacks the gzip-compressed tar `archive` into the empty directory `into`.
///
/// # Errors
/// [`ArchiveError`]; what was unpacked until then stays.
pub(crate) fn unpack(archive: impl Read, into: &Path, limits: Limits) -> Result<(), ArchiveError> {
    let reader = LimitedReader::new(
        MultiGzDecoder::new(archive),
        limits.bytes,
        "the unpacked archive (setting unpacked_limit)",
    );
    let mut archive = tar::Archive::new(reader);
    let root = rustix::fs::open(into, OFlags::PATH | OFlags::DIRECTORY, Mode::empty())
        .map_err(|errno| create(b"", errno.into()))?;
    let mut unpacker = Unpacker {
        root,
        directories: Vec::new(),
    };
    let mut extension = Extension::default();
    let mut count = 0;
    // "Raw": extended headers come as entries, so that their size can be limited
    // before they are read.
    let entries = archive.entries().map_err(ArchiveError::Read)?.raw(true);
    for entry in entries {
        let mut entry = entry.map_err(ArchiveError::Read)?;
        count += 1;
        if count > limits.entries {
            return Err(ArchiveError::Entries {
                limit: limits.entries,
            });
        }
        let kind = entry.header().entry_type();
        if extension.read(kind, &mut entry)? {
            continue;
        }
        let header = entry.header().clone();
        let extension = std::mem::take(&mut extension);
        let name = extension
            .name
            .unwrap_or_else(|| header.path_bytes().into_owned());
        let link = extension
            .link
            .or_else(|| header.link_name_bytes().map(|link| link.into_owned()))
            .unwrap_or_default();
        unpacker.entry(&header, &name, &link, &mut entry)?;
    }
    if count == 0 {
        return Err(ArchiveError::Empty);
    }
    unpacker.finish()
}

/// What extended headers say about the entry that follows them.
#[derive(Default)]
struct Extension {
    name: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
}

impl Extension {
    /// Takes an entry that is an extended header. False where it is an entry of its own.
    fn read(&mut self, kind: EntryType, entry: &mut impl Read) -> Result<bool, ArchiveError> {
        let whole = || {
            let mut bytes = Vec::new();
            LimitedReader::new(entry, EXTENSION_LIMIT, "an extended header")
                .read_to_end(&mut bytes)
                .map_err(ArchiveError::Read)?;
            Ok(bytes)
        };
        match kind {
            EntryType::XHeader => self.records(&whole()?)?,
            // A comment with the commit's id.
            EntryType::XGlobalHeader => {
                let mut global = Self::default();
                global.records(&whole()?)?;
                if global.name.is_some() || global.link.is_some() {
                    return Err(refuse(b"", "a global header names all entries the same"));
                }
            }
            EntryType::GNULongName => self.name = Some(until_nul(whole()?)),
            EntryType::GNULongLink => self.link = Some(until_nul(whole()?)),
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// Reads `LENGTH KEY=VALUE\n` records, each by its length: values may hold line ends.
    fn records(&mut self, mut bytes: &[u8]) -> Result<(), ArchiveError> {
        let malformed = || refuse(b"", "an extended header is malformed");
        while !bytes.is_empty() {
            let space = bytes
                .iter()
                .position(|b| *b == b' ')
                .ok_or_else(malformed)?;
            let length: usize = std::str::from_utf8(&bytes[..space])
                .ok()
                .and_then(|digits| digits.parse().ok())
                .filter(|length| (space + 2..=bytes.len()).contains(length))
                .ok_or_else(malformed)?;
            let (record, rest) = bytes.split_at(length);
            bytes = rest;
            let record = record[space + 1..]
                .strip_suffix(b"\n")
                .ok_or_else(malformed)?;
            let equals = record
                .iter()
                .position(|b| *b == b'=')
                .ok_or_else(malformed)?;
            let value = &record[equals + 1..];
            match &record[..equals] {
                b"path" => self.name = Some(value.to_owned()),
                b"linkpath" => self.link = Some(value.to_owned()),
                // Files of 8 GiB and more. The header's own size says something else then,
                // and whoever believes the wrong one reads data as headers.
                b"size" => return Err(refuse(b"", "a file of 8 GiB or more")),
                key if key.starts_with(b"GNU.sparse") => {
                    return Err(refuse(b"", "a sparse file, which git does not make"));
                }
                _ => {}
            }
        }
        Ok(())
    }
}

fn until_nul(mut bytes: Vec<u8>) -> Vec<u8> {
    if let Some(end) = bytes.iter().position(|b| *b == 0) {
        bytes.truncate(end);
    }
    bytes
}

struct Unpacker {
    root: OwnedFd,
    /// With their times, which are set in the end, when nothing is created in them any more.
    directories: Vec<(Vec<u8>, i64)>,
}

impl Unpacker {
    fn entry(
        &mut self,
        header: &Header,
        name: &[u8],
        link: &[u8],
        data: &mut impl Read,
    ) -> Result<(), ArchiveError> {
        let kind = header.entry_type();
        let Some(path) = below_the_top(name)? else {
            if kind != EntryType::Directory {
                return Err(refuse(name, "expected everything below one top directory"));
            }
            return Ok(());
        };
        let made = |result: io::Result<()>| {
            result.map_err(
                |error| match error.raw_os_error().map(Errno::from_raw_os_error) {
                    Some(Errno::EXIST) => refuse(name, "the name is there twice"),
                    Some(Errno::LOOP | Errno::NOTDIR) => {
                        refuse(name, "it is below something that is no directory")
                    }
                    _ => create(name, error),
                },
            )
        };
        let mtime = header
            .mtime()
            .ok()
            .and_then(|seconds| i64::try_from(seconds).ok())
            .ok_or_else(|| refuse(name, "its time is malformed"))?;
        match kind {
            EntryType::Directory => {
                made(self.directory(&path))?;
                self.directories.push((path, mtime));
                Ok(())
            }
            EntryType::Regular | EntryType::Continuous => {
                let executable = header.mode().is_ok_and(|mode| mode & 0o100 != 0);
                made(self.file(&path, executable, mtime, data))
            }
            EntryType::Symlink => {
                if link.is_empty() || link.len() > NAME_LIMIT || link.contains(&0) {
                    return Err(refuse(name, "its target is malformed"));
                }
                made(self.symlink(&path, link, mtime))
            }
            _ => Err(refuse(
                name,
                "it is neither file nor directory nor symbolic link",
            )),
        }
    }

    fn directory(&self, path: &[u8]) -> io::Result<()> {
        let (parent, name) = self.parent(path)?;
        match rustix::fs::mkdirat(&parent, name, Mode::from_raw_mode(0o755)) {
            Ok(()) => Ok(()),
            // A directory may come after what is in it.
            Err(Errno::EXIST) => open_directory(&parent, name).map(drop),
            Err(errno) => Err(errno.into()),
        }
    }

    fn file(
        &self,
        path: &[u8],
        executable: bool,
        mtime: i64,
        data: &mut impl Read,
    ) -> io::Result<()> {
        let (parent, name) = self.parent(path)?;
        let flags =
            OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mut file = File::from(rustix::fs::openat(
            &parent,
            name,
            flags,
            Mode::from_raw_mode(0o600),
        )?);
        io::copy(data, &mut file)?;
        let mode = if executable { 0o755 } else { 0o644 };
        rustix::fs::fchmod(&file, Mode::from_raw_mode(mode))?;
        rustix::fs::futimens(&file, &at(mtime))?;
        Ok(())
    }

    fn symlink(&self, path: &[u8], target: &[u8], mtime: i64) -> io::Result<()> {
        let (parent, name) = self.parent(path)?;
        rustix::fs::symlinkat(OsStr::from_bytes(target), &parent, name)?;
        rustix::fs::utimensat(&parent, name, &at(mtime), AtFlags::SYMLINK_NOFOLLOW)?;
        Ok(())
    }

    /// Opens the directory that `path` is to be in, and makes it where it is missing.
    fn parent<'p>(&self, path: &'p [u8]) -> io::Result<(OwnedFd, &'p OsStr)> {
        let (parents, name) = match path.iter().rposition(|b| *b == b'/') {
            Some(slash) => (&path[..slash], &path[slash + 1..]),
            None => (&path[..0], path),
        };
        let name = OsStr::from_bytes(name);
        if parents.is_empty() {
            return Ok((open_directory(self.root.as_fd(), OsStr::new("."))?, name));
        }
        if let Ok(parent) = open_directory(self.root.as_fd(), OsStr::from_bytes(parents)) {
            return Ok((parent, name));
        }
        let mut parent = open_directory(self.root.as_fd(), OsStr::new("."))?;
        for component in parents.split(|b| *b == b'/').map(OsStr::from_bytes) {
            match rustix::fs::mkdirat(&parent, component, Mode::from_raw_mode(0o755)) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(errno) => return Err(errno.into()),
            }
            parent = open_directory(&parent, component)?;
        }
        Ok((parent, name))
    }

    fn finish(self) -> Result<(), ArchiveError> {
        // The innermost first: nothing below changes a directory's time then.
        for (path, mtime) in self.directories.iter().rev() {
            let set = || -> io::Result<()> {
                let (parent, name) = self.parent(path)?;
                let directory = rustix::fs::openat(
                    &parent,
                    name,
                    OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC,
                    Mode::empty(),
                )?;
                rustix::fs::fchmod(&directory, Mode::from_raw_mode(0o755))?;
                rustix::fs::futimens(&directory, &at(*mtime))?;
                Ok(())
            };
            set().map_err(|error| create(path, error))?;
        }
        Ok(())
    }
}

/// Opens a directory below `root` by a path without links.
fn open_directory(root: impl AsFd, path: &OsStr) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    Ok(rustix::fs::openat2(
        root,
        path,
        flags,
        Mode::empty(),
        resolve,
    )?)
}

/// The path below the top directory; none for the top directory itself.
fn below_the_top(name: &[u8]) -> Result<Option<Vec<u8>>, ArchiveError> {
    if name.is_empty() || name.len() > NAME_LIMIT || name.contains(&0) {
        return Err(refuse(name, "its name is malformed"));
    }
    if name.starts_with(b"/") {
        return Err(refuse(name, "its name is absolute"));
    }
    let mut components = name
        .split(|b| *b == b'/')
        .filter(|component| !matches!(*component, b"" | b"."));
    if components.clone().any(|component| component == b"..") {
        return Err(refuse(name, "its name leads out of the archive"));
    }
    components.next();
    let rest: Vec<&[u8]> = components.collect();
    Ok((!rest.is_empty()).then(|| rest.join(&b'/')))
}

fn at(seconds: i64) -> Timestamps {
    let time = Timespec {
        tv_sec: seconds,
        tv_nsec: 0,
    };
    Timestamps {
        last_access: time,
        last_modification: time,
    }
}

fn refuse(name: &[u8], reason: &'static str) -> ArchiveError {
    ArchiveError::Entry {
        name: String::from_utf8_lossy(name).into_owned(),
        reason,
    }
}

fn create(name: &[u8], source: io::Error) -> ArchiveError {
    ArchiveError::Create {
        name: String::from_utf8_lossy(name).into_owned(),
        source,
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::io::Write;
    use std::os::unix::fs::{MetadataExt, PermissionsExt};

    use flate2::Compression;
    use flate2::write::GzEncoder;

    use super::*;

    const LIMITS: Limits = Limits {
        bytes: 1 << 20,
        entries: 100,
    };

    /// One entry, with its name written as it is, however hostile.
    pub(crate) fn entry(kind: EntryType, name: &str, content: &str) -> Vec<u8> {
        let mut header = Header::new_ustar();
        header.as_mut_bytes()[..name.len()].copy_from_slice(name.as_bytes());
        header.set_entry_type(kind);
        header.set_mode(0o775);
        header.set_mtime(1_700_000_000);
        let mut data = Vec::new();
        if matches!(kind, EntryType::Symlink | EntryType::Link) {
            header.set_size(0);
            header.set_link_name_literal(content).unwrap();
        } else {
            header.set_size(content.len() as u64);
            data.extend_from_slice(content.as_bytes());
            data.resize(content.len().next_multiple_of(512), 0);
        }
        header.set_cksum();
        [&header.as_bytes()[..], &data].concat()
    }

    pub(crate) fn pack(entries: &[Vec<u8>]) -> Vec<u8> {
        let mut gzip = GzEncoder::new(Vec::new(), Compression::fast());
        gzip.write_all(&entries.concat()).unwrap();
        gzip.write_all(&[0; 1024]).unwrap();
        gzip.finish().unwrap()
    }

    fn unpacked(entries: &[Vec<u8>], limits: Limits) -> (tempfile::TempDir, Result<(), String>) {
        let dir = tempfile::tempdir().unwrap();
        let into = dir.path().join("into");
        std::fs::create_dir(&into).unwrap();
        std::fs::write(dir.path().join("canary"), "canary").unwrap();
        let result = unpack(&pack(entries)[..], &into, limits)
            .map_err(|error| super::super::error::chain(&error));
        let canary = std::fs::read_to_string(dir.path().join("canary")).unwrap();
        assert_eq!(canary, "canary");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2);
        (dir, result)
    }

    #[test]
    fn what_git_archives_becomes_a_checkout() {
        let long = format!("top/{}/{}", "d".repeat(150), "f".repeat(150));
        let record = format!("{} path={long}\n", long.len() + 10);
        let (dir, result) = unpacked(
            &[
                entry(
                    EntryType::XGlobalHeader,
                    "pax_global_header",
                    "19 comment=0123456\n",
                ),
                entry(EntryType::Directory, "top/", ""),
                entry(EntryType::Regular, "top/Dockerfile", "FROM scratch\n"),
                entry(EntryType::Symlink, "top/link", "/etc/../../passwd"),
                entry(EntryType::Directory, "top/src/", ""),
                entry(EntryType::Regular, "top/src/main", "x"),
                entry(EntryType::XHeader, "top/x", &record),
                entry(EntryType::Regular, "top/x", "long"),
            ],
            LIMITS,
        );
        assert_eq!(result, Ok(()));
        let into = dir.path().join("into");
        let text = std::fs::read_to_string(into.join("Dockerfile")).unwrap();
        assert_eq!(text, "FROM scratch\n");
        let metadata = into.join("src/main").metadata().unwrap();
        assert_eq!(metadata.permissions().mode() & 0o7777, 0o755);
        assert_eq!(metadata.mtime(), 1_700_000_000);
        assert_eq!(into.join("src").metadata().unwrap().mtime(), 1_700_000_000);
        let link = std::fs::read_link(into.join("link")).unwrap();
        assert_eq!(link, Path::new("/etc/../../passwd"));
        let long = into.join(long.strip_prefix("top/").unwrap());
        assert_eq!(std::fs::read_to_string(long).unwrap(), "long");
    }

    #[test]
    fn security_s01_nothing_leads_out() {
        let file = |name| entry(EntryType::Regular, name, "evil");
        let out = entry(EntryType::Symlink, "top/out", "../..");
        for (entries, expected) in [
            (
                vec![file("/canary")],
                "entry \"/canary\": its name is absolute",
            ),
            (
                vec![file("top/../../canary")],
                "entry \"top/../../canary\": its name leads out of the archive",
            ),
            (
                vec![out.clone(), file("top/out/canary")],
                "entry \"top/out/canary\": it is below something that is no directory",
            ),
            (
                vec![out.clone(), entry(EntryType::Directory, "top/out", "")],
                "entry \"top/out\": it is below something that is no directory",
            ),
            (
                vec![out, file("top/out")],
                "entry \"top/out\": the name is there twice",
            ),
            (
                vec![entry(EntryType::Link, "top/hard", "../canary")],
                "entry \"top/hard\": it is neither file nor directory nor symbolic link",
            ),
            (
                vec![entry(EntryType::Char, "top/null", "")],
                "entry \"top/null\": it is neither file nor directory nor symbolic link",
            ),
            (
                vec![file("top")],
                "entry \"top\": expected everything below one top directory",
            ),
            (
                vec![
                    entry(EntryType::XHeader, "x", "24 path=top/../../canary\n"),
                    file("top/x"),
                ],
                "entry \"\": an extended header is malformed",
            ),
            (
                vec![
                    entry(EntryType::XHeader, "x", "25 path=top/../../canary\n"),
                    file("top/x"),
                ],
                "entry \"top/../../canary\": its name leads out of the archive",
            ),
            (
                vec![entry(EntryType::XHeader, "x", "10 size=1\n"), file("top/x")],
                "entry \"\": a file of 8 GiB or more",
            ),
            (vec![], "it is empty"),
        ] {
            let (_dir, result) = unpacked(&entries, LIMITS);
            assert_eq!(result, Err(expected.to_owned()));
        }
    }

    #[test]
    fn security_s16_limits_end_bombs() {
        let big = vec![entry(
            EntryType::Regular,
            "top/zeros",
            &"\0".repeat(1 << 20),
        )];
        let (_dir, result) = unpacked(&big, LIMITS);
        assert_eq!(
            result,
            Err("creating \"top/zeros\": the unpacked archive (setting unpacked_limit) is larger than 1048576 bytes".to_owned())
        );
        let many: Vec<_> = (0..101)
            .map(|n| entry(EntryType::Regular, &format!("top/{n}"), ""))
            .collect();
        let (_dir, result) = unpacked(&many, LIMITS);
        assert_eq!(
            result,
            Err("it has more than 100 entries (setting entry_limit)".to_owned())
        );
        let header = vec![entry(EntryType::GNULongName, "x", &"x".repeat(70_000))];
        let (_dir, result) = unpacked(&header, LIMITS);
        assert_eq!(
            result,
            Err("reading the archive: an extended header is larger than 65536 bytes".to_owned())
        );
    }

    #[test]
    fn a_cut_archive_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let whole = pack(&[entry(EntryType::Regular, "top/f", &"x".repeat(4000))]);
        let error = unpack(&whole[..whole.len() / 2], dir.path(), LIMITS).unwrap_err();
        assert!(
            matches!(&error, ArchiveError::Read(_) | ArchiveError::Create { .. }),
            "{error}"
        );
    }
}
