//! Seeded simulation of whole groups: every order of halves, both signal modes, cut and healed paths, wrapped counters.
//!
//! Kernels of all ranks, devices and hosts run on one thread in virtual time, under one seed that a failure prints
//! first. The last part runs in real time, where only the number of steps matters.
#![expect(clippy::unwrap_used, reason = "a scenario that cannot be set up is a failed test")]

use core::time::Duration;

use ibex::config::{Config, SignalMode};
use ibex::error::{Error, Resource};
use ibex::gpu::Stream;
use ibex::ids::{Generation, Lane, Rank};
use ibex::session::{CombineSource, Halves, Replacement, SessionGraph, WorldOptions};
use ibex_hca::emulated::{PathState, Placement};
use steps::{Draws, Flaws, Handle, Sim, Ticket, tiny};

mod steps;

/// Seeds per configuration.
const SEEDS: u64 = 12;

/// One step of a program: what has been launched of it.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
struct Launched {
    sent: bool,
    received: bool,
    combines: usize,
    summed: usize,
}

/// What a program launches next.
#[derive(Clone, Copy, Debug)]
enum Action {
    Send(usize),
    Receive(usize),
    Combine(usize),
    Sum(usize),
}

/// Combines per dispatch.
const COMBINES: usize = 2;

/// A program that every rank runs: an order of halves that the ring allows, drawn from one seed.
struct Program {
    ring: usize,
    lanes: usize,
    steps: Vec<Launched>,
    /// Per lane, the steps whose combines were sent, in that order; and how many of them are summed.
    combined: Vec<Vec<(usize, bool)>>,
}

impl Program {
    fn new(ring: usize, lanes: usize, num_steps: usize) -> Self {
        Self { ring, lanes, steps: vec![Launched::default(); num_steps], combined: vec![Vec::new(); lanes] }
    }

    fn lane(&self, step: usize) -> usize {
        step % self.lanes
    }

    /// The next step to send on each lane, if any is left.
    fn next_sends(&self) -> impl Iterator<Item = usize> {
        (0..self.lanes)
            .filter_map(|lane| (lane..self.steps.len()).step_by(self.lanes).find(|&s| !self.steps[s].sent))
    }

    /// Must the session refuse this action, because its ring slot has not been received?
    fn is_refused(&self, action: Action) -> bool {
        match action {
            Action::Send(step) => {
                step >= self.ring * self.lanes && !self.steps[step - self.ring * self.lanes].received
            }
            Action::Combine(step) => {
                let order = &self.combined[self.lane(step)];
                order.len() >= self.ring && !order[order.len() - self.ring].1
            }
            Action::Receive(_) | Action::Sum(_) => false,
        }
    }

    fn choices(&self) -> Vec<Action> {
        let mut choices: Vec<Action> = self.next_sends().map(Action::Send).collect();
        for (index, step) in self.steps.iter().enumerate() {
            if step.sent && !step.received {
                choices.push(Action::Receive(index));
            }
            if step.received && step.combines < COMBINES {
                choices.push(Action::Combine(index));
            }
            if step.summed < step.combines {
                choices.push(Action::Sum(index));
            }
        }
        choices
    }

    fn note(&mut self, action: Action) {
        match action {
            Action::Send(step) => self.steps[step].sent = true,
            Action::Receive(step) => self.steps[step].received = true,
            Action::Combine(step) => {
                self.steps[step].combines += 1;
                let lane = self.lane(step);
                self.combined[lane].push((step, false));
            }
            Action::Sum(step) => {
                self.steps[step].summed += 1;
                let lane = self.lane(step);
                let open = self.combined[lane].iter_mut().find(|(of, summed)| *of == step && !summed);
                open.expect("only what was combined is summed").1 = true;
            }
        }
    }
}

/// One rank's side of a running program.
struct Runner {
    streams: [Stream; 2],
    handles: Vec<Option<Handle>>,
    tickets: Vec<Vec<Ticket>>,
    /// The stream that the step was received on: its expert runs there.
    home: Vec<usize>,
}

impl Runner {
    fn new(streams: [Stream; 2], num_steps: usize) -> Self {
        Self {
            streams,
            handles: (0..num_steps).map(|_| None).collect(),
            tickets: (0..num_steps).map(|_| Vec::new()).collect(),
            home: vec![0; num_steps],
        }
    }

