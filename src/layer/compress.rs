//! [`Compressor`]: the tar of a layer → its stored bytes, on several threads.
//!
//! Gzip is a sequence of independent members, one for each [`BLOCK_BYTES`] of input
//! (RFC 1952, section 2.2: "A gzip file consists of a series of members"). Blocks are cut
//! by position alone, so the output depends on neither the number of threads nor on how
//! the input was written. Who writes the tar fills blocks, the [`Pool`] compresses them, and
//! a thread of the layer writes the members in order.

use std::io::{self, Write};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{Scope, ScopedJoinHandle};

use super::gzip::{BLOCK_BYTES, LEVELS as GZIP_LEVELS};
use super::pool::{Lane, Pool, Slot, ZstdTurn};
use crate::image::MediaType;

/// The levels of zstd.
const ZSTD_LEVELS: std::ops::RangeInclusive<u8> = 1..=22;

/// Threads of one zstd encoder. With the usual levels two of them, and the parts of the input
/// that wait, take some 100 MiB, whatever the size of the layer; one layer at a time has them.
/// They are faster than what reads and hashes the tar.
const ZSTD_THREADS: usize = 2;

/// From this level on a thread takes several times as much, so there is one.
const ZSTD_LARGE_LEVEL: u8 = 10;

/// The largest part of the input that a zstd thread works on, as the usual levels have it.
const ZSTD_PART_BYTES: u32 = 8 << 20;

/// The largest window of zstd, as a power of two: what every reader has to support.
///
/// <https://www.rfc-editor.org/rfc/rfc8878#section-3.1.1.1.2>
const ZSTD_WINDOW_LOG_MAX: u32 = 23;

/// The first level whose window would be larger.
const ZSTD_WIDE_LEVEL: u8 = 20;

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
            Self::Gzip { level } => ("gzip", level, GZIP_LEVELS),
            Self::Zstd { level } => ("zstd", level, ZSTD_LEVELS),
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
    Gzip(Gzip<'scope, 'env, W>),
    /// The turn ends after the encoder, with its threads.
    Zstd(zstd::stream::write::Encoder<'static, W>, ZstdTurn),
    None(W),
}

impl<'scope, 'env, W: Write + Send + 'scope> Compressor<'scope, 'env, W> {
    /// Compresses into `out` with the threads of `pool`, and a thread of `scope` that writes.
    /// Waits while another layer is compressed with zstd, where this one is to be too.
    ///
    /// # Errors
    /// `InvalidInput` for a level that there is none of; those of starting a thread.
    pub(super) fn new(
        scope: &'scope Scope<'scope, 'env>,
        compression: Compression,
        pool: &Pool,
        out: W,
    ) -> io::Result<Self> {
        compression
            .check()
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
        Ok(Self(match compression {
            Compression::Gzip { level } => Kind::Gzip(Gzip::new(scope, level, pool, out)),
            Compression::Zstd { level } => {
                let turn = pool.zstd_turn();
                Kind::Zstd(zstd_encoder(level, pool.threads(), out)?, turn)
            }
            Compression::None => Kind::None(out),
        }))
    }

    /// Writes what is left and returns the output.
    ///
    /// # Errors
    /// Those of the output.
    pub(super) fn finish(self) -> io::Result<W> {
        match self.0 {
            Kind::Gzip(gzip) => gzip.finish(),
            Kind::Zstd(encoder, _turn) => encoder.finish(),
            Kind::None(out) => Ok(out),
        }
    }
}

impl<'scope, W: Write + Send + 'scope> Write for Compressor<'scope, '_, W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match &mut self.0 {
            Kind::Gzip(gzip) => gzip.write(bytes),
            Kind::Zstd(encoder, _) => encoder.write(bytes),
            Kind::None(out) => out.write(bytes),
        }
    }

    /// Does nothing: what reaches the output when must not change the bytes.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn zstd_encoder<W: Write>(
    level: u8,
    threads: usize,
    out: W,
) -> io::Result<zstd::stream::write::Encoder<'static, W>> {
    let mut encoder = zstd::stream::write::Encoder::new(out, i32::from(level))?;
    let threads_max = if level < ZSTD_LARGE_LEVEL {
        ZSTD_THREADS
    } else {
        encoder.set_parameter(zstd::zstd_safe::CParameter::JobSize(ZSTD_PART_BYTES))?;
        1
    };
    if level >= ZSTD_WIDE_LEVEL {
        encoder.window_log(ZSTD_WINDOW_LOG_MAX)?;
    }
    // Never 0: without workers the bytes are others than with any number of them.
    let threads = threads.clamp(1, threads_max);
    encoder.multithread(u32::try_from(threads).unwrap_or(1))?;
    Ok(encoder)
}

struct Gzip<'scope, 'env, W: Write + Send + 'scope> {
    scope: &'scope Scope<'scope, 'env>,
    level: u8,
    lane: Lane,
    /// The block that is being filled; absent before the first byte and after a block.
    slot: Option<Slot>,
    output: Output<'scope, W>,
}

/// Where the members go.
enum Output<'scope, W> {
    /// Nothing was written yet: a layer of one block needs no thread.
    Idle(W),
    Writing {
        /// In the order of the input.
        members: Sender<Receiver<Slot>>,
        thread: ScopedJoinHandle<'scope, io::Result<W>>,
    },
    /// The thread ended early, and its error was reported.
    Failed,
}

