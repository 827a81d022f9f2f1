//! The fabric within one process: a request executes by a direct call into the responder.
//!
//! *Who owns what.* A [`Link`] borrows the responder half of the remote queue pair, its device's key
//! table, and the two ports; it lives for one turn of the requester.

use std::sync::Arc;

use ibex_abi::types::QpNum;
use parking_lot::{MutexGuard, RwLockReadGuard};

use super::{Carried, Placement, Port, PortId, Wire};
use crate::emulated::message::{Payload, Piece, Request};
use crate::emulated::mkeys::MkeyTable;
use crate::emulated::qp::Qp;
use crate::emulated::responder::{Responder, Surroundings};
use crate::emulated::{EmulatedHca, Nanos};

/// Key tables of both ends, locked in the order of their ports.
pub(in crate::emulated) struct KeyGuards<'a> {
    near: RwLockReadGuard<'a, MkeyTable>,
    far: Option<RwLockReadGuard<'a, MkeyTable>>,
}

impl<'a> KeyGuards<'a> {
    pub(in crate::emulated) fn lock(near: &'a EmulatedHca, far: Option<&'a EmulatedHca>) -> Self {
        match far.filter(|far| far.port_id() != near.port_id()) {
            None => Self {
                near: near.keys.read(),
                far: None,
            },
            Some(far) if far.port_id() < near.port_id() => {
                let far = far.keys.read();
                Self {
                    near: near.keys.read(),
                    far: Some(far),
                }
            }
            Some(far) => {
                let near = near.keys.read();
                Self {
                    near,
                    far: Some(far.keys.read()),
                }
            }
        }
    }

    pub(in crate::emulated) fn near(&self) -> &MkeyTable {
        &self.near
    }

    fn far(&self) -> &MkeyTable {
        self.far.as_ref().unwrap_or(&self.near)
    }
}

/// The remote end of a [`Link`].
struct FarHalf<'a> {
    device: &'a EmulatedHca,
    qp: &'a Qp,
    port: Arc<Port>,
    responder: MutexGuard<'a, Responder>,
}

/// One queue pair's way to its responder, for one turn.
pub(in crate::emulated) struct Link<'a> {
    port: Arc<Port>,
    ids: (PortId, PortId),
    qpn: QpNum,
    keys: &'a KeyGuards<'a>,
    placement: Placement,
    now: Nanos,
    far: Option<FarHalf<'a>>,
}

impl<'a> Link<'a> {
    /// Opens the way from `qp` of `near` to `far`; without a far end everything is lost.
    pub(in crate::emulated) fn open(
        near: &'a EmulatedHca,
        qpn: QpNum,
        far: Option<(&'a EmulatedHca, &'a Qp)>,
        keys: &'a KeyGuards<'a>,
        now: Nanos,
    ) -> Self {
        let ids = (
            near.port_id(),
            far.map_or(near.port_id(), |(device, _)| device.port_id()),
        );
        let far = far.map(|(device, qp)| FarHalf {
            device,
            qp,
            port: Arc::clone(device.fabric_port()),
            responder: qp.responder.lock(),
        });
        let placement = near.fabric().config().placement;
        Self {
            port: Arc::clone(near.fabric_port()),
            ids,
            qpn,
            keys,
            placement,
            now,
            far,
        }
    }
}

impl Wire for Link<'_> {
    #[inline]
    fn carry(&mut self, request: &Request, payload: Payload<'_>, piece: Piece) -> Carried {
        let (near_id, far_id) = self.ids;
        let Some(far) = &mut self.far else {
            return Carried::Lost;
        };
        if !self.port.passes(&far.port, far_id) {
            return Carried::Lost;
        }
        // Packets from a port other than the connected one are dropped.
        let from_peer = |to| self.port.answers_to(to);
        if !far
            .responder
            .from
            .as_ref()
            .is_some_and(|(to, _)| from_peer(to))
        {
            return Carried::Lost;
        }
        let around = Surroundings {
            device: far.device,
            qp: far.qp,
            keys: self.keys.far(),
            placement: self.placement,
            now: self.now,
        };
        let reply = far.responder.take(&around, request, payload, piece);
        // The answer goes to the queue pair that the responder is connected to.
        let to_us = far
            .responder
            .from
            .as_ref()
            .is_some_and(|(_, qpn)| *qpn == self.qpn);
        match reply {
            Some(reply) if to_us && far.port.passes(&self.port, near_id) => Carried::Replied(reply),
            _ => Carried::Lost,
        }
    }
}
