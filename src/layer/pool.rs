//! [`Pool`]: the threads that compress, and the memory that they do it in, for all layers at once.
//!
//! A [`Slot`] is the memory of one block and of what it becomes. There are so many that all
//! of them fit into [`BUDGET_BYTES`], and every layer may hold its share of them. A layer
//! that has to wait for one holds none but the block that it just filled and gave away, and
//! what was given away comes back without its doing: so no layer waits for ever.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::num::NonZeroUsize;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use super::gzip::{BLOCK_BYTES, Deflate, member_bound};

/// Memory for blocks and compressed members of all layers that are sealed at one time.
pub const BUDGET_BYTES: usize = 64 << 20;

/// Slots for each thread: what is in work, and what is ready or waits for its turn to be
/// written, which a slow block before it can make long.
const SLOTS_PER_THREAD: usize = 8;

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
    /// There is a job, or there will be none any more.
    work: Condvar,
    /// A slot or the turn of zstd became free, or a layer ended, so that shares are larger.
    room: Condvar,
    slots: usize,
}

#[derive(Debug, Default)]
struct State {
    queue: VecDeque<Job>,
    /// Memory of slots that nobody holds.
    spare: Vec<Buffers>,
    /// For each layer, the number of slots that it holds.
    held: BTreeMap<u64, usize>,
    /// The sum of these, and of what ended layers still hold.
    in_use: usize,
    last_lane: u64,
    is_zstd_busy: bool,
    is_closed: bool,
}

/// A block to compress, and whom to tell.
struct Job {
    slot: Slot,
    level: u8,
    result: Sender<Slot>,
}

impl std::fmt::Debug for Job {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Job")
            .field("level", &self.level)
            .finish_non_exhaustive()
    }
}

#[derive(Debug, Default)]
struct Buffers {
    block: Vec<u8>,
    /// As long as a member can be; zeroed once and never again.
    member: Vec<u8>,
}

/// Memory of one block and its member, until it is dropped.
pub(super) struct Slot {
    shared: Arc<Shared>,
    lane: u64,
    buffers: Buffers,
    member_bytes: usize,
}

/// One layer's access to the pool.
#[derive(Debug)]
pub(super) struct Lane {
    shared: Arc<Shared>,
    id: u64,
}

