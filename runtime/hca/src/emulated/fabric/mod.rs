//! What lies between the ports of emulated devices.
//!
//! A requester hands each request message, piece by piece, to a [`Wire`]; a responder executes what
//! arrives and answers with a [`Reply`]. A wire is all that a fabric is to the two state machines:
//! [`inproc`] calls the responder at once, a fabric between processes queues the request and brings the
//! answer in a later step. The requester copes with an answer that comes at once, later or never.
//!
//! What carries the requests is the fabric's [`Medium`]. A step of a device asks it twice: for what
//! arrived ([`Fabric::take_arrivals`]), and, per queue pair that sends, for a wire (`stepping.rs`).
//!
//! *Who owns what.* The [`Fabric`] knows ports by weak reference: a device that is dropped is a port
//! that stopped answering. Payload is read from the requester's memory at the instant of delivery.

pub(super) mod advert;
pub(super) mod inproc;
mod port;
pub(super) mod shm;

use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Weak};

use ibex_abi::types::{Gid, Lid, Mac, PathMtu, Psn};
use parking_lot::RwLock;

use super::EmulatedHca;
use super::capture::Capture;
use super::frames::switched::{self, Exchange};
use super::frames::{Station, ip_of};
use super::message::{Payload, Piece, Reply, Request, Target};
use super::requester::plain::Source;
use super::requester::send::Turn;
use super::switch::{FaultCounts, FaultPlan, Switch};
use super::udp::{Endpoint, Offloads, UdpConfig};
use crate::{HcaError, LinkLayer, Nanos, PathAddress, PortAddress, PortInfo};
use advert::{AdvertError, AdvertKind};
pub(super) use port::Port;
pub use shm::ShmConfig;

/// Most ports on one fabric.
pub const PORTS_MAX: usize = 1024;

/// A port of a [`Fabric`], numbered in the order of attachment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PortId(pub u16);

/// How messages of one queue pair may be placed in the responder's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Placement {
    /// A message is placed only after those before it.
    #[default]
    InOrder,
    /// RDMA WRITEs are placed in any order among themselves, as with adaptive routing; atomics, sends,
    /// reads and completions keep the order. Matters to [`EmulatedHca::step_seeded`] only.
    WritesAnyOrder,
}

/// State of one direction between two ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PathState {
    /// Packets arrive.
    Up,
    /// Packets vanish.
    Cut,
}

/// What a fabric is made with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FabricConfig {
    /// Mixed into what the fabric chooses: addresses of ports.
    pub seed: u64,
    /// Placement rule.
    pub placement: Placement,
    /// Largest MTU of every port.
    pub mtu: PathMtu,
}

impl Default for FabricConfig {
    fn default() -> Self {
        Self { seed: 1, placement: Placement::InOrder, mtu: PathMtu::B4096 }
    }
}

