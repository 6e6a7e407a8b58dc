//! A store in a bucket of a real S3-compatible server: racing writers, workers that share it, servers that will not do.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::Duration;

use axum::extract::Request;
use axum::http::request::Parts;
use axum::http::{Method, StatusCode};
use axum::response::IntoResponse;
use bytes::Bytes;
use genvideo::store::{Error, JobKey, Store};

use crate::cli::Machine;
use crate::fleet;
use crate::support::bucket::{self, Bucket};
use crate::support::server::free_port;

const WRITERS: usize = 32;
const KEYS: usize = 200;

#[test]
fn of_racing_writers_one_wins_each_key_and_all_read_what_it_wrote() {
    let (bucket, folder) = (Bucket::new(), tempfile::tempdir().unwrap());
    let job = JobKey::of_workflow("a");
    // Each with its own connections, as a process has them.
    let stores: Vec<Store> = (0..WRITERS).map(|_| bucket.store(folder.path())).collect();
    let barrier = Barrier::new(WRITERS);
    let read: Vec<Vec<Result<Bytes, Error>>> = thread::scope(|scope| {
        let writers = stores.iter().enumerate().map(|(writer, store)| {
            let (job, barrier) = (&job, &barrier);
            scope.spawn(move || {
                let settle = |key| {
                    barrier.wait();
                    let content = format!("writer {writer}");
                    store.settle_stage(job, &format!("key-{key}"), content.as_bytes())
                };
                // A thread that fails here would leave the others waiting.
                (0..KEYS).map(settle).collect()
            })
        });
        let writers: Vec<_> = writers.collect();
        writers.into_iter().map(|writer| writer.join().unwrap()).collect()
    });
    let mut winners = HashSet::new();
    for key in 0..KEYS {
        let settled = stores[0].settled_stage(&job, &format!("key-{key}")).unwrap().unwrap();
        for (writer, read) in read.iter().enumerate() {
            assert_eq!(read[key].as_ref().unwrap(), &settled, "writer {writer}, key {key}");
        }
        winners.insert(settled);
    }
    assert!(winners.len() > 1, "they did race");
}

#[test]
fn a_blob_has_the_address_of_its_object() {
    let (bucket, folder) = (Bucket::new(), tempfile::tempdir().unwrap());
    let store = bucket.store(folder.path());
    let blob = store.put_blob(&JobKey::of_workflow("a"), b"video").unwrap();
    let url = store.blob_url(&blob.sha256).unwrap();
    assert_eq!(url, format!("{}/blobs/{}", bucket.address, blob.sha256));
}

#[test]
fn the_bytes_of_a_bucket_are_not_counted_at_every_stage() {
    let (bucket, folder) = (Bucket::new(), tempfile::tempdir().unwrap());
    let (store, job) = (bucket.store(folder.path()), JobKey::of_workflow("a"));
    store.put_work(&job, b"one").unwrap();
    assert_eq!(store.usage_over(5).unwrap(), None);
    store.put_work(&job, b"other").unwrap();
    assert_eq!(store.usage_over(5).unwrap(), None, "counted a moment ago");
    // Nobody is refused for what was there a moment ago.
    assert_eq!(store.usage_over(2).unwrap(), Some(8));
    store.cleanup(&job).unwrap();
    assert_eq!(store.usage_over(2).unwrap(), None);
}

/// A server that answers every request alike; gives its address.
fn answering(status: StatusCode) -> String {
    serving(move |_| (status, [("ETag", "\"a\"")], ""))
}

/// A server that answers as `answer` says; gives its address.
fn serving<A: IntoResponse + Send>(
    answer: impl Fn(&Parts) -> A + Clone + Send + Sync + 'static,
) -> String {
    let (sender, receiver) = std::sync::mpsc::channel();
    thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
            sender.send(listener.local_addr().unwrap()).unwrap();
            let answer = move |request: Request| async move {
                let (asked, content) = request.into_parts();
                axum::body::to_bytes(content, usize::MAX).await.unwrap();
                answer(&asked)
            };
            axum::serve(listener, axum::Router::new().fallback(answer)).await.unwrap();
        });
    });
    format!("http://{}", receiver.recv().unwrap())
}

