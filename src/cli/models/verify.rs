//! `genvideo models verify`: are the files what they were when they came.

use serde::Serialize;

use super::super::failure::{Failure, exit};
use super::super::output::{self, Output};
use super::super::session;
use crate::config::Config;
use crate::hub::installed::Fault;
use crate::hub::pull::size;
use crate::hub::{Library, Source};

/// Flags of `verify`.
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    /// One model; without it, all that were pulled or imported
    #[arg(value_name = "NAME")]
    name: Option<String>,
}

#[derive(Serialize)]
struct Row<'a> {
    name: &'a str,
    files: usize,
    faults: &'a [Bad],
}

#[derive(Serialize)]
struct Bad {
    path: std::path::PathBuf,
    what: String,
}

/// Compares sizes and hashes; ends with 1 when a file is not as it was.
pub(super) fn verify(args: &Args, config: &Config, output: &mut Output) -> Result<(), Failure> {
    let library = session::library(config);
    let names = match &args.name {
        Some(name) => vec![name.clone()],
        None => library.installed_names(),
    };
    if names.is_empty() && !output.is_json() {
        output::note("no model was pulled or imported");
    }
    let (mut bad, mut models) = (0, Vec::new());
    for name in &names {
        let (files, faults) = match check(&library, name) {
            Ok(checked) => checked,
            Err(failure) if args.name.is_some() => return Err(failure),
            // One that cannot be read keeps the others from nothing.
            Err(failure) => (0, vec![Fault { path: name.into(), what: failure.message }]),
        };
        if !faults.is_empty() {
            bad += faults.len();
            models.push(format!("`{name}`"));
        }
        let faults: Vec<Bad> =
            faults.into_iter().map(|Fault { path, what }| Bad { path, what }).collect();
        output.object(&Row { name, files, faults: &faults });
        for Bad { path, what } in &faults {
            output.line(&format!("BAD   {}: {what}", path.display()));
        }
        if faults.is_empty() {
            output.line(&format!("ok    {name}, {files} files"));
        }
    }
    if bad == 0 {
        return Ok(());
    }
    let files = if bad == 1 { "1 file is".to_owned() } else { format!("{bad} files are") };
    Err(Failure::new(exit::FAILED, "WEIGHTS_HASH", format!("{files} not as it was: {}", models.join(", ")))
        .hint("`genvideo models pull NAME` fetches bad files again; an imported model has to be imported again"))
}

/// How many files were compared, and which are bad.
fn check(library: &Library, name: &str) -> Result<(usize, Vec<Fault>), Failure> {
    if let Some(found) = library.installed(name)?
        && found.lock.is_some()
    {
        output::note(&format!("reading {name}, {}", size(found.bytes())));
        return Ok((found.files().len(), found.verify()));
    }
    let Some(model) = library.get(name)? else {
        return Err(super::show::missing(library, name));
    };
    match model.source {
        // Unpacking compares every file with the program's own.
        Source::Embedded => {
            library.find(name, model.task)?;
            Ok((library.built_in_files(name), Vec::new()))
        }
        Source::HfCache => Ok(library.verify_by_blobs(name)?),
        Source::Folder => Err(Failure::usage(format!(
            "`{name}` was put into {} by hand: there is nothing to compare it with",
            model.folder.display()
        ))
        .hint("`genvideo models import` writes down what a model's files are")),
    }
}
