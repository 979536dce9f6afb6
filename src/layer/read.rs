//! [`TarReader`]: a strict, streaming reader of tar archives.
//!
//! Reads what ustar, star, old GNU and PAX archives hold: long names in both styles,
//! base-256 numbers, extended attributes with binary values, all four forms of sparse
//! files. Where archivers disagree, it does as Go's `archive/tar`, because every other
//! builder and runtime reads layers with that: global extended headers are read and not
//! applied, and links, directories and devices have no content whatever their size
//! says. Whatever is malformed is an error that says where; nothing is guessed.
//!
//! Names are returned as they are in the archive: whoever uses them has to confine them.

use std::ffi::OsString;
use std::io::{self, BufRead};
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

use super::header::{BLOCK, Format, GID, Header, LINK, MAJOR, MINOR, MODE, MTIME, SIZE, UID};
use super::pax;
use super::sparse::{self, Map, PaxSparse, Segment, TextMap};
use super::{LayerError, Limits, layer_error_inside};
use crate::rootfs::{Metadata, Time};

/// One file of an archive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TarEntry {
    /// Its name, as it is in the archive; never empty, without NULs.
    pub name: PathBuf,
    /// Its type, and what comes with it.
    pub kind: EntryKind,
    /// Owner, mode, time, extended attributes.
    pub metadata: Metadata,
    /// The size of a regular file with its holes; 0 for other types.
    pub size_bytes: u64,
}

