//! Several workers on one data folder: who works is listed, and one goes on where another was killed. Several with
//! folders of their own: a job stays with the worker that began it, and is made anew when that one is gone. And several
//! of different size: a job ends up with one that has room for it.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

use std::fs::{self, File};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::cli::{self, Machine};
use crate::support::{self, server};

/// Far more than anything takes; a test that hangs ends all the same.
const PATIENCE: Duration = Duration::from_secs(600);

/// Of several parts.
const VIDEO: [&str; 6] = ["--job", "video", "--duration", "7", "--fps", "8"];
const IMAGE: [&str; 2] = ["--job", "image"];

/// Workers of one queue, killed with the test.
struct Fleet {
    machine: Machine,
    server: &'static str,
    queue: String,
    workers: Vec<(Child, PathBuf)>,
}

impl Fleet {
    /// Workers on one store.
    fn new(count: usize, settings: &[(String, String)]) -> Self {
        Self::with(count, settings, &|_, _| {})
    }

    /// Workers with stores of their own.
    fn apart(count: usize, heartbeat: &str) -> Self {
        Self::with(count, &[], &|command, index| {
            own_store(command, index);
            command.env("GENVIDEO_HEARTBEAT_TIMEOUT", heartbeat);
        })
    }

    /// Workers with stores of their own, of which the first that comes to a place stays there: see [`hold`].
    fn held(count: usize, point: &str, skip: u32) -> Self {
        let fleet = Self::with(count, &[], &|command, index| {
            own_store(command, index);
            hold(command, point, skip);
        });
        fleet.all_there()
    }

    /// Workers that may take so much memory, on one store.
    fn sized(limits: &[&str]) -> Self {
        let fleet = Self::with(limits.len(), &[], &|command, index| {
            command.env("GENVIDEO_MEMORY_LIMIT", limits[index]);
        });
        fleet.all_there()
    }

    /// Goes on when every worker has asked for work of every kind.
    fn all_there(mut self) -> Self {
        self.wait("every worker", |fleet| {
            let is_there = |worker: &Value| {
                let own =
                    if worker["identity"].as_str().unwrap().contains("store ") { 3 } else { 0 };
                worker["queues"].as_array().unwrap().len() == 4 + own
            };
            let workers = fleet.list();
            (workers.len() == fleet.workers.len() && workers.iter().all(is_there)).then_some(())
        });
        self
    }

