//! [`Watch`]: one flag that says that a fetch is to end, for whatever works on it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::error::GitError;

/// How often the caller's flag is looked at.
const TICK: Duration = Duration::from_millis(50);

/// Says when to stop: the caller does not want it any more, or the time is over.
///
/// A thread sets the flag, because what resolves a pack's deltas looks at a flag and at no clock.
#[derive(Debug)]
pub(super) struct Watch {
    stop: Arc<AtomicBool>,
    cancelled: Arc<AtomicBool>,
    limit: Duration,
    thread: Option<(mpsc::Sender<()>, JoinHandle<()>)>,
}

impl Watch {
    /// Watches until it is dropped.
    pub(super) fn start(cancelled: &Arc<AtomicBool>, limit: Duration) -> Self {
        // What has no time is over before the first tick, however fast the other side is.
        let is_over = cancelled.load(Ordering::Relaxed) || limit.is_zero();
        let stop = Arc::new(AtomicBool::new(is_over));
        let (done, wait) = mpsc::channel::<()>();
        let flags = (stop.clone(), cancelled.clone());
        let began = Instant::now();
        let thread = std::thread::spawn(move || {
            let (stop, cancelled) = flags;
            while wait.recv_timeout(TICK) == Err(mpsc::RecvTimeoutError::Timeout) {
                if cancelled.load(Ordering::Relaxed) || began.elapsed() >= limit {
                    stop.store(true, Ordering::Relaxed);
                    return;
                }
            }
        });
        Self {
            stop,
            cancelled: cancelled.clone(),
            limit,
            thread: Some((done, thread)),
        }
    }

    /// One that never says so.
    #[cfg(test)]
    pub(super) fn endless() -> Self {
        Self {
            stop: Arc::default(),
            cancelled: Arc::default(),
            limit: Duration::MAX,
            thread: None,
        }
    }

    /// Whether to stop.
    pub(super) fn is_over(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// The flag itself.
    pub(super) fn flag(&self) -> &AtomicBool {
        &self.stop
    }

    /// Returns when it is time to stop.
    pub(super) async fn over(&self) {
        while !self.is_over() {
            tokio::time::sleep(TICK).await;
        }
    }

    /// # Errors
    /// [`GitError::Cancelled`], [`GitError::Timeout`].
    pub(super) fn check(&self, remote: &str) -> Result<(), GitError> {
        if !self.is_over() {
            return Ok(());
        }
        Err(if self.cancelled.load(Ordering::Relaxed) {
            GitError::Cancelled
        } else {
            GitError::Timeout {
                remote: remote.to_owned(),
                limit: self.limit,
            }
        })
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        if let Some((done, thread)) = self.thread.take() {
            drop(done);
            // It has nothing that could panic.
            let _ = thread.join();
        }
    }
}
