//! [`ContentManifest`]: what a step reads, listed; its digest is the content key.
//!
//! One entry for each file, directory, link, … that a COPY, an ADD or a mount reads, with
//! everything of it that reaches the step: names, types, modes, owners, link targets, which
//! names are of one file, and the digests of contents. Times do not count, unless they came
//! from the server that the file came from.
//!
//! # The text
//!
//! It is kept beside a cache record, so that a later miss can be told in names. Lines end in
//! a line feed, fields are separated by one space, and bytes of names that are not printable
//! ASCII, spaces and `%` are written `%XX`.
//!
//! ```text
//! sockless content 1
//! = src                                   a source, and where it is in its tree
//! d 755 0:0 - lib                         a directory
//! d^ 755 0:0 - lib                        one that is there only for what is in it
//! f 644 0:0 <64 digits> lib/a.rs          a file and the SHA-256 of its content
//! a 644 0:0 <64 digits> .                 an archive that is unpacked
//! t 0 0:0 <64 digits> name                a text of the Dockerfile
//! l 777 0:0 ../a.rs lib/link              a symbolic link and its target
//! h 644 0:0 lib/a.rs lib/b.rs             another name of a file of this source
//! p, s, c, b                              a pipe, a socket, a character and a block device
//! L 0 0:0 sha256:<64 digits> .            a whole filesystem, known by its layers
//! ```
//!
//! Behind the path may stand `device=8:1`, `time=<seconds>.<nanoseconds>` and
//! `xattrs=<64 digits>`, in this order. Paths are relative to their source, which itself is
//! `.`; sources are in the order in which the step names them, entries in path order.
//!
//! The digest is that of the text without the names of sources: the same files give the
//! same layer, wherever they are read.

#![cfg_attr(
    not(test),
    allow(
        dead_code,
        reason = "reading and comparing texts is for who explains misses"
    )
)]

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use rustix::fs::FileType;

use crate::image::{Digest, Hasher};
use crate::rootfs::{Metadata, Time};

/// The first line. Counts up when the same text comes to mean something else.
const HEADER: &str = "sockless content 1";

/// What a step reads.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct ContentManifest {
    /// In the order in which the step names them.
    pub(super) sources: Vec<Source>,
}

/// One of the things that a step reads, with everything in it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Source {
    /// Where it is in the context or filesystem that it is read from; for people.
    pub(super) name: PathBuf,
    /// Parents before children, siblings by name.
    pub(super) entries: Vec<Entry>,
}

/// One path of a [`Source`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    /// Relative to the source; empty for the source itself.
    pub(super) path: PathBuf,
    /// What it is.
    pub(super) kind: Kind,
    /// Permission bits with setuid, setgid and sticky.
    pub(super) mode: u32,
    /// User and group.
    pub(super) owner: (u32, u32),
    /// Major and minor number of a device.
    pub(super) device: (u32, u32),
    /// When it was modified, where that counts.
    pub(super) time: Option<Time>,
    /// The digest of the extended attributes, where there are any.
    pub(super) xattrs: Option<Digest>,
}

/// The type of an [`Entry`], and its content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// A regular file and its bytes.
    File(Digest),
    /// An archive that is unpacked, and its bytes.
    Archive(Digest),
    /// A text of the Dockerfile.
    Text(Digest),
    /// A directory.
    Directory {
        /// Whether it is there only for what is in it.
        is_parent: bool,
    },
    /// A symbolic link and its target.
    Symlink(PathBuf),
    /// Another name of the file at this path of the same source.
    Hardlink(PathBuf),
    /// A named pipe.
    Fifo,
    /// A socket.
    Socket,
    /// A character device.
    CharDevice,
    /// A block device.
    BlockDevice,
    /// A whole filesystem: the chain ID of its layers; absent for an empty one.
    Layers(Option<Digest>),
}

/// How a path differs between two manifests.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Difference {
    /// The path in the context or filesystem that is read.
    pub(super) path: PathBuf,
    /// How.
    pub(super) change: ContentChange,
}

/// What became of a path.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum ContentChange {
    /// It was not there.
    Added,
    /// It is not there any more.
    Removed,
    /// It is there, but otherwise: what of it, such as `content` and `mode`, in a fixed order.
    Changed(Vec<&'static str>),
}

