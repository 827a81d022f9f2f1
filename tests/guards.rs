//! Each guard of the protocol holds under every seed, and taking it away is noticed under at least one.
//!
//! A guard that can be removed without a failing test is not tested. So each test here runs one scenario in seeded
//! simulation twice over: with all guards, where no seed may show a flaw, and without the one it is named after, where
//! some seed must. What it cannot see is weak memory; that is ThreadSanitizer's part (ORDERING.md).
#![expect(clippy::unwrap_used, reason = "a scenario that cannot be set up is a failed test")]

use core::time::Duration;

use ibex::config::Config;
use ibex::ids::{Lane, Rank};
use ibex::session::{CombineSource, Guard, Halves};
use ibex::telemetry::{Fault, FaultKind};
use ibex_hca::emulated::PathState;
use steps::{Flaws, Sim, tiny};

mod steps;

/// Seeds per scenario.
const SEEDS: u64 = 100;

/// Runs `scenario(seed, guard that is off)` with all guards under every seed, then without `guard` until a seed shows
/// what `notices` looks for.
fn is_missed(guard: Guard, scenario: impl Fn(u64, Option<Guard>) -> Flaws, notices: impl Fn(&Flaws) -> bool) {
    for seed in 1..=SEEDS {
        assert_eq!(scenario(seed, None), Flaws::default(), "all guards stand, seed {seed}");
    }
    let mut last = Flaws::default();
    let found = (1..=SEEDS).find(|&seed| {
        last = scenario(seed, Some(guard));
        notices(&last)
    });
    let seed = found.unwrap_or_else(|| panic!("nobody misses {guard:?} in {SEEDS} seeds"));
    println!("{SEEDS} seeds hold; without {guard:?} seed {seed} shows {last:?}");
}

/// Waits for all streams; a run that cannot move is a flaw.
fn settle(sim: &Sim) -> Flaws {
    Flaws { stuck: u64::from(sim.synchronize().is_err()), ..Flaws::default() }
}

/// Runs to the end, and all that the one step of `sim` has done wrong.
fn finish(sim: &Sim) -> Flaws {
    let mut flaws = settle(sim);
    flaws += sim.check(0);
    flaws += sim.recorded();
    flaws
}

/// Dispatches back to back through a ring of one slot: the next step is sent as soon as its own receive has run.
fn back_to_back_dispatches(seed: u64, off: Option<Guard>) -> Flaws {
    const STEPS: usize = 3;
    let sim = Sim::seeded(&tiny(), seed, STEPS);
    sim.switch_guard_off(off);
    for rank in 0..sim.num_ranks() {
        let stream = &sim.at(rank, 0).stream;
        for set in 0..STEPS {
            sim.dispatch(rank, set, Lane(0), stream, Halves::Both).unwrap();
        }
    }
    let mut flaws = settle(&sim);
    for set in 0..STEPS {
        flaws += sim.check_dispatch(set);
    }
    flaws += sim.recorded();
    flaws
}

#[test]
fn without_credits_a_slot_is_overwritten_before_it_is_read() {
    is_missed(Guard::Credit, back_to_back_dispatches, |flaws| flaws.wrong + flaws.lost != 0);
}

#[test]
fn without_the_generation_compare_an_old_signal_is_taken_for_a_new_one() {
    is_missed(Guard::Generation, back_to_back_dispatches, |flaws| flaws.wrong != 0);
}

#[test]
fn without_the_doorbell_nothing_leaves() {
    let config = Config { detect_ms: 4, stall_ms: Some(8), ..tiny() };
    let scenario = |seed, off| {
        let sim = Sim::seeded(&config, seed, 1);
        sim.switch_guard_off(off);
        sim.launch_step(0, CombineSource::Staged);
        let mut flaws = settle(&sim);
        flaws += sim.check(0);
        flaws += sim.recorded();
        flaws
    };
    is_missed(Guard::Doorbell, scenario, |flaws| flaws.unrung != 0 && flaws.lost != 0);
}

#[test]
fn without_completions_a_staged_combine_row_is_overwritten_before_it_is_read() {
    let config = Config { staging_rows: 2, ..tiny() };
    let scenario = |seed, off| {
        let sim = Sim::seeded(&config, seed, 1);
        sim.switch_guard_off(off);
        sim.launch_step(0, CombineSource::Staged);
        finish(&sim)
    };
    is_missed(Guard::SourceRows, scenario, |flaws| flaws.wrong != 0);
}

