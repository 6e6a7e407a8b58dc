//! Where words go: data to stdout, everything else to stderr, and nobody panics when a reader has left.
//!
//! With `--json` stdout holds one object per line. A closed stdout silences what follows and nothing more: a job that
//! runs goes on. While bars are drawn, lines of the log go round them.

use std::io::{self, IsTerminal, Write};
use std::sync::OnceLock;

use indicatif::MultiProgress;
use serde::Serialize;

/// The bars of this process; the log and notes pause them while they write.
pub(crate) fn bars() -> &'static MultiProgress {
    static BARS: OnceLock<MultiProgress> = OnceLock::new();
    BARS.get_or_init(MultiProgress::new)
}

/// What a command prints with.
pub(crate) struct Output {
    json: bool,
    closed: bool,
}

impl Output {
    /// An output for people, or for programs with `json`.
    pub(crate) fn new(json: bool) -> Self {
        Self { json, closed: false }
    }

    /// Whether stdout carries JSON.
    pub(crate) fn is_json(&self) -> bool {
        self.json
    }

    /// One line of data for people; nothing in JSON mode.
    pub(crate) fn line(&mut self, text: &str) {
        if !self.json {
            self.write(text);
        }
    }

    /// One object for programs; nothing without `--json`.
    pub(crate) fn object(&mut self, value: &impl Serialize) {
        if self.json {
            let text = serde_json::to_string(value).expect("our own types serialise");
            self.write(&text);
        }
    }

    /// One line on stdout in either mode.
    pub(crate) fn raw(&mut self, text: &str) {
        self.write(text);
    }

    fn write(&mut self, text: &str) {
        if self.closed {
            return;
        }
        let written = bars().suspend(|| {
            let mut stdout = io::stdout().lock();
            writeln!(stdout, "{text}").and_then(|()| stdout.flush())
        });
        self.closed = written.is_err();
    }
}

/// One line for people on stderr.
pub(crate) fn note(text: &str) {
    bars().suspend(|| {
        // Nowhere is left to complain about a closed stderr.
        let _ = writeln!(io::stderr().lock(), "{text}");
    });
}

/// Whether progress can be drawn over itself.
pub(crate) fn is_live() -> bool {
    io::stderr().is_terminal() && std::env::var_os("TERM").is_none_or(|term| term != "dumb")
}

/// Writer of the log: stderr, round the bars.
#[derive(Clone, Copy)]
pub(crate) struct LogWriter;

impl Write for LogWriter {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        bars().suspend(|| io::stderr().lock().write(buffer))
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().lock().flush()
    }
}
