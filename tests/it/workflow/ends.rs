//! Jobs that run to their end: results, errors, and what a shutdown in the middle does to them.

use genvideo::client::Outcome;
use genvideo::job::class::ErrorClass;
use genvideo::job::progress::{JobStatus, Progress, Step};
use serde_json::{Value, json};

use crate::support::{Lab, job};

/// Percent rises, what is said is what is done, and the end is exactly 100.
fn assert_rising(seen: &[Progress]) {
    for pair in seen.windows(2) {
        assert!(pair[0].percent <= pair[1].percent, "percent fell: {pair:?}");
    }
    assert_eq!(seen.last().map(|last| last.percent), Some(100.0));
    for progress in seen {
        assert_eq!(progress.error_message, None, "{progress:?}");
        if let (JobStatus::Running, Some(at)) = (progress.status, &progress.detail)
            && at.total > 0
        {
            let count = format!(" {}/{}", at.done, at.total);
            assert!(progress.message.ends_with(&count), "{progress:?}");
        }
        assert_eq!(
            progress.asset_url.is_some(),
            progress.status == JobStatus::Completed,
            "{progress:?}"
        );
    }
}

fn events(history: &[u8]) -> Vec<Value> {
    let history: Value = serde_json::from_slice(history).expect("JSON");
    history["events"].as_array().expect("events").clone()
}

fn progress_signals(history: &[u8]) -> usize {
    let signal = |event: &Value| {
        let signal = &event["attributes"]["WorkflowExecutionSignaledEventAttributes"];
        signal["signal_name"] == genvideo::job::SIGNAL_PROGRESS
    };
    events(history).iter().filter(|event| signal(event)).count()
}