/// The caller writes its expert output again as soon as the send half of a combine is over.
#[test]
fn without_completions_user_rows_are_overwritten_before_they_are_read() {
    let scenario = |seed, off| {
        let sim = Sim::seeded(&tiny(), seed, 1);
        sim.switch_guard_off(off);
        let mut open = Vec::new();
        for rank in 0..sim.num_ranks() {
            let stream = &sim.at(rank, 0).stream;
            let handle = sim.dispatch(rank, 0, Lane(0), stream, Halves::Both).unwrap();
            let ticket =
                sim.combine(rank, 0, &handle, stream, CombineSource::ZeroCopy, Halves::Send).unwrap();
            open.push((handle, ticket));
        }
        let mut flaws = settle(&sim);
        for (rank, (handle, ticket)) in open.iter().enumerate() {
            let at = sim.at(rank, 0);
            let memory = at.tensors.expert_out.memory();
            at.session.gpu().fill(memory.addr(), 0x3c, memory.len()).unwrap();
            at.session.combine_receive(handle, ticket, &at.stream).unwrap();
        }
        flaws += finish(&sim);
        flaws
    };
    is_missed(Guard::SourceRows, scenario, |flaws| flaws.wrong != 0);
}

/// A pair is cut. One side gives the other up soon and goes on; the other is patient. When the pair heals, the old
/// step is sent again from the rows that the sender has kept, or has not.
#[test]
fn without_completions_a_staging_slot_is_overwritten_before_it_is_sent_again() {
    let scenario = |seed, off| {
        let sim = Sim::seeded(&tiny(), seed, 4);
        sim.switch_guard_off(off);
        let world = sim.world();
        world.session(Rank(1)).set_limits(Duration::from_secs(100), Duration::from_secs(100)).unwrap();
        for (from, to) in [(0, 1), (1, 0)] {
            world.set_path(Rank(from), Rank(to), PathState::Cut);
        }
        let stream = &sim.at(0, 0).stream;
        for set in 0..4 {
            sim.dispatch(0, set, Lane(0), stream, Halves::Both).unwrap();
        }
        let patient = sim.at(1, 0);
        sim.dispatch(1, 0, Lane(0), &patient.stream, Halves::Both).unwrap();
        let mut flaws = Flaws::default();
        flaws.stuck += u64::from(sim.at(0, 0).session.gpu().synchronize(stream).is_err());
        for (from, to) in [(0, 1), (1, 0)] {
            world.set_path(Rank(from), Rank(to), PathState::Up);
        }
        flaws.stuck += u64::from(patient.session.gpu().synchronize(&patient.stream).is_err());
        // A step that both sides were cut off from may be lost; what arrives must be right.
        flaws.wrong += sim.check_dispatch_of(1, 0).wrong;
        flaws.violations += sim.recorded().violations;
        flaws
    };
    is_missed(Guard::SourceRows, scenario, |flaws| flaws.wrong + flaws.violations != 0);
}

/// One direction of one pair is cut. The rank that hears nothing says so, and nobody else has to time out on it.
#[test]
fn without_lost_one_timeout_becomes_two() {
    let config = Config { num_ranks: 3, num_experts: 6, sq_depth_log: 6, ..tiny() };
    let scenario = |seed, off| {
        let sim = Sim::seeded(&config, seed, 1);
        sim.switch_guard_off(off);
        sim.world().set_path(Rank(0), Rank(1), PathState::Cut);
        for rank in [0, 2] {
            // Patient, so that nothing but the missing word of rank 1 could make them wait for long.
            let limits = (Duration::from_secs(10), Duration::from_millis(400));
            sim.at(rank, 0).session.set_limits(limits.0, limits.1).unwrap();
        }
        sim.launch_step(0, CombineSource::Staged);
        let mut flaws = settle(&sim);
        for verdict in [sim.check_dispatch(0), sim.check_combine(0)] {
            flaws.wrong += verdict.wrong;
        }
        for rank in [0, 2] {
            flaws.timeouts += sim.at(rank, 0).session.faults().unwrap().len() as u64;
        }
        flaws
    };
    is_missed(Guard::Lost, scenario, |flaws| flaws.timeouts != 0);
}

