//! Simulated groups whose members die, stop, lie behind cut paths and come back, under many seeds.
//!
//! Every step of every rank is compared with the reference; see `ibex::chaos`. A failing seed prints the command that
//! replays it.
#![expect(clippy::unwrap_used, reason = "a campaign that cannot be run is a failed test")]

use ibex::chaos::campaign::{self, Campaign, Seeds};
use ibex::chaos::plan::{Ask, Plan};
use ibex::chaos::sim::{self, Unguarded};
use ibex::chaos::{Fault, FaultKind};
use ibex::session::Guard;

/// Seeds of every run.
const SEEDS: u64 = 150;
/// Seeds of the whole campaign, under `IBEX_FULL=1`.
const SEEDS_FULL: u64 = 20_000;

fn tell(campaign: &Campaign) {
    for failure in campaign.failures.iter().take(10) {
        println!("ibex chaos --fabric sim --seed {}", failure.seed);
        failure.flaws.iter().take(5).for_each(|flaw| println!("  {}", &flaw[..flaw.len().min(2000)]));
    }
    println!("{} failures", campaign.failures.len());
    println!("{}", serde_json::to_string_pretty(&campaign.report.to_json()).unwrap());
}

#[test]
fn no_seed_shows_a_wrong_byte_an_unsaid_loss_or_a_false_death() {
    let count = if std::env::var_os("IBEX_FULL").is_some() { SEEDS_FULL } else { SEEDS };
    let seeds = Seeds { first: 1, count, failures_max: 20 };
    let campaign = campaign::run(seeds, &Ask::default(), &|_| {});
    tell(&campaign);
    assert!(campaign.is_good());
}

#[test]
fn a_plan_replays_exactly() {
    for seed in [1, 2] {
        let plan = Plan::draw(seed, &Ask::default());
        let [one, other] = [0, 1].map(|_| sim::run(&plan).unwrap());
        assert_eq!((one.schedule_hash, one.virtual_ns), (other.schedule_hash, other.virtual_ns));
        assert_eq!((one.report, one.timeline), (other.report, other.timeline));
    }
}

/// A plan with one fault.
fn with(seed: u64, ranks: u32, fault: Fault) -> Plan {
    let ask = Ask { ranks: Some(ranks), kinds: vec![fault.kind], ..Ask::default() };
    Plan { faults: vec![fault], ..Plan::draw(seed, &ask) }
}

fn fault(kind: FaultKind, (rank, other): (u16, u16), lasts_us: u64) -> Fault {
    Fault { kind, at_step: 3, rank, other, lasts_us, ppm: 0, syndrome: 0x15, draw: 1 }
}

/// Packets of one direction vanish: the two blame each other at most, one of them leaves at most, and nobody else
/// loses a pick.
#[test]
fn one_way_loss_between_any_two_ranks_masks_at_most_that_pair() {
    for src in 0..4 {
        for dst in (0..4).filter(|dst| *dst != src) {
            for (seed, lasts_us) in [(1, 300), (2, 15_000), (3, 60_000), (4, 150_000)] {
                let plan = with(seed, 4, fault(FaultKind::OneWay, (src, dst), lasts_us));
                let outcome = sim::run(&plan).unwrap();
                assert!(outcome.is_good(), "{src} -> {dst}, {lasts_us} us, seed {seed}: {:?}", outcome.flaws);
                assert!(outcome.report.kills <= 1, "{src} -> {dst}: {} left", outcome.report.kills);
            }
        }
    }
}

/// A process that stands still for half of what its peers bear, and one that is many times slower.
#[test]
fn slow_is_not_dead() {
    let mut picks_lost = 0;
    for seed in 1..=100 {
        for kind in [FaultKind::Pause, FaultKind::Slow] {
            let plan = with(seed, 2 + seed as u32 % 3, fault(kind, ((seed % 2) as u16, 0), 60_000));
            let outcome = sim::run(&plan).unwrap();
            assert!(outcome.is_good(), "{kind}, seed {seed}: {:?}", outcome.flaws);
            assert_eq!((outcome.report.kills, outcome.report.findings.false_deaths), (0, 0));
            picks_lost += outcome.report.lost_picks;
        }
    }
    assert_eq!(picks_lost, 0, "nobody was given up");
}

/// Runs seeds without a guard until one shows it; what it shows.
fn is_missed(unguarded: Unguarded, seeds: u64) -> Vec<String> {
    let seeds = Seeds { first: 1, count: seeds, failures_max: 1 };
    let campaign = campaign::run_without(seeds, &Ask::default(), unguarded, &|_| {});
    let failure = campaign.failures.first();
    let failure = failure.unwrap_or_else(|| panic!("{unguarded:?}: nobody misses it in {seeds:?}"));
    println!("{unguarded:?}: seed {} shows {}", failure.seed, failure.flaws[0]);
    failure.flaws.clone()
}

#[test]
fn without_completions_source_rows_are_overwritten_and_tokens_wrong() {
    let guard = Some(Guard::SourceRows);
    let flaws = is_missed(Unguarded { guard, ..Unguarded::default() }, 20);
    assert!(flaws.iter().any(|flaw| flaw.contains("wrong")), "{flaws:?}");
}

#[test]
fn without_the_generation_compare_old_signals_are_believed() {
    let guard = Some(Guard::Generation);
    let flaws = is_missed(Unguarded { guard, ..Unguarded::default() }, 20);
    assert!(flaws.iter().any(|flaw| flaw.contains("wrong")), "{flaws:?}");
}

#[test]
fn without_signs_of_life_the_slow_are_taken_for_dead() {
    let flaws = is_missed(Unguarded { is_mute: true, ..Unguarded::default() }, 200);
    assert!(flaws.iter().any(|flaw| flaw.contains("nothing was done to it")), "{flaws:?}");
}

/// What the process below is told by.
const WITHOUT_GRACE: &str = "IBEX_TEST_WITHOUT_GRACE";

/// Memory is given back under kernels that still use it. That may end the process, so it is one of its own.
#[test]
fn without_the_grace_period_kernels_lose_the_ground_they_stand_on() {
    if std::env::var_os(WITHOUT_GRACE).is_some() {
        is_missed(Unguarded { guard: Some(Guard::Grace), ..Unguarded::default() }, 40);
        return;
    }
    let name = "without_the_grace_period_kernels_lose_the_ground_they_stand_on";
    let this = std::env::current_exe().unwrap();
    let child = std::process::Command::new(this)
        .args(["--exact", name, "--nocapture"])
        .env(WITHOUT_GRACE, "1")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&child.stdout).into_owned();
    let was_missed = said.contains("shows") || child.status.code().is_none();
    assert!(was_missed, "{}: {said}", child.status);
}
