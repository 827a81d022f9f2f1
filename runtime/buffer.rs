//! All memory of one lane: what it is, who writes it, and the keys under which the HCA knows it.
//!
//! A `LaneBuffers` owns its memory and its memory keys from construction to drop; no address in it ever moves, so
//! graphs captured against it stay valid. Keys are registered per source rank: a peer can write its own region and
//! the combine slab, and retiring a dead rank's keys touches nobody else.
//!
//! | memory | written by | read by |
//! |---|---|---|
//! | window (a region per source) | that source's HCA | receive halves |
//! | combine slab | every peer's HCA | receive halves |
//! | source memory (staging, counts, rows) | send halves | our HCA |
//! | state (contexts, tables, handles) | host between halves, kernels | kernels |
//! | pinned words (faults, telemetry) | kernels | host, at any time |

use core::fmt;
use std::sync::Arc;

use ibex_abi::device_ctx::{
    DeviceFault, HandleArrays, HandleCtx, LaneArgs, LaneHostWords, LaneState, LayoutRange, Limits,
    MemberTable, PeerCtx, PeerTelemetry, QpDeviceCtx, SendCursor,
};
use ibex_abi::types::{Iova, Pd};
use ibex_hca::control_region::RegionPlace;
use ibex_hca::{Access, Hca, HcaError, MemoryRegion, Mkey, destroyed};
use zerocopy::IntoBytes;

use crate::error::Error;
use crate::gpu::{DeviceMemory, Gpu, GpuError, NicWays};
use crate::ids::Rank;
use crate::layout::{LINE, PAGE, Plan, SourcePlan};

/// A protection domain, given back when the last object that belongs to it is gone.
pub(crate) struct OwnedPd {
    hca: Arc<dyn Hca>,
    pd: Pd,
}

impl OwnedPd {
    pub(crate) fn new(hca: &Arc<dyn Hca>) -> Result<Arc<Self>, HcaError> {
        Ok(Arc::new(Self { pd: hca.alloc_pd()?, hca: Arc::clone(hca) }))
    }

    pub(crate) fn get(&self) -> Pd {
        self.pd
    }
}

impl Drop for OwnedPd {
    fn drop(&mut self) {
        // A device that refuses keeps an empty domain, which is harmless.
        let _ = self.hca.dealloc_pd(self.pd);
    }
}

/// Where memory lies that a device works on, and how the device reaches it; and why not in a better way.
#[derive(Debug, Clone)]
pub struct PlaceReport {
    /// The way that is used.
    pub place: RegionPlace,
    /// Better ways that the GPU or the device refused, best first.
    pub refused: Vec<(RegionPlace, Arc<Error>)>,
}

impl fmt::Display for PlaceReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.place)?;
        self.refused.iter().try_for_each(|(place, why)| write!(f, "; not {place}: {why}"))
    }
}

/// Memory that kernels and the device share.
pub(crate) struct NicMemory {
    // Before the memory that they lead to.
    ways: NicWays,
    memory: DeviceMemory,
}

impl NicMemory {
    /// Allocates `len` bytes, at a page, that `hca` reaches.
    pub(crate) fn new(gpu: &dyn Gpu, hca: &dyn Hca, len: u64) -> Result<Self, Error> {
        let memory = gpu.alloc(bytes(len), bytes(PAGE))?;
        let ways = gpu.nic_ways(memory.addr(), hca.is_on_bus())?;
        Ok(Self { ways, memory })
    }

    /// Its first byte.
    pub(crate) fn addr(&self) -> u64 {
        self.memory.addr()
    }

    /// Offers `len` bytes at `addr` to `take` in every way, best first, until it takes one.
    pub(crate) fn offer<T>(
        &self,
        addr: u64,
        len: u64,
        mut take: impl FnMut(MemoryRegion) -> Result<T, Error>,
    ) -> Result<(T, PlaceReport), Refusals> {
        let by_gpu = |(place, why): &(RegionPlace, GpuError)| (*place, Arc::new(Error::from(why.clone())));
        let mut refused: Vec<_> = self.ways.refused.iter().map(by_gpu).collect();
        for way in &self.ways.ways {
            match take(way.region(addr, addr - self.addr(), len)) {
                Ok(taken) => return Ok((taken, PlaceReport { place: way.place(), refused })),
                Err(why) => refused.push((way.place(), Arc::new(why))),
            }
        }
        Err(Refusals(refused))
    }

    /// The memory itself.
    pub(crate) fn into_memory(self) -> DeviceMemory {
        self.memory
    }
}

