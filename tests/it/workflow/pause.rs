//! Pausing and resuming: the device is free meanwhile, nothing is lost, and the files are those of a job nobody paused.

use genvideo::job::progress::{JobStatus, Progress, Step};
use genvideo::job::{SIGNAL_CANCEL, SIGNAL_PAUSE, SIGNAL_RESUME};
use serde_json::{Value, json};

use crate::support::{Lab, job, json_payload, payload};

fn stage(progress: &Progress) -> &str {
    progress.detail.as_ref().map_or("", |detail| detail.stage.as_str())
}

fn is_paused(progress: &Progress) -> bool {
    progress.status == JobStatus::Pending && progress.message == "paused"
}

/// An image of many steps.
fn long_image() -> Value {
    job("IMAGE", json!({"steps": 150, "batch": 8}))
}

/// A video of several parts, each of so many steps that it is not over before a pause arrives.
fn film() -> Value {
    job("VIDEO", json!({"duration": 7.0, "fps": 8.0, "steps": 30}))
}

/// Pauses a job once it is at `at` and lets another one use the device; how it looks while it is paused, and how far it
/// was before.
async fn pause_at(lab: &Lab, id: &str, at: &str) -> (Progress, u64) {
    let at_work = |progress: &Progress| {
        stage(progress) == at && progress.detail.as_ref().is_some_and(|detail| detail.done > 0)
    };
    let before = lab.reach(id, at, at_work).await;
    lab.jobs.pause(id).await.expect("taken");
    let paused = lab.reach(id, "the pause", is_paused).await;
    assert_eq!(stage(&paused), "paused");
    assert!(paused.percent >= before.percent, "{before:?}, then {paused:?}");
    let other = lab.submit(&job("IMAGE", json!({"steps": 1}))).await;
    lab.result(&other).await;
    assert_eq!(lab.query(id, vec![]).await, paused, "it waits");
    (paused, before.detail.map_or(0, |detail| detail.done))
}

