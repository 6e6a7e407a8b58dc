//! What clients of any language may send: every bad input is an answer, none is a stuck workflow.

use futures::StreamExt;
use futures::future::join_all;
use genvideo::client::Outcome;
use genvideo::job::class::ErrorClass;
use genvideo::job::progress::{JobStatus, Step};
use genvideo::job::{SIGNAL_CANCEL, SIGNAL_PROGRESS};
use serde_json::{Value, json};
use temporalio_client::UntypedSignal;
use temporalio_client::errors::WorkflowGetResultError;
use temporalio_common::data_converters::RawValue;
use temporalio_common::error::IncomingError;
use temporalio_common::protos::temporal::api::common::v1::Payload;

use crate::support::machine::Held;
use crate::support::{Lab, job, json_payload, payload, within};

/// Starts a job with `payloads` and checks that it fails at once, for good, with one of `classes`.
async fn check_refused(lab: &Lab, name: &str, payloads: Vec<Payload>, classes: &[ErrorClass]) {
    let id = lab.start_raw(payloads).await;
    let handle = lab.handle(&id);
    let ended = within(name, handle.get_result(Default::default())).await;
    let Err(WorkflowGetResultError::Failed(error)) = ended else {
        panic!("{name}: want a failure, got {ended:?}")
    };
    let IncomingError::Application(failure) = *error else { panic!("{name}: {error:?}") };
    let class = failure.type_name().unwrap_or_default();
    assert!(
        classes.iter().any(|wanted| wanted.name() == class),
        "{name}: class {class}, want one of {classes:?}"
    );
    assert!(failure.is_non_retryable(), "{name}");
    let faults: Vec<Value> = failure.details().expect("readable details").expect("details");
    assert_eq!(faults[0]["class"], class, "{name}");
    let progress = lab.query(&id, vec![]).await;
    assert_eq!((progress.step, progress.status), (Step::Failed, JobStatus::Failed), "{name}");
    assert_eq!(progress.error_message, Some(failure.to_string()), "{name}");
    lab.replay(&id, &format!("refused-{name}")).await;
}

/// The good job with one field replaced.
fn with(field: &str, value: Value) -> Vec<Payload> {
    vec![json_payload(&job("VIDEO", json!({ field: value })))]
}

/// The good job without one field.
fn without(field: &str) -> Vec<Payload> {
    let mut input = job("VIDEO", json!({}));
    input.as_object_mut().expect("an object").remove(field);
    vec![json_payload(&input)]
}

