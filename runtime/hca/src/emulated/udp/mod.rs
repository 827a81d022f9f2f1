//! RC over RoCEv2 through UDP sockets: one socket per device.
//!
//! Frames are those of RoCEv2: Wireshark decodes them, and the ICRC is the one that other stacks compute,
//! identification and all (`ident.rs`). Both ports of a flow are the sockets' own: the source port, which
//! hardware varies per queue pair to spread flows over paths, cannot be chosen per datagram.
//!
//! *Who owns what.* The [`Endpoint`] owns the socket and knows the peers; it is the fabric's. The carrier is
//! the device's: it owns datagrams on their way and, under a fault plan, a switch at its exit.
//!
//! What a UDP socket does not show of an arriving packet is its identification, which the ICRC covers.
//! Senders of this kind use numbers below 64, so those are tried; a packet that needs another number is
//! refused as damaged. Foreign ports (Linux soft-RoCE, hardware) number as they like, which leaves 16 of the
//! ICRC's 32 bits to tell damage; so only ports that were [admitted](super::Fabric::admit_foreign) as such
//! may. They also choose their source ports. IPv6 has no identification.

mod bare;
mod ident;
mod socket;

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

use ibex_abi::types::{Lid, PathMtu};
use ibex_roce::Mtu;
use ibex_roce::wire::{
    Class, Flow, Frame, HiddenId, ICRC_LEN, Ips, Link, Opcode, Part, ROCE_PORT, WireError,
};
use parking_lot::{Mutex, RwLock};

use super::capture::Origin;
use super::fabric::Port;
use super::fabric::advert::AdvertError;
use super::frames::{Carrier, EachArrival, PACKET_LEN_MAX, gid_of, ip_of, mac_of, path_mtu, port_of};
use super::switch::{FaultCounts, FaultPlan, PlanLimit, Switch};
use crate::{HcaError, LinkLayer, Nanos, PortInfo};
pub use bare::BareSocket;
use ident::IdentTable;
pub use socket::Offloads;
use socket::{Inbox, Outbox, Socket};

/// Bytes of an advert's body: the node's number.
const BODY_LEN: usize = 2;

/// What a udp fabric is made with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UdpConfig {
    /// Address and port of the socket; RoCEv2's port is [`ROCE_PORT`], port 0 takes any.
    pub bind: SocketAddr,
    /// Number of this port in fault plans: the rank.
    pub node: u16,
    /// Largest MTU of the port; paths may have less.
    pub mtu: PathMtu,
    /// What goes wrong with what this port sends.
    pub faults: Option<FaultPlan>,
}

impl UdpConfig {
    /// RoCEv2's port at `ip`, nothing going wrong.
    #[must_use]
    pub const fn new(ip: IpAddr) -> Self {
        Self { bind: SocketAddr::new(ip, ROCE_PORT), node: 0, mtu: PathMtu::B4096, faults: None }
    }
}

/// A port at the other end of a path.
#[derive(Debug, Clone)]
struct Peer {
    node: u16,
    /// Another stack than this one.
    foreign: bool,
    port: Arc<Port>,
}

/// The socket of a fabric's one port, and whom it knows.
#[derive(Debug)]
pub(super) struct Endpoint {
    config: UdpConfig,
    socket: Socket,
    peers: RwLock<HashMap<SocketAddr, Peer>>,
    fault_counts: Mutex<Option<FaultCounts>>,
    /// A plan that the device is to follow from its next step on.
    next_plan: Mutex<Option<FaultPlan>>,
    has_next_plan: AtomicBool,
    /// One of [`SENDING`], [`ENDING`], [`ENDED`].
    life: AtomicU8,
}

/// The port sends what its device wants.
const SENDING: u8 = 0;
/// It ends with the next packet that begins a message and does not end it.
const ENDING: u8 = 1;
/// It has; nothing leaves it any more.
const ENDED: u8 = 2;

impl Endpoint {
    pub(super) fn new(config: UdpConfig) -> Result<Arc<Self>, HcaError> {
        if let Some(plan) = &config.faults {
            plan.check()?;
        }
        let socket = Socket::bind(config.bind)?;
        Ok(Arc::new(Self {
            config,
            socket,
            peers: RwLock::default(),
            fault_counts: Mutex::default(),
            next_plan: Mutex::default(),
            has_next_plan: AtomicBool::new(false),
            life: AtomicU8::new(SENDING),
        }))
    }

