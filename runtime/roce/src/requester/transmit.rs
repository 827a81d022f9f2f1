//! Writing packets: what may be sent now, its headers, its payload.

use super::{Message, Operation, Payload, Requester, RequesterConfig, Transmit};
use crate::types::{Nanos, Psn, RemoteAddr, RemoteRange};
use crate::wire::{AtomicEth, Bth, Extension, Headers, ImmDt, Opcode, Part, Reth};

impl Requester {
    /// Writes the next packet that may be sent at the start of `out`, payload included.
    ///
    /// `None` if nothing may be sent before something else happens. The invariant CRC is the caller's
    /// ([`crate::wire::Flow::seal`]).
    ///
    /// # Panics
    /// PANIC: if `out` is shorter than [`crate::Mtu::packet_len_max`].
    pub fn poll_transmit<P: Payload + ?Sized>(
        &mut self,
        now: Nanos,
        payload: &mut P,
        out: &mut [u8],
    ) -> Option<Transmit> {
        assert!(out.len() >= self.config.mtu.packet_len_max(), "the buffer holds a full packet");
        if !self.may_send() {
            return None;
        }
        let pos = self.cursor.pos;
        let message = self.messages[pos];
        let plan = self.plan(&message, pos);
        let start = plan.headers.emit(out).expect("headers are built for their opcode, and fit");
        let end = start + plan.len;
        if plan.len != 0 && payload.read(message.id, plan.offset, &mut out[start..end]).is_err() {
            self.refuse(pos);
            return self.poll_transmit(now, payload, out);
        }
        let len = crate::finish_packet(out, end, plan.headers.bth.pad);
        let again = self.advance_cursor(&plan);
        self.ack_deadline = self.ack_deadline.or_else(|| self.answer_due(now));
        Some(Transmit { len, again })
    }

    /// Holds back a message that local memory refused until everything before it is through.
    fn refuse(&mut self, pos: usize) {
        self.messages[pos].faulty = true;
        if pos != 0 && self.since_ack_req != 0 {
            // What was sent counted on this message to ask for an acknowledgement; now it must itself.
            self.rewind();
        }
        self.fail_if_faulty();
    }

    fn may_send(&self) -> bool {
        if self.failed || self.not_ready_until.is_some() {
            return false;
        }
        let Some(message) = self.messages.get(self.cursor.pos) else {
            return false;
        };
        let in_flight = self.cursor.psn.packets_since(self.unacked);
        let reads_max = u32::from(self.config.max_reads.max(1));
        let fits = in_flight < self.config.window_packets.max(1);
        fits && !message.faulty && (!message.op.has_response() || self.reads_in_flight < reads_max)
    }

    /// What the packet at the cursor is.
    fn plan(&self, message: &Message, pos: usize) -> Plan {
        let (config, psn) = (&self.config, self.cursor.psn);
        let idx = psn.packets_since(message.psn);
        let mtu = config.mtu.bytes();
        let offset = idx * mtu;
        let (opcode, ext, next) = match message.op {
            Operation::Read { from } => {
                let va = from.addr.va.wrapping_add(offset.into());
                let addr = RemoteAddr { va, ..from.addr };
                let rest = RemoteRange { addr, len: from.len - offset };
                (Opcode::ReadRequest, Extension::Reth(Reth(rest)), message.end())
            }
            Operation::Atomic { on, op } => {
                let (opcode, eth) = AtomicEth::of(on, op);
                (opcode, Extension::Atomic(eth), message.end())
            }
            Operation::Write { to, imm, .. } => {
                let part = Part::new(idx == 0, idx + 1 == message.packets);
                let imm = imm.filter(|_| part.ends()).map(ImmDt);
                let ext = match (part.starts(), imm) {
                    (true, Some(imm)) => Extension::RethImm(Reth(to), imm),
                    (true, None) => Extension::Reth(Reth(to)),
                    (false, Some(imm)) => Extension::Imm(imm),
                    (false, None) => Extension::None,
                };
                (Opcode::write(part, imm.is_some()), ext, psn.plus(1))
            }
            Operation::Send { imm, .. } => {
                let part = Part::new(idx == 0, idx + 1 == message.packets);
                let imm = imm.filter(|_| part.ends()).map(ImmDt);
                let ext = imm.map_or(Extension::None, Extension::Imm);
                (Opcode::send(part, imm.is_some()), ext, psn.plus(1))
            }
        };
        let len = match message.op {
            Operation::Read { .. } | Operation::Atomic { .. } => 0,
            // CAST: u32 to usize on a 64-bit host.
            _ => (message.op.len() - offset).min(mtu) as usize,
        };
        let ends = next == message.end();
        let bth = Bth {
            opcode,
            solicited: ends && is_solicited(&message.op),
            migrated: true,
            pad: crate::wire::pad_of(len),
            pkey: config.pkey,
            fecn: false,
            becn: false,
            dest_qpn: config.dest_qpn,
            ack_req: !message.op.has_response() && self.must_ask(pos, ends, next),
            psn,
        };
        Plan { headers: Headers { bth, ext }, offset, len, next, ends }
    }

    /// Whether this packet must ask for an acknowledgement: nothing after it would.
    fn must_ask(&self, pos: usize, ends: bool, next: Psn) -> bool {
        let RequesterConfig { window_packets, ack_every, .. } = self.config;
        let is_due = self.since_ack_req + 1 >= ack_every.max(1);
        let fills_window = next.packets_since(self.unacked) >= window_packets.max(1);
        let follows = self.messages.get(pos + 1);
        let is_alone = follows.is_none_or(|message| message.op.has_response() || message.faulty);
        is_due || fills_window || (ends && is_alone)
    }

    /// Moves past a packet that was written; whether it had been sent before.
    fn advance_cursor(&mut self, plan: &Plan) -> bool {
        let again = self.sent_end.is_after(self.cursor.psn);
        self.since_ack_req = if plan.headers.bth.ack_req { 0 } else { self.since_ack_req + 1 };
        let message = &mut self.messages[self.cursor.pos];
        if message.op.has_response() {
            message.asked = true;
            self.reads_in_flight += 1;
        }
        self.cursor.psn = plan.next;
        self.cursor.pos += usize::from(plan.ends);
        if plan.next.is_after(self.sent_end) {
            self.sent_end = plan.next;
        }
        self.counters.sent += 1;
        self.counters.sent_again += u64::from(again);
        again
    }
}

/// A packet before it is written.
struct Plan {
    headers: Headers,
    offset: u32,
    /// Payload bytes.
    len: usize,
    /// Sequence number after it.
    next: Psn,
    /// Whether it is the last of its message.
    ends: bool,
}

const fn is_solicited(op: &Operation) -> bool {
    match op {
        Operation::Send { solicited, .. } => *solicited,
        Operation::Write { solicited, imm, .. } => *solicited && imm.is_some(),
        _ => false,
    }
}
