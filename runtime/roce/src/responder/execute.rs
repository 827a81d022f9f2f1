//! Carrying requests out: what is legal, in which order, and what is remembered.

use super::{Answer, Current, Host, NoReceive, Received, Refusal, Remembered, Responder, Verdict};
use crate::responder::answers::Reading;
use crate::types::RemoteRange;
use crate::wire::{AtomicEth, Class, Extension, Packet, Part, Reth, Syndrome};
use crate::{Dropped, MESSAGE_LEN_MAX};

/// Why a packet in its turn is not carried out.
enum Stop {
    NotReady,
    Refuse(Refusal),
}

impl From<Refusal> for Stop {
    fn from(refusal: Refusal) -> Self {
        Self::Refuse(refusal)
    }
}

impl From<NoReceive> for Stop {
    fn from(NoReceive: NoReceive) -> Self {
        Self::NotReady
    }
}

/// A request that is not a legal one.
const INVALID: Stop = Stop::Refuse(Refusal::InvalidRequest);

impl Responder {
    /// A packet with the expected sequence number.
    pub(super) fn take_next<H: Host + ?Sized>(&mut self, packet: &Packet<'_>, host: &mut H) -> Verdict {
        let psn = packet.bth().psn;
        match self.execute(packet, host) {
            Ok(()) => {
                self.asked = false;
                Verdict::Executed
            }
            Err(Stop::NotReady) => {
                self.acknowledge(psn, Syndrome::Rnr(self.config.min_rnr_timer));
                // The requester knows what to send next; what it has sent after this says nothing new.
                self.asked = true;
                Verdict::NotReady
            }
            Err(Stop::Refuse(refusal)) => {
                self.refuse(psn, refusal);
                Verdict::Refused(refusal)
            }
        }
    }

    fn execute<H: Host + ?Sized>(&mut self, packet: &Packet<'_>, host: &mut H) -> Result<(), Stop> {
        match (packet.bth().opcode.class(), packet.headers.ext) {
            (Class::Send(part), _) => self.send(packet, part, host),
            (Class::Write(part), _) => self.write(packet, part, host),
            (Class::Read, Extension::Reth(reth)) => self.read(packet, reth, host),
            (Class::Atomic, Extension::Atomic(eth)) => self.atomic(packet, eth, host),
            _ => Err(INVALID),
        }
    }

    /// The length that a packet may have, by its place in the message.
    ///
    /// SPEC: IBTA vol. 1 §9.7.4.1.6: first and middle packets are full, a last one is not empty.
    fn check_len(&self, packet: &Packet<'_>, part: Part) -> Result<u32, Stop> {
        // CAST: a payload is shorter than a datagram.
        let (len, mtu) = (packet.payload.len() as u32, self.config.mtu.bytes());
        let is_legal = match part {
            Part::First | Part::Middle => len == mtu,
            Part::Last => (1..=mtu).contains(&len),
            Part::Only => len <= mtu,
        };
        if is_legal { Ok(len) } else { Err(INVALID) }
    }

    fn send<H: Host + ?Sized>(&mut self, packet: &Packet<'_>, part: Part, host: &mut H) -> Result<(), Stop> {
        let done = match (part.starts(), self.current) {
            (true, None) => 0,
            (false, Some(Current::Send { done })) => done,
            _ => return Err(INVALID),
        };
        let len = self.check_len(packet, part)?;
        if len > MESSAGE_LEN_MAX - done {
            return Err(INVALID);
        }
        if part.starts() {
            host.open_receive()?;
        }
        if len != 0 {
            host.fill_receive(done, packet.payload)?;
        }
        let done = done + len;
        if part.ends() {
            self.complete_receive(packet, done, false, host)?;
        }
        self.advance(packet, part, Current::Send { done });
        Ok(())
    }

    fn write<H: Host + ?Sized>(&mut self, packet: &Packet<'_>, part: Part, host: &mut H) -> Result<(), Stop> {
        let (range, done) = match (packet.headers.ext, self.current) {
            (Extension::Reth(Reth(range)) | Extension::RethImm(Reth(range), _), None) => (range, 0),
            (Extension::None | Extension::Imm(_), Some(Current::Write { range, done })) => (range, done),
            _ => return Err(INVALID),
        };
        let len = self.check_len(packet, part)?;
        let left = range.len - done;
        let is_legal = if part.ends() { len == left } else { len < left };
        if !self.config.rights.write || range.len > MESSAGE_LEN_MAX || !is_legal {
            return Err(INVALID);
        }
        let has_imm = packet.headers.ext.imm().is_some();
        if has_imm {
            host.open_receive()?;
        }
        // SPEC: IBTA C9-88: the key of a zero-length request is not checked.
        if len != 0 {
            host.write(range, done, packet.payload)?;
        }
        if has_imm {
            self.complete_receive(packet, range.len, true, host)?;
        }
        self.advance(packet, part, Current::Write { range, done: done + len });
        Ok(())
    }

    fn complete_receive<H: Host + ?Sized>(
        &self,
        packet: &Packet<'_>,
        len: u32,
        is_write: bool,
        host: &mut H,
    ) -> Result<(), Refusal> {
        let imm = packet.headers.ext.imm();
        host.complete_receive(Received { len, imm, solicited: packet.bth().solicited, is_write })
    }

