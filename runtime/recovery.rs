//! The queue pairs to each peer: created, connected, fenced and recreated in place.
//!
//! Connecting for the first time and recreating are one path: recreate from empty. A slot keeps its index, the
//! address of its `QpDeviceCtx` and its doorbell register for the life of the session; ring, record and CQ are data in
//! the context, the same at equal depth and carved anew otherwise.
//!
//! ```text
//! offer    alloc blocks -> CREATE_CQ -> CREATE_QP -> RST2INIT                  slot masked
//! connect  INIT2RTR -> RTR2RTS -> write contexts -> state Active (release)     slot usable
//! fence    state Fenced -> 2ERR -> grace period -> 2RST -> destroy -> zero words -> free blocks
//! ```
//!
//! Invariants:
//! - Only the slots of the one peer are touched; whatever command fails, they stay masked, the others run, the heap
//!   is as before, and a retry works.
//! - Blocks are given back only after 2RST completed: until then the device may still touch them.

use std::sync::Arc;

use core::sync::atomic::{Ordering, fence};
use core::time::Duration;

use ibex_abi::device_ctx::{
    DeviceFault, LaneHostWords, LaneState, LifeWords, PeerCtx, QpDeviceCtx, code,
};
use ibex_abi::types::{CqNum, Eqn, Pd, Psn, QpNum};
use ibex_hca::objects::{self, CqSpec, InitSpec, Place, QpSpec, RtrSpec, RtsSpec};
use ibex_hca::control_region::{Carved, ControlRegion};
use ibex_hca::{Access, DoorbellPage, Hca, MemoryKind, MemoryRegion, PortInfo};
use zerocopy::FromBytes;

use crate::buffer::{LaneBuffers, bytes};
use crate::config::{RcTimers, RoutePolicy, ValidConfig};
use crate::error::{Error, Violation};
use crate::gpu::{DeviceMemory, Gpu};
use crate::ids::{Lane, Rank};
use crate::layout::{LINE, PAGE, Plan, qp_slot};
use crate::session::Session;
use crate::time::{Deadline, sleep};

mod control;

use control::{CONTROL_SQ_LOG, ControlQueue};

/// Bytes of a WQE basic block.
const WQEBB: u64 = 64;
/// Control memory is sized for every slot at this many times its depth, so that a deeper queue can be carved while
/// the old ones of other slots live.
const CONTROL_HEADROOM: u64 = 3;
/// Timer code of a receiver-not-ready answer; nothing of ours can be not ready.
const MIN_RNR_NAK: u8 = 12;
/// How often a grace period looks again.
const GRACE_POLL: Duration = Duration::from_micros(50);

/// One queue pair of an [`Offer`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueOffer {
    /// Its number.
    pub qpn: QpNum,
    /// The first sequence number it will send.
    pub psn: Psn,
}

/// One lane of an [`Offer`]: where the peer may write, and with which keys.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LaneOffer {
    /// The peer's region here.
    pub region_va: u64,
    /// Key to it.
    pub region_rkey: u32,
    /// The combine slab here.
    pub combine_va: u64,
    /// Key to it.
    pub combine_rkey: u32,
    /// One per channel.
    pub queues: Vec<QueueOffer>,
}

/// What a peer must know to connect to this rank; plain data, made by [`Session::offer`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Offer {
    /// Who offers.
    pub from: Rank,
    /// To whom.
    pub to: Rank,
    /// The process that offers; peers of one process may map each other's memory.
    pub process: u64,
    /// The port.
    pub port: PortInfo,
    /// Per lane.
    pub lanes: Vec<LaneOffer>,
    /// The control queue pair, which carries the sign of life.
    pub control: QueueOffer,
}

/// A live queue pair and its blocks. Blocks are freed when this is dropped, which happens only in RST or before any
/// QP exists.
struct Queue {
    qpn: QpNum,
    cqn: CqNum,
    psn: Psn,
    sq_log: u8,
    ring: Carved,
    cqe: Carved,
    record: Carved,
    reset: bool,
}

/// The place a queue pair lives.
struct Slot {
    doorbell: DoorbellPage,
    incarnation: u32,
    queue: Option<Queue>,
}

