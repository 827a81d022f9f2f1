//! The answering half on packets: the state machine's [`Host`] over memory keys and receive queues.
//!
//! *Who owns what.* The half keeps the position in the receive queue, as everywhere; the state machine keeps
//! the sequence state and the answers that wait. Every access is checked against the key table anew, packet
//! by packet: a key that was revoked between two packets of a message is refused at the second.

use std::net::SocketAddr;

use ibex_abi::cqe::CqeOpcode;
use ibex_abi::wqe::AtomicOp;
use ibex_roce::responder::{
    self as packets, Host, NoReceive, Received, Refusal, ResponderConfig, Rights, Verdict,
};
use ibex_roce::wire::Packet;
use ibex_roce::{PKey, Psn, QpNum, RemoteAddr, RemoteRange, RnrTimer};

use super::{Carrier, TURN_PACKETS_MAX, note_dropped, roce_mtu, socket_addr};
use crate::Nanos;
use crate::emulated::counters::add;
use crate::emulated::memory::Span;
use crate::emulated::message::Nak;
use crate::emulated::mkeys::{MkeyTable, Want};
use crate::emulated::qp::Qp;
use crate::emulated::responder::{Responder, Stop, Surroundings};
use crate::emulated::{EmulatedHca, atomics};

/// The state machine of a connected queue pair's answering half.
#[derive(Debug)]
pub(in crate::emulated) struct PacketResponder {
    machine: packets::Responder,
    peer: SocketAddr,
}

impl PacketResponder {
    fn new(half: &Responder) -> Option<Self> {
        let (to, remote_qpn) = half.from.as_ref()?;
        let config = ResponderConfig {
            pkey: PKey::DEFAULT,
            rights: Rights {
                read: half.rights.remote_read,
                write: half.rights.remote_write,
                atomic: half.rights.remote_atomic,
            },
            min_rnr_timer: RnrTimer::new(half.min_rnr_nak),
            max_reads: if half.log_max_reads > 7 { 0 } else { 1 << half.log_max_reads },
            ..ResponderConfig::new(
                QpNum::new(remote_qpn.get()),
                roce_mtu(half.mtu?),
                Psn::new(half.expected.get()),
            )
        };
        Some(Self { machine: packets::Responder::new(config), peer: socket_addr(to)? })
    }
}

/// What became of the answers that waited.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Answered {
    /// Packets sent.
    pub(super) packets: u64,
    /// More wait.
    pub(super) more: bool,
}

impl Responder {
    /// Takes in a request from `from`; whether there may be something to answer.
    pub(super) fn take_packet(
        &mut self,
        device: &EmulatedHca,
        qp: &Qp,
        keys: &MkeyTable,
        now: Nanos,
        from: SocketAddr,
        packet: &Packet<'_>,
    ) -> bool {
        let counters = &device.counters.packets;
        if !qp.state().responds() {
            add(&counters.unexpected, 1);
            return false;
        }
        let Some(mut half) = self.packets.take().or_else(|| PacketResponder::new(self).map(Box::new)) else {
            add(&counters.unexpected, 1);
            return false;
        };
        if half.peer == from {
            let around = surroundings(device, qp, keys, now);
            let mut host = Memory { half: self, around: &around };
            match half.machine.handle_packet(packet, &mut host) {
                Verdict::Dropped(reason) => note_dropped(device, reason),
                Verdict::Repeated => add(&device.counters.duplicates, 1),
                Verdict::Refused(refusal) => {
                    add(&counters.refused, 1);
                    self.fail(&around, nak_of(refusal));
                }
                Verdict::Executed | Verdict::OutOfSequence { .. } | Verdict::NotReady => {}
            }
            self.follow(&half.machine);
        } else {
            add(&counters.wrong_source, 1);
        }
        let wants = half.machine.has_answers();
        self.packets = Some(half);
        wants
    }

    /// Sends answers that wait, as long as there is room.
    pub(super) fn send_answers(
        &mut self,
        device: &EmulatedHca,
        qp: &Qp,
        keys: &MkeyTable,
        carrier: &mut dyn Carrier,
        now: Nanos,
    ) -> Answered {
        let mut answered = Answered::default();
        let Some(mut half) = self.packets.take() else {
            return answered;
        };
        let around = surroundings(device, qp, keys, now);
        let was_refused = half.machine.refused().is_some();
        let mut host = Memory { half: self, around: &around };
        // CAST: a small constant.
        while answered.packets < TURN_PACKETS_MAX as u64 {
            let Some(room) = carrier.room(now) else { break };
            let Some(packet) = half.machine.poll_transmit(&mut host, room) else { break };
            carrier.send(now, half.peer, packet.len);
            answered.packets += 1;
        }
        if let Some(refusal) = half.machine.refused().filter(|_| !was_refused) {
            // The key of a READ was revoked while its data was being sent.
            add(&device.counters.packets.refused, 1);
            self.fail(&around, nak_of(refusal));
        }
        answered.more = half.machine.has_answers();
        self.packets = Some(half);
        answered
    }

