//! `genvideo approve`, `reject`, `replace-image`, `pause` and `resume`: a word to one job, and where it is after it.

use std::path::Path;

use super::failure::Failure;
use super::output::Output;
use super::session::{self, Session};
use super::{request, status};
use crate::config::Config;
use crate::job::validate;

/// Flags of `approve`, `pause` and `resume`.
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    /// The job
    #[arg(value_name = "ID")]
    id: String,
}

/// Flags of `reject`.
#[derive(clap::Args, Debug)]
pub(crate) struct RejectArgs {
    /// The job
    #[arg(value_name = "ID")]
    id: String,
    /// Why, for the job's last message
    #[arg(long, value_name = "TEXT")]
    reason: Option<String>,
}

/// Flags of `replace-image`.
#[derive(clap::Args, Debug)]
pub(crate) struct ReplaceArgs {
    /// The job
    #[arg(value_name = "ID")]
    id: String,
    /// A PNG, JPEG or WebP file, or the sha256 of an image that is in the store
    #[arg(value_name = "IMAGE")]
    image: String,
    /// Go on with it at once
    #[arg(long)]
    approve: bool,
}

/// What the job is told.
#[derive(Debug)]
pub(crate) enum Word {
    Approve(Args),
    Reject(RejectArgs),
    ReplaceImage(ReplaceArgs),
    Pause(Args),
    Resume(Args),
}

impl Word {
    fn id(&self) -> &str {
        match self {
            Self::Approve(args) | Self::Pause(args) | Self::Resume(args) => &args.id,
            Self::Reject(args) => &args.id,
            Self::ReplaceImage(args) => &args.id,
        }
    }
}

/// Tells the job, and prints where it is then.
pub(crate) async fn steer(word: Word, config: &Config, output: &mut Output) -> Result<(), Failure> {
    let image = match &word {
        Word::ReplaceImage(args) => Some(image(&args.image, config)?),
        _ => None,
    };
    let session = Session::open(config).await?;
    let done = async {
        let (jobs, id) = (&session.jobs, word.id());
        match &word {
            Word::Approve(_) => jobs.approve(id).await?,
            Word::Reject(args) => jobs.reject(id, args.reason.as_deref()).await?,
            Word::ReplaceImage(args) => {
                jobs.replace_image(id, image.as_deref().unwrap_or_default(), args.approve).await?;
            }
            Word::Pause(_) => jobs.pause(id).await?,
            Word::Resume(_) => jobs.resume(id).await?,
        }
        jobs.status(id).await
    };
    let done = done.await;
    session.close().await;
    status::print(word.id(), &done?, output);
    Ok(())
}

/// The id of the image: as it was typed, or that of the file, which goes to the store.
fn image(typed: &str, config: &Config) -> Result<String, Failure> {
    if validate::is_id(typed) && !Path::new(typed).exists() {
        return Ok(typed.to_owned());
    }
    request::import(&session::store(config)?, Path::new(typed))
}
