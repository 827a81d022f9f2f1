//! Work requests and nothing else: the post kernel drives queue pairs of one device at memory of another.
//!
//! A [`PostRig`] owns two emulated devices on one fabric, a GPU of one worker thread that also steps the
//! devices whenever the kernel waits, a control region with the queue pairs, and the memory that messages
//! leave from and arrive in. So one thread does everything, and a rate needs no second core to be its own.
//! Where a GPU is given, its kernel posts to rings, records and doorbell pages in mapped host memory, and a thread
//! steps the devices.
//! Each round gives every WQE a slot of its own at the target, wiped before, so that every WQE is
//! checked in memory after it.
//!
//! Fields drop in declaration order: queue pairs and keys go first, memory goes last.

use std::sync::Arc;

use ibex_abi::device_ctx::{PeerCtx, PostArgs, QpDeviceCtx, code};
use ibex_abi::types::{CqNum, Iova, Pd, Psn, QpNum};
use ibex_hca::control_region::{Carved, ControlRegion};
use ibex_hca::emulated::{Doorbells, EmulatedConfig, EmulatedHca, Fabric, FabricConfig};
use ibex_hca::objects::{self, CqSpec, InitSpec, Place, QpSpec, RtrSpec, RtsSpec};
use ibex_hca::{Access, DoorbellPage, Hca, LinkLayer, MemoryKind, MemoryRegion, Mkey, Nanos};
use zerocopy::{FromZeros, IntoBytes};

use crate::config::Link;
use crate::error::{ConfigError, Error, Limit};
use crate::gpu::pool::{Pool, PoolConfig, Progress, Progressed};
use crate::gpu::{DeviceMemory, Gpu, GpuError, HostGpu, KernelId, Launch, Reachable, Stream};
use crate::layout::PAGE;
use crate::session::Stepper;

mod copies;

pub use copies::Copies;

/// Payload of an inline WQE of one basic block.
pub const INLINE_LEN: u32 = 28;
/// Bytes of a WQE basic block.
const WQEBB: u64 = 64;
/// Targets of inline messages are naturally aligned.
const INLINE_STRIDE: u64 = 32;
/// Bytes of a doorbell register.
const DOORBELL_LEN: usize = 8;
/// WQEs of one batch, at most: one per lane.
const BATCH_MAX: u32 = 32;
/// Most queue pairs of a rig.
pub const NUM_QPS_MAX: u32 = 64;
/// Most messages of one queue pair and round.
pub const SLOTS_MAX: u32 = 1 << 20;
/// Largest message.
pub const BYTES_MAX: u32 = 1 << 20;
/// A round that takes longer has lost a WQE.
const TIMEOUT_NS: u64 = 10_000_000_000;

/// What is posted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PostCase {
    /// Bytes of one message; [`INLINE_LEN`] where `inline`.
    pub bytes: u32,
    /// The payload stands in the WQE itself.
    pub inline: bool,
    /// Queue pairs, each posted by a warp of its own.
    pub num_qps: u32,
    /// Messages per queue pair and round.
    pub slots: u32,
    /// WQEs per doorbell.
    pub batch: u32,
    /// Send queue depth, log2 of WQEBBs.
    pub sq_depth_log: u8,
}

impl PostCase {
    /// Whether the post kernel and one rig can run it.
    ///
    /// # Errors
    /// The first field outside its limit.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let range = |field, value: u32, min: u32, max: u32| {
            let limit = Limit::Range { min: min.into(), max: max.into() };
            let error = ConfigError { field, value: value.into(), limit };
            if (min..=max).contains(&value) { Ok(()) } else { Err(error) }
        };
        match self.inline {
            true => range("bytes", self.bytes, INLINE_LEN, INLINE_LEN)?,
            false => range("bytes", self.bytes, 1, BYTES_MAX)?,
        }
        range("num_qps", self.num_qps, 1, NUM_QPS_MAX)?;
        range("slots", self.slots, 1, SLOTS_MAX)?;
        range("sq_depth_log", self.sq_depth_log.into(), 0, 15)?;
        range("batch", self.batch, 1, BATCH_MAX.min(1 << self.sq_depth_log))
    }

    fn stride(&self) -> u64 {
        if self.inline { INLINE_STRIDE } else { u64::from(self.bytes).next_multiple_of(16) }
    }

    /// Messages of one round.
    #[must_use]
    pub fn wqes(&self) -> u64 {
        u64::from(self.num_qps) * u64::from(self.slots)
    }

    fn source_len(&self) -> u64 {
        u64::from(self.slots) * self.stride()
    }
}

