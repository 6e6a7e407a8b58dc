//! Faults on purpose: workers and servers that are killed, frozen, cut off or told to stop, and full disks.
//!
//! The short form is what runs with the other tests. `GENVIDEO_CHAOS` asks for the long one, which `scripts/chaos`
//! starts: words such as `kills=10 random=100 zombies=3`, each a series. Whatever happens, a job has its one result,
//! with the bytes of an undisturbed run, and leaves nothing else.
#![expect(clippy::unwrap_used, reason = "a panic is how a test fails, in its helpers too")]
#![allow(clippy::print_stderr, reason = "a long run says where it is")]

mod crowd;
mod deaths;
mod field;
mod outages;
mod proxy;
mod stops;
mod tally;

use std::time::Duration;

use futures::StreamExt;
use serde_json::Value;

use deaths::{Dice, Thaw, Trap};
use field::{Field, Quiet, small};
use outages::What;
use tally::Row;

/// Trials beside each other in the short form; each waits more than it works.
const AT_ONCE: usize = 4;

/// The short form: one death at each point, and one of everything else.
#[tokio::test(flavor = "multi_thread")]
async fn whatever_fails_a_job_has_its_one_result() {
    let field = Field::open().await;
    let input = small("video");
    let quiet = field.quiet(&input).await;
    let mut trials: Vec<&str> = genvideo::failpoint::POINTS.to_vec();
    trials.extend(["zombie", "stop", "cancel", "full", "poison", "device"]);
    let rows = futures::stream::iter(trials).map(|name| once(&field, (&input, &quiet), name));
    let rows: Vec<Row> = rows.buffer_unordered(AT_ONCE).collect().await;
    let mut outage = Row::new("a server that is killed for a moment");
    let mut dice = Dice::new(3);
    // The job may be over before its moment comes.
    while outage.faults == 0 {
        let moment = (What::Server, Duration::ZERO, &mut dice);
        outages::outage(&field, (&input, &quiet), moment, &mut outage).await;
    }
    // On a machine so busy that the server needs that long to start, the outage was none of a moment.
    if outage.times.iter().all(|time| u128::from(*time) < field::HEARTBEAT.as_millis() / 2) {
        assert_eq!(outage.retries, 0, "a short outage costs no attempt");
    }
    for row in rows.iter().chain([&outage]) {
        row.assert_clean();
        assert_eq!(row.faults, 1, "{}: {:?}", row.name, row.said);
    }
}

async fn once(field: &Field, job: (&Value, &Quiet), name: &str) -> Row {
    let mut row = Row::new(name);
    let stalled = Trap { point: "step_done", action: "stall:300", skip: 3 };
    match name {
        "zombie" => {
            let trap = Trap { point: "stage_made", action: "freeze", skip: 0 };
            deaths::zombie(field, job, (trap, Thaw::AfterTheResult), &mut row).await;
        }
        "stop" => {
            let mut next = Row::new("the attempt after a stop");
            stops::terminate_at(field, job, stalled, (&mut row, &mut next)).await;
        }
        "cancel" => stops::cancel_at(field, job, stalled, &mut row).await,
        "full" => stops::full_at(field, job, "trailer", &mut row).await,
        "poison" => stops::poison(field, &mut row).await,
        "device" => stops::broken_device(field, job, &mut row).await,
        point => {
            deaths::kill_at(field, job, Trap { point, action: "kill", skip: 0 }, &mut row).await
        }
    }
    row
}

/// The long form.
#[tokio::test(flavor = "multi_thread")]
async fn as_long_as_asked() {
    let asked = std::env::var("GENVIDEO_CHAOS").unwrap_or_default();
    let mut rows = Vec::new();
    for word in asked.split_whitespace() {
        let (series, count) = word.split_once('=').expect("SERIES=COUNT");
        let count: u32 = count.parse().expect("a count");
        let start = std::time::Instant::now();
        rows.extend(run(series, count).await);
        eprintln!("{series}: {:.0?}\n{}", start.elapsed(), tally::table(&rows));
        tally::write(&rows);
    }
    rows.iter().for_each(Row::assert_clean);
}

