//! [`Codec`]: what the blocks of a layer become, gzip members or zstd frames.
//!
//! Both formats say that a file is a series of these (RFC 1952, section 2.2; RFC 8878,
//! section 3), so blocks are compressed each for itself.

use std::io;

use super::{gzip, zstd};

/// How the blocks of a layer are compressed, at which level.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Codec {
    /// To one gzip member each.
    Gzip(u8),
    /// To one zstd frame each.
    Zstd(u8),
}

impl Codec {
    /// The length of every block but the last.
    pub(super) fn block_bytes(self) -> usize {
        match self {
            Self::Gzip(_) => gzip::BLOCK_BYTES,
            Self::Zstd(_) => zstd::BLOCK_BYTES,
        }
    }

    /// The most bytes that a block can become; no fewer than it has.
    pub(super) fn bound(self) -> usize {
        match self {
            Self::Gzip(_) => gzip::member_bound(),
            Self::Zstd(_) => zstd::frame_bound(),
        }
    }

    /// The most memory that a [`Context`] takes.
    pub(super) fn context_bytes(self) -> usize {
        let coder = match self {
            Self::Gzip(level) => gzip::context_bytes(level),
            Self::Zstd(level) => zstd::context_bytes(level),
        };
        coder + self.bound()
    }
}

/// Memory to compress with, one block at a time.
pub(super) struct Context {
    codec: Codec,
    /// Absent before the first block.
    coder: Option<Coder>,
    /// What the block becomes, until it takes its place: [`Codec::bound`] bytes, zeroed once
    /// and never again.
    out: Vec<u8>,
}

enum Coder {
    Gzip(gzip::Deflate),
    Zstd(zstd::Framer),
}

impl Context {
    /// A context that takes memory with its first block.
    pub(super) fn new(codec: Codec) -> Self {
        Self {
            codec,
            coder: None,
            out: Vec::new(),
        }
    }

    /// Puts in the place of a block what it becomes.
    ///
    /// # Errors
    /// That there is no memory.
    pub(super) fn compress(&mut self, block: &mut Vec<u8>) -> io::Result<()> {
        let coder = match &mut self.coder {
            Some(coder) => coder,
            none => {
                self.out.resize(self.codec.bound(), 0);
                none.insert(match self.codec {
                    Codec::Gzip(level) => Coder::Gzip(gzip::Deflate::new(level)),
                    Codec::Zstd(level) => Coder::Zstd(zstd::Framer::new(level)?),
                })
            }
        };
        let length = match coder {
            Coder::Gzip(deflate) => deflate.member(block, &mut self.out),
            Coder::Zstd(framer) => framer.frame(block, &mut self.out)?,
        };
        block.clear();
        block.extend_from_slice(&self.out[..length]);
        Ok(())
    }
}
