//! The queue pairs that kernels drive: blocks, commands, and what is left when a command is refused.
//!
//! [`PeerQueues`] owns a doorbell register per slot, the control memory, and every CQ and QP in it. A [`Queue`] owns
//! its blocks and remembers which of its objects the device still has; blocks return to the heap only when the device
//! has none of them, because until then it may still touch them. That is the quarantine.
//!
//! INVARIANT: an object that the device has is named by a slot, or by `doomed`, which every later call sweeps.

use std::sync::Arc;

use ibex_abi::device_ctx::{QpDeviceCtx, code};
use ibex_abi::types::{CqNum, Eqn, Psn, QpNum};
use ibex_hca::control_region::{Carved, ControlRegion, RegionPlace};
use ibex_hca::objects::{self, CqSpec, InitSpec, Place, QpSpec, RtrSpec, RtsSpec};
use ibex_hca::{Access, AsyncEvent, DoorbellPage, Hca, MemoryRegion, PortInfo, destroyed};

use super::QueueOffer;
use super::control::{CONTROL_SQ_LOG, ControlQueue};
use crate::buffer::{NicMemory, OwnedPd, PlaceReport, bytes};
use crate::config::{RcTimers, SQ_DEPTH_LOG, ValidConfig, min_sq_depth_log};
use crate::error::{ConfigError, Error, Limit};
use crate::gpu::{DeviceMemory, Gpu, NicWay, Reachable};
use crate::ids::{Lane, Rank};
use crate::layout::{LINE, PAGE, Plan, qp_slot};

/// Bytes of a doorbell register.
const DOORBELL_LEN: usize = 8;
/// Bytes of a WQE basic block.
const WQEBB: u64 = 64;
/// Control memory is sized for every slot at this many times its depth, so that a deeper queue can be carved while
/// the old ones of other slots live.
const CONTROL_HEADROOM: u64 = 3;
/// Timer code of a receiver-not-ready answer; nothing of ours can be not ready.
const MIN_RNR_NAK: u8 = 12;

/// A queue pair with its CQ and their blocks, complete or in the making.
pub(super) struct Queue {
    /// The QP, while the device has it.
    qpn: Option<QpNum>,
    /// The CQ, while the device has it.
    cqn: Option<CqNum>,
    /// The QP is in RST: the device executes nothing from it.
    is_reset: bool,
    psn: Psn,
    sq_log: u8,
    ring: Carved,
    cqe: Carved,
    record: Carved,
}

impl Queue {
    /// What the peer must know of it; `None` unless it is complete.
    pub(super) fn offer(&self) -> Option<QueueOffer> {
        Some(QueueOffer { qpn: self.qpn?, psn: self.psn })
    }

    /// Takes the device's objects down as far as it lets us; a retry goes on where this stopped.
    fn dismantle(&mut self, hca: &dyn Hca) -> Result<(), Error> {
        if let Some(qpn) = self.qpn {
            if !self.is_reset {
                objects::to_reset(hca, qpn)?;
                self.is_reset = true;
            }
            destroyed(objects::destroy_qp(hca, qpn))?;
            self.qpn = None;
        }
        if let Some(cqn) = self.cqn {
            destroyed(objects::destroy_cq(hca, cqn))?;
            self.cqn = None;
        }
        Ok(())
    }
}

/// The place a queue pair lives.
pub(super) struct Slot {
    pub(super) doorbell: DoorbellPage,
    /// The register as kernels see it.
    pub(super) register: DeviceMemory,
    pub(super) incarnation: u32,
    pub(super) queue: Option<Queue>,
}

