//! `--jobs`: how many RUN steps have a process at once.
//!
//! A step has a slot while its process runs and while all that it needs is made ready; not
//! while it waits for another step: for that one's result, or for a cache mount that only one
//! may have. So whoever has a slot gets on without anybody else's, and nobody waits for ever.

use std::sync::Arc;

use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::Cancelled;
use crate::sandbox::Cancel;

/// How many steps run at once where the user sets no bound. The Dockerfile's author decides by
/// its stages, as with BuildKit: steps often wait for a network, so the number of cores would be
/// no measure. But each takes a thread, mounts and memory, and one file can have thousands.
const JOBS_LIMIT: usize = 64;

/// The slots of a build.
pub(super) struct Slots(Arc<Semaphore>);

impl Slots {
    /// As many as `jobs` says; 0 is as many as the steps are, up to [`JOBS_LIMIT`].
    pub(super) fn new(jobs: usize) -> Self {
        let slots = match jobs {
            0 => JOBS_LIMIT,
            jobs => jobs.min(Semaphore::MAX_PERMITS),
        };
        Self(Arc::new(Semaphore::new(slots)))
    }

    /// Waits for a slot, in turn.
    ///
    /// # Errors
    /// The build is stopped.
    pub(super) async fn take(&self, cancel: &Cancel) -> Result<Slot, Cancelled> {
        let mut slot = Slot {
            slots: Arc::clone(&self.0),
            permit: None,
        };
        slot.acquire(cancel).await?;
        Ok(slot)
    }
}

/// A step's slot. It is free again when this is dropped.
pub(super) struct Slot {
    slots: Arc<Semaphore>,
    permit: Option<OwnedSemaphorePermit>,
}

impl Slot {
    /// Gives it to others, because the step only waits.
    pub(super) fn release(&mut self) {
        self.permit = None;
    }

    /// Waits until it has one again, where it was given up. Blocking, and only on the
    /// pool for that.
    ///
    /// # Errors
    /// The build is stopped.
    pub(super) fn retake(&mut self, cancel: &Cancel) -> Result<(), Cancelled> {
        match self.permit {
            Some(_) => Ok(()),
            None => Handle::current().block_on(self.acquire(cancel)),
        }
    }

    async fn acquire(&mut self, cancel: &Cancel) -> Result<(), Cancelled> {
        let slots = Arc::clone(&self.slots);
        let permit = tokio::select! {
            biased;
            () = cancel.cancelled() => return Err(Cancelled),
            permit = slots.acquire_owned() => permit,
        };
        self.permit = Some(permit.expect("the semaphore is never closed"));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    #[tokio::test]
    async fn a_slot_is_one_steps_until_it_waits_or_ends() {
        let (slots, cancel) = (Slots::new(1), Cancel::new());
        let mut first = slots.take(&cancel).await.unwrap();
        let mut waiting = Box::pin(slots.take(&cancel));
        assert!(waiting.as_mut().now_or_never().is_none());
        first.release();
        let second = waiting.await.unwrap();

        // It has none of its own before the other has ended.
        let retaking = {
            let cancel = cancel.clone();
            tokio::task::spawn_blocking(move || first.retake(&cancel).map(|()| first))
        };
        assert!(slots.take(&cancel).now_or_never().is_none());
        drop(second);
        let mut first = retaking.await.unwrap().unwrap();
        assert!(slots.take(&cancel).now_or_never().is_none());
        // Who has it keeps it.
        let own = cancel.clone();
        let first = tokio::task::spawn_blocking(move || first.retake(&own).map(|()| first));
        let _first = first.await.unwrap().unwrap();

        let waiting = slots.take(&cancel);
        cancel.cancel();
        assert!(waiting.await.is_err());
    }

    #[tokio::test]
    async fn without_a_number_there_is_a_bound_all_the_same() {
        let (slots, cancel) = (Slots::new(0), Cancel::new());
        let mut taken = Vec::new();
        while let Some(slot) = slots.take(&cancel).now_or_never() {
            taken.push(slot.unwrap());
        }
        assert_eq!(taken.len(), JOBS_LIMIT);
    }
}
