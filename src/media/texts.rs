//! Texts that a PNG carries beside its picture: `tEXt`, `zTXt` and `iTXt` chunks, read without decoding the picture.

use std::io::Read;

use flate2::read::ZlibDecoder;

use super::Error;

/// Longest text that is unpacked.
const MAX_TEXT: u64 = 16 << 20;

/// What a PNG says about itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PngTexts {
    /// Width in pixels.
    pub width: u32,
    /// Height in pixels.
    pub height: u32,
    /// Keyword and text of each chunk, in the order of the file.
    pub texts: Vec<(String, String)>,
}

/// Reads the texts of the PNG file `bytes`.
///
/// # Errors
/// When it is no PNG, or a chunk does not fit the file.
pub fn read(bytes: &[u8]) -> Result<PngTexts, Error> {
    let bad = |detail: &str| Error::CorruptImage { detail: detail.to_owned() };
    let Some(mut rest) = bytes.strip_prefix(b"\x89PNG\r\n\x1a\n") else {
        return Err(Error::UnsupportedFormat { found: "no PNG".to_owned() });
    };
    let mut found = PngTexts { width: 0, height: 0, texts: Vec::new() };
    while let Some((length, after)) = rest.split_first_chunk::<4>() {
        let length = usize::try_from(u32::from_be_bytes(*length)).unwrap_or(usize::MAX);
        let Some((kind, after)) = after.split_first_chunk::<4>() else { break };
        if after.len() < length.saturating_add(4) {
            return Err(bad("a chunk is longer than the file"));
        }
        let (data, after) = after.split_at(length);
        match kind {
            b"IHDR" => {
                let side = |at: usize| {
                    data.get(at..at + 4)
                        .and_then(|side| side.try_into().ok())
                        .map(u32::from_be_bytes)
                };
                found.width = side(0).ok_or_else(|| bad("a header without a size"))?;
                found.height = side(4).ok_or_else(|| bad("a header without a size"))?;
            }
            b"tEXt" => found.texts.extend(plain(data)),
            b"zTXt" => found.texts.extend(packed(data)),
            b"iTXt" => found.texts.extend(international(data)),
            b"IEND" => break,
            _ => {}
        }
        rest = &after[4..];
    }
    Ok(found)
}

/// The bytes before the first zero, and those behind it.
fn split(data: &[u8]) -> Option<(&[u8], &[u8])> {
    let end = data.iter().position(|byte| *byte == 0)?;
    Some((&data[..end], &data[end + 1..]))
}

fn latin(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| char::from(*byte)).collect()
}

fn plain(data: &[u8]) -> Option<(String, String)> {
    let (key, text) = split(data)?;
    // By the standard this is Latin-1; other tools write UTF-8 into it.
    let text = std::str::from_utf8(text).map_or_else(|_| latin(text), str::to_owned);
    Some((latin(key), text))
}

fn packed(data: &[u8]) -> Option<(String, String)> {
    let (key, text) = split(data)?;
    Some((latin(key), latin(&unpack(text.get(1..)?)?)))
}

fn international(data: &[u8]) -> Option<(String, String)> {
    let (key, rest) = split(data)?;
    let (packed, rest) = (*rest.first()? == 1, rest.get(2..)?);
    let (_language, rest) = split(rest)?;
    let (_translated, text) = split(rest)?;
    let text = if packed { unpack(text)? } else { text.to_vec() };
    Some((latin(key), String::from_utf8_lossy(&text).into_owned()))
}

fn unpack(bytes: &[u8]) -> Option<Vec<u8>> {
    let mut text = Vec::new();
    ZlibDecoder::new(bytes).take(MAX_TEXT).read_to_end(&mut text).ok()?;
    Some(text)
}