/// All queue pairs of one session.
pub(crate) struct PeerQueues {
    pub(super) slots: Vec<Slot>,
    pub(super) controls: Vec<ControlQueue>,
    /// Queues of failed attempts that the device would not let go of.
    doomed: Vec<Queue>,
    hca: Arc<dyn Hca>,
    pub(super) pd: Arc<OwnedPd>,
    eqn: Eqn,
    plan: Plan,
    /// Configured depth.
    pub(super) sq_log: u8,
    psn_state: u64,
    /// Rings, CQs and records of the queue pairs that kernels drive; in memory that kernels reach.
    region: ControlRegion,
    /// Where that memory lies.
    pub(crate) place: PlaceReport,
    /// The same for the control queue pairs, which the host drives.
    pub(super) host_region: ControlRegion,
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

    /// Bytes of control memory that only the host drives; it is allocated by the host, not on the GPU.
    pub(crate) fn host_region_bytes(plan: &Plan) -> u64 {
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
        hca: &Arc<dyn Hca>,
        pd: &Arc<OwnedPd>,
    ) -> Result<Self, Error> {
        let len = Self::region_bytes(plan);
        let (region, place, memory) = control_memory(gpu, hca, len)?;
        let host_region = ControlRegion::host(hca, Self::host_region_bytes(plan))?;
        let mut queues = Self {
            slots: Vec::new(),
            controls: (0..plan.shape.num_ranks).map(|_| ControlQueue::Empty).collect(),
            doomed: Vec::new(),
            eqn: hca.eqn(0)?,
            hca: Arc::clone(hca),
            plan: *plan,
            // CAST: at most 15 by the limits of Config.
            sq_log: config.sq_depth_log as u8,
            psn_state: 0x9e37_79b9_7f4a_7c15 ^ u64::from(plan.shape.rank) << 32 ^ u64::from(pd.get().get()),
            pd: Arc::clone(pd),
            region,
            place,
            host_region,
            _memory: memory,
        };
        for _ in 0..u64::from(plan.lanes) * plan.num_qps() {
            // Registers taken so far are given back on drop if one is refused.
            let doorbell = hca.alloc_doorbell()?;
            let register = match reach_doorbell(gpu, &**hca, doorbell) {
                Ok(register) => register,
                Err(refused) => {
                    // The register that has no slot yet; its refusal to go would change nothing.
                    let _ = hca.free_doorbell(doorbell);
                    return Err(refused);
                }
            };
            queues.slots.push(Slot { doorbell, register, incarnation: 0, queue: None });
        }
        Ok(queues)
    }

    /// A starting sequence number unlike those before it, so that a late packet of an old incarnation is far away.
    pub(super) fn next_psn(&mut self) -> Psn {
        self.psn_state =
            self.psn_state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        // CAST: the upper 24 bits of the generator.
        Psn::new((self.psn_state >> 40) as u32)
    }

    /// The depth to use, refused before anything is touched if a step's reserve would not fit it.
    pub(super) fn checked_depth(&self, wanted: Option<u8>) -> Result<u8, Error> {
        let depth = wanted.unwrap_or(self.sq_log);
        let (min, max) = (min_sq_depth_log(self.plan.shape.ring), SQ_DEPTH_LOG.1);
        if (min..=max).contains(&depth.into()) {
            return Ok(depth);
        }
        Err(Error::Config(ConfigError {
            field: "sq_depth_log",
            value: u32::from(depth).into(),
            limit: Limit::Range { min: min.into(), max: max.into() },
        }))
    }

    /// Creates one queue pair in INIT; on failure nothing stays behind, or what does is doomed.
    pub(super) fn create(&mut self, gpu: &dyn Gpu, slot: usize, sq_log: u8) -> Result<Queue, Error> {
        let mut queue = self.carve(gpu, sq_log)?;
        match self.build(&mut queue, slot) {
            Ok(()) => Ok(queue),
            Err(error) => {
                self.discard(queue);
                Err(error)
            }
        }
    }