/// What one round did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PostRound {
    /// From the launch of the kernel to its end.
    pub elapsed_ns: u64,
    /// WQEs that the kernel saw completed.
    pub completed: u64,
    /// Messages that are not at the target as they were sent.
    pub wrong: u64,
}

/// One live queue pair of the initiator, its blocks, and its other end.
struct Queue {
    qpn: QpNum,
    cqn: CqNum,
    doorbell: DoorbellPage,
    /// The register as the kernel sees it.
    register: DeviceMemory,
    ring: Carved,
    cqe: Carved,
    record: Carved,
    /// The queue pair at the target that answers it.
    far: (QpNum, CqNum, DoorbellPage, [Carved; 3]),
}

/// Steps both devices whenever the kernel waits.
struct Devices([Arc<EmulatedHca>; 2]);

impl Progress for Devices {
    fn progress(&self, _worker: u32, now_ns: u64, _random: u64) -> Progressed {
        let steps = self.0.each_ref().map(|device| device.step(Nanos(now_ns)));
        if steps.iter().any(|step| step.did_work) {
            return Progressed::Worked;
        }
        let deadlines = steps.iter().filter_map(|step| step.next_deadline);
        Progressed::Idle { next_deadline_ns: deadlines.min().map(|deadline| deadline.0) }
    }
}

/// See the module documentation.
pub struct PostRig {
    case: PostCase,
    queues: Vec<Queue>,
    keys: Vec<(Arc<dyn Hca>, Mkey)>,
    seed: u64,
    round: u32,
    args: PostArgs,
    stream: Stream,
    near: Arc<EmulatedHca>,
    far: Arc<EmulatedHca>,
    gpu: Arc<dyn Gpu>,
    _regions: [ControlRegion; 2],
    source: DeviceMemory,
    target: DeviceMemory,
    result: DeviceMemory,
    _contexts: [DeviceMemory; 2],
    _control: DeviceMemory,
    // Last: queue pairs are destroyed while devices work.
    _stepper: Option<Stepper>,
}

impl PostRig {
    /// Connects `case.num_qps` queue pairs; payloads are drawn from `seed`.
    ///
    /// # Errors
    /// `Config` for a case outside its limits; else what the GPU, the HCA or the operating system refused.
    pub fn new(case: PostCase, link: Link, seed: u64) -> Result<Self, Error> {
        Self::on(None, case, link, seed)
    }

    /// The same, posted by a GPU whose memory the host reaches ([`CudaMemory::HostMapped`](crate::gpu::CudaMemory)).
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn with_gpu(gpu: Arc<dyn Gpu>, case: PostCase, link: Link, seed: u64) -> Result<Self, Error> {
        Self::on(Some(gpu), case, link, seed)
    }

