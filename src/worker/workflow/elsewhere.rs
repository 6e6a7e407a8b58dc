//! Where a job goes that the worker which took it cannot make: to one with more memory, or to the one with its image.

use std::collections::BTreeMap;
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
    /// Bytes that the stage takes where it was first refused; `None` as long as it was not.
    needs: Option<u64>,
}

/// Why the job's stages on the device do not go where anybody takes them, kept for the job's later stages.
#[derive(Debug)]
pub(super) struct Shortage {
    /// Fewest bytes that the stage takes, as was said where numbers have two bytes (true) and four.
    needs: BTreeMap<bool, u64>,
    /// What the first worker said that had too little.
    ended: Ended,
    /// Queues whose workers had too little after all.
    refused: Vec<String>,
    /// How long others were waited for.
    waited: Duration,
}

impl Search {
    pub(super) fn new(heartbeat: Duration) -> Self {
        Self { patience: policy::patience(heartbeat), needs: None }
    }

    /// What the stage waits for, in words.
    pub(super) fn waits_for(&self) -> Option<String> {
        let needs = gib(self.needs?);
        Some(format!("waiting for a worker with {needs} of memory"))
    }
}

impl Shortage {
    /// One stage's first refusal, by a worker that had too little; `before` is what the job's earlier stages found.
    fn new(ended: Ended, before: Option<Self>) -> Self {
        let refused = before.map(|before| before.refused).unwrap_or_default();
        Self { needs: BTreeMap::new(), ended, refused, waited: Duration::ZERO }
    }

    /// One more worker has too little: the one of the queue `room`, where it was found by that.
    fn add(&mut self, (needs, is_half): (u64, bool), room: Option<String>) {
        let known = self.needs.entry(is_half).or_insert(needs);
        *known = needs.min(*known);
        self.refused.extend(room);
    }

    /// Fewest bytes that the stage may take where numbers have two bytes, or four. Not all of it halves with them; who is
    /// asked in vain for that says at once how much it is.
    fn needs(&self, is_half: bool) -> u64 {
        match (self.needs.get(&is_half), self.needs.get(&!is_half)) {
            (Some(needs), _) => *needs,
            (None, Some(full)) if is_half => full / 2,
            (None, half) => half.copied().unwrap_or_default(),
        }
    }

    /// The next queue to try after `last`, the smallest memory first: one whose worker is only busy is not waited for
    /// while another may be free. Main memory counts where no other device has enough.
    fn room(&self, peers: &[Peer], last: Option<&str>) -> Option<String> {
        let fits = |room: &&Room| {
            room.memory >= self.needs(room.is_half) && !self.refused.contains(&room.queue)
        };
        let mut rooms: Vec<&Room> =
            peers.iter().filter_map(|peer| peer.room.as_ref()).filter(fits).collect();
        if rooms.iter().any(|room| !room.on_cpu) {
            rooms.retain(|room| !room.on_cpu);
        }
        rooms.sort_by_key(|room| (room.memory, &room.queue));
        rooms.dedup_by_key(|room| &room.queue);
        let next = rooms.iter().position(|room| Some(&*room.queue) == last).map_or(0, |at| at + 1);
        rooms.get(next).or(rooms.first()).map(|room| room.queue.clone())
    }

