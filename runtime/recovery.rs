//! Recreating the queue pairs to a peer in place: masked, fenced, offered, connected, activated.
//!
//! Connecting for the first time and recreating are one path: recreate from empty. A slot keeps its index, the
//! address of its `QpDeviceCtx` and its doorbell register for the life of the session; ring, record and CQ are data in
//! the context, the same at equal depth and carved anew otherwise. `queues` owns them.
//!
//! ```text
//! mask      state Fenced, peer suspected                                        no half posts or waits
//! fence     mask -> 2ERR -> grace period -> 2RST -> destroy -> keys renewed -> zero words -> blocks free
//! offer     alloc blocks -> CREATE_CQ -> CREATE_QP -> RST2INIT                  slot masked
//! connect   INIT2RTR -> RTR2RTS -> write contexts                               slot masked
//! activate  state Active (release), suspicion cleared                           slot usable
//! ```
//!
//! Both ends connect before either activates: a kernel never posts to a queue pair whose other end cannot answer.
//!
//! Invariants:
//! - Only the slots of the one peer are touched; whatever command fails, they stay masked, the others run, the heap
//!   is as before, and a retry works.
//! - Blocks are given back only after 2RST completed: until then the device may still touch them.

use core::sync::atomic::{Ordering, fence};

use ibex_abi::device_ctx::{
    DeviceFault, LaneHostWords, LaneState, LifeWords, PeerCtx, QpDeviceCtx, SEQ_END, code,
};
use ibex_abi::types::QpNum;
use zerocopy::FromBytes;

use crate::buffer::{LaneBuffers, bytes};
use crate::error::{ConfigError, Error, Limit, Stale, Violation};
use crate::ids::{Lane, Rank};
use crate::layout::qp_slot;
use crate::session::{COMBINE, Session};

mod control;
mod events;
mod fencing;
mod identity;
mod neighbours;
mod offer;
mod quarantine;
mod queues;
mod route;
mod watch;

pub(crate) use events::DeviceLog;
pub use events::{DEVICE_EVENTS_MAX, DeviceEvent, DeviceEventCounts};
pub(crate) use fencing::Fences;
pub use identity::HostId;
pub(crate) use identity::draw_instance;
pub(crate) use neighbours::Neighbours;
#[doc(hidden)]
pub use neighbours::{SimulatedHosts, SimulatedProcess};
pub use offer::{LaneOffer, Mappings, Offer, OfferError, QueueOffer};
pub(crate) use quarantine::Quarantine;
pub(crate) use queues::PeerQueues;
pub use queues::reaches_doorbells;
pub(crate) use route::Reach;
pub use route::{Route, RouteReason, RouteReport};

use control::ControlQueue;
use queues::Queue;
use route::Way;

impl Session {
    /// Creates this side's queue pairs to `peer`, in INIT, and says how to connect to them.
    ///
    /// `sq_depth_log` of `None` means the configured depth. The peer's slots must be empty: new, or fenced.
    ///
    /// # Errors
    /// `Config` for a depth outside its limits; `Stale` if the slots are not empty; what the HCA refused, or exhausted
    /// control memory. No slot is changed then.
    pub fn offer(&self, peer: Rank, sq_depth_log: Option<u8>) -> Result<Offer, Error> {
        let mut queues = self.queues.lock();
        let sq_log = queues.checked_depth(sq_depth_log)?;
        queues.sweep();
        let live = queues.num_live(peer) as u64;
        if live != 0 {
            return Err(Error::Stale(Stale {
                what: "queue pairs of a peer to be fenced",
                found: live,
                current: 0,
            }));
        }
        let mut made = Vec::new();
        let control = match self.create_queues(&mut queues, peer, sq_log, &mut made) {
            Ok(control) => control,
            Err(error) => {
                made.into_iter().for_each(|(_, queue)| queues.discard(queue));
                return Err(error);
            }
        };
        let control_offer = control.offer().ok_or(not_offered(peer))?;
        let mut offers: Vec<QueueOffer> = made.iter().filter_map(|(_, queue)| queue.offer()).collect();
        queues.controls[peer.index()] = control;
        for (index, queue) in made {
            queues.slots[index].queue = Some(queue);
            queues.slots[index].incarnation += 1;
        }
        drop(queues);
        let mut lanes = Vec::new();
        for runtime in &self.lanes {
            let rest = offers.split_off(self.plan.shape.num_channels as usize);
            lanes.push(self.lane_offer(
                &runtime.buffers.read(),
                peer,
                core::mem::replace(&mut offers, rest),
            )?);
        }
        let home = self.neighbours.home();
        Ok(Offer {
            from: self.rank,
            to: peer,
            process: home.process,
            pid: home.pid,
            host: home.host,
            port: self.hca.port(),
            lanes,
            control: control_offer,
        })
    }

