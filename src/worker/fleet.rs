//! The workers of a task queue: what each says of itself, which queues it works for, and who is alive.
//!
//! A worker's identity names its device, its memory and its store, and the server shows the identity of whoever asks
//! it for work. So nobody has to register anywhere, and who has gone is forgotten by itself.

use std::collections::BTreeSet;
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};
use temporalio_client::grpc::WorkflowService;
use temporalio_client::tonic::{IntoRequest, Status};
use temporalio_client::{Client, NamespacedClient};
use temporalio_common::protos::temporal::api::enums::v1::TaskQueueType;
use temporalio_common::protos::temporal::api::taskqueue::v1::{PollerInfo, TaskQueue};
use temporalio_common::protos::temporal::api::workflowservice::v1::DescribeTaskQueueRequest;

use super::policy;
use crate::render;

/// A worker asks for work at least this often: longer silence means that it has gone, unless a stage of its reports.
const POLL: Duration = Duration::from_secs(70);

/// Between the parts of an identity.
const PART: &str = ", ";
/// What stands behind a worker's memory in its identity.
const FREE: &str = " MiB free";
/// Memory is told in steps of so many MiB: what is free differs a little from one start to the next.
const STEP: u64 = 256;
/// What stands before the name of a worker's own store.
const STORE: &str = "store ";

/// What a worker with this device and so many bytes of memory is called in the server's records: process, host,
/// device, memory, its store when that is its own.
pub fn identity(device: &str, memory: Option<u64>, store: Option<&str>) -> String {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let host = if host.trim().is_empty() { "localhost" } else { host.trim() };
    let mut identity = format!("{}@{host} {device}", std::process::id());
    if let Some(memory) = memory {
        identity.push_str(&format!("{PART}{}{FREE}", (memory >> 20) / STEP * STEP));
    }
    if let Some(store) = store {
        identity.push_str(&format!("{PART}{STORE}{store}"));
    }
    identity
}

/// A worker by its own words.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Machine<'a> {
    /// `cuda:0 f16`, `cpu f32`.
    pub device: &'a str,
    /// Bytes that a run may take there, rounded down; `None` where it does not say.
    pub memory: Option<u64>,
    /// Name of its store, where that is its own.
    pub store: Option<&'a str>,
}

impl<'a> Machine<'a> {
    /// The worker called `identity`.
    pub fn of(identity: &'a str) -> Self {
        let (_, said) = identity.split_once(' ').unwrap_or_default();
        let mut parts = said.split(PART);
        let device = parts.next().unwrap_or_default();
        let (mut memory, mut store) = (None, None);
        for part in parts {
            memory = memory.or(part.strip_suffix(FREE).and_then(bytes));
            store = store.or(part.strip_prefix(STORE));
        }
        Self { device, memory, store }
    }

    /// Queue of the stages that need as much memory as this worker has. Whoever works for it has exactly as much.
    fn room(&self, base: &str) -> Option<Room> {
        let memory = self.memory?;
        let on_cpu = self.device.starts_with("cpu");
        let queue = policy::room_queue(base, on_cpu, memory >> 20, self.dtype());
        Some(Room { queue, memory, on_cpu, is_half: self.is_half() })
    }

    fn dtype(&self) -> &'a str {
        self.device.rsplit(' ').next().unwrap_or_default()
    }

    /// Whether numbers have two bytes there, and not four.
    pub(super) fn is_half(&self) -> bool {
        self.dtype().ends_with("16")
    }
}

/// So many MiB in bytes.
fn bytes(mib: &str) -> Option<u64> {
    mib.parse::<u64>().ok()?.checked_mul(1 << 20)
}

/// A worker's identity as people read it.
pub fn spoken(identity: &str) -> String {
    let Some(memory) = Machine::of(identity).memory else { return identity.to_owned() };
    identity.replace(&format!("{}{FREE}", memory >> 20), &format!("{} free", render::gib(memory)))
}

/// Task queues of a worker whose workflows are on `base`.
pub fn queues(base: &str) -> [String; 3] {
    [base.to_owned(), policy::device_queue(base), policy::processor_queue(base)]
}

/// Further task queues of the worker called `identity`: of jobs that stay with it, of stages that need its memory.
pub fn own_queues(base: &str, identity: &str) -> Vec<String> {
    let machine = Machine::of(identity);
    let host = machine.store.map(|host| queues(&policy::host_queue(base, host)));
    let room = machine.room(base).map(|room| room.queue);
    host.into_iter().flatten().chain(room).collect()
}

/// The queue of the stages that need as much memory as the worker called `identity` has, where it says.
pub(super) fn room_queue(base: &str, identity: &str) -> Option<String> {
    Machine::of(identity).room(base).map(|room| room.queue)
}

/// Memory that a stage may take somewhere.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Room {
    /// Where such stages are asked for.
    pub(crate) queue: String,
    /// Bytes.
    pub(crate) memory: u64,
    /// Whether it is main memory.
    pub(crate) on_cpu: bool,
    /// Whether numbers have two bytes there.
    #[serde(default)]
    pub(crate) is_half: bool,
}

