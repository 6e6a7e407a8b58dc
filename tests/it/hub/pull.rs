//! From a hub that behaves like the real one to a picture: fetched, interrupted, refused, checked, removed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::cli::{Answer, Machine, finish};
use crate::support::PATIENCE;
use crate::support::fake_hub::{COMMIT, FakeHub, Manners, REPO};

/// The large files of the model: text encoder, UNet and VAE.
const LARGE: u64 = 111_104 + 333_176 + 287_620;
const UNET: &str = "unet/diffusion_pytorch_model.safetensors";

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/goldens").join(name)
}

/// A machine and a hub with the goldens' Stable Diffusion 1.
struct Desk {
    machine: Machine,
    hub: FakeHub,
}

impl Desk {
    fn new() -> Self {
        Self { machine: Machine::new(), hub: FakeHub::start(&golden("models/sd1")) }
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = self.machine.command(arguments);
        command.env("HF_ENDPOINT", &self.hub.address).env("HF_HOME", self.machine.path("hf"));
        command
    }

    fn run(&self, arguments: &[&str]) -> Answer {
        finish(self.command(arguments))
    }

    fn pull(&self) -> Answer {
        self.run(&["models", "pull", REPO])
    }

    fn ok(&self, arguments: &[&str]) -> Answer {
        let answer = self.run(arguments);
        assert_eq!(answer.code, Some(0), "{arguments:?}\n{}{}", answer.stdout, answer.stderr);
        answer
    }

    /// A pull that fails: its exit code, code, and all it says.
    fn refused(&self, command: Command) -> (i32, String, String) {
        let answer = finish(command);
        let last = answer.stdout.lines().last().unwrap_or_default();
        let error: Value = serde_json::from_str(last).expect(&answer.stderr);
        let code = error["code"].as_str().unwrap_or_default().to_owned();
        (answer.code.unwrap(), code, answer.stderr)
    }

    fn repo(&self) -> PathBuf {
        self.machine.path("hf/hub/models--studio--tiny")
    }

    fn snapshot(&self) -> PathBuf {
        self.repo().join("snapshots").join(COMMIT)
    }

    /// The UNet's blob, whole or not.
    fn unet(&self, ending: &str) -> PathBuf {
        let content = fs::read(golden("models/sd1").join(UNET)).unwrap();
        let hash = <sha2::Sha256 as sha2::Digest>::digest(content);
        let hash: String = hash.iter().map(|byte| format!("{byte:02x}")).collect();
        self.repo().join("blobs").join(format!("{hash}{ending}"))
    }
}

/// Waits for what another process does.
fn until(what: &str, mut done: impl FnMut() -> bool) {
    let (_keep, tick) = mpsc::channel::<()>();
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < PATIENCE, "{what} did not come");
        let _ = tick.recv_timeout(Duration::from_millis(5));
    }
}

