//! Packet lines, and the pack inside them.
//!
//! <https://git-scm.com/docs/gitprotocol-common#_pkt_line_format>

use std::io::{self, Read};

use super::error::{GitError, shown};
use super::watch::Watch;

/// The longest packet, in bytes, its length included.
const PACKET_LIMIT_BYTES: usize = 65_520;

/// What one packet is.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Packet {
    /// Bytes.
    Data(Vec<u8>),
    /// The end of a message.
    Flush,
    /// The end of a section.
    Delimiter,
    /// The end of all.
    End,
}

/// Appends a packet with `data`, which is short.
pub(super) fn put(out: &mut Vec<u8>, data: &[u8]) {
    debug_assert!(data.len() + 4 <= PACKET_LIMIT_BYTES);
    out.extend_from_slice(format!("{:04x}", data.len() + 4).as_bytes());
    out.extend_from_slice(data);
}

/// Reads packets of one answer, of which no more than `left_bytes` are taken.
pub(super) struct Packets<'r> {
    reader: &'r mut dyn Read,
    remote: &'r str,
    watch: &'r Watch,
    limit_bytes: u64,
    left_bytes: u64,
}

impl<'r> Packets<'r> {
    pub(super) fn new(
        reader: &'r mut dyn Read,
        remote: &'r str,
        watch: &'r Watch,
        limit_bytes: u64,
    ) -> Self {
        Self {
            reader,
            remote,
            watch,
            limit_bytes,
            left_bytes: limit_bytes,
        }
    }

    pub(super) fn protocol(&self, reason: impl Into<String>) -> GitError {
        GitError::Protocol {
            remote: self.remote.to_owned(),
            reason: reason.into(),
        }
    }

    /// The next packet. A server's `ERR` is an error.
    pub(super) fn next(&mut self) -> Result<Packet, GitError> {
        let mut head = [0; 4];
        self.fill(&mut head)?;
        let length = std::str::from_utf8(&head)
            .ok()
            .filter(|text| text.bytes().all(|b| b.is_ascii_hexdigit()))
            .and_then(|text| usize::from_str_radix(text, 16).ok());
        let length = match length {
            Some(0) => return Ok(Packet::Flush),
            Some(1) => return Ok(Packet::Delimiter),
            Some(2) => return Ok(Packet::End),
            Some(length) if (4..=PACKET_LIMIT_BYTES).contains(&length) => length - 4,
            _ => {
                return Err(self.protocol(format!(
                    "the answer is not git's protocol: expected a packet's length, got {:?}",
                    shown(&head)
                )));
            }
        };
        self.left_bytes =
            self.left_bytes
                .checked_sub(length as u64)
                .ok_or_else(|| GitError::Limit {
                    remote: self.remote.to_owned(),
                    what: "the server's answer".to_owned(),
                    limit: format!("{} bytes", self.limit_bytes),
                })?;
        let mut data = vec![0; length];
        self.fill(&mut data)?;
        if let Some(message) = data.strip_prefix(b"ERR ") {
            return Err(GitError::Server {
                remote: self.remote.to_owned(),
                message: shown(message),
            });
        }
        Ok(Packet::Data(data))
    }

    /// The next line without its end; `None` at a flush or delimiter.
    pub(super) fn line(&mut self) -> Result<Option<Vec<u8>>, GitError> {
        Ok(match self.next()? {
            Packet::Data(mut line) => {
                if line.last() == Some(&b'\n') {
                    line.pop();
                }
                Some(line)
            }
            _ => None,
        })
    }

    fn fill(&mut self, buffer: &mut [u8]) -> Result<(), GitError> {
        self.reader.read_exact(buffer).map_err(|error| {
            self.watch.check(self.remote).err().unwrap_or_else(|| {
                let reason = if error.kind() == io::ErrorKind::UnexpectedEof {
                    "the connection ended in the middle of an answer".to_owned()
                } else {
                    error.to_string()
                };
                GitError::Connection {
                    remote: self.remote.to_owned(),
                    reason,
                }
            })
        })
    }
}

