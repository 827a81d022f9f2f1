//! Members and placement that change at a sequence number: queued halves keep their table, graphs stay valid, nothing
//! is lost that need not be.
#![expect(clippy::unwrap_used, reason = "a scenario that cannot be set up is a failed test")]

use ibex::config::{Config, RoutePolicy};
use ibex::error::Error;
use ibex::ids::{Epoch, ExpertIdx, Lane, LocalExpertIdx, Rank};
use ibex::membership::RankSet;
use ibex::placement::Placement;
use ibex::session::{CombineSource, Guard, Halves, Regroup, SessionGraph, Switch, WorldOptions};
use steps::{Draws, Flaws, Sim, tiny};

mod steps;

/// Seeds per scenario.
const SEEDS: u64 = 40;
/// Steps, each with tensors of its own.
const STEPS: usize = 6;

/// Room for four ranks, each of which could serve every expert.
fn roomy() -> Config {
    Config {
        num_ranks: 4,
        num_experts: 8,
        local_experts: Some(8),
        ring: 2,
        sq_depth_log: 5,
        detect_ms: 5_000,
        ..tiny()
    }
}

fn set(ranks: &[u16]) -> RankSet {
    ranks.iter().map(|rank| Rank(*rank)).collect()
}

/// A world whose first members are `members`, with `STEPS` sets of tensors that hold no inputs of others.
fn world_of(config: &Config, members: &RankSet, seed: Option<u64>) -> Sim {
    let options = WorldOptions { simulation: seed, members: Some(*members), ..WorldOptions::default() };
    let mut sim = Sim::new(config, &options, STEPS);
    load_all(&mut sim, 0..STEPS, members);
    sim
}

fn load_all(sim: &mut Sim, sets: std::ops::Range<usize>, members: &RankSet) {
    for set in sets {
        sim.load_members(set, 5, set as u64, members);
    }
}

/// Launches one step on every member, its halves together or apart; nothing waits for it.
fn launch(sim: &Sim, step: usize, members: &RankSet, apart: bool) {
    let lane = Lane(step as u32 % sim.config().lanes);
    let halves = if apart { Halves::Send } else { Halves::Both };
    for rank in members.iter().map(Rank::index) {
        let stream = &sim.at(rank, step).stream;
        let handle = sim.dispatch(rank, step, lane, stream, halves).unwrap();
        if apart {
            sim.dispatch_receive(rank, step, &handle, stream);
        }
        let ticket = sim.combine(rank, step, &handle, stream, CombineSource::Staged, halves).unwrap();
        if apart {
            sim.at(rank, step).session.combine_receive(&handle, &ticket, stream).unwrap();
        }
    }
}

/// The contiguous placement over ranks 0 to 2, and the same with a replica of every expert at rank 3. Every place
/// keeps its expert.
fn placements(sim: &Sim) -> [Placement; 3] {
    let config = sim.config();
    let first = Placement::contiguous(config, 1, &set(&[0, 1, 2])).unwrap();
    let at_three = |expert: usize| (Rank(3), LocalExpertIdx(expert as u16));
    let mut replicated = first.owners().to_vec();
    (0..).zip(&mut replicated).for_each(|(expert, owners)| owners.push(at_three(expert)));
    let moved = (0..8).map(|expert| vec![at_three(expert)]).collect();
    [first, Placement::new(config, 2, replicated).unwrap(), Placement::new(config, 3, moved).unwrap()]
}

/// Regroups, letting kernels run for a while as long as the sessions say that it is too early.
fn regroup(sim: &Sim, members: &RankSet, placement: &Placement) {
    let change = Regroup { members: *members, placement: placement.clone() };
    while let Err(error) = sim.world().regroup(&change) {
        assert!(matches!(error, Error::Stale(_)), "{error:?}");
        sim.run_for(40);
    }
    for session in sim.world().sessions() {
        for step in 0..STEPS {
            session.place_experts(&sim.at(session.rank().index(), step).tensors).unwrap();
        }
    }
}

