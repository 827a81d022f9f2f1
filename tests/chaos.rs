//! Ranks that are processes, killed, stopped, cut off and misled by `ibex chaos`, and taken in again.
//!
//! Every step of every rank is compared with the reference, every loss with what was injected; a run that finds
//! anything ends with 1 and prints it. Nothing here depends on how fast the machine is: limits are far above what a
//! busy one needs, and the campaign waits for the group before each fault.
#![expect(clippy::unwrap_used, reason = "a campaign that cannot be run is a failed test")]

use std::path::PathBuf;
use std::process::{Command, Output};

use serde_json::Value;

/// A report, gone with the test.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        let name = format!("chaos-{name}-{}.json", std::process::id());
        Self(PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(name))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // One that was never written is not there.
        let _ = std::fs::remove_file(&self.0);
    }
}

fn chaos(flags: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ibex"));
    command.arg("chaos").args(flags);
    for name in ["HOST_IP", "POD_IP"] {
        command.env_remove(name);
    }
    command.output().unwrap()
}

fn text(output: &Output) -> String {
    let both = [&output.stdout[..], &output.stderr[..]].concat();
    String::from_utf8_lossy(&both).into_owned()
}

/// Runs a campaign that must find nothing; its report.
fn good(name: &str, flags: &[&str]) -> Value {
    let file = Scratch::new(name);
    let output = chaos(&[flags, &["--json", file.0.to_str().unwrap()]].concat());
    println!("{name} {flags:?}\n{}", text(&output));
    assert_eq!(output.status.code(), Some(0), "{}", text(&output));
    let report: Value = serde_json::from_str(&std::fs::read_to_string(&file.0).unwrap()).unwrap();
    assert_eq!(report["kills"], report["rejoins"]);
    report
}

#[test]
fn a_killed_process_is_missed_and_replaced() {
    let report = good("kill", &["--fabric", "shm", "--ranks", "3", "--faults", "kill", "--steps", "25"]);
    assert_eq!((&report["kills"], &report["faults"]), (&3.into(), &3.into()));
}
