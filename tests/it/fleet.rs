//! Several workers on one data folder: who works is listed, and one goes on where another was killed. And several with
//! folders of their own: a job stays with the worker that began it, and is made anew when that one is gone.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

use std::fs::{self, File};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::cli::Machine;
use crate::support::server;

/// Far more than anything takes; a test that hangs ends all the same.
const PATIENCE: Duration = Duration::from_secs(600);

/// Workers of one queue, killed with the test.
struct Fleet {
    machine: Machine,
    server: &'static str,
    queue: String,
    workers: Vec<(Child, PathBuf)>,
}

impl Fleet {
    /// Workers on one store.
    fn new(count: usize) -> Self {
        Self::with(count, &|_, _| {})
    }

    /// Workers with stores of their own.
    fn apart(count: usize, heartbeat: &str) -> Self {
        Self::with(count, &|command, index| {
            let data = command.get_envs().find(|(name, _)| *name == "GENVIDEO_DATA_DIR");
            let data =
                PathBuf::from(data.unwrap().1.unwrap()).with_file_name(format!("data-{index}"));
            command.env("GENVIDEO_DATA_DIR", data).env("GENVIDEO_SHARED_STORE", "0");
            command.env("GENVIDEO_HEARTBEAT_TIMEOUT", heartbeat);
        })
    }

    fn with(count: usize, change: &dyn Fn(&mut Command, usize)) -> Self {
        let queue = format!("fleet-{}", genvideo::client::fresh_id());
        let server: &'static str = server::address().leak();
        let mut fleet = Self { machine: Machine::new(), server, queue, workers: Vec::new() };
        for index in 0..count {
            let path = fleet.machine.path(&format!("worker-{index}.log"));
            let mut command = fleet.machine.command(&fleet.with_server(&["worker", "--watched"]));
            command
                .env("GENVIDEO_HEARTBEAT_TIMEOUT", "3s")
                .env("GENVIDEO_CHECKPOINT_INTERVAL", "0s")
                .stdout(Stdio::null())
                .stderr(File::create(&path).unwrap());
            change(&mut command, index);
            fleet.workers.push((command.spawn().unwrap(), path));
        }
        fleet
    }

