//! The fabric within one process: a request executes by a direct call into the responder.
//!
//! *Who owns what.* A [`Link`] borrows the responder half of the remote queue pair, its device's key
//! table, and the two ports; it lives for one turn of the requester.

use ibex_abi::types::{Psn, QpNum};
use parking_lot::{MutexGuard, RwLockReadGuard};

use super::{Carried, Port, Wire};
use crate::emulated::message::{Payload, Piece, Reply, Request, Target};
use crate::emulated::mkeys::MkeyTable;
use crate::emulated::qp::Qp;
use crate::emulated::requester::plain::Source;
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
            None => Self { near: near.keys.read(), far: None },
            Some(far) if far.port_id() < near.port_id() => {
                let far = far.keys.read();
                Self { near: near.keys.read(), far: Some(far) }
            }
            Some(far) => {
                let near = near.keys.read();
                Self { near, far: Some(far.keys.read()) }
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
    port: &'a Port,
    /// It is connected to our port: packets from another are dropped.
    hears_us: bool,
    /// It is connected to our queue pair: answers go to the one it is connected to.
    answers_us: bool,
    responder: MutexGuard<'a, Responder>,
    around: Surroundings<'a>,
}

/// One queue pair's way to its responder, for one turn.
pub(in crate::emulated) struct Link<'a> {
    port: &'a Port,
    far: Option<FarHalf<'a>>,
}

impl<'a> Link<'a> {
    /// Opens the way from queue pair `qpn` of `near` to `far`; without a far end everything is lost.
    pub(in crate::emulated) fn open(
        near: &'a EmulatedHca,
        qpn: QpNum,
        far: Option<(&'a EmulatedHca, &'a Qp)>,
        keys: &'a KeyGuards<'a>,
        now: Nanos,
    ) -> Self {
        let port = &**near.fabric_port();
        let placement = near.fabric().config().placement;
        let far = far.map(|(device, qp)| {
            let responder = qp.responder.lock();
            let from = responder.from.as_ref();
            FarHalf {
                port: device.fabric_port(),
                hears_us: from.is_some_and(|(to, _)| port.answers_to(to)),
                answers_us: from.is_some_and(|(_, remote)| *remote == qpn),
                responder,
                around: Surroundings { device, qp, keys: keys.far(), placement, now },
            }
        });
        Self { port, far }
    }
}

impl Link<'_> {
    #[inline]
    fn answer(&mut self, request: &Request, payload: Payload<'_>, piece: Piece) -> Option<Reply> {
        let far = self.far.as_mut()?;
        if !far.hears_us || !self.port.passes(far.port) {
            return None;
        }
        let reply = far.responder.take(&far.around, request, payload, piece);
        // Placing a part is not acknowledged, so no lost answer can hide it; its message's end is.
        let is_placed = matches!((piece, &reply), (Piece::Part { .. }, Some(Reply::Ack { .. })));
        match far.answers_us && (is_placed || far.port.passes(self.port)) {
            true => reply,
            false => None,
        }
    }
}

impl Wire for Link<'_> {
    #[inline]
    fn carry(&mut self, request: &Request, payload: Payload<'_>, piece: Piece) -> Carried {
        Carried::Whole(self.answer(request, payload, piece))
    }

    #[inline]
    fn write_plain(&mut self, psn: Psn, packets: u32, to: Target, source: Source<'_>) -> bool {
        let Some(far) = self.far.as_mut() else {
            return false;
        };
        let connected = far.hears_us && far.answers_us;
        let open = self.port.passes(far.port) && far.port.passes(self.port);
        connected && open && far.responder.write_plain(&far.around, psn, packets, to, source)
    }
}