impl<'scope, 'env, W: Write + Send + 'scope> Gzip<'scope, 'env, W> {
    fn new(scope: &'scope Scope<'scope, 'env>, level: u8, pool: &Pool, out: W) -> Self {
        Self {
            scope,
            level,
            lane: pool.lane(),
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
        let block = slot.block();
        let taken = bytes.len().min(BLOCK_BYTES - block.len());
        block.extend_from_slice(&bytes[..taken]);
        if block.len() == BLOCK_BYTES {
            self.submit()?;
        }
        Ok(taken)
    }

    /// Gives the block that was filled to the pool, and who writes the promise of a member.
    fn submit(&mut self) -> io::Result<()> {
        let Some(slot) = self.slot.take() else {
            return Ok(());
        };
        let member = self.lane.submit(slot, self.level);
        self.output = match std::mem::replace(&mut self.output, Output::Failed) {
            Output::Idle(out) => {
                let (members, receiver) = channel();
                let thread = std::thread::Builder::new()
                    .name("layer".to_owned())
                    .spawn_scoped(self.scope, move || write_members(out, &receiver))?;
                Output::Writing { members, thread }
            }
            other => other,
        };
        match &self.output {
            Output::Writing { members, .. } if members.send(member).is_ok() => Ok(()),
            _ => Err(self.failure()),
        }
    }

    /// Why the thread that writes has ended.
    fn failure(&mut self) -> io::Error {
        match std::mem::replace(&mut self.output, Output::Failed) {
            Output::Writing { members, thread } => {
                drop(members);
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
            // No input at all is one empty member: no bytes would be no gzip file.
            Output::Idle(mut out) => {
                let slot = self.slot.take().unwrap_or_else(|| self.lane.slot());
                let member = self.lane.submit(slot, self.level);
                let slot = member.recv().map_err(|_| thread_died())?;
                out.write_all(slot.member())?;
                Ok(out)
            }
            writing => {
                self.output = writing;
                self.submit()?;
                match std::mem::replace(&mut self.output, Output::Failed) {
                    Output::Writing { members, thread } => {
                        drop(members);
                        thread.join().unwrap_or_else(|_| Err(thread_died()))
                    }
                    Output::Idle(_) | Output::Failed => Err(thread_died()),
                }
            }
        }
    }
}

/// Writes members in order until there are no more.
fn write_members<W: Write>(mut out: W, members: &Receiver<Receiver<Slot>>) -> io::Result<W> {
    for member in members {
        let slot = member.recv().map_err(|_| thread_died())?;
        out.write_all(slot.member())?;
    }
    Ok(out)
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

    fn pool(threads: usize) -> Pool {
        Pool::new(NonZeroUsize::new(threads).unwrap()).unwrap()
    }

    /// Three and a half blocks: noise, text, zeros.
    fn sample() -> Vec<u8> {
        let mut state = 1_u64;
        let mut bytes: Vec<u8> = std::iter::repeat_with(|| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            (state >> 56) as u8
        })
        .take(BLOCK_BYTES + 17)
        .collect();
        bytes.extend(
            b"some text that repeats\n"
                .iter()
                .cycle()
                .take(2 * BLOCK_BYTES),
        );
        bytes.resize(bytes.len() + BLOCK_BYTES / 2, 0);
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
        let sample = sample();
        for compression in [
            Compression::GZIP,
            Compression::Gzip { level: 1 },
            Compression::ZSTD,
        ] {
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
        let layers: Vec<(Compression, &'static [u8])> = vec![
            (Compression::GZIP, sample),
            (Compression::ZSTD, sample),
            (Compression::Gzip { level: 1 }, sample),
            (Compression::GZIP, &sample[..BLOCK_BYTES]),
            (Compression::ZSTD, &sample[..BLOCK_BYTES + 1]),
            (Compression::None, sample),
            (Compression::GZIP, &sample[..10]),
            (Compression::GZIP, b""),
            (Compression::Gzip { level: 0 }, sample),
            (Compression::GZIP, &sample[BLOCK_BYTES / 2..]),
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
        for bytes in [&sample[..], b"", b"x", &sample[..BLOCK_BYTES]] {
            for level in [0, 1, 6, 9, 12] {
                if level > 6 && bytes.len() > BLOCK_BYTES {
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
            let compressed = compress(Compression::ZSTD, 2, 65_536, bytes);
            assert!(zstd::decode_all(&compressed[..]).unwrap() == bytes);
            assert!(compress(Compression::None, 1, 65_536, bytes) == bytes);
        }
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
        let digest = |compression| Digest::of(&compress(compression, 2, 65_536, &sample()));
        assert_eq!(digest(Compression::GZIP).short(), "d3b659b8969e");
        assert_eq!(digest(Compression::ZSTD).short(), "4e67e1e37cfc");
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
        // Nothing that failed keeps memory or turns.
        assert_eq!(
            compress_in(&pool, Compression::ZSTD, 1 << 20, &sample),
            compress(Compression::ZSTD, 1, 1 << 20, &sample)
        );
    }

    #[test]
    fn high_levels_of_zstd_have_windows_that_readers_take() {
        // More than the largest window, so that the frame does not say less.
        let zeros = vec![0; 9 << 20];
        for level in [19, 22] {
            let compressed = compress(Compression::Zstd { level }, 1, 1 << 20, &zeros);
            let mut decoder = zstd::stream::read::Decoder::new(&compressed[..]).unwrap();
            decoder.window_log_max(ZSTD_WINDOW_LOG_MAX).unwrap();
            let mut back = Vec::new();
            decoder.read_to_end(&mut back).unwrap();
            assert!(back == zeros, "{level}");
        }
    }
}
