//! Receipts at the command line: the same bytes for any number of threads, `verify`, `replay`.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

use std::fs;
use std::path::PathBuf;

use serde_json::{Value, json};

use crate::cli::{Machine, SMALL_FILM, finish};

const IMAGE: &[&str] = &["a red apple", "--job", "image", "--size", "64x64", "--steps", "2"];

/// The files that a command said it made.
fn made(machine: &Machine, stdout: &str) -> Vec<PathBuf> {
    stdout.lines().map(|line| machine.path("work").join(line)).collect()
}

fn read(path: &PathBuf) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

#[test]
fn the_number_of_threads_changes_no_byte() {
    for dtype in ["f32", "f16"] {
        let machine = Machine::new();
        let mut wanted: Option<(Vec<Vec<u8>>, Value)> = None;
        for (threads, flag) in [("1", "auto"), ("2", "auto"), ("3", "auto"), ("2", "5")] {
            let arguments = [
                &["render", "a red apple"],
                SMALL_FILM,
                &["--dtype", dtype, "--threads", flag, "--device", "cpu"],
            ]
            .concat();
            let mut command = machine.command(&arguments);
            command.env("RAYON_NUM_THREADS", threads);
            let answer = finish(command);
            assert_eq!(answer.code, Some(0), "{}", answer.stderr);
            let files = made(&machine, &answer.stdout);
            let receipt = read(&files[2]);
            let count = if flag == "auto" { threads } else { flag };
            let told = receipt["stages"]["image"]["threads"].to_string();
            assert_eq!(told, count, "{dtype}");
            let hashes = |stage: &str| {
                json!([receipt["stages"][stage]["denoise"], receipt["stages"][stage]["decode"]])
            };
            let steps = json!([hashes("image"), hashes("video-0")]);
            let bytes: Vec<Vec<u8>> =
                files[..2].iter().map(|path| fs::read(path).unwrap()).collect();
            match &wanted {
                None => wanted = Some((bytes, steps)),
                Some((first, first_steps)) => {
                    assert_eq!(&steps, first_steps, "{dtype}, {count} threads");
                    assert!(&bytes == first, "{dtype}, {count} threads: other files");
                }
            }
        }
    }
}

#[test]
fn verify_says_equal_or_where_and_why_not() {
    let machine = Machine::new();
    let stdout = machine.ok(&[&["render", "a red apple"], SMALL_FILM].concat());
    let path = made(&machine, &stdout).remove(2);
    let name = path.to_str().unwrap();
    let told = machine.ok(&["verify", name, "--threads", "1"]);
    assert!(told.starts_with("equal: "), "{told}");
    let told = machine.objects(&["verify", name]).pop().unwrap();
    assert_eq!(
        (&told["event"], &told["equal"], &told["files"]),
        (&json!("verified"), &json!(true), &json!(3))
    );

    let mut receipt = read(&path);
    receipt["stages"]["image"]["denoise"][1] = json!("0".repeat(64));
    receipt["generator"] = json!("genvideo 0.0.1");
    fs::write(&path, receipt.to_string()).unwrap();
    let answer = machine.run(&["verify", name]);
    assert_eq!(answer.code, Some(1), "{}", answer.stderr);
    for part in
        ["stage `image`, step 2 of 2, differs: 0000", "version: genvideo 0.0.1 in the receipt"]
    {
        assert!(answer.stderr.contains(part), "{part}: {}", answer.stderr);
    }
    let answer = machine.run(&["verify", name, "--json"]);
    let lines: Vec<Value> =
        answer.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let [.., verified, error] = lines.as_slice() else { panic!("{}", answer.stdout) };
    assert_eq!((&verified["equal"], &verified["mismatch"]["number"]), (&json!(false), &json!(2)));
    assert_eq!((&error["code"], &error["exit_code"]), (&json!("DIFFERS"), &json!(1)));

    for (content, code, said) in
        [("{}", 2, "missing field `schema_version`"), ("no receipt", 2, "this is not a receipt")]
    {
        fs::write(&path, content).unwrap();
        let answer = machine.run(&["verify", name]);
        assert_eq!(answer.code, Some(code), "{}", answer.stderr);
        assert!(answer.stderr.contains(said), "{}", answer.stderr);
    }
    assert_eq!(machine.run(&["verify", "nothing.json"]).code, Some(2));
}

#[test]
fn replay_starts_the_same_job_with_changes() {
    let machine = Machine::new();
    let stdout = machine.ok(&[&["run"], IMAGE].concat());
    let files = made(&machine, &stdout);
    let (picture, path) = (fs::read(&files[0]).unwrap(), &files[1]);
    let name = path.to_str().unwrap();
    let receipt = read(path);
    assert!(receipt["request"]["seed"].is_null(), "the seed was drawn: {receipt}");

    // The same again is the same picture, with the seed that was drawn.
    let again = made(&machine, &machine.ok(&["replay", name]));
    assert!(fs::read(&again[0]).unwrap() == picture);
    let flags =
        ["replay", name, "--set", "steps=3", "--set", "prompt=a blue ball", "--out", "other"];
    let changed = made(&machine, &machine.ok(&flags));
    let told = read(&changed[1]);
    assert_eq!(told["seed"], receipt["seed"]);
    let request = &told["request"];
    assert_eq!((&request["steps"], &request["prompt"]), (&json!(3), &json!("a blue ball")));
    assert!(changed[0].starts_with(machine.path("work/other")), "{changed:?}");

    let events = machine.objects(&["replay", name, "--detach", "--id", "later", "--set", "seed=9"]);
    assert_eq!((events.len(), &events[0]["id"]), (1, &json!("later")));
    for (set, said) in [
        ("steps=zero", "wanted a whole number from 1 to 150"),
        ("stepz=3", "did you mean `steps`?"),
        ("steps", "wanted FIELD=VALUE"),
    ] {
        let answer = machine.run(&["replay", name, "--set", set]);
        assert_eq!(answer.code, Some(2), "{}", answer.stderr);
        assert!(answer.stderr.contains(said), "{set}: {}", answer.stderr);
    }
}
