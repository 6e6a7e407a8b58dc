//! `genvideo doctor`: everything the main job needs, looked at one by one, each with what mends it.

use std::io;
use std::path::Path;

use serde::Serialize;

use super::failure::{Failure, exit};
use super::output::Output;
use super::session;
use crate::client::{Jobs, Target};
use crate::config::{self, Config, Origin};
use crate::devserver;
use crate::engine::device;
use crate::hub::{Library, Source, Task};
use crate::job::class::ErrorClass;
use crate::render;
use crate::store::{self, Store};

/// Flags of `doctor`.
#[derive(clap::Args, Debug)]
pub(crate) struct Args {}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Verdict {
    Ok,
    /// Something to know; the main job runs all the same.
    Note,
    Fail,
}

/// One thing looked at.
#[derive(Debug, Serialize)]
struct Check {
    check: &'static str,
    verdict: Verdict,
    detail: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    fix: Option<String>,
    /// What the process ends with when this is the first to fail.
    #[serde(skip)]
    exit: u8,
}

impl Check {
    fn ok(check: &'static str, detail: impl Into<String>) -> Self {
        Self { check, verdict: Verdict::Ok, detail: detail.into(), fix: None, exit: 0 }
    }

    fn note(check: &'static str, detail: impl Into<String>, fix: impl Into<String>) -> Self {
        Self {
            check,
            verdict: Verdict::Note,
            detail: detail.into(),
            fix: Some(fix.into()),
            exit: 0,
        }
    }

    fn failed(check: &'static str, failure: Failure, fix: &str) -> Self {
        let fix = failure.hint.unwrap_or_else(|| fix.to_owned());
        Self {
            check,
            verdict: Verdict::Fail,
            detail: failure.message,
            fix: Some(fix),
            exit: failure.exit,
        }
    }

    fn print(&self, output: &mut Output) {
        output.object(self);
        let mark = match self.verdict {
            Verdict::Ok => "ok",
            Verdict::Note => "note",
            Verdict::Fail => "FAIL",
        };
        output.line(&format!("{mark:<4}  {:<11}  {}", self.check, self.detail));
        if let Some(fix) = &self.fix {
            output.line(&format!("{:<19}fix: {fix}", ""));
        }
    }
}

/// Looks at everything; ends with the exit code of the first thing that is in the way.
pub(crate) async fn doctor(
    _args: Args,
    config: &Config,
    output: &mut Output,
) -> Result<(), Failure> {
    let mut checks = vec![
        settings(config),
        folder("data", &config.data_dir, "data_dir"),
        folder("cache", &config.cache_dir, "cache_dir"),
        store(config),
        compute(config),
    ];
    checks.extend(models(config));
    checks.push(encoder());
    checks.push(temporal(config).await);
    checks.push(Check::ok(
        "network",
        "offline: only the Temporal server is talked to, and the hub by `models pull`",
    ));
    for check in &checks {
        check.print(output);
    }
    let failed: Vec<&Check> =
        checks.iter().filter(|check| check.verdict == Verdict::Fail).collect();
    let Some(first) = failed.first() else { return Ok(()) };
    let names: Vec<&str> = failed.iter().map(|check| check.check).collect();
    Err(Failure::new(
        first.exit,
        "DOCTOR",
        format!("the main job cannot run here: {}", names.join(", ")),
    ))
}

/// Which settings are not the built-in ones, and who said so.
fn settings(config: &Config) -> Check {
    let set = config.origins().iter().filter(|setting| setting.origin != Origin::Default);
    let set: Vec<String> =
        set.map(|setting| format!("{} from {}", setting.key, setting.origin)).collect();
    Check::ok(
        "settings",
        if set.is_empty() { "all at their defaults".to_owned() } else { set.join("; ") },
    )
}

fn compute(config: &Config) -> Check {
    let fix = "`--device cpu` works everywhere";
    match device::open(&config.device, &config.dtype) {
        Ok(compute) => {
            let detail = format!("{}, {}", compute.name(), compute.dtype_name());
            match compute.fallback() {
                Some(reason) => Check::note(
                    "device",
                    format!("{detail}; {reason}"),
                    "a GPU is used by a build with `--features cudnn` or `--features metal`",
                ),
                None => Check::ok("device", detail),
            }
        }
        Err(error) => Check {
            exit: ErrorClass::DeviceError.exit_code(),
            ..Check::failed("device", render::Error::from(error).into(), fix)
        },
    }
}

