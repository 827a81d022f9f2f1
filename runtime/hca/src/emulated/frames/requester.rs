//! The sending half on packets: WQEs become messages of the state machine, its events become CQEs.
//!
//! *Who owns what.* The half keeps the list of fetched WQEs, as everywhere; the state machine keeps packets
//! and timers. A message's name is its WQE's place among all that were fetched, so that payload is read again
//! from the send queue and from the memory that its WQE names, also when a packet is sent again.

use std::collections::VecDeque;
use std::net::SocketAddr;

use ibex_abi::cqe::Syndrome;
use ibex_abi::types::QpState;
use ibex_abi::wqe::AtomicOp;
use ibex_roce::requester::{
    self as packets, Event, LocalFault, MessageId, Operation, RequesterConfig, ResponseSink, Verdict,
};
use ibex_roce::wire::Packet;
use ibex_roce::{AckTimeout, PKey, Psn, QpNum, RemoteAddr, RemoteRange};

use super::{Carrier, TURN_PACKETS_MAX, note_dropped, roce_mtu, roce_nanos, socket_addr};
use crate::emulated::counters::add;
use crate::emulated::memory::Span;
use crate::emulated::message::{Request, RequestOp};
use crate::emulated::mkeys::Want;
use crate::emulated::qp::WQE_BYTES_MAX;
use crate::emulated::requester::complete::Failure;
use crate::emulated::requester::fetch::{Fetch, Local, WqeBuf};
use crate::emulated::requester::send::{Tally, Turn};
use crate::emulated::requester::{Connection, OUTSTANDING_MAX, Outstanding, Progress, Requester};

/// Packets of one queue pair that are in flight, at least and at most.
const WINDOW_PACKETS: std::ops::RangeInclusive<usize> = 8..=256;
/// An acknowledgement is asked for after so many packets at the latest.
const ACK_EVERY: u32 = 32;

/// Silence after which a queue pair first sends again, where its ack timeout is far longer: loss costs this
/// much and not the time that a stall may last. Hardware calls it adaptive retransmission. Chosen: above
/// the turns that processes on a busy host wait for each other, and above what a queue on the path holds,
/// which is filled with the same again otherwise.
const FIRST_TIMEOUT: ibex_roce::Nanos = ibex_roce::Nanos(64_000_000);

/// Packets of one queue pair that may be in flight: together, all queue pairs of a device that talks to
/// many fill no more than half of a receiver's buffer, which counts its own overhead too.
fn window(carrier: &dyn Carrier, num_qps: usize, packet_len: usize) -> u32 {
    let packets = carrier.receive_buffer() / (2 * packet_len * num_qps.max(1));
    // CAST: at most 256.
    packets.clamp(*WINDOW_PACKETS.start(), *WINDOW_PACKETS.end()) as u32
}

/// The state machine of a connected queue pair's sending half.
#[derive(Debug)]
pub(in crate::emulated) struct PacketRequester {
    machine: packets::Requester,
    peer: SocketAddr,
}

impl PacketRequester {
    /// For a half that was connected and has sent nothing.
    fn new(half: &Requester, local: &Local<'_>, carrier: &dyn Carrier) -> Option<Self> {
        let connection = half.connection.as_ref()?;
        let (mtu, first_psn) = (roce_mtu(connection.mtu.0), Psn::new(half.psn.get()));
        let num_qps = local.device.qp_table().list.len();
        let window_packets = window(carrier, num_qps, mtu.packet_len_max());
        let config = RequesterConfig {
            pkey: PKey::DEFAULT,
            retry_count: half.patience.retry_count,
            rnr_retry: half.patience.rnr_retry,
            ack_timeout: AckTimeout::new(half.patience.ack_timeout),
            first_timeout: Some(FIRST_TIMEOUT),
            max_reads: 1 << half.patience.log_max_reads.min(7),
            window_packets,
            ack_every: ACK_EVERY.min(window_packets / 2),
            max_messages: OUTSTANDING_MAX,
            ..RequesterConfig::new(QpNum::new(connection.remote_qpn.get()), mtu, first_psn)
        };
        let peer = socket_addr(&connection.to)?;
        Some(Self { machine: packets::Requester::new(config), peer })
    }
}

impl Requester {
    /// Posts what doorbells cover, sends what may be sent, and completes what is answered.
    pub(super) fn turn_packets(&mut self, local: &Local<'_>, carrier: &mut dyn Carrier) -> Turn {
        let known = self.packets.take();
        let Some(mut half) = known.or_else(|| PacketRequester::new(self, local, carrier).map(Box::new))
        else {
            return Turn::default();
        };
        let mut did = Tally::default();
        half.machine.handle_timeout(roce_nanos(local.now));
        self.post_messages(local, &mut half, &mut did);
        let sent = self.send_packets(local, &mut half, carrier);
        let completed = self.take_events(local, &mut half);
        did.publish(local.device);
        let deadline = half.machine.poll_timeout().map(|at| crate::Nanos(at.0));
        self.packets = Some(half);
        self.note_idleness(local.qp);
        let failed = local.qp.state() == QpState::Err;
        Turn { did_work: failed || did.sent + sent + completed != 0, deadline }
    }

