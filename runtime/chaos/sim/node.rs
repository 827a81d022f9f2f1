//! One incarnation of a rank: a device, a GPU, a session and its keeper, and what it computes.
//!
//! A [`Node`] owns all of it. It ends as a process does: its kernels stop where they stand, its port goes silent, and
//! everything it had is given back without a word to anybody ([`Node::end`]).

use std::collections::BTreeMap;
use std::sync::Arc;

use ibex_abi::prm::Op;
use ibex_hca::emulated::{CommandRecord, EmulatedConfig, EmulatedHca, Fabric};
use ibex_hca::fault::FaultHca;
use ibex_hca::{Hca, LinkLayer};

use super::Unguarded;
use super::store::SimStore;
use crate::chaos::app::{App, Sets, Style};
use crate::chaos::draws::Draws;
use crate::config::{RoutePolicy, ValidConfig};
use crate::error::Error;
use crate::gpu::pool::Pool;
use crate::gpu::{Gpu, HostGpu};
use crate::ids::Rank;
use crate::membership::{Instance, Membership, MembershipConfig, RankSet};
use crate::recovery::{SimulatedHosts, SimulatedProcess};
use crate::session::{Keeper, KeeperOptions, Session};

/// What nodes of one group have in common.
pub(super) struct Ground {
    pub(super) config: ValidConfig,
    pub(super) pool: Arc<Pool>,
    pub(super) fabric: Arc<Fabric>,
    pub(super) store: SimStore,
    /// Where processes live.
    pub(super) hosts: Arc<SimulatedHosts>,
    /// How many of them ranks live on in turn.
    pub(super) num_hosts: u32,
    /// What is taken away.
    pub(super) unguarded: Unguarded,
    /// Who forms the group.
    pub(super) initial: RankSet,
    /// What every step consists of.
    pub(super) sets: Sets,
    /// How everybody launches its steps; drawn if absent.
    pub(super) style: Option<Style>,
}

/// How a node is made to stand still.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Motion {
    Runs,
    /// Its process is stopped.
    Frozen,
    /// Its kernels get little time; it moves again at this instant, for a few turns.
    Slow {
        again_ns: u64,
        turns: u32,
    },
}

/// See the module documentation.
pub(super) struct Node {
    // What it computes goes first, then what that stands on.
    pub(super) app: App,
    pub(super) keeper: Keeper,
    pub(super) session: Arc<Session>,
    pub(super) gpu: Arc<HostGpu>,
    pub(super) hca: Arc<FaultHca<EmulatedHca>>,
    pub(super) device: Arc<EmulatedHca>,
    /// What its neighbours see of it.
    process: SimulatedProcess,
    pub(super) rank: Rank,
    pub(super) instance: Instance,
    pub(super) board: u64,
    /// Its number in the pool, and among the agents.
    pub(super) id: u32,
    pub(super) started_ns: u64,
    pub(super) ready_ns: u64,
    pub(super) motion: Motion,
    /// It was stopped for so long that it will be evicted.
    pub(super) is_zombie: bool,
    /// It has switched once: a later closed gate is a survivor's.
    pub(super) has_served: bool,
    pub(super) next_keeper_ns: u64,
    /// Whom it has given up: which process of which peer.
    pub(super) suspected: BTreeMap<Rank, Instance>,
    /// Version of the view when its commands were looked at last.
    seen_version: u64,
    /// Queue pairs that kernels drive, by number: to which incarnation of whom.
    peers: BTreeMap<u32, (Rank, Instance)>,
}

/// What a node holds that must not grow.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Holdings {
    control_bytes: u64,
    gpu_bytes: u64,
    objects: BTreeMap<&'static str, usize>,
}

impl Holdings {
    /// Bytes and objects beyond `before`.
    pub(super) fn beyond(&self, before: &Self) -> u64 {
        let bytes = self.control_bytes.saturating_sub(before.control_bytes)
            + self.gpu_bytes.saturating_sub(before.gpu_bytes);
        let objects = self
            .objects
            .iter()
            .map(|(kind, count)| count.saturating_sub(before.objects.get(kind).copied().unwrap_or(0)) as u64);
        bytes + objects.sum::<u64>()
    }
}

