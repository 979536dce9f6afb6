//! `SIGINT` and `SIGTERM` while a build runs.

use std::future::Future;
use std::io;

use tokio::signal::unix::{Signal, SignalKind, signal};

/// A signal that ended a build.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ended {
    /// `SIGINT`, from the keyboard.
    Interrupted,
    /// `SIGTERM`, from a supervisor.
    Terminated,
}

impl Ended {
    /// 128 and the signal's number, as shells report it.
    pub(super) fn exit_code(self) -> u8 {
        match self {
            Self::Interrupted => 130,
            Self::Terminated => 143,
        }
    }

    /// For people.
    pub(super) fn message(self) -> &'static str {
        match self {
            Self::Interrupted => "interrupted",
            Self::Terminated => "terminated",
        }
    }
}

/// Both signals, caught from when this was made.
#[derive(Debug)]
pub(super) struct Signals {
    interrupt: Signal,
    terminate: Signal,
}

impl Signals {
    /// Catches the signals; call inside a tokio runtime.
    ///
    /// # Errors
    /// Those of `sigaction(2)`.
    pub(super) fn catch() -> io::Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
        })
    }

    /// Waits for the next of them.
    pub(super) async fn next(&mut self) -> Ended {
        tokio::select! {
            _ = self.interrupt.recv() => Ended::Interrupted,
            _ = self.terminate.recv() => Ended::Terminated,
        }
    }

    /// Runs `work` to its end, or drops it when a signal comes.
    pub(super) async fn run<T>(&mut self, work: impl Future<Output = T>) -> Result<T, Ended> {
        tokio::select! {
            // What has ended has ended, also where a signal came at the same time.
            biased;
            output = work => Ok(output),
            ended = self.next() => Err(ended),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    use rustix::process::{Signal as Number, getpid, kill_process};

    use super::*;

    struct SetOnDrop(Arc<AtomicBool>);

    impl Drop for SetOnDrop {
        fn drop(&mut self) {
            self.0.store(true, Ordering::SeqCst);
        }
    }

    #[tokio::test]
    async fn a_signal_drops_the_work() {
        let mut signals = Signals::catch().unwrap();
        assert_eq!(signals.run(async { 7 }).await, Ok(7));
        for (number, expected, code) in [
            (Number::INT, Ended::Interrupted, 130),
            (Number::TERM, Ended::Terminated, 143),
        ] {
            let dropped = Arc::new(AtomicBool::new(false));
            let guard = SetOnDrop(Arc::clone(&dropped));
            let work = async move {
                let _guard = guard;
                kill_process(getpid(), number).unwrap();
                std::future::pending::<()>().await;
            };
            let ended = signals.run(work).await.unwrap_err();
            assert_eq!((ended, ended.exit_code()), (expected, code));
            assert!(dropped.load(Ordering::SeqCst));
        }
    }
}
