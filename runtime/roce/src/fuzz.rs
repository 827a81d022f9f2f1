//! Bodies of the fuzz targets: arbitrary bytes against parsers and state machines.
//!
//! `tests/fuzz` runs them under cargo-fuzz, `tests/arbitrary.rs` as bounded property tests; both call these
//! functions. Bytes are read as a script: which connection, then one step after another. Merely random packets
//! rarely get past the first check; so an honest peer plays along, its packets are sometimes damaged, and a
//! connection that has failed is replaced by a new one.
//!
//! What must hold: nothing panics; a host and a sink are only asked for bytes inside the range that the packet or
//! the message named, in order and each once; every posted message has exactly one event, in order.

mod requester;
mod responder;

pub use requester::requester;
pub use responder::responder;

use crate::requester::Operation;
use crate::types::{AtomicOp, Mtu, PKey, Psn, QpNum, RemoteAddr, RemoteRange, RnrTimer};
use crate::wire::{
    Aeth, AtomicAckEth, AtomicEth, Bth, Class, Extension, Flow, Frame, HEADERS_LEN_MAX, Headers, HiddenId,
    ImmDt, NakCode, Opcode, Packet, Part, Reth, Syndrome,
};

/// Parses bytes in every way there is; what parses is written and parsed again.
pub fn parsers(bytes: &[u8]) {
    let mut out = vec![0; bytes.len() + 64];
    if let Ok(packet) = Packet::parse(bytes) {
        let len = packet.emit(&mut out).expect("what was parsed can be written");
        assert_eq!(len, bytes.len());
        assert_eq!(Packet::parse(&out[..len]), Ok(packet));
    }
    for parsed in [Frame::parse_ethernet(bytes), Frame::parse_ip(bytes)] {
        let Ok((frame, datagram)) = parsed else { continue };
        assert!(datagram.len() <= bytes.len());
        let len = frame.emit_headers(datagram.len(), &mut out).expect("what was parsed can be written");
        out[len..len + datagram.len()].copy_from_slice(datagram);
        let again = match frame.link {
            Some(_) => Frame::parse_ethernet(&out[..len + datagram.len()]),
            None => Frame::parse_ip(&out[..len + datagram.len()]),
        };
        assert_eq!(again, Ok((frame, datagram)));
        open_and_seal(&frame.flow, datagram);
    }
}

/// A datagram opens if and only if sealing it again changes nothing.
fn open_and_seal(flow: &Flow, datagram: &[u8]) {
    let mut sealed = datagram.to_vec();
    let hidden = HiddenId::default().open(flow, datagram);
    assert!(hidden.is_ok() || flow.open(datagram).is_err());
    if let Ok((_, found)) = hidden {
        assert!(found.open(datagram).is_ok());
    }
    match flow.seal(&mut sealed) {
        Ok(()) => {
            assert_eq!(flow.open(datagram).is_ok(), sealed == datagram);
            assert!(flow.open(&sealed).is_ok());
        }
        Err(_) => assert!(flow.open(datagram).is_err()),
    }
}

/// Bytes as a script; past the end everything is zero.
struct Script<'a>(&'a [u8]);

impl<'a> Script<'a> {
    fn is_over(&self) -> bool {
        self.0.is_empty()
    }

    fn byte(&mut self) -> u8 {
        let [byte] = self.take();
        byte
    }

    fn take<const N: usize>(&mut self) -> [u8; N] {
        let mut taken = [0; N];
        let len = N.min(self.0.len());
        taken[..len].copy_from_slice(&self.0[..len]);
        self.0 = &self.0[len..];
        taken
    }

    fn word(&mut self) -> u32 {
        u32::from_le_bytes(self.take())
    }

    fn long(&mut self) -> u64 {
        u64::from_le_bytes(self.take())
    }

    /// One of a few.
    fn pick<T: Copy>(&mut self, among: &[T]) -> T {
        among[usize::from(self.byte()) % among.len()]
    }

    fn mtu(&mut self) -> Mtu {
        self.pick(&Mtu::ALL)
    }

    /// A length around what matters for this packet size.
    fn len(&mut self, mtu: Mtu) -> u32 {
        let full = mtu.bytes();
        let picked = self.pick(&[0, 1, 3, 8, full - 1, full, full + 1, 3 * full, 5 * full + 2]);
        if picked == 3 { self.word() } else { picked }
    }

    fn range(&mut self, mtu: Mtu) -> RemoteRange {
        let va = self.pick(&[0, 8, 0x1000, 0x1001, 0x1ffc, u64::MAX - 7, u64::MAX]);
        let rkey = self.pick(&[RKEY, RKEY, RKEY, 0]);
        RemoteRange { addr: RemoteAddr { va, rkey }, len: self.len(mtu) }
    }

