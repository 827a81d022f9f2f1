//! A line of progress on a terminal, for runs that take longer than anyone likes to stare at nothing.
//!
//! Owns the last line of standard error while it lives, and clears it when it is dropped.

use std::io::{IsTerminal, Write};

use ibex::time::Stopwatch;

/// Nothing is shown before this time, so short runs leave no flicker.
const QUIET_NS: u64 = 2_000_000_000;
/// And then not more often than this.
const EVERY_NS: u64 = 200_000_000;

/// Counts steps and shows them where a person watches.
pub(super) struct Progress {
    what: &'static str,
    total: u32,
    watch: Stopwatch,
    last_ns: u64,
    shown: bool,
    is_terminal: bool,
}

impl Progress {
    /// Starts counting to `total`.
    pub(super) fn new(what: &'static str, total: u32) -> Self {
        let is_terminal = std::io::stderr().is_terminal();
        Self { what, total, watch: Stopwatch::start(), last_ns: 0, shown: false, is_terminal }
    }

    /// Notes that `done` steps are done.
    pub(super) fn step(&mut self, done: u32) {
        let now_ns = self.watch.elapsed_ns();
        if !self.is_terminal || now_ns < QUIET_NS || now_ns - self.last_ns < EVERY_NS {
            return;
        }
        self.last_ns = now_ns;
        self.shown = true;
        let left_s =
            now_ns / u64::from(done.max(1)) * u64::from(self.total - done.min(self.total)) / 1_000_000_000;
        eprint!("\r\x1b[K{} {done}/{}, about {left_s} s left", self.what, self.total);
        // A terminal that went away does not stop the run.
        let _ = std::io::stderr().flush();
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if self.shown {
            eprint!("\r\x1b[K");
        }
    }
}