#[test]
fn a_model_is_pulled_used_verified_and_removed() {
    let desk = Desk::new();
    let answer = desk.pull();
    assert_eq!(answer.code, Some(0), "{}", answer.stderr);
    assert_eq!(answer.stdout.trim(), desk.snapshot().to_str().unwrap());
    assert!(answer.stderr.contains("12 files"), "{}", answer.stderr);
    assert_eq!(desk.hub.sent(), LARGE, "each file once");
    assert_eq!(fs::read_to_string(desk.repo().join("refs/main")).unwrap(), COMMIT);
    for file in ["model_index.json", UNET, "tokenizer/vocab.json"] {
        let link = desk.snapshot().join(file);
        assert!(fs::read_link(&link).unwrap().starts_with(".."), "{file} is a link into the blobs");
        assert!(fs::read(&link).unwrap() == fs::read(golden("models/sd1").join(file)).unwrap());
    }
    for file in ["README.md", "unet/diffusion_pytorch_model.bin", "safety_checker"] {
        assert!(!desk.snapshot().join(file).exists(), "{file} is not needed");
    }

    let again = desk.ok(&["models", "pull", REPO]);
    assert_eq!(desk.hub.sent(), 0, "nothing is fetched twice\n{}", again.stderr);

    let listed = desk.ok(&["models", "list"]).stdout;
    assert!(listed.contains("studio/tiny") && listed.contains("hf cache"), "{listed}");
    let shown = desk.ok(&["models", "show", REPO]).stdout;
    assert!(shown.contains(COMMIT) && shown.contains(UNET), "{shown}");
    let job = ["render", "a fox", "--job", "image", "--size", "64x64", "--steps", "1"];
    let made = desk.ok(&[&job[..], &["--image-model", REPO, "--size-policy", "exact"]].concat());
    assert_eq!(made.stdout.lines().count(), 2, "{}", made.stdout);

    assert!(desk.ok(&["models", "verify"]).stdout.contains("ok    studio/tiny, 12 files"));
    let mut weights = fs::read(desk.unet("")).unwrap();
    weights[200_000] ^= 1;
    fs::write(desk.unet(""), weights).unwrap();
    let bad = desk.run(&["models", "verify", REPO]);
    assert_eq!(bad.code, Some(1), "{}", bad.stderr);
    assert!(bad.stdout.contains(&format!("{UNET}: its SHA-256 is")), "{}", bad.stdout);
    desk.ok(&["models", "pull", REPO]);
    assert_eq!(desk.hub.sent(), 333_176, "the bad file alone comes again");
    desk.ok(&["models", "verify", REPO]);
    // Without the lock file the names of the blobs tell.
    fs::rename(desk.repo().join("genvideo.lock"), desk.machine.path("lock")).unwrap();
    assert!(desk.ok(&["models", "verify", REPO]).stdout.contains("12 files"));
    fs::rename(desk.machine.path("lock"), desk.repo().join("genvideo.lock")).unwrap();

    let asked = desk.run(&["models", "remove", REPO]);
    assert_eq!(asked.code, Some(2), "no terminal, no answer: {}", asked.stderr);
    assert!(asked.stderr.contains("--yes"), "{}", asked.stderr);
    desk.ok(&["models", "remove", REPO, "--yes"]);
    assert!(!desk.repo().exists());
    assert_eq!(desk.run(&["models", "show", REPO]).code, Some(4));
}

#[test]
fn a_pull_that_was_killed_goes_on_where_it_stopped() {
    let desk = Desk::new();
    let stalled = desk.hub.stall_after(120_000);
    let mut command = desk.command(&["models", "pull", REPO]);
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    stalled.recv_timeout(PATIENCE).expect("a file stalls");
    let part = desk.unet(".incomplete");
    let length = || fs::metadata(&part).map_or(0, |found| found.len());
    until("the beginning of the file", || length() > 0);
    child.kill().unwrap();
    child.wait().unwrap();
    let kept = length();
    assert!(!desk.snapshot().exists(), "half a model is not found");
    assert_eq!(desk.run(&["models", "show", REPO]).code, Some(4));

    desk.hub.behave(Manners::default());
    desk.hub.sent();
    let answer = desk.pull();
    assert_eq!(answer.code, Some(0), "{}", answer.stderr);
    // Of the text encoder, which came before, nothing is fetched again.
    assert_eq!(desk.hub.sent(), 333_176 - kept + 287_620);
    assert!(answer.stderr.contains("goes on"), "{}", answer.stderr);
    desk.ok(&["models", "verify", REPO]);
}

#[test]
fn a_pull_that_was_killed_is_removed_whole() {
    let desk = Desk::new();
    let stalled = desk.hub.stall_after(120_000);
    let mut command = desk.command(&["models", "pull", REPO]);
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    stalled.recv_timeout(PATIENCE).expect("a file stalls");
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(desk.repo().join("blobs").is_dir());
    desk.ok(&["models", "remove", REPO, "--yes"]);
    assert!(!desk.repo().exists());
}

