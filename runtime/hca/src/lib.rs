//! The seam to the RDMA device: `trait Hca`, an emulated mlx5 device and real ones behind it, and fault injection.
//!
//! A driver and a device meet here and nowhere else. The driver side is [`objects`] (typed builders of
//! command mailboxes), [`control_region`] (rings carved from one registered region) and [`host_qp`] (a
//! WQE writer for host-driven queue pairs). The device side is [`emulated`], or a card behind [`mlx5`]. Neither
//! imports the other;
//! [`contract`] holds both to the same expectations.
//!
//! *Who owns what.* Callers own memory; devices hold keys to it. Only the islands named in
//! `emulated/memory.rs`, `control_region.rs` and `host_qp.rs` touch memory that another agent may touch
//! at the same time, and never through a Rust slice.
//!
//! # Examples
//!
//! Two devices, one RDMA WRITE:
//!
//! ```
//! use std::sync::Arc;
//!
//! use ibex_abi::types::{Iova, Psn};
//! use ibex_abi::wqe::{CtrlFlags, Remote, Request, SegmentBuf};
//! use ibex_hca::control_region::ControlRegion;
//! use ibex_hca::emulated::{EmulatedConfig, EmulatedHca, Fabric, FabricConfig};
//! use ibex_hca::host_memory::Registered;
//! use ibex_hca::host_qp::{ConnectSpec, HostQp, HostQpSpec};
//! use ibex_hca::{Access, Hca, Nanos};
//!
//! let fabric = Fabric::inproc(FabricConfig::default());
//! let near = EmulatedHca::new(Arc::clone(&fabric), EmulatedConfig::default())?;
//! let far = EmulatedHca::new(fabric, EmulatedConfig::default())?;
//!
//! // A driver sees only the trait; every queue lives in memory that it carves itself.
//! let bring_up = |device: &Arc<EmulatedHca>| -> Result<_, Box<dyn std::error::Error>> {
//!     let hca = Arc::clone(device) as Arc<dyn Hca>;
//!     let pd = hca.alloc_pd()?;
//!     let region = ControlRegion::host(&hca, 1 << 20)?;
//!     let buffer = Registered::new(&hca, pd, 4096, Access::ALL)?;
//!     let qp = HostQp::create(&region, pd, HostQpSpec::default())?;
//!     Ok((qp, buffer, region))
//! };
//! let (one, _near_buffer, _near_region) = bring_up(&near)?;
//! let (other, buffer, _far_region) = bring_up(&far)?;
//! let (here, there) = (one.endpoint(Psn::new(0)), other.endpoint(Psn::new(0)));
//! let mut one = one.connect(&there, &ConnectSpec::default())?;
//! let _other = other.connect(&here, &ConnectSpec::default())?;
//!
//! let remote = Remote { addr: Iova(buffer.iova(0)), rkey: buffer.key().rkey };
//! let payload = vec![SegmentBuf::Inline(b"hello".to_vec())];
//! one.post(CtrlFlags::SIGNALED, Request::Write { remote, payload })?;
//! while near.step(Nanos(0)).did_work {}
//!
//! assert_eq!(buffer.view().to_vec(0, 5), b"hello");
//! assert_eq!(one.poll().expect("a completion").syndrome(), None);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

pub mod assisted;
pub mod bus;
pub mod contract;
pub mod control_region;
pub mod emulated;
mod error;
pub mod explain;
pub mod fault;
#[doc(hidden)]
pub mod fuzz;
mod hca;
pub mod host_eq;
pub mod host_memory;
pub mod host_qp;
pub mod mlx5;
pub mod objects;
mod register;
pub mod shared;
pub mod shared_memory;

pub use error::{CommandError, HcaError, destroyed};
pub use hca::{
    Access, AsyncEvent, DoorbellPage, Hca, HcaCaps, LinkLayer, MemoryKind, MemoryRegion, Mkey, Path,
    PathAddress, PortAddress, PortInfo, UDP_SPORT_MIN, Umem,
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
