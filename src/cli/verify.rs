//! `genvideo verify`: a result made again from its receipt, and compared step by step.

use std::path::{Path, PathBuf};

use serde::Serialize;

use super::failure::Failure;
use super::output::{self, Output};
use super::render::work_beside;
use super::session;
use super::track::Track;
use crate::config::Config;
use crate::render::receipt::{MAX_RECEIPT_BYTES, Receipt};
use crate::render::verify::{Difference, Verdict};

/// Flags of `verify`.
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    /// The `.receipt.json` beside a result
    #[arg(value_name = "RECEIPT")]
    receipt: PathBuf,
}

/// The name `verify` gives its work in JSON.
const ID: &str = "verify";

#[derive(Serialize)]
struct Verified<'a> {
    event: &'static str,
    equal: bool,
    #[serde(flatten)]
    verdict: &'a Verdict,
}

/// Makes the result again and compares.
pub(crate) async fn verify(
    args: Args,
    config: &Config,
    output: &mut Output,
) -> Result<(), Failure> {
    let receipt = read(&args.receipt)?;
    let renderer = session::renderer(config, session::store(config)?);
    let track = Track::new(&receipt.plan);
    let verdict =
        work_beside(ID, track, output, move |hook| renderer.verify(&receipt, hook)).await?;
    let equal = verdict.mismatch.is_none();
    output.object(&Verified { event: "verified", equal, verdict: &verdict });
    let Verdict { mismatch, differences, steps, chunks, files } = verdict;
    match mismatch {
        None => {
            differences.iter().for_each(|found| output::note(&format!("note: {found}")));
            output.line(&format!("equal: {steps} steps, {chunks} decoded chunks, {files} files"));
            Ok(())
        }
        Some(mismatch) => Err(differs(&mismatch.to_string(), &differences)),
    }
}

fn differs(what: &str, differences: &[Difference]) -> Failure {
    let mut message = what.to_owned();
    for found in differences {
        message.push_str(&format!("; {found}"));
    }
    let failure = Failure::new(super::failure::exit::FAILED, "DIFFERS", message);
    failure.hint(if differences.is_empty() {
        "device, threads, versions and models are those of the receipt: it was edited, or the \
         hardware makes mistakes"
    } else {
        "bytes are the same where version, device and number type are the same"
    })
}

/// The receipt in the file at `path`.
pub(crate) fn read(path: &Path) -> Result<Receipt, Failure> {
    use std::io::Read;
    let most = u64::try_from(MAX_RECEIPT_BYTES).unwrap_or(u64::MAX);
    let mut bytes = Vec::new();
    std::fs::File::open(path)
        .and_then(|file| file.take(most + 1).read_to_end(&mut bytes))
        .map_err(|error| {
            Failure::usage(format!("cannot read `{}`: {error}", path.display()))
                .hint("a receipt is the `.receipt.json` beside a result")
        })?;
    Ok(Receipt::read(&bytes)?)
}