#[test]
fn another_variant_takes_the_place_of_the_first() {
    let desk = Desk::new();
    let half = "unet/diffusion_pytorch_model.fp16.safetensors";
    desk.hub.files(|files| {
        files.insert(half.to_owned(), b"of half precision".to_vec());
        files.insert("tokenizer/empty.txt".to_owned(), Vec::new());
    });
    let blobs = || fs::read_dir(desk.repo().join("blobs")).unwrap().count();
    let is_there = |file| desk.snapshot().join(file).exists();
    desk.ok(&["models", "pull", REPO]);
    assert_eq!((is_there(half), is_there(UNET), blobs()), (true, false, 13));
    assert_eq!(fs::read(desk.snapshot().join("tokenizer/empty.txt")).unwrap(), b"");
    desk.ok(&["models", "pull", REPO, "--variant", "none"]);
    assert_eq!((is_there(half), is_there(UNET), blobs()), (false, true, 13));
    desk.ok(&["models", "verify", REPO]);
    // The same files at another commit.
    let next = "89abcdef0123456789abcdef0123456789abcdef";
    let manners = Manners { sha: Some(next), ..Manners::default() };
    desk.hub.behave(manners);
    desk.hub.sent();
    desk.ok(&["models", "pull", REPO, "--variant", "none"]);
    assert_eq!(desk.hub.sent(), 0, "nothing of it is new");
    assert!(!desk.snapshot().exists());
    assert_eq!(fs::read_to_string(desk.repo().join("refs/main")).unwrap(), next);
    desk.ok(&["models", "verify", REPO]);
    desk.ok(&["models", "remove", REPO, "--yes"]);
    assert!(!desk.repo().exists());
}

#[test]
fn what_other_programs_put_there_stays() {
    let desk = Desk::new();
    let (blobs, snapshot) = (desk.repo().join("blobs"), desk.snapshot());
    fs::create_dir_all(&blobs).unwrap();
    fs::create_dir_all(&snapshot).unwrap();
    let index = fs::read(golden("models/sd1/model_index.json")).unwrap();
    let theirs: &[(&str, &str, &[u8])] = &[
        ("model_index.json", "6d804a9787a8be87e9db4674a755347a16036365", &index),
        (".gitattributes", "aa", b"attributes"),
    ];
    for (name, blob, content) in theirs {
        fs::write(blobs.join(blob), content).unwrap();
        let target = format!("../../blobs/{blob}");
        std::os::unix::fs::symlink(target, snapshot.join(name)).unwrap();
    }
    fs::write(blobs.join("bb.incomplete"), "they are at work").unwrap();
    desk.ok(&["models", "pull", REPO]);
    assert!(desk.unet("").exists());

    let models = desk.machine.path("data/models");
    fs::create_dir_all(&models).unwrap();
    fs::write(models.join("uv.lock"), "version = 1\n").unwrap();
    fs::write(models.join("empty.lock"), "").unwrap();
    assert!(desk.ok(&["models", "verify"]).stdout.contains("ok    studio/tiny, 12 files"));
    fs::write(models.join("broken.lock"), "# Written by genvideo; once\n[").unwrap();
    let verified = desk.run(&["models", "verify"]);
    assert_eq!(verified.code, Some(1), "{}", verified.stderr);
    assert!(verified.stdout.contains("BAD   broken"), "{}", verified.stdout);
    assert!(verified.stdout.contains("ok    studio/tiny"), "{}", verified.stdout);

    let removed = desk.ok(&["models", "remove", REPO, "--yes"]).stdout;
    assert!(removed.contains("11 files"), "{removed}");
    for (name, _, content) in theirs {
        assert_eq!(fs::read(snapshot.join(name)).unwrap(), *content, "{name}");
    }
    assert!(blobs.join("bb.incomplete").exists() && !desk.unet("").exists());
}