    fn on(given: Option<Arc<dyn Gpu>>, case: PostCase, link: Link, seed: u64) -> Result<Self, Error> {
        case.validate()?;
        let link = match link {
            Link::Ib => LinkLayer::Ib,
            Link::Roce => LinkLayer::Roce,
        };
        let fabric = Fabric::inproc(FabricConfig::default());
        let config = EmulatedConfig { link, doorbells: Doorbells::Strict, ..EmulatedConfig::default() };
        let near = EmulatedHca::new(Arc::clone(&fabric), config)?;
        let far = EmulatedHca::new(fabric, config)?;
        let devices = Devices([Arc::clone(&near), Arc::clone(&far)]);
        let (gpu, stepper) = machine(given, Arc::new(devices))?;
        let alloc = |len: u64| gpu.alloc(size(len), size(PAGE));
        let source = alloc(case.source_len())?;
        let target = alloc(u64::from(case.num_qps) * case.source_len())?;
        let result = alloc(u64::from(case.num_qps) * 8)?;
        let num_qps = case.num_qps as usize;
        let contexts = [
            alloc((num_qps * size_of::<QpDeviceCtx>()) as u64)?,
            alloc((num_qps * size_of::<PeerCtx>()) as u64)?,
        ];
        let per_queue = (WQEBB << case.sq_depth_log).next_multiple_of(PAGE) + PAGE;
        let control = alloc(u64::from(case.num_qps) * per_queue + PAGE)?;

        let (near_hca, far_hca): (Arc<dyn Hca>, Arc<dyn Hca>) = (near.clone(), far.clone());
        let near_region = register_control(&near_hca, &control)?;
        let far_region = ControlRegion::host(&far_hca, u64::from(case.num_qps) * 3 * PAGE + PAGE)?;
        let pds = [near_hca.alloc_pd()?, far_hca.alloc_pd()?];
        let source_key = register(&near_hca, pds[0], &source, Access::LOCAL)?;
        let target_key = register(&far_hca, pds[1], &target, Access::ALL)?;
        let args = PostArgs {
            qps: contexts[0].addr(),
            peers: contexts[1].addr(),
            source: source.addr(),
            source_stride: case.stride(),
            target_stride: case.stride(),
            timeout_ns: TIMEOUT_NS,
            result: result.addr(),
            num_qps: case.num_qps,
            wqes_per_qp: case.slots,
            bytes: case.bytes,
            inline_data: u32::from(case.inline),
            batch: case.batch,
            lkey_be: source_key.lkey.get().to_be(),
            target_slots: case.slots,
            ..PostArgs::new_zeroed()
        };
        let mut rig = Self {
            case,
            queues: Vec::new(),
            keys: vec![(near_hca, source_key), (far_hca, target_key)],
            seed,
            round: 0,
            args,
            stream: gpu.stream(),
            near,
            far,
            gpu,
            _regions: [near_region, far_region],
            source,
            target,
            result,
            _contexts: contexts,
            _control: control,
            _stepper: stepper,
        };
        for index in 0..case.num_qps {
            rig.connect(index, pds)?;
        }
        rig.write_contexts(target_key)?;
        Ok(rig)
    }

    /// Creates queue pair `index` and its other end, and brings both to RTS.
    fn connect(&mut self, index: u32, pds: [Pd; 2]) -> Result<(), Error> {
        let (near, far) = (&*self.near, &*self.far);
        let near_doorbell = near.alloc_doorbell()?;
        let register = reach(&*self.gpu, near_doorbell)?;
        let (qpn, cqn, [ring, cqe, record]) =
            self.create(near, &self._regions[0], pds[0], near_doorbell, self.case.sq_depth_log, index)?;
        let far_doorbell = far.alloc_doorbell()?;
        let (far_qpn, far_cqn, far_blocks) =
            self.create(far, &self._regions[1], pds[1], far_doorbell, 2, index)?;
        // Far from zero, so that both ends wrap in a long run.
        let psns = [Psn::new(0x00ff_fff0), Psn::new(0x0080_0000)];
        join(near, qpn, far_qpn, psns, far)?;
        join(far, far_qpn, qpn, [psns[1], psns[0]], near)?;
        let far = (far_qpn, far_cqn, far_doorbell, far_blocks);
        self.queues.push(Queue { qpn, cqn, doorbell: near_doorbell, register, ring, cqe, record, far });
        Ok(())
    }

    fn create(
        &self,
        hca: &dyn Hca,
        region: &ControlRegion,
        pd: Pd,
        doorbell: DoorbellPage,
        sq_log: u8,
        user_index: u32,
    ) -> Result<(QpNum, CqNum, [Carved; 3]), Error> {
        let cq_log = hca.caps().log_min_cq_sz;
        let ring = region.carve_ring(WQEBB << sq_log)?;
        let cqe = region.carve(64 << cq_log, WQEBB)?;
        let record = region.carve_record()?;
        match cqe.view() {
            Some(view) => view.fill(0xff),
            None => self.gpu.fill(cqe.addr(), 0xff, size(cqe.len()))?,
        }
        let place = record.place();
        let cq = CqSpec {
            eqn: hca.eqn(0)?,
            log_size: cq_log,
            ring: cqe.place(),
            record: Place { offset: place.offset + 8, ..place },
            uar: doorbell.uar,
            collapsed: true,
            overrun_ignore: true,
        };
        let cqn = objects::create_cq(hca, &cq)?;
        let qp = QpSpec {
            pd,
            log_sq_size: sq_log,
            recv: None,
            rings: ring.place(),
            record: place,
            uar: doorbell.uar,
            send_cq: cqn,
            recv_cq: cqn,
            user_index,
        };
        Ok((objects::create_qp(hca, &qp)?, cqn, [ring, cqe, record]))
    }

