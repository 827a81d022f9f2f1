//! Up to eight machines, a store, and everything that can go wrong between them, in virtual time, from one seed.
//!
//! The store is a model: cells with versions, claims with leases, delayed and repeated notifications, outages, ranks
//! that are cut off. Sessions are models, too: a step counter behind a gate, tables, links that take time. Machines are
//! the real ones. A seed replays exactly; `MODEL_SEED=n` runs one, and prints what happens.
#![expect(clippy::unwrap_used, reason = "a failed expectation is the message of a test")]

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};

use ibex::error::Evidence;
use ibex::ids::{Epoch, Rank};
use ibex::membership::{
    Action, Claimed, Instance, Membership, MembershipConfig, MembershipGuard, RankSet, Row, SlotState,
    Standing, Start, Stop, View, is_quorum,
};

#[path = "membership/states.rs"]
mod states;
#[path = "membership/store.rs"]
mod store;
#[path = "membership/world.rs"]
mod world;

use world::{Happens, World};

/// Seeds of an ordinary run, and of a full one.
const SEEDS: (u64, u64) = (1_000, 20_000);

fn seeds() -> std::ops::Range<u64> {
    if let Some(seed) = std::env::var("MODEL_SEED").ok().and_then(|seed| seed.parse().ok()) {
        return seed..seed + 1;
    }
    let full = std::env::var_os("IBEX_FULL").is_some();
    0..if full { SEEDS.1 } else { SEEDS.0 }
}

#[test]
fn whatever_happens_the_group_agrees_and_comes_back_whole() {
    let mut total = BTreeMap::<&'static str, u64>::new();
    let mut failed = Vec::new();
    for seed in seeds() {
        let run = std::panic::catch_unwind(|| {
            let mut world = World::new(seed);
            world.run_faults();
            world.heal_and_converge();
            world.counts
        });
        let Ok(counts) = run else {
            failed.push(seed);
            continue;
        };
        counts.into_iter().for_each(|(what, count)| *total.entry(what).or_default() += count);
    }
    assert!(failed.is_empty(), "MODEL_SEED=.. shows each of these: {failed:?}");
    println!("{total:?}");
    if seeds().count() > 1 {
        for what in ["kill", "cut", "outage", "suspicion", "evicted", "joined", "aborted", "slow", "left"] {
            assert!(total.get(what).is_some_and(|count| *count > 20), "{what}: {total:?}");
        }
    }
}

/// Rank 0 begins a round and is stopped; when it goes on, the round's time is over and the answers wait to be read.
#[test]
fn a_rank_that_was_stopped_blames_nobody_who_has_answered() {
    let mut world = World::new(13_543);
    world.run_faults();
    world.heal_and_converge();
}

/// A quiet group of `num` ranks that serves.
fn quiet(num: u32) -> World {
    let mut world = World::quiet(1, num);
    world.run_until_whole();
    world
}

#[test]
fn one_way_loss_between_any_two_masks_at_most_one_of_them() {
    for (from, to) in (0..4).flat_map(|a| (0..4).map(move |b| (a, b))).filter(|(a, b)| a != b) {
        let mut world = quiet(4);
        world.now_happens(Happens::Suspicion { by: Rank(to), of: Rank(from) });
        world.run_for(5);
        let evicted = RankSet::first(4).difference(&world.store.view().members());
        assert_eq!(evicted.iter().collect::<Vec<_>>(), [Rank(from.max(to))], "{to} does not hear {from}");
    }
}

#[test]
fn a_second_death_restarts_the_round() {
    let mut world = quiet(6);
    world.now_happens(Happens::Kill(Rank(4)));
    world.run_for_ns(world.detect_ns / 2);
    world.now_happens(Happens::Kill(Rank(5)));
    world.run_for(8);
    assert_eq!(world.store.view().members(), RankSet::first(4));
}

#[test]
fn half_of_a_group_goes_on_only_with_its_lowest_rank() {
    let mut world = quiet(4);
    world.now_happens(Happens::Kill(Rank(2)));
    world.now_happens(Happens::Kill(Rank(3)));
    world.run_for(8);
    assert_eq!(world.store.view().members(), RankSet::first(2));
    let mut world = quiet(4);
    world.now_happens(Happens::Kill(Rank(0)));
    world.now_happens(Happens::Kill(Rank(1)));
    world.run_for(8);
    assert_eq!(world.store.view().members(), RankSet::first(4), "no quorum, no change");
    world.run_for_ns(world.config.store_grace_ns * 2);
    assert!(matches!(world.stop_of(Rank(3)), Some(Stop::NoQuorum { members: 4, reachable: 1..=2, .. })));
}

#[test]
fn without_the_store_nothing_changes_and_in_the_end_everybody_stops() {
    let mut world = quiet(3);
    let epoch = world.store.view().epoch;
    world.now_happens(Happens::Outage(true));
    world.now_happens(Happens::Kill(Rank(2)));
    world.run_for_ns(world.config.store_grace_ns / 2);
    assert_eq!((world.store.view().epoch, world.stop_of(Rank(0))), (epoch, None));
    assert!(world.steps_of(Rank(0)) > 10, "steps go on without the lost rank");
    world.run_for_ns(world.config.store_grace_ns);
    let limit = world.config.store_grace_ns;
    assert!(
        matches!(world.stop_of(Rank(0)), Some(Stop::StoreUnavailable { limit_ns, .. }) if limit_ns == limit)
    );
}

