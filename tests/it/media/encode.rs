//! Films as ffprobe, ffmpeg and a reader of boxes see them.

use std::ops::ControlFlow;
use std::path::Path;

use genvideo::media::encode::{Choice, VideoWriter};
use genvideo::media::{Error, FrameRate, VideoInfo, VideoSpec, label, probe};
use image::{Rgb, RgbImage};
use serde_json::Value;

use super::{noise, run, spec, square, text};

/// Ends the film, whatever it takes.
fn finish(writer: VideoWriter) -> Result<VideoInfo, Error> {
    writer.finish(&mut || ControlFlow::Continue(()))
}

/// Writes a film of `frames` moving squares and returns what the writer says of it.
fn film(path: &Path, spec: &VideoSpec, frames: u32) -> VideoInfo {
    let mut writer = VideoWriter::create(path, spec).unwrap();
    for k in 0..frames {
        writer.push(&square((spec.width, spec.height), k % spec.width, 0, 8)).unwrap();
    }
    finish(writer).unwrap()
}

fn ffprobe(path: &Path) -> Value {
    let output = run(
        "ffprobe",
        &[
            "-v",
            "error",
            "-count_frames",
            "-show_streams",
            "-show_format",
            "-of",
            "json",
            text(path),
        ],
    );
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Every frame as RGB, by ffmpeg's own reading of the tags.
fn decode(path: &Path) -> Vec<u8> {
    let flags = "scale=flags=accurate_rnd+full_chroma_int+full_chroma_inp";
    let output = run(
        "ffmpeg",
        &[
            "-v",
            "error",
            "-i",
            text(path),
            "-vf",
            flags,
            "-f",
            "rawvideo",
            "-pix_fmt",
            "rgb24",
            "-",
        ],
    );
    assert!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

/// Names of the top-level boxes.
fn boxes(bytes: &[u8]) -> Vec<String> {
    let (mut names, mut at) = (Vec::new(), 0);
    while at + 8 <= bytes.len() {
        let length = u32::from_be_bytes(bytes[at..at + 4].try_into().unwrap()) as usize;
        names.push(String::from_utf8_lossy(&bytes[at + 4..at + 8]).into_owned());
        at += length.max(8);
    }
    assert_eq!(at, bytes.len());
    names
}

#[test]
fn every_size_rate_and_length_is_what_was_asked() {
    let folder = tempfile::tempdir().unwrap();
    let table = [
        ((64, 48), (7, 1), 14),
        ((64, 48), (25, 1), 1),
        ((65, 49), (24, 1), 5),
        ((64, 49), (24000, 1001), 25),
        ((63, 48), (30000, 1001), 7),
        ((320, 180), (8, 1), 25),
        ((180, 320), (3, 1), 9),
        ((2, 2), (1, 1), 2),
        ((1, 1), (60, 1), 3),
        ((33, 17), (2997, 125), 50),
        ((128, 64), (6, 1), 40),
        ((512, 320), (5, 2), 4),
    ];
    for (index, (size, rate, frames)) in table.into_iter().enumerate() {
        let path = folder.path().join(format!("{index}.mp4"));
        let info = film(&path, &spec(size.0, size.1, rate), frames);
        let even = (size.0.next_multiple_of(2), size.1.next_multiple_of(2));
        let name = format!("{size:?} at {rate:?}, {frames} frames");
        assert_eq!((info.width, info.height, info.frames), (even.0, even.1, frames), "{name}");
        let probed = ffprobe(&path);
        let stream = &probed["streams"][0];
        let wanted = [
            ("codec_name", "h264"),
            ("profile", "High"),
            ("pix_fmt", "yuv420p"),
            ("color_range", "tv"),
            ("color_space", "bt709"),
            ("color_primaries", "bt709"),
            ("color_transfer", "bt709"),
            ("sample_aspect_ratio", "1:1"),
        ];
        for (field, value) in wanted {
            assert_eq!(stream[field], value, "{name}: {field}");
        }
        assert_eq!(
            (&stream["width"], &stream["height"]),
            (&even.0.into(), &even.1.into()),
            "{name}"
        );
        assert_eq!(stream["nb_read_frames"], frames.to_string(), "{name}");
        assert_eq!(stream["nb_frames"], frames.to_string(), "{name}");
        assert_eq!(stream["r_frame_rate"], format!("{}/{}", rate.0, rate.1), "{name}");
        assert_eq!(info.fps, FrameRate { num: rate.0, den: rate.1 }, "{name}");
        let seconds = f64::from(frames) * f64::from(rate.1) / f64::from(rate.0);
        let duration: f64 = probed["format"]["duration"].as_str().unwrap().parse().unwrap();
        assert!((duration - seconds).abs() < 0.002, "{name}: {duration}");
        assert!((info.duration - seconds).abs() < 0.001, "{name}: {}", info.duration);
        assert_eq!(stream["start_time"], "0.000000", "{name}");
        assert_eq!(decode(&path).len(), (even.0 * even.1 * 3 * frames) as usize, "{name}");
    }
}

#[test]
fn the_index_comes_first_and_the_label_last() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.mp4");
    let writer = VideoWriter::create(&path, &spec(64, 64, (8, 1))).unwrap();
    assert!(folder.path().join("a.mp4.part").exists() && !path.exists());
    assert!(
        writer.encoder().starts_with("libx264") || writer.encoder().contains("libx264: "),
        "{}",
        writer.encoder()
    );
    drop(writer);
    film(&path, &spec(64, 64, (8, 1)), 20);
    let bytes = std::fs::read(&path).unwrap();
    let boxes = boxes(&bytes);
    let place = |name: &str| boxes.iter().position(|found| found == name).unwrap();
    assert!(place("moov") < place("mdat"), "{boxes:?}");
    assert_eq!(boxes.last().unwrap(), "uuid");
    assert!(String::from_utf8_lossy(&bytes).contains(label::XMP));
    assert!(bytes.windows(4).any(|window| window == b"colr"));
    let probed = probe::probe(&path).unwrap();
    let source = probed.metadata.iter().find(|(key, _)| key == "DigitalSourceType").unwrap();
    assert_eq!(source.1, label::SOURCE_TYPE);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
}

#[test]
fn saturated_patches_come_back_within_two_levels() {
    let folder = tempfile::tempdir().unwrap();
    let colours: [[u8; 3]; 12] = [
        [255, 0, 0],
        [0, 255, 0],
        [0, 0, 255],
        [255, 255, 255],
        [0, 0, 0],
        [128, 128, 128],
        [200, 30, 90],
        [30, 144, 200],
        [255, 255, 0],
        [0, 255, 255],
        [255, 0, 255],
        [12, 200, 100],
    ];
    for (index, colour) in colours.into_iter().enumerate() {
        let path = folder.path().join(format!("{index}.mp4"));
        let mut writer =
            VideoWriter::create(&path, &VideoSpec { crf: 10, ..spec(63, 48, (4, 1)) }).unwrap();
        for _ in 0..3 {
            writer.push(&RgbImage::from_pixel(63, 48, Rgb(colour))).unwrap();
        }
        finish(writer).unwrap();
        let pixels = decode(&path);
        let off = pixels
            .as_chunks::<3>()
            .0
            .iter()
            .flat_map(|pixel| [0, 1, 2].map(|c| pixel[c].abs_diff(colour[c])));
        assert!(off.clone().max().unwrap() <= 2, "{colour:?} is off by {}", off.max().unwrap());
    }
}

#[test]
fn many_patches_in_one_picture_keep_their_colours_and_places() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.mp4");
    let colour = |column: u32, row: u32| {
        [0, 1, 2].map(|c| if (column + 4 * row) >> c & 1 == 1 { 230 } else { 25 })
    };
    let image = RgbImage::from_fn(128, 64, |x, y| Rgb(colour(x / 32, y / 32)));
    let mut writer =
        VideoWriter::create(&path, &VideoSpec { crf: 5, ..spec(128, 64, (4, 1)) }).unwrap();
    writer.push(&image).unwrap();
    finish(writer).unwrap();
    let decoded = RgbImage::from_raw(128, 64, decode(&path)).unwrap();
    for (x, y, pixel) in decoded.enumerate_pixels() {
        let inside = (6..26).contains(&(x % 32)) && (6..26).contains(&(y % 32));
        let wanted = image.get_pixel(x, y);
        let off = [0, 1, 2].map(|c| pixel[c].abs_diff(wanted[c])).into_iter().max().unwrap();
        assert!(!inside || off <= 3, "{x},{y}: {pixel:?}, wanted {wanted:?}");
    }
}

