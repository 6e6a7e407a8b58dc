//! A hub on loopback that answers as the real one does: a listing, small files with git's blob id as their ETag, large
//! ones by a redirect to another server, ranges, and refusals with the header `X-Error-Code`. It can misbehave.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard};

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Request, State};
use axum::http::{Response, StatusCode};
use futures::StreamExt;
use futures::stream;
use serde_json::json;
use sha2::{Digest, Sha256};
use tokio::sync::oneshot;

/// The commit that every branch is at.
pub(crate) const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
/// The one repository there is.
pub(crate) const REPO: &str = "studio/tiny";

/// What `git hash-object` says of the small files of the goldens' Stable Diffusion 1.
const GIT_BLOBS: &[(&str, &str)] = &[
    ("model_index.json", "6d804a9787a8be87e9db4674a755347a16036365"),
    ("scheduler/scheduler_config.json", "a94f9479d2abb0f2aaf4da2a21efd02a5196342a"),
    ("text_encoder/config.json", "bfa881fff84bff18dcb48e56b0ae422178451d86"),
    ("tokenizer/merges.txt", "89841b815e62ba27de3e4fe8818b5a204f21e8ca"),
    ("tokenizer/special_tokens_map.json", "a8a5f62cdfb7b3acd3b9135ac927aada195463ec"),
    ("tokenizer/tokenizer_config.json", "c5f6043b5a0b3f46b9979d0eedf257271b2e7f0f"),
    ("tokenizer/vocab.json", "aff38f6babb9447b9a2e6eb6fa96304585b52f00"),
    ("unet/config.json", "9fca33e652dc8acd878ccace6b6d50372446e481"),
    ("vae/config.json", "465a55a935c1da28829309753f5084c589e2d020"),
];

/// How the hub behaves; the default is well.
#[derive(Clone, Debug, Default)]
pub(crate) struct Manners {
    /// The account with this token may in; nobody else.
    pub(crate) token: Option<String>,
    /// Refuses files with this status and `X-Error-Code`.
    pub(crate) refuse: Option<(u16, &'static str)>,
    /// Answers so many requests with 503 first.
    pub(crate) busy: usize,
    /// Breaks the connection after so many bytes of a large file.
    pub(crate) cut: Option<usize>,
    /// Sends nothing more after so many bytes of a large file, and keeps the connection.
    pub(crate) stall: Option<usize>,
    /// Sends another byte than it should in the middle of this file.
    pub(crate) wrong: Option<&'static str>,
    /// Says that every branch is at this commit.
    pub(crate) sha: Option<&'static str>,
    /// Knows no ranges.
    pub(crate) no_ranges: bool,
}

#[derive(Default)]
struct Inner {
    files: BTreeMap<String, Vec<u8>>,
    manners: Manners,
    /// Bytes of large files that were sent.
    sent: u64,
    /// Paths, with whether a token came along.
    requests: Vec<(String, bool)>,
    cdn: String,
    stalled: Option<Sender<()>>,
}

type Shared = Arc<Mutex<Inner>>;

/// The hub, until it is dropped.
pub(crate) struct FakeHub {
    /// Its address.
    pub(crate) address: String,
    shared: Shared,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl FakeHub {
    /// A hub with the files of a folder, and some that no run needs.
    pub(crate) fn start(folder: &Path) -> Self {
        let mut files = BTreeMap::new();
        collect(folder, "", &mut files);
        files.insert("README.md".to_owned(), b"# tiny\n".to_vec());
        files.insert("unet/diffusion_pytorch_model.bin".to_owned(), b"a pickle".to_vec());
        files.insert("safety_checker/model.safetensors".to_owned(), b"not wanted".to_vec());
        let shared: Shared = Arc::new(Mutex::new(Inner { files, ..Inner::default() }));
        let (stop, stopped) = oneshot::channel::<()>();
        let (tell, told) = channel();
        let state = Arc::clone(&shared);
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.expect("a runtime").block_on(async move {
                let (hub, hub_at) = listen().await;
                let (cdn, cdn_at) = listen().await;
                state.lock().expect("no panic").cdn = format!("http://{cdn_at}");
                tell.send(hub_at).expect("the test waits");
                let hub_app = Router::new().fallback(on_hub).with_state(Arc::clone(&state));
                let cdn_app = Router::new().fallback(on_cdn).with_state(state);
                tokio::select! {
                    ended = async { axum::serve(hub, hub_app).await } => ended.expect("it serves"),
                    ended = async { axum::serve(cdn, cdn_app).await } => ended.expect("it serves"),
                    _ = stopped => {}
                }
            });
        });
        let address = format!("http://{}", told.recv().expect("it listens"));
        Self { address, shared, stop: Some(stop), thread: Some(thread) }
    }