fn models(config: &Config) -> Vec<Check> {
    let library = session::library(config);
    let mut checks = vec![
        model(&library, "image model", config.image_model.as_deref(), Task::TextToImage),
        model(&library, "video model", config.video_model.as_deref(), Task::ImageToVideo),
    ];
    let (models, broken) = library.scan();
    let names: Vec<&str> = models.iter().map(|model| model.name.as_str()).collect();
    checks.push(Check::ok("models", names.join(", ")));
    checks.extend(broken.into_iter().map(|broken| {
        let fix = "mend it, or move it out of the models folder";
        Check::note("models", format!("`{}`: {}", broken.path.display(), broken.error), fix)
    }));
    checks
}

fn model(library: &Library, check: &'static str, name: Option<&str>, task: Task) -> Check {
    let found = match name {
        Some(name) => library.find(name, task),
        None => library.default(task),
    };
    match found {
        Ok(model) => {
            let built_in = if matches!(model.source, Source::Embedded) {
                " (built in, for demonstration)"
            } else {
                ""
            };
            Check::ok(check, format!("`{}`{built_in} in {}", model.name, model.folder.display()))
        }
        Err(error) => {
            Check::failed(check, render::Error::from(error).into(), "name a model that is there")
        }
    }
}

/// Tried in a store of its own, so that a data folder out of order is no fault of the encoder.
fn encoder() -> Check {
    let fix = "install ffmpeg's libraries with libx264 and build again";
    let tried = || -> Result<String, Failure> {
        let folder = tempfile::tempdir().map_err(|error| {
            Failure::of(ErrorClass::OutputUnwritable, format!("no temporary folder: {error}"))
        })?;
        Ok(render::check_encoder(&Store::open(folder.path())?)?)
    };
    match tried() {
        Ok(name) => Check::ok("video codec", name),
        Err(failure) => Check::failed("video codec", failure, fix),
    }
}

async fn temporal(config: &Config) -> Check {
    if let Some(address) = &config.temporal_address {
        let target = Target { address: address.clone(), namespace: config.namespace.clone() };
        return match Jobs::connect(&target).await {
            Ok(_) => Check::ok(
                "temporal",
                format!("server at {address}, namespace `{}`", config.namespace),
            ),
            Err(error) => Check::failed(
                "temporal",
                error.into(),
                "set TEMPORAL_ADDRESS to a server that runs",
            ),
        };
    }
    let found = match devserver::find(config.temporal_cli.as_deref(), &config.cache_dir) {
        Ok(found) => found,
        Err(error) => return Check::failed("temporal", error.into(), "run scripts/setup"),
    };
    match version(&found).await {
        Ok(version) => {
            let server = devserver::is_running(&config.data_dir).map_or_else(
                || "starts when needed".to_owned(),
                |server| format!("runs at {}", server.address),
            );
            Check::ok(
                "temporal",
                format!("{version} in {}; the embedded server {server}", found.display()),
            )
        }
        Err(error) => {
            let failure = Failure::new(
                exit::UNREACHABLE,
                "UNREACHABLE",
                format!("`{}`: {error}", found.display()),
            );
            Check::failed(
                "temporal",
                failure,
                "run scripts/setup, or name another with `--temporal-cli FILE`",
            )
        }
    }
}

/// What the Temporal CLI says it is.
async fn version(program: &Path) -> io::Result<String> {
    let asked = tokio::process::Command::new(program).arg("--version").kill_on_drop(true).output();
    let answer = tokio::time::timeout(std::time::Duration::from_secs(20), asked)
        .await
        .map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "no answer"))??;
    if !answer.status.success() {
        return Err(io::Error::other(format!("`--version` ended with {}", answer.status)));
    }
    Ok(String::from_utf8_lossy(&answer.stdout).trim().to_owned())
}

/// A bucket is asked what a worker asks of it: a server that answers and creates objects for one writer only.
fn store(config: &Config) -> Check {
    let open = || {
        let store = session::store(config)?;
        store.temp_file(None, "").map(drop)
    };
    match open() {
        Ok(()) => Check::ok("store", config.store.display().to_string()),
        Err(error) => {
            let fix = match &error {
                store::Error::Unanswered { .. } => "start the server of the bucket, or choose",
                _ => "choose",
            };
            let variable = config::variable("store").unwrap_or("store");
            let fix = format!("{fix} another folder, or another bucket, with {variable}");
            Check::failed("store", Failure { hint: None, ..error.into() }, &fix)
        }
    }
}

fn folder(check: &'static str, folder: &Path, key: &str) -> Check {
    let variable = config::variable(key).unwrap_or(key);
    let writable = std::fs::create_dir_all(folder).and_then(|()| tempfile::tempfile_in(folder));
    match writable {
        Ok(_) => Check::ok(check, folder.display().to_string()),
        Err(error) => {
            let failure = Failure::new(
                exit::CONFIG,
                "CONFIG",
                format!("cannot write `{}`: {error}", folder.display()),
            );
            Check::failed(
                check,
                failure,
                &format!("make the folder writable, or choose another with {variable}"),
            )
        }
    }
}