    fn create_queues(
        &self,
        queues: &mut PeerQueues,
        peer: Rank,
        sq_log: u8,
        made: &mut Vec<(usize, Queue)>,
    ) -> Result<ControlQueue, Error> {
        for index in queues.slots_of(peer) {
            made.push((index, queues.create(&*self.gpu, index, sq_log)?));
        }
        let psn = queues.next_psn();
        ControlQueue::offered(&queues.host_region, queues.pd.get(), peer, psn)
    }

    fn lane_offer(
        &self,
        buffers: &LaneBuffers,
        peer: Rank,
        queues: Vec<QueueOffer>,
    ) -> Result<LaneOffer, Error> {
        let keys = buffers.peer_keys(peer).ok_or(Violation {
            from: peer,
            check: "memory keys",
            found: 0,
            expected: 1,
        })?;
        Ok(LaneOffer {
            region_va: keys.region.key().iova.get(),
            region_rkey: keys.region.key().rkey.get(),
            combine_va: keys.combine.key().iova.get(),
            combine_rkey: keys.combine.key().rkey.get(),
            queues,
            mappings: self.mappings(buffers, peer),
        })
    }

    /// How a process of this host may map what `peer` may write; none where this GPU does not share its memory.
    fn mappings(&self, buffers: &LaneBuffers, peer: Rank) -> Option<Mappings> {
        let export = |(addr, len): (u64, u64)| self.gpu.export(addr, bytes(len)).ok();
        Some(Mappings { region: export(buffers.region(peer))?, combine: export(buffers.combine_slab())? })
    }

    /// Connects this side's queue pairs to what `offer` says; [`Session::activate`] then lets kernels use them.
    ///
    /// `base_seq` is, per lane and operation, the first sequence number of the new pair: older ones need no credit.
    ///
    /// # Errors
    /// `Protocol` for an offer that is not meant for this rank or has another shape; what the HCA refused. The slots
    /// stay masked, and [`Session::fence`] makes them empty again.
    pub fn connect(&self, offer: &Offer, base_seq: &[[u64; 2]]) -> Result<(), Error> {
        self.check_offer(offer, base_seq)?;
        let peer = offer.from;
        let mut queues = self.queues.lock();
        let timers = self.config.rc_timers();
        for (runtime, lane) in self.lanes.iter().zip(&offer.lanes) {
            for (channel, remote) in (0..).zip(&lane.queues) {
                let index = qp_slot(&self.plan.shape, runtime.lane(), peer, channel) as usize;
                queues.connect_slot(index, remote, &offer.port, timers)?.ok_or(not_offered(peer))?;
            }
        }
        queues.controls[peer.index()].connect(offer, self.plan.layout.life_off, timers)?;
        let reach = Reach::choose(&*self.gpu, self.config.route, offer, &self.neighbours);
        let ways: Vec<Way> = (0..).zip(&offer.lanes).map(|(lane, offer)| reach.way(lane, offer)).collect();
        // Kept before any context names it.
        self.reaches.lock()[peer.index()] = reach;
        for (((runtime, lane), base_seq), way) in self.lanes.iter().zip(&offer.lanes).zip(base_seq).zip(ways)
        {
            let buffers = runtime.buffers.read();
            self.write_peer_ctx(&buffers, peer, way, lane, *base_seq)?;
            for channel in 0..self.plan.shape.num_channels {
                let index = qp_slot(&self.plan.shape, runtime.lane(), peer, channel) as usize;
                let ctx = queues.device_ctx(index, peer, channel).ok_or(not_offered(peer))?;
                LaneBuffers::write(&*self.gpu, buffers.qp_ctx_addr(peer, channel), &ctx)?;
            }
        }
        Ok(())
    }