/// Says that the zstd layer that has it may run, until it is dropped.
pub(super) struct ZstdTurn(Arc<Shared>);

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

    /// A pool of its own with `threads` threads, at most one for each slot; they end when the
    /// last clone and all work are gone.
    ///
    /// # Errors
    /// Those of starting a thread.
    pub fn new(threads: NonZeroUsize) -> io::Result<Self> {
        let slots_max = BUDGET_BYTES / (BLOCK_BYTES + member_bound());
        let threads = threads.get().min(slots_max);
        let shared = Arc::new(Shared {
            state: Mutex::default(),
            work: Condvar::new(),
            room: Condvar::new(),
            slots: (threads * SLOTS_PER_THREAD).min(slots_max),
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

    /// The number of threads.
    pub(super) fn threads(&self) -> usize {
        self.0.handles.len()
    }

    /// Lets one more layer take its share.
    pub(super) fn lane(&self) -> Lane {
        let shared = Arc::clone(&self.0.shared);
        let mut state = shared.lock();
        state.last_lane += 1;
        let id = state.last_lane;
        state.held.insert(id, 0);
        drop(state);
        Lane { shared, id }
    }

    /// Waits until no other layer is compressed with zstd, whose encoders have threads and
    /// memory of their own.
    pub(super) fn zstd_turn(&self) -> ZstdTurn {
        let shared = Arc::clone(&self.0.shared);
        let mut state = shared.lock();
        while state.is_zstd_busy {
            state = shared.wait(&shared.room, state);
        }
        state.is_zstd_busy = true;
        drop(state);
        ZstdTurn(shared)
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

impl Drop for ZstdTurn {
    fn drop(&mut self) {
        self.0.lock().is_zstd_busy = false;
        self.0.room.notify_all();
    }
}

impl Lane {
    /// Memory for a block, empty; waits until there is some.
    pub(super) fn slot(&self) -> Slot {
        let mut state = self.shared.lock();
        loop {
            // One at least, for which only slots of others are waited for.
            let share = (self.shared.slots / state.held.len().max(1)).max(1);
            let is_below = state.held.get(&self.id).is_none_or(|held| *held < share);
            if is_below && state.in_use < self.shared.slots {
                break;
            }
            state = self.shared.wait(&self.shared.room, state);
        }
        state.in_use += 1;
        if let Some(held) = state.held.get_mut(&self.id) {
            *held += 1;
        }
        let buffers = state.spare.pop().unwrap_or_default();
        drop(state);
        Slot {
            shared: Arc::clone(&self.shared),
            lane: self.id,
            buffers,
            member_bytes: 0,
        }
    }

    /// Has a block compressed; the slot comes back with the member.
    pub(super) fn submit(&self, slot: Slot, level: u8) -> Receiver<Slot> {
        let (result, receiver) = channel();
        let job = Job {
            slot,
            level,
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
            state.spare = Vec::new();
        }
        drop(state);
        self.shared.room.notify_all();
    }
}

impl Slot {
    /// The uncompressed bytes, at most [`BLOCK_BYTES`].
    pub(super) fn block(&mut self) -> &mut Vec<u8> {
        let block = &mut self.buffers.block;
        if block.capacity() == 0 {
            block.reserve_exact(BLOCK_BYTES);
        }
        block
    }

    /// The compressed bytes.
    pub(super) fn member(&self) -> &[u8] {
        &self.buffers.member[..self.member_bytes]
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut buffers = std::mem::take(&mut self.buffers);
        buffers.block.clear();
        let mut state = self.shared.lock();
        state.in_use -= 1;
        if let Some(held) = state.held.get_mut(&self.lane) {
            *held -= 1;
        }
        // Between two layers the memory is given back.
        if !state.held.is_empty() {
            state.spare.push(buffers);
        }
        drop(state);
        self.shared.room.notify_all();
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
        let mut deflate = Deflate::default();
        loop {
            let mut state = self.lock();
            let job = loop {
                if let Some(job) = state.queue.pop_front() {
                    break job;
                }
                if state.is_closed {
                    return;
                }
                state = self.wait(&self.work, state);
            };
            drop(state);
            let Job {
                mut slot,
                level,
                result,
            } = job;
            let Buffers { block, member } = &mut slot.buffers;
            if member.is_empty() {
                member.resize(member_bound(), 0);
            }
            slot.member_bytes = deflate.member(level, block, member);
            // Nobody waits where the layer was given up; that is no fault.
            let _ = result.send(slot);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_shared_fairly_and_never_exceed_the_budget() {
        let pool = Pool::new(NonZeroUsize::new(1).unwrap()).unwrap();
        let slots = pool.0.shared.slots;
        assert_eq!(slots, SLOTS_PER_THREAD);
        let first = pool.lane();
        let mut held: Vec<Slot> = (0..slots).map(|_| first.slot()).collect();
        // The second layer's one slot is there as soon as the first gives one back, which
        // itself gets no more than its half.
        let second = pool.lane();
        let got = std::thread::scope(|scope| {
            let waiting = scope.spawn(|| second.slot());
            held.pop();
            waiting.join().unwrap()
        });
        assert_eq!(pool.0.shared.lock().in_use, slots);
        held.truncate(slots / 2 - 1);
        held.push(first.slot());
        assert_eq!(held.len(), slots / 2);
        drop(got);
        let state = pool.0.shared.lock();
        assert_eq!(state.held.values().copied().collect::<Vec<_>>(), [4, 0]);
        assert_eq!((state.in_use, state.spare.len()), (4, 4));
        drop(state);
        drop((held, first, second));
        let state = pool.0.shared.lock();
        assert_eq!(
            (state.in_use, state.held.len(), state.spare.len()),
            (0, 0, 0)
        );
    }

    #[test]
    fn the_largest_machine_stays_within_the_budget() {
        let pool = Pool::new(NonZeroUsize::new(1000).unwrap()).unwrap();
        let slots = pool.0.shared.slots;
        assert!(slots * (BLOCK_BYTES + member_bound()) <= BUDGET_BYTES);
        assert!(pool.threads() <= slots && slots >= 31, "{slots}");
    }
}