#[test]
fn the_same_frames_give_the_same_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, threads: u32| {
        let path = folder.path().join(name);
        let spec = VideoSpec {
            threads,
            metadata: vec![("title".into(), "t".into())],
            ..spec(160, 96, (12, 1))
        };
        let mut writer = VideoWriter::create(&path, &spec).unwrap();
        for k in 0..30 {
            writer.push(&noise(160, 96, k / 3)).unwrap();
        }
        finish(writer).unwrap();
        std::fs::read(path).unwrap()
    };
    for threads in [1, 3] {
        assert_eq!(write("a.mp4", threads), write("b.mp4", threads), "{threads} threads");
    }
}

/// Tells the children of [`no_byte_depends_on_what_the_heap_held`] where to leave their film.
const FILM: &str = "MEDIA_TEST_FILM";

#[test]
fn a_film_of_something_textured_that_moves() {
    let folder = tempfile::tempdir().unwrap();
    let path = std::env::var_os(FILM).map_or(folder.path().join("a.mp4"), Into::into);
    let mut writer = VideoWriter::create(&path, &spec(144, 96, (12, 1))).unwrap();
    for k in 0..12 {
        let mut frame = square((144, 96), 0, 90, 2);
        image::imageops::overlay(&mut frame, &noise(32, 32, 1), 4 * i64::from(k), 8);
        writer.push(&frame).unwrap();
    }
    assert_eq!(finish(writer).unwrap().frames, 12);
}