    /// How kernels reach a peer, and why that way.
    #[must_use]
    pub fn route(&self, peer: Rank) -> RouteReport {
        self.reaches.lock()[peer.index()].report().clone()
    }

    /// Lets kernels use the slots of a peer that is connected at both ends.
    ///
    /// # Errors
    /// `Protocol` if the slots are not connected; `Gpu` if the state cannot be written.
    pub fn activate(&self, peer: Rank) -> Result<(), Error> {
        // Before any slot can be used: whoever masks meanwhile takes it out again.
        let mut active = self.active.lock();
        if !self.queues.lock().controls[peer.index()].is_live() {
            return Err(not_offered(peer));
        }
        self.reaches.lock()[peer.index()].note_use();
        self.note_reach(peer)?;
        for runtime in &self.lanes {
            let buffers = runtime.buffers.read();
            self.gpu.store_u32(buffers.suspect_addr(peer), 0)?;
            for channel in 0..self.plan.shape.num_channels {
                // ORDER(16): every field of the contexts -> state Active. Release at sys.
                self.gpu.store_u32(buffers.qp_ctx_addr(peer, channel) + STATE_OFF, code::QP_ACTIVE)?;
            }
        }
        self.device_log.lock().acquit(peer);
        active.insert(peer);
        Ok(())
    }

    /// May kernels use the slots of this peer, as far as the host is concerned?
    #[must_use]
    pub fn is_active(&self, peer: Rank) -> bool {
        self.active.lock().contains(peer)
    }

    /// Lets kernels reach this rank itself by local copies; no queue pair is involved.
    pub(crate) fn connect_self(&self, base_seq: &[[u64; 2]]) -> Result<(), Error> {
        for (runtime, base_seq) in self.lanes.iter().zip(base_seq) {
            let buffers = runtime.buffers.read();
            let lane = self.lane_offer(&buffers, self.rank, Vec::new())?;
            let way = Reach::itself().way(runtime.lane().index(), &lane);
            self.write_peer_ctx(&buffers, self.rank, way, &lane, *base_seq)?;
        }
        self.reaches.lock()[self.rank.index()] = Reach::itself();
        Ok(())
    }

    fn check_offer(&self, offer: &Offer, base_seq: &[[u64; 2]]) -> Result<(), Error> {
        let expect = |check, found: u64, expected: u64| {
            if found == expected {
                return Ok(());
            }
            Err(Error::Protocol(Violation { from: offer.from, check, found, expected }))
        };
        expect("offer.to", offer.to.0.into(), self.rank.0.into())?;
        expect("offer.lanes", offer.lanes.len() as u64, self.lanes.len() as u64)?;
        expect("base_seq lanes", base_seq.len() as u64, self.lanes.len() as u64)?;
        for lane in &offer.lanes {
            expect("offer.channels", lane.queues.len() as u64, self.plan.shape.num_channels.into())?;
        }
        Ok(())
    }

    fn write_peer_ctx(
        &self,
        buffers: &LaneBuffers,
        peer: Rank,
        way: Way,
        lane: &LaneOffer,
        base_seq: [u64; 2],
    ) -> Result<(), Error> {
        let ctx = PeerCtx {
            region_va: lane.region_va,
            combine_va: lane.combine_va,
            region_ptr: way.region_ptr,
            combine_ptr: way.combine_ptr,
            region_rkey_be: lane.region_rkey.to_be(),
            combine_rkey_be: lane.combine_rkey.to_be(),
            route: way.code,
            my_region: buffers.region_addr(peer),
            base_seq,
            ..PeerCtx::default()
        };
        LaneBuffers::write(&*self.gpu, buffers.peer_ctx_addr(peer), &ctx)
    }