fn count(history: &[u8], what: &str) -> usize {
    String::from_utf8_lossy(history).matches(what).count()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_resumed_job_goes_on_where_it_was_and_makes_the_same_bytes() {
    let mut lab = Lab::working("paused").await;
    let id = lab.submit(&long_image()).await;
    let (paused, reached) = pause_at(&lab, &id, "denoise").await;
    let marks = lab.files().iter().filter(|file| file.ends_with("stages/image.at")).count();
    assert_eq!(marks, 1, "a checkpoint: {:?}", lab.files());
    // The worker goes and comes back; the pause stays.
    lab.stop().await;
    lab.start();
    assert_eq!(lab.query(&id, vec![]).await, paused);
    lab.jobs.resume(&id).await.expect("taken");
    let first = lab.reach(&id, "the work", |progress| stage(progress) == "denoise").await;
    assert!(first.percent >= paused.percent, "{first:?}");
    let done = first.detail.expect("a count").done;
    assert!(done >= reached, "{done} of the {reached} that were done");
    let result = lab.result(&id).await;
    assert!(
        !result.done.notes.iter().any(|note| note.contains("made twice")),
        "{:?}",
        result.done.notes
    );
    lab.assert_tidy();
    lab.replay(&id, "paused").await;
    let plain = lab.submit(&long_image()).await;
    let plain = lab.result(&plain).await;
    let hashes = |images: &[genvideo::job::result::Asset]| -> Vec<String> {
        images.iter().map(|image| image.sha256.clone()).collect()
    };
    assert_eq!(hashes(&result.assets.images), hashes(&plain.assets.images));
    lab.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pause_in_a_chain_makes_no_finished_part_again() {
    let mut lab = Lab::working("paused-chain").await;
    let id = lab.submit(&film()).await;
    lab.reach(&id, "the second part", |progress| progress.message.contains("part 2 of")).await;
    lab.jobs.pause(&id).await.expect("taken");
    lab.reach(&id, "the pause", is_paused).await;
    lab.jobs.resume(&id).await.expect("taken");
    let result = lab.result(&id).await;
    let history = lab.jobs.history_json(&id).await.expect("a history");
    let plain = lab.submit(&film()).await;
    let same = lab.result(&plain).await;
    let undisturbed = lab.jobs.history_json(&plain).await.expect("a history");
    let parts = |history| count(history, r#""name":"gen_video""#);
    assert!(parts(&undisturbed) >= 2);
    // The pause may come just after a part.
    let again = parts(&history) - parts(&undisturbed);
    assert!(again <= 1, "only the paused part may be begun again, not {again}");
    assert_eq!(count(&history, r#""name":"gen_image""#), 1);
    assert_eq!(result.assets.video.unwrap().sha256, same.assets.video.unwrap().sha256);
    lab.assert_tidy();
    lab.replay(&id, "paused-chain").await;
    lab.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_is_paused_before_it_begins_and_while_it_waits_for_the_device() {
    let mut lab = Lab::idle("paused-queued").await;
    let early = lab.submit(&job("IMAGE", json!({}))).await;
    lab.signal(&early, SIGNAL_PAUSE, vec![json_payload(&json!("please")), json_payload(&json!(1))])
        .await;
    lab.start();
    lab.reach(&early, "the pause", is_paused).await;
    let held = crate::support::machine::Held::device(&lab.renderer);
    let first = lab.submit(&job("IMAGE", json!({}))).await;
    lab.reach(&first, "loading", |progress| progress.message.contains("loading")).await;
    let queued = lab.submit(&job("IMAGE", json!({"seed": 9}))).await;
    lab.reach(&queued, "waiting", |progress| progress.message.contains("waiting for the device"))
        .await;
    lab.jobs.pause(&queued).await.expect("taken");
    lab.reach(&queued, "the pause", is_paused).await;
    held.release();
    lab.result(&first).await;
    assert!(is_paused(&lab.query(&queued, vec![]).await), "the device's turn came and went");
    for (id, name) in [(&early, "paused-first"), (&queued, "paused-queued")] {
        lab.signal(id, SIGNAL_RESUME, vec![payload("binary/plain", b"\xff")]).await;
        lab.result(id).await;
        lab.replay(id, name).await;
    }
    lab.assert_tidy();
    lab.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_paused_job_can_be_cancelled_and_leaves_nothing() {
    let mut lab = Lab::working("paused-cancelled").await;
    for by_signal in [true, false] {
        let id = lab.submit(&long_image()).await;
        pause_at(&lab, &id, "denoise").await;
        if by_signal {
            lab.signal(&id, SIGNAL_CANCEL, vec![]).await;
        } else {
            lab.jobs.cancel(&id).await.expect("taken");
        }
        assert_eq!(lab.cancelled(&id).await.message, "cancelled");
        assert!(!lab.files().iter().any(|file| file.starts_with("work/")), "{:?}", lab.files());
        lab.replay(&id, &format!("cancel-paused-{}", if by_signal { "signal" } else { "native" }))
            .await;
    }
    lab.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_paused_at_its_video_can_be_cancelled_and_leaves_nothing() {
    let mut lab = Lab::working("paused-video-cancelled").await;
    let id = lab.submit(&film()).await;
    lab.reach(&id, "the video", |progress| progress.step == Step::Video).await;
    lab.jobs.pause(&id).await.expect("taken");
    lab.reach(&id, "the pause", is_paused).await;
    lab.signal(&id, SIGNAL_CANCEL, vec![]).await;
    assert_eq!(lab.cancelled(&id).await.step, Step::Video);
    lab.assert_empty();
    lab.replay(&id, "cancel-paused-video").await;
    lab.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancel_while_a_pause_takes_hold_is_a_cancel() {
    let mut lab = Lab::working("pausing-cancelled").await;
    let id = lab.submit(&long_image()).await;
    lab.reach(&id, "denoising", |progress| stage(progress) == "denoise").await;
    lab.signal(&id, SIGNAL_PAUSE, vec![]).await;
    lab.signal(&id, SIGNAL_CANCEL, vec![]).await;
    lab.signal(&id, SIGNAL_RESUME, vec![]).await;
    lab.cancelled(&id).await;
    lab.assert_empty();
    lab.replay(&id, "cancel-pausing").await;
    lab.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_encoding_that_was_paused_is_made_again() {
    let mut lab = Lab::working("paused-encode").await;
    let film = json!({"duration": 4.0, "fps": 60.0, "steps": 1, "width": 512, "height": 512, "size_policy": "fit"});
    let id = lab.submit(&job("VIDEO", film)).await;
    pause_at(&lab, &id, "encode").await;
    lab.jobs.resume(&id).await.expect("taken");
    let result = lab.result(&id).await;
    assert_eq!(result.progress.percent, 100.0);
    lab.assert_tidy();
    lab.replay(&id, "paused-encode").await;
    lab.stop().await;
}