impl fmt::Display for Difference {
    /// Such as `src/a.rs changed`, `src/a.rs changed (mode)`, `src/b.rs added`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = if self.path.as_os_str().is_empty() {
            Path::new(".")
        } else {
            &self.path
        };
        write!(f, "{}", path.display())?;
        match &self.change {
            ContentChange::Added => f.write_str(" added"),
            ContentChange::Removed => f.write_str(" removed"),
            ContentChange::Changed(what) if what == &["content"] => f.write_str(" changed"),
            ContentChange::Changed(what) => write!(f, " changed ({})", what.join(", ")),
        }
    }
}

impl Entry {
    /// An entry with the metadata of a file. `kind` is a [`Kind`] without those that stand for
    /// something else than a file.
    pub(super) fn new(path: &Path, kind: Kind, metadata: &Metadata) -> Self {
        Self {
            path: path.to_owned(),
            kind,
            mode: metadata.mode,
            owner: (metadata.uid, metadata.gid),
            device: (0, 0),
            time: None,
            xattrs: None,
        }
    }

    /// What a file that is neither regular file, directory nor link is.
    pub(super) fn special(file_type: FileType) -> Option<Kind> {
        match file_type {
            FileType::Fifo => Some(Kind::Fifo),
            FileType::Socket => Some(Kind::Socket),
            FileType::CharacterDevice => Some(Kind::CharDevice),
            FileType::BlockDevice => Some(Kind::BlockDevice),
            _ => None,
        }
    }

    fn push_line(&self, out: &mut Vec<u8>) {
        use std::io::Write as _;
        let letter: &[u8] = match &self.kind {
            Kind::File(_) => b"f",
            Kind::Archive(_) => b"a",
            Kind::Text(_) => b"t",
            Kind::Directory { is_parent: false } => b"d",
            Kind::Directory { is_parent: true } => b"d^",
            Kind::Symlink(_) => b"l",
            Kind::Hardlink(_) => b"h",
            Kind::Fifo => b"p",
            Kind::Socket => b"s",
            Kind::CharDevice => b"c",
            Kind::BlockDevice => b"b",
            Kind::Layers(_) => b"L",
        };
        out.extend(letter);
        let (uid, gid) = self.owner;
        // Writing to a vector cannot fail.
        let _ = write!(out, " {:o} {uid}:{gid} ", self.mode);
        match &self.kind {
            Kind::File(digest) | Kind::Archive(digest) | Kind::Text(digest) => {
                out.extend(digest.hex().as_bytes());
            }
            Kind::Symlink(path) | Kind::Hardlink(path) => push_escaped(out, path),
            Kind::Layers(Some(chain)) => out.extend(chain.as_str().as_bytes()),
            _ => out.push(b'-'),
        }
        out.push(b' ');
        push_escaped(out, &self.path);
        if self.device != (0, 0) {
            let _ = write!(out, " device={}:{}", self.device.0, self.device.1);
        }
        if let Some(time) = self.time {
            let _ = write!(out, " time={}.{:09}", time.seconds, time.nanoseconds);
        }
        if let Some(digest) = &self.xattrs {
            let _ = write!(out, " xattrs={}", digest.hex());
        }
        out.push(b'\n');
    }

    fn parse(line: &str) -> Option<Self> {
        let mut fields = line.split(' ');
        let letter = fields.next()?;
        let mode = u32::from_str_radix(fields.next()?, 8).ok()?;
        let (uid, gid) = fields.next()?.split_once(':')?;
        let owner = (uid.parse().ok()?, gid.parse().ok()?);
        let content = fields.next()?;
        let path = unescape(fields.next()?)?;
        let digest = || Digest::parse(&format!("sha256:{content}")).ok();
        let kind = match letter {
            "f" => Kind::File(digest()?),
            "a" => Kind::Archive(digest()?),
            "t" => Kind::Text(digest()?),
            "l" => Kind::Symlink(unescape(content)?),
            "h" => Kind::Hardlink(unescape(content)?),
            "L" if content != "-" => Kind::Layers(Some(Digest::parse(content).ok()?)),
            _ if content != "-" => return None,
            "d" => Kind::Directory { is_parent: false },
            "d^" => Kind::Directory { is_parent: true },
            "p" => Kind::Fifo,
            "s" => Kind::Socket,
            "c" => Kind::CharDevice,
            "b" => Kind::BlockDevice,
            "L" => Kind::Layers(None),
            _ => return None,
        };
        let mut entry = Self {
            path,
            kind,
            mode,
            owner,
            device: (0, 0),
            time: None,
            xattrs: None,
        };
        for field in fields {
            match field.split_once('=')? {
                ("device", numbers) => {
                    let (major, minor) = numbers.split_once(':')?;
                    entry.device = (major.parse().ok()?, minor.parse().ok()?);
                }
                ("time", time) => {
                    let (seconds, nanoseconds) = time.split_once('.')?;
                    entry.time = Some(Time {
                        seconds: seconds.parse().ok()?,
                        nanoseconds: nanoseconds.parse().ok()?,
                    });
                }
                ("xattrs", digits) => {
                    entry.xattrs = Some(Digest::parse(&format!("sha256:{digits}")).ok()?);
                }
                _ => return None,
            }
        }
        Some(entry)
    }