    fn act(
        &mut self,
        sim: &Sim,
        rank: usize,
        action: Action,
        lane: Lane,
        stream: usize,
    ) -> Result<(), Error> {
        match action {
            Action::Send(step) => {
                self.handles[step] =
                    Some(sim.dispatch(rank, step, lane, &self.streams[stream], Halves::Send)?);
            }
            Action::Receive(step) => {
                let handle = self.handles[step].as_ref().expect("sent before");
                sim.dispatch_receive(rank, step, handle, &self.streams[stream]);
                self.home[step] = stream;
            }
            Action::Combine(step) => {
                let handle = self.handles[step].as_ref().expect("sent before");
                let stream = &self.streams[self.home[step]];
                let source = [CombineSource::ZeroCopy, CombineSource::Staged][step % 2];
                self.tickets[step].push(sim.combine(rank, step, handle, stream, source, Halves::Send)?);
            }
            Action::Sum(step) => {
                let handle = self.handles[step].as_ref().expect("sent before");
                let ticket = self.tickets[step].remove(0);
                let session = &sim.at(rank, step).session;
                session.combine_receive(handle, &ticket, &self.streams[self.home[step]])?;
            }
        }
        Ok(())
    }
}

fn is_out_of_ring(error: &Error) -> bool {
    matches!(error, Error::Exhausted(e) if e.resource == Resource::RingSlots)
}

/// Draws an order of halves that the ring allows, and launches it on every rank.
fn launch_program(sim: &Sim, draws: &mut Draws, runners: &mut [Runner], num_steps: usize) {
    let config = sim.config();
    let mut program = Program::new(config.ring as usize, config.lanes as usize, num_steps);
    loop {
        let choices = program.choices();
        if choices.is_empty() {
            return;
        }
        let action = choices[draws.below(choices.len())];
        let (Action::Send(step) | Action::Receive(step) | Action::Combine(step) | Action::Sum(step)) = action;
        let lane = Lane(program.lane(step) as u32);
        let refused = program.is_refused(action);
        for (rank, runner) in runners.iter_mut().enumerate() {
            let stream = draws.below(2);
            match runner.act(sim, rank, action, lane, stream) {
                Ok(()) => assert!(!refused, "{action:?} should have been refused"),
                Err(error) => assert!(refused && is_out_of_ring(&error), "{action:?}: {error:?}"),
            }
        }
        if !refused {
            program.note(action);
        }
    }
}

/// Runs one random program on every rank and checks every step. Returns the schedule's hash beside the flaws.
fn run_program(config: &Config, options: &WorldOptions, num_steps: usize) -> (Flaws, u64) {
    let seed = options.simulation.unwrap_or(1);
    let sim = Sim::new(config, options, num_steps);
    let mut draws = Draws::new(seed);
    let mut runners: Vec<Runner> = (0..sim.num_ranks())
        .map(|rank| {
            let session = &sim.at(rank, 0).session;
            Runner::new([session.stream(), session.stream()], num_steps)
        })
        .collect();
    launch_program(&sim, &mut draws, &mut runners, num_steps);
    let mut flaws = Flaws::default();
    for (rank, runner) in runners.iter().enumerate() {
        for stream in &runner.streams {
            flaws.stuck += u64::from(sim.at(rank, 0).session.gpu().synchronize(stream).is_err());
        }
    }
    for set in 0..num_steps {
        flaws += sim.check(set);
    }
    flaws += sim.recorded();
    (flaws, sim.world().pool().stats().schedule_hash)
}

fn seeded(seed: u64) -> WorldOptions {
    WorldOptions { simulation: Some(seed), ..WorldOptions::default() }
}

/// A ring of `ring` slots whose queues hold its credits and a few rows.
fn with_ring(ring: u32) -> Config {
    Config { ring, sq_depth_log: 5, staging_rows: 3, ..tiny() }
}

#[test]
fn every_order_of_halves_agrees_with_the_reference() {
    for ring in 1..=4 {
        for lanes in [1, 2] {
            for signal in [SignalMode::Write, SignalMode::FetchAdd] {
                let config = Config { lanes, signal, ..with_ring(ring) };
                for seed in 1..=SEEDS {
                    println!("ring {ring}, {lanes} lanes, {signal:?}, seed {seed}");
                    let (flaws, _) = run_program(&config, &seeded(seed), handles_of(&config));
                    assert_eq!(flaws, Flaws::default());
                }
            }
        }
    }
    println!("{SEEDS} seeds for each of 16 configurations");
}

/// Steps that may hold their handles all at once.
fn handles_of(config: &Config) -> usize {
    (2 * config.ring * config.lanes) as usize
}