    /// Has the device follow another plan from its next step on.
    pub(super) fn set_plan(&self, plan: FaultPlan) -> Result<(), HcaError> {
        plan.check()?;
        *self.next_plan.lock() = Some(plan);
        self.has_next_plan.store(true, Ordering::Release);
        Ok(())
    }

    /// Nothing leaves the port from the first part of the next message on that has several.
    pub(super) fn end_within_message(&self) {
        let _ = self.life.compare_exchange(SENDING, ENDING, Ordering::AcqRel, Ordering::Relaxed);
    }

    /// Whether it has ended so.
    pub(super) fn has_ended(&self) -> bool {
        self.life.load(Ordering::Acquire) == ENDED
    }

    /// Whether a packet may leave; the one within whose message the port is to end is the last that may.
    fn lets_out(&self, packet: &[u8]) -> bool {
        match self.life.load(Ordering::Relaxed) {
            SENDING => true,
            ENDING => {
                if is_first_of_several(packet) {
                    self.life.store(ENDED, Ordering::Release);
                }
                true
            }
            _ => false,
        }
    }

    /// Where the socket is bound.
    pub(super) fn local(&self) -> SocketAddr {
        self.socket.local()
    }

    pub(super) fn offloads(&self) -> Offloads {
        self.socket.offloads()
    }

    /// What other processes must know besides the port's address.
    pub(super) fn advert_body(&self) -> [u8; BODY_LEN] {
        self.config.node.to_le_bytes()
    }

    /// Reads an advert: where the port's socket is, and its number in fault plans.
    pub(super) fn read_advert(&self, info: &PortInfo, body: &[u8]) -> Result<(SocketAddr, u16), HcaError> {
        let len = body.len() as u64;
        let malformed = |what| AdvertError::Malformed { what, len };
        let node =
            <[u8; BODY_LEN]>::try_from(body).map_err(|_| malformed("its body is not of a udp port"))?;
        if info.link != LinkLayer::Roce {
            return Err(malformed("a udp port is an Ethernet port").into());
        }
        let addr = SocketAddr::new(ip_of(info.gid), port_of(info.mac));
        if addr.is_ipv4() != self.local().is_ipv4() {
            return Err(HcaError::Unreachable { reason: "one port has an IPv4 address, the other IPv6" });
        }
        if addr.ip().is_unspecified() || addr.ip().is_multicast() || addr.port() == 0 {
            return Err(malformed("its address is not one host's").into());
        }
        Ok((addr, u16::from_le_bytes(node)))
    }

    /// What the switch at the exit did so far, if there is one.
    pub(super) fn fault_counts(&self) -> Option<FaultCounts> {
        *self.fault_counts.lock()
    }

    /// The port as its device shows it.
    pub(super) fn port_info(&self) -> PortInfo {
        let local = self.local();
        let (gid, mac, mtu) = (gid_of(local.ip()), mac_of(local.port()), self.config.mtu);
        let (link, lid) = (LinkLayer::Roce, Lid(0));
        PortInfo { port_num: 1, link, lid, gid, gid_index: 0, mac, mtu }
    }

    /// Makes a port known: this one, or an admitted one.
    pub(super) fn learn(&self, addr: SocketAddr, node: u16, port: Arc<Port>) {
        self.peers.write().insert(addr, Peer { node, foreign: false, port });
    }

    /// The port of another stack at `ip`, which is RoCEv2's.
    pub(super) fn foreign_info(&self, ip: IpAddr) -> Result<PortInfo, HcaError> {
        if ip.is_ipv4() != self.local().is_ipv4() {
            return Err(HcaError::Unreachable { reason: "one port has an IPv4 address, the other IPv6" });
        }
        if ip.is_unspecified() || ip.is_multicast() {
            return Err(HcaError::Unreachable { reason: "this address is not one host's" });
        }
        Ok(PortInfo { gid: gid_of(ip), mac: mac_of(ROCE_PORT), mtu: PathMtu::B4096, ..self.port_info() })
    }

