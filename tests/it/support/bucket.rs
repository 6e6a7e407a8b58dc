//! An S3-compatible server of the tests' own, LocalBucket: one for the test binary, its objects files in a folder.
//!
//! It creates an object only if it is absent by linking a finished file to its name, which is atomic.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
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
    /// In the server of the test binary.
    pub(crate) fn new() -> Self {
        static SERVER: OnceLock<u16> = OnceLock::new();
        Self::at(*SERVER.get_or_init(|| start().1))
    }

    /// In the server at `port`; all servers have the same buckets.
    pub(crate) fn at(port: u16) -> Self {
        let name = format!("t-{}", uuid::Uuid::now_v7());
        let objects = root().join(&name).join("team/videos");
        std::fs::create_dir_all(&objects).expect("a bucket");
        let address = format!("s3://{name}/team/videos");
        Self { address, objects, variables: variables(&format!("http://127.0.0.1:{port}")) }
    }

    /// What a process has in its environment to keep its store there.
    pub(crate) fn settings(&self) -> Vec<(String, String)> {
        let mut settings = self.variables.clone();
        settings.push(("GENVIDEO_STORE".to_owned(), self.address.clone()));
        settings
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

/// Starts a server on a free port.
pub(crate) fn start() -> (Child, u16) {
    loop {
        let port = server::free_port();
        if let Some(child) = serve(port) {
            return (child, port);
        }
    }
}

/// Starts a server at `port`; `None` when another process was quicker.
pub(crate) fn serve(port: u16) -> Option<Child> {
    let python = server::cache().join("genvideo/python/bin/python");
    assert!(python.is_file(), "no `{}`: run scripts/setup --tests", python.display());
    let mut command = Command::new(&python);
    command
        .args(["-c", PROGRAM])
        .arg(root())
        .args(["--port", &port.to_string()])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let mut child = server::keep(command);
    server::is_up(&mut child, port).then_some(child)
}
