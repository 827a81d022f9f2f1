//! Linux as responder, judged packet by packet: what it answers to each request, right and wrong.
//!
//! Every check runs over IPv4 and over IPv6, on a connection of its own whose sequence numbers wrap.

use ibex_roce::wire::{
    Aeth, AtomicAckEth, AtomicEth, Extension, Headers, ImmDt, NakCode, Opcode, Part, Reth, Syndrome,
};
use ibex_roce::{AtomicOp, PKey, Psn, RemoteAddr, RemoteRange};

use super::guest::{Connection, Guest, Qp, Region, access, pattern};
use super::raw::{Answer, Raw, bth};

/// Any number will do: we own no queue pair, we only read what is sent to it.
const OUR_QPN: u32 = 0xabc_def;
/// Three packets before the end of the circle.
const FIRST_PSN: Psn = Psn::new(0xff_fffd);
const MTU: u32 = 1024;
/// Code of the time that a guest without a receive asks for: 0.64 ms.
const MIN_RNR_TIMER: u8 = 12;
const REGION_LEN: u64 = 8192;
/// What memory holds before a check writes to it.
const BACKGROUND: u64 = 99;

/// A connection between the guest and ourselves.
struct Link<'a> {
    guest: &'a mut Guest,
    raw: &'a mut Raw,
    qp: Qp,
    region: Region,
    /// What the guest expects next.
    psn: Psn,
}

impl<'a> Link<'a> {
    fn new(guest: &'a mut Guest, raw: &'a mut Raw) -> Self {
        let region = guest.region(REGION_LEN, access::ALL);
        guest.fill(region, 0, REGION_LEN, BACKGROUND);
        let qp = guest.qp(access::ALL);
        let connection = Connection {
            peer: raw.own(),
            peer_qpn: OUR_QPN,
            peer_psn: FIRST_PSN.get(),
            psn: 500,
            mtu: MTU,
            timeout: 14,
            retry: 3,
            rnr_retry: 3,
            min_rnr_timer: MIN_RNR_TIMER,
        };
        guest.connect(qp, &connection);
        Self { guest, raw, qp, region, psn: FIRST_PSN }
    }

    /// Takes the next sequence numbers.
    fn take(&mut self, packets: u32) -> Psn {
        let psn = self.psn;
        self.psn = psn.plus(packets);
        psn
    }

    fn headers(&self, opcode: Opcode, psn: Psn, ext: Extension) -> Headers {
        Headers { bth: bth(opcode, self.qp.qpn, psn), ext }
    }

    fn at(&self, offset: u64) -> RemoteAddr {
        RemoteAddr { va: self.region.addr + offset, rkey: self.region.rkey }
    }

    fn range(&self, offset: u64, len: usize) -> Extension {
        let len = u32::try_from(len).expect("a short message");
        Extension::Reth(Reth(RemoteRange { addr: self.at(offset), len }))
    }

    /// A WRITE of one packet.
    fn write(&self, psn: Psn, offset: u64, payload: &[u8]) {
        self.send_write(psn, self.range(offset, payload.len()), payload);
    }

    fn send_write(&self, psn: Psn, ext: Extension, payload: &[u8]) {
        self.raw.send(self.headers(Opcode::write(Part::Only, false), psn, ext), payload);
    }

    /// The next answer; it is for us.
    fn answer(&mut self) -> Answer {
        let answer = self.raw.receive();
        assert_eq!(answer.headers.bth.dest_qpn.get(), OUR_QPN);
        answer
    }

    fn expect_ack(&mut self, psn: Psn) {
        let answer = self.answer();
        assert_eq!((answer.opcode(), answer.psn()), (Opcode::Ack, psn), "{answer:?}");
        assert!(matches!(answer.syndrome(), Some(Syndrome::Ack { .. })), "{answer:?}");
    }

    fn expect_nak(&mut self, psn: Psn, syndrome: Syndrome) {
        let answer = self.answer();
        assert_eq!((answer.opcode(), answer.psn()), (Opcode::Ack, psn), "{answer:?}");
        assert_eq!(answer.syndrome(), Some(syndrome), "{answer:?}");
    }

