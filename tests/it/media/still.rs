//! Pictures: the corpus of good and hostile files, PNG chunks, sizes.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use genvideo::media::still::{self, Limits};
use genvideo::media::{Error, label};
use image::{ImageFormat, Rgb, RgbImage};
use serde_json::Value;

use super::{noise, run, text};

/// Formats the corpus would have read by a wider product; this one reads PNG, JPEG and WebP, so they are refused
/// without a look inside.
const REFUSED_HERE: &[&str] = &["img-bmp", "img-tiff", "img-gif"];

/// Tells the child of [`the_corpus_takes_less_than_a_gigabyte`] to write its peak.
const PEAK: &str = "MEDIA_TEST_PEAK";

fn corpus() -> PathBuf {
    match std::env::var_os("GENVIDEO_CORPUS") {
        Some(folder) => PathBuf::from(folder),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/corpus"),
    }
}

fn cases() -> Vec<Value> {
    let manifest = std::fs::read(corpus().join("manifest.json")).unwrap();
    let manifest: Value = serde_json::from_slice(&manifest).unwrap();
    let cases = manifest["cases"].as_array().unwrap();
    cases.iter().filter(|case| case["category"] == "image").cloned().collect()
}

fn bytes(case: &Value) -> Vec<u8> {
    let path = corpus().join(case["file"].as_str().unwrap());
    match case["encoding"].as_str() {
        Some("gzip") => run("gzip", &["-dc", text(&path)]).stdout,
        _ => std::fs::read(path).unwrap(),
    }
}

/// What is wrong with the outcome of one case, if anything.
fn fault(case: &Value) -> Option<String> {
    let id = case["id"].as_str().unwrap();
    let outcome = still::decode(&bytes(case), &Limits::default());
    let class = outcome.as_ref().err().map(Error::class_name);
    if REFUSED_HERE.iter().any(|prefix| id.starts_with(prefix)) {
        return (class != Some("UNSUPPORTED_FORMAT"))
            .then(|| format!("{id}: {class:?}, wanted UNSUPPORTED_FORMAT"));
    }
    let allowed: Vec<&str> = std::iter::once(&case["error"])
        .chain(case["error_alt"].as_array().into_iter().flatten())
        .filter_map(Value::as_str)
        .collect();
    match outcome {
        Ok(_) if case["expect"] != "accepted" => {
            Some(format!("{id}: accepted, wanted {allowed:?}"))
        }
        Ok(decoded) => picture_fault(case, &decoded.image).map(|fault| format!("{id}: {fault}")),
        Err(error) if allowed.contains(&error.class_name()) => None,
        Err(error) => Some(format!("{id}: {} ({error}), wanted {allowed:?}", error.class_name())),
    }
}

fn picture_fault(case: &Value, image: &RgbImage) -> Option<String> {
    let check = &case["check"];
    let size = [check["size"][0].as_u64()?, check["size"][1].as_u64()?];
    if size != [u64::from(image.width()), u64::from(image.height())] {
        return Some(format!("size {:?}, wanted {size:?}", image.dimensions()));
    }
    let Rgb([red, green, blue]) = *image.get_pixel(4, 4);
    if check["top_left"] == "red" && !(red > 180 && green < 80 && blue < 80) {
        return Some(format!("top left is {red},{green},{blue}"));
    }
    let forbidden = case["must_not_contain"].as_str()?.as_bytes();
    let written = still::png(image, &[]);
    written
        .windows(forbidden.len())
        .any(|window| window == forbidden)
        .then(|| "trailer kept".to_owned())
}

#[test]
fn every_corpus_image_gets_its_class() {
    let faults: Vec<String> = cases().iter().filter_map(fault).collect();
    assert!(faults.is_empty(), "{faults:#?}");
    if let Some(path) = std::env::var_os(PEAK) {
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        let peak = status.lines().find(|line| line.starts_with("VmHWM")).unwrap_or("VmHWM: 0 kB");
        std::fs::write(path, peak).unwrap();
    }
}

/// Alone in a process of its own, so that nothing else counts.
#[cfg(target_os = "linux")]
#[test]
fn the_corpus_takes_less_than_a_gigabyte() {
    let folder = tempfile::tempdir().unwrap();
    let report = folder.path().join("peak");
    let status = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "media::still::every_corpus_image_gets_its_class"])
        .env(PEAK, &report)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .status();
    assert!(status.unwrap().success());
    let peak = std::fs::read_to_string(report).unwrap();
    let kilobytes: u64 = peak.split_whitespace().nth(1).unwrap().parse().unwrap();
    assert!(kilobytes < 1 << 20, "{peak}");
}