    /// A message, mostly a legal one.
    fn operation(&mut self, mtu: Mtu) -> Operation {
        let flags = self.byte();
        let range = match flags {
            0xf0.. => self.range(mtu),
            _ => {
                let len = self.len(mtu).min(REGISTERED_LEN);
                RemoteRange { addr: RemoteAddr { va: REGISTERED, rkey: RKEY }, len }
            }
        };
        let (imm, solicited) = ((flags & 1 != 0).then_some(7), flags & 2 != 0);
        match flags >> 2 & 3 {
            0 => Operation::Write { to: range, imm, solicited },
            1 => Operation::Send { len: range.len, imm, solicited },
            2 => Operation::Read { from: range },
            _ => Operation::Atomic { on: range.addr, op: AtomicOp::FetchAdd { add: 1 } },
        }
    }

    /// Damages a packet, now and then.
    fn damage(&mut self, packet: &mut [u8]) {
        let [when, at, what] = self.take();
        if when.is_multiple_of(8) && !packet.is_empty() {
            packet[usize::from(at) % packet.len().min(HEADERS_LEN_MAX)] ^= what;
        }
    }

    /// As many bytes as the script says, taken as they are.
    fn raw(&mut self) -> &'a [u8] {
        let len = usize::from(self.byte()).min(self.0.len());
        let (raw, rest) = self.0.split_at(len);
        self.0 = rest;
        raw
    }

    /// A sequence number near `around`.
    fn psn(&mut self, around: Psn) -> Psn {
        match self.byte() {
            offset @ 0..=200 => around.plus(u32::from(offset / 8)).plus(0xff_fff8),
            _ => Psn::new(self.word()),
        }
    }

    /// A packet that is nearly right, and its payload's length.
    fn packet(&mut self, mtu: Mtu, psn: Psn) -> (Headers, usize) {
        let opcode = self.pick(&Opcode::ALL);
        let flags = self.byte();
        let bth = Bth {
            opcode,
            solicited: flags & 1 != 0,
            migrated: true,
            pad: 0,
            pkey: if flags & 0xf0 == 0xf0 { PKey(0x7ffe) } else { PKey::DEFAULT },
            fecn: false,
            becn: false,
            dest_qpn: QpNum::new(1),
            ack_req: flags & 2 != 0,
            psn: self.psn(psn),
        };
        let len = match opcode.class() {
            _ if flags & 0x0c == 0x0c => self.len(mtu).min(mtu.bytes() + 1),
            Class::Send(Part::First | Part::Middle) | Class::Write(Part::First | Part::Middle) => mtu.bytes(),
            Class::ReadResponse(Part::First | Part::Middle) => mtu.bytes(),
            Class::Send(_) | Class::Write(_) | Class::ReadResponse(_) => self.len(mtu).min(mtu.bytes()),
            Class::Read | Class::Atomic | Class::Ack | Class::AtomicAck => 0,
        };
        let ext = self.extension(opcode, mtu);
        // CAST: u32 to usize on a 64-bit host.
        (Headers { bth, ext }, len as usize)
    }

    fn extension(&mut self, opcode: Opcode, mtu: Mtu) -> Extension {
        let imm = opcode.has_imm().then(|| ImmDt(self.word()));
        match (opcode.class(), imm) {
            (Class::Write(Part::First | Part::Only), Some(imm)) => {
                Extension::RethImm(Reth(self.range(mtu)), imm)
            }
            (Class::Write(Part::First | Part::Only) | Class::Read, None) => {
                Extension::Reth(Reth(self.range(mtu)))
            }
            (_, Some(imm)) => Extension::Imm(imm),
            (Class::Atomic, _) => {
                let on = self.range(mtu).addr;
                Extension::Atomic(AtomicEth { on, swap_add: self.long(), compare: self.long() })
            }
            (Class::AtomicAck, _) => {
                Extension::AtomicAck(self.aeth(), AtomicAckEth { original: self.long() })
            }
            (Class::Ack | Class::ReadResponse(Part::First | Part::Last | Part::Only), _) => {
                Extension::Aeth(self.aeth())
            }
            _ => Extension::None,
        }
    }

    fn aeth(&mut self) -> Aeth {
        let nak = self.pick(&NakCode::ALL);
        let timer = RnrTimer::new(self.byte());
        let syndrome = self.pick(&[Syndrome::ACK, Syndrome::ACK, Syndrome::Rnr(timer), Syndrome::Nak(nak)]);
        Aeth { syndrome, msn: crate::types::Msn::new(self.word()) }
    }
}

/// The only key.
const RKEY: u32 = 0xabcd;
/// Where its range starts.
const REGISTERED: u64 = 0x1000;
/// Bytes in its range.
const REGISTERED_LEN: u32 = 0x2000;
/// Steps of one script.
const STEPS_MAX: usize = 4096;
/// Payload of every packet: what it says does not matter.
const PAYLOAD: [u8; 4097] = [0x5a; 4097];
