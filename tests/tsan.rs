//! Data races, judged by ThreadSanitizer on lane fibers in a C++ process (`kernels/host/tsan`).
//!
//! A clean run means something only because each planted bug is found by the same run. Needs clang-19 and
//! libclang-rt-19-dev; without them every test here skips and says so.
#![expect(clippy::unwrap_used, reason = "a failed expectation is the message")]

use std::path::PathBuf;
use std::sync::OnceLock;

mod rig;

/// ThreadSanitizer's own exit status.
const RACE: i32 = 66;
/// Real time, and simulated schedules.
const SEEDS: [&str; 6] = ["0", "1", "2", "3", "4", "5"];

fn rig() -> Option<&'static PathBuf> {
    static RIG: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    match RIG.get_or_init(|| rig::build(rig::Flavor::ThreadSanitizer)) {
        Ok(path) => Some(path),
        Err(why) => {
            rig::say_skipped(&format!("no ThreadSanitizer here: {why}"));
            None
        }
    }
}

fn expect_clean(args: &[&str]) {
    let Some(rig) = rig() else { return };
    for seed in SEEDS {
        let output = rig::run_case(rig, &[args, &["--seed", seed]].concat());
        let log = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(0), "{args:?} seed {seed}\n{log}");
        assert!(log.is_empty(), "{args:?} seed {seed} wrote\n{log}");
    }
}

/// The plant is found, on every seed, as a race on an access that `accesses` names.
fn expect_race(case: &str, plant: &str, accesses: &[&str]) {
    let Some(rig) = rig() else { return };
    for seed in SEEDS {
        let output = rig::run_case(rig, &[case, "--plant", plant, "--seed", seed]);
        let log = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(RACE), "{case} {plant} seed {seed} was not found\n{log}");
        for report in log.split("WARNING: ").skip(1) {
            assert!(report.starts_with("ThreadSanitizer: data race"), "{report}");
            assert!(accesses.iter().all(|name| report.contains(name)), "another race:\n{report}");
        }
    }
}

#[test]
fn the_selftest_is_free_of_races() {
    expect_clean(&["selftest"]);
    expect_clean(&["selftest", "--blocks", "1", "--warps", "8", "--n16", "130"]);
}

#[test]
fn two_devices_synchronise_by_release_and_acquire() {
    expect_clean(&["pair"]);
}

#[test]
fn two_devices_synchronise_by_fences() {
    expect_clean(&["fence-pair"]);
}

#[test]
fn a_missing_release_is_found() {
    expect_race("pair", "drop-release", &["receive", "pass"]);
}

#[test]
fn a_release_of_gpu_scope_between_devices_is_found() {
    expect_race("pair", "narrow-scope", &["receive", "pass"]);
}

#[test]
fn a_missing_warp_sync_is_found() {
    expect_race("pair", "skip-warp-sync", &["receive", "pass"]);
}

#[test]
fn a_signal_before_its_data_is_found() {
    expect_race("pair", "hold-back", &["receive", "pass"]);
}

#[test]
fn a_missing_fence_is_found() {
    expect_race("fence-pair", "drop-fence", &["receive", "pass"]);
}

#[test]
fn a_fence_of_gpu_scope_between_devices_is_found() {
    expect_race("fence-pair", "narrow-fence", &["receive", "pass"]);
}

#[test]
fn a_plant_elsewhere_changes_nothing() {
    expect_clean(&["pair", "--plant", "drop-fence"]);
    expect_clean(&["fence-pair", "--plant", "drop-release"]);
}
