//! Where a job goes that the worker which took it cannot make: to one with more memory, or to the one with its image.

use std::time::Duration;

use temporalio_common::error::ActivityExecutionError;

use super::{End, Walk};
use crate::render::gib;
use crate::worker::activities::{Ask, LightActivities, Prepared};
use crate::worker::failure::{self, Ended};
use crate::worker::fleet::{Peer, Room};
use crate::worker::policy::{self, Place};

/// The search of one stage for a worker that can carry it out.
pub(super) struct Search {
    /// See [`Place::patience`].
    pub(super) patience: Duration,
    /// Why one is looked for; `None` as long as anybody will do.
    shortage: Option<Shortage>,
}

struct Shortage {
    /// Fewest bytes that the stage takes anywhere.
    needs: u64,
    /// What the first worker said that had too little.
    ended: Ended,
    /// Queues whose workers had too little after all.
    refused: Vec<String>,
    /// How long others were waited for.
    waited: Duration,
}

impl Search {
    pub(super) fn new(heartbeat: Duration) -> Self {
        Self { patience: policy::patience(heartbeat), shortage: None }
    }

    /// What the stage waits for, in words.
    pub(super) fn waits_for(&self) -> Option<String> {
        let needs = gib(self.shortage.as_ref()?.needs);
        Some(format!("waiting for a worker with {needs} of memory"))
    }
}

impl Shortage {
    /// The next queue to try after `last`, the smallest memory first: one whose worker is only busy is not waited for
    /// while another may be free. Main memory counts where no other device has enough.
    fn room(&self, peers: &[Peer], last: Option<&str>) -> Option<String> {
        let fits = |room: &&Room| room.memory >= self.needs && !self.refused.contains(&room.queue);
        let mut rooms: Vec<&Room> =
            peers.iter().filter_map(|peer| peer.room.as_ref()).filter(fits).collect();
        if rooms.iter().any(|room| !room.on_cpu) {
            rooms.retain(|room| !room.on_cpu);
        }
        rooms.sort_by_key(|room| room.memory);
        rooms.dedup_by_key(|room| &room.queue);
        let next = rooms.iter().position(|room| Some(&*room.queue) == last).map_or(0, |at| at + 1);
        rooms.get(next).or(rooms.first()).map(|room| room.queue.clone())
    }

    /// The first refusal, and what the others have.
    fn refusal(&self, peers: &[Peer]) -> Ended {
        let mut ended = self.ended.clone();
        let most = peers.iter().filter_map(|peer| Some(peer.room.as_ref()?.memory)).max();
        if let Some(most) = most.filter(|_| peers.len() > 1) {
            let more = format!("; the largest of {} workers has {}", peers.len(), gib(most));
            ended.message.push_str(&more);
        }
        if !self.waited.is_zero() {
            let more = format!("; waited {} s for a larger one", self.waited.as_secs());
            ended.message.push_str(&more);
        }
        ended
    }
}

impl Walk {
    /// Whether the stage that ended with `error` is to be tried again, for which `search` and the job's place are set.
    pub(super) async fn elsewhere(
        &self,
        error: &ActivityExecutionError,
        heartbeat: Duration,
        search: &mut Search,
    ) -> Result<bool, End> {
        let has_home = self.ctx.state(|state| state.home.is_some());
        let last = self.ctx.state(|state| state.room.clone());
        if failure::is_unclaimed(error) {
            let waited = search.patience;
            search.patience = policy::more(waited);
            if has_home {
                self.call(heartbeat).await?;
                return Ok(true);
            }
            let Some(shortage) = &mut search.shortage else {
                // The worker that an earlier stage found is gone; another may do.
                self.ctx.state_mut(|state| state.room = None);
                return Ok(true);
            };
            shortage.waited += waited;
        } else if let Some(needs) = Ended::needs(error).filter(|_| !has_home || self.is_movable()) {
            let shortage = search.shortage.get_or_insert_with(|| Shortage {
                needs,
                ended: Ended::of_activity(error),
                refused: Vec::new(),
                waited: Duration::ZERO,
            });
            shortage.needs = shortage.needs.min(needs);
            shortage.refused.extend(last.clone());
        } else {
            return Ok(false);
        }
        let Some(shortage) = &search.shortage else { return Ok(false) };
        let peers = self.peers().await?;
        let Some(room) = shortage.room(&peers, last.as_deref()) else {
            // What an earlier attempt left is to be removed there.
            self.settle_at(Ended::host(error));
            return Err(End::Failed(shortage.refusal(&peers)));
        };
        self.ctx.state_mut(|state| state.room = Some(room));
        if has_home { Err(End::Homeless) } else { Ok(true) }
    }

