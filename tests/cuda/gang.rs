//! All ranks of a group in one launch: a GPU per rank that waits until every rank has launched the same, and then
//! launches once for all.
//!
//! Sanitizers run one launch at a time, and kernels of ranks wait for each other: launched apart they would never end.
//! A [`Gang`] owns the GPU that all its ranks share, one stream, and the argument structs of everything launched.

#![allow(dead_code, reason = "each test binary uses a part")]

use core::time::Duration;
use std::collections::VecDeque;
use std::sync::Arc;

use ibex::gpu::{DeviceMemory, Event, Gpu, GpuError, Graph, KernelId, Launch, NicWays, Reachable, Stream};
use ibex_abi::device_ctx::GroupArgs;
use parking_lot::Mutex;
use zerocopy::IntoBytes;

/// A launch that waits for the other ranks'.
struct Waiting {
    kernel: KernelId,
    args: Vec<u8>,
    blocks: u32,
    warps_per_block: u32,
}

/// What the ranks of a gang share.
struct Gang {
    gpu: Arc<dyn Gpu>,
    stream: Stream,
    waiting: Mutex<(Vec<VecDeque<Waiting>>, Vec<DeviceMemory>)>,
}

/// One rank's GPU.
pub(crate) struct GangGpu {
    gang: Arc<Gang>,
    rank: usize,
}

/// A GPU for each of `num_ranks` ranks, all of them `gpu`.
pub(crate) fn gang(gpu: Arc<dyn Gpu>, num_ranks: usize) -> Vec<Arc<dyn Gpu>> {
    let stream = gpu.stream();
    let queues = (0..num_ranks).map(|_| VecDeque::new()).collect();
    let gang = Arc::new(Gang { gpu, stream, waiting: Mutex::new((queues, Vec::new())) });
    (0..num_ranks).map(|rank| Arc::new(GangGpu { gang: Arc::clone(&gang), rank }) as Arc<dyn Gpu>).collect()
}

/// The kernel that is `kernel` of all ranks.
fn of_all_ranks(kernel: KernelId) -> KernelId {
    match kernel {
        KernelId::DispatchBf16 => KernelId::GroupDispatchBf16,
        KernelId::DispatchFp8 => KernelId::GroupDispatchFp8,
        KernelId::CombineExact => KernelId::GroupCombineExact,
        KernelId::CombineReduced => KernelId::GroupCombineReduced,
        KernelId::Expert => KernelId::GroupExpert,
        other => panic!("{other:?} has no group kernel"),
    }
}

impl Gang {
    /// Launches what every rank has launched.
    fn launch_complete(&self) -> Result<(), GpuError> {
        let (queues, kept) = &mut *self.waiting.lock();
        while queues.iter().all(|queue| !queue.is_empty()) {
            let all: Vec<Waiting> = queues.iter_mut().filter_map(VecDeque::pop_front).collect();
            let first = &all[0];
            let is_same = |one: &Waiting| (one.kernel, one.blocks) == (first.kernel, first.blocks);
            assert!(all.iter().all(is_same), "ranks launch the same in the same order");
            let bytes: Vec<u8> = all.iter().flat_map(|one| one.args.iter().copied()).collect();
            let memory = self.gpu.alloc(bytes.len(), 64)?;
            self.gpu.write(memory.addr(), &bytes)?;
            let args = GroupArgs { args: memory.addr(), num_ranks: all.len() as u32, reserved: 0 };
            kept.push(memory);
            let launch = Launch {
                kernel: of_all_ranks(first.kernel),
                args: args.as_bytes(),
                blocks: first.blocks * all.len() as u32,
                warps_per_block: first.warps_per_block,
            };
            // SAFETY: every rank vouched for its part, and the structs are kept as long as the gang.
            unsafe { self.gpu.launch(&self.stream, &launch) }?;
        }
        Ok(())
    }
}

impl Gpu for GangGpu {
    unsafe fn launch(&self, _: &Stream, launch: &Launch<'_>) -> Result<(), GpuError> {
        let Launch { kernel, args, blocks, warps_per_block } = *launch;
        let waiting = Waiting { kernel, args: args.to_vec(), blocks, warps_per_block };
        self.gang.waiting.lock().0[self.rank].push_back(waiting);
        self.gang.launch_complete()
    }

    fn stream(&self) -> Stream {
        self.gang.stream.clone()
    }