/// The outage takes the eviction with it that is on its way, and nobody is told of the outage. Whenever it comes, the
/// eviction is made all the same.
#[test]
fn an_outage_that_is_over_before_it_is_noticed_loses_no_change() {
    for at_us in (0..12_000).step_by(10) {
        let mut world = quiet(2);
        world.now_happens(Happens::Suspicion { by: Rank(0), of: Rank(1) });
        world.happens_in(1, Happens::Kill(Rank(1)));
        world.happens_in(at_us * 1_000 + 2, Happens::Outage(true));
        world.happens_in((at_us + 10) * 1_000, Happens::Outage(false));
        world.run_for(8);
        assert_eq!(world.store.view().members(), RankSet::first(1), "an outage after {at_us} us");
    }
}

#[test]
fn an_idle_rank_is_missed_by_its_lease_if_the_store_was_up() {
    let mut world = quiet(3);
    world.is_idle = true;
    world.now_happens(Happens::Kill(Rank(2)));
    world.run_for_ns(world.config.lease_ttl_ns * 2);
    assert_eq!(world.store.view().members(), RankSet::first(2));
    // An outage that outlasts leases is no evidence against anybody.
    let mut world = quiet(3);
    world.is_idle = true;
    world.now_happens(Happens::Outage(true));
    world.run_for_ns(world.config.lease_ttl_ns * 2);
    world.now_happens(Happens::Outage(false));
    world.run_for_ns(world.config.lease_ttl_ns * 4);
    assert_eq!(world.store.view().members(), RankSet::first(3));
}

#[test]
fn a_member_cut_off_from_the_store_that_hears_nothing_of_a_peer_does_not_stay() {
    let mut world = quiet(4);
    world.now_happens(Happens::Cut(Rank(3), true));
    world.now_happens(Happens::Suspicion { by: Rank(3), of: Rank(1) });
    world.run_for_ns(world.config.lease_ttl_ns - world.detect_ns / 4);
    assert_eq!(world.store.view().members(), RankSet::first(3), "peers hear of it by signs of life, and ask");
}

#[test]
fn a_name_that_is_claimed_again_is_evidence() {
    let mut world = quiet(3);
    world.is_idle = true;
    world.now_happens(Happens::Kill(Rank(1)));
    world.now_happens(Happens::Restart(Rank(1)));
    world.run_for_ns(1);
    world.run_until_whole();
    assert!(world.time_ns() < 40 * world.detect_ns, "{} ns", world.time_ns());
}

#[test]
fn a_rank_that_flaps_is_held_down_longer_and_longer_and_then_let_in() {
    let mut world = quiet(3);
    let mut times = Vec::new();
    for _ in 0..8 {
        let before = world.time_ns();
        world.now_happens(Happens::Kill(Rank(2)));
        world.now_happens(Happens::Restart(Rank(2)));
        world.run_for_ns(1);
        world.run_until_whole();
        times.push((world.time_ns() - before) / world.detect_ns);
    }
    assert!(times[0] < 5 && times[7] > times[5] && times[5] > times[2], "{times:?}");
}

#[test]
fn ranks_leave_and_come_at_a_gate_and_nobody_is_evicted_for_it() {
    let mut world = quiet(4);
    world.now_happens(Happens::Leave(Rank(2)));
    world.run_for(10);
    assert!(matches!(world.stop_of(Rank(2)), Some(Stop::Left { .. })));
    assert_eq!(world.store.view().members().to_string(), "{0,1,3}");
    world.now_happens(Happens::Restart(Rank(2)));
    world.run_until_whole();
    assert_eq!(world.counts.get("evicted"), None);
}

/// Whatever is switched off here is missed by a test above it.
mod guards {
    use super::*;
    #[test]
    fn without_the_quorum_rule_a_minority_evicts_the_others() {
        let mut world = quiet(4);
        world.now_happens(Happens::Kill(Rank(0)));
        world.now_happens(Happens::Kill(Rank(1)));
        world.turn_off(MembershipGuard::Quorum);
        world.allow_anything();
        world.run_for(8);
        assert_eq!(world.store.view().members().to_string(), "{2,3}", "the test of halves would fail");
    }

    #[test]
    fn without_sticky_suspicions_a_silent_rank_stays() {
        let run = |is_off: bool| {
            let mut world = quiet(4);
            if is_off {
                world.turn_off(MembershipGuard::StickySuspicion);
            }
            world.is_idle = true;
            world.now_happens(Happens::Freeze(Rank(3)));
            for (by, at) in [(0, 0), (1, 6), (2, 12)] {
                world.happens_in(at * world.detect_ns / 10, Happens::Suspicion { by: Rank(by), of: Rank(3) });
            }
            world.run_for(2);
            world.store.view().members()
        };
        assert_eq!((run(false), run(true)), (RankSet::first(3), RankSet::first(4)));
    }
}