#[test]
fn connections_that_break_are_made_again() {
    let desk = Desk::new();
    desk.hub.behave(Manners { cut: Some(150_000), busy: 2, ..Manners::default() });
    let answer = desk.run(&["models", "pull", REPO, "--json"]);
    assert_eq!(answer.code, Some(0), "{}", answer.stderr);
    let again = answer.stdout.lines().filter(|line| line.contains("\"event\":\"again\"")).count();
    assert!(
        again >= 5,
        "two busy answers, two breaks in the UNet, one in the VAE:\n{}",
        answer.stdout
    );
    desk.ok(&["models", "verify", REPO]);
    desk.ok(&["models", "remove", REPO, "--yes"]);

    desk.hub.behave(Manners { cut: Some(250_000), no_ranges: true, ..Manners::default() });
    let answer = finish(desk.command(&["models", "pull", REPO, "--json"]));
    assert_eq!(answer.code, Some(4), "without ranges it never comes to its end: {}", answer.stderr);
    desk.hub.behave(Manners { no_ranges: true, ..Manners::default() });
    desk.ok(&["models", "pull", REPO]);
    desk.ok(&["models", "verify", REPO]);
}

#[test]
fn a_pull_that_ended_among_its_links_leaves_none_behind() {
    let desk = Desk::new();
    // A file where the folder of names has to go.
    let obstacle = desk.repo().join("refs");
    fs::create_dir_all(desk.repo()).unwrap();
    fs::write(&obstacle, "").unwrap();
    let (code, _, said) = desk.refused(desk.command(&["--json", "models", "pull", REPO]));
    assert!(code != 0, "{said}");
    assert!(desk.snapshot().join(UNET).symlink_metadata().is_ok(), "links are there");
    fs::remove_file(&obstacle).unwrap();
    assert_eq!(desk.pull().code, Some(0));
    desk.ok(&["models", "remove", REPO, "--yes"]);
    assert!(!desk.repo().exists(), "nothing of it stays");
}

#[test]
fn a_file_that_is_not_what_the_hub_says_is_removed() {
    for wrong in [UNET, "unet/config.json"] {
        let desk = Desk::new();
        desk.hub.behave(Manners { wrong: Some(wrong), ..Manners::default() });
        let (exit, code, said) = desk.refused(desk.command(&["models", "pull", REPO, "--json"]));
        assert_eq!((exit, code.as_str()), (4, "WEIGHTS_HASH"), "{said}");
        assert!(said.contains(wrong) && said.contains("hint: "), "{said}");
        assert!(!desk.snapshot().exists());
        assert!(!desk.unet("").exists() && !desk.unet(".incomplete").exists());
        desk.hub.behave(Manners::default());
        desk.ok(&["models", "pull", REPO]);
    }
}

#[test]
fn a_token_goes_to_the_hub_and_to_nobody_else() {
    let desk = Desk::new();
    desk.hub.behave(Manners { token: Some("hf_secret".to_owned()), ..Manners::default() });
    let kept = desk.machine.path("hf/token");
    fs::create_dir_all(kept.parent().unwrap()).unwrap();
    fs::write(&kept, "hf_secret\n").unwrap();
    let answer = desk.pull();
    assert_eq!(answer.code, Some(0), "{}", answer.stderr);
    let requests = desk.hub.requests();
    assert!(requests.iter().any(|(path, _)| path.starts_with("/blob/")));
    for (path, token) in requests {
        assert_eq!(token, !path.starts_with("/blob/"), "{path}");
    }
    let mut command = desk.command(&["models", "pull", REPO, "--json"]);
    let (exit, code, said) = desk.refused({
        command.env("HF_TOKEN", "hf_other");
        command
    });
    assert_eq!((exit, code.as_str()), (4, "UNKNOWN_MODEL"), "{said}");
    assert!(!said.contains("hf_other"), "{said}");
}