/// Six steps with two switches between them, while halves of earlier steps are queued or run.
fn two_switches(config: &Config, seed: u64, off: Option<Guard>) -> Flaws {
    let (three, four) = (set(&[0, 1, 2]), set(&[0, 1, 2, 3]));
    let mut sim = world_of(config, &three, Some(seed));
    sim.switch_guard_off(off);
    let mut draws = Draws::new(seed);
    let apart = draws.below(2) == 1;
    let [first, second, third] = placements(&sim);
    let switch_at = 1 + draws.below(2);
    load_all(&mut sim, switch_at..STEPS, &four);
    for step in 0..switch_at {
        launch(&sim, step, &three, apart);
    }
    sim.run_for(1 + draws.below(600) as u64);
    regroup(&sim, &four, &second);
    let again_at = switch_at + 1 + draws.below(2);
    for step in switch_at..again_at {
        launch(&sim, step, &four, apart);
    }
    sim.run_for(1 + draws.below(600) as u64);
    regroup(&sim, &four, &third);
    for step in again_at..STEPS {
        launch(&sim, step, &four, apart);
    }
    let mut flaws = Flaws { stuck: u64::from(sim.synchronize().is_err()), ..Flaws::default() };
    for step in 0..STEPS {
        let (members, placement) = match step {
            _ if step < switch_at => (&three, &first),
            _ if step < again_at => (&four, &second),
            _ => (&four, &third),
        };
        flaws += sim.check_placed(step, members, placement);
    }
    flaws += sim.recorded();
    flaws
}

fn configs() -> [Config; 3] {
    [
        roomy(),
        Config { lanes: 2, ..roomy() },
        Config { channels: Some(2), ring: 3, sq_depth_log: 6, ..roomy() },
    ]
}

#[test]
fn halves_that_are_queued_keep_the_table_of_their_step() {
    for config in configs() {
        for seed in 1..=SEEDS {
            let flaws = two_switches(&config, seed, None);
            assert_eq!(flaws, Flaws::default(), "{} lanes, ring {}, seed {seed}", config.lanes, config.ring);
        }
    }
}

fn is_missed(guard: Guard) {
    let found = (1..=SEEDS).find(|&seed| two_switches(&roomy(), seed, Some(guard)) != Flaws::default());
    let seed = found.unwrap_or_else(|| panic!("nobody misses {guard:?} in {SEEDS} seeds"));
    println!("without {guard:?} seed {seed} shows {:?}", two_switches(&roomy(), seed, Some(guard)));
}

#[test]
fn without_from_seq_a_queued_half_runs_under_a_later_table() {
    is_missed(Guard::FromSeq);
}

#[test]
fn without_the_wait_a_table_is_overwritten_while_a_half_uses_it() {
    is_missed(Guard::Table);
}

fn capture(sim: &Sim, rank: Rank) -> SessionGraph {
    let at = sim.at(rank.index(), 0);
    at.session.begin_capture(&at.stream).unwrap();
    let handle = sim.dispatch(rank.index(), 0, Lane(0), &at.stream, Halves::Both).unwrap();
    sim.combine(rank.index(), 0, &handle, &at.stream, CombineSource::ZeroCopy, Halves::Both).unwrap();
    at.session.end_capture().unwrap()
}

fn replay(sim: &Sim, graphs: &[SessionGraph], members: &RankSet) {
    for rank in members.iter().map(Rank::index) {
        let at = sim.at(rank, 0);
        at.session.replay(&graphs[rank], &at.stream).unwrap();
    }
}

/// What must be the same, byte for byte, for as long as a graph is replayed.
fn frozen(sim: &Sim, graphs: &[SessionGraph]) -> Vec<(Vec<u8>, Vec<Vec<u8>>, u64)> {
    let of = |rank: usize| {
        let session = &sim.at(rank, 0).session;
        let args = session.gpu().captured_args(graphs[rank].graph()).unwrap();
        (session.frozen_bytes(), args, session.gpu().captures())
    };
    (0..graphs.len()).map(of).collect()
}

