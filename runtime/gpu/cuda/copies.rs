//! Plain copies within a device, timed by its own events: what kernels that move the same bytes are measured against.
//!
//! A [`DeviceCopies`] owns the memory on both sides, a stream and two events; it keeps the device that they are on.

use super::super::{DeviceMemory, Event, Gpu, GpuError, Stream};
use super::CudaGpu;

/// See the module documentation.
pub struct DeviceCopies {
    /// Where copies come from and go to; grown to the longest that was asked for.
    sides: Option<[DeviceMemory; 2]>,
    stream: Stream,
    start: Event,
    end: Event,
    gpu: CudaGpu,
}

impl DeviceCopies {
    /// How the time is taken, for reports.
    pub const METHOD: &'static str = "cuMemcpyDtoDAsync, by CUDA events";

    pub(super) fn new(gpu: CudaGpu) -> Self {
        Self { sides: None, stream: gpu.stream(), start: gpu.event(), end: gpu.event(), gpu }
    }

    /// Nanoseconds of one copy after the other, of so many bytes each; a copy of none takes no time.
    ///
    /// # Errors
    /// No memory for the longest of them, or what the driver refused.
    pub fn measure_ns(&mut self, lens: &[usize]) -> Result<u64, GpuError> {
        let longest = lens.iter().copied().max().unwrap_or(0);
        if longest == 0 {
            return Ok(0);
        }
        let gpu = &self.gpu;
        let sides = match self.sides.take().filter(|[from, _]| from.len() >= longest) {
            Some(sides) => sides,
            None => [gpu.alloc_on_device(longest)?, gpu.alloc_on_device(longest)?],
        };
        let [from, to] = self.sides.insert(sides);
        gpu.record(&self.start, &self.stream)?;
        for len in lens.iter().filter(|len| **len != 0) {
            gpu.queue_copy(&self.stream, to, from, *len)?;
        }
        gpu.record(&self.end, &self.stream)?;
        gpu.synchronize(&self.stream)?;
        gpu.elapsed_ns(&self.start, &self.end)
    }
}
