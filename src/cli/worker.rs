//! `genvideo worker`: work for a server that is there, in a process that another one watches over.

use std::io::Write;
use std::time::Duration;

use super::failure::Failure;
use super::output::Output;
use super::session::{self, Session};
use super::signals::Signals;
use super::up;
use crate::config::Config;
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
    let store = session::store(config)?;
    let signals = Signals::listen()?;
    let session = Session::open_running(config).await?;
    let served = if args.watched {
        at_work::tell(say);
        let alive = tokio::spawn(say_alive());
        let served = session.work(config, session::renderer(config, store), &signals).await;
        alive.abort();
        served
    } else {
        up::announce(&session, config, output);
        session.serve(config, &signals).await
    };
    session.close().await;
    served
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
    if writeln!(stdout, "{line}").and_then(|()| stdout.flush()).is_err() {
        // SAFETY: raise only takes an integer; the signal is one this process listens to.
        unsafe { libc::raise(libc::SIGTERM) };
    }
}
