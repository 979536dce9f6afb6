//! [`Compressor`]: the tar of a layer → its stored bytes, on several threads.
//!
//! Gzip is a sequence of independent members, zstd one of independent frames, one for each
//! block of the input ([`Codec`]). Blocks are cut by position alone, so the output depends on
//! neither the number of threads nor on how the input was written. Who writes the tar fills
//! blocks, the [`Pool`] compresses them, and a thread of the layer writes them in order.

use std::io::{self, Write};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{Scope, ScopedJoinHandle};

use super::codec::Codec;
use super::pool::{Compressed, Lane, Pool, Slot};
use super::{gzip, zstd};
use crate::image::MediaType;

/// How a layer is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Compression {
    /// Gzip, at a level from 0 (stored) to 12.
    Gzip {
        /// The level.
        level: u8,
    },
    /// Zstandard, at a level from 1 to 22.
    Zstd {
        /// The level.
        level: u8,
    },
    /// Not at all.
    None,
}

/// How the layers of an image are wanted, where it goes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LayerCompression {
    /// How they are compressed.
    pub compression: Compression,
    /// Whether layers that exist already are converted too, those of a base and of the cache.
    pub force: bool,
}

impl LayerCompression {
    /// Whether a layer has to be converted: one that this build compressed with `made`, or
    /// one of the type `media_type` that exists already.
    ///
    /// As in BuildKit, what exists in the wanted format stays, whatever its level.
    pub fn converts(self, made: Option<Compression>, media_type: &MediaType) -> bool {
        match made {
            Some(made) => made != self.compression,
            None => {
                let there = media_type.oci_layer();
                let there = there.as_ref().unwrap_or(media_type);
                self.force && *there != self.compression.media_type()
            }
        }
    }
}

/// A level that there is none of.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
#[error("there is no {name} level {level}; levels are {min} to {max}")]
pub struct LevelError {
    name: &'static str,
    level: u8,
    min: u8,
    max: u8,
}

impl Compression {
    /// Gzip at level 6: as fast as other builders' gzip, and smaller.
    pub const GZIP: Self = Self::Gzip { level: 6 };
    /// Zstandard at level 3, its default.
    pub const ZSTD: Self = Self::Zstd { level: 3 };

    /// Whether there is such a level.
    ///
    /// # Errors
    /// [`LevelError`] where there is none.
    pub fn check(self) -> Result<(), LevelError> {
        let (name, level, levels) = match self {
            Self::Gzip { level } => ("gzip", level, gzip::LEVELS),
            Self::Zstd { level } => ("zstd", level, zstd::LEVELS),
            Self::None => return Ok(()),
        };
        if levels.contains(&level) {
            return Ok(());
        }
        Err(LevelError {
            name,
            level,
            min: *levels.start(),
            max: *levels.end(),
        })
    }

    /// The media type of a layer that is compressed so.
    pub fn media_type(self) -> MediaType {
        match self {
            Self::Gzip { .. } => MediaType::LAYER_GZIP,
            Self::Zstd { .. } => MediaType::LAYER_ZSTD,
            Self::None => MediaType::LAYER_TAR,
        }
    }
}

impl Default for Compression {
    fn default() -> Self {
        Self::GZIP
    }
}

/// Compresses what is written to it. [`Compressor::finish`] completes the output; dropped
/// before, it leaves the output cut.
pub(super) struct Compressor<'scope, 'env, W: Write + Send + 'scope>(Kind<'scope, 'env, W>);

enum Kind<'scope, 'env, W: Write + Send + 'scope> {
    Blocks(Blocks<'scope, 'env, W>),
    None(W),
}

