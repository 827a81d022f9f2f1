//! A carrier through the simulated switch: whole Ethernet frames, virtual time, one process.
//!
//! *Who owns what.* The [`Exchange`] owns the switch and knows every port; each device's carrier owns the
//! frame that it is writing and those that it took in.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;

use ibex_roce::wire::{ETHERNET_LEN, Flow, Frame, IPV6_LEN, Link, ROCE_PORT, UDP_LEN, WireError};
use parking_lot::{Mutex, RwLock};

use super::{Carrier, EachArrival, PACKET_LEN_MAX, ip_of};
use crate::emulated::capture::{Capture, Origin};
use crate::emulated::fabric::Port;
use crate::emulated::switch::{Delivery, FaultCounts, FaultPlan, Switch};
use crate::{HcaError, Nanos};

/// Time that a frame takes when nothing is wrong.
pub(in crate::emulated) const LATENCY: Nanos = Nanos(1_000);
/// Bytes before the longest packet.
const HEADERS_MAX: usize = ETHERNET_LEN + IPV6_LEN + UDP_LEN;
/// What a port is said to buffer; the switch itself buffers more.
const BUFFER: usize = 1 << 20;
/// Frames taken in at once.
const BATCH: usize = 64;

/// The switch and what is plugged into it.
#[derive(Debug)]
pub(in crate::emulated) struct Exchange {
    switch: Mutex<Switch>,
    ports: RwLock<Ports>,
}

#[derive(Debug, Default)]
struct Ports {
    by_addr: HashMap<SocketAddr, Arc<Port>>,
    by_number: HashMap<u16, Arc<Port>>,
}

impl Exchange {
    pub(in crate::emulated) fn new(switch: Switch) -> Arc<Self> {
        Arc::new(Self { switch: Mutex::new(switch), ports: RwLock::default() })
    }

    /// What the switch did so far.
    pub(in crate::emulated) fn counts(&self) -> FaultCounts {
        *self.switch.lock().counts()
    }

    /// Has the switch follow another plan.
    pub(in crate::emulated) fn set_plan(&self, plan: FaultPlan) -> Result<(), HcaError> {
        Ok(self.switch.lock().set_plan(plan)?)
    }

    /// Plugs a port in; its carrier.
    pub(in crate::emulated) fn plug(self: &Arc<Self>, port: &Arc<Port>) -> Box<dyn Carrier> {
        let local = SocketAddr::new(ip_of(port.info().gid), ROCE_PORT);
        let mut ports = self.ports.write();
        ports.by_addr.insert(local, Arc::clone(port));
        ports.by_number.insert(port.id().0, Arc::clone(port));
        let (exchange, port) = (Arc::clone(self), Arc::clone(port));
        let room = vec![0; HEADERS_MAX + PACKET_LEN_MAX].into_boxed_slice();
        Box::new(SwitchCarrier { exchange, port, local, room, arrived: Vec::with_capacity(BATCH) })
    }
}

#[derive(Debug)]
struct SwitchCarrier {
    exchange: Arc<Exchange>,
    port: Arc<Port>,
    local: SocketAddr,
    room: Box<[u8]>,
    arrived: Vec<Delivery>,
}

impl SwitchCarrier {
    /// Writes the headers before the packet in the room; where the frame begins.
    fn frame(&mut self, to: SocketAddr, port: &Port, len: usize) -> Option<usize> {
        let link = Link { src: self.port.info().mac.0, dst: port.info().mac.0 };
        let flow = Flow::new(self.local.ip(), to.ip(), self.local.port())?;
        let frame = Frame::new(Some(link), flow);
        flow.seal(&mut self.room[HEADERS_MAX..HEADERS_MAX + len]).ok()?;
        let start = HEADERS_MAX - frame.headers_len();
        frame.emit_headers(len, &mut self.room[start..HEADERS_MAX]).ok()?;
        Some(start)
    }

    fn capture(&self) -> Option<&Arc<Capture>> {
        self.port.capture()
    }
}

impl Carrier for SwitchCarrier {
    fn room(&mut self, _now: Nanos) -> Option<&mut [u8]> {
        Some(&mut self.room[HEADERS_MAX..])
    }

    fn send(&mut self, now: Nanos, to: SocketAddr, len: usize) {
        let known = self.exchange.ports.read().by_addr.get(&to).cloned();
        let Some(port) = known.filter(|port| self.port.passes(port)) else {
            return;
        };
        let Some(start) = self.frame(to, &port, len) else {
            return;
        };
        let frame = &self.room[start..HEADERS_MAX + len];
        if let Some(capture) = self.capture() {
            capture.frame(now, Origin::Wire, frame);
        }
        self.exchange.switch.lock().submit(now, self.port.id().0, port.id().0, frame);
    }

    fn flush(&mut self, _now: Nanos) {}

    fn fill(&mut self, now: Nanos) -> bool {
        let mut switch = self.exchange.switch.lock();
        for Delivery { frame, .. } in self.arrived.drain(..) {
            switch.give_back(frame);
        }
        while self.arrived.len() < BATCH {
            let Some(delivery) = switch.poll(now, self.port.id().0) else { break };
            self.arrived.push(delivery);
        }
        !self.arrived.is_empty()
    }

    fn for_each(&mut self, each: &mut EachArrival<'_>) {
        let ports = self.exchange.ports.read();
        for Delivery { src, frame, .. } in &self.arrived {
            if ports.by_number.get(src).is_none_or(|src| !src.passes(&self.port)) {
                continue;
            }
            match Frame::parse_ethernet(frame) {
                // What a damaged header makes of the destination is somebody else's.
                Ok((head, _)) if !is_for(&head, self.local) => each(self.local, Err(NOT_OURS)),
                Ok((head, datagram)) => {
                    let (src, _) = head.flow.addrs();
                    each(SocketAddr::new(src, head.flow.src_port), head.flow.open(datagram));
                }
                Err(error) => each(self.local, Err(error)),
            }
        }
    }

    fn receive_buffer(&self) -> usize {
        BUFFER
    }

    fn next_deadline(&self) -> Option<Nanos> {
        self.exchange.switch.lock().next_deadline(self.port.id().0)
    }
}

/// How a frame for another address or port counts: as malformed.
const NOT_OURS: WireError = WireError::Length { what: "destination", field: 0, len: 0 };

fn is_for(head: &Frame, local: SocketAddr) -> bool {
    head.flow.addrs().1 == local.ip() && head.flow.dst_port == local.port()
}
