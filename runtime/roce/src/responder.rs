//! The responder: takes requests in the order of their sequence numbers, carries them out, answers.
//!
//! *Who owns what.* It owns the sequence state, the answers that wait to be sent and the results of the
//! latest atomics. Memory and receives are the [`Host`]'s: it checks every access and may refuse it.
//!
//! ```text
//!                      | before expected          | expected                | after expected
//!  SEND, WRITE         | acknowledged again       | carried out             | asked for what is
//!  READ                | carried out again        | accepted, answered      | missing, once for
//!  ATOMIC              | answered from the cache  | carried out, remembered | each gap
//! ```
//!
//! INVARIANT: a request is carried out at most once, READs excepted. INVARIANT: after a refusal nothing is
//! carried out any more; only the answers up to the refusal are still sent.

mod answers;
mod execute;

use std::collections::VecDeque;

use answers::{Answer, Answers};

use crate::Dropped;
use crate::types::{AtomicOp, Msn, Mtu, PKey, Psn, QpNum, RemoteAddr, RemoteRange, RnrTimer};
use crate::wire::{AtomicEth, NakCode, Opcode, Packet, Syndrome};

/// What a requester may do to this end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Rights {
    /// RDMA READ.
    pub read: bool,
    /// RDMA WRITE.
    pub write: bool,
    /// Atomics.
    pub atomic: bool,
}

impl Rights {
    /// Everything.
    pub const ALL: Self = Self { read: true, write: true, atomic: true };
}

/// What a responder needs to know about its connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ResponderConfig {
    /// Queue pair at the other end, to which answers go.
    pub dest_qpn: QpNum,
    /// Partition.
    pub pkey: PKey,
    /// Payload of a full packet.
    pub mtu: Mtu,
    /// Sequence number of the first request.
    pub first_psn: Psn,
    /// What the requester may do.
    pub rights: Rights,
    /// Time that a requester is asked to wait for a receive.
    pub min_rnr_timer: RnrTimer,
    /// READs and atomics that may be unanswered together; 0 refuses them all.
    pub max_reads: u8,
}

impl ResponderConfig {
    /// The usual limits for a connection to `dest_qpn`, with all rights.
    #[must_use]
    pub const fn new(dest_qpn: QpNum, mtu: Mtu, first_psn: Psn) -> Self {
        Self {
            dest_qpn,
            pkey: PKey::DEFAULT,
            mtu,
            first_psn,
            rights: Rights::ALL,
            min_rnr_timer: RnrTimer::new(12),
            max_reads: 16,
        }
    }
}

/// Why a request cannot be carried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Refusal {
    /// It is not a legal one.
    #[error("the request is not a legal one")]
    InvalidRequest,
    /// The key does not allow the access.
    #[error("the key does not allow the access")]
    RemoteAccess,
    /// This end failed at it.
    #[error("the responder could not carry it out")]
    RemoteOperation,
}

impl Refusal {
    /// The code that tells the requester.
    #[must_use]
    pub const fn nak(self) -> NakCode {
        match self {
            Self::InvalidRequest => NakCode::InvalidRequest,
            Self::RemoteAccess => NakCode::RemoteAccess,
            Self::RemoteOperation => NakCode::RemoteOperation,
        }
    }
}

/// No receive is posted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("no receive is posted")]
pub struct NoReceive;

/// A message that used up a receive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Received {
    /// Bytes: of the SEND in the receive's memory, or of the WRITE in its own.
    pub len: u32,
    /// Immediate data.
    pub imm: Option<u32>,
    /// The requester asked for an event.
    pub solicited: bool,
    /// It was a WRITE with immediate data.
    pub is_write: bool,
}

/// The device around a responder: its memory, keys and receives.
///
/// A refusal is final: the connection has failed, and the host reports that as its kind does.
pub trait Host {
    /// Writes `bytes` at `offset` of a range, if the key covers *all* of the range.
    ///
    /// A message's packets come in order, each byte once; the key may change between them.
    ///
    /// # Errors
    /// Why not; no byte is written then.
    fn write(&mut self, range: RemoteRange, offset: u32, bytes: &[u8]) -> Result<(), Refusal>;

    /// Checks that the key lets all of a range be read; the reading follows packet by packet.
    ///
    /// # Errors
    /// Why not.
    fn check_read(&mut self, range: RemoteRange) -> Result<(), Refusal>;

    /// Reads `into.len()` bytes at `offset` of a range that was checked; the key may have changed.
    ///
    /// # Errors
    /// Why not.
    fn read(&mut self, range: RemoteRange, offset: u32, into: &mut [u8]) -> Result<(), Refusal>;

    /// Carries out an operation on an 8-byte word, which is aligned as numbers go, and gives what it was.
    ///
    /// # Errors
    /// Why not; the word is unchanged then.
    fn atomic(&mut self, on: RemoteAddr, op: AtomicOp) -> Result<u64, Refusal>;

    /// Takes the next posted receive for the message that starts now, or ends with immediate data.
    ///
    /// # Errors
    /// [`NoReceive`]: the requester is asked to come again, and so will this call.
    fn open_receive(&mut self) -> Result<(), NoReceive>;