impl<'scope, 'env, W: Write + Send + 'scope> Compressor<'scope, 'env, W> {
    /// Compresses into `out` with the threads of `pool`, and a thread of `scope` that writes.
    ///
    /// # Errors
    /// `InvalidInput` for a level that there is none of.
    pub(super) fn new(
        scope: &'scope Scope<'scope, 'env>,
        compression: Compression,
        pool: &Pool,
        out: W,
    ) -> io::Result<Self> {
        compression
            .check()
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
        let codec = match compression {
            Compression::Gzip { level } => Codec::Gzip(level),
            Compression::Zstd { level } => Codec::Zstd(level),
            Compression::None => return Ok(Self(Kind::None(out))),
        };
        Ok(Self(Kind::Blocks(Blocks::new(scope, codec, pool, out))))
    }

    /// Writes what is left and returns the output.
    ///
    /// # Errors
    /// Those of the output; that there is no memory or no thread to compress with.
    pub(super) fn finish(self) -> io::Result<W> {
        match self.0 {
            Kind::Blocks(blocks) => blocks.finish(),
            Kind::None(out) => Ok(out),
        }
    }
}

impl<'scope, W: Write + Send + 'scope> Write for Compressor<'scope, '_, W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match &mut self.0 {
            Kind::Blocks(blocks) => blocks.write(bytes),
            Kind::None(out) => out.write(bytes),
        }
    }

    /// Does nothing: what reaches the output when must not change the bytes.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct Blocks<'scope, 'env, W: Write + Send + 'scope> {
    scope: &'scope Scope<'scope, 'env>,
    codec: Codec,
    lane: Lane,
    /// The block that is being filled; absent before the first byte and after a block.
    slot: Option<Slot>,
    output: Output<'scope, W>,
}

/// Where the compressed blocks go.
enum Output<'scope, W> {
    /// Nothing was written yet: a layer of one block needs no thread.
    Idle(W),
    Writing {
        /// In the order of the input.
        compressed: Sender<Receiver<Compressed>>,
        thread: ScopedJoinHandle<'scope, io::Result<W>>,
    },
    /// The thread ended early, and its error was reported.
    Failed,
}

impl<'scope, 'env, W: Write + Send + 'scope> Blocks<'scope, 'env, W> {
    fn new(scope: &'scope Scope<'scope, 'env>, codec: Codec, pool: &Pool, out: W) -> Self {
        Self {
            scope,
            codec,
            lane: pool.lane(codec),
            slot: None,
            output: Output::Idle(out),
        }
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if bytes.is_empty() {
            return Ok(0);
        }
        let slot = match &mut self.slot {
            Some(slot) => slot,
            none => none.insert(self.lane.slot()),
        };
        let block_bytes = self.codec.block_bytes();
        let block = slot.block();
        let taken = bytes.len().min(block_bytes - block.len());
        block.extend_from_slice(&bytes[..taken]);
        if block.len() == block_bytes {
            self.submit()?;
        }
        Ok(taken)
    }

    /// Gives the block that was filled to the pool, and who writes the promise of what it
    /// becomes.
    fn submit(&mut self) -> io::Result<()> {
        let Some(slot) = self.slot.take() else {
            return Ok(());
        };
        let promise = self.lane.submit(slot);
        self.output = match std::mem::replace(&mut self.output, Output::Failed) {
            Output::Idle(out) => {
                let (compressed, receiver) = channel();
                let thread = std::thread::Builder::new()
                    .name("layer".to_owned())
                    .spawn_scoped(self.scope, move || write_blocks(out, &receiver))?;
                Output::Writing { compressed, thread }
            }
            other => other,
        };
        match &self.output {
            Output::Writing { compressed, .. } if compressed.send(promise).is_ok() => Ok(()),
            _ => Err(self.failure()),
        }
    }

    /// Why the thread that writes has ended.
    fn failure(&mut self) -> io::Error {
        match std::mem::replace(&mut self.output, Output::Failed) {
            Output::Writing { compressed, thread } => {
                drop(compressed);
                match thread.join() {
                    Ok(Err(error)) => error,
                    Ok(Ok(_)) | Err(_) => thread_died(),
                }
            }
            Output::Idle(_) | Output::Failed => thread_died(),
        }
    }

    fn finish(mut self) -> io::Result<W> {
        match std::mem::replace(&mut self.output, Output::Failed) {
            // No input at all is one empty block: no bytes would be no file of the format.
            Output::Idle(mut out) => {
                let slot = self.slot.take().unwrap_or_else(|| self.lane.slot());
                write_block(&mut out, &self.lane.submit(slot))?;
                Ok(out)
            }
            writing => {
                self.output = writing;
                self.submit()?;
                match std::mem::replace(&mut self.output, Output::Failed) {
                    Output::Writing { compressed, thread } => {
                        drop(compressed);
                        thread.join().unwrap_or_else(|_| Err(thread_died()))
                    }
                    Output::Idle(_) | Output::Failed => Err(thread_died()),
                }
            }
        }
    }
}

