//! Simulated groups whose members die, stop, lie behind cut paths and come back, under many seeds.
//!
//! Every step of every rank is compared with the reference; see `ibex::chaos`. A failing seed prints the command that
//! replays it.
#![expect(clippy::unwrap_used, reason = "a campaign that cannot be run is a failed test")]

use std::collections::BTreeMap;

use ibex::chaos::campaign::{self, Campaign, Seeds};
use ibex::chaos::plan::{Ask, Change, ChangeKind, Plan};
use ibex::chaos::sim::{self, Unguarded};
use ibex::chaos::{ALL_KINDS, Fault, FaultKind};
use ibex::membership::MembershipGuard;
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
    assert!(campaign.report.routes["mapped"] > 0 && campaign.report.routes["ibgda"] > 0);
    assert!(count < SEEDS_FULL || campaign.report.fault_counts.values().all(|count| *count >= 500));
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

/// Runs directed plans: with all guards each of them is good, and without one some of them shows what `notices` wants.
fn is_missed_by(unguarded: Unguarded, plan: impl Fn(u64) -> Plan, notices: &str) {
    const SEEDS_DIRECTED: u64 = 200;
    let shows = |seed: &u64| {
        let flaws = sim::run_without(&plan(*seed), unguarded).map(|outcome| outcome.flaws);
        let flaws = flaws.unwrap_or_else(|error| vec![error.to_string()]);
        let shown = flaws.iter().find(|flaw| flaw.contains(notices));
        shown.inspect(|flaw| println!("{unguarded:?}: seed {seed} shows {flaw}")).is_some()
    };
    let seed = (1..=SEEDS_DIRECTED).find(shows);
    let seed = seed.unwrap_or_else(|| panic!("{unguarded:?}: nobody misses it in {SEEDS_DIRECTED} seeds"));
    for seed in (1..=8).chain([seed]) {
        let outcome = sim::run(&plan(seed)).unwrap();
        assert!(outcome.is_good(), "seed {seed} with all guards: {:?}", outcome.flaws);
    }
}

fn without(guard: Guard) -> Unguarded {
    Unguarded { guard: Some(guard), ..Unguarded::default() }
}

/// A group to which nothing is done.
fn quiet(seed: u64, ranks: u32) -> Plan {
    let ask = Ask { ranks: Some(ranks), kinds: vec![FaultKind::Kill], ..Ask::default() };
    let plan = Plan { faults: Vec::new(), changes: Vec::new(), initial: ranks, ..Plan::draw(seed, &ask) };
    Plan { tokens: 16, packets: false, lanes: 1, per_lane: 1, hosts: 0, ..plan }
}

#[test]
fn without_credits_a_slot_is_overwritten_before_it_is_read() {
    is_missed_by(without(Guard::Credit), |seed| Plan { per_lane: 2, ..quiet(seed, 3) }, "wrong");
}

#[test]
fn without_from_seq_steps_that_run_get_the_placement_of_later_ones() {
    let moving = |seed| {
        let place = |at_step| Change { kind: ChangeKind::Place, at_step, rank: 0 };
        Plan { changes: [1, 3, 5, 7].map(place).to_vec(), ..quiet(seed, 3) }
    };
    is_missed_by(without(Guard::FromSeq), moving, "");
}

#[test]
fn without_a_quorum_the_rank_that_is_left_goes_on_alone() {
    let unguarded = Unguarded { membership: Some(MembershipGuard::Quorum), ..Unguarded::default() };
    let stopped = |seed| {
        let faults = vec![fault(FaultKind::Zombie, (0, 1), 35_000)];
        Plan { faults, is_reckless: true, ..quiet(seed, 2) }
    };
    is_missed_by(unguarded, stopped, "went on without the others");
}

#[test]
fn without_sticky_suspicion_a_peer_that_was_given_up_is_waited_for_again() {
    let unguarded = Unguarded { membership: Some(MembershipGuard::StickySuspicion), ..Unguarded::default() };
    // While the store is away nobody can be evicted, so the suspicion has to last.
    let cut = |seed| {
        let faults =
            vec![fault(FaultKind::StoreOutage, (2, 0), 70_000), fault(FaultKind::TwoWay, (0, 1), 120_000)];
        Plan { faults, is_reckless: true, ..quiet(seed, 3) }
    };
    is_missed_by(unguarded, cut, "trusts");
}

/// Rank 0 stands still until rank 1 has given it up, and goes on. Of two ranks the lower one stays, and while the store
/// is away nobody is evicted at all: rank 1 goes on without rank 0, and says so in every step.
#[test]
fn without_lost_a_rank_waits_in_vain_for_one_that_has_given_it_up() {
    let stopped = |seed| {
        let faults =
            vec![fault(FaultKind::StoreOutage, (1, 0), 540_000), fault(FaultKind::Zombie, (0, 1), 35_000)];
        Plan { faults, is_reckless: true, ..quiet(seed, 2) }
    };
    is_missed_by(without(Guard::Lost), stopped, "in vain");
}

#[test]
fn without_other_places_rows_of_a_rank_that_was_given_up_spoil_later_sums() {
    // What rank 2 sends to rank 0 is held up until rank 0 works with rank 1 alone; then it comes.
    let held_up = |seed| {
        let lasts_us = 21_000 + seed * 1_733 % 30_000;
        let faults =
            vec![fault(FaultKind::StoreOutage, (1, 0), 120_000), fault(FaultKind::OneWay, (2, 0), lasts_us)];
        Plan { faults, is_reckless: true, ..quiet(seed, 3) }
    };
    is_missed_by(without(Guard::LateRows), held_up, "wrong");
}

/// Mapped memory has no queue pair that could be fenced: a process that was evicted, and wakes up, stores what it had
/// begun to store. Nobody goes by what stands there.
#[test]
fn a_zombie_that_has_memory_mapped_spoils_nothing() {
    for seed in 1..=30 {
        let zombie = |at_step, rank| Fault { at_step, ..fault(FaultKind::Zombie, (rank, 0), 30_000) };
        let plan = Plan { faults: vec![zombie(2, 2), zombie(5, 1)], hosts: 1, ..quiet(seed, 3) };
        let outcome = sim::run(&plan).unwrap();
        assert!(outcome.is_good(), "seed {seed}: {:?}", outcome.flaws);
        assert_eq!((outcome.report.routes["mapped"], outcome.report.kills), (6, 2), "seed {seed}");
    }
}

/// In the whole campaign every kind of fault strikes often enough: told by its plans, before it is run.
#[test]
fn the_whole_campaign_plans_every_kind_500_times_and_every_change_1000_times() {
    let (mut faults, mut changes, mut mapped) = (BTreeMap::new(), BTreeMap::new(), 0);
    for seed in 1..=SEEDS_FULL {
        let plan = Plan::draw(seed, &Ask::default());
        plan.faults.iter().for_each(|fault| *faults.entry(fault.kind).or_insert(0) += 1);
        mapped += u64::from(plan.hosts > 0);
        plan.changes.iter().for_each(|change| *changes.entry(change.kind).or_insert(0) += 1);
        assert!((2..=4).contains(&plan.ranks) && plan.tokens <= 16 && plan.hidden == 256 && plan.steps >= 20);
    }
    assert_eq!(faults.len(), ALL_KINDS.len());
    assert!(faults.values().all(|count| *count >= 500), "{faults:?}");
    assert!(changes.len() == 3 && changes.values().all(|count| *count >= 1_000), "{changes:?}");
    assert!(mapped >= SEEDS_FULL / 5, "{mapped} groups map memory");
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
