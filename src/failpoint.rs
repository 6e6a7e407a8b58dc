//! Named places where a test may make the program fail: die, freeze, panic, or meet an error of the system.
//!
//! A place is one call of `hit`; every layer may name this file. Without the feature `failpoints` nothing can be
//! asked for and the calls compile to nothing. With it, [`arm`] reads what is to happen:
//!
//! ```text
//! step_done=kill,skip=2,once=/tmp/died;trailer=error:ENOSPC;trace=/tmp/hits
//! ```
//!
//! An action is `kill`, `abort`, `freeze` (SIGSTOP), `panic`, `stall:MILLISECONDS`, `hold:FILE`, which lasts until there
//! is that file, or `error:NAME`, an error of the system (`ENOSPC`, `EIO`, `EACCES`) or any other word. `skip=N` lets N
//! visits pass. `once=FILE` acts for whoever makes the file, which then holds its process id, so that the process that
//! comes next lives. `trace=FILE` writes down every visit: milliseconds since 1970, process, place.

use std::io;

/// Every place, in the order in which a video job comes to them.
pub const POINTS: &[&str] = &[
    "planned",
    "stage_begun",
    "model_loaded",
    "text_encoded",
    "step_done",
    "checkpoint_begun",
    "checkpoint_put",
    "checkpoint_marked",
    "chunk_decoded",
    "stage_made",
    "stage_settled",
    "frame_encoded",
    "trailer",
    "sealed",
    "blob_staged",
    "receipt_put",
    "manifest_begun",
    "manifest_written",
    "cleanup",
];

/// Does at `point` what was asked for.
///
/// # Errors
/// The error that was asked for, an injected one.
#[inline]
pub(crate) fn hit(point: &'static str) -> io::Result<()> {
    #[cfg(feature = "failpoints")]
    return armed::hit(point);
    #[cfg(not(feature = "failpoints"))]
    {
        let _ = point;
        Ok(())
    }
}

/// Takes in what is to happen where; once for the process.
///
/// # Errors
/// A text that is not as described above; any text at all without the feature.
pub fn arm(text: &str) -> Result<(), String> {
    #[cfg(feature = "failpoints")]
    return armed::arm(text);
    #[cfg(not(feature = "failpoints"))]
    Err(format!("`{text}` asks for faults, wanted a build with the feature `failpoints`"))
}

#[cfg(feature = "failpoints")]
mod armed {
    use std::fs::File;
    use std::io::{self, Write};
    use std::path::PathBuf;
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::time::{Duration, SystemTime, UNIX_EPOCH};

    /// What is to happen, set once.
    static PLAN: OnceLock<Plan> = OnceLock::new();

    #[derive(Debug, Default)]
    struct Plan {
        traps: Vec<Trap>,
        trace: Option<File>,
    }

    #[derive(Debug)]
    struct Trap {
        point: String,
        action: Action,
        skip: u32,
        once: Option<PathBuf>,
        visits: AtomicU32,
    }

    #[derive(Debug, PartialEq)]
    enum Action {
        Signal(libc::c_int),
        Abort,
        Panic,
        Stall(Duration),
        Hold(PathBuf),
        Error(String),
    }

    pub(super) fn arm(text: &str) -> Result<(), String> {
        PLAN.set(parse(text)?).map_err(|_| "faults were asked for twice".to_owned())
    }

    fn parse(text: &str) -> Result<Plan, String> {
        let mut plan = Plan::default();
        for item in text.split(';').map(str::trim).filter(|item| !item.is_empty()) {
            let wrong =
                || format!("`{item}` is no fault, wanted `POINT=ACTION[,skip=N][,once=FILE]`");
            let (point, rest) = item.split_once('=').ok_or_else(wrong)?;
            if point == "trace" {
                let file = File::options().create(true).append(true).open(rest);
                plan.trace = Some(file.map_err(|error| format!("`{rest}`: {error}"))?);
                continue;
            }
            if !super::POINTS.contains(&point) {
                return Err(format!(
                    "`{point}` is no point, known are {}",
                    super::POINTS.join(", ")
                ));
            }
            let mut words = rest.split(',');
            let action = words.next().and_then(action).ok_or_else(wrong)?;
            let (mut skip, mut once) = (0, None);
            for word in words {
                match word.split_once('=') {
                    Some(("skip", count)) => skip = count.parse().map_err(|_| wrong())?,
                    Some(("once", file)) => once = Some(PathBuf::from(file)),
                    _ => return Err(wrong()),
                }
            }
            let visits = AtomicU32::new(0);
            plan.traps.push(Trap { point: point.to_owned(), action, skip, once, visits });
        }
        Ok(plan)
    }