    /// Fetches WQEs and posts their messages.
    fn post_messages(&mut self, local: &Local<'_>, half: &mut PacketRequester, did: &mut Tally) {
        let mut buf: WqeBuf = [0; WQE_BYTES_MAX];
        while self.outstanding.len() < OUTSTANDING_MAX {
            let available = local.qp.covered(self.next, local.device.is_strict());
            if available == 0 {
                return;
            }
            let connection = self.connection.as_ref();
            let fetched = match local.fetch(connection, self.psn, &mut buf, self.next, available) {
                Ok(fetched) => fetched,
                Err((work, failure)) => {
                    self.fail_fetched(local, &work, failure);
                    return;
                }
            };
            if self.must_wait(fetched.fence, fetched.work.has_response) {
                return;
            }
            let progress = match &fetched.what {
                Fetch::Nothing => Progress::Done,
                Fetch::Message { request, .. } => {
                    let Some(operation) = operation(request) else {
                        let failure = Failure::new(Syndrome::LOCAL_QP_OP);
                        self.fail_fetched(local, &fetched.work, failure);
                        return;
                    };
                    let id = MessageId(self.retired + self.outstanding.len() as u64);
                    if half.machine.post(id, operation).is_err() {
                        // Too many packets are outstanding; it is fetched again after an answer.
                        return;
                    }
                    Progress::Unanswered
                }
            };
            self.next = self.next.wrapping_add(fetched.work.blocks);
            self.psn = fetched.work.end();
            local.qp.prefetch_block(self.next);
            did.count(&fetched);
            did.sent += 1;
            self.outstanding.push_back(Outstanding::new(fetched.work, progress));
        }
    }

    /// Sends packets while there is room; how many.
    fn send_packets(
        &mut self,
        local: &Local<'_>,
        half: &mut PacketRequester,
        carrier: &mut dyn Carrier,
    ) -> usize {
        let now = roce_nanos(local.now);
        let (mut sent, mut again) = (0, 0);
        let mut messages = Messages::of(self, local);
        while sent < TURN_PACKETS_MAX {
            let Some(room) = carrier.room(local.now) else { break };
            let Some(packet) = half.machine.poll_transmit(now, &mut messages, room) else { break };
            carrier.send(local.now, half.peer, packet.len);
            sent += 1;
            again += u64::from(packet.again);
        }
        add(&local.device.counters.packets.sent, sent as u64);
        add(&local.device.counters.packets.sent_again, again);
        add(&local.device.counters.retransmissions, again);
        sent
    }

    /// Takes in an answer from `from`.
    pub(super) fn take_packet(&mut self, local: &Local<'_>, from: SocketAddr, packet: &Packet<'_>) {
        let counters = &local.device.counters.packets;
        if !local.qp.state().executes_sends() {
            return add(&counters.unexpected, 1);
        }
        let Some(mut half) = self.packets.take() else {
            return add(&counters.unexpected, 1);
        };
        if half.peer == from {
            let mut messages = Messages::of(self, local);
            let now = roce_nanos(local.now);
            if let Verdict::Dropped(reason) = half.machine.handle_packet(now, packet, &mut messages) {
                note_dropped(local.device, reason);
            }
            self.take_events(local, &mut half);
            local.qp.note_busy();
        } else {
            add(&counters.wrong_source, 1);
        }
        self.packets = Some(half);
    }

    /// Completes what the state machine says is through; how many WQEs.
    fn take_events(&mut self, local: &Local<'_>, half: &mut PacketRequester) -> usize {
        let mut retired = 0;
        if local.qp.state() == QpState::Err {
            return retired;
        }
        loop {
            // WQEs without a message stand among the others and complete in their turn.
            retired += self.retire(local.device, local.qp, local.now);
            let first = self.retired;
            let place = |id: MessageId| usize::try_from(id.0.wrapping_sub(first)).ok();
            match half.machine.poll_event() {
                Some(Event::Completed { id }) => {
                    if let Some(entry) = place(id).and_then(|pos| self.outstanding.get_mut(pos)) {
                        entry.progress = Progress::Done;
                    }
                }
                Some(Event::Failed { id, reason }) => {
                    if let Some(pos) = place(id) {
                        self.fail(local.device, local.qp, pos, failure_of(reason), local.now);
                    }
                    // Whatever comes after it is flushed, in order, also what would have succeeded.
                    return retired + 1;
                }
                Some(Event::Flushed { .. }) => {}
                None => return retired,
            }
        }
    }
}

