//! Frames made up from messages, for captures of fabrics that carry none.
//!
//! Within one machine a message crosses in one piece and no frame exists. What the same message would be on
//! a wire is made up here, by the state machine that makes real packets, and marked as synthesised. Addresses
//! are those of the ports; message sequence numbers are 0, because nobody counts them there.
//!
//! *Who owns what.* A [`Tap`] lives for one turn of one queue pair; the capture is the port's.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use ibex_abi::types::{Psn, QpNum};
use ibex_roce::requester::{self as packets, LocalFault, MessageId, RequesterConfig};
use ibex_roce::wire::{
    Aeth, AtomicAckEth, Bth, Extension, Flow, Frame, Headers, ICRC_LEN, Link, NakCode, Opcode, Packet, Part,
    Syndrome,
};
use ibex_roce::{Msn, Mtu, PKey, RnrTimer};

use super::EmulatedHca;
use super::capture::{Capture, Origin};
use super::fabric::{Carried, Wire};
use super::frames::{PACKET_LEN_MAX, ip_of, operation, roce_mtu, socket_addr};
use super::memory::Span;
use super::message::{Nak, Payload, Piece, Reply, Request, Target};
use super::qp::Qp;
use super::requester::Connection;
use super::requester::plain::Source;
use crate::{LinkLayer, Nanos, PathAddress, PortInfo};

/// Longest frame.
const FRAME_MAX: usize = PACKET_LEN_MAX + 64;

/// What a queue pair says and hears, on its way to a capture.
pub(super) struct Tap<'a> {
    capture: &'a Arc<Capture>,
    now: Nanos,
    mtu: Mtu,
    near: QpNum,
    far: QpNum,
    /// Ethernet and IP headers there and back.
    there: Frame,
    back: Frame,
}

impl<'a> Tap<'a> {
    /// The tap of a connected queue pair; `None` without a capture.
    #[inline]
    pub(super) fn of(
        device: &'a EmulatedHca,
        qp: &Qp,
        connection: Option<&Connection>,
        now: Nanos,
    ) -> Option<Self> {
        let capture = device.fabric_port().capture()?;
        Self::new(capture, device.fabric_port().info(), qp, connection?, now)
    }

    fn new(
        capture: &'a Arc<Capture>,
        port: &PortInfo,
        qp: &Qp,
        connection: &Connection,
        now: Nanos,
    ) -> Option<Self> {
        let (near, far) = (address_of(port), far_address(&connection.to)?);
        let there = Flow::new(near.0, far.0, ibex_roce::wire::ROCE_PORT)?;
        let back = Flow::new(far.0, near.0, ibex_roce::wire::ROCE_PORT)?;
        let link = |src: [u8; 6], dst: [u8; 6]| Some(Link { src, dst });
        Some(Self {
            capture,
            now,
            mtu: roce_mtu(connection.mtu.0),
            near: qp.num(),
            far: connection.remote_qpn,
            there: Frame::new(link(near.1, far.1), there),
            back: Frame::new(link(far.1, near.1), back),
        })
    }

    /// Writes the packets of a request.
    pub(super) fn request(&self, request: &Request, payload: Payload<'_>) {
        // What RoCEv2 has no packets for leaves none.
        let Some(operation) = operation(request) else { return };
        let first_psn = ibex_roce::Psn::new(request.psn.get());
        let qpn = ibex_roce::QpNum::new(self.far.get());
        let config = RequesterConfig {
            window_packets: u32::MAX,
            ack_every: u32::MAX,
            ..RequesterConfig::new(qpn, self.mtu, first_psn)
        };
        let mut machine = packets::Requester::new(config);
        if machine.post(MessageId(0), operation).is_err() {
            return;
        }
        let mut source = Gathered(payload);
        let mut room = [0; FRAME_MAX];
        let start = self.there.headers_len();
        let now = ibex_roce::Nanos(self.now.0);
        while let Some(packet) = machine.poll_transmit(now, &mut source, &mut room[start..]) {
            self.write(&self.there, &mut room[..start + packet.len]);
        }
    }

    /// Writes what came back for the request that began at `psn`; data begins at `offset` of its message.
    pub(super) fn reply(&self, psn: Psn, reply: &Reply, offset: u64, is_last: bool) {
        let nak = |code| Syndrome::Nak(code);
        match *reply {
            Reply::Ack { next } => self.acknowledge(next.plus(0xff_ffff), Syndrome::ACK),
            Reply::Atomic { original, .. } => {
                let aeth = Aeth { syndrome: Syndrome::ACK, msn: Msn::default() };
                let ext = Extension::AtomicAck(aeth, AtomicAckEth { original });
                self.answer(Opcode::AtomicAck, psn, ext, &[]);
            }
            Reply::Data { memory, .. } => self.data(psn, memory, offset, is_last),
            Reply::NotReady { timer } => self.acknowledge(psn, Syndrome::Rnr(RnrTimer::new(timer))),
            Reply::OutOfSequence { expected } => self.acknowledge(expected, nak(NakCode::PsnSequence)),
            Reply::Refused(refused) => self.acknowledge(
                psn,
                nak(match refused {
                    Nak::InvalidRequest => NakCode::InvalidRequest,
                    Nak::RemoteAccess => NakCode::RemoteAccess,
                    Nak::RemoteOperation => NakCode::RemoteOperation,
                }),
            ),
        }
    }

    fn acknowledge(&self, psn: Psn, syndrome: Syndrome) {
        self.answer(Opcode::Ack, psn, Extension::Aeth(Aeth { syndrome, msn: Msn::default() }), &[]);
    }

