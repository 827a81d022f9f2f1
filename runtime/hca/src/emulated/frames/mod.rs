//! Packets: how a device sends and answers where a fabric carries RoCEv2.
//!
//! The two state machines of `ibex-roce` know messages, packets and time. This room gives them what a
//! device has: WQEs to send, memory keys to check, receive queues to fill, completions to write. What
//! carries the packets is a [`Carrier`]: a UDP socket, or the simulated switch.
//!
//! ```text
//!  WQEs --> requester --packets--> carrier --> ... --> carrier --packets--> responder --> memory, CQEs
//!  CQEs <--     ^------------------------ answers -------------------------'
//! ```
//!
//! *Who owns what.* A [`Station`] owns the carrier; each half of a queue pair owns its state machine. A
//! step holds the station for its whole length: a second thread that steps the same device leaves it
//! alone. Locks are taken in the order station -> those of a queue pair (`qp.rs`).
//!
//! INVARIANT: a packet reaches a state machine only if its checksum holds, its queue pair exists and it
//! came from the address which that queue pair is connected to; anything else is counted and dropped.

mod requester;
mod responder;
pub(super) mod switched;

use std::fmt::Debug;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use ibex_abi::types::{Gid, Mac, PathMtu, QpNum, QpState};
use ibex_roce::wire::{Packet, ROCE_PORT, WireError};
use ibex_roce::{Dropped, Mtu};
use parking_lot::{Mutex, MutexGuard, RwLockReadGuard};

use super::counters::add;
use super::mkeys::MkeyTable;
use super::qp::Qp;
use super::requester::fetch::Local;
use super::requester::send::Turn;
use super::responder::Responder;
use super::stepping::Step;
use super::{EmulatedHca, QpTable};
use crate::{Nanos, PathAddress};

pub(super) use requester::{PacketRequester, operation};
pub(super) use responder::PacketResponder;

/// Longest packet that a carrier must take: BTH to ICRC.
pub(super) const PACKET_LEN_MAX: usize = Mtu::B4096.packet_len_max();
/// Packets that one queue pair sends in one turn at most, so that queue pairs take turns.
const TURN_PACKETS_MAX: usize = 120;
/// Times that a step takes in what arrived, so that it ends however much arrives.
const FILLS_MAX: usize = 8;

/// What is done with an arrival: whence it came, and the packet or what is wrong with it.
pub(super) type EachArrival<'a> = dyn FnMut(SocketAddr, Result<&[u8], WireError>) + 'a;

/// What moves packets between devices.
pub(super) trait Carrier: Debug + Send {
    /// Where the next packet may be written, [`PACKET_LEN_MAX`] bytes of it; `None` if no more can be
    /// sent now.
    fn room(&mut self, now: Nanos) -> Option<&mut [u8]>;

    /// Sends the first `len` bytes of the room, whose last four are the place of the ICRC.
    fn send(&mut self, now: Nanos, to: SocketAddr, len: usize);

    /// Hands over what waits to be sent.
    fn flush(&mut self, now: Nanos);

    /// Takes in what arrived, a bounded amount of it; whether there was anything.
    fn fill(&mut self, now: Nanos) -> bool;

