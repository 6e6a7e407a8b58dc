//! Jobs with `approve`: they wait after the image, and go on, end, or take another image as they are told.

use genvideo::client::Outcome;
use genvideo::job::progress::{JobStatus, Progress, Step};
use genvideo::job::result::JobResult;
use genvideo::job::{SIGNAL_APPROVE, SIGNAL_REJECT, SIGNAL_REPLACE};
use genvideo::store::Store;
use serde_json::{Value, json};

use crate::support::{Lab, job, json_payload, payload};

/// A short film that waits for an approval.
fn film() -> Value {
    job("VIDEO", json!({"duration": 0.3, "fps": 8.0, "approve": true}))
}

fn asks(progress: &Progress) -> bool {
    progress.detail.as_ref().is_some_and(|detail| detail.stage == "approval")
}

/// Waits until the job asks for an approval.
async fn asked(lab: &Lab, id: &str) -> Progress {
    lab.reach(id, "the question", asks).await
}

/// The hash of the image that is shown, which is the end of its address.
fn shown(progress: &Progress) -> String {
    let url = progress.image_url.as_ref().expect("an image to look at");
    url.rsplit('/').next().expect("a name").to_owned()
}

/// Puts a picture of one colour into the store; its id.
fn upload(lab: &Lab, colour: [u8; 3]) -> String {
    let picture = image::RgbImage::from_pixel(80, 80, image::Rgb(colour));
    let mut png = std::io::Cursor::new(Vec::new());
    picture.write_to(&mut png, image::ImageFormat::Png).expect("a PNG");
    let store = Store::open(&lab.store).expect("the store");
    store.import_blob(png.get_ref()).expect("kept").sha256
}

fn image_of(result: &JobResult) -> &str {
    &result.assets.image.as_ref().expect("an image").sha256
}

#[tokio::test(flavor = "multi_thread")]
async fn an_approved_job_goes_on_and_makes_what_it_would_have_made() {
    let mut lab = Lab::working("approved").await;
    let id = lab.submit(&film()).await;
    let waiting = asked(&lab, &id).await;
    assert_eq!((waiting.step, waiting.status), (Step::Image, JobStatus::Pending));
    assert_eq!(waiting.message, "waiting for approval");
    // The worker goes and comes back; the job waits all the same.
    lab.stop().await;
    lab.start();
    assert_eq!(lab.query(&id, vec![]).await, waiting);
    lab.jobs.approve(&id).await.expect("taken");
    let result = lab.result(&id).await;
    assert_eq!(image_of(&result), shown(&waiting));
    assert!(result.assets.video.is_some());
    lab.assert_tidy();
    lab.replay(&id, "approved").await;

    let mut plain = film();
    plain["approve"] = json!(false);
    let plain = lab.submit(&plain).await;
    let plain = lab.result(&plain).await;
    assert_eq!(plain.assets.video.expect("a video").sha256, result.assets.video.unwrap().sha256);
    lab.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rejected_job_ends_cancelled_with_the_reason_and_leaves_nothing() {
    let mut lab = Lab::working("rejected").await;
    for (reason, message) in [(Some("too dark"), "rejected: too dark"), (None, "rejected")] {
        let id = lab.submit(&film()).await;
        asked(&lab, &id).await;
        lab.jobs.reject(&id, reason).await.expect("taken");
        let last = lab.cancelled(&id).await;
        assert_eq!((last.status, last.message.as_str()), (JobStatus::Cancelled, message));
        lab.assert_empty();
        lab.replay(&id, "rejected").await;
    }
    lab.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn words_before_the_image_count() {
    let mut lab = Lab::idle("early-review").await;
    let approved = lab.submit(&film()).await;
    let rejected = lab.submit(&film()).await;
    lab.signal(&approved, SIGNAL_APPROVE, vec![]).await;
    lab.signal(&rejected, SIGNAL_REJECT, vec![json_payload(&json!({"reason": "never"}))]).await;
    lab.start();
    assert_eq!(lab.cancelled(&rejected).await.message, "rejected: never");
    assert!(lab.result(&approved).await.assets.video.is_some());
    lab.assert_tidy();
    lab.replay(&approved, "approved-early").await;
    lab.replay(&rejected, "rejected-early").await;
    lab.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replaced_image_is_what_the_video_is_made_of() {
    let mut lab = Lab::working("replaced").await;
    let (red, blue) = (upload(&lab, [255, 0, 0]), upload(&lab, [0, 0, 255]));
    let id = lab.submit(&film()).await;
    let before = shown(&asked(&lab, &id).await);
    for (argument, why) in [
        (vec![], "without an image"),
        (vec![json_payload(&json!({"image": 7, "approve": true}))], "without an image"),
        (vec![payload("binary/plain", b"\xff")], "without an image"),
        (vec![json_payload(&json!({"image": "cat.png"}))], "64 hex digits"),
        (vec![json_payload(&json!({"image": "http://host/cat.png"}))], "64 hex digits"),
        (
            vec![json_payload(&json!({"image": "0".repeat(64), "approve": true}))],
            "not in the store",
        ),
    ] {
        lab.signal(&id, SIGNAL_REPLACE, argument).await;
        let refused = lab.reach(&id, why, |progress| progress.message.contains(why)).await;
        assert!(asks(&refused), "{refused:?}");
        assert_eq!(shown(&refused), before, "the image stays");
    }
    lab.jobs.replace_image(&id, &red, false).await.expect("taken");
    let waiting = lab.reach(&id, "the red image", |now| asks(now) && shown(now) != before).await;
    assert_eq!(waiting.message, "waiting for approval");
    lab.jobs.replace_image(&id, &blue, true).await.expect("taken");
    let result = lab.result(&id).await;
    assert_ne!(image_of(&result), shown(&waiting));
    assert_eq!(result.done.image_model, None, "no model made it");
    assert!(result.done.notes.iter().any(|note| note.contains("replaced")), "{:?}", result.done);
    lab.assert_tidy();
    lab.replay(&id, "replaced").await;

    // The same as a job that was given the picture from the start.
    let given = job("VIDEO", json!({"duration": 0.3, "fps": 8.0, "image": blue}));
    let given = lab.submit(&given).await;
    let given = lab.result(&given).await;
    assert_eq!(
        given.assets.video.expect("a video").bytes,
        result.assets.video.expect("a video").bytes
    );
    lab.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_waits_can_be_cancelled() {
    let mut lab = Lab::working("approval-cancelled").await;
    for by_signal in [true, false] {
        let id = lab.submit(&film()).await;
        asked(&lab, &id).await;
        if by_signal {
            lab.signal(&id, genvideo::job::SIGNAL_CANCEL, vec![]).await;
        } else {
            lab.jobs.cancel(&id).await.expect("taken");
        }
        assert_eq!(lab.cancelled(&id).await.message, "cancelled");
        lab.assert_empty();
        lab.replay(
            &id,
            &format!("cancel-approval-{}", if by_signal { "signal" } else { "native" }),
        )
        .await;
    }
    lab.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_does_not_ask_ignores_every_word() {
    let mut lab = Lab::idle("not-asked").await;
    let id = lab.submit(&job("IMAGE", json!({}))).await;
    for signal in [SIGNAL_APPROVE, SIGNAL_REJECT, SIGNAL_REPLACE] {
        lab.signal(&id, signal, vec![]).await;
    }
    lab.start();
    let Outcome::Completed(result) = lab.outcome(&id).await else { panic!("want a result") };
    assert_eq!(result.progress.status, JobStatus::Completed);
    lab.replay(&id, "not-asked").await;
    lab.stop().await;
}
