//! What this process is at work on, told to whoever watches over it, so that its death can be laid to the right job.
//!
//! A process dies as one, so there is one listener for it: set with [`tell`], called from the activities' own tasks.
//! The listener keeps a [`Desk`], and when the process is gone the desk says which attempts went with it and what the
//! next ones need to know.
//!
//! A death in company says nothing of who is to blame, so a stage that went down with its worker is on trial: its next
//! attempts have the process to themselves, until there is a checkpoint. Of three deaths in a row at most the first can
//! so have been somebody else's, and whoever waits meanwhile is not charged with any.

use std::collections::BTreeMap;
use std::sync::OnceLock;

use serde::{Deserialize, Serialize};
use temporalio_sdk::activities::ActivityContext;
use tokio::sync::{RwLock, RwLockReadGuard, RwLockWriteGuard};

use super::heartbeat::Beat;
use crate::store::hex;

/// What a worker says of itself; one JSON object a line between the two processes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "news", rename_all = "snake_case")]
pub enum News {
    /// It runs; said every second.
    Alive,
    /// An attempt has begun, or has something new to say to the next one.
    At(Box<Task>),
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
                self.0.insert(task.token.clone(), *task);
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
            listener(&News::At(Box::new(self.task.clone())));
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

/// The long stages of this process.
static COMPANY: RwLock<()> = RwLock::const_new(());

/// The right of a long stage to work: with others, or alone.
pub(super) enum Turn {
    Together { _others: RwLockReadGuard<'static, ()> },
    Alone(RwLockWriteGuard<'static, ()>),
}

impl Turn {
    /// Waits until no stage works that must be `alone`, or when this one must, until none works at all.
    pub(super) async fn wait(alone: bool) -> Self {
        if alone {
            Self::Alone(COMPANY.write().await)
        } else {
            Self::Together { _others: COMPANY.read().await }
        }
    }

    /// Lets others work from now on.
    pub(super) fn share(self) -> Self {
        match self {
            Self::Alone(guard) => Self::Together { _others: guard.downgrade() },
            together @ Self::Together { .. } => together,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_stage_on_trial_works_alone_until_it_shares() {
        use futures::FutureExt;
        let first = Turn::wait(false).await;
        let second = Turn::wait(false).now_or_never().expect("in company");
        let mut alone = Box::pin(Turn::wait(true));
        assert!(alone.as_mut().now_or_never().is_none());
        drop((first, second));
        let alone = alone.await;
        let mut third = Box::pin(Turn::wait(false));
        assert!(third.as_mut().now_or_never().is_none());
        let shared = alone.share();
        let third = third.now_or_never().expect("in company");
        drop((shared, third));
    }

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
            News::At(Box::new(task("a", 1))),
            News::Alive,
            News::At(Box::new(task("b", 1))),
            News::At(Box::new(task("a", 2))),
            News::Over { token: "b".to_owned() },
        ] {
            let line = serde_json::to_string(&news).unwrap();
            desk.hear(serde_json::from_str(&line).unwrap());
        }
        assert_eq!(desk.clear(), [task("a", 2)]);
        assert_eq!(desk.clear(), []);
    }
}