/// Ways to memory that were refused, best first; all of them, where this is an error.
pub(crate) struct Refusals(pub(crate) Vec<(RegionPlace, Arc<Error>)>);

impl From<Refusals> for Error {
    /// The last way's refusal: it is the one that most machines have.
    fn from(mut refusals: Refusals) -> Self {
        let last = refusals.0.pop().and_then(|(_, why)| Arc::into_inner(why));
        // A GPU that offers no way at all, and gives no reason.
        last.unwrap_or(Self::Gpu(GpuError::NotAllocated { addr: 0, len: 0 }))
    }
}

/// A memory key that is given back on drop.
pub(crate) struct OwnedMkey {
    pd: Arc<OwnedPd>,
    key: Mkey,
    is_live: bool,
}

impl OwnedMkey {
    /// Registers `len` bytes of `memory` at `addr`, which the HCA then addresses by the same number.
    #[expect(unsafe_code, reason = "registration lets the HCA reach memory; the owner keeps it alive")]
    fn register(
        pd: &Arc<OwnedPd>,
        memory: &NicMemory,
        addr: u64,
        len: u64,
        access: Access,
    ) -> Result<(Self, PlaceReport), Error> {
        Ok(memory.offer(addr, len, |region| {
            // SAFETY: every caller in this file registers memory that the same `LaneBuffers` (or `Registration`) owns
            // and drops after this key: fields drop in declaration order, keys stand before memory.
            let key = unsafe { pd.hca.register(pd.get(), region, Iova(addr), access)? };
            Ok(Self { pd: Arc::clone(pd), key, is_live: true })
        })?)
    }

    pub(crate) fn key(&self) -> &Mkey {
        &self.key
    }

    /// Gives the key back now, so that a refusal is seen; a retry is allowed.
    fn revoke(&mut self) -> Result<(), Error> {
        if self.is_live {
            destroyed(self.pd.hca.deregister(self.key))?;
            self.is_live = false;
        }
        Ok(())
    }
}

impl Drop for OwnedMkey {
    fn drop(&mut self) {
        // A device that refuses leaves the key valid, which is safe: it reports the leak in its own counters.
        let _ = self.revoke();
    }
}

/// Caller memory that work requests may name, registered until drop.
pub struct Registration {
    mkey: OwnedMkey,
    memory: NicMemory,
}

impl Registration {
    /// Allocates and registers `len` bytes for local use.
    pub(crate) fn new(gpu: &dyn Gpu, pd: &Arc<OwnedPd>, len: u64) -> Result<Self, Error> {
        let memory = NicMemory::new(gpu, &*pd.hca, len)?;
        let (mkey, _) = OwnedMkey::register(pd, &memory, memory.addr(), len, Access::LOCAL)?;
        Ok(Self { mkey, memory })
    }

    /// The memory.
    pub fn memory(&self) -> &DeviceMemory {
        &self.memory.memory
    }

    /// Was it registered in this protection domain?
    pub(crate) fn is_of(&self, pd: &Arc<OwnedPd>) -> bool {
        Arc::ptr_eq(&self.mkey.pd, pd)
    }

    pub(crate) fn lkey_be(&self) -> u32 {
        self.mkey.key().lkey.get().to_be()
    }
}

/// CAST: buffer sizes are far below 2^63, and Ibex supports 64-bit hosts only.
pub(crate) fn bytes(len: u64) -> usize {
    usize::try_from(len).expect("a 64-bit host")
}

/// Keys that one peer holds to our memory.
pub(crate) struct PeerKeys {
    pub(crate) region: OwnedMkey,
    pub(crate) combine: OwnedMkey,
}

impl PeerKeys {
    fn revoke(&mut self) -> Result<(), Error> {
        self.region.revoke()?;
        self.combine.revoke()
    }
}

/// Carves one allocation into line-aligned parts and remembers how much of it is taken.
struct Carver {
    next: u64,
}

impl Carver {
    fn take(&mut self, len: u64) -> u64 {
        let at = self.next;
        self.next = (at + len).next_multiple_of(LINE);
        at
    }

    fn take_array<T>(&mut self, count: u64) -> u64 {
        self.take(count * size_of::<T>() as u64)
    }
}

/// Offsets of the kernel state of one lane within its one allocation.
struct StatePlan {
    qps: u64,
    peers: u64,
    suspects: u64,
    fenced_below: u64,
    tables: u64,
    owner_of: [u64; 2],
    state: u64,
    cursors: u64,
    limits: u64,
    staging_ready: u64,
    row_staging_pi: u64,
    handles: Vec<HandlePlan>,
    tickets: Vec<TicketPlan>,
    total: u64,
}