    /// Makes the port of another stack known.
    pub(super) fn learn_foreign(&self, ip: IpAddr, node: u16, port: Arc<Port>) {
        let peer = Peer { node, foreign: true, port };
        self.peers.write().insert(SocketAddr::new(ip, ROCE_PORT), peer);
    }

    /// The largest MTU whose packets the route to `to` carries.
    pub(super) fn route_mtu(&self, to: IpAddr) -> Result<PathMtu, HcaError> {
        let len = self.socket.payload_max(to)?;
        let smallest = Mtu::B256.packet_len_max() as u64;
        let too_small = HcaError::OutOfRange {
            field: "UDP payload of the route's MTU",
            value: len as u64,
            min: smallest,
            max: PACKET_LEN_MAX as u64,
        };
        Mtu::fitting(len).map(path_mtu).ok_or(too_small)
    }

    /// Waits until something arrived, or for `nanos`; whether something did.
    pub(super) fn wait(&self, nanos: u64) -> bool {
        self.socket.wait(nanos)
    }

    /// What the device behind `port` sends and receives through.
    pub(super) fn carrier(self: &Arc<Self>, port: &Arc<Port>) -> Result<Box<dyn Carrier>, HcaError> {
        self.learn(self.local(), self.config.node, Arc::clone(port));
        let exit = self.config.faults.clone().map(Exit::new).transpose()?;
        Ok(Box::new(UdpCarrier {
            outbox: Outbox::new(&self.socket),
            inbox: Inbox::new(),
            idents: IdentTable::default(),
            hidden: HiddenId::default(),
            exit,
            unsent: 0,
            latest: None,
            now: Nanos(0),
            frame: Vec::new(),
            endpoint: Arc::clone(self),
            port: Arc::clone(port),
        }))
    }
}

/// The switch at a device's exit.
#[derive(Debug)]
struct Exit {
    switch: Switch,
    /// Where a packet is written before the switch takes it.
    room: Box<[u8]>,
}

impl Exit {
    fn new(plan: FaultPlan) -> Result<Self, PlanLimit> {
        let room = vec![0; PACKET_LEN_MAX].into_boxed_slice();
        Ok(Self { switch: Switch::new(plan, Nanos(0))?, room })
    }
}

#[derive(Debug)]
struct UdpCarrier {
    endpoint: Arc<Endpoint>,
    port: Arc<Port>,
    outbox: Outbox,
    inbox: Inbox,
    idents: IdentTable,
    hidden: HiddenId,
    exit: Option<Exit>,
    unsent: u64,
    /// Where the latest packet went.
    latest: Option<(SocketAddr, Peer, Flow)>,
    /// When the inbox was filled.
    now: Nanos,
    /// A frame on its way to a capture.
    frame: Vec<u8>,
}

impl UdpCarrier {
    /// Makes `latest` the way to an address; looked up once for a run of packets. Whether there is one.
    fn find_way(&mut self, to: SocketAddr) -> bool {
        if self.latest.as_ref().is_some_and(|(addr, ..)| *addr == to) {
            return true;
        }
        let Some(peer) = self.endpoint.peers.read().get(&to).cloned() else { return false };
        let flow = flow_from(self.endpoint.local(), to);
        self.latest = flow.map(|flow| (to, peer, flow));
        self.latest.is_some()
    }

    /// Takes up another plan, between two packets. Without one before, there was no switch; from now on there is.
    fn follow_plan(&mut self) {
        if !self.endpoint.has_next_plan.swap(false, Ordering::AcqRel) {
            return;
        }
        let Some(plan) = self.endpoint.next_plan.lock().take() else { return };
        // Plans are checked when they are set.
        match &mut self.exit {
            Some(exit) => drop(exit.switch.set_plan(plan)),
            None => self.exit = Exit::new(plan).ok(),
        }
    }