    /// What of it is not as in `other`.
    fn differences(&self, other: &Self) -> Vec<&'static str> {
        let is_same_kind =
            std::mem::discriminant(&self.kind) == std::mem::discriminant(&other.kind);
        let content = match (&self.kind, &other.kind) {
            _ if !is_same_kind => Some("type"),
            (a, b) if a == b => None,
            (Kind::Symlink(_), _) => Some("target"),
            (Kind::Hardlink(_), _) => Some("which file it is a name of"),
            (Kind::Layers(_), _) => Some("layers"),
            (Kind::Directory { .. }, _) => Some("whether it is copied itself"),
            _ => Some("content"),
        };
        let facts = [
            (self.mode != other.mode, "mode"),
            (self.owner != other.owner, "owner"),
            (self.device != other.device, "device number"),
            (self.time != other.time, "time"),
            (self.xattrs != other.xattrs, "extended attributes"),
        ];
        let facts = facts.into_iter().filter(|(differs, _)| *differs);
        content
            .into_iter()
            .chain(facts.map(|(_, what)| what))
            .collect()
    }
}

impl ContentManifest {
    /// The content key.
    pub(super) fn digest(&self) -> Digest {
        let mut hasher = Hasher::new();
        self.write(false, |bytes| hasher.update(bytes));
        hasher.finish()
    }

    /// The text; see the module.
    pub(super) fn to_text(&self) -> Vec<u8> {
        let mut text = Vec::new();
        self.write(true, |bytes| text.extend(bytes));
        text
    }

    fn write(&self, with_names: bool, mut out: impl FnMut(&[u8])) {
        let mut line = format!("{HEADER}\n").into_bytes();
        for source in &self.sources {
            line.push(b'=');
            if with_names {
                line.push(b' ');
                push_escaped(&mut line, &source.name);
            }
            line.push(b'\n');
            for entry in &source.entries {
                entry.push_line(&mut line);
                if line.len() > 1 << 16 {
                    out(&line);
                    line.clear();
                }
            }
        }
        out(&line);
    }

    /// Reads the text. `None` for anything else, such as one of another version, or one that
    /// ends inside of a line.
    pub(super) fn parse(text: &[u8]) -> Option<Self> {
        let text = str::from_utf8(text).ok()?.strip_suffix('\n')?;
        let mut lines = text.split('\n');
        if lines.next()? != HEADER {
            return None;
        }
        let mut manifest = Self::default();
        for line in lines {
            match line.strip_prefix("= ") {
                Some(name) => manifest.sources.push(Source {
                    name: unescape(name)?,
                    entries: Vec::new(),
                }),
                None => {
                    let source = manifest.sources.last_mut()?;
                    source.entries.push(Entry::parse(line)?);
                }
            }
        }
        Some(manifest)
    }

    /// How `self` became `new`, by path. Empty where all that is read is the same, though
    /// sources may stand in another order.
    pub(super) fn compare(&self, new: &Self) -> Vec<Difference> {
        let mut old = self.by_path();
        let mut differences = Vec::new();
        for ((path, number), entry) in new.by_path() {
            let change = match old.remove(&(path.clone(), number)) {
                None => ContentChange::Added,
                Some(before) => match before.differences(entry) {
                    nothing if nothing.is_empty() => continue,
                    what => ContentChange::Changed(what),
                },
            };
            differences.push(Difference { path, change });
        }
        differences.extend(old.into_keys().map(|(path, _)| Difference {
            path,
            change: ContentChange::Removed,
        }));
        differences.sort();
        differences
    }