    /// Behaves so from now on.
    pub(crate) fn behave(&self, manners: Manners) {
        self.inner().manners = manners;
    }

    /// The same, with a channel that hears when a file stalls.
    pub(crate) fn stall_after(&self, bytes: usize) -> Receiver<()> {
        let (stalled, hears) = channel();
        let mut inner = self.inner();
        inner.manners = Manners { stall: Some(bytes), ..Manners::default() };
        inner.stalled = Some(stalled);
        hears
    }

    /// Changes the files.
    pub(crate) fn files(&self, change: impl FnOnce(&mut BTreeMap<String, Vec<u8>>)) {
        change(&mut self.inner().files);
    }

    /// Bytes of large files sent since the last time.
    pub(crate) fn sent(&self) -> u64 {
        std::mem::take(&mut self.inner().sent)
    }

    /// Paths asked for since the last time, with whether a token came along.
    pub(crate) fn requests(&self) -> Vec<(String, bool)> {
        std::mem::take(&mut self.inner().requests)
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.shared.lock().expect("no panic")
    }
}

impl Drop for FakeHub {
    fn drop(&mut self) {
        let _ = self.stop.take().map(|stop| stop.send(()));
        let _ = self.thread.take().map(std::thread::JoinHandle::join);
    }
}

async fn listen() -> (tokio::net::TcpListener, SocketAddr) {
    let listener = tokio::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await;
    let listener = listener.expect("a free port");
    let address = listener.local_addr().expect("an address");
    (listener, address)
}

fn collect(folder: &Path, above: &str, files: &mut BTreeMap<String, Vec<u8>>) {
    for entry in std::fs::read_dir(folder).expect("a folder of the fixtures") {
        let path = entry.expect("an entry").path();
        let name = format!("{above}{}", path.file_name().expect("a name").to_string_lossy());
        if path.is_dir() {
            collect(&path, &format!("{name}/"), files);
        } else {
            files.insert(name, std::fs::read(&path).expect("a file"));
        }
    }
}

fn sha256(content: &[u8]) -> String {
    Sha256::digest(content).iter().map(|byte| format!("{byte:02x}")).collect()
}

fn is_large(name: &str) -> bool {
    name.ends_with(".safetensors") || name.ends_with(".bin")
}

fn etag(name: &str, content: &[u8]) -> String {
    let goldens = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/goldens/models/sd1");
    let is_golden = || std::fs::read(goldens.join(name)).is_ok_and(|golden| golden == content);
    // A file that was changed has no git id here.
    let known = GIT_BLOBS.iter().find(|(file, _)| *file == name).filter(|_| is_golden());
    known.map_or_else(|| sha256(content), |(_, hash)| (*hash).to_owned())
}

type Reply = Response<Body>;

fn refuse(status: u16, code: &str) -> Reply {
    let status = StatusCode::from_u16(status).expect("a status");
    let builder = Response::builder().status(status).header("X-Error-Code", code);
    builder.body(Body::from("refused")).expect("a response")
}

/// The first byte that is asked for, and the one after the last.
fn range(request: &Request, length: usize, no_ranges: bool) -> Option<(usize, usize)> {
    let value = request.headers().get("range").filter(|_| !no_ranges)?.to_str().ok()?;
    let (first, last) = value.strip_prefix("bytes=")?.split_once('-')?;
    let last = if last.is_empty() { length } else { last.parse::<usize>().ok()? + 1 };
    Some((first.parse().ok()?, last.min(length)))
}

async fn on_hub(State(shared): State<Shared>, request: Request) -> Reply {
    let mut inner = shared.lock().expect("no panic");
    let path = request.uri().path().to_owned();
    let sent = request.headers().get("authorization").map(|value| value.as_bytes().to_vec());
    inner.requests.push((path.clone(), sent.is_some()));
    if inner.manners.busy > 0 {
        inner.manners.busy -= 1;
        return refuse(503, "");
    }
    if let Some(token) = &inner.manners.token
        && sent.as_deref() != Some(format!("Bearer {token}").as_bytes())
    {
        return refuse(401, "RepoNotFound");
    }
    let api = format!("/api/models/{REPO}/");
    if let Some(rest) = path.strip_prefix(&api) {
        return on_api(&inner, rest);
    }
    let commit = inner.manners.sha.unwrap_or(COMMIT);
    let resolve = format!("/{REPO}/resolve/{commit}/");
    let cached = format!("/api/resolve-cache/models/{REPO}/{COMMIT}/");
    let (name, hopped) = match (path.strip_prefix(&resolve), path.strip_prefix(&cached)) {
        (Some(name), _) => (name.to_owned(), false),
        (_, Some(name)) => (name.to_owned(), true),
        _ => return refuse(if sent.is_some() { 404 } else { 401 }, "RepoNotFound"),
    };
    if let Some((status, code)) = inner.manners.refuse {
        return refuse(status, code);
    }
    on_file(&inner, &request, &name, hopped)
}