/// A worker that is alive.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Peer {
    /// What a stage may take there, where it says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) room: Option<Room>,
    /// Its host queue, where its store is its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) host: Option<String>,
}

/// Every worker of the queue `base` that is alive.
pub(crate) async fn peers(client: &Client, base: &str) -> Result<Vec<Peer>, Status> {
    let found = pollers(client, base, TaskQueueType::Activity).await?;
    Ok(alive(base, &found))
}

/// Those of `found` that are alive. The clock is the server's: whoever asks works for the queue, so the newest of them
/// was there just now.
fn alive(base: &str, found: &[PollerInfo]) -> Vec<Peer> {
    let now = found.iter().filter_map(last_seen).max().unwrap_or(SystemTime::UNIX_EPOCH);
    let alive = found.iter().filter(|poller| is_recent(last_seen(poller), now));
    let identities: BTreeSet<&str> = alive.map(|poller| &*poller.identity).collect();
    let peer = |identity| {
        let machine = Machine::of(identity);
        let host = machine.store.map(|store| policy::host_queue(base, store));
        Peer { room: machine.room(base), host }
    };
    identities.into_iter().map(peer).collect()
}

/// Who has asked for work of `kind` in `queue` in the last five minutes.
pub(crate) async fn pollers(
    client: &Client,
    queue: &str,
    kind: TaskQueueType,
) -> Result<Vec<PollerInfo>, Status> {
    let request = DescribeTaskQueueRequest {
        namespace: client.namespace(),
        task_queue: Some(TaskQueue { name: queue.to_owned(), ..TaskQueue::default() }),
        task_queue_type: kind.into(),
        ..DescribeTaskQueueRequest::default()
    };
    let mut service = client.clone();
    Ok(service.describe_task_queue(request.into_request()).await?.into_inner().pollers)
}

/// When the poller asked last.
pub(crate) fn last_seen(poller: &PollerInfo) -> Option<SystemTime> {
    poller.last_access_time.and_then(|time| time.try_into().ok())
}

/// Whether a worker heard of at `seen` is to be held for alive at `now`.
pub(crate) fn is_recent(seen: Option<SystemTime>, now: SystemTime) -> bool {
    seen.is_some_and(|seen| now.duration_since(seen).unwrap_or_default() < POLL)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;
    const MIB: u64 = 1 << 20;

    #[test]
    fn a_worker_is_what_it_says() {
        for (device, memory, store, wanted, room) in [
            ("cpu f32", None, None, None, None),
            ("cpu f32", Some(7 * GIB), Some("ab"), Some(7 * GIB), Some("q-cpu-mem-7168-f32")),
            ("cuda:0 f16", Some(300 * MIB), None, Some(256 * MIB), Some("q-gpu-mem-256-f16")),
            ("cuda:0 f32", Some(255 * MIB), None, Some(0), Some("q-gpu-mem-0-f32")),
            (
                "cuda:1 bf16",
                Some(24 * GIB - 1),
                None,
                Some(24 * GIB - 256 * MIB),
                Some("q-gpu-mem-24320-bf16"),
            ),
            ("without a device: none, alas", None, Some("ab"), None, None),
        ] {
            let identity = identity(device, memory, store);
            let machine = Machine::of(&identity);
            assert_eq!((machine.memory, machine.store), (wanted, store), "{identity}");
            assert!(device.starts_with(machine.device), "{identity}");
            assert_eq!(room_queue("q", &identity).as_deref(), room, "{identity}");
            let own = if store.is_some() { 3 } else { 0 } + usize::from(room.is_some());
            assert_eq!(own_queues("q", &identity).len(), own, "{identity}");
        }
        assert_eq!(Machine::of("somebody@else"), Machine::default());
    }

    #[test]
    fn people_read_gib() {
        for (identity, wanted) in [
            ("1@h cuda:0 f16, 24320 MiB free, store ab", "1@h cuda:0 f16, 23.8 GiB free, store ab"),
            ("1@h cpu f32", "1@h cpu f32"),
        ] {
            assert_eq!(spoken(identity), wanted);
        }
    }

    #[test]
    fn who_is_alive_is_told_by_the_servers_clock_alone() {
        let poller = |identity: &str, at: u64| PollerInfo {
            identity: identity.to_owned(),
            last_access_time: Some((SystemTime::UNIX_EPOCH + Duration::from_secs(at)).into()),
            ..PollerInfo::default()
        };
        let found = [
            poller("1@h cpu f32, store a", 10_000),
            poller("2@h cpu f32, store b", 9_940),
            poller("3@h cpu f32, store c", 9_930),
        ];
        let hosts: Vec<_> = alive("q", &found).into_iter().filter_map(|peer| peer.host).collect();
        assert_eq!(hosts, ["q-host-a", "q-host-b"]);
        assert_eq!(alive("q", &[]), []);
    }
}
