//! Blobs, manifests, clean-up: what is kept, what goes, and that races have one outcome.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Barrier;
use std::thread;
use std::time::Duration;

use genvideo::store::{Ages, BlobRef, Error, JobKey, Published, Store, Swept};

const DAY: Duration = Duration::from_secs(86_400);

fn store() -> (tempfile::TempDir, Store) {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(&folder.path().join("store")).unwrap();
    (folder, store)
}

fn job(id: &str) -> JobKey {
    JobKey::of_workflow(id)
}

/// A manifest that links to a blob, as the worker writes it.
fn manifest(store: &Store, blob: &BlobRef) -> Vec<u8> {
    format!(r#"{{"video":{{"url":"{}"}}}}"#, store.blob_url(&blob.sha256).unwrap()).into_bytes()
}

/// Every file under a folder, as relative paths.
fn walk(folder: &Path, root: &Path, found: &mut Vec<String>) {
    for entry in fs::read_dir(folder).into_iter().flatten() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            walk(&path, root, found);
        } else {
            found.push(path.strip_prefix(root).unwrap().to_string_lossy().into_owned());
        }
    }
}

/// Where a store is: a folder, or a bucket whose objects are files too.
struct Place {
    folder: tempfile::TempDir,
    objects: PathBuf,
    #[cfg(feature = "s3")]
    bucket: Option<crate::support::bucket::Bucket>,
}

impl Place {
    fn folder() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let objects = folder.path().join("store");
        Self {
            folder,
            objects,
            #[cfg(feature = "s3")]
            bucket: None,
        }
    }

    #[cfg(feature = "s3")]
    fn bucket() -> Self {
        let bucket = crate::support::bucket::Bucket::new();
        let objects = bucket.objects.clone();
        Self { folder: tempfile::tempdir().unwrap(), objects, bucket: Some(bucket) }
    }

    /// The store, as a process of its own has it.
    fn store(&self) -> Store {
        let root = self.folder.path().join("store");
        #[cfg(feature = "s3")]
        if let Some(bucket) = &self.bucket {
            return bucket.store(&root);
        }
        Store::open(&root).unwrap()
    }

    /// Every file of the store, temporary ones too, but the lock.
    fn files(&self) -> Vec<String> {
        let (mut found, root) = (Vec::new(), self.folder.path().join("store"));
        walk(&self.objects, &self.objects, &mut found);
        if root != self.objects {
            walk(&root, &root, &mut found);
        }
        found.retain(|path| path != "lock");
        found.sort();
        found
    }
}