    fn max_coresident_blocks(&self, warps_per_block: u32) -> u32 {
        let ranks = self.gang.waiting.lock().0.len() as u32;
        self.gang.gpu.max_coresident_blocks(warps_per_block) / ranks
    }

    fn alloc(&self, len: usize, align: usize) -> Result<DeviceMemory, GpuError> {
        self.gang.gpu.alloc(len, align)
    }

    fn alloc_pinned(&self, len: usize, align: usize) -> Result<DeviceMemory, GpuError> {
        self.gang.gpu.alloc_pinned(len, align)
    }

    unsafe fn reach(&self, addr: u64, len: usize, what: Reachable) -> Result<DeviceMemory, GpuError> {
        // SAFETY: the caller's contract.
        unsafe { self.gang.gpu.reach(addr, len, what) }
    }

    fn write(&self, addr: u64, bytes: &[u8]) -> Result<(), GpuError> {
        self.gang.gpu.write(addr, bytes)
    }

    fn read(&self, addr: u64, bytes: &mut [u8]) -> Result<(), GpuError> {
        self.gang.gpu.read(addr, bytes)
    }

    fn fill(&self, addr: u64, byte: u8, len: usize) -> Result<(), GpuError> {
        self.gang.gpu.fill(addr, byte, len)
    }

    fn load_u32(&self, addr: u64) -> Result<u32, GpuError> {
        self.gang.gpu.load_u32(addr)
    }

    fn store_u32(&self, addr: u64, value: u32) -> Result<(), GpuError> {
        self.gang.gpu.store_u32(addr, value)
    }

    fn load_u64(&self, addr: u64) -> Result<u64, GpuError> {
        self.gang.gpu.load_u64(addr)
    }

    fn store_u64(&self, addr: u64, value: u64) -> Result<(), GpuError> {
        self.gang.gpu.store_u64(addr, value)
    }

    fn event(&self) -> Event {
        self.gang.gpu.event()
    }

    fn record(&self, event: &Event, stream: &Stream) -> Result<(), GpuError> {
        self.gang.gpu.record(event, stream)
    }

    fn wait(&self, event: &Event, stream: &Stream) -> Result<(), GpuError> {
        self.gang.gpu.wait(event, stream)
    }

    fn query(&self, event: &Event) -> Result<bool, GpuError> {
        self.gang.gpu.query(event)
    }

    fn elapsed_ns(&self, start: &Event, end: &Event) -> Result<u64, GpuError> {
        self.gang.gpu.elapsed_ns(start, end)
    }

    fn begin_capture(&self, stream: &Stream) -> Result<(), GpuError> {
        self.gang.gpu.begin_capture(stream)
    }

    fn end_capture(&self, stream: &Stream) -> Result<Graph, GpuError> {
        self.gang.gpu.end_capture(stream)
    }

    fn is_capturing(&self, stream: &Stream) -> Result<bool, GpuError> {
        self.gang.gpu.is_capturing(stream)
    }

    fn replay(&self, graph: &Graph, stream: &Stream) -> Result<(), GpuError> {
        self.gang.gpu.replay(graph, stream)
    }

    fn synchronize(&self, stream: &Stream) -> Result<(), GpuError> {
        self.gang.gpu.synchronize(stream)
    }

    fn wait_for(&self, timeout: Duration, reached: &mut dyn FnMut() -> bool) -> Result<bool, GpuError> {
        self.gang.gpu.wait_for(timeout, reached)
    }

    fn export(&self, addr: u64, len: usize) -> Result<Vec<u8>, GpuError> {
        self.gang.gpu.export(addr, len)
    }

    fn import(&self, handle: &[u8]) -> Result<DeviceMemory, GpuError> {
        self.gang.gpu.import(handle)
    }

    fn nic_ways(&self, addr: u64, is_on_bus: bool) -> Result<NicWays, GpuError> {
        self.gang.gpu.nic_ways(addr, is_on_bus)
    }

    fn captured_args(&self, graph: &Graph) -> Result<Vec<Vec<u8>>, GpuError> {
        self.gang.gpu.captured_args(graph)
    }

    fn allocated_bytes(&self) -> u64 {
        self.gang.gpu.allocated_bytes()
    }

    fn captures(&self) -> u64 {
        self.gang.gpu.captures()
    }
}
