//! The control queue pair to each peer: it carries this host's sign of life and progress.
//!
//! A [`ControlQueue`] owns its queue pair, in host memory, from the offer on; dropping it destroys the queue pair. The
//! host posts to it, so a kernel that spins cannot keep the sign of life from being sent.

use ibex_abi::device_ctx::LifeWords;
use ibex_abi::types::{CqNum, Iova, Pd, Psn, QpNum, Rkey};
use ibex_abi::wqe::{CtrlFlags, Remote, Request, SegmentBuf};
use ibex_hca::Access;
use ibex_hca::control_region::ControlRegion;
use ibex_hca::host_qp::{ConnectSpec, Endpoint, HostQp, HostQpSpec, Init, Rts};
use zerocopy::IntoBytes;

use super::{Offer, QueueOffer};
use crate::config::RcTimers;
use crate::error::Error;
use crate::ids::Rank;

/// Log2 of the WQEBBs of a control queue: room for a few signs of life per lane.
pub(super) const CONTROL_SQ_LOG: u8 = 7;

/// What the remote end may do through a control queue pair: write our region, nothing else.
const ACCESS: Access =
    Access { local_write: true, remote_write: true, remote_read: false, remote_atomic: false };

/// The control queue pair to one peer.
pub(super) enum ControlQueue {
    /// No queue pair exists.
    Empty,
    /// Created, not connected.
    Offered(HostQp<Init>, Psn),
    /// Connected; where our sign of life goes at the peer, per lane.
    Live(Box<HostQp<Rts>>, Vec<Remote>),
}

impl ControlQueue {
    /// Creates a queue pair in INIT.
    pub(super) fn offered(region: &ControlRegion, pd: Pd, peer: Rank, psn: Psn) -> Result<Self, Error> {
        let spec = HostQpSpec {
            log_sq_size: CONTROL_SQ_LOG,
            user_index: u32::from(peer.0),
            ..HostQpSpec::default()
        };
        let qp = HostQp::create(region, pd, spec)?.to_init(ACCESS)?;
        Ok(Self::Offered(qp, psn))
    }

    /// Numbers of its queue pair and completion queue, if there are any.
    pub(super) fn numbers(&self) -> Option<(QpNum, CqNum)> {
        match self {
            Self::Empty => None,
            Self::Offered(qp, _) => Some((qp.qpn(), qp.send_cq().num())),
            Self::Live(qp, _) => Some((qp.qpn(), qp.send_cq().num())),
        }
    }

    /// Whether it is connected.
    pub(super) fn is_live(&self) -> bool {
        matches!(self, Self::Live(..))
    }

    /// Destroys the queue pair, if there is one; a retry goes on where this stopped.
    pub(super) fn close(&mut self) -> Result<(), Error> {
        match self {
            Self::Empty => {}
            Self::Offered(qp, _) => qp.destroy()?,
            Self::Live(qp, _) => qp.destroy()?,
        }
        *self = Self::Empty;
        Ok(())
    }

    /// What the peer must know of it; `None` unless it is offered.
    pub(super) fn offer(&self) -> Option<QueueOffer> {
        match self {
            Self::Offered(qp, psn) => Some(QueueOffer { qpn: qp.qpn(), psn: *psn }),
            Self::Empty | Self::Live(..) => None,
        }
    }

    /// Connects it to what `offer` says. On an error no queue pair is left.
    pub(super) fn connect(&mut self, offer: &Offer, life_off: u64, timers: RcTimers) -> Result<(), Error> {
        let Self::Offered(qp, psn) = core::mem::replace(self, Self::Empty) else { return Ok(()) };
        let remote =
            Endpoint { address: offer.port.address(), qpn: offer.control.qpn, psn: offer.control.psn };
        let spec = ConnectSpec {
            psn,
            access: ACCESS,
            mtu: offer.port.mtu,
            ack_timeout: timers.ack_timeout,
            retry_count: timers.retry_count,
            ..ConnectSpec::default()
        };
        let qp = qp.to_rtr(&remote, &spec)?.to_rts(&spec)?;
        let place = |lane: &super::LaneOffer| Remote {
            addr: Iova(lane.region_va + life_off),
            rkey: Rkey(lane.region_rkey),
        };
        *self = Self::Live(Box::new(qp), offer.lanes.iter().map(place).collect());
        Ok(())
    }

    /// Posts one sign of life per lane. A full or failed queue drops them: silence is what the peer then sees.
    pub(super) fn send_life(&mut self, lanes: &[LifeWords]) {
        let Self::Live(qp, places) = self else { return };
        while qp.poll().is_some() {}
        for (remote, words) in places.iter().zip(lanes) {
            let payload = vec![SegmentBuf::Inline(words.as_bytes().to_vec())];
            let request = Request::Write { remote: *remote, payload };
            if qp.post(CtrlFlags::SIGNALED, request).is_err() {
                return;
            }
        }
    }
}
