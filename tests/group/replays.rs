//! One graph, captured before anything happened, replayed through three replacements and a growth. Every output is
//! checked against the reference.

use std::collections::BTreeMap;

use ibex::harness::{RigRank, StepPlan};
use ibex::membership::RankSet;
use ibex::reference::check::{Step, Verdict};
use ibex::reference::inputs::RankInput;
use ibex::reference::rng::InputKey;
use ibex::reference::routing::Routing;
use ibex::session::{SessionGraph, TopkDtype};
use ibex::{Config, Rank};

use super::rig::Group;
use super::{TOKENS, TOPK, bare, config};

/// Ranks that live all along; they replay, the others launch.
const HOLDERS: [u16; 2] = [0, 1];

/// What must be the same, byte for byte: what kernels find at frozen addresses, and what the graph has as arguments.
type Frozen = (Vec<u8>, Vec<Vec<u8>>, u64);

/// A group, what its ranks compute with, and the graphs of some.
struct Replays {
    // What stands on sessions goes before them.
    graphs: BTreeMap<Rank, SessionGraph>,
    rigs: BTreeMap<Rank, RigRank>,
    group: Group,
    num_steps: u64,
}

impl Replays {
    /// A group of these ranks, of which the holders have captured a step and launched none.
    fn formed(config: Config, ranks: &[u16]) -> Self {
        let group = Group::new(config, ranks.iter().map(|rank| Rank(*rank)).collect(), bare());
        let mut this = Self { graphs: BTreeMap::new(), rigs: BTreeMap::new(), group, num_steps: 0 };
        for rank in ranks {
            this.start(*rank).session.ready(1);
        }
        this.group.run_until_members(ranks);
        for rank in HOLDERS.map(Rank) {
            let rig = &this.rigs[&rank];
            rig.session.begin_capture(&rig.stream).unwrap();
            rig.launch(TOPK, &StepPlan::default()).unwrap();
            this.graphs.insert(rank, rig.session.end_capture().unwrap());
        }
        this
    }

    /// A process that joins, and is not ready yet.
    fn start(&mut self, rank: u16) -> &RigRank {
        self.group.start(Rank(rank));
        self.rigs.insert(Rank(rank), self.group.rig_rank(Rank(rank)));
        &self.rigs[&Rank(rank)]
    }

    fn kill(&mut self, rank: u16) {
        self.rigs.remove(&Rank(rank));
        self.group.kill(Rank(rank));
    }

    /// One step of these ranks: the holders replay, the others launch. Everything is checked; what is lost must be
    /// `gone`'s.
    fn step(&mut self, ranks: &[u16], gone: &[u16]) -> Verdict {
        self.num_steps += 1;
        let config = self.group.config.validate().unwrap();
        let input = |rank: u32| {
            let key = InputKey { seed: 3, iteration: self.num_steps, rank: Rank(rank as u16) };
            RankInput::generate(&config, Routing::Uniform, key, TOKENS)
        };
        let inputs: Vec<RankInput> = (0..config.num_ranks).map(input).collect();
        let running = || ranks.iter().map(|rank| (Rank(*rank), &self.rigs[&Rank(*rank)]));
        for (rank, rig) in running() {
            rig.load(&inputs[rank.index()], TopkDtype::I32).unwrap();
            rig.session.place_experts(&rig.tensors).unwrap();
            rig.wipe_outputs().unwrap();
        }
        for (rank, rig) in running() {
            match self.graphs.get(&rank) {
                Some(graph) => rig.session.replay(graph, &rig.stream).unwrap(),
                None => rig.launch(TOPK, &StepPlan::default()).unwrap(),
            }
        }
        let mut total = Verdict::default();
        for (rank, rig) in running() {
            rig.session.gpu().synchronize(&rig.stream).unwrap();
            let (placement, alive) = (rig.session.placement(), rig.session.alive());
            let reference = Step::new(&config, &inputs).placed(&placement, &alive);
            let is_there = |rank: u16| alive.contains(Rank(rank)) && !gone.contains(&rank);
            let members: Vec<bool> = (0..config.num_ranks as u16).map(is_there).collect();
            total += rig.check_combine(&reference, &inputs[rank.index()], &members).unwrap();
        }
        total
    }

    /// One step in which nothing may be lost.
    fn whole(&mut self, ranks: &[u16]) {
        let verdict = self.step(ranks, &[]);
        assert_eq!((verdict.wrong, verdict.lost), (0, 0), "step {}: {verdict:?}", self.num_steps);
    }

    /// One step without a rank: its picks are lost, and nothing else is.
    fn without(&mut self, gone: u16, ranks: &[u16]) {
        let verdict = self.step(ranks, &[gone]);
        assert_eq!((verdict.wrong, verdict.excess_losses), (0, 0), "step {}: {verdict:?}", self.num_steps);
        assert!(verdict.lost > 0, "step {}: somebody picked an expert of {gone}", self.num_steps);
    }

    fn frozen(&self) -> Vec<Frozen> {
        let of = |(rank, graph): (&Rank, &SessionGraph)| {
            let session = &self.rigs[rank].session;
            let gpu = session.gpu();
            (session.frozen_bytes(), gpu.captured_args(graph.graph()).unwrap(), gpu.captures())
        };
        self.graphs.iter().map(of).collect()
    }
}

#[test]
fn a_graph_captured_once_is_right_through_three_replacements_and_a_growth() {
    let config = Config { num_ranks: 5, local_experts: Some(2), ..config() };
    let (four, five) = ([0, 1, 2, 3], [0, 1, 2, 3, 4]);
    let mut replays = Replays::formed(config, &four);
    let frozen = replays.frozen();
    assert!(frozen.iter().all(|(_, _, captures)| *captures == 1));
    for dead in [2, 3, 2] {
        let left: Vec<u16> = four.into_iter().filter(|rank| *rank != dead).collect();
        replays.whole(&four);
        replays.kill(dead);
        // Nobody has agreed on anything yet: this step meets the dead rank.
        replays.without(dead, &left);
        replays.group.run_until_members(&left);
        replays.without(dead, &left);
        let session = replays.start(dead).session.clone();
        // Queue pairs to the newcomer are made and connected meanwhile.
        for _ in 0..5 {
            replays.without(dead, &left);
        }
        assert_eq!(replays.frozen(), frozen, "while rank {dead} was replaced");
        session.ready(2);
        replays.group.run_until_members(&four);
        replays.whole(&four);
        assert_eq!(replays.frozen(), frozen, "after rank {dead} was replaced");
    }
    let session = replays.start(4).session.clone();
    for _ in 0..5 {
        replays.whole(&four);
    }
    session.ready(1);
    replays.group.run_until_members(&five);
    for _ in 0..3 {
        replays.whole(&five);
    }
    assert_eq!(replays.frozen(), frozen, "after the growth");
    let all: RankSet = five.into_iter().map(Rank).collect();
    assert!(replays.rigs.values().all(|rig| rig.session.alive() == all));
}