    /// Keeps what commands ask for in step with the state machine.
    fn follow(&mut self, machine: &packets::Responder) {
        self.expected = ibex_abi::types::Psn::new(machine.expected_psn().get());
        self.msn = machine.msn().get();
    }
}

fn surroundings<'a>(
    device: &'a EmulatedHca,
    qp: &'a Qp,
    keys: &'a MkeyTable,
    now: Nanos,
) -> Surroundings<'a> {
    Surroundings { device, qp, keys, placement: device.fabric().config().placement, now }
}

const fn nak_of(refusal: Refusal) -> Nak {
    match refusal {
        Refusal::InvalidRequest => Nak::InvalidRequest,
        Refusal::RemoteAccess => Nak::RemoteAccess,
        Refusal::RemoteOperation => Nak::RemoteOperation,
    }
}

const fn refusal_of(stop: &Stop) -> Refusal {
    match stop {
        Stop::Refuse(Nak::RemoteAccess) => Refusal::RemoteAccess,
        Stop::Refuse(Nak::RemoteOperation) => Refusal::RemoteOperation,
        Stop::Refuse(Nak::InvalidRequest) | Stop::NotReady | Stop::Withdrawn => Refusal::InvalidRequest,
    }
}

/// The device's memory and receives, as the state machine uses them.
struct Memory<'a, 'b> {
    half: &'a mut Responder,
    around: &'a Surroundings<'b>,
}

impl Memory<'_, '_> {
    fn reach(&self, at: RemoteAddr, len: u64, want: Want) -> Result<Span, Refusal> {
        let pd = self.around.qp.layout.pd;
        self.around.keys.reach(pd, at.rkey, at.va, len, want).map_err(|_| Refusal::RemoteAccess)
    }

    /// A part of a range, all of which the key must cover.
    fn part(&self, range: RemoteRange, offset: u32, len: usize, want: Want) -> Result<Span, Refusal> {
        let memory = self.reach(range.addr, range.len.into(), want)?;
        memory.slice(offset.into(), len as u64).ok_or(Refusal::RemoteAccess)
    }
}

impl Host for Memory<'_, '_> {
    fn write(&mut self, range: RemoteRange, offset: u32, bytes: &[u8]) -> Result<(), Refusal> {
        self.part(range, offset, bytes.len(), Want::RemoteWrite)?.write(0, bytes);
        Ok(())
    }

    fn check_read(&mut self, range: RemoteRange) -> Result<(), Refusal> {
        self.reach(range.addr, range.len.into(), Want::RemoteRead).map(|_| ())
    }

    fn read(&mut self, range: RemoteRange, offset: u32, into: &mut [u8]) -> Result<(), Refusal> {
        self.part(range, offset, into.len(), Want::RemoteRead)?.read(0, into);
        Ok(())
    }

    fn atomic(&mut self, on: RemoteAddr, op: ibex_roce::AtomicOp) -> Result<u64, Refusal> {
        let word = self.reach(on, 8, Want::RemoteAtomic)?;
        if !word.is_aligned(0, 8) {
            return Err(Refusal::InvalidRequest);
        }
        let op = match op {
            ibex_roce::AtomicOp::FetchAdd { add } => AtomicOp::FetchAdd { add },
            ibex_roce::AtomicOp::CmpSwap { swap, compare } => AtomicOp::CmpSwap { swap, compare },
        };
        Ok(atomics::execute(op, word))
    }

    fn open_receive(&mut self) -> Result<(), NoReceive> {
        self.half.open_receive(self.around).map_err(|_| NoReceive)
    }

    fn fill_receive(&mut self, offset: u32, bytes: &[u8]) -> Result<(), Refusal> {
        let start = u64::from(offset);
        let end = start + bytes.len() as u64;
        let place = |from: u64, memory: Span| {
            // CAST: a position inside `bytes`.
            let at = (from - start) as usize;
            memory.write(0, &bytes[at..at + memory.len() as usize]);
            true
        };
        self.half.scatter_receive(self.around, start, end, end, place).map_err(|stop| refusal_of(&stop))
    }

    fn complete_receive(&mut self, received: Received) -> Result<(), Refusal> {
        let Received { len, imm, solicited, is_write } = received;
        let kind = match (is_write, imm) {
            (true, _) => CqeOpcode::RespWriteImm,
            (false, Some(_)) => CqeOpcode::RespSendImm,
            (false, None) => CqeOpcode::RespSend,
        };
        let done = self.half.complete_receive(self.around, len, solicited, kind, imm);
        done.map_err(|stop| refusal_of(&stop))
    }
}