    /// A good WRITE is answered: the connection lives, and nothing before it is still under way.
    fn expect_alive(&mut self) {
        let psn = self.take(1);
        self.write(psn, REGION_LEN - 4, b"live");
        self.expect_ack(psn);
    }

    /// Memory from the start holds these bytes, and behind them what it held before.
    fn expect_memory(&mut self, bytes: &[u8]) {
        let len = bytes.len() as u64;
        assert_eq!(self.guest.peek(self.region, 0, len), bytes);
        // The last bytes are where `expect_alive` writes.
        let behind = REGION_LEN - len - 4;
        let whole = pattern(bytes.len() + behind as usize, BACKGROUND);
        assert_eq!(self.guest.peek(self.region, len, behind), whole[bytes.len()..]);
    }
}

impl Drop for Link<'_> {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.guest.drop_qp(self.qp);
        }
    }
}

/// A check on a fresh connection.
pub(crate) type Check = fn(&mut Guest, &mut Raw);

pub(crate) const CHECKS: &[(&str, Check)] = &[
    ("writes of every padding land, and only they", writes_of_every_padding),
    ("a message of several packets is acknowledged once, at its end", a_long_write),
    ("reads come back in packets of the MTU", reads),
    ("atomics change memory and return what it held", atomics),
    ("sends fill receives, with immediate data", sends),
    ("a duplicate write is acknowledged again", duplicate_write),
    ("a duplicate atomic is answered from memory of it, not executed", duplicate_atomic),
    ("a damaged packet is dropped", bad_icrc),
    ("a packet of another partition is dropped", bad_pkey),
    ("a gap is answered by NAK 0x60", sequence_gap),
    ("the end of a message that never began: NAK 0x61", invalid_request),
    ("an unknown key, a range too long, no permission: NAK 0x62", access_violations),
    ("a send without a receive: RNR NAK with the guest's timer", receiver_not_ready),
];

fn writes_of_every_padding(guest: &mut Guest, raw: &mut Raw) {
    for len in [1, 2, 3, 4, 5, 63, 1023, 1024] {
        let mut link = Link::new(guest, raw);
        let bytes = pattern(len, 5);
        let psn = link.take(1);
        link.write(psn, 0, &bytes);
        link.expect_ack(psn);
        link.expect_memory(&bytes);
    }
}

fn a_long_write(guest: &mut Guest, raw: &mut Raw) {
    let mut link = Link::new(guest, raw);
    let bytes = pattern(4 * MTU as usize + 3, 6);
    let psn = link.take(5);
    let parts: Vec<&[u8]> = bytes.chunks(MTU as usize).collect();
    for (at, part) in (0..).zip(&parts) {
        let part_of = Part::new(at == 0, at == 4);
        let ext = if at == 0 { link.range(0, bytes.len()) } else { Extension::None };
        let mut headers = link.headers(Opcode::write(part_of, false), psn.plus(at), ext);
        headers.bth.ack_req = at == 4;
        link.raw.send(headers, part);
    }
    link.expect_ack(psn.plus(4));
    link.expect_memory(&bytes);
}

fn reads(guest: &mut Guest, raw: &mut Raw) {
    let mut link = Link::new(guest, raw);
    for (len, packets) in [(1, 1), (3, 1), (1024, 1), (1025, 2), (4099, 5)] {
        let psn = link.take(packets);
        link.raw.send(link.headers(Opcode::ReadRequest, psn, link.range(0, len)), &[]);
        let mut found = Vec::new();
        for at in 0..packets {
            let answer = link.answer();
            let part = Part::new(at == 0, at + 1 == packets);
            assert_eq!(answer.opcode(), Opcode::read_response(part), "packet {at} of {len} bytes");
            assert_eq!(answer.psn(), psn.plus(at));
            found.extend(answer.payload);
        }
        assert_eq!(found, pattern(len, BACKGROUND));
    }
}

