//! What a GPU refuses, and why. Small and closed, so that a test can match on it.

use ibex_hca::shared_memory::SharedMemoryError;

use super::cuda::CallError;
use super::pool::PoolError;

/// A call to a [`Gpu`](super::Gpu) that was refused or failed; nothing was started or changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum GpuError {
    /// A number outside its range.
    #[error("{field} is {value}, valid is {min} to {max}")]
    OutOfRange {
        /// Which number.
        field: GpuField,
        /// What was asked for.
        value: u64,
        /// Smallest valid value.
        min: u64,
        /// Largest valid value.
        max: u64,
    },
    /// An alignment that is not a power of two.
    #[error("alignment {align} is not a power of two")]
    BadAlignment {
        /// What was asked for.
        align: usize,
    },
    /// A byte range that does not lie inside one live allocation of this GPU.
    #[error("{len} bytes at {addr:#x} do not lie in one live allocation of this gpu")]
    NotAllocated {
        /// First byte.
        addr: u64,
        /// Length of the range.
        len: usize,
    },
    /// A word access to an address that is not a multiple of the word's size.
    #[error("address {addr:#x} is not a multiple of {align}")]
    Misaligned {
        /// The address.
        addr: u64,
        /// What it must be a multiple of.
        align: u64,
    },
    /// A handle that another GPU made.
    #[error("the {handle} belongs to another gpu")]
    ForeignHandle {
        /// Which handle.
        handle: HandleKind,
    },
    /// A stream with too much queued work; synchronize first.
    #[error("the stream already holds {queued} operations, the limit is {limit}")]
    QueueFull {
        /// Operations waiting in the stream.
        queued: usize,
        /// The limit.
        limit: usize,
    },
    /// Graph capture was used in a way that cannot be recorded.
    #[error("graph capture: {0}")]
    Capture(#[from] CaptureError),
    /// Time between two events of which at least one has not completed, or was never recorded.
    #[error("the event has not completed")]
    EventPending,
    /// The fibers that run kernels refused a launch, or their simulation ended early.
    #[error("kernel pool: {0}")]
    Pool(PoolError),
    /// Memory cannot be shared with another process, or another process's cannot be reached.
    #[error(transparent)]
    Shared(SharedMemoryError),
    /// A call of the CUDA driver failed.
    #[error(transparent)]
    Cuda(#[from] CallError),
    /// Memory of a GPU that this one does not reach.
    #[error("this gpu does not reach the memory of gpu {}: no peer access", super::cuda::Uuid(*.uuid))]
    NoPeerAccess {
        /// The other GPU.
        uuid: [u8; 16],
    },
    /// Kernels of this GPU may see what a NIC writes in another order than it was written in.
    #[error(
        "{device} orders what NICs write for {}, kernels need it ordered for the device itself (100): \
         no route of queue pairs into its memory",
        found.map_or("nobody knows whom".into(), |found| format!("scope {found}"))
    )]
    UnorderedWrites {
        /// Its name.
        device: String,
        /// What the driver says (`CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WRITES_ORDERING`); `None` if it does not know.
        found: Option<u32>,
    },
    /// The GPU was dropped with work queued that has not run.
    #[error("the gpu was dropped before the work ran")]
    Dropped,
    /// A call to the operating system failed.
    #[error("{call} failed with os error {code}")]
    Os {
        /// Name of the call.
        call: &'static str,
        /// `errno`.
        code: i32,
    },
}

/// A number that a [`Gpu`](super::Gpu) checks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum GpuField {
    /// Length of an allocation in bytes.
    AllocLen,
    /// Alignment of an allocation in bytes.
    AllocAlign,
    /// Length of a kernel's argument struct in bytes.
    ArgsLen,
    /// Blocks of a launch; all of them must be resident at once.
    Blocks,
    /// Warps of one block.
    WarpsPerBlock,
    /// GPUs of this process whose memory emulated devices reach by copies.
    Buses,
}

impl core::fmt::Display for GpuField {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(match self {
            Self::AllocLen => "allocation length",
            Self::AllocAlign => "allocation alignment",
            Self::ArgsLen => "argument length",
            Self::Blocks => "blocks",
            Self::WarpsPerBlock => "warps per block",
            Self::Buses => "gpus with emulated devices",
        })
    }
}

/// A kind of handle that a [`Gpu`](super::Gpu) gives out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum HandleKind {
    /// A [`Stream`](super::Stream).
    Stream,
    /// An [`Event`](super::Event).
    Event,
    /// A [`Graph`](super::Graph).
    Graph,
}

impl core::fmt::Display for HandleKind {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(match self {
            Self::Stream => "stream",
            Self::Event => "event",
            Self::Graph => "graph",
        })
    }
}

/// Why something could not be recorded into a graph.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CaptureError {
    /// `begin_capture` on a stream that already records.
    #[error("the stream is already being captured")]
    AlreadyCapturing,
    /// `end_capture` on a stream that does not record.
    #[error("the stream is not being captured")]
    NotCapturing,
    /// `end_capture` on a stream that joined a capture which another stream began.
    #[error("the capture must end on the stream that began it")]
    NotTheOrigin,
    /// Work of a joined stream was not waited for by the origin before the end.
    #[error("{unjoined} launches are not joined back into the stream that began the capture")]
    Unjoined {
        /// Launches that nothing in the origin stream waits for.
        unjoined: usize,
    },
    /// A captured stream waits for an event that was recorded outside its capture, or the reverse.
    #[error("the event was recorded outside this capture")]
    ForeignEvent,
    /// The operation needs work to run, and captured work does not run.
    #[error("the operation is not possible while the stream is being captured")]
    NotWhileCapturing,
    /// The event stands for work inside a capture: it never completes, only replays of the graph run.
    #[error("the event belongs to a capture, it does not complete")]
    EventCaptured,
}
