//! Ranks that are processes, killed, stopped, cut off and misled by `ibex chaos`, and taken in again.
//!
//! Every step of every rank is compared with the reference, every loss with what was injected; a run that finds
//! anything ends with 1 and prints it. Nothing here depends on how fast the machine is: limits are far above what a
//! busy one needs, and the campaign waits for the group before each fault.
#![expect(clippy::unwrap_used, reason = "a campaign that cannot be run is a failed test")]

use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Output};
use std::sync::{Mutex, PoisonError};

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

/// Groups of processes have the machine to themselves.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// Runs a campaign that must find nothing; its report.
fn good(name: &str, flags: &[&str]) -> Value {
    let file = Scratch::new(name);
    let output = {
        // Another test that failed is no reason not to run this one.
        let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        chaos(&[flags, &["--json", file.0.to_str().unwrap(), "--detect-ms", DETECT_MS]].concat())
    };
    println!("{name} {flags:?}\n{}", text(&output));
    assert_eq!(output.status.code(), Some(0), "{}", text(&output));
    let report: Value = serde_json::from_str(&std::fs::read_to_string(&file.0).unwrap()).unwrap();
    assert_eq!(report["kills"], report["rejoins"]);
    report
}

/// A process of a busy machine may get no time for a second.
const DETECT_MS: &str = "2000";
/// Eight faults, and steps for them.
const SHORT: &str = "50";
/// Two hundred.
const LONG: &str = "1010";

/// Whether the long campaigns run too: `IBEX_FULL=1`.
fn is_full() -> bool {
    std::env::var_os("IBEX_FULL").is_some()
}

#[test]
fn killed_processes_are_missed_at_once_and_replaced() {
    let kinds = "kill,kill_in_dispatch,kill_between,kill_in_combine,kill_in_replay,two_deaths,quick_rejoin";
    let flags = ["--fabric", "shm", "--ranks", "4", "--steps", SHORT, "--seed", "2", "--faults", kinds];
    let report = good("kill", &flags);
    assert!(report["kills"].as_u64() >= Some(8), "{report}");
    assert_eq!(report["detected_ms"]["count"], report["agree_ms"]["count"]);
    // Every replacement has read the weights of all experts from a survivor: 32 of 4 KiB.
    let rejoins = report["rejoins"].as_u64().unwrap();
    assert!(report["weights_bytes"].as_u64().unwrap() >= rejoins * 32 * 4096, "{report}");
}

#[test]
fn processes_that_end_within_a_message() {
    let flags = ["--fabric", "udp", "--ranks", "3", "--steps", "20", "--faults", "partial_message"];
    let report = good("partial", &flags);
    let faults = report["fault_log"].as_array().unwrap();
    assert_eq!(faults.len(), 2, "{report}");
    assert!(faults.iter().all(|fault| fault["at_moment"] == true), "{report}");
}

#[test]
fn stopped_cut_off_and_misled_processes_and_a_store_that_is_killed() {
    let kinds =
        "zombie,one_way,qp_error,command_error,kill_in_reconnect,kill_in_commit,store_outage,flapping";
    let flags = ["--fabric", "shm", "--ranks", "4", "--steps", "35", "--seed", "1", "--faults", kinds];
    let report = good("mixed", &flags);
    assert_eq!(report["faults"], 5);
}

#[test]
fn two_hosts_and_packets_that_are_lost_late_or_damaged() {
    if lacks_namespaces() {
        return;
    }
    let kinds = "partial_message,kill,drop,delay,duplicate,reorder,corrupt,pause";
    let hosts = ["--fabric", "udp", "--hosts", "netns", "--num-hosts", "2", "--ranks", "4"];
    let report = good("hosts", &[&hosts[..], &["--steps", "35", "--seed", "1", "--faults", kinds]].concat());
    assert_eq!(report["faults"], 5);
}

/// A process that stands still for up to half of what its peers bear, and one that has a tenth of its time.
#[test]
fn slow_is_not_dead() {
    let steps = if is_full() { LONG } else { SHORT };
    let flags = ["--fabric", "shm", "--ranks", "4", "--steps", steps, "--faults", "pause,slow"];
    let report = good("slow", &flags);
    let found = ["false_deaths", "kills", "lost_picks"].map(|key| report[key].as_u64());
    assert_eq!(found, [Some(0); 3], "{report}");
}

#[test]
fn two_hundred_faults_of_all_kinds_on_eight_processes() {
    if !is_full() {
        say_skipped("200 faults on 8 processes take minutes each: IBEX_FULL=1");
        return;
    }
    let mut places = vec![("shm", vec!["--fabric", "shm"]), ("udp", vec!["--fabric", "udp"])];
    if !lacks_namespaces() {
        places.push(("netns", vec!["--fabric", "udp", "--hosts", "netns", "--num-hosts", "4"]));
    }
    for (name, place) in places {
        let report = good(name, &[&place[..], &["--ranks", "8", "--steps", LONG]].concat());
        assert_eq!(report["faults"], 200, "{name}");
    }
}

#[test]
fn what_processes_cannot_do_is_refused_by_name() {
    for (flags, wanted) in [
        (&["--fabric", "shm", "--faults", "kill,corrupt"][..], "--fabric udp"),
        (&["--fabric", "shm", "--faults", "partial_message"], "--fabric udp"),
        (&["--fabric", "udp", "--faults", "store_outage", "--store", "memory:"], "--store"),
        (&["--fabric", "shm", "--hosts", "netns"], "share no memory"),
        (&["--fabric", "shm", "--ranks", "1"], "ranks"),
        (&["--fabric", "sim", "--detect-ms", "5"], "--detect-ms"),
    ] {
        let output = chaos(flags);
        assert_eq!(output.status.code(), Some(2), "{flags:?}: {}", text(&output));
        assert!(text(&output).contains(wanted), "{flags:?}: {}", text(&output));
    }
}

/// Says why a test skipped, straight to stderr: the runner hides what a passing test prints.
fn say_skipped(why: &str) {
    let _ = writeln!(std::io::stderr(), "SKIPPED: {why}");
}

fn lacks_namespaces() -> bool {
    let probe = ["launch", "--ranks", "1", "--hosts", "netns", "--", "true"];
    let output = Command::new(env!("CARGO_BIN_EXE_ibex")).args(probe).output().unwrap();
    if !output.status.success() {
        let said = text(&output);
        say_skipped(&format!(
            "no network namespaces (run as root, apt-get install iproute2): {}",
            said.trim()
        ));
    }
    !output.status.success()
}