    /// Takes `peer`'s slots out of use: from here on no half that enters posts to the peer or waits for it.
    ///
    /// # Errors
    /// `Gpu` if the state cannot be written; no command is involved.
    pub fn mask(&self, peer: Rank) -> Result<(), Error> {
        self.active.lock().remove(peer);
        for runtime in &self.lanes {
            let buffers = runtime.buffers.read();
            self.gpu.store_u32(buffers.suspect_addr(peer), 1)?;
            for channel in 0..self.plan.shape.num_channels {
                self.gpu.store_u32(buffers.qp_ctx_addr(peer, channel) + STATE_OFF, code::QP_FENCED)?;
            }
        }
        // ORDER(9): mark -> read entered, the other side of the kernels' Dekker pair.
        fence(Ordering::SeqCst);
        Ok(())
    }

    /// Posts this host's sign of life and progress to every connected peer. It stands in its own region too, because
    /// kernels look at every source alike.
    pub(crate) fn post_life(&self, beat: u64) -> Result<(), Error> {
        let mut lanes = Vec::with_capacity(self.lanes.len());
        for runtime in &self.lanes {
            let buffers = runtime.buffers.read();
            let life = self.life_words(&buffers, beat)?;
            let addr = buffers.region_addr(self.rank) + self.plan.layout.life_off;
            LaneBuffers::write(&*self.gpu, addr, &life)?;
            lanes.push(life);
        }
        for control in &mut self.queues.lock().controls {
            control.send_life(&lanes);
        }
        Ok(())
    }

    /// Numbers of the queue pairs that kernels drive to `peer`.
    pub fn queue_pairs(&self, peer: Rank) -> Vec<QpNum> {
        self.queues.lock().qpns_of(peer)
    }

    /// What control memory holds: live bytes, high-water mark, free extents.
    pub fn control_report(&self) -> ibex_memheap::StorageReport {
        self.queues.lock().control_report()
    }

    /// What this host publishes about one lane.
    fn life_words(&self, buffers: &LaneBuffers, beat: u64) -> Result<LifeWords, Error> {
        let word = |offset: usize| self.gpu.load_u64(buffers.host_words_addr() + offset as u64);
        let sent = core::mem::offset_of!(LaneHostWords, sent);
        let credited = core::mem::offset_of!(LaneHostWords, credited);
        Ok(LifeWords {
            beat,
            sent: [word(sent)?, word(sent + 8)?],
            credited: [word(credited)?, word(credited + 8)?],
            suspects: self.suspicion_row(buffers)?,
            ..LifeWords::default()
        })
    }

    /// Zeroes what the pair has exchanged: signal, credit and life words, and our own side of them. After 2RST,
    /// before RTR: nobody writes these words in between.
    fn zero_words(&self, buffers: &LaneBuffers, peer: Rank) -> Result<(), Error> {
        let l = &self.plan.layout;
        let region = buffers.region_addr(peer);
        self.gpu.fill(region + l.counts_off, 0, bytes(l.region_bytes - l.counts_off))?;
        debug_assert!(
            l.counts_off <= l.signals_off && l.life_off + size_of::<LifeWords>() as u64 <= l.region_bytes
        );
        for channel in 0..self.plan.shape.num_channels {
            let empty = QpDeviceCtx { state: code::QP_MASKED, ..QpDeviceCtx::default() };
            LaneBuffers::write(&*self.gpu, buffers.qp_ctx_addr(peer, channel), &empty)?;
        }
        // A mapped peer is reached without a queue pair; without a mapping, the masked queue pair is in the way.
        let unreachable = PeerCtx { route: code::ROUTE_IBGDA, my_region: region, ..PeerCtx::default() };
        LaneBuffers::write(&*self.gpu, buffers.peer_ctx_addr(peer), &unreachable)?;
        let (rows, len) = buffers.row_staging_pi(peer);
        self.gpu.fill(rows, 0, bytes(len))?;
        self.gpu.fill(buffers.fault_addr(peer), 0, size_of::<DeviceFault>())?;
        Ok(())
    }

