//! A worker's death, reported by who watched over it: the attempts it had in hand go back to the server at once.
//!
//! Without the report the server waits for the heartbeat timeout; what follows is the same.

use temporalio_client::{ActivityIdentifier, RpcOptions};
use temporalio_common::error::ApplicationFailure;
use temporalio_common::protos::TaskToken;

use super::{CONNECT_TIMEOUT, Error, Jobs};
use crate::worker::at_work::Task;
use crate::worker::failure::WORKER_DIED;

impl Jobs {
    /// Fails the attempt as one that ended with its worker, who died of `cause`; the next one may begin.
    ///
    /// # Errors
    /// When the server does not take it: the attempt may be over, or the server away.
    pub async fn worker_died(&self, task: &Task, cause: &str) -> Result<(), Error> {
        let token = bytes(&task.token)
            .ok_or_else(|| Error::Temporal(format!("`{}` is no task token", task.token)))?;
        let failure = ApplicationFailure::builder(format!("the worker died: {cause}"))
            .type_name(WORKER_DIED.to_owned())
            .build();
        let details = task.beat.clone().map(|mut beat| {
            beat.death = Some(cause.to_owned());
            beat
        });
        let options = RpcOptions::builder().timeout(CONNECT_TIMEOUT).build();
        self.client
            .get_async_activity_handle(ActivityIdentifier::from_task_token(TaskToken::from(token)))
            .fail(failure, details, options)
            .await
            .map_err(|error| Error::Temporal(error.to_string()))
    }
}

/// The bytes that a text of hex digits stands for.
fn bytes(hex: &str) -> Option<Vec<u8>> {
    let pairs = hex.as_bytes().chunks(2);
    pairs.map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()).collect()
}
