//! NCCL's all-to-all of the bytes that a step moves, timed by CUDA events: what a stack without Ibex would do.
//!
//! An [`NcclAllToAll`] owns a communicator, the memory on both sides, a stream and two events on the GPU that it keeps.
//! All ranks share that GPU, and NCCL wants a GPU per rank: so the communicator has one, which sends and receives, in
//! one group, what each rank has for each. The bytes and the number of messages are those of the step.

use std::ffi::c_void;
use std::sync::Arc;

use ibex_nccl::{Comm, Nccl, NcclError, Version};

use crate::gpu::{CudaGpu, DeviceMemory, Event, Gpu, GpuError, Stream};

/// Why there is no time of NCCL.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BaselineError {
    /// NCCL refused or failed.
    #[error(transparent)]
    Nccl(#[from] NcclError),
    /// The GPU under it did.
    #[error(transparent)]
    Gpu(#[from] GpuError),
}

/// See the module documentation.
pub struct NcclAllToAll {
    nccl: Arc<Nccl>,
    comm: Comm,
    /// What is sent and what is received; grown to the most that was asked for.
    sides: Option<[DeviceMemory; 2]>,
    stream: Stream,
    start: Event,
    end: Event,
    gpu: Arc<CudaGpu>,
}

impl NcclAllToAll {
    /// How the time is taken, for reports.
    pub const METHOD: &'static str = "grouped ncclSend and ncclRecv on one GPU, by CUDA events";

    /// Makes a communicator on `gpu`.
    ///
    /// # Errors
    /// What NCCL or the GPU refused.
    pub fn new(nccl: &Arc<Nccl>, gpu: &Arc<CudaGpu>) -> Result<Self, BaselineError> {
        let id = nccl.unique_id()?;
        let comm = gpu.run_in_context(|| Comm::join(nccl, 1, 0, id))??;
        let (stream, start, end) = (gpu.stream(), gpu.event(), gpu.event());
        Ok(Self { nccl: Arc::clone(nccl), comm, sides: None, stream, start, end, gpu: Arc::clone(gpu) })
    }

    /// NCCL's version.
    pub fn version(&self) -> Version {
        self.nccl.version()
    }

    /// Nanoseconds of one group of messages of so many bytes each; empty ones are not sent.
    ///
    /// # Errors
    /// No memory for all of them, what NCCL or the driver refused, or what NCCL noticed meanwhile.
    pub fn measure_ns(&mut self, lens: &[usize]) -> Result<u64, BaselineError> {
        let total: usize = lens.iter().sum();
        if total == 0 {
            return Ok(0);
        }
        let (gpu, comm) = (&self.gpu, &mut self.comm);
        let sides = match self.sides.take().filter(|[from, _]| from.len() >= total) {
            Some(sides) => sides,
            None => [gpu.alloc_on_device(total)?, gpu.alloc_on_device(total)?],
        };
        let [mut from, mut to] = self.sides.insert(sides).each_ref().map(pointer);
        let stream = gpu.raw_stream(&self.stream)?;
        gpu.record(&self.start, &self.stream)?;
        self.nccl.group(|| {
            for len in lens.iter().copied().filter(|len| *len != 0) {
                #[expect(unsafe_code, reason = "device memory is handed to NCCL")]
                // SAFETY: both sides have `total` bytes, of which this message has its own `len`; a GPU keeps memory
                // that was dropped until its streams are empty, and the stream is of the communicator's device.
                unsafe {
                    comm.send(from, len, 0, stream)?;
                    comm.receive(to, len, 0, stream)?;
                }
                (from, to) = (from.wrapping_byte_add(len), to.wrapping_byte_add(len));
            }
            Ok::<(), BaselineError>(())
        })?;
        gpu.record(&self.end, &self.stream)?;
        gpu.synchronize(&self.stream)?;
        comm.health()?;
        Ok(gpu.elapsed_ns(&self.start, &self.end)?)
    }
}

fn pointer(memory: &DeviceMemory) -> *mut c_void {
    // CAST: a 64-bit host.
    std::ptr::with_exposed_provenance_mut(memory.addr() as usize)
}
