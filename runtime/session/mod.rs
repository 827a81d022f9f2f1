//! One rank's side of a group: memory, queue pairs, members, and the calls that launch dispatch and combine.
//!
//! A [`Session`] owns its buffers, its queue pairs and their control memory from construction to drop. Addresses that
//! kernels see never move, so a graph captured once stays valid while peers are replaced.
//!
//! A session is made in two steps, because its peers must exist first: [`Session::new`] allocates everything, then
//! for each peer [`Session::offer`] creates this side's queue pairs and [`Session::connect`] joins them to the
//! peer's. [`World`] does that for all ranks of one process.

use core::time::Duration;
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use ibex_abi::device_ctx::{LaneArgs, LaneState, Limits};
use ibex_hca::Hca;
use parking_lot::{MappedMutexGuard, Mutex, MutexGuard, RwLock};
use zerocopy::IntoBytes;

use crate::buffer::{LaneBuffers, OwnedPd};
use crate::config::{SignalMode, ValidConfig};
use crate::error::{ConfigError, Error, Exhausted, Limit, Resource};
use crate::gpu::{Gpu, Graph, Stream};
use crate::ids::{Epoch, Lane, Rank};
use crate::layout::{Plan, qp_slot};
use crate::membership::RankSet;
use crate::placement::Placement;
use crate::recovery::{DeviceLog, Fences, Neighbours, PeerQueues, Quarantine, Reach, SimulatedProcess};

mod attendant;
mod calls;
mod elastic;
mod gate;
mod guards;
mod host;
mod keeper;
mod member;
mod node;
mod order;
mod regroup;
mod stepper;
mod store_board;
mod switch;
mod tensors;
mod world;

pub use crate::buffer::PlaceReport;
pub use crate::recovery::reaches_doorbells;
pub use attendant::Lateness;
pub use calls::{CombineSource, CombineTicket, DispatchCall, DispatchHandle, Halves, TopkDtype};
pub use elastic::{ElasticMember, ElasticOptions};
pub use gate::GateAck;
pub use guards::Guard;
pub use host::{Combined, Tokens};
pub use keeper::{
    Happening, Introduce, Keeper, KeeperEvent, KeeperOptions, MembershipView, Records, Whereabouts,
};
pub use member::{Member, MemberFabric, MemberOptions};
pub use regroup::Regroup;
pub use store_board::{Bell, BoardClaim, GroupName, StoreBoard, StoreRecords};
pub use switch::Switch;
pub use tensors::Tensors;
pub use world::{DeviceWrapper, Gpus, Replacement, World, WorldOptions};

use calls::IndexPool;
use gate::Steps;
use order::LaneOrder;
pub(crate) use order::Mark;
pub(crate) use stepper::Stepper;
use switch::{Membership, Tables};

/// Index of the dispatch operation in per-operation arrays.
pub(crate) const DISPATCH: usize = 0;
/// Index of the combine operation in per-operation arrays.
pub(crate) const COMBINE: usize = 1;

/// How many polls of a wait pass between two looks at the peer's completion queues. Chosen; see bench recovery.
const POLLS_PER_CQ_READ: u32 = 16;

/// One lane: its memory and the order of what is launched on it.
pub(crate) struct LaneRuntime {
    pub(crate) buffers: RwLock<LaneBuffers>,
    order: Mutex<LaneOrder>,
    tables: Mutex<Tables>,
    handles: Arc<IndexPool>,
    tickets: Arc<IndexPool>,
    lane: Lane,
    qp_slot_base: u32,
    guards_off: AtomicU32,
}

impl LaneRuntime {
    pub(crate) fn lane(&self) -> Lane {
        self.lane
    }

    /// Marks behind everything that has been launched on this lane.
    pub(crate) fn launched(&self) -> Vec<Mark> {
        self.order.lock().marks()
    }

    /// Lets the next dispatch and combine draw these sequence numbers.
    pub(crate) fn start_at(&self, next: [u64; 2]) {
        let mut order = self.order.lock();
        for op in [DISPATCH, COMBINE] {
            order.ring_mut(op).start_at(next[op]);
        }
    }

    fn args(&self, buffers: &LaneBuffers) -> LaneArgs {
        let guards_off = self.guards_off.load(Ordering::Relaxed);
        LaneArgs { guards_off, ..buffers.lane_args(self.lane.0, self.qp_slot_base) }
    }
}

