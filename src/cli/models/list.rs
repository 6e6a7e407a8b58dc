//! `genvideo models list`: what is here, then what can be fetched by name.

use serde::Serialize;

use super::super::failure::Failure;
use super::super::output::{self, Output};
use super::super::session;
use super::{makes, whereabouts};
use crate::config::Config;
use crate::hub::{Manifest, Task, known};

#[derive(Serialize)]
struct Row<'a> {
    name: &'a str,
    /// `built in`, `folder`, `hf cache` or `not pulled`.
    state: &'static str,
    task: Task,
    #[serde(skip_serializing_if = "Option::is_none")]
    folder: Option<&'a std::path::Path>,
    manifest: &'a Manifest,
}

/// Lists all models by name.
pub(super) fn list(config: &Config, output: &mut Output) -> Result<(), Failure> {
    let (here, broken) = session::library(config).scan();
    let known = known::all();
    let absent: Vec<_> =
        known.iter().filter(|known| here.iter().all(|model| model.name != known.name)).collect();
    let mut rows: Vec<Row<'_>> = here
        .iter()
        .map(|model| Row {
            name: &model.name,
            state: whereabouts(model),
            task: model.task,
            folder: Some(&model.folder),
            manifest: &model.manifest,
        })
        .collect();
    rows.extend(absent.iter().map(|known| Row {
        name: known.name,
        state: "not pulled",
        task: known.task,
        folder: None,
        manifest: &known.manifest,
    }));
    let width = rows.iter().map(|row| row.name.chars().count()).max().unwrap_or_default();
    for row in &rows {
        output.object(row);
        let Manifest { family, native_width, native_height, .. } = row.manifest;
        let size = format!("{native_width}x{native_height}");
        let (name, state, makes) = (row.name, row.state, makes(row.task));
        output.line(&format!("{name:<width$}  {state:<10}  {makes:<5}  {size:<9}  {family}"));
    }
    for broken in &broken {
        output::note(&format!("not usable: `{}`: {}", broken.path.display(), broken.error));
    }
    if !absent.is_empty() && !output.is_json() {
        output::note(
            "hint: `genvideo models pull NAME` fetches one, `genvideo models show NAME` says what it is",
        );
    }
    Ok(())
}