impl Node {
    /// Starts a process for `rank`; none if its name cannot be claimed now.
    pub(super) fn start(
        ground: &Ground,
        rank: Rank,
        id: u32,
        takes_over: bool,
        mut draws: Draws,
    ) -> Result<Option<Self>, Error> {
        let now_ns = ground.pool.now_ns();
        let instance = Instance(u128::from(draws.bits()) << 64 | u128::from(draws.bits()) | 1);
        let Some((board, claim)) = ground.store.board(rank, instance, takes_over) else { return Ok(None) };
        let config = EmulatedConfig { link: LinkLayer::Roce, ..EmulatedConfig::default() };
        let device = EmulatedHca::new(Arc::clone(&ground.fabric), config)?;
        let hca = FaultHca::new(Arc::clone(&device));
        let process = ground.hosts.start(u64::from(rank.0) % u64::from(ground.num_hosts.max(1)));
        let make_gpu = match ground.config.route {
            RoutePolicy::Auto => HostGpu::shared,
            RoutePolicy::Ibgda => HostGpu::new,
        };
        let gpu = Arc::new(make_gpu(Arc::clone(&ground.pool), id));
        let (dyn_gpu, dyn_hca): (Arc<dyn Gpu>, Arc<dyn Hca>) = (Arc::clone(&gpu) as _, Arc::clone(&hca) as _);
        let session = Session::new(&ground.config, rank, dyn_gpu, dyn_hca)?.in_process(&process);
        let session = Arc::new(session);
        if let Some(guard) = ground.unguarded.guard {
            session.switch_guard_off(guard);
        }
        let app = App::new(&session, Draws::new(draws.bits(), 4), ground.style, ground.sets)?;
        let membership_config = MembershipConfig::new(&ground.config, ground.initial);
        let mut membership = Membership::new(membership_config, claim, now_ns);
        if let Some(guard) = ground.unguarded.membership {
            membership.turn_off(guard);
        }
        let board_id = board.id();
        let options = KeeperOptions::default();
        let keeper = Keeper::new(Arc::clone(&session), membership, Box::new(board), options)?;
        Ok(Some(Self {
            app,
            keeper,
            session,
            gpu,
            hca,
            device,
            process,
            rank,
            instance,
            board: board_id,
            id,
            started_ns: now_ns,
            ready_ns: now_ns + draws.below(3_000_000),
            motion: Motion::Runs,
            is_zombie: false,
            has_served: false,
            next_keeper_ns: 0,
            suspected: BTreeMap::new(),
            seen_version: 0,
            peers: BTreeMap::new(),
        }))
    }

    /// The commands executed since the last call; none if there are none and `view_version` is as it was then.
    pub(super) fn commands(&mut self, view_version: u64) -> Option<Vec<CommandRecord>> {
        let records = self.device.take_trace();
        let is_same = core::mem::replace(&mut self.seen_version, view_version) == view_version;
        (!records.is_empty() || !is_same).then_some(records)
    }

    /// Takes in commands that were executed, and gives them to `each` with the peer they concern.
    pub(super) fn take_in(
        &mut self,
        records: &[CommandRecord],
        mut each: impl FnMut(&CommandRecord, Option<(Rank, Instance)>),
    ) {
        for record in records {
            each(record, record.qpn.and_then(|qpn| self.peers.get(&qpn.get()).copied()));
            if record.op == Some(Op::DestroyQp)
                && let Some(qpn) = record.qpn
            {
                self.peers.remove(&qpn.get());
            }
        }
    }

    /// Learns which queue pairs lead to a peer that is a member.
    pub(super) fn learn_peer(&mut self, peer: Rank, instance: Instance) {
        for qpn in self.session.queue_pairs(peer) {
            self.peers.entry(qpn.get()).or_insert((peer, instance));
        }
    }

    /// What it holds now.
    pub(super) fn holdings(&self) -> Holdings {
        Holdings {
            control_bytes: self.session.control_report().live_bytes,
            gpu_bytes: self.gpu.allocated_bytes(),
            objects: self.device.object_counts().by_kind().into_iter().collect(),
        }
    }

    /// Ends it as kill -9 does; the bytes and objects that stay behind.
    pub(super) fn end(self) -> Result<u64, Error> {
        self.device.fabric().kill(self.device.port_id());
        self.gpu.kill()?;
        self.hca.clear();
        let Self { app, keeper, session, gpu, hca, device, process, .. } = self;
        drop(process);
        let (session_left, gpu_left) = (Arc::downgrade(&session), Arc::downgrade(&gpu));
        drop((app, keeper));
        drop(session);
        drop(gpu);
        drop(hca);
        let left: usize = device.object_counts().by_kind().into_iter().map(|(_, count)| count).sum();
        Ok((left + session_left.strong_count() + gpu_left.strong_count()) as u64)
    }
}