#[test]
fn refusals_say_what_to_do() {
    let desk = Desk::new();
    let gated = Manners { refuse: Some((403, "GatedRepo")), ..Manners::default() };
    let none = Manners::default();
    let refused = |status| Manners { refuse: Some((status, "")), ..Manners::default() };
    let gone = Manners { refuse: Some((404, "EntryNotFound")), ..Manners::default() };
    let astray = Manners { sha: Some("../../.."), ..Manners::default() };
    let page = format!("{}/{REPO}", desk.hub.address);
    type Case<'a> = (&'a [&'a str], &'a [(&'a str, &'a str)], Manners, i32, &'a str, &'a str);
    let cases: &[Case<'_>] = &[
        (&[REPO], &[], gated.clone(), 4, "GATED", "then set HF_TOKEN"),
        (&[REPO], &[], gated.clone(), 4, "GATED", &page),
        (&[REPO], &[("HF_TOKEN", "hf_x")], gated, 4, "GATED", "that HF_TOKEN belongs to"),
        (&[REPO], &[], refused(401), 4, "UNAUTHORIZED", "set HF_TOKEN"),
        (&[REPO], &[("HF_TOKEN", "hf_x")], refused(403), 4, "UNAUTHORIZED", "still valid"),
        (&["studio/none"], &[], none.clone(), 4, "UNKNOWN_MODEL", "no repository `studio/none`"),
        (&["studio/none"], &[("HF_TOKEN", "x")], none.clone(), 4, "UNKNOWN_MODEL", "may read it"),
        (&[REPO, "--revision", "v2"], &[], none.clone(), 4, "UNKNOWN_MODEL", "it has main, v1"),
        (&[REPO], &[], gone, 4, "MISSING_WEIGHTS", "no file `model_index.json`"),
        (&["sd16"], &[], none.clone(), 2, "USAGE", "`sd15`"),
        (&["a/b/c"], &[], none.clone(), 2, "USAGE", "organisation/name"),
        (&["../x"], &[], none.clone(), 2, "USAGE", "organisation/name"),
        (&[REPO, "--revision", "../x"], &[], none.clone(), 2, "USAGE", "a branch, a tag"),
        (&[REPO, "--revision", "/x"], &[], none.clone(), 2, "USAGE", "a branch, a tag"),
        (&[REPO], &[], astray, 4, "HUB_UNREACHABLE", "a commit that is no hash"),
        (&[REPO], &[("HF_HUB_OFFLINE", "1")], none.clone(), 3, "OFFLINE", "HF_HUB_OFFLINE"),
        (&[REPO], &[("TRANSFORMERS_OFFLINE", "1")], none.clone(), 3, "OFFLINE", "unset it"),
        (&[REPO], &[("HF_HUB_OFFLINE", "maybe")], none.clone(), 3, "CONFIG", "`1` or `0`"),
        (&[REPO], &[("HF_ENDPOINT", "ftp://x")], none, 3, "CONFIG", "an address"),
    ];
    for (arguments, variables, manners, exit, code, wanted) in cases {
        desk.hub.behave(manners.clone());
        desk.hub.requests();
        let mut command = desk.command(&[&["models", "pull", "--json"], *arguments].concat());
        command.envs(variables.iter().copied());
        let (found_exit, found, said) = desk.refused(command);
        assert_eq!((found_exit, found.as_str()), (*exit, *code), "{arguments:?} {said}");
        assert!(said.contains(wanted), "{arguments:?} {wanted}: {said}");
        if *exit != 4 {
            assert!(desk.hub.requests().is_empty(), "{arguments:?}");
        }
    }
}

#[test]
fn a_hub_that_does_not_answer_is_named() {
    let desk = Desk::new();
    let mut command = desk.command(&["models", "pull", REPO, "--json"]);
    command.env("HF_ENDPOINT", "http://127.0.0.1:1");
    let (exit, code, said) = desk.refused(command);
    assert_eq!((exit, code.as_str()), (4, "HUB_UNREACHABLE"), "{said}");
    assert!(said.contains("HF_ENDPOINT"), "{said}");
}

