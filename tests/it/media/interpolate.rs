//! Frames in between: counts, ends, motion, stillness, distrust.

use std::ops::ControlFlow;

use genvideo::media::Error;
use genvideo::media::interpolate::{Interpolated, interpolate};
use genvideo::media::still;
use image::{Rgb, RgbImage};

use super::{noise, square};

fn all(frames: &[RgbImage], out_count: u32) -> (Vec<RgbImage>, Interpolated) {
    let mut made = Vec::new();
    let counts = interpolate(frames, out_count, &mut |frame| {
        made.push(frame);
        Ok(ControlFlow::Continue(()))
    });
    (made, counts.unwrap())
}

/// Centre of what is bright.
fn centroid(image: &RgbImage) -> (f64, f64) {
    let (mut weight, mut sum) = (0.0, (0.0, 0.0));
    for (x, y, pixel) in image.enumerate_pixels() {
        let value = f64::from(pixel[1].saturating_sub(60));
        weight += value;
        sum = (sum.0 + value * f64::from(x), sum.1 + value * f64::from(y));
    }
    (sum.0 / weight, sum.1 / weight)
}

#[test]
fn counts_and_ends_are_exact() {
    let frames: Vec<RgbImage> = (0..5).map(|k| square((96, 64), 10 + 6 * k, 20, 24)).collect();
    for (sources, outputs) in
        [(5, 5), (5, 9), (5, 12), (5, 3), (5, 2), (5, 1), (2, 2), (2, 7), (1, 1), (1, 4), (3, 4)]
    {
        let (made, counts) = all(&frames[..sources], outputs);
        let name = format!("{sources} to {outputs}");
        assert_eq!(made.len(), outputs as usize, "{name}");
        assert_eq!(counts.native + counts.made, outputs, "{name}");
        assert_eq!(made[0], frames[0], "{name}");
        if outputs > 1 {
            assert_eq!(made[outputs as usize - 1], frames[sources - 1], "{name}");
        }
        let native = made.iter().filter(|frame| frames[..sources].contains(frame)).count();
        let wanted = if sources == 1 { outputs } else { counts.native };
        assert_eq!(native, wanted as usize, "{name}: {counts:?}");
    }
    assert_eq!(all(&frames, 9).1, Interpolated { native: 5, made: 4 });
    assert_eq!(all(&frames, 12).1, Interpolated { native: 2, made: 10 });
    assert_eq!(all(&frames[..1], 4).1, Interpolated { native: 1, made: 3 });
}

#[test]
fn a_moving_square_moves_evenly() {
    for (step, colour) in
        [(4i32, [230, 200, 60]), (12, [230, 200, 60]), (12, [60, 230, 60]), (-10, [230, 200, 200])]
    {
        let start = if step > 0 { 20 } else { 90 };
        let frames: Vec<RgbImage> = (0..6)
            .map(|k| {
                let mut frame = square((192, 96), u32::try_from(start + step * k).unwrap(), 30, 36);
                frame
                    .pixels_mut()
                    .filter(|pixel| pixel[1] == 200)
                    .for_each(|pixel| *pixel = Rgb(colour));
                frame
            })
            .collect();
        let (made, _) = all(&frames, 21);
        let (first, last) = (centroid(&frames[0]), centroid(&frames[5]));
        let mut before = first.0;
        for (k, frame) in made.iter().enumerate() {
            let centre = centroid(frame);
            let wanted = first.0 + (last.0 - first.0) * k as f64 / 20.0;
            assert!(
                (centre.0 - wanted).abs() < 1.5,
                "step {step}, frame {k}: {} not {wanted}",
                centre.0
            );
            assert!((centre.1 - first.1).abs() < 1.5, "step {step}, frame {k}: {centre:?}");
            let forward = (centre.0 - before) * f64::from(step.signum());
            assert!(k == 0 || forward > 0.0, "step {step}, frame {k} goes back");
            before = centre.0;
            // The square stays one sharp square: as many bright pixels as before.
            let bright = |image: &RgbImage| image.pixels().filter(|pixel| pixel[1] > 180).count();
            let (now, source) = (bright(frame), bright(&frames[0]));
            assert!(
                now * 10 > source * 9 && now * 10 < source * 11,
                "step {step}, frame {k}: {now} of {source}"
            );
        }
    }
}

