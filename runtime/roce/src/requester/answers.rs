//! Taking in answers: acknowledgements, refusals, READ data, what words were.

use super::{Event, Failure, Message, Operation, Requester, RequesterConfig, ResponseSink, Verdict};
use crate::Dropped;
use crate::types::{Nanos, Psn, RnrTimer};
use crate::wire::{Aeth, AtomicAckEth, Class, Extension, NakCode, Packet, Part, Syndrome};

/// Where a sequence number stands that an answer names.
enum Place {
    /// It was answered before.
    Before,
    /// It was sent and is not answered.
    InFlight,
    /// It was never sent.
    After,
}

impl Requester {
    /// Takes in a packet that is for this queue pair and whose invariant CRC holds.
    pub fn handle_packet<S: ResponseSink + ?Sized>(
        &mut self,
        now: Nanos,
        packet: &Packet<'_>,
        sink: &mut S,
    ) -> Verdict {
        let bth = packet.bth();
        if !self.config.pkey.admits(bth.pkey) {
            return Verdict::Dropped(Dropped::PKey);
        }
        if bth.opcode.is_request() {
            return Verdict::Dropped(Dropped::WrongHalf);
        }
        if self.failed {
            return Verdict::Dropped(Dropped::Failed);
        }
        match self.place_of(bth.psn) {
            Place::Before => return Verdict::Stale,
            Place::After => return Verdict::Dropped(Dropped::NotSent),
            Place::InFlight => {}
        }
        match (bth.opcode.class(), packet.headers.ext) {
            (Class::Ack, Extension::Aeth(aeth)) => self.take_ack(now, bth.psn, aeth),
            (Class::ReadResponse(part), ext) => self.take_data(now, packet, part, ext, sink),
            (Class::AtomicAck, Extension::AtomicAck(aeth, ack)) => {
                self.take_original(now, bth.psn, aeth, ack, sink)
            }
            _ => Verdict::Dropped(Dropped::WrongHalf),
        }
    }

    fn place_of(&self, psn: Psn) -> Place {
        if self.unacked.is_after(psn) {
            return Place::Before;
        }
        let in_flight = self.sent_end.packets_since(self.unacked);
        if psn.packets_since(self.unacked) < in_flight { Place::InFlight } else { Place::After }
    }

    fn take_ack(&mut self, now: Nanos, psn: Psn, aeth: Aeth) -> Verdict {
        let end = match aeth.syndrome {
            Syndrome::Ack { .. } => psn.plus(1),
            // Everything before the packet that is refused was carried out.
            Syndrome::Rnr(_) | Syndrome::Nak(_) => psn,
        };
        let before = self.unacked;
        if !self.acknowledge(now, end) {
            return self.response_missing(before);
        }
        if self.failed {
            return Verdict::Failed;
        }
        match aeth.syndrome {
            Syndrome::Ack { .. } => Verdict::Progress,
            Syndrome::Rnr(timer) => self.not_ready(now, timer),
            Syndrome::Nak(NakCode::PsnSequence) => self.sequence_nak(),
            Syndrome::Nak(NakCode::InvalidRequest) => self.fail(Failure::RemoteInvalidRequest),
            Syndrome::Nak(NakCode::RemoteAccess) => self.fail(Failure::RemoteAccess),
            Syndrome::Nak(NakCode::RemoteOperation) => self.fail(Failure::RemoteOperation),
            Syndrome::Nak(NakCode::InvalidRdRequest) => self.fail(Failure::BadResponse),
        }
    }

    /// Takes everything before `end` as carried out; false if a READ or an atomic stands in the way,
    /// whose response must have been lost.
    fn acknowledge(&mut self, now: Nanos, end: Psn) -> bool {
        let before = self.unacked;
        while self.unacked != end {
            let Some(message) = self.messages.front().filter(|message| !message.op.has_response()) else {
                break;
            };
            let left = end.packets_since(self.unacked);
            if message.end().packets_since(self.unacked) > left {
                self.unacked = end;
            } else {
                self.complete_front();
            }
        }
        let reached = self.unacked == end;
        if self.unacked != before {
            self.follow_unacked();
            self.progressed(now);
        }
        reached
    }

    /// The oldest message is through.
    fn complete_front(&mut self) {
        let Some(message) = self.messages.pop_front() else {
            return;
        };
        self.unacked = message.end();
        self.cursor.pos = self.cursor.pos.saturating_sub(1);
        self.reads_in_flight -= u32::from(message.asked);
        self.events.push_back(Event::Completed { id: message.id });
    }

