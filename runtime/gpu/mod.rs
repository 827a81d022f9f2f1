//! The seam to a GPU: memory, streams, events, launches and captured graphs.
//!
//! [`Gpu`] is all that the rest of the runtime knows of the machine that runs kernels. [`HostGpu`]
//! runs the same kernel source on the CPU, [`CudaGpu`] on a GPU.
//!
//! Who owns what: a [`DeviceMemory`] owns its bytes and gives them back when dropped, but not
//! before every launch that was queued on its GPU has finished. Kernels, the HCA and other ranks
//! write that memory at any time, so the host looks at it only through copies ([`Gpu::read`]) and
//! single words ([`Gpu::load_u64`]), never by reference.
//!
//! Invariants:
//! - Work of one stream runs in the order in which it was queued; nothing else orders work but events.
//! - A wait can only name an event that was recorded before, so streams never wait for each other
//!   in a circle.
//! - Arguments are copied when a launch is queued or captured; later changes of the caller's bytes
//!   have no effect.
//! - Capture runs nothing, and a replay runs exactly the captured bytes.

use core::time::Duration;
use std::any::Any;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

pub mod cuda;
mod error;
pub mod host;
pub mod image;
mod nic;
pub mod pool;

pub use cuda::{CudaGpu, CudaMemory, CudaOptions, CudaSharing};
pub use error::{CaptureError, GpuError, GpuField, HandleKind};
pub use host::{Backing, HostGpu};
pub use nic::{NicWay, NicWays};
pub use pool::{ARGS_LEN_MAX, WARPS_PER_BLOCK_MAX};

/// A kernel, by the number under which both sides know it (kernels/include/ibex/kernel_list.h).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u32)]
#[non_exhaustive]
pub enum KernelId {
    /// Tokens out to experts, as bf16.
    DispatchBf16 = 0,
    /// Results back, every row weighted and summed at the source.
    CombineExact = 1,
    /// The post microbenchmark.
    Post = 2,
    /// The stand-in expert of benches and tests.
    Expert = 3,
    /// The self-test of the SIMT layer: collectives, barriers, atomics, copies.
    Selftest = 4,
    /// The self-test in which two devices pass a payload to and fro.
    SelftestPair = 5,
    /// The self-test that measures what a launch costs.
    SelftestEmpty = 6,
    /// Tokens out to experts, as fp8 with scales.
    DispatchFp8 = 8,
    /// Results back, summed at the expert's side first.
    CombineReduced = 9,
    /// [`KernelId::DispatchBf16`] of all ranks of a group in one launch, as its siblings below: for sanitizers, which
    /// may run launches one after the other.
    GroupDispatchBf16 = 10,
    /// [`KernelId::DispatchFp8`] of all ranks.
    GroupDispatchFp8 = 11,
    /// [`KernelId::CombineExact`] of all ranks.
    GroupCombineExact = 12,
    /// [`KernelId::CombineReduced`] of all ranks.
    GroupCombineReduced = 13,
    /// [`KernelId::Expert`] of all ranks.
    GroupExpert = 14,
}

/// One kernel launch as a caller describes it.
#[derive(Debug, Clone, Copy)]
pub struct Launch<'a> {
    /// Which kernel.
    pub kernel: KernelId,
    /// The bytes of its argument struct; copied.
    pub args: &'a [u8],
    /// Blocks; all of them run at the same time, so this is bounded by [`Gpu::max_coresident_blocks`].
    pub blocks: u32,
    /// Warps of each block, 1 to [`WARPS_PER_BLOCK_MAX`].
    pub warps_per_block: u32,
}

/// What stands behind addresses that kernels are to reach.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reachable {
    /// Memory of the host.
    Memory,
    /// Registers of a device.
    Registers,
}