#[test]
fn three_ranks_and_two_channels_agree_with_the_reference() {
    let config = Config { num_ranks: 3, num_experts: 7, channels: Some(2), num_sms: 2, ..with_ring(2) };
    for seed in 1..=SEEDS {
        println!("seed {seed}");
        let (flaws, _) = run_program(&config, &seeded(seed), 4);
        assert_eq!(flaws, Flaws::default());
    }
}

#[test]
fn a_seed_replays_exactly() {
    let config = with_ring(2);
    let runs = [7, 7, 8].map(|seed| run_program(&config, &seeded(seed), 4));
    assert_eq!(runs[0], runs[1]);
    assert_ne!(runs[0].1, runs[2].1, "another seed has another schedule");
}

/// Where a fabric places one queue pair's writes in any order, a written signal may overtake its data; FETCH_ADD, an
/// atomic, may not. That is why the mode exists.
#[test]
fn writes_in_any_order_need_signals_by_fetch_add() {
    let run = |signal, seed| {
        let options = WorldOptions { placement: Placement::WritesAnyOrder, ..seeded(seed) };
        run_program(&Config { signal, ..with_ring(1) }, &options, 2).0
    };
    for seed in 1..=4 * SEEDS {
        assert_eq!(run(SignalMode::FetchAdd, seed), Flaws::default(), "seed {seed}");
    }
    let overtaken = (1..=4 * SEEDS).find(|&seed| run(SignalMode::Write, seed) != Flaws::default());
    println!("a written signal overtakes its data under seed {:?}", overtaken.unwrap());
}

/// A pair is new, so that its first steps need no credit and old ones are told all the same. Those are lost on a path
/// that is cut; when it heals, a newer credit for the same slot is placed first, and the old one is sent again. It must
/// not take the newer one back.
#[test]
fn a_credit_that_is_sent_again_takes_no_newer_one_back() {
    let config = Config { signal: SignalMode::FetchAdd, ..with_ring(1) };
    for seed in 1..=SEEDS {
        let options = WorldOptions { placement: Placement::WritesAnyOrder, ..seeded(seed) };
        let sim = Sim::new(&config, &options, 4);
        let mut flaws = Flaws::default();
        sim.launch_step(0, CombineSource::Staged);
        flaws.stuck += u64::from(sim.synchronize().is_err());
        sim.world().replace_peer(Rank(1), Replacement::default()).unwrap();
        // What rank 0 says is lost; what it hears is not.
        sim.world().set_path(Rank(0), Rank(1), PathState::Cut);
        let dispatch = |rank: usize| {
            let stream = &sim.at(rank, 1).stream;
            sim.dispatch(rank, 1, Lane(0), stream, Halves::Both).unwrap()
        };
        let handles = [0, 1].map(dispatch);
        flaws.stuck += u64::from(sim.at(0, 1).session.gpu().synchronize(&sim.at(0, 1).stream).is_err());
        sim.world().set_path(Rank(0), Rank(1), PathState::Up);
        for (rank, handle) in handles.iter().enumerate() {
            let stream = &sim.at(rank, 1).stream;
            sim.combine(rank, 1, handle, stream, CombineSource::Staged, Halves::Both).unwrap();
        }
        sim.launch_step(2, CombineSource::Staged);
        sim.launch_step(3, CombineSource::Staged);
        flaws.stuck += u64::from(sim.synchronize().is_err());
        (0..4).for_each(|set| flaws += sim.check(set));
        flaws += sim.recorded();
        assert_eq!(flaws, Flaws::default(), "seed {seed}");
    }
}

/// One capture per rank of the same random program, whose halves are in the order that the ring allows.
fn capture_program(sim: &Sim, seed: u64, num_steps: usize) -> (Vec<Runner>, Vec<SessionGraph>) {
    let sessions = || sim.world().sessions().iter();
    let mut runners: Vec<Runner> = sessions()
        .map(|session| {
            let stream = session.stream();
            session.begin_capture(&stream).unwrap();
            Runner::new([stream.clone(), stream], num_steps)
        })
        .collect();
    launch_program(sim, &mut Draws::new(seed), &mut runners, num_steps);
    let graphs = sessions().map(|session| session.end_capture().unwrap()).collect();
    (runners, graphs)
}

#[test]
fn replayed_graphs_agree_with_the_reference_under_any_schedule() {
    for ring in 1..=4 {
        for lanes in [1, 2] {
            let config = Config { lanes, ..with_ring(ring) };
            for seed in 1..=SEEDS {
                println!("ring {ring}, {lanes} lanes, seed {seed}");
                replay_program(&config, seed);
            }
        }
    }
}

