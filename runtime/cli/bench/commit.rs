//! Which source a binary was built from.

use std::process::Command;

/// The commit of the source tree that this binary was built in, or `None` where it is gone or no git
/// checkout. `IBEX_COMMIT`, set while building, overrules it.
pub(super) fn commit() -> Option<String> {
    if let Some(commit) = option_env!("IBEX_COMMIT") {
        return Some(commit.to_string());
    }
    let source = env!("CARGO_MANIFEST_DIR");
    let output = Command::new("git").args(["-C", source, "rev-parse", "HEAD"]).output().ok()?;
    let commit = String::from_utf8(output.stdout).ok()?.trim().to_string();
    (output.status.success() && !commit.is_empty()).then_some(commit)
}
