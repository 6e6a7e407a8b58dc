//! `genvideo render`: one job on this machine's device, without Temporal: nothing survives, nothing is needed.

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::mpsc;

use super::deliver;
use super::display::Display;
use super::failure::Failure;
use super::output::{self, Output};
use super::request::JobFlags;
use super::run::hand_over;
use super::session;
use super::signals::Signals;
use super::track::Track;
use crate::config::Config;
use crate::render;

/// Flags of `render`.
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    #[command(flatten)]
    job: JobFlags,
    /// Folder the files are copied to
    #[arg(long, value_name = "DIR", default_value = ".")]
    out: PathBuf,
}

/// The name `render` gives its jobs in JSON; there is no server to give another.
const ID: &str = "render";

/// Renders the job and copies its files.
pub(crate) async fn render(
    args: Args,
    config: &Config,
    output: &mut Output,
) -> Result<(), Failure> {
    let store = session::store(config)?;
    let request = args.job.request(&store)?;
    if request.job.approve {
        let message = "`--approve` waits for another command, which finds no job of `render`";
        return Err(Failure::usage(message).hint("`genvideo run --approve` does"));
    }
    deliver::prepare(&args.out)?;
    let renderer = session::renderer(config, store.clone());
    let job = request.job;
    let seed = job.seed.unwrap_or_else(fresh_seed);
    let track = Track::new(&renderer.plan(&job, seed)?);
    let result =
        work_beside(ID, track, output, move |hook| renderer.render_all(&job, seed, hook)).await?;
    hand_over(&store, &args.out, ID, &result, output)
}

/// Works on a thread of its own, shows how far it is as job `id`, and stops at the first signal.
pub(crate) async fn work_beside<T: Send + 'static>(
    id: &str,
    mut track: Track,
    output: &mut Output,
    work: impl FnOnce(&mut render::Hook<'_>) -> Result<T, render::Error> + Send + 'static,
) -> Result<T, Failure> {
    let mut signals = Signals::listen()?;
    let (report, mut reports) = mpsc::unbounded_channel();
    let stop = Arc::new(AtomicBool::new(false));
    let stopped = Arc::clone(&stop);
    let mut work = tokio::task::spawn_blocking(move || {
        work(&mut |step| {
            // Nobody listens only when the command has ended.
            let _ = report.send(step);
            if stopped.load(Ordering::Relaxed) {
                ControlFlow::Break(())
            } else {
                ControlFlow::Continue(())
            }
        })
    });
    let mut display = Display::new(output);
    let mut told = false;
    let result = loop {
        tokio::select! {
            biased;
            Some(step) = reports.recv() => display.show(id, &track.progress(step), output),
            done = &mut work => break done,
            _ = signals.first(), if !told => {
                told = true;
                stop.store(true, Ordering::Relaxed);
                output::note("stopping; once more to leave at once");
            }
        }
    };
    display.finish();
    match result.expect("rendering does not panic") {
        Err(render::Error::Stopped) => Err(Failure::interrupted("stopped")),
        done => Ok(done?),
    }
}

/// A seed nobody chose, as long as the workflow's.
fn fresh_seed() -> u64 {
    let mut random = [0; 4];
    random.copy_from_slice(&uuid::Uuid::now_v7().as_bytes()[12..]);
    u64::from(u32::from_le_bytes(random))
}
