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
mod overhead;
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

/// Trials beside each other; each waits more than it works.
const AT_ONCE: usize = 4;

/// The short form: one death at each point, and one of everything else.
#[tokio::test(flavor = "multi_thread")]
async fn whatever_fails_a_job_has_its_one_result() {
    let field = Field::open().await;
    let input = small("video");
    let quiet = field.quiet(&input).await;
    let mut trials: Vec<&str> = genvideo::failpoint::POINTS.to_vec();
    trials.extend(["zombie", "stop", "twice", "cancel", "full", "poison", "device", "memory"]);
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
        assert!(row.faults > 0, "{}: {:?}", row.name, row.said);
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
            stops::terminate_at(field, job, stalled, &mut row).await;
        }
        "twice" => stops::told_twice(field, job, &mut row).await,
        "cancel" => stops::cancel_at(field, job, stalled, &mut row).await,
        "full" => stops::full_at(field, job, "trailer", &mut row).await,
        "poison" => stops::poison(field, &mut row).await,
        "device" => stops::broken_device(field, job, &mut row).await,
        "memory" => stops::out_of_memory(field, job, &mut row).await,
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
    rows.iter().for_each(Row::assert_in_bounds);
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
        "servers" => outages(&input, count).await,
        "terms" => terms(&field, job, count, &mut dice).await,
        "cancels" => cancels(&field, job, count, &mut dice).await,
        "full" => vec![full(&field, job, count).await],
        "fill" => {
            let mut row = Row::new("disk filled to its last byte (tmpfs)");
            for point in ["model_loaded", "stage_made", "frame_encoded", "trailer", "receipt_put"] {
                for _ in 0..count {
                    if !stops::fill_at(&field, job, point, &mut row).await {
                        row.lost += 1;
                        row.say("nothing can be mounted here".to_owned());
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
        "overhead" => {
            let mut rows = Vec::new();
            for kind in ["image", "video"] {
                let mut row = Row::new(&format!(
                    "{count} jobs without faults ({kind}): time beside the stages' own"
                ));
                overhead::overhead(&field, &small(kind), count, &mut row).await;
                rows.push(row.within(overhead::OVERHEAD_WITHIN));
            }
            rows
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

/// Does `trial` with each of `items`, some beside each other, and adds up what they came to.
async fn each<T>(name: &str, items: Vec<T>, trial: impl AsyncFn(T, &mut Row)) -> Row {
    let trial = &trial;
    let rows = futures::stream::iter(items).map(|item| async move {
        let mut row = Row::new(name);
        trial(item, &mut row).await;
        row
    });
    rows.buffer_unordered(AT_ONCE).fold(Row::new(name), |sum, row| async { sum.and(row) }).await
}

/// `count` traps at each point of a job, each at another visit of it.
fn traps(quiet: &Quiet, action: &'static str, count: u32, dice: &mut Dice) -> Vec<Trap<'static>> {
    let mut traps = Vec::new();
    for point in genvideo::failpoint::POINTS {
        let skip = |_| deaths::somewhere(quiet, point, dice);
        traps.extend((0..count).map(skip).map(|skip| Trap { point, action, skip }));
    }
    traps
}

async fn kills(field: &Field, job: (&Value, &Quiet), count: u32, dice: &mut Dice) -> Vec<Row> {
    let mut rows = Vec::new();
    let traps = traps(job.1, "kill", count, dice);
    for traps in traps.chunk_by(|one, next| one.point == next.point) {
        let name = format!("kill at `{}`", traps[0].point);
        let kill = async |trap, row: &mut Row| deaths::kill_at(field, job, trap, row).await;
        rows.push(each(&name, traps.to_vec(), kill).await.within(field::NEXT_WITHIN));
    }
    rows
}

async fn random(field: &Field, job: (&Value, &Quiet), count: u32, dice: &mut Dice) -> Row {
    let name = "kill at a random moment";
    let mut row = Row::new(name);
    // Some jobs are over before their moment comes.
    while row.faults < count {
        let seeds = (row.faults..count).map(|_| Dice::new(dice.below(u64::MAX))).collect();
        let kill = async |mut dice: Dice, row: &mut Row| {
            deaths::kill_any_time(field, job, &mut dice, row).await;
        };
        row = row.and(each(name, seeds, kill).await);
    }
    row.within(field::NEXT_WITHIN)
}

async fn zombies(field: &Field, job: (&Value, &Quiet), count: u32, dice: &mut Dice) -> Row {
    let thaws = [Thaw::AfterTheResult, Thaw::WhileAnotherWorks, Thaw::AfterItsTime];
    let traps = traps(job.1, "freeze", count, dice).into_iter().zip(thaws.into_iter().cycle());
    let freeze = async |moment, row: &mut Row| deaths::zombie(field, job, moment, row).await;
    each("freeze, then wake up", traps.collect(), freeze).await.within(field::NEXT_WITHIN)
}

/// Half of the outages are shorter than the heartbeat timeout, half longer; each kind on a server of its own.
async fn outages(input: &Value, count: u32) -> Vec<Row> {
    let short = Duration::from_millis(500);
    let long = field::HEARTBEAT + Duration::from_secs(3);
    let kinds = [
        ("server killed for a moment", What::Server, short),
        ("server killed for longer than the heartbeat timeout", What::Server, long),
        ("way to the server cut for a moment", What::Way, short),
        ("way to the server cut for longer than the heartbeat timeout", What::Way, long),
    ];
    let seeds = [7, 8, 9, 10];
    let rows = kinds.into_iter().zip(seeds).map(async |((name, what, time), seed)| {
        let field = Field::open().await;
        let quiet = field.quiet(input).await;
        let (mut row, mut dice) = (Row::new(name), Dice::new(seed));
        while row.faults < count.div_ceil(2) {
            outages::outage(&field, (input, &quiet), (what, time, &mut dice), &mut row).await;
        }
        // A server that needs long to start makes a long outage.
        let is_short =
            row.times.iter().all(|time| u128::from(*time) < field::HEARTBEAT.as_millis());
        if time < field::HEARTBEAT && is_short && row.retries > 0 {
            row.out_of_bounds += row.retries;
            row.say("a short outage costs no attempt".to_owned());
        }
        row
    });
    futures::future::join_all(rows).await
}

async fn terms(field: &Field, job: (&Value, &Quiet), count: u32, dice: &mut Dice) -> Vec<Row> {
    let nexts = std::cell::RefCell::new(Row::new("SIGTERM at each point: the next attempt"));
    let stop = async |trap, row: &mut Row| {
        if let Some(time) = stops::terminate_at(field, job, trap, row).await {
            nexts.borrow_mut().faults += 1;
            nexts.borrow_mut().times.push(time);
        }
    };
    let traps = traps(job.1, "stall:300", count, dice);
    let ends = each("SIGTERM at each point: the end", traps, stop).await;
    vec![ends.within(stops::END_WITHIN), nexts.into_inner().within(stops::NEXT_WITHIN)]
}

async fn cancels(field: &Field, job: (&Value, &Quiet), count: u32, dice: &mut Dice) -> Vec<Row> {
    let cancel = async |trap, row: &mut Row| stops::cancel_at(field, job, trap, row).await;
    let running = each("cancel at each point", traps(job.1, "stall:100", count, dice), cancel);
    let running = running.await.within(stops::CANCEL_WITHIN);
    let mut queued = Row::new("cancel while waiting for the device");
    stops::cancel_queued(field, count * 10, &mut queued).await;
    vec![running, queued.within(stops::CANCEL_QUEUED_WITHIN)]
}

async fn full(field: &Field, job: (&Value, &Quiet), count: u32) -> Row {
    let points = ["checkpoint_begun", "frame_encoded", "trailer", "blob_staged", "manifest_begun"];
    let fill = async |point, row: &mut Row| stops::full_at(field, job, point, row).await;
    each("disk full", points.repeat(count.try_into().unwrap()), fill).await
}