/// The orders of all lanes while one stream is captured: what is captured owes its receives within the capture.
struct Capture {
    stream: Stream,
    lanes: HashMap<u32, LaneOrder>,
}

/// Where the memory of a session lies. See [`Session::places`].
#[derive(Debug, Clone)]
pub struct Places {
    /// Rings, completions and doorbell records of the queue pairs that kernels drive.
    pub queues: PlaceReport,
    /// What dispatch and combine move.
    pub payload: PlaceReport,
}

/// A captured graph of dispatches and combines.
pub struct SessionGraph {
    graph: Graph,
    session: u64,
    steps: Vec<[u64; 2]>,
}

impl SessionGraph {
    /// The captured graph itself.
    pub fn graph(&self) -> &Graph {
        &self.graph
    }
}

/// One rank's side of a group. See the module documentation.
pub struct Session {
    // Drop order: queue pairs before the memory they work on.
    pub(crate) queues: Mutex<PeerQueues>,
    pub(crate) lanes: Vec<LaneRuntime>,
    /// By rank; dropped after everything above has stopped kernels from using them.
    pub(crate) reaches: Mutex<Vec<Reach>>,
    /// Peers whose slots kernels may use, as far as the host is concerned.
    pub(crate) active: Mutex<RankSet>,
    pub(crate) fences: Mutex<Fences>,
    /// Locked last: nothing else is taken while it is held.
    pub(crate) device_log: Mutex<DeviceLog>,
    pub(crate) quarantine: Mutex<Quarantine>,
    pub(crate) neighbours: Neighbours,
    membership: Mutex<Membership>,
    steps: Steps,
    capture: Mutex<Option<Capture>>,
    nonce: AtomicU32,
    beat: AtomicU64,
    id: u64,
    pub(crate) plan: Plan,
    pub(crate) config: ValidConfig,
    pub(crate) rank: Rank,
    pub(crate) pd: Arc<OwnedPd>,
    pub(crate) hca: Arc<dyn Hca>,
    pub(crate) gpu: Arc<dyn Gpu>,
}

impl Session {
    /// Allocates and registers everything that `rank` needs; no queue pair exists yet.
    ///
    /// # Errors
    /// `Config` for a rank outside the world, `Exhausted` if the grid does not fit the GPU, else what the GPU or the
    /// HCA refused. Nothing stays behind.
    pub fn new(
        config: &ValidConfig,
        rank: Rank,
        gpu: Arc<dyn Gpu>,
        hca: Arc<dyn Hca>,
    ) -> Result<Self, Error> {
        if u32::from(rank.0) >= config.num_ranks {
            return Err(Error::Config(ConfigError {
                field: "rank",
                value: u32::from(rank.0).into(),
                limit: Limit::Range { min: 0, max: u64::from(config.num_ranks) - 1 },
            }));
        }
        check_grid(config, &*gpu)?;
        check_atomics(config.signal, hca.caps().atomic)?;
        let members = RankSet::first(config.num_ranks);
        let placement = Placement::contiguous(config, 1, &members)?;
        let plan = Plan::new(config, rank);
        let pd = OwnedPd::new(&hca)?;
        let mut lanes = Vec::new();
        for lane in 0..config.lanes {
            let buffers = LaneBuffers::new(&*gpu, &pd, plan)?;
            lanes.push(LaneRuntime {
                buffers: RwLock::new(buffers),
                order: Mutex::new(LaneOrder::new(config.ring)),
                tables: Mutex::default(),
                handles: IndexPool::new(plan.handles),
                tickets: IndexPool::new(plan.handles),
                lane: Lane(lane),
                qp_slot_base: qp_slot(&plan.shape, Lane(lane), Rank(0), 0),
                guards_off: AtomicU32::new(0),
            });
        }
        let queues = PeerQueues::new(config, &plan, &*gpu, &hca, &pd)?;
        static NEXT_ID: AtomicU64 = AtomicU64::new(1);
        let session = Self {
            queues: Mutex::new(queues),
            lanes,
            reaches: Mutex::new((0..config.num_ranks).map(|_| Reach::default()).collect()),
            active: Mutex::default(),
            fences: Mutex::default(),
            device_log: Mutex::new(DeviceLog::new(config.num_ranks)),
            quarantine: Mutex::default(),
            neighbours: Neighbours::Real,
            membership: Membership::new(Epoch(1), members, placement),
            steps: Steps::default(),
            capture: Mutex::new(None),
            nonce: AtomicU32::new(1),
            beat: AtomicU64::new(1),
            id: NEXT_ID.fetch_add(1, Ordering::Relaxed),
            plan,
            config: config.clone(),
            rank,
            pd,
            hca,
            gpu,
        };
        session.write_initial_state()?;
        Ok(session)
    }