/// The pack in the first side band. Its failure is kept apart, because readers of packs
/// keep of an error no more than its text.
pub(super) struct PackReader<'p, 'r> {
    packets: &'p mut Packets<'r>,
    chunk: Vec<u8>,
    at: usize,
    ended: bool,
    /// Why reading failed.
    pub(super) failure: Option<GitError>,
}

impl<'p, 'r> PackReader<'p, 'r> {
    pub(super) fn new(packets: &'p mut Packets<'r>) -> Self {
        Self {
            packets,
            chunk: Vec::new(),
            at: 0,
            ended: false,
            failure: None,
        }
    }

    fn refill(&mut self) -> Result<(), GitError> {
        while !self.ended && self.at == self.chunk.len() {
            match self.packets.next()? {
                Packet::Data(data) => match data.split_first() {
                    Some((1, _)) => {
                        self.chunk = data;
                        self.at = 1;
                    }
                    Some((2, text)) => tracing::trace!(server = shown(text)),
                    Some((3, message)) => {
                        return Err(GitError::Server {
                            remote: self.packets.remote.to_owned(),
                            message: shown(message),
                        });
                    }
                    _ => return Err(self.packets.protocol("a packet is of no known side band")),
                },
                _ => self.ended = true,
            }
        }
        Ok(())
    }
}

impl Read for PackReader<'_, '_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.failure.is_none()
            && let Err(failure) = self.refill()
        {
            self.failure = Some(failure);
        }
        if self.failure.is_some() {
            return Err(io::Error::other("the transfer failed"));
        }
        let rest = &self.chunk[self.at..];
        let count = rest.len().min(buffer.len());
        buffer[..count].copy_from_slice(&rest[..count]);
        self.at += count;
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(bytes: &[u8], limit_bytes: u64) -> Result<Vec<Packet>, GitError> {
        let watch = Watch::endless();
        let mut reader = bytes;
        let mut packets = Packets::new(&mut reader, "r", &watch, limit_bytes);
        let mut all = Vec::new();
        loop {
            let packet = packets.next()?;
            if packet == Packet::End {
                return Ok(all);
            }
            all.push(packet);
        }
    }

    #[test]
    fn packets_are_read_and_nonsense_is_named() {
        let mut bytes = Vec::new();
        put(&mut bytes, b"hello\n");
        bytes.extend_from_slice(b"0004000100000002");
        assert_eq!(
            read(&bytes, 100).unwrap(),
            [
                Packet::Data(b"hello\n".to_vec()),
                Packet::Data(Vec::new()),
                Packet::Delimiter,
                Packet::Flush
            ]
        );
        let check = |bytes: &[u8], limit: u64, expected: &str| {
            let error = read(bytes, limit).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        };
        check(b"<htm", 100, "got \"<htm\"");
        check(b"+00a", 100, "not git's protocol");
        check(b"0003", 100, "not git's protocol");
        check(b"fff1", 100_000, "not git's protocol");
        check(b"0009ab", 100, "ended in the middle");
        check(b"0009abcde", 4, "over the limit of 4 bytes");
        check(b"000bERR no\n", 100, "the server says: no");
    }

    #[test]
    fn the_pack_is_what_is_in_the_first_band() {
        let watch = Watch::endless();
        let take = |bytes: &[u8]| {
            let mut reader = bytes;
            let mut packets = Packets::new(&mut reader, "r", &watch, 100);
            let mut pack = PackReader::new(&mut packets);
            let mut out = Vec::new();
            let result = pack.read_to_end(&mut out);
            (
                out,
                result.is_ok(),
                pack.failure.map(|failure| failure.to_string()),
            )
        };
        assert_eq!(
            take(b"0007\x01ab0008\x02hey0005\x010006\x01c0000"),
            (b"abc".to_vec(), true, None)
        );
        let (_, ok, failure) = take(b"0007\x01ab000c\x03oh \x1bno");
        assert!(!ok);
        assert_eq!(
            failure.as_deref(),
            Some("r: the connection ended in the middle of an answer")
        );
        let (_, ok, failure) = take(b"000a\x03oh \x1bn");
        assert!(!ok);
        assert_eq!(failure.as_deref(), Some("r: the server says: oh  n"));
        let (_, _, failure) = take(b"0005\x04");
        assert!(failure.unwrap().contains("no known side band"));
    }
}
