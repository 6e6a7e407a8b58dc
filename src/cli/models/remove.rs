//! `genvideo models remove`: away with a model that a pull or an import put here, and with nothing else.

use std::io::{self, BufRead, IsTerminal};

use serde::Serialize;

use super::super::failure::Failure;
use super::super::output::{self, Output};
use super::super::session;
use crate::config::Config;
use crate::hub::Source;
use crate::hub::installed::Installed;
use crate::hub::pull::size;

/// Flags of `remove`.
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    /// The model's name
    #[arg(value_name = "NAME")]
    name: String,
    /// Do not ask
    #[arg(long, short)]
    yes: bool,
}

#[derive(Serialize)]
struct Removed<'a> {
    event: &'static str,
    name: &'a str,
    files: usize,
    bytes: u64,
}

/// Asks, then removes the model's files.
pub(super) fn remove(args: &Args, config: &Config, output: &mut Output) -> Result<(), Failure> {
    let library = session::library(config);
    let Some(found) = library.installed(&args.name)? else {
        let Some(model) = library.get(&args.name)? else {
            return Err(super::show::missing(&library, &args.name));
        };
        let name = &model.name;
        let refused = match model.source {
            Source::Embedded => Failure::usage(format!("`{name}` is part of the program")),
            _ => Failure::usage(format!(
                "`{name}` was not pulled or imported by genvideo, and stays in {}",
                model.folder.display()
            ))
            .hint("remove it with the program that put it there"),
        };
        return Err(refused);
    };
    let (files, bytes) = extent(&found);
    if !args.yes {
        confirm(&found)?;
    }
    found.remove()?;
    let name = &found.name;
    output.object(&Removed { event: "removed", name, files, bytes });
    output.line(&format!("removed {name}: {files} files, {}", size(bytes)));
    Ok(())
}

/// How many files go, and their bytes.
fn extent(found: &Installed) -> (usize, u64) {
    (found.own_files().count(), found.own_files().map(|file| file.bytes).sum())
}

/// Asks on a terminal; elsewhere somebody has to have said so.
fn confirm(found: &Installed) -> Result<(), Failure> {
    let (name, folder) = (&found.name, found.folder());
    let (files, bytes) = extent(found);
    let what = format!("{files} files, {}", size(bytes));
    if !io::stdin().is_terminal() {
        return Err(Failure::usage(format!("removing `{name}` ({what}) asks first"))
            .hint("`--yes` says that it is meant"));
    }
    output::note(&format!("remove `{name}`, {what}, from {}? [y/N]", folder.display()));
    let mut answer = String::new();
    // A terminal that is gone has not said yes.
    let _ = io::stdin().lock().read_line(&mut answer);
    if matches!(answer.trim().to_lowercase().as_str(), "y" | "yes") {
        return Ok(());
    }
    Err(Failure::interrupted("nothing was removed"))
}