/// A machine that runs kernels.
///
/// All methods may be called from any thread. Handles are cheap to clone and belong to the GPU that
/// made them; another one answers [`GpuError::ForeignHandle`].
pub trait Gpu: Send + Sync {
    /// Allocates `len` zeroed bytes that kernels and the HCA can reach, aligned to at least `align`.
    ///
    /// # Errors
    /// `OutOfRange` for an empty or unaddressable length, `BadAlignment`, `Os` when memory is exhausted.
    fn alloc(&self, len: usize, align: usize) -> Result<DeviceMemory, GpuError>;

    /// Allocates `len` zeroed bytes of host memory that kernels can reach and the host can read
    /// while they run.
    ///
    /// # Errors
    /// As [`Gpu::alloc`].
    fn alloc_pinned(&self, len: usize, align: usize) -> Result<DeviceMemory, GpuError>;

    /// Lets kernels reach `len` bytes at `addr` that the host or a device has mapped into this process, such as a
    /// doorbell page. The result says where kernels see them, and ends the reach when it is dropped.
    ///
    /// # Errors
    /// What the driver refused: for registers, the right to map them.
    ///
    /// # Safety
    /// The pages around the range stay mapped until the result is dropped, and are expected to change at any time.
    #[expect(unsafe_code, reason = "only the caller knows how long a mapping lives")]
    unsafe fn reach(&self, addr: u64, len: usize, what: Reachable) -> Result<DeviceMemory, GpuError>;

    /// Copies `bytes` to `addr` and returns when they stand there. Not ordered with streams.
    ///
    /// # Errors
    /// `NotAllocated` unless the whole range lies in one live allocation of this GPU.
    fn write(&self, addr: u64, bytes: &[u8]) -> Result<(), GpuError>;

    /// Copies memory at `addr` into `bytes`. Not ordered with streams: synchronize first to see a
    /// kernel's result.
    ///
    /// # Errors
    /// As [`Gpu::write`].
    fn read(&self, addr: u64, bytes: &mut [u8]) -> Result<(), GpuError>;

    /// Sets `len` bytes at `addr` to `byte`. Not ordered with streams.
    ///
    /// # Errors
    /// As [`Gpu::write`].
    fn fill(&self, addr: u64, byte: u8, len: usize) -> Result<(), GpuError>;

    /// Reads one 4-byte word while kernels run. Pinned memory only, where the two differ.
    ///
    /// # Ordering
    /// Acquire at system scope.
    ///
    /// # Errors
    /// `NotAllocated`, `Misaligned`.
    fn load_u32(&self, addr: u64) -> Result<u32, GpuError>;

    /// Writes one 4-byte word while kernels run. Pinned memory only, where the two differ.
    ///
    /// # Ordering
    /// Release at system scope.
    ///
    /// # Errors
    /// `NotAllocated`, `Misaligned`.
    fn store_u32(&self, addr: u64, value: u32) -> Result<(), GpuError>;

    /// As [`Gpu::load_u32`], for 8 bytes.
    ///
    /// # Errors
    /// `NotAllocated`, `Misaligned`.
    fn load_u64(&self, addr: u64) -> Result<u64, GpuError>;

    /// As [`Gpu::store_u32`], for 8 bytes.
    ///
    /// # Errors
    /// `NotAllocated`, `Misaligned`.
    fn store_u64(&self, addr: u64, value: u64) -> Result<(), GpuError>;

    /// Makes a stream: a queue of work that runs in order. Dropping it lets queued work finish.
    ///
    /// One that the machine refused answers every use with that refusal.
    fn stream(&self) -> Stream;

    /// Makes an event: a mark that streams and the host can ask for. A fresh one counts as completed.
    ///
    /// One that the machine refused answers every use with that refusal.
    fn event(&self) -> Event;

    /// Marks the work queued on `stream` so far; an earlier mark of the same event is forgotten.
    ///
    /// # Errors
    /// `ForeignHandle`, `QueueFull`.
    fn record(&self, event: &Event, stream: &Stream) -> Result<(), GpuError>;

