//! The thread that stages run on, which outlives them.

use std::panic::{self, AssertUnwindSafe};
use std::sync::mpsc;

use crate::render;

/// A thread for stages, one after the other. What libraries keep for each thread, the GPU's handles and the buffers of
/// matrix products, is there once, and there again for the next stage.
#[derive(Clone)]
pub(crate) struct StageThread(mpsc::Sender<Box<dyn FnOnce() + Send>>);

impl StageThread {
    /// Starts one, for as long as there is a handle.
    pub(crate) fn start() -> std::io::Result<Self> {
        let (sender, stages) = mpsc::channel::<Box<dyn FnOnce() + Send>>();
        let work = move || {
            stages.into_iter().for_each(|stage| stage());
            // Left to the end of the process: a driver that has failed may end it where a thread lets go of its handles.
            loop {
                std::thread::park();
            }
        };
        std::thread::Builder::new().name("stage".to_owned()).spawn(work)?;
        Ok(Self(sender))
    }

    /// Runs `stage` there, and gives the memory that it has freed back to the system; its panic is the caller's.
    pub(crate) fn run<T: Send + 'static>(&self, stage: impl FnOnce() -> T + Send + 'static) -> T {
        let (sender, done) = mpsc::channel();
        let stage = move || {
            // Nobody else sees what a panic leaves of it.
            let _ = sender.send(panic::catch_unwind(AssertUnwindSafe(stage)));
        };
        self.0.send(Box::new(stage)).expect("it lives as long as this handle");
        let done = done.recv().expect("every stage answers");
        render::give_back_memory();
        done.unwrap_or_else(|payload| panic::resume_unwind(payload))
    }
}
