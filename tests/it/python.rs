//! A Python client of the Temporal SDK against the worker: names, payloads and failures as other languages see them.

use std::path::{Path, PathBuf};
use std::process::Stdio;

use crate::support::{Lab, server, within};

#[tokio::test(flavor = "multi_thread")]
async fn a_python_client_runs_queries_cancels_and_is_refused() {
    let mut lab = Lab::on_queue(genvideo::job::TASK_QUEUE).await;
    lab.start();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/clients/seed_client.py");
    let client = tokio::process::Command::new(interpreter())
        .arg(script)
        .args([server::address().as_str(), lab.queue.as_str()])
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output();
    let output = within("the Python client's end", client).await.expect("the interpreter runs");
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    // The SDK's own threads may crash the interpreter after the last line; what the client saw is in its lines.
    assert_eq!(
        text.lines().last(),
        Some("all checks passed"),
        "{}\n{text}\n{errors}",
        output.status
    );
    lab.assert_tidy();
    lab.stop().await;
}

/// A Python with `temporalio`: `GENVIDEO_TEST_PYTHON`, else the one `scripts/setup` makes.
fn interpreter() -> PathBuf {
    let named =
        std::env::var_os("GENVIDEO_TEST_PYTHON").filter(|path| !path.is_empty()).map(PathBuf::from);
    let python = named.unwrap_or_else(|| server::cache().join("genvideo/python/bin/python"));
    assert!(
        python.is_file(),
        "no Python at `{}`: run scripts/setup, or set GENVIDEO_TEST_PYTHON to one that has `temporalio`",
        python.display()
    );
    python
}
