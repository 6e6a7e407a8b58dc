//! Whether a JPEG file is complete.
//!
//! The decoder paints missing rows grey without a word. A cut file is better refused: nobody wants a film made from
//! half a picture. Segments are walked by their lengths, so that an end marker inside a thumbnail does not count.

/// Whether the picture's own end-of-image marker is there.
pub(super) fn is_complete(bytes: &[u8]) -> bool {
    let mut rest = bytes.get(2..).unwrap_or_default();
    loop {
        // Between segments stand only markers, each led by any number of 0xFF.
        match rest {
            [0xFF, 0xFF, ..] => rest = &rest[1..],
            [0xFF, 0xD9, ..] => return true,
            // Restart markers and the like have no length.
            [0xFF, 0x01 | 0xD0..=0xD7, ..] => rest = &rest[2..],
            [0xFF, kind, high, low, ..] => {
                let scan = *kind == 0xDA;
                let length = usize::from(u16::from_be_bytes([*high, *low]));
                rest = rest.get(2 + length..).unwrap_or_default();
                if scan {
                    rest = after_scan(rest);
                }
            }
            // Stray bytes: look for the next marker as decoders do.
            [_, _, ..] => rest = &rest[1..],
            _ => return false,
        }
    }
}

/// What follows the entropy-coded data: the first marker that is neither a stuffed 0xFF nor a restart.
fn after_scan(bytes: &[u8]) -> &[u8] {
    let is_end = |pair: &[u8]| pair[0] == 0xFF && !matches!(pair[1], 0x00 | 0xD0..=0xD7 | 0xFF);
    match bytes.windows(2).position(is_end) {
        Some(at) => &bytes[at..],
        None => &[],
    }
}

#[cfg(test)]
mod tests {
    use super::is_complete;

    #[test]
    fn only_the_end_marker_of_the_picture_itself_counts() {
        let table: [(&[u8], bool); 7] = [
            (&[0xFF, 0xD8, 0xFF, 0xD9], true),
            (&[0xFF, 0xD8], false),
            (&[], false),
            // A thumbnail's end marker inside APP1.
            (&[0xFF, 0xD8, 0xFF, 0xE1, 0, 4, 0xFF, 0xD9], false),
            (&[0xFF, 0xD8, 0xFF, 0xDA, 0, 2, 1, 0xFF, 0x00, 0xFF, 0xD0, 2, 0xFF, 0xD9], true),
            (&[0xFF, 0xD8, 0xFF, 0xDA, 0, 2, 1, 0xFF, 0x00, 0xFF, 0xD0, 2], false),
            // A length past the end.
            (&[0xFF, 0xD8, 0xFF, 0xE1, 0xFF, 0xFF, 0xFF, 0xD9], false),
        ];
        for (bytes, complete) in table {
            assert_eq!(is_complete(bytes), complete, "{bytes:x?}");
        }
    }
}