/// Makes a test of each function, for a store in a folder and for one in a bucket.
macro_rules! in_both {
    ($($name:ident)*) => {
        mod folder {
            $(#[test] fn $name() { super::$name(&super::Place::folder()); })*
        }

        #[cfg(feature = "s3")]
        mod bucket {
            $(#[test] fn $name() { super::$name(&super::Place::bucket()); })*
        }
    };
}

in_both! {
    content_comes_back_as_it_was_put
    a_corrupt_blob_is_refused_and_replaced_by_the_next_put
    a_blob_is_copied_and_checked
    the_first_manifest_wins_and_the_same_again_is_fine
    of_sixteen_racing_manifests_one_is_published
    the_same_manifest_from_everywhere_is_published_once
    a_manifest_needs_its_files
    cleanup_leaves_nothing_of_an_unpublished_job
    cleanup_keeps_what_others_need
    cleanup_of_a_published_job_drops_only_what_its_manifest_does_not_name
    a_job_that_puts_while_another_cleans_up_keeps_its_blob
    publish_against_cleanup_has_one_outcome
    results_go_at_their_age_and_what_others_need_stays
    a_sweep_removes_the_old_and_unneeded_only
    the_store_works_inside_an_async_runtime_on_blocking_threads
    a_task_may_ask_the_store_more_often_than_its_budget_allows
}

#[test]
fn job_keys_come_from_ids_of_any_kind() {
    let key = job("gv-1");
    assert_eq!(key.to_string(), "4183d411fe27e21a3cea7760cdc5285d", "half of the id's SHA-256");
    for id in ["", "../../etc/passwd", "a/b", "ü\u{0}\n", &"x".repeat(10_000)] {
        let key = job(id);
        assert_eq!(key.to_string().len(), 32);
        assert_eq!(JobKey::parse(key.as_str()).unwrap(), key);
        let json = serde_json::to_string(&key).unwrap();
        assert_eq!(serde_json::from_str::<JobKey>(&json).unwrap(), key);
    }
}

#[test]
fn keys_refuse_anything_but_their_own_form() {
    let (_folder, store) = store();
    let mut file = tempfile::tempfile().unwrap();
    let good = "a".repeat(64);
    for bad in [
        "",
        ".",
        "..",
        "../secret",
        "/etc/passwd",
        &"a".repeat(63),
        &"a".repeat(65),
        &"A".repeat(64),
        &"g".repeat(64),
        &format!("{}/a", "a".repeat(62)),
        &format!("{}\n", "a".repeat(63)),
        &"ａ".repeat(64),
    ] {
        let key = |error: Error| matches!(error, Error::Key { .. });
        assert!(key(store.get_blob(bad).unwrap_err()), "{bad:?}");
        assert!(key(store.has_blob(bad).unwrap_err()), "{bad:?}");
        assert!(key(store.copy_blob(bad, Path::new("a"), &mut file).unwrap_err()), "{bad:?}");
        assert!(key(store.blob_url(bad).unwrap_err()), "{bad:?}");
        assert!(key(store.get_work(&job("a"), bad).unwrap_err()), "{bad:?}");
        assert!(JobKey::parse(bad).is_err(), "{bad:?}");
        assert!(serde_json::from_value::<JobKey>(bad.into()).is_err(), "{bad:?}");
    }
    assert!(matches!(store.get_blob(&good).unwrap_err(), Error::Missing { .. }));
    let error = JobKey::parse("../x\u{1b}").unwrap_err().to_string();
    assert_eq!(error, "`../x\\u{1b}` is not a job key, 32 lower-case hex digits wanted");
    for suffix in ["/../x", ".mp4/", "\0", " "] {
        assert!(
            matches!(store.temp_file(None, suffix).unwrap_err(), Error::Suffix { .. }),
            "{suffix:?}"
        );
    }
}

fn content_comes_back_as_it_was_put(place: &Place) {
    let store = place.store();
    let a = job("a");
    // Longer than the pieces that files are read in.
    let large: Vec<u8> =
        (0..20_u32 << 20).map(|i| i.to_le_bytes()[0] ^ i.to_le_bytes()[2]).collect();
    for content in [&b""[..], b"x", &large] {
        let blob = store.put_blob(&a, content).unwrap();
        assert_eq!(blob.bytes, content.len() as u64);
        assert!(store.has_blob(&blob.sha256).unwrap());
        assert!(store.get_blob(&blob.sha256).unwrap() == content);
        assert_eq!(store.put_blob(&a, content).unwrap(), blob);

        let file = place.folder.path().join("file");
        fs::write(&file, [content, b"y"].concat()).unwrap();
        let from_file = store.put_blob_file(&a, &file).unwrap();
        assert!(store.get_blob(&from_file.sha256).unwrap() == [content, b"y"].concat());
        assert!(file.exists());

        let work = store.put_work(&a, content).unwrap();
        assert_eq!(work, blob);
        assert!(store.get_work(&a, &work.sha256).unwrap() == content);
        assert!(matches!(
            store.get_work(&job("b"), &work.sha256).unwrap_err(),
            Error::Missing { .. }
        ));
    }
    assert!(matches!(
        store.put_blob_file(&a, &place.folder.path().join("no")).unwrap_err(),
        Error::Unreadable { .. }
    ));
}

fn a_corrupt_blob_is_refused_and_replaced_by_the_next_put(place: &Place) {
    let store = place.store();
    let a = job("a");
    let file = place.folder.path().join("file");
    fs::write(&file, b"right").unwrap();
    let blob = store.put_blob(&a, b"right").unwrap();
    let path = place.objects.join(format!("blobs/{}", blob.sha256));
    let puts: [&dyn Fn() -> BlobRef; 3] = [
        &|| store.put_blob(&a, b"right").unwrap(),
        &|| store.put_blob_file(&a, &file).unwrap(),
        &|| store.import_blob(b"right").unwrap(),
    ];
    for wrong in [&b"wrong"[..], b"", b"right and more"] {
        for put in puts {
            fs::write(&path, wrong).unwrap();
            let error = store.get_blob(&blob.sha256).unwrap_err();
            assert!(matches!(error, Error::Corrupt { .. }), "{error}");
            assert_eq!(put(), blob);
            assert_eq!(store.get_blob(&blob.sha256).unwrap(), &b"right"[..]);
        }
    }
    let work = store.put_work(&a, b"state").unwrap();
    fs::write(place.objects.join(format!("work/{a}/{}", work.sha256)), b"stale").unwrap();
    assert!(matches!(store.get_work(&a, &work.sha256).unwrap_err(), Error::Corrupt { .. }));
    store.put_work(&a, b"state").unwrap();
    assert_eq!(store.get_work(&a, &work.sha256).unwrap(), &b"state"[..]);
}

fn a_blob_is_copied_and_checked(place: &Place) {
    let store = place.store();
    let blob = store.put_blob(&job("a"), b"video").unwrap();
    let path = place.folder.path().join("copy");
    let copy = |sha256: &str| store.copy_blob(sha256, &path, &mut fs::File::create(&path).unwrap());
    copy(&blob.sha256).unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"video");
    fs::write(place.objects.join(format!("blobs/{}", blob.sha256)), b"other").unwrap();
    assert!(matches!(copy(&blob.sha256).unwrap_err(), Error::Corrupt { .. }));
    assert!(matches!(copy(&"a".repeat(64)).unwrap_err(), Error::Missing { .. }));
    let mut closed = fs::File::open(&path).unwrap();
    let error = store.copy_blob(&blob.sha256, &path, &mut closed).unwrap_err();
    assert!(matches!(error, Error::Unwritable { .. }), "{error}");
}

fn the_first_manifest_wins_and_the_same_again_is_fine(place: &Place) {
    let store = place.store();
    let a = job("a");
    assert_eq!(store.manifest(&a).unwrap(), None);
    assert_eq!(store.publish(&a, b"{}", &[]).unwrap(), Published::New);
    assert_eq!(store.publish(&a, b"{}", &[]).unwrap(), Published::Same);
    assert!(matches!(store.publish(&a, b"{ }", &[]).unwrap_err(), Error::Conflict { .. }));
    assert_eq!(store.manifest(&a).unwrap().unwrap(), &b"{}"[..]);
    assert_eq!(store.publish(&job("b"), b"{ }", &[]).unwrap(), Published::New);
}

fn of_sixteen_racing_manifests_one_is_published(place: &Place) {
    for round in 0..8 {
        let store = place.store();
        let (a, barrier) = (job(&format!("a{round}")), Barrier::new(16));
        let outcomes: Vec<_> = thread::scope(|scope| {
            let writer = |i: usize| {
                let (a, barrier) = (a.clone(), &barrier);
                scope.spawn(move || {
                    // A store of its own, as another process has it.
                    let store = place.store();
                    let blob = store.put_blob(&a, format!("video {round} {i}").as_bytes()).unwrap();
                    let manifest = manifest(&store, &blob);
                    barrier.wait();
                    (store.publish(&a, &manifest, &[&blob.sha256]), manifest)
                })
            };
            let writers: Vec<_> = (0..16).map(writer).collect();
            writers.into_iter().map(|writer| writer.join().unwrap()).collect()
        });
        let (won, lost): (Vec<_>, Vec<_>) =
            outcomes.into_iter().partition(|(outcome, _)| outcome.is_ok());
        assert_eq!(won.len(), 1, "round {round}");
        assert!(matches!(won[0].0, Ok(Published::New)));
        assert!(lost.iter().all(|(outcome, _)| matches!(outcome, Err(Error::Conflict { .. }))));
        assert_eq!(store.manifest(&a).unwrap().unwrap(), won[0].1);
        store.cleanup(&a).unwrap();
        assert_eq!(
            place.files().iter().filter(|path| path.starts_with("blobs/")).count(),
            round + 1,
            "the winners'"
        );
    }
}

fn the_same_manifest_from_everywhere_is_published_once(place: &Place) {
    let store = place.store();
    let a = job("a");
    let outcomes: Vec<_> = thread::scope(|scope| {
        let writers: Vec<_> =
            (0..16).map(|_| scope.spawn(|| store.publish(&a, b"{}", &[]).unwrap())).collect();
        writers.into_iter().map(|writer| writer.join().unwrap()).collect()
    });
    assert_eq!(outcomes.iter().filter(|&&outcome| outcome == Published::New).count(), 1);
}

fn a_manifest_needs_its_files(place: &Place) {
    let store = place.store();
    let (a, absent) = (job("a"), BlobRef { sha256: "a".repeat(64), bytes: 1 });
    let error = store.publish(&a, &manifest(&store, &absent), &[&absent.sha256]).unwrap_err();
    assert!(matches!(error, Error::Missing { .. }), "{error}");
    assert_eq!(store.manifest(&a).unwrap(), None);
    // What else it holds, a client's metadata for example, may name anything.
    assert_eq!(store.publish(&a, &manifest(&store, &absent), &[]).unwrap(), Published::New);
}

fn cleanup_leaves_nothing_of_an_unpublished_job(place: &Place) {
    let store = place.store();
    let a = job("a");
    store.put_blob(&a, b"image").unwrap();
    store.put_blob(&a, b"video").unwrap();
    store.put_work(&a, b"step 3").unwrap();
    let temp = store.temp_file(Some(&a), ".mp4").unwrap();
    let other_temp = store.temp_file(Some(&job("b")), ".mp4").unwrap();
    assert!(temp.path().exists() && temp.path().to_string_lossy().ends_with(".mp4"));
    for _ in 0..2 {
        store.cleanup(&a).unwrap();
        assert!(!temp.path().exists());
        assert!(other_temp.path().exists());
        drop(store.clone());
        assert_eq!(place.files().len(), 1, "{:?}", place.files());
    }
    drop(other_temp);
    assert_eq!(place.files(), [""; 0], "temporary files go with their handle");
    store.cleanup(&job("never seen")).unwrap();
}

fn cleanup_keeps_what_others_need(place: &Place) {
    let store = place.store();
    let (a, b, c) = (job("a"), job("b"), job("c"));
    let shared = store.put_blob(&a, b"shared with a running job").unwrap();
    store.put_blob(&b, b"shared with a running job").unwrap();
    let published = store.put_blob(&a, b"named by another job").unwrap();
    store.publish(&c, &manifest(&store, &published), &[&published.sha256]).unwrap();
    let uploaded = store.import_blob(b"uploaded").unwrap();
    store.put_blob(&a, b"uploaded").unwrap();
    let own = store.put_blob(&a, b"own").unwrap();
    store.cleanup(&a).unwrap();
    let there = |blob: &BlobRef| store.has_blob(&blob.sha256).unwrap();
    assert!(there(&shared) && there(&published) && there(&uploaded) && !there(&own));
    store.cleanup(&b).unwrap();
    assert!(!there(&shared), "its last claim is gone");
    store.cleanup(&c).unwrap();
    assert!(there(&published), "a published job keeps what its manifest names");
}

fn cleanup_of_a_published_job_drops_only_what_its_manifest_does_not_name(place: &Place) {
    let store = place.store();
    let a = job("a");
    let kept = store.put_blob(&a, b"kept").unwrap();
    let lost = store.put_blob(&a, b"of an attempt that lost").unwrap();
    store.put_work(&a, b"step").unwrap();
    store.publish(&a, &manifest(&store, &kept), &[&kept.sha256]).unwrap();
    store.cleanup(&a).unwrap();
    assert!(store.has_blob(&kept.sha256).unwrap() && !store.has_blob(&lost.sha256).unwrap());
    assert_eq!(
        place.files(),
        [
            format!("blobs/{}", kept.sha256),
            format!("claims/{a}/{}", kept.sha256),
            format!("jobs/{a}/manifest.json")
        ]
    );
}

fn a_job_that_puts_while_another_cleans_up_keeps_its_blob(place: &Place) {
    let store = place.store();
    let barrier = Barrier::new(2);
    for round in 0..60 {
        let content = format!("round {round}").into_bytes();
        let (a, b) = (job(&format!("a{round}")), job(&format!("b{round}")));
        store.put_blob(&a, &content).unwrap();
        let blob = thread::scope(|scope| {
            let putting = scope.spawn(|| {
                barrier.wait();
                store.put_blob(&b, &content).unwrap()
            });
            barrier.wait();
            store.cleanup(&a).unwrap();
            putting.join().unwrap()
        });
        assert_eq!(store.get_blob(&blob.sha256).unwrap(), content, "round {round}");
    }
}

fn publish_against_cleanup_has_one_outcome(place: &Place) {
    let store = place.store();
    let barrier = Barrier::new(2);
    for round in 0..60 {
        let a = job(&format!("a{round}"));
        let blob = store.put_blob(&a, format!("round {round}").as_bytes()).unwrap();
        let manifest = manifest(&store, &blob);
        let published = thread::scope(|scope| {
            let publishing = scope.spawn(|| {
                barrier.wait();
                store.publish(&a, &manifest, &[&blob.sha256])
            });
            barrier.wait();
            store.cleanup(&a).unwrap();
            publishing.join().unwrap()
        });
        match published {
            Ok(_) => assert!(store.get_blob(&blob.sha256).is_ok(), "round {round}"),
            Err(error) => {
                assert!(matches!(error, Error::Missing { .. }), "round {round}: {error}");
                assert!(
                    !store.has_blob(&blob.sha256).unwrap() && store.manifest(&a).unwrap().is_none()
                );
            }
        }
    }
}

fn results_go_at_their_age_and_what_others_need_stays(place: &Place) {
    let store = place.store();
    let (old, young) = (job("old"), job("young"));
    let own = store.put_blob(&old, b"of one job").unwrap();
    for job in [&old, &young] {
        let shared = store.put_blob(job, b"of two jobs").unwrap();
        let manifest = [manifest(&store, &shared), manifest(&store, &own)].concat();
        let named = if job == &old { &manifest[..] } else { &manifest[..manifest.len() / 2] };
        store.publish(job, named, &[&shared.sha256]).unwrap();
    }
    let path = place.objects.join(format!("jobs/{old}/manifest.json"));
    let file = fs::File::options().write(true).open(path).unwrap();
    file.set_modified(std::time::SystemTime::now() - 2 * DAY).unwrap();
    let ages = Ages { left_behind: DAY, results: Some(DAY) };
    let before = (place.files(), store.usage().unwrap());
    assert_eq!(store.sweep(DAY).unwrap(), Swept::default(), "results stay by themselves");
    let told = store.sweep_with(&ages, true).unwrap();
    assert_eq!((told.results, told.blobs, told.bytes), (1, 1, own.bytes));
    assert_eq!((place.files(), store.usage().unwrap()), before, "a dry run removes nothing");
    assert_eq!(store.sweep_with(&ages, false).unwrap(), told);
    assert!(store.manifest(&old).unwrap().is_none() && !store.has_blob(&own.sha256).unwrap());
    assert!(store.manifest(&young).unwrap().is_some());
    assert_eq!(place.files().len(), 3, "the young result, its claim and its blob");
    assert!(store.usage().unwrap() < before.1);
}

fn a_sweep_removes_the_old_and_unneeded_only(place: &Place) {
    let store = place.store();
    let (done, running) = (job("done"), job("running"));
    let kept = store.put_blob(&done, b"kept").unwrap();
    store.put_work(&done, b"work of a published job").unwrap();
    store.publish(&done, &manifest(&store, &kept), &[&kept.sha256]).unwrap();
    store.put_blob(&running, b"of a running job").unwrap();
    store.put_work(&running, b"work of a running job").unwrap();
    store.import_blob(b"an upload").unwrap();
    let stray = place.objects.join("blobs").join("b".repeat(64));
    fs::write(&stray, b"unclaimed").unwrap();
    // A bucket never shows half an object.
    let halves = if store.root() == place.objects.canonicalize().unwrap() { 2 } else { 0 };
    if halves > 0 {
        for half in [format!("blobs/{}#1", "c".repeat(64)), format!("jobs/{done}/manifest.json#1")]
        {
            fs::write(place.objects.join(half), b"half of it").unwrap();
        }
    }
    fs::write(store.root().join("tmp/any-left.mp4"), b"half a video").unwrap();
    let before = place.files().len();

    let young = store.sweep(DAY).unwrap();
    assert_eq!(
        young,
        Swept::default(),
        "an id may be used again: even work beside a result may be a running job's"
    );
    assert_eq!(place.files().len(), before);

    let old = store.sweep(Duration::ZERO).unwrap();
    assert_eq!((old.temp_files, old.work_folders, old.blobs), (1 + halves, 2, 3), "{old:?}");
    assert_eq!(
        place.files(),
        [
            format!("blobs/{}", kept.sha256),
            format!("claims/{done}/{}", kept.sha256),
            format!("jobs/{done}/manifest.json")
        ]
    );
    assert_eq!(store.sweep(Duration::ZERO).unwrap(), Swept::default());
    // A manifest alone is enough, should its claims ever be lost.
    fs::remove_dir_all(place.objects.join("claims")).unwrap();
    store.sweep(Duration::ZERO).unwrap();
    assert_eq!(store.get_blob(&kept.sha256).unwrap(), &b"kept"[..]);
}

#[test]
fn an_open_job_keeps_its_work_however_old() {
    let place = Place::folder();
    let store = place.store();
    let (open, gone) = (job("open"), job("gone"));
    for owner in [&open, &gone] {
        store.put_work(owner, owner.as_str().as_bytes()).unwrap();
        store.put_blob(owner, format!("an image of {owner}").as_bytes()).unwrap();
    }
    let then = std::time::SystemTime::now() - 2 * DAY;
    let mut aged = place.files();
    aged.extend([&open, &gone].map(|owner| format!("work/{owner}")));
    for path in aged {
        fs::File::open(store.root().join(path)).unwrap().set_modified(then).unwrap();
    }
    store.renew(&open).unwrap();
    store.renew(&job("never begun")).unwrap();
    let swept = store.sweep(DAY).unwrap();
    assert_eq!((swept.work_folders, swept.blobs), (1, 1), "{swept:?}");
    let left = place.files();
    assert_eq!(left.len(), 4, "work, its renewal, a claim and a blob: {left:?}");
    assert!(!left.iter().any(|path| path.contains(gone.as_str())), "{left:?}");
    store.cleanup(&open).unwrap();
    assert_eq!(place.files(), Vec::<String>::new());
}

#[test]
fn a_folder_that_cannot_be_written_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    fs::write(&file, b"").unwrap();
    for root in [file.clone(), file.join("below")] {
        let error = Store::open(&root).unwrap_err();
        assert!(matches!(error, Error::Unwritable { .. }), "{error}");
        assert!(error.to_string().contains("file"), "{error}");
    }
    let store = Store::open(&folder.path().join("store")).unwrap();
    for name in ["blobs", "jobs", "work", "tmp"] {
        fs::remove_dir(store.root().join(name)).unwrap();
        fs::write(store.root().join(name), b"").unwrap();
    }
    let a = job("a");
    let errors = [
        store.put_blob(&a, b"x").map(drop).unwrap_err(),
        store.put_work(&a, b"x").map(drop).unwrap_err(),
        store.temp_file(Some(&a), ".png").map(drop).unwrap_err(),
    ];
    for error in errors {
        assert!(matches!(error, Error::Unwritable { .. }), "{error}");
    }
    // A manifest is looked for before it is written.
    let error = store.publish(&a, b"{}", &[]).unwrap_err();
    assert!(matches!(error, Error::Unreadable { .. }), "{error}");
}