    /// The plan of a host that has the job's image, where `refused` says that another one has not.
    pub(super) async fn where_the_image_is(
        &self,
        ask: Ask,
        refused: ActivityExecutionError,
    ) -> Result<Prepared, ActivityExecutionError> {
        let is_cancelled = self.token.is_cancelled();
        if is_cancelled || !failure::lacks_image(&refused) || !self.ctx.patched("image-elsewhere") {
            return Err(refused);
        }
        let Ok(peers) = self.peers().await else { return Err(refused) };
        let mut hosts: Vec<String> = peers.into_iter().filter_map(|peer| peer.host).collect();
        hosts.sort();
        hosts.dedup();
        for queue in hosts {
            let place = Place { queue, patience: Some(policy::patience(policy::BEAT)) };
            let options = policy::short(place, self.token.clone());
            let validate = LightActivities::validate_request;
            match self.ctx.execute_activity(validate, ask.clone(), options).await {
                Err(error) if failure::lacks_image(&error) || failure::is_unclaimed(&error) => {}
                answered => return answered,
            }
        }
        Err(refused)
    }

    /// The workers that are alive; none when that cannot be found out.
    async fn peers(&self) -> Result<Vec<Peer>, End> {
        let anywhere = Place { queue: self.ctx.task_queue().to_owned(), patience: None };
        let options = policy::short(anywhere, self.token.clone());
        let found = self.ctx.execute_activity(LightActivities::find_workers, (), options).await;
        if self.token.is_cancelled() { Err(End::Cancelled) } else { Ok(found.unwrap_or_default()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::class::ErrorClass;

    fn peer(queue: &str, memory: u64, on_cpu: bool) -> Peer {
        let room = Room { queue: queue.to_owned(), memory, on_cpu, is_half: !on_cpu };
        Peer { room: Some(room), host: None }
    }

    fn shortage(needs: u64, refused: &[&str]) -> Shortage {
        let message = "out of memory".to_owned();
        let class = ErrorClass::OutOfMemory;
        Shortage {
            needs,
            ended: Ended { class, message, faults: Vec::new(), hint: None },
            refused: refused.iter().map(|queue| (*queue).to_owned()).collect(),
            waited: Duration::ZERO,
        }
    }

    #[test]
    fn the_smallest_that_fits_comes_first_and_main_memory_last() {
        let peers = [
            peer("g24", 24, false),
            peer("g8", 8, false),
            peer("c64", 64, true),
            peer("g24", 24, false),
            peer("g80", 80, false),
            Peer { room: None, host: None },
        ];
        for (needs, refused, last, wanted) in [
            (4, &[][..], None, Some("g8")),
            (14, &[], None, Some("g24")),
            // Busy: the next one, and round again.
            (14, &[], Some("g24"), Some("g80")),
            (14, &[], Some("g80"), Some("g24")),
            // Less than it said.
            (14, &["g24"], Some("g24"), Some("g80")),
            (14, &["g24", "g80"], Some("g80"), Some("c64")),
            (14, &["g24", "g80", "c64"], Some("c64"), None),
            (81, &[], None, None),
        ] {
            let room = shortage(needs, refused).room(&peers, last);
            assert_eq!(room.as_deref(), wanted, "{needs} {refused:?} {last:?}");
        }
    }

    #[test]
    fn a_refusal_says_what_there_is() {
        let peers = [peer("a", 2 << 30, false), peer("b", 1 << 30, true)];
        let alone = shortage(3 << 30, &[]);
        assert_eq!(alone.refusal(&peers[..1]).message, "out of memory");
        let waited = Shortage { waited: Duration::from_secs(30), ..alone };
        let message = waited.refusal(&peers).message;
        let wanted =
            "out of memory; the largest of 2 workers has 2.0 GiB; waited 30 s for a larger one";
        assert_eq!(message, wanted);
    }
}
