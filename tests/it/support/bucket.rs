//! An S3-compatible server of the tests' own, LocalBucket: one for the test binary, its objects files in a folder.
//!
//! It creates an object only if it is absent by linking a finished file to its name, which is atomic.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use genvideo::store::Store;

use super::server;

/// LocalBucket as its own program starts it, but with room for more than five clients that connect at once.
const PROGRAM: &str = "import http.server, localbucket
http.server.ThreadingHTTPServer.request_queue_size = 256
localbucket.main()";

/// A bucket of its own, with a store in it.
pub(crate) struct Bucket {
    pub(crate) address: String,
    /// Where the store's objects lie as files.
    pub(crate) objects: PathBuf,
    pub(crate) variables: Vec<(String, String)>,
}

impl Bucket {
    pub(crate) fn new() -> Self {
        static SERVER: OnceLock<String> = OnceLock::new();
        let endpoint = SERVER.get_or_init(start);
        let name = format!("t-{}", uuid::Uuid::now_v7());
        let objects = root().join(&name).join("team/videos");
        std::fs::create_dir_all(&objects).expect("a bucket");
        let address = format!("s3://{name}/team/videos");
        Self { address, objects, variables: variables(endpoint) }
    }

    /// The store in it, as another process has it.
    pub(crate) fn store(&self, scratch: &Path) -> Store {
        Store::open_bucket(&self.address, &self.variables, scratch).expect("a store in a bucket")
    }
}

impl Drop for Bucket {
    fn drop(&mut self) {
        // The rest goes with the folder of this process.
        let _ = std::fs::remove_dir_all(&self.objects);
    }
}

/// How a client finds the server at `endpoint`.
pub(crate) fn variables(endpoint: &str) -> Vec<(String, String)> {
    [
        ("AWS_ENDPOINT_URL", endpoint),
        ("AWS_REGION", "us-east-1"),
        ("AWS_ACCESS_KEY_ID", "tester"),
        ("AWS_SECRET_ACCESS_KEY", "secret"),
    ]
    .map(|(name, value)| (name.to_owned(), value.to_owned()))
    .to_vec()
}

fn root() -> PathBuf {
    super::process_folder().join("buckets")
}

fn start() -> String {
    let python = server::cache().join("genvideo/python/bin/python");
    assert!(python.is_file(), "no `{}`: run scripts/setup --tests", python.display());
    loop {
        let port = server::free_port();
        let mut command = Command::new(&python);
        command
            .args(["-c", PROGRAM])
            .arg(root())
            .args(["--port", &port.to_string()])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        if server::is_up(&mut server::keep(command), port) {
            return format!("http://127.0.0.1:{port}");
        }
    }
}