/// The way of one queue pair's requests to its responder.
pub(super) trait Wire {
    /// Carries one piece of a request; `payload` is the whole message's payload.
    ///
    /// Without a reply no answer came back at once: it was lost, or it comes later, or it never comes. The
    /// requester's timer tells.
    fn carry(&mut self, request: &Request, payload: Payload<'_>, piece: Piece) -> Carried;

    /// Carries a whole RDMA WRITE and its acknowledgement, if nothing is in the way of either; otherwise
    /// nothing happens, and [`carry`](Self::carry) tells what is wrong.
    fn write_plain(&mut self, psn: Psn, packets: u32, to: Target, source: Source<'_>) -> bool;
}

/// What became of a request that was handed to a [`Wire`].
pub(super) enum Carried {
    /// It is on its way, and perhaps answered already.
    Whole(Option<Reply>),
    /// Only payload before this position was taken, for want of room: the rest, [`Piece::Part`], is to be
    /// carried later and ends the message.
    Upto(u64),
}

/// What carries requests from port to port.
#[derive(Debug)]
pub(super) enum Medium {
    /// Direct calls between the devices of this process.
    Inproc,
    /// Frames through a simulated switch, between the devices of this process.
    Switched(Arc<Exchange>),
    /// Packets through a UDP socket; one port of this process, others by advert.
    Udp(Arc<Endpoint>),
    /// Rings in shared memory, between processes of one host.
    Shm(shm::Shm),
}

/// A set of ports and the paths between them.
#[derive(Debug)]
pub struct Fabric {
    config: FabricConfig,
    medium: Medium,
    ports: RwLock<Vec<Arc<Port>>>,
}

impl Fabric {
    /// A fabric within this process: requests execute by direct calls between devices.
    #[must_use]
    pub fn inproc(config: FabricConfig) -> Arc<Self> {
        Arc::new(Self { config, medium: Medium::Inproc, ports: RwLock::default() })
    }

    /// A fabric within this process whose ports exchange frames through a switch that follows `plan`.
    ///
    /// Devices on it are driven on one clock, virtual or real; their ports are Ethernet ports.
    ///
    /// # Errors
    /// [`HcaError::Plan`] if a value of the plan is out of its range.
    pub fn switched(config: FabricConfig, plan: FaultPlan) -> Result<Arc<Self>, HcaError> {
        let medium = Medium::Switched(Exchange::new(Switch::new(plan, switched::LATENCY)?));
        Ok(Arc::new(Self { config, medium, ports: RwLock::default() }))
    }

    /// A fabric of one port of this process, which is a UDP socket, and of those it admits.
    ///
    /// # Errors
    /// [`HcaError::Plan`], [`HcaError::Unreachable`] for an address that is not one host's, or the
    /// operating system's refusal, such as `EADDRINUSE`.
    pub fn udp(config: UdpConfig) -> Result<Arc<Self>, HcaError> {
        let general = FabricConfig { mtu: config.mtu, ..FabricConfig::default() };
        let medium = Medium::Udp(Endpoint::new(config)?);
        Ok(Arc::new(Self { config: general, medium, ports: RwLock::default() }))
    }

    /// What a switch in this process did to frames so far; `None` where there is none.
    #[must_use]
    pub fn fault_counts(&self) -> Option<FaultCounts> {
        match &self.medium {
            Medium::Inproc | Medium::Shm(_) => None,
            Medium::Switched(exchange) => Some(exchange.counts()),
            Medium::Udp(endpoint) => endpoint.fault_counts(),
        }
    }

    /// Has the switch of this process follow another plan; frames in flight go on as they were sent.
    ///
    /// A simulated switch does so at once, one at the exit of a udp fabric's port with the device's next step.
    ///
    /// # Errors
    /// [`HcaError::Plan`] if a value of the plan is out of its range, [`HcaError::Unreachable`] where frames pass no
    /// switch.
    pub fn set_fault_plan(&self, plan: FaultPlan) -> Result<(), HcaError> {
        match &self.medium {
            Medium::Switched(exchange) => exchange.set_plan(plan),
            Medium::Udp(endpoint) => endpoint.set_plan(plan),
            _ => Err(HcaError::Unreachable { reason: "a fabric without a switch follows no plan" }),
        }
    }

    /// Ends this process's end of a udp fabric within a message, as a process ends that is killed there: the first
    /// packet of the next message that has several is the last that leaves the port.
    ///
    /// # Errors
    /// [`HcaError::Unreachable`] where no packets leave a socket.
    pub fn end_within_message(&self) -> Result<(), HcaError> {
        match &self.medium {
            Medium::Udp(endpoint) => {
                endpoint.end_within_message();
                Ok(())
            }
            _ => Err(HcaError::Unreachable { reason: "a fabric without packets has no parts of messages" }),
        }
    }

    /// Whether [`Fabric::end_within_message`] has come to that message.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        matches!(&self.medium, Medium::Udp(endpoint) if endpoint.has_ended())
    }

    /// Where the socket of a udp fabric is bound, and what the kernel does for it.
    #[must_use]
    pub fn socket(&self) -> Option<(SocketAddr, Offloads)> {
        match &self.medium {
            Medium::Udp(endpoint) => Some((endpoint.local(), endpoint.offloads())),
            Medium::Inproc | Medium::Switched(_) | Medium::Shm(_) => None,
        }
    }

    /// Waits until packets arrived from outside this process, or for `nanos`; whether some did.
    ///
    /// Returns at once where nothing arrives from outside. Doorbells of this process wake nobody: whoever
    /// waits here while others post keeps the time short.
    pub fn wait_for_arrivals(&self, nanos: u64) -> bool {
        match &self.medium {
            Medium::Udp(endpoint) => endpoint.wait(nanos),
            Medium::Shm(shm) => shm.wait(Nanos(nanos)),
            Medium::Inproc | Medium::Switched(_) => false,
        }
    }

    /// Whether ports of other processes may belong to it.
    pub(super) const fn spans_processes(&self) -> bool {
        matches!(self.medium, Medium::Udp(_) | Medium::Shm(_))
    }

    /// Has the frames of every port of this process, present ones, written to `capture`.
    ///
    /// A port keeps the first capture it was given.
    pub fn capture_to(&self, capture: &Arc<Capture>) {
        for port in self.ports.read().iter() {
            port.capture_to(Arc::clone(capture));
        }
    }

    /// A fabric between processes of one host, through shared memory; this process's part of it.
    ///
    /// Every process makes its own and tells the others the [`advert`](Self::advert) of each of its ports.
    ///
    /// # Errors
    /// [`HcaError::OutOfRange`] for a number of peers that cannot be.
    pub fn shm(config: ShmConfig) -> Result<Arc<Self>, HcaError> {
        let medium = Medium::Shm(shm::Shm::new(config)?);
        Ok(Arc::new(Self { config: config.fabric, medium, ports: RwLock::default() }))
    }

    /// What the fabric was made with.
    #[must_use]
    pub const fn config(&self) -> &FabricConfig {
        &self.config
    }

    /// Sets one direction between two ports, at once: a message in flight does not arrive.
    ///
    /// Unknown ports are ignored.
    pub fn set_path(&self, src: PortId, dst: PortId, state: PathState) {
        if let Some(port) = self.port(src) {
            port.set_path(dst, state);
        }
    }

    /// Sets both directions between two ports.
    pub fn set_pair(&self, one: PortId, other: PortId, state: PathState) {
        self.set_path(one, other, state);
        self.set_path(other, one, state);
    }

    /// Takes a port off the fabric for good, as if its process had died.
    pub fn kill(&self, port: PortId) {
        if let Some(killed) = self.port(port) {
            killed.kill();
        }
        if let Medium::Shm(shm) = &self.medium {
            shm.forget(port);
        }
    }

    /// Whether packets from `src` reach `dst` now.
    #[must_use]
    pub fn passes(&self, src: PortId, dst: PortId) -> bool {
        let (Some(from), Some(to)) = (self.port(src), self.port(dst)) else {
            return false;
        };
        from.passes(&to)
    }

    fn port(&self, id: PortId) -> Option<Arc<Port>> {
        self.ports.read().get(usize::from(id.0)).cloned()
    }

    /// The bytes by which a fabric of another process gets to know a port of this one.
    ///
    /// # Errors
    /// [`AdvertError::Local`] if no other process can reach the ports of this fabric.
    pub fn advert(&self, port: PortId) -> Result<Vec<u8>, HcaError> {
        let unknown = HcaError::Unknown { what: "port", number: port.0.into() };
        let port = self.port(port).ok_or(unknown)?;
        match &self.medium {
            Medium::Inproc | Medium::Switched(_) => Err(AdvertError::Local.into()),
            Medium::Udp(endpoint) => Ok(advert::seal(AdvertKind::Udp, port.info(), &endpoint.advert_body())),
            Medium::Shm(shm) => shm.advert(&port),
        }
    }

    /// Makes a port of another process known to this fabric, from the bytes of its advert.
    ///
    /// The bytes are not trusted; what is wrong with them is an error, and nothing changes.
    ///
    /// # Errors
    /// [`HcaError::Advert`] with the reason.
    pub fn admit(&self, advert: &[u8]) -> Result<PortId, HcaError> {
        match &self.medium {
            Medium::Inproc | Medium::Switched(_) => Err(AdvertError::Local.into()),
            Medium::Udp(endpoint) => {
                let (info, body) = advert::open(AdvertKind::Udp, advert)?;
                let (addr, node) = endpoint.read_advert(&info, body)?;
                let port = self.add_remote(info)?;
                let id = port.id();
                endpoint.learn(addr, node, port);
                Ok(id)
            }
            Medium::Shm(shm) => shm.admit(&self.ports, advert),
        }
    }

    /// Makes a port of another stack known to a udp fabric: Linux soft-RoCE, or hardware.
    ///
    /// It has the usual UDP port, sends no advert, and may number its packets and vary its source port as it
    /// likes. `node` stands for it in fault plans. Gives the address that queue pairs connect to; what MTU is
    /// right for it, whoever set it up knows.
    ///
    /// # Errors
    /// [`AdvertError::Local`] on other fabrics, [`HcaError::Unreachable`] for an address that is not one
    /// host's, [`AdvertError::AddressTaken`].
    pub fn admit_foreign(&self, ip: IpAddr, node: u16) -> Result<PortAddress, HcaError> {
        let Medium::Udp(endpoint) = &self.medium else { return Err(AdvertError::Local.into()) };
        let info = endpoint.foreign_info(ip)?;
        endpoint.learn_foreign(ip, node, self.add_remote(info)?);
        Ok(info.address())
    }

    /// Adds the port of a device of another process.
    fn add_remote(&self, info: PortInfo) -> Result<Arc<Port>, HcaError> {
        let mut ports = self.ports.write();
        if let Some(known) = ports.iter().find(|port| port.info().address() == info.address()) {
            return Err(AdvertError::AddressTaken { port: known.id().0 }.into());
        }
        let port = Arc::new(Port::new(next_id(&ports)?, Weak::new(), info));
        ports.push(Arc::clone(&port));
        Ok(port)
    }

    /// What carries the requests.
    #[inline]
    pub(super) const fn medium(&self) -> &Medium {
        &self.medium
    }

    /// Lets `device` execute requests and take in answers that came from other processes.
    #[inline]
    pub(super) fn take_arrivals(&self, device: &EmulatedHca, now: Nanos) -> Turn {
        match &self.medium {
            // Where packets arrive, the station takes them in.
            Medium::Inproc | Medium::Switched(_) | Medium::Udp(_) => Turn::default(),
            Medium::Shm(shm) => shm.take_arrivals(device, now),
        }
    }

    /// Adds the port of a device of this process.
    pub(super) fn attach(
        &self,
        device: &Weak<EmulatedHca>,
        make: impl FnOnce(PortId) -> PortInfo,
    ) -> Result<Arc<Port>, HcaError> {
        let mut ports = self.ports.write();
        let id = next_id(&ports)?;
        if matches!(self.medium, Medium::Udp(_)) && ports.iter().any(|port| port.is_local()) {
            return Err(HcaError::Exhausted { what: "ports of a socket", requested: 1, limit: 1 });
        }
        let port = match &self.medium {
            Medium::Shm(shm) => {
                let port = Port::new(id, device.clone(), make(shm.next_number()?));
                let port = Arc::new(port.with_memory(Some(shm.new_memory()?)));
                shm.add_local(&port)?;
                port
            }
            _ => Arc::new(Port::new(id, device.clone(), make(id))),
        };
        ports.push(Arc::clone(&port));
        Ok(port)
    }

    /// The device that an address vector leads to.
    pub(super) fn locate(&self, to: &PathAddress) -> Option<Arc<EmulatedHca>> {
        let ports = self.ports.read();
        ports.iter().find(|port| port.answers_to(to))?.device.upgrade()
    }

    /// What the device behind `port` sends and receives packets through; `None` if there are none here.
    pub(super) fn station(&self, port: &Arc<Port>) -> Result<Option<Station>, HcaError> {
        let carrier = match &self.medium {
            Medium::Inproc | Medium::Shm(_) => return Ok(None),
            Medium::Switched(_) | Medium::Udp(_) if port.info().link == LinkLayer::Ib => {
                return Err(HcaError::Unreachable { reason: "a fabric of RoCEv2 frames has Ethernet ports" });
            }
            Medium::Switched(exchange) => exchange.plug(port),
            Medium::Udp(endpoint) => endpoint.carrier(port)?,
        };
        Ok(Some(Station::new(carrier)))
    }

    /// The path from `port` to `to`: its MTU is the smallest of both ports' and the route's.
    pub(super) fn path_mtu(&self, port: &Port, to: &PathAddress) -> Result<PathMtu, HcaError> {
        let unknown = HcaError::Unreachable { reason: "no port has this address" };
        let far = self.ports.read().iter().find(|port| port.answers_to(to)).cloned().ok_or(unknown)?;
        if far.is_local() && far.device.strong_count() == 0 {
            return Err(unknown);
        }
        let mtu = port.info().mtu.min(far.info().mtu);
        match &self.medium {
            Medium::Inproc | Medium::Switched(_) | Medium::Shm(_) => Ok(mtu),
            Medium::Udp(endpoint) => Ok(mtu.min(endpoint.route_mtu(ip_of(far.info().gid))?)),
        }
    }

    /// Who the `id`-th port is.
    pub(super) fn port_info(&self, id: PortId, link: LinkLayer) -> PortInfo {
        if let (Medium::Udp(endpoint), LinkLayer::Roce) = (&self.medium, link) {
            return endpoint.port_info();
        }
        let (lid, gid, mac) = self.addresses(id, link);
        PortInfo { port_num: 1, link, lid, gid, gid_index: 0, mac, mtu: self.config.mtu }
    }

    /// The addresses of the `id`-th port.
    fn addresses(&self, id: PortId, link: LinkLayer) -> (Lid, Gid, Mac) {
        let [hi, lo] = id.0.to_be_bytes();
        let [.., s] = self.config.seed.to_be_bytes();
        match link {
            LinkLayer::Ib => {
                let mut gid = [0; 16];
                (gid[0], gid[1], gid[13], gid[14], gid[15]) = (0xfe, 0x80, s, hi, lo);
                (Lid(id.0 + 1), Gid(gid), Mac::default())
            }
            LinkLayer::Roce => {
                // An IPv4-mapped GID in 10/8, and a locally administered MAC.
                let host = (id.0 + 1).to_be_bytes();
                let mut gid = [0; 16];
                (gid[10], gid[11]) = (0xff, 0xff);
                (gid[12], gid[13], gid[14], gid[15]) = (10, s, host[0], host[1]);
                (Lid(0), Gid(gid), Mac([2, 0x1b, 0xe8, s, hi, lo]))
            }
        }
    }
}

/// The identifier of the next port, if there may be one.
fn next_id(ports: &[Arc<Port>]) -> Result<PortId, HcaError> {
    match u16::try_from(ports.len()) {
        Ok(id) if usize::from(id) < PORTS_MAX => Ok(PortId(id)),
        _ => Err(HcaError::Exhausted { what: "ports", requested: 1, limit: PORTS_MAX as u64 }),
    }
}
