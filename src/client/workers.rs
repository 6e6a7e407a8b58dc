//! Who works for a task queue, and at what: the pollers the server knows, and the stages it has handed out.

use std::collections::{BTreeMap, BTreeSet};
use std::time::SystemTime;

use futures::TryStreamExt;
use temporalio_client::WorkflowListOptions;
use temporalio_common::protos::temporal::api::enums::v1::{PendingActivityState, TaskQueueType};

use super::{Error, Jobs};
use crate::job::WORKFLOW_TYPE;
use crate::worker::fleet::{self, Machine};

/// Most running jobs that are looked at.
const MAX_JOBS: usize = 1000;

/// A worker as the server knows it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Worker {
    /// Process, host and device, in its own words.
    pub identity: String,
    /// Task queues it has asked for work in the last five minutes.
    pub queues: Vec<String>,
    /// When it last asked, or last reported from a stage.
    pub last_seen: Option<SystemTime>,
    /// The stages it is at.
    pub stages: Vec<Stage>,
}

/// A stage that a worker is at.
#[derive(Clone, Debug, PartialEq)]
pub struct Stage {
    /// Id of the job.
    pub job: String,
    /// `gen_image`, `gen_video` and so on.
    pub activity: String,
    /// Attempt, from 1.
    pub attempt: u32,
    /// When the attempt began.
    pub since: Option<SystemTime>,
}

impl Worker {
    /// Its device, its memory and its store, in its own words.
    pub fn machine(&self) -> Machine<'_> {
        Machine::of(&self.identity)
    }

    /// Whether it was heard of lately enough to be held for alive at `now`.
    pub fn is_alive(&self, now: SystemTime) -> bool {
        fleet::is_recent(self.last_seen, now)
    }
}

/// Every worker of the queue `base` and those named after it, those heard of last first.
pub(super) async fn workers(jobs: &Jobs, base: &str) -> Result<Vec<Worker>, Error> {
    let mut found: BTreeMap<String, Worker> = BTreeMap::new();
    let mut open: Vec<String> = fleet::queues(base).to_vec();
    let mut asked = BTreeSet::new();
    while let Some(queue) = open.pop() {
        if !asked.insert(queue.clone()) {
            continue;
        }
        for kind in [TaskQueueType::Workflow, TaskQueueType::Activity] {
            let pollers = fleet::pollers(&jobs.client, &queue, kind).await;
            for poller in pollers.map_err(|status| jobs.rpc(&status))? {
                open.extend(fleet::own_queues(base, &poller.identity));
                let worker = entry(&mut found, &poller.identity);
                if !worker.queues.contains(&queue) {
                    worker.queues.push(queue.clone());
                }
                worker.see(fleet::last_seen(&poller));
            }
        }
    }
    let query = format!("WorkflowType = '{WORKFLOW_TYPE}' AND ExecutionStatus = 'Running'");
    let options = WorkflowListOptions::builder().limit(MAX_JOBS).build();
    let running: Vec<_> = jobs
        .client
        .list_workflows(query, options)
        .try_collect()
        .await
        .map_err(|error| jobs.unexpected(&error))?;
    for job in running {
        let described = match jobs.describe(job.id()).await {
            Ok(described) => described,
            // It ended since.
            Err(Error::NoSuchJob { .. }) => continue,
            Err(error) => return Err(error),
        };
        for activity in described.raw_description.pending_activities {
            if activity.state() != PendingActivityState::Started {
                continue;
            }
            // Jobs of other queues have other workers.
            let Some(worker) = found.get_mut(&activity.last_worker_identity) else { continue };
            worker.see(activity.last_heartbeat_time.and_then(|time| time.try_into().ok()));
            worker.stages.push(Stage {
                job: job.id().to_owned(),
                activity: activity.activity_type.map(|kind| kind.name).unwrap_or_default(),
                attempt: u32::try_from(activity.attempt).unwrap_or(0),
                since: activity.last_started_time.and_then(|time| time.try_into().ok()),
            });
        }
    }
    let mut found: Vec<Worker> = found.into_values().collect();
    found.iter_mut().for_each(|worker| worker.queues.sort());
    found.sort_by_key(|worker| std::cmp::Reverse(worker.last_seen));
    Ok(found)
}

fn entry<'a>(found: &'a mut BTreeMap<String, Worker>, identity: &str) -> &'a mut Worker {
    found
        .entry(identity.to_owned())
        .or_insert_with(|| Worker { identity: identity.to_owned(), ..Worker::default() })
}

impl Worker {
    fn see(&mut self, time: Option<SystemTime>) {
        self.last_seen = self.last_seen.max(time);
    }
}