    /// Moves what the switch lets go to the outbox. A node has had several addresses if its processes have: each
    /// packet goes to the port that it was meant for.
    fn release(&mut self, now: Nanos) {
        let Some(mut exit) = self.exit.take() else { return };
        let peers: BTreeMap<(u16, u16), SocketAddr> = {
            let peers = self.endpoint.peers.read();
            peers.iter().map(|(addr, peer)| ((peer.node, peer.port.id().0), *addr)).collect()
        };
        for (node, _) in peers.keys().copied() {
            while exit.switch.next_deadline(node).is_some_and(|due| due <= now) {
                if self.outbox.room(PACKET_LEN_MAX).is_none() {
                    self.flush_outbox();
                }
                let Some(room) = self.outbox.room(PACKET_LEN_MAX) else { break };
                let Some(delivery) = exit.switch.poll(now, node) else { break };
                let Some(addr) = peers.get(&(node, delivery.mark)).copied() else { continue };
                let len = delivery.frame.len();
                room[..len].copy_from_slice(&delivery.frame);
                self.keep(now, addr, len);
                exit.switch.give_back(delivery.frame);
            }
        }
        *self.endpoint.fault_counts.lock() = Some(*exit.switch.counts());
        self.exit = Some(exit);
    }

    /// Puts the packet in the outbox's room, its ICRC made for identification 0, among those to be sent.
    fn keep(&mut self, now: Nanos, to: SocketAddr, len: usize) {
        let (ident, payload) = self.outbox.keep(to, len, &mut self.idents);
        if let Some(capture) = self.port.capture()
            && let Some(flow) = flow_from(self.endpoint.local(), to)
        {
            put_frame(&mut self.frame, &flow.with_id(ident), payload);
            capture.frame(now, Origin::Wire, &self.frame);
        }
    }

    fn flush_outbox(&mut self) {
        self.unsent += self.outbox.flush(&self.endpoint.socket).refused;
    }
}

/// The flow of datagrams from one socket to another; `None` between address families.
fn flow_from(from: SocketAddr, to: SocketAddr) -> Option<Flow> {
    let flow = Flow::new(from.ip(), to.ip(), from.port())?;
    Some(Flow { dst_port: to.port(), ..flow })
}

/// Whether a packet begins a message of the requester's and another one is to end it.
fn is_first_of_several(packet: &[u8]) -> bool {
    let opcode = packet.first().and_then(|byte| Opcode::from_byte(*byte));
    opcode
        .is_some_and(|opcode| matches!(opcode.class(), Class::Write(Part::First) | Class::Send(Part::First)))
}

/// Writes a frame around a UDP payload; Ethernet addresses stand for the ports, no kernel shows the real ones.
fn put_frame(frame: &mut Vec<u8>, flow: &Flow, payload: &[u8]) {
    let link = Link { src: mac_of(flow.src_port).0, dst: mac_of(flow.dst_port).0 };
    let head = Frame::new(Some(link), *flow);
    frame.clear();
    frame.resize(head.headers_len(), 0);
    if head.emit_headers(payload.len(), frame).is_ok() {
        frame.extend_from_slice(payload);
    }
}

impl Carrier for UdpCarrier {
    fn room(&mut self, _now: Nanos) -> Option<&mut [u8]> {
        if self.exit.is_some() {
            return self.exit.as_mut().map(|exit| &mut *exit.room);
        }
        if self.outbox.room(PACKET_LEN_MAX).is_none() {
            self.flush_outbox();
        }
        self.outbox.room(PACKET_LEN_MAX)
    }

    fn send(&mut self, now: Nanos, to: SocketAddr, len: usize) {
        if !self.find_way(to) {
            return;
        }
        let Some((_, peer, flow)) = &self.latest else { return };
        if !self.port.passes(&peer.port) {
            return;
        }
        if self.endpoint.life.load(Ordering::Relaxed) != SENDING {
            let packet = match &mut self.exit {
                Some(exit) => &exit.room[..len],
                None => self.outbox.room(len).map_or(&[][..], |room| &*room),
            };
            if !self.endpoint.lets_out(packet) {
                return;
            }
        }
        if let Some(exit) = &mut self.exit {
            let packet = &mut exit.room[..len];
            if flow.seal(packet).is_ok() {
                let to = (peer.node, peer.port.id().0);
                exit.switch.submit_marked(now, self.endpoint.config.node, to, packet);
            }
        } else if let Some(room) = self.outbox.room(len)
            && flow.seal(room).is_ok()
        {
            self.keep(now, to, len);
        }
    }

    fn flush(&mut self, now: Nanos) {
        self.release(now);
        if !self.outbox.is_empty() {
            self.flush_outbox();
        }
        self.follow_plan();
    }

