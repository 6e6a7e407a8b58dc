//! Texts of settings -> values; `None` when a text is not what the setting wants.

use std::time::Duration;

const HOUR: Duration = Duration::from_secs(3600);

/// One line that is not blank.
pub(super) fn name(text: &str) -> Option<String> {
    let text = text.trim();
    (!text.is_empty() && !text.contains(char::is_control)).then(|| text.to_owned())
}

/// A device by its name in any case.
pub(super) fn device(text: &str) -> Option<String> {
    let text = text.trim().to_ascii_lowercase();
    let known = match text.split_once(':') {
        Some(("cuda", number)) => number.parse::<u8>().is_ok(),
        Some(_) => false,
        None => ["auto", "cpu", "cuda", "metal"].contains(&text.as_str()),
    };
    known.then_some(text)
}

/// A number type by its name in any case.
pub(super) fn dtype(text: &str) -> Option<String> {
    let text = text.trim().to_ascii_lowercase();
    ["auto", "f32", "f16", "bf16"].contains(&text.as_str()).then_some(text)
}

/// How much of a model is in memory at once, in any case.
pub(super) fn memory(text: &str) -> Option<String> {
    let text = text.trim().to_ascii_lowercase();
    ["auto", "low", "full"].contains(&text.as_str()).then_some(text)
}

/// `host:port`, with or without `http://` or `https://`.
pub(super) fn address(text: &str) -> Option<String> {
    let text = name(text)?;
    let bare = ["http://", "https://"].iter().find_map(|scheme| text.strip_prefix(scheme));
    let (host, port) = bare.unwrap_or(&text).trim_end_matches('/').rsplit_once(':')?;
    let named = !host.is_empty() && !host.contains(|c: char| c.is_whitespace() || c == '/');
    let port = port.parse::<u16>().is_ok_and(|port| port > 0);
    (named && port).then_some(text)
}

/// `auto` or a number of threads.
pub(super) fn threads(text: &str) -> Option<Option<usize>> {
    match text.trim() {
        "auto" => Some(None),
        text => text.parse().ok().filter(|count| (1..=1024).contains(count)).map(Some),
    }
}

/// A time of at least a second.
pub(super) fn timeout(text: &str) -> Option<Duration> {
    duration(text).filter(|time| (Duration::from_secs(1)..=HOUR).contains(time))
}

/// A time that may be zero.
pub(super) fn deadline(text: &str) -> Option<Duration> {
    duration(text).filter(|time| *time <= HOUR)
}

/// `10`, `10s`, `500ms`, `2m`, `1h`; plain numbers are seconds.
fn duration(text: &str) -> Option<Duration> {
    let text = text.trim();
    let split = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let seconds = match unit.trim() {
        "ms" => 0.001,
        "" | "s" => 1.0,
        "m" | "min" => 60.0,
        "h" => 3600.0,
        _ => return None,
    };
    Duration::try_from_secs_f64(number.parse::<f64>().ok()? * seconds).ok()
}

/// `none`, or bytes: `50GB`, `1.5 TB`, `800MiB`; at least one.
pub(super) fn bytes(text: &str) -> Option<Option<u64>> {
    let text = text.trim().to_ascii_lowercase();
    if text == "none" {
        return Some(None);
    }
    let split = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let unit = match unit.trim() {
        "" | "b" => 1.0,
        "kb" => 1e3,
        "mb" => 1e6,
        "gb" | "g" => 1e9,
        "tb" | "t" => 1e12,
        "kib" => 1024.0,
        "mib" => 1024.0 * 1024.0,
        "gib" => 1024.0 * 1024.0 * 1024.0,
        "tib" => 1024.0 * 1024.0 * 1024.0 * 1024.0,
        _ => return None,
    };
    let bytes = number.parse::<f64>().ok()? * unit;
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "in range, rounded down"
    )]
    (1.0..9e15).contains(&bytes).then_some(Some(bytes as u64))
}

/// `forever`, or whole days: `30d` or `30`; at least one.
pub(super) fn days(text: &str) -> Option<Option<Duration>> {
    let text = text.trim();
    if text == "forever" {
        return Some(None);
    }
    let days: u32 = text.strip_suffix('d').unwrap_or(text).trim().parse().ok()?;
    (days > 0).then(|| Some(Duration::from_secs(86_400 * u64::from(days))))
}

/// A text that is not shown.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// The text itself.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("(not shown)")
    }
}

/// An access token: printable, in one piece.
pub(super) fn secret(text: &str) -> Option<Secret> {
    let text = text.trim();
    let plain = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_graphic());
    plain.then(|| Secret(text.to_owned()))
}

/// The address of a server, without a slash at its end.
pub(super) fn endpoint(text: &str) -> Option<String> {
    let text = text.trim().trim_end_matches('/');
    let host = text.strip_prefix("https://").or_else(|| text.strip_prefix("http://"))?;
    let plain = !host.is_empty() && host.bytes().all(|byte| byte.is_ascii_graphic());
    plain.then(|| text.to_owned())
}

/// The address of a bucket; the store looks at the rest of it.
pub(super) fn bucket(text: &str) -> Option<String> {
    let text = text.trim();
    text.starts_with("s3://").then(|| text.to_owned())
}

/// Yes or no, as the hub's own tools read them.
pub(super) fn switch(text: &str) -> Option<bool> {
    match text.trim().to_lowercase().as_str() {
        "1" | "true" | "yes" | "on" => Some(true),
        "0" | "false" | "no" | "off" => Some(false),
        _ => None,
    }
}
