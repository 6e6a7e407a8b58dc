//! Cancelling at every stage, by signal and natively: ends CANCELLED, frees the device, leaves no file.

use genvideo::job::SIGNAL_CANCEL;
use genvideo::job::progress::{JobStatus, Progress};
use serde_json::{Value, json};

use crate::support::{Lab, job, json_payload};

/// How a cancel is sent.
#[derive(Clone, Copy, Debug)]
enum By {
    Signal,
    Native,
}

async fn cancel(lab: &Lab, id: &str, by: By) {
    match by {
        By::Signal => lab.signal(id, SIGNAL_CANCEL, vec![]).await,
        By::Native => lab.jobs.cancel(id).await.expect("the cancel is taken"),
    }
}

/// Cancels `input` once it is at `stage`; then another job must run to its end on the same device.
async fn check_cancel_at(stage: &str, input: Value, by: By) {
    let name = format!("cancel-{stage}-{by:?}").to_lowercase();
    let mut lab = Lab::working(&name).await;
    let id = lab.submit(&input).await;
    lab.reach(&id, stage, |progress| is_at(progress, stage)).await;
    cancel(&lab, &id, by).await;
    let last = lab.cancelled(&id).await;
    assert_eq!(last.status, JobStatus::Cancelled);
    assert!(last.percent < 100.0, "{last:?}");
    assert_eq!((&last.asset_url, &last.error_message, &last.image_url), (&None, &None, &None));
    assert_eq!(lab.query(&id, vec![]).await, last, "the query after the end");
    lab.assert_empty();
    lab.replay(&id, &name).await;
    let next = lab.submit(&job("IMAGE", json!({}))).await;
    lab.result(&next).await;
    lab.stop().await;
}

fn is_at(progress: &Progress, stage: &str) -> bool {
    progress.detail.as_ref().is_some_and(|detail| detail.stage == stage)
}

/// Works long enough to be caught at it: many steps, then a long chain of runs.
fn long() -> Value {
    job("VIDEO", json!({"duration": 60.0, "steps": 150}))
}

/// Makes frames long enough to be caught at it: large and many, from few runs.
fn long_encode() -> Value {
    job(
        "VIDEO",
        json!({"duration": 4.0, "fps": 60.0, "steps": 1, "width": 1024, "height": 1024, "size_policy": "fit"}),
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn while_denoising_by_signal() {
    check_cancel_at("denoise", long(), By::Signal).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn while_denoising_natively() {
    check_cancel_at("denoise", long(), By::Native).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn while_encoding_by_signal() {
    check_cancel_at("encode", long_encode(), By::Signal).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn while_encoding_natively() {
    check_cancel_at("encode", long_encode(), By::Native).await;
}

/// The device is taken by somebody else in this process, so the stage waits before it can load its model.
async fn check_cancel_while_loading(by: By) {
    let name = format!("cancel-load-{by:?}").to_lowercase();
    let mut lab = Lab::working(&name).await;
    let held = crate::support::machine::Held::device(&lab.renderer);
    let id = lab.submit(&long()).await;
    lab.reach(&id, "loading", |progress| progress.message.contains("loading")).await;
    cancel(&lab, &id, by).await;
    lab.cancelled(&id).await;
    held.release();
    lab.assert_empty();
    lab.replay(&id, &name).await;
    let next = lab.submit(&job("IMAGE", json!({}))).await;
    lab.result(&next).await;
    lab.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn while_loading_by_signal() {
    check_cancel_while_loading(By::Signal).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn while_loading_natively() {
    check_cancel_while_loading(By::Native).await;
}

/// Behind another job on the device's queue: the server ends the waiting stage by itself.
///
/// The device is taken by a third, so that the first job cannot leave it between two of its stages to the second.
async fn check_cancel_while_queued(by: By) {
    let name = format!("cancel-queued-{by:?}").to_lowercase();
    let mut lab = Lab::working(&name).await;
    let held = crate::support::machine::Held::device(&lab.renderer);
    let first = lab.submit(&long()).await;
    lab.reach(&first, "loading", |progress| progress.message.contains("loading")).await;
    let second = lab.submit(&job("IMAGE", json!({}))).await;
    lab.reach(&second, "waiting", |progress| progress.message.contains("waiting for the device"))
        .await;
    cancel(&lab, &second, by).await;
    lab.cancelled(&second).await;
    lab.replay(&second, &name).await;
    let first_now = lab.jobs.outcome(&first).await.expect("an answer");
    assert_eq!(first_now, None, "the job before it goes on");
    held.release();
    lab.reach(&first, "denoising", |progress| is_at(progress, "denoise")).await;
    cancel(&lab, &first, by).await;
    lab.cancelled(&first).await;
    lab.assert_empty();
    lab.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn while_queued_by_signal() {
    check_cancel_while_queued(By::Signal).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn while_queued_natively() {
    check_cancel_while_queued(By::Native).await;
}

/// Before any worker has seen the job.
async fn check_cancel_before_a_worker(by: By) {
    let name = format!("cancel-first-{by:?}").to_lowercase();
    let mut lab = Lab::idle(&name).await;
    let id = lab.submit(&long()).await;
    assert_eq!(lab.jobs.status(&id).await.expect("a status").status, JobStatus::Pending);
    cancel(&lab, &id, by).await;
    lab.start();
    let last = lab.cancelled(&id).await;
    assert_eq!(last.percent, 0.0);
    lab.assert_empty();
    lab.replay(&id, &name).await;
    lab.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn before_a_worker_is_there_by_signal() {
    check_cancel_before_a_worker(By::Signal).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn before_a_worker_is_there_natively() {
    check_cancel_before_a_worker(By::Native).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancel_with_an_argument_and_a_reason_is_a_cancel() {
    let mut lab = Lab::working("cancel-argument").await;
    let id = lab.submit(&long()).await;
    lab.reach(&id, "denoising", |progress| is_at(progress, "denoise")).await;
    lab.signal(
        &id,
        SIGNAL_CANCEL,
        vec![json_payload(&json!("no longer needed")), json_payload(&json!(1))],
    )
    .await;
    lab.cancelled(&id).await;
    lab.assert_empty();
    lab.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_end_comes_once_whether_a_cancel_or_the_result_is_first() {
    let mut lab = Lab::working("cancel-race").await;
    for number in 0..6 {
        let id = lab.submit(&job("IMAGE", json!({"seed": number, "steps": 1}))).await;
        // Somewhere between the image and the result.
        lab.reach(&id, "the image", |progress| progress.percent >= 5.0).await;
        let _ = lab.jobs.cancel(&id).await;
        match lab.outcome(&id).await {
            genvideo::client::Outcome::Completed(result) => {
                let url = result.progress.asset_url.expect("an address");
                let path = url.strip_prefix("file://").expect("a local address").to_owned();
                assert!(std::path::Path::new(&path).is_file(), "a completed job has its file");
            }
            genvideo::client::Outcome::Cancelled(_) => {}
            other => panic!("{other:?}"),
        }
        lab.replay(&id, &format!("cancel-race-{number}")).await;
    }
    lab.assert_tidy();
    lab.stop().await;
}
