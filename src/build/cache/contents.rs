//! The contents of a cache mount as two streams: what files there are, and what is in them.
//!
//! ```text
//! entries   a line of JSON each: the directory itself, then everything in it in path order
//! content   the bytes of all regular files, in the order of their entries
//! ```
//!
//! They are apart so that a file whose time or owner changed costs its line and not its
//! bytes. Both are cut into chunks ([`super::chunks`]); a chunk is one zstd frame, a blob.
//!
//! Not kept: sockets, devices, access times, and the attributes that layers do not have.
//! What is read may be hostile: paths, links and attributes are checked by
//! [`materialize`], which touches nothing outside its directory; sizes are limited here.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read, Seek, Write};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use percent_encoding::{AsciiSet, CONTROLS, percent_decode_str, percent_encode};
use serde::{Deserialize, Serialize};

use super::chunks::{Chunker, Cuts};
use super::document::{CHUNK_LIMIT_BYTES, Chunk};
use crate::image::Digest;
use crate::rootfs::{
    Change, ChangeKind, Data, Entry, FileContent, FileSource, Metadata, Stack, Time, Tree, changes,
    materialize,
};

/// Of the bytes of files. Most caches have few files larger than this, and many smaller ones.
const CONTENT_CUTS: Cuts = Cuts {
    min: 256 << 10,
    bits: 20,
    max: CHUNK_LIMIT_BYTES as usize,
};

/// Of the entries, of which few change: thousand files have some 150 KiB.
const ENTRY_CUTS: Cuts = Cuts {
    min: 16 << 10,
    bits: 15,
    max: 256 << 10,
};

/// Fast, and within some percent of the slower levels for what caches hold.
const ZSTD_LEVEL: i32 = 3;

/// The longest line of the entries, in bytes: a path, a link's target and what attributes
/// a file can have, all of them escaped.
const LINE_LIMIT_BYTES: u64 = 1 << 20;

/// The largest number of files in one cache mount.
const ENTRIES_LIMIT: usize = 5_000_000;

/// Larger files go through a temporary file and not through memory.
const MEMORY_LIMIT_BYTES: u64 = 1 << 20;

/// The directory that is restored, below the one that it is restored in.
const ROOT: &str = "files";

/// What is escaped in names, beside what is not ASCII.
const ESCAPED: &AsciiSet = &CONTROLS.add(b'%');

/// One file.
#[derive(Debug, Serialize, Deserialize)]
struct Line {
    /// Escaped; empty for the directory itself.
    path: String,
    mode: u32,
    uid: u32,
    gid: u32,
    /// Seconds and nanoseconds.
    mtime: (i64, u32),
    /// Names and values, escaped.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    xattrs: BTreeMap<String, String>,
    #[serde(flatten)]
    kind: Kind,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "lowercase")]
enum Kind {
    File { size: u64 },
    Directory,
    Symlink { target: String },
    Hardlink { target: String },
    Fifo,
}

/// Chunks of a directory.
pub(super) struct Packed {
    pub(super) entries: Vec<Chunk>,
    pub(super) content: Vec<Chunk>,
    /// Devices that are left out.
    pub(super) devices: Vec<PathBuf>,
}

