//! `genvideo inspect`: what a file is and contains.

use std::path::PathBuf;

use super::failure::Failure;
use super::output::Output;
use crate::engine::inspect::{Contents, Kind};
use crate::render::inspect::{Generation, Inspected, inspect as look};

/// Flags of `inspect`.
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    /// A `.safetensors` file, a PNG or an mp4
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// Name every tensor with its type and shape
    #[arg(long)]
    keys: bool,
}

/// Prints what the file is.
pub(crate) fn inspect(args: &Args, output: &mut Output) -> Result<(), Failure> {
    let found = look(&args.file)?;
    output.object(&found);
    if output.is_json() {
        return Ok(());
    }
    match &found {
        Inspected::Weights(contents) => weights(contents, args.keys, output),
        Inspected::Png { width, height, generation, texts } => {
            output.line(&format!("PNG, {width}x{height}"));
            made(generation.as_ref(), texts.len(), output);
        }
        Inspected::Mp4 { width, height, frames, fps, duration, codec, generation, texts } => {
            output.line(&format!(
                "mp4, {width}x{height}, {frames} frames at {fps:.3} per second, {duration:.2} s, {codec}"
            ));
            made(generation.as_ref(), texts.len(), output);
        }
    }
    Ok(())
}

fn weights(contents: &Contents, keys: bool, output: &mut Output) {
    match &contents.kind {
        Kind::Checkpoint { family, prediction, zero_snr, parts, strays } => {
            output.line(&format!("checkpoint of {family}"));
            let zero = if *zero_snr { ", zero terminal SNR" } else { "" };
            row("prediction", &format!("{prediction}{zero}"), output);
            row("parts", &parts.join(", "), output);
            row("strays", &format!("{strays} tensors belong to no part"), output);
        }
        Kind::Lora { family, layout, parts, modules, ranks } => {
            output.line(&format!("LoRA for {family}"));
            row("layout", layout, output);
            row("changes", &format!("{modules} weights of {}", parts.join(", ")), output);
            let ranks: Vec<String> = ranks.iter().map(usize::to_string).collect();
            row("ranks", &ranks.join(", "), output);
        }
        Kind::Other { note } => output.line(note),
    }
    let dtypes: Vec<String> =
        contents.dtypes.iter().map(|(name, count)| format!("{count} {name}")).collect();
    row("tensors", &format!("{} ({})", contents.tensors, dtypes.join(", ")), output);
    row("parameters", &contents.parameters.to_string(), output);
    for (key, value) in &contents.metadata {
        let short: String = value.chars().take(120).flat_map(char::escape_debug).collect();
        row(key, &short, output);
    }
    if keys {
        for (name, shape) in &contents.keys {
            output.line(&format!("  {name}  {shape}"));
        }
    }
}

fn made(generation: Option<&Generation>, texts: usize, output: &mut Output) {
    let Some(made) = generation else {
        return output.line(&format!("how it was made is not told ({texts} texts)"));
    };
    row("made by", made.tool, output);
    row("prompt", &made.prompt, output);
    if !made.negative.is_empty() {
        row("negative", &made.negative, output);
    }
    for (key, value) in &made.settings {
        row(key, value, output);
    }
}

fn row(name: &str, value: &str, output: &mut Output) {
    output.line(&format!("  {name:<12}  {value}"));
}
