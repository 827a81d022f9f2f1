//! A group of sessions, each driven by its keeper, in virtual time on one thread.

use std::collections::BTreeMap;
use std::sync::Arc;

use ibex::gpu::pool::{Pool, PoolConfig, Progress, Progressed};
use ibex::gpu::{Gpu, HostGpu, Stream};
use ibex::harness::RigRank;
use ibex::membership::{Instance, Membership, MembershipConfig, RankSet, Stop};
use ibex::session::{
    Combined, Happening, Keeper, KeeperEvent, KeeperOptions, Session, SessionGraph, Tensors, Tokens,
};
use ibex::{Config, Error, Rank};
use ibex_abi::types::QpNum;
use ibex_hca::emulated::{EmulatedConfig, EmulatedHca, Fabric, FabricConfig, PortId};
use ibex_hca::{Hca, Nanos};
use parking_lot::Mutex;

use super::hub::Hub;

/// One process.
struct Node {
    session: Arc<Session>,
    device: Arc<EmulatedHca>,
    gpu: Arc<HostGpu>,
    keeper: Keeper,
    next_step_ns: u64,
    next_beat_ns: u64,
    stop: Option<Stop>,
    events: Vec<KeeperEvent>,
    /// Everything of this rank runs on one stream, so that a capture needs no event of another.
    stream: Stream,
}

/// What the simulation steps.
#[derive(Default)]
struct Agents {
    nodes: Mutex<BTreeMap<Rank, Node>>,
    beat_every_ns: u64,
}

impl Progress for Agents {
    fn progress(&self, _worker: u32, now_ns: u64, random: u64) -> Progressed {
        let mut nodes = self.nodes.lock();
        let (mut next_ns, mut worked) = (u64::MAX, false);
        for node in nodes.values_mut() {
            if node.next_beat_ns <= now_ns {
                node.next_beat_ns = now_ns + self.beat_every_ns;
                node.session.send_sign_of_life().unwrap();
                worked = true;
            }
            if node.next_step_ns <= now_ns {
                match node.keeper.step(now_ns) {
                    Ok(next) => node.next_step_ns = next,
                    // Nothing more comes of it.
                    Err(stop) => (node.stop, node.next_step_ns) = (Some(stop), u64::MAX),
                }
                node.events.extend(node.keeper.take_events());
                worked = true;
            }
            next_ns = next_ns.min(node.next_beat_ns).min(node.next_step_ns.max(now_ns + 1));
        }
        let count = nodes.len().max(1);
        for i in 0..nodes.len() {
            // CAST: a remainder of a few ranks.
            let index = (random as usize + i) % count;
            let Some(node) = nodes.values().nth(index) else { continue };
            let mut draw = random;
            let step = node.device.step_seeded(Nanos(now_ns), &mut |n| {
                draw = draw.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                // CAST: a remainder below n.
                ((draw >> 33) % u64::from(n.max(1))) as u32
            });
            if step.did_work {
                return Progressed::Worked;
            }
            next_ns = next_ns.min(step.next_deadline.map_or(u64::MAX, |at| at.0));
        }
        if worked { Progressed::Worked } else { Progressed::Idle { next_deadline_ns: Some(next_ns) } }
    }
}

/// What a device is wrapped in.
pub(crate) type Wrap = Box<dyn Fn(Rank, Arc<EmulatedHca>) -> Arc<dyn Hca>>;

/// The group. Everything of it happens on the caller's thread.
pub(crate) struct Group {
    pub(crate) config: Config,
    pub(crate) hub: Hub,
    initial: RankSet,
    fabric: Arc<Fabric>,
    agents: Arc<Agents>,
    pool: Arc<Pool>,
    dead: Vec<Node>,
    num_started: u32,
    wrap: Wrap,
}

/// One rank's step that has been launched.
pub(crate) struct Running {
    session: Arc<Session>,
    tensors: Tensors,
    stream: Stream,
}

impl Running {
    pub(crate) fn session(&self) -> &Session {
        &self.session
    }
}

