//! Names inside the store: job keys and content hashes.
//!
//! Both are fixed-length lower-case hex, so neither can ever be a path of its own making. Everything else is refused
//! here, before a path is built; workflow ids are labels and only reach the disk through their hash.

use std::fmt;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::Error;

/// Length of a job key in hex digits.
const JOB_KEY_LENGTH: usize = 32;
/// Length of a content hash in hex digits.
const HASH_LENGTH: usize = 64;

/// The name of a job in the store: the first 32 hex digits of the SHA-256 of its workflow id.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct JobKey(String);

impl JobKey {
    /// The key of the job that runs under workflow id `id`, whatever characters that id holds.
    pub fn of_workflow(id: &str) -> Self {
        let mut key = hash(id.as_bytes());
        key.truncate(JOB_KEY_LENGTH);
        Self(key)
    }

    /// Reads a key written before; refuses anything but 32 lower-case hex digits.
    pub fn parse(text: &str) -> Result<Self, Error> {
        if is_hex(text, JOB_KEY_LENGTH) {
            return Ok(Self(text.to_owned()));
        }
        Err(Error::Key { what: "job", key: shown(text), length: JOB_KEY_LENGTH })
    }

    /// The 32 hex digits.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for JobKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl TryFrom<String> for JobKey {
    type Error = Error;

    fn try_from(text: String) -> Result<Self, Error> {
        Self::parse(&text)
    }
}

impl From<JobKey> for String {
    fn from(key: JobKey) -> Self {
        key.0
    }
}

/// `text` when it is a content hash: 64 lower-case hex digits.
pub(super) fn content_hash(text: &str) -> Result<&str, Error> {
    if is_hex(text, HASH_LENGTH) {
        return Ok(text);
    }
    Err(Error::Key { what: "blob", key: shown(text), length: HASH_LENGTH })
}

/// Lower-case hex SHA-256 of `bytes`.
pub fn hash(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

/// Bytes as lower-case hex.
pub fn hex(bytes: &[u8]) -> String {
    use fmt::Write;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        write!(text, "{byte:02x}").expect("writing into a String never fails");
        text
    })
}

/// Every content hash that a manifest names: its maximal runs of hex digits that are exactly 64 long. More than the
/// blobs may match (a model's hash, say); that only keeps a blob that nobody has.
pub(super) fn named(manifest: &[u8]) -> Vec<String> {
    manifest
        .split(|&byte| !is_hex_digit(byte))
        .filter(|run| run.len() == HASH_LENGTH)
        .map(|run| String::from_utf8_lossy(run).into_owned())
        .collect()
}

fn is_hex_digit(byte: u8) -> bool {
    matches!(byte, b'0'..=b'9' | b'a'..=b'f')
}

fn is_hex(text: &str, length: usize) -> bool {
    text.len() == length && text.bytes().all(is_hex_digit)
}

/// A refused key as an error may show it: short, without control characters.
fn shown(text: &str) -> String {
    text.chars().take(80).flat_map(char::escape_debug).collect()
}