    /// Lets the session live in a process that a simulation plays, before it offers anything to a peer.
    #[doc(hidden)]
    #[must_use]
    pub fn in_process(mut self, process: &SimulatedProcess) -> Self {
        self.neighbours = process.neighbours();
        self
    }

    fn write_initial_state(&self) -> Result<(), Error> {
        let state = LaneState { next: [1, 1], ..LaneState::default() };
        // Everybody alive, experts contiguous per rank, from the first step on.
        let everybody = Switch {
            epoch: self.epoch(),
            alive: self.alive(),
            placement: self.placement(),
            from_step: 0,
            from_seq: vec![[0; 2]; self.lanes.len()],
        };
        for (runtime, from_seq) in self.lanes.iter().zip(&everybody.from_seq) {
            LaneBuffers::write(&*self.gpu, runtime.buffers.read().state_addr(), &state)?;
            self.write_first(runtime, &everybody, *from_seq)?;
        }
        let ms = |ms: u32| Duration::from_millis(ms.into());
        self.set_limits(ms(self.config.detect_ms), ms(self.config.stall_ms()))
    }

    fn limits(&self, detect: Duration, stall: Duration) -> Limits {
        let ns = |limit: Duration| u64::try_from(limit.as_nanos()).unwrap_or(u64::MAX);
        Limits {
            detect_ns: ns(detect),
            stall_ns: ns(stall),
            cap_ns: ns(stall).saturating_mul(self.config.num_ranks.into()),
            polls_per_cq_read: POLLS_PER_CQ_READ,
            reserved: 0,
        }
    }

    /// Changes the time limits of this rank's kernels, those that run included.
    ///
    /// `detect` bounds a wait without a sign of life, `stall` the wait for a peer that lives.
    ///
    /// # Errors
    /// `Gpu` if the limits cannot be written.
    pub fn set_limits(&self, detect: Duration, stall: Duration) -> Result<(), Error> {
        let limits = self.limits(detect, stall);
        for runtime in &self.lanes {
            LaneBuffers::write(&*self.gpu, runtime.buffers.read().limits_addr(), &limits)?;
        }
        Ok(())
    }

    /// This rank.
    pub fn rank(&self) -> Rank {
        self.rank
    }

    /// The configuration.
    pub fn config(&self) -> &ValidConfig {
        &self.config
    }

    /// The GPU that runs this rank's kernels.
    pub fn gpu(&self) -> &Arc<dyn Gpu> {
        &self.gpu
    }

    /// Makes a stream on this rank's GPU.
    pub fn stream(&self) -> Stream {
        self.gpu.stream()
    }

    /// Allocates a set of caller tensors at full capacity, with the stand-in expert's ids of the present placement
    /// filled in.
    ///
    /// # Errors
    /// What the GPU or the HCA refused.
    pub fn tensors(&self) -> Result<Tensors, Error> {
        let t = Tensors::new(&*self.gpu, &self.pd, &self.plan, self.id)?;
        self.place_experts(&t)?;
        Ok(t)
    }

    /// Tells the stand-in expert which experts stand at which place here, by the present placement. A queued
    /// step sees it too: a place that one uses must keep its expert.
    ///
    /// # Errors
    /// `Stale` for tensors of another session; `Gpu` if the ids cannot be written.
    pub fn place_experts(&self, t: &Tensors) -> Result<(), Error> {
        self.check_tensors(t)?;
        for (local, expert) in self.placement().served_by(self.rank) {
            self.gpu.store_u32(t.expert_ids.addr() + 4 * local.index() as u64, expert.0.into())?;
        }
        Ok(())
    }

