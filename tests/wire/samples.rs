//! One frame of every opcode, over IPv4 and IPv6, written by `ibex_roce`.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ibex_roce::wire::{
    Aeth, AtomicAckEth, AtomicEth, Bth, Class, Ecn, Extension, Flow, Frame, Headers, ICRC_LEN, ImmDt, Link,
    NakCode, Opcode, Packet, Part, Reth, Syndrome,
};
use ibex_roce::{Msn, PKey, Psn, QpNum, RemoteAddr, RemoteRange, RnrTimer};

/// What goes with an opcode; values whose every byte differs, so that a swapped one shows.
fn extension(opcode: Opcode, syndrome: Syndrome) -> Extension {
    let addr = RemoteAddr { va: 0x0102_0304_0506_0708, rkey: 0x1122_3344 };
    let reth = Reth(RemoteRange { addr, len: 0x0001_0203 });
    let imm = ImmDt(0xdead_beef);
    let aeth = Aeth { syndrome, msn: Msn::new(0x00ab_cdef) };
    let atomic = AtomicEth { on: addr, swap_add: 0x1112_1314_1516_1718, compare: 0x2122_2324_2526_2728 };
    match (opcode.class(), opcode.has_imm()) {
        (Class::Write(Part::First | Part::Only), false) | (Class::Read, _) => Extension::Reth(reth),
        (Class::Write(Part::First | Part::Only), true) => Extension::RethImm(reth, imm),
        (Class::Send(_) | Class::Write(_), true) => Extension::Imm(imm),
        (Class::ReadResponse(Part::First | Part::Last | Part::Only) | Class::Ack, _) => Extension::Aeth(aeth),
        (Class::AtomicAck, _) => Extension::AtomicAck(aeth, AtomicAckEth { original: 0x3132_3334_3536_3738 }),
        (Class::Atomic, _) => Extension::Atomic(atomic),
        (Class::Send(_) | Class::Write(_) | Class::ReadResponse(Part::Middle), _) => Extension::None,
    }
}

/// Bytes of payload that an opcode may carry: none, or a number that tells samples apart.
fn payload_len(opcode: Opcode, nth: usize) -> usize {
    match opcode.class() {
        Class::Send(_) | Class::Write(_) | Class::ReadResponse(_) => 61 + nth % 8,
        _ => 0,
    }
}

fn frame(ips: (IpAddr, IpAddr), nth: usize, opcode: Opcode, syndrome: Syndrome) -> Vec<u8> {
    let number = u32::try_from(nth).unwrap();
    let flow = Flow::new(ips.0, ips.1, 0xc000 + u16::try_from(nth).unwrap()).unwrap();
    let flow = flow.with_id(0x1234 + u16::try_from(nth).unwrap());
    let link = Link { src: [2, 0, 0, 0, 0, 1], dst: [2, 0, 0, 0, 0, 2] };
    let mut frame = Frame::new(Some(link), flow);
    frame.dscp = 26;
    frame.ecn = if nth.is_multiple_of(2) { Ecn::Capable0 } else { Ecn::NotCapable };
    frame.hop_limit = 17;
    let bth = Bth {
        opcode,
        solicited: nth % 2 == 1,
        migrated: nth % 3 == 1,
        pad: 0,
        pkey: if nth.is_multiple_of(4) { PKey::DEFAULT } else { PKey(0x8123) },
        fecn: nth.is_multiple_of(5),
        becn: nth % 5 == 1,
        dest_qpn: QpNum::new(0x0012_3456 + number),
        ack_req: nth.is_multiple_of(3),
        psn: Psn::new(0x00ff_fff0 + number),
    };
    let payload: Vec<u8> = (0..payload_len(opcode, nth)).map(|i| (i % 251) as u8).collect();
    let packet = Packet::new(Headers { bth, ext: extension(opcode, syndrome) }, &payload);
    let datagram_len = packet.len() + ICRC_LEN;
    let mut bytes = vec![0xa5; frame.headers_len() + datagram_len];
    let at = frame.emit_headers(datagram_len, &mut bytes).unwrap();
    packet.emit(&mut bytes[at..]).unwrap();
    flow.seal(&mut bytes[at..]).unwrap();
    bytes
}

/// Every opcode and every kind of acknowledgement, with either IP.
pub(crate) fn frames() -> Vec<Vec<u8>> {
    let v4 = |last| IpAddr::from(Ipv4Addr::new(10, 1, 2, last));
    let v6 = |last| IpAddr::from(Ipv6Addr::new(0xfd77, 1, 2, 3, 4, 5, 6, last));
    let mut frames = Vec::new();
    for ips in [(v4(3), v4(4)), (v6(7), v6(8))] {
        for opcode in Opcode::ALL {
            frames.push(frame(ips, frames.len(), opcode, Syndrome::ACK));
        }
        let naks = NakCode::ALL.map(Syndrome::Nak);
        for syndrome in
            naks.into_iter().chain([Syndrome::Rnr(RnrTimer::new(13)), Syndrome::Ack { credits: 9 }])
        {
            frames.push(frame(ips, frames.len(), Opcode::Ack, syndrome));
        }
    }
    frames
}