/// Replays before, between and after changes of members; the last two replays are queued while the group changes.
fn graphs_outlive(config: &Config) {
    let (three, four) = (set(&[0, 1, 2]), set(&[0, 1, 2, 3]));
    let mut sim = world_of(config, &three, None);
    let graphs: Vec<SessionGraph> = (0..4).map(|rank| capture(&sim, Rank(rank))).collect();
    let before = frozen(&sim, &graphs);
    let [first, second, _] = placements(&sim);
    let mut iteration = 0;
    let mut checked = |sim: &mut Sim, members: &RankSet, placement: &Placement| {
        for _ in 0..3 {
            iteration += 1;
            sim.load_members(0, 9, iteration, members);
            replay(sim, &graphs, members);
            sim.synchronize().unwrap();
            assert_eq!(sim.check_placed(0, members, placement), Flaws::default(), "iteration {iteration}");
        }
        assert!(before == frozen(sim, &graphs), "an address or an argument moved");
    };
    checked(&mut sim, &three, &first);
    for replaced in [1, 2, 0] {
        let gone = set(&[replaced]);
        sim.world().remove_peers(&gone).unwrap();
        let survivors = three.difference(&gone);
        sim.load_members(0, 9, 100, &survivors);
        replay(&sim, &graphs, &survivors);
        sim.synchronize().unwrap();
        let flaws = sim.check_placed(0, &survivors, &first);
        assert!(flaws.wrong == 0 && flaws.lost > 0, "without {replaced}: {flaws:?}");
        replay(&sim, &graphs, &survivors);
        regroup(&sim, &three, &first);
        sim.synchronize().unwrap();
        checked(&mut sim, &three, &first);
    }
    replay(&sim, &graphs, &three);
    regroup(&sim, &four, &second);
    sim.synchronize().unwrap();
    checked(&mut sim, &four, &second);
    assert!(sim.world().sessions().iter().all(|session| session.gpu().captures() == 1));
}

#[test]
fn one_capture_outlives_three_replacements_and_one_growth() {
    graphs_outlive(&roomy());
    graphs_outlive(&Config { route: RoutePolicy::Auto, ..roomy() });
}

#[test]
fn a_closed_gate_lets_the_open_step_go_on_and_no_other_begin() {
    let sim = world_of(&Config { num_ranks: 1, ..roomy() }, &set(&[0]), Some(1));
    let (session, stream) = (&sim.at(0, 0).session, &sim.at(0, 0).stream);
    let graph = capture(&sim, Rank(0));
    assert_eq!(session.next_step(), 0, "a capture launches nothing");
    let open = sim.dispatch(0, 0, Lane(0), stream, Halves::Both).unwrap();
    let ack = session.close_gate(1_000);
    assert_eq!((ack.step, ack.next_seq), (1, None), "the counters of step 1 are not known yet");
    sim.combine(0, 0, &open, stream, CombineSource::Staged, Halves::Both).unwrap();
    assert!(!session.is_at_gate().unwrap());
    drop(open);
    assert_eq!(session.gate_ack().next_seq, Some(vec![[2, 2]]));
    assert!(session.is_at_gate().unwrap(), "what is queued keeps its table");
    let gated = |error| matches!(error, Error::Gated(gated) if gated.step == 1);
    assert!(sim.dispatch(0, 1, Lane(0), stream, Halves::Both).is_err_and(gated));
    assert!(session.replay(&graph, stream).is_err_and(gated));
    session.move_gate(2).unwrap();
    session.replay(&graph, stream).unwrap();
    session.move_gate(1).unwrap();
    assert!(session.is_at_gate().unwrap(), "a gate does not move back");
    assert_eq!((session.open_gate(4_000), session.open_gate(9_000)), (3_000, 0));
    drop(sim.dispatch(0, 1, Lane(0), stream, Halves::Both).unwrap());
    assert_eq!(session.next_step(), 3);
    sim.synchronize().unwrap();
    assert!(matches!(session.move_gate(9), Err(Error::Stale(_))));
}