/// Besides progress signals, and the three events of the task that each may cause, a history has few events.
fn assert_short(history: &[u8]) {
    let (bytes, events, news) = (history.len(), events(history).len(), progress_signals(history));
    assert!(bytes <= 100_000, "{bytes} bytes, {news} news");
    assert!(events.saturating_sub(4 * news) <= 40, "{events} events, {news} of them news");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_video_job_ends_with_its_files_and_nothing_else() {
    let mut lab = Lab::working("video").await;
    let id = lab.submit(&job("VIDEO", json!({"duration": 5.0}))).await;
    let mut seen = Vec::new();
    let outcome =
        lab.jobs.watch(&id, &mut |progress| seen.push(progress)).await.expect("an outcome");
    let Outcome::Completed(result) = outcome else { panic!("want a result, got {outcome:?}") };
    assert_rising(&seen);
    assert_eq!(
        (result.progress.step, result.progress.status),
        (Step::Completed, JobStatus::Completed)
    );
    assert_eq!(result.metadata, json!({"order": 1}).as_object().expect("an object").clone());
    assert_eq!(result.done.seed, 7);
    let video = result.assets.video.as_ref().expect("a video");
    assert_eq!(result.progress.asset_url.as_ref(), Some(&video.url));
    for asset in
        [&result.assets.image, &result.assets.video, &result.assets.poster, &result.assets.receipt]
    {
        let asset = asset.as_ref().expect("every file of a video job");
        let path = asset.url.strip_prefix("file://").expect("a local address");
        assert_eq!(std::fs::metadata(path).expect("the file").len(), asset.bytes, "{asset:?}");
    }
    lab.assert_tidy();
    assert_eq!(lab.query(&id, vec![]).await, result.progress, "the query after the end");
    lab.replay(&id, "video-5s").await;
    assert_short(&lab.jobs.history_json(&id).await.expect("a history"));
    lab.stop().await;
    assert_eq!(
        lab.jobs.status(&id).await.expect("a status"),
        result.progress,
        "the status without a worker"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_job_stops_after_the_image() {
    let mut lab = Lab::working("image").await;
    let mut input = job("image", json!({}));
    input.as_object_mut().expect("an object").remove("seed");
    let id = lab.submit(&input).await;
    let result = lab.result(&id).await;
    let image = result.assets.image.as_ref().expect("an image");
    assert_eq!(result.progress.asset_url.as_ref(), Some(&image.url));
    assert_eq!(result.assets.video, None);
    assert!(result.done.seed <= u64::from(u32::MAX), "a drawn seed fits every client's numbers");
    lab.assert_tidy();
    lab.replay(&id, "image").await;
    lab.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_longer_video_is_a_chain_of_runs() {
    let mut lab = Lab::working("chain").await;
    let id = lab.submit(&job("VIDEO", json!({"duration": 7.0, "fps": 8.0}))).await;
    let result = lab.result(&id).await;
    let duration = result.done.duration.expect("a duration");
    assert!((duration - 7.0).abs() <= 0.5 / 8.0, "{duration}");
    let history = lab.jobs.history_json(&id).await.expect("a history");
    let runs = String::from_utf8_lossy(&history).matches(r#""name":"gen_video""#).count();
    assert!(runs >= 2, "{runs} runs");
    lab.assert_tidy();
    lab.replay(&id, "chain").await;
    lab.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_this_machine_cannot_do_fails_with_its_class() {
    let mut lab = Lab::working("refused").await;
    let id = lab.submit(&job("IMAGE", json!({"image_model": "no-such-model"}))).await;
    let Outcome::Failed { class, message, .. } = lab.outcome(&id).await else {
        panic!("want a failure")
    };
    assert_eq!(class, ErrorClass::UnknownModel);
    assert!(message.contains("no-such-model"), "{message}");
    let progress = lab.query(&id, vec![]).await;
    assert_eq!((progress.step, progress.status), (Step::Failed, JobStatus::Failed));
    assert_eq!(progress.error_message.as_ref(), Some(&message));
    assert_eq!(lab.jobs.status(&id).await.expect("a status").error_message, Some(message));
    lab.assert_empty();
    lab.replay(&id, "unknown-model").await;
    lab.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shutdown_hands_the_stage_to_the_next_worker() {
    let mut lab = Lab::working("shutdown").await;
    let id = lab
        .submit(&job("VIDEO", json!({"steps": 150, "duration": 8.0, "size_policy": "fit"})))
        .await;
    lab.reach(&id, "denoising", |progress| is_at(progress, "denoise")).await;
    lab.stop().await;
    let waiting =
        lab.reach(&id, "the retry", |progress| progress.status == JobStatus::Retrying).await;
    // More than one attempt may have gone to the worker that was on its way out.
    let attempt = waiting.attempt.expect("a number");
    assert!(attempt >= 2, "{waiting:?}");
    assert_eq!(waiting.message, format!("attempt {attempt} after: its worker shut down"));
    lab.start();
    let result = lab.result(&id).await;
    assert_eq!(result.progress.percent, 100.0);
    lab.assert_tidy();
    lab.replay(&id, "shutdown").await;
    // A first attempt on a fast machine may be over before it is worth a signal; a second one says so at once.
    let history = lab.jobs.history_json(&id).await.expect("a history");
    assert!(progress_signals(&history) > 0, "it reports");
    let started = |event: &Value| {
        event["attributes"]["ActivityTaskStartedEventAttributes"]["attempt"].as_u64()
    };
    let last = events(&history).iter().filter_map(started).max();
    assert!(last >= Some(attempt.into()), "attempt {attempt} was the one that ended: {last:?}");
    lab.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_error_that_comes_again_ends_the_job_with_its_class() {
    let mut lab = Lab::working("unwritable").await;
    std::fs::remove_dir_all(lab.store.join("work")).expect("the folder is there");
    std::fs::write(lab.store.join("work"), "in the way").expect("a file in its place");
    let id = lab.submit(&job("IMAGE", json!({}))).await;
    let mut causes = Vec::new();
    let mut look = |progress: Progress| {
        if progress.status == JobStatus::Retrying {
            causes.push(progress.message);
        }
    };
    let outcome = lab.jobs.watch(&id, &mut look).await.expect("an outcome");
    let Outcome::Failed { class, message, .. } = outcome else { panic!("want a failure") };
    assert_eq!(class, ErrorClass::OutputUnwritable, "{message}");
    assert!(causes.iter().any(|cause| cause.contains(&message)), "{causes:?}: {message}");
    assert!(message.contains("work"), "{message}");
    lab.replay(&id, "unwritable").await;
    lab.stop().await;
}

fn is_at(progress: &Progress, stage: &str) -> bool {
    progress.detail.as_ref().is_some_and(|detail| detail.stage == stage && detail.done > 0)
}
