//! Where faults are tried: a server that can be killed, workers that are processes, one store a trial, and the
//! invariants that hold whatever happened.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use genvideo::client::{Jobs, Outcome, Submit, Target};
use genvideo::job::result::JobResult;
use genvideo::store::{self, JobKey};
use serde_json::{Value, json};

use crate::cli::Machine;
use crate::support::{job, server, within};

/// Silence after which the server gives an activity to somebody else, in every trial: the default.
pub(crate) const HEARTBEAT: Duration = Duration::from_secs(10);
/// Longest from a death to the next attempt.
pub(crate) const NEXT_WITHIN: Duration = Duration::from_secs(12);
/// Most work that a death may cost, in every trial.
pub(crate) const CHECKPOINT: Duration = Duration::from_millis(100);

/// A dev server with its database in a file.
pub(crate) struct Server {
    child: Mutex<Option<Child>>,
    folder: PathBuf,
    port: u16,
}

impl Server {
    fn start(folder: &Path) -> Self {
        fs::create_dir_all(folder).unwrap();
        let server =
            Self { child: Mutex::new(None), folder: folder.into(), port: server::free_port() };
        server.begin();
        server
    }

    /// Starts it on the database it had.
    pub(crate) fn begin(&self) {
        let mut child = server::spawn(&server::program(), &self.folder, self.port);
        assert!(server::is_up(&mut child, self.port), "the server starts on its port");
        *self.child.lock().unwrap() = Some(child);
    }

    /// Kills it as a power cut would.
    pub(crate) fn kill(&self) {
        let mut child = self.child.lock().unwrap().take().expect("it runs");
        child.kill().unwrap();
        child.wait().unwrap();
    }

    pub(crate) fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.lock().unwrap().take() {
            child.kill().ok();
            child.wait().ok();
        }
    }
}

/// What an undisturbed job ends in, and how often it comes to each point.
#[derive(Clone, Debug, Default)]
pub(crate) struct Quiet {
    pub(crate) files: Vec<String>,
    pub(crate) visits: BTreeMap<String, u32>,
    pub(crate) took: Duration,
}

/// A machine and a server for many trials.
pub(crate) struct Field {
    pub(crate) server: Server,
    pub(crate) jobs: Jobs,
    machine: Machine,
    trials: AtomicU32,
}

impl Field {
    pub(crate) async fn open() -> Self {
        let machine = Machine::new();
        let server = Server::start(&machine.path("server"));
        let target = Target { address: server.address(), namespace: "default".to_owned() };
        let jobs = Jobs::connect_patiently(&target, Some(Duration::from_secs(60))).await.unwrap();
        Self { server, jobs, machine, trials: AtomicU32::new(0) }
    }

    /// A trial with a store and a queue of its own.
    pub(crate) fn trial(&self, name: &str) -> Trial<'_> {
        let number = self.trials.fetch_add(1, Ordering::Relaxed);
        let folder = self.machine.path(&format!("{number}-{name}"));
        fs::create_dir_all(&folder).unwrap();
        Trial { field: self, queue: format!("chaos-{number}"), folder, workers: Vec::new() }
    }

    /// Runs the job undisturbed.
    pub(crate) async fn quiet(&self, input: &Value) -> Quiet {
        let mut trial = self.trial("quiet");
        trial.work("");
        let id = trial.submit(input).await;
        let start = Instant::now();
        let result = trial.result(&id).await.expect("an undisturbed job succeeds");
        let took = start.elapsed();
        let mut visits = BTreeMap::new();
        for visit in trial.trace() {
            *visits.entry(visit.point).or_default() += 1;
        }
        assert_eq!(trial.leaked(&[(id, result.clone())]), Vec::<String>::new());
        Quiet { files: files_of(&result), visits, took }
    }
}

/// A video of a few seconds of work; `image` for one picture.
pub(crate) fn small(kind: &str) -> Value {
    match kind {
        "image" => job("IMAGE", json!({"steps": 1})),
        _ => job("VIDEO", json!({"duration": 0.5, "fps": 8.0, "steps": 6, "sampler": "euler_a"})),
    }
}

/// Hashes of what a job made, without its receipt, which holds times.
pub(crate) fn files_of(result: &JobResult) -> Vec<String> {
    let assets = [&result.assets.image, &result.assets.video, &result.assets.poster];
    assets.into_iter().flatten().map(|asset| asset.sha256.clone()).collect()
}

/// One visit of a point, as a worker wrote it down.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Visit {
    pub(crate) at: u64,
    pub(crate) process: u32,
    pub(crate) point: String,
}