impl Group {
    pub(crate) fn new(config: Config, initial: RankSet, wrap: Wrap) -> Self {
        let beat_every_ns = u64::from(config.detect_ms) * 1_000_000 / 4;
        let agents = Arc::new(Agents { beat_every_ns, ..Agents::default() });
        let progress: Arc<dyn Progress> = Arc::clone(&agents) as _;
        let pool = Arc::new(Pool::new(PoolConfig::simulation(7).with_progress(progress)).unwrap());
        let fabric = Fabric::inproc(FabricConfig { seed: 7, ..FabricConfig::default() });
        let hub = Hub::default();
        Self { config, hub, initial, fabric, agents, pool, dead: Vec::new(), num_started: 0, wrap }
    }

    /// Starts a process for `rank`, under a new instance.
    pub(crate) fn start(&mut self, rank: Rank) -> Arc<Session> {
        let config = self.config.validate().unwrap();
        let device = EmulatedHca::new(Arc::clone(&self.fabric), EmulatedConfig::default()).unwrap();
        let gpu = Arc::new(HostGpu::new(Arc::clone(&self.pool), self.num_started));
        self.num_started += 1;
        let hca = (self.wrap)(rank, Arc::clone(&device));
        let session = Session::new(&config, rank, Arc::clone(&gpu) as Arc<dyn Gpu>, hca).unwrap();
        let session = Arc::new(session);
        let (claim, board) = self.hub.claim(rank, Instance(u128::from(self.num_started)));
        let limits = MembershipConfig::new(&config, self.initial);
        let now_ns = self.pool.now_ns();
        let membership = Membership::new(limits, claim, now_ns);
        let keeper =
            Keeper::new(Arc::clone(&session), membership, Box::new(board), KeeperOptions::default()).unwrap();
        let node = Node {
            session: Arc::clone(&session),
            device,
            gpu,
            keeper,
            next_step_ns: now_ns,
            next_beat_ns: now_ns,
            stop: None,
            events: Vec::new(),
            stream: session.stream(),
        };
        let old = self.agents.nodes.lock().insert(rank, node);
        assert!(old.is_none(), "{rank} runs already");
        session
    }

    /// Ends the process of `rank` wherever it stands; it says nothing to anybody.
    pub(crate) fn kill(&mut self, rank: Rank) {
        let node = self.agents.nodes.lock().remove(&rank).unwrap();
        self.fabric.kill(PortId(node.device.port_id().0));
        node.gpu.kill().unwrap();
        self.dead.push(node);
    }

    pub(crate) fn on<T>(&self, rank: Rank, call: impl FnOnce(&mut Keeper, u64) -> T) -> T {
        let mut nodes = self.agents.nodes.lock();
        let node = nodes.get_mut(&rank).unwrap();
        node.next_step_ns = 0;
        call(&mut node.keeper, self.pool.now_ns())
    }

    /// Numbers of the queue pairs of one rank to another.
    pub(crate) fn queue_pairs(&self, rank: Rank, peer: Rank) -> Vec<QpNum> {
        self.agents.nodes.lock()[&rank].session.queue_pairs(peer)
    }

    pub(crate) fn stop_of(&self, rank: Rank) -> Option<Stop> {
        self.agents.nodes.lock()[&rank].stop
    }

    pub(crate) fn happened(&self, rank: Rank, is_it: impl Fn(&Happening) -> bool) -> usize {
        self.agents.nodes.lock()[&rank].events.iter().filter(|event| is_it(&event.what)).count()
    }

    pub(crate) fn report(&self) -> String {
        let nodes = self.agents.nodes.lock();
        let of = |(rank, node): (&Rank, &Node)| {
            format!("{rank}: {:?} {:?}\n  {:?}\n", node.stop, node.keeper.view(), node.events)
        };
        nodes.iter().map(of).collect()
    }

