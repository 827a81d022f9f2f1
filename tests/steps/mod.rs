//! What simulated tests share: a world under one seed, with several sets of tensors per rank, and a ledger of flaws.
//!
//! A set of tensors holds one step: its inputs, its outputs, and what they are compared with. So several steps can be
//! in flight, each with bytes of its own, and a row of the wrong step is a wrong row.
#![allow(dead_code, unreachable_pub, reason = "each test that includes this module uses a part of it")]
#![expect(clippy::unwrap_used, reason = "a step that cannot be prepared is a failed test")]

use std::ops::AddAssign;

use ibex::config::{Config, RoutePolicy, ValidConfig, WireDtype};
use ibex::error::Error;
use ibex::gpu::{GpuError, Stream};
use ibex::harness::RigRank;
use ibex::ids::{Lane, Rank};
use ibex::membership::RankSet;
use ibex::placement::Placement;
use ibex::reference::check::Step;
use ibex::reference::inputs::RankInput;
use ibex::reference::rng::InputKey;
use ibex::reference::routing::Routing;
use ibex::session::{
    CombineSource, CombineTicket, DispatchCall, DispatchHandle, Guard, Halves, TopkDtype, World, WorldOptions,
};
use ibex::telemetry::FaultKind;

/// A small world: a seed costs milliseconds, and every queue, ring and slot is used again at once.
pub fn tiny() -> Config {
    Config {
        num_ranks: 2,
        max_tokens: 4,
        hidden: 32,
        num_experts: 4,
        max_topk: 2,
        dtype: WireDtype::Bf16,
        route: RoutePolicy::Ibgda,
        ring: 1,
        channels: Some(1),
        sq_depth_log: 4,
        num_sms: 1,
        warps_per_block: 2,
        num_owner_warps: Some(1),
        detect_ms: 20,
        ..Config::default()
    }
}

/// Everything that a run can have done wrong. The default is a good run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flaws {
    /// Rows or outputs that differ from the reference, given the losses.
    pub wrong: u64,
    /// Picks reported lost, or sources not received.
    pub lost: u64,
    /// Headers or counts that contradict the protocol, although every rank is honest.
    pub violations: u64,
    /// WQEs that no doorbell covers.
    pub unrung: u64,
    /// Error completions.
    pub error_cqes: u64,
    /// Waits that a kernel gave up.
    pub timeouts: u64,
    /// Runs in which nothing could move any more.
    pub stuck: u64,
}

impl AddAssign for Flaws {
    fn add_assign(&mut self, other: Self) {
        self.wrong += other.wrong;
        self.lost += other.lost;
        self.violations += other.violations;
        self.unrung += other.unrung;
        self.error_cqes += other.error_cqes;
        self.timeouts += other.timeouts;
        self.stuck += other.stuck;
    }
}

/// Choices drawn from one seed: splitmix64.
pub struct Draws(u64);

impl Draws {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % n as u64) as usize
    }
}

/// Where a dispatch or a combine stands on one rank.
pub type Handle = DispatchHandle;
/// See [`Handle`].
pub type Ticket = CombineTicket;

/// A simulated world.
pub struct Sim {
    // Tensors and sessions go before the world's GPUs and devices.
    ranks: Vec<Vec<RigRank>>,
    inputs: Vec<Vec<RankInput>>,
    config: ValidConfig,
    world: World,
}

impl Sim {
    /// A world with `sets` sets of tensors, each loaded with inputs of its own.
    pub fn new(config: &Config, options: &WorldOptions, sets: usize) -> Self {
        let world = World::new(config, options).unwrap();
        let config = config.validate().unwrap();
        let seed = options.simulation.unwrap_or(1);
        let mut ranks = Vec::new();
        for session in world.sessions() {
            let stream = session.stream();
            let set = |_| RigRank {
                session: session.clone(),
                tensors: session.tensors().unwrap(),
                stream: stream.clone(),
            };
            ranks.push((0..sets).map(set).collect::<Vec<_>>());
        }
        let mut sim = Self { ranks, inputs: vec![Vec::new(); sets], config, world };
        for set in 0..sets {
            sim.load(set, seed, set as u64);
        }
        sim
    }