    /// Calls `each` for every packet that the last [`fill`](Self::fill) took in, its ICRC checked and
    /// taken off.
    fn for_each(&mut self, each: &mut EachArrival<'_>);

    /// When something happens without anything arriving.
    fn next_deadline(&self) -> Option<Nanos>;

    /// Bytes of packets that may wait at the other end to be taken in.
    fn receive_buffer(&self) -> usize;

    /// What was refused by the network below since the last call.
    fn take_unsent(&mut self) -> u64 {
        0
    }
}

/// The packet end of one device.
#[derive(Debug)]
pub(super) struct Station {
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    carrier: Box<dyn Carrier>,
    /// Queue pairs whose responders may have something to send.
    answering: Vec<Arc<Qp>>,
    /// Where in the list of queue pairs the next step begins.
    first: usize,
}

/// The socket address that an address vector stands for.
pub(super) fn socket_addr(to: &PathAddress) -> Option<SocketAddr> {
    match to {
        PathAddress::Ib { .. } => None,
        PathAddress::Roce { rgid, rmac, .. } => Some(SocketAddr::new(ip_of(*rgid), port_of(*rmac))),
    }
}

/// The IP address that a GID stands for.
pub(super) fn ip_of(gid: Gid) -> IpAddr {
    Ipv6Addr::from(gid.0).to_canonical()
}

/// The GID of an IP address.
pub(super) fn gid_of(ip: IpAddr) -> Gid {
    match ip {
        IpAddr::V4(v4) => Gid(v4.to_ipv6_mapped().octets()),
        IpAddr::V6(v6) => Gid(v6.octets()),
    }
}

/// First bytes of the Ethernet addresses that stand for UDP ports.
const PORT_MAC: [u8; 4] = [2, 0x1b, 0xe9, 0];

/// An Ethernet address that stands for a UDP port: devices with one IP address differ in it.
pub(super) const fn mac_of(port: u16) -> Mac {
    let ([a, b, c, d], [hi, lo]) = (PORT_MAC, port.to_be_bytes());
    Mac([a, b, c, d, hi, lo])
}

/// The UDP port that an Ethernet address stands for; RoCEv2's if it is an ordinary one.
pub(super) fn port_of(mac: Mac) -> u16 {
    match mac.0 {
        [a, b, c, d, hi, lo] if [a, b, c, d] == PORT_MAC => u16::from_be_bytes([hi, lo]),
        _ => ROCE_PORT,
    }
}

/// The state machines' name for an MTU.
pub(super) fn roce_mtu(mtu: PathMtu) -> Mtu {
    Mtu::from_code(mtu.code()).expect("both sides know the same five")
}

/// The device's name for an MTU.
pub(super) fn path_mtu(mtu: Mtu) -> PathMtu {
    PathMtu::from_code(mtu.code().into()).expect("both sides know the same five")
}

const fn roce_nanos(now: Nanos) -> ibex_roce::Nanos {
    ibex_roce::Nanos(now.0)
}

impl Station {
    pub(super) fn new(carrier: Box<dyn Carrier>) -> Self {
        Self { inner: Mutex::new(Inner { carrier, answering: Vec::new(), first: 0 }) }
    }

    /// Takes in what arrived, answers, lets every queue pair send, and hands all of it over.
    pub(super) fn step(&self, device: &EmulatedHca, now: Nanos) -> Step {
        let mut step = Step::default();
        let Some(mut inner) = self.inner.try_lock() else {
            // Whoever steps now does what there is to do.
            return step;
        };
        let table = device.qp_table();
        step.did_work |= inner.receive(device, &table, now);
        step.did_work |= inner.answer(device, now);
        inner.first = if table.list.is_empty() { 0 } else { (inner.first + 1) % table.list.len() };
        let (late, early) = table.list.split_at(inner.first);
        for qp in early.iter().chain(late) {
            step.merge(inner.step_qp(device, qp, now));
        }
        inner.carrier.flush(now);
        add(&device.counters.packets.unsent, inner.carrier.take_unsent());
        let deadline = inner.carrier.next_deadline();
        step.merge(Turn { did_work: false, deadline });
        step
    }
}

impl Inner {
    /// Takes in what arrived; whether there was anything.
    fn receive(&mut self, device: &EmulatedHca, table: &QpTable, now: Nanos) -> bool {
        let mut did_work = false;
        let Self { carrier, answering, .. } = self;
        for _ in 0..FILLS_MAX {
            if !carrier.fill(now) {
                break;
            }
            did_work = true;
            let mut batch = Batch::new(device, table, now, answering);
            carrier.for_each(&mut |from, packet| batch.take(from, packet));
            batch.finish();
        }
        did_work
    }

    /// Sends what responders have to say; whether there was anything.
    fn answer(&mut self, device: &EmulatedHca, now: Nanos) -> bool {
        let mut sent = 0;
        let mut waiting = std::mem::take(&mut self.answering);
        waiting.sort_unstable_by_key(|qp| qp.num().get());
        waiting.dedup_by_key(|qp| qp.num().get());
        waiting.retain(|qp| {
            let keys = device.keys.read();
            let mut responder = qp.responder.lock();
            let answered = responder.send_answers(device, qp, &keys, &mut *self.carrier, now);
            sent += answered.packets;
            // Without room the rest waits for the next step.
            answered.more
        });
        self.answering = waiting;
        add(&device.counters.packets.sent, sent);
        sent != 0
    }

    fn step_qp(&mut self, device: &EmulatedHca, qp: &Arc<Qp>, now: Nanos) -> Turn {
        match qp.state() {
            QpState::Rts | QpState::SqDraining => self.step_sends(device, qp, now),
            QpState::Err => device.step_flush(qp),
            _ => Turn::default(),
        }
    }

