//! [`Framer`]: one block → one zstd frame.
//!
//! What the frame is depends on the block and the level alone. It says how long its content
//! is, and its window is no longer: a reader needs no more memory than that.

use std::io;

use zstd::zstd_safe::{self, CCtx, CParameter, ErrorCode};

/// Input of one frame. Changing it changes the digest of every zstd layer. It is more than
/// that of a gzip member because zstd finds what repeats at larger distances: on a Debian
/// root, compared with one frame of the whole, a layer is larger by 2 % at level 3 and 10 % at
/// level 19; with blocks of 1 MiB it were 9 % and 21 %.
pub(super) const BLOCK_BYTES: usize = 4 << 20;

/// The levels that there are.
pub(super) const LEVELS: std::ops::RangeInclusive<u8> = 1..=22;

/// The first level whose tables would be larger than a block has much use for, and the base-2
/// logarithms of the numbers of entries that they have instead. It takes down to a seventh of
/// the memory, and costs 0.4 % of size.
const LARGE_LEVEL: u8 = 9;
const LARGE_HASH_LOG: u32 = 20;
const LARGE_CHAIN_LOG: u32 = 20;

/// The first level that sorts what it has seen into a tree, with two entries for each place.
const TREE_LEVEL: u8 = 13;
const TREE_CHAIN_LOG: u32 = 21;

/// The size of the largest frame there can be.
pub(super) fn frame_bound() -> usize {
    zstd_safe::compress_bound(BLOCK_BYTES)
}

/// The most memory that a [`Framer`] has at a level.
pub(super) fn context_bytes(level: u8) -> usize {
    // What zstd 1.5.7 says itself, rounded up; a test asks it.
    let kibibytes = match level {
        ..=2 => 800,
        3 => 1_300,
        4..=6 => 3_100,
        7..TREE_LEVEL => 5_700,
        TREE_LEVEL.. => 13_700,
    };
    kibibytes << 10
}

/// Compresses blocks at one level, and keeps the memory for it from one to the next.
pub(super) struct Framer(CCtx<'static>);

impl Framer {
    /// Compresses at `level`, which is one of [`LEVELS`].
    ///
    /// # Errors
    /// `OutOfMemory`.
    pub(super) fn new(level: u8) -> io::Result<Self> {
        let mut context = CCtx::try_create().ok_or(io::ErrorKind::OutOfMemory)?;
        let mut set = |parameter| context.set_parameter(parameter).map_err(error);
        set(CParameter::CompressionLevel(i32::from(level)))?;
        if level >= LARGE_LEVEL {
            set(CParameter::HashLog(LARGE_HASH_LOG))?;
            set(CParameter::ChainLog(if level < TREE_LEVEL {
                LARGE_CHAIN_LOG
            } else {
                TREE_CHAIN_LOG
            }))?;
        }
        // Digest and diff ID say more, and every reader of a layer checks them anyway; it
        // would have to do this too.
        set(CParameter::ChecksumFlag(false))?;
        set(CParameter::ContentSizeFlag(true))?;
        Ok(Self(context))
    }

    /// Compresses `block`, of at most [`BLOCK_BYTES`], into `frame`, of [`frame_bound`], and
    /// returns the length. Noise takes the shortest time of all, and is stored.
    ///
    /// # Errors
    /// Those of zstd, which has none but that there is no memory.
    pub(super) fn frame(&mut self, block: &[u8], frame: &mut [u8]) -> io::Result<usize> {
        self.0.compress2(frame, block).map_err(error)
    }
}

fn error(code: ErrorCode) -> io::Error {
    io::Error::other(format!("zstd: {}", zstd_safe::get_error_name(code)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::Digest;

    /// Text that repeats at several distances, and changes.
    fn text(bytes: usize) -> Vec<u8> {
        let mut state = 7_u64;
        let word = || {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            format!("{} ", (state >> 33) % 3_000)
        };
        let words = std::iter::repeat_with(word).flat_map(String::into_bytes);
        words.take(bytes).collect()
    }

    fn frame(framer: &mut Framer, block: &[u8]) -> Vec<u8> {
        let mut out = vec![0; frame_bound()];
        let length = framer.frame(block, &mut out).unwrap();
        out.truncate(length);
        out
    }

    /// A context goes from layer to layer, and which blocks it had before is chance.
    #[test]
    fn a_frame_does_not_depend_on_what_was_compressed_before() {
        let text = text(300_000);
        for level in LEVELS {
            let mut used = Framer::new(level).unwrap();
            // Of every size for which zstd has parameters of its own, up and down.
            for range in [0..300_000, 5..9_000, 100..100_100, 0..0, 7..290_000, 0..50] {
                let block = &text[range.clone()];
                let again = frame(&mut used, block);
                let fresh = frame(&mut Framer::new(level).unwrap(), block);
                assert!(again == fresh, "level {level}, {range:?}");
                assert!(zstd::decode_all(&again[..]).unwrap() == block);
            }
        }
    }

    #[test]
    fn the_bytes_stay_what_they_are() {
        // As those of layers, which says what depends on them.
        let text = text(300_000);
        let mut frames = Vec::new();
        for level in LEVELS {
            frames.extend(frame(&mut Framer::new(level).unwrap(), &text));
        }
        assert_eq!(frames.len(), 2_680_335);
        assert_eq!(Digest::of(&frames).short(), "af14eaef7a78");
    }

    #[test]
    fn no_context_takes_more_than_it_is_counted_for() {
        let zeros = vec![0; BLOCK_BYTES];
        for level in LEVELS {
            let mut framer = Framer::new(level).unwrap();
            let mut most = 0;
            for bytes in [10_000, 100_000, 200_000, 1 << 20, BLOCK_BYTES, 1] {
                frame(&mut framer, &zeros[..bytes]);
                most = most.max(framer.0.sizeof());
            }
            let counted = context_bytes(level);
            assert!(most <= counted, "level {level}: {most} of {counted}");
            assert!(most > counted / 2, "level {level}: {most} of {counted}");
        }
    }

    /// In the words of RFC 8878, section 3.1.1.1: the size of the content in four bytes, no
    /// checksum, no dictionary, and a window where it is not the content itself
    /// ("Single_Segment_flag").
    #[test]
    fn a_frame_says_its_size_and_has_a_window_no_larger() {
        let block = vec![0; BLOCK_BYTES];
        let size = [0, 0, 64, 0];
        let magic = [0x28, 0xb5, 0x2f, 0xfd];
        let header = |level, block: &[u8]| frame(&mut Framer::new(level).unwrap(), block);
        // 2 MiB, which is what level 3 has.
        let window = (21 - 10) << 3;
        let expected = [&magic[..], &[0b1000_0000, window], &size].concat();
        assert_eq!(header(3, &block)[..10], expected);
        let expected = [&magic[..], &[0b1010_0000], &size].concat();
        assert_eq!(header(9, &block)[..9], expected);
        assert_eq!(header(22, &block)[..9], expected);
        // Nothing is a frame too: its header, and one last raw block of no bytes.
        let expected = [&magic[..], &[0b0010_0000, 0, 1, 0, 0]].concat();
        assert_eq!(header(3, b""), expected);
    }
}