fn on_api(inner: &Inner, rest: &str) -> Reply {
    let body = match rest {
        "refs" => json!({"branches": [{"name": "main"}], "tags": [{"name": "v1"}]}),
        "revision/main" | "revision/v1" => {
            let siblings: Vec<_> =
                inner.files.keys().map(|name| json!({"rfilename": name})).collect();
            json!({"id": REPO, "sha": inner.manners.sha.unwrap_or(COMMIT), "siblings": siblings})
        }
        _ => return refuse(404, "RevisionNotFound"),
    };
    Response::builder().body(Body::from(body.to_string())).expect("a response")
}

fn on_file(inner: &Inner, request: &Request, name: &str, hopped: bool) -> Reply {
    let Some(content) = inner.files.get(name) else { return refuse(404, "EntryNotFound") };
    let builder = Response::builder().header("X-Repo-Commit", COMMIT);
    let etag = etag(name, content);
    if is_large(name) {
        let builder = builder
            .status(302)
            .header("Location", format!("{}/blob/{etag}?signed=1", inner.cdn))
            .header("X-Linked-Etag", format!("\"{etag}\""))
            .header("X-Linked-Size", content.len());
        return builder.body(Body::from("moved")).expect("a response");
    }
    // Small ones lie behind a path on the hub itself, as repositories with a new name do.
    if !hopped {
        let to = format!("/api/resolve-cache/models/{REPO}/{COMMIT}/{name}");
        return builder.status(307).header("Location", to).body(Body::empty()).expect("a response");
    }
    let builder = builder.header("ETag", format!("W/\"{etag}\""));
    let wrong = inner.manners.wrong == Some(name);
    let content = if wrong { b"wrong".repeat(200) } else { content.clone() };
    let body = |part: &[u8]| Body::from(part.to_vec());
    match range(request, content.len(), inner.manners.no_ranges) {
        Some((first, _)) if first >= content.len() => builder
            .status(416)
            .header("Content-Range", format!("bytes */{}", content.len()))
            .body(Body::empty()),
        Some((first, last)) => builder
            .status(206)
            .header("Content-Range", format!("bytes {first}-{}/{}", last - 1, content.len()))
            .body(body(&content[first..last])),
        None => builder.body(body(&content)),
    }
    .expect("a response")
}

async fn on_cdn(State(shared): State<Shared>, request: Request) -> Reply {
    let mut inner = shared.lock().expect("no panic");
    let path = request.uri().path().to_owned();
    inner.requests.push((path.clone(), request.headers().contains_key("authorization")));
    let hash = path.trim_start_matches("/blob/");
    let found = inner.files.iter().find(|(name, content)| etag(name, content) == hash);
    let Some((name, content)) = found else { return refuse(404, "") };
    let mut content = content.clone();
    if inner.manners.wrong == Some(name.as_str()) {
        let middle = content.len() / 2;
        content[middle] ^= 1;
    }
    let length = content.len();
    let (status, first, last) = match range(&request, length, inner.manners.no_ranges) {
        Some((first, _)) if first >= length => return refuse(416, ""),
        Some((first, last)) => (206, first, last),
        None => (200, 0, length),
    };
    let part = Bytes::from(content).slice(first..last);
    let limit = inner.manners.cut.or(inner.manners.stall);
    let short = limit.filter(|limit| *limit < part.len());
    let begun = short.map_or(part.clone(), |limit| part.slice(..limit));
    inner.sent += begun.len() as u64;
    let stalled = inner.stalled.clone().filter(|_| inner.manners.stall.is_some());
    let stalls = stalled.is_some();
    let body = stream::once(async move { Ok::<_, std::io::Error>(begun) });
    let body = match short {
        None => Body::from_stream(body),
        Some(_) if stalls => Body::from_stream(body.chain(stream::once(async move {
            // Whoever waited may be gone.
            let _ = stalled.map(|stalled| stalled.send(()));
            std::future::pending().await
        }))),
        Some(_) => Body::from_stream(body.chain(stream::once(async {
            // What was sent is on its way before the connection breaks.
            tokio::task::yield_now().await;
            Err(std::io::Error::other("cut"))
        }))),
    };
    let mut builder = Response::builder().status(status).header("Content-Length", part.len());
    if status == 206 {
        builder = builder.header("Content-Range", format!("bytes {first}-{}/{length}", last - 1));
    }
    builder.body(body).expect("a response")
}
