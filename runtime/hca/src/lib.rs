//! The seam to the RDMA device: `trait Hca`, an emulated mlx5 device behind it, and fault injection.
//!
//! A driver and a device meet here and nowhere else. The driver side is [`objects`] (typed builders of
//! command mailboxes), [`control_region`] (rings carved from one registered region) and [`host_qp`] (a
//! WQE writer for host-driven queue pairs). The device side is [`emulated`]. Neither imports the other;
//! [`contract`] holds both to the same expectations.
//!
//! *Who owns what.* Callers own memory; devices hold keys to it. Only the islands named in
//! `emulated/memory.rs`, `control_region.rs` and `host_qp.rs` touch memory that another agent may touch
//! at the same time, and never through a Rust slice.

pub mod contract;
pub mod control_region;
pub mod emulated;
mod error;
pub mod fault;
mod hca;
pub mod host_memory;
pub mod host_qp;
pub mod objects;

pub use error::{CommandError, HcaError};
pub use hca::{
    Access, AsyncEvent, DoorbellPage, Hca, HcaCaps, LinkLayer, MemoryKind, MemoryRegion, Mkey, Path,
    PathAddress, PortAddress, PortInfo, Umem,
};

/// Nanoseconds on the clock of whoever drives the device; the device itself reads no clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Nanos(pub u64);

impl Nanos {
    /// The later instant `nanos` after this one, saturating.
    #[must_use]
    pub const fn plus(self, nanos: u64) -> Self {
        Self(self.0.saturating_add(nanos))
    }
}