    /// All entries by where they are read, and, where that is read several times, which time.
    fn by_path(&self) -> BTreeMap<(PathBuf, usize), &Entry> {
        let mut entries = BTreeMap::new();
        for source in &self.sources {
            for entry in &source.entries {
                let path = match entry.path.as_os_str().is_empty() {
                    true => source.name.clone(),
                    false => source.name.join(&entry.path),
                };
                let mut key = (path, 0);
                while entries.contains_key(&key) {
                    key.1 += 1;
                }
                entries.insert(key, entry);
            }
        }
        entries
    }
}

/// The digest of extended attributes; none where there are none.
pub(super) fn xattrs_digest(xattrs: &BTreeMap<OsString, Vec<u8>>) -> Option<Digest> {
    if xattrs.is_empty() {
        return None;
    }
    let mut hasher = Hasher::new();
    for (name, value) in xattrs {
        for field in [name.as_bytes(), value] {
            hasher.update(&(field.len() as u64).to_le_bytes());
            hasher.update(field);
        }
    }
    Some(hasher.finish())
}

const DIGITS: &[u8; 16] = b"0123456789ABCDEF";

fn push_escaped(out: &mut Vec<u8>, path: &Path) {
    let bytes = path.as_os_str().as_bytes();
    if bytes.is_empty() {
        out.push(b'.');
    }
    for &byte in bytes {
        if byte.is_ascii_graphic() && byte != b'%' {
            out.push(byte);
        } else {
            let digits = [byte >> 4, byte & 15].map(|digit| DIGITS[usize::from(digit)]);
            out.extend([b'%', digits[0], digits[1]]);
        }
    }
}

fn unescape(text: &str) -> Option<PathBuf> {
    match text {
        "" => return None,
        "." => return Some(PathBuf::new()),
        _ => {}
    }
    let mut bytes = text.bytes();
    let mut path = Vec::with_capacity(text.len());
    while let Some(byte) = bytes.next() {
        let mut digit = || char::from(bytes.next()?).to_digit(16);
        path.push(match byte {
            b'%' => u8::try_from(digit()? << 4 | digit()?).ok()?,
            byte if byte.is_ascii_graphic() => byte,
            _ => return None,
        });
    }
    // The empty path is written that way, and no name is.
    (path != b".").then(|| PathBuf::from(OsString::from_vec(path)))
}

