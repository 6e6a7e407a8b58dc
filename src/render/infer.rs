//! One run of a model under the permit: from where an earlier attempt was, and, when memory runs out all the same, once
//! more with as little of it as possible.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::time::Instant;

use super::checkpoint::Attempt;
use super::failure::is_out_of_memory;
use super::models::{Permit, Ready, TILED, WHOLE, Wanted};
use super::receipt::StageReceipt;
use super::{Error, Hook, Inner, Order, Settings, Work, point, seconds};
use crate::engine::{self, Checkpoint, Keep};

/// What the engine is asked for.
pub(super) trait Request: Clone {
    /// Who does it.
    type Model;
    /// What comes of it.
    type Output;
    /// What its times are called.
    const NAME: &'static str;

    /// Name of the stage in the store.
    fn stage(&self) -> String;

    /// How pixels are decoded: see [`Checkpoint::decode_as`].
    fn decoding(&self) -> impl Debug;

    /// The model, and this request cut to the memory that is there.
    fn ready<'p>(
        &mut self,
        permit: &'p mut Permit<'_>,
        settings: &Settings,
        wanted: &Wanted,
        memory: &str,
        hook: &mut Hook<'_>,
    ) -> Result<(&'p Self::Model, Ready), Error>;

    /// Carries it out from `at` on.
    fn run(
        &self,
        model: &Self::Model,
        at: &mut Checkpoint,
        keep: &mut Keep<'_>,
        hook: &mut engine::Hook<'_>,
    ) -> engine::Result<Self::Output>;
}

/// Said of a stage that was taken up again in its low-memory form.
const RAN_OUT: &str = "memory ran out: the stage went on in the form that needs least, from the last step if there was one";

/// Carries `request` out with the model `wanted`. When memory runs out, the low-memory form goes on from the last step.
pub(super) fn infer<R: Request>(
    inner: &Inner,
    order: &Order,
    wanted: &Wanted,
    request: R,
    hook: &mut Hook<'_>,
) -> Result<(R::Output, Work), Error> {
    let settings = &inner.settings;
    let mut permit = inner.desk.wait(hook)?;
    let mut attempt = None;
    // Tiles change results: who makes one again takes the form it had, or says that there is no room for it.
    let form = order.expected(&request.stage()).map(|stage| match &*stage.memory {
        TILED => "low",
        _ => WHOLE,
    });
    for last_try in [false, true] {
        let (started, mut request) = (Instant::now(), request.clone());
        let memory = form.unwrap_or(if last_try { "low" } else { &settings.memory });
        let ready = request.ready(&mut permit, settings, wanted, memory, hook);
        let ready = ready.and_then(|ready| point("model_loaded").map(|()| ready));
        let (model, ready) = match ready {
            Err(error) if !last_try && is_out_of_memory(&error) => {
                permit.unload();
                continue;
            }
            ready => ready?,
        };
        let loaded = Instant::now();
        let run = match &mut attempt {
            Some(run) => run,
            None => {
                let stage = (request.stage(), wanted.hashes.as_str());
                match Attempt::new(settings, order, &ready.compute, stage) {
                    Err(error) if !last_try && is_out_of_memory(&error) => {
                        permit.unload();
                        continue;
                    }
                    run => attempt.insert(run?),
                }
            }
        };
        let decoding = request.decoding();
        match run.go(&decoding, hook, |at, keep, hook| request.run(model, at, keep, hook)) {
            Err(error) if !last_try && is_out_of_memory(&error) => permit.unload(),
            result => {
                let output = result?;
                let times = BTreeMap::from([
                    (format!("{}_load", R::NAME), seconds(loaded - started)),
                    (R::NAME.to_owned(), seconds(loaded.elapsed())),
                ]);
                let stage = StageReceipt::new(&ready, wanted, run.trace());
                let stage =
                    settings.store.put_work(&order.job_key, &serde_json::to_vec(&stage)?)?;
                let mut work = Work { receipt: Some(stage), ..ready.work(times) };
                work.notes.extend(run.note());
                work.notes.extend((last_try && form.is_none()).then(|| RAN_OUT.to_owned()));
                return Ok((output, work));
            }
        }
    }
    unreachable!("the last try returns")
}
