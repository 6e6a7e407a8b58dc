//! A look at the encoder before there is a job: one small frame goes through the whole of it.

use std::ops::ControlFlow;

use image::RgbImage;

use super::Error;
use super::encode_video::{CRF, ENCODER_THREADS};
use crate::media::encode::VideoWriter;
use crate::media::{FrameRate, VideoSpec};
use crate::store::Store;

/// Which encoder videos are made with, tried out; the file is gone afterwards.
pub fn check_encoder(store: &Store) -> Result<String, Error> {
    let file = store.temp_file(None, ".mp4")?;
    let spec = VideoSpec {
        width: 64,
        height: 64,
        fps: FrameRate { num: 24, den: 1 },
        metadata: Vec::new(),
        threads: ENCODER_THREADS,
        crf: CRF,
    };
    let mut writer = VideoWriter::create(file.path(), &spec)?;
    writer.push(&RgbImage::new(spec.width, spec.height))?;
    let encoder = writer.encoder();
    writer.finish(&mut || ControlFlow::Continue(()))?;
    Ok(encoder)
}