/// The path of a source of one file, which is called `name` there and lies at `path`.
pub(super) fn source_of_file(path: &Path, name: &OsStr) -> PathBuf {
    match path.parent() {
        Some(parent) if path.file_name() == Some(name) => parent.to_owned(),
        _ => PathBuf::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(path: &str, kind: Kind) -> Entry {
        Entry::new(
            Path::new(path),
            kind,
            &Metadata {
                mode: 0o644,
                ..Metadata::default()
            },
        )
    }

    fn manifest(name: &str, entries: Vec<Entry>) -> ContentManifest {
        let source = Source {
            name: name.into(),
            entries,
        };
        ContentManifest {
            sources: vec![source],
        }
    }

    fn everything() -> ContentManifest {
        let a = || Digest::of(b"a");
        let odd = PathBuf::from(OsString::from_vec(b"a b%\n\xff".to_vec()));
        let mut device = entry("dev", Kind::CharDevice);
        device.device = (8, 1);
        let mut dated = entry("x", Kind::File(a()));
        dated.time = Some(Time {
            seconds: -5,
            nanoseconds: 7,
        });
        dated.xattrs = xattrs_digest(&BTreeMap::from([("user.a".into(), b"b".to_vec())]));
        let mut all = manifest(
            "src",
            vec![
                entry("", Kind::Directory { is_parent: false }),
                entry("d", Kind::Directory { is_parent: true }),
                entry("d/f", Kind::File(a())),
                entry("d/g", Kind::Hardlink("d/f".into())),
                entry("d/l", Kind::Symlink("../..".into())),
                Entry {
                    path: odd,
                    ..entry("", Kind::Symlink("%".into()))
                },
                entry("p", Kind::Fifo),
                entry("s", Kind::Socket),
                device,
                entry("block", Kind::BlockDevice),
                dated,
            ],
        );
        all.sources.push(Source {
            name: PathBuf::new(),
            entries: vec![
                entry("", Kind::Archive(a())),
                entry("t", Kind::Text(a())),
                entry("", Kind::Layers(None)),
                entry("", Kind::Layers(Some(a()))),
            ],
        });
        all
    }

    #[test]
    fn the_text_is_as_documented_and_read_back() {
        let all = everything();
        let text = all.to_text();
        let a = "ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb";
        let x = xattrs_digest(&BTreeMap::from([("user.a".into(), b"b".to_vec())])).unwrap();
        let expected = format!(
            "sockless content 1\n\
             = src\n\
             d 644 0:0 - .\n\
             d^ 644 0:0 - d\n\
             f 644 0:0 {a} d/f\n\
             h 644 0:0 d/f d/g\n\
             l 644 0:0 ../.. d/l\n\
             l 644 0:0 %25 a%20b%25%0A%FF\n\
             p 644 0:0 - p\n\
             s 644 0:0 - s\n\
             c 644 0:0 - dev device=8:1\n\
             b 644 0:0 - block\n\
             f 644 0:0 {a} x time=-5.000000007 xattrs={}\n\
             = .\n\
             a 644 0:0 {a} .\n\
             t 644 0:0 {a} t\n\
             L 644 0:0 - .\n\
             L 644 0:0 sha256:{a} .\n",
            x.hex()
        );
        assert_eq!(String::from_utf8(text.clone()).unwrap(), expected);
        assert_eq!(ContentManifest::parse(&text).unwrap(), all);
        // Names of sources are for people.
        let mut renamed = all.clone();
        renamed.sources[0].name = "other".into();
        assert_eq!(renamed.digest(), all.digest());
        assert_ne!(renamed.to_text(), text);
        let without = expected.replace("= src\n", "=\n").replace("= .\n", "=\n");
        assert_eq!(all.digest(), Digest::of(without.as_bytes()));
    }

    #[test]
    fn texts_that_are_none_are_refused() {
        let text = everything().to_text();
        // Cut anywhere and with any byte changed it is refused or read as something; neither
        // panics, and what is read is written the same.
        for end in 0..text.len() {
            let cut = ContentManifest::parse(&text[..end]);
            let is_line = end > 0 && text[end - 1] == b'\n';
            assert_eq!(cut.is_some(), is_line, "{end}");
            for byte in [b' ', b'\n', b'=', b'%', b'9', 0xff] {
                let mut damaged = text.clone();
                damaged[end] = byte;
                if let Some(read) = ContentManifest::parse(&damaged) {
                    assert_eq!(ContentManifest::parse(&read.to_text()), Some(read));
                }
            }
        }
        for bad in [
            "",
            "sockless content 2\n",
            "sockless content 1\nf 644 0:0 - a\n",
            "sockless content 1\n= .\nf 644 0:0 - a\n",
            "sockless content 1\n= .\nd 888 0:0 - a\n",
            "sockless content 1\n= .\nd 644 0 - a\n",
            "sockless content 1\n= .\nd 644 0:0 - \n",
            "sockless content 1\n= .\nd 644 0:0 - %0\n",
            "sockless content 1\n= .\nd 644 0:0 x a\n",
            "sockless content 1\n= .\nq 644 0:0 - a\n",
            "sockless content 1\n= .\nd 644 0:0 - a size=3\n",
        ] {
            assert_eq!(ContentManifest::parse(bad.as_bytes()), None, "{bad:?}");
        }
    }

    #[test]
    fn differences_are_told_by_name() {
        let file = |path: &str, content: &[u8]| entry(path, Kind::File(Digest::of(content)));
        let old = manifest(
            "src",
            vec![
                file("a.rs", b"1"),
                file("gone", b"1"),
                file("mode", b"1"),
                entry("now-a-file", Kind::Symlink("a.rs".into())),
                file("same", b"1"),
            ],
        );
        let mut with_mode = file("mode", b"2");
        (with_mode.mode, with_mode.owner) = (0o755, (1, 1));
        let new = manifest(
            "src",
            vec![
                file("a.rs", b"2"),
                with_mode,
                file("new", b"1"),
                file("now-a-file", b"1"),
                file("same", b"1"),
            ],
        );
        let told: Vec<String> = old
            .compare(&new)
            .iter()
            .map(Difference::to_string)
            .collect();
        assert_eq!(
            told,
            [
                "src/a.rs changed",
                "src/gone removed",
                "src/mode changed (content, mode, owner)",
                "src/new added",
                "src/now-a-file changed (type)",
            ]
        );
        assert_eq!(old.compare(&old), []);
        // The same file read twice, and then once.
        let mut twice = old.clone();
        twice.sources.push(old.sources[0].clone());
        assert_eq!(old.compare(&twice).len(), 5);
        assert!(
            old.compare(&twice)
                .iter()
                .all(|d| d.change == ContentChange::Added)
        );
    }
}