/// What rank 2 sends to rank 0 is held up until rank 0 has given rank 2 up and works with rank 1 alone. Then it comes:
/// rows of an old combine, for places that rows of rank 1 would take by now. Nobody fences rank 2.
#[test]
fn without_other_places_a_late_row_spoils_a_later_step() {
    const STEPS: usize = 8;
    let config =
        Config { num_ranks: 3, num_experts: 6, sq_depth_log: 6, detect_ms: 2, stall_ms: Some(4), ..tiny() };
    let scenario = |seed: u64, off| {
        let sim = Sim::seeded(&config, seed, STEPS);
        sim.switch_guard_off(off);
        let world = sim.world();
        for patient in [1, 2] {
            let limit = Duration::from_millis(300);
            world.session(Rank(patient)).set_limits(limit, limit).unwrap();
        }
        world.set_path(Rank(2), Rank(0), PathState::Cut);
        for set in 0..STEPS {
            sim.launch_step(set, CombineSource::Staged);
        }
        let here = world.session(Rank(0));
        let mut patience = 10_000;
        while here.suspected().unwrap().is_empty() && patience > 0 {
            sim.run_for(100);
            patience -= 1;
        }
        sim.run_for(seed * 53 % 2_000);
        world.set_path(Rank(2), Rank(0), PathState::Up);
        let mut flaws = settle(&sim);
        for set in 0..STEPS {
            for rank in 0..3 {
                flaws.wrong += sim.check_dispatch_of(rank, set).wrong + sim.check_combine_of(rank, set).wrong;
            }
        }
        // What rank 1 serves (experts 2 and 3) does not suffer.
        for set in 0..STEPS {
            for (lost, experts) in sim.picks_and_losses(0, set).1.iter().zip(sim.experts_of(0, set)) {
                let is_lost = |k: usize, expert: i32| lost >> k & 1 == 1 && (2..4).contains(&expert);
                flaws.lost += (0..).zip(&experts).filter(|(k, expert)| is_lost(*k, **expert)).count() as u64;
            }
        }
        flaws
    };
    is_missed(Guard::LateRows, scenario, |flaws| flaws.wrong != 0);
}

/// Two ranks recreate their queue pairs in the middle of a step. That step may be lost; the next ones may not.
#[test]
fn without_the_grace_period_a_running_half_posts_to_the_new_queue_pair() {
    let scenario = |seed: u64, off| {
        let sim = Sim::seeded(&tiny(), seed, 3);
        sim.switch_guard_off(off);
        let dispatch = |set| {
            for rank in 0..2 {
                sim.dispatch(rank, set, Lane(0), &sim.at(rank, 0).stream, Halves::Both).unwrap();
            }
        };
        dispatch(0);
        sim.run_for(1 + seed * 37 % 300);
        let [one, other] = [0, 1].map(|rank| &sim.at(rank, 0).session);
        one.mask(Rank(1)).unwrap();
        other.mask(Rank(0)).unwrap();
        one.fence(Rank(1)).unwrap();
        other.fence(Rank(0)).unwrap();
        let base = one.next_seq(Lane(0)).unwrap();
        if other.next_seq(Lane(0)).unwrap() != base {
            // One of them had not begun the step: a pair is recreated only between equal steps.
            return Flaws::default();
        }
        let offers = [one.offer(Rank(1), None).unwrap(), other.offer(Rank(0), None).unwrap()];
        other.connect(&offers[0], &[base]).unwrap();
        one.connect(&offers[1], &[base]).unwrap();
        one.activate(Rank(1)).unwrap();
        other.activate(Rank(0)).unwrap();
        let mut flaws = settle(&sim);
        dispatch(1);
        dispatch(2);
        flaws += settle(&sim);
        for set in [1, 2] {
            flaws += sim.check_dispatch(set);
        }
        // A receive half that entered after the mask may find the signal of the lost step, and headers of a later
        // one under it: it says so, and uses none of it.
        let faults = [one, other].map(|session| session.faults().unwrap());
        let is_late = |fault: &&Fault| fault.kind == FaultKind::Violation && fault.seq >= base[0];
        let violations = faults.iter().flatten().filter(is_late).count() as u64;
        flaws += Flaws { unrung: sim.recorded().unrung, violations, ..Flaws::default() };
        flaws
    };
    is_missed(Guard::Grace, scenario, |flaws| *flaws != Flaws::default());
}