/// Cuts the directory `dir` into chunks.
///
/// `known` gives the chunk with these bytes where there is a blob of it already, so that it is
/// not compressed again; all others are written to `blobs`, each under the hexadecimal digits
/// of its digest.
///
/// # Errors
/// That something cannot be read or written, or changes while it is read.
pub(super) fn pack(
    dir: &Path,
    known: &dyn Fn(&Digest) -> Option<Chunk>,
    blobs: &Path,
    is_cancelled: &dyn Fn() -> bool,
) -> anyhow::Result<Packed> {
    let (mut entries, mut content, mut devices) = (Vec::new(), Vec::new(), Vec::new());
    let seal = |chunks: &mut Vec<Chunk>, bytes: &[u8]| -> io::Result<()> {
        if is_cancelled() {
            return Err(io::Error::other("stopped"));
        }
        chunks.push(seal(bytes, known, blobs)?);
        Ok(())
    };
    let mut lines = Chunker::new(ENTRY_CUTS, |bytes: &[u8]| seal(&mut entries, bytes));
    let mut bytes = Chunker::new(CONTENT_CUTS, |bytes: &[u8]| seal(&mut content, bytes));

    let tree = Tree::open(dir).with_context(|| format!("opening {}", dir.display()))?;
    let found = fs::metadata(dir).with_context(|| format!("reading {}", dir.display()))?;
    let root = Metadata {
        mode: found.mode() & 0o7777,
        uid: found.uid(),
        gid: found.gid(),
        mtime: Time {
            seconds: found.mtime(),
            nanoseconds: u32::try_from(found.mtime_nsec()).unwrap_or(0),
        },
        xattrs: BTreeMap::new(),
    };
    write_line(&mut lines, Path::new(""), &root, Kind::Directory)?;
    // On top of nothing, everything is a change.
    for change in changes(&tree, &Stack::default()) {
        let Change { path, kind } = change?;
        let ChangeKind::Entry(Entry { metadata, data }) = kind else {
            continue;
        };
        let kind = match data {
            Data::File(FileContent { size_bytes, source }) => {
                copy(source, size_bytes, &mut bytes)
                    .with_context(|| format!("reading {path:?} in {}", dir.display()))?;
                Kind::File { size: size_bytes }
            }
            Data::Directory { .. } => Kind::Directory,
            Data::Symlink(target) => Kind::Symlink {
                target: escape(&target),
            },
            Data::Hardlink(target) => Kind::Hardlink {
                target: escape(target.as_os_str()),
            },
            Data::Fifo => Kind::Fifo,
            Data::CharDevice { .. } | Data::BlockDevice { .. } => {
                devices.push(path);
                continue;
            }
        };
        write_line(&mut lines, &path, &metadata, kind)?;
    }
    lines.finish().context("writing a chunk")?;
    bytes.finish().context("writing a chunk")?;
    Ok(Packed {
        entries,
        content,
        devices,
    })
}

fn seal(bytes: &[u8], known: &dyn Fn(&Digest) -> Option<Chunk>, blobs: &Path) -> io::Result<Chunk> {
    let digest = Digest::of(bytes);
    if let Some(chunk) = known(&digest) {
        return Ok(chunk);
    }
    let compressed = zstd::bulk::compress(bytes, ZSTD_LEVEL)?;
    let blob = Digest::of(&compressed);
    let path = blobs.join(blob.hex());
    if !path.exists() {
        fs::write(path, &compressed)?;
    }
    Ok(Chunk {
        digest,
        bytes: bytes.len() as u64,
        blob,
        size: compressed.len() as u64,
    })
}

/// The bytes of a chunk from those of its blob, whose digest was checked.
///
/// # Errors
/// That they are not what they were said to be.
pub(super) fn open(chunk: &Chunk, blob: &[u8]) -> io::Result<Vec<u8>> {
    let bad = |reason: &str| {
        let message = format!("the chunk {} is {reason}", chunk.blob);
        io::Error::new(io::ErrorKind::InvalidData, message)
    };
    let limit = usize::try_from(chunk.bytes.min(CHUNK_LIMIT_BYTES)).unwrap_or(0);
    let bytes = zstd::bulk::decompress(blob, limit)
        .map_err(|_| bad("damaged, or larger than it was said to be"))?;
    if bytes.len() as u64 != chunk.bytes || Digest::of(&bytes) != chunk.digest {
        return Err(bad("not what it was said to be"));
    }
    Ok(bytes)
}

fn copy(source: FileSource, size: u64, out: &mut impl Write) -> io::Result<()> {
    let mut file = source.reader()?;
    let copied = io::copy(&mut (&mut file).take(size), out)?;
    let is_over = file.read(&mut [0])? == 0;
    if copied == size && is_over {
        return Ok(());
    }
    Err(io::Error::other("it has changed while it was read"))
}

fn write_line(
    out: &mut impl Write,
    path: &Path,
    metadata: &Metadata,
    kind: Kind,
) -> anyhow::Result<()> {
    let xattrs = metadata.xattrs.iter();
    let line = Line {
        path: escape(path.as_os_str()),
        mode: metadata.mode,
        uid: metadata.uid,
        gid: metadata.gid,
        mtime: (metadata.mtime.seconds, metadata.mtime.nanoseconds),
        xattrs: xattrs
            .map(|(name, value)| (escape(name), escape(OsStr::from_bytes(value))))
            .collect(),
        kind,
    };
    let mut line = serde_json::to_vec(&line).context("writing an entry")?;
    line.push(b'\n');
    out.write_all(&line).context("writing a chunk")
}

fn escape(text: &OsStr) -> String {
    percent_encode(text.as_bytes(), ESCAPED).to_string()
}

fn unescape(text: &str) -> OsString {
    OsString::from_vec(percent_decode_str(text).collect())
}

