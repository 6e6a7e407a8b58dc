//! Signals to a job that runs: approve of its image or not, pause and resume.
//!
//! A signal is taken by the server and carried out by the workflow; what comes of it, the status tells.

use serde_json::{Value, json};
use temporalio_client::{UntypedSignal, WorkflowSignalOptions};
use temporalio_common::data_converters::{PayloadConverter, RawValue};

use super::{Error, Jobs, follow, status_of};
use crate::job::{SIGNAL_APPROVE, SIGNAL_PAUSE, SIGNAL_REJECT, SIGNAL_REPLACE, SIGNAL_RESUME};

impl Jobs {
    /// Lets a job with `approve` go on after its image.
    pub async fn approve(&self, id: &str) -> Result<(), Error> {
        self.tell(id, SIGNAL_APPROVE, None).await
    }

    /// Ends a job with `approve`, and says why.
    pub async fn reject(&self, id: &str, reason: Option<&str>) -> Result<(), Error> {
        self.tell(id, SIGNAL_REJECT, reason.map(|reason| json!({"reason": reason}))).await
    }

    /// Gives a job with `approve` the image of the store with this id instead of its own, and approves of it at once
    /// where `approve` says so.
    pub async fn replace_image(&self, id: &str, image: &str, approve: bool) -> Result<(), Error> {
        let argument = json!({"image": image, "approve": approve});
        self.tell(id, SIGNAL_REPLACE, Some(argument)).await
    }

    /// Stops a job where it is, until it is told to go on.
    pub async fn pause(&self, id: &str) -> Result<(), Error> {
        self.tell(id, SIGNAL_PAUSE, None).await
    }

    /// Lets a paused job go on.
    pub async fn resume(&self, id: &str) -> Result<(), Error> {
        self.tell(id, SIGNAL_RESUME, None).await
    }

    async fn tell(&self, id: &str, signal: &str, argument: Option<Value>) -> Result<(), Error> {
        let described = self.describe(id).await?;
        if !follow::is_open(&described) {
            return Err(Error::Ended { id: id.to_owned(), status: status_of(described.status()) });
        }
        let argument = argument.map_or_else(RawValue::default, |argument| {
            RawValue::from_value(&argument, &PayloadConverter::default())
        });
        let signal = UntypedSignal::new(signal);
        let options = WorkflowSignalOptions::default();
        let sent = self.handle(id).signal(signal, argument, options).await;
        sent.map_err(|error| self.trouble(id, error))
    }
}
