//! A stream of bytes in chunks whose boundaries its content decides: a change moves the
//! boundaries near it and no others, so that what did not change stays in the same chunks.
//!
//! A gear hash (as in FastCDC) over the last 64 bytes says where a chunk ends.

use std::io::{self, Write};

/// How many bytes the hash depends on: each shifts out after 64 others.
const WINDOW: usize = 64;

/// One number for each byte. Other numbers would make other chunks of everything, so that
/// nothing in a cache would be there already.
const GEAR: [u64; 256] = gear();

/// The numbers of splitmix64, from 0 on.
const fn gear() -> [u64; 256] {
    let mut table = [0; 256];
    let mut state: u64 = 0;
    let mut at = 0;
    while at < table.len() {
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        table[at] = z ^ (z >> 31);
        at += 1;
    }
    table
}

/// How long chunks are, in bytes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cuts {
    /// At least, but for the last one. More than 64.
    pub(super) min: usize,
    /// So many bits of the hash are zero at a boundary: it comes 2^bits bytes after `min` on
    /// average.
    pub(super) bits: u32,
    /// At most.
    pub(super) max: usize,
}

/// Cuts what is written to it.
#[derive(Debug)]
pub(super) struct Chunker<F> {
    cuts: Cuts,
    buffer: Vec<u8>,
    hash: u64,
    emit: F,
}

impl<F: FnMut(&[u8]) -> io::Result<()>> Chunker<F> {
    /// Gives each chunk to `emit`, in order; none is empty.
    pub(super) fn new(cuts: Cuts, emit: F) -> Self {
        Self {
            cuts,
            buffer: Vec::new(),
            hash: 0,
            emit,
        }
    }

    /// Gives the rest to `emit`.
    pub(super) fn finish(mut self) -> io::Result<()> {
        if self.buffer.is_empty() {
            return Ok(());
        }
        self.cut()
    }

    fn cut(&mut self) -> io::Result<()> {
        (self.emit)(&self.buffer)?;
        self.buffer.clear();
        self.hash = 0;
        Ok(())
    }
}

impl<F: FnMut(&[u8]) -> io::Result<()>> Write for Chunker<F> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut rest = bytes;
        while !rest.is_empty() {
            // No boundary before `min`, so nothing before its window needs to be hashed.
            let unhashed = (self.cuts.min - WINDOW).saturating_sub(self.buffer.len());
            let (skipped, hashed) = rest.split_at(unhashed.min(rest.len()));
            self.buffer.extend_from_slice(skipped);
            let before = self.buffer.len();
            let boundary = hashed.iter().enumerate().position(|(at, byte)| {
                self.hash = (self.hash << 1).wrapping_add(GEAR[usize::from(*byte)]);
                let length = before + at + 1;
                let is_boundary = self.hash.leading_zeros() >= self.cuts.bits;
                length >= self.cuts.max || (length >= self.cuts.min && is_boundary)
            });
            let taken = boundary.map_or(hashed.len(), |at| at + 1);
            let (taken, left) = hashed.split_at(taken);
            self.buffer.extend_from_slice(taken);
            rest = left;
            if boundary.is_some() {
                self.cut()?;
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    const CUTS: Cuts = Cuts {
        min: 256,
        bits: 10,
        max: 4096,
    };

    fn noise(length: usize) -> Vec<u8> {
        let mut state = 1_u64;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 32) as u8
        };
        (0..length).map(|_| next()).collect()
    }

    fn chunks(bytes: &[u8], write_bytes: usize) -> Vec<Vec<u8>> {
        let mut chunks = Vec::new();
        let mut chunker = Chunker::new(CUTS, |chunk: &[u8]| {
            chunks.push(chunk.to_vec());
            Ok(())
        });
        for part in bytes.chunks(write_bytes) {
            chunker.write_all(part).unwrap();
        }
        chunker.finish().unwrap();
        chunks
    }

    #[test]
    fn chunks_are_the_stream_and_do_not_depend_on_how_it_is_written() {
        let bytes = noise(200_000);
        let whole = chunks(&bytes, bytes.len());
        assert_eq!(whole.concat(), bytes);
        for write_bytes in [1, 100, 4096, 65_537] {
            assert!(chunks(&bytes, write_bytes) == whole, "{write_bytes}");
        }
        let (_, but_last) = whole.split_last().unwrap();
        assert!(
            but_last
                .iter()
                .all(|c| (CUTS.min..=CUTS.max).contains(&c.len()))
        );
        // 256 + 1024 on average.
        assert!((100..=250).contains(&whole.len()), "{}", whole.len());
        // Without content to decide it is the longest.
        let zeros = chunks(&[0; 10_000], 1000);
        let lengths: Vec<usize> = zeros.iter().map(Vec::len).collect();
        assert_eq!(lengths, [4096, 4096, 1808]);
        assert!(chunks(&[], 1).is_empty());
    }

    #[test]
    fn a_change_makes_few_new_chunks() {
        let before = noise(200_000);
        let old: BTreeSet<_> = chunks(&before, 8192).into_iter().collect();
        let changed = |edit: &dyn Fn(&mut Vec<u8>)| {
            let mut after = before.clone();
            edit(&mut after);
            let new = chunks(&after, 8192);
            new.into_iter().filter(|chunk| !old.contains(chunk)).count()
        };
        assert_eq!(changed(&|_| {}), 0);
        for new in [
            changed(&|bytes| bytes[100_000] ^= 1),
            changed(&|bytes| drop(bytes.splice(50_000..50_000, *b"inserted"))),
            changed(&|bytes| drop(bytes.drain(3..150))),
        ] {
            assert!((1..=4).contains(&new), "{new}");
        }
    }
}
