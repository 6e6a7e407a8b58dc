//! The process that watches over a worker: a worker that dies is replaced, and its death laid to the job it was at.
//!
//! An abort inside inference (allocation, driver) takes its whole process with it, so the worker is a child:
//! `genvideo worker --watched`. It says on its stdout what it is at work on (`worker/at_work.rs`); when it dies, is silent
//! for too long or gives up, the attempts it had go back to the server at once and another child starts, after a pause
//! that grows while deaths come quickly. A stop is handed on, with a limit. A child whose parent is gone stops too.

use std::future::Future;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader};
use tokio::process::{Child, Command};
use tokio::sync::watch;

use super::failure::{Failure, exit};
use super::output;
use super::session::Session;
use crate::config::Config;
use crate::worker::at_work::{Desk, News};

/// Pause before the first new start.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
/// Longest pause between two starts.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// A worker that lived this long is no sign of a fault that stays.
const STEADY: Duration = Duration::from_secs(60);
/// Workers that may end one after the other, each soon and with nothing in hand.
const FALSE_STARTS: u32 = 5;
/// Shortest silence after which a worker is held for frozen; a busy machine is silent for a few seconds.
const SILENCE: Duration = Duration::from_secs(30);
/// How long what a worker said may lie unread.
const UNREAD: Duration = Duration::from_secs(2);
/// What a worker may take beyond its drain deadline.
const GRACE: Duration = Duration::from_secs(2);

/// Keeps a worker at work until `stop` resolves, then ends it in good order.
pub(crate) async fn keep(
    session: &Session,
    config: &Config,
    log: &str,
    stop: impl Future<Output = ()>,
) -> Result<(), Failure> {
    let mut stop = std::pin::pin!(stop);
    let mut pause = FIRST_PAUSE;
    let mut false_starts = 0;
    loop {
        let started = Instant::now();
        let mut worker = Watched::start(session, config, log)?;
        let ended = tokio::select! {
            ended = worker.end(config) => ended,
            () = &mut stop => {
                let ended = worker.stop(config.drain_deadline + GRACE).await;
                worker.lay_down(session, &cause(&ended)).await;
                return orderly(ended);
            }
        };
        if ended.as_ref().is_ok_and(ExitStatus::success) {
            // Somebody has told it to stop, and that was meant for us all.
            return Ok(());
        }
        let cause = cause(&ended);
        tracing::error!("the worker died: {cause}");
        let was_at_work = worker.lay_down(session, &cause).await;
        let is_false_start = !was_at_work && started.elapsed() < STEADY;
        false_starts = if is_false_start { false_starts + 1 } else { 0 };
        if false_starts >= FALSE_STARTS {
            let message = format!("the worker does not start: {cause}");
            return Err(Failure::new(exit::FAILED, "WORKER", message));
        }
        pause =
            if started.elapsed() > STEADY { FIRST_PAUSE } else { (pause * 2).min(LONGEST_PAUSE) };
        tracing::info!("another worker starts in {:.1} s", pause.as_secs_f64());
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = &mut stop => return Ok(()),
        }
    }
}

/// A stop that the worker obeyed; one that had to be killed did not end in order.
fn orderly(ended: std::io::Result<ExitStatus>) -> Result<(), Failure> {
    if ended.as_ref().is_ok_and(ExitStatus::success) {
        return Ok(());
    }
    let message = format!("the worker did not end in order: {}", cause(&ended));
    Err(Failure::new(exit::FAILED, "WORKER", message))
}

/// Why a process ended, in words.
fn cause(ended: &std::io::Result<ExitStatus>) -> String {
    match ended {
        Ok(status) => match (status.signal(), status.code()) {
            (Some(libc::SIGABRT), _) => "it aborted".to_owned(),
            (Some(libc::SIGSEGV), _) => "a fault of memory (signal 11)".to_owned(),
            (Some(libc::SIGKILL), _) => "it was killed (signal 9)".to_owned(),
            (Some(number), _) => format!("signal {number}"),
            (None, code) => format!("it gave up with exit code {}", code.unwrap_or_default()),
        },
        Err(error) => error.to_string(),
    }
}

/// A worker process and what it has said.
struct Watched {
    child: Child,
    desk: Arc<Mutex<Desk>>,
    /// How many lines it has said.
    heard: watch::Receiver<u64>,
}