/// Makes the directory again, from its two streams, in the empty directory `dir`. Gives its path.
///
/// # Errors
/// That the streams are not those of a directory, or that one of them fails; that the
/// directory cannot hold what they say. `dir` is then to be removed.
pub(super) fn restore(
    entries: impl Read,
    content: impl Read,
    dir: &Path,
) -> anyhow::Result<PathBuf> {
    let spool = tempfile::Builder::new()
        .prefix("spool-")
        .tempdir_in(dir.parent().unwrap_or(dir))
        .context("creating a directory for large files")?;
    let mut files = Files {
        lines: BufReader::new(entries),
        content,
        spool: spool.path(),
        count: 0,
    };
    let mut failure = None;
    let list = std::iter::from_fn(|| match files.next() {
        Ok(change) => change,
        Err(error) => {
            failure = Some(error);
            None
        }
    });
    let made = materialize(list, dir);
    if let Some(error) = failure {
        return Err(error);
    }
    made?;
    let mut rest = [0];
    let is_over = files.content.read(&mut rest).context("reading a chunk")? == 0;
    anyhow::ensure!(is_over, "there is more content than the entries say");
    anyhow::ensure!(files.count > 0, "there are no entries");
    Ok(dir.join(ROOT))
}

/// The files of two streams.
struct Files<'d, E, C> {
    lines: BufReader<E>,
    content: C,
    spool: &'d Path,
    count: usize,
}

impl<E: Read, C: Read> Files<'_, E, C> {
    fn next(&mut self) -> anyhow::Result<Option<Change>> {
        let mut line = Vec::new();
        let mut limited = (&mut self.lines).take(LINE_LIMIT_BYTES);
        limited
            .read_until(b'\n', &mut line)
            .context("reading a chunk")?;
        if line.is_empty() {
            return Ok(None);
        }
        self.count += 1;
        anyhow::ensure!(
            line.ends_with(b"\n") && self.count <= ENTRIES_LIMIT,
            "entry {} is longer than {LINE_LIMIT_BYTES} bytes, cut off, or one too many",
            self.count
        );
        let line: Line = serde_json::from_slice(&line)
            .with_context(|| format!("entry {} is malformed", self.count))?;
        let is_root = self.count == 1;
        anyhow::ensure!(
            is_root == line.path.is_empty() && (!is_root || matches!(line.kind, Kind::Directory)),
            "the first entry, and no other, is the directory itself"
        );
        anyhow::ensure!(
            line.mtime.1 < 1_000_000_000,
            "entry {} has a time with too many nanoseconds",
            self.count
        );
        let data = match line.kind {
            Kind::File { size } => Data::File(FileContent {
                size_bytes: size,
                source: self.read(size)?,
            }),
            Kind::Directory => Data::Directory { opaque: false },
            Kind::Symlink { target } => Data::Symlink(unescape(&target)),
            Kind::Hardlink { target } => Data::Hardlink(below(&target)),
            Kind::Fifo => Data::Fifo,
        };
        let xattrs = line.xattrs.iter();
        let metadata = Metadata {
            mode: line.mode & 0o7777,
            uid: line.uid,
            gid: line.gid,
            mtime: Time {
                seconds: line.mtime.0,
                nanoseconds: line.mtime.1,
            },
            xattrs: xattrs
                .map(|(name, value)| (unescape(name), unescape(value).into_vec()))
                .collect(),
        };
        Ok(Some(Change {
            path: if is_root {
                PathBuf::from(ROOT)
            } else {
                below(&line.path)
            },
            kind: ChangeKind::Entry(Entry { metadata, data }),
        }))
    }

    /// The next `size` bytes of content.
    fn read(&mut self, size: u64) -> anyhow::Result<FileSource> {
        let mut limited = (&mut self.content).take(size);
        let (source, got) = if size <= MEMORY_LIMIT_BYTES {
            let mut bytes = Vec::new();
            limited.read_to_end(&mut bytes).context("reading a chunk")?;
            let got = bytes.len() as u64;
            (FileSource::Bytes(bytes.into()), got)
        } else {
            let mut file: File =
                tempfile::tempfile_in(self.spool).context("creating a temporary file")?;
            let got = io::copy(&mut limited, &mut file).context("reading a chunk")?;
            file.rewind().context("reading a temporary file")?;
            (FileSource::Open(Box::new(move || Ok(file))), got)
        };
        anyhow::ensure!(
            got == size,
            "the content ends within entry {}: {got} of {size} bytes",
            self.count
        );
        Ok(source)
    }
}