/// Sends an atomic at sequence number `psn`; gives what memory held before.
fn atomic(link: &mut Link<'_>, psn: Psn, op: AtomicOp) -> u64 {
    let (opcode, eth) = AtomicEth::of(link.at(8), op);
    link.raw.send(link.headers(opcode, psn, Extension::Atomic(eth)), &[]);
    let answer = link.answer();
    assert_eq!((answer.opcode(), answer.psn()), (Opcode::AtomicAck, psn));
    let Extension::AtomicAck(Aeth { syndrome, .. }, AtomicAckEth { original }) = answer.headers.ext else {
        panic!("the opcode says otherwise")
    };
    assert!(matches!(syndrome, Syndrome::Ack { .. }));
    original
}

fn word(link: &mut Link<'_>) -> u64 {
    let bytes = link.guest.peek(link.region, 8, 8);
    u64::from_le_bytes(bytes.try_into().expect("eight bytes"))
}

fn atomics(guest: &mut Guest, raw: &mut Raw) {
    let mut link = Link::new(guest, raw);
    let start = word(&mut link);
    let psn = link.take(1);
    assert_eq!(atomic(&mut link, psn, AtomicOp::FetchAdd { add: u64::MAX }), start);
    assert_eq!(word(&mut link), start.wrapping_sub(1));
    let psn = link.take(1);
    let misses = AtomicOp::CmpSwap { compare: start, swap: 1 };
    assert_eq!(atomic(&mut link, psn, misses), start.wrapping_sub(1));
    assert_eq!(word(&mut link), start.wrapping_sub(1));
    let psn = link.take(1);
    let matches = AtomicOp::CmpSwap { compare: start.wrapping_sub(1), swap: 0x0102_0304_0506_0708 };
    assert_eq!(atomic(&mut link, psn, matches), start.wrapping_sub(1));
    assert_eq!(word(&mut link), 0x0102_0304_0506_0708);
}

fn sends(guest: &mut Guest, raw: &mut Raw) {
    let mut link = Link::new(guest, raw);
    for wr_id in 0..2 {
        link.guest.ask(&format!("recv {} {} {} 64", link.qp.index, link.region.index, 128 * wr_id));
        let has_imm = wr_id == 1;
        let ext = if has_imm { Extension::Imm(ImmDt(0xdead_0001)) } else { Extension::None };
        let psn = link.take(1);
        let bytes = pattern(61, wr_id);
        link.raw.send(link.headers(Opcode::send(Part::Only, has_imm), psn, ext), &bytes);
        link.expect_ack(psn);
        let done = link.guest.completion(link.qp);
        let imm = if has_imm { 0xdead_0001 } else { 0 };
        assert_eq!((done.wr_id, done.status, done.len, done.imm), (wr_id, 0, 61, imm));
        assert_eq!(link.guest.differs(link.region, 128 * wr_id, 61, wr_id), 0);
    }
}

fn duplicate_write(guest: &mut Guest, raw: &mut Raw) {
    let before = guest.counter("duplicate_request");
    let mut link = Link::new(guest, raw);
    let psn = link.take(1);
    let bytes = pattern(100, 7);
    for _ in 0..2 {
        link.write(psn, 0, &bytes);
        // An acknowledgement of a duplicate may name any number up to the newest one executed: here the same.
        link.expect_ack(psn);
    }
    link.expect_alive();
    link.expect_memory(&bytes);
    drop(link);
    assert_eq!(guest.counter("duplicate_request"), before + 1);
}

fn duplicate_atomic(guest: &mut Guest, raw: &mut Raw) {
    let mut link = Link::new(guest, raw);
    let start = word(&mut link);
    let psn = link.take(1);
    for _ in 0..3 {
        assert_eq!(atomic(&mut link, psn, AtomicOp::FetchAdd { add: 5 }), start);
    }
    assert_eq!(word(&mut link), start.wrapping_add(5), "added once");
    link.expect_alive();
}