/// One store and its workers.
pub(crate) struct Trial<'a> {
    pub(crate) field: &'a Field,
    pub(crate) folder: PathBuf,
    pub(crate) queue: String,
    pub(crate) workers: Vec<Worker>,
}

impl Trial<'_> {
    /// The file that says that a fault happened; it holds the process it happened to.
    pub(crate) fn mark(&self) -> PathBuf {
        self.folder.join("mark")
    }

    /// Starts a worker with `faults`, on this field's server.
    pub(crate) fn work(&mut self, faults: &str) -> &Worker {
        self.work_at(&self.field.server.address(), faults)
    }

    /// Starts a worker that reaches the server at `address`.
    pub(crate) fn work_at(&mut self, address: &str, faults: &str) -> &Worker {
        let number = self.workers.len();
        let log = self.folder.join(format!("worker-{number}.log"));
        let faults = format!("{faults};trace={}", self.folder.join("trace").display());
        let arguments =
            ["worker", "--temporal-address", address, "--task-queue", &self.queue, "--log", "info"];
        let mut command = self.field.machine.command(&arguments);
        command
            .env("GENVIDEO_DATA_DIR", &self.folder)
            .env("GENVIDEO_HEARTBEAT_TIMEOUT", format!("{}s", HEARTBEAT.as_secs()))
            .env("GENVIDEO_CHECKPOINT_INTERVAL", format!("{}ms", CHECKPOINT.as_millis()))
            .env("GENVIDEO_THREADS", "1")
            .env("GENVIDEO_FAILPOINTS", faults);
        self.workers.push(Worker::start(command, &log));
        &self.workers[number]
    }

    pub(crate) async fn submit(&self, input: &Value) -> String {
        let input = serde_json::to_vec(input).unwrap();
        let id = genvideo::client::fresh_id();
        let submit = Submit { id: Some(id), input, queue: self.queue.clone() };
        within("a submission", self.field.jobs.submit(submit)).await.unwrap().id
    }

    /// Waits for the end of the job, through whatever the server goes through.
    pub(crate) async fn outcome(&self, id: &str) -> Outcome {
        let watch = async {
            loop {
                match self.field.jobs.watch(id, &mut |_| {}).await {
                    Ok(outcome) => return outcome,
                    Err(error) => {
                        eprintln!("{id}: {error}; asking again");
                        tick(Duration::from_millis(200)).await;
                    }
                }
            }
        };
        match tokio::time::timeout(Duration::from_secs(400), watch).await {
            Ok(outcome) => outcome,
            Err(_) => panic!("job `{id}` does not end; {}", self.logs()),
        }
    }

    pub(crate) async fn result(&self, id: &str) -> Result<JobResult, Outcome> {
        match self.outcome(id).await {
            Outcome::Completed(result) => Ok(*result),
            other => Err(other),
        }
    }

    /// Waits until the fault has happened; gives the process it happened to. `None` when the job ended without it.
    pub(crate) async fn marked(&self, id: &str) -> Option<u32> {
        let look = async {
            loop {
                if let Ok(text) = fs::read_to_string(self.mark())
                    && let Ok(process) = text.trim().parse()
                {
                    return process;
                }
                tick(Duration::from_millis(10)).await;
            }
        };
        tokio::select! {
            process = look => Some(process),
            _ = self.outcome(id) => None,
        }
    }

    /// Every visit so far, in order of time.
    pub(crate) fn trace(&self) -> Vec<Visit> {
        let text = fs::read_to_string(self.folder.join("trace")).unwrap_or_default();
        let mut visits: Vec<Visit> = text
            .lines()
            .filter_map(|line| {
                let mut words = line.split(' ');
                let (at, process) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
                Some(Visit { at, process, point: words.next()?.to_owned() })
            })
            .collect();
        visits.sort_by_key(|visit| visit.at);
        visits
    }

    /// Files in the store that none of the finished jobs should have left; a result's own file that is missing or
    /// broken fails at once.
    pub(crate) fn leaked(&self, results: &[(String, JobResult)]) -> Vec<String> {
        let root = self.folder.join("store");
        let mut wanted = BTreeSet::from(["lock".to_owned()]);
        for (id, result) in results {
            let key = JobKey::of_workflow(id);
            wanted.insert(format!("jobs/{key}/manifest.json"));
            let manifest = fs::read(root.join(format!("jobs/{key}/manifest.json"))).unwrap();
            let manifest: JobResult = serde_json::from_slice(&manifest).unwrap();
            assert_eq!(files_of(&manifest), files_of(result), "the manifest is the result");
            let receipt = manifest.assets.receipt.map(|asset| asset.sha256);
            for sha256 in files_of(result).into_iter().chain(receipt) {
                let content = fs::read(root.join("blobs").join(&sha256)).unwrap();
                assert_eq!(store::sha256(&content), sha256, "a blob is what its name says");
                wanted.insert(format!("claims/{key}/{sha256}"));
                wanted.insert(format!("blobs/{sha256}"));
            }
        }
        files(&root).into_iter().filter(|file| !wanted.contains(file)).collect()
    }

    /// The ends of the workers' logs, for a failure.
    pub(crate) fn logs(&self) -> String {
        let mut text = format!("{}\n", self.folder.display());
        for number in 0..self.workers.len() {
            let log = self.folder.join(format!("worker-{number}.log"));
            let log = fs::read_to_string(log).unwrap_or_default();
            let lines: Vec<&str> = log.lines().collect();
            let end = &lines[lines.len().saturating_sub(30)..];
            text.push_str(&format!("--- worker {number}\n{}\n", end.join("\n")));
        }
        text
    }
}