    /// Bytes that this rank allocates and registers, at full ring depth and for the worst routing. Known before
    /// anything is allocated: see [`buffer_bytes`].
    pub fn buffer_bytes(&self) -> u64 {
        let lanes: u64 = self.lanes.iter().map(|l| l.buffers.read().allocated_bytes()).sum();
        lanes + self.queues.lock().control_bytes()
    }

    /// The part of [`Session::buffer_bytes`] that stands in host memory: the control queue pairs'.
    pub fn host_bytes(&self) -> u64 {
        PeerQueues::host_region_bytes(&self.plan)
    }

    /// What launches carry, and where kernels find queue pairs and peers, in bytes that no recovery may change: the
    /// arguments of every lane, the arrays of every handle and ticket, the address of every context.
    pub fn frozen_bytes(&self) -> Vec<u8> {
        let mut frozen = Vec::new();
        for runtime in &self.lanes {
            let buffers = runtime.buffers.read();
            frozen.extend_from_slice(runtime.args(&buffers).as_bytes());
            for index in 0..self.plan.handles as usize {
                frozen.extend_from_slice(buffers.handle(index).as_bytes());
                let (ticket, verdicts) = buffers.ticket(index);
                frozen.extend_from_slice([ticket, verdicts].as_bytes());
            }
            for peer in self.ranks() {
                frozen.extend_from_slice(buffers.peer_ctx_addr(peer).as_bytes());
                for channel in 0..self.plan.shape.num_channels {
                    frozen.extend_from_slice(buffers.qp_ctx_addr(peer, channel).as_bytes());
                }
            }
        }
        frozen
    }

    /// Where queues and payload lie, and how the device reaches them.
    pub fn places(&self) -> Places {
        let payload = self.lanes[0].buffers.read().place().clone();
        Places { queues: self.queues.lock().place.clone(), payload }
    }

    /// Bytes of one full set of caller tensors.
    pub fn tensor_bytes(&self) -> u64 {
        self.plan.tensors().total()
    }

    /// A number that tells this launch from any other that may run at the same time.
    fn nonce(&self) -> u32 {
        loop {
            let nonce = self.nonce.fetch_add(1, Ordering::Relaxed);
            if nonce != 0 {
                return nonce;
            }
        }
    }

    /// The order that launches on `stream` follow: the capture's own while it is captured.
    fn order<'a>(
        &'a self,
        runtime: &'a LaneRuntime,
        stream: &Stream,
    ) -> Result<MappedMutexGuard<'a, LaneOrder>, Error> {
        if self.gpu.is_capturing(stream)? {
            let capture = self.capture.lock();
            if capture.is_some() {
                let ring = self.config.ring;
                return Ok(MutexGuard::map(capture, |c| {
                    let lanes = &mut c.as_mut().expect("checked above").lanes;
                    lanes.entry(runtime.lane.0).or_insert_with(|| LaneOrder::new(ring))
                }));
            }
        }
        Ok(MutexGuard::map(runtime.order.lock(), |order| order))
    }

    /// Starts capturing `stream`: calls on it are recorded until [`Session::end_capture`].
    ///
    /// # Errors
    /// `Exhausted` while any lane owes a receive half, or a capture is running; `Gpu` if the GPU refuses.
    pub fn begin_capture(&self, stream: &Stream) -> Result<(), Error> {
        let mut capture = self.capture.lock();
        if capture.is_some() {
            return Err(Error::Exhausted(Exhausted {
                resource: Resource::Captures,
                limit: 1,
                in_use: 1,
                requested: 1,
            }));
        }
        self.check_nothing_owed()?;
        self.gpu.begin_capture(stream)?;
        *capture = Some(Capture { stream: stream.clone(), lanes: HashMap::new() });
        Ok(())
    }

    /// Ends the capture and returns a graph that may be replayed any number of times.
    ///
    /// # Errors
    /// `Exhausted` if a captured send half has no captured receive half: replays would run out of ring slots.
    pub fn end_capture(&self) -> Result<SessionGraph, Error> {
        let Some(capture) = self.capture.lock().take() else {
            return Err(Error::Exhausted(Exhausted {
                resource: Resource::Captures,
                limit: 1,
                in_use: 0,
                requested: 1,
            }));
        };
        let graph = self.gpu.end_capture(&capture.stream)?;
        let mut steps = vec![[0; 2]; self.lanes.len()];
        for (lane, order) in &capture.lanes {
            for op in [DISPATCH, COMBINE] {
                owed(order, op)?;
                steps[*lane as usize][op] = order.ring(op).sent();
            }
        }
        Ok(SessionGraph { graph, session: self.id, steps })
    }

    /// Replays a captured graph on `stream`: a step by itself, unless a handle is open.
    ///
    /// # Errors
    /// `Stale` for a graph of another session; `Exhausted` while a lane owes a receive half outside the graph; `Gated`
    /// while the step that this would begin waits for a switch.
    pub fn replay(&self, graph: &SessionGraph, stream: &Stream) -> Result<(), Error> {
        if graph.session != self.id {
            return Err(Error::Stale(crate::error::Stale {
                what: "graph",
                found: graph.session,
                current: self.id,
            }));
        }
        self.check_nothing_owed()?;
        let step = self.steps.enter()?;
        if let Err(error) = self.gpu.replay(&graph.graph, stream) {
            step.cancel();
            return Err(error.into());
        }
        for (runtime, steps) in self.lanes.iter().zip(&graph.steps) {
            let mut order = runtime.order.lock();
            for op in [DISPATCH, COMBINE] {
                order.ring_mut(op).replayed(steps[op]);
            }
            order.after_replay(&*self.gpu, stream)?;
        }
        Ok(())
    }

    fn check_nothing_owed(&self) -> Result<(), Error> {
        for runtime in &self.lanes {
            let order = runtime.order.lock();
            owed(&order, DISPATCH)?;
            owed(&order, COMBINE)?;
        }
        Ok(())
    }

    /// Tells every peer that this host lives and how far its kernels are. Call every `detect_ms / 4`.
    ///
    /// # Errors
    /// `Gpu` if the progress words cannot be read. A peer whose control queue is full or in error is skipped.
    pub fn send_sign_of_life(&self) -> Result<(), Error> {
        if self.lanes.iter().any(|runtime| !runtime.is_guarded(Guard::Membership)) {
            return Ok(());
        }
        self.hear_device()?;
        let beat = self.beat.fetch_add(1, Ordering::Relaxed);
        self.post_life(beat)
    }
}