#[test]
fn all_exif_orientations_give_the_same_upright_picture() {
    let folder = corpus().join("image");
    let load = |n: u32| {
        let bytes = std::fs::read(folder.join(format!("img-jpeg-exif-{n}.jpg"))).unwrap();
        still::decode(&bytes, &Limits::default()).unwrap()
    };
    let upright = load(1);
    assert!(upright.notes.is_empty(), "{:?}", upright.notes);
    for n in [3, 5, 6, 7, 8] {
        let turned = load(n);
        let pairs = upright.image.iter().zip(turned.image.iter());
        let sum: u64 = pairs.map(|(&a, &b)| u64::from(a.abs_diff(b))).sum();
        assert!(sum / (64 * 48 * 3) < 8, "orientation {n} is off by {sum}");
        assert!(turned.notes.iter().any(|note| note.contains("EXIF")), "{n}: {:?}", turned.notes);
    }
}

#[test]
fn any_cut_or_flipped_byte_is_an_error_or_a_picture_but_never_a_panic() {
    let image = noise(24, 20, 3);
    let mut webp = Vec::new();
    image.write_to(&mut std::io::Cursor::new(&mut webp), ImageFormat::WebP).unwrap();
    for (name, whole) in
        [("png", still::png(&image, &[])), ("jpeg", still::jpeg(&image, 80)), ("webp", webp)]
    {
        assert!(still::decode(&whole, &Limits::default()).is_ok(), "{name}");
        for at in (0..whole.len()).step_by(7) {
            let cut = still::decode(&whole[..at], &Limits::default());
            // The PNG end chunk and padding may be missed without loss.
            assert!(cut.is_err() || at + 16 > whole.len(), "{name} cut at {at} of {}", whole.len());
            let mut flipped = whole.clone();
            flipped[at] ^= 0x55;
            let _ = still::decode(&flipped, &Limits::default());
        }
    }
}

#[test]
fn limits_hold_on_every_path() {
    let image = noise(40, 30, 1);
    let mut webp = Vec::new();
    image.write_to(&mut std::io::Cursor::new(&mut webp), ImageFormat::WebP).unwrap();
    let free = Limits::default();
    let table = [
        (Limits { file_bytes: 50, ..free.clone() }, "IMAGE_TOO_LARGE"),
        (Limits { side: 39, ..free.clone() }, "IMAGE_TOO_LARGE"),
        (Limits { pixels: 1199, ..free.clone() }, "IMAGE_TOO_LARGE"),
        (Limits { decode_bytes: 3599, ..free.clone() }, "IMAGE_TOO_LARGE"),
        (Limits { least_side: 31, ..free.clone() }, "IMAGE_TOO_SMALL"),
        (Limits { least_side: 30, side: 40, pixels: 1200, ..free }, ""),
    ];
    for bytes in [still::png(&image, &[]), still::jpeg(&image, 90), webp] {
        for (limits, class) in &table {
            let outcome = still::decode(&bytes, limits);
            assert_eq!(outcome.err().map_or("", |error| error.class_name()), *class, "{limits:?}");
        }
    }
    // The plain picture lies beside a deep one: 8 and 3 bytes for each pixel.
    let deep = image::DynamicImage::from(image).into_rgba16();
    let mut bytes = Vec::new();
    deep.write_to(&mut std::io::Cursor::new(&mut bytes), ImageFormat::Png).unwrap();
    for (decode_bytes, class) in [(11 * 1200 - 1, "IMAGE_TOO_LARGE"), (11 * 1200, "")] {
        let outcome = still::decode(&bytes, &Limits { decode_bytes, ..Limits::default() });
        assert_eq!(outcome.err().map_or("", |error| error.class_name()), class, "{decode_bytes}");
    }
    assert_eq!(still::decode(&[], &Limits::default()).unwrap_err().class_name(), "EMPTY_FILE");
}

#[test]
fn alpha_is_laid_on_white_and_deep_pictures_are_rounded() {
    let write = |image: image::DynamicImage| {
        let mut bytes = Vec::new();
        image.write_to(&mut std::io::Cursor::new(&mut bytes), ImageFormat::Png).unwrap();
        still::decode(&bytes, &Limits::default()).unwrap()
    };
    let half = write(image::RgbaImage::from_pixel(16, 16, image::Rgba([255, 0, 0, 128])).into());
    assert_eq!(half.image.get_pixel(3, 3).0, [255, 127, 127]);
    assert_eq!(half.notes.len(), 1, "{:?}", half.notes);
    let whole = write(image::RgbaImage::from_pixel(16, 16, image::Rgba([9, 8, 7, 255])).into());
    assert_eq!(whole.image.get_pixel(3, 3).0, [9, 8, 7]);
    assert!(whole.notes.is_empty());
    for (deep, shallow) in
        [(0, 0), (128, 0), (129, 1), (257, 1), (385, 1), (386, 2), (65535, 255), (65406, 254)]
    {
        let image = image::ImageBuffer::from_pixel(16, 16, Rgb([deep; 3]));
        let opaque = write(image::DynamicImage::ImageRgb16(image));
        assert_eq!(opaque.image.get_pixel(0, 0).0, [shallow; 3], "{deep}");
        let image = image::ImageBuffer::from_pixel(16, 16, image::Rgba([deep, deep, deep, 65535]));
        let with_alpha = write(image::DynamicImage::ImageRgba16(image));
        assert_eq!(with_alpha.image.get_pixel(0, 0).0, [shallow; 3], "{deep} with alpha");
    }
}