    /// Puts bytes of a SEND in the open receive's memory.
    ///
    /// # Errors
    /// Why not; the receive completes in error by the host's own doing.
    fn fill_receive(&mut self, offset: u32, bytes: &[u8]) -> Result<(), Refusal>;

    /// Completes the open receive.
    ///
    /// # Errors
    /// Why not.
    fn complete_receive(&mut self, received: Received) -> Result<(), Refusal>;
}

/// A packet was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Transmit {
    /// Bytes written: BTH to padding, and four zero bytes where the invariant CRC goes.
    pub len: usize,
}

/// What a packet meant to a responder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It came in its turn and was carried out.
    Executed,
    /// It came before and is answered again.
    Repeated,
    /// Something before it is missing.
    OutOfSequence {
        /// The requester is asked for it; it has been asked before if not.
        asked: bool,
    },
    /// No receive is posted; the requester is asked to wait.
    NotReady,
    /// It was refused; the connection has failed.
    Refused(Refusal),
    /// It should not have come.
    Dropped(Dropped),
}

/// A message of which packets are still to come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Current {
    Send { done: u32 },
    Write { range: RemoteRange, done: u32 },
}

/// An atomic that was carried out.
#[derive(Debug, Clone, Copy)]
struct Remembered {
    psn: Psn,
    opcode: Opcode,
    eth: AtomicEth,
    original: u64,
}

/// The receiving half of a connection.
///
/// Hand it what arrives with [`Self::handle_packet`], then call [`Self::poll_transmit`] until it gives
/// nothing, also after a refusal: the refusal itself is still to be sent.
#[derive(Debug)]
pub struct Responder {
    config: ResponderConfig,
    expected: Psn,
    msn: Msn,
    current: Option<Current>,
    answers: Answers,
    atomics: VecDeque<Remembered>,
    /// The requester was asked for what is missing.
    asked: bool,
    refused: Option<Refusal>,
}

impl Responder {
    /// A responder on a new connection.
    #[must_use]
    pub fn new(config: ResponderConfig) -> Self {
        Self {
            expected: config.first_psn,
            msn: Msn::default(),
            current: None,
            answers: Answers::new(config.max_reads),
            atomics: VecDeque::new(),
            asked: false,
            refused: None,
            config,
        }
    }

    /// Takes in a packet that is for this queue pair and whose invariant CRC holds.
    pub fn handle_packet<H: Host + ?Sized>(&mut self, packet: &Packet<'_>, host: &mut H) -> Verdict {
        let bth = packet.bth();
        if !self.config.pkey.admits(bth.pkey) {
            return Verdict::Dropped(Dropped::PKey);
        }
        if !bth.opcode.is_request() {
            return Verdict::Dropped(Dropped::WrongHalf);
        }
        if self.refused.is_some() {
            return Verdict::Dropped(Dropped::Failed);
        }
        match bth.psn.distance_from(self.expected) {
            ..0 => self.take_again(packet, host),
            0 => self.take_next(packet, host),
            1.. => self.ask_for_missing(),
        }
    }

    /// Writes the next answer at the start of `out`, payload included.
    ///
    /// The invariant CRC is the caller's ([`crate::wire::Flow::seal`]).
    ///
    /// # Panics
    /// PANIC: if `out` is shorter than [`Mtu::packet_len_max`].
    pub fn poll_transmit<H: Host + ?Sized>(&mut self, host: &mut H, out: &mut [u8]) -> Option<Transmit> {
        assert!(out.len() >= self.config.mtu.packet_len_max(), "the buffer holds a full packet");
        match self.answers.transmit(&self.config, host, out) {
            Ok(len) => Some(Transmit { len: len? }),
            Err((psn, refusal)) => {
                // The key changed after the READ was accepted; what was to follow it is not sent.
                self.answers.clear();
                self.refuse(psn, refusal);
                self.poll_transmit(host, out)
            }
        }
    }

    /// Whether answers wait to be sent.
    #[must_use]
    pub fn has_answers(&self) -> bool {
        !self.answers.is_empty()
    }

    /// Why the connection has failed, if it has; the host moves the queue pair to an error state.
    #[must_use]
    pub const fn refused(&self) -> Option<Refusal> {
        self.refused
    }

    /// Sequence number of the next request.
    #[must_use]
    pub const fn expected_psn(&self) -> Psn {
        self.expected
    }

    /// Messages completed.
    #[must_use]
    pub const fn msn(&self) -> Msn {
        self.msn
    }

    /// Whether a message has started and not ended.
    #[must_use]
    pub const fn is_amid_message(&self) -> bool {
        self.current.is_some()
    }

    fn ask_for_missing(&mut self) -> Verdict {
        let asked = !std::mem::replace(&mut self.asked, true);
        if asked {
            self.acknowledge(self.expected, Syndrome::Nak(NakCode::PsnSequence));
        }
        Verdict::OutOfSequence { asked }
    }

    fn refuse(&mut self, psn: Psn, refusal: Refusal) {
        self.refused = Some(refusal);
        self.current = None;
        self.acknowledge(psn, Syndrome::Nak(refusal.nak()));
    }

    fn acknowledge(&mut self, psn: Psn, syndrome: Syndrome) {
        self.answers.push(Answer::Ack { psn, syndrome, msn: self.msn });
    }
}