#[tokio::test(flavor = "multi_thread")]
async fn every_bad_input_fails_at_once_with_its_class() {
    use ErrorClass::{
        InvalidJson, InvalidPrompt, InvalidUserId, MissingField, OutOfRange, UnknownField,
    };
    use ErrorClass::{UnknownJobType, UnknownStyle, WrongType};
    let mut lab = Lab::working("bad-input").await;
    let good = json_payload(&job("VIDEO", json!({})));
    let not_an_object = &[InvalidJson, WrongType][..];
    let cases: Vec<(&str, Vec<Payload>, &[ErrorClass])> = vec![
        ("no-argument", vec![], not_an_object),
        ("two-arguments", vec![good.clone(), good.clone()], not_an_object),
        ("string", vec![json_payload(&json!("a red ball"))], not_an_object),
        ("number", vec![json_payload(&json!(5))], not_an_object),
        ("list", vec![json_payload(&json!([job("VIDEO", json!({}))]))], not_an_object),
        ("json-null", vec![json_payload(&Value::Null)], not_an_object),
        ("null", vec![payload("binary/null", b"")], not_an_object),
        ("bytes", vec![payload("binary/plain", b"\x00\xff\x01")], not_an_object),
        ("no-encoding", vec![Payload::default()], not_an_object),
        ("broken-json", vec![payload("json/plain", b"{\"prompt\": ")], &[InvalidJson]),
        ("not-utf8", vec![payload("json/plain", b"{\"prompt\": \"\xff\xfe\"}")], &[InvalidJson]),
        ("empty-object", vec![json_payload(&json!({}))], &[MissingField]),
        ("no-prompt", without("prompt"), &[MissingField]),
        ("no-user", without("user_id"), &[MissingField]),
        ("prompt-is-a-number", with("prompt", json!(5)), &[WrongType]),
        ("width-is-a-string", with("width", json!("512")), &[WrongType]),
        ("width-is-negative", with("width", json!(-1)), &[OutOfRange, WrongType]),
        ("width-is-too-large", with("width", json!(1_000_000)), &[OutOfRange]),
        ("duration-is-a-list", with("duration", json!([5])), &[WrongType]),
        ("duration-is-too-long", with("duration", json!(1e9)), &[OutOfRange]),
        ("metadata-is-a-string", with("metadata", json!("x")), &[WrongType]),
        ("unknown-field", with("colour", json!("red")), &[UnknownField]),
        ("unknown-style", with("style", json!("nonesuch")), &[UnknownStyle]),
        ("unknown-job-type", with("job_type", json!("AUDIO")), &[UnknownJobType]),
        ("empty-prompt", with("prompt", json!("")), &[InvalidPrompt]),
        ("empty-user", with("user_id", json!("")), &[InvalidUserId]),
    ];
    join_all(
        cases
            .into_iter()
            .map(|(name, payloads, classes)| check_refused(&lab, name, payloads, classes)),
    )
    .await;
    let id = lab.submit(&job("IMAGE", json!({}))).await;
    lab.result(&id).await;
    lab.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_signals_and_queries_leave_the_job_alone() {
    let mut lab = Lab::working("bad-signals").await;
    // The device is taken, so the job stays where it is until this test lets it go on.
    let held = Held::device(&lab.renderer);
    let id = lab.submit(&job("IMAGE", json!({}))).await;
    lab.reach(&id, "loading", |progress| progress.message.contains("loading")).await;
    let news = json!({"percent": 50.0});
    let bad: Vec<(&str, Vec<Payload>)> = vec![
        ("none", vec![]),
        ("two", vec![json_payload(&news), json_payload(&news)]),
        ("string", vec![json_payload(&json!("50"))]),
        ("list", vec![json_payload(&json!([50]))]),
        ("null", vec![payload("binary/null", b"")]),
        ("bytes", vec![payload("binary/plain", b"\x00\xff")]),
        ("broken", vec![payload("json/plain", b"{")]),
        ("types", vec![json_payload(&json!({"percent": "half", "step": 7}))]),
        ("step", vec![json_payload(&json!({"percent": 50.0, "step": "NOWHERE"}))]),
        ("stale step", vec![json_payload(&json!({"percent": 90.0, "step": "PROCESSING"}))]),
        ("stale ticket", vec![json_payload(&json!({"percent": 90.0, "ticket": 99}))]),
        ("not finite", vec![payload("json/plain", b"{\"percent\": 1e999}")]),
        ("backwards", vec![json_payload(&json!({"percent": -5.0}))]),
        ("status", vec![json_payload(&json!({"status": "CANCELLED"}))]),
        ("unknown", vec![json_payload(&json!({"what": 1}))]),
    ];
    for (_, payloads) in &bad {
        lab.signal(&id, SIGNAL_PROGRESS, payloads.clone()).await;
        lab.signal(&id, "no_such_signal", payloads.clone()).await;
    }
    let mut last = 0.0;
    for (name, payloads) in &bad {
        let progress = lab.query(&id, payloads.clone()).await;
        assert!(
            matches!(progress.status, JobStatus::Running | JobStatus::Retrying),
            "{name}: {progress:?}"
        );
        assert!(progress.percent >= last && progress.percent < 99.0, "{name}: {progress:?}");
        last = progress.percent;
    }
    let good = json!({"percent": 97.0, "step": "IMAGE", "message": "nearly there", "extra": true});
    lab.signal(&id, SIGNAL_PROGRESS, vec![json_payload(&good)]).await;
    let progress = lab.query(&id, vec![]).await;
    assert_eq!(progress.percent, 97.0, "a well-formed signal counts: {progress:?}");
    lab.signal(
        &id,
        SIGNAL_CANCEL,
        vec![payload("binary/plain", b"\x00"), json_payload(&Value::Null)],
    )
    .await;
    lab.cancelled(&id).await;
    held.release();
    lab.replay(&id, "bad-signals").await;
    lab.stop().await;
}

/// As many signals as the server takes for one run. They come before the worker does, since one by one a busy server
/// takes minutes for them; the workflow gets them all at once.
#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_signals_leave_the_job_alone() {
    const SIGNALS: usize = 10_000;
    let mut lab = Lab::idle("flood").await;
    let id = lab.submit(&job("IMAGE", json!({}))).await;
    let news = |number: usize| match number % 4 {
        0 => vec![json_payload(&json!({"percent": 99.0, "message": format!("flood {number}")}))],
        1 => vec![json_payload(&json!({"percent": "all", "step": []}))],
        2 => vec![payload("binary/plain", b"\xff\x00")],
        _ => vec![json_payload(&json!({"percent": 60.0, "step": "VIDEO", "ticket": 9}))],
    };
    let mut sending = futures::stream::iter(0..SIGNALS)
        .map(|number| {
            let handle = lab.handle(&id);
            async move {
                let signal = UntypedSignal::new(SIGNAL_PROGRESS);
                let sent = handle.signal(signal, RawValue::new(news(number)), Default::default());
                within("a signal", sent).await.expect("the signal is taken");
            }
        })
        .buffer_unordered(16);
    while sending.next().await.is_some() {}
    drop(sending);
    lab.start();
    let result = lab.result(&id).await;
    assert_eq!(result.progress.percent, 100.0);
    let history = lab.jobs.history_json(&id).await.expect("a history");
    crate::support::replay(&history).await.expect("it replays");
    lab.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_signal_before_the_start_does_no_harm() {
    let mut lab = Lab::idle("early-signals").await;
    let id = lab.submit(&job("IMAGE", json!({}))).await;
    lab.signal(&id, SIGNAL_PROGRESS, vec![json_payload(&json!({"percent": 80.0}))]).await;
    lab.signal(&id, SIGNAL_PROGRESS, vec![]).await;
    lab.start();
    let Outcome::Completed(result) = lab.outcome(&id).await else { panic!("want a result") };
    assert_eq!(result.progress.percent, 100.0);
    lab.replay(&id, "early-signals").await;
    lab.stop().await;
}
