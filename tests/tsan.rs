//! Data races, judged by ThreadSanitizer on lane fibers in a C++ process (`kernels/host/tsan`).
//!
//! A clean run means something only because each planted bug is found by the same run. Needs clang-19 and
//! libclang-rt-19-dev; without them every test of races skips and says so.
//!
//! The self-test kernels come first; then dispatch and combine between ranks of the same process, served by the
//! rig's own device reader, which is itself held to the golden WQEs. What each plant proves stands in
//! kernels/ORDERING.md.
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

// ---- The shipped kernels. Seed 0 is real time on two workers, the others are simulated schedules.

/// Every route, combine mode, signal mode and way of launching; see kernels/host/tsan/ep_cases.cpp.
const EP_CASES: [&str; 6] =
    ["ep-ibgda", "ep-mapped", "ep-staged", "ep-reduced", "ep-split", "ep-split-mapped"];

fn expect_clean_on(case: &str, seeds: &[&str]) {
    let Some(rig) = rig() else { return };
    for seed in seeds {
        let output = rig::run_case(rig, &[case, "--seed", seed]);
        let log = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(0), "{case} seed {seed}\n{log}");
        assert!(log.is_empty(), "{case} seed {seed} wrote\n{log}");
    }
}

/// A race is found by one of the schedules, in a report that names `access`. What is wrong may also spoil the
/// numbers, so what else the rig says does not matter.
fn expect_race_on(case: &[&str], access: &str, seeds: std::ops::Range<u32>) {
    let Some(rig) = rig() else { return };
    for seed in seeds.clone() {
        let output = rig::run_case(rig, &[case, &["--seed", &seed.to_string()]].concat());
        let log = String::from_utf8_lossy(&output.stderr);
        let mut reports = log.split("WARNING: ").skip(1);
        let is_race =
            |report: &str| report.starts_with("ThreadSanitizer: data race") && report.contains(access);
        if output.status.code() == Some(RACE) && reports.any(is_race) {
            return;
        }
    }
    panic!("{case:?} was not found on seeds {seeds:?}");
}

/// A bug planted at a named place.
fn expect_race_at(case: &str, plant: &str, place: &str, access: &str, seeds: std::ops::Range<u32>) {
    expect_race_on(&[case, "--plant", plant, "--at", place], access, seeds);
}

#[test]
fn dispatch_and_combine_are_free_of_races() {
    for case in EP_CASES {
        expect_clean_on(case, &["0", "1", "2", "3", "4"]);
    }
}

#[test]
fn recreating_a_dead_peers_queues_under_the_others_steps_is_free_of_races() {
    expect_clean_on("recreate", &["1", "2", "3", "4"]);
}

#[test]
fn a_signal_without_release_is_found() {
    expect_race_at("ep-mapped", "drop-release", "signals", "fan_out", 0..4);
}

#[test]
fn rows_published_without_a_warp_sync_are_found() {
    expect_race_at("ep-ibgda", "skip-warp-sync", "cast_tokens", "cast_tokens", 0..4);
    expect_race_at("ep-ibgda", "skip-warp-sync", "ring_doorbell", "ring_doorbell", 0..4);
    expect_race_at("ep-mapped", "skip-warp-sync", "store_word_mapped", "copy_trailer", 0..4);
}

#[test]
fn a_signal_or_record_of_gpu_scope_is_found() {
    expect_race_at("ep-mapped", "narrow-scope", "signals", "fan_out", 0..4);
    expect_race_at("ep-ibgda", "narrow-scope", "records", "read_wqe", 0..4);
    expect_race_at("ep-ibgda", "narrow-fence", "everywhere", "read_wqe", 0..4);
}

#[test]
fn a_record_before_its_wqes_is_found() {
    expect_race_at("ep-ibgda", "hold-back", "rings", "read_wqe", 0..4);
}

#[test]
fn a_signal_before_its_rows_is_found() {
    expect_race_at("ep-mapped", "hold-back", "messages", "fan_out", 0..4);
}

#[test]
fn a_doorbell_without_its_fence_is_found() {
    expect_race_at("ep-ibgda", "drop-fence", "everywhere", "read_wqe", 0..4);
}

#[test]
fn words_between_warps_need_their_releases() {
    expect_race_at("ep-ibgda", "drop-release", "ready", "cast_tokens", 0..4);
    expect_race_at("ep-ibgda", "drop-release", "verdicts", "fan_out", 0..8);
    expect_race_at("ep-ibgda", "drop-release", "go", "lead_send", 0..4);
    expect_race_at("ep-ibgda", "drop-release", "ranges", "reserve_ranges", 0..4);
}

#[test]
fn what_the_hca_orders_is_relied_on() {
    expect_race_at("ep-ibgda", "drop-release", "signals", "fan_out", 0..4);
    expect_race_at("ep-staged", "drop-release", "signals", "fan_out", 0..4);
    expect_race_at("ep-staged", "drop-release", "completions", "read_rows_again", 0..4);
}

/// The kernels' own ends of the same edges, and of those that a peer's words make.
#[test]
fn a_word_read_without_acquire_is_found() {
    expect_race_at("ep-ibgda", "drop-acquire", "signals", "fan_out", 0..4);
    expect_race_at("ep-mapped", "drop-acquire", "signals", "fan_out", 0..4);
    expect_race_at("ep-staged", "drop-acquire", "completions", "read_rows_again", 0..4);
    expect_race_at("ep-ibgda", "drop-acquire", "records", "read_wqe", 0..4);
}

#[test]
fn a_credit_without_release_is_found() {
    expect_race_at("ep-split-mapped", "drop-release", "consumed", "fan_out", 1..25);
}

#[test]
fn a_half_that_leaves_without_release_is_found() {
    expect_race_at("recreate", "drop-release", "left", "forget", 1..9);
}

/// Guards are switched off by their bits in kernels/include/ibex/guards.h.
#[test]
fn sending_without_credit_is_found() {
    expect_race_on(&["ep-split", "--guards-off", "1"], "execute", 1..5);
    expect_race_on(&["ep-split-mapped", "--guards-off", "1"], "fan_out", 1..9);
}

#[test]
fn reusing_rows_before_their_completion_is_found() {
    expect_race_on(&["ep-staged", "--guards-off", "2"], "read_rows_again", 0..4);
}

#[test]
fn the_device_reader_executes_the_golden_wqes() {
    let rig = rig::build(rig::Flavor::Plain).unwrap();
    let golden = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/wqe.txt");
    let output = rig::run_case(&rig, &["golden", "--file", golden]);
    let (said, log) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert_eq!(output.status.code(), Some(0), "{said}{log}");
    assert!(said.starts_with("15 WQEs"), "{said}");
}