/// Every file under `root`, by its path there.
fn files(root: &Path) -> Vec<String> {
    let mut found = Vec::new();
    let mut folders = vec![root.to_owned()];
    while let Some(folder) = folders.pop() {
        let Ok(entries) = fs::read_dir(&folder) else { continue };
        for path in entries.flatten().map(|entry| entry.path()) {
            if path.is_dir() {
                folders.push(path);
            } else {
                found.push(path.strip_prefix(root).unwrap().display().to_string());
            }
        }
    }
    found.sort();
    found
}

/// A worker process that is started anew when it dies, as by an init system.
pub(crate) struct Worker {
    shared: Arc<Mutex<Shared>>,
    tender: Option<std::thread::JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    process: Option<u32>,
    stopping: bool,
    ended: Option<Instant>,
}

impl Worker {
    fn start(mut command: Command, log: &Path) -> Self {
        let log = File::options().create(true).append(true).open(log).unwrap();
        // SAFETY: between fork and exec only `prctl` is called, which is safe to call from a signal handler.
        unsafe {
            command.pre_exec(|| {
                #[cfg(target_os = "linux")]
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                Ok(())
            });
        }
        command.stdout(Stdio::null()).stderr(log);
        let shared = Arc::new(Mutex::new(Shared::default()));
        let theirs = Arc::clone(&shared);
        let (started, is_started) = std::sync::mpsc::channel();
        let tender = std::thread::spawn(move || {
            loop {
                let mut child = command.spawn().unwrap();
                theirs.lock().unwrap().process = Some(child.id());
                // Only the first start is waited for.
                started.send(()).ok();
                child.wait().unwrap();
                let mut shared = theirs.lock().unwrap();
                shared.process = None;
                shared.ended = Some(Instant::now());
                if shared.stopping {
                    return;
                }
            }
        });
        is_started.recv().unwrap();
        Self { shared, tender: Some(tender) }
    }

    /// The process that was started, which may have one of its own.
    pub(crate) fn process(&self) -> Option<u32> {
        self.shared.lock().unwrap().process
    }

    /// Sends a signal to the process; it is not started again when it ends of it and `last` is set.
    pub(crate) fn signal(&self, number: libc::c_int, last: bool) {
        let mut shared = self.shared.lock().unwrap();
        shared.stopping |= last;
        if let Some(process) = shared.process {
            signal(process, number);
        }
    }

    /// Whether it has ended for good, and when.
    pub(crate) fn ended(&self) -> Option<Instant> {
        let shared = self.shared.lock().unwrap();
        shared.ended.filter(|_| shared.process.is_none() && shared.stopping)
    }

    /// Asks it to end and waits for that.
    pub(crate) async fn stop(&self) -> Duration {
        let start = Instant::now();
        self.signal(libc::SIGTERM, true);
        within("a worker's end", async {
            while self.ended().is_none() {
                tick(Duration::from_millis(5)).await;
            }
        })
        .await;
        start.elapsed()
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.signal(libc::SIGCONT, true);
        self.signal(libc::SIGKILL, true);
        self.tender.take().map(std::thread::JoinHandle::join);
    }
}

pub(crate) fn signal(process: u32, number: libc::c_int) {
    let process = i32::try_from(process).unwrap();
    // SAFETY: kill only takes two integers; the process is one that a test started.
    unsafe { libc::kill(process, number) };
}

/// A pause between two looks.
pub(crate) async fn tick(time: Duration) {
    let period = time.max(Duration::from_millis(1));
    let mut timer = tokio::time::interval_at(tokio::time::Instant::now() + time, period);
    timer.tick().await;
}