    fn with(
        count: usize,
        settings: &[(String, String)],
        change: &dyn Fn(&mut Command, usize),
    ) -> Self {
        let queue = format!("fleet-{}", genvideo::client::fresh_id());
        let server: &'static str = server::address().leak();
        let mut machine = Machine::new();
        machine.settings = settings.to_vec();
        let mut fleet = Self { machine, server, queue, workers: Vec::new() };
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

    /// Submits a job of this machine's data folder, or of a worker's own.
    fn submit(&self, id: &str, data: &str, flags: &[&str]) {
        let flags =
            [&["submit", "a red ball", "--id", id, "--seed", "7", "--size", "64x64"], flags];
        let mut command = self.machine.command(&self.with_server(&flags.concat()));
        command.env("GENVIDEO_DATA_DIR", self.machine.path(data));
        let answer = cli::finish(command);
        assert_eq!(answer.code, Some(0), "{flags:?}\n{}", answer.stderr);
    }

    /// Submits a video of several parts, under the queue's own name.
    fn submit_video(&self) {
        self.submit(&self.queue, "data", &VIDEO);
    }

    fn watch(&self, id: &str) {
        self.machine.ok(&self.with_server(&["watch", id]));
    }

    /// What is said of a job that fails for want of memory.
    fn refusal(&self, id: &str) -> String {
        let answer = self.machine.run(&self.with_server(&["watch", id]));
        assert_eq!(answer.code, Some(5), "{}\n{}", answer.stdout, answer.stderr);
        answer.stderr
    }

    /// A picture that jobs may start from.
    fn picture(&self) -> String {
        let path = self.machine.path("given.png");
        image::RgbImage::from_pixel(64, 64, image::Rgb([200, 30, 30])).save(&path).unwrap();
        path.into_os_string().into_string().unwrap()
    }

    /// Submits jobs of which anybody may take any stage, until one went the way that `wanted` tells by its stages; gives
    /// its id.
    fn until(&self, submit: impl Fn(&str), wanted: impl Fn(&[(String, u32)]) -> bool) -> String {
        for _ in 0..30 {
            let id = genvideo::client::fresh_id();
            submit(&id);
            self.watch(&id);
            if wanted(&self.stages(&id)) {
                return id;
            }
        }
        panic!("thirty jobs, and none went that way");
    }

    /// Submits an image, under the queue's own name; gives the process that is in the middle of it, and stays there
    /// until [`Self::go`] where the workers hold.
    fn begin_image(&mut self) -> u32 {
        let flags = ["--job", "image", "--size", "64x64", "--steps", "150", "--seed", "7"];
        let flags = [&["submit", "a red ball", "--id", &self.queue], &flags[..]];
        self.machine.ok(&self.with_server(&flags.concat()));
        self.wait("a worker at the image", |fleet| {
            let detail = &fleet.status()["detail"];
            let denoises = detail["stage"] == "denoise" && detail["done"].as_u64() > Some(2);
            fleet.at("gen_image").filter(|_| denoises && fleet.holds())
        })
    }

    /// Whether somebody holds by now.
    fn holds(&self) -> bool {
        !cfg!(feature = "failpoints") || self.machine.path("held").exists()
    }

    /// Lets go on whoever holds.
    fn go(&self) {
        File::create(self.machine.path("go")).unwrap();
    }

    fn status(&self) -> Value {
        self.machine.objects(&self.with_server(&["status", &self.queue])).swap_remove(0)
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

    /// Replays a job's history, and keeps it as `Lab::replay` does.
    fn replay(&self, id: &str, name: &str) {
        let history = self.machine.ok(&self.with_server(&["history", id]));
        let runtime = tokio::runtime::Runtime::new().unwrap();
        runtime.block_on(support::replay_and_keep(history.as_bytes(), name));
    }

    /// Which process ended each stage of a job, in order.
    fn stages(&self, id: &str) -> Vec<(String, u32)> {
        let history = self.machine.ok(&self.with_server(&["history", id]));
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

/// The first of the workers that comes to `point`, after so many visits, stays there until [`Fleet::go`] however fast it
/// is; in a build that knows no faults nobody does.
fn hold(command: &mut Command, point: &str, skip: u32) {
    if cfg!(feature = "failpoints") {
        let [go, held] = ["go", "held"].map(|name| beside_data(command, name));
        let fault = format!("{point}=hold:{},skip={skip},once={}", go.display(), held.display());
        command.env("GENVIDEO_FAILPOINTS", fault);
    }
}

/// A path of the machine that a command is for.
fn beside_data(command: &Command, name: &str) -> PathBuf {
    let data = command.get_envs().find(|(name, _)| *name == "GENVIDEO_DATA_DIR");
    PathBuf::from(data.unwrap().1.unwrap()).with_file_name(name)
}

fn own_store(command: &mut Command, index: usize) {
    let data = beside_data(command, &format!("data-{index}"));
    command.env("GENVIDEO_DATA_DIR", data).env("GENVIDEO_SHARED_STORE", "0");
}

/// The process a worker's identity begins with.
fn process_of(identity: &str) -> Option<u32> {
    identity.split('@').next()?.parse().ok()
}

#[test]
fn a_job_stays_with_the_worker_that_has_its_files() {
    let fleet = Fleet::apart(2, "60s").all_there();
    fleet.submit_video();
    fleet.watch(&fleet.queue);
    fleet.replay(&fleet.queue, "host");
    let stages = fleet.stages(&fleet.queue);
    let home = stages.iter().find(|(name, _)| name == "gen_image").unwrap().1;
    assert!(stages.iter().filter(|(name, _)| name == "gen_video").count() >= 2, "{stages:?}");
    for (name, process) in &stages {
        assert!(*process == home || name == "validate_request", "{name}: {stages:?}");
    }
    assert!(stages.iter().all(|(name, _)| name != "answer"), "nobody was asked for: {stages:?}");
}

#[test]
fn a_job_whose_worker_is_gone_for_good_is_made_by_another() {
    // With the model of the video, the second one that is loaded.
    let mut fleet = Fleet::held(2, "model_loaded", 1);
    fleet.submit_video();
    let first = fleet
        .wait("a worker at the video", |fleet| fleet.at("gen_video").filter(|_| fleet.holds()));
    fleet.kill(first);
    fleet.watch(&fleet.queue);
    fleet.replay(&fleet.queue, "host-gone");
    let second = fleet.workers[0].0.id();
    let stages = fleet.stages(&fleet.queue);
    let images: Vec<u32> = stages
        .iter()
        .filter_map(|(name, process)| (name == "gen_image").then_some(*process))
        .collect();
    assert_eq!(images, [first, second]);
    assert_eq!(stages.last().unwrap(), &("publish".to_owned(), second));
}

#[test]
fn a_worker_goes_on_where_a_killed_one_was() {
    goes_on(&[]);
}

/// Kills one of two workers at an image; the other one ends it.
pub(crate) fn goes_on(settings: &[(String, String)]) {
    let mut fleet = Fleet::with(2, settings, &|command, _| hold(command, "step_done", 3));
    fleet.wait("both workers", |fleet| (fleet.list().len() == 2).then_some(()));
    for worker in fleet.list() {
        let identity = worker["identity"].as_str().unwrap();
        assert!(identity.contains("cpu f32"), "{identity}");
        assert_eq!(
            (&worker["alive"], &worker["stages"]),
            (&true.into(), &Value::Array(Vec::new()))
        );
    }
    let process = fleet.begin_image();
    fleet.kill(process);

    let watch = fleet.with_server(&["watch", &fleet.queue, "--out", "made"]);
    let stdout = fleet.machine.ok(&watch);
    let log = fs::read_to_string(&fleet.workers[0].1).unwrap();
    assert!(log.contains("going on from a checkpoint"), "{log}");
    let receipt = stdout.lines().last().unwrap();
    let told = fleet.machine.ok(&["verify", receipt]);
    assert!(told.starts_with("equal: 150 steps, 1 decoded chunks"), "{told}");
}

#[test]
fn a_job_with_a_given_image_goes_to_the_host_that_has_it() {
    let fleet = Fleet::apart(2, "3s").all_there();
    let (picture, home) = (fleet.picture(), fleet.workers[0].0.id());
    let submit = |id: &str| {
        fleet.submit(id, "data-0", &[&IMAGE[..], &["--image", &picture]].concat());
    };
    let id = fleet.until(submit, |stages| {
        let made = stages.iter().filter(|(name, _)| name == "gen_image");
        assert!(made.map(|(_, process)| *process).eq([home]), "{stages:?}");
        stages.iter().any(|(name, _)| name == "find_workers")
    });
    fleet.replay(&id, "image-elsewhere");
}

#[test]
fn a_worker_takes_one_stage_for_its_device_however_many_queues_that_has() {
    let mut fleet = Fleet::held(2, "step_done", 3);
    let (busy, free) = (fleet.workers[0].0.id(), fleet.workers[1].0.id());
    // It has its image on one host, whose own queue it goes to.
    let redrawn = ["--image", &fleet.picture(), "--strength", "1", "--steps", "150"];
    fleet.submit(&fleet.queue, "data-0", &[&IMAGE[..], &redrawn[..]].concat());
    fleet.wait("the first job at work", |fleet| {
        let status = fleet.machine.objects(&fleet.with_server(&["status", &fleet.queue]));
        (status[0]["detail"]["stage"] == "denoise" && fleet.holds()).then_some(())
    });
    assert_eq!(fleet.at("gen_image"), Some(busy));
    for count in 0..3 {
        let id = format!("{}-{count}", fleet.queue);
        fleet.submit(&id, "data", &[&IMAGE[..], &["--steps", "1"]].concat());
        fleet.watch(&id);
        let made = fleet.stages(&id).into_iter().find(|(name, _)| name == "gen_image").unwrap();
        assert_eq!(made.1, free);
        assert_eq!(fleet.at("gen_image"), Some(busy));
    }
    fleet.go();
    fleet.watch(&fleet.queue);
}

#[test]
fn a_stage_that_waits_for_the_device_of_its_worker_says_so() {
    let mut fleet = Fleet::held(1, "step_done", 3);
    fleet.begin_image();
    let id = format!("{}-waits", fleet.queue);
    fleet.submit(&id, "data-0", &[&IMAGE[..], &["--image", &fleet.picture()]].concat());
    fleet.wait("a stage that waits", |fleet| {
        assert_eq!(fleet.status()["status"], "RUNNING");
        let status = fleet.machine.objects(&fleet.with_server(&["status", &id])).swap_remove(0);
        (status["message"] == "image: waiting for another stage to end").then_some(())
    });
    fleet.go();
    fleet.watch(&id);
    fleet.watch(&fleet.queue);
}

#[test]
fn a_job_goes_to_a_worker_with_room_for_it() {
    let fleet = Fleet::sized(&["300MiB", "none"]);
    let (small, large) = (fleet.workers[0].0.id(), fleet.workers[1].0.id());
    let listed = fleet.list();
    let listed = listed
        .iter()
        .find(|worker| process_of(worker["identity"].as_str().unwrap()) == Some(small))
        .unwrap();
    assert_eq!(listed["device"], "cpu f32");
    assert_eq!(listed["memory"], 256 << 20, "as much as its queue is named after");
    let id = fleet.until(
        |id| fleet.submit(id, "data", &VIDEO),
        |stages| {
            let by_large =
                |(name, process): &(String, u32)| *process == large || !name.starts_with("gen_");
            assert!(stages.iter().all(by_large), "{stages:?}");
            let asked = stages.iter().filter(|(name, _)| name == "find_workers").count();
            assert!(asked <= 1, "decided once: {stages:?}");
            asked == 1
        },
    );
    fleet.replay(&id, "room");
    // What needs no model runs anywhere.
    let picture = fleet.picture();
    fleet.until(
        |id| fleet.submit(id, "data", &[&IMAGE[..], &["--image", &picture]].concat()),
        |stages| stages.contains(&("gen_image".to_owned(), small)),
    );
}

/// The driver of one refuses memory for the video, which the estimate had allowed.
#[cfg(feature = "failpoints")]
#[test]
fn a_job_whose_host_has_too_little_memory_after_all_begins_anew_where_there_is_more() {
    let fleet = Fleet::with(2, &[], &|command, index| {
        own_store(command, index);
        if index == 0 {
            command.env("GENVIDEO_MEMORY_LIMIT", "1GiB");
            command.env("GENVIDEO_FAILPOINTS", "model_loaded=error:OUT_OF_MEMORY,skip=1");
        }
    });
    let fleet = fleet.all_there();
    let (small, large) = (fleet.workers[0].0.id(), fleet.workers[1].0.id());
    let id = fleet.until(
        |id| fleet.submit(id, "data", &VIDEO),
        |stages| {
            let made_by = |kind: &str| -> Vec<u32> {
                let made = stages.iter().filter(|(name, _)| name == kind);
                made.map(|(_, process)| *process).collect()
            };
            let images = made_by("gen_image");
            assert!(images == [large] || images == [small, large], "{stages:?}");
            assert!(made_by("gen_video").iter().all(|process| *process == large), "{stages:?}");
            images.len() == 2
        },
    );
    fleet.replay(&id, "room-moved");
}

#[test]
fn a_job_that_no_worker_has_room_for_is_refused() {
    let fleet = Fleet::sized(&["64MiB", "300MiB"]);
    fleet.submit(&fleet.queue, "data", &IMAGE);
    let text = fleet.refusal(&fleet.queue);
    for part in ["this run needs about 0.4 GiB", "the largest of 2 workers has 0.2 GiB"] {
        assert!(text.contains(part), "{text}");
    }
    assert!(!text.contains("waited"), "{text}");
    fleet.replay(&fleet.queue, "room-none");
}

#[test]
fn a_job_waits_for_a_worker_with_room_no_longer_than_it_seems_to_be_there() {
    let mut fleet = Fleet::sized(&["64MiB", "none"]);
    let large = fleet.workers[1].0.id();
    fleet.kill(large);
    fleet.submit(&fleet.queue, "data", &IMAGE);
    fleet.wait("a job that waits", |fleet| {
        let status = fleet.machine.objects(&fleet.with_server(&["status", &fleet.queue]));
        status[0]["message"].as_str()?.starts_with("waiting for a worker with").then_some(())
    });
    let text = fleet.refusal(&fleet.queue);
    assert!(text.contains(" s for a larger one"), "{text}");
    fleet.replay(&fleet.queue, "room-gone");
}

/// The store is away from the middle of an image until more attempts have failed than errors of its own end a stage.
#[cfg(feature = "s3")]
pub(crate) fn outlives_an_outage(
    settings: &[(String, String)],
    begin: impl FnOnce(),
    end: impl FnOnce(),
) {
    let mut fleet = Fleet::with(1, settings, &|command, _| hold(command, "step_done", 3));
    fleet.wait("the worker", |fleet| (fleet.list().len() == 1).then_some(()));
    fleet.begin_image();
    begin();
    fleet.go();
    fleet.wait("the fifth attempt", |fleet| {
        let status = fleet.status();
        assert_ne!(status["status"], "FAILED", "{status}");
        (status["attempt"].as_u64() > Some(4)).then_some(())
    });
    end();
    let stdout = fleet.machine.ok(&fleet.with_server(&["watch", &fleet.queue, "--out", "made"]));
    let log = fs::read_to_string(&fleet.workers[0].1).unwrap();
    assert!(log.contains("going on from a checkpoint"), "{log}");
    assert!(stdout.lines().last().unwrap().ends_with(".json"), "{stdout}");
}

/// A worker that starts while its store is down works as soon as that is up again.
#[cfg(feature = "s3")]
pub(crate) fn starts_in_an_outage(settings: &[(String, String)], end: impl FnOnce()) {
    let mut fleet = Fleet::new(1, settings);
    let log = |fleet: &Fleet| fs::read_to_string(&fleet.workers[0].1).unwrap();
    let waits = |fleet: &Fleet| log(fleet).contains("waiting for the server of the store");
    fleet.wait("the outage", |fleet| waits(fleet).then_some(()));
    end();
    fleet.wait("the worker", |fleet| (fleet.list().len() == 1).then_some(()));
}
