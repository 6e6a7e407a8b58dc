//! Recorded histories of every release against today's workflow: what ran once must be able to go on.
//!
//! `tests/histories/<version>/` holds what `GENVIDEO_HISTORIES=<folder> cargo test --release --test it workflow:: fleet::` wrote with that
//! version. A change that fails here belongs behind `ctx.patched`.

use std::path::{Path, PathBuf};

use crate::support;

#[tokio::test(flavor = "multi_thread")]
async fn every_recorded_history_replays() {
    let histories = recorded();
    assert!(histories.len() >= 73, "{} histories", histories.len());
    let mut failed = Vec::new();
    for path in &histories {
        let json = std::fs::read(path).expect("a history");
        if let Err(error) = support::replay(&json).await {
            failed.push(format!("{}: {error}", path.display()));
        }
    }
    assert!(failed.is_empty(), "{}", failed.join("\n"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_history_of_other_code_is_refused() {
    let path = recorded()
        .into_iter()
        .find(|path| path.ends_with("image.json"))
        .expect("a history of an image job");
    let json = String::from_utf8(std::fs::read(path).expect("a history")).expect("JSON");
    let other = json.replace("\"gen_image\"", "\"gen_sound\"");
    assert_ne!(json, other);
    let error =
        support::replay(other.as_bytes()).await.expect_err("another activity is another walk");
    assert!(
        error.contains("TMPRL1100") || error.to_lowercase().contains("nondeterminism"),
        "{error}"
    );
}

fn recorded() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/histories");
    let mut found = Vec::new();
    for version in std::fs::read_dir(&root).expect("the histories").flatten() {
        for file in std::fs::read_dir(version.path()).expect("a version's histories").flatten() {
            found.push(file.path());
        }
    }
    found.retain(|path| path.extension().is_some_and(|extension| extension == "json"));
    found.sort();
    found
}
