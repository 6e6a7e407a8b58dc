//! What this process is at work on, told to whoever watches over it, so that its death can be laid to the right job.
//!
//! A process dies as one, so there is one listener for it: set with [`tell`], called from the activities' own tasks.
//! The listener keeps a [`Desk`], and when the process is gone the desk says which attempts went with it and what the
//! next ones need to know.

use std::collections::BTreeMap;
use std::sync::OnceLock;

use serde::{Deserialize, Serialize};
use temporalio_sdk::activities::ActivityContext;

use super::heartbeat::Beat;
use crate::store::hex;

/// What a worker says of itself; one JSON object a line between the two processes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "news", rename_all = "snake_case")]
pub enum News {
    /// It runs; said every second.
    Alive,
    /// An attempt has begun, or has something new to say to the next one.
    At(Task),
    /// The attempt with this token is over.
    Over {
        /// See [`Task::token`].
        token: String,
    },
}

/// One attempt at one stage of a job.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Task {
    /// The server's token of the attempt, in hex.
    pub token: String,
    /// Workflow id of the job.
    pub job: String,
    /// Name of the activity.
    pub stage: String,
    /// Which attempt, from 1.
    pub attempt: u32,
    /// Heartbeat details as of now; `None` for stages that keep none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub beat: Option<Beat>,
}

/// The attempts a worker has in hand, as far as it has said.
#[derive(Clone, Debug, Default)]
pub struct Desk(BTreeMap<String, Task>);

impl Desk {
    /// Takes in what the worker says.
    pub fn hear(&mut self, news: News) {
        match news {
            News::Alive => {}
            News::At(task) => {
                self.0.insert(task.token.clone(), task);
            }
            News::Over { token } => {
                self.0.remove(&token);
            }
        }
    }

    /// The attempts at work; none afterwards.
    pub fn clear(&mut self) -> Vec<Task> {
        std::mem::take(&mut self.0).into_values().collect()
    }
}

type Listener = Box<dyn Fn(&News) + Send + Sync>;

static LISTENER: OnceLock<Listener> = OnceLock::new();

/// From now on `listener` hears what this process is at work on. The first one stays.
pub fn tell(listener: impl Fn(&News) + Send + Sync + 'static) {
    // Nobody else listens in a process of one worker.
    LISTENER.set(Box::new(listener)).ok();
}

/// An attempt for as long as it is at work.
pub(super) struct Entry {
    task: Task,
}

impl Entry {
    /// The attempt of `ctx` begins.
    pub(super) fn begin(ctx: &ActivityContext, beat: Option<&Beat>) -> Self {
        let info = ctx.info();
        let task = Task {
            token: hex(&info.task_token),
            job: info.workflow_id.clone().unwrap_or_default(),
            stage: info.activity_type.clone(),
            attempt: info.attempt,
            beat: None,
        };
        let mut entry = Self { task };
        entry.note(beat);
        entry
    }

    /// What the next attempt should know.
    pub(super) fn note(&mut self, beat: Option<&Beat>) {
        if let Some(listener) = LISTENER.get() {
            self.task.beat = beat.cloned();
            listener(&News::At(self.task.clone()));
        }
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        if let Some(listener) = LISTENER.get() {
            listener(&News::Over { token: self.task.token.clone() });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_desk_holds_what_is_begun_and_not_over() {
        let task = |token: &str, attempt| Task {
            token: token.to_owned(),
            job: "job".to_owned(),
            stage: "gen_image".to_owned(),
            attempt,
            beat: Some(Beat::default()),
        };
        let mut desk = Desk::default();
        for news in [
            News::At(task("a", 1)),
            News::Alive,
            News::At(task("b", 1)),
            News::At(task("a", 2)),
            News::Over { token: "b".to_owned() },
        ] {
            let line = serde_json::to_string(&news).unwrap();
            desk.hear(serde_json::from_str(&line).unwrap());
        }
        assert_eq!(desk.clear(), [task("a", 2)]);
        assert_eq!(desk.clear(), []);
    }
}