    /// The first refusal, and what the others have, or why that is not known.
    fn refusal(&self, peers: &Result<Vec<Peer>, Ended>) -> Ended {
        let mut ended = self.ended.clone();
        let more = match peers {
            Ok(peers) => {
                let most = peers.iter().filter_map(|peer| Some(peer.room.as_ref()?.memory)).max();
                most.filter(|_| peers.len() > 1).map(|most| {
                    format!("; the largest of {} workers has {}", peers.len(), gib(most))
                })
            }
            Err(why) => Some(format!("; who else works here was not found out: {}", why.message)),
        };
        ended.message.extend(more);
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
            self.ctx.state_mut(|state| {
                if let Some(shortage) = &mut state.shortage {
                    shortage.waited += waited;
                }
            });
        } else if let Some(needs) = Ended::needs(error).filter(|_| !has_home || self.is_movable())
            && self.is_short(search, needs, Ended::of_activity(error), last.clone())
        {
            search.needs.get_or_insert(needs.0);
        } else {
            return Ok(false);
        }
        let peers = match self.peers().await {
            Err(End::Failed(why)) => Err(why),
            peers => Ok(peers?),
        };
        let (room, refusal) = self.ctx.state(|state| {
            let Some(shortage) = &state.shortage else { return (None, None) };
            let room = peers.as_ref().ok().and_then(|peers| shortage.room(peers, last.as_deref()));
            (room, Some(shortage.refusal(&peers)))
        });
        match refusal {
            // The worker that an earlier stage found is gone; this stage may take less.
            _ if search.needs.is_none() => {}
            Some(refusal) if room.is_none() => {
                // What an earlier attempt left is to be removed there.
                self.settle_at(Ended::host(error));
                return Err(End::Failed(refusal));
            }
            _ => {}
        }
        self.ctx.state_mut(|state| state.room = room);
        if has_home { Err(End::Cramped) } else { Ok(true) }
    }

    /// Keeps what a worker of the queue `room` said that has too little; false where the job began before there was a
    /// search for more.
    fn is_short(
        &self,
        search: &Search,
        needs: (u64, bool),
        ended: Ended,
        room: Option<String>,
    ) -> bool {
        let is_first = self.ctx.state(|state| state.shortage.is_none());
        if is_first && !self.ctx.patched("room") {
            return false;
        }
        self.ctx.state_mut(|state| {
            let before = state.shortage.take();
            let mut shortage = match before {
                Some(shortage) if search.needs.is_some() => shortage,
                before => Shortage::new(ended, before),
            };
            shortage.add(needs, room);
            state.shortage = Some(shortage);
        });
        true
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

    /// The workers that are alive.
    async fn peers(&self) -> Result<Vec<Peer>, End> {
        let anywhere = Place { queue: self.ctx.task_queue().to_owned(), patience: None };
        let options = policy::short(anywhere, self.token.clone());
        let found = self.ctx.execute_activity(LightActivities::find_workers, (), options).await;
        self.settle(found)
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
        let ended = Ended { class, message, faults: Vec::new(), hint: None };
        let mut shortage = Shortage::new(ended, None);
        shortage.needs.insert(true, needs);
        shortage.needs.insert(false, needs);
        shortage.refused.extend(refused.iter().map(|queue| (*queue).to_owned()));
        shortage
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
    fn numbers_of_two_bytes_take_half_until_somebody_says() {
        let peers = [peer("g5", 5, false), peer("c8", 8, true), peer("c16", 16, true)];
        let mut short = Shortage::new(shortage(0, &[]).ended, None);
        for (needs, room, wanted) in [
            ((9, false), None, Some("g5")),
            // It takes more there than half.
            ((6, true), Some("g5"), Some("c16")),
        ] {
            short.add(needs, room.map(str::to_owned));
            assert_eq!(short.room(&peers, room).as_deref(), wanted, "{short:?}");
        }
        let mut half = Shortage::new(short.ended, None);
        half.add((6, true), None);
        assert_eq!((half.needs(true), half.needs(false)), (6, 6));
    }

    #[test]
    fn a_later_stage_knows_who_refused_and_has_its_own_needs() {
        let earlier = shortage(14, &["g24"]);
        let mut later = Shortage::new(earlier.ended.clone(), Some(earlier));
        later.add((20, true), Some("g28".to_owned()));
        assert_eq!(
            (later.needs(true), &later.refused[..]),
            (20, &["g24".into(), "g28".into()][..])
        );
    }

    #[test]
    fn a_refusal_says_what_there_is() {
        let peers = [peer("a", 2 << 30, false), peer("b", 1 << 30, true)];
        let alone = shortage(3 << 30, &[]);
        assert_eq!(alone.refusal(&Ok(peers[..1].to_vec())).message, "out of memory");
        let why = Ended { message: "no answer".to_owned(), ..alone.ended.clone() };
        let wanted = "out of memory; who else works here was not found out: no answer";
        assert_eq!(alone.refusal(&Err(why)).message, wanted);
        let waited = Shortage { waited: Duration::from_secs(30), ..alone };
        let message = waited.refusal(&Ok(peers.to_vec())).message;
        let wanted =
            "out of memory; the largest of 2 workers has 2.0 GiB; waited 30 s for a larger one";
        assert_eq!(message, wanted);
    }
}