/// Offsets of one dispatch handle.
struct HandlePlan {
    ctx: u64,
    pick_owner: u64,
    sent_picks: u64,
    sent_messages: u64,
    verdicts: u64,
    ranges_ready: u64,
    pack_cursor: u64,
    ranges: u64,
    headers: u64,
    source_ok: u64,
}

/// Offsets of one combine ticket.
struct TicketPlan {
    ctx: u64,
    verdicts: u64,
}

impl StatePlan {
    fn new(plan: &Plan) -> Self {
        let s = &plan.shape;
        let ranks = u64::from(s.num_ranks);
        let experts = u64::from(s.max_local_experts);
        let messages = u64::from(s.num_channels) * u64::from(s.channel_tokens);
        let mut c = Carver { next: 0 };
        let handles = (0..plan.handles)
            .map(|_| HandlePlan {
                ctx: c.take_array::<HandleCtx>(1),
                pick_owner: c.take(u64::from(s.max_tokens) * u64::from(s.max_topk) * 2),
                sent_picks: c.take(plan.num_qps() * 4),
                sent_messages: c.take(plan.num_qps() * 4),
                verdicts: c.take(plan.num_qps() * 8),
                ranges_ready: c.take(ranks * 4),
                pack_cursor: c.take(experts * 4),
                ranges: c.take_array::<LayoutRange>(experts * ranks),
                headers: c.take(ranks * messages * plan.header_bytes()),
                source_ok: c.take(ranks * 4),
            })
            .collect();
        let tickets = (0..plan.handles)
            .map(|_| TicketPlan { ctx: c.take_array::<HandleCtx>(1), verdicts: c.take(plan.num_qps() * 8) })
            .collect();
        Self {
            qps: c.take_array::<QpDeviceCtx>(plan.num_qps()),
            peers: c.take_array::<PeerCtx>(ranks),
            suspects: c.take(ranks * 4),
            fenced_below: c.take(ranks * 8),
            tables: c.take_array::<MemberTable>(2),
            owner_of: [c.take(u64::from(s.max_experts) * 4), c.take(u64::from(s.max_experts) * 4)],
            state: c.take_array::<LaneState>(1),
            cursors: c.take_array::<SendCursor>(plan.num_qps()),
            limits: c.take_array::<Limits>(1),
            staging_ready: c.take(2 * u64::from(s.ring) * u64::from(s.max_tokens) * 4),
            row_staging_pi: c.take(plan.num_qps() * u64::from(s.staging_rows) * 4),
            handles,
            tickets,
            total: c.next,
        }
    }
}

/// Offsets in the pinned words.
struct PinnedPlan {
    host_words: u64,
    faults: u64,
    telemetry: u64,
    total: u64,
}

impl PinnedPlan {
    fn new(plan: &Plan) -> Self {
        let ranks = u64::from(plan.shape.num_ranks);
        let mut c = Carver { next: 0 };
        Self {
            host_words: c.take_array::<LaneHostWords>(1),
            faults: c.take_array::<DeviceFault>(ranks),
            telemetry: c.take_array::<PeerTelemetry>(ranks),
            total: c.next,
        }
    }
}

/// The memory of one lane, with its keys.
pub(crate) struct LaneBuffers {
    // Keys stand before the memory they name: fields drop in this order.
    peer_keys: Vec<Option<PeerKeys>>,
    /// By source: which region of the window is its own.
    regions: Vec<u32>,
    /// Regions that are nobody's and that nobody can write into.
    spare: Vec<u32>,
    source_key: OwnedMkey,
    pd: Arc<OwnedPd>,
    plan: Plan,
    source_plan: SourcePlan,
    state_plan: StatePlan,
    pinned_plan: PinnedPlan,
    place: PlaceReport,
    window: NicMemory,
    combine_slab: NicMemory,
    source: NicMemory,
    state: DeviceMemory,
    pinned: DeviceMemory,
}