/// What a request is to the state machine; `None` if RoCE has no such operation.
pub(in crate::emulated) fn operation(request: &Request) -> Option<Operation> {
    let addr = |at: crate::emulated::message::Target| RemoteAddr { va: at.va, rkey: at.rkey };
    // CAST: at most 2^30 bytes, as was checked when the WQE was fetched.
    let len = request.len as u32;
    let solicited = request.solicited;
    Some(match request.op {
        RequestOp::Write { to, imm } => {
            Operation::Write { to: RemoteRange { addr: addr(to), len }, imm, solicited }
        }
        RequestOp::Send { imm } => Operation::Send { len, imm, solicited },
        RequestOp::Read { from } => Operation::Read { from: RemoteRange { addr: addr(from), len } },
        RequestOp::Atomic { on, op } => Operation::Atomic { on: addr(on), op: plain_atomic(op)? },
    })
}

/// The atomics that have an opcode on the wire; masked ones only where the mask hides nothing.
fn plain_atomic(op: AtomicOp) -> Option<ibex_roce::AtomicOp> {
    match op {
        AtomicOp::FetchAdd { add } | AtomicOp::MaskedFetchAdd64 { add, field_boundary: 0 } => {
            Some(ibex_roce::AtomicOp::FetchAdd { add })
        }
        AtomicOp::CmpSwap { swap, compare }
        | AtomicOp::MaskedCmpSwap64 { swap, compare, swap_mask: u64::MAX, compare_mask: u64::MAX } => {
            Some(ibex_roce::AtomicOp::CmpSwap { swap, compare })
        }
        _ => None,
    }
}

fn failure_of(reason: packets::Failure) -> Failure {
    Failure::new(match reason {
        packets::Failure::RetryExceeded => Syndrome::TRANSPORT_RETRY_EXC,
        packets::Failure::RnrRetryExceeded => Syndrome::RNR_RETRY_EXC,
        packets::Failure::RemoteInvalidRequest => Syndrome::REMOTE_INVAL_REQ,
        packets::Failure::RemoteAccess => Syndrome::REMOTE_ACCESS,
        packets::Failure::RemoteOperation => Syndrome::REMOTE_OP,
        packets::Failure::BadResponse => Syndrome::BAD_RESP,
        packets::Failure::LocalProtection => Syndrome::LOCAL_PROT,
    })
}

/// The messages of a half, as the state machine reads and fills them.
struct Messages<'a, 'b> {
    outstanding: &'a VecDeque<Outstanding>,
    connection: Option<&'a Connection>,
    /// Name of the message at the head of the list.
    first_id: u64,
    local: &'a Local<'b>,
    buf: WqeBuf,
    /// The latest message's payload, if that is one range: its WQE need not be read for every packet.
    latest: Option<(MessageId, Span)>,
}

impl<'a, 'b> Messages<'a, 'b> {
    fn of(half: &'a Requester, local: &'a Local<'b>) -> Self {
        let (outstanding, connection) = (&half.outstanding, half.connection.as_ref());
        Self { outstanding, connection, first_id: half.retired, local, buf: [0; WQE_BYTES_MAX], latest: None }
    }

    /// Reads a message's WQE again and calls `then` with what it says.
    fn with<T>(&mut self, id: MessageId, then: impl FnOnce(&Fetch<'_>) -> T) -> Result<T, LocalFault> {
        let pos = usize::try_from(id.0.wrapping_sub(self.first_id)).map_err(|_| LocalFault)?;
        let work = &self.outstanding.get(pos).ok_or(LocalFault)?.work;
        let (idx, blocks) = (work.idx, work.blocks);
        let fetched = self.local.fetch(self.connection, work.psn, &mut self.buf, idx, blocks);
        fetched.map(|fetched| then(&fetched.what)).map_err(|_| LocalFault)
    }
}

impl packets::Payload for Messages<'_, '_> {
    fn read(&mut self, id: MessageId, offset: u32, into: &mut [u8]) -> Result<(), LocalFault> {
        if let Some((_, memory)) = self.latest.filter(|(latest, _)| *latest == id)
            && let Some(part) = memory.slice(offset.into(), into.len() as u64)
        {
            part.read(0, into);
            return Ok(());
        }
        self.latest = self
            .with(id, |message| {
                let Fetch::Message { payload, .. } = message else { return None };
                payload.gather_into(offset.into(), into);
                payload.sole_range(Want::LocalRead)
            })?
            .map(|memory| (id, memory));
        Ok(())
    }
}

impl ResponseSink for Messages<'_, '_> {
    fn place(&mut self, id: MessageId, offset: u32, bytes: &[u8]) -> Result<(), LocalFault> {
        add(&self.local.device.counters.bytes_read, bytes.len() as u64);
        self.with(id, |message| match message {
            Fetch::Message { payload, .. } => payload.scatter_from(offset.into(), bytes),
            Fetch::Nothing => {}
        })
    }

    fn original(&mut self, id: MessageId, word: u64) -> Result<(), LocalFault> {
        let local = self.local;
        self.with(id, |message| {
            let Fetch::Message { result: Some(seg), .. } = message else {
                return Ok(());
            };
            let memory = local.result_memory(seg).map_err(|_| LocalFault)?;
            // CAST: the operand is 4 or 8 bytes.
            memory.write(0, &word.to_le_bytes()[..memory.len() as usize]);
            Ok(())
        })?
    }
}
