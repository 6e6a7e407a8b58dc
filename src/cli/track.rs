//! Progress of a job without a workflow: the renderer's reports, put together to a whole that never falls.

use crate::job::progress::{Detail, JobStatus, Progress, Step};
use crate::render::{Plan, Report};

/// Follows the stages of one job.
pub(crate) struct Track {
    /// Share of each part in the whole: the image, every run of the video model, the encoding.
    parts: Vec<f64>,
    part: usize,
    last: &'static str,
    percent: f64,
}

impl Track {
    /// A track for what `plan` says will come.
    pub(crate) fn new(plan: &Plan) -> Self {
        let mut parts = vec![plan.shares.image];
        if let Some(video) = &plan.video {
            parts.extend((0..video.runs).map(|_| plan.shares.run));
            parts.push(plan.shares.encode);
        }
        // A given picture is not made, only fitted.
        let part = usize::from(plan.image.is_none() && plan.video.is_some());
        Self { parts, part, last: "", percent: 0.0 }
    }

    /// Where the job is after `report`.
    pub(crate) fn progress(&mut self, report: Report) -> Progress {
        let end = self.parts.len() - 1;
        match report.stage {
            "interpolate" | "encode" => self.part = end,
            // The next picture or clip begins when one was decoded and another stage follows.
            stage if self.last == "decode" && stage != "decode" => {
                self.part = (self.part + 1).min(end)
            }
            _ => {}
        }
        self.last = report.stage;
        let before: f64 = self.parts[..self.part].iter().sum();
        let whole = before + self.parts[self.part] * report.fraction();
        self.percent = self.percent.max((whole * 98.0).clamp(0.0, 98.0));
        Progress {
            step: self.step(report.stage),
            status: JobStatus::Running,
            percent: self.percent,
            detail: Some(Detail {
                stage: report.stage.to_owned(),
                done: report.done,
                total: report.total,
            }),
            ..Progress::pending("")
        }
    }

    fn step(&self, stage: &str) -> Step {
        match (stage, self.part) {
            ("interpolate" | "encode" | "publish", _) => Step::Processing,
            (_, 0) => Step::Image,
            _ => Step::Video,
        }
    }
}