    /// The usual options: strict doorbells, one seed.
    pub fn seeded(config: &Config, seed: u64, sets: usize) -> Self {
        Self::new(config, &WorldOptions { simulation: Some(seed), ..WorldOptions::default() }, sets)
    }

    /// Puts new inputs into a set of tensors, with a number of tokens per rank that depends on the iteration.
    pub fn load(&mut self, set: usize, seed: u64, iteration: u64) {
        self.load_members(set, seed, iteration, &RankSet::first(self.config.num_ranks));
    }

    /// The same, where ranks that are no members have no tokens.
    pub fn load_members(&mut self, set: usize, seed: u64, iteration: u64, members: &RankSet) {
        let config = &self.config;
        let input = |rank: u32| {
            let key = InputKey { seed, iteration, rank: Rank(rank as u16) };
            let mut tokens = config.max_tokens - (iteration as u32 + rank) % 3 % (config.max_tokens + 1);
            if !members.contains(key.rank) {
                tokens = 0;
            }
            RankInput::generate(config, Routing::Uniform, key, tokens)
        };
        self.inputs[set] = (0..config.num_ranks).map(input).collect();
        for (rank, input) in self.ranks.iter().zip(&self.inputs[set]) {
            rank[set].load(input, TopkDtype::I32).unwrap();
            rank[set].wipe_outputs().unwrap();
        }
    }

    pub fn world(&self) -> &World {
        &self.world
    }

    pub fn config(&self) -> &ValidConfig {
        &self.config
    }

    pub fn num_ranks(&self) -> usize {
        self.ranks.len()
    }

    /// One rank with one of its sets.
    pub fn at(&self, rank: usize, set: usize) -> &RigRank {
        &self.ranks[rank][set]
    }

    pub fn switch_guard_off(&self, guard: Option<Guard>) {
        for session in self.world.sessions() {
            guard.into_iter().for_each(|guard| session.switch_guard_off(guard));
        }
    }

    pub fn dispatch(
        &self,
        rank: usize,
        set: usize,
        lane: Lane,
        stream: &Stream,
        halves: Halves,
    ) -> Result<Handle, Error> {
        let at = self.at(rank, set);
        let call = DispatchCall {
            num_topk: self.config.max_topk,
            topk_dtype: TopkDtype::I32,
            with_weights: true,
            halves,
        };
        at.session.dispatch(lane, stream, &at.tensors, &call)
    }

    pub fn dispatch_receive(&self, rank: usize, set: usize, handle: &Handle, stream: &Stream) {
        let at = self.at(rank, set);
        at.session.dispatch_receive(handle, stream, &at.tensors).unwrap();
    }

    /// The stand-in expert and a combine of what was dispatched with `handle`.
    pub fn combine(
        &self,
        rank: usize,
        set: usize,
        handle: &Handle,
        stream: &Stream,
        source: CombineSource,
        halves: Halves,
    ) -> Result<Ticket, Error> {
        let at = self.at(rank, set);
        at.session.run_expert(stream, &at.tensors).unwrap();
        at.session.combine(handle, stream, &at.tensors, source, halves)
    }

    /// One whole step on every rank, each on its set's stream; nothing waits for it yet.
    pub fn launch_step(&self, set: usize, source: CombineSource) {
        for rank in 0..self.num_ranks() {
            let stream = &self.at(rank, set).stream;
            let handle = self.dispatch(rank, set, Lane(0), stream, Halves::Both).unwrap();
            self.combine(rank, set, &handle, stream, source, Halves::Both).unwrap();
        }
    }

    /// Runs until every rank's own stream is empty.
    pub fn synchronize(&self) -> Result<(), GpuError> {
        for sets in &self.ranks {
            for at in sets {
                at.session.gpu().synchronize(&at.stream)?;
            }
        }
        Ok(())
    }

    /// Runs for `decisions` decisions of the scheduler.
    pub fn run_for(&self, decisions: u64) {
        let mut left = decisions;
        let done = self.world.pool().simulate(&mut || {
            left = left.saturating_sub(1);
            left == 0
        });
        done.unwrap();
    }

    /// Runs for `ns` of virtual time.
    pub fn run_until_ns(&self, ns: u64) {
        let limit = self.world.pool().now_ns() + ns;
        let pool = self.world.pool();
        pool.simulate(&mut || pool.now_ns() >= limit).unwrap();
    }