fn replay_program(config: &Config, seed: u64) {
    let num_steps = handles_of(config);
    let mut sim = Sim::seeded(config, seed, num_steps);
    let (runners, graphs) = capture_program(&sim, seed, num_steps);
    for replay in 0..3 {
        for set in 0..num_steps {
            sim.load(set, seed, replay * 16 + set as u64);
        }
        for (rank, (runner, graph)) in runners.iter().zip(&graphs).enumerate() {
            sim.at(rank, 0).session.replay(graph, &runner.streams[0]).unwrap();
        }
        for (rank, runner) in runners.iter().enumerate() {
            sim.at(rank, 0).session.gpu().synchronize(&runner.streams[0]).unwrap();
        }
        for set in 0..num_steps {
            assert_eq!(sim.check(set), Flaws::default(), "replay {replay}, step {set}");
        }
    }
    assert_eq!(sim.recorded(), Flaws::default());
}

/// Source rows: one rank freezes for three rings of steps while its peers' queues try again and again. Then it thaws:
/// the old messages arrive, its step ends, and nothing wrong is ever summed; once replaced, the group is whole.
#[test]
fn a_rank_frozen_for_three_rings_of_steps_thaws_without_a_wrong_byte() {
    for ring in 1..=4u32 {
        let config = Config {
            num_ranks: 3,
            num_experts: 6,
            detect_ms: 4,
            stall_ms: Some(2_000),
            sq_depth_log: 6,
            ..with_ring(ring)
        };
        for seed in 1..=SEEDS / 2 {
            println!("ring {ring}, seed {seed}");
            freeze_and_thaw(&config, seed);
        }
    }
}

/// The rank that freezes.
const VICTIM: usize = 2;

/// Every path to and from the victim.
fn set_paths(sim: &Sim, state: PathState) {
    let victim = Rank(VICTIM as u16);
    for other in [Rank(0), Rank(1)] {
        sim.world().set_path(victim, other, state);
        sim.world().set_path(other, victim, state);
    }
}

/// Launches one whole step of some ranks.
fn launch(sim: &Sim, ranks: &[usize], set: usize) {
    for &rank in ranks {
        let stream = &sim.at(rank, set).stream;
        let handle = sim.dispatch(rank, set, Lane(0), stream, Halves::Both).unwrap();
        sim.combine(rank, set, &handle, stream, CombineSource::Staged, Halves::Both).unwrap();
    }
}

/// Runs until the streams of some ranks are empty, and what their step has done wrong, of both halves.
fn finish(sim: &Sim, ranks: &[usize], set: usize) -> Flaws {
    let mut flaws = Flaws::default();
    for &rank in ranks {
        let at = sim.at(rank, set);
        at.session.gpu().synchronize(&at.stream).unwrap();
    }
    for &rank in ranks {
        flaws += sim.check_dispatch_of(rank, set);
        flaws += sim.check_combine_of(rank, set);
    }
    flaws
}

fn freeze_and_thaw(config: &Config, seed: u64) {
    let (survivors, all) = ([0, 1], [0, 1, VICTIM]);
    let mut sim = Sim::seeded(config, seed, 2);
    launch(&sim, &all, 1);
    assert_eq!(finish(&sim, &all, 1), Flaws::default());
    set_paths(&sim, PathState::Cut);
    // A frozen rank's clocks stand: it blames nobody. Its step, of the first set, is in flight until it thaws.
    let patience = Duration::from_secs(1_000);
    sim.at(VICTIM, 0).session.set_limits(patience, patience).unwrap();
    launch(&sim, &[VICTIM], 0);
    for iteration in 1..=3 * u64::from(config.ring) {
        let set = usize::from(iteration != 1);
        if set == 1 {
            sim.load(1, seed, iteration);
        }
        launch(&sim, &survivors, set);
        let flaws = finish(&sim, &survivors, set);
        assert_eq!(flaws.wrong, 0, "iteration {iteration}: {flaws:?}");
        assert_ne!(flaws.lost, 0, "what the frozen rank owned is lost, and said so");
    }
    let victim = sim.at(VICTIM, 0);
    let lost = victim.session.gpu().load_u32(victim.tensors.source_ok.addr()).unwrap();
    assert_eq!(lost, 0xa5a5_a5a5, "the victim's step has not ended");
    set_paths(&sim, PathState::Up);
    let thawed = finish(&sim, &[VICTIM], 0);
    assert_eq!(thawed.wrong, 0, "{thawed:?}");
    for rank in survivors {
        let session = &sim.at(rank, 0).session;
        assert_eq!(session.suspected().unwrap(), [Rank(VICTIM as u16)], "a suspicion is sticky");
    }
    // Long enough for every queue to have sent everything again.
    sim.run_until_ns(config_retry_ns(&sim));
    let recorded = sim.recorded();
    assert_eq!((recorded.violations, recorded.unrung, recorded.error_cqes), (0, 0, 0), "{recorded:?}");
    sim.world().replace_peer(Rank(VICTIM as u16), Replacement::default()).unwrap();
    for iteration in 200..203 {
        sim.load(1, seed, iteration);
        launch(&sim, &all, 1);
        assert_eq!(finish(&sim, &all, 1), Flaws::default(), "iteration {iteration}");
    }
}

