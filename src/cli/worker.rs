//! `genvideo worker`: work for a server that is there, in a process that another one watches over.

use std::io::Write;
use std::sync::Once;
use std::time::Duration;

use super::failure::Failure;
use super::output::Output;
use super::session::{self, Session};
use super::signals::Signals;
use super::up;
use crate::config::Config;
use crate::store::{self, Store};
use crate::worker::at_work::{self, News};

/// How often a watched worker says that it is there.
const ALIVE: Duration = Duration::from_secs(1);

/// Flags of `worker`.
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    /// Work in this process, and say on stdout what it is at
    #[arg(long, hide = true)]
    watched: bool,
}

/// Works until a signal comes.
pub(crate) async fn worker(
    args: Args,
    config: &Config,
    output: &mut Output,
) -> Result<(), Failure> {
    if args.watched {
        return watched(config, &Signals::listen_watched()?).await;
    }
    session::store(config)?;
    let signals = Signals::listen()?;
    let session = Session::open_running(config).await?;
    up::announce(&session, config, output);
    let served = session.serve(config, &signals).await;
    session.close().await;
    served
}

/// Works in this process. The parent has seen the servers, so one that does not answer is waited for.
async fn watched(config: &Config, signals: &Signals) -> Result<(), Failure> {
    at_work::tell(say);
    let alive = tokio::spawn(say_alive());
    let mut told = signals.clone();
    let opened = async {
        Ok::<_, Failure>((store_patiently(config).await?, Session::open_patiently(config).await?))
    };
    let (store, session) = tokio::select! {
        opened = opened => opened?,
        _ = told.first() => return Ok(()),
    };
    let served = session.work(config, session::renderer(config, store), signals).await;
    alive.abort();
    served
}

/// The store, as soon as the server of its bucket answers.
async fn store_patiently(config: &Config) -> Result<Store, Failure> {
    loop {
        let config = config.clone();
        let opened = tokio::task::spawn_blocking(move || session::store(&config)).await;
        match opened.expect("opening a store does not panic") {
            Err(error @ store::Error::Unanswered { .. }) => {
                tracing::warn!(%error, "waiting for the server of the store");
                tokio::time::sleep(ALIVE).await;
            }
            opened => return Ok(opened?),
        }
    }
}

async fn say_alive() {
    let mut timer = tokio::time::interval(ALIVE);
    loop {
        timer.tick().await;
        say(&News::Alive);
    }
}

/// Tells the parent. When nobody listens any more the parent is gone, and this process ends in good order.
fn say(news: &News) {
    let line = serde_json::to_string(news).expect("our own types serialise");
    let mut stdout = std::io::stdout().lock();
    static ALONE: Once = Once::new();
    if writeln!(stdout, "{line}").and_then(|()| stdout.flush()).is_err() {
        // SAFETY: kill only takes two integers; the signal is one this process listens to.
        ALONE.call_once(|| unsafe {
            libc::kill(libc::getpid(), libc::SIGTERM);
        });
    }
}