    fn with_server<'a>(&'a self, arguments: &[&'a str]) -> Vec<&'a str> {
        [arguments, &["--temporal-address", self.server, "--task-queue", &self.queue]].concat()
    }

    fn list(&self) -> Vec<Value> {
        self.machine.objects(&self.with_server(&["workers"]))
    }

    /// Submits a video of several parts, under the queue's own name.
    fn submit_video(&self) {
        let flags = ["--job", "video", "--size", "64x64", "--duration", "7", "--fps", "8"];
        let flags = [&["submit", "a red ball", "--id", &self.queue, "--seed", "7"], &flags[..]];
        self.machine.ok(&self.with_server(&flags.concat()));
    }

    /// The process that is at `activity`.
    fn at(&self, activity: &str) -> Option<u32> {
        let at_work = |worker: &Value| worker["stages"][0]["activity"] == activity;
        process_of(self.list().into_iter().find(at_work)?["identity"].as_str()?)
    }

    /// Kills a worker for good.
    fn kill(&mut self, process: u32) {
        let index = self.workers.iter().position(|(worker, _)| worker.id() == process).unwrap();
        let (mut dead, _) = self.workers.swap_remove(index);
        dead.kill().unwrap();
        dead.wait().unwrap();
    }

    /// Which process ended each stage, in order.
    fn stages(&self) -> Vec<(String, u32)> {
        let history = self.machine.ok(&self.with_server(&["history", &self.queue]));
        let history: Value = serde_json::from_str(&history).unwrap();
        let events = history["events"].as_array().unwrap();
        let event = |id: &Value| events.iter().find(|event| event["event_id"] == *id).unwrap();
        let completed = events
            .iter()
            .map(|event| &event["attributes"]["ActivityTaskCompletedEventAttributes"])
            .filter(|completed| completed.is_object());
        completed
            .map(|completed| {
                let scheduled = &event(&completed["scheduled_event_id"])["attributes"];
                let kind = &scheduled["ActivityTaskScheduledEventAttributes"]["activity_type"];
                let identity = completed["identity"].as_str().unwrap();
                (kind["name"].as_str().unwrap().to_owned(), process_of(identity).unwrap())
            })
            .collect()
    }

    /// Asks until `wanted` finds something.
    fn wait<T>(&mut self, what: &str, wanted: impl Fn(&Self) -> Option<T>) -> T {
        let start = Instant::now();
        loop {
            if let Some(found) = wanted(self) {
                return found;
            }
            for (worker, log) in &mut self.workers {
                let ended = worker.try_wait().unwrap();
                let said = || fs::read_to_string(&*log).unwrap();
                assert!(ended.is_none_or(|status| status.code().is_none()), "{}", said());
            }
            assert!(start.elapsed() < PATIENCE, "{what} did not come: {:?}", self.list());
        }
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        for (worker, _) in &mut self.workers {
            // It may have been killed already.
            let _ = worker.kill();
            let _ = worker.wait();
        }
    }
}

/// The process a worker's identity begins with.
fn process_of(identity: &str) -> Option<u32> {
    identity.split('@').next()?.parse().ok()
}

#[test]
fn a_job_stays_with_the_worker_that_has_its_files() {
    let mut fleet = Fleet::apart(2, "60s");
    let queues = |fleet: &Fleet| -> Vec<usize> {
        fleet.list().iter().map(|worker| worker["queues"].as_array().unwrap().len()).collect()
    };
    fleet.wait("both workers", |fleet| (queues(fleet) == [6, 6]).then_some(()));
    fleet.submit_video();
    fleet.machine.ok(&fleet.with_server(&["watch", &fleet.queue]));
    let stages = fleet.stages();
    let home = stages.iter().find(|(name, _)| name == "gen_image").unwrap().1;
    assert!(stages.iter().filter(|(name, _)| name == "gen_video").count() >= 2, "{stages:?}");
    for (name, process) in &stages {
        assert!(*process == home || name == "validate_request", "{name}: {stages:?}");
    }
    assert!(stages.iter().all(|(name, _)| name != "answer"), "nobody was asked for: {stages:?}");
}

#[test]
fn a_job_whose_worker_is_gone_for_good_is_made_by_another() {
    let mut fleet = Fleet::apart(2, "3s");
    fleet.wait("both workers", |fleet| (fleet.list().len() == 2).then_some(()));
    fleet.submit_video();
    let first = fleet.wait("a worker at the video", |fleet| fleet.at("gen_video"));
    fleet.kill(first);
    fleet.machine.ok(&fleet.with_server(&["watch", &fleet.queue]));
    let second = fleet.workers[0].0.id();
    let images: Vec<u32> = fleet
        .stages()
        .into_iter()
        .filter_map(|(name, process)| (name == "gen_image").then_some(process))
        .collect();
    assert_eq!(images, [first, second]);
    let (last, process) = fleet.stages().pop().unwrap();
    assert_eq!((last.as_str(), process), ("publish", second));
}

#[test]
fn a_worker_goes_on_where_a_killed_one_was() {
    let mut fleet = Fleet::new(2);
    fleet.wait("both workers", |fleet| (fleet.list().len() == 2).then_some(()));
    for worker in fleet.list() {
        let identity = worker["identity"].as_str().unwrap();
        assert!(identity.contains("cpu f32"), "{identity}");
        assert_eq!(
            (&worker["alive"], &worker["stages"]),
            (&true.into(), &Value::Array(Vec::new()))
        );
    }
    let flags = [
        "--job",
        "image",
        "--size",
        "64x64",
        "--steps",
        "150",
        "--seed",
        "7",
        "--id",
        &fleet.queue,
    ];
    let submit = fleet.with_server(&[&["submit", "a red ball"], &flags[..]].concat());
    fleet.machine.ok(&submit);

    let process = fleet.wait("a worker at the image", |fleet| {
        let steps = fleet.machine.objects(&fleet.with_server(&["status", &fleet.queue]));
        let detail = &steps[0]["detail"];
        let denoises = detail["stage"] == "denoise" && detail["done"].as_u64() > Some(2);
        fleet.at("gen_image").filter(|_| denoises)
    });
    fleet.kill(process);

    let watch = fleet.with_server(&["watch", &fleet.queue, "--out", "made"]);
    let stdout = fleet.machine.ok(&watch);
    let log = fs::read_to_string(&fleet.workers[0].1).unwrap();
    assert!(log.contains("going on from a checkpoint"), "{log}");
    let receipt = stdout.lines().last().unwrap();
    let told = fleet.machine.ok(&["verify", receipt]);
    assert!(told.starts_with("equal: 150 steps, 1 decoded chunks"), "{told}");
}