    fn action(word: &str) -> Option<Action> {
        match word.split_once(':').unwrap_or((word, "")) {
            ("kill", "") => Some(Action::Signal(libc::SIGKILL)),
            ("freeze", "") => Some(Action::Signal(libc::SIGSTOP)),
            ("abort", "") => Some(Action::Abort),
            ("panic", "") => Some(Action::Panic),
            ("stall", time) => time.parse().ok().map(Duration::from_millis).map(Action::Stall),
            ("hold", file) if !file.is_empty() => Some(Action::Hold(PathBuf::from(file))),
            ("error", name) if !name.is_empty() => Some(Action::Error(name.to_owned())),
            _ => None,
        }
    }

    pub(super) fn hit(point: &'static str) -> io::Result<()> {
        let Some(plan) = PLAN.get() else { return Ok(()) };
        if let Some(mut trace) = plan.trace.as_ref() {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            // One write a line, so that processes do not mix theirs.
            let line = format!("{} {} {point}\n", now.as_millis(), std::process::id());
            trace.write_all(line.as_bytes())?;
        }
        plan.traps.iter().filter(|trap| trap.point == point).try_for_each(Trap::visit)
    }

    impl Trap {
        fn visit(&self) -> io::Result<()> {
            if self.visits.fetch_add(1, Ordering::Relaxed) < self.skip {
                return Ok(());
            }
            if let Some(file) = &self.once {
                match File::create_new(file) {
                    Ok(mut file) => write!(file, "{}", std::process::id())?,
                    Err(_) => return Ok(()),
                }
            }
            tracing::warn!(point = self.point, action = ?self.action, "a fault that was asked for");
            match &self.action {
                Action::Signal(number) => {
                    // SAFETY: kill only takes two integers; the process is this one.
                    unsafe { libc::kill(libc::getpid(), *number) };
                    Ok(())
                }
                Action::Abort => std::process::abort(),
                Action::Panic => panic!("a panic that was asked for at `{}`", self.point),
                Action::Stall(time) => {
                    std::thread::sleep(*time);
                    Ok(())
                }
                Action::Hold(file) => {
                    while !file.exists() {
                        std::thread::sleep(Duration::from_millis(10));
                    }
                    Ok(())
                }
                Action::Error(name) => Err(match name.as_str() {
                    "ENOSPC" => io::Error::from_raw_os_error(libc::ENOSPC),
                    "EIO" => io::Error::from_raw_os_error(libc::EIO),
                    "EACCES" => io::Error::from_raw_os_error(libc::EACCES),
                    other => io::Error::other(other),
                }),
            }
        }
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn faults_are_read_or_refused() {
            let plan = parse("step_done=kill,skip=2,once=/tmp/x; trailer=error:ENOSPC;").unwrap();
            let [first, second] = plan.traps.as_slice() else { panic!("{plan:?}") };
            assert_eq!((first.skip, first.once.as_deref()), (2, Some("/tmp/x".as_ref())));
            assert_eq!(first.action, Action::Signal(libc::SIGKILL));
            assert_eq!(second.action, Action::Error("ENOSPC".to_owned()));
            for bad in [
                "step_done",
                "nowhere=kill",
                "trailer=die",
                "trailer=kill,often",
                "sealed=stall:x",
                "sealed=hold",
            ] {
                assert!(parse(bad).is_err(), "{bad}");
            }
        }

        #[test]
        fn a_trap_lets_visits_pass_and_acts_for_whoever_makes_its_file() {
            let folder = tempfile::tempdir().unwrap();
            let once = folder.path().join("once");
            let text = format!("sealed=error:EIO,skip=1,once={}", once.display());
            let plan = parse(&text).unwrap();
            let outcomes: Vec<bool> = (0..4).map(|_| plan.traps[0].visit().is_ok()).collect();
            assert_eq!(outcomes, [true, false, true, true]);
            assert!(once.is_file());
        }

        #[test]
        fn a_hold_lasts_until_its_file_is_there() {
            let folder = tempfile::tempdir().unwrap();
            let go = folder.path().join("go");
            let plan = parse(&format!("sealed=hold:{}", go.display())).unwrap();
            let held = std::thread::spawn(move || plan.traps[0].visit());
            std::thread::sleep(Duration::from_millis(50));
            assert!(!held.is_finished());
            File::create(go).unwrap();
            assert!(held.join().unwrap().is_ok());
        }
    }
}
