//! How a device reaches memory of a GPU: by which ways, best first, and why not by better ones.
//!
//! A [`NicWays`] owns the descriptors of dma-bufs that were made for it; a device that uses one keeps a reference of
//! its own. The memory is somebody else's.

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use ibex_hca::bus::BusId;
use ibex_hca::control_region::RegionPlace;
use ibex_hca::{MemoryKind, MemoryRegion};

use super::GpuError;

/// A way by which a device reaches an allocation.
#[derive(Debug, Clone)]
pub enum NicWay {
    /// By its address: it is memory of the host.
    Host,
    /// By a dma-buf that begins where the allocation does.
    DmaBuf(Arc<OwnedFd>),
    /// By its address on the GPU, for which nvidia-peermem must be loaded.
    Address,
    /// By copies that this process makes, for an emulated device.
    Copies(BusId),
}

impl NicWay {
    /// Where such memory lies, and how it is reached.
    #[must_use]
    pub const fn place(&self) -> RegionPlace {
        match self {
            Self::Host => RegionPlace::HostMapped,
            Self::DmaBuf(_) => RegionPlace::GpuDmaBuf,
            Self::Address => RegionPlace::GpuAddress,
            Self::Copies(_) => RegionPlace::GpuCopies,
        }
    }

    /// What a device is told of `len` bytes at `addr`, which lie `offset` bytes behind the start of the allocation.
    #[must_use]
    pub fn region(&self, addr: u64, offset: u64, len: u64) -> MemoryRegion {
        let kind = match self {
            Self::Host | Self::Address => MemoryKind::HostPtr,
            Self::DmaBuf(buffer) => MemoryKind::DmaBuf { fd: buffer.as_raw_fd(), offset },
            Self::Copies(bus) => MemoryKind::Copied { bus: *bus },
        };
        MemoryRegion { addr, len, kind }
    }
}

/// The ways to one allocation. See the module documentation.
#[derive(Debug, Clone)]
pub struct NicWays {
    /// Best first; none where every one was refused.
    pub ways: Vec<NicWay>,
    /// Ways that this GPU does not offer, best first.
    pub refused: Vec<(RegionPlace, GpuError)>,
}

impl NicWays {
    /// Memory of the host is reached by its address.
    #[must_use]
    pub fn host() -> Self {
        Self { ways: vec![NicWay::Host], refused: Vec::new() }
    }
}
