//! `genvideo clean`: remove what no job needs any more, and results that are old enough.

use serde::Serialize;

use super::failure::Failure;
use super::output::Output;
use super::session;
use crate::config::Config;
use crate::store::{Ages, Swept};

/// Flags of `clean`.
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    /// Remove nothing, only say what would go
    #[arg(long)]
    dry_run: bool,
    /// Remove results older than this many days too [default: as `keep_results` says]
    #[arg(long, value_name = "DAYS", value_parser = clap::value_parser!(u32).range(1..))]
    results_older_than: Option<u32>,
}

#[derive(Serialize)]
struct Cleaned {
    event: &'static str,
    dry_run: bool,
    results: u64,
    blobs: u64,
    temp_files: u64,
    work_folders: u64,
    bytes: u64,
}

/// Sweeps the store once. Safe beside workers: what a running job needs stays.
pub(crate) fn clean(args: &Args, config: &Config, output: &mut Output) -> Result<(), Failure> {
    let days = |days: u32| std::time::Duration::from_secs(86_400 * u64::from(days));
    let ages = session::ages(config);
    let ages = Ages { results: args.results_older_than.map(days).or(ages.results), ..ages };
    let swept = session::store(config)?.sweep_with(&ages, args.dry_run)?;
    let Swept { results, temp_files, work_folders, blobs, bytes } = swept;
    let verb = if args.dry_run { "would remove" } else { "removed" };
    output.line(&format!(
        "{verb} {results} results, {blobs} files of results, {temp_files} temporary files ({} MiB), the work of \
         {work_folders} jobs",
        bytes.div_ceil(1 << 20)
    ));
    output.object(&Cleaned {
        event: "cleaned",
        dry_run: args.dry_run,
        results,
        blobs,
        temp_files,
        work_folders,
        bytes,
    });
    Ok(())
}
