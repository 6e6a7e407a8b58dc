//! One run of a model of published size, as `scripts/full_size.py` writes them: seconds of each stage.
//!
//!     cargo bench --bench full_size -- FOLDER [width=N] [height=N] [steps=N] [frames=N] [chunk=N] [guidance=X] [dtype=T]
//!
//! The device is that of `GENVIDEO_DEVICE`, else the best there is. The run is made twice; what the first one adds is
//! the choice of kernels.

#![expect(clippy::print_stdout, reason = "the figures are the purpose")]

use std::collections::HashMap;
use std::ops::ControlFlow;
use std::path::Path;
use std::time::{Duration, Instant};

use genvideo::engine::device::{self, Compute, keep_freed_memory};
use genvideo::engine::{
    Hook, ImageModel, ImageRequest, Result, StepEvent, VideoModel, VideoRequest,
};
use image::RgbImage;

/// When each stage of a run was seen.
struct Times {
    last: Instant,
    steps: Vec<Duration>,
    decode: Duration,
}

impl Times {
    /// Runs `work`, and says how long its stages took.
    fn of(work: &mut dyn FnMut(&mut Hook<'_>) -> Result<()>) -> Result<Self> {
        let mut times =
            Self { last: Instant::now(), steps: Vec::new(), decode: Duration::default() };
        let (mut seen, mut started) = (0, false);
        work(&mut |event| {
            let now = Instant::now();
            match event {
                StepEvent::Denoise { step, .. } if step > seen => {
                    times.steps.push(now - times.last);
                    (seen, times.last) = (step, now);
                }
                // Told within the first step too: only the first time counts.
                StepEvent::Denoise { step: 0, .. } if !started => {
                    (started, times.last) = (true, now)
                }
                StepEvent::Decode { .. } => times.decode = now - times.last,
                _ => {}
            }
            ControlFlow::Continue(())
        })?;
        Ok(times)
    }

    fn show(&self, about: &str) {
        let steps: Vec<String> =
            self.steps.iter().map(|step| format!("{:.3}", step.as_secs_f64())).collect();
        let best = self.steps.iter().min().map_or(0.0, Duration::as_secs_f64);
        println!(
            "full: {about} best step {best:.4} s ({:.2} steps/s) decode {:.3} s; steps {}",
            1.0 / best,
            self.decode.as_secs_f64(),
            steps.join(" ")
        );
    }
}

fn main() -> std::result::Result<(), Box<dyn std::error::Error>> {
    keep_freed_memory();
    let mut folder = None;
    let mut options = HashMap::new();
    for argument in std::env::args().skip(1).filter(|argument| argument != "--bench") {
        match argument.split_once('=') {
            Some((key, value)) => drop(options.insert(key.to_owned(), value.to_owned())),
            None => folder = Some(argument),
        }
    }
    let Some(folder) = folder else {
        println!("full: no model given, nothing to measure");
        return Ok(());
    };
    let text = |key: &str, default: &str| {
        options.get(key).map_or_else(|| default.to_owned(), Clone::clone)
    };
    let name = std::env::var("GENVIDEO_DEVICE").unwrap_or_else(|_| "auto".into());
    let compute = device::open(&name, &text("dtype", "auto"))?;
    println!("full: {folder} on {} in {}", compute.name(), compute.dtype_name());
    let number = |key: &str, default: &str| text(key, default).parse::<u32>();
    let size = (number("width", "512")?, number("height", "512")?);
    let steps = number("steps", "5")?;
    let guidance: f64 = text("guidance", "7.5").parse()?;
    let folder = Path::new(&folder);
    if folder.join("image_encoder").is_dir() {
        let frames = number("frames", "14")?;
        let request = VideoRequest {
            image: RgbImage::new(size.0, size.1),
            frames,
            width: size.0,
            height: size.1,
            steps,
            fps: 7,
            motion: 127,
            noise_aug: 0.02,
            min_guidance: 1.0,
            max_guidance: guidance,
            decode_chunk: number("chunk", "2")?,
            tiling: None,
            seed: 1,
            run: 0,
        };
        video(folder, &compute, &request)?;
    } else {
        let prompt = "a lighthouse".into();
        let (width, height) = size;
        let request =
            ImageRequest { prompt, width, height, steps, guidance, ..ImageRequest::default() };
        image(folder, &compute, &request)?;
    }
    Ok(())
}

fn image(folder: &Path, compute: &Compute, request: &ImageRequest) -> Result<()> {
    let start = Instant::now();
    let model = ImageModel::load(folder, compute, &mut |_| ControlFlow::Continue(()))?;
    println!("full: loaded in {:.2} s", start.elapsed().as_secs_f64());
    for about in ["first", "second"] {
        let times = Times::of(&mut |hook| {
            let output = model.generate(request, hook)?;
            output.notes.iter().for_each(|note| println!("full: note: {note}"));
            Ok(())
        })?;
        times.show(about);
    }
    Ok(())
}

fn video(folder: &Path, compute: &Compute, request: &VideoRequest) -> Result<()> {
    let start = Instant::now();
    let model = VideoModel::load(folder, compute, &mut |_| ControlFlow::Continue(()))?;
    println!("full: loaded in {:.2} s", start.elapsed().as_secs_f64());
    for about in ["first", "second"] {
        let times = Times::of(&mut |hook| {
            let output = model.animate(request, hook)?;
            output.notes.iter().for_each(|note| println!("full: note: {note}"));
            Ok(())
        })?;
        times.show(about);
    }
    Ok(())
}
