//! Absolute paths as `file://` addresses (RFC 8089), for clients that open what a job made.

use std::fmt::Write;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// The address of an absolute path; every byte outside the unreserved set and `/` is percent-encoded.
pub(super) fn of_file(path: &Path) -> String {
    let mut url = String::from("file://");
    for &byte in path.as_os_str().as_bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' | b'/' => {
                url.push(char::from(byte))
            }
            _ => write!(url, "%{byte:02X}").expect("writing into a String never fails"),
        }
    }
    url
}