    fn write_contexts(&self, target_key: Mkey) -> Result<(), Error> {
        for (index, queue) in (0u32..).zip(&self.queues) {
            let qp = QpDeviceCtx {
                sq: queue.ring.addr(),
                // The record is {receive counter, send counter}, 4 bytes each.
                doorbell_record: queue.record.addr() + 4,
                doorbell: queue.register.addr(),
                cqe: queue.cqe.addr(),
                sq_mask: (1 << self.case.sq_depth_log) - 1,
                qpn_be: (queue.qpn.get() << 8).to_be(),
                state: code::QP_ACTIVE,
                ..QpDeviceCtx::new_zeroed()
            };
            let peer = PeerCtx {
                region_va: self.target.addr() + u64::from(index) * self.case.source_len(),
                region_rkey_be: target_key.rkey.get().to_be(),
                route: code::ROUTE_IBGDA,
                ..PeerCtx::new_zeroed()
            };
            let place = |base: u64, len: usize| base + u64::from(index) * len as u64;
            self.gpu.write(place(self.args.qps, size_of::<QpDeviceCtx>()), qp.as_bytes())?;
            self.gpu.write(place(self.args.peers, size_of::<PeerCtx>()), peer.as_bytes())?;
        }
        Ok(())
    }

    /// The case that this rig runs.
    #[must_use]
    pub fn case(&self) -> &PostCase {
        &self.case
    }

    /// WQEs that a record covered and no doorbell did; nobody posts between two rounds.
    #[must_use]
    pub fn unrung_wqes(&self) -> u64 {
        self.near.check_unrung();
        self.near.counters().unrung_wqes
    }

    /// Posts one message to every slot, waits, and checks every slot at the target.
    ///
    /// # Errors
    /// What the GPU refused or reports.
    pub fn round(&mut self) -> Result<PostRound, Error> {
        self.round += 1;
        let messages = self.messages();
        self.gpu.write(self.source.addr(), &messages)?;
        self.gpu.fill(self.target.addr(), 0, self.target.len())?;
        let (start, end) = (self.gpu.event(), self.gpu.event());
        self.gpu.record(&start, &self.stream)?;
        self.launch()?;
        self.gpu.record(&end, &self.stream)?;
        self.gpu.synchronize(&self.stream)?;
        let mut round = PostRound { elapsed_ns: self.gpu.elapsed_ns(&start, &end)?, ..PostRound::default() };
        for index in 0..u64::from(self.case.num_qps) {
            let mut completed = [0; 8];
            self.gpu.read(self.result.addr() + 8 * index, &mut completed)?;
            round.completed += u64::from_le_bytes(completed);
            round.wrong += self.count_wrong(index, &messages)?;
        }
        Ok(round)
    }

    #[expect(unsafe_code, reason = "arguments carry addresses of memory that this rig owns")]
    fn launch(&self) -> Result<(), Error> {
        let launch = Launch {
            kernel: KernelId::Post,
            args: self.args.as_bytes(),
            blocks: 1,
            warps_per_block: self.case.num_qps.min(32),
        };
        // SAFETY: `args` is the argument struct of this kernel; every address in it belongs to memory of this rig,
        // which waits for the stream before it touches or drops any of it.
        unsafe { self.gpu.launch(&self.stream, &launch)? };
        Ok(())
    }

    /// What is sent: slot after slot; inline messages repeat their index, others a pattern of seed and round.
    fn messages(&self) -> Vec<u8> {
        let mut messages = vec![0; size(self.case.source_len())];
        let stride = size(self.case.stride());
        // CAST: the upper half of the product, where neighbouring seeds are far apart.
        let seed = (self.seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32) as u32;
        for (slot, message) in (0u32..).zip(messages.chunks_exact_mut(stride)) {
            let message = &mut message[..self.case.bytes as usize];
            let word = |i: u32| match self.case.inline {
                true => slot,
                // An odd multiplier gives each word of each slot and round a value of its own.
                false => {
                    let place = self.round ^ slot.rotate_left(12) ^ i.rotate_left(22);
                    (seed ^ place).wrapping_mul(0x9e37_79b1) | 1
                }
            };
            for (i, chunk) in (0u32..).zip(message.chunks_mut(4)) {
                chunk.copy_from_slice(&word(i).to_le_bytes()[..chunk.len()]);
            }
        }
        messages
    }

    fn count_wrong(&self, queue: u64, messages: &[u8]) -> Result<u64, Error> {
        let mut arrived = vec![0; messages.len()];
        self.gpu.read(self.target.addr() + queue * self.case.source_len(), &mut arrived)?;
        if arrived == messages {
            return Ok(0);
        }
        let stride = size(self.case.stride());
        let slots = arrived.chunks_exact(stride).zip(messages.chunks_exact(stride));
        Ok(slots.filter(|(there, sent)| there != sent).count() as u64)
    }
}

