//! How much main memory a run may still take, from what Linux says; nothing where it says nothing.

use std::fs;
use std::path::Path;

/// Bytes that this process could take: what the machine has left, or its control group if that is less, and what the
/// allocator keeps of earlier work.
pub(super) fn free() -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let kilobytes = field(&text, "MemAvailable:")?;
    let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let machine = kilobytes * 1024;
    let group = groups.lines().filter_map(group_left).min().unwrap_or(machine);
    Some(machine.min(group) + kept())
}

/// Bytes left in the memory group that a line of `/proc/self/cgroup` names, or in a group round it.
fn group_left(line: &str) -> Option<u64> {
    let mut parts = line.splitn(3, ':').skip(1);
    let (controllers, path) = (parts.next()?, parts.next()?);
    let (root, limit, usage) = match controllers {
        "" => ("/sys/fs/cgroup", "memory.max", "memory.current"),
        "memory" => ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
        _ => return None,
    };
    let number = |path: &Path| fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
    let left = |group: &Path| {
        let (limit, used) = (number(&group.join(limit))?, number(&group.join(usage))?);
        // The kernel gives up cached files before it refuses memory.
        let stat = fs::read_to_string(group.join("memory.stat")).unwrap_or_default();
        let cached = ["inactive_file", "active_file"].map(|key| field(&stat, key).unwrap_or(0));
        Some(limit.saturating_sub(used.saturating_sub(cached.iter().sum())))
    };
    let own = Path::new(root).join(path.trim_start_matches('/'));
    own.ancestors().take_while(|group| group.starts_with(root)).filter_map(left).min()
}

/// The number behind `key` at the start of a line.
fn field(text: &str, key: &str) -> Option<u64> {
    let mut lines = text.lines().filter_map(|line| line.strip_prefix(key));
    lines.next()?.split_whitespace().next()?.parse().ok()
}

/// Bytes that were freed and that the allocator keeps.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
fn kept() -> u64 {
    // SAFETY: it only reads the allocator's counters.
    let counters = unsafe { libc::mallinfo2() };
    // Pages that were given back to the system are still in the allocator's count, and free for everybody.
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let resident = field(&status, "RssAnon:").unwrap_or(0) * 1024;
    (counters.fordblks as u64).min(resident.saturating_sub(counters.uordblks as u64))
}

#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
fn kept() -> u64 {
    0
}
