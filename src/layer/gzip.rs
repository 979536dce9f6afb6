//! [`Deflate`]: one block → one gzip member.
//!
//! What the member is depends on the block and the level alone.

use std::sync::LazyLock;

use libdeflater::{CompressionLvl, Compressor as Deflater};

/// Input of one gzip member. Changing it changes the digest of every layer. Smaller
/// blocks compress worse (the window starts empty), larger ones take more memory.
pub(super) const BLOCK_BYTES: usize = 1 << 20;

/// The levels that there are.
pub(super) const LEVELS: std::ops::RangeInclusive<u8> = 0..=12;

/// How evenly the byte values must be spread for a block to be tried as noise: the sum of
/// the squared distances from the mean, for each expected occurrence. Noise has some 255;
/// archives and media have up to some thousand, and deflate gains less than 2 % on them.
const NOISE_MAX: u64 = 4000;

/// Pieces of a block that are compressed for trial: larger than the window of deflate, so
/// that whatever repeats shows.
const TRIAL_BYTES: usize = 64 << 10;

/// Where they begin.
const TRIALS: [usize; 2] = [BLOCK_BYTES / 4, BLOCK_BYTES / 4 * 3];

/// The size of the largest member there can be.
pub(super) fn member_bound() -> usize {
    static BOUND: LazyLock<usize> = LazyLock::new(|| deflater(0).gzip_compress_bound(BLOCK_BYTES));
    *BOUND
}

/// The most memory that a [`Deflate`] has at a level: the compressors of that level, of the
/// trials and of what is stored.
pub(super) fn context_bytes(level: u8) -> usize {
    // As libdeflate 1.26 allocates them, rounded up: 8.6 MiB for the levels that look for the
    // optimum, 656 KiB at most for the others; 200 and 6 KiB.
    let kibibytes = if level < 10 { 900 } else { 9_100 };
    kibibytes << 10
}

/// Compresses blocks at one level, and keeps the compressors' memory from one to the next.
pub(super) struct Deflate {
    level: u8,
    chosen: Option<Deflater>,
    trial: Option<Deflater>,
    stored: Option<Deflater>,
}

impl Deflate {
    /// Compresses at `level`; one above the last means the last.
    pub(super) fn new(level: u8) -> Self {
        Self {
            level: level.min(*LEVELS.end()),
            chosen: None,
            trial: None,
            stored: None,
        }
    }

    /// Compresses `block`, of at most [`BLOCK_BYTES`], into `member`, of [`member_bound`], and
    /// returns the length.
    ///
    /// Noise, such as archives and media, is stored: compressing it takes as long as text
    /// does, for nothing.
    pub(super) fn member(&mut self, block: &[u8], member: &mut [u8]) -> usize {
        let level = self.level;
        let deflater = if level > 0 && self.is_noise(block, member) {
            self.stored.get_or_insert_with(|| deflater(0))
        } else {
            self.chosen.get_or_insert_with(|| deflater(level))
        };
        deflater
            .gzip_compress(block, member)
            .expect("the bound is large enough for any input")
    }

    /// Whether deflate would gain next to nothing on a whole block.
    fn is_noise(&mut self, block: &[u8], scratch: &mut [u8]) -> bool {
        if block.len() != BLOCK_BYTES || spread(block) > NOISE_MAX {
            return false;
        }
        let trial = self.trial.get_or_insert_with(|| deflater(1));
        TRIALS.iter().all(|&at| {
            let length = trial.gzip_compress(&block[at..at + TRIAL_BYTES], scratch);
            length.is_ok_and(|length| length >= TRIAL_BYTES / 100 * 99)
        })
    }
}

fn deflater(level: u8) -> Deflater {
    Deflater::new(CompressionLvl::new(i32::from(level)).expect("levels are 0 to 12"))
}

/// How unevenly the 256 values are spread over a whole block; see [`NOISE_MAX`].
fn spread(block: &[u8]) -> u64 {
    // Four tables, because a counter that was just written is slow to read again.
    let mut counts = [[0_u32; 256]; 4];
    for four in block.chunks_exact(4) {
        for (table, byte) in counts.iter_mut().zip(four) {
            table[usize::from(*byte)] += 1;
        }
    }
    let mean = (BLOCK_BYTES / 256) as u64;
    let squares = (0..256).map(|value| {
        let count: u64 = counts.iter().map(|table| u64::from(table[value])).sum();
        count.abs_diff(mean).pow(2)
    });
    squares.sum::<u64>() / mean
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes without any pattern.
    fn noise(length: usize) -> Vec<u8> {
        let mut state = 1_u64;
        let next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 56) as u8
        };
        std::iter::repeat_with(next).take(length).collect()
    }

    #[test]
    fn what_cannot_be_compressed_is_stored_and_nothing_else_is() {
        let noise = noise(BLOCK_BYTES);
        let mut out = vec![0; member_bound()];
        let mut deflate = Deflate::new(6);
        // A period within the window of deflate, though all values are equally frequent.
        let repeated: Vec<u8> = noise.iter().copied().cycle().take(30_000).collect();
        let repeated: Vec<u8> = repeated.iter().copied().cycle().take(BLOCK_BYTES).collect();
        // Every value in turn.
        let counted: Vec<u8> = (0..BLOCK_BYTES).map(|n| n as u8).collect();
        let mut mixed = noise.clone();
        mixed[..100_000].fill(b'x');
        let text: Vec<u8> = b"some text\n"
            .iter()
            .copied()
            .cycle()
            .take(BLOCK_BYTES)
            .collect();
        for (block, is_noise) in [
            (&noise, true),
            (&repeated, false),
            (&counted, false),
            (&mixed, false),
            (&text, false),
            (&noise[..BLOCK_BYTES - 1].to_vec(), false),
        ] {
            assert_eq!(deflate.is_noise(block, &mut out), is_noise);
            let length = deflate.member(block, &mut out);
            // Nothing but its 17 stored blocks of at most 65535 bytes, header and trailer.
            assert_eq!(length == BLOCK_BYTES + 17 * 5 + 18, is_noise, "{length}");
            assert!(length <= block.len() + 200);
            let mut back = Vec::new();
            let mut reader = flate2::read::GzDecoder::new(&out[..length]);
            std::io::Read::read_to_end(&mut reader, &mut back).unwrap();
            assert!(back == *block);
        }
    }
}