    /// Lets later work of `stream` start only after the work that `event` marks now has finished.
    ///
    /// A stream that waits for an event of a captured stream joins that capture.
    ///
    /// # Errors
    /// `ForeignHandle`, `QueueFull`, `Capture` when one of the two is captured and the other is not
    /// part of it.
    fn wait(&self, event: &Event, stream: &Stream) -> Result<(), GpuError>;

    /// Whether the work that `event` marks has finished.
    ///
    /// # Errors
    /// `ForeignHandle`, `Capture` for an event of a captured stream.
    fn query(&self, event: &Event) -> Result<bool, GpuError>;

    /// Nanoseconds between the completions of two events.
    ///
    /// # Errors
    /// `ForeignHandle`, `EventPending`, `Capture` for an event of a captured stream.
    fn elapsed_ns(&self, start: &Event, end: &Event) -> Result<u64, GpuError>;

    /// Queues one kernel, or records it when `stream` is being captured.
    ///
    /// # Errors
    /// `ForeignHandle`, `QueueFull`, `OutOfRange` for the arguments' length, the blocks or the warps.
    ///
    /// # Safety
    /// `launch.args` must be the argument struct of `launch.kernel`, and every address in it must
    /// stay valid for what that kernel does with it, until the launch has finished (for a captured
    /// launch: until the last replay of its graph has). Dropping a [`DeviceMemory`] of the same GPU
    /// is safe at any time for launches that were queued before.
    #[expect(unsafe_code, reason = "arguments carry addresses that only the caller can vouch for")]
    unsafe fn launch(&self, stream: &Stream, launch: &Launch<'_>) -> Result<(), GpuError>;

    /// Starts recording `stream` instead of running it.
    ///
    /// # Errors
    /// `ForeignHandle`, `Capture`.
    fn begin_capture(&self, stream: &Stream) -> Result<(), GpuError>;

    /// Ends the recording that began on `stream`; on an error the recording is discarded.
    ///
    /// # Errors
    /// `ForeignHandle`, `Capture` where work of a joined stream is not waited for.
    fn end_capture(&self, stream: &Stream) -> Result<Graph, GpuError>;

    /// Whether launches on `stream` are recorded rather than run.
    ///
    /// # Errors
    /// `ForeignHandle`.
    fn is_capturing(&self, stream: &Stream) -> Result<bool, GpuError>;

    /// Queues a captured graph on `stream` as one operation.
    ///
    /// # Errors
    /// `ForeignHandle`, `QueueFull`, `Capture` when `stream` is being captured itself.
    fn replay(&self, graph: &Graph, stream: &Stream) -> Result<(), GpuError>;

    /// Blocks until all work queued on `stream` has finished; reports the first failure since the last call.
    ///
    /// A failed launch makes the stream skip the launches behind it, up to this call.
    ///
    /// # Errors
    /// `ForeignHandle`, `Capture` while the stream is being captured, or what made a launch fail.
    fn synchronize(&self, stream: &Stream) -> Result<(), GpuError>;

    /// Blocks until `reached` holds, asking it again and again while kernels run; whether it did before
    /// `timeout` had passed on the kernels' clock.
    ///
    /// # Errors
    /// What keeps kernels from running.
    fn wait_for(&self, timeout: Duration, reached: &mut dyn FnMut() -> bool) -> Result<bool, GpuError>;

    /// Makes plain bytes by which another process of this host can [`import`](Gpu::import) `len` bytes at `addr`.
    ///
    /// They are good while the allocation lives.
    ///
    /// # Errors
    /// `Shared` if this GPU does not share its memory, or the range is not in one allocation of it.
    fn export(&self, addr: u64, len: usize) -> Result<Vec<u8>, GpuError>;

    /// Maps what another process has exported; kernels of this GPU reach it until the result is dropped.
    ///
    /// The bytes are not trusted. Copies and words of this trait do not reach imported memory.
    ///
    /// # Errors
    /// `Shared` for malformed bytes, a process that is gone or not ours, or memory that is not what was exported.
    fn import(&self, handle: &[u8]) -> Result<DeviceMemory, GpuError>;

    /// The ways by which a device reaches the allocation at `addr`, of which `addr` is the first byte: one that moves
    /// bytes itself (`is_on_bus`), or an emulated one.
    ///
    /// # Errors
    /// `NotAllocated`; `UnorderedWrites` where what such a device writes may be seen out of order.
    fn nic_ways(&self, addr: u64, is_on_bus: bool) -> Result<NicWays, GpuError> {
        let _ = (addr, is_on_bus);
        Ok(NicWays::host())
    }

    /// Most blocks of `warps_per_block` warps that run at the same time; 0 if not even one block fits.
    fn max_coresident_blocks(&self, warps_per_block: u32) -> u32;

    /// The argument bytes of every launch in a graph, in the order of their capture: what each replay passes.
    ///
    /// # Errors
    /// `ForeignHandle`.
    fn captured_args(&self, graph: &Graph) -> Result<Vec<Vec<u8>>, GpuError>;

    /// Bytes of all allocations that have not been dropped, pinned ones included.
    fn allocated_bytes(&self) -> u64;

    /// Captures begun since this GPU was made: a caller that must not capture again can prove it.
    fn captures(&self) -> u64;
}

/// Tells GPUs of one process apart; never reused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct GpuId(u64);

impl GpuId {
    /// A number that no other GPU of this process has.
    pub fn fresh() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self(NEXT.fetch_add(1, Ordering::Relaxed))
    }
}