    /// Takes the blocks of a queue from control memory and sets them as a device in RST expects them.
    fn carve(&mut self, gpu: &dyn Gpu, sq_log: u8) -> Result<Queue, Error> {
        let ring = self.region.carve_ring(WQEBB << sq_log)?;
        let cqe = self.region.carve(64 << self.hca.caps().log_min_cq_sz, LINE)?;
        // One line: the QP's record, and 8 bytes for the CQ's, which nobody uses with overrun ignored.
        let record = self.region.carve_record()?;
        gpu.fill(cqe.addr(), 0xff, bytes(cqe.len()))?;
        gpu.fill(record.addr(), 0, bytes(record.len()))?;
        gpu.fill(ring.addr(), 0, bytes(ring.len()))?;
        let psn = self.next_psn();
        Ok(Queue { qpn: None, cqn: None, is_reset: true, psn, sq_log, ring, cqe, record })
    }

    fn build(&self, queue: &mut Queue, slot: usize) -> Result<(), Error> {
        let hca = &*self.hca;
        let uar = self.slots[slot].doorbell.uar;
        let record = queue.record.place();
        let cqn = objects::create_cq(
            hca,
            &CqSpec {
                eqn: self.eqn,
                log_size: hca.caps().log_min_cq_sz,
                ring: queue.cqe.place(),
                record: Place { offset: record.offset + 8, ..record },
                uar,
                collapsed: true,
                overrun_ignore: true,
            },
        )?;
        queue.cqn = Some(cqn);
        let spec = QpSpec {
            pd: self.pd.get(),
            log_sq_size: queue.sq_log,
            recv: None,
            rings: queue.ring.place(),
            record,
            uar,
            send_cq: cqn,
            recv_cq: cqn,
            // CAST: slots number at most lanes x ranks x channels = 8 * 512 * 16.
            user_index: slot as u32,
        };
        let qpn = objects::create_qp(hca, &spec)?;
        queue.qpn = Some(qpn);
        let access = Access { local_write: true, remote_write: true, remote_read: true, remote_atomic: true };
        let (pkey_index, port_num) = (hca.pkey_index(), hca.port().port_num);
        objects::rst2init(hca, &InitSpec { qpn, pkey_index, port_num, access })?;
        queue.is_reset = false;
        Ok(())
    }

    /// Takes a queue down that no slot holds.
    pub(super) fn discard(&mut self, mut queue: Queue) {
        if queue.dismantle(&*self.hca).is_err() {
            self.doomed.push(queue);
        }
    }

    /// Tries again to take down what earlier attempts had to leave.
    pub(super) fn sweep(&mut self) {
        for queue in core::mem::take(&mut self.doomed) {
            self.discard(queue);
        }
    }

    /// Stops the device from executing what `peer`'s slots hold; what is outstanding is flushed.
    pub(super) fn fail_slots(&mut self, peer: Rank) -> Result<(), Error> {
        for index in self.slots_of(peer) {
            let live = self.slots[index].queue.as_ref().filter(|q| !q.is_reset);
            if let Some(qpn) = live.and_then(|q| q.qpn) {
                objects::to_err(&*self.hca, qpn)?;
            }
        }
        Ok(())
    }

    /// Empties `peer`'s slots: RST, destroyed, blocks back in the heap.
    pub(super) fn empty_slots(&mut self, peer: Rank) -> Result<(), Error> {
        for index in self.slots_of(peer) {
            let slot = &mut self.slots[index];
            if let Some(queue) = slot.queue.as_mut() {
                queue.dismantle(&*self.hca)?;
                slot.queue = None;
            }
        }
        self.controls[peer.index()].close()
    }

    /// Objects of `peer` that exist: queue pairs of its slots, and the control queue pair.
    pub(super) fn num_live(&self, peer: Rank) -> usize {
        let slots = self.slots_of(peer).into_iter().filter(|i| self.slots[*i].queue.is_some()).count();
        slots + usize::from(!matches!(self.controls[peer.index()], ControlQueue::Empty))
    }

