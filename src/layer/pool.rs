//! [`Pool`]: the threads that compress, and the memory that they do it in, for all layers at once.
//!
//! A [`Slot`] is the memory of one block and, once that is compressed, of what it became; a
//! [`Context`] is the memory to compress with. There are never more of them, in use or kept
//! for the next, than fit into [`BUDGET_BYTES`], whatever the codecs, the levels and the
//! number of layers and threads.
//!
//! Every layer may hold its share of the slots. A layer that has to wait for one holds none
//! but the block that it just filled and gave away, and what was given away comes back
//! without its doing. A thread that has to wait for a context holds nothing. So no layer
//! waits for ever.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::num::NonZeroUsize;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use super::codec::{Codec, Context};
use super::gzip;

/// Memory for the blocks of all layers that are sealed at one time, and to compress them.
pub const BUDGET_BYTES: usize = 64 << 20;

/// The part of it that slots take for each thread: eight blocks of gzip or two of zstd, what
/// is in work, and what is ready or waits for its turn to be written, which a slow block
/// before it can make long.
const SLOTS_BYTES_PER_THREAD: usize = 9 << 20;

/// The part of it that slots take at most. The rest is for contexts: 19 for gzip and 6 for
/// zstd at the levels that are the default, 2 of the largest.
const SLOTS_BYTES_MAX: usize = 28 << 20;

/// Compresses the blocks of all layers of this process. Clones are the same pool.
#[derive(Clone, Debug)]
pub struct Pool(Arc<Threads>);

#[derive(Debug)]
struct Threads {
    shared: Arc<Shared>,
    handles: Vec<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    /// There is a job or a context, or there will be no job any more.
    work: Condvar,
    /// A slot became free, or a layer ended, so that shares are larger.
    room: Condvar,
}

#[derive(Debug)]
struct State {
    queue: VecDeque<Job>,
    buffers: Stock<usize, Vec<u8>>,
    contexts: Stock<Codec, Context>,
    /// For each layer, the bytes of the slots that it holds.
    held: BTreeMap<u64, usize>,
    last_lane: u64,
    is_closed: bool,
}

/// Memory in pieces of several kinds that is kept from one use to the next, and never more
/// than a limit.
struct Stock<K, T> {
    limit: usize,
    /// Of all pieces that there are, in use and idle.
    bytes: usize,
    /// With kind and size.
    idle: Vec<(K, usize, T)>,
}

/// What a block became, in its slot.
pub(super) type Compressed = io::Result<Slot>;

/// A block to compress, and whom to tell.
struct Job {
    slot: Slot,
    codec: Codec,
    result: Sender<Compressed>,
}

impl std::fmt::Debug for Job {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Job")
            .field("codec", &self.codec)
            .finish_non_exhaustive()
    }
}

/// Memory of one block and of what it becomes, until it is dropped.
pub(super) struct Slot {
    shared: Arc<Shared>,
    lane: u64,
    buffer: Vec<u8>,
    buffer_bytes: usize,
}

/// A context in use, until it is dropped.
struct Lent<'s> {
    shared: &'s Shared,
    codec: Codec,
    context: Option<Context>,
}

/// One layer's access to the pool.
#[derive(Debug)]
pub(super) struct Lane {
    shared: Arc<Shared>,
    id: u64,
    codec: Codec,
}

/// The pool of this process, once there is one.
static SHARED: Mutex<Option<Pool>> = Mutex::new(None);

