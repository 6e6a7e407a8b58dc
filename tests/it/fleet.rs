//! Several workers on one data folder: who works is listed, and one goes on where another was killed.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

use std::fs::{self, File};
use std::path::PathBuf;
use std::process::{Child, Stdio};
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
    fn new(count: usize) -> Self {
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
        let at_work = |worker: &Value| worker["stages"][0]["activity"] == "gen_image";
        let identity = fleet.list().into_iter().find(at_work)?["identity"].as_str()?.to_owned();
        denoises.then(|| identity.split('@').next().unwrap().parse::<u32>().unwrap())
    });
    let killed = fleet.workers.iter_mut().position(|(worker, _)| worker.id() == process).unwrap();
    let (mut dead, _) = fleet.workers.swap_remove(killed);
    dead.kill().unwrap();
    dead.wait().unwrap();

    let watch = fleet.with_server(&["watch", &fleet.queue, "--out", "made"]);
    let stdout = fleet.machine.ok(&watch);
    let log = fs::read_to_string(&fleet.workers[0].1).unwrap();
    assert!(log.contains("going on from a checkpoint"), "{log}");
    let receipt = stdout.lines().last().unwrap();
    let told = fleet.machine.ok(&["verify", receipt]);
    assert!(told.starts_with("equal: 150 steps, 1 decoded chunks"), "{told}");
}