/// All queue pairs of one session.
pub(crate) struct PeerQueues {
    slots: Vec<Slot>,
    controls: Vec<ControlQueue>,
    hca: Arc<dyn Hca>,
    pd: Pd,
    eqn: Eqn,
    plan: Plan,
    sq_log: u8,
    psn_state: u64,
    /// Rings, CQs and records of the queue pairs that kernels drive; in memory that kernels reach.
    region: ControlRegion,
    /// The same for the control queue pairs, which the host drives.
    host_region: ControlRegion,
    _memory: DeviceMemory,
}

/// Bytes of control memory that one queue takes.
const fn queue_bytes(sq_depth: u64) -> u64 {
    sq_depth * WQEBB + 2 * LINE
}

impl PeerQueues {
    /// Bytes of control memory for `plan`.
    pub(crate) fn control_bytes_for(plan: &Plan) -> u64 {
        Self::region_bytes(plan) + Self::host_region_bytes(plan)
    }

    fn region_bytes(plan: &Plan) -> u64 {
        let slots = u64::from(plan.lanes) * plan.num_qps() * queue_bytes(plan.sq_depth.into());
        (CONTROL_HEADROOM * slots).next_multiple_of(PAGE)
    }

    fn host_region_bytes(plan: &Plan) -> u64 {
        (u64::from(plan.shape.num_ranks) * queue_bytes(1 << CONTROL_SQ_LOG)).next_multiple_of(PAGE)
    }

    pub(crate) fn control_bytes(&self) -> u64 {
        Self::control_bytes_for(&self.plan)
    }

    /// Creates control memory and a doorbell register per slot; no queue pair yet.
    pub(crate) fn new(
        config: &ValidConfig,
        plan: &Plan,
        gpu: &dyn Gpu,
        hca: Arc<dyn Hca>,
        pd: Pd,
    ) -> Result<Self, Error> {
        let len = Self::region_bytes(plan);
        let memory = gpu.alloc(bytes(len), bytes(PAGE))?;
        let region = register_control(&hca, &memory)?;
        let host_region = ControlRegion::host(&hca, Self::host_region_bytes(plan))?;
        let slot = || -> Result<Slot, Error> {
            Ok(Slot { doorbell: hca.alloc_doorbell()?, incarnation: 0, queue: None })
        };
        let num_slots = u64::from(plan.lanes) * plan.num_qps();
        let slots = (0..num_slots).map(|_| slot()).collect::<Result<Vec<_>, _>>()?;
        let controls = (0..plan.shape.num_ranks).map(|_| ControlQueue::Empty).collect();
        Ok(Self {
            slots,
            controls,
            eqn: hca.eqn(0)?,
            pd,
            plan: *plan,
            // CAST: at most 15 by the limits of Config.
            sq_log: config.sq_depth_log as u8,
            psn_state: 0x9e37_79b9_7f4a_7c15 ^ u64::from(plan.shape.rank) << 32 ^ u64::from(pd.get()),
            hca,
            region,
            host_region,
            _memory: memory,
        })
    }

    /// A starting sequence number unlike those before it, so that a late packet of an old incarnation is far away.
    fn next_psn(&mut self) -> Psn {
        self.psn_state = self.psn_state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        // CAST: the upper 24 bits of the generator.
        Psn::new((self.psn_state >> 40) as u32)
    }

    /// Creates one queue pair in INIT; on failure nothing stays behind.
    fn create(
        &mut self,
        gpu: &dyn Gpu,
        doorbell: DoorbellPage,
        sq_log: u8,
        user_index: u32,
    ) -> Result<Queue, Error> {
        let region = &self.region;
        let cq_log = self.hca.caps().log_min_cq_sz;
        let ring = region.carve_ring(WQEBB << sq_log)?;
        let cqe = region.carve(64 << cq_log, LINE)?;
        // One line: the QP's record, and 8 bytes for the CQ's, which nobody uses with overrun ignored.
        let record = region.carve_record()?;
        gpu.fill(cqe.addr(), 0xff, bytes(cqe.len()))?;
        gpu.fill(record.addr(), 0, bytes(record.len()))?;
        gpu.fill(ring.addr(), 0, bytes(ring.len()))?;
        let record_place = record.place();
        let cqn = objects::create_cq(
            &*self.hca,
            &CqSpec {
                eqn: self.eqn,
                log_size: cq_log,
                ring: cqe.place(),
                record: Place { offset: record_place.offset + 8, ..record_place },
                uar: doorbell.uar,
                collapsed: true,
                overrun_ignore: true,
            },
        )?;
        let psn = self.next_psn();
        let spec = QpSpec {
            pd: self.pd,
            log_sq_size: sq_log,
            recv: None,
            rings: ring.place(),
            record: record_place,
            uar: doorbell.uar,
            send_cq: cqn,
            recv_cq: cqn,
            user_index,
        };
        let created = objects::create_qp(&*self.hca, &spec).and_then(|qpn| {
            let access = Access { local_write: true, remote_write: true, remote_read: true, remote_atomic: true };
            let init = InitSpec { qpn, pkey_index: 0, port_num: self.hca.port().port_num, access };
            objects::rst2init(&*self.hca, &init).inspect_err(|_| {
                let _ = objects::destroy_qp(&*self.hca, qpn);
            })?;
            Ok(qpn)
        });
        match created {
            Ok(qpn) => Ok(Queue { qpn, cqn, psn, sq_log, ring, cqe, record, reset: false }),
            Err(error) => {
                let _ = objects::destroy_cq(&*self.hca, cqn);
                Err(error.into())
            }
        }
    }

