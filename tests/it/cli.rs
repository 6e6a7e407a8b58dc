//! The command line through its binary: help, messages, exit codes, `--json`, and whole jobs on a real server.
#![expect(clippy::unwrap_used, reason = "a panic is how a test fails, in its helpers too")]

use std::io::{BufRead, BufReader, Read};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::support::server::program;

/// Far more than anything takes; a test that hangs ends all the same.
const PATIENCE: Duration = Duration::from_secs(600);

/// A machine of its own: home, data, cache and working folder.
pub(crate) struct Machine {
    root: TempDir,
    /// Variables of its environment, beside those that every machine has.
    pub(crate) settings: Vec<(String, String)>,
}

/// What a command left.
pub(crate) struct Answer {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Machine {
    pub(crate) fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        for folder in ["home", "work"] {
            std::fs::create_dir(root.path().join(folder)).unwrap();
        }
        Self { root, settings: Vec::new() }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_genvideo"));
        command.args(arguments).current_dir(self.path("work")).stdin(Stdio::null());
        for (name, _) in std::env::vars() {
            if name.starts_with("GENVIDEO_")
                || name.starts_with("TEMPORAL_")
                || name.starts_with("XDG_")
                || name.starts_with("HF_")
                || name.to_lowercase().ends_with("_proxy")
            {
                command.env_remove(name);
            }
        }
        for name in ["RUST_LOG", "TRANSFORMERS_OFFLINE", "COLUMNS", "CLICOLOR_FORCE"] {
            command.env_remove(name);
        }
        command.env("HOME", self.path("home")).env("USER", "tester").env("TZ", "UTC");
        command
            .env("GENVIDEO_DATA_DIR", self.path("data"))
            .env("GENVIDEO_CACHE_DIR", self.path("cache"));
        command.env("GENVIDEO_TEMPORAL_CLI", program());
        command.envs(self.settings.clone());
        command
    }

    pub(crate) fn run(&self, arguments: &[&str]) -> Answer {
        finish(self.command(arguments))
    }

    pub(crate) fn ok(&self, arguments: &[&str]) -> String {
        let answer = self.run(arguments);
        assert_eq!(answer.code, Some(0), "{arguments:?}\n{}\n{}", answer.stdout, answer.stderr);
        answer.stdout
    }

    /// The objects a command prints with `--json`.
    pub(crate) fn objects(&self, arguments: &[&str]) -> Vec<Value> {
        let stdout = self.ok(&[arguments, &["--json"]].concat());
        stdout.lines().map(|line| serde_json::from_str(line).expect(line)).collect()
    }