    /// The packets of a READ's data.
    fn data(&self, psn: Psn, memory: Span, offset: u64, is_last: bool) {
        let mtu = u64::from(self.mtu.bytes());
        let mut bytes = [0; 4096];
        let mut at = 0;
        loop {
            // CAST: at most an MTU.
            let len = (memory.len() - at).min(mtu) as usize;
            memory.read(at, &mut bytes[..len]);
            let first = offset + at == 0;
            at += len as u64;
            let part = Part::new(first, is_last && at == memory.len());
            let aeth = Aeth { syndrome: Syndrome::ACK, msn: Msn::default() };
            let ext = if part == Part::Middle { Extension::None } else { Extension::Aeth(aeth) };
            // CAST: packets of a message of at most 2^30 bytes.
            let nth = ((offset + at - len as u64) / mtu) as u32;
            self.answer(Opcode::read_response(part), psn.plus(nth), ext, &bytes[..len]);
            if at == memory.len() {
                return;
            }
        }
    }

    fn answer(&self, opcode: Opcode, psn: Psn, ext: Extension, payload: &[u8]) {
        let bth = Bth {
            opcode,
            solicited: false,
            migrated: true,
            pad: 0,
            pkey: PKey::DEFAULT,
            fecn: false,
            becn: false,
            dest_qpn: ibex_roce::QpNum::new(self.near.get()),
            ack_req: false,
            psn: ibex_roce::Psn::new(psn.get()),
        };
        let packet = Packet::new(Headers { bth, ext }, payload);
        let mut room = [0; FRAME_MAX];
        let start = self.back.headers_len();
        if let Ok(len) = packet.emit(&mut room[start..]) {
            self.write(&self.back, &mut room[..start + len + ICRC_LEN]);
        }
    }

    /// Puts headers before, and the ICRC behind, a packet that stands in its place in `frame`.
    fn write(&self, head: &Frame, frame: &mut [u8]) {
        let (headers, datagram) = frame.split_at_mut(head.headers_len());
        let done = head.flow.seal(datagram).and_then(|()| head.emit_headers(datagram.len(), headers));
        if done.is_ok() {
            self.capture.frame(self.now, Origin::Synthesised, frame);
        }
    }
}

/// Where a port would be on Ethernet; InfiniBand ports get link-local addresses made of their LIDs.
fn address_of(port: &PortInfo) -> (IpAddr, [u8; 6]) {
    match port.link {
        LinkLayer::Roce => (ip_of(port.gid), port.mac.0),
        LinkLayer::Ib => lid_address(port.lid.0),
    }
}

fn far_address(to: &PathAddress) -> Option<(IpAddr, [u8; 6])> {
    match to {
        PathAddress::Ib { rlid } => Some(lid_address(rlid.0)),
        PathAddress::Roce { rmac, .. } => socket_addr(to).as_ref().map(SocketAddr::ip).map(|ip| (ip, rmac.0)),
    }
}

fn lid_address(lid: u16) -> (IpAddr, [u8; 6]) {
    let [hi, lo] = lid.to_be_bytes();
    (Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, lid).into(), [2, 0x1b, 0xea, 0, hi, lo])
}

/// A message's payload, read once.
struct Gathered<'a>(Payload<'a>);

impl packets::Payload for Gathered<'_> {
    fn read(&mut self, _: MessageId, offset: u32, into: &mut [u8]) -> Result<(), LocalFault> {
        self.0.gather_into(offset.into(), into);
        Ok(())
    }
}

/// A wire, and what passes it on its way to a capture.
pub(super) struct Tapped<'a, W> {
    wire: W,
    tap: Option<Tap<'a>>,
    /// A part that reaches the end of a message ends it; otherwise [`Piece::End`] does.
    parts_end: bool,
}

impl<'a, W: Wire> Tapped<'a, W> {
    #[inline]
    pub(super) const fn new(wire: W, tap: Option<Tap<'a>>, parts_end: bool) -> Self {
        Self { wire, tap, parts_end }
    }

    fn tap_reply(&self, tap: &Tap<'_>, request: &Request, piece: Piece, reply: &Reply) {
        match (piece, reply) {
            // One chunk of a READ that was accepted before.
            (Piece::Part { offset, len }, Reply::Data { .. }) => {
                tap.reply(request.psn, reply, offset, offset + len == request.len);
            }
            // Accepted, or placed: there is no packet that says so.
            (Piece::End, Reply::Ack { .. }) if request.op.has_response() => {}
            (Piece::Part { .. }, Reply::Ack { .. }) if !self.ends(request, piece) => {}
            _ => tap.reply(request.psn, reply, 0, true),
        }
    }

    fn ends(&self, request: &Request, piece: Piece) -> bool {
        match piece {
            Piece::Whole | Piece::End => true,
            Piece::Part { offset, len } => self.parts_end && offset + len == request.len,
        }
    }
}

impl<W: Wire> Wire for Tapped<'_, W> {
    #[inline]
    fn carry(&mut self, request: &Request, payload: Payload<'_>, piece: Piece) -> Carried {
        let carried = self.wire.carry(request, payload, piece);
        if let (Some(tap), Carried::Whole(reply)) = (&self.tap, &carried) {
            if self.ends(request, piece) {
                tap.request(request, payload);
            }
            if let Some(reply) = reply {
                self.tap_reply(tap, request, piece, reply);
            }
        }
        carried
    }

    #[inline]
    fn write_plain(&mut self, psn: Psn, packets: u32, to: Target, source: Source<'_>) -> bool {
        // The shortcut makes no message that could be written down.
        self.tap.is_none() && self.wire.write_plain(psn, packets, to, source)
    }
}