    /// The next sequence number of each operation on a lane.
    ///
    /// # Errors
    /// `Config` for a lane that does not exist.
    pub fn next_seq(&self, lane: Lane) -> Result<[u64; 2], Error> {
        let runtime = self.lane(lane)?;
        let mut state = [0; size_of::<LaneState>()];
        self.gpu.read(runtime.buffers.read().state_addr(), &mut state)?;
        let state = LaneState::read_from_bytes(&state).expect("the buffer has the structure's size");
        Ok(state.next)
    }

    /// [`Session::next_seq`] of every lane.
    ///
    /// # Errors
    /// `Gpu` if the state cannot be read.
    pub fn next_seqs(&self) -> Result<Vec<[u64; 2]>, Error> {
        self.lanes.iter().map(|runtime| self.next_seq(runtime.lane())).collect()
    }

    /// Refuses a depth that [`Session::offer`] would refuse.
    ///
    /// # Errors
    /// `Config` with the limits.
    pub fn check_depth(&self, sq_depth_log: Option<u8>) -> Result<(), Error> {
        self.queues.lock().checked_depth(sq_depth_log).map(|_| ())
    }

    /// Lets a session that runs nothing start at the sequence numbers of its group, per lane and operation.
    ///
    /// Credits count as given up to there. The session's own slots follow; those of its peers follow by
    /// [`Session::connect`].
    ///
    /// # Errors
    /// `Config` for a number of lanes that is not the session's or a sequence number of 0; `Gpu` if the state cannot
    /// be written.
    pub fn start_at(&self, next: &[[u64; 2]]) -> Result<(), Error> {
        self.check_start(next)?;
        for (runtime, next) in self.lanes.iter().zip(next) {
            runtime.start_at(*next);
            let mut state = LaneState { next: *next, credited: next.map(|n| n - 1), ..LaneState::default() };
            // Who combines with this rank waits for its word on every step before: it is done with all of them.
            for seq in next[COMBINE].saturating_sub(self.config.ring.into()).max(1)..next[COMBINE] {
                // CAST: below the ring, of at most RING_MAX slots.
                state.pending[COMBINE][(seq % u64::from(self.config.ring)) as usize] = seq;
            }
            LaneBuffers::write(&*self.gpu, runtime.buffers.read().state_addr(), &state)?;
        }
        self.connect_self(next)
    }

    pub(crate) fn check_start(&self, next: &[[u64; 2]]) -> Result<(), Error> {
        let refuse =
            |field, value: u64, limit| Err(Error::Config(ConfigError { field, value: value.into(), limit }));
        let lanes = self.lanes.len() as u64;
        if next.len() as u64 != lanes {
            return refuse(
                "lanes to start",
                next.len() as u64,
                Limit::Exactly { field: "lanes", value: lanes },
            );
        }
        if let Some(seq) = next.iter().flatten().find(|seq| !(1..SEQ_END).contains(*seq)) {
            return refuse("first sequence number", *seq, Limit::Range { min: 1, max: SEQ_END - 1 });
        }
        Ok(())
    }
}

/// Offset of `PeerCtx::base_seq`.
pub(crate) const BASE_SEQ_OFF: u64 = core::mem::offset_of!(PeerCtx, base_seq) as u64;
/// Offset of `QpDeviceCtx::state`.
const STATE_OFF: u64 = core::mem::offset_of!(QpDeviceCtx, state) as u64;
fn not_offered(peer: Rank) -> Error {
    Error::Protocol(Violation { from: peer, check: "queue pairs offered first", found: 0, expected: 1 })
}
