//! Packets that a device must not believe: each changes no byte of memory and is counted by its reason.
//!
//! The victim is a device on a udp fabric. Its peer's place is taken by a plain socket, which sends whatever
//! a test makes up, from the very address that the victim is connected to.
#![allow(clippy::unwrap_used, reason = "in a test a failed expectation is the message")]

use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;

use ibex_abi::types::{PathMtu, Psn, QpNum, QpState};
use ibex_hca::control_region::ControlRegion;
use ibex_hca::emulated::{EmulatedConfig, EmulatedHca, Fabric, PacketCounters, UdpConfig};
use ibex_hca::host_memory::Registered;
use ibex_hca::host_qp::{ConnectSpec, Endpoint, HostQp, HostQpSpec, Rts};
use ibex_hca::{Access, Hca, Nanos, PortAddress};
use ibex_roce::wire::{AtomicEth, Bth, Extension, Flow, Headers, Opcode, Packet, Part, Reth};
use ibex_roce::{AtomicOp, PKey, RemoteAddr, RemoteRange};
use proptest::prelude::*;

const BUFFER: u64 = 4096;
const FIRST_PSN: u32 = 0xff_fffe;
const PEER_QPN: u32 = 0x77;

struct Victim {
    // Fields drop in this order: queue pair, memory, region.
    qp: HostQp<Rts>,
    /// Open to the peer.
    open: Registered,
    /// Registered without any remote right.
    closed: Registered,
    _region: ControlRegion,
    device: Arc<EmulatedHca>,
    /// The peer's place.
    peer: UdpSocket,
    local: SocketAddr,
    before: PacketCounters,
}

fn udp() -> Arc<EmulatedHca> {
    let bind: SocketAddr = "127.0.0.1:0".parse().unwrap();
    let fabric = Fabric::udp(UdpConfig { bind, ..UdpConfig::new(bind.ip()) }).unwrap();
    EmulatedHca::new(fabric, EmulatedConfig::default()).unwrap()
}

impl Victim {
    fn new(rights: Access) -> Self {
        let device = udp();
        let (address, peer) = {
            let stand_in = udp();
            let advert = stand_in.fabric().advert(stand_in.port_id()).unwrap();
            device.fabric().admit(&advert).unwrap();
            let (addr, _) = stand_in.fabric().socket().unwrap();
            (stand_in.port().address(), addr)
        };
        let peer = UdpSocket::bind(peer).unwrap();
        let hca = Arc::clone(&device) as Arc<dyn Hca>;
        let pd = hca.alloc_pd().unwrap();
        let region = ControlRegion::host(&hca, 64 << 10).unwrap();
        let open = Registered::new(&hca, pd, BUFFER, Access::ALL).unwrap();
        let closed = Registered::new(&hca, pd, BUFFER, Access::LOCAL_READ).unwrap();
        open.view().fill(0x5a);
        closed.view().fill(0x5a);
        let qp = HostQp::create(&region, pd, HostQpSpec::default()).unwrap();
        let qp = connect(qp, address, rights);
        let (local, _) = device.fabric().socket().unwrap();
        let before = device.counters().packets;
        Self { qp, open, closed, _region: region, device, peer, local, before }
    }

    /// A legal WRITE of 64 bytes.
    fn headers(&self) -> Headers {
        let addr = RemoteAddr { va: self.open.iova(0), rkey: self.open.key().rkey.get() };
        let bth = Bth {
            opcode: Opcode::write(Part::Only, false),
            solicited: false,
            migrated: true,
            pad: 0,
            pkey: PKey::DEFAULT,
            fecn: false,
            becn: false,
            dest_qpn: ibex_roce::QpNum::new(self.qp.qpn().get()),
            ack_req: true,
            psn: ibex_roce::Psn::new(FIRST_PSN),
        };
        Headers { bth, ext: Extension::Reth(Reth(RemoteRange { addr, len: 64 })) }
    }

