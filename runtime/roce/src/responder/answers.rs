//! Answers that wait to be sent, in the order of the requests.
//!
//! Acknowledgements are coalesced: one that nobody has sent yet is replaced by the next. READs and
//! atomics are bounded by the number that may be unanswered together, and as many repeated ones.

use std::collections::VecDeque;

use super::{Host, Refusal, ResponderConfig};
use crate::types::{Msn, Psn, RemoteRange};
use crate::wire::{Aeth, AtomicAckEth, Bth, Extension, Headers, Opcode, Part, Syndrome, pad_of};

/// An answer that waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Answer {
    /// An acknowledgement, positive or negative.
    Ack { psn: Psn, syndrome: Syndrome, msn: Msn },
    /// A READ's data.
    Read(Reading),
    /// What the word of an atomic was.
    Atomic { psn: Psn, original: u64, msn: Msn },
}

/// A READ whose data is being sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Reading {
    /// Sequence number of its first packet.
    pub(super) psn: Psn,
    /// What is read.
    pub(super) range: RemoteRange,
    /// Packets in all.
    pub(super) packets: u32,
    /// Packets sent.
    pub(super) sent: u32,
    pub(super) msn: Msn,
    /// The READ was accepted before: if it fails now, the connection does not.
    pub(super) is_repeat: bool,
}

/// All answers of one responder that wait.
#[derive(Debug)]
pub(super) struct Answers {
    waiting: VecDeque<Answer>,
    /// READs and atomics among them.
    num_responses: usize,
    max_reads: usize,
}

impl Answers {
    pub(super) const fn new(max_reads: u8) -> Self {
        // CAST: widening in a const fn.
        Self { waiting: VecDeque::new(), num_responses: 0, max_reads: max_reads as usize }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    pub(super) fn clear(&mut self) {
        self.waiting.clear();
        self.num_responses = 0;
    }

    /// Whether a well-behaved requester could have sent another READ or atomic.
    ///
    /// Repeated ones take room too, so there is twice the room that new ones need.
    pub(super) fn has_room(&self) -> bool {
        self.num_responses < 2 * self.max_reads
    }

    pub(super) fn push(&mut self, answer: Answer) {
        if matches!(answer, Answer::Ack { .. }) {
            // A later word on acknowledgement says all that an unsent earlier one would.
            while matches!(self.waiting.back(), Some(Answer::Ack { .. })) {
                self.waiting.pop_back();
            }
        } else {
            self.num_responses += 1;
        }
        self.waiting.push_back(answer);
    }

    /// Starts a READ anew that is being answered; false if none with this sequence number is.
    pub(super) fn restart(&mut self, again: Reading) -> bool {
        let holds = |reading: &Reading| {
            !reading.psn.is_after(again.psn) && again.psn.packets_since(reading.psn) < reading.packets
        };
        for answer in &mut self.waiting {
            if let Answer::Read(reading) = answer
                && holds(reading)
            {
                *reading = again;
                return true;
            }
        }
        false
    }

    /// Whether the answer to this atomic waits already.
    pub(super) fn has_atomic(&self, wanted: Psn) -> bool {
        self.waiting.iter().any(|answer| matches!(answer, Answer::Atomic { psn, .. } if *psn == wanted))
    }

    /// Writes the next packet; its length, or where reading failed and why.
    pub(super) fn transmit<H: Host + ?Sized>(
        &mut self,
        config: &ResponderConfig,
        host: &mut H,
        out: &mut [u8],
    ) -> Result<Option<usize>, (Psn, Refusal)> {
        let len = match self.waiting.front_mut() {
            None => return Ok(None),
            Some(Answer::Read(reading)) => match reading.transmit(config, host, out) {
                Ok(len) if reading.sent < reading.packets => return Ok(Some(len)),
                Ok(len) => len,
                Err(_) if reading.is_repeat => {
                    self.pop();
                    return self.transmit(config, host, out);
                }
                Err(failed) => return Err(failed),
            },
            Some(Answer::Ack { psn, syndrome, msn }) => {
                let ext = Extension::Aeth(Aeth { syndrome: *syndrome, msn: *msn });
                emit(config, Opcode::Ack, *psn, ext, out)
            }
            Some(Answer::Atomic { psn, original, msn }) => {
                let aeth = Aeth { syndrome: Syndrome::ACK, msn: *msn };
                let ext = Extension::AtomicAck(aeth, AtomicAckEth { original: *original });
                emit(config, Opcode::AtomicAck, *psn, ext, out)
            }
        };
        self.pop();
        Ok(Some(len))
    }

    fn pop(&mut self) {
        if let Some(Answer::Read(_) | Answer::Atomic { .. }) = self.waiting.pop_front() {
            self.num_responses -= 1;
        }
    }
}

impl Reading {
    fn transmit<H: Host + ?Sized>(
        &mut self,
        config: &ResponderConfig,
        host: &mut H,
        out: &mut [u8],
    ) -> Result<usize, (Psn, Refusal)> {
        let psn = self.psn.plus(self.sent);
        let mtu = config.mtu.bytes();
        let offset = self.sent * mtu;
        let part = Part::new(self.sent == 0, self.sent + 1 == self.packets);
        let ext = match part {
            Part::Middle => Extension::None,
            _ => Extension::Aeth(Aeth { syndrome: Syndrome::ACK, msn: self.msn }),
        };
        // CAST: u32 to usize on a 64-bit host.
        let len = (self.range.len - offset).min(mtu) as usize;
        let headers = headers(config, Opcode::read_response(part), psn, ext, pad_of(len));
        let start = headers.emit(out).expect("headers are built for their opcode, and fit");
        if len != 0 {
            let into = &mut out[start..start + len];
            host.read(self.range, offset, into).map_err(|refusal| (psn, refusal))?;
        }
        self.sent += 1;
        Ok(crate::finish_packet(out, start + len, headers.bth.pad))
    }
}

fn emit(config: &ResponderConfig, opcode: Opcode, psn: Psn, ext: Extension, out: &mut [u8]) -> usize {
    let headers = headers(config, opcode, psn, ext, 0);
    let end = headers.emit(out).expect("headers are built for their opcode, and fit");
    crate::finish_packet(out, end, 0)
}

const fn headers(config: &ResponderConfig, opcode: Opcode, psn: Psn, ext: Extension, pad: u8) -> Headers {
    let bth = Bth {
        opcode,
        solicited: false,
        migrated: true,
        pad,
        pkey: config.pkey,
        fecn: false,
        becn: false,
        dest_qpn: config.dest_qpn,
        ack_req: false,
        psn,
    };
    Headers { bth, ext }
}