    fn files(&self, folder: &str) -> Vec<String> {
        let Ok(entries) = std::fs::read_dir(self.path(folder)) else { return Vec::new() };
        let mut names: Vec<String> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    /// Everything but what belongs to the machine itself, put into one text.
    fn shown(&self, answer: &Answer) -> String {
        let code = answer.code.map_or("killed".to_owned(), |code| code.to_string());
        let text =
            format!("exit: {code}\n--- stdout\n{}--- stderr\n{}", answer.stdout, answer.stderr);
        text.replace(self.root.path().to_str().unwrap(), "[ROOT]")
    }
}

pub(crate) fn finish(mut command: Command) -> Answer {
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let (stdout, stderr) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
    let stdout = std::thread::spawn(move || read(stdout));
    let stderr = std::thread::spawn(move || read(stderr));
    let status = wait(child);
    Answer { code: status.code(), stdout: stdout.join().unwrap(), stderr: stderr.join().unwrap() }
}

fn read(mut pipe: impl Read) -> String {
    let mut text = String::new();
    pipe.read_to_string(&mut text).unwrap();
    text
}

/// Waits for the child, but not for ever.
fn wait(mut child: Child) -> ExitStatus {
    let id = child.id();
    let (done, is_done) = mpsc::channel();
    let waiter = std::thread::spawn(move || {
        let status = child.wait().unwrap();
        let _ = done.send(());
        status
    });
    if is_done.recv_timeout(PATIENCE).is_err() {
        signal(id, libc::SIGKILL);
    }
    waiter.join().unwrap()
}

fn signal(process: u32, number: i32) {
    let process = i32::try_from(process).unwrap();
    // SAFETY: sends a signal to a child of this test that has not been waited for.
    unsafe { libc::kill(process, number) };
}

fn snapshot(name: &str, text: &str) {
    let mut settings = insta::Settings::clone_current();
    settings.set_snapshot_path("../snapshots");
    settings.set_prepend_module_to_snapshot(false);
    settings.set_omit_expression(true);
    settings.add_filter(r"genvideo \d+\.\d+\.\d+", "genvideo [VERSION]");
    settings.bind(|| insta::assert_snapshot!(name, text));
}

#[test]
fn help_says_what_can_be_typed() {
    let machine = Machine::new();
    for (name, arguments) in [
        ("help", &["--help"][..]),
        ("help_run", &["run", "--help"]),
        ("help_list", &["list", "-h"]),
    ] {
        let answer = machine.run(arguments);
        assert_eq!(answer.stderr, "");
        snapshot(name, &machine.shown(&answer));
    }
    assert!(machine.ok(&["--version"]).starts_with("genvideo "));
}

#[test]
fn a_mistake_gets_one_line_a_hint_and_an_exit_code() {
    let machine = Machine::new();
    std::fs::write(machine.path("work/empty.png"), "").unwrap();
    let cases: &[(&str, &[&str])] = &[
        ("error_no_prompt", &["run"]),
        ("error_unknown_command", &["rum", "a cat"]),
        ("error_size", &["run", "a cat", "--size", "12"]),
        (
            "error_every_fault",
            &["run", "a cat", "--size", "10x9999", "--style", "cubist", "--duration", "100"],
        ),
        ("error_empty_prompt", &["submit", ""]),
        ("error_image_missing", &["run", "a cat", "--image", "none.png"]),
        ("error_image_empty", &["run", "a cat", "--image", "empty.png"]),
        ("error_device", &["doctor", "--device", "gpu"]),
        ("error_no_model", &["render", "a cat", "--image-model", "no-such-model"]),
    ];
    for (name, arguments) in cases {
        snapshot(name, &machine.shown(&machine.run(arguments)));
    }
    assert!(!machine.path("data/temporal").exists(), "no server for a request that makes no sense");
}

#[test]
fn a_server_that_does_not_answer_is_exit_code_6() {
    let machine = Machine::new();
    let commands: &[&[&str]] = &[
        &["status", "x"],
        &["list"],
        &["cancel", "x"],
        &["approve", "x"],
        &["reject", "x", "--reason", "too dark"],
        &["replace-image", "x", &"0".repeat(64)],
        &["pause", "x"],
        &["resume", "x"],
        &["watch", "x"],
        &["submit", "a cat"],
        &["worker"],
        &["up"],
        &["run", "a cat"],
    ];
    for arguments in commands {
        let answer = machine
            .run(&[arguments, &["--temporal-address", "127.0.0.1:1", "--json"][..]].concat());
        assert_eq!(answer.code, Some(6), "{arguments:?}\n{}", answer.stderr);
        assert!(answer.stderr.contains("127.0.0.1:1"), "{arguments:?}\n{}", answer.stderr);
        assert!(answer.stderr.contains("\nhint: "), "{arguments:?}\n{}", answer.stderr);
        assert!(answer.stderr.contains(": Connection refused"), "{arguments:?}\n{}", answer.stderr);
        assert!(!answer.stderr.contains("Status {"), "{arguments:?}\n{}", answer.stderr);
        let error: Value = serde_json::from_str(answer.stdout.trim()).unwrap();
        assert_eq!(
            (&error["event"], &error["code"]),
            (&"error".into(), &"UNREACHABLE".into()),
            "{arguments:?}"
        );
    }
}

#[test]
fn a_reader_that_leaves_early_is_no_reason_to_panic() {
    let machine = Machine::new();
    for arguments in [&["run", "--help"][..], &["doctor"], &["doctor", "--json"]] {
        let mut command = machine.command(arguments);
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let mut child = command.stdout(writer).stderr(Stdio::piped()).spawn().unwrap();
        drop(command);
        let stderr = child.stderr.take().unwrap();
        let stderr = std::thread::spawn(move || read(stderr));
        let status = wait(child);
        let stderr = stderr.join().unwrap();
        assert!(
            status.code().is_some() && !stderr.contains("panicked"),
            "{arguments:?}: {status}\n{stderr}"
        );
    }
}

#[test]
fn the_doctor_looks_at_everything_and_says_what_mends_it() {
    let machine = Machine::new();
    let checks = machine.objects(&["doctor"]);
    let names: Vec<&str> = checks.iter().map(|check| check["check"].as_str().unwrap()).collect();
    for wanted in [
        "device",
        "image model",
        "video model",
        "models",
        "video codec",
        "temporal",
        "data",
        "cache",
        "store",
        "network",
    ] {
        assert!(names.contains(&wanted), "{wanted} in {names:?}");
    }
    for check in &checks {
        let fixed = check["verdict"] == "ok" || check["fix"].is_string();
        assert!(fixed && check["verdict"] != "fail", "{check}");
    }

    let cases: &[(&[&str], i32, &str)] = &[
        (&["--temporal-cli", "/nonexistent/temporal"], 6, "temporal"),
        (&["--temporal-address", "127.0.0.1:1"], 6, "temporal"),
        (&["--device", "cuda:99"], 5, "device"),
        (&["--data-dir", "/proc/nowhere"], 3, "data"),
    ];
    for (flags, code, failing) in cases {
        let answer = machine.run(&[&["doctor"], *flags].concat());
        assert_eq!(answer.code, Some(*code), "{flags:?}\n{}{}", answer.stdout, answer.stderr);
        assert!(
            answer.stderr.contains(&format!("cannot run here: {failing}")),
            "{flags:?}\n{}",
            answer.stderr
        );
        let lines: Vec<&str> = answer.stdout.lines().collect();
        let failed =
            lines.iter().position(|line| line.starts_with("FAIL")).expect("a failed check");
        assert!(
            lines[failed + 1].trim_start().starts_with("fix: "),
            "{flags:?}\n{}",
            answer.stdout
        );
    }
    let others =
        [("GENVIDEO_IMAGE_MODEL", "no-such-model", 4), ("GENVIDEO_STORE", "/proc/nowhere", 1)];
    for (name, value, code) in others {
        let mut command = machine.command(&["doctor"]);
        command.env(name, value);
        let answer = finish(command);
        assert_eq!(answer.code, Some(code), "{name}\n{}{}", answer.stdout, answer.stderr);
        assert!(!answer.stdout.contains("`genvideo doctor`"), "{}", answer.stdout);
    }
}

/// Flags of a film that is made in a moment.
pub(crate) const SMALL_FILM: &[&str] =
    &["--size", "96x64", "--duration", "0.5", "--fps", "6", "--steps", "2", "--seed", "7"];

#[test]
fn render_makes_the_same_files_twice_and_overwrites_none() {
    let machine = Machine::new();
    let arguments = [&["render", "A Red, red apple!"], SMALL_FILM, &["--out", "made"]].concat();
    let first = machine.ok(&arguments);
    let second = machine.ok(&arguments);
    let paths = |stdout: &str| {
        stdout.lines().map(|line| machine.path("work").join(line)).collect::<Vec<_>>()
    };
    let (first, second) = (paths(&first), paths(&second));
    assert_eq!(first.len(), 3);
    for (one, other) in first.iter().zip(&second) {
        assert_ne!(one, other);
        assert!(
            one.file_name().unwrap().to_str().unwrap().starts_with("a-red-red-apple-"),
            "{one:?}"
        );
        if one.extension().is_none_or(|end| end != "json") {
            assert_eq!(
                std::fs::read(one).unwrap(),
                std::fs::read(other).unwrap(),
                "{one:?} and {other:?}"
            );
        }
    }
    for path in &first[..2] {
        let told = machine.objects(&["inspect", path.to_str().unwrap()]).remove(0);
        let is_film = path.extension().is_some_and(|end| end == "mp4");
        let wanted = if is_film { json!(["mp4", 96, 64, 3]) } else { json!(["png", 96, 64, null]) };
        assert_eq!(json!([told["file"], told["width"], told["height"], told["frames"]]), wanted);
        assert_eq!(told["generation"]["tool"], "genvideo", "{told}");
        let prompt = told["generation"]["prompt"].as_str().unwrap();
        assert!(prompt.contains("A Red, red apple!"), "{told}");
    }
    let receipt: Value = serde_json::from_slice(&std::fs::read(&first[2]).unwrap()).unwrap();
    assert_eq!(receipt["request"]["seed"], 7);
    assert!(!receipt.to_string().contains("tester"), "the user's name stays out of files");
    assert_eq!(machine.files("work/made").len(), 6);
}

#[test]
fn run_starts_what_is_missing_and_its_jobs_are_there_the_next_time() {
    let machine = Machine::new();
    let flags =
        ["--size", "64x64", "--duration", "0.5", "--fps", "6", "--steps", "2", "--seed", "1"];
    let events = machine.objects(&[&["run", "一只小猫", "--id", "first"], &flags[..]].concat());
    let names: Vec<&str> = events.iter().map(|event| event["event"].as_str().unwrap()).collect();
    assert_eq!((names[0], *names.last().unwrap()), ("submitted", "result"), "{names:?}");
    assert!(events[0]["ui"].as_str().unwrap().starts_with("http://127.0.0.1:"));
    let percents: Vec<f64> = events.iter().filter_map(|event| event["percent"].as_f64()).collect();
    assert!(percents.is_sorted() && percents.last() == Some(&100.0), "{percents:?}");
    let result = &events.last().unwrap()["result"];
    assert_eq!((&result["status"], &result["done"]["seed"]), (&"COMPLETED".into(), &1.into()));
    let mine = machine.files("work");
    assert_eq!(mine.len(), 3, "{mine:?}");
    assert!(mine.iter().all(|name| name.starts_with("一只小猫-")), "{mine:?}");

    let flags = ["--job", "image", "--size", "64x64", "--steps", "1", "--out", "out"];
    let mut command = machine.command(&[&["run", "a red apple"], &flags[..]].concat());
    command.env("TEMPORAL_ADDRESS", "127.0.0.1:1");
    let answer = finish(command);
    assert_eq!(answer.code, Some(0), "{}", answer.stderr);
    assert!(answer.stderr.contains("using the embedded server"), "{}", answer.stderr);
    assert!(answer.stderr.contains("web ui http://127.0.0.1:"), "{}", answer.stderr);
    assert_eq!(answer.stdout.lines().count(), 2, "{}", answer.stdout);
    assert_eq!(machine.files("work/out").len(), 2);

    let listed = machine.objects(&["list"]);
    let ids: Vec<&str> = listed.iter().map(|job| job["id"].as_str().unwrap()).collect();
    assert_eq!((ids.len(), ids[1]), (2, "first"), "newest first: {listed:?}");
    assert_eq!(
        (&listed[1]["status"], &listed[1]["prompt"]),
        (&"COMPLETED".into(), &"一只小猫".into())
    );
    let status = machine.objects(&["status", "first"]);
    assert_eq!((&status[0]["status"], &status[0]["percent"]), (&"COMPLETED".into(), &100.0.into()));
    machine.ok(&["watch", "first", "--out", "again"]);
    assert_eq!(machine.files("work/again").len(), 3);
    for (arguments, message) in [
        (["cancel", "first"], "has already ended"),
        (["status", "nobody"], "no job `nobody`"),
        (["watch", "nobody"], "no job `nobody`"),
    ] {
        let answer = machine.run(&arguments);
        assert_eq!(answer.code, Some(1), "{arguments:?}");
        assert!(answer.stderr.contains(message), "{arguments:?}: {}", answer.stderr);
    }
    let history: Value = serde_json::from_str(&machine.ok(&["history", "first"])).unwrap();
    assert!(history["events"].as_array().is_some_and(|events| events.len() > 10));

    machine.ok(&["submit", "nobody works on this", "--id", "waits"]);
    let answer = machine.run(&["cancel", "waits"]);
    assert_eq!(answer.code, Some(0), "{}", answer.stderr);
    assert_eq!(answer.stdout, "asked to stop  waits\n");
    assert!(answer.stderr.contains("no worker answers"), "{}", answer.stderr);
}

/// A command that goes on while the test looks at what it says.
struct Running {
    child: Child,
    lines: mpsc::Receiver<String>,
    said: Vec<String>,
}

impl Running {
    /// Starts it; lines of stdout and stderr come in one stream.
    fn start(mut command: Command) -> Self {
        let (reader, writer) = std::io::pipe().unwrap();
        let child = command.stdout(writer.try_clone().unwrap()).stderr(writer).spawn().unwrap();
        // The command holds the other writers.
        drop(command);
        let (send, lines) = mpsc::channel();
        std::thread::spawn(move || {
            for line in BufReader::new(reader).lines().map_while(Result::ok) {
                if send.send(line).is_err() {
                    return;
                }
            }
        });
        Self { child, lines, said: Vec::new() }
    }

