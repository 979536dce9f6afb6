//! [`Compressor`]: the tar of a layer → its stored bytes, on several threads.
//!
//! Gzip is a sequence of independent members, one for each [`GZIP_BLOCK_BYTES`] of input
//! (RFC 1952, section 2.2: "A gzip file consists of a series of members"). Blocks are cut
//! by position alone, so the output depends on neither the number of threads nor on how
//! the input was written.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::num::NonZeroUsize;
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use libdeflater::{CompressionLvl, Compressor as Deflater};

use crate::image::MediaType;

/// Input of one gzip member. Changing it changes the digest of every layer. Smaller
/// blocks compress worse (the window starts empty), larger ones take more memory.
const GZIP_BLOCK_BYTES: usize = 1 << 20;

/// Blocks that wait or are worked on, for each thread: one in work, one ready. With input
/// and output this bounds the memory to some 4 MiB a thread.
const BLOCKS_PER_THREAD: usize = 2;

/// More threads would only wait for the one that writes the tar.
const THREADS_MAX: usize = 64;

/// How a layer is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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

impl Compression {
    /// Gzip at level 6: as fast as other builders' gzip, and smaller.
    pub const GZIP: Self = Self::Gzip { level: 6 };
    /// Zstandard at level 3, its default.
    pub const ZSTD: Self = Self::Zstd { level: 3 };

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
#[expect(missing_debug_implementations, reason = "the encoders have none")]
pub struct Compressor<W: Write>(Kind<W>);

enum Kind<W: Write> {
    Gzip(Gzip<W>),
    Zstd(zstd::stream::write::Encoder<'static, W>),
    None(W),
}

impl<W: Write> Compressor<W> {
    /// Compresses into `out`, on `threads` threads beside the one that writes.
    ///
    /// # Errors
    /// `InvalidInput` for a level that there is none of; those of starting a thread.
    pub fn new(compression: Compression, threads: NonZeroUsize, out: W) -> io::Result<Self> {
        let threads = threads.get().min(THREADS_MAX);
        Ok(Self(match compression {
            Compression::Gzip { level } => Kind::Gzip(Gzip::new(level, threads, out)?),
            Compression::Zstd { level } => {
                if !(1..=22).contains(&level) {
                    return Err(invalid_level("zstd", level, "1 to 22"));
                }
                let mut encoder = zstd::stream::write::Encoder::new(out, i32::from(level))?;
                // Never 0: without workers the bytes are others than with any number of them.
                encoder.multithread(u32::try_from(threads).unwrap_or(1))?;
                Kind::Zstd(encoder)
            }
            Compression::None => Kind::None(out),
        }))
    }

    /// Writes what is left and returns the output.
    ///
    /// # Errors
    /// Those of the output.
    pub fn finish(self) -> io::Result<W> {
        match self.0 {
            Kind::Gzip(gzip) => gzip.finish(),
            Kind::Zstd(encoder) => encoder.finish(),
            Kind::None(out) => Ok(out),
        }
    }
}

impl<W: Write> Write for Compressor<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match &mut self.0 {
            Kind::Gzip(gzip) => gzip.write(bytes),
            Kind::Zstd(encoder) => encoder.write(bytes),
            Kind::None(out) => out.write(bytes),
        }
    }

    /// Does nothing: what reaches the output when must not change the bytes.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn invalid_level(name: &str, level: u8, range: &str) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidInput,
        format!("there is no {name} level {level}; levels are {range}"),
    )
}

/// A block to compress, and where the member goes.
struct Job {
    block: Vec<u8>,
    result: Sender<Finished>,
}

/// A member, and the block's memory for the next one.
struct Finished {
    member: Vec<u8>,
    block: Vec<u8>,
}

struct Gzip<W> {
    out: W,
    block: Vec<u8>,
    blocks: u64,
    spare: Vec<Vec<u8>>,
    /// In the order of the input.
    pending: VecDeque<Receiver<Finished>>,
    pending_max: usize,
    workers: Workers,
}

/// Threads that end when the sender is gone.
struct Workers {
    jobs: Option<SyncSender<Job>>,
    threads: Vec<JoinHandle<()>>,
}

impl<W: Write> Gzip<W> {
    fn new(level: u8, threads: usize, out: W) -> io::Result<Self> {
        let level = CompressionLvl::new(i32::from(level))
            .map_err(|_| invalid_level("gzip", level, "0 to 12"))?;
        let pending_max = threads * BLOCKS_PER_THREAD;
        let (jobs, queue) = sync_channel(pending_max);
        let mut workers = Workers {
            jobs: Some(jobs),
            threads: Vec::with_capacity(threads),
        };
        let queue = Arc::new(Mutex::new(queue));
        for _ in 0..threads {
            let queue = Arc::clone(&queue);
            let thread = std::thread::Builder::new()
                .name("gzip".to_owned())
                .spawn(move || work(&queue, level))?;
            workers.threads.push(thread);
        }
        Ok(Self {
            out,
            block: Vec::with_capacity(GZIP_BLOCK_BYTES),
            blocks: 0,
            spare: Vec::new(),
            pending: VecDeque::with_capacity(pending_max),
            pending_max,
            workers,
        })
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let room = GZIP_BLOCK_BYTES - self.block.len();
        let taken = bytes.len().min(room);
        self.block.extend_from_slice(&bytes[..taken]);
        if self.block.len() == GZIP_BLOCK_BYTES {
            self.submit()?;
        }
        Ok(taken)
    }

