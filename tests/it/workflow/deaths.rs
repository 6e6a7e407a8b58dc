//! Workers that die: the status says so, the next one goes on, and a job that kills three is given up.

use std::process::{Child, Stdio};

use genvideo::client::Outcome;
use genvideo::job::class::ErrorClass;
use genvideo::job::progress::{JobStatus, Progress};
use serde_json::json;

use crate::cli::Machine;
use crate::support::{Lab, job, server};

/// A worker in a process of its own, killed at the latest when the test is over.
struct Doomed(Child);

impl Doomed {
    /// One that keeps no checkpoint, so that each attempt begins anew.
    fn start(machine: &Machine, lab: &Lab) -> Self {
        let address = server::address();
        let mut command = machine.command(&["worker", "--watched", "--temporal-address", &address]);
        command
            .env("GENVIDEO_TASK_QUEUE", &lab.queue)
            .env("GENVIDEO_HEARTBEAT_TIMEOUT", "2s")
            .env("GENVIDEO_CHECKPOINT_INTERVAL", "1h")
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        Self(command.spawn().expect("the program runs"))
    }
}

impl Drop for Doomed {
    fn drop(&mut self) {
        self.0.kill().expect("its own child");
        self.0.wait().expect("its end");
    }
}

fn is_denoising(progress: &Progress, attempt: u32) -> bool {
    progress.status == JobStatus::Running
        && progress.attempt.unwrap_or(1) == attempt
        && progress.detail.as_ref().is_some_and(|at| at.stage == "denoise" && at.done > 0)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_kills_three_workers_is_given_up() {
    let machine = Machine::new();
    let lab = Lab::idle("poison").await;
    let id = lab.submit(&job("IMAGE", json!({"steps": 150, "batch": 8}))).await;
    for death in 1..=3 {
        let worker = Doomed::start(&machine, &lab);
        lab.reach(&id, "the work", |progress| is_denoising(progress, death)).await;
        drop(worker);
        let retrying = |progress: &Progress| {
            progress.status == JobStatus::Retrying && progress.attempt == Some(death + 1)
        };
        let told = lab.reach(&id, "the retry", retrying).await;
        assert_eq!(told.message, format!("attempt {} after: its worker died", death + 1));
        assert_eq!((told.detail, told.error_message), (None, None));
    }
    let last = Doomed::start(&machine, &lab);
    let Outcome::Failed { class, message, .. } = lab.outcome(&id).await else {
        panic!("want a failure")
    };
    assert_eq!(class, ErrorClass::Poison, "{message}");
    assert!(message.starts_with("3 attempts"), "{message}");
    drop(last);
    lab.replay(&id, "poison").await;
}
