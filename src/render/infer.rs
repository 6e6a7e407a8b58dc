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
    let mut once = |permit: &mut Permit<'_>, memory: &str| -> Result<(R::Output, Work), Error> {
        let (started, mut request) = (Instant::now(), request.clone());
        let (model, ready) = request.ready(permit, settings, wanted, memory, hook)?;
        point("model_loaded")?;
        let loaded = Instant::now();
        let run = match &mut attempt {
            Some(run) => run,
            None => {
                let stage = (request.stage(), wanted.hashes.as_str());
                attempt.insert(Attempt::new(settings, order, &ready.compute, stage)?)
            }
        };
        let decoding = request.decoding();
        let output =
            run.go(&decoding, hook, |at, keep, hook| request.run(model, at, keep, hook))?;
        let times = BTreeMap::from([
            (format!("{}_load", R::NAME), seconds(loaded - started)),
            (R::NAME.to_owned(), seconds(loaded.elapsed())),
        ]);
        let stage = StageReceipt::new(&ready, wanted, run.trace());
        let stage = settings.store.put_work(&order.job_key, &serde_json::to_vec(&stage)?)?;
        let mut work = Work { receipt: Some(stage), ..ready.work(times) };
        work.notes.extend(run.note());
        Ok((output, work))
    };
    match once(&mut permit, form.unwrap_or(&settings.memory)) {
        Err(error) if is_out_of_memory(&error) => permit.unload(),
        result => return result,
    }
    let (output, mut work) = once(&mut permit, form.unwrap_or("low"))?;
    work.notes.extend(form.is_none().then(|| RAN_OUT.to_owned()));
    Ok((output, work))
}