#[test]
fn large_content_goes_in_pieces_and_an_upload_that_fails_is_given_up() {
    let (sender, requests) = std::sync::mpsc::channel();
    let is_first = Arc::new(AtomicBool::new(true));
    let endpoint = serving(move |request| {
        let (query, headers) = (request.uri.query().unwrap_or_default(), &request.headers);
        let status = match request.method {
            Method::HEAD => StatusCode::NOT_FOUND,
            Method::PUT
                if headers.contains_key("if-none-match")
                    && !is_first.swap(false, Ordering::SeqCst) =>
            {
                StatusCode::PRECONDITION_FAILED
            }
            Method::POST if query.contains("uploadId") => StatusCode::FORBIDDEN,
            _ => StatusCode::OK,
        };
        let length = headers.get("content-length").map(|length| length.to_str().unwrap());
        let asked = format!("{} {query} {}", request.method, length.unwrap_or_default());
        sender.send(asked).unwrap();
        let begun =
            "<InitiateMultipartUploadResult><UploadId>u</UploadId></InitiateMultipartUploadResult>";
        (status, [("ETag", "\"a\"")], if query.contains("uploads") { begun } else { "" })
    });
    let folder = tempfile::tempdir().unwrap();
    let store =
        Store::open_bucket("s3://videos", &bucket::variables(&endpoint), folder.path()).unwrap();
    let _opened = requests.try_iter().count();
    let error = store.put_work(&JobKey::of_workflow("a"), &vec![0; 9 << 20]).unwrap_err();
    assert!(matches!(error, Error::Backend { .. }), "{error}");
    let asked: Vec<String> = requests.try_iter().collect();
    let parts: Vec<&String> = asked.iter().filter(|asked| asked.starts_with("PUT")).collect();
    assert!(parts.len() == 2 && parts.iter().all(|part| part.contains("partNumber")), "{asked:?}");
    assert!(parts[0].ends_with(" 8388608") && parts[1].ends_with(" 1048576"), "{asked:?}");
    assert!(asked.last().unwrap().starts_with("DELETE uploadId=u"), "{asked:?}");
}

#[test]
fn clean_up_leaves_a_manifest_that_came_late() {
    let (bucket, folder) = (Bucket::new(), tempfile::tempdir().unwrap());
    let (store, job) = (bucket.store(folder.path()), JobKey::of_workflow("a"));
    // As one that landed after it was asked for.
    let late = bucket.objects.join(format!("jobs/{job}/late"));
    std::fs::create_dir_all(late.parent().unwrap()).unwrap();
    std::fs::write(&late, b"{}").unwrap();
    store.cleanup(&job).unwrap();
    store.sweep(Duration::ZERO).unwrap();
    assert!(late.exists());
}

#[test]
fn a_server_that_ignores_the_condition_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let open = |endpoint: &str| {
        Store::open_bucket("s3://videos", &bucket::variables(endpoint), folder.path()).unwrap_err()
    };
    let error = open(&answering(StatusCode::OK));
    assert!(matches!(error, Error::NotExclusive { winners: 8, writers: 8, .. }), "{error}");
    for endpoint in [
        answering(StatusCode::NOT_IMPLEMENTED),
        answering(StatusCode::FORBIDDEN),
        answering(StatusCode::NOT_FOUND),
    ] {
        let error = open(&endpoint);
        assert!(
            matches!(
                error,
                Error::Unanswered { .. } | Error::Backend { .. } | Error::Missing { .. }
            ),
            "{error}"
        );
    }
}

#[test]
fn an_address_that_is_none_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let error = Store::open_bucket("s3://a//b", &[], folder.path()).unwrap_err();
    assert!(matches!(error, Error::Address { .. }), "{error}");
}

#[test]
fn the_doctor_asks_the_bucket() {
    for (bucket, code) in [(Bucket::new(), 0), (Bucket::at(free_port()), 1)] {
        let mut machine = Machine::new();
        machine.settings.extend(bucket.settings());
        let answer = machine.run(&["doctor", "--json"]);
        assert_eq!(answer.code, Some(code), "{}{}", answer.stdout, answer.stderr);
        let verdict = if code == 0 { "ok" } else { "fail" };
        let store = |line: &str| line.contains(r#""check":"store""#) && line.contains(verdict);
        assert!(answer.stdout.lines().any(store), "{}", answer.stdout);
    }
}

#[test]
fn an_outage_is_an_error_that_another_attempt_survives() {
    let (bucket, folder) = (Bucket::new(), tempfile::tempdir().unwrap());
    let nobody = bucket::variables(&format!("http://127.0.0.1:{}", free_port()));
    let error = Store::open_bucket(&bucket.address, &nobody, folder.path()).unwrap_err();
    assert!(matches!(error, Error::Unanswered { .. }), "{error}");
    let error = genvideo::render::Error::from(error);
    let class = genvideo::render::class(&error);
    assert!(class.retryable() && genvideo::render::is_outage(&error), "{class}");
    assert!(genvideo::render::hint(&error).unwrap().contains("server"));
    let absent = bucket.store(folder.path()).get_blob(&"a".repeat(64)).unwrap_err();
    assert!(!genvideo::render::is_outage(&absent.into()));
}

#[test]
fn a_job_outlives_an_outage() {
    let (mut server, port) = bucket::start();
    let bucket = Bucket::at(port);
    let settings = bucket.settings();
    let begin = || {
        server.kill().unwrap();
        server.wait().unwrap();
    };
    fleet::outlives_an_outage(&settings, begin, || drop(bucket::serve(port).unwrap()));
}

#[test]
fn a_worker_that_starts_in_an_outage_waits_for_its_end() {
    let port = free_port();
    let bucket = Bucket::at(port);
    let settings = bucket.settings();
    fleet::starts_in_an_outage(&settings, || drop(bucket::serve(port).unwrap()));
}

#[test]
fn a_worker_goes_on_where_a_killed_one_was() {
    let bucket = Bucket::new();
    let settings = bucket.settings();
    fleet::goes_on(&settings);
}