    /// Destroys a queue pair that is in RST, or was never connected, and frees its blocks.
    fn destroy(&mut self, queue: &mut Option<Queue>) -> Result<(), Error> {
        let Some(live) = queue.as_mut() else { return Ok(()) };
        if !live.reset {
            objects::to_reset(&*self.hca, live.qpn)?;
            live.reset = true;
        }
        objects::destroy_qp(&*self.hca, live.qpn)?;
        let cqn = live.cqn;
        *queue = None;
        objects::destroy_cq(&*self.hca, cqn)?;
        Ok(())
    }

    /// The slots of all lanes and channels of `peer`.
    fn slots_of(&self, peer: Rank) -> Vec<usize> {
        let shape = &self.plan.shape;
        (0..self.plan.lanes)
            .flat_map(|lane| (0..shape.num_channels).map(move |channel| (lane, channel)))
            .map(|(lane, channel)| qp_slot(shape, Lane(lane), peer, channel) as usize)
            .collect()
    }

    /// Brings one queue pair to RTS.
    fn connect_queue(&self, queue: &Queue, offer: &QueueOffer, port: &PortInfo, timers: RcTimers) -> Result<(), Error> {
        let path = self.hca.resolve(&port.address())?;
        let mtu = self.hca.port().mtu.min(port.mtu);
        let depth = self.hca.caps().log_max_rd_atomic.min(4);
        objects::init2rtr(
            &*self.hca,
            &RtrSpec {
                qpn: queue.qpn,
                remote_qpn: offer.qpn,
                rq_psn: offer.psn,
                path,
                mtu,
                min_rnr_nak: MIN_RNR_NAK,
                log_rra_max: depth,
            },
        )?;
        objects::rtr2rts(
            &*self.hca,
            &RtsSpec {
                qpn: queue.qpn,
                sq_psn: queue.psn,
                ack_timeout: timers.ack_timeout,
                retry_count: timers.retry_count,
                rnr_retry: 7,
                log_sra_max: depth,
            },
        )?;
        Ok(())
    }

    fn device_ctx(&self, slot: usize, peer: Rank, channel: u32) -> Option<QpDeviceCtx> {
        let place = &self.slots[slot];
        let queue = place.queue.as_ref()?;
        Some(QpDeviceCtx {
            sq: queue.ring.addr(),
            // The record is {receive counter, send counter}, 4 bytes each.
            doorbell_record: queue.record.addr() + 4,
            doorbell: place.doorbell.register,
            cqe: queue.cqe.addr(),
            sq_mask: (1 << queue.sq_log) - 1,
            qpn_be: (queue.qpn.get() << 8).to_be(),
            state: code::QP_MASKED,
            incarnation: place.incarnation,
            peer: peer.0.into(),
            channel,
            ..QpDeviceCtx::default()
        })
    }

    /// Numbers of the queue pairs that kernels drive to `peer`; for traces and fault injection.
    fn qpns_of(&self, peer: Rank) -> Vec<QpNum> {
        self.slots_of(peer).into_iter().filter_map(|i| Some(self.slots[i].queue.as_ref()?.qpn)).collect()
    }