impl Pool {
    /// The pool of this process, with as many threads as there are processors. Its threads
    /// are started by the first call and wait for work as long as the process lives.
    ///
    /// # Errors
    /// Those of starting a thread.
    pub fn shared() -> io::Result<Self> {
        let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(pool) = &*shared {
            return Ok(pool.clone());
        }
        let threads = std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN);
        Ok(shared.insert(Self::new(threads)?).clone())
    }

    /// A pool of its own with `threads` threads, at most one for each block of gzip that there
    /// is memory for; they end when the last clone and all work are gone.
    ///
    /// # Errors
    /// Those of starting a thread.
    pub fn new(threads: NonZeroUsize) -> io::Result<Self> {
        let threads = threads.get().min(SLOTS_BYTES_MAX / gzip::member_bound());
        let slots_bytes = (threads * SLOTS_BYTES_PER_THREAD).min(SLOTS_BYTES_MAX);
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                queue: VecDeque::new(),
                buffers: Stock::new(slots_bytes),
                contexts: Stock::new(BUDGET_BYTES - slots_bytes),
                held: BTreeMap::new(),
                last_lane: 0,
                is_closed: false,
            }),
            work: Condvar::new(),
            room: Condvar::new(),
        });
        let mut pool = Threads {
            shared,
            handles: Vec::with_capacity(threads),
        };
        for _ in 0..threads {
            let shared = Arc::clone(&pool.shared);
            let thread = std::thread::Builder::new()
                .name("compress".to_owned())
                .spawn(move || shared.work())?;
            pool.handles.push(thread);
        }
        Ok(Self(Arc::new(pool)))
    }

    /// Lets one more layer take its share.
    pub(super) fn lane(&self, codec: Codec) -> Lane {
        let shared = Arc::clone(&self.0.shared);
        let mut state = shared.lock();
        state.last_lane += 1;
        let id = state.last_lane;
        state.held.insert(id, 0);
        drop(state);
        Lane { shared, id, codec }
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.shared.lock().is_closed = true;
        self.shared.work.notify_all();
        for handle in self.handles.drain(..) {
            // A panic in there has already shown itself as a missing result.
            let _ = handle.join();
        }
    }
}

impl Lane {
    /// Memory for a block, empty; waits until there is some.
    pub(super) fn slot(&self) -> Slot {
        let buffer_bytes = self.codec.bound();
        let mut state = self.shared.lock();
        let mut buffer = loop {
            if state.may_hold(self.id, buffer_bytes) {
                let make = || Vec::with_capacity(buffer_bytes);
                if let Some(buffer) = state.buffers.take(buffer_bytes, buffer_bytes, make) {
                    break buffer;
                }
            }
            state = self.shared.wait(&self.shared.room, state);
        };
        if let Some(held) = state.held.get_mut(&self.id) {
            *held += buffer_bytes;
        }
        drop(state);
        buffer.clear();
        Slot {
            shared: Arc::clone(&self.shared),
            lane: self.id,
            buffer,
            buffer_bytes,
        }
    }

    /// Has a block compressed; the slot comes back with what it became.
    pub(super) fn submit(&self, slot: Slot) -> Receiver<Compressed> {
        let (result, receiver) = channel();
        let job = Job {
            slot,
            codec: self.codec,
            result,
        };
        self.shared.lock().queue.push_back(job);
        self.shared.work.notify_one();
        receiver
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.held.remove(&self.id);
        if state.held.is_empty() {
            state.buffers.clear();
            state.contexts.clear();
        }
        drop(state);
        self.shared.room.notify_all();
    }
}

impl Slot {
    /// The uncompressed bytes, at most [`Codec::block_bytes`].
    pub(super) fn block(&mut self) -> &mut Vec<u8> {
        &mut self.buffer
    }

    /// What came back from [`Lane::submit`].
    pub(super) fn compressed(&self) -> &[u8] {
        &self.buffer
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let buffer = std::mem::take(&mut self.buffer);
        let bytes = self.buffer_bytes;
        let mut state = self.shared.lock();
        if let Some(held) = state.held.get_mut(&self.lane) {
            *held -= bytes;
        }
        // Between two layers the memory is given back.
        let kept = (!state.held.is_empty()).then_some(buffer);
        state.buffers.give_back(bytes, bytes, kept);
        drop(state);
        self.shared.room.notify_all();
    }
}

impl Drop for Lent<'_> {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        let context = self.context.take();
        // What a panic left behind is not used again.
        let is_kept = !state.held.is_empty() && !std::thread::panicking();
        let kept = context.filter(|_| is_kept);
        let bytes = self.codec.context_bytes();
        state.contexts.give_back(self.codec, bytes, kept);
        // Any thread may be the one that now can begin.
        if !state.queue.is_empty() {
            self.shared.work.notify_all();
        }
    }
}

impl State {
    /// Whether a slot of `bytes` more is within a layer's share, which is one slot at least.
    fn may_hold(&self, lane: u64, bytes: usize) -> bool {
        let share = self.buffers.limit / self.held.len().max(1);
        let held = self.held.get(&lane).copied().unwrap_or(0);
        held == 0 || held + bytes <= share
    }
}

impl<K: PartialEq, T> Stock<K, T> {
    fn new(limit: usize) -> Self {
        Self {
            limit,
            bytes: 0,
            idle: Vec::new(),
        }
    }