impl LaneBuffers {
    /// Allocates and registers everything; nothing stays behind if a step fails.
    pub(crate) fn new(gpu: &dyn Gpu, pd: &Arc<OwnedPd>, plan: Plan) -> Result<Self, Error> {
        let state_plan = StatePlan::new(&plan);
        let pinned_plan = PinnedPlan::new(&plan);
        let source_plan = plan.source();
        let alloc = |len: u64| NicMemory::new(gpu, &*pd.hca, len);
        let window = alloc(plan.window_bytes())?;
        let combine_slab = alloc(plan.combine_slab_bytes())?;
        let source = alloc(source_plan.bytes)?;
        let state = gpu.alloc(bytes(state_plan.total), bytes(PAGE))?;
        let pinned = gpu.alloc_pinned(bytes(pinned_plan.total), bytes(PAGE))?;
        let (source_key, place) =
            OwnedMkey::register(pd, &source, source.addr(), source_plan.bytes, Access::LOCAL)?;
        let mut buffers = Self {
            peer_keys: Vec::new(),
            regions: (0..plan.shape.num_ranks).collect(),
            spare: (plan.shape.num_ranks..plan.num_regions()).collect(),
            source_key,
            pd: Arc::clone(pd),
            plan,
            source_plan,
            state_plan,
            pinned_plan,
            place,
            window,
            combine_slab,
            source,
            state,
            pinned,
        };
        for peer in 0..plan.shape.num_ranks {
            let keys = buffers.register_peer(Rank(peer as u16))?;
            buffers.peer_keys.push(Some(keys));
        }
        Ok(buffers)
    }

    /// Registers what `peer` may write: its region, and the combine slab under a key of its own.
    fn register_peer(&self, peer: Rank) -> Result<PeerKeys, Error> {
        let access =
            Access { local_write: true, remote_write: true, remote_read: false, remote_atomic: true };
        let register = |memory, addr, len| OwnedMkey::register(&self.pd, memory, addr, len, access);
        let (slab, slab_len) = self.combine_slab();
        Ok(PeerKeys {
            region: register(&self.window, self.region_addr(peer), self.plan.layout.region_bytes)?.0,
            combine: register(&self.combine_slab, slab, slab_len)?.0,
        })
    }

    /// Retires the keys of a dead incarnation and makes fresh ones for its successor; a retry goes on where a refusal
    /// stopped it.
    pub(crate) fn renew_peer_keys(&mut self, peer: Rank) -> Result<(), Error> {
        if let Some(keys) = self.peer_keys[peer.index()].as_mut() {
            keys.revoke()?;
        }
        self.peer_keys[peer.index()] = None;
        self.peer_keys[peer.index()] = Some(self.register_peer(peer)?);
        Ok(())
    }

    /// How the HCA reaches payload.
    pub(crate) fn place(&self) -> &PlaceReport {
        &self.place
    }

    pub(crate) fn peer_keys(&self, peer: Rank) -> Option<&PeerKeys> {
        self.peer_keys[peer.index()].as_ref()
    }

    pub(crate) fn region_addr(&self, source: Rank) -> u64 {
        self.region_at(self.regions[source.index()])
    }

    /// First byte of a region, whoever has it.
    pub(crate) fn region_at(&self, region: u32) -> u64 {
        self.window.addr() + self.plan.region_offset(region)
    }

    /// Is there a region to be had for a source whose own one may still be written by somebody else?
    pub(crate) fn has_spare_region(&self) -> bool {
        !self.spare.is_empty()
    }

    /// Gives `source` a spare region in place of its own, which is returned: nobody has it until it is given back. Its
    /// keys still name the old one.
    pub(crate) fn replace_region(&mut self, source: Rank) -> Option<u32> {
        let spare = self.spare.pop()?;
        Some(core::mem::replace(&mut self.regions[source.index()], spare))
    }

    /// Takes back a region that nobody can write into any more.
    pub(crate) fn give_back_region(&mut self, region: u32) {
        self.spare.push(region);
    }

    /// First byte and length of what one source may write.
    pub(crate) fn region(&self, source: Rank) -> (u64, u64) {
        (self.region_addr(source), self.plan.layout.region_bytes)
    }

    /// First byte and length of the combine slab.
    pub(crate) fn combine_slab(&self) -> (u64, u64) {
        (self.combine_slab.addr(), self.plan.combine_slab_bytes())
    }

    fn at(&self, offset: u64) -> u64 {
        self.state.addr() + offset
    }

    pub(crate) fn qp_ctx_addr(&self, peer: Rank, channel: u32) -> u64 {
        let index = u64::from(peer.0) * u64::from(self.plan.shape.num_channels) + u64::from(channel);
        self.at(self.state_plan.qps) + index * size_of::<QpDeviceCtx>() as u64
    }

    pub(crate) fn peer_ctx_addr(&self, peer: Rank) -> u64 {
        self.at(self.state_plan.peers) + u64::from(peer.0) * size_of::<PeerCtx>() as u64
    }

    pub(crate) fn suspect_addr(&self, peer: Rank) -> u64 {
        self.at(self.state_plan.suspects) + 4 * u64::from(peer.0)
    }

    pub(crate) fn fenced_below_addr(&self, peer: Rank) -> u64 {
        self.at(self.state_plan.fenced_below) + 8 * u64::from(peer.0)
    }