    /// The peer whose queues an event is about, kernels' or the host's; `None` if they are gone or nobody's.
    pub(super) fn peer_of(&self, event: &AsyncEvent) -> Option<Rank> {
        let (qpn, cqn) = match event {
            AsyncEvent::QpFatal { qpn }
            | AsyncEvent::QpRequestError { qpn }
            | AsyncEvent::QpAccessError { qpn } => (Some(*qpn), None),
            AsyncEvent::CqError { cqn } => (None, Some(*cqn)),
            _ => return None,
        };
        let is_it = |(of_qp, of_cq): (Option<QpNum>, Option<CqNum>)| {
            (qpn.is_some() && qpn == of_qp) || (cqn.is_some() && cqn == of_cq)
        };
        let is_of = |peer: Rank| {
            let control = self.controls[peer.index()].numbers().map(|(qpn, cqn)| (Some(qpn), Some(cqn)));
            let slots = self.slots_of(peer).into_iter().filter_map(|slot| self.slots[slot].queue.as_ref());
            slots.map(|queue| (queue.qpn, queue.cqn)).chain(control).any(is_it)
        };
        // CAST: at most 512 ranks.
        (0..self.plan.shape.num_ranks as u16).map(Rank).find(|peer| is_of(*peer))
    }

    /// The slots of all lanes and channels of `peer`.
    pub(super) fn slots_of(&self, peer: Rank) -> Vec<usize> {
        let shape = &self.plan.shape;
        (0..self.plan.lanes)
            .flat_map(|lane| (0..shape.num_channels).map(move |channel| (lane, channel)))
            .map(|(lane, channel)| qp_slot(shape, Lane(lane), peer, channel) as usize)
            .collect()
    }

    /// Brings one slot's queue pair to RTS; `None` if the slot is empty.
    pub(super) fn connect_slot(
        &self,
        slot: usize,
        offer: &QueueOffer,
        port: &PortInfo,
        timers: RcTimers,
    ) -> Result<Option<()>, Error> {
        let Some(queue) = &self.slots[slot].queue else { return Ok(None) };
        let Some(qpn) = queue.qpn else { return Ok(None) };
        let hca = &*self.hca;
        let depth = hca.caps().log_max_rd_atomic.min(4);
        let path = hca.resolve(&port.address())?.of_queue_pair(qpn, offer.qpn);
        let rtr = RtrSpec {
            qpn,
            remote_qpn: offer.qpn,
            rq_psn: offer.psn,
            mtu: path.mtu.min(port.mtu),
            path,
            min_rnr_nak: MIN_RNR_NAK,
            log_rra_max: depth,
        };
        objects::init2rtr(hca, &rtr)?;
        let rts = RtsSpec {
            qpn,
            sq_psn: queue.psn,
            ack_timeout: timers.ack_timeout,
            retry_count: timers.retry_count,
            rnr_retry: 7,
            log_sra_max: depth,
        };
        Ok(Some(objects::rtr2rts(hca, &rts)?))
    }

    /// What kernels must know of the queue in a slot, still masked; `None` if the slot is empty.
    pub(super) fn device_ctx(&self, slot: usize, peer: Rank, channel: u32) -> Option<QpDeviceCtx> {
        let place = &self.slots[slot];
        let queue = place.queue.as_ref()?;
        Some(QpDeviceCtx {
            sq: queue.ring.addr(),
            // The record is {receive counter, send counter}, 4 bytes each.
            doorbell_record: queue.record.addr() + 4,
            doorbell: place.register.addr(),
            cqe: queue.cqe.addr(),
            sq_mask: (1 << queue.sq_log) - 1,
            qpn_be: (queue.qpn?.get() << 8).to_be(),
            state: code::QP_MASKED,
            incarnation: place.incarnation,
            peer: peer.0.into(),
            channel,
            ..QpDeviceCtx::default()
        })
    }

    /// Number of the queue pair in a slot, and the address of its one completion; `None` if the slot is empty.
    pub(super) fn completion_of(&self, slot: usize) -> Option<(QpNum, u64)> {
        let queue = self.slots[slot].queue.as_ref()?;
        Some((queue.qpn?, queue.cqe.addr()))
    }