async fn run(series: &str, count: u32) -> Vec<Row> {
    let field = Field::open().await;
    let input = small("video");
    let quiet = field.quiet(&input).await;
    eprintln!("undisturbed: {:.2?} {:?}", quiet.took, quiet.visits);
    let mut dice = Dice::new(7);
    let job = (&input, &quiet);
    match series {
        "kills" => kills(&field, job, count, &mut dice).await,
        "random" => vec![random(&field, job, count, &mut dice).await],
        "zombies" => vec![zombies(&field, job, count, &mut dice).await],
        "servers" => outages(&field, job, count, &mut dice).await,
        "terms" => terms(&field, job, count, &mut dice).await,
        "cancels" => cancels(&field, job, count, &mut dice).await,
        "full" => vec![full(&field, job, count).await],
        "fill" => {
            let mut row = Row::new("disk filled to its last byte (tmpfs)");
            for point in ["model_loaded", "stage_made", "frame_encoded", "trailer", "receipt_put"] {
                for _ in 0..count {
                    if !stops::fill_at(&field, job, point, &mut row).await {
                        row.said.push("nothing can be mounted here".to_owned());
                    }
                }
            }
            vec![row]
        }
        "queue" => {
            let mut row = Row::new(&format!("{count} jobs at once, worker and server killed"));
            crowd::queue(&field, count, &mut row).await;
            vec![row]
        }
        "minutes" => {
            let mut row = Row::new(&format!("{count} minutes of faults"));
            let time = Duration::from_secs(60 * u64::from(count));
            crowd::soak(&field, job, (time, &mut dice), &mut row).await;
            vec![row]
        }
        other => panic!("no series `{other}`"),
    }
}

async fn kills(field: &Field, job: (&Value, &Quiet), count: u32, dice: &mut Dice) -> Vec<Row> {
    let mut rows = Vec::new();
    for point in genvideo::failpoint::POINTS {
        let mut row = Row::new(&format!("kill at `{point}`"));
        for _ in 0..count {
            let skip = deaths::somewhere(job.1, point, dice);
            deaths::kill_at(field, job, Trap { point, action: "kill", skip }, &mut row).await;
        }
        rows.push(row);
    }
    rows
}

async fn random(field: &Field, job: (&Value, &Quiet), count: u32, dice: &mut Dice) -> Row {
    let mut row = Row::new("kill at a random moment");
    while row.faults < count {
        deaths::kill_any_time(field, job, dice, &mut row).await;
    }
    row
}

async fn zombies(field: &Field, job: (&Value, &Quiet), count: u32, dice: &mut Dice) -> Row {
    let mut row = Row::new("freeze, then wake up");
    let thaws = [Thaw::AfterTheResult, Thaw::WhileAnotherWorks, Thaw::AfterItsTime];
    for point in genvideo::failpoint::POINTS {
        for thaw in thaws.into_iter().cycle().take(count.try_into().unwrap()) {
            let skip = deaths::somewhere(job.1, point, dice);
            let trap = Trap { point, action: "freeze", skip };
            deaths::zombie(field, job, (trap, thaw), &mut row).await;
        }
    }
    row
}

/// Half of the outages are shorter than the heartbeat timeout, half longer.
async fn outages(field: &Field, job: (&Value, &Quiet), count: u32, dice: &mut Dice) -> Vec<Row> {
    let long = field::HEARTBEAT + Duration::from_secs(3);
    let mut rows = Vec::new();
    for (name, what, time) in [
        ("server killed for a moment", What::Server, Duration::from_millis(500)),
        ("server killed for longer than the heartbeat timeout", What::Server, long),
        ("way to the server cut for a moment", What::Way, Duration::from_millis(500)),
        ("way to the server cut for longer than the heartbeat timeout", What::Way, long),
    ] {
        let mut row = Row::new(name);
        for _ in 0..count.div_ceil(2) {
            outages::outage(field, job, (what, time, dice), &mut row).await;
        }
        rows.push(row);
    }
    rows
}

async fn terms(field: &Field, job: (&Value, &Quiet), count: u32, dice: &mut Dice) -> Vec<Row> {
    let mut stops = Row::new("SIGTERM at each point: the end");
    let mut nexts = Row::new("SIGTERM at each point: the next attempt after it");
    for point in genvideo::failpoint::POINTS {
        for _ in 0..count {
            let skip = deaths::somewhere(job.1, point, dice);
            let trap = Trap { point, action: "stall:300", skip };
            stops::terminate_at(field, job, trap, (&mut stops, &mut nexts)).await;
        }
    }
    vec![stops, nexts]
}

async fn cancels(field: &Field, job: (&Value, &Quiet), count: u32, dice: &mut Dice) -> Vec<Row> {
    let mut running = Row::new("cancel at each point");
    for point in genvideo::failpoint::POINTS {
        for _ in 0..count {
            let skip = deaths::somewhere(job.1, point, dice);
            let trap = Trap { point, action: "stall:100", skip };
            stops::cancel_at(field, job, trap, &mut running).await;
        }
    }
    let mut queued = Row::new("cancel while waiting for the device");
    stops::cancel_queued(field, count * 10, &mut queued).await;
    vec![running, queued]
}

async fn full(field: &Field, job: (&Value, &Quiet), count: u32) -> Row {
    let mut row = Row::new("disk full");
    for point in ["checkpoint_begun", "frame_encoded", "trailer", "blob_staged", "manifest_begun"] {
        for _ in 0..count {
            stops::full_at(field, job, point, &mut row).await;
        }
    }
    row
}