    /// An idle piece of the kind, or one that is made where there is room, also in the place
    /// of idle ones of other kinds; none where others have to come back first.
    fn take(&mut self, kind: K, bytes: usize, make: impl FnOnce() -> T) -> Option<T> {
        if let Some(at) = self.idle.iter().rposition(|(of, ..)| *of == kind) {
            return Some(self.idle.swap_remove(at).2);
        }
        while self.bytes + bytes > self.limit {
            let (_, freed, _) = self.idle.pop()?;
            self.bytes -= freed;
        }
        self.bytes += bytes;
        Some(make())
    }

    /// Ends the use of a piece, which is kept for the next one if it is given.
    fn give_back(&mut self, kind: K, bytes: usize, kept: Option<T>) {
        match kept {
            Some(piece) => self.idle.push((kind, bytes, piece)),
            None => self.bytes -= bytes,
        }
    }

    /// Drops what is idle.
    fn clear(&mut self) {
        for (_, bytes, _) in std::mem::take(&mut self.idle) {
            self.bytes -= bytes;
        }
    }
}

impl<K, T> std::fmt::Debug for Stock<K, T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Stock")
            .field("limit", &self.limit)
            .field("bytes", &self.bytes)
            .field("idle", &self.idle.len())
            .finish()
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing panics while holding it, and the state is whole at any time.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'s>(&self, on: &Condvar, state: MutexGuard<'s, State>) -> MutexGuard<'s, State> {
        on.wait(state).unwrap_or_else(PoisonError::into_inner)
    }

    /// What each thread does.
    fn work(&self) {
        while let Some((job, mut lent)) = self.next() {
            let Job {
                mut slot, result, ..
            } = job;
            let context = lent.context.as_mut().expect("it is there until the drop");
            let compressed = context.compress(&mut slot.buffer);
            drop(lent);
            // Nobody waits where the layer was given up; that is no fault.
            let _ = result.send(compressed.map(|()| slot));
        }
    }

    /// The next job, in the order in which they came, with what it takes to do it; none once
    /// there will be none any more.
    fn next(&self) -> Option<(Job, Lent<'_>)> {
        let mut state = self.lock();
        loop {
            if let Some(job) = state.queue.front() {
                let codec = job.codec;
                let make = || Context::new(codec);
                let bytes = codec.context_bytes();
                if let Some(context) = state.contexts.take(codec, bytes, make)
                    && let Some(job) = state.queue.pop_front()
                {
                    let lent = Lent {
                        shared: self,
                        codec,
                        context: Some(context),
                    };
                    return Some((job, lent));
                }
            } else if state.is_closed {
                return None;
            }
            state = self.wait(&self.work, state);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layer::zstd;

    fn pool(threads: usize) -> Pool {
        Pool::new(NonZeroUsize::new(threads).unwrap()).unwrap()
    }

    /// Of the pool with one thread: what slots take, and for each lane what its slots do, in
    /// slots of `codec`.
    fn slots(pool: &Pool, codec: Codec) -> (usize, Vec<usize>) {
        let state = pool.0.shared.lock();
        let held = state.held.values().map(|bytes| bytes / codec.bound());
        (state.buffers.bytes / codec.bound(), held.collect())
    }

    #[test]
    fn slots_are_shared_fairly_and_never_exceed_the_budget() {
        for (codec, all) in [(Codec::Gzip(6), 8), (Codec::Zstd(3), 2)] {
            let pool = pool(1);
            let first = pool.lane(codec);
            let mut held: Vec<Slot> = (0..all).map(|_| first.slot()).collect();
            assert_eq!(slots(&pool, codec), (all, vec![all]));
            let second = pool.lane(codec);
            assert!(!pool.0.shared.lock().may_hold(first.id, codec.bound()));
            // The second layer's one slot is there as soon as the first gives one back, which
            // itself gets no more than its half.
            let got = std::thread::scope(|scope| {
                let waiting = scope.spawn(|| second.slot());
                held.pop();
                waiting.join().unwrap()
            });
            assert_eq!(slots(&pool, codec), (all, vec![all - 1, 1]));
            held.truncate(all / 2 - 1);
            held.push(first.slot());
            drop(got);
            // Those that are not held are kept, as long as there is a layer.
            assert_eq!(slots(&pool, codec), (all, vec![all / 2, 0]));
            let idle = pool.0.shared.lock().buffers.idle.len();
            assert_eq!(idle, all - all / 2);
            drop((held, first, second));
            assert_eq!(slots(&pool, codec), (0, vec![]));
        }
    }

    #[test]
    fn layers_of_both_codecs_share_the_memory() {
        let pool = pool(1);
        let (gzip, zstd) = (Codec::Gzip(6), Codec::Zstd(3));
        let first = pool.lane(gzip);
        let held: Vec<Slot> = (0..8).map(|_| first.slot()).collect();
        let second = pool.lane(zstd);
        drop(held);
        // What one codec has no use for makes room for the other.
        let got = second.slot();
        let state = pool.0.shared.lock();
        assert_eq!(state.buffers.bytes, 4 * gzip.bound() + zstd.bound());
        assert!(state.buffers.bytes <= state.buffers.limit);
        assert_eq!(state.buffers.idle.len(), 4);
        drop(state);
        drop(got);
    }

    #[test]
    fn memory_to_compress_with_is_kept_from_block_to_block_and_no_longer() {
        let pool = pool(2);
        let codecs = [Codec::Gzip(6), Codec::Zstd(3), Codec::Zstd(1)];
        let other = pool.lane(Codec::Gzip(1));
        for codec in codecs {
            let lane = pool.lane(codec);
            for _ in 0..3 {
                let mut slot = lane.slot();
                slot.block().extend_from_slice(b"text");
                let slot = lane.submit(slot).recv().unwrap().unwrap();
                assert!(!slot.compressed().is_empty());
            }
        }
        let state = pool.0.shared.lock();
        let kinds: Vec<Codec> = state.contexts.idle.iter().map(|(kind, ..)| *kind).collect();
        assert_eq!(kinds, codecs);
        let bytes: usize = codecs.iter().map(|codec| codec.context_bytes()).sum();
        assert_eq!(state.contexts.bytes, bytes);
        drop(state);
        drop(other);
        let state = pool.0.shared.lock();
        assert_eq!((state.contexts.bytes, state.contexts.idle.len()), (0, 0));
        assert_eq!((state.buffers.bytes, state.buffers.idle.len()), (0, 0));
    }

    #[test]
    fn what_is_kept_makes_room_and_what_is_in_use_does_not() {
        let mut stock: Stock<u8, &str> = Stock::new(10);
        assert_eq!(stock.take(1, 6, || "one"), Some("one"));
        assert_eq!(stock.take(2, 6, || "two"), None);
        assert_eq!(stock.take(3, 4, || "three"), Some("three"));
        stock.give_back(3, 4, Some("three"));
        // Not enough, though it was dropped.
        assert_eq!(stock.take(2, 6, || "two"), None);
        assert_eq!((stock.bytes, stock.idle.len()), (6, 0));
        stock.give_back(1, 6, Some("one"));
        assert_eq!(stock.take(1, 6, || unreachable!()), Some("one"));
        stock.give_back(1, 6, Some("one"));
        assert_eq!(stock.take(2, 10, || "two"), Some("two"));
        assert_eq!((stock.bytes, stock.idle.len()), (10, 0));
        stock.give_back(2, 10, None);
        assert_eq!(stock.bytes, 0);
    }

    #[test]
    fn every_machine_stays_within_the_budget_and_has_room_for_every_codec() {
        let codecs = || {
            let gzip = gzip::LEVELS.map(Codec::Gzip);
            gzip.chain(zstd::LEVELS.map(Codec::Zstd))
        };
        for threads in [1, 2, 3, 4, 1000] {
            let pool = pool(threads);
            let state = pool.0.shared.lock();
            let (slots, contexts) = (state.buffers.limit, state.contexts.limit);
            assert_eq!(slots + contexts, BUDGET_BYTES);
            for codec in codecs() {
                // One to fill and one in work.
                assert!(slots >= 2 * codec.bound(), "{threads}, {codec:?}");
                let parallel = contexts / codec.context_bytes();
                assert!(parallel >= threads.min(2), "{threads}, {codec:?}");
            }
            drop(state);
            assert_eq!(pool.0.handles.len(), threads.min(27));
        }
        let contexts = BUDGET_BYTES - SLOTS_BYTES_MAX;
        assert_eq!(contexts / Codec::Gzip(6).context_bytes(), 19);
        assert_eq!(contexts / Codec::Zstd(3).context_bytes(), 6);
    }
}
