//! `genvideo replay`: a new job from the request in a receipt, with what is to be different.

use std::path::PathBuf;

use serde_json::Value;

use super::failure::Failure;
use super::output::Output;
use super::request::{Request, default_user};
use super::run::{Handling, start};
use super::session;
use super::verify::read;
use crate::config::Config;

/// Flags of `replay`.
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    /// The `.receipt.json` beside a result
    #[arg(value_name = "RECEIPT")]
    receipt: PathBuf,
    /// Field of the request to change, such as `steps=30`; may be given several times. `null` takes it away
    #[arg(long, value_name = "FIELD=VALUE", value_parser = parse_change)]
    set: Vec<(String, Value)>,
    /// Whose job it is; a label, never written into files [default: $USER]
    #[arg(long, value_name = "NAME")]
    user: Option<String>,
    #[command(flatten)]
    handling: Handling,
}

/// Starts the changed job.
pub(crate) async fn replay(
    args: Args,
    config: &Config,
    output: &mut Output,
) -> Result<(), Failure> {
    let receipt = read(&args.receipt)?;
    let mut fields = receipt.pinned_request();
    fields.insert("seed".to_owned(), receipt.seed.into());
    // Nobody waits for its image; `--set approve=true` asks for it again.
    fields.remove("approve");
    fields.insert("user_id".to_owned(), args.user.unwrap_or_else(default_user).into());
    fields.extend(args.set);
    let request = Request::of(&fields)?;
    start(request, args.handling, session::store(config)?, config, output).await
}

/// `FIELD=VALUE`; a value that is no JSON is text.
fn parse_change(text: &str) -> Result<(String, Value), String> {
    match text.split_once('=') {
        Some((field, value)) if !field.is_empty() => {
            let value = serde_json::from_str(value).unwrap_or_else(|_| value.into());
            Ok((field.to_owned(), value))
        }
        _ => Err("wanted FIELD=VALUE, for example `steps=30`".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::parse_change;

    #[test]
    fn a_value_is_json_or_else_text() {
        for (text, field, value) in [
            ("steps=30", "steps", json!(30)),
            ("prompt=a red apple", "prompt", json!("a red apple")),
            ("prompt=\"30\"", "prompt", json!("30")),
            ("prompt=a=b", "prompt", json!("a=b")),
            ("prompt=", "prompt", json!("")),
            ("seed=18446744073709551615", "seed", json!(u64::MAX)),
            ("seed=null", "seed", json!(null)),
            ("loras=[{\"name\":\"a\"}]", "loras", json!([{"name": "a"}])),
        ] {
            assert_eq!(parse_change(text), Ok((field.to_owned(), value)), "{text}");
        }
        assert!(parse_change("steps").is_err());
        assert!(parse_change("=3").is_err());
    }
}