    pub(crate) fn table_addr(&self, index: usize) -> u64 {
        self.at(self.state_plan.tables) + (index * size_of::<MemberTable>()) as u64
    }

    pub(crate) fn owner_of_addr(&self, index: usize) -> u64 {
        self.at(self.state_plan.owner_of[index])
    }

    pub(crate) fn state_addr(&self) -> u64 {
        self.at(self.state_plan.state)
    }

    pub(crate) fn limits_addr(&self) -> u64 {
        self.at(self.state_plan.limits)
    }

    /// First byte and length of the row ring bookkeeping of one peer's queues.
    pub(crate) fn row_staging_pi(&self, peer: Rank) -> (u64, u64) {
        let s = &self.plan.shape;
        let per_peer = u64::from(s.num_channels) * u64::from(s.staging_rows) * 4;
        (self.at(self.state_plan.row_staging_pi) + u64::from(peer.0) * per_peer, per_peer)
    }

    pub(crate) fn host_words_addr(&self) -> u64 {
        self.pinned.addr() + self.pinned_plan.host_words
    }

    pub(crate) fn fault_addr(&self, peer: Rank) -> u64 {
        self.pinned.addr() + self.pinned_plan.faults + u64::from(peer.0) * size_of::<DeviceFault>() as u64
    }

    pub(crate) fn telemetry_addr(&self, peer: Rank) -> u64 {
        self.pinned.addr()
            + self.pinned_plan.telemetry
            + u64::from(peer.0) * size_of::<PeerTelemetry>() as u64
    }

    /// What every launch on this lane carries.
    pub(crate) fn lane_args(&self, lane: u32, qp_slot_base: u32) -> LaneArgs {
        let p = &self.state_plan;
        LaneArgs {
            shape: self.plan.shape,
            layout: self.plan.layout,
            qps: self.at(p.qps),
            peers: self.at(p.peers),
            suspects: self.at(p.suspects),
            fenced_below: self.at(p.fenced_below),
            tables: self.at(p.tables),
            state: self.at(p.state),
            cursors: self.at(p.cursors),
            limits: self.at(p.limits),
            host_words: self.host_words_addr(),
            faults: self.fault_addr(Rank(0)),
            telemetry: self.telemetry_addr(Rank(0)),
            combine_slab: self.combine_slab.addr(),
            staging: self.source.addr(),
            staging_ready: self.at(p.staging_ready),
            counts_staging: self.source.addr() + self.source_plan.counts_off,
            row_staging: self.source.addr() + self.source_plan.rows_off,
            row_staging_pi: self.at(p.row_staging_pi),
            atomic_result: self.source.addr() + self.source_plan.atomics_off,
            lkey_be: self.source_key.key().lkey.get().to_be(),
            lane,
            qp_slot_base,
            guards_off: 0,
        }
    }

    /// Addresses of one dispatch handle.
    pub(crate) fn handle(&self, index: usize) -> HandleArrays {
        let h = &self.state_plan.handles[index];
        HandleArrays {
            ctx: self.at(h.ctx),
            pick_owner: self.at(h.pick_owner),
            sent_picks: self.at(h.sent_picks),
            sent_messages: self.at(h.sent_messages),
            verdicts: self.at(h.verdicts),
            ranges_ready: self.at(h.ranges_ready),
            pack_cursor: self.at(h.pack_cursor),
            ranges: self.at(h.ranges),
            headers: self.at(h.headers),
            source_ok: self.at(h.source_ok),
        }
    }

    /// Addresses of one combine ticket: its context and its verdicts.
    pub(crate) fn ticket(&self, index: usize) -> (u64, u64) {
        let t = &self.state_plan.tickets[index];
        (self.at(t.ctx), self.at(t.verdicts))
    }

    /// Bytes allocated for this lane; all but the pinned words and the state are registered.
    pub(crate) fn allocated_bytes(&self) -> u64 {
        Self::bytes_for(&self.plan)
    }

    /// The same, before anything is allocated.
    pub(crate) fn bytes_for(plan: &Plan) -> u64 {
        plan.window_bytes()
            + plan.combine_slab_bytes()
            + plan.source().bytes
            + StatePlan::new(plan).total
            + PinnedPlan::new(plan).total
    }

    /// Writes one structure of the state area.
    pub(crate) fn write<T: IntoBytes + zerocopy::Immutable>(
        gpu: &dyn Gpu,
        addr: u64,
        value: &T,
    ) -> Result<(), Error> {
        Ok(gpu.write(addr, value.as_bytes())?)
    }
}