/// Writes compressed blocks in order until there are no more.
fn write_blocks<W: Write>(
    mut out: W,
    compressed: &Receiver<Receiver<Compressed>>,
) -> io::Result<W> {
    for promise in compressed {
        write_block(&mut out, &promise)?;
    }
    Ok(out)
}

fn write_block(out: &mut impl Write, promise: &Receiver<Compressed>) -> io::Result<()> {
    let slot = promise.recv().map_err(|_| thread_died())??;
    out.write_all(slot.compressed())
}

fn thread_died() -> io::Error {
    io::Error::other("a compression thread has died")
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::num::NonZeroUsize;
    use std::process::{Command, Stdio};

    use super::*;
    use crate::image::Digest;
    use crate::layer::decompress;

    fn pool(threads: usize) -> Pool {
        Pool::new(NonZeroUsize::new(threads).unwrap()).unwrap()
    }

    /// Three and a half blocks of gzip: noise, text, zeros.
    fn sample() -> Vec<u8> {
        sample_of(gzip::BLOCK_BYTES)
    }

    /// So many blocks of `block_bytes`.
    fn sample_of(block_bytes: usize) -> Vec<u8> {
        let mut state = 1_u64;
        let mut bytes: Vec<u8> = std::iter::repeat_with(|| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            (state >> 56) as u8
        })
        .take(block_bytes + 17)
        .collect();
        bytes.extend(
            b"some text that repeats\n"
                .iter()
                .cycle()
                .take(2 * block_bytes),
        );
        bytes.resize(bytes.len() + block_bytes / 2, 0);
        bytes
    }

    fn compress(compression: Compression, threads: usize, pieces: usize, bytes: &[u8]) -> Vec<u8> {
        compress_in(&pool(threads), compression, pieces, bytes)
    }

    fn compress_in(pool: &Pool, compression: Compression, pieces: usize, bytes: &[u8]) -> Vec<u8> {
        std::thread::scope(|scope| {
            let mut compressor = Compressor::new(scope, compression, pool, Vec::new()).unwrap();
            for piece in bytes.chunks(pieces) {
                compressor.write_all(piece).unwrap();
            }
            compressor.finish().unwrap()
        })
    }

    #[test]
    fn bytes_do_not_depend_on_threads_or_on_how_they_are_written() {
        for (compression, block_bytes) in [
            (Compression::GZIP, gzip::BLOCK_BYTES),
            (Compression::Gzip { level: 1 }, gzip::BLOCK_BYTES),
            (Compression::ZSTD, zstd::BLOCK_BYTES),
            (Compression::Zstd { level: 12 }, zstd::BLOCK_BYTES),
        ] {
            let sample = sample_of(block_bytes);
            let one = compress(compression, 1, usize::MAX >> 1, &sample);
            for (threads, pieces) in [(2, 1 << 20), (3, 4096), (8, 700_001), (1, 512)] {
                let other = compress(compression, threads, pieces, &sample);
                assert_eq!(
                    Digest::of(&one),
                    Digest::of(&other),
                    "{compression:?} {threads} {pieces}"
                );
            }
        }
    }

    /// Layers of several kinds at once, each written in pieces of its own, share the pool, and
    /// are what they are alone.
    #[test]
    fn bytes_do_not_depend_on_other_layers() {
        let sample: &'static [u8] = sample().leak();
        let large: &'static [u8] = sample_of(zstd::BLOCK_BYTES).leak();
        let layers: Vec<(Compression, &'static [u8])> = vec![
            (Compression::GZIP, sample),
            (Compression::ZSTD, large),
            (Compression::Gzip { level: 1 }, sample),
            (Compression::GZIP, &sample[..gzip::BLOCK_BYTES]),
            (Compression::ZSTD, &large[..=zstd::BLOCK_BYTES]),
            // Of the largest contexts, of which there are two at a time, and of other ones.
            (Compression::Zstd { level: 13 }, &large[..zstd::BLOCK_BYTES]),
            (Compression::Zstd { level: 12 }, sample),
            (Compression::None, sample),
            (Compression::GZIP, &sample[..10]),
            (Compression::GZIP, b""),
            (Compression::Gzip { level: 0 }, sample),
            (Compression::GZIP, &sample[gzip::BLOCK_BYTES / 2..]),
        ];
        let alone: Vec<Digest> = layers
            .iter()
            .map(|(compression, bytes)| Digest::of(&compress(*compression, 1, 1 << 20, bytes)))
            .collect();
        for threads in [1, 2, 3, 8] {
            let pool = pool(threads);
            let together: Vec<Digest> = std::thread::scope(|scope| {
                let spawn = |(at, (compression, bytes)): (usize, &(Compression, &'static [u8]))| {
                    let (pool, compression, bytes) = (&pool, *compression, *bytes);
                    let pieces = 1000 + at * 77_777;
                    scope.spawn(move || Digest::of(&compress_in(pool, compression, pieces, bytes)))
                };
                // Twice each, so that there are more layers than slots for one thread.
                let twice = layers.iter().chain(&layers).enumerate();
                let running: Vec<_> = twice.map(spawn).collect();
                running
                    .into_iter()
                    .map(|layer| layer.join().unwrap())
                    .collect()
            });
            let (first, second) = together.split_at(layers.len());
            assert_eq!(
                (first, second),
                (&alone[..], &alone[..]),
                "{threads} threads"
            );
        }
    }

    #[test]
    fn every_reader_reads_it() {
        let sample = sample();
        for bytes in [&sample[..], b"", b"x", &sample[..gzip::BLOCK_BYTES]] {
            for level in [0, 1, 6, 9, 12] {
                if level > 6 && bytes.len() > gzip::BLOCK_BYTES {
                    continue;
                }
                let compressed = compress(Compression::Gzip { level }, 2, 65_536, bytes);
                assert_eq!(compressed[..2], [0x1f, 0x8b]);
                let mut out = Vec::new();
                flate2::read::MultiGzDecoder::new(&compressed[..])
                    .read_to_end(&mut out)
                    .unwrap();
                assert!(out == bytes, "level {level}, {} bytes", bytes.len());
                assert!(
                    gunzip(&compressed) == bytes,
                    "level {level}, {} bytes",
                    bytes.len()
                );
            }
            assert!(compress(Compression::None, 1, 65_536, bytes) == bytes);
        }
        let sample = sample_of(zstd::BLOCK_BYTES);
        for bytes in [&sample[..], b"", b"x", &sample[..zstd::BLOCK_BYTES]] {
            let compressed = compress(Compression::ZSTD, 2, 65_536, bytes);
            assert_eq!(
                frames(&compressed),
                bytes.len().div_ceil(zstd::BLOCK_BYTES).max(1)
            );
            assert!(::zstd::decode_all(&compressed[..]).unwrap() == bytes);
            let mut ours = decompress(&MediaType::LAYER_ZSTD, &compressed[..]).unwrap();
            let mut out = Vec::new();
            ours.read_to_end(&mut out).unwrap();
            assert!(out == bytes);
        }
    }

    /// How many frames there are.
    fn frames(mut bytes: &[u8]) -> usize {
        let mut frames = 0;
        while !bytes.is_empty() {
            let length = ::zstd::zstd_safe::find_frame_compressed_size(bytes).unwrap();
            bytes = &bytes[length..];
            frames += 1;
        }
        frames
    }

    fn gunzip(bytes: &[u8]) -> Vec<u8> {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        std::io::Seek::rewind(&mut file).unwrap();
        let output = Command::new("gzip")
            .arg("-dc")
            .stdin(Stdio::from(file))
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        output.stdout
    }

    #[test]
    fn the_bytes_stay_what_they_are() {
        // Digests of layers in caches and registries depend on these. They change only
        // with the compression library or the rule for noise, and then knowingly, with
        // `ENGINE_VERSION` of `build::cache` and `VERSION` of `convert`.
        let digest = |compression, sample: &[u8]| {
            let compressed = compress(compression, 2, 65_536, sample);
            Digest::of(&compressed).short().to_owned()
        };
        assert_eq!(digest(Compression::GZIP, &sample()), "d3b659b8969e");
        let sample = sample_of(zstd::BLOCK_BYTES);
        assert_eq!(digest(Compression::ZSTD, &sample), "f6ad1a48c26f");
    }

    #[test]
    fn levels_that_do_not_exist_are_refused() {
        for (compression, message) in [
            (
                Compression::Gzip { level: 13 },
                "there is no gzip level 13; levels are 0 to 12",
            ),
            (
                Compression::Zstd { level: 0 },
                "there is no zstd level 0; levels are 1 to 22",
            ),
            (
                Compression::Zstd { level: 23 },
                "there is no zstd level 23; levels are 1 to 22",
            ),
        ] {
            let refused = std::thread::scope(|scope| {
                Compressor::new(scope, compression, &pool(1), Vec::new()).map(drop)
            });
            assert_eq!(refused.unwrap_err().to_string(), message);
        }
    }

    /// Takes some bytes and then no more, as a full disk does.
    struct Full(usize);

    impl Write for Full {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0 = self
                .0
                .checked_sub(bytes.len())
                .ok_or(io::ErrorKind::StorageFull)?;
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_full_disk_is_an_error_and_ends_the_threads() {
        let sample = sample();
        let pool = pool(2);
        for compression in [Compression::GZIP, Compression::ZSTD, Compression::None] {
            let failed = std::thread::scope(|scope| {
                let mut compressor = Compressor::new(scope, compression, &pool, Full(10_000))?;
                compressor.write_all(&sample)?;
                compressor.finish().map(drop)
            });
            assert_eq!(failed.unwrap_err().kind(), io::ErrorKind::StorageFull);
        }
        // Nothing that failed keeps memory.
        assert_eq!(
            compress_in(&pool, Compression::ZSTD, 1 << 20, &sample),
            compress(Compression::ZSTD, 1, 1 << 20, &sample)
        );
    }

    /// What a reader has to have memory for, at any level: RFC 8878 recommends 8 MiB at least.
    #[test]
    fn windows_are_those_that_every_reader_takes() {
        let sample = sample_of(zstd::BLOCK_BYTES);
        for level in [1, 19, 22] {
            // Zeros alone at the levels that take their time.
            let bytes = match level {
                1 => &sample[..],
                _ => &[0; 9 << 20],
            };
            let compressed = compress(Compression::Zstd { level }, 1, 1 << 20, bytes);
            let mut decoder = ::zstd::stream::read::Decoder::new(&compressed[..]).unwrap();
            decoder.window_log_max(23).unwrap();
            let mut back = Vec::new();
            decoder.read_to_end(&mut back).unwrap();
            assert!(back == bytes, "{level}");
        }
    }
}
