//! How kernels reach each peer, and why that way.
//!
//! A [`Reach`] owns the mappings of a peer's memory for as long as kernels may use them: from the connection to the end
//! of the next fence.
//!
//! | peer is | `auto` | `ibgda` |
//! |---|---|---|
//! | this rank | local copy | local copy |
//! | another rank of this process | its memory as it is | queue pairs |
//! | another process of this host | its memory, mapped here | queue pairs |
//! | on another host | queue pairs | queue pairs |
//!
//! A peer that cannot be mapped is reached by queue pairs alone; the others are not affected.

use core::fmt;

use ibex_abi::device_ctx::code;

use super::identity::HostId;
use super::neighbours::Neighbours;
use super::watch::ProcessWatch;
use super::{LaneOffer, Offer};
use crate::config::RoutePolicy;
use crate::gpu::{DeviceMemory, Gpu, GpuError};

/// A way to a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// Kernels copy within their own memory.
    Local,
    /// Kernels store to the peer's memory.
    Mapped,
    /// Kernels post to queue pairs.
    Ibgda,
}

impl Route {
    /// Its name, as reports print it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Local => "local",
            Self::Mapped => "mapped",
            Self::Ibgda => "ibgda",
        }
    }

    const fn code(self) -> u32 {
        match self {
            Self::Local => code::ROUTE_LOCAL,
            Self::Mapped => code::ROUTE_MAPPED,
            Self::Ibgda => code::ROUTE_IBGDA,
        }
    }
}

/// Why a peer is reached the way it is.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RouteReason {
    /// The peer is this rank.
    #[error("itself")]
    Itself,
    /// The peer lives in this process.
    #[error("same process")]
    SameProcess,
    /// The peer lives on this host and its memory is mapped.
    #[error("same host")]
    SameHost,
    /// The configuration asks for queue pairs.
    #[error("route ibgda asked for")]
    Policy,
    /// The peer's memory cannot be reached from here.
    #[error("another host: {theirs}, this one is {ours}")]
    AnotherHost {
        /// Where the peer is.
        theirs: HostId,
        /// Where this rank is.
        ours: HostId,
    },
    /// One of the two GPUs does not share its memory.
    #[error("its memory is not shared")]
    NotShared,
    /// The peer's memory is on this host, but mapping it failed.
    #[error("its memory cannot be mapped: {0}")]
    MapFailed(GpuError),
    /// Nothing leads there now.
    #[error("not connected")]
    NotConnected,
}

/// How kernels reach a peer, as [`Session::route`](crate::session::Session::route) reports it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RouteReport {
    /// The way.
    pub route: Route,
    /// Why this one.
    pub reason: RouteReason,
}

impl fmt::Display for RouteReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.route.name(), self.reason)
    }
}

/// A peer's region and combine slab of one lane, mapped here.
type Mapped = [DeviceMemory; 2];

/// The way to one peer, with what keeps it open.
pub(crate) struct Reach {
    report: RouteReport,
    /// Per lane; empty unless the peer is another process.
    mapped: Vec<Mapped>,
    /// The peer's process, if it is another one that may have our memory mapped.
    process: Option<ProcessWatch>,
    /// Whether kernels have used the way. Who only connected has written nothing.
    is_used: bool,
}

impl Default for Reach {
    fn default() -> Self {
        Self::by(Route::Ibgda, RouteReason::NotConnected)
    }
}

impl Reach {
    fn by(route: Route, reason: RouteReason) -> Self {
        Self { report: RouteReport { route, reason }, mapped: Vec::new(), process: None, is_used: false }
    }

    /// The way to this rank itself.
    pub(super) fn itself() -> Self {
        Self::by(Route::Local, RouteReason::Itself)
    }

    /// Chooses the way to whoever made `offer`, and maps what it needs.
    pub(super) fn choose(gpu: &dyn Gpu, policy: RoutePolicy, offer: &Offer, neighbours: &Neighbours) -> Self {
        if policy == RoutePolicy::Ibgda {
            return Self::by(Route::Ibgda, RouteReason::Policy);
        }
        let home = neighbours.home();
        if offer.process == home.process {
            return Self::by(Route::Mapped, RouteReason::SameProcess);
        }
        let (theirs, ours) = (offer.host, home.host);
        if theirs != ours {
            return Self::by(Route::Ibgda, RouteReason::AnotherHost { theirs, ours });
        }
        let way = match map_all(gpu, &offer.lanes) {
            Ok(mapped) => Self { mapped, ..Self::by(Route::Mapped, RouteReason::SameHost) },
            Err(reason) => Self::by(Route::Ibgda, reason),
        };
        // Whatever has come of it here, the peer may have mapped what it was offered.
        Self { process: Some(neighbours.watch(offer.pid)), ..way }
    }

    /// Kernels use the way from now on, at both ends.
    pub(super) fn note_use(&mut self) {
        self.is_used = true;
    }

    pub(super) fn is_used(&self) -> bool {
        self.is_used
    }

    /// May a process at the other end store into our memory, whatever becomes of its queue pairs?
    pub(super) fn may_still_write(&self) -> bool {
        self.is_used && self.process.as_ref().is_some_and(|process| !process.has_ended())
    }

    /// What tells of its end.
    pub(super) fn take_process(&mut self) -> Option<ProcessWatch> {
        self.process.take()
    }