/// Type and content of every chunk.
fn chunks(png: &[u8]) -> Vec<(String, Vec<u8>)> {
    let mut rest = &png[8..];
    let mut found = Vec::new();
    while rest.len() >= 12 {
        let length = u32::from_be_bytes(rest[..4].try_into().unwrap()) as usize;
        found.push((String::from_utf8(rest[4..8].to_vec()).unwrap(), rest[8..8 + length].to_vec()));
        rest = &rest[12 + length..];
    }
    assert!(rest.is_empty());
    found
}

#[test]
fn png_texts_are_latin_or_international_as_needed() {
    let image = noise(20, 16, 2);
    let texts = [
        ("parameters", "a café\nSteps: 8, Seed: 42"),
        ("genvideo", r#"{"prompt":"一只猫 🐈"}"#),
        (
            "a key\0 that is far too long for the PNG specification, which allows seventy-nine bytes at most",
            "x\0y",
        ),
    ];
    let bytes = still::generated_png(&image, &texts);
    assert_eq!(still::decode(&bytes, &Limits::default()).unwrap().image, image);
    let chunks = chunks(&bytes);
    let kinds: Vec<&str> =
        chunks.iter().map(|(kind, _)| kind.as_str()).filter(|kind| *kind != "IDAT").collect();
    assert_eq!(kinds, ["IHDR", "sRGB", "tEXt", "iTXt", "iTXt", "iTXt", "IEND"]);
    assert_eq!(chunks[2].1, b"parameters\0a caf\xE9\nSteps: 8, Seed: 42");
    assert!(chunks[3].1.starts_with(b"genvideo\0\0\0\0\0"));
    assert!(chunks[3].1.ends_with("{\"prompt\":\"一只猫 🐈\"}".as_bytes()));
    assert!(
        chunks[4].1.iter().position(|&byte| byte == 0) == Some(79) && chunks[4].1.ends_with(b"xy")
    );
    assert!(chunks[5].1.starts_with(label::PNG_KEY.as_bytes()));
    assert!(String::from_utf8_lossy(&chunks[5].1).contains("trainedAlgorithmicMedia"));

    let own = still::generated_png(&image, &[(label::PNG_KEY, "<own/>")]);
    assert_eq!(own.windows(4).filter(|window| window == b"iTXt").count(), 1);
    assert!(!String::from_utf8_lossy(&still::png(&image, &[])).contains("xmp"));
}

#[test]
fn a_labelled_jpeg_reads_as_before_and_carries_the_label() {
    let image = noise(33, 17, 5);
    let (plain, labelled) = (still::jpeg(&image, 90), still::generated_jpeg(&image, 90));
    assert!(String::from_utf8_lossy(&labelled).contains(label::SOURCE_TYPE));
    let read = |bytes: &[u8]| still::decode(bytes, &Limits::default()).unwrap().image;
    assert_eq!(read(&plain), read(&labelled));
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.jpg");
    std::fs::write(&path, labelled).unwrap();
    let output = run("ffmpeg", &["-v", "error", "-i", text(&path), "-f", "null", "-"]);
    assert!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn resizing_is_antialiased_and_covering_keeps_the_aspect() {
    // One-pixel stripes shrink to grey, not to black or white.
    let stripes = RgbImage::from_fn(256, 64, |x, _| Rgb([if x % 2 == 0 { 0 } else { 255 }; 3]));
    let small = still::resize(&stripes, 32, 16);
    assert_eq!(small.dimensions(), (32, 16));
    assert!(small.iter().all(|&value| (118..=138).contains(&value)), "{:?}", &small.as_raw()[..32]);
    assert_eq!(still::resize(&stripes, 256, 64), stripes);
    assert_eq!(still::resize(&stripes, 0, 0).dimensions(), (1, 1));

    // A wide picture loses its sides, a tall one its top and bottom.
    let thirds = |x: u32| {
        if x < 30 {
            [255, 0, 0]
        } else if x < 60 {
            [0, 255, 0]
        } else {
            [0, 0, 255]
        }
    };
    let wide = RgbImage::from_fn(90, 30, |x, _| Rgb(thirds(x)));
    let square = still::cover(&wide, 60, 60);
    assert!(
        square
            .enumerate_pixels()
            .all(|(x, _, pixel)| pixel.0 == [0, 255, 0] || !(6..54).contains(&x))
    );
    let tall = RgbImage::from_fn(30, 90, |_, y| Rgb(thirds(y)));
    assert_eq!(still::cover(&tall, 15, 15).get_pixel(7, 7).0, [0, 255, 0]);
    assert_eq!(still::cover(&tall, 31, 17).dimensions(), (31, 17));
}