#[test]
fn addresses_are_percent_encoded() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(&folder.path().join("Meine Videos/影片 #1%")).unwrap();
    let blob = store.put_blob(&job("a"), b"x").unwrap();
    let url = store.blob_url(&blob.sha256).unwrap();
    assert!(url.starts_with("file:///"), "{url}");
    assert!(
        url.ends_with(&format!(
            "/Meine%20Videos/%E5%BD%B1%E7%89%87%20%231%25/blobs/{}",
            blob.sha256
        )),
        "{url}"
    );
    assert_eq!(store.get_blob(&blob.sha256).unwrap(), &b"x"[..]);
    assert_eq!(
        store.publish(&job("a"), &manifest(&store, &blob), &[&blob.sha256]).unwrap(),
        Published::New
    );
}

#[test]
fn a_writer_that_was_stopped_holds_up_no_job() {
    let place = Place::folder();
    let store = place.store();
    let key = job("a");
    store.put_work(&key, b"left").unwrap();
    let stopped = fs::File::open(store.root().join("lock")).unwrap();
    stopped.lock_shared().unwrap();
    let blob = store.put_blob(&key, b"film").unwrap();
    store.publish(&key, &manifest(&store, &blob), &[]).unwrap();
    store.settle_stage(&key, "image", b"done").unwrap();
    store.unsettle_stage(&key, "image").unwrap();
    let error = store.cleanup_published(&key).unwrap_err();
    assert!(error.to_string().contains("lock`: another process has held it for"), "{error}");
    stopped.unlock().unwrap();
    store.cleanup(&key).unwrap();
    assert!(place.files().iter().all(|file| !file.starts_with("work/")), "{:?}", place.files());
}

fn the_store_works_inside_an_async_runtime_on_blocking_threads(place: &Place) {
    let store = place.store();
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let blob = runtime.block_on(async {
        let puts = (0..8).map(|_| {
            let store = store.clone();
            tokio::task::spawn_blocking(move || store.put_blob(&job("a"), b"x").unwrap())
        });
        futures::future::join_all(puts).await.pop().unwrap().unwrap()
    });
    assert_eq!(store.get_blob(&blob.sha256).unwrap(), &b"x"[..]);
}

fn a_task_may_ask_the_store_more_often_than_its_budget_allows(place: &Place) {
    let store = place.store();
    let blob = store.put_blob(&job("a"), b"x").unwrap();
    let (sender, receiver) = std::sync::mpsc::channel();
    // One that waits for ever is left behind.
    thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            for _ in 0..300 {
                assert_eq!(store.get_blob(&blob.sha256).unwrap(), &b"x"[..]);
            }
        });
        sender.send(()).unwrap();
    });
    receiver.recv_timeout(Duration::from_secs(120)).unwrap();
}