    fn step_sends(&mut self, device: &EmulatedHca, qp: &Qp, now: Nanos) -> Turn {
        if qp.is_idle(device.is_strict()) {
            return Turn::default();
        }
        let Some(mut requester) = qp.requester.try_lock() else {
            return Turn::default();
        };
        // A command may have changed the state until the lock was taken.
        if !qp.state().executes_sends() {
            return Turn { did_work: true, deadline: None };
        }
        let keys = device.keys.read();
        let local = Local { device, qp, keys: &keys, now };
        requester.turn_packets(&local, &mut *self.carrier)
    }
}

/// A responder that takes in one packet after another.
struct Run<'a> {
    qp: &'a Arc<Qp>,
    // Field order: the queue pair is let go before the keys, as it was locked after them.
    responder: MutexGuard<'a, Responder>,
    keys: RwLockReadGuard<'a, MkeyTable>,
    wants_answer: bool,
}

/// What one fill took in, on its way to the halves of queue pairs.
///
/// Packets mostly come in runs for one responder, which is looked up and locked once for each run.
struct Batch<'a> {
    device: &'a EmulatedHca,
    table: &'a QpTable,
    now: Nanos,
    run: Option<Run<'a>>,
    /// Queue pairs whose responders may want to answer.
    answering: &'a mut Vec<Arc<Qp>>,
    /// Packets that were taken in.
    received: u64,
}

impl<'a> Batch<'a> {
    fn new(device: &'a EmulatedHca, table: &'a QpTable, now: Nanos, answering: &'a mut Vec<Arc<Qp>>) -> Self {
        Self { device, table, now, run: None, answering, received: 0 }
    }

    /// Gives one arrival to the half that it is for.
    fn take(&mut self, from: SocketAddr, packet: Result<&[u8], WireError>) {
        let (device, now) = (self.device, self.now);
        let counters = &device.counters.packets;
        self.received += 1;
        let packet = match packet.and_then(Packet::parse) {
            Ok(packet) => packet,
            Err(WireError::Icrc { .. }) => return add(&counters.bad_icrc, 1),
            Err(_) => return add(&counters.malformed, 1),
        };
        let bth = packet.bth();
        let num = QpNum::new(bth.dest_qpn.get());
        if bth.opcode.is_request() {
            let Some(run) = self.run_of(num) else {
                return add(&counters.unknown_qp, 1);
            };
            let Run { qp, responder, keys, wants_answer } = run;
            *wants_answer |= responder.take_packet(device, qp, keys, now, from, &packet);
            return;
        }
        // ORDER: no responder is held while the lock of a requester is waited for.
        self.end_run();
        let Some(qp) = self.table.by_number.get(&num.get()) else {
            return add(&counters.unknown_qp, 1);
        };
        let mut requester = qp.requester.lock();
        let keys = device.keys.read();
        requester.take_packet(&Local { device, qp, keys: &keys, now }, from, &packet);
    }

    /// The run of this queue pair: the present one, or a new one.
    fn run_of(&mut self, num: QpNum) -> Option<&mut Run<'a>> {
        if self.run.as_ref().is_none_or(|run| run.qp.num() != num) {
            self.end_run();
            let qp = self.table.by_number.get(&num.get())?;
            let keys = self.device.keys.read();
            self.run = Some(Run { qp, responder: qp.responder.lock(), keys, wants_answer: false });
        }
        self.run.as_mut()
    }

    fn end_run(&mut self) {
        if let Some(run) = self.run.take()
            && run.wants_answer
        {
            self.answering.push(Arc::clone(run.qp));
        }
    }

    fn finish(mut self) {
        self.end_run();
        add(&self.device.counters.packets.received, self.received);
    }
}

/// Counts a packet that a state machine would not have.
fn note_dropped(device: &EmulatedHca, reason: Dropped) {
    let counters = &device.counters.packets;
    add(if reason == Dropped::PKey { &counters.wrong_pkey } else { &counters.unexpected }, 1);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_stand_for_each_other() {
        for addr in ["10.1.2.3:4791", "[fd00::7]:4791", "127.0.0.1:60001"] {
            let addr: SocketAddr = addr.parse().unwrap();
            let (rgid, rmac) = (gid_of(addr.ip()), mac_of(addr.port()));
            let path = |rmac| PathAddress::Roce {
                rgid,
                rmac,
                sgid_index: 0,
                hop_limit: 64,
                tclass: 0,
                udp_sport: 0,
            };
            assert_eq!(socket_addr(&path(rmac)), Some(addr));
            let other = SocketAddr::new(addr.ip(), ROCE_PORT);
            assert_eq!(socket_addr(&path(Mac([2, 0x1b, 0xe8, 1, 0, 0]))), Some(other));
        }
        let mtus = PathMtu::ALL.map(|mtu| path_mtu(roce_mtu(mtu)));
        assert_eq!(mtus, PathMtu::ALL);
    }
}