    /// A packet of a SEND or WRITE was carried out.
    fn advance(&mut self, packet: &Packet<'_>, part: Part, current: Current) {
        self.current = if part.ends() { None } else { Some(current) };
        self.expected = self.expected.plus(1);
        if part.ends() {
            self.msn = self.msn.next();
        }
        if packet.bth().ack_req {
            self.acknowledge(packet.bth().psn, Syndrome::ACK);
        }
    }

    /// Whether a READ or an atomic may come now at all.
    fn check_response(&self, packet: &Packet<'_>, has_right: bool) -> Result<(), Stop> {
        let is_legal = has_right && self.config.max_reads != 0 && packet.payload.is_empty();
        // SPEC: IBTA C9-102 and following: no packets of another message in between, and no more of
        // them than were agreed on.
        if is_legal && self.current.is_none() && self.answers.has_room() { Ok(()) } else { Err(INVALID) }
    }

    fn read<H: Host + ?Sized>(&mut self, packet: &Packet<'_>, reth: Reth, host: &mut H) -> Result<(), Stop> {
        self.check_response(packet, self.config.rights.read)?;
        let range = reth.0;
        if range.len > MESSAGE_LEN_MAX {
            return Err(INVALID);
        }
        if range.len != 0 {
            host.check_read(range)?;
        }
        self.msn = self.msn.next();
        let reading = self.reading(packet, range);
        self.expected = self.expected.plus(reading.packets);
        self.answers.push(Answer::Read(reading));
        Ok(())
    }

    fn reading(&self, packet: &Packet<'_>, range: RemoteRange) -> Reading {
        let packets = self.config.mtu.packets(range.len);
        Reading { psn: packet.bth().psn, range, packets, sent: 0, msn: self.msn, is_repeat: false }
    }

    fn atomic<H: Host + ?Sized>(
        &mut self,
        packet: &Packet<'_>,
        eth: AtomicEth,
        host: &mut H,
    ) -> Result<(), Stop> {
        self.check_response(packet, self.config.rights.atomic)?;
        let (psn, opcode) = (packet.bth().psn, packet.bth().opcode);
        let op = eth.op(opcode).filter(|_| eth.on.va.is_multiple_of(8)).ok_or(INVALID)?;
        let original = host.atomic(eth.on, op)?;
        self.msn = self.msn.next();
        self.expected = self.expected.plus(1);
        if self.atomics.len() >= self.config.max_reads.into() {
            self.atomics.pop_front();
        }
        self.atomics.push_back(Remembered { psn, opcode, eth, original });
        self.answers.push(Answer::Atomic { psn, original, msn: self.msn });
        Ok(())
    }

    /// A packet whose sequence number was taken before.
    pub(super) fn take_again<H: Host + ?Sized>(&mut self, packet: &Packet<'_>, host: &mut H) -> Verdict {
        match (packet.bth().opcode.class(), packet.headers.ext) {
            (Class::Read, Extension::Reth(reth)) => self.read_again(packet, reth, host),
            (Class::Atomic, Extension::Atomic(eth)) => self.atomic_again(packet, eth),
            _ => {
                self.acknowledge(self.expected.before(), Syndrome::ACK);
                Verdict::Repeated
            }
        }
    }

    /// SPEC: IBTA C9-105 and following: a repeated READ may ask for the rest of the original's range.
    ///
    /// It may also be the network that repeats it, long after its key is gone: that fails nothing.
    fn read_again<H: Host + ?Sized>(&mut self, packet: &Packet<'_>, reth: Reth, host: &mut H) -> Verdict {
        let (psn, range) = (packet.bth().psn, reth.0);
        let is_legal = self.config.rights.read
            && packet.payload.is_empty()
            && range.len <= MESSAGE_LEN_MAX
            && self.config.mtu.packets(range.len) <= self.expected.packets_since(psn);
        if !is_legal || (range.len != 0 && host.check_read(range).is_err()) {
            return Verdict::Dropped(Dropped::BadRepeat);
        }
        let reading = Reading { is_repeat: true, ..self.reading(packet, range) };
        if !self.answers.restart(reading) {
            if !self.answers.has_room() {
                return Verdict::Dropped(Dropped::TooManyRepeats);
            }
            self.answers.push(Answer::Read(reading));
        }
        Verdict::Repeated
    }

    /// An atomic is never carried out twice: the word has moved on, so its result is remembered.
    fn atomic_again(&mut self, packet: &Packet<'_>, eth: AtomicEth) -> Verdict {
        let (psn, opcode) = (packet.bth().psn, packet.bth().opcode);
        let known = self.atomics.iter().find(|known| known.psn == psn);
        let Some(known) = known.filter(|known| known.opcode == opcode && known.eth == eth) else {
            return Verdict::Dropped(Dropped::BadRepeat);
        };
        let answer = Answer::Atomic { psn, original: known.original, msn: self.msn };
        if !self.answers.has_atomic(psn) {
            if !self.answers.has_room() {
                return Verdict::Dropped(Dropped::TooManyRepeats);
            }
            self.answers.push(answer);
        }
        Verdict::Repeated
    }
}