    /// Live bytes and high-water mark of control memory.
    pub(crate) fn control_report(&self) -> ibex_memheap::StorageReport {
        self.region.storage_report()
    }
}

impl Drop for PeerQueues {
    /// Best effort and bounded: never waits for a peer.
    fn drop(&mut self) {
        self.controls.clear();
        for mut slot in core::mem::take(&mut self.slots) {
            let _ = self.destroy(&mut slot.queue);
            let _ = self.hca.free_doorbell(slot.doorbell);
        }
    }
}

/// Registers the memory that kernels post through.
#[expect(unsafe_code, reason = "registration lets the HCA reach memory; the queues keep it alive")]
fn register_control(hca: &Arc<dyn Hca>, memory: &DeviceMemory) -> Result<ControlRegion, Error> {
    let region = MemoryRegion { addr: memory.addr(), len: memory.len() as u64, kind: MemoryKind::HostPtr };
    // SAFETY: `PeerQueues` owns both and drops the memory last: fields drop in declaration order.
    Ok(unsafe { ControlRegion::external(hca, region, None)? })
}

/// Tells processes apart without asking the operating system twice.
fn process_id() -> u64 {
    std::process::id().into()
}

impl Session {
    /// Creates this side's queue pairs to `peer`, in INIT, and says how to connect to them.
    ///
    /// `sq_depth_log` of `None` means the configured depth. The peer's slots must be empty: new, or fenced.
    ///
    /// # Errors
    /// What the HCA refused, or exhausted control memory; no slot is changed then.
    pub fn offer(&self, peer: Rank, sq_depth_log: Option<u8>) -> Result<Offer, Error> {
        let mut queues = self.queues.lock();
        let sq_log = sq_depth_log.unwrap_or(queues.sq_log);
        let mut made: Vec<(usize, Queue)> = Vec::new();
        let control = match self.create_queues(&mut queues, peer, sq_log, &mut made) {
            Ok(control) => control,
            Err(error) => {
                for (_, queue) in made {
                    let _ = queues.destroy(&mut Some(queue));
                }
                return Err(error);
            }
        };
        let control_offer = control.offer().ok_or(not_offered(peer))?;
        queues.controls[peer.index()] = control;
        let mut offers = made.iter().map(|(_, q)| QueueOffer { qpn: q.qpn, psn: q.psn }).collect::<Vec<_>>();
        for (index, queue) in made {
            queues.slots[index].queue = Some(queue);
            queues.slots[index].incarnation += 1;
        }
        drop(queues);
        let mut lanes = Vec::new();
        for runtime in &self.lanes {
            let rest = offers.split_off(self.plan.shape.num_channels as usize);
            lanes.push(self.lane_offer(&runtime.buffers.read(), peer, core::mem::replace(&mut offers, rest))?);
        }
        Ok(Offer {
            from: self.rank,
            to: peer,
            process: process_id(),
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
            let doorbell = queues.slots[index].doorbell;
            // CAST: slots number at most lanes x ranks x channels = 8 * 512 * 16.
            let queue = queues.create(&*self.gpu, doorbell, sq_log, index as u32)?;
            made.push((index, queue));
        }
        let psn = queues.next_psn();
        Ok(ControlQueue::offered(&queues.host_region, queues.pd, peer, psn)?)
    }

    fn lane_offer(&self, buffers: &LaneBuffers, peer: Rank, queues: Vec<QueueOffer>) -> Result<LaneOffer, Error> {
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
        })
    }

    /// Connects this side's queue pairs to what `offer` says and lets kernels use them.
    ///
    /// `base_seq` is, per operation, the first sequence number of the new pair: older ones need no credit.
    ///
    /// # Errors
    /// `Protocol` for an offer that is not meant for this rank or has another shape; what the HCA refused. The slots
    /// stay masked then, and [`Session::fence`] makes them empty again.
    pub fn connect(&self, offer: &Offer, base_seq: [u64; 2]) -> Result<(), Error> {
        self.check_offer(offer)?;
        let peer = offer.from;
        let mut queues = self.queues.lock();
        let timers = self.config.rc_timers();
        for (runtime, lane) in self.lanes.iter().zip(&offer.lanes) {
            for (channel, remote) in (0..).zip(&lane.queues) {
                let index = qp_slot(&self.plan.shape, runtime.lane(), peer, channel) as usize;
                let queue = queues.slots[index].queue.as_ref().ok_or(not_offered(peer))?;
                queues.connect_queue(queue, remote, &offer.port, timers)?;
            }
        }
        queues.controls[peer.index()].connect(offer, self.plan.layout.life_off, timers)?;
        for (runtime, lane) in self.lanes.iter().zip(&offer.lanes) {
            let buffers = runtime.buffers.read();
            self.gpu.store_u32(buffers.suspect_addr(peer), 0)?;
            self.write_peer_ctx(&buffers, peer, offer.process, lane, base_seq)?;
            for channel in 0..self.plan.shape.num_channels {
                let index = qp_slot(&self.plan.shape, runtime.lane(), peer, channel) as usize;
                let ctx = queues.device_ctx(index, peer, channel).ok_or(not_offered(peer))?;
                let addr = buffers.qp_ctx_addr(peer, channel);
                LaneBuffers::write(&*self.gpu, addr, &ctx)?;
                // ORDER(16): every field of the contexts -> state Active. Release at sys.
                self.gpu.store_u32(addr + STATE_OFF, code::QP_ACTIVE)?;
            }
        }
        Ok(())
    }

    /// Lets kernels reach this rank itself by local copies; no queue pair is involved.
    pub(crate) fn connect_self(&self, base_seq: [u64; 2]) -> Result<(), Error> {
        for runtime in &self.lanes {
            let buffers = runtime.buffers.read();
            let lane = self.lane_offer(&buffers, self.rank, Vec::new())?;
            self.write_peer_ctx(&buffers, self.rank, process_id(), &lane, base_seq)?;
        }
        Ok(())
    }

    fn check_offer(&self, offer: &Offer) -> Result<(), Error> {
        let expect = |check, found: u64, expected: u64| {
            if found == expected {
                return Ok(());
            }
            Err(Error::Protocol(Violation { from: offer.from, check, found, expected }))
        };
        expect("offer.to", offer.to.0.into(), self.rank.0.into())?;
        expect("offer.lanes", offer.lanes.len() as u64, self.lanes.len() as u64)?;
        for lane in &offer.lanes {
            expect("offer.channels", lane.queues.len() as u64, self.plan.shape.num_channels.into())?;
        }
        Ok(())
    }

    fn write_peer_ctx(
        &self,
        buffers: &LaneBuffers,
        peer: Rank,
        process: u64,
        lane: &LaneOffer,
        base_seq: [u64; 2],
    ) -> Result<(), Error> {
        let mapped = process == process_id();
        let route = match (peer == self.rank, mapped, self.config.route) {
            (true, _, _) => code::ROUTE_LOCAL,
            (false, true, RoutePolicy::Auto) => code::ROUTE_MAPPED,
            _ => code::ROUTE_IBGDA,
        };
        let pointer = |va: u64| if mapped { va } else { 0 };
        let ctx = PeerCtx {
            region_va: lane.region_va,
            combine_va: lane.combine_va,
            region_ptr: pointer(lane.region_va),
            combine_ptr: pointer(lane.combine_va),
            region_rkey_be: lane.region_rkey.to_be(),
            combine_rkey_be: lane.combine_rkey.to_be(),
            route,
            my_region: buffers.region_addr(peer),
            base_seq,
            ..PeerCtx::default()
        };
        LaneBuffers::write(&*self.gpu, buffers.peer_ctx_addr(peer), &ctx)
    }

    /// Takes `peer`'s slots out of use and makes them empty: no kernel posts to them, no device executes from them,
    /// and every word that the peer has written or is owed is zero.
    ///
    /// # Errors
    /// What the HCA refused, or `PeerLost`-free timeouts of the grace period; a retry goes on where this stopped.
    pub fn fence(&self, peer: Rank) -> Result<(), Error> {
        self.mark_fenced(peer)?;
        let entered = self.entered_halves()?;
        let mut queues = self.queues.lock();
        let slots = queues.slots_of(peer);
        for index in &slots {
            if let Some(queue) = queues.slots[*index].queue.as_ref().filter(|q| !q.reset) {
                objects::to_err(&*self.hca, queue.qpn)?;
            }
        }
        self.grace_period(&entered)?;
        for index in slots {
            let mut queue = queues.slots[index].queue.take();
            let result = queues.destroy(&mut queue);
            queues.slots[index].queue = queue;
            result?;
        }
        queues.controls[peer.index()] = ControlQueue::Empty;
        drop(queues);
        for runtime in &self.lanes {
            // The dead incarnation's keys go with its queue pairs; nobody else's are touched.
            runtime.buffers.write().renew_peer_keys(peer)?;
            self.zero_words(&runtime.buffers.read(), peer)?;
        }
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
            ..LifeWords::default()
        })
    }

    /// From here on no half that enters posts to the peer or waits for it. ORDER(9): mark -> read entered, the other side of the
    /// kernels' Dekker pair.
    fn mark_fenced(&self, peer: Rank) -> Result<(), Error> {
        for runtime in &self.lanes {
            let buffers = runtime.buffers.read();
            self.gpu.store_u32(buffers.suspect_addr(peer), 1)?;
            for channel in 0..self.plan.shape.num_channels {
                self.gpu.store_u32(buffers.qp_ctx_addr(peer, channel) + STATE_OFF, code::QP_FENCED)?;
            }
        }
        fence(Ordering::SeqCst);
        Ok(())
    }

    /// Halves that have entered so far, per lane.
    fn entered_halves(&self) -> Result<Vec<u64>, Error> {
        self.lanes
            .iter()
            .map(|runtime| Ok(self.gpu.load_u64(runtime.buffers.read().host_words_addr() + ENTERED_OFF)?))
            .collect()
    }

    /// Waits until every half that entered before the mark has left, send and receive alike. Bounded: a half ends by
    /// its own deadlines.
    fn grace_period(&self, entered: &[u64]) -> Result<(), Error> {
        let cap = Duration::from_millis(u64::from(self.config.stall_ms()) * u64::from(self.config.num_ranks));
        let deadline = Deadline::after(2 * cap);
        for (runtime, entered) in self.lanes.iter().zip(entered) {
            let addr = runtime.buffers.read().host_words_addr() + LEFT_OFF;
            // ORDER(10): everything a half did -> left. Acquire.
            while self.gpu.load_u64(addr)? < *entered {
                if deadline.has_passed() {
                    return Err(Error::Protocol(Violation {
                        from: self.rank,
                        check: "halves that left within twice the hard cap",
                        found: self.gpu.load_u64(addr)?,
                        expected: *entered,
                    }));
                }
                sleep(GRACE_POLL);
            }
        }
        Ok(())
    }

    /// Zeroes what the pair has exchanged: signal, credit and life words, and our own side of them. After 2RST,
    /// before RTR: nobody writes these words in between.
    fn zero_words(&self, buffers: &LaneBuffers, peer: Rank) -> Result<(), Error> {
        let l = &self.plan.layout;
        let region = buffers.region_addr(peer);
        self.gpu.fill(region + l.counts_off, 0, bytes(l.region_bytes - l.counts_off))?;
        debug_assert!(l.counts_off <= l.signals_off && l.life_off + size_of::<LifeWords>() as u64 <= l.region_bytes);
        for channel in 0..self.plan.shape.num_channels {
            let empty = QpDeviceCtx { state: code::QP_MASKED, ..QpDeviceCtx::default() };
            LaneBuffers::write(&*self.gpu, buffers.qp_ctx_addr(peer, channel), &empty)?;
        }
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

    /// Lets a fresh session start at the sequence numbers of its group.
    ///
    /// # Errors
    /// As [`Session::next_seq`].
    pub fn start_at(&self, lane: Lane, next: [u64; 2]) -> Result<(), Error> {
        let runtime = self.lane(lane)?;
        let state = LaneState { next, credited: next.map(|n| n - 1), ..LaneState::default() };
        LaneBuffers::write(&*self.gpu, runtime.buffers.read().state_addr(), &state)
    }
}

/// Offset of `QpDeviceCtx::state`.
const STATE_OFF: u64 = core::mem::offset_of!(QpDeviceCtx, state) as u64;
/// Offset of `LaneHostWords::entered`.
const ENTERED_OFF: u64 = core::mem::offset_of!(LaneHostWords, entered) as u64;
/// Offset of `LaneHostWords::left`.
const LEFT_OFF: u64 = core::mem::offset_of!(LaneHostWords, left) as u64;

fn not_offered(peer: Rank) -> Error {
    Error::Protocol(Violation { from: peer, check: "queue pairs offered first", found: 0, expected: 1 })
}