#[test]
fn repositories_without_a_usable_model_are_refused_before_their_weights_come() {
    let cases: &[(&str, Option<&[u8]>, &str, &str)] = &[
        (UNET, None, "UNSUPPORTED_WEIGHTS", "unet/diffusion_pytorch_model.bin"),
        ("model_index.json", None, "MISSING_WEIGHTS", "model_index.json"),
        (
            "model_index.json",
            Some(br#"{"_class_name": "FluxPipeline"}"#),
            "CONFIG_UNSUPPORTED",
            "FluxPipeline",
        ),
        ("../../escape.safetensors", Some(b""), "HUB_UNREACHABLE", "escape"),
        ("image_encoder/config.json", Some(b"{}"), "MISSING_WEIGHTS", "image_encoder"),
    ];
    for (name, content, code, wanted) in cases {
        let desk = Desk::new();
        desk.hub.files(|files| match content {
            // Its ETag is no git id then, which is as good as any.
            Some(content) => {
                files.insert((*name).to_owned(), content.to_vec());
            }
            None => {
                files.remove(*name);
            }
        });
        let (exit, found, said) = desk.refused(desk.command(&["models", "pull", REPO, "--json"]));
        assert_eq!((exit, found.as_str()), (4, *code), "{name}: {said}");
        assert!(said.contains(wanted), "{name}: {said}");
        assert_eq!(desk.hub.sent(), 0, "{name}: no weights were fetched");
    }
}

#[test]
fn a_disk_that_is_too_small_is_refused_beforehand() {
    let desk = Desk::new();
    let inner = desk.command(&["models", "pull", REPO, "--json"]);
    let disk = desk.machine.path("hf");
    fs::create_dir(&disk).unwrap();
    let script = "mount -t tmpfs -o size=2m none \"$1\" && shift && exec \"$@\"";
    let mut command = Command::new("unshare");
    command.args(["-rm", "sh", "-c", script, "sh"]).arg(&disk);
    command.arg(inner.get_program()).args(inner.get_args()).stdin(Stdio::null());
    for (name, value) in inner.get_envs().filter_map(|(name, value)| Some((name, value?))) {
        command.env(name, value);
    }
    let answer = finish(command);
    if answer.code != Some(1) || answer.stdout.is_empty() {
        // A place of one's own to mount in is the system's to give; the engine's own test checks the arithmetic.
        assert!(!answer.stdout.contains("\"event\":\"pulled\""), "{}", answer.stdout);
        return;
    }
    assert!(answer.stdout.contains("\"code\":\"DISK_FULL\""), "{}", answer.stdout);
    assert!(answer.stderr.contains("are needed"), "{}", answer.stderr);
}

#[test]
fn known_models_are_pulled_by_name_from_their_repository() {
    let desk = Desk::new();
    let (exit, code, said) = desk.refused(desk.command(&["models", "pull", "sd15", "--json"]));
    assert_eq!((exit, code.as_str()), (4, "UNKNOWN_MODEL"), "{said}");
    assert!(said.contains("stable-diffusion-v1-5/stable-diffusion-v1-5"), "{said}");
    // As if it had been pulled.
    let repo = desk.machine.path("hf/hub/models--stable-diffusion-v1-5--stable-diffusion-v1-5");
    let snapshot = repo.join("snapshots").join(COMMIT);
    fs::create_dir_all(snapshot.parent().unwrap()).unwrap();
    std::os::unix::fs::symlink(golden("models/sd1"), &snapshot).unwrap();
    for name in ["sd15", "stable-diffusion-v1-5/stable-diffusion-v1-5"] {
        let shown = desk.ok(&["models", "show", name]).stdout;
        assert!(shown.starts_with("sd15: Stable Diffusion 1.5\n"), "{shown}");
        assert!(shown.contains("dpmpp_2m_karras") && shown.contains("hf cache"), "{shown}");
    }
    let refused = desk.run(&["models", "remove", "sd15", "--yes"]);
    assert_eq!(refused.code, Some(2), "{}", refused.stderr);
    assert!(refused.stderr.contains("not pulled or imported"), "{}", refused.stderr);
    let refused = desk.run(&["models", "remove", "genvideo-tiny-t2i", "--yes"]);
    assert!(refused.stderr.contains("part of the program"), "{}", refused.stderr);
}

#[test]
fn files_and_folders_are_imported_under_a_name() {
    let desk = Desk::new();
    let file = desk.machine.path("work/download.safetensors");
    fs::copy(golden("single_file/sd1.safetensors"), &file).unwrap();
    let folder = golden("models/sd1");
    let folder = folder.to_str().unwrap();
    let (models, file) = (desk.machine.path("data/models"), file.to_str().unwrap());
    let cases: &[(&[&str], &str, &str)] = &[
        (&[file], "download", "download.safetensors"),
        (&["download.safetensors", "--name", "mine"], "mine", "mine.safetensors"),
        (&[file, "--name", "linked", "--link"], "linked", "linked.safetensors"),
        (&[folder], "sd1", "sd1"),
        (&[folder, "--name", "here", "--link"], "here", "here"),
    ];
    for (arguments, name, path) in cases {
        let answer = desk.ok(&[&["models", "import"], *arguments].concat());
        assert_eq!(answer.stdout.trim(), models.join(path).to_str().unwrap());
        assert!(answer.stderr.contains(&format!("--image-model {name}")), "{}", answer.stderr);
        desk.ok(&["models", "verify", name]);
        let again = desk.run(&[&["models", "import"], *arguments].concat());
        assert_eq!(again.code, Some(1), "the name is taken: {}", again.stderr);
    }
    let job = ["render", "a fox", "--job", "image", "--size", "64x64", "--steps", "1"];
    let exact = ["--size-policy", "exact", "--image-model"];
    desk.ok(&[&job[..], &exact, &["sd1"]].concat());
    let linked: Vec<bool> = ["linked.safetensors", "here", "mine.safetensors", "sd1"]
        .iter()
        .map(|name| models.join(name).is_symlink())
        .collect();
    assert_eq!(linked, [true, true, false, false]);
    for (_, name, _) in cases {
        desk.ok(&["models", "remove", name, "--yes"]);
    }
    assert_eq!(fs::read_dir(&models).unwrap().count(), 0);
    assert!(Path::new(file).is_file() && golden("models/sd1/unet/config.json").is_file());
}

#[test]
fn what_is_no_model_is_not_imported() {
    let desk = Desk::new();
    let pickle = desk.machine.path("work/old.ckpt");
    fs::write(&pickle, b"\x80\x02}q\x00.").unwrap();
    let renamed = desk.machine.path("work/renamed.safetensors");
    fs::write(&renamed, b"PK\x03\x04 and more of it").unwrap();
    let part = golden("models/sd1/vae/diffusion_pytorch_model.safetensors");
    let checkpoint = golden("single_file/sd1.safetensors");
    let checkpoint = checkpoint.to_str().unwrap();
    let bare = desk.machine.path("work/bare");
    for file in ["model_index.json", "unet/config.json", "vae/config.json"] {
        fs::create_dir_all(bare.join(file).parent().unwrap()).unwrap();
        fs::copy(golden("models/sd1").join(file), bare.join(file)).unwrap();
    }
    let cases: &[(&[&str], i32, &str)] = &[
        (&[bare.to_str().unwrap()], 4, "MISSING_WEIGHTS"),
        (&[pickle.to_str().unwrap()], 4, "UNSUPPORTED_WEIGHTS"),
        (&[renamed.to_str().unwrap()], 4, "UNSUPPORTED_WEIGHTS"),
        (&[part.to_str().unwrap()], 4, "UNSUPPORTED_WEIGHTS"),
        (&["nowhere.safetensors"], 4, "MISSING_WEIGHTS"),
        (&["."], 4, "MISSING_WEIGHTS"),
        (&[checkpoint, "--name", "../out"], 4, "CONFIG_OUT_OF_RANGE"),
        (&[checkpoint, "--name", "a/b"], 4, "CONFIG_OUT_OF_RANGE"),
    ];
    for (arguments, exit, code) in cases {
        let command = desk.command(&[&["models", "import", "--json"], *arguments].concat());
        let (found_exit, found, said) = desk.refused(command);
        assert_eq!((found_exit, found.as_str()), (*exit, *code), "{arguments:?} {said}");
    }
    assert!(!desk.machine.path("data/models").exists(), "nothing came of it");
}