/// Type of an entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EntryKind {
    /// A regular file; `Some`: sparse, the content is these pieces one after the other.
    File(Option<Vec<Segment>>),
    /// A directory.
    Directory,
    /// A symbolic link and its target, verbatim.
    Symlink(OsString),
    /// Another name of the entry of this name.
    Hardlink(PathBuf),
    /// A character device.
    CharDevice {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// A block device.
    BlockDevice {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// A named pipe.
    Fifo,
}

/// Reads a tar, entry by entry. After [`TarReader::next`], the entry's content is read
/// with [`TarReader::chunk`] and [`TarReader::consume`]; what is left is passed over.
#[derive(Debug)]
pub struct TarReader<R> {
    input: R,
    limits: Limits,
    /// Bytes read so far.
    offset: u64,
    /// Content of the current entry that is not read yet.
    content_left: u64,
    /// Zeros after it, up to the next block.
    padding: u64,
    /// Headers read so far.
    headers: u64,
    /// Sizes of all files so far, with their holes.
    logical_bytes: u64,
    /// Bytes of all holes so far.
    hole_bytes: u64,
    /// The current entry, for messages.
    name: PathBuf,
    ended: bool,
}

/// What extended headers say about the next entry.
#[derive(Debug, Default)]
struct Extension {
    pax: Option<Vec<u8>>,
    long_name: Option<Vec<u8>>,
    long_link: Option<Vec<u8>>,
}

impl<R: BufRead> TarReader<R> {
    /// Reads from `input`, within the limits on headers, names, attributes and sizes.
    pub fn new(input: R, limits: Limits) -> Self {
        Self {
            input,
            limits,
            offset: 0,
            content_left: 0,
            padding: 0,
            headers: 0,
            logical_bytes: 0,
            hole_bytes: 0,
            name: PathBuf::new(),
            ended: false,
        }
    }

    /// The next entry, or `None` at the end of the archive: two blocks of zeros, or no more bytes.
    ///
    /// # Errors
    /// [`LayerError::Malformed`], [`LayerError::Limit`], [`LayerError::Read`].
    #[expect(
        clippy::should_implement_trait,
        reason = "an iterator could not lend the content"
    )]
    pub fn next(&mut self) -> Result<Option<TarEntry>, LayerError> {
        let mut extension = Extension::default();
        let mut extended = false;
        loop {
            self.skip_content()?;
            self.name = PathBuf::new();
            let Some(header) = self.header()? else {
                return if extended {
                    Err(self.malformed("extended header without an entry"))
                } else {
                    Ok(None)
                };
            };
            let slot = match header.kind() {
                b'g' => {
                    let data = self.extended_header(&header)?;
                    pax::parse(&data).map_err(|problem| self.malformed(problem))?;
                    continue;
                }
                b'x' => &mut extension.pax,
                b'L' => &mut extension.long_name,
                b'K' => &mut extension.long_link,
                _ => return self.entry(&header, extension).map(Some),
            };
            if slot.is_some() {
                return Err(self.malformed("two extended headers of one kind for one entry"));
            }
            *slot = Some(self.extended_header(&header)?);
            extended = true;
        }
    }

    /// The next stored bytes of the current entry; none at its end.
    ///
    /// # Errors
    /// [`LayerError::Malformed`] where the archive ends first; [`LayerError::Read`].
    pub fn chunk(&mut self) -> Result<&[u8], LayerError> {
        if self.content_left == 0 {
            return Ok(&[]);
        }
        loop {
            // Twice, because the borrow checker does not let a loop return what it borrows.
            match self.input.fill_buf() {
                Ok([]) => return Err(self.malformed("the archive ends within an entry")),
                Ok(_) => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(layer_error_inside(error)),
            }
        }
        let left = usize::try_from(self.content_left).unwrap_or(usize::MAX);
        let buffer = self.input.fill_buf().map_err(layer_error_inside)?;
        Ok(&buffer[..buffer.len().min(left)])
    }

    /// Marks `amount` bytes of the last [`TarReader::chunk`] as read.
    pub fn consume(&mut self, amount: usize) {
        self.input.consume(amount);
        self.offset += amount as u64;
        self.content_left -= amount as u64;
    }

    /// Reads everything after the archive's end, which belongs to its digest, and returns the input.
    ///
    /// # Errors
    /// [`LayerError::Read`].
    pub fn finish(mut self) -> Result<R, LayerError> {
        io::copy(&mut self.input, &mut io::sink()).map_err(layer_error_inside)?;
        Ok(self.input)
    }

    /// How many bytes were read.
    pub(super) fn offset(&self) -> u64 {
        self.offset
    }

    /// How many headers were read.
    pub fn headers(&self) -> u64 {
        self.headers
    }

    fn skip_content(&mut self) -> Result<(), LayerError> {
        loop {
            let chunk = self.chunk()?.len();
            if chunk == 0 {
                break;
            }
            self.consume(chunk);
        }
        let mut padding = [0; BLOCK];
        let length = usize::try_from(self.padding).unwrap_or(BLOCK);
        self.padding = 0;
        if self.read_up_to(&mut padding[..length])? < length {
            return Err(self.malformed("the archive ends within an entry"));
        }
        Ok(())
    }

    /// Fills `buffer` as far as there are bytes.
    fn read_up_to(&mut self, buffer: &mut [u8]) -> Result<usize, LayerError> {
        let mut done = 0;
        while done < buffer.len() {
            match self.input.read(&mut buffer[done..]) {
                Ok(0) => break,
                Ok(read) => done += read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(layer_error_inside(error)),
            }
        }
        self.offset += done as u64;
        Ok(done)
    }

    /// One block of the current entry's content.
    fn content_block(&mut self) -> Result<[u8; BLOCK], LayerError> {
        let mut block = [0; BLOCK];
        if self.content_left < BLOCK as u64 || self.read_up_to(&mut block)? < BLOCK {
            return Err(self.malformed("the archive ends within an entry"));
        }
        self.content_left -= BLOCK as u64;
        Ok(block)
    }

    fn header(&mut self) -> Result<Option<Header>, LayerError> {
        if self.ended {
            return Ok(None);
        }
        let Some(header) = self.block()? else {
            self.ended = true;
            return Ok(None);
        };
        if header.is_zero() {
            self.ended = true;
            return match self.block()? {
                Some(second) if !second.is_zero() => {
                    Err(self.malformed("a single block of zeros between entries"))
                }
                _ => Ok(None),
            };
        }
        if !header.checksum_is_right() {
            return Err(self.malformed("header with a wrong checksum"));
        }
        self.headers += 1;
        if self.headers > self.limits.entries {
            return Err(self.limit("too many entries", self.limits.entries));
        }
        Ok(Some(header))
    }

    fn block(&mut self) -> Result<Option<Header>, LayerError> {
        let mut block = [0; BLOCK];
        match self.read_up_to(&mut block)? {
            0 => Ok(None),
            BLOCK => Ok(Some(Header(block))),
            _ => Err(self.malformed("the archive ends within a header")),
        }
    }

    fn begin_content(&mut self, size: u64) {
        self.content_left = size;
        self.padding = size.next_multiple_of(BLOCK as u64) - size;
    }

    /// The whole content of an extended header.
    fn extended_header(&mut self, header: &Header) -> Result<Vec<u8>, LayerError> {
        let size = self.unsigned(header, SIZE, "size")?;
        let limit = self.limits.extended_header_bytes;
        if size > limit {
            return Err(self.limit("an extended header of too many bytes", limit));
        }
        self.begin_content(size);
        let mut data = Vec::new();
        loop {
            let chunk = self.chunk()?;
            if chunk.is_empty() {
                return Ok(data);
            }
            data.extend_from_slice(chunk);
            let length = chunk.len();
            self.consume(length);
        }
    }

    fn entry(&mut self, header: &Header, extension: Extension) -> Result<TarEntry, LayerError> {
        let mut name = header.name();
        let mut link = header.text(LINK).to_vec();
        let mut size = self.unsigned(header, SIZE, "size")?;
        let mut uid = self.unsigned(header, UID, "user")?;
        let mut gid = self.unsigned(header, GID, "group")?;
        let mode = self.signed(header, MODE, "mode")?;
        let mut mtime = Time {
            seconds: self.signed(header, MTIME, "mtime")?,
            nanoseconds: 0,
        };
        let mut metadata = Metadata::default();
        let mut sparse = PaxSparse::default();

        let data = extension.pax.unwrap_or_default();
        for (key, value) in pax::parse(&data).map_err(|problem| self.malformed(problem))? {
            let bad = || {
                self.malformed(format!(
                    "invalid {} in an extended header",
                    key.escape_ascii()
                ))
            };
            let number = || pax::decimal(value).ok_or_else(bad);
            if let Some(key) = key.strip_prefix(b"GNU.sparse.") {
                sparse
                    .record(key, value, self.limits.sparse_segments)
                    .map_err(|problem| self.malformed(problem))?;
            } else if let Some(key) = key.strip_prefix(pax::XATTR_PREFIX) {
                if key.is_empty() {
                    return Err(bad());
                }
                if value.len() > self.limits.xattr_bytes {
                    let limit = self.limits.xattr_bytes as u64;
                    return Err(self.limit("an extended attribute of too many bytes", limit));
                }
                let key = OsString::from_vec(key.to_vec());
                metadata.xattrs.insert(key, value.to_vec());
            } else if value.is_empty() {
                // An empty value takes back a record, and the header's own field counts.
            } else {
                match key {
                    b"path" => name = value.to_vec(),
                    b"linkpath" => link = value.to_vec(),
                    b"size" => size = number()?,
                    b"uid" => uid = number()?,
                    b"gid" => gid = number()?,
                    b"mtime" => mtime = pax::time(value).ok_or_else(bad)?,
                    _ => {}
                }
            }
        }
        if let Some(long) = extension.long_name {
            name = until_nul(&long).to_vec();
        }
        if let Some(long) = extension.long_link {
            link = until_nul(&long).to_vec();
        }
        if let Some(real) = sparse.name.take() {
            name = real;
        }
        if name.is_empty() {
            // The root itself, as in containerd and Docker.
            name = b".".to_vec();
        }
        self.check_path(&name)?;
        self.name = PathBuf::from(OsString::from_vec(name));
        self.check_path(&link)?;
        // Only the lowest bits: some archivers store the type in the mode, too.
        metadata.mode = u32::try_from(mode & 0o7777).unwrap_or_default();
        metadata.uid = self.owner(uid)?;
        metadata.gid = self.owner(gid)?;
        metadata.mtime = mtime;
        let (kind, size_bytes) = self.kind(header, size, link, sparse)?;
        Ok(TarEntry {
            name: self.name.clone(),
            kind,
            metadata,
            size_bytes,
        })
    }

    /// Type and logical size of an entry; leaves the reader at its content.
    fn kind(
        &mut self,
        header: &Header,
        size: u64,
        link: Vec<u8>,
        sparse: PaxSparse,
    ) -> Result<(EntryKind, u64), LayerError> {
        let map = sparse.map().map_err(|problem| self.malformed(problem))?;
        let is_directory = self.name.as_os_str().as_encoded_bytes().ends_with(b"/");
        let kind = match header.kind() {
            // Before POSIX, a directory was a file whose name ends in a slash.
            0 if is_directory => EntryKind::Directory,
            0 | b'0' | b'7' => {
                self.begin_content(size);
                let (size_bytes, segments) = match map {
                    None => (size, None),
                    Some(Map::Here(real, segments)) => (real, Some(segments)),
                    Some(Map::InContent(real)) => (real, Some(self.text_map()?)),
                };
                return self.file(size_bytes, segments);
            }
            b'S' => {
                if header.format() != Format::Gnu {
                    return Err(self.malformed("GNU sparse file in an archive that is not GNU's"));
                }
                let (real, segments) = self.old_gnu_map(header)?;
                self.begin_content(size);
                return self.file(real, Some(segments));
            }
            _ if map.is_some() => {
                return Err(self.malformed("sparse entry that is no regular file"));
            }
            b'1' | b'2' if link.is_empty() => {
                return Err(self.malformed("link without a target"));
            }
            b'1' => EntryKind::Hardlink(PathBuf::from(OsString::from_vec(link))),
            b'2' => EntryKind::Symlink(OsString::from_vec(link)),
            b'3' => {
                let (major, minor) = self.device(header)?;
                EntryKind::CharDevice { major, minor }
            }
            b'4' => {
                let (major, minor) = self.device(header)?;
                EntryKind::BlockDevice { major, minor }
            }
            b'5' => EntryKind::Directory,
            b'6' => EntryKind::Fifo,
            other => {
                let other = other.escape_ascii();
                return Err(self.malformed(format!("entry of unsupported type '{other}'")));
            }
        };
        Ok((kind, 0))
    }

    fn file(
        &mut self,
        size_bytes: u64,
        segments: Option<Vec<Segment>>,
    ) -> Result<(EntryKind, u64), LayerError> {
        if let Some(segments) = &segments {
            sparse::validate(segments, size_bytes, self.content_left)
                .map_err(|problem| self.malformed(problem))?;
        }
        // Holes cost no space here, but whoever reads the file reads them.
        self.logical_bytes = self.logical_bytes.saturating_add(size_bytes);
        let limit = self.limits.uncompressed_bytes;
        if self.logical_bytes > limit {
            return Err(self.limit("files of too many bytes", limit));
        }
        if let Some(segments) = &segments {
            let data: u64 = segments.iter().map(|segment| segment.length).sum();
            self.hole_bytes = self.hole_bytes.saturating_add(size_bytes - data);
            let limits = &self.limits;
            let allowed = self
                .offset()
                .saturating_add(data)
                .saturating_mul(limits.ratio);
            if self.hole_bytes > limits.ratio_free_bytes.max(allowed) {
                let limit = limits.ratio;
                return Err(self.limit("holes of too many bytes for each byte of it", limit));
            }
        }
        Ok((EntryKind::File(segments), size_bytes))
    }

    fn text_map(&mut self) -> Result<Vec<Segment>, LayerError> {
        let mut map = TextMap::default();
        loop {
            let block = self.content_block()?;
            let done = map.block(&block, self.limits.sparse_segments);
            if let Some(segments) = done.map_err(|problem| self.malformed(problem))? {
                return Ok(segments);
            }
        }
    }

    fn old_gnu_map(&mut self, header: &Header) -> Result<(u64, Vec<Segment>), LayerError> {
        let size = sparse::old_gnu_size(&header.0)
            .ok_or_else(|| self.malformed("sparse file without a size"))?;
        let max = self.limits.sparse_segments;
        let mut segments = Vec::new();
        let mut block = header.clone();
        let mut continuation = false;
        while sparse::old_gnu(&block.0, continuation, &mut segments, max)
            .map_err(|problem| self.malformed(problem))?
        {
            continuation = true;
            block = self
                .block()?
                .ok_or_else(|| self.malformed("the archive ends within a header"))?;
        }
        Ok((size, segments))
    }

    fn device(&self, header: &Header) -> Result<(u32, u32), LayerError> {
        if header.format() == Format::V7 {
            return Err(self.malformed("device without numbers"));
        }
        let number = |field| {
            let value = header.number(field).and_then(|n| u32::try_from(n).ok());
            value.ok_or_else(|| self.malformed("invalid device number in a header"))
        };
        Ok((number(MAJOR)?, number(MINOR)?))
    }

    fn signed(
        &self,
        header: &Header,
        field: std::ops::Range<usize>,
        what: &str,
    ) -> Result<i64, LayerError> {
        header
            .number(field)
            .ok_or_else(|| self.malformed(format!("invalid {what} in a header")))
    }

    fn unsigned(
        &self,
        header: &Header,
        field: std::ops::Range<usize>,
        what: &str,
    ) -> Result<u64, LayerError> {
        u64::try_from(self.signed(header, field, what)?)
            .map_err(|_| self.malformed(format!("negative {what} in a header")))
    }

    fn owner(&self, id: u64) -> Result<u32, LayerError> {
        // The highest number means "leave as it is" to chown(2).
        u32::try_from(id)
            .ok()
            .filter(|id| *id != u32::MAX)
            .ok_or_else(|| self.malformed(format!("owner {id} is out of range")))
    }

    fn check_path(&self, path: &[u8]) -> Result<(), LayerError> {
        if path.len() > self.limits.path_bytes {
            let limit = self.limits.path_bytes as u64;
            return Err(self.limit("a path of too many bytes", limit));
        }
        Ok(())
    }

    fn malformed(&self, problem: impl Into<String>) -> LayerError {
        LayerError::Malformed {
            offset: self.offset,
            path: self.name.clone(),
            problem: problem.into(),
        }
    }

    fn limit(&self, what: &'static str, limit: u64) -> LayerError {
        LayerError::Limit {
            what,
            limit,
            path: self.name.clone(),
        }
    }
}

fn until_nul(text: &[u8]) -> &[u8] {
    text.split(|b| *b == 0).next().unwrap_or_default()
}