    /// The datagram of a packet, sealed for the flow from `socket`.
    fn seal(&self, socket: &UdpSocket, headers: Headers, payload: &[u8]) -> Vec<u8> {
        let packet = Packet::new(headers, payload);
        let mut bytes = vec![0; packet.len() + 4];
        packet.emit(&mut bytes).unwrap();
        self.flow(socket).seal(&mut bytes).unwrap();
        bytes
    }

    fn flow(&self, socket: &UdpSocket) -> Flow {
        let from = socket.local_addr().unwrap();
        let flow = Flow::new(from.ip(), self.local.ip(), from.port()).unwrap();
        Flow { dst_port: self.local.port(), ..flow }
    }

    /// Lets the victim take in a datagram; what it counted.
    fn take(&mut self, socket: &UdpSocket, bytes: &[u8]) -> PacketCounters {
        socket.send_to(bytes, self.local).unwrap();
        let received = self.device.counters().packets.received;
        for _ in 0..1000 {
            self.device.step(Nanos(0));
            if self.device.counters().packets.received != received {
                break;
            }
            self.device.fabric().wait_for_arrivals(10_000_000);
        }
        self.since()
    }

    fn since(&self) -> PacketCounters {
        let (now, then) = (self.device.counters().packets, self.before);
        PacketCounters {
            bad_icrc: now.bad_icrc - then.bad_icrc,
            malformed: now.malformed - then.malformed,
            unknown_qp: now.unknown_qp - then.unknown_qp,
            wrong_source: now.wrong_source - then.wrong_source,
            wrong_pkey: now.wrong_pkey - then.wrong_pkey,
            unexpected: now.unexpected - then.unexpected,
            refused: now.refused - then.refused,
            ..PacketCounters::default()
        }
    }

    fn is_untouched(&self) -> bool {
        let whole = |memory: &Registered| memory.view().to_vec(0, BUFFER).iter().all(|byte| *byte == 0x5a);
        whole(&self.open) && whole(&self.closed)
    }
}

fn connect(qp: HostQp<ibex_hca::host_qp::Reset>, address: PortAddress, rights: Access) -> HostQp<Rts> {
    let remote = Endpoint { address, qpn: QpNum::new(PEER_QPN), psn: Psn::new(FIRST_PSN) };
    let spec = ConnectSpec { access: rights, mtu: PathMtu::B1024, ..ConnectSpec::default() };
    qp.connect(&remote, &spec).unwrap()
}

#[test]
fn the_packet_that_the_others_are_made_from_is_believed() {
    let mut victim = Victim::new(Access::ALL);
    let peer = victim.peer.try_clone().unwrap();
    let bytes = victim.seal(&peer, victim.headers(), &[7; 64]);
    assert_eq!(victim.take(&peer, &bytes), PacketCounters::default());
    assert_eq!(victim.open.view().to_vec(0, 65)[60..], [7, 7, 7, 7, 0x5a]);
    assert_eq!(victim.device.counters().packets.received, 1);
}