/// Refuses if an operation of a lane owes receive halves.
fn owed(order: &LaneOrder, op: usize) -> Result<(), Error> {
    let in_use = order.ring(op).owed();
    if in_use == 0 {
        return Ok(());
    }
    Err(Error::Exhausted(Exhausted { resource: Resource::RingSlots, limit: 0, in_use, requested: 0 }))
}

/// Signals that are added need a device whose atomics are in the byte order of those who read the words.
fn check_atomics(signal: SignalMode, has_atomics: bool) -> Result<(), ConfigError> {
    const INSTEAD: &[&str] = &["write, as this device has no 8-byte atomics in the host's byte order"];
    if signal == SignalMode::Write || has_atomics {
        return Ok(());
    }
    Err(ConfigError { field: "signal", value: "fetch-add".into(), limit: Limit::OneOf(INSTEAD) })
}

/// The whole grid must be co-resident: owners wait for casters, receivers for other blocks.
fn check_grid(config: &ValidConfig, gpu: &dyn Gpu) -> Result<(), Error> {
    let limit = gpu.max_coresident_blocks(config.warps_per_block);
    if config.num_sms <= limit {
        return Ok(());
    }
    Err(Error::Exhausted(Exhausted {
        resource: Resource::CoresidentBlocks,
        limit: limit.into(),
        in_use: 0,
        requested: config.num_sms.into(),
    }))
}

/// Bytes that a rank would allocate and register under `config`, before anything is allocated.
#[must_use]
pub fn buffer_bytes(config: &ValidConfig, rank: Rank) -> u64 {
    let plan = Plan::new(config, rank);
    u64::from(config.lanes) * LaneBuffers::bytes_for(&plan) + PeerQueues::control_bytes_for(&plan)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_that_are_added_need_atomics_that_readers_understand() {
        assert!(check_atomics(SignalMode::Write, false).is_ok());
        assert!(check_atomics(SignalMode::FetchAdd, true).is_ok());
        let refused = check_atomics(SignalMode::FetchAdd, false).unwrap_err().to_string();
        assert!(refused.starts_with("signal = fetch-add is refused: it must be one of write"), "{refused}");
    }
}