    /// Compares what the dispatch of a set left with the reference.
    pub fn check_dispatch(&self, set: usize) -> Flaws {
        let mut flaws = Flaws::default();
        for rank in 0..self.num_ranks() {
            flaws += self.check_dispatch_of(rank, set);
        }
        flaws
    }

    /// The same on one rank only.
    pub fn check_dispatch_of(&self, rank: usize, set: usize) -> Flaws {
        let step = Step::new(&self.config, &self.inputs[set]);
        let verdict = self.at(rank, set).check_dispatch(&step).unwrap();
        Flaws { wrong: verdict.wrong, lost: verdict.lost, ..Flaws::default() }
    }

    /// Compares what the combine of a set left with the reference.
    pub fn check_combine(&self, set: usize) -> Flaws {
        let mut flaws = Flaws::default();
        for rank in 0..self.num_ranks() {
            flaws += self.check_combine_of(rank, set);
        }
        flaws
    }

    /// The same on one rank only.
    pub fn check_combine_of(&self, rank: usize, set: usize) -> Flaws {
        let step = Step::new(&self.config, &self.inputs[set]);
        let alive = vec![true; self.num_ranks()];
        let verdict = self.at(rank, set).check_combine(&step, &self.inputs[set][rank], &alive).unwrap();
        Flaws { wrong: verdict.wrong, lost: verdict.lost, ..Flaws::default() }
    }

    /// Per token of one rank, the picks that a set asks for and those that its combine reported lost, as bits.
    pub fn picks_and_losses(&self, rank: usize, set: usize) -> (Vec<u32>, Vec<u32>) {
        let input = &self.inputs[set][rank];
        let asked = |token: &[i32]| (0..token.len()).map(|k| u32::from(token[k] >= 0) << k).sum();
        let picks = input.topk_idx.chunks(input.num_topk as usize).map(asked).collect();
        (picks, self.at(rank, set).lost_topk(input.num_tokens).unwrap())
    }

    /// The experts that each token of one rank asks for.
    pub fn experts_of(&self, rank: usize, set: usize) -> Vec<Vec<i32>> {
        let input = &self.inputs[set][rank];
        input.topk_idx.chunks(input.num_topk as usize).map(<[i32]>::to_vec).collect()
    }

    /// Masks one pick of every token of a set: nobody asks for it.
    pub fn mask_pick(&mut self, set: usize, k: u32) {
        for (sets, input) in self.ranks.iter().zip(&mut self.inputs[set]) {
            let num_topk = input.num_topk;
            input.topk_idx.iter_mut().skip(k as usize).step_by(num_topk as usize).for_each(|id| *id = -1);
            sets[set].load(input, TopkDtype::I32).unwrap();
        }
    }

    /// Both checks of one set on members that ran it under a placement; nothing of theirs may be lost.
    pub fn check_placed(&self, set: usize, members: &RankSet, placement: &Placement) -> Flaws {
        let step = Step::new(&self.config, &self.inputs[set]).placed(placement, members);
        let alive: Vec<bool> =
            (0..self.num_ranks() as u16).map(|rank| members.contains(Rank(rank))).collect();
        let mut flaws = Flaws::default();
        for rank in members.iter() {
            let at = self.at(rank.index(), set);
            let mut verdict = at.check_dispatch(&step).unwrap();
            verdict += at.check_combine(&step, &self.inputs[set][rank.index()], &alive).unwrap();
            flaws += Flaws { wrong: verdict.wrong, lost: verdict.lost, ..Flaws::default() };
        }
        flaws
    }

    /// Both checks of one set.
    pub fn check(&self, set: usize) -> Flaws {
        let mut flaws = self.check_dispatch(set);
        flaws += self.check_combine(set);
        flaws
    }

    /// What sessions and devices have recorded.
    pub fn recorded(&self) -> Flaws {
        let mut flaws = Flaws::default();
        for session in self.world.sessions() {
            for fault in session.faults().unwrap() {
                match fault.kind {
                    FaultKind::Violation => flaws.violations += 1,
                    _ => flaws.timeouts += 1,
                }
            }
        }
        for device in self.world.devices() {
            flaws.unrung += device.check_unrung();
            flaws.error_cqes += device.counters().error_cqes;
        }
        flaws
    }
}