/// An encoder that reads memory it never wrote gives other bytes when the heap is filled with other ones.
#[cfg(target_os = "linux")]
#[test]
fn no_byte_depends_on_what_the_heap_held() {
    let folder = tempfile::tempdir().unwrap();
    let films = ["0", "85", "200"].map(|filling| {
        let path = folder.path().join(filling);
        let status = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "media::encode::a_film_of_something_textured_that_moves"])
            .envs([(FILM, path.as_os_str()), ("MALLOC_PERTURB_", filling.as_ref())])
            .stdin(std::process::Stdio::null())
            .stdout(std::process::Stdio::null())
            .status();
        assert!(status.unwrap().success());
        std::fs::read(path).unwrap()
    });
    assert!(films.iter().all(|film| film == &films[0]));
}

#[test]
fn a_stop_is_heard_while_the_film_is_read_back() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.mp4");
    for stop_at in [1, 2, 7] {
        let mut writer = VideoWriter::create(&path, &spec(64, 48, (8, 1))).unwrap();
        for k in 0..24 {
            writer.push(&square((64, 48), k, 0, 8)).unwrap();
        }
        let mut asked = 0;
        let stopped = writer.finish(&mut || {
            asked += 1;
            if asked == stop_at { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        assert!(matches!(stopped, Err(Error::Stopped)), "{stop_at}: {stopped:?}");
        assert_eq!(asked, stop_at);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "{stop_at}");
    }
}

#[test]
fn metadata_comes_back_in_any_script() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("电影 a:b.mp4");
    let pairs = [
        ("title", "一只猫在雨中跳舞"),
        ("comment", r#"{"seed":42,"quote":"\"=;#\n"}"#),
        ("genvideo", "schema 1"),
        ("AIGC", r#"{"Label":"1"}"#),
        ("nul", "a\0b"),
    ];
    let metadata = pairs.map(|(key, value)| (key.to_owned(), value.to_owned())).to_vec();
    film(&path, &VideoSpec { metadata, ..spec(64, 48, (8, 1)) }, 3);
    let tags = ffprobe(&path)["format"]["tags"].clone();
    let read = probe::probe(&path).unwrap().metadata;
    for (key, value) in pairs {
        let value = value.replace('\0', "");
        assert_eq!(tags[key], value, "{tags}");
        assert!(read.contains(&(key.to_owned(), value)), "{read:?}");
    }
}

#[test]
fn a_writer_may_move_to_another_thread() {
    fn send<T: Send>() {}
    send::<VideoWriter>();
}

#[test]
fn an_own_label_replaces_the_default_one() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.mp4");
    let metadata = vec![(label::VIDEO_KEY.to_owned(), "<x:xmpmeta own='1'/>".to_owned())];
    film(&path, &VideoSpec { metadata, ..spec(64, 48, (8, 1)) }, 1);
    let bytes = std::fs::read(&path).unwrap();
    let text = String::from_utf8_lossy(&bytes);
    assert!(text.ends_with("<x:xmpmeta own='1'/>") && !text.contains("trainedAlgorithmicMedia"));
}

#[test]
fn nothing_is_left_of_a_film_that_is_not_finished() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.mp4");
    let count = || std::fs::read_dir(folder.path()).unwrap().count();

    let mut dropped = VideoWriter::create(&path, &spec(64, 48, (8, 1))).unwrap();
    dropped.push(&noise(64, 48, 1)).unwrap();
    assert_eq!(count(), 1);
    drop(dropped);
    assert_eq!(count(), 0);

    let empty = VideoWriter::create(&path, &spec(64, 48, (8, 1))).unwrap();
    assert_eq!(finish(empty).unwrap_err().class_name(), "ENCODE_ERROR");
    let mut wrong = VideoWriter::create(&path, &spec(64, 48, (8, 1))).unwrap();
    assert_eq!(
        wrong.push(&noise(48, 64, 1)).unwrap_err().to_string(),
        "video frame size is 48x64, wanted 64x48"
    );
    drop(wrong);
    assert_eq!(count(), 0);

    let nowhere = VideoWriter::create(&folder.path().join("none/a.mp4"), &spec(64, 48, (8, 1)));
    assert_eq!(nowhere.err().unwrap().class_name(), "OUTPUT_UNWRITABLE");
    for bad in
        [spec(0, 48, (8, 1)), spec(64, 48, (0, 1)), spec(64, 48, (8, 0)), spec(20000, 48, (8, 1))]
    {
        assert_eq!(
            VideoWriter::create(&path, &bad).err().unwrap().class_name(),
            "ENCODE_ERROR",
            "{bad:?}"
        );
    }
    assert_eq!(count(), 0);
}

