//! [`ReadAhead`]: decompresses on one thread and hashes on another, while a third one makes
//! files or a listing.
//!
//! Each takes about as long as the others, two in the processor, one in the kernel.

use std::io::{self, BufRead, Read, Write};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::thread::{Builder, Scope, ScopedJoinHandle};

use crate::image::{Digest, Hasher};

/// Size of a buffer; most files are written with one call.
const BUFFER_BYTES: usize = 256 << 10;

/// Full buffers that wait before each thread. With those in use this bounds the memory to 2 MiB.
const BUFFERS_AHEAD: usize = 2;

/// What goes from one thread to the next.
type Full = io::Result<Vec<u8>>;

/// Reads what the other threads have read and hashed. Dropped, it ends them.
#[derive(Debug)]
pub(super) struct ReadAhead {
    full: Receiver<Full>,
    empty: Sender<Vec<u8>>,
    current: Vec<u8>,
    at: usize,
}

/// The threads behind a [`ReadAhead`].
#[derive(Debug)]
pub(super) struct Threads<'scope, R> {
    reading: ScopedJoinHandle<'scope, R>,
    hashing: ScopedJoinHandle<'scope, (Digest, u64)>,
}

impl<R> Threads<'_, R> {
    /// Waits for both, which end with the source or with the [`ReadAhead`]. Returns the source,
    /// the digest of all bytes that came, and their number.
    pub(super) fn join(self) -> io::Result<(R, Digest, u64)> {
        let died = |_| io::Error::other("a thread that reads the layer has died");
        let source = self.reading.join().map_err(died)?;
        let (digest, bytes) = self.hashing.join().map_err(died)?;
        Ok((source, digest, bytes))
    }
}

/// Starts threads that read `source` to its end and hash it.
pub(super) fn read_ahead<'scope, R: Read + Send + 'scope>(
    scope: &'scope Scope<'scope, '_>,
    mut source: R,
) -> io::Result<(ReadAhead, Threads<'scope, R>)> {
    let (read, to_hash) = sync_channel(BUFFERS_AHEAD);
    let (hashed, full) = sync_channel(BUFFERS_AHEAD);
    let (empty, to_fill) = channel();
    let reading = Builder::new()
        .name("layer".to_owned())
        .spawn_scoped(scope, move || {
            produce(&mut source, &read, &to_fill);
            source
        })?;
    let hashing = Builder::new()
        .name("layer digest".to_owned())
        .spawn_scoped(scope, move || hash(&to_hash, &hashed))?;
    let ahead = ReadAhead {
        full,
        empty,
        current: Vec::new(),
        at: 0,
    };
    Ok((ahead, Threads { reading, hashing }))
}

/// What is written on one thread is read on another, which may give up: then it is lost.
pub(super) fn pipe() -> (PipeWriter, ReadAhead) {
    let (sender, full) = sync_channel(BUFFERS_AHEAD);
    let (empty, to_fill) = channel();
    let writer = PipeWriter {
        full: Some(sender),
        empty: to_fill,
        buffer: Vec::with_capacity(BUFFER_BYTES),
    };
    let reader = ReadAhead {
        full,
        empty,
        current: Vec::new(),
        at: 0,
    };
    (writer, reader)
}

/// The one end of [`pipe`]. What it holds is handed on by `flush`, and not when it is dropped.
#[derive(Debug)]
pub(super) struct PipeWriter {
    /// Absent where nobody reads any more.
    full: Option<SyncSender<Full>>,
    empty: Receiver<Vec<u8>>,
    buffer: Vec<u8>,
}

impl Write for PipeWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let taken = bytes.len().min(BUFFER_BYTES - self.buffer.len());
        self.buffer.extend_from_slice(&bytes[..taken]);
        if self.buffer.len() == BUFFER_BYTES {
            self.flush()?;
        }
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        let mut next = self.empty.try_recv().unwrap_or_default();
        next.clear();
        next.reserve_exact(BUFFER_BYTES);
        let buffer = std::mem::replace(&mut self.buffer, next);
        let is_heard = |full: &SyncSender<Full>| full.send(Ok(buffer)).is_ok();
        if !self.full.as_ref().is_some_and(is_heard) {
            self.full = None;
        }
        Ok(())
    }
}