/// Bytes that kernels can reach; given back when dropped.
pub struct DeviceMemory {
    addr: u64,
    len: usize,
    _owner: Box<dyn Any + Send + Sync>,
}

impl DeviceMemory {
    /// For implementers of [`Gpu`]: `owner` gives `len` bytes at `addr` back when it is dropped.
    pub fn new(addr: u64, len: usize, owner: Box<dyn Any + Send + Sync>) -> Self {
        Self { addr, len, _owner: owner }
    }

    /// Address of the first byte, as kernels see it.
    pub fn addr(&self) -> u64 {
        self.addr
    }

    /// Length in bytes, as asked for.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Never true: an empty allocation is refused.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

impl core::fmt::Debug for DeviceMemory {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "DeviceMemory({:#x}, {} bytes)", self.addr, self.len)
    }
}

macro_rules! handle {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone)]
        pub struct $name {
            gpu: GpuId,
            inner: Arc<dyn Any + Send + Sync>,
        }

        impl $name {
            /// For implementers of [`Gpu`]: wraps what `gpu` keeps for this handle.
            pub fn new(gpu: GpuId, inner: Arc<dyn Any + Send + Sync>) -> Self {
                Self { gpu, inner }
            }

            /// Whether both handles name the same object.
            #[must_use]
            pub fn same_as(&self, other: &Self) -> bool {
                Arc::ptr_eq(&self.inner, &other.inner)
            }

            /// For implementers of [`Gpu`]: what `gpu` keeps for this handle.
            ///
            /// # Errors
            /// `ForeignHandle` if another GPU made it.
            pub fn of<T: 'static>(&self, gpu: GpuId) -> Result<&T, GpuError> {
                let foreign = GpuError::ForeignHandle { handle: HandleKind::$name };
                if self.gpu != gpu {
                    return Err(foreign);
                }
                self.inner.downcast_ref().ok_or(foreign)
            }
        }

        impl core::fmt::Debug for $name {
            fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
                write!(f, concat!(stringify!($name), " of {:?}"), self.gpu)
            }
        }
    };
}

handle!(
    /// A queue of work that runs in order.
    Stream
);
handle!(
    /// A mark in a stream.
    Event
);
handle!(
    /// A captured list of launches with frozen arguments and the edges between them.
    Graph
);
