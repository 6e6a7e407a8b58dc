//! Whose turn it is on a busy device: the job of higher priority first, and users by turns.

use serde_json::{Value, json};

use crate::support::machine::Held;
use crate::support::{Lab, job};

/// Submits `jobs` one after the other while the device is taken; their numbers in the order in which they got it.
async fn order(name: &str, jobs: &[Value]) -> Vec<usize> {
    let mut lab = Lab::working(name).await;
    let held = Held::device(&lab.renderer);
    let first = lab.submit(&job("IMAGE", json!({"steps": 1}))).await;
    lab.reach(&first, "loading", |progress| progress.message.contains("loading")).await;
    let mut ids = Vec::new();
    for (fields, seed) in jobs.iter().zip(0..) {
        let mut input = job("IMAGE", json!({"steps": 1, "seed": seed}));
        input
            .as_object_mut()
            .expect("an object")
            .extend(fields.as_object().expect("fields").clone());
        let id = lab.submit(&input).await;
        lab.reach(&id, "the queue", |progress| progress.message.contains("waiting for the device"))
            .await;
        ids.push(id);
    }
    held.release();
    let mut began = Vec::new();
    for (id, number) in ids.iter().zip(0..) {
        lab.result(id).await;
        let history = lab.jobs.history_json(id).await.expect("a history");
        let history: Value = serde_json::from_slice(&history).expect("JSON");
        began.push((image_began(&history), number));
    }
    lab.replay(&ids[0], name).await;
    lab.stop().await;
    began.sort();
    began.into_iter().map(|(_, number)| number).collect()
}

/// When the stage that makes the image was taken up.
fn image_began(history: &Value) -> jiff::Timestamp {
    let events = history["events"].as_array().expect("events");
    let scheduled = events.iter().find(|event| {
        event["attributes"]["ActivityTaskScheduledEventAttributes"]["activity_type"]["name"]
            == "gen_image"
    });
    let id = &scheduled.expect("the stage")["event_id"];
    let started = events.iter().find(|event| {
        event["attributes"]["ActivityTaskStartedEventAttributes"]["scheduled_event_id"] == *id
    });
    let time = started.expect("its start")["event_time"].as_str().expect("a time");
    time.parse().expect("an RFC 3339 time")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lower_number_goes_first() {
    let jobs = [json!({"priority": 5}), json!({}), json!({"priority": 1}), json!({"priority": 2})];
    assert_eq!(order("priority", &jobs).await, [2, 3, 1, 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn users_of_one_priority_take_turns() {
    let many = json!({"user_id": "many"});
    let one = json!({"user_id": "a".repeat(128)});
    let jobs = [&many, &many, &many, &many, &many, &one].map(Clone::clone);
    let order = order("fairness", &jobs).await;
    let turn = order.iter().position(|number| *number == 5).expect("it was done");
    assert!(turn <= 2, "the one job waited for {turn} of another user: {order:?}");
}