    pub(crate) fn report(&self) -> &RouteReport {
        &self.report
    }

    /// What the kernels of one lane are told.
    pub(super) fn way(&self, lane: usize, offer: &LaneOffer) -> Way {
        let [region_ptr, combine_ptr] = match (self.report.route, self.mapped.get(lane)) {
            (Route::Ibgda, _) => [0; 2],
            (_, Some([region, combine])) => [region.addr(), combine.addr()],
            (_, None) => [offer.region_va, offer.combine_va],
        };
        Way { code: self.report.route.code(), region_ptr, combine_ptr }
    }
}

/// A way to a peer, as kernels see it.
#[derive(Clone, Copy)]
pub(super) struct Way {
    /// The route.
    pub(super) code: u32,
    /// The peer's region in this address space; 0 where kernels have to post.
    pub(super) region_ptr: u64,
    /// The same for its combine slab.
    pub(super) combine_ptr: u64,
}

/// Maps every lane, or none.
fn map_all(gpu: &dyn Gpu, lanes: &[LaneOffer]) -> Result<Vec<Mapped>, RouteReason> {
    let import = |handle: &[u8]| gpu.import(handle).map_err(RouteReason::MapFailed);
    let map = |lane: &LaneOffer| {
        let mappings = lane.mappings.as_ref().ok_or(RouteReason::NotShared)?;
        Ok([import(&mappings.region)?, import(&mappings.combine)?])
    };
    lanes.iter().map(map).collect()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use ibex_abi::types::{Gid, Lid, Mac, PathMtu, Psn, QpNum};
    use ibex_hca::{LinkLayer, PortInfo};

    use super::super::identity::process_id;
    use super::super::{Mappings, QueueOffer};
    use super::*;
    use crate::gpu::HostGpu;
    use crate::gpu::pool::{Pool, PoolConfig};
    use crate::ids::Rank;

    fn gpu(make: fn(Arc<Pool>, u32) -> HostGpu) -> HostGpu {
        make(Arc::new(Pool::new(PoolConfig::simulation(1)).unwrap()), 0)
    }

    /// An offer of another process on this host.
    fn offer(mappings: Option<Mappings>) -> Offer {
        let (lid, gid, mac, mtu) = (Lid(0), Gid([1; 16]), Mac([0; 6]), PathMtu::B4096);
        Offer {
            from: Rank(1),
            to: Rank(0),
            process: !process_id(),
            pid: std::process::id(),
            host: HostId::current(),
            port: PortInfo { port_num: 1, link: LinkLayer::Roce, lid, gid, gid_index: 0, mac, mtu },
            lanes: vec![LaneOffer {
                region_va: 0x1000,
                region_rkey: 1,
                combine_va: 0x2000,
                combine_rkey: 2,
                queues: Vec::new(),
                mappings,
            }],
            control: QueueOffer { qpn: QpNum::new(1), psn: Psn::new(1) },
        }
    }

    fn reason(gpu: &HostGpu, policy: RoutePolicy, offer: &Offer) -> RouteReason {
        let reach = Reach::choose(gpu, policy, offer, &Neighbours::Real);
        let way = reach.way(0, &offer.lanes[0]);
        let has_pointers = way.region_ptr != 0 && way.combine_ptr != 0;
        assert_eq!(has_pointers, reach.report().route == Route::Mapped, "{}", reach.report());
        reach.report().reason.clone()
    }

    #[test]
    fn every_way_has_its_reason() {
        let gpu = gpu(HostGpu::shared);
        let auto = |offer: &Offer| reason(&gpu, RoutePolicy::Auto, offer);
        let memory = gpu.alloc(8192, 4096).unwrap();
        let export = |offset| gpu.export(memory.addr() + offset, 4096).unwrap();
        let shared = offer(Some(Mappings { region: export(0), combine: export(4096) }));
        assert_eq!(auto(&shared), RouteReason::SameHost);
        assert_eq!(reason(&gpu, RoutePolicy::Ibgda, &shared), RouteReason::Policy);
        assert_eq!(auto(&Offer { process: process_id(), ..shared.clone() }), RouteReason::SameProcess);
        let elsewhere = HostId { network: 1, ..HostId::current() };
        let far = Offer { host: elsewhere, ..shared.clone() };
        assert_eq!(auto(&far), RouteReason::AnotherHost { theirs: elsewhere, ours: HostId::current() });
        assert_eq!(auto(&offer(None)), RouteReason::NotShared);
        // Gone since: what is mapped is checked, not believed.
        drop(memory);
        assert!(matches!(auto(&shared), RouteReason::MapFailed(GpuError::Shared(_))));
    }

    #[test]
    fn a_mapping_is_other_memory_at_another_address() {
        let gpu = gpu(HostGpu::shared);
        let memory = gpu.alloc(8192, 4096).unwrap();
        let export = |offset| gpu.export(memory.addr() + offset, 4096).unwrap();
        let offer = offer(Some(Mappings { region: export(0), combine: export(4096) }));
        let way = Reach::choose(&gpu, RoutePolicy::Auto, &offer, &Neighbours::Real).way(0, &offer.lanes[0]);
        assert!(way.region_ptr != memory.addr() && way.region_ptr != offer.lanes[0].region_va);
        assert_eq!(Reach::itself().way(0, &offer.lanes[0]).region_ptr, 0x1000);
    }
}
