//! A port of another stack: it numbers its packets as it likes and chooses its source ports.
//!
//! The stack is played by two plain sockets, one that sends and one that listens on RoCEv2's port. What a
//! real one does is seen in the root package's `tests/soft_roce`.
#![allow(clippy::unwrap_used, reason = "in a test a failed expectation is the message")]

mod rig;

use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use ibex_abi::types::{Psn, QpNum};
use ibex_hca::control_region::ControlRegion;
use ibex_hca::emulated::{AdvertError, EmulatedConfig, EmulatedHca, Fabric, FabricConfig, UdpConfig};
use ibex_hca::host_memory::Registered;
use ibex_hca::host_qp::{ConnectSpec, Endpoint, HostQp, HostQpSpec, Rts};
use ibex_hca::{Access, HcaError, Nanos, PortAddress};
use ibex_roce::wire::{Bth, Extension, Flow, Headers, Opcode, Packet, Part, ROCE_PORT, Reth};
use ibex_roce::{PKey, RemoteAddr, RemoteRange};

/// Addresses of this test alone: RoCEv2's port must be free at the second.
const OURS: IpAddr = IpAddr::V4(Ipv4Addr::new(127, 77, 3, 1));
const THEIRS: IpAddr = IpAddr::V4(Ipv4Addr::new(127, 77, 3, 2));
const STRANGER: IpAddr = IpAddr::V4(Ipv4Addr::new(127, 77, 3, 3));

/// One device, connected to a stack that is not ours.
struct Stage {
    qp: HostQp<Rts>,
    memory: Registered,
    _region: ControlRegion,
    device: Arc<EmulatedHca>,
    local: SocketAddr,
}

impl Stage {
    fn new() -> Self {
        let bind = SocketAddr::new(OURS, 0);
        let fabric = Fabric::udp(UdpConfig { bind, ..UdpConfig::new(OURS) }).unwrap();
        let device = EmulatedHca::new(Arc::clone(&fabric), EmulatedConfig::default()).unwrap();
        let address: PortAddress = fabric.admit_foreign(THEIRS, 1).unwrap();
        let hca = rig::as_hca(&device);
        let pd = hca.alloc_pd().unwrap();
        let region = ControlRegion::host(&hca, 1 << 20).unwrap();
        let memory = Registered::new(&hca, pd, 4096, Access::ALL).unwrap();
        let qp = HostQp::create(&region, pd, HostQpSpec::default()).unwrap();
        let remote = Endpoint { address, qpn: QpNum::new(0x77), psn: Psn::new(5) };
        let qp = qp.connect(&remote, &ConnectSpec::default()).unwrap();
        let (local, _) = fabric.socket().unwrap();
        Self { qp, memory, _region: region, device, local }
    }

    /// A WRITE of eight bytes to the start of our memory, as a packet with this identification.
    fn write(&self, from: SocketAddr, id: u16, psn: u32) -> Vec<u8> {
        let bth = Bth {
            opcode: Opcode::write(Part::Only, false),
            solicited: false,
            migrated: false,
            pad: 0,
            pkey: PKey::DEFAULT,
            fecn: false,
            becn: false,
            dest_qpn: ibex_roce::QpNum::new(self.qp.qpn().get()),
            ack_req: true,
            psn: ibex_roce::Psn::new(psn),
        };
        let addr = RemoteAddr { va: self.memory.iova(0), rkey: self.memory.key().rkey.get() };
        let ext = Extension::Reth(Reth(RemoteRange { addr, len: 8 }));
        let packet = Packet::new(Headers { bth, ext }, b"foreign!");
        let mut bytes = vec![0; packet.len() + 4];
        packet.emit(&mut bytes).unwrap();
        let flow = Flow::new(from.ip(), self.local.ip(), from.port()).unwrap().with_id(id);
        Flow { dst_port: self.local.port(), ..flow }.seal(&mut bytes).unwrap();
        bytes
    }

    /// Sends a datagram and lets the device take it in.
    fn take(&self, from: &UdpSocket, datagram: &[u8]) {
        let before = self.device.counters().packets.received;
        from.send_to(datagram, self.local).unwrap();
        while self.device.counters().packets.received == before {
            self.device.fabric().wait_for_arrivals(1_000_000);
            self.device.step(Nanos(0));
        }
        self.device.step(Nanos(0));
    }
}

fn socket(ip: IpAddr, port: u16) -> UdpSocket {
    let socket = UdpSocket::bind((ip, port)).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    socket
}

#[test]
fn a_foreign_port_sends_from_any_port_with_any_identification() {
    let (stage, ear) = (Stage::new(), socket(THEIRS, ROCE_PORT));
    for (psn, id) in [(5, 0), (6, 0x9a68), (7, 63), (8, u16::MAX)] {
        // A fresh source port each time.
        let mouth = socket(THEIRS, 0);
        stage.memory.view().write(0, &[0; 8]);
        stage.take(&mouth, &stage.write(mouth.local_addr().unwrap(), id, psn));
        assert_eq!(stage.memory.view().to_vec(0, 8), b"foreign!", "identification {id}");
        let mut answer = [0; 64];
        let (len, from) = ear.recv_from(&mut answer).unwrap();
        assert_eq!((len, from), (20, stage.local));
        assert_eq!((answer[0], answer[11]), (Opcode::Ack.byte(), u8::try_from(psn).unwrap()));
    }
}

#[test]
fn damage_and_strangers_change_nothing_and_are_counted() {
    let stage = Stage::new();
    let mouth = socket(THEIRS, 0);
    let good = stage.write(mouth.local_addr().unwrap(), 0x9a68, 5);
    for at in 0..good.len() {
        // Congestion bits may change on the way.
        if at == 4 {
            continue;
        }
        let mut bad = good.clone();
        bad[at] ^= 0x20;
        stage.take(&mouth, &bad);
    }
    let stranger = socket(STRANGER, 0);
    let from = stranger.local_addr().unwrap();
    // A number that no peer of ours uses, then a packet that is right in itself.
    stage.take(&stranger, &stage.write(from, 0x9a68, 5));
    stage.take(&stranger, &stage.write(from, 0, 5));
    let packets = stage.device.counters().packets;
    assert_eq!(packets.bad_icrc, good.len() as u64, "each damaged byte but one, and the stranger's number");
    assert_eq!(packets.wrong_source, 1);
    assert_eq!(stage.memory.view().to_vec(0, 4096), [0; 4096]);
    stage.take(&mouth, &good);
    assert_eq!(stage.memory.view().to_vec(0, 8), b"foreign!");
}

#[test]
fn only_one_host_of_the_same_family_is_admitted_and_only_by_sockets() {
    let bind = SocketAddr::new(OURS, 0);
    let fabric = Fabric::udp(UdpConfig { bind, ..UdpConfig::new(OURS) }).unwrap();
    for ip in ["::1", "0.0.0.0", "224.0.0.1"] {
        let refused = fabric.admit_foreign(ip.parse().unwrap(), 1);
        assert!(matches!(refused, Err(HcaError::Unreachable { .. })), "{ip}: {refused:?}");
    }
    fabric.admit_foreign(THEIRS, 1).unwrap();
    let again = fabric.admit_foreign(THEIRS, 2);
    assert!(matches!(again, Err(HcaError::Advert(AdvertError::AddressTaken { .. }))), "{again:?}");
    let inproc = Fabric::inproc(FabricConfig::default()).admit_foreign(THEIRS, 1);
    assert!(matches!(inproc, Err(HcaError::Advert(AdvertError::Local))), "{inproc:?}");
}
