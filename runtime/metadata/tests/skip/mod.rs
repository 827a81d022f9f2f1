//! Tests that need a program say so when there is none.

use std::io::Write;
use std::process::{Command, Stdio};

/// Whether a program is there; if not, says aloud how to get it.
pub(crate) fn have(program: &str, ask: &str, get: &str) -> bool {
    let mut asked = Command::new(program);
    let found = asked.arg(ask).stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok();
    if !found {
        // Straight to stderr: the runner hides what a passing test prints.
        let _ = writeln!(std::io::stderr(), "SKIPPED: no {program} ({get})");
    }
    found
}
