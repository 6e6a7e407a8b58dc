//! The engine: model folders in, pixels out, in process with candle.
//!
//! It knows tensors only: no Temporal, no JSON of clients, no environment, no clock, no network. Start at
//! [`ImageModel`] (text to image) and [`VideoModel`] (image to frames). Both read the diffusers folder layout; all
//! widths, levels and schedules come from the folder's configs. Progress and stop go through one [`Hook`].

pub mod checkpoint;
pub mod config;
pub mod denoise;
pub mod device;
pub mod estimate;
pub mod inspect;
pub mod noise;
pub mod preprocess;
pub mod prompt;
pub mod sampler;
pub mod schedule;
pub mod tiling;
pub mod weights;

mod describe;
mod error;
mod residency;
mod vocabulary;

/// Building blocks shared by the models, with the fast CPU paths.
pub mod nn {
    pub mod activation;
    pub mod attention;
    pub mod conv;
    mod cpu;
    pub mod embedding;
    pub mod feed_forward;
    pub mod linear;
    pub mod norm;
    pub mod resnet;
    pub mod transformer;
    pub mod video_resnet;
    pub mod video_transformer;
}

/// One architecture a file; field names follow the checkpoint.
pub mod models {
    pub mod clip_text;
    pub mod clip_vision;
    pub mod unet;
    pub mod unet_video;
    pub mod vae;
    pub mod vae_video;
}

/// One run a file, top to bottom.
pub mod pipelines {
    pub mod stable_diffusion;
    pub mod stable_video;
}

use std::ops::ControlFlow;

pub use checkpoint::{Checkpoint, Keep, Trace};
pub use describe::{Description, Task, describe};
pub use error::{Error, Result};
pub use pipelines::stable_diffusion::{ImageModel, ImageOutput, ImageRequest};
pub use pipelines::stable_video::{VideoModel, VideoOutput, VideoRequest};
pub use residency::Residency;
pub use sampler::Sampler;
pub use weights::{LoadOptions, LoraFile};

/// What just happened inside a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StepEvent {
    /// `done` of `total` parts of a model are in memory.
    Load {
        /// Parts loaded so far.
        done: u32,
        /// Parts of the model.
        total: u32,
    },
    /// The prompt or the picture that conditions the run is encoded.
    EncodePrompt,
    /// `step` of `total` denoising steps are done; it comes several times a step, so that a stop is felt soon.
    Denoise {
        /// Steps finished.
        step: u32,
        /// Steps of the run.
        total: u32,
    },
    /// `done` of `total` pictures are decoded.
    Decode {
        /// Pictures decoded so far.
        done: u32,
        /// Pictures of the run.
        total: u32,
    },
}

/// Told about each event; a break ends the run with [`Error::Stopped`].
pub type Hook<'a> = dyn FnMut(StepEvent) -> ControlFlow<()> + 'a;

/// Tells `hook` about `event`; [`Error::Stopped`] when it breaks.
pub(crate) fn tell(hook: &mut Hook<'_>, event: StepEvent) -> Result<()> {
    match hook(event) {
        ControlFlow::Continue(()) => Ok(()),
        ControlFlow::Break(()) => Err(Error::Stopped),
    }
}
