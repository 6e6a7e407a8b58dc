//! How a running job looks: one bar on a terminal, one line per stage and tenth elsewhere, one object with `--json`.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use super::output::{self, Output};
use crate::job::progress::{Detail, JobStatus, Progress, Step};

/// Percent between two plain lines of one stage.
const PLAIN_PERCENT: f64 = 10.0;

/// Shows the progress of one job.
pub(crate) struct Display {
    bar: Option<ProgressBar>,
    plain: Option<(String, f64)>,
    last: Option<Progress>,
}

#[derive(Serialize)]
struct Event<'a> {
    event: &'static str,
    id: &'a str,
    #[serde(flatten)]
    progress: &'a Progress,
}

impl Display {
    /// A bar on a terminal, lines otherwise; nothing for people with `--json`.
    pub(crate) fn new(output: &Output) -> Self {
        let bar = (output::is_live() && !output.is_json()).then(|| {
            let bar = output::bars().add(ProgressBar::new(1000));
            let style =
                ProgressStyle::with_template("{spinner} {bar:30} {prefix:>4} {wide_msg} {elapsed}");
            bar.set_style(style.expect("the template is ours").progress_chars("=> "));
            bar.enable_steady_tick(Duration::from_millis(120));
            bar
        });
        Self { bar, plain: None, last: None }
    }

    /// Shows where the job is, when that is news.
    pub(crate) fn show(&mut self, id: &str, progress: &Progress, output: &mut Output) {
        if self.last.as_ref() == Some(progress) {
            return;
        }
        output.object(&Event { event: "progress", id, progress });
        if let Some(bar) = &self.bar {
            bar.set_position(permille(progress.percent));
            bar.set_prefix(format!("{:.0} %", progress.percent));
            bar.set_message(describe(progress));
        } else if !output.is_json() {
            self.show_plain(progress);
        }
        self.last = Some(progress.clone());
    }

    fn show_plain(&mut self, progress: &Progress) {
        let stage = stage(progress);
        let news = self.plain.as_ref().is_none_or(|(last, percent)| {
            *last != stage || progress.percent - percent >= PLAIN_PERCENT
        });
        if news {
            output::note(&format!("{:3.0} %  {}", progress.percent, describe(progress)));
            self.plain = Some((stage, progress.percent));
        }
    }

    /// Takes the bar away.
    pub(crate) fn finish(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}

impl Drop for Display {
    fn drop(&mut self) {
        self.finish();
    }
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "clamped to 0..=1000 first"
)]
fn permille(percent: f64) -> u64 {
    (percent * 10.0).clamp(0.0, 1000.0) as u64
}

fn stage(progress: &Progress) -> String {
    let detail = progress.detail.as_ref().map_or("", |detail| detail.stage.as_str());
    format!("{} {} {detail}", word(progress.step), state(progress.status))
}

/// One line: the step, the stage with its count, and what the job says.
pub(crate) fn describe(progress: &Progress) -> String {
    // A job that waits says for whom.
    let detail = progress.detail.as_ref().filter(|_| progress.status != JobStatus::Pending);
    let said = match detail {
        Some(Detail { stage, done, total }) => {
            let stage = stage.replace('_', " ");
            if *total > 1 { format!("{stage} {done}/{total}") } else { stage }
        }
        None => progress.message.clone(),
    };
    let word = word(progress.step);
    let mut text = match said.as_str() {
        "" => word.to_owned(),
        said if said.starts_with(word) => said.to_owned(),
        said => format!("{word}: {said}"),
    };
    if let Some(attempt) = progress.attempt.filter(|attempt| *attempt > 1) {
        text.push_str(&format!(" (attempt {attempt})"));
    }
    text
}

/// The step in a word.
pub(crate) fn word(step: Step) -> &'static str {
    match step {
        Step::Image => "image",
        Step::Video => "video",
        Step::Processing => "processing",
        Step::Completed => "completed",
        Step::Failed => "failed",
    }
}

/// The status as on the wire.
pub(crate) fn state(status: JobStatus) -> &'static str {
    match status {
        JobStatus::Pending => "PENDING",
        JobStatus::Running => "RUNNING",
        JobStatus::Completed => "COMPLETED",
        JobStatus::Failed => "FAILED",
        JobStatus::Cancelled => "CANCELLED",
        JobStatus::Retrying => "RETRYING",
    }
}