/// Not [`Path::join`]: what is hostile may be absolute, and is refused as it is.
fn below(path: &str) -> PathBuf {
    let mut whole = OsString::from(ROOT);
    whole.push("/");
    whole.push(unescape(path));
    whole.into()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use super::*;

    struct Fixture {
        dir: tempfile::TempDir,
    }

    fn fixture() -> Fixture {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("blobs")).unwrap();
        Fixture { dir }
    }

    impl Fixture {
        fn source(&self) -> PathBuf {
            self.dir.path().join("source")
        }

        fn pack(&self) -> Packed {
            let blobs = self.dir.path().join("blobs");
            pack(&self.source(), &|_| None, &blobs, &|| false).unwrap()
        }

        fn bytes(&self, chunks: &[Chunk]) -> Vec<u8> {
            let blobs = chunks.iter().map(|chunk| {
                let path = self.dir.path().join("blobs").join(chunk.blob.hex());
                let blob = fs::read(path).unwrap();
                assert_eq!(
                    (blob.len() as u64, Digest::of(&blob)),
                    (chunk.size, chunk.blob.clone())
                );
                open(chunk, &blob).unwrap()
            });
            blobs.collect::<Vec<_>>().concat()
        }

        fn restore(&self, entries: &[u8], content: &[u8]) -> anyhow::Result<PathBuf> {
            let dir = tempfile::tempdir_in(self.dir.path()).unwrap().keep();
            restore(entries, content, &dir)
        }
    }

    fn listing(dir: &Path) -> Vec<String> {
        let tree = Tree::open(dir).unwrap();
        let list = changes(&tree, &Stack::default());
        let text = |change: Change| format!("{:?} {:?}", change.path, change.kind);
        list.map(|change| text(change.unwrap())).collect()
    }

    #[test]
    fn a_directory_is_made_again_as_it_was() {
        let fixture = fixture();
        let source = fixture.source();
        fs::create_dir_all(source.join("a/empty")).unwrap();
        fs::write(source.join("a/file"), "text").unwrap();
        fs::write(source.join("a/.wh.name"), "").unwrap();
        fs::hard_link(source.join("a/file"), source.join("b")).unwrap();
        symlink("../../etc/passwd", source.join("link")).unwrap();
        let odd = source.join(OsStr::from_bytes(b"new\nline %41 \xff \xc3\xa9"));
        fs::write(&odd, "odd").unwrap();
        let large = vec![7; MEMORY_LIMIT_BYTES as usize + 1];
        fs::write(source.join("large"), &large).unwrap();
        fs::set_permissions(source.join("a"), fs::Permissions::from_mode(0o2710)).unwrap();
        fs::set_permissions(&source, fs::Permissions::from_mode(0o700)).unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(source.join("socket")).unwrap();

        let packed = fixture.pack();
        let (entries, content) = (
            fixture.bytes(&packed.entries),
            fixture.bytes(&packed.content),
        );
        let made = fixture.restore(&entries, &content).unwrap();
        fs::remove_file(source.join("socket")).unwrap();
        assert_eq!(listing(&made), listing(&source));
        assert_eq!(fs::metadata(&made).unwrap().mode() & 0o7777, 0o700);
        assert!(fs::read(made.join("large")).unwrap() == large);
        assert_eq!(fs::read(made.join("b")).unwrap(), b"text");
        let inode = |name: &str| fs::metadata(made.join(name)).unwrap().ino();
        assert_eq!(inode("a/file"), inode("b"));
        let times = |path: &Path| {
            let found = fs::symlink_metadata(path).unwrap();
            (found.mtime(), found.mtime_nsec())
        };
        for name in ["a", "a/file", "link", "large"] {
            assert_eq!(times(&made.join(name)), times(&source.join(name)), "{name}");
        }
        // It is the same again, to the byte.
        let again = fixture.pack();
        assert_eq!(fixture.bytes(&again.content), content);
        assert_eq!(again.content, packed.content);
    }

    #[test]
    fn what_is_known_is_not_compressed_again_and_times_cost_no_content() {
        let fixture = fixture();
        let source = fixture.source();
        fs::create_dir(&source).unwrap();
        fs::write(source.join("f"), "content").unwrap();
        let first = fixture.pack();
        fs::remove_dir_all(fixture.dir.path().join("blobs")).unwrap();
        fs::create_dir(fixture.dir.path().join("blobs")).unwrap();
        let file = File::options().write(true).open(source.join("f")).unwrap();
        file.set_modified(std::time::UNIX_EPOCH).unwrap();
        let all: Vec<Chunk> = first
            .entries
            .iter()
            .chain(&first.content)
            .cloned()
            .collect();
        let known = |digest: &Digest| all.iter().find(|c| c.digest == *digest).cloned();
        let blobs = fixture.dir.path().join("blobs");
        let second = pack(&source, &known, &blobs, &|| false).unwrap();
        assert_eq!(second.content, first.content);
        assert_ne!(second.entries, first.entries);
        assert_eq!(fs::read_dir(&blobs).unwrap().count(), second.entries.len());
        let stopped = pack(&source, &known, &blobs, &|| true);
        assert!(format!("{:#}", stopped.err().unwrap()).contains("stopped"));
    }

    #[test]
    fn security_s01_hostile_streams_are_errors_and_touch_nothing_else() {
        let fixture = fixture();
        let root = r#"{"path":"","mode":493,"uid":UID,"gid":GID,"mtime":[0,0],"type":"directory"}"#;
        let (uid, gid) = (rustix::process::getuid(), rustix::process::getgid());
        let own = |text: &str| {
            text.replace("UID", &uid.as_raw().to_string())
                .replace("GID", &gid.as_raw().to_string())
        };
        let entry = |path: &str, rest: &str| {
            own(&format!(
                r#"{{"path":"{path}","mode":420,"uid":UID,"gid":GID,"mtime":[0,0],{rest}}}"#
            ))
        };
        let file = r#""type":"file","size":1"#;
        let check = |lines: &[String], content: &str, want: &str| {
            let entries = lines.iter().map(|line| format!("{line}\n"));
            let entries: String = entries.collect();
            let error = fixture.restore(entries.as_bytes(), content.as_bytes());
            let error = format!("{:#}", error.unwrap_err());
            assert!(error.contains(want), "{error}");
        };
        let root = own(root);
        for path in [
            "../out",
            "/etc/out",
            "a/../../out",
            ".",
            "a//b",
            "x%00y",
            "no/parent",
        ] {
            check(&[root.clone(), entry(path, file)], "x", "files/");
        }
        let link = entry("l", r#""type":"symlink","target":"../../../out""#);
        check(&[root.clone(), link, entry("l/f", file)], "x", "before it");
        let out = fixture.dir.path().join("out");
        fs::write(&out, "").unwrap();
        for target in ["../../out", "/etc/passwd", "none"] {
            let link = entry("l", &format!(r#""type":"hardlink","target":"{target}""#));
            check(&[root.clone(), link], "", "files/");
        }
        assert_eq!(fs::metadata(&out).unwrap().nlink(), 1);
        let overlay = entry(
            "d",
            r#""type":"directory","xattrs":{"trusted.overlay.opaque":"y"}"#,
        );
        check(&[root.clone(), overlay], "", "trusted.overlay.opaque");
        let twice = [root.clone(), entry("f", file), entry("f", file)];
        check(&twice, "xx", "twice");
        check(
            &[root.clone(), entry("f", file)],
            "",
            "the content ends within entry 2",
        );
        check(&[root.clone(), entry("f", file)], "xy", "more content");
        let huge = entry("f", r#""type":"file","size":18446744073709551615"#);
        check(&[root.clone(), huge], "x", "the content ends");
        check(&[entry("f", file)], "x", "the first entry");
        check(&[root.clone(), root.clone()], "", "the first entry");
        check(&[], "", "no entries");
        check(&["nonsense".to_owned()], "", "entry 1 is malformed");
        check(&[" ".repeat(LINE_LIMIT_BYTES as usize)], "", "longer than");
        let nanos = root.replace("[0,0]", "[0,1000000000]");
        check(&[nanos], "", "nanoseconds");
    }

    #[test]
    fn security_s18_a_chunk_is_what_it_says_or_an_error() {
        let bytes = vec![0; 100_000];
        let blob = zstd::bulk::compress(&bytes, 3).unwrap();
        let chunk = Chunk {
            digest: Digest::of(&bytes),
            bytes: bytes.len() as u64,
            blob: Digest::of(&blob),
            size: blob.len() as u64,
        };
        assert!(open(&chunk, &blob).unwrap() == bytes);
        let wrong = |edit: &dyn Fn(&mut Chunk)| {
            let mut chunk = chunk.clone();
            edit(&mut chunk);
            open(&chunk, &blob).unwrap_err().to_string()
        };
        assert!(wrong(&|c| c.bytes -= 1).contains("larger"));
        assert!(wrong(&|c| c.bytes += 1).contains("not what"));
        assert!(wrong(&|c| c.digest = Digest::of(b"")).contains("not what"));
        assert!(open(&chunk, b"garbage").is_err());
    }
}