#[test]
fn a_still_picture_stays_itself() {
    let picture = noise(70, 50, 9);
    let (made, _) = all(&[picture.clone(), picture.clone(), picture.clone()], 11);
    assert!(made.iter().all(|frame| *frame == picture));
}

#[test]
fn the_still_part_of_a_moving_picture_stays_itself() {
    let ground = noise(192, 96, 4);
    let frames: Vec<RgbImage> = (0..4)
        .map(|k| {
            let mut frame = ground.clone();
            for (x, y) in (0..20).flat_map(|x| (0..20).map(move |y| (x, y))) {
                frame.put_pixel(8 + 3 * k + x, 30 + y, Rgb([250, 250, 250]));
            }
            frame
        })
        .collect();
    for frame in all(&frames, 10).0 {
        for (x, y, pixel) in frame.enumerate_pixels().filter(|(x, ..)| *x > 120) {
            assert_eq!(pixel, ground.get_pixel(x, y), "{x},{y}");
        }
    }
}

#[test]
fn colours_are_not_shifted() {
    let colours =
        [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0], [17, 99, 201], [254, 255, 253]];
    for colour in colours {
        let (mut a, mut b) =
            (RgbImage::from_pixel(80, 48, Rgb(colour)), RgbImage::from_pixel(80, 48, Rgb(colour)));
        // Something moves in a corner, so that the filter really runs.
        for k in 0..6 {
            a.put_pixel(4 + k, 4, Rgb([0, 0, 0]));
            b.put_pixel(6 + k, 4, Rgb([0, 0, 0]));
        }
        for frame in all(&[a, b], 5).0 {
            let off = frame
                .enumerate_pixels()
                .filter(|(_, y, _)| *y > 30)
                .all(|(_, _, pixel)| pixel.0 == colour);
            assert!(off, "{colour:?}");
        }
    }
}

#[test]
fn pictures_with_nothing_in_common_are_mixed() {
    let blotches = |seed| still::resize(&noise(16, 12, seed), 128, 96);
    let (a, b) = (blotches(21), blotches(22));
    let (made, _) = all(&[a.clone(), b.clone()], 5);
    for (k, frame) in made.iter().enumerate() {
        let weight = k as f64 / 4.0;
        let off = |((&a, &b), &got): ((&u8, &u8), &u8)| {
            let mixed = f64::from(a) + (f64::from(b) - f64::from(a)) * weight;
            (f64::from(got) - mixed).abs()
        };
        let mean = a.iter().zip(b.iter()).zip(frame.iter()).map(off).sum::<f64>() / a.len() as f64;
        assert!(mean < 12.0, "frame {k} is off the mix by {mean}");
    }
}

#[test]
fn any_size_works() {
    for (width, height) in [(1, 1), (2, 3), (15, 17), (16, 16), (64, 2), (333, 187)] {
        let frames = [noise(width, height, 1), noise(width, height, 2), noise(width, height, 3)];
        let (made, _) = all(&frames, 6);
        assert!(made.iter().all(|frame| frame.dimensions() == (width, height)));
        assert_eq!(made[5], frames[2]);
    }
}

#[test]
fn a_break_of_the_sink_stops_and_its_error_comes_through() {
    let frames: Vec<RgbImage> = (0..4).map(|k| square((64, 64), 8 * k, 8, 16)).collect();
    let mut seen = 0;
    let counts = interpolate(&frames, 100, &mut |_| {
        seen += 1;
        Ok(if seen == 7 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
    });
    let counts = counts.unwrap();
    assert_eq!((seen, counts.native + counts.made), (7, 7));
    let failed = interpolate(&frames, 9, &mut |_| Err(Error::Sink("the disk is full".into())));
    assert_eq!(failed.unwrap_err().to_string(), "the disk is full");
    for bad in [Vec::new(), vec![noise(8, 8, 1), noise(8, 9, 1)]] {
        assert!(interpolate(&bad, 4, &mut |_| Ok(ControlFlow::Continue(()))).is_err());
    }
}

#[test]
fn the_same_frames_give_the_same_frames() {
    let frames: Vec<RgbImage> = (0..3).map(|k| square((120, 80), 10 + 9 * k, 12, 30)).collect();
    assert_eq!(all(&frames, 8).0, all(&frames, 8).0);
}
