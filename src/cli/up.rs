//! `genvideo up`: a server with its database, a worker, until Ctrl-C.

use serde::Serialize;

use super::failure::Failure;
use super::output::Output;
use super::session::{self, Session};
use super::signals::Signals;
use crate::config::Config;

/// Flags of `up`.
#[derive(clap::Args, Debug)]
pub(crate) struct Args {}

#[derive(Serialize)]
struct Ready<'a> {
    event: &'static str,
    address: &'a str,
    namespace: &'a str,
    ui: Option<String>,
    task_queue: &'a str,
}

/// Serves until a signal comes.
pub(crate) async fn up(_args: Args, config: &Config, output: &mut Output) -> Result<(), Failure> {
    // A store that cannot be used is said before a server starts.
    session::store(config)?;
    let signals = Signals::listen()?;
    let session = Session::open(config).await?;
    announce(&session, config, output);
    let served = session.serve(config, &signals).await;
    session.close().await;
    served
}

/// Says where the server is and what the worker listens to.
pub(crate) fn announce(session: &Session, config: &Config, output: &mut Output) {
    output.line(&format!("server      {}", session.target.address));
    if let Some(ui) = session.ui_url() {
        output.line(&format!("web ui      {ui}"));
    }
    output.line(&format!("task queue  {}", config.task_queue));
    output.line(&format!("files       {}", config.store.display()));
    output.object(&Ready {
        event: "serving",
        address: &session.target.address,
        namespace: &session.target.namespace,
        ui: session.ui_url(),
        task_queue: &config.task_queue,
    });
}
