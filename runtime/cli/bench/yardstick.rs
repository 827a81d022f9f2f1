//! What a step's bytes take without Ibex: copied by the processor or by the device, or sent by NCCL.
//!
//! A [`Yardsticks`] owns the buffers on all sides. It measures between two steps, when nothing else runs.

use std::sync::Arc;

use ibex::bootstrap::ibex_nccl::Nccl;
use ibex::gpu::CudaGpu;
use ibex::gpu::cuda::DeviceCopies;
use ibex::harness::NcclAllToAll;
use serde::Serialize;

use super::floor::{Floor, Stage};
use super::moved::{Moved, bytes};
use super::report::Pair;
use super::stats::median;
use crate::cli::CliError;

/// The least part of a kernel's time that the device's own copies of the same bytes take, on the mapped route.
pub(super) const COPY_RATIO_MIN: f64 = 0.6;

/// Somebody else's all-to-all, to compare with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Baseline {
    /// Grouped send and receive of NCCL, on the GPU.
    Nccl,
}

/// What is measured beside each step.
#[derive(Default)]
pub(super) struct Yardsticks {
    floor: Option<Floor>,
    copies: Option<DeviceCopies>,
    nccl: Option<NcclAllToAll>,
}

/// Microseconds of both operations.
#[derive(Default)]
pub(super) struct Times {
    dispatch: Vec<f64>,
    combine: Vec<f64>,
}

impl Times {
    fn push(&mut self, dispatch: f64, combine: f64) {
        self.dispatch.push(dispatch);
        self.combine.push(combine);
    }

    /// The medians; of nothing there is none.
    pub(super) fn medians(&self) -> Pair {
        Pair { dispatch: median(&self.dispatch), combine: median(&self.combine) }
    }
}

/// What was measured beside the steps.
#[derive(Default)]
pub(super) struct Measured {
    pub(super) floor_us: Times,
    pub(super) copy_us: Times,
    pub(super) copy_bytes: Times,
    pub(super) baseline_us: Times,
    pub(super) copy_method: Option<&'static str>,
    pub(super) baseline: Option<BaselineName>,
}

/// What a baseline is.
#[derive(Clone, Debug, Serialize)]
pub(super) struct BaselineName {
    pub(super) name: &'static str,
    pub(super) version: String,
    pub(super) method: &'static str,
}

impl Yardsticks {
    /// The processor's copies, on all cores.
    pub(super) fn host() -> Self {
        Self { floor: Some(Floor::new()), ..Self::default() }
    }

    /// The device's copies.
    pub(super) fn device(gpu: &CudaGpu) -> Self {
        Self { copies: Some(gpu.copies()), ..Self::default() }
    }

    /// Adds NCCL, on a GPU.
    ///
    /// # Errors
    /// The library is missing or too old, or makes no communicator there.
    pub(super) fn add_nccl(&mut self, gpu: &Arc<CudaGpu>) -> Result<(), CliError> {
        let nccl = Nccl::load()?;
        self.nccl = Some(NcclAllToAll::new(&nccl, gpu)?);
        Ok(())
    }

    /// Measures one step's bytes, by everything there is.
    pub(super) fn measure(&mut self, moved: &Moved, measured: &mut Measured) -> Result<(), CliError> {
        let size = |stages: &[Stage]| bytes(stages) as f64;
        if let Some(floor) = &mut self.floor {
            let (dispatch, combine) = (floor.measure_us(&moved.dispatch), floor.measure_us(&moved.combine));
            measured.floor_us.push(dispatch, combine);
            measured.copy_us.push(dispatch, combine);
            measured.copy_bytes.push(size(&moved.dispatch), size(&moved.combine));
            measured.copy_method = Some(Floor::METHOD);
        }
        if let Some(copies) = &mut self.copies {
            let lens = |stages: &[Stage]| stages.iter().map(|stage| stage.bytes()).collect::<Vec<_>>();
            let mut us = |stages: &[Stage]| copies.measure_ns(&lens(stages)).map(|ns| ns as f64 / 1e3);
            measured.copy_us.push(us(&moved.dispatch)?, us(&moved.combine)?);
            measured.copy_bytes.push(size(&moved.dispatch), size(&moved.combine));
            measured.copy_method = Some(DeviceCopies::METHOD);
        }
        if let Some(nccl) = &mut self.nccl {
            let mut us = |lens: &[usize]| nccl.measure_ns(lens).map(|ns| ns as f64 / 1e3);
            measured.baseline_us.push(us(&moved.pairs.dispatch)?, us(&moved.pairs.combine)?);
            measured.baseline = Some(BaselineName {
                name: "nccl",
                version: nccl.version().to_string(),
                method: NcclAllToAll::METHOD,
            });
        }
        Ok(())
    }
}