fn config_retry_ns(sim: &Sim) -> u64 {
    2 * sim.config().rc_timers().timeout_ns()
}

/// More than 2^16 WQEs on each queue pair, through queues of 16 entries that one warp drives.
#[test]
fn queues_wrap_without_overwriting_what_is_not_yet_done() {
    let config = Config {
        max_tokens: 96,
        max_topk: 4,
        sq_depth_log: 4,
        num_owner_warps: Some(1),
        warps_per_block: 3,
        detect_ms: 5_000,
        ..tiny()
    };
    for source in [CombineSource::ZeroCopy, CombineSource::Staged] {
        let mut sim = Sim::new(&config, &WorldOptions::default(), 1);
        for iteration in 0.. {
            sim.load(0, 3, iteration);
            sim.launch_step(0, source);
            sim.synchronize().unwrap();
            assert_eq!(sim.check(0), Flaws::default(), "iteration {iteration}");
            // Two ranks: every WQE that a device has run stood on the one queue pair to the other.
            if sim.world().devices().iter().all(|device| device.counters().wqes > 3 << 15) {
                break;
            }
        }
        assert_eq!(sim.recorded(), Flaws::default());
    }
}

#[test]
fn generations_wrap_without_a_lost_step() {
    for signal in [SignalMode::Write, SignalMode::FetchAdd] {
        let config = Config { signal, ..with_ring(2) };
        for seed in 1..=SEEDS {
            let mut sim = Sim::seeded(&config, seed, 1);
            let next = [0xffff_fffe - 3, 0xffff_fffe - 2];
            for rank in 0..sim.num_ranks() {
                sim.at(rank, 0).session.start_at(&[next]).unwrap();
            }
            sim.world().replace_peer(Rank(1), Default::default()).unwrap();
            for iteration in 0..8 {
                sim.load(0, seed, iteration);
                sim.launch_step(0, CombineSource::ZeroCopy);
                sim.synchronize().unwrap();
                assert_eq!(sim.check(0), Flaws::default(), "seed {seed}, iteration {iteration}");
            }
            let [dispatch, combine] = sim.at(0, 0).session.next_seq(Lane(0)).unwrap();
            let wrapped = |seq, before| Generation::of_seq(seq).get() < Generation::of_seq(before).get();
            assert!(wrapped(dispatch, next[0]) && wrapped(combine, next[1]));
            assert_eq!(sim.recorded(), Flaws::default());
        }
    }
}

/// Halves that run when a replacement begins end during its grace period, and move their rank's counters: the group
/// goes on from there, not from what the counters said before.
#[test]
fn a_peer_may_be_replaced_while_halves_run() {
    let mut num_caught = 0;
    for seed in 1..=4 * SEEDS {
        let mut sim = Sim::seeded(&tiny(), seed, 1);
        for rank in 0..sim.num_ranks() {
            sim.dispatch(rank, 0, Lane(0), &sim.at(rank, 0).stream, Halves::Both).unwrap();
        }
        sim.run_for(10 * seed);
        let next_of = |rank: usize| sim.at(rank, 0).session.next_seq(Lane(0)).unwrap();
        let before = next_of(0);
        sim.world().replace_peer(Rank(1), Default::default()).unwrap();
        let moved = next_of(0) != before;
        sim.synchronize().unwrap();
        if next_of(0) != next_of(1) {
            // One of the two had not begun yet: this was not between two steps.
            continue;
        }
        num_caught += u64::from(moved);
        for iteration in 1..4 {
            sim.load(0, seed, iteration);
            sim.launch_step(0, CombineSource::ZeroCopy);
            sim.synchronize().unwrap();
            assert_eq!(sim.check(0), Flaws::default(), "seed {seed}, iteration {iteration}");
        }
    }
    println!("halves were caught while they ran under {num_caught} seeds");
    assert!(num_caught > 0);
}