#[test]
fn a_finished_film_replaces_an_older_one() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.mp4");
    std::fs::write(&path, "old").unwrap();
    std::fs::write(folder.path().join("a.mp4.part"), "left by a crash").unwrap();
    assert_eq!(film(&path, &spec(64, 48, (8, 1)), 4).frames, 4);
    assert_eq!(probe::probe(&path).unwrap().frames, 4);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
}

#[test]
fn hardware_that_is_not_there_is_named_and_passed_over() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.mp4");
    let spec = spec(256, 256, (8, 1));
    let mut writer = VideoWriter::create_with(&path, &spec, Choice::HardwareFirst).unwrap();
    let report = writer.encoder();
    assert!(report.starts_with("h264_nvenc") || report.contains("h264_nvenc: "), "{report}");
    writer.push(&noise(256, 256, 1)).unwrap();
    assert_eq!(finish(writer).unwrap().frames, 1);
}

#[test]
fn a_damaged_film_does_not_pass_the_probe() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.mp4");
    film(&path, &spec(160, 96, (8, 1)), 24);
    let whole = std::fs::read(&path).unwrap();
    let check = |bytes: &[u8]| {
        let path = folder.path().join("b.mp4");
        std::fs::write(&path, bytes).unwrap();
        probe::probe(&path)
    };
    assert_eq!(check(&whole).unwrap().frames, 24);
    assert!(
        check(&whole[..whole.len() / 2]).is_err_and(|error| error.class_name() == "ENCODE_ERROR")
    );
    assert!(check(b"").is_err());
    assert!(check(b"#EXTM3U\nhttp://localhost/x\n").is_err());
    assert_eq!(
        probe::probe(&folder.path().join("c.mp4")).unwrap_err().class_name(),
        "OUTPUT_UNWRITABLE"
    );
}

/// `/dev/full` takes every open and refuses every byte.
#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_is_called_by_its_name() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.mp4");
    std::os::unix::fs::symlink("/dev/full", folder.path().join("a.mp4.part")).unwrap();
    let outcome = VideoWriter::create(&path, &spec(256, 256, (8, 1))).and_then(|mut writer| {
        for k in 0..60 {
            writer.push(&noise(256, 256, k))?;
        }
        finish(writer)
    });
    assert_eq!(outcome.unwrap_err().class_name(), "DISK_FULL");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}

/// What the encoder says goes to `tracing` at debug level, not to the terminal.
#[cfg(all(target_arch = "x86_64", unix))]
#[test]
fn the_log_of_libav_becomes_events() {
    #[derive(Clone, Default)]
    struct Lines(std::sync::Arc<std::sync::Mutex<Vec<u8>>>);
    impl std::io::Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let folder = tempfile::tempdir().unwrap();
    let lines = Lines::default();
    let writer = lines.clone();
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(tracing::Level::DEBUG)
        .with_writer(move || writer.clone())
        .with_ansi(false)
        .finish();
    tracing::subscriber::with_default(subscriber, || {
        film(&folder.path().join("a.mp4"), &spec(64, 48, (8, 1)), 2)
    });
    let text = String::from_utf8(lines.0.lock().unwrap().clone()).unwrap();
    assert!(text.contains("DEBUG libav: ") && text.contains("profile High"), "{text}");
}