/// Hands on what comes, until nothing does, or nobody wants more.
fn hash(from: &Receiver<Full>, to: &SyncSender<Full>) -> (Digest, u64) {
    let (mut hasher, mut bytes) = (Hasher::new(), 0);
    for next in from {
        if let Ok(buffer) = &next {
            hasher.update(buffer);
            bytes += buffer.len() as u64;
        }
        if to.send(next).is_err() {
            break;
        }
    }
    (hasher.finish(), bytes)
}

/// Sends full buffers until the source ends or fails, or nobody reads any more.
fn produce(source: &mut impl Read, full: &SyncSender<Full>, empty: &Receiver<Vec<u8>>) {
    loop {
        let mut buffer = empty
            .try_recv()
            .unwrap_or_else(|_| Vec::with_capacity(BUFFER_BYTES));
        buffer.clear();
        // Keeps what it has read when it fails, and retries when it is interrupted.
        let result = source
            .by_ref()
            .take(BUFFER_BYTES as u64)
            .read_to_end(&mut buffer);
        let ended = buffer.len() < BUFFER_BYTES;
        if !buffer.is_empty() && full.send(Ok(buffer)).is_err() {
            return;
        }
        if let Err(error) = result {
            // Nobody there to hear it is no fault.
            let _ = full.send(Err(error));
            return;
        }
        if ended {
            return;
        }
    }
}

impl BufRead for ReadAhead {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.at == self.current.len()
            && let Ok(next) = self.full.recv()
        {
            let used = std::mem::replace(&mut self.current, next?);
            self.at = 0;
            // Fails at the end only, where the other thread needs no more buffers.
            let _ = self.empty.send(used);
        }
        Ok(&self.current[self.at..])
    }

    fn consume(&mut self, amount: usize) {
        self.at = (self.at + amount).min(self.current.len());
    }
}

impl Read for ReadAhead {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let available = self.fill_buf()?;
        let length = available.len().min(buffer.len());
        buffer[..length].copy_from_slice(&available[..length]);
        self.consume(length);
        Ok(length)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes, then an error, a few at a time.
    struct Failing(usize);

    impl Read for Failing {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let length = buffer.len().min(self.0).min(1000);
            if length == 0 {
                return Err(io::Error::other("the network is down"));
            }
            buffer[..length].fill(7);
            self.0 -= length;
            Ok(length)
        }
    }

    #[test]
    fn all_bytes_arrive_and_then_the_end_or_the_error() {
        let sample: Vec<u8> = (0..3_000_000_u32).map(|n| (n % 251) as u8).collect();
        for length in [0, 1, BUFFER_BYTES, 3_000_000] {
            let got = std::thread::scope(|scope| {
                let (mut ahead, threads) = read_ahead(scope, &sample[..length]).unwrap();
                let mut got = Vec::new();
                ahead.read_to_end(&mut got).unwrap();
                let (rest, digest, bytes) = threads.join().unwrap();
                assert_eq!(rest, b"", "the source is read to its end");
                assert_eq!(digest, Digest::of(&sample[..length]));
                assert_eq!(bytes, length as u64);
                got
            });
            assert!(got == sample[..length], "{length}");
        }
        for length in [0, 999, 2 * BUFFER_BYTES + 1] {
            let (got, error) = std::thread::scope(|scope| {
                let (mut ahead, _) = read_ahead(scope, Failing(length)).unwrap();
                let mut got = Vec::new();
                let error = ahead.read_to_end(&mut got).unwrap_err();
                (got, error)
            });
            assert_eq!(
                (got.len(), error.to_string().as_str()),
                (length, "the network is down")
            );
        }
    }

    #[test]
    fn who_stops_reading_ends_the_threads() {
        std::thread::scope(|scope| {
            let (mut ahead, threads) = read_ahead(scope, io::repeat(1)).unwrap();
            assert_eq!(ahead.fill_buf().unwrap()[0], 1);
            drop(ahead);
            threads.join().unwrap();
        });
    }
}
