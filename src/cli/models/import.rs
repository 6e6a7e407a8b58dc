//! `genvideo models import`: takes what the user has into the first models folder, once the engine has looked at it.

use std::path::{Path, PathBuf};

use serde::Serialize;

use super::super::failure::Failure;
use super::super::output::{self, Output};
use super::super::session;
use crate::config::Config;
use crate::engine::inspect::{Kind, contents};
use crate::hub::import::{Import, files_of, import as take};
use crate::hub::pull::size;
use crate::job::class::ErrorClass;
use crate::render;

/// Flags of `import`.
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    /// A checkpoint or LoRA in one `.safetensors` file, or a diffusers folder; on the same disk its files get a second
    /// name (a hard link) and take no more room, else they are copied. Either way the original may be removed
    #[arg(value_name = "PATH")]
    path: PathBuf,
    /// What to call it; without it, the name of the file or folder
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// Make a symbolic link only: the original must stay where it is
    #[arg(long)]
    link: bool,
}

#[derive(Serialize)]
struct Imported<'a> {
    event: &'static str,
    name: &'a str,
    kind: &'static str,
    path: &'a Path,
    files: usize,
    bytes: u64,
}

/// Imports the model and prints where it is.
pub(super) fn import(args: &Args, config: &Config, output: &mut Output) -> Result<(), Failure> {
    let library = session::library(config);
    let dir = library.import_dir().ok_or_else(|| {
        Failure::usage("no models folder is set").hint("name one with `--models-dir`")
    })?;
    let lora = is_lora(&args.path)?;
    let order =
        Import { source: args.path.clone(), name: args.name.clone(), link: args.link, lora };
    let found = take(dir, &order)?;
    let kind = if lora { "lora" } else { "model" };
    let (name, path, files, bytes) = (&found.name, &found.path, found.files, found.bytes);
    output.object(&Imported { event: "imported", name, kind, path, files, bytes });
    output.line(&path.display().to_string());
    if !output.is_json() {
        let use_it = match (lora, library.get(name)?) {
            (true, _) => format!("use it: genvideo run \"a lighthouse\" --lora {name}"),
            (false, Some(model)) => {
                format!("use it: genvideo run \"a lighthouse\" {} {name}", super::flag(model.task))
            }
            (false, None) => String::new(),
        };
        output::note(&format!("{files} files, {}; {use_it}", size(bytes)));
    }
    Ok(())
}

/// Looks at every weights file as the engine does before it loads one; says whether it is a LoRA.
fn is_lora(path: &Path) -> Result<bool, Failure> {
    let look =
        |path: &Path| contents(path).map_err(|error| Failure::from(render::Error::from(error)));
    if path.is_dir() {
        for file in files_of(path)?.iter().filter(|file| file.ends_with(".safetensors")) {
            look(&path.join(file))?;
        }
        return Ok(false);
    }
    match look(path)?.kind {
        Kind::Checkpoint { .. } => Ok(false),
        Kind::Lora { .. } => Ok(true),
        Kind::Other { note } => Err(Failure::of(
            ErrorClass::UnsupportedWeights,
            format!("`{}` is no checkpoint and no LoRA: {note}", path.display()),
        )
        .hint("a VAE or a LoRA of another tool goes into `vae` or `loras` below a models folder")),
    }
}