    /// What was answered late need not be sent again.
    fn follow_unacked(&mut self) {
        if self.unacked.is_after(self.cursor.psn) {
            (self.cursor.pos, self.cursor.psn) = (0, self.unacked);
        }
    }

    /// A later answer shows that the one to the oldest READ or atomic was lost: an implied negative
    /// acknowledgement.
    fn response_missing(&mut self, before: Psn) -> Verdict {
        if self.failed {
            return Verdict::Failed;
        }
        if self.gone_back_to == Some(self.unacked) {
            return if self.unacked == before { Verdict::Stale } else { Verdict::Progress };
        }
        self.counters.implied_naks += 1;
        self.go_back()
    }

    fn sequence_nak(&mut self) -> Verdict {
        // The responder asks once for each gap; the network may repeat that, and a responder that was
        // not ready may ask for what it refused.
        if self.gone_back_to == Some(self.unacked) || self.not_ready_until.is_some() {
            return Verdict::Stale;
        }
        self.counters.sequence_naks += 1;
        self.go_back()
    }

    fn not_ready(&mut self, now: Nanos, timer: RnrTimer) -> Verdict {
        if self.not_ready_until.is_some() {
            return Verdict::Stale;
        }
        self.counters.not_ready += 1;
        if self.config.rnr_retry < RequesterConfig::RNR_RETRY_FOREVER {
            if self.rnr_retries >= self.config.rnr_retry {
                return self.fail(Failure::RnrRetryExceeded);
            }
            self.rnr_retries += 1;
        }
        // The other end lives: only its own timer counts until then.
        (self.retries, self.gone_back_to) = (0, None);
        self.rewind();
        self.not_ready_until = Some(now.plus(timer.nanos()));
        Verdict::NotReady
    }

    /// The oldest message, if this is the answer that it waits for.
    fn front_at(&mut self, now: Nanos, psn: Psn) -> Result<Message, Verdict> {
        let before = self.unacked;
        if !self.acknowledge(now, psn) {
            return Err(self.response_missing(before));
        }
        match self.messages.front() {
            Some(message) if !self.failed => Ok(*message),
            _ => Err(Verdict::Failed),
        }
    }

    fn take_data<S: ResponseSink + ?Sized>(
        &mut self,
        now: Nanos,
        packet: &Packet<'_>,
        part: Part,
        ext: Extension,
        sink: &mut S,
    ) -> Verdict {
        let psn = packet.bth().psn;
        let message = match self.front_at(now, psn) {
            Ok(message) => message,
            Err(verdict) => return verdict,
        };
        let Operation::Read { from } = message.op else {
            return self.fail(Failure::BadResponse);
        };
        let mtu = self.config.mtu.bytes();
        let offset = psn.packets_since(message.psn) * mtu;
        let rest = from.len - offset;
        // Whether a packet starts a response depends on which request it answers; the rest does not.
        // CAST: u32 to usize on a 64-bit host.
        let fits = packet.payload.len() == rest.min(mtu) as usize && part.ends() == (rest <= mtu);
        if !fits || !is_positive(ext) {
            return self.fail(Failure::BadResponse);
        }
        if !packet.payload.is_empty() && sink.place(message.id, offset, packet.payload).is_err() {
            return self.fail(Failure::LocalProtection);
        }
        self.answered(now, rest <= mtu)
    }

    fn take_original<S: ResponseSink + ?Sized>(
        &mut self,
        now: Nanos,
        psn: Psn,
        aeth: Aeth,
        ack: AtomicAckEth,
        sink: &mut S,
    ) -> Verdict {
        let message = match self.front_at(now, psn) {
            Ok(message) => message,
            Err(verdict) => return verdict,
        };
        if !matches!(message.op, Operation::Atomic { .. }) || !is_positive(Extension::Aeth(aeth)) {
            return self.fail(Failure::BadResponse);
        }
        if sink.original(message.id, ack.original).is_err() {
            return self.fail(Failure::LocalProtection);
        }
        self.answered(now, true)
    }

    /// One packet of a response arrived in its turn.
    fn answered(&mut self, now: Nanos, ends: bool) -> Verdict {
        self.unacked = self.unacked.plus(1);
        if ends {
            self.complete_front();
        }
        self.follow_unacked();
        self.progressed(now);
        if self.failed { Verdict::Failed } else { Verdict::Progress }
    }
}

/// Whether a response says that it is one; the middle of READ data says nothing.
const fn is_positive(ext: Extension) -> bool {
    match ext {
        Extension::Aeth(aeth) => matches!(aeth.syndrome, Syndrome::Ack { .. }),
        _ => true,
    }
}
