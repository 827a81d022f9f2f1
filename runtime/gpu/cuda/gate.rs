//! A gate before streams of one device: what is queued behind it starts when it opens, on all of them together.
//!
//! Launching takes the host microseconds per stream, and kernels of ranks wait for each other: without a gate the time
//! of the first would be that of the host. A [`Gate`] owns one word that the host writes and streams wait for.
//!
//! INVARIANT: a gate that goes is open: no stream is left behind it.

use std::sync::atomic::{AtomicU32, Ordering};

use super::super::{DeviceMemory, Gpu, GpuError, Stream};
use super::CudaGpu;

/// See the module documentation.
pub struct Gate {
    word: DeviceMemory,
    /// How often it was opened.
    opened: AtomicU32,
    gpu: CudaGpu,
}

impl Gate {
    /// A gate that has let a stream through, so that it works on this device.
    pub(super) fn new(gpu: CudaGpu) -> Result<Self, GpuError> {
        let word = gpu.alloc_pinned(size_of::<u32>(), size_of::<u32>())?;
        let gate = Self { word, opened: AtomicU32::new(0), gpu };
        let stream = gate.gpu.stream();
        gate.hold(&gate.gpu, &stream)?;
        gate.open()?;
        gate.gpu.synchronize(&stream)?;
        Ok(gate)
    }

    /// Lets what is queued from now on to `stream`, which is `gpu`'s, wait until the gate opens next.
    ///
    /// # Errors
    /// `ForeignHandle`; what the driver refused.
    pub fn hold(&self, gpu: &CudaGpu, stream: &Stream) -> Result<(), GpuError> {
        gpu.queue_wait(stream, self.word.addr(), self.opened.load(Ordering::Relaxed).wrapping_add(1))
    }

    /// Lets all of it start.
    ///
    /// # Errors
    /// None that a live gate meets.
    pub fn open(&self) -> Result<(), GpuError> {
        let opened = self.opened.fetch_add(1, Ordering::Relaxed).wrapping_add(1);
        self.gpu.store_u32(self.word.addr(), opened)
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        // Its word is live until below, and the host reaches it.
        let _ = self.open();
    }
}
