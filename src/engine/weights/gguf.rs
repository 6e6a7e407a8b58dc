//! The header of a GGUF file, checked: nothing in it is believed before it fits the file.
//!
//! The tensors are not read yet, so a sound file ends as unsupported; a damaged one is called damaged.

use std::collections::HashSet;
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;

use crate::engine::{Error, Result};

/// Arrays inside arrays; nobody writes more than one.
const MAX_DEPTH: u32 = 4;
const MAX_DIMENSIONS: u32 = 4;
const MAX_ALIGNMENT: u64 = 1 << 16;

/// Values a block and bytes a block of each tensor type, by its number.
const TYPES: &[(u32, u64, u64)] = &[
    (0, 1, 4),
    (1, 1, 2),
    (2, 32, 18),
    (3, 32, 20),
    (6, 32, 22),
    (7, 32, 24),
    (8, 32, 34),
    (9, 32, 36),
    (10, 256, 84),
    (11, 256, 110),
    (12, 256, 144),
    (13, 256, 176),
    (14, 256, 210),
    (15, 256, 292),
    (16, 256, 66),
    (17, 256, 74),
    (18, 256, 98),
    (19, 256, 50),
    (20, 32, 18),
    (21, 256, 110),
    (22, 256, 82),
    (23, 256, 136),
    (24, 1, 1),
    (25, 1, 2),
    (26, 1, 4),
    (27, 1, 8),
    (28, 1, 8),
    (29, 256, 56),
    (30, 1, 2),
    (34, 256, 54),
    (35, 256, 66),
    (39, 32, 17),
];

/// Reads the whole header of `file`, which has `size` bytes and stands at its start.
pub(super) fn check(path: &Path, file: &mut File, size: u64) -> Result<()> {
    let mut header = Header { reader: BufReader::new(file), left: size, size, alignment: 32 };
    header.check().map_err(|problem| Error::WeightsFormat { path: path.to_path_buf(), problem })
}

type Checked<T> = std::result::Result<T, String>;

struct Header<'a> {
    reader: BufReader<&'a mut File>,
    left: u64,
    size: u64,
    alignment: u64,
}

struct Place {
    offset: u64,
    bytes: u64,
}

impl Header<'_> {
    fn check(&mut self) -> Checked<()> {
        self.array::<4>()?;
        let version = self.u32()?;
        if !(2..=3).contains(&version) {
            return Err(format!("GGUF version {version}: wanted 2 or 3"));
        }
        let (tensors, values) = (self.u64()?, self.u64()?);
        self.fits(tensors, 24, "tensors")?;
        self.fits(values, 13, "values")?;
        for _ in 0..values {
            let key = self.text()?;
            let kind = self.u32()?;
            if key == "general.alignment" && kind == 4 {
                self.alignment = u64::from(self.u32()?);
                if !self.alignment.is_power_of_two() || self.alignment > MAX_ALIGNMENT {
                    return Err(format!("alignment {}", self.alignment));
                }
            } else {
                self.value(kind, 0)?;
            }
        }
        let (mut names, mut places) = (HashSet::new(), Vec::new());
        for _ in 0..tensors {
            let name = self.text()?;
            places.push(self.tensor()?);
            if !names.insert(name) {
                return Err("a tensor is given twice".into());
            }
        }
        let data = (self.size - self.left).next_multiple_of(self.alignment);
        for Place { offset, bytes } in places {
            let end = data.checked_add(offset).and_then(|start| start.checked_add(bytes));
            if end.is_none_or(|end| end > self.size) {
                return Err("a tensor ends behind the file: it is cut short".into());
            }
        }
        Ok(())
    }

    fn tensor(&mut self) -> Checked<Place> {
        let dimensions = self.u32()?;
        if !(1..=MAX_DIMENSIONS).contains(&dimensions) {
            return Err(format!("a tensor of {dimensions} dimensions"));
        }
        let (mut first, mut count) = (0, 1u64);
        for index in 0..dimensions {
            let side = self.u64()?;
            first = if index == 0 { side } else { first };
            count = count.checked_mul(side).ok_or("a tensor larger than any file")?;
        }
        if count == 0 {
            return Err("a tensor without values".into());
        }
        let (kind, offset) = (self.u32()?, self.u64()?);
        let Some((_, block, bytes)) = TYPES.iter().find(|(number, ..)| *number == kind) else {
            return Err(format!("tensor type {kind} is not known"));
        };
        if first % block != 0 || offset % self.alignment != 0 {
            return Err("a tensor that does not fill its blocks".into());
        }
        let bytes = (count / block).checked_mul(*bytes).ok_or("a tensor larger than any file")?;
        Ok(Place { offset, bytes })
    }

    fn value(&mut self, kind: u32, depth: u32) -> Checked<()> {
        match kind {
            7 => match self.array::<1>()?[0] {
                0 | 1 => Ok(()),
                other => Err(format!("a switch that is {other}")),
            },
            8 => self.text().map(|_| ()),
            9 if depth >= MAX_DEPTH => Err(format!("arrays more than {MAX_DEPTH} deep")),
            9 => {
                let (kind, count) = (self.u32()?, self.u64()?);
                self.fits(count, least_bytes(kind)?, "array entries")?;
                (0..count).try_for_each(|_| self.value(kind, depth + 1))
            }
            _ => self.skip(least_bytes(kind)?),
        }
    }

    /// `count` things of at least `bytes` each must fit into what is left.
    fn fits(&self, count: u64, bytes: u64, what: &str) -> Checked<()> {
        match count.checked_mul(bytes) {
            Some(wanted) if wanted <= self.left => Ok(()),
            _ => Err(format!("{count} {what} in a file of {} bytes", self.size)),
        }
    }

    fn take(&mut self, count: u64) -> Checked<()> {
        self.left = self.left.checked_sub(count).ok_or("the header is cut short")?;
        Ok(())
    }

    fn skip(&mut self, count: u64) -> Checked<()> {
        self.take(count)?;
        std::io::copy(&mut (&mut self.reader).take(count), &mut std::io::sink())
            .map(|_| ())
            .map_err(|error| error.to_string())
    }

    fn array<const N: usize>(&mut self) -> Checked<[u8; N]> {
        self.take(N as u64)?;
        let mut bytes = [0; N];
        self.reader.read_exact(&mut bytes).map_err(|error| error.to_string())?;
        Ok(bytes)
    }

    fn u32(&mut self) -> Checked<u32> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Checked<u64> {
        self.array().map(u64::from_le_bytes)
    }

    fn text(&mut self) -> Checked<String> {
        let length = self.u64()?;
        self.take(length)?;
        let mut bytes = Vec::new();
        (&mut self.reader)
            .take(length)
            .read_to_end(&mut bytes)
            .map_err(|error| error.to_string())?;
        String::from_utf8(bytes).map_err(|_| "a text that is not UTF-8".into())
    }
}

/// Bytes of a value of type `kind`, or the fewest it can have.
fn least_bytes(kind: u32) -> Checked<u64> {
    match kind {
        0 | 1 | 7 => Ok(1),
        2 | 3 => Ok(2),
        4..=6 => Ok(4),
        8 | 10..=12 => Ok(8),
        9 => Ok(12),
        other => Err(format!("value type {other} is not known")),
    }
}