    /// Numbers of the queue pairs that kernels drive to `peer`; for traces and fault injection.
    pub(super) fn qpns_of(&self, peer: Rank) -> Vec<QpNum> {
        self.slots_of(peer).into_iter().filter_map(|i| self.slots[i].queue.as_ref()?.qpn).collect()
    }

    /// Live bytes and high-water mark of control memory.
    pub(super) fn control_report(&self) -> ibex_memheap::StorageReport {
        self.region.storage_report()
    }
}

impl Drop for PeerQueues {
    /// Best effort and bounded: never waits for a peer. A block whose queue the device keeps stays in a heap that
    /// nobody allocates from any more.
    fn drop(&mut self) {
        self.controls.clear();
        self.sweep();
        for mut slot in core::mem::take(&mut self.slots) {
            if let Some(queue) = slot.queue.as_mut() {
                let _ = queue.dismantle(&*self.hca);
            }
            let _ = self.hca.free_doorbell(slot.doorbell);
        }
    }
}

/// Whether kernels of `gpu` can ring the doorbells of `hca`; where they cannot, the host may carry them
/// ([`AssistedHca`](ibex_hca::assisted::AssistedHca)).
///
/// # Errors
/// Why not: the device has no doorbell to give, or the GPU's driver does not map it.
pub fn reaches_doorbells(gpu: &dyn Gpu, hca: &dyn Hca) -> Result<(), Error> {
    let doorbell = hca.alloc_doorbell()?;
    let reached = reach_doorbell(gpu, hca, doorbell).map(drop);
    // Its refusal to go leaves a register that nobody rings.
    let _ = hca.free_doorbell(doorbell);
    reached
}

/// Lets kernels ring a doorbell.
#[expect(unsafe_code, reason = "a device's pages are mapped by the device; it keeps them while it lives")]
fn reach_doorbell(gpu: &dyn Gpu, hca: &dyn Hca, page: DoorbellPage) -> Result<DeviceMemory, Error> {
    let what = if hca.doorbells_are_registers() { Reachable::Registers } else { Reachable::Memory };
    // SAFETY: devices keep doorbell pages mapped until they are dropped, and `PeerQueues` holds its device.
    Ok(unsafe { gpu.reach(page.register, DOORBELL_LEN, what) }?)
}

/// Makes the memory that kernels post through: on the GPU where the device reaches it there, by dma-buf or by address,
/// else in memory of the host that kernels reach.
fn control_memory(
    gpu: &dyn Gpu,
    hca: &Arc<dyn Hca>,
    len: u64,
) -> Result<(ControlRegion, PlaceReport, DeviceMemory), Error> {
    let memory = NicMemory::new(gpu, &**hca, len)?;
    let refusals = match memory.offer(memory.addr(), len, |region| register_control(hca, region)) {
        Ok((region, place)) => return Ok((region, place, memory.into_memory())),
        Err(refusals) => refusals,
    };
    if refusals.0.iter().all(|(place, _)| *place == RegionPlace::HostMapped) {
        return Err(refusals.into());
    }
    drop(memory);
    let memory = gpu.alloc_pinned(bytes(len), bytes(PAGE))?;
    let region = register_control(hca, NicWay::Host.region(memory.addr(), 0, len))?;
    Ok((region, PlaceReport { place: RegionPlace::HostMapped, refused: refusals.0 }, memory))
}

/// Registers the memory that kernels post through.
#[expect(unsafe_code, reason = "registration lets the HCA reach memory; the queues keep it alive")]
fn register_control(hca: &Arc<dyn Hca>, region: MemoryRegion) -> Result<ControlRegion, Error> {
    // SAFETY: `PeerQueues` owns both and drops the memory last: fields drop in declaration order.
    Ok(unsafe { ControlRegion::external(hca, region, None)? })
}