impl Drop for PostRig {
    /// Best effort: a device that refuses keeps its objects, which only this process can see.
    fn drop(&mut self) {
        let (near, far) = (&*self.near, &*self.far);
        for queue in &self.queues {
            let (far_qpn, far_cqn, far_doorbell, _) = &queue.far;
            for (hca, qpn, cqn, doorbell) in [
                (near as &dyn Hca, queue.qpn, queue.cqn, queue.doorbell),
                (far as &dyn Hca, *far_qpn, *far_cqn, *far_doorbell),
            ] {
                let _ = objects::to_reset(hca, qpn);
                let _ = objects::destroy_qp(hca, qpn);
                let _ = objects::destroy_cq(hca, cqn);
                let _ = hca.free_doorbell(doorbell);
            }
        }
        for (hca, key) in &self.keys {
            let _ = hca.deregister(*key);
        }
    }
}

/// RST -> RTS for `qpn` of `hca`, whose other end is `remote_qpn` at `other`. `psns`: ours, theirs.
fn join(hca: &dyn Hca, qpn: QpNum, remote_qpn: QpNum, psns: [Psn; 2], other: &dyn Hca) -> Result<(), Error> {
    let port_num = hca.port().port_num;
    objects::rst2init(hca, &InitSpec { qpn, pkey_index: hca.pkey_index(), port_num, access: Access::ALL })?;
    let rtr = RtrSpec {
        qpn,
        remote_qpn,
        rq_psn: psns[1],
        path: hca.resolve(&other.port().address())?,
        mtu: hca.port().mtu,
        min_rnr_nak: 12,
        log_rra_max: 0,
    };
    objects::init2rtr(hca, &rtr)?;
    let rts = RtsSpec { qpn, sq_psn: psns[0], ack_timeout: 16, retry_count: 7, rnr_retry: 7, log_sra_max: 0 };
    Ok(objects::rtr2rts(hca, &rts)?)
}

/// The GPU that posts, and what steps the devices if its own threads do not.
fn machine(
    given: Option<Arc<dyn Gpu>>,
    devices: Arc<Devices>,
) -> Result<(Arc<dyn Gpu>, Option<Stepper>), Error> {
    if let Some(gpu) = given {
        return Ok((gpu, Some(Stepper::start(devices)?)));
    }
    let pool = Pool::new(PoolConfig::real_time(1).with_progress(devices)).map_err(GpuError::from)?;
    Ok((Arc::new(HostGpu::new(Arc::new(pool), 0)), None))
}

/// Lets the kernel ring a doorbell.
#[expect(unsafe_code, reason = "a device's pages are mapped by the device; it keeps them while it lives")]
fn reach(gpu: &dyn Gpu, page: DoorbellPage) -> Result<DeviceMemory, Error> {
    // SAFETY: devices keep doorbell pages mapped until they are dropped, and the rig holds its devices.
    Ok(unsafe { gpu.reach(page.register, DOORBELL_LEN, Reachable::Memory) }?)
}

fn region_of(memory: &DeviceMemory) -> MemoryRegion {
    MemoryRegion { addr: memory.addr(), len: memory.len() as u64, kind: MemoryKind::HostPtr }
}

#[expect(unsafe_code, reason = "registration lets the HCA reach memory; the rig keeps it alive")]
fn register(hca: &Arc<dyn Hca>, pd: Pd, memory: &DeviceMemory, access: Access) -> Result<Mkey, Error> {
    // SAFETY: the rig owns the memory, reads it only through copies, and deregisters the key before it drops it.
    Ok(unsafe { hca.register(pd, region_of(memory), Iova(memory.addr()), access)? })
}

#[expect(unsafe_code, reason = "registration lets the HCA reach memory; the rig keeps it alive")]
fn register_control(hca: &Arc<dyn Hca>, memory: &DeviceMemory) -> Result<ControlRegion, Error> {
    // SAFETY: the rig owns both and drops the memory last: fields drop in declaration order.
    Ok(unsafe { ControlRegion::external(hca, region_of(memory), None)? })
}

fn size(len: u64) -> usize {
    // CAST: only 64-bit hosts are supported.
    len as usize
}

#[cfg(test)]
mod tests;
