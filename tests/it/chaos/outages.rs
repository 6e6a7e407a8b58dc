//! Servers that are killed with their database, and ways to them that are cut.

use std::time::Duration;

use serde_json::Value;

use super::deaths::{Dice, judge, now};
use super::field::{Field, Quiet, Trial, tick};
use super::proxy::Proxy;
use super::tally::Row;

/// What goes away.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum What {
    Server,
    Way,
}

/// Takes the server away at a random moment of a job, for `time`.
pub(crate) async fn outage(
    field: &Field,
    (input, quiet): (&Value, &Quiet),
    (what, time, dice): (What, Duration, &mut Dice),
    row: &mut Row,
) {
    let mut trial: Trial<'_> = field.trial("outage");
    let proxy = Proxy::to(field.server.address()).await;
    let address = if what == What::Way { proxy.address.clone() } else { field.server.address() };
    trial.work_at(&address, "");
    let id = trial.submit(input).await;
    let took = u64::try_from(quiet.took.as_millis()).unwrap();
    let is_over = tokio::select! {
        _ = trial.outcome(&id) => true,
        () = tick(Duration::from_millis(dice.below(took))) => false,
    };
    if !is_over {
        row.faults += 1;
        let start = now();
        match what {
            What::Server => field.server.kill(),
            What::Way => proxy.cut(),
        }
        tick(time).await;
        match what {
            What::Server => field.server.begin(),
            What::Way => proxy.mend(),
        }
        trial.outcome(&id).await;
        row.times.push(now() - start);
    }
    judge(&mut trial, &id, quiet, row).await;
}