/// Every expert twice: a dead owner's picks are lost until the switch, by which the replica serves them.
#[test]
fn a_replica_serves_from_the_switch_on_and_not_before() {
    let members = set(&[0, 1, 2]);
    let mut sim = world_of(&roomy(), &members, Some(3));
    let owner = |expert: u16, turn: u16| (Rank((expert + turn) % 3), LocalExpertIdx(expert));
    let owners: Vec<_> = (0..8).map(|expert| vec![owner(expert, 0), owner(expert, 1)]).collect();
    let twice = |version| Placement::new(sim.config(), version, owners.clone()).unwrap();
    let (with_all, without_one) = (twice(2), twice(3));
    regroup(&sim, &members, &with_all);
    launch(&sim, 0, &members, false);
    sim.synchronize().unwrap();
    assert_eq!(sim.check_placed(0, &members, &with_all), Flaws::default());

    sim.world().remove_peers(&set(&[1])).unwrap();
    let rest = set(&[0, 2]);
    load_all(&mut sim, 1..3, &rest);
    launch(&sim, 1, &rest, false);
    sim.synchronize().unwrap();
    let mut num_lost = 0;
    for rank in rest.iter() {
        let (picks, losses) = sim.picks_and_losses(rank.index(), 1);
        let ids = sim.experts_of(rank.index(), 1);
        for (token, (asked, lost)) in picks.iter().zip(&losses).enumerate() {
            let chosen = |k: usize| with_all.owner_for(rank, ExpertIdx(ids[token][k] as u16), &members);
            let dead = (0..2).filter(|k| asked >> k & 1 == 1 && chosen(*k).unwrap().0 == Rank(1));
            let expected: u32 = dead.map(|k| 1 << k).sum();
            assert_eq!(*lost, expected, "rank {rank}, token {token}");
            num_lost += lost.count_ones();
        }
    }
    assert!(num_lost > 0, "somebody had chosen the dead owner");

    regroup(&sim, &rest, &without_one);
    launch(&sim, 2, &rest, false);
    sim.synchronize().unwrap();
    assert_eq!(sim.check_placed(2, &rest, &without_one), Flaws::default());
}

#[test]
fn a_rank_that_leaves_on_purpose_takes_nothing_with_it() {
    for seed in 1..=SEEDS / 4 {
        let (three, rest) = (set(&[0, 1, 2]), set(&[0, 2]));
        let mut sim = world_of(&roomy(), &three, Some(seed));
        load_all(&mut sim, 2..STEPS, &rest);
        let first = Placement::contiguous(sim.config(), 1, &three).unwrap();
        let mut owners = first.owners().to_vec();
        for (expert, owners) in (0..).zip(&mut owners) {
            if owners[0].0 == Rank(1) {
                *owners = vec![(Rank(2 * (expert % 2)), LocalExpertIdx(expert))];
            }
        }
        let second = Placement::new(sim.config(), 2, owners).unwrap();
        launch(&sim, 0, &three, false);
        launch(&sim, 1, &three, false);
        sim.run_for(seed * 90);
        regroup(&sim, &rest, &second);
        for step in 2..STEPS {
            launch(&sim, step, &rest, false);
        }
        sim.synchronize().unwrap();
        for step in 0..STEPS {
            let (members, placement) = if step < 2 { (&three, &first) } else { (&rest, &second) };
            assert_eq!(
                sim.check_placed(step, members, placement),
                Flaws::default(),
                "seed {seed}, step {step}"
            );
        }
        assert_eq!(sim.recorded(), Flaws::default());
    }
}

#[test]
fn a_switch_that_does_not_fit_the_session_changes_nothing() {
    let members = set(&[0, 1, 2]);
    let sim = world_of(&roomy(), &members, Some(1));
    let session = &sim.at(0, 0).session;
    let good = Switch {
        epoch: Epoch(2),
        alive: members,
        placement: session.placement(),
        from_step: 0,
        from_seq: vec![[1, 1]],
    };
    let refused = |switch: &Switch| session.commit(switch).unwrap_err();
    assert!(matches!(refused(&good), Error::Stale(stale) if stale.what == "gate (open)"));
    session.close_gate(0);
    let later = Switch { from_step: 1, ..good.clone() };
    assert!(matches!(refused(&later), Error::Stale(stale) if (stale.found, stale.current) == (0, 1)));
    let counters = Switch { from_seq: vec![[1, 2]], ..good.clone() };
    assert!(matches!(refused(&counters), Error::Protocol(v) if (v.check, v.found) == ("next combine", 1)));
    let lanes = Switch { from_seq: vec![[1, 1]; 2], ..good.clone() };
    assert!(matches!(refused(&lanes), Error::Config(error) if error.field == "lanes to start"));
    let stranger = Switch { alive: set(&[0, 1, 2, 3]), ..good.clone() };
    assert!(matches!(refused(&stranger), Error::Protocol(v) if v.from == Rank(3)));
    let without_us = Switch { alive: set(&[1, 2]), ..good.clone() };
    assert!(matches!(refused(&without_us), Error::Protocol(v) if v.from == Rank(0)));
    assert_eq!((session.epoch(), session.alive()), (Epoch(1), members));
    session.commit(&good).unwrap();
    assert_eq!(session.epoch(), Epoch(2));
}