/// What is wrong with a packet, and what must be counted.
type Lie = (&'static str, fn(&Victim, &mut Headers), fn(&mut PacketCounters) -> &mut u64);

/// Changes the range that a WRITE names.
fn range(headers: &mut Headers, change: impl FnOnce(&mut RemoteRange)) {
    if let Extension::Reth(Reth(range)) = &mut headers.ext {
        change(range);
    }
}

const LIES: &[Lie] = &[
    ("an unknown key", |_, headers| range(headers, |range| range.addr.rkey ^= 0x100), |c| &mut c.refused),
    ("a stale key", |_, headers| range(headers, |range| range.addr.rkey ^= 1), |c| &mut c.refused),
    (
        "a key without remote rights",
        |victim, headers| {
            let addr = RemoteAddr { va: victim.closed.iova(0), rkey: victim.closed.key().rkey.get() };
            range(headers, |range| range.addr = addr);
        },
        |c| &mut c.refused,
    ),
    (
        "a range that ends outside",
        |_, headers| range(headers, |r| r.addr.va += BUFFER - 63),
        |c| &mut c.refused,
    ),
    ("a range that begins outside", |_, headers| range(headers, |r| r.addr.va -= 1), |c| &mut c.refused),
    ("a range around the end of memory", |_, h| range(h, |r| r.addr.va = u64::MAX - 7), |c| &mut c.refused),
    ("more than its payload", |_, headers| range(headers, |range| range.len = 65), |c| &mut c.refused),
    ("less than its payload", |_, headers| range(headers, |range| range.len = 63), |c| &mut c.refused),
    (
        "the middle of no message",
        |_, headers| {
            headers.bth.opcode = Opcode::write(Part::Middle, false);
            headers.ext = Extension::None;
        },
        |c| &mut c.refused,
    ),
    (
        "another queue pair",
        |_, headers| headers.bth.dest_qpn = ibex_roce::QpNum::new(headers.bth.dest_qpn.get() + 1),
        |c| &mut c.unknown_qp,
    ),
    ("another partition", |_, headers| headers.bth.pkey = PKey(0x8001), |c| &mut c.wrong_pkey),
    (
        "an answer to nothing",
        |_, headers| {
            headers.bth.opcode = Opcode::read_response(Part::Middle);
            headers.ext = Extension::None;
        },
        |c| &mut c.unexpected,
    ),
];

#[test]
fn each_lie_changes_nothing_and_is_counted_by_its_reason() {
    for (what, lie, counter) in LIES {
        let mut victim = Victim::new(Access::ALL);
        let peer = victim.peer.try_clone().unwrap();
        let mut headers = victim.headers();
        lie(&victim, &mut headers);
        let bytes = victim.seal(&peer, headers, &[7; 64]);
        let mut counted = victim.take(&peer, &bytes);
        assert_eq!(std::mem::take(counter(&mut counted)), 1, "{what}");
        assert_eq!(counted, PacketCounters::default(), "{what}: only its own reason");
        assert!(victim.is_untouched(), "{what}");
        let refused = *counter(&mut victim.since()) == victim.since().refused;
        let state = victim.qp.query().unwrap().state;
        assert_eq!(state, if refused { QpState::Err } else { QpState::Rts }, "{what}");
    }
}

#[test]
fn an_operation_without_the_right_is_refused() {
    let mut victim = Victim::new(Access { remote_write: false, remote_atomic: false, ..Access::ALL });
    let peer = victim.peer.try_clone().unwrap();
    let bytes = victim.seal(&peer, victim.headers(), &[7; 64]);
    assert_eq!(victim.take(&peer, &bytes).refused, 1);
    let mut victim = Victim::new(Access { remote_atomic: false, ..Access::ALL });
    let peer = victim.peer.try_clone().unwrap();
    let on = RemoteAddr { va: victim.open.iova(0), rkey: victim.open.key().rkey.get() };
    let (opcode, eth) = AtomicEth::of(on, AtomicOp::FetchAdd { add: 1 });
    let mut headers = victim.headers();
    (headers.bth.opcode, headers.ext) = (opcode, Extension::Atomic(eth));
    let bytes = victim.seal(&peer, headers, &[]);
    assert_eq!(victim.take(&peer, &bytes).refused, 1);
    assert!(victim.is_untouched());
}

#[test]
fn damaged_bytes_are_dropped() {
    let mut victim = Victim::new(Access::ALL);
    let peer = victim.peer.try_clone().unwrap();
    let good = victim.seal(&peer, victim.headers(), &[7; 64]);
    for at in 0..good.len() {
        // The second half of the fifth byte aside: congestion bits and reserved ones may change on the way.
        if at == 4 {
            continue;
        }
        let mut bytes = good.clone();
        bytes[at] ^= 0x10;
        let counted = victim.take(&peer, &bytes);
        assert_eq!(
            counted.bad_icrc + counted.malformed,
            victim.device.counters().packets.received,
            "byte {at}"
        );
    }
    let mut counted = 0;
    for len in 0..good.len() {
        counted += 1;
        victim.take(&peer, &good[..len]);
    }
    let dropped = victim.since();
    assert_eq!(dropped.bad_icrc + dropped.malformed, good.len() as u64 - 1 + counted);
    assert!(victim.is_untouched());
    assert_eq!(victim.qp.query().unwrap().state, QpState::Rts);
}

#[test]
fn another_source_is_dropped_even_with_everything_right() {
    let mut victim = Victim::new(Access::ALL);
    let stranger = UdpSocket::bind("127.0.0.1:0").unwrap();
    let bytes = victim.seal(&stranger, victim.headers(), &[7; 64]);
    assert_eq!(victim.take(&stranger, &bytes).wrong_source, 1);
    // The peer's own packet, sent by another: its checksum covers the address.
    let peer = victim.peer.try_clone().unwrap();
    let bytes = victim.seal(&peer, victim.headers(), &[7; 64]);
    assert_eq!(victim.take(&stranger, &bytes).bad_icrc, 1);
    assert!(victim.is_untouched());
    assert_eq!(victim.qp.query().unwrap().state, QpState::Rts);
}

/// A packet whose every field is arbitrary, biased towards those that reach far.
#[derive(Debug, Clone)]
struct Arbitrary {
    opcode: u8,
    flags: u8,
    psn: i8,
    open: bool,
    ack_req: bool,
    at: u32,
    len: u32,
    payload: Vec<u8>,
}

fn packets() -> impl Strategy<Value = Vec<Arbitrary>> {
    let fields = (
        0_u8..0x18,
        any::<u8>(),
        -2_i8..6,
        any::<bool>(),
        any::<bool>(),
        prop_oneof![0_u32..5000, any::<u32>()],
        prop_oneof![0_u32..2000, any::<u32>()],
        prop::collection::vec(any::<u8>(), 0..1100),
    );
    let packet = fields.prop_map(|(opcode, flags, psn, open, ack_req, at, len, payload)| Arbitrary {
        opcode,
        flags,
        psn,
        open,
        ack_req,
        at,
        len,
        payload,
    });
    prop::collection::vec(packet, 1..24)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]

    #[test]
    fn arbitrary_datagrams_never_panic_a_device(datagrams in prop::collection::vec(
        prop::collection::vec(any::<u8>(), 0..200), 1..16)) {
        let mut victim = Victim::new(Access::ALL);
        let peer = victim.peer.try_clone().unwrap();
        for bytes in &datagrams {
            victim.take(&peer, bytes);
        }
        prop_assert!(victim.is_untouched());
    }

    #[test]
    fn arbitrary_packets_with_a_good_checksum_reach_no_memory_that_is_not_open(sequence in packets()) {
        let mut victim = Victim::new(Access::ALL);
        let peer = victim.peer.try_clone().unwrap();
        for Arbitrary { opcode, flags, psn, open, ack_req, at, len, payload } in sequence {
            let memory = if open { &victim.open } else { &victim.closed };
            let mut bytes = vec![0; 44];
            bytes[0] = opcode;
            // The padding that the payload needs, mostly.
            let pad = (payload.len().wrapping_neg() & 3) as u8;
            bytes[1] = if flags < 0xf0 { 0x40 | pad << 4 } else { flags };
            bytes[2..4].copy_from_slice(&[0xff, 0xff]);
            bytes[4..8].copy_from_slice(&victim.qp.qpn().get().to_be_bytes());
            let psn = (FIRST_PSN.wrapping_add_signed(psn.into()) & 0xff_ffff) | u32::from(ack_req) << 31;
            bytes[8..12].copy_from_slice(&psn.to_be_bytes());
            let va = memory.iova(0).wrapping_add(at.into());
            bytes[12..20].copy_from_slice(&va.to_be_bytes());
            bytes[20..24].copy_from_slice(&memory.key().rkey.get().to_be_bytes());
            bytes[24..28].copy_from_slice(&len.to_be_bytes());
            bytes.truncate(if opcode == 0x13 || opcode == 0x14 { 40 } else { 28 });
            bytes.extend(&payload);
            bytes.resize(bytes.len() + usize::from(pad) + 4, 0);
            victim.flow(&peer).seal(&mut bytes).unwrap();
            victim.take(&peer, &bytes);
        }
        let closed = victim.closed.view().to_vec(0, BUFFER);
        prop_assert!(closed.iter().all(|byte| *byte == 0x5a));
    }
}
