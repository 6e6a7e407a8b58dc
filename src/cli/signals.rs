//! Ctrl-C, SIGTERM and a closed terminal: the first one asks, the second one drops the command as it is, with the server
//! and the worker it may have started, and the third one ends the process.

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Notify, watch};

use super::failure::{Failure, exit};
use super::output;
use crate::job::class::ErrorClass;

/// What the user or the system said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Word {
    /// Ctrl-C.
    Interrupt,
    /// SIGTERM, or the terminal was closed.
    Terminate,
}

/// There was a second signal.
static AGAIN: Notify = Notify::const_new();

/// Waits for the second signal of a command that listens.
pub(crate) async fn again() {
    AGAIN.notified().await;
}

/// The first signal, for everybody who asks.
#[derive(Clone)]
pub(crate) struct Signals(watch::Receiver<Option<Word>>);

impl Signals {
    /// Listens from now on; see [`again`] for a second signal.
    pub(crate) fn listen() -> Result<Self, Failure> {
        Self::with(true)
    }

    /// Listens from now on, in a process that another one ends when it takes too long: a machine that shuts down
    /// signals both, and the other one hands the signal on besides.
    pub(crate) fn listen_watched() -> Result<Self, Failure> {
        Self::with(false)
    }

    fn with(is_ours: bool) -> Result<Self, Failure> {
        let broken = |error: std::io::Error| {
            Failure::of(ErrorClass::Bug, format!("cannot listen to signals: {error}"))
        };
        let mut interrupt = signal(SignalKind::interrupt()).map_err(broken)?;
        let mut terminate = signal(SignalKind::terminate()).map_err(broken)?;
        let mut hangup = signal(SignalKind::hangup()).map_err(broken)?;
        let (say, heard) = watch::channel(None);
        tokio::spawn(async move {
            let mut next = async || {
                tokio::select! {
                    _ = interrupt.recv() => Word::Interrupt,
                    _ = terminate.recv() => Word::Terminate,
                    _ = hangup.recv() => Word::Terminate,
                }
            };
            let first = next().await;
            say.send_replace(Some(first));
            if is_ours {
                next().await;
                AGAIN.notify_one();
                next().await;
                output::note("genvideo: interrupted");
                std::process::exit(i32::from(exit::INTERRUPTED));
            }
            // Signals that nobody waits for any more stay harmless, and `say` stays open.
            std::future::pending::<()>().await;
        });
        Ok(Self(heard))
    }

    /// Waits for the first signal; returns at once when there was one.
    pub(crate) async fn first(&mut self) -> Word {
        let heard = self.0.wait_for(Option::is_some).await.ok().and_then(|word| *word);
        match heard {
            Some(word) => word,
            // The listener lives as long as the runtime.
            None => std::future::pending().await,
        }
    }
}
