//! What a series of faults came to, and the table it ends in.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::time::Duration;

/// Where the table stands in `benches/RESULTS.md`, between two marks.
const BEGIN: &str = "<!-- chaos: written by scripts/chaos -->";
const END: &str = "<!-- chaos: end -->";

/// One kind of fault.
#[derive(Debug, Default)]
pub(crate) struct Row {
    pub(crate) name: String,
    /// Faults that really happened.
    pub(crate) faults: u32,
    /// Jobs without the result they should have.
    pub(crate) lost: u32,
    /// Jobs whose result was written more than once.
    pub(crate) doubled: u32,
    /// Results with other bytes than those of the undisturbed run.
    pub(crate) different: u32,
    /// Files that nobody will remove.
    pub(crate) leaked: u32,
    /// Files that were left to a sweep.
    pub(crate) swept: u32,
    /// Attempts more than the undisturbed run takes.
    pub(crate) retries: u32,
    /// How often a time, or what else has a limit, was over it.
    pub(crate) out_of_bounds: u32,
    /// From the fault to the next visit of any point, milliseconds; for an end, how long it took.
    pub(crate) times: Vec<u64>,
    /// Work done since the last checkpoint when the fault came, milliseconds.
    pub(crate) work: Vec<u64>,
    /// What went wrong, a line each.
    pub(crate) said: Vec<String>,
}

impl Row {
    pub(crate) fn new(name: &str) -> Self {
        Self { name: name.to_owned(), ..Self::default() }
    }

    /// Both together.
    pub(crate) fn and(mut self, other: Self) -> Self {
        self.faults += other.faults;
        self.lost += other.lost;
        self.doubled += other.doubled;
        self.different += other.different;
        self.leaked += other.leaked;
        self.swept += other.swept;
        self.retries += other.retries;
        self.out_of_bounds += other.out_of_bounds;
        self.times.extend(other.times);
        self.work.extend(other.work);
        self.said.extend(other.said);
        self
    }

    /// Counts the times that were longer than `limit`.
    pub(crate) fn within(mut self, limit: Duration) -> Self {
        let late = self.times.iter().filter(|time| u128::from(**time) > limit.as_millis()).count();
        if late > 0 {
            self.out_of_bounds += u32::try_from(late).unwrap();
            self.say(format!("{late} times over {limit:?}"));
        }
        self
    }

    /// Notes what went wrong, and says it at once.
    pub(crate) fn say(&mut self, text: String) {
        eprintln!("{}: {text}", self.name);
        self.said.push(text);
    }

    /// Fails when an invariant did not hold.
    #[track_caller]
    pub(crate) fn assert_clean(&self) {
        let counts = [self.lost, self.doubled, self.different, self.leaked];
        assert_eq!(
            counts,
            [0; 4],
            "{}: lost, doubled, different, leaked\n{}",
            self.name,
            self.said.join("\n")
        );
    }

    /// Fails when something took longer than it may.
    #[track_caller]
    pub(crate) fn assert_in_bounds(&self) {
        assert_eq!(self.out_of_bounds, 0, "{}: {}", self.name, self.said.join("\n"));
    }

    fn line(&self) -> String {
        let seconds = |times: &[u64], share: f64| match at(times, share) {
            Some(time) => format!("{:.2}", time as f64 / 1e3),
            None => "–".to_owned(),
        };
        format!(
            "| {} | {} | {} | {} | {} | {} | {} | {} | {} | {} | {} | {} | {} |",
            self.name,
            self.faults,
            self.lost,
            self.doubled,
            self.different,
            self.leaked,
            self.swept,
            self.retries,
            self.out_of_bounds,
            seconds(&self.times, 0.5),
            seconds(&self.times, 0.99),
            seconds(&self.times, 1.0),
            seconds(&self.work, 1.0),
        )
    }
}

/// The value below which `share` of them lie.
pub(crate) fn at(values: &[u64], share: f64) -> Option<u64> {
    let mut sorted = values.to_vec();
    sorted.sort_unstable();
    let place = (sorted.len().saturating_sub(1) as f64 * share).ceil();
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a place in a list"
    )]
    sorted.get(place as usize).copied()
}

/// The table of all rows.
pub(crate) fn table(rows: &[Row]) -> String {
    let mut text = String::from(
        "| fault | faults | lost | doubled | other bytes | leaked | left to the sweep | more attempts | out of bounds | p50 s | p99 s | max s | work lost, max s |\n\
         |---|---|---|---|---|---|---|---|---|---|---|---|---|\n",
    );
    for row in rows {
        writeln!(text, "{}", row.line()).unwrap();
    }
    for row in rows {
        for said in &row.said {
            writeln!(text, "- {}: {said}", row.name).unwrap();
        }
    }
    text
}

/// Puts the table into the results, in the place of the one before it.
pub(crate) fn write(rows: &[Row]) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/RESULTS.md");
    let old = fs::read_to_string(&path).unwrap_or_default();
    let before = old.split(BEGIN).next().unwrap_or_default().trim_end();
    let after = old.split(END).nth(1).unwrap_or_default().trim();
    let intro = "# Faults\n\n\
        `scripts/chaos` injects faults into small image and video jobs on worker processes and compares each result \
        with that of an undisturbed run.\n\
        Times are from the fault to the first work of the next attempt; for a stop and a cancel, how long it took. \
        Heartbeat timeout 10 s, checkpoint interval 0.1 s, one compute thread, two shared cores.";
    let table = table(rows);
    let head = table.lines().take(2).map(|line| format!("{line}\n")).collect::<String>();
    // What other series found stays until they run again.
    let there = old.split(BEGIN).nth(1).and_then(|rest| rest.split(END).next()).unwrap_or_default();
    let is_old = |line: &&str| {
        let renewed = rows.iter().any(|row| line.starts_with(&format!("| {} |", row.name)));
        let is_row = line.starts_with("| ") && !line.starts_with("| fault |");
        is_row && !renewed && line.matches('|').count() == head.matches('|').count() / 2
    };
    let kept: String = there.lines().filter(is_old).map(|line| format!("{line}\n")).collect();
    let new = table.strip_prefix(&head).unwrap_or_default();
    let text = format!("{before}\n\n{BEGIN}\n{intro}\n\n{head}{kept}{new}{END}\n\n{after}");
    fs::write(&path, format!("{}\n", text.trim())).unwrap();
}