    /// Runs until every one of `members` serves an epoch of exactly these, with its gate open.
    pub(crate) fn run_until_members(&self, members: &[u16]) {
        let members: RankSet = members.iter().map(|rank| Rank(*rank)).collect();
        let limit_ns = self.pool.now_ns() + 400 * u64::from(self.config.detect_ms) * 1_000_000;
        let mut is_whole = false;
        self.pool
            .simulate(&mut || {
                let nodes = self.agents.nodes.lock();
                is_whole =
                    members.iter().all(|rank| nodes.get(&rank).is_some_and(|node| serves(node, members)));
                is_whole || self.pool.now_ns() > limit_ns
            })
            .unwrap();
        assert!(is_whole, "not {members} by {} ns:\n{}", self.pool.now_ns(), self.report());
    }

    pub(crate) fn run_for_ms(&self, ms: u64) {
        let limit_ns = self.pool.now_ns() + ms * 1_000_000;
        self.pool.simulate(&mut || self.pool.now_ns() >= limit_ns).unwrap();
    }

    /// Launches a step of the same tokens on each of `ranks`.
    pub(crate) fn launch(&self, ranks: &[u16], tokens: &Tokens<'_>, topk: u32) -> Vec<Running> {
        let nodes = self.agents.nodes.lock();
        let launch = |rank: &u16| {
            let node = &nodes[&Rank(*rank)];
            let (session, stream) = (Arc::clone(&node.session), node.stream.clone());
            let tensors = session.tensors().unwrap();
            session.load(&tensors, topk, tokens).unwrap();
            session.launch_step(&stream, &tensors, topk).unwrap();
            Running { session, tensors, stream }
        };
        ranks.iter().map(launch).collect()
    }

    /// The same rank for tests that check it against the reference; its stream is the one that captures use.
    pub(crate) fn rig_rank(&self, rank: Rank) -> RigRank {
        let nodes = self.agents.nodes.lock();
        let node = &nodes[&rank];
        let session = Arc::clone(&node.session);
        RigRank { tensors: session.tensors().unwrap(), stream: node.stream.clone(), session }
    }

    /// Waits for all of them.
    pub(crate) fn finish(&self, running: &[Running], num_tokens: u32) -> Vec<Combined> {
        let finish = |run: &Running| run.session.finish(&run.stream, &run.tensors, num_tokens).unwrap();
        running.iter().map(finish).collect()
    }

    /// Captures a step on each of `ranks`; [`Group::replay`] runs it.
    pub(crate) fn capture(
        &self,
        ranks: &[u16],
        tokens: &Tokens<'_>,
        topk: u32,
    ) -> Vec<(Running, SessionGraph)> {
        let nodes = self.agents.nodes.lock();
        let capture = |rank: &u16| -> Result<_, Error> {
            let node = &nodes[&Rank(*rank)];
            let (session, stream) = (Arc::clone(&node.session), node.stream.clone());
            let tensors = session.tensors()?;
            session.load(&tensors, topk, tokens)?;
            session.begin_capture(&stream)?;
            session.launch_step(&stream, &tensors, topk)?;
            let graph = session.end_capture()?;
            Ok((Running { session, tensors, stream }, graph))
        };
        ranks.iter().map(|rank| capture(rank).unwrap()).collect()
    }

    pub(crate) fn replay(&self, captured: &[(Running, SessionGraph)], num_tokens: u32) -> Vec<Combined> {
        for (run, graph) in captured {
            run.session.replay(graph, &run.stream).unwrap();
        }
        captured
            .iter()
            .map(|(run, _)| run.session.finish(&run.stream, &run.tensors, num_tokens).unwrap())
            .collect()
    }
}

fn serves(node: &Node, members: RankSet) -> bool {
    let view = node.keeper.view();
    let is_switched = view.members == members && view.applied == view.epoch && !view.is_gate_closed;
    node.keeper.is_serving() && is_switched && node.session.alive() == members
}

impl Drop for Group {
    /// The pool steps what holds the pool.
    fn drop(&mut self) {
        let nodes = core::mem::take(&mut *self.agents.nodes.lock());
        drop(nodes);
        self.dead.clear();
    }
}
