//! Submitting: ids, joining, refusing, lists, and what a client says of jobs that are not there.

use genvideo::client::{Error, Jobs, Outcome, Submit, Target};
use genvideo::job::class::ErrorClass;
use genvideo::job::progress::JobStatus;
use serde_json::json;

use crate::support::{Lab, job, json_payload, within};

#[tokio::test(flavor = "multi_thread")]
async fn the_same_id_joins_the_same_job_and_refuses_another() {
    let mut lab = Lab::idle("join").await;
    let id = genvideo::client::fresh_id();
    let input = job("IMAGE", json!({}));
    let first = lab.submit_as(&id, &input).await.expect("submitted");
    assert!(!first.joined);
    // The same job, written in another way: another order of fields, and the case of the type.
    let mut again = job("image", json!({"style": "realistic"}));
    again["size_policy"] = json!("exact");
    let joined = lab.submit_as(&id, &again).await.expect("joined");
    assert_eq!((joined.joined, &joined.run_id), (true, &first.run_id));
    let other = job("IMAGE", json!({"prompt": "a blue ball"}));
    let refused = lab.submit_as(&id, &other).await.expect_err("another job");
    assert_eq!(refused.class(), Some(ErrorClass::Conflict), "{refused}");
    lab.start();
    lab.result(&id).await;
    let after = lab.submit_as(&id, &input).await.expect("joined the finished job");
    assert_eq!((after.joined, &after.run_id), (true, &first.run_id));
    let refused = lab.submit_as(&id, &other).await.expect_err("another job");
    assert_eq!(refused.class(), Some(ErrorClass::Conflict), "{refused}");
    lab.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_is_open_until_it_ends() {
    let mut lab = Lab::idle("open").await;
    let id = lab.submit(&job("IMAGE", json!({}))).await;
    // The server's list comes a moment after the job.
    let listed = async { while !lab.jobs.open().await.expect("a list").contains(&id) {} };
    within("the list to have it", listed).await;
    lab.start();
    lab.result(&id).await;
    let listed = async { while lab.jobs.open().await.expect("a list").contains(&id) {} };
    within("the list to be without it", listed).await;
    lab.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_another_client_started_can_be_joined_too() {
    let lab = Lab::idle("join-raw").await;
    let input = job("IMAGE", json!({}));
    let id = lab.start_raw(vec![json_payload(&input)]).await;
    assert!(lab.submit_as(&id, &input).await.expect("joined").joined);
    let other = job("IMAGE", json!({"seed": 8}));
    assert!(matches!(lab.submit_as(&id, &other).await, Err(Error::Conflict { .. })));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_job_may_be_submitted_again() {
    let mut lab = Lab::working("again").await;
    let id = genvideo::client::fresh_id();
    let slow = job("VIDEO", json!({"steps": 150, "duration": 60.0}));
    let first = lab.submit_as(&id, &slow).await.expect("submitted");
    lab.reach(&id, "work", |progress| progress.percent > 0.0).await;
    lab.jobs.cancel(&id).await.expect("the cancel is taken");
    lab.cancelled(&id).await;
    let second = lab.submit_as(&id, &job("IMAGE", json!({}))).await.expect("submitted again");
    assert!(!second.joined);
    assert_ne!(first.run_id, second.run_id);
    lab.result(&id).await;
    lab.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_seed_makes_the_id_and_no_seed_makes_a_new_job() {
    let lab = Lab::idle("ids").await;
    let submit = |input: &serde_json::Value| {
        let input = serde_json::to_vec(input).expect("JSON");
        lab.jobs.submit(Submit { id: None, input, queue: lab.queue.clone() })
    };
    let seeded = job("IMAGE", json!({"prompt": lab.queue.clone()}));
    let first = submit(&seeded).await.expect("submitted");
    let second = submit(&seeded).await.expect("joined");
    assert_eq!((first.id.clone(), true), (second.id, second.joined));
    let mut unseeded = seeded;
    unseeded.as_object_mut().expect("an object").remove("seed");
    let third = submit(&unseeded).await.expect("submitted");
    let fourth = submit(&unseeded).await.expect("submitted");
    assert_ne!(third.id, fourth.id);
    assert!(!fourth.joined);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_with_faults_is_refused_before_anything_starts() {
    let lab = Lab::idle("faults").await;
    let id = genvideo::client::fresh_id();
    let bad = job("IMAGE", json!({"width": 1, "height": 1_000_000}));
    let error = lab.submit_as(&id, &bad).await.expect_err("two faults");
    let Error::Invalid(faults) = &error else { panic!("{error:?}") };
    assert_eq!(faults.len(), 2, "{faults:?}");
    assert_eq!(error.class(), Some(ErrorClass::OutOfRange));
    assert!(matches!(lab.jobs.status(&id).await, Err(Error::NoSuchJob { .. })));
    for bad_id in ["", "a\nb", &"x".repeat(256)] {
        assert!(
            matches!(lab.submit_as(bad_id, &job("IMAGE", json!({}))).await, Err(Error::Id { .. })),
            "{bad_id:?}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn lists_name_the_jobs_and_ended_jobs_cannot_be_cancelled() {
    let mut lab = Lab::working("list").await;
    let id = lab.submit(&job("IMAGE", json!({"user_id": "lister"}))).await;
    lab.result(&id).await;
    let listed = within("the job in the list", async {
        loop {
            // The index follows the run by a moment.
            let jobs = lab.jobs.list(1000).await.expect("a list");
            match jobs
                .into_iter()
                .find(|listed| listed.id == id && listed.status == JobStatus::Completed)
            {
                Some(listed) => break listed,
                None => tokio::task::yield_now().await,
            }
        }
    })
    .await;
    assert_eq!(listed.user_id.as_deref(), Some("lister"));
    assert_eq!(listed.job_type.as_deref(), Some("IMAGE"));
    assert_eq!(listed.prompt.as_deref(), Some("a red ball"));
    assert!(listed.started.is_some() && listed.ended.is_some());
    let refused = lab.jobs.cancel(&id).await.expect_err("it has ended");
    assert!(matches!(refused, Error::Ended { status: JobStatus::Completed, .. }), "{refused:?}");
    let refused = lab.jobs.resume(&id).await.expect_err("it has ended");
    assert!(matches!(refused, Error::Ended { status: JobStatus::Completed, .. }), "{refused:?}");
    assert!(matches!(lab.jobs.outcome(&id).await, Ok(Some(Outcome::Completed(_)))));
    lab.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_there_is_said_to_be_not_there() {
    let lab = Lab::idle("absent").await;
    for error in [
        lab.jobs.status("no-such-job").await.expect_err("no job"),
        lab.jobs.cancel("no-such-job").await.expect_err("no job"),
        lab.jobs.approve("no-such-job").await.expect_err("no job"),
        lab.jobs.pause("no-such-job").await.expect_err("no job"),
        lab.jobs.watch("no-such-job", &mut |_| {}).await.expect_err("no job"),
        lab.jobs.history_json("no-such-job").await.map(|_| ()).expect_err("no job"),
    ] {
        assert!(matches!(error, Error::NoSuchJob { .. }), "{error:?}");
    }
    // Nothing listens on a port that was free a moment ago and that nobody is told about.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("an address").to_string();
    drop(listener);
    let target = Target { address, namespace: "default".to_owned() };
    let Err(error) = Jobs::connect(&target).await else { panic!("nobody is there") };
    assert!(matches!(error, Error::Unreachable { .. }), "{error:?}");
    assert_eq!(error.exit_code(), 6);
    assert!(error.hint().is_some());
}