    fn submit(&mut self) -> io::Result<()> {
        while self.pending.len() >= self.pending_max {
            self.take_oldest()?;
        }
        let next = self
            .spare
            .pop()
            .unwrap_or_else(|| Vec::with_capacity(GZIP_BLOCK_BYTES));
        let block = std::mem::replace(&mut self.block, next);
        let (result, receiver) = channel();
        let sender = self.workers.jobs.as_ref();
        let sent = sender.map(|jobs| jobs.send(Job { block, result }));
        if !matches!(sent, Some(Ok(()))) {
            return Err(worker_died());
        }
        self.pending.push_back(receiver);
        self.blocks += 1;
        Ok(())
    }

    fn take_oldest(&mut self) -> io::Result<()> {
        if let Some(receiver) = self.pending.pop_front() {
            let Finished { member, mut block } = receiver.recv().map_err(|_| worker_died())?;
            block.clear();
            self.spare.push(block);
            self.out.write_all(&member)?;
        }
        Ok(())
    }

    fn finish(mut self) -> io::Result<W> {
        // No input at all is one empty member: no bytes would be no gzip file.
        if !self.block.is_empty() || self.blocks == 0 {
            self.submit()?;
        }
        while !self.pending.is_empty() {
            self.take_oldest()?;
        }
        Ok(self.out)
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.jobs = None;
        for thread in self.threads.drain(..) {
            // A panic in there has already shown itself as a missing result.
            let _ = thread.join();
        }
    }
}

fn worker_died() -> io::Error {
    io::Error::other("a compression thread has died")
}

fn work(queue: &Mutex<Receiver<Job>>, level: CompressionLvl) {
    let mut deflater = Deflater::new(level);
    loop {
        // The guard lives for this statement only, so that others can take while this works.
        let job = queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(Job { block, result }) = job else {
            return;
        };
        let mut member = vec![0; deflater.gzip_compress_bound(block.len())];
        let length = deflater
            .gzip_compress(&block, &mut member)
            .expect("the bound is large enough for any input");
        member.truncate(length);
        // Nobody waits where the writer gave up; that is no fault.
        let _ = result.send(Finished { member, block });
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::process::{Command, Stdio};

    use super::*;
    use crate::image::Digest;

    /// Three and a half blocks: noise, text, zeros.
    fn sample() -> Vec<u8> {
        let mut state = 1_u64;
        let mut bytes: Vec<u8> = std::iter::repeat_with(|| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            (state >> 56) as u8
        })
        .take(GZIP_BLOCK_BYTES + 17)
        .collect();
        bytes.extend(
            b"some text that repeats\n"
                .iter()
                .cycle()
                .take(2 * GZIP_BLOCK_BYTES),
        );
        bytes.resize(bytes.len() + GZIP_BLOCK_BYTES / 2, 0);
        bytes
    }

    fn compress(compression: Compression, threads: usize, pieces: usize, bytes: &[u8]) -> Vec<u8> {
        let threads = NonZeroUsize::new(threads).unwrap();
        let mut compressor = Compressor::new(compression, threads, Vec::new()).unwrap();
        for piece in bytes.chunks(pieces) {
            compressor.write_all(piece).unwrap();
        }
        compressor.finish().unwrap()
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

    #[test]
    fn every_reader_reads_it() {
        let sample = sample();
        for bytes in [&sample[..], b"", b"x", &sample[..GZIP_BLOCK_BYTES]] {
            for level in [0, 1, 6, 9, 12] {
                if level > 6 && bytes.len() > GZIP_BLOCK_BYTES {
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
        // with the compression library, and then knowingly.
        let digest = |compression| Digest::of(&compress(compression, 2, 65_536, &sample()));
        assert_eq!(digest(Compression::GZIP).short(), "0102e78d7fcb");
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
            let error = Compressor::new(compression, NonZeroUsize::MIN, Vec::new())
                .err()
                .unwrap();
            assert_eq!(error.to_string(), message);
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
        for compression in [Compression::GZIP, Compression::ZSTD, Compression::None] {
            let threads = NonZeroUsize::new(2).unwrap();
            let mut compressor = Compressor::new(compression, threads, Full(10_000)).unwrap();
            let written = compressor.write_all(&sample);
            let finished = written.and_then(|()| compressor.finish().map(|_| ()));
            assert_eq!(finished.unwrap_err().kind(), io::ErrorKind::StorageFull);
        }
    }
}
