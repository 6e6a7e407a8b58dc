//! `genvideo models pull`: fetches a model, with a bar on a terminal and a line a file elsewhere.

use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use super::super::failure::Failure;
use super::super::output::{self, Output};
use super::super::session;
use super::flag;
use crate::config::Config;
use crate::hub::manifest::is_repo;
use crate::hub::pull::{Hub, Step, pull as fetch, size};
use crate::hub::{Upstream, known};

/// Flags of `pull`.
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    /// A name that `models list` shows, or `organisation/name` of a repository on the hub
    #[arg(value_name = "NAME")]
    name: String,
    /// Branch, tag or commit
    #[arg(long, value_name = "REVISION")]
    revision: Option<String>,
    /// Weights of this kind where the repository has them, else the plain ones; without it mostly `fp16`; `none` takes
    /// the plain ones
    #[arg(long, value_name = "VARIANT")]
    variant: Option<String>,
}

#[derive(Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
enum Event<'a> {
    Planned { files: usize, bytes: u64, here: u64 },
    File { path: &'a str, bytes: u64, here: u64 },
    Again { path: &'a str, reason: &'a str },
    Pulled { name: &'a str, commit: &'a str, folder: &'a std::path::Path, files: usize, bytes: u64 },
}

/// Fetches what is missing, and prints where the model is.
pub(super) fn pull(args: &Args, config: &Config, output: &mut Output) -> Result<(), Failure> {
    let known = known::named(&args.name);
    let name = known.as_ref().map_or(args.name.as_str(), |known| known.name);
    let mut upstream = match &known {
        Some(known) => known.upstream.clone(),
        None => of_repository(&args.name)?,
    };
    if let Some(revision) = &args.revision {
        upstream.revision.clone_from(revision);
    }
    match args.variant.as_deref() {
        Some("none") => upstream.variant = None,
        Some(variant) => upstream.variant = Some(variant.to_owned()),
        None => {}
    }
    upstream.check().map_err(|error| Failure::usage(error.to_string()))?;
    if let Some(known) = &known
        && !output.is_json()
    {
        output::note(&format!("{}; licence: {}", known.manifest.title, known.manifest.licence));
    }
    let mut shown = Shown { bar: None, total: 0, number: 0 };
    let pulled = fetch(&hub(config), &upstream, &mut |step| shown.step(&step, output));
    if let Some(bar) = shown.bar.take() {
        bar.finish_and_clear();
    }
    let pulled = pulled?;
    let folder = &pulled.folder;
    let (commit, files, bytes) = (pulled.commit.as_str(), pulled.files, pulled.bytes);
    output.object(&Event::Pulled { name, commit, folder, files, bytes });
    output.line(&folder.display().to_string());
    if !output.is_json() {
        output::note(&format!("{files} files, {}, at commit {commit}", size(bytes)));
        if let Some(model) = session::library(config).get(name)? {
            let flag = flag(model.task);
            output::note(&format!("use it: genvideo run \"a lighthouse\" {flag} {name}"));
        }
    }
    Ok(())
}

fn of_repository(name: &str) -> Result<Upstream, Failure> {
    if is_repo(name) {
        return Ok(Upstream { variant: Some("fp16".to_owned()), ..Upstream::unknown(name) });
    }
    let names: Vec<String> = known::all().iter().map(|known| format!("`{}`", known.name)).collect();
    Err(Failure::usage(format!("`{name}` is no model that can be fetched by name")).hint(format!(
        "known are {}; or give `organisation/name` of a repository",
        names.join(", ")
    )))
}

/// Where the hub is, by the settings.
fn hub(config: &Config) -> Hub {
    let said = config.origins().iter().find(|setting| setting.key == "hf_offline");
    let offline = said.filter(|_| config.hf_offline);
    let token = config.hf_token.as_ref().map(|token| token.reveal().to_owned());
    let token = token.or_else(|| {
        let kept = std::fs::read_to_string(config.hf_home.join("token")).ok()?;
        Some(kept.trim().to_owned()).filter(|token| !token.is_empty())
    });
    Hub {
        endpoint: config.hf_endpoint.clone(),
        token,
        cache: config.hf_cache.clone(),
        offline: offline.map(|setting| format!("{} is on", setting.origin)),
    }
}

/// What the user sees of it.
struct Shown {
    bar: Option<ProgressBar>,
    total: usize,
    number: usize,
}

impl Shown {
    fn step(&mut self, step: &Step<'_>, output: &mut Output) {
        match step {
            Step::Waiting => output::note("another pull of it is at work; waiting for its end"),
            Step::Planned { files, bytes, here } => self.plan(*files, *bytes, *here, output),
            Step::File { path, bytes, here } => self.file(path, *bytes, *here, output),
            Step::Bytes(bytes) => {
                if let Some(bar) = &self.bar {
                    bar.inc(*bytes);
                }
            }
            Step::Again { path, reason } => {
                output.object(&Event::Again { path, reason });
                if !output.is_json() {
                    let path = if path.is_empty() { "the hub" } else { path };
                    output::note(&format!("{path}: {reason}; trying again"));
                }
            }
        }
    }

    fn plan(&mut self, files: usize, bytes: u64, here: u64, output: &mut Output) {
        output.object(&Event::Planned { files, bytes, here });
        self.total = files;
        if output.is_json() {
            return;
        }
        let there = if here > 0 { format!(", {} of them here", size(here)) } else { String::new() };
        output::note(&format!("{files} files, {}{there}", size(bytes)));
        if output::is_live() {
            let bar = output::bars().add(ProgressBar::new(bytes));
            let style = ProgressStyle::with_template(
                "{bar:30} {bytes}/{total_bytes} {bytes_per_sec} {eta} {wide_msg}",
            );
            bar.set_style(style.expect("the template is ours").progress_chars("=> "));
            bar.set_position(here);
            bar.reset_eta();
            self.bar = Some(bar);
        }
    }

    fn file(&mut self, path: &str, bytes: u64, here: u64, output: &mut Output) {
        output.object(&Event::File { path, bytes, here });
        self.number += 1;
        if let Some(bar) = &self.bar {
            bar.set_message(path.to_owned());
        } else if !output.is_json() {
            let width = self.total.to_string().len();
            let state = match here {
                0 => "",
                here if here == bytes => ", is here",
                _ => ", goes on",
            };
            let (number, total) = (self.number, self.total);
            output::note(&format!("{number:>width$}/{total}  {path}  {}{state}", size(bytes)));
        }
    }
}
