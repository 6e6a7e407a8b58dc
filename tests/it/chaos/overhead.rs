//! What the way through Temporal and the store costs beside the stages' own work.

use std::time::{Duration, Instant};

use serde_json::Value;

use super::deaths::now;
use super::field::{Field, Visit};
use super::tally::Row;

/// Most that it may cost with a model that takes no time.
pub(crate) const OVERHEAD_WITHIN: Duration = Duration::from_millis(300);

/// Runs `count` jobs one after the other on a worker that is warm, and notes of each how long it took beside its
/// stages: everything from the submission to the client's result but the time from a stage's begin to its product.
pub(crate) async fn overhead(field: &Field, input: &Value, count: u32, row: &mut Row) {
    let mut trial = field.trial("overhead");
    trial.work("");
    let first = trial.submit(input).await;
    trial.result(&first).await.expect("the first job succeeds");
    for _ in 0..count {
        let (begin, start) = (now(), Instant::now());
        let id = trial.submit(input).await;
        trial.result(&id).await.expect("a job without faults succeeds");
        let took = u64::try_from(start.elapsed().as_millis()).unwrap();
        let visits: Vec<Visit> =
            trial.trace().into_iter().filter(|visit| visit.at >= begin).collect();
        let of =
            |point: &str| visits.iter().filter(|v| v.point == point).map(|v| v.at).sum::<u64>();
        row.times.push(took.saturating_sub(of("stage_made") - of("stage_begun")));
    }
}