    fn fill(&mut self, now: Nanos) -> bool {
        self.now = now;
        self.inbox.fill(&self.endpoint.socket);
        !self.inbox.is_empty()
    }

    fn for_each(&mut self, each: &mut EachArrival<'_>) {
        let local = self.endpoint.local();
        let peers = self.endpoint.peers.read();
        let mut source: Option<Source<'_>> = None;
        for datagram in self.inbox.datagrams() {
            // Looked up once for a run of datagrams.
            if source.as_ref().is_none_or(|source| source.seen != datagram.from) {
                source = Source::find(&peers, datagram.from, local);
            }
            let Some(Source { from, peer, flow, .. }) = &source else { continue };
            if peer.is_some_and(|peer| !peer.port.passes(&self.port)) {
                continue;
            }
            let (opened, ident) = if peer.is_some_and(|peer| peer.foreign) {
                open_foreign(flow, &mut self.hidden, datagram.payload)
            } else {
                open(flow, &mut self.idents, datagram.payload, datagram.nth)
            };
            if let Some(capture) = self.port.capture() {
                put_frame(&mut self.frame, &flow.with_id(ident), datagram.payload);
                capture.frame(self.now, Origin::Wire, &self.frame);
            }
            each(*from, opened);
        }
    }

    fn receive_buffer(&self) -> usize {
        // Both ends are of one kind: the other's buffer is taken to be like this one.
        self.endpoint.offloads().receive_buffer
    }

    fn next_deadline(&self) -> Option<Nanos> {
        if !self.outbox.is_empty() {
            // The kernel had no room; it says to nobody when it has.
            return Some(self.now);
        }
        let exit = self.exit.as_ref()?;
        self.endpoint.peers.read().values().filter_map(|peer| exit.switch.next_deadline(peer.node)).min()
    }

    fn take_unsent(&mut self) -> u64 {
        std::mem::take(&mut self.unsent)
    }
}

/// Where datagrams come from.
struct Source<'a> {
    /// Their source address as it is.
    seen: SocketAddr,
    /// The address by which the port is known.
    from: SocketAddr,
    peer: Option<&'a Peer>,
    flow: Flow,
}

impl<'a> Source<'a> {
    fn find(peers: &'a HashMap<SocketAddr, Peer>, seen: SocketAddr, local: SocketAddr) -> Option<Self> {
        let (from, peer) = sender(peers, seen);
        Some(Self { seen, from, peer, flow: flow_from(seen, local)? })
    }
}

/// The port that a datagram comes from, by its address; foreign ones vary the source port.
fn sender(peers: &HashMap<SocketAddr, Peer>, from: SocketAddr) -> (SocketAddr, Option<&Peer>) {
    if let Some(peer) = peers.get(&from) {
        return (from, Some(peer));
    }
    let usual = SocketAddr::new(from.ip(), ROCE_PORT);
    match peers.get(&usual).filter(|peer| peer.foreign) {
        Some(peer) => (usual, Some(peer)),
        None => (from, None),
    }
}

/// Checks the ICRC whatever the identification was; also gives that.
fn open_foreign<'a>(
    flow: &Flow,
    hidden: &mut HiddenId,
    payload: &'a [u8],
) -> (Result<&'a [u8], WireError>, u16) {
    match hidden.open(flow, payload) {
        Ok((packet, Flow { ips: Ips::V4 { id, .. }, .. })) => (Ok(packet), id),
        Ok((packet, _)) => (Ok(packet), 0),
        Err(error) => (Err(error), 0),
    }
}

/// Checks the ICRC under every identification that a sender of this kind may have used; also gives that.
fn open<'a>(
    flow: &Flow,
    idents: &mut IdentTable,
    payload: &'a [u8],
    likely: u16,
) -> (Result<&'a [u8], WireError>, u16) {
    match flow.open(payload) {
        Err(WireError::Icrc { found, computed }) if flow.addrs().0.is_ipv4() => {
            match idents.explain(payload.len(), found ^ computed, likely) {
                Some(ident) => (Ok(&payload[..payload.len() - ICRC_LEN]), ident),
                None => (Err(WireError::Icrc { found, computed }), 0),
            }
        }
        opened => (opened, 0),
    }
}