impl Watched {
    fn start(session: &Session, config: &Config, log: &str) -> Result<Self, Failure> {
        let broken = |error: std::io::Error| {
            Failure::new(exit::FAILED, "WORKER", format!("cannot start a worker process: {error}"))
        };
        let mut command = Command::new(program().map_err(broken)?);
        command
            .args(["worker", "--watched", "--temporal-address", &session.target.address])
            .args(["--namespace", &session.target.namespace, "--log", log])
            .envs(config.typed())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            // Its own group: Ctrl-C in the terminal is for us, who hand it on once.
            .process_group(0)
            .kill_on_drop(true);
        let mut child = command.spawn().map_err(broken)?;
        let (hears, heard) = watch::channel(0);
        let desk = Arc::new(Mutex::new(Desk::default()));
        let theirs = Arc::clone(&desk);
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
        tokio::spawn(each_line(stdout, move |line| {
            if let Ok(news) = serde_json::from_str::<News>(&line) {
                theirs.lock().unwrap_or_else(PoisonError::into_inner).hear(news);
                hears.send_modify(|count| *count += 1);
            }
        }));
        tokio::spawn(each_line(stderr, |line| output::note(&line)));
        Ok(Self { child, desk, heard })
    }

    /// Waits for its end; a worker that is silent for too long is ended.
    async fn end(&mut self, config: &Config) -> std::io::Result<ExitStatus> {
        let silence = SILENCE.max(config.heartbeat_timeout * 3);
        let mut heard = self.heard.clone();
        loop {
            let news = tokio::time::timeout(silence, heard.changed());
            tokio::select! {
                ended = self.child.wait() => return ended,
                news = news => match news {
                    Ok(Ok(())) => {}
                    // It has closed its stdout, so it is about to end.
                    Ok(Err(_)) => return self.stop(silence).await,
                    // This process may have been the one that was stopped, and what was said is still unread.
                    Err(_) if tokio::time::timeout(UNREAD, heard.changed()).await.is_ok() => {}
                    Err(_) => {
                        tracing::error!("the worker has said nothing for {} s", silence.as_secs());
                        self.child.start_kill()?;
                        return self.child.wait().await;
                    }
                },
            }
        }
    }

    /// Asks it to end, and kills it when it has not by `limit`.
    async fn stop(&mut self, limit: Duration) -> std::io::Result<ExitStatus> {
        if let Some(process) = self.child.id().and_then(|id| i32::try_from(id).ok()) {
            // SAFETY: kill only takes two integers; the child has not been waited for, so the id is its own.
            unsafe { libc::kill(process, libc::SIGTERM) };
        }
        if let Ok(ended) = tokio::time::timeout(limit, self.child.wait()).await {
            return ended;
        }
        tracing::error!("the worker is still there after {} s", limit.as_secs_f64());
        self.child.start_kill()?;
        self.child.wait().await
    }

    /// Hands what it had back to the server; whether there was anything.
    async fn lay_down(&self, session: &Session, cause: &str) -> bool {
        // What it said last may still be on its way.
        let mut heard = self.heard.clone();
        let rest = async { while heard.changed().await.is_ok() {} };
        tokio::time::timeout(FIRST_PAUSE, rest).await.ok();
        let tasks = self.desk.lock().unwrap_or_else(PoisonError::into_inner).clear();
        let was_at_work = !tasks.is_empty();
        for task in tasks {
            tracing::error!(
                job = task.job,
                stage = task.stage,
                attempt = task.attempt,
                "died with the worker"
            );
            // The heartbeat timeout does the same, later.
            if let Err(error) = session.jobs.worker_died(&task, cause).await {
                tracing::warn!(%error, "the server was not told");
            }
        }
        was_at_work
    }
}

/// This program, also when its file was replaced since it was started.
fn program() -> std::io::Result<PathBuf> {
    let path = std::env::current_exe()?;
    let same = PathBuf::from("/proc/self/exe");
    Ok(if path.exists() || !same.exists() { path } else { same })
}

async fn each_line(pipe: Option<impl AsyncRead + Unpin>, mut act: impl FnMut(String)) {
    let Some(pipe) = pipe else { return };
    let mut pipe = BufReader::new(pipe);
    let mut line = Vec::new();
    // Libraries may write what is no UTF-8.
    while pipe.read_until(b'\n', &mut line).await.is_ok_and(|bytes| bytes > 0) {
        act(String::from_utf8_lossy(&line).trim_end().to_owned());
        line.clear();
    }
}