/// A packet that `change` made wrong is dropped without a word; as it was, it is taken.
fn expect_dropped(guest: &mut Guest, raw: &mut Raw, change: impl FnOnce(&Link<'_>, Headers, &[u8])) {
    let mut link = Link::new(guest, raw);
    let psn = link.take(1);
    let bytes = pattern(40, 8);
    let good = link.headers(Opcode::write(Part::Only, false), psn, link.range(0, bytes.len()));
    change(&link, good, &bytes);
    link.raw.expect_silence();
    link.expect_memory(&[]);
    link.raw.send(good, &bytes);
    link.expect_ack(psn);
    link.expect_memory(&bytes);
}

fn bad_icrc(guest: &mut Guest, raw: &mut Raw) {
    // In the key, in the payload, in the CRC itself.
    for at in [23, 40, 71] {
        expect_dropped(guest, raw, |link, good, bytes| {
            link.raw.send_changed(good, bytes, |datagram| datagram[at] ^= 0x10);
        });
    }
}

fn bad_pkey(guest: &mut Guest, raw: &mut Raw) {
    expect_dropped(guest, raw, |link, mut headers, bytes| {
        headers.bth.pkey = PKey(0x8001);
        link.raw.send(headers, bytes);
    });
}

fn sequence_gap(guest: &mut Guest, raw: &mut Raw) {
    let mut link = Link::new(guest, raw);
    link.expect_alive();
    let expected = link.psn;
    link.write(expected.plus(1), 0, b"too early");
    link.expect_nak(expected, Syndrome::Nak(NakCode::PsnSequence));
    link.expect_memory(&[]);
    link.write(expected, 0, b"in time");
    link.expect_ack(expected);
    link.expect_memory(b"in time");
}

fn invalid_request(guest: &mut Guest, raw: &mut Raw) {
    let mut link = Link::new(guest, raw);
    let psn = link.take(1);
    let headers = link.headers(Opcode::write(Part::Last, false), psn, Extension::None);
    link.raw.send(headers, b"no beginning");
    link.expect_nak(psn, Syndrome::Nak(NakCode::InvalidRequest));
    link.expect_memory(&[]);
}

fn access_violations(guest: &mut Guest, raw: &mut Raw) {
    let read_only = guest.region(4096, access::LOCAL_WRITE | 4);
    let refuse = |guest: &mut Guest, raw: &mut Raw, change: &dyn Fn(&mut RemoteRange)| {
        let mut link = Link::new(guest, raw);
        let mut range = RemoteRange { addr: link.at(0), len: 8 };
        change(&mut range);
        let psn = link.take(1);
        link.send_write(psn, Extension::Reth(Reth(range)), &[1; 8]);
        link.expect_nak(psn, Syndrome::Nak(NakCode::RemoteAccess));
        link.expect_memory(&[]);
    };
    refuse(guest, raw, &|range| range.addr.rkey ^= 0x100);
    refuse(guest, raw, &|range| range.addr.va += REGION_LEN - 7);
    refuse(guest, raw, &|range| range.addr.va -= 1);
    refuse(guest, raw, &|range| {
        range.addr = RemoteAddr { va: read_only.addr, rkey: read_only.rkey };
    });
    assert_eq!(guest.peek(read_only, 0, 8), [0; 8]);
}

fn receiver_not_ready(guest: &mut Guest, raw: &mut Raw) {
    let mut link = Link::new(guest, raw);
    let psn = link.take(1);
    let send = link.headers(Opcode::send(Part::Only, false), psn, Extension::None);
    link.raw.send(send, b"knock");
    let answer = link.answer();
    assert_eq!(answer.psn(), psn);
    let Some(Syndrome::Rnr(timer)) = answer.syndrome() else { panic!("{answer:?}") };
    assert_eq!(timer.code(), MIN_RNR_TIMER);
    link.guest.ask(&format!("recv {} {} 0 64", link.qp.index, link.region.index));
    link.raw.send(send, b"knock");
    link.expect_ack(psn);
    link.expect_memory(b"knock");
}
