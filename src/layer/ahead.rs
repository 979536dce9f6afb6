//! [`ReadAhead`]: decompresses and hashes on one thread while another one makes files.
//!
//! Either takes about as long as the other, one in the processor, one in the kernel.

use std::io::{self, BufRead, Read};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::thread::{Scope, ScopedJoinHandle};

/// Size of a buffer; most files are written with one call.
const BUFFER_BYTES: usize = 256 << 10;

/// Full buffers that wait. With the two in use this bounds the memory to 1.5 MiB.
const BUFFERS_AHEAD: usize = 4;

/// Reads what the other thread has read. Dropped, it ends that thread.
#[derive(Debug)]
pub(super) struct ReadAhead {
    full: Receiver<io::Result<Vec<u8>>>,
    empty: Sender<Vec<u8>>,
    current: Vec<u8>,
    at: usize,
}

/// Starts a thread that reads `source` to its end; it returns the source.
pub(super) fn read_ahead<'scope, R: Read + Send + 'scope>(
    scope: &'scope Scope<'scope, '_>,
    mut source: R,
) -> io::Result<(ReadAhead, ScopedJoinHandle<'scope, R>)> {
    let (full_sender, full) = sync_channel(BUFFERS_AHEAD);
    let (empty, empty_receiver) = channel();
    let thread = std::thread::Builder::new()
        .name("layer".to_owned())
        .spawn_scoped(scope, move || {
            produce(&mut source, &full_sender, &empty_receiver);
            source
        })?;
    let ahead = ReadAhead {
        full,
        empty,
        current: Vec::new(),
        at: 0,
    };
    Ok((ahead, thread))
}

/// Sends full buffers until the source ends or fails, or nobody reads any more.
fn produce(
    source: &mut impl Read,
    full: &SyncSender<io::Result<Vec<u8>>>,
    empty: &Receiver<Vec<u8>>,
) {
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
                let (mut ahead, thread) = read_ahead(scope, &sample[..length]).unwrap();
                let mut got = Vec::new();
                ahead.read_to_end(&mut got).unwrap();
                assert_eq!(thread.join().unwrap(), b"", "the source is read to its end");
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
    fn who_stops_reading_ends_the_thread() {
        std::thread::scope(|scope| {
            let (mut ahead, thread) = read_ahead(scope, io::repeat(1)).unwrap();
            assert_eq!(ahead.fill_buf().unwrap()[0], 1);
            drop(ahead);
            thread.join().unwrap();
        });
    }
}
