//! `genvideo worker`: work for a server that is there.

use super::failure::Failure;
use super::output::Output;
use super::session::{self, Session};
use super::signals::Signals;
use super::up;
use crate::config::Config;

/// Flags of `worker`.
#[derive(clap::Args, Debug)]
pub(crate) struct Args {}

/// Works until a signal comes.
pub(crate) async fn worker(
    _args: Args,
    config: &Config,
    output: &mut Output,
) -> Result<(), Failure> {
    let store = session::store(config)?;
    let signals = Signals::listen()?;
    let session = Session::open_running(config).await?;
    up::announce(&session, config, output);
    let served = session.serve(config, session::renderer(config, store), &signals).await;
    session.close().await;
    served
}