    fn until(&mut self, wanted: &str) {
        loop {
            match self.lines.recv_timeout(PATIENCE) {
                Ok(line) => {
                    let found = line.contains(wanted);
                    self.said.push(line);
                    if found {
                        return;
                    }
                }
                Err(error) => panic!("no `{wanted}` ({error}) in\n{}", self.said.join("\n")),
            }
        }
    }

    fn end(mut self) -> (ExitStatus, String) {
        let status = wait(self.child);
        while let Ok(line) = self.lines.recv_timeout(PATIENCE) {
            self.said.push(line);
        }
        (status, self.said.join("\n"))
    }
}

/// A job that can be stopped while it denoises: six hundred steps take longer than some heartbeats on a fast machine too.
const LONG: [&str; 8] =
    ["a red apple", "--job", "image", "--steps", "150", "--batch", "4", "--json"];

#[test]
fn ctrl_c_cancels_the_job_and_nothing_of_it_is_left() {
    let machine = Machine::new();
    let mut running = Running::start(machine.command(&[&["run"], &LONG[..]].concat()));
    running.until("\"stage\":\"denoise\"");
    signal(running.child.id(), libc::SIGINT);
    let (status, said) = running.end();
    assert_eq!(status.code(), Some(130), "{said}");
    assert!(said.contains("was cancelled"), "{said}");
    assert_eq!(machine.files("work"), Vec::<String>::new());
    let left = ["data/store/blobs", "data/store/jobs", "data/store/tmp"]
        .map(|folder| machine.files(folder));
    assert!(left.iter().all(Vec::is_empty), "{left:?}");
    let id = machine.objects(&["list"])[0]["id"].as_str().unwrap().to_owned();
    assert_eq!(machine.objects(&["status", &id])[0]["status"], "CANCELLED");
}

#[test]
fn a_second_ctrl_c_takes_the_server_along() {
    let machine = Machine::new();
    let mut running = Running::start(machine.command(&[&["run"], &LONG[..]].concat()));
    running.until("\"stage\":\"denoise\"");
    let state = std::fs::read(machine.path("data/temporal/server.json")).unwrap();
    let state: Value = serde_json::from_slice(&state).unwrap();
    let server = u32::try_from(state["pid"].as_u64().unwrap()).unwrap();
    // A server that stands still hears of no cancel, so that the command waits.
    signal(server, libc::SIGSTOP);
    signal(running.child.id(), libc::SIGINT);
    running.until("once more");
    signal(running.child.id(), libc::SIGINT);
    let (status, said) = running.end();
    assert_eq!(status.code(), Some(130), "{said}");
    signal(server, libc::SIGCONT);
    let left = std::time::Instant::now();
    while genvideo::devserver::is_running(&machine.path("data")).is_some() {
        assert!(left.elapsed() < PATIENCE / 5, "the server still runs");
    }
}

#[test]
fn up_serves_other_commands_until_it_is_told_to_stop() {
    let machine = Machine::new();
    let mut up = Running::start(machine.command(&["up"]));
    up.until("task queue");
    let submitted =
        machine.objects(&[&["submit"], &LONG[..LONG.len() - 1], &["--id", "long"]].concat());
    assert_eq!((&submitted[0]["id"], &submitted[0]["joined"]), (&"long".into(), &false.into()));
    let again =
        machine.objects(&[&["submit"], &LONG[..LONG.len() - 1], &["--id", "long"]].concat());
    assert_eq!(again[0]["joined"], true);
    let other = machine.run(&["submit", "another prompt", "--id", "long"]);
    assert_eq!(other.code, Some(1), "{}", other.stderr);
    let mut watching = Running::start(machine.command(&["watch", "long", "--json"]));
    watching.until("\"stage\":\"denoise\"");
    assert_eq!(machine.objects(&["cancel", "long"])[0]["status"], "CANCELLED");
    let (status, said) = watching.end();
    assert_eq!(status.code(), Some(1), "{said}");
    assert!(said.contains("\"code\":\"CANCELLED\""), "{said}");
    signal(up.child.id(), libc::SIGTERM);
    let (status, said) = up.end();
    assert_eq!(status.code(), Some(0), "{said}");
}

#[test]
#[cfg(feature = "failpoints")]
fn a_killed_worker_costs_no_more_than_a_checkpoint_and_changes_no_byte() {
    let machine = Machine::new();
    let job = "apple --job image --size 64x64 --steps 4 --batch 2 --seed 3";
    let job: Vec<&str> = job.split(' ').collect();
    let quiet = machine.objects(&[&["render"], &job[..], &["--out", "quiet"]].concat());
    let hashes = |events: &[Value]| -> Vec<Value> {
        let images = &events.last().unwrap()["result"]["assets"]["images"];
        images.as_array().unwrap().iter().map(|image| image["sha256"].clone()).collect()
    };
    let wanted = hashes(&quiet);
    assert_eq!(wanted.len(), 2);
    let up = |faults: &str| {
        let mut command = machine.command(&["up", "--log", "info"]);
        command.env("GENVIDEO_HEARTBEAT_TIMEOUT", "2s").env("GENVIDEO_CHECKPOINT_INTERVAL", "0s");
        command.env("GENVIDEO_FAILPOINTS", faults);
        let mut up = Running::start(command);
        up.until("task queue");
        up
    };
    // At the second step of the second picture the worker stands still, so that all of it can be killed there.
    let frozen = machine.path("frozen");
    let mut first = up(&format!("checkpoint_marked=freeze,skip=5,once={}", frozen.display()));
    machine.ok(&[&["submit"], &job[..], &["--id", "killed"]].concat());
    first.until("a fault that was asked for");
    let worker = std::fs::read_to_string(&frozen).unwrap().parse().unwrap();
    first.child.kill().unwrap();
    signal(worker, libc::SIGKILL);
    let (status, said) = first.end();
    assert_eq!(status.code(), None, "killed: {said}");

    let mut second = up("");
    second.until("going on from a checkpoint");
    let said = second.said.last().unwrap();
    assert!(said.contains("1 denoised, 2 steps of the next"), "{said}");
    let watched = machine.objects(&["watch", "killed", "--out", "killed"]);
    assert_eq!(hashes(&watched), wanted);
    signal(second.child.id(), libc::SIGTERM);
    let (status, said) = second.end();
    assert_eq!(status.code(), Some(0), "{said}");
    let left = ["data/store/work", "data/store/tmp"].map(|folder| machine.files(folder));
    assert!(left.iter().all(Vec::is_empty), "{left:?}");
}
